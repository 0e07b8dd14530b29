# StatisticsCreator: counts and times what happens to memories. Part of adaptors.pyx.

cdef enum:
    MOST_CHANGES = 1 << 20      # of the size of a memory

# One row of memories(); sizes in bytes.
cdef struct memory_report:
    bint alive
    size_t first_size
    size_t size
    size_t growths
    size_t refused
    long long grow_ns
    size_t peak_resident    # sampled when the report is made and when the memory is dropped
    size_t base             # the address of byte 0; of a dropped memory, the address that it had
    char name[NAME_BYTES + 1]


cdef struct size_change:
    long long at_ns
    size_t size

# The hook of a memory. After the memory is gone, the ledger keeps the record.
cdef struct record:
    memory_hook head
    statistics_ledger* ledger
    link in_ledger          # in the list `live` or `dropped`; in no list while the memory is being dropped
    memory* m               # valid while the memory is alive
    atomic_i64 sampling     # a lock: the memory is not freed while another thread holds it
    size_t counted          # the memory's part of current_bytes: its size, or 0 while it is a cold slot of a pool above
    long long started_ns    # of the growth under way
    memory_report report
    size_change* changes    # the first, the last, and some between, at most `timeline`; NULL if that is 0
    size_t n_changes


cdef void free_record(record* r) noexcept nogil:
    free(r.changes)
    free(r)


cdef void note_change(record* r, size_t size, long long now) noexcept nogil:
    """The ledger's lock is held. If there is no room for the change, every second one is forgotten."""
    cdef size_t i
    if r.changes == NULL:
        return
    if r.n_changes == r.ledger.timeline:
        r.n_changes = (r.n_changes + 1) // 2
        for i in range(r.n_changes):
            r.changes[i] = r.changes[2 * i]
    r.changes[r.n_changes].at_ns = now
    r.changes[r.n_changes].size = size
    r.n_changes += 1


cdef void forget_oldest(statistics_ledger* ledger) noexcept nogil:
    """Frees the oldest record of a dropped memory. The ledger's lock is held, or no thread has a reference."""
    cdef record* oldest = <record*>ledger.dropped.previous.owner
    list_remove(&oldest.in_ledger)
    ledger.n_dropped -= 1
    free_record(oldest)


cdef void release_ledger(statistics_ledger* ledger) noexcept nogil:
    if add(&ledger.refs, -1) == 0:      # so no memory is left, and the list `live` is empty
        unregister_fork_lock(&ledger.lock)
        while ledger.n_dropped:
            forget_oldest(ledger)
        free(ledger)


cdef void count_bytes(record* r, size_t size) noexcept nogil:
    """The ledger's lock is held."""
    cdef statistics_sums* sums = &r.ledger.sums
    sums.current_bytes += size - r.counted      # if the memory shrinks, both operations wrap around: the sum is right
    r.counted = size
    sums.peak_bytes = max(sums.peak_bytes, sums.current_bytes)


cdef size_t resident_now(memory* m) noexcept nogil:
    cdef failure unused
    cdef size_t resident
    return resident if memory_resident(m, &resident, &unused) == 0 else 0


cdef void sample_all(statistics_ledger* ledger) noexcept nogil:
    """Samples the resident bytes of each live memory. The lock is not held during the system calls: they take long for
    large memories, and each growth of another memory needs the lock."""
    cdef size_t resident
    cdef record* r
    lock(&ledger.lock.held)
    r = <record*>ledger.live.next.owner
    while r != NULL:
        # Memories that are being dropped, or that another thread samples, are left out.
        if try_lock(&r.sampling):
            unlock(&ledger.lock.held)
            resident = resident_now(r.m)        # the drop waits for `sampling`, so the record stays in its list
            lock(&ledger.lock.held)
            r.report.peak_resident = max(r.report.peak_resident, resident)
            unlock(&r.sampling)
        r = <record*>r.in_ledger.next.owner
    unlock(&ledger.lock.held)


cdef memory_report* copy_reports(link* head, memory_report* copies) noexcept nogil:
    """The ledger's lock is held. Returns the end of the copies."""
    cdef link* node = head.next
    while node.owner != NULL:
        copies[0] = (<record*>node.owner).report
        copies += 1
        node = node.next
    return copies


cdef int statistics_before_grow(memory_hook* head, memory* m, size_t new_size, failure* why) noexcept nogil:
    (<record*>head).started_ns = pages.clock_ns()
    return 0


cdef void statistics_after_grow(memory_hook* head, memory* m, size_t old_size, size_t new_size,
                                int code) noexcept nogil:
    cdef record* r = <record*>head
    cdef statistics_ledger* ledger = r.ledger
    cdef long long now = pages.clock_ns(), spent = now - r.started_ns
    lock(&ledger.lock.held)
    r.report.grow_ns += spent
    if code:
        r.report.refused += 1
        ledger.sums.failures += 1
    else:
        r.report.growths += 1
        r.report.size = new_size
        r.report.base = <size_t>load_address(&m.base)
        note_change(r, new_size, now)
        ledger.sums.total_bytes += new_size - r.counted
        count_bytes(r, new_size)
    unlock(&ledger.lock.held)


cdef void statistics_before_drop(memory_hook* head, memory* m) noexcept nogil:
    cdef record* r = <record*>head
    cdef statistics_ledger* ledger = r.ledger
    cdef size_t resident
    if not r.report.alive:
        return
    lock(&r.sampling)        # and never released
    resident = resident_now(m)
    lock(&ledger.lock.held)
    r.report.peak_resident = max(r.report.peak_resident, resident)
    r.report.alive = False
    note_change(r, 0, pages.clock_ns())
    count_bytes(r, 0)
    ledger.sums.current_count -= 1
    list_remove(&r.in_ledger)
    unlock(&ledger.lock.held)


cdef int statistics_resized(memory_hook* head, memory* m, size_t size, size_t accessible, failure* why) noexcept nogil:
    cdef record* r = <record*>head
    lock(&r.ledger.lock.held)
    r.report.size = size if accessible else r.report.first_size
    note_change(r, size, pages.clock_ns())
    count_bytes(r, size)
    unlock(&r.ledger.lock.held)
    return 0


cdef void statistics_dropped(memory_hook* head) noexcept nogil:
    cdef record* r = <record*>head
    cdef statistics_ledger* ledger = r.ledger
    lock(&ledger.lock.held)
    list_add_first(&ledger.dropped, &r.in_ledger, r)
    ledger.n_dropped += 1
    if ledger.n_dropped > ledger.history:
        forget_oldest(ledger)
    unlock(&ledger.lock.held)
    release_ledger(ledger)


cdef void copy_name(StatisticsCreator creator, memory* m, char* out) noexcept nogil:
    cdef domain_t* name = memory_name(m)
    if name == NULL:
        name = creator.name_struct
    if name != NULL:
        memcpy(out, name.name, name.size)


@cython.final
cdef class StatisticsCreator(NativeCreator):
    """StatisticsCreator(upstream, history=256, timeline=0, *, name=None)\n--\n
    Counts and times what happens to the memories that come through it.

    rmm's ``StatisticsResourceAdaptor`` has such sums. This creator also keeps a record of each memory. Two memories
    that show the same shared memory count as two.

    Parameters
    ----------
    upstream : NativeCreator
        The creator that makes the memories.
    history : int
        How many records of dropped memories the creator keeps. The oldest record goes first.
    timeline : int
        How many changes of its size a record keeps for `timeline`: the first, the last, and some between. 0: none.
    name : str, optional
        Stands in the text of refusals whose creator has no name, and in `MemoryInfo` of the memories.
    """

    def __cinit__(self, *args, **kwargs):
        cdef size_t kept, changes
        upstream, history, timeline, _ = _given("StatisticsCreator", ("upstream", "history", "timeline", "name"),
                                                {"history": 256, "timeline": 0, "name": None}, args, kwargs, 3)
        self.upstream = check_native(upstream, "upstream")
        check_count(history, "history", &kept)
        check_count(timeline, "timeline", &changes)
        if changes == 1 or changes > MOST_CHANGES:
            raise ValueError(f"timeline must be 0, or 2 to {MOST_CHANGES} changes, got {changes}")
        self.ledger = <statistics_ledger*>new_zeroed(sizeof(statistics_ledger), "a ledger")
        self.ledger.refs = 1
        self.ledger.history = kept
        self.ledger.timeline = changes
        self.ledger.started_ns = pages.clock_ns()
        list_init(&self.ledger.live)
        list_init(&self.ledger.dropped)
        with nogil:
            register_fork_lock(&self.ledger.lock)

    def __dealloc__(self):
        if self.ledger != NULL:
            with nogil:
                release_ledger(self.ledger)

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef statistics_ledger* ledger = self.ledger
        cdef record* r = <record*>calloc(1, sizeof(record))
        cdef int code = 0
        if r != NULL and ledger.timeline:
            r.changes = <size_change*>calloc(ledger.timeline, sizeof(size_change))
        if r == NULL or (ledger.timeline and r.changes == NULL):
            code = fail(why, E_NO_MEMORY, "calloc", sizeof(record) + ledger.timeline * sizeof(size_change))
        else:
            code = self.upstream.make(spec, out, why)
        if code:
            if r != NULL:
                free_record(r)
            lock(&ledger.lock.held)
            ledger.sums.failures += 1
            unlock(&ledger.lock.held)
            return finish_make(self, spec, code, out, why)
        add(&ledger.refs, 1)
        r.head.before_grow = statistics_before_grow
        r.head.after_grow = statistics_after_grow
        r.head.before_drop = statistics_before_drop
        r.head.dropped = statistics_dropped
        r.head.resized = statistics_resized
        r.ledger = ledger
        r.m = out[0]
        copy_name(self, out[0], r.report.name)
        r.report.alive = True
        r.report.first_size = r.report.size = memory_size(out[0])
        r.report.base = <size_t>load_address(&out[0].base)
        lock(&ledger.lock.held)
        note_change(r, r.report.size, pages.clock_ns())
        list_add_first(&ledger.live, &r.in_ledger, r)
        count_bytes(r, r.report.size)
        ledger.sums.total_bytes += r.report.size
        ledger.sums.total_count += 1
        ledger.sums.current_count += 1
        ledger.sums.peak_count = max(ledger.sums.peak_count, ledger.sums.current_count)
        unlock(&ledger.lock.held)
        memory_add_hook(out[0], &r.head)
        return finish_make(self, spec, 0, out, why)

    def statistics(self):
        """The sums over all memories, as a dict. Bytes are byte_size. Failures are refused creations and growths."""
        cdef statistics_sums sums
        with nogil:
            lock(&self.ledger.lock.held)
            sums = self.ledger.sums
            unlock(&self.ledger.lock.held)
        return sums

    def memories(self):
        """A dict for each memory, live ones first, then the newest dropped ones.

        The keys are alive, first_size, size, growths, refused, grow_ns, peak_resident, base (an address) and name (of
        the outermost creator upstream with a name, or of this one, or None). linmem samples peak_resident in this call
        and when a memory is dropped. This figure is exact for a memory that never gives pages back, as memories of
        WebAssembly.
        """
        cdef memory_report* copy
        cdef size_t n, i
        with nogil:
            sample_all(self.ledger)
            lock(&self.ledger.lock.held)
            n = self.ledger.sums.current_count + self.ledger.n_dropped
            copy = <memory_report*>malloc((n + 1) * sizeof(memory_report))
            if copy != NULL:
                copy_reports(&self.ledger.dropped, copy_reports(&self.ledger.live, copy))
            unlock(&self.ledger.lock.held)
        if copy == NULL:
            raise MemoryError(f"no memory for {n} records")
        try:
            return [dict(copy[i], name=copy[i].name.decode() or None) for i in range(n)]
        finally:
            free(copy)

    def timeline(self):
        """For each memory, in the order of `memories`, its sizes over time as a list of (nanoseconds, bytes).

        The times are since this creator was made. A memory that was dropped ends with 0 bytes. The lists are empty
        without ``timeline=``.
        """
        cdef size_change* copy
        cdef size_t* counts
        cdef size_t n, i, j, most = max(<size_t>1, self.ledger.timeline)
        cdef link* node
        cdef record* r
        cdef bint in_dropped
        with nogil:
            lock(&self.ledger.lock.held)
            n = self.ledger.sums.current_count + self.ledger.n_dropped
            copy = <size_change*>malloc((n + 1) * most * sizeof(size_change))
            counts = <size_t*>malloc((n + 1) * sizeof(size_t))
            i = 0
            if copy != NULL and counts != NULL:
                for in_dropped in range(2):
                    node = self.ledger.dropped.next if in_dropped else self.ledger.live.next
                    while node.owner != NULL:
                        r = <record*>node.owner
                        counts[i] = r.n_changes
                        for j in range(r.n_changes):
                            copy[i * most + j] = r.changes[j]
                        i += 1
                        node = node.next
            unlock(&self.ledger.lock.held)
        try:
            if copy == NULL or counts == NULL:
                raise MemoryError(f"no memory for the sizes of {n} memories")
            return [[(change.at_ns - self.ledger.started_ns, change.size)
                     for change in copy[row * most:row * most + counts[row]]] for row in range(i)]
        finally:
            free(copy)
            free(counts)

    def __repr__(self):
        return f"StatisticsCreator({self.upstream!r}{name_option(self)})"
