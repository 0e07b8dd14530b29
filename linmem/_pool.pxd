# The pool: slots that memories are handed out from again and again. Floor 4.
#
#  |<- pre_guard ->|<------------------- capacity (reserved) ------------------->|<- guard ->|
#  +---------------+----------------+------------------------+--------------------+-----------+
#  | inaccessible  | accessible     | hidden: zero, resident | never committed    | inaccess. |
#  +---------------+----------------+------------------------+--------------------+-----------+
#                  ^base            ^base+least              ^base+high
#  A warm slot. Its last guest had grown to `high` or less; growing again up to there finds the pages
#  where they were, and zero. Where "zero" is said of accessible bytes, those of an image are the image's.

from linmem._atomic cimport word
from linmem._memory cimport (
    CACHE_LINE, ImageHandle, NativeCreator, domain, failure, fork_lock, image, memory, memory_hook, memory_spec,
)
from linmem._reset cimport reset_policy

# The states of a slot. move_slot() is the only function that changes one.
#
#            +------------------------ take -----------------------+
#            v                                                     |
#   made -> LIVE -- last reference gone --> RESETTING -- reset --> WARM -- chosen --> COOLING -- done --> COLD
#            ^                                 |                   |                    |                  |
#            +------------- take --------------|-------------------|--------------------|------------------+
#                                              v                   v                    v                  v
#                                           DROPPING  (from each of them; then the slot is freed)
cdef enum:
    LIVE = 0                # a guest has it, or is about to get it
    RESETTING = 1           # its last guest is gone
    WARM = 2                # idle; accessible as when it is handed out, pages kept
    COLD = 3                # idle; nothing but address space
    COOLING = 4             # its pages are being given back
    DROPPING = 5            # on its way back to upstream

# Why an idle slot lost its pages or was dropped.
cdef enum:
    EVICTED_COUNT = 0       # max_unused_warm
    EVICTED_RESIDENT = 1    # what the pool's idle slots may keep resident
    EVICTED_PROCESS = 2     # what all pools may keep resident, or reserved
    EVICTED_SLOTS = 3       # room for a new slot
    EVICTED_RESERVED = 4    # max_reserved
    EVICTED_REFUSED = 5     # a budget or the OS had refused what the slot held
    EVICTED_IMAGE = 6       # the slot's image is forgotten: see `image` in _memory.pxd
    EVICTED_TRIM = 7        # trim()
    EVICTED_IDLE = 8        # idle_seconds
    EVICTED_PURGE = 9       # purge()
    CAUSES = 10

# What a slot was made for; it serves equal requests only.
cdef struct shape:
    size_t minimum
    size_t maximum
    size_t reservation
    size_t guard
    bint is_64
    bint is_shared
    image* image            # asked for; a slot of the shape holds a reference

# What is counted for a slot, and for a kind, a tenant and the pool of the slots that are gone.
cdef struct counts:
    size_t hits_warm
    size_t hits_cold
    size_t misses
    size_t resets[3]        # by kind of reset
    size_t zeroed           # bytes
    size_t reset_ns         # sampled: one reset of sixteen, times sixteen
    size_t evictions[CAUSES]

# All slots of one shape.
cdef struct kind:
    kind* next              # in its bucket
    shape shape
    slot* cold              # its cold slots, of whatever domain the last guest was: they have no pages
    size_t slots
    size_t shelves
    size_t live             # with a guest
    size_t peak_live
    counts gone
    size_t row              # of a report that is being made

# All slots whose pages were touched by guests of one domain.
cdef struct tenant:
    tenant* next            # of the pool's
    domain* domain          # a reference; NULL: no domain was named
    size_t n_warm
    size_t held             # bytes that its warm slots keep, page tables included,
    size_t warm_least       # have accessible,
    size_t warm_high        # and committed
    size_t live             # slots with a guest
    size_t peak_live
    size_t slots            # here begins what is seldom written
    size_t shelves
    counts gone
    size_t row

# The slots of one shape and one domain.
cdef struct shelf:
    shelf* next             # in its bucket
    kind* kind
    tenant* tenant
    domain* domain          # the tenant's
    shape shape             # the kind's
    char apart[CACHE_LINE]  # what is above is only read
    slot* warm              # its warm slots, the last one given back first
    size_t slots            # live and idle

# Which part of a slot is what, in bytes from the base on; whole host pages. While it is idle:
#   WARM   accessible == least,  least <= high,  hidden <= high - least
#   COLD   accessible == high == hidden == 0
cdef struct extent:
    size_t least            # accessible when it is handed out
    size_t accessible       # now
    size_t high             # committed; beyond `accessible` it is hidden
    size_t hidden           # how many of the hidden bytes may be resident

# What the memory was when upstream made it, restored whole whenever it is handed out.
cdef struct handed_out:
    long long size          # byte_size: what upstream made may be less than was asked for
    size_t maximum
    size_t pre_guard
    size_t guard
    size_t covered
    bint is_shared
    bint moved
    bint huge_pages
    bint growth_is_watched  # by upstream's hooks

cdef struct slot:
    memory_hook head        # hangs on the memory; below it what upstream hung there
    pool* pool
    shelf* shelf
    memory* m
    slot* below             # on its stack, idle only; of a slot that is DROPPING: in the list of its dropper
    slot* above
    slot* older             # of the pool's warm slots, or of its cold ones
    slot* newer
    slot* next              # of all slots of the pool
    slot* previous
    word state
    const void* thread      # that gave it back
    image* image            # a reference on what it starts from; NULL: zeros
    char* base
    size_t capacity
    handed_out given
    extent pages
    size_t resident         # bytes that may be resident while it is idle
    size_t tables           # bytes of page tables that it may have, idle or not
    size_t old_tables       # of these, from before the pages were last given back
    size_t reserved         # bytes of address space, guards included
    size_t mappings         # that it takes, at most
    unsigned int budgets    # bits: which of the pool's it is charged to
    bint unfilled           # a prefaulted memory whose pages have been given back
    bint has_guest          # counted as live
    bint changed_domain     # guests of another domain than the one that it was made for have had it
    long long since         # when it became idle, or was handed out: of the coarse clock
    long long grown         # when a guest last grew beyond `least`
    long long emptied       # when all its pages were last given back
    unsigned int uses       # since then
    reset_policy policy
    size_t zeroed           # bytes, by the reset under way
    counts counts           # under the lock
    char apart[CACHE_LINE]  # another thread's slot may come next

# Idle slots by when they became so.
cdef struct line:
    slot* newest
    slot* oldest

# A budget below the pool, and how many slots are charged to it.
cdef struct charged_slots:
    const void* budget      # NULL: of none
    size_t slots

cdef enum:
    SHELVES = 256
    KINDS = 64
    BUDGETS = 4

# Shared by a PoolingCreator and its slots; wasmtime may outlive the creator. What every thread writes for each
# memory is two lines of the caches, and what is only read is in a third: it stays in each processor's own.
cdef struct pool:
    # These never change, but for `closed`.
    void* block             # what the pool lies in
    size_t most_slots
    size_t reserved_bound
    long long wait_ns       # -1: without an end
    bint fall_back
    bint wait
    size_t most_mappings    # from here on a line that is read for each memory
    size_t keep_resident
    size_t most_warm
    size_t resident_bound
    long long idle_ns       # 0: idle slots are not purged by time
    long long reset_ns      # 0: a reset may take as long as it does
    int reset               # a kind of reset, or ADAPTIVE
    bint check
    bint closed             # under the lock
    char apart[CACHE_LINE]
    fork_lock lock          # of all that follows but for refs; at the start of a line, and so is `look`
    size_t n_warm
    size_t resident         # bytes, of all idle slots
    size_t tables           # bytes of their page tables
    line warm
    long long look          # no slot has been idle for too long before then: of the coarse clock
    size_t live             # slots with a guest; not those that warm() holds
    size_t peak_live
    size_t told             # of resident + tables, what the sum over all pools has heard; never less than they are
    size_t idle_reserved    # bytes of address space, of idle slots
    size_t warm_least       # bytes that warm slots have accessible
    size_t warm_high        # and committed
    size_t n_busy           # tenants with warm slots
    size_t mappings         # here begins what is seldom written
    size_t n_cold
    size_t n_slots
    line cold
    size_t reserved         # bytes, of all slots
    size_t fallbacks
    size_t rejected
    counts gone             # of slots that are gone, and all misses and evictions
    slot* slots
    tenant* tenants
    size_t n_tenants
    size_t n_kinds
    size_t empty_tenants    # without a slot
    size_t empty_kinds
    charged_slots budgets[BUDGETS]
    bint more_budgets       # a slot was charged to others, or to one of them twice
    word refs
    pool* next_pool         # of all pools, under their lock
    pool* previous_pool
    char apart_too[CACHE_LINE]
    shelf* shelves[SHELVES]
    kind* kinds[KINDS]


cdef word census_lock       # protects the census of domains: see _pool.pyx


cdef class PoolingCreator(NativeCreator):
    cdef readonly NativeCreator upstream
    cdef readonly ImageHandle image
    cdef pool* pool
    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil
    cdef int make_of(self, const memory_spec* spec, bint counted, memory** out, failure* why) noexcept nogil
    cdef int make_slot(self, pool* p, const shape* key, domain* whose, const memory_spec* spec, bint counted,
                       memory** out, failure* why) noexcept nogil
    cdef int pass_on(self, pool* p, const memory_spec* spec, memory** out, failure* why) noexcept nogil
