# The pool. A slot is a memory of the upstream creator that serves one guest after the other. A guest is one use of the
# memory: it begins when the pool hands out the memory, and ends with the last reference on it. Layer 4.
#
#  |<- pre_guard ->|<------------------- capacity (reserved) ------------------->|<- guard ->|
#  +---------------+----------------+------------------------+--------------------+-----------+
#  | inaccessible  | accessible     | hidden: zero, resident | never committed    | inaccess. |
#  +---------------+----------------+------------------------+--------------------+-----------+
#                  ^base            ^base+initial            ^base+committed
#  A warm slot. Earlier guests grew up to `committed`. The pages beyond `initial` are hidden: inaccessible, but still
#  resident and zero, so that the next guest can grow into them without page faults. If the slot has an image, the bytes
#  that comments call zero are the bytes of the image, where the image has any.

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
    WARM = 2                # idle; keeps pages, and the bytes of the next guest are accessible
    COLD = 3                # idle; keeps only its address space
    COOLING = 4             # linmem is giving the slot's pages back
    DROPPING = 5            # the slot's memory is being released to upstream

# Why an idle slot lost its pages or was dropped.
cdef enum:
    EVICTED_COUNT = 0       # max_unused_warm
    EVICTED_RESIDENT = 1    # max_resident of the pool
    EVICTED_PROCESS = 2     # a bound of set_pool_limits()
    EVICTED_SLOTS = 3       # too many slots, or too many mappings
    EVICTED_RESERVED = 4    # max_reserved
    EVICTED_REFUSED = 5     # a budget or the OS refused a request for a resource that the slot held
    EVICTED_IMAGE = 6       # the slot's image is forgotten: see `image` in memory.pxd
    EVICTED_TRIM = 7        # trim()
    EVICTED_IDLE = 8        # idle_seconds
    EVICTED_PURGE = 9       # purge()
    CAUSES = 10

# The request that a slot was made for. A slot serves equal requests only.
cdef struct shape:
    size_t minimum, maximum, reservation, guard
    bint is_64, is_shared
    image* image            # the request's image; each slot of the shape holds a reference

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
    counts counts           # all misses and evictions; other counts only of slots that have left: see keep_counts()

# The sums over the warm slots of a pool or of a domain.
cdef struct warm_totals:
    size_t n
    size_t resident         # bytes
    size_t tables           # bytes of page tables
    size_t initial          # bytes that are accessible
    size_t committed        # bytes

# A group holds slots of one shape, of one domain, or of one shape and one domain. In the comments on its members, "in
# BY_BOTH" says that only groups of this kind use the member.
cdef enum:
    BY_BOTH = 0
    BY_SHAPE = 1
    BY_DOMAIN = 2
    GROUPINGS = 3

cdef struct group:
    group* next             # in its bucket
    domain* domain          # in BY_BOTH and BY_DOMAIN: a reference, or NULL if the requests named no domain
    shape shape             # in BY_BOTH and BY_SHAPE
    group* of[GROUPINGS]    # in BY_BOTH: the groups BY_SHAPE and BY_DOMAIN that hold the same slots
    link in_table
    size_t row              # the index of the group's row in the report that make_report() makes
    char apart[CACHE_LINE]  # padding: the members above are seldom written, and the members below often
    # Idle slots. The slot that became idle last is the first. A group BY_BOTH lists its warm slots. A group BY_SHAPE
    # lists the cold slots of all domains: a cold slot has no pages, so it can serve any domain.
    link stack
    size_t members          # in BY_BOTH: the number of slots; otherwise: the number of groups BY_BOTH
    warm_totals warm        # in BY_DOMAIN
    totals own              # in BY_SHAPE and BY_DOMAIN

cdef enum:
    BUCKETS = 256
    EMPTY_GROUPS = 256      # a table keeps up to this many groups without members, so that their counts are not lost
    BUDGETS = 4             # a pool counts its slots for up to this many budgets

cdef struct group_table:
    link groups
    size_t n
    size_t n_empty          # the number of groups without members: see EMPTY_GROUPS
    group* buckets[BUCKETS]

# Parts of a slot, in bytes that are multiples of the host page. While the slot is idle:
#   WARM   `initial` bytes are accessible,  initial <= committed,  hidden <= committed - initial
#   COLD   no byte is accessible,  committed == hidden == 0
cdef struct extent:
    size_t initial          # offset: the bytes before it are accessible when the slot is handed out
    size_t committed        # offset: the bytes between the accessible bytes and this offset are hidden
    size_t hidden           # number: how many of the hidden bytes may be resident

# The values that upstream gave to some members of the memory's struct. Guests and creators above may change these
# members. A copy of the whole struct would take more cache lines.
cdef struct original_memory:
    char* base
    long long size          # may be less than the request asks for
    size_t capacity, maximum, pre_guard, guard, covered
    bint is_shared, has_moved, huge_pages, growth_is_watched

cdef struct slot:
    memory_hook head        # the pool's hook on the memory; head.next is the first hook of the creators below
    pool* pool
    group* group            # a group BY_BOTH
    memory* m
    link in_stack           # in WARM and COLD: in `stack` of a group; otherwise free for a function's local list
    link by_age             # in WARM and COLD: in warm_by_age or cold_by_age of the pool
    link in_pool            # in `slots` of the pool
    atomic_i64 state
    const void* thread      # the thread that gave the slot back last
    image* image            # a reference: each guest starts with its bytes; NULL: with zeros
    original_memory original
    extent pages
    size_t resident         # bytes that may be resident while it is idle
    size_t tables           # bytes of page tables that it may have, idle or not
    size_t old_tables       # the part of `tables` that may remain from before all pages were last given back
    size_t reserved         # bytes of address space, guards included
    size_t mappings         # the greatest number of OS mappings that the memory may need
    unsigned int budgets    # bit i is set: the slot is charged to pool.budgets[i]
    bint unfilled           # the memory is prefaulted, but the pages have been given back
    bint has_guest          # counted as live
    bint changed_domain     # the slot has served other domains than the first one
    long long since         # when it became idle, or was handed out; coarse clock
    long long grown         # when a guest last grew beyond `initial`
    long long emptied       # when all its pages were last given back
    unsigned int uses       # how many guests it has had since `emptied`
    reset_policy policy
    size_t zeroed           # bytes, by the reset under way
    counts counts           # written under the lock, by the thread that owns the slot
    char apart[CACHE_LINE]  # padding: the next slot in memory may be in use by another thread

# A budget below the pool, and how many slots are charged to it.
cdef struct charged_slots:
    const void* budget      # NULL: the entry is free
    size_t slots

# A PoolingCreator and its slots share the pool, because a slot that wasmtime uses may outlive the creator. The members
# are ordered by how they are used: threads only read the first cache lines, and write the next ones for each memory.
cdef struct pool:
    # The members of this part never change, except `closed`.
    void* block             # the allocation that holds the pool
    size_t most_slots, reserved_bound
    long long wait_ns       # -1: no timeout
    bint fall_back, wait
    size_t most_mappings    # starts a cache line that is read for each memory
    size_t keep_resident, most_warm, resident_bound
    long long idle_ns       # 0: idle slots are not purged by time
    long long reset_ns      # 0: no bound on the time of a reset
    int reset               # a kind of reset, or ADAPTIVE
    bint check
    bint closed             # under the lock
    char apart[CACHE_LINE]
    # Protects all members below, except `refs` and `in_pools`. `lock` and `warm_by_age` each start a cache line.
    fork_lock lock
    warm_totals warm
    link warm_by_age        # warm slots, the newest first
    size_t idle_reserved    # bytes of address space, of idle slots
    size_t warm_domains     # domains with warm slots
    long long next_purge    # before then no slot exceeds idle_seconds; coarse clock
    totals own              # from own.counts on, the members of the pool are seldom written
    size_t reported         # this pool's part of process_held; >= the bytes that its idle slots keep
    size_t mappings
    size_t n_cold, n_slots
    link cold_by_age
    link slots              # all
    size_t reserved         # bytes, of all slots
    size_t fallbacks, rejected
    charged_slots budgets[BUDGETS]
    bint more_budgets       # a slot was charged to a budget that `budgets` had no room for, or twice to one budget
    atomic_i64 refs
    link in_pools           # in the list `pools` of all pools, under pools_lock
    char apart_too[CACHE_LINE]
    group_table tables[GROUPINGS]


cdef atomic_i64 census_lock       # see pool_eviction.pxi


cdef class PoolingCreator(NativeCreator):
    cdef readonly NativeCreator upstream
    cdef readonly Image image
    cdef pool* pool
    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil
