# The Python handle on a memory of any kind; a part of _memory.pyx.

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_SIMPLE, PyBUF_STRIDES, \
    PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.string cimport memmove

from linmem._atomic cimport add_with_gil

from linmem._delta import Delta as _Delta
from linmem._formats import resolve as _resolve_format

cdef long long CLOSED = -(<long long>1 << 62)       # of Memory.users: far below what threads can add to it
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
    return handle


@cython.final
cdef class Memory:
    """A linear memory: bytes at an address that never moves while they grow.

    Made by a creator (`linmem.create`, `linmem.MmapCreator`, `linmem.wasmtime.linear_memory`), not
    by calling the class. It is a writable buffer of `len(mem)` bytes: ``memoryview(mem)``,
    ``numpy.asarray(mem)``. Sizes and offsets are in bytes.
    """

    def __init__(self):
        if self.m == NULL:
            raise TypeError("a Memory is made by a creator: linmem.create(minimum)")

    def __dealloc__(self):
        if self.m != NULL and load(&self.users) >= 0:
            with nogil:
                memory_release(self.m)

    # The gate. Whoever is inside keeps the reference on m; close() gets in only when nobody is. m itself is written
    # once, by who made the handle: nobody looks at it after close().
    cdef memory* enter(self) except NULL:
        if add_with_gil(&self.users, 1) < 0 or self.m == NULL:
            add_with_gil(&self.users, -1)
            raise ValueError("the memory is closed")
        return self.m

    cdef void leave(self) noexcept:
        add_with_gil(&self.users, -1)

    def close(self):
        """Give up this handle; the pages go when wasmtime holds them no longer either.

        Closing twice is closing once. Afterwards every other call is `ValueError`.

        Raises
        ------
        BufferError
            While buffers are exported from this handle; it says how many.
        OwnedError
            While a wasmtime store owns the memory.
        """
        cdef memory* m
        cdef long long users
        try:
            m = self.enter()
        except ValueError:
            return
        owned = load(&m.owner) == OWNER_WASMTIME
        self.leave()
        if owned:
            raise _errors.OwnedError("a wasmtime store owns this memory: close the store (store.close()) instead")
        if not swap_if(&self.users, 0, CLOSED):
            users = load(&self.users)
            if users < 0:
                return
            raise BufferError(f"cannot close the memory: {users} exported buffer(s) still point into it")
        with nogil:
            memory_release(m)

    @property
    def closed(self):
        """Whether `close` was called."""
        return load(&self.users) < 0 or self.m == NULL

    def __enter__(self):
        self.enter()
        self.leave()
        return self

    def __exit__(self, *exc):
        self.close()

    # -- the trait

    def byte_size(self):
        """Bytes accessible now; mirrors ``wasmtime::LinearMemory::byte_size``."""
        cdef memory* m = self.enter()
        size = memory_size(m)
        self.leave()
        return size

    def byte_capacity(self):
        """Bytes up to which growth never moves the base; ``wasmtime::LinearMemory::byte_capacity``."""
        cdef memory* m = self.enter()
        capacity = peek(&m.capacity)
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
        check_size(new_size, "new_size", &size)
        m = self.enter()
        with nogil:
            code = grow_locked(m, size, True, &why)
        self.leave()
        if code:
            raise_failure(&why)

    def as_ptr(self):
        """Address of byte 0, a multiple of the host page; mirrors ``wasmtime::LinearMemory::as_ptr``."""
        cdef memory* m = self.enter()
        address = <size_t>peek_address(&m.base)
        self.leave()
        return address

    def wasm_accessible(self):
        """Addresses that native code may touch: base .. capacity + guard, accessible or a fault.

        Mirrors ``wasmtime::LinearMemory::wasm_accessible``.
        """
        cdef memory* m = self.enter()
        cdef size_t base, end
        begin_access(m)
        base = <size_t>peek_address(&m.base)
        end = base + peek(&m.covered)
        end_access(m)
        self.leave()
        return range(base, end)

    # -- bytes

    def __len__(self):
        cdef memory* m = self.enter()
        cdef Py_ssize_t size = <Py_ssize_t>memory_size(m)
        self.leave()
        return size

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        cdef memory* m = self.enter()
        pin(m)
        try:
            PyBuffer_FillInfo(buffer, self, m.base, <Py_ssize_t>memory_size(m), 0, flags)
        except BaseException:
            unpin(m)
            self.leave()
            raise

    def __releasebuffer__(self, Py_buffer* buffer):
        unpin(self.m)
        self.leave()

    def view(self, format="B", offset=0, count=None):
        """Export a part of the memory as elements of a type, without a copy.

        The view stays valid through every growth; it keeps the memory open. Its length is fixed now.

        Parameters
        ----------
        format : str or type or dtype
            A `struct` format ("d", ">I"), a NumPy type string ("<f8"), a NumPy dtype or scalar type, or
            `bool`, `int` (64 bits), `float`.
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
        check_size(offset, "offset", &start)
        size = <size_t>self.byte_size()
        if start > size:
            raise ValueError(f"offset must be <= byte_size() ({size}), got {start}")
        if count is None:
            n = (size - start) // itemsize
        else:
            check_count(count, "count", &n)
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

    def __getitem__(self, key):
        cdef Py_ssize_t i, size
        cdef memory* m
        cdef unsigned char byte
        if isinstance(key, slice):
            if key.step is None or key.step == 1:
                size = len(self)
                start, stop, _ = key.indices(size)
                return self.read(start, stop - start if stop > start else 0)
            with memoryview(self) as whole:
                return whole[key].tobytes()
        i = check_index(key)
        m = self.enter()
        try:
            i = check_range(i, <Py_ssize_t>memory_size(m))      # it never becomes less
            begin_access(m)
            byte = (<unsigned char*>m.base)[i]
            end_access(m)
            return byte
        finally:
            self.leave()

    def __setitem__(self, key, value):
        cdef Py_ssize_t i
        cdef memory* m
        cdef Py_ssize_t byte
        if isinstance(key, slice):
            with memoryview(self) as whole, whole[key] as part:
                try:
                    flat = memoryview(value).cast("B")
                except TypeError as error:
                    raise TypeError(f"data must be a contiguous buffer of bytes, got {type(value).__name__}:"
                                    f" {error}") from None
                with flat as data:
                    if len(data) != len(part):
                        raise ValueError(f"the slice has {len(part)} bytes and the data {len(data)}: a memory"
                                         " cannot be resized by assignment")
                    part[:] = data
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
            (<unsigned char*>m.base)[i] = <unsigned char>byte
            end_access(m)
        finally:
            self.leave()

    def __delitem__(self, key):
        raise TypeError("a memory's bytes cannot be deleted")

    def read(self, offset, size):
        """Copy `size` bytes from `offset` out, as `bytes`; ValueError past `byte_size`."""
        cdef size_t start, n
        cdef memory* m
        cdef bytes out
        cdef char* to
        check_size(offset, "offset", &start)
        check_size(size, "size", &n)
        m = self.enter()
        try:
            check_span(start, n, memory_size(m))
            out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>n)
            to = PyBytes_AS_STRING(out)
            begin_access(m)
            if n < RELEASE_GIL_FROM:
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

        Past `byte_size` it is `ValueError`, and nothing is written.
        """
        cdef size_t start, n
        cdef memory* m
        cdef Py_buffer given
        check_size(offset, "offset", &start)
        try:
            PyObject_GetBuffer(data, &given, PyBUF_SIMPLE)
        except (TypeError, ValueError, BufferError) as error:
            raise TypeError(f"data must be a contiguous buffer of bytes, got {type(data).__name__}: {error}") from None
        try:
            n = <size_t>given.len
            m = self.enter()
            try:
                check_span(start, n, memory_size(m))
                begin_access(m)
                if n < RELEASE_GIL_FROM:
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
            For a memory with protected pages.
        """
        cdef image* it = NULL
        cdef failure why
        cdef int code
        cdef ImageHandle handle = ImageHandle.__new__(ImageHandle)
        cdef memory* m = self.enter()
        with nogil:
            acquire(&m.lock)
            code = refuse_protected(m, "snapshot", &why)
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
            For a memory with protected pages.
        """
        cdef ImageHandle handle
        cdef failure why
        cdef int code
        cdef size_t size, right
        if not isinstance(image, ImageHandle):
            raise TypeError(f"image must be an Image, got {type(image).__name__}")
        check_flag(zero_grown, "zero_grown")
        cdef bint grown = zero_grown
        handle = <ImageHandle>image
        cdef memory* m = self.enter()
        if load(&m.owner) == OWNER_WASMTIME:
            if not try_acquire(&m.lock):
                self.leave()
                raise _errors.OwnedError("another thread is growing this memory, which a wasmtime store owns, or"
                                         " looks at all of it: restore it when no call runs in that store")
        else:
            with nogil:
                acquire(&m.lock)
        with nogil:
            size = memory_size(m)
            right = handle.it.end
            if m.image == handle.it and m.started > right:
                right = m.started
            code = refuse_protected(m, "restore", &why)
            if code == 0 and (size == right or (size > right and grown)):
                memory_restore(m, handle.it)
            unlock(&m.lock)
        self.leave()
        if code:
            raise_failure(&why)
        if size < right:
            raise ValueError(f"the memory has {size} bytes and the image {right}: grow it before")
        if size > right and not grown:
            raise ValueError(f"the memory has grown to {size} bytes since, the image knows of {right}: zero_grown=True"
                             " keeps the size and zeroes the rest")

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
            For a memory with protected pages.
        """
        cdef changes found
        cdef size_t i, n
        cdef size_t* pairs
        check_flag(as_array, "as_array")
        memory_changes(self, since, "since", &found)
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
            For a memory with protected pages.
        """
        if not isinstance(delta, _Delta):
            raise TypeError(f"delta must be a Delta, got {type(delta).__name__}")
        cdef size_t start, n
        cdef failure why
        cdef int code
        cdef memory* m
        size = self.byte_size()
        if size < min(delta.base_size, delta.size) or size > delta.size:
            raise ValueError(f"the memory has {size} bytes, and the delta is for one of {delta.base_size} that becomes"
                             f" one of {delta.size}")
        if size < delta.size:
            self.grow_to(delta.size)
        pieces = list(delta.pieces())       # nothing of a class of the caller's runs from here on
        m = self.enter()
        try:
            with nogil:
                acquire(&m.lock)
                code = refuse_protected(m, "apply", &why)
                unlock(&m.lock)
            if code:
                raise_failure(&why)
            for offset, length, data in pieces:
                start, n = offset, length
                check_span(start, n, memory_size(m))
                if data is not None:
                    self.write(offset, data)
                    continue
                begin_access(m)
                with nogil:
                    memset(m.base + start, 0, n)
                    end_access(m)
        finally:
            self.leave()

    # -- pages

    def protect(self, offset, size, access):
        """Set what may be done with whole host pages; mprotect(2). A touch against it is a fault.

        A memory with protected pages never moves. What the OS refuses half way is undone; where that is refused too,
        or pages had a protection of their own before, the memory counts as one with protected pages.

        Parameters
        ----------
        offset, size : int
            In bytes, multiples of the host page, within `byte_size`.
        access : {"rw", "r", "none"}

        Raises
        ------
        ValueError
            For another access, or a range that is not whole pages of the memory.
        PageError
            The OS refused. The protection is what it was, in a memory that had no protected pages; in
            another, some of the range may have the new one.
        TypeError
            The pages are not linmem's (a memory made in Python).
        """
        cdef size_t start, n, whole, page = pages.capabilities().page_size
        cdef int how, code = 0
        cdef memory* m
        cdef failure why
        check_size(offset, "offset", &start)
        check_size(size, "size", &n)
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
                with nogil:
                    acquire(&m.lock)
                    code = pages.protect(m.base + start, n, how)
                    if code:
                        fail_page_call(&why, code, "protect", n)
                        if (not m.protected_pages
                                and pages.protect(m.base + start, n, pages.ACCESS_READ_WRITE)):
                            m.protected_pages = True
                    else:
                        # The same for all of them is a memory as any other. A last one that byte_size ends
                        # within cannot be protected.
                        whole = round_down(memory_size(m), page)
                        m.protected_pages = how != pages.ACCESS_READ_WRITE or start != 0 or n != whole
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
            memory, whole host pages only.

        Raises
        ------
        ValueError
            For a range that is not within `byte_size`.
        PageError
            The OS refused; no byte has changed.
        TypeError
            The pages are not linmem's, or are protected where the OS cannot discard such, or are
            protected and an image's.
        """
        cdef size_t start, n, head, tail, page = pages.capabilities().page_size
        cdef bint is_split
        cdef int code = 0
        cdef memory* m
        cdef failure why
        check_size(offset, "offset", &start)
        m = self.enter_pages("discard")
        try:
            n = check_rest(start, size, memory_size(m))
            with nogil:
                # Whole pages go back to the OS; what is left of the first and the last is zeroed.
                head = start
                round_up(start, page, &head)
                tail = round_down(start + n, page)
                acquire(&m.lock)
                is_split = m.protected_pages and (start & (page - 1) != 0 or (
                    n & (page - 1) != 0 and start + n != memory_size(m)))
                if m.protected_pages and not pages.capabilities().discard_any_protection:
                    code = fail(&why, E_UNSUPPORTED, "discard", n)
                    snprintf(why.detail, sizeof(why.detail), "with protected pages, on this system")
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
            raise ValueError(f"offset and size must be multiples of the host page ({page}) in a memory with protected"
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
        cdef size_t start, n, first, end = 0, page = pages.capabilities().page_size
        cdef int code = 0
        cdef memory* m
        cdef failure why
        check_size(offset, "offset", &start)
        m = self.enter_pages("prefault")
        try:
            n = check_rest(start, size, memory_size(m))
            if n:
                with nogil:
                    first = round_down(start, page)
                    round_up(start + n, page, &end)
                    acquire(&m.lock)
                    if m.protected_pages and not pages.capabilities().populates:
                        code = fail(&why, E_UNSUPPORTED, "prefault", n)
                        snprintf(why.detail, sizeof(why.detail), "with protected pages, on this system")
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
        if not m.ops.pages_are_ours:
            kind = m.ops.kind.decode()
            self.leave()
            raise TypeError(f"{call} is not supported by a memory of kind {kind!r}: its pages are not linmem's")
        return m

    def info(self):
        """What the memory holds at this moment, as a `MemoryInfo`; asks the OS what is resident (mincore(2)).

        A page that was only read counts as resident, as the kernel's page of zeros is.
        """
        cdef memory* m = self.enter()
        cdef size_t resident = 0
        cdef failure why
        cdef int code = 0
        cdef bint known = m.ops.resident != NULL
        cdef size_t base, size, capacity, maximum, committed, pre_guard, guard
        cdef long long exports
        from linmem.records import MemoryInfo
        begin_access(m)
        with nogil:
            if known:
                code = memory_resident(m, &resident, &why)
            exports = max(pins_now(m), 0)
            base, capacity, maximum = <size_t>peek_address(&m.base), peek(&m.capacity), peek(&m.maximum)
            size, pre_guard, guard = memory_size(m), m.pre_guard, m.guard
            committed = peek(&m.accessible)
            end_access(m)
        try:
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
        return (f"<linmem.Memory: {self.byte_size()} bytes at {self.as_ptr():#x},"
                f" capacity {self.byte_capacity()}>")

    def __reduce__(self):
        raise TypeError("a Memory cannot be pickled or copied: it is an address in this process")


# linmem._image says how: it stands above.
_image_of = None


def image_class_is(of):
    """Called once, by the room of images: `of` makes an Image of an ImageHandle that it takes over."""
    global _image_of
    _image_of = of


cdef class ImageHandle:
    """What an `Image` is made of."""

    def __cinit__(self):
        self.it = &no_image

    def __dealloc__(self):
        if self.it != NULL and self.it != &no_image:
            with nogil:
                image_release(self.it)


cdef int memory_changes(Memory mem, object since, str name, changes* out) except -1:
    """`out.list` is the caller's to free."""
    cdef failure why
    cdef ImageHandle base
    cdef memory* m
    cdef int code
    if not isinstance(since, ImageHandle):
        raise TypeError(f"{name} must be an Image, got {type(since).__name__}")
    base = <ImageHandle>since
    memset(out, 0, sizeof(changes))
    m = mem.enter()
    with nogil:
        acquire(&m.lock)
        code = refuse_protected(m, "dirty_pages", &why)
        if code == 0:
            code = compare(m, NULL, base.it, out, &why)
        unlock(&m.lock)
    mem.leave()
    if code:
        free(out.list)
        raise_failure(&why)
    return 0


cdef int refuse_protected(memory* m, const char* call, failure* why) noexcept nogil:
    """For the calls that reach for every byte by themselves; with the lock held."""
    if not m.protected_pages:
        return 0
    fail(why, E_UNSUPPORTED, call, 0)
    snprintf(why.detail, sizeof(why.detail), "with protected pages: give all of it back its access with"
             " protect(0, %zu, 'rw')", round_down(memory_size(m), pages.capabilities().page_size))
    return E_UNSUPPORTED


_ACCESSES = {"none": pages.ACCESS_NONE, "r": pages.ACCESS_READ, "rw": pages.ACCESS_READ_WRITE}


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
        check_size(size, "size", &n)
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

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        if self.memory is None:
            raise TypeError("a Window is made by Memory.view()")
        cdef memory* m = self.memory.enter()
        pin(m)
        buffer.buf = m.base + self.offset
        buffer.obj = self
        buffer.len = self.shape[0] * self.strides[0]
        buffer.readonly = 0
        buffer.itemsize = self.strides[0]
        buffer.format = PyBytes_AS_STRING(self.format) if flags & PyBUF_FORMAT else NULL
        buffer.ndim = 1
        buffer.shape = self.shape if flags & PyBUF_ND else NULL
        buffer.strides = self.strides if (flags & PyBUF_STRIDES) == PyBUF_STRIDES else NULL
        buffer.suboffsets = NULL
        buffer.internal = NULL

    def __releasebuffer__(self, Py_buffer* buffer):
        unpin(self.memory.m)
        self.memory.leave()
