# Atomic operations on words in structs that threads share without the GIL. Floor 0.
#
# Every operation is sequentially consistent, except publish(), which is a release store: a thread that loads the word
# sees all that was written before. Use it at the end of a locked section; it costs a tenth of store().
# add_with_gil() is for a word that only code holding the GIL accesses: it is atomic in a build of Python without a GIL.
#
# peek() and poke() are for a size or an address that one thread at a time writes, under a lock, and that other threads
# may read without the lock: an acquire load and a release store, which cost as much as plain accesses.

from linmem._core.units cimport word

cdef extern from "linmem/_core/atomic.h" nogil:
    long long load "linmem_load"(word* w)
    void store "linmem_store"(word* w, long long value)
    void publish "linmem_publish"(word* w, long long value)
    long long add "linmem_add"(word* w, long long value)                    # -> the new value
    bint swap_if "linmem_swap_if"(word* w, long long was, long long now)
    size_t peek "linmem_peek_size"(size_t* at)
    void poke "linmem_poke_size"(size_t* at, size_t value)
    char* peek_address "linmem_peek_address"(char** at)
    void poke_address "linmem_poke_address"(char** at, char* value)
    void pause "linmem_pause"()             # between two reads of a word that another thread will change
    void touch "linmem_touch"(char* p)      # a write that changes no byte: the page becomes resident and writable

cdef extern from "linmem/_core/atomic.h":
    long long add_with_gil "linmem_add_with_gil"(word* w, long long value)  # -> the new value
