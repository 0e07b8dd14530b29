# cython: language_level=3
"""Native memories: the mapped kind, its creator, and the Python handle on every kind."""

cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_SIMPLE, PyBUF_STRIDES, \
    PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_Clear, PyErr_Occurred
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport SIZE_MAX
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memmove, memset

from linmem._atomic cimport add, add_with_gil, load, publish, store, swap_if, word
from linmem._os cimport pages
from linmem._units cimport (
    E_CAPACITY, E_EXPORTED, E_LIMIT, E_MAXIMUM, E_NO_MEMORY, E_OVERFLOW, E_PYTHON, E_SHRINK, E_UNSUPPORTED,
    first_reservation, lay_out, layout, next_reservation, round_down, round_up,
)

import os as _os

from linmem import abc as _abc
from linmem import errors as _errors
from linmem._formats import resolve as _resolve_format
from linmem._os import pages as _pages

cdef size_t UNCHOSEN = SIZE_MAX
cdef size_t NO_MAXIMUM = SIZE_MAX
cdef size_t WASM32_SPACE = <size_t>1 << 32
cdef long long CLOSED = -(<long long>1 << 62)       # of Memory.users: far below what threads can add to it
cdef size_t RELEASE_GIL_FROM = 1 << 16              # bytes; a shorter copy costs less than letting go

DEFAULT_GUARD = 65536


# -- failures: one way down to a code, one way up to a text and an exception ------------------

cdef int fail(failure* why, int code, const char* call, size_t size, size_t used=0, size_t limit=0) noexcept nogil:
    why.code = code
    why.call = call
    why.size = size
    why.used = used
    why.limit = limit
    why.detail[0] = 0
    why.exception = NULL
    return code


cdef int fail_page_call(failure* why, int code, const char* call, size_t size) noexcept nogil:
    fail(why, code, call, size)
    pages.limit_text(code, size, why.detail, sizeof(why.detail))
    return code


cdef const char* reason(int code) noexcept nogil:
    if code > 0:
        return "os"
    if code == E_NO_MEMORY:
        return "NO_MEMORY"
    if code == E_OVERFLOW:
        return "OVERFLOW"
    if code == E_SHRINK:
        return "SHRINK"
    if code == E_MAXIMUM:
        return "MAXIMUM"
    if code == E_CAPACITY:
        return "CAPACITY"
    if code == E_EXPORTED:
        return "EXPORTED"
    if code == E_LIMIT:
        return "LIMIT"
    return "UNSUPPORTED"


cdef void failure_text(const failure* why, char* text, size_t room) noexcept nogil:
    cdef int code = why.code
    cdef const char* between = "; " if why.detail[0] else ""
    if code > 0:
        snprintf(text, room, "%s of %zu bytes failed with code %d: %s%s%s", why.call, why.size, code,
                 pages.code_text(code), between, why.detail)
    elif code == E_NO_MEMORY:
        snprintf(text, room, "no memory for the bookkeeping of a memory (%zu bytes)", why.size)
    elif code == E_OVERFLOW:
        snprintf(text, room, "%s must fit an address, in whole host pages and with its guards (together below"
                             " 2**63 bytes), got %zu", why.call, why.size)
    elif code == E_SHRINK:
        snprintf(text, room, "new_size must be >= byte_size() (%zu), got %zu: a memory never shrinks",
                 why.limit, why.size)
    elif code == E_MAXIMUM:
        snprintf(text, room, "new_size must be <= maximum_byte_size() (%zu), got %zu", why.limit, why.size)
    elif code == E_CAPACITY:
        snprintf(text, room, "new_size must be <= byte_capacity() (%zu), got %zu, because the memory cannot move%s%s",
                 why.limit, why.size, between, why.detail)
    elif code == E_EXPORTED:
        snprintf(text, room, "growing to %zu bytes would move the memory (its capacity is %zu), and %zu exported"
                             " buffer(s) point into it", why.size, why.limit, why.used)
    elif code == E_LIMIT:
        snprintf(text, room, "limit of %zu bytes reached: %zu in use and %zu more asked for",
                 why.limit, why.used, why.size)
    else:
        snprintf(text, room, "%s is not supported by this kind of memory%s%s", why.call, between, why.detail)


cdef int raise_failure(const failure* why) except -1:
    cdef char text[512]
    cdef object error
    if why.code == E_PYTHON:
        error = <object>why.exception
        Py_DECREF(error)
        raise error
    failure_text(why, text, sizeof(text))
    message = text.decode("utf-8", "replace")
    raise _errors.from_failure(
        reason(why.code).decode(), message, os_error_args=_pages.os_error_args(why.code, message),
        call=why.call.decode(), size=why.size, used=why.used, limit=why.limit)


cdef extern from *:
    bint PyLong_CheckExact(object value) noexcept
    # An error is looked for by the caller: only this value can mean one.
    unsigned long long as_unsigned "PyLong_AsUnsignedLongLong"(object value) noexcept
    unsigned long long ULLONG_MAX


cdef int check_size(object value, str name, size_t* out) except -1:
    cdef unsigned long long n
    if PyLong_CheckExact(value):
        n = as_unsigned(value)
        if n != ULLONG_MAX or not PyErr_Occurred():
            out[0] = <size_t>n
            return 0
        PyErr_Clear()
    return check_size_at_length(value, name, out)


cdef int check_size_at_length(object value, str name, size_t* out) except -1:
    """What is no exact int, or no size: converted, or the exception that says why not."""
    cdef unsigned long long n
    try:
        number = value.__index__() if not isinstance(value, int) else value
    except (AttributeError, TypeError):
        raise TypeError(f"{name} must be an integer number of bytes, got {type(value).__name__}") from None
    try:
        n = number
    except OverflowError:
        # Hexadecimal has no limit on its digits, as decimal has.
        text = number if abs(number) < 1 << 256 else hex(number)[:20] + "..."
        if number < 0:
            raise ValueError(f"{name} must be >= 0, got {text}") from None
        raise OverflowError(f"{name} must be below 2**64, got {text}") from None
    out[0] = <size_t>n
    return 0


cdef int fail_python(failure* why, object error) noexcept:
    fail(why, E_PYTHON, "python", 0)
    Py_INCREF(error)
    why.exception = <PyObject*>error
    return E_PYTHON


# -- Python objects that nogil code lets go of --------------------------------------------------

cdef extern from *:
    """
    #if PY_VERSION_HEX >= 0x030d0000
    #define linmem_is_finalizing() Py_IsFinalizing()
    #else
    #define linmem_is_finalizing() _Py_IsFinalizing()
    #endif
    """
    bint is_finalizing "linmem_is_finalizing"() noexcept nogil
    int Py_AddPendingCall(int (*call)(void*), void* argument) noexcept nogil
    void* PyGILState_GetThisThreadState() noexcept nogil

cdef bint python_is_ending() noexcept nogil:
    return is_finalizing()


cdef struct grave:
    grave* next
    PyObject* object

cdef grave* graves = NULL
cdef word graves_lock


cdef void drop_object(PyObject* object) noexcept nogil:
    """Py_DECREF from any thread, at any time.

    A thread that Python knows is about to take the GIL again anyway. Another one (wasmtime's own)
    must not: it leaves the object to the main thread. In the interpreter's last second nothing is
    dropped: the process ends, and whoever waits for the GIL then waits forever.
    """
    global graves
    cdef grave* g
    if is_finalizing():
        return
    if PyGILState_GetThisThreadState() != NULL:
        drop_with_gil(object)
        return
    g = <grave*>malloc(sizeof(grave))
    if g == NULL:
        return
    g.object = object
    acquire(&graves_lock)
    g.next = graves
    graves = g
    unlock(&graves_lock)
    Py_AddPendingCall(bury, NULL)       # a full queue: the next drop's call buries this one too


cdef void drop_with_gil(PyObject* object) noexcept with gil:
    Py_DECREF(<object>object)


cdef int bury(void* unused) noexcept:
    global graves
    cdef grave* g
    cdef grave* next
    acquire(&graves_lock)
    g = graves
    graves = NULL
    unlock(&graves_lock)
    while g != NULL:
        next = g.next
        Py_DECREF(<object>g.object)
        free(g)
        g = next
    return 0


# -- every memory, whatever its kind -----------------------------------------------------------

# A lock holds the generation of the process that took it. In a forked child the threads of the
# parent are gone, so a lock that one of them held is nobody's: the child takes it over.
cdef long long generation = 1


cdef void acquire(word* lock) noexcept nogil:
    # Held for a page call or two, and for a Python creator's grow_to: never wait here with the GIL.
    cdef long long holder
    while not swap_if(lock, 0, generation):
        holder = load(lock)
        if holder != 0 and holder != generation and swap_if(lock, holder, generation):
            return
        pages.relax()


cdef void unlock(word* lock) noexcept nogil:
    publish(lock, 0)


# A child must not inherit a memory that is half way to another address: fork waits for movers.
cdef word moving_lock


def _before_fork():
    with nogil:
        acquire(&moving_lock)


def _after_fork_in_parent():
    unlock(&moving_lock)


def _after_fork_in_child():
    global generation
    generation += 1
    unlock(&moving_lock)


if hasattr(_os, "register_at_fork"):
    _os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent,
                         after_in_child=_after_fork_in_child)


cdef int memory_grow_to(memory* m, size_t new_size, failure* why) noexcept nogil:
    return grow_locked(m, new_size, why)


# The path of a growth is one function for the C compiler (hence the inlines, and the mapped kind by
# name): after a system call the processor has forgotten where calls return to, and every frame on
# the way back costs as much as all that is checked in it.
cdef inline int grow_locked(memory* m, size_t new_size, failure* why) noexcept nogil:
    cdef int code = 0
    cdef size_t size
    if not swap_if(&m.lock, 0, generation):
        acquire(&m.lock)
    size = memory_size(m)
    if new_size < size or new_size > m.maximum:
        code = refuse_size(m, size, new_size, why)
    elif new_size > size:
        if m.hooks != NULL:
            code = grow_with_hooks(m, size, new_size, why)
        elif m.ops == &mapped_ops:
            code = mapped_grow_by(m, size, new_size, why)
        else:
            code = m.ops.grow(m, new_size, why)
    unlock(&m.lock)
    return code


cdef int refuse_size(memory* m, size_t size, size_t new_size, failure* why) noexcept nogil:
    if new_size < size:
        return fail(why, E_SHRINK, "grow_to", new_size, 0, size)
    return fail(why, E_MAXIMUM, "grow_to", new_size, 0, m.maximum)


cdef int grow_with_hooks(memory* m, size_t size, size_t new_size, failure* why) noexcept nogil:
    cdef memory_hook* hook = m.hooks
    cdef memory_hook* end
    cdef int code = 0
    while hook != NULL:
        code = hook.before_grow(hook, m, new_size, why)
        if code:
            break
        hook = hook.next
    end = hook
    if code == 0:
        code = m.ops.grow(m, new_size, why)
    hook = m.hooks
    while hook != end:
        hook.after_grow(hook, m, size, new_size, code)
        hook = hook.next
    return code


cdef void memory_hang(memory* m, memory_hook* hook) noexcept nogil:
    acquire(&m.lock)
    hook.next = m.hooks
    m.hooks = hook
    unlock(&m.lock)


cdef void memory_retain(memory* m) noexcept nogil:
    add(&m.refs, 1)


cdef void memory_release(memory* m) noexcept nogil:
    cdef memory_hook* hooks
    cdef memory_hook* hook
    if add(&m.refs, -1):
        return
    hook = hooks = m.hooks
    while hook != NULL:
        if hook.before_drop != NULL:
            hook.before_drop(hook, m)
        hook = hook.next
    m.ops.free(m)
    while hooks != NULL:
        hook = hooks
        hooks = hook.next
        hook.dropped(hook)


cdef int memory_resident(memory* m, size_t* bytes, failure* why) noexcept nogil:
    if m.ops.resident == NULL:
        return fail(why, E_UNSUPPORTED, "resident", 0)
    return m.ops.resident(m, bytes, why)


cdef long long pins_now(memory* m) noexcept nogil:
    """How many point into the memory; negative: it is moving. A mover of the parent moves nothing in
    a forked child, as with the locks."""
    cdef long long pins = load(&m.pins)
    if pins < 0 and pins != -generation:
        swap_if(&m.pins, pins, 0)
        pins = load(&m.pins)
    return pins


cdef void pin(memory* m) noexcept:
    """The base stays where it is until unpin(). With the GIL held, but for the wait: a Python memory
    needs it to move."""
    cdef long long pins
    while True:
        pins = pins_now(m)
        if pins < 0:
            with nogil:
                pages.relax()
        elif swap_if(&m.pins, pins, pins + 1):
            return


cdef inline void unpin(memory* m) noexcept nogil:
    add(&m.pins, -1)


cdef int begin_move(memory* m, size_t new_size, failure* why) noexcept nogil:
    """The base may change until end_move(): nobody points into the memory, and nobody begins to."""
    cdef long long pins
    if m.is_shared or m.protected_pages:
        fail(why, E_CAPACITY, "grow_to", new_size, 0, m.capacity)
        snprintf(why.detail, sizeof(why.detail),
                 "shared memories never do" if m.is_shared else "some of its pages have their own protection")
        return E_CAPACITY
    pins = pins_now(m)
    if pins or not swap_if(&m.pins, 0, -generation):
        return fail(why, E_EXPORTED, "grow_to", new_size, <size_t>(pins if pins > 0 else 1), m.capacity)
    return 0


cdef void end_move(memory* m) noexcept nogil:
    store(&m.pins, 0)


# -- the mapped kind ---------------------------------------------------------------------------

cdef struct orphan:
    orphan* next
    char* at
    size_t size

cdef orphan* orphans = NULL     # ranges that the OS refused to take back, tried again at the next release
cdef word orphans_lock


cdef void give_back(char* at, size_t size) noexcept nogil:
    """Release, or remember. munmap can fail where it has to split a mapping at vm.max_map_count."""
    global orphans
    cdef orphan* o
    cdef orphan* retry
    if size == 0:
        return
    if pages.release(at, size):
        o = <orphan*>malloc(sizeof(orphan))
        if o == NULL:
            return              # no bytes for a note: this address range stays taken
        o.at = at
        o.size = size
        acquire(&orphans_lock)
        o.next = orphans
        orphans = o
        unlock(&orphans_lock)
        return
    if orphans == NULL:
        return
    acquire(&orphans_lock)
    retry = orphans
    if retry != NULL:
        orphans = retry.next
    unlock(&orphans_lock)
    if retry != NULL:
        at, size = retry.at, retry.size
        free(retry)
        give_back(at, size)


cdef int mapped_grow(memory* m, size_t new_size, failure* why) noexcept nogil:
    return mapped_grow_by(m, memory_size(m), new_size, why)


cdef inline int mapped_grow_by(memory* m, size_t size, size_t new_size, failure* why) noexcept nogil:
    cdef size_t page = pages.capabilities().page_size
    cdef size_t need
    cdef int code
    if round_up(new_size, page, &need):
        return fail(why, E_OVERFLOW, "new_size", new_size)
    if need > m.capacity:
        code = grow_by_moving(m, new_size, need, why)
        if code:
            return code
    elif need > m.accessible:
        code = pages.commit(m.base + m.accessible, need - m.accessible)
        if code:
            return fail_page_call(why, code, "commit", need - m.accessible)
    if size & (page - 1):
        # Fresh bytes read as zero, also those that native code could already reach.
        memset(m.base + size, 0, round_down(size, page) + page - size)
    m.accessible = need
    publish(&m.size, <long long>new_size)
    return 0


cdef int grow_by_moving(memory* m, size_t new_size, size_t need, failure* why) noexcept nogil:
    """Past the capacity, where nobody can notice. All that can fail comes before anything is lost."""
    cdef int code
    acquire(&moving_lock)
    code = begin_move(m, new_size, why)
    if code == 0:
        code = move_to_larger(m, need, why)
        end_move(m)
    unlock(&moving_lock)
    return code


cdef int move_to_larger(memory* m, size_t need, failure* why) noexcept nogil:
    cdef layout to
    cdef char* region
    cdef char* base
    cdef char* old = m.base - m.pre_guard
    cdef size_t old_total = m.pre_guard + m.capacity + m.guard
    cdef int code = reserve_in_steps(need, m.maximum, m.guard, &to, &region, why)
    if code == E_OVERFLOW:
        why.call = "new_size"
    if code:
        return code
    base = region + to.pre_guard
    # What looks like one mapping may be several (a fork, or someone's madvise, splits them): then
    # it does not move, but it can be copied.
    if (pages.capabilities().moves and m.accessible and not m.moved
            and pages.move(m.base, m.accessible, base, need) == 0):
        give_back(old, m.pre_guard)
        give_back(m.base + m.accessible, old_total - m.pre_guard - m.accessible)
        m.moved = True
    else:
        code = pages.commit(base, need)
        if code:
            give_back(region, to.total)
            return fail_page_call(why, code, "commit", need)
        memcpy(base, m.base, m.accessible)
        give_back(old, old_total)
        m.moved = False
    m.base = base
    m.pre_guard = to.pre_guard
    m.capacity = to.capacity
    m.guard = to.guard
    m.covered = to.capacity + to.guard
    return 0


cdef int reserve_in_steps(size_t minimum, size_t bound, size_t guard, layout* out, char** region,
                          failure* why) noexcept nogil:
    """The reservation that linmem chooses: as much as is sensible, then less until the OS agrees."""
    cdef size_t space, left, want
    cdef int code
    pages.address_space(&space, &left)
    want = first_reservation(minimum, bound, bound != NO_MAXIMUM, space, left)
    while True:
        code = reserve_exactly(minimum, want, guard, out, region, why)
        if code == 0 or want == minimum:
            return code
        want = next_reservation(want, minimum)


cdef int reserve_exactly(size_t minimum, size_t reservation, size_t guard, layout* out, char** region,
                         failure* why) noexcept nogil:
    cdef int code
    if lay_out(minimum, reservation, guard, pages.capabilities().page_size, out):
        if guard > minimum and guard > reservation:
            return fail(why, E_OVERFLOW, "guard", guard)
        return fail(why, E_OVERFLOW, "minimum" if minimum >= reservation else "reserve",
                    minimum if minimum > reservation else reservation)
    code = pages.reserve(out.total, region)
    return fail_page_call(why, code, "reserve", out.total) if code else 0


cdef int mapped_resident(memory* m, size_t* bytes, failure* why) noexcept nogil:
    cdef int code
    bytes[0] = 0
    if m.accessible == 0:
        return 0
    code = pages.resident(m.base, m.accessible, bytes)
    return fail_page_call(why, code, "resident", m.accessible) if code else 0


cdef void mapped_free(memory* m) noexcept nogil:
    give_back(m.base - m.pre_guard, m.pre_guard + m.capacity + m.guard)
    free(m)


cdef memory_ops mapped_ops
mapped_ops.kind = "mmap"
mapped_ops.grow = mapped_grow
mapped_ops.resident = mapped_resident
mapped_ops.free = mapped_free
mapped_ops.pages_are_ours = True


cdef int mapped_make(const memory_spec* spec, memory** out, failure* why) noexcept nogil:
    cdef layout at
    cdef char* region
    cdef int code
    cdef size_t bound = spec.maximum
    cdef memory* m = <memory*>calloc(1, sizeof(memory))
    if m == NULL:
        return fail(why, E_NO_MEMORY, "calloc", sizeof(memory))
    if spec.reservation == UNCHOSEN:
        if bound == NO_MAXIMUM and not spec.is_64:
            bound = WASM32_SPACE
        code = reserve_in_steps(spec.minimum, bound, spec.guard, &at, &region, why)
    else:
        code = reserve_exactly(spec.minimum, spec.reservation, spec.guard, &at, &region, why)
    if code:
        free(m)
        return code
    m.base = region + at.pre_guard
    if at.accessible:
        code = pages.commit(m.base, at.accessible)
        if code:
            fail_page_call(why, code, "commit", at.accessible)
            give_back(region, at.total)
            free(m)
            return code
    m.ops = &mapped_ops
    m.refs = 1
    m.size = <long long>spec.minimum
    m.accessible = at.accessible
    m.capacity = at.capacity
    m.maximum = spec.maximum
    m.pre_guard = at.pre_guard
    m.guard = at.guard
    m.covered = at.capacity + at.guard
    m.is_shared = spec.is_shared
    out[0] = m
    return 0


# -- creators ------------------------------------------------------------------------------------

cdef class NativeCreator:
    """Base of the creators that wasmtime can call with no GIL; extended in Cython, by `make`.

    A creator in Python implements `linmem.MemoryCreator` instead.
    """

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        return fail(why, E_UNSUPPORTED, "new_memory", spec.minimum)

    def new_memory(self, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes):
        """Make a memory, as wasmtime asks for one; mirrors ``wasmtime::MemoryCreator::new_memory``.

        Parameters
        ----------
        ty : MemoryType
            The wasm type. A shared memory never moves.
        minimum, maximum : int
            In bytes; no maximum is None. Not necessarily a multiple of any page.
        reserved_size_in_bytes : int or None
            Growth up to here never moves the base. None: the creator chooses.
        guard_size_in_bytes : int
            Inaccessible bytes after the capacity, a multiple of the host page.

        Returns
        -------
        Memory

        Raises
        ------
        ValueError, TypeError, OverflowError
            For an argument that cannot be, by its name.
        PageError
            The OS refused; the message names the limit in the way.
        GrowError
            The creator's own bound refused.
        """
        cdef memory_spec spec
        check_size(minimum, "minimum", &spec.minimum)
        check_optional_size(maximum, "maximum", &spec.maximum)
        check_optional_size(reserved_size_in_bytes, "reserved_size_in_bytes", &spec.reservation)
        check_size(guard_size_in_bytes, "guard_size_in_bytes", &spec.guard)
        check_reservation(reserved_size_in_bytes, "reserved_size_in_bytes", spec.reservation)
        try:
            spec.page_size = ty.page_size
            spec.is_64 = ty.is_64
            spec.is_shared = ty.is_shared
        except (AttributeError, TypeError, OverflowError):
            raise TypeError(f"ty must be a MemoryType, got {type(ty).__name__}") from None
        if spec.page_size != 1 and spec.page_size != 65536:
            raise ValueError(f"ty.page_size must be 1 or 65536, got {spec.page_size}")
        return self.make_checked(&spec, "guard_size_in_bytes")

    def create(self, minimum, maximum=None, reserve=None, guard=None):
        """Make a memory for Python; `linmem.create` says what each argument means (all in bytes)."""
        cdef memory_spec spec
        check_size(minimum, "minimum", &spec.minimum)
        check_optional_size(maximum, "maximum", &spec.maximum)
        check_optional_size(reserve, "reserve", &spec.reservation)
        check_reservation(reserve, "reserve", spec.reservation)
        check_size(DEFAULT_GUARD if guard is None else guard, "guard", &spec.guard)
        if guard is None:
            round_up(spec.guard, pages.capabilities().page_size, &spec.guard)
        spec.page_size = 1
        spec.is_64 = True
        spec.is_shared = False
        return self.make_checked(&spec, "guard")

    cdef object make_checked(self, const memory_spec* spec, str guard_name):
        cdef memory* m = NULL
        cdef failure why
        cdef int code
        cdef size_t page = pages.capabilities().page_size
        if spec.minimum > spec.maximum:
            raise ValueError(f"minimum must be <= maximum ({spec.maximum}), got {spec.minimum}")
        if spec.guard & (page - 1):
            raise ValueError(f"{guard_name} must be a multiple of the host page ({page}), got {spec.guard}")
        with nogil:
            code = self.make(spec, &m, &why)
        if code:
            raise_failure(&why)
        return wrap(m)


cdef int check_optional_size(object value, str name, size_t* out) except -1:
    if value is None:
        out[0] = SIZE_MAX       # UNCHOSEN, or no maximum
        return 0
    return check_size(value, name, out)


cdef int check_reservation(object value, str name, size_t size) except -1:
    if value is not None and size == UNCHOSEN:
        raise OverflowError(f"{name} must be below 2**64 - 1, got {value}")
    return 0


@cython.final
cdef class MmapCreator(NativeCreator):
    """Memories that are each one mapping of their own: reserve, commit as they grow, release.

    Mirrors ``wasmtime::MemoryCreator``. Thread-safe; holds nothing.
    """

    def __init__(self):
        # Only here to refuse arguments: without it Python takes any and forgets them.
        pass

    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil:
        return mapped_make(spec, out, why)

    def __repr__(self):
        return "MmapCreator()"


# -- the Python handle ---------------------------------------------------------------------------

cdef object wrap(memory* m):
    """A handle that takes over one reference, also when it cannot be made."""
    cdef Memory handle
    try:
        handle = Memory.__new__(Memory)
    except BaseException:
        with nogil:
            memory_release(m)
        raise
    handle.m = m
    return handle


@cython.final
cdef class Memory:
    """A linear memory: bytes at an address that never moves while they grow.

    Made by a creator (`linmem.create`, `linmem.MmapCreator`, `linmem.wasmtime.linear_memory`), not
    by calling the class. It is a writable buffer of `len(mem)` bytes: ``memoryview(mem)``,
    ``numpy.asarray(mem)``. Sizes and offsets are in bytes.
    """

    def __init__(self):
        if self.m == NULL:
            raise TypeError("a Memory is made by a creator: linmem.create(minimum)")

    def __dealloc__(self):
        if self.m != NULL:
            with nogil:
                memory_release(self.m)

    # The gate. Whoever is inside keeps the reference on m; close() gets in only when nobody is.
    cdef memory* enter(self) except NULL:
        if add_with_gil(&self.users, 1) < 0 or self.m == NULL:
            add_with_gil(&self.users, -1)
            raise ValueError("the memory is closed")
        return self.m

    cdef void leave(self) noexcept:
        add_with_gil(&self.users, -1)

    def close(self):
        """Give up this handle; the pages go when wasmtime holds them no longer either.

        Closing twice is closing once. Afterwards every other call is `ValueError`.

        Raises
        ------
        BufferError
            While buffers are exported from this handle; it says how many.
        OwnedError
            While a wasmtime store owns the memory.
        """
        cdef memory* m
        cdef long long users
        try:
            m = self.enter()
        except ValueError:
            return
        owned = load(&m.owner) == OWNER_WASMTIME
        self.leave()
        if owned:
            raise _errors.OwnedError("a wasmtime store owns this memory: close the store (store.close()) instead")
        if not swap_if(&self.users, 0, CLOSED):
            users = load(&self.users)
            if users < 0:
                return
            raise BufferError(f"cannot close the memory: {users} exported buffer(s) still point into it")
        self.m = NULL
        with nogil:
            memory_release(m)

    @property
    def closed(self):
        """Whether `close` was called."""
        return load(&self.users) < 0 or self.m == NULL

    def __enter__(self):
        self.enter()
        self.leave()
        return self

    def __exit__(self, *exc):
        self.close()

    # -- the trait

    def byte_size(self):
        """Bytes accessible now; mirrors ``wasmtime::LinearMemory::byte_size``."""
        cdef memory* m = self.enter()
        size = memory_size(m)
        self.leave()
        return size

    def byte_capacity(self):
        """Bytes up to which growth never moves the base; ``wasmtime::LinearMemory::byte_capacity``."""
        cdef memory* m = self.enter()
        capacity = m.capacity
        self.leave()
        return capacity

    def maximum_byte_size(self):
        """The most bytes that `grow_to` will ever accept, or None."""
        cdef memory* m = self.enter()
        maximum = None if m.maximum == NO_MAXIMUM else m.maximum
        self.leave()
        return maximum

    @cython.binding(False)      # a plain method descriptor: two calls less per call
    @cython.embedsignature(True)
    @cython.embedsignature.format("clinic")
    def grow_to(self, new_size):
        """Make `new_size` bytes accessible, the new ones zero; mirrors ``wasmtime::LinearMemory::grow_to``.

        It happens whole or changes nothing. Up to `byte_capacity` the base stays and every view remains
        valid; past it the memory moves, which it does only while nothing is exported. Uses mprotect(2),
        and mremap(2) to move.

        Parameters
        ----------
        new_size : int
            In bytes. The size it has is a no-op.

        Raises
        ------
        ValueError
            Smaller than `byte_size`, or the memory is closed.
        GrowError
            Past the maximum, or past the capacity of a memory that cannot move (`LimitError`: a budget).
        BufferError
            Past the capacity while a buffer is exported.
        PageError
            The OS refused.
        OwnedError
            A wasmtime store owns the memory: it grows by ``wasmtime.Memory.grow``.
        """
        cdef size_t size
        cdef failure why
        cdef int code
        cdef memory* m
        check_size(new_size, "new_size", &size)
        m = self.enter()
        if load(&m.owner) == OWNER_WASMTIME:
            self.leave()
            refuse_to_grow()
        with nogil:
            code = grow_locked(m, size, &why)
        self.leave()
        if code:
            raise_failure(&why)

    def as_ptr(self):
        """Address of byte 0, a multiple of the host page; mirrors ``wasmtime::LinearMemory::as_ptr``."""
        cdef memory* m = self.enter()
        address = <size_t>m.base
        self.leave()
        return address

    def wasm_accessible(self):
        """Addresses that native code may touch: base .. capacity + guard, accessible or a fault.

        Mirrors ``wasmtime::LinearMemory::wasm_accessible``.
        """
        cdef memory* m = self.enter()
        cdef size_t base = <size_t>m.base
        cdef size_t end = base + m.covered
        self.leave()
        return range(base, end)

    # -- bytes

    def __len__(self):
        cdef memory* m = self.enter()
        cdef Py_ssize_t size = <Py_ssize_t>memory_size(m)
        self.leave()
        return size

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        cdef memory* m = self.enter()
        pin(m)
        try:
            PyBuffer_FillInfo(buffer, self, m.base, <Py_ssize_t>memory_size(m), 0, flags)
        except BaseException:
            unpin(m)
            self.leave()
            raise

    def __releasebuffer__(self, Py_buffer* buffer):
        unpin(self.m)
        self.leave()

    def view(self, format="B", offset=0, count=None):
        """Export a part of the memory as elements of a type, without a copy.

        The view stays valid through every growth; it keeps the memory open. Its length is fixed now.

        Parameters
        ----------
        format : str or type or dtype
            A `struct` format ("d", ">I"), a NumPy type string ("<f8"), a NumPy dtype or scalar type, or
            `bool`, `int` (64 bits), `float`.
        offset : int
            In bytes, of any alignment.
        count : int, optional
            In elements. All whole ones up to `byte_size` by default.

        Returns
        -------
        memoryview
            One dimension, writable.

        Raises
        ------
        ValueError, TypeError
            For no such format, or for a part that is not within `byte_size`.
        """
        cdef size_t start, n, itemsize, size
        text, itemsize, castable = _resolve_format(format)
        check_size(offset, "offset", &start)
        size = <size_t>self.byte_size()
        if start > size:
            raise ValueError(f"offset must be <= byte_size() ({size}), got {start}")
        if count is None:
            n = (size - start) // itemsize
        else:
            check_size(count, "count", &n)
            if n > (size - start) // itemsize:
                raise ValueError(f"count must be <= {(size - start) // itemsize} elements of {itemsize} bytes"
                                 f" from offset {start} in {size} bytes, got {n}")
        if castable:
            return memoryview(self)[start:start + n * itemsize].cast(text)
        return memoryview(Window(self, start, n, text.encode(), itemsize))

    def __getitem__(self, key):
        cdef Py_ssize_t i, size
        cdef memory* m
        if isinstance(key, slice):
            if key.step is None or key.step == 1:
                size = len(self)
                start, stop, _ = key.indices(size)
                return self.read(start, stop - start if stop > start else 0)
            with memoryview(self) as whole:
                return whole[key].tobytes()
        i = check_index(key)
        m = self.enter()
        pin(m)
        try:
            size = <Py_ssize_t>memory_size(m)
            return (<unsigned char*>m.base)[check_range(i, size)]
        finally:
            unpin(m)
            self.leave()

    def __setitem__(self, key, value):
        cdef Py_ssize_t i, size
        cdef memory* m
        cdef Py_ssize_t byte
        if isinstance(key, slice):
            with memoryview(self) as whole, whole[key] as part:
                try:
                    flat = memoryview(value).cast("B")
                except TypeError as error:
                    raise TypeError(f"data must be a contiguous buffer of bytes, got {type(value).__name__}:"
                                    f" {error}") from None
                with flat as data:
                    if len(data) != len(part):
                        raise ValueError(f"the slice has {len(part)} bytes and the data {len(data)}: a memory"
                                         " cannot be resized by assignment")
                    part[:] = data
            return
        i = check_index(key)
        try:
            byte = value
        except OverflowError:
            byte = -1
        except TypeError:
            raise TypeError(f"a byte must be an integer in 0 .. 255, got {type(value).__name__}") from None
        if byte < 0 or byte > 255:
            raise ValueError(f"a byte must be in 0 .. 255, got {value}")
        m = self.enter()
        pin(m)
        try:
            size = <Py_ssize_t>memory_size(m)
            (<unsigned char*>m.base)[check_range(i, size)] = <unsigned char>byte
        finally:
            unpin(m)
            self.leave()

    def read(self, offset, size):
        """Copy `size` bytes from `offset` out, as `bytes`; ValueError past `byte_size`."""
        cdef size_t start, n
        cdef memory* m
        cdef bytes out
        cdef char* to
        check_size(offset, "offset", &start)
        check_size(size, "size", &n)
        m = self.enter()
        pin(m)
        try:
            check_span(start, n, memory_size(m))
            out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>n)
            to = PyBytes_AS_STRING(out)
            if n < RELEASE_GIL_FROM:
                memcpy(to, m.base + start, n)
            else:
                with nogil:
                    memcpy(to, m.base + start, n)
            return out
        finally:
            unpin(m)
            self.leave()

    def write(self, offset, data):
        """Copy a contiguous buffer in at `offset` and return its length in bytes.

        Past `byte_size` it is `ValueError`, and nothing is written.
        """
        cdef size_t start, n
        cdef memory* m
        cdef Py_buffer given
        check_size(offset, "offset", &start)
        try:
            PyObject_GetBuffer(data, &given, PyBUF_SIMPLE)
        except (TypeError, ValueError, BufferError) as error:
            raise TypeError(f"data must be a contiguous buffer of bytes, got {type(data).__name__}: {error}") from None
        try:
            n = <size_t>given.len
            m = self.enter()
            pin(m)
            try:
                check_span(start, n, memory_size(m))
                if n < RELEASE_GIL_FROM:
                    memmove(m.base + start, given.buf, n)
                else:
                    with nogil:
                        memmove(m.base + start, given.buf, n)
                return n
            finally:
                unpin(m)
                self.leave()
        finally:
            PyBuffer_Release(&given)

    # -- pages

    def protect(self, offset, size, access):
        """Set what may be done with whole host pages; mprotect(2). A touch against it is a fault.

        A memory with protected pages never moves.

        Parameters
        ----------
        offset, size : int
            In bytes, multiples of the host page, within `byte_size`.
        access : {"rw", "r", "none"}

        Raises
        ------
        ValueError
            For another access, or a range that is not whole pages of the memory.
        PageError
            The OS refused; the protection is what it was.
        TypeError
            The pages are not linmem's (a memory made in Python).
        """
        cdef size_t start, n, page = pages.capabilities().page_size
        cdef int how, code = 0
        cdef memory* m
        cdef failure why
        check_size(offset, "offset", &start)
        check_size(size, "size", &n)
        try:
            how = _ACCESSES[access]
        except (KeyError, TypeError):
            raise ValueError(f"access must be one of {', '.join(map(repr, _ACCESSES))}, got {access!r}") from None
        for name, value in (("offset", start), ("size", n)):
            if value & (page - 1):
                raise ValueError(f"{name} must be a multiple of the host page ({page}), got {value}")
        m = self.enter_pages("protect")
        try:
            check_span(start, n, memory_size(m))
            if n:
                with nogil:
                    code = pages.protect(m.base + start, n, how)
                    if code:
                        fail_page_call(&why, code, "protect", n)
                    else:
                        m.protected_pages = True
        finally:
            unpin(m)
            self.leave()
        if code:
            raise_failure(&why)

    def discard(self, offset=0, size=None):
        """Give the pages back to the OS; the bytes read as zero afterwards. madvise(2), MADV_DONTNEED.

        Parameters
        ----------
        offset, size : int
            In bytes; to the end by default. Parts of a page are set to zero. With protected pages in the
            memory, whole host pages only.

        Raises
        ------
        ValueError
            For a range that is not within `byte_size`.
        PageError
            The OS refused; no byte has changed.
        TypeError
            The pages are not linmem's, or are protected where the OS cannot discard such.
        """
        cdef size_t start, n, head, tail, page = pages.capabilities().page_size
        cdef int code = 0
        cdef memory* m
        cdef failure why
        check_size(offset, "offset", &start)
        m = self.enter_pages("discard")
        try:
            n = check_rest(start, size, memory_size(m))
            if m.protected_pages:
                if not pages.capabilities().discard_any_protection:
                    raise TypeError("discard is not supported here on a memory with protected pages")
                if start & (page - 1) or (n & (page - 1) and start + n != memory_size(m)):
                    raise ValueError(f"offset and size must be multiples of the host page ({page}) in a memory"
                                     f" with protected pages, got {start} and {n}")
            with nogil:
                # Whole pages go back to the OS; what is left of the first and the last is zeroed.
                head = start
                round_up(start, page, &head)
                tail = round_down(start + n, page)
                if head >= tail:
                    memset(m.base + start, 0, n)
                else:
                    code = pages.discard(m.base + head, tail - head)
                    if code:
                        fail_page_call(&why, code, "discard", tail - head)
                    else:
                        memset(m.base + start, 0, head - start)
                        memset(m.base + tail, 0, start + n - tail)
        finally:
            unpin(m)
            self.leave()
        if code:
            raise_failure(&why)

    def prefault(self, offset=0, size=None):
        """Make the pages of a range resident now; no byte changes. madvise(2), MADV_POPULATE_WRITE.

        Parameters
        ----------
        offset, size : int
            In bytes; to the end by default. Rounded outwards to host pages.

        Raises
        ------
        ValueError
            For a range that is not within `byte_size`.
        PageError
            The OS refused, or a page cannot be written.
        TypeError
            The pages are not linmem's, or are protected where the OS would fault.
        """
        cdef size_t start, n, first, end = 0, page = pages.capabilities().page_size
        cdef int code = 0
        cdef memory* m
        cdef failure why
        check_size(offset, "offset", &start)
        m = self.enter_pages("prefault")
        try:
            n = check_rest(start, size, memory_size(m))
            if m.protected_pages and not pages.capabilities().populates:
                raise TypeError("prefault is not supported here on a memory with protected pages")
            if n:
                with nogil:
                    first = round_down(start, page)
                    round_up(start + n, page, &end)
                    code = pages.prefault(m.base + first, end - first)
                    if code:
                        fail_page_call(&why, code, "prefault", end - first)
        finally:
            unpin(m)
            self.leave()
        if code:
            raise_failure(&why)

    cdef memory* enter_pages(self, str call) except NULL:
        """enter() and pin(), for the calls that only a memory of our own pages has."""
        cdef memory* m = self.enter()
        if not m.ops.pages_are_ours:
            kind = m.ops.kind.decode()
            self.leave()
            raise TypeError(f"{call} is not supported by a memory of kind {kind!r}: its pages are not linmem's")
        pin(m)
        return m

    def info(self):
        """What the memory holds at this moment, as a `MemoryInfo`; asks the OS what is resident (mincore(2)).

        A page that was only read counts as resident, as the kernel's page of zeros is.
        """
        cdef memory* m = self.enter()
        cdef size_t resident = 0
        cdef failure why
        cdef int code = 0
        cdef bint known = m.ops.resident != NULL
        from linmem.records import MemoryInfo
        pin(m)
        try:
            exports = load(&m.pins) - 1
            if known:
                with nogil:
                    code = memory_resident(m, &resident, &why)
                if code:
                    raise_failure(&why)
            return MemoryInfo(
                base=<size_t>m.base,
                byte_size=memory_size(m),
                byte_capacity=m.capacity,
                maximum_byte_size=None if m.maximum == NO_MAXIMUM else m.maximum,
                reserved=m.pre_guard + m.capacity + m.guard,
                committed=m.accessible,
                resident=resident if known else None,
                pre_guard=m.pre_guard,
                guard=m.guard,
                page_size=pages.capabilities().page_size,
                exports=exports,
                kind=m.ops.kind.decode(),
                owner="wasmtime" if load(&m.owner) == OWNER_WASMTIME else "python",
            )
        finally:
            unpin(m)
            self.leave()

    def __repr__(self):
        if self.closed:
            return "<linmem.Memory, closed>"
        return (f"<linmem.Memory: {self.byte_size()} bytes at {self.as_ptr():#x},"
                f" capacity {self.byte_capacity()}>")

    def __reduce__(self):
        raise TypeError("a Memory cannot be pickled or copied: it is an address in this process")


cdef int refuse_to_grow() except -1:
    raise _errors.OwnedError(
        "a wasmtime store owns this memory: grow it with wasmtime.Memory.grow(store, delta) instead")


_ACCESSES = {"none": pages.ACCESS_NONE, "r": pages.ACCESS_READ, "rw": pages.ACCESS_READ_WRITE}


cdef Py_ssize_t check_index(object key) except? -1:
    try:
        return key.__index__()
    except (AttributeError, TypeError):
        raise TypeError(f"a memory is indexed by an integer or a slice, got {type(key).__name__}") from None
    except OverflowError:
        raise IndexError(f"index out of range: {key}") from None


cdef Py_ssize_t check_range(Py_ssize_t i, Py_ssize_t size) except -1:
    cdef Py_ssize_t at = i + size if i < 0 else i
    if at < 0 or at >= size:
        raise IndexError(f"index must be in {-size} .. {size - 1}, got {i}")
    return at


cdef int check_span(size_t offset, size_t size, size_t byte_size) except -1:
    if offset > byte_size or size > byte_size - offset:
        raise ValueError(f"offset + size must be <= byte_size() ({byte_size}), got offset={offset} size={size}")
    return 0


cdef size_t check_rest(size_t offset, object size, size_t byte_size) except? 0:
    """The size meant: the one given, or all from the offset on."""
    cdef size_t n = byte_size - offset if offset <= byte_size else 0
    if size is not None:
        check_size(size, "size", &n)
    check_span(offset, n, byte_size)
    return n


@cython.final
cdef class Window:
    """Exports a typed part of a memory in a format that memoryview.cast() does not know."""

    cdef Memory memory
    cdef size_t offset
    cdef bytes format
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]

    def __cinit__(self, Memory memory not None, size_t offset, size_t count, bytes format not None,
                  size_t itemsize):
        self.memory = memory
        self.offset = offset
        self.format = format
        self.shape[0] = <Py_ssize_t>count
        self.strides[0] = <Py_ssize_t>itemsize

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        cdef memory* m = self.memory.enter()
        pin(m)
        buffer.buf = m.base + self.offset
        buffer.obj = self
        buffer.len = self.shape[0] * self.strides[0]
        buffer.readonly = 0
        buffer.itemsize = self.strides[0]
        buffer.format = PyBytes_AS_STRING(self.format) if flags & PyBUF_FORMAT else NULL
        buffer.ndim = 1
        buffer.shape = self.shape if flags & PyBUF_ND else NULL
        buffer.strides = self.strides if (flags & PyBUF_STRIDES) == PyBUF_STRIDES else NULL
        buffer.suboffsets = NULL
        buffer.internal = NULL

    def __releasebuffer__(self, Py_buffer* buffer):
        unpin(self.memory.m)
        self.memory.leave()


_abc.LinearMemory.register(Memory)
_abc.MemoryCreator.register(NativeCreator)


# -- for the tests: the pure functions, alone --------------------------------------------------

def _lay_out(size_t minimum, size_t reservation, size_t guard, size_t page):
    cdef layout at
    if lay_out(minimum, reservation, guard, page, &at):
        return None
    return {"pre_guard": at.pre_guard, "accessible": at.accessible, "capacity": at.capacity,
            "guard": at.guard, "total": at.total}


def _reservation_steps(size_t minimum, maximum, size_t space, size_t left):
    cdef size_t bound
    check_optional_size(maximum, "maximum", &bound)
    cdef size_t want = first_reservation(minimum, bound, bound != NO_MAXIMUM, space, left)
    steps = [want]
    while want != minimum:
        want = next_reservation(want, minimum)
        steps.append(want)
    return steps
