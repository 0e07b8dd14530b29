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
from linmem._memory cimport (
    CACHE_LINE, ImageHandle, NativeCreator, failure, fork_lock, image, memory, memory_hook, memory_spec, relief,
)
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
    char apart[CACHE_LINE]  # the shape is only read
    slot* warm              # its idle slots, the last one given back first
    slot* cold
    size_t slots            # live and idle

cdef enum:
    BUCKETS = 64

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
    size_t hits             # how often it was handed out again
    size_t resets[3]        # by kind
    reset_policy policy
    char apart[CACHE_LINE]  # another thread's slot may come next

# Idle slots by when they became so.
cdef struct line:
    slot* newest
    slot* oldest

# Shared by a PoolingCreator and its slots; wasmtime may outlive the creator. What every thread writes for each
# memory is one line of the caches, and what is only read is in another: it stays in each processor's own.
cdef struct pool:
    # These never change.
    void* block             # what the pool lies in
    size_t most_slots
    size_t keep_resident
    size_t most_warm
    size_t resident_bound
    int reset               # a kind of reset, or ADAPTIVE
    bint fall_back
    bint check
    word closed
    char apart[CACHE_LINE]
    fork_lock lock          # of all that follows; at the start of a line
    size_t n_warm
    size_t resident         # bytes, of all idle slots
    line warm
    line cold
    size_t n_cold
    size_t n_slots
    size_t misses
    size_t fallbacks
    size_t rejected
    size_t hits             # without those of the slots that there are
    size_t resets[3]        # by kind; the same
    slot* slots
    word refs
    char apart_too[CACHE_LINE]
    shelf* buckets[BUCKETS]
    relief relief           # idle slots go when the OS refuses address space to any memory


cdef class PoolingCreator(NativeCreator):
    cdef readonly NativeCreator upstream
    cdef readonly ImageHandle image
    cdef pool* pool
    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil
    cdef int make_of(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil
    cdef memory* take(self, pool* p, const shape* key) noexcept nogil
    cdef int make_slot(self, pool* p, const shape* key, const memory_spec* spec, memory** out,
                       failure* why) noexcept nogil
