/* Atomic operations on 64-bit integers, and some on sizes and addresses; see atomic.pxd. */
#ifndef LINMEM_ATOMIC_H
#define LINMEM_ATOMIC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if SIZE_MAX < 0xFFFFFFFFFFFFFFFF
#error "linmem needs a 64-bit Python: a 32-bit address space has no room for the reservations that it makes"
#endif

#if defined(_MSC_VER) && !defined(__clang__)

#include <intrin.h>
#define LINMEM_OF_THREAD __declspec(thread)
static __inline long long linmem_load(long long *w) { return _InterlockedOr64(w, 0); }
static __inline void linmem_store(long long *w, long long v) { (void)_InterlockedExchange64(w, v); }
#define linmem_store_release linmem_store
static __inline long long linmem_add(long long *w, long long v) { return _InterlockedExchangeAdd64(w, v) + v; }
static __inline int linmem_compare_exchange(long long *w, long long was, long long now) {
    return _InterlockedCompareExchange64(w, now, was) == was;
}
static __inline void linmem_touch(char *p) { (void)_InterlockedOr8(p, 0); }
static __inline size_t linmem_load_size(size_t *addr) { return (size_t)_InterlockedOr64((long long *)addr, 0); }
static __inline void linmem_store_size(size_t *addr, size_t v) {
    (void)_InterlockedExchange64((long long *)addr, (long long)v);
}
static __inline char *linmem_load_address(char **addr) {
    return (char *)_InterlockedCompareExchangePointer((void **)addr, 0, 0);
}
static __inline void linmem_store_address(char **addr, char *v) { (void)_InterlockedExchangePointer((void **)addr, v); }
static __inline void linmem_store_16(char *addr, const char *v) {
    long long was[2] = {0, 0}, now[2];
    memcpy(now, v, 16);
    while (!_InterlockedCompareExchange128((long long *)addr, now[1], now[0], was)) {
    }
}
static __inline void linmem_cpu_relax(void) {
#if defined(_M_ARM64)
    __yield();
#else
    _mm_pause();
#endif
}

#else

#define LINMEM_OF_THREAD __thread
static inline long long linmem_load(long long *w) { return __atomic_load_n(w, __ATOMIC_SEQ_CST); }
static inline void linmem_store(long long *w, long long v) { __atomic_store_n(w, v, __ATOMIC_SEQ_CST); }
static inline void linmem_store_release(long long *w, long long v) { __atomic_store_n(w, v, __ATOMIC_RELEASE); }
static inline long long linmem_add(long long *w, long long v) { return __atomic_add_fetch(w, v, __ATOMIC_SEQ_CST); }
static inline int linmem_compare_exchange(long long *w, long long was, long long now) {
    return __atomic_compare_exchange_n(w, &was, now, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
static inline void linmem_touch(char *p) {
    /* If LLVM knows that the operand is 0, it replaces the operation by a fence, which touches no page. */
    volatile char zero = 0;
    (void)__atomic_fetch_or(p, zero, __ATOMIC_SEQ_CST);
}
static inline size_t linmem_load_size(size_t *addr) { return __atomic_load_n(addr, __ATOMIC_ACQUIRE); }
static inline void linmem_store_size(size_t *addr, size_t v) { __atomic_store_n(addr, v, __ATOMIC_RELEASE); }
static inline char *linmem_load_address(char **addr) { return __atomic_load_n(addr, __ATOMIC_ACQUIRE); }
static inline void linmem_store_address(char **addr, char *v) { __atomic_store_n(addr, v, __ATOMIC_RELEASE); }
typedef long long linmem_16_bytes __attribute__((vector_size(16), may_alias));
static inline void linmem_store_16(char *addr, const char *v) {
    linmem_16_bytes bytes;
    memcpy(&bytes, v, 16);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    *(volatile linmem_16_bytes *)addr = bytes;
}
static inline void linmem_cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

#endif

#if defined(Py_GIL_DISABLED)
#define linmem_add_with_gil linmem_add
#else
static inline long long linmem_add_with_gil(long long *w, long long v) { return *w += v; }
#endif

#endif
