# Atomic operations on integers in structs that threads share without the GIL. Layer 0: imports only units.pxd.
#
# Every operation is sequentially consistent, except store_release(), which is a release store: a thread that loads the
# stored value also sees everything that was written before the store. Use store_release() to unlock; it costs a tenth
# of store(). add_with_gil() is for an integer that only code with the GIL accesses. It is a plain addition, but atomic
# in a build of Python without a GIL.
#
# load_size() and store_size() are for a size that one thread at a time writes, under a lock, and that other threads may
# read without the lock: an acquire load and a release store, which cost as much as plain accesses. load_address() and
# store_address() are the same for an address. store_16() is one release store: if the process is killed, the bytes are
# the old ones or the new ones.

from linmem._core.units cimport atomic_i64

cdef extern from "linmem/_core/atomic.h" nogil:
    long long load "linmem_load"(atomic_i64* w)
    void store "linmem_store"(atomic_i64* w, long long value)
    void store_release "linmem_store_release"(atomic_i64* w, long long value)
    long long add "linmem_add"(atomic_i64* w, long long value)                    # -> the new value
    bint compare_exchange "linmem_compare_exchange"(atomic_i64* w, long long was, long long now)
    size_t load_size "linmem_load_size"(size_t* addr)
    void store_size "linmem_store_size"(size_t* addr, size_t value)
    char* load_address "linmem_load_address"(char** addr)
    void store_address "linmem_store_address"(char** addr, char* value)
    void store_16 "linmem_store_16"(char* addr, const char* value)      # 16 bytes; addr is a multiple of 16
    void cpu_relax "linmem_cpu_relax"()             # call it between two reads in a loop that waits for a value
    void touch "linmem_touch"(char* p)      # a write that changes no byte: the page becomes resident and writable

cdef extern from "linmem/_core/atomic.h":
    long long add_with_gil "linmem_add_with_gil"(atomic_i64* w, long long value)  # -> the new value
