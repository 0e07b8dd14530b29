# Which pages have been touched, from /proc/self/pagemap; a part of posix.pyx, of use on Linux.
#
# Two ways, the same answer: the ioctl PAGEMAP_SCAN (Linux 6.7), and reading the file's eight bytes for
# each page. Both say "present or swapped", never "written": a page that is swapped out, or is being
# migrated, is not present, and holds the guest's bytes all the same.
#
# The descriptor belongs to the memory map of the process that opened it: in a forked child it would
# go on to describe the *parent*, and a page that the child's guest has written would not be seen. So
# it is kept in a page that the kernel wipes in a child, however that was made.

cdef extern from *:
    """
    /* What is looked for: what may hold a byte that is not zero, or not the mapped image's; pages of any kind. */
    #define LINMEM_TOUCHED 0
    #define LINMEM_OVER_IMAGE 1
    #define LINMEM_THERE 2

    #if defined(__linux__)
    #include <sys/ioctl.h>

    #ifndef MADV_WIPEONFORK
    #define MADV_WIPEONFORK 18
    #endif

    typedef struct { uint64_t start, end, categories; } linmem_region;
    typedef struct {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
    } linmem_scan;
    #define LINMEM_SCAN _IOWR('f', 16, linmem_scan)
    #define LINMEM_FILE (1u << 2)
    #define LINMEM_PRESENT (1u << 3)
    #define LINMEM_SWAPPED (1u << 4)
    #define LINMEM_ZERO (1u << 5)

    typedef struct { int lock; int fd_and_1; } linmem_pagemap_t;
    static linmem_pagemap_t linmem_pagemap_static;
    static linmem_pagemap_t *linmem_pagemap = &linmem_pagemap_static;
    /* Whoever closes every descriptor gives its number to another file. Ours stands at a position where nobody
       else's is, and where nothing of ours reads: to ask for that takes a third of the time that fstat(2) takes. */
    static off_t linmem_pagemap_mark;

    static int linmem_pagemap_is(int fd) {
        return lseek(fd, 0, SEEK_CUR) == __atomic_load_n(&linmem_pagemap_mark, __ATOMIC_RELAXED);
    }

    static void linmem_pagemap_lock(void) {
        while (__atomic_exchange_n(&linmem_pagemap->lock, 1, __ATOMIC_ACQUIRE)) sched_yield();
    }

    static void linmem_pagemap_unlock(void) { __atomic_store_n(&linmem_pagemap->lock, 0, __ATOMIC_RELEASE); }

    /* The parent's descriptor is known to be ours only here; another way of forking leaves it open. */
    static void linmem_pagemap_in_child(void) {
        int fd = __atomic_load_n(&linmem_pagemap_static.fd_and_1, __ATOMIC_ACQUIRE) - 1;
        if (fd >= 0 && linmem_pagemap_is(fd)) close(fd);
        linmem_pagemap_static.fd_and_1 = 0;
        linmem_pagemap->fd_and_1 = 0;
        linmem_pagemap->lock = 0;
    }

    /* -> a descriptor of this process's own pagemap, or -1. */
    static int linmem_pagemap_fd(void) {
        int fd = __atomic_load_n(&linmem_pagemap->fd_and_1, __ATOMIC_ACQUIRE) - 1;
        if (fd >= 0) return fd;
        linmem_pagemap_lock();
        fd = __atomic_load_n(&linmem_pagemap->fd_and_1, __ATOMIC_ACQUIRE) - 1;
        if (fd < 0) {
            fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
            if (fd >= 0) {
                off_t mark = ((off_t)getpid() << 32) + 0x6c696e6d;
                __atomic_store_n(&linmem_pagemap_mark, mark, __ATOMIC_RELAXED);
                if (lseek(fd, mark, SEEK_SET) != mark || !linmem_pagemap_is(fd)) {
                    close(fd);
                    errno = ENOSYS;
                    fd = -1;
                }
            }
            if (fd >= 0) {
                linmem_pagemap_static.fd_and_1 = fd + 1;
                __atomic_store_n(&linmem_pagemap->fd_and_1, fd + 1, __ATOMIC_RELEASE);
            }
        }
        linmem_pagemap_unlock();
        return fd;
    }

    /* The number is no pagemap any more: someone closed every descriptor there was. */
    static void linmem_pagemap_forget(int fd) {
        int known = fd + 1;
        __atomic_compare_exchange_n(&linmem_pagemap->fd_and_1, &known, 0, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    }

    /* -> the same, seen to be what was opened. Whatever took its number since answers, too: another process's pagemap
       to the ioctl, any file to a read. Found "nothing touched", a page with bytes in it would be handed on. */
    static int linmem_pagemap_checked(void) {
        int fd = linmem_pagemap_fd();
        if (fd < 0 || linmem_pagemap_is(fd)) return fd;
        linmem_pagemap_forget(fd);
        return linmem_pagemap_fd();
    }

    static int linmem_scan_by_ioctl(char *at, size_t size, int what, linmem_span *runs, size_t *n, char **next) {
        linmem_region found[64];
        const size_t room = sizeof found / sizeof found[0];
        linmem_scan scan;
        long got, i;
        int fd = linmem_pagemap_checked();
        if (fd < 0) return errno;
        memset(&scan, 0, sizeof scan);
        scan.size = sizeof scan;
        scan.start = (uint64_t)(uintptr_t)at;
        scan.end = scan.start + size;
        scan.vec = (uint64_t)(uintptr_t)found;
        scan.vec_len = *n < room ? *n : room;
        if (what != LINMEM_THERE) {
            scan.category_inverted = scan.category_mask = LINMEM_ZERO | (what == LINMEM_OVER_IMAGE ? LINMEM_FILE : 0);
            scan.return_mask = LINMEM_ZERO;     /* the same for all that is found: neighbours become one run */
        }
        scan.category_anyof_mask = LINMEM_PRESENT | LINMEM_SWAPPED;
        got = ioctl(fd, LINMEM_SCAN, &scan);
        if (got < 0) return errno;
        for (i = 0; i < got; i++) {
            runs[i].at = (char *)(uintptr_t)found[i].start;
            runs[i].size = (size_t)(found[i].end - found[i].start);
        }
        *n = (size_t)got;
        *next = (char *)(uintptr_t)scan.walk_end;
        return 0;
    }

    static int linmem_scan_by_reading(char *at, size_t size, size_t page, int what, linmem_span *runs, size_t *n,
                                      char **next) {
        uint64_t entries[512];
        size_t room = *n, found = 0, offset = 0, count, i;
        int fd = linmem_pagemap_checked();
        if (fd < 0) return errno;
        while (offset < size) {
            ssize_t got;
            count = (size - offset) / page;
            if (count > sizeof entries / sizeof entries[0]) count = sizeof entries / sizeof entries[0];
            got = pread(fd, entries, count * 8, (off_t)((uintptr_t)(at + offset) / page * 8));
            if (got != (ssize_t)(count * 8)) return got < 0 ? errno : EIO;
            for (i = 0; i < count; i++, offset += page) {
                int there = (entries[i] >> 62) != 0;            /* 63: present, 62: swapped */
                /* 61: the file's own page */
                if (!there || (what == LINMEM_OVER_IMAGE && (entries[i] >> 61 & 1))) continue;
                if (found && runs[found - 1].at + runs[found - 1].size == at + offset) {
                    runs[found - 1].size += page;
                    continue;
                }
                if (found == room) goto full;
                runs[found].at = at + offset;
                runs[found++].size = page;
            }
        }
    full:
        *n = found;
        *next = at + offset;
        return 0;
    }

    static int linmem_scan_by(int way, char *at, size_t size, size_t page, int what, linmem_span *runs, size_t *n,
                              char **next) {
        if (way == 2) return linmem_scan_by_ioctl(at, size, what, runs, n, next);
        if (way == 1) return linmem_scan_by_reading(at, size, page, what, runs, n, next);
        return ENOSYS;
    }

    /* Asked of three pages, of which the second was written and the third only read. */
    static int linmem_scan_works(int way, size_t page) {
        linmem_span runs[3];
        size_t n = 3;
        char *next;
        int works = 0;
        char *p = (char *)mmap(NULL, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == (char *)MAP_FAILED) return 0;
        (void)madvise(p, 3 * page, MADV_NOHUGEPAGE);
        ((volatile char *)p)[page] = 1;
        (void)((volatile char *)p)[2 * page];
        if (linmem_scan_by(way, p, 3 * page, page, 0, runs, &n, &next) == 0)
            works = n == 1 && next == p + 3 * page && runs[0].at == p + page
                    && runs[0].size == (way == 2 ? page : 2 * page);
        munmap(p, 3 * page);
        return works;
    }

    /* -> the way that works here: 2 the ioctl, 1 reading, 0 none. */
    static int linmem_scan_start(size_t page) {
        void *p = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p != MAP_FAILED) {
            if (madvise(p, page, MADV_WIPEONFORK) == 0) linmem_pagemap = (linmem_pagemap_t *)p;
            else munmap(p, page);
        }
        if (pthread_atfork(NULL, NULL, linmem_pagemap_in_child) != 0 && linmem_pagemap == &linmem_pagemap_static)
            return 0;       /* nothing would tell a child */
        return linmem_scan_works(2, page) ? 2 : linmem_scan_works(1, page);
    }
    #else
    static int linmem_scan_by(int way, char *at, size_t size, size_t page, int what, linmem_span *runs, size_t *n,
                              char **next) {
        (void)way; (void)at; (void)size; (void)page; (void)what; (void)runs; (void)n; (void)next;
        return ENOSYS;
    }
    static int linmem_scan_start(size_t page) { (void)page; return 0; }
    #endif
    """
    int scan_by "linmem_scan_by"(int way, char* at, size_t size, size_t page, int what, span* runs, size_t* n,
                                 char** next) noexcept nogil
    int SCAN_THERE "LINMEM_THERE"
    int scan_start "linmem_scan_start"(size_t page) noexcept nogil

cdef int scan_way = 0           # 2 the ioctl, 1 reading, 0 none
cdef int best_scan_way = 0      # that works here


cdef int touched(char* at, size_t size, bint over_image, span* runs, size_t* n, char** next) noexcept nogil:
    cdef int code = injected()
    if code:
        return code
    return scan_by(scan_way, at, size, real_page, 1 if over_image else 0, runs, n, next)


cdef int present(char* at, size_t size, span* runs, size_t* n, char** next) noexcept nogil:
    cdef int code = injected()
    if code:
        return code
    return scan_by(scan_way, at, size, real_page, SCAN_THERE, runs, n, next)
