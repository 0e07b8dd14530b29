// SQLite as a reactor, with a database in its memory. The exports are those of lua.c.
#include <stdlib.h>
#include <string.h>

#include "sqlite3.h"

static sqlite3 *database;
static char *text, *result;
static size_t used, room;

static void put(const char *part, char end) {
    size_t size = strlen(part);
    if (used + size + 1 > room) result = realloc(result, room = 2 * (used + size + 1));
    memcpy(result + used, part, size);
    result[used + size] = end;
    used += size + 1;
}

static int put_row(void *unused, int count, char **values, char **names) {
    (void)unused, (void)names;
    for (int i = 0; i < count; i++) put(values[i] ? values[i] : "NULL", i + 1 < count ? '|' : '\n');
    return 0;
}

__attribute__((export_name("start"))) void start(void) {
    if (sqlite3_open(":memory:", &database) != SQLITE_OK) abort();
}

__attribute__((export_name("buffer"))) char *buffer(size_t size) { return text = realloc(text, size + 1); }

__attribute__((export_name("run"))) size_t run(size_t size) {
    char *error = NULL;
    text[size] = 0;
    used = 0;
    if (sqlite3_exec(database, text, put_row, NULL, &error) != SQLITE_OK) put(error, '\n');
    sqlite3_free(error);
    return used;
}

__attribute__((export_name("reply"))) const char *reply(void) { return result; }
