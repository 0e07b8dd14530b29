# SharedCreator, the creator of memories that processes share; a part of memory.pyx.

cdef object _handles = None


cdef object handles():
    """The module is imported at its first use, because an import takes time."""
    global _handles
    if _handles is None:
        if pages.capabilities().names_files:
            from linmem._core import section_handles as found
        else:
            from linmem._core import shared_handles as found
        _handles = found
    return _handles


cdef int open_shared(object what, pages.file_pages* file) except -1:
    """Open the file of the memory that a handle, a name or a descriptor stands for."""
    cdef failure why
    cdef long long opened = handles().open_shared(what)
    cdef int code = fail_page_call(&why, pages.file_take(opened, file), "file_take", HEAD_BYTES)
    if code:
        file.kind = 0
        handles().close(opened)
        if code == pages.FILE_FOREIGN:
            raise ValueError("attach must be a shared memory of linmem, and the name is that of something else")
        raise_failure(&why)
    return 0


@cython.final
cdef class SharedCreator(NativeCreator):
    """SharedCreator(*, shm_name=None, attach=None, name=None)\n--\n
    Makes memories that processes share and that grow: each process sees a growth at its next call.

    ``mem.handle()`` is what another process attaches, with `linmem.attach` or with ``attach=`` here. Without a name, a
    memory exists while some process has it, and leaves nothing behind, however the processes end. On Linux and
    Windows.

    Parameters
    ----------
    shm_name : str, optional
        A name of the OS, as of shm_open(3): the file ``/dev/shm/NAME``, mode 0600. The memory then exists until
        `Memory.unlink`, also if no process has it. On Windows: a section object of this name, which exists while a
        process has it. The creator makes one memory of this name; the next is
        `FileExistsError`.
    attach : optional
        A handle, the name of a memory, or a descriptor. Each memory that the creator makes shows the bytes of that
        memory. The creator itself keeps the bytes. A memory that wasmtime asks for takes over a new size in its own
        ``memory.grow``.
    name : str, optional
        Stands in the text of refusals, and in `MemoryInfo`.
    """

    def __cinit__(self, *args, **kwargs):
        shm_name, attach, _ = _given("SharedCreator", ("shm_name", "attach", "name"),
                                     {"shm_name": None, "attach": None, "name": None}, args, kwargs, 0)
        if shm_name is not None and attach is not None:
            raise ValueError("shm_name and attach cannot both be given: shm_name makes a new memory")
        if shm_name is not None:
            self.shm_name = handles().check_shm_name(shm_name, "shm_name")
            if pages.capabilities().names_files:
                self.name_bytes = handles().file_name(self.shm_name)
                self.file_name = self.name_bytes
        if attach is None:
            random = handles().new_token()
            memcpy(self.token, <const char*>random, 16)
            return
        open_shared(attach, &self.file)

    def __dealloc__(self):
        if self.file.kind:      # 0: __cinit__ of the base class or of this one has raised, or there is no `attach`
            pages.file_drop(&self.file)

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        cdef shared_source source
        cdef char[TOKEN_BYTES] token
        cdef char[TOKEN_NAME_BYTES] token_name
        cdef bint named = self.shm_name is not None
        cdef bint links = named and not pages.capabilities().names_files
        cdef int code = refuse_to_share(why)
        memset(&source, 0, sizeof(source))
        source.attaches = self.file.kind != 0
        if code == 0 and source.attaches:
            code = fail_page_call(why, pages.file_copy(&self.file, &source.file), "file_copy", HEAD_BYTES)
        elif code == 0 and links and python_is_ending():
            code = fail(why, E_UNSUPPORTED, "new_memory while the interpreter shuts down", spec.minimum)
        elif code == 0 and links:
            code = open_named(&source.file, why)
        if code == 0:
            if not source.attaches:
                self.fill_token(token)
                source.token = token
                source.name = token_name
                if pages.capabilities().names_files:
                    write_token_name(token, token_name)
            if named:
                source.name = self.file_name
            code = make_shared(spec, &source, out, why)
        if code == 0 and links:
            code = link_named(self.shm_name, <int>source.file.handle, why)
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


def _attach(handle_or_name):
    """linmem.attach()"""
    cdef memory_spec spec
    cdef shared_source source
    cdef memory* m = NULL
    cdef Memory made
    cdef failure why
    cdef int code
    fill_usual(&spec)
    memset(&source, 0, sizeof(source))
    source.attaches = True
    if not attach_where_made(handle_or_name, &spec, &source, &m):
        open_shared(handle_or_name, &source.file)
        source.length, source.token = 0, NULL
        with nogil:
            code = refuse_to_share(&why) or make_shared(&spec, &source, &m, &why)
        if code:
            raise_failure(&why)
    made = <Memory>wrap(m)
    made.is_new = 1
    return made


cdef int make_shared(const memory_spec* spec, shared_source* source, memory** out, failure* why) noexcept nogil:
    """shared_make(), which owns the open file also if it fails."""
    cdef int code = shared_make(spec, source, out, why)
    if code and source.file.kind:
        pages.file_drop(&source.file)
    return code


cdef bint attach_where_made(object handle, const memory_spec* spec, shared_source* source, memory** out) except -1:
    """Attach the memory by the descriptor of the process that made the handle. False: that process or its descriptor is
    gone, or the caller has no right to it, or `handle` is something else; SharedHandle.open() then looks further."""
    cdef pages.file_pages* file = &source.file
    cdef unsigned long long pid, descriptor
    cdef failure why
    cdef int code = pages.FILE_FOREIGN
    if type(handle) is not handles().SharedHandle:
        return False
    pid, descriptor, file.device, file.inode = handle._pid, handle._fd, handle._device, handle._inode
    token = handle._token
    if type(token) is not bytes or len(token) != TOKEN_BYTES:
        return False
    source.token = token
    with nogil:
        if pages.capabilities().shares and pages.file_reach(pid, descriptor, file, &source.length) == 0:
            code = make_shared(spec, source, out, &why)
    if code and code != pages.FILE_FOREIGN:
        raise_failure(&why)
    return code == 0


cdef void write_token_name(const char* token, char* name) noexcept nogil:
    """Writes the name of the file of a memory without a shm_name: the random token, so that no process can guess it."""
    cdef size_t i
    for i in range(TOKEN_BYTES):
        snprintf(name + 2 * i, 3, "%02x", <unsigned int>(<unsigned char>token[i]))


cdef int open_named(pages.file_pages* file, failure* why) noexcept with gil:
    """A file without a name in the directory of names. link_named() gives it the name when its content is complete."""
    cdef int fd, code
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
    try:
        return handles().handle_of(fd, <bytes>s.token[:TOKEN_BYTES])
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

cdef shared_memory* enter_word(Memory mem, object offset, str call, size_t* start) except NULL:
    """*start: the offset of a word of 32 bits. leave() must follow."""
    cdef shared_memory* s
    cdef failure why
    check_bounded(offset, "offset", _WITHIN, start)
    if start[0] & 3:
        raise ValueError(f"offset must be a multiple of 4, got {start[0]}")
    s = enter_shared(mem, call)
    if not is_within(&s.head, start[0], 4):
        mem.finish(fail_range(&s.head, start[0], 4, &why), &why)
    return s


cdef int load_word(memory* m, size_t start, int* word, const char* call, failure* why) noexcept nogil:
    """A code: this process made the page inaccessible (protect)."""
    cdef bint guarded = True
    cdef int code = 0
    if try_access(m):
        guarded = is_guarded(m)
        if not guarded:
            word[0] = (<volatile int*>(m.base + start))[0]
        end_access(m)
    if guarded:
        code = lock_memory(m, why)
        if code == 0:
            code = refuse_access(m, start, 4, READABLE, call, why)
            if code == 0:
                word[0] = (<volatile int*>(m.base + start))[0]
            unlock(&m.lock)
    return code


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
    cdef shared_memory* s
    cdef size_t start
    cdef int expected, word = 0, code = 0
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
    s = enter_word(<Memory>mem, offset, "wait()", &start)
    with nogil:
        while code == 0:
            code = load_word(&s.head, start, &word, "wait", &why)
            differs = word != expected
            if deadline >= 0:
                left = min(<long long>SIGNALS_EACH, deadline - pages.clock_ns())
            if code or differs or left <= 0:
                break
            code = fail_page_call(&why, pages.wait_while_equal(<int*>(s.head.base + start), expected, left), "wait", 4)
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
        How many threads were woken; on Windows, which does not say it, 0.
    """
    cdef size_t start, most = 0x7fffffff
    cdef int woken = 0, word = 0, code
    cdef shared_memory* s
    cdef failure why
    check_type(mem, Memory, "mem")
    if n is not None:
        check_count(n, "n", &most)
    s = enter_word(<Memory>mem, offset, "wake()", &start)
    if most == 0:
        (<Memory>mem).leave()
        return 0
    with nogil:
        code = load_word(&s.head, start, &word, "wake", &why)       # the kernel looks the page up
        if code == 0:
            code = fail_page_call(&why, pages.wake_waiters(<int*>(s.head.base + start),
                                                           <int>min(most, <size_t>0x7fffffff), &woken), "wake", 4)
    (<Memory>mem).finish(code, &why)
    return woken
