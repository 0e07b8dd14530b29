# All pools of the process, and the bounds that they share. Part of pool.pyx.
#
# Locks are taken in reverse order of registration: a pool's lock before pools_lock, because pools_lock is registered
# before the first pool.

cdef fork_lock pools_lock           # protects the list `pools`
cdef link pools                     # of all pools, the newest first
list_init(&pools)
cdef atomic_i64 start_lock          # held by start_pools() and need_costs(), which do their work once
cdef bint pools_started = False
cdef atomic_i64 process_held        # >= the bytes that idle slots keep, page tables included; see report_step
cdef atomic_i64 bounds_lock         # held while the bounds are set or read together. Its holder waits for nothing
cdef atomic_i64 process_held_bound
cdef atomic_i64 process_reserved    # bytes of address space of all slots
cdef atomic_i64 process_reserved_bound
cdef atomic_i64 report_step         # bytes: a pool's part of process_held may exceed what the pool keeps by this much

cdef size_t NO_BOUND = SIZE_MAX >> 1


cdef inline size_t quarter_of_memory() noexcept nogil:
    cdef size_t memory = pages.capabilities().memory
    return memory // 4 if memory else SIZE_MAX


cdef void set_bounds(size_t held, size_t reserved) noexcept nogil:
    lock(&bounds_lock)
    store(&process_held_bound, <long long>min(held, NO_BOUND))
    store(&process_reserved_bound, <long long>min(reserved, NO_BOUND))
    store(&report_step, <long long>min(held >> 10, <size_t>1 << 20))
    unlock(&bounds_lock)


cdef void start_pools() noexcept nogil:
    """Once, before the first pool. Not at the import of this module: the layers below may not be ready then."""
    global pools_started
    lock(&start_lock)
    if not pools_started:
        register_fork_lock(&pools_lock)
        set_bounds(quarter_of_memory(), SIZE_MAX)
        set_relief(relieve_by_eviction)
        set_forgotten_callback(drop_slots_of_image)
        call_in_each_child(drop_lost_slots)
        pools_started = True
    unlock(&start_lock)


cdef pool* new_pool() noexcept nogil:
    """A pool without options, with one reference. NULL: no memory for it."""
    cdef char* block = <char*>calloc(1, sizeof(pool) + CACHE_LINE)
    cdef int i
    if block == NULL:
        return NULL
    # Places the pool so that its lock starts a cache line. The block has one spare cache line for this.
    cdef pool* p = <pool*>(block + ((0 - <size_t>&(<pool*>block).lock) & (CACHE_LINE - 1)))
    p.block = block
    p.refs = 1
    for i in range(GROUPINGS):
        list_init(&p.tables[i].groups)
    list_init(&p.warm_by_age)
    list_init(&p.cold_by_age)
    list_init(&p.slots)
    return p


cdef void list_pool(pool* p) noexcept nogil:
    start_pools()
    need_costs()
    register_fork_lock(&p.lock)
    lock(&pools_lock.held)
    list_add_first(&pools, &p.in_pools, p)
    unlock(&pools_lock.held)


cdef void release_pool(pool* p) noexcept nogil:
    cdef int i
    if add(&p.refs, -1):
        return
    lock(&pools_lock.held)
    list_remove(&p.in_pools)
    unlock(&pools_lock.held)
    add(&process_held, -<long long>p.reported)
    unregister_fork_lock(&p.lock)
    for i in range(GROUPINGS):
        remove_groups(p, i, False)
    free(p.block)


cdef pool* pool_after(pool* p) noexcept nogil:
    """Returns the next one of all pools with a reference, and releases the reference on `p`. NULL for `p`: returns the
    first pool. Returns NULL at the end."""
    cdef link* node = &pools if p == NULL else &p.in_pools
    cdef pool* after
    cdef long long refs
    lock(&pools_lock.held)
    while True:
        node = node.next
        after = <pool*>node.owner
        refs = 0 if after == NULL else load(&after.refs)
        while refs > 0 and not compare_exchange(&after.refs, refs, refs + 1):
            refs = load(&after.refs)
        if after == NULL or refs > 0:       # a pool without references is about to leave the list
            break
    unlock(&pools_lock.held)
    if p != NULL:
        release_pool(p)
    return after


cdef inline void report_held(pool* p) noexcept nogil:
    """The pool's lock is held. Adds the bytes that the pool's idle slots keep to process_held, in steps, so that
    process_held, which all threads share, is seldom written."""
    cdef size_t held = p.warm.resident + p.warm.tables
    cdef size_t step = <size_t>load(&report_step)
    cdef size_t to_report
    if held > p.reported or p.reported - held > step:
        to_report = held + (step >> 1)
        add(&process_held, <long long>(to_report - p.reported))
        p.reported = to_report


cdef bint claim_space(size_t reserved) noexcept nogil:
    """False: the bound of all pools does not allow so much."""
    cdef long long before = load(&process_reserved)
    while before + <long long>reserved <= load(&process_reserved_bound):
        if compare_exchange(&process_reserved, before, before + <long long>reserved):
            return True
        before = load(&process_reserved)
    return False


cdef size_t excess_reserved(size_t reserved) noexcept nogil:
    """By how many bytes `reserved` more would exceed the bound of all pools."""
    cdef size_t bound = <size_t>load(&process_reserved_bound), total = <size_t>load(&process_reserved) + reserved
    return total - bound if total > bound else 0


def set_pool_limits(max_resident=None, max_reserved=None):
    """Bound the bytes that the pools of this process hold together, in addition to the bounds of each pool.

    Idle slots give everything above a bound back before the call returns.

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
        If an argument is not a size; then no bound has changed.
    """
    cdef size_t held = quarter_of_memory(), reserved = SIZE_MAX
    check_optional_size(max_resident, "max_resident", &held)
    check_optional_size(max_reserved, "max_reserved", &reserved)
    with nogil:
        start_pools()
        set_bounds(held, reserved)
        shed_excess()


def pool_totals():
    """The bytes that all pools hold together, and the bounds."""
    cdef long long held, held_bound, reserved, reserved_bound
    start_pools()
    lock(&bounds_lock)
    held, held_bound = load(&process_held), load(&process_held_bound)
    reserved, reserved_bound = load(&process_reserved), load(&process_reserved_bound)
    unlock(&bounds_lock)
    found = {"resident": held, "resident_bound": held_bound, "reserved": reserved, "reserved_bound": reserved_bound}
    return {name: None if value == NO_BOUND else value for name, value in found.items()}
