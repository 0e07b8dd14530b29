# Which pages of a memory have another access than "rw", and memory_protect(); a part of memory.pyx.
#
# The access is a step function of the offset. The table keeps its borders in order: the border `offset | access` says
# that the pages from `offset` on have this access, up to the next border. The pages before the first border and the
# pages after the last border are "rw". Two neighbouring ranges always have different accesses.
#
# The borders stand in an array with a gap, so that a loop that protects page after page, in either direction, moves few
# of them.
#
# m.protection says whether the table is valid:
#   PROTECTION_NONE     every page is "rw", and there is no table
#   PROTECTION_KNOWN    the table says which page has which access
#   PROTECTION_UNKNOWN  a change is under way, or a change was not completed: its thread does not exist in a forked
#                       child, or the OS refused to undo the change. The borders may be half written, and are not used.
# m.protection and the table are changed only with the memory's lock held. If is_guarded() returns False to a thread
# after begin_access(), the thread may touch every page until it ends the access: a change waits until all accesses that
# began earlier have ended.

from linmem._core.linked_list cimport link, list_add_first, list_init, list_remove

cdef enum:
    ACCESS_UNKNOWN = 7              # in addition to the ACCESS_ constants of pages.pxd: the OS refused to undo a change
    ACCESS_MASK = 7                 # the low bits of a border: offsets of host pages do not use them

    # Sets of accesses: the bit 1 << access.
    READABLE = 1 << pages.ACCESS_READ | 1 << pages.ACCESS_READ_WRITE | 1 << pages.ACCESS_READ_EXECUTE
    WRITABLE = 1 << pages.ACCESS_READ_WRITE
    NOT_WRITABLE = 1 << pages.ACCESS_NONE | 1 << pages.ACCESS_READ | 1 << pages.ACCESS_READ_EXECUTE

    # If the OS refuses a change, and then refuses to undo the change for more pages than this, the access of the whole
    # range becomes unknown.
    UNKNOWN_RANGES = 16
    SPARE_BORDERS = 2 * UNKNOWN_RANGES + 4  # borders that one change may add

# Exists while the memory has protected pages.
cdef struct protections:
    memory* of
    size_t* borders
    size_t n
    size_t gap                      # the number of borders before the gap
    size_t room
    link listed                     # in all_protections

cdef link all_protections
cdef atomic_i64 n_protections
cdef fork_lock protections_lock     # for all_protections and every m.protections


cdef inline size_t border(const protections* p, size_t i) noexcept nogil:
    return p.borders[i if i < p.gap else i + (p.room - p.n)]


cdef inline size_t border_offset(const protections* p, size_t i) noexcept nogil:
    """SIZE_MAX: there is no i-th border."""
    return border(p, i) & ~<size_t>ACCESS_MASK if i < p.n else SIZE_MAX


cdef inline int access_before(const protections* p, size_t i) noexcept nogil:
    """The access just before the i-th border."""
    return <int>(border(p, i - 1) & ACCESS_MASK) if i else <int>pages.ACCESS_READ_WRITE


cdef size_t first_border(const protections* p, size_t offset) noexcept nogil:
    """The index of the first border at or after `offset`; p.n if there is no such border."""
    cdef size_t low = 0, high = p.n, middle
    while low < high:
        middle = low + ((high - low) >> 1)
        if border_offset(p, middle) < offset:
            low = middle + 1
        else:
            high = middle
    return low


cdef int make_room(protections* p, failure* why) noexcept nogil:
    """Make room for one change. A code: the table has not changed."""
    cdef size_t behind = p.n - p.gap, room = p.n + (p.n >> 1) + SPARE_BORDERS
    cdef size_t* more
    if p.room - p.n >= SPARE_BORDERS:
        return 0
    more = <size_t*>realloc(p.borders, room * sizeof(size_t))
    if more == NULL:
        return fail(why, E_NO_MEMORY, "realloc", room * sizeof(size_t))
    memmove(more + room - behind, more + p.room - behind, behind * sizeof(size_t))
    p.borders = more
    p.room = room
    return 0


cdef void set_access(protections* p, size_t start, size_t end, int access) noexcept nogil:
    """The pages start .. end have the access from now on. make_room() has succeeded, and start < end."""
    cdef size_t low = first_border(p, start), high = first_border(p, end + 1)
    cdef int before = access_before(p, low), after = access_before(p, high)
    cdef size_t shift = p.room - p.n
    if low < p.gap:
        memmove(p.borders + low + shift, p.borders + low, (p.gap - low) * sizeof(size_t))
    else:
        memmove(p.borders + p.gap, p.borders + p.gap + shift, (low - p.gap) * sizeof(size_t))
    p.gap = low
    p.n -= high - low
    if access != before:
        p.borders[p.gap] = start | <size_t>access
        p.gap += 1
        p.n += 1
    if access != after:
        p.borders[p.gap] = end | <size_t>after
        p.gap += 1
        p.n += 1


# -- functions that read the table: the caller holds the memory's lock

cdef inline bint is_guarded(memory* m) noexcept nogil:
    """Whether an access may fault. Needs no lock. Reads one variable while no memory of the process is protected."""
    return load(&n_protections) != 0 and (load(&m.protection) != PROTECTION_NONE or not m.ops.pages_are_ours)


cdef bint memory_has_other(memory* m, size_t offset, size_t size, int allowed, size_t* first,
                           int* access) noexcept nogil:
    """Whether a page of the range has an access that is not in the set `allowed`. *first, *access: the first such
    page."""
    cdef protections* p = m.protections
    cdef size_t i, end = offset + size
    first[0] = offset
    if load(&m.protection) == PROTECTION_READ_ONLY:
        access[0] = pages.ACCESS_READ
        return size != 0 and not allowed >> pages.ACCESS_READ & 1
    access[0] = ACCESS_UNKNOWN
    if load(&m.protection) != PROTECTION_KNOWN or size == 0:
        return load(&m.protection) == PROTECTION_UNKNOWN and size != 0
    i = first_border(p, offset + 1)
    access[0] = access_before(p, i)
    while allowed >> access[0] & 1:
        first[0] = border_offset(p, i)
        if first[0] >= end:
            return False
        i += 1
        access[0] = access_before(p, i)
    return True


cdef int refuse_access(memory* m, size_t offset, size_t size, int allowed, const char* call,
                       failure* why) noexcept nogil:
    """A failure if a page of the range has an access that is not in the set `allowed`."""
    if not m.ops.pages_are_ours:
        return refuse_foreign(m.base + offset, size, allowed, call, why)
    return refuse_own(m, offset, size, allowed, E_PROTECTED, call, why)


cdef int refuse_protected(memory* m, int allowed, const char* call, failure* why) noexcept nogil:
    """As refuse_access(), for calls on the whole memory."""
    if not m.ops.pages_are_ours:
        if refuse_foreign(m.base, memory_size(m), allowed, call, why) == 0:
            return 0
        fail(why, E_UNSUPPORTED, call, 0)
        snprintf(why.detail, sizeof(why.detail), "with protected pages, which the memory has that this one is made of")
        return why.code
    return unsupported_on(m, 0, memory_size(m), allowed, call, why)


cdef int unsupported_on(memory* m, size_t offset, size_t size, int allowed, const char* call,
                        failure* why) noexcept nogil:
    """As refuse_access() for linmem's own pages; the failure is that the call is not supported."""
    return refuse_own(m, offset, size, allowed, E_UNSUPPORTED, call, why)


cdef int refuse_own(memory* m, size_t offset, size_t size, int allowed, int code, const char* call,
                    failure* why) noexcept nogil:
    """As refuse_access() for linmem's own pages, with this code. The failure says which page is in the way, and what
    the caller can do."""
    cdef size_t first, whole = round_down(memory_size(m), host_page())
    cdef const char* lead = "with protected pages: " if code == E_UNSUPPORTED else ""
    cdef int access
    if not memory_has_other(m, offset, size, allowed, &first, &access):
        return 0
    first = round_down(first, host_page())
    fail(why, code, call, size, offset)
    if load(&m.protection) == PROTECTION_READ_ONLY:
        snprintf(why.detail, sizeof(why.detail), "%sthe memory was opened for reading", lead)
    elif access == ACCESS_UNKNOWN:
        snprintf(why.detail, sizeof(why.detail), "%sthe access of the page at %zu is not known, because a protect() was"
                 " refused or did not end; protect(0, %zu, 'rw') gives all pages a known one", lead, first, whole)
    else:
        snprintf(why.detail, sizeof(why.detail), "%sthe page at %zu has the access '%s'; protect(0, %zu, 'rw') makes"
                 " all pages writable", lead, first, access_name(access), whole)
    return code


cdef const char* access_name(int access) noexcept nogil:
    return ("none" if access == pages.ACCESS_NONE else "r" if access == pages.ACCESS_READ else
            "rx" if access == pages.ACCESS_READ_EXECUTE else "rw")


cdef int is_read_only(memory* m, bint* answer, failure* why) noexcept nogil:
    """Whether no byte of the memory can be written. Takes the lock; fails as lock_memory() does."""
    cdef failure unused
    cdef int code
    answer[0] = False
    if load(&m.protection) == PROTECTION_NONE or memory_size(m) == 0:
        return 0
    code = lock_memory(m, why)
    if code == 0:
        answer[0] = (load(&m.protection) != PROTECTION_NONE
                     and refuse_access(m, 0, memory_size(m), NOT_WRITABLE, "write", &unused) == 0)
        unlock(&m.lock)
    return code


cdef memory* find_protected(const char* start, size_t size) noexcept nogil:
    """The memory with protected pages that holds a byte of the range, or NULL. The caller keeps the bytes alive, and
    so the memory."""
    cdef link* each
    cdef memory* m
    cdef memory* found = NULL
    if load(&n_protections) == 0 or size == 0:
        return NULL
    lock(&protections_lock.held)
    each = all_protections.next
    while each.owner != NULL and found == NULL:
        m = (<protections*>each.owner).of
        if start < m.base + load_size(&m.accessible) and m.base < start + size:
            found = m
        each = each.next
    unlock(&protections_lock.held)
    return found


cdef int refuse_foreign(const char* start, size_t size, int allowed, const char* call, failure* why) noexcept nogil:
    """For bytes of unknown origin (a buffer, or the base of a Python memory): a failure if they lie in pages of a
    linmem memory whose access is not in the set `allowed`. The caller keeps the bytes alive and does not hold that
    memory's lock. The user must not protect the pages after this call."""
    cdef memory* m = find_protected(start, size)
    cdef size_t first
    cdef int code
    if m == NULL:
        return 0
    code = lock_memory(m, why)
    if code == 0:
        first = <size_t>(start - m.base) if start > m.base else 0
        code = refuse_access(m, first, <size_t>(start + size - m.base) - first, allowed, call, why)
        unlock(&m.lock)
    return code


# -- functions that change the table: the caller holds the memory's lock

cdef int begin_change(memory* m, failure* why) noexcept nogil:
    """Until end_change(), m.protections exists and has room for one change, and m.protection is PROTECTION_UNKNOWN. If
    this fails, nothing has changed."""
    cdef long long was = load(&m.protection)
    cdef protections* p = m.protections
    cdef int code
    store(&m.protection, PROTECTION_UNKNOWN)
    if p == NULL:
        p = <protections*>calloc(1, sizeof(protections))
    elif was == PROTECTION_UNKNOWN:
        # A thread that does not exist in this forked child may have left the pointer half written, so no free().
        p.borders = NULL
        p.n = p.gap = p.room = 0
    code = make_room(p, why) if p != NULL else fail(why, E_NO_MEMORY, "calloc", sizeof(protections))
    if code:
        if m.protections == NULL:
            free(p)
        store(&m.protection, was)
        return code
    if m.protections == NULL:
        p.of = m
        lock(&protections_lock.held)
        list_add_first(&all_protections, &p.listed, p)
        m.protections = p
        add(&n_protections, 1)
        unlock(&protections_lock.held)
    if was == PROTECTION_UNKNOWN:
        set_access(p, 0, round_down(memory_size(m), host_page()), ACCESS_UNKNOWN)
    return 0


cdef void end_change(memory* m) noexcept nogil:
    store(&m.protection, PROTECTION_KNOWN)
    if m.protections.n == 0:
        memory_forget_protection(m)


cdef void memory_forget_protection(memory* m) noexcept nogil:
    """Every page is "rw", or the memory is being freed, or the caller owns the memory exclusively and has decommitted
    all its pages."""
    cdef protections* p = m.protections
    cdef bint is_whole = load(&m.protection) == PROTECTION_KNOWN
    if p != NULL:
        store(&m.protection, PROTECTION_UNKNOWN)    # for a child that is forked before the end: it may have no table
        lock(&protections_lock.held)
        list_remove(&p.listed)
        m.protections = NULL
        add(&n_protections, -1)
        unlock(&protections_lock.held)
        # If the state was PROTECTION_UNKNOWN, a thread that does not exist in this forked child may have left the
        # pointer half written.
        if is_whole:
            free(p.borders)
        free(p)
    store(&m.protection, PROTECTION_NONE)


cdef int memory_protect(memory* m, size_t offset, size_t size, int access, failure* why) noexcept nogil:
    """Give whole host pages an access. If the OS refuses, each page keeps its former access, or the table says that
    the page's access is unknown."""
    cdef size_t page = host_page()
    cdef bint is_offset = offset & (page - 1) != 0
    cdef int code
    if (offset | size) & (page - 1):
        return fail_text(why, E_VALUE, "%s must be a multiple of the host page (%zu), got %zu",
                         "offset" if is_offset else "size", page, offset if is_offset else size)
    code = begin_page_call(m, "protect", offset, size, why)
    if code:
        return code
    if size and load(&m.owner) == OWNER_WASMTIME and access != pages.ACCESS_READ_WRITE:
        code = fail(why, E_OWNED, "protect", size)
        snprintf(why.detail, sizeof(why.detail), "its pages stay \"rw\", because memory.fill, memory.copy and WASI"
                 " calls of the guest run in native code, where a fault ends the process")
    elif size and load(&m.protection) == PROTECTION_READ_ONLY:
        code = unsupported_on(m, offset, size, 0, "protect", why)
    elif size:
        code = change_access(m, offset, size, access, why)
    unlock(&m.lock)
    return code


cdef int begin_page_call(memory* m, const char* call, size_t offset, size_t size, failure* why) noexcept nogil:
    """Checks for calls on a range of pages, and takes the memory's lock. A code: the lock is not taken."""
    if not m.ops.pages_are_ours:
        fail(why, E_UNSUPPORTED, call, size)
        snprintf(why.detail, sizeof(why.detail), "by a memory of kind '%s': its pages are not linmem's", m.ops.kind)
        return E_UNSUPPORTED
    return lock_memory(m, why) if is_within(m, offset, size) else fail_range(m, offset, size, why)


cdef int change_access(memory* m, size_t start, size_t size, int access, failure* why) noexcept nogil:
    cdef int code = begin_change(m, why)
    if code:
        return code
    code = wait_for_accesses(m, why)
    if code == 0:
        code = fail_page_call(why, pages.protect(m.base + start, size, access), "protect", size)
        if code == 0:
            set_access(m.protections, start, start + size, access)
        else:
            undo_protect(m, start, start + size)
    end_change(m)
    return code


cdef void undo_protect(memory* m, size_t start, size_t end) noexcept nogil:
    """A part of the range may have the new access already. Gives each page the access that the table says."""
    cdef protections* p = m.protections
    cdef size_t offset = start, next, i
    cdef int access, left = UNKNOWN_RANGES
    while offset < end:
        i = first_border(p, offset + 1)
        access = access_before(p, i)
        next = min(border_offset(p, i), end)
        if access != ACCESS_UNKNOWN and not give_access(m, offset, next, access, &left):
            set_access(p, start, end, ACCESS_UNKNOWN)
            return
        offset = next


cdef bint give_access(memory* m, size_t start, size_t end, int access, int* left) noexcept nogil:
    """Asks the OS for the whole range, and if the OS refuses, for each half. So only the pages that the OS refuses get
    an unknown access. False: more than *left pages would become unknown."""
    cdef size_t middle, page = host_page()
    if pages.protect(m.base + start, end - start, access) == 0:
        return True
    if left[0] == 0:
        return False
    if end - start == page:
        left[0] -= 1
        set_access(m.protections, start, end, ACCESS_UNKNOWN)
        return True
    middle = start + round_down((end - start) >> 1, page)
    return give_access(m, start, middle, access, left) and give_access(m, middle, end, access, left)


cdef int memory_unprotect(memory* m, size_t size) noexcept nogil:
    """The caller owns the memory exclusively. The first `size` bytes become "rw" again; no other bytes can be
    protected. A code: the memory's protection is unknown."""
    cdef failure why
    cdef int code
    if not m.ops.pages_are_ours:        # another linmem memory may own the pages, and its user may protect them
        return refuse_foreign(m.base, size, WRITABLE, "reset", &why)
    if load(&m.protection) == PROTECTION_NONE:
        return 0
    code = pages.protect(m.base, size, pages.ACCESS_READ_WRITE)
    memory_forget_protection(m)
    if code:
        memory_protection_becomes_unknown(m)
    return code


cdef void memory_protection_becomes_unknown(memory* m) noexcept nogil:
    """The caller owns the memory exclusively. Some pages may be inaccessible."""
    store(&m.protection, PROTECTION_UNKNOWN)


cdef void make_read_only(memory* m) noexcept nogil:
    """The memory is being made, and its pages are "r"."""
    add(&n_protections, 1)
    store(&m.protection, PROTECTION_READ_ONLY)


cdef void forget_read_only(memory* m) noexcept nogil:
    """The memory is being freed."""
    if load(&m.protection) == PROTECTION_READ_ONLY:
        store(&m.protection, PROTECTION_NONE)
        add(&n_protections, -1)


list_init(&all_protections)
register_fork_lock(&protections_lock)
