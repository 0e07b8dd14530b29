# RoutingCreator: passes each request to one of several creators. Part of adaptors.pyx.

# A row of the table.
cdef struct route:
    size_t max_size
    int is_64, is_shared        # 0 or 1; EITHER: the row fits both
    PyObject* creator           # a NativeCreator; `rule` has the reference

cdef enum:
    EITHER = -1

cdef extern from *:
    int Py_EnterRecursiveCall(const char* where) except -1
    void Py_LeaveRecursiveCall() noexcept


cdef object fill_route(route* r, object row, str name):
    """Returns the row as `rule` shows it."""
    try:
        fields, creator = row
        fields = dict(fields)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a dict of fields and a creator, got {_shown(row)}") from None
    r.max_size = SIZE_MAX
    r.is_64 = r.is_shared = EITHER
    for field, value in fields.items():
        if field == "max_size":
            check_size(value, f"max_size of {name}", &r.max_size)
        elif field == "is_64":
            check_flag(value, f"is_64 of {name}")
            r.is_64 = value
        elif field == "is_shared":
            check_flag(value, f"is_shared of {name}")
            r.is_shared = value
        else:
            raise ValueError(f"{name} has no field {_shown(field)}; the fields are: max_size, is_64, is_shared")
    native = as_native(creator, f"the creator of {name}")
    r.creator = <PyObject*>native
    return fields, native


cdef bint fits(const route* r, const memory_spec* spec) noexcept nogil:
    return (spec.minimum <= r.max_size and (r.is_64 == EITHER or r.is_64 == spec.is_64)
            and (r.is_shared == EITHER or r.is_shared == spec.is_shared))


@cython.final
cdef class RoutingCreator(NativeCreator):
    """RoutingCreator(rule, *, name=None)\n--\n
    Passes each request to one of several creators, by the memory's type and size.

    A memory belongs to the creator that made it: its growth, its budget and its pool are those of this creator.

    Parameters
    ----------
    rule : list of (dict, MemoryCreator), or callable
        A table: the request goes to the creator of the first row whose fields all fit. The fields are ``max_size`` (the
        memory starts with at most so many bytes), ``is_64`` and ``is_shared`` (True or False). A row without fields
        fits each request. If no row fits, the request is refused with `ValueError`. A table runs no Python code.

        A function ``rule(ty, size)``: it gets the `MemoryType` and the bytes at the start, and returns the creator. If
        it raises, the request is refused with this exception. It must not use the wasmtime store that asks. If wasmtime
        asks, a memory of a pool with an ``image=`` is refused with `ValueError`.
    name : str, optional
        Stands in the text of refusals whose creator has no name, and in `MemoryInfo` of the memories.
    """

    def __cinit__(self, *args, **kwargs):
        rule, _ = _given("RoutingCreator", ("rule", "name"), {"name": None}, args, kwargs, 1)
        if callable(rule):
            self.rule = rule
            return
        try:
            rows = list(rule)
        except TypeError:
            raise TypeError("rule must be a function or a list of (fields, creator), got"
                            f" {type(rule).__name__}") from None
        if not rows:
            raise ValueError("rule must have at least one row, got an empty table")
        self.routes = <route*>new_zeroed(len(rows) * sizeof(route), "a table of routes")
        self.rule = tuple([fill_route(&self.routes[i], row, f"rule[{i}]") for i, row in enumerate(rows)])
        self.n_routes = len(rows)

    def __dealloc__(self):
        free(self.routes)

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef int code
        if self.routes != NULL:
            code = make_by_table(self, spec, out, why)
        elif python_is_ending():
            code = fail(why, E_UNSUPPORTED, "new_memory while the interpreter shuts down", spec.minimum)
        else:
            code = make_by_function(self, spec, out, why)
        return finish_make(self, spec, code, out, why)

    def __repr__(self):
        return f"RoutingCreator({self.rule!r}{name_option(self)})"


cdef int make_by_table(RoutingCreator creator, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
    cdef size_t i
    for i in range(creator.n_routes):
        if fits(&creator.routes[i], spec):
            return (<NativeCreator>creator.routes[i].creator).make(spec, out, why)
    fail(why, E_VALUE, "rule", spec.minimum)
    snprintf(why.detail, sizeof(why.detail), "no row of rule fits a memory of %zu bytes with is_64=%s and"
             " is_shared=%s: a last row without fields would", spec.minimum,
             <const char*>("True" if spec.is_64 else "False"), <const char*>("True" if spec.is_shared else "False"))
    return E_VALUE


cdef int make_by_function(RoutingCreator creator, const memory_spec* spec, memory** out,
                          failure* why) noexcept with gil:
    cdef NativeCreator chosen
    cdef int code
    try:
        chosen = as_native(creator.rule(type_of(spec), spec.minimum), "the result of rule(ty, size)")
        Py_EnterRecursiveCall(" in the rule of a RoutingCreator")       # the rule may choose this creator itself
        with nogil:
            code = chosen.make(spec, out, why)
        Py_LeaveRecursiveCall()
        return code
    except BaseException as error:
        return fail_python(why, error)
