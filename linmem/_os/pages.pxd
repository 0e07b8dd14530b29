# The interface of the page floor, the lowest layer of linmem: the only modules that ask the OS for pages. posix.pyx and
# windows.pyx implement this interface; setup.py builds one of them as linmem._os.pages. The other modules do not check
# which OS they run on. They call capabilities() instead.
#
# Every function is nogil, and returns 0 or the OS's own code (errno, GetLastError), read on the line after the system
# call. If the code is not 0, nothing has changed, unless the comment says otherwise. `addr` and `size` are multiples of
# capabilities().page_size, and size > 0, unless the comment says otherwise. The caller rounds; no function checks.
# In the comments, the text before "->" must hold before the call, and the text after "->" holds on return.

cdef enum:
    ACCESS_NONE = 0
    ACCESS_READ = 1
    ACCESS_READ_WRITE = 2
    ACCESS_READ_EXECUTE = 3

cdef struct capabilities_t:
    size_t page_size                # bytes in a host page (the override of LINMEM_PAGE_SIZE, if any)
    size_t file_page                # mapped bytes past the end of a file are accessible up to a multiple of this
    size_t granularity              # reserve() returns multiples of this
    int address_bits                # user addresses are below 2 ** address_bits
    bint moves                      # move() works, and release() takes a part of a reservation
    bint names                      # the mappings carry a name that tools show
    bint discard_any_protection     # discard() works on pages of any protection and keeps it
    bint populates                  # prefault() returns a code for pages that cannot be written; False: it faults
    bint scans                      # touched() works, on some systems only in reservations made with `watched`
    int locked                      # the code that renew() returns for pages locked in memory; 0: renew() accepts them
    bint reports_faults             # watch_faults() works
    bint maps_images                # memories can map an image's pages; a page that is written is copied
    bint shares                     # file_begin() works, so processes can share the pages of a file that grows
    bint names_files                # other processes find the file of file_begin() by its name
    bint adopts_files               # file_adopt() works, so memories can map the files of the caller
    size_t huge_page                # bytes in a huge page that advise_huge() asks for; 0: the system has none
    size_t memory                   # bytes of physical memory that this process may use; 0: unknown
    size_t mappings                 # the most mappings that a process may have; 0: not limited, or unknown

# A run of pages.
ctypedef struct span:
    char* addr
    size_t size

cdef const capabilities_t* capabilities() noexcept nogil

# -> base: `size` fresh inaccessible bytes at a multiple of granularity, charged only to the address space.
# watched: the caller will ask touched() about the pages, and accepts that they cost more; a hint.
cdef int reserve(size_t size, bint watched, char** base) noexcept nogil

# [addr, addr+size) lies in one reservation; each page was never committed, or was decommitted, or was hidden by
# protect(ACCESS_NONE). -> readable and writable; a hidden page keeps its bytes, every other page is zero.
# If the OS refuses, hidden pages may have been decommitted.
cdef int commit(char* addr, size_t size) noexcept nogil

# [addr, addr+size) lies in one reservation. -> inaccessible; the contents and their charge are given back.
cdef int decommit(char* addr, size_t size) noexcept nogil

# [addr, addr+size) is committed, and readable and writable unless discard_any_protection.
# -> reads as zero, protection kept, physical pages given back.
cdef int discard(char* addr, size_t size) noexcept nogil

# [addr, addr+size) is committed, readable and writable, and no other thread accesses it. -> reads as zero, physical
# pages given back, in the cheapest way. If the OS refuses, the range may have become inaccessible.
cdef int renew(char* addr, size_t size) noexcept nogil

# Only where `scans`. [addr, addr+size) is committed; *n > 0 is the number of runs that `runs` has room for. -> *n runs,
# in order of address. Each page before *next that may hold a byte other than zero (over_image: a byte that differs from
# the mapped image) lies in a run. A page that the kernel has swapped out or is migrating may hold such a byte.
# *next == addr + size: the scan is complete. If the system does not support the scan, touched() returns some code.
cdef int touched(char* addr, size_t size, bint over_image, span* runs, size_t* n, char** next) noexcept nogil

# Like touched(), but finds each page that is in the page tables, even if the page was only read. [addr, addr+size) lies
# in one reservation and has any protection. Some systems with `scans` do not support this; present() then returns some
# code.
cdef int present(char* addr, size_t size, span* runs, size_t* n, char** next) noexcept nogil

# [addr, addr+size) lies in one reservation. -> the kernel may use huge pages there; a hint.
cdef int advise_huge(char* addr, size_t size) noexcept nogil

# [addr, addr+size) is committed. access: an ACCESS_ constant. -> the pages have this access; with ACCESS_READ_EXECUTE
# the processor executes the code that was written before the call. If the OS refuses, and the pages differed in
# protection before, a part of them may have the access already. A host may refuse every ACCESS_READ_EXECUTE.
cdef int protect(char* addr, size_t size, int access) noexcept nogil

# [addr, addr+size) is committed and writable. -> every page is resident, no byte has changed.
cdef int prefault(char* addr, size_t size) noexcept nogil

# Only where `moves`. [addr, addr+size) is committed and one mapping (committed in one run, never
# protected otherwise); [new_addr, new_addr+new_size) lies in another reservation, new_size >= size.
# -> the pages are at new_addr with the same bytes, and zeros follow them; all are readable and writable. The range at
# addr is released.
cdef int move(char* addr, size_t size, char* new_addr, size_t new_size) noexcept nogil

# The pages of an image. linmem fills the pages once, and no process can write them afterwards.
#   image_begin()  -> `size` bytes of zeros, of the best kind that the OS grants. image_write() may fill them.
#   image_end()    -> immutable; `bytes` can be read. A page that was not written takes no space until it is read.
#   image_open()   -> the bytes of a file from `position` (a multiple of page_size) on, immutable at once.
#   image_drop()   -> `bytes` is unmapped and the handle closed. Call it after each success of image_begin() or
#                  image_open(), also if image_write() or image_end() has failed since.
# If image_begin() or image_open() fails, nothing is left behind. image_open() returns IMAGE_SHORT if the file ends
# before position + size, and IMAGE_OPEN if another process may still write to it; neither is a code of the OS.
cdef enum:
    IMAGE_SEALED = 1                # memory that no descriptor can write any more
    IMAGE_FILE = 2                  # a file; without a name if linmem made it
    IMAGE_SECTION = 3               # a section object
    IMAGE_PRIVATE = 4               # pages of this process alone
    IMAGE_SHORT = -1000
    IMAGE_OPEN = -1001

ctypedef struct image_pages:
    int kind                        # an IMAGE_ constant
    bint maps                       # image_map() works with this image
    long long handle                # a descriptor or handle of this process that shows the same bytes; -1: none
    long long position              # offset of the image's first byte in the file or section of the handle
    char* bytes
    size_t size

cdef int image_begin(size_t size, image_pages* out) noexcept nogil
cdef int image_write(image_pages* into, size_t offset, const char* bytes, size_t size) noexcept nogil
cdef int image_end(image_pages* img) noexcept nogil
cdef int image_open(int descriptor, long long position, size_t size, image_pages* out) noexcept nogil
cdef void image_drop(image_pages* img) noexcept nogil

# Only where img.maps. [addr, addr+size) is committed, or mapped from an image. -> readable and writable, with the
# image's bytes from `offset` (a multiple of page_size) on; pages are copied when they are written (copy-on-write).
# Do not call discard() or renew() on such pages: their bytes afterwards differ among systems.
cdef int image_map(const image_pages* img, size_t offset, char* addr, size_t size) noexcept nogil

# image_map() mapped [addr, addr+size) from `offset`; the pages are readable and writable unless discard_any_protection.
# -> the written copies are given back, and the pages show the image again.
cdef int image_renew(const image_pages* img, size_t offset, char* addr, size_t size) noexcept nogil

# [addr, addr+size) lies in the `bytes` of an image. -> the system reads the pages from the file of the image, if they
# are not in physical memory. The call does not wait for the reads. No byte changes.
cdef int image_fetch(char* addr, size_t size) noexcept nogil

# Only where maps_images, and not of a FILE_SECTION. [addr, addr+size) is committed. handle: a descriptor of a regular
# file that can be read, with at least position + size bytes, except for less than a page of the kernel. access:
# ACCESS_READ or ACCESS_READ_WRITE.
# -> the range shows the bytes of the file from `position` (a multiple of page_size) on, and zeros after the end of the
# file, with this access. What is written there is written to the file (written_through), or the page is copied when it
# is written. blank() and decommit() end the mapping. Do not call discard(), renew() or move() on such pages.
# If the OS refuses, nothing has changed; or *emptied is True, and the range is committed and reads as zero.
cdef int window_map(long long handle, size_t position, char* addr, size_t size, int access, bint written_through,
                    bint* emptied) noexcept nogil

# Only where maps_images. [addr, addr+size) is committed. -> zero, readable and writable, and not mapped from an image.
cdef int blank(char* addr, size_t size) noexcept nogil

# The pages of a file that memories map and write through: of an own file without a name, which processes share, or of a
# file of the caller. Positions and sizes in the file are multiples of page_size, unless the comment says otherwise.
#   file_begin()    -> a new file of `size` bytes of zeros. It is gone when the last descriptor and the last mapping of
#                      all processes are. The best kind that the OS grants. most: the file never gets larger. name: of
#                      UTF-8; other processes open the file by it where names_files; elsewhere no name leads to it.
#   file_adopt()    -> a duplicate of a descriptor of the caller, of a regular file that can be read. only_writer: the
#                      caller has made sure that nothing else changes the file (a failed file_extend() then gives back
#                      the space that it took).
#   file_take()     -> as file_adopt(), of the descriptor itself. After a failure the caller still owns the descriptor.
#                      Where names_files: of the handle of a file of file_begin().
#   file_reach()    -> as file_adopt(), of a descriptor of the process `pid`, which is the same user's. out.device and
#                      out.inode: of the file that the caller expects. FILE_FOREIGN: the descriptor shows something
#                      else, which was not opened, because to open it may block or do something. -> *length: of the
#                      file. Tests cannot make this call fail, because the caller has another way.
#   file_copy()     -> the same file again, with a descriptor of its own.
#   file_drop()     -> the descriptor is closed. The mappings stay until decommit(), blank() or release().
# If one of these calls fails, nothing is left behind. A file system that cannot allocate space refuses. file_begin()
# returns FILE_EXISTS if a file has the name already, and file_take() FILE_FOREIGN if the handle is that of a section
# which file_begin() did not make; neither is a code of the OS. file_reach() works where not names_files.
cdef enum:
    FILE_SEALED = 1                 # memory of the kernel that no process can make smaller
    # A file. A process that may write to the file can make the file smaller, and pages past the end fault (SIGBUS).
    FILE_PLAIN = 2
    # A section object of `most` bytes. Its length is fixed, and commit() gets pages for it from the system. Pages that
    # another process has committed are accessible in each view at once.
    FILE_SECTION = 3
    FILE_EXISTS = -1002
    FILE_FOREIGN = -1003

ctypedef struct file_pages:
    int kind                        # a FILE_ constant
    bint writable                   # the descriptor can write
    bint only_writer
    long long handle                # a descriptor or handle of this process; -1: none
    # The same numbers for all descriptors of one file; no other open file has them. 0 and 0: not known.
    unsigned long long device, inode

cdef int file_begin(size_t size, size_t most, const char* name, file_pages* out) noexcept nogil
cdef int file_adopt(int descriptor, bint only_writer, file_pages* out) noexcept nogil
cdef int file_take(long long handle, file_pages* out) noexcept nogil
cdef int file_reach(unsigned long long pid, unsigned long long descriptor, file_pages* out,
                    size_t* length) noexcept nogil
cdef int file_copy(const file_pages* file, file_pages* out) noexcept nogil
cdef void file_drop(file_pages* file) noexcept nogil

# -> size: the length of the file in bytes now; not necessarily a multiple of anything.
cdef int file_size(const file_pages* file, size_t* size) noexcept nogil

# Not of a FILE_SECTION. [position, position+size): any range. -> `bytes` holds the bytes of the file, and zeros after
# the end of the file. While another process writes, the bytes may be a mixture of old and new ones. FILE_FOREIGN: the
# program has closed the descriptor, which is linmem's.
cdef int file_read(const file_pages* file, size_t position, char* bytes, size_t size) noexcept nogil

# size: any number. -> the file has at least `size` bytes, the new ones are zero, and no process ever saw a part of the
# change. The file never gets smaller, also if another process extends it meanwhile. allocate: the OS has space for each
# new byte, so no access faults later because the file system or the memory is full; True is implied where the OS could
# otherwise refuse a page later. A limit of the process (RLIMIT_FSIZE) is a code and not a signal.
cdef int file_extend(file_pages* file, size_t size, bint allocate) noexcept nogil

# No page past `size` is accessible, and only_writer. -> the file has `size` bytes, fewer than before.
cdef int file_cut(file_pages* file, size_t size) noexcept nogil

# [position, position+size): any range in the file. -> the OS has space for each byte of the range; no byte has changed.
# If the OS refuses, a part of the space may have been allocated.
cdef int file_allocate(file_pages* file, size_t position, size_t size) noexcept nogil

# [addr, addr+size) lies in one reservation, committed or not. access: an ACCESS_ constant. -> the range shows the bytes
# of the file from `position` on, with this access; what is written there is written to the file. ACCESS_NONE pages may
# lie past the end of the file. commit() makes them readable and writable, when the file has them; protect() changes the
# access; decommit() and blank() end the mapping; a fork shares the pages. Do not call discard(), renew(), touched() or
# move() on such pages. If the OS refuses, the range may be inaccessible and hold nothing.
cdef int file_map(const file_pages* file, size_t position, char* addr, size_t size, int access) noexcept nogil

# Only of a FILE_SECTION, which file_map() does not map. [*region, *region + before + size + after) is a whole
# reservation in which nothing was committed. position and *region + before: multiples of granularity. -> the `size`
# bytes from *region + before on are inaccessible, and commit() makes them show the section. *region: the reservation
# may have moved. If the OS refuses, the reservation may have been released: *region is NULL then.
cdef int file_place(const file_pages* file, size_t position, char** region, size_t before, size_t size,
                    size_t after) noexcept nogil

# -> *addr: readable and writable pages at a place that the OS chooses, which show the bytes of the file from `position`
# on. release() ends them.
cdef int file_show(const file_pages* file, size_t position, size_t size, char** addr) noexcept nogil

# [position, position+size) lies in the file. -> reads as zero in every mapping of every process, and the space is given
# back, except that of a FILE_SECTION. Pages that file_allocate() took may not be there afterwards: call it again where
# that matters.
cdef int file_discard(file_pages* file, size_t position, size_t size) noexcept nogil

# [position, limit) lies in the file. -> *start .. *end, in whole pages of the kernel: the first run in the range that
# may hold a byte other than zero; limit .. limit: there is none. A code if the file system does not report its holes.
cdef int file_data(const file_pages* file, size_t position, size_t limit, size_t* start, size_t* end) noexcept nogil

# [addr, addr+size) was mapped by file_map(). file_flush() -> what was written there before the call is in the file also
# for calls that do not go through a mapping, and on its way to the disk. file_sync() -> the bytes and the length of the
# file are on the disk, as far as the OS knows.
cdef int file_flush(char* addr, size_t size) noexcept nogil
cdef int file_sync(const file_pages* file) noexcept nogil

# A word of 32 bits, at a multiple of 4, on which threads wait until another thread, maybe of another process that maps
# the same file, calls wake_waiters(). wait_while_equal() sleeps while the word has the `value`, for about `ns`
# nanoseconds at most. It may return early (signals): the caller checks its condition again. -> *woken: how many of at
# most `n` waiters were woken; 0 where the system does not tell. A word that is not readable is a code.
cdef int wait_while_equal(int* word, int value, long long ns) noexcept nogil
cdef int wake_waiters(int* word, int n, int* woken) noexcept nogil

# -> bytes: how many bytes of [addr, addr+size) are in physical memory.
cdef int resident(char* addr, size_t size, size_t* bytes) noexcept nogil

# [addr, addr+size) is a whole reservation (where `moves`: or a part of one). -> the addresses are given back.
cdef int release(char* addr, size_t size) noexcept nogil

# addr: any address, in or out of a reservation. Whether no mapping holds the page at addr.
cdef bint is_free(char* addr) noexcept nogil

# How an instruction accessed an address.
cdef enum:
    FAULT_UNKNOWN = 0
    FAULT_READ = 1
    FAULT_WRITE = 2
    FAULT_EXECUTE = 3

ctypedef void (*fault_report)(char* addr, int access) noexcept nogil

# Only where reports_faults. -> if the process is about to die of a memory fault, `report` is called in the thread of
# the fault, in a signal handler or an exception handler. So `report` must not wait for a lock that the thread may hold,
# and must not call malloc() or Python. unwatch_faults() ends the calls. write_error() is for `report`: it writes to the
# standard error.
cdef int watch_faults(fault_report report) noexcept nogil
cdef void unwatch_faults() noexcept nogil
cdef void write_error(const char* text, size_t size) noexcept nogil

# Whether this thread is in a handler of a signal that has its own stack, such as the handler of memory faults of a wasm
# runtime.
cdef bint on_signal_stack() noexcept nogil

# The address space of this process: `total` bytes, of which `left` may still be reserved under the
# limits in force now (left == total if there is no limit).
cdef void address_space(size_t* total, size_t* left) noexcept nogil

# Bytes of address space that the page floor holds now: every whole reservation and every image's `bytes`. The page
# floor counts them before it asks the OS for them and until the OS has taken them back, so the number is never too
# small.
cdef size_t reserved() noexcept nogil

# A description of a code; static text.
cdef const char* code_text(int code) noexcept nogil

# Writes into `text` (room bytes, always terminated) which limit refused `size` bytes with `code`; the empty string
# if the OS does not report the limit.
cdef void limit_text(int code, size_t size, char* text, size_t room) noexcept nogil

# -> every fork() calls `before` in the forking thread before the fork, then `in_parent` and `in_child` in that thread
# of the parent and of the child. On a system without fork: nothing.
cdef int at_fork(void (*before)() noexcept nogil, void (*in_parent)() noexcept nogil,
                 void (*in_child)() noexcept nogil) noexcept nogil

# yield_processor() gives the processor to another thread. sleep_ns() sleeps for about `ns` nanoseconds, at least one
# tick of the system's clock. clock_ns() is a monotonic clock; coarse_ns() is the same clock some milliseconds old, and
# cheaper. utc_ns() is the time since the epoch.
cdef void yield_processor() noexcept nogil
cdef void sleep_ns(long long ns) noexcept nogil
cdef long long clock_ns() noexcept nogil
cdef long long coarse_ns() noexcept nogil
cdef long long utc_ns() noexcept nogil
