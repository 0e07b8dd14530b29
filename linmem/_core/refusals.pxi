# creator.refusals: the requests that each creator refused; a part of memory.pyx.
#
# The code that finds out that a request fails counts the refusal once, at the creator that refused: finish_make() for a
# new memory, refuse_growth() for a growth. failure.counted says that it has been done.

cdef enum:
    KEPT_REFUSALS = 16          # that a creator remembers

cdef struct refusal:
    long long time_ns           # since the epoch
    size_t requested            # bytes
    size_t limit
    size_t base                 # of the memory; 0: it did not exist yet
    int code
    domain* name                # of the memory, a reference
    char error[64]              # E_PYTHON only: the class of the exception

# Shared by a creator and its memories, because wasmtime may outlive the creator.
cdef struct refusal_log:
    atomic_i64 refs
    # Protected by refusals_lock:
    size_t count
    size_t n_kept               # how many refusals were written to the ring; less than `count` if there was no memory
    refusal* last               # a ring, made at the first refusal

cdef fork_lock refusals_lock
register_fork_lock(&refusals_lock)


cdef void refusals_release(refusal_log* log) noexcept nogil:
    cdef int i
    if log == NULL or add(&log.refs, -1):
        return
    if log.last != NULL:
        for i in range(KEPT_REFUSALS):
            domain_release(log.last[i].name)
    free(log.last)
    free(log)


cdef refusal_log* refusals_retain(refusal_log* log) noexcept nogil:
    add(&log.refs, 1)
    return log


cdef void count_refusal(refusal_log* log, memory* m, size_t requested, failure* why) noexcept nogil:
    """Counts the failure, unless this was done before. m: the memory that did not grow; NULL: no memory was made. log:
    NULL if the creator is a class of another Cython module that does not count."""
    cdef refusal noted
    cdef domain* replaced = NULL
    cdef refusal* place
    if why.counted or log == NULL:
        return
    why.counted = True
    memset(&noted, 0, sizeof(noted))
    noted.time_ns = pages.utc_ns()
    noted.requested, noted.limit, noted.code = requested, why.limit, why.code
    if why.code == E_PYTHON:
        snprintf(noted.error, sizeof(noted.error), "%.63s", <const char*>why.detail)
    if m != NULL:
        noted.base, noted.name = <size_t>m.base, memory_name(m)
        domain_retain(noted.name)
    lock(&refusals_lock.held)
    if log.last == NULL:
        log.last = <refusal*>calloc(KEPT_REFUSALS, sizeof(refusal))
    if log.last == NULL:        # then only the count tells of the refusal
        replaced = noted.name
    else:
        place = &log.last[log.n_kept % KEPT_REFUSALS]
        replaced = place.name
        place[0] = noted
        log.n_kept += 1
    log.count += 1
    unlock(&refusals_lock.held)
    domain_release(replaced)


cdef size_t refusals_count(refusal_log* log) noexcept nogil:
    cdef size_t count
    lock(&refusals_lock.held)
    count = log.count
    unlock(&refusals_lock.held)
    return count


cdef object refusal_record(const refusal* noted, creator_name):
    from linmem.records import Refusal
    cdef int code = noted.code
    has_limit = (code == E_LIMIT or code == E_EXHAUSTED or code == E_GROWTHS or code == E_MAXIMUM
                 or code == E_CAPACITY)
    return Refusal(
        time=noted.time_ns / 1e9, requested=noted.requested, limit=noted.limit if has_limit else None,
        error=(<const char*>noted.error).decode("utf-8", "replace") if code == E_PYTHON else error_class(code).__name__,
        creator=creator_name, memory=domain_name(noted.name), base=noted.base or None)


cdef object refusals_of(refusal_log* log, creator_name):
    from linmem.records import Refusals
    cdef refusal[KEPT_REFUSALS] last
    cdef size_t count, n, i
    with nogil:
        lock(&refusals_lock.held)
        count = log.count
        n = min(log.n_kept, <size_t>KEPT_REFUSALS)
        for i in range(n):
            last[i] = log.last[(log.n_kept - n + i) % KEPT_REFUSALS]
            domain_retain(last[i].name)
        unlock(&refusals_lock.held)
    try:
        return Refusals(count, tuple([refusal_record(&last[i], creator_name) for i in range(n)]))
    finally:
        with nogil:
            for i in range(n):
                domain_release(last[i].name)
