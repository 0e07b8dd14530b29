# Memories and creators: the structs that threads share, and the classes that hand them out. Floor 2.
#
#  |<- pre_guard ->|<------------- capacity (reserved) ------------->|<- guard ->|
#  +---------------+----------------------+---------------------------+-----------+
#  | inaccessible  | accessible           | reserved, inaccessible    | inaccess. |
#  +---------------+----------------------+---------------------------+-----------+
#                  ^base     ^byte_size   ^accessible                 ^base+byte_capacity
#  base is page-aligned and fixed; byte_size <= accessible <= byte_capacity; accessible is a page multiple

from cpython.object cimport PyObject

from linmem._atomic cimport load, word
from linmem._os cimport pages

# Why a nogil call failed. Filled only on failure; the text is made from it in one place.
cdef struct failure:
    int code                    # what the call returned: an OS code, or an E_ constant
    const char* call            # static text: the page call or the operation
    size_t size                 # bytes that it asked for
    size_t used                 # bytes (or buffers) that stand in the way
    size_t limit                # the bound that was hit
    char detail[320]            # more words; may be empty
    PyObject* exception         # E_PYTHON only: a reference that whoever ends the failure must drop

cdef enum:
    CACHE_LINE = 64

# A lock under which lists and tables change that a forked child must not find half changed: fork waits for those
# that are listed by list_lock(). Whoever holds one waits for nothing but for orphans_lock, and never for the GIL.
cdef struct fork_lock:
    word held
    fork_lock* next
    fork_lock* previous

ctypedef struct run:
    size_t offset
    size_t size

# What a memory holds at the start, or held once: a page here and there, and zeros. Never changes, may be used by
# any thread, and is reference-counted like the memories that hold it.
cdef struct image:
    word refs
    word memories               # that hold it: some of the references
    pages.image_pages content
    size_t offset               # of the content in a memory, whole host pages
    size_t end                  # a memory of it has at least so many bytes
    size_t low                  # within the content, whole host pages: what is not zero lies in low .. high,
    size_t high
    word forgotten              # 1: its Python object is gone, so no new memory of it is made
    word slots                  # of pools that start from it
    run* runs                   # and there in these, in order and apart, multiples of GRANULE
    size_t n_runs
    size_t room                 # for runs
    bint runs_known             # else they are one, of all there is

cdef enum:
    GRANULE = 4096              # of what is zero and what is not, whatever the host page

# How the bytes of a memory's image got there.
cdef enum:
    IMAGE_COPIED = 0            # copied; or there is none
    IMAGE_MAPPED = 1            # its pages low .. high are the image's own until they are written
    IMAGE_BROKEN = 2            # some of these have been given back for zeros

# A part of a memory that is not as in an image.
ctypedef struct change:
    size_t offset
    size_t size
    bint zero                   # it holds zeros now

ctypedef struct changes:
    change* list
    size_t n
    size_t room

# A request, in bytes; already checked against each other (minimum <= maximum).
cdef struct memory_spec:
    size_t minimum
    size_t maximum              # SIZE_MAX: none
    size_t reservation          # base stays put up to here; UNCHOSEN: the creator chooses
    size_t guard
    size_t page_size            # wasm page: 1 or 65536
    bint is_64
    bint is_shared              # never moves
    image* image                # what it holds at the start; NULL: zeros
    bint watched                # the OS will be asked which pages were touched, many times
    bint may_move               # a growth past the capacity may move the base

# Whether pages of a memory have another access than "rw". Such a memory does not move: it is several mappings.
cdef enum:
    PROTECTION_NONE = 0
    PROTECTION_KNOWN = 1
    PROTECTION_UNKNOWN = 2

cdef struct protections

cdef enum:
    OWNER_PYTHON = 0
    OWNER_WASMTIME = 1
    OWNER_LEFT = 2              # wasmtime has dropped it, and Python still holds it

ctypedef memory* memory_ptr

# A growth that runs Python code: this thread is in it, and would wait for itself if that code waited for the memory.
cdef struct own_growth:
    own_growth* outer
    memory* m

# What one kind of memory can do. `grow` is called with the memory's lock held.
cdef struct memory_ops:
    const char* kind
    int (*grow)(memory* m, size_t new_size, failure* why) noexcept nogil
    int (*resident)(memory* m, size_t* bytes, failure* why) noexcept nogil     # NULL: not ours to ask for
    void (*free)(memory* m) noexcept nogil      # the last reference is gone: pages and struct
    # In a forked child, which does not have the thread that was moving the memory. NULL: a fork waits for a move.
    void (*lose)(memory* m) noexcept nogil
    bint pages_are_ours                         # protect, discard and prefault make sense
    bint prefaults                              # every accessible page is resident when a guest gets it

# What an adaptor hangs on each memory that comes through it. Outermost adaptor first. NULL: not
# interested, but for `dropped`.
cdef struct memory_hook:
    memory_hook* next
    # Before a growth, the lock held: 0, or a failure that stops it (after_grow is then not called:
    # a hook that fails undoes its own part).
    int (*before_grow)(memory_hook* hook, memory* m, size_t new_size, failure* why) noexcept nogil
    # After it, the lock held, for each hook whose before_grow returned 0; code: how it ended.
    void (*after_grow)(memory_hook* hook, memory* m, size_t old_size, size_t new_size, int code) noexcept nogil
    # The last reference is gone, so no thread uses the memory. In a forked child this may be called a second time, if
    # the thread that called it first is lost.
    void (*before_drop)(memory_hook* hook, memory* m) noexcept nogil
    # Next: true takes the memory over, with this hook and those of the adaptors below, to be handed
    # out again. The adaptors above see it dropped.
    bint (*keep)(memory_hook* hook, memory* m) noexcept nogil
    # They are gone, and so is the memory. Frees the hook itself.
    void (*dropped)(memory_hook* hook) noexcept nogil
    # A pool above changes the memory while no guest has it: to `size` bytes, `committed` of which (whole host pages)
    # are accessible. Called before more becomes accessible and after less has become so. 0, or a failure that
    # stops an increase; a decrease is never refused. The hooks above this one are then told the old figures again.
    int (*resized)(memory_hook* hook, memory* m, size_t size, size_t committed, failure* why) noexcept nogil
    # What the memory's pages are charged to, those that `resized` was told of last; compared, never followed. NULL:
    # nothing.
    const void* budget

# The head of every memory, whatever its kind. Reference-counted, because wasmtime frees memories on
# any thread with no GIL: nothing in here is a Python object.
#
# What is no word is written under the lock. Where it is read without: base, accessible, capacity, maximum and
# covered by peek() (and written by poke()); base and covered fit together only during an access.
cdef struct memory:
    const memory_ops* ops
    memory_hook* hooks
    word refs                   # handles that are not closed, and wasmtime
    word pins                   # exported buffers; negative: the base is moving, or will when `accesses` has ended
    word accesses               # under way, each for a moment; in the upper half the generation that they are of
    word lock                   # one growth (or drop of a hook chain) at a time
    word owner                  # OWNER_
    word size                   # byte_size; written under the lock, read anywhere
    char* base
    word protection             # PROTECTION_; written under the lock
    size_t accessible
    size_t capacity             # bytes
    size_t maximum              # SIZE_MAX: none
    size_t pre_guard
    size_t guard
    size_t covered              # base .. base+covered is ours or faults: what wasm may touch
    bint broken                 # of a memory in Python: nobody knows where it is any more
    size_t chosen               # bytes of the reservation, if linmem chose its size; else 0
    bint is_shared
    bint may_move               # past its capacity the base may change
    bint moved                  # the mapping has moved once: what it grew since is a second mapping
    bint huge_pages             # the OS was asked for them; a decommit may have made it forget
    bint growth_is_watched      # a hook has before_grow or after_grow
    word image_state            # IMAGE_; written under the lock
    image* image                # a reference on what it held at the start, or was last restored to; NULL: zeros
    size_t started              # byte_size at the start; 0: it was restored to another image
    size_t dirtied              # bytes that a restore found written, the first since pages were given back; or 0
    protections* protections    # which pages have which access; NULL: all are "rw"
    memory* registry_next       # the bridge's table of memories that wasmtime holds, by the base that they had when
    char* registered            # they were put there
    # For a child that is forked in the middle of a growth, and does not have the thread that was in it:
    size_t opening              # up to here, pages beyond the size may be accessible already; 0: no growth is under way
    size_t growing_from         # with hooks: what the growth is from, and to; to 0: none is under way
    size_t growing_to
    memory_hook* tell_from      # whose after_grow is still to be called: from the one up to the other
    memory_hook* tell_to
    memory* live_next           # of all memories of this process that a child must look through
    memory* live_previous
    char apart[CACHE_LINE]      # another thread's memory may come next


# The touched runs of a memory's bytes at .. end, some at a time. After touched_next() was True: n runs, all of them
# over the mapped image or none. After False: the end, or `code` says why it cannot be told.
cdef enum:
    RUNS = 64           # that the kernel is asked for at a time

cdef struct touched_runs:
    memory* m
    size_t at
    size_t end
    bint over_image
    int code
    size_t n
    pages.span runs[RUNS]


# What is missing when something is refused, and may be had from idle slots of pools.
cdef enum:
    RELIEF_PAGES = 0            # pages could not be committed
    RELIEF_SPACE = 1            # address space could not be reserved
    RELIEF_BUDGET = 2           # a budget does not cover the bytes

# A name that keeps the pages of some users of a pool from the others; reference-counted, equal names are one struct.
cdef struct domain:
    word refs
    domain* next
    size_t hash
    size_t size
    char* name                  # UTF-8; none after it
    size_t census               # the number of the last census of the pools that counted the domain; see census_lock
    size_t holds                # what that census found

# What a Python creator is asked for, of what its new_memory() is not told.
cdef struct request:
    bint may_move
    domain* domain              # borrowed from the caller who asks


cdef inline size_t memory_size(memory* m) noexcept nogil:
    return <size_t>load(&m.size)


cdef size_t UNCHOSEN            # of a reservation
cdef size_t NO_MAXIMUM

cdef int memory_grow_to(memory* m, size_t new_size, failure* why) noexcept nogil
cdef void memory_retain(memory* m) noexcept nogil
cdef void memory_release(memory* m) noexcept nogil
cdef int lock_memory(memory* m, failure* why) noexcept nogil
cdef int begin_move(memory* m, size_t new_size, failure* why) noexcept nogil
cdef void end_move(memory* m) noexcept nogil
cdef void memory_hang(memory* m, memory_hook* hook) noexcept nogil
cdef void begin_own_growth(own_growth* growth, memory* m) noexcept nogil
cdef void end_own_growth(own_growth* growth) noexcept nogil
cdef void list_memory(memory* m) noexcept nogil
cdef void unlist_memory(memory* m) noexcept nogil
cdef void in_each_child(void (*call)() noexcept nogil) noexcept nogil
cdef memory* live_after(memory* m) noexcept nogil
cdef int memory_unprotect(memory* m, size_t size) noexcept nogil
cdef void memory_forget_protection(memory* m) noexcept nogil
cdef void memory_doubt(memory* m) noexcept nogil
cdef int refuse_foreign(const char* at, size_t size, int allowed, const char* call, failure* why) noexcept nogil
cdef int memory_resident(memory* m, size_t* bytes, failure* why) noexcept nogil
cdef void give_back(char* at, size_t size) noexcept nogil

cdef image* image_new(size_t offset, size_t size, failure* why) noexcept nogil
cdef int image_put(image* it, size_t at, const char* bytes, size_t size, failure* why) noexcept nogil
cdef int image_finish(image* it, failure* why) noexcept nogil
cdef void image_retain(image* it) noexcept nogil
cdef void image_release(image* it) noexcept nogil
cdef void image_copy(const image* it, char* base) noexcept nogil
cdef bint is_zero(const char* at, size_t size) noexcept nogil
cdef void leave_image(memory* m) noexcept nogil
cdef void memory_restore(memory* m, image* to) noexcept nogil
cdef int memory_turn_to(memory* m, image* to) noexcept nogil
cdef size_t memory_border(memory* m, size_t at, size_t end, bint* over_image) noexcept nogil
cdef void touched_begin(touched_runs* runs, memory* m, size_t at, size_t end) noexcept nogil
cdef bint touched_next(touched_runs* runs) noexcept nogil
cdef void memory_refill(memory* m, size_t at, size_t size) noexcept nogil
cdef bint memory_is_filled(memory* m, size_t size) noexcept nogil
cdef int memory_renew(memory* m, size_t size) noexcept nogil
cdef int memory_start_again(memory* m, image* to) noexcept nogil
cdef int memory_snapshot(memory* m, image** out, failure* why) noexcept nogil
cdef int compare(memory* m, image* now, image* base, bint for_delta, changes* out, failure* why) noexcept nogil

cdef int fail(failure* why, int code, const char* call, size_t size, size_t used=*, size_t limit=*) noexcept nogil
cdef int fail_python(failure* why, object error) noexcept
cdef void failure_text(const failure* why, char* text, size_t room) noexcept nogil
cdef int raise_failure(const failure* why) except -1
cdef void acquire(word* lock) noexcept nogil
cdef bint try_acquire(word* lock) noexcept nogil
cdef void unlock(word* lock) noexcept nogil
cdef void list_lock(fork_lock* it) noexcept nogil
cdef void unlist_lock(fork_lock* it) noexcept nogil
cdef void relief_is(bint (*give)(int what, const void* budget, size_t size) noexcept nogil) noexcept nogil
cdef bint relieve(int what, const void* budget, size_t size) noexcept nogil
cdef int commit_pages(char* at, size_t size) noexcept nogil
cdef void forgotten_is(void (*tell)(image* it) noexcept nogil) noexcept nogil
cdef domain* current_domain() noexcept nogil
cdef void set_domain(domain* d) noexcept nogil
cdef domain* domain_of(object name) except? NULL
cdef void domain_retain(domain* d) noexcept nogil
cdef void domain_release(domain* d) noexcept nogil
cdef void drop_object(PyObject* object) noexcept nogil
cdef bint python_is_ending() noexcept nogil
cdef int check_size(object value, str name, size_t* out) except -1
cdef int check_extent(object value, str name, size_t* out) except -1
cdef int check_bounded(object value, str name, str bound, size_t* out) except -1
cdef int check_count(object value, str name, size_t* out) except -1
cdef int check_readable(const Py_buffer* given) except -1
cdef int check_flag(object value, str name) except -1
cdef int take_bytes(object data, str name, Py_buffer* out) except -1
cdef NativeCreator check_native(object value, str name)
cdef object wrap(memory* m)
cdef void answer_request(request* it) noexcept


# What Python's Image is made of.
cdef class ImageHandle:
    cdef image* it


cdef class NativeCreator:
    cdef object __weakref__
    # 0 and *out holds one reference, or a code and nothing is left behind.
    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil
    cdef int fill_spec(self, memory_spec* spec, ty, minimum, maximum, reserved_size_in_bytes,
                       guard_size_in_bytes) except -1
    cdef object make_checked(self, const memory_spec* spec, str guard_name, object domain=*)


cdef class MmapCreator(NativeCreator):
    cdef readonly bint prefault
    cdef readonly bint huge_pages


cdef class Memory:
    cdef memory* m
    cdef word users             # exported buffers and calls under way, as _handle.pxi lays them out
    cdef word fresh             # 1: as a creator made it; a Python creator hands a fresh one on, once
    cdef object __weakref__
    cdef memory* enter(self) except NULL
    cdef memory* enter_locked(self) except NULL
    cdef memory* enter_pages(self, str call) except NULL
    cdef void leave(self) noexcept
    cdef int refuse_entry(self, long long now) except -1
    cdef void settle(self) noexcept
    cdef void last_left(self, long long now) noexcept
    cdef void call_becomes_export(self) noexcept
    cdef void release_export(self) noexcept
    cdef bint is_protected(self) except -1
    cdef int set_items(self, items, bytes values) except -1
    cdef int check_access(self, size_t start, size_t n, int allowed, const char* call) except -1
    cdef int check_apply(self, size_t start, size_t n, data) except -1


cdef int memory_changes(Memory mem, object since, str name, bint for_delta, changes* out) except -1
