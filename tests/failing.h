/* failing.h - an allocator that counts and can fail, for tests of what is left behind. */
#ifndef Q3N_TESTS_FAILING_H
#define Q3N_TESTS_FAILING_H

#include <stdlib.h>

typedef struct { int calls, fail_at, live; } counter;    /* fail_at: number of the call, -1 none */

static void *failing_alloc(void *user, size_t bytes)
{
    counter *k = user;
    if (k->calls++ == k->fail_at) return NULL;
    k->live++;
    return malloc(bytes);
}

static void counted_free(void *user, void *memory, size_t bytes)
{
    (void)bytes;
    ((counter *)user)->live--;
    free(memory);
}

#endif
