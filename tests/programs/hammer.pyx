# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""Threads in C that use linmem's C API concurrently, with no Python in any operation.

For ThreadSanitizer: the threads are pthreads, and they share data by linmem's own means only. No other lock hides a
race, so every report is a finding.
"""

from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memset

from linmem._core.atomic cimport add, atomic_i64, load, store
from linmem._core.memory cimport (
    Image, NativeCreator, changes, failure, failure_text, image, image_changes, image_is_intact, image_of,
    image_release, image_restore, image_retain, lock, memory, memory_add_hook, memory_changes, memory_grow_to,
    memory_hook, memory_release, memory_resident, memory_retain, memory_size, memory_snapshot, memory_spec, unlock,
)
from linmem._os cimport pages
from linmem._core.units cimport E_CAPACITY, E_EXHAUSTED, E_LIMIT, E_SHRINK

import time

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_create(pthread_t* thread, const void* attributes, void* (*start)(void*) noexcept nogil, void* argument)
    int pthread_join(pthread_t thread, void** value)
    int pthread_mutex_init(pthread_mutex_t* mutex, const void* attributes)
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)

cdef enum:
    CELLS = 12
    MOST = 16               # pages in a memory

    OWN = 0                 # make, fill, grow, check bytes, snapshot, restore, drop
    HAND_ON = 1             # make, publish to all threads, drop the previous one
    VISIT = 2               # use another thread's memory concurrently
    DRAW = 3                # make an image and compare it with another image
    OPERATIONS = 4

NAMES = ("own", "hand_on", "visit", "draw")

# A memory that all threads use. The mutex protects only the step of taking a reference.
cdef struct cell:
    pthread_mutex_t mutex
    memory* m

cdef struct shared:
    void** creators
    size_t n_creators
    image* image
    cell cells[CELLS]
    atomic_i64 stop
    atomic_i64 hooks        # how many hooks of this program are registered on memories
    size_t page

cdef struct worker:
    pthread_t thread
    shared* all
    unsigned long long seed
    unsigned char mark
    long long done[OPERATIONS]
    long long refused
    char error[512]

cdef struct counting_hook:
    memory_hook head
    shared* all


cdef unsigned long long chance(worker* w, unsigned long long below) noexcept nogil:
    w.seed ^= w.seed << 13
    w.seed ^= w.seed >> 7
    w.seed ^= w.seed << 17
    return (w.seed >> 11) % below


cdef int wrong(worker* w, const char* what) noexcept nogil:
    cdef size_t i = 0
    if w.error[0]:
        return -1
    while what[i] and i < sizeof(w.error) - 1:
        w.error[i] = what[i]
        i += 1
    w.error[i] = 0
    return -1


cdef int judge(worker* w, int code, const failure* why) noexcept nogil:
    """Counts a documented failure as refused. Any other failure ends the run."""
    cdef char text[512]
    if code == 0:
        return 0
    if code == E_LIMIT or code == E_EXHAUSTED or code == E_SHRINK or code == E_CAPACITY:
        w.refused += 1
        return 0
    failure_text(why, text, sizeof(text))
    return wrong(w, text)


cdef bint is_all(const char* at, size_t size, unsigned char byte) noexcept nogil:
    return size == 0 or (<unsigned char>at[0] == byte and memcmp(at, at + 1, size - 1) == 0)


cdef int make(worker* w, bint moves, memory** out) noexcept nogil:
    """Stores in *out a memory that no other thread knows, or NULL if the creator's own bound refused the request."""
    cdef memory_spec spec
    cdef failure why
    cdef void* creator = w.all.creators[chance(w, w.all.n_creators)]
    cdef size_t page = w.all.page
    cdef int code
    out[0] = NULL
    spec.minimum = 4 * page + chance(w, 3) * page // 2
    spec.maximum = 4 * MOST * page
    spec.reservation = 0 if moves else MOST * page
    spec.guard = page
    spec.page_size = 1
    spec.is_64 = True
    spec.is_shared = False
    spec.watched = False
    spec.may_move = moves
    spec.image = w.all.image if chance(w, 4) == 0 else NULL
    code = (<NativeCreator>creator).make(&spec, out, &why)
    if code:
        out[0] = NULL
        return judge(w, code, &why)
    if spec.image != NULL and image_of(out[0]) == NULL:         # copied, by a creator in Python
        return look_like(w, out[0], spec.image)
    if not image_is_intact(out[0], out[0].accessible):
        return wrong(w, "a new memory holds the bytes of another")
    return 0


cdef int look_like(worker* w, memory* m, image* it) noexcept nogil:
    cdef failure why
    cdef changes found
    memset(&found, 0, sizeof(found))
    if judge(w, memory_changes(m, it, False, &found, &why), &why) == 0 and found.n:
        wrong(w, "a new memory does not hold its image")
    free(found.list)
    return 0


cdef void count_dropped(memory_hook* head) noexcept nogil:
    add(&(<counting_hook*>head).all.hooks, -1)
    free(head)


cdef int hang(worker* w, memory* m) noexcept nogil:
    cdef counting_hook* hook = <counting_hook*>calloc(1, sizeof(counting_hook))
    if hook == NULL:
        return wrong(w, "no memory for a hook")
    hook.head.dropped = count_dropped
    hook.all = w.all
    add(&w.all.hooks, 1)
    memory_add_hook(m, &hook.head)
    return 0


cdef int own(worker* w) noexcept nogil:
    cdef failure why
    cdef image* kept = NULL
    cdef memory* m
    cdef size_t size, larger, page = w.all.page
    cdef int code
    if make(w, chance(w, 2), &m) or m == NULL:
        return 0 if m == NULL else drop(m)
    if chance(w, 4) == 0 and hang(w, m):
        return drop(m)
    size = memory_size(m)
    memset(m.base, w.mark, size)
    larger = size + chance(w, 2 * MOST * page)
    code = memory_grow_to(m, larger, &why)
    if judge(w, code, &why):
        return drop(m)
    if not is_all(m.base, size, w.mark):
        wrong(w, "growth has lost the bytes that were there")
    if code == 0 and not is_all(m.base + size, larger - size, 0):
        wrong(w, "growth has brought the bytes of another")
    if chance(w, 4) == 0:
        size = memory_size(m)
        code = memory_snapshot(m, &kept, &why)
        lock(&m.lock)
        if judge(w, code, &why) == 0 and code == 0:
            memset(m.base, 0xff, size)
            image_restore(m, kept)
            if m.ops.pages_are_ours and not image_is_intact(m, m.accessible):
                wrong(w, "a restored memory is not what it was")
        unlock(&m.lock)
        image_release(kept)
    return drop(m)


cdef int drop(memory* m) noexcept nogil:
    memory_release(m)
    return 0


cdef int hand_on(worker* w) noexcept nogil:
    cdef memory* m
    cdef memory* before
    cdef cell* there = &w.all.cells[chance(w, CELLS)]
    if make(w, False, &m) or m == NULL:
        return 0 if m == NULL else drop(m)
    pthread_mutex_lock(&there.mutex)
    before = there.m
    there.m = m
    pthread_mutex_unlock(&there.mutex)
    return drop(before) if before != NULL else 0


cdef int visit(worker* w) noexcept nogil:
    cdef failure why
    cdef changes found
    cdef image* kept = NULL
    cdef memory* m
    cdef cell* there = &w.all.cells[chance(w, CELLS)]
    cdef size_t size, resident, page = w.all.page
    cdef unsigned long long what = chance(w, 8)
    pthread_mutex_lock(&there.mutex)
    m = there.m
    if m != NULL:
        memory_retain(m)
    pthread_mutex_unlock(&there.mutex)
    if m == NULL:
        return 0
    size = memory_size(m)
    if what < 4:
        judge(w, memory_grow_to(m, size + chance(w, 2 * page), &why), &why)
        if memory_size(m) < size:
            wrong(w, "a memory has shrunk")
    elif what == 4 and m.ops.resident != NULL:
        judge(w, memory_resident(m, &resident, &why), &why)
    elif what == 5 and m.ops.pages_are_ours:
        judge(w, memory_snapshot(m, &kept, &why), &why)
        image_release(kept)
    elif what == 6 and m.ops.pages_are_ours:
        lock(&m.lock)
        image_restore(m, w.all.image)
        if not image_is_intact(m, m.accessible):
            wrong(w, "a restored memory is not what its image says")
        unlock(&m.lock)
    elif what == 7 and m.ops.pages_are_ours:
        judge(w, memory_changes(m, w.all.image, False, &found, &why), &why)
        free(found.list)
    return drop(m)


cdef int draw(worker* w) noexcept nogil:
    cdef failure why
    cdef changes found
    cdef image* mine = NULL
    cdef memory* m
    cdef int code
    if make(w, False, &m) or m == NULL:
        return 0 if m == NULL else drop(m)
    memset(m.base, w.mark, memory_size(m))
    code = memory_snapshot(m, &mine, &why)
    image_retain(mine)
    if code == 0:
        code = image_changes(mine, w.all.image, &found, &why)
        if code == 0 and found.n == 0:
            wrong(w, "two images that differ do not")
        free(found.list)
    image_release(mine)
    image_release(mine)
    drop(m)
    return judge(w, code, &why)


cdef void* work(void* argument) noexcept nogil:
    cdef worker* w = <worker*>argument
    cdef unsigned long long what
    while not load(&w.all.stop) and not w.error[0]:
        what = chance(w, 8)
        if what < 2:
            own(w)
            w.done[OWN] += 1
        elif what < 4:
            hand_on(w)
            w.done[HAND_ON] += 1
        elif what < 7:
            visit(w)
            w.done[VISIT] += 1
        else:
            draw(w)
            w.done[DRAW] += 1
    return NULL


def run(creators, Image image_ not None, int threads, double seconds, watch=()):
    """Let `threads` work for `seconds`, while this one calls each of `watch`.

    Returns
    -------
    dict
        How many operations of each kind were done, and how many memories or growths were refused.

    Raises
    ------
    AssertionError
        A byte, a size or a failure is not as documented.
    """
    cdef shared all
    cdef worker* workers = <worker*>calloc(<size_t>threads, sizeof(worker))
    cdef list kept = list(creators)
    cdef size_t i
    cdef int n, k, started = 0
    if workers == NULL:
        raise MemoryError("no memory for the workers")
    for one in kept:
        if not isinstance(one, NativeCreator):
            raise TypeError(f"a NativeCreator is needed, got {one!r}")
    memset(&all, 0, sizeof(all))
    all.creators = <void**>calloc(<size_t>len(kept), sizeof(void*))
    all.n_creators = <size_t>len(kept)
    for i in range(all.n_creators):
        all.creators[i] = <void*>kept[i]
    all.image = image_.img
    all.page = pages.capabilities().page_size
    for k in range(CELLS):
        pthread_mutex_init(&all.cells[k].mutex, NULL)
    for n in range(threads):
        workers[n].all = &all
        workers[n].seed = 88172645463325252 + <unsigned long long>n * 7919
        workers[n].mark = <unsigned char>(n + 1)
        if pthread_create(&workers[n].thread, NULL, work, &workers[n]):
            break
        started += 1
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            for call in watch:
                call()
            time.sleep(0.001)
    finally:
        with nogil:
            store(&all.stop, 1)
            for n in range(started):
                pthread_join(workers[n].thread, NULL)
            for k in range(CELLS):
                if all.cells[k].m != NULL:
                    memory_release(all.cells[k].m)
        try:
            errors = [workers[n].error.decode() for n in range(started) if workers[n].error[0]]
            done = {name: sum([workers[n].done[k] for n in range(started)]) for k, name in enumerate(NAMES)}
            done["refused"] = sum([workers[n].refused for n in range(started)])
        finally:
            free(workers)
            free(all.creators)
    assert started == threads, f"only {started} of {threads} threads could be started"
    assert not errors, errors
    assert load(&all.hooks) == 0, f"{load(&all.hooks)} hooks are left on memories that are gone"
    return done


cdef void* count_up(void* argument) noexcept nogil:
    cdef long long* count = <long long*>argument
    cdef int _
    for _ in range(1000):
        count[0] += 1
        pages.yield_processor()
    return NULL


def race():
    """A deliberate race, which a working sanitizer reports."""
    cdef pthread_t others[2]
    cdef long long count = 0
    cdef int n
    for n in range(2):
        if pthread_create(&others[n], NULL, count_up, &count):
            raise RuntimeError("a thread could not be started")
    with nogil:
        for n in range(2):
            pthread_join(others[n], NULL)


def main(int threads, double seconds):
    """Use every creator and adaptor, and print the figures."""
    import linmem

    page = pages.capabilities().page_size

    class Handing(linmem.MemoryCreator):
        """Passes on memories of a new MmapCreator."""

        def new_memory(self, *request):
            return linmem.MmapCreator().new_memory(*request)

    img = linmem.Image.from_bytes(bytes([7]) * page + bytes(page) + bytes([9]) * page, page)
    mmap = linmem.MmapCreator()
    budget = linmem.LimitingCreator(linmem.PoolingCreator(slots=6, max_unused_warm=2), 400 * page)
    counted = linmem.StatisticsCreator(mmap, history=20)
    outer = linmem.StatisticsCreator(linmem.PoolingCreator(linmem.LimitingCreator(counted, 1 << 30)), history=20)
    pools = [linmem.PoolingCreator(reset=reset, max_unused_warm=3, check=True) for reset in ("zero", "discard")]
    pools += [linmem.PoolingCreator(image=img, slots=8, when_full="error"), linmem.PoolingCreator(keep_resident=page)]
    creators = [mmap, linmem.MmapCreator(prefault=True), budget, outer, *pools, linmem.PythonCreator(Handing())]
    watch = [counted.statistics, counted.memories, outer.statistics, outer.memories, outer.upstream.stats, img.info,
             lambda: budget.used_bytes, lambda: linmem.PoolingCreator().create(page).close()]
    for pool in pools:
        watch += [pool.stats, lambda pool=pool: pool.trim(page)]
    done = run(creators, img, threads, seconds, watch)
    for pool in [*pools, budget.upstream, outer.upstream]:
        pool.trim()
        stats = pool.stats()
        assert (stats["live"], stats["warm"], stats["cold"], stats["rejected"]) == (0, 0, 0, 0), stats
    assert budget.used_bytes == 0, budget.used_bytes
    for book in (counted.statistics(), outer.statistics()):
        assert (book["current_count"], book["current_bytes"]) == (0, 0), book
    assert img.info().memories == 0, img.info()
    refused = done.pop("refused")
    print(f"{sum(done.values())} operations of {threads} threads in {seconds:.0f} s ("
          + ", ".join(f"{name} {n}" for name, n in done.items()) + f"), {refused} refused as promised")
