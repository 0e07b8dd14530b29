# Sizes and codes: pure arithmetic, no system call. Layer 0: imports no module of linmem.

from libc.stdint cimport SIZE_MAX

# An integer in a struct that threads share without the GIL. atomic.pxd has the operations on it. The type is here, so
# that a module which only knows the structs needs no C header.
ctypedef long long atomic_i64

# The codes of nogil functions for failures that linmem itself finds. Positive numbers are codes of the OS (errno,
# GetLastError); 0 is success.
cdef enum:
    E_NO_MEMORY = -1        # malloc refused
    E_OVERFLOW = -2         # the sum of the sizes does not fit an address
    E_SHRINK = -3           # grow_to below byte_size
    E_MAXIMUM = -4          # growth past the declared maximum
    E_CAPACITY = -5         # growth past the capacity of a memory that must not move
    E_EXPORTED = -6         # growth past the capacity while a buffer is exported
    E_LIMIT = -7            # a LimitingCreator's budget is used up
    E_UNSUPPORTED = -8      # this kind of memory does not have the operation
    E_PYTHON = -9           # a Python creator or memory raised; the exception is in the failure
    E_EXHAUSTED = -10       # every slot of a pool is in use
    E_IMAGE = -11           # the memory is smaller than its image
    E_OWNED = -12           # a wasmtime store owns the memory, so Python must not do this
    E_PROTECTED = -13       # the bytes lie in pages whose access does not allow it
    E_OWN_GROWTH = -14      # this thread is growing the memory, and would wait for itself
    E_BROKEN = -15          # a memory of a Python creator has failed to report where its bytes are
    E_VALUE = -16           # an argument has a wrong value; the failure's detail is the whole message
    E_GROWTHS = -17         # a CallbackCreator's limit_growths is used up
    E_MAPPINGS = -18        # windows would take more than half of the mappings of the process
    E_FILE = -20            # another program has changed the size of the memory's file


cdef inline bint is_power_of_two(size_t n) noexcept nogil:
    return n != 0 and (n & (n - 1)) == 0


cdef inline size_t round_down(size_t n, size_t unit) noexcept nogil:
    """unit: a power of two."""
    return n & ~(unit - 1)


cdef inline int round_up(size_t n, size_t unit, size_t* out) noexcept nogil:
    """unit: a power of two. The check comes first: a sum that overflows would be a small size, and the next access
    would fault."""
    if n > SIZE_MAX - (unit - 1):
        return E_OVERFLOW
    out[0] = (n + unit - 1) & ~(unit - 1)
    return 0


cdef inline int add_up(size_t a, size_t b, size_t* out) noexcept nogil:
    if a > SIZE_MAX - b:
        return E_OVERFLOW
    out[0] = a + b
    return 0


#  |<- pre_guard ->|<------------- capacity (reserved) ------------->|<- guard ->|
#  +---------------+----------------------+---------------------------+-----------+
#  | inaccessible  | accessible           | reserved, inaccessible    | inaccess. |
#  +---------------+----------------------+---------------------------+-----------+
#                  ^base     ^byte_size   ^accessible                 ^base+byte_capacity
cdef struct layout:
    size_t pre_guard        # bytes, >= 1 host page
    size_t accessible       # bytes, minimum rounded up
    size_t capacity         # bytes, >= 1 host page, so that no two memories have the same base
    size_t guard            # bytes, may be 0
    size_t total            # pre_guard + capacity + guard


cdef inline int lay_out(size_t minimum, size_t reservation, size_t guard, size_t page,
                        layout* out) noexcept nogil:
    """Round a request to host pages of `page` bytes (a power of two).

    base .. max(capacity, reservation) + guard is what JIT code may touch, so both are rounded up,
    never down. The guard is mirrored before the base, as wasmtime does: a sign-extended 32-bit
    offset then lands in it too.
    """
    cdef size_t want = minimum if minimum > reservation else reservation
    if want == 0:
        want = 1
    if (round_up(minimum, page, &out.accessible) or round_up(want, page, &out.capacity)
            or round_up(guard, page, &out.guard)):
        return E_OVERFLOW
    out.pre_guard = out.guard if out.guard > page else page
    if add_up(out.capacity, out.guard, &out.total) or add_up(out.total, out.pre_guard, &out.total):
        return E_OVERFLOW
    return E_OVERFLOW if out.total > SIZE_MAX >> 1 else 0       # the length of a Python buffer is a Py_ssize_t


# How large a reservation is if the caller named no size.
#   chosen   the bytes of all reservations whose size linmem chose, with their minimums and guards
#   asked    the bytes of all other reservations, whose size callers named
#   room     how many bytes `chosen` may still grow by
# Invariant: chosen <= (address space - asked) / 2, however many memories there are.

cdef enum:
    SMALL_RESERVATION = 1 << 20     # bytes: the least that linmem chooses beyond the minimum while there is room
    MEMORY_TIMES = 4                # a share of the room is at most this many times the machine's memory


cdef inline size_t room_to_choose(size_t space, size_t left, size_t reserved, size_t chosen) noexcept nogil:
    """space: the whole user address space; left: the part that limits such as RLIMIT_AS leave (== space without a
    limit); reserved: all bytes that linmem has reserved."""
    cdef size_t asked = reserved - chosen if reserved > chosen else 0
    cdef size_t unasked = space - asked if space > asked else 0
    if left < space and left + chosen < unasked:
        unasked = left + chosen
    unasked >>= 1
    return unasked - chosen if unasked > chosen else 0


cdef inline size_t choose_reservation(size_t minimum, size_t maximum, bint bounded, size_t room, size_t others,
                                      size_t memory) noexcept nogil:
    """Returns how many bytes to reserve. The result is `minimum` if there is no room for more.

    A known maximum is reserved whole if the part above the minimum fits half of the room. Otherwise the minimum gets
    a share of the room on top: an eighth for the first memory, and less the more `others` of a chosen size there are.
    room: room_to_choose() minus the minimum and the guards; memory: bytes of the machine's memory, 0: unknown.
    """
    cdef size_t share = room // 4 // (others + 2)
    if bounded and maximum - minimum <= room >> 1:
        return maximum
    if memory and (share + MEMORY_TIMES - 1) // MEMORY_TIMES > memory:
        share = memory * MEMORY_TIMES
    if share < SMALL_RESERVATION:
        share = SMALL_RESERVATION if room >= SMALL_RESERVATION else 0
    if share > SIZE_MAX - minimum:
        share = 0
    if bounded and share > maximum - minimum:
        share = maximum - minimum
    return minimum + share
