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


cdef bint python_is_ending() noexcept nogil:
    return python_is_finalizing()


cdef void deferred_decref(PyObject* object) noexcept nogil:
    """Py_DECREF from any thread, at any time.

    A thread that Python knows takes the GIL. A thread that Python does not know (wasmtime's own) must not take the GIL,
    so the main thread drops the object later. A thread in relieve() may hold the lock of a memory that the object's
    Python code uses, so the main thread drops this object, too. While the interpreter shuts down, nothing is dropped:
    the process ends, and a thread that waits for the GIL then waits forever.
    """
    global deferred_objects
    cdef deferred_object* d
    if python_is_finalizing():
        return
    if PyGILState_GetThisThreadState() != NULL and relieving()[0] == 0:
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
    Py_AddPendingCall(drop_deferred, NULL)      # if Python's queue is full, the call for a later object drops this one


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
