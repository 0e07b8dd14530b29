# SharedCreator, the creator of memories that processes share; a part of memory.pyx.

cdef object handles():
    """The module is imported at its first use, because an import takes time."""
    from linmem._core import shared_handles

    return shared_handles


@cython.final
cdef class SharedCreator(NativeCreator):
    """SharedCreator(*, shm_name=None, attach=None, name=None)\n--\n
    Makes memories that processes share and that grow: each process sees a growth at its next call.

    ``mem.handle()`` is what another process attaches, with `linmem.attach` or with ``attach=`` here. Without a name, a
    memory exists while some process has it, and leaves nothing behind, however the processes end. Linux only.

    Parameters
    ----------
    shm_name : str, optional
        A name of the OS, as of shm_open(3): the file ``/dev/shm/NAME``, mode 0600. The memory then exists until
        `Memory.unlink`, also if no process has it. The creator makes one memory of this name; the next is
        `FileExistsError`.
    attach : optional
        A handle, the name of a memory, or a descriptor. Each memory that the creator makes shows the bytes of that
        memory. The creator itself keeps the bytes. A memory that wasmtime asks for takes over a new size in its own
        ``memory.grow``.
    name : str, optional
        Stands in the text of refusals, and in `MemoryInfo`.
    """

    def __cinit__(self, *args, **kwargs):
        cdef int fd, code
        cdef failure why
        shm_name, attach, _ = _given("SharedCreator", ("shm_name", "attach", "name"),
                                     {"shm_name": None, "attach": None, "name": None}, args, kwargs, 0)
        if shm_name is not None and attach is not None:
            raise ValueError("shm_name and attach cannot both be given: shm_name makes a new memory")
        if shm_name is not None:
            self.shm_name = handles().check_shm_name(shm_name, "shm_name")
        if attach is None:
            random = handles().new_token()
            memcpy(self.token, <const char*>random, 16)
            return
        fd = handles().open_shared(attach)
        code = fail_page_call(&why, pages.file_take(fd, &self.file), "file_take", HEAD_BYTES)
        if code:
            self.file.kind = 0
            handles().close(fd)
            raise_failure(&why)

    def __dealloc__(self):
        if self.file.kind:      # 0: __cinit__ of the base class or of this one has raised, or there is no `attach`
            pages.file_drop(&self.file)

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef pages.file_pages file
        cdef char[TOKEN_BYTES] token
        cdef char* new_token = token
        cdef bint attaches = self.file.kind != 0, named = self.shm_name is not None
        cdef int code = 0
        if not pages.capabilities().shares:
            fail(why, E_UNSUPPORTED, "a shared memory", spec.minimum)
            explain(why, "on this system")
            code = why.code
        elif attaches:
            code = fail_page_call(why, pages.file_copy(&self.file, &file), "file_copy", HEAD_BYTES)
        elif named:
            code = open_named(&file, why)
        else:
            code = fail_page_call(why, pages.file_begin(HEAD_BYTES, &file), "file_begin", HEAD_BYTES)
        if code == 0:
            if not attaches:
                self.fill_token(token)
            code = shared_make(spec, &file, NULL if attaches else new_token, out, why)
            if code:
                pages.file_drop(&file)
        if code == 0 and named:
            code = link_named(self.shm_name, <int>file.handle, why)
            if code:
                memory_release(out[0])
                out[0] = NULL
        return finish_make(self, spec, code, out, why)

    cdef void fill_token(self, char* token) noexcept nogil:
        """Different for each memory of all processes of the machine."""
        cdef long long made = add(&self.made, 1), now = pages.utc_ns()
        memcpy(token, self.token, 16)
        memcpy(token + 16, &made, 8)
        memcpy(token + 24, &now, 8)

    def __repr__(self):
        options = [f"shm_name={self.shm_name!r}"] if self.shm_name is not None else []
        if self.file.kind:
            options.append("attach=...")
        if self.name is not None:
            options.append(f"name={self.name!r}")
        return f"SharedCreator({', '.join(options)})"


cdef int open_named(pages.file_pages* file, failure* why) noexcept with gil:
    """A file without a name in the directory of names. link_named() gives it the name when its content is complete."""
    cdef int fd, code
    if python_is_ending():
        return fail(why, E_UNSUPPORTED, "new_memory while the interpreter shuts down", 0)
    try:
        opened = handles().open_nameless(HEAD_BYTES)
        try:
            fd = opened
            code = fail_page_call(why, pages.file_adopt(fd, False, file), "file_adopt", HEAD_BYTES)
        finally:
            handles().close(opened)
        return code
    except BaseException as error:
        return fail_python(why, error)


cdef int link_named(object shm_name, int descriptor, failure* why) noexcept with gil:
    try:
        handles().link(descriptor, shm_name)
        return 0
    except BaseException as error:
        return fail_python(why, error)


# -- the methods of Memory that only shared memories have

cdef shared_memory* enter_shared(Memory mem, str call) except NULL:
    """enter(), and refuse a memory of another kind. leave() must follow, and no line between may raise."""
    cdef memory* m = mem.enter()
    if m.ops != &shared_ops:
        kind = m.ops.kind.decode()
        mem.leave()
        raise TypeError(f"{call} needs a shared memory, and this one is of kind {kind!r}: linmem.creator('shared')"
                        " makes shared ones")
    return <shared_memory*>m


cdef object shared_handle(Memory mem):
    cdef shared_memory* s = enter_shared(mem, "handle()")
    cdef long long fd = s.file.handle
    token = None
    try:
        token = <bytes>s.words.token[:TOKEN_BYTES]
        return handles().handle_of(fd, token)
    finally:
        mem.leave()


cdef object shared_unlink(Memory mem):
    cdef shared_memory* s = enter_shared(mem, "unlink()")
    try:
        handles().unlink(s.file.handle)
    finally:
        mem.leave()


cdef bint wait_for_growth(Memory mem, object size, object timeout) except -1:
    cdef size_t n
    cdef long long deadline = -1
    cdef bint reached = False
    cdef failure why
    cdef int code = 0
    cdef shared_memory* s
    check_bounded(size, "size", "within maximum_byte_size()", &n)
    if timeout is not None:
        deadline = pages.clock_ns() + <long long>handles().check_timeout(timeout)
    s = enter_shared(mem, "wait_for_growth()")
    if n > s.head.maximum:
        code = fail_text(&why, E_VALUE, "size must be <= maximum_byte_size() (%zu), got %zu", s.head.maximum, n)
    if code == 0:
        with nogil:
            code = shared_wait(s, n, deadline, &reached, &why)
    mem.finish(code, &why)
    return reached


# -- words on which processes wait

cdef int* enter_word(Memory mem, object offset, str call) except NULL:
    """The address of a word of 32 bits. leave() must follow."""
    cdef size_t start
    cdef shared_memory* s
    cdef failure why
    check_bounded(offset, "offset", _WITHIN, &start)
    if start & 3:
        raise ValueError(f"offset must be a multiple of 4, got {start}")
    s = enter_shared(mem, call)
    if not is_within(&s.head, start, 4):
        mem.finish(fail_range(&s.head, start, 4, &why), &why)
    return <int*>(s.head.base + start)


def wait(mem, offset, value, timeout=None):
    """Wait while a word of a shared memory has a value; futex(2). `wake` ends the waits of other processes.

    Parameters
    ----------
    mem : Memory
        A shared memory.
    offset : int
        In bytes, a multiple of 4. The word has 32 bits, the byte order of the machine, and a sign.
    value : int
        The wait ends when the word has another value, after the next `wake` or some milliseconds later.
    timeout : float, optional
        In seconds; None: no limit.

    Returns
    -------
    bool
        False: the time is over, and the word still has the value.
    """
    cdef int* word
    cdef int expected, code = 0
    cdef long long deadline = -1, left = SIGNALS_EACH
    cdef bint differs = False
    cdef failure why
    check_type(mem, Memory, "mem")
    number = _check_count(value, "value", least=-1 << 31)
    if number >= 1 << 31:
        raise ValueError(f"value must be in -2**31 .. 2**31 - 1, got {_shown(number)}")
    expected = number
    if timeout is not None:
        deadline = pages.clock_ns() + <long long>handles().check_timeout(timeout)
    word = enter_word(<Memory>mem, offset, "wait()")
    with nogil:
        while code == 0:
            differs = (<volatile int*>word)[0] != expected
            if deadline >= 0:
                left = min(<long long>SIGNALS_EACH, deadline - pages.clock_ns())
            if differs or left <= 0:
                break
            code = fail_page_call(&why, pages.wait_while_equal(word, expected, left), "wait", 4)
            if code == 0:
                code = interrupted(&why)
    (<Memory>mem).finish(code, &why)
    return differs


def wake(mem, offset, n=None):
    """Wake threads, of all processes, that are in `wait` for a word; futex(2).

    Parameters
    ----------
    mem : Memory
        A shared memory.
    offset : int
        As for `wait`.
    n : int, optional
        The most threads to wake; None: all.

    Returns
    -------
    int
        How many threads were woken.
    """
    cdef size_t most = 0x7fffffff
    cdef int woken = 0, code
    cdef int* word
    cdef failure why
    check_type(mem, Memory, "mem")
    if n is not None:
        check_count(n, "n", &most)
    word = enter_word(<Memory>mem, offset, "wake()")
    if most == 0:
        (<Memory>mem).leave()
        return 0
    code = fail_page_call(&why, pages.wake_waiters(word, <int>min(most, <size_t>0x7fffffff), &woken), "wake", 4)
    (<Memory>mem).finish(code, &why)
    return woken
