/* failing.h - allocators that count and can fail, for tests of what is left after.  Include after
 * cmocka.h. */
#ifndef Q3N_TESTS_FAILING_H
#define Q3N_TESTS_FAILING_H

#include <stdlib.h>
#include <string.h>

typedef struct { int calls, fail_at, live; } counter;    /* fail_at: number of the call, -1 none */

static inline void *failing_alloc(void *user, size_t bytes)
{
    counter *k = user;
    if (k->calls++ == k->fail_at) return NULL;
    k->live++;
    return malloc(bytes);
}

static inline void counted_free(void *user, void *memory, size_t bytes)
{
    (void)bytes;
    ((counter *)user)->live--;
    free(memory);
}

/* ---- One that also checks sizes and fills memory with rubbish ---- */
typedef struct {
    int    calls, fail_at;       /* call number fail_at (from 1) and all after it fail; 0 = none */
    int    once;                 /* 1 = only that one fails                                      */
    int    live;                 /* blocks not yet freed                                         */
    size_t live_bytes, last_bytes, total;
    size_t most_bytes;           /* that were live at once                                       */
} heap;

/* The size is kept in front of each block; 16 bytes keep malloc's alignment. */
static inline void *heap_alloc(void *user, size_t bytes)
{
    heap *h = (heap *)user;
    h->calls++;
    h->last_bytes = bytes;
    if (h->fail_at && (h->once ? h->calls == h->fail_at : h->calls >= h->fail_at)) return NULL;
    unsigned char *p = (unsigned char *)malloc(bytes + 16);
    assert_non_null(p);
    memcpy(p, &bytes, sizeof bytes);
    memset(p + 16, 0xC7, bytes);             /* what is not initialised shows */
    h->live++;
    h->live_bytes += bytes;
    h->total += bytes;
    if (h->live_bytes > h->most_bytes) h->most_bytes = h->live_bytes;
    return p + 16;
}

static inline void heap_free(void *user, void *memory, size_t bytes)
{
    heap *h = (heap *)user;
    unsigned char *p = (unsigned char *)memory - 16;
    size_t was;
    memcpy(&was, p, sizeof was);
    assert_int_equal(was, bytes);
    h->live--;
    h->live_bytes -= bytes;
    memset(p + 16, 0x9D, bytes);
    free(p);
}

#endif
