# Zeroing bytes that are in the processor's cache. Layer 0: imports nothing of linmem.
#
# For more than some kilobytes, the memset of a C library uses the processor's string instruction. This instruction is
# best for bytes that are not in a cache. For bytes in a cache, plain wide stores are about 1.5 times as fast on some
# processors. The caller measures which of the two is faster on this machine.

cdef extern from "linmem/_core/wide_stores.h":
    bint has_wide_stores "linmem_has_wide_stores"() noexcept nogil
    # Requires has_wide_stores(); start and size are multiples of 128.
    void zero_wide "linmem_zero_wide"(char* start, size_t size) noexcept nogil
