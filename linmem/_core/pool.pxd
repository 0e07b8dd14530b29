# The pool: slots, which are memories of an upstream creator that serve one guest after the other. Layer 4.
#
#  |<- pre_guard ->|<------------------- capacity (reserved) ------------------->|<- guard ->|
#  +---------------+----------------+------------------------+--------------------+-----------+
#  | inaccessible  | accessible     | hidden: zero, resident | never committed    | inaccess. |
#  +---------------+----------------+------------------------+--------------------+-----------+
#                  ^base            ^base+initial            ^base+committed
#  A warm slot. Former guests have grown up to `committed`; a guest that grows again up to there finds resident pages
#  that hold zeros. Where a comment says that accessible bytes are zero, the bytes of an image are the image's instead.

from linmem._core.linked_list cimport link
from linmem._core.memory cimport (
    CACHE_LINE, Image, NativeCreator, domain, failure, fork_lock, image, memory, memory_hook, memory_spec,
)
from linmem._core.reset_policy cimport reset_policy
from linmem._core.units cimport atomic_i64

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
    LIVE = 0                # a guest has the slot, or is about to get it
    RESETTING = 1           # the last guest is gone
    WARM = 2                # idle; accessible as when it is handed out, pages kept
    COLD = 3                # idle; keeps address space only
    COOLING = 4             # linmem is giving the slot's pages back
    DROPPING = 5            # the slot's memory is being released to upstream

# Why an idle slot lost its pages or was dropped.
cdef enum:
    EVICTED_COUNT = 0       # max_unused_warm
    EVICTED_RESIDENT = 1    # max_resident of the pool
    EVICTED_PROCESS = 2     # a bound of set_pool_limits()
    EVICTED_SLOTS = 3       # room for a new slot
    EVICTED_RESERVED = 4    # max_reserved
    EVICTED_REFUSED = 5     # a budget or the OS refused something that the slot held
    EVICTED_IMAGE = 6       # the slot's image is forgotten: see `image` in memory.pxd
    EVICTED_TRIM = 7        # trim()
    EVICTED_IDLE = 8        # idle_seconds
    EVICTED_PURGE = 9       # purge()
    CAUSES = 10

# The request that a slot was made for. A slot serves equal requests only.
cdef struct shape:
    size_t minimum, maximum, reservation, guard
    bint is_64, is_shared
    image* image            # of the request; each slot of the shape holds a reference

# The counts of a slot. All members have the type size_t: see add_counts().
cdef struct counts:
    size_t hits_warm, hits_cold, misses
    size_t resets[3]        # by kind of reset
    size_t zeroed           # bytes
    size_t reset_ns         # estimated: one reset of sixteen is timed, and counts sixteen times
    size_t evictions[CAUSES]

# The sums over all slots of a pool, of a shape, or of a domain.
cdef struct totals:
    size_t live             # slots with a guest; slots that warm() holds are not counted
    size_t peak_live
    counts counts           # of slots that are gone, and all misses and evictions

# The sums over the warm slots of a pool or of a domain.
cdef struct warm_totals:
    size_t n
    size_t resident         # bytes
    size_t tables           # bytes of page tables
    size_t initial          # bytes that are accessible
    size_t committed        # bytes

# A group holds slots of one shape, of one domain, or of one shape and one domain.
cdef enum:
    BY_BOTH = 0
    BY_SHAPE = 1
    BY_DOMAIN = 2
    GROUPINGS = 3

cdef struct group:
    group* next             # in its bucket
    domain* domain          # BY_BOTH and BY_DOMAIN: a reference; NULL: the requests named no domain
    shape shape             # BY_BOTH and BY_SHAPE
    group* of[GROUPINGS]    # BY_BOTH: the groups BY_SHAPE and BY_DOMAIN that its slots are in
    link in_table
    size_t row              # of the report under way
    char apart[CACHE_LINE]  # the members above are only read
    # Idle slots, the last one given back first. BY_BOTH: warm ones. BY_SHAPE: cold ones of all domains, because cold
    # slots have no pages.
    link stack
    size_t members          # BY_BOTH: slots. BY_SHAPE and BY_DOMAIN: groups BY_BOTH
    warm_totals warm        # BY_DOMAIN
    totals own              # BY_SHAPE and BY_DOMAIN

cdef enum:
    BUCKETS = 256
    EMPTY_GROUPS = 256      # the most groups without members that a table keeps because of their counts
    BUDGETS = 4             # the most that a pool knows

cdef struct group_table:
    link groups
    size_t n
    size_t n_empty          # groups without members; some are kept because of their counts
    group* buckets[BUCKETS]

# Parts of a slot, in bytes from the base on; whole host pages. While the slot is idle:
#   WARM   `initial` bytes are accessible,  initial <= committed,  hidden <= committed - initial
#   COLD   no byte is accessible,  committed == hidden == 0
cdef struct extent:
    size_t initial          # accessible when the slot is handed out
    size_t committed        # the bytes between the accessible ones and here are hidden
    size_t hidden           # how many of the hidden bytes may be resident

# Members of the memory as upstream made it, which guests and creators above may change. A copy of the memory's whole
# struct would take more cache lines.
cdef struct original_memory:
    char* base
    long long size          # may be less than the request asks for
    size_t capacity, maximum, pre_guard, guard, covered
    bint is_shared, has_moved, huge_pages, growth_is_watched

cdef struct slot:
    memory_hook head        # on the memory; the hooks of upstream are below
    pool* pool
    group* group            # BY_BOTH
    memory* m
    link in_stack           # WARM and COLD: of its group. Otherwise in a list of slots to drop or to release
    link by_age             # WARM and COLD: in the pool's list, the newest first
    link in_pool            # all slots of the pool
    atomic_i64 state
    const void* thread      # the thread that gave it back
    image* image            # the start of each guest, a reference; NULL: zeros
    original_memory original
    extent pages
    size_t resident         # bytes that may be resident while it is idle
    size_t tables           # bytes of page tables that it may have, idle or not
    size_t old_tables       # of `tables`, the part from before the pages were last given back
    size_t reserved         # bytes of address space, guards included
    size_t mappings         # the most that it takes
    unsigned int budgets    # bits: the members of the pool's `budgets` that it is charged to
    bint unfilled           # the memory is prefaulted, but the pages have been given back
    bint has_guest          # counted as live
    bint changed_domain     # the slot has served other domains than the first one
    long long since         # when it became idle, or was handed out; coarse clock
    long long grown         # when a guest last grew beyond `initial`
    long long emptied       # when all its pages were last given back
    unsigned int uses       # since then
    reset_policy policy
    size_t zeroed           # bytes, by the reset under way
    counts counts           # written under the lock, by the thread that owns the slot
    char apart[CACHE_LINE]  # another thread's slot may be the next one in memory

# A budget below the pool, and how many slots are charged to it.
cdef struct charged_slots:
    const void* budget      # NULL: the entry is free
    size_t slots

# Shared by a PoolingCreator and its slots, because wasmtime may outlive the creator. Members are in the order of use:
# the first cache lines are only read, the next ones are written for each memory.
cdef struct pool:
    # The members of this part never change, except `closed`.
    void* block             # the allocation that holds the pool
    size_t most_slots, reserved_bound
    long long wait_ns       # -1: without end
    bint fall_back, wait
    size_t most_mappings    # here begins a cache line that is read for each memory
    size_t keep_resident, most_warm, resident_bound
    long long idle_ns       # 0: idle slots are not purged by time
    long long reset_ns      # 0: no bound on the time of a reset
    int reset               # a kind of reset, or ADAPTIVE
    bint check
    bint closed             # under the lock
    char apart[CACHE_LINE]
    fork_lock lock          # of all members below except `refs`; `lock` and `warm_by_age` are at the start of a line
    warm_totals warm
    link warm_by_age        # warm slots, the newest first
    size_t idle_reserved    # bytes of address space, of idle slots
    size_t warm_domains     # domains with warm slots
    long long next_purge    # before then no slot exceeds idle_seconds; coarse clock
    totals own              # all members after live and peak_live are seldom written
    size_t reported         # the part of process_held for this pool; never less than the pool keeps
    size_t mappings
    size_t n_cold, n_slots
    link cold_by_age
    link slots              # all
    size_t reserved         # bytes, of all slots
    size_t fallbacks, rejected
    charged_slots budgets[BUDGETS]
    bint more_budgets       # a slot was charged to other budgets, or to one of them twice
    atomic_i64 refs
    link in_pools           # of all pools, under pools_lock
    char apart_too[CACHE_LINE]
    group_table tables[GROUPINGS]


cdef atomic_i64 census_lock       # see pool_eviction.pxi


cdef class PoolingCreator(NativeCreator):
    cdef readonly NativeCreator upstream
    cdef readonly Image image
    cdef pool* pool
    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil
