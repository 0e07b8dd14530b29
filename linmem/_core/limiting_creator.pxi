# LimitingCreator: a budget of committed bytes. Part of adaptors.pyx.

# Shared by a LimitingCreator and the hooks of its memories, because wasmtime may outlive the creator.
cdef struct budget:
    link in_budgets
    atomic_i64 refs
    atomic_i64 used             # bytes charged now
    atomic_i64 peak             # the most bytes that were ever charged at once
    long long limit             # bytes
    long long smallest_limit    # of this budget and all budgets upstream of it
    refusal_log* refusals       # of the creator, a reference

cdef struct limit_hook:
    memory_hook head
    budget* budget
    size_t charged              # bytes, in whole host pages
    size_t charged_before       # the value of `charged` before the present growth
    limit_hook* outer           # while the memory is being made: the next hook in pending_hooks()

# pending_hooks(): the list of the hooks whose memories this thread is making. Several hooks are in it if limits nest,
# or if a Python creator upstream makes another memory.
cdef extern from *:
    """
    static LINMEM_OF_THREAD void *linmem_pending;
    static void **linmem_pending_of_thread(void) { return &linmem_pending; }
    """
    void** pending_hooks "linmem_pending_of_thread"() noexcept nogil

cdef link budgets
list_init(&budgets)
cdef fork_lock budgets_lock     # protects the list `budgets`
cdef atomic_i64 budgets_started


cdef void list_budget(budget* b) noexcept nogil:
    # Not at the import: if the import failed and was tried again, the lock would be registered twice.
    if compare_exchange(&budgets_started, 0, 1):
        register_fork_lock(&budgets_lock)
        call_in_each_child(charge_anew)
    lock(&budgets_lock.held)
    list_add_first(&budgets, &b.in_budgets, b)
    unlock(&budgets_lock.held)


cdef void release_budget(budget* b) noexcept nogil:
    if add(&b.refs, -1):
        return
    lock(&budgets_lock.held)
    list_remove(&b.in_budgets)
    unlock(&budgets_lock.held)
    refusals_release(b.refusals)
    free(b)


cdef void charge_anew() noexcept nogil:
    """In a forked child: computes the charges of all budgets again. A thread that the child does not have may have
    charged bytes for a memory that does not exist yet, or may not have refunded the bytes of a dropped memory. So each
    budget is charged with the memories that exist, and with the memories that this thread is making."""
    cdef link* node = budgets.next
    cdef limit_hook* pending = <limit_hook*>pending_hooks()[0]
    cdef memory* m = next_live_memory(NULL)
    cdef memory_hook* hook
    while node.owner != NULL:
        store(&(<budget*>node.owner).used, 0)
        node = node.next
    while pending != NULL:
        add(&pending.budget.used, <long long>pending.charged)
        pending = pending.outer
    while m != NULL:
        hook = m.hooks
        while hook != NULL:
            if hook.dropped == limit_dropped:
                add(&(<limit_hook*>hook).budget.used, <long long>(<limit_hook*>hook).charged)
            hook = hook.next
        m = next_live_memory(m)


cdef inline size_t committed(size_t size) noexcept nogil:
    """The bytes that a memory of `size` bytes commits."""
    cdef size_t out
    return SIZE_MAX >> 1 if round_up(size, pages.capabilities().page_size, &out) else out


cdef int charge(budget* b, size_t size, size_t total, failure* why) noexcept nogil:
    """Charges `size` bytes or nothing; exact under threads. If the budget does not cover the bytes, idle slots of pools
    over this budget give up the missing bytes first, unless the memory, which would have `total` bytes, exceeds some
    limit anyway. The caller holds no fork_lock."""
    cdef long long used, peak
    cdef size_t left
    while True:
        used = load(&b.used)
        left = <size_t>(b.limit - used)
        if size <= left:
            if compare_exchange(&b.used, used, used + <long long>size):
                break
        elif total > <size_t>b.smallest_limit or not relieve(RELIEF_BUDGET, b, size - left):
            return fail(why, E_LIMIT, "limit", size, <size_t>used, <size_t>b.limit)
    used += <long long>size
    while True:
        peak = load(&b.peak)
        if used <= peak or compare_exchange(&b.peak, peak, used):
            return 0


cdef int limit_resized(memory_hook* head, memory* m, size_t size, size_t accessible, failure* why) noexcept nogil:
    cdef limit_hook* hook = <limit_hook*>head
    cdef int code = 0
    if accessible > hook.charged:
        code = charge(hook.budget, accessible - hook.charged, accessible, why)
    elif accessible < hook.charged:
        add(&hook.budget.used, -<long long>(hook.charged - accessible))
    if code == 0:
        hook.charged = accessible
    return code


cdef int limit_before_grow(memory_hook* head, memory* m, size_t new_size, failure* why) noexcept nogil:
    cdef limit_hook* hook = <limit_hook*>head
    hook.charged_before = hook.charged
    return limit_resized(head, m, new_size, max(hook.charged, committed(new_size)), why)


cdef void limit_after_grow(memory_hook* head, memory* m, size_t old_size, size_t new_size, int code) noexcept nogil:
    cdef failure unused
    if code:
        limit_resized(head, m, old_size, (<limit_hook*>head).charged_before, &unused)


cdef void limit_dropped(memory_hook* head) noexcept nogil:
    # The bytes are refunded only now that the pages are gone, so the committed bytes never exceed the budget.
    cdef limit_hook* hook = <limit_hook*>head
    add(&hook.budget.used, -<long long>hook.charged)
    release_budget(hook.budget)
    free(hook)


@cython.final
cdef class LimitingCreator(NativeCreator):
    """LimitingCreator(upstream, limit_bytes, *, name=None)\n--\n
    One budget of committed bytes over all memories that come through it.

    The budget is charged (in whole host pages) when a memory is made and when it grows, and refunded when the memory is
    dropped. The sums are exact under threads. A request that exceeds the budget raises `LimitError`; in wasm,
    ``memory.grow`` returns -1. Limits nest: each takes the next as its upstream. rmm has ``LimitingResourceAdaptor``.

    Parameters
    ----------
    upstream : NativeCreator
        The creator that makes the memories.
    limit_bytes : int
        The budget in bytes.
    name : str, optional
        Stands in the text of its `LimitError`, and in `MemoryInfo` of its memories.
    """

    def __cinit__(self, *args, **kwargs):
        cdef size_t limit
        upstream, limit_bytes, _ = _given("LimitingCreator", ("upstream", "limit_bytes", "name"), {"name": None}, args,
                                          kwargs, 2)
        self.upstream = check_native(upstream, "upstream")
        check_bounded(limit_bytes, "limit_bytes", "below 2**63", &limit)
        if limit > SIZE_MAX >> 1:
            raise OverflowError(f"limit_bytes must be below 2**63, got {limit}")
        self.budget = <budget*>new_zeroed(sizeof(budget), "a budget")
        self.budget.refs = 1
        self.budget.refusals = refusals_retain(self.refusal_log)
        self.budget.limit = self.budget.smallest_limit = <long long>limit
        while upstream is not None:
            if isinstance(upstream, LimitingCreator):
                self.budget.smallest_limit = min(self.budget.smallest_limit, <long long>upstream.limit_bytes)
            upstream = getattr(upstream, "upstream", None)
        with nogil:
            list_budget(self.budget)

    def __dealloc__(self):
        if self.budget != NULL:
            release_budget(self.budget)

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef size_t size = committed(spec.minimum)
        cdef limit_hook* hook = <limit_hook*>calloc(1, sizeof(limit_hook))
        cdef int code
        if hook == NULL:
            return finish_make(self, spec, fail(why, E_NO_MEMORY, "calloc", sizeof(limit_hook)), out, why)
        hook.head.budget = hook.budget = self.budget
        hook.head.refusals = self.budget.refusals
        hook.charged = size
        code = charge(self.budget, size, size, why)
        if code == 0:
            hook.outer = <limit_hook*>pending_hooks()[0]
            pending_hooks()[0] = hook
            code = self.upstream.make(spec, out, why)
            if code == 0 and committed(memory_size(out[0])) > size:     # of an old file, or of another process
                code = limit_resized(&hook.head, out[0], memory_size(out[0]), committed(memory_size(out[0])), why)
                if code:
                    memory_release(out[0])
                    out[0] = NULL
            pending_hooks()[0] = hook.outer
            if code:
                add(&self.budget.used, -<long long>hook.charged)
        if code:
            free(hook)
            return finish_make(self, spec, code, out, why)
        add(&self.budget.refs, 1)
        hook.head.before_grow = limit_before_grow
        hook.head.after_grow = limit_after_grow
        hook.head.dropped = limit_dropped
        hook.head.resized = limit_resized
        memory_add_hook(out[0], &hook.head)
        return finish_make(self, spec, 0, out, why)

    @property
    def limit_bytes(self):
        """The budget in bytes."""
        return self.budget.limit

    @property
    def used_bytes(self):
        """The bytes charged to the budget now, in whole host pages."""
        return load(&self.budget.used)

    @property
    def peak_bytes(self):
        """The most bytes that were ever charged at once."""
        # charge() stores the peak after the charge. A forked child may lack the thread that was about to store it.
        return max(load(&self.budget.used), load(&self.budget.peak))

    def __repr__(self):
        return (f"LimitingCreator({self.upstream!r}, limit_bytes={self.limit_bytes},"
                f" used_bytes={self.used_bytes}{name_option(self)})")
