# Windows: parts of a memory that show pages of something else: memory_map(), memory_unmap(); a part of memory.pyx.
#
# m.windows lists the windows of a memory. A list changes only at its end, where one window is added or removed. Every
# other change publishes another list. So a child that is forked during a change has a complete list.
#
# Every page that shows a source lies in a listed window. The reverse does not hold: the pages of a listed window may be
# the memory's own, because a discard() replaced them, or because this is a child that was forked during a change.
# Therefore other code takes a window for bytes of which nothing is known, and compares or writes them one by one.
#
# The kernel keeps the pages of a source as long as they are mapped, also after the source is gone. A window of a memory
# also has a reference on that memory, because budgets count its pages, and a file has one writer. References make no
# cycle: a memory whose pages are a file's can be a source, and only a memory with pages of its own has windows.

cdef enum:
    SPARE_WINDOWS = 4
    MAPPINGS_EACH = 2               # mappings that one window may add to the process: its own, and the part behind it

    # What window_at() finds.
    OWN_PAGES = 0
    COPIED_ON_WRITE = 1
    WRITTEN_THROUGH = 2

ctypedef struct window:
    size_t offset, size             # whole host pages of the memory
    int shows                       # COPIED_ON_WRITE or WRITTEN_THROUGH
    bint may_shrink                 # another program may cut the source short; an access then ends the process
    memory* source                  # the memory that is shown, a reference; NULL: an image or a file is shown

cdef struct window_list:
    size_t n
    size_t room                     # the number of windows that fit
    window* items                   # behind the struct, in the same allocation

# What memory_map() maps. An image's pages are copied on write. A file's pages are written through if the descriptor can
# write, and if the file's bytes can be written at all.
ctypedef struct page_source:
    const image* img                # NULL: the file
    memory* of                      # the memory whose file it is, which the caller keeps; NULL: none
    pages.file_pages file
    bint is_constant                # the file's bytes can never change: it is sealed
    size_t position                 # where the first page lies in the content of the image, or in the file

cdef atomic_i64 n_windows           # of all memories


cdef int window_at(const memory* m, size_t offset, size_t end, size_t* next) noexcept nogil:
    """What the page at `offset` shows. *next: the same answer holds up to there, `end` at most."""
    cdef const window_list* list = m.windows
    cdef const window* each
    cdef size_t i
    cdef int found = OWN_PAGES
    next[0] = end
    for i in range(list.n if list != NULL else 0):
        each = &list.items[i]
        if each.offset > offset:
            next[0] = min(next[0], each.offset)
        elif each.offset + each.size > offset:
            next[0] = min(next[0], each.offset + each.size)
            found = max(found, each.shows)
    return found


cdef bint has_window(const memory* m, size_t start, size_t end) noexcept nogil:
    cdef size_t next
    return m.windows != NULL and start < end and (window_at(m, start, end, &next) != OWN_PAGES or next < end)


cdef bint window_may_shrink(const memory* m) noexcept nogil:
    """Whether a page of the memory may vanish, because another program cuts the file short that the page shows."""
    cdef const window_list* list = m.windows
    cdef size_t i
    for i in range(list.n if list != NULL else 0):
        if list.items[i].may_shrink:
            return True
    return False


# -- lists

cdef window_list* twice_the_room(const window_list* old, failure* why) noexcept nogil:
    """An empty list with room for all that add_outside() can add from `old`, and more. NULL: it failed, and *why is
    filled."""
    cdef size_t room = 2 * (old.n if old != NULL else 0) + SPARE_WINDOWS
    cdef size_t size = sizeof(window_list) + room * sizeof(window)
    cdef window_list* list = <window_list*>malloc(size)
    if list == NULL:
        fail(why, E_NO_MEMORY, "malloc", size)
        return NULL
    list.n = 0
    list.room = room
    list.items = <window*>(list + 1)
    return list


cdef void add_window(window_list* list, const window* like, size_t start, size_t end) noexcept nogil:
    if start < end:
        if like.source != NULL:
            memory_retain(like.source)
        list.items[list.n] = like[0]
        list.items[list.n].offset = start
        list.items[list.n].size = end - start
        store_size(&list.n, list.n + 1)         # after the window is complete


cdef void add_outside(window_list* list, const window_list* old, size_t start, size_t end) noexcept nogil:
    """Add the windows of `old`, without their pages in start .. end."""
    cdef const window* each
    cdef size_t i
    for i in range(old.n if old != NULL else 0):
        each = &old.items[i]
        add_window(list, each, each.offset, min(each.offset + each.size, start))
        add_window(list, each, max(each.offset, end), each.offset + each.size)


cdef window_list* publish_windows(memory* m, window_list* list) noexcept nogil:
    """Make `list` the memory's list. Returns the list before, which is the caller's now."""
    cdef window_list* before = m.windows
    add(&n_windows, (<long long>list.n if list != NULL else 0) - (<long long>before.n if before != NULL else 0))
    store_address(<char**>&m.windows, <char*>list)
    return before


cdef void drop_windows(window_list* list) noexcept nogil:
    """Free a list that is not published. The caller holds no lock, because a source may be dropped."""
    cdef size_t i
    if list == NULL:
        return
    for i in range(list.n):
        if list.items[i].source != NULL:
            memory_release(list.items[i].source)
    free(list)


cdef int make_room_for_window(memory* m, failure* why) noexcept nogil:
    """m.windows has room for one more window afterwards."""
    cdef window_list* list
    if m.windows != NULL and m.windows.n < m.windows.room:
        return 0
    list = twice_the_room(m.windows, why)
    if list == NULL:
        return why.code
    if m.windows != NULL:
        memcpy(list.items, m.windows.items, m.windows.n * sizeof(window))       # takes the references over
        list.n = m.windows.n
    free(publish_windows(m, list))
    return 0


# -- map

cdef int check_whole_pages(const char* name, size_t value, failure* why) noexcept nogil:
    if value & (host_page() - 1):
        return fail_text(why, E_VALUE, "%s must be a multiple of the host page (%zu), got %zu", name, host_page(),
                         value)
    return 0


cdef int begin_map(memory* m, size_t offset, size_t size, failure* why) noexcept nogil:
    """Take the memory's lock, and refuse a range that cannot become a window. A code: the lock is not taken."""
    cdef int code = check_whole_pages("offset", offset, why) or check_whole_pages("size", size, why)
    if code == 0:
        code = begin_page_call(m, "map", offset, size, why)
    if code == 0 and m.ops.pages_are_shared:
        unlock(&m.lock)
        code = fail(why, E_UNSUPPORTED, "map", size)
        snprintf(why.detail, sizeof(why.detail), "into a memory of kind '%s', because the pages of a window belong to"
                 " one process, and those of this memory to all: map its pages into a memory of linmem.create(), as"
                 " often as needed", m.ops.kind)
    return code


cdef int memory_map(memory* m, size_t offset, const page_source* source, size_t size, int access,
                    failure* why) noexcept nogil:
    """The pages of a range show pages of the source, which are in the source. access: ACCESS_READ or
    ACCESS_READ_WRITE; ACCESS_READ in a memory of a store is copy-on-write, because the guest's memory.fill runs in
    native code, where a fault ends the process. If this fails, nothing has changed, unless the OS has emptied the
    range: then its bytes are zero."""
    cdef window_list* after = NULL
    cdef window_list* before = NULL
    cdef size_t most = pages.capabilities().mappings // 2
    cdef window new
    cdef int code = begin_map(m, offset, size, why)
    if code:
        return code
    new.offset, new.size, new.source = offset, size, source.of
    new.shows = COPIED_ON_WRITE
    new.may_shrink = source.img == NULL and source.file.kind != pages.FILE_SEALED
    if source.img == NULL and source.file.writable and not source.is_constant:
        new.shows = WRITTEN_THROUGH
    if load(&m.owner) == OWNER_WASMTIME:
        if access == pages.ACCESS_READ:
            access = pages.ACCESS_READ_WRITE
            new.shows = COPIED_ON_WRITE
        if new.may_shrink:
            code = fail(why, E_OWNED, "map", size)
            explain(why, "a page of a file that another program cuts short would end the process; map an Image of"
                    " the bytes, or a shared memory")
    if code == 0 and most and (<size_t>load(&n_windows) + 1) * MAPPINGS_EACH > most:
        code = fail(why, E_MAPPINGS, "map", size, <size_t>load(&n_windows), pages.capabilities().mappings)
    if code == 0 and size and has_window(m, offset, offset + size):
        after = twice_the_room(m.windows, why)
        code = why.code if after == NULL else 0
    if code == 0 and size:
        code = make_room_for_window(m, why)
        if code:
            free(after)
    if code == 0 and size:
        # While the OS replaces the pages, they may show the old windows or the new one.
        add_window(m.windows, &new, offset, offset + size)
        add(&n_windows, 1)
        code = map_pages(m, source, &new, access, why)
        if code:
            store_size(&m.windows.n, m.windows.n - 1)
            if new.source != NULL:
                memory_release(new.source)      # not the last reference
            add(&n_windows, -1)
            if m.windows.n == 0:
                free(publish_windows(m, NULL))
            free(after)
        elif after != NULL:
            add_outside(after, m.windows, offset, offset + size)
            add_window(after, &new, offset, offset + size)
            before = publish_windows(m, after)
    unlock(&m.lock)
    drop_windows(before)
    return code


cdef int map_pages(memory* m, const page_source* source, const window* new, int access, failure* why) noexcept nogil:
    """The pages show the source and have the access. Until then the list says that they may show anything."""
    cdef bint has_table = load(&m.protection) != PROTECTION_NONE or access != pages.ACCESS_READ_WRITE
    cdef bint emptied = False
    cdef long long image_before = m.cow.how
    cdef long long handle = source.file.handle if source.img == NULL else source.img.content.handle
    cdef size_t position = source.position + (0 if source.img == NULL else <size_t>source.img.content.position)
    cdef int code = begin_change(m, why) if has_table else 0
    if code:
        return code
    if access != pages.ACCESS_READ_WRITE:
        code = wait_for_accesses(m, why)
    if code == 0:
        image_loses_pages(m, new.offset, new.offset + new.size)
        code = pages.window_map(handle, position, m.base + new.offset, new.size, access, new.shows == WRITTEN_THROUGH,
                                &emptied)
        if has_table and (code == 0 or emptied):
            set_access(m.protections, new.offset, new.offset + new.size,
                       access if code == 0 else <int>pages.ACCESS_READ_WRITE)
        if code and not emptied:
            m.cow.how = image_before
        fail_page_call(why, code, "map", new.size)
    if has_table:
        end_change(m)
    return code


# -- unmap

cdef int memory_unmap(memory* m, size_t offset, size_t size, failure* why) noexcept nogil:
    """The pages of the range that show a source become the memory's own pages of zeros, "rw". If the OS refuses, the
    pages of the windows up to some offset are zero, and no other byte has changed."""
    cdef window_list* list = NULL
    cdef int code = check_whole_pages("offset", offset, why) or check_whole_pages("size", size, why)
    if code == 0:
        code = begin_page_call(m, "unmap", offset, size, why)
    if code:
        return code
    if has_window(m, offset, offset + size):
        list = twice_the_room(m.windows, why)
        code = why.code if list == NULL else close_windows(m, offset, offset + size, &list, why)
    unlock(&m.lock)
    drop_windows(list)
    return code


cdef int close_windows(memory* m, size_t offset, size_t end, window_list** list, failure* why) noexcept nogil:
    """*list: twice_the_room(). Afterwards it is another list, for drop_windows()."""
    cdef bint has_table = load(&m.protection) != PROTECTION_NONE
    cdef size_t start = offset, next
    cdef int code = begin_change(m, why) if has_table else 0
    if code:
        return code
    while start < end and code == 0:
        if window_at(m, start, end, &next) != OWN_PAGES:
            code = make_room(m.protections, why) if has_table else 0
            if code == 0:
                code = fail_page_call(why, pages.blank(m.base + start, next - start), "unmap", next - start)
            if code:
                break
            if m.huge_pages:
                pages.advise_huge(m.base + start, next - start)
            if has_table:
                set_access(m.protections, start, next, pages.ACCESS_READ_WRITE)
        start = next
    if has_table:
        end_change(m)
    add_outside(list[0], m.windows, offset, start)
    if list[0].n == 0:
        free(list[0])
        list[0] = NULL
    list[0] = publish_windows(m, list[0])
    return code


cdef int memory_close_windows(memory* m) noexcept nogil:
    """The caller owns the memory exclusively. No page shows a source afterwards. A code: the bytes are unknown."""
    cdef failure why
    cdef window_list* list
    cdef int code
    if m.windows == NULL:
        return 0
    list = twice_the_room(m.windows, &why)
    code = why.code if list == NULL else close_windows(m, 0, SIZE_MAX, &list, &why)
    drop_windows(list)
    return code


# -- what Python code passes as a source

from io import UnsupportedOperation as _UnsupportedOperation
import os as _os

cdef str _IN_SOURCE = "within the source"
_MAP_ACCESSES = {"rw": pages.ACCESS_READ_WRITE, "r": pages.ACCESS_READ}
_WRITE_SEALS = 0x18     # F_SEAL_WRITE | F_SEAL_FUTURE_WRITE; Python does not know the second one before 3.13
cdef size_t kernel_page = _os.sysconf("SC_PAGE_SIZE") if hasattr(_os, "sysconf") else 4096


cdef int map_into(Memory mem, object offset, object source, object source_offset, object size, object access) except -1:
    cdef size_t start, first, n = 0
    cdef int how
    check_bounded(offset, "offset", _WITHIN, &start)
    check_bounded(source_offset, "source_offset", _IN_SOURCE, &first)
    if size is not None:
        check_bounded(size, "size", _WITHIN, &n)
        size = n
    how = _MAP_ACCESSES[_check_choice(access, "access", _MAP_ACCESSES)]
    if isinstance(source, Image):
        return map_image(mem, start, <Image>source, first, size, how)
    if isinstance(source, Memory):
        return map_memory(mem, start, <Memory>source, first, size, how)
    if hasattr(source, "fileno"):
        from linmem._core.shared_handles import SharedHandle
        if isinstance(source, SharedHandle):        # the file of a shared memory begins with the control words
            raise TypeError(f"source must be a memory, got its handle {source!r}: linmem.attach(source) gives the"
                            " memory")
    descriptor = descriptor_of(source)
    if descriptor is None:
        return map_buffer(mem, start, source, first, size, how)
    return map_file(mem, start, source, descriptor, first, size, how)


cdef object descriptor_of(object file):
    """The descriptor of a file. None if the object is not a file."""
    fileno = getattr(file, "fileno", None)
    try:
        descriptor = fileno() if callable(fileno) else None
    except _UnsupportedOperation:       # a file in memory
        descriptor = None
    return descriptor if isinstance(descriptor, int) and 0 <= descriptor < 1 << 31 else None


cdef int map_buffer(Memory mem, size_t offset, object source, size_t first, object size, int access) except -1:
    """Of an array on the pages of a memory, for example of linmem.empty()."""
    cdef Py_buffer view
    cdef size_t length, whole = 0
    try:
        PyObject_GetBuffer(source, &view, PyBUF_SIMPLE)
    except (BufferError, TypeError, ValueError) as error:
        raise TypeError(no_source(source)) from error
    try:
        length = view.len
        place = find(<size_t>view.buf) if length else None
        if place is None or place.memory is None:
            raise TypeError(no_source(source))
        if place.offset & (host_page() - 1):
            raise ValueError(f"source must begin at a host page ({host_page()}), got a {type(source).__name__} that"
                             f" begins at byte {place.offset} of its memory")
        if view.readonly and access != pages.ACCESS_READ:
            raise ValueError(f"access must be 'r' for a read-only {type(source).__name__}")
        round_up(length, host_page(), &whole)
        return map_memory(mem, offset, place.memory, place.offset + first, size_in_source(length, whole, first, size),
                          access)
    finally:
        PyBuffer_Release(&view)


cdef str no_source(object source):
    return (f"source must be an Image, a memory, an open file or an array of linmem.empty(), got"
            f" {type(source).__name__}, which has no pages of its own that a memory can show: mem.write(offset, source)"
            " copies the bytes of a buffer, and linmem.Image.from_bytes(source) copies them once for many memories;"
            " linmem.empty(shape, dtype) makes a NumPy array whose pages can be shown")


cdef size_t size_in_source(size_t most, size_t whole, size_t first, object size) except? 0:
    """The size in whole host pages. most: bytes of the source; whole: to the end of its last page. size: None means the
    rest of the source."""
    if first > whole:
        raise ValueError(f"source_offset must be <= the size of the source ({most}), got {first}")
    if size is not None and size > whole - first:
        raise ValueError(f"source_offset + size must be <= the size of the source ({most}) to the end of its last"
                         f" page ({whole}), got {first} + {size}")
    return whole - first if size is None else size


cdef int map_image(Memory mem, size_t offset, Image source, size_t first, object size, int access) except -1:
    cdef page_source given
    cdef size_t lead = source.offset - source.img.offset, n
    if (lead + first) & (host_page() - 1):
        raise ValueError(f"the image's offset + source_offset must be a multiple of the host page ({host_page()}), got"
                         f" {source.offset} + {first}")
    n = size_in_source(source.size, source.img.content.size - lead, first, size)
    if n and not source.img.content.maps:
        raise TypeError("map is not supported with this image, because its pages are private (Image.info()):"
                        " mem.write(offset, image) copies the bytes")
    memset(&given, 0, sizeof(given))
    given.img = source.img
    given.position = lead + first
    return call_map(mem, offset, &given, n, access)


cdef int check_source_offset(size_t first) except -1:
    if first & (host_page() - 1):
        raise ValueError(f"source_offset must be a multiple of the host page ({host_page()}), got {first}")
    return 0


cdef int map_memory(Memory mem, size_t offset, Memory source, size_t first, object size, int access) except -1:
    cdef page_source given
    cdef const pages.file_pages* file = NULL
    cdef size_t position = 0, length, whole = 0
    cdef memory* m
    check_source_offset(first)
    m = source.enter()
    try:
        if m.ops.file_of != NULL:
            file = m.ops.file_of(m, &position)
        if file == NULL:
            raise TypeError(f"source must be a memory that processes share or one of a file, got one of kind"
                            f" {m.ops.kind.decode()!r}, whose pages cannot be shown a second time:"
                            " linmem.creator('shared') makes memories, and linmem.empty() makes NumPy arrays, whose"
                            " pages can")
        if file.kind == pages.FILE_SECTION:
            raise TypeError("map of a shared memory is not supported on this system, where its pages are a section:"
                            " mem.write(offset, source.read(...)) copies the bytes")
        length = memory_size(m)
        round_up(length, host_page(), &whole)
        if whole >= length + kernel_page:       # with LINMEM_PAGE_SIZE, the file may end before its last host page
            whole = round_down(length, host_page())
        memset(&given, 0, sizeof(given))
        given.of, given.file, given.position = m, file[0], position + first
        return call_map(mem, offset, &given, size_in_source(length, whole, first, size), access)
    finally:
        source.leave()


cdef int call_map(Memory mem, size_t offset, const page_source* source, size_t size, int access) except -1:
    cdef failure why
    cdef int code
    cdef memory* m = mem.enter()
    with nogil:
        code = memory_map(m, offset, source, size, access, &why)
    return mem.finish(code, &why)


cdef bint check_target(Memory mem, size_t offset, size_t size) except -1:
    """Raise if the range cannot become a window. Returns whether a wasmtime store owns the memory."""
    cdef failure why
    cdef bint is_owned = False
    cdef int code
    cdef memory* m = mem.enter()
    with nogil:
        code = begin_map(m, offset, size, &why)
        if code == 0:
            is_owned = load(&m.owner) == OWNER_WASMTIME
            unlock(&m.lock)
    mem.finish(code, &why)
    return is_owned


cdef int map_file(Memory mem, size_t offset, object source, int descriptor, size_t first, object size,
                  int access) except -1:
    cdef page_source given
    cdef size_t length = 0, whole = 0, n = size or host_page()
    cdef bint is_plain, is_owned
    cdef failure why
    cdef int code
    check_source_offset(first)
    if not pages.capabilities().maps_images:
        raise TypeError("map of a file is not supported on this system: mem.write(offset, file.read()) copies the"
                        " bytes")
    _check_descriptor(descriptor, "source", "a regular file that can be read", source)
    memset(&given, 0, sizeof(given))
    with nogil:
        code = fail_page_call(&why, pages.file_adopt(descriptor, False, &given.file), "file_adopt", n)
    if code:
        raise_failure(&why)
    try:
        with nogil:
            code = fail_page_call(&why, pages.file_size(&given.file, &length), "file_size", n)
        if code:
            raise_failure(&why)
        round_up(length, host_page(), &whole)
        n = size_in_source(length, whole, first, size)
        is_owned = check_target(mem, offset, n)     # before the bytes of a file are copied, or its space is allocated
        is_plain = given.file.kind != pages.FILE_SEALED
        given.is_constant = is_sealed_against_writes(given.file.handle)
        given.position = first
        # A file that others can cut short must not be in a memory of a store. And past the last page that the kernel
        # has of a file, each access is a fault; linmem's host page may be larger than the kernel's (LINMEM_PAGE_SIZE).
        if given.file.writable and not given.is_constant and first + n >= length + kernel_page:
            raise ValueError(f"size must end at a whole host page ({host_page()}) of a file that is open for update and"
                             f" has {length} bytes, got {first} + {n}")
        if (is_owned and is_plain and not given.file.writable) or first + n >= length + kernel_page:
            return map_copy(mem, offset, given.file.handle, first, min(length - first, n), n, access)
        if n and given.file.writable and is_plain and not is_owned:
            if not pages.capabilities().adopts_files:
                raise TypeError("map of a file that is open for update is not supported on this system, which does not"
                                " allocate space: open the file for reading, or write(offset, file.read()) copies the"
                                " bytes")
            with nogil:     # a page without space is a fault when it is written
                code = fail_page_call(&why, pages.file_allocate(&given.file, first, min(length - first, n)),
                                      "file_allocate", n)
            if code:
                raise_failure(&why)
        return call_map(mem, offset, &given, n, access)
    finally:
        pages.file_drop(&given.file)


cdef bint is_sealed_against_writes(int descriptor) except -1:
    try:
        import fcntl
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _WRITE_SEALS != 0
    except (ImportError, AttributeError, OSError):      # this system, or this kind of file, has no seals
        return False


cdef int map_copy(Memory mem, size_t offset, int descriptor, size_t first, size_t length, size_t size,
                  int access) except -1:
    """Copy the file's bytes into an image, and map the image. Other programs cannot make an image shorter."""
    from linmem._files.sparse import pieces_of_file
    cdef Image copied = Image.from_pieces(pieces_of_file(descriptor, first, length), size)
    return map_image(mem, offset, copied, 0, None, access)
