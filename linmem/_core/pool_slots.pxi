# Groups of slots, and the states of a slot. Part of pool.pyx.
#
# The pool's lock is held in all functions below the first two.

cdef extern from "linmem/_core/checked_build.h":
    void must "linmem_must"(bint holds) noexcept nogil


cdef inline void lock_pool(pool* p) noexcept nogil:
    lock(&p.lock.held)


cdef inline void unlock_pool(pool* p) noexcept nogil:
    unlock(&p.lock.held)


# -- groups -------------------------------------------------------------------------------------------------

cdef inline size_t hash_of(const shape* key) noexcept nogil:
    cdef size_t h = key.minimum * 31 + key.maximum * 17 + key.reservation + key.guard * 5 + (<size_t>key.image >> 4)
    return h ^ (h >> 16) ^ (h >> 32)


cdef inline bint same_shape(const shape* a, const shape* b) noexcept nogil:
    return (a.minimum == b.minimum and a.maximum == b.maximum and a.reservation == b.reservation
            and a.guard == b.guard and a.is_64 == b.is_64 and a.is_shared == b.is_shared and a.image == b.image)


cdef inline group** bucket_of(pool* p, int grouping, const shape* key, const domain_t* domain) noexcept nogil:
    cdef size_t h = <size_t>domain
    h = (h >> 5) ^ (h >> 13)
    if grouping != BY_DOMAIN:
        h ^= hash_of(key)
    return &p.tables[grouping].buckets[h & (BUCKETS - 1)]


cdef inline group* find_group(group** bucket, int grouping, const shape* key, const domain_t* domain) noexcept nogil:
    """bucket: bucket_of() the other arguments. domain: NULL for BY_SHAPE. key: not used for BY_DOMAIN."""
    cdef group* g = bucket[0]
    while g != NULL and not (g.domain == domain and (grouping == BY_DOMAIN or same_shape(&g.shape, key))):
        g = g.next
    return g


cdef group* need_group(pool* p, int grouping, const shape* key, domain_t* domain) noexcept nogil:
    """Returns the group, and makes it if necessary. NULL: no memory for it."""
    cdef group** bucket = bucket_of(p, grouping, key, domain)
    cdef group* g = find_group(bucket, grouping, key, domain)
    cdef int parent
    if g != NULL:
        return g
    g = <group*>calloc(1, sizeof(group))
    if g == NULL:
        return NULL
    g.shape = key[0]
    g.domain = domain
    list_init(&g.stack)
    if grouping == BY_BOTH:
        g.of[BY_SHAPE] = need_group(p, BY_SHAPE, key, NULL)
        g.of[BY_DOMAIN] = need_group(p, BY_DOMAIN, key, domain)
        if g.of[BY_SHAPE] == NULL or g.of[BY_DOMAIN] == NULL:
            free(g)
            return NULL
        for parent in range(BY_SHAPE, GROUPINGS):
            p.tables[parent].n_empty -= g.of[parent].members == 0
            g.of[parent].members += 1
    domain_retain(domain)
    g.next = bucket[0]
    bucket[0] = g
    list_add_first(&p.tables[grouping].groups, &g.in_table, g)
    p.tables[grouping].n += 1
    p.tables[grouping].n_empty += grouping != BY_BOTH
    return g


cdef inline group* first_group(pool* p, int grouping) noexcept nogil:
    return <group*>p.tables[grouping].groups.next.owner


cdef inline group* next_group(const group* g) noexcept nogil:
    return <group*>g.in_table.next.owner


cdef void remove_group(pool* p, int grouping, group* g) noexcept nogil:
    cdef group** bucket = bucket_of(p, grouping, &g.shape, g.domain)
    while bucket[0] != g:
        bucket = &bucket[0].next
    bucket[0] = g.next
    list_remove(&g.in_table)
    p.tables[grouping].n -= 1
    domain_release(g.domain)
    free(g)


cdef void remove_groups(pool* p, int grouping, bint only_empty) noexcept nogil:
    cdef group* g = first_group(p, grouping)
    cdef group* after
    while g != NULL:
        after = next_group(g)
        if g.members == 0 or not only_empty:
            remove_group(p, grouping, g)
        g = after
    p.tables[grouping].n_empty = 0


cdef void leave_group(slot* s) noexcept nogil:
    cdef group* g = s.group
    cdef int i
    s.group = NULL
    g.members -= 1
    if g.members:
        return
    for i in range(BY_SHAPE, GROUPINGS):
        g.of[i].members -= 1
        s.pool.tables[i].n_empty += g.of[i].members == 0
        if s.pool.tables[i].n_empty > EMPTY_GROUPS:
            remove_groups(s.pool, i, True)
    remove_group(s.pool, BY_BOTH, g)


# -- counts -------------------------------------------------------------------------------------------------

cdef void add_counts(counts* sums, const counts* more) noexcept nogil:
    cdef size_t i
    for i in range(sizeof(counts) // sizeof(size_t)):
        (<size_t*>sums)[i] += (<const size_t*>more)[i]


cdef inline totals* totals_of(slot* s, int i) noexcept nogil:
    """Returns the totals of the pool, of the slot's shape or of its domain."""
    return &s.pool.own if i == 0 else &s.group.of[i].own


cdef void keep_counts(slot* s) noexcept nogil:
    """Adds the counts of a slot that leaves its group to the totals."""
    cdef int i
    for i in range(GROUPINGS):
        add_counts(&totals_of(s, i).counts, &s.counts)
    memset(&s.counts, 0, sizeof(counts))


cdef inline void count_eviction(slot* s, int cause) noexcept nogil:
    cdef int i
    for i in range(GROUPINGS):
        totals_of(s, i).counts.evictions[cause] += 1


cdef inline void count_guest(slot* s, bint has_guest) noexcept nogil:
    cdef totals* t
    cdef int i
    s.has_guest = has_guest
    for i in range(GROUPINGS):
        t = totals_of(s, i)
        if has_guest:
            t.live += 1
            if t.live > t.peak_live:
                t.peak_live = t.live
        else:
            t.live -= 1


cdef inline void count_warm(warm_totals* sums, const slot* s, size_t sign) noexcept nogil:
    """sign: 1, or <size_t>-1, with which the sums wrap around."""
    sums.n += sign
    sums.resident += sign * s.resident
    sums.tables += sign * s.tables
    sums.initial += sign * s.pages.initial
    sums.committed += sign * s.pages.committed


cdef inline void count_idle(slot* s, int state, size_t sign) noexcept nogil:
    cdef pool* p = s.pool
    cdef warm_totals* of_domain = &s.group.of[BY_DOMAIN].warm
    p.idle_reserved += sign * s.reserved
    if state == COLD:
        p.n_cold += sign
        return
    if of_domain.n == (sign == <size_t>-1):       # the domain's first warm slot, or the last one
        p.warm_domains += sign
    count_warm(of_domain, s, sign)
    count_warm(&p.warm, s, sign)


# -- the transition of a slot's state -----------------------------------------------------------------------

cdef inline slot* oldest(link* by_age) noexcept nogil:
    return <slot*>by_age.previous.owner


cdef inline slot* newer(const slot* s) noexcept nogil:
    return <slot*>s.by_age.previous.owner


cdef inline slot* top_of(group* g) noexcept nogil:
    return NULL if g == NULL else <slot*>g.stack.next.owner


cdef inline void check_extent(const extent* e, int state) noexcept nogil:
    if state == WARM:
        must(e.initial <= e.committed and e.hidden <= e.committed - e.initial)
    elif state == COLD:
        must(e.committed == 0 and e.hidden == 0)


cdef inline bint may_become(int state, int new_state) noexcept nogil:
    if new_state == LIVE:
        return state == WARM or state == COLD
    if new_state == COLD:
        return state == LIVE or state == RESETTING or state == COOLING
    if new_state == DROPPING:
        return state != DROPPING
    return state == (LIVE if new_state == RESETTING else RESETTING if new_state == WARM else WARM)


cdef size_t mappings_of(const slot* s) noexcept nogil:
    """The most mappings that the slot takes: pre-guard, accessible bytes, the rest of the reservation."""
    if s.pages.committed == 0:
        return 3 if s.original.huge_pages else 1
    return (3 + s.original.huge_pages                           # the guard has no huge pages
            + (2 if image_shares_pages(s.image) else 0)         # the image's pages, and the pages after them
            + (s.pages.committed > s.pages.initial))            # hidden bytes


cdef inline bint move_slot(slot* s, int new_state) noexcept nogil:
    """The one function that changes a slot's state, with all lists and counts that follow from it. The lock is not
    needed for RESETTING, which changes no list and no count. False: the pool is closed, or the slot's image is
    forgotten. Then the slot does not become idle, and the caller drops it."""
    cdef pool* p = s.pool
    cdef int state = <int>load(&s.state)
    cdef bint was_idle = state == WARM or state == COLD, idle = new_state == WARM or new_state == COLD
    cdef size_t mappings
    must(may_become(state, new_state))
    if new_state == RESETTING:
        store_release(&s.state, new_state)
        return True
    if idle:
        if p.closed:
            return False
        if s.group.shape.image != NULL and load(&s.group.shape.image.forgotten):
            count_eviction(s, EVICTED_IMAGE)
            return False
    if s.has_guest:
        count_guest(s, False)
    if was_idle:
        list_remove(&s.in_stack)
        list_remove(&s.by_age)
        count_idle(s, state, <size_t>-1)
    if idle:
        check_extent(&s.pages, new_state)
        mappings = mappings_of(s)
        if mappings != s.mappings:
            p.mappings += mappings - s.mappings
            s.mappings = mappings
        list_add_first(&s.group.stack if new_state == WARM else &s.group.of[BY_SHAPE].stack, &s.in_stack, s)
        list_add_first(&p.warm_by_age if new_state == WARM else &p.cold_by_age, &s.by_age, s)
        count_idle(s, new_state, 1)
    if idle or new_state == LIVE or new_state == DROPPING:
        report_held(p)
    store_release(&s.state, new_state)
    return True
