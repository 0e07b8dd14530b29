# The Python handle on a memory of any kind; a part of memory.pyx.

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_SIMPLE, PyBUF_STRIDES, PyBUF_WRITABLE, \
    PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.string cimport memmove

from linmem._core.atomic cimport add_with_gil

from linmem._core import arguments as _checks
from linmem._files.delta import Delta as _Delta
from linmem._core.arguments import check_bytes as _check_bytes, given as _given, refuse_buffer as _refuse_buffer
from linmem._core.element_formats import array_on as _array_on, resolve as _resolve_format

cdef size_t SEARCH_STEP = 1 << 20                   # bytes that `in` copies at a time

# Memory.users, from the top. One word, so that close() sees all of it at once.
#
#   63      62           49 .. 61                               20 .. 48           0 .. 19
#   closed  given back   the generation that the calls are of   exported buffers   calls under way
#
# Calls are those of threads, and a forked child does not have the parent's: there an older generation's are none.
# Exported buffers are objects, and the child has them.
cdef enum:
    ONE_CALL = 1
    CALLS = (1 << 20) - 1
    EXPORTS_SHIFT = 20
    TAG_SHIFT = 49
cdef long long ONE_EXPORT = 1 << EXPORTS_SHIFT
cdef long long EXPORTS = ((<long long>1 << (TAG_SHIFT - EXPORTS_SHIFT)) - 1) << EXPORTS_SHIFT
cdef long long TAG = <long long>TAGS << TAG_SHIFT
cdef long long GIVEN_BACK = <long long>1 << 62
cdef long long CLOSED = -GIVEN_BACK - GIVEN_BACK
cdef size_t RELEASE_GIL_FROM = 1 << 16              # bytes; a shorter copy costs less than letting go


cdef object wrap(memory* m):
    """A handle that takes over one reference, also when it cannot be made."""
    cdef Memory handle
    try:
        handle = Memory.__new__(Memory)
    except BaseException:
        with nogil:
            memory_release(m)
        raise
    handle.m = m
    handle.users = gate_tag << TAG_SHIFT
    return handle


@cython.final
cdef class Memory:
    """A linear memory: bytes at an address that never moves while they grow.

    Made by a creator (`linmem.create`, `linmem.MmapCreator`, `linmem.wasmtime.linear_memory`), not
    by calling the class. It is a writable buffer of `len(mem)` bytes: ``memoryview(mem)``,
    ``numpy.asarray(mem)``. Sizes and offsets are in bytes.
    """

    def __init__(self, *args, **kwargs):
        if self.m == NULL or args or kwargs:
            raise TypeError("a Memory is made by a creator: linmem.create(minimum)")

    def __dealloc__(self):
        if self.m != NULL and load(&self.users) & GIVEN_BACK == 0:
            with nogil:
                memory_release(self.m)

    # The gate. Whoever is inside keeps the reference on m. close() shuts the gate, and the last one that leaves gives m
    # back. m itself is written once, by who made the handle: nobody looks at it from outside.
    #
    # Between enter() and leave() nothing may raise, unless a `try` stands right behind enter(); and no Python code of
    # others runs there, but for the grow_to of a memory in Python.
    cdef memory* enter(self) except NULL:
        cdef long long now = add_with_gil(&self.users, ONE_CALL)
        if now >> TAG_SHIFT != gate_tag or self.m.broken:
            self.refuse_entry(now)
        return self.m

    cdef int refuse_entry(self, long long now) except -1:
        """Raises, or it was the first look in a forked child, and all is well."""
        while now >= 0 and now >> TAG_SHIFT != gate_tag and self.m != NULL:
            self.settle()           # forgets the call that was counted, too
            now = add_with_gil(&self.users, ONE_CALL)
        if now < 0 or self.m == NULL:
            self.leave()
            raise ValueError("the memory is closed")
        if self.m.broken:
            self.leave()
            raise_code(E_BROKEN)
        return 0

    cdef void settle(self) noexcept:
        cdef long long was, now
        while True:
            was = load(&self.users)
            now = (was & ~(TAG | CALLS)) | gate_tag << TAG_SHIFT
            if was & TAG == now & TAG:
                return
            if swap_if(&self.users, was, now):
                break
        if now < 0:
            self.last_left(now)

    cdef void leave(self) noexcept:
        cdef long long now = add_with_gil(&self.users, -ONE_CALL)
        if now < 0 or now & CALLS == CALLS:
            self.last_left(now)

    cdef void last_left(self, long long now) noexcept:
        cdef memory* m = self.m
        if now & CALLS == CALLS:        # who left had entered before this process was forked, and was forgotten
            add_with_gil(&self.users, ONE_CALL)
        elif now & (GIVEN_BACK | EXPORTS | CALLS) == 0 and swap_if(&self.users, now, now | GIVEN_BACK):
            with nogil:
                memory_release(m)

    def close(self):
        """Give up this handle; the pages go with the memory's last handle, and not before wasmtime has dropped it.

        Closing twice is closing once, in whatever threads. Afterwards every other call is `ValueError`. Calls that
        are under way in other threads end as if they had come before; the pages go with the last of them. On a memory
        that a wasmtime store owns, this handle alone is closed: the program goes on, and
        `linmem.wasmtime.linear_memory` gives a new handle.

        Raises
        ------
        BufferError
            While buffers are exported from this handle; it says how many.
        RuntimeError
            In the grow_to of the memory in Python that is behind this handle.
        """
        cdef memory* m = self.m
        cdef long long now
        cdef bint own
        if m == NULL:
            return
        self.settle()
        now = add_with_gil(&self.users, ONE_CALL)
        if now < 0:
            self.leave()
            return
        own = is_own_growth(m)
        while now >= 0 and now & EXPORTS == 0 and not own:
            if swap_if(&self.users, now, now | CLOSED):
                now |= CLOSED
            else:
                now = load(&self.users)
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
        """Close the handle, also while buffers are exported: the pages then go with the last of these.

        It raises nothing, so that an error of the block is seen.
        """
        cdef long long now
        if self.m == NULL:
            return
        self.settle()
        now = load(&self.users)
        while now >= 0 and not swap_if(&self.users, now, now | CLOSED):
            now = load(&self.users)
        if now >= 0:
            self.last_left(now | CLOSED)

    # Handles on the same memory are equal while both are open: afterwards the address may be another memory's. The
    # hash is that of the address, which a handle never changes.
    def __eq__(self, other):
        if not isinstance(other, Memory):
            return NotImplemented
        return self is other or (self.m == (<Memory>other).m and not self.closed and not other.closed)

    def __hash__(self):
        return hash(<size_t>self.m)

    # -- the trait

    def byte_size(self):
        """Bytes accessible now; mirrors ``wasmtime::LinearMemory::byte_size``."""
        cdef memory* m = self.enter()
        cdef size_t size = memory_size(m)
        self.leave()
        return size

    def byte_capacity(self):
        """Bytes up to which growth never moves the base; ``wasmtime::LinearMemory::byte_capacity``."""
        cdef memory* m = self.enter()
        cdef size_t capacity = peek(&m.capacity)
        self.leave()
        return capacity

    def maximum_byte_size(self):
        """The most bytes that `grow_to` will ever accept, or None."""
        cdef memory* m = self.enter()
        cdef size_t maximum = peek(&m.maximum)
        self.leave()
        return None if maximum == NO_MAXIMUM else maximum

    @cython.binding(False)      # a plain method descriptor: two calls less per call
    @cython.embedsignature(True)
    @cython.embedsignature.format("clinic")
    def grow_to(self, new_size):
        """Make `new_size` bytes accessible, the new ones zero; mirrors ``wasmtime::LinearMemory::grow_to``.

        It happens whole or changes nothing. Up to `byte_capacity` the base stays and every view remains
        valid. Past it only a memory that was made with ``may_move=True`` grows: it moves, which it does only
        while nothing is exported. Uses mprotect(2), and mremap(2) to move.

        Parameters
        ----------
        new_size : int
            In bytes. The size it has is a no-op.

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
            A wasmtime store owns the memory: it grows by ``wasmtime.Memory.grow``.
        """
        cdef size_t size
        cdef failure why
        cdef int code
        cdef memory* m
        check_bounded(new_size, "new_size", "be within maximum_byte_size() and byte_capacity(); where the memory may"
                      " move, below 2**63", &size)
        m = self.enter()
        with nogil:
            code = grow_locked(m, size, True, &why)
        self.leave()
        if code:
            raise_failure(&why)

    def as_ptr(self):
        """Address of byte 0, a multiple of the host page; mirrors ``wasmtime::LinearMemory::as_ptr``."""
        cdef memory* m = self.enter()
        cdef size_t address = <size_t>peek_address(&m.base)
        self.leave()
        return address

    def wasm_accessible(self):
        """Addresses that native code may touch: base .. capacity + guard, accessible or a fault.

        Mirrors ``wasmtime::LinearMemory::wasm_accessible``.
        """
        cdef memory* m = self.enter()
        cdef size_t base, end
        try:
            begin_access(m)
            base = <size_t>peek_address(&m.base)
            end = base + peek(&m.covered)
            end_access(m)
        finally:
            self.leave()
        return range(base, end)

    # -- bytes

    def __len__(self):
        cdef memory* m = self.enter()
        cdef Py_ssize_t size = <Py_ssize_t>memory_size(m)
        self.leave()
        return size

    def __bool__(self):
        return True         # a handle, as a file: whether it has bytes now is what len() says

    def __contains__(self, item):
        """Whether the bytes of a buffer stand somewhere in the memory, one after the other; of an integer: the byte.

        Copies at most 1 MiB (or twice as much as is looked for) at a time. Bytes that others write meanwhile may be
        found or not.
        """
        cdef size_t at = 0, size = <size_t>len(self), n, step
        try:
            byte = item.__index__()
        except (AttributeError, TypeError):     # an array has the method, and is a number only without dimensions
            byte = None
        if isinstance(byte, int):
            if not 0 <= byte <= 255:
                raise ValueError(f"a byte must be in 0 .. 255, got {_shown(item)}")
            item = bytes((byte,))
        with _check_bytes(item, "what is looked for") as wanted:
            shows_protected(wanted)     # raises if a byte of it cannot be read
            n = <size_t>len(wanted)
            step = max(n, SEARCH_STEP)
            while n <= size - at:
                if self.read(at, min(step + n, size - at)).find(wanted) >= 0:
                    return True
                if size - at <= step:
                    break
                at += step
                PyErr_CheckSignals()
        return False

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        cdef memory* m = self.enter()
        cdef bint pinned = False, read_only = False
        cdef failure why
        cdef int code
        try:
            pin(m)
            pinned = True
            if load(&m.protection) != PROTECTION_NONE:
                with nogil:
                    code = is_read_only(m, &read_only, &why)
                if code:
                    raise_failure(&why)
            PyBuffer_FillInfo(buffer, self, m.base, <Py_ssize_t>memory_size(m), read_only, flags)
        except BaseException:
            if pinned:
                unpin(m)
            self.leave()
            raise
        self.call_becomes_export()

    def __releasebuffer__(self, Py_buffer* buffer):
        self.release_export()

    cdef void call_becomes_export(self) noexcept:
        add_with_gil(&self.users, ONE_EXPORT - ONE_CALL)

    cdef void release_export(self) noexcept:
        cdef long long now
        unpin(self.m)
        now = add_with_gil(&self.users, -ONE_EXPORT)
        if now < 0:
            self.settle()       # in a forked child, calls of the parent's threads keep nothing
            self.last_left(load(&self.users))

    def view(self, format="B", offset=0, count=None):
        """Export a part of the memory as elements of a type, without a copy.

        The view stays valid through every growth; it keeps the memory open. Its length is fixed now.

        Parameters
        ----------
        format : str or type or dtype
            A `struct` format ("d", ">I"), a NumPy type string or name ("<f8", "float64"), a NumPy dtype or
            scalar type, or `bool`, `int` (64 bits), `float`. `array` takes the dtypes that have no such format.
        offset : int
            In bytes, of any alignment.
        count : int, optional
            In elements. All whole ones up to `byte_size` by default.

        Returns
        -------
        memoryview
            One dimension, writable.

        Raises
        ------
        ValueError, TypeError
            For no such format, or for a part that is not within `byte_size`.
        """
        cdef size_t start, n, itemsize, size
        cdef Window window
        text, itemsize, castable = _resolve_format(format)
        check_bounded(offset, "offset", _WITHIN, &start)
        size = <size_t>self.byte_size()
        if start > size:
            raise ValueError(f"offset must be <= byte_size() ({size}), got {start}")
        if count is None:
            n = (size - start) // itemsize
        else:
            check_at_length(count, "count", "an integer", "be within byte_size(), in elements", &n)
            if n > (size - start) // itemsize:
                raise ValueError(f"count must be <= {(size - start) // itemsize} elements of {itemsize} bytes"
                                 f" from offset {start} in {size} bytes, got {n}")
        if castable:
            return memoryview(self)[start:start + n * itemsize].cast(text)
        window = <Window>Window.__new__(Window)
        window.memory = self
        window.offset = start
        window.format = text.encode()
        window.shape[0] = <Py_ssize_t>n
        window.strides[0] = <Py_ssize_t>itemsize
        return memoryview(window)

    def array(self, dtype, offset=0, shape=None):
        """A NumPy array on a part of the memory, without a copy, of any dtype that NumPy can view bytes as.

        The array stays valid through every growth; it keeps the memory open. Its shape is fixed now.

        Parameters
        ----------
        dtype : dtype
            Or what NumPy makes one of: also dates, records, sub-arrays and the other byte order. One that holds
            Python objects is refused.
        offset : int
            In bytes, of any alignment.
        shape : int or tuple of int, optional
            In elements. One number may be -1: as many as there are whole up to `byte_size`. None is -1.

        Returns
        -------
        numpy.ndarray
            Writable, unless the memory is read-only.

        Raises
        ------
        ValueError, TypeError
            For no such dtype, or for a part that is not within `byte_size`.
        ImportError
            NumPy is not installed.
        """
        return _array_on(self, dtype, offset, shape)

    def __getitem__(self, key):
        cdef Py_ssize_t i, size
        cdef memory* m
        cdef unsigned char byte
        if isinstance(key, slice):
            if key.step is None or key.step == 1:
                size = len(self)
                start, stop, _ = key.indices(size)
                return self.read(start, stop - start if stop > start else 0)
            if self.is_protected():
                return bytes([self[n] for n in range(*key.indices(len(self)))])
            with memoryview(self) as whole:
                return whole[key].tobytes()
        i = check_index(key)
        m = self.enter()
        try:
            i = check_range(i, <Py_ssize_t>memory_size(m))      # it never becomes less
            begin_access(m)
            if is_guarded(m):
                end_access(m)
                read_protected(m, <size_t>i, 1, <char*>&byte)
                return byte
            byte = (<unsigned char*>m.base)[i]
            end_access(m)
            return byte
        finally:
            self.leave()

    def __setitem__(self, key, value):
        cdef Py_ssize_t i, n
        cdef memory* m
        cdef Py_ssize_t byte
        cdef char as_char
        cdef Py_buffer given
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            items = range(start, stop, step)
            n = len(items)
            take_bytes(value, "data", &given)
            try:        # the buffer is held, so that its length stays what is compared here
                if given.len != n:
                    raise ValueError(f"the slice has {n} bytes and the data {given.len}: a memory cannot be resized by"
                                     " assignment")
                if step == 1:
                    self.write(start, value)
                elif n:
                    self.set_items(items, PyBytes_FromStringAndSize(<char*>given.buf, given.len))
            finally:
                PyBuffer_Release(&given)
            return
        i = check_index(key)
        try:
            byte = value
        except OverflowError:
            byte = -1
        except TypeError:
            raise TypeError(f"a byte must be an integer in 0 .. 255, got {type(value).__name__}") from None
        if byte < 0 or byte > 255:
            raise ValueError(f"a byte must be in 0 .. 255, got {_shown(value)}")
        m = self.enter()
        try:
            i = check_range(i, <Py_ssize_t>memory_size(m))
            begin_access(m)
            if is_guarded(m):
                end_access(m)
                as_char = <char>byte
                write_protected(m, <size_t>i, 1, &as_char)
                return
            (<unsigned char*>m.base)[i] = <unsigned char>byte
            end_access(m)
        finally:
            self.leave()

    cdef bint is_protected(self) except -1:
        cdef memory* m = self.enter()
        cdef bint answer = is_guarded(m)
        self.leave()
        return answer

    cdef int set_items(self, items, bytes values) except -1:
        """Write a byte at each offset of a range whose step is not 1."""
        if self.is_protected():
            for i in items:
                self.check_access(i, 1, WRITABLE, b"write")
            for i, value in zip(items, values):
                self[i] = value
            return 0
        with memoryview(self) as whole:
            whole[items.start:items.stop if items.stop >= 0 else None:items.step] = values
        return 0

    cdef int check_access(self, size_t start, size_t n, int allowed, const char* call) except -1:
        """The range lies within byte_size."""
        cdef failure why
        cdef int code
        cdef memory* m = self.enter_locked()
        with nogil:
            code = refuse_access(m, start, n, allowed, call, &why)
            unlock(&m.lock)
        self.leave()
        if code:
            raise_failure(&why)
        return 0

    def __delitem__(self, key):
        raise TypeError("a memory's bytes cannot be deleted")

    def read(self, offset, size):
        """Copy `size` bytes from `offset` out, as `bytes`.

        ValueError past `byte_size`, and where a page cannot be read (`protect`).
        """
        cdef size_t start, n
        cdef memory* m
        cdef bytes out
        cdef char* to
        check_bounded(offset, "offset", _WITHIN, &start)
        check_bounded(size, "size", _WITHIN, &n)
        m = self.enter()
        try:
            check_span(start, n, memory_size(m))
            out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>n)
            to = PyBytes_AS_STRING(out)
            begin_access(m)
            if is_guarded(m):
                end_access(m)
                read_protected(m, start, n, to)
            elif n < RELEASE_GIL_FROM:
                memcpy(to, m.base + start, n)
                end_access(m)
            else:
                with nogil:
                    memcpy(to, m.base + start, n)
                    end_access(m)
            return out
        finally:
            self.leave()

    def write(self, offset, data):
        """Copy a contiguous buffer in at `offset` and return its length in bytes.

        Past `byte_size` it is `ValueError`, and so where a page cannot be written, or the data lie in a memory where
        a page cannot be read (`protect`). Nothing is written then.
        """
        cdef size_t start, n
        cdef memory* m
        cdef Py_buffer given
        check_bounded(offset, "offset", _WITHIN, &start)
        take_bytes(data, "data", &given)
        try:
            n = <size_t>given.len
            m = self.enter()
            try:
                check_span(start, n, memory_size(m))
                begin_access(m)
                if is_guarded(m):
                    end_access(m)
                    write_protected(m, start, n, <const char*>given.buf)
                elif n < RELEASE_GIL_FROM:
                    memmove(m.base + start, given.buf, n)
                    end_access(m)
                else:
                    with nogil:
                        memmove(m.base + start, given.buf, n)
                        end_access(m)
                return n
            finally:
                self.leave()
        finally:
            PyBuffer_Release(&given)

    # -- images

    def snapshot(self):
        """What the memory holds now, as an immutable `Image`.

        Takes time and space for the pages that are not zero; the others are skipped, most of them unseen.
        The bytes are copied one after the other: what other threads write meanwhile is in it, or
        is not, or is in part.

        Returns
        -------
        Image
            Its `offset` is 0 and its `size` this memory's `byte_size`.

        Raises
        ------
        PageError
            The OS has no room for it.
        TypeError
            A page is inaccessible.
        """
        cdef image* it = NULL
        cdef failure why
        cdef int code
        cdef ImageHandle handle = ImageHandle.__new__(ImageHandle)
        cdef memory* m = self.enter_locked()
        with nogil:
            code = refuse_protected(m, READABLE, "snapshot", &why)
            if code == 0:
                code = memory_snapshot(m, &it, &why)
            unlock(&m.lock)
        self.leave()
        if code:
            raise_failure(&why)
        handle.it = it
        return _image_of(handle)

    def restore(self, image not None, *, zero_grown=False):
        """Put every byte back to what an image holds, and to zero where it holds nothing.

        Views stay valid and see the restored bytes. A memory that started from the image, or was restored to
        it before, takes time for the pages that were written since; any other is mapped or copied anew.

        The size stays: code that runs on the memory has been told it, and cannot be told less. One that is larger
        than what the image knows of is therefore refused, since the image's own idea of how large its memory is
        (an allocator's, most of all) would be wrong.

        Parameters
        ----------
        image : Image
        zero_grown : bool
            Accept a memory that has grown, and zero what it has grown by.

        Raises
        ------
        ValueError
            The memory is smaller than the image, or larger without `zero_grown`. One that a native creator made
            from this image with a larger minimum has its right size as long as it does not grow.
        OwnedError
            A wasmtime store owns the memory, and another thread is growing it now (a call runs in that store), or is
            in another call that looks at all of it.
            No other call can be known of from here.
        TypeError
            A page cannot be written.
        """
        if not isinstance(image, ImageHandle):
            raise TypeError(f"image must be an Image, got {type(image).__name__}")
        check_flag(zero_grown, "zero_grown")
        begin_restore(self, <ImageHandle>image, zero_grown, True)
        end_restore(self, <ImageHandle>image, True)

    def dirty_pages(self, since not None, *, as_array=False):
        """Where the memory differs from an image, as ranges of whole host pages.

        Exact: a page that was written and holds the image's bytes again is not among them. A page that the
        image does not reach is compared with zeros.

        Parameters
        ----------
        since : Image
        as_array : bool
            Return a NumPy array of shape (n, 2) and type uint64.

        Returns
        -------
        list of (int, int)
            Offset and size in bytes, in order; neighbours are one range, and the last ends at `byte_size`.

        Raises
        ------
        TypeError
            A page is inaccessible.
        """
        cdef changes found
        cdef size_t i, n
        cdef size_t* pairs
        check_flag(as_array, "as_array")
        memory_changes(self, since, "since", False, &found)
        try:
            n = 0
            for i in range(found.n):        # zeros or not is nothing to whoever asks here
                if n and found.list[n - 1].offset + found.list[n - 1].size == found.list[i].offset:
                    found.list[n - 1].size += found.list[i].size
                else:
                    found.list[n] = found.list[i]
                    n += 1
            if not as_array:
                return [(found.list[i].offset, found.list[i].size) for i in range(n)]
            import numpy
            array = numpy.empty((n, 2), numpy.uint64)
            pairs = <size_t*><size_t>array.ctypes.data
            for i in range(n):
                pairs[2 * i] = found.list[i].offset
                pairs[2 * i + 1] = found.list[i].size
            return array
        finally:
            free(found.list)

    def apply(self, delta not None):
        """Write what a `Delta` says into the memory, which holds what the delta's base held.

        A memory that is smaller than the delta's is grown first. That the bytes are the base's is not
        looked at, only that the size can be: it is the base's, the delta's, or between.

        Parameters
        ----------
        delta : Delta

        Raises
        ------
        ValueError
            The memory is smaller than the delta's base, or larger than the delta's memory.
        OwnedError
            It had to grow, and a wasmtime store owns it. Nothing was written.
        GrowError, PageError
            It cannot grow so far. Nothing was written.
        TypeError
            A page that it would write cannot be written. Nothing was written, and the memory has not grown.
        """
        if not isinstance(delta, _Delta):
            raise TypeError(f"delta must be a Delta, got {type(delta).__name__}")
        cdef size_t start, n
        cdef memory* m
        pieces = list(delta.pieces())       # nothing of a class of the caller's runs from here on
        size = self.byte_size()
        if size < min(delta.base_size, delta.size) or size > delta.size:
            raise ValueError(f"the memory has {size} bytes, and the delta is for one of {delta.base_size} that becomes"
                             f" one of {delta.size}")
        if self.is_protected() or load(&n_protections):
            for offset, length, data in pieces:
                start, n = offset, length
                self.check_apply(start, n, data)
        if size < delta.size:
            self.grow_to(delta.size)
        m = self.enter()
        try:
            lock_in_call(m)         # what has been checked holds after a growth that is under way
            unlock(&m.lock)
            for offset, length, data in pieces:
                start, n = offset, length
                check_span(start, n, memory_size(m))
                if data is not None:
                    self.write(offset, data)
                    continue
                begin_access(m)
                if is_guarded(m):
                    end_access(m)
                    write_protected(m, start, n, NULL)
                    continue
                with nogil:
                    memset(m.base + start, 0, n)
                    end_access(m)
        finally:
            self.leave()

    cdef int check_apply(self, size_t start, size_t n, data) except -1:
        """Of a piece of a delta: its bytes can be read, and what of it lies in the memory now can be written."""
        cdef Py_buffer given
        cdef failure why
        cdef size_t size, at
        cdef int access, code = 0
        cdef memory* m = self.enter_locked()
        with nogil:
            size = memory_size(m)
            if start < size and memory_has_other(m, start, n if n < size - start else size - start, WRITABLE, &at,
                                                 &access):
                code = unsupported_protection(m, at, access, "apply", &why)
            unlock(&m.lock)
        self.leave()
        if code:
            raise_failure(&why)
        if data is not None:
            PyObject_GetBuffer(data, &given, PyBUF_SIMPLE)
            try:
                check_readable(&given)
            finally:
                PyBuffer_Release(&given)
        return 0

    # -- pages

    def protect(self, offset, size, access):
        """Set what may be done with whole host pages; mprotect(2).

        Calls of linmem that would touch a page against its access raise: `read`, `write`, ``mem[...]`` ValueError,
        calls on the whole memory (`snapshot`, `restore` ...) TypeError. Code that touches it through a view, or by its
        address, faults, which ends the process. A memory of which no byte can be written exports read-only buffers;
        views that exist already stay writable and fault.

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
            For another access, or a range that is not whole pages of the memory.
        PageError
            The OS refused, as some hosts do refuse "rx". Every page has the access that it had. Where the OS refuses
            that too, the access of a page is unknown, and calls raise as if it were inaccessible, until it is
            protected anew. So it is in a child that was forked while another thread was in this call.
        OwnedError
            A wasmtime store owns the memory, and access is not "rw". A plain load or store of the guest would trap, but
            ``memory.fill``, ``memory.copy`` and WASI calls run in native code, where a fault ends the process.
        TypeError
            The pages are not linmem's (a memory made in Python).
        """
        cdef size_t start, n, page = pages.capabilities().page_size
        cdef int how, code = 0
        cdef memory* m
        cdef failure why
        check_bounded(offset, "offset", _WITHIN, &start)
        check_bounded(size, "size", _WITHIN, &n)
        if not isinstance(access, str) or access not in _ACCESSES:
            raise ValueError(f"access must be one of {', '.join(map(repr, _ACCESSES))}, got {_shown(access)}")
        how = _ACCESSES[access]
        for name, value in (("offset", start), ("size", n)):
            if value & (page - 1):
                raise ValueError(f"{name} must be a multiple of the host page ({page}), got {value}")
        m = self.enter_pages("protect")
        try:
            check_span(start, n, memory_size(m))
            if n:
                lock_in_call(m)
                with nogil:
                    if load(&m.owner) == OWNER_WASMTIME and how != pages.ACCESS_READ_WRITE:
                        code = fail(&why, E_OWNED, "protect", n)
                        snprintf(why.detail, sizeof(why.detail), "its pages stay \"rw\", because memory.fill,"
                                 " memory.copy and WASI calls of the guest run in native code, where a fault ends the"
                                 " process")
                    else:
                        code = memory_protect(m, start, n, how, &why)
                    unlock(&m.lock)
        finally:
            self.leave()
        if code:
            raise_failure(&why)

    def discard(self, offset=0, size=None):
        """Give the pages back to the OS; the bytes read as zero afterwards. madvise(2), MADV_DONTNEED.

        In a memory that started from an image they read as zero, too, and no longer as the image.

        Parameters
        ----------
        offset, size : int
            In bytes; to the end by default. Parts of a page are set to zero. With protected pages in the
            range, whole host pages only.

        Raises
        ------
        ValueError
            For a range that is not within `byte_size`.
        PageError
            The OS refused; no byte has changed.
        TypeError
            The pages are not linmem's, or some are protected where the OS cannot discard such, or some are
            protected and some an image's.
        """
        cdef size_t start, n, head, tail, at, page = pages.capabilities().page_size
        cdef bint is_split, is_protected
        cdef int access, code = 0
        cdef memory* m
        cdef failure why
        check_bounded(offset, "offset", _WITHIN, &start)
        m = self.enter_pages("discard")
        try:
            n = check_rest(start, size, memory_size(m))
            lock_in_call(m)
            with nogil:
                # Whole pages go back to the OS; what is left of the first and the last is zeroed.
                head = start
                round_up(start, page, &head)
                tail = round_down(start + n, page)
                is_protected = memory_has_other(m, start, n, WRITABLE, &at, &access)
                is_split = is_protected and (start & (page - 1) != 0 or (
                    n & (page - 1) != 0 and start + n != memory_size(m)))
                if is_protected and not pages.capabilities().discard_any_protection:
                    code = unsupported_protection(m, at, access, "discard, on this system,", &why)
                elif is_split:
                    pass
                elif head >= tail:
                    memset(m.base + start, 0, n)
                else:
                    code = discard_pages(m, m.base + head, tail - head, &why)
                    if code == 0:
                        memset(m.base + start, 0, head - start)
                        memset(m.base + tail, 0, start + n - tail)
                unlock(&m.lock)
        finally:
            self.leave()
        if code:
            raise_failure(&why)
        if is_split:
            raise ValueError(f"offset and size must be multiples of the host page ({page}) in a range with protected"
                             f" pages, got {start} and {n}")

    def prefault(self, offset=0, size=None):
        """Make the pages of a range resident now; no byte changes. madvise(2), MADV_POPULATE_WRITE.

        Parameters
        ----------
        offset, size : int
            In bytes; to the end by default. Rounded outwards to host pages.

        Raises
        ------
        ValueError
            For a range that is not within `byte_size`.
        PageError
            The OS refused, or a page cannot be written.
        TypeError
            The pages are not linmem's, or are protected where the OS would fault.
        """
        cdef size_t start, n, first, at, end = 0, page = pages.capabilities().page_size
        cdef int access, code = 0
        cdef memory* m
        cdef failure why
        check_bounded(offset, "offset", _WITHIN, &start)
        m = self.enter_pages("prefault")
        try:
            n = check_rest(start, size, memory_size(m))
            if n:
                lock_in_call(m)
                with nogil:
                    first = round_down(start, page)
                    round_up(start + n, page, &end)
                    if (not pages.capabilities().populates
                            and memory_has_other(m, start, n, WRITABLE, &at, &access)):
                        code = unsupported_protection(m, at, access, "prefault, on this system,", &why)
                    else:
                        code = pages.prefault(m.base + first, end - first)
                        if code:
                            fail_page_call(&why, code, "prefault", end - first)
                    unlock(&m.lock)
        finally:
            self.leave()
        if code:
            raise_failure(&why)

    cdef memory* enter_pages(self, str call) except NULL:
        """enter(), for the calls that only a memory of our own pages has."""
        cdef memory* m = self.enter()
        cdef const char* text = m.ops.kind
        if not m.ops.pages_are_ours:
            self.leave()
            kind = text.decode()
            raise TypeError(f"{call} is not supported by a memory of kind {kind!r}: its pages are not linmem's")
        return m

    cdef memory* enter_locked(self) except NULL:
        """enter(), and the memory's lock. unlock() and leave() follow, and nothing between may raise."""
        cdef memory* m = self.enter()
        try:
            lock_in_call(m)
        except BaseException:
            self.leave()
            raise
        return m

    def info(self):
        """What the memory holds at this moment, as a `MemoryInfo`; asks the OS what is resident (mincore(2)).

        A page that was only read counts as resident, as the kernel's page of zeros is.
        """
        from linmem.records import MemoryInfo
        cdef size_t resident = 0
        cdef failure why
        cdef int code = 0
        cdef bint known
        cdef size_t base, size, capacity, maximum, committed, pre_guard, guard
        cdef long long exports
        cdef memory* m = self.enter()
        try:
            begin_access(m)
            with nogil:
                known = m.ops.resident != NULL
                if known:
                    code = memory_resident(m, &resident, &why)
                exports = max(pins_now(m), 0)
                base, capacity, maximum = <size_t>peek_address(&m.base), peek(&m.capacity), peek(&m.maximum)
                size, pre_guard, guard = memory_size(m), m.pre_guard, m.guard
                committed = peek(&m.accessible)
                end_access(m)
            if code:
                raise_failure(&why)
            return MemoryInfo(
                base=base,
                byte_size=size,
                byte_capacity=capacity,
                maximum_byte_size=None if maximum == NO_MAXIMUM else maximum,
                reserved=pre_guard + capacity + guard,
                committed=committed,
                resident=resident if known else None,
                pre_guard=pre_guard,
                guard=guard,
                page_size=pages.capabilities().page_size,
                exports=exports,
                kind=m.ops.kind.decode(),
                owner="wasmtime" if load(&m.owner) == OWNER_WASMTIME else "python",
            )
        finally:
            self.leave()

    def __repr__(self):
        if self.closed:
            return "<linmem.Memory, closed>"
        try:
            return (f"<linmem.Memory: {self.byte_size()} bytes at {self.as_ptr():#x},"
                    f" capacity {self.byte_capacity()}>")
        except RuntimeError:
            return "<linmem.Memory, lost>"

    def __reduce__(self):
        raise TypeError("a Memory cannot be pickled or copied: it is an address in this process (mem.snapshot() can)")


# linmem._core.image says how: it stands above.
_image_of = None


def image_class_is(of):
    """Called once, by the room of images: `of` makes an Image of an ImageHandle that it takes over."""
    global _image_of
    _image_of = of


cdef void (*tell_forgotten)(image* it) noexcept nogil
tell_forgotten = NULL


cdef void forgotten_is(void (*tell)(image* it) noexcept nogil) noexcept nogil:
    """Called once, by the pool: `tell` is called with each image that is forgotten and still has slots."""
    global tell_forgotten
    tell_forgotten = tell


cdef class ImageHandle:
    """What an `Image` is made of."""

    def __cinit__(self):
        self.it = &no_image

    def __reduce__(self):
        raise TypeError(f"{type(self).__name__} objects cannot be pickled or copied: they are of this process")

    def __dealloc__(self):
        if self.it != NULL and self.it != &no_image:
            with nogil:
                store(&self.it.forgotten, 1)
                if load(&self.it.slots) and tell_forgotten != NULL:
                    tell_forgotten(self.it)
                image_release(self.it)


cdef int memory_changes(Memory mem, object since, str name, bint for_delta, changes* out) except -1:
    """`out.list` is the caller's to free."""
    cdef failure why
    cdef ImageHandle base
    cdef memory* m
    cdef int code
    if not isinstance(since, ImageHandle):
        raise TypeError(f"{name} must be an Image, got {type(since).__name__}")
    base = <ImageHandle>since
    memset(out, 0, sizeof(changes))
    m = mem.enter_locked()
    with nogil:
        code = refuse_protected(m, READABLE, "dirty_pages", &why)
        if code == 0:
            code = compare(m, NULL, base.it, for_delta, out, &why)
        unlock(&m.lock)
    mem.leave()
    if code:
        free(out.list)
        raise_failure(&why)
    return 0


cdef int begin_restore(Memory self, ImageHandle to, bint zero_grown, bint may_wait) except -1:
    """0: the memory is locked for end_restore, which cannot fail. 1: the lock is taken, and the caller may not wait.
    An exception: the restore would fail. With 1 and with an exception nothing is locked."""
    cdef failure why
    cdef int code
    cdef size_t size, right
    cdef memory* m = self.enter()
    if load(&m.owner) != OWNER_WASMTIME and not may_wait:
        if not try_acquire(&m.lock):
            self.leave()
            return 1
    elif load(&m.owner) != OWNER_WASMTIME:
        self.leave()
        m = self.enter_locked()
    elif not try_acquire(&m.lock):
        self.leave()
        raise _errors.OwnedError("another thread is growing this memory, which a wasmtime store owns, or"
                                 " looks at all of it: restore it when no call runs in that store")
    size = memory_size(m)
    right = to.it.end
    if m.image == to.it and m.started > right:
        right = m.started
    code = refuse_protected(m, WRITABLE, "restore", &why)
    if code == 0 and (size == right or (size > right and zero_grown)):
        return 0
    unlock(&m.lock)
    self.leave()
    if code:
        raise_failure(&why)
    if size < right:
        raise ValueError(f"the memory has {size} bytes and the image {right}: grow it before")
    raise ValueError(f"the memory has grown to {size} bytes since, the image knows of {right}: zero_grown=True"
                     " keeps the size and zeroes the rest")


cdef int end_restore(Memory self, ImageHandle to, bint act) except -1:
    """Restore the memory that begin_restore has locked, or leave it as it is (`act`); unlock it."""
    cdef memory* m = self.m
    with nogil:
        if act:
            memory_restore(m, to.it)
        unlock(&m.lock)
    self.leave()
    return 0


def restore_all(list memories not None, list images not None):
    """Restore each of some different memories to its image, accepting those that have grown: all of them, or none.

    Raises
    ------
    OwnedError, TypeError, ValueError
        As `Memory.restore`, for the first memory that cannot be restored; no memory has changed then.
    """
    cdef Py_ssize_t begun, i
    cdef bint act, busy = True
    cdef memory* m
    while busy:
        begun = 0
        act = busy = False
        try:
            while begun < len(memories) and not busy:
                busy = begin_restore(<Memory?>memories[begun], <ImageHandle?>images[begun], True, begun == 0)
                begun += not busy
            act = not busy
        finally:
            for i in range(begun):
                end_restore(<Memory>memories[i], <ImageHandle>images[i], act)
        if busy:        # a thread that waits for one of these locks holds none of them
            m = (<Memory>memories[begun]).enter_locked()
            unlock(&m.lock)
            (<Memory>memories[begun]).leave()


cdef int read_protected(memory* m, size_t start, size_t n, char* to) except -1:
    """Copy out of a memory that is_guarded()."""
    cdef failure why
    cdef int code = begin_guarded(m, start, n, READABLE, "read", &why)
    if code:
        raise_failure(&why)
    with nogil:
        memcpy(to, m.base + start, n)
        end_guarded(m)
    return 0


cdef int write_protected(memory* m, size_t start, size_t n, const char* data) except -1:
    """Copy into a memory that is_guarded(); NULL: zeros."""
    cdef failure why
    cdef int code = begin_guarded(m, start, n, WRITABLE, "write", &why)
    if code:
        raise_failure(&why)
    with nogil:
        if data != NULL:
            memmove(m.base + start, data, n)
        else:
            memset(m.base + start, 0, n)
        end_guarded(m)
    return 0


cdef int begin_guarded(memory* m, size_t start, size_t n, int allowed, const char* call, failure* why) noexcept:
    """0, and no page of the range changes its access until end_guarded(), or a failure. The pages of a Python memory
    may be another linmem memory's: there it holds as long as nobody protects that one at this moment."""
    cdef int code
    if m.ops.pages_are_ours:
        with nogil:
            code = lock_memory(m, why)
        if code:
            return code
    else:
        begin_access(m)
    with nogil:
        code = refuse_access(m, start, n, allowed, call, why)
        if code:
            end_guarded(m)
    return code


cdef void end_guarded(memory* m) noexcept nogil:
    if m.ops.pages_are_ours:
        unlock(&m.lock)
    else:
        end_access(m)


cdef int check_readable(const Py_buffer* given) except -1:
    """Refuse a buffer that shows protected pages of a linmem memory which cannot be read."""
    cdef failure why
    cdef int code
    cdef const char* at = <const char*>given.buf
    cdef size_t size = <size_t>given.len
    with nogil:
        code = refuse_foreign(at, size, READABLE, "reading the data, which lie in a linmem memory,", &why)
    return raise_failure(&why) if code else 0


def shows_protected(data):
    """What linmem._core.arguments says that it is."""
    cdef Py_buffer given
    cdef bint answer = False
    if load(&n_protections) == 0:
        return False
    try:
        PyObject_GetBuffer(data, &given, PyBUF_SIMPLE)
    except BufferError:         # not contiguous
        return False
    try:
        check_readable(&given)
        with nogil:
            answer = find_protected(<const char*>given.buf, <size_t>given.len) != NULL
        return answer
    finally:
        PyBuffer_Release(&given)


_checks.shows_protected = shows_protected

_ACCESSES = {"none": pages.ACCESS_NONE, "r": pages.ACCESS_READ, "rw": pages.ACCESS_READ_WRITE,
             "rx": pages.ACCESS_READ_EXECUTE}


cdef int take_bytes(object data, str name, Py_buffer* out) except -1:
    """The contiguous bytes of a buffer; the caller releases it."""
    try:
        PyObject_GetBuffer(data, out, PyBUF_SIMPLE)
    except (TypeError, ValueError, BufferError) as error:
        _refuse_buffer(data, name, error)
    if load(&n_protections):
        try:
            check_readable(out)
        except BaseException:
            PyBuffer_Release(out)
            raise
    return 0


cdef Py_ssize_t check_index(object key) except? -1:
    try:
        return key.__index__()
    except (AttributeError, TypeError):
        raise TypeError(f"a memory is indexed by an integer or a slice, got {type(key).__name__}") from None
    except OverflowError:
        raise IndexError(f"index out of range: {_shown(key)}") from None


cdef Py_ssize_t check_range(Py_ssize_t i, Py_ssize_t size) except -1:
    cdef Py_ssize_t at = i + size if i < 0 else i
    if at < 0 or at >= size:
        raise IndexError(f"index must be in {-size} .. {size - 1}, got {i}")
    return at


cdef int check_span(size_t offset, size_t size, size_t byte_size) except -1:
    if offset > byte_size or size > byte_size - offset:
        raise ValueError(f"offset + size must be <= byte_size() ({byte_size}), got offset={offset} size={size}")
    return 0


cdef size_t check_rest(size_t offset, object size, size_t byte_size) except? 0:
    """The size meant: the one given, or all from the offset on."""
    cdef size_t n = byte_size - offset if offset <= byte_size else 0
    if size is not None:
        check_bounded(size, "size", _WITHIN, &n)
    check_span(offset, n, byte_size)
    return n


# A memory is in no cycle. Taken apart as a part of one, a Window would lose it before its buffers are released.
@cython.no_gc
@cython.final
cdef class Window:
    """Exports a typed part of a memory in a format that memoryview.cast() does not know."""

    cdef Memory memory
    cdef size_t offset
    cdef bytes format
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]

    def __reduce__(self):
        raise TypeError("a Window cannot be pickled or copied: it is a part of a memory of this process")

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        if self.memory is None:
            raise TypeError("a Window is made by Memory.view()")
        cdef memory* m = self.memory.enter()
        cdef bint pinned = False, read_only = False
        cdef failure why
        cdef int code
        try:
            pin(m)
            pinned = True
            if load(&m.protection) != PROTECTION_NONE:
                with nogil:
                    code = is_read_only(m, &read_only, &why)
                if code:
                    raise_failure(&why)
            if read_only and flags & PyBUF_WRITABLE:
                raise BufferError("no page of the memory can be written (protect)")
        except BaseException:
            if pinned:
                unpin(m)
            self.memory.leave()
            raise
        self.memory.call_becomes_export()
        buffer.buf = m.base + self.offset
        buffer.obj = self
        buffer.len = self.shape[0] * self.strides[0]
        buffer.readonly = read_only
        buffer.itemsize = self.strides[0]
        buffer.format = PyBytes_AS_STRING(self.format) if flags & PyBUF_FORMAT else NULL
        buffer.ndim = 1
        buffer.shape = self.shape if flags & PyBUF_ND else NULL
        buffer.strides = self.strides if (flags & PyBUF_STRIDES) == PyBUF_STRIDES else NULL
        buffer.suboffsets = NULL
        buffer.internal = NULL

    def __releasebuffer__(self, Py_buffer* buffer):
        self.memory.release_export()
