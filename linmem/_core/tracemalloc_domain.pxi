# linmem's domain in tracemalloc: the committed bytes of each memory, by the line that made it; a part of memory.pyx.
#
# A memory that is made, or taken from a pool, while tracemalloc is tracing has a Trace until its last reference is
# gone. tracemalloc records the stack of the thread that calls PyTraceMalloc_Track(), and replaces a recorded stack with
# each new size. So Trace calls that function under frames that have the lines of the creation.

from libc.stdint cimport uintptr_t

from linmem._core.borrowed_lines import call_under as _call_under, frames_of as _frames_of

cdef extern from *:
    ctypedef struct PyMemAllocatorEx:
        void* ctx
        void* malloc
    enum:
        PYMEM_DOMAIN_RAW
    bint getting_locks "(PY_VERSION_HEX >= 0x030c0000)"
    void PyMem_GetAllocator(int domain, PyMemAllocatorEx* out) noexcept nogil
    # 0, or -2 if tracemalloc is not tracing. Some versions of CPython need the GIL, others take the GIL themselves. No
    # version may be called while the interpreter shuts down.
    int PyTraceMalloc_Track(unsigned int domain, uintptr_t address, size_t size) noexcept
    int PyTraceMalloc_Untrack(unsigned int domain, uintptr_t address) noexcept

cdef unsigned int DOMAIN = 0x6c696e6d       # "linm"
tracemalloc_domain = DOMAIN

# Tells the allocator of Python that was in use when tracemalloc was last seen not to trace. start() and stop() exchange
# that allocator, and they tell no one else.
cdef atomic_i64 untraced


cdef inline long long allocator_now() noexcept nogil:
    """PyMem_GetAllocator() takes a lock of Python since CPython 3.12. A child forked by C code would wait for ever if
    another thread were in the call, so a fork waits for such a thread. The caller may have the GIL, because the holder
    of allocator_lock waits for nothing."""
    cdef PyMemAllocatorEx allocator
    if getting_locks:
        lock(&allocator_lock.held)
    PyMem_GetAllocator(PYMEM_DOMAIN_RAW, &allocator)
    if getting_locks:
        unlock(&allocator_lock.held)
    return <long long>(<size_t>allocator.ctx * 31 + <size_t>allocator.malloc)


cdef bint is_tracing() noexcept:
    """The caller has the GIL."""
    cdef long long allocator = allocator_now()
    if PyTraceMalloc_Untrack(DOMAIN, 0) == 0:       # nothing has the address 0
        return True
    store(&untraced, allocator)
    return False


cdef void trace_if_on(memory* m) noexcept nogil:
    """A memory with one reference, which the caller has, gets a new owner."""
    if allocator_now() != load(&untraced) and m.trace == NULL and may_run_python():
        begin_trace(m)


@cython.final
cdef class Trace:
    """A memory as tracemalloc knows it. Its address there is the address of this object."""

    cdef size_t size
    cdef list frames

    def __dealloc__(self):
        if not python_is_finalizing():
            PyTraceMalloc_Untrack(DOMAIN, <uintptr_t><PyObject*>self)

    def __reduce__(self):
        raise TypeError("a Trace cannot be pickled or copied: it belongs to a memory of this process")

    def track(self):
        PyTraceMalloc_Track(DOMAIN, <uintptr_t><PyObject*>self, self.size)

    cdef int record(self, size_t size) except -1:
        self.size = size
        _call_under(self.frames, self.track)
        return 0


cdef void begin_trace(memory* m) noexcept with gil:
    cdef Trace trace = None
    cdef object error = None
    if not is_tracing():
        return
    for _ in range(2):
        try:
            trace = new_trace()
            trace.record(m.accessible)
            break
        except (MemoryError, RecursionError):
            trace = None
            break
        except BaseException as raised:     # a signal handler ran in this Python code and raised
            trace, error = None, raised
    if trace is not None:
        Py_INCREF(trace)
        m.trace = <PyObject*>trace
        m.growth_is_watched = True
    if error is not None:
        raise_later(error)


cdef Trace new_trace():
    from _tracemalloc import get_traceback_limit
    cdef stack_frame[MOST_FRAMES] frames
    cdef int i, most = min(get_traceback_limit(), MOST_FRAMES), n = capture_stack(frames, most)
    cdef Trace trace = Trace.__new__(Trace)
    try:
        trace.frames = _frames_of([((<object>frames[i].code).co_filename, frames[i].line) for i in range(n)], most)
    finally:
        drop_frames(frames, n)
    return trace


cdef void trace_growth(memory* m) noexcept nogil:
    """The caller holds the memory's lock, and the memory has a Trace."""
    cdef own_growth growth
    if may_run_python():
        begin_own_growth(&growth, m)
        trace_growth_with_gil(m)
        end_own_growth(&growth)


cdef void trace_growth_with_gil(memory* m) noexcept with gil:
    cdef Trace trace = <Trace>m.trace
    cdef object error = None
    for _ in range(2):
        try:
            from _tracemalloc import _get_object_traceback
            # tracemalloc knows the Trace object itself, unless tracing was stopped or cleared since it was made.
            if is_tracing() and _get_object_traceback(trace) is not None:
                trace.record(m.accessible)
            break
        except (MemoryError, RecursionError):
            break
        except BaseException as raised:     # a signal handler ran in this Python code and raised
            error = raised
    if error is not None:
        raise_later(error)


cdef inline void end_trace(memory* m) noexcept nogil:
    """The last reference on the memory is gone."""
    cdef PyObject* trace = m.trace
    if trace != NULL:
        m.trace = NULL
        deferred_decref(trace)


is_tracing()
