# TrackingCreator: by which lines, and in which scope, memories were made. Part of adaptors.pyx.
#
# A tracker keeps C structs only, so that wasmtime can drop memories without the GIL: equal stacks are one struct, and a
# scope exists once. The tracker's lock protects all of them. Its holder never waits for the GIL.

cdef enum:
    MOST_STACKS = 4096          # of a tracker; memories of further stacks have no stack
    STACK_BUCKETS = 1024
    MOST_SCOPES = 1024          # of a tracker; memories of further scopes count in the enclosing scope
    SCOPE_NAME_BYTES = 1000     # the most bytes of the name of a scope
    POINTS = 256                # of the history of a scope; an even number
    FIRST_INTERVAL = 1000000    # nanoseconds between two points; doubles when the history is full

cdef struct stack:
    stack* next                 # in its bucket
    link unused                 # in tracker.unused, while `uses` is 0
    size_t hash
    size_t uses                 # by memories, and by calls that read the stack
    int n                       # frames, which follow the struct

# The sums over the memories of a scope and of the scopes in it; sizes in bytes.
cdef struct scope_sums:
    size_t size
    size_t peak
    size_t total
    size_t memories
    size_t made

cdef struct scope:
    scope* next                 # in tracker.scopes
    scope* outer                # NULL: the root, which holds all memories of the tracker
    domain* name                # a reference; NULL: the root
    scope_sums sums
    size_t own                  # bytes of the memories of the scope itself
    size_t[POINTS] history      # the most that `own` was in each interval
    int newest                  # the index of the last point that has been written; -1: none

# Shared by a TrackingCreator, the hooks of its memories, and its scopes that were entered.
cdef struct tracker:
    atomic_i64 refs
    fork_lock lock              # protects all members below
    int frames                  # the most of a stack; never changes
    link live                   # hooks of memories that exist
    stack* buckets[STACK_BUCKETS]
    link unused                 # the stacks that no memory has, the last used one first
    size_t n_stacks
    size_t lost_stacks          # how often a stack was not kept
    size_t stack_bytes
    scope* scopes               # the newest first, the root last
    scope* root
    size_t n_scopes
    size_t lost_scopes          # how often a scope was not kept
    size_t name_bytes           # of the names of all scopes
    long long begun_ns, interval_ns

# The hook of a memory.
cdef struct tracked:
    memory_hook head
    tracker* tracker
    link in_tracker             # until the memory is being dropped
    memory* m                   # valid while the hook is in the list
    size_t size                 # bytes that count in the scope: 0 while the memory is a cold slot of a pool above
    size_t peak
    long long made_ns
    stack* made                 # NULL: unknown
    stack* peaked
    scope* scope
    unsigned long grower        # the thread that called before_grow
    PyObject* handles           # a list of weak references on the memory's handles; NULL: there was none

cdef extern from *:
    unsigned long PyThread_get_thread_ident() noexcept nogil
    object PyWeakref_NewRef(PyObject* to, PyObject* callback)


cdef inline stack_frame* frames_of(stack* s) noexcept nogil:
    return <stack_frame*>(s + 1)


# -- stacks

cdef stack* find_stack(tracker* t, const stack_frame* frames, int n, size_t hash) noexcept nogil:
    """The tracker's lock is held."""
    cdef stack* s = t.buckets[hash % STACK_BUCKETS]
    while s != NULL and not (s.hash == hash and s.n == n
                             and memcmp(frames_of(s), frames, <size_t>n * sizeof(stack_frame)) == 0):
        s = s.next
    return s


cdef stack* take_unused_stack(tracker* t) noexcept nogil:
    """Removes the stack that has been unused for the longest time; NULL: every stack is used. The tracker's lock is
    held, or no thread has a reference."""
    cdef stack* s = <stack*>t.unused.previous.owner
    cdef stack** place
    if s == NULL:
        return NULL
    list_remove(&s.unused)
    place = &t.buckets[s.hash % STACK_BUCKETS]
    while place[0] != s:
        place = &place[0].next
    place[0] = s.next
    t.n_stacks -= 1
    t.stack_bytes -= sizeof(stack) + <size_t>s.n * sizeof(stack_frame)
    return s


cdef stack* use_stack(tracker* t, const stack_frame* frames, int n, size_t hash, bint* is_new,
                      stack** evicted) noexcept nogil:
    """Returns the kept stack, with one more use, or NULL. The tracker's lock is held."""
    cdef stack* s = find_stack(t, frames, n, hash)
    cdef size_t size = sizeof(stack) + <size_t>n * sizeof(stack_frame)
    if s == NULL:
        if t.n_stacks >= MOST_STACKS:
            evicted[0] = take_unused_stack(t)
        s = <stack*>malloc(size) if t.n_stacks < MOST_STACKS else NULL
        if s == NULL:
            t.lost_stacks += 1
            return NULL
        is_new[0] = True
        s.hash = hash
        s.uses = 0
        s.n = n
        memcpy(frames_of(s), frames, <size_t>n * sizeof(stack_frame))
        s.next = t.buckets[hash % STACK_BUCKETS]
        t.buckets[hash % STACK_BUCKETS] = s
        t.n_stacks += 1
        t.stack_bytes += size
    elif s.uses == 0:
        list_remove(&s.unused)
    s.uses += 1
    return s


cdef stack* stack_of_thread(tracker* t) noexcept:
    """The stack of this thread, with one more use; NULL: the tracker does not keep the stack."""
    cdef stack_frame[MOST_FRAMES] frames
    cdef stack* evicted = NULL
    cdef stack* s
    cdef size_t hash = 0
    cdef bint is_new = False
    cdef int i, n = capture_stack(frames, t.frames)
    if n == 0:
        return NULL
    for i in range(n):
        hash = (hash ^ (<size_t>frames[i].code >> 4) ^ (<size_t>frames[i].line << 40)) * <size_t>0x9E3779B97F4A7C15
    hash ^= hash >> 32
    lock(&t.lock.held)
    s = use_stack(t, frames, n, hash, &is_new, &evicted)
    unlock(&t.lock.held)
    if not is_new:              # a new stack takes over the references on the code
        drop_frames(frames, n)
    if evicted != NULL:
        drop_frames(frames_of(evicted), evicted.n)
        free(evicted)
    return s


cdef void end_use(tracker* t, stack* s) noexcept nogil:
    """The tracker's lock is held."""
    if s != NULL:
        s.uses -= 1
        if s.uses == 0:
            list_add_first(&t.unused, &s.unused, s)


cdef tuple summaries(stack* s):
    """The frames for the module `traceback`, the oldest first. The caller has a use of the stack."""
    from traceback import FrameSummary
    cdef stack_frame* frames
    if s == NULL:
        return ()
    frames = frames_of(s)
    return tuple([FrameSummary((<object>frames[i].code).co_filename, frames[i].line, (<object>frames[i].code).co_name,
                               lookup_line=False)
                  for i in range(s.n - 1, -1, -1)])


# -- scopes

cdef void note(tracker* t, scope* s, size_t size) noexcept nogil:
    """The memories of the scope itself have `size` bytes from now on. The tracker's lock is held."""
    cdef long long now = pages.clock_ns() - t.begun_ns
    cdef int point
    while now // t.interval_ns >= POINTS:
        halve_histories(t)
    point = <int>(now // t.interval_ns)
    if s.newest < point:
        fill_history(s, point)
    s.history[point] = max(s.history[point], size)
    s.own = size


cdef void fill_history(scope* s, int until) noexcept nogil:
    cdef int i
    for i in range(s.newest + 1, until + 1):
        s.history[i] = s.own
    s.newest = until


cdef void halve_histories(tracker* t) noexcept nogil:
    """Each point stands for twice the time from now on."""
    cdef scope* s = t.scopes
    cdef int i
    while s != NULL:
        fill_history(s, POINTS - 1)
        for i in range(POINTS // 2):
            s.history[i] = max(s.history[2 * i], s.history[2 * i + 1])
        s.newest = POINTS // 2 - 1
        s = s.next
    t.interval_ns *= 2


cdef void count_size(tracked* r, size_t size) noexcept nogil:
    """The tracker's lock is held."""
    cdef scope* s = r.scope
    note(r.tracker, s, s.own + size - r.size)   # if the memory shrinks, the operations wrap around: the sum is right
    while s != NULL:
        s.sums.size += size - r.size
        s.sums.peak = max(s.sums.peak, s.sums.size)
        if size > r.size:
            s.sums.total += size - r.size
        s = s.outer
    r.size = size


cdef scope* inner_scope(tracker* t, scope* outer, domain* name) noexcept nogil:
    """The scope of that name; `outer` if there are too many scopes. The tracker's lock is held."""
    cdef scope* s = t.scopes
    while s != NULL and not (s.outer == outer and s.name == name):
        s = s.next
    if s != NULL:
        return s
    s = <scope*>calloc(1, sizeof(scope)) if t.n_scopes < MOST_SCOPES else NULL
    if s == NULL:
        t.lost_scopes += 1
        return outer
    s.outer = outer
    s.name = name
    s.newest = -1
    s.next = t.scopes
    domain_retain(name)
    t.scopes = s
    t.n_scopes += 1
    t.name_bytes += name.size
    return s


cdef tuple path_of(const scope* s):
    path = []
    while s.outer != NULL:
        path.append(s.name.name[:s.name.size].decode("utf-8", "surrogatepass"))
        s = s.outer
    return tuple(reversed(path))


# The innermost EnteredScope, of any tracker, that the thread or the task is in.
cdef object entered = ContextVar("linmem.tracking")


@cython.final
cdef class EnteredScope:
    """A scope that is being used by this thread or task."""

    cdef tracker* tracker       # a reference
    cdef scope* scope
    cdef EnteredScope outer

    def __dealloc__(self):
        if self.tracker != NULL:
            with nogil:
                release_tracker(self.tracker)

    def __reduce__(self):
        raise TypeError("an EnteredScope cannot be pickled or copied: it belongs to a tracker of this process")


cdef scope* scope_of_thread(tracker* t) noexcept:
    """The innermost scope of the tracker that this thread or task is in; NULL: none."""
    cdef EnteredScope e = entered.get(None)
    while e is not None and e.tracker != t:
        e = e.outer
    return NULL if e is None else e.scope


@cython.final
cdef class ScopeBlock:
    """The context manager that `TrackingCreator.scope` returns."""

    cdef TrackingCreator creator
    cdef str name
    cdef object token

    def __enter__(self):
        cdef EnteredScope e
        cdef tracker* t
        cdef domain* name
        cdef scope* outer
        if self.creator is None or self.token is not None:
            raise RuntimeError("a scope is entered once: call scope() again for each block")
        t = self.creator.tracker
        e = EnteredScope.__new__(EnteredScope)
        name = domain_of(self.name)
        outer = scope_of_thread(t)
        if outer == NULL:
            outer = t.root
        with nogil:
            add(&t.refs, 1)
            lock(&t.lock.held)
            e.scope = inner_scope(t, outer, name)
            unlock(&t.lock.held)
            domain_release(name)
        e.tracker = t
        e.outer = entered.get(None)
        # If there are too many scopes, the context stays as it is, because contexts inherit each other without bound.
        self.token = entered.set(e.outer if e.scope == outer else e)

    def __exit__(self, kind, error, trace):
        entered.reset(self.token)

    def __reduce__(self):
        raise TypeError("a scope cannot be pickled or copied: it belongs to a tracker of this process")


# -- the hook of a memory

cdef void find_place(tracker* t, stack** s, scope** of) noexcept with gil:
    s[0] = stack_of_thread(t)
    of[0] = scope_of_thread(t)


cdef stack* find_growth(tracker* t) noexcept with gil:
    return stack_of_thread(t)


cdef int tracking_before_grow(memory_hook* head, memory* m, size_t new_size, failure* why) noexcept nogil:
    (<tracked*>head).grower = PyThread_get_thread_ident()
    return 0


cdef void tracking_after_grow(memory_hook* head, memory* m, size_t old_size, size_t new_size,
                              int code) noexcept nogil:
    cdef tracked* r = <tracked*>head
    cdef tracker* t = r.tracker
    cdef own_growth growth
    cdef stack* where = NULL
    if code:
        return
    # A forked child ends the growth of a thread that it does not have, and must not take the GIL for that.
    if new_size > r.peak and r.grower == PyThread_get_thread_ident() and may_run_python():
        begin_own_growth(&growth, m)        # the garbage collector may run, and finalizers may use the memory
        where = find_growth(t)
        end_own_growth(&growth)
    lock(&t.lock.held)
    count_size(r, new_size)
    if new_size > r.peak:
        r.peak = new_size
        end_use(t, r.peaked)
        r.peaked = where
    unlock(&t.lock.held)


cdef int tracking_resized(memory_hook* head, memory* m, size_t size, size_t accessible, failure* why) noexcept nogil:
    cdef tracked* r = <tracked*>head
    lock(&r.tracker.lock.held)
    count_size(r, size)
    unlock(&r.tracker.lock.held)
    return 0


cdef void tracking_before_drop(memory_hook* head, memory* m) noexcept nogil:
    cdef tracked* r = <tracked*>head
    cdef tracker* t = r.tracker
    lock(&t.lock.held)
    if r.m != NULL:             # a forked child may drop the memory a second time
        count_size(r, 0)
        count_memory(r.scope, <size_t>-1)
        list_remove(&r.in_tracker)
        end_use(t, r.made)
        end_use(t, r.peaked)
        r.m = NULL
    unlock(&t.lock.held)


cdef void count_memory(scope* s, size_t sign) noexcept nogil:
    """sign: 1, or <size_t>-1, with which the count wraps around. The tracker's lock is held."""
    while s != NULL:
        s.sums.memories += sign
        if sign == 1:
            s.sums.made += 1
        s = s.outer


cdef void tracking_dropped(memory_hook* head) noexcept nogil:
    cdef tracked* r = <tracked*>head
    if r.handles != NULL:
        deferred_decref(r.handles)
    release_tracker(r.tracker)
    free(r)


cdef void tracking_wrapped(memory_hook* head, memory* m, PyObject* handle) noexcept:
    """Notes the handle, for leaks(). Without a GIL, two threads may do this at once."""
    cdef tracked* r = <tracked*>head
    cdef list handles = None
    lock(&r.tracker.lock.held)
    if r.handles != NULL:
        handles = <list>r.handles
    unlock(&r.tracker.lock.held)
    if handles is None:
        handles = []
        lock(&r.tracker.lock.held)
        if r.handles == NULL:
            Py_INCREF(handles)
            r.handles = <PyObject*>handles
        else:
            handles = <list>r.handles
        unlock(&r.tracker.lock.held)
    if len(handles) >= 16 and len(handles) & (len(handles) - 1) == 0:
        for ref in tuple(handles):
            if ref() is None:
                try:
                    handles.remove(ref)
                except ValueError:      # another thread has removed it
                    pass
    handles.append(PyWeakref_NewRef(handle, NULL))


cdef void release_tracker(tracker* t) noexcept nogil:
    cdef stack* unused
    cdef scope* s
    cdef int i
    if add(&t.refs, -1):
        return
    unregister_fork_lock(&t.lock)
    unused = take_unused_stack(t)
    while unused != NULL:       # no memory is left, so every stack is unused
        for i in range(unused.n):
            deferred_decref(frames_of(unused)[i].code)
        free(unused)
        unused = take_unused_stack(t)
    while t.scopes != NULL:
        s = t.scopes
        t.scopes = s.next
        domain_release(s.name)
        free(s)
    free(t)


# -- the creator

# What outstanding() reads of a memory. The caller of rows_of() ends the uses of the stacks.
cdef struct tracked_row:
    size_t size, peak
    long long made_ns
    stack* made
    stack* peaked
    scope* scope
    bint has_store              # a wasmtime store owns the memory
    bint is_new                 # a creator is making the memory, or a pool above has it
    bint is_idle                # the memory is a slot of a pool above that has no user
    PyObject* handles           # a reference, or NULL


cdef size_t rows_of(tracker* t, tracked_row** out) noexcept:
    """The live memories, the newest first. *out is NULL if there is no room for them. The caller has the GIL."""
    cdef link* node
    cdef tracked* r
    cdef tracked_row* row
    cdef size_t n = 0
    lock(&t.lock.held)
    out[0] = row = <tracked_row*>malloc((t.root.sums.memories + 1) * sizeof(tracked_row))
    node = t.live.next
    while row != NULL and node.owner != NULL:
        r = <tracked*>node.owner
        row.size, row.peak, row.made_ns, row.scope = r.size, r.peak, r.made_ns, r.scope
        row.made, row.peaked, row.handles = r.made, r.peaked, r.handles
        row.has_store = load(&r.m.owner) == OWNER_WASMTIME
        row.is_new = load(&r.m.owner) == OWNER_CREATOR
        row.is_idle = load(&r.m.refs) == 0
        if row.made != NULL:
            row.made.uses += 1
        if row.peaked != NULL:
            row.peaked.uses += 1
        if row.handles != NULL:
            Py_INCREF(<object>row.handles)
        row += 1
        n += 1
        node = node.next
    unlock(&t.lock.held)
    return n


cdef bint has_handle(list handles):
    """Whether the program has an open handle, other than through an exported buffer."""
    cdef Memory handle
    for ref in tuple(handles):
        handle = ref()
        if handle is not None and not only_buffers_hold(handle):
            return True
    return False


@cython.final
cdef class TrackingCreator(NativeCreator):
    """TrackingCreator(upstream, *, frames=16, name=None)\n--\n
    Notes by which lines, and in which scope, the memories that come through it were made.

    A memory is noted with the Python stack that made it and with the stack of the growth to its largest size. The stack
    is the one of the thread that asks for the memory, also if wasmtime asks. The newest frames of linmem and wasmtime
    are left out. rmm has ``TrackingResourceAdaptor`` and the profiler of ``rmm.statistics``; this creator is both.

    Parameters
    ----------
    upstream : NativeCreator
        The creator that makes the memories.
    frames : int
        The most frames of a stack, at most 64. 0: no stacks, only scopes.
    name : str, optional
        Stands in the text of refusals whose creator has no name, and in `MemoryInfo` of the memories.

    Notes
    -----
    The tracker keeps code objects and line numbers; no frame, and so no local variable, stays alive. Equal stacks are
    kept once. There are at most 4096 stacks, and stacks of dropped memories give way first; a memory beyond that has an
    empty stack. There are at most 1024 scopes; a memory of a further scope counts in the enclosing scope. `overhead`
    counts both. A thread that Python does not know has no stack and no scope.
    """

    def __cinit__(self, *args, **kwargs):
        cdef size_t most
        cdef tracker* t
        upstream, frames, _ = _given("TrackingCreator", ("upstream", "frames", "name"), {"frames": 16, "name": None},
                                     args, kwargs, 1)
        self.upstream = check_native(upstream, "upstream")
        check_count(frames, "frames", &most)
        if most > MOST_FRAMES:
            raise ValueError(f"frames must be <= {MOST_FRAMES}, got {most}")
        t = <tracker*>new_zeroed(sizeof(tracker), "a tracker")
        t.scopes = t.root = <scope*>calloc(1, sizeof(scope))
        if t.root == NULL:
            free(t)
            raise MemoryError("no memory for a tracker")
        t.root.newest = -1
        t.n_scopes = 1
        t.refs = 1
        t.frames = <int>most
        t.begun_ns = pages.clock_ns()
        t.interval_ns = FIRST_INTERVAL
        list_init(&t.live)
        list_init(&t.unused)
        self.tracker = t
        with nogil:
            register_fork_lock(&t.lock)

    def __dealloc__(self):
        if self.tracker != NULL:
            with nogil:
                release_tracker(self.tracker)

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef tracker* t = self.tracker
        cdef tracked* r = <tracked*>calloc(1, sizeof(tracked))
        cdef int code
        if r == NULL:
            code = fail(why, E_NO_MEMORY, "calloc", sizeof(tracked))
        else:
            code = self.upstream.make(spec, out, why)
        if code:
            free(r)
            return finish_make(self, spec, code, out, why)
        if may_run_python():
            find_place(t, &r.made, &r.scope)
        if r.scope == NULL:
            r.scope = t.root
        add(&t.refs, 1)
        r.head.before_grow = tracking_before_grow
        r.head.after_grow = tracking_after_grow
        r.head.before_drop = tracking_before_drop
        r.head.dropped = tracking_dropped
        r.head.resized = tracking_resized
        r.head.wrapped = tracking_wrapped
        r.tracker = t
        r.m = out[0]
        r.peak = memory_size(out[0])
        r.made_ns = pages.clock_ns()
        lock(&t.lock.held)
        r.peaked = r.made
        if r.made != NULL:
            r.made.uses += 1
        list_add_first(&t.live, &r.in_tracker, r)
        count_memory(r.scope, 1)
        count_size(r, r.peak)
        unlock(&t.lock.held)
        memory_add_hook(out[0], &r.head)
        return finish_make(self, spec, 0, out, why)

    @property
    def frames(self):
        """The most frames of a stack."""
        return self.tracker.frames

    def scope(self, name):
        """Count the memories that are made in a ``with`` block under a name.

        The scope is a context variable: tasks that are started in the block, and ``asyncio.to_thread``, inherit it. A
        new `threading.Thread` does not, unless this Python passes the context on. Blocks nest. Do not `yield` in the
        block: the caller of a generator would be in the block, too. A memory counts in the scope in which it was made,
        until it is dropped, and in all scopes around that one.

        Parameters
        ----------
        name : str
            At most 1000 bytes in UTF-8.

        Returns
        -------
        context manager
            For one block.
        """
        cdef ScopeBlock block
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {type(name).__name__}")
        name = str.__str__(name)        # the text, whatever methods a class of the caller has
        if len(name.encode("utf-8", "surrogatepass")) > SCOPE_NAME_BYTES:
            raise ValueError(f"name must be at most {SCOPE_NAME_BYTES} bytes in UTF-8, got {_shown(name)}")
        block = ScopeBlock.__new__(ScopeBlock)
        block.creator = self
        block.name = name
        return block

    cdef list allocations(self, bint only_leaks):
        from linmem.records import Allocation
        cdef tracker* t = self.tracker
        cdef tracked_row* rows
        cdef tracked_row* row
        cdef size_t i, n = rows_of(t, &rows)
        cdef long long now = pages.clock_ns()
        if rows == NULL:
            raise MemoryError("no memory for the rows of a tracker")
        name = self.name
        found = []
        try:
            for i in range(n):
                row = &rows[i]
                if only_leaks and (row.has_store or row.is_new or row.is_idle
                                   or (row.handles != NULL and has_handle(<list>row.handles))):
                    continue
                found.append(Allocation(row.size, row.peak, (now - row.made_ns) / 1e9, summaries(row.made),
                                        summaries(row.peaked), path_of(row.scope), name))
        finally:
            lock(&t.lock.held)
            for i in range(n):
                end_use(t, rows[i].made)
                end_use(t, rows[i].peaked)
            unlock(&t.lock.held)
            for i in range(n):
                if rows[i].handles != NULL:
                    Py_DECREF(<object>rows[i].handles)
            free(rows)
        return found

    def outstanding(self):
        """The memories that exist, the newest first, as a list of `Allocation`.

        If a pool takes its slots from this creator, they are idle slots, too.
        """
        return self.allocations(False)

    def leaks(self):
        """The outstanding memories that only exported buffers keep alive, or nothing that Python can see.

        Such a memory belongs to no wasmtime store, and the program has no open `Memory` of it: every handle is closed
        or is kept by memoryviews and arrays alone. An array that the program still uses looks the same. A handle in a
        reference cycle counts as one of the program's until ``gc.collect()``. Without a GIL, memories that other
        threads are closing at this moment are listed, too.

        Returns
        -------
        list of Allocation
            The newest first.
        """
        return self.allocations(True)

    def scopes(self):
        """The sums of each scope, as a dict from the path of names, ``()`` for all, to `ScopeTotals`.

        The sums of a scope include the scopes in it.
        """
        from linmem.records import ScopeTotals
        cdef tracker* t = self.tracker
        cdef scope* s
        cdef scope* newest
        cdef size_t i = 0
        cdef scope_sums* copy = <scope_sums*>malloc((MOST_SCOPES + 1) * sizeof(scope_sums))
        if copy == NULL:
            raise MemoryError("no memory for the sums of the scopes")
        lock(&t.lock.held)
        s = newest = t.scopes       # scopes are only added, before the newest one
        while s != NULL:
            copy[i] = s.sums
            i += 1
            s = s.next
        unlock(&t.lock.held)
        found, s, i = {}, newest, 0
        try:
            while s != NULL:
                found[path_of(s)] = ScopeTotals(copy[i].size, copy[i].peak, copy[i].total, copy[i].memories,
                                                copy[i].made)
                i += 1
                s = s.next
        finally:
            free(copy)
        return dict(sorted(found.items()))

    def history(self):
        """How many bytes the memories of each scope had over time.

        Returns
        -------
        seconds : float
            The time that a point stands for. It doubles when 256 points have been written.
        points : dict
            A list of sizes for each path of names: the most bytes that the memories of the scope, without the scopes in
            it, had in that time. The first point begins with the creator, and the last is the present.
        """
        cdef tracker* t = self.tracker
        cdef scope* s
        cdef size_t[POINTS] copy
        cdef int i, n
        cdef double seconds = 0
        cdef bint again = True
        while again:            # once more if a thread notes a size meanwhile, and the interval doubles
            points = {}
            lock(&t.lock.held)
            s = t.scopes
            note(t, s, s.own)
            n = s.newest + 1
            seconds = t.interval_ns / 1e9
            unlock(&t.lock.held)
            again = False
            while s != NULL and not again:
                lock(&t.lock.held)
                again = t.interval_ns / 1e9 != seconds      # then all points have changed, and `n` is of the old ones
                if not again:
                    fill_history(s, max(n - 1, s.newest))
                    memcpy(copy, s.history, sizeof(copy))
                unlock(&t.lock.held)
                if not again:
                    points[path_of(s)] = [copy[i] for i in range(n)]
                    s = s.next
        return seconds, points

    def overhead(self):
        """What the tracker itself keeps.

        Returns
        -------
        dict
            memories, stacks, scopes: how many the tracker keeps. lost_stacks, lost_scopes: how often the tracker
            already had too many of them. bytes: of the tracker, without the code objects that it keeps alive.
        """
        cdef tracker* t = self.tracker
        lock(&t.lock.held)
        found = (t.root.sums.memories, t.n_stacks, t.n_scopes, t.lost_stacks, t.lost_scopes,
                 t.stack_bytes + t.name_bytes)
        unlock(&t.lock.held)
        return {"memories": found[0], "stacks": found[1], "scopes": found[2], "lost_stacks": found[3],
                "lost_scopes": found[4],
                "bytes": sizeof(tracker) + found[0] * sizeof(tracked) + found[2] * sizeof(scope) + found[5]}

    def report(self, path=None):
        """A report for people: the sums of the scopes, and the lines that made the most bytes.

        Parameters
        ----------
        path : str, bytes or path-like, optional
            Draw a picture into this file instead: the bytes over time, by scope. The suffix names the format ("png",
            "svg", "pdf"). The picture needs matplotlib, which the extra ``linmem[image]`` installs.

        Returns
        -------
        str or None
            The text; None if a picture was drawn.

        Raises
        ------
        ImportError
            A picture without matplotlib.
        """
        from linmem._core import tracking_report
        if path is None:
            return tracking_report.text(self.outstanding(), self.scopes(), self.overhead())
        return tracking_report.draw(path, *self.history())

    def __repr__(self):
        return f"TrackingCreator({self.upstream!r}, frames={self.tracker.frames}{name_option(self)})"
