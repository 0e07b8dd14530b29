/* Zeroing by plain wide stores; see wide_stores.pxd. */
#ifndef LINMEM_WIDE_H
#define LINMEM_WIDE_H

#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
typedef long long linmem_four_words __attribute__((vector_size(32), may_alias));
static inline int linmem_has_wide_stores(void) { return __builtin_cpu_supports("avx") != 0; }
__attribute__((target("avx"))) static void linmem_zero_wide(char *start, size_t size) {
    const linmem_four_words zero = {0, 0, 0, 0};
    linmem_four_words *next = (linmem_four_words *)start, *end = (linmem_four_words *)(start + size);
    for (; next < end; next += 4) {
        next[0] = next[1] = next[2] = next[3] = zero;
        __asm__ volatile("" : : : "memory"); /* else a compiler replaces the loop by a call of memset */
    }
}
#else
static inline int linmem_has_wide_stores(void) { return 0; }
static void linmem_zero_wide(char *start, size_t size) { memset(start, 0, size); }
#endif

#endif
