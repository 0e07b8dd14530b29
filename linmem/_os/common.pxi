# The half of the page floor that no operating system differs in; posix.pyx and windows.pyx include it.
# They fill `caps` and `real_page` when the module starts, and bring address_space() and _limits().

from linmem._units cimport is_power_of_two

import os as _os

cdef capabilities_t caps
cdef size_t real_page           # what the kernel counts in, whatever caps.page_size says
cdef int image_kind = 0         # IMAGE_: what image_begin() makes, if the OS grants it
cdef long long fail_in = 0      # injected(): 1 = the next page call fails, and 0 = so it does
cdef long long fail_times = 0   # how many fail, one after the other; 0 = off
cdef int fail_code = 0
cdef _atomic.word reserved_bytes = 0


IMAGE_KINDS = {IMAGE_SEALED: "sealed", IMAGE_FILE: "file", IMAGE_SECTION: "section", IMAGE_PRIVATE: "private"}


cdef const capabilities_t* capabilities() noexcept nogil:
    return &caps


cdef size_t reserved() noexcept nogil:
    return <size_t>_atomic.load(&reserved_bytes)


cdef inline void count_reserved(size_t size) noexcept nogil:
    """Before the OS is asked for `size` bytes of address space."""
    _atomic.add(&reserved_bytes, <long long>size)


cdef inline void count_released(size_t size) noexcept nogil:
    """After the OS has taken `size` bytes of address space back, or has refused to give them."""
    _atomic.add(&reserved_bytes, -<long long>size)


cdef int injected() noexcept nogil:
    global fail_in, fail_times
    if fail_times == 0:
        return 0
    if fail_in > 1:
        fail_in -= 1
        return 0
    fail_in = 0
    fail_times -= 1
    return fail_code


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
