# cython: language_level=3
"""The page floor on POSIX: mmap(2), mprotect(2), madvise(2), and on Linux mremap(2)."""

cimport linmem._os.pages        # noqa: F401  a rebuild follows an edit of the contract
from linmem cimport _atomic

from libc.stdio cimport snprintf

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <pthread.h>
    #include <sched.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/resource.h>
    #include <time.h>
    #include <unistd.h>
    #if defined(__linux__)
    #include <sys/prctl.h>
    #include <sys/sysinfo.h>
    #endif

    #ifndef MAP_ANONYMOUS
    #define MAP_ANONYMOUS MAP_ANON
    #endif
    #ifndef MAP_NORESERVE       /* FreeBSD has none, and accounts nothing ahead */
    #define MAP_NORESERVE 0
    #endif
    #ifndef PR_SET_VMA
    #define PR_SET_VMA 0x53564d41
    #define PR_SET_VMA_ANON_NAME 0
    #endif
    #ifndef MAP_FIXED_NOREPLACE
    #define MAP_FIXED_NOREPLACE 0x100000
    #endif
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23
    #endif
    static const char linmem_name[] = "linmem";

    static int linmem_set_name(void *at, size_t size) {
    #if defined(__linux__)
        return prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, (unsigned long)at, (unsigned long)size,
                     (unsigned long)linmem_name);
    #else
        (void)at; (void)size; return -1;
    #endif
    }

    /* NORESERVE: accounting for what is committed costs a sixth of a growth. Under strict overcommit Linux
       ignores the flag; its check in the default mode is made up for by linmem_too_much(). */
    static void *linmem_map(void *at, size_t size, int protection, int fixed) {
        return mmap(at, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (fixed ? MAP_FIXED : 0), -1, 0);
    }

    static int linmem_discard(void *at, size_t size) {
    #if defined(__linux__)
        return madvise(at, size, MADV_DONTNEED);
    #else   /* elsewhere DONTNEED is a hint that may keep the bytes: a fresh mapping does not */
        return linmem_map(at, size, PROT_READ | PROT_WRITE, 1) == MAP_FAILED ? -1 : 0;
    #endif
    }

    static int linmem_move(void *at, size_t size, void *to, size_t new_size) {
    #if defined(__linux__)
        int code;
        if (mremap(at, size, new_size, MREMAP_MAYMOVE | MREMAP_FIXED, to) != MAP_FAILED) return 0;
        /* The kernel may have emptied the destination before it refused. Fill the hole, lest another
           thread maps there and the caller's release() takes that away; where there is none, this
           changes nothing. */
        code = errno;
        if (mmap(to, new_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0)
                != MAP_FAILED)
            (void)linmem_set_name(to, new_size);
        errno = code;
        return -1;
    #else
        (void)at; (void)size; (void)to; (void)new_size; errno = ENOTSUP; return -1;
    #endif
    }

    static int linmem_populate(void *at, size_t size) {
    #if defined(__linux__)
        return madvise(at, size, MADV_POPULATE_WRITE);
    #else
        (void)at; (void)size; errno = EINVAL; return -1;
    #endif
    }

    static int linmem_advise_huge(void *at, size_t size) {
    #if defined(__linux__)
        return madvise(at, size, MADV_HUGEPAGE);
    #else
        (void)at; (void)size; errno = ENOTSUP; return -1;
    #endif
    }

    /* Where the processor does not watch what is written to code, it is told. */
    static void linmem_flush_code(char *at, size_t size) {
    #if defined(__x86_64__) || defined(__i386__)
        (void)at; (void)size;
    #else
        __builtin___clear_cache(at, at + size);
    #endif
    }

    /* The vector has room for so many pages: the kernel fills it by the size. */
    static int linmem_mincore(void *at, size_t size, size_t page, unsigned char *vector, size_t room) {
        if (size / page > room) {
            errno = EINVAL;
            return -1;
        }
    #if defined(__linux__)
        return mincore(at, size, vector);
    #else
        return mincore(at, size, (char *)vector);
    #endif
    }

    /* One number out of a small file of the kernel's: the field'th word, or -1. */
    static long long linmem_file_number(const char *path, int field) {
        char text[256], *p = text, *end;
        long long value;
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t n;
        if (fd < 0) return -1;
        n = read(fd, text, sizeof text - 1);
        close(fd);
        if (n <= 0) return -1;
        text[n] = 0;
        for (;;) {
            value = strtoll(p, &end, 10);
            if (end == p) return -1;
            if (field-- == 0) return value;
            p = end;
        }
    }

    /* Lines of /proc/self/maps, which is how many mappings this process has; -1 where unknown. */
    static long long linmem_count_mappings(void) {
        char text[4096];
        long long lines = 0;
        ssize_t n, i;
        int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
        if (fd < 0) return -1;
        while ((n = read(fd, text, sizeof text)) > 0)
            for (i = 0; i < n; i++) lines += text[i] == '\\n';
        close(fd);
        return lines;
    }

    /* Linux with vm.overcommit_memory 0 refuses a commit of more than all memory and swap, but not in a
       NORESERVE mapping. The same answer, asked only where a machine could be too small. */
    static int linmem_too_much(size_t size) {
    #if defined(__linux__)
        struct sysinfo machine;
        if (size < ((size_t)1 << 26) || sysinfo(&machine) != 0) return 0;
        return size / machine.mem_unit > machine.totalram + machine.totalswap
               && linmem_file_number("/proc/sys/vm/overcommit_memory", 0) == 0;
    #else
        (void)size; return 0;
    #endif
    }

    static unsigned long long linmem_rlimit(int which) {
        struct rlimit r;
        if (getrlimit(which, &r) != 0 || r.rlim_cur == RLIM_INFINITY) return ~0ull;
        return (unsigned long long)r.rlim_cur;
    }

    static int linmem_die_quietly(void) {
        struct rlimit r = {0, 0};
        return setrlimit(RLIMIT_CORE, &r);
    }

    /* Bytes in a transparent huge page, where the kernel gives any out on request. */
    static long long linmem_huge_page(void) {
    #if defined(__linux__)
        char text[64];
        ssize_t n;
        int fd = open("/sys/kernel/mm/transparent_hugepage/enabled", O_RDONLY | O_CLOEXEC);
        if (fd < 0) return 0;
        n = read(fd, text, sizeof text - 1);
        close(fd);
        if (n <= 0) return 0;
        text[n] = 0;
        if (strstr(text, "[never]")) return 0;
        return linmem_file_number("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", 0);
    #else
        return 0;
    #endif
    }

    /* Physical memory, or what a control group leaves of it; 0: unknown. */
    static unsigned long long linmem_memory(size_t page) {
        long long pages = 0, limit;
    #if defined(_SC_PHYS_PAGES)
        pages = sysconf(_SC_PHYS_PAGES);
    #endif
        unsigned long long bytes = pages > 0 ? (unsigned long long)pages * page : 0;
        limit = linmem_file_number("/sys/fs/cgroup/memory.max", 0);
        return limit > 0 && (bytes == 0 || (unsigned long long)limit < bytes) ? (unsigned long long)limit : bytes;
    }

    static long long linmem_clock(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (long long)t.tv_sec * 1000000000 + t.tv_nsec;
    }

    static long long linmem_coarse_clock(void) {
    #if defined(CLOCK_MONOTONIC_COARSE)
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
        return (long long)t.tv_sec * 1000000000 + t.tv_nsec;
    #else
        return linmem_clock();
    #endif
    }

    static void linmem_sleep(long long ns) {
        struct timespec t;
        t.tv_sec = (time_t)(ns / 1000000000);
        t.tv_nsec = (long)(ns % 1000000000);
        (void)nanosleep(&t, NULL);      /* a signal ends it early: the caller looks again anyway */
    }

    #if defined(__linux__)
    #define LINMEM_LINUX 1
    #else
    #define LINMEM_LINUX 0
    #endif
    #ifndef RLIMIT_AS           /* OpenBSD has RLIMIT_DATA only */
    #define RLIMIT_AS RLIMIT_DATA
    #endif
    """
    int errno
    int EINVAL, ENOMEM, EAGAIN, EACCES, EPERM, EFAULT, EEXIST, ENOSYS, EBUSY
    int PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC
    int RLIMIT_AS, RLIMIT_DATA
    void* MAP_FAILED
    bint ON_LINUX "LINMEM_LINUX"
    void* map_ "linmem_map"(void* at, size_t size, int protection, bint fixed) noexcept nogil
    int munmap(void* at, size_t size) noexcept nogil
    int mprotect(void* at, size_t size, int protection) noexcept nogil
    int set_name "linmem_set_name"(void* at, size_t size) noexcept nogil
    int discard_ "linmem_discard"(void* at, size_t size) noexcept nogil
    int move_ "linmem_move"(void* at, size_t size, void* to, size_t new_size) noexcept nogil
    void flush_code "linmem_flush_code"(char* at, size_t size) noexcept nogil
    int populate_ "linmem_populate"(void* at, size_t size) noexcept nogil
    int advise_huge_ "linmem_advise_huge"(void* at, size_t size) noexcept nogil
    long long huge_page "linmem_huge_page"() noexcept nogil
    unsigned long long memory_ "linmem_memory"(size_t page) noexcept nogil
    int mincore_ "linmem_mincore"(void* at, size_t size, size_t page, unsigned char* vector, size_t room) noexcept nogil
    long long file_number "linmem_file_number"(const char* path, int field) noexcept nogil
    long long count_mappings "linmem_count_mappings"() noexcept nogil
    bint too_much "linmem_too_much"(size_t size) noexcept nogil
    unsigned long long rlimit "linmem_rlimit"(int which) noexcept nogil
    long long clock_ "linmem_clock"() noexcept nogil
    long long coarse_clock "linmem_coarse_clock"() noexcept nogil
    void sleep_ "linmem_sleep"(long long ns) noexcept nogil
    int die_quietly_ "linmem_die_quietly"() noexcept nogil
    int sched_yield() noexcept nogil
    int pthread_atfork(void (*before)() noexcept nogil, void (*in_parent)() noexcept nogil,
                       void (*in_child)() noexcept nogil) noexcept nogil


include "common.pxi"
include "pagemap.pxi"
include "images.pxi"

cdef bint can_populate


cdef int reserve(size_t size, bint watched, char** base) noexcept nogil:
    cdef int code = injected()
    cdef void* p
    cdef size_t extra, lead
    if code:
        return code
    # The kernel aligns to its own page; a larger (overridden) host page is cut out of a longer run.
    extra = caps.page_size - real_page
    count_reserved(size + extra)
    p = map_(NULL, size + extra, PROT_NONE, False)
    if p == MAP_FAILED:
        code = errno
        count_released(size + extra)
        return code
    if extra:
        # A part that the kernel does not take back stays mapped, and counted, for ever.
        lead = (caps.page_size - (<size_t>p & (caps.page_size - 1))) & (caps.page_size - 1)
        if lead and munmap(p, lead) == 0:
            count_released(lead)
        if extra - lead and munmap(<char*>p + lead + size, extra - lead) == 0:
            count_released(extra - lead)
        p = <char*>p + lead
    if caps.names:
        set_name(p, size)       # decoration: a refusal changes nothing that anyone relies on
    base[0] = <char*>p
    return 0


cdef int commit(char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    if code:
        return code
    if too_much(size):
        return ENOMEM
    if mprotect(at, size, PROT_READ | PROT_WRITE) == 0:
        return 0
    # Of several mappings (what was hidden is one of its own) those before the one that was refused are
    # accessible now. None was, and where the guard begins decides what wasm may do.
    code = errno
    mprotect(at, size, PROT_NONE)
    return code


cdef int decommit(char* at, size_t size) noexcept nogil:
    # A fresh mapping, not mprotect(PROT_NONE): that would keep the charge, and would put the range
    # into core dumps because it once had pages.
    cdef int code = injected()
    if code:
        return code
    if map_(at, size, PROT_NONE, True) == MAP_FAILED:
        return errno
    if caps.names:
        set_name(at, size)
    return 0


cdef int discard(char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    if code:
        return code
    return errno if discard_(at, size) else 0


cdef int renew(char* at, size_t size) noexcept nogil:
    return discard(at, size)


cdef int advise_huge(char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    if code:
        return code
    return errno if advise_huge_(at, size) else 0


cdef int protect(char* at, size_t size, int access) noexcept nogil:
    cdef int code = injected()
    cdef int protection = PROT_NONE
    if code:
        return code
    if access == ACCESS_READ:
        protection = PROT_READ
    elif access == ACCESS_READ_WRITE:
        protection = PROT_READ | PROT_WRITE
    elif access == ACCESS_READ_EXECUTE:
        protection = PROT_READ | PROT_EXEC
    if mprotect(at, size, protection):
        return errno
    if access == ACCESS_READ_EXECUTE:
        flush_code(at, size)
    return 0


cdef int prefault(char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    cdef size_t offset = 0
    if code:
        return code
    if can_populate:
        return errno if populate_(at, size) else 0
    while offset < size:
        _atomic.touch(at + offset)
        offset += real_page
    return 0


cdef int move(char* at, size_t size, char* to, size_t new_size) noexcept nogil:
    cdef int code = injected()
    if code:
        return code
    if too_much(new_size - size):
        return ENOMEM
    if move_(at, size, to, new_size):
        return errno
    count_released(size)        # the range at `at`; the one at `to` is counted since it was reserved
    return 0


cdef int resident(char* at, size_t size, size_t* bytes) noexcept nogil:
    cdef int code = injected()
    cdef unsigned char vector[4096]
    cdef size_t offset = 0, step, i, pages = 0
    if code:
        return code
    while offset < size:
        step = size - offset
        if step > sizeof(vector) * real_page:
            step = sizeof(vector) * real_page
        if mincore_(at + offset, step, real_page, vector, sizeof(vector)):
            return errno
        for i in range(step // real_page):
            pages += vector[i] & 1
        offset += step
    bytes[0] = pages * real_page
    return 0


cdef int release(char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    if code:
        return code
    if munmap(at, size):
        return errno
    count_released(size)
    return 0


cdef void address_space(size_t* total, size_t* left) noexcept nogil:
    cdef unsigned long long limit = rlimit(RLIMIT_AS)
    cdef long long used_pages = 0
    total[0] = <size_t>1 << caps.address_bits
    left[0] = total[0]
    if limit < total[0]:
        used_pages = file_number("/proc/self/statm", 0)
        if used_pages < 0:
            used_pages = 0
        left[0] = limit - <size_t>used_pages * real_page if limit > <size_t>used_pages * real_page else 0


cdef const char* code_text(int code) noexcept nogil:
    if code == ENOMEM:
        return "the operating system has no memory or address space for it (ENOMEM)"
    if code == EAGAIN:
        return "the pages are locked or the lock limit is reached (EAGAIN)"
    if code == EACCES:
        return "access denied (EACCES)"
    if code == EPERM:
        return "not permitted (EPERM)"
    if code == EINVAL:
        return "invalid argument, or pages whose protection forbids it (EINVAL)"
    if code == EFAULT:
        return "a page in the range cannot be written (EFAULT)"
    if code == EBUSY:
        return "busy (EBUSY)"
    if code == ENOSYS:
        return "not implemented by this kernel (ENOSYS)"
    return "refused by the operating system"


cdef void limit_text(int code, size_t size, char* text, size_t room) noexcept nogil:
    cdef unsigned long long limit
    cdef long long used, most
    text[0] = 0
    if code != ENOMEM:
        return
    if size >> caps.address_bits:
        snprintf(text, room, "user addresses have %d bits", caps.address_bits)
        return
    used = file_number("/proc/self/statm", 0)
    limit = rlimit(RLIMIT_AS)
    if limit != ~0ull and (used < 0 or <unsigned long long>used * real_page + size > limit):
        snprintf(text, room, "RLIMIT_AS (ulimit -v) is %llu bytes and %llu are in use",
                 limit, <unsigned long long>(used if used > 0 else 0) * real_page)
        return
    limit = rlimit(RLIMIT_DATA)
    used = file_number("/proc/self/statm", 5)
    if limit != ~0ull and (used < 0 or <unsigned long long>used * real_page + size > limit):
        snprintf(text, room, "RLIMIT_DATA (ulimit -d) is %llu bytes", limit)
        return
    used = count_mappings()
    most = file_number("/proc/sys/vm/max_map_count", 0)
    if most > 0 and used + 4 > most:
        snprintf(text, room, "vm.max_map_count is %lld and %lld mappings exist", most, used)
        return
    most = file_number("/proc/sys/vm/overcommit_memory", 0)
    if most == 2:
        snprintf(text, room, "vm.overcommit_memory is 2: the commit limit is reached")
    elif most == 0:
        snprintf(text, room, "no limit of this process is in the way: more than the machine has"
                             " (vm.overcommit_memory is 0), or the address space is full")


cdef int at_fork(void (*before)() noexcept nogil, void (*in_parent)() noexcept nogil,
                 void (*in_child)() noexcept nogil) noexcept nogil:
    return pthread_atfork(before, in_parent, in_child)


cdef void relax() noexcept nogil:
    sched_yield()


cdef void sleep_ns(long long ns) noexcept nogil:
    sleep_(ns)


cdef long long clock_ns() noexcept nogil:
    return clock_()


cdef long long coarse_ns() noexcept nogil:
    return coarse_clock()


# -- what Python sees ------------------------------------------------------------------------

def os_error_args(int code, text):
    """The arguments that make an OSError carry `code` the way this OS does (errno here)."""
    return code, text


def die_quietly():
    """From now on a memory fault ends this process at once: no core file."""
    if die_quietly_():
        raise OSError(errno, "RLIMIT_CORE cannot be lowered")


def choose_scan(way):
    """How touched() finds pages from now on: "ioctl", "reading" or None; returns how it did. Tests only.

    ValueError where that does not work here.
    """
    global scan_way
    ways = {"ioctl": 2, "reading": 1, None: 0}
    if ways.get(way, 3) > best_scan_way:
        raise ValueError(f"way must be one that works here, got {way!r}")
    before = {n: name for name, n in ways.items()}[scan_way]
    scan_way = ways[way]
    caps.scans = scan_way != 0
    return before


def _limits():
    found = {}
    if rlimit(RLIMIT_AS) != ~0ull:
        found["RLIMIT_AS"] = rlimit(RLIMIT_AS)
    if rlimit(RLIMIT_DATA) != ~0ull:
        found["RLIMIT_DATA"] = rlimit(RLIMIT_DATA)
    for name, path in (("vm.max_map_count", b"/proc/sys/vm/max_map_count"),
                       ("vm.overcommit_memory", b"/proc/sys/vm/overcommit_memory")):
        if file_number(path, 0) >= 0:
            found[name] = file_number(path, 0)
    return found


cdef _start():
    global real_page, can_populate, scan_way, best_scan_way
    cdef void* p
    cdef size_t top
    real_page = _os.sysconf("SC_PAGE_SIZE")
    caps.page_size = _page_size_wanted(real_page)
    caps.granularity = caps.page_size
    caps.moves = ON_LINUX
    caps.discard_any_protection = ON_LINUX
    caps.locked = EINVAL if ON_LINUX else 0
    p = map_(NULL, real_page, PROT_READ | PROT_WRITE, False)
    if p == MAP_FAILED:
        raise OSError(errno, "linmem cannot map one page")
    # Linux places mappings from the top down, so an address tells how many bits there are.
    top = <size_t>p if ON_LINUX else <size_t>1 << 46
    caps.address_bits = 0
    while top:
        caps.address_bits += 1
        top >>= 1
    caps.names = set_name(p, real_page) == 0
    can_populate = populate_(p, real_page) == 0
    caps.populates = can_populate
    munmap(p, real_page)
    scan_way = best_scan_way = scan_start(real_page)
    caps.scans = scan_way != 0
    _start_images()
    caps.huge_page = max(0, huge_page())
    caps.memory = memory_(real_page)
    caps.mappings = max(0, file_number("/proc/sys/vm/max_map_count", 0))


_start()
