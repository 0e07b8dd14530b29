# The pool: slots that memories are handed out from again and again. Floor 4.
#
#  |<- pre_guard ->|<------------------- capacity (reserved) ------------------->|<- guard ->|
#  +---------------+----------------+------------------------+--------------------+-----------+
#  | inaccessible  | accessible     | hidden: zero, resident | never committed    | inaccess. |
#  +---------------+----------------+------------------------+--------------------+-----------+
#                  ^base            ^base+least              ^base+high
#  An idle slot. Its last user had grown to `high` or less; growing again up to there finds the pages
#  where they were, and zero. Where "zero" is said of accessible bytes, those of an image are the image's.

from linmem._atomic cimport word
from linmem._memory cimport ImageHandle, NativeCreator, failure, guarded, image, memory, memory_hook, memory_spec
from linmem._reset cimport reset_policy

# What a slot was made for; it serves equal requests only.
cdef struct shape:
    size_t minimum
    size_t maximum
    size_t reservation
    size_t guard
    bint is_64
    bint is_shared
    image* image            # that they start from; a slot of the shelf holds a reference

cdef struct shelf:
    shelf* next             # in its bucket
    shape shape
    slot* warm              # its idle slots, the last one given back first
    slot* cold
    size_t slots            # live and idle

cdef enum:
    LIVE = 0                # handed out, or between two states
    WARM = 1                # idle, accessible, pages kept
    COLD = 2                # idle, nothing but address space

cdef struct slot:
    memory_hook head        # hangs on the memory; below it what upstream hung there
    pool* pool
    shelf* shelf
    memory* m
    slot* below             # on its shelf, idle only
    slot* above
    slot* older             # of the pool's warm slots, or of its cold ones
    slot* newer
    slot* next              # of all slots of the pool
    slot* previous
    int state
    const void* thread      # that gave it back
    bint doomed             # not to be kept again
    bint growth_is_watched  # by upstream's hooks
    image* image            # a reference on what its memories start from; NULL: zeros
    char* base
    size_t capacity
    size_t least            # bytes accessible when it is handed out
    long long first_size    # byte_size then: what upstream made, which may be less than was asked for
    size_t high             # bytes that have been committed; beyond `accessible` they are hidden
    size_t hidden           # of these, how many may be resident
    size_t resident         # bytes that may be resident while it is idle
    reset_policy policy

cdef enum:
    BUCKETS = 64

# Shared by a PoolingCreator and its slots; wasmtime may outlive the creator.
cdef struct pool:
    word refs
    word closed
    guarded guard           # of all that follows, but for what never changes
    slot* slots
    slot* newest[3]         # idle slots by when they became WARM, and COLD
    slot* oldest[3]
    shelf* buckets[BUCKETS]
    size_t n_slots
    size_t n_warm
    size_t n_cold
    size_t resident         # bytes, of all idle slots
    size_t hits
    size_t misses
    size_t fallbacks
    size_t rejected
    size_t resets[3]        # by kind
    # These never change.
    size_t most_slots
    size_t keep_resident
    size_t most_warm
    size_t resident_bound
    int reset               # a kind of reset, or ADAPTIVE
    bint fall_back
    bint check


cdef class PoolingCreator(NativeCreator):
    cdef readonly NativeCreator upstream
    cdef readonly ImageHandle image
    cdef pool* pool
    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil
    cdef int make_of(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil
    cdef memory* take(self, pool* p, const shape* key) noexcept nogil
    cdef int make_slot(self, pool* p, const shape* key, const memory_spec* spec, memory** out,
                       failure* why) noexcept nogil
