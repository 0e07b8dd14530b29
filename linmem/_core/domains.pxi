# Domains, whose pages pools keep apart, and the request that a Python creator answers on this thread; a part of
# memory.pyx.

ctypedef domain* domain_ptr

cdef enum:
    DOMAIN_BUCKETS = 256

cdef domain* domains[DOMAIN_BUCKETS]
cdef fork_lock domains_lock
register_fork_lock(&domains_lock)

# What a thread is doing: the domain of the memory that it makes, and the request that a Python creator answers.
cdef extern from *:
    """
    typedef struct { int may_move; void *domain, *making; } linmem_asked_t;
    static LINMEM_OF_THREAD linmem_asked_t linmem_asked;
    static linmem_asked_t *linmem_asked_of_thread(void) { return &linmem_asked; }
    """
    ctypedef struct asked_t "linmem_asked_t":
        bint may_move
        void* domain
        void* making

    asked_t* asked "linmem_asked_of_thread"() noexcept nogil


cdef domain* current_domain() noexcept nogil:
    """The domain of the memory that this thread is making; NULL: none was named. A borrowed reference."""
    return <domain*>asked().making


cdef void set_domain(domain* d) noexcept nogil:
    asked().making = d


cdef domain* domain_of(object name) except? NULL:
    """A new reference on the domain with that name; NULL for None."""
    cdef bytes text
    cdef domain* d
    cdef domain* made
    cdef domain** head
    cdef size_t size, hashed
    if name is None:
        return NULL
    if not isinstance(name, str):
        raise TypeError(f"domain must be a str or None, got {type(name).__name__}")
    text = (<str>name).encode("utf-8", "surrogatepass")
    size = <size_t>len(text)
    hashed = <size_t>hash(text)
    made = <domain*>calloc(1, sizeof(domain) + size + 1)
    if made == NULL:
        raise MemoryError("no memory for the name of a domain")
    made.refs = 1
    made.hash = hashed
    made.size = size
    made.name = <char*>made + sizeof(domain)
    memcpy(made.name, <const char*>text, size)
    with nogil:
        lock(&domains_lock.held)
        head = &domains[hashed % DOMAIN_BUCKETS]
        d = head[0]
        while d != NULL and not (d.hash == hashed and d.size == size and memcmp(d.name, made.name, size) == 0):
            d = d.next
        if d != NULL:
            d.refs += 1
        else:
            made.next = head[0]
            head[0] = made
        unlock(&domains_lock.held)
        if d != NULL:
            free(made)
    return made if d == NULL else d


cdef void domain_retain(domain* d) noexcept nogil:
    if d != NULL:
        lock(&domains_lock.held)
        d.refs += 1
        unlock(&domains_lock.held)


cdef void domain_release(domain* d) noexcept nogil:
    cdef domain** link
    if d == NULL:
        return
    lock(&domains_lock.held)
    d.refs -= 1
    if d.refs:
        d = NULL
    else:
        link = &domains[d.hash % DOMAIN_BUCKETS]
        while link[0] != d:
            link = &link[0].next
        link[0] = d.next
    unlock(&domains_lock.held)
    free(d)


cdef void answer_request(request* new) noexcept:
    """A Python creator is asked on this thread for a memory as `new` says. Exchanges `new` with the request that was
    answered until now; the caller exchanges them again afterwards."""
    cdef request before
    before.may_move, before.domain = asked().may_move, <domain*>asked().domain
    asked().may_move, asked().domain = new.may_move, new.domain
    new[0] = before
