# The kind of memory whose pages are a file's, FileCreator and open_file(); a part of memory.pyx.
#
# The whole capacity is mapped from the file when the memory is made. Pages past the end of the file are inaccessible,
# because an access to them would be a SIGBUS, which wasmtime does not handle. A growth does these steps in this order:
#   1. The bytes after byte_size in the last page become zero.
#   2. The OS allocates space for the new bytes, past the end of the file. Nothing shows that yet.
#   3. The length of the file changes, at once.
#   4. The new pages become accessible.
# So a process that is killed leaves a file of the length before or after the growth.
#
# The length of the file is checked when a call of a handle begins (file_check). A memory whose file has become longer
# takes the new length over: a reader, and a forked child. A memory whose file has become shorter refuses the call.

from os import close as _close

cdef struct file_memory:
    memory head
    pages.file_pages file
    long long opened_in         # the generation of the process that opened the file: forked children do not grow it
    atomic_i64 lengths          # how many lengths the file has had, and how many of them are durable
    atomic_i64 durable
    bint is_new                 # the file did not exist before


cdef int file_make(const memory_spec* asked, pages.file_pages* file, memory** out, failure* why) noexcept nogil:
    """The memory owns the open file afterwards. A code: the caller still does."""
    cdef memory_spec spec = asked[0]
    cdef layout found
    cdef char* region
    cdef size_t length = 0
    cdef memory* m
    cdef int code = fail_page_call(why, pages.file_size(file, &length), "file_size", 0)
    if code:
        return code
    if not file.writable:
        spec.minimum = length
    elif spec.image != NULL and spec.image.end > spec.minimum:
        return fail(why, E_IMAGE, "new_memory", spec.minimum, 0, spec.image.end)
    elif round_up(max(spec.minimum, length), spec.page_size, &spec.minimum):
        return fail(why, E_OVERFLOW, "minimum", length)
    if spec.minimum > spec.maximum:
        return fail_text(why, E_VALUE, "maximum must be >= the size of the file (%zu bytes, in whole pages of the"
                         " memory), got %zu", spec.minimum, spec.maximum)
    m = <memory*>calloc(1, sizeof(file_memory))
    if m == NULL:
        return fail(why, E_NO_MEMORY, "calloc", sizeof(file_memory))
    code = reserve_for(&spec, 0, &found, &region, &m.chosen, why)
    if code:
        free(m)
        return code
    m.base = region + found.pre_guard
    m.capacity = found.capacity
    m.pre_guard = found.pre_guard
    m.guard = found.guard
    code = fail_page_call(why, pages.file_map(file, 0, m.base, found.capacity, pages.ACCESS_NONE), "file_map",
                          found.capacity)
    if code == 0:
        code = file_fill(m, file, &spec, length, why)
    if code:
        unmap_and_free(m)
        return code
    m.ops = &file_ops
    m.enters_slowly = True
    m.refs = 1
    m.size = spec.minimum
    m.accessible = found.accessible
    m.maximum = spec.maximum
    m.covered = found.capacity + found.guard
    m.is_shared = spec.is_shared
    (<file_memory*>m).file = file[0]
    (<file_memory*>m).opened_in = generation
    (<file_memory*>m).lengths = 1       # a writer that was killed may have changed the length
    if not file.writable:
        make_read_only(m)
    elif spec.image != NULL and length == 0:
        hold_image(m, spec.image)
        image_begin_use(m, spec.minimum)
    trace_if_on(m)
    m.range = range_of(region, &found)
    add_live_memory(m)
    out[0] = m
    return 0


cdef int file_fill(memory* m, pages.file_pages* file, const memory_spec* spec, size_t length,
                   failure* why) noexcept nogil:
    """Give the file the size of the memory, and space for every byte; open its pages. A code: the file has its former
    length."""
    cdef size_t size = spec.minimum, accessible = 0
    cdef int access = pages.ACCESS_READ_WRITE if file.writable else pages.ACCESS_READ
    cdef int code = 0
    round_up(size, host_page(), &accessible)
    if file.writable and length:
        code = fail_page_call(why, pages.file_allocate(file, 0, length), "allocate", length)
    if code == 0 and size > length:
        code = fail_page_call(why, pages.file_extend(file, size, True), "extend", size - length)
    if code:
        return code
    if accessible:
        code = fail_page_call(why, pages.protect(m.base, accessible, access), "commit", accessible)
    if code == 0 and file.writable and length & (host_page() - 1) and size > length:
        memset(m.base + length, 0, min(size, round_down(length, host_page()) + host_page()) - length)
    if code == 0 and file.writable and spec.image != NULL and length == 0:
        image_copy(spec.image, m.base)
    if code and size > length:
        pages.file_cut(file, length)
    return code


cdef int file_grow(memory* m, size_t new_size, failure* why) noexcept nogil:
    cdef file_memory* f = <file_memory*>m
    cdef size_t size = memory_size(m), page = host_page(), need, length = 0, end = size
    cdef int code
    if round_up(new_size, page, &need):
        return fail(why, E_OVERFLOW, "new_size", new_size)
    if need > m.capacity:
        fail(why, E_CAPACITY, "grow_to", new_size, 0, m.capacity)
        explain(why, "a memory of a file never does: open it with a larger reserve= or maximum=")
        return why.code
    code = fail_page_call(why, pages.file_size(&f.file, &length), "file_size", 0)
    if code:
        return code
    # Another program has made the file longer: see take_length(). New pages of a guest are zero, so the guest gets -1.
    if length >= new_size and load(&m.owner) != OWNER_WASMTIME:
        return open_pages(f, size, new_size, why)
    if load(&m.protection) == PROTECTION_READ_ONLY:
        return refuse_own(m, 0, 1, WRITABLE, E_PROTECTED, "grow_to", why)
    if f.opened_in != generation:
        fail(why, E_UNSUPPORTED, "grow_to", new_size)
        explain(why, "in a forked child: the process that opened the file grows it, and the child sees the growth")
        return why.code
    if length != size:
        return fail(why, E_FILE, "grow_to", new_size, length, size)
    # New bytes must read as zero. Native code may have written into the rest of the last accessible page.
    round_up(size, pages.capabilities().file_page, &end)
    zero_range(m, size, end)
    store_size(&m.opening, need)
    code = fail_page_call(why, pages.file_extend(&f.file, new_size, True), "extend", new_size - size)
    if code == 0 and need > m.accessible:
        code = fail_page_call(why, pages.protect(m.base + m.accessible, need - m.accessible, pages.ACCESS_READ_WRITE),
                              "commit", need - m.accessible)
        if code:
            pages.protect(m.base + m.accessible, need - m.accessible, pages.ACCESS_NONE)
            pages.file_cut(&f.file, size)
    if code == 0:
        add(&f.lengths, 1)
        store_size(&m.accessible, need)
        store_release(&m.size, new_size)
    store_size(&m.opening, 0)
    return code


# -- the length of the file, as other programs may have changed it

cdef int file_check(memory* m, failure* why) noexcept:
    cdef file_memory* f = <file_memory*>m
    cdef size_t length = 0, size = memory_size(m)
    cdef int code
    with nogil:         # a file system of the network may let fstat() wait
        code = fail_page_call(why, pages.file_size(&f.file, &length), "file_size", 0)
        if code == 0 and length != size:
            code = take_length(f, why)
    return code


cdef int take_length(file_memory* f, failure* why) noexcept nogil:
    """The file had another length than the memory. The memory gets the length of the file if that is larger."""
    cdef memory* m = &f.head
    cdef size_t length = 0, size
    cdef int code
    if is_own_growth(m):
        return 0
    code = lock_memory(m, why)
    if code:
        return code
    size = memory_size(m)           # a growth of this process may have been under way
    code = fail_page_call(why, pages.file_size(&f.file, &length), "file_size", 0)
    if code == 0 and length < size:
        code = fail(why, E_FILE, "use", 0, length, size)
    # A guest must not find more pages than it knows, so its memory keeps the size.
    elif code == 0 and length > size and load(&m.owner) != OWNER_WASMTIME:
        if length > m.maximum or length > m.capacity:
            fail(why, E_CAPACITY, "the size of the file", length, 0, min(m.capacity, m.maximum))
            explain(why, "the file has grown further: open it again, with a larger reserve= or maximum=")
            code = why.code
        else:
            # A growth like any other, because budgets and tracemalloc count the new bytes.
            code = grow_locked(m, length, False, why)
    unlock(&m.lock)
    return code


cdef int open_pages(file_memory* f, size_t size, size_t length, failure* why) noexcept nogil:
    """Make the pages of the file's new bytes accessible. The pages are mapped anew: in a forked child they may have
    been decommitted."""
    cdef memory* m = &f.head
    cdef size_t end = 0
    cdef int code = 0
    round_up(length, host_page(), &end)
    if f.file.writable:
        code = fail_page_call(why, pages.file_allocate(&f.file, size, length - size), "allocate", length - size)
    if code == 0 and end > m.accessible:
        code = fail_page_call(why, pages.file_map(&f.file, m.accessible, m.base + m.accessible, end - m.accessible,
                                                  pages.ACCESS_READ_WRITE if f.file.writable else pages.ACCESS_READ),
                              "file_map", end - m.accessible)
    if code == 0:
        add(&f.lengths, 1)
        store_size(&m.accessible, end)
        store_release(&m.size, length)
    return code


# -- flush, and the end

cdef int memory_flush(memory* m, size_t offset, size_t size, failure* why) noexcept nogil:
    """Make the bytes of a range durable. Takes no lock: the base never moves, and other threads go on growing."""
    if m.ops.flush == NULL:
        fail(why, E_UNSUPPORTED, "flush", size)
        explain(why, "by a memory of kind '%s': its bytes are in no file", m.ops.kind)
        return why.code
    if not is_within(m, offset, size):
        return fail_range(m, offset, size, why)
    return m.ops.flush(m, offset, size, why)


cdef int file_flush(memory* m, size_t offset, size_t size, failure* why) noexcept nogil:
    cdef file_memory* f = <file_memory*>m
    cdef size_t first = round_down(offset, host_page()), end = 0
    cdef long long length = load(&f.lengths), durable = load(&f.durable)
    cdef int code = 0
    if load(&m.protection) == PROTECTION_READ_ONLY:
        return refuse_own(m, 0, 1, WRITABLE, E_PROTECTED, "flush", why)
    round_up(offset + size, host_page(), &end)
    if size:
        code = fail_page_call(why, pages.file_flush(m.base + first, end - first), "flush", size)
    # msync() of a range writes that range. The length of the file is not durable before fdatasync().
    if code == 0 and durable < length:
        code = fail_page_call(why, pages.file_sync(&f.file), "flush", size)
        # Only now, because a flush of another thread must not return before the length is durable.
        while code == 0 and durable < length and not compare_exchange(&f.durable, durable, length):
            durable = load(&f.durable)
    return code


cdef void file_free(memory* m) noexcept nogil:
    cdef file_memory* f = <file_memory*>m
    remove_live_memory(m)
    memory_forget_protection(m)
    forget_read_only(m)
    if load(&held_bound) and try_hold(m):
        pages.file_drop(&f.file)
        free_struct(m)
        return
    leave_range(m, &m.range, False)
    release_address_space(m.base - m.pre_guard, m.pre_guard + m.capacity + m.guard)
    # The lock ends with the descriptor: the next writer finds no page of this memory.
    pages.file_drop(&f.file)
    free_struct(m)


cdef const pages.file_pages* file_of(memory* m, size_t* position) noexcept nogil:
    position[0] = 0
    return &(<file_memory*>m).file


cdef memory_ops file_ops
file_ops.kind = "file"
file_ops.grow = file_grow
file_ops.resident = mapped_resident
file_ops.free = file_free
file_ops.check = file_check
file_ops.flush = file_flush
file_ops.file_of = file_of
file_ops.pages_are_ours = True
file_ops.pages_are_shared = True


# -- the creator

cdef int open_and_make(object path, bint writable, const memory_spec* spec, memory** out, failure* why) except -1:
    """Open the file, and make its memory. Nothing is left behind if this fails or raises. Returns a code."""
    cdef pages.file_pages file
    cdef bint is_new = False
    cdef int code, fd
    if not pages.capabilities().adopts_files:
        fail(why, E_UNSUPPORTED, "a memory of a file", 0)
        explain(why, "on this system")
        return why.code
    from linmem._files import memory_file       # takes time to import
    if writable:
        opened, is_new = memory_file.open_for_writing(path)
    else:
        opened = memory_file.open_for_reading(path)
    fd = opened
    try:
        with nogil:
            code = fail_page_call(why, pages.file_adopt(fd, writable, &file), "file_adopt", 0)
            if code == 0:
                code = file_make(spec, &file, out, why)
                if code:
                    pages.file_drop(&file)
        if code == 0:
            (<file_memory*>out[0]).is_new = is_new
        elif is_new:
            memory_file.remove_new(opened, path)
        return code
    finally:
        _close(opened)


@cython.final
cdef class FileCreator(NativeCreator):
    """FileCreator(path, *, name=None)\n--\n
    Makes the memory of a file: its bytes are those of the file, and they are there when the file is opened again.

    The file has no head, and its size is `byte_size`. A file that does not exist is made, with the mode 0600. A file
    that exists keeps its bytes: the memory is as large as the file, or as the minimum if that is larger. An `image` is
    the content of a new file, and does not change a file that has bytes already.

    A creator has one memory at a time: the next one is `BlockingIOError` while a memory of the file exists, in this
    process or in another one. `linmem.open_file` is the short way.

    Parameters
    ----------
    path : str, bytes or os.PathLike
        Of a regular file. A symbolic link is refused.
    name : str, optional
        Stands in the text of refusals, and in `MemoryInfo`.
    """

    def __cinit__(self, *args, **kwargs):
        path, _ = _given("FileCreator", ("path", "name"), {"name": None}, args, kwargs, 1)
        self.path = _check_path(path)

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef int code
        if python_is_ending():
            code = fail(why, E_UNSUPPORTED, "new_memory while the interpreter shuts down", spec.minimum)
        else:
            with gil:
                try:
                    code = open_and_make(self.path, True, spec, out, why)
                except BaseException as error:
                    code = fail_python(why, error)
        return finish_make(self, spec, code, out, why)

    def __repr__(self):
        return f"FileCreator({self.path!r}{name_option(self)})"


def _remove_new_file(Memory mem):
    """Remove the file of the memory, if the file was made with the memory. Other memories stay as they are."""
    cdef memory* m = mem.enter()
    cdef long long fd = (<file_memory*>m).file.handle if m.ops == &file_ops and (<file_memory*>m).is_new else -1
    try:
        if fd >= 0:
            from linmem._files import memory_file
            memory_file.remove_new_open(fd)
    finally:
        mem.leave()


def _length_before(creator):
    """The length of the file that a memory of a FileCreator or a SharedCreator will have at its start; 0 for a new
    file."""
    cdef size_t length = 0
    if isinstance(creator, FileCreator):
        try:
            return _os.stat(creator.path).st_size
        except OSError:         # the file does not exist; if the path is wrong, the creator's create() raises
            return 0
    if isinstance(creator, SharedCreator) and (<SharedCreator>creator).file.kind:
        pages.file_size(&(<SharedCreator>creator).file, &length)
    return length


def open_for_reading(path, maximum, reserve):
    """The memory of an existing file that another process may write; see `linmem.open_file`."""
    cdef memory_spec spec
    cdef memory* m = NULL
    cdef failure why
    path = _check_path(path)
    fill_usual(&spec)
    fill_sizes(&spec, 0, maximum, reserve, "reserve")
    if open_and_make(path, False, &spec, &m, &why):
        raise_failure(&why)
    return wrap(m)
