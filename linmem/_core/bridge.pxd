# Offers of images, for callers in C. Layer 4.

from linmem._core.memory cimport image


cdef struct place:
    size_t minimum              # of the memory, in bytes
    image* image                # NULL: the memory starts as zeros


cdef class Offer:
    cdef place* places
    cdef size_t n
    cdef tuple images           # references
    # make() and take_back() for a caller that holds a reference on the Offer, and not the GIL.
    cdef bint begin(self) noexcept nogil
    cdef size_t end(self) noexcept nogil
