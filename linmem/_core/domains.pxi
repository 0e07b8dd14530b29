# Domains, whose pages pools keep apart, and the request that a Python creator answers on this thread; a part of
# memory.pyx.

ctypedef domain* domain_ptr

cdef enum:
    DOMAIN_BUCKETS = 256

cdef domain* domains[DOMAIN_BUCKETS]
cdef fork_lock domains_lock
list_lock(&domains_lock)

cdef extern from *:
    """
    static LINMEM_OF_THREAD void *linmem_domain;
    static void *linmem_get_domain(void) { return linmem_domain; }
    static void linmem_put_domain(void *domain) { linmem_domain = domain; }
    """
    void* get_domain "linmem_get_domain"() noexcept nogil
    void put_domain "linmem_put_domain"(void* domain) noexcept nogil


cdef domain* current_domain() noexcept nogil:
    """The domain of the memory that this thread is making; NULL: none was named. A borrowed reference."""
    return <domain*>get_domain()


cdef void set_domain(domain* d) noexcept nogil:
    put_domain(d)


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
        acquire(&domains_lock.held)
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
        acquire(&domains_lock.held)
        d.refs += 1
        unlock(&domains_lock.held)


cdef void domain_release(domain* d) noexcept nogil:
    cdef domain** link
    if d == NULL:
        return
    acquire(&domains_lock.held)
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


# -- the request that a Python creator answers

cdef extern from *:
    """
    static LINMEM_OF_THREAD struct { int may_move; void *domain; } linmem_asked;
    static int *linmem_asked_may_move(void) { return &linmem_asked.may_move; }
    static void **linmem_asked_domain(void) { return &linmem_asked.domain; }
    """
    bint* asked_may_move "linmem_asked_may_move"() noexcept nogil
    void** asked_domain "linmem_asked_domain"() noexcept nogil


cdef void answer_request(request* it) noexcept:
    """A Python creator is asked on this thread for a memory as `it` says. Exchanges `it` with the request that was
    answered until now; the caller exchanges them again afterwards."""
    cdef request before
    before.may_move, before.domain = asked_may_move()[0], <domain*>asked_domain()[0]
    asked_may_move()[0] = it.may_move
    asked_domain()[0] = it.domain
    it[0] = before
