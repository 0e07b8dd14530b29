# Pages that processes share, on Windows: section objects, whose pages the system commits when a memory grows. Part of
# windows.pyx.
#
# A section has a name in the Local namespace, which lives as long as a process has a handle of the section. A view maps
# the whole capacity at once: only a placeholder would let the system put a view into a reservation later, and some
# versions of Windows have none. The system commits a page for all views at once.

# The answer of NtQuerySection() to SectionBasicInformation (0), and of NtQueryObject() to ObjectNameInformation (1).
cdef struct section_information:
    void* base
    DWORD attributes
    LARGE_INTEGER size

cdef struct name_information:
    unsigned short size         # in bytes
    unsigned short room
    wchar_t* text
    char[2048] bytes

ctypedef long (*query_section_call)(HANDLE section, int what, void* answer, size_t room, size_t* used) noexcept nogil
ctypedef long (*query_object_call)(HANDLE handle, int what, void* answer, DWORD room, DWORD* used) noexcept nogil
cdef query_section_call query_section = NULL
cdef query_object_call query_object = NULL
NAMES = "Local\\linmem-"

cdef enum:
    NAME_ROOM = 300
    PLACES = 16                 # how often os_file_place() tries another place


cdef int os_file_begin(char* addr, size_t size, details* more) noexcept nogil:
    cdef char text[NAME_ROOM]
    cdef wchar_t name[NAME_ROOM]
    cdef size_t most = 0
    cdef HANDLE section
    cdef DWORD code
    snprintf(text, NAME_ROOM, "Local\\linmem-%s", more.name)
    if MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text, -1, name, NAME_ROOM) == 0:
        return last_error()
    # In whole units of the granularity, because the next allocation after a view begins at such a unit. And one unit
    # more than the memory needs: Wine does not note a commit that ends where the view ends.
    if round_up(more.most, real_granularity, &most) or add_up(most, real_granularity, &most):
        return ERROR_NOT_ENOUGH_MEMORY
    section = CreateFileMappingW(INVALID_HANDLE_VALUE, NULL, PAGE_READWRITE | SEC_RESERVE, <DWORD>(most >> 32),
                                 <DWORD>most, name)
    code = GetLastError()
    if section == NULL:
        return FILE_EXISTS if code == ERROR_INVALID_HANDLE else <int>code or ERROR_GEN_FAILURE
    if code == ERROR_ALREADY_EXISTS:
        CloseHandle(section)
        return FILE_EXISTS
    more.file.kind, more.file.writable, more.file.handle = FILE_SECTION, True, <long long>section
    set_identity(more.file)
    return 0


cdef void set_identity(file_pages* file) noexcept nogil:
    """Two hashes of the name, which the system gives one section at a time."""
    cdef name_information about
    cdef DWORD used = 0
    cdef size_t i
    if query_object == NULL or query_object(<HANDLE>file.handle, 1, &about, sizeof(about), &used) < 0:
        return
    file.device, file.inode = 0xcbf29ce484222325ULL, 0x9e3779b97f4a7c15ULL
    for i in range(about.size // sizeof(wchar_t)):
        file.device = (file.device ^ <unsigned long long>about.text[i]) * 0x100000001b3ULL
        file.inode = (file.inode + <unsigned long long>about.text[i]) * 0xff51afd7ed558ccdULL
        file.inode ^= file.inode >> 32


cdef int section_size(HANDLE section, size_t* size) noexcept nogil:
    """A code if the handle is not one of a section like those of os_file_begin()."""
    cdef section_information about
    if query_section == NULL:
        return ERROR_NOT_SUPPORTED
    memset(&about, 0, sizeof(about))
    if query_section(section, 0, &about, sizeof(about), NULL) < 0:
        return ERROR_INVALID_HANDLE
    if not about.attributes & SEC_RESERVE or about.attributes & (SEC_FILE | SEC_IMAGE):
        return FILE_FOREIGN
    size[0] = <size_t>about.size.QuadPart
    return 0


cdef int os_file_adopt(char* addr, size_t size, details* more) noexcept nogil:
    cdef size_t has
    cdef int code = section_size(<HANDLE>more.file.handle, &has) if more.takes else ERROR_NOT_SUPPORTED
    if code:
        more.file.handle = -1
        return code
    more.file.kind, more.file.writable = FILE_SECTION, True
    set_identity(more.file)
    return 0


cdef int file_reach(unsigned long long pid, unsigned long long descriptor, file_pages* out,
                    size_t* length) noexcept nogil:
    return ERROR_NOT_SUPPORTED


cdef int os_file_copy(char* addr, size_t size, details* more) noexcept nogil:
    cdef HANDLE process = GetCurrentProcess(), copied = NULL
    cdef bint works = DuplicateHandle(process, <HANDLE>more.file.handle, process, &copied, 0, False,
                                      DUPLICATE_SAME_ACCESS)
    more.file.handle = <long long>copied if works else -1
    return 0 if works else last_error()


cdef void file_drop(file_pages* file) noexcept nogil:
    if file.handle != -1:
        CloseHandle(<HANDLE>file.handle)
    file.handle = -1


cdef int os_file_size(char* addr, size_t size, details* more) noexcept nogil:
    return section_size(<HANDLE>more.file.handle, more.bytes)


cdef int os_file_extend(char* addr, size_t size, details* more) noexcept nogil:
    cdef size_t has = 0
    return section_size(<HANDLE>more.file.handle, &has) or (0 if size <= has else ERROR_DISK_FULL)


cdef int os_file_place(char* addr, size_t size, details* more) noexcept nogil:
    cdef MEMORY_BASIC_INFORMATION about
    cdef size_t extra = caps.granularity - real_granularity, total = more.before + size + more.after + extra
    cdef size_t has = 0, shown = 0, room = 0
    cdef char* area
    cdef int tries = 0
    cdef int code = section_size(<HANDLE>more.file.handle, &has)
    if code:
        return code
    if has <= more.position:
        return ERROR_DISK_FULL
    round_up(size, real_granularity, &shown)
    round_up(total, real_granularity, &room)
    shown = min(min(shown + real_granularity, room - more.before - extra), has - more.position)
    if VirtualQuery(more.base[0], &about, sizeof(about)) == 0:
        return last_error()
    area = <char*>about.AllocationBase
    # The system puts a view only where nothing is reserved. If another thread of the process takes the addresses
    # between the release and the mapping, the next round goes to another place.
    while True:
        if not VirtualFree(area, 0, MEM_RELEASE):
            return last_error()
        code = map_between(more.file, more.position, area, <size_t>(more.base[0] - area) + more.before, shown, total)
        if code == 0:
            return 0
        tries += 1
        more.base[0] = NULL
        if code == ERROR_INVALID_ADDRESS and tries < PLACES:
            area = <char*>VirtualAlloc(NULL, total, MEM_RESERVE, PAGE_NOACCESS)
            if area != NULL:
                more.base[0] = <char*>((<size_t>area + extra) & ~(caps.granularity - 1))
                # The view must begin at a multiple of the granularity, as in the first place.
                continue
            code = last_error()
        count_released(total)
        return code


cdef int map_between(file_pages* file, size_t position, char* area, size_t before, size_t shown,
                     size_t total) noexcept nogil:
    """Three allocations, which fill the `total` free bytes at `area`: a reservation, the view, a reservation."""
    cdef size_t after = total - before - shown if total > before + shown else 0
    cdef int code
    if before and VirtualAlloc(area, before, MEM_RESERVE, PAGE_NOACCESS) == NULL:
        return last_error()
    if MapViewOfFileEx(<HANDLE>file.handle, FILE_MAP_WRITE, <DWORD>(position >> 32), <DWORD>position, shown,
                       area + before) == NULL:
        code = last_error()
    elif after and VirtualAlloc(area + before + shown, after, MEM_RESERVE, PAGE_NOACCESS) == NULL:
        code = last_error()
        UnmapViewOfFile(area + before)
    else:
        add(&views, 1)
        return 0
    if before:
        VirtualFree(area, 0, MEM_RELEASE)
    return code


cdef int os_file_show(char* addr, size_t size, details* more) noexcept nogil:
    cdef size_t lead = more.position & (real_granularity - 1), start = more.position - lead
    cdef size_t counted = size + caps.granularity - real_granularity
    cdef int code
    cdef char* p
    count_reserved(counted)
    p = <char*>MapViewOfFile(<HANDLE>more.file.handle, FILE_MAP_WRITE, <DWORD>(start >> 32), <DWORD>start, lead + size)
    if p == NULL:
        code = last_error()
    elif VirtualAlloc(p + lead, size, MEM_COMMIT, PAGE_READWRITE) == NULL:
        code = last_error()
        UnmapViewOfFile(p)
    else:
        add(&views, 1)
        more.base[0] = p + lead
        return 0
    count_released(counted)
    return code


cdef int os_file_discard(char* addr, size_t size, details* more) noexcept nogil:
    # The system refuses to decommit pages of a section, so the pages stay. They are zeroed in a view of their own,
    # because the pages of the memory may be protected.
    cdef char* p = NULL
    cdef int code
    more.base = &p
    code = os_file_show(addr, size, more)
    if code:
        return code
    memset(p, 0, size)
    return os_release(p, size)


cdef int not_supported(char* addr, size_t size, details* more) noexcept nogil:
    return ERROR_NOT_SUPPORTED


cdef detailed_call os_file_read = not_supported
cdef detailed_call os_file_cut = not_supported
cdef detailed_call os_file_allocate = not_supported
cdef detailed_call os_file_map = not_supported
cdef detailed_call os_file_data = not_supported
cdef detailed_call os_file_sync = not_supported
cdef detailed_call os_window_map = not_supported


cdef int os_file_flush(char* addr, size_t size) noexcept nogil:
    return ERROR_NOT_SUPPORTED


cdef int wait_while_equal(int* word, int value, long long ns) noexcept nogil:
    # WaitOnAddress() waits for threads of the same process only. An event or a semaphore for each word would need a
    # count of its waiters, and a process that is killed leaves its waiters counted. So this function looks again and
    # again: at first after it has given up the processor, then after a tick of the clock, then more seldom. Another
    # thread may make the page inaccessible meanwhile: ReadProcessMemory() fails then, where a load would be fatal.
    cdef long long end = clock_ns() + ns
    cdef size_t done = 0
    cdef int found = value, n = 0
    while True:
        if not ReadProcessMemory(GetCurrentProcess(), word, &found, sizeof(int), &done):
            return last_error()
        if found != value or clock_ns() >= end:
            return 0
        if n < 64:
            SwitchToThread()
        else:
            Sleep(min(<DWORD>(1 + n // 128), <DWORD>8))
        n += 1


cdef int wake_waiters(int* word, int n, int* woken) noexcept nogil:
    woken[0] = 0
    return 0


def open_section(name):
    """A handle of the section that file_begin() gave this name; `close_section` ends it. `FileNotFoundError` if there
    is none."""
    cdef wchar_t* text = PyUnicode_AsWideCharString(NAMES + name, NULL)
    cdef HANDLE section
    cdef int code = 0
    with nogil:
        section = OpenFileMappingW(FILE_MAP_READ | FILE_MAP_WRITE | SECTION_QUERY, False, text)
        if section == NULL:
            code = last_error()
    PyMem_Free(text)
    if code:
        PyErr_SetFromWindowsErr(code)
    return <long long>section


def claim_name(name):
    """The handle of a new kernel object of this name; None if there is one already. `close_section` ends it."""
    cdef wchar_t* text = PyUnicode_AsWideCharString(NAMES + name, NULL)
    cdef HANDLE found
    cdef DWORD code
    with nogil:
        found = CreateMutexW(NULL, False, text)
        code = GetLastError()
    PyMem_Free(text)
    if found == NULL:
        PyErr_SetFromWindowsErr(<int>code)
    if code == ERROR_ALREADY_EXISTS:
        CloseHandle(found)
        return None
    return <long long>found


def close_section(long long handle):
    CloseHandle(<HANDLE>handle)


def read_section(long long handle, size_t size):
    """The first bytes of a section that anybody may have made; None if it is not one of file_begin()."""
    cdef size_t has = 0
    cdef char* addr = NULL
    if section_size(<HANDLE>handle, &has) or has < real_page or size > real_page:
        return None
    show_page(handle, 0, &addr)         # a page that is not committed would be a fault
    try:
        return addr[:size]
    finally:
        check_code(os_release(addr, real_page))


def write_section(long long handle, size_t position, bytes data):
    """[position, position + len(data)) lies in one page of the section."""
    cdef char* addr = NULL
    cdef size_t lead = position & (real_page - 1)
    show_page(handle, position - lead, &addr)
    memcpy(addr + lead, <const char*>data, len(data))
    check_code(os_release(addr, real_page))


cdef int show_page(long long handle, size_t position, char** addr) except -1:
    cdef file_pages file
    cdef details more
    file.handle = handle
    more.file, more.position, more.base = &file, position, addr
    return check_code(os_file_show(NULL, real_page, &more))


cdef int check_code(int code) except -1:
    if code:
        raise OSError(*os_error_args(code, code_text(code).decode()))
    return 0


def section_name(long long handle):
    """The name that file_begin() gave the section of a handle."""
    cdef name_information about
    cdef DWORD used = 0
    if query_object == NULL or query_object(<HANDLE>handle, 1, &about, sizeof(about), &used) < 0:
        raise OSError(*os_error_args(ERROR_INVALID_HANDLE, code_text(ERROR_INVALID_HANDLE).decode()))
    path = PyUnicode_FromWideChar(about.text, about.size // 2) if about.size else ""
    return path.rpartition("\\")[2].removeprefix("linmem-")
