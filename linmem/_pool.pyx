# cython: language_level=3
"""A creator that hands the same memories out again and again.

Parts: what this machine's calls cost; the sums over all pools; lists of slots; the transition of a slot's state; the
reset of a slot (decide, do, account); a slot's life; giving up idle slots; the creator; reports.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport SIZE_MAX
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from linmem._atomic cimport add, load, poke, publish, store, swap_if, touch, word
from linmem._memory cimport (
    CACHE_LINE, IMAGE_BROKEN, IMAGE_COPIED, NO_MAXIMUM, OWNER_LEFT, OWNER_PYTHON, PROTECTION_NONE, RELIEF_BUDGET,
    RELIEF_PAGES, RELIEF_SPACE, RUNS, UNCHOSEN, ImageHandle, Memory, MmapCreator, NativeCreator, acquire, check_count,
    check_flag, check_native, check_size, commit_pages, current_domain, domain as domain_t, domain_of, domain_release,
    domain_retain, fail, fail_python, failure, forgotten_is, give_back, image as image_t, image_copy, image_release,
    image_retain, in_each_child, list_lock, live_after, memory, memory_doubt, memory_forget_protection, memory_hang,
    memory_hook, memory_is_filled, memory_refill, memory_release, memory_renew, memory_restore, memory_spec,
    memory_start_again, memory_turn_to, memory_unprotect, python_is_ending, raise_failure, relief_is, set_domain,
    touched_begin, touched_next, touched_runs, unlist_lock, unlock,
)
from linmem._os cimport pages
from linmem._reset cimport (
    ANY, RESET_DISCARD, RESET_SCAN, RESET_ZERO, reset_begin, reset_bound, reset_costs, reset_end, reset_given_back,
    reset_policy, reset_start,
)
from linmem._units cimport E_EXHAUSTED, E_NO_MEMORY, lay_out, layout, round_down
from linmem._wide cimport has_wide_stores, zero_wide

from time import sleep as _sleep

from linmem._checks import given as _given, shown as _shown

cdef enum:
    ADAPTIVE = 3
    PAGE_BITS = 12              # what reset_policy counts in
    TIMED = 16                  # of so many resets of a slot, one is timed
    USES_TO_EMPTY = 32          # a slot in constant use gives its pages back after idle_seconds, but not more often
    PURGED_AT_ONCE = 2          # slots that one give-back purges at least, and one in this many more
    PURGED_SHARE = 64
    KEPT = 3                    # beside the RELIEF_ kinds: what idle slots keep resident, page tables included
    KEPT_EMPTY = 256            # kinds and tenants without slots whose counts are kept apart
    TABLE = 1 << 12             # bytes of a page table,
    TABLE_SPAN = 1 << 21        # and of what it maps,
    UPPER_SPAN = 1 << 30        # and of what a table of these maps: constants, since a division by a variable is slow
    TABLES_UNCOUNTED = 8 << 20  # bytes: up to here, a slot's tables are counted as if it had all of them

cdef extern from *:
    """
    static LINMEM_OF_THREAD char linmem_thread;
    static const void *linmem_this_thread(void) { return &linmem_thread; }
    """
    const void* this_thread "linmem_this_thread"() noexcept nogil

cdef size_t WIDE_MOST = 1 << 18         # bytes: up to here, all of a memory may well be in the cache
cdef size_t ZERO_UNSEEN = 1 << 18       # bytes: up to here, zeroing all is no worse than giving back what was not seen
cdef size_t ZERO_STEP = 1 << 20         # bytes: between two looks at the clock
cdef size_t PURGED_BYTES = 16 << 20     # one give-back purges no further slot after so many
cdef size_t WORTH_EMPTYING = 1 << 20    # bytes: a slot in constant use that keeps less is left alone

_OPTIONS = {"upstream": None, "slots": None, "keep_resident": 64 << 20, "max_unused_warm": 100, "max_resident": None,
            "max_reserved": None, "idle_seconds": 5, "max_reset_seconds": None, "reset": "adaptive",
            "when_full": "fallback", "timeout": None, "check": False, "image": None}
_RESETS = {"scan": RESET_SCAN, "zero": RESET_ZERO, "discard": RESET_DISCARD, "adaptive": ADAPTIVE}


cdef inline void* lock_on_a_line(void* block) noexcept nogil:
    """Where a pool lies in a block that is a line longer."""
    cdef size_t lock = <size_t>&(<pool*>block).lock
    return <char*>block + ((0 - lock) & (CACHE_LINE - 1))


cdef void release_pool(pool* p) noexcept nogil:
    cdef tenant* t
    cdef tenant* next_tenant
    cdef kind* k
    cdef kind* next_kind
    cdef int i
    if add(&p.refs, -1):
        return
    leave_all_pools(p)
    unlist_lock(&p.lock)
    t = p.tenants
    while t != NULL:
        next_tenant = t.next
        domain_release(t.domain)
        free(t)
        t = next_tenant
    for i in range(KINDS):
        k = p.kinds[i]
        while k != NULL:
            next_kind = k.next
            free(k)
            k = next_kind
    free(p.block)


# -- what this machine's calls cost ------------------------------------------------------------------------

cdef reset_costs costs          # fault == 0: not measured yet
cdef reset_costs copying        # where each page is copied from an image
cdef bint wide = False          # zero_wide() beats memset() on a sample that is in the cache
cdef word costs_lock            # of the first pool's maker; nobody has a pool before
costs.fault = costs.scan = 0

cdef enum:
    SAMPLE = 64                 # pages
    SAMPLES = 5
    SCANS = 8


cdef void measure_costs() noexcept nogil:
    """Once in a process, in well below a millisecond. Where it cannot be done, or the processor was taken
    away in each sample, what comes out is still sane."""
    cdef size_t page = pages.capabilities().page_size
    cdef size_t size = SAMPLE * page
    cdef long long start, zero = 0, wider = 0, fault = 0, scan = 0
    cdef char* base
    cdef char* sparse           # a second sample, with one page in it
    cdef char* next
    cdef pages.span runs[4]
    cdef size_t n
    cdef size_t offset
    cdef int _, code
    if pages.reserve(2 * size, True, &base) == 0:
        sparse = base + size
        if pages.commit(base, 2 * size) == 0:
            touch(sparse)
            for _ in range(SAMPLES):
                start = pages.clock_ns()
                offset = 0
                while offset < size:
                    touch(base + offset)
                    offset += page
                code = pages.renew(base, size)
                fault = shorter(fault, start, code)
                if code:
                    break
            memset(base, 0, size)
            for _ in range(SCANS):
                start = pages.clock_ns()
                memset(base, 0, size)
                zero = shorter(zero, start, 0)
                if has_wide_stores():
                    start = pages.clock_ns()
                    zero_wide(base, size)
                    wider = shorter(wider, start, 0)
                # After other work, as in a busy pool: alone it takes two thirds of the time.
                n = 4
                start = pages.clock_ns()
                code = pages.touched(sparse, size, False, runs, &n, &next)
                scan = shorter(scan, start, code)
        give_back(base, 2 * size)
    set_costs(fault, zero, wider, scan)


cdef void need_costs() noexcept nogil:
    acquire(&costs_lock)
    if costs.fault == 0:
        measure_costs()
    unlock(&costs_lock)


cdef long long shorter(long long best, long long start, int code) noexcept nogil:
    cdef long long took = pages.clock_ns() - start
    return took if code == 0 and (best == 0 or took < best) else best


cdef void set_costs(long long fault, long long zero, long long wider, long long scan) noexcept nogil:
    """All but scan: of the whole sample."""
    global wide
    if zero < 1:
        zero = 1
    wide = 0 < wider < zero
    costs.fault = copying.fault = <unsigned int>within(fault // zero, 8, 64)
    costs.scan = <unsigned int>within(scan * SAMPLE // (wider if wide else zero), 4, 64)
    copying.scan = <unsigned int>within(scan * SAMPLE // (2 * zero), 4, 64)


cdef long long within(long long n, long long least, long long most) noexcept nogil:
    return least if n < least else most if n > most else n


# -- the sums over all pools -----------------------------------------------------------------------------------
# Locks are taken in reverse order of registration, so a pool's lock before this one, which each pool is older than.

cdef fork_lock pools_lock
cdef pool* pools = NULL
cdef word all_held              # bytes that idle slots keep, page tables included; a little more than they do
cdef word all_reserved          # bytes of address space of all slots
cdef word held_bound            # what these never exceed for long
cdef word reserved_bound        # 0: no bound
cdef word slack                 # a pool tells the sum that it keeps up to so many bytes more than it does
cdef bint started = False


cdef void set_bounds(size_t held, size_t reserved) noexcept nogil:
    store(&held_bound, <long long>(held if held < SIZE_MAX >> 1 else SIZE_MAX >> 1))
    store(&reserved_bound, <long long>(reserved if reserved < SIZE_MAX >> 1 else SIZE_MAX >> 1))
    store(&slack, <long long>(held >> 10 if held < <size_t>1 << 30 else <size_t>1 << 20))


cdef void start_pools() noexcept nogil:
    """Once, before there is a pool. Not when the module is imported: the layers below may not be ready yet then."""
    global started
    acquire(&costs_lock)
    if not started:
        list_lock(&pools_lock)
        set_bounds(pages.capabilities().memory // 4 if pages.capabilities().memory else SIZE_MAX, SIZE_MAX)
        relief_is(give)
        forgotten_is(forget_image)
        in_each_child(drop_what_was_lost)
        started = True
    unlock(&costs_lock)


cdef void join_all_pools(pool* p) noexcept nogil:
    global pools
    acquire(&pools_lock.held)
    p.next_pool = pools
    if pools != NULL:
        pools.previous_pool = p
    pools = p
    unlock(&pools_lock.held)


cdef void leave_all_pools(pool* p) noexcept nogil:
    global pools
    acquire(&pools_lock.held)
    if p.next_pool != NULL:
        p.next_pool.previous_pool = p.previous_pool
    if p.previous_pool != NULL:
        p.previous_pool.next_pool = p.next_pool
    else:
        pools = p.next_pool
    unlock(&pools_lock.held)
    add(&all_held, -<long long>p.told)


cdef pool* pool_after(pool* p) noexcept nogil:
    """The next of all pools, with a reference, for that on `p`; NULL: the first, and at the end."""
    cdef pool* after
    cdef long long refs = 0
    acquire(&pools_lock.held)
    after = pools if p == NULL else p.next_pool
    while after != NULL:
        refs = load(&after.refs)
        while refs > 0 and not swap_if(&after.refs, refs, refs + 1):
            refs = load(&after.refs)
        if refs > 0:
            break
        after = after.next_pool         # its last reference is gone: it is about to leave
    unlock(&pools_lock.held)
    if p != NULL:
        release_pool(p)
    return after


# -- lists of slots; the pool's lock is held in all of these ------------------------------------------------------

cdef inline size_t hash_of(const shape* key) noexcept nogil:
    cdef size_t h = key.minimum * 31 + key.maximum * 17 + key.reservation + key.guard * 5 + (<size_t>key.image >> 4)
    return h ^ (h >> 16) ^ (h >> 32)


cdef inline bint same_shape(const shape* a, const shape* b) noexcept nogil:
    return (a.minimum == b.minimum and a.maximum == b.maximum and a.reservation == b.reservation
            and a.guard == b.guard and a.is_64 == b.is_64 and a.is_shared == b.is_shared and a.image == b.image)


cdef inline shelf** shelf_bucket(pool* p, const shape* key, const domain_t* whose) noexcept nogil:
    cdef size_t h = <size_t>whose
    return &p.shelves[(hash_of(key) ^ (h >> 5) ^ (h >> 13)) & (SHELVES - 1)]


cdef inline shelf* find_shelf(pool* p, const shape* key, const domain_t* whose) noexcept nogil:
    cdef shelf* here = shelf_bucket(p, key, whose)[0]
    while here != NULL and not (here.domain == whose and same_shape(&here.shape, key)):
        here = here.next
    return here


cdef kind* find_kind(pool* p, const shape* key) noexcept nogil:
    cdef kind* here = p.kinds[hash_of(key) & (KINDS - 1)]
    while here != NULL and not same_shape(&here.shape, key):
        here = here.next
    return here


cdef tenant* find_tenant(pool* p, const domain_t* whose) noexcept nogil:
    cdef tenant* here = p.tenants
    while here != NULL and here.domain != whose:
        here = here.next
    return here


# What a new slot may need, allocated before the lock is taken. What was used is NULL then.
cdef struct parts:
    slot* slot
    shelf* shelf
    kind* kind
    tenant* tenant


cdef bint get_parts(parts* new, domain_t* whose, bint with_slot) noexcept nogil:
    new.slot = <slot*>calloc(1, sizeof(slot)) if with_slot else NULL
    new.shelf = <shelf*>calloc(1, sizeof(shelf))
    new.kind = <kind*>calloc(1, sizeof(kind))
    new.tenant = <tenant*>calloc(1, sizeof(tenant))
    if new.tenant != NULL:
        new.tenant.domain = whose
        domain_retain(whose)
    if (new.slot == NULL and with_slot) or new.shelf == NULL or new.kind == NULL or new.tenant == NULL:
        free_parts(new)
        return False
    return True


cdef void free_parts(parts* new) noexcept nogil:
    free(new.slot)
    free(new.shelf)
    free(new.kind)
    if new.tenant != NULL:
        domain_release(new.tenant.domain)
        free(new.tenant)
    memset(new, 0, sizeof(parts))


cdef shelf* need_shelf(pool* p, const shape* key, const domain_t* whose, parts* new) noexcept nogil:
    cdef shelf* here = find_shelf(p, key, whose)
    cdef kind* k
    cdef tenant* t
    cdef shelf** head
    if here != NULL:
        return here
    k = find_kind(p, key)
    if k == NULL:
        k = new.kind
        new.kind = NULL
        k.shape = key[0]
        k.next = p.kinds[hash_of(key) & (KINDS - 1)]
        p.kinds[hash_of(key) & (KINDS - 1)] = k
        p.n_kinds += 1
    elif k.shelves == 0:
        p.empty_kinds -= 1
    t = find_tenant(p, whose)
    if t == NULL:
        t = new.tenant
        new.tenant = NULL
        t.next = p.tenants
        p.tenants = t
        p.n_tenants += 1
    elif t.shelves == 0:
        p.empty_tenants -= 1
    here = new.shelf
    new.shelf = NULL
    here.kind = k
    here.tenant = t
    here.domain = t.domain
    here.shape = key[0]
    k.shelves += 1
    t.shelves += 1
    head = shelf_bucket(p, key, whose)
    here.next = head[0]
    head[0] = here
    return here


cdef void leave_shelf(pool* p, slot* s) noexcept nogil:
    """The slot is on no shelf then. An empty shelf goes; of kinds and tenants without one, some are kept for their
    counts."""
    cdef shelf* here = s.shelf
    cdef shelf** link
    s.shelf = NULL
    here.slots -= 1
    here.kind.slots -= 1
    here.tenant.slots -= 1
    if here.slots:
        return
    link = shelf_bucket(p, &here.shape, here.domain)
    while link[0] != here:
        link = &link[0].next
    link[0] = here.next
    here.kind.shelves -= 1
    here.tenant.shelves -= 1
    p.empty_kinds += here.kind.shelves == 0
    p.empty_tenants += here.tenant.shelves == 0
    free(here)
    if p.empty_kinds > KEPT_EMPTY:
        forget_kinds(p)
    if p.empty_tenants > KEPT_EMPTY:
        forget_tenants(p)


cdef void forget_kinds(pool* p) noexcept nogil:
    cdef kind** link
    cdef kind* k
    cdef int i
    for i in range(KINDS):
        link = &p.kinds[i]
        while link[0] != NULL:
            k = link[0]
            if k.shelves:
                link = &k.next
                continue
            link[0] = k.next
            p.n_kinds -= 1
            free(k)
    p.empty_kinds = 0


cdef void forget_tenants(pool* p) noexcept nogil:
    cdef tenant** link = &p.tenants
    cdef tenant* t
    while link[0] != NULL:
        t = link[0]
        if t.shelves:
            link = &t.next
            continue
        link[0] = t.next
        p.n_tenants -= 1
        domain_release(t.domain)
        free(t)
    p.empty_tenants = 0


cdef inline void join_shelf(slot* s, shelf* here) noexcept nogil:
    s.shelf = here
    here.slots += 1
    here.kind.slots += 1
    here.tenant.slots += 1


cdef inline slot** stack_of(slot* s, int state) noexcept nogil:
    return &s.shelf.warm if state == WARM else &s.shelf.kind.cold


cdef inline line* line_of(pool* p, int state) noexcept nogil:
    return &p.warm if state == WARM else &p.cold


cdef inline void link_idle(pool* p, slot* s, int state) noexcept nogil:
    cdef slot** top = stack_of(s, state)
    cdef line* idle = line_of(p, state)
    s.above = NULL
    s.below = top[0]
    if s.below != NULL:
        s.below.above = s
    top[0] = s
    s.newer = NULL
    s.older = idle.newest
    if s.older != NULL:
        s.older.newer = s
    else:
        idle.oldest = s
    idle.newest = s


cdef inline void unlink_idle(pool* p, slot* s, int state) noexcept nogil:
    cdef line* idle = line_of(p, state)
    if s.above != NULL:
        s.above.below = s.below
    else:
        stack_of(s, state)[0] = s.below
    if s.below != NULL:
        s.below.above = s.above
    if s.newer != NULL:
        s.newer.older = s.older
    else:
        idle.newest = s.older
    if s.older != NULL:
        s.older.newer = s.newer
    else:
        idle.oldest = s.newer


cdef inline void tell_sum(pool* p) noexcept nogil:
    """The sum over all pools is never less than what the pools keep. Told in steps, so that it is seldom written."""
    cdef size_t held = p.resident + p.tables
    cdef size_t some = <size_t>load(&slack)
    cdef size_t now
    if held > p.told or p.told - held > some:
        now = held + (some >> 1)
        add(&all_held, <long long>(now - p.told))
        p.told = now


# -- the transition of a slot's state ---------------------------------------------------------------------------

cdef extern from *:
    """
    #ifdef LINMEM_CHECKED
    #include <stdio.h>
    #include <stdlib.h>
    #define linmem_must(holds) \\
        do { if (!(holds)) { fprintf(stderr, "linmem: " #holds " does not hold\\n"); abort(); } } while (0)
    #else
    #define linmem_must(holds) ((void)sizeof(holds))
    #endif
    """
    void must "linmem_must"(bint holds) noexcept nogil


cdef inline void check_extent(const extent* at, int state) noexcept nogil:
    if state == WARM:
        must(at.accessible == at.least and at.least <= at.high and at.hidden <= at.high - at.least)
    elif state == COLD:
        must(at.accessible == 0 and at.high == 0 and at.hidden == 0)


cdef inline bint may_become(int state, int to) noexcept nogil:
    if state == LIVE:
        return to == RESETTING or to == DROPPING or to == COLD
    if state == RESETTING:
        return to == WARM or to == COLD or to == DROPPING
    if state == WARM:
        return to == LIVE or to == COOLING or to == DROPPING
    if state == COLD:
        return to == LIVE or to == DROPPING
    return state == COOLING and (to == COLD or to == DROPPING)


cdef size_t mappings_of(const slot* s) noexcept nogil:
    """How many mappings the slot takes at most: pre-guard, what is accessible, the rest of the reservation."""
    cdef size_t n = 3
    if s.pages.high == 0:
        return 3 if s.given.huge_pages else 1
    if s.given.huge_pages:
        n += 1              # the guard is not asked to be of huge pages
    if s.image != NULL and s.image.content.maps and s.image.high > s.image.low:
        n += 2              # the image's pages between others
    if s.pages.high > s.pages.least:
        n += 1              # what is hidden was accessible
    return n


cdef inline void count_mappings(pool* p, slot* s) noexcept nogil:
    cdef size_t n = mappings_of(s)
    p.mappings += n - s.mappings
    s.mappings = n


cdef inline bint move_slot(pool* p, slot* s, int to) noexcept nogil:
    """The one function that changes a slot's state, with all lists and counts that follow from it. The pool's lock is
    held, but for RESETTING, which changes no list and no count. False: the pool is closed, or the slot's image is
    forgotten. Then the slot does not become idle, and the caller drops it."""
    cdef int state = <int>load(&s.state)
    cdef tenant* t
    must(may_become(state, to))
    if to == RESETTING:
        publish(&s.state, to)
        return True
    if to == WARM or to == COLD:
        if p.closed:
            return False
        if s.shelf.shape.image != NULL and load(&s.shelf.shape.image.forgotten):
            count_eviction(p, s, EVICTED_IMAGE)
            return False
    if s.has_guest:
        s.has_guest = False
        p.live -= 1
        s.shelf.kind.live -= 1
        s.shelf.tenant.live -= 1
    if state == WARM or state == COLD:
        unlink_idle(p, s, state)
        p.resident -= s.resident
        p.tables -= s.tables
        p.idle_reserved -= s.reserved
        if state == WARM:
            t = s.shelf.tenant
            t.n_warm -= 1
            t.held -= s.resident + s.tables
            t.warm_least -= s.pages.least
            t.warm_high -= s.pages.high
            p.warm_least -= s.pages.least
            p.warm_high -= s.pages.high
            p.n_warm -= 1
            p.n_busy -= t.n_warm == 0
        else:
            p.n_cold -= 1
    if to == WARM or to == COLD:
        check_extent(&s.pages, to)
        count_mappings(p, s)
        link_idle(p, s, to)
        p.resident += s.resident
        p.tables += s.tables
        p.idle_reserved += s.reserved
        if to == WARM:
            t = s.shelf.tenant
            p.n_busy += t.n_warm == 0
            t.n_warm += 1
            t.held += s.resident + s.tables
            t.warm_least += s.pages.least
            t.warm_high += s.pages.high
            p.warm_least += s.pages.least
            p.warm_high += s.pages.high
            p.n_warm += 1
        else:
            p.n_cold += 1
        tell_sum(p)
    elif to == LIVE or to == DROPPING:
        tell_sum(p)
    publish(&s.state, to)
    return True


cdef inline void count_guest(pool* p, slot* s) noexcept nogil:
    """The lock is held, and the slot is on the shelf of its guest's domain."""
    cdef kind* k = s.shelf.kind
    cdef tenant* t = s.shelf.tenant
    s.has_guest = True
    p.live += 1
    k.live += 1
    t.live += 1
    if p.live > p.peak_live:
        p.peak_live = p.live
    if k.live > k.peak_live:
        k.peak_live = k.live
    if t.live > t.peak_live:
        t.peak_live = t.live


# -- which idle slot goes first; the lock is held ------------------------------------------------------------------

cdef size_t domains_that_keep(const pool* p) noexcept nogil:
    """The number of domains whose warm slots keep bytes. The slots of memories without a page keep none."""
    cdef const tenant* t = p.tenants
    cdef size_t n = 0
    while t != NULL:
        n += t.held != 0
        t = t.next
    return n


cdef slot* fair_victim(pool* p, bint by_count) noexcept nogil:
    """The least recently used warm slot of a domain that has more than its fair share. If all domains have the same
    share, the least recently used warm slot. by_count: shares are numbers of warm slots; otherwise they are the bytes
    that warm slots keep."""
    cdef slot* s = p.warm.oldest
    cdef size_t domains = p.n_busy if by_count or p.n_busy < 2 else domains_that_keep(p)
    cdef size_t share
    if domains < 2:
        return s
    share = (p.n_warm if by_count else p.resident + p.tables) // domains
    while s != NULL and (s.shelf.tenant.n_warm if by_count else s.shelf.tenant.held) <= share:
        s = s.newer
    return s if s != NULL else p.warm.oldest


cdef slot* surplus(pool* p, long long now, int* cause) noexcept nogil:
    """The warm slot that is to lose its pages next, or NULL."""
    cdef slot* oldest = p.warm.oldest
    if p.n_warm > p.most_warm:
        cause[0] = EVICTED_COUNT
        return fair_victim(p, True)
    if p.resident + p.tables > p.resident_bound and oldest != NULL:
        cause[0] = EVICTED_RESIDENT
        return fair_victim(p, False)
    if p.mappings > p.most_mappings and oldest != NULL:
        cause[0] = EVICTED_SLOTS
        return fair_victim(p, True)
    if p.idle_ns and now > p.look:
        if oldest == NULL:
            p.look = now + p.idle_ns        # what becomes idle from now on
        elif now - oldest.since > p.idle_ns:
            cause[0] = EVICTED_IDLE
            return oldest
        else:
            p.look = oldest.since + p.idle_ns
    return NULL


cdef slot* least_wanted(pool* p) noexcept nogil:
    return p.cold.oldest if p.cold.oldest != NULL else fair_victim(p, True)


cdef inline void count_eviction(pool* p, slot* s, int cause) noexcept nogil:
    p.gone.evictions[cause] += 1
    s.shelf.kind.gone.evictions[cause] += 1
    s.shelf.tenant.gone.evictions[cause] += 1


# -- resetting a slot, outside every lock: decide, do, account -------------------------------------------------------

cdef inline unsigned int in_pages(size_t size) noexcept nogil:
    size >>= PAGE_BITS
    return <unsigned int>size if size < ANY else ANY


cdef inline size_t most_tables(const slot* s, size_t size) noexcept nogil:
    """Bytes of the page tables of the slot's first `size` bytes, at most."""
    cdef size_t first = <size_t>s.base, last = first + size - 1
    if size == 0:
        return 0
    return (2 + last // TABLE_SPAN - first // TABLE_SPAN + last // UPPER_SPAN - first // UPPER_SPAN) * TABLE


cdef size_t count_tables(slot* s) noexcept nogil:
    """Bytes of page tables that the slot has for pages which are there now, hidden ones and such that were only read
    included. Of small slots, and where it cannot be told: at most."""
    cdef size_t most = most_tables(s, s.pages.high), at, tables = 0, reached = 0, reached_upper = 0, n, i
    cdef char* next = s.base
    cdef char* end = s.base + s.pages.high
    cdef pages.span runs[RUNS]
    if s.pages.high <= TABLES_UNCOUNTED or s.tables >= most:
        return most
    while next < end:
        n = RUNS
        if pages.present(next, <size_t>(end - next), runs, &n, &next):
            return most
        for i in range(n):
            at = <size_t>runs[i].at
            tables += cover(at, at + runs[i].size, TABLE_SPAN, &reached) // TABLE_SPAN * TABLE
            tables += cover(at, at + runs[i].size, UPPER_SPAN, &reached_upper) // UPPER_SPAN * TABLE
    return tables


# What is decided about a reset before it begins.
cdef struct plan:
    int how                 # RESET_
    bint adaptive           # and after a scan the policy is asked again
    bint copied             # the image's bytes were copied in: nothing tells which pages are still the image's
    size_t bound            # with more bytes touched than this, all pages are given back
    size_t hidden           # bytes that earlier guests left beyond those that this one had
    long long until         # when zeroing has to be over, or else all pages are given back; 0: never
    const reset_costs* prices

# What a reset has found and done.
cdef struct finding:
    int how                 # RESET_, of what was done
    size_t low              # bytes touched below `least`
    size_t high             # and beyond
    size_t kept             # bytes that are resident below `used`, in the units that the OS keeps them in
    size_t kept_high        # of these, beyond `least`
    size_t tables           # bytes of page tables that are there
    size_t zeroed


cdef void decide(slot* s, size_t used, long long now, plan* to) noexcept nogil:
    cdef pool* p = s.pool
    cdef size_t beyond = s.pages.high - used
    to.how = p.reset
    to.adaptive = False
    to.bound = SIZE_MAX
    to.prices = &costs if s.image == NULL else &copying
    to.copied = s.image != NULL and s.m.image_state == IMAGE_COPIED and s.image.n_runs
    to.hidden = beyond if s.pages.hidden > beyond else s.pages.hidden
    to.until = 0
    if to.how == ADAPTIVE:
        if (p.idle_ns and s.uses >= USES_TO_EMPTY and s.resident > WORTH_EMPTYING and now - s.emptied > p.idle_ns):
            to.how = RESET_DISCARD      # what only a burst had touched is not seen, and goes once in a while
        elif pages.capabilities().scans:
            to.adaptive = True
            to.how = reset_begin(&s.policy, to.prices, in_pages(used))
            to.bound = <size_t>reset_bound(&s.policy, to.prices, in_pages(used)) << PAGE_BITS
        else:
            to.how = RESET_ZERO if used <= ZERO_UNSEEN else RESET_DISCARD
    if to.copied and to.how == RESET_SCAN:
        to.how = RESET_ZERO
    if to.how == RESET_ZERO and used + to.hidden > p.keep_resident:
        to.how = RESET_DISCARD
    if to.how == RESET_SCAN and to.bound > p.keep_resident:
        to.bound = p.keep_resident
    if p.reset_ns and to.how != RESET_DISCARD:
        to.until = pages.clock_ns() + p.reset_ns


cdef inline bint late(const plan* to) noexcept nogil:
    return to.until and pages.clock_ns() > to.until


cdef inline size_t cover(size_t at, size_t end, size_t unit, size_t* reached) noexcept nogil:
    """Bytes of the units that at .. end lies in, and that nothing before has reached."""
    at &= ~(unit - 1)
    end = (end + unit - 1) & ~(unit - 1)
    if at < reached[0]:
        at = reached[0]
    if end <= at:
        return 0
    reached[0] = end
    return end - at


cdef bint refill_in_time(slot* s, size_t at, size_t size, const plan* to) noexcept nogil:
    """memory_refill(), with a look at the clock before each step. False: the time is over."""
    cdef size_t step
    while size:
        if late(to):
            return False
        step = size if to.until == 0 or size < ZERO_STEP else ZERO_STEP
        memory_refill(s.m, at, step)
        at += step
        size -= step
    return True


cdef bint zero_touched(slot* s, size_t used, const plan* to, finding* what) noexcept nogil:
    """Zero what was touched of `used` bytes. False where that cannot be told, is more than the plan's bound, or takes
    too long: then anything may be left."""
    cdef touched_runs found
    cdef size_t i, at, end, size, total = 0, reached_low = 0, reached_high = 0
    cdef size_t border = <size_t>s.base + s.pages.least
    cdef size_t unit = pages.capabilities().huge_page if s.given.huge_pages else 0
    touched_begin(&found, s.m, 0, used)
    while touched_next(&found):
        for i in range(found.n):
            total += found.runs[i].size
        if total > to.bound:
            what.high = total
            return False
        for i in range(found.n):
            at = <size_t>found.runs[i].at
            size = found.runs[i].size
            end = at + size
            if not refill_in_time(s, at - <size_t>s.base, size, to):
                what.high = total
                return False
            if at >= border:
                what.high += size
            elif end <= border:
                what.low += size
            else:
                what.low += border - at
                what.high += end - border
            if unit:
                if at < border:
                    what.kept += cover(at, border if end > border else end, unit, &reached_low)
                if end > border:
                    what.kept_high += cover(border if at < border else at, end, unit, &reached_high)
    what.zeroed = total
    if unit:        # the OS may make a huge page of each that was touched
        what.kept = what.kept if what.kept < s.pages.least else s.pages.least
        size = used - s.pages.least if used > s.pages.least else 0
        what.kept_high = what.kept_high if what.kept_high < size else size
        what.kept += what.kept_high
    else:
        what.kept = total
        what.kept_high = what.high
    return found.code == 0


cdef bint zero_all(slot* s, size_t used, const plan* to, finding* what) noexcept nogil:
    if to.copied:
        memory_restore(s.m, s.image)
    elif wide and s.image == NULL and used <= WIDE_MOST:
        zero_wide(s.base, used)
    elif not refill_in_time(s, 0, used, to):
        return False
    what.zeroed = what.kept = used
    what.kept_high = used - s.pages.least if used > s.pages.least else 0
    what.tables += most_tables(s, used)
    return True


cdef int give_back_all(slot* s, size_t used) noexcept nogil:
    """Every page of the slot, hidden ones included, is given back and reads as zero."""
    cdef int code
    if pages.capabilities().discard_any_protection:
        code = memory_renew(s.m, s.pages.high if s.pages.hidden else used)
    else:
        code = memory_renew(s.m, used)
        # Else this guest has grown over all that was hidden.
        if code == 0 and s.pages.hidden and s.pages.high > used:
            code = pages.decommit(s.base + used, s.pages.high - used)
            s.pages.high = used
    return code


cdef int clear(slot* s, size_t used, const plan* to, finding* what) noexcept nogil:
    """Do what was decided. -1: the slot cannot be used again."""
    cdef pool* p = s.pool
    cdef bint kept = False
    cdef int code
    what.how = to.how
    if to.how == RESET_SCAN:
        kept = zero_touched(s, used, to, what)
        if to.adaptive and (kept or what.high):
            kept = reset_end(&s.policy, to.prices, in_pages(used), in_pages(what.low + what.high + to.hidden),
                             in_pages(p.keep_resident)) and kept
        kept = kept and what.kept + to.hidden <= p.keep_resident
    elif to.how == RESET_ZERO:
        kept = zero_all(s, used, to, what)
    if kept:
        return 0
    what.how = RESET_DISCARD
    what.zeroed = 0
    code = give_back_all(s, used)
    if code and code == pages.capabilities().locked:
        # mlock() keeps these pages, whatever is said about them; those that are hidden are zero.
        what.how = RESET_ZERO
        memory_refill(s.m, 0, used)
        what.kept = what.zeroed = used
        what.kept_high = used - s.pages.least if used > s.pages.least else 0
        what.tables += most_tables(s, used)
        code = 0
    elif code == 0:
        what.kept = what.kept_high = 0
        if to.copied:
            what.kept = s.image.high - s.image.low
    if code:
        return -1
    if to.copied:
        image_copy(s.image, s.base)
    return 0


cdef void account(slot* s, size_t used, const plan* to, const finding* what, long long now) noexcept nogil:
    """What the slot keeps after the reset."""
    s.zeroed = what.zeroed
    s.uses += 1
    s.tables = s.old_tables + what.tables
    if s.tables > most_tables(s, s.pages.high):
        s.tables = most_tables(s, s.pages.high)
    if what.how == RESET_DISCARD:
        reset_given_back(&s.policy)
        s.pages.hidden = 0
        s.resident = what.kept
        s.old_tables = s.tables     # they may stay without a page
        s.emptied = now
        s.uses = 0
        s.unfilled = s.m.ops.prefaults
    else:
        s.pages.hidden = what.kept_high + to.hidden
        s.resident = what.kept + to.hidden


cdef int tell_below(slot* s, size_t size, size_t accessible, size_t old_size, size_t was, failure* why) noexcept nogil:
    """The adaptors below the pool hear how much of the memory the guest has, or the next one will have."""
    cdef memory_hook* hook = s.head.next
    cdef memory_hook* undo = hook
    cdef failure unused
    cdef int code
    while hook != NULL:
        if hook.resized != NULL:
            code = hook.resized(hook, s.m, size, accessible, why)
            if code:
                while undo != hook:
                    if undo.resized != NULL:
                        undo.resized(undo, s.m, old_size, was, &unused)
                    undo = undo.next
                return code
        hook = hook.next
    return 0


cdef int reset(slot* s, memory* m, long long now) noexcept nogil:
    """Make the slot as it was when it was new. Returns the kind of reset, or -1: it cannot be used again. Afterwards
    it is fit to be warm, or, with nothing accessible, to be cold."""
    cdef size_t used = m.accessible
    cdef plan to
    cdef finding what
    cdef failure unused
    if used > s.pages.high:
        s.pages.high = used
    if used < s.pages.least:
        # A pool above has made it cold. The bytes are gone, whatever image they were of.
        return RESET_DISCARD if cool_pages(s) else -1
    if load(&m.protection) != PROTECTION_NONE and memory_unprotect(m, used):
        return -1
    if (m.image != s.image or m.image_state == IMAGE_BROKEN) and memory_turn_to(m, s.image):
        return -1       # a user has turned it to another image, or given pages of its own back
    what.low = what.high = what.kept = what.kept_high = what.zeroed = 0
    what.how = RESET_SCAN
    if used:
        what.tables = count_tables(s)
        decide(s, used, now, &to)
        if clear(s, used, &to, &what):
            memory_doubt(m)     # it may be inaccessible: a pool below sees to that first
            return -1
        account(s, used, &to, &what, now)
        if s.pool.check and not memory_is_filled(m, used):
            return -1
    if used > s.pages.least:
        s.grown = now
        if pages.protect(s.base + s.pages.least, used - s.pages.least, pages.ACCESS_NONE):
            memory_doubt(m)     # the same
            return -1
        poke(&m.accessible, s.pages.least)        # upstream may have someone who watches, here and below
    elif (s.pages.hidden and s.pool.idle_ns and now - s.grown > s.pool.idle_ns
            and pages.decommit(s.base + used, s.pages.high - used) == 0):
        s.resident -= s.pages.hidden            # no guest has grown into the hidden pages for idle_seconds
        s.pages.hidden = 0
        s.pages.high = used
    s.pages.accessible = s.pages.least
    if s.head.next != NULL and (used != s.pages.least or load(&m.size) != s.given.size):
        tell_below(s, <size_t>s.given.size, s.pages.least, 0, 0, &unused)
    if s.resident > s.pool.keep_resident and not cool_pages(s):
        return -1
    return what.how


# -- a slot's life ------------------------------------------------------------------------------------------------

cdef bint cool_pages(slot* s) noexcept nogil:
    """Nothing is accessible then, and no page is kept. False: refused, and the slot has to be dropped."""
    cdef failure unused
    # Guards and all: of a part of a reservation the OS keeps the page tables at both ends.
    if s.pages.high and pages.decommit(s.base - s.given.pre_guard, s.reserved):
        return False
    poke(&s.m.accessible, 0)
    s.m.image_state = IMAGE_COPIED
    memory_forget_protection(s.m)
    s.pages.accessible = s.pages.high = s.pages.hidden = 0
    s.resident = s.tables = s.old_tables = 0
    s.unfilled = False
    s.uses = 0
    reset_given_back(&s.policy)
    if s.head.next != NULL:
        tell_below(s, 0, 0, 0, 0, &unused)
    return True


cdef int warm_up(slot* s, long long now, failure* why) noexcept nogil:
    """A cold slot becomes accessible again. A code: it stays cold; or, where s.pages.accessible is not 0, what it is
    now is not known."""
    cdef int code = 0
    if s.head.next != NULL:
        code = tell_below(s, <size_t>s.given.size, s.pages.least, 0, 0, why)
        if code:
            return code
    s.emptied = s.grown = now
    if s.pages.least == 0:
        return 0
    if s.given.huge_pages:
        pages.advise_huge(s.base, s.capacity)
    s.pages.accessible = s.pages.high = s.pages.least
    code = commit_pages(s.base, s.pages.least)
    if code == 0:
        code = memory_start_again(s.m, s.image)
    if code == 0 and s.m.ops.prefaults:
        code = pages.prefault(s.base, s.pages.least)
    if code:
        return fail(why, code, "commit", s.pages.least)
    poke(&s.m.accessible, s.pages.least)
    return 0


cdef inline void restore(slot* s) noexcept nogil:
    """The memory is as when upstream made it, in all that a guest or a creator above may have changed. No other thread
    has it, so that plain stores are enough."""
    cdef memory* m = s.m
    m.started = <size_t>s.given.size
    m.dirtied = 0
    m.pre_guard = s.given.pre_guard
    m.guard = s.given.guard
    poke(&m.maximum, s.given.maximum)
    poke(&m.covered, s.given.covered)
    m.is_shared = s.given.is_shared
    m.moved = s.given.moved
    m.huge_pages = s.given.huge_pages
    publish(&m.size, s.given.size)
    publish(&m.refs, 1)


cdef bint let_go(slot* s, memory* m) noexcept nogil:
    """The memory is upstream's again, and may be freed before the slot is: stats() must not look at it."""
    if m.base == s.base and m.capacity == s.capacity and s.head.next != NULL:
        # A pool below does not know of the hidden pages, and it hands the others to the domain that it made the
        # memory for. So after a change of domain all pages go. If the OS refuses, they stay, and are zero.
        if not (s.changed_domain and cool_pages(s)) and s.pages.high > m.accessible:
            pages.decommit(s.base + m.accessible, s.pages.high - m.accessible)
    acquire(&s.pool.lock.held)
    if load(&s.state) != DROPPING:
        move_slot(s.pool, s, DROPPING)
    s.m = NULL
    unlock(&s.pool.lock.held)
    return False


cdef bint slot_keep(memory_hook* head, memory* m) noexcept nogil:
    cdef slot* s = <slot*>head
    cdef pool* p = s.pool
    cdef slot* out = NULL
    cdef long long now, start = 0
    cdef int how = -1, cause = 0
    cdef size_t resets, took = 0
    cdef bint kept
    if load(&s.state) == DROPPING:
        return let_go(s, m)
    s.zeroed = 0
    move_slot(p, s, RESETTING)
    now = pages.coarse_ns()
    if m.base == s.base and m.capacity == s.capacity:       # else it has moved, and is of another shape
        resets = s.counts.resets[0] + s.counts.resets[1] + s.counts.resets[2]
        if resets & (TIMED - 1) == 0:
            start = pages.clock_ns()
        how = reset(s, m, now)
        if start:       # it stands for the resets since the last one that was timed
            took = <size_t>(pages.clock_ns() - start) * (TIMED if resets else 1)
        if how < 0:
            acquire(&p.lock.held)
            p.rejected += 1
            s.counts.zeroed += s.zeroed
            s.counts.reset_ns += took
            unlock(&p.lock.held)
    if how < 0:
        return let_go(s, m)
    m.hooks = head
    m.growth_is_watched = s.given.growth_is_watched
    publish(&m.owner, OWNER_PYTHON)
    acquire(&p.lock.held)
    s.counts.resets[how] += 1
    s.counts.zeroed += s.zeroed
    s.counts.reset_ns += took
    s.thread = this_thread()
    s.since = now
    kept = move_slot(p, s, COLD if s.pages.accessible < s.pages.least else WARM)
    if kept:
        out = surplus(p, now, &cause)
        if out != NULL:
            move_slot(p, out, COOLING)
            count_eviction(p, out, cause)
    unlock(&p.lock.held)
    if not kept:
        return let_go(s, m)
    if out != NULL:
        cool_surplus(p, out, cause, now)
    if load(&all_held) > load(&held_bound):
        shed_held()
    return True


cdef void cool(pool* p, slot* s) noexcept nogil:
    """Of a slot that is COOLING: it becomes cold, or is dropped."""
    cdef bint kept = cool_pages(s)
    if kept:
        acquire(&p.lock.held)
        kept = move_slot(p, s, COLD)
        unlock(&p.lock.held)
    if not kept:
        drop(s)


cdef void cool_surplus(pool* p, slot* s, int cause, long long now) noexcept nogil:
    """Give back the pages of one warm slot after the other, until the bounds hold. Of those that have been idle for
    too long only a few: the next give-back goes on."""
    cdef size_t purged = 0, bytes_ = 0, most = 0
    add(&p.refs, 1)         # a slot that is dropped here may have held the last one
    while s != NULL:
        if cause == EVICTED_IDLE:
            purged += 1
            bytes_ += s.resident
        cool(p, s)
        acquire(&p.lock.held)
        if most == 0:
            most = PURGED_AT_ONCE + p.n_warm // PURGED_SHARE
        s = surplus(p, now, &cause)
        if s != NULL and cause == EVICTED_IDLE and (purged >= most or bytes_ >= PURGED_BYTES):
            s = NULL
        if s != NULL:
            move_slot(p, s, COOLING)
            count_eviction(p, s, cause)
        unlock(&p.lock.held)
    release_pool(p)


cdef void drop(slot* s) noexcept nogil:
    """Of a slot that is on no list of idle ones: back to upstream."""
    cdef pool* p = s.pool
    acquire(&p.lock.held)
    if load(&s.state) != DROPPING:
        move_slot(p, s, DROPPING)
    unlock(&p.lock.held)
    store(&s.m.refs, 1)
    memory_release(s.m)


cdef void add_counts(counts* to, const counts* more) noexcept nogil:
    cdef int i
    to.hits_warm += more.hits_warm
    to.hits_cold += more.hits_cold
    to.misses += more.misses
    to.zeroed += more.zeroed
    to.reset_ns += more.reset_ns
    for i in range(3):
        to.resets[i] += more.resets[i]
    for i in range(CAUSES):
        to.evictions[i] += more.evictions[i]


cdef void slot_dropped(memory_hook* head) noexcept nogil:
    cdef slot* s = <slot*>head
    cdef pool* p = s.pool
    acquire(&p.lock.held)
    if s.next != NULL:
        s.next.previous = s.previous
    if s.previous != NULL:
        s.previous.next = s.next
    else:
        p.slots = s.next
    p.n_slots -= 1
    p.reserved -= s.reserved
    p.mappings -= s.mappings
    leave_budgets(p, s)
    add_counts(&p.gone, &s.counts)
    add_counts(&s.shelf.kind.gone, &s.counts)
    add_counts(&s.shelf.tenant.gone, &s.counts)
    leave_shelf(p, s)
    add(&all_reserved, -<long long>s.reserved)
    unlock(&p.lock.held)
    if s.image != NULL:
        add(&s.image.slots, -1)
    image_release(s.image)
    free(s)
    release_pool(p)


# -- giving up idle slots ----------------------------------------------------------------------------------------

cdef size_t release_idle(pool* p, size_t target) noexcept nogil:
    """Drop idle slots, cold ones and then the oldest first, until at most `target` bytes of the others are resident.
    Returns the bytes that were."""
    cdef slot* s
    cdef size_t released = 0
    while True:
        acquire(&p.lock.held)
        s = p.cold.oldest if p.cold.oldest != NULL else p.warm.oldest
        if s != NULL and load(&s.state) == WARM and target and p.resident <= target:
            s = NULL
        if s != NULL:
            count_eviction(p, s, EVICTED_TRIM)
            move_slot(p, s, DROPPING)
        unlock(&p.lock.held)
        if s == NULL:
            return released
        released += s.resident
        drop(s)


cdef size_t purge_idle(pool* p, size_t target, long long older_ns) noexcept nogil:
    """Cool warm slots, the oldest first, until at most `target` bytes are resident, but none that became idle within
    the last `older_ns`. Returns the bytes that were resident."""
    cdef long long now = pages.coarse_ns()
    cdef size_t purged = 0
    cdef slot* s
    while True:
        acquire(&p.lock.held)
        s = p.warm.oldest
        if s != NULL and ((target and p.resident <= target) or now - s.since < older_ns):
            s = NULL
        if s != NULL:
            count_eviction(p, s, EVICTED_PURGE)
            move_slot(p, s, COOLING)
        unlock(&p.lock.held)
        if s == NULL:
            return purged
        purged += s.resident
        cool(p, s)


cdef void close_pool(pool* p) noexcept nogil:
    acquire(&p.lock.held)
    p.closed = True
    unlock(&p.lock.held)
    release_idle(p, 0)


cdef inline size_t given_up(const slot* s, int what, const void* budget) noexcept nogil:
    """What an idle slot gives up of what is missing: it becomes cold, and where address space is missing it goes."""
    cdef memory_hook* hook = s.head.next
    cdef size_t size = 0
    if what == RELIEF_SPACE:
        return s.reserved
    if what == RELIEF_PAGES:
        return s.pages.high
    if what == KEPT:
        return s.resident + s.tables if s.pages.high else 0
    while hook != NULL:
        if hook.budget == budget:
            size += s.pages.least
        hook = hook.next
    return size


cdef void join_budgets(pool* p, slot* s) noexcept nogil:
    """The lock is held; the slot is new. So that who asks for relief need not look at the slots of pools that cannot
    help: a guest may ask again and again."""
    cdef memory_hook* hook = s.m.hooks
    cdef int i, at
    while hook != NULL:
        if hook.budget != NULL:
            at = BUDGETS
            for i in range(BUDGETS):
                if p.budgets[i].budget == hook.budget or (p.budgets[i].budget == NULL and at == BUDGETS):
                    at = i
            if at == BUDGETS or s.budgets >> at & 1:
                p.more_budgets = True
            else:
                p.budgets[at].budget = hook.budget
                p.budgets[at].slots += 1
                s.budgets |= <unsigned int>1 << at
        hook = hook.next


cdef void leave_budgets(pool* p, slot* s) noexcept nogil:
    cdef int i
    for i in range(BUDGETS):
        if s.budgets >> i & 1:
            p.budgets[i].slots -= 1
            if p.budgets[i].slots == 0:
                p.budgets[i].budget = NULL


cdef size_t charged_of(pool* p, const void* budget) noexcept nogil:
    """How many slots are charged to the budget, or, where the pool does not know, all."""
    cdef int i
    for i in range(BUDGETS):
        if p.budgets[i].budget == budget:
            return p.budgets[i].slots
    return p.n_slots if p.more_budgets else 0


cdef inline bint charges_each_slot(pool* p, const void* budget) noexcept nogil:
    """Whether each slot of the pool is charged to the budget, and only once."""
    return charged_of(p, budget) == p.n_slots and not p.more_budgets


cdef size_t all_that_idle_slots_hold(int what, const void* budget) noexcept nogil:
    cdef pool* p = pool_after(NULL)
    cdef slot* s
    cdef size_t sum_ = 0
    while p != NULL:
        acquire(&p.lock.held)
        if what == RELIEF_SPACE:
            sum_ += p.idle_reserved
        elif what == RELIEF_PAGES:
            sum_ += p.warm_high
        elif charges_each_slot(p, budget):
            sum_ += p.warm_least
        elif charged_of(p, budget):
            s = p.warm.oldest
            while s != NULL:
                sum_ += given_up(s, what, budget)
                s = s.newer
        unlock(&p.lock.held)
        p = pool_after(p)
    return sum_


# A census counts, for each domain, what its warm slots in all pools hold of the missing resource. Where a bound or a
# refusal concerns several pools, the census decides which slot goes. Its counts are written under census_lock, which is
# taken before any pool's lock. So census_lock is not a fork_lock. If the thread that holds it does not exist in a
# forked child, the child takes the lock over, and the next census counts anew.

cdef size_t census = 0          # the number of the last census
cdef size_t census_total        # what all domains hold
cdef size_t census_domains      # the number of domains that hold something
cdef domain_t unnamed           # `census` and `holds` of the domain NULL

cdef enum:
    # The kinds of slots in the order in which they are looked for.
    COLD_ONE = 0                # a cold slot
    FAIR_ONE = 1                # a warm slot of a domain that holds more than its fair share
    ANY_ONE = 2                 # any warm slot: all domains hold the same
    CHOICES = 3


cdef inline size_t* holding(domain_t* d) noexcept nogil:
    if d == NULL:
        d = &unnamed
    if d.census != census:
        d.census = census
        d.holds = 0
    return &d.holds


cdef inline void count_in(domain_t* d, size_t size) noexcept nogil:
    global census_total, census_domains
    cdef size_t* holds
    if size:
        holds = holding(d)
        census_domains += holds[0] == 0
        census_total += size
        holds[0] += size


cdef inline bint is_above_share(domain_t* d) noexcept nogil:
    """Whether the domain holds more than the mean of the domains that hold something, or is the only such domain."""
    return census_domains < 2 or holding(d)[0] > census_total // census_domains


cdef void count_pool(pool* p, int what, const void* budget) noexcept nogil:
    """The pool's lock is held."""
    cdef tenant* t = p.tenants
    cdef slot* s = p.warm.oldest
    if s == NULL or (what == RELIEF_BUDGET and charged_of(p, budget) == 0):
        return
    if what == RELIEF_BUDGET and not charges_each_slot(p, budget):
        while s != NULL:
            count_in(s.shelf.domain, given_up(s, what, budget))
            s = s.newer
        return
    while t != NULL:
        count_in(t.domain, t.n_warm if what == RELIEF_SPACE else t.warm_high if what == RELIEF_PAGES
                 else t.held if what == KEPT else t.warm_least)
        t = t.next


cdef void take_census(int what, const void* budget) noexcept nogil:
    global census, census_total, census_domains
    cdef pool* p = pool_after(NULL)
    census += 1
    census_total = census_domains = 0
    while p != NULL:
        acquire(&p.lock.held)
        count_pool(p, what, budget)
        unlock(&p.lock.held)
        p = pool_after(p)


cdef bint has_such_domain(pool* p, int which) noexcept nogil:
    """Whether a domain of the pool may lose a warm slot. If not, the caller need not look at the pool's slots."""
    cdef tenant* t = p.tenants
    while t != NULL and not (t.n_warm and (which == ANY_ONE or is_above_share(t.domain))):
        t = t.next
    return t != NULL


cdef slot* oldest_with(pool* p, int which, int what, const void* budget) noexcept nogil:
    """The least recently used idle slot of that choice which gives something up. The pool's lock is held."""
    cdef slot* s = p.warm.oldest
    if which == COLD_ONE:
        return p.cold.oldest
    if (what == RELIEF_BUDGET and charged_of(p, budget) == 0) or not has_such_domain(p, which):
        return NULL
    while s != NULL and not (given_up(s, what, budget) and (which == ANY_ONE or is_above_share(s.shelf.domain))):
        s = s.newer
    return s


cdef pool* pool_of_oldest(int which, int what, const void* budget) noexcept nogil:
    """A reference on the pool whose oldest_with() is the least recently used. NULL: no pool has one."""
    cdef pool* p = pool_after(NULL)
    cdef pool* of = NULL
    cdef slot* s
    cdef long long since = 0
    while p != NULL:
        acquire(&p.lock.held)
        s = oldest_with(p, which, what, budget)
        if s != NULL and (of == NULL or s.since <= since):      # the pools are in order, the newest first
            since = s.since
            add(&p.refs, 1)
            unlock(&p.lock.held)
            if of != NULL:
                release_pool(of)
            of = p
        else:
            unlock(&p.lock.held)
        p = pool_after(p)
    return of


cdef size_t give_up_oldest(int what, const void* budget, int cause) noexcept nogil:
    """The least recently used idle slot of all pools gives up what it holds: a cold slot if address space is missing,
    otherwise a warm slot of a domain that holds more than its fair share. Returns the bytes that the slot held; 0: no
    slot holds any. Each warm slot is chosen by a new census, because other threads use slots between two calls, and
    because a dropped slot may become a warm slot of the pool below."""
    cdef pool* of = NULL
    cdef slot* s = NULL
    cdef size_t size = 0
    cdef bint dropped = what == RELIEF_SPACE
    cdef int which = COLD_ONE if dropped else FAIR_ONE
    acquire(&census_lock)
    while which < CHOICES:
        if which == FAIR_ONE:
            take_census(what, budget)
        of = pool_of_oldest(which, what, budget)
        if of != NULL:
            break
        which += 1
    if of != NULL:
        acquire(&of.lock.held)
        s = oldest_with(of, which, what, budget)
        if s != NULL:       # else another thread was faster, and the caller asks again
            size = given_up(s, what, budget)
            count_eviction(of, s, cause)
            move_slot(of, s, DROPPING if dropped else COOLING)
        unlock(&of.lock.held)
    unlock(&census_lock)
    if of == NULL:
        return 0
    if s != NULL and dropped:
        drop(s)
    elif s != NULL:
        cool(of, s)
    release_pool(of)
    return size if size else 1


cdef bint would_help(int what, size_t size, size_t held) noexcept nogil:
    """Whether `size` bytes, which the OS has refused, may be had once idle slots give up the `held` bytes that they
    have. Tried with what would then be missing. Where not even one page is to be had, mappings are what is missing."""
    cdef size_t page = pages.capabilities().page_size
    if size <= held:
        return True
    return may_be_had(what, size - held) or not may_be_had(what, page)


cdef bint may_be_had(int what, size_t size) noexcept nogil:
    cdef char* base
    cdef size_t page = pages.capabilities().page_size
    cdef int code
    if size > SIZE_MAX >> 1:
        return False
    size = round_down(size + page - 1, page)
    if pages.reserve(size, False, &base):
        return False
    code = pages.commit(base, size) if what == RELIEF_PAGES else 0
    give_back(base, size)
    return code == 0


cdef bint give(int what, const void* budget, size_t missing) noexcept nogil:
    """The relief of _memory.pxd. Of a budget as much as is missing; of what the OS has refused, of which nobody knows
    how much is missing, what one slot has: the caller tries again, and asks for more."""
    cdef size_t held, got = 0, step
    held = all_that_idle_slots_hold(what, budget)
    if held == 0 and what == RELIEF_PAGES and not may_be_had(what, pages.capabilities().page_size):
        what = RELIEF_SPACE         # mappings are missing, which cold slots have, too
        held = all_that_idle_slots_hold(what, budget)
    if held == 0:
        return False
    if what == RELIEF_BUDGET:
        if held < missing:
            return False
        while got < missing:
            step = give_up_oldest(what, budget, EVICTED_REFUSED)
            if step == 0:
                break
            got += step
        return got > 0
    return would_help(what, missing, held) and give_up_oldest(what, budget, EVICTED_REFUSED) > 0


cdef void shed_held() noexcept nogil:
    """Until all pools' idle slots keep no more than the bound that they share."""
    while load(&all_held) > load(&held_bound):
        if give_up_oldest(KEPT, NULL, EVICTED_PROCESS) == 0:
            return


cdef void tell_sum_anew() noexcept nogil:
    """After a change of the slack: no pool says more than that above what it keeps."""
    cdef pool* p = pool_after(NULL)
    while p != NULL:
        acquire(&p.lock.held)
        tell_sum(p)
        unlock(&p.lock.held)
        p = pool_after(p)


cdef slot* drop_stack(pool* p, slot* top, slot* chain, int cause) noexcept nogil:
    """The lock is held. All slots of a stack of idle ones become DROPPING, and are put before `chain`, by `below`."""
    cdef slot* s
    while top != NULL:
        s = top
        top = s.below
        count_eviction(p, s, cause)
        move_slot(p, s, DROPPING)
        s.below = chain
        chain = s
    return chain


cdef void forget_image(image_t* it) noexcept nogil:
    """Nobody can ask for a memory of that image any more: its idle slots go, of every pool. Those that are between two
    states go when they would become idle."""
    cdef pool* p = pool_after(NULL)
    cdef shelf* here
    cdef kind* k
    cdef slot* s
    cdef slot* chain
    cdef int i
    while p != NULL:
        chain = NULL
        acquire(&p.lock.held)
        for i in range(SHELVES):
            here = p.shelves[i]
            while here != NULL:
                if here.shape.image == it:
                    chain = drop_stack(p, here.warm, chain, EVICTED_IMAGE)
                here = here.next
        for i in range(KINDS):
            k = p.kinds[i]
            while k != NULL:
                if k.shape.image == it:
                    chain = drop_stack(p, k.cold, chain, EVICTED_IMAGE)
                k = k.next
        unlock(&p.lock.held)
        while chain != NULL:
            s = chain
            chain = s.below
            drop(s)
        p = pool_after(p)


cdef slot* outermost_slot(memory* m) noexcept nogil:
    cdef memory_hook* hook = m.hooks
    while hook != NULL and hook.keep != slot_keep:
        hook = hook.next
    return <slot*>hook


cdef bint was_lost(slot* s, memory* m) noexcept nogil:
    """Of the outermost slot of `m`: no guest has it, and it is not idle, so a thread was moving it to another state."""
    cdef int state = <int>load(&s.state)
    return state != WARM and state != COLD and (state != LIVE or load(&m.refs) == 0)


cdef void drop_what_was_lost() noexcept nogil:
    """In a forked child: a slot goes that a thread was at work on which the child does not have, since nobody knows how
    far that thread came. The thread that forks is at work on none: no code of Python's runs meanwhile."""
    cdef memory* m = live_after(NULL)
    cdef slot* s
    cdef slot* next
    cdef slot* chain = NULL
    cdef memory_hook* hook
    cdef pool* p
    store(&costs_lock, 0)       # the thread that measured is not here
    while m != NULL:
        s = outermost_slot(m)
        if s != NULL and was_lost(s, m):
            s.m = m
            s.below = chain
            chain = s
        m = live_after(m)
    while chain != NULL:
        m = chain.m
        chain = chain.below
        hook = m.hooks
        while hook != NULL:
            if hook.keep == slot_keep and load(&(<slot*>hook).state) != DROPPING:
                move_slot((<slot*>hook).pool, <slot*>hook, DROPPING)
            hook = hook.next
        store(&m.refs, 1)
        memory_release(m)
    p = pool_after(NULL)
    while p != NULL:
        s = p.slots
        while s != NULL:
            next = s.next
            if load(&s.state) == DROPPING:      # its memory is gone already
                slot_dropped(&s.head)
            s = next
        p = pool_after(p)


cdef bint is_slot_of(pool* p, memory* m) noexcept nogil:
    return m.hooks != NULL and m.hooks.keep == slot_keep and (<slot*>m.hooks).pool == p


cdef inline void key_of(const memory_spec* spec, shape* key) noexcept nogil:
    key.minimum = spec.minimum
    key.maximum = spec.maximum
    key.reservation = spec.reservation
    key.guard = spec.guard
    key.is_64 = spec.is_64
    key.is_shared = spec.is_shared
    key.image = spec.image


# -- handing slots out ---------------------------------------------------------------------------------------------

cdef enum:
    FITS = 0                # there is room for one more slot
    NOT_NOW = 1             # dropping idle slots would make room
    FULL = 2                # and that would not be enough


cdef int room_for(pool* p, size_t reserved, size_t mappings, int* cause) noexcept nogil:
    """The lock is held."""
    cdef size_t bound = <size_t>load(&reserved_bound), all_ = <size_t>load(&all_reserved)
    if p.n_slots >= p.most_slots or p.mappings + mappings > p.most_mappings:
        cause[0] = EVICTED_SLOTS
        return NOT_NOW if p.n_warm or p.n_cold else FULL
    if reserved > p.reserved_bound - p.reserved or p.reserved > p.reserved_bound:
        cause[0] = EVICTED_RESERVED
        if reserved > p.reserved_bound or p.reserved - p.idle_reserved > p.reserved_bound - reserved:
            return FULL
        return NOT_NOW
    if all_ > bound or reserved > bound - all_:
        cause[0] = EVICTED_PROCESS
        if reserved > bound:
            return FULL
        return NOT_NOW
    return FITS


cdef int make_room(pool* p, const shape* key, size_t reserved, size_t mappings, bint* again,
                   failure* why) noexcept nogil:
    """Drop idle slots until one more fits. *again: one of them is of this shape, and has become cold instead."""
    cdef slot* s
    cdef int room, cause = 0
    again[0] = False
    while True:
        acquire(&p.lock.held)
        room = room_for(p, reserved, mappings, &cause)
        s = NULL
        if room == NOT_NOW and cause != EVICTED_PROCESS:
            s = least_wanted(p)
            if s != NULL:
                again[0] = (load(&s.state) == WARM and cause == EVICTED_SLOTS and same_shape(&s.shelf.shape, key))
                count_eviction(p, s, cause)
                move_slot(p, s, COOLING if again[0] else DROPPING)
        if room != FITS and s == NULL:
            full(p, cause, key.minimum, reserved, why)
        unlock(&p.lock.held)
        if room == FITS:
            return 0
        if s == NULL and (room == FULL or cause != EVICTED_PROCESS):
            return E_EXHAUSTED
        if again[0]:
            cool(p, s)
            return 0
        if s != NULL:
            drop(s)
        elif all_that_idle_slots_hold(RELIEF_SPACE, NULL) < lacking(reserved) or give_up_oldest(
                RELIEF_SPACE, NULL, EVICTED_PROCESS) == 0:
            return E_EXHAUSTED


cdef bint claim_space(size_t reserved) noexcept nogil:
    """False: another pool was faster, and the bound of all pools does not allow it any more."""
    cdef long long before = load(&all_reserved)
    while before + <long long>reserved <= load(&reserved_bound):
        if swap_if(&all_reserved, before, before + <long long>reserved):
            return True
        before = load(&all_reserved)
    return False


cdef size_t lacking(size_t reserved) noexcept nogil:
    """Bytes of address space that all pools together have too much for `reserved` more."""
    cdef size_t bound = <size_t>load(&reserved_bound), all_ = <size_t>load(&all_reserved) + reserved
    return all_ - bound if all_ > bound else 0


cdef void full(pool* p, int cause, size_t size, size_t reserved, failure* why) noexcept nogil:
    """Fill `why` with the reason why the pool has no room. The caller holds the pool's lock, because the text contains
    counts that this lock protects."""
    fail(why, E_EXHAUSTED, "new_memory", size if cause == EVICTED_SLOTS else reserved, p.most_slots, p.most_slots)
    if cause == EVICTED_RESERVED:
        snprintf(why.detail, sizeof(why.detail), "the memories of the pool reserve %zu of max_reserved=%zu bytes",
                 p.reserved, p.reserved_bound)
    elif cause == EVICTED_PROCESS:
        snprintf(why.detail, sizeof(why.detail), "the memories of all pools reserve %zu of the %zu bytes that"
                 " set_pool_limits() allows", <size_t>load(&all_reserved), <size_t>load(&reserved_bound))
    elif p.n_slots < p.most_slots:
        snprintf(why.detail, sizeof(why.detail), "the %zu slots of the pool take %zu of %zu mappings",
                 p.n_slots, p.mappings, p.most_mappings)


cdef size_t least_reserved(const memory_spec* spec) noexcept nogil:
    """Bytes that a memory reserves at least; what upstream chooses itself is seen when it is there."""
    cdef layout at
    cdef size_t reservation = 0 if spec.reservation == UNCHOSEN else spec.reservation
    if lay_out(spec.minimum, reservation, spec.guard, pages.capabilities().page_size, &at):
        return 0            # upstream refuses it, in words
    return at.total


cdef int take(pool* p, const shape* key, domain_t* whose, bint counted, memory** out, failure* why) noexcept nogil:
    """An idle slot of that shape: of the domain, else a cold one of any. *out == NULL: there is none."""
    cdef shelf* here
    cdef kind* k
    cdef slot* s = NULL
    cdef parts new
    cdef bint cold = False
    cdef const void* me = this_thread()
    cdef long long now
    cdef int code
    out[0] = NULL
    acquire(&p.lock.held)
    here = find_shelf(p, key, whose)
    if here != NULL:
        s = here.warm
        # Of the last two, rather the one whose pages are in this processor's cache.
        if s != NULL and s.below != NULL and s.thread != me and s.below.thread == me:
            s = s.below
        if s != NULL:
            move_slot(p, s, LIVE)
            if counted:
                s.counts.hits_warm += 1
                count_guest(p, s)
        else:
            s = here.kind.cold
            cold = s != NULL
            if cold:
                move_slot(p, s, LIVE)
                move_house(p, s, here)
    elif p.n_cold:
        k = find_kind(p, key)
        cold = k != NULL and k.cold != NULL
    unlock(&p.lock.held)
    if s == NULL and cold:
        # The domain has no shelf of this shape yet.
        if not get_parts(&new, whose, False):
            return fail(why, E_NO_MEMORY, "calloc", sizeof(shelf))
        acquire(&p.lock.held)
        k = find_kind(p, key)
        s = k.cold if k != NULL else NULL
        if s != NULL:
            move_slot(p, s, LIVE)
            move_house(p, s, need_shelf(p, key, whose, &new))
        unlock(&p.lock.held)
        free_parts(&new)
    if s == NULL:
        return 0
    if cold:
        now = pages.coarse_ns()
        code = warm_up(s, now, why)
        if code and s.pages.accessible == 0 and s.pages.least:
            acquire(&p.lock.held)
            cold = move_slot(p, s, COLD)
            unlock(&p.lock.held)
            if not cold:
                drop(s)
            return code
        if code:
            drop(s)         # and a new one may be had where this one's pages may not
            return 0
        if counted:
            acquire(&p.lock.held)
            s.counts.hits_cold += 1
            count_guest(p, s)
            unlock(&p.lock.held)
    elif s.unfilled and s.pages.least and pages.prefault(s.base, s.pages.least):
        drop(s)
        return 0
    s.unfilled = False
    restore(s)
    out[0] = s.m
    return 0


cdef void move_house(pool* p, slot* s, shelf* here) noexcept nogil:
    """A slot without pages, on no list, joins the shelf of its next guest's domain."""
    if s.shelf != here:
        s.changed_domain = s.changed_domain or s.shelf.domain != here.domain
        here.slots += 1         # first: what it leaves may be the last of its kind
        here.kind.slots += 1
        here.tenant.slots += 1
        add_counts(&s.shelf.kind.gone, &s.counts)
        add_counts(&s.shelf.tenant.gone, &s.counts)
        add_counts(&p.gone, &s.counts)
        memset(&s.counts, 0, sizeof(counts))
        leave_shelf(p, s)
        s.shelf = here

cdef enum:
    TAKE_AGAIN = -100       # of make_slot() alone: no failure

ctypedef domain_t* domain_ptr


cdef size_t least_mappings(const memory_spec* spec) noexcept nogil:
    """Of a slot that is made; what upstream adds is seen when it is there."""
    return 5 if spec.image != NULL and spec.image.content.maps and spec.image.high > spec.image.low else 3


cdef void describe_slot(pool* p, slot* s, memory* m, const memory_spec* spec) noexcept nogil:
    s.pool = p
    s.m = m
    s.base = m.base
    s.capacity = m.capacity
    s.pages.least = s.pages.accessible = s.pages.high = m.accessible
    s.given.size = load(&m.size)
    s.given.maximum = m.maximum
    s.given.pre_guard = m.pre_guard
    s.given.guard = m.guard
    s.given.covered = m.covered
    s.given.is_shared = m.is_shared
    s.given.moved = m.moved
    s.given.huge_pages = m.huge_pages
    s.given.growth_is_watched = m.growth_is_watched
    s.reserved = m.pre_guard + m.capacity + m.guard
    s.image = spec.image if spec.image != NULL else m.image     # a pool below may have one of its own
    image_retain(s.image)
    s.mappings = mappings_of(s)
    s.since = s.emptied = s.grown = pages.coarse_ns()
    s.head.keep = slot_keep
    s.head.dropped = slot_dropped
    reset_start(&s.policy)


cdef bint make_upstream_room(pool* p, int code, failure* why) noexcept nogil:
    """Upstream has refused a memory. True: idle slots have given something up, so it is worth asking again."""
    cdef slot* s
    if code != E_EXHAUSTED:
        return False
    acquire(&p.lock.held)       # a pool below is full, perhaps with what is idle here
    s = least_wanted(p)
    if s != NULL:
        count_eviction(p, s, EVICTED_REFUSED)
        move_slot(p, s, DROPPING)
    unlock(&p.lock.held)
    if s != NULL:
        drop(s)
    return s != NULL


cdef extern from *:
    void* PyGILState_GetThisThreadState() noexcept nogil


cdef int wait_a_little(failure* why) noexcept nogil:
    """For a slot to be given back. A thread of Python's answers Ctrl-C here."""
    if python_is_ending():
        return fail(why, E_EXHAUSTED, "new_memory", why.size, why.used, why.limit)
    if PyGILState_GetThisThreadState() == NULL:
        pages.relax()
        return 0
    return sleep_with_gil(why)


cdef int sleep_with_gil(failure* why) noexcept with gil:
    try:
        PyErr_CheckSignals()        # one that came before the sleep does not end it
        _sleep(0.0005)
        return 0
    except BaseException as error:
        return fail_python(why, error)


@cython.final
cdef class PoolingCreator(NativeCreator):
    """Memories that are reset and handed out again instead of being made anew.

    A slot (a memory of the upstream creator) is kept when the last reference on it is gone: wasmtime's,
    Python handles', and exported buffers'. It is then reset on that thread, with no lock and no GIL, and
    serves the next request of the same shape (minimum, maximum, reservation, guard), the last one given
    back first. What is dear stays: the mapping, its protection, and the resident pages. As wasmtime's
    pooling allocator, which Python cannot reach, and as rmm's ``PoolMemoryResource``.

    Parameters
    ----------
    upstream : NativeCreator, optional
        Who makes the slots; an `MmapCreator` by default. Memories of a `PythonCreator` are passed on
        and not kept.
    slots : int, optional
        The most slots, in use and idle. By default as many as take half of the mappings that a process
        may have (``vm.max_map_count``).
    keep_resident : int
        Bytes that one idle slot may keep resident. Of one that has more, all pages go back to the OS.
    image : Image, optional
        What every memory starts from that is asked for without an image of its own; one that is too small for
        it is refused. Each slot stays with its image: reset, it gets back what was written, no more. A request
        with another image (``img.new_memory(creator=pool)``) is of another shape.
    max_unused_warm : int
        Idle slots that keep their pages. The least recently used beyond them become cold: they keep
        address space only.
    max_resident : int, optional
        Bytes that all idle slots together keep resident, page tables included. By default
        ``max_unused_warm * keep_resident``, but not more than a quarter of the machine's memory. What all pools keep
        is bounded by `set_pool_limits`, too.
    max_reserved : int, optional
        Bytes of address space of all slots, live and idle, guards included. Beyond it as `when_full` says; a request
        that is larger than the bound is a `PoolError` also with "wait".
    idle_seconds : float or None
        Slots that have been idle for longer become cold, a few at each give-back. None: not by time.
    max_reset_seconds : float, optional
        What would take longer to zero is given back to the OS instead.
    reset : {"adaptive", "scan", "zero", "discard"}
        How a slot becomes zero again. "scan": the OS says which pages were touched (PAGEMAP_SCAN,
        /proc/self/pagemap, GetWriteWatch), and those are zeroed. "zero": all of it is. "discard": all pages go back to
        the OS (MADV_DONTNEED; on Windows decommitted). "adaptive": whichever of these costs least for
        what each slot's users do, as measured while they do it.
    when_full : {"fallback", "error", "wait"}
        With every slot in use: a memory straight from upstream, which no bound of the pool holds back; `PoolError`; or
        wait until a slot is given back.
    timeout : float, optional
        Seconds that "wait" waits before it is a `PoolError`. None: without an end.
    check : bool
        Compare all of a slot with zero after each reset. One with a byte left is thrown away and
        counted as rejected. For tests and for distrust; costs more than all the rest.

    Notes
    -----
    Thread-safe. When the creator is collected, idle slots are released, and those in use when they are
    given back.
    """

    def __cinit__(self, *args, **kwargs):
        cdef pool* p
        cdef void* block
        cdef const pages.capabilities_t* caps = pages.capabilities()
        cdef size_t most_slots = caps.mappings // 6 if caps.mappings else 10000
        cdef size_t keep, warm, resident = SIZE_MAX, reserved = SIZE_MAX
        cdef long long idle_ns, reset_ns, wait_ns
        (upstream, slots, keep_resident, max_unused_warm, max_resident, max_reserved, idle_seconds, max_reset_seconds,
         reset, when_full, timeout, check, image) = _given("PoolingCreator", tuple(_OPTIONS), _OPTIONS, args, kwargs, 1)
        self.upstream = check_native(MmapCreator() if upstream is None else upstream, "upstream")
        if image is not None and not isinstance(image, ImageHandle):
            raise TypeError(f"image must be an Image, got {type(image).__name__}")
        self.image = image
        if slots is not None:
            check_count(slots, "slots", &most_slots)
        if most_slots < 1:
            raise ValueError(f"slots must be >= 1, got {slots}")
        check_size(keep_resident, "keep_resident", &keep)
        check_count(max_unused_warm, "max_unused_warm", &warm)
        check_choice(reset, "reset", _RESETS)
        check_choice(when_full, "when_full", ("fallback", "error", "wait"))
        if max_resident is not None:
            check_size(max_resident, "max_resident", &resident)
        if max_reserved is not None:
            check_size(max_reserved, "max_reserved", &reserved)
        idle_ns = nanoseconds(idle_seconds, "idle_seconds", 0)
        reset_ns = nanoseconds(max_reset_seconds, "max_reset_seconds", 0)
        wait_ns = nanoseconds(timeout, "timeout", -1)
        if timeout is not None and when_full != "wait":
            raise ValueError(f"timeout must be None without when_full='wait', got {_shown(timeout)}")
        check_flag(check, "check")
        if reset == "scan" and not caps.scans:
            raise ValueError("reset must not be 'scan' here: this OS does not say which pages were touched")
        block = calloc(1, sizeof(pool) + CACHE_LINE)
        if block == NULL:
            raise MemoryError("no memory for a pool")
        p = <pool*>lock_on_a_line(block)
        p.block = block
        p.refs = 1
        p.most_slots = most_slots
        p.most_mappings = caps.mappings // 2 if slots is None and caps.mappings else SIZE_MAX
        p.keep_resident = keep
        p.most_warm = warm
        p.resident_bound = keep * warm if warm == 0 or keep <= SIZE_MAX // warm else SIZE_MAX
        if caps.memory and p.resident_bound > caps.memory // 4:
            p.resident_bound = caps.memory // 4
        if max_resident is not None:
            p.resident_bound = resident
        p.reserved_bound = reserved
        p.idle_ns = idle_ns
        p.reset_ns = reset_ns
        p.wait_ns = wait_ns
        p.wait = when_full == "wait"
        p.reset = _RESETS[reset]
        p.fall_back = when_full == "fallback"
        p.check = check
        with nogil:
            start_pools()
            need_costs()
            list_lock(&p.lock)
            join_all_pools(p)
        self.pool = p

    def __dealloc__(self):
        if self.pool != NULL:
            with nogil:
                close_pool(self.pool)
                release_pool(self.pool)

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef memory_spec ours
        if spec.image == NULL and self.image is not None:
            ours = spec[0]
            ours.image = self.image.it
            return self.make_of(&ours, True, out, why)
        return self.make_of(spec, True, out, why)

    cdef int make_of(self, const memory_spec* spec, bint counted, memory** out, failure* why) noexcept nogil:
        cdef shape key
        cdef domain_t* whose = current_domain()
        cdef long long start = 0
        cdef int code
        key_of(spec, &key)
        while True:
            code = take(self.pool, &key, whose, counted, out, why)
            if out[0] != NULL:
                out[0].may_move = spec.may_move     # not of the shape: a memory that has moved is not kept
            if code or out[0] != NULL:
                return code
            code = self.make_slot(self.pool, &key, whose, spec, counted, out, why)
            if code == TAKE_AGAIN:
                continue
            if code != E_EXHAUSTED or not self.pool.wait:
                return code
            if why.size > self.pool.reserved_bound or why.size > <size_t>load(&reserved_bound):
                return code         # no memory that is given back makes room for so much
            if start == 0:
                start = pages.clock_ns()
            if self.pool.wait_ns >= 0 and pages.clock_ns() - start >= self.pool.wait_ns:
                return code
            code = wait_a_little(why)
            if code:
                return code

    cdef int make_slot(self, pool* p, const shape* key, domain_t* whose, const memory_spec* spec, bint counted,
                       memory** out, failure* why) noexcept nogil:
        """A memory of upstream's, which becomes a slot where there is room for one. TAKE_AGAIN: an idle slot of that
        shape has been made fit for this domain."""
        cdef slot* s
        cdef shelf* here
        cdef parts new
        cdef int code, cause
        cdef bint again
        cdef memory_spec watched = spec[0]
        code = make_room(p, key, least_reserved(spec), least_mappings(spec), &again, why)
        if again:
            return TAKE_AGAIN
        if code:
            return self.pass_on(p, spec, out, why) if p.fall_back else code
        watched.watched = p.reset == RESET_SCAN or p.reset == ADAPTIVE
        if not get_parts(&new, whose, True):
            return fail(why, E_NO_MEMORY, "calloc", sizeof(slot))
        code = self.upstream.make(&watched, out, why)
        while code and make_upstream_room(p, code, why):
            code = self.upstream.make(&watched, out, why)
        if code or not out[0].ops.pages_are_ours:
            free_parts(&new)
            if code == 0:
                acquire(&p.lock.held)
                p.fallbacks += 1
                unlock(&p.lock.held)
            return code
        s = new.slot
        describe_slot(p, s, out[0], spec)
        # Upstream may have reserved more than was asked for, and may itself have used this pool meanwhile.
        while True:
            acquire(&p.lock.held)
            if room_for(p, s.reserved, s.mappings, &cause) == FITS and claim_space(s.reserved):
                break
            unlock(&p.lock.held)
            code = make_room(p, key, s.reserved, s.mappings, &again, why)
            if code:
                image_release(s.image)
                free_parts(&new)
                if p.fall_back:
                    acquire(&p.lock.held)
                    p.fallbacks += 1
                    unlock(&p.lock.held)
                    return 0
                memory_release(out[0])
                out[0] = NULL
                return code
        new.slot = NULL
        here = need_shelf(p, key, whose, &new)
        join_shelf(s, here)
        if counted:
            p.gone.misses += 1
            here.kind.gone.misses += 1
            here.tenant.gone.misses += 1
            count_guest(p, s)
        p.n_slots += 1
        p.reserved += s.reserved
        p.mappings += s.mappings
        join_budgets(p, s)
        add(&p.refs, 1)
        s.next = p.slots
        if p.slots != NULL:
            p.slots.previous = s
        p.slots = s
        unlock(&p.lock.held)
        if s.image != NULL:
            add(&s.image.slots, 1)
        free_parts(&new)
        memory_hang(s.m, &s.head)
        return 0

    cdef int pass_on(self, pool* p, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        """A memory straight from upstream."""
        cdef int code = self.upstream.make(spec, out, why)
        if code == 0:
            acquire(&p.lock.held)
            p.fallbacks += 1
            unlock(&p.lock.held)
        return code

    def warm(self, n, ty, *, reserved_size_in_bytes=4 << 30, guard_size_in_bytes=32 << 20, domain=None):
        """Make slots ahead, so that the next `n` requests of a type are hits.

        The pages of the minimum are accessible and not yet resident: the first user faults them in.

        Parameters
        ----------
        n : int
            Idle slots of that shape that there shall be at least.
        ty : MemoryType
        reserved_size_in_bytes, guard_size_in_bytes : int
            As in `new_memory`; by default what wasmtime asks for in its default configuration.
        domain : str or None
            Whose requests they are for. Slots that have become cold serve any domain.

        Returns
        -------
        int
            How many slots were made; those that were idle already are not counted.

        Raises
        ------
        PoolError
            There are not enough slots that are not in use, or upstream's memories cannot be kept.
        PageError, GrowError
            Upstream refused; the slots made until then remain.
        """
        cdef size_t wanted, taken = 0, made = 0
        cdef pool* p = self.pool
        cdef memory** memories
        cdef memory_spec spec
        cdef shape key
        cdef domain_ptr whose, before = current_domain()
        cdef failure why
        cdef int code = 0
        check_count(n, "n", &wanted)
        if wanted > p.most_slots:
            raise ValueError(f"n must be <= the slots of the pool ({p.most_slots}), got {wanted}")
        try:
            minimum = ty.minimum * ty.page_size
            maximum = None if ty.maximum is None else ty.maximum * ty.page_size
            for name, value in (("minimum", minimum), ("maximum", maximum)):
                if value is not None and value >= 2**64 - 1:
                    raise OverflowError(f"ty.{name} * ty.page_size must be below 2**64 - 1, got {_shown(value)}")
            if maximum is None:                 # what wasmtime says then; its 2**64 - 1 is none
                maximum = 2**32 if not ty.is_64 else None if ty.page_size == 1 else 2**64 - ty.page_size
        except (AttributeError, TypeError):
            raise TypeError(f"ty must be a MemoryType, got {type(ty).__name__}") from None
        self.fill_spec(&spec, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes)
        if spec.guard & (pages.capabilities().page_size - 1):
            raise ValueError("guard_size_in_bytes must be a multiple of the host page"
                             f" ({pages.capabilities().page_size}), got {spec.guard}")
        if self.image is not None:
            spec.image = self.image.it
        key_of(&spec, &key)
        whose = domain_of(domain)
        memories = <memory**>calloc(wanted + 1, sizeof(memory*))
        if memories == NULL:
            with nogil:
                domain_release(whose)
            raise MemoryError(f"no memory for a list of {wanted} slots")
        with nogil:
            set_domain(whose)       # so that a pool below makes its slots for the same domain
            while code == 0 and taken < wanted:
                code = take(p, &key, whose, False, &memories[taken], &why)      # nobody has asked for these yet
                if code == 0 and memories[taken] == NULL:
                    code = self.make_slot(p, &key, whose, &spec, False, &memories[taken], &why)
                    if code == TAKE_AGAIN:
                        code = 0
                        continue
                    if code:
                        break
                    if not is_slot_of(p, memories[taken]):
                        memory_release(memories[taken])
                        code = fail(&why, E_EXHAUSTED, "warm", spec.minimum, p.most_slots, p.most_slots)
                        break
                    made += 1
                taken += 1
            while taken:
                taken -= 1
                memory_release(memories[taken])
            free(memories)
            set_domain(before)
            domain_release(whose)
        if code:
            raise_failure(&why)
        return made

    def trim(self, target=0):
        """Release idle slots, cold ones first, then the least recently used.

        Parameters
        ----------
        target : int
            Bytes that idle slots may keep resident. 0: every idle slot is released.

        Returns
        -------
        int
            Bytes that the released slots had kept resident, at most.
        """
        cdef size_t most, released
        check_size(target, "target", &most)
        with nogil:
            released = release_idle(self.pool, most)
        return released

    def purge(self, target=0, *, older_than=0):
        """Give the pages of idle slots back to the OS; their mappings stay, for the next requests. For a timer.

        Parameters
        ----------
        target : int
            Bytes that idle slots may keep resident. The least recently used ones give theirs back first.
        older_than : float
            Only slots that have been idle for so many seconds.

        Returns
        -------
        int
            Bytes that were resident of what was given back, at most.
        """
        cdef size_t most, purged
        cdef long long older
        if older_than is None:
            raise TypeError("older_than must be a number of seconds, got None")
        older = nanoseconds(older_than, "older_than", -1, "a number of seconds")
        check_size(target, "target", &most)
        with nogil:
            purged = purge_idle(self.pool, most, older)
        return purged

    def stats(self):
        """What the pool holds and what it did, as a dict of numbers.

        Returns
        -------
        dict
            slots: the most there may be. live, warm, cold: how many are in use; idle with their pages;
            idle without. pinned: of the live ones, those that wasmtime has dropped and a `Memory` or an
            exported buffer still holds. hits, misses: requests served by a slot that was there, and by a
            new one. fallbacks: requests passed to upstream, and not kept. rejected: slots thrown away
            because their reset failed, or left a byte (``check=True``). resets: how many of each kind.
            resident: bytes that idle slots keep resident, at most. resident_bound: what these and their page tables
            never exceed for long. reserved: bytes of address space of all slots, live and idle, guards included.
            `linmem.metrics.read` says more.
        """
        cdef pool* p = self.pool
        cdef pool now               # only what is counted
        cdef slot* s
        cdef size_t pinned = 0
        with nogil:
            acquire(&p.lock.held)
            now.n_slots, now.n_warm, now.n_cold = p.n_slots, p.n_warm, p.n_cold
            now.fallbacks, now.rejected, now.resident = p.fallbacks, p.rejected, p.resident
            now.reserved = p.reserved
            now.gone = p.gone
            s = p.slots
            while s != NULL:
                add_counts(&now.gone, &s.counts)
                pinned += (load(&s.state) == LIVE and s.m != NULL and load(&s.m.refs) > 0
                           and load(&s.m.owner) == OWNER_LEFT)
                s = s.next
            unlock(&p.lock.held)
        return {
            "slots": p.most_slots,
            "live": now.n_slots - now.n_warm - now.n_cold,
            "warm": now.n_warm,
            "cold": now.n_cold,
            "pinned": pinned,
            "hits": now.gone.hits_warm + now.gone.hits_cold,
            "misses": now.gone.misses,
            "fallbacks": now.fallbacks,
            "rejected": now.rejected,
            "resets": {"scan": now.gone.resets[RESET_SCAN], "zero": now.gone.resets[RESET_ZERO],
                       "discard": now.gone.resets[RESET_DISCARD]},
            "resident": now.resident,
            "resident_bound": p.resident_bound,
            "reserved": now.reserved,
        }

    def __repr__(self):
        return f"PoolingCreator({self.upstream!r}, slots={self.pool.most_slots})"


cdef int check_choice(object value, str name, object choices) except -1:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {_shown(value)}")
    return 0


cdef long long nanoseconds(object seconds, str name, long long none,
                           str what="a number of seconds or None") except? -2:
    """None is `none`. Where that is 0, 0 seconds are one nanosecond, so that they are not none."""
    cdef double n
    if seconds is None:
        return none
    if type(seconds) is not int and type(seconds) is not float:
        from numbers import Real        # NumPy's numbers and fractions are such, too
        if isinstance(seconds, bool) or not isinstance(seconds, Real):
            raise TypeError(f"{name} must be {what}, got {_shown(seconds)}")
    if not seconds >= 0:
        raise ValueError(f"{name} must be >= 0, got {_shown(seconds)}")
    n = 1e18 if seconds > 10**9 else float(seconds) * 1e9
    return 1 if n < 1 and none == 0 else <long long>n


ctypedef pool* pool_ptr

# -- reports -------------------------------------------------------------------------------------------------------

cdef struct row:
    shape shape             # of a kind
    domain_t* domain          # of a tenant; a reference
    image_t* image            # of a kind; compared, never followed
    counts counts
    size_t image_bytes
    bint image_descriptor
    size_t live, peak_live, warm, cold
    size_t resident, tables, reserved


cdef void fill_rows(pool* p, row* kinds, row* tenants, row* sums) noexcept nogil:
    """The lock is held, and there is room."""
    cdef kind* k
    cdef tenant* t
    cdef slot* s = p.slots
    cdef row* rows[3]
    cdef size_t n = 0, i
    cdef int state
    for i in range(KINDS):
        k = p.kinds[i]
        while k != NULL:
            kinds[n].shape = k.shape
            kinds[n].counts = k.gone
            kinds[n].peak_live = k.peak_live
            k.row = n
            n += 1
            k = k.next
    n = 0
    t = p.tenants
    while t != NULL:
        tenants[n].domain = t.domain
        domain_retain(t.domain)
        tenants[n].counts = t.gone
        tenants[n].peak_live = t.peak_live
        t.row = n
        n += 1
        t = t.next
    sums.counts = p.gone
    sums.peak_live = p.peak_live
    while s != NULL:
        state = <int>load(&s.state)
        rows[0], rows[1], rows[2] = sums, kinds + s.shelf.kind.row, tenants + s.shelf.tenant.row
        if s.image != NULL:
            rows[1].image = s.image
            rows[1].image_bytes = s.image.high - s.image.low
            rows[1].image_descriptor = s.image.content.handle != -1
        for i in range(3):
            add_counts(&rows[i].counts, &s.counts)
            rows[i].reserved += s.reserved
            if state == WARM or state == COLD:
                rows[i].resident += s.resident
                rows[i].tables += s.tables
            if state == WARM:
                rows[i].warm += 1
            elif state == COLD:
                rows[i].cold += 1
            else:
                rows[i].live += 1
        s = s.next


_CAUSES = {"count": EVICTED_COUNT, "resident": EVICTED_RESIDENT, "process": EVICTED_PROCESS, "slots": EVICTED_SLOTS,
           "reserved": EVICTED_RESERVED, "refused": EVICTED_REFUSED, "image": EVICTED_IMAGE, "trim": EVICTED_TRIM}


cdef dict row_dict(const row* it):
    return {
        "hits_warm": it.counts.hits_warm, "hits_cold": it.counts.hits_cold, "misses": it.counts.misses,
        "evictions": {name: it.counts.evictions[<int>cause] for name, cause in _CAUSES.items()},
        "purges": it.counts.evictions[EVICTED_IDLE] + it.counts.evictions[EVICTED_PURGE],
        "resets": {name: it.counts.resets[<int>_RESETS[name]] for name in ("scan", "zero", "discard")},
        "reset_ns": it.counts.reset_ns, "bytes_zeroed": it.counts.zeroed,
        "live": it.live, "peak_live": it.peak_live, "warm": it.warm, "cold": it.cold,
        "resident": it.resident, "page_tables": it.tables, "reserved": it.reserved,
    }


def read_metrics(PoolingCreator pool not None):
    """What `linmem.metrics.read` returns."""
    cdef pool_ptr p = pool.pool
    cdef row sums
    cdef row* kinds = NULL
    cdef row* tenants = NULL
    cdef size_t n_kinds, n_tenants, room_kinds = 0, room_tenants = 0, i, fallbacks, rejected
    cdef bint failed = False
    memset(&sums, 0, sizeof(row))
    with nogil:
        while True:
            acquire(&p.lock.held)
            n_kinds, n_tenants = p.n_kinds, p.n_tenants
            if kinds != NULL and n_kinds <= room_kinds and n_tenants <= room_tenants:
                break
            unlock(&p.lock.held)
            free(kinds)
            free(tenants)
            room_kinds, room_tenants = n_kinds + 8, n_tenants + 8
            kinds = <row*>calloc(room_kinds, sizeof(row))
            tenants = <row*>calloc(room_tenants, sizeof(row))
            if kinds == NULL or tenants == NULL:
                failed = True
                break
        if not failed:
            fill_rows(p, kinds, tenants, &sums)
            fallbacks, rejected = p.fallbacks, p.rejected
            unlock(&p.lock.held)
    try:
        if failed:
            raise MemoryError("no memory for a report")
        found = row_dict(&sums)
        images = {<size_t>kinds[i].image: (kinds[i].image_bytes, kinds[i].image_descriptor)
                  for i in range(n_kinds) if kinds[i].image != NULL}
        found.update(
            fallbacks=fallbacks, rejected=rejected, slots=p.most_slots, resident_bound=p.resident_bound,
            reserved_bound=None if p.reserved_bound == SIZE_MAX else p.reserved_bound,
            images=len(images), image_bytes=sum(size for size, _ in images.values()),
            image_descriptors=sum(has for _, has in images.values()))
        found["shapes"] = [
            dict(row_dict(&kinds[i]), shape=shape_dict(&kinds[i].shape), image_bytes=kinds[i].image_bytes,
                 image_descriptors=int(kinds[i].image_descriptor)) for i in range(n_kinds)]
        found["domains"] = {
            None if tenants[i].domain == NULL
            else tenants[i].domain.name[:tenants[i].domain.size].decode("utf-8", "surrogatepass"):
            row_dict(&tenants[i]) for i in range(n_tenants)}
        return found
    finally:
        with nogil:
            if not failed:
                for i in range(n_tenants):
                    domain_release(tenants[i].domain)
            free(kinds)
            free(tenants)


cdef dict shape_dict(const shape* it):
    return {"minimum": it.minimum, "maximum": None if it.maximum == NO_MAXIMUM else it.maximum,
            "reservation": None if it.reservation == UNCHOSEN else it.reservation, "guard": it.guard,
            "is_64": bool(it.is_64), "is_shared": bool(it.is_shared), "image": it.image != NULL}


def set_pool_limits(max_resident=None, max_reserved=None):
    """Bound what the pools of this process hold together, beside what each of them is bound to.

    What idle slots hold above a bound is given back before the call returns.

    Parameters
    ----------
    max_resident : int, optional
        Bytes that the idle slots of all pools keep resident at most, page tables included. The least recently used
        slot of a domain that has more than its fair share gives its pages back first. None: a quarter of the machine's
        memory, as at the start.
    max_reserved : int, optional
        Bytes of address space of all slots, live and idle, guards included. A pool beyond it does as its `when_full`
        says. None: no bound, as at the start.

    Raises
    ------
    TypeError, ValueError, OverflowError
        For an argument that is no size; then no bound has changed.
    """
    cdef size_t held = SIZE_MAX, reserved = SIZE_MAX
    if max_resident is not None:
        check_size(max_resident, "max_resident", &held)
    elif pages.capabilities().memory:
        held = pages.capabilities().memory // 4
    if max_reserved is not None:
        check_size(max_reserved, "max_reserved", &reserved)
    with nogil:
        start_pools()
        set_bounds(held, reserved)
        tell_sum_anew()
        shed_held()
        while lacking(0) and give_up_oldest(RELIEF_SPACE, NULL, EVICTED_PROCESS):
            pass


def pool_totals():
    """What all pools hold together, and what they may."""
    cdef long long bound, most
    start_pools()
    bound, most = load(&held_bound), load(&reserved_bound)
    return {"resident": load(&all_held), "resident_bound": None if bound == <long long>(SIZE_MAX >> 1) else bound,
            "reserved": load(&all_reserved), "reserved_bound": None if most == <long long>(SIZE_MAX >> 1) else most}


def _struct_of(Memory mem not None):
    """The bytes of the struct behind a memory. Tests only."""
    return (<const char*>mem.m)[:sizeof(memory)]


# -- for the tests: the pure functions, alone --------------------------------------------------

cdef class _Policy:
    """One slot's policy, for ranges of `n` pages of which `touched` were found."""

    cdef reset_policy policy
    cdef reset_costs costs

    def __cinit__(self, unsigned int fault, unsigned int scan):
        self.costs.fault = fault
        self.costs.scan = scan
        reset_start(&self.policy)

    def begin(self, unsigned int n):
        return {RESET_SCAN: "scan", RESET_ZERO: "zero", RESET_DISCARD: "discard"}[
            reset_begin(&self.policy, &self.costs, n)]

    def bound(self, unsigned int n):
        return reset_bound(&self.policy, &self.costs, n)

    def end(self, unsigned int n, unsigned int touched, unsigned int most):
        return bool(reset_end(&self.policy, &self.costs, n, touched, most))

    def given_back(self):
        reset_given_back(&self.policy)


def _costs(anew=False):
    """What measure_costs() found here."""
    if anew:
        costs.fault = 0
    need_costs()
    return {"fault": costs.fault, "scan": costs.scan}


def _zero_wide(size_t address, size_t size):
    """zero_wide(); False where this processor has no wide stores, and nothing was done."""
    if not has_wide_stores():
        return False
    zero_wide(<char*>address, size)
    return True
