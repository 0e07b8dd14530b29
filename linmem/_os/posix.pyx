# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
"""The page floor on POSIX: mmap(2), mprotect(2), madvise(2), and on Linux mremap(2)."""

from linmem._os cimport pages as _contract    # no-cython-lint: not used; makes an edit of pages.pxd rebuild this file
from linmem._core.atomic cimport (
    add, atomic_i64, compare_exchange, load, load_address, load_size, store, store_address, store_size, touch,
)

from libc cimport errno as libc_errno
from libc.errno cimport EACCES, EAGAIN, EBUSY, EFAULT, EINVAL, ENOMEM, ENOSYS, EPERM, errno
from libc.stdio cimport snprintf
from libc.stdlib cimport strtoll
from libc.string cimport strchr, strlen, strncmp, strstr
from posix.fcntl cimport (
    FD_CLOEXEC, F_DUPFD_CLOEXEC, F_GETFL, F_SETFD, O_ACCMODE, O_CLOEXEC, O_RDONLY, O_RDWR, SEEK_CUR, SEEK_SET, fcntl,
)
from posix.fcntl cimport open as open_file
from posix.fcntl cimport posix_fallocate
from posix.resource cimport (
    RLIMIT_CORE, RLIMIT_DATA, RLIMIT_FSIZE, RLIMIT_NOFILE, RLIM_INFINITY, getrlimit, rlimit, setrlimit,
)
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, nanosleep, timespec
from posix.types cimport off_t
from posix.unistd cimport (
    close, fdatasync, ftruncate, getpid, lseek, pread, pwrite, read, readlink, sysconf, unlink, write,
)

# This header comes before all others, because it replaces the calls that the system lacks.
cdef extern from "linmem/_os/compat.h" nogil:
    int memfd_create "linmem_memfd_create"(const char* name, unsigned int flags)
    bint ON_LINUX "LINMEM_LINUX"
    enum: RLIMIT_AS, CLOCK_MONOTONIC_COARSE, _SC_PHYS_PAGES, SEEK_DATA, SEEK_HOLE
    enum: FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
    int fallocate(int fd, int mode, off_t offset, off_t size)
    enum: F_ADD_SEALS, F_GET_SEALS, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE
    int O_TMPFILE
    unsigned long TMPFS_MAGIC, PAGEMAP_SCAN
    int ENOTSUP, PR_SET_VMA, PR_SET_VMA_ANON_NAME
    int prctl(int option, ...)

    cdef struct statfs_t "statfs":
        unsigned long f_type, f_blocks, f_bavail, f_bsize
    int fstatfs(int fd, statfs_t* about)

    enum: FUTEX_WAIT "LINMEM_FUTEX_WAIT", FUTEX_WAKE "LINMEM_FUTEX_WAKE"
    long futex "linmem_futex"(int* word, int operation, int value, const timespec* most)

    cdef struct sysinfo_t "sysinfo":
        unsigned long totalram, freeram, totalswap
        unsigned int mem_unit
    int sysinfo(sysinfo_t* about)

cdef extern from "<sys/mman.h>" nogil:
    enum: PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC
    enum: MAP_PRIVATE, MAP_SHARED, MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED, MAP_FIXED_NOREPLACE
    enum: MREMAP_MAYMOVE, MREMAP_FIXED
    enum: MADV_DONTNEED, MADV_WILLNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_WIPEONFORK, MADV_POPULATE_WRITE
    unsigned int MFD_CLOEXEC, MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL
    int MS_ASYNC, MS_SYNC
    void* MAP_FAILED
    void* mmap(void* addr, size_t length, int prot, int flags, int fd, off_t offset)
    int munmap(void* addr, size_t length)
    int mprotect(void* addr, size_t length, int prot)
    int madvise(void* addr, size_t length, int advice)
    void* mremap(void* old_address, size_t old_size, size_t new_size, int flags, ...)
    int mincore(void* addr, size_t length, void* vec)
    int msync(void* addr, size_t length, int flags)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<signal.h>" nogil:
    enum: SS_ONSTACK
    ctypedef struct stack_t:
        int ss_flags
    int sigaltstack(const stack_t* new, stack_t* old)

cdef extern from "<pthread.h>" nogil:
    int pthread_atfork(void (*before)() noexcept nogil, void (*in_parent)() noexcept nogil,
                       void (*in_child)() noexcept nogil)

cdef extern from * nogil:
    void clear_cache "__builtin___clear_cache"(char* begin, char* end)


include "common.pxi"
include "pagemap.pxi"
include "image_pages.pxi"
include "file_pages.pxi"
include "fault_signals.pxi"

IMAGE_KINDS = {IMAGE_SEALED: "sealed", IMAGE_FILE: "file", IMAGE_PRIVATE: "private"}

cdef const char* NAME = "linmem"        # of mappings and of sealed memory
cdef unsigned long long NO_LIMIT = ~<unsigned long long>0

# MAP_NORESERVE saves the kernel's accounting for committed pages, a sixth of the time of a growth. The flag also
# turns off the check that Linux makes if vm.overcommit_memory is 0; too_much() replaces this check. If
# vm.overcommit_memory is 2, Linux ignores the flag.
cdef int MAP_FRESH = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE

# By ACCESS_ constant.
cdef int[4] PROTECTIONS = [PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC]

cdef coded_text[14] CODE_TEXTS = [
    [ENOMEM, "the operating system has no memory or address space for it (ENOMEM)"],
    [EAGAIN, "the pages are locked or the lock limit is reached (EAGAIN)"],
    [EACCES, "access denied (EACCES)"],
    [EPERM, "not permitted (EPERM)"],
    [EINVAL, "invalid argument, or pages whose protection forbids it (EINVAL)"],
    [EFAULT, "a page in the range cannot be written (EFAULT)"],
    [EBUSY, "busy (EBUSY)"],
    [ENOSYS, "not implemented by this kernel (ENOSYS)"],
    [ENOSPC, "the file system is full (ENOSPC)"],
    [EDQUOT, "the disk quota is used up (EDQUOT)"],
    [EOPNOTSUPP, "the file system cannot do this, for example allocate space in advance (EOPNOTSUPP)"],
    [EFBIG, "a file cannot have this length (EFBIG)"],
    [ENODEV, "not a regular file (ENODEV)"],
    [EMFILE, "the process has too many open descriptors (EMFILE)"],
]


cdef inline int set_name(void* addr, size_t size) noexcept nogil:
    """Names a mapping for tools that list mappings. linmem works the same if the kernel refuses the name."""
    if not caps.names:
        return 0
    return prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, <unsigned long>addr, <unsigned long>size, <unsigned long>NAME)


cdef int map_anywhere(size_t size, int prot, int flags, int fd, off_t offset, char** addr) noexcept nogil:
    """mmap() at an address that the kernel chooses; counts the bytes."""
    cdef int code
    cdef void* p
    count_reserved(size)
    p = mmap(NULL, size, prot, flags, fd, offset)
    if p == MAP_FAILED:
        code = errno
        count_released(size)
        return code
    addr[0] = <char*>p
    return 0


cdef int map_fresh(char* addr, size_t size, int prot) noexcept nogil:
    """Replaces the mappings of the range with fresh pages."""
    if mmap(addr, size, prot, MAP_FRESH | MAP_FIXED, -1, 0) == MAP_FAILED:
        return errno
    set_name(addr, size)
    return 0


cdef int os_reserve(char* unused, size_t size, details* more) noexcept nogil:
    # The kernel aligns to its own page. For a larger host page, which LINMEM_PAGE_SIZE asks for, this function maps a
    # longer range and unmaps its ends.
    cdef size_t extra = caps.page_size - real_page, lead
    cdef char* p = NULL
    cdef int code = map_anywhere(size + extra, PROT_NONE, MAP_FRESH, -1, 0, &p)
    if code:
        return code
    # If the kernel refuses to unmap an end, this end stays mapped and counted until the process ends.
    lead = (caps.page_size - <size_t>p) & (caps.page_size - 1)
    if lead:
        os_release(p, lead)
    if extra - lead:
        os_release(p + lead + size, extra - lead)
    more.base[0] = p + lead
    set_name(p + lead, size)
    return 0


cdef int os_commit(char* addr, size_t size) noexcept nogil:
    cdef int code
    if too_much(size):
        return ENOMEM
    if mprotect(addr, size, PROT_READ | PROT_WRITE) == 0:
        return 0
    # The range may consist of several mappings, because hidden pages are separate mappings. If the kernel refused one,
    # the mappings before it are accessible now. No page was accessible before the call, and none may stay
    # accessible: wasm must fault at the first byte after the committed bytes.
    code = errno
    mprotect(addr, size, PROT_NONE)
    return code


cdef int os_decommit(char* addr, size_t size) noexcept nogil:
    # mprotect(PROT_NONE) instead would keep the charge, and core dumps would contain the range, because it once had
    # pages.
    return map_fresh(addr, size, PROT_NONE)


cdef int os_blank(char* addr, size_t size) noexcept nogil:
    return map_fresh(addr, size, PROT_READ | PROT_WRITE)


cdef int os_discard(char* addr, size_t size) noexcept nogil:
    if ON_LINUX:
        return errno if madvise(addr, size, MADV_DONTNEED) else 0
    # On other systems MADV_DONTNEED is a hint, and the bytes may remain.
    return os_blank(addr, size)


cdef int os_renew(char* addr, size_t size) noexcept nogil:
    return os_discard(addr, size)


cdef int os_advise_huge(char* addr, size_t size) noexcept nogil:
    if not ON_LINUX:
        return ENOTSUP
    return errno if madvise(addr, size, MADV_HUGEPAGE) else 0


cdef int os_protect(char* addr, size_t size, details* more) noexcept nogil:
    if mprotect(addr, size, PROTECTIONS[more.access]):
        return errno
    if more.access == ACCESS_READ_EXECUTE:
        clear_cache(addr, addr + size)
    return 0


cdef int os_prefault(char* addr, size_t size) noexcept nogil:
    if caps.populates:
        return errno if madvise(addr, size, MADV_POPULATE_WRITE) else 0
    return touch_pages(addr, size)


cdef int os_move(char* addr, size_t size, details* more) noexcept nogil:
    cdef int code
    if not ON_LINUX:
        return ENOTSUP
    if too_much(more.new_size - size):
        return ENOMEM
    if mremap(addr, size, more.new_size, MREMAP_MAYMOVE | MREMAP_FIXED, more.new_addr) != MAP_FAILED:
        count_released(size)        # the range at addr; the range at new_addr was counted when it was reserved
        return 0
    # The kernel may have unmapped the destination before it refused the move. Another thread could map pages into this
    # hole, and the caller's release() would unmap them. So linmem reserves the destination again. If the kernel has not
    # unmapped the destination, this mmap() fails and changes nothing.
    code = errno
    if mmap(more.new_addr, more.new_size, PROT_NONE, MAP_FRESH | MAP_FIXED_NOREPLACE, -1, 0) != MAP_FAILED:
        set_name(more.new_addr, more.new_size)
    return code


cdef int os_resident(char* addr, size_t size, details* more) noexcept nogil:
    cdef unsigned char vector[4096]
    cdef size_t left = size // real_page, pages = 0, n, i
    while left:
        n = min(left, sizeof(vector))       # mincore() writes as many bytes as the range has pages
        if mincore(addr + size - left * real_page, n * real_page, <void*>vector):
            return errno
        for i in range(n):
            pages += vector[i] & 1
        left -= n
    more.bytes[0] = pages * real_page
    return 0


cdef bint is_free(char* addr) noexcept nogil:
    # MS_ASYNC writes nothing: the call only checks that the pages are mapped.
    return msync(addr - (<size_t>addr & (real_page - 1)), real_page, MS_ASYNC) != 0 and errno == ENOMEM


cdef int os_release(char* addr, size_t size) noexcept nogil:
    if munmap(addr, size):
        return errno
    count_released(size)
    return 0


# -- limits, and /proc and /sys as their sources --------------------------------------------------

cdef ssize_t read_text(int fd, char* text, size_t room) noexcept nogil:
    """Reads into `text`, which is always terminated. Returns how many bytes were read: 0 at the end of the file, -1 if
    it failed."""
    cdef ssize_t n = read(fd, text, room - 1) if fd >= 0 else -1
    text[n if n > 0 else 0] = 0
    return n


cdef void read_file(const char* path, char* text, size_t room) noexcept nogil:
    """Reads the beginning of a file into `text`; the empty string if the file cannot be read."""
    cdef int fd = open_file(path, O_RDONLY | O_CLOEXEC)
    read_text(fd, text, room)
    close_if_open(fd)


cdef long long file_number(const char* path, int field) noexcept nogil:
    """A file begins with numbers: returns the one with the index `field`; -1 if the file has fewer numbers."""
    cdef char text[256]
    cdef char* begin = text
    cdef char* end = text
    cdef long long value = -1
    read_file(path, text, sizeof(text))
    for _ in range(field + 1):
        begin = end
        value = strtoll(begin, &end, 10)
    return -1 if end == begin else value


cdef long long named_number(const char* path, const char* name) noexcept nogil:
    """A line of a file is `name` and a number: returns the number; -1 if the first 8 KiB have no such line."""
    cdef char text[8192]
    cdef char* line = text
    cdef size_t length = strlen(name)
    read_file(path, text, sizeof(text))
    while line != NULL:
        if strncmp(line, name, length) == 0:
            return strtoll(line + length, NULL, 10)
        line = strchr(line, c"\n")
        line = line + 1 if line != NULL else NULL
    return -1


cdef long long count_mappings() noexcept nogil:
    """The number of mappings of this process; -1 if unknown."""
    cdef char text[4096]
    cdef long long lines = 0
    cdef ssize_t n, i
    cdef int fd = open_file("/proc/self/maps", O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return -1
    while True:
        n = read_text(fd, text, sizeof(text))
        if n <= 0:
            break
        for i in range(n):
            lines += text[i] == c"\n"
    close(fd)
    return lines


cdef bint too_much(size_t size) noexcept nogil:
    """Whether a commit of `size` bytes exceeds all memory and swap, and vm.overcommit_memory is 0.

    Linux refuses such a commit, but not in a mapping with MAP_NORESERVE. Sizes below 64 MiB are never too much.
    """
    cdef sysinfo_t machine
    if size < <size_t>1 << 26 or sysinfo(&machine):
        return False
    return (size // machine.mem_unit > machine.totalram + machine.totalswap
            and file_number("/proc/sys/vm/overcommit_memory", 0) == 0)


cdef unsigned long long soft_limit(int resource) noexcept nogil:
    cdef rlimit limit
    if getrlimit(resource, &limit) or limit.rlim_cur == <unsigned long>RLIM_INFINITY:
        return NO_LIMIT
    return limit.rlim_cur


cdef long long huge_page() noexcept nogil:
    """Bytes in a transparent huge page; 0 if the kernel does not use huge pages on request."""
    cdef char text[64]
    if not ON_LINUX:
        return 0
    read_file("/sys/kernel/mm/transparent_hugepage/enabled", text, sizeof(text))
    if text[0] == 0 or strstr(text, "[never]") != NULL:
        return 0
    return max(0, file_number("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", 0))


cdef size_t physical_memory() noexcept nogil:
    """Bytes of memory of the machine or of the control group, the smaller number; 0 if unknown."""
    cdef long long pages = sysconf(_SC_PHYS_PAGES)
    cdef long long limit = file_number("/sys/fs/cgroup/memory.max", 0)
    cdef size_t bytes = <size_t>pages * real_page if pages > 0 else 0
    return <size_t>limit if limit > 0 and (bytes == 0 or <size_t>limit < bytes) else bytes


cdef bint on_signal_stack() noexcept nogil:
    cdef stack_t now
    return sigaltstack(NULL, &now) == 0 and (now.ss_flags & SS_ONSTACK) != 0


cdef void address_space(size_t* total, size_t* left) noexcept nogil:
    cdef unsigned long long limit = soft_limit(RLIMIT_AS), used
    total[0] = left[0] = <size_t>1 << caps.address_bits
    if limit < total[0]:
        used = max(0, file_number("/proc/self/statm", 0)) * real_page
        left[0] = limit - used if limit > used else 0


cdef bint exceeds(int resource, int field, size_t size, unsigned long long* limit,
                  unsigned long long* used) noexcept nogil:
    """-> the limit, and the bytes that count against it: the number in /proc/self/statm with the index `field`, in
    pages. Returns whether `size` bytes more exceed the limit; True also if the number is unknown."""
    cdef long long pages = file_number("/proc/self/statm", field)
    limit[0] = soft_limit(resource)
    used[0] = <unsigned long long>max(0, pages) * real_page
    return limit[0] != NO_LIMIT and (pages < 0 or used[0] + size > limit[0])


cdef void limit_text(int code, size_t size, char* text, size_t room) noexcept nogil:
    cdef unsigned long long limit = 0, in_use = 0
    cdef long long used, most
    text[0] = 0
    if code == EFBIG and soft_limit(RLIMIT_FSIZE) != NO_LIMIT:
        snprintf(text, room, "RLIMIT_FSIZE (ulimit -f) is %llu bytes", soft_limit(RLIMIT_FSIZE))
    if code == EMFILE:
        snprintf(text, room, "RLIMIT_NOFILE (ulimit -n) is %llu, and linmem leaves a quarter of it to the program",
                 soft_limit(RLIMIT_NOFILE))
    if code != ENOMEM:
        return
    if size >> caps.address_bits:
        snprintf(text, room, "user addresses have %d bits", caps.address_bits)
        return
    if exceeds(RLIMIT_AS, 0, size, &limit, &in_use):
        snprintf(text, room, "RLIMIT_AS (ulimit -v) is %llu bytes and %llu are in use", limit, in_use)
        return
    if exceeds(RLIMIT_DATA, 5, size, &limit, &in_use):
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
        snprintf(text, room, "no limit of this process is reached: the machine has less memory"
                             " (vm.overcommit_memory is 0), or the address space is full")


cdef int at_fork(void (*before)() noexcept nogil, void (*in_parent)() noexcept nogil,
                 void (*in_child)() noexcept nogil) noexcept nogil:
    return pthread_atfork(before, in_parent, in_child)


cdef void yield_processor() noexcept nogil:
    sched_yield()


cdef void sleep_ns(long long ns) noexcept nogil:
    cdef timespec t
    t.tv_sec = ns // 1000000000
    t.tv_nsec = <long>(ns % 1000000000)
    nanosleep(&t, NULL)         # a signal ends the sleep early; every caller checks its condition again


cdef inline long long nanoseconds(int clock) noexcept nogil:
    cdef timespec t
    clock_gettime(clock, &t)
    return <long long>t.tv_sec * 1000000000 + t.tv_nsec


cdef long long clock_ns() noexcept nogil:
    return nanoseconds(CLOCK_MONOTONIC)


cdef long long coarse_ns() noexcept nogil:
    return nanoseconds(CLOCK_MONOTONIC_COARSE)


cdef long long utc_ns() noexcept nogil:
    return nanoseconds(CLOCK_REALTIME)


# -- functions for Python ------------------------------------------------------------------------

def os_error_args(int code, text):
    """The arguments with which OSError has `code` as its errno."""
    return code, text


def die_quietly():
    """From now on a memory fault ends this process at once: no core file."""
    cdef rlimit none
    none.rlim_cur = none.rlim_max = 0
    if setrlimit(RLIMIT_CORE, &none):
        raise OSError(errno, "RLIMIT_CORE cannot be lowered")


def _limits():
    numbers = {"RLIMIT_AS": soft_limit(RLIMIT_AS),
               "RLIMIT_DATA": soft_limit(RLIMIT_DATA),
               "vm.max_map_count": file_number("/proc/sys/vm/max_map_count", 0),
               "vm.overcommit_memory": file_number("/proc/sys/vm/overcommit_memory", 0)}
    return {name: number for name, number in numbers.items() if number not in (NO_LIMIT, -1)}


cdef _start():
    global real_page, scan_way, best_scan_way
    cdef void* p
    real_page = _os.sysconf("SC_PAGE_SIZE")
    caps.page_size = _page_size_wanted(real_page)
    caps.granularity = caps.page_size
    caps.file_page = real_page
    caps.moves = ON_LINUX
    caps.reports_faults = CAN_REPORT_FAULTS
    caps.discard_any_protection = ON_LINUX
    caps.locked = EINVAL if ON_LINUX else 0
    p = mmap(NULL, real_page, PROT_READ | PROT_WRITE, MAP_FRESH, -1, 0)
    if p == MAP_FAILED:
        raise OSError(errno, "linmem cannot map one page")
    # Linux places mappings from the top down, so this address has as many bits as the highest address.
    caps.address_bits = bits_of(<size_t>p) if ON_LINUX else 47
    caps.names = True
    caps.names = set_name(p, real_page) == 0
    # In qemu's user mode every advice succeeds, also one that no kernel knows (-1), and most have no effect.
    caps.populates = (ON_LINUX and madvise(p, real_page, -1) != 0
                      and madvise(p, real_page, MADV_POPULATE_WRITE) == 0)
    munmap(p, real_page)
    scan_way = best_scan_way = scan_start()
    caps.scans = scan_way != SCAN_NONE
    _start_images()
    caps.shares = caps.adopts_files = can_share()
    caps.huge_page = huge_page()
    caps.memory = physical_memory()
    caps.mappings = max(0, file_number("/proc/sys/vm/max_map_count", 0))


_start()
