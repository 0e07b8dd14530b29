/* The program of `linmem demo`: a sieve of Eratosthenes that grows its table as it needs.
 *
 * The table begins where the memory ended at the first call; its byte n is 0 while n may be a
 * prime and 1 once a divisor is found. Each wasm page holds 65536 numbers and is asked for only
 * when its numbers are: fresh wasm memory reads as zero, so a new page needs no setting up.
 *
 * Freestanding, so that any clang with a wasm linker builds it. demo.wasm was built by
 *
 *   python -m ziglang cc -target wasm32-freestanding -mcpu=mvp -nostdlib -O2 -s \
 *     -Wl,--no-entry -Wl,-z,stack-size=4096 -Wl,--export-memory -Wl,--export=table -Wl,--export=count_primes \
 *     -o linmem/_commands/demo.wasm linmem/_commands/demo.c
 */

#define WASM_PAGE 65536u
#define MOST (1u << 30)         /* a divisor of any number up to here lies in the first page */

static unsigned char *numbers;
static unsigned covered;        /* numbers [0, covered) are sieved */

/* The address of number 0's byte. */
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

/* How many primes there are up to `limit`; -1 if that is too much, or memory.grow was refused. */
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
