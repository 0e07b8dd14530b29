# LimitingCreator: a budget of committed bytes. Part of adaptors.pyx.
#
# Several memories of one process may show the same file, because a shared memory was attached twice. A budget is
# charged once for them, with the most that one of them is charged with. Their hooks are "twins": they form a ring.

# Shared by a LimitingCreator and the hooks of its memories, because wasmtime may outlive the creator.
cdef struct budget:
    link in_budgets
    atomic_i64 refs
    atomic_i64 used             # bytes charged now
    atomic_i64 peak             # the most bytes that were ever charged at once
    long long limit             # bytes
    long long smallest_limit    # of this budget and all budgets upstream of it
    refusal_log* refusals       # of the creator, a reference
    link of_files               # the hooks of the memories that show a file

cdef struct limit_hook:
    memory_hook head
    budget* budget
    size_t charged              # bytes, in whole host pages
    unsigned long long device, inode    # of the file that the memory shows; 0 and 0: it shows none
    limit_hook* twin            # the next of the ring; the hook itself: it is alone
    link of_file                # in budget.of_files
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
cdef fork_lock budgets_lock     # protects the list `budgets`, the lists `of_files`, and the rings with their charges
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
    budget is charged with the memories that exist, and with the memories that this thread is making. Only these have
    a twin afterwards."""
    cdef link* node = budgets.next
    cdef limit_hook* pending = <limit_hook*>pending_hooks()[0]
    cdef memory* m = next_live_memory(NULL)
    cdef memory_hook* hook
    while node.owner != NULL:
        store(&(<budget*>node.owner).used, 0)
        list_init(&(<budget*>node.owner).of_files)
        node = node.next
    while pending != NULL:
        charge_hook_anew(pending)
        pending = pending.outer
    while m != NULL:
        hook = m.hooks
        while hook != NULL:
            if hook.dropped == limit_dropped:
                charge_hook_anew(<limit_hook*>hook)
            hook = hook.next
        m = next_live_memory(m)


cdef void charge_hook_anew(limit_hook* hook) noexcept nogil:
    add(&hook.budget.used, <long long>hook.charged)
    join_twins(hook, hook.device, hook.inode)


# -- twins

cdef inline bint shows_file(limit_hook* hook) noexcept nogil:
    """Whether the hook may have twins. Then other threads change its ring, and `twin` and `charged` of each hook of the
    ring are read only under budgets_lock. The answer is of this hook alone: its thread decides it once."""
    return hook.device != 0 or hook.inode != 0


cdef size_t charged_by_twins(limit_hook* hook) noexcept nogil:
    """The most that another hook of the ring is charged with. The caller holds budgets_lock if there may be a ring."""
    cdef size_t most = 0
    cdef limit_hook* twin = hook.twin
    while twin != hook:
        most = max(most, twin.charged)
        twin = twin.twin
    return most


cdef void join_twins(limit_hook* hook, unsigned long long device, unsigned long long inode) noexcept nogil:
    """The hook's memory shows this file. Refunds what the hook and its twins were both charged with."""
    cdef budget* b = hook.budget
    cdef link* node
    cdef limit_hook* other
    hook.device, hook.inode = device, inode
    if not shows_file(hook):
        return
    lock(&budgets_lock.held)
    hook.twin = hook
    node = b.of_files.next
    while node.owner != NULL:
        other = <limit_hook*>node.owner
        if other.device == device and other.inode == inode:
            hook.twin = other.twin
            other.twin = hook
            break
        node = node.next
    list_add_first(&b.of_files, &hook.of_file, hook)
    add(&b.used, -<long long>min(hook.charged, charged_by_twins(hook)))
    unlock(&budgets_lock.held)


cdef void refund_all(limit_hook* hook) noexcept nogil:
    """Refunds what the hook alone is charged with. The hook leaves the ring of its twins."""
    cdef limit_hook* before
    cdef size_t twins
    if not shows_file(hook):
        add(&hook.budget.used, -<long long>hook.charged)
        return
    lock(&budgets_lock.held)
    twins = charged_by_twins(hook)
    if hook.charged > twins:
        add(&hook.budget.used, -<long long>(hook.charged - twins))
    before = hook.twin      # not before the lock is held: until then another thread may free this twin
    while before.twin != hook:
        before = before.twin
    before.twin = hook.twin
    list_remove(&hook.of_file)
    unlock(&budgets_lock.held)


# -- charges


cdef inline size_t committed(size_t size) noexcept nogil:
    """The bytes that a memory of `size` bytes commits."""
    cdef size_t out
    return SIZE_MAX >> 1 if round_up(size, pages.capabilities().page_size, &out) else out


cdef bint charge(budget* b, size_t size, long long* used) noexcept nogil:
    """Charges `size` bytes, or returns False and changes nothing; exact under threads. *used: what was charged."""
    cdef long long peak
    while True:
        used[0] = load(&b.used)
        if size > <size_t>(b.limit - used[0]):
            return False
        if compare_exchange(&b.used, used[0], used[0] + <long long>size):
            break
    while True:
        peak = load(&b.peak)
        if used[0] + <long long>size <= peak or compare_exchange(&b.peak, peak, used[0] + <long long>size):
            return True


cdef int limit_resized(memory_hook* head, memory* m, size_t size, size_t accessible, failure* why) noexcept nogil:
    """Charges or refunds the difference. If the budget does not cover it, idle slots of pools over this budget give up
    the missing bytes first, unless the memory exceeds some limit anyway. The caller holds no fork_lock."""
    cdef limit_hook* hook = <limit_hook*>head
    cdef budget* b = hook.budget
    cdef long long used = 0
    cdef size_t twins, before, after
    cdef bint has_twins = shows_file(hook), fits = True
    while True:
        if has_twins:
            lock(&budgets_lock.held)
        twins = charged_by_twins(hook)
        before, after = max(hook.charged, twins), max(accessible, twins)
        if after > before:
            fits = charge(b, after - before, &used)
        elif after < before:
            add(&b.used, -<long long>(before - after))
        if fits:
            hook.charged = accessible
        if has_twins:
            unlock(&budgets_lock.held)
        if fits:
            return 0
        if (accessible > <size_t>b.smallest_limit
                or not relieve(RELIEF_BUDGET, b, after - before - <size_t>(b.limit - used))):
            return fail(why, E_LIMIT, "limit", after - before, <size_t>used, <size_t>b.limit)


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
    refund_all(hook)
    release_budget(hook.budget)
    free(hook)


@cython.final
cdef class LimitingCreator(NativeCreator):
    """LimitingCreator(upstream, limit_bytes, *, name=None)\n--\n
    One budget of committed bytes over all memories that come through it.

    The budget is charged (in whole host pages) when a memory is made and when it grows, and refunded when the memory is
    dropped. The sums are exact under threads. Memories of this process that show the same shared memory count once,
    with the size of the largest. A request that exceeds the budget raises `LimitError`; in wasm, ``memory.grow``
    returns -1. Limits nest: each takes the next as its upstream. rmm has ``LimitingResourceAdaptor``.

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
        list_init(&self.budget.of_files)
        while upstream is not None:
            if isinstance(upstream, SharedCreator) and (<SharedCreator>upstream).file.kind:
                self.attached = &(<SharedCreator>upstream).file
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
        cdef const pages.file_pages* file
        cdef size_t position
        cdef int code
        if hook == NULL:
            return finish_make(self, spec, fail(why, E_NO_MEMORY, "calloc", sizeof(limit_hook)), out, why)
        hook.head.budget = hook.budget = self.budget
        hook.head.refusals = self.budget.refusals
        hook.twin = hook
        hook.outer = <limit_hook*>pending_hooks()[0]
        pending_hooks()[0] = hook
        if self.attached != NULL:       # then the budget may be charged for the bytes already
            join_twins(hook, self.attached.device, self.attached.inode)
        code = limit_resized(&hook.head, NULL, spec.minimum, size, why)
        if code == 0:
            code = self.upstream.make(spec, out, why)
        if code == 0:
            if not shows_file(hook) and out[0].ops.file_of != NULL:
                file = out[0].ops.file_of(out[0], &position)
                join_twins(hook, file.device, file.inode)
            if committed(memory_size(out[0])) > size:       # of an old file, or of another process
                code = limit_resized(&hook.head, NULL, spec.minimum, committed(memory_size(out[0])), why)
            if code:
                memory_release(out[0])
                out[0] = NULL
        pending_hooks()[0] = hook.outer
        if code:
            refund_all(hook)
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
        return (f"LimitingCreator({self.upstream!r}, limit_bytes={_show_size(self.limit_bytes)},"
                f" used_bytes={_show_size(self.used_bytes)}{name_option(self)})")
