# Locks that nogil code takes, waits that Ctrl-C can interrupt, and what happens at a fork; a part of memory.pyx.

# A lock holds the generation of the process whose thread took it. A forked child does not have the other threads of its
# parent, so it takes over a lock that one of them held.
cdef long long generation = 1

# The generation, reduced to the bits that Memory.users has for it: 1 .. GENERATION_TAGS. A tag repeats only after
# GENERATION_TAGS nested forks, and no call takes that long.
cdef enum:
    GENERATION_TAGS = 8191
cdef long long generation_tag = 1

cdef enum:
    SPINS = 64                  # how often a thread reads a lock before it yields the processor
    YIELDS = 64                 # how often a thread yields the processor before it sleeps
    FIRST_SLEEP = 50000         # nanoseconds
    LONGEST_SLEEP = 1000000     # nanoseconds
    SIGNALS_EACH = 50000000     # nanoseconds between two checks for Ctrl-C


cdef void wait_a_moment(int looks) noexcept nogil:
    """Call this between two reads of a value that another thread will change. looks: the number of reads so far."""
    if looks < SPINS:           # most locks are held for less time than a system call takes
        cpu_relax()
    elif looks < SPINS + YIELDS:
        pages.yield_processor()
    else:
        pages.sleep_ns(FIRST_SLEEP if looks < SPINS + 2 * YIELDS else LONGEST_SLEEP)


cdef int interrupted(failure* why) noexcept with gil:
    """Runs the handlers of pending signals, in the main thread only. E_PYTHON if one raised (Ctrl-C)."""
    try:
        PyErr_CheckSignals()
        return 0
    except BaseException as error:
        return fail_interrupted(why, error)


cdef int wait_for_signals(int* looks, long long* since, failure* why) noexcept nogil:
    """As wait_a_moment(), for waits that may be long; without the GIL. In a thread that Python knows, Ctrl-C ends the
    wait with E_PYTHON. looks and since are 0 at the start."""
    cdef long long now
    wait_a_moment(looks[0])
    looks[0] += 1
    if looks[0] < SPINS + YIELDS or PyGILState_GetThisThreadState() == NULL or python_is_finalizing():
        return 0
    looks[0] = SPINS + 2 * YIELDS if looks[0] > SPINS + 2 * YIELDS else looks[0]
    now = pages.clock_ns()
    if now - since[0] < SIGNALS_EACH:
        return 0
    since[0] = now
    return interrupted(why)


cdef void lock(atomic_i64* lock) noexcept nogil:
    """The caller must not hold the GIL, because the holder of a memory's lock may be waiting for the GIL."""
    cdef int looks = 0
    if compare_exchange(lock, 0, generation):
        return
    while not try_lock(lock):
        wait_a_moment(looks)
        looks += 1


cdef bint try_lock(atomic_i64* lock) noexcept nogil:
    cdef long long holder = load(lock)      # a read does not take the cache line away from the holder
    while holder != generation:
        if compare_exchange(lock, holder, generation):
            return True
        holder = load(lock)
    return False


cdef void unlock(atomic_i64* lock) noexcept nogil:
    store_release(lock, 0)


# -- a growth that runs Python code: if that code uses the memory, it must not wait for the lock of its own thread

cdef extern from *:
    """
    static LINMEM_OF_THREAD void *linmem_own_growths;
    static void **linmem_own_growths_of_thread(void) { return &linmem_own_growths; }
    """
    void** own_growths "linmem_own_growths_of_thread"() noexcept nogil


cdef void begin_own_growth(own_growth* growth, memory* m) noexcept nogil:
    """The lock of `m` is held, and Python code will run until end_own_growth(). Such growths nest."""
    growth.m = m
    growth.outer = <own_growth*>own_growths()[0]
    own_growths()[0] = growth


cdef void end_own_growth(own_growth* growth) noexcept nogil:
    own_growths()[0] = growth.outer


cdef bint is_own_growth(memory* m) noexcept nogil:
    cdef own_growth* own = <own_growth*>own_growths()[0]
    while own != NULL and own.m != m:
        own = own.outer
    return own != NULL


# -- a memory's lock

cdef int lock_memory(memory* m, failure* why) noexcept nogil:
    """As lock(). The holder may be in grow_to() of a memory in Python for long, so Ctrl-C ends the wait. E_BROKEN if a
    memory in Python is lost. After a 0, unlock(&m.lock) must follow."""
    cdef long long since = 0
    cdef int looks = 0, code = 0
    if not compare_exchange(&m.lock, 0, generation):
        if is_own_growth(m):
            return fail(why, E_OWN_GROWTH, "wait", 0)
        while code == 0 and not try_lock(&m.lock):
            code = wait_for_signals(&looks, &since, why)
    if code == 0 and m.broken:
        unlock(&m.lock)
        code = fail(why, E_BROKEN, "wait", 0)
    return code


# -- fork
#
# The C library calls before_fork() and the after_fork functions around every fork(), also around a fork by code outside
# of Python. The C library does not call them around clone(2); not even malloc() works in such a child if another thread
# was in malloc(). The thread that forks may hold the GIL.

cdef fork_lock* fork_locks = NULL
cdef atomic_i64 fork_locks_lock
cdef fork_lock moving_lock      # a memory is being moved to another address
cdef fork_lock orphans_lock     # the ranges that the OS refused to take back
cdef fork_lock allocator_lock   # allocator_now()
cdef fork_lock live_lock        # live_memories and the table of ranges; its holder waits for nothing
cdef link live_memories         # all memories. A forked child repairs each of them
list_init(&live_memories)


cdef void register_fork_lock(fork_lock* to_add) noexcept nogil:
    """From now on, fork() takes this lock. Locks are taken in reverse order of registration."""
    global fork_locks
    lock(&fork_locks_lock)
    to_add.next = fork_locks
    to_add.link = &fork_locks
    if to_add.next != NULL:
        to_add.next.link = &to_add.next
    fork_locks = to_add
    unlock(&fork_locks_lock)


cdef void unregister_fork_lock(fork_lock* to_remove) noexcept nogil:
    lock(&fork_locks_lock)
    to_remove.link[0] = to_remove.next
    if to_remove.next != NULL:
        to_remove.next.link = to_remove.link
    unlock(&fork_locks_lock)


cdef void add_live_memory(memory* m) noexcept nogil:
    """From now on a forked child repairs the memory, and find() and live() know it. The last step of making one."""
    lock(&live_lock.held)
    list_add_first(&live_memories, &m.live, m)
    if m.range.start != NULL:
        register_range(m)
    unlock(&live_lock.held)


cdef void remove_live_memory(memory* m) noexcept nogil:
    """The caller gives the addresses back afterwards."""
    lock(&live_lock.held)
    list_remove(&m.live)
    if m.range.start != NULL:
        unregister_range(m)
    unlock(&live_lock.held)


cdef memory* next_live_memory(memory* m) noexcept nogil:
    """The memory that follows `m` in the list of all memories; NULL: the first, and the end. Only in a forked child,
    before any other code of the child runs: every memory still has its hooks then."""
    return <memory*>(live_memories.next if m == NULL else m.live.next).owner


cdef enum:
    CHILD_CALLS = 2

cdef void (*child_calls[CHILD_CALLS])() noexcept nogil
cdef int n_child_calls = 0


cdef void call_in_each_child(void (*call)() noexcept nogil) noexcept nogil:
    """From now on `call` runs in each forked child, after the memories have been repaired. The table has room
    for CHILD_CALLS callers, each once. Do not call this while modules are imported."""
    global n_child_calls
    lock(&fork_locks_lock)
    child_calls[n_child_calls] = call
    n_child_calls += 1
    unlock(&fork_locks_lock)


cdef void before_fork() noexcept nogil:
    cdef fork_lock* each
    lock(&fork_locks_lock)
    each = fork_locks
    while each != NULL:
        lock(&each.held)
        each = each.next


cdef void after_fork() noexcept nogil:
    cdef fork_lock* each = fork_locks
    while each != NULL:
        unlock(&each.held)
        each = each.next
    unlock(&fork_locks_lock)


cdef void after_fork_in_child() noexcept nogil:
    global generation, generation_tag
    cdef own_growth* own = <own_growth*>own_growths()[0]
    cdef memory* m
    cdef int i
    generation += 1
    generation_tag = 1 + (generation - 1) % GENERATION_TAGS
    while own != NULL:      # the thread that forked is in these growths, and goes on with them in the child
        store(&own.m.lock, generation)
        if load(&own.m.pins) < 0:
            store(&own.m.pins, -generation)
        own = own.outer
    m = next_live_memory(NULL)
    while m != NULL:        # before any other code of the child runs, also before wasm runs
        repair(m)
        m = next_live_memory(m)
    after_fork()
    m = next_live_memory(NULL)
    while m != NULL:        # only after after_fork(), because hooks take locks that after_fork() unlocks
        end_lost_growth(m)
        m = next_live_memory(m)
    for i in range(n_child_calls):
        child_calls[i]()


cdef bint was_lost(memory* m) noexcept nogil:
    """In a forked child: whether the memory's lock was taken by a thread that exists only in the parent."""
    cdef long long holder = load(&m.lock)
    return holder != 0 and holder != generation


cdef void repair(memory* m) noexcept nogil:
    """In a forked child: undoes a growth that a lost thread was in, unless the growth was complete.

    Pages between the size and `opening` may be accessible. A growth writes the size when everything else is done, so
    the size tells whether the growth was complete.
    """
    cdef size_t end
    if not was_lost(m):
        return
    if load(&m.pins) < 0:
        if m.ops.lose != NULL:
            m.ops.lose(m)
        store(&m.pins, 0)
    if m.opening:
        end = 0
        round_up(memory_size(m), host_page(), &end)
        if end < m.opening and pages.protect(m.base + end, m.opening - end, pages.ACCESS_NONE):
            pages.decommit(m.base + end, m.opening - end)
        store_size(&m.accessible, end)
        m.opening = 0


cdef void end_lost_growth(memory* m) noexcept nogil:
    """In a forked child: calls after_grow of the hooks whose before_grow a lost thread has called."""
    cdef memory_hook* hook = m.tell_from
    cdef int code = 0 if memory_size(m) >= m.growing_to else E_UNSUPPORTED
    if not was_lost(m):
        return
    if m.growing_to:
        while hook != m.tell_to:
            if hook.after_grow != NULL:
                hook.after_grow(hook, m, m.growing_from, m.growing_to, code)
            hook = hook.next
        m.growing_to = 0
    store(&m.lock, 0)


# moving_lock is taken first, because a thread that moves a memory may wait for orphans_lock and for live_lock.
# allocator_lock is taken last, because its holder takes no other lock.
register_fork_lock(&allocator_lock)
register_fork_lock(&live_lock)
register_fork_lock(&deferred_lock)
register_fork_lock(&orphans_lock)
register_fork_lock(&moving_lock)
if pages.at_fork(before_fork, after_fork, after_fork_in_child):
    raise MemoryError("no memory for what linmem does at a fork")
