# The part of the page floor that is the same on every operating system; posix.pyx and windows.pyx include this file.
#
# A page call is a function of pages.pxd that works on pages. This file defines the page calls that tests can make fail.
# If a test has asked for a failure, the page call returns the test's code. Otherwise the page call calls the function
# of the same name with the prefix os_. The including file defines the functions with this prefix, the other functions
# of pages.pxd, CODE_TEXTS, IMAGE_KINDS, SCAN_WAYS and _limits(), and sets the first six variables below when it is
# imported.

from libc.string cimport memset

from linmem._core.units cimport is_power_of_two

import os as _os

cdef capabilities_t caps
cdef size_t real_page           # the page size of the kernel; caps.page_size may be a multiple of it
cdef int best_image_kind        # the smallest, and so best, IMAGE_ kind that works on this machine
cdef int image_kind             # the IMAGE_ kind that image_begin() makes if the OS grants it
cdef int best_scan_way          # the greatest, and so best, index in SCAN_WAYS that works on this machine
cdef int scan_way               # how touched() finds pages: an index in SCAN_WAYS
cdef long long fail_in = 0      # counts page calls down to the first failure (1: the next one); 0: failing, or off
cdef long long fail_times = 0   # how many page calls in a row will still fail; 0: failures are off
cdef int fail_code = 0
cdef atomic_i64 reserved_bytes = 0

# A code of the OS and its description for code_text().
cdef struct coded_text:
    int code
    const char* text


# -- the page calls, and how tests make them fail ------------------------------------------------

# Which pages os_touched() looks for: those that may hold a byte other than zero, those that may differ from the mapped
# image, or all.
cdef enum:
    TOUCHED = 0
    OVER_IMAGE = 1
    PRESENT = 2

# The arguments of page calls after the range. A page call uses only its own members.
cdef struct details:
    bint watched            # reserve()
    char** base
    int access              # protect(), file_map() and window_map()
    file_pages* file        # the calls on files
    size_t position         # of the calls on files, and of window_map()
    long long handle        # window_map()
    bint written_through
    bint* emptied
    bint allocate           # file_extend()
    bint takes              # file_adopt() and file_take()
    size_t most             # file_begin()
    const char* name
    size_t before           # file_place(), and `base`
    size_t after
    size_t* start           # file_data()
    size_t* end
    char* new_addr          # move()
    size_t new_size
    size_t* bytes           # resident() and file_size()
    int what                # touched() and present()
    span* runs
    size_t* n
    char** next

ctypedef int (*range_call)(char* addr, size_t size) noexcept nogil
ctypedef int (*detailed_call)(char* addr, size_t size, details* more) noexcept nogil
ctypedef int (*image_call)(image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil


cdef int injected() noexcept nogil:
    """The code that the page call which starts now must fail with; 0 if it must not fail."""
    global fail_in, fail_times
    if fail_times == 0:
        return 0
    if fail_in > 1:
        fail_in -= 1
        return 0
    fail_in = 0
    fail_times -= 1
    return fail_code


cdef inline int on_range(range_call call, char* addr, size_t size) noexcept nogil:
    return injected() or call(addr, size)


cdef inline int with_details(detailed_call call, char* addr, size_t size, details* more) noexcept nogil:
    return injected() or call(addr, size, more)


cdef inline int on_image(image_call call, image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil:
    return injected() or call(img, offset, bytes, size)


cdef int commit(char* addr, size_t size) noexcept nogil:
    return on_range(os_commit, addr, size)


cdef int decommit(char* addr, size_t size) noexcept nogil:
    return on_range(os_decommit, addr, size)


cdef int discard(char* addr, size_t size) noexcept nogil:
    return on_range(os_discard, addr, size)


cdef int renew(char* addr, size_t size) noexcept nogil:
    return on_range(os_renew, addr, size)


cdef int advise_huge(char* addr, size_t size) noexcept nogil:
    return on_range(os_advise_huge, addr, size)


cdef int prefault(char* addr, size_t size) noexcept nogil:
    return on_range(os_prefault, addr, size)


cdef int image_fetch(char* addr, size_t size) noexcept nogil:
    return on_range(os_image_fetch, addr, size)


cdef int blank(char* addr, size_t size) noexcept nogil:
    return on_range(os_blank, addr, size)


cdef int release(char* addr, size_t size) noexcept nogil:
    return on_range(os_release, addr, size)


cdef int reserve(size_t size, bint watched, char** base) noexcept nogil:
    cdef details more
    more.watched, more.base = watched, base
    return with_details(os_reserve, NULL, size, &more)


cdef int protect(char* addr, size_t size, int access) noexcept nogil:
    cdef details more
    more.access = access
    return with_details(os_protect, addr, size, &more)


cdef int move(char* addr, size_t size, char* new_addr, size_t new_size) noexcept nogil:
    cdef details more
    more.new_addr, more.new_size = new_addr, new_size
    return with_details(os_move, addr, size, &more)


cdef int resident(char* addr, size_t size, size_t* bytes) noexcept nogil:
    cdef details more
    more.bytes = bytes
    return with_details(os_resident, addr, size, &more)


cdef int touched(char* addr, size_t size, bint over_image, span* runs, size_t* n, char** next) noexcept nogil:
    return find_pages(OVER_IMAGE if over_image else TOUCHED, addr, size, runs, n, next)


cdef int present(char* addr, size_t size, span* runs, size_t* n, char** next) noexcept nogil:
    return find_pages(PRESENT, addr, size, runs, n, next)


cdef int find_pages(int what, char* addr, size_t size, span* runs, size_t* n, char** next) noexcept nogil:
    cdef details more
    more.what, more.runs, more.n, more.next = what, runs, n, next
    return with_details(os_touched, addr, size, &more)


cdef int image_begin(size_t size, image_pages* out) noexcept nogil:
    return new_image(os_image_begin, -1, 0, size, out)


cdef int image_write(image_pages* into, size_t offset, const char* bytes, size_t size) noexcept nogil:
    return on_image(os_image_write, into, offset, <char*>bytes, size)


cdef int image_end(image_pages* img) noexcept nogil:
    return on_image(os_image_end, img, 0, NULL, img.size)


cdef int image_open(int descriptor, long long position, size_t size, image_pages* out) noexcept nogil:
    return new_image(os_image_open, descriptor, position, size, out)


cdef int new_image(image_call call, int descriptor, long long position, size_t size, image_pages* out) noexcept nogil:
    """`call` replaces the caller's descriptor in out.handle and fills the members that are zero here, or it fails."""
    memset(out, 0, sizeof(image_pages))
    out.handle, out.position, out.size = descriptor, position, size
    return on_image(call, out, 0, NULL, size)


cdef int image_map(const image_pages* img, size_t offset, char* addr, size_t size) noexcept nogil:
    return on_image(os_image_map, <image_pages*>img, offset, addr, size)


cdef int image_renew(const image_pages* img, size_t offset, char* addr, size_t size) noexcept nogil:
    return on_image(os_image_renew, <image_pages*>img, offset, addr, size)


cdef inline int on_file(detailed_call call, const file_pages* file, size_t position, char* addr, size_t size,
                        details* more) noexcept nogil:
    more.file, more.position = <file_pages*>file, position
    return with_details(call, addr, size, more)


cdef int file_begin(size_t size, size_t most, const char* name, file_pages* out) noexcept nogil:
    cdef details more
    memset(out, 0, sizeof(file_pages))
    out.handle = -1
    more.most, more.name = most, name
    return on_file(os_file_begin, out, 0, NULL, size, &more)


cdef int file_adopt(int descriptor, bint only_writer, file_pages* out) noexcept nogil:
    cdef details more
    memset(out, 0, sizeof(file_pages))
    out.handle, out.only_writer, more.takes = descriptor, only_writer, False
    return on_file(os_file_adopt, out, 0, NULL, 0, &more)       # replaces the caller's descriptor, or fails


cdef int file_take(long long handle, file_pages* out) noexcept nogil:
    cdef details more
    memset(out, 0, sizeof(file_pages))
    out.handle, more.takes = handle, True
    return on_file(os_file_adopt, out, 0, NULL, 0, &more)


cdef int file_copy(const file_pages* file, file_pages* out) noexcept nogil:
    cdef details more
    out[0] = file[0]
    return on_file(os_file_copy, out, 0, NULL, 0, &more)        # replaces the descriptor in `out`, or fails


cdef int file_size(const file_pages* file, size_t* size) noexcept nogil:
    cdef details more
    more.bytes = size
    return on_file(os_file_size, file, 0, NULL, 0, &more)


cdef int file_read(const file_pages* file, size_t position, char* bytes, size_t size) noexcept nogil:
    cdef details more
    return on_file(os_file_read, file, position, bytes, size, &more)


cdef int file_extend(file_pages* file, size_t size, bint allocate) noexcept nogil:
    cdef details more
    more.allocate = allocate
    return on_file(os_file_extend, file, 0, NULL, size, &more)


cdef int file_cut(file_pages* file, size_t size) noexcept nogil:
    cdef details more
    return on_file(os_file_cut, file, 0, NULL, size, &more)


cdef int file_allocate(file_pages* file, size_t position, size_t size) noexcept nogil:
    cdef details more
    return on_file(os_file_allocate, file, position, NULL, size, &more)


cdef int file_map(const file_pages* file, size_t position, char* addr, size_t size, int access) noexcept nogil:
    cdef details more
    more.access = access
    return on_file(os_file_map, file, position, addr, size, &more)


cdef int file_place(const file_pages* file, size_t position, char** region, size_t before, size_t size,
                    size_t after) noexcept nogil:
    cdef details more
    more.base, more.before, more.after = region, before, after
    return on_file(os_file_place, file, position, NULL, size, &more)


cdef int file_show(const file_pages* file, size_t position, size_t size, char** addr) noexcept nogil:
    cdef details more
    more.base = addr
    return on_file(os_file_show, file, position, NULL, size, &more)


cdef int file_discard(file_pages* file, size_t position, size_t size) noexcept nogil:
    cdef details more
    return on_file(os_file_discard, file, position, NULL, size, &more)


cdef int file_data(const file_pages* file, size_t position, size_t limit, size_t* start, size_t* end) noexcept nogil:
    cdef details more
    more.start, more.end = start, end
    return on_file(os_file_data, file, position, NULL, limit - position, &more)


cdef int file_flush(char* addr, size_t size) noexcept nogil:
    return on_range(os_file_flush, addr, size)


cdef int file_sync(const file_pages* file) noexcept nogil:
    cdef details more
    return on_file(os_file_sync, file, 0, NULL, 0, &more)


cdef int window_map(long long handle, size_t position, char* addr, size_t size, int access, bint written_through,
                    bint* emptied) noexcept nogil:
    cdef details more
    more.handle, more.position, more.access = handle, position, access
    more.written_through, more.emptied = written_through, emptied
    emptied[0] = False
    return with_details(os_window_map, addr, size, &more)


# -- what posix.pyx and windows.pyx share besides the page calls ----------------------------------

cdef const capabilities_t* capabilities() noexcept nogil:
    return &caps


cdef size_t reserved() noexcept nogil:
    return <size_t>load(&reserved_bytes)


cdef inline void count_reserved(size_t size) noexcept nogil:
    """Call it before the OS is asked for `size` bytes of address space."""
    add(&reserved_bytes, <long long>size)


cdef inline void count_released(size_t size) noexcept nogil:
    """Call it after the OS has taken back, or has refused, `size` bytes of address space."""
    add(&reserved_bytes, -<long long>size)


cdef inline bint add_page(span* runs, size_t* n, size_t room, char* page) noexcept nogil:
    """Appends a page to the runs, in order of address. Returns False if there is no room for another run."""
    if n[0] and runs[n[0] - 1].addr + runs[n[0] - 1].size == page:
        runs[n[0] - 1].size += real_page
        return True
    if n[0] == room:
        return False
    runs[n[0]].addr = page
    runs[n[0]].size = real_page
    n[0] += 1
    return True


cdef int touch_pages(char* addr, size_t size) noexcept nogil:
    """Makes every page resident by a write that changes no byte."""
    cdef size_t offset = 0
    while offset < size:
        touch(addr + offset)
        offset += real_page
    return 0


cdef bint finds(char* addr, size_t pages) noexcept nogil:
    """Whether touched() finds, among the three pages at addr, only the `pages` pages that follow the first."""
    cdef span runs[3]
    cdef size_t n = 3
    cdef char* next = NULL
    if touched(addr, 3 * real_page, False, runs, &n, &next) or next != addr + 3 * real_page:
        return False
    return n == 1 and runs[0].addr == addr + real_page and runs[0].size == pages * real_page if pages else n == 0


# The report that watch_faults() was given; NULL: none.
cdef fault_report report_of_faults = NULL
cdef atomic_i64 reporting_thread    # the thread that is in the report; 0: none
cdef char* last_address = NULL      # of the last fault that was reported, and its instruction
cdef size_t last_pc = 0


cdef void report_once(char* addr, size_t pc, int access, long long thread) noexcept nogil:
    """A fault in the report itself is not reported. If a handler only returns, the thread runs into the same fault
    again and again: only the first is reported."""
    cdef fault_report report = report_of_faults
    if report == NULL or load(&reporting_thread) == thread:
        return
    if load_address(&last_address) == addr and load_size(&last_pc) == pc:
        return
    store_address(&last_address, addr)
    store_size(&last_pc, pc)
    compare_exchange(&reporting_thread, 0, thread)
    report(addr, access)
    compare_exchange(&reporting_thread, thread, 0)


cdef int bits_of(size_t address) noexcept nogil:
    cdef int bits = 0
    while address:
        bits += 1
        address >>= 1
    return bits


cdef const char* code_text(int code) noexcept nogil:
    cdef size_t i
    for i in range(sizeof(CODE_TEXTS) // sizeof(CODE_TEXTS[0])):
        if CODE_TEXTS[i].code == code:
            return CODE_TEXTS[i].text
    return "refused by the operating system"


# -- functions for Python ------------------------------------------------------------------------

def count_calls_to_failure(long long nth, int code, long long times=1):
    """Makes the nth page call from now on fail with `code`, and the times - 1 calls after the nth. nth=0 ends all
    failures. Tests only.

    Returns the nth of an earlier setting minus the calls since then; 0 if its failures have begun or ended.
    """
    global fail_in, fail_times, fail_code
    if nth < 0 or (nth and (code <= 0 or times <= 0)):
        raise ValueError(f"nth must be >= 0, code and times > 0, got nth={nth} code={code} times={times}")
    cdef long long left = fail_in
    fail_code = code
    fail_in = nth
    fail_times = times if nth else 0
    return left


def choose_scan(way):
    """Sets how touched() finds pages from now on: a name in SCAN_WAYS; None: touched() fails. Tests only.

    Returns the way that was set before. Raises ValueError if the way does not work on this machine.
    """
    global scan_way
    if way not in SCAN_WAYS[:best_scan_way + 1]:
        raise ValueError(f"way must be one that works here, got {way!r}")
    before = SCAN_WAYS[scan_way]
    scan_way = SCAN_WAYS.index(way)
    caps.scans = way is not None
    return before


def choose_image(kind):
    """Sets the kind of image that image_begin() makes from now on: a name in IMAGE_KINDS. Tests only.

    Returns the kind that was set before. Raises ValueError if the kind does not work on this machine.
    """
    global image_kind
    kinds = {name: n for n, name in IMAGE_KINDS.items()}
    if kinds.get(kind, 0) < best_image_kind:
        raise ValueError(f"kind must be one that works here, got {kind!r}")
    before = IMAGE_KINDS[image_kind]
    image_kind = kinds[kind]
    caps.maps_images = image_kind < IMAGE_SECTION
    return before


def describe():
    """What the operating system gives linmem on this machine, as a dict; ``linmem info`` prints it.

    Returns
    -------
    dict
        Sizes are in bytes. "page_size" (the host page), "granularity" (of reservations), "huge_page" (0: none),
        "address_bits", "address_space", "address_space_left", "reserved" (address space that linmem holds now),
        "memory" (physical memory that this process may use; 0: unknown), "mappings" (the most that a process may have;
        0: no limit), "images" (the kind of pages that images have), "capabilities" (a dict of bools), "limits" (a
        dict of the limits that are set, by their names).
    """
    cdef dict members = caps
    cdef size_t total, left
    address_space(&total, &left)
    return {
        "page_size": caps.page_size,
        "granularity": caps.granularity,
        "address_bits": caps.address_bits,
        "address_space": total,
        "address_space_left": left,
        "reserved": reserved(),
        "capabilities": {name: value for name, value in members.items() if isinstance(value, bool)},
        "images": IMAGE_KINDS[image_kind],
        "huge_page": caps.huge_page,
        "memory": caps.memory,
        "mappings": caps.mappings,
        "limits": _limits(),
    }


def _page_size_wanted(size_t real):
    """The size of the host page, or the larger size in LINMEM_PAGE_SIZE, with which tests check the rounding."""
    text = _os.environ.get("LINMEM_PAGE_SIZE", "")
    if not text:
        return real
    try:
        size = int(text)
    except ValueError:
        size = 0
    if size < real or size > 1 << 30 or not is_power_of_two(size):
        raise ValueError(f"LINMEM_PAGE_SIZE must be a power of two from {real} to {1 << 30}, got {text!r}")
    return size
