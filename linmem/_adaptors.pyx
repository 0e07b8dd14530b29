# cython: language_level=3
"""Creators over an upstream creator: a budget, statistics, and a Python class as a creator."""

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport SIZE_MAX
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from linmem._atomic cimport add, load, poke, poke_address, store, swap_if
from linmem._memory cimport (
    NO_MAXIMUM, UNCHOSEN, ImageHandle, Memory, NativeCreator, acquire, answer_request, begin_move, check_count,
    check_size, drop_object, end_move, fail, fail_python, failure, image_copy, leave_image, list_lock, memory,
    memory_hang, memory_hook, memory_ops, memory_resident, memory_retain, memory_size, memory_spec,
    python_is_ending, unlist_lock, unlock,
)
from linmem._os cimport pages
from linmem._units cimport E_LIMIT, E_NO_MEMORY, E_UNSUPPORTED, round_up


cdef inline size_t committed(size_t size) noexcept nogil:
    """Bytes that a memory of `size` bytes commits."""
    cdef size_t out
    return SIZE_MAX >> 1 if round_up(size, pages.capabilities().page_size, &out) else out


# -- a budget --------------------------------------------------------------------------------------

cdef struct limit_hook:
    memory_hook head
    budget* budget
    size_t charged          # a pool above hands the memory out anew: then this is what it has been at most
    size_t before           # the growth under way


cdef int charge(budget* b, size_t size, failure* why) noexcept nogil:
    """All of it or nothing; exact under threads."""
    cdef long long used, peak
    while True:
        used = load(&b.used)
        if size > <size_t>(b.limit - used):
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


cdef void release_budget(budget* b) noexcept nogil:
    if add(&b.refs, -1) == 0:
        free(b)


cdef int limit_before_grow(memory_hook* head, memory* m, size_t new_size, failure* why) noexcept nogil:
    cdef limit_hook* hook = <limit_hook*>head
    cdef size_t need = committed(new_size)
    cdef int code
    hook.before = hook.charged
    if need <= hook.charged:
        return 0
    code = charge(hook.budget, need - hook.charged, why)
    if code == 0:
        hook.charged = need
    return code


cdef void limit_after_grow(memory_hook* head, memory* m, size_t old_size, size_t new_size, int code) noexcept nogil:
    cdef limit_hook* hook = <limit_hook*>head
    if code and hook.charged > hook.before:
        refund(hook.budget, hook.charged - hook.before)
        hook.charged = hook.before


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

    def __cinit__(self, NativeCreator upstream not None, limit_bytes):
        cdef size_t limit
        check_size(limit_bytes, "limit_bytes", &limit)
        self.upstream = upstream
        self.budget = <budget*>calloc(1, sizeof(budget))
        if self.budget == NULL:
            raise MemoryError("no memory for a budget")
        self.budget.refs = 1
        self.budget.limit = <long long>(limit if limit < SIZE_MAX >> 1 else SIZE_MAX >> 1)

    def __dealloc__(self):
        if self.budget != NULL:
            release_budget(self.budget)

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef size_t size = committed(spec.minimum)
        cdef limit_hook* hook
        cdef int code = charge(self.budget, size, why)
        if code:
            return code
        hook = <limit_hook*>calloc(1, sizeof(limit_hook))
        if hook == NULL:
            code = fail(why, E_NO_MEMORY, "calloc", sizeof(limit_hook))
        else:
            code = self.upstream.make(spec, out, why)
        if code:
            free(hook)
            refund(self.budget, size)
            return code
        add(&self.budget.refs, 1)
        hook.head.before_grow = limit_before_grow
        hook.head.after_grow = limit_after_grow
        hook.head.dropped = limit_dropped
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


cdef void sample_resident(record* r) noexcept nogil:
    cdef failure why
    cdef size_t resident
    if memory_resident(r.m, &resident, &why) == 0 and resident > r.peak_resident:
        r.peak_resident = resident


cdef int statistics_before_grow(memory_hook* head, memory* m, size_t new_size, failure* why) noexcept nogil:
    (<statistics_hook*>head).started_ns = pages.clock_ns()
    return 0


cdef void statistics_after_grow(memory_hook* head, memory* m, size_t old_size, size_t new_size,
                                int code) noexcept nogil:
    cdef statistics_hook* hook = <statistics_hook*>head
    cdef ledger* book = hook.ledger
    cdef record* r = hook.record
    cdef long long spent = pages.clock_ns() - hook.started_ns
    # A pool above hands the memory out anew, smaller: what it has been already is counted.
    cdef size_t more = new_size - r.size if new_size > r.size else 0
    acquire(&book.lock.held)
    r.grow_ns += spent
    if code:
        r.refused += 1
        book.failures += 1
    else:
        r.growths += 1
        r.size += more
        book.current_bytes += more
        book.total_bytes += more
        if book.current_bytes > book.peak_bytes:
            book.peak_bytes = book.current_bytes
    unlock(&book.lock.held)


cdef void statistics_before_drop(memory_hook* head, memory* m) noexcept nogil:
    cdef statistics_hook* hook = <statistics_hook*>head
    cdef ledger* book = hook.ledger
    cdef record* r = hook.record
    acquire(&book.lock.held)
    sample_resident(r)
    r.m = NULL
    if r.previous != NULL:
        r.previous.next = r.next
    else:
        book.live = r.next
    if r.next != NULL:
        r.next.previous = r.previous
    book.n_live -= 1
    book.current_bytes -= r.size
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

    def __cinit__(self, NativeCreator upstream not None, history=256):
        cdef size_t kept
        check_count(history, "history", &kept)
        self.upstream = upstream
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
        hook.ledger = book
        hook.record = r
        r.m = out[0]
        r.first_size = r.size = spec.minimum
        acquire(&book.lock.held)
        r.next = book.live
        if book.live != NULL:
            book.live.previous = r
        book.live = r
        book.n_live += 1
        book.total_count += 1
        book.current_bytes += spec.minimum
        book.total_bytes += spec.minimum
        if book.n_live > book.peak_count:
            book.peak_count = book.n_live
        if book.current_bytes > book.peak_bytes:
            book.peak_bytes = book.current_bytes
        unlock(&book.lock.held)
        memory_hang(out[0], &hook.head)
        return 0

    def statistics(self):
        """The sums, as a dict: bytes are byte_size; failures are refused creations and growths."""
        cdef ledger book
        with nogil:
            acquire(&self.ledger.lock.held)
            book = self.ledger[0]
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
        sample_resident(r)
        memcpy(to, r, sizeof(record))
        to += 1
        r = r.next
    r = book.dropped
    while r != NULL:
        memcpy(to, r, sizeof(record))
        to += 1
        r = r.next


# -- a Python class as a creator ------------------------------------------------------------------------

cdef struct python_memory:
    memory head
    size_t reservation      # what wasm was promised, whatever the capacity
    PyObject* object        # the LinearMemory; dropped through drop_object, never touched without the GIL


cdef int read_python_memory(python_memory* p, size_t size) except -1:
    """Ask the Python memory where and how large it is, and believe only what can be true."""
    cdef size_t base, byte_size, capacity, covered, bound
    cdef size_t reservation = p.reservation, guard = p.head.guard
    made = <object>p.object
    name = type(made).__name__
    check_size(made.as_ptr(), "as_ptr()", &base)
    check_size(made.byte_size(), "byte_size()", &byte_size)
    check_size(made.byte_capacity(), "byte_capacity()", &capacity)
    accessible = made.wasm_accessible()
    if base == 0 or base & (pages.capabilities().page_size - 1):
        raise ValueError(f"{name}.as_ptr() must be a non-zero multiple of the host page"
                         f" ({pages.capabilities().page_size}), got {base:#x}")
    if byte_size != size:
        raise ValueError(f"{name}.byte_size() must be what was asked for ({size}), got {byte_size}")
    if capacity < byte_size:
        raise ValueError(f"{name}.byte_capacity() must be >= byte_size() ({byte_size}), got {capacity}")
    covered = capacity if capacity > reservation else reservation
    if covered > SIZE_MAX >> 1 or covered > SIZE_MAX - base or guard > SIZE_MAX - base - covered:
        raise ValueError(f"{name}.byte_capacity() does not fit an address: {capacity}")
    covered += guard
    # Native code is compiled on the promise that all of this is accessible or faults.
    if not (accessible.start <= base and base + covered <= accessible.stop):
        raise ValueError(f"{name}.wasm_accessible() must cover {base:#x} .. {base + covered:#x}: its capacity of"
                         f" {capacity} (reservation asked for: {reservation}) and a guard of {guard} bytes;"
                         f" got {accessible.start:#x} .. {accessible.stop:#x}")
    maximum = made.maximum_byte_size() if hasattr(made, "maximum_byte_size") else None
    if maximum is not None:
        check_size(maximum, "maximum_byte_size()", &bound)
        if bound < byte_size:
            raise ValueError(f"{name}.maximum_byte_size() must be >= byte_size() ({byte_size}), got {bound}")
        if bound < p.head.maximum:
            poke(&p.head.maximum, bound)
    if p.head.base != NULL and base != <size_t>p.head.base and byte_size <= p.head.capacity:
        raise RuntimeError(f"{name}.grow_to({byte_size}) moved the base within its byte_capacity()"
                           f" ({p.head.capacity})")
    poke_address(&p.head.base, <char*>base)
    poke(&p.head.accessible, byte_size)
    poke(&p.head.capacity, capacity)
    poke(&p.head.covered, covered)
    store(&p.head.size, <long long>byte_size)
    return 0


cdef int python_grow(memory* m, size_t new_size, failure* why) noexcept nogil:
    cdef int code
    cdef bint may_move = new_size > m.capacity
    if python_is_ending():
        return fail(why, E_UNSUPPORTED, "grow_to while the interpreter shuts down", new_size)
    if may_move:
        code = begin_move(m, new_size, why)
        if code:
            return code
    code = python_grow_with_gil(<python_memory*>m, new_size, why)
    if may_move:
        end_move(m)
    return code


cdef int python_grow_with_gil(python_memory* p, size_t new_size, failure* why) noexcept with gil:
    try:
        (<object>p.object).grow_to(new_size)
        read_python_memory(p, new_size)
        return 0
    except BaseException as error:
        return fail_python(why, error)


cdef void python_free(memory* m) noexcept nogil:
    leave_image(m)      # that it was restored to
    drop_object((<python_memory*>m).object)
    free(m)


cdef memory_ops python_ops
python_ops.kind = "python"
python_ops.grow = python_grow
python_ops.resident = NULL
python_ops.free = python_free
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

    def __cinit__(self, creator):
        # An Image makes memories too, and out of other arguments.
        if isinstance(creator, ImageHandle) or not callable(getattr(creator, "new_memory", None)):
            raise TypeError(f"creator must be a MemoryCreator, got {type(creator).__name__}")
        self.creator = creator

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
        cdef bint before
        cdef size_t reservation = 0 if spec.reservation == UNCHOSEN else spec.reservation
        from linmem.records import MemoryType
        if spec.image != NULL and spec.image.end > spec.minimum:
            raise ValueError(f"minimum must be >= the end of the image ({spec.image.end}), got {spec.minimum}")
        ty = MemoryType(
            minimum=spec.minimum // spec.page_size,
            maximum=None if spec.maximum == NO_MAXIMUM else spec.maximum // spec.page_size,
            is_64=spec.is_64, is_shared=spec.is_shared, page_size=spec.page_size)
        before = answer_request(spec.may_move)
        try:
            made = self.creator.new_memory(
                ty, spec.minimum, None if spec.maximum == NO_MAXIMUM else spec.maximum,
                None if spec.reservation == UNCHOSEN else spec.reservation, spec.guard)
        finally:
            answer_request(before)
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
            read_python_memory(p, spec.minimum)
        except BaseException:
            free(p)
            raise
        if spec.image != NULL:
            image_copy(spec.image, p.head.base)
        Py_INCREF(made)
        p.head.ops = &python_ops
        p.head.refs = 1
        p.head.is_shared = spec.is_shared
        p.head.may_move = spec.may_move
        out[0] = &p.head
        return 0

    def __repr__(self):
        return f"PythonCreator({self.creator!r})"


cdef int adopt(Memory made, const memory_spec* spec, size_t reservation, memory** out) except -1:
    """A native memory that a Python creator hands on: its struct serves as it is.

    What may be done once is counted for each handle and not for the struct: where one Python creator has another
    one upstream, each hands on the handle that the other made for it.
    """
    cdef memory* m = made.enter()
    cdef size_t size, capacity, covered
    cdef bint fits, fresh = False
    with nogil:
        # The creator may have kept it, and other threads of its may use it.
        acquire(&m.lock)
        size, capacity, covered = memory_size(m), m.capacity, m.covered
        fits = (size == spec.minimum and capacity >= reservation
                and covered >= (capacity if capacity > reservation else reservation) + spec.guard)
        if fits:
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
    if not fresh:
        raise ValueError("new_memory() returned a memory that it has returned before")
    out[0] = m
    return 0
