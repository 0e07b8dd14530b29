# Growth of a memory of any kind: the checks, the hooks, and the call of m.ops.grow; a part of memory.pyx.

cdef size_t memory_size(memory* m) noexcept nogil:
    return load(&m.size)


cdef int memory_grow_to(memory* m, size_t new_size, failure* why) noexcept nogil:
    return grow_as(m, new_size, False, why)


# The functions of a growth are `inline`, and mapped_grow_by() is called by name, so that the C compiler makes one
# function of the whole path. The reason: after a system call the processor mispredicts the return addresses, and each
# return from a nested function then costs as much as all checks of that function.
cdef inline int grow_as(memory* m, size_t new_size, bint by_python, failure* why) noexcept nogil:
    cdef int code
    if not compare_exchange(&m.lock, 0, generation):
        code = lock_memory(m, why)
        if code:
            return code
    code = grow_locked(m, new_size, by_python, why)
    unlock(&m.lock)
    return code


cdef inline int grow_locked(memory* m, size_t new_size, bint by_python, failure* why) noexcept nogil:
    """The caller holds the memory's lock. by_python: a call that a memory of a wasmtime store refuses."""
    cdef size_t size = memory_size(m)
    cdef int code
    if by_python and load(&m.owner) == OWNER_WASMTIME:
        return fail(why, E_OWNED, "grow_to", new_size)
    if new_size < size or new_size > m.maximum:
        return refuse_size(m, size, new_size, why)
    if new_size == size:
        return 0
    if m.growth_is_watched:
        return grow_with_hooks(m, size, new_size, why)
    code = grow_pages(m, size, new_size, why)
    return refuse_growth(m, NULL, new_size, why) if code else 0


cdef inline int grow_pages(memory* m, size_t size, size_t new_size, failure* why) noexcept nogil:
    cdef int code = mapped_grow_by(m, size, new_size, why) if m.ops == &mapped_ops else m.ops.grow(m, new_size, why)
    if code == 0:
        store_size(&m.growths, m.growths + 1)
    return code


cdef int refuse_size(memory* m, size_t size, size_t new_size, failure* why) noexcept nogil:
    if new_size < size:
        return fail(why, E_SHRINK, "grow_to", new_size, 0, size)
    fail(why, E_MAXIMUM, "grow_to", new_size, 0, m.maximum)
    return refuse_growth(m, NULL, new_size, why)


cdef int grow_with_hooks(memory* m, size_t size, size_t new_size, failure* why) noexcept nogil:
    cdef int code = grow_once(m, size, new_size, why)
    return grow_if_asked_again(m, size, new_size, code, why) if code else 0


cdef int grow_if_asked_again(memory* m, size_t size, size_t new_size, int code, failure* why) noexcept nogil:
    cdef memory_hook* hook = m.hooks
    while hook != NULL:
        if hook.refused != NULL:
            if hook.refused(hook, m, new_size, why):
                return grow_once(m, size, new_size, why)
            code = refuse_growth(m, hook, new_size, why)        # counts if refused() has put another failure there
        if hook == m.tell_to:       # this hook refused, so the hooks below do not know of the growth
            break
        hook = hook.next
    return code


cdef inline int grow_once(memory* m, size_t size, size_t new_size, failure* why) noexcept nogil:
    """Afterwards m.tell_to is the hook that refused; NULL: no hook refused."""
    cdef memory_hook* hook = m.hooks
    cdef int code = 0
    m.tell_from = m.tell_to = hook
    m.growing_from = size
    store_size(&m.growing_to, new_size)
    while hook != NULL:
        if hook.before_grow != NULL:
            code = hook.before_grow(hook, m, new_size, why)
            if code:
                break
        hook = hook.next
        m.tell_to = hook
    if code == 0:
        code = grow_pages(m, size, new_size, why)
    hook = m.hooks
    while hook != m.tell_to:
        m.tell_from = hook.next
        if hook.after_grow != NULL:
            hook.after_grow(hook, m, size, new_size, code)
        hook = hook.next
    store_size(&m.growing_to, 0)
    if code:
        return refuse_growth(m, m.tell_to, new_size, why)
    if m.trace != NULL:
        trace_growth(m)
    return 0
