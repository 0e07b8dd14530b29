/* A guest that counts the lines of a large input. The host maps the input into the guest's memory; nothing is copied.
 *
 *   python -m ziglang cc -target wasm32-wasi -mexec-model=reactor -O2 -o mapped_input.wasm mapped_input.c
 */
#include <stdint.h>
#include <stdlib.h>

#define EXPORT(name) __attribute__((export_name(#name)))
#define WASM_PAGE ((size_t)65536)       /* a multiple of every host page */

/* Addresses for `size` bytes that the host will map, in whole pages of nothing else; NULL: there are none. */
EXPORT(input_room) void *input_room(size_t size) {
    if (size > SIZE_MAX - WASM_PAGE) return NULL;
    return aligned_alloc(WASM_PAGE, (size + WASM_PAGE - 1) / WASM_PAGE * WASM_PAGE);
}

/* The host has unmapped the input. */
EXPORT(input_done) void input_done(void *input) { free(input); }

EXPORT(count_lines) size_t count_lines(const char *input, size_t size) {
    size_t lines = 0;
    for (size_t i = 0; i < size; i++) lines += input[i] == '\n';
    return lines;
}
