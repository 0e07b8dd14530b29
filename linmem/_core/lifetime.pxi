# References, which keep a memory alive, and pins and accesses, which keep its base from moving; a part of memory.pyx.
#
# memory.pxd has a table of the counters.

cdef void memory_retain(memory* m) noexcept nogil:
    add(&m.refs, 1)


cdef inline bint memory_unref(memory* m) noexcept nogil:
    """Drops a reference, without a page call and without a lock, so the caller may hold the GIL. True: the reference
    was the last one, and the caller must call memory_drop() without the GIL."""
    return add(&m.refs, -1) == 0


cdef void memory_release(memory* m) noexcept nogil:
    if memory_unref(m):
        memory_drop(m)


cdef void memory_drop(memory* m) noexcept nogil:
    cdef memory_hook* hooks
    cdef memory_hook* hook
    cdef memory_hook* kept
    cdef memory_hook* last = NULL
    cdef window_list* windows = NULL
    cdef memory_hook** end = &last
    end_trace(m)
    kept = hooks = m.hooks
    while kept != NULL:
        if kept.before_drop != NULL:
            kept.before_drop(kept, m)
        if kept.keep != NULL and kept.keep(kept, m):
            break       # from now on another thread may use the memory
        kept = kept.next
    if kept == NULL:
        windows = m.windows
        if windows != NULL:
            publish_windows(m, NULL)
        m.ops.free(m)
    while hooks != kept:
        hook = hooks
        hooks = hook.next
        if hook.dropped_runs_python:
            hook.next = NULL
            end[0] = hook
            end = &hook.next
        else:
            hook.dropped(hook)
    while last != NULL:
        hook = last
        last = hook.next
        hook.dropped(hook)
    drop_windows(windows)


cdef void memory_add_hook(memory* m, memory_hook* hook) noexcept nogil:
    lock(&m.lock)
    hook.next = m.hooks
    m.hooks = hook
    if hook.before_grow != NULL or hook.after_grow != NULL or hook.refused != NULL:
        m.growth_is_watched = True
    unlock(&m.lock)


# -- pins: the base cannot move while a buffer is exported

cdef long long pins_now(memory* m) noexcept nogil:
    """The number of pins; negative: the base is about to move. In a forked child, the mark of a thread of the parent is
    removed."""
    cdef long long pins = load(&m.pins)
    if pins < 0 and pins != -generation:
        compare_exchange(&m.pins, pins, 0)
        pins = load(&m.pins)
    return pins


cdef int pin(memory* m, failure* why) noexcept:
    """The base stays where it is until unpin(), for a buffer that is exported. A code: no pin."""
    cdef long long pins
    cdef int code = 0
    while code == 0:
        pins = pins_now(m)
        if pins < 0:
            code = wait_for_mover(m, why)
        elif compare_exchange(&m.pins, pins, pins + 1):
            break
    return code


cdef inline void unpin(memory* m) noexcept nogil:
    add(&m.pins, -1)


cdef int wait_for_mover(memory* m, failure* why) noexcept:
    """The mover holds the memory's lock. The wait is without the GIL, because a Python memory needs it to move."""
    cdef int code
    with nogil:
        code = lock_memory(m, why)
        if code == 0:
            unlock(&m.lock)
    return code


# -- accesses: the base cannot move while a function of linmem uses the bytes for a short time

cdef inline long long accesses_of_now(long long accesses) noexcept nogil:
    """The count with the generation of this process. A count of an older generation is 0: those threads are not in
    this process."""
    return accesses if accesses >> 32 == generation else generation << 32


cdef inline bint try_access(memory* m) noexcept nogil:
    """begin_access() without a wait. False: the base is about to move."""
    cdef long long accesses = load(&m.accesses)
    while not compare_exchange(&m.accesses, accesses, accesses_of_now(accesses) + 1):
        accesses = load(&m.accesses)
    if load(&m.pins) >= 0:          # after `accesses` was written; begin_move() writes pins, then reads accesses
        return True
    end_access(m)
    return False


cdef int begin_access(memory* m, failure* why) noexcept:
    """The base stays where it is until end_access(). A mover waits for that, so until then the caller waits neither for
    a lock nor for the GIL. A code: no access."""
    cdef int code = 0
    while code == 0 and not try_access(m):
        code = wait_for_mover(m, why)
    return code


cdef inline void end_access(memory* m) noexcept nogil:
    add(&m.accesses, -1)


cdef int wait_for_accesses(memory* m, failure* why) noexcept nogil:
    """Until all accesses have ended that had begun. An access that begins later sees what the caller wrote before. The
    caller holds the memory's lock. A code: Ctrl-C ended the wait."""
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


# -- moves

cdef int begin_move(memory* m, size_t new_size, failure* why) noexcept nogil:
    """The base may change until end_move(): no buffer is exported, no access is under way, and none begins. The caller
    holds the memory's lock."""
    cdef long long pins
    cdef int code
    if m.is_shared or load(&m.protection) != PROTECTION_NONE or m.windows != NULL or not m.may_move:
        fail(why, E_CAPACITY, "grow_to", new_size, 0, m.capacity)
        explain(why, "%s", "shared memories never do" if m.is_shared else
                "make it with a larger reserve= or maximum=, or with may_move=True" if not m.may_move else
                "some of its pages show another source (map)" if m.windows != NULL else
                "some of its pages have their own protection")
        return E_CAPACITY
    while not compare_exchange(&m.pins, 0, -generation):
        pins = pins_now(m)
        if pins > 0:
            return fail(why, E_EXPORTED, "grow_to", new_size, pins, m.capacity)
    code = wait_for_accesses(m, why)
    if code:
        end_move(m)
    return code


cdef void end_move(memory* m) noexcept nogil:
    store(&m.pins, 0)
