# Py_DECREF for code that does not hold the GIL; a part of memory.pyx.

cdef extern from *:
    """
    #if PY_VERSION_HEX < 0x030d0000
    #define Py_IsFinalizing _Py_IsFinalizing
    #endif
    """
    bint python_is_finalizing "Py_IsFinalizing"() noexcept nogil
    int Py_AddPendingCall(int (*call)(void*), void* argument) noexcept nogil
    void* PyGILState_GetThisThreadState() noexcept nogil

# The number of relieve() calls that this thread is in.
cdef extern from *:
    """
    static LINMEM_OF_THREAD int linmem_relieving;
    static int *linmem_relieving_of_thread(void) { return &linmem_relieving; }
    """
    int* relieving "linmem_relieving_of_thread"() noexcept nogil

cdef struct deferred_object:
    deferred_object* next
    PyObject* object

cdef deferred_object* deferred_objects = NULL
cdef fork_lock deferred_lock


# In a child of fork(), until Python knows the child: threads that the child does not have may hold the GIL and other
# locks of Python. os.fork() calls _python_knows_child(). After a fork by C code PyOS_AfterFork_Child() does so; without
# that call, the child must not use Python.
cdef bint forked_by_c = False


cdef bint python_is_gone() noexcept nogil:
    """Whether no thread may enter Python."""
    return forked_by_c or python_is_finalizing()


cdef int refuse_without_python(const char* call, size_t size, failure* why) noexcept nogil:
    """0, or E_UNSUPPORTED if python_is_gone()."""
    if not python_is_gone():
        return 0
    fail(why, E_UNSUPPORTED, call, size)
    snprintf(why.detail, sizeof(why.detail), "while the interpreter shuts down, or after a fork by C code")
    return E_UNSUPPORTED


def _python_knows_child():
    global forked_by_c
    forked_by_c = False
    drop_deferred(NULL)


try:
    from os import register_at_fork as _register_at_fork
except ImportError:         # no fork
    pass
else:
    _register_at_fork(after_in_child=_python_knows_child)


cdef void deferred_decref(PyObject* object) noexcept nogil:
    """Py_DECREF from any thread, at any time.

    A thread that Python knows takes the GIL. A thread that Python does not know (wasmtime's own) must not take the GIL,
    so the main thread drops the object later. A thread in relieve() may hold the lock of a memory that the object's
    Python code uses, so the main thread drops this object, too. A forked child drops it when Python knows the child.
    While the interpreter shuts down, nothing is dropped: the process ends, and a thread that waits for the GIL then
    waits forever.
    """
    global deferred_objects
    cdef deferred_object* d
    if python_is_finalizing():
        return
    if not forked_by_c and PyGILState_GetThisThreadState() != NULL and relieving()[0] == 0:
        drop_with_gil(object)
        return
    d = <deferred_object*>malloc(sizeof(deferred_object))
    if d == NULL:
        return
    d.object = object
    lock(&deferred_lock.held)
    d.next = deferred_objects
    deferred_objects = d
    unlock(&deferred_lock.held)
    if not forked_by_c:
        Py_AddPendingCall(drop_deferred, NULL)      # if the queue is full, a later call drops the object


cdef void drop_with_gil(PyObject* object) noexcept with gil:
    Py_DECREF(<object>object)


cdef int drop_deferred(void* unused) noexcept:
    global deferred_objects
    cdef deferred_object* d
    cdef deferred_object* next
    lock(&deferred_lock.held)
    d = deferred_objects
    deferred_objects = NULL
    unlock(&deferred_lock.held)
    while d != NULL:
        next = d.next
        Py_DECREF(<object>d.object)
        free(d)
        d = next
    return 0
