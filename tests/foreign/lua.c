// Lua as a reactor. The host writes the text of a request to buffer(size), calls run(size), and finds the reply, which
// has as many bytes as run() returned, at reply().
#include <stdio.h>
#include <stdlib.h>

#include "lauxlib.h"
#include "lua.h"
#include "lualib.h"

// setjmp and longjmp are compiled to exceptions with this tag, which the C library does not define.
__asm__(".globl __c_longjmp\n.tagtype __c_longjmp i32\n__c_longjmp:\n");

// Functions that Lua's library needs, and that WASI does not have.
FILE *tmpfile(void) { return NULL; }
char *tmpnam(char *name) { (void)name; return NULL; }
int system(const char *command) { (void)command; return 0; }

static lua_State *state;
static char *text;
static const char *result;

__attribute__((export_name("start"))) void start(void) {
    state = luaL_newstate();
    luaL_openlibs(state);
}

__attribute__((export_name("buffer"))) char *buffer(size_t size) { return text = realloc(text, size); }

__attribute__((export_name("run"))) size_t run(size_t size) {
    size_t length;
    lua_settop(state, 0);
    if (luaL_loadbuffer(state, text, size, "=request") == LUA_OK) lua_pcall(state, 0, 1, 0);
    result = luaL_tolstring(state, -1, &length);
    fflush(stdout);
    return length;
}

__attribute__((export_name("reply"))) const char *reply(void) { return result; }
