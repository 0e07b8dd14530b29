# cython: language_level=3
"""linmem's creators as wasmtime's C callbacks. Floor 4.

Nothing is linked: the addresses of the C functions come from the library that wasmtime-py loaded.
Mirrors ``wasmtime_memory_creator_t`` and ``wasmtime_linear_memory_t`` of wasmtime's ``config.h``.
No callback takes the GIL, unless a Python creator raised and its text is wanted.
"""

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint8_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free

from linmem._core.atomic cimport load, store
from linmem._core.memory cimport (
    OWNER_LEFT, OWNER_WASMTIME, PROTECTION_NONE, UNCHOSEN, Image, NativeCreator, acquire, current_domain,
    domain as domain_t, domain_of, domain_release, drop_object, fail, failure, failure_text, fork_lock, image,
    image_release, image_retain, list_lock, lock_memory, memory, memory_grow_to, memory_release, memory_retain,
    memory_size, memory_spec, set_domain, unlock, wrap,
)
from linmem._core.units cimport E_PYTHON, E_UNSUPPORTED

from linmem._core.arguments import given as _given

ctypedef void wasmtime_error_t
ctypedef void wasm_memorytype_t
ctypedef void wasm_config_t

cdef struct wasmtime_linear_memory_t:
    void* env
    uint8_t* (*get_memory)(void* env, size_t* byte_size, size_t* byte_capacity) noexcept nogil
    wasmtime_error_t* (*grow_memory)(void* env, size_t new_size) noexcept nogil
    void (*finalizer)(void* env) noexcept nogil

cdef struct wasmtime_memory_creator_t:
    void* env
    wasmtime_error_t* (*new_memory)(void* env, const wasm_memorytype_t* ty, size_t minimum, size_t maximum,
                                    size_t reserved, size_t guard,
                                    wasmtime_linear_memory_t* out) noexcept nogil
    void (*finalizer)(void* env) noexcept nogil

# The C functions of wasmtime that are called from here; filled once by bind().
cdef struct wasmtime_functions:
    void (*set_creator)(wasm_config_t* config, wasmtime_memory_creator_t* creator) noexcept nogil
    wasmtime_error_t* (*error_new)(const char* message) noexcept nogil
    unsigned char (*is_64)(const wasm_memorytype_t* ty) noexcept nogil
    unsigned char (*is_shared)(const wasm_memorytype_t* ty) noexcept nogil
    uint64_t (*page_size)(const wasm_memorytype_t* ty) noexcept nogil       # NULL before custom page sizes

cdef wasmtime_functions wasmtime


# -- the table of memories that wasmtime holds, by base address ------------------------------------

cdef enum:
    BUCKETS = 1 << 12

cdef memory* table[BUCKETS]
cdef fork_lock table_lock
list_lock(&table_lock)


cdef inline memory** bucket(char* base) noexcept nogil:
    # Bases differ above the 64 KiB of the smallest memory with its guard; the rest is folded in.
    cdef size_t key = <size_t>base >> 12
    return &table[(key ^ (key >> 12) ^ (key >> 24)) & (BUCKETS - 1)]


cdef void enter_table(memory* m) noexcept nogil:
    acquire(&table_lock.held)
    put_in_table(m)
    unlock(&table_lock.held)


cdef void leave_table(memory* m) noexcept nogil:
    acquire(&table_lock.held)
    take_out_of_table(m)
    unlock(&table_lock.held)


cdef void move_in_table(memory* m) noexcept nogil:
    """At once: a child that is forked meanwhile finds the memory, too."""
    acquire(&table_lock.held)
    take_out_of_table(m)
    put_in_table(m)
    unlock(&table_lock.held)


cdef inline void put_in_table(memory* m) noexcept nogil:
    cdef memory** head = bucket(m.base)
    m.registered = m.base
    m.registry_next = head[0]
    head[0] = m


cdef inline void take_out_of_table(memory* m) noexcept nogil:
    cdef memory** link = bucket(m.registered)
    while link[0] != NULL:
        if link[0] == m:
            link[0] = m.registry_next
            break
        link = &link[0].registry_next


# -- images for the memories that this thread will ask for next ------------------------------------

cdef extern from *:
    """
    typedef struct { void *next, *end, *of; } linmem_queue;
    static LINMEM_OF_THREAD linmem_queue linmem_offered;
    static linmem_queue *linmem_of_thread(void) { return &linmem_offered; }
    """
    ctypedef struct queue "linmem_queue":
        void* next          # place* of memories yet to come
        void* end
        void* of            # the Offer, with a reference; NULL: there is none, or its maker holds it

    queue* offered "linmem_of_thread"() noexcept nogil


cdef void next_image(size_t minimum, image** out) noexcept nogil:
    """What is offered on this thread for the next memory, with its reference, or NULL.

    wasmtime makes a store's GC heap before the memories of the first module that needs it, out of this creator
    too. Its minimum is 0; that of a memory that takes an image is not, so nothing can be taken by the wrong one.
    """
    cdef queue* q = offered()
    cdef place* its = <place*>q.next
    if q.next < q.end and its.minimum == minimum:
        out[0] = its.image
        q.next = its + 1
        image_retain(out[0])


# -- callbacks -----------------------------------------------------------------------------------------

cdef wasmtime_error_t* to_error(failure* why) noexcept nogil:
    cdef char text[512]
    if why.code == E_PYTHON:
        return python_error(why, PyGILState_GetThisThreadState() != NULL)
    failure_text(why, text, sizeof(text))
    return wasmtime.error_new(text)


cdef wasmtime_error_t* python_error(failure* why, bint is_pythons) noexcept with gil:
    """is_pythons: Python called wasmtime on this thread, and goes on when that returns."""
    cdef object error = <object>why.exception
    cdef bytes text
    Py_DECREF(error)
    try:
        text = f"{type(error).__name__}: {error}".encode("utf-8", "replace")
    except BaseException:
        text = type(error).__name__.encode("utf-8", "replace")
    if not isinstance(error, Exception):
        raise_later(error, is_pythons)
    return wasmtime.error_new(<const char*>text)


cdef extern from *:
    void* PyGILState_GetThisThreadState() noexcept nogil
    unsigned long PyThread_get_thread_ident() noexcept nogil
    int PyThreadState_SetAsyncExc(unsigned long thread, PyObject* exception) except -1


cdef void raise_later(object error, bint is_pythons) noexcept:
    """KeyboardInterrupt, SystemExit and their like are not for the guest: the next Python code that this thread runs
    raises `error` itself. That is the caller of wasm, or a host function or a creator that wasm calls before; from
    there it comes up the same way again."""
    if not is_pythons:
        raise error             # Cython prints what a function that cannot raise has raised
    # CPython asks for a class, and calls the class for the exception; it must be one that `except` knows. The class may
    # live for ever (classes do in some builds without a GIL), so it gives the exception away. CPython 3.10 calls the
    # class again with the exception that it gave.
    kept = [error]
    members = {"__new__": lambda _, given=None: kept.pop() if kept else given}
    try:
        again = type(type(error).__name__, (type(error),), members)
    except Exception:       # a class that refuses to be subclassed
        again = type(type(error).__name__, (BaseException,), members)
    PyThreadState_SetAsyncExc(PyThread_get_thread_ident(), <PyObject*>again)


cdef uint8_t* get_memory(void* env, size_t* byte_size, size_t* byte_capacity) noexcept nogil:
    cdef memory* m = <memory*>env
    byte_size[0] = memory_size(m)
    byte_capacity[0] = m.capacity
    return <uint8_t*>m.base


cdef wasmtime_error_t* grow_memory(void* env, size_t new_size) noexcept nogil:
    cdef memory* m = <memory*>env
    cdef failure why
    cdef int code = memory_grow_to(m, new_size, &why)
    if m.base != m.registered:
        move_in_table(m)
    return to_error(&why) if code else NULL


cdef void finalize_memory(void* env) noexcept nogil:
    cdef memory* m = <memory*>env
    leave_table(m)
    store(&m.owner, OWNER_LEFT)
    memory_release(m)


cdef wasmtime_error_t* new_memory(void* env, const wasm_memorytype_t* ty, size_t minimum, size_t maximum,
                                  size_t reserved, size_t guard, wasmtime_linear_memory_t* out) noexcept nogil:
    cdef memory_spec spec
    cdef failure why
    cdef memory* m = NULL
    cdef int code
    spec.minimum = minimum
    spec.maximum = maximum                                  # no maximum arrives as SIZE_MAX, ours too
    spec.reservation = reserved if reserved else UNCHOSEN   # the Config's 0 is "none given"
    spec.guard = guard
    spec.is_64 = wasmtime.is_64(ty)
    spec.is_shared = wasmtime.is_shared(ty)
    spec.image = NULL
    spec.watched = False
    spec.may_move = True        # wasmtime refuses itself what its config's memory_may_move forbids
    spec.page_size = 65536 if wasmtime.page_size == NULL else wasmtime.page_size(ty)
    next_image(minimum, &spec.image)
    code = (<NativeCreator>env).make(&spec, &m, &why)
    image_release(spec.image)
    if code:
        return to_error(&why)
    code = lock_memory(m, &why)     # a growth from Python is over, or finds who owns it now
    if code:
        memory_release(m)
        return to_error(&why)
    if load(&m.protection) != PROTECTION_NONE:      # a Python creator kept a handle, and has used it since
        code = fail(&why, E_UNSUPPORTED, "new_memory", minimum)
        snprintf(why.detail, sizeof(why.detail), "with protected pages: a creator protected pages of the memory that it"
                 " returned")
    else:
        store(&m.owner, OWNER_WASMTIME)
    unlock(&m.lock)
    if code:
        memory_release(m)
        return to_error(&why)
    enter_table(m)
    out.env = m
    out.get_memory = get_memory
    out.grow_memory = grow_memory
    out.finalizer = finalize_memory
    return NULL


cdef void finalize_creator(void* env) noexcept nogil:
    drop_object(<PyObject*>env)


# -- what Python calls ------------------------------------------------------------------------------------

def bind(size_t set_creator, size_t error_new, size_t is_64, size_t is_shared, size_t page_size):
    """Take the addresses of wasmtime's C functions; only the last may be missing (0)."""
    wasmtime.set_creator = <void (*)(wasm_config_t*, wasmtime_memory_creator_t*) noexcept nogil>set_creator
    wasmtime.error_new = <wasmtime_error_t* (*)(const char*) noexcept nogil>error_new
    wasmtime.is_64 = <unsigned char (*)(const wasm_memorytype_t*) noexcept nogil>is_64
    wasmtime.is_shared = <unsigned char (*)(const wasm_memorytype_t*) noexcept nogil>is_shared
    wasmtime.page_size = <uint64_t (*)(const wasm_memorytype_t*) noexcept nogil>page_size


def set_creator(size_t config, NativeCreator creator not None):
    """Make `creator` the host memory creator of the wasm_config_t at the address `config`.

    The Config, then each Engine made from it, holds a reference on the creator.
    """
    cdef wasmtime_memory_creator_t c
    if wasmtime.set_creator == NULL:
        raise RuntimeError("bind() comes first")
    Py_INCREF(creator)
    c.env = <void*>creator
    c.new_memory = new_memory
    c.finalizer = finalize_creator
    wasmtime.set_creator(<wasm_config_t*>config, &c)


def find(size_t base):
    """The Memory that wasmtime holds at `base`, or None."""
    cdef memory* m
    acquire(&table_lock.held)
    m = bucket(<char*>base)[0]
    while m != NULL and <size_t>m.registered != base:
        m = m.registry_next
    if m != NULL:
        memory_retain(m)
    unlock(&table_lock.held)
    return None if m == NULL else wrap(m)


ctypedef domain_t* domain_ptr


def in_domain(domain, call):
    """call(), where the memories that wasmtime asks for on this thread are of `domain`."""
    cdef domain_ptr ours = domain_of(domain), before = current_domain()
    set_domain(ours)
    try:
        return call()
    finally:
        set_domain(before)
        domain_release(ours)


@cython.final
cdef class Offer:
    """Images for the memories of one instance: what each of them starts from.

    Between make() and take_back() the creators that wasmtime asks on this thread follow it.

    Parameters
    ----------
    places : iterable of (int, Image or None)
        For each memory that will be asked for, in that order, its minimum in bytes and its image.
    """

    def __init__(self, *args, **kwargs):
        cdef size_t i
        places, = _given("Offer", ("places",), {}, args, kwargs)
        cdef list given = list(places)
        if self.places != NULL:
            raise RuntimeError("an Offer is made once")
        for _, one in given:
            if one is not None and not isinstance(one, Image):
                raise TypeError(f"images must be Images or None, got {type(one).__name__}")
        self.places = <place*>calloc(<size_t>len(given) + 1, sizeof(place))
        if self.places == NULL:
            raise MemoryError("no memory for an offer of images")
        for i in range(<size_t>len(given)):
            self.places[i].minimum = given[i][0]
            self.places[i].image = NULL if given[i][1] is None else (<Image>given[i][1]).it
        self.images = tuple(given)
        self.n = <size_t>len(given)

    def __dealloc__(self):
        free(self.places)

    def __reduce__(self):
        raise TypeError("an Offer cannot be pickled or copied: it belongs to a thread of this process")

    def make(self):
        """Offer the images on this thread, once. The caller sees to it that take_back() follows.

        False: others are on offer here that are not used up, and stay so.
        """
        cdef queue* q = offered()
        if q.next < q.end:
            return False
        end_offer(q)
        Py_INCREF(self)
        q.of = <void*>self
        return self.begin()

    def take_back(self):
        """End the offer; how many of its images no memory has taken."""
        cdef queue* q = offered()
        cdef size_t left
        if q.of != <void*>self:     # all were taken, and an instance that was made meanwhile had an offer of its own
            return 0
        left = self.end()
        end_offer(q)
        return left

    cdef bint begin(self) noexcept nogil:
        cdef queue* q = offered()
        if q.next < q.end:
            return False
        q.next = self.places
        q.end = self.places + self.n
        return True

    cdef size_t end(self) noexcept nogil:
        cdef queue* q = offered()
        cdef place* its = <place*>q.next
        cdef size_t left = 0
        while its < <place*>q.end:
            left += its.image != NULL
            its += 1
        q.next = q.end
        return left


cdef void end_offer(queue* q) noexcept:
    cdef object of
    if q.of != NULL:
        of = <object>q.of
        q.of = q.next = q.end = NULL
        Py_DECREF(of)
