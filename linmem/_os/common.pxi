# The part of the page floor that is the same on every operating system; posix.pyx and windows.pyx include this file.
#
# Each page call of the contract that a test can make fail is here. It calls the system's own function of the same
# name with the prefix os_, unless a test has asked for a failure. The including file defines those functions, fills
# `caps` and `real_page` when the module is imported, and defines the rest of the contract and _limits().

from libc.string cimport memset

from linmem._core.units cimport is_power_of_two

import os as _os

cdef capabilities_t caps
cdef size_t real_page           # the page size of the kernel; caps.page_size may be a multiple of it
cdef int image_kind = 0         # the IMAGE_ kind that image_begin() makes if the OS grants it
cdef long long fail_in = 0      # 1: the next page call fails. 0: failures have begun, or none were asked for
cdef long long fail_times = 0   # how many page calls will fail, one after the other; 0: failures are off
cdef int fail_code = 0
cdef atomic_i64 reserved_bytes = 0

IMAGE_KINDS = {IMAGE_SEALED: "sealed", IMAGE_FILE: "file", IMAGE_SECTION: "section", IMAGE_PRIVATE: "private"}


# -- the page calls, and how tests make them fail ------------------------------------------------

# What os_touched() looks for: pages that may hold a byte other than zero, pages that may differ from the mapped image,
# or pages of any kind.
cdef enum:
    TOUCHED = 0
    OVER_IMAGE = 1
    PRESENT = 2

# The arguments of a page call that follow the range. Each call uses only its own.
cdef struct details:
    bint watched            # reserve()
    char** base
    int access              # protect()
    char* new_addr          # move()
    size_t new_size
    size_t* bytes           # resident()
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
    cdef int code = injected()
    return code if code else call(addr, size)


cdef inline int with_details(detailed_call call, char* addr, size_t size, details* more) noexcept nogil:
    cdef int code = injected()
    return code if code else call(addr, size, more)


cdef inline int on_image(image_call call, image_pages* img, size_t offset, char* bytes, size_t size) noexcept nogil:
    cdef int code = injected()
    return code if code else call(img, offset, bytes, size)


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
    cdef details more
    more.what, more.runs, more.n, more.next = OVER_IMAGE if over_image else TOUCHED, runs, n, next
    return with_details(os_touched, addr, size, &more)


cdef int present(char* addr, size_t size, span* runs, size_t* n, char** next) noexcept nogil:
    cdef details more
    more.what, more.runs, more.n, more.next = PRESENT, runs, n, next
    return with_details(os_touched, addr, size, &more)


cdef int image_begin(size_t size, image_pages* out) noexcept nogil:
    clear_image(out)
    out.size = size
    return on_image(os_image_begin, out, 0, NULL, size)


cdef int image_write(image_pages* into, size_t offset, const char* bytes, size_t size) noexcept nogil:
    return on_image(os_image_write, into, offset, <char*>bytes, size)


cdef int image_end(image_pages* img) noexcept nogil:
    return on_image(os_image_end, img, 0, NULL, img.size)


cdef int image_open(int descriptor, long long position, size_t size, image_pages* out) noexcept nogil:
    cdef image_pages opened
    cdef int code
    clear_image(&opened)
    opened.handle = descriptor
    opened.position = position
    code = on_image(os_image_open, &opened, 0, NULL, size)
    clear_image(out)
    if code == 0:
        out[0] = opened
    return code


cdef int image_map(const image_pages* img, size_t offset, char* addr, size_t size) noexcept nogil:
    return on_image(os_image_map, <image_pages*>img, offset, addr, size)


cdef int image_renew(const image_pages* img, size_t offset, char* addr, size_t size) noexcept nogil:
    return on_image(os_image_renew, <image_pages*>img, offset, addr, size)


# -- what the systems' own functions share -------------------------------------------------------

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


cdef inline void clear_image(image_pages* img) noexcept nogil:
    memset(img, 0, sizeof(image_pages))
    img.handle = -1


cdef inline size_t at_most(size_t wanted, size_t room) noexcept nogil:
    """How much to ask the OS for at a time: as much as is left, but never more than there is room for."""
    return wanted if wanted < room else room


cdef inline bint add_page(span* runs, size_t* n, size_t room, char* page) noexcept nogil:
    """Append a page to the runs, in order of address; False if that needs a run more than there is room for."""
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
    """Make every page resident by a write that changes no byte."""
    cdef size_t offset = 0
    while offset < size:
        touch(addr + offset)
        offset += real_page
    return 0


cdef int bits_of(size_t address) noexcept nogil:
    cdef int bits = 0
    while address:
        bits += 1
        address >>= 1
    return bits


# -- what Python sees ------------------------------------------------------------------------

def count_calls_to_failure(long long nth, int code, long long times=1):
    """Make the nth page call from now on, and the times - 1 calls behind it, fail with `code`; 0 switches
    it off. Tests only.

    Returns how many calls were still to go before an earlier setting would have failed.
    """
    global fail_in, fail_times, fail_code
    if nth < 0 or (nth and (code <= 0 or times <= 0)):
        raise ValueError(f"nth must be >= 0, code and times > 0, got nth={nth} code={code} times={times}")
    cdef long long left = fail_in
    fail_code = code
    fail_in = nth
    fail_times = times if nth else 0
    return left


def describe():
    """What this machine's page floor can do, as a dict; `linmem info` prints it."""
    cdef size_t total, left
    address_space(&total, &left)
    return {
        "page_size": caps.page_size,
        "granularity": caps.granularity,
        "address_bits": caps.address_bits,
        "address_space": total,
        "address_space_left": left,
        "reserved": reserved(),
        "capabilities": {
            "moves": bool(caps.moves),
            "names": bool(caps.names),
            "discard_any_protection": bool(caps.discard_any_protection),
            "populates": bool(caps.populates),
            "scans": bool(caps.scans),
            "maps_images": bool(caps.maps_images),
        },
        "images": IMAGE_KINDS[image_kind],
        "huge_page": caps.huge_page,
        "memory": caps.memory,
        "mappings": caps.mappings,
        "limits": _limits(),
    }


def _page_size_wanted(size_t real):
    """The host page, or the multiple of it that LINMEM_PAGE_SIZE asks for (to prove the rounding)."""
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
