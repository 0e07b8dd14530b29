# The page floor's contract. posix.pyx and windows.pyx implement it; setup.py builds one of them as
# linmem._os.pages. Above this floor nothing asks which OS it runs on: it asks `capabilities()`.
#
# Every function is nogil, returns 0 or the OS's own code (errno, GetLastError) read on the line
# after the call, and either does all of what it says or nothing. `at` and `size` are multiples of
# capabilities().page_size and size > 0, unless said otherwise; the caller rounds, these check nothing.

cdef enum:
    ACCESS_NONE = 0
    ACCESS_READ = 1
    ACCESS_READ_WRITE = 2
    ACCESS_READ_EXECUTE = 3

cdef struct capabilities_t:
    size_t page_size                # bytes in a host page (the override of LINMEM_PAGE_SIZE, if any)
    size_t granularity              # reserve() returns multiples of this
    int address_bits                # user addresses are below 2 ** address_bits
    bint moves                      # move() works, and release() takes a part of a reservation
    bint names                      # the mappings carry a name that tools show
    bint discard_any_protection     # discard() works on pages of any protection and keeps it
    bint populates                  # prefault() reports pages that cannot be written instead of faulting
    bint scans                      # touched() works, if need be only in what was reserved to be `watched`
    int locked                      # what renew() says where pages are locked in memory; 0: it does not refuse them
    bint maps_images                # an image's pages can be mapped into a reservation, copied when written
    size_t huge_page                # bytes in a huge page that advise_huge() asks for; 0: there are none
    size_t memory                   # bytes of physical memory that this process may use; 0: unknown
    size_t mappings                 # how many mappings a process may have; 0: not limited, or unknown

# A run of pages.
cdef extern from *:
    """
    #ifndef LINMEM_SPAN_H
    #define LINMEM_SPAN_H
    typedef struct { char *at; size_t size; } linmem_span;
    #endif
    """
    ctypedef struct span "linmem_span":
        char* at
        size_t size

cdef const capabilities_t* capabilities() noexcept nogil

# -> base: `size` fresh inaccessible bytes at a multiple of granularity, charged to nothing but
# address space. watched: touched() will be asked about them, and they may cost more for that; a wish.
cdef int reserve(size_t size, bint watched, char** base) noexcept nogil

# [at, at+size) lies in one reservation; each page was never committed, or was decommitted, or has
# been hidden by protect(ACCESS_NONE). -> readable, writable; a hidden page has the bytes that it had,
# any other is zero. Refused, hidden pages may be decommitted.
cdef int commit(char* at, size_t size) noexcept nogil

# [at, at+size) lies in one reservation. -> inaccessible; contents and their charge are gone.
cdef int decommit(char* at, size_t size) noexcept nogil

# [at, at+size) is committed, and readable and writable unless discard_any_protection.
# -> reads as zero, protection kept, physical pages given back.
cdef int discard(char* at, size_t size) noexcept nogil

# [at, at+size) is committed, readable and writable, and nobody else looks at it. -> reads as zero,
# physical pages given back; the cheapest way to that. Refused, it may have become inaccessible.
cdef int renew(char* at, size_t size) noexcept nogil

# Only where `scans`. [at, at+size) is committed. In: the room in `runs` (*n > 0). -> *n runs, in order,
# and *next: each page before it that may hold a byte which is not zero (over_image: which is not the
# mapped image's) lies in one of them. *next == at + size: that was all. A page that the kernel has
# swapped out or is moving about is one that may. Where it cannot be told, any code.
cdef int touched(char* at, size_t size, bint over_image, span* runs, size_t* n, char** next) noexcept nogil

# As touched(), of each page that the page tables know of, also one that was only read; [at, at+size) lies in one
# reservation, of any protection. Not everywhere where `scans`: then any code.
cdef int present(char* at, size_t size, span* runs, size_t* n, char** next) noexcept nogil

# [at, at+size) lies in one reservation. The kernel may use huge pages there from now on; a wish.
cdef int advise_huge(char* at, size_t size) noexcept nogil

# [at, at+size) is committed. access: an ACCESS_ constant. Code that was written there before it became
# ACCESS_READ_EXECUTE is what is executed. Refused, a part of it may have the access already, where the pages
# differed in protection before; and a host may refuse ACCESS_READ_EXECUTE as such.
cdef int protect(char* at, size_t size, int access) noexcept nogil

# [at, at+size) is committed and writable. -> every page is resident, no byte has changed.
cdef int prefault(char* at, size_t size) noexcept nogil

# Only where `moves`. [at, at+size) is committed and one mapping (committed in one run, never
# protected otherwise); [to, to+new_size) lies in another reservation, new_size >= size.
# -> the pages stand at `to` with the same bytes, zero after them, readable and writable; the range
# at `at` belongs to no one.
cdef int move(char* at, size_t size, char* to, size_t new_size) noexcept nogil

# The pages of an image: filled once, then never written again by anyone.
#   image_begin()  -> `size` bytes of zeros, which image_write() may fill. The best kind that the OS grants.
#   image_end()    -> immutable; `bytes` can be read. Nothing that was not written takes space until it is read.
#   image_open()   -> the bytes of a file from `position` (a multiple of page_size) on, immutable at once.
#   image_drop()   after any of these, also where image_write() or image_end() failed; bytes are unmapped.
# Refused, image_begin() and image_open() leave nothing behind. image_open() says IMAGE_SHORT where the file ends
# before position + size, and IMAGE_OPEN where somebody may still write to it: neither is a code of the OS.
cdef enum:
    IMAGE_SEALED = 1                # memory that nobody can write any more, whoever has the descriptor
    IMAGE_FILE = 2                  # a file, without a name where it is ours
    IMAGE_SECTION = 3               # a section object
    IMAGE_PRIVATE = 4               # pages of this process alone
    IMAGE_SHORT = -1000
    IMAGE_OPEN = -1001

cdef extern from *:
    """
    #ifndef LINMEM_IMAGE_PAGES_H
    #define LINMEM_IMAGE_PAGES_H
    typedef struct { int kind, maps; long long handle, position; char *bytes; size_t size; } linmem_image_pages;
    #endif
    """
    ctypedef struct image_pages "linmem_image_pages":
        int kind
        bint maps                   # image_map() works with it
        long long handle            # a descriptor or handle of this process that shows the same bytes; -1: none
        long long position          # of the first byte in what the handle shows
        char* bytes
        size_t size

cdef int image_begin(size_t size, image_pages* out) noexcept nogil
cdef int image_write(image_pages* into, size_t offset, const char* bytes, size_t size) noexcept nogil
cdef int image_end(image_pages* it) noexcept nogil
cdef int image_open(int descriptor, long long position, size_t size, image_pages* out) noexcept nogil
cdef void image_drop(image_pages* it) noexcept nogil

# Only where it->maps. [at, at+size) is committed (or an image's already). -> readable and writable, the
# image's bytes from `offset` (a multiple of page_size) on; what is written there is the process's own.
# discard() and renew() are not for such pages: what is read there afterwards differs among systems.
cdef int image_map(const image_pages* it, size_t offset, char* at, size_t size) noexcept nogil

# [at, at+size) is what image_map() made of `offset`, of any protection where discard_any_protection.
# -> what was written there is given back, and the image is seen again.
cdef int image_renew(const image_pages* it, size_t offset, char* at, size_t size) noexcept nogil

# Only where maps_images. [at, at+size) is committed. -> zero, readable and writable, and no image's any more.
cdef int blank(char* at, size_t size) noexcept nogil

# -> bytes: how much of [at, at+size) is in physical memory.
cdef int resident(char* at, size_t size, size_t* bytes) noexcept nogil

# [at, at+size) is a whole reservation (where `moves`: or a part of one). -> not ours any more.
cdef int release(char* at, size_t size) noexcept nogil

# The address space of this process: `total` bytes, of which `left` may still be reserved under the
# limits in force now (left == total where none is).
cdef void address_space(size_t* total, size_t* left) noexcept nogil

# Bytes of address space that the page floor holds now: every reservation, whole, and every image's `bytes`. Counted
# before the OS is asked for them and until the OS has taken them back, so the number is never too small.
cdef size_t reserved() noexcept nogil

# Plain words for a code; static text.
cdef const char* code_text(int code) noexcept nogil

# Writes into `text` (room bytes, always terminated) which limit refused `size` bytes with `code`,
# as far as the OS lets it be known; else the empty string.
cdef void limit_text(int code, size_t size, char* text, size_t room) noexcept nogil

# From now on called around every fork: in the thread that forks before it, and there after it in the parent and in
# the child. Where there is no fork: nothing.
cdef int at_fork(void (*before)() noexcept nogil, void (*in_parent)() noexcept nogil,
                 void (*in_child)() noexcept nogil) noexcept nogil

# Gives the processor to another thread; sleeps for about so many nanoseconds (at least a tick of the system's clock);
# monotonic nanoseconds; the same clock's, a few milliseconds old, for much less.
cdef void relax() noexcept nogil
cdef void sleep_ns(long long ns) noexcept nogil
cdef long long clock_ns() noexcept nogil
cdef long long coarse_ns() noexcept nogil

# Tests only: every page call of this floor asks `injected()` first and fails with what it returns.
cdef int injected() noexcept nogil
