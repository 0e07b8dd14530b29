# Which pages of a memory have another access than "rw"; a part of memory.pyx.
#
# The accesses of a memory are a step function of the offset. It is kept as its borders, in order: `offset | access`
# says that from `offset` on the access is `access`. Before the first border the access is "rw", and from the last
# border on it is "rw" again. Two neighbours never have the same access.
#
# The borders stand in an array with a gap, so that a loop that protects page after page, in either direction, moves
# few of them.
#
# m.protection is what everybody looks at first:
#   PROTECTION_NONE     every page is "rw", and there is no table
#   PROTECTION_KNOWN    the table says which page has which access
#   PROTECTION_UNKNOWN  a change is under way; or it was when a thread vanished in a fork, or could not be ended. Then
#                       the borders mean nothing: they may be half written.
# The word and the table change with the memory's lock held. A thread that sees during an access (begin_access) that the
# memory is not guarded may touch every page: a change waits until the accesses have ended that it may have overtaken.

cdef enum:
    ACCESS_UNKNOWN = 7              # beside the ACCESS_ constants of pages.pxd: a refused change left the page so
    ACCESS_MASK = 7                 # a host page has more bytes than that

    # Sets of accesses.
    READABLE = 1 << pages.ACCESS_READ | 1 << pages.ACCESS_READ_WRITE | 1 << pages.ACCESS_READ_EXECUTE
    WRITABLE = 1 << pages.ACCESS_READ_WRITE
    NOT_WRITABLE = 1 << pages.ACCESS_NONE | 1 << pages.ACCESS_READ | 1 << pages.ACCESS_READ_EXECUTE

    DOUBTS = 16                     # ranges that a refused change may leave unknown, before all of it is
    SPARE_BORDERS = 2 * DOUBTS + 4  # that one change may add

# Exists while the memory has protected pages.
cdef struct protections:
    memory* of
    size_t* borders
    size_t n
    size_t gap                      # borders before the gap
    size_t room
    protections* next               # of the tables of all memories
    protections* previous

cdef protections* all_protections = NULL
cdef word n_protections
cdef fork_lock protections_lock     # all_protections, and which memory has a table


cdef inline size_t border(const protections* p, size_t i) noexcept nogil:
    return p.borders[i if i < p.gap else i + (p.room - p.n)]


cdef inline int access_before(const protections* p, size_t i) noexcept nogil:
    """The access just before the i-th border."""
    return <int>(border(p, i - 1) & ACCESS_MASK) if i else <int>pages.ACCESS_READ_WRITE


cdef size_t first_border(const protections* p, size_t offset) noexcept nogil:
    """The first border at `offset` or behind it; p.n: none is."""
    cdef size_t low = 0, high = p.n, middle
    while low < high:
        middle = low + ((high - low) >> 1)
        if border(p, middle) & ~<size_t>ACCESS_MASK < offset:
            low = middle + 1
        else:
            high = middle
    return low


cdef int make_room(protections* p) noexcept nogil:
    """Room for one change; 0, or E_NO_MEMORY and nothing has changed."""
    cdef size_t room = p.n + (p.n >> 1) + SPARE_BORDERS
    cdef size_t* more
    if p.room - p.n >= SPARE_BORDERS:
        return 0
    more = <size_t*>malloc(room * sizeof(size_t))
    if more == NULL:
        return E_NO_MEMORY
    if p.n:
        memcpy(more, p.borders, p.gap * sizeof(size_t))
        memcpy(more + room - (p.n - p.gap), p.borders + p.room - (p.n - p.gap), (p.n - p.gap) * sizeof(size_t))
    free(p.borders)
    p.borders = more
    p.room = room
    return 0


cdef void set_access(protections* p, size_t start, size_t end, int access) noexcept nogil:
    """There is room, and start < end."""
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


cdef bint find_other(const protections* p, size_t start, size_t end, int allowed, size_t* at,
                     int* access) noexcept nogil:
    """Whether a page of [start, end) has an access that is not in the set `allowed`; the first one, and its access."""
    cdef size_t i = first_border(p, start + 1)
    access[0] = access_before(p, i)
    at[0] = start
    while at[0] < end:
        if not allowed >> access[0] & 1:
            return True
        if i == p.n:
            return False
        at[0] = border(p, i) & ~<size_t>ACCESS_MASK
        access[0] = <int>(border(p, i) & ACCESS_MASK)
        i += 1
    return False


# -- questions: with the memory's lock held ------------------------------------------------------

cdef inline bint is_guarded(memory* m) noexcept nogil:
    """Whether a touch may fault; needs no lock. One look at one word while no memory of the process is protected."""
    return load(&n_protections) != 0 and (load(&m.protection) != PROTECTION_NONE or not m.ops.pages_are_ours)


cdef bint memory_has_other(memory* m, size_t offset, size_t size, int allowed, size_t* at, int* access) noexcept nogil:
    """As find_other, of any memory."""
    cdef long long state = load(&m.protection)
    if state == PROTECTION_NONE or size == 0:
        return False
    if state == PROTECTION_UNKNOWN:
        at[0] = offset
        access[0] = ACCESS_UNKNOWN
        return True
    return find_other(m.protections, offset, offset + size, allowed, at, access)


cdef int refuse_access(memory* m, size_t offset, size_t size, int allowed, const char* call,
                       failure* why) noexcept nogil:
    """0, or a failure: a page of the range has none of the accesses that the call needs."""
    cdef size_t at
    cdef int access
    if not m.ops.pages_are_ours:
        return refuse_foreign(m.base + offset, size, allowed, call, why)
    if not memory_has_other(m, offset, size, allowed, &at, &access):
        return 0
    fail(why, E_PROTECTED, call, size, offset)
    describe_protection(m, at, access, why)
    return E_PROTECTED


cdef int refuse_protected(memory* m, int allowed, const char* call, failure* why) noexcept nogil:
    """The same, for the calls that concern the whole memory."""
    cdef size_t at
    cdef int access
    if not m.ops.pages_are_ours:
        if refuse_foreign(m.base, memory_size(m), allowed, call, why) == 0:
            return 0
        fail(why, E_UNSUPPORTED, call, 0)
        snprintf(why.detail, sizeof(why.detail), "with protected pages, which the memory has that this one is made of")
        return E_UNSUPPORTED
    if not memory_has_other(m, 0, memory_size(m), allowed, &at, &access):
        return 0
    return unsupported_protection(m, at, access, call, why)


cdef int unsupported_protection(memory* m, size_t at, int access, const char* call, failure* why) noexcept nogil:
    fail(why, E_UNSUPPORTED, call, 0)
    snprintf(why.detail, sizeof(why.detail), "with protected pages: ")
    describe_protection(m, at, access, why)
    return E_UNSUPPORTED


cdef void describe_protection(memory* m, size_t at, int access, failure* why) noexcept nogil:
    """Appended to what why.detail says: the page that is in the way, and what to do."""
    cdef size_t whole = round_down(memory_size(m), pages.capabilities().page_size)
    cdef size_t used = strlen(why.detail)
    at = round_down(at, pages.capabilities().page_size)
    if access == ACCESS_UNKNOWN:
        snprintf(why.detail + used, sizeof(why.detail) - used, "the access of the page at %zu is not known, because a"
                 " protect() was refused or did not end; protect(0, %zu, 'rw') gives all pages a known one", at, whole)
    else:
        snprintf(why.detail + used, sizeof(why.detail) - used, "the page at %zu has the access '%s';"
                 " protect(0, %zu, 'rw') gives all pages back theirs", at, access_name(access), whole)


cdef const char* access_name(int access) noexcept nogil:
    if access == pages.ACCESS_NONE:
        return "none"
    if access == pages.ACCESS_READ:
        return "r"
    return "rx" if access == pages.ACCESS_READ_EXECUTE else "rw"


cdef int is_read_only(memory* m, bint* answer, failure* why) noexcept nogil:
    """Whether no byte of the memory can be written. Takes the lock; a code where it cannot be had."""
    cdef size_t at
    cdef int access, code
    cdef bint writable
    answer[0] = False
    if load(&m.protection) == PROTECTION_NONE or memory_size(m) == 0:
        return 0
    code = lock_memory(m, why)
    if code:
        return code
    writable = (load(&m.protection) == PROTECTION_NONE
                or memory_has_other(m, 0, memory_size(m), NOT_WRITABLE, &at, &access))
    unlock(&m.lock)
    answer[0] = not writable
    return 0


cdef memory* find_protected(const char* at, size_t size) noexcept nogil:
    """The memory with protected pages that holds a byte of the range, or NULL. Who keeps the bytes keeps the memory."""
    cdef protections* p
    cdef memory* m = NULL
    if load(&n_protections) == 0 or size == 0:
        return NULL
    acquire(&protections_lock.held)
    p = all_protections
    while p != NULL and m == NULL:
        if at < p.of.base + peek(&p.of.accessible) and p.of.base < at + size:
            m = p.of
        p = p.next
    unlock(&protections_lock.held)
    return m


cdef int refuse_foreign(const char* at, size_t size, int allowed, const char* call, failure* why) noexcept nogil:
    """For bytes that came from anywhere, as a buffer of any kind or the base of a Python memory: a failure where they
    are protected pages of one of linmem's memories. The caller sees to it that the bytes stay, does not hold
    that memory's lock, and leaves it to its user that nobody protects them meanwhile."""
    cdef memory* m = find_protected(at, size)
    cdef size_t start
    cdef int code
    if m == NULL:
        return 0
    code = lock_memory(m, why)
    if code:
        return code
    start = <size_t>(at - m.base) if at > m.base else 0
    code = refuse_access(m, start, <size_t>(at + size - m.base) - start, allowed, call, why)
    unlock(&m.lock)
    return code


# -- changes: with the memory's lock held --------------------------------------------------------

cdef int begin_change(memory* m, failure* why) noexcept nogil:
    """m.protections exists and has room for one change, and the memory says that its protection is unknown, until
    end_change(). Refused, nothing has changed."""
    global all_protections
    cdef long long was = load(&m.protection)
    cdef protections* p = m.protections
    store(&m.protection, PROTECTION_UNKNOWN)
    if p == NULL:
        p = <protections*>calloc(1, sizeof(protections))
        if p == NULL or make_room(p):
            free(p)
            store(&m.protection, was)
            return fail(why, E_NO_MEMORY, "calloc", sizeof(protections))
        p.of = m
        acquire(&protections_lock.held)
        p.next = all_protections
        if p.next != NULL:
            p.next.previous = p
        all_protections = p
        m.protections = p
        add(&n_protections, 1)
        unlock(&protections_lock.held)
    else:
        if was == PROTECTION_UNKNOWN:       # of a thread that has vanished, and nothing to free() either
            p.borders = NULL
            p.n = p.gap = p.room = 0
        if make_room(p):
            store(&m.protection, was)
            return fail(why, E_NO_MEMORY, "malloc", p.n * sizeof(size_t))
    if was == PROTECTION_UNKNOWN:
        set_access(p, 0, round_down(memory_size(m), pages.capabilities().page_size), ACCESS_UNKNOWN)
    return 0


cdef void end_change(memory* m) noexcept nogil:
    if m.protections.n == 0:
        drop_protections(m, True)
        store(&m.protection, PROTECTION_NONE)
    else:
        store(&m.protection, PROTECTION_KNOWN)


cdef void drop_protections(memory* m, bint is_whole) noexcept nogil:
    """The table goes, as all pages are "rw" or the memory goes. is_whole: no vanished thread was changing it."""
    global all_protections
    cdef protections* p = m.protections
    if p == NULL:
        return
    acquire(&protections_lock.held)
    if p.next != NULL:
        p.next.previous = p.previous
    if p.previous != NULL:
        p.previous.next = p.next
    else:
        all_protections = p.next
    m.protections = NULL
    add(&n_protections, -1)
    unlock(&protections_lock.held)
    if is_whole:
        free(p.borders)
    free(p)


cdef int memory_protect(memory* m, size_t start, size_t size, int access, failure* why) noexcept nogil:
    """Whole pages of a memory whose pages are ours. Refused, each page has the access that it had, or the table says
    that its access is unknown."""
    cdef int code = begin_change(m, why)
    if code:
        return code
    code = wait_for_accesses(m, why)
    if code:
        end_change(m)
        return code
    code = pages.protect(m.base + start, size, access)
    if code == 0:
        set_access(m.protections, start, start + size, access)
    else:
        fail_page_call(why, code, "protect", size)
        undo_protect(m, start, start + size)
    end_change(m)
    return code


cdef void undo_protect(memory* m, size_t start, size_t end) noexcept nogil:
    """A part of the range may have the new access: each page gets back the one that the table says."""
    cdef protections* p = m.protections
    cdef size_t at = start, next, i
    cdef int access, doubts = DOUBTS
    while at < end:
        i = first_border(p, at + 1)
        access = access_before(p, i)
        next = border(p, i) & ~<size_t>ACCESS_MASK if i < p.n else end
        if next > end:
            next = end
        if access != ACCESS_UNKNOWN and not give_access(m, at, next, access, &doubts):
            set_access(p, start, end, ACCESS_UNKNOWN)
            return
        at = next


cdef bint give_access(memory* m, size_t start, size_t end, int access, int* doubts) noexcept nogil:
    """Ask for the whole, then for its halves, as one page that is refused need not be a doubt about the others. False:
    there are more doubts than are told apart."""
    cdef size_t middle, page = pages.capabilities().page_size
    if pages.protect(m.base + start, end - start, access) == 0:
        return True
    if doubts[0] == 0:
        return False
    if end - start == page:
        doubts[0] -= 1
        set_access(m.protections, start, end, ACCESS_UNKNOWN)
        return True
    middle = start + round_down((end - start) >> 1, page)
    return give_access(m, start, middle, access, doubts) and give_access(m, middle, end, access, doubts)


cdef int memory_unprotect(memory* m, size_t size) noexcept nogil:
    """For who owns the memory alone: the first `size` bytes, which are all that can be protected, are "rw" again. Or a
    code, and the memory says that its protection is unknown."""
    cdef long long was = load(&m.protection)
    cdef failure why
    cdef int code
    if not m.ops.pages_are_ours:        # nor is what their memory's user does with them
        return refuse_foreign(m.base, size, WRITABLE, "reset", &why)
    if was == PROTECTION_NONE:
        return 0
    code = pages.protect(m.base, size, pages.ACCESS_READ_WRITE)
    drop_protections(m, was == PROTECTION_KNOWN)
    store(&m.protection, PROTECTION_UNKNOWN if code else PROTECTION_NONE)
    return code


cdef void memory_forget_protection(memory* m) noexcept nogil:
    """For who owns the memory alone: all its pages have been decommitted."""
    cdef long long was = load(&m.protection)
    if was != PROTECTION_NONE:
        drop_protections(m, was == PROTECTION_KNOWN)
        store(&m.protection, PROTECTION_NONE)


cdef void memory_doubt(memory* m) noexcept nogil:
    """For who owns the memory alone: some pages may be inaccessible."""
    store(&m.protection, PROTECTION_UNKNOWN)


list_lock(&protections_lock)
