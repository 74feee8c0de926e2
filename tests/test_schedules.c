/* test_schedules.c - sessions in every order a program can think of: random schedules of all
 * operations, each compared with plain runs of the same tokens, to the bit.
 *
 * Q3N_SCHEDULES=N in the environment runs N schedules, Q3N_SEED=S begins with seed S.  A schedule
 * depends on its seed, and on time where limits of time and chosen numbers of drafts do; one that
 * fails prints seed and operations. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "q3n_make.h"
#include "isas.h"
#include "failing.h"
#include "sessions.h"

/* ---- A text, and what a plain run of it gives ---- */
#define MOST 600                 /* tokens: more than two pages                                  */

typedef struct {
    int     n;
    int32_t ids[MOST];
} text;

static void text_append(text *t, const int32_t *ids, int n)
{
    assert_true(n >= 0 && t->n + n <= MOST);
    memcpy(t->ids + t->n, ids, (size_t)n * sizeof *ids);
    t->n += n;
}

static int common_prefix(const text *a, const text *b)
{
    int n = 0;
    while (n < a->n && n < b->n && a->ids[n] == b->ids[n]) n++;
    return n;
}

/* Plain sessions that only ever append, and logits [vocab] of every prefix that they came by, found
 * by a hash of its tokens. */
typedef struct {
    const q3n_model    *m;
    q3n_session_options o;
    q3n_engine_options  own;
    q3n_session        *session[4], *drafting;
    text                t[4];
    int                 vocab, next, n_rows, max_rows;
    uint64_t           *keys;
    float              *rows;
} reference;

static void reference_open(reference *r, const q3n_model *m, const q3n_session_options *o)
{
    memset(r, 0, sizeof *r);
    r->m = m;
    r->o = *o;
    r->own = *o->engine_options;
    r->o.engine_options = &r->own;
    r->vocab = q3n_model_config(m)->vocab_size;
    r->max_rows = r->vocab > 1000 ? 2 * MOST : 8 * MOST;
    r->keys = (uint64_t *)malloc((size_t)r->max_rows * sizeof *r->keys);
    r->rows = new_floats((size_t)r->max_rows * (size_t)r->vocab);
    assert_non_null(r->keys);
    for (int i = 0; i < COUNT(r->session); i++) r->session[i] = create_session(m, o);
}

static void reference_close(reference *r)
{
    for (int i = 0; i < COUNT(r->session); i++) q3n_session_destroy(r->session[i]);
    q3n_session_destroy(r->drafting);
    free(r->keys);
    free(r->rows);
}

static uint64_t hash_step(uint64_t h, int32_t id) { return q3n__mix64(h + (uint64_t)id + 1); }

/* Evaluate what text i of the reference lacks of t, keeping the logits of every token. */
static void reference_extend(reference *r, int i, const text *t)
{
    text *own = &r->t[i];
    const int n = t->n - own->n;
    uint64_t h = 0;
    if (r->n_rows + n > r->max_rows) r->n_rows = 0;
    const q3n_outputs out = { .size = sizeof out,
                              .all_logits = r->rows + (size_t)r->n_rows * (size_t)r->vocab };
    must(r->session[i],
         q3n_session_eval_outputs(r->session[i], t->ids + own->n, n, &out), Q3N_OK);
    for (int j = 0; j < t->n; j++) {
        h = hash_step(h, t->ids[j]);
        if (j >= own->n) r->keys[r->n_rows++] = h;
    }
    text_append(own, t->ids + own->n, n);
}

/* The logits after t; valid until the next call. */
static const float *reference_logits(reference *r, const text *t)
{
    uint64_t h = 0;
    for (int j = 0; j < t->n; j++) h = hash_step(h, t->ids[j]);
    for (int i = 0; i < r->n_rows; i++)
        if (r->keys[i] == h) return r->rows + (size_t)i * (size_t)r->vocab;
    int best = -1;
    for (int i = 0; i < COUNT(r->t); i++)
        if (r->t[i].n > 0 && r->t[i].n < t->n && common_prefix(&r->t[i], t) == r->t[i].n
            && (best < 0 || r->t[i].n > r->t[best].n)) best = i;
    if (best < 0) {
        best = r->next = (r->next + 1) % COUNT(r->t);
        q3n_session_reset(r->session[best]);
        r->t[best].n = 0;
    }
    reference_extend(r, best, t);
    return r->rows + (size_t)(r->n_rows - 1) * (size_t)r->vocab;
}

/* What a session that evaluated t in one call drafts after token. */
static void reference_draft(reference *r, const text *t, int32_t token, int32_t *drafts, int n,
                            float *logits)
{
    if (!r->drafting) {
        q3n_session_options o = r->o;
        o.speculate = Q3N_SPECULATE_MTP;
        r->drafting = create_session(r->m, &o);
    }
    q3n_session_reset(r->drafting);
    must(r->drafting, q3n_session_eval(r->drafting, t->ids, t->n, NULL), Q3N_OK);
    must(r->drafting, q3n_session_draft(r->drafting, token, drafts, n, logits), Q3N_OK);
}

/* ---- Random schedules ---- */
typedef struct {
    q3n_session *s;              /* NULL = free                                                  */
    text         t;              /* what must be in it                                           */
    int          capacity, drafts;   /* drafts: it has an MTP cache                              */
    int          batch;          /* -1 = an engine of its own                                    */
} slot;

typedef struct {
    q3n_snapshot *snap;
    text          t;
} kept;

typedef struct {
    memory_file file;
    text        t;
} blob;

typedef enum { ARMED_NOT, ARMED_CANCEL, ARMED_MEMORY } armed;

typedef struct {
    uint64_t     rng;
    unsigned long seed;
    const char  *name;
    heap         heap;
    q3n_model   *m;
    q3n_session_options base;    /* kv type of all                                               */
    q3n_engine_options engine;   /* instruction set and hook of all                              */
    q3n_engine_options own;      /* of the session that is made next                             */
    int          vocab, capacity, has_delta, has_mtp;
    int          idle;           /* 1 = modules fall after their texts, as if they did not pay   */
    reference    ref;
    q3n_engine   *batch[2];
    q3n_cache   *cache;
    slot         slots[4];
    kept         snaps[6];
    blob         blobs[2];
    text         source[4];      /* texts that sessions follow                                   */
    float       *logits;         /* [MOST, vocab]                                                */
    armed        armed;
    int          cancel_in;      /* calls of the hook until these are cancelled                  */
    int          cancelled;      /* requests that stopped a call                                 */
    q3n_session *cancel_session;
    q3n_engine   *cancel_batch;
    char         directory[64];  /* of the cache, "" = none                                      */
    int          n_ops, n_failed, n_runs;
    char        *log;
    size_t       log_bytes, log_room;
} world;

static int below(world *w, int n) { return random_below(&w->rng, n); }
static int chance(world *w, int percent) { return below(w, 100) < percent; }

static void note(world *w, const char *format, ...) Q3N__PRINTF(2, 3);
static void note(world *w, const char *format, ...)
{
    va_list args;
    if (w->log_room - w->log_bytes < 400) {
        w->log_room = 2 * w->log_room + 4000;
        w->log = (char *)realloc(w->log, w->log_room);
        assert_non_null(w->log);
    }
    va_start(args, format);
    w->log_bytes += (size_t)vsnprintf(w->log + w->log_bytes, 400, format, args);
    va_end(args);
}

static void world_fail(const world *w, const char *format, ...) Q3N__PRINTF(2, 3);
static void world_fail(const world *w, const char *format, ...)
{
    char why[700];
    va_list args;
    va_start(args, format);
    vsnprintf(why, sizeof why, format, args);
    va_end(args);
    fprintf(stderr, "%s\n", w->log);        /* longer than what cmocka prints */
    fail_msg("Q3N_SEED=%lu Q3N_SCHEDULES=1 (%s): %s", w->seed, w->name, why);
}

static void compare_logits(world *w, const float *got, const text *t, const char *what)
{
    const float *want = reference_logits(&w->ref, t);
    for (int i = 0; i < w->vocab; i++)
        if (memcmp(&got[i], &want[i], sizeof *got) != 0)
            world_fail(w, "%s behind %d tokens: logit %d is %.9g, a plain run has %.9g", what, t->n,
                       i, (double)got[i], (double)want[i]);
}

/* The session holds what it must: length, tokens, and most times logits. */
static void verify(world *w, slot *s)
{
    int32_t ids[MOST];
    const int n = s->t.n;
    if (q3n_session_length(s->s) != n)
        world_fail(w, "length %d, expected %d", q3n_session_length(s->s), n);
    const int cut = n ? below(w, n + 1) : 0;
    if ((cut && q3n_session_tokens(s->s, 0, cut, ids) != Q3N_OK)
        || (n > cut && q3n_session_tokens(s->s, cut, n - cut, ids + cut) != Q3N_OK))
        world_fail(w, "q3n_session_tokens: %s", q3n_session_error(s->s)->message);
    for (int i = 0; i < n; i++)
        if (ids[i] != s->t.ids[i])
            world_fail(w, "token %d is %d, expected %d", i, ids[i], s->t.ids[i]);
    if (n == 0) {
        if (q3n_session_logits(s->s, w->logits) != Q3N_ERR_ARG)
            world_fail(w, "logits of no text");
    } else if (chance(w, 70)) {
        const q3n_result r = q3n_session_logits(s->s, w->logits);
        if (r != Q3N_OK)
            world_fail(w, "q3n_session_logits: %s", q3n_session_error(s->s)->message);
        compare_logits(w, w->logits, &s->t, "q3n_session_logits");
    }
}

static void cancel_in_hook(void *user, int l, const float *x, int n, int d)
{
    world *w = (world *)user;
    (void)l;
    (void)x;
    (void)n;
    (void)d;
    if (w->cancel_in == 0 || --w->cancel_in > 0) return;
    w->cancelled += w->cancel_batch ? q3n_engine_cancel(w->cancel_batch)
                                    : q3n_session_cancel(w->cancel_session);
}

/* Requests between two calls stop nothing, neither the one before nor the next. */
static void cancel_between(world *w, q3n_session *s, q3n_engine *b)
{
    if ((s && q3n_session_cancel(s)) || (b && q3n_engine_cancel(b)))
        world_fail(w, "a request between two calls says that it stops one");
}

/* Sometimes the next operation is to fail: cancelled on the way, or short of memory. */
static void arm(world *w, slot *s)
{
    const int x = below(w, 12);
    w->armed = ARMED_NOT;
    w->cancelled = 0;
    cancel_between(w, s->s, NULL);
    if (x <= 1) {
        w->armed = ARMED_CANCEL;
        w->cancel_in = 1 + below(w, 20);
        w->cancel_session = s->s;
        w->cancel_batch = NULL;
        note(w, " (cancelled in call %d of the hook)", w->cancel_in);
    } else if (x <= 3) {
        w->armed = ARMED_MEMORY;
        w->heap.calls = 0;
        w->heap.fail_at = 1 + below(w, 6);
        w->heap.once = below(w, 2);
        note(w, " (allocation %d%s fails)", w->heap.fail_at, w->heap.once ? "" : " and all after");
    }
}

static void disarm(world *w, slot *s)
{
    w->armed = ARMED_NOT;
    w->heap.fail_at = w->cancel_in = 0;
    cancel_between(w, s->s, NULL);
}

/* 1 if the call was successful.  0 if it failed as it was made to: then nothing has changed. */
static int successful(world *w, slot *s, q3n_result r)
{
    const armed a = w->armed;
    disarm(w, s);
    if (r == Q3N_OK && !w->cancelled) return 1;
    const q3n_result want = a == ARMED_NOT    ? Q3N_OK
                          : a == ARMED_MEMORY ? Q3N_ERR_MEMORY : Q3N_ERR_CANCELLED;
    if (r != want || q3n_session_error(s->s)->code != want)
        world_fail(w, "%s, expected %s; the error record: %s", q3n_result_string(r),
                   q3n_result_string(want), q3n_session_error(s->s)->message);
    note(w, " failed;");
    w->n_failed++;
    verify(w, s);
    return 0;
}

/* Refused for its arguments: nothing has changed. */
static void refused(world *w, slot *s, q3n_result r, q3n_result want)
{
    if (r != want) world_fail(w, "%s, expected %s", q3n_result_string(r), q3n_result_string(want));
    note(w, " refused;");
    verify(w, s);
}

/* n tokens to put after t: of a text that others follow too, what followed before, or any. */
static void continuation(world *w, const text *t, int32_t *ids, int n)
{
    const int kind = below(w, 3), period = 1 + below(w, 9);
    const text *source = &w->source[below(w, COUNT(w->source))];
    for (int i = 0; i < n; i++) {
        const int back = t->n + i - period;
        if (kind == 0)                   ids[i] = source->ids[(t->n + i) % MOST];
        else if (kind == 1 && back >= 0) ids[i] = back < t->n ? t->ids[back] : ids[back - t->n];
        else                             ids[i] = below(w, w->vocab);
    }
}

/* How many tokens an operation appends: few, to the edge of a page, or many; at most room. */
static int step_length(world *w, int length, int room)
{
    const int x = below(w, 100);
    int n = 1 + below(w, 4);
    if (x > 90)      n = 1 + below(w, 200);
    else if (x > 75) n = 256 - length % 256 + below(w, 5) - 2;
    else if (x > 50) n = 1 + below(w, 40);
    if (n > room) n = room;
    return n < 1 ? 1 : n;
}

static slot *any_session(world *w)
{
    for (;;) {
        slot *s = &w->slots[below(w, COUNT(w->slots))];
        if (s->s) return s;
    }
}

static int number(const world *w, const slot *s) { return (int)(s - w->slots); }

/* ---- Making and forking sessions ---- */
static q3n_session_options session_options(world *w)
{
    static const int batches[] = { 1, 2, 5, 16, 64, 0 };
    q3n_session_options o = w->base;
    o.capacity = chance(w, 75) ? w->capacity : w->capacity / 3 + 1;
    w->own = w->engine;
    w->own.batch_size = batches[below(w, COUNT(batches))];
    w->own.n_threads = 1 + below(w, 3);
    if (chance(w, 10)) w->own.executor = (q3n_executor){ run_backwards, &w->n_runs, 3 };
    /* Most share the first engine. */
    set_engine(&o, chance(w, 85) ? w->batch[chance(w, 80) ? 0 : 1] : NULL, &w->own);
    if (w->cache && chance(w, 60)) o.cache = w->cache;
    else if (chance(w, 50))        o.snapshot_bytes = (size_t)1 << (12 + below(w, 12));
    o.snapshot_every = chance(w, 30) ? 1 + below(w, 100) : 0;
    if (!w->has_delta && chance(w, 30)) o.snapshot_type = Q3N_TYPE_BF16;
    o.speculate = (q3n_speculate)below(w, Q3N_SPECULATE_COUNT);
    if (o.speculate == Q3N_SPECULATE_MTP && !w->has_mtp) o.speculate = Q3N_SPECULATE_LOOKUP;
    o.draft = below(w, Q3N_MAX_DRAFT + 1);
    return o;
}

static int drafts_with(const world *w, const q3n_session_options *o)
{
    return w->has_mtp && (o->speculate == Q3N_SPECULATE_AUTO || o->speculate == Q3N_SPECULATE_MTP);
}

static void slot_set(world *w, slot *s, q3n_session *session, const q3n_session_options *o)
{
    s->s = session;
    s->t.n = 0;
    s->capacity = q3n_session_capacity(session);
    if (s->capacity != o->capacity)
        world_fail(w, "capacity %d, expected %d", s->capacity, o->capacity);
    s->drafts = drafts_with(w, o);
    s->batch = o->engine ? o->engine == w->batch[1] : -1;
}

static void describe(world *w, const q3n_session_options *o)
{
    const q3n_engine_options *own = o->engine_options;
    note(w, " {capacity %d, batch %d, %d threads, engine %d, cache %s, every %d, speculate %d, "
         "draft %d}", o->capacity, own ? own->batch_size : 0, own ? own->n_threads : 0,
         o->engine ? o->engine == w->batch[1] : -1,
         o->cache ? "shared" : o->snapshot_bytes ? "own" : "none", o->snapshot_every,
         (int)o->speculate, o->draft);
}

static slot *free_slot(world *w)   /* one is destroyed if all are taken, but not `but` */
{
    for (int i = 0; i < COUNT(w->slots); i++) if (!w->slots[i].s) return &w->slots[i];
    slot *s = &w->slots[below(w, COUNT(w->slots))];
    note(w, " destroy %d;", number(w, s));
    q3n_session_destroy(s->s);
    s->s = NULL;
    return s;
}

static void op_create(world *w)
{
    slot *s = free_slot(w);
    q3n_session *session = NULL;
    const q3n_session_options o = session_options(w);
    note(w, "create %d", number(w, s));
    describe(w, &o);
    q3n_error err = { .code = Q3N_OK };
    if (chance(w, 10)) {
        w->heap.calls = 0;
        w->heap.once = below(w, 2);
        w->heap.fail_at = 1;
        const int live = w->heap.live;
        const q3n_result r = q3n_session_create(&session, w->m, &o, &err);
        w->heap.fail_at = 0;
        if (r != Q3N_ERR_MEMORY || session || w->heap.live != live)
            world_fail(w, "create without memory: %s, %d blocks left", q3n_result_string(r),
                       w->heap.live - live);
    }
    if (q3n_session_create(&session, w->m, &o, &err) != Q3N_OK)
        world_fail(w, "create: %s", err.message);
    slot_set(w, s, session, &o);
    verify(w, s);
}

/* 1 if the call failed, as it may: the options do not fit, or it was made to fail. */
static int fork_failed(world *w, q3n_result r, const armed a, int fits, const q3n_error *err)
{
    if (r == Q3N_OK) return 0;
    if (err->code != r) world_fail(w, "fork: %s, not in the record", q3n_result_string(r));
    if ((a == ARMED_MEMORY && r == Q3N_ERR_MEMORY)
        || (a == ARMED_CANCEL && r == Q3N_ERR_CANCELLED)
        || (!fits && (r == Q3N_ERR_FULL || r == Q3N_ERR_UNSUPPORTED || r == Q3N_ERR_ARG)))
        return 1;
    world_fail(w, "fork: %s", err->message);
    return 1;
}

/* Options of the fork: the parent's, or others that may not fit. */
static void op_fork(world *w)
{
    slot *s = any_session(w), *to = free_slot(w);
    if (to == s) {                               /* the parent had to go */
        op_create(w);
        return;
    }
    q3n_session *session = (q3n_session *)(uintptr_t)8;
    q3n_error err = { .code = Q3N_OK };
    const int same = chance(w, 60);
    const q3n_session_options o = session_options(w);
    note(w, "fork %d to %d", number(w, s), number(w, to));
    if (!same) describe(w, &o);
    arm(w, s);
    const armed a = w->armed;
    const q3n_result r = q3n_session_fork(&session, s->s, same ? NULL : &o, &err);
    disarm(w, s);
    const int fits = same || o.capacity >= s->t.n;
    if (fork_failed(w, r, a, fits, &err)) {
        if (session) world_fail(w, "a failed fork left a session");
        note(w, " failed;");
        verify(w, s);
        return;
    }
    if (!fits) world_fail(w, "forked with options that do not fit");
    if (same) {
        *to = *s;
        to->s = session;
    } else {
        slot_set(w, to, session, &o);
        to->t = s->t;
    }
    verify(w, to);
    verify(w, s);
}

static void op_destroy(world *w)
{
    int n = 0;
    for (int i = 0; i < COUNT(w->slots); i++) n += w->slots[i].s != NULL;
    if (n < 2) {
        op_create(w);
        return;
    }
    slot *s = any_session(w);
    note(w, "destroy %d", number(w, s));
    q3n_session_destroy(s->s);
    s->s = NULL;
}

/* ---- Evaluating ---- */
static void op_eval(world *w)
{
    slot *s = any_session(w);
    int32_t ids[MOST + 1];
    const int room = s->capacity - s->t.n, n = step_length(w, s->t.n, room);
    continuation(w, &s->t, ids, n);
    note(w, "eval %d: %d behind %d", number(w, s), n, s->t.n);
    if (room == 0) {
        refused(w, s, q3n_session_eval(s->s, ids, 1, NULL), Q3N_ERR_FULL);
        return;
    }
    if (chance(w, 5)) {
        const int32_t good = ids[n - 1];
        ids[n - 1] = chance(w, 50) ? w->vocab : -1;
        refused(w, s, q3n_session_eval(s->s, ids, n, NULL), Q3N_ERR_ARG);
        ids[n - 1] = good;
    }
    arm(w, s);
    const int wanted = chance(w, 50);
    if (!successful(w, s, q3n_session_eval(s->s, ids, n, wanted ? w->logits : NULL))) return;
    text_append(&s->t, ids, n);
    if (wanted) compare_logits(w, w->logits, &s->t, "q3n_session_eval");
    verify(w, s);
}

static void op_outputs(world *w)
{
    slot *s = any_session(w);
    int32_t ids[50];
    const int room = s->capacity - s->t.n, max = room < 50 ? room : 50;
    if (max == 0) return;
    const int n = 1 + below(w, max);
    continuation(w, &s->t, ids, n);
    note(w, "eval_outputs %d: %d behind %d", number(w, s), n, s->t.n);
    arm(w, s);
    const q3n_outputs out = { .size = sizeof out, .all_logits = w->logits };
    if (!successful(w, s, q3n_session_eval_outputs(s->s, ids, n, &out))) return;
    for (int i = 0; i < n; i++) {
        text_append(&s->t, ids + i, 1);
        compare_logits(w, w->logits + (size_t)i * (size_t)w->vocab, &s->t, "all_logits");
    }
    verify(w, s);
}

/* A text that begins as one of those around and fits the session; or what is in it already. */
static text other_text(world *w, const slot *s)
{
    text t = { 0 };
    const text *from = &s->t;
    const int x = below(w, 4);
    if (x == 1) from = &w->source[below(w, COUNT(w->source))];
    if (x == 2) from = &any_session(w)->t;
    if (x == 3) from = &w->snaps[below(w, COUNT(w->snaps))].t;
    int32_t ids[MOST];
    const int shared = chance(w, 40) ? from->n : below(w, from->n + 1);
    text_append(&t, from->ids, shared < s->capacity ? shared : s->capacity);
    if (t.n == 0 || (t.n < s->capacity && chance(w, 70))) {
        const int n = step_length(w, t.n, s->capacity - t.n);
        continuation(w, &t, ids, n);
        text_append(&t, ids, n);
    }
    return t;
}

static void op_prefill(world *w)
{
    slot *s = any_session(w);
    text t = other_text(w, s);
    const int n_common = common_prefix(&t, &s->t);
    int n_reused = -1;
    note(w, "prefill %d: %d tokens, %d of them in the %d there", number(w, s), t.n, n_common,
         s->t.n);
    if (chance(w, 5)) {
        const int32_t good = t.ids[t.n - 1];
        t.ids[t.n - 1] = w->vocab;
        refused(w, s, q3n_session_prefill(s->s, t.ids, t.n, NULL, &n_reused), Q3N_ERR_ARG);
        t.ids[t.n - 1] = good;
        if (t.n + s->t.n > s->capacity && t.n + s->t.n <= MOST) {
            text more = t;
            text_append(&more, s->t.ids, s->t.n);
            refused(w, s, q3n_session_prefill(s->s, more.ids, more.n, NULL, NULL), Q3N_ERR_FULL);
        }
    }
    arm(w, s);
    const int wanted = chance(w, 50);
    const q3n_result r = q3n_session_prefill(s->s, t.ids, t.n, wanted ? w->logits : NULL,
                                             &n_reused);
    if (!successful(w, s, r)) return;
    if (n_reused < 0 || n_reused > t.n || (n_common == s->t.n && n_reused < s->t.n))
        world_fail(w, "%d tokens reused", n_reused);
    note(w, ", %d reused", n_reused);
    s->t = t;
    if (wanted) compare_logits(w, w->logits, &s->t, "q3n_session_prefill");
    verify(w, s);
}

static void op_reuse(world *w)
{
    slot *s = any_session(w);
    text t = other_text(w, s);
    const int n_common = common_prefix(&t, &s->t);
    int n_reused = -1;
    note(w, "reuse %d: %d tokens, %d of them in the %d there", number(w, s), t.n, n_common, s->t.n);
    arm(w, s);
    if (!successful(w, s, q3n_session_reuse(s->s, t.ids, t.n, &n_reused))) return;
    if (n_reused < 0 || n_reused > t.n || (n_common == s->t.n && n_reused < s->t.n))
        world_fail(w, "%d tokens reused", n_reused);
    note(w, ", %d reused", n_reused);
    s->t = t;
    s->t.n = n_reused;
    verify(w, s);
}

static void op_rewind(world *w)
{
    slot *s = any_session(w);
    const int x = below(w, 6), n = s->t.n;
    int to = below(w, n + 1);
    if (x == 0) to = n;
    if (x == 1 && n > 0) to = n - 1;
    if (x == 2) to = n / 256 * 256;
    if (x == 3 && n > 8) to = n - below(w, 8);
    note(w, "rewind %d: %d to %d", number(w, s), n, to);
    if (chance(w, 5))
        refused(w, s, q3n_session_rewind(s->s, chance(w, 50) ? n + 1 : -1), Q3N_ERR_ARG);
    arm(w, s);
    if (!successful(w, s, q3n_session_rewind(s->s, to))) return;
    s->t.n = to;
    verify(w, s);
}

static void op_reset(world *w)
{
    slot *s = any_session(w);
    note(w, "reset %d", number(w, s));
    q3n_session_reset(s->s);
    s->t.n = 0;
    verify(w, s);
}

static void op_checkpoint(world *w)
{
    slot *s = any_session(w);
    note(w, "checkpoint %d", number(w, s));
    arm(w, s);
    if (successful(w, s, q3n_session_checkpoint(s->s))) verify(w, s);
}

/* Pages that others share are as they were: a fork goes on from them. */
static void probe(world *w, slot *s)
{
    q3n_session *fork = NULL;
    q3n_error err = { .code = Q3N_OK };
    int32_t ids[3];
    const int room = s->capacity - s->t.n;
    if (room == 0) return;
    const int n = 1 + below(w, room < 3 ? room : 3);
    continuation(w, &s->t, ids, n);
    note(w, "; probe %d with %d", number(w, s), n);
    if (q3n_session_fork(&fork, s->s, NULL, &err) != Q3N_OK) world_fail(w, "fork: %s", err.message);
    text t = s->t;
    text_append(&t, ids, n);
    if (q3n_session_eval(fork, ids, n, w->logits) != Q3N_OK)
        world_fail(w, "probe: %s", q3n_session_error(fork)->message);
    q3n_session_destroy(fork);
    compare_logits(w, w->logits, &t, "a fork");
    verify(w, s);
}

static void op_probe(world *w) { probe(w, any_session(w)); }

/* ---- Snapshots ---- */
static void op_snapshot(world *w)
{
    slot *s = any_session(w);
    kept *k = &w->snaps[below(w, COUNT(w->snaps))];
    note(w, "snapshot %d (%d tokens) to %d", number(w, s), s->t.n, (int)(k - w->snaps));
    q3n_snapshot_free(k->snap);
    k->snap = NULL;
    arm(w, s);
    if (!successful(w, s, q3n_session_snapshot(s->s, &k->snap))) {
        if (k->snap) world_fail(w, "a failed snapshot is there");
        return;
    }
    if (!k->snap || q3n_snapshot_length(k->snap) != s->t.n) world_fail(w, "snapshot's length");
    k->t = s->t;
    verify(w, s);
}

/* 1 if a state of n tokens does not fit the session: then it must have been refused. */
static int unfit(world *w, slot *s, q3n_result r, int n)
{
    if (n <= s->capacity) return 0;
    disarm(w, s);
    if (r != Q3N_ERR_FULL && r != Q3N_ERR_MEMORY)
        world_fail(w, "%d tokens in a session of %d: %s", n, s->capacity, q3n_result_string(r));
    refused(w, s, r, r);
    return 1;
}

static void op_restore(world *w)
{
    slot *s = any_session(w);
    const kept *k = &w->snaps[below(w, COUNT(w->snaps))];
    if (!k->snap) {
        op_snapshot(w);
        return;
    }
    note(w, "restore %d from %d (%d tokens)", number(w, s), (int)(k - w->snaps), k->t.n);
    arm(w, s);
    const q3n_result r = q3n_session_restore(s->s, k->snap);
    if (unfit(w, s, r, k->t.n)) return;
    if (!successful(w, s, r)) return;
    s->t = k->t;
    verify(w, s);
}

static void op_free_snapshot(world *w)
{
    kept *k = &w->snaps[below(w, COUNT(w->snaps))];
    note(w, "free snapshot %d", (int)(k - w->snaps));
    q3n_snapshot_free(k->snap);
    k->snap = NULL;
}

/* ---- Files ---- */
static void op_save(world *w)
{
    slot *s = any_session(w);
    blob *b = &w->blobs[below(w, COUNT(w->blobs))];
    note(w, "save %d (%d tokens) to %d", number(w, s), s->t.n, (int)(b - w->blobs));
    if (b->file.n > 0 && chance(w, 20)) {
        const size_t at = (size_t)below(w, (int)b->file.n);
        b->t.n = 0;
        const q3n_result r = save_to(&b->file, s->s, at);
        b->file.n = 0;
        if (r != Q3N_OK) refused(w, s, r, Q3N_ERR_IO);   /* else the text is shorter now */
        return;
    }
    arm(w, s);
    const q3n_result r = save_to(&b->file, s->s, SIZE_MAX);
    b->t = s->t;
    if (!successful(w, s, r)) b->file.n = 0;
    verify(w, s);
}

static void op_load(world *w)
{
    slot *s = any_session(w);
    blob *b = &w->blobs[below(w, COUNT(w->blobs))];
    if (b->file.n == 0) {
        op_save(w);
        return;
    }
    note(w, "load %d from %d (%d tokens)", number(w, s), (int)(b - w->blobs), b->t.n);
    const int x = below(w, 10), fits = b->t.n <= s->capacity;
    if (x == 0 && fits) {
        refused(w, s, load_from(&b->file, s->s, (size_t)below(w, (int)b->file.n)), Q3N_ERR_IO);
        return;
    }
    if (x == 1 && fits) {
        uint8_t *at = b->file.bytes + below(w, (int)b->file.n);
        const uint8_t bit = (uint8_t)(1 << below(w, 8));
        *at ^= bit;
        const q3n_result r = load_from(&b->file, s->s, SIZE_MAX);
        *at ^= bit;
        if (r == Q3N_OK) world_fail(w, "byte %d changed, and loaded", (int)(at - b->file.bytes));
        refused(w, s, r, r);
        return;
    }
    arm(w, s);
    const q3n_result r = load_from(&b->file, s->s, SIZE_MAX);
    if (unfit(w, s, r, b->t.n)) return;
    if (!successful(w, s, r)) return;
    s->t = b->t;
    verify(w, s);
}

/* ---- Batches ---- */
#define N_SLOTS COUNT(((world *)0)->slots)

typedef struct {
    q3n_engine_item item[N_SLOTS];
    slot          *slot[N_SLOTS];
    text           before[N_SLOTS], more[N_SLOTS];
    float         *logits;       /* [N_SLOTS, vocab]                                             */
    int            n;
} plan;

/* Of the sessions of engine b. */
static void plan_make(world *w, plan *p, int b)
{
    for (int i = 0; i < N_SLOTS; i++) {
        slot *s = &w->slots[i];
        const int room = s->capacity - s->t.n, k = p->n;
        if (!s->s || s->batch != b || chance(w, 15)) continue;
        p->slot[k] = s;
        p->before[k] = s->t;
        p->more[k].n = room == 0 || chance(w, 10) ? 0 : step_length(w, s->t.n, room);
        continuation(w, &s->t, p->more[k].ids, p->more[k].n);
        p->item[k] = (q3n_engine_item){
            .size = sizeof p->item[k], .session = s->s, .tokens = p->more[k].ids, .n = p->more[k].n,
            .logits = chance(w, 70) ? p->logits + (size_t)k * (size_t)w->vocab : NULL,
        };
        note(w, " %d: %d behind %d%s;", i, p->more[k].n, s->t.n, p->item[k].logits ? "+" : "");
        p->n++;
    }
}

static int plan_done(const plan *p)
{
    int done = 0;
    for (int i = 0; i < p->n; i++) done += p->item[i].done;
    return done;
}

/* Sessions hold what the items say that is done, and finished items have their logits. */
static void plan_verify(world *w, plan *p)
{
    for (int i = 0; i < p->n; i++) {
        slot *s = p->slot[i];
        const q3n_engine_item *item = &p->item[i];
        if (item->done < 0 || item->done > item->n)
            world_fail(w, "item %d: done %d", i, item->done);
        s->t = p->before[i];
        text_append(&s->t, p->more[i].ids, item->done);
        if (chance(w, 60)) verify(w, s);
        if (item->n > 0 && item->done == item->n && item->logits)
            compare_logits(w, item->logits, &s->t, "q3n_engine_eval");
    }
}

/* A session that b does not evaluate; NULL = there is none. */
static slot *stranger(world *w, const q3n_engine *b)
{
    const int first = below(w, N_SLOTS);
    for (int i = 0; i < N_SLOTS; i++) {
        slot *s = &w->slots[(first + i) % N_SLOTS];
        if (s->s && q3n_session_engine(s->s) != b) return s;
    }
    return NULL;
}

/* With an item of a stranger somewhere among them the call is refused whole. */
static void plan_refuse(world *w, q3n_engine *b, plan *p)
{
    static const int32_t token[1] = { 0 };
    q3n_engine_item item[N_SLOTS + 1];
    slot *s = stranger(w, b);
    const int at = below(w, p->n + 1);
    int taken = 0;
    if (!s) return;
    for (int i = 0; i <= p->n; i++)
        item[i] = i == at ? (q3n_engine_item){ .size = sizeof *item, .session = s->s,
                                               .tokens = token, .n = 1 }
                          : p->item[taken++];
    const q3n_result r = q3n_engine_eval(b, item, p->n + 1, NULL);
    note(w, " with %d of another engine", number(w, s));
    refused(w, s, r, Q3N_ERR_ARG);
    if (q3n_engine_error(b)->code != Q3N_ERR_ARG)
        world_fail(w, "the record: %s", q3n_engine_error(b)->message);
    for (int i = 0; i <= p->n; i++)
        if (item[i].done != (i == at ? 0 : p->item[i - (i > at)].done))
            world_fail(w, "a refused call changed done of item %d", i);
    plan_verify(w, p);
}

/* One call that is cancelled or short of memory; 1 if it failed, and then changed nothing. */
static int plan_fail(world *w, q3n_engine *b, plan *p, const q3n_limit *limit)
{
    int done[N_SLOTS];
    for (int i = 0; i < p->n; i++) done[i] = p->item[i].done;
    q3n_result want = Q3N_ERR_CANCELLED;
    if (chance(w, 50)) {
        w->cancel_in = 1 + below(w, 20);
        w->cancel_session = p->n ? p->item[below(w, p->n)].session : NULL;
        w->cancel_batch = p->n == 0 || chance(w, 50) ? b : NULL;
    } else {
        want = Q3N_ERR_MEMORY;
        w->heap.calls = 0;
        w->heap.once = below(w, 2);
        w->heap.fail_at = 1 + below(w, 3);
    }
    w->cancelled = 0;
    cancel_between(w, p->n ? p->item[0].session : NULL, b);
    const q3n_result r = q3n_engine_eval(b, p->item, p->n, limit);
    cancel_between(w, p->n ? p->item[0].session : NULL, b);
    w->heap.fail_at = w->cancel_in = 0;
    if (r == Q3N_OK && !w->cancelled) return 0;
    if (r != want || q3n_engine_error(b)->code != want)
        world_fail(w, "batch: %s, expected %s; the record: %s", q3n_result_string(r),
                   q3n_result_string(want), q3n_engine_error(b)->message);
    note(w, " failed;");
    w->n_failed++;
    for (int i = 0; i < p->n; i++)
        if (p->item[i].done != done[i]) world_fail(w, "a failed batch changed done of item %d", i);
    plan_verify(w, p);
    return 1;
}

static void plan_run(world *w, q3n_engine *b, plan *p, const q3n_limit *limit)
{
    int left = -plan_done(p);
    for (int i = 0; i < p->n; i++) left += p->item[i].n;
    for (int first = 1; left > 0 || first; first = 0) {
        const int before = plan_done(p);
        if (chance(w, 5)) plan_refuse(w, b, p);
        if (!chance(w, 10) || plan_fail(w, b, p, limit)) {
            const q3n_result r = q3n_engine_eval(b, p->item, p->n, limit);
            if (r != Q3N_OK) world_fail(w, "batch: %s", q3n_engine_error(b)->message);
        }
        const int done = plan_done(p) - before;
        note(w, " %d", done);
        if (left > 0 && done < 1) world_fail(w, "no progress");
        if (limit && limit->max_tokens && done > limit->max_tokens)
            world_fail(w, "%d tokens, limit %d", done, limit->max_tokens);
        if (!(limit && (limit->max_tokens || limit->max_microseconds)) && done < left)
            world_fail(w, "%d tokens of %d, and no limit", done, left);
        plan_verify(w, p);
        left -= done;
    }
}

/* Mostly the one of more sessions. */
static int pick_engine(world *w)
{
    int n[COUNT(((world *)0)->batch)] = { 0 };
    for (int i = 0; i < N_SLOTS; i++)
        if (w->slots[i].s && w->slots[i].batch >= 0) n[w->slots[i].batch]++;
    return chance(w, 90) ? n[1] > n[0] : below(w, COUNT(n));
}

static void op_batch(world *w)
{
    plan *p = (plan *)calloc(1, sizeof *p);
    assert_non_null(p);
    p->logits = new_floats((size_t)N_SLOTS * (size_t)w->vocab);
    const int b = pick_engine(w);
    q3n_limit limit = Q3N_INIT(q3n_limit);
    if (chance(w, 40)) limit.max_tokens = 1 + below(w, 40);
    if (chance(w, 20)) limit.max_microseconds = 1 + below(w, 500);
    note(w, "batch %d, limits %d and %d;", b, limit.max_tokens, (int)limit.max_microseconds);
    plan_make(w, p, b);
    plan_run(w, w->batch[b], p, chance(w, 80) ? &limit : NULL);
    free(p->logits);
    free(p);
}

/* ---- Generating ---- */
static int among_best(const float *logits, int vocab, int32_t id, int k)
{
    int before = 0;
    for (int i = 0; i < vocab; i++)
        before += logits[i] > logits[id] || (logits[i] == logits[id] && i < id);
    return before < k;
}

/* The chosen tokens, after their texts, are the largest logits, or among the top_k largest. */
static void check_chosen(world *w, slot *s, const int32_t *tokens, int n, int top_k)
{
    for (int i = 0; i < n; i++) {
        const float *want = reference_logits(&w->ref, &s->t);
        if (tokens[i] < 0 || tokens[i] >= w->vocab
            || !among_best(want, w->vocab, tokens[i], top_k ? top_k : 1))
            world_fail(w, "token %d of %d chosen is %d, plain greedy gives %d", i, n, tokens[i],
                       argmax(want, w->vocab));
        if (i + 1 == n) break;
        if (q3n_model_is_eos(w->m, tokens[i])) world_fail(w, "%d tokens behind the end", n - 1 - i);
        text_append(&s->t, tokens + i, 1);
    }
}

static void op_next(world *w)
{
    slot *s = any_session(w);
    q3n_sampler_options so = { .size = sizeof so, .seed = (uint64_t)below(w, 1000) };
    if (chance(w, 40)) {
        so.temperature = 1.0f;
        so.top_k = 1 + below(w, 4);
    }
    if (q3n_session_set_sampler(s->s, &so) != Q3N_OK) world_fail(w, "no sampler");
    int32_t token = below(w, w->vocab), tokens[16];
    if (s->t.n > 0 && chance(w, 80)) token = argmax(reference_logits(&w->ref, &s->t), w->vocab);
    note(w, "next %d: behind %d, top_k %d", number(w, s), s->t.n, so.top_k);
    for (int i = 1 + below(w, 6); i > 0; i--) {
        const int room = s->capacity - s->t.n;
        int max = 1 + below(w, 16), n = -1;
        if (room == 0) {
            refused(w, s, q3n_session_decode(s->s, token, tokens, max, &n), Q3N_ERR_FULL);
            break;
        }
        if (max > room) max = room;
        if (w->idle && chance(w, 30)) s->s->learned.mtp_idle = Q3N__MTP_IDLE;
        arm(w, s);
        const q3n_result r = q3n_session_decode(s->s, token, tokens, max, &n);
        if (!successful(w, s, r)) continue;
        note(w, " %d", n);
        if (n < 1 || n > max) world_fail(w, "%d tokens, asked for %d", n, max);
        text_append(&s->t, &token, 1);
        check_chosen(w, s, tokens, n, so.top_k);
        token = tokens[n - 1];
        verify(w, s);
    }
}

static void op_draft(world *w)
{
    slot *s = any_session(w);
    const int32_t token = below(w, w->vocab);
    int32_t drafts[Q3N_MAX_DRAFT], want[Q3N_MAX_DRAFT];
    const int n = 1 + below(w, Q3N_MAX_DRAFT);
    if (s->t.n == 0) return;
    note(w, "draft %d: %d behind %d", number(w, s), n, s->t.n);
    float *logits = new_floats(2 * (size_t)w->vocab);
    arm(w, s);
    const q3n_result r = q3n_session_draft(s->s, token, drafts, n, logits);
    if (!s->drafts || (s->t.n + n > s->capacity && r != Q3N_OK)) {
        disarm(w, s);
        refused(w, s, r, s->drafts ? Q3N_ERR_FULL : Q3N_ERR_UNSUPPORTED);
    } else if (!successful(w, s, r)) {
        free(logits);
        return;
    } else if (s->s->unread.mtp_first == 1) {    /* else it has not seen the whole text */
        reference_draft(&w->ref, &s->t, token, want, n, logits + w->vocab);
        for (int i = 0; i < w->vocab; i++)
            if (memcmp(&logits[i], &logits[w->vocab + i], sizeof *logits) != 0)
                world_fail(w, "draft's logit %d is %.9g, expected %.9g", i, (double)logits[i],
                           (double)logits[w->vocab + i]);
        for (int i = 0; i < n; i++)
            if (drafts[i] != want[i])
                world_fail(w, "draft %d of %d is %d, expected %d", i, n, drafts[i], want[i]);
        verify(w, s);
    }
    free(logits);
}

/* ---- A schedule ---- */
/* Twice as often the model with a module that drafts. */
static const char *const model_names[] = {
#define NAME(model) #model,
    FAMILIES(NAME) "qwen3_next_mtp", "qwen3_head_all_moe", "stories", "qwen3_next_mtp:q8",
    "qwen3_moe:q4",
#undef NAME
};

/* "model" or "model:recipe": quantised to a file that goes when it is open. */
static q3n_model *open_named(world *w)
{
    char name[64], path[64];
    const char *recipe = strchr(w->name, ':');
    if (!recipe) return open_model(w->name, &w->heap);
    q3n_error err;
    q3n_model *m = NULL;
    snprintf(name, sizeof name, "%.*s", (int)(recipe - w->name), w->name);
    snprintf(path, sizeof path, "build/test_schedules_%d.q3n", (int)getpid());
    q3n_model *exact = open_model(name, NULL);
    const q3n_quantize_options qo = { .size = sizeof qo, .recipe = recipe + 1, .n_threads = 1 };
    if (q3n_quantize_file(path, exact, &qo, &err) != Q3N_OK) world_fail(w, "%s", err.message);
    q3n_model_close(exact);
    const q3n_model_options o = { .size = sizeof o,
                                  .allocator = { heap_alloc, heap_free, &w->heap } };
    if (q3n_model_open(&m, path, &o, &err) != Q3N_OK) world_fail(w, "%s", err.message);
    remove(path);
    return m;
}

/* A cache in memory alone, or with a directory after it. */
static void world_cache(world *w)
{
    q3n_cache_options o = { .size = sizeof o, .max_bytes = (size_t)1 << (14 + below(w, 12)) };
    q3n_error err;
    if (chance(w, 40)) return;
    if (chance(w, 40)) {
        snprintf(w->directory, sizeof w->directory, "build/test_schedules_%d", (int)getpid());
        mkdir(w->directory, 0777);
        o.directory = w->directory;
        o.max_directory_bytes = chance(w, 50) ? (int64_t)1 << (16 + below(w, 8)) : 0;
    }
    note(w, ", cache of %zu%s", o.max_bytes, w->directory[0] ? " and a directory" : "");
    if (q3n_cache_create(&w->cache, w->m, &o, &err) != Q3N_OK) world_fail(w, "%s", err.message);
}

static void world_sources(world *w)
{
    for (int i = 0; i < COUNT(w->source); i++) {
        random_tokens(&w->rng, w->source[i].ids, MOST, w->vocab);
        const int from = i == 1 ? below(w, MOST / 2) : 1 + below(w, 20);
        if (i == 1) memcpy(w->source[1].ids, w->source[0].ids, (size_t)from * sizeof(int32_t));
        if (i > 1)
            for (int j = from; j < MOST; j++) w->source[i].ids[j] = w->source[i].ids[j - from];
        w->source[i].n = MOST;
    }
}

static void world_open(world *w, unsigned long seed)
{
    static const q3n_type types[] = { Q3N_TYPE_F32, Q3N_TYPE_F16, Q3N_TYPE_BF16, Q3N_TYPE_Q8 };
    w->seed = seed;
    w->rng = seed * 1000003u;
    w->name = model_names[seed % COUNT(model_names)];
    w->m = open_named(w);
    const q3n_config *c = q3n_model_config(w->m);
    w->vocab = c->vocab_size;
    w->has_mtp = c->num_mtp_layers > 0;
    w->idle = chance(w, 30);
    for (int l = 0; l < c->num_hidden_layers; l++) w->has_delta |= c->layer_types[l];
    w->capacity = chance(w, 30) ? 30 + below(w, 100) : MOST - below(w, 60);
    if (w->vocab > 1000 && w->capacity > 300) w->capacity = 300;
    if (c->rope_type == Q3N_ROPE_TABLE && w->capacity > c->max_position_embeddings)
        w->capacity = c->max_position_embeddings;
    w->base.size = sizeof w->base;
    w->base.kv_type = types[below(w, COUNT(types))];
    q3n_isa isa = isa_at(below(w, N_ISAS));
    if (chance(w, 60) || !q3n_isa_supported(isa)) isa = q3n_isa_best();
    if (isa == Q3N_ISA_SCALAR && w->capacity > 60) w->capacity = 60;     /* slow */
    w->engine = (q3n_engine_options){ .size = sizeof w->engine, .isa = isa };
    note(w, "%s, KV %s, %s, capacity %d", w->name, q3n_type_name(w->base.kv_type),
         q3n_isa_name(isa), w->capacity);
    world_sources(w);

    q3n_session_options o = w->base;
    q3n_engine_options eo = w->engine;
    eo.n_threads = 1;
    o.engine_options = &eo;
    o.capacity = MOST;
    if (c->rope_type == Q3N_ROPE_TABLE) o.capacity = w->capacity;
    reference_open(&w->ref, w->m, &o);
    w->logits = new_floats((size_t)(w->vocab > 1000 ? 50 : MOST) * (size_t)w->vocab);
    eo.layer_hook = w->engine.layer_hook = (q3n_layer_hook){ cancel_in_hook, w };
    for (int i = 0; i < COUNT(w->batch); i++) {
        eo.n_threads = 1 + below(w, 3);
        eo.batch_size = chance(w, 30) ? 1 + below(w, 8) : 64;
        note(w, ", batch of %d on %d", eo.batch_size, eo.n_threads);
        w->batch[i] = create_engine(w->m, &eo);
    }
    world_cache(w);
}

/* Snapshots outlive their sessions, or go before them; nothing is left of either. */
static void world_close(world *w)
{
    const int snapshots_first = below(w, 2);
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < COUNT(w->snaps) && pass != snapshots_first; i++) {
            q3n_snapshot_free(w->snaps[i].snap);
            w->snaps[i].snap = NULL;
        }
        for (int i = 0; i < COUNT(w->slots) && pass == snapshots_first; i++) {
            q3n_session_destroy(w->slots[i].s);
            w->slots[i].s = NULL;
        }
    }
    reference_close(&w->ref);
    q3n_cache_destroy(w->cache);
    if (w->directory[0]) remove_directory(w->directory);
    for (int i = 0; i < COUNT(w->batch); i++) q3n_engine_destroy(w->batch[i]);
    q3n_model_close(w->m);
    if (w->heap.live != 0 || w->heap.live_bytes != 0)
        world_fail(w, "%d blocks, %zu bytes left", w->heap.live, w->heap.live_bytes);
    for (int i = 0; i < COUNT(w->blobs); i++) free(w->blobs[i].file.bytes);
    free(w->logits);
    free(w->log);
}

/* Every session and every snapshot goes on as if nothing had been. */
static void world_finish(world *w)
{
    for (int i = 0; i < COUNT(w->slots); i++) if (w->slots[i].s) probe(w, &w->slots[i]);
    for (int i = 0; i < COUNT(w->snaps); i++) {
        const kept *k = &w->snaps[i];
        for (int j = 0; j < COUNT(w->slots) && k->snap; j++) {
            slot *s = &w->slots[j];
            if (!s->s || s->capacity < k->t.n) continue;
            note(w, "\nrestore %d from %d", j, i);
            if (q3n_session_restore(s->s, k->snap) != Q3N_OK)
                world_fail(w, "restore: %s", q3n_session_error(s->s)->message);
            s->t = k->t;
            probe(w, s);
            break;
        }
    }
}

typedef struct {
    void (*run)(world *w);
    int   weight;
} operation;

static const operation operations[] = {
    { op_eval, 14 }, { op_outputs, 2 }, { op_prefill, 10 }, { op_reuse, 4 }, { op_rewind, 9 },
    { op_reset, 1 }, { op_checkpoint, 4 }, { op_probe, 4 }, { op_snapshot, 7 }, { op_restore, 8 },
    { op_free_snapshot, 3 }, { op_fork, 7 }, { op_create, 2 }, { op_destroy, 2 }, { op_save, 3 },
    { op_load, 4 }, { op_batch, 8 }, { op_next, 8 }, { op_draft, 4 },
};

static void run_schedule(unsigned long seed, int n_ops)
{
    world *w = (world *)calloc(1, sizeof *w);
    assert_non_null(w);
    world_open(w, seed);
    int total = 0;
    for (int i = 0; i < COUNT(operations); i++) total += operations[i].weight;
    for (int i = 0; i < 2; i++) {
        note(w, "\n");
        op_create(w);
    }
    for (; w->n_ops < n_ops; w->n_ops++) {
        const uint64_t behind = random_next(&w->rng);   /* however many numbers this one draws */
        int pick = below(w, total), i = 0;
        for (; pick >= operations[i].weight; i++) pick -= operations[i].weight;
        note(w, "\n%3d ", w->n_ops);
        operations[i].run(w);
        if (chance(w, 20)) verify(w, any_session(w));
        if (w->cache && chance(w, 2)) q3n_cache_clear(w->cache);
        w->rng = behind;
    }
    world_finish(w);
    world_close(w);
    free(w);
}

static long environment(const char *name, long otherwise)
{
    const char *value = getenv(name);
    return value && *value ? strtol(value, NULL, 10) : otherwise;
}

static void test_schedules(void **state)
{
    (void)state;
    const unsigned long seed = (unsigned long)environment("Q3N_SEED", 1);
    const long n = environment("Q3N_SCHEDULES", THREADS_ALONE ? 6 : SLOW ? 16 : 48);
    for (long i = 0; i < n; i++) {
        run_schedule(seed + (unsigned long)i, 60);
        if (i % 100 == 99) print_message("%ld schedules\n", i + 1);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_schedules),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
