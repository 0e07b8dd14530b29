/* The interpreter of `linmem bench --suite image`: a Forth that reads its standard library at its start.
 *
 * Colon definitions are compiled to threaded code; names are looked up in one list, latest first, as in most Forths.
 * The module contains the text of the library, _forth.fs. init() interprets this text, and so fills the dictionary and
 * computes the tables that some words of the library use. eval() then serves requests. Each request changes the
 * interpreter's dictionary and heap, as the requests of a typical guest do.
 *
 * The program uses no C library. _forth.wasm was built by
 *
 *   python -m ziglang cc -target wasm32-freestanding -mcpu=mvp -nostdlib -std=c23 -O2 -s \
 *     -Wl,--no-entry -Wl,--export-memory -Wl,--export=init -Wl,--export=request -Wl,--export=eval \
 *     -o bench/_forth.wasm bench/_forth.c
 */

typedef long long cell;
typedef struct word word;
typedef void (*primitive)(void);
struct word { word *next; primitive run; cell *body; int immediate; int size; char name[32]; };

enum { STACK = 256, RETURNS = 256, SPACE = 64 << 10 };

static const char library[] = {
#embed "_forth.fs"
    , 0
};
static cell space[SPACE];               /* what is compiled and allotted */
static cell *here = space;
static cell stack[STACK], returns[RETURNS];
static cell *top = stack;               /* the first that is free */
static cell *rtop = returns;
static word *latest;
static word *current;                   /* that is executed */
static cell *next;                      /* of its threaded code; 0 ends an evaluation */
static const char *input;
static cell compiling, broken;
static char text[1 << 16];

static void push(cell n) { if (top < stack + STACK) *top++ = n; else broken = 1; }
static cell pop(void) { if (top > stack) return *--top; broken = 2; return 0; }
static void rpush(cell n) { if (rtop < returns + RETURNS) *rtop++ = n; else broken = 3; }
static cell rpop(void) { if (rtop > returns) return *--rtop; broken = 4; return 0; }
static void compile(cell n) { if (here < space + SPACE) *here++ = n; else broken = 5; }

static int token(const char **at)
{
    while (*input == ' ' || *input == '\n')
        input++;
    *at = input;
    while (*input && *input != ' ' && *input != '\n')
        input++;
    return (int)(input - *at);
}

static word *find(const char *name, int size)
{
    for (word *w = latest; w; w = w->next)
        if (w->size == size) {
            int i = 0;
            while (i < size && w->name[i] == name[i])
                i++;
            if (i == size)
                return w;
        }
    return 0;
}

static word *create(const char *name, int size, primitive run)
{
    word *w = (word *)here;
    cell *end = here + (sizeof *w + sizeof *here - 1) / sizeof *here;
    if (end > space + SPACE || size > (int)sizeof w->name || !size) {
        broken = 6;
        return latest;
    }
    here = end;
    w->next = latest;
    w->run = run;
    w->body = end;
    w->immediate = 0;
    w->size = size;
    for (int i = 0; i < size; i++)
        w->name[i] = name[i];
    return latest = w;
}

static void literal(void) { push(*next++); }
static void enter(void) { rpush((cell)(long)next); next = current->body; }
static void leave(void) { next = (cell *)(long)rpop(); }
static void address(void) { push((cell)(long)current->body); }
static void value(void) { push(*current->body); }
static void jump(void) { next = (cell *)(long)*next; }
static void jump_if_zero(void) { next = pop() ? next + 1 : (cell *)(long)*next; }
static void begin_loop(void) { cell from = pop(); rpush(pop()); rpush(from); }
static void end_loop(void)
{
    if (++rtop[-1] < rtop[-2])
        next = (cell *)(long)*next;
    else {
        rtop -= 2;
        next++;
    }
}

/* Hidden words, which compiled code uses. The first lines of init() make them. */
static word *w_literal, *w_leave, *w_jump, *w_jump_if_zero, *w_begin_loop, *w_end_loop;

static void execute(word *w)
{
    next = 0;
    for (;;) {
        current = w;
        w->run();
        if (!next || broken)
            return;
        w = (word *)(long)*next++;
    }
}

static void emit(word *w) { compile((cell)(long)w); }
static void define(primitive run)
{
    const char *name;
    int size = token(&name);
    create(name, size, run);
}

static void dup(void) { cell a = pop(); push(a); push(a); }
static void drop(void) { pop(); }
static void swap(void) { cell b = pop(), a = pop(); push(b); push(a); }
static void over(void) { cell b = pop(), a = pop(); push(a); push(b); push(a); }
static void rot(void) { cell c = pop(), b = pop(), a = pop(); push(b); push(c); push(a); }
static void to_r(void) { rpush(pop()); }
static void from_r(void) { push(rpop()); }
static void r_at(void) { cell a = rpop(); rpush(a); push(a); }
static void index(void) { r_at(); }
static void outer(void) { push(rtop - 3 >= returns ? rtop[-3] : 0); }
static void add(void) { cell b = pop(); push(pop() + b); }
static void sub(void) { cell b = pop(); push(pop() - b); }
static void mul(void) { cell b = pop(); push(pop() * b); }
static void divide(void) { cell b = pop(); push(pop() / b); }           /* by zero: a trap */
static void modulo(void) { cell b = pop(); push(pop() % b); }
static void and(void) { cell b = pop(); push(pop() & b); }
static void or(void) { cell b = pop(); push(pop() | b); }
static void xor(void) { cell b = pop(); push(pop() ^ b); }
static void shl(void) { cell b = pop(); push((cell)((unsigned long long)pop() << (b & 63))); }
static void shr(void) { cell b = pop(); push((cell)((unsigned long long)pop() >> (b & 63))); }
static void equal(void) { cell b = pop(); push(-(pop() == b)); }
static void less(void) { cell b = pop(); push(-(pop() < b)); }
static void get(void) { push(*(cell *)(long)pop()); }
static void set(void) { cell *at = (cell *)(long)pop(); *at = pop(); }
static void get_byte(void) { push(*(unsigned char *)(long)pop()); }
static void set_byte(void) { unsigned char *at = (unsigned char *)(long)pop(); *at = (unsigned char)pop(); }
static void where(void) { push((cell)(long)here); }
static void comma(void) { compile(pop()); }
static void allot(void)
{
    cell n = pop();
    if (n < 0 || n > space + SPACE - here)
        broken = 5;
    else
        here += n;
}
static void constant(void) { cell n = pop(); define(value); compile(n); }
static void variable(void) { define(address); compile(0); }
static void create_word(void) { define(address); }
static void colon(void) { define(enter); compiling = 1; }
static void semicolon(void) { emit(w_leave); compiling = 0; }
static void if_(void) { emit(w_jump_if_zero); push((cell)(long)here); compile(0); }
static void then(void) { *(cell *)(long)pop() = (cell)(long)here; }
static void else_(void) { emit(w_jump); cell hole = (cell)(long)here; compile(0); then(); push(hole); }
static void begin(void) { where(); }
static void until(void) { emit(w_jump_if_zero); comma(); }
static void while_(void) { if_(); swap(); }
static void repeat(void) { emit(w_jump); comma(); then(); }
static void do_(void) { emit(w_begin_loop); where(); }
static void loop(void) { emit(w_end_loop); comma(); }
static void recurse(void) { emit(latest); }
static void comment(void)
{
    while (*input && *input != ')')
        input++;
    input += *input == ')';
}

static const struct { const char *name; primitive run; int immediate; } primitives[] = {
    {"dup", dup, 0}, {"drop", drop, 0}, {"swap", swap, 0}, {"over", over, 0}, {"rot", rot, 0}, {">r", to_r, 0},
    {"r>", from_r, 0}, {"r@", r_at, 0}, {"i", index, 0}, {"j", outer, 0}, {"+", add, 0}, {"-", sub, 0}, {"*", mul, 0},
    {"/", divide, 0}, {"mod", modulo, 0}, {"and", and, 0}, {"or", or, 0}, {"xor", xor, 0}, {"lshift", shl, 0},
    {"rshift", shr, 0}, {"=", equal, 0}, {"<", less, 0}, {"@", get, 0}, {"!", set, 0}, {"c@", get_byte, 0},
    {"c!", set_byte, 0}, {"here", where, 0}, {",", comma, 0}, {"cells-allot", allot, 0}, {"constant", constant, 0},
    {"variable", variable, 0}, {"create", create_word, 0}, {":", colon, 0}, {";", semicolon, 1}, {"if", if_, 1},
    {"then", then, 1}, {"else", else_, 1}, {"begin", begin, 1}, {"until", until, 1}, {"while", while_, 1},
    {"repeat", repeat, 1}, {"do", do_, 1}, {"loop", loop, 1}, {"recurse", recurse, 1}, {"(", comment, 1},
};

static int number(const char *at, int size, cell *out)
{
    int negative = size > 1 && *at == '-';
    cell n = 0;
    for (int i = negative; i < size; i++) {
        if (at[i] < '0' || at[i] > '9')
            return 0;
        n = n * 10 + (at[i] - '0');
    }
    *out = negative ? -n : n;
    return 1;
}

static void interpret(const char *source)
{
    const char *name;
    int size;
    cell n;
    input = source;
    while (!broken && (size = token(&name))) {
        word *w = find(name, size);
        if (w && (!compiling || w->immediate))
            execute(w);
        else if (w)
            emit(w);
        else if (!number(name, size, &n))
            broken = 7;
        else if (compiling) {
            emit(w_literal);
            compile(n);
        } else
            push(n);
    }
}

static word *hidden(primitive run) { return create(" ", 1, run); }

/* Returns the number of words in the dictionary, or the code of an error as a negative number. */
int init(void)
{
    int count = 0;
    w_literal = hidden(literal);
    w_leave = hidden(leave);
    w_jump = hidden(jump);
    w_jump_if_zero = hidden(jump_if_zero);
    w_begin_loop = hidden(begin_loop);
    w_end_loop = hidden(end_loop);
    for (unsigned i = 0; i < sizeof primitives / sizeof *primitives; i++) {
        const char *name = primitives[i].name;
        int size = 0;
        while (name[size])
            size++;
        create(name, size, primitives[i].run)->immediate = primitives[i].immediate;
    }
    interpret(library);
    for (word *w = latest; w; w = w->next)
        count++;
    return broken ? -(int)broken : count;
}

/* Returns the buffer for the text of the next request, which must end with a zero byte. */
char *request(void) { return text; }

/* Interprets the request. Returns the top of the stack, or the code of an error as a negative number. */
cell eval(void)
{
    interpret(text);
    return broken ? -broken : pop();
}
