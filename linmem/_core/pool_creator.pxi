# The class PoolingCreator: options, requests, and the operator's calls. Part of pool.pyx.

_OPTIONS = {"upstream": None, "slots": None, "keep_resident": 64 << 20, "max_unused_warm": 100, "max_resident": None,
            "max_reserved": None, "idle_seconds": 5, "max_reset_seconds": None, "reset": "adaptive",
            "when_full": "fallback", "timeout": None, "check": False, "image": None, "name": None}


cdef int check_choice(object value, str name, object choices) except -1:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {_shown(value)}")
    return 0


cdef int check_optional_size(object value, str name, size_t* out) except -1:
    """None: *out does not change."""
    return 0 if value is None else check_size(value, name, out)


cdef long long nanoseconds(object seconds, str name, long long none,
                           str what="a number of seconds or None") except? -2:
    """None becomes `none`. If that is 0, then 0 seconds become one nanosecond, to be different from None."""
    cdef double n
    if seconds is None:
        return none
    if type(seconds) is not int and type(seconds) is not float:
        from numbers import Real        # numbers of NumPy and fractions are Real, too
        if isinstance(seconds, bool) or not isinstance(seconds, Real):
            raise TypeError(f"{name} must be {what}, got {_shown(seconds)}")
    if not seconds >= 0:
        raise ValueError(f"{name} must be >= 0, got {_shown(seconds)}")
    n = 1e18 if seconds > 10**9 else float(seconds) * 1e9
    return 1 if n < 1 and none == 0 else <long long>n


cdef int make_slot(PoolingCreator creator, const shape* key, domain_t* domain, const memory_spec* spec, bint counted,
                   memory** out, failure* why) noexcept nogil:
    """Makes a memory of upstream, and a slot for it if there is room. TAKE_AGAIN: an idle slot of the shape has become
    cold, so that it can serve this domain."""
    cdef pool* p = creator.pool
    cdef memory_spec watched = spec[0]
    cdef size_t least_mappings = 5 if image_shares_pages(spec.image) else 3         # see mappings_of()
    cdef int code = make_room(p, key, least_reserved(spec), least_mappings, why)
    if code:
        if p.fall_back and code != TAKE_AGAIN:
            code = creator.upstream.make(spec, out, why)
            if code == 0:
                count_fallback(p)
        return code
    watched.watched = p.reset == RESET_SCAN or p.reset == ADAPTIVE
    cdef slot* s = <slot*>calloc(1, sizeof(slot))
    if s == NULL:
        return fail(why, E_NO_MEMORY, "calloc", sizeof(slot))
    code = creator.upstream.make(&watched, out, why)
    while code == E_EXHAUSTED and make_upstream_room(p):
        code = creator.upstream.make(&watched, out, why)
    if code == 0 and out[0].ops.flush != NULL:
        memory_release(out[0])
        out[0] = NULL
        free(s)
        return refuse_file(why)
    if code == 0 and out[0].ops.pages_are_ours and not out[0].ops.pages_are_shared:
        init_slot(p, s, out[0], spec)
        code = add_slot(p, s, key, domain, counted, why)
        if code == 0:
            return 0
        if p.fall_back:
            code = 0
        else:
            memory_release(out[0])
            out[0] = NULL
    free(s)
    if code == 0:
        count_fallback(p)
    return code


cdef int refuse_file(failure* why) noexcept nogil:
    fail(why, E_UNSUPPORTED, "a pool", 0)
    snprintf(why.detail, sizeof(why.detail), "over memories whose pages are a file's: the next user would find the"
             " bytes of the file")
    return why.code


cdef int take_or_make(PoolingCreator creator, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
    cdef shape key
    cdef pool* p = creator.pool
    cdef memory_spec with_image
    cdef domain_t* domain = current_domain()
    cdef long long start = 0
    cdef int code
    if spec.image == NULL and creator.image is not None:
        with_image = spec[0]
        with_image.image = creator.image.img
        spec = &with_image
    key = shape_of(spec)
    while True:
        code = take(p, &key, domain, True, out, why)
        if out[0] != NULL:
            # may_move is not a part of the shape: a slot serves requests with either value, because the pool does
            # not keep a memory that has moved.
            out[0].may_move = spec.may_move
            trace_if_on(out[0])
        if code or out[0] != NULL:
            return code
        code = make_slot(creator, &key, domain, spec, True, out, why)
        if code == TAKE_AGAIN:
            continue
        if (code != E_EXHAUSTED or not p.wait
                or why.size > min(p.reserved_bound, <size_t>load(&process_reserved_bound))):
            return code         # waiting cannot help a request that alone exceeds a bound
        if start == 0:
            start = pages.clock_ns()
        if p.wait_ns >= 0 and pages.clock_ns() - start >= p.wait_ns:
            return code
        code = wait_a_little(why)
        if code:
            return code


@cython.final
cdef class PoolingCreator(NativeCreator):
    """PoolingCreator(upstream=None, *, slots=None, keep_resident=67108864, max_unused_warm=100, max_resident=None,\
    max_reserved=None, idle_seconds=5, max_reset_seconds=None, reset='adaptive', when_full='fallback', timeout=None,\
    check=False, image=None, name=None)\n--\n
    Memories that are reset and handed out again instead of being made anew.

    The pool keeps a slot (a memory of the upstream creator) when the last reference on it is gone. wasmtime, Python
    handles and exported buffers have references. The thread that drops the last reference resets the slot, with no
    lock and no GIL. The slot then serves the next request of the same shape (minimum, maximum, reservation, guard). The
    slot that was given back last goes first. The pool keeps what is expensive to make: the mapping, its protection, and
    the resident pages. wasmtime has a pooling allocator like this, which Python cannot reach, and rmm has
    ``PoolMemoryResource``.

    Parameters
    ----------
    upstream : NativeCreator, optional
        The creator that makes the slots; an `MmapCreator` by default. The pool passes memories of a `PythonCreator` on,
        and does not keep them.
    slots : int, optional
        The most slots, in use and idle. By default as many as take half of the mappings that a process may have
        (``vm.max_map_count``).
    keep_resident : int
        The most bytes that one idle slot may keep resident. A slot with more gives all its pages back to the OS.
    image : Image, optional
        The start of each memory whose request names no image. A request for a memory that is smaller than the image is
        refused. A slot always has the same image: a reset restores the bytes that a guest wrote, and no others. A
        request with another image (``img.new_memory(creator=pool)``) has another shape.
    max_unused_warm : int
        The most idle slots that keep their pages. If there are more, the least recently used ones become cold: they
        keep address space only.
    max_resident : int, optional
        The most bytes that all idle slots together keep resident, page tables included. By default
        ``max_unused_warm * keep_resident``, but at most a quarter of the machine's memory. `set_pool_limits` bounds
        what all pools keep together.
    max_reserved : int, optional
        The most bytes of address space that all slots take, live and idle, guards included. `when_full` says what
        happens beyond the bound. A single request that is larger than the bound is a `PoolError`, also with "wait".
    idle_seconds : float or None
        Slots that have been idle for longer become cold, a few each time that a slot is given back. None: their age
        does not matter.
    max_reset_seconds : float, optional
        The most time that zeroing may take. If it takes longer, the pages are given back to the OS instead.
    reset : {"adaptive", "scan", "zero", "discard"}
        How a slot becomes zero again. "scan": the OS says which pages were touched (PAGEMAP_SCAN,
        /proc/self/pagemap, GetWriteWatch), and the pool zeroes those. "zero": the pool zeroes all bytes. "discard": the
        OS gets all pages back (MADV_DONTNEED; on Windows they are decommitted). "adaptive": the pool measures what the
        guests of each slot do, and chooses what costs least.
    when_full : {"fallback", "error", "wait"}
        What happens while every slot is in use. "fallback": the request gets a memory of upstream, which no bound of
        the pool limits. "error": it raises `PoolError`. "wait": it waits until a slot is given back.
    timeout : float, optional
        Seconds after which "wait" raises `PoolError`. None: it waits without end.
    check : bool
        Compare all bytes of a slot with zero after each reset. A slot with another byte is dropped and counted as
        rejected. This is meant for tests; it costs more than everything else.
    name : str, optional
        Stands in the text of its refusals, in `MemoryInfo` of its memories, and in `linmem.metrics`.

    Notes
    -----
    Thread-safe. When the creator is collected, it releases idle slots at once, and slots in use when they are given
    back.
    """

    def __cinit__(self, *args, **kwargs):
        cdef const pages.capabilities_t* caps = pages.capabilities()
        cdef failure why
        (upstream, slots, keep_resident, max_unused_warm, max_resident, max_reserved, idle_seconds, max_reset_seconds,
         reset, when_full, timeout, check, image, _) = _given("PoolingCreator", tuple(_OPTIONS), _OPTIONS, args,
                                                              kwargs, 1)
        self.upstream = check_native(MmapCreator() if upstream is None else upstream, "upstream")
        below = self.upstream
        while below is not None:
            if isinstance(below, FileCreator):
                refuse_file(&why)
                raise_failure(&why)
            below = getattr(below, "upstream", None)
        if image is not None and not isinstance(image, Image):
            raise TypeError(f"image must be an Image, got {type(image).__name__}")
        self.image = image
        cdef pool* p = new_pool()
        if p == NULL:
            raise MemoryError("no memory for a pool")
        try:
            p.most_slots = caps.mappings // 6 if caps.mappings else 10000
            p.most_mappings = caps.mappings // 2 if slots is None and caps.mappings else SIZE_MAX
            if slots is not None:
                check_count(slots, "slots", &p.most_slots)
            if p.most_slots < 1:
                raise ValueError(f"slots must be >= 1, got {slots}")
            check_size(keep_resident, "keep_resident", &p.keep_resident)
            check_count(max_unused_warm, "max_unused_warm", &p.most_warm)
            check_choice(reset, "reset", _RESETS)
            check_choice(when_full, "when_full", ("fallback", "error", "wait"))
            p.resident_bound = quarter_of_memory()
            if p.most_warm == 0 or p.keep_resident <= p.resident_bound // p.most_warm:
                p.resident_bound = p.keep_resident * p.most_warm
            check_optional_size(max_resident, "max_resident", &p.resident_bound)
            p.reserved_bound = SIZE_MAX
            check_optional_size(max_reserved, "max_reserved", &p.reserved_bound)
            p.idle_ns = nanoseconds(idle_seconds, "idle_seconds", 0)
            p.reset_ns = nanoseconds(max_reset_seconds, "max_reset_seconds", 0)
            p.wait_ns = nanoseconds(timeout, "timeout", -1)
            if timeout is not None and when_full != "wait":
                raise ValueError(f"timeout must be None without when_full='wait', got {_shown(timeout)}")
            check_flag(check, "check")
            if reset == "scan" and not caps.scans:
                raise ValueError("reset must not be 'scan' here: this OS does not say which pages were touched")
        except BaseException:
            free(p.block)
            raise
        p.wait = when_full == "wait"
        p.fall_back = when_full == "fallback"
        p.reset = _RESETS.index(reset)
        p.check = check
        with nogil:
            list_pool(p)
        self.pool = p

    def __dealloc__(self):
        if self.pool != NULL:
            with nogil:
                lock_pool(self.pool)
                self.pool.closed = True
                unlock_pool(self.pool)
                evict_down_to(self.pool, 0, DROPPING, 0)
                release_pool(self.pool)

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        return finish_make(self, spec, take_or_make(self, spec, out, why), out, why)

    def warm(self, n, ty, *, reserved_size_in_bytes=4 << 30, guard_size_in_bytes=32 << 20, domain=None):
        """Make slots ahead, so that the next `n` requests of a type are hits.

        The pages of the minimum are accessible and not yet resident: the first guest faults them in.

        Parameters
        ----------
        n : int
            The least number of idle slots of that shape afterwards.
        ty : MemoryType
        reserved_size_in_bytes, guard_size_in_bytes : int
            As in `new_memory`; by default what wasmtime asks for in its default configuration.
        domain : str or None
            The domain of the requests. Slots that have become cold serve any domain.

        Returns
        -------
        int
            The number of new slots, without the slots that were idle before.

        Raises
        ------
        PoolError
            There are too many slots in use, or the pool cannot keep memories of upstream.
        PageError, GrowError
            Upstream refused. The slots that were made before remain.
        """
        cdef size_t wanted, taken = 0, made = 0
        cdef pool* p = self.pool
        cdef memory* m
        cdef link held              # LIVE slots, by in_stack
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
            # A type without a maximum: use the maximum with which wasmtime asks for such a type. With pages of one byte
            # and 64-bit addresses that is 2**64 - 1, which means that there is no maximum.
            if maximum is None:
                maximum = 2**32 if not ty.is_64 else None if ty.page_size == 1 else 2**64 - ty.page_size
        except (AttributeError, TypeError):
            raise TypeError(f"ty must be a MemoryType, got {type(ty).__name__}") from None
        self.fill_spec(&spec, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes)
        if spec.guard & (pages.capabilities().page_size - 1):
            raise ValueError("guard_size_in_bytes must be a multiple of the host page"
                             f" ({pages.capabilities().page_size}), got {spec.guard}")
        if self.image is not None:
            spec.image = self.image.img
        key = shape_of(&spec)
        cdef domain_t* domain_struct = domain_of(domain)
        cdef domain_t* before = current_domain()
        list_init(&held)
        with nogil:
            set_domain(domain_struct)       # a pool below makes its slots for the same domain
            while taken < wanted and (code == 0 or code == TAKE_AGAIN):
                code = take(p, &key, domain_struct, False, &m, &why)
                if code == 0 and m == NULL:
                    code = make_slot(self, &key, domain_struct, &spec, False, &m, &why)
                    if code == 0 and not is_slot_of(p, m):
                        memory_release(m)
                        code = fail(&why, E_EXHAUSTED, "warm", spec.minimum, p.most_slots, p.most_slots)
                    made += code == 0
                if code == 0:
                    list_add_first(&held, &(<slot*>m.hooks).in_stack, m)
                    taken += 1
            while held.next.owner != NULL:
                m = <memory*>held.next.owner
                list_remove(held.next)
                memory_release(m)
            set_domain(before)
            domain_release(domain_struct)
        if code:
            raise_failure(&why)
        return made

    def trim(self, target=0):
        """Release idle slots, cold ones first, then the least recently used.

        Parameters
        ----------
        target : int
            The most bytes that idle slots may keep resident. 0: the pool releases every idle slot.

        Returns
        -------
        int
            The most bytes that the released slots had resident.
        """
        cdef size_t most, released
        check_size(target, "target", &most)
        with nogil:
            released = evict_down_to(self.pool, most, DROPPING, 0)
        return released

    def purge(self, target=0, *, older_than=0):
        """Give the pages of idle slots back to the OS. The mappings stay for the next requests. For a timer.

        Parameters
        ----------
        target : int
            The most bytes that idle slots may keep resident. The least recently used ones give their pages back first.
        older_than : float
            Only slots that have been idle for at least this many seconds give their pages back.

        Returns
        -------
        int
            The most bytes that were resident in the pages given back.
        """
        cdef size_t most, purged
        cdef long long older
        if older_than is None:
            raise TypeError("older_than must be a number of seconds, got None")
        older = nanoseconds(older_than, "older_than", -1, "a number of seconds")
        check_size(target, "target", &most)
        with nogil:
            purged = evict_down_to(self.pool, most, COOLING, older)
        return purged

    def stats(self):
        """What the pool holds and what it did, as a dict of numbers.

        Returns
        -------
        dict
            slots: the most there may be. live, warm, cold: slots in use; idle slots with their pages; idle slots
            without. pinned: live slots that wasmtime has dropped and that a `Memory` or an exported buffer still holds.
            hits, misses: requests that an existing slot served, and a new one. fallbacks: requests that the pool passed
            to upstream, whose memories it does not keep. rejected: slots that the pool dropped because their reset
            failed or left a byte (``check=True``). resets: the number of each kind. resident: the most bytes that idle
            slots keep resident. resident_bound: the most bytes that these and their page tables have, except for a
            moment. reserved: bytes of address space of all slots, live and idle, guards included.
            `linmem.metrics.read` says more.
        """
        cdef report made
        cdef report_row* sums = &made.sums
        with nogil:
            make_report(self.pool, &made, False)
        return {
            "slots": self.pool.most_slots, "live": sums.live, "warm": sums.warm, "cold": sums.cold,
            "pinned": sums.pinned, "hits": sums.counts.hits_warm + sums.counts.hits_cold,
            "misses": sums.counts.misses, "fallbacks": made.fallbacks, "rejected": made.rejected,
            "resets": resets_dict(sums), "resident": sums.resident, "resident_bound": self.pool.resident_bound,
            "reserved": sums.reserved,
        }

    def __repr__(self):
        return f"PoolingCreator({self.upstream!r}, slots={self.pool.most_slots}{name_option(self)})"
