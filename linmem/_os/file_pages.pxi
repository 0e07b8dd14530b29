# The pages of files that memories map and write through; a part of posix.pyx.

from libc.errno cimport EBADF, EDQUOT, EFBIG, EOPNOTSUPP, ETIMEDOUT
from posix.fcntl cimport O_NOCTTY, O_NONBLOCK, O_WRONLY
from posix.stat cimport stat as status_of_path

cdef size_t ALLOCATION_STEP = 1 << 26       # bytes in one fallocate(); a signal makes the kernel undo one call


cdef int os_file_begin(char* addr, size_t size, details* more) noexcept nogil:
    cdef file_pages* file = more.file
    cdef int fd = open_memory() if best_image_kind == IMAGE_SEALED else -1
    cdef struct_stat about
    cdef int reader = -1, code
    file.kind = FILE_SEALED if fd >= 0 else FILE_PLAIN
    file.writable = True
    if fd < 0:
        code = begin_file(size, &fd, &reader)
        close_if_open(reader)
    else:
        # F_SEAL_SEAL: no process can add a seal later, against growth or writing.
        code = errno if fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_SEAL) else extend_sealed(fd, 0, size, False)
    if code == 0 and fstat(fd, &about):
        code = errno
    if code == 0 and too_many_descriptors(fd):
        code = EMFILE
    if code:
        close_if_open(fd)
        return code
    file.handle = fd
    set_identity(file, &about)
    return 0


cdef inline void set_identity(file_pages* file, const struct_stat* about) noexcept nogil:
    file.device = <unsigned long long>about.st_dev
    file.inode = <unsigned long long>about.st_ino


cdef int os_file_adopt(char* addr, size_t size, details* more) noexcept nogil:
    cdef file_pages* file = more.file
    cdef struct_stat about
    cdef int flags, code = 0
    cdef int given = <int>file.handle
    # A program may write to 0, 1 and 2 as its standard streams, so no memory keeps one of these descriptors.
    cdef int fd = given if more.takes and given > 2 else fcntl(given, F_DUPFD_CLOEXEC, 3)
    file.handle = -1
    if fd < 0:
        return errno
    flags = fcntl(fd, F_GETFL)
    if flags < 0 or fstat(fd, &about):
        code = errno
    elif flags & O_ACCMODE == O_WRONLY:
        code = EACCES
    elif not S_ISREG(about.st_mode):
        code = ENODEV
    if code:
        if fd != given:
            close(fd)
        return code
    if more.takes and fd != given:
        close(given)
    file.handle = fd
    set_identity(file, &about)
    file.writable = flags & O_ACCMODE == O_RDWR
    file.kind = kind_of_file(fd)
    return 0


cdef int kind_of_file(int fd) noexcept nogil:
    cdef int seals = fcntl(fd, F_GET_SEALS) if ON_LINUX else -1
    return FILE_SEALED if seals >= 0 and seals & F_SEAL_SHRINK else FILE_PLAIN


cdef int file_reach(unsigned long long pid, unsigned long long descriptor, file_pages* out,
                    size_t* length) noexcept nogil:
    cdef char path[64]
    cdef struct_stat about
    cdef int fd, code = 0
    if descriptor > 0x7fffffff:
        return EBADF
    if pid == <unsigned long long>getpid():
        fd = fcntl(<int>descriptor, F_DUPFD_CLOEXEC, 3)         # opens nothing, so it is faster
    else:
        snprintf(path, sizeof(path), "/proc/%llu/fd/%llu", pid, descriptor)
        if status_of_path(path, &about):
            return errno
        if not has_identity(out, &about):
            return FILE_FOREIGN
        fd = open_file(path, O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)
    if fd < 0:
        return errno
    # The process may have closed the descriptor, and used its number again, since stat().
    if fstat(fd, &about):
        code = errno
    elif not has_identity(out, &about):
        code = FILE_FOREIGN
    if code:
        close(fd)
        return code
    out.handle, out.kind, out.writable, out.only_writer = fd, kind_of_file(fd), True, False
    length[0] = <size_t>about.st_size
    if fd <= 2:         # see os_file_adopt()
        out.handle = fcntl(fd, F_DUPFD_CLOEXEC, 3)
        code = errno if out.handle < 0 else 0
        close(fd)
    return code


cdef inline bint has_identity(const file_pages* file, const struct_stat* about) noexcept nogil:
    return (S_ISREG(about.st_mode) and <unsigned long long>about.st_dev == file.device
            and <unsigned long long>about.st_ino == file.inode)


def open_descriptor_of(pid, descriptor, device, inode):
    """A new descriptor of the file that a descriptor of a process shows; None if that is not the file `inode` of
    `device`."""
    cdef file_pages file
    cdef unsigned long long of = pid, number = descriptor
    cdef size_t length
    cdef int code
    file.device, file.inode = device, inode
    with nogil:
        code = file_reach(of, number, &file, &length)
    if code == FILE_FOREIGN:
        return None
    if code:
        raise OSError(code, code_text(code).decode())
    return file.handle


cdef int os_file_copy(char* addr, size_t size, details* more) noexcept nogil:
    more.file.handle = fcntl(<int>more.file.handle, F_DUPFD_CLOEXEC, 3)
    return errno if more.file.handle < 0 else 0


cdef void file_drop(file_pages* file) noexcept nogil:
    close_if_open(<int>file.handle)
    file.handle = -1


cdef int os_file_size(char* addr, size_t size, details* more) noexcept nogil:
    cdef file_pages* file = more.file
    cdef struct_stat about
    if fstat(<int>file.handle, &about):
        return errno
    more.bytes[0] = <size_t>about.st_size
    return 0


cdef int os_file_read(char* addr, size_t size, details* more) noexcept nogil:
    cdef size_t done = 0
    cdef ssize_t n = 1
    while done < size and n:
        n = pread(<int>more.file.handle, addr + done, size - done, <off_t>(more.position + done))
        if n >= 0:
            done += <size_t>n
        elif errno != EINTR:
            return FILE_FOREIGN if errno == EBADF else errno
    memset(addr + done, 0, size - done)
    return 0


cdef int os_file_extend(char* addr, size_t size, details* more) noexcept nogil:
    cdef file_pages* file = more.file
    cdef struct_stat about
    cdef size_t now
    cdef int code
    if fstat(<int>file.handle, &about):
        return errno
    now = <size_t>about.st_size
    if now >= size:
        return 0
    if file.kind == FILE_SEALED:
        return extend_sealed(<int>file.handle, now, size, more.allocate)
    code = refuse_length(size) or allocate_steps(<int>file.handle, now, size - now, size - now)
    if code == 0:
        # Sets the length, but never to less than it is now.
        code = allocate_space(<int>file.handle, 0, size - 1, 1)
        if code and file.only_writer:
            code = set_length(file, size)
    if code and file.only_writer:
        set_length(file, now)       # gives back what was allocated past the end
    return code


cdef int extend_sealed(int fd, size_t now, size_t size, bint allocate) noexcept nogil:
    cdef struct_stat about
    cdef int code = refuse_length(size)
    if code:
        return code
    if too_much(size - now):
        return ENOMEM
    # If vm.overcommit_memory is 2, the kernel may have no memory for a page when it is touched, and that is a SIGBUS.
    if allocate or file_number("/proc/sys/vm/overcommit_memory", 0) == 2:
        return allocate_steps(fd, now, size - now, size - now) or allocate_space(fd, 0, size - 1, 1)
    if ftruncate(fd, <off_t>size) == 0:
        return 0
    # The kernel refuses to shrink a sealed file: another process has extended the file further meanwhile.
    code = errno
    return 0 if code == EPERM and fstat(fd, &about) == 0 and <size_t>about.st_size >= size else code


cdef int refuse_length(size_t size) noexcept nogil:
    # At this limit the kernel would send SIGXFSZ. Python ignores this signal, but other programs may not.
    return EFBIG if <long long>size < 0 or size > <size_t>soft_limit(RLIMIT_FSIZE) else 0


cdef int set_length(file_pages* file, size_t size) noexcept nogil:
    while ftruncate(<int>file.handle, <off_t>size):
        if errno != EINTR:
            return errno
    return 0


cdef int allocate_space(int fd, int mode, size_t position, size_t size) noexcept nogil:
    while fallocate(fd, mode, <off_t>position, <off_t>size):
        if errno != EINTR:
            return errno
    return 0


cdef int allocate_steps(int fd, size_t position, size_t size, size_t missing) noexcept nogil:
    """missing: how many bytes of the range have no space yet."""
    cdef size_t done = 0, step
    cdef int code = refuse_allocation(fd, missing)
    while done < size and code == 0:
        step = min(size - done, ALLOCATION_STEP)
        code = allocate_space(fd, FALLOC_FL_KEEP_SIZE, position + done, step)
        done += step
    return code


cdef int refuse_allocation(int fd, size_t size) noexcept nogil:
    """The kernel fills a file system, and memory, up to the last page before it refuses, and may end processes before
    it refuses. So linmem asks first."""
    cdef statfs_t about
    if not ON_LINUX or fstatfs(fd, &about):
        return 0
    # A file system that reports 0 blocks has no limit.
    if about.f_blocks and size // <size_t>about.f_bsize > <size_t>about.f_bavail:
        return ENOSPC
    return ENOMEM if <unsigned long>about.f_type == TMPFS_MAGIC and exceeds_free_memory(size) else 0


cdef bint exceeds_free_memory(size_t size) noexcept nogil:
    """Whether the machine or the control group has less memory for `size` bytes that stay in memory. The files below
    take microseconds to read, so small sizes are compared with the unused memory first."""
    cdef sysinfo_t machine
    cdef long long free_kb, swap_kb, limit
    if size < ALLOCATION_STEP and sysinfo(&machine) == 0 and size // machine.mem_unit < machine.freeram // 2:
        return False
    free_kb = named_number("/proc/meminfo", "MemAvailable:")
    swap_kb = named_number("/proc/meminfo", "SwapFree:")
    if free_kb >= 0 and size >> 10 >= <size_t>(free_kb + max(0, swap_kb)):
        return True
    limit = file_number("/sys/fs/cgroup/memory.max", 0)
    if limit < 0:
        return False        # "max", or no such file
    # The kernel takes the pages of files back that were not used for a while.
    limit -= file_number("/sys/fs/cgroup/memory.current", 0)
    limit += max(0, named_number("/sys/fs/cgroup/memory.stat", "inactive_file"))
    return limit < 0 or size > <size_t>limit


cdef int os_file_allocate(char* addr, size_t size, details* more) noexcept nogil:
    cdef file_pages* file = more.file
    cdef struct_stat about
    cdef size_t has
    if fstat(<int>file.handle, &about):
        return errno
    has = <size_t>about.st_blocks * 512
    return allocate_steps(<int>file.handle, more.position, size, 0 if has > size else size - has)


cdef int os_file_cut(char* addr, size_t size, details* more) noexcept nogil:
    return set_length(more.file, size)


cdef int os_file_map(char* addr, size_t size, details* more) noexcept nogil:
    cdef file_pages* file = more.file
    cdef int code
    if mmap(addr, size, PROTECTIONS[more.access], MAP_SHARED | MAP_NORESERVE | MAP_FIXED, <int>file.handle,
            <off_t>more.position) != MAP_FAILED:
        return 0
    # As in os_move(): the kernel may have unmapped the range before it refused. No other mapping may get in there.
    code = errno
    mmap(addr, size, PROT_NONE, MAP_FRESH | MAP_FIXED_NOREPLACE, -1, 0)
    return code


cdef int os_file_place(char* addr, size_t size, details* more) noexcept nogil:
    return ENOSYS       # there are no sections: file_map() maps files


cdef int os_file_show(char* addr, size_t size, details* more) noexcept nogil:
    return map_anywhere(size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, <int>more.file.handle,
                        <off_t>more.position, more.base)


cdef int os_file_discard(char* addr, size_t size, details* more) noexcept nogil:
    cdef file_pages* file = more.file
    return allocate_space(<int>file.handle, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, more.position,
                          size)


cdef int os_file_data(char* addr, size_t size, details* more) noexcept nogil:
    cdef off_t data, hole
    cdef size_t limit = more.position + size
    more.start[0] = more.end[0] = limit
    data = lseek(<int>more.file.handle, <off_t>more.position, SEEK_DATA)
    if data < 0:
        return 0 if errno == ENXIO else errno
    if <size_t>data >= limit:
        return 0
    hole = lseek(<int>more.file.handle, data, SEEK_HOLE)
    if hole < 0:
        return errno
    more.start[0] = <size_t>data
    more.end[0] = min(<size_t>hole, limit)
    return 0


cdef int wait_while_equal(int* word, int value, long long ns) noexcept nogil:
    cdef timespec most
    most.tv_sec = ns // 1000000000
    most.tv_nsec = <long>(ns % 1000000000)
    if futex(word, FUTEX_WAIT, value, &most) == 0 or errno == EAGAIN or errno == EINTR or errno == ETIMEDOUT:
        return 0
    return errno


cdef int wake_waiters(int* word, int n, int* woken) noexcept nogil:
    cdef long found = futex(word, FUTEX_WAKE, n, NULL)
    woken[0] = <int>found
    return errno if found < 0 else 0


cdef int os_file_flush(char* addr, size_t size) noexcept nogil:
    return errno if msync(addr, size, MS_SYNC) else 0


cdef int os_file_sync(char* addr, size_t size, details* more) noexcept nogil:
    cdef file_pages* file = more.file
    return errno if fdatasync(<int>file.handle) else 0


cdef bint can_share() noexcept nogil:
    """Whether this machine makes a file that grows, and maps it past its end."""
    cdef file_pages probe
    cdef char* p = NULL
    cdef size_t page = caps.page_size
    cdef bint works = False
    if not ON_LINUX or file_begin(page, 2 * page, NULL, &probe):
        return False
    if reserve(2 * page, False, &p) == 0:
        works = (file_map(&probe, 0, p, 2 * page, ACCESS_NONE) == 0 and file_extend(&probe, 2 * page, False) == 0
                 and commit(p, 2 * page) == 0)
        release(p, 2 * page)
    file_drop(&probe)
    return works
