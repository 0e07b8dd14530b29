# Which memory an address belongs to, and all live memories: find() and live(); a part of memory.pyx.
#
# The table of ranges holds the reservation of each mapped memory. Only add_live_memory(), remove_live_memory() and a
# move change the table, so a pool's memory costs nothing here when it is handed out or given back. live_lock protects
# the table.
#
# A range of 2**(k-1) < size <= 2**k bytes has the size class k. It touches one or two aligned blocks of 2**k bytes, and
# is in the hash table once for each. So the search for an address makes one lookup for each size class in use.

cdef enum:
    BUCKET_BITS = 16
    RANGE_BUCKETS = 1 << BUCKET_BITS
    ADDRESS_BITS = 64
    DROPPED_RANGES = 256        # that are remembered

# A part of a reservation; see Place.
cdef enum:
    GUARD_BEFORE = 0
    ACCESSIBLE = 1
    RESERVED = 2
    GUARD_AFTER = 3

cdef range_entry* range_table[RANGE_BUCKETS]
cdef size_t ranges_of_class[ADDRESS_BITS]
cdef int classes[ADDRESS_BITS]          # the size classes in use
cdef int n_classes = 0

# A reservation that a memory gave back, or that is in the quarantine; see fault_report.pxi.
cdef struct dropped_range:
    address_range range
    size_t size                 # byte_size
    size_t accessible
    bint held                   # in the quarantine
    char maker[MAKER_BYTES]
    size_t name_size            # of the creator's name; 0: it had none
    char name[NAME_BYTES]

cdef dropped_range dropped_ranges[DROPPED_RANGES]       # the newest is at (n_dropped_ranges - 1) % DROPPED_RANGES
cdef size_t n_dropped_ranges = 0


cdef inline int size_class(const address_range* r) noexcept nogil:
    cdef size_t size = <size_t>(r.end - r.start) - 1
    cdef int bits = 0
    while size:
        size >>= 1
        bits += 1
    return bits


cdef inline range_entry** range_bucket(size_t block, int of_class) noexcept nogil:
    """block: an address divided by 2 ** of_class. Neighbours have neighbouring buckets, so that few memories use few
    pages of the table. The multiplier, 2**16 divided by the golden ratio, spreads the classes."""
    return &range_table[(block + (block >> BUCKET_BITS) + <size_t>of_class * 0x9E37) & (RANGE_BUCKETS - 1)]


# -- the table: the caller holds live_lock

cdef void register_range(memory* m) noexcept nogil:
    cdef int of_class = size_class(&m.range)
    cdef size_t first = <size_t>m.range.start >> of_class, last = <size_t>(m.range.end - 1) >> of_class, i
    cdef range_entry** bucket
    if ranges_of_class[of_class] == 0:
        classes[n_classes] = of_class
        count_classes(1)
    ranges_of_class[of_class] += 1
    for i in range(last - first + 1):
        bucket = range_bucket(first + i, of_class)
        m.range_entries[i].m = m
        m.range_entries[i].next = bucket[0]
        bucket[0] = &m.range_entries[i]


cdef void unregister_range(memory* m) noexcept nogil:
    cdef int of_class = size_class(&m.range), at = 0
    cdef size_t first = <size_t>m.range.start >> of_class, last = <size_t>(m.range.end - 1) >> of_class, i
    cdef range_entry** place
    for i in range(last - first + 1):
        place = range_bucket(first + i, of_class)
        while place[0] != &m.range_entries[i]:
            place = &place[0].next
        place[0] = m.range_entries[i].next
    ranges_of_class[of_class] -= 1
    if ranges_of_class[of_class] == 0:
        while classes[at] != of_class:
            at += 1
        count_classes(-1)
        classes[at] = classes[n_classes]


cdef inline void count_classes(int more) noexcept nogil:
    global n_classes
    n_classes += more


cdef inline bint holds(const address_range* r, const char* address) noexcept nogil:
    return r.start <= address < r.end


cdef memory* memory_at(const char* address) noexcept nogil:
    """The memory whose reservation holds the address, or NULL."""
    cdef range_entry* entry
    cdef int i
    for i in range(n_classes):
        entry = range_bucket(<size_t>address >> classes[i], classes[i])[0]
        while entry != NULL:
            if holds(&entry.m.range, address):
                return entry.m
            entry = entry.next
    return NULL


cdef dropped_range* dropped_range_at(const char* address) noexcept nogil:
    """The last reservation that held the address and was given back, or NULL."""
    cdef size_t i
    cdef dropped_range* each
    for i in range(min(n_dropped_ranges, <size_t>DROPPED_RANGES)):
        each = &dropped_ranges[(n_dropped_ranges - 1 - i) % DROPPED_RANGES]
        if holds(&each.range, address):
            return each
    return NULL


cdef inline int region_of(const address_range* r, size_t accessible, const char* address) noexcept nogil:
    if address < r.base:
        return GUARD_BEFORE
    if address < r.base + accessible:
        return ACCESSIBLE
    return RESERVED if address < r.limit else GUARD_AFTER


# -- what a memory reserves

cdef address_range range_of(char* start, const layout* of) noexcept nogil:
    cdef address_range r
    r.start = start
    r.base = start + of.pre_guard
    r.limit = r.base + of.capacity
    r.end = r.limit + of.guard
    return r


cdef void move_range(memory* m, const address_range* to) noexcept nogil:
    """From now on find() knows the memory at the addresses of `to`, and no longer at its former addresses."""
    lock(&live_lock.held)
    unregister_range(m)
    m.range = to[0]
    register_range(m)
    unlock(&live_lock.held)


cdef void leave_range(memory* m, const address_range* r, bint hold) noexcept nogil:
    """The memory gives the reservation back. hold: to the quarantine, which owns the range from now on."""
    global n_dropped_ranges, held_bytes
    cdef dropped_range* oldest
    cdef address_range before
    cdef bint held
    cdef domain* name = memory_name(m)
    lock(&live_lock.held)
    oldest = &dropped_ranges[n_dropped_ranges % DROPPED_RANGES]
    before, held = oldest.range, oldest.held
    oldest.range = r[0]
    oldest.size = memory_size(m)
    oldest.accessible = m.accessible
    oldest.held = hold
    memcpy(oldest.maker, m.maker, MAKER_BYTES)
    oldest.name_size = 0 if name == NULL else name.size
    if name != NULL:
        memcpy(oldest.name, name.name, name.size)
    n_dropped_ranges += 1
    if hold:
        held_bytes += <size_t>(r.end - r.start)
    if held:
        held_bytes -= <size_t>(before.end - before.start)
    unlock(&live_lock.held)
    if held:
        release_address_space(before.start, <size_t>(before.end - before.start))


# -- a reference on a memory that another thread may be dropping

cdef inline bint try_retain(memory* m) noexcept nogil:
    """The caller holds live_lock, so the struct exists. False: the memory has no reference left, or only creators know
    it: one is making it, or a pool keeps it. After True, the caller calls check_retained() without live_lock."""
    cdef long long refs = load(&m.refs) if load(&m.owner) != OWNER_CREATOR else 0
    while refs > 0 and not compare_exchange(&m.refs, refs, refs + 1):
        refs = load(&m.refs)
    return refs > 0


cdef inline bint check_retained(memory* m) noexcept:
    """A pool may have handed the memory out anew between the two reads of try_retain(). False: it has, and the
    reference is dropped."""
    if load(&m.owner) != OWNER_CREATOR:
        return True
    with nogil:
        memory_release(m)
    return False


# -- functions for Python

cdef extern from *:
    # As in cpython.type, where the first argument has the wrong type in C.
    object new_record "PyType_GenericAlloc"(PyTypeObject* of_class, Py_ssize_t items)

# Of the class Place, which linmem.records defines: the class and its fields. Its own __init__() would take longer than
# the rest of find().
cdef object place_class = None, memory_field = None, region_field = None, offset_field = None
cdef tuple region_names = ("guard before", "accessible", "reserved", "guard after")


cdef object place_of(object mem, int region, long long offset):
    global place_class, memory_field, region_field, offset_field
    if place_class is None:
        from linmem.records import Place
        memory_field, region_field, offset_field = Place.memory, Place.region, Place.offset
        place_class = Place
    place = new_record(<PyTypeObject*>place_class, 0)
    set_field(memory_field, place, mem)
    set_field(region_field, place, region_names[region])
    set_field(offset_field, place, offset)
    return place


cdef inline int set_field(object field, object record, object value) except -1:
    kind = type(field)
    return (<PyTypeObject*>kind).tp_descr_set(field, record, value)


def find(address):
    """Find the memory that reserves an address.

    linmem looks among the memories that it has reserved itself, also those of pools and of wasmtime stores, and among
    the last 256 reservations that it gave back. It does not find a memory whose bytes a Python creator provides.

    Parameters
    ----------
    address : int
        For example ``mem.as_ptr() + offset``, or the address in a crash report.

    Returns
    -------
    Place or None
        None: the address is in no reservation of linmem.
    """
    cdef size_t given
    cdef char* at
    cdef memory* m
    cdef dropped_range* dropped = NULL
    cdef address_range r
    cdef size_t accessible = 0
    cdef bint held = False, is_stale = False
    check_size(address, "address", &given)
    at = <char*>given
    memset(&r, 0, sizeof(r))        # GCC does not see that `r` is not used when there is neither `m` nor `dropped`
    lock(&live_lock.held)
    m = memory_at(at)
    if m != NULL:
        r = m.range
        accessible = load_size(&m.accessible)
        held = try_retain(m)
    else:
        dropped = dropped_range_at(at)
        if dropped != NULL:
            r = dropped.range
            accessible = dropped.accessible
            is_stale = not dropped.held
    unlock(&live_lock.held)
    if m == NULL and (dropped == NULL or (is_stale and not pages.is_free(at))):
        return None
    return place_of(wrap(m) if held and check_retained(m) else None, region_of(&r, accessible, at), at - r.base)


def live():
    """All memories that Python code or a wasmtime store holds now, as a list of `MemoryInfo` in no particular order.

    Memories of Python creators are in the list, except broken ones, and except a memory whose own `grow_to` makes this
    call. Idle slots of pools are not in the list. If another program has damaged a memory, for example cut its file
    short, the figures are those from before.

    Raises
    ------
    PageError
        The OS did not say how much of a memory is resident.
    """
    cdef memory* each = NULL
    cdef memory* following = NULL
    cdef Memory mem
    cdef failure why
    found = []
    # A reference on each memory only for the time of its turn: until it is dropped, a memory that is closed meanwhile
    # stays in use, for example in a budget.
    with nogil:
        following = retained_after(NULL)
    try:
        while following != NULL:
            each, mem = following, None
            with nogil:
                following = retained_after(each)
            if not check_retained(each):
                continue
            mem = <Memory>wrap(each)
            if mem.m.broken:
                continue
            if mem.m.ops.check != NULL and mem.m.ops.check(mem.m, &why):
                raise_interrupt(&why)
            if begin_access(mem.m, &why):       # this call is in its grow_to()
                raise_interrupt(&why)
                continue
            found.append(info_of(mem.m))
        return found
    finally:
        if following != NULL:
            with nogil:
                memory_release(following)


cdef int raise_interrupt(const failure* why) except -1:
    """Raises Ctrl-C, and no failure that is an Exception."""
    error = exception_of(why)
    if not isinstance(error, Exception):
        raise error
    return 0


cdef memory* retained_after(memory* m) noexcept nogil:
    """The next memory after `m`, which the caller has a reference on, that try_retain() gets. NULL for `m`: the first;
    as the result: the end."""
    cdef link* node
    cdef memory* after
    lock(&live_lock.held)
    node = &live_memories if m == NULL else &m.live
    while True:
        node = node.next
        after = <memory*>node.owner
        if after == NULL or try_retain(after):
            break
    unlock(&live_lock.held)
    return after
