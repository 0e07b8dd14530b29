/* What setup.py writes before each function that need not be fast: the compiler makes its code small. */
#ifndef LINMEM_OPTIMIZE_H
#define LINMEM_OPTIMIZE_H

#if defined(__clang__)
#define LINMEM_SMALL __attribute__((minsize))
#elif defined(__GNUC__)
#define LINMEM_SMALL __attribute__((cold))
#else
#define LINMEM_SMALL
#endif

#endif
