# How a request gets a slot, and how the pool takes a slot back after use. Part of pool.pyx.

cdef enum:
    TIMED = 16              # one of this many resets of a slot is timed
    TAKE_AGAIN = -100       # from make_slot(): not a failure; the caller calls take() again

cdef extern from *:
    """
    static LINMEM_OF_THREAD char linmem_thread;
    static const void *linmem_this_thread(void) { return &linmem_thread; }
    """
    const void* this_thread "linmem_this_thread"() noexcept nogil
    void* PyGILState_GetThisThreadState() noexcept nogil


cdef inline shape shape_of(const memory_spec* spec) noexcept nogil:
    return shape(spec.minimum, spec.maximum, spec.reservation, spec.guard, spec.is_64, spec.is_shared, spec.image)


# -- an idle slot -------------------------------------------------------------------------------------------

cdef inline slot* warm_slot_of(group* g) noexcept nogil:
    """The lock is held. NULL: there is no such group, or it has no warm slot."""
    cdef slot* s = top_of(g)
    cdef slot* below
    if s != NULL:
        below = <slot*>s.in_stack.next.owner
        if below != NULL and s.thread != this_thread() and below.thread == this_thread():
            return below        # its pages are probably in this processor's cache
    return s


cdef int take(pool* p, const shape* key, domain_t* domain, bint counted, memory** out, failure* why) noexcept nogil:
    """Hands out an idle slot of the shape: a warm one of the domain, otherwise a cold one of any domain. *out == NULL:
    the pool has neither. counted: a request, not warm(), asks for it."""
    # The bucket is computed before the lock is taken, so that the lock is held for a shorter time.
    cdef group** bucket = bucket_of(p, BY_BOTH, key, domain)
    cdef group* g
    cdef slot* s
    cdef bint cold
    cdef int code = 0
    out[0] = NULL
    lock_pool(p)
    g = find_group(bucket, BY_BOTH, key, domain)
    s = warm_slot_of(g)
    cold = s == NULL
    if cold and p.n_cold:
        s = top_of(find_group(bucket_of(p, BY_SHAPE, key, NULL), BY_SHAPE, key, NULL))
        if s != NULL and g == NULL:
            g = need_group(p, BY_BOTH, key, domain)
            if g == NULL:
                code = fail(why, E_NO_MEMORY, "calloc", sizeof(group))
                s = NULL
    if s != NULL:
        move_slot(s, LIVE)
        if cold:
            change_group(s, g)
        elif counted:
            s.counts.hits_warm += 1
            count_guest(s, True)
    unlock_pool(p)
    if s == NULL:
        return code
    if cold:
        code = warm_up(s, pages.coarse_ns(), why)
        if code and s.pages.committed == 0 and s.pages.initial:
            become_cold(s)
            return code
        if code:
            drop(s)         # the OS may grant the pages of a new slot where it refuses the pages of this one
            return 0
        if counted:
            lock_pool(p)
            s.counts.hits_cold += 1
            count_guest(s, True)
            unlock_pool(p)
    elif s.unfilled and s.pages.initial and pages.prefault(s.original.base, s.pages.initial):
        drop(s)
        return 0
    s.unfilled = False
    restore_original(s)
    out[0] = s.m
    return 0


cdef void change_group(slot* s, group* g) noexcept nogil:
    """The lock is held. A slot without pages joins the group of the next guest's domain."""
    if s.group != g:
        s.changed_domain = s.changed_domain or s.group.domain != g.domain
        g.members += 1          # first, because leave_group() may remove groups without members
        keep_counts(s)
        leave_group(s)
        s.group = g


cdef inline void restore_original(slot* s) noexcept nogil:
    """Restores the members of the memory's struct that a guest or a creator above may have changed. No other thread
    uses the memory, so plain stores are enough."""
    cdef memory* m = s.m
    image_begin_use(m, <size_t>s.original.size)
    m.pre_guard = s.original.pre_guard
    m.guard = s.original.guard
    store_size(&m.maximum, s.original.maximum)
    store_size(&m.covered, s.original.covered)
    m.is_shared = s.original.is_shared
    m.has_moved = s.original.has_moved
    m.huge_pages = s.original.huge_pages
    store_size(&m.growths, 0)
    store_release(&m.size, s.original.size)
    store_release(&m.refs, 1)


# -- room for a new slot ------------------------------------------------------------------------------------

cdef enum:
    FITS = 0                # the pool has room for one more slot
    NOT_NOW = 1             # the pool would have room if it dropped idle slots
    FULL = 2                # the pool would not have room even then


cdef int room_for(pool* p, size_t reserved, size_t mappings, int* cause) noexcept nogil:
    """The lock is held."""
    cdef size_t bound = <size_t>load(&process_reserved_bound), total = <size_t>load(&process_reserved)
    if p.n_slots >= p.most_slots or p.mappings + mappings > p.most_mappings:
        cause[0] = EVICTED_SLOTS
        return NOT_NOW if p.warm.n or p.n_cold else FULL
    if reserved > beyond(p.reserved_bound, p.reserved):
        cause[0] = EVICTED_RESERVED
        return NOT_NOW if reserved <= beyond(p.reserved_bound, p.reserved - p.idle_reserved) else FULL
    if reserved > beyond(bound, total):
        cause[0] = EVICTED_PROCESS
        return NOT_NOW if reserved <= bound else FULL
    return FITS


cdef int make_room(pool* p, const shape* key, size_t reserved, size_t mappings, failure* why) noexcept nogil:
    """Drops idle slots until one more fits. TAKE_AGAIN: one of them had this shape, and has become cold instead."""
    cdef slot* s
    cdef bint again = False
    cdef int room, cause = 0
    while True:
        lock_pool(p)
        room = room_for(p, reserved, mappings, &cause)
        s = NULL
        if room == NOT_NOW and cause != EVICTED_PROCESS:
            s = next_to_drop(p)
            if s != NULL:
                again = load(&s.state) == WARM and cause == EVICTED_SLOTS and same_shape(&s.group.shape, key)
                evict(s, COOLING if again else DROPPING, cause)
        if room != FITS and s == NULL:
            fail_full(p, cause, key.minimum, reserved, why)
        unlock_pool(p)
        if room == FITS:
            return 0
        if s != NULL:
            finish_eviction(s)
            if again:
                return TAKE_AGAIN
        elif (room == FULL or cause != EVICTED_PROCESS
                or held_by_all(RELIEF_SPACE, NULL) < excess_reserved(reserved)
                or evict_oldest(RELIEF_SPACE, NULL, EVICTED_PROCESS) == 0):
            return E_EXHAUSTED


cdef void fail_full(pool* p, int cause, size_t size, size_t reserved, failure* why) noexcept nogil:
    """Describes why the pool has no room. The lock is held."""
    fail(why, E_EXHAUSTED, "new_memory", size if cause == EVICTED_SLOTS else reserved, p.most_slots, p.most_slots)
    if cause == EVICTED_RESERVED:
        why.limit = p.reserved_bound
        snprintf(why.detail, sizeof(why.detail), "the memories of the pool reserve %zu of max_reserved=%zu bytes",
                 p.reserved, p.reserved_bound)
    elif cause == EVICTED_PROCESS:
        why.limit = <size_t>load(&process_reserved_bound)
        snprintf(why.detail, sizeof(why.detail), "the memories of all pools reserve %zu of the %zu bytes that"
                 " set_pool_limits() allows", <size_t>load(&process_reserved), why.limit)
    elif p.n_slots < p.most_slots:
        why.limit = p.most_mappings
        snprintf(why.detail, sizeof(why.detail), "the %zu slots of the pool take %zu of %zu mappings",
                 p.n_slots, p.mappings, p.most_mappings)


cdef size_t least_reserved(const memory_spec* spec) noexcept nogil:
    """The least bytes that a memory reserves. Upstream may choose more, which is known once the memory exists."""
    cdef layout found
    cdef size_t reservation = 0 if spec.reservation == UNCHOSEN else spec.reservation
    if lay_out(spec.minimum, reservation, spec.guard, pages.capabilities().page_size, &found):
        return 0            # upstream refuses the request, with an error message
    return found.total


cdef bint make_upstream_room(pool* p) noexcept nogil:
    """Upstream has refused a memory, because idle slots of this pool may fill a pool below. True: an idle slot was
    dropped, so the caller asks again."""
    lock_pool(p)
    cdef slot* s = next_to_drop(p)
    if s != NULL:
        evict(s, DROPPING, EVICTED_REFUSED)
    unlock_pool(p)
    if s != NULL:
        finish_eviction(s)
    return s != NULL


cdef int wait_a_little(failure* why) noexcept nogil:
    """Until a slot may have been given back. In a thread of Python, Ctrl-C ends the wait."""
    if python_is_ending():
        return fail(why, E_EXHAUSTED, "new_memory", why.size, why.used, why.limit)
    if PyGILState_GetThisThreadState() == NULL:
        pages.yield_processor()
        return 0
    with gil:
        try:
            PyErr_CheckSignals()        # a signal that came before the sleep does not end it
            _sleep(0.0005)
            return 0
        except BaseException as error:
            return fail_interrupted(why, error)


# -- a new slot ---------------------------------------------------------------------------------------------

cdef void init_slot(pool* p, slot* s, memory* m, const memory_spec* spec) noexcept nogil:
    s.pool = p
    s.m = m
    s.original = original_memory(
        base=m.base, size=load(&m.size), capacity=m.capacity, maximum=m.maximum, pre_guard=m.pre_guard, guard=m.guard,
        covered=m.covered, is_shared=m.is_shared, has_moved=m.has_moved, huge_pages=m.huge_pages,
        growth_is_watched=m.growth_is_watched)
    s.pages.initial = s.pages.committed = m.accessible
    s.reserved = m.pre_guard + m.capacity + m.guard
    s.image = spec.image if spec.image != NULL else image_of(m)     # a pool below may have an image of its own
    s.mappings = mappings_of(s)
    s.since = s.emptied = s.grown = pages.coarse_ns()
    s.head.keep = slot_keep
    s.head.dropped = slot_dropped
    reset_start(&s.policy)


cdef int add_slot(pool* p, slot* s, const shape* key, domain_t* domain, bint counted, failure* why) noexcept nogil:
    """Adds a new slot to the pool. Upstream may have reserved more than the request asks for, and may have used this
    pool meanwhile, so the room may be gone."""
    cdef int code = 0, cause = 0, i
    cdef group* g = NULL
    while code == 0 or code == TAKE_AGAIN:
        lock_pool(p)
        if room_for(p, s.reserved, s.mappings, &cause) == FITS and claim_space(s.reserved):
            g = need_group(p, BY_BOTH, key, domain)
            if g != NULL:
                break
            add(&process_reserved, -<long long>s.reserved)
            unlock_pool(p)
            return fail(why, E_NO_MEMORY, "calloc", sizeof(group))
        unlock_pool(p)
        code = make_room(p, key, s.reserved, s.mappings, why)
    if g == NULL:
        return code
    s.group = g
    g.members += 1
    if counted:
        for i in range(GROUPINGS):
            totals_of(s, i).counts.misses += 1
        count_guest(s, True)
    p.n_slots += 1
    p.reserved += s.reserved
    p.mappings += s.mappings
    join_budgets(p, s)
    add(&p.refs, 1)
    list_add_first(&p.slots, &s.in_pool, s)
    unlock_pool(p)
    image_retain(s.image)
    if s.image != NULL:
        add(&s.image.slots, 1)
    memory_add_hook(s.m, &s.head)
    return 0


cdef void count_fallback(pool* p) noexcept nogil:
    lock_pool(p)
    p.fallbacks += 1
    unlock_pool(p)


cdef bint is_slot_of(pool* p, memory* m) noexcept nogil:
    return m.hooks != NULL and m.hooks.keep == slot_keep and (<slot*>m.hooks).pool == p


# -- a slot is given back: the hooks of its memory ----------------------------------------------------------

cdef inline bint is_in_place(const slot* s) noexcept nogil:
    """False: the memory has moved, and has another shape than the slot."""
    return s.m.base == s.original.base and s.m.capacity == s.original.capacity


cdef bint slot_keep(memory_hook* head, memory* m) noexcept nogil:
    """The last reference on the memory is gone."""
    cdef slot* s = <slot*>head
    cdef pool* p = s.pool
    cdef slot* out = NULL
    cdef long long now, start = 0
    cdef int how = -1, cause = 0
    cdef size_t resets, took = 0
    if load(&s.state) == DROPPING:
        return return_to_upstream(s)
    s.zeroed = 0
    move_slot(s, RESETTING)
    now = pages.coarse_ns()
    if is_in_place(s):
        resets = s.counts.resets[0] + s.counts.resets[1] + s.counts.resets[2]
        if resets & (TIMED - 1) == 0:
            start = pages.clock_ns()
        how = reset(s, m, now)
        if start:       # the time counts for all resets since the last timed one
            took = <size_t>(pages.clock_ns() - start) * (TIMED if resets else 1)
    if how >= 0:
        m.hooks = head
        m.growth_is_watched = s.original.growth_is_watched
        store_release(&m.owner, OWNER_CREATOR)
    lock_pool(p)
    s.counts.zeroed += s.zeroed
    s.counts.reset_ns += took
    cdef bint kept = how >= 0
    if kept:
        s.counts.resets[how] += 1
        s.thread = this_thread()
        s.since = now
        kept = move_slot(s, COLD if s.pages.committed < s.pages.initial else WARM)
    elif is_in_place(s):
        p.rejected += 1
    if kept:
        out = next_to_cool(p, now, &cause)
        if out != NULL:
            evict(out, COOLING, cause)
    unlock_pool(p)
    if not kept:
        return return_to_upstream(s)
    if out != NULL:
        cool_until_bounds_hold(p, out, cause, now)
    if load(&process_held) > load(&process_held_bound):
        shed_resident()
    return True


cdef bint return_to_upstream(slot* s) noexcept nogil:
    """The memory belongs to upstream again, and may be freed before the slot is: nothing reads the memory of a slot
    that is DROPPING."""
    if is_in_place(s) and s.head.next != NULL:
        # A pool below does not know of the hidden pages, so they are given back. The pool below keeps the other pages
        # for the domain that it made the memory for. So if the slot has served other domains, all pages are given back.
        # If the OS refuses, the pages stay, and the pool below resets them, as it does after every guest.
        if not (s.changed_domain and cool_pages(s)) and s.pages.committed > s.m.accessible:
            pages.decommit(s.m.base + s.m.accessible, s.pages.committed - s.m.accessible)
    start_drop(s)
    return False


cdef void slot_dropped(memory_hook* head) noexcept nogil:
    """The memory is gone."""
    cdef slot* s = <slot*>head
    cdef pool* p = s.pool
    lock_pool(p)
    list_remove(&s.in_pool)
    p.n_slots -= 1
    p.reserved -= s.reserved
    p.mappings -= s.mappings
    leave_budgets(p, s)
    keep_counts(s)
    leave_group(s)
    add(&process_reserved, -<long long>s.reserved)
    unlock_pool(p)
    if s.image != NULL:
        add(&s.image.slots, -1)
    image_release(s.image)
    free(s)
    release_pool(p)
