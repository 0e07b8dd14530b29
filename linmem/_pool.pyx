# cython: language_level=3
"""A creator that hands the same memories out again and again."""

cimport cython
from libc.stdint cimport SIZE_MAX
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from linmem._atomic cimport add, load, peek, poke, store, touch, word
from linmem._memory cimport (
    CACHE_LINE, IMAGE_BROKEN, IMAGE_COPIED, OWNER_LEFT, OWNER_PYTHON, PROTECTION_NONE, ImageHandle, MmapCreator,
    NativeCreator, acquire, check_count, check_flag, check_native, check_size, fail, failure, give_back, image_release,
    image_retain, list_lock, list_relief, memory, memory_border, memory_doubt, memory_hang, memory_hook,
    memory_is_filled, memory_refill, memory_release, memory_renew, memory_restore, memory_spec, memory_start_again,
    memory_turn_to, memory_unprotect, raise_failure, unlist_lock, unlist_relief, unlock,
)
from linmem._os cimport pages
from linmem._reset cimport (
    ANY, RESET_DISCARD, RESET_SCAN, RESET_ZERO, reset_begin, reset_bound, reset_costs, reset_end, reset_given_back,
    reset_policy, reset_start,
)
from linmem._units cimport E_EXHAUSTED, E_LIMIT, E_NO_MEMORY
from linmem._wide cimport has_wide_stores, zero_wide

from linmem._checks import given as _given, shown as _shown

cdef enum:
    ADAPTIVE = 3
    PAGE_BITS = 12              # what reset_policy counts in

cdef extern from *:
    """
    static LINMEM_OF_THREAD char linmem_thread;
    static const void *linmem_this_thread(void) { return &linmem_thread; }
    """
    const void* this_thread "linmem_this_thread"() noexcept nogil

cdef size_t WIDE_MOST = 1 << 18         # bytes: up to here, all of a memory may well be in the cache
cdef size_t ZERO_UNSEEN = 1 << 18       # bytes: up to here, zeroing all is no worse than giving back what was not seen

_OPTIONS = {"upstream": None, "slots": None, "keep_resident": 64 << 20, "max_unused_warm": 100, "reset": "adaptive",
            "when_full": "fallback", "check": False, "image": None}
_RESETS = {"scan": RESET_SCAN, "zero": RESET_ZERO, "discard": RESET_DISCARD, "adaptive": ADAPTIVE}


cdef inline void* lock_on_a_line(void* block) noexcept nogil:
    """Where a pool lies in a block that is a line longer."""
    cdef size_t lock = <size_t>&(<pool*>block).lock
    return <char*>block + ((0 - lock) & (CACHE_LINE - 1))


cdef void release_pool(pool* p) noexcept nogil:
    if add(&p.refs, -1):
        return
    unlist_relief(&p.relief)
    unlist_lock(&p.lock)
    free(p.block)


# -- what this machine's calls cost ------------------------------------------------------------------------

cdef reset_costs costs          # fault == 0: not measured yet
cdef reset_costs copying        # where each page is copied from an image
cdef bint wide = False          # zero_wide() beats memset() on a sample that is in the cache
cdef word costs_lock            # of the first pool's maker; nobody has a pool before
costs.fault = costs.scan = 0

cdef enum:
    SAMPLE = 64                 # pages
    SAMPLES = 5
    SCANS = 8


cdef void measure_costs() noexcept nogil:
    """Once in a process, in well below a millisecond. Where it cannot be done, or the processor was taken
    away in each sample, what comes out is still sane."""
    cdef size_t page = pages.capabilities().page_size
    cdef size_t size = SAMPLE * page
    cdef long long start, zero = 0, wider = 0, fault = 0, scan = 0
    cdef char* base
    cdef char* sparse           # a second sample, with one page in it
    cdef char* next
    cdef pages.span runs[4]
    cdef size_t n
    cdef size_t offset
    cdef int _, code
    if pages.reserve(2 * size, True, &base) == 0:
        sparse = base + size
        if pages.commit(base, 2 * size) == 0:
            touch(sparse)
            for _ in range(SAMPLES):
                start = pages.clock_ns()
                offset = 0
                while offset < size:
                    touch(base + offset)
                    offset += page
                code = pages.renew(base, size)
                fault = shorter(fault, start, code)
                if code:
                    break
            memset(base, 0, size)
            for _ in range(SCANS):
                start = pages.clock_ns()
                memset(base, 0, size)
                zero = shorter(zero, start, 0)
                if has_wide_stores():
                    start = pages.clock_ns()
                    zero_wide(base, size)
                    wider = shorter(wider, start, 0)
                # After other work, as in a busy pool: alone it takes two thirds of the time.
                n = 4
                start = pages.clock_ns()
                code = pages.touched(sparse, size, False, runs, &n, &next)
                scan = shorter(scan, start, code)
        give_back(base, 2 * size)
    set_costs(fault, zero, wider, scan)


cdef void need_costs() noexcept nogil:
    acquire(&costs_lock)
    if costs.fault == 0:
        measure_costs()
    unlock(&costs_lock)


cdef long long shorter(long long best, long long start, int code) noexcept nogil:
    cdef long long took = pages.clock_ns() - start
    return took if code == 0 and (best == 0 or took < best) else best


cdef void set_costs(long long fault, long long zero, long long wider, long long scan) noexcept nogil:
    """All but scan: of the whole sample."""
    global wide
    if zero < 1:
        zero = 1
    wide = 0 < wider < zero
    costs.fault = copying.fault = <unsigned int>within(fault // zero, 8, 64)
    costs.scan = <unsigned int>within(scan * SAMPLE // (wider if wide else zero), 4, 64)
    copying.scan = <unsigned int>within(scan * SAMPLE // (2 * zero), 4, 64)


cdef long long within(long long n, long long least, long long most) noexcept nogil:
    return least if n < least else most if n > most else n


# -- shelves; the pool's lock is held in all of these ----------------------------------------------------

cdef inline shelf** bucket(pool* p, const shape* key) noexcept nogil:
    cdef size_t h = key.minimum * 31 + key.maximum * 17 + key.reservation + key.guard * 5 + (<size_t>key.image >> 4)
    return &p.buckets[(h ^ (h >> 16) ^ (h >> 32)) & (BUCKETS - 1)]


cdef inline shelf* find_shelf(pool* p, const shape* key) noexcept nogil:
    cdef shelf* here = bucket(p, key)[0]
    while here != NULL and not (
            here.shape.minimum == key.minimum and here.shape.maximum == key.maximum
            and here.shape.reservation == key.reservation and here.shape.guard == key.guard
            and here.shape.is_64 == key.is_64 and here.shape.is_shared == key.is_shared
            and here.shape.image == key.image):
        here = here.next
    return here


cdef void remove_shelf(pool* p, shelf* gone) noexcept nogil:
    cdef shelf** link = bucket(p, &gone.shape)
    while link[0] != gone:
        link = &link[0].next
    link[0] = gone.next


cdef inline slot** shelf_of(slot* s, int state) noexcept nogil:
    return &s.shelf.warm if state == WARM else &s.shelf.cold


cdef inline line* line_of(pool* p, int state) noexcept nogil:
    return &p.warm if state == WARM else &p.cold


cdef inline void put_idle(pool* p, slot* s, int state) noexcept nogil:
    cdef slot** top = shelf_of(s, state)
    cdef line* idle = line_of(p, state)
    s.state = state
    p.resident += s.resident
    if state == WARM:
        p.n_warm += 1
    else:
        p.n_cold += 1
    s.above = NULL
    s.below = top[0]
    if s.below != NULL:
        s.below.above = s
    top[0] = s
    s.newer = NULL
    s.older = idle.newest
    if s.older != NULL:
        s.older.newer = s
    else:
        idle.oldest = s
    idle.newest = s


cdef inline void take_idle(pool* p, slot* s) noexcept nogil:
    cdef int state = s.state
    cdef line* idle = line_of(p, state)
    if s.above != NULL:
        s.above.below = s.below
    else:
        shelf_of(s, state)[0] = s.below
    if s.below != NULL:
        s.below.above = s.above
    if s.newer != NULL:
        s.newer.older = s.older
    else:
        idle.newest = s.older
    if s.older != NULL:
        s.older.newer = s.newer
    else:
        idle.oldest = s.newer
    if state == WARM:
        p.n_warm -= 1
    else:
        p.n_cold -= 1
    p.resident -= s.resident
    s.state = LIVE


cdef inline slot* least_wanted(pool* p) noexcept nogil:
    return p.cold.oldest if p.cold.oldest != NULL else p.warm.oldest


# -- resetting a slot, outside every lock --------------------------------------------------------------------

cdef inline unsigned int in_pages(size_t size) noexcept nogil:
    size >>= PAGE_BITS
    return <unsigned int>size if size < ANY else ANY


cdef bint zero_touched(slot* s, size_t used, size_t bound, size_t* low, size_t* high) noexcept nogil:
    """Zero what was touched of `used` bytes; low, high: how many bytes of that lie below and beyond
    `least`. False where that cannot be told, or is more than `bound`: then anything may be left."""
    cdef pages.span runs[64]
    cdef char* at = s.base
    cdef char* end = s.base + used
    cdef char* border = s.base + s.least
    cdef char* next
    cdef size_t n, i, size, stop, total = 0
    cdef bint over_image
    low[0] = high[0] = 0
    while at < end:
        n = 64
        stop = memory_border(s.m, <size_t>(at - s.base), used, &over_image)
        if pages.touched(at, stop - <size_t>(at - s.base), over_image, runs, &n, &next):
            return False
        for i in range(n):
            total += runs[i].size
        if total > bound:
            high[0] = total
            return False
        for i in range(n):
            size = runs[i].size
            memory_refill(s.m, <size_t>(runs[i].at - s.base), size)
            if runs[i].at >= border:
                high[0] += size
            elif runs[i].at + size <= border:
                low[0] += size
            else:
                low[0] += <size_t>(border - runs[i].at)
                high[0] += <size_t>(runs[i].at + size - border)
        at = next
    return True


cdef int give_back_all(slot* s, size_t used) noexcept nogil:
    """Every page of the slot, hidden ones included, is given back and reads as zero."""
    cdef int code
    if pages.capabilities().discard_any_protection:
        code = memory_renew(s.m, s.high if s.hidden else used)
    else:
        code = memory_renew(s.m, used)
        if code == 0 and s.hidden and s.high > used:    # else this user has grown over all that was hidden
            code = pages.decommit(s.base + used, s.high - used)
            s.high = used
    s.hidden = 0
    s.resident = 0
    reset_given_back(&s.policy)
    return code


cdef int clear(slot* s, size_t used) noexcept nogil:
    """Zero the first `used` bytes. Returns the kind of reset that did it, or -1."""
    cdef pool* p = s.pool
    cdef size_t low, high, bound = SIZE_MAX, hidden
    cdef int how = p.reset
    cdef const reset_costs* prices = &costs if s.image == NULL else &copying
    cdef bint kept
    if how == ADAPTIVE:
        if pages.capabilities().scans:
            how = reset_begin(&s.policy, prices, in_pages(used))
            bound = <size_t>reset_bound(&s.policy, prices, in_pages(used)) << PAGE_BITS
        else:
            how = RESET_ZERO if used <= ZERO_UNSEEN else RESET_DISCARD
    # What earlier users left beyond `used`, as far as it is not part of that now.
    hidden = s.high - used if s.hidden > s.high - used else s.hidden
    if s.image != NULL and s.m.image_state == IMAGE_COPIED:
        # Nothing tells which pages are still the image's, and given back they would be zeros.
        memory_restore(s.m, s.image)
        s.hidden = used - s.least + hidden
        s.resident = used + hidden
        return RESET_ZERO
    if how == RESET_SCAN:
        if bound > p.keep_resident:
            bound = p.keep_resident
        kept = zero_touched(s, used, bound, &low, &high)
        if p.reset == ADAPTIVE and (kept or high):
            kept = reset_end(&s.policy, prices, in_pages(used), in_pages(low + high + hidden),
                             in_pages(p.keep_resident)) and kept
        if kept:
            s.hidden = high + hidden
            s.resident = low + high + hidden
            if s.resident <= p.keep_resident:
                return RESET_SCAN
    elif how == RESET_ZERO and used + hidden <= p.keep_resident:
        if wide and s.image == NULL and used <= WIDE_MOST:
            zero_wide(s.base, used)
        else:
            memory_refill(s.m, 0, used)
        s.hidden = used - s.least + hidden
        s.resident = used + hidden
        return RESET_ZERO
    return -1 if give_back_all(s, used) else RESET_DISCARD


cdef int reset(slot* s, memory* m) noexcept nogil:
    """Make the slot as it was when it was new. Returns the kind of reset, or -1: it cannot be used again."""
    cdef size_t used = m.accessible
    cdef int how = RESET_SCAN
    if used > s.high:
        s.high = used
    if (load(&m.protection) != PROTECTION_NONE or not m.ops.pages_are_ours) and memory_unprotect(m, used):
        return -1
    if (m.image != s.image or m.image_state == IMAGE_BROKEN) and memory_turn_to(m, s.image):
        return -1       # a user has turned it to another image, or given pages of its own back
    if used:
        how = clear(s, used)
        if how < 0:
            memory_doubt(m)     # it may be inaccessible: a pool below sees to that first
            return -1
        if s.pool.check and not memory_is_filled(m, used):
            return -1
    if used > s.least:
        if pages.protect(s.base + s.least, used - s.least, pages.ACCESS_NONE):
            memory_doubt(m)     # the same
            return -1
        poke(&m.accessible, s.least)        # upstream may have someone who watches, here and below
    elif used < s.least:        # a pool above had made it cold
        if pages.commit(s.base + used, s.least - used) or memory_start_again(m, s.image):
            return -1
        poke(&m.accessible, s.least)
    return how


# -- a slot's life ------------------------------------------------------------------------------------------------

cdef bint let_go(slot* s, memory* m) noexcept nogil:
    """The memory is upstream's again, and may be freed before the slot is: stats() must not look at it."""
    # A pool below knows nothing of what is hidden here. Refused, the pages are zero all the same.
    if m.base == s.base and m.capacity == s.capacity and s.high > m.accessible and s.head.next != NULL:
        pages.decommit(s.base + m.accessible, s.high - m.accessible)
    acquire(&s.pool.lock.held)
    s.m = NULL
    unlock(&s.pool.lock.held)
    return False


cdef bint slot_keep(memory_hook* head, memory* m) noexcept nogil:
    cdef slot* s = <slot*>head
    cdef pool* p = s.pool
    cdef slot* out = NULL
    cdef int how = -1
    if s.doomed or load(&p.closed):
        return let_go(s, m)
    if m.base == s.base and m.capacity == s.capacity:       # else it has moved, and is of another shape
        how = reset(s, m)
        if how < 0:
            acquire(&p.lock.held)
            p.rejected += 1
            unlock(&p.lock.held)
    if how < 0:
        return let_go(s, m)
    m.hooks = head
    m.growth_is_watched = s.growth_is_watched
    store(&m.owner, OWNER_PYTHON)
    acquire(&p.lock.held)
    if load(&p.closed):
        unlock(&p.lock.held)
        return let_go(s, m)
    s.resets[how] += 1
    s.thread = this_thread()
    put_idle(p, s, WARM)
    if p.n_warm > p.most_warm or p.resident > p.resident_bound:
        out = p.warm.oldest
        take_idle(p, out)
    unlock(&p.lock.held)
    if out != NULL:
        make_cold(p, out)
    return True


cdef void make_cold(pool* p, slot* s) noexcept nogil:
    """Give back the pages of one warm slot after the other, until the bounds hold."""
    add(&p.refs, 1)         # a slot that is dropped here may have held the last one
    while s != NULL:
        if s.high and pages.decommit(s.base, s.high):
            drop(s)
            s = NULL
        else:
            poke(&s.m.accessible, 0)
            s.m.image_state = IMAGE_COPIED
            s.high = s.hidden = s.resident = 0
            reset_given_back(&s.policy)
        acquire(&p.lock.held)
        if s != NULL:
            put_idle(p, s, COLD)
        s = NULL
        if p.n_warm > p.most_warm or p.resident > p.resident_bound:
            s = p.warm.oldest
            if s != NULL:
                take_idle(p, s)
        unlock(&p.lock.held)
    release_pool(p)


cdef void drop(slot* s) noexcept nogil:
    """Of a slot that is on no list of idle ones: back to upstream."""
    s.doomed = True
    store(&s.m.refs, 1)
    memory_release(s.m)


cdef void count_in(pool* p, const slot* s) noexcept nogil:
    """What a slot has counted becomes the pool's."""
    cdef int how
    p.hits += s.hits
    for how in range(3):
        p.resets[how] += s.resets[how]


cdef void slot_dropped(memory_hook* head) noexcept nogil:
    cdef slot* s = <slot*>head
    cdef pool* p = s.pool
    cdef shelf* empty = NULL
    acquire(&p.lock.held)
    if s.next != NULL:
        s.next.previous = s.previous
    if s.previous != NULL:
        s.previous.next = s.next
    else:
        p.slots = s.next
    p.n_slots -= 1
    count_in(p, s)
    s.shelf.slots -= 1
    if s.shelf.slots == 0:
        empty = s.shelf
        remove_shelf(p, empty)
    unlock(&p.lock.held)
    image_release(s.image)
    free(empty)
    free(s)
    release_pool(p)


cdef size_t release_idle(pool* p, size_t target) noexcept nogil:
    """Drop idle slots, cold ones and then the oldest first, until at most `target` bytes of the others are resident.
    Returns the bytes that were."""
    cdef slot* s
    cdef size_t released = 0
    while True:
        acquire(&p.lock.held)
        s = least_wanted(p)
        if s != NULL and s.state == WARM and target and p.resident <= target:
            s = NULL
        if s != NULL:
            take_idle(p, s)
        unlock(&p.lock.held)
        if s == NULL:
            return released
        released += s.resident
        drop(s)


cdef bint has_idle(pool* p) noexcept nogil:
    cdef bint found
    acquire(&p.lock.held)
    found = least_wanted(p) != NULL
    unlock(&p.lock.held)
    return found


cdef bint relieve(void* owner) noexcept nogil:
    cdef pool* p = <pool*>owner
    cdef bint found = has_idle(p)
    if found:
        release_idle(p, 0)
    release_pool(p)
    return found


cdef bint is_slot_of(pool* p, memory* m) noexcept nogil:
    return m.hooks != NULL and m.hooks.keep == slot_keep and (<slot*>m.hooks).pool == p


cdef inline void key_of(const memory_spec* spec, shape* key) noexcept nogil:
    key.minimum = spec.minimum
    key.maximum = spec.maximum
    key.reservation = spec.reservation
    key.guard = spec.guard
    key.is_64 = spec.is_64
    key.is_shared = spec.is_shared
    key.image = spec.image


@cython.final
cdef class PoolingCreator(NativeCreator):
    """Memories that are reset and handed out again instead of being made anew.

    A slot (a memory of the upstream creator) is kept when the last reference on it is gone: wasmtime's,
    Python handles', and exported buffers'. It is then reset on that thread, with no lock and no GIL, and
    serves the next request of the same shape (minimum, maximum, reservation, guard), the last one given
    back first. What is dear stays: the mapping, its protection, and the resident pages. As wasmtime's
    pooling allocator, which Python cannot reach, and as rmm's ``PoolMemoryResource``.

    Parameters
    ----------
    upstream : NativeCreator, optional
        Who makes the slots; an `MmapCreator` by default. Memories of a `PythonCreator` are passed on
        and not kept.
    slots : int, optional
        The most slots, in use and idle. By default as many as take half of the mappings that a process
        may have (``vm.max_map_count``).
    keep_resident : int
        Bytes that one idle slot may keep resident. Of one that has more, all pages go back to the OS.
    image : Image, optional
        What every memory starts from that is asked for without an image of its own; one that is too small for
        it is refused. Each slot stays with its image: reset, it gets back what was written, no more. A request
        with another image (``img.new_memory(creator=pool)``) is of another shape.
    max_unused_warm : int
        Idle slots that keep their pages. The least recently used beyond them become cold: they keep
        address space only. All warm slots together keep at most ``max_unused_warm * keep_resident``
        bytes resident, and never more than a quarter of the machine's memory.
    reset : {"adaptive", "scan", "zero", "discard"}
        How a slot becomes zero again. "scan": the OS says which pages were touched (PAGEMAP_SCAN,
        /proc/self/pagemap, GetWriteWatch), and those are zeroed. "zero": all of it is. "discard": all pages go back to
        the OS (MADV_DONTNEED; on Windows decommitted). "adaptive": whichever of these costs least for
        what each slot's users do, as measured while they do it.
    when_full : {"fallback", "error"}
        With every slot in use: a memory straight from upstream, or `PoolError`.
    check : bool
        Compare all of a slot with zero after each reset. One with a byte left is thrown away and
        counted as rejected. For tests and for distrust; costs more than all the rest.

    Notes
    -----
    Thread-safe. When the creator is collected, idle slots are released, and those in use when they are
    given back.
    """

    def __cinit__(self, *args, **kwargs):
        cdef pool* p
        cdef void* block
        cdef const pages.capabilities_t* caps = pages.capabilities()
        cdef size_t most_slots = caps.mappings // 6 if caps.mappings else 10000
        cdef size_t keep, warm
        upstream, slots, keep_resident, max_unused_warm, reset, when_full, check, image = _given(
            "PoolingCreator", tuple(_OPTIONS), _OPTIONS, args, kwargs, 1)
        self.upstream = check_native(MmapCreator() if upstream is None else upstream, "upstream")
        if image is not None and not isinstance(image, ImageHandle):
            raise TypeError(f"image must be an Image, got {type(image).__name__}")
        self.image = image
        if slots is not None:
            check_count(slots, "slots", &most_slots)
        if most_slots < 1:
            raise ValueError(f"slots must be >= 1, got {slots}")
        check_size(keep_resident, "keep_resident", &keep)
        check_count(max_unused_warm, "max_unused_warm", &warm)
        check_choice(reset, "reset", _RESETS)
        check_choice(when_full, "when_full", ("fallback", "error"))
        check_flag(check, "check")
        if reset == "scan" and not caps.scans:
            raise ValueError("reset must not be 'scan' here: this OS does not say which pages were touched")
        block = calloc(1, sizeof(pool) + CACHE_LINE)
        if block == NULL:
            raise MemoryError("no memory for a pool")
        p = <pool*>lock_on_a_line(block)
        p.block = block
        p.refs = 1
        p.most_slots = most_slots
        p.keep_resident = keep
        p.most_warm = warm
        p.resident_bound = keep * warm if warm == 0 or keep <= SIZE_MAX // warm else SIZE_MAX
        if caps.memory and p.resident_bound > caps.memory // 4:
            p.resident_bound = caps.memory // 4
        p.reset = _RESETS[reset]
        p.fall_back = when_full == "fallback"
        p.check = check
        with nogil:
            need_costs()
            list_lock(&p.lock)
            p.relief.owner = p
            p.relief.refs = &p.refs
            p.relief.relieve = relieve
            list_relief(&p.relief)
        self.pool = p

    def __dealloc__(self):
        if self.pool != NULL:
            with nogil:
                store(&self.pool.closed, 1)
                release_idle(self.pool, 0)
                release_pool(self.pool)

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef memory_spec ours
        if spec.image == NULL and self.image is not None:
            ours = spec[0]
            ours.image = self.image.it
            return self.make_of(&ours, out, why)
        return self.make_of(spec, out, why)

    cdef int make_of(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef shape key
        key_of(spec, &key)
        out[0] = self.take(self.pool, &key)
        if out[0] != NULL:
            out[0].may_move = spec.may_move     # not of the shape: a memory that has moved is not kept
            return 0
        return self.make_slot(self.pool, &key, spec, out, why)

    cdef memory* take(self, pool* p, const shape* key) noexcept nogil:
        """An idle slot of that shape, or NULL."""
        cdef shelf* here
        cdef slot* s = NULL
        cdef bint cold = False
        cdef const void* me = this_thread()
        acquire(&p.lock.held)
        here = find_shelf(p, key)
        if here != NULL:
            s = here.warm if here.warm != NULL else here.cold
            # Of the last two, rather the one whose pages are in this processor's cache.
            if s != NULL and s.state == WARM and s.below != NULL and s.thread != me and s.below.thread == me:
                s = s.below
        if s != NULL:
            cold = s.state == COLD
            take_idle(p, s)
            s.hits += 1
        unlock(&p.lock.held)
        if s == NULL:
            return NULL
        if cold and s.least:
            if s.m.huge_pages:
                pages.advise_huge(s.base, s.capacity)
            if pages.commit(s.base, s.least) or memory_start_again(s.m, s.image):
                drop(s)         # and a new one may be had where this one's pages may not
                acquire(&p.lock.held)
                p.hits -= 1
                unlock(&p.lock.held)
                return NULL
            s.high = s.least
            poke(&s.m.accessible, s.least)
        store(&s.m.size, s.first_size)
        s.m.started = <size_t>s.first_size
        store(&s.m.refs, 1)
        return s.m

    cdef int make_slot(self, pool* p, const shape* key, const memory_spec* spec, memory** out,
                       failure* why) noexcept nogil:
        """A memory of upstream's, which becomes a slot where there is room for one."""
        cdef slot* s
        cdef slot* victim
        cdef shelf* here
        cdef shelf* spare
        cdef int code
        cdef bint room
        cdef memory_spec watched = spec[0]
        while True:
            acquire(&p.lock.held)
            room = p.n_slots < p.most_slots
            victim = NULL if room else least_wanted(p)
            if room:
                p.n_slots += 1
                p.misses += 1
            elif victim != NULL:
                take_idle(p, victim)
            unlock(&p.lock.held)
            if victim == NULL:
                break
            drop(victim)
        if not room:
            if not p.fall_back:
                return fail(why, E_EXHAUSTED, "new_memory", spec.minimum, p.most_slots, p.most_slots)
            code = self.upstream.make(spec, out, why)
            if code == 0:
                acquire(&p.lock.held)
                p.fallbacks += 1
                unlock(&p.lock.held)
            return code
        watched.watched = p.reset == RESET_SCAN or p.reset == ADAPTIVE
        s = <slot*>calloc(1, sizeof(slot))
        spare = <shelf*>calloc(1, sizeof(shelf))
        if s == NULL or spare == NULL:
            code = fail(why, E_NO_MEMORY, "calloc", sizeof(slot))
        else:
            code = self.upstream.make(&watched, out, why)
            if code and (code > 0 or code == E_LIMIT or code == E_NO_MEMORY) and has_idle(p):
                # What idle slots hold may be what is missing.
                release_idle(p, 0)
                code = self.upstream.make(&watched, out, why)
        if code or not out[0].ops.pages_are_ours:
            free(s)
            free(spare)
            acquire(&p.lock.held)
            p.n_slots -= 1
            p.misses -= 1
            if code == 0:
                p.fallbacks += 1
            unlock(&p.lock.held)
            return code
        s.pool = p
        s.m = out[0]
        s.base = s.m.base
        s.capacity = s.m.capacity
        s.least = s.high = s.m.accessible
        s.first_size = load(&s.m.size)
        s.growth_is_watched = s.m.growth_is_watched
        s.image = spec.image
        image_retain(s.image)
        s.head.keep = slot_keep
        s.head.dropped = slot_dropped
        reset_start(&s.policy)
        add(&p.refs, 1)
        acquire(&p.lock.held)
        here = find_shelf(p, key)
        if here == NULL:
            here = spare
            spare = NULL
            here.shape = key[0]
            here.next = bucket(p, key)[0]
            bucket(p, key)[0] = here
        here.slots += 1
        s.shelf = here
        s.next = p.slots
        if p.slots != NULL:
            p.slots.previous = s
        p.slots = s
        unlock(&p.lock.held)
        free(spare)
        memory_hang(s.m, &s.head)
        return 0

    def warm(self, n, ty, *, reserved_size_in_bytes=4 << 30, guard_size_in_bytes=32 << 20):
        """Make slots ahead, so that the next `n` requests of a type are hits.

        The pages of the minimum are accessible and not yet resident: the first user faults them in.

        Parameters
        ----------
        n : int
            Idle slots of that shape that there shall be at least.
        ty : MemoryType
        reserved_size_in_bytes, guard_size_in_bytes : int
            As in `new_memory`; by default what wasmtime asks for in its default configuration.

        Returns
        -------
        int
            How many slots were made; those that were idle already are not counted.

        Raises
        ------
        PoolError
            There are not enough slots that are not in use, or upstream's memories cannot be kept.
        PageError, GrowError
            Upstream refused; the slots made until then remain.
        """
        cdef size_t wanted, taken = 0, made = 0
        cdef pool* p = self.pool
        cdef memory** memories
        cdef memory_spec spec
        cdef shape key
        cdef failure why
        cdef int code = 0
        check_count(n, "n", &wanted)
        if wanted > p.most_slots:
            raise ValueError(f"n must be <= the slots of the pool ({p.most_slots}), got {wanted}")
        try:
            minimum = ty.minimum * ty.page_size
            maximum = None if ty.maximum is None else ty.maximum * ty.page_size
            for name, value in (("minimum", minimum), ("maximum", maximum)):
                if value is not None and value >= 2**64 - 1:
                    raise OverflowError(f"ty.{name} * ty.page_size must be below 2**64 - 1, got {_shown(value)}")
            if maximum is None:                 # what wasmtime says then; its 2**64 - 1 is none
                maximum = 2**32 if not ty.is_64 else None if ty.page_size == 1 else 2**64 - ty.page_size
        except (AttributeError, TypeError):
            raise TypeError(f"ty must be a MemoryType, got {type(ty).__name__}") from None
        self.fill_spec(&spec, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes)
        if spec.guard & (pages.capabilities().page_size - 1):
            raise ValueError("guard_size_in_bytes must be a multiple of the host page"
                             f" ({pages.capabilities().page_size}), got {spec.guard}")
        if self.image is not None:
            spec.image = self.image.it
        key_of(&spec, &key)
        memories = <memory**>calloc(wanted + 1, sizeof(memory*))
        if memories == NULL:
            raise MemoryError(f"no memory for a list of {wanted} slots")
        with nogil:
            while code == 0 and taken < wanted:
                memories[taken] = self.take(p, &key)
                if memories[taken] == NULL:
                    code = self.make_slot(p, &key, &spec, &memories[taken], &why)
                    if code:
                        break
                    if not is_slot_of(p, memories[taken]):
                        memory_release(memories[taken])
                        code = fail(&why, E_EXHAUSTED, "warm", spec.minimum, p.most_slots, p.most_slots)
                        break
                    made += 1
                taken += 1
            acquire(&p.lock.held)        # nobody has asked for these yet
            p.hits -= taken - made
            p.misses -= made
            unlock(&p.lock.held)
            while taken:
                taken -= 1
                memory_release(memories[taken])
            free(memories)
        if code:
            raise_failure(&why)
        return made

    def trim(self, target=0):
        """Release idle slots, cold ones first, then the least recently used.

        Parameters
        ----------
        target : int
            Bytes that idle slots may keep resident. 0: every idle slot is released.

        Returns
        -------
        int
            Bytes that the released slots had kept resident, at most.
        """
        cdef size_t most, released
        check_size(target, "target", &most)
        with nogil:
            released = release_idle(self.pool, most)
        return released

    def stats(self):
        """What the pool holds and what it did, as a dict of numbers.

        Returns
        -------
        dict
            slots: the most there may be. live, warm, cold: how many are in use; idle with their pages;
            idle without. pinned: of the live ones, those that wasmtime has dropped and a `Memory` or an
            exported buffer still holds. hits, misses: requests served by a slot that was there, and by a
            new one. fallbacks: requests passed to upstream, and not kept. rejected: slots thrown away
            because their reset failed, or left a byte (``check=True``). resets: how many of each kind.
            resident: bytes that idle slots keep resident, at most. resident_bound: what that never exceeds
            for long. reserved: bytes of address space that all slots hold, live and idle, guards included.
        """
        cdef pool* p = self.pool
        cdef pool now               # only what is counted
        cdef slot* s
        cdef size_t pinned = 0, reserved = 0
        cdef int how
        with nogil:
            acquire(&p.lock.held)
            now.n_slots, now.n_warm, now.n_cold = p.n_slots, p.n_warm, p.n_cold
            now.hits, now.misses, now.fallbacks, now.rejected = p.hits, p.misses, p.fallbacks, p.rejected
            now.resident = p.resident
            for how in range(3):
                now.resets[how] = p.resets[how]
            s = p.slots
            while s != NULL:
                count_in(&now, s)
                pinned += s.state == LIVE and s.m != NULL and load(&s.m.owner) == OWNER_LEFT
                if s.m != NULL:
                    reserved += peek(&s.m.pre_guard) + peek(&s.m.capacity) + peek(&s.m.guard)
                s = s.next
            unlock(&p.lock.held)
        return {
            "slots": p.most_slots,
            "live": now.n_slots - now.n_warm - now.n_cold,
            "warm": now.n_warm,
            "cold": now.n_cold,
            "pinned": pinned,
            "hits": now.hits,
            "misses": now.misses,
            "fallbacks": now.fallbacks,
            "rejected": now.rejected,
            "resets": {"scan": now.resets[RESET_SCAN], "zero": now.resets[RESET_ZERO],
                       "discard": now.resets[RESET_DISCARD]},
            "resident": now.resident,
            "resident_bound": p.resident_bound,
            "reserved": reserved,
        }

    def __repr__(self):
        return f"PoolingCreator({self.upstream!r}, slots={self.pool.most_slots})"


cdef int check_choice(object value, str name, object choices) except -1:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {_shown(value)}")
    return 0


# -- for the tests: the pure functions, alone --------------------------------------------------

cdef class _Policy:
    """One slot's policy, for ranges of `n` pages of which `touched` were found."""

    cdef reset_policy policy
    cdef reset_costs costs

    def __cinit__(self, unsigned int fault, unsigned int scan):
        self.costs.fault = fault
        self.costs.scan = scan
        reset_start(&self.policy)

    def begin(self, unsigned int n):
        return {RESET_SCAN: "scan", RESET_ZERO: "zero", RESET_DISCARD: "discard"}[
            reset_begin(&self.policy, &self.costs, n)]

    def bound(self, unsigned int n):
        return reset_bound(&self.policy, &self.costs, n)

    def end(self, unsigned int n, unsigned int touched, unsigned int most):
        return bool(reset_end(&self.policy, &self.costs, n, touched, most))

    def given_back(self):
        reset_given_back(&self.policy)


def _costs(anew=False):
    """What measure_costs() found here."""
    if anew:
        costs.fault = 0
    need_costs()
    return {"fault": costs.fault, "scan": costs.scan}


def _zero_wide(size_t address, size_t size):
    """zero_wide(); False where this processor has no wide stores, and nothing was done."""
    if not has_wide_stores():
        return False
    zero_wide(<char*>address, size)
    return True
