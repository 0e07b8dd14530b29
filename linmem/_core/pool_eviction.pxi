# Which idle slot is evicted first, and which of its resources are released. Part of pool.pyx.
#
# An eviction has three steps: choose the slot, call evict() with the pool's lock held, and call finish_eviction()
# without the lock.

cdef enum:
    RESIDENT = 3                # continues the RELIEF_ kinds: the resident bytes of idle slots, page tables included
    # When a slot is given back to a pool with n warm slots, at most PURGED_AT_ONCE + n / PURGED_SHARE slots are purged.
    PURGED_AT_ONCE = 2
    PURGED_SHARE = 64

cdef size_t PURGED_BYTES = 16 << 20     # bytes: purging stops when the purged slots held at least this much


# -- in one pool --------------------------------------------------------------------------------------------

cdef inline size_t held_of(const warm_totals* warm, int what) noexcept nogil:
    """The amount of the missing resource that warm slots hold: bytes, or for address space the number of slots."""
    return (warm.n if what == RELIEF_SPACE else warm.committed if what == RELIEF_PAGES
            else warm.resident + warm.tables if what == RESIDENT else warm.initial)


cdef size_t domains_that_hold(pool* p, int what) noexcept nogil:
    """The number of domains whose warm slots hold something. Warm slots of empty memories hold no bytes."""
    cdef group* g = first_group(p, BY_DOMAIN)
    cdef size_t domains = 0
    while g != NULL:
        domains += held_of(&g.warm, what) != 0
        g = next_group(g)
    return domains


cdef slot* oldest_above_share(pool* p, int what) noexcept nogil:
    """The least recently used warm slot of a domain that holds more than its fair share of the pool's warm slots. If
    all domains hold the same, the least recently used warm slot."""
    cdef slot* s = oldest(&p.warm_by_age)
    cdef size_t domains = p.warm_domains
    if domains > 1 and what != RELIEF_SPACE:
        domains = domains_that_hold(p, what)
    if domains < 2:
        return s
    while s != NULL and held_of(&s.group.of[BY_DOMAIN].warm, what) * domains <= held_of(&p.warm, what):
        s = newer(s)
    return s if s != NULL else oldest(&p.warm_by_age)


cdef slot* next_to_cool(pool* p, long long now, int* cause) noexcept nogil:
    """The warm slot that must lose its pages next because of a bound of the pool. NULL: all bounds hold."""
    cdef slot* s = oldest(&p.warm_by_age)
    if s == NULL:
        return NULL
    if p.warm.n > p.most_warm:
        cause[0] = EVICTED_COUNT
        return oldest_above_share(p, RELIEF_SPACE)
    if p.warm.resident + p.warm.tables > p.resident_bound:
        cause[0] = EVICTED_RESIDENT
        return oldest_above_share(p, RESIDENT)
    if p.mappings > p.most_mappings:
        cause[0] = EVICTED_SLOTS
        return oldest_above_share(p, RELIEF_SPACE)
    if p.idle_ns and now > p.next_purge:
        if now - s.since > p.idle_ns:
            cause[0] = EVICTED_IDLE
            return s
        p.next_purge = p.idle_ns + s.since
    return NULL


cdef slot* next_to_drop(pool* p) noexcept nogil:
    cdef slot* s = oldest(&p.cold_by_age)
    return s if s != NULL else oldest_above_share(p, RELIEF_SPACE)


cdef void evict(slot* s, int new_state, int cause) noexcept nogil:
    """The pool's lock is held. new_state: COOLING or DROPPING. The caller calls finish_eviction() without the lock."""
    count_eviction(s, cause)
    move_slot(s, new_state)


cdef void finish_eviction(slot* s) noexcept nogil:
    if load(&s.state) == COOLING and cool_pages(s):
        become_cold(s)
    else:
        drop(s)


cdef void become_cold(slot* s) noexcept nogil:
    """The slot has no pages. Drops it if it cannot be kept."""
    lock_pool(s.pool)
    cdef bint kept = move_slot(s, COLD)
    unlock_pool(s.pool)
    if not kept:
        drop(s)


cdef void start_drop(slot* s) noexcept nogil:
    lock_pool(s.pool)
    if load(&s.state) != DROPPING:
        move_slot(s, DROPPING)
    unlock_pool(s.pool)


cdef void drop(slot* s) noexcept nogil:
    """Releases a slot that is not idle to upstream. slot_dropped() frees the slot."""
    start_drop(s)
    store(&s.m.refs, 1)
    memory_release(s.m)


cdef void cool_until_bounds_hold(pool* p, slot* s, int cause, long long now) noexcept nogil:
    """Finishes the eviction of `s`, and evicts one warm slot after the other until the bounds of the pool hold. Only
    a few of the slots that exceed idle_seconds are evicted: the next give-back goes on."""
    cdef size_t purged = 0, purged_bytes = 0, most = 0
    add(&p.refs, 1)         # a slot that is dropped here may hold the last reference
    while s != NULL:
        if cause == EVICTED_IDLE:
            purged += 1
            purged_bytes += s.resident
        finish_eviction(s)
        lock_pool(p)
        if most == 0:
            most = PURGED_AT_ONCE + p.warm.n // PURGED_SHARE
        s = next_to_cool(p, now, &cause)
        if cause == EVICTED_IDLE and (purged >= most or purged_bytes >= PURGED_BYTES):
            s = NULL
        if s != NULL:
            evict(s, COOLING, cause)
        unlock_pool(p)
    release_pool(p)


cdef size_t evict_down_to(pool* p, size_t target, int new_state, long long older_ns) noexcept nogil:
    """trim() and purge(): evicts idle slots, the oldest first, until at most `target` bytes of the pool's idle slots
    are resident. new_state: DROPPING also drops cold slots, and does that first; COOLING leaves slots alone that became
    idle within the last `older_ns`. Returns the bytes that were resident."""
    cdef long long now = pages.coarse_ns()
    cdef size_t evicted = 0
    cdef slot* s
    while True:
        lock_pool(p)
        s = oldest(&p.cold_by_age) if new_state == DROPPING else NULL
        if s == NULL:
            s = oldest(&p.warm_by_age)
            if s != NULL and ((target and p.warm.resident <= target)
                              or (new_state == COOLING and now - s.since < older_ns)):
                s = NULL
        if s != NULL:
            evict(s, new_state, EVICTED_TRIM if new_state == DROPPING else EVICTED_PURGE)
        unlock_pool(p)
        if s == NULL:
            return evicted
        evicted += s.resident
        finish_eviction(s)


cdef void drop_slots_of_image(image_t* image) noexcept nogil:
    """No request can ask for a memory of the image any more, so all pools drop its idle slots. Slots between two states
    are dropped when they would become idle."""
    cdef pool* p = pool_after(NULL)
    cdef link dropped
    cdef group* g
    cdef slot* s
    cdef int grouping
    list_init(&dropped)
    while p != NULL:
        lock_pool(p)
        for grouping in range(BY_DOMAIN):       # warm slots are in groups BY_BOTH, cold ones in groups BY_SHAPE
            g = first_group(p, grouping)
            while g != NULL:
                s = top_of(g) if g.shape.image == image else NULL
                if s == NULL:
                    g = next_group(g)
                else:
                    evict(s, DROPPING, EVICTED_IMAGE)
                    list_add_first(&dropped, &s.in_stack, s)
        unlock_pool(p)
        while dropped.next.owner != NULL:
            s = <slot*>dropped.next.owner
            list_remove(&s.in_stack)
            drop(s)
        p = pool_after(p)


# -- which pools are charged to a budget --------------------------------------------------------------------
# A pool counts its slots for each budget. So a request for relief, which a guest may repeat at will, does not look at
# the slots of pools that cannot help.

cdef void join_budgets(pool* p, slot* s) noexcept nogil:
    """The lock is held. The slot is new."""
    cdef memory_hook* hook = s.m.hooks
    cdef int i, entry
    while hook != NULL:
        if hook.budget != NULL:
            entry = BUDGETS
            for i in range(BUDGETS):
                if p.budgets[i].budget == hook.budget or (p.budgets[i].budget == NULL and entry == BUDGETS):
                    entry = i
            if entry == BUDGETS or s.budgets >> entry & 1:
                p.more_budgets = True
            else:
                p.budgets[entry].budget = hook.budget
                p.budgets[entry].slots += 1
                s.budgets |= <unsigned int>1 << entry
        hook = hook.next


cdef void leave_budgets(pool* p, slot* s) noexcept nogil:
    cdef int i
    for i in range(BUDGETS):
        if s.budgets >> i & 1:
            p.budgets[i].slots -= 1
            if p.budgets[i].slots == 0:
                p.budgets[i].budget = NULL


cdef size_t slots_charged_to(pool* p, const void* budget) noexcept nogil:
    """The number of slots that are charged to the budget. All slots, if the pool does not know which ones are."""
    cdef int i
    for i in range(BUDGETS):
        if p.budgets[i].budget == budget:
            return p.budgets[i].slots
    return p.n_slots if p.more_budgets else 0


cdef inline bint charges_each_slot(pool* p, const void* budget) noexcept nogil:
    """Whether each slot of the pool is charged to the budget exactly once."""
    return slots_charged_to(p, budget) == p.n_slots and not p.more_budgets


# -- in all pools -------------------------------------------------------------------------------------------

cdef inline size_t held_by(const slot* s, int what, const void* budget) noexcept nogil:
    """How many bytes of the missing resource the idle slot gives up. The slot becomes cold; where address space is
    missing, the slot is dropped."""
    cdef memory_hook* hook = s.head.next
    cdef size_t size = 0
    if what == RELIEF_SPACE:
        return s.reserved
    if what == RELIEF_PAGES:
        return s.pages.committed
    if what == RESIDENT:
        return s.resident + s.tables if s.pages.committed else 0
    while hook != NULL:
        if hook.budget == budget:
            size += s.pages.initial
        hook = hook.next
    return size


cdef size_t held_by_all(int what, const void* budget) noexcept nogil:
    """How many bytes of the missing resource the idle slots of all pools hold."""
    cdef pool* p = pool_after(NULL)
    cdef slot* s
    cdef size_t held = 0
    while p != NULL:
        lock_pool(p)
        if what == RELIEF_SPACE:
            held += p.idle_reserved
        elif what != RELIEF_BUDGET or charges_each_slot(p, budget):
            held += held_of(&p.warm, what)
        elif slots_charged_to(p, budget):
            s = oldest(&p.warm_by_age)
            while s != NULL:
                held += held_by(s, what, budget)
                s = newer(s)
        unlock_pool(p)
        p = pool_after(p)
    return held


# A census counts how much of the missing resource each domain's warm slots hold, in all pools. The census decides which
# slot is evicted where a bound or a refusal concerns several pools. census_lock protects all its data. It is taken
# before any pool's lock, so it is not a fork_lock. If the thread that holds census_lock does not exist in a forked
# child, the child takes the lock over, and its next eviction takes a new census.

cdef size_t census = 0          # the number of the last census
cdef size_t census_total        # the sum over all domains
cdef size_t census_domains      # the number of domains that hold something
cdef domain_t unnamed           # stands for requests without a domain (NULL); only `census` and `holds` are used

# Which slots may be chosen. evict_oldest() tries the choices in this order, until a pool has such a slot.
cdef enum:
    ANY_COLD = 0                # any cold slot; tried only if address space is missing
    FAIR_WARM = 1               # a warm slot of a domain that holds more than its fair share
    ANY_WARM = 2                # any warm slot, because no domain holds more than its fair share
    CHOICES = 3


cdef inline size_t* holding(domain_t* domain) noexcept nogil:
    if domain == NULL:
        domain = &unnamed
    if domain.census != census:
        domain.census = census
        domain.holds = 0
    return &domain.holds


cdef inline void add_holding(domain_t* domain, size_t size) noexcept nogil:
    global census_total, census_domains
    cdef size_t* holds = holding(domain)
    census_total += size
    census_domains += size != 0 and holds[0] == 0
    holds[0] += size


cdef inline bint may_go(domain_t* domain, int choice) noexcept nogil:
    """FAIR_WARM: whether the domain holds more than the mean of the domains that hold something, or is the only one."""
    return choice == ANY_WARM or census_domains < 2 or holding(domain)[0] * census_domains > census_total


cdef void count_pool(pool* p, int what, const void* budget) noexcept nogil:
    """The pool's lock is held."""
    cdef group* g = first_group(p, BY_DOMAIN)
    cdef slot* s = oldest(&p.warm_by_age)
    if s == NULL or (what == RELIEF_BUDGET and slots_charged_to(p, budget) == 0):
        return
    if what == RELIEF_BUDGET and not charges_each_slot(p, budget):
        while s != NULL:
            add_holding(s.group.domain, held_by(s, what, budget))
            s = newer(s)
        return
    while g != NULL:
        add_holding(g.domain, held_of(&g.warm, what))
        g = next_group(g)


cdef void take_census(int what, const void* budget) noexcept nogil:
    global census, census_total, census_domains
    cdef pool* p = pool_after(NULL)
    census += 1
    census_total = census_domains = 0
    while p != NULL:
        lock_pool(p)
        count_pool(p, what, budget)
        unlock_pool(p)
        p = pool_after(p)


cdef slot* oldest_with(pool* p, int choice, int what, const void* budget) noexcept nogil:
    """The pool's lock is held. Returns the least recently used idle slot that `choice` allows and that holds some of
    the missing resource."""
    cdef slot* s = oldest(&p.warm_by_age)
    cdef group* g = first_group(p, BY_DOMAIN)
    if choice == ANY_COLD:
        return oldest(&p.cold_by_age)
    if what == RELIEF_BUDGET and slots_charged_to(p, budget) == 0:
        return NULL
    # If no domain qualifies, the loop over all slots is not needed.
    while g != NULL and not (g.warm.n and may_go(g.domain, choice)):
        g = next_group(g)
    if g == NULL:
        return NULL
    while s != NULL and not (held_by(s, what, budget) and may_go(s.group.domain, choice)):
        s = newer(s)
    return s


cdef pool* pool_of_oldest(int choice, int what, const void* budget) noexcept nogil:
    """A reference on the pool whose oldest_with() is the least recently used. NULL: no pool has one."""
    cdef pool* p = pool_after(NULL)
    cdef pool* found = NULL
    cdef pool* former
    cdef slot* s
    cdef long long since = 0
    while p != NULL:
        former = NULL
        lock_pool(p)
        s = oldest_with(p, choice, what, budget)
        # If two slots are equally old, <= chooses the slot of the older pool, because pool_after() returns it later.
        if s != NULL and (found == NULL or s.since <= since):
            since = s.since
            add(&p.refs, 1)
            former = found
            found = p
        unlock_pool(p)
        if former != NULL:
            release_pool(former)
        p = pool_after(p)
    return found


cdef size_t evict_oldest(int what, const void* budget, int cause) noexcept nogil:
    """Evicts the least recently used idle slot of all pools: a cold one where address space is missing, otherwise a
    warm one of a domain that holds more than its fair share. Returns how many bytes of the missing resource it held;
    0: no slot holds any.

    Each eviction of a warm slot takes a census of its own, because other threads use slots between two evictions, and
    because a slot that is dropped may become a warm slot of the pool below."""
    cdef pool* p = NULL
    cdef slot* s = NULL
    cdef size_t size = 0
    cdef bint dropped = what == RELIEF_SPACE
    cdef int choice = ANY_COLD if dropped else FAIR_WARM
    lock(&census_lock)
    while p == NULL and choice < CHOICES:
        if choice == FAIR_WARM:
            take_census(what, budget)
        p = pool_of_oldest(choice, what, budget)
        choice += p == NULL
    if p != NULL:
        lock_pool(p)
        s = oldest_with(p, choice, what, budget)
        if s != NULL:       # otherwise another thread has taken the slot
            size = held_by(s, what, budget)
            evict(s, DROPPING if dropped else COOLING, cause)
        unlock_pool(p)
    unlock(&census_lock)
    if p == NULL:
        return 0
    if s != NULL:
        finish_eviction(s)
    release_pool(p)
    return size if size else 1          # not 0 if another thread has taken the slot: the caller may try again


cdef bint can_have(int what, size_t size) noexcept nogil:
    """Returns whether the OS grants `size` bytes of address space, or of pages."""
    cdef char* base
    cdef size_t page = pages.capabilities().page_size
    if size > SIZE_MAX >> 1:
        return False
    size = round_down(size + page - 1, page)
    if pages.reserve(size, False, &base):
        return False
    cdef int code = pages.commit(base, size) if what == RELIEF_PAGES else 0
    release_address_space(base, size)
    return code == 0


cdef bint relieve_by_eviction(int what, const void* budget, size_t missing) noexcept nogil:
    """The relief that memory.pxd describes. Idle slots give up as many bytes of a budget as are missing. If the OS
    refused something, it does not say how much is missing, so one slot gives up what it holds: the caller tries again,
    and asks for more relief."""
    cdef size_t page = pages.capabilities().page_size
    cdef size_t held = held_by_all(what, budget), evicted = 0, step
    if held == 0 and what == RELIEF_PAGES and not can_have(what, page):
        what = RELIEF_SPACE         # the OS has no mapping left, and cold slots have mappings, too
        held = held_by_all(what, budget)
    if held == 0 or (what == RELIEF_BUDGET and held < missing):
        return False
    # Evicts nothing if the eviction of all idle slots would not be enough: the OS must grant the bytes that idle slots
    # do not hold. But if the OS does not grant even one page, it has no mapping left, and an eviction may help.
    if what != RELIEF_BUDGET and missing > held and not can_have(what, missing - held) and can_have(what, page):
        return False
    while True:
        step = evict_oldest(what, budget, EVICTED_REFUSED)
        evicted += step
        if step == 0 or evicted >= missing or what != RELIEF_BUDGET:
            return evicted > 0


cdef void shed_resident() noexcept nogil:
    """Evicts warm slots until all pools together keep no more than the bound that they share."""
    while load(&process_held) > load(&process_held_bound):
        if evict_oldest(RESIDENT, NULL, EVICTED_PROCESS) == 0:
            return


cdef void shed_excess() noexcept nogil:
    """After a change of the bounds that all pools share."""
    cdef pool* p = pool_after(NULL)
    while p != NULL:            # report_step has changed
        lock_pool(p)
        report_held(p)
        unlock_pool(p)
        p = pool_after(p)
    shed_resident()
    while excess_reserved(0) and evict_oldest(RELIEF_SPACE, NULL, EVICTED_PROCESS):
        pass
