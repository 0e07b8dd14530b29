# Address space and pages from the OS: how much linmem reserves, and what happens if the OS refuses; a part of
# memory.pyx.

cdef inline size_t host_page() noexcept nogil:
    return pages.capabilities().page_size


# -- ranges that the OS refused to take back

cdef struct orphan:
    orphan* next
    char* addr
    size_t size

cdef orphan* orphans = NULL     # after each release that succeeds, linmem tries to release these too
cdef atomic_i64 n_orphans


cdef void release_address_space(char* addr, size_t size) noexcept nogil:
    """Release the range, or add it to `orphans` if the OS refuses: munmap fails if it has to split a mapping and the
    process has vm.max_map_count mappings already."""
    global orphans
    cdef orphan* o
    while size and pages.release(addr, size) == 0:
        size = 0
        if load(&n_orphans):
            lock(&orphans_lock.held)
            o = orphans
            if o != NULL:
                orphans = o.next
                add(&n_orphans, -1)
                addr, size = o.addr, o.size
            unlock(&orphans_lock.held)
            free(o)
    o = <orphan*>malloc(sizeof(orphan)) if size else NULL
    if o == NULL:
        return          # all was released; or malloc() failed, and the range stays reserved until the process ends
    o.addr = addr
    o.size = size
    lock(&orphans_lock.held)
    o.next = orphans
    orphans = o
    add(&n_orphans, 1)
    unlock(&orphans_lock.held)


# -- relief: before a request for pages, address space or bytes of a budget fails, idle slots of pools give some up

cdef bint (*give_relief)(int what, const void* budget, size_t size) noexcept nogil      # NULL: no pool was made


cdef void set_relief(bint (*give)(int what, const void* budget, size_t size) noexcept nogil) noexcept nogil:
    """The first pool calls this. `give` is called before a refusal that idle slots of pools may prevent."""
    global give_relief
    give_relief = give


cdef bint relieve(int what, const void* budget, size_t size) noexcept nogil:
    """`size` bytes were refused. True: idle slots have given something up, so the caller tries again. False: idle
    slots could not give up enough, so they have given up nothing. The caller holds no fork_lock."""
    cdef bint gave
    if give_relief == NULL:
        return False
    relieving()[0] += 1
    gave = give_relief(what, budget, size)
    relieving()[0] -= 1
    return gave


cdef int commit_pages(char* addr, size_t size) noexcept nogil:
    """As pages.commit(). Before it fails, idle slots give up pages. The caller holds no fork_lock."""
    return commit_again(addr, size, pages.commit(addr, size))


cdef int commit_again(char* addr, size_t size, int code) noexcept nogil:
    """code: the result of the last pages.commit() of these pages."""
    while code and relieve(RELIEF_PAGES, NULL, size):
        code = pages.commit(addr, size)
    return code


# -- reservations

cdef size_t UNCHOSEN = SIZE_MAX
cdef size_t NO_MAXIMUM = SIZE_MAX
cdef atomic_i64 chosen_bytes          # the sum of the reservations whose size linmem chose, guards included
cdef atomic_i64 chosen_memories       # the number of these reservations


cdef inline void forget_chosen(size_t chosen) noexcept nogil:
    """The memory that claim_reservation() counted is gone or could not be made."""
    if chosen:
        add(&chosen_bytes, -<long long>chosen)
        add(&chosen_memories, -1)


cdef size_t claim_reservation(size_t minimum, size_t bound, size_t guard, size_t alignment,
                              size_t* chosen) noexcept nogil:
    """Returns the size that linmem chooses. *chosen: the bytes that count for the whole reservation until
    forget_chosen(); 0 if the size is the minimum, which the caller chose. Threads that choose at the same time do not
    exceed half of the address space together."""
    cdef size_t space, left, room, want, capacity, page = host_page()
    cdef long long now
    cdef layout least
    chosen[0] = 0
    if lay_out(minimum, 0, guard, page, &least) or add_up(least.total, alignment, &least.total):
        return minimum          # the caller's reserve_exactly() then fails for the same reason
    pages.address_space(&space, &left)
    while True:
        now = load(&chosen_bytes)
        room = room_to_choose(space, left, pages.reserved(), <size_t>now)
        room = room - least.total if room > least.total else 0
        want = choose_reservation(minimum, bound, bound != NO_MAXIMUM, room, <size_t>load(&chosen_memories),
                                  pages.capabilities().memory)
        if round_up(want, page, &capacity) or capacity <= least.capacity:
            return minimum
        if compare_exchange(&chosen_bytes, now, now + <long long>(least.total - least.capacity + capacity)):
            add(&chosen_memories, 1)
            chosen[0] = least.total - least.capacity + capacity
            return want


cdef int reserve_in_steps(size_t minimum, size_t bound, size_t guard, size_t alignment, bint watched, layout* out,
                          char** region, size_t* chosen, failure* why) noexcept nogil:
    """Reserve the size that linmem chooses. If the OS refuses, reserve a small size, and then the minimum: linmem does
    not fill the gaps of other sizes that are left in the address space. *chosen: for forget_chosen()."""
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
    """The reserved range is inaccessible on return. alignment: of the base, a power of two; 0 for a host page."""
    cdef size_t lead
    cdef int code
    if lay_out(minimum, reservation, guard, host_page(), out):
        if guard > minimum and guard > reservation:
            return fail(why, E_OVERFLOW, "guard", guard)
        return fail(why, E_OVERFLOW, "minimum" if minimum >= reservation else "reserve", max(minimum, reservation))
    if alignment and add_up(out.total, alignment, &out.total):
        return fail(why, E_OVERFLOW, "reserve", reservation)
    code = pages.reserve(out.total, watched, region)
    while code and (release_held(0) or relieve(RELIEF_SPACE, NULL, out.total)):
        code = pages.reserve(out.total, watched, region)
    if code:
        return fail_reserve(why, code, out.total)
    if alignment:
        lead = (alignment - <size_t>(region[0] + out.pre_guard)) & (alignment - 1)
        out.pre_guard += lead
        out.guard += alignment - lead
    return 0


# -- for the tests: the functions that choose a size, and the counts of the chosen reservations

def _lay_out(size_t minimum, size_t reservation, size_t guard, size_t page):
    cdef layout found
    if lay_out(minimum, reservation, guard, page, &found):
        return None
    return found


def _choose_reservation(size_t minimum, maximum, size_t room, size_t others, size_t memory):
    cdef size_t bound
    check_optional_size(maximum, "maximum", &bound)
    return choose_reservation(minimum, bound, bound != NO_MAXIMUM, room, others, memory)


def _room_to_choose(size_t space, size_t left, size_t reserved, size_t chosen):
    return room_to_choose(space, left, reserved, chosen)


def _chosen():
    """The bytes and the number of the reservations whose size linmem chose."""
    return load(&chosen_bytes), load(&chosen_memories)
