# Failures: one way down to a code, one way up to a text and an exception; a part of memory.pyx.

from cpython.exc cimport PyErr_Clear, PyErr_Occurred
from cpython.ref cimport Py_INCREF

from libc.string cimport strlen

from linmem._core.units cimport E_BROKEN, E_EXHAUSTED, E_IMAGE, E_LIMIT, E_OWNED, E_OWN_GROWTH, E_PROTECTED, E_PYTHON

from linmem import errors as _errors
from linmem._os import pages as _pages


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


cdef int fail_reserve(failure* why, int code, size_t size) noexcept nogil:
    cdef size_t n
    fail_page_call(why, code, "reserve", size)
    if size >> pages.capabilities().address_bits:
        return code             # no process ever has so much, whatever linmem holds
    n = strlen(why.detail)
    snprintf(why.detail + n, sizeof(why.detail) - n, "%slinmem holds %zu bytes of address space already, and a smaller"
             " maximum= or reserve= asks for less", "; " if n else "", pages.reserved())
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
    if code == E_EXHAUSTED:
        return "EXHAUSTED"
    if code == E_IMAGE:
        return "IMAGE"
    if code == E_OWNED:
        return "OWNED"
    if code == E_OWN_GROWTH:
        return "OWN_GROWTH"
    if code == E_BROKEN:
        return "BROKEN"
    if code == E_PROTECTED:
        return "PROTECTED"
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
    elif code == E_EXHAUSTED and why.detail[0]:
        snprintf(text, room, "%s, and %zu bytes more are asked for", why.detail, why.size)
    elif code == E_EXHAUSTED:
        snprintf(text, room, "all %zu slots of the pool are in use, and %zu bytes more are asked for",
                 why.limit, why.size)
    elif code == E_IMAGE:
        snprintf(text, room, "minimum must be >= the end of the image (%zu), got %zu", why.limit, why.size)
    elif code == E_OWNED:
        snprintf(text, room, "a wasmtime store owns this memory: %s", why.detail)
        if why.detail[0] == 0:
            snprintf(text, room, "a wasmtime store owns this memory: grow it with wasmtime.Memory.grow(store, delta)"
                                 " instead")
    elif code == E_OWN_GROWTH:
        snprintf(text, room, "this thread is in a growth of this memory already, and would wait for itself: the"
                             " grow_to() of a memory in Python must not use linmem's handle on that memory")
    elif code == E_BROKEN:
        snprintf(text, room, "the memory is lost: its grow_to() failed, or broke off, and the object behind it no"
                             " longer says where its bytes are")
    elif code == E_PROTECTED:
        snprintf(text, room, "%s is refused for %zu bytes at offset %zu: %s", why.call, why.size, why.used, why.detail)
    else:
        if why.detail[0] == 0:
            between = "by this kind of memory"
        else:
            between = ""
        snprintf(text, room, "%s is not supported %s%s", why.call, between, why.detail)


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


cdef int raise_code(int code) except -1:
    cdef failure why
    fail(&why, code, "use", 0)
    return raise_failure(&why)


cdef str _WITHIN = "be within byte_size()"
cdef str _BELOW_WORD = "be below 2**64"
cdef str _FITS = "be below 2**63, in whole host pages and with its guards"

cdef extern from *:
    bint PyLong_CheckExact(object value) noexcept
    # An error is looked for by the caller: only this value can mean one.
    unsigned long long as_unsigned "PyLong_AsUnsignedLongLong"(object value) noexcept
    unsigned long long ULLONG_MAX


cdef int check_size(object value, str name, size_t* out) except -1:
    return check_bounded(value, name, _BELOW_WORD, out)


cdef int check_extent(object value, str name, size_t* out) except -1:
    """A size, or a place, in the address space: what native code then refuses with E_OVERFLOW."""
    return check_bounded(value, name, _FITS, out)


cdef int check_bounded(object value, str name, str bound, size_t* out) except -1:
    """A number of bytes. The caller refuses each word that is not within `bound`, the words for a number past all."""
    cdef unsigned long long n
    if PyLong_CheckExact(value):
        n = as_unsigned(value)
        if n != ULLONG_MAX or not PyErr_Occurred():
            out[0] = <size_t>n
            return 0
        PyErr_Clear()
    return check_at_length(value, name, "an integer number of bytes", bound, out)


cdef int check_count(object value, str name, size_t* out) except -1:
    return check_at_length(value, name, "an integer", _BELOW_WORD, out)


cdef int check_at_length(object value, str name, str what, str bound, size_t* out) except -1:
    """What is no exact int, or no size: converted, or the exception that says why not."""
    cdef unsigned long long n
    try:
        number = value.__index__() if not isinstance(value, int) else value
    except (AttributeError, TypeError):
        number = None
    if not isinstance(number, int):
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}")
    try:
        n = number
    except OverflowError:
        # Hexadecimal has no limit on its digits, as decimal has.
        text = number if abs(number) < 1 << 256 else hex(number)[:20] + "..."
        if number < 0:
            raise ValueError(f"{name} must be >= 0, got {text}") from None
        raise OverflowError(f"{name} must {bound}, got {text}") from None
    out[0] = <size_t>n
    return 0


cdef int fail_python(failure* why, object error) noexcept:
    fail(why, E_PYTHON, "python", 0)
    Py_INCREF(error)
    why.exception = <PyObject*>error
    return E_PYTHON
