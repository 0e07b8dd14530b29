/* must(): a condition that linmem relies on, checked only in a build with -DLINMEM_CHECKED. */
#ifndef LINMEM_CHECKED_H
#define LINMEM_CHECKED_H

#if defined(LINMEM_CHECKED)
#include <stdio.h>
#include <stdlib.h>
#define linmem_must(holds)                                         \
    do {                                                           \
        if (!(holds)) {                                            \
            fprintf(stderr, "linmem: " #holds " does not hold\n"); \
            abort();                                               \
        }                                                          \
    } while (0)
#else
#define linmem_must(holds) ((void)sizeof(holds))
#endif

#endif
