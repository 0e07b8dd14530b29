# Domains: names that separate the users of a pool. Also the request that a Python creator is handling on this thread. A
# part of memory.pyx.

ctypedef domain* domain_ptr

cdef enum:
    DOMAIN_BUCKETS = 256

cdef domain* domains[DOMAIN_BUCKETS]
cdef fork_lock domains_lock
register_fork_lock(&domains_lock)

# For each thread: `making` is the domain of the memory that the thread is making. `may_move` and `domain` belong to the
# request for which the thread is running new_memory() of a Python creator.
cdef extern from *:
    """
    typedef struct { int may_move; void *domain, *making; } linmem_requests_t;
    static LINMEM_OF_THREAD linmem_requests_t linmem_requests;
    static linmem_requests_t *linmem_requests_of_thread(void) { return &linmem_requests; }
    """
    ctypedef struct requests_t "linmem_requests_t":
        bint may_move
        void* domain
        void* making

    requests_t* thread_requests "linmem_requests_of_thread"() noexcept nogil


cdef domain* current_domain() noexcept nogil:
    """The domain of the memory that this thread is making, a borrowed reference; NULL: the request names no domain."""
    return <domain*>thread_requests().making


cdef void set_domain(domain* d) noexcept nogil:
    thread_requests().making = d


cdef domain* domain_of(object name) except? NULL:
    """Returns a new reference on the domain with that name; NULL for None."""
    cdef bytes text
    cdef domain* made
    cdef domain** link
    if name is None:
        return NULL
    if not isinstance(name, str):
        raise TypeError(f"domain must be a str or None, got {type(name).__name__}")
    text = (<str>name).encode("utf-8", "surrogatepass")
    made = <domain*>calloc(1, sizeof(domain) + <size_t>len(text) + 1)
    if made == NULL:
        raise MemoryError("no memory for the name of a domain")
    made.hash = <size_t>hash(text)
    made.size = <size_t>len(text)
    made.name = <char*>made + sizeof(domain)
    memcpy(made.name, <const char*>text, made.size)
    with nogil:
        lock(&domains_lock.held)
        link = &domains[made.hash % DOMAIN_BUCKETS]
        while link[0] != NULL and not is_same_name(link[0], made):
            link = &link[0].next
        if link[0] == NULL:
            link[0] = made
        else:
            free(made)
            made = link[0]
        add(&made.refs, 1)
        unlock(&domains_lock.held)
    return made


cdef inline bint is_same_name(const domain* d, const domain* other) noexcept nogil:
    return d.hash == other.hash and d.size == other.size and memcmp(d.name, other.name, d.size) == 0


cdef void domain_retain(domain* d) noexcept nogil:
    if d != NULL:
        add(&d.refs, 1)


cdef void domain_release(domain* d) noexcept nogil:
    cdef domain** link
    if d == NULL:
        return
    lock(&domains_lock.held)
    if add(&d.refs, -1) == 0:
        link = &domains[d.hash % DOMAIN_BUCKETS]
        while link[0] != d:
            link = &link[0].next
        link[0] = d.next
        free(d)
    unlock(&domains_lock.held)


cdef object domain_name(const domain* d):
    return None if d == NULL else d.name[:d.size].decode("utf-8", "surrogatepass")


cdef void answer_request(request* new) noexcept:
    """Call this before new_memory() of a Python creator runs for the request `new`. Exchanges `new` with the request
    that this thread was handling before. The caller exchanges them again when the Python creator returns."""
    cdef request before
    before.may_move, before.domain = thread_requests().may_move, <domain*>thread_requests().domain
    thread_requests().may_move, thread_requests().domain = new.may_move, new.domain
    new[0] = before
