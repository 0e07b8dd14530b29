# CallbackCreator: Python functions that are told of memories and decide, and limits for each memory. Part of
# adaptors.pyx.

# The hook of a memory. It holds no GIL and no Python object if the creator has limits only.
cdef struct callback_hook:
    memory_hook head
    PyObject* callbacks         # a MemoryCallbacks, one reference; NULL: no Python function. It then owns the hook
    size_t most_bytes           # SIZE_MAX: no limit
    size_t most_growths         # SIZE_MAX: no limit
    size_t growths
    bint calls_on_grow
    bint forbidden              # on_grow has refused the growth under way, so on_refused is not asked
    bint told                   # on_made has returned, so on_dropped will be called
    # Of a dropped memory:
    bint in_store               # wasmtime drops it
    size_t base, size
    const char* kind
    domain_t* name              # a reference


cdef void free_callback_hook(callback_hook* hook) noexcept nogil:
    domain_release(hook.name)
    refusals_release(hook.head.refusals)
    free(hook)


@cython.final
@cython.internal
cdef class MemoryCallbacks:
    """The functions of one memory. The last reference goes after the memory: then on_dropped is called."""
    cdef object on_grow, on_refused, on_dropped
    cdef callback_hook* hook

    def __del__(self):
        cdef object info = None, error = None
        if not self.hook.told or self.on_dropped is None:
            return
        # No Python code ran while the pages were freed, so handlers of signals may be due. They run before on_dropped,
        # which is also called if they raise.
        for _ in range(3):
            try:
                PyErr_CheckSignals()
                info = dropped_info(self.hook)
                break
            except BaseException as raised:
                error = raised
        if info is None:
            raise error
        try:
            self.on_dropped(info)
        finally:
            if error is not None:
                if self.hook.in_store:      # an exception in wasmtime-py's code would make it drop the store twice
                    raise error
                raise_later(error)

    def __dealloc__(self):
        with nogil:
            free_callback_hook(self.hook)


cdef object dropped_info(callback_hook* hook):
    from linmem.records import DroppedInfo
    return DroppedInfo(base=hook.base, byte_size=hook.size, growths=hook.growths, kind=hook.kind.decode(),
                       name=domain_name(hook.name))


cdef object call_with_handle(object function, memory* m, tuple arguments):
    """Calls the function with a handle on the memory, which is closed when the function returns."""
    memory_retain(m)
    cdef Memory handle = handle_on(m)       # the creators above may not know the memory yet
    try:
        return function(handle, *arguments)
    finally:
        handle.__exit__(None, None, None)


cdef int refuse_if_ending(const char* call, size_t size, failure* why) noexcept nogil:
    return fail(why, E_UNSUPPORTED, call, size) if python_is_ending() else 0


cdef int fail_limit_each(size_t size, size_t new_size, size_t limit, failure* why) noexcept nogil:
    fail(why, E_LIMIT, "limit_each", new_size - size, size, limit)
    snprintf(why.detail, sizeof(why.detail), " for each memory")
    return E_LIMIT


cdef bint ask_again(object on_refused, memory* m, size_t requested, failure* why) noexcept:
    """Calls on_refused. False: *why holds the failure, or the exception that on_refused raised."""
    cdef bint again = False
    cdef object error = None
    if why.of_signal:
        return False
    try:
        error = exception_of(why)
        if isinstance(error, Exception):        # Ctrl-C is not a refusal
            try:
                raise error
            except Exception:                   # so Python makes the error the context of what on_refused raises
                if m == NULL:
                    again = on_refused(None, requested, error)
                else:
                    again = call_with_handle(on_refused, m, (requested, error))
    except BaseException as raised:
        fail_python(why, raised)
        return False
    if not again and why.code == E_PYTHON:
        fail_python(why, error)                 # exception_of() took the reference
        why.counted = True                      # before on_refused was asked
    return again


cdef int callback_before_grow(memory_hook* head, memory* m, size_t new_size, failure* why) noexcept nogil:
    cdef callback_hook* hook = <callback_hook*>head
    cdef own_growth own
    cdef int code
    hook.forbidden = False
    if new_size > hook.most_bytes:
        return fail_limit_each(memory_size(m), new_size, hook.most_bytes, why)
    if hook.growths >= hook.most_growths:
        return fail(why, E_GROWTHS, "grow_to", new_size, hook.growths, hook.most_growths)
    if not hook.calls_on_grow:
        return 0
    code = refuse_if_ending("on_grow while the interpreter shuts down", new_size, why)
    if code == 0:
        begin_own_growth(&own, m)
        code = call_on_grow(hook, m, new_size, why)
        end_own_growth(&own)
    hook.forbidden = code != 0
    return code


cdef int call_on_grow(callback_hook* hook, memory* m, size_t new_size, failure* why) noexcept with gil:
    try:
        call_with_handle((<MemoryCallbacks>hook.callbacks).on_grow, m, (memory_size(m), new_size))
        return 0
    except BaseException as error:
        return fail_python(why, error)


cdef void callback_after_grow(memory_hook* head, memory* m, size_t old_size, size_t new_size, int code) noexcept nogil:
    (<callback_hook*>head).growths += code == 0


cdef bint callback_refused(memory_hook* head, memory* m, size_t new_size, failure* why) noexcept nogil:
    cdef callback_hook* hook = <callback_hook*>head
    cdef own_growth own
    cdef bint again
    if hook.forbidden or python_is_ending():
        return False
    begin_own_growth(&own, m)
    with gil:
        again = ask_again((<MemoryCallbacks>hook.callbacks).on_refused, m, new_size, why)
    end_own_growth(&own)
    return again


cdef int callback_resized(memory_hook* head, memory* m, size_t size, size_t accessible, failure* why) noexcept nogil:
    (<callback_hook*>head).growths = 0      # the next user of the slot gets a memory that has not grown
    return 0


cdef void callback_before_drop(memory_hook* head, memory* m) noexcept nogil:
    cdef callback_hook* hook = <callback_hook*>head
    hook.base, hook.size, hook.kind = <size_t>m.base, memory_size(m), m.ops.kind
    hook.in_store = load(&m.owner) == OWNER_WASMTIME
    if hook.name == NULL:       # a forked child may come here a second time
        hook.name = memory_name(m)
        domain_retain(hook.name)


cdef void callback_dropped(memory_hook* head) noexcept nogil:
    cdef callback_hook* hook = <callback_hook*>head
    if hook.callbacks == NULL:
        free_callback_hook(hook)
    else:
        deferred_decref(hook.callbacks)


cdef object check_callback(object value, str name):
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable or None, got {type(value).__name__}")
    return value


@cython.final
cdef class CallbackCreator(NativeCreator):
    """CallbackCreator(upstream, *, on_made=None, on_grow=None, on_refused=None, on_dropped=None,\
    limit_each=None, limit_growths=None, name=None)\n--\n
    Calls Python functions for the memories that come through it, and limits each memory.

    rmm has ``TrackingResourceAdaptor`` and ``FailureCallbackResourceAdaptor``, wasmtime has ``ResourceLimiter``. The
    requests of WebAssembly modules, components and garbage-collected heaps arrive here as those of Python do.

    The handle ``mem`` that a function gets is closed when the function returns, so a function that stores the handle
    does not keep the memory alive. A buffer that it exported does.

    Parameters
    ----------
    upstream : NativeCreator
        The creator that makes the memories.
    on_made : callable, optional
        ``on_made(mem, size)`` is called before the new memory of `size` bytes is handed out. If it raises, the request
        is refused with this exception, and `on_dropped` is not called for the memory.
    on_grow : callable, optional
        ``on_grow(mem, old, new)`` is called before a growth from `old` to `new` bytes. If it raises, the growth is
        refused with this exception. After it returned, upstream or the OS can still refuse the growth.
    on_refused : callable, optional
        ``on_refused(mem, requested, error)`` is called after upstream, the OS or a limit of this creator refused a new
        memory (`mem` is None) or a growth of `mem`, to `requested` bytes. If it returns a true value, the request is
        tried once more, for example because the function has freed something. If it raises, the request is refused with
        that exception. It is not called if `on_made` or `on_grow` of this creator raised, nor for a size above
        the memory's maximum.
    on_dropped : callable, optional
        ``on_dropped(info)`` is called with a `DroppedInfo` after a memory is gone, or after a pool has taken the memory
        back. An exception goes to ``sys.unraisablehook``.
    limit_each : int, optional
        The most bytes that a memory may have. Otherwise `LimitError`, or -1 from ``memory.grow``. No Python code runs.
    limit_growths : int, optional
        How often a memory may grow. Otherwise `GrowError`. No Python code runs.
    name : str, optional
        Stands in the text of what its limits refuse, in `MemoryInfo` and in `DroppedInfo` of its memories.

    Notes
    -----
    Functions run on the thread that makes, grows or drops the memory, and several threads may run them at once.
    `on_dropped` runs on the main thread, later, if a thread that Python does not know dropped the memory, or if a pool
    drops a slot so that another request gets its bytes. It is not called while the interpreter shuts down; at that
    time, requests that `on_made` or `on_grow` would decide are refused.

    A function may make, grow and drop other memories, and may read and write `mem`. It must not grow, restore, protect
    or close `mem` (`RuntimeError`). Two functions that wait for each other's memories wait until Ctrl-C. A function
    must not use the wasmtime store that asks for the memory or for its growth: wasmtime does not allow such calls, and
    may abort the process. Other stores, also of the same engine, may be used.

    Below a pool, a memory is a slot: it is made once and dropped once for many users, and `limit_growths` counts the
    growths of each user. Put the creator above the pool to be told of each user. The functions live as long as the
    memories. A function that refers to a `Memory` of this creator keeps this memory alive.
    """

    def __cinit__(self, *args, **kwargs):
        functions = ("on_made", "on_grow", "on_refused", "on_dropped")
        names = ("upstream", *functions, "limit_each", "limit_growths", "name")
        upstream, *rest = _given("CallbackCreator", names, dict.fromkeys(names[1:]), args, kwargs, 1)
        self.upstream = check_native(upstream, "upstream")
        self.on_made, self.on_grow, self.on_refused, self.on_dropped = map(check_callback, rest[:4], functions)
        self.most_bytes = self.most_growths = SIZE_MAX
        if rest[4] is not None:
            check_size(rest[4], "limit_each", &self.most_bytes)
        if rest[5] is not None:
            check_count(rest[5], "limit_growths", &self.most_growths)
        self.calls_python = any(function is not None for function in rest[:4])

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef callback_hook* hook = <callback_hook*>calloc(1, sizeof(callback_hook))
        cdef bint again = False
        cdef int code
        if hook == NULL:
            return finish_make(self, spec, fail(why, E_NO_MEMORY, "calloc", sizeof(callback_hook)), out, why)
        code = make_within_limit(self, spec, out, why)
        if code:
            refuse_make(self, spec, why)
        if code and self.on_refused is not None and not python_is_ending():
            with gil:
                again = ask_again(self.on_refused, NULL, spec.minimum, why)
            code = make_within_limit(self, spec, out, why) if again else why.code
        if code:
            free(hook)
            return finish_make(self, spec, code, out, why)
        hook.most_bytes, hook.most_growths = self.most_bytes, self.most_growths
        hook.head.refusals = refusals_retain(self.refusal_log)
        hook.head.before_grow = callback_before_grow
        hook.head.after_grow = callback_after_grow
        hook.head.before_drop = callback_before_drop
        hook.head.dropped = callback_dropped
        hook.head.dropped_runs_python = self.calls_python
        hook.head.resized = callback_resized
        if self.on_refused is not None:
            hook.head.refused = callback_refused
        if self.calls_python:
            code = tell_made(self, hook, out[0], why)
        if code:
            store_release(&out[0].owner, OWNER_PYTHON)      # buffers that on_made exported may keep the memory
            memory_release(out[0])
            out[0] = NULL
            callback_dropped(&hook.head)
        else:
            memory_add_hook(out[0], &hook.head)
        return finish_make(self, spec, code, out, why)

    @property
    def limit_each(self):
        """The most bytes that a memory may have, or None."""
        return None if self.most_bytes == SIZE_MAX else self.most_bytes

    @property
    def limit_growths(self):
        """How often a memory may grow, or None."""
        return None if self.most_growths == SIZE_MAX else self.most_growths

    def __repr__(self):
        options = [repr(self.upstream)]
        for name in ("on_made", "on_grow", "on_refused", "on_dropped", "limit_each", "limit_growths", "name"):
            value = getattr(self, name)
            if value is not None:
                options.append(f"{name}={_show_size(value) if name == 'limit_each' else repr(value)}")
        return f"CallbackCreator({', '.join(options)})"


cdef int make_within_limit(CallbackCreator creator, const memory_spec* spec, memory** out,
                           failure* why) noexcept nogil:
    cdef int code
    if spec.minimum > creator.most_bytes:
        return fail_limit_each(0, spec.minimum, creator.most_bytes, why)
    code = creator.upstream.make(spec, out, why)
    if code == 0 and memory_size(out[0]) > creator.most_bytes:      # the memory of a file that has bytes already
        code = fail_limit_each(0, memory_size(out[0]), creator.most_bytes, why)
        memory_release(out[0])
        out[0] = NULL
    return code


cdef int tell_made(CallbackCreator creator, callback_hook* hook, memory* m, failure* why) noexcept nogil:
    """Calls on_made, and prepares the other functions. The lock is held meanwhile, so that the memory keeps its size:
    the adaptors above do not know it yet."""
    cdef own_growth own
    cdef int code = refuse_if_ending("new_memory while the interpreter shuts down", memory_size(m), why)
    if code == 0:
        code = lock_memory(m, why)
    if code:
        return code
    begin_own_growth(&own, m)
    with gil:
        code = call_on_made(creator, hook, m, why)
    end_own_growth(&own)
    unlock(&m.lock)
    return code


cdef int call_on_made(CallbackCreator creator, callback_hook* hook, memory* m, failure* why) noexcept:
    cdef MemoryCallbacks callbacks
    try:
        callbacks = MemoryCallbacks.__new__(MemoryCallbacks)
        callbacks.hook = hook
        callbacks.on_grow = creator.on_grow
        callbacks.on_refused = creator.on_refused
        callbacks.on_dropped = creator.on_dropped
        Py_INCREF(callbacks)
        hook.callbacks = <PyObject*>callbacks
        if creator.on_made is not None:
            call_with_handle(creator.on_made, m, (memory_size(m),))
    except BaseException as error:
        return fail_python(why, error)
    hook.told = True
    hook.calls_on_grow = creator.on_grow is not None
    return 0
