# Memories, images and creators: the structs that threads share, and the classes over them.
#
#  |<- pre_guard ->|<------------- capacity (reserved) ------------->|<- guard ->|
#  +---------------+----------------------+---------------------------+-----------+
#  | inaccessible  | accessible           | reserved, inaccessible    | inaccess. |
#  +---------------+----------------------+---------------------------+-----------+
#                  ^base     ^byte_size   ^accessible                 ^base+byte_capacity
#  base is page-aligned and changes only between begin_move() and end_move(). byte_size <= accessible <= byte_capacity.
#  accessible is a multiple of the host page.

from cpython.object cimport PyObject

from linmem._os cimport pages
from linmem._core.linked_list cimport link
from linmem._core.units cimport atomic_i64

cdef enum:
    NAME_BYTES = 100            # the most bytes of a creator's name; arguments.py has the same number

# Why a nogil function failed. Such a function returns 0, or the code that it stored here. In comments, "a code" is such
# a result that is not 0. A call that succeeds stores nothing. failures.pxi makes the text and the exception.
cdef struct failure:
    int code                    # the returned code: a code of the OS, or an E_ constant
    const char* call            # static text: the page call or the operation
    size_t size                 # bytes that the call asked for
    size_t used                 # bytes, buffers or an offset: the value of `code` determines which
    size_t limit                # the bound that the call exceeded
    char detail[320]            # further text; may be empty
    char name[NAME_BYTES + 1]   # of the creator that refused; empty: it has none, or `code` tells of no refusal
    PyObject* exception         # E_PYTHON only: a reference; the code that handles the failure must drop it
    bint counted                # no creator counts it: a creator has done so, or Ctrl-C ended the call
    bint of_signal              # E_PYTHON only: the handler of a signal raised the exception while linmem waited

cdef enum:
    CACHE_LINE = 64
    MAKER_BYTES = 96

# A lock for lists and tables that a forked child must not find half changed. fork() takes every lock that
# register_fork_lock() has registered. A thread that holds such a lock may wait for orphans_lock or live_lock, for no
# other lock, and never for the GIL.
cdef struct fork_lock:
    atomic_i64 held
    fork_lock* next
    fork_lock** link            # the address of the pointer to this lock: fork_locks, or `next` of another lock

ctypedef struct run:
    size_t offset, size

# The bytes that memories start from or are restored to: runs of bytes with zeros between them. The content never
# changes, any thread may use it, and the struct is reference-counted like a memory.
cdef struct image:
    atomic_i64 refs
    atomic_i64 memories         # memories that are attached to it; each holds one of the references
    pages.image_pages content
    size_t offset               # where the content begins in a memory; a multiple of the host page
    size_t end                  # a memory of the image has at least this many bytes
    size_t low, high            # whole host pages: all nonzero bytes of the content lie in low .. high
    atomic_i64 forgotten        # 1: the Image object is gone, so no new memory starts from the image
    atomic_i64 slots            # the number of slots, in all pools, that start from the image
    run* runs                   # of the content, in ascending order, in multiples of GRANULE; between them are zeros
    size_t n_runs
    size_t room                 # the number of runs that fit into the array
    bint runs_unknown           # True: from_fd() was not told the runs, so `runs` may include zeros

cdef enum:
    GRANULE = 4096              # unit of the runs of an image, even if the host page is larger

# How the bytes of a memory's image got into the memory.
cdef enum:
    IMAGE_COPIED = 0            # the bytes were copied, or the memory has no image
    IMAGE_MAPPED = 1            # the pages low .. high show the image until they are written (copy-on-write)
    IMAGE_BROKEN = 2            # some of the mapped pages have been replaced by pages of zeros

# The copy-on-write state of a memory. Only copy_on_write.pxi and the inline functions below access the fields. They
# change with the memory's lock held, or while the caller owns the memory exclusively.
cdef struct cow_state:
    atomic_i64 how              # IMAGE_
    image* image                # the image that the memory started from or was last restored to, one reference; or NULL
    size_t started              # byte_size when the memory started from the image; 0: it was restored to the image
    size_t dirtied              # written bytes that the first restore after an image_reset() found; 0: not known yet

# Parts of a memory that differ from an image.
ctypedef struct change:
    size_t offset, size
    bint zero                   # the part holds zeros now; known only in changes for a delta

ctypedef struct changes:
    change* list
    size_t n, room
    size_t size                 # of the memory, or the end of the image, when it was compared

# A part of a delta: `size` bytes to write at `offset`.
ctypedef struct delta_piece:
    size_t offset, size
    const char* bytes           # NULL: zeros

# A request, in bytes. The caller has checked that minimum <= maximum.
cdef struct memory_spec:
    size_t minimum
    size_t maximum              # SIZE_MAX: none
    size_t reservation          # growth up to this size does not move the base; UNCHOSEN: the creator chooses
    size_t guard
    size_t page_size            # wasm page: 1 or 65536
    bint is_64
    bint is_shared              # never moves
    image* image                # the contents at the start; NULL: zeros
    bint watched                # the OS will be asked many times which pages were touched
    bint may_move               # a growth past the capacity may move the base

# Whether some pages of a memory have an access other than "rw". Such a memory has several mappings and never moves.
cdef enum:
    PROTECTION_NONE = 0
    PROTECTION_KNOWN = 1
    PROTECTION_UNKNOWN = 2
    PROTECTION_READ_ONLY = 3    # every page is "r", for good: the memory was opened for reading

cdef struct protections

# The parts of a memory that show pages of another source; see map_and_unmap.pxi.
cdef struct window_list

# The refusals of a creator; see refusals.pxi.
cdef struct refusal_log

cdef enum:
    OWNER_CREATOR = 0           # a creator is making the memory, or a pool keeps it
    OWNER_PYTHON = 1
    OWNER_WASMTIME = 2
    OWNER_LEFT = 3              # wasmtime has dropped the memory, and Python still holds it

# A growth of this thread that runs Python code, or a new memory for which this thread runs on_made. If that code waited
# for the memory, the thread would wait for itself.
cdef struct own_growth:
    own_growth* outer
    memory* m

# The operations of one kind of memory. `grow` is called with the memory's lock held.
cdef struct memory_ops:
    const char* kind
    int (*grow)(memory* m, size_t new_size, failure* why) noexcept nogil
    int (*resident)(memory* m, size_t* bytes, failure* why) noexcept nogil     # NULL: linmem cannot ask the OS
    void (*free)(memory* m) noexcept nogil      # the last reference is gone: frees the pages and the struct
    # Called in a forked child if a thread of the parent was moving the memory. NULL: not needed, because moving_lock
    # makes fork() wait until a move is complete.
    void (*lose)(memory* m) noexcept nogil
    bint pages_are_ours                         # linmem mapped the pages: protect, discard and prefault work
    bint prefaults                              # every accessible page is resident when a guest gets the memory
    # The pages show a file: untouched pages are not zero, written pages are not this process's own, and the pages are
    # never given back, moved, or mapped from an image.
    bint pages_are_shared
    # Called when a call of a handle begins, with the GIL, if m.enters_slowly. A code: the call must not touch the
    # bytes. NULL: nothing to check.
    int (*check)(memory* m, failure* why) noexcept
    # Makes the bytes of the range durable. NULL: they are in no file.
    int (*flush)(memory* m, size_t offset, size_t size, failure* why) noexcept nogil
    # Called when wasmtime asks for the size. The memory takes over the size that other processes gave it. NULL: none
    # do.
    void (*take_size)(memory* m) noexcept nogil
    # Whole host pages become zero for all that share them, in the cheapest way; a code of the OS. NULL: memset().
    int (*zero_pages)(memory* m, size_t start, size_t end) noexcept nogil
    # -> the first run in start .. end that may not be zero, in pages of the kernel; found_start == end: there is none.
    # A code of the OS. NULL: it is not known.
    int (*find_data)(memory* m, size_t start, size_t end, size_t* found_start, size_t* found_end) noexcept nogil
    # -> the file whose pages the memory shows; *position: where byte 0 of the memory lies in it. NULL: the pages belong
    # to this process alone.
    const pages.file_pages* (*file_of)(memory* m, size_t* position) noexcept nogil

# What an adaptor (a creator with an upstream) adds to each memory from its upstream before it returns the memory. The
# hook of the outermost adaptor comes first. Adaptors upstream of a hook's owner are "below" the hook, the others are
# "above". Each function except `dropped` may be NULL.
cdef struct memory_hook:
    memory_hook* next
    # Called before a growth with the lock held. If it returns a code, the growth fails, and after_grow of this hook is
    # not called. So before_grow must undo its own changes before it returns a code.
    int (*before_grow)(memory_hook* hook, memory* m, size_t new_size, failure* why) noexcept nogil
    # Called with the lock held after the growth, for each hook whose before_grow returned 0. code: the result.
    void (*after_grow)(memory_hook* hook, memory* m, size_t old_size, size_t new_size, int code) noexcept nogil
    # The last reference is gone, so no thread uses the memory. In a forked child this may be called a second time, if
    # the thread that called it first is lost.
    void (*before_drop)(memory_hook* hook, memory* m) noexcept nogil
    # Called after before_drop. True: the hook's owner keeps the memory, with this hook and those of the adaptors below,
    # and will hand it out again. The adaptors above are told that the memory was dropped.
    bint (*keep)(memory_hook* hook, memory* m) noexcept nogil
    # The memory is gone, or kept by an adaptor below. Frees the hook itself.
    void (*dropped)(memory_hook* hook) noexcept nogil
    # `dropped` runs Python code, so it is called after those of all hooks without this flag: the code finds the budgets
    # refunded, and may fork.
    bint dropped_runs_python
    # A pool above changes an idle memory to `size` bytes with `committed` accessible bytes (whole host pages). Called
    # before an increase and after a decrease. Only an increase from 0 may be refused, with a code. The hooks between
    # the pool and this hook are then called again, with 0 and 0.
    int (*resized)(memory_hook* hook, memory* m, size_t size, size_t committed, failure* why) noexcept nogil
    # This hook, a hook below or the OS refused a growth. Called with the lock held, after after_grow of all hooks.
    # True: the growth is tried again, once, and no further hook is asked. False: *why holds the failure; the function
    # may have put another one in its place.
    bint (*refused)(memory_hook* hook, memory* m, size_t new_size, failure* why) noexcept nogil
    # Identifies the budget that this hook charges for the memory's pages. The pointer is only compared, never
    # dereferenced. NULL: the hook charges no budget.
    const void* budget
    # The creator that counts the growths which before_grow refuses. A borrowed pointer. NULL: the memory's own creator.
    refusal_log* refusals
    # Called with the GIL for each new handle on the memory. `handle` is borrowed, and the call must not raise. Only
    # called if some hook of the memory has before_grow or after_grow.
    void (*wrapped)(memory_hook* hook, memory* m, PyObject* handle) noexcept

# The addresses that linmem reserved for a memory, in the table of ranges; see places.pxi. Protected by live_lock.
cdef struct range_entry:
    range_entry* next           # in the same bucket
    memory* m

cdef struct address_range:
    char* start                 # NULL: linmem did not reserve the memory's addresses
    char* base
    char* limit                 # base + capacity
    char* end                   # start .. end includes the guards

# The head of a memory of any kind. The head holds no Python object, because wasmtime frees memories on any thread
# without the GIL.
#
# A field that is not an `atomic_i64` is written with the lock held. base, accessible, capacity, maximum and covered are
# also read without the lock: by load_size() and load_address(), and so they are written by store_size() and
# store_address(). base and covered fit together only during an access.
#
# The counters that decide how long an object exists. A mover is a thread between begin_move() and end_move().
#
# | counter         | counts                  | how it changes       | in a forked child       | who waits for it      |
# |-----------------|-------------------------|----------------------|-------------------------|-----------------------|
# | memory.refs     | open Memory handles,    | atomically, no lock  | stays: the child has    | no thread: the        |
# |                 | and wasmtime            |                      | the handles and the     | release to 0 drops    |
# |                 |                         |                      | store                   | the memory            |
# | memory.pins     | exported buffers; if    | atomically, no lock; | stays; -generation of   | pin() while it is <   |
# |                 | the base is about to    | a mover holds        | a mover in the parent   | 0; begin_move() fails |
# |                 | move, -generation       | memory.lock          | becomes 0               | while it is > 0       |
# | memory.accesses | threads in a short      | atomically, no lock  | becomes 0: the child    | begin_move() and a    |
# |                 | access; from bit 32 on, |                      | does not have these     | change of protection, |
# |                 | their generation        |                      | threads                 | with memory.lock held |
# | Memory.users    | calls and exported      | atomically, with the | calls become 0,         | no thread: the last   |
# |                 | buffers of one handle   | GIL                  | exported buffers stay   | user drops            |
# |                 |                         |                      |                         | memory.refs           |
# | image.refs      | the Image, memories,    | atomically, no lock  | stays                   | no thread: 0 frees    |
# |                 | slots and requests      |                      |                         | the image             |
# | domain.refs     | users of the name       | atomically; 0 to 1   | stays                   | no thread: 0 frees    |
# |                 |                         | and 1 to 0 under     |                         | the name              |
# |                 |                         | domains_lock         |                         |                       |
#
# memory.lock is not a counter: while locked, it holds the generation of the process whose thread took it. A forked
# child takes over a lock of an older generation, because the child does not have the thread that took it.
cdef struct memory:
    const memory_ops* ops
    memory_hook* hooks
    refusal_log* refusals       # of the creator that made the memory, a reference; NULL: not known yet
    PyObject* trace             # while tracemalloc traces the memory: a Trace, a reference; else NULL
    atomic_i64 refs
    atomic_i64 pins
    atomic_i64 accesses
    atomic_i64 lock             # held during a growth, a change of protection, or a read of all bytes
    atomic_i64 owner            # OWNER_
    atomic_i64 size             # byte_size; written under the lock, read without it
    address_range range
    range_entry range_entries[2]
    char* base
    atomic_i64 protection       # PROTECTION_; written under the lock
    size_t accessible
    size_t capacity             # bytes
    size_t maximum              # SIZE_MAX: none
    size_t pre_guard, guard
    size_t covered              # wasm may access base .. base+covered: each byte belongs to this memory, or faults
    bint broken                 # of a memory in Python: its address is unknown, so each use raises; see break_memory()
    bint enters_slowly          # the memory is broken, or has ops.check
    size_t chosen               # bytes of the reservation, if linmem chose its size; else 0
    bint is_shared
    bint may_move               # a growth past the capacity may change the base
    bint has_moved              # pages.move() moved the pages; the pages committed after that form a second mapping
    bint huge_pages             # the memory was made with huge_pages=True; a decommit may have cancelled the advice
    bint growth_is_watched      # a hook has before_grow, after_grow or refused
    cow_state cow
    protections* protections    # which pages have which access; NULL: all are "rw"
    window_list* windows        # which pages show another source; NULL: none
    memory* registry_next       # the next memory in the same bucket of the bridge's table of wasmtime's memories
    char* registered            # the base with which the memory was entered into that table
    memory* call_next           # the next memory in the same bucket of the bridge's table of calls
    size_t call, request        # the number of the call that made an instance with this memory, or 0; which request
    size_t reported             # the size that wasmtime knows, until it grows the memory to `size`; 0: `size` itself
    # For a child that is forked in the middle of a growth and does not have the thread that was growing the memory:
    size_t opening              # pages up to here may be accessible, though byte_size ends before; 0: no growth
    size_t growths              # how often the memory grew; written under the lock
    size_t growing_from, growing_to     # sizes before and after a growth with hooks; growing_to: 0 if there is none
    memory_hook* tell_from      # the hooks whose after_grow must still be called: from tell_from up to tell_to
    memory_hook* tell_to
    link live                   # in the list of all memories
    char maker[MAKER_BYTES]     # the line of Python code that got the memory first; see fault_report.pxi
    char apart[CACHE_LINE]      # keeps the next allocation, maybe another thread's memory, off the last cache line


cdef enum:
    RUNS = 64                   # runs that the kernel is asked for in one call

# An iterator over the touched runs of the bytes offset .. end of a memory. Each touched_next() that returns True stores
# `n` runs in `runs`. All of them lie inside the mapped image (over_image), or all of them outside. After False, `code`
# is 0 if the end was reached; otherwise it says why the OS refused.
cdef struct touched_runs:
    memory* m
    size_t offset, end
    bint over_image
    int code
    size_t n
    pages.span runs[RUNS]


# One frame of a Python stack. The frame object itself would keep its local variables alive.
ctypedef struct stack_frame:
    PyObject* code              # a code object; the owner of the struct has a reference
    long long line

cdef enum:
    MOST_FRAMES = 64            # of a captured stack

# What was missing when the OS or a budget refused a request. Pools can free some of it by dropping idle slots.
cdef enum:
    RELIEF_PAGES = 0            # pages could not be committed
    RELIEF_SPACE = 1            # address space could not be reserved
    RELIEF_BUDGET = 2           # a budget does not cover the bytes

# A name that separates the users of a pool: pages are never handed from one domain to another. Also the name of a
# creator. Reference-counted; equal names are one struct.
cdef struct domain:
    atomic_i64 refs
    domain* next
    size_t hash
    size_t size
    char* name                  # UTF-8, without a terminating zero
    size_t census               # the number of the last census that counted the domain; protected by census_lock
    size_t holds                # the bytes that this census found the domain to hold

# The parts of a request that new_memory() of a Python creator does not receive as arguments.
cdef struct request:
    bint may_move
    domain* domain              # borrowed: the caller keeps its reference


cdef size_t UNCHOSEN            # memory_spec.reservation: the creator chooses the size
cdef size_t NO_MAXIMUM

# Memories. Each memory_ function that changes bytes, pages or the size takes the memory's lock itself.
cdef nogil:
    size_t memory_size(memory* m) noexcept
    int memory_grow_to(memory* m, size_t new_size, failure* why) noexcept
    int memory_protect(memory* m, size_t offset, size_t size, int access, failure* why) noexcept
    int memory_discard(memory* m, size_t offset, size_t size, failure* why) noexcept
    int memory_prefault(memory* m, size_t offset, size_t size, failure* why) noexcept
    int memory_snapshot(memory* m, image** out, failure* why) noexcept
    int memory_restore(memory* m, image* img, bint zero_grown, failure* why) noexcept
    int memory_apply(memory* m, size_t base_size, size_t new_size, const delta_piece* pieces, size_t n,
                     failure* why) noexcept
    int memory_changes(memory* m, image* base, bint for_delta, changes* out, failure* why) noexcept
    int memory_resident(memory* m, size_t* bytes, failure* why) noexcept
    void memory_retain(memory* m) noexcept
    void memory_release(memory* m) noexcept
    void memory_add_hook(memory* m, memory_hook* hook) noexcept
    int lock_memory(memory* m, failure* why) noexcept
    int begin_move(memory* m, size_t new_size, failure* why) noexcept
    void end_move(memory* m) noexcept
    void begin_own_growth(own_growth* growth, memory* m) noexcept
    void end_own_growth(own_growth* growth) noexcept
    void add_live_memory(memory* m) noexcept
    void remove_live_memory(memory* m) noexcept
    memory* next_live_memory(memory* m) noexcept

# Protection.
cdef nogil:
    int memory_unprotect(memory* m, size_t size) noexcept
    void memory_forget_protection(memory* m) noexcept
    void memory_protection_becomes_unknown(memory* m) noexcept
    int refuse_foreign(const char* start, size_t size, int allowed, const char* call, failure* why) noexcept

# Windows.
cdef nogil:
    int memory_close_windows(memory* m) noexcept
    bint window_may_shrink(const memory* m) noexcept

# Images.
cdef nogil:
    void image_retain(image* img) noexcept
    void image_release(image* img) noexcept
    void image_copy(const image* img, char* base) noexcept
    int image_changes(image* img, image* base, changes* out, failure* why) noexcept
    void set_forgotten_callback(void (*tell)(image* img) noexcept nogil) noexcept

cdef inline bint image_shares_pages(const image* img) noexcept nogil:
    """Whether a memory that starts from `img` (NULL: from zeros) maps pages of the image."""
    return img != NULL and img.content.maps and img.high > img.low

# The copy-on-write state of a memory. The caller holds the memory's lock or owns the memory exclusively.
cdef nogil:
    int image_attach(memory* m, image* img) noexcept
    void image_detach(memory* m) noexcept
    int image_rebind(memory* m, image* img) noexcept
    void image_restore(memory* m, image* img) noexcept
    int image_reset(memory* m, size_t size) noexcept
    void image_fill(memory* m, size_t offset, size_t size) noexcept
    bint image_is_intact(memory* m, size_t size) noexcept
    void touched_begin(touched_runs* runs, memory* m, size_t start, size_t end) noexcept
    bint touched_next(touched_runs* runs) noexcept

cdef inline image* image_of(memory* m) noexcept nogil:
    return m.cow.image

cdef inline bint image_is_attached(memory* m, const image* img) noexcept nogil:
    """Whether image_fill() and image_reset() put back `img` (NULL: zeros)."""
    return m.cow.image == img and m.cow.how != IMAGE_BROKEN

cdef inline bint image_is_copied(memory* m) noexcept nogil:
    """Whether bytes of an image were copied into the memory: then no mapping shows which bytes were written since."""
    return m.cow.image != NULL and m.cow.how == IMAGE_COPIED and m.cow.image.n_runs != 0

cdef inline void image_pages_are_gone(memory* m) noexcept nogil:
    """All pages have been decommitted, so no page is mapped from an image."""
    m.cow.how = IMAGE_COPIED

cdef inline void image_begin_use(memory* m, size_t size) noexcept nogil:
    """The memory is handed out anew, with `size` bytes."""
    m.cow.started = size
    m.cow.dirtied = 0

# Failures.
cdef nogil:
    int fail(failure* why, int code, const char* call, size_t size, size_t used=*, size_t limit=*) noexcept
    void failure_text(const failure* why, char* text, size_t room) noexcept
cdef int fail_python(failure* why, object error) noexcept
cdef int fail_interrupted(failure* why, object error) noexcept
cdef void raise_later(object error) noexcept
cdef object exception_of(const failure* why)
cdef int raise_failure(const failure* why) except -1

# Locks and forks.
cdef nogil:
    void lock(atomic_i64* lock) noexcept
    bint try_lock(atomic_i64* lock) noexcept
    void unlock(atomic_i64* lock) noexcept
    void register_fork_lock(fork_lock* to_add) noexcept
    void unregister_fork_lock(fork_lock* to_remove) noexcept
    void call_in_each_child(void (*call)() noexcept nogil) noexcept
    void deferred_decref(PyObject* object) noexcept
    bint python_is_ending() noexcept

# Python stacks.
cdef bint may_run_python() noexcept nogil
cdef int capture_stack(stack_frame* frames, int most) noexcept
cdef void drop_frames(stack_frame* frames, int n) noexcept
cdef bint only_buffers_hold(Memory handle) noexcept
cdef void trace_if_on(memory* m) noexcept nogil

# Address space and pages.
cdef nogil:
    void set_relief(bint (*give)(int what, const void* budget, size_t size) noexcept nogil) noexcept
    bint relieve(int what, const void* budget, size_t size) noexcept
    int commit_pages(char* addr, size_t size) noexcept
    void release_address_space(char* addr, size_t size) noexcept

# Domains and requests.
cdef nogil:
    domain* current_domain() noexcept
    void set_domain(domain* d) noexcept
    void domain_retain(domain* d) noexcept
    void domain_release(domain* d) noexcept
cdef domain* domain_of(object name) except? NULL
cdef object domain_name(const domain* d)
cdef void answer_request(request* new) noexcept

# Names and refusals of creators. make() of a creator ends with finish_make(): `code` is its result so far. A memory has
# the name of the outermost creator with a name. A refusal has the name of the creator that refused or, if that creator
# has none, of the next creator above.
cdef nogil:
    int finish_make(NativeCreator creator, const memory_spec* spec, int code, memory** out, failure* why) noexcept
    void refuse_make(NativeCreator creator, const memory_spec* spec, failure* why) noexcept
    refusal_log* refusals_retain(refusal_log* log) noexcept
    void refusals_release(refusal_log* log) noexcept
    size_t refusals_count(refusal_log* log) noexcept
    void count_refusal(refusal_log* log, memory* m, size_t requested, failure* why) noexcept
    domain* memory_name(memory* m) noexcept     # borrowed; NULL: no name
cdef str name_option(NativeCreator creator)

# Arguments.
cdef int check_size(object value, str name, size_t* out) except -1
cdef int check_bounded(object value, str name, str bound, size_t* out) except -1
cdef int check_count(object value, str name, size_t* out, str bound=*) except -1
cdef int check_flag(object value, str name) except -1
cdef NativeCreator check_native(object value, str name)

cdef object wrap(memory* m)
cdef Memory handle_on(memory* m)


cdef class NativeCreator:
    cdef object __weakref__
    cdef domain* name_struct    # a reference; NULL: no name
    cdef refusal_log* refusal_log       # a reference
    # Returns 0 and stores a new reference in *out; or returns a code, and has freed everything that it allocated.
    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil
    cdef int fill_spec(self, memory_spec* spec, ty, minimum, maximum, reservation, guard) except -1
    cdef object make_checked(self, const memory_spec* spec, str guard_name, object domain=*)


cdef class MmapCreator(NativeCreator):
    cdef readonly bint prefault
    cdef readonly bint huge_pages


cdef class FileCreator(NativeCreator):
    cdef readonly object path


cdef class SharedCreator(NativeCreator):
    cdef pages.file_pages file          # of the memory to attach; kind 0: none
    cdef readonly object shm_name
    cdef object name_bytes              # of the file, where files have names; file_name points into it
    cdef const char* file_name
    cdef char[16] token                 # the beginning of the tokens of its memories
    cdef atomic_i64 made
    cdef void fill_token(self, char* token) noexcept nogil


cdef class Memory:
    cdef memory* m
    cdef atomic_i64 users       # exported buffers and calls under way; memory_class.pxi describes the bits
    cdef atomic_i64 is_new      # 1: from a native creator; new_memory() of a Python creator may return it, once
    cdef object __weakref__
    cdef memory* enter(self) except NULL
    cdef memory* enter_locked(self) except NULL
    cdef int refuse_entry(self, long long now) except -1
    cdef void leave(self) noexcept
    cdef int finish(self, int code, const failure* why) except -1


cdef class Image:
    cdef image* img
    cdef object __weakref__
    cdef readonly size_t offset
    cdef readonly size_t size
    # "digest" and "runs", once they have been computed, and "contents", the table of contents of the file from which
    # the image is mapped. A dict, because without a GIL several threads may compute a value at once; setdefault() keeps
    # the first one.
    cdef dict known
    cdef Image adopt(self, image* img, size_t offset)
