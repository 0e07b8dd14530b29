# The C interface of the classes Offer and Writes: images for the next memories that wasmtime asks for on a thread, and
# the state that is written into a new instance. Layer 4.

from libc.stdint cimport uint64_t

from linmem._core.memory cimport image


cdef struct place:
    size_t minimum              # of the memory, in bytes, as wasmtime asks for it
    size_t size                 # that the memory gets, in bytes; >= minimum
    image* image                # NULL: the memory starts as zeros


cdef class Offer:
    cdef place* places
    cdef size_t n
    cdef tuple images           # holds the references on the images of `places`
    # For a call of wasmtime between both, without the GIL. The caller must hold a reference on the Offer. begin()
    # returns False if another offer of the thread has places left; end() returns how many images no memory has taken.
    cdef bint begin(self) noexcept nogil
    cdef size_t end(self) noexcept nogil


# A value of a global, or the growth of a memory, in an instance.
cdef struct write:
    const char* name            # of the export
    size_t name_size
    uint64_t delta              # wasm pages by which the memory grows; 0: a global is set
    const void* value           # wasmtime_val_t*, of a global


cdef class Writes:
    cdef write* writes
    cdef size_t n
    cdef tuple given            # references
    cdef size_t write_all(self, void* context, void* instance, void** error) noexcept nogil
