# Images on offer, for callers in C. Floor 4.

from linmem._core.memory cimport image


cdef struct place:
    size_t minimum              # of the memory, in bytes
    image* image                # NULL: it starts as zeros


cdef class Offer:
    cdef place* places
    cdef size_t n
    cdef tuple images           # holds them
    # As make() and take_back(), for who holds the Offer in between and does not hold the GIL.
    cdef bint begin(self) noexcept nogil
    cdef size_t end(self) noexcept nogil
