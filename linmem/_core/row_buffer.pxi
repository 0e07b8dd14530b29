# The class RowBuffer: rows of equal size one after the other in a memory, and how many there are; a part of memory.pyx.
#
# linmem.GrowableArray is the class over it in Python. The memory's lock is held while rows are added or removed, so
# that threads may do so at the same time. The number of rows changes last: a reader, or a forked child, never finds a
# row that is not written.
#
# The number of rows is in the RowBuffer, or in the memory itself, where other processes see it: as COUNT_BYTES bytes of
# text, right-aligned, at the offset `count_at`. The text is a part of the head of an .npy file.

cdef enum:
    COUNT_BYTES = 16            # the offset of the text is a multiple of this number
    ROWS_AHEAD = 65536          # the least number of bytes that a growth adds beyond what is needed
    AHEAD_SHARE = 8             # a growth adds the eighth part of the present size
    MOVE_AT_ONCE = 1 << 20      # bytes that take_rows() copies before it gives the copied pages back

cdef extern from *:
    bint PyFloat_Check(object value) noexcept
    double PyFloat_AS_DOUBLE(object value) noexcept
    long long as_long_long "PyLong_AsLongLongAndOverflow"(object value, int* overflow) noexcept


# -- the number of rows as text

cdef int count_from_text(char* text, size_t* rows) noexcept nogil:
    """E_VALUE if the text is not spaces and then digits. Other processes may write the text meanwhile."""
    cdef size_t halves[2]
    cdef const char* digits = <const char*>halves
    cdef size_t n = 0, high
    cdef int i = 0
    while True:     # the first half seldom changes; if it does, the two halves may belong to two numbers
        high = load_size(<size_t*>text)
        halves[1] = load_size(<size_t*>(text + 8))
        halves[0] = load_size(<size_t*>text)
        if halves[0] == high:
            break
    while i < COUNT_BYTES - 1 and digits[i] == c" ":
        i += 1
    while i < COUNT_BYTES:
        if not c"0" <= digits[i] <= c"9":
            return E_VALUE
        n = 10 * n + <size_t>(digits[i] - c"0")
        i += 1
    rows[0] = n
    return 0


cdef void count_to_text(char* text, size_t rows) noexcept nogil:
    """The text changes in one store, so that a process killed here leaves the old number or the new one."""
    cdef size_t halves[2]
    cdef char* digits = <char*>halves
    cdef int i = COUNT_BYTES
    memset(digits, c" ", COUNT_BYTES)
    while True:
        i -= 1
        digits[i] = <char>(c"0" + <int>(rows % 10))
        rows //= 10
        if rows == 0:
            break
    store_16(text, digits)


# -- elements that need no NumPy

cdef inline bint pack(char kind, object value, char* out) noexcept:
    """Store a plain Python number as an element of the kind (a struct format); False: NumPy must convert the value."""
    cdef long long number
    cdef int overflow
    if kind == c"d":
        if not PyFloat_Check(value):
            return False
        (<double*>out)[0] = PyFloat_AS_DOUBLE(value)
        return True
    if kind == c"?":
        out[0] = value is True
        return value is True or value is False
    if kind == 0 or not PyLong_CheckExact(value):
        return False
    number = as_long_long(value, &overflow)
    if overflow:
        return False
    if kind == c"q":
        (<long long*>out)[0] = number
    elif kind == c"i" and -0x80000000LL <= number <= 0x7fffffffLL:
        (<int*>out)[0] = <int>number
    elif kind == c"B" and 0 <= number <= 0xff:
        (<unsigned char*>out)[0] = <unsigned char>number
    else:
        return False
    return True


cdef void forget_failure(failure* why) noexcept with gil:
    if why.code == E_PYTHON:
        exception_of(why)       # drops the reference


cdef class RowBuffer:
    """Rows of equal size in a memory: the base of `linmem.GrowableArray`."""

    cdef Memory _memory         # None until _open() was called
    cdef size_t start           # the offset of the first row
    cdef size_t row_bytes
    cdef size_t most            # rows
    cdef size_t count_at        # the offset of the number of rows as text; 0: `rows` has the number
    cdef size_t rows
    cdef char kind              # the struct format of a row that pack() knows; 0: another row

    def _open(self, Memory memory not None, size_t start, size_t row_bytes, size_t most, size_t count_at, str kind):
        """The caller has checked the numbers: the head ends at `start`, and the text of the number is inside."""
        with cython.critical_section(self):
            if self._memory is not None:
                raise TypeError("__init__() was called before")
            self.start, self.row_bytes, self.most, self.count_at = start, row_bytes, most, count_at
            self.kind = ord(kind) if kind else 0
            self._memory = memory

    cdef memory* enter(self) except NULL:
        if self._memory is None:
            raise TypeError(f"{type(self).__name__}.__init__() was not called")
        return self._memory.enter()

    cdef int count(self, memory* m, size_t* rows, failure* why) noexcept nogil:
        """The number of rows. All of them are within byte_size. The caller holds the memory's lock."""
        cdef int code = 0
        if self.count_at and is_guarded(m):
            code = refuse_access(m, self.count_at, COUNT_BYTES, READABLE, "read", why)
        return code if code else self.count_unguarded(m, rows, why)

    cdef int count_or_wait(self, memory* m, size_t* rows, failure* why) noexcept:
        """As count(), by a caller that does not hold the memory's lock."""
        cdef bint guarded = False
        cdef int code = 0
        if self.count_at:
            code = begin_access(m, why)
            if code:
                return code
            guarded = is_guarded(m)
        if not guarded:
            code = self.count_unguarded(m, rows, why)
            if self.count_at:
                end_access(m)
            return code
        end_access(m)
        with nogil:
            code = lock_memory(m, why)
            if code == 0:
                code = self.count(m, rows, why)
                unlock(&m.lock)
        return code

    cdef int count_unguarded(self, memory* m, size_t* rows, failure* why) noexcept nogil:
        """As count(). The head can be read."""
        cdef size_t room
        if self.count_at == 0:
            rows[0] = load_size(&self.rows)
            return 0
        if memory_size(m) < self.start or count_from_text(m.base + self.count_at, rows):
            return fail_text(why, E_VALUE, "the number of rows in the head of the array is damaged")
        room = (memory_size(m) - self.start) // self.row_bytes      # read after the number: a growth comes first
        if rows[0] > room and m.ops.flush != NULL and rows[0] <= self.most:
            return fail_text(why, E_VALUE, "the head of the array says %zu rows, and the file has room for %zu: if the"
                             " power has failed, linmem.open_file(path).grow_to(%zu) makes the other rows zero",
                             rows[0], room, self.start + rows[0] * self.row_bytes)
        if rows[0] > room:
            return fail_text(why, E_VALUE, "the head of the array says %zu rows, and the memory has room for %zu",
                             rows[0], room)
        return 0

    cdef void set_count(self, memory* m, size_t rows) noexcept nogil:
        if self.count_at:
            count_to_text(m.base + self.count_at, rows)
        else:
            store_size(&self.rows, rows)

    cdef int make_room(self, memory* m, size_t rows, failure* why) noexcept nogil:
        """The caller holds the memory's lock. Afterwards the memory has room for so many rows."""
        cdef size_t need, ahead, bound, size = memory_size(m)
        if rows > self.most:
            return fail(why, E_MAXIMUM, "append", rows, 0, self.most)
        need = self.start + rows * self.row_bytes       # `most` bounds it
        if need <= size:
            return 0
        bound = m.maximum if m.may_move else min(m.capacity, m.maximum)
        ahead = need + max(<size_t>ROWS_AHEAD, size // AHEAD_SHARE)
        ahead = min(ahead - ahead % host_page(), bound, self.start + self.most * self.row_bytes)
        if ahead > need:
            if grow_locked(m, ahead, True, why) == 0:
                return 0
            forget_failure(why)     # for example, a budget has room for the needed bytes only
        return grow_locked(m, need, True, why)

    cdef inline bint try_add(self, memory* m, const char* data, size_t n) noexcept nogil:
        """add() without a wait or a page call, so that the caller may hold the GIL. False: nothing was done."""
        cdef size_t rows = 0, size
        cdef bint fits
        if not compare_exchange(&m.lock, 0, generation):
            return False
        if is_guarded(m):
            fits = False
        elif self.count_at:
            fits = count_from_text(m.base + self.count_at, &rows) == 0
        else:
            rows, fits = self.rows, True
        size = memory_size(m)
        # No overflow: a text has COUNT_BYTES digits at most, and `n` rows are in memory.
        fits = (fits and rows + n <= self.most
                and self.start + (rows + n) * self.row_bytes <= size)
        if fits:
            if n == 1 and self.row_bytes == 8:
                memcpy(m.base + self.start + rows * 8, data, 8)
            else:
                memmove(m.base + self.start + rows * self.row_bytes, data, n * self.row_bytes)
            self.set_count(m, rows + n)
        unlock(&m.lock)
        return fits

    cdef int add(self, memory* m, const char* data, size_t n, failure* why) noexcept nogil:
        """Add n rows, whose bytes may lie in the memory itself. The caller holds the memory's lock."""
        cdef size_t rows = 0
        cdef int code = self.begin_change(m, n, &rows, "append", why)
        if code == 0:
            memmove(m.base + self.start + rows * self.row_bytes, data, n * self.row_bytes)
            self.set_count(m, rows + n)
        return code

    cdef int begin_change(self, memory* m, size_t n, size_t* rows, const char* call, failure* why) noexcept nogil:
        """There is room for n rows more, and their bytes can be written. The caller holds the memory's lock."""
        cdef int code = self.count(m, rows, why)
        if code == 0 and n > SIZE_MAX - rows[0]:
            code = fail(why, E_MAXIMUM, call, SIZE_MAX, 0, self.most)
        if code == 0:
            code = self.make_room(m, rows[0] + n, why)
        if code == 0 and is_guarded(m):
            code = refuse_access(m, self.start + rows[0] * self.row_bytes, n * self.row_bytes, WRITABLE, call, why)
            if code == 0 and self.count_at:
                code = refuse_access(m, self.count_at, COUNT_BYTES, WRITABLE, call, why)
        return code

    cdef int add_or_raise(self, const char* data, size_t n) except -1:
        cdef failure why
        cdef int code = 0
        cdef memory* m = self.enter()
        if n * self.row_bytes >= RELEASE_GIL_FROM or not self.try_add(m, data, n):
            with nogil:
                code = lock_memory(m, &why)
                if code == 0:
                    code = self.add(m, data, n, &why)
                    unlock(&m.lock)
        self._memory.leave()
        return self.refuse(code, &why) if code else 0

    cdef int refuse(self, int code, const failure* why) except -1:
        """Raise; a refused growth is explained in rows."""
        try:
            raise_failure(why)
        except _errors.GrowError as error:
            if type(error) is not _errors.GrowError:
                raise
            most = self.most
            if code != E_MAXIMUM or why.limit != most:
                most = min(most, (self._memory.byte_capacity() - self.start) // self.row_bytes)
            raise _errors.GrowError(
                f"the array has {len(self)} rows of {self.row_bytes} bytes and address space for {most}, and cannot"
                f" hold more: make it with a larger maximum= (in rows)") from error
        return 0

    def __len__(self):
        cdef size_t rows = 0
        cdef failure why
        cdef memory* m = self.enter()
        cdef size_t size = memory_size(m)
        cdef int code = self.count_or_wait(m, &rows, &why)
        while code:     # another process may have grown the memory after enter() had looked at its size
            self._memory.leave()
            m = self.enter()
            if memory_size(m) == size:
                break
            size = memory_size(m)
            code = self.count_or_wait(m, &rows, &why)
        self._memory.finish(code, &why)
        return <Py_ssize_t>rows

    @cython.binding(False)      # a plain method descriptor, which saves two C calls per call
    @cython.embedsignature(True)
    @cython.embedsignature.format("clinic")
    def append(self, row):
        """Add one row at the end.

        Parameters
        ----------
        row : array_like
            What NumPy converts to the dtype without loss of its kind: a float is not a row of integers.

        Raises
        ------
        TypeError, ValueError, OverflowError
            The row does not convert, or has another shape than `row_shape`. Nothing was added.
        GrowError, PageError
            The memory cannot grow. No row was added.
        """
        cdef char value[8]
        if pack(self.kind, row, value):
            self.add_or_raise(value, 1)
        elif self.memory is not None:       # raises before __init__()
            self._append_converted(row)

    def __reduce__(self):
        raise TypeError("a RowBuffer cannot be pickled or copied: it is a part of a memory of this process")

    def _extend_bytes(self, data):
        """Add rows that have the bytes of a contiguous buffer."""
        cdef Py_buffer given
        take_bytes(data, "rows", &given)
        try:
            if given.len % self.row_bytes:
                raise ValueError(f"rows must be whole rows of {self.row_bytes} bytes, got {given.len} bytes")
            self.add_or_raise(<const char*>given.buf, given.len // self.row_bytes)
        finally:
            PyBuffer_Release(&given)

    def _take_rows(self, RowBuffer staged not None):
        """Add the rows of a private RowBuffer that no other code uses. Its pages go back to the OS as they are copied,
        so that the rows are hardly ever resident twice."""
        cdef failure why
        cdef int code
        cdef memory* m
        cdef memory* source = staged.enter()
        try:
            m = self.enter()
        except BaseException:
            staged._memory.leave()
            raise
        with nogil:
            code = lock_memory(m, &why)
            if code == 0:
                code = self.add_pages(m, source, load_size(&staged.rows) * self.row_bytes, &why)
                unlock(&m.lock)
        self._memory.leave()
        staged._memory.leave()
        if code:
            self.refuse(code, &why)

    cdef int add_pages(self, memory* m, memory* source, size_t size, failure* why) noexcept nogil:
        """See _take_rows(). The number of rows changes when all of them are copied."""
        cdef failure unused
        cdef size_t rows = 0, offset, done = 0, piece
        cdef int code = self.begin_change(m, size // self.row_bytes, &rows, "extend", why)
        offset = self.start + rows * self.row_bytes
        while code == 0 and done < size:
            piece = min(<size_t>MOVE_AT_ONCE, size - done)
            memcpy(m.base + offset + done, source.base + done, piece)
            if memory_discard(source, done, piece, &unused):
                forget_failure(&unused)     # the bytes are copied; only the pages stay longer
            done += piece
        if code == 0:
            self.set_count(m, rows + size // self.row_bytes)
        return code

    def resize(self, n):
        """Change the number of rows. Rows that are new, or that come back, are zero.

        Arrays that were taken from this one before stay valid and keep their length.

        Parameters
        ----------
        n : int
            Rows.

        Raises
        ------
        GrowError, PageError
            The memory cannot grow. Nothing has changed.
        """
        cdef failure why
        cdef int code
        cdef size_t rows
        cdef memory* m
        check_count(n, "n", &rows, "a number of rows")
        m = self.enter()
        with nogil:
            code = lock_memory(m, &why)
            if code == 0:
                code = self.set_rows(m, rows, &why)
                unlock(&m.lock)
        self._memory.leave()
        if code:
            self.refuse(code, &why)

    cdef int set_rows(self, memory* m, size_t rows, failure* why) noexcept nogil:
        cdef size_t now = 0, at, end, size = memory_size(m)
        cdef int code = self.count(m, &now, why)
        if code == 0:
            code = self.begin_change(m, rows - now if rows > now else 0, &now, "resize", why)
        if code:
            return code
        at, end = self.start + now * self.row_bytes, self.start + rows * self.row_bytes
        end = min(end, size)        # bytes that the memory grew by are zero
        if end > at:
            memset(m.base + at, 0, end - at)
        self.set_count(m, rows)
        return 0

    def clear(self):
        """Remove all rows. The bytes stay where they are until rows are added again."""
        self.resize(0)

    @property
    def memory(self):
        """The `Memory` that has the rows: for `flush`, `info` and `protect`."""
        if self._memory is None:
            raise TypeError(f"{type(self).__name__}.__init__() was not called")
        return self._memory
