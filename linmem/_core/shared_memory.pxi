# The kind of memory that processes share; a part of memory.pyx.
#
# The pages are those of one file, which each process maps. The file begins with the control words; the bytes of the
# memory follow at HEAD_BYTES. Every process that has the memory can write anything into the control words at any time.
# So a process believes a size only after it has compared the size with the length of the file, which never gets less.
# Pages past the size that the process believes are inaccessible, because an access past the end of the file would be a
# SIGBUS, which wasmtime does not handle.
#
# A growth does these steps in this order, and holds no lock that other processes wait for:
#   1. The file is extended. Another process may extend it at the same time.
#   2. This process makes its own new pages accessible.
#   3. The size in the control words is raised. It never gets less.
#   4. Processes in wait_for_growth() are woken.
# So a process that is killed between two steps leaves a memory of the old or of the new size, which others can use and
# grow.
#
# A process that attaches a memory reads the control words from the file. It maps them when it needs to write them, or
# when it has read the size LOOKS times: two changes of the mappings and a page fault take as long as 12 reads.

cdef enum:
    HEAD_BYTES = 65536              # a multiple of every host page
    TOKEN_BYTES = 32
    TOKEN_NAME_BYTES = 2 * TOKEN_BYTES + 1
    GROW_AHEAD = 1 << 24            # bytes by which the file of a sealed memory is longer than the growth asks for
    LOOKS = 8
    MOST_READS = 1000

cdef struct control_words:
    char[16] magic
    char[TOKEN_BYTES] token         # different for each memory
    atomic_i64 capacity             # constant
    atomic_i64 maximum              # constant; -1: none
    atomic_i64 size
    atomic_i64 waiters              # threads in wait_for_growth(); a killed process leaves its threads counted
    int turn                        # changes with each growth; wait_for_growth() sleeps on it

# What shared_make() makes a memory of.
cdef struct shared_source:
    bint attaches                   # the file has a memory already
    pages.file_pages file           # of kind 0: a new file
    const char* name                # of the new file
    size_t length                   # of the file; 0: not known
    char* token                     # of the memory; NULL: attach any

cdef struct shared_memory:
    memory head
    pages.file_pages file
    control_words* words            # in a reservation of their own; NULL: not mapped yet. Written once, under the lock
    atomic_i64 looks                # how often the size was read from the file
    char[TOKEN_BYTES] token         # the one that the control words had at first
    size_t file_length              # at least so many bytes has the file
    size_t mapped                   # so many bytes show the file; the rest of the capacity does after the first growth
    long long taking                # the growth takes over a size that another process gave the memory: the generation

cdef char[16] MAGIC = b"linmem shared 1\n"
cdef int stop_growth_at = 0         # the step after which a growth ends the process; 0: none. Tests only

cdef extern from "<stdlib.h>" nogil:
    void end_process "_Exit"(int status)


cdef inline void step_done(int step) noexcept nogil:
    if stop_growth_at == step:
        end_process(9)


def _stop_growth_at(int step):
    """The next growth of a shared memory ends the process, without any clean-up, after this step. Tests only."""
    global stop_growth_at
    stop_growth_at = step


cdef int refuse_to_share(failure* why) noexcept nogil:
    """A code if processes cannot share memories here."""
    if pages.capabilities().shares:
        return 0
    fail(why, E_UNSUPPORTED, "a shared memory", 0)
    explain(why, "on this system")
    return why.code


cdef int shared_make(const memory_spec* asked, shared_source* source, memory** out, failure* why) noexcept nogil:
    """The memory owns the open file afterwards. A code: the caller still does, if source.file.kind is not 0.
    FILE_FOREIGN: the file has a memory of another token."""
    cdef memory_spec spec = asked[0]
    cdef shared_memory* s
    cdef layout found
    cdef char* region = NULL
    cdef int code = 0
    if spec.image != NULL and source.attaches:
        return fail_text(why, E_VALUE, "an attached memory has its bytes already, so it cannot start from an image")
    if spec.image != NULL and spec.image.end > spec.minimum:
        return fail(why, E_IMAGE, "new_memory", spec.minimum, 0, spec.image.end)
    s = <shared_memory*>calloc(1, sizeof(shared_memory))
    if s == NULL:
        return fail(why, E_NO_MEMORY, "calloc", sizeof(shared_memory))
    s.file = source.file
    s.file_length = source.length
    if s.file.kind:
        code = begin_control_words(s, source.attaches, why)
    if code == 0 and source.attaches:
        code = believe_control_words(s, source.token, &spec, why)
    if code == 0:
        code = reserve_for(&spec, place_alignment(), &found, &region, &s.head.chosen, why)
    if code == 0 and s.file.kind == 0:
        code = begin_file(s, found.capacity, source, why)
    if code == 0 and s.file.kind == pages.FILE_SECTION:        # it has its whole length at once
        code = fail_page_call(why, pages.file_place(&s.file, HEAD_BYTES, &region, found.pre_guard, found.capacity,
                                                    found.guard), "file_map", found.capacity)
        s.mapped = found.capacity
    if code == 0:
        s.head.base = region + found.pre_guard
        s.head.capacity = found.capacity
        s.head.pre_guard = found.pre_guard
        s.head.guard = found.guard
        s.head.ops = &shared_ops
        s.head.maximum = min(spec.maximum, found.capacity)
        code = shared_open(s, &spec, found.accessible, NULL if source.attaches else source.token, why)
    if code:
        if region != NULL:
            release_address_space(region, found.pre_guard + found.capacity + found.guard)
        if s.words != NULL:
            release_address_space(<char*>s.words, host_page())
        free_struct(&s.head)
        return code
    s.head.enters_slowly = True
    s.head.refs = 1
    s.head.covered = found.capacity + found.guard
    s.head.is_shared = spec.is_shared
    trace_if_on(&s.head)
    s.head.range = range_of(region, &found)
    add_live_memory(&s.head)
    out[0] = &s.head
    if asked.minimum > spec.minimum:
        code = memory_grow_to(out[0], asked.minimum, why)
        if code:
            source.file.kind = 0        # the memory owns the file, and closes it here
            memory_release(out[0])
            out[0] = NULL
    return code


cdef inline size_t place_alignment() noexcept nogil:
    """Of the base of a memory that shows a file; for reserve_exactly()."""
    cdef size_t granularity = pages.capabilities().granularity
    return granularity if granularity > host_page() else 0


cdef int begin_file(shared_memory* s, size_t capacity, shared_source* source, failure* why) noexcept nogil:
    cdef size_t most = 0
    cdef int code
    if add_up(HEAD_BYTES, capacity, &most):
        return fail(why, E_OVERFLOW, "reserve", capacity)
    code = pages.file_begin(HEAD_BYTES, most, source.name, &s.file)
    if code == pages.FILE_EXISTS:
        return refuse_name(why)
    code = fail_page_call(why, code, "file_begin", HEAD_BYTES)
    if code == 0:
        source.file = s.file
        code = begin_control_words(s, False, why)
    return code


cdef int refuse_name(failure* why) noexcept with gil:
    from errno import EEXIST
    return fail_python(why, FileExistsError(EEXIST, "a shared memory of this shm_name exists already"))


cdef int measure_file(shared_memory* s, failure* why) noexcept nogil:
    cdef int code = fail_page_call(why, pages.file_size(&s.file, &s.file_length), "file_size", HEAD_BYTES)
    return code or check_length(s, why)


cdef int check_length(shared_memory* s, failure* why) noexcept nogil:
    if s.file_length < HEAD_BYTES:
        return fail_text(why, E_VALUE, "attach must be a shared memory of linmem, and the file has only %zu bytes",
                         s.file_length)
    return 0


cdef int begin_control_words(shared_memory* s, bint attaches, failure* why) noexcept nogil:
    cdef int code = check_length(s, why) if s.file_length else measure_file(s, why)
    if code == 0 and (not attaches or s.file.kind == pages.FILE_SECTION):
        code = map_control_words(s, why)
    return code


cdef int map_control_words(shared_memory* s, failure* why) noexcept nogil:
    cdef char* addr = NULL
    cdef int code = fail_page_call(why, pages.file_show(&s.file, 0, host_page(), &addr), "file_show", host_page())
    if code == 0:
        store_address(<char**>&s.words, addr)
    return code


cdef int need_control_words(shared_memory* s, failure* why) noexcept nogil:
    """s.words is mapped afterwards. The caller holds the memory's lock."""
    cdef control_words found
    cdef int code = 0
    if s.words == NULL:
        code = read_control_words(s, &found, why)
        if code == 0 and memcmp(found.token, s.token, TOKEN_BYTES):
            code = refuse_other_file(why)
        if code == 0:
            code = map_control_words(s, why)
    return code


cdef int refuse_other_file(failure* why) noexcept nogil:
    return fail_text(why, E_VALUE, "the control words of the shared memory are damaged: another process has written"
                     " over them, or this program has closed the memory's descriptor")


cdef int read_control_words(shared_memory* s, control_words* out, failure* why) noexcept nogil:
    """E_VALUE: this program has closed the descriptor."""
    cdef control_words* words = <control_words*>load_address(<char**>&s.words)
    cdef int code
    if words == NULL:
        code = pages.file_read(&s.file, 0, <char*>out, sizeof(control_words))
        if code == pages.FILE_FOREIGN:
            return refuse_other_file(why)
        return fail_page_call(why, code, "file_read", sizeof(control_words))
    memcpy(out, words, sizeof(control_words))
    out.size = load(&words.size)
    return 0


cdef int believe_control_words(shared_memory* s, const char* token, memory_spec* spec, failure* why) noexcept nogil:
    """-> what to reserve for a memory that is attached: its size and capacity. token: as in shared_source."""
    cdef control_words words, again
    cdef size_t size, capacity, maximum
    cdef int reads = 0
    cdef int code = read_control_words(s, &again, why)
    # Until the size is the same twice: while another process grows the memory, a read may find a mixture of two sizes.
    while code == 0 and (reads == 0 or words.size != again.size):
        reads += 1
        words = again
        code = read_control_words(s, &again, why)
        if code == 0 and reads == MOST_READS:
            code = refuse_control_words(s, <size_t>words.size, why)
    if code:
        return code
    size, capacity, maximum = <size_t>words.size, <size_t>words.capacity, <size_t>words.maximum
    memcpy(s.token, words.token, TOKEN_BYTES)
    s.head.maximum = min(maximum, capacity)
    if size > s.file_length - HEAD_BYTES:       # another process may have extended the file since its length was read
        code = measure_file(s, why)
        if code:
            return code
    if token != NULL and memcmp(token, words.token, TOKEN_BYTES):
        return pages.FILE_FOREIGN
    if memcmp(words.magic, MAGIC, sizeof(MAGIC)):
        return fail_text(why, E_VALUE, "attach must be a shared memory of linmem, and the file does not begin as one")
    if size > s.file_length - HEAD_BYTES or size > capacity or size > maximum or capacity > SIZE_MAX >> 1:
        return refuse_control_words(s, size, why)
    if size > spec.maximum:
        return fail_text(why, E_VALUE, "maximum must be >= the size of the shared memory (%zu), got %zu", size,
                         spec.maximum)
    spec.minimum = size
    spec.maximum = min(min(spec.maximum, maximum), capacity)
    # At least the capacity that the memory was made with: no process can grow the memory beyond the reservation here.
    if spec.reservation == UNCHOSEN or spec.reservation < capacity:
        spec.reservation = capacity
    return 0


cdef int refuse_control_words(shared_memory* s, size_t size, failure* why) noexcept nogil:
    return fail_text(why, E_VALUE, "the control words of the shared memory are damaged: they say %zu bytes, and the"
                     " file has room for %zu and the memory for %zu: another process has written over them", size,
                     s.file_length - HEAD_BYTES, s.head.maximum)


cdef int shared_open(shared_memory* s, const memory_spec* spec, size_t accessible, const char* token,
                     failure* why) noexcept nogil:
    """Maps the pages of the first spec.minimum bytes; fills a new memory and its control words."""
    cdef memory* m = &s.head
    cdef int code = extend_file(s, accessible, why)
    if code == 0 and accessible and s.mapped:
        code = fail_page_call(why, pages.commit(m.base, accessible), "commit", accessible)
    elif code == 0 and accessible:
        code = fail_page_call(why, pages.file_map(&s.file, HEAD_BYTES, m.base, accessible, pages.ACCESS_READ_WRITE),
                              "file_map", accessible)
        s.mapped = accessible
    if code:
        return code
    m.size = spec.minimum
    m.accessible = accessible
    if token == NULL:
        return 0
    if spec.image != NULL:
        image_copy(spec.image, m.base)
    memcpy(s.token, token, TOKEN_BYTES)
    memcpy(s.words.token, token, TOKEN_BYTES)
    store(&s.words.capacity, <long long>m.capacity)
    store(&s.words.maximum, <long long>spec.maximum)
    store(&s.words.size, <long long>spec.minimum)
    memcpy(s.words.magic, MAGIC, sizeof(MAGIC))
    return 0


cdef int extend_file(shared_memory* s, size_t size, failure* why) noexcept nogil:
    """The file has room for `size` bytes, and for some more if that costs nothing."""
    cdef size_t wanted = HEAD_BYTES + size
    cdef int code
    if wanted <= s.file_length:
        return 0
    # A sealed file takes no memory until its pages are touched. A limit of the process may refuse only the larger size.
    if s.file.kind == pages.FILE_SEALED and pages.file_extend(&s.file, wanted + GROW_AHEAD, False) == 0:
        s.file_length = wanted + GROW_AHEAD
        return 0
    code = fail_page_call(why, pages.file_extend(&s.file, wanted, False), "extend", size)
    if code == 0:
        s.file_length = wanted
    return code


# -- growth

cdef int shared_grow(memory* m, size_t new_size, failure* why) noexcept nogil:
    cdef shared_memory* s = <shared_memory*>m
    cdef size_t need
    cdef int code
    if round_up(new_size, host_page(), &need):
        return fail(why, E_OVERFLOW, "new_size", new_size)
    code = need_control_words(s, why) or extend_file(s, need, why)
    if code:
        return code
    step_done(1)
    if need > s.mapped:             # the whole rest, so that each later growth is one commit()
        code = fail_page_call(why, pages.file_map(&s.file, HEAD_BYTES + s.mapped, m.base + s.mapped,
                                                  m.capacity - s.mapped, pages.ACCESS_NONE), "file_map", need)
        if code:
            return code
        s.mapped = m.capacity
    if need > m.accessible:
        store_size(&m.opening, need)
        code = pages.commit(m.base + m.accessible, need - m.accessible)
        if code:
            code = fail_page_call(why, commit_again(m.base + m.accessible, need - m.accessible, code), "commit",
                                  need - m.accessible)
    if code == 0:
        step_done(2)
        code = 0 if s.taking == generation else publish(s, new_size, why)
        if code and need > m.accessible:
            pages.protect(m.base + m.accessible, need - m.accessible, pages.ACCESS_NONE)
    if code == 0:
        store_size(&m.accessible, max(m.accessible, need))
        store_release(&m.size, new_size)
    store_size(&m.opening, 0)
    return code


cdef int publish(shared_memory* s, size_t new_size, failure* why) noexcept nogil:
    """Raises the size that other processes see, and wakes those that wait for it."""
    cdef long long size = load(&s.words.size)
    cdef int woken = 0
    # If a guest and another process grew the memory by a page at the same time, both would take the page for theirs. So
    # the growth of a guest fails if the size is not the one that the guest's runtime has computed the new size from.
    if load(&s.head.owner) == OWNER_WASMTIME:
        if not compare_exchange(&s.words.size, <long long>memory_size(&s.head), <long long>new_size):
            return fail_text(why, E_VALUE, "another process has grown the shared memory at the same time, to %zu bytes",
                             <size_t>size)
    else:
        while size < <long long>new_size and not compare_exchange(&s.words.size, size, <long long>new_size):
            size = load(&s.words.size)
        if size >= <long long>new_size:
            return 0                # another process has grown the memory further
    step_done(3)
    if load(&s.words.waiters):
        (<volatile int*>&s.words.turn)[0] = <int>(<unsigned int>s.words.turn + 1)
        step_done(4)
        pages.wake_waiters(&s.words.turn, 0x7fffffff, &woken)       # if the OS refuses, the waiters look again soon
    return 0


# -- growth by other processes

cdef int look_for_news(shared_memory* s, bint* news, failure* why) noexcept nogil:
    """*news: another process may have grown the memory. A program that has closed the descriptor hears of nothing
    before the control words are mapped."""
    cdef control_words* words = <control_words*>load_address(<char**>&s.words)
    cdef control_words found
    cdef int code
    if words != NULL:
        news[0] = load(&words.size) > load(&s.head.size)
        return 0
    add(&s.looks, 1)
    code = read_control_words(s, &found, why)
    # A smaller size, too: during a growth, a read may find a mixture of two sizes.
    news[0] = code == 0 and memcmp(found.token, s.token, TOKEN_BYTES) == 0 and found.size != load(&s.head.size)
    return code if code != E_VALUE else 0


cdef int shared_check(memory* m, failure* why) noexcept:
    """When a call of a handle begins. A memory that a store owns takes over a new size only in its own memory.grow, so
    that the guest traps at the end of the size that it knows."""
    cdef shared_memory* s = <shared_memory*>m
    cdef bint news = False
    cdef int code
    if load_address(<char**>&s.words) != NULL:
        code = look_for_news(s, &news, why)
    else:
        with nogil:             # for the page calls
            code = look_for_news(s, &news, why)
            if load(&s.looks) >= LOOKS and try_lock_if_free(m):
                need_control_words(s, why)      # if this fails, the next call reads the file again
                unlock(&m.lock)
    if load(&m.owner) == OWNER_WASMTIME or is_own_growth(m):
        return 0
    if code or not news:
        return code
    with nogil:
        code = lock_memory(m, why)
        if code == 0:
            code = take_size(s, why)
            unlock(&m.lock)
    return code


cdef void shared_take_size(memory* m) noexcept nogil:
    """When wasmtime asks for the size, which it does when it makes an instance and in memory.grow. If this fails, the
    size stays the one that the guest knows.

    wasmtime also asks after a fault of the guest has become a trap, to find the memory of the address. linmem cannot
    tell that from memory.grow: after such a trap the new pages are accessible, although the guest does not know them.
    If a wasmtime asks in its signal handler, nothing changes, because the handler must not wait for a lock.
    """
    cdef shared_memory* s = <shared_memory*>m
    cdef bint news = False
    cdef failure why
    why.exception = NULL
    if look_for_news(s, &news, &why) or not news or pages.on_signal_stack() or not try_lock_if_free(m):
        return
    if take_size(s, &why) and why.exception != NULL:
        deferred_decref(why.exception)
    unlock(&m.lock)


cdef inline bint try_lock_if_free(memory* m) noexcept nogil:
    return compare_exchange(&m.lock, 0, generation)


cdef int take_size(shared_memory* s, failure* why) noexcept nogil:
    """Takes over the size that other processes gave the memory. The caller holds the memory's lock."""
    cdef memory* m = &s.head
    cdef size_t size
    cdef int code = need_control_words(s, why)
    if code:
        return code
    size = <size_t>load(&s.words.size)
    if <long long>size <= load(&m.size):
        return 0
    if HEAD_BYTES + size > s.file_length:
        code = measure_file(s, why)
    if code == 0 and (size > m.maximum or size > s.file_length - HEAD_BYTES):
        if size <= min(s.file_length - HEAD_BYTES, <size_t>load(&s.words.maximum)):
            return fail_text(why, E_VALUE, "another process has grown the shared memory to %zu bytes, and the maximum"
                             " here is %zu: attach the memory again, with a larger maximum", size, m.maximum)
        code = refuse_control_words(s, size, why)
    if code:
        return code
    s.taking = generation       # a child that is forked now must publish its own growths
    code = grow_locked(m, size, False, why)
    s.taking = 0
    return code


cdef int shared_wait(shared_memory* s, size_t size, long long deadline, bint* reached, failure* why) noexcept nogil:
    """Until the memory has `size` bytes. deadline: of pages.clock_ns(); -1: none. A code: Ctrl-C, or the size that the
    control words say is not credible."""
    cdef memory* m = &s.head
    cdef long long left = SIGNALS_EACH
    cdef int turn, code = 0
    if load_address(<char**>&s.words) == NULL:
        code = lock_memory(m, why)
        if code == 0:
            code = need_control_words(s, why)
            unlock(&m.lock)
        if code:
            return code
    add(&s.words.waiters, 1)
    while code == 0:
        turn = (<volatile int*>&s.words.turn)[0]
        reached[0] = load(&s.words.size) >= <long long>size or memory_size(m) >= size
        if deadline >= 0:
            left = min(<long long>SIGNALS_EACH, deadline - pages.clock_ns())
        if reached[0] or left <= 0:
            break
        # Not longer than SIGNALS_EACH: a process that was killed before it woke the waiters has grown the memory.
        code = fail_page_call(why, pages.wait_while_equal(&s.words.turn, turn, left), "wait_for_growth", size)
        if code == 0:
            code = interrupted(why)
    add(&s.words.waiters, -1)
    if code == 0 and reached[0]:
        code = lock_memory(m, why)
        if code == 0:
            if load(&m.owner) != OWNER_WASMTIME:
                code = take_size(s, why)
                reached[0] = memory_size(m) >= size
            unlock(&m.lock)
    return code


# -- pages

cdef int shared_zero_pages(memory* m, size_t start, size_t end) noexcept nogil:
    # MADV_DONTNEED would only end the mapping of these pages in this process; their bytes would stay.
    return pages.file_discard(&(<shared_memory*>m).file, HEAD_BYTES + start, end - start)


cdef int shared_find_data(memory* m, size_t start, size_t end, size_t* found_start, size_t* found_end) noexcept nogil:
    cdef int code = pages.file_data(&(<shared_memory*>m).file, HEAD_BYTES + start, HEAD_BYTES + end, found_start,
                                    found_end)
    if code == 0:
        found_start[0] -= HEAD_BYTES
        found_end[0] -= HEAD_BYTES
    return code


cdef void shared_free(memory* m) noexcept nogil:
    cdef shared_memory* s = <shared_memory*>m
    remove_live_memory(m)
    memory_forget_protection(m)
    if not (load(&held_bound) and try_hold(m)):
        leave_range(m, &m.range, False)
        release_address_space(m.base - m.pre_guard, m.pre_guard + m.capacity + m.guard)
    if s.words != NULL:
        release_address_space(<char*>s.words, host_page())
    pages.file_drop(&s.file)
    free_struct(m)


cdef const pages.file_pages* shared_file_of(memory* m, size_t* position) noexcept nogil:
    position[0] = HEAD_BYTES
    return &(<shared_memory*>m).file


cdef memory_ops shared_ops
shared_ops.kind = "shared"
shared_ops.grow = shared_grow
shared_ops.resident = mapped_resident
shared_ops.free = shared_free
shared_ops.check = shared_check
shared_ops.take_size = shared_take_size
shared_ops.zero_pages = shared_zero_pages
shared_ops.find_data = shared_find_data
shared_ops.file_of = shared_file_of
shared_ops.pages_are_ours = True
shared_ops.pages_are_shared = True
