# stats() and the metrics of a pool. Part of pool.pyx.

# The figures of a pool, of a shape or of a domain.
cdef struct report_row:
    shape shape
    domain_t* domain        # a reference
    image_t* image          # of the last slot counted; the same for all slots of a shape. No reference: only compared
    size_t image_bytes
    bint image_descriptor
    counts counts
    size_t live, peak_live, pinned, warm, cold
    size_t resident, tables, reserved

cdef struct report:
    size_t n[GROUPINGS]                 # the number of rows, BY_SHAPE and BY_DOMAIN; BY_BOTH is not used
    report_row* rows[GROUPINGS]
    report_row sums                     # the figures of the whole pool
    size_t fallbacks, rejected

# Names of the EVICTED_ causes; EVICTED_IDLE and EVICTED_PURGE are counted as purges.
_CAUSES = ("count", "resident", "process", "slots", "reserved", "refused", "image", "trim")


cdef void start_rows(pool* p, int grouping, report_row* rows) noexcept nogil:
    cdef group* g = first_group(p, grouping)
    cdef size_t n = 0
    while g != NULL:
        g.row = n
        rows[n].shape = g.shape
        rows[n].domain = g.domain
        domain_retain(g.domain)
        rows[n].counts = g.own.counts
        rows[n].peak_live = g.own.peak_live
        n += 1
        g = next_group(g)


cdef void count_slot(slot* s, report_row* row) noexcept nogil:
    cdef int state = <int>load(&s.state)
    add_counts(&row.counts, &s.counts)
    row.reserved += s.reserved
    row.warm += state == WARM
    row.cold += state == COLD
    row.live += s.has_guest
    row.pinned += state == LIVE and load(&s.m.refs) > 0 and load(&s.m.owner) == OWNER_LEFT
    if state == WARM:
        row.resident += s.resident
        row.tables += s.tables
    if s.image != NULL:
        row.image = s.image
        row.image_bytes = s.image.high - s.image.low
        row.image_descriptor = s.image.content.handle != -1


cdef bint make_report(pool* p, report* out, bint by_groups) noexcept nogil:
    """by_groups: with rows for each shape and each domain, which free_report() frees. False: no memory for them."""
    cdef link* node
    cdef slot* s
    cdef int i, end = GROUPINGS if by_groups else BY_SHAPE
    cdef bint made = True
    memset(out, 0, sizeof(report))
    lock_pool(p)
    out.fallbacks, out.rejected = p.fallbacks, p.rejected
    out.sums.counts = p.own.counts
    out.sums.peak_live = p.own.peak_live
    for i in range(BY_SHAPE, end):
        out.rows[i] = <report_row*>calloc(p.tables[i].n + 1, sizeof(report_row))
        if out.rows[i] != NULL:
            out.n[i] = p.tables[i].n
            start_rows(p, i, out.rows[i])
        made = made and out.rows[i] != NULL
    node = p.slots.next
    while node.owner != NULL and made:
        s = <slot*>node.owner
        count_slot(s, &out.sums)
        for i in range(BY_SHAPE, end):
            count_slot(s, out.rows[i] + s.group.of[i].row)
        node = node.next
    unlock_pool(p)
    return made


cdef void free_report(report* made) noexcept nogil:
    cdef size_t n
    cdef int i
    for i in range(BY_SHAPE, GROUPINGS):
        for n in range(made.n[i]):
            domain_release(made.rows[i][n].domain)
        free(made.rows[i])


cdef dict resets_dict(const report_row* row):
    return {name: row.counts.resets[i] for i, name in enumerate(_RESETS[:ADAPTIVE])}


cdef dict row_dict(const report_row* row):
    return {
        "hits_warm": row.counts.hits_warm, "hits_cold": row.counts.hits_cold, "misses": row.counts.misses,
        "evictions": {name: row.counts.evictions[i] for i, name in enumerate(_CAUSES)},
        "purges": row.counts.evictions[EVICTED_IDLE] + row.counts.evictions[EVICTED_PURGE],
        "resets": resets_dict(row), "reset_ns": row.counts.reset_ns, "bytes_zeroed": row.counts.zeroed,
        "live": row.live, "peak_live": row.peak_live, "warm": row.warm, "cold": row.cold,
        "resident": row.resident, "page_tables": row.tables, "reserved": row.reserved,
    }


cdef dict shape_dict(const report_row* row):
    cdef const shape* key = &row.shape
    shown = {"minimum": key.minimum, "maximum": None if key.maximum == NO_MAXIMUM else key.maximum,
             "reservation": None if key.reservation == UNCHOSEN else key.reservation, "guard": key.guard,
             "is_64": bool(key.is_64), "is_shared": bool(key.is_shared), "image": key.image != NULL}
    return dict(row_dict(row), shape=shown, image_bytes=row.image_bytes, image_descriptors=int(row.image_descriptor))


def read_metrics(PoolingCreator pool not None):
    """The result of `linmem.metrics.read`."""
    cdef report made
    cdef report_row* shapes
    cdef size_t i, refusals
    cdef bint complete
    with nogil:
        complete = make_report(pool.pool, &made, True)
        refusals = refusals_count(pool.refusal_log)
    try:
        if not complete:
            raise MemoryError("no memory for a report")
        shapes = made.rows[BY_SHAPE]
        images = {<size_t>shapes[i].image: (shapes[i].image_bytes, shapes[i].image_descriptor)
                  for i in range(made.n[BY_SHAPE]) if shapes[i].image != NULL}
        return dict(
            row_dict(&made.sums), name=pool.name, fallbacks=made.fallbacks, rejected=made.rejected,
            refusals=refusals, slots=pool.pool.most_slots, resident_bound=pool.pool.resident_bound,
            reserved_bound=None if pool.pool.reserved_bound == SIZE_MAX else pool.pool.reserved_bound,
            images=len(images), image_bytes=sum(size for size, _ in images.values()),
            image_descriptors=sum(has_one for _, has_one in images.values()),
            shapes=[shape_dict(&shapes[i]) for i in range(made.n[BY_SHAPE])],
            domains={domain_name(made.rows[BY_DOMAIN][i].domain): row_dict(&made.rows[BY_DOMAIN][i])
                     for i in range(made.n[BY_DOMAIN])})
    finally:
        with nogil:
            free_report(&made)


def _struct_of(Memory mem not None):
    """For tests: the bytes of a memory's struct."""
    return (<const char*>mem.m)[:sizeof(memory)]
