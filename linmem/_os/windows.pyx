# cython: language_level=3
"""The page floor on Windows: VirtualAlloc, VirtualProtect, VirtualFree and their kin."""

cimport linmem._os.pages        # noqa: F401  a rebuild follows an edit of the contract
from linmem cimport _atomic

from libc.stdio cimport snprintf
from libc.string cimport memcpy, memset

import errno as _errno

cdef extern from *:
    """
    #ifndef WIN32_LEAN_AND_MEAN
    #define WIN32_LEAN_AND_MEAN
    #endif
    #ifndef NOMINMAX
    #define NOMINMAX
    #endif
    #include <windows.h>
    #define PSAPI_VERSION 2         /* QueryWorkingSetEx is kernel32's, no other library to link */
    #include <psapi.h>

    /* Every function returns 0 or the code of the one call that failed, read on the next line. 0 is
       success to whoever reads it, so a call that fails and names no reason gets one. */
    static int linmem_last_error(void) {
        DWORD code = GetLastError();
        return code == 0 || code > 0x7fffffff ? ERROR_GEN_FAILURE : (int)code;
    }

    static int linmem_alloc(void *at, size_t size, int type, int protection, char **base) {
        void *p = VirtualAlloc(at, size, (DWORD)type, (DWORD)protection);
        if (p == NULL) return linmem_last_error();
        *base = (char *)p;
        return 0;
    }

    static int linmem_free(void *at, size_t size, int type) {
        return VirtualFree(at, size, (DWORD)type) ? 0 : linmem_last_error();
    }

    /* The whole reservation that `at` lies in: MEM_RELEASE takes its base and nothing else. */
    static int linmem_release(void *at) {
        MEMORY_BASIC_INFORMATION about;
        if (VirtualQuery(at, &about, sizeof about) == 0) return linmem_last_error();
        if (about.State == MEM_FREE) return ERROR_INVALID_ADDRESS;
        return linmem_free(about.AllocationBase, 0, MEM_RELEASE);
    }

    /* Where the processor does not watch what is written to code, it is told. */
    static void linmem_flush_code(void *at, size_t size) {
        (void)FlushInstructionCache(GetCurrentProcess(), at, size);
    }

    static int linmem_protect(void *at, size_t size, int protection) {
        DWORD before;
        return VirtualProtect(at, size, (DWORD)protection, &before) ? 0 : linmem_last_error();
    }

    /* How many of the next pages, at most LINMEM_ASK, are in the working set. */
    #define LINMEM_ASK 256
    static int linmem_count_resident(char *at, size_t n, size_t page, size_t *pages) {
        PSAPI_WORKING_SET_EX_INFORMATION asked[LINMEM_ASK];
        size_t i;
        if (n > LINMEM_ASK) return ERROR_INVALID_PARAMETER;
        for (i = 0; i < n; i++) asked[i].VirtualAddress = at + i * page;
        if (!QueryWorkingSetEx(GetCurrentProcess(), asked, (DWORD)(n * sizeof asked[0]))) return linmem_last_error();
        for (i = 0; i < n; i++) *pages += (size_t)(asked[i].VirtualAttributes.Flags & 1);
        return 0;
    }

    /* The commit limit of this process or of the machine, whichever is smaller; 0, 0 where unknown. */
    static void linmem_commit_limit(unsigned long long *total, unsigned long long *left) {
        MEMORYSTATUSEX status;
        status.dwLength = sizeof status;
        *total = *left = 0;
        if (!GlobalMemoryStatusEx(&status)) return;
        *total = status.ullTotalPageFile;
        *left = status.ullAvailPageFile;
    }

    static void linmem_system(size_t *page, size_t *granularity, size_t *addresses) {
        SYSTEM_INFO info;
        GetSystemInfo(&info);
        *page = info.dwPageSize;
        *granularity = info.dwAllocationGranularity;
        *addresses = (size_t)info.lpMaximumApplicationAddress;
    }

    static unsigned long long linmem_memory(void) {
        MEMORYSTATUSEX status;
        status.dwLength = sizeof status;
        return GlobalMemoryStatusEx(&status) ? status.ullTotalPhys : 0;
    }

    static long long linmem_clock(void) {
        LARGE_INTEGER now, rate;
        QueryPerformanceCounter(&now);
        QueryPerformanceFrequency(&rate);       /* neither fails since Windows XP */
        return now.QuadPart / rate.QuadPart * 1000000000
            + now.QuadPart % rate.QuadPart * 1000000000 / rate.QuadPart;
    }

    /* The pages that were written since they were reserved, or since linmem_forget(), in runs. What is listed as
       written may be zero (a MEM_DECOMMIT forgets nothing by itself); what is not has never been anything else. */
    #define LINMEM_LISTED 256
    static int linmem_written(char *at, size_t size, size_t page, linmem_span *runs, size_t *n, char **next) {
        void *found[LINMEM_LISTED];
        ULONG_PTR count = LINMEM_LISTED, i;
        DWORD unit;
        size_t room = *n, used = 0;
        if (GetWriteWatch(0, at, size, found, &count, &unit) != 0) return ERROR_NOT_SUPPORTED;
        for (i = 0; i < count; i++) {
            char *here = (char *)found[i];
            if (used && runs[used - 1].at + runs[used - 1].size == here) {
                runs[used - 1].size += page;
                continue;
            }
            if (used == room) break;
            runs[used].at = here;
            runs[used++].size = page;
        }
        *n = used;
        *next = i < count ? (char *)found[i] : count < LINMEM_LISTED ? at + size : (char *)found[count - 1] + page;
        return 0;
    }

    /* Nobody writes there meanwhile, and every byte is zero. Refused (it is not watched), nothing changes. */
    static void linmem_forget(void *at, size_t size) { (void)ResetWriteWatch(at, size); }

    /* Asked of three pages: the first is only read, the second written by this thread, the third by the system, as
       a guest's WASI calls do. Where one of the writes were not seen, a guest would find another's bytes. */
    static int linmem_writes_are_seen(size_t page) {
        linmem_span runs[3];
        size_t n = 3;
        char *next = NULL, *p = (char *)VirtualAlloc(NULL, 3 * page, MEM_RESERVE | MEM_COMMIT | MEM_WRITE_WATCH,
                                                     PAGE_READWRITE);
        HANDLE out, in;
        DWORD moved = 0;
        int seen = 0;
        if (p == NULL) return 0;
        if (CreatePipe(&out, &in, NULL, 0)) {
            (void)*(volatile char *)p;
            *(volatile char *)(p + page) = 1;
            if (WriteFile(in, "x", 1, &moved, NULL) && ReadFile(out, p + 2 * page, 1, &moved, NULL) && moved == 1
                    && linmem_written(p, 3 * page, page, runs, &n, &next) == 0)
                seen = n == 1 && next == p + 3 * page && runs[0].size == 2 * page && runs[0].at == p + page;
            CloseHandle(out);
            CloseHandle(in);
        }
        if (seen) {     /* and forgotten when they are asked to be */
            n = 3;
            seen = VirtualFree(p, 3 * page, MEM_DECOMMIT) && ResetWriteWatch(p, 3 * page) == 0
                && VirtualAlloc(p, 3 * page, MEM_COMMIT, PAGE_READWRITE) == p
                && linmem_written(p, 3 * page, page, runs, &n, &next) == 0 && n == 0;
        }
        VirtualFree(p, 0, MEM_RELEASE);
        return seen;
    }

    static void linmem_yield(void) { SwitchToThread(); }

    static void linmem_sleep(long long ns) { Sleep(ns < 1000000 ? 1 : (DWORD)(ns / 1000000)); }

    static LONG WINAPI linmem_end_of_process(EXCEPTION_POINTERS *about) {
        (void)about;
        return EXCEPTION_EXECUTE_HANDLER;
    }

    #include <errno.h>
    #include <io.h>
    #include <stdint.h>
    #include <stdlib.h>

    /* A section object of the paging file's, or of a file's; the caller keeps what it means by `file`. */
    static int linmem_section(void *file, size_t size, int protection, void **out) {
        HANDLE section = CreateFileMappingW((HANDLE)file, NULL, (DWORD)protection,
                                            (DWORD)((unsigned long long)size >> 32), (DWORD)size, NULL);
        if (section == NULL) return linmem_last_error();
        *out = section;
        return 0;
    }

    static int linmem_view(void *section, long long position, size_t size, int access, char **out) {
        void *p = MapViewOfFile((HANDLE)section, (DWORD)access, (DWORD)((unsigned long long)position >> 32),
                                (DWORD)position, size);
        if (p == NULL) return linmem_last_error();
        *out = (char *)p;
        return 0;
    }

    static void linmem_unview(void *at) { (void)UnmapViewOfFile(at); }
    static void linmem_close(void *handle) { (void)CloseHandle((HANDLE)handle); }

    /* The same section by a handle that can do nothing but read. */
    static int linmem_for_reading(void *section, void **out) {
        HANDLE reader;
        if (!DuplicateHandle(GetCurrentProcess(), (HANDLE)section, GetCurrentProcess(), &reader, FILE_MAP_READ, FALSE,
                             0))
            return linmem_last_error();
        *out = reader;
        return 0;
    }

    /* A descriptor of the C library's -> the file's handle and size. */
    #if defined(__MINGW32__)        /* whose headers do not have it everywhere; its C library does */
    _CRTIMP _invalid_parameter_handler __cdecl
    _set_thread_local_invalid_parameter_handler(_invalid_parameter_handler handler);
    #endif

    static void linmem_no_handler(const wchar_t *expression, const wchar_t *function, const wchar_t *file,
                                  unsigned int line, uintptr_t reserved) {
        (void)expression; (void)function; (void)file; (void)line; (void)reserved;
    }

    static int linmem_file_of(int descriptor, void **file, unsigned long long *size) {
        LARGE_INTEGER length;
        /* A number that is no descriptor goes to the C library's handler, whose default ends the process. */
        _invalid_parameter_handler before = _set_thread_local_invalid_parameter_handler(linmem_no_handler);
        HANDLE handle = (HANDLE)_get_osfhandle(descriptor);
        _set_thread_local_invalid_parameter_handler(before);
        if (handle == INVALID_HANDLE_VALUE) return ERROR_INVALID_HANDLE;
        if (GetFileType(handle) != FILE_TYPE_DISK) return ERROR_NOT_SUPPORTED;
        if (!GetFileSizeEx(handle, &length)) return linmem_last_error();
        *file = handle;
        *size = (unsigned long long)length.QuadPart;
        return 0;
    }

    static void linmem_die_quietly(void) {
        SetErrorMode(GetErrorMode() | SEM_FAILCRITICALERRORS | SEM_NOGPFAULTERRORBOX);
        SetUnhandledExceptionFilter(linmem_end_of_process);
    }
    """
    int MEM_RESERVE, MEM_COMMIT, MEM_DECOMMIT, MEM_RELEASE, MEM_RESET, MEM_WRITE_WATCH
    int PAGE_NOACCESS, PAGE_READONLY, PAGE_READWRITE, PAGE_EXECUTE_READ
    int ERROR_ACCESS_DENIED, ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY, ERROR_GEN_FAILURE, ERROR_NOT_SUPPORTED
    int ERROR_INVALID_PARAMETER, ERROR_INVALID_ADDRESS, ERROR_NOACCESS, ERROR_NO_SYSTEM_RESOURCES
    int ERROR_WORKING_SET_QUOTA, ERROR_COMMITMENT_LIMIT, ERROR_NOT_ENOUGH_QUOTA
    size_t ASK "LINMEM_ASK"
    int alloc "linmem_alloc"(void* at, size_t size, int type, int protection, char** base) noexcept nogil
    int free_ "linmem_free"(void* at, size_t size, int type) noexcept nogil
    int release_ "linmem_release"(void* at) noexcept nogil
    void flush_code "linmem_flush_code"(void* at, size_t size) noexcept nogil
    int protect_ "linmem_protect"(void* at, size_t size, int protection) noexcept nogil
    int count_resident "linmem_count_resident"(char* at, size_t n, size_t page, size_t* pages) noexcept nogil
    void commit_limit "linmem_commit_limit"(unsigned long long* total, unsigned long long* left) noexcept nogil
    unsigned long long memory_ "linmem_memory"() noexcept nogil
    void system_ "linmem_system"(size_t* page, size_t* granularity, size_t* addresses) noexcept nogil
    long long clock_ "linmem_clock"() noexcept nogil
    int written "linmem_written"(char* at, size_t size, size_t page, span* runs, size_t* n, char** next) noexcept nogil
    void forget "linmem_forget"(void* at, size_t size) noexcept nogil
    bint writes_are_seen "linmem_writes_are_seen"(size_t page) noexcept nogil
    void yield_ "linmem_yield"() noexcept nogil
    void sleep_ "linmem_sleep"(long long ns) noexcept nogil
    void die_quietly_ "linmem_die_quietly"() noexcept nogil
    int FILE_MAP_READ, FILE_MAP_WRITE
    void* INVALID_HANDLE_VALUE
    int section_ "linmem_section"(void* file, size_t size, int protection, void** out) noexcept nogil
    int view_ "linmem_view"(void* section, long long position, size_t size, int access, char** out) noexcept nogil
    void unview "linmem_unview"(void* at) noexcept nogil
    void close_ "linmem_close"(void* handle) noexcept nogil
    int for_reading "linmem_for_reading"(void* section, void** out) noexcept nogil
    int file_of "linmem_file_of"(int descriptor, void** file, unsigned long long* size) noexcept nogil
    bint VirtualUnlock(void* at, size_t size) noexcept nogil


include "common.pxi"

cdef size_t real_granularity
cdef bint can_watch = False             # reservations can be watched, and every write is seen
cdef size_t DISCARD_STEP = 1 << 20      # bytes that discard() holds in physical memory at a time


cdef int reserve(size_t size, bint watched, char** base) noexcept nogil:
    cdef int code = injected()
    cdef size_t extra = caps.granularity - real_granularity
    cdef char* p = NULL
    if code:
        return code
    # A part of a reservation cannot be given back: what a larger (overridden) host page needs for its
    # alignment stays, inaccessible, in front of or behind it, until release() frees all of it.
    count_reserved(size + extra)
    # The system keeps a bit for each page of what it watches; where there is no room for them, nothing is watched.
    if not (watched and can_watch and alloc(NULL, size + extra, MEM_RESERVE | MEM_WRITE_WATCH, PAGE_NOACCESS, &p) == 0):
        code = alloc(NULL, size + extra, MEM_RESERVE, PAGE_NOACCESS, &p)
    if code == 0:
        base[0] = <char*>((<size_t>p + extra) & ~(caps.granularity - 1))
    else:
        count_released(size + extra)
    return code


cdef int commit(char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    cdef char* p = NULL
    if code:
        return code
    code = alloc(at, size, MEM_COMMIT, PAGE_READWRITE, &p)
    if code:
        # Nothing says that a commit which runs out half way leaves the first half alone.
        free_(at, size, MEM_DECOMMIT)
    return code


cdef int decommit(char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    if code == 0:
        code = free_(at, size, MEM_DECOMMIT)
    if code == 0 and can_watch:
        forget(at, size)
    return code


cdef int discard(char* at, size_t size) noexcept nogil:
    # Not decommit and commit: between the two another thread's access would be a fault, and where the
    # commit is refused (somebody took the charge meanwhile) pages with live views on them would be gone
    # for good. MEM_RESET keeps pages and charge, and the documentation of MEM_RESET_UNDO says what may
    # become of the bytes: they stay intact, or they are replaced with zeroes. Zeroed first, both are zero.
    # VirtualUnlock of pages that are not locked takes them out of the working set; it says
    # ERROR_NOT_LOCKED when it has. Step by step, so that a large range is never resident as a whole.
    # Should MEM_RESET refuse, the bytes from there on are as they were or zero, and no page is lost.
    cdef int code = injected()
    cdef size_t offset = 0, step
    cdef char* p = NULL
    while code == 0 and offset < size:
        step = size - offset if size - offset < DISCARD_STEP else DISCARD_STEP
        memset(at + offset, 0, step)
        code = alloc(at + offset, step, MEM_RESET, PAGE_NOACCESS, &p)
        if code == 0:
            VirtualUnlock(at + offset, step)
        offset += step
    return code


cdef int renew(char* at, size_t size) noexcept nogil:
    # Nobody looks, so what discard() must not do is allowed, and touches no page.
    cdef int code = injected()
    cdef char* p = NULL
    if code == 0:
        code = free_(at, size, MEM_DECOMMIT)
    if code == 0:
        if can_watch:
            forget(at, size)    # before the commit, which makes that dearer
        code = alloc(at, size, MEM_COMMIT, PAGE_READWRITE, &p)
    return code


cdef int touched(char* at, size_t size, bint over_image, span* runs, size_t* n, char** next) noexcept nogil:
    # QueryWorkingSetEx does not know of pages that went to the paging file, and nothing knows of an image's.
    cdef int code = injected()
    if code == 0:
        code = ERROR_NOT_SUPPORTED if over_image or not caps.scans else written(at, size, real_page, runs, n, next)
    return code


cdef int present(char* at, size_t size, span* runs, size_t* n, char** next) noexcept nogil:
    cdef int code = injected()
    return code if code else ERROR_NOT_SUPPORTED


cdef int advise_huge(char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    return code if code else ERROR_NOT_SUPPORTED


cdef int protect(char* at, size_t size, int access) noexcept nogil:
    cdef int code = injected()
    cdef int protection = PAGE_NOACCESS
    if code:
        return code
    if access == ACCESS_READ:
        protection = PAGE_READONLY
    elif access == ACCESS_READ_WRITE:
        protection = PAGE_READWRITE
    elif access == ACCESS_READ_EXECUTE:
        protection = PAGE_EXECUTE_READ
    code = protect_(at, size, protection)
    if code == 0 and access == ACCESS_READ_EXECUTE:
        flush_code(at, size)
    return code


cdef int prefault(char* at, size_t size) noexcept nogil:
    # PrefetchVirtualMemory reads from files; it does not make fresh pages resident.
    cdef int code = injected()
    cdef size_t offset = 0
    if code:
        return code
    while offset < size:
        _atomic.touch(at + offset)
        offset += real_page
    return 0


cdef int move(char* at, size_t size, char* to, size_t new_size) noexcept nogil:
    cdef int code = injected()
    return code if code else ERROR_NOT_SUPPORTED


# -- images: section objects, which memories copy from. A view of one could stand inside a reservation only
# in a placeholder, which not every Windows has, and which would make two allocations of one memory.

cdef int image_begin(size_t size, image_pages* out) noexcept nogil:
    cdef int code = injected()
    cdef void* section = NULL
    cdef char* p = NULL
    memset(out, 0, sizeof(image_pages))
    out.handle = -1
    out.size = size
    if code:
        return code
    if image_kind == IMAGE_SECTION:
        code = section_(INVALID_HANDLE_VALUE, size, PAGE_READWRITE, &section)
        if code:
            return code
    count_reserved(size)
    if image_kind == IMAGE_SECTION:
        code = view_(section, 0, size, FILE_MAP_WRITE, &p)
        if code:
            close_(section)
        else:
            out.handle = <long long>section
    else:
        code = alloc(NULL, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE, &p)
    if code:
        count_released(size)
        return code
    out.kind = image_kind
    out.bytes = p
    return 0


cdef int image_write(image_pages* into, size_t offset, const char* bytes, size_t size) noexcept nogil:
    cdef int code = injected()
    if code == 0:
        memcpy(into.bytes + offset, bytes, size)
    return code


cdef int image_end(image_pages* it) noexcept nogil:
    cdef int code = injected()
    cdef void* reader = NULL
    if code:
        return code
    if it.kind == IMAGE_PRIVATE:
        return protect_(it.bytes, it.size, PAGE_READONLY)
    # The pages stay where they are, and the only handle on them that is left cannot write.
    code = for_reading(<void*>it.handle, &reader)
    if code == 0:
        code = protect_(it.bytes, it.size, PAGE_READONLY)
        if code:
            close_(reader)
    if code == 0:
        close_(<void*>it.handle)
        it.handle = <long long>reader
    return code


cdef int image_open(int descriptor, long long position, size_t size, image_pages* out) noexcept nogil:
    cdef int code = injected()
    cdef void* file = NULL
    cdef void* section = NULL
    cdef char* p = NULL
    cdef unsigned long long length = 0
    cdef size_t lead = <size_t>position & (real_granularity - 1)
    memset(out, 0, sizeof(image_pages))
    if code:
        return code
    code = file_of(descriptor, &file, &length)
    if code:
        return code
    if <unsigned long long>position > length or size > length - <unsigned long long>position:
        return IMAGE_SHORT
    code = section_(file, 0, PAGE_READONLY, &section)
    if code:
        return code
    count_reserved(lead + size)
    code = view_(section, position - <long long>lead, lead + size, FILE_MAP_READ, &p)
    if code:
        count_released(lead + size)
        close_(section)
        return code
    out.kind = IMAGE_FILE
    out.handle = <long long>section
    out.position = position
    out.bytes = p + lead
    out.size = size
    return 0


cdef void image_drop(image_pages* it) noexcept nogil:
    cdef size_t lead = <size_t>it.position & (real_granularity - 1)
    if it.bytes != NULL:
        if it.kind == IMAGE_PRIVATE:
            release_(it.bytes)
        else:       # a view begins at a multiple of the granularity, and so does position 0
            unview(it.bytes - lead)
        count_released(lead + it.size)
    if it.handle != -1:
        close_(<void*>it.handle)


cdef int image_map(const image_pages* it, size_t offset, char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    return code if code else ERROR_NOT_SUPPORTED


cdef int image_renew(const image_pages* it, size_t offset, char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    return code if code else ERROR_NOT_SUPPORTED


cdef int blank(char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    return code if code else ERROR_NOT_SUPPORTED


cdef int resident(char* at, size_t size, size_t* bytes) noexcept nogil:
    cdef int code = injected()
    cdef size_t left = size // real_page, n, pages = 0
    while code == 0 and left:
        n = left if left < ASK else ASK
        code = count_resident(at + size - left * real_page, n, real_page, &pages)
        left -= n
    if code == 0:
        bytes[0] = pages * real_page
    return code


cdef int release(char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    if code == 0:
        code = release_(at)
    if code == 0:
        count_released(size + caps.granularity - real_granularity)
    return code


cdef void address_space(size_t* total, size_t* left) noexcept nogil:
    # No limit is put on addresses here: a job object limits what is committed.
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
    cdef unsigned long long total, left
    text[0] = 0
    if size >> caps.address_bits:
        snprintf(text, room, "user addresses have %d bits", caps.address_bits)
        return
    if code != ERROR_COMMITMENT_LIMIT and code != ERROR_NOT_ENOUGH_MEMORY and code != ERROR_OUTOFMEMORY:
        return
    commit_limit(&total, &left)
    if total and (code == ERROR_COMMITMENT_LIMIT or size > left):
        snprintf(text, room, "the commit limit is %llu bytes and %llu are left", total, left)


cdef int at_fork(void (*before)() noexcept nogil, void (*in_parent)() noexcept nogil,
                 void (*in_child)() noexcept nogil) noexcept nogil:
    return 0


cdef void relax() noexcept nogil:
    yield_()


cdef void sleep_ns(long long ns) noexcept nogil:
    sleep_(ns)


cdef long long clock_ns() noexcept nogil:
    return clock_()


cdef long long coarse_ns() noexcept nogil:
    return clock_()


def os_error_args(int code, text):
    """The arguments that make an OSError carry `code` the way this OS does (winerror here)."""
    # OSError finds the errno of most codes itself, and knows no errno for the commit limit and some quotas.
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
    die_quietly_()


def _limits():
    cdef unsigned long long total, left
    commit_limit(&total, &left)
    return {"commit limit": total} if total else {}


cdef _start():
    global real_page, real_granularity, image_kind, can_watch
    image_kind = IMAGE_SECTION
    cdef size_t top
    system_(&real_page, &real_granularity, &top)
    caps.page_size = _page_size_wanted(real_page)
    caps.granularity = max(real_granularity, caps.page_size)
    caps.address_bits = 0
    while top:
        caps.address_bits += 1
        top >>= 1
    caps.moves = False
    caps.names = False
    caps.discard_any_protection = False
    caps.populates = False
    can_watch = writes_are_seen(real_page)
    caps.scans = can_watch
    caps.maps_images = False
    caps.huge_page = 0
    caps.memory = memory_()
    caps.mappings = 0


_start()
