# The pages of images: memory that can be sealed, a file without a name, private pages; a part of posix.pyx.
#
# Each is mapped privately, never shared: kernels before 6.7 refuse a shared mapping of sealed memory even
# for reading, and to a reader the two are the same.

cdef extern from *:
    """
    #include <stdio.h>
    #include <sys/resource.h>
    #include <sys/stat.h>
    #if defined(__linux__)
    #include <sys/syscall.h>
    #include <sys/vfs.h>
    #define LINMEM_TMPFS 0x01021994
    #ifndef F_ADD_SEALS
    #define F_ADD_SEALS 1033
    #define F_GET_SEALS 1034
    #endif
    #ifndef O_TMPFILE
    #define O_TMPFILE 0
    #endif
    #define LINMEM_SEAL_SHRINK 2
    #define LINMEM_SEAL_WRITE 8
    #define LINMEM_SEALS (1 | LINMEM_SEAL_SHRINK | 4 | LINMEM_SEAL_WRITE)      /* 1: no other seals, 4: no growth */
    #endif

    /* -> a descriptor of memory that can be sealed, or -1. */
    static int linmem_image_memory(void) {
    #if defined(__linux__) && defined(SYS_memfd_create)
        /* 1: close on exec, 2: can be sealed, 8: never executable, which kernels since 6.3 want to be told. */
        int fd = (int)syscall(SYS_memfd_create, linmem_name, 1 | 2 | 8);
        if (fd < 0 && errno == EINVAL) fd = (int)syscall(SYS_memfd_create, linmem_name, 1 | 2);
        return fd;
    #else
        errno = ENOSYS;
        return -1;
    #endif
    }

    /* -> a descriptor of an empty file that no directory knows, and *reader: the same, for reading only; or -1. */
    static int linmem_image_file_in(const char *directory, int *reader) {
        char path[4096];
        int fd = -1, code;
    #if defined(__linux__)
        if (O_TMPFILE) fd = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
        if (fd >= 0) {
            snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
            *reader = open(path, O_RDONLY | O_CLOEXEC);
            if (*reader >= 0) return fd;
            close(fd);
        }
    #endif
        if (snprintf(path, sizeof path, "%s/linmem-XXXXXX", directory) >= (int)sizeof path) {
            errno = ENAMETOOLONG;
            return -1;
        }
        fd = mkstemp(path);
        if (fd < 0) return -1;
        (void)fcntl(fd, F_SETFD, FD_CLOEXEC);
        *reader = open(path, O_RDONLY | O_CLOEXEC);
        code = errno;
        (void)unlink(path);
        if (*reader >= 0) return fd;
        close(fd);
        errno = code;
        return -1;
    }

    /* -> 0 or an error: the file has `size` bytes, and reading them cannot fail. A read of a hole takes a page of a
       memory file system, and where that is full the reader dies of SIGBUS: there, all pages are taken now. */
    static int linmem_image_size(int fd, size_t size) {
        if (ftruncate(fd, (off_t)size) != 0) return errno;
    #if defined(__linux__)
        struct statfs about;
        /* One of no blocks has no bound. */
        if (fstatfs(fd, &about) == 0 && (unsigned long)about.f_type == LINMEM_TMPFS && about.f_blocks) {
            /* Zeros must not take what others need. */
            if (size > (unsigned long long)about.f_bavail * (unsigned long long)about.f_bsize / 2) return ENOSPC;
            return posix_fallocate(fd, 0, (off_t)size);
        }
    #endif
        return 0;
    }

    static int linmem_image_file_of(const char *directory, size_t size, int *reader) {
        int code, fd = linmem_image_file_in(directory, reader);
        if (fd < 0) return -1;
        code = linmem_image_size(fd, size);
        if (code == 0) return fd;
        close(fd);
        close(*reader);
        errno = code;
        return -1;
    }

    static int linmem_image_file(size_t size, int *reader) {
        const char *chosen = getenv("TMPDIR");
        int fd = -1;
    #if defined(__linux__)
        fd = linmem_image_file_of("/dev/shm", size, reader);        /* memory, where it is there and has room */
    #endif
        if (fd < 0 && chosen != NULL && chosen[0] == '/') fd = linmem_image_file_of(chosen, size, reader);
        return fd < 0 ? linmem_image_file_of("/tmp", size, reader) : fd;
    }

    /* Whether so many descriptors are open that the rest is for others: a new one has the lowest free number. */
    static int linmem_image_too_many(int fd) {
        struct rlimit limit;
        if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return 0;
        return (rlim_t)fd >= limit.rlim_cur / 4 * 3;
    }

    /* What was written to the file so far, into memory that is zero. */
    static int linmem_image_read(int fd, char *to, size_t size) {
        size_t at = 0, end;
        while (at < size) {
            end = size;
    #if defined(SEEK_DATA) && defined(SEEK_HOLE)
            off_t data = lseek(fd, (off_t)at, SEEK_DATA), hole;
            if (data < 0 && errno == ENXIO) return 0;
            hole = data < 0 ? -1 : lseek(fd, data, SEEK_HOLE);
            if (hole >= 0) {
                at = (size_t)data;
                end = (size_t)hole < size ? (size_t)hole : size;
            }
    #endif
            while (at < end) {
                ssize_t n = pread(fd, to + at, end - at < ((size_t)1 << 30) ? end - at : (size_t)1 << 30, (off_t)at);
                if (n < 0 && errno == EINTR) continue;
                if (n <= 0) return n == 0 ? EIO : errno;
                at += (size_t)n;
            }
        }
        return 0;
    }

    static int linmem_image_write(int fd, const char *bytes, size_t size, long long at) {
        while (size) {
            ssize_t n = pwrite(fd, bytes, size < ((size_t)1 << 30) ? size : (size_t)1 << 30, (off_t)at);
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) return n == 0 ? EIO : errno;
            bytes += n;
            at += n;
            size -= (size_t)n;
        }
        return 0;
    }

    static int linmem_image_seal(int fd) {
    #if defined(__linux__)
        return fcntl(fd, F_ADD_SEALS, LINMEM_SEALS) == 0 ? 0 : errno;
    #else
        (void)fd;
        return ENOSYS;
    #endif
    }

    /* What a stranger's descriptor may be mapped as: an IMAGE_ kind, IMAGE_OPEN, or an error (*code). */
    static int linmem_image_kind_of(int fd, int sealed, int file, int open_, int *code) {
        struct stat about;
        int how;
    #if defined(__linux__)
        char path[64], target[16];
        int seals = fcntl(fd, F_GET_SEALS);
        if (seals >= 0 && (seals & LINMEM_SEAL_WRITE) && (seals & LINMEM_SEAL_SHRINK)) return sealed;
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        /* A file of a memory file system answers to seals, too, and cannot be sealed. */
        if (seals >= 0 && readlink(path, target, sizeof target) >= 7 && memcmp(target, "/memfd:", 7) == 0) return open_;
    #else
        (void)sealed;
    #endif
        how = fcntl(fd, F_GETFL);
        if (how < 0 || fstat(fd, &about) != 0) {
            *code = errno;
            return 0;
        }
        if (!S_ISREG(about.st_mode)) {
            *code = ENODEV;
            return 0;
        }
        return (how & O_ACCMODE) == O_RDONLY ? file : open_;
    }

    static int linmem_image_too_short(int fd, long long position, size_t size, int *code) {
        struct stat about;
        if (fstat(fd, &about) != 0) {
            *code = errno;
            return 1;
        }
        return position > about.st_size || size > (unsigned long long)(about.st_size - position);
    }

    static void *linmem_image_view(int fd, long long position, size_t size, void *at) {
        return at == NULL ? mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, fd, (off_t)position)
            : mmap(at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, fd, (off_t)position);
    }
    static int linmem_image_duplicate(int fd) { return fcntl(fd, F_DUPFD_CLOEXEC, 3); }
    """
    int ENOSPC, EMFILE, ENFILE, EBADF, ENODEV
    bint image_too_many "linmem_image_too_many"(int fd) noexcept nogil
    int image_read "linmem_image_read"(int fd, char* to, size_t size) noexcept nogil
    int image_memory "linmem_image_memory"() noexcept nogil
    int image_file "linmem_image_file"(size_t size, int* reader) noexcept nogil
    int image_write_ "linmem_image_write"(int fd, const char* bytes, size_t size, long long at) noexcept nogil
    int image_seal "linmem_image_seal"(int fd) noexcept nogil
    int image_kind_of "linmem_image_kind_of"(int fd, int sealed, int file, int open_, int* code) noexcept nogil
    bint image_too_short "linmem_image_too_short"(int fd, long long position, size_t size, int* code) noexcept nogil
    void* image_view "linmem_image_view"(int fd, long long position, size_t size, void* at) noexcept nogil
    int image_duplicate "linmem_image_duplicate"(int fd) noexcept nogil
    int ftruncate(int fd, long long size) noexcept nogil
    int close_descriptor "close"(int fd) noexcept nogil


from libc.string cimport memcpy, memset

cdef int best_image_kind


cdef int image_begin(size_t size, image_pages* out) noexcept nogil:
    # Where memory that can be sealed is refused for this once (few descriptors are left, a limit on the size
    # of files), the next kind may do: the caller sees no difference but in speed.
    cdef int code = injected()
    cdef int kind = image_kind
    memset(out, 0, sizeof(image_pages))
    out.handle = -1
    out.size = size
    if code:
        return code
    while kind != IMAGE_PRIVATE:
        if image_begin_file(kind, size, out) == 0:
            return 0
        kind = IMAGE_FILE if kind == IMAGE_SEALED else IMAGE_PRIVATE
    return image_begin_private(size, out)


cdef int image_begin_private(size_t size, image_pages* out) noexcept nogil:
    cdef void* p
    cdef int code
    if too_much(size):
        return ENOMEM
    count_reserved(size)
    p = map_(NULL, size, PROT_READ | PROT_WRITE, False)
    if p == MAP_FAILED:
        code = errno
        count_released(size)
        return code
    if caps.names:
        set_name(p, size)
    out.kind = IMAGE_PRIVATE
    out.bytes = <char*>p
    return 0


cdef int image_begin_file(int kind, size_t size, image_pages* out) noexcept nogil:
    cdef int reader = -1
    cdef int fd = image_memory() if kind == IMAGE_SEALED else image_file(size, &reader)
    cdef int code = 0
    if fd < 0:
        return errno
    if image_too_many(reader if kind == IMAGE_FILE else fd):     # the descriptor that stays
        code = EMFILE
    elif kind == IMAGE_SEALED and ftruncate(fd, <long long>size):
        code = errno
    if code:
        if reader >= 0:
            close_descriptor(reader)
        close_descriptor(fd)
        return code
    out.kind = kind
    out.maps = True
    out.handle = fd
    # Until image_end() the reader of a file waits here.
    out.position = reader if kind == IMAGE_FILE else 0
    return 0


cdef int image_write(image_pages* into, size_t offset, const char* bytes, size_t size) noexcept nogil:
    cdef int code = injected()
    if code:
        return code
    if into.kind == IMAGE_PRIVATE:
        memcpy(into.bytes + offset, bytes, size)
        return 0
    code = image_write_(<int>into.handle, bytes, size, <long long>offset)
    # The file system is full, or a limit is reached: the pages become this process's own.
    if code and image_begin_private_again(into) == 0:
        memcpy(into.bytes + offset, bytes, size)
        code = 0
    return code


cdef int image_begin_private_again(image_pages* it) noexcept nogil:
    cdef image_pages made
    cdef int code
    memset(&made, 0, sizeof(image_pages))
    made.handle = -1
    made.size = it.size
    code = image_begin_private(it.size, &made)
    if code:
        return code
    code = image_read(<int>it.handle, made.bytes, it.size)
    if code:
        image_drop(&made)
        return code
    if it.kind == IMAGE_FILE:
        close_descriptor(<int>it.position)
    close_descriptor(<int>it.handle)
    it[0] = made
    return 0


cdef int image_end(image_pages* it) noexcept nogil:
    cdef int code = injected()
    cdef void* p
    if code:
        return code
    if it.kind == IMAGE_PRIVATE:
        return errno if mprotect(it.bytes, it.size, PROT_READ) else 0
    if it.kind == IMAGE_SEALED:
        code = image_seal(<int>it.handle)
        if code:
            return code
    else:
        close_descriptor(<int>it.handle)
        it.handle = it.position
        it.position = 0
    count_reserved(it.size)
    p = image_view(<int>it.handle, 0, it.size, NULL)
    if p == MAP_FAILED:
        code = errno
        count_released(it.size)
        if it.kind == IMAGE_FILE:       # image_drop() looks for a reader: there is but one descriptor now
            it.position = -1
        return code
    it.bytes = <char*>p
    return 0


cdef int image_open(int descriptor, long long position, size_t size, image_pages* out) noexcept nogil:
    cdef int code = injected()
    cdef int kind, fd
    cdef void* p
    memset(out, 0, sizeof(image_pages))
    if code:
        return code
    fd = image_duplicate(descriptor)
    if fd < 0:
        return errno
    kind = image_kind_of(fd, IMAGE_SEALED, IMAGE_FILE, IMAGE_OPEN, &code)
    if kind == IMAGE_OPEN:
        code = IMAGE_OPEN
    elif kind and image_too_short(fd, position, size, &code) and code == 0:
        code = IMAGE_SHORT
    if code == 0:
        count_reserved(size)
        p = image_view(fd, position, size, NULL)
        if p == MAP_FAILED:
            code = errno
            count_released(size)
    if code:
        close_descriptor(fd)
        return code
    out.kind = kind
    out.maps = not image_too_many(fd)
    out.handle = fd
    out.position = position
    out.bytes = <char*>p
    out.size = size
    if not out.maps:        # the mapping needs no descriptor; memories copy from it
        close_descriptor(fd)
        out.handle = -1
    return 0


cdef void image_drop(image_pages* it) noexcept nogil:
    if it.bytes != NULL:
        if munmap(it.bytes, it.size) == 0:      # a whole mapping: it splits none, so it should not be refused
            count_released(it.size)
    elif it.kind == IMAGE_FILE and it.position >= 0:
        close_descriptor(<int>it.position)
    if it.handle >= 0:
        close_descriptor(<int>it.handle)


cdef int image_map(const image_pages* it, size_t offset, char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    if code:
        return code
    return errno if image_view(<int>it.handle, it.position + <long long>offset, size, at) == MAP_FAILED else 0


cdef int image_renew(const image_pages* it, size_t offset, char* at, size_t size) noexcept nogil:
    if not ON_LINUX:
        return image_map(it, offset, at, size)
    return discard(at, size)        # MADV_DONTNEED, which for a file's pages means just this


cdef int blank(char* at, size_t size) noexcept nogil:
    cdef int code = injected()
    if code:
        return code
    if map_(at, size, PROT_READ | PROT_WRITE, True) == MAP_FAILED:
        return errno
    if caps.names:
        set_name(at, size)
    return 0


def choose_image(kind):
    """What image_begin() makes from now on: "sealed", "file" or "private"; returns what it did. Tests only.

    ValueError where that does not work here.
    """
    global image_kind
    kinds = {name: n for n, name in IMAGE_KINDS.items() if n != IMAGE_SECTION}
    if kinds.get(kind, 0) < best_image_kind:
        raise ValueError(f"kind must be one that works here, got {kind!r}")
    before = IMAGE_KINDS[image_kind]
    image_kind = kinds[kind]
    caps.maps_images = image_kind != IMAGE_PRIVATE
    return before


cdef _start_images():
    """Try what there is with one page."""
    global image_kind, best_image_kind
    cdef image_pages probe
    image_kind = IMAGE_SEALED
    if image_begin(caps.page_size, &probe):
        best_image_kind = IMAGE_PRIVATE
    else:
        best_image_kind = probe.kind
        if image_end(&probe):
            best_image_kind = IMAGE_PRIVATE
        image_drop(&probe)
    image_kind = best_image_kind
    caps.maps_images = image_kind != IMAGE_PRIVATE
