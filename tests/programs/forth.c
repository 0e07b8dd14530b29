/* A small interpreter, typical of guests: it has static data, a heap that its initialisation fills, and a deep C stack.
 * Each request changes all three.
 *
 *   python -m ziglang cc -target wasm32-wasi -mexec-model=reactor -O2 -o forth.wasm forth.c
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT(name) __attribute__((export_name(name)))

typedef struct word { struct word *next; char name[16]; char *body; } word;

static word *dictionary;
static int64_t stack[256];
static int depth;
static char request[1 << 16];
static const char prelude[] =
    "square dup * ; cube dup square * ; double 2 * ; quad double double ; poly dup cube swap square + ; ";
static const uint8_t table[1 << 20] = { [0] = 1, [4095] = 2, [500000] = 3, [(1 << 20) - 1] = 4 };

static void define(const char *name, size_t size, const char *body, size_t length)
{
    word *w = malloc(sizeof *w);
    memset(w->name, 0, sizeof w->name);
    memcpy(w->name, name, size < 15 ? size : 15);
    w->body = malloc(length + 1);
    memcpy(w->body, body, length);
    w->body[length] = 0;
    w->next = dictionary;
    dictionary = w;
}

static void run(const char *text)
{
    volatile char frame[512];       /* a deep stack moves the hidden global that points to it */
    frame[0] = text[0];
    while (*text) {
        const char *end = strchr(text, ' ');
        size_t size = end ? (size_t)(end - text) : strlen(text);
        word *w = dictionary;
        while (w && (strlen(w->name) != size || memcmp(w->name, text, size)))
            w = w->next;
        if (w)
            run(w->body);
        else if (size == 1 && strchr("+*/", *text)) {
            int64_t b = stack[--depth], a = stack[--depth];
            stack[depth++] = *text == '+' ? a + b : *text == '*' ? a * b : a / b;
        } else if (size == 3 && !memcmp(text, "dup", 3)) {
            stack[depth] = stack[depth - 1];
            depth++;
        } else if (size == 4 && !memcmp(text, "swap", 4)) {
            int64_t top = stack[depth - 1];
            stack[depth - 1] = stack[depth - 2];
            stack[depth - 2] = top;
        } else if (size == 5 && !memcmp(text, "table", 5))
            stack[depth - 1] = table[stack[depth - 1]];
        else if (size == 4 && !memcmp(text, "fill", 4))
            memset(malloc((size_t)stack[--depth]), 0xff, (size_t)stack[depth]);
        else if (size)
            stack[depth++] = strtoll(text, 0, 10);
        text += size + (end != 0);
    }
}

EXPORT("request") char *where(void) { return request; }

EXPORT("define") void define_all(void)
{
    const char *at = request;
    while (*at) {
        const char *name = strchr(at, ' '), *end = strchr(at, ';');
        define(at, (size_t)(name - at), name + 1, (size_t)(end - name - 1));
        at = end + 2;
    }
}

EXPORT("init") void init(int rounds)
{
    strcpy(request, prelude);
    define_all();
    for (int i = 0; i < rounds; i++)
        define("filler", 6, request, 1000);
}

EXPORT("eval") int64_t eval(void)
{
    run(request);
    return stack[depth - 1];
}
