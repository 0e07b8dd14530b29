# The pages of images: memory that can be sealed, a file without a name, or private pages; a part of posix.pyx.
#
# Every kind is mapped privately, never shared. Kernels before 6.7 refuse a shared mapping of sealed memory even for
# reading, and a reader sees no difference.

from libc.errno cimport EIO, EINTR, EMFILE, ENAMETOOLONG, ENODEV, ENOSPC, ENXIO
from libc.stdlib cimport getenv
from libc.string cimport memcmp, memcpy
from posix.stat cimport S_ISREG, fstat, struct_stat
from posix.stdlib cimport mkstemp

cdef int SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE
cdef size_t IO_STEP = 1 << 30       # bytes in one read or write; a kernel does at most 2 GiB
cdef size_t FETCH_STEP = 128 << 10  # bytes in one MADV_WILLNEED; a kernel reads at most the readahead of the device


cdef int os_image_begin(image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil:
    # The OS may refuse sealed memory or a file for this image only (few descriptors are left, the size of files is
    # limited). Then the loop tries the next kind. The caller sees no difference except speed.
    cdef int kind = image_kind
    while kind != IMAGE_PRIVATE:
        if begin_with_descriptor(kind, size, img) == 0:
            return 0
        kind = IMAGE_FILE if kind == IMAGE_SEALED else IMAGE_PRIVATE
    return begin_private(img)


cdef int begin_private(image_pages* img) noexcept nogil:
    cdef int code
    if too_much(img.size):
        return ENOMEM
    code = map_anywhere(img.size, PROT_READ | PROT_WRITE, MAP_FRESH, -1, 0, &img.bytes)
    if code == 0:
        set_name(img.bytes, img.size)
        img.kind, img.maps, img.handle, img.position = IMAGE_PRIVATE, False, -1, 0
    return code


cdef int begin_with_descriptor(int kind, size_t size, image_pages* img) noexcept nogil:
    cdef int fd = -1, reader = -1, code = 0
    if kind == IMAGE_FILE:
        code = begin_file(size, &fd, &reader)
    else:
        fd = open_memory()
        code = errno if fd < 0 or ftruncate(fd, <off_t>size) else 0
    if code == 0 and too_many_descriptors(reader if kind == IMAGE_FILE else fd):
        code = EMFILE
    if code:
        close_if_open(reader)
        close_if_open(fd)
        return code
    img.kind = kind
    img.maps = True
    img.handle = fd
    img.position = reader if kind == IMAGE_FILE else 0      # a file's read-only descriptor, until image_end()
    return 0


cdef int open_memory() noexcept nogil:
    """A descriptor of new memory that can be sealed; -1 and errno."""
    # Kernels since 6.3 log a warning without MFD_NOEXEC_SEAL; older kernels refuse this flag.
    cdef int fd = memfd_create(NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL)
    if fd < 0 and errno == EINVAL:
        fd = memfd_create(NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING)
    return fd


cdef int begin_file(size_t size, int* fd, int* reader) noexcept nogil:
    cdef const char* chosen = getenv("TMPDIR")
    cdef int code = ENOSYS
    if ON_LINUX:
        code = begin_file_in("/dev/shm", size, fd, reader)      # a file in /dev/shm is in physical memory
    if code and chosen != NULL and chosen[0] == c"/":
        code = begin_file_in(chosen, size, fd, reader)
    return begin_file_in("/tmp", size, fd, reader) if code else 0


cdef int begin_file_in(const char* directory, size_t size, int* fd, int* reader) noexcept nogil:
    """Opens a new file without a name, with `size` bytes of zeros, and a second descriptor that can only read."""
    cdef int code = open_nameless(directory, fd, reader)
    if code == 0:
        code = set_file_size(fd[0], size)
    if code:
        close_if_open(fd[0])
        close_if_open(reader[0])
        fd[0] = reader[0] = -1
    return code


cdef int open_nameless(const char* directory, int* fd, int* reader) noexcept nogil:
    cdef char path[4096]
    cdef int code
    if ON_LINUX and O_TMPFILE:
        fd[0] = open_file(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0o600)
        if fd[0] >= 0:
            snprintf(path, sizeof(path), "/proc/self/fd/%d", fd[0])
            reader[0] = open_file(path, O_RDONLY | O_CLOEXEC)
            if reader[0] >= 0:
                return 0
            close(fd[0])
    if snprintf(path, sizeof(path), "%s/linmem-XXXXXX", directory) >= <int>sizeof(path):
        fd[0] = -1
        return ENAMETOOLONG
    fd[0] = mkstemp(path)
    if fd[0] < 0:
        return errno
    fcntl(fd[0], F_SETFD, FD_CLOEXEC)
    reader[0] = open_file(path, O_RDONLY | O_CLOEXEC)
    code = errno if reader[0] < 0 else 0
    unlink(path)
    return code


cdef int set_file_size(int fd, size_t size) noexcept nogil:
    """Makes the file `size` bytes long. No read of the file fails afterwards.

    A memory file system takes a page when a hole is read. If the file system is full then, SIGBUS kills the reader. So
    this function takes all pages of the file.
    """
    cdef statfs_t about
    if ftruncate(fd, <off_t>size):
        return errno
    # A tmpfs that reports 0 blocks has no size limit.
    if ON_LINUX and fstatfs(fd, &about) == 0 and <unsigned long>about.f_type == TMPFS_MAGIC and about.f_blocks:
        if size > <size_t>about.f_bavail * <size_t>about.f_bsize // 2:
            return ENOSPC       # half of the room is for other programs
        return posix_fallocate(fd, 0, <off_t>size)
    return 0


cdef bint too_many_descriptors(int fd) noexcept nogil:
    """Whether three quarters of the descriptors are in use: linmem leaves the rest to the program. The kernel gives a
    new descriptor the lowest free number."""
    cdef unsigned long long limit = soft_limit(RLIMIT_NOFILE)
    return limit != NO_LIMIT and <unsigned long long>fd >= limit // 4 * 3


cdef inline void close_if_open(int fd) noexcept nogil:
    if fd >= 0:
        close(fd)


cdef int os_image_write(image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil:
    cdef int code = 0
    if img.kind != IMAGE_PRIVATE:
        code = write_all(<int>img.handle, bytes, size, <off_t>offset)
        if code == 0:
            return 0
        # The file system is full, or a limit is reached. The image becomes private pages.
        if become_private(img):
            return code
    memcpy(img.bytes + offset, bytes, size)
    return 0


cdef int write_all(int fd, const char* bytes, size_t size, off_t offset) noexcept nogil:
    cdef ssize_t n
    while size:
        n = pwrite(fd, bytes, min(size, IO_STEP), offset)
        if n < 0 and errno == EINTR:
            continue
        if n <= 0:
            return EIO if n == 0 else errno
        bytes += n
        offset += n
        size -= <size_t>n
    return 0


cdef int become_private(image_pages* img) noexcept nogil:
    """Copies an image that is being written from its file to private pages, and closes the file."""
    cdef image_pages private = img[0]
    cdef int code = begin_private(&private)
    if code:
        return code
    code = read_data(<int>img.handle, private.bytes, img.size)
    image_drop(&private if code else img)
    if code == 0:
        img[0] = private
    return code


cdef int read_data(int fd, char* to, size_t size) noexcept nogil:
    """Reads the file into memory that is zero. Skips the holes, if the file system reports them."""
    cdef size_t offset = 0, end
    cdef off_t data, hole
    cdef ssize_t n
    while offset < size:
        end = size
        data = lseek(fd, <off_t>offset, SEEK_DATA)
        if data < 0 and errno == ENXIO:
            return 0
        hole = lseek(fd, data, SEEK_HOLE) if data >= 0 else -1
        if hole >= 0:
            offset = <size_t>data
            end = min(<size_t>hole, size)
        while offset < end:
            n = pread(fd, to + offset, min(end - offset, IO_STEP), <off_t>offset)
            if n < 0 and errno == EINTR:
                continue
            if n <= 0:
                return EIO if n == 0 else errno
            offset += <size_t>n
    return 0


cdef int os_image_end(image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil:
    cdef int reader = <int>(img.position if img.kind == IMAGE_FILE else img.handle)
    cdef int code
    if img.kind == IMAGE_PRIVATE:
        return errno if mprotect(img.bytes, size, PROT_READ) else 0
    if img.kind == IMAGE_SEALED and fcntl(reader, F_ADD_SEALS, SEALS):
        return errno
    code = map_anywhere(size, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, reader, 0, &img.bytes)
    if code == 0 and img.kind == IMAGE_FILE:
        close(<int>img.handle)
        img.handle, img.position = reader, 0
    return code


cdef int os_image_open(image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil:
    cdef int fd = fcntl(<int>img.handle, F_DUPFD_CLOEXEC, 3)
    cdef int code
    cdef struct_stat about
    if fd < 0:
        return errno
    code = kind_of_descriptor(fd, &img.kind, &about)
    if code == 0 and (img.position > about.st_size or size > <size_t>(about.st_size - img.position)):
        code = IMAGE_SHORT
    if code == 0:
        code = map_anywhere(size, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, fd, <off_t>img.position, &img.bytes)
    img.maps = code == 0 and not too_many_descriptors(fd)
    img.handle = fd if img.maps else -1
    if not img.maps:        # `bytes` stays mapped without a descriptor; memories of this image copy from `bytes`
        close(fd)
    return code


cdef int kind_of_descriptor(int fd, int* kind, struct_stat* about) noexcept nogil:
    """-> the IMAGE_ kind and the status of the file of a caller's descriptor. Returns 0, IMAGE_OPEN or a code."""
    cdef char path[64]
    cdef char target[16]
    cdef int seals = fcntl(fd, F_GET_SEALS) if ON_LINUX else -1
    cdef int flags = fcntl(fd, F_GETFL)
    if flags < 0 or fstat(fd, about):
        return errno
    if seals >= 0:
        if seals & F_SEAL_WRITE and seals & F_SEAL_SHRINK:
            kind[0] = IMAGE_SEALED
            return 0
        # A memfd without these seals may still be written to, so it is refused. F_GET_SEALS also succeeds for a file in
        # a tmpfs. Such a file cannot be sealed, and the code below handles it like any other file.
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd)
        if readlink(path, target, sizeof(target)) >= 7 and memcmp(target, b"/memfd:", 7) == 0:
            return IMAGE_OPEN
    if not S_ISREG(about.st_mode):
        return ENODEV
    kind[0] = IMAGE_FILE
    return 0 if flags & O_ACCMODE == O_RDONLY else IMAGE_OPEN


cdef void image_drop(image_pages* img) noexcept nogil:
    if img.bytes != NULL:
        os_release(img.bytes, img.size)     # if the kernel refuses, the bytes stay mapped and counted
    elif img.kind == IMAGE_FILE:
        close(<int>img.position)
    close_if_open(<int>img.handle)


cdef int os_image_map(image_pages* img, size_t offset, char* addr, size_t size) noexcept nogil:
    cdef void* p = mmap(addr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, <int>img.handle,
                        <off_t>img.position + <off_t>offset)
    return errno if p == MAP_FAILED else 0


cdef int os_window_map(char* addr, size_t size, details* more) noexcept nogil:
    cdef int kind = MAP_SHARED if more.written_through else MAP_PRIVATE
    cdef int code
    if mmap(addr, size, PROTECTIONS[more.access], kind | MAP_NORESERVE | MAP_FIXED, <int>more.handle,
            <off_t>more.position) != MAP_FAILED:
        return 0
    # As in os_move(): the kernel may have unmapped the range before it refused. No other mapping may get in there.
    code = errno
    if mmap(addr, size, PROT_READ | PROT_WRITE, MAP_FRESH | MAP_FIXED_NOREPLACE, -1, 0) != MAP_FAILED:
        set_name(addr, size)
        more.emptied[0] = True
    return code


cdef int os_image_renew(image_pages* img, size_t offset, char* addr, size_t size) noexcept nogil:
    # On Linux MADV_DONTNEED drops the written copies of a private file mapping.
    return os_discard(addr, size) if ON_LINUX else os_image_map(img, offset, addr, size)


cdef int os_image_fetch(char* addr, size_t size) noexcept nogil:
    # MADV_POPULATE_READ would wait for each read, and would read the neighbourhood of each page.
    cdef size_t offset = 0
    while offset < size:
        if madvise(addr + offset, min(size - offset, FETCH_STEP), MADV_WILLNEED):
            return errno
        offset += FETCH_STEP
    return 0


cdef _start_images():
    """Finds the best kind of image that this machine grants, with an image of one page."""
    global image_kind, best_image_kind
    cdef image_pages probe
    image_kind = IMAGE_SEALED
    best_image_kind = IMAGE_PRIVATE
    if image_begin(caps.page_size, &probe) == 0:
        if image_end(&probe) == 0:
            best_image_kind = probe.kind
        image_drop(&probe)
    choose_image(IMAGE_KINDS[best_image_kind])
