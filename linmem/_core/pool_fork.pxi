# The repair of pools in a forked child. Part of pool.pyx.

cdef slot* outermost_slot(memory* m) noexcept nogil:
    cdef memory_hook* hook = m.hooks
    while hook != NULL and hook.keep != slot_keep:
        hook = hook.next
    return <slot*>hook


cdef bint was_lost(slot* s, memory* m) noexcept nogil:
    """`s` is the outermost slot of `m`. Whether `s` has no guest and is not idle: a thread was changing the state."""
    cdef int state = <int>load(&s.state)
    return state != WARM and state != COLD and (state != LIVE or load(&m.refs) == 0)


cdef void drop_lost_slots() noexcept nogil:
    """In a forked child: drops each slot that another thread was working on, because that thread does not exist in the
    child, and the step that the thread reached is unknown. The forking thread itself was not working on a slot: no
    Python code runs during such work."""
    cdef memory* m = next_live_memory(NULL)
    cdef slot* s
    cdef link lost
    cdef link* node
    cdef memory_hook* hook
    list_init(&lost)
    while m != NULL:
        s = outermost_slot(m)
        if s != NULL and was_lost(s, m):
            list_add_first(&lost, &s.in_stack, s)
        m = next_live_memory(m)
    while lost.next.owner != NULL:
        s = <slot*>lost.next.owner
        list_remove(&s.in_stack)
        hook = s.m.hooks
        while hook != NULL:
            if hook.keep == slot_keep and load(&(<slot*>hook).state) != DROPPING:
                move_slot(<slot*>hook, DROPPING)
            hook = hook.next
        s.m.trace = NULL        # its end might wait for the GIL, which a thread of the parent may have had
        store(&s.m.refs, 1)
        memory_release(s.m)
    cdef pool* p = pool_after(NULL)
    while p != NULL:
        node = p.slots.next
        while node.owner != NULL:
            s = <slot*>node.owner
            node = node.next
            # A thread that does not exist in the child had freed the memory, but not yet the slot.
            if load(&s.state) == DROPPING:
                slot_dropped(&s.head)
        p = pool_after(p)
