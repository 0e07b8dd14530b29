# Which lines of Python a thread is executing; a part of memory.pyx.

cdef extern from "frameobject.h":
    """
    #if PY_VERSION_HEX < 0x030b0000
    #define PyFrame_GetGlobals(frame) Py_NewRef((frame)->f_globals)
    #endif
    """
    ctypedef struct PyFrameObject:
        pass
    PyFrameObject* PyEval_GetFrame()            # borrowed; the other functions return references
    PyFrameObject* PyFrame_GetBack(PyFrameObject* frame)
    object PyFrame_GetGlobals(PyFrameObject* frame)
    PyObject* frame_code "(PyObject *)PyFrame_GetCode"(PyFrameObject* frame)
    int PyFrame_GetLineNumber(PyFrameObject* frame)
    void decref_frame "Py_DECREF"(PyFrameObject* frame)
    void incref_frame "Py_INCREF"(PyFrameObject* frame)

# The newest frames of a stack are left out while they run code of these packages.
cdef tuple LEFT_OUT = ("linmem.", "wasmtime.")


cdef bint may_run_python() noexcept nogil:
    """Whether this thread may take the GIL: Python knows the thread, and the interpreter is not shutting down."""
    return PyGILState_GetThisThreadState() != NULL and not python_is_finalizing()


cdef bint is_left_out(PyFrameObject* frame) noexcept:
    name = (<dict>PyFrame_GetGlobals(frame)).get("__name__")
    return isinstance(name, str) and (<str>name).startswith(LEFT_OUT)


cdef PyFrameObject* frame_behind(PyFrameObject* frame) noexcept:
    """The caller of the frame, as a new reference or NULL. Drops the reference on `frame`."""
    cdef PyFrameObject* back = PyFrame_GetBack(frame)
    decref_frame(frame)
    return back


cdef int capture_stack(stack_frame* frames, int most) noexcept:
    """Stores at most `most` frames of this thread, the newest first, and returns their number. The caller gets the
    references on the code objects. The newest frames of linmem and wasmtime are left out, unless they are all."""
    cdef PyFrameObject* newest = PyEval_GetFrame()
    cdef PyFrameObject* frame = newest
    cdef int n = 0
    if newest == NULL:
        return 0
    incref_frame(newest)
    incref_frame(frame)
    while frame != NULL and is_left_out(frame):
        frame = frame_behind(frame)
    if frame == NULL:
        frame = newest
    else:
        decref_frame(newest)
    while frame != NULL and n < most:
        frames[n].code = frame_code(frame)
        frames[n].line = PyFrame_GetLineNumber(frame)
        n += 1
        frame = frame_behind(frame)
    if frame != NULL:
        decref_frame(frame)
    return n


cdef void drop_frames(stack_frame* frames, int n) noexcept:
    cdef int i
    for i in range(n):
        Py_DECREF(<object>frames[i].code)
