# cython: language_level=3
"""Creators over an upstream creator: a budget, statistics, and a Python class as a creator."""

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport SIZE_MAX
from libc.stdlib cimport calloc, free, malloc

from linmem._core.atomic cimport add, load, poke, poke_address, store, swap_if
from linmem._core.memory cimport (
    NO_MAXIMUM, PROTECTION_NONE, RELIEF_BUDGET, UNCHOSEN, Image, Memory, NativeCreator, acquire, answer_request,
    begin_move, begin_own_growth, check_bounded, check_count, check_native, check_size, current_domain, drop_object,
    end_move, end_own_growth, fail, fail_python, failure, fork_lock, give_back, image_copy, in_each_child, image_detach,
    list_lock, list_memory, live_after, memory, memory_hang, memory_hook, memory_ops, memory_resident, memory_retain,
    memory_size, memory_spec, own_growth, python_is_ending, raise_failure, refuse_foreign, relieve, request,
    try_acquire, unlist_lock, unlist_memory, unlock,
)
from linmem._os cimport pages
from linmem._core.units cimport E_BROKEN, E_LIMIT, E_NO_MEMORY, E_UNSUPPORTED, round_up

from linmem._core.arguments import given as _given


cdef inline size_t committed(size_t size) noexcept nogil:
    """Bytes that a memory of `size` bytes commits."""
    cdef size_t out
    return SIZE_MAX >> 1 if round_up(size, pages.capabilities().page_size, &out) else out


# -- a budget --------------------------------------------------------------------------------------

cdef struct limit_hook:
    memory_hook head
    budget* budget
    size_t charged          # whole host pages that the guest has accessible
    size_t before           # the growth under way


cdef int charge(budget* b, size_t size, size_t total, failure* why) noexcept nogil:
    """All of it or nothing; exact under threads. Idle slots of pools over this budget give up what is missing first,
    unless the memory, of `total` bytes then, is refused by a limit anyway. The caller holds no fork_lock."""
    cdef long long used, peak
    while True:
        used = load(&b.used)
        if size > <size_t>(b.limit - used):
            if total <= <size_t>b.least and relieve(RELIEF_BUDGET, b, size - <size_t>(b.limit - used)):
                continue
            return fail(why, E_LIMIT, "limit", size, <size_t>used, <size_t>b.limit)
        if swap_if(&b.used, used, used + <long long>size):
            break
    used += <long long>size
    while True:
        peak = load(&b.peak)
        if used <= peak or swap_if(&b.peak, peak, used):
            return 0


cdef void refund(budget* b, size_t size) noexcept nogil:
    add(&b.used, -<long long>size)


# A memory that this thread is making, which no hook tells of yet. They nest, where an upstream in Python is asked.
cdef struct own_charge:
    own_charge* outer
    budget* budget
    size_t size

cdef extern from *:
    """
    static LINMEM_OF_THREAD void *linmem_own_charges;
    static void **linmem_own_charges_of_thread(void) { return &linmem_own_charges; }
    """
    void** own_charges "linmem_own_charges_of_thread"() noexcept nogil

cdef budget* budgets = NULL
cdef fork_lock budgets_lock
cdef word budgets_started


cdef void list_budget(budget* b) noexcept nogil:
    global budgets
    if swap_if(&budgets_started, 0, 1):     # not when the module is imported: memory.pyx may not be ready then
        list_lock(&budgets_lock)
        in_each_child(charge_anew)
    acquire(&budgets_lock.held)
    b.next = budgets
    if budgets != NULL:
        budgets.previous = b
    budgets = b
    unlock(&budgets_lock.held)


cdef void release_budget(budget* b) noexcept nogil:
    global budgets
    if add(&b.refs, -1):
        return
    acquire(&budgets_lock.held)
    if b.next != NULL:
        b.next.previous = b.previous
    if b.previous != NULL:
        b.previous.next = b.next
    else:
        budgets = b.next
    unlock(&budgets_lock.held)
    free(b)


cdef void charge_anew() noexcept nogil:
    """In a forked child: what a lost thread had charged, or was about to refund, is not told from the rest. So the
    budgets are charged with what the memories have that are there, and those that this thread is making."""
    cdef budget* b = budgets
    cdef own_charge* own = <own_charge*>own_charges()[0]
    cdef memory* m = live_after(NULL)
    cdef memory_hook* hook
    while b != NULL:
        store(&b.used, 0)
        b = b.next
    while own != NULL:
        add(&own.budget.used, <long long>own.size)
        own = own.outer
    while m != NULL:
        hook = m.hooks
        while hook != NULL:
            if hook.dropped == limit_dropped:
                add(&(<limit_hook*>hook).budget.used, <long long>(<limit_hook*>hook).charged)
            hook = hook.next
        m = live_after(m)


cdef int limit_before_grow(memory_hook* head, memory* m, size_t new_size, failure* why) noexcept nogil:
    cdef limit_hook* hook = <limit_hook*>head
    cdef size_t need = committed(new_size)
    cdef int code
    hook.before = hook.charged
    if need <= hook.charged:
        return 0
    code = charge(hook.budget, need - hook.charged, need, why)
    if code == 0:
        hook.charged = need
    return code


cdef void limit_after_grow(memory_hook* head, memory* m, size_t old_size, size_t new_size, int code) noexcept nogil:
    cdef limit_hook* hook = <limit_hook*>head
    if code and hook.charged > hook.before:
        refund(hook.budget, hook.charged - hook.before)
        hook.charged = hook.before


cdef int limit_resized(memory_hook* head, memory* m, size_t size, size_t accessible, failure* why) noexcept nogil:
    cdef limit_hook* hook = <limit_hook*>head
    cdef int code = 0
    if accessible > hook.charged:
        code = charge(hook.budget, accessible - hook.charged, accessible, why)
    elif accessible < hook.charged:
        refund(hook.budget, hook.charged - accessible)
    if code == 0:
        hook.charged = accessible
    return code


cdef void limit_dropped(memory_hook* head) noexcept nogil:
    # Refunded now and not before: the budget never allows more than is committed.
    cdef limit_hook* hook = <limit_hook*>head
    refund(hook.budget, hook.charged)
    release_budget(hook.budget)
    free(hook)


@cython.final
cdef class LimitingCreator(NativeCreator):
    """One budget of committed bytes over all memories that come through it.

    Charged (in whole host pages) when a memory is made and when it grows, refunded when it is
    dropped; exact under threads. Over it: `LimitError`, in wasm -1 from ``memory.grow``. Limits
    nest: each takes the next as its upstream. As rmm's ``LimitingResourceAdaptor``.

    Parameters
    ----------
    upstream : NativeCreator
        Who makes the memories.
    limit_bytes : int
        The budget in bytes.
    """

    def __cinit__(self, *args, **kwargs):
        cdef size_t limit
        upstream, limit_bytes = _given("LimitingCreator", ("upstream", "limit_bytes"), {}, args, kwargs)
        self.upstream = check_native(upstream, "upstream")
        check_bounded(limit_bytes, "limit_bytes", "below 2**63", &limit)
        if limit > SIZE_MAX >> 1:
            raise OverflowError(f"limit_bytes must be below 2**63, got {limit}")
        self.budget = <budget*>calloc(1, sizeof(budget))
        if self.budget == NULL:
            raise MemoryError("no memory for a budget")
        self.budget.refs = 1
        self.budget.limit = self.budget.least = <long long>limit
        while upstream is not None:
            if isinstance(upstream, LimitingCreator) and upstream.limit_bytes < self.budget.least:
                self.budget.least = upstream.limit_bytes
            upstream = getattr(upstream, "upstream", None)
        with nogil:
            list_budget(self.budget)

    def __dealloc__(self):
        if self.budget != NULL:
            release_budget(self.budget)

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef size_t size = committed(spec.minimum)
        cdef limit_hook* hook
        cdef own_charge own
        cdef int code = charge(self.budget, size, size, why)
        if code:
            return code
        own.budget, own.size, own.outer = self.budget, size, <own_charge*>own_charges()[0]
        own_charges()[0] = &own
        hook = <limit_hook*>calloc(1, sizeof(limit_hook))
        if hook == NULL:
            code = fail(why, E_NO_MEMORY, "calloc", sizeof(limit_hook))
        else:
            code = self.upstream.make(spec, out, why)
        own_charges()[0] = own.outer
        if code:
            free(hook)
            refund(self.budget, size)
            return code
        add(&self.budget.refs, 1)
        hook.head.before_grow = limit_before_grow
        hook.head.after_grow = limit_after_grow
        hook.head.dropped = limit_dropped
        hook.head.resized = limit_resized
        hook.head.budget = self.budget
        hook.budget = self.budget
        hook.charged = size
        memory_hang(out[0], &hook.head)
        return 0

    @property
    def limit_bytes(self):
        """The budget in bytes."""
        return self.budget.limit

    @property
    def used_bytes(self):
        """Bytes charged to the budget now, whole host pages."""
        return load(&self.budget.used)

    @property
    def peak_bytes(self):
        """The most bytes that were ever charged at once."""
        # Whoever charges them notes it afterwards, and in a forked child perhaps never.
        cdef long long used = load(&self.budget.used), peak = load(&self.budget.peak)
        return peak if peak > used else used

    def __repr__(self):
        return f"LimitingCreator({self.upstream!r}, limit_bytes={self.limit_bytes}, used_bytes={self.used_bytes})"


# -- statistics --------------------------------------------------------------------------------------

cdef struct statistics_hook:
    memory_hook head
    ledger* ledger
    record* record
    long long started_ns    # of the growth under way


cdef void free_records(record* r) noexcept nogil:
    cdef record* next
    while r != NULL:
        next = r.next
        free(r)
        r = next


cdef void release_ledger(ledger* book) noexcept nogil:
    if add(&book.refs, -1) == 0:
        unlist_lock(&book.lock)
        free_records(book.live)
        free_records(book.dropped)
        free(book)


cdef size_t resident_now(memory* m) noexcept nogil:
    cdef failure why
    cdef size_t resident
    return resident if memory_resident(m, &resident, &why) == 0 else 0


cdef void sample_all(ledger* book) noexcept nogil:
    """Sample what is resident of each live memory. The lock is held between the system calls only: they take long for
    large memories, and each growth of another memory needs the lock."""
    cdef size_t resident
    cdef record* r
    acquire(&book.lock.held)
    r = book.live
    while r != NULL:
        # A memory that is being dropped, or that another thread samples, is left out.
        if try_acquire(&r.sampling):
            unlock(&book.lock.held)
            resident = resident_now(r.m)        # its drop waits for `sampling`, so the record stays in its list, too
            acquire(&book.lock.held)
            if resident > r.peak_resident:
                r.peak_resident = resident
            unlock(&r.sampling)
        r = r.next
    unlock(&book.lock.held)


cdef int statistics_before_grow(memory_hook* head, memory* m, size_t new_size, failure* why) noexcept nogil:
    (<statistics_hook*>head).started_ns = pages.clock_ns()
    return 0


cdef void statistics_after_grow(memory_hook* head, memory* m, size_t old_size, size_t new_size,
                                int code) noexcept nogil:
    cdef statistics_hook* hook = <statistics_hook*>head
    cdef ledger* book = hook.ledger
    cdef record* r = hook.record
    cdef long long spent = pages.clock_ns() - hook.started_ns
    cdef size_t more = new_size - r.counted
    acquire(&book.lock.held)
    r.grow_ns += spent
    if code:
        r.refused += 1
        book.failures += 1
    else:
        r.growths += 1
        r.size = r.counted = new_size
        book.current_bytes += more
        book.total_bytes += more
        if book.current_bytes > book.peak_bytes:
            book.peak_bytes = book.current_bytes
    unlock(&book.lock.held)


cdef void statistics_before_drop(memory_hook* head, memory* m) noexcept nogil:
    cdef statistics_hook* hook = <statistics_hook*>head
    cdef ledger* book = hook.ledger
    cdef record* r = hook.record
    cdef size_t resident
    if r == NULL:
        return
    acquire(&r.sampling)        # for good
    resident = resident_now(m)
    acquire(&book.lock.held)
    if resident > r.peak_resident:
        r.peak_resident = resident
    hook.record = r.m = NULL
    if r.previous != NULL:
        r.previous.next = r.next
    else:
        book.live = r.next
    if r.next != NULL:
        r.next.previous = r.previous
    book.n_live -= 1
    book.current_bytes -= r.counted
    r.previous = NULL
    r.next = book.dropped
    if book.dropped != NULL:
        book.dropped.previous = r
    else:
        book.oldest = r
    book.dropped = r
    book.n_dropped += 1
    if book.n_dropped > book.history:
        forget_oldest(book)
    unlock(&book.lock.held)


cdef int statistics_resized(memory_hook* head, memory* m, size_t size, size_t accessible, failure* why) noexcept nogil:
    cdef ledger* book = (<statistics_hook*>head).ledger
    cdef record* r = (<statistics_hook*>head).record
    acquire(&book.lock.held)
    book.current_bytes += size - r.counted          # modulo the word: it may become less
    r.counted = size
    r.size = size if accessible else r.first_size
    if book.current_bytes > book.peak_bytes:
        book.peak_bytes = book.current_bytes
    unlock(&book.lock.held)
    return 0


cdef void forget_oldest(ledger* book) noexcept nogil:
    cdef record* r = book.oldest
    book.oldest = r.previous
    if book.oldest != NULL:
        book.oldest.next = NULL
    else:
        book.dropped = NULL
    book.n_dropped -= 1
    free(r)


cdef void statistics_dropped(memory_hook* head) noexcept nogil:
    release_ledger((<statistics_hook*>head).ledger)
    free(head)


@cython.final
cdef class StatisticsCreator(NativeCreator):
    """Counts and times what happens to the memories that come through it.

    As rmm's ``StatisticsResourceAdaptor``, with a record of each memory beside the sums.

    Parameters
    ----------
    upstream : NativeCreator
        Who makes the memories.
    history : int
        How many records of dropped memories are kept, the newest.
    """

    def __cinit__(self, *args, **kwargs):
        cdef size_t kept
        upstream, history = _given("StatisticsCreator", ("upstream", "history"), {"history": 256}, args, kwargs)
        self.upstream = check_native(upstream, "upstream")
        check_count(history, "history", &kept)
        self.ledger = <ledger*>calloc(1, sizeof(ledger))
        if self.ledger == NULL:
            raise MemoryError("no memory for a ledger")
        self.ledger.refs = 1
        self.ledger.history = kept
        with nogil:
            list_lock(&self.ledger.lock)

    def __dealloc__(self):
        if self.ledger != NULL:
            with nogil:
                release_ledger(self.ledger)

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef ledger* book = self.ledger
        cdef statistics_hook* hook = <statistics_hook*>calloc(1, sizeof(statistics_hook))
        cdef record* r = <record*>calloc(1, sizeof(record))
        cdef int code
        if hook == NULL or r == NULL:
            code = fail(why, E_NO_MEMORY, "calloc", sizeof(record))
        else:
            code = self.upstream.make(spec, out, why)
        if code:
            free(hook)
            free(r)
            acquire(&book.lock.held)
            book.failures += 1
            unlock(&book.lock.held)
            return code
        add(&book.refs, 1)
        hook.head.before_grow = statistics_before_grow
        hook.head.after_grow = statistics_after_grow
        hook.head.before_drop = statistics_before_drop
        hook.head.dropped = statistics_dropped
        hook.head.resized = statistics_resized
        hook.ledger = book
        hook.record = r
        r.m = out[0]
        r.first_size = r.size = r.counted = memory_size(out[0])
        acquire(&book.lock.held)
        r.next = book.live
        if book.live != NULL:
            book.live.previous = r
        book.live = r
        book.n_live += 1
        book.total_count += 1
        book.current_bytes += r.size
        book.total_bytes += r.size
        if book.n_live > book.peak_count:
            book.peak_count = book.n_live
        if book.current_bytes > book.peak_bytes:
            book.peak_bytes = book.current_bytes
        unlock(&book.lock.held)
        memory_hang(out[0], &hook.head)
        return 0

    def statistics(self):
        """The sums, as a dict: bytes are byte_size; failures are refused creations and growths."""
        cdef ledger book            # only what is reported
        with nogil:
            acquire(&self.ledger.lock.held)
            book.current_bytes, book.peak_bytes = self.ledger.current_bytes, self.ledger.peak_bytes
            book.total_bytes, book.failures = self.ledger.total_bytes, self.ledger.failures
            book.n_live, book.peak_count = self.ledger.n_live, self.ledger.peak_count
            book.total_count = self.ledger.total_count
            unlock(&self.ledger.lock.held)
        return {"current_bytes": book.current_bytes, "peak_bytes": book.peak_bytes, "total_bytes": book.total_bytes,
                "current_count": book.n_live, "peak_count": book.peak_count, "total_count": book.total_count,
                "failures": book.failures}

    def memories(self):
        """A dict for each memory, live ones first, then the newest dropped ones.

        Keys: alive, first_size, size, growths, refused, grow_ns, peak_resident. peak_resident is
        sampled now and when a memory is dropped: exact for one that never gives pages back, as wasm's.
        """
        cdef record* copy = NULL
        cdef size_t n = 0, room = 0, i
        with nogil:
            sample_all(self.ledger)
            while True:
                acquire(&self.ledger.lock.held)
                n = self.ledger.n_live + self.ledger.n_dropped
                if n <= room:
                    break
                unlock(&self.ledger.lock.held)
                free(copy)
                room = n + 8
                copy = <record*>malloc(room * sizeof(record))
                if copy == NULL:
                    break
            if copy != NULL or n == 0:
                copy_records(self.ledger, copy)
                unlock(&self.ledger.lock.held)
        if copy == NULL and n:
            raise MemoryError(f"no memory for {n} records")
        try:
            return [{"alive": copy[i].m != NULL, "first_size": copy[i].first_size, "size": copy[i].size,
                     "growths": copy[i].growths, "refused": copy[i].refused, "grow_ns": copy[i].grow_ns,
                     "peak_resident": copy[i].peak_resident} for i in range(n)]
        finally:
            free(copy)

    def __repr__(self):
        return f"StatisticsCreator({self.upstream!r})"


cdef void copy_records(ledger* book, record* to) noexcept nogil:
    cdef record* r = book.live
    while r != NULL:
        copy_record(r, to)
        to += 1
        r = r.next
    r = book.dropped
    while r != NULL:
        copy_record(r, to)
        to += 1
        r = r.next


cdef inline void copy_record(const record* r, record* to) noexcept nogil:
    """What is reported; `sampling` is not under the ledger's lock."""
    to.m = r.m
    to.first_size, to.size, to.growths, to.refused = r.first_size, r.size, r.growths, r.refused
    to.grow_ns, to.peak_resident = r.grow_ns, r.peak_resident


# -- a Python class as a creator ------------------------------------------------------------------------

cdef struct python_memory:
    memory head
    size_t reservation      # what wasm was promised, whatever the capacity
    PyObject* object        # the LinearMemory; dropped through drop_object, never touched without the GIL
    size_t shelter          # bytes at the base of a broken one, inaccessible; 0: there were none to be had

# An address that no process of any of our systems has mapped: of neither half of the address space.
cdef size_t UNMAPPABLE = <size_t>1 << 55


# What a Python memory says of itself.
cdef struct answers:
    size_t base
    size_t size
    size_t capacity
    size_t covered
    size_t maximum


cdef int ask_python_memory(python_memory* p, size_t size, answers* out) except -1:
    """Ask the Python memory where and how large it is, and believe only what can be true. Changes nothing.
    size: what it has to be; NO_MAXIMUM: any."""
    cdef size_t bound
    cdef size_t reservation = p.reservation, guard = p.head.guard
    made = <object>p.object
    name = type(made).__name__
    check_size(made.as_ptr(), "as_ptr()", &out.base)
    check_size(made.byte_size(), "byte_size()", &out.size)
    check_size(made.byte_capacity(), "byte_capacity()", &out.capacity)
    if size != NO_MAXIMUM:
        refuse_python_size(p, size, out)
    accessible = made.wasm_accessible()
    if out.base == 0 or out.base & (pages.capabilities().page_size - 1):
        raise ValueError(f"{name}.as_ptr() must be a non-zero multiple of the host page"
                         f" ({pages.capabilities().page_size}), got {out.base:#x}")
    if out.capacity < out.size:
        raise ValueError(f"{name}.byte_capacity() must be >= byte_size() ({out.size}), got {out.capacity}")
    out.covered = out.capacity if out.capacity > reservation else reservation
    if (out.covered > SIZE_MAX >> 1 or out.covered > SIZE_MAX - out.base
            or guard > SIZE_MAX - out.base - out.covered):
        raise ValueError(f"{name}.byte_capacity() does not fit an address: {out.capacity}")
    out.covered += guard
    # Native code is compiled on the promise that all of this is accessible or faults.
    if not (accessible.start <= out.base and out.base + out.covered <= accessible.stop):
        raise ValueError(f"{name}.wasm_accessible() must cover {out.base:#x} .. {out.base + out.covered:#x}: its"
                         f" capacity of {out.capacity} (reservation asked for: {reservation}) and a guard of {guard}"
                         f" bytes; got {accessible.start:#x} .. {accessible.stop:#x}")
    out.maximum = p.head.maximum
    maximum = made.maximum_byte_size() if hasattr(made, "maximum_byte_size") else None
    if maximum is not None:
        check_size(maximum, "maximum_byte_size()", &bound)
        if bound < out.size:
            raise ValueError(f"{name}.maximum_byte_size() must be >= byte_size() ({out.size}), got {bound}")
        if bound < out.maximum:
            out.maximum = bound
    return 0


cdef int refuse_python_size(python_memory* p, size_t size, const answers* got) except -1:
    if got.size != size:
        raise ValueError(f"{type(<object>p.object).__name__}.byte_size() must be what was asked for ({size}),"
                         f" got {got.size}")
    return 0


cdef void believe(python_memory* p, const answers* got, size_t size) noexcept nogil:
    poke_address(&p.head.base, <char*>got.base)
    poke(&p.head.accessible, size)
    poke(&p.head.capacity, got.capacity)
    poke(&p.head.covered, got.covered)
    poke(&p.head.maximum, got.maximum)
    store(&p.head.size, <long long>size)


cdef void break_memory(memory* m) noexcept nogil:
    """Nobody knows any more where the bytes are. Every use raises from now on, and wasm, which is told of the new
    base after each growth, faults at the first byte. For ever: what is unknown once is not believed again."""
    cdef python_memory* p = <python_memory*>m
    cdef char* nowhere = <char*>UNMAPPABLE
    cdef size_t size = 0
    if m.broken:
        return
    m.broken = True
    if (round_up(m.covered + 1, pages.capabilities().granularity, &size) == 0
            and pages.reserve(size, False, &nowhere) == 0):
        p.shelter = size
    poke_address(&m.base, nowhere)
    poke(&m.accessible, 0)
    store(&m.size, 0)


cdef int python_grow(memory* m, size_t new_size, failure* why) noexcept nogil:
    cdef int code
    cdef bint may_move = new_size > m.capacity
    cdef own_growth growth
    if m.broken:
        return fail(why, E_BROKEN, "grow_to", new_size)
    if python_is_ending():
        return fail(why, E_UNSUPPORTED, "grow_to while the interpreter shuts down", new_size)
    if may_move:
        code = begin_move(m, new_size, why)
        if code:
            return code
    begin_own_growth(&growth, m)
    code = python_grow_with_gil(<python_memory*>m, new_size, may_move, why)
    end_own_growth(&growth)
    if may_move:
        end_move(m)
    return code


cdef int python_grow_with_gil(python_memory* p, size_t new_size, bint may_move, failure* why) noexcept with gil:
    """All answers are collected before any is believed, also after a refusal: who raises may have moved before."""
    cdef answers got
    cdef memory* m = &p.head
    try:
        error = None
        try:
            (<object>p.object).grow_to(new_size)
        except BaseException as raised:
            error = raised
        try:
            ask_python_memory(p, NO_MAXIMUM, &got)
        except BaseException as raised:
            error = raised if error is None else error
            if isinstance(raised, Exception) or not asked_again(p, &got):     # Ctrl-C says nothing about the memory
                break_memory(m)
                raise error
        if got.size < memory_size(m) or (got.base != <size_t>m.base and not may_move):
            break_memory(m)
            if error is None and got.size < memory_size(m):
                refuse_python_size(p, new_size, &got)
            raise RuntimeError(f"{type(<object>p.object).__name__}.grow_to({new_size}) moved the base within its"
                               f" byte_capacity() ({m.capacity}), or shrank the memory: it is lost") from error
        if error is None and got.size == new_size:
            believe(p, &got, new_size)
            return 0
        believe(p, &got, memory_size(m))
        if error is not None:
            raise error
        return refuse_python_size(p, new_size, &got)
    except BaseException as failed:
        return fail_python(why, failed)


cdef bint asked_again(python_memory* p, answers* out):
    try:
        ask_python_memory(p, NO_MAXIMUM, out)
        return True
    except BaseException:
        return False


cdef void python_free(memory* m) noexcept nogil:
    cdef python_memory* p = <python_memory*>m
    unlist_memory(m)
    image_detach(m)      # that it was restored to
    if p.shelter:
        give_back(m.base, p.shelter)
    drop_object(p.object)
    free(m)


cdef memory_ops python_ops
python_ops.kind = "python"
python_ops.grow = python_grow
python_ops.resident = NULL
python_ops.free = python_free
python_ops.lose = break_memory
python_ops.pages_are_ours = False


@cython.final
cdef class PythonCreator(NativeCreator):
    """Lets a Python class that implements the two traits stand wherever a native creator does.

    Its exceptions reach whoever asked: as they are in Python, as their text through wasmtime. Each
    creation and growth takes the GIL; reading where the memory is does not.

    Parameters
    ----------
    creator : MemoryCreator
        Its `new_memory` returns a `LinearMemory`, or a `Memory` that linmem made.
    """

    def __cinit__(self, *args, **kwargs):
        self.creator, = _given("PythonCreator", ("creator",), {}, args, kwargs)
        check_trait(self.creator, "creator")

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        if python_is_ending():
            return fail(why, E_UNSUPPORTED, "new_memory while the interpreter shuts down", spec.minimum)
        with gil:
            try:
                return self.make_in_python(spec, out)
            except BaseException as error:
                return fail_python(why, error)

    cdef int make_in_python(self, const memory_spec* spec, memory** out) except -1:
        cdef python_memory* p
        cdef answers got
        cdef failure why
        cdef request asked
        cdef size_t reservation = 0 if spec.reservation == UNCHOSEN else spec.reservation
        from linmem.records import MemoryType
        if spec.image != NULL and spec.image.end > spec.minimum:
            raise ValueError(f"minimum must be >= the end of the image ({spec.image.end}), got {spec.minimum}")
        ty = MemoryType(
            minimum=spec.minimum // spec.page_size,
            maximum=None if spec.maximum == NO_MAXIMUM else spec.maximum // spec.page_size,
            is_64=spec.is_64, is_shared=spec.is_shared, page_size=spec.page_size)
        asked.may_move, asked.domain = spec.may_move, current_domain()
        answer_request(&asked)
        try:
            made = self.creator.new_memory(
                ty, spec.minimum, None if spec.maximum == NO_MAXIMUM else spec.maximum,
                None if spec.reservation == UNCHOSEN else spec.reservation, spec.guard)
        finally:
            answer_request(&asked)
        if isinstance(made, Memory):
            return adopt(<Memory>made, spec, reservation, out)
        for method in ("as_ptr", "byte_size", "byte_capacity", "wasm_accessible", "grow_to"):
            if not callable(getattr(made, method, None)):
                raise TypeError(f"{type(self.creator).__name__}.new_memory() must return a LinearMemory, got"
                                f" {type(made).__name__} without {method}()")
        p = <python_memory*>calloc(1, sizeof(python_memory))
        if p == NULL:
            raise MemoryError("no memory for a memory's bookkeeping")
        p.object = <PyObject*>made
        p.reservation = reservation
        p.head.guard = spec.guard
        p.head.maximum = spec.maximum
        try:
            ask_python_memory(p, spec.minimum, &got)
            if refuse_foreign(<char*>got.base, spec.minimum, 1 << pages.ACCESS_READ_WRITE, "new_memory",
                              &why):
                raise_failure(&why)
        except BaseException:
            free(p)
            raise
        believe(p, &got, spec.minimum)
        if spec.image != NULL:
            image_copy(spec.image, p.head.base)
        Py_INCREF(made)
        p.head.ops = &python_ops
        p.head.refs = 1
        p.head.is_shared = spec.is_shared
        p.head.may_move = spec.may_move
        list_memory(&p.head)
        out[0] = &p.head
        return 0

    def __repr__(self):
        return f"PythonCreator({self.creator!r})"


def check_trait(creator, str name):
    """TypeError if `creator`, the argument `name`, is not one that memories can be had from."""
    if isinstance(creator, type):
        raise TypeError(f"{name} must be a MemoryCreator, got the class {creator.__name__} itself: call it")
    # An Image makes memories too, and out of other arguments.
    if isinstance(creator, Image) or not callable(getattr(creator, "new_memory", None)):
        raise TypeError(f"{name} must be a MemoryCreator, got {type(creator).__name__}")


cdef int adopt(Memory made, const memory_spec* spec, size_t reservation, memory** out) except -1:
    """A native memory that a Python creator hands on: its struct serves as it is.

    What may be done once is counted for each handle and not for the struct: where one Python creator has another
    one upstream, each hands on the handle that the other made for it.
    """
    cdef memory* m = made.enter_locked()     # the creator may have kept it, and other threads of its may use it
    cdef size_t size, capacity, covered
    cdef bint fits, is_protected, fresh = False
    with nogil:
        size, capacity, covered = memory_size(m), m.capacity, m.covered
        fits = (size == spec.minimum and capacity >= reservation
                and covered >= (capacity if capacity > reservation else reservation) + spec.guard)
        is_protected = load(&m.protection) != PROTECTION_NONE
        if fits and not is_protected:
            fresh = swap_if(&made.fresh, 1, 0)
        if fresh:
            memory_retain(m)
            # What was asked for binds it, whatever its maker asked for.
            if spec.is_shared:
                m.is_shared = True
            m.may_move = spec.may_move
            if m.maximum > spec.maximum:
                poke(&m.maximum, spec.maximum)
            if spec.image != NULL:
                image_copy(spec.image, m.base)
        unlock(&m.lock)
    made.leave()
    if size != spec.minimum:
        raise ValueError(f"new_memory() must return a memory of {spec.minimum} bytes, got {size}")
    if not fits:
        raise ValueError(f"new_memory() must return a memory with a reservation of {reservation} and a guard of"
                         f" {spec.guard} bytes, got {capacity} and {covered - capacity}")
    if is_protected:
        raise ValueError("new_memory() must return a memory whose pages are all readable and writable, got one with"
                         " protected pages")
    if not fresh:
        raise ValueError("new_memory() returned a memory that it has returned before")
    out[0] = m
    return 0
