# cython: language_level=3, binding=False
"""linmem's creators as wasmtime's C callbacks.

linmem does not link to wasmtime: the addresses of the C functions come from the library that wasmtime-py loaded. The
structs mirror ``wasmtime_memory_creator_t`` and ``wasmtime_linear_memory_t`` of wasmtime's ``config.h``. A callback
takes the GIL only for the text of an exception that a Python creator raised.
"""

cimport cython
from cpython.contextvars cimport PyContextVar_Get, PyContextVar_New
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport SIZE_MAX, uint8_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free

from linmem._core.atomic cimport add, load, store
from linmem._core.memory cimport (
    OWNER_LEFT, OWNER_WASMTIME, PROTECTION_NONE, UNCHOSEN, Image, Memory, NativeCreator, current_domain,
    deferred_decref, domain as domain_t, domain_of, domain_release, exception_of, fail, failure, failure_text,
    fork_lock, image_of, image_release, image_retain, lock, lock_memory, memory, memory_grow_to, memory_release,
    memory_retain, memory_spec, python_is_ending, raise_later, refuse_make, register_fork_lock, set_domain, unlock,
    window_may_shrink, wrap,
)
from linmem._core.units cimport E_MAXIMUM, E_PYTHON, E_UNSUPPORTED, E_VALUE, atomic_i64

from operator import itemgetter

from linmem._core.arguments import given as _given

ctypedef void wasmtime_error_t
ctypedef void wasm_memorytype_t
ctypedef void wasm_config_t
ctypedef void wasmtime_context_t
ctypedef void wasmtime_instance_t

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

# The C functions of wasmtime that this module calls. bind() fills it once.
cdef struct wasmtime_functions:
    void (*set_creator)(wasm_config_t* config, wasmtime_memory_creator_t* creator) noexcept nogil
    wasmtime_error_t* (*error_new)(const char* message) noexcept nogil
    unsigned char (*is_64)(const wasm_memorytype_t* ty) noexcept nogil
    unsigned char (*is_shared)(const wasm_memorytype_t* ty) noexcept nogil
    uint64_t (*page_size)(const wasm_memorytype_t* ty) noexcept nogil       # NULL in old releases
    # bind_instances() fills the rest once. A wasmtime_extern_t has its kind at 0, and its handle at `extern_of`.
    unsigned char (*export_get)(wasmtime_context_t* context, const wasmtime_instance_t* instance, const char* name,
                                size_t name_size, void* extern) noexcept nogil
    wasmtime_error_t* (*memory_grow)(wasmtime_context_t* context, const void* memory, uint64_t delta,
                                     uint64_t* before) noexcept nogil
    wasmtime_error_t* (*shared_grow)(void* memory, uint64_t delta, uint64_t* before) noexcept nogil
    void (*shared_delete)(void* memory) noexcept nogil
    wasmtime_error_t* (*global_set)(wasmtime_context_t* context, const void* handle, const void* value) noexcept nogil
    size_t extern_of
    size_t value_size

cdef wasmtime_functions wasmtime


# -- the table of memories that wasmtime holds, by base address ------------------------------------

cdef enum:
    EXTERN_GLOBAL = 1           # kinds of a wasmtime_extern_t
    EXTERN_MEMORY = 3
    EXTERN_SHARED_MEMORY = 4    # its handle is a pointer, which the caller must delete
    EXTERN_WORDS = 8            # of 8 bytes, that a wasmtime_extern_t has at most
    BUCKETS = 1 << 12

cdef memory* table[BUCKETS]
cdef memory* call_table[BUCKETS]    # the memories that have a call number, by this number
cdef fork_lock table_lock           # of both tables
register_fork_lock(&table_lock)


cdef inline memory** bucket(char* base) noexcept nogil:
    # A hash of the bits 12 to 47 of the base. The bits below are the same in all bases, which are multiples of a page.
    cdef size_t key = <size_t>base >> 12
    return &table[(key ^ (key >> 12) ^ (key >> 24)) & (BUCKETS - 1)]


cdef void update_table(memory* m, char* base) noexcept nogil:
    """Moves `m` in the table from its former base, m.registered, to `base`. NULL: the memory is not in the table. The
    lock is held for the whole move, so that a child that is forked meanwhile finds the memory."""
    cdef memory** place
    lock(&table_lock.held)
    if m.call and m.registered == NULL:
        place = &call_table[m.call & (BUCKETS - 1)]
        m.call_next = place[0]
        place[0] = m
    elif m.call and base == NULL:
        place = &call_table[m.call & (BUCKETS - 1)]
        while place[0] != m:
            place = &place[0].call_next
        place[0] = m.call_next
    if m.registered != NULL:
        place = bucket(m.registered)
        while place[0] != m:
            place = &place[0].registry_next
        place[0] = m.registry_next
    m.registered = base
    if base != NULL:
        place = bucket(base)
        m.registry_next = place[0]
        place[0] = m
    unlock(&table_lock.held)


# -- images, sizes and creator of the next memories that wasmtime asks for on this thread ------------------

cdef extern from *:
    """
    struct linmem_queue { void *next, *end, *creator; size_t call, requests, surplus, extra; int depth, is_numbered; };
    static LINMEM_OF_THREAD struct linmem_queue linmem_offered;
    static struct linmem_queue *linmem_of_thread(void) { return &linmem_offered; }
    """
    ctypedef struct queue "struct linmem_queue":
        void* next          # a place*: the place of the next memory
        void* end           # a place*: the end of the array
        void* creator       # a borrowed NativeCreator: the argument of the running making(); NULL: none was given
        size_t call         # the number of the running making() or Offer.making() on this thread; 0: none runs
        size_t requests     # how many memories this Offer.making() has been asked for
        size_t surplus      # the number of the first request that took no place, if it is of 0 bytes; else SIZE_MAX
        size_t extra        # how many requests of more than 0 bytes took no place
        int depth           # python_depth() of the code that made the offer
        bint is_numbered    # the memories get the number of the call, so that made_by() finds them

    queue* offered "linmem_of_thread"() noexcept nogil
    ctypedef struct PyThreadState:
        int gilstate_counter        # CPython counts the calls of PyGILState_Ensure() that have not been released
    PyThreadState* PyGILState_GetThisThreadState() noexcept nogil


cdef int python_depth() noexcept nogil:
    """How many calls from C into Python run on this thread.

    Code that wasmtime calls, such as a host function of a start function, has another depth than the code that called
    wasmtime. The memories of an instance that such code makes are not memories of the instance being made.
    """
    cdef PyThreadState* state = PyGILState_GetThisThreadState()
    return 0 if state == NULL else state.gilstate_counter


cdef void take_place(memory_spec* spec, size_t* call, size_t* request) noexcept nogil:
    """Puts the size and the image that the thread's Offer has for the next memory into `spec`; the image is a new
    reference. Stores the number of the call (0: the memory gets no number) and the number of the request.

    wasmtime also makes the GC heap of a store with this creator, before the memories of the first module that needs the
    heap. The minimum of a GC heap is 0. A memory with an image has another minimum, so a GC heap takes no image.
    """
    cdef queue* q = offered()
    cdef place* next = <place*>q.next
    spec.image = NULL
    call[0] = 0
    if (q.next >= q.end and not q.is_numbered) or python_depth() != q.depth:
        return
    if q.is_numbered:
        call[0] = q.call
        request[0] = q.requests
        q.requests += 1
    if q.next >= q.end or next.minimum != spec.minimum:
        if spec.minimum:
            q.extra += 1
        elif q.extra == 0 and q.surplus == SIZE_MAX:
            q.surplus = request[0]
        return
    q.next = next + 1
    image_retain(next.image)
    spec.image = next.image
    spec.minimum = next.size


# The creator of `linmem.wasmtime.use`, for the thread or task. Only threads with a Python state have one.
cdef object chosen_creator = PyContextVar_New("linmem_creator", NULL)
cdef atomic_i64 creator_was_chosen  # a context may have a creator; never reset, because contexts are copied


cdef PyObject* creator_in_context() noexcept with gil:
    """Returns a new reference on the NativeCreator of the present context; NULL if choose() has set none."""
    cdef PyObject* found = NULL
    try:
        PyContextVar_Get(chosen_creator, NULL, &found)
    except BaseException:           # no memory for a context
        return NULL
    if found == <PyObject*>None:    # choose(None)
        Py_DECREF(None)
        return NULL
    return found


# -- callbacks -----------------------------------------------------------------------------------------

cdef wasmtime_error_t* to_error(failure* why) noexcept nogil:
    cdef char text[512]
    # Only Python code that called wasmtime can ask for the cause, so other threads keep no exception.
    cdef bint has_caller = PyGILState_GetThisThreadState() != NULL
    if why.code == E_PYTHON or (has_caller and not python_is_ending()):
        return python_error(why, has_caller)
    failure_text(why, text, sizeof(text))
    return wasmtime.error_new(text)


cdef object note_refusal        # noted_by() stores it


cdef wasmtime_error_t* python_error(failure* why, bint has_caller) noexcept with gil:
    """has_caller: Python code called wasmtime on this thread, and continues when wasmtime returns."""
    cdef object error = None, interrupt = None
    cdef bytes text
    if why.code == E_PYTHON:
        error = <object>why.exception
        Py_DECREF(error)
        text = text_of(error)
        if why.of_signal or not PyErr_GivenExceptionMatches(error, Exception):
            interrupt = error
    else:
        text = refusal_text(why)
    # A signal handler may run in the following Python code. Its exception goes to the caller of wasm.
    try:
        if error is None:
            error = exception_of(why)
        if interrupt is None:
            text = b"%b %b" % (text, note_refusal(error).encode())
    except (MemoryError, RecursionError):
        pass            # the error of wasmtime has no note
    except BaseException as raised:
        interrupt = raised
    if interrupt is not None:
        tell_caller(interrupt, has_caller)
    return wasmtime.error_new(<const char*>text)


cdef void tell_caller(object error, bint has_caller) noexcept:
    """Raises in the caller of wasm what the guest must not handle: KeyboardInterrupt, SystemExit, and what the handler
    of a signal raised. If wasm has no caller in Python, the error is printed."""
    if not has_caller:
        raise error             # Cython prints an exception that leaves a noexcept function
    raise_later(error)


cdef bytes text_of(object error):
    """The name of the class and the text of an exception; only the name if Python code of the class raises."""
    try:
        return f"{type(error).__name__}: {error}".encode("utf-8", "replace")
    except BaseException:
        return Py_TYPE(error).tp_name


cdef bytes refusal_text(failure* why):
    cdef char text[512]
    failure_text(why, text, sizeof(text))
    return text


cdef extern from *:
    ctypedef struct PyTypeObject:
        const char* tp_name
    PyTypeObject* Py_TYPE(object object)
    int PyErr_GivenExceptionMatches(object error, object kind) noexcept


cdef uint8_t* get_memory(void* env, size_t* byte_size, size_t* byte_capacity) noexcept nogil:
    cdef memory* m = <memory*>env
    if m.enters_slowly and m.ops.take_size != NULL:
        m.ops.take_size(m)
    # load(&m.size) is memory_size() without the call into another module.
    byte_size[0] = m.reported if m.reported else <size_t>load(&m.size)
    byte_capacity[0] = m.capacity
    return <uint8_t*>m.base


cdef wasmtime_error_t* grow_memory(void* env, size_t new_size) noexcept nogil:
    cdef memory* m = <memory*>env
    cdef failure why
    cdef int code = 0
    # The start from a snapshot grows a memory to the size in the snapshot. The memory of a file may have grown further.
    if m.reported == 0 or new_size > <size_t>load(&m.size):
        code = memory_grow_to(m, new_size, &why)
    if m.base != m.registered:
        update_table(m, m.base)
    if code:
        return to_error(&why)
    m.reported = 0
    return NULL


cdef void finalize_memory(void* env) noexcept nogil:
    cdef memory* m = <memory*>env
    update_table(m, NULL)
    store(&m.owner, OWNER_LEFT)
    memory_release(m)


cdef wasmtime_error_t* new_memory(void* env, const wasm_memorytype_t* ty, size_t minimum, size_t maximum,
                                  size_t reserved, size_t guard, wasmtime_linear_memory_t* out) noexcept nogil:
    cdef memory_spec spec
    cdef failure why
    cdef memory* m = NULL
    cdef void* creator = offered().creator
    cdef PyObject* in_context = NULL
    cdef size_t call, request = 0
    cdef int code
    spec.minimum = minimum
    spec.maximum = maximum                                  # for wasmtime, too, SIZE_MAX means no maximum
    spec.reservation = reserved if reserved else UNCHOSEN   # 0 means that the Config names no reservation
    spec.guard = guard
    spec.is_64 = wasmtime.is_64(ty)
    spec.is_shared = wasmtime.is_shared(ty)
    take_place(&spec, &call, &request)
    if (creator == NULL and load(&creator_was_chosen) and PyGILState_GetThisThreadState() != NULL
            and not python_is_ending()):
        creator = in_context = creator_in_context()
    spec.watched = False
    spec.may_move = True        # wasmtime itself checks memory_may_move of its Config
    spec.page_size = 65536 if wasmtime.page_size == NULL else wasmtime.page_size(ty)
    if spec.minimum > maximum:
        code = fail(&why, E_MAXIMUM, "new_memory", spec.minimum, 0, maximum)
    else:
        creator = env if creator == NULL else creator
        code = (<NativeCreator>creator).make(&spec, &m, &why)
        # checked_creator() does not see the pools that the function of a RoutingCreator chooses. The memory of a
        # creator in Python has no image, because the bytes of the image are copied.
        if code == 0 and image_of(m) != NULL and image_of(m) != spec.image:
            memory_release(m)
            code = fail(&why, E_VALUE, "new_memory", minimum)
            snprintf(why.detail, sizeof(why.detail), "the memory must not start from an image of its pool, because the"
                     " data of a module would be copied over the image: leave image= out")
        if code:
            refuse_make(<NativeCreator>creator, &spec, &why)
    if in_context != NULL:
        deferred_decref(in_context)
    image_release(spec.image)
    if code:
        return to_error(&why)
    # A Python creator may have kept a handle, and another thread may be growing the memory through it. The lock waits
    # for that growth. A later growth through the handle sees that wasmtime owns the memory, and fails.
    code = lock_memory(m, &why)
    if code == 0:
        if load(&m.protection) != PROTECTION_NONE:      # protected through such a handle
            code = fail(&why, E_UNSUPPORTED, "new_memory", minimum)
            snprintf(why.detail, sizeof(why.detail), "with protected pages: a creator protected pages of the memory"
                     " that it returned")
        elif window_may_shrink(m):
            code = fail(&why, E_UNSUPPORTED, "new_memory", minimum)
            snprintf(why.detail, sizeof(why.detail), "with pages of a file that another program can cut short, which a"
                     " creator mapped into the memory that it returned")
        else:
            store(&m.owner, OWNER_WASMTIME)
            m.reported = minimum if spec.minimum > minimum else 0
        unlock(&m.lock)
    if code:
        memory_release(m)
        return to_error(&why)
    m.call, m.request = call, request
    update_table(m, m.base)
    out.env = m
    out.get_memory = get_memory
    out.grow_memory = grow_memory
    out.finalizer = finalize_memory
    return NULL


cdef void finalize_creator(void* env) noexcept nogil:
    deferred_decref(<PyObject*>env)


# -- functions for Python ----------------------------------------------------------------------------------

def bind(size_t set_creator, size_t error_new, size_t is_64, size_t is_shared, size_t page_size):
    """Store the addresses of wasmtime's C functions. Only `page_size` may be missing (0)."""
    wasmtime.set_creator = <void (*)(wasm_config_t*, wasmtime_memory_creator_t*) noexcept nogil>set_creator
    wasmtime.error_new = <wasmtime_error_t* (*)(const char*) noexcept nogil>error_new
    wasmtime.is_64 = <unsigned char (*)(const wasm_memorytype_t*) noexcept nogil>is_64
    wasmtime.is_shared = <unsigned char (*)(const wasm_memorytype_t*) noexcept nogil>is_shared
    wasmtime.page_size = <uint64_t (*)(const wasm_memorytype_t*) noexcept nogil>page_size


def bind_instances(size_t export_get, size_t memory_grow, size_t shared_grow, size_t shared_delete, size_t global_set,
                   size_t extern_size, size_t extern_of, size_t value_size):
    """Store the addresses of the C functions that `Writes` calls, and the layout of a wasmtime_extern_t."""
    if extern_size > EXTERN_WORDS * 8:
        raise RuntimeError(f"a wasmtime_extern_t has {extern_size} bytes, and linmem has room for {EXTERN_WORDS * 8}")
    wasmtime.export_get = <unsigned char (*)(wasmtime_context_t*, const wasmtime_instance_t*, const char*, size_t,
                                             void*) noexcept nogil>export_get
    wasmtime.memory_grow = <wasmtime_error_t* (*)(wasmtime_context_t*, const void*, uint64_t,
                                                  uint64_t*) noexcept nogil>memory_grow
    wasmtime.shared_grow = <wasmtime_error_t* (*)(void*, uint64_t, uint64_t*) noexcept nogil>shared_grow
    wasmtime.shared_delete = <void (*)(void*) noexcept nogil>shared_delete
    wasmtime.global_set = <wasmtime_error_t* (*)(wasmtime_context_t*, const void*,
                                                 const void*) noexcept nogil>global_set
    wasmtime.extern_of = extern_of
    wasmtime.value_size = value_size


def noted_by(call):
    """call(exception) keeps the exception of each refusal. It returns text for the error of wasmtime."""
    global note_refusal
    note_refusal = call


def set_creator(size_t config, NativeCreator creator not None):
    """Make `creator` the host memory creator of the wasm_config_t at the address `config`.

    The Config and each Engine made from the Config hold a reference on the creator.
    """
    cdef wasmtime_memory_creator_t c
    if wasmtime.set_creator == NULL:
        raise RuntimeError("set_creator() needs the addresses that bind() stores: call bind() first")
    Py_INCREF(creator)
    c.env = <void*>creator
    c.new_memory = new_memory
    c.finalizer = finalize_creator
    wasmtime.set_creator(<wasm_config_t*>config, &c)


def find(size_t base):
    """The Memory at `base` that wasmtime holds, or None."""
    cdef memory* m
    lock(&table_lock.held)
    m = bucket(<char*>base)[0]
    while m != NULL and <size_t>m.registered != base:
        m = m.registry_next
    if m != NULL:
        memory_retain(m)
    unlock(&table_lock.held)
    return None if m == NULL else wrap(m)


def references(Memory handle):
    """The number of references on the memory of a handle: one of its wasmtime store, and one of each open handle.
    Exported buffers keep their handle open."""
    return load(&handle.m.refs)


def choose(creator):
    """Let memories come from `creator`, in this context, until release_choice() gets the result. None: from the
    engine's creator. The choice hides the creator of the making() that runs on this thread."""
    cdef queue* q = offered()
    cdef size_t before = <size_t>q.creator
    if creator is not None:     # else the creation of a memory need not take the GIL to look
        store(&creator_was_chosen, True)
    token = chosen_creator.set(creator)
    q.creator = NULL
    return token, <size_t>q, q.call, before


def release_choice(tuple choice):
    cdef queue* q = offered()
    token, thread, call, before = choice
    chosen_creator.reset(token)
    if <size_t>q == thread and q.call == call:      # else the creator of that making() may not exist any longer
        q.creator = <void*><size_t>before


cdef atomic_i64 last_call


def making(NativeCreator creator, domain, call, *arguments):
    """Return call(*arguments). The memories that wasmtime asks for on this thread meanwhile come from `creator` and
    belong to `domain`. None as the creator: the creator of `linmem.wasmtime.use` or of the engine makes them, also
    inside another making()."""
    return make_with(None, creator, domain, call, arguments)[0]


cdef tuple make_with(Offer offer, NativeCreator creator, domain, call, arguments):
    """Returns the result of call(*arguments), how many images of the offer no memory has taken, the number of the call,
    the first request that took no place if it is of 0 bytes, and how many of more than 0 bytes took no place."""
    cdef queue* q = offered()
    cdef queue before = q[0]        # of a call that this one interrupts, or that has called the host
    cdef domain_t* ours = domain_of(domain)
    cdef domain_t* domain_before = current_domain()
    cdef size_t left = 0, number, surplus, extra
    number = q.call = <size_t>add(&last_call, 1)
    q.creator = NULL if creator is None else <void*>creator
    q.requests = 0
    q.surplus = SIZE_MAX
    q.extra = 0
    q.is_numbered = offer is not None
    q.next = q.end = NULL
    set_domain(ours)
    try:
        if offer is not None:
            offer.begin()
        result = call(*arguments)
    finally:
        if offer is not None:
            left = offer.end()
        surplus, extra = q.surplus, q.extra
        q[0] = before
        set_domain(domain_before)
        domain_release(ours)
    return result, left, number, None if surplus == SIZE_MAX else surplus, extra


def made_by(size_t call):
    """The memories that Offer.making() with the number `call` was asked for, and that wasmtime still holds.

    Returns pairs of the number of the request, from 0, and the Memory, in the order of the requests.
    """
    cdef memory** found
    cdef memory* m
    cdef size_t i, n = of_call(call, NULL, 0)
    cdef list made = []
    found = <memory**>calloc(n + 1, sizeof(void*))
    if found == NULL:
        raise MemoryError("no memory for the list of the memories of an instance")
    if n:
        n = of_call(call, found, n)
    try:
        for i in range(n):
            number = found[i].request
            m, found[i] = found[i], NULL
            made.append((number, wrap(m)))
    finally:
        for i in range(n):
            if found[i] != NULL:
                memory_release(found[i])
        free(found)
    made.sort(key=itemgetter(0))
    return made


cdef size_t of_call(size_t call, memory** found, size_t room) noexcept nogil:
    """Stores at most `room` memories with the number `call`, each with a new reference. Returns how many there are, or
    how many were stored if `room` is not 0."""
    cdef memory* m
    cdef size_t n = 0
    lock(&table_lock.held)
    m = call_table[call & (BUCKETS - 1)]
    while m != NULL and (n < room or room == 0):
        if m.call == call:
            if room:
                memory_retain(m)
                found[n] = m
            n += 1
        m = m.call_next
    unlock(&table_lock.held)
    return n


@cython.final
cdef class Offer:
    """The images that the memories of one instance start from.

    During `making`, the memories that wasmtime asks for on this thread start from these images. Memories of other
    instances, which the host makes when wasm calls it, do not.

    Parameters
    ----------
    places : iterable of (int, Image or None) or (int, Image or None, int)
        The minimum in bytes, the image and the size (by default the minimum) of each memory, in the order in which
        wasmtime asks for them. wasmtime is told the minimum until it grows the memory to the size.
    """

    def __cinit__(self, *args, **kwargs):
        cdef place* next
        places, = _given("Offer", ("places",), {}, args, kwargs)
        self.images = tuple(places)
        self.n = <size_t>len(self.images)
        self.places = next = <place*>calloc(self.n + 1, sizeof(place))
        if next == NULL:
            raise MemoryError("no memory for an offer of images")
        for given in self.images:
            minimum, img, size = given if len(given) == 3 else (*given, given[0])
            if img is not None and not isinstance(img, Image):
                raise TypeError(f"images must be Images or None, got {type(img).__name__}")
            next.minimum = minimum
            next.size = size
            next.image = NULL if img is None else (<Image>img).img
            next += 1

    def __dealloc__(self):
        free(self.places)

    def __reduce__(self):
        raise TypeError("an Offer cannot be pickled or copied: it belongs to a thread of this process")

    def making(self, creator, domain, call, *arguments):
        """As the function `making`; the memories that wasmtime asks for take the images.

        Returns
        -------
        tuple
            The result of call(*arguments); how many images no memory has taken; the number of this call, for
            `made_by`; the number of the first request that took no place, or None if it is of more than 0 bytes or if
            there is none; and how many requests of more than 0 bytes took no place.
        """
        return make_with(self, creator, domain, call, arguments)

    cdef bint begin(self) noexcept nogil:
        cdef queue* q = offered()
        if q.next < q.end:
            return False
        q.depth = python_depth()
        q.next = self.places
        q.end = self.places + self.n
        return True

    cdef size_t end(self) noexcept nogil:
        cdef queue* q = offered()
        cdef place* next = <place*>q.next
        cdef size_t left = 0
        while next < <place*>q.end:
            left += next.image != NULL
            next += 1
        q.next = q.end
        return left


@cython.final
cdef class Writes:
    """Growths of memories and values of globals that a new instance gets. No wasm code runs.

    Parameters
    ----------
    given : iterable of (bytes, int or bytes)
        The name of an export, and the wasm pages by which the memory grows, or the wasmtime_val_t of the global.
    """

    def __cinit__(self, *args, **kwargs):
        cdef write* next
        cdef bytes name, value
        given, = _given("Writes", ("given",), {}, args, kwargs)
        self.given = tuple([(name, what) for name, what in given])
        self.n = <size_t>len(self.given)
        self.writes = next = <write*>calloc(self.n + 1, sizeof(write))
        if next == NULL:
            raise MemoryError("no memory for the state of an instance")
        for name, what in self.given:
            next.name = name
            next.name_size = <size_t>len(name)
            if isinstance(what, bytes):
                value = what
                if <size_t>len(value) != wasmtime.value_size:
                    raise ValueError(f"a value must have {wasmtime.value_size} bytes, got {len(value)}")
                next.value = <const char*>value
            else:
                next.delta = what
            next += 1

    def __dealloc__(self):
        free(self.writes)

    def __reduce__(self):
        raise TypeError("Writes cannot be pickled or copied: they belong to the wasmtime of this process")

    def apply(self, size_t context, size_t instance):
        """Do all of it in the instance at the address `instance`, or stop at the first refusal.

        Returns None; or the index of the refused write and the address of the wasmtime_error_t, which is the caller's
        (0: the instance has no such export).
        """
        cdef wasmtime_error_t* error = NULL
        cdef size_t i
        if self.n == 0:
            return None
        with nogil:
            i = self.write_all(<wasmtime_context_t*>context, <wasmtime_instance_t*>instance, &error)
        return None if i == self.n else (i, <size_t>error)

    cdef size_t write_all(self, void* context, void* instance, void** error) noexcept nogil:
        cdef uint64_t[EXTERN_WORDS] found
        cdef const char* handle = <const char*>found + wasmtime.extern_of
        cdef uint64_t before
        cdef write* next
        cdef unsigned char kind
        cdef size_t i
        for i in range(self.n):
            next = self.writes + i
            if not wasmtime.export_get(context, instance, next.name, next.name_size, found):
                return i
            kind = (<unsigned char*>found)[0]
            if next.value != NULL and kind == EXTERN_GLOBAL:
                error[0] = wasmtime.global_set(context, handle, next.value)
            elif next.value == NULL and kind == EXTERN_MEMORY:
                error[0] = wasmtime.memory_grow(context, handle, next.delta, &before)
            elif next.value == NULL and kind == EXTERN_SHARED_MEMORY:
                error[0] = wasmtime.shared_grow((<void**>handle)[0], next.delta, &before)
                wasmtime.shared_delete((<void**>handle)[0])
            else:
                return i
            if error[0] != NULL:
                return i
        return self.n
