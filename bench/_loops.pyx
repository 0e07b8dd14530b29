# cython: language_level=3, binding=False
"""Loops over page calls, memories and instances. They run without Python and without the GIL, so the figures do not
contain the time of Python.

The module does not link wasmtime: `bind` takes the addresses of wasmtime's C functions.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from linmem._core.bridge cimport Offer
from linmem._core.memory cimport (
    UNCHOSEN, NativeCreator, failure, memory, memory_release, memory_spec, raise_failure,
)
from linmem._os cimport pages

from linmem._os import pages as _pages


# -- page calls ------------------------------------------------------------------------------------

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


# -- memories --------------------------------------------------------------------------------------

def use_memories(NativeCreator creator not None, size_t size, touches not None, ends not None, long long n):
    """Repeat `n` times: make a memory of `size` bytes, write one byte at each touch, release the memory.

    `touches` and `ends` are contiguous arrays of 64-bit integers: use i writes at the offsets
    touches[ends[i - 1]:ends[i]]; the last use of `ends` is followed by the first use. Returns the
    nanoseconds taken.
    """
    cdef Py_buffer at, end
    cdef long long took
    cdef failure why
    cdef int code
    PyObject_GetBuffer(touches, &at, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(ends, &end, PyBUF_SIMPLE)
        try:
            check_touches(<const uint64_t*>at.buf, at.len // 8, <const uint64_t*>end.buf, end.len // 8, size)
            with nogil:
                code = use(creator, size, <const uint64_t*>at.buf, <const uint64_t*>end.buf, end.len // 8, n,
                           &took, &why)
        finally:
            PyBuffer_Release(&end)
    finally:
        PyBuffer_Release(&at)
    if code:
        raise_failure(&why)
    return took


cdef int check_touches(const uint64_t* at, size_t touches, const uint64_t* ends, size_t uses, size_t size) except -1:
    # The loop does not check the offsets. A write beyond a memory would crash, or corrupt other data.
    cdef size_t i
    cdef uint64_t last = 0
    if uses == 0:
        raise ValueError("ends must have one use at least")
    for i in range(uses):
        if ends[i] < last or ends[i] > touches:
            raise ValueError(f"ends must ascend up to {touches}, got {ends[i]} after {last}")
        last = ends[i]
    for i in range(touches):
        if at[i] >= size:
            raise ValueError(f"touches must be below {size}, got {at[i]}")
    return 0


cdef int use(NativeCreator creator, size_t size, const uint64_t* at, const uint64_t* ends, size_t uses, long long n,
             long long* took, failure* why) noexcept nogil:
    cdef memory_spec spec
    cdef memory* m
    cdef volatile char* base        # volatile, so that the compiler keeps writes to a memory that is then released
    cdef size_t i = 0
    cdef uint64_t k = 0
    cdef long long _
    cdef int code
    spec.minimum = size
    spec.maximum = size
    spec.reservation = UNCHOSEN
    spec.guard = 65536
    spec.page_size = 1
    spec.is_64 = True
    spec.is_shared = False
    spec.image = NULL
    spec.watched = False
    spec.may_move = False
    took[0] = -pages.clock_ns()
    for _ in range(n):
        code = creator.make(&spec, &m, why)
        if code:
            return code
        base = <volatile char*>m.base
        while k < ends[i]:
            base[at[k]] = 1
            k += 1
        memory_release(m)
        i += 1
        if i == uses:
            i = 0
            k = 0
    took[0] += pages.clock_ns()
    return 0


def fill(size_t size, long long n):
    """Fill `size` private bytes `n` times, as work that shares nothing. Returns the nanoseconds."""
    cdef uint8_t* at = <uint8_t*>malloc(size)
    cdef volatile uint8_t* seen = at        # reads one byte after each fill, so that the compiler keeps the fill
    cdef long long i, took
    cdef size_t total = 0
    if at == NULL:
        raise MemoryError
    with nogil:
        took = -pages.clock_ns()
        for i in range(n):
            memset(at, <int>(i & 127), size)
            total += seen[<size_t>i % size]
        took += pages.clock_ns()
    free(at)
    return took


# -- futexes ---------------------------------------------------------------------------------------

cdef enum:
    READY = 8                   # indices as in share.py
    AWOKE = 16
    SETTLED = 50_000            # ns after which a thread that said that it will sleep sleeps

cdef long long PATIENCE = 10_000_000_000        # ns


cdef int until(volatile long long* words, long long turn) noexcept nogil:
    """Spin until the other process is ready for a turn. -1: it is not, after PATIENCE."""
    cdef long long last = pages.clock_ns() + PATIENCE
    while words[READY] < turn:
        if pages.clock_ns() > last:
            return -1
    return 0


cdef void settle() noexcept nogil:
    cdef long long last = pages.clock_ns() + SETTLED
    while pages.clock_ns() < last:
        pass


cdef int sleep_while(volatile int* word, int value) noexcept nogil:
    cdef int code = 0
    while code == 0 and word[0] == value:
        code = pages.wait_while_equal(<int*>word, value, PATIENCE)
    return code


cdef class Words:
    """A buffer of words of another process."""
    cdef Py_buffer view
    cdef long long* at

    def __cinit__(self, buffer):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_SIMPLE)
        if self.view.len < (AWOKE + 1) * 8:
            raise ValueError("the buffer is too small")
        self.at = <long long*>self.view.buf

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


def until_ready(buffer, long long turn, bint settles=True):
    """Wait, without sleeping, until the other process has said that it is ready for `turn`."""
    cdef Words words = Words(buffer)
    cdef int code
    with nogil:
        code = until(words.at, turn)
        if code == 0 and settles:
            settle()
    if code:
        raise RuntimeError("the other process has ended or hangs")


def futex_wait(buffer, int value):
    """Sleep while the first word has the value."""
    cdef Words words = Words(buffer)
    cdef int code
    with nogil:
        code = sleep_while(<int*>words.at, value)
    checked(0, code)


def futex_wake(buffer, int value):
    """Set the first word, and wake the process that sleeps on it."""
    cdef Words words = Words(buffer)
    cdef int woken, code
    with nogil:
        (<volatile int*>words.at)[0] = value
        code = pages.wake_waiters(<int*>words.at, 1, &woken)
    checked(0, code)


def sleep_rounds(buffer, long long n):
    """Be woken `n` times by wake_rounds()."""
    cdef Words words = Words(buffer)
    cdef volatile long long* at = words.at
    cdef long long turn
    cdef int code = 0
    with nogil:
        for turn in range(1, n):
            at[READY] = turn
            code = sleep_while(<int*>words.at, <int>(turn - 1))
            at[AWOKE] = pages.clock_ns()
            if code:
                break
    checked(0, code)


def wake_rounds(buffer, long long first, long long n):
    """Wake sleep_rounds() `n` times. Returns the nanoseconds from each wake to the return in the other process."""
    cdef Words words = Words(buffer)
    cdef volatile long long* at = words.at
    cdef long long turn, began, took = 0
    cdef int woken, code = 0, late = 0
    with nogil:
        for turn in range(first, first + n):
            late = until(at, turn)
            if late:
                break
            settle()
            began = pages.clock_ns()
            (<volatile int*>at)[0] = <int>turn
            code = pages.wake_waiters(<int*>words.at, 1, &woken)
            late = until(at, turn + 1)
            if code or late:
                break
            took += at[AWOKE] - began
    if late:
        raise RuntimeError("the other process has ended or hangs")
    return checked(took, code)


# -- instances -------------------------------------------------------------------------------------

cdef struct byte_vec:       # wasm_byte_vec_t
    size_t size
    char* data

cdef struct wasmtime_functions:
    void* (*store_new)(void* engine, void* data, void* finalizer) noexcept nogil
    void* (*store_context)(void* store) noexcept nogil
    void (*store_delete)(void* store) noexcept nogil
    void* (*instance_new)(void* context, const void* module, const void* imports, size_t n, void* out,
                          void** trap) noexcept nogil
    void (*error_message)(const void* error, byte_vec* out) noexcept nogil
    void (*error_delete)(void* error) noexcept nogil
    void (*trap_message)(const void* trap, byte_vec* out) noexcept nogil
    void (*trap_delete)(void* trap) noexcept nogil
    void (*bytes_delete)(byte_vec* bytes) noexcept nogil

cdef wasmtime_functions wasmtime

FUNCTIONS = ("wasmtime_store_new", "wasmtime_store_context", "wasmtime_store_delete", "wasmtime_instance_new",
             "wasmtime_error_message", "wasmtime_error_delete", "wasm_trap_message", "wasm_trap_delete",
             "wasm_byte_vec_delete")


def bind(dict addresses not None):
    """Take the address of each of FUNCTIONS."""
    cdef size_t[9] at
    cdef size_t i
    for i in range(9):
        at[i] = addresses[FUNCTIONS[i]]
        if at[i] == 0:
            raise ValueError(f"{FUNCTIONS[i]} has no address")
    wasmtime.store_new = <void* (*)(void*, void*, void*) noexcept nogil>at[0]
    wasmtime.store_context = <void* (*)(void*) noexcept nogil>at[1]
    wasmtime.store_delete = <void (*)(void*) noexcept nogil>at[2]
    wasmtime.instance_new = <void* (*)(void*, const void*, const void*, size_t, void*, void**) noexcept nogil>at[3]
    wasmtime.error_message = <void (*)(const void*, byte_vec*) noexcept nogil>at[4]
    wasmtime.error_delete = <void (*)(void*) noexcept nogil>at[5]
    wasmtime.trap_message = <void (*)(const void*, byte_vec*) noexcept nogil>at[6]
    wasmtime.trap_delete = <void (*)(void*) noexcept nogil>at[7]
    wasmtime.bytes_delete = <void (*)(byte_vec*) noexcept nogil>at[8]


def instantiate(size_t engine, size_t module, long long n, Offer offer=None):
    """Repeat `n` times: make a store, instantiate a module without imports, drop the store.

    `engine` and `module` are the addresses of the wasm_engine_t and the wasmtime_module_t; each instance's
    memories start from the images of `offer`. Returns the nanoseconds. Raises RuntimeError with the text of a
    wasm trap or of an error of wasmtime, or if no memory took the images.
    """
    cdef long long _, took
    cdef size_t left = 0
    cdef bint offering = offer is not None
    cdef void* store
    cdef void* error = NULL
    cdef void* trap = NULL
    cdef uint64_t[8] instance       # a wasmtime_instance_t has 16 bytes; the rest is spare
    if wasmtime.store_new == NULL:
        raise RuntimeError("bind() comes first")
    with nogil:
        took = -pages.clock_ns()
        for _ in range(n):
            store = wasmtime.store_new(<void*>engine, NULL, NULL)
            if offering and not offer.begin():
                left = 1
            else:
                error = wasmtime.instance_new(wasmtime.store_context(store), <const void*>module, NULL, 0, instance,
                                              &trap)
                if offering:
                    left = offer.end()
            wasmtime.store_delete(store)
            if error != NULL or trap != NULL or left:
                break
        took += pages.clock_ns()
    if error != NULL or trap != NULL:
        raise RuntimeError(text_of(error, trap))
    if left:
        raise RuntimeError("an instance was made without its images")
    return took


cdef str text_of(void* error, void* trap):
    """Return the text of an error, or of a trap if `error` is NULL. Frees the error or the trap."""
    cdef byte_vec text
    if error != NULL:
        wasmtime.error_message(error, &text)
        wasmtime.error_delete(error)
    else:
        wasmtime.trap_message(trap, &text)
        wasmtime.trap_delete(trap)
    try:
        return text.data[:text.size].rstrip(b"\0").decode("utf-8", "replace")
    finally:
        wasmtime.bytes_delete(&text)
