# cython: language_level=3
"""The page calls of linmem in a C loop: the cost of the operating system alone."""

from linmem._os cimport pages

from linmem._os import pages as _pages


def create_close(size_t total, size_t pre_guard, size_t accessible, long long n):
    """Repeat `n` times: reserve `total` bytes, commit `accessible` of them after `pre_guard`, release all.

    All sizes are multiples of the host page and fit each other. Returns the nanoseconds.
    """
    cdef long long _, took
    cdef char* base
    cdef int code = 0
    with nogil:
        took = -pages.clock_ns()
        for _ in range(n):
            code = pages.reserve(total, False, &base)
            if code:
                break
            if accessible:
                code = pages.commit(base + pre_guard, accessible)
            if code:
                pages.release(base, total)
                break
            code = pages.release(base, total)
            if code:
                break
        took += pages.clock_ns()
    return checked(took, code)


def grow_steps(size_t total, size_t pre_guard, size_t accessible, size_t step, long long n):
    """Commit `step` more bytes `n` times, in one reservation of `total` bytes, from `accessible` on.

    All sizes are multiples of the host page and fit each other. Returns the nanoseconds that the
    `n` commits took, without the reservation before and the release after.
    """
    cdef long long _, took = 0
    cdef char* base
    cdef char* end
    cdef int code, undo
    with nogil:
        code = pages.reserve(total, False, &base)
        if code == 0:
            end = base + pre_guard
            if accessible:
                code = pages.commit(end, accessible)
                end += accessible
            if code == 0:
                took = -pages.clock_ns()
                for _ in range(n):
                    code = pages.commit(end, step)
                    if code:
                        break
                    end += step
                took += pages.clock_ns()
            undo = pages.release(base, total)
            if code == 0:
                code = undo
    return checked(took, code)


cdef object checked(long long took, int code):
    if code:
        text = pages.code_text(code).decode()
        raise OSError(*_pages.os_error_args(code, text))
    return took
