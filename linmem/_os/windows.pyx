# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
"""The page floor on Windows: VirtualAlloc, VirtualProtect, VirtualFree and related calls."""

from linmem._os cimport pages as _contract    # no-cython-lint: not used; makes an edit of pages.pxd rebuild this file
from linmem._core.units cimport add_up, round_up
from linmem._core.atomic cimport (
    add, atomic_i64, compare_exchange, load, load_address, load_size, store_address, store_size, touch,
)

from cpython.mem cimport PyMem_Free
from libc.stddef cimport wchar_t
from libc.stdint cimport intptr_t, uintptr_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy

import errno as _errno

# This header includes <windows.h>, which must not be included twice with different macros.
cdef extern from "linmem/_os/compat.h" nogil:
    pass

cdef extern from "<windows.h>" nogil:
    ctypedef void* HANDLE
    ctypedef unsigned long DWORD
    ctypedef size_t ULONG_PTR
    ctypedef union LARGE_INTEGER:
        long long QuadPart
    ctypedef struct FILETIME:
        DWORD dwLowDateTime, dwHighDateTime
    ctypedef struct MEMORY_BASIC_INFORMATION:
        void* BaseAddress
        void* AllocationBase
        size_t RegionSize
        DWORD State, Protect, Type
    ctypedef struct MEMORYSTATUSEX:
        DWORD dwLength
        unsigned long long ullTotalPhys, ullTotalPageFile, ullAvailPageFile
    ctypedef struct SYSTEM_INFO:
        DWORD dwPageSize, dwAllocationGranularity
        void* lpMaximumApplicationAddress
    ctypedef struct EXCEPTION_RECORD:
        DWORD ExceptionCode
        void* ExceptionAddress
        DWORD NumberParameters
        ULONG_PTR* ExceptionInformation
    ctypedef struct EXCEPTION_POINTERS:
        EXCEPTION_RECORD* ExceptionRecord
    ctypedef struct WIN32_MEMORY_RANGE_ENTRY:
        void* VirtualAddress
        size_t NumberOfBytes

    DWORD MEM_RESERVE, MEM_COMMIT, MEM_DECOMMIT, MEM_RELEASE, MEM_RESET, MEM_WRITE_WATCH, MEM_FREE
    DWORD MEM_MAPPED, SEC_RESERVE, SEC_FILE, SEC_IMAGE, SECTION_QUERY
    DWORD DUPLICATE_SAME_ACCESS, CP_UTF8, MB_ERR_INVALID_CHARS
    DWORD PAGE_NOACCESS, PAGE_READONLY, PAGE_READWRITE, PAGE_EXECUTE_READ
    DWORD FILE_MAP_READ, FILE_MAP_WRITE, FILE_TYPE_DISK
    DWORD SEM_FAILCRITICALERRORS, SEM_NOGPFAULTERRORBOX
    HANDLE INVALID_HANDLE_VALUE
    DWORD EXCEPTION_ACCESS_VIOLATION, EXCEPTION_IN_PAGE_ERROR, STD_ERROR_HANDLE
    int EXCEPTION_EXECUTE_HANDLER, EXCEPTION_CONTINUE_SEARCH
    int ERROR_ACCESS_DENIED, ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY, ERROR_GEN_FAILURE, ERROR_NOT_SUPPORTED
    int ERROR_INVALID_PARAMETER, ERROR_INVALID_ADDRESS, ERROR_NOACCESS, ERROR_NO_SYSTEM_RESOURCES
    int ERROR_WORKING_SET_QUOTA, ERROR_COMMITMENT_LIMIT, ERROR_NOT_ENOUGH_QUOTA, ERROR_INVALID_HANDLE
    int ERROR_ALREADY_EXISTS, ERROR_DISK_FULL

    DWORD GetLastError()
    void SetLastError(DWORD code)
    void* VirtualAlloc(void* addr, size_t size, DWORD allocation_type, DWORD protect)
    bint VirtualFree(void* addr, size_t size, DWORD free_type)
    bint VirtualProtect(void* addr, size_t size, DWORD new_protect, DWORD* old_protect)
    size_t VirtualQuery(const void* addr, MEMORY_BASIC_INFORMATION* buffer, size_t length)
    bint VirtualUnlock(void* addr, size_t size)
    bint PrefetchVirtualMemory(HANDLE process, ULONG_PTR count, WIN32_MEMORY_RANGE_ENTRY* ranges, DWORD flags)
    unsigned int GetWriteWatch(DWORD flags, void* addr, size_t size, void** addresses, ULONG_PTR* count,
                               DWORD* granularity)
    unsigned int ResetWriteWatch(void* addr, size_t size)
    bint FlushInstructionCache(HANDLE process, const void* addr, size_t size)
    HANDLE GetCurrentProcess()
    bint ReadProcessMemory(HANDLE process, const void* addr, void* buffer, size_t size, size_t* done)
    void GetSystemInfo(SYSTEM_INFO* info)
    bint GlobalMemoryStatusEx(MEMORYSTATUSEX* status)
    HANDLE CreateFileMappingW(HANDLE file, void* attributes, DWORD protect, DWORD maximum_size_high,
                              DWORD maximum_size_low, const wchar_t* name)
    HANDLE OpenFileMappingW(DWORD access, bint inherit, const wchar_t* name)
    HANDLE CreateMutexW(void* attributes, bint owned, const wchar_t* name)
    void* MapViewOfFile(HANDLE section, DWORD access, DWORD offset_high, DWORD offset_low, size_t size)
    void* MapViewOfFileEx(HANDLE section, DWORD access, DWORD offset_high, DWORD offset_low, size_t size, void* addr)
    bint UnmapViewOfFile(const void* addr)
    bint CloseHandle(HANDLE handle)
    bint DuplicateHandle(HANDLE process, HANDLE handle, HANDLE target_process, HANDLE* target_handle, DWORD access,
                         bint inherit, DWORD options)
    HANDLE GetModuleHandleA(const char* name)
    void* GetProcAddress(HANDLE module, const char* name)
    int MultiByteToWideChar(unsigned int code_page, DWORD flags, const char* text, int size, wchar_t* out, int room)
    DWORD GetFileType(HANDLE file)
    bint GetFileSizeEx(HANDLE file, LARGE_INTEGER* size)
    bint CreatePipe(HANDLE* read_pipe, HANDLE* write_pipe, void* attributes, DWORD size)
    bint ReadFile(HANDLE file, void* buffer, DWORD size, DWORD* bytes_read, void* overlapped)
    bint WriteFile(HANDLE file, const void* buffer, DWORD size, DWORD* bytes_written, void* overlapped)
    void GetSystemTimeAsFileTime(FILETIME* now)
    bint QueryPerformanceCounter(LARGE_INTEGER* ticks)
    bint QueryPerformanceFrequency(LARGE_INTEGER* ticks)
    bint SwitchToThread()
    void Sleep(DWORD milliseconds)
    unsigned int GetErrorMode()
    unsigned int SetErrorMode(unsigned int mode)
    DWORD GetCurrentThreadId()
    HANDLE GetStdHandle(DWORD which)
    void* SetUnhandledExceptionFilter(long (*filter)(EXCEPTION_POINTERS*) noexcept nogil)
    void* AddVectoredExceptionHandler(unsigned long first, long (*handler)(EXCEPTION_POINTERS*) noexcept nogil)
    unsigned long RemoveVectoredExceptionHandler(void* handle)

cdef extern from "<psapi.h>" nogil:
    ctypedef struct PSAPI_WORKING_SET_EX_BLOCK:
        ULONG_PTR Flags
    ctypedef struct PSAPI_WORKING_SET_EX_INFORMATION:
        void* VirtualAddress
        PSAPI_WORKING_SET_EX_BLOCK VirtualAttributes
    bint QueryWorkingSetEx(HANDLE process, void* asked, DWORD size)

cdef extern from "Python.h":
    wchar_t* PyUnicode_AsWideCharString(object text, Py_ssize_t* size) except NULL
    object PyUnicode_FromWideChar(const wchar_t* text, Py_ssize_t size)
    object PyErr_SetFromWindowsErr(int code)      # always raises

cdef extern from "<io.h>" nogil:
    intptr_t _get_osfhandle(int descriptor)

cdef extern from "<stdlib.h>" nogil:
    ctypedef void (*_invalid_parameter_handler)(const wchar_t*, const wchar_t*, const wchar_t*, unsigned int,
                                                uintptr_t) noexcept nogil
    _invalid_parameter_handler _set_thread_local_invalid_parameter_handler(_invalid_parameter_handler handler)


include "common.pxi"

IMAGE_KINDS = {IMAGE_FILE: "file", IMAGE_SECTION: "section", IMAGE_PRIVATE: "private"}

cdef tuple SCAN_WAYS = (None, "watch")  # "watch": reservations can be watched, and every write to them is seen
cdef size_t real_granularity
cdef atomic_i64 views               # views of sections that hold pages of memories
cdef size_t DISCARD_STEP = 1 << 20      # bytes that discard() has in physical memory at a time

cdef enum:
    ASKED_AT_ONCE = 256                 # pages in one call of QueryWorkingSetEx or GetWriteWatch

# By ACCESS_ constant.
cdef DWORD[4] PROTECTIONS = [PAGE_NOACCESS, PAGE_READONLY, PAGE_READWRITE, PAGE_EXECUTE_READ]

cdef coded_text[12] CODE_TEXTS = [
    [ERROR_COMMITMENT_LIMIT, "the commit limit is reached; a larger paging file raises it (ERROR_COMMITMENT_LIMIT)"],
    [ERROR_NOT_ENOUGH_MEMORY,
     "the operating system has no memory or address space for it (ERROR_NOT_ENOUGH_MEMORY)"],
    [ERROR_OUTOFMEMORY, "the operating system has no memory for it (ERROR_OUTOFMEMORY)"],
    [ERROR_NO_SYSTEM_RESOURCES, "the operating system has no resources for it (ERROR_NO_SYSTEM_RESOURCES)"],
    [ERROR_NOT_ENOUGH_QUOTA, "the quota of this process is used up (ERROR_NOT_ENOUGH_QUOTA)"],
    [ERROR_WORKING_SET_QUOTA, "the working set of this process is too small (ERROR_WORKING_SET_QUOTA)"],
    [ERROR_ACCESS_DENIED, "access denied (ERROR_ACCESS_DENIED)"],
    [ERROR_INVALID_PARAMETER, "invalid parameter (ERROR_INVALID_PARAMETER)"],
    [ERROR_INVALID_ADDRESS, "not an address of this reservation (ERROR_INVALID_ADDRESS)"],
    [ERROR_NOACCESS, "a page in the range cannot be accessed (ERROR_NOACCESS)"],
    [ERROR_DISK_FULL, "the section has no more pages (ERROR_DISK_FULL)"],
    [ERROR_NOT_SUPPORTED, "not supported by this operating system (ERROR_NOT_SUPPORTED)"],
]


cdef int last_error() noexcept nogil:
    """The code of the call on the line before, which has failed. To our callers 0 means success, so a failure without a
    code gets one."""
    cdef DWORD code = GetLastError()
    return ERROR_GEN_FAILURE if code == 0 or code > 0x7fffffff else <int>code


cdef int allocate(size_t size, DWORD allocation_type, DWORD protect, char** addr) noexcept nogil:
    """VirtualAlloc() at an address that the system chooses; counts the bytes."""
    cdef int code
    count_reserved(size)
    addr[0] = <char*>VirtualAlloc(NULL, size, allocation_type, protect)
    if addr[0] != NULL:
        return 0
    code = last_error()
    count_released(size)
    return code


cdef int os_reserve(char* unused, size_t size, details* more) noexcept nogil:
    # Windows cannot free a part of a reservation. For a larger host page, which LINMEM_PAGE_SIZE asks for, this
    # function reserves a longer range. Its ends stay inaccessible until release() frees the whole reservation.
    cdef size_t extra = caps.granularity - real_granularity
    cdef char* p = NULL
    cdef int code = 0
    # The system needs a bit for each watched page. If it has no memory for these bits, the range is not watched.
    if more.watched and best_scan_way:
        allocate(size + extra, MEM_RESERVE | MEM_WRITE_WATCH, PAGE_NOACCESS, &p)
    if p == NULL:
        code = allocate(size + extra, MEM_RESERVE, PAGE_NOACCESS, &p)
    if code == 0:
        more.base[0] = <char*>((<size_t>p + extra) & ~(caps.granularity - 1))
    return code


cdef int os_commit(char* addr, size_t size) noexcept nogil:
    cdef int code
    cdef DWORD before
    if VirtualAlloc(addr, size, MEM_COMMIT, PAGE_READWRITE) != NULL:
        # The documentation does not promise that a page of a section which is committed already, but hidden, is
        # accessible now.
        if load(&views) and is_view(addr) and not VirtualProtect(addr, size, PAGE_READWRITE, &before):
            return last_error()
        return 0
    # The documentation does not promise that a refused commit has committed no page.
    code = last_error()
    VirtualFree(addr, size, MEM_DECOMMIT)
    return code


cdef int os_decommit(char* addr, size_t size) noexcept nogil:
    if not VirtualFree(addr, size, MEM_DECOMMIT):
        return last_error()
    if best_scan_way:
        ResetWriteWatch(addr, size)     # a decommit does not do this; refused if the range is not watched
    return 0


cdef int os_discard(char* addr, size_t size) noexcept nogil:
    # A decommit and a commit instead would be wrong for two reasons. Another thread's access between the two calls
    # would be a fault. If the OS refused the commit (another program took the charge meanwhile), pages with live views
    # would be lost. MEM_RESET keeps pages and charge. According to the documentation of MEM_RESET_UNDO, the bytes
    # remain or become zeros. This function zeroes the bytes first, so they are zero in both cases. VirtualUnlock of
    # pages that are not locked removes them from the working set, and returns ERROR_NOT_LOCKED. The loop goes in steps,
    # so that a large range is never resident as a whole. If the OS refuses MEM_RESET, the rest is unchanged or zero,
    # and no page is lost.
    cdef size_t offset = 0, step
    while offset < size:
        step = min(size - offset, DISCARD_STEP)
        memset(addr + offset, 0, step)
        if VirtualAlloc(addr + offset, step, MEM_RESET, PAGE_NOACCESS) == NULL:
            return last_error()
        VirtualUnlock(addr + offset, step)
        offset += step
    return 0


cdef int os_renew(char* addr, size_t size) noexcept nogil:
    # Unlike discard(), renew() may make the range inaccessible for a moment, because no other thread accesses it. A
    # decommit and a commit touch no page.
    return os_decommit(addr, size) or os_commit(addr, size)


cdef int os_touched(char* addr, size_t size, details* more) noexcept nogil:
    # QueryWorkingSetEx does not report pages in the paging file, and no call reports which pages differ from an image.
    return written(addr, size, more) if more.what == TOUCHED and scan_way else ERROR_NOT_SUPPORTED


cdef int written(char* addr, size_t size, details* more) noexcept nogil:
    """The pages that were written since they were reserved, or since ResetWriteWatch(). A listed page may be zero; each
    other page is zero."""
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
    """Tries the write watch on three pages: this thread only reads the first and writes the second; the system writes
    the third, as in the WASI calls of a guest. If the watch missed such a write, a guest would find bytes of another
    guest."""
    cdef size_t page = real_page
    cdef HANDLE out = NULL, into = NULL
    cdef DWORD moved = 0
    cdef bint seen = False
    cdef char* p = <char*>VirtualAlloc(NULL, 3 * page, MEM_RESERVE | MEM_COMMIT | MEM_WRITE_WATCH, PAGE_READWRITE)
    if p == NULL:
        return False
    if CreatePipe(&out, &into, NULL, 0):
        (<volatile char*>p + page)[0] = (<volatile char*>p)[0] + 1
        seen = (WriteFile(into, b"x", 1, &moved, NULL) and ReadFile(out, p + 2 * page, 1, &moved, NULL) and moved == 1
                and finds(p, 2))
        CloseHandle(out)
        CloseHandle(into)
    seen = seen and os_renew(p, 3 * page) == 0 and finds(p, 0)      # os_renew() resets the watch
    VirtualFree(p, 0, MEM_RELEASE)
    return seen


cdef int os_advise_huge(char* addr, size_t size) noexcept nogil:
    return ERROR_NOT_SUPPORTED


cdef int os_protect(char* addr, size_t size, details* more) noexcept nogil:
    cdef DWORD before
    if not VirtualProtect(addr, size, PROTECTIONS[more.access], &before):
        return last_error()
    if more.access == ACCESS_READ_EXECUTE:
        FlushInstructionCache(GetCurrentProcess(), addr, size)
    return 0


cdef int os_prefault(char* addr, size_t size) noexcept nogil:
    # PrefetchVirtualMemory reads pages from files, and does not make fresh pages resident.
    return touch_pages(addr, size)


cdef int os_move(char* addr, size_t size, details* more) noexcept nogil:
    return ERROR_NOT_SUPPORTED


cdef int os_resident(char* addr, size_t size, details* more) noexcept nogil:
    cdef PSAPI_WORKING_SET_EX_INFORMATION asked[ASKED_AT_ONCE]
    cdef size_t left = size // real_page, pages = 0, n, i
    while left:
        n = min(left, sizeof(asked) // sizeof(asked[0]))
        for i in range(n):
            asked[i].VirtualAddress = addr + size - (left - i) * real_page
        if not QueryWorkingSetEx(GetCurrentProcess(), asked, <DWORD>(n * sizeof(asked[0]))):
            return last_error()
        for i in range(n):
            pages += asked[i].VirtualAttributes.Flags & 1
        left -= n
    more.bytes[0] = pages * real_page
    return 0


cdef bint is_free(char* addr) noexcept nogil:
    cdef MEMORY_BASIC_INFORMATION about
    return VirtualQuery(addr, &about, sizeof(about)) != 0 and about.State == MEM_FREE


cdef inline bint is_view(char* addr) noexcept nogil:
    cdef MEMORY_BASIC_INFORMATION about
    return VirtualQuery(addr, &about, sizeof(about)) != 0 and about.Type == MEM_MAPPED


cdef int os_release(char* addr, size_t size) noexcept nogil:
    cdef size_t extra = caps.granularity - real_granularity
    cdef int code
    if load(&views):
        code = release_parts(addr, addr + size)
    else:
        code = release_allocation(addr)
    if code == 0:
        count_released(size + extra)
    return code


cdef int release_allocation(char* addr) noexcept nogil:
    """Releases the whole allocation, or the whole view, in which `addr` lies."""
    cdef MEMORY_BASIC_INFORMATION about
    if VirtualQuery(addr, &about, sizeof(about)) == 0:
        return last_error()
    if about.State == MEM_FREE:
        return ERROR_INVALID_ADDRESS
    # These two accept only the base.
    if about.Type == MEM_MAPPED:
        if not UnmapViewOfFile(about.AllocationBase):
            return last_error()
        add(&views, -1)
    elif not VirtualFree(about.AllocationBase, 0, MEM_RELEASE):
        return last_error()
    return 0


cdef int release_parts(char* addr, char* end) noexcept nogil:
    """A reservation with a view in it: os_file_place() has made it of up to three allocations."""
    cdef MEMORY_BASIC_INFORMATION about
    cdef void* part
    cdef char* first = addr
    cdef char* next = NULL
    cdef int code
    while addr < end:
        # The end of the allocation, which is several regions if a part of it is committed. It belongs to linmem, so no
        # other thread changes it meanwhile.
        if VirtualQuery(addr, &about, sizeof(about)) == 0:
            return last_error()
        part, next = about.AllocationBase, addr
        while VirtualQuery(next, &about, sizeof(about)) and about.State != MEM_FREE and about.AllocationBase == part:
            next = <char*>about.BaseAddress + about.RegionSize
        code = release_allocation(addr)
        if code:
            # A failure after the first allocation is a fault of linmem or of the system. The rest then stays reserved,
            # and the result is 0: after an error the caller would release the first allocation a second time.
            return code if addr == first else 0
        addr = next
    return 0


# -- images: section objects, from which memories copy -------------------------------------------
#
# Memories copy the bytes and do not map the section. A view of a section inside a reservation needs a placeholder. Some
# versions of Windows do not have placeholders, and a memory with a placeholder would be two allocations.

cdef int os_image_begin(image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil:
    cdef HANDLE section
    img.kind = image_kind
    if img.kind == IMAGE_PRIVATE:
        return allocate(size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE, &img.bytes)
    section = CreateFileMappingW(INVALID_HANDLE_VALUE, NULL, PAGE_READWRITE, <DWORD>(size >> 32), <DWORD>size, NULL)
    return map_section(img, section, FILE_MAP_WRITE) if section != NULL else last_error()


cdef inline size_t lead_of(image_pages* img) noexcept nogil:
    """The bytes between the beginning of the view, which is a multiple of the granularity, and the image."""
    return <size_t>img.position & (real_granularity - 1)


cdef int map_section(image_pages* img, HANDLE section, DWORD access) noexcept nogil:
    """-> `section` is the image's handle, and img.bytes are a view of it; or `section` is closed."""
    cdef size_t lead = lead_of(img)
    cdef long long start = img.position - <long long>lead
    cdef void* p
    cdef int code
    count_reserved(lead + img.size)
    p = MapViewOfFile(section, access, <DWORD>(start >> 32), <DWORD>start, lead + img.size)
    if p == NULL:
        code = last_error()
        count_released(lead + img.size)
        CloseHandle(section)
        return code
    img.handle, img.bytes = <long long>section, <char*>p + lead
    return 0


cdef int os_image_write(image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil:
    memcpy(img.bytes + offset, bytes, size)
    return 0


cdef int os_image_end(image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil:
    cdef HANDLE process = GetCurrentProcess(), reader = NULL
    cdef DWORD before
    # The pages stay at their address. The only handle that remains cannot write to them.
    if img.kind == IMAGE_SECTION:
        if not DuplicateHandle(process, <HANDLE>img.handle, process, &reader, FILE_MAP_READ, False, 0):
            return last_error()
        CloseHandle(<HANDLE>img.handle)
        img.handle = <long long>reader
    return 0 if VirtualProtect(img.bytes, size, PAGE_READONLY, &before) else last_error()


cdef void ignore_parameter(const wchar_t* expression, const wchar_t* function, const wchar_t* file, unsigned int line,
                           uintptr_t reserved) noexcept nogil:
    pass


cdef int file_of(int descriptor, HANDLE* file, long long* size) noexcept nogil:
    """-> the handle and the size of the file that a descriptor of the C library stands for."""
    cdef LARGE_INTEGER length
    # If the number is not a descriptor, the C library calls a handler. The default handler ends the process.
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
    cdef long long length = 0
    cdef int code = file_of(<int>img.handle, &file, &length)
    if code:
        return code
    if img.position > length or size > <size_t>(length - img.position):
        return IMAGE_SHORT
    img.kind = IMAGE_FILE
    section = CreateFileMappingW(file, NULL, PAGE_READONLY, 0, 0, NULL)
    return map_section(img, section, FILE_MAP_READ) if section != NULL else last_error()


cdef void image_drop(image_pages* img) noexcept nogil:
    cdef size_t lead = lead_of(img)
    if img.kind == IMAGE_PRIVATE:
        VirtualFree(img.bytes, 0, MEM_RELEASE)
    else:
        UnmapViewOfFile(img.bytes - lead)
    count_released(lead + img.size)
    if img.handle != -1:
        CloseHandle(<HANDLE>img.handle)


cdef int os_image_map(image_pages* img, size_t offset, char* addr, size_t size) noexcept nogil:
    return ERROR_NOT_SUPPORTED


cdef int os_image_renew(image_pages* img, size_t offset, char* addr, size_t size) noexcept nogil:
    return ERROR_NOT_SUPPORTED


cdef int os_image_fetch(char* addr, size_t size) noexcept nogil:
    cdef WIN32_MEMORY_RANGE_ENTRY range_
    range_.VirtualAddress, range_.NumberOfBytes = addr, size
    return 0 if PrefetchVirtualMemory(GetCurrentProcess(), 1, &range_, 0) else last_error()


cdef int os_blank(char* addr, size_t size) noexcept nogil:
    return ERROR_NOT_SUPPORTED


include "section_pages.pxi"

# -- faults: a vectored exception handler, the last in the list -----------------------------------
#
# wasmtime, faulthandler and most others put their handlers at the front. If wasmtime turns a fault into a trap, the
# system does not call the rest of the list. After the list come the handlers of the frames, the filter of unhandled
# exceptions, and the error report of Windows. A handler of a frame may let the process live: ctypes raises an OSError.
# So such a fault is reported first, like a fault in native code on Linux.
#
# A page that cannot be read from its file or from the paging file is a fault, too. The exception of a PAGE_GUARD page
# is not, because that page is accessible afterwards; linmem has no such pages.

cdef void* fault_handler = NULL


cdef long on_exception(EXCEPTION_POINTERS* about) noexcept nogil:
    cdef const EXCEPTION_RECORD* fault = about.ExceptionRecord
    cdef DWORD saved = GetLastError()
    cdef ULONG_PTR way
    if (fault.NumberParameters >= 2 and (fault.ExceptionCode == EXCEPTION_ACCESS_VIOLATION
                                         or fault.ExceptionCode == EXCEPTION_IN_PAGE_ERROR)):
        way = fault.ExceptionInformation[0]
        report_once(<char*>fault.ExceptionInformation[1], <size_t>fault.ExceptionAddress,
                    FAULT_READ if way == 0 else FAULT_WRITE if way == 1 else FAULT_EXECUTE if way == 8 else
                    FAULT_UNKNOWN, GetCurrentThreadId())
        SetLastError(saved)
    return EXCEPTION_CONTINUE_SEARCH


cdef int watch_faults(fault_report report) noexcept nogil:
    global report_of_faults, fault_handler
    if fault_handler == NULL:
        fault_handler = AddVectoredExceptionHandler(0, on_exception)
        if fault_handler == NULL:
            return last_error()
    report_of_faults = report
    return 0


cdef void unwatch_faults() noexcept nogil:
    global report_of_faults, fault_handler
    report_of_faults = NULL
    if fault_handler != NULL:
        RemoveVectoredExceptionHandler(fault_handler)
        fault_handler = NULL


cdef void write_error(const char* text, size_t size) noexcept nogil:
    cdef DWORD written
    WriteFile(GetStdHandle(STD_ERROR_HANDLE), text, <DWORD>size, &written, NULL)


# -- limits, clocks ------------------------------------------------------------------------------

cdef MEMORYSTATUSEX memory_status() noexcept nogil:
    """The memory, and the commit limit of this process or of the machine, the smaller one; zeros if unknown."""
    cdef MEMORYSTATUSEX status
    memset(&status, 0, sizeof(status))
    status.dwLength = sizeof(status)
    GlobalMemoryStatusEx(&status)
    return status


cdef bint on_signal_stack() noexcept nogil:
    return False


cdef void address_space(size_t* total, size_t* left) noexcept nogil:
    # Windows has no limit on addresses: a job object limits committed memory.
    total[0] = left[0] = <size_t>1 << caps.address_bits


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


cdef long long utc_ns() noexcept nogil:
    cdef FILETIME now       # in units of 100 ns since 1601
    GetSystemTimeAsFileTime(&now)
    return ((<long long>now.dwHighDateTime << 32) + now.dwLowDateTime - 116444736000000000LL) * 100


# -- functions for Python ------------------------------------------------------------------------

def os_error_args(int code, text):
    """The arguments with which OSError has `code` as its winerror."""
    # OSError derives the errno from most codes, but not from the codes of the commit limit and of some quotas.
    no_memory = code in (ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY, ERROR_COMMITMENT_LIMIT, ERROR_NO_SYSTEM_RESOURCES,
                         ERROR_NOT_ENOUGH_QUOTA, ERROR_WORKING_SET_QUOTA)
    return _errno.ENOMEM if no_memory else 0, text, None, code


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
    global real_page, real_granularity, image_kind, best_image_kind, scan_way, best_scan_way
    global query_section, query_object
    cdef SYSTEM_INFO info
    cdef HANDLE ntdll
    GetSystemInfo(&info)
    real_page = info.dwPageSize
    real_granularity = info.dwAllocationGranularity
    caps.page_size = _page_size_wanted(real_page)
    caps.granularity = max(real_granularity, caps.page_size)
    caps.address_bits = bits_of(<size_t>info.lpMaximumApplicationAddress)
    scan_way = best_scan_way = 1                # writes_are_seen() tests this way
    scan_way = best_scan_way = writes_are_seen()
    caps.scans = scan_way
    caps.reports_faults = True
    caps.memory = memory_status().ullTotalPhys
    image_kind = best_image_kind = IMAGE_SECTION
    ntdll = GetModuleHandleA("ntdll.dll")
    query_section = <query_section_call>GetProcAddress(ntdll, "NtQuerySection")
    query_object = <query_object_call>GetProcAddress(ntdll, "NtQueryObject")
    caps.shares = caps.names_files = query_section != NULL and query_object != NULL


_start()
