/* The program of `linmem demo`: a sieve of Eratosthenes whose table grows when it needs more room.
 *
 * The table begins at the end of the initial memory. Byte n of the table is 1 if a divisor of n was
 * found, else 0. Each wasm page holds 65536 numbers and is requested when the first of them is
 * needed. New wasm memory is zero, so a new page needs no initialisation.
 *
 * The program uses no libraries, so any clang with a wasm linker can build it. demo.wasm was built by
 *
 *   python -m ziglang cc -target wasm32-freestanding -mcpu=mvp -nostdlib -O2 -s \
 *     -Wl,--no-entry -Wl,-z,stack-size=4096 -Wl,--export-memory -Wl,--export=table -Wl,--export=count_primes \
 *     -o linmem/_commands/demo.wasm linmem/_commands/demo.c
 */

#define WASM_PAGE 65536u
#define MOST (1u << 30)         /* the first page has a divisor of each composite number up to this one */

static unsigned char *numbers;
static unsigned covered;        /* numbers [0, covered) are sieved */

/* The address of the byte of the number 0. */
unsigned char *table(void)
{
    if (!numbers)
        numbers = (unsigned char *)(__builtin_wasm_memory_size(0) * WASM_PAGE);
    return numbers;
}

static void strike_multiples(unsigned divisor, unsigned from, unsigned end)
{
    unsigned n = divisor * divisor;
    if (n < from)
        n = (from + divisor - 1) / divisor * divisor;
    for (; n < end; n += divisor)
        numbers[n] = 1;
}

static int sieve_one_more_page(void)
{
    unsigned from = covered, end = covered + WASM_PAGE;
    if (__builtin_wasm_memory_grow(0, 1) == (unsigned long)-1)
        return 0;
    if (from == 0)
        numbers[0] = numbers[1] = 1;
    for (unsigned divisor = 2; divisor < WASM_PAGE && divisor * divisor < end; divisor++)
        if (!numbers[divisor])
            strike_multiples(divisor, from, end);
    covered = end;
    return 1;
}

/* The number of primes up to `limit`; -1 if `limit` is too large or memory.grow was refused. */
int count_primes(unsigned limit)
{
    int count = 0;
    table();
    if (limit > MOST)
        return -1;
    while (covered <= limit)
        if (!sieve_one_more_page())
            return -1;
    for (unsigned n = 0; n <= limit; n++)
        count += !numbers[n];
    return count;
}
