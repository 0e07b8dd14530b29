# The base class of all creators, and the creator of the mapped kind, MmapCreator; a part of memory.pyx.

cdef enum:
    USUAL_GUARD = 65536

DEFAULT_GUARD = USUAL_GUARD


class _InPython:
    """All classes written in Python have the same destructor, which extension classes do not have."""


# The hook of a memory whose creator has a name.
cdef struct name_hook:
    memory_hook head
    domain* name            # a reference


cdef void name_dropped(memory_hook* head) noexcept nogil:
    domain_release((<name_hook*>head).name)
    free(head)


cdef int finish_make(NativeCreator creator, const memory_spec* spec, int code, memory** out,
                     failure* why) noexcept nogil:
    cdef name_hook* hook = NULL
    if code == 0 and out[0].refusals == NULL:
        out[0].refusals = refusals_retain(creator.refusal_log)
    if code == 0 and creator.name_struct != NULL:
        hook = <name_hook*>calloc(1, sizeof(name_hook))
        if hook == NULL:
            memory_release(out[0])
            out[0] = NULL
            code = fail(why, E_NO_MEMORY, "calloc", sizeof(name_hook))
    if code:
        refuse_make(creator, spec, why)
    if hook == NULL:
        return code
    domain_retain(creator.name_struct)
    hook.name = creator.name_struct
    hook.head.dropped = name_dropped
    memory_add_hook(out[0], &hook.head)
    return 0


cdef void refuse_make(NativeCreator creator, const memory_spec* spec, failure* why) noexcept nogil:
    """Notes which creator refused a new memory, unless a creator below has done so."""
    name_failure(why, creator.name_struct)
    count_refusal(creator.refusal_log, NULL, spec.minimum, why)


cdef void name_failure(failure* why, const domain* name) noexcept nogil:
    """Notes which creator refused, unless a creator below has done so."""
    cdef int code = why.code
    if name == NULL or why.name[0] or not (
            code > 0 or code == E_LIMIT or code == E_GROWTHS or code == E_EXHAUSTED or code == E_MAXIMUM
            or code == E_CAPACITY or code == E_VALUE):
        return
    memcpy(why.name, name.name, name.size)
    why.name[name.size] = 0


cdef domain* memory_name(memory* m) noexcept nogil:
    cdef memory_hook* hook = m.hooks
    while hook != NULL and hook.dropped != name_dropped:
        hook = hook.next
    return NULL if hook == NULL else (<name_hook*>hook).name


cdef int refuse_growth(memory* m, memory_hook* refusing, size_t new_size, failure* why) noexcept nogil:
    """The hook `refusing` has refused a growth; NULL: the memory itself has. Notes the creator. Returns the code."""
    cdef memory_hook* hook = m.hooks
    cdef domain* name = NULL
    while hook != refusing:
        if hook.dropped == name_dropped:
            name = (<name_hook*>hook).name
        hook = hook.next
    name_failure(why, name)
    count_refusal(m.refusals if refusing == NULL or refusing.refusals == NULL else refusing.refusals, m, new_size, why)
    return why.code


cdef str name_option(NativeCreator creator):
    """For repr()."""
    return "" if creator.name_struct == NULL else f", name={creator.name!r}"


cdef class NativeCreator:
    """NativeCreator(**options)\n--\n
    Base of the creators that wasmtime can call without the GIL. A subclass in Cython overrides `make`.

    A creator in Python implements `linmem.MemoryCreator` instead.
    """

    def __cinit__(self, *args, **kwargs):
        cls = type(self)
        if cls is NativeCreator:
            raise TypeError("a NativeCreator makes no memories by itself: linmem.creator(kind) makes one that does")
        # wasmtime and the other creators call `make`, and not the methods of a subclass in Python.
        if (<PyTypeObject*>cls).tp_dealloc == (<PyTypeObject*>_InPython).tp_dealloc:
            raise TypeError(f"{cls.__name__} cannot extend a native creator in Python, because its methods would not be"
                            " called: implement linmem.MemoryCreator, with a creator inside where one is needed")
        self.name_struct = domain_of(_check_name(kwargs.get("name")))
        self.refusal_log = <refusal_log*>calloc(1, sizeof(refusal_log))
        if self.refusal_log == NULL:
            raise MemoryError("no memory for a creator")
        self.refusal_log.refs = 1

    def __dealloc__(self):
        with nogil:
            domain_release(self.name_struct)
            refusals_release(self.refusal_log)

    @property
    def name(self):
        """The name of the creator, or None."""
        return domain_name(self.name_struct)

    @property
    def refusals(self):
        """How many new memories and growths this creator itself has refused, and the last 16, as `Refusals`.

        A refusal counts at the creator that refused: at a `LimitingCreator` if its budget was used up, at the
        `MmapCreator` if the OS refused, at a `CallbackCreator` if a function raised. It counts each time, also if
        `on_refused` or a pool then tried again. Growths that are refused after the creator is gone count no longer.
        """
        return refusals_of(self.refusal_log, self.name)

    def __reduce__(self):
        raise TypeError(f"{type(self).__name__} objects cannot be pickled or copied: their memories are of this"
                        " process. Make one where it is needed")

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        return fail(why, E_UNSUPPORTED, "new_memory", spec.minimum)

    def new_memory(self, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes, *, may_move=None,
                   domain=None):
        """Make a memory, as wasmtime asks for one; mirrors ``wasmtime::MemoryCreator::new_memory``.

        Parameters
        ----------
        ty : MemoryType
            The wasm type. A shared memory never moves.
        minimum, maximum : int
            In bytes; not necessarily multiples of a page. None: the memory has no maximum.
        reserved_size_in_bytes : int or None
            Growth up to this size never moves the base. None: the creator chooses.
        guard_size_in_bytes : int
            Inaccessible bytes after the capacity, a multiple of the host page.
        may_move : bool, optional
            Whether growth past the capacity may move the base. None: no. While a Python creator answers a request on
            this thread, None means the may_move of that request (True for requests of wasmtime).
        domain : str or None
            A pool hands this user only pages that were of the same domain before. None is a domain of its own. While a
            Python creator answers a request on this thread, None means the domain of that request.

        Returns
        -------
        Memory

        Raises
        ------
        ValueError, TypeError, OverflowError
            An argument is not valid; the message names it.
        PageError
            The OS refused; the message names the limit in the way.
        GrowError
            A bound of the creator refused.
        """
        cdef memory_spec spec
        self.fill_spec(&spec, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes)
        if may_move is not None:
            check_flag(may_move, "may_move")
            spec.may_move = may_move
        return self.make_checked(&spec, "guard_size_in_bytes", domain)

    cdef int fill_spec(self, memory_spec* spec, ty, minimum, maximum, reservation, guard) except -1:
        fill_sizes(spec, minimum, maximum, reservation, "reserved_size_in_bytes")
        check_extent(guard, "guard_size_in_bytes", &spec.guard)
        spec.may_move = thread_requests().may_move
        try:
            spec.page_size = ty.page_size
            spec.is_64 = ty.is_64
            spec.is_shared = ty.is_shared
        except (AttributeError, TypeError, OverflowError):
            raise TypeError(f"ty must be a MemoryType, got {type(ty).__name__}") from None
        if spec.page_size != 1 and spec.page_size != 65536:
            raise ValueError(f"ty.page_size must be 1 or 65536, got {spec.page_size}")
        return 0

    def create(self, minimum, maximum=None, reserve=None, guard=None, *, image=None, may_move=False, domain=None):
        """Make a memory for Python; `linmem.create` says what each argument means (all in bytes).

        The memory starts with the bytes of the `image`, otherwise with zeros.
        """
        cdef memory_spec spec
        fill_usual(&spec)
        fill_sizes(&spec, minimum, maximum, reserve, "reserve")
        check_flag(may_move, "may_move")
        spec.may_move = may_move
        if image is not None:
            check_type(image, Image, "image")
            spec.image = (<Image>image).img
        if guard is not None:
            check_extent(guard, "guard", &spec.guard)
        return self.make_checked(&spec, "guard", domain)

    cdef object make_checked(self, const memory_spec* spec, str guard_name, object domain=None):
        cdef memory* m = NULL
        cdef domain_ptr before, ours
        cdef Memory made
        cdef failure why
        cdef int code
        cdef size_t page = host_page()
        if spec.minimum > spec.maximum:
            raise ValueError(f"minimum must be <= maximum ({spec.maximum}), got {spec.minimum}")
        if spec.guard & (page - 1):
            raise ValueError(f"{guard_name} must be a multiple of the host page ({page}), got {spec.guard}")
        ours = <domain_ptr>thread_requests().domain if domain is None else domain_of(domain)
        with nogil:
            before = current_domain()
            set_domain(ours)
            code = self.make(spec, &m, &why)
            set_domain(before)
            if domain is not None:
                domain_release(ours)
        if code:
            refuse_make(self, spec, &why)       # this class may be a user's, whose make() does not count
            raise_failure(&why)
        made = <Memory>wrap(m)
        made.is_new = 1
        return made


cdef void fill_usual(memory_spec* spec) noexcept nogil:
    """A request for Python, of a memory of any size."""
    memset(spec, 0, sizeof(memory_spec))
    spec.maximum = NO_MAXIMUM
    spec.reservation = UNCHOSEN
    spec.page_size = 1
    spec.is_64 = True
    round_up(USUAL_GUARD, host_page(), &spec.guard)


cdef int fill_sizes(memory_spec* spec, minimum, maximum, reservation, str name) except -1:
    spec.image = NULL
    spec.watched = False
    check_extent(minimum, "minimum", &spec.minimum)
    check_optional_size(maximum, "maximum", &spec.maximum)
    return check_optional_size(reservation, name, &spec.reservation, _FITS)


@cython.final
cdef class MmapCreator(NativeCreator):
    """MmapCreator(*, prefault=False, huge_pages=False, name=None)\n--\n
    Makes each memory as a mapping of its own, which is reserved, committed as the memory grows, and released.

    Mirrors ``wasmtime::MemoryCreator``. Thread-safe. The creator does not keep memories.

    Parameters
    ----------
    prefault : bool
        Make every page resident when it becomes accessible, at creation and at each growth. If the machine has no
        memory left, the growth is refused, and no page fault fails later. This pays if nearly all pages are written:
        for each page, written or not, the call costs two thirds of a page fault.
    huge_pages : bool
        Make the base a multiple of a huge page (2 MiB on most machines), and ask the OS to use huge pages
        (MADV_HUGEPAGE). This pays if the minimum, or each step of growth, is at least a huge page and most of its bytes
        are written: first touches are then 3 to 5 times faster. The option gains nothing for smaller memories, for
        growth in smaller steps, and if the OS has no free huge pages.
    name : str, optional
        At most 100 bytes of printable text. The name stands in the text of what the creator refuses (`GrowError`,
        `PageError`) and in `MemoryInfo` of its memories. A memory has the name of the outermost creator with a name.
    """

    def __cinit__(self, *args, **kwargs):
        prefault, huge_pages, _ = _given("MmapCreator", ("prefault", "huge_pages", "name"),
                                         {"prefault": False, "huge_pages": False, "name": None}, args, kwargs, 0)
        check_flag(prefault, "prefault")
        check_flag(huge_pages, "huge_pages")
        self.prefault = prefault
        self.huge_pages = huge_pages

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef int code = mapped_make(spec, self.prefault, self.huge_pages, out, why)
        # A page call may have failed for lack of memory or mappings. Idle slots of pools hold both: some are given up,
        # and the memory is made again. A failed `reserve` has tried that already.
        while code > 0 and strcmp(why.call, "reserve") and relieve(RELIEF_PAGES, NULL, why.size):
            code = mapped_make(spec, self.prefault, self.huge_pages, out, why)
        return finish_make(self, spec, code, out, why)

    def __repr__(self):
        options = [f"{name}=True" for name, on in (("prefault", self.prefault), ("huge_pages", self.huge_pages)) if on]
        if self.name is not None:
            options.append(f"name={self.name!r}")
        return f"MmapCreator({', '.join(options)})"


_abc.MemoryCreator.register(NativeCreator)
