/* sessions.h - what the tests of sessions share.  Include after cmocka.h, qwen3next.h and
 * failing.h. */
#ifndef Q3N_TESTS_SESSIONS_H
#define Q3N_TESTS_SESSIONS_H

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engines.h"
#include "golden.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* Code under a sanitizer is up to fifteen times as slow: fewer schedules and runs. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#  define SLOW 1
#else
#  define SLOW 0
#endif
#ifdef __SANITIZE_THREAD__
#  define THREADS_ALONE 1     /* what one thread does is tried without this sanitizer */
#else
#  define THREADS_ALONE 0
#endif

/* The models of the published families.  Those of FAMILIES_AGAIN take the same code as another:
 * their checkpoints differ (fp8, vision beside the text), not what is made of them. */
#define FAMILIES_ONCE(X)                                                                \
    X(qwen3_5) X(qwen3_5_moe) X(qwen3_dense) X(qwen3_dense_yarn) X(qwen3_moe)           \
    X(qwen3_moe_nonorm) X(qwen3_next) X(qwen3_next_mixed) X(qwen3_next_mtp)
#define FAMILIES_AGAIN(X) X(qwen3_5_moe_vl) X(qwen3_next_fp8)
#define FAMILIES(X) FAMILIES_ONCE(X) FAMILIES_AGAIN(X)

/* For what takes long under sanitizers. */
#if SLOW
#  define FAMILIES_TO_TRY(X) FAMILIES_ONCE(X)
#else
#  define FAMILIES_TO_TRY(X) FAMILIES(X)
#endif

#define CASE(test, model) { #test "(" #model ")", test, NULL, NULL, (void *)(uintptr_t)#model }

/* ---- Models, sessions, numbers ---- */
static inline q3n_model *open_model(const char *name, heap *h)   /* h NULL = malloc */
{
    char path[512];
    q3n_error err;
    q3n_model *m = NULL;
    q3n_model_options o = Q3N_INIT(q3n_model_options);
    if (h) o.allocator = (q3n_allocator){ heap_alloc, heap_free, h };
    snprintf(path, sizeof path, "%s/%s.q3n", Q3N_TEST_MODELS, name);
    if (q3n_model_open(&m, path, &o, &err) != Q3N_OK) fail_msg("%s", err.message);
    return m;
}

static inline q3n_session *create_session(const q3n_model *m, const q3n_session_options *o)
{
    q3n_session *s = NULL;
    q3n_error err;
    if (q3n_session_create(&s, m, o, &err) != Q3N_OK) fail_msg("session: %s", err.message);
    return s;
}

/* Fails with the session's own words. */
static inline void must(q3n_session *s, q3n_result r, q3n_result want)
{
    if (r != want)
        fail_msg("%s (%s), expected %s", q3n_result_string(r), q3n_session_error(s)->message,
                 q3n_result_string(want));
}

static inline q3n_engine *create_engine(const q3n_model *m, const q3n_engine_options *o)
{
    q3n_engine *e = NULL;
    q3n_error err;
    if (q3n_engine_create(&e, m, o, &err) != Q3N_OK) fail_msg("engine: %s", err.message);
    return e;
}

/* An engine for several sessions; NULL = one of the session's own, of these options. */
static inline void set_engine(q3n_session_options *o, q3n_engine *e, const q3n_engine_options *own)
{
    o->engine = e;
    o->engine_options = e ? NULL : own;
}

static inline void set_sampler(q3n_session *s, q3n_sampler_options o)   /* all 0: greedy */
{
    o.size = sizeof o;
    must(s, q3n_session_set_sampler(s, &o), Q3N_OK);
}

static inline q3n_session_options plain_options(int capacity)
{
    q3n_session_options o = Q3N_INIT(q3n_session_options);
    o.capacity = capacity;
    o.engine_options = &one_thread;
    return o;
}

static inline float *new_floats(size_t n)
{
    float *x = (float *)malloc((n + 1) * sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i < n; i++) x[i] = NAN;
    return x;
}

static inline void check_same(const float *got, const float *want, size_t n, const char *what)
{
    for (size_t i = 0; i < n; i++)
        if (memcmp(&got[i], &want[i], sizeof *got) != 0)
            fail_msg("%s: element %zu is %.9g, expected %.9g to the last bit", what, i,
                     (double)got[i], (double)want[i]);
}

static inline int argmax(const float *x, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++) if (x[i] > x[best]) best = i;
    return best;
}

/* SplitMix64: Steele, Lea, Flood 2014 */
static inline uint64_t mix64(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

static inline uint64_t random_next(uint64_t *state)
{
    return mix64(*state += 0x9E3779B97F4A7C15ull);
}

static inline int random_below(uint64_t *state, int n)   /* 0 .. n - 1 */
{
    return (int)(random_next(state) % (uint64_t)n);
}

static inline void random_tokens(uint64_t *state, int32_t *ids, int n, int vocab)
{
    for (int i = 0; i < n; i++) ids[i] = random_below(state, vocab);
}

/* ---- A directory, and a session file in memory ---- */
static inline void remove_directory(const char *path)
{
    char file[400];
    DIR *dir = opendir(path);
    assert_non_null(dir);
    for (const struct dirent *e; (e = readdir(dir)) != NULL; ) {
        snprintf(file, sizeof file, "%s/%s", path, e->d_name);
        if (e->d_name[0] != '.') assert_int_equal(remove(file), 0);
    }
    closedir(dir);
    assert_int_equal(remove(path), 0);
}

typedef struct {
    uint8_t *bytes;
    size_t   n, room, at;        /* written, allocated, read so far                              */
    size_t   fail_at;            /* bytes after which it fails; SIZE_MAX = never                 */
} memory_file;

static inline int memory_write(void *user, const void *data, size_t bytes)
{
    memory_file *b = (memory_file *)user;
    if (b->n + bytes > b->fail_at) return 1;
    if (b->n + bytes > b->room) {
        b->room = 2 * (b->n + bytes);
        b->bytes = (uint8_t *)realloc(b->bytes, b->room);
        assert_non_null(b->bytes);
    }
    if (bytes) memcpy(b->bytes + b->n, data, bytes);
    b->n += bytes;
    return 0;
}

static inline int memory_read(void *user, void *data, size_t bytes)
{
    memory_file *b = (memory_file *)user;
    if (bytes > b->n - b->at || b->at + bytes > b->fail_at) return 1;
    if (bytes) memcpy(data, b->bytes + b->at, bytes);
    b->at += bytes;
    return 0;
}

static inline q3n_result save_to(memory_file *b, q3n_session *s, size_t fail_at)
{
    const q3n_sink sink = { memory_write, b };
    b->n = 0;
    b->fail_at = fail_at;
    return q3n_session_save_to(s, &sink);
}

static inline q3n_result load_from(memory_file *b, q3n_session *s, size_t fail_at)
{
    const q3n_source source = { memory_read, b };
    b->at = 0;
    b->fail_at = fail_at;
    return q3n_session_load_from(s, &source);
}

#endif
