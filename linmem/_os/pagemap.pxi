# Which pages have been touched, from /proc/self/pagemap; a part of posix.pyx, for Linux only.
#
# Two ways give the same result: the ioctl PAGEMAP_SCAN (Linux 6.7), and a read of the eight bytes that the file has for
# each page. Both look for "present or swapped", never for "written". A page that is swapped out or is being migrated is
# not present, but holds the guest's bytes.
#
# The descriptor describes the memory map of the process that opened the file. In a forked child it would still describe
# the parent, and linmem would miss the pages that the child's guest writes. So the descriptor's number is in a page
# that the kernel clears in a child, also if the child was made without fork().

from libc.stdint cimport uint64_t

cdef tuple SCAN_WAYS = (None, "reading", "ioctl")

cdef enum:
    SCAN_NONE = 0
    SCAN_READING = 1
    SCAN_IOCTL = 2

    # Categories of pages in PAGEMAP_SCAN.
    PAGE_IS_FILE = 1 << 2
    PAGE_IS_PRESENT = 1 << 3
    PAGE_IS_SWAPPED = 1 << 4
    PAGE_IS_PFNZERO = 1 << 5

    # Bits of a page's entry in the file.
    ENTRY_FILE = 61
    ENTRY_SWAPPED = 62      # the next bit, 63, means that the page is present

cdef struct page_region:            # as in <linux/fs.h>
    uint64_t start, end, categories

cdef struct pm_scan_arg:            # the same
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask

cdef struct pagemap_state:
    atomic_i64 lock
    atomic_i64 fd_and_1     # the descriptor + 1; 0: not open

cdef pagemap_state pagemap_static
cdef pagemap_state* pagemap = &pagemap_static
# A program may close every descriptor, and the kernel then gives the number to another file. To recognise its file,
# linmem sets the file's position to a value that no other file has. No read of linmem uses the position. lseek(2) takes
# a third of the time of fstat(2).
cdef atomic_i64 pagemap_position


cdef bint is_pagemap(int fd) noexcept nogil:
    return lseek(fd, 0, SEEK_CUR) == <off_t>load(&pagemap_position)


cdef void forget_pagemap_in_child() noexcept nogil:
    # A descriptor with this position is the parent's, so the child closes it. In a child that was made without fork()
    # this handler does not run, and the descriptor stays open.
    cdef int fd = <int>load(&pagemap_static.fd_and_1) - 1
    if fd >= 0 and is_pagemap(fd):
        close(fd)
    store(&pagemap_static.fd_and_1, 0)
    store(&pagemap.fd_and_1, 0)
    store(&pagemap.lock, 0)


cdef bint pagemap_is_open(int* fd) noexcept nogil:
    fd[0] = <int>load(&pagemap.fd_and_1) - 1
    return fd[0] >= 0 and is_pagemap(fd[0])


cdef int pagemap_fd(int* fd) noexcept nogil:
    """-> a descriptor of this process's own pagemap.

    If another file has the descriptor's number, a scan of that file may succeed: another process's pagemap accepts the
    ioctl, and every file a read. If that scan found no touched page, another guest would get a page with bytes in it.
    """
    cdef int code = 0
    if pagemap_is_open(fd):
        return 0
    while not compare_exchange(&pagemap.lock, 0, 1):
        sched_yield()
    if not pagemap_is_open(fd):
        code = open_pagemap(fd)
    store(&pagemap.lock, 0)
    return code


cdef int open_pagemap(int* fd) noexcept nogil:
    cdef off_t position = (<off_t>getpid() << 32) + 0x6c696e6d
    fd[0] = open_file("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)
    if fd[0] < 0:
        return errno
    store(&pagemap_position, position)
    if lseek(fd[0], position, SEEK_SET) != position or not is_pagemap(fd[0]):
        close(fd[0])
        return ENOSYS
    store(&pagemap_static.fd_and_1, fd[0] + 1)
    store(&pagemap.fd_and_1, fd[0] + 1)
    return 0


cdef int scan_by_ioctl(char* addr, size_t size, details* more) noexcept nogil:
    cdef page_region regions[64]
    cdef pm_scan_arg scan
    cdef int fd, got, i
    cdef int code = pagemap_fd(&fd)
    if code:
        return code
    memset(&scan, 0, sizeof(scan))
    scan.size = sizeof(scan)
    scan.start = <uint64_t>addr
    scan.end = scan.start + size
    scan.vec = <uint64_t>&regions[0]
    scan.vec_len = min(more.n[0], sizeof(regions) // sizeof(regions[0]))
    scan.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    if more.what != PRESENT:
        scan.category_inverted = scan.category_mask = PAGE_IS_PFNZERO | (PAGE_IS_FILE if more.what == OVER_IMAGE else 0)
        scan.return_mask = PAGE_IS_PFNZERO      # the same for every page found, so neighbours become one run
    got = ioctl(fd, PAGEMAP_SCAN, &scan)
    if got < 0:
        return errno
    for i in range(got):
        more.runs[i].addr = <char*>regions[i].start
        more.runs[i].size = <size_t>(regions[i].end - regions[i].start)
    more.n[0] = <size_t>got
    more.next[0] = <char*>scan.walk_end
    return 0


cdef int scan_by_reading(char* addr, size_t size, details* more) noexcept nogil:
    cdef uint64_t entries[512]
    cdef size_t room = more.n[0], used = 0, offset = 0, count, i
    cdef ssize_t got
    cdef int fd
    cdef int code = pagemap_fd(&fd)
    if code:
        return code
    while offset < size:
        count = min((size - offset) // real_page, sizeof(entries) // sizeof(entries[0]))
        got = pread(fd, entries, count * 8, <off_t>(<size_t>(addr + offset) // real_page * 8))
        if got != <ssize_t>(count * 8):
            return errno if got < 0 else EIO
        for i in range(count):
            if (entries[i] >> ENTRY_SWAPPED and not (more.what == OVER_IMAGE and entries[i] >> ENTRY_FILE & 1)
                    and not add_page(more.runs, &used, room, addr + offset)):
                size = offset       # there is no room for another run, and the next scan begins here
                break
            offset += real_page
    more.n[0] = used
    more.next[0] = addr + offset
    return 0


cdef int os_touched(char* addr, size_t size, details* more) noexcept nogil:
    if scan_way == SCAN_IOCTL:
        return scan_by_ioctl(addr, size, more)
    return scan_by_reading(addr, size, more) if scan_way == SCAN_READING else ENOSYS


cdef bint scan_works(int way) noexcept nogil:
    """Tries a way on three pages: the first was not touched, the second was written, and the third was only read."""
    global scan_way
    cdef size_t page = real_page
    cdef bint works
    cdef char* p = <char*>mmap(NULL, 3 * page, PROT_READ | PROT_WRITE, MAP_FRESH, -1, 0)
    if p == MAP_FAILED:
        return False
    madvise(p, 3 * page, MADV_NOHUGEPAGE)
    touch(p + page)
    load(<atomic_i64*>(p + 2 * page))
    scan_way = way
    works = finds(p, 1 if way == SCAN_IOCTL else 2)
    munmap(p, 3 * page)
    return works


cdef int scan_start() noexcept nogil:
    """Prepares for forks, and returns the best way that works on this machine."""
    global pagemap
    cdef void* p
    if not ON_LINUX:
        return SCAN_NONE
    p = mmap(NULL, real_page, PROT_READ | PROT_WRITE, MAP_FRESH, -1, 0)
    if p != MAP_FAILED:
        if madvise(p, real_page, MADV_WIPEONFORK) == 0:
            pagemap = <pagemap_state*>p
        else:
            munmap(p, real_page)
    if pthread_atfork(NULL, NULL, forget_pagemap_in_child) and pagemap == &pagemap_static:
        return SCAN_NONE        # a child would use its parent's descriptor
    return SCAN_IOCTL if scan_works(SCAN_IOCTL) else SCAN_READING if scan_works(SCAN_READING) else SCAN_NONE
