/* Arithmetic of all kinds with 32-bit integers, for the emulator of the tutorial. The same source runs natively and in the
 * emulator; the results must be equal. No operation is undefined, and none needs a multiplication or division
 * instruction. */
#include <stdint.h>

static const uint32_t constants[4] = {0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5};
static uint32_t words[64];
static volatile int8_t signed_byte;
static volatile int16_t signed_half;
static volatile uint8_t byte;
static volatile uint16_t half;

static uint32_t rotated(uint32_t x, unsigned n) {
    return x >> (n & 31) | x << (-n & 31);
}

static int quotient(int a, int b) {
    int n = 0;
    for (; a >= b; n++) {
        a -= b;
        __asm__ volatile("" : "+r"(a));     /* or the compiler divides */
    }
    return n;
}

__attribute__((noinline)) uint32_t compute(void) {
    uint32_t h = 0x12345678;
    for (int i = 0; i < 300; i++) {
        h = rotated(h, i) ^ (h << 7) ^ (h + constants[i & 3]);
        words[i & 63] = h;
        signed_byte = (int8_t)h;
        h += signed_byte;
        signed_half = (int16_t)h;
        h ^= signed_half;
        byte = h;
        h -= byte;
        half = h;
        h += half;
        int s = (int)h;
        h ^= (uint32_t)(s >> (i & 31));
        if (s < (int)words[(i + 7) & 63])
            h += 3;
        if (h < words[(i + 9) & 63])
            h ^= 0x55;
        if (s >= -5 && (s & 1))
            h -= quotient(s >> 20, 7);
        if (h >= 0x80000000u)
            h = ~h;
        h += (s < 100) + (h < 0x1000) * 4 + ((int)h < -3) * 8 + (h == words[i & 63]);
    }
    return h;
}

#ifdef __riscv
__attribute__((naked)) void _start(void) {
    __asm__("lui sp, 0x20\n jal ra, compute\n ecall\n");      /* the RAM ends at 0x20000 */
}
#else
#include <stdio.h>
int main(void) {
    printf("%u\n", compute());
}
#endif
