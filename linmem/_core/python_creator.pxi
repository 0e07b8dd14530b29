# PythonCreator: a Python class as a creator. Part of adaptors.pyx.

cdef struct python_memory:
    memory head
    size_t reservation      # of the request; the capacity may be less
    PyObject* object        # the LinearMemory, a reference; used with the GIL only
    size_t shelter          # of a broken memory: bytes of inaccessible pages at its base; 0: the OS refused them

# An access to this address faults: it is not a valid address with 48 bits, and with 57 bits the OS maps it only if a
# process asks for it.
cdef size_t UNMAPPABLE = <size_t>1 << 55

# The properties that a Python memory reports.
cdef struct answers:
    size_t base
    size_t size
    size_t capacity
    size_t covered
    size_t maximum


cdef int ask_python_memory(object made, size_t size, size_t reservation, size_t guard, size_t maximum,
                           answers* out) except -1:
    """Asks the Python memory where and how large it is. Raises ValueError if the answers contradict each other, or if
    the memory has another size than `size` (NO_MAXIMUM: it may have any size)."""
    cdef size_t bound, end = 0
    name = type(made).__name__
    check_size(made.as_ptr(), "as_ptr()", &out.base)
    check_size(made.byte_size(), "byte_size()", &out.size)
    check_size(made.byte_capacity(), "byte_capacity()", &out.capacity)
    if size != NO_MAXIMUM:
        check_python_size(made, size, out)
    accessible = made.wasm_accessible()
    if out.base == 0 or out.base & (pages.capabilities().page_size - 1):
        raise ValueError(f"{name}.as_ptr() must be a non-zero multiple of the host page"
                         f" ({pages.capabilities().page_size}), got {out.base:#x}")
    if out.capacity < out.size:
        raise ValueError(f"{name}.byte_capacity() must be >= byte_size() ({out.size}), got {out.capacity}")
    out.covered = max(out.capacity, reservation)
    if (out.covered > SIZE_MAX >> 1 or add_up(out.covered, guard, &out.covered)
            or add_up(out.base, out.covered, &end)):
        raise ValueError(f"{name}.byte_capacity() does not fit an address: {out.capacity}")
    # The compiler of wasm relies on this range: each access to it succeeds or faults.
    if not (accessible.start <= out.base and end <= accessible.stop):
        raise ValueError(f"{name}.wasm_accessible() must cover {out.base:#x} .. {end:#x}: its"
                         f" capacity of {out.capacity} (reservation asked for: {reservation}) and a guard of {guard}"
                         f" bytes; got {accessible.start:#x} .. {accessible.stop:#x}")
    out.maximum = maximum
    own_maximum = made.maximum_byte_size() if hasattr(made, "maximum_byte_size") else None
    if own_maximum is not None:
        check_size(own_maximum, "maximum_byte_size()", &bound)
        if bound < out.size:
            raise ValueError(f"{name}.maximum_byte_size() must be >= byte_size() ({out.size}), got {bound}")
        out.maximum = min(maximum, bound)
    return 0


cdef int check_python_size(object made, size_t size, const answers* got) except -1:
    if got.size != size:
        raise ValueError(f"{type(made).__name__}.byte_size() must be what was asked for ({size}), got {got.size}")
    return 0


cdef void store_answers(python_memory* p, const answers* got, size_t size) noexcept nogil:
    store_address(&p.head.base, <char*>got.base)
    store_size(&p.head.accessible, size)
    store_size(&p.head.capacity, got.capacity)
    store_size(&p.head.covered, got.covered)
    store_size(&p.head.maximum, got.maximum)
    store(&p.head.size, <long long>size)


cdef void break_memory(memory* m) noexcept nogil:
    """The location of the bytes is unknown, so from now on each use of the memory raises. WebAssembly asks for the base
    after each growth, and faults at the first byte."""
    cdef python_memory* p = <python_memory*>m
    cdef char* nowhere = <char*>UNMAPPABLE
    cdef size_t size = 0
    if m.broken:
        return
    m.broken = m.enters_slowly = True
    if (round_up(m.covered + 1, pages.capabilities().granularity, &size) == 0
            and pages.reserve(size, False, &nowhere) == 0):
        p.shelter = size
    store_address(&m.base, nowhere)
    store_size(&m.accessible, 0)
    store(&m.size, 0)


cdef int python_grow(memory* m, size_t new_size, failure* why) noexcept nogil:
    cdef bint may_move = new_size > m.capacity
    cdef int code
    cdef own_growth growth
    if m.broken:
        return fail(why, E_BROKEN, "grow_to", new_size)
    if python_is_ending():
        return fail(why, E_UNSUPPORTED, "grow_to while the interpreter shuts down", new_size)
    if may_move and begin_move(m, new_size, why):
        return why.code
    begin_own_growth(&growth, m)
    code = python_grow_with_gil(<python_memory*>m, new_size, may_move, why)
    end_own_growth(&growth)
    if may_move:
        end_move(m)
    return code


cdef int python_grow_with_gil(python_memory* p, size_t new_size, bint may_move, failure* why) noexcept with gil:
    """Stores the answers of the Python memory when all have been given. The memory is also asked if its grow_to()
    raised, because it may have moved before that."""
    cdef answers got
    cdef memory* m = &p.head
    made, error = <object>p.object, None
    try:
        try:
            made.grow_to(new_size)
        except BaseException as raised:
            error = raised
        # If the first question raises, the memory is asked again: the handler of a signal may have raised, which says
        # nothing about the memory.
        for is_last in (False, True):
            try:
                ask_python_memory(made, NO_MAXIMUM, p.reservation, m.guard, m.maximum, &got)
                break
            except BaseException as raised:
                error = raised if error is None else error
                if is_last:
                    break_memory(m)
                    raise error
        if got.size < memory_size(m) or (got.base != <size_t>m.base and not may_move):
            break_memory(m)
            raise RuntimeError(f"{type(made).__name__}.grow_to({new_size}) moved the base within its byte_capacity()"
                               f" ({m.capacity}), or shrank the memory: it is lost") from error
        store_answers(p, &got, new_size if error is None and got.size == new_size else memory_size(m))
        if error is not None:
            raise error
        return check_python_size(made, new_size, &got)
    except BaseException as failed:
        return fail_python(why, failed)


cdef void python_free(memory* m) noexcept nogil:
    cdef python_memory* p = <python_memory*>m
    remove_live_memory(m)
    image_detach(m)      # restore() may have given the memory an image
    refusals_release(m.refusals)
    if p.shelter:
        release_address_space(m.base, p.shelter)
    deferred_decref(p.object)
    free(m)


cdef memory_ops python_ops
python_ops.kind = "python"
python_ops.grow = python_grow
python_ops.free = python_free
python_ops.lose = break_memory


@cython.final
cdef class PythonCreator(NativeCreator):
    """PythonCreator(creator, *, name=None)\n--\n
    A native creator that calls a Python class, which implements the two traits.

    A caller in Python gets an exception of the class itself; wasmtime gets the text of the exception. Each creation and
    growth takes the GIL. Reading the base and the size does not take the GIL.

    Parameters
    ----------
    creator : MemoryCreator
        Its `new_memory` returns a `LinearMemory`, or a `Memory` that linmem made.
    name : str, optional
        Stands in `MemoryInfo` of its memories, and in the text of a `GrowError` or a `PageError` for their growth.
    """

    def __cinit__(self, *args, **kwargs):
        self.creator, _ = _given("PythonCreator", ("creator", "name"), {"name": None}, args, kwargs, 1)
        check_trait(self.creator, "creator")

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef int code = 0
        if python_is_ending():
            code = fail(why, E_UNSUPPORTED, "new_memory while the interpreter shuts down", spec.minimum)
        else:
            with gil:
                try:
                    make_in_python(self.creator, spec, out)
                except BaseException as error:
                    code = fail_python(why, error)
        return finish_make(self, spec, code, out, why)

    def __repr__(self):
        return f"PythonCreator({self.creator!r}{name_option(self)})"


cdef object type_of(const memory_spec* spec):
    from linmem.records import MemoryType
    maximum = None if spec.maximum == NO_MAXIMUM else spec.maximum // spec.page_size
    return MemoryType(minimum=spec.minimum // spec.page_size, maximum=maximum, is_64=spec.is_64,
                      is_shared=spec.is_shared, page_size=spec.page_size)


cdef int make_in_python(object creator, const memory_spec* spec, memory** out) except -1:
    cdef python_memory* p
    cdef answers got
    cdef failure why
    cdef request answered
    cdef size_t reservation = 0 if spec.reservation == UNCHOSEN else spec.reservation
    if spec.image != NULL and spec.image.end > spec.minimum:
        raise ValueError(f"minimum must be >= the end of the image ({spec.image.end}), got {spec.minimum}")
    maximum = None if spec.maximum == NO_MAXIMUM else spec.maximum
    ty = type_of(spec)
    answered.may_move, answered.domain = spec.may_move, current_domain()
    answer_request(&answered)
    try:
        made = creator.new_memory(
            ty, spec.minimum, maximum, None if spec.reservation == UNCHOSEN else spec.reservation, spec.guard)
    finally:
        answer_request(&answered)
    if isinstance(made, Memory):
        return adopt(<Memory>made, spec, reservation, out)
    for method in ("as_ptr", "byte_size", "byte_capacity", "wasm_accessible", "grow_to"):
        if not callable(getattr(made, method, None)):
            raise TypeError(f"{type(creator).__name__}.new_memory() must return a LinearMemory, got"
                            f" {type(made).__name__} without {method}()")
    ask_python_memory(made, spec.minimum, reservation, spec.guard, spec.maximum, &got)
    if refuse_foreign(<char*>got.base, spec.minimum, 1 << pages.ACCESS_READ_WRITE, "new_memory", &why):
        raise_failure(&why)
    p = <python_memory*>new_zeroed(sizeof(python_memory), "the bookkeeping of a memory")
    store_answers(p, &got, spec.minimum)
    if spec.image != NULL:
        image_copy(spec.image, p.head.base)
    Py_INCREF(made)
    p.object = <PyObject*>made
    p.reservation = reservation
    p.head.ops = &python_ops
    p.head.refs = 1
    p.head.guard = spec.guard
    p.head.is_shared = spec.is_shared
    p.head.may_move = spec.may_move
    add_live_memory(&p.head)
    out[0] = &p.head
    return 0


def check_trait(creator, str name):
    """Raises TypeError if `creator`, the argument `name`, does not implement MemoryCreator."""
    if isinstance(creator, type):
        raise TypeError(f"{name} must be a MemoryCreator, got the class {creator.__name__} itself: call it")
    # An Image has a new_memory() too, but with other parameters.
    if isinstance(creator, Image) or not callable(getattr(creator, "new_memory", None)):
        raise TypeError(f"{name} must be a MemoryCreator, got {type(creator).__name__}")


def as_native(creator, str name="creator"):
    """The creator itself, or a `PythonCreator` for a creator in Python; `name` is the name of the argument."""
    if isinstance(creator, NativeCreator):
        return creator
    check_trait(creator, name)
    return PythonCreator(creator)


cdef int adopt(Memory made, const memory_spec* spec, size_t reservation, memory** out) except -1:
    """Returns the struct of a native memory that a Python creator returned.

    A Python creator may return each handle once. Several handles may have one struct, because a Python creator that is
    the upstream of another one returns a handle of its own.
    """
    cdef memory* m = made.enter_locked()     # the creator may have kept the handle, and other threads may use it
    cdef size_t size, capacity, covered
    cdef bint fits, is_protected, may_shrink, is_first
    with nogil:
        size, capacity, covered = memory_size(m), m.capacity, m.covered
        fits = (size == spec.minimum and capacity >= reservation
                and covered >= max(capacity, reservation) + spec.guard)
        is_protected = load(&m.protection) != PROTECTION_NONE
        may_shrink = window_may_shrink(m)
        is_first = fits and not is_protected and not may_shrink and compare_exchange(&made.is_new, 1, 0)
        if is_first:
            memory_retain(m)
            # The memory was made for another request, so it gets the properties of this request.
            m.is_shared = m.is_shared or spec.is_shared
            m.may_move = spec.may_move
            store_size(&m.maximum, min(m.maximum, spec.maximum))
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
    if may_shrink:
        raise ValueError("new_memory() must return a memory without pages of a file that another program can cut short,"
                         " got one into which such a file was mapped")
    if not is_first:
        raise ValueError("new_memory() returned a memory that it has returned before")
    out[0] = m
    return 0
