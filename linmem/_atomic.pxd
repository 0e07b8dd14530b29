# Atomic words for structs that threads share without the GIL. Floor 0: imports nothing of ours.
#
# Every operation is sequentially consistent, but for publish(), which only releases: what was written
# before it is seen by whoever loads the word. It ends a locked stretch at a tenth of store()'s cost.
# add_with_gil() is for a word that only code holding the GIL touches: atomic where there is no GIL.
#
# peek() and poke() are for a size or an address that one thread at a time writes, under a lock, and that others
# may read without it. They cost as much as a plain access; a peek sees all that came before the poke it sees.

cdef extern from *:
    """
    #ifndef LINMEM_ATOMIC_H
    #define LINMEM_ATOMIC_H
    #include <stddef.h>
    #include <stdint.h>
    #if SIZE_MAX < 0xFFFFFFFFFFFFFFFF
    #error "linmem needs a 64-bit Python: a 32-bit address space has no room for the reservations that it makes"
    #endif
    #if defined(_MSC_VER) && !defined(__clang__)
    #define LINMEM_OF_THREAD __declspec(thread)
    #include <intrin.h>
    typedef volatile __int64 linmem_word;
    static __inline __int64 linmem_load(linmem_word *w) { return _InterlockedOr64(w, 0); }
    static __inline void linmem_store(linmem_word *w, __int64 v) { (void)_InterlockedExchange64(w, v); }
    static __inline void linmem_publish(linmem_word *w, __int64 v) { (void)_InterlockedExchange64(w, v); }
    static __inline __int64 linmem_add(linmem_word *w, __int64 v) { return _InterlockedExchangeAdd64(w, v) + v; }
    static __inline int linmem_swap_if(linmem_word *w, __int64 was, __int64 now)
    { return _InterlockedCompareExchange64(w, now, was) == was; }
    static __inline void linmem_touch(char *p) { (void)_InterlockedOr8(p, 0); }
    static __inline size_t linmem_peek_size(size_t *at) { return (size_t)_InterlockedOr64((__int64 *)at, 0); }
    static __inline void linmem_poke_size(size_t *at, size_t v)
    { (void)_InterlockedExchange64((__int64 *)at, (__int64)v); }
    static __inline char *linmem_peek_address(char **at)
    { return (char *)_InterlockedCompareExchangePointer((void **)at, 0, 0); }
    static __inline void linmem_poke_address(char **at, char *v)
    { (void)_InterlockedExchangePointer((void **)at, v); }
    #if defined(_M_ARM64)
    static __inline void linmem_pause(void) { __yield(); }
    #else
    static __inline void linmem_pause(void) { _mm_pause(); }
    #endif
    #else
    #define LINMEM_OF_THREAD __thread
    typedef long long linmem_word;
    static inline long long linmem_load(linmem_word *w) { return __atomic_load_n(w, __ATOMIC_SEQ_CST); }
    static inline void linmem_store(linmem_word *w, long long v) { __atomic_store_n(w, v, __ATOMIC_SEQ_CST); }
    static inline void linmem_publish(linmem_word *w, long long v) { __atomic_store_n(w, v, __ATOMIC_RELEASE); }
    static inline long long linmem_add(linmem_word *w, long long v)
    { return __atomic_add_fetch(w, v, __ATOMIC_SEQ_CST); }
    static inline int linmem_swap_if(linmem_word *w, long long was, long long now)
    { return __atomic_compare_exchange_n(w, &was, now, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); }
    static inline void linmem_touch(char *p) { (void)__atomic_fetch_or(p, 0, __ATOMIC_SEQ_CST); }
    static inline size_t linmem_peek_size(size_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
    static inline void linmem_poke_size(size_t *at, size_t v) { __atomic_store_n(at, v, __ATOMIC_RELEASE); }
    static inline char *linmem_peek_address(char **at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
    static inline void linmem_poke_address(char **at, char *v) { __atomic_store_n(at, v, __ATOMIC_RELEASE); }
    static inline void linmem_pause(void) {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ __volatile__("yield");
    #endif
    }
    #endif
    #ifdef Py_GIL_DISABLED
    #define linmem_add_with_gil linmem_add
    #else
    static inline long long linmem_add_with_gil(linmem_word *w, long long v) { return *w += v; }
    #endif
    #endif
    """
    ctypedef long long word "linmem_word"
    long long load "linmem_load"(word* w) noexcept nogil
    void store "linmem_store"(word* w, long long value) noexcept nogil
    void publish "linmem_publish"(word* w, long long value) noexcept nogil
    long long add_with_gil "linmem_add_with_gil"(word* w, long long value) noexcept   # -> the new value
    long long add "linmem_add"(word* w, long long value) noexcept nogil           # -> the new value
    bint swap_if "linmem_swap_if"(word* w, long long was, long long now) noexcept nogil
    size_t peek "linmem_peek_size"(size_t* at) noexcept nogil
    void poke "linmem_poke_size"(size_t* at, size_t value) noexcept nogil
    char* peek_address "linmem_peek_address"(char** at) noexcept nogil
    void poke_address "linmem_poke_address"(char** at, char* value) noexcept nogil
    void pause "linmem_pause"() noexcept nogil          # between two looks at a word that another thread will change
    void touch "linmem_touch"(char* p) noexcept nogil       # faults a page in for writing, changes no byte
