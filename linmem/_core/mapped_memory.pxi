# The mapped kind of memory: one reservation of its own, committed as it grows; a part of memory.pyx.

cdef size_t WASM32_SPACE = <size_t>1 << 32


cdef int mapped_make(const memory_spec* spec, bint prefault, bint huge_pages, memory** out,
                     failure* why) noexcept nogil:
    cdef layout found
    cdef char* region
    cdef int code = 0
    cdef size_t huge = pages.capabilities().huge_page if huge_pages else 0
    cdef memory* m
    if spec.image != NULL and spec.image.end > spec.minimum:
        return fail(why, E_IMAGE, "new_memory", spec.minimum, 0, spec.image.end)
    m = <memory*>calloc(1, sizeof(memory))
    if m == NULL:
        return fail(why, E_NO_MEMORY, "calloc", sizeof(memory))
    code = reserve_for(spec, huge, &found, &region, &m.chosen, why)
    if code:
        free(m)
        return code
    m.base = region + found.pre_guard
    m.capacity = found.capacity
    m.pre_guard = found.pre_guard
    m.guard = found.guard
    if huge:
        pages.advise_huge(m.base, found.capacity)       # a hint: if the OS refuses, the memory has small pages only
    if found.accessible:
        code = fail_page_call(why, commit_pages(m.base, found.accessible), "commit", found.accessible)
        if code == 0 and spec.image != NULL:
            code = fail_page_call(why, image_attach(m, spec.image), "image_map", spec.image.high - spec.image.low)
        if code == 0 and prefault:
            code = fail_page_call(why, pages.prefault(m.base, found.accessible), "prefault", found.accessible)
    if code:
        unmap_and_free(m)
        return code
    m.ops = &prefaulting_ops if prefault else &mapped_ops
    m.huge_pages = huge != 0
    m.refs = 1
    m.size = spec.minimum
    image_begin_use(m, spec.minimum)
    m.accessible = found.accessible
    m.maximum = spec.maximum
    m.covered = found.capacity + found.guard
    m.is_shared = spec.is_shared
    m.may_move = spec.may_move
    trace_if_on(m)
    m.range = range_of(region, &found)
    add_live_memory(m)
    out[0] = m
    return 0


cdef int reserve_for(const memory_spec* spec, size_t alignment, layout* found, char** region, size_t* chosen,
                     failure* why) noexcept nogil:
    """Reserve what a request needs. The parameters are those of reserve_exactly(). *chosen: for forget_chosen(); not
    changed if the request says how much to reserve."""
    cdef size_t bound = spec.maximum
    if spec.reservation != UNCHOSEN:
        return reserve_exactly(spec.minimum, spec.reservation, spec.guard, alignment, spec.watched, found, region, why)
    if bound == NO_MAXIMUM and not spec.is_64:
        bound = WASM32_SPACE
    return reserve_in_steps(spec.minimum, bound, spec.guard, alignment, spec.watched, found, region, chosen, why)


cdef void mapped_free(memory* m) noexcept nogil:
    remove_live_memory(m)
    memory_forget_protection(m)
    if load(&held_bound) and try_hold(m):
        free_struct(m)
        return
    leave_range(m, &m.range, False)
    unmap_and_free(m)


cdef void unmap_and_free(memory* m) noexcept nogil:
    release_address_space(m.base - m.pre_guard, m.pre_guard + m.capacity + m.guard)
    free_struct(m)


cdef void free_struct(memory* m) noexcept nogil:
    refusals_release(m.refusals)
    forget_chosen(m.chosen)
    image_detach(m)
    free(m)


cdef int mapped_resident(memory* m, size_t* bytes, failure* why) noexcept nogil:
    """Takes no lock and no pin, because observers call it while other threads grow the memory.

    A growth writes the size after the base, and this function reads the size first. So from the base that it then reads
    on, at least that many bytes belong to the memory. If the base has changed meanwhile, the count may be another
    memory's, so it counts again.
    """
    cdef size_t size
    cdef char* base
    cdef int code
    while True:
        bytes[0] = 0
        size = load_size(&m.accessible)
        base = load_address(&m.base)
        code = pages.resident(base, size, bytes) if size else 0
        if load_address(&m.base) == base:
            return fail_page_call(why, code, "resident", size)


cdef int memory_resident(memory* m, size_t* bytes, failure* why) noexcept nogil:
    if m.ops.resident == NULL:
        return fail(why, E_UNSUPPORTED, "resident", 0)
    return m.ops.resident(m, bytes, why)


# -- growth in place

cdef int mapped_grow(memory* m, size_t new_size, failure* why) noexcept nogil:
    return mapped_grow_by(m, memory_size(m), new_size, why)


cdef inline int mapped_grow_by(memory* m, size_t size, size_t new_size, failure* why) noexcept nogil:
    cdef size_t page = host_page()
    cdef size_t need
    cdef int code
    if round_up(new_size, page, &need):
        return fail(why, E_OVERFLOW, "new_size", new_size)
    if need > m.capacity:
        code = grow_by_moving(m, new_size, need, why)
        if code:
            return code
    elif need > m.accessible:
        store_size(&m.opening, need)
        code = pages.commit(m.base + m.accessible, need - m.accessible)
        if code:
            code = commit_again(m.base + m.accessible, need - m.accessible, code)
            if code:
                m.opening = 0
                return fail_page_call(why, code, "commit", need - m.accessible)
    if size & (page - 1):
        # New bytes must read as zero. Native code may have written into the rest of the last accessible page.
        memset(m.base + size, 0, round_down(size, page) + page - size)
    store_size(&m.accessible, need)
    store_release(&m.size, new_size)
    store_size(&m.opening, 0)
    return 0


# -- growth past the capacity

cdef int grow_by_moving(memory* m, size_t new_size, size_t need, failure* why) noexcept nogil:
    """Move to a larger reservation while no other code uses the base. Every step that can fail comes before the old
    reservation is given up."""
    cdef layout larger
    cdef char* region
    cdef size_t chosen
    cdef size_t huge = pages.capabilities().huge_page if m.huge_pages else 0
    cdef int code = begin_move(m, new_size, why)
    if code:
        return code
    # moving_lock is a fork_lock, so it is not held here: if the OS refuses the reservation, pools take their own locks
    # to give up idle slots.
    code = reserve_in_steps(need, m.maximum, m.guard, huge, False, &larger, &region, &chosen, why)
    if code:
        if code == E_OVERFLOW:
            why.call = "new_size"
        end_move(m)
        return code
    lock(&moving_lock.held)
    code = move_to_larger(m, need, &larger, region, why)
    if code == 0:
        store_size(&m.opening, need)
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


cdef int move_to_larger(memory* m, size_t need, const layout* larger, char* region, failure* why) noexcept nogil:
    cdef char* base = region + larger.pre_guard
    cdef char* old = m.base - m.pre_guard
    cdef size_t old_total = m.pre_guard + m.capacity + m.guard
    cdef address_range old_range = m.range, new_range = range_of(region, larger)
    cdef int code
    if m.huge_pages:
        pages.advise_huge(base, larger.capacity)
    # Before a part of the old reservation is released, because another thread may then reserve the same addresses.
    move_range(m, &new_range)
    # The pages may be several mappings, because a fork or a foreign madvise() has split them. The OS refuses to move
    # such pages, and they are copied.
    if (pages.capabilities().moves and m.accessible and not m.has_moved and not image_maps_pages(m)
            and pages.move(m.base, m.accessible, base, need) == 0):
        release_address_space(old, m.pre_guard)
        release_address_space(m.base + m.accessible, old_total - m.pre_guard - m.accessible)
        m.has_moved = True
    else:
        code = pages.commit(base, need)
        if code:
            move_range(m, &old_range)
            release_address_space(region, larger.total)
            return fail_page_call(why, code, "commit", need)
        memcpy(base, m.base, m.accessible)
        release_address_space(old, old_total)
        m.has_moved = False
        image_pages_are_gone(m)
    leave_range(m, &old_range, False)
    store_address(&m.base, base)
    store_size(&m.pre_guard, larger.pre_guard)
    store_size(&m.capacity, larger.capacity)
    store_size(&m.guard, larger.guard)
    store_size(&m.covered, larger.capacity + larger.guard)
    return 0


# -- growth with prefault=True

cdef int prefaulting_grow(memory* m, size_t new_size, failure* why) noexcept nogil:
    """A growth after which every page is resident. Pages that are resident already cost almost no time."""
    cdef size_t page = host_page()
    cdef size_t first = round_down(memory_size(m), page)
    cdef size_t end, size
    cdef char* base = m.base
    cdef char* hidden = base + m.accessible
    cdef int code
    # The new size is stored only after every step has succeeded, so a failed growth changes nothing.
    if round_up(new_size, page, &end) or end <= m.accessible or end > m.capacity:
        code = mapped_grow(m, new_size, why)
        if code or m.base == base:
            return code
        pages.prefault(m.base + first, m.accessible - first)    # the move is done: if this fails, pages fault in later
        return 0
    size = end - m.accessible
    store_size(&m.opening, end)
    code = fail_page_call(why, commit_pages(hidden, size), "commit", size)
    if code == 0:
        code = fail_page_call(why, pages.prefault(hidden, size), "prefault", size)
        # Hide the pages again. If they stayed accessible, wasm could write there and the next growth would show its
        # bytes. So if the OS refuses to hide the pages, the growth succeeds.
        if code and pages.decommit(hidden, size) and pages.protect(hidden, size, pages.ACCESS_NONE):
            code = 0
    if code:
        m.opening = 0
        return code
    store_size(&m.accessible, end)
    return mapped_grow(m, new_size, why)


cdef memory_ops mapped_ops
mapped_ops.kind = "mmap"
mapped_ops.grow = mapped_grow
mapped_ops.resident = mapped_resident
mapped_ops.free = mapped_free
mapped_ops.pages_are_ours = True

cdef memory_ops prefaulting_ops
prefaulting_ops = mapped_ops
prefaulting_ops.grow = prefaulting_grow
prefaulting_ops.prefaults = True
