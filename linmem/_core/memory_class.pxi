# The Python class Memory: a handle on a memory of any kind; a part of memory.pyx.
#
# Most methods check their arguments, enter() the handle, call one nogil function, and finish().

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.ref cimport Py_REFCNT
from cpython.slice cimport PySlice_AdjustIndices, PySlice_Unpack
from linmem._core.atomic cimport add_with_gil

from linmem._files.delta import Delta as _Delta
from linmem._core.element_formats import array_on as _array_on, resolve as _resolve_format

cdef Py_ssize_t SEARCH_STEP = 1 << 20           # bytes that `in` copies at a time
cdef size_t RELEASE_GIL_FROM = 1 << 16      # bytes: releasing the GIL costs more than copying fewer bytes

# Memory.users, from the top bit down. The parts share one number, so that close() sees all of them at once.
#
#   63      62         49 .. 61                        20 .. 48           0 .. 19
#   closed  released   the generation of the calls     exported buffers   calls under way
#
# closed: close() was called. released: the handle's reference on the memory has been dropped.
# A call belongs to a thread, and a forked child does not have its parent's threads: calls of an older generation do not
# count. An exported buffer is an object, and the child has it.
cdef enum:
    ONE_CALL = 1
    CALLS = (1 << 20) - 1
    EXPORTS_SHIFT = 20
    TAG_SHIFT = 49
cdef long long ONE_EXPORT = 1 << EXPORTS_SHIFT
cdef long long EXPORTS = ((<long long>1 << (TAG_SHIFT - EXPORTS_SHIFT)) - 1) << EXPORTS_SHIFT
cdef long long TAG = <long long>GENERATION_TAGS << TAG_SHIFT
cdef long long RELEASED = <long long>1 << 62
cdef long long CLOSED = -RELEASED - RELEASED

cdef extern from *:
    # As in cpython.buffer, but `noexcept`: the caller checks the result, and so needs no `try`, which would make each
    # export slower.
    int fill_buffer "PyBuffer_FillInfo"(Py_buffer* buffer, object exporter, void* data, Py_ssize_t size, bint read_only,
                                        int flags) noexcept

_ACCESSES = {"none": pages.ACCESS_NONE, "r": pages.ACCESS_READ, "rw": pages.ACCESS_READ_WRITE,
             "rx": pages.ACCESS_READ_EXECUTE}


cdef object wrap(memory* m):
    """A handle that takes over one reference on the memory. If only its creator knew the memory, it is Python's from
    now on. If this raises, the reference has been dropped."""
    handle = handle_on(m)
    if load(&m.owner) == OWNER_CREATOR:
        store_release(&m.owner, OWNER_PYTHON)
        if load(&reports_are_on):
            note_maker(m)
    return handle


cdef Memory handle_on(memory* m):
    """As wrap(). If only its creator knew the memory, find() and live() still do not return it."""
    cdef Memory handle
    try:
        handle = Memory.__new__(Memory)
    except BaseException:
        with nogil:
            memory_release(m)
        raise
    handle.m = m
    handle.users = generation_tag << TAG_SHIFT
    if m.growth_is_watched:
        tell_wrapped(m, handle)
    return handle


cdef void tell_wrapped(memory* m, Memory handle) noexcept:
    cdef memory_hook* hook = m.hooks
    while hook != NULL:
        if hook.wrapped != NULL:
            hook.wrapped(hook, m, <PyObject*>handle)
        hook = hook.next


cdef bint only_buffers_hold(Memory handle) noexcept:
    """Whether the handle is closed, or exported buffers have all references on it except for one of the caller."""
    cdef long long now = load(&handle.users)
    return now < 0 or Py_REFCNT(handle) - 1 <= (now & EXPORTS) >> EXPORTS_SHIFT


# -- copying bytes

cdef inline void move_bytes(memory* m, size_t offset, size_t n, char* out, const char* data) noexcept nogil:
    if out != NULL:
        memcpy(out, m.base + offset, n)
    else:
        memmove(m.base + offset, data, n)


# Small, so that the C compiler inlines it into each method.
cdef inline int copy_bytes(memory* m, size_t offset, size_t n, char* out, const char* data) except -1:
    """Copy to `out`, or from `data` if `out` is NULL. The caller has entered the handle and checked the range."""
    if n < RELEASE_GIL_FROM and try_access(m):
        if not is_guarded(m):
            move_bytes(m, offset, n, out, data)
            end_access(m)
            return 0
        end_access(m)
    return copy_slowly(m, offset, n, out, data)


cdef int copy_slowly(memory* m, size_t offset, size_t n, char* out, const char* data) except -1:
    """copy_bytes() of many bytes, of protected pages, or after a wait for a mover.

    No page of the range changes its access meanwhile, because a guarded memory is locked. The pages of a Python memory
    may be another linmem memory's: that memory is not locked, and its user must not protect them during this call.
    """
    cdef failure why
    cdef int code = begin_access(m, &why)
    cdef bint guarded = is_guarded(m), locks = guarded and m.ops.pages_are_ours
    if code:
        return raise_failure(&why)
    if n < RELEASE_GIL_FROM and not guarded:
        move_bytes(m, offset, n, out, data)
        end_access(m)
        return 0
    with nogil:
        if locks:
            end_access(m)
            code = lock_memory(m, &why)
        if code == 0:
            if guarded:
                code = refuse_access(m, offset, n, READABLE if out != NULL else WRITABLE,
                                     "read" if out != NULL else "write", &why)
            if code == 0:
                move_bytes(m, offset, n, out, data)
            if locks:
                unlock(&m.lock)
            else:
                end_access(m)
    return raise_failure(&why) if code else 0


cdef bytes copy_out(Memory mem, size_t offset, size_t n):
    cdef memory* m = mem.enter()
    try:
        check_span(m, offset, n)
        out = PyBytes_FromStringAndSize(NULL, n)
        copy_bytes(m, offset, n, PyBytes_AS_STRING(out), NULL)
        return out
    finally:
        mem.leave()


cdef int copy_in(Memory mem, size_t offset, const Py_buffer* given) except -1:
    cdef memory* m = mem.enter()
    try:
        check_span(m, offset, given.len)
        return copy_bytes(m, offset, given.len, NULL, <const char*>given.buf)
    finally:
        mem.leave()


cdef Py_ssize_t unpack_slice(Memory mem, object key, Py_ssize_t* start, Py_ssize_t* stop, Py_ssize_t* step) except -1:
    """As range(*key.indices(len(mem))). Returns how many bytes the slice has. The size is read first, because an index
    of the key may be an object that grows the memory."""
    cdef Py_ssize_t size = len(mem)
    PySlice_Unpack(key, start, stop, step)
    return PySlice_AdjustIndices(size, start, stop, step[0])


cdef bint copy_steps(Memory mem, Py_ssize_t start, Py_ssize_t step, Py_ssize_t n, char* out,
                     const char* data) except -1:
    """copy_bytes() of the `n` > 0 bytes at start, start + step, ... False: a page is protected, and nothing was copied.
    """
    cdef Py_ssize_t i, last = start + (n - 1) * step
    cdef bint guarded
    cdef failure why
    cdef memory* m = mem.enter()
    try:
        check_span(m, <size_t>min(start, last), <size_t>(max(start, last) - min(start, last)) + 1)
        if begin_access(m, &why):
            raise_failure(&why)
        guarded = is_guarded(m)
        with nogil:
            for i in range(0 if guarded else n):
                if out != NULL:
                    out[i] = m.base[start + i * step]
                else:
                    m.base[start + i * step] = data[i]
            end_access(m)
        return not guarded
    finally:
        mem.leave()


cdef inline Py_ssize_t clipped_key(object key) except? -1:
    return clipped_index(key, "a memory is indexed by an integer or a slice")


cdef int copy_byte(Memory mem, Py_ssize_t i, object key, char* out, const char* data) except -1:
    """copy_bytes() of the byte that the index `i` means. The key is for the message."""
    cdef Py_ssize_t size
    cdef memory* m = mem.enter()
    try:
        size = memory_size(m)       # a memory never shrinks, so the index stays valid after this check
        if not -size <= i < size:
            allowed = f"in {-size} .. {size - 1}" if size else "of a byte, and the memory is empty"
            raise IndexError(f"index must be {allowed}, got {_shown(key)}")
        return copy_bytes(m, i + size if i < 0 else i, 1, out, data)
    finally:
        mem.leave()


# -- Memory.users

cdef void forget_lost_calls(Memory mem) noexcept:
    """In a forked child, the calls of the parent's threads do not count any more. Elsewhere this does nothing."""
    cdef long long was, now
    while True:
        was = load(&mem.users)
        now = (was & ~(TAG | CALLS)) | generation_tag << TAG_SHIFT
        if was & TAG == now & TAG:
            return
        if compare_exchange(&mem.users, was, now):
            break
    if now < 0:
        release_if_unused(mem, now)


cdef void release_if_unused(Memory mem, long long now) noexcept:
    """A call or an exported buffer of a closed handle has ended. now: the value of `users` then."""
    cdef memory* m = mem.m
    # A count of -1: the call began before a fork and ends in the child. forget_lost_calls() had set the count of calls
    # to 0, and the end of this call subtracted 1 from it. Add 1, so that the count is 0 again.
    if now & CALLS == CALLS:
        add_with_gil(&mem.users, ONE_CALL)
    elif now & (RELEASED | EXPORTS | CALLS) == 0 and compare_exchange(&mem.users, now, now | RELEASED):
        if memory_unref(m):     # before the GIL is released, so that a tracker sees no memory without a handle
            with nogil:
                memory_drop(m)


cdef long long mark_closed(Memory mem, long long unless) noexcept:
    """Set CLOSED, unless a bit of `unless` is set. Returns the value of `users` then."""
    cdef long long now = load(&mem.users)
    while now >= 0 and now & unless == 0:
        if compare_exchange(&mem.users, now, now | CLOSED):
            return now | CLOSED
        now = load(&mem.users)
    return now


cdef memory* enter_access(Memory mem) except NULL:
    """enter(), and begin_access(). end_access() and leave() must follow, and no line between may raise."""
    cdef memory* m = mem.enter()
    cdef failure why
    cdef int code = begin_access(m, &why)
    if code:
        mem.finish(code, &why)
    return m


# -- exported buffers

cdef int export_buffer(Memory mem, Py_buffer* buffer, object exporter, size_t offset, Py_ssize_t size,
                       int flags) except -1:
    """Until end_export() the base and the pages stay. size: -1 means the whole memory."""
    cdef bint read_only = False
    cdef failure why
    cdef memory* m = mem.enter()
    cdef int code = pin(m, &why)
    if code == 0 and load(&m.protection) != PROTECTION_NONE:
        with nogil:
            code = is_read_only(m, &read_only, &why)
            if code:
                unpin(m)
    if code:
        mem.finish(code, &why)
    if add_with_gil(&mem.users, ONE_EXPORT - ONE_CALL) < 0:     # close() on another thread has not seen this export
        end_export(mem)
        raise ValueError("the memory is closed")
    if fill_buffer(buffer, exporter, m.base + offset, <Py_ssize_t>memory_size(m) if size < 0 else size, read_only,
                   flags):
        end_export(mem)
        return -1           # fill_buffer() has set the exception
    return 0


cdef void end_export(Memory mem) noexcept:
    cdef long long now
    unpin(mem.m)
    now = add_with_gil(&mem.users, -ONE_EXPORT)
    if now < 0:
        forget_lost_calls(mem)      # lost calls must not keep the memory alive
        release_if_unused(mem, load(&mem.users))


@cython.final
cdef class Memory:
    """Memory()\n--\n
    A linear memory: bytes at an address that a growth within `byte_capacity` does not change.

    A creator makes it (`linmem.create`, `linmem.MmapCreator`, `linmem.wasmtime.linear_memory`); the class cannot be
    called. It is a writable buffer of `len(mem)` bytes: ``memoryview(mem)``, ``numpy.asarray(mem)``. Sizes and offsets
    are in bytes.
    """

    def __init__(self, *args, **kwargs):
        if self.m == NULL or args or kwargs:
            raise TypeError("a Memory is made by a creator: linmem.create(minimum)")

    def __dealloc__(self):
        if self.m != NULL and load(&self.users) & RELEASED == 0 and memory_unref(self.m):
            with nogil:
                memory_drop(self.m)

    # enter() and leave(): between them the handle keeps its reference on the memory. After close(), enter() raises, and
    # the last call that leaves drops the reference. self.m is written once, before other code sees the handle.
    #
    # Between enter() and leave() no line may raise, unless a `try` follows enter() at once. No foreign Python code runs
    # between them, except grow_to() of a memory in Python.
    cdef memory* enter(self) except NULL:
        cdef long long now = add_with_gil(&self.users, ONE_CALL)
        if now >> TAG_SHIFT != generation_tag or self.m.enters_slowly:
            self.refuse_entry(now)
        return self.m

    # A method, because the C compiler would inline a function into enter(), which would make each call slower.
    cdef int refuse_entry(self, long long now) except -1:
        """Raises; or returns, if this is only the handle's first use in a forked child, or a check that succeeds."""
        cdef failure why
        cdef int code
        while now >= 0 and now >> TAG_SHIFT != generation_tag and self.m != NULL:
            forget_lost_calls(self)     # also the call that enter() has just counted
            now = add_with_gil(&self.users, ONE_CALL)
        if now < 0 or self.m == NULL:
            self.leave()
            raise ValueError("the memory is closed")
        if self.m.broken:
            self.leave()
            raise_code(E_BROKEN)
        if self.m.ops.check != NULL:
            code = self.m.ops.check(self.m, &why)
            if code:
                return self.finish(code, &why)
        return 0

    cdef memory* enter_locked(self) except NULL:
        """enter(), and take the memory's lock. unlock() and leave() must follow, and no line between may raise."""
        cdef memory* m = self.enter()
        cdef failure why
        cdef int code
        with nogil:
            code = lock_memory(m, &why)
        if code:
            self.finish(code, &why)
        return m

    cdef void leave(self) noexcept:
        cdef long long now = add_with_gil(&self.users, -ONE_CALL)
        if now < 0 or now & CALLS == CALLS:
            release_if_unused(self, now)

    cdef int finish(self, int code, const failure* why) except -1:
        """leave(), and raise if the call has failed."""
        self.leave()
        return raise_failure(why) if code else 0

    def close(self):
        """Close this handle. The pages go with the memory's last handle, and not before wasmtime has dropped it.

        A second call does nothing, also in another thread. Afterwards every other call is `ValueError`. Calls that are
        under way in other threads complete, and the pages go with the last of them. If a wasmtime store owns the
        memory, only this handle is closed: the program goes on, and `linmem.wasmtime.linear_memory` gives a new handle.

        Raises
        ------
        BufferError
            While buffers are exported from this handle; the message says how many.
        RuntimeError
            In the grow_to() of the memory in Python that is behind this handle.
        """
        cdef memory* m = self.m
        cdef long long now
        cdef bint own
        if m == NULL:
            return
        forget_lost_calls(self)
        now = add_with_gil(&self.users, ONE_CALL)
        own = is_own_growth(m)
        if not own:
            now = mark_closed(self, EXPORTS)
        self.leave()
        if now < 0:
            return
        if own:
            raise_code(E_OWN_GROWTH)
        raise BufferError(f"cannot close the memory: {(now & EXPORTS) >> EXPORTS_SHIFT} exported buffer(s) still point"
                          " into it")

    @property
    def closed(self):
        """Whether the handle was closed, by `close` or at the end of a ``with`` block."""
        return self.m == NULL or load(&self.users) < 0

    def __enter__(self):
        self.enter()
        self.leave()
        return self

    def __exit__(self, *exc):
        """Close the handle, also while buffers are exported: the pages then go with the last buffer.

        It never raises, so an error of the block is not hidden.
        """
        if self.m != NULL:
            forget_lost_calls(self)
            release_if_unused(self, mark_closed(self, 0))

    # Two handles on one memory are equal while both are open. Afterwards the address may be another memory's. The hash
    # is the hash of the address, which a handle never changes.
    def __eq__(self, other):
        if not isinstance(other, Memory):
            return NotImplemented
        return self is other or (self.m == (<Memory>other).m and not self.closed and not other.closed)

    def __hash__(self):
        return hash(<size_t>self.m)

    # -- the trait LinearMemory

    def byte_size(self):
        """Bytes accessible now; mirrors ``wasmtime::LinearMemory::byte_size``."""
        cdef size_t size = memory_size(self.enter())
        self.leave()
        return size

    def byte_capacity(self):
        """Bytes up to which growth never moves the base; ``wasmtime::LinearMemory::byte_capacity``."""
        cdef size_t capacity = load_size(&self.enter().capacity)
        self.leave()
        return capacity

    def maximum_byte_size(self):
        """The most bytes that `grow_to` will ever accept, or None."""
        cdef size_t maximum = load_size(&self.enter().maximum)
        self.leave()
        return None if maximum == NO_MAXIMUM else maximum

    @cython.binding(False)      # a plain method descriptor, which saves two C calls per call
    @cython.embedsignature(True)
    @cython.embedsignature.format("clinic")
    def grow_to(self, new_size):
        """Make `new_size` bytes accessible, the new ones zero; mirrors ``wasmtime::LinearMemory::grow_to``.

        It happens whole or changes nothing. Up to `byte_capacity` the base stays, and every view remains valid. Past
        `byte_capacity`, only a memory that was made with ``may_move=True`` grows: it moves, and only while no buffer is
        exported. Uses mprotect(2), and mremap(2) to move.

        Parameters
        ----------
        new_size : int
            In bytes. The present size does nothing.

        Raises
        ------
        ValueError
            Smaller than `byte_size`, or the memory is closed.
        GrowError
            Past the maximum, or past the capacity of a memory that cannot move (`LimitError`: a budget).
        BufferError
            Past the capacity while a buffer is exported.
        PageError
            The OS refused.
        OwnedError
            A wasmtime store owns the memory: ``wasmtime.Memory.grow`` grows it.
        """
        cdef size_t size
        cdef failure why
        cdef int code
        cdef memory* m
        check_bounded(new_size, "new_size", "within maximum_byte_size() and byte_capacity(); where the memory may"
                      " move, below 2**63", &size)
        m = self.enter()
        with nogil:
            code = grow_as(m, size, True, &why)
        self.finish(code, &why)

    def as_ptr(self):
        """Address of byte 0, a multiple of the host page; mirrors ``wasmtime::LinearMemory::as_ptr``."""
        cdef size_t address = <size_t>load_address(&self.enter().base)
        self.leave()
        return address

    def wasm_accessible(self):
        """Addresses that native code may touch: base .. capacity + guard, accessible or a fault.

        Mirrors ``wasmtime::LinearMemory::wasm_accessible``.
        """
        cdef memory* m = enter_access(self)
        cdef size_t base = <size_t>load_address(&m.base), end = base + load_size(&m.covered)
        end_access(m)
        self.leave()
        return range(base, end)

    # -- buffers and views

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        export_buffer(self, buffer, self, 0, -1, flags)

    def __releasebuffer__(self, Py_buffer* buffer):
        end_export(self)

    def view(self, format="B", offset=0, count=None):
        """Export a part of the memory as elements of a type, without a copy.

        The view stays valid through every growth, and it keeps the pages. Its length is fixed now.

        Parameters
        ----------
        format : str or type or dtype
            A `struct` format ("d", ">I"), a NumPy type string or name ("<f8", "float64"), a NumPy dtype or
            scalar type, or `bool`, `int` (64 bits), `float`. `array` takes the dtypes that have no such format.
            ``view[0]`` is NotImplementedError for formats that `memoryview` does not know: those of another byte order
            than the machine's, and "e" before Python 3.12. ``numpy.asarray(view)`` knows these formats.
        offset : int
            In bytes, of any alignment.
        count : int, optional
            In elements. The default is all whole elements up to `byte_size`.

        Returns
        -------
        memoryview
            One dimension, writable.

        Raises
        ------
        ValueError, TypeError
            There is no such format, or the part is not within `byte_size`.
        """
        cdef size_t start, n, itemsize, size, most
        text, itemsize, castable = _resolve_format(format)
        check_bounded(offset, "offset", _WITHIN, &start)
        size = self.byte_size()
        if start > size:
            raise ValueError(f"offset must be <= byte_size() ({size}), got {start}")
        n = most = (size - start) // itemsize
        if count is not None:
            check_count(count, "count", &n, "within byte_size(), in elements")
            if n > most:
                raise ValueError(f"count must be <= {most} elements of {itemsize} bytes"
                                 f" from offset {start} in {size} bytes, got {n}")
        if castable:
            return memoryview(self)[start:start + n * itemsize].cast(text)
        return memoryview(new_window(self, start, text.encode(), n, itemsize))

    def array(self, dtype, offset=0, shape=None):
        """A NumPy array on a part of the memory, without a copy, of any dtype that NumPy can view bytes as.

        The array stays valid through every growth, and it keeps the pages. Its shape is fixed now.

        Parameters
        ----------
        dtype : dtype
            Or an argument of `numpy.dtype`: also dates, records, sub-arrays and the other byte order. A dtype that
            holds Python objects is refused.
        offset : int
            In bytes, of any alignment.
        shape : int or tuple of int, optional
            In elements. One number may be -1: as many elements as fit whole below `byte_size`. None is -1.

        Returns
        -------
        numpy.ndarray
            Writable, unless the memory is read-only.

        Raises
        ------
        ValueError, TypeError
            There is no such dtype, or the part is not within `byte_size`.
        ImportError
            NumPy is not installed.
        """
        return _array_on(self, dtype, offset, shape)

    def __dlpack__(self, **options):
        """The bytes for ``from_dlpack`` of NumPy, PyTorch and others, without a copy. Needs NumPy.

        What takes them counts as an exported buffer: the memory does not close while it exists.
        """
        return _array_on(self, "u1", 0, None).__dlpack__(**options)

    def __dlpack_device__(self):
        """The device of the bytes, as DLPack names it: the CPU."""
        return 1, 0

    # -- bytes

    def __len__(self):
        cdef Py_ssize_t size = memory_size(self.enter())
        self.leave()
        return size

    def __bool__(self):
        return True         # even if the memory has no bytes; len() tells that

    def __contains__(self, item):
        """Whether the bytes of a buffer lie in the memory, one after the other; of an integer: whether the byte does.

        Copies the buffer, and at most 1 MiB (or twice the length of the buffer) of the memory at a time. Bytes that
        other threads write meanwhile may be found or not.
        """
        cdef Py_ssize_t start, size = len(self), n, step
        try:
            byte = item.__index__()
        except (AttributeError, TypeError):     # a NumPy array with dimensions raises TypeError here
            byte = None
        if isinstance(byte, int):
            if not 0 <= byte <= 255:
                raise ValueError(f"a byte must be in 0 .. 255, got {_shown(item)}")
            item = bytes((byte,))
        with _check_bytes(item, "what is looked for") as view:
            shows_protected(view)       # raises if a byte of it cannot be read
            # A copy: find() of CPython 3.12 on Windows also reads the byte after the buffer that it looks for.
            wanted = bytes(view) if len(view) <= size else None
        if wanted is None:
            return False
        n = len(wanted)
        step = max(n, SEARCH_STEP)
        for start in range(0, size - n + 1, step):
            if copy_out(self, start, min(step + n, size - start)).find(wanted) >= 0:
                return True
            PyErr_CheckSignals()
        return False

    def __getitem__(self, key):
        cdef unsigned char byte
        cdef Py_ssize_t start, stop, step, n
        if isinstance(key, slice):
            n = unpack_slice(self, key, &start, &stop, &step)
            if step == 1:
                return copy_out(self, start, n)
            out = PyBytes_FromStringAndSize(NULL, n)
            if n and not copy_steps(self, start, step, n, PyBytes_AS_STRING(out), NULL):
                return bytes([self[i] for i in range(start, stop, step)])
            return out
        copy_byte(self, clipped_key(key), key, <char*>&byte, NULL)
        return byte

    def __setitem__(self, key, value):
        cdef Py_ssize_t i, start, stop, step, n, byte
        cdef char as_char
        cdef Py_buffer given
        if isinstance(key, slice):
            n = unpack_slice(self, key, &start, &stop, &step)
            take_bytes(value, "data", &given)
            try:        # the buffer is held, so its length cannot change after the comparison
                if given.len != n:
                    raise ValueError(f"the slice has {n} bytes and the data {given.len}: a memory cannot be resized by"
                                     " assignment")
                if step == 1:
                    copy_in(self, start, &given)
                elif n:
                    values = PyBytes_FromStringAndSize(<char*>given.buf, given.len)
                    if not copy_steps(self, start, step, n, NULL, PyBytes_AS_STRING(values)):
                        check_writable(self, start, step, n)
                        for i, byte in zip(range(start, stop, step), values):
                            self[i] = byte
            finally:
                PyBuffer_Release(&given)
            return
        i = clipped_key(key)
        byte = clipped_index(value, "a byte must be an integer in 0 .. 255")
        if not 0 <= byte <= 255:
            raise ValueError(f"a byte must be in 0 .. 255, got {_shown(value)}")
        as_char = <char>byte
        copy_byte(self, i, key, NULL, &as_char)

    def __delitem__(self, key):
        raise TypeError("a memory's bytes cannot be deleted")

    def read(self, offset, size):
        """Copy `size` bytes from `offset` out, as `bytes`.

        ValueError past `byte_size`, and if a page cannot be read (`protect`).
        """
        cdef size_t start, n
        check_bounded(offset, "offset", _WITHIN, &start)
        check_bounded(size, "size", _WITHIN, &n)
        return copy_out(self, start, n)

    def write(self, offset, data):
        """Copy a contiguous buffer in at `offset` and return its length in bytes.

        ValueError past `byte_size`, if a page cannot be written, or if the data lie in a memory where a page cannot be
        read (`protect`). Nothing is written then.
        """
        cdef size_t start
        cdef Py_buffer given
        check_bounded(offset, "offset", _WITHIN, &start)
        take_bytes(data, "data", &given)
        try:
            copy_in(self, start, &given)
            return given.len
        finally:
            PyBuffer_Release(&given)

    # -- images

    def snapshot(self):
        """An immutable `Image` of the memory's present contents.

        The call takes time and space for the pages that are not zero, and skips most of the others. The bytes
        are copied one after the other, so the image may hold a part of the bytes that other threads write meanwhile.

        Returns
        -------
        Image
            Its `offset` is 0 and its `size` is this memory's `byte_size`.

        Raises
        ------
        PageError
            The OS has no room for the image.
        TypeError
            A page is inaccessible.
        """
        cdef image* img = NULL
        cdef failure why
        cdef int code
        cdef Image made = Image.__new__(Image)
        cdef memory* m = self.enter()
        with nogil:
            code = memory_snapshot(m, &img, &why)
        self.finish(code, &why)
        return made.adopt(img, 0)

    def restore(self, image not None, *, zero_grown=False):
        """Restore every byte from an image; the bytes outside of the image become zero.

        Views stay valid and see the restored bytes. A memory that started from the image, or was restored to it before,
        takes time for the pages that were written since. Another memory is mapped or copied anew.

        The size stays, because the guest already knows the memory's size. So a memory that is larger than the image's
        memory was is refused: the size that the image records (an allocator's, above all) would be wrong.

        Parameters
        ----------
        image : Image
        zero_grown : bool
            Accept a memory that has grown, and zero the bytes that it has grown by.

        Raises
        ------
        ValueError
            The memory is smaller than the image, or larger without `zero_grown`. A memory that a native creator made
            from this image with a larger minimum has its right size as long as it does not grow.
        OwnedError
            A wasmtime store owns the memory, and another thread is growing it now (a call runs in that store), or is
            in another call that looks at all of it. linmem cannot know of other calls in that store.
        TypeError
            A page cannot be written.
        """
        cdef failure why
        cdef int code
        check_type(image, Image, "image")
        check_flag(zero_grown, "zero_grown")
        cdef Image img = <Image>image
        cdef bint grown = zero_grown
        cdef memory* m = self.enter()
        with nogil:
            code = memory_restore(m, img.img, grown, &why)
        self.finish(code, &why)

    def dirty_pages(self, since not None, *, as_array=False):
        """Where the memory differs from an image, as ranges of whole host pages.

        Exact: a page that was written and holds the image's bytes again is not among them. A page outside of the image
        is compared with zeros.

        Parameters
        ----------
        since : Image
        as_array : bool
            Return a NumPy array of shape (n, 2) and type uint64.

        Returns
        -------
        list of (int, int)
            Offset and size in bytes, in order. Neighbours are one range, and the last range ends at `byte_size` at
            most.

        Raises
        ------
        TypeError
            A page is inaccessible.
        """
        cdef changes found
        cdef size_t i
        cdef size_t* pairs
        check_type(since, Image, "since")
        check_flag(as_array, "as_array")
        find_changes(self, <Image>since, False, &found)
        try:
            if not as_array:
                return [(found.list[i].offset, found.list[i].size) for i in range(found.n)]
            import numpy
            array = numpy.empty((found.n, 2), numpy.uint64)
            pairs = <size_t*><size_t>array.ctypes.data
            for i in range(found.n):
                pairs[2 * i] = found.list[i].offset
                pairs[2 * i + 1] = found.list[i].size
            return array
        finally:
            free(found.list)

    def apply(self, delta not None):
        """Write a `Delta` into the memory, which has the contents of the delta's base.

        A memory that is smaller than the delta's is grown first. The bytes are not compared with the base's. The size
        must be the base's, the delta's, or between.

        Parameters
        ----------
        delta : Delta

        Raises
        ------
        ValueError
            The memory is smaller than the delta's base, or larger than the delta's memory.
        OwnedError
            The memory had to grow, and a wasmtime store owns it. Nothing was written.
        GrowError, PageError
            The memory cannot grow so far. Nothing was written.
        TypeError
            A page that the delta writes cannot be written. Nothing was written, and the memory has not grown.
        """
        cdef failure why
        cdef memory* m
        cdef size_t base_size, size, n, i, taken = 0
        cdef int code
        cdef delta_piece* pieces
        cdef Py_buffer* buffers
        check_type(delta, _Delta, "delta")
        parts = list(delta.pieces())        # a subclass may override pieces(); the rest runs no foreign code
        base_size, size, n = delta.base_size, delta.size, len(parts)
        pieces = <delta_piece*>calloc(n + 1, sizeof(delta_piece))
        buffers = <Py_buffer*>calloc(n + 1, sizeof(Py_buffer))
        try:
            if pieces == NULL or buffers == NULL:
                raise_code(E_NO_MEMORY)
            for i, (offset, length, data) in enumerate(parts):
                pieces[i].offset, pieces[i].size = offset, length
                if data is not None:
                    take_bytes(data, "data", &buffers[taken])
                    pieces[i].bytes, pieces[i].size = <const char*>buffers[taken].buf, buffers[taken].len
                    taken += 1
            m = self.enter()
            with nogil:
                code = memory_apply(m, base_size, size, pieces, n, &why)
            self.finish(code, &why)
        finally:
            for i in range(taken):
                PyBuffer_Release(&buffers[i])
            free(pieces)
            free(buffers)

    # -- pages

    def protect(self, offset, size, access):
        """Set the access of whole host pages; mprotect(2).

        Calls of linmem that would touch a page against its access raise: `read`, `write`, ``mem[...]`` ValueError,
        calls on the whole memory (`snapshot`, `restore` ...) TypeError. Code that touches the page through a view, or
        by its address, faults, which ends the process. A memory of which no byte can be written exports read-only
        buffers; views that exist already stay writable and fault.

        A memory with protected pages never moves. "rx" is for machine code that was written before: pages are never
        writable and executable at once. New pages of a growth are "rw".

        Parameters
        ----------
        offset, size : int
            In bytes, multiples of the host page, within `byte_size`.
        access : {"none", "r", "rw", "rx"}

        Raises
        ------
        ValueError
            The access is another one, or the range is not whole pages of the memory.
        PageError
            The OS refused, as some hosts refuse "rx". Every page has the access that it had. If the OS refuses that
            too, the access of a page is unknown, and calls raise as if the page were inaccessible, until it is
            protected anew. The same holds in a child that was forked while another thread was in this call.
        OwnedError
            A wasmtime store owns the memory, and access is not "rw". A plain load or store of the guest would trap, but
            ``memory.fill``, ``memory.copy`` and WASI calls run in native code, where a fault ends the process.
        TypeError
            The pages are not linmem's (a memory made in Python).
        """
        cdef size_t start, n
        cdef int how, code
        cdef memory* m
        cdef failure why
        check_bounded(offset, "offset", _WITHIN, &start)
        check_bounded(size, "size", _WITHIN, &n)
        how = _ACCESSES[_check_choice(access, "access", _ACCESSES)]
        m = self.enter()
        with nogil:
            code = memory_protect(m, start, n, how, &why)
        self.finish(code, &why)

    def map(self, offset, source, source_offset=0, size=None, access="rw"):
        """Show pages of a source in a part of the memory, without a copy; mmap(2), MAP_FIXED.

        ========================= ============================ =========================================
        source                    what a write does            what later writes to the source do
        ========================= ============================ =========================================
        an `Image`                changes only this memory     there are none
        a file open for reading   changes only this memory     they show in pages that were not written
        a file open for update    changes the file             they show
        a shared memory           changes that memory          they show
        a `linmem.empty` array    changes the array            they show
        ========================= ============================ =========================================

        Views stay valid and show the new pages. Offsets and sizes are multiples of the host page. The last page of a
        source may be incomplete: its rest is zero. `docs/howto/mapping.md` says what other calls do on such pages.

        Parameters
        ----------
        offset : int
            Where the pages appear in this memory.
        source : Image, Memory, array or file
            A memory that processes share, or the memory of a file; a contiguous array, or another buffer, that begins
            at a host page of such a memory. A file is an object with
            ``fileno()``, of a regular file. Into a memory that a wasmtime store owns, the bytes of a file that other
            programs can cut short are copied. If such a file is open for update, it is refused, and so is the memory
            of such a file, because an access to a page past the end of a file ends the process.
        source_offset : int
            Where the pages begin in the source; for an `Image`, counted from its first byte.
        size : int, optional
            In bytes; the default is the rest of the source, to the end of its last page.
        access : {"rw", "r"}
            "r": the pages are read-only, as after `protect`. In a memory that a wasmtime store owns, "r" means that
            writes change only this memory.

        Raises
        ------
        ValueError
            The range is not whole pages of this memory or of the source, or the source is a file that cannot be read or
            that is not a regular file.
        TypeError
            The source has no pages that another memory can show, the pages of this memory are not its own, or the
            system cannot map pages (Windows), or allocates no space in a file that is open for update (macOS, BSD).
        OwnedError
            A wasmtime store owns the memory, and the source is a file that is open for update, or its memory.
        PageError
            The OS refused. Nothing has changed, or, by an old kernel that failed half way, the range is zero.
        MemoryError
            The windows of all memories would take more than half of the mappings of the process.
        """
        map_into(self, offset, source, source_offset, size, access)

    def unmap(self, offset, size):
        """Replace the pages of a range that show a source by pages of zeros; other pages stay as they are.

        Parameters
        ----------
        offset, size : int
            In bytes, multiples of the host page, within `byte_size`.

        Raises
        ------
        ValueError
            The range is not whole pages of the memory.
        PageError
            The OS refused. Windows before the refused one may have been unmapped.
        """
        if size is None:
            raise TypeError("size must be an integer number of bytes, got None")
        call_on_range(self, memory_unmap, offset, size)

    def discard(self, offset=0, size=None):
        """Give the pages back to the OS; the bytes read as zero afterwards. madvise(2), MADV_DONTNEED.

        Also in a memory that started from an image the bytes read as zero, and no longer as the image.

        Parameters
        ----------
        offset, size : int
            In bytes; the default is the rest of the memory. Parts of a page are set to zero. If the range has protected
            pages, it must be whole host pages.

        Raises
        ------
        ValueError
            The range is not within `byte_size`.
        PageError
            The OS refused; no byte has changed.
        TypeError
            The pages are not linmem's; or some are protected and the OS cannot discard such pages; or some are
            protected and some are an image's.
        """
        call_on_range(self, memory_discard, offset, size)

    def prefault(self, offset=0, size=None):
        """Make the pages of a range resident now; no byte changes. madvise(2), MADV_POPULATE_WRITE.

        Parameters
        ----------
        offset, size : int
            In bytes; the default is the rest of the memory. Rounded outwards to host pages.

        Raises
        ------
        ValueError
            The range is not within `byte_size`.
        PageError
            The OS refused, or a page cannot be written.
        TypeError
            The pages are not linmem's, or are protected and the OS would fault.
        """
        call_on_range(self, memory_prefault, offset, size)

    def flush(self, offset=0, size=None):
        """Make the bytes of a file memory durable: they are in the file, also if the power fails after the call.

        msync(2), and fdatasync(2) after a growth. The call may write more than the range. Growth and close() do not
        flush: the OS writes the bytes within seconds, also if the process is killed, but not if the power fails.

        Parameters
        ----------
        offset, size : int
            In bytes; the default is the rest of the memory.

        Raises
        ------
        ValueError
            The range is not within `byte_size`, or the memory was opened for reading.
        PageError
            The OS could not write. Bytes that were not flushed before may be lost.
        TypeError
            The memory has no file.
        """
        call_on_range(self, memory_flush, offset, size)

    # -- shared memories

    def handle(self):
        """What another process needs to attach this shared memory: `linmem.attach` takes it.

        The handle can be pickled any number of times, also as an argument of a ``Process``, a ``Pool`` or a Dask task
        on this machine. It does not keep the memory.

        Returns
        -------
        SharedHandle

        Raises
        ------
        TypeError
            The memory is not a shared one.
        """
        return shared_handle(self)

    def wait_for_growth(self, size, timeout=None):
        """Wait until a shared memory has at least `size` bytes; futex(2).

        Parameters
        ----------
        size : int
            In bytes.
        timeout : float, optional
            In seconds; None: no limit.

        Returns
        -------
        bool
            False: the time is over. In a memory that a wasmtime store owns, True means that other processes have the
            size; the guest has it after its next ``memory.grow``.

        Raises
        ------
        ValueError
            The memory can never have `size` bytes.
        TypeError
            The memory is not a shared one.
        """
        return wait_for_growth(self, size, timeout)

    def unlink(self):
        """Remove the name of a shared memory (`shm_name`). Processes that have the memory keep it.

        Raises
        ------
        ValueError
            The memory has no name.
        FileNotFoundError
            The name has been removed already.
        TypeError
            The memory is not a shared one; or on Windows, where the name is gone with the last process.
        """
        shared_unlink(self)

    def info(self):
        """The memory's present figures, as a `MemoryInfo`; asks the OS which pages are resident (mincore(2)).

        A page that was only read counts as resident, as the kernel's page of zeros is.
        """
        cdef memory* m = enter_access(self)
        try:
            return info_of(m)
        finally:
            self.leave()

    def __repr__(self):
        if self.closed:
            return "<linmem.Memory, closed>"
        try:
            return (f"<linmem.Memory: {_show_size(self.byte_size())} at {self.as_ptr():#x},"
                    f" capacity {_show_size(self.byte_capacity())}>")
        except (MemoryError, OSError, RuntimeError, ValueError):    # for example, its file was cut short
            return "<linmem.Memory, closed>" if self.closed else "<linmem.Memory, lost>"

    def __reduce__(self):
        raise TypeError("a Memory cannot be pickled or copied: it is an address in this process (mem.snapshot() can)")


cdef object info_of(memory* m):
    """The caller has begun an access, which ends here."""
    cdef size_t resident = 0, base, size, capacity, maximum, committed, pre_guard, guard, growths
    cdef long long exports
    cdef failure why
    cdef int code = 0
    cdef const char* kind = m.ops.kind
    cdef domain* name = memory_name(m)
    cdef bint known = m.ops.resident != NULL, in_store = load(&m.owner) == OWNER_WASMTIME
    with nogil:
        if known:
            code = memory_resident(m, &resident, &why)
        exports = max(pins_now(m), 0)
        base, capacity, maximum = <size_t>load_address(&m.base), load_size(&m.capacity), load_size(&m.maximum)
        size, pre_guard, guard = memory_size(m), m.pre_guard, m.guard
        committed, growths = load_size(&m.accessible), load_size(&m.growths)
        domain_retain(name)
        end_access(m)
    name_text = domain_name(name)
    with nogil:
        domain_release(name)
    if code:
        raise_failure(&why)
    from linmem.records import MemoryInfo
    return MemoryInfo(
        base=base, byte_size=size, byte_capacity=capacity,
        maximum_byte_size=None if maximum == NO_MAXIMUM else maximum,
        reserved=pre_guard + capacity + guard, committed=committed, resident=resident if known else None,
        pre_guard=pre_guard, guard=guard, page_size=host_page(), exports=exports, kind=kind.decode(),
        owner="wasmtime" if in_store else "python", name=name_text, growths=growths)


ctypedef int (*range_function)(memory* m, size_t offset, size_t size, failure* why) noexcept nogil


cdef int call_on_range(Memory mem, range_function call, object offset, object size) except -1:
    """size: None means the rest of the memory from the offset on."""
    cdef size_t start, n = 0, byte_size
    cdef failure why
    cdef int code
    cdef memory* m
    check_bounded(offset, "offset", _WITHIN, &start)
    if size is not None:
        check_bounded(size, "size", _WITHIN, &n)
    m = mem.enter()
    byte_size = memory_size(m)
    if size is None and start <= byte_size:
        n = byte_size - start
    with nogil:
        code = call(m, start, n, &why)
    return mem.finish(code, &why)


cdef int check_writable(Memory mem, size_t offset, Py_ssize_t step, Py_ssize_t n) except -1:
    """Each of the `n` bytes at offset, offset + step, ... can be written. They are within byte_size."""
    cdef failure why
    cdef int code = 0
    cdef memory* m = mem.enter_locked()
    with nogil:
        while n and code == 0:
            code = refuse_access(m, offset, 1, WRITABLE, "write", &why)
            offset += step
            n -= 1
        unlock(&m.lock)
    return mem.finish(code, &why)


cdef int find_changes(Memory mem, Image base, bint for_delta, changes* out) except -1:
    """As memory_changes()."""
    cdef failure why
    cdef int code
    cdef memory* m = mem.enter()
    with nogil:
        code = memory_changes(m, base.img, for_delta, out, &why)
    return mem.finish(code, &why)


_abc.LinearMemory.register(Memory)
