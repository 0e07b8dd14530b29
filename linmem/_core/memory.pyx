# cython: language_level=3
"""Native memories: the mapped kind, its creator, and the Python handle on every kind."""

cimport cython
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_DECREF
from libc.stdint cimport SIZE_MAX
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memcmp, memcpy, memmove, memset, strcmp, strlen

from linmem._core.atomic cimport add, load, pause, peek, peek_address, poke, poke_address, publish, store, swap_if, word
from linmem._os cimport pages
from linmem._core.units cimport (
    E_BROKEN, E_CAPACITY, E_EXPORTED, E_IMAGE, E_MAXIMUM, E_NO_MEMORY, E_OVERFLOW, E_OWN_GROWTH, E_OWNED, E_PROTECTED,
    E_SHRINK, E_UNSUPPORTED, SMALL_RESERVATION, add_up, choose_reservation, lay_out, layout, room_to_choose, round_down,
    round_up,
)

from linmem import abc as _abc
from linmem._core.arguments import shown as _shown

cdef size_t UNCHOSEN = SIZE_MAX
cdef size_t NO_MAXIMUM = SIZE_MAX
cdef size_t WASM32_SPACE = <size_t>1 << 32

DEFAULT_GUARD = 65536


include "failures.pxi"


# -- Python objects that nogil code lets go of --------------------------------------------------

cdef extern from *:
    """
    #if PY_VERSION_HEX < 0x030d0000
    #define Py_IsFinalizing _Py_IsFinalizing
    #endif
    """
    bint is_finalizing "Py_IsFinalizing"() noexcept nogil
    int PyErr_CheckSignals() except -1
    int Py_AddPendingCall(int (*call)(void*), void* argument) noexcept nogil
    void* PyGILState_GetThisThreadState() noexcept nogil

cdef bint python_is_ending() noexcept nogil:
    return is_finalizing()


cdef struct grave:
    grave* next
    PyObject* object

cdef grave* graves = NULL
cdef fork_lock burial_lock


cdef void drop_object(PyObject* object) noexcept nogil:
    """Py_DECREF from any thread, at any time.

    A thread that Python knows is about to take the GIL again anyway. Another one (wasmtime's own)
    must not: it leaves the object to the main thread. In the interpreter's last second nothing is
    dropped: the process ends, and whoever waits for the GIL then waits forever.
    """
    global graves
    cdef grave* g
    if is_finalizing():
        return
    if PyGILState_GetThisThreadState() != NULL:
        drop_with_gil(object)
        return
    g = <grave*>malloc(sizeof(grave))
    if g == NULL:
        return
    g.object = object
    acquire(&burial_lock.held)
    g.next = graves
    graves = g
    unlock(&burial_lock.held)
    Py_AddPendingCall(bury, NULL)       # a full queue: the next drop's call buries this one too


cdef void drop_with_gil(PyObject* object) noexcept with gil:
    Py_DECREF(<object>object)


cdef int bury(void* unused) noexcept:
    global graves
    cdef grave* g
    cdef grave* next
    acquire(&burial_lock.held)
    g = graves
    graves = NULL
    unlock(&burial_lock.held)
    while g != NULL:
        next = g.next
        Py_DECREF(<object>g.object)
        free(g)
        g = next
    return 0


# -- locks, and fork ----------------------------------------------------------------------------

# A lock holds the generation of the process that took it. In a forked child the threads of the
# parent are gone, so a lock that one of them held is nobody's: the child takes it over.
cdef long long generation = 1

cdef enum:
    TAGS = 8191
# The generation where there are few bits for it: 1 .. TAGS. Nothing that a thread counts is as old as that many forks.
cdef long long gate_tag = 1

cdef enum:
    LOOKS = 64              # at a lock, before the processor is given to another thread
    YIELDS = 64             # before the thread sleeps
    FIRST_SLEEP = 50000     # nanoseconds
    LONGEST_SLEEP = 1000000
    SIGNALS_EACH = 50000000     # nanoseconds between two looks for Ctrl-C


cdef void wait_a_moment(int looks) noexcept nogil:
    """Between two looks at a word that another thread will change; looks: how many there were."""
    if looks < LOOKS:       # most locks are held for less than a system call takes
        pause()
    elif looks < LOOKS + YIELDS:
        pages.relax()
    elif looks < LOOKS + 2 * YIELDS:
        pages.sleep_ns(FIRST_SLEEP)
    else:
        pages.sleep_ns(LONGEST_SLEEP)


cdef int interrupted(failure* why) noexcept with gil:
    """Runs the handlers of signals that have come; E_PYTHON if one raised (Ctrl-C). In the main thread only."""
    try:
        PyErr_CheckSignals()
        return 0
    except BaseException as error:
        return fail_python(why, error)


cdef int wait_for_signals(int* looks, long long* since, failure* why) noexcept nogil:
    """wait_a_moment(), where the wait may be long and the GIL is not held: on a thread that Python knows, Ctrl-C ends
    it. looks and since are 0 at the start."""
    cdef long long now
    wait_a_moment(looks[0])
    looks[0] += 1
    if looks[0] < LOOKS + YIELDS or PyGILState_GetThisThreadState() == NULL or is_finalizing():
        return 0
    looks[0] = LOOKS + 2 * YIELDS if looks[0] > LOOKS + 2 * YIELDS else looks[0]
    now = pages.clock_ns()
    if now - since[0] < SIGNALS_EACH:
        return 0
    since[0] = now
    return interrupted(why)


cdef void acquire(word* lock) noexcept nogil:
    # Held for a page call or two, and a memory's for a Python memory's grow_to: never wait here with the GIL.
    cdef long long holder
    cdef int looks = 0
    if swap_if(lock, 0, generation):
        return
    while True:
        holder = load(lock)     # only looking, it stays in the holder's cache
        if holder != generation and swap_if(lock, holder, generation):
            return
        wait_a_moment(looks)
        looks += 1


cdef bint try_acquire(word* lock) noexcept nogil:
    cdef long long holder = load(lock)
    while holder != generation:
        if swap_if(lock, holder, generation):
            return True
        holder = load(lock)
    return False


cdef void unlock(word* lock) noexcept nogil:
    publish(lock, 0)


cdef fork_lock* listed = NULL
cdef word listed_lock
cdef fork_lock moving_lock      # a memory is half way to another address
cdef fork_lock orphans_lock     # orphans
cdef fork_lock live_lock        # the list of memories; whoever holds it waits for nothing
cdef memory* live = NULL


cdef void list_lock(fork_lock* it) noexcept nogil:
    global listed
    acquire(&listed_lock)
    it.previous = NULL
    it.next = listed
    if listed != NULL:
        listed.previous = it
    listed = it
    unlock(&listed_lock)


cdef void unlist_lock(fork_lock* it) noexcept nogil:
    global listed
    acquire(&listed_lock)
    if it.next != NULL:
        it.next.previous = it.previous
    if it.previous != NULL:
        it.previous.next = it.next
    else:
        listed = it.next
    unlock(&listed_lock)


# The C library calls these around every fork, also one that Python knows nothing of (but not around clone(2), in
# whose child not even malloc() works if another thread was in it). The thread that forks may hold the GIL.

cdef enum:
    CHILD_CALLS = 2

cdef void (*child_calls[CHILD_CALLS])() noexcept nogil
cdef int n_child_calls = 0


cdef void in_each_child(void (*call)() noexcept nogil) noexcept nogil:
    """From now on `call` runs in each forked child, after the memories have been repaired. Once for each of
    CHILD_CALLS callers, and not while modules are imported."""
    global n_child_calls
    acquire(&listed_lock)
    child_calls[n_child_calls] = call
    n_child_calls += 1
    unlock(&listed_lock)


cdef void before_fork() noexcept nogil:
    cdef fork_lock* it
    acquire(&listed_lock)
    it = listed
    while it != NULL:
        acquire(&it.held)
        it = it.next


cdef void after_fork() noexcept nogil:
    cdef fork_lock* it = listed
    while it != NULL:
        unlock(&it.held)
        it = it.next
    unlock(&listed_lock)


cdef void after_fork_in_child() noexcept nogil:
    global generation, gate_tag
    cdef own_growth* own = <own_growth*>own_growths()[0]
    cdef memory* m
    cdef int i
    generation += 1
    gate_tag = 1 + (generation - 1) % TAGS
    while own != NULL:      # this thread forked in the middle of them, and goes on
        store(&own.m.lock, generation)
        if load(&own.m.pins) < 0:
            store(&own.m.pins, -generation)
        own = own.outer
    m = live
    while m != NULL:        # before any other code of the child runs, be it wasm
        repair(m)
        m = m.live_next
    after_fork()
    m = live
    while m != NULL:        # hooks may take listed locks
        end_lost_growth(m)
        m = m.live_next
    for i in range(n_child_calls):
        child_calls[i]()


cdef bint was_lost(memory* m) noexcept nogil:
    """In a forked child: the thread that holds the memory's lock is not there."""
    cdef long long holder = load(&m.lock)
    return holder != 0 and holder != generation


cdef void repair(memory* m) noexcept nogil:
    """In a forked child: `m` as if the growth that a lost thread was in had not begun, or was over.

    Pages between the size and `opening` may be accessible. The size is written when all else is done, so that it
    tells which of the two it is.
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
        round_up(memory_size(m), pages.capabilities().page_size, &end)
        if end < m.opening and pages.protect(m.base + end, m.opening - end, pages.ACCESS_NONE):
            pages.decommit(m.base + end, m.opening - end)
        poke(&m.accessible, end)
        m.opening = 0


cdef void end_lost_growth(memory* m) noexcept nogil:
    """Of a lost thread: the hooks that were told of its beginning, and not of its end, are told how it ended."""
    cdef memory_hook* hook = m.tell_from
    cdef size_t size = memory_size(m)
    cdef int code = 0 if size >= m.growing_to else E_UNSUPPORTED
    if not was_lost(m):
        return
    if m.growing_to:
        while hook != m.tell_to:
            if hook.after_grow != NULL:
                hook.after_grow(hook, m, m.growing_from, m.growing_to, code)
            hook = hook.next
        m.growing_to = 0
    store(&m.lock, 0)


# The last is waited for first: whoever moves a memory may wait for `orphans_lock`, so that comes after it.
list_lock(&live_lock)
list_lock(&burial_lock)
list_lock(&orphans_lock)
list_lock(&moving_lock)
if pages.at_fork(before_fork, after_fork, after_fork_in_child):
    raise MemoryError("no memory for what linmem does at a fork")


# -- what a thread is growing by Python code --------------------------------------------------------

cdef extern from *:
    """
    static LINMEM_OF_THREAD void *linmem_own_growths;
    static void **linmem_own_growths_of_thread(void) { return &linmem_own_growths; }
    """
    void** own_growths "linmem_own_growths_of_thread"() noexcept nogil


cdef void begin_own_growth(own_growth* growth, memory* m) noexcept nogil:
    """The lock of `m` is held, and Python code will run until end_own_growth(). They nest."""
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


# -- every memory, whatever its kind -----------------------------------------------------------

cdef size_t memory_size(memory* m) noexcept nogil:
    return <size_t>load(&m.size)


cdef void list_memory(memory* m) noexcept nogil:
    """From now on a forked child repairs it. By who makes it, as the last thing."""
    global live
    acquire(&live_lock.held)
    m.live_previous = NULL
    m.live_next = live
    if live != NULL:
        live.live_previous = m
    live = m
    unlock(&live_lock.held)


cdef void unlist_memory(memory* m) noexcept nogil:
    global live
    acquire(&live_lock.held)
    if m.live_next != NULL:
        m.live_next.live_previous = m.live_previous
    if m.live_previous != NULL:
        m.live_previous.live_next = m.live_next
    else:
        live = m.live_next
    unlock(&live_lock.held)


cdef memory* live_after(memory* m) noexcept nogil:
    """In a forked child, before any other code of it runs: the next of all memories; NULL: the first, and at the end.
    All their hooks are there."""
    return live if m == NULL else m.live_next


cdef int lock_memory(memory* m, failure* why) noexcept nogil:
    """acquire() of a memory's lock, whose holder may be in a Python memory's grow_to for long. 0: unlock(&m.lock)
    follows."""
    cdef long long holder
    cdef long long since = 0
    cdef int looks = 0, code = 0
    if swap_if(&m.lock, 0, generation):
        return 0
    if is_own_growth(m):
        return fail(why, E_OWN_GROWTH, "wait", 0)
    while code == 0:
        holder = load(&m.lock)
        if holder != generation and swap_if(&m.lock, holder, generation):
            return 0
        code = wait_for_signals(&looks, &since, why)
    return code


cdef int lock_in_call(memory* m) except -1:
    """lock_memory(), with the GIL held."""
    cdef failure why
    cdef int code
    if swap_if(&m.lock, 0, generation):
        return 0
    with nogil:
        code = lock_memory(m, &why)
        if code == 0 and m.broken:
            unlock(&m.lock)
            code = fail(&why, E_BROKEN, "wait", 0)
    if code:
        raise_failure(&why)
    return 0


cdef int memory_grow_to(memory* m, size_t new_size, failure* why) noexcept nogil:
    return grow_locked(m, new_size, False, why)


# The path of a growth is one function for the C compiler (hence the inlines, and the mapped kind by
# name): after a system call the processor has forgotten where calls return to, and every frame on
# the way back costs as much as all that is checked in it.
cdef inline int grow_locked(memory* m, size_t new_size, bint by_python, failure* why) noexcept nogil:
    cdef int code = 0
    cdef size_t size
    if not swap_if(&m.lock, 0, generation):
        code = lock_memory(m, why)
        if code:
            return code
    size = memory_size(m)
    if by_python and load(&m.owner) == OWNER_WASMTIME:
        code = fail(why, E_OWNED, "grow_to", new_size)
    elif new_size < size or new_size > m.maximum:
        code = refuse_size(m, size, new_size, why)
    elif new_size > size:
        if m.growth_is_watched:
            code = grow_with_hooks(m, size, new_size, why)
        elif m.ops == &mapped_ops:
            code = mapped_grow_by(m, size, new_size, why)
        else:
            code = m.ops.grow(m, new_size, why)
    unlock(&m.lock)
    return code


cdef int refuse_size(memory* m, size_t size, size_t new_size, failure* why) noexcept nogil:
    if new_size < size:
        return fail(why, E_SHRINK, "grow_to", new_size, 0, size)
    return fail(why, E_MAXIMUM, "grow_to", new_size, 0, m.maximum)


cdef int grow_with_hooks(memory* m, size_t size, size_t new_size, failure* why) noexcept nogil:
    cdef memory_hook* hook = m.hooks
    cdef memory_hook* end
    cdef int code = 0
    m.tell_from = m.tell_to = hook
    m.growing_from = size
    poke(&m.growing_to, new_size)
    while hook != NULL:
        if hook.before_grow != NULL:
            code = hook.before_grow(hook, m, new_size, why)
            if code:
                break
        hook = hook.next
        m.tell_to = hook
    end = hook
    if code == 0:
        code = m.ops.grow(m, new_size, why)
    hook = m.hooks
    while hook != end:
        m.tell_from = hook.next
        if hook.after_grow != NULL:
            hook.after_grow(hook, m, size, new_size, code)
        hook = hook.next
    poke(&m.growing_to, 0)
    return code


cdef void memory_hang(memory* m, memory_hook* hook) noexcept nogil:
    acquire(&m.lock)
    hook.next = m.hooks
    m.hooks = hook
    if hook.before_grow != NULL or hook.after_grow != NULL:
        m.growth_is_watched = True
    unlock(&m.lock)


cdef void memory_retain(memory* m) noexcept nogil:
    add(&m.refs, 1)


cdef void memory_release(memory* m) noexcept nogil:
    cdef memory_hook* hooks
    cdef memory_hook* hook
    cdef memory_hook* kept
    if add(&m.refs, -1):
        return
    kept = hooks = m.hooks
    while kept != NULL:
        if kept.before_drop != NULL:
            kept.before_drop(kept, m)
        if kept.keep != NULL and kept.keep(kept, m):
            break       # and from here on another thread may have the memory
        kept = kept.next
    if kept == NULL:
        m.ops.free(m)
    while hooks != kept:
        hook = hooks
        hooks = hook.next
        hook.dropped(hook)


cdef int memory_resident(memory* m, size_t* bytes, failure* why) noexcept nogil:
    if m.ops.resident == NULL:
        return fail(why, E_UNSUPPORTED, "resident", 0)
    return m.ops.resident(m, bytes, why)


cdef long long pins_now(memory* m) noexcept nogil:
    """How many point into the memory; negative: it is moving. A mover of the parent moves nothing in
    a forked child, as with the locks."""
    cdef long long pins = load(&m.pins)
    if pins < 0 and pins != -generation:
        swap_if(&m.pins, pins, 0)
        pins = load(&m.pins)
    return pins


cdef int pin(memory* m) except -1:
    """The base stays where it is until unpin(), for a buffer that is exported. With the GIL held, but for the wait: a
    Python memory needs it to move."""
    cdef long long pins
    while True:
        pins = pins_now(m)
        if pins < 0:
            wait_for_mover(m)
        elif swap_if(&m.pins, pins, pins + 1):
            return 0


cdef int wait_for_mover(memory* m) except -1:
    cdef failure why
    cdef long long since = 0
    cdef int looks = 0, code = 0
    with nogil:
        if is_own_growth(m):
            code = fail(&why, E_OWN_GROWTH, "wait", 0)
        while code == 0 and pins_now(m) < 0:
            code = wait_for_signals(&looks, &since, &why)
        if code == 0 and m.broken:
            code = fail(&why, E_BROKEN, "wait", 0)
    if code:
        raise_failure(&why)
    return 0


cdef inline void unpin(memory* m) noexcept nogil:
    add(&m.pins, -1)


cdef inline long long accesses_of_now(long long accesses) noexcept nogil:
    """Those of the parent's threads never end in a forked child, and are none."""
    return accesses if accesses >> 32 == generation else generation << 32


cdef int begin_access(memory* m) except -1:
    """The base stays where it is until end_access(). Whoever wants to move waits for that, so it comes soon: until
    then the caller waits for nothing, neither a lock nor the GIL."""
    cdef long long accesses
    while True:
        accesses = load(&m.accesses)
        if swap_if(&m.accesses, accesses, accesses_of_now(accesses) + 1):
            if pins_now(m) >= 0:        # looked at after: who moves looks the other way round
                return 0
            end_access(m)
            wait_for_mover(m)


cdef inline void end_access(memory* m) noexcept nogil:
    add(&m.accesses, -1)


cdef int begin_move(memory* m, size_t new_size, failure* why) noexcept nogil:
    """The base may change until end_move(): nobody points into the memory, and nobody begins to. With the lock
    held; waits for accesses under way."""
    cdef long long pins
    cdef int code
    if m.is_shared or load(&m.protection) != PROTECTION_NONE or not m.may_move:
        fail(why, E_CAPACITY, "grow_to", new_size, 0, m.capacity)
        snprintf(why.detail, sizeof(why.detail), "%s",
                 "shared memories never do" if m.is_shared else
                 "make it with a larger reserve= or maximum=, or with may_move=True" if not m.may_move else
                 "some of its pages have their own protection")
        return E_CAPACITY
    while not swap_if(&m.pins, 0, -generation):
        pins = pins_now(m)
        if pins > 0:
            return fail(why, E_EXPORTED, "grow_to", new_size, <size_t>pins, m.capacity)
    code = wait_for_accesses(m, why)
    if code:
        end_move(m)
    return code


cdef int wait_for_accesses(memory* m, failure* why) noexcept nogil:
    """Until all accesses have ended that had begun; an access that begins later sees what the caller wrote before. With
    the lock held. A code: Ctrl-C has ended the wait."""
    cdef own_growth own
    cdef long long since = 0
    cdef int looks = 0, code = 0
    if accesses_of_now(load(&m.accesses)) == generation << 32:
        return 0
    # Signal handlers run in this wait. A handler that uses the memory must not wait for its own thread.
    begin_own_growth(&own, m)
    while code == 0 and accesses_of_now(load(&m.accesses)) != generation << 32:
        code = wait_for_signals(&looks, &since, why)
    end_own_growth(&own)
    return code


cdef void end_move(memory* m) noexcept nogil:
    store(&m.pins, 0)


# -- the mapped kind ---------------------------------------------------------------------------

cdef struct orphan:
    orphan* next
    char* at
    size_t size

cdef orphan* orphans = NULL     # ranges that the OS refused to take back, tried again at the next release
cdef word n_orphans


cdef void give_back(char* at, size_t size) noexcept nogil:
    """Release, or remember. munmap can fail where it has to split a mapping at vm.max_map_count."""
    global orphans
    cdef orphan* o
    cdef orphan* retry
    if size == 0:
        return
    if pages.release(at, size):
        o = <orphan*>malloc(sizeof(orphan))
        if o == NULL:
            return              # no bytes for a note: this address range stays taken
        o.at = at
        o.size = size
        acquire(&orphans_lock.held)
        o.next = orphans
        orphans = o
        add(&n_orphans, 1)
        unlock(&orphans_lock.held)
        return
    if load(&n_orphans) == 0:
        return
    acquire(&orphans_lock.held)
    retry = orphans
    if retry != NULL:
        orphans = retry.next
        add(&n_orphans, -1)
    unlock(&orphans_lock.held)
    if retry != NULL:
        at, size = retry.at, retry.size
        free(retry)
        give_back(at, size)


cdef int mapped_grow(memory* m, size_t new_size, failure* why) noexcept nogil:
    return mapped_grow_by(m, memory_size(m), new_size, why)


cdef inline int mapped_grow_by(memory* m, size_t size, size_t new_size, failure* why) noexcept nogil:
    cdef size_t page = pages.capabilities().page_size
    cdef size_t need
    cdef int code
    if round_up(new_size, page, &need):
        return fail(why, E_OVERFLOW, "new_size", new_size)
    if need > m.capacity:
        code = grow_by_moving(m, new_size, need, why)
        if code:
            return code
    elif need > m.accessible:
        poke(&m.opening, need)
        code = pages.commit(m.base + m.accessible, need - m.accessible)
        if code:
            code = commit_again(m.base + m.accessible, need - m.accessible, code)
            if code:
                m.opening = 0
                return fail_page_call(why, code, "commit", need - m.accessible)
    if size & (page - 1):
        # Fresh bytes read as zero, also those that native code could already reach.
        memset(m.base + size, 0, round_down(size, page) + page - size)
    poke(&m.accessible, need)
    publish(&m.size, <long long>new_size)
    poke(&m.opening, 0)
    return 0


cdef int grow_by_moving(memory* m, size_t new_size, size_t need, failure* why) noexcept nogil:
    """Past the capacity, where nobody can notice. All that can fail comes before anything is lost."""
    cdef layout to
    cdef char* region
    cdef size_t chosen
    cdef size_t huge = pages.capabilities().huge_page if m.huge_pages else 0
    cdef int code = begin_move(m, new_size, why)
    if code:
        return code
    # Not with moving_lock: where the OS refuses, pools give back what they hold, and take their locks for that.
    code = reserve_in_steps(need, m.maximum, m.guard, huge, False, &to, &region, &chosen, why)
    if code:
        if code == E_OVERFLOW:
            why.call = "new_size"
        end_move(m)
        return code
    acquire(&moving_lock.held)
    code = move_to_larger(m, need, &to, region, why)
    if code == 0:
        poke(&m.opening, need)
    end_move(m)
    unlock(&moving_lock.held)
    if code:
        forget_chosen(chosen)
        if code > 0 and relieve(RELIEF_PAGES, NULL, need):
            return grow_by_moving(m, new_size, need, why)
    else:
        forget_chosen(m.chosen)
        m.chosen = chosen
    return code


cdef int move_to_larger(memory* m, size_t need, const layout* to, char* region, failure* why) noexcept nogil:
    cdef char* base = region + to.pre_guard
    cdef char* old = m.base - m.pre_guard
    cdef size_t old_total = m.pre_guard + m.capacity + m.guard
    cdef int code
    if m.huge_pages:
        pages.advise_huge(base, to.capacity)
    # What looks like one mapping may be several (a fork, or someone's madvise, splits them): then
    # it does not move, but it can be copied.
    if (pages.capabilities().moves and m.accessible and not m.moved and m.image_state == IMAGE_COPIED
            and pages.move(m.base, m.accessible, base, need) == 0):
        give_back(old, m.pre_guard)
        give_back(m.base + m.accessible, old_total - m.pre_guard - m.accessible)
        m.moved = True
    else:
        code = pages.commit(base, need)
        if code:
            give_back(region, to.total)
            return fail_page_call(why, code, "commit", need)
        memcpy(base, m.base, m.accessible)
        give_back(old, old_total)
        m.moved = False
        m.image_state = IMAGE_COPIED
    poke_address(&m.base, base)
    poke(&m.pre_guard, to.pre_guard)
    poke(&m.capacity, to.capacity)
    poke(&m.guard, to.guard)
    poke(&m.covered, to.capacity + to.guard)
    return 0


# -- address space: how much of it linmem chooses to take, and who gives some back when the OS refuses --------------

cdef word chosen_bytes          # of the reservations whose size linmem chose, whole
cdef word chosen_memories       # how many they are

cdef inline void forget_chosen(size_t chosen) noexcept nogil:
    """A memory that claim_reservation() counted is gone, or could not be made."""
    if chosen:
        add(&chosen_bytes, -<long long>chosen)
        add(&chosen_memories, -1)


cdef size_t claim_reservation(size_t minimum, size_t bound, size_t guard, size_t alignment,
                              size_t* chosen) noexcept nogil:
    """The size that linmem chooses, and *chosen: how many bytes are counted for all of the reservation until
    forget_chosen(); 0: it is the minimum, which the caller chose. Threads that choose at once do not exceed the half
    together."""
    cdef size_t page = pages.capabilities().page_size
    cdef size_t space, left, room, want, capacity
    cdef long long now
    cdef layout least
    chosen[0] = 0
    if lay_out(minimum, 0, guard, page, &least) or add_up(least.total, alignment, &least.total):
        return minimum          # reserve_exactly() finds the same, and says so
    pages.address_space(&space, &left)
    while True:
        now = load(&chosen_bytes)
        room = room_to_choose(space, left, pages.reserved(), <size_t>now)
        room = room - least.total if room > least.total else 0
        want = choose_reservation(minimum, bound, bound != NO_MAXIMUM, room, <size_t>load(&chosen_memories),
                                  pages.capabilities().memory)
        if round_up(want, page, &capacity) or capacity <= least.capacity:
            return minimum
        if swap_if(&chosen_bytes, now, now + <long long>(least.total - least.capacity + capacity)):
            add(&chosen_memories, 1)
            chosen[0] = least.total - least.capacity + capacity
            return want


cdef int reserve_in_steps(size_t minimum, size_t bound, size_t guard, size_t alignment, bint watched, layout* out,
                          char** region, size_t* chosen, failure* why) noexcept nogil:
    """A reservation of the size that linmem chooses. Where the OS refuses it, a small one, and at last the minimum:
    the gaps that are left between those two belong to others. *chosen: for forget_chosen()."""
    cdef size_t want
    cdef int code
    while True:
        want = claim_reservation(minimum, bound, guard, alignment, chosen)
        code = reserve_exactly(minimum, want, guard, alignment, watched, out, region, why)
        if code == 0:
            return 0
        forget_chosen(chosen[0])
        if code < 0 or want == minimum:
            return code
        bound = minimum + SMALL_RESERVATION if want - minimum > SMALL_RESERVATION else minimum


cdef int reserve_exactly(size_t minimum, size_t reservation, size_t guard, size_t alignment, bint watched,
                         layout* out, char** region, failure* why) noexcept nogil:
    """alignment: of the base, a power of two; 0 for a host page. What it takes is inaccessible."""
    cdef size_t lead
    cdef int code
    if lay_out(minimum, reservation, guard, pages.capabilities().page_size, out):
        if guard > minimum and guard > reservation:
            return fail(why, E_OVERFLOW, "guard", guard)
        return fail(why, E_OVERFLOW, "minimum" if minimum >= reservation else "reserve",
                    minimum if minimum > reservation else reservation)
    if alignment and add_up(out.total, alignment, &out.total):
        return fail(why, E_OVERFLOW, "reserve", reservation)
    code = pages.reserve(out.total, watched, region)
    while code and relieve(RELIEF_SPACE, NULL, out.total):
        code = pages.reserve(out.total, watched, region)
    if code:
        return fail_reserve(why, code, out.total)
    if alignment:
        lead = (alignment - <size_t>(region[0] + out.pre_guard)) & (alignment - 1)
        out.pre_guard += lead
        out.guard += alignment - lead
    return 0


cdef bint (*give_relief)(int what, const void* budget, size_t size) noexcept nogil
give_relief = NULL


cdef void relief_is(bint (*give)(int what, const void* budget, size_t size) noexcept nogil) noexcept nogil:
    """Called once, by the pool: `give` is asked before something is refused that idle slots may stand in the way of."""
    global give_relief
    give_relief = give


cdef bint relieve(int what, const void* budget, size_t size) noexcept nogil:
    """`size` bytes were refused. True: idle slots of pools have given something up, so the caller tries again. False:
    nothing that pools could give up would be enough, and nothing was given up. The caller holds no fork_lock."""
    return give_relief != NULL and give_relief(what, budget, size)


cdef int commit_again(char* at, size_t size, int code) noexcept nogil:
    while code and relieve(RELIEF_PAGES, NULL, size):
        code = pages.commit(at, size)
    return code


cdef int commit_pages(char* at, size_t size) noexcept nogil:
    """pages.commit(); idle slots give up their pages before it is refused. The caller holds no fork_lock."""
    cdef int code = pages.commit(at, size)
    return commit_again(at, size, code) if code else 0


cdef int mapped_resident(memory* m, size_t* bytes, failure* why) noexcept nogil:
    # Asked with no lock and no pin, by those who watch while others grow. The size is read first: it is written
    # after the base, so from the base on that is read then, at least so much is the memory's. Once it has
    # moved, what was counted may be somebody else's.
    cdef size_t size
    cdef char* base
    cdef int code
    while True:
        bytes[0] = 0
        size = peek(&m.accessible)
        base = peek_address(&m.base)
        code = pages.resident(base, size, bytes) if size else 0
        if peek_address(&m.base) == base:
            return fail_page_call(why, code, "resident", size) if code else 0


cdef void mapped_free(memory* m) noexcept nogil:
    unlist_memory(m)
    drop_protections(m, load(&m.protection) == PROTECTION_KNOWN)
    give_back(m.base - m.pre_guard, m.pre_guard + m.capacity + m.guard)
    forget_chosen(m.chosen)
    leave_image(m)
    free(m)


cdef memory_ops mapped_ops
mapped_ops.kind = "mmap"
mapped_ops.grow = mapped_grow
mapped_ops.resident = mapped_resident
mapped_ops.free = mapped_free
mapped_ops.pages_are_ours = True


cdef int prefaulting_grow(memory* m, size_t new_size, failure* why) noexcept nogil:
    """A growth after which every page is resident. What is resident already costs next to nothing."""
    cdef size_t page = pages.capabilities().page_size
    cdef size_t first = round_down(memory_size(m), page)
    cdef size_t end, accessible = m.accessible
    cdef char* base = m.base
    cdef int code
    # The size is told to others only when all has been done, so that a refusal changes nothing.
    if round_up(new_size, page, &end) or end <= accessible or end > m.capacity:
        code = mapped_grow(m, new_size, why)
        if code or m.base == base:
            return code
        pages.prefault(m.base + first, m.accessible - first)    # moved already: what is refused now faults in later
        return 0
    poke(&m.opening, end)
    code = commit_pages(base + accessible, end - accessible)
    if code:
        m.opening = 0
        return fail_page_call(why, code, "commit", end - accessible)
    code = pages.prefault(base + accessible, end - accessible)
    if code:
        fail_page_call(why, code, "prefault", end - accessible)
        # Hidden, they are as if they had never been committed. Left accessible behind the size they must not be:
        # wasm would write there, and the next growth show it. So what cannot be undone is done.
        if (pages.decommit(base + accessible, end - accessible) == 0
                or pages.protect(base + accessible, end - accessible, pages.ACCESS_NONE) == 0):
            m.opening = 0
            return code
    poke(&m.accessible, end)
    return mapped_grow(m, new_size, why)


cdef memory_ops prefaulting_ops
prefaulting_ops.kind = "mmap"
prefaulting_ops.grow = prefaulting_grow
prefaulting_ops.resident = mapped_resident
prefaulting_ops.free = mapped_free
prefaulting_ops.pages_are_ours = True
prefaulting_ops.prefaults = True


include "protection.pxi"
include "copy_on_write.pxi"


cdef int mapped_make(const memory_spec* spec, bint prefault, bint huge_pages, memory** out,
                     failure* why) noexcept nogil:
    cdef layout at
    cdef char* region
    cdef int code
    cdef size_t bound = spec.maximum
    cdef size_t huge = pages.capabilities().huge_page if huge_pages else 0
    cdef memory* m
    if spec.image != NULL and spec.image.end > spec.minimum:
        return fail(why, E_IMAGE, "new_memory", spec.minimum, 0, spec.image.end)
    m = <memory*>calloc(1, sizeof(memory))
    if m == NULL:
        return fail(why, E_NO_MEMORY, "calloc", sizeof(memory))
    if spec.reservation == UNCHOSEN:
        if bound == NO_MAXIMUM and not spec.is_64:
            bound = WASM32_SPACE
        code = reserve_in_steps(spec.minimum, bound, spec.guard, huge, spec.watched, &at, &region, &m.chosen, why)
    else:
        code = reserve_exactly(spec.minimum, spec.reservation, spec.guard, huge, spec.watched, &at, &region, why)
    if code:
        free(m)
        return code
    m.base = region + at.pre_guard
    if huge:
        pages.advise_huge(m.base, at.capacity)      # a wish: without it the memory only has small pages
    if at.accessible:
        code = commit_pages(m.base, at.accessible)
        if code:
            fail_page_call(why, code, "commit", at.accessible)
        elif spec.image != NULL:
            code = start_from_image(m, spec.image, why)
        if code == 0 and prefault:
            code = pages.prefault(m.base, at.accessible)
            if code:
                fail_page_call(why, code, "prefault", at.accessible)
        if code:
            give_back(region, at.total)
            forget_chosen(m.chosen)
            leave_image(m)
            free(m)
            return code
    m.ops = &prefaulting_ops if prefault else &mapped_ops
    m.huge_pages = huge != 0
    m.refs = 1
    m.size = <long long>spec.minimum
    m.started = spec.minimum
    m.accessible = at.accessible
    m.capacity = at.capacity
    m.maximum = spec.maximum
    m.pre_guard = at.pre_guard
    m.guard = at.guard
    m.covered = at.capacity + at.guard
    m.is_shared = spec.is_shared
    m.may_move = spec.may_move
    list_memory(m)
    out[0] = m
    return 0


# -- whose pages are whose -----------------------------------------------------------------------

ctypedef domain* domain_ptr

cdef enum:
    DOMAIN_BUCKETS = 256

cdef domain* domains[DOMAIN_BUCKETS]
cdef fork_lock domains_lock
list_lock(&domains_lock)

cdef extern from *:
    """
    static LINMEM_OF_THREAD void *linmem_domain;
    static void *linmem_get_domain(void) { return linmem_domain; }
    static void linmem_put_domain(void *domain) { linmem_domain = domain; }
    """
    void* get_domain "linmem_get_domain"() noexcept nogil
    void put_domain "linmem_put_domain"(void* domain) noexcept nogil


cdef domain* current_domain() noexcept nogil:
    """Of the memory that this thread is making; NULL: none was named. A borrowed reference."""
    return <domain*>get_domain()


cdef void set_domain(domain* d) noexcept nogil:
    put_domain(d)


cdef domain* domain_of(object name) except? NULL:
    """A reference on the domain of that name; NULL: of None."""
    cdef bytes text
    cdef domain* d
    cdef domain* fresh
    cdef domain** head
    cdef size_t size, hashed
    if name is None:
        return NULL
    if not isinstance(name, str):
        raise TypeError(f"domain must be a str or None, got {type(name).__name__}")
    text = (<str>name).encode("utf-8", "surrogatepass")
    size = <size_t>len(text)
    hashed = <size_t>hash(text)
    fresh = <domain*>calloc(1, sizeof(domain) + size + 1)
    if fresh == NULL:
        raise MemoryError("no memory for the name of a domain")
    fresh.refs = 1
    fresh.hash = hashed
    fresh.size = size
    fresh.name = <char*>fresh + sizeof(domain)
    memcpy(fresh.name, <const char*>text, size)
    with nogil:
        acquire(&domains_lock.held)
        head = &domains[hashed % DOMAIN_BUCKETS]
        d = head[0]
        while d != NULL and not (d.hash == hashed and d.size == size and memcmp(d.name, fresh.name, size) == 0):
            d = d.next
        if d != NULL:
            d.refs += 1
        else:
            fresh.next = head[0]
            head[0] = fresh
        unlock(&domains_lock.held)
        if d != NULL:
            free(fresh)
    return fresh if d == NULL else d


cdef void domain_retain(domain* d) noexcept nogil:
    if d != NULL:
        acquire(&domains_lock.held)
        d.refs += 1
        unlock(&domains_lock.held)


cdef void domain_release(domain* d) noexcept nogil:
    cdef domain** link
    if d == NULL:
        return
    acquire(&domains_lock.held)
    d.refs -= 1
    if d.refs:
        d = NULL
    else:
        link = &domains[d.hash % DOMAIN_BUCKETS]
        while link[0] != d:
            link = &link[0].next
        link[0] = d.next
    unlock(&domains_lock.held)
    free(d)


# -- creators ------------------------------------------------------------------------------------

cdef extern from *:
    """
    static LINMEM_OF_THREAD struct { int may_move; void *domain; } linmem_asked;
    static int *linmem_asked_may_move(void) { return &linmem_asked.may_move; }
    static void **linmem_asked_domain(void) { return &linmem_asked.domain; }
    """
    bint* asked_may_move "linmem_asked_may_move"() noexcept nogil
    void** asked_domain "linmem_asked_domain"() noexcept nogil


cdef void answer_request(request* it) noexcept:
    """A Python creator is asked on this thread for such a memory. Exchanges it with what holds until now, which the
    caller puts back."""
    cdef request before
    before.may_move, before.domain = asked_may_move()[0], <domain*>asked_domain()[0]
    asked_may_move()[0] = it.may_move
    asked_domain()[0] = it.domain
    it[0] = before


class _InPython:
    """What tells a class of Python's from an extension class: all of them have one destructor, which is CPython's."""


cdef class NativeCreator:
    """Base of the creators that wasmtime can call with no GIL; extended in Cython, by `make`.

    A creator in Python implements `linmem.MemoryCreator` instead.
    """

    def __cinit__(self, *args, **kwargs):
        cls = type(self)
        if cls is NativeCreator:
            raise TypeError("a NativeCreator makes no memories by itself: linmem.creator(kind) makes one that does")
        # wasmtime and the other creators call `make`, whatever methods a subclass in Python has.
        if (<PyTypeObject*>cls).tp_dealloc == (<PyTypeObject*>_InPython).tp_dealloc:
            raise TypeError(f"{cls.__name__} cannot extend a native creator in Python, because its methods would not be"
                            " called: implement linmem.MemoryCreator, with a creator inside where one is needed")

    def __reduce__(self):
        raise TypeError(f"{type(self).__name__} objects cannot be pickled or copied: their memories are of this"
                        " process. Make one where it is needed")

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        return fail(why, E_UNSUPPORTED, "new_memory", spec.minimum)

    def new_memory(self, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes, *, may_move=None,
                   domain=None):
        """Make a memory, as wasmtime asks for one; mirrors ``wasmtime::MemoryCreator::new_memory``.

        Parameters
        ----------
        ty : MemoryType
            The wasm type. A shared memory never moves.
        minimum, maximum : int
            In bytes; no maximum is None. Not necessarily a multiple of any page.
        reserved_size_in_bytes : int or None
            Growth up to here never moves the base. None: the creator chooses.
        guard_size_in_bytes : int
            Inaccessible bytes after the capacity, a multiple of the host page.
        may_move : bool, optional
            Whether growth past the capacity may move the base. None: no, except while a Python creator answers
            a request on this thread; then as that request says (wasmtime's memories may move).
        domain : str or None
            Whose pages a pool may hand to this user: only those of the same domain. None is a domain of its own;
            while a Python creator answers a request on this thread, it means the domain of that request.

        Returns
        -------
        Memory

        Raises
        ------
        ValueError, TypeError, OverflowError
            For an argument that cannot be, by its name.
        PageError
            The OS refused; the message names the limit in the way.
        GrowError
            The creator's own bound refused.
        """
        cdef memory_spec spec
        self.fill_spec(&spec, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes)
        if may_move is not None:
            check_flag(may_move, "may_move")
            spec.may_move = may_move
        return self.make_checked(&spec, "guard_size_in_bytes", domain)

    cdef int fill_spec(self, memory_spec* spec, ty, minimum, maximum, reserved_size_in_bytes,
                       guard_size_in_bytes) except -1:
        spec.image = NULL
        spec.watched = False
        spec.may_move = asked_may_move()[0]
        check_extent(minimum, "minimum", &spec.minimum)
        check_optional_size(maximum, "maximum", &spec.maximum)
        check_optional_size(reserved_size_in_bytes, "reserved_size_in_bytes", &spec.reservation, _FITS)
        check_extent(guard_size_in_bytes, "guard_size_in_bytes", &spec.guard)
        try:
            spec.page_size = ty.page_size
            spec.is_64 = ty.is_64
            spec.is_shared = ty.is_shared
        except (AttributeError, TypeError, OverflowError):
            raise TypeError(f"ty must be a MemoryType, got {type(ty).__name__}") from None
        if spec.page_size != 1 and spec.page_size != 65536:
            raise ValueError(f"ty.page_size must be 1 or 65536, got {spec.page_size}")
        return 0

    def create(self, minimum, maximum=None, reserve=None, guard=None, *, image=None, may_move=False, domain=None):
        """Make a memory for Python; `linmem.create` says what each argument means (all in bytes).

        It starts as the `image` says, if one is given.
        """
        cdef memory_spec spec
        check_extent(minimum, "minimum", &spec.minimum)
        check_optional_size(maximum, "maximum", &spec.maximum)
        check_optional_size(reserve, "reserve", &spec.reservation, _FITS)
        check_flag(may_move, "may_move")
        spec.may_move = may_move
        spec.image = NULL
        spec.watched = False
        if image is not None:
            if not isinstance(image, ImageHandle):
                raise TypeError(f"image must be an Image, got {type(image).__name__}")
            spec.image = (<ImageHandle>image).it
        check_extent(DEFAULT_GUARD if guard is None else guard, "guard", &spec.guard)
        if guard is None:
            round_up(spec.guard, pages.capabilities().page_size, &spec.guard)
        spec.page_size = 1
        spec.is_64 = True
        spec.is_shared = False
        return self.make_checked(&spec, "guard", domain)

    cdef object make_checked(self, const memory_spec* spec, str guard_name, object domain=None):
        cdef memory* m = NULL
        cdef domain_ptr before, ours
        cdef Memory made
        cdef failure why
        cdef int code
        cdef size_t page = pages.capabilities().page_size
        if spec.minimum > spec.maximum:
            raise ValueError(f"minimum must be <= maximum ({spec.maximum}), got {spec.minimum}")
        if spec.guard & (page - 1):
            raise ValueError(f"{guard_name} must be a multiple of the host page ({page}), got {spec.guard}")
        ours = <domain_ptr>asked_domain()[0] if domain is None else domain_of(domain)
        with nogil:
            before = current_domain()
            if before != ours:
                set_domain(ours)
            code = self.make(spec, &m, &why)
            if before != ours:
                set_domain(before)
            if domain is not None:
                domain_release(ours)
        if code:
            raise_failure(&why)
        made = <Memory>wrap(m)
        made.fresh = 1
        return made


cdef int check_optional_size(object value, str name, size_t* out, str bound="be below 2**64 - 1") except -1:
    if value is None:
        out[0] = SIZE_MAX       # UNCHOSEN, or no maximum
        return 0
    check_bounded(value, name, bound, out)
    if out[0] == SIZE_MAX:      # which would pass for None
        raise OverflowError(f"{name} must {bound}, got {_shown(value)}")
    return 0


cdef NativeCreator check_native(object value, str name):
    if not isinstance(value, NativeCreator):
        what = f"the class {value.__name__} itself: call it" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name} must be a NativeCreator (a PythonCreator for one in Python), got {what}")
    return <NativeCreator>value


@cython.final
cdef class MmapCreator(NativeCreator):
    """Memories that are each one mapping of their own: reserve, commit as they grow, release.

    Mirrors ``wasmtime::MemoryCreator``. Thread-safe; holds nothing.

    Parameters
    ----------
    prefault : bool
        Every page is made resident when it becomes accessible, at creation and at each growth; a
        growth for which there is no memory is then refused instead of a fault later. Pays where nearly
        all pages are written: one call costs two thirds of the faults that it saves. Where few are, it
        costs that much for all of them.
    huge_pages : bool
        The base is a multiple of a huge page (2 MiB on most machines), and the OS is asked to use such
        (MADV_HUGEPAGE). Pays where a minimum, or the step of a growth, is of that size or more, and most
        of it is written: first touches are then 3 to 5 times faster. Gains nothing for growth in smaller
        steps, where the OS has no huge pages to give, and in memories that stay below that size.
    """

    def __cinit__(self, *args, **kwargs):
        prefault, huge_pages = _given("MmapCreator", ("prefault", "huge_pages"),
                                      {"prefault": False, "huge_pages": False}, args, kwargs, 0)
        check_flag(prefault, "prefault")
        check_flag(huge_pages, "huge_pages")
        self.prefault = prefault
        self.huge_pages = huge_pages

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef int code = mapped_make(spec, self.prefault, self.huge_pages, out, why)
        # Idle slots also hold what the other page calls need: memory, and mappings.
        while code > 0 and strcmp(why.call, "reserve") and relieve(RELIEF_PAGES, NULL, why.size):
            code = mapped_make(spec, self.prefault, self.huge_pages, out, why)
        return code

    def __repr__(self):
        options = [f"{name}=True" for name, on in (("prefault", self.prefault), ("huge_pages", self.huge_pages)) if on]
        return f"MmapCreator({', '.join(options)})"


cdef int check_flag(object value, str name) except -1:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {_shown(value)}")
    return 0


include "memory_class.pxi"


_abc.LinearMemory.register(Memory)
_abc.MemoryCreator.register(NativeCreator)


# -- for the tests: the pure functions, alone --------------------------------------------------

def _lay_out(size_t minimum, size_t reservation, size_t guard, size_t page):
    cdef layout at
    if lay_out(minimum, reservation, guard, page, &at):
        return None
    return {"pre_guard": at.pre_guard, "accessible": at.accessible, "capacity": at.capacity,
            "guard": at.guard, "total": at.total}


def _choose_reservation(size_t minimum, maximum, size_t room, size_t others, size_t memory):
    cdef size_t bound
    check_optional_size(maximum, "maximum", &bound)
    return choose_reservation(minimum, bound, bound != NO_MAXIMUM, room, others, memory)


def _room_to_choose(size_t space, size_t left, size_t reserved, size_t chosen):
    return room_to_choose(space, left, reserved, chosen)


def _chosen():
    """What is counted now: bytes, and memories."""
    return load(&chosen_bytes), load(&chosen_memories)
