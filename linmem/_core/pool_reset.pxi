# How the pages of a slot become zero again: plan, run and record a reset; cool a slot and warm it up. Part of pool.pyx.
#
# No lock is held. The thread that dropped the memory owns the slot.

cdef enum:
    ADAPTIVE = 3                # continues the RESET_ kinds of reset_policy.pxd
    PAGE_BITS = 12              # reset_policy counts runs of 4096 bytes
    USES_TO_EMPTY = 32          # a slot in constant use gives its pages back after idle_seconds and this many uses
    TABLE = 1 << 12             # bytes of a page table
    TABLE_SPAN = 1 << 21        # bytes that a page table maps; a constant, because division by a variable is slow
    UPPER_SPAN = 1 << 30        # bytes that a table of the next level maps; a constant for the same reason
    TABLES_UNCOUNTED = 8 << 20  # bytes: a slot of up to this size counts as having all its page tables

cdef size_t WIDE_MOST = 1 << 18         # bytes: a memory up to this size is probably in the cache
cdef size_t WIDE_IF_EQUAL = 1 << 15     # bytes: wide_most where a sample takes the same time either way
cdef size_t ZERO_UNSEEN = 1 << 18       # bytes: without scans, zeroing up to this size costs no more than giving back
cdef size_t ZERO_STEP = 1 << 20         # bytes that are zeroed between two looks at the clock
cdef size_t WORTH_EMPTYING = 1 << 20    # bytes: a slot in constant use keeps its pages if they are not more than this

_RESETS = ("scan", "zero", "discard", "adaptive")       # names of the RESET_ kinds, and of ADAPTIVE

# The decisions before a reset begins.
cdef struct reset_plan:
    int how                 # RESET_
    bint adaptive           # after a scan the policy decides again
    bint copied             # the image was copied in: which pages still hold its bytes is unknown
    size_t bound            # if more bytes were touched, all pages are given back
    size_t hidden           # bytes that are hidden since earlier guests, and that this guest has not grown into
    long long deadline      # if zeroing is not over by then, all pages are given back; 0: none
    const reset_costs* costs

# The result of a reset.
cdef struct reset_result:
    int how                 # RESET_, the kind that was done
    size_t touched          # bytes; 0: unknown
    size_t kept             # resident bytes; where huge pages are allowed, rounded up to whole huge pages
    size_t kept_grown       # of these, bytes beyond `initial`
    size_t tables           # bytes of page tables
    size_t zeroed


cdef inline unsigned int in_pages(size_t size) noexcept nogil:
    return <unsigned int>min(size >> PAGE_BITS, <size_t>ANY)


cdef inline size_t beyond(size_t size, size_t bound) noexcept nogil:
    return size - bound if size > bound else 0


cdef inline size_t cover(size_t start, size_t end, size_t unit, size_t* reached) noexcept nogil:
    """Bytes of the units that contain start .. end, without the units that an earlier call with *reached counted."""
    start = max(start & ~(unit - 1), reached[0])
    end = (end + unit - 1) & ~(unit - 1)
    if end <= start:
        return 0
    reached[0] = end
    return end - start


cdef inline size_t most_tables(const slot* s, size_t size) noexcept nogil:
    """The most bytes that the page tables of the slot's first `size` bytes take."""
    cdef size_t first = <size_t>s.original.base, last = first + size - 1
    if size == 0:
        return 0
    return (2 + last // TABLE_SPAN - first // TABLE_SPAN + last // UPPER_SPAN - first // UPPER_SPAN) * TABLE


cdef size_t count_tables(slot* s) noexcept nogil:
    """Bytes of the page tables of all pages that are present, also of hidden pages and of pages that were only read.
    The most that these can be, if the slot is small or the OS does not say which pages are present."""
    cdef size_t most = most_tables(s, s.pages.committed), tables = 0, reached = 0, reached_upper = 0, start, end, n, i
    cdef char* next = s.original.base
    cdef pages.span runs[RUNS]
    if s.pages.committed <= TABLES_UNCOUNTED or s.tables >= most:
        return most
    while next < s.original.base + s.pages.committed:
        n = RUNS
        if pages.present(next, <size_t>(s.original.base + s.pages.committed - next), runs, &n, &next):
            return most
        for i in range(n):
            start = <size_t>runs[i].addr
            end = start + runs[i].size
            tables += cover(start, end, TABLE_SPAN, &reached) // TABLE_SPAN * TABLE
            tables += cover(start, end, UPPER_SPAN, &reached_upper) // UPPER_SPAN * TABLE
    return tables


cdef void plan_reset(slot* s, size_t used, long long now, reset_plan* plan) noexcept nogil:
    cdef pool* p = s.pool
    plan.how = p.reset
    plan.adaptive = False
    plan.bound = SIZE_MAX
    plan.costs = &costs if s.image == NULL else &copying_costs
    plan.copied = image_is_copied(s.m)
    plan.hidden = min(s.pages.hidden, s.pages.committed - used)
    plan.deadline = 0
    if plan.how == ADAPTIVE:
        if p.idle_ns and s.uses >= USES_TO_EMPTY and s.resident > WORTH_EMPTYING and now - s.emptied > p.idle_ns:
            plan.how = RESET_DISCARD        # a scan cannot tell pages that only a burst touched from pages in use
        elif pages.capabilities().scans:
            plan.adaptive = True
            plan.how = reset_begin(&s.policy, plan.costs, in_pages(used))
            plan.bound = <size_t>reset_bound(&s.policy, plan.costs, in_pages(used)) << PAGE_BITS
        else:
            plan.how = RESET_ZERO if used <= ZERO_UNSEEN else RESET_DISCARD
    if plan.copied and plan.how == RESET_SCAN:
        plan.how = RESET_ZERO
    if plan.how == RESET_ZERO and used + plan.hidden > p.keep_resident:
        plan.how = RESET_DISCARD
    if plan.how == RESET_SCAN:
        plan.bound = min(plan.bound, p.keep_resident)
    if p.reset_ns and plan.how != RESET_DISCARD:
        plan.deadline = pages.clock_ns() + p.reset_ns


cdef bint refill_in_time(slot* s, size_t offset, size_t size, const reset_plan* plan) noexcept nogil:
    """image_fill(), with a look at the clock before each step. False: the deadline has passed."""
    cdef size_t step
    while size:
        if plan.deadline and pages.clock_ns() > plan.deadline:
            return False
        step = size if plan.deadline == 0 else min(size, ZERO_STEP)
        image_fill(s.m, offset, step)
        offset += step
        size -= step
    return True


cdef bint zero_touched(slot* s, size_t used, const reset_plan* plan, reset_result* result) noexcept nogil:
    """Zeroes the touched pages of the first `used` bytes. False if the OS does not say which pages were touched, if
    they are more than the plan's bound, or if the deadline has passed. Then some bytes may not be zero."""
    cdef touched_runs found
    cdef size_t i, start, end, reached_initial = 0, reached_grown = 0
    cdef size_t border = <size_t>s.original.base + s.pages.initial
    # Where huge pages are allowed, the OS may make one of each page that was touched.
    cdef size_t unit = pages.capabilities().huge_page if s.original.huge_pages else 1
    touched_begin(&found, s.m, 0, used)
    while touched_next(&found):
        for i in range(found.n):
            result.touched += found.runs[i].size
        if result.touched > plan.bound:
            return False
        for i in range(found.n):
            start = <size_t>found.runs[i].addr
            end = start + found.runs[i].size
            if not refill_in_time(s, start - <size_t>s.original.base, end - start, plan):
                return False
            if start < border:
                result.kept += cover(start, min(end, border), unit, &reached_initial)
            if end > border:
                result.kept_grown += cover(max(start, border), end, unit, &reached_grown)
    result.zeroed = result.touched
    result.kept_grown = min(result.kept_grown, beyond(used, s.pages.initial))
    result.kept = min(result.kept, s.pages.initial) + result.kept_grown
    return found.code == 0


cdef void all_zeroed(slot* s, size_t used, reset_result* result) noexcept nogil:
    result.how = RESET_ZERO
    result.zeroed = result.kept = used
    result.kept_grown = beyond(used, s.pages.initial)
    result.tables += most_tables(s, used)


cdef bint zero_all(slot* s, size_t used, const reset_plan* plan, reset_result* result) noexcept nogil:
    """False: the deadline has passed."""
    if plan.copied:
        image_restore(s.m, s.image)
    elif used <= wide_most and s.image == NULL:
        zero_wide(s.original.base, used)
    elif not refill_in_time(s, 0, used, plan):
        return False
    all_zeroed(s, used, result)
    return True


cdef int give_back_all(slot* s, size_t used) noexcept nogil:
    """Gives back every page of the slot, hidden ones included. All bytes read as zero afterwards."""
    if pages.capabilities().discard_any_protection:
        return image_reset(s.m, s.pages.committed if s.pages.hidden else used)
    cdef int code = image_reset(s.m, used)
    # If the guest has grown over all hidden pages, no hidden page is left.
    if code == 0 and s.pages.hidden and s.pages.committed > used:
        code = pages.decommit(s.original.base + used, s.pages.committed - used)
        s.pages.committed = used
    return code


cdef int run_reset(slot* s, size_t used, const reset_plan* plan, reset_result* result) noexcept nogil:
    """Does the planned reset. -1: the slot cannot be used again."""
    cdef pool* p = s.pool
    cdef bint kept = False
    result.how = plan.how
    if plan.how == RESET_SCAN:
        kept = zero_touched(s, used, plan, result)
        if plan.adaptive and (kept or result.touched):
            kept = reset_end(&s.policy, plan.costs, in_pages(used), in_pages(result.touched + plan.hidden),
                             in_pages(p.keep_resident)) and kept
        kept = kept and result.kept + plan.hidden <= p.keep_resident
    elif plan.how == RESET_ZERO:
        kept = zero_all(s, used, plan, result)
    if kept:
        return 0
    cdef int code = give_back_all(s, used)
    if code and code == pages.capabilities().locked:
        image_fill(s.m, 0, used)     # locked by mlock(), so the OS cannot discard them; hidden pages are zero already
        all_zeroed(s, used, result)
    elif code:
        return -1
    else:
        result.how = RESET_DISCARD
        result.zeroed = result.kept_grown = 0
        result.kept = s.image.high - s.image.low if plan.copied else 0
    if plan.copied:
        image_copy(s.image, s.original.base)
    return 0


cdef void record_reset(slot* s, size_t used, const reset_plan* plan, const reset_result* result,
                       long long now) noexcept nogil:
    """Stores the amounts that the slot keeps after the reset."""
    s.zeroed = result.zeroed
    s.uses += 1
    s.tables = min(s.old_tables + result.tables, most_tables(s, s.pages.committed))
    if result.how == RESET_DISCARD:
        reset_given_back(&s.policy)
        s.pages.hidden = 0
        s.resident = result.kept
        s.old_tables = s.tables     # tables without pages may remain
        s.emptied = now
        s.uses = 0
        s.unfilled = s.m.ops.prefaults
    else:
        s.pages.hidden = result.kept_grown + plan.hidden
        s.resident = result.kept + plan.hidden


cdef int notify_resized(slot* s, size_t size, size_t accessible, failure* why) noexcept nogil:
    """Tells the adaptors below the pool how much of the memory the next guest will have. Only the increase of a cold
    slot can fail."""
    cdef memory_hook* hook = s.head.next
    cdef memory_hook* undo = hook
    cdef failure unused
    cdef int code
    while hook != NULL:
        if hook.resized != NULL:
            code = hook.resized(hook, s.m, size, accessible, why)
            if code:
                count_refusal(hook.refusals, NULL, size, why)
                while undo != hook:
                    if undo.resized != NULL:
                        undo.resized(undo, s.m, 0, 0, &unused)
                    undo = undo.next
                return code
        hook = hook.next
    return 0


cdef int reset(slot* s, memory* m, long long now) noexcept nogil:
    """Restores the bytes that the slot had when it was new. Returns the kind of reset, or -1 if the slot cannot be used
    again. Afterwards the slot can become warm. If nothing is accessible, it can become cold."""
    cdef size_t used = m.accessible
    cdef reset_plan plan
    cdef reset_result result
    cdef failure unused
    s.pages.committed = max(s.pages.committed, used)
    if m.windows != NULL:
        if memory_close_windows(m):
            memory_protection_becomes_unknown(m)
            return -1
        s.unfilled = m.ops.prefaults
    if used < s.pages.initial:
        # A pool above has cooled the memory, so the bytes are gone.
        return RESET_DISCARD if cool_pages(s) else -1
    # A user may have protected pages, restored the memory to another image, or discarded pages of the slot's image.
    if ((load(&m.protection) != PROTECTION_NONE and memory_unprotect(m, used))
            or (not image_is_attached(m, s.image) and image_rebind(m, s.image))):
        return -1
    memset(&result, 0, sizeof(result))
    result.how = RESET_SCAN
    if used:
        result.tables = count_tables(s)
        plan_reset(s, used, now, &plan)
        if run_reset(s, used, &plan, &result):
            # Pages may be inaccessible. A pool below then makes all pages accessible before it resets them.
            memory_protection_becomes_unknown(m)
            return -1
        record_reset(s, used, &plan, &result, now)
        if s.pool.check and not image_is_intact(m, used):
            return -1
    if used > s.pages.initial:
        s.grown = now
        if pages.protect(s.original.base + s.pages.initial, used - s.pages.initial, pages.ACCESS_NONE):
            memory_protection_becomes_unknown(m)
            return -1
        store_size(&m.accessible, s.pages.initial)
    elif (s.pages.hidden and s.pool.idle_ns and now - s.grown > s.pool.idle_ns
            and pages.decommit(s.original.base + used, s.pages.committed - used) == 0):
        s.resident -= s.pages.hidden            # no guest has grown into them for idle_seconds
        s.pages.hidden = 0
        s.pages.committed = used
    if s.head.next != NULL and (used != s.pages.initial or load(&m.size) != s.original.size):
        notify_resized(s, <size_t>s.original.size, s.pages.initial, &unused)
    if s.resident > s.pool.keep_resident and not cool_pages(s):
        return -1
    return result.how


cdef bint cool_pages(slot* s) noexcept nogil:
    """Gives back all pages; nothing is accessible afterwards. False: the OS refused, and the slot must be dropped."""
    cdef failure unused
    # The range includes the guards: if only a part of the reservation is decommitted, the OS keeps the page tables at
    # both ends of the part.
    if s.pages.committed and pages.decommit(s.original.base - s.original.pre_guard, s.reserved):
        return False
    store_size(&s.m.accessible, 0)
    image_pages_are_gone(s.m)
    memory_forget_protection(s.m)
    s.pages.committed = s.pages.hidden = s.resident = s.tables = s.old_tables = s.uses = 0
    s.unfilled = False
    reset_given_back(&s.policy)
    notify_resized(s, 0, 0, &unused)
    return True


cdef int warm_up(slot* s, long long now, failure* why) noexcept nogil:
    """Makes a cold slot accessible again. If it fails and s.pages.committed is 0, the slot is still cold; otherwise
    its state is unknown."""
    cdef int code = notify_resized(s, <size_t>s.original.size, s.pages.initial, why)
    if code:
        return code
    s.emptied = s.grown = now
    if s.pages.initial == 0:
        return 0
    if s.original.huge_pages:
        pages.advise_huge(s.original.base, s.original.capacity)
    s.pages.committed = s.pages.initial
    code = commit_pages(s.original.base, s.pages.initial)
    if code == 0:
        code = image_attach(s.m, s.image)
    if code == 0 and s.m.ops.prefaults:
        code = pages.prefault(s.original.base, s.pages.initial)
    if code:
        return fail(why, code, "commit", s.pages.initial)
    store_size(&s.m.accessible, s.pages.initial)
    return 0
