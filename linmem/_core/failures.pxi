# Why a call failed: turns the code of a nogil function into a text and an exception; a part of memory.pyx.
#
# A nogil function that fails fills the caller's `failure` with one of the fail functions and returns the code.
# exception_of() is the only function that turns a failure into an exception.

from cpython.ref cimport Py_INCREF

from libc.string cimport strlen

from linmem._core.units cimport E_BROKEN, E_EXHAUSTED, E_FILE, E_GROWTHS, E_IMAGE, E_LIMIT, E_MAPPINGS, E_OWNED, \
    E_OWN_GROWTH, E_PROTECTED, E_PYTHON, E_VALUE

from linmem import errors as _errors
from linmem._os import pages as _pages

cdef extern from *:
    """
    #define linmem_explain(why, ...) snprintf((why)->detail, sizeof((why)->detail), __VA_ARGS__)
    #define linmem_fail_text(why, value, ...) ((why)->code = (value), (why)->name[0] = 0, (why)->counted = 0, \\
                                               linmem_explain(why, __VA_ARGS__), (value))
    """
    # explain() writes the detail of a failure; call it after fail(). fail_text() replaces both calls where the detail
    # is the whole text.
    int explain "linmem_explain"(failure* why, const char* format, ...) noexcept nogil
    int fail_text "linmem_fail_text"(failure* why, int code, const char* format, ...) noexcept nogil

cdef extern from *:
    ctypedef struct named_type "PyTypeObject":
        const char* tp_name
    named_type* Py_TYPE(object object)

# The exception class of each code. All but LimitError and PoolError take nothing but the text.
cdef dict exceptions = {
    E_NO_MEMORY: MemoryError, E_OVERFLOW: OverflowError, E_SHRINK: ValueError, E_MAXIMUM: _errors.GrowError,
    E_CAPACITY: _errors.GrowError, E_EXPORTED: BufferError, E_UNSUPPORTED: TypeError, E_IMAGE: ValueError,
    E_OWNED: _errors.OwnedError, E_PROTECTED: ValueError, E_OWN_GROWTH: RuntimeError, E_BROKEN: RuntimeError,
    E_VALUE: ValueError, E_MAPPINGS: MemoryError, E_FILE: OSError, E_GROWTHS: _errors.GrowError,
    E_LIMIT: _errors.LimitError, E_EXHAUSTED: _errors.PoolError,
}


cdef int fail(failure* why, int code, const char* call, size_t size, size_t used=0, size_t limit=0) noexcept nogil:
    why.code = code
    why.call = call
    why.size = size
    why.used = used
    why.limit = limit
    why.detail[0] = why.name[0] = 0
    why.exception = NULL
    why.counted = why.of_signal = False
    return code


cdef int fail_page_call(failure* why, int code, const char* call, size_t size) noexcept nogil:
    """For a code of the OS: also says which limit of the system is in the way. 0 stays 0."""
    if code:
        fail(why, code, call, size)
        pages.limit_text(code, size, why.detail, sizeof(why.detail))
    return code


cdef int fail_reserve(failure* why, int code, size_t size) noexcept nogil:
    cdef size_t n
    fail_page_call(why, code, "reserve", size)
    if size >> pages.capabilities().address_bits:
        return code             # the request exceeds the whole address space: the advice below would not help
    n = strlen(why.detail)
    snprintf(why.detail + n, sizeof(why.detail) - n, "%slinmem holds %zu bytes of address space already, and a smaller"
             " maximum= or reserve= asks for less", "; " if n else "", pages.reserved())
    return code


cdef int fail_python(failure* why, object error) noexcept:
    """The detail is the name of the exception's class."""
    fail(why, E_PYTHON, "python", 0)
    snprintf(why.detail, sizeof(why.detail), "%s", Py_TYPE(error).tp_name)
    why.counted = not isinstance(error, Exception)      # Ctrl-C is not a refusal
    Py_INCREF(error)
    why.exception = <PyObject*>error
    return E_PYTHON


cdef int fail_interrupted(failure* why, object error) noexcept:
    """The handler of a signal raised `error` while linmem waited."""
    fail_python(why, error)
    why.counted = why.of_signal = True
    return E_PYTHON


cdef extern from *:
    int PyErr_CheckSignals() except -1
    unsigned long PyThread_get_thread_ident() noexcept nogil
    int PyThreadState_SetAsyncExc(unsigned long thread, PyObject* exception) except -1


cdef void raise_later(object error) noexcept:
    """The next Python code that this thread runs raises `error` itself. If wasm called linmem, this code is the caller
    of wasm, or a host function or a creator that wasm calls before it returns. If another signal comes before that, the
    next Python code is that signal's handler."""
    # The handlers of signals that have come run now. CPython would raise `error` in the first of them.
    while True:
        try:
            PyErr_CheckSignals()
            break
        except BaseException as newer:
            if newer is not error:
                newer.__context__ = error
            error = newer
    # PyThreadState_SetAsyncExc takes a class, which CPython calls to get the exception. `except` must recognise the
    # class, so the class is a subclass of the exception's class. Some builds without a GIL never free a class, so the
    # class drops its reference on the exception. CPython 3.10 calls the class a second time, with the exception that
    # the first call returned.
    kept = [error]
    members = {"__new__": lambda _, given=None: kept.pop() if kept else given}
    try:
        again = type(type(error).__name__, (type(error),), members)
    except Exception:       # a class that refuses to be subclassed
        again = type(type(error).__name__, (BaseException,), members)
    PyThreadState_SetAsyncExc(PyThread_get_thread_ident(), <PyObject*>again)


cdef void failure_text(const failure* why, char* text, size_t room) noexcept nogil:
    cdef int code = why.code
    cdef const char* detail = <const char*>why.detail
    cdef const char* between = "; " if detail[0] else ""
    cdef size_t n = <size_t>snprintf(text, room, "creator '%s': ", <const char*>why.name) if why.name[0] else 0
    text += n
    room -= n
    if code > 0:
        snprintf(text, room, "%s of %zu bytes failed with code %d: %s%s%s", why.call, why.size, code,
                 pages.code_text(code), between, detail)
    elif code == E_VALUE:
        snprintf(text, room, "%s", detail)
    elif code == E_NO_MEMORY:
        snprintf(text, room, "no memory for linmem's own data (%zu bytes)", why.size)
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
                 why.limit, why.size, between, detail)
    elif code == E_EXPORTED:
        snprintf(text, room, "growing to %zu bytes would move the memory (its capacity is %zu), and %zu exported"
                             " buffer(s) point into it", why.size, why.limit, why.used)
    elif code == E_LIMIT:
        snprintf(text, room, "limit of %zu bytes%s reached: %zu in use and %zu more asked for",
                 why.limit, detail, why.used, why.size)
    elif code == E_GROWTHS:
        snprintf(text, room, "growing to %zu bytes is refused: the memory has grown %zu times, and limit_growths is"
                             " %zu", why.size, why.used, why.limit)
    elif code == E_MAPPINGS:
        snprintf(text, room, "%s is refused: the memories of this process have %zu windows, each takes up to two"
                 " mappings, and linmem leaves half of vm.max_map_count (%zu) to others; unmap() ends windows",
                 why.call, why.used, why.limit)
    elif code == E_EXHAUSTED and detail[0]:
        snprintf(text, room, "%s, and %zu bytes more are asked for", detail, why.size)
    elif code == E_EXHAUSTED:
        snprintf(text, room, "all %zu slots of the pool are in use, and %zu bytes more are asked for",
                 why.limit, why.size)
    elif code == E_IMAGE:
        snprintf(text, room, "minimum must be >= the end of the image (%zu), got %zu", why.limit, why.size)
    elif code == E_OWNED:
        snprintf(text, room, "a wasmtime store owns this memory: %s", detail if detail[0] else
                 <const char*>"grow it with wasmtime.Memory.grow(store, delta) instead")
    elif code == E_OWN_GROWTH:
        snprintf(text, room, "this thread is in a growth of this memory already, and would wait for itself: the"
                             " grow_to() of a memory in Python must not use linmem's handle on that memory, and"
                             " on_made, on_grow and on_refused must not grow or close theirs")
    elif code == E_BROKEN:
        snprintf(text, room, "the memory is lost: its grow_to() failed, or broke off, and the object behind it no"
                             " longer says where its bytes are")
    elif code == E_FILE:
        snprintf(text, room, "the file has %zu bytes, and the memory %zu: another program has changed the file, and"
                             " views of the memory fault past its end", why.used, why.limit)
    elif code == E_PROTECTED:
        snprintf(text, room, "%s is refused for %zu bytes at offset %zu: %s", why.call, why.size, why.used, detail)
    else:
        snprintf(text, room, "%s is not supported %s", why.call,
                 detail if detail[0] else <const char*>"by this kind of memory")


cdef object exception_of(const failure* why):
    """The exception for a failure. The caller's reference on an exception of Python code goes to the result."""
    cdef char text[640]
    cdef object error
    if why.code == E_PYTHON:
        error = <object>why.exception
        Py_DECREF(error)
        return error
    failure_text(why, text, sizeof(text))
    message = text.decode("utf-8", "replace")
    if why.code > 0:
        return _errors.page_error(_pages.os_error_args(why.code, message), why.call.decode(), why.size)
    if why.code == E_LIMIT:
        return _errors.LimitError(message, limit=why.limit, used=why.used, requested=why.size)
    if why.code == E_EXHAUSTED:
        return _errors.PoolError(message, slots=why.used)
    return exceptions[why.code](message)


cdef object error_class(int code):
    """The class of the exception for a code, except for E_PYTHON."""
    return _errors.PageError if code > 0 else exceptions[code]


cdef int raise_failure(const failure* why) except -1:
    raise exception_of(why)


cdef int raise_code(int code) except -1:
    raise _exception_of(code)


def _exception_of(int code):
    cdef failure why
    fail(&why, code, "use", 0)
    return exception_of(&why)
