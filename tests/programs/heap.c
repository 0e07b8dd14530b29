/* A client of the memory: allocates, frees and grows by hundreds of MiB, and prints what it finds.
 * The same source runs natively and as wasm; the outputs must be equal. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCKS 400

static uint64_t state = 88172645463325252ull;

static uint64_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static uint64_t sum(const uint8_t *p, size_t n) {
    uint64_t h = 1469598103934665603ull;
    for (size_t i = 0; i < n; i += 61) h = (h ^ p[i]) * 1099511628211ull;
    return h;
}

int main(int argc, char **argv) {
    uint8_t *block[BLOCKS] = {0};
    size_t size[BLOCKS] = {0};
    size_t live = 0, peak = 0;
    uint64_t all = 0;
    int rounds = argc > 1 ? atoi(argv[1]) : 2000;
    size_t largest = argc > 2 ? (size_t)atol(argv[2]) : 2u << 20;

    for (int r = 0; r < rounds; r++) {
        int i = (int)(next() % BLOCKS);
        if (block[i]) {
            all ^= sum(block[i], size[i]);
            live -= size[i];
            free(block[i]);
            block[i] = NULL;
        } else {
            size[i] = 1 + (size_t)(next() % largest);
            block[i] = malloc(size[i]);
            if (!block[i]) {
                printf("round %d: no memory for %zu bytes with %zu live\n", r, size[i], live);
                return 3;
            }
            memset(block[i], (int)(next() & 255), size[i]);
            live += size[i];
            if (live > peak) peak = live;
        }
    }
    for (int i = 0; i < BLOCKS; i++)
        if (block[i]) all ^= sum(block[i], size[i]);
    printf("rounds %d live %zu peak %zu checksum %016llx\n", rounds, live, peak, (unsigned long long)all);
    return 0;
}
