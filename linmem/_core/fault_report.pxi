# The report of a memory fault: one line that names the memory, before the process dies; a part of memory.pyx.
#
# report_fault() runs in a signal handler or in an exception handler. It takes live_lock by try_lock() only, and
# allocates nothing.
#
# The quarantine holds the address space of dropped memories, inaccessible, so that a use after the end of a memory is a
# fault in a range that linmem can name. The ranges are those of `dropped_ranges` with `held`. The oldest is released
# first. live_lock protects held_bytes.

from sys import _getframe

cdef atomic_i64 reports_are_on
cdef atomic_i64 reports_lock        # held while handlers are installed or removed
cdef atomic_i64 held_bound          # bytes of address space that the quarantine may hold; 0: there is no quarantine
cdef size_t held_bytes = 0

cdef enum:
    REPORT_BYTES = 480
    LOCK_WAIT = 1000000000          # nanoseconds; a fork() of another thread may hold live_lock for some time
    LOCK_SLEEP = 500000


# -- the quarantine

cdef bint try_hold(memory* m) noexcept nogil:
    """The memory is dropped. True: the quarantine owns its reservation now."""
    if (<size_t>(m.range.end - m.range.start) > <size_t>load(&held_bound)
            or pages.decommit(m.range.base, <size_t>(m.range.limit - m.range.base))):
        return False
    leave_range(m, &m.range, True)
    release_held(<size_t>load(&held_bound))
    return True


cdef bint release_held(size_t bound) noexcept nogil:
    """Release the oldest ranges until the quarantine holds at most `bound` bytes. True: one was released."""
    global held_bytes
    cdef dropped_range* each
    cdef dropped_range* oldest
    cdef address_range r
    cdef size_t i
    cdef bint released = False
    while True:
        oldest = NULL
        lock(&live_lock.held)
        if held_bytes > bound:
            for i in range(DROPPED_RANGES):
                each = &dropped_ranges[(n_dropped_ranges + i) % DROPPED_RANGES]
                if oldest == NULL and each.held:
                    oldest = each
        if oldest != NULL:
            r = oldest.range
            oldest.held = False
            held_bytes -= <size_t>(r.end - r.start)
        unlock(&live_lock.held)
        if oldest == NULL:
            return released
        release_address_space(r.start, <size_t>(r.end - r.start))
        released = True


# -- who made a memory

cdef void note_maker(memory* m) noexcept:
    """Store file and line of the innermost Python code outside of linmem. If that fails, nothing is stored."""
    cdef bytes text = b""
    try:
        frame = _getframe()
        while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "linmem":
            frame = frame.f_back
        if frame is not None:
            name = frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
            text = f"{name}:{frame.f_lineno}".encode("ascii", "backslashreplace")[:MAKER_BYTES - 1]
    except Exception:
        pass
    lock(&live_lock.held)
    snprintf(m.maker, MAKER_BYTES, "%s", <const char*>text)
    unlock(&live_lock.held)


cdef void forget_makers() noexcept nogil:
    """The lines of memories that were made while no reports were on are not known."""
    cdef link* each
    lock(&live_lock.held)
    each = live_memories.next
    while each.owner != NULL:
        (<memory*>each.owner).maker[0] = 0
        each = each.next
    unlock(&live_lock.held)


# -- the line; snprintf() is not async-signal-safe, so the line is put together here

cdef const char* DIGITS = "0123456789abcdef"

cdef struct line:
    size_t n
    char text[REPORT_BYTES]


cdef void put(line* to, const char* text) noexcept nogil:
    put_bytes(to, text, strlen(text))


cdef void put_bytes(line* to, const char* text, size_t size) noexcept nogil:
    cdef size_t i
    for i in range(min(size, REPORT_BYTES - 1 - to.n)):     # one byte is left for the end of the line
        to.text[to.n] = c"?" if 0 <= text[i] < c" " or text[i] == 127 else text[i]
        to.n += 1


cdef void put_number(line* to, size_t number, unsigned int base) noexcept nogil:
    """Base 10: with a comma before each three digits. Base 16: with 0x."""
    cdef char[32] digits
    cdef int at = 31, n = 0
    digits[31] = 0
    while number or n == 0:
        if base == 10 and n and n % 3 == 0:
            at -= 1
            digits[at] = c","
        at -= 1
        n += 1
        digits[at] = DIGITS[number % base]
        number //= base
    if base == 16:
        put(to, "0x")
    put(to, &digits[at])


cdef void put_place(line* to, const address_range* r, size_t size, size_t accessible, const char* addr) noexcept nogil:
    """Which byte it is, how far past byte_size, and in which region."""
    cdef int region = region_of(r, accessible, addr)
    if region == GUARD_BEFORE:
        put(to, "byte -")
        put_number(to, <size_t>(r.base - addr), 10)
        put(to, " (guard before)")
        return
    put(to, "byte ")
    put_number(to, <size_t>(addr - r.base), 10)
    put(to, " (")
    if <size_t>(addr - r.base) >= size:
        put_number(to, <size_t>(addr - r.base) - size, 10)
        put(to, " bytes past byte_size, ")
    put(to, "accessible)" if region == ACCESSIBLE else "reserved)" if region == RESERVED else "guard after)")


cdef void report_fault(char* addr, int access) noexcept nogil:
    cdef line out
    cdef memory* m
    cdef dropped_range* dropped = NULL
    cdef domain* name
    cdef long long deadline = pages.clock_ns() + LOCK_WAIT
    while not try_lock_of_fault():
        if pages.clock_ns() > deadline:
            return
        pages.sleep_ns(LOCK_SLEEP)
    m = memory_at(addr)
    if m == NULL:
        dropped = dropped_range_at(addr)
    out.n = 0
    put(&out, "linmem: ")
    put(&out, "read" if access == pages.FAULT_READ else "write" if access == pages.FAULT_WRITE else
        "call" if access == pages.FAULT_EXECUTE else "access")
    put(&out, " at ")
    if m != NULL:
        put_place(&out, &m.range, memory_size(m), m.accessible, addr)
        put(&out, " of ")
        put(&out, "an idle slot of a pool" if load(&m.refs) == 0 else "the memory")
        name = memory_name(m)
        put_memory(&out, &m.range, memory_size(m), NULL if name == NULL else name.name,
                   0 if name == NULL else name.size, m.maker if load(&m.owner) == OWNER_PYTHON else NULL)
        if load(&m.owner) == OWNER_WASMTIME:
            put(&out, ", of a wasmtime store")
        elif load(&m.protection) != PROTECTION_NONE:
            put(&out, ", with protected pages")
    elif dropped != NULL:
        put_place(&out, &dropped.range, dropped.size, dropped.accessible, addr)
        put(&out, " of a dropped memory")
        put_memory(&out, &dropped.range, dropped.size, dropped.name, dropped.name_size, dropped.maker)
    unlock(&live_lock.held)
    if m != NULL or dropped != NULL:
        out.text[out.n] = c"\n"
        pages.write_error(out.text, out.n + 1)


cdef inline bint try_lock_of_fault() noexcept nogil:
    """try_lock() waits for no other thread, but it fails only if the lock is taken when it looks."""
    return try_lock(&live_lock.held) if load(&live_lock.held) != generation else False


cdef void put_memory(line* to, const address_range* r, size_t size, const char* name, size_t name_size,
                     const char* maker) noexcept nogil:
    if name_size:
        put(to, " '")
        put_bytes(to, name, name_size)
        put(to, "'")
    put(to, " at ")
    put_number(to, <size_t>r.base, 16)
    put(to, " (")
    put_number(to, size, 10)
    put(to, " bytes)")
    if maker != NULL and maker[0]:
        put(to, ", made at ")
        put(to, maker)


# -- functions for Python

def enable_fault_report(quarantine=0):
    """Write one line to the standard error when native code is about to die of a fault in one of linmem's memories.

    The line names the access, the byte, the region and the memory, and the line of Python code that made the memory if
    the report was on then. Afterwards the process dies exactly as it would have died. A trap of WebAssembly is not
    reported, because wasmtime handles it. On Linux enable `faulthandler` before this, because a `faulthandler` that is
    enabled later raises the signal once more, without the address.

    Parameters
    ----------
    quarantine : int
        Bytes of address space of dropped memories, of at most 256 memories, that stay reserved and inaccessible, so
        that a use after the end of a memory is named. The oldest are released first, and all of them if an address
        space limit is in the way. A pool's idle slots are not in the quarantine.

    Raises
    ------
    NotImplementedError
        On this system linmem cannot report faults (only Windows, and Linux on x86-64 and on aarch64).

    Notes
    -----
    A second call changes the quarantine, and installs the handlers again if they were replaced by the default action.

    The line comes before the fault handlers of the code that runs, so it also comes if such a handler lets the process
    live. On Windows, `ctypes` raises an `OSError` for a fault inside of a function that it calls.
    """
    cdef size_t bound
    cdef failure why
    cdef int code = 0
    check_bounded(quarantine, "quarantine", _BELOW_63_BITS, &bound)
    if bound >> 63:
        raise OverflowError(f"quarantine must be {_BELOW_63_BITS}, got {_shown(quarantine)}")
    if not pages.capabilities().reports_faults:
        raise NotImplementedError("enable_fault_report() needs Windows, or Linux on x86-64 or aarch64")
    with nogil:
        lock(&reports_lock)
        if load(&reports_are_on) == 0:
            forget_makers()
        code = fail_page_call(&why, pages.watch_faults(report_fault), "watch_faults", 0)
        if code == 0:
            store(&reports_are_on, 1)
            store(&held_bound, <long long>bound)
        unlock(&reports_lock)
        release_held(bound)
    if code:
        raise_failure(&why)


def disable_fault_report():
    """Undo `linmem.enable_fault_report`, and release the quarantine. Without an earlier call it does nothing."""
    with nogil:
        lock(&reports_lock)
        pages.unwatch_faults()
        store(&reports_are_on, 0)
        store(&held_bound, 0)
        unlock(&reports_lock)
        release_held(0)
