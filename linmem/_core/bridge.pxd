# The C interface of class Offer: images for the next memories that wasmtime asks for on a thread. Layer 4.

from linmem._core.memory cimport image


cdef struct place:
    size_t minimum              # of the memory, in bytes
    image* image                # NULL: the memory starts as zeros


cdef class Offer:
    cdef place* places
    cdef size_t n
    cdef tuple images           # holds the references on the images of `places`
    # make() and take_back() without the GIL. The caller must hold a reference on the Offer.
    cdef bint begin(self) noexcept nogil
    cdef size_t end(self) noexcept nogil
