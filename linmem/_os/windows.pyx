# cython: language_level=3
"""The page floor on Windows: VirtualAlloc, VirtualProtect, VirtualFree and their kin."""

from linmem._os cimport pages as _contract    # no-cython-lint: an edit of the contract causes a rebuild
from linmem._core.atomic cimport add, atomic_i64, load, touch

from libc.stddef cimport wchar_t
from libc.stdint cimport intptr_t, uintptr_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy

import errno as _errno

# It includes <windows.h>, which must not be included twice with different macros.
cdef extern from "linmem/_os/compat.h" nogil:
    pass

cdef extern from "<windows.h>" nogil:
    ctypedef void* HANDLE
    ctypedef unsigned long DWORD
    ctypedef size_t ULONG_PTR
    ctypedef union LARGE_INTEGER:
        long long QuadPart
    ctypedef struct MEMORY_BASIC_INFORMATION:
        void* AllocationBase
        DWORD State
    ctypedef struct MEMORYSTATUSEX:
        DWORD dwLength
        unsigned long long ullTotalPhys, ullTotalPageFile, ullAvailPageFile
    ctypedef struct SYSTEM_INFO:
        DWORD dwPageSize, dwAllocationGranularity
        void* lpMaximumApplicationAddress
    ctypedef struct EXCEPTION_POINTERS:
        pass

    DWORD MEM_RESERVE, MEM_COMMIT, MEM_DECOMMIT, MEM_RELEASE, MEM_RESET, MEM_WRITE_WATCH, MEM_FREE
    DWORD PAGE_NOACCESS, PAGE_READONLY, PAGE_READWRITE, PAGE_EXECUTE_READ
    DWORD FILE_MAP_READ, FILE_MAP_WRITE, FILE_TYPE_DISK
    DWORD SEM_FAILCRITICALERRORS, SEM_NOGPFAULTERRORBOX
    HANDLE INVALID_HANDLE_VALUE
    int EXCEPTION_EXECUTE_HANDLER
    int ERROR_ACCESS_DENIED, ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY, ERROR_GEN_FAILURE, ERROR_NOT_SUPPORTED
    int ERROR_INVALID_PARAMETER, ERROR_INVALID_ADDRESS, ERROR_NOACCESS, ERROR_NO_SYSTEM_RESOURCES
    int ERROR_WORKING_SET_QUOTA, ERROR_COMMITMENT_LIMIT, ERROR_NOT_ENOUGH_QUOTA, ERROR_INVALID_HANDLE

    DWORD GetLastError()
    void* VirtualAlloc(void* addr, size_t size, DWORD allocation_type, DWORD protect)
    bint VirtualFree(void* addr, size_t size, DWORD free_type)
    bint VirtualProtect(void* addr, size_t size, DWORD new_protect, DWORD* old_protect)
    size_t VirtualQuery(const void* addr, MEMORY_BASIC_INFORMATION* buffer, size_t length)
    bint VirtualUnlock(void* addr, size_t size)
    unsigned int GetWriteWatch(DWORD flags, void* addr, size_t size, void** addresses, ULONG_PTR* count,
                               DWORD* granularity)
    unsigned int ResetWriteWatch(void* addr, size_t size)
    bint FlushInstructionCache(HANDLE process, const void* addr, size_t size)
    HANDLE GetCurrentProcess()
    void GetSystemInfo(SYSTEM_INFO* info)
    bint GlobalMemoryStatusEx(MEMORYSTATUSEX* status)
    HANDLE CreateFileMappingW(HANDLE file, void* attributes, DWORD protect, DWORD maximum_size_high,
                              DWORD maximum_size_low, const wchar_t* name)
    void* MapViewOfFile(HANDLE section, DWORD access, DWORD offset_high, DWORD offset_low, size_t size)
    bint UnmapViewOfFile(const void* addr)
    bint CloseHandle(HANDLE handle)
    bint DuplicateHandle(HANDLE process, HANDLE handle, HANDLE target_process, HANDLE* target_handle, DWORD access,
                         bint inherit, DWORD options)
    DWORD GetFileType(HANDLE file)
    bint GetFileSizeEx(HANDLE file, LARGE_INTEGER* size)
    bint CreatePipe(HANDLE* read_pipe, HANDLE* write_pipe, void* attributes, DWORD size)
    bint ReadFile(HANDLE file, void* buffer, DWORD size, DWORD* bytes_read, void* overlapped)
    bint WriteFile(HANDLE file, const void* buffer, DWORD size, DWORD* bytes_written, void* overlapped)
    bint QueryPerformanceCounter(LARGE_INTEGER* ticks)
    bint QueryPerformanceFrequency(LARGE_INTEGER* ticks)
    bint SwitchToThread()
    void Sleep(DWORD milliseconds)
    unsigned int GetErrorMode()
    unsigned int SetErrorMode(unsigned int mode)
    void* SetUnhandledExceptionFilter(long (*filter)(EXCEPTION_POINTERS*) noexcept nogil)

cdef extern from "<psapi.h>" nogil:
    ctypedef struct PSAPI_WORKING_SET_EX_BLOCK:
        ULONG_PTR Flags
    ctypedef struct PSAPI_WORKING_SET_EX_INFORMATION:
        void* VirtualAddress
        PSAPI_WORKING_SET_EX_BLOCK VirtualAttributes
    bint QueryWorkingSetEx(HANDLE process, void* asked, DWORD size)

cdef extern from "<io.h>" nogil:
    intptr_t _get_osfhandle(int descriptor)

cdef extern from "<stdlib.h>" nogil:
    ctypedef void (*_invalid_parameter_handler)(const wchar_t*, const wchar_t*, const wchar_t*, unsigned int,
                                                uintptr_t) noexcept nogil
    _invalid_parameter_handler _set_thread_local_invalid_parameter_handler(_invalid_parameter_handler handler)


include "common.pxi"

cdef size_t real_granularity
cdef bint can_watch = False             # reservations can be watched, and every write to them is seen
cdef size_t DISCARD_STEP = 1 << 20      # bytes that discard() has in physical memory at a time

cdef enum:
    ASKED_AT_ONCE = 256                 # pages in one call of QueryWorkingSetEx or GetWriteWatch


cdef int last_error() noexcept nogil:
    """The code of the call on the line before, which has failed. 0 means success to our callers, so a failed call
    without a reason gets one."""
    cdef DWORD code = GetLastError()
    return ERROR_GEN_FAILURE if code == 0 or code > 0x7fffffff else <int>code


cdef int os_reserve(char* unused, size_t size, details* more) noexcept nogil:
    # A part of a reservation cannot be given back. What a larger (overridden) host page needs for its alignment stays
    # inaccessible in front of the range or behind it, until release() frees all of it.
    cdef size_t extra = caps.granularity - real_granularity
    cdef void* p = NULL
    cdef int code
    count_reserved(size + extra)
    # The system keeps a bit for each watched page. If it has no memory for these bits, the range is not watched.
    if more.watched and can_watch:
        p = VirtualAlloc(NULL, size + extra, MEM_RESERVE | MEM_WRITE_WATCH, PAGE_NOACCESS)
    if p == NULL:
        p = VirtualAlloc(NULL, size + extra, MEM_RESERVE, PAGE_NOACCESS)
    if p == NULL:
        code = last_error()
        count_released(size + extra)
        return code
    more.base[0] = <char*>((<size_t>p + extra) & ~(caps.granularity - 1))
    return 0


cdef int os_commit(char* addr, size_t size) noexcept nogil:
    cdef int code
    if VirtualAlloc(addr, size, MEM_COMMIT, PAGE_READWRITE) != NULL:
        return 0
    # The documentation does not say that a commit which fails half way leaves the first half as it was.
    code = last_error()
    VirtualFree(addr, size, MEM_DECOMMIT)
    return code


cdef int os_decommit(char* addr, size_t size) noexcept nogil:
    if not VirtualFree(addr, size, MEM_DECOMMIT):
        return last_error()
    if can_watch:
        ResetWriteWatch(addr, size)     # a decommit does not do this; refused if the range is not watched
    return 0


cdef int os_discard(char* addr, size_t size) noexcept nogil:
    # Not decommit and commit: an access of another thread between the two would be a fault, and if the commit is
    # refused (another program took the charge meanwhile), pages with live views on them would be lost. MEM_RESET keeps
    # pages and charge. According to the documentation of MEM_RESET_UNDO, the bytes then stay or are replaced with
    # zeros. They are zeroed first, so they are zero in both cases. VirtualUnlock of pages that are not locked takes
    # them out of the working set, and returns ERROR_NOT_LOCKED. All this is done step by step, so that a large range is
    # never resident as a whole. If MEM_RESET is refused, the bytes from there on are unchanged or zero, and no page is
    # lost.
    cdef size_t offset = 0, step
    while offset < size:
        step = at_most(size - offset, DISCARD_STEP)
        memset(addr + offset, 0, step)
        if VirtualAlloc(addr + offset, step, MEM_RESET, PAGE_NOACCESS) == NULL:
            return last_error()
        VirtualUnlock(addr + offset, step)
        offset += step
    return 0


cdef int os_renew(char* addr, size_t size) noexcept nogil:
    # No other thread accesses the range, so the way that is closed to discard() is open here; it touches no page.
    if not VirtualFree(addr, size, MEM_DECOMMIT):
        return last_error()
    if can_watch:
        ResetWriteWatch(addr, size)     # before the commit, which makes this call dearer
    return 0 if VirtualAlloc(addr, size, MEM_COMMIT, PAGE_READWRITE) != NULL else last_error()


cdef int os_touched(char* addr, size_t size, details* more) noexcept nogil:
    # QueryWorkingSetEx does not know pages in the paging file, and no call tells which pages differ from an image.
    return written(addr, size, more) if more.what == TOUCHED and caps.scans else ERROR_NOT_SUPPORTED


cdef int written(char* addr, size_t size, details* more) noexcept nogil:
    """The pages that were written since they were reserved, or since ResetWriteWatch(). A listed page may be zero; a
    page that is not listed has never been anything else."""
    cdef void* listed[ASKED_AT_ONCE]
    cdef ULONG_PTR count = ASKED_AT_ONCE, i = 0
    cdef DWORD unit
    cdef size_t room = more.n[0]
    if GetWriteWatch(0, addr, size, listed, &count, &unit):
        return ERROR_NOT_SUPPORTED
    more.n[0] = 0
    while i < count and add_page(more.runs, more.n, room, <char*>listed[i]):
        i += 1
    if i < count:
        more.next[0] = <char*>listed[i]
    elif count < ASKED_AT_ONCE:
        more.next[0] = addr + size
    else:
        more.next[0] = <char*>listed[count - 1] + real_page
    return 0


cdef bint writes_are_seen() noexcept nogil:
    """Asks about three pages: the first is only read, the second is written by this thread, the third by the system (as
    in the WASI calls of a guest). If one of these writes were missed, a guest would find bytes of another guest."""
    cdef span runs[3]
    cdef size_t n = 3, page = real_page
    cdef char* next = NULL
    cdef details more
    cdef HANDLE out = NULL, into = NULL
    cdef DWORD moved = 0
    cdef bint seen = False
    cdef char* p = <char*>VirtualAlloc(NULL, 3 * page, MEM_RESERVE | MEM_COMMIT | MEM_WRITE_WATCH, PAGE_READWRITE)
    if p == NULL:
        return False
    more.runs, more.n, more.next = runs, &n, &next
    if CreatePipe(&out, &into, NULL, 0):
        (<volatile char*>p + page)[0] = (<volatile char*>p)[0] + 1
        seen = (WriteFile(into, b"x", 1, &moved, NULL) and ReadFile(out, p + 2 * page, 1, &moved, NULL) and moved == 1
                and written(p, 3 * page, &more) == 0
                and n == 1 and next == p + 3 * page and runs[0].size == 2 * page and runs[0].addr == p + page)
        CloseHandle(out)
        CloseHandle(into)
    if seen:        # and ResetWriteWatch() must make the system forget them
        n = 3
        seen = (VirtualFree(p, 3 * page, MEM_DECOMMIT) and ResetWriteWatch(p, 3 * page) == 0
                and VirtualAlloc(p, 3 * page, MEM_COMMIT, PAGE_READWRITE) == p
                and written(p, 3 * page, &more) == 0 and n == 0)
    VirtualFree(p, 0, MEM_RELEASE)
    return seen


cdef int os_advise_huge(char* addr, size_t size) noexcept nogil:
    return ERROR_NOT_SUPPORTED


cdef int set_protection(char* addr, size_t size, DWORD protection) noexcept nogil:
    cdef DWORD before
    return 0 if VirtualProtect(addr, size, protection, &before) else last_error()


cdef int os_protect(char* addr, size_t size, details* more) noexcept nogil:
    cdef DWORD protection = PAGE_NOACCESS
    cdef int code
    if more.access == ACCESS_READ:
        protection = PAGE_READONLY
    elif more.access == ACCESS_READ_WRITE:
        protection = PAGE_READWRITE
    elif more.access == ACCESS_READ_EXECUTE:
        protection = PAGE_EXECUTE_READ
    code = set_protection(addr, size, protection)
    if code == 0 and more.access == ACCESS_READ_EXECUTE:
        FlushInstructionCache(GetCurrentProcess(), addr, size)
    return code


cdef int os_prefault(char* addr, size_t size) noexcept nogil:
    # PrefetchVirtualMemory reads from files; it does not make fresh pages resident.
    return touch_pages(addr, size)


cdef int os_move(char* addr, size_t size, details* more) noexcept nogil:
    return ERROR_NOT_SUPPORTED


cdef int os_resident(char* addr, size_t size, details* more) noexcept nogil:
    cdef PSAPI_WORKING_SET_EX_INFORMATION asked[ASKED_AT_ONCE]
    cdef size_t left = size // real_page, pages = 0, n, i
    while left:
        n = at_most(left, sizeof(asked) // sizeof(asked[0]))
        for i in range(n):
            asked[i].VirtualAddress = addr + size - (left - i) * real_page
        if not QueryWorkingSetEx(GetCurrentProcess(), asked, <DWORD>(n * sizeof(asked[0]))):
            return last_error()
        for i in range(n):
            pages += asked[i].VirtualAttributes.Flags & 1
        left -= n
    more.bytes[0] = pages * real_page
    return 0


cdef int os_release(char* addr, size_t size) noexcept nogil:
    # MEM_RELEASE takes the base of the reservation that `addr` lies in, and no other address.
    cdef MEMORY_BASIC_INFORMATION about
    if VirtualQuery(addr, &about, sizeof(about)) == 0:
        return last_error()
    if about.State == MEM_FREE:
        return ERROR_INVALID_ADDRESS
    if not VirtualFree(about.AllocationBase, 0, MEM_RELEASE):
        return last_error()
    count_released(size + caps.granularity - real_granularity)
    return 0


# -- images: section objects, from which memories copy -------------------------------------------
#
# Inside a reservation, a view of a section needs a placeholder. Some versions of Windows have none, and a placeholder
# would make two allocations of one memory.

cdef int os_image_begin(image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil:
    cdef HANDLE section = NULL
    cdef int code
    if image_kind == IMAGE_SECTION:
        section = CreateFileMappingW(INVALID_HANDLE_VALUE, NULL, PAGE_READWRITE, <DWORD>(size >> 32), <DWORD>size, NULL)
        if section == NULL:
            return last_error()
    count_reserved(size)
    if section != NULL:
        img.bytes = <char*>MapViewOfFile(section, FILE_MAP_WRITE, 0, 0, size)
    else:
        img.bytes = <char*>VirtualAlloc(NULL, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE)
    if img.bytes == NULL:
        code = last_error()
        count_released(size)
        if section != NULL:
            CloseHandle(section)
        return code
    img.kind = image_kind
    if section != NULL:
        img.handle = <long long>section
    return 0


cdef int os_image_write(image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil:
    memcpy(img.bytes + offset, bytes, size)
    return 0


cdef int os_image_end(image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil:
    cdef HANDLE reader = NULL
    cdef int code
    if img.kind == IMAGE_PRIVATE:
        return set_protection(img.bytes, size, PAGE_READONLY)
    # The pages stay where they are. The only handle on them that is left cannot write.
    if not DuplicateHandle(GetCurrentProcess(), <HANDLE>img.handle, GetCurrentProcess(), &reader, FILE_MAP_READ, False,
                           0):
        return last_error()
    code = set_protection(img.bytes, size, PAGE_READONLY)
    if code:
        CloseHandle(reader)
        return code
    CloseHandle(<HANDLE>img.handle)
    img.handle = <long long>reader
    return 0


cdef void ignore_parameter(const wchar_t* expression, const wchar_t* function, const wchar_t* file, unsigned int line,
                           uintptr_t reserved) noexcept nogil:
    pass


cdef int file_of(int descriptor, HANDLE* file, long long* size) noexcept nogil:
    """The handle and the size of the file behind a descriptor of the C library."""
    cdef LARGE_INTEGER length
    # The C library calls a handler for a number that is not a descriptor. The default handler ends the process.
    cdef _invalid_parameter_handler before = _set_thread_local_invalid_parameter_handler(ignore_parameter)
    file[0] = <HANDLE>_get_osfhandle(descriptor)
    _set_thread_local_invalid_parameter_handler(before)
    if file[0] == INVALID_HANDLE_VALUE:
        return ERROR_INVALID_HANDLE
    if GetFileType(file[0]) != FILE_TYPE_DISK:
        return ERROR_NOT_SUPPORTED
    if not GetFileSizeEx(file[0], &length):
        return last_error()
    size[0] = length.QuadPart
    return 0


cdef int os_image_open(image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil:
    cdef HANDLE file = NULL, section
    cdef void* p
    cdef long long length = 0, start
    cdef size_t lead = <size_t>img.position & (real_granularity - 1)
    cdef int code = file_of(<int>img.handle, &file, &length)
    if code:
        return code
    if img.position > length or size > <size_t>(length - img.position):
        return IMAGE_SHORT
    section = CreateFileMappingW(file, NULL, PAGE_READONLY, 0, 0, NULL)
    if section == NULL:
        return last_error()
    start = img.position - <long long>lead
    count_reserved(lead + size)
    p = MapViewOfFile(section, FILE_MAP_READ, <DWORD>(start >> 32), <DWORD>start, lead + size)
    if p == NULL:
        code = last_error()
        count_released(lead + size)
        CloseHandle(section)
        return code
    img.kind = IMAGE_FILE
    img.handle = <long long>section
    img.bytes = <char*>p + lead
    img.size = size
    return 0


cdef void image_drop(image_pages* img) noexcept nogil:
    cdef size_t lead = <size_t>img.position & (real_granularity - 1)
    if img.bytes != NULL:
        if img.kind == IMAGE_PRIVATE:
            VirtualFree(img.bytes, 0, MEM_RELEASE)
        else:       # a view begins at a multiple of the granularity, as position 0 does
            UnmapViewOfFile(img.bytes - lead)
        count_released(lead + img.size)
    if img.handle != -1:
        CloseHandle(<HANDLE>img.handle)


cdef int os_image_map(image_pages* img, size_t offset, char* addr, size_t size) noexcept nogil:
    return ERROR_NOT_SUPPORTED


cdef int os_image_renew(image_pages* img, size_t offset, char* addr, size_t size) noexcept nogil:
    return ERROR_NOT_SUPPORTED


cdef int os_blank(char* addr, size_t size) noexcept nogil:
    return ERROR_NOT_SUPPORTED


# -- limits, clocks ------------------------------------------------------------------------------

cdef MEMORYSTATUSEX memory_status() noexcept nogil:
    """The memory and the commit limit of this process or of the machine, whichever is smaller; zeros where unknown."""
    cdef MEMORYSTATUSEX status
    memset(&status, 0, sizeof(status))
    status.dwLength = sizeof(status)
    GlobalMemoryStatusEx(&status)
    return status


cdef void address_space(size_t* total, size_t* left) noexcept nogil:
    # Windows has no limit on addresses: a job object limits committed memory.
    total[0] = left[0] = <size_t>1 << caps.address_bits


cdef const char* code_text(int code) noexcept nogil:
    if code == ERROR_COMMITMENT_LIMIT:
        return "the commit limit is reached; a larger paging file raises it (ERROR_COMMITMENT_LIMIT)"
    if code == ERROR_NOT_ENOUGH_MEMORY:
        return "the operating system has no memory or address space for it (ERROR_NOT_ENOUGH_MEMORY)"
    if code == ERROR_OUTOFMEMORY:
        return "the operating system has no memory for it (ERROR_OUTOFMEMORY)"
    if code == ERROR_NO_SYSTEM_RESOURCES:
        return "the operating system has no resources for it (ERROR_NO_SYSTEM_RESOURCES)"
    if code == ERROR_NOT_ENOUGH_QUOTA:
        return "the quota of this process is used up (ERROR_NOT_ENOUGH_QUOTA)"
    if code == ERROR_WORKING_SET_QUOTA:
        return "the working set of this process is too small (ERROR_WORKING_SET_QUOTA)"
    if code == ERROR_ACCESS_DENIED:
        return "access denied (ERROR_ACCESS_DENIED)"
    if code == ERROR_INVALID_PARAMETER:
        return "invalid parameter (ERROR_INVALID_PARAMETER)"
    if code == ERROR_INVALID_ADDRESS:
        return "not an address of this reservation (ERROR_INVALID_ADDRESS)"
    if code == ERROR_NOACCESS:
        return "a page in the range cannot be accessed (ERROR_NOACCESS)"
    if code == ERROR_NOT_SUPPORTED:
        return "not supported by this operating system (ERROR_NOT_SUPPORTED)"
    return "refused by the operating system"


cdef void limit_text(int code, size_t size, char* text, size_t room) noexcept nogil:
    cdef MEMORYSTATUSEX status
    text[0] = 0
    if size >> caps.address_bits:
        snprintf(text, room, "user addresses have %d bits", caps.address_bits)
        return
    if code != ERROR_COMMITMENT_LIMIT and code != ERROR_NOT_ENOUGH_MEMORY and code != ERROR_OUTOFMEMORY:
        return
    status = memory_status()
    if status.ullTotalPageFile and (code == ERROR_COMMITMENT_LIMIT or size > status.ullAvailPageFile):
        snprintf(text, room, "the commit limit is %llu bytes and %llu are left", status.ullTotalPageFile,
                 status.ullAvailPageFile)


cdef int at_fork(void (*before)() noexcept nogil, void (*in_parent)() noexcept nogil,
                 void (*in_child)() noexcept nogil) noexcept nogil:
    return 0


cdef void yield_processor() noexcept nogil:
    SwitchToThread()


cdef void sleep_ns(long long ns) noexcept nogil:
    Sleep(1 if ns < 1000000 else <DWORD>(ns // 1000000))


cdef long long clock_ns() noexcept nogil:
    cdef LARGE_INTEGER now, rate
    QueryPerformanceCounter(&now)           # since Windows XP, these two never fail
    QueryPerformanceFrequency(&rate)
    return (now.QuadPart // rate.QuadPart * 1000000000
            + now.QuadPart % rate.QuadPart * 1000000000 // rate.QuadPart)


cdef long long coarse_ns() noexcept nogil:
    return clock_ns()


# -- what Python sees ------------------------------------------------------------------------

def os_error_args(int code, text):
    """The arguments that make an OSError carry `code` the way this OS does (winerror here)."""
    # OSError knows the errno of most codes, but not those of the commit limit and of some quotas.
    no_memory = code in (ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY, ERROR_COMMITMENT_LIMIT, ERROR_NO_SYSTEM_RESOURCES,
                         ERROR_NOT_ENOUGH_QUOTA, ERROR_WORKING_SET_QUOTA)
    return _errno.ENOMEM if no_memory else 0, text, None, code


def choose_scan(way):
    """How touched() finds pages from now on: "watch" or None; returns how it did. Tests only."""
    before = "watch" if caps.scans else None
    if way is not None and not (way == "watch" and can_watch):
        raise ValueError(f"way must be one that works here, got {way!r}")
    caps.scans = way is not None
    return before


def choose_image(kind):
    """What image_begin() makes from now on: "section" or "private"; returns what it did. Tests only."""
    global image_kind
    before = IMAGE_KINDS[image_kind]
    kinds = {"section": IMAGE_SECTION, "private": IMAGE_PRIVATE}
    if kind not in kinds:
        raise ValueError(f"kind must be one that works here, got {kind!r}")
    image_kind = kinds[kind]
    return before


def die_quietly():
    """From now on a memory fault ends this process at once: no dialog, no error report, no debugger."""
    SetErrorMode(GetErrorMode() | SEM_FAILCRITICALERRORS | SEM_NOGPFAULTERRORBOX)
    SetUnhandledExceptionFilter(end_the_process)


cdef long end_the_process(EXCEPTION_POINTERS* about) noexcept nogil:
    return EXCEPTION_EXECUTE_HANDLER


def _limits():
    cdef unsigned long long total = memory_status().ullTotalPageFile
    return {"commit limit": total} if total else {}


cdef _start():
    global real_page, real_granularity, image_kind, can_watch
    cdef SYSTEM_INFO info
    GetSystemInfo(&info)
    real_page = info.dwPageSize
    real_granularity = info.dwAllocationGranularity
    caps.page_size = _page_size_wanted(real_page)
    caps.granularity = max(real_granularity, caps.page_size)
    caps.address_bits = bits_of(<size_t>info.lpMaximumApplicationAddress)
    can_watch = writes_are_seen()
    caps.scans = can_watch
    caps.memory = memory_status().ullTotalPhys
    image_kind = IMAGE_SECTION


_start()
