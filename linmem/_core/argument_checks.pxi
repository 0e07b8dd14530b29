# Checks of the arguments that Python code passes; a part of memory.pyx.
#
# The fast paths for a plain int or bool are here. All other paths and the texts of the exceptions are in arguments.py.

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_Clear

from linmem._core import arguments as _checks
from linmem._core.arguments import check_bytes as _check_bytes, check_choice as _check_choice, \
    check_count as _check_count, check_descriptor as _check_descriptor, check_flag as _check_flag, \
    check_name as _check_name, check_pairs as _check_pairs, check_path as _check_path, check_size as _check_size, \
    given as _given, show_size as _show_size, shown as _shown

# Bounds, in the words of messages.
cdef str _WITHIN = "within byte_size()"
cdef str _BELOW_64_BITS = "below 2**64"
cdef str _BELOW_63_BITS = "below 2**63"
cdef str _FITS = "below 2**63, in whole host pages and with its guards"

cdef extern from *:
    bint PyLong_CheckExact(object value) noexcept
    # ULLONG_MAX may mean an error. `noexcept`, because the caller handles that case: it clears the exception.
    unsigned long long as_unsigned "PyLong_AsUnsignedLongLong"(object value) noexcept
    unsigned long long ULLONG_MAX
    Py_ssize_t as_index "PyNumber_AsSsize_t"(object value, void* exception) except? -1  # NULL: clips


# Small, so that the C compiler inlines it into each method. The rare cases are in check_any_size().
cdef inline int check_bounded(object value, str name, str bound, size_t* out) except -1:
    """A number of bytes that 64 bits can hold. The caller refuses a number that is not within `bound`; the words of
    `bound` are for the message about a number that 64 bits cannot hold."""
    cdef unsigned long long n
    if PyLong_CheckExact(value):
        n = as_unsigned(value)
        if n != ULLONG_MAX:
            out[0] = n
            return 0
        PyErr_Clear()
    return check_any_size(value, name, bound, out)


cdef int check_any_size(object value, str name, str bound, size_t* out) except -1:
    out[0] = _check_size(value, name, bound)
    return 0


cdef int check_size(object value, str name, size_t* out) except -1:
    return check_bounded(value, name, _BELOW_64_BITS, out)


cdef int check_extent(object value, str name, size_t* out) except -1:
    """A size or an offset in the address space. If it is too large, native code refuses it with E_OVERFLOW."""
    return check_bounded(value, name, _FITS, out)


cdef int check_optional_size(object value, str name, size_t* out, str bound="below 2**64 - 1") except -1:
    """As check_bounded(); None is SIZE_MAX, which means UNCHOSEN or NO_MAXIMUM."""
    if value is None:
        out[0] = SIZE_MAX
        return 0
    check_bounded(value, name, bound, out)
    if out[0] == SIZE_MAX:      # this value stands for None
        raise OverflowError(f"{name} must be {bound}, got {_shown(value)}")
    return 0


cdef int check_count(object value, str name, size_t* out, str bound="below 2**64") except -1:
    number = _check_count(value, name)
    if number > SIZE_MAX:
        raise OverflowError(f"{name} must be {bound}, got {_shown(number)}")
    out[0] = number
    return 0


cdef int check_flag(object value, str name) except -1:
    if value is not True and value is not False:
        _check_flag(value, name)
    return 0


cdef int check_type(object value, type wanted, str name) except -1:
    if not isinstance(value, wanted):
        article = "an" if wanted is Image else "a"
        raise TypeError(f"{name} must be {article} {wanted.__name__}, got {type(value).__name__}")
    return 0


cdef NativeCreator check_native(object value, str name):
    if not isinstance(value, NativeCreator):
        what = f"the class {value.__name__} itself: call it" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name} must be a NativeCreator (a PythonCreator for one in Python), got {what}")
    return <NativeCreator>value


# -- offsets and ranges of a memory

cdef Py_ssize_t clipped_index(object value, str what) except? -1:
    """An integer; one that Py_ssize_t cannot hold becomes the nearest one that it can hold."""
    try:
        return as_index(value, NULL)
    except TypeError:
        raise TypeError(f"{what}, got {type(value).__name__}") from None


cdef inline bint is_within(memory* m, size_t offset, size_t size) noexcept nogil:
    return offset <= memory_size(m) and size <= memory_size(m) - offset


cdef int fail_range(memory* m, size_t offset, size_t size, failure* why) noexcept nogil:
    return fail_text(why, E_VALUE, "offset + size must be <= byte_size() (%zu), got offset=%zu size=%zu",
                     memory_size(m), offset, size)


cdef inline int check_span(memory* m, size_t offset, size_t size) except -1:
    return 0 if is_within(m, offset, size) else refuse_span(m, offset, size)


cdef int refuse_span(memory* m, size_t offset, size_t size) except -1:
    cdef failure why
    fail_range(m, offset, size, &why)
    return raise_failure(&why)


# -- buffers

cdef int take_bytes(object data, str name, Py_buffer* out) except -1:
    """The contiguous bytes of a buffer, which can all be read. The caller releases the buffer."""
    cdef failure why
    cdef int code
    try:
        PyObject_GetBuffer(data, out, PyBUF_SIMPLE)
    except (TypeError, ValueError, BufferError):
        PyObject_GetBuffer(_check_bytes(data, name), out, PyBUF_SIMPLE)
    if load(&n_protections):
        with nogil:
            code = refuse_foreign(<const char*>out.buf, out.len, READABLE,
                                  "reading the data, which lie in a linmem memory,", &why)
        if code:
            PyBuffer_Release(out)
            raise_failure(&why)
    return 0


def shows_protected(data):
    """See `shows_protected` in linmem._core.arguments."""
    cdef Py_buffer given
    cdef bint answer
    take_bytes(data, "data", &given)
    with nogil:
        answer = find_protected(<const char*>given.buf, given.len) != NULL
    PyBuffer_Release(&given)
    return answer


_checks.shows_protected = shows_protected
