/* test_session.c - snapshots, forks, the cache and batches keep their promises: what is refused and
 * what is reused, memory plans, cancelling within a layer, limits, several threads on shared pages,
 * a file written by one process and read by another. */
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE 1     /* nanosleep, fork */
#endif
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "qwen3next.h"
#include "failing.h"
#include "sample.h"
#include "sessions.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

static q3n_cache_stats stats_of(q3n_cache *c)
{
    q3n_cache_stats stats = Q3N_INIT(q3n_cache_stats);
    q3n_cache_stats_get(c, &stats);
    return stats;
}

/* ---- Cancelling ---- */
typedef struct {
    q3n_session *s;
    q3n_engine   *b;              /* cancel this, if it is not NULL                               */
    int          at, calls;      /* in call number `at` of the hook, from 0                      */
    int          after;          /* layers since, of n_layers                                    */
    int          n_layers;
    int          on_thread;
    int          stopped;        /* requests that said they stop a call                          */
} canceller;

static void *cancel_now(void *memory)
{
    canceller *c = (canceller *)memory;
    for (int i = 0; i < 2; i++)                  /* the second finds nothing left to stop */
        c->stopped += c->b ? q3n_engine_cancel(c->b) : q3n_session_cancel(c->s);
    return NULL;
}

static void cancel_in_hook(void *user, int l, const float *x, int n, int d)
{
    canceller *c = (canceller *)user;
    (void)x;
    (void)n;
    (void)d;
    if (c->calls > c->at && c->at >= 0) c->after += l >= 0 && l < c->n_layers;
    if (c->calls++ != c->at) return;
    pthread_t thread;
    if (c->on_thread && pthread_create(&thread, NULL, cancel_now, c) == 0)
        pthread_join(thread, NULL);
    else
        cancel_now(c);
}

/* What is cancelled: an operation on a session that holds 40 tokens of ids. */
typedef struct {
    const char *name;
    q3n_result (*run)(q3n_session *s, q3n_engine *b, const int32_t *ids);
} cancellable;

static q3n_result run_eval(q3n_session *s, q3n_engine *b, const int32_t *ids)
{
    (void)b;
    return q3n_session_eval(s, ids + 40, 20, NULL);
}

static q3n_result run_prefill(q3n_session *s, q3n_engine *b, const int32_t *ids)
{
    (void)b;
    return q3n_session_prefill(s, ids + 7, 30, NULL, NULL);
}

static q3n_result run_prefill_more(q3n_session *s, q3n_engine *b, const int32_t *ids)
{
    (void)b;
    return q3n_session_prefill(s, ids, 60, NULL, NULL);
}

static q3n_result run_rewind(q3n_session *s, q3n_engine *b, const int32_t *ids)
{
    (void)b;
    (void)ids;
    return q3n_session_rewind(s, 25);
}

static q3n_result run_decode(q3n_session *s, q3n_engine *b, const int32_t *ids)
{
    int32_t tokens[8];
    int n;
    (void)b;
    set_sampler(s, (q3n_sampler_options){ 0 });
    return q3n_session_decode(s, ids[40], tokens, 8, &n);
}

static q3n_result run_batch(q3n_session *s, q3n_engine *b, const int32_t *ids)
{
    q3n_engine_item item = { .size = sizeof item, .session = s, .tokens = ids + 40, .n = 20 };
    const q3n_result r = q3n_engine_eval(b, &item, 1, NULL);
    assert_int_equal(item.done, r == Q3N_OK ? 20 : 0);
    return r;
}

static q3n_result run_score(q3n_session *s, q3n_engine *b, const int32_t *ids)
{
    double log_probs[20];
    (void)b;
    return q3n_session_score(s, ids + 40, 20, log_probs);
}

static q3n_result run_embed(q3n_session *s, q3n_engine *b, const int32_t *ids)
{
    float vector[256];
    (void)b;
    assert_true(q3n_model_hidden_size(q3n_session_model(s)) <= COUNT(vector));
    return q3n_session_embed(s, ids + 7, 30, NULL, vector);
}

static const cancellable cancellables[] = {
    { "eval", run_eval }, { "prefill of another text", run_prefill },
    { "prefill of more", run_prefill_more }, { "rewind", run_rewind }, { "decode", run_decode },
    { "batch_eval", run_batch }, { "score", run_score }, { "embed", run_embed },
};

typedef struct {
    const q3n_model *m;
    const int32_t   *ids;
    const float     *want;       /* [60, vocab]                                                  */
    q3n_speculate    speculate;
} cancel_case;

/* Cancel in call number `at` of the hook.  Returns how often the hook was called; at -1 = never. */
static int cancel_once(const cancel_case *k, const cancellable *what, int at)
{
    const q3n_config *cfg = q3n_model_config(k->m);
    const size_t V = (size_t)cfg->vocab_size;
    const int in_batch = what->run == run_batch;
    canceller c = { .at = -1, .on_thread = at % 7 == 3, .n_layers = cfg->num_hidden_layers };
    q3n_session_options o = plain_options(80);
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    float *logits = new_floats(V);
    eo.batch_size = 8;
    o.speculate = k->speculate;
    o.draft = 3;
    eo.n_threads = 1 + (at & 1);
    eo.layer_hook = (q3n_layer_hook){ cancel_in_hook, &c };
    c.b = create_engine(k->m, o.engine_options);
    q3n_engine *b = c.b;
    set_engine(&o, in_batch ? b : NULL, &eo);
    c.s = create_session(k->m, &o);
    must(c.s, q3n_session_eval(c.s, k->ids, 40, NULL), Q3N_OK);
    if (!in_batch) c.b = NULL;
    c.at = at;
    c.calls = c.after = c.stopped = 0;
    const q3n_result r = what->run(c.s, b, k->ids);
    const int calls = c.calls;
    c.at = -1;
    assert_int_equal(c.stopped, at >= 0);
    if (at >= 0 && r != Q3N_ERR_CANCELLED)
        fail_msg("%s, cancelled in call %d of %d: %s", what->name, at, calls, q3n_result_string(r));
    if (at >= 0 && r == Q3N_ERR_CANCELLED && c.after > 1)
        fail_msg("%s, cancelled in call %d: %d layers more", what->name, at, c.after);
    if (at < 0) assert_int_equal(r, Q3N_OK);
    assert_int_equal(q3n_session_cancel(c.s) + q3n_engine_cancel(b), 0);
    if (r == Q3N_ERR_CANCELLED) {
        must(c.s, q3n_session_logits(c.s, logits), Q3N_OK);
        check_same(logits, k->want + 39 * V, V, what->name);
        must(c.s, q3n_session_eval(c.s, k->ids + 40, 20, logits), Q3N_OK);
        check_same(logits, k->want + 59 * V, V, what->name);
        must(c.s, q3n_session_rewind(c.s, 40), Q3N_OK);
        assert_int_equal(what->run(c.s, b, k->ids), Q3N_OK);
    }
    q3n_session_destroy(c.s);
    q3n_engine_destroy(b);
    free(logits);
    return calls;
}

static void test_cancel(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const q3n_config *cfg = q3n_model_config(m);
    int32_t ids[60];
    uint64_t rng = 17;
    random_tokens(&rng, ids, 60, cfg->vocab_size);
    float *want = new_floats(60 * (size_t)cfg->vocab_size);
    const q3n_session_options o = plain_options(80);
    q3n_session *s = create_session(m, &o);
    must(s, q3n_session_eval_outputs(s, ids, 60, &(q3n_outputs){ .size = sizeof(q3n_outputs),
                                                                 .all_logits = want }), Q3N_OK);
    q3n_session_destroy(s);
    for (int i = 0; i < COUNT(cancellables); i++) {
        const cancel_case k = { m, ids, want, i == 4 ? Q3N_SPECULATE_AUTO : Q3N_SPECULATE_OFF };
        const int calls = cancel_once(&k, &cancellables[i], -1);
        assert_true(calls >= cfg->num_hidden_layers);
        for (int at = 0; at < calls; at += SLOW ? 3 : 1) cancel_once(&k, &cancellables[i], at);
    }
    free(want);
    q3n_model_close(m);
}

/* A request between two calls stops neither: not the one before, not the next. */
static void test_cancel_between(void **state)
{
    (void)state;
    q3n_model *m = open_model("qwen3_next", NULL);
    const int32_t ids[4] = { 1, 2, 3, 4 };
    const q3n_session_options o = plain_options(30);
    q3n_session *s = create_session(m, &o);
    assert_int_equal(q3n_session_cancel(s), 0);
    must(s, q3n_session_eval(s, ids, 4, NULL), Q3N_OK);
    assert_int_equal(q3n_session_cancel(s), 0);
    must(s, q3n_session_eval(s, ids, 0, NULL), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_cancel(s), 0);
    must(s, q3n_session_eval(s, ids, 4, NULL), Q3N_OK);
    assert_int_equal(q3n_session_length(s), 8);
    q3n_session_destroy(s);
    q3n_model_close(m);
}

/* A request is one session's alone, also where several share a batch; one for a session that takes
 * no part in a batch's call does nothing, now or later. */
static void test_cancel_one(void **state)
{
    (void)state;
    q3n_model *m = open_model("qwen3_next", NULL);
    const int32_t ids[4] = { 1, 2, 3, 4 };
    canceller c = { .at = -1, .n_layers = q3n_model_config(m)->num_hidden_layers };
    q3n_session_options o = plain_options(40);
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    eo.layer_hook = (q3n_layer_hook){ cancel_in_hook, &c };
    q3n_engine *b = NULL;
    b = create_engine(m, o.engine_options);
    set_engine(&o, b, NULL);
    q3n_session *s[3];
    q3n_engine_item items[3];
    for (int i = 0; i < 3; i++) {
        s[i] = create_session(m, &o);
        items[i] = (q3n_engine_item){ .size = sizeof items[i],
                                       .session = s[i], .tokens = ids, .n = 4 };
    }
    items[2].done = 4;                           /* of the call, but nothing is left of it */
    /* which of them is cancelled, in a batch of all three; 3: the batch itself */
    for (int which = 0; which < 4; which++) {
        const int takes_part = which != 2;
        for (int i = 0; i < 2; i++) items[i].done = 0;
        c = (canceller){ .s = s[which % 3], .b = which == 3 ? b : NULL, .at = 3,
                         .n_layers = c.n_layers };
        const int length = q3n_session_length(s[0]);
        assert_int_equal(q3n_engine_eval(b, items, 3, NULL),
                         takes_part ? Q3N_ERR_CANCELLED : Q3N_OK);
        assert_int_equal(c.stopped, takes_part);
        c.at = -1;
        assert_int_equal(q3n_session_length(s[0]), length + (takes_part ? 0 : 4));
        assert_int_equal(q3n_session_length(s[1]), q3n_session_length(s[0]));
        assert_int_equal(items[0].done, takes_part ? 0 : 4);
        for (int i = 0; i < 3; i++) {
            must(s[i], q3n_session_eval(s[i], ids, 1, NULL), Q3N_OK);
            must(s[i], q3n_session_rewind(s[i], q3n_session_length(s[i]) - 1), Q3N_OK);
        }
    }
    /* evaluation of one session: another's request is void, the batch's is not */
    c = (canceller){ .s = s[1], .at = 2, .n_layers = c.n_layers };
    must(s[0], q3n_session_eval(s[0], ids, 4, NULL), Q3N_OK);
    assert_int_equal(c.stopped, 0);
    must(s[1], q3n_session_eval(s[1], ids, 4, NULL), Q3N_OK);
    c = (canceller){ .b = b, .at = 2, .n_layers = c.n_layers };
    must(s[0], q3n_session_eval(s[0], ids, 4, NULL), Q3N_ERR_CANCELLED);
    assert_int_equal(c.stopped, 1);
    must(s[0], q3n_session_eval(s[0], ids, 4, NULL), Q3N_OK);
    for (int i = 0; i < 3; i++) q3n_session_destroy(s[i]);
    q3n_engine_destroy(b);
    q3n_model_close(m);
}

/* ---- Cancelling from a signal handler, which runs wherever the signal comes ---- */
static q3n_session *volatile signalled;
static volatile sig_atomic_t n_signals_that_stop;

static void on_signal(int number)
{
    (void)number;
    if (q3n_session_cancel(signalled)) n_signals_that_stop = n_signals_that_stop + 1;
}

/* An executor that runs everything in the calling thread, and raises the signal in piece `at`. */
typedef struct { int pieces, at; } raiser;

static void run_and_raise(void *user, int n, void (*task)(void *arg, int i), void *arg)
{
    raiser *k = (raiser *)user;
    for (int i = 0; i < n; i++) {
        if (k->pieces++ == k->at) raise(SIGUSR1);
        task(arg, i);
    }
}

static q3n_result run_draft(q3n_session *s, q3n_engine *b, const int32_t *ids)
{
    int32_t drafts[3];
    (void)b;
    return q3n_session_draft(s, ids[40], drafts, 3, NULL);
}

/* Nothing to evaluate: the MTP module alone works, over what it has not read. */
static q3n_result run_prefill_same(q3n_session *s, q3n_engine *b, const int32_t *ids)
{
    (void)b;
    float *logits = new_floats((size_t)q3n_model_config(q3n_session_model(s))->vocab_size);
    const q3n_result r = q3n_session_prefill(s, ids, 40, logits, NULL);
    free(logits);
    return r;
}

/* One operation on a session of 40 tokens, with the signal in every piece of its work. */
static void signal_everywhere(const cancel_case *k, const cancellable *what)
{
    const size_t V = (size_t)q3n_model_config(k->m)->vocab_size;
    const int in_batch = what->run == run_batch;
    raiser x = { .at = -1 };
    q3n_session_options o = plain_options(80);
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    eo.batch_size = 8;
    o.speculate = k->speculate;
    o.draft = 3;
    eo.executor = (q3n_executor){ run_and_raise, &x, 2 };
    q3n_engine *b = NULL;
    b = create_engine(k->m, o.engine_options);
    set_engine(&o, in_batch ? b : NULL, &eo);
    q3n_session *s = create_session(k->m, &o);
    signalled = s;
    float *got = new_floats(V);
    for (int at = 0, pieces = INT_MAX; at <= pieces; at += SLOW ? 29 : 1) {
        q3n_session_reset(s);
        must(s, q3n_session_eval(s, k->ids, 32, NULL), Q3N_OK);
        for (int i = 32; i < 40; i++) must(s, q3n_session_eval(s, k->ids + i, 1, NULL), Q3N_OK);
        x = (raiser){ .at = pieces == INT_MAX ? -1 : at };      /* the first time to count */
        n_signals_that_stop = 0;
        const q3n_result r = what->run(s, b, k->ids);
        if (pieces == INT_MAX) pieces = x.pieces - 1, at = -1;
        assert_true(pieces >= 0);
        const int stopped = n_signals_that_stop;
        x.at = -1;
        raise(SIGUSR1);                  /* too late for this call, too early for the next */
        assert_int_equal(n_signals_that_stop, stopped);
        if (r != (stopped ? Q3N_ERR_CANCELLED : Q3N_OK) || (at >= 0 && at < pieces / 2 && !stopped))
            fail_msg("%s, signal in piece %d of %d: %s, %d stopped", what->name, at, pieces,
                     q3n_result_string(r), stopped);
        if (!stopped) continue;
        assert_int_equal(q3n_session_length(s), 40);
        must(s, q3n_session_logits(s, got), Q3N_OK);
        check_same(got, k->want + 39 * V, V, what->name);
        must(s, q3n_session_eval(s, k->ids + 40, 20, got), Q3N_OK);
        check_same(got, k->want + 59 * V, V, what->name);
    }
    signalled = NULL;
    q3n_session_destroy(s);
    q3n_engine_destroy(b);
    free(got);
}

static void test_cancel_from_signal(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    const cancellable draft = { "draft", run_draft };
    const cancellable same = { "prefill of its text", run_prefill_same };
    struct sigaction action = { .sa_handler = on_signal }, before;
    assert_int_equal(sigaction(SIGUSR1, &action, &before), 0);
    int32_t ids[60];
    uint64_t rng = 73;
    random_tokens(&rng, ids, COUNT(ids), (int)V);
    float *want = new_floats(60 * V);
    const q3n_session_options o = plain_options(80);
    q3n_session *s = create_session(m, &o);
    must(s, q3n_session_eval_outputs(s, ids, 60, &(q3n_outputs){ .size = sizeof(q3n_outputs),
                                                                 .all_logits = want }), Q3N_OK);
    q3n_session_destroy(s);
    const cancel_case k = { m, ids, want, Q3N_SPECULATE_AUTO };
    for (int i = 0; i < COUNT(cancellables); i++) signal_everywhere(&k, &cancellables[i]);
    if (q3n_model_config(m)->num_mtp_layers > 0) {
        signal_everywhere(&k, &draft);
        signal_everywhere(&k, &same);
    }
    assert_int_equal(sigaction(SIGUSR1, &before, NULL), 0);
    free(want);
    q3n_model_close(m);
}

/* A batch that is stopped when one item was ready: its session still knows the logits of before. */
static void test_cancel_ready(void **state)
{
    (void)state;
    q3n_model *m = open_model("qwen3_next", NULL);
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    int32_t ids[30];
    uint64_t rng = 71;
    random_tokens(&rng, ids, COUNT(ids), (int)V);
    canceller c = { .at = -1, .n_layers = q3n_model_config(m)->num_hidden_layers };
    q3n_session_options o = plain_options(40);
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    eo.batch_size = 4;
    eo.layer_hook = (q3n_layer_hook){ cancel_in_hook, &c };
    c.b = create_engine(m, o.engine_options);
    set_engine(&o, c.b, NULL);
    float *want = new_floats(3 * V);
    q3n_session *s[2] = { create_session(m, &o), create_session(m, &o) };
    for (int i = 0; i < 2; i++) must(s[i], q3n_session_eval(s[i], ids, 5, want), Q3N_OK);
    q3n_engine_item items[2] = {
        { .size = sizeof items[0], .session = s[0], .tokens = ids + 5, .n = 1,
          .logits = want + V },
        { .size = sizeof items[0], .session = s[1], .tokens = ids + 5, .n = 20,
          .logits = want + 2 * V } };
    c.calls = 0;
    c.at = c.n_layers + 4;                       /* in the second pass */
    assert_int_equal(q3n_engine_eval(c.b, items, 2, NULL), Q3N_ERR_CANCELLED);
    assert_int_equal(q3n_session_length(s[0]), 5);
    must(s[0], q3n_session_logits(s[0], want + V), Q3N_OK);
    check_same(want + V, want, V, "logits of before");
    q3n_session_destroy(s[0]);
    q3n_session_destroy(s[1]);
    q3n_engine_destroy(c.b);
    free(want);
    q3n_model_close(m);
}

/* ---- Several threads on shared pages ---- */
#define N_WORKERS 4
#define N_LINES   3
#define LINE      300            /* tokens of a line; all lines begin with the same SHARED       */
#define SHARED    260

/* What the workers have in common. */
typedef struct {
    int32_t      ids[N_LINES][LINE];
    float       *want;           /* [N_LINES, LINE, vocab]                                       */
    int          vocab, rounds;
    pthread_mutex_t lock;
    q3n_snapshot *snap[4];       /* one made by any, restored and freed by any                   */
    int          snap_line[4];
    q3n_session *session[N_WORKERS];
    int64_t      n_ops[N_WORKERS];   /* begun by each worker                                     */
    int64_t      n_done, n_cancelled;
    int64_t      n_stopped;      /* requests that said they stop a call                          */
} commons;

typedef struct {
    commons     *all;
    q3n_session *s;
    int          number;
    int          drafts;         /* 1 = with an MTP module; states come from workers without, too */
    uint64_t     rng;
    int          line, n;        /* the session holds the first n tokens of the line             */
    float       *logits;
    char         why[300];       /* "" = nothing wrong                                           */
} worker;

static void worker_check(worker *k, q3n_session *s, int n, const char *what)
{
    const size_t V = (size_t)k->all->vocab;
    if (k->why[0] || n == 0) return;
    const q3n_result r = q3n_session_logits(s, k->logits);
    const float *want = k->all->want + ((size_t)k->line * LINE + (size_t)n - 1) * V;
    if (q3n_session_length(s) != n || r != Q3N_OK || memcmp(k->logits, want, V * sizeof *want) != 0)
        snprintf(k->why, sizeof k->why, "%s: line %d, %d tokens, expected %d: %s", what, k->line,
                 q3n_session_length(s), n, r == Q3N_OK ? "other logits" : q3n_result_string(r));
}

/* 1 = again: somebody cancelled, and nothing has changed. */
static int worker_cancelled(worker *k, q3n_result r, const char *what)
{
    if (r == Q3N_ERR_CANCELLED) {
        __atomic_fetch_add(&k->all->n_cancelled, 1, __ATOMIC_SEQ_CST);
        worker_check(k, k->s, k->n, "cancelled");
        return !k->why[0];
    }
    if (r != Q3N_OK && !k->why[0])
        snprintf(k->why, sizeof k->why, "%s: %.250s", what, q3n_session_error(k->s)->message);
    return 0;
}

static void worker_eval(worker *k)
{
    const int32_t *ids = k->all->ids[k->line];
    int n = 1 + random_below(&k->rng, 9);
    if (n > LINE - k->n) n = LINE - k->n;
    if (n == 0) return;
    while (worker_cancelled(k, q3n_session_eval(k->s, ids + k->n, n, NULL), "eval")) { }
    k->n += n;
    worker_check(k, k->s, k->n, "eval");
}

static void worker_rewind(worker *k)
{
    int n = k->n - random_below(&k->rng, 40);
    if (n < 0) n = 0;
    while (worker_cancelled(k, q3n_session_rewind(k->s, n), "rewind")) { }
    k->n = n;
    worker_check(k, k->s, k->n, "rewind");
}

static void worker_prefill(worker *k)
{
    const int line = random_below(&k->rng, N_LINES), n = LINE - random_below(&k->rng, 60);
    const int32_t *ids = k->all->ids[line];
    while (worker_cancelled(k, q3n_session_prefill(k->s, ids, n, NULL, NULL), "prefill")) { }
    k->line = line;
    k->n = n;
    worker_check(k, k->s, k->n, "prefill");
}

static void worker_snapshot(worker *k)
{
    commons *all = k->all;
    q3n_snapshot *snap = NULL, *old;
    const int i = random_below(&k->rng, COUNT(all->snap));
    if (worker_cancelled(k, q3n_session_snapshot(k->s, &snap), "snapshot")) return;
    pthread_mutex_lock(&all->lock);
    old = all->snap[i];
    all->snap[i] = snap;
    all->snap_line[i] = k->line;
    pthread_mutex_unlock(&all->lock);
    q3n_snapshot_free(old);
}

static void worker_restore(worker *k)
{
    commons *all = k->all;
    const int i = random_below(&k->rng, COUNT(all->snap));
    pthread_mutex_lock(&all->lock);
    q3n_snapshot *snap = all->snap[i];
    const int line = all->snap_line[i];
    all->snap[i] = NULL;
    pthread_mutex_unlock(&all->lock);
    if (!snap) return;
    while (worker_cancelled(k, q3n_session_restore(k->s, snap), "restore")) { }
    k->line = line;
    k->n = q3n_snapshot_length(snap);
    q3n_snapshot_free(snap);
    worker_check(k, k->s, k->n, "restore");
}

/* A fork goes on, and the session it was made of does, too: both append to the same page. */
static void worker_fork(worker *k)
{
    q3n_session *fork = NULL;
    q3n_error err;
    if (k->n + 1 >= LINE) return;
    q3n_result r = q3n_session_fork(&fork, k->s, NULL, &err);
    if (r != Q3N_OK) {
        snprintf(k->why, sizeof k->why, "fork: %.200s", err.message);
        return;
    }
    const int32_t *ids = k->all->ids[k->line];
    while (worker_cancelled(k, q3n_session_eval(k->s, ids + k->n, 1, NULL), "eval")) { }
    k->n++;
    r = q3n_session_eval(fork, ids + k->n - 1, 2, NULL);
    if (r == Q3N_OK) worker_check(k, fork, k->n + 1, "fork");
    else             worker_cancelled(k, Q3N_ERR_ARG, "eval in a fork");
    worker_check(k, k->s, k->n, "beside a fork");
    q3n_session_destroy(fork);
}

/* Tokens that leave the line, with drafts, and back to the line. */
static void worker_next(worker *k)
{
    int32_t tokens[4], drafts[3];
    int n = 0;
    if (k->n == 0 || k->n + 4 > LINE) return;
    const int32_t token = k->all->ids[k->line][k->n];
    if (k->drafts)
        worker_cancelled(k, q3n_session_draft(k->s, token, drafts, 3, NULL), "draft");
    while (worker_cancelled(k, q3n_session_decode(k->s, token, tokens, 4, &n), "decode")) { }
    k->n++;
    while (!k->why[0]) {
        const q3n_result r = q3n_session_rewind(k->s, k->n);
        if (r == Q3N_OK) break;
        if (r != Q3N_ERR_CANCELLED) worker_cancelled(k, r, "rewind from drafts");
        else __atomic_fetch_add(&k->all->n_cancelled, 1, __ATOMIC_SEQ_CST);
    }
    worker_check(k, k->s, k->n, "back from drafts");
}

static void *worker_main(void *memory)
{
    worker *k = (worker *)memory;
    for (int i = 0; i < k->all->rounds && !k->why[0]; i++) {
        __atomic_fetch_add(&k->all->n_ops[k->number], 1, __ATOMIC_SEQ_CST);
        switch (random_below(&k->rng, 9)) {
        case 0:  worker_rewind(k);   break;
        case 1:  worker_prefill(k);     break;
        case 2:  worker_snapshot(k); break;
        case 3:  worker_restore(k);  break;
        case 4:  worker_fork(k);     break;
        case 5:  worker_next(k);     break;
        default: worker_eval(k);     break;
        }
    }
    __atomic_fetch_add(&k->all->n_done, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

/* Cancels what is under way until all workers are done; the same operation only once, or a slow one
 * would never end. */
static void *cancel_main(void *memory)
{
    commons *all = (commons *)memory;
    const struct timespec pause = { 0, 300000 };
    int64_t last[N_WORKERS] = { 0 };
    for (uint64_t rng = 1; __atomic_load_n(&all->n_done, __ATOMIC_SEQ_CST) < N_WORKERS; ) {
        const int i = random_below(&rng, N_WORKERS);
        const int64_t n = __atomic_load_n(&all->n_ops[i], __ATOMIC_SEQ_CST);
        if (n != last[i]) all->n_stopped += q3n_session_cancel(all->session[i]);
        last[i] = n;
        nanosleep(&pause, NULL);
    }
    return NULL;
}

static void commons_open(commons *all, const q3n_model *m, const q3n_session_options *o)
{
    uint64_t rng = 23;
    all->vocab = q3n_model_config(m)->vocab_size;
    const size_t row = (size_t)LINE * (size_t)all->vocab;
    all->want = new_floats(N_LINES * row);
    q3n_session *s = create_session(m, o);
    for (int i = 0; i < N_LINES; i++) {
        random_tokens(&rng, all->ids[i], LINE, all->vocab);
        memcpy(all->ids[i], all->ids[0], SHARED * sizeof(int32_t));
        q3n_session_reset(s);
        const q3n_outputs out = { .size = sizeof out, .all_logits = all->want + (size_t)i * row };
        must(s, q3n_session_eval_outputs(s, all->ids[i], LINE, &out), Q3N_OK);
    }
    q3n_session_destroy(s);
    assert_int_equal(pthread_mutex_init(&all->lock, NULL), 0);
}

static void test_threads(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    commons *all = (commons *)calloc(1, sizeof *all);
    worker *k = (worker *)calloc(N_WORKERS, sizeof *k);
    assert_true(all && k);
    q3n_session_options o = plain_options(LINE);
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    commons_open(all, m, &o);
    all->rounds = SLOW ? 25 : 120;
    char directory[64];                          /* where the cache keeps what it has no room for */
    snprintf(directory, sizeof directory, "build/test_session_%d", (int)getpid());
    assert_int_equal(mkdir(directory, 0777), 0);
    const q3n_cache_options co = { .size = sizeof co,
                                   .max_bytes = (size_t)1 << 19, .directory = directory };
    q3n_cache *cache = NULL;
    assert_int_equal(q3n_cache_create(&cache, m, &co, NULL), Q3N_OK);
    o.cache = cache;
    o.snapshot_every = 64;
    o.speculate = Q3N_SPECULATE_AUTO;
    pthread_t thread[N_WORKERS], cancelling;
    q3n_session *parent = create_session(m, &o);
    must(parent, q3n_session_eval(parent, all->ids[0], SHARED, NULL), Q3N_OK);
    for (int i = 0; i < N_WORKERS; i++) {
        eo.n_threads = 1 + (i == 0);
        o.speculate = i % 2 ? Q3N_SPECULATE_LOOKUP : Q3N_SPECULATE_AUTO;
        k[i].drafts = i % 2 == 0 && q3n_model_config(m)->num_mtp_layers > 0;
        assert_int_equal(q3n_session_fork(&k[i].s, parent, &o, NULL), Q3N_OK);
        set_sampler(k[i].s, (q3n_sampler_options){ 0 });
        all->session[i] = k[i].s;
        k[i].all = all;
        k[i].number = i;
        k[i].rng = (uint64_t)i;
        k[i].line = i % N_LINES;
        k[i].n = SHARED;
        k[i].logits = new_floats((size_t)all->vocab);
    }
    for (int i = 0; i < N_WORKERS; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, worker_main, &k[i]), 0);
    assert_int_equal(pthread_create(&cancelling, NULL, cancel_main, all), 0);
    for (int i = 0; i < N_WORKERS; i++) pthread_join(thread[i], NULL);
    pthread_join(cancelling, NULL);
    for (int i = 0; i < N_WORKERS; i++) {
        if (k[i].why[0]) fail_msg("worker %d: %s", i, k[i].why);
        q3n_session_destroy(k[i].s);
        free(k[i].logits);
    }
    assert_int_equal(all->n_cancelled, all->n_stopped);
    q3n_session_destroy(parent);
    for (int i = 0; i < COUNT(all->snap); i++) q3n_snapshot_free(all->snap[i]);
    assert_true(stats_of(cache).n_evicted > 0);
    q3n_cache_destroy(cache);
    remove_directory(directory);
    pthread_mutex_destroy(&all->lock);
    free(all->want);
    free(all);
    free(k);
    q3n_model_close(m);
}

/* ---- Saved by one process, loaded by another ---- */
static const char *program;      /* this one, for another process                                */

#define OTHER_PROCESS "--continue"

/* argv: program, OTHER_PROCESS, model, KV type, session file, result file.  Loads the session,
 * evaluates one token more, and writes the logits. */
static int continue_session(char **argv)
{
    q3n_model *m = NULL;
    q3n_session *s = NULL;
    q3n_session_options o = plain_options(400);
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    const int32_t token = 7;
    int ok = 0;
    eo.n_threads = 2;
    o.speculate = Q3N_SPECULATE_AUTO;
    if (q3n_type_from_name(argv[3], &o.kv_type) != Q3N_OK
        || q3n_model_open(&m, argv[2], NULL, NULL) != Q3N_OK
        || q3n_session_create(&s, m, &o, NULL) != Q3N_OK) return 2;
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    float *logits = (float *)malloc(2 * V * sizeof *logits);
    if (logits && q3n_session_load(s, argv[4]) == Q3N_OK
        && q3n_session_logits(s, logits) == Q3N_OK
        && q3n_session_eval(s, &token, 1, logits + V) == Q3N_OK) {
        FILE *f = fopen(argv[5], "wb");
        ok = f && fwrite(logits, sizeof *logits, 2 * V, f) == 2 * V;
        if (f) ok = fclose(f) == 0 && ok;
    }
    if (!ok) fprintf(stderr, "%s\n", q3n_session_error(s)->message);
    free(logits);
    q3n_session_destroy(s);
    q3n_model_close(m);
    return ok ? 0 : 3;
}

/* The exit status of this program run with the arguments; 126 if it cannot be run. */
static int run_program(char **argv)
{
#if defined(_WIN32)
    return (int)_spawnv(_P_WAIT, argv[0], (const char *const *)argv);
#else
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        execv(argv[0], argv);
        _exit(126);
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 127;
#endif
}

static void test_other_process(void **state)
{
    const char *name = (const char *)*state;
    char model[512], file[64], result[64];
    snprintf(model, sizeof model, "%s/%s.q3n", Q3N_TEST_MODELS, name);
    snprintf(file, sizeof file, "build/test_session_%d.q3s", (int)getpid());
    snprintf(result, sizeof result, "build/test_session_%d.out", (int)getpid());
    q3n_model *m = open_model(name, NULL);
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    float *want = new_floats(2 * V);
    int32_t ids[300];
    const int32_t token = 7;
    uint64_t rng = 29;
    random_tokens(&rng, ids, COUNT(ids), (int)V);
    for (int type = 0; type <= Q3N_TYPE_Q8; type++) {
        q3n_session_options o = plain_options(COUNT(ids) + 1);
        o.kv_type = (q3n_type)type;
        o.speculate = Q3N_SPECULATE_AUTO;
        q3n_session *s = create_session(m, &o);
        must(s, q3n_session_eval(s, ids, COUNT(ids), want), Q3N_OK);
        must(s, q3n_session_save(s, file), Q3N_OK);
        must(s, q3n_session_eval(s, &token, 1, want + V), Q3N_OK);
        q3n_session_destroy(s);
        char mode[] = OTHER_PROCESS, type_name[8], self[512];
        snprintf(self, sizeof self, "%s", program);
        snprintf(type_name, sizeof type_name, "%s", q3n_type_name(o.kv_type));
        char *argv[] = { self, mode, model, type_name, file, result, NULL };
        const int status = run_program(argv);
        if (status == 126) break;                /* under an emulator: not to be run like this */
        assert_int_equal(status, 0);
        char *got = golden_read(result);
        check_same((const float *)(const void *)got, want, 2 * V, type_name);
        free(got);
        remove(result);
    }
    remove(file);
    free(want);
    q3n_model_close(m);
}

/* ---- Memory: what is planned is what is taken ---- */
typedef struct {
    const char  *model;
    q3n_speculate speculate;
    int          shared, capacity;
} memory_case;

/* What a session does between the first token and the last; the heap keeps to the plan after every
 * call. */
typedef struct {
    const heap *h;
    size_t      bound;           /* of live bytes                                                */
} memory_bound;

static void within(q3n_session *s, q3n_result r, const memory_bound *k)
{
    must(s, r, Q3N_OK);
    assert_in_range(k->h->live_bytes, 0, k->bound);
}

static void wander(q3n_session *s, const int32_t *ids, int n, const memory_bound *k)
{
    int32_t tokens[8];
    int got = 0;
    within(s, q3n_session_rewind(s, n / 2), k);
    for (int i = 0; i < 5; i++)
        within(s, q3n_session_decode(s, ids[i], tokens, 8, &got), k);
    within(s, q3n_session_prefill(s, ids, n / 3, NULL, NULL), k);
    within(s, q3n_session_prefill(s, ids, n, NULL, NULL), k);
    within(s, q3n_session_prefill(s, ids + 1, n - 1, NULL, NULL), k);
    within(s, q3n_session_prefill(s, ids, n, NULL, NULL), k);
    within(s, q3n_session_rewind(s, n - 1), k);
    within(s, q3n_session_decode(s, ids[n - 1], tokens, 1, &got), k);
    must(s, q3n_session_decode(s, ids[0], tokens, 1, &got), Q3N_ERR_FULL);
}

static void check_memory(const memory_case *k, q3n_type kv_type)
{
    heap h = { 0 };
    q3n_model *m = open_model(k->model, &h);
    int32_t ids[1100];
    uint64_t rng = 31;
    random_tokens(&rng, ids, COUNT(ids), q3n_model_config(m)->vocab_size);
    q3n_session_options o = plain_options(k->capacity);
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    q3n_engine *b = NULL;
    q3n_session_memory planned = Q3N_INIT(q3n_session_memory);
    o.kv_type = kv_type;
    eo.n_threads = 2;
    eo.batch_size = 50;
    o.speculate = k->speculate;
    if (k->shared) {                 /* its scratch grows with the longest text */
        const size_t before = h.live_bytes;
        b = create_engine(m, &eo);
        assert_int_equal(q3n_engine_bytes(m, &eo), h.live_bytes - before);
        set_engine(&o, b, NULL);
        q3n_session *longest = create_session(m, &o);
        must(longest, q3n_session_eval(longest, ids, k->capacity, NULL), Q3N_OK);
        q3n_session_destroy(longest);
    }
    const size_t live = h.live_bytes;
    const int blocks = h.live;
    const size_t bytes = q3n_session_bytes(m, &o, &planned);
    assert_int_equal(planned.total, bytes);
    assert_int_equal(planned.kv_cache + planned.delta_state + planned.conv_state + planned.scratch
                     + planned.other, planned.total);
    assert_int_equal(h.live_bytes, live);
    q3n_session *s = create_session(m, &o);
    assert_int_equal(h.live_bytes - live, planned.initial);
    h.most_bytes = h.live_bytes;
    for (int n = 0; n < k->capacity; ) {
        const int some = 100 < k->capacity - n ? 100 : k->capacity - n;
        must(s, q3n_session_eval(s, ids + n, some, NULL), Q3N_OK);
        n += some;
        const size_t held = h.live_bytes - live;     /* and what splits attention over pages */
        assert_in_range(held, planned.initial + (size_t)((n + 255) / 256) * planned.page,
                        planned.total);
    }
    assert_int_equal(h.live_bytes - live, planned.total);

    q3n_snapshot *snap = NULL;
    must(s, q3n_session_snapshot(s, &snap), Q3N_OK);
    assert_int_equal(q3n_snapshot_bytes(snap), planned.snapshot);
    assert_int_equal(h.live_bytes - live, planned.total + planned.snapshot);
    q3n_snapshot_free(snap);
    assert_int_equal(h.live_bytes - live, planned.total);
    set_sampler(s, (q3n_sampler_options){ 0 });
    const memory_bound bound = { &h, h.live_bytes };
    h.most_bytes = h.live_bytes;
    wander(s, ids, k->capacity, &bound);
    /* in a call: pages of both texts, and ids */
    assert_in_range(h.most_bytes - bound.bound, 0,
                    planned.kv_cache + 4 * (size_t)k->capacity + 128);
    q3n_session_destroy(s);
    assert_int_equal(h.live_bytes, live);
    assert_int_equal(h.live, blocks);
    q3n_engine_destroy(b);
    q3n_model_close(m);
    assert_int_equal(h.live, 0);
}

static void test_memory(void **state)
{
    (void)state;
    static const memory_case cases[] = {
        { "qwen3_next", Q3N_SPECULATE_OFF, 0, 600 }, { "qwen3_next", Q3N_SPECULATE_LOOKUP, 1, 300 },
        { "qwen3_moe", Q3N_SPECULATE_AUTO, 0, 256 }, { "qwen3_moe", Q3N_SPECULATE_OFF, 1, 257 },
        { "qwen3_next_mtp", Q3N_SPECULATE_MTP, 0, 400 },
        { "qwen3_next_mtp", Q3N_SPECULATE_AUTO, 1, 300 },
        { "qwen3_next_mtp", Q3N_SPECULATE_OFF, 0, 30 }, { "qwen3_moe", Q3N_SPECULATE_OFF, 0, 1100 },
    };
    for (int i = 0; i < COUNT(cases); i++)
        for (int type = 0; type <= Q3N_TYPE_Q8; type += SLOW ? 3 : 1)
            check_memory(&cases[i], (q3n_type)type);
}

/* ---- Batches ---- */
#define N_ITEMS 16

typedef struct {
    q3n_model     *m;
    q3n_engine     *b;
    int            vocab;
    q3n_session   *session[N_ITEMS];
    q3n_engine_item item[N_ITEMS];
    int32_t        ids[N_ITEMS][300];
    float         *logits, *want;    /* [N_ITEMS, vocab]                                         */
} crowd;

/* Sessions that hold `have` tokens each and are to get items[0].n = first and of the others 1. */
static void crowd_open(crowd *c, const char *name, int have, int first)
{
    uint64_t rng = 37;
    q3n_session_options o = plain_options(400);
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    memset(c, 0, sizeof *c);
    c->m = open_model(name, NULL);
    c->vocab = q3n_model_config(c->m)->vocab_size;
    const size_t V = (size_t)c->vocab;
    c->logits = new_floats(N_ITEMS * V);
    c->want = new_floats(N_ITEMS * V);
    q3n_session *alone = create_session(c->m, &o);
    eo.n_threads = 2;
    eo.batch_size = 128;
    c->b = create_engine(c->m, o.engine_options);
    set_engine(&o, c->b, NULL);
    for (int i = 0; i < N_ITEMS; i++) {
        const int n = i ? 1 : first;
        random_tokens(&rng, c->ids[i], 300, c->vocab);
        c->session[i] = create_session(c->m, &o);
        must(c->session[i], q3n_session_eval(c->session[i], c->ids[i], have, NULL), Q3N_OK);
        c->item[i] = (q3n_engine_item){ .size = sizeof c->item[i], .session = c->session[i],
                                         .tokens = c->ids[i] + have, .n = n,
                                         .logits = c->logits + (size_t)i * V };
        q3n_session_reset(alone);
        must(alone, q3n_session_eval(alone, c->ids[i], have + n, c->want + (size_t)i * V), Q3N_OK);
    }
    q3n_session_destroy(alone);
}

static void crowd_close(crowd *c)
{
    for (int i = 0; i < N_ITEMS; i++) q3n_session_destroy(c->session[i]);
    q3n_engine_destroy(c->b);
    q3n_model_close(c->m);
    free(c->logits);
    free(c->want);
}

static int crowd_done(const crowd *c)
{
    int n = 0;
    for (int i = 0; i < N_ITEMS; i++) n += c->item[i].done;
    return n;
}

static void crowd_check(const crowd *c)   /* all items are done */
{
    for (int i = 0; i < N_ITEMS; i++) {
        assert_int_equal(c->item[i].done, c->item[i].n);
        check_same(c->logits + (size_t)i * (size_t)c->vocab, c->want + (size_t)i * (size_t)c->vocab,
                   (size_t)c->vocab, "item");
    }
}

/* A prompt beside fifteen sessions that decode: these get their token at once, and the limit is
 * used up by the prompt. */
static void test_batch_tokens(void **state)
{
    crowd c;
    crowd_open(&c, (const char *)*state, 9, 200);
    const q3n_limit limit = { .size = sizeof limit, .max_tokens = 64 };
    for (int before = 0, left = 215; left > 0; ) {
        assert_int_equal(q3n_engine_eval(c.b, c.item, N_ITEMS, &limit), Q3N_OK);
        const int done = crowd_done(&c) - before;
        assert_int_equal(done, left < 64 ? left : 64);
        for (int i = 1; i < N_ITEMS; i++) assert_int_equal(c.item[i].done, 1);
        assert_int_equal(q3n_session_length(c.session[0]), 9 + c.item[0].done);
        before += done;
        left -= done;
    }
    crowd_check(&c);
    /* nothing is left to do: items that are done may name anything */
    for (int i = 0; i < N_ITEMS; i++) c.item[i].tokens = NULL;
    assert_int_equal(q3n_engine_eval(c.b, c.item, N_ITEMS, NULL), Q3N_OK);
    assert_int_equal(q3n_session_length(c.session[0]), 209);
    assert_int_equal(q3n_engine_eval(c.b, c.item, 0, NULL), Q3N_OK);
    crowd_close(&c);
}

/* Less room than items: all come to their turn. */
static void test_batch_few(void **state)
{
    for (int max = 1; max < 20; max += 3) {
        crowd c;
        crowd_open(&c, (const char *)*state, 3, 20);
        const q3n_limit limit = { .size = sizeof limit, .max_tokens = max };
        int before = 0;
        while (before < 35) {
            assert_int_equal(q3n_engine_eval(c.b, c.item, N_ITEMS, &limit), Q3N_OK);
            const int done = crowd_done(&c) - before;
            assert_int_equal(done, 35 - before < max ? 35 - before : max);
            before += done;
        }
        crowd_check(&c);
        crowd_close(&c);
    }
}

/* Who is served when there is room for a few: always those that have waited longest, from where the
 * call before stopped, passing over those that are done. */
static void test_batch_turns(void **state)
{
    for (int max = 1; max < 8; max++) {
        crowd c;
        crowd_open(&c, (const char *)*state, 3, 1);
        const q3n_limit limit = { .size = sizeof limit, .max_tokens = max };
        int turn = 0, want[N_ITEMS];
        for (int i = 0; i < N_ITEMS; i++) {
            want[i] = i % 5 == 1 ? 0 : 4;
            c.item[i].n = want[i];
            c.item[i].logits = NULL;
        }
        for (int call = 0; call < 20; call++) {
            for (int k = 0; k < max; k++, turn = (turn + 1) % N_ITEMS) {
                while (want[turn] == 0) turn = (turn + 1) % N_ITEMS;
                want[turn]--;
            }
            int left = 0;
            assert_int_equal(q3n_engine_eval(c.b, c.item, N_ITEMS, &limit), Q3N_OK);
            for (int i = 0; i < N_ITEMS; i++) {
                if (c.item[i].n - c.item[i].done != want[i])
                    fail_msg("%d a call, call %d: item %d has %d tokens left, expected %d", max,
                             call, i, c.item[i].n - c.item[i].done, want[i]);
                left += want[i] > 0;
            }
            if (left < max) break;       /* who is served twice is another test's business */
        }
        crowd_close(&c);
    }
}

/* A limit of time is kept by stopping inside the prompt; each call goes on, however short. */
static void test_batch_time(void **state)
{
    crowd c;
    crowd_open(&c, (const char *)*state, 9, 250);
    const q3n_limit limit = { .size = sizeof limit, .max_microseconds = 1 };
    const q3n_limit past = { .size = sizeof past, .max_microseconds = -1 };
    int calls = 0;
    assert_int_equal(q3n_engine_eval(c.b, c.item, N_ITEMS, &past), Q3N_ERR_ARG);
    for (int before = 0; before < 265; calls++) {
        assert_int_equal(q3n_engine_eval(c.b, c.item, N_ITEMS, &limit), Q3N_OK);
        const int done = crowd_done(&c);
        assert_true(done > before);
        before = done;
    }
    assert_true(calls > 4);
    crowd_check(&c);
    crowd_close(&c);
}

/* A batch that cannot be leaves every session and item alone, whichever item it is. */
static void test_batch_errors(void **state)
{
    (void)state;
    crowd c;
    crowd_open(&c, "qwen3_next", 9, 200);
    q3n_model *other = open_model("qwen3_moe", NULL);
    q3n_session_options o = plain_options(20);
    q3n_session *foreign = create_session(other, &o), *lone = create_session(c.m, &o), *small;
    set_engine(&o, c.b, NULL);
    small = create_session(c.m, &o);
    const q3n_engine_item good = c.item[7];
    const int32_t bad_ids[2] = { 1, c.vocab };
    const struct { q3n_engine_item item; q3n_result want; } bad[] = {
        { { .session = c.session[3], .tokens = good.tokens, .n = 1 }, Q3N_ERR_ARG },
        { { .session = foreign, .tokens = good.tokens, .n = 1 }, Q3N_ERR_ARG },
        { { .session = NULL, .tokens = good.tokens, .n = 1 }, Q3N_ERR_ARG },
        { { .session = c.session[7], .tokens = bad_ids, .n = 2 }, Q3N_ERR_ARG },
        { { .session = c.session[7], .tokens = NULL, .n = 2 }, Q3N_ERR_ARG },
        { { .session = c.session[7], .tokens = good.tokens, .n = -1 }, Q3N_ERR_ARG },
        { { .session = c.session[7], .tokens = good.tokens, .n = 1, .done = 2 }, Q3N_ERR_ARG },
        { { .session = c.session[7], .tokens = good.tokens, .n = 1, .done = -1 }, Q3N_ERR_ARG },
        { { .session = small, .tokens = good.tokens, .n = 21 }, Q3N_ERR_FULL },
        { { .session = lone, .tokens = good.tokens, .n = 1 }, Q3N_ERR_ARG },
    };
    for (int i = 0; i < COUNT(bad); i++) {
        c.item[7] = bad[i].item;
        c.item[7].size = sizeof c.item[7];
        const q3n_result r = q3n_engine_eval(c.b, c.item, N_ITEMS, NULL);
        if (r != bad[i].want) fail_msg("item %d: %s", i, q3n_result_string(r));
        assert_int_equal(q3n_engine_error(c.b)->code, r);
        assert_true(strlen(q3n_engine_error(c.b)->message) > 5);
        for (int j = 0; j < N_ITEMS; j++) {
            assert_int_equal(q3n_session_length(c.session[j]), 9);
            if (j != 7) assert_int_equal(c.item[j].done, 0);
        }
    }
    c.item[7] = good;
    assert_int_equal(q3n_engine_eval(c.b, c.item, N_ITEMS, NULL), Q3N_OK);
    crowd_check(&c);
    q3n_session_destroy(lone);
    q3n_session_destroy(small);
    q3n_session_destroy(foreign);
    q3n_model_close(other);
    crowd_close(&c);
}

/* ---- States with the MTP module's keys and without ---- */

/* Ways from one session to another. */
enum { BY_FILE, BY_SNAPSHOT, BY_FORK, BY_CACHE, BY_DIRECTORY, N_WAYS };

typedef struct {
    const q3n_model *m;
    int32_t          ids[560];
    float           *want;       /* [560, vocab]                                                 */
    char             directory[64];
} either;

static q3n_cache *either_cache(const either *e, int way)
{
    q3n_cache *c = NULL;
    const q3n_cache_options o = { .size = sizeof o, .max_bytes = (size_t)64 << 20,
                                  .directory = way == BY_DIRECTORY ? e->directory : NULL };
    if (way >= BY_CACHE) assert_int_equal(q3n_cache_create(&c, e->m, &o, NULL), Q3N_OK);
    return c;
}

/* A session with options o that has the first n tokens, which *from evaluated; ends *from, and may
 * change the cache of both. */
static q3n_session *pass_on(const either *e, q3n_session *from, q3n_session_options *o, int n,
                            int way)
{
    q3n_session *to = NULL;
    q3n_snapshot *snap = NULL;
    memory_file b = { 0 };
    int n_reused = 0;
    if (way == BY_FILE) must(from, save_to(&b, from, SIZE_MAX), Q3N_OK);
    if (way == BY_SNAPSHOT) must(from, q3n_session_snapshot(from, &snap), Q3N_OK);
    if (way == BY_FORK) assert_int_equal(q3n_session_fork(&to, from, o, NULL), Q3N_OK);
    if (way >= BY_CACHE) must(from, q3n_session_checkpoint(from), Q3N_OK);
    q3n_session_destroy(from);
    if (way == BY_DIRECTORY) {                   /* as another process would find it */
        q3n_cache_destroy(o->cache);
        o->cache = either_cache(e, way);
        assert_true(stats_of(o->cache).n_files > 0 && stats_of(o->cache).n_entries == 0);
    }
    if (!to) to = create_session(e->m, o);
    if (way == BY_FILE) must(to, load_from(&b, to, SIZE_MAX), Q3N_OK);
    if (way == BY_SNAPSHOT) must(to, q3n_session_restore(to, snap), Q3N_OK);
    if (way >= BY_CACHE) {
        must(to, q3n_session_reuse(to, e->ids, n, &n_reused), Q3N_OK);
        assert_int_equal(n_reused, n);
    }
    q3n_snapshot_free(snap);
    free(b.bytes);
    assert_int_equal(q3n_session_length(to), n);
    return to;
}

/* Greedy steps from token ids[n] on give what plain evaluation gives; returns how many drafts were
 * made.  The session is back at n tokens. */
static int64_t steps_from(const either *e, q3n_session *s, int n)
{
    const size_t V = (size_t)q3n_model_config(e->m)->vocab_size;
    q3n_session_options o = plain_options(COUNT(e->ids));
    q3n_session *plain = create_session(e->m, &o);
    q3n_speculation before = Q3N_INIT(q3n_speculation), after = Q3N_INIT(q3n_speculation);
    float *logits = new_floats(V);
    int32_t tokens[12], token = e->ids[n];
    int chosen = 0;
    set_sampler(s, (q3n_sampler_options){ 0 });
    must(plain, q3n_session_eval(plain, e->ids, n, NULL), Q3N_OK);
    q3n_session_speculation(s, &before);
    for (int i = 0; i < 5; i++) {
        must(s, q3n_session_decode(s, token, tokens, COUNT(tokens), &chosen), Q3N_OK);
        for (int k = 0; k < chosen; k++) {
            must(plain, q3n_session_eval(plain, &token, 1, logits), Q3N_OK);
            token = tokens[k];
            assert_int_equal(token, argmax(logits, (int)V));
        }
        if (q3n_model_is_eos(e->m, token)) break;
    }
    q3n_session_speculation(s, &after);
    must(s, q3n_session_rewind(s, n), Q3N_OK);
    q3n_session_destroy(plain);
    free(logits);
    return after.n_drafted - before.n_drafted;
}

/* 280 tokens in a session with the module or without, passed on to one of the other kind, and after
 * 260 more back to the first kind. */
static void there_and_back(const either *e, int first, int way)
{
    const size_t V = (size_t)q3n_model_config(e->m)->vocab_size;
    const q3n_speculate kind[2] = { Q3N_SPECULATE_OFF, Q3N_SPECULATE_MTP };
    float *logits = new_floats(V);
    q3n_session_options o = plain_options(COUNT(e->ids));
    o.draft = 3;
    o.cache = either_cache(e, way);
    o.speculate = kind[first];
    q3n_session *s = create_session(e->m, &o);
    must(s, q3n_session_eval(s, e->ids, 280, logits), Q3N_OK);
    for (int i = 0, n = 280; i < 2; i++, n += 260) {
        const int with = i == 0 ? !first : first;
        o.speculate = kind[with];
        s = pass_on(e, s, &o, n, way);
        must(s, q3n_session_logits(s, logits), Q3N_OK);
        check_same(logits, e->want + (size_t)(n - 1) * V, V, "passed on");
        const int64_t n_drafted = steps_from(e, s, n);
        if (with ? n_drafted < 5 : n_drafted != 0)
            fail_msg("way %d, with the module %d: %d drafts", way, with, (int)n_drafted);
        must(s, q3n_session_eval(s, e->ids + n, i ? 10 : 260, logits), Q3N_OK);
        check_same(logits, e->want + (size_t)(n + (i ? 9 : 259)) * V, V, "and went on");
    }
    q3n_session_destroy(s);
    q3n_cache_destroy(o.cache);
    free(logits);
}

static void test_module_or_not(void **state)
{
    (void)state;
    heap h = { 0 };
    q3n_model *m = open_model("qwen3_next_mtp", &h);
    const int live = h.live;
    either e = { .m = m };
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    uint64_t rng = 97;
    random_tokens(&rng, e.ids, COUNT(e.ids), (int)V);
    e.want = new_floats(COUNT(e.ids) * V);
    const q3n_session_options o = plain_options(COUNT(e.ids));
    q3n_session *s = create_session(m, &o);
    const q3n_outputs out = { .size = sizeof out, .all_logits = e.want };
    must(s, q3n_session_eval_outputs(s, e.ids, COUNT(e.ids), &out), Q3N_OK);
    q3n_session_destroy(s);
    for (int way = 0; way < N_WAYS; way++)
        for (int first = 0; first < 2; first++) {
            snprintf(e.directory, sizeof e.directory, "build/test_session_%d", (int)getpid());
            assert_int_equal(mkdir(e.directory, 0777), 0);
            there_and_back(&e, first, way);
            remove_directory(e.directory);
            assert_int_equal(h.live, live);
        }
    free(e.want);
    q3n_model_close(m);
    assert_int_equal(h.live, 0);
}

/* A session without the module that loads a file with its keys takes what it would without them. */
static void test_module_memory(void **state)
{
    (void)state;
    heap h = { 0 };
    q3n_model *m = open_model("qwen3_next_mtp", &h);
    int32_t ids[300];
    uint64_t rng = 101;
    random_tokens(&rng, ids, COUNT(ids), q3n_model_config(m)->vocab_size);
    q3n_session_options o = plain_options(COUNT(ids));
    memory_file b[2] = { { 0 }, { 0 } };
    size_t live[2];
    for (int with = 0; with < 2; with++) {
        o.speculate = with ? Q3N_SPECULATE_MTP : Q3N_SPECULATE_OFF;
        q3n_session *s = create_session(m, &o);
        must(s, q3n_session_eval(s, ids, COUNT(ids), NULL), Q3N_OK);
        must(s, save_to(&b[with], s, SIZE_MAX), Q3N_OK);
        q3n_session_destroy(s);
    }
    assert_true(b[1].n > b[0].n);
    o.speculate = Q3N_SPECULATE_OFF;
    for (int with = 0; with < 2; with++) {
        q3n_session *s = create_session(m, &o);
        must(s, load_from(&b[with], s, SIZE_MAX), Q3N_OK);
        live[with] = h.live_bytes;
        q3n_session_destroy(s);
        free(b[with].bytes);
    }
    assert_int_equal(live[0], live[1]);
    q3n_model_close(m);
}

/* A text beyond the model's context is refused before anything is evaluated. */
static void test_beyond_the_context(void **state)
{
    (void)state;
    q3n_model *m = open_model("qwen3_dense", NULL);
    const int n = q3n_model_config(m)->max_position_embeddings + 1;
    int32_t *ids = (int32_t *)calloc((size_t)n, sizeof *ids);
    canceller c = { .at = -1 };                  /* counts the layers */
    q3n_session_options o = plain_options(0);
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    eo.layer_hook = (q3n_layer_hook){ cancel_in_hook, &c };
    q3n_session *s = create_session(m, &o);
    char number[16];
    assert_non_null(ids);
    for (int call = 0; call < 3; call++) {
        const q3n_result r = call == 0 ? q3n_session_eval(s, ids, n, NULL)
                           : call == 1 ? q3n_session_prefill(s, ids, n, NULL, NULL)
                                       : q3n_session_reuse(s, ids, n, NULL);
        must(s, r, Q3N_ERR_FULL);
        for (int k = n - 1; k <= n; k++) {
            snprintf(number, sizeof number, "%d", k);
            assert_non_null(strstr(q3n_session_error(s)->message, number));
        }
    }
    assert_int_equal(c.calls, 0);
    assert_int_equal(q3n_session_length(s), 0);
    q3n_session_destroy(s);
    free(ids);
    q3n_model_close(m);
}

/* ---- What does not fit together ---- */
static void test_strangers(void **state)
{
    (void)state;
    q3n_model *m = open_model("qwen3_next", NULL), *other = open_model("qwen3_5", NULL);
    const int32_t ids[5] = { 1, 2, 3, 4, 5 };
    q3n_session_options o = plain_options(40);
    q3n_error err = { .code = Q3N_OK };
    q3n_session *s = create_session(m, &o), *stranger = create_session(other, &o), *fork = NULL;
    q3n_snapshot *snap = NULL;
    memory_file b = { 0 };
    o.kv_type = Q3N_TYPE_F16;
    q3n_session *half = create_session(m, &o);
    must(s, q3n_session_eval(s, ids, 5, NULL), Q3N_OK);
    must(s, q3n_session_snapshot(s, &snap), Q3N_OK);
    must(s, save_to(&b, s, SIZE_MAX), Q3N_OK);
    must(half, q3n_session_eval(half, ids, 2, NULL), Q3N_OK);
    must(half, q3n_session_restore(half, snap), Q3N_ERR_UNSUPPORTED);
    must(half, load_from(&b, half, SIZE_MAX), Q3N_ERR_UNSUPPORTED);
    assert_int_equal(q3n_session_length(half), 2);
    must(stranger, q3n_session_restore(stranger, snap), Q3N_ERR_ARG);
    must(stranger, load_from(&b, stranger, SIZE_MAX), Q3N_ERR_UNSUPPORTED);
    assert_int_equal(q3n_session_length(stranger), 0);
    assert_int_equal(q3n_session_fork(&fork, s, &o, &err), Q3N_ERR_UNSUPPORTED);
    assert_null(fork);
    o.kv_type = Q3N_TYPE_F32;
    o.capacity = 4;
    assert_int_equal(q3n_session_fork(&fork, s, &o, &err), Q3N_ERR_FULL);
    assert_null(fork);
    int32_t got[6];
    must(s, q3n_session_tokens(s, 0, 5, got), Q3N_OK);
    assert_memory_equal(got, ids, sizeof ids);
    must(s, q3n_session_tokens(s, 5, 0, got), Q3N_OK);
    assert_int_equal(q3n_session_tokens(s, 0, 6, got), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_tokens(s, 5, 1, got), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_tokens(s, -1, 2, got), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_tokens(s, 1, -1, got), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_tokens(s, 1, INT_MAX, got), Q3N_ERR_ARG);
    free(b.bytes);
    q3n_snapshot_free(snap);
    q3n_session_destroy(half);
    q3n_session_destroy(stranger);
    q3n_session_destroy(s);
    q3n_model_close(other);
    q3n_model_close(m);
}

static void test_options(void **state)
{
    (void)state;
    q3n_model *m = open_model("qwen3_next", NULL), *other = open_model("qwen3_moe", NULL);
    q3n_error err;
    q3n_cache *cache = NULL;
    q3n_engine *batch = NULL;
    q3n_session *s;
    const q3n_cache_options co = { .size = sizeof co, .max_bytes = 1 << 20 };
    const q3n_session_options plain = plain_options(20);
    assert_int_equal(q3n_cache_create(&cache, other, &co, &err), Q3N_OK);
    batch = create_engine(other, plain.engine_options);
    q3n_session_options bad[] = {
        { .snapshot_type = Q3N_TYPE_F16 }, { .snapshot_type = Q3N_TYPE_Q8 },
        { .snapshot_type = Q3N_TYPE_COUNT }, { .snapshot_every = -1 }, { .draft = -1 },
        { .draft = Q3N_MAX_DRAFT + 1 }, { .speculate = Q3N_SPECULATE_COUNT },
        { .cache = cache }, { .engine = batch },
    };
    for (int i = 0; i < COUNT(bad); i++) {
        bad[i].size = sizeof bad[i];
        err.code = Q3N_OK;
        s = (q3n_session *)(uintptr_t)8;
        const q3n_result r = q3n_session_create(&s, m, &bad[i], &err);
        if (r != Q3N_ERR_ARG || err.code != r || s)
            fail_msg("options %d: %s", i, q3n_result_string(r));
        assert_int_equal(q3n_session_bytes(m, &bad[i], NULL), 0);
    }
    q3n_cache_destroy(cache);
    q3n_engine_destroy(batch);
    q3n_cache_destroy(NULL);
    q3n_engine_destroy(NULL);
    q3n_snapshot_free(NULL);
    q3n_model_close(other);
    q3n_model_close(m);
}

/* A model that attends both ways has no text to go back in. */
static void test_both_ways(void **state)
{
    (void)state;
    q3n_model *m = open_model("seed_patched_real_rope", NULL);
    const q3n_session_options o = plain_options(9);
    const int32_t ids[9] = { 1, 2, 3, 4, 5, 6, 7, 8, 9 };
    q3n_session *s = create_session(m, &o);
    q3n_snapshot *snap = (q3n_snapshot *)(uintptr_t)8;
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    float *want = new_floats(V), *got = new_floats(V);
    must(s, q3n_session_eval(s, ids, 7, want), Q3N_OK);
    must(s, q3n_session_snapshot(s, &snap), Q3N_ERR_UNSUPPORTED);
    assert_null(snap);
    must(s, q3n_session_rewind(s, 3), Q3N_ERR_UNSUPPORTED);
    must(s, q3n_session_logits(s, got), Q3N_OK);
    check_same(got, want, V, "both ways");
    int n_reused = 0;
    must(s, q3n_session_prefill(s, ids + 1, 8, NULL, &n_reused), Q3N_OK);
    assert_int_equal(n_reused, 0);
    must(s, q3n_session_prefill(s, ids, 7, got, NULL), Q3N_OK);
    check_same(got, want, V, "both ways, fed");
    n_reused = -1;
    must(s, q3n_session_reuse(s, ids, 5, &n_reused), Q3N_OK);
    assert_int_equal(n_reused, 0);
    assert_int_equal(q3n_session_length(s), 0);

    q3n_session_options keeps = o;              /* snapshots would cut the text */
    keeps.snapshot_bytes = 1 << 20;
    keeps.snapshot_every = 3;
    q3n_session *kept = create_session(m, &keeps);
    must(kept, q3n_session_eval(kept, ids, 7, got), Q3N_OK);
    check_same(got, want, V, "both ways, with a cache");
    q3n_session_destroy(kept);
    free(got);
    free(want);
    q3n_session_destroy(s);
    q3n_model_close(m);
}

/* States of a model that classifies are kept like others, and do not disturb its scores. */
static void test_classifier(void **state)
{
    (void)state;
    q3n_model *m = open_model("qwen3_next_cls", NULL);
    const size_t d = (size_t)q3n_model_config(m)->hidden_size;
    int32_t ids[300];
    uint64_t rng = 61;
    random_tokens(&rng, ids, COUNT(ids), q3n_model_config(m)->vocab_size);
    q3n_session_options o = plain_options(COUNT(ids));
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    o.snapshot_bytes = (size_t)8 << 20;
    eo.batch_size = 50;
    float *want = new_floats(d), *got = new_floats(d), scores[2][16];
    memory_file f = { 0 };
    q3n_session *s = create_session(m, &o);
    must(s, q3n_session_classify(s, ids, COUNT(ids), scores[0]), Q3N_OK);
    q3n_session_reset(s);
    const q3n_outputs last = { .size = sizeof last, .hidden = want },
                      again = { .size = sizeof again, .hidden = got };
    must(s, q3n_session_eval_outputs(s, ids, COUNT(ids), &last), Q3N_OK);
    must(s, save_to(&f, s, SIZE_MAX), Q3N_OK);
    must(s, q3n_session_rewind(s, 290), Q3N_OK);
    must(s, q3n_session_prefill(s, ids, 200, NULL, NULL), Q3N_OK);
    must(s, q3n_session_eval_outputs(s, ids + 200, 100, &again), Q3N_OK);
    check_same(got, want, d, "fed and on");
    must(s, load_from(&f, s, SIZE_MAX), Q3N_OK);
    must(s, q3n_session_rewind(s, 299), Q3N_OK);
    must(s, q3n_session_eval_outputs(s, ids + 299, 1, &again), Q3N_OK);
    check_same(got, want, d, "loaded, gone back and on");
    must(s, q3n_session_classify(s, ids, COUNT(ids), scores[1]), Q3N_OK);
    assert_memory_equal(scores[0], scores[1], 3 * sizeof(float));
    q3n_session_destroy(s);
    free(f.bytes);
    free(got);
    free(want);
    q3n_model_close(m);
}

/* Experts are counted for tokens that the text gained: not for failed calls, not for what is
 * evaluated again. */
static void test_expert_counts(void **state)
{
    (void)state;
    q3n_model *m = open_model("qwen3_moe", NULL);
    const q3n_config *cfg = q3n_model_config(m);
    canceller c = { .at = -1 };
    q3n_session_options o = plain_options(60);
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    int32_t ids[60], tokens[8];
    uint64_t rng = 67;
    random_tokens(&rng, ids, COUNT(ids), cfg->vocab_size);
    eo.layer_hook = (q3n_layer_hook){ cancel_in_hook, &c };
    o.count_experts = 1;
    o.speculate = Q3N_SPECULATE_LOOKUP;
    o.draft = 4;
    q3n_session *s = create_session(m, &o);
    set_sampler(s, (q3n_sampler_options){ 0 });
    int n = 0;
    must(s, q3n_session_eval(s, ids, 30, NULL), Q3N_OK);
    c.s = s;
    c.at = c.calls + 2;
    must(s, q3n_session_eval(s, ids + 30, 10, NULL), Q3N_ERR_CANCELLED);
    must(s, q3n_session_rewind(s, 20), Q3N_OK);
    must(s, q3n_session_decode(s, ids[20], tokens, 8, &n), Q3N_OK);
    assert_int_equal(n, 1);                      /* nothing is drafted where experts are counted */
    int64_t sum = 0;
    int l = 0;
    while (!cfg->layer_experts[l]) l++;
    for (int e = 0; e < cfg->num_experts; e++) sum += q3n_session_expert_counts(s, l)[e];
    assert_int_equal(sum, 31 * cfg->num_experts_per_tok);
    q3n_session_destroy(s);
    q3n_model_close(m);
}

/* ---- The cache ---- */

/* Every call that looks for a beginning is a hit, a miss, or goes on from the session's text. */
static void test_cache_counts(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    int32_t ids[60];
    uint64_t rng = 43;
    random_tokens(&rng, ids, COUNT(ids), q3n_model_config(m)->vocab_size);
    q3n_session_options o = plain_options(COUNT(ids));
    const q3n_cache_options co = { .size = sizeof co, .max_bytes = (size_t)64 << 20 };
    assert_int_equal(q3n_cache_create(&o.cache, m, &co, NULL), Q3N_OK);
    q3n_session *a = create_session(m, &o), *b = create_session(m, &o);
    int n_reused = -1;
    for (int n = 10; n <= 50; n += 10) {             /* a chat that only grows */
        must(a, q3n_session_prefill(a, ids, n, NULL, &n_reused), Q3N_OK);
        assert_int_equal(n_reused, n - 10);
        assert_int_equal(stats_of(o.cache).n_own, n / 10 - 1);
    }
    must(b, q3n_session_reuse(b, ids, 45, &n_reused), Q3N_OK);
    assert_int_equal(n_reused, 40);
    assert_int_equal(stats_of(o.cache).n_hits, 1);
    must(a, q3n_session_rewind(a, 50), Q3N_OK);      /* neither looks */
    must(a, q3n_session_rewind(a, 0), Q3N_OK);
    const q3n_cache_stats st = stats_of(o.cache);
    assert_int_equal(st.n_hits, 1);
    assert_int_equal(st.n_own, 4);
    assert_int_equal(st.n_misses, 1);
    q3n_session_destroy(a);
    q3n_session_destroy(b);
    q3n_cache_destroy(o.cache);
    q3n_model_close(m);
}

/* Bits are those of an instruction set, and so are the states of a cache. */
static void test_cache_isa(void **state)
{
    if (q3n_isa_best() == Q3N_ISA_SCALAR) skip();
    q3n_model *m = open_model((const char *)*state, NULL);
    int32_t ids[60];
    uint64_t rng = 44;
    random_tokens(&rng, ids, COUNT(ids), q3n_model_config(m)->vocab_size);
    q3n_engine_options eo = one_thread;
    q3n_session_options o = plain_options(COUNT(ids));
    const q3n_cache_options co = Q3N_INIT(q3n_cache_options);
    assert_int_equal(q3n_cache_create(&o.cache, m, &co, NULL), Q3N_OK);
    o.engine_options = &eo;
    static const int reused[4] = { 0, 0, 40, 40 };       /* scalar, best, scalar, best */
    for (int i = 0; i < 4; i++) {
        int n_reused = -1;
        eo.isa = i % 2 ? q3n_isa_best() : Q3N_ISA_SCALAR;
        q3n_session *s = create_session(m, &o);
        must(s, q3n_session_prefill(s, ids, 40, NULL, &n_reused), Q3N_OK);
        assert_int_equal(n_reused, reused[i]);
        q3n_session_destroy(s);
    }
    q3n_cache_destroy(o.cache);
    q3n_model_close(m);
}

/* Texts with a common beginning, in several sessions: whoever comes later finds what is marked. */
static void test_cache(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const int vocab = q3n_model_config(m)->vocab_size;
    int32_t ids[300];
    uint64_t rng = 41;
    random_tokens(&rng, ids, COUNT(ids), vocab);
    q3n_cache *cache = NULL;
    const q3n_cache_options co = { .size = sizeof co, .max_bytes = (size_t)64 << 20 };
    assert_int_equal(q3n_cache_create(&cache, m, &co, NULL), Q3N_OK);
    q3n_session_options o = plain_options(COUNT(ids));
    o.cache = cache;
    q3n_session *a = create_session(m, &o), *b = create_session(m, &o);
    float *want = new_floats(2 * (size_t)vocab);
    int n_reused = -1;
    must(a, q3n_session_prefill(a, ids, 270, want, &n_reused), Q3N_OK);
    assert_int_equal(n_reused, 0);
    assert_int_equal(stats_of(cache).n_entries, 1);
    assert_int_equal(stats_of(cache).n_hits, 0);
    assert_int_equal(stats_of(cache).n_misses, 1);
    must(b, q3n_session_prefill(b, ids, 270, want + vocab, &n_reused), Q3N_OK);
    assert_int_equal(n_reused, 270);
    check_same(want, want + vocab, (size_t)vocab, "all from the cache");
    assert_int_equal(stats_of(cache).n_hits, 1);
    q3n_session_reset(a);
    must(a, q3n_session_prefill(a, ids, 300, want, &n_reused), Q3N_OK);
    assert_int_equal(n_reused, 270);
    q3n_session_reset(b);
    must(b, q3n_session_eval(b, ids, 300, want + vocab), Q3N_OK);
    check_same(want, want + vocab, (size_t)vocab, "from the cache, and more");
    must(b, q3n_session_rewind(b, 280), Q3N_OK);
    must(b, q3n_session_reuse(b, ids, 290, &n_reused), Q3N_OK);
    assert_int_equal(n_reused, 280);
    q3n_cache_clear(cache);
    assert_int_equal(stats_of(cache).n_entries, 0);
    assert_int_equal(stats_of(cache).bytes, 0);
    q3n_session_reset(a);
    must(a, q3n_session_reuse(a, ids, 290, &n_reused), Q3N_OK);
    assert_int_equal(n_reused, 0);
    q3n_session_destroy(a);
    q3n_session_destroy(b);
    q3n_cache_destroy(cache);
    free(want);
    q3n_model_close(m);
}

/* What is reused is all that the session knows then, whatever it held before. */
static void test_reuse(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const int vocab = q3n_model_config(m)->vocab_size;
    int32_t ids[300], other[300];
    uint64_t rng = 53;
    random_tokens(&rng, ids, COUNT(ids), vocab);
    q3n_session_options o = plain_options(COUNT(ids));
    o.snapshot_bytes = (size_t)64 << 20;
    q3n_session *s = create_session(m, &o), *plain = create_session(m, &o);
    float *want = new_floats(2 * (size_t)vocab);
    for (int at = 299; at > 0; at -= 1 + at / 3) {   /* the first token that differs */
        int n_reused = -1;
        memcpy(other, ids, sizeof ids);
        other[at] = (ids[at] + 1) % vocab;
        must(s, q3n_session_prefill(s, ids, COUNT(ids), NULL, NULL), Q3N_OK);
        must(s, q3n_session_reuse(s, other, COUNT(ids), &n_reused), Q3N_OK);
        assert_in_range(n_reused, 0, at);
        assert_int_equal(q3n_session_length(s), n_reused);
        if (n_reused == 0) continue;
        q3n_session_reset(plain);
        must(plain, q3n_session_eval(plain, ids, n_reused, want), Q3N_OK);
        must(s, q3n_session_logits(s, want + vocab), Q3N_OK);
        check_same(want + vocab, want, (size_t)vocab, "reused");
    }
    q3n_session_destroy(plain);
    q3n_session_destroy(s);
    free(want);
    q3n_model_close(m);
}

/* Overwrite the scratch of an engine, NULL = of none: with another text, of another session. */
static void use_otherwise(const q3n_model *m, q3n_engine *e, q3n_speculate speculate)
{
    if (!e) return;
    q3n_session_options o = plain_options(300);
    int32_t ids[280];
    uint64_t rng = 61;
    random_tokens(&rng, ids, COUNT(ids), q3n_model_config(m)->vocab_size);
    set_engine(&o, e, NULL);
    o.speculate = speculate;
    q3n_session *s = create_session(m, &o);
    must(s, q3n_session_eval(s, ids, COUNT(ids), NULL), Q3N_OK);
    q3n_session_destroy(s);
}

/* A session that got its text from elsewhere evaluates over several pages with several threads
 * before it has ever stored a token itself; also where another overwrites what they share. */
static void test_reevaluate(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    int32_t ids[300], drafts[2];
    uint64_t rng = 59;
    random_tokens(&rng, ids, COUNT(ids), (int)V);
    q3n_session_options o = plain_options(COUNT(ids));
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    float *want = new_floats(2 * V);
    o.snapshot_bytes = (size_t)64 << 20;
    o.speculate = Q3N_SPECULATE_AUTO;
    q3n_session *from = create_session(m, &o);
    must(from, q3n_session_eval(from, ids, COUNT(ids) - 2, want), Q3N_OK);
    q3n_snapshot *snap = NULL;
    must(from, q3n_session_snapshot(from, &snap), Q3N_OK);
    eo.n_threads = 2;
    q3n_engine *shared = create_engine(m, &eo);
    for (int i = 0; i < 6; i++) {
        set_engine(&o, i < 3 ? NULL : shared, &eo);
        q3n_session *s = create_session(m, &o);
        must(s, q3n_session_restore(s, snap), Q3N_OK);
        use_otherwise(m, o.engine, o.speculate);
        if (i % 3 == 1 && q3n_model_config(m)->num_mtp_layers > 0)
            must(s, q3n_session_draft(s, 1, drafts, 2, NULL), Q3N_OK);
        if (i % 3 == 2) {            /* in a call of many */
            q3n_engine_item item = { .size = sizeof item, .session = s,
                                     .tokens = ids + COUNT(ids) - 2, .n = 1 };
            assert_int_equal(q3n_engine_eval(q3n_session_engine(s), &item, 1, NULL), Q3N_OK);
        }
        use_otherwise(m, o.engine, o.speculate);
        must(s, q3n_session_rewind(s, COUNT(ids) - 3), Q3N_OK);
        use_otherwise(m, o.engine, o.speculate);
        must(s, q3n_session_eval(s, ids + COUNT(ids) - 3, 1, want + V), Q3N_OK);
        check_same(want + V, want, V, "restored, gone back and on");
        q3n_session_destroy(s);
    }
    q3n_engine_destroy(shared);
    q3n_snapshot_free(snap);
    q3n_session_destroy(from);
    free(want);
    q3n_model_close(m);
}

/* Snapshots taken inside a call, with snapshot_every, hold what the text had there. */
static void test_snapshot_every(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const q3n_config *c = q3n_model_config(m);
    const size_t V = (size_t)c->vocab_size;
    int32_t ids[300], draft, want_draft;
    uint64_t rng = 73;
    random_tokens(&rng, ids, COUNT(ids), (int)V);
    q3n_session_options o = plain_options(COUNT(ids));
    o.speculate = Q3N_SPECULATE_AUTO;
    q3n_session *plain = create_session(m, &o);
    o.snapshot_bytes = (size_t)64 << 20;
    o.snapshot_every = 48;
    float *want = new_floats(2 * V);
    q3n_engine *b = create_engine(m, o.engine_options);
    for (int in_batch = 0; in_batch < 2; in_batch++)
        for (int at = 48; at < COUNT(ids); at += 48) {
            set_engine(&o, in_batch ? b : NULL, &one_thread);
            q3n_session *s = create_session(m, &o);
            q3n_engine_item item = { .size = sizeof item, .session = s, .tokens = ids,
                                     .n = COUNT(ids) };
            if (in_batch) assert_int_equal(q3n_engine_eval(b, &item, 1, NULL), Q3N_OK);
            else          must(s, q3n_session_eval(s, ids, COUNT(ids), NULL), Q3N_OK);
            must(s, q3n_session_rewind(s, at), Q3N_OK);
            q3n_session_reset(plain);
            must(plain, q3n_session_eval(plain, ids, at, want), Q3N_OK);
            must(s, q3n_session_logits(s, want + V), Q3N_OK);
            check_same(want + V, want, V, "back at a snapshot");
            if (c->num_mtp_layers > 0) {
                must(plain, q3n_session_draft(plain, 1, &want_draft, 1, want), Q3N_OK);
                must(s, q3n_session_draft(s, 1, &draft, 1, want + V), Q3N_OK);
                check_same(want + V, want, V, "draft behind a snapshot");
            }
            must(plain, q3n_session_eval(plain, ids + at, 1, want), Q3N_OK);
            must(s, q3n_session_eval(s, ids + at, 1, want + V), Q3N_OK);
            check_same(want + V, want, V, "on from a snapshot");
            q3n_session_destroy(s);
        }
    q3n_engine_destroy(b);
    q3n_session_destroy(plain);
    free(want);
    q3n_model_close(m);
}

/* More pages than the scratch of split attention was first made for. */
static void test_many_pages(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    int32_t ids[1040];
    uint64_t rng = 83;
    random_tokens(&rng, ids, COUNT(ids), (int)V);
    q3n_session_options o = plain_options(COUNT(ids));
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    float *want = new_floats(2 * V);
    q3n_session *plain = create_session(m, &o);
    eo.n_threads = 3;
    q3n_session *s = create_session(m, &o);
    must(plain, q3n_session_eval(plain, ids, 1010, NULL), Q3N_OK);
    must(s, q3n_session_eval(s, ids, 500, NULL), Q3N_OK);
    must(s, q3n_session_eval(s, ids + 500, 1, NULL), Q3N_OK);
    must(s, q3n_session_eval(s, ids + 501, 509, NULL), Q3N_OK);
    for (int i = 1010; i < COUNT(ids); i++) {
        must(plain, q3n_session_eval(plain, ids + i, 1, want), Q3N_OK);
        must(s, q3n_session_eval(s, ids + i, 1, want + V), Q3N_OK);
        check_same(want + V, want, V, "many pages");
    }
    q3n_session_destroy(s);
    q3n_session_destroy(plain);
    free(want);
    q3n_model_close(m);
}

/* The cache keeps to its bound; what prefills marked outlives what snapshot_every put there. */
static void test_cache_bound(void **state)
{
    heap h = { 0 };
    q3n_model *m = open_model((const char *)*state, &h);
    const int vocab = q3n_model_config(m)->vocab_size;
    const size_t max_bytes = (size_t)3 << 19;
    uint64_t rng = 43;
    q3n_cache *cache = NULL;
    const q3n_cache_options co = { .size = sizeof co, .max_bytes = max_bytes };
    const size_t none = h.live_bytes;
    assert_int_equal(q3n_cache_create(&cache, m, &co, NULL), Q3N_OK);
    q3n_session_options o = plain_options(300);
    o.cache = cache;
    o.snapshot_every = 16;
    q3n_session *s = create_session(m, &o);
    const size_t live = h.live_bytes;
    int32_t marked[40], ids[300];
    random_tokens(&rng, marked, COUNT(marked), vocab);
    must(s, q3n_session_prefill(s, marked, COUNT(marked), NULL, NULL), Q3N_OK);
    for (int i = 0; i < 6; i++) {
        random_tokens(&rng, ids, COUNT(ids), vocab);
        q3n_session_reset(s);
        must(s, q3n_session_eval(s, ids, COUNT(ids), NULL), Q3N_OK);
        assert_true(stats_of(cache).bytes <= max_bytes);
        assert_true(stats_of(cache).n_entries > 1);
    }
    assert_true(stats_of(cache).n_evicted > 0);
    q3n_session_memory planned = Q3N_INIT(q3n_session_memory);
    q3n_session_bytes(m, &o, &planned);
    /* beside the cache the session has its own pages, and lists have some room */
    assert_in_range(h.live_bytes, 0, live + max_bytes + 2 * planned.page + 16384);
    int n_reused = -1;
    must(s, q3n_session_reuse(s, marked, COUNT(marked), &n_reused), Q3N_OK);
    assert_int_equal(n_reused, COUNT(marked));
    q3n_session_destroy(s);
    q3n_cache_destroy(cache);
    assert_int_equal(h.live_bytes, none);
    q3n_model_close(m);
    assert_int_equal(h.live, 0);
}

/* Matrices in bf16: half the bytes, and logits that are nearly those of a plain run. */
static void test_snapshots_bf16(void **state)
{
    (void)state;
    q3n_model *m = open_model("qwen3_next", NULL);
    const int vocab = q3n_model_config(m)->vocab_size;
    const int32_t token = 3;
    int32_t ids[100];
    uint64_t rng = 47;
    random_tokens(&rng, ids, COUNT(ids), vocab);
    q3n_session_options o = plain_options(COUNT(ids) + 1);
    q3n_session_memory exact = Q3N_INIT(q3n_session_memory), half = Q3N_INIT(q3n_session_memory);
    q3n_session_bytes(m, &o, &exact);
    o.snapshot_type = Q3N_TYPE_BF16;
    q3n_session_bytes(m, &o, &half);
    assert_true(half.snapshot < exact.snapshot);
    float *want = new_floats((size_t)vocab), *got = new_floats((size_t)vocab);
    q3n_session *s = create_session(m, &o);
    q3n_snapshot *snap = NULL;
    must(s, q3n_session_eval(s, ids, COUNT(ids), NULL), Q3N_OK);
    must(s, q3n_session_snapshot(s, &snap), Q3N_OK);
    assert_int_equal(q3n_snapshot_bytes(snap), half.snapshot);
    q3n_session *fork = NULL;
    assert_int_equal(q3n_session_fork(&fork, s, NULL, NULL), Q3N_OK);
    must(s, q3n_session_eval(s, &token, 1, want), Q3N_OK);
    must(fork, q3n_session_eval(fork, &token, 1, got), Q3N_OK);
    check_same(got, want, (size_t)vocab, "a fork is no snapshot");
    q3n_session_destroy(fork);
    must(s, q3n_session_restore(s, snap), Q3N_OK);
    must(s, q3n_session_eval(s, &token, 1, got), Q3N_OK);
    double scale = 0.0;
    for (int i = 0; i < vocab; i++) scale = fmax(scale, fabs((double)want[i]));
    for (int i = 0; i < vocab; i++)          /* an element of a matrix is off by 2^-9 of itself */
        if (!(fabs((double)got[i] - (double)want[i]) <= 0x1p-7 * scale))
            fail_msg("logit %d is %g, with f32 %g", i, (double)got[i], (double)want[i]);
    q3n_snapshot_free(snap);
    q3n_session_destroy(s);
    free(got);
    free(want);
    q3n_model_close(m);
}

/* ---- The session's sampler ---- */
static void test_sampler(void **state)
{
    (void)state;
    heap h = { 0 };
    q3n_model *m = open_model("qwen3_next", &h);
    const q3n_session_options o = plain_options(40);
    const q3n_sampler_options bad = { .size = sizeof bad, .top_k = -1 };
    const q3n_sampler_options so = { .size = sizeof so, .temperature = 2.0f, .seed = 3,
                                     .repetition_penalty = 1.2f };
    const int32_t ids[3] = { 1, 2, 3 };
    int32_t tokens[4], first[10];
    int n = 7;
    q3n_session *s = create_session(m, &o);
    assert_null(q3n_session_sampler(s));
    must(s, q3n_session_eval(s, ids, 3, NULL), Q3N_OK);
    must(s, q3n_session_decode(s, 4, tokens, 4, &n), Q3N_ERR_ARG);
    assert_non_null(strstr(q3n_session_error(s)->message, "q3n_session_set_sampler"));
    assert_int_equal(n, 0);
    const int live = h.live;
    set_sampler(s, so);
    assert_int_equal(h.live, live + 1);
    q3n_sampler *sampler = q3n_session_sampler(s);
    for (int i = 0; i < COUNT(first); i++)
        must(s, q3n_session_decode(s, i ? first[i - 1] : 4, first + i, 1, &n), Q3N_OK);
    h.calls = 0;
    h.fail_at = 1;                               /* what cannot be set leaves what there is */
    must(s, q3n_session_set_sampler(s, &so), Q3N_ERR_MEMORY);
    h.fail_at = 0;
    must(s, q3n_session_set_sampler(s, &bad), Q3N_ERR_ARG);
    assert_non_null(strstr(q3n_session_error(s)->message, "top_k"));
    assert_ptr_equal(q3n_session_sampler(s), sampler);

    /* Rewind leaves it as it is; reset forgets its tokens and seeds it. */
    must(s, q3n_session_rewind(s, 3), Q3N_OK);
    for (int reset = 0; reset < 2; reset++) {
        int same = 0;
        if (reset) {
            q3n_session_reset(s);
            must(s, q3n_session_eval(s, ids, 3, NULL), Q3N_OK);
        }
        for (int i = 0; i < COUNT(first); i++) {
            must(s, q3n_session_decode(s, i ? tokens[0] : 4, tokens, 1, &n), Q3N_OK);
            same += tokens[0] == first[i];
        }
        if (reset) assert_int_equal(same, COUNT(first));
        else       assert_in_range(same, 0, COUNT(first) / 2);
    }
    must(s, q3n_session_set_sampler(s, NULL), Q3N_OK);
    assert_int_equal(h.live, live);
    must(s, q3n_session_decode(s, 4, tokens, 4, &n), Q3N_ERR_ARG);
    set_sampler(s, so);
    q3n_session_destroy(s);                      /* with its sampler */
    q3n_model_close(m);
    assert_int_equal(h.live, 0);
}

/* The session chooses ten tokens, and its sampler's twin the same from the same logits. */
static void check_choices(q3n_session *s, q3n_sampler *twin)
{
    float *logits = new_floats((size_t)q3n_model_vocab_size(q3n_session_model(s)));
    int32_t token = 4;
    for (int i = 0; i < 10; i++) {
        int n = 0;
        must(s, q3n_session_decode(s, token, &token, 1, &n), Q3N_OK);
        must(s, q3n_session_logits(s, logits), Q3N_OK);
        assert_int_equal(token, sample(twin, logits));
    }
    free(logits);
}

/* A sampler begins anew where it takes the place of another; what changes the text leaves it as it
 * is, but for a reset. */
static void test_another_sampler(void **state)
{
    (void)state;
    static const q3n_sampler_options so[2] = {
        { .size = sizeof *so, .temperature = 2.0f, .seed = 3, .repetition_penalty = 1.5f },
        { .size = sizeof *so, .temperature = 1.5f, .seed = 4, .top_k = 50 } };
    const int32_t ids[6] = { 1, 2, 3, 7, 8, 9 };
    heap h = { 0 };
    q3n_model *m = open_model("qwen3_next", &h);
    const q3n_session_options o = plain_options(40);
    q3n_session *s = create_session(m, &o);
    must(s, q3n_session_eval(s, ids, 6, NULL), Q3N_OK);
    const int live = h.live;
    for (int i = 0; i < 4; i++) {
        q3n_sampler *twin = NULL;
        set_sampler(s, so[i % 2]);
        assert_int_equal(h.live, live + 1);
        assert_int_equal(q3n_sampler_create(&twin, m, &so[i % 2], NULL), Q3N_OK);
        check_choices(s, twin);
        must(s, q3n_session_prefill(s, ids, 3, NULL, NULL), Q3N_OK);
        check_choices(s, twin);
        must(s, q3n_session_rewind(s, 2), Q3N_OK);
        must(s, q3n_session_eval(s, ids + 2, 4, NULL), Q3N_OK);
        check_choices(s, twin);
        q3n_session_reset(s);
        q3n_sampler_reset(twin);
        must(s, q3n_session_prefill(s, ids, 6, NULL, NULL), Q3N_OK);
        check_choices(s, twin);
        q3n_sampler_destroy(twin);
    }
    q3n_session_destroy(s);
    q3n_model_close(m);
    assert_int_equal(h.live, 0);
}

/* ---- All of them ---- */
int main(int argc, char **argv)
{
    const struct CMUnitTest threaded[] = {
        CASE(test_batch_tokens, qwen3_next),
        CASE(test_batch_few, qwen3_next),
        CASE(test_batch_turns, qwen3_next),
        CASE(test_many_pages, qwen3_moe),
        CASE(test_reevaluate, qwen3_next_mtp),
        CASE(test_cancel, qwen3_moe),
        CASE(test_threads, qwen3_next),
        CASE(test_threads, qwen3_next_mtp),
        CASE(test_threads, qwen3_moe),
    };
    const struct CMUnitTest tests[] = {
        CASE(test_cache_counts, qwen3_next), CASE(test_cache_counts, qwen3_moe),
        CASE(test_cache_isa, qwen3_next),
        CASE(test_cache, qwen3_next),
        CASE(test_cache, qwen3_moe),
        CASE(test_snapshot_every, qwen3_next),
        CASE(test_snapshot_every, qwen3_next_mtp),
        CASE(test_snapshot_every, qwen3_moe),
        CASE(test_reuse, qwen3_next),
        CASE(test_reuse, qwen3_dense),
        CASE(test_reuse, qwen3_next_mtp),
        CASE(test_reevaluate, qwen3_next),
        CASE(test_reevaluate, qwen3_dense),
        CASE(test_cache_bound, qwen3_next),
        CASE(test_cache_bound, qwen3_dense),
        cmocka_unit_test(test_snapshots_bf16),
        cmocka_unit_test(test_strangers),
        cmocka_unit_test(test_sampler),
        cmocka_unit_test(test_another_sampler),
        cmocka_unit_test(test_options),
        cmocka_unit_test(test_both_ways),
        cmocka_unit_test(test_classifier),
        cmocka_unit_test(test_expert_counts),
        cmocka_unit_test(test_memory),
        CASE(test_batch_tokens, qwen3_moe),
        CASE(test_batch_time, qwen3_next),
        cmocka_unit_test(test_batch_errors),
        CASE(test_cancel, qwen3_next_mtp),
        cmocka_unit_test(test_module_or_not),
        cmocka_unit_test(test_module_memory),
        cmocka_unit_test(test_beyond_the_context),
        cmocka_unit_test(test_cancel_between),
        cmocka_unit_test(test_cancel_one),
        cmocka_unit_test(test_cancel_ready),
        CASE(test_cancel_from_signal, qwen3_next_mtp),
        CASE(test_cancel_from_signal, qwen3_moe),
        CASE(test_other_process, qwen3_next_mtp),
        CASE(test_other_process, qwen3_dense),
    };
    program = argv[0];
    if (argc == 6 && strcmp(argv[1], OTHER_PROCESS) == 0) return continue_session(argv);
    const int failed = cmocka_run_group_tests(threaded, NULL, NULL);
    return failed + (THREADS_ALONE ? 0 : cmocka_run_group_tests(tests, NULL, NULL));
}
