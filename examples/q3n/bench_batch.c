/* q3n bench --batch: decoding in many sessions at once. */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

/* One row: n sessions, each after depth tokens. */
typedef struct batch_case {
    int           n, depth, thread;      /* indices of depth and thread in bench's lists */
    bench_samples tok_s;                 /* of all sessions together */
    bench_samples ratio;                 /* to one session in the same repetition */
} batch_case;

typedef struct batch_run {
    bench          *b;
    int             max;                 /* sessions */
    q3n_engine      *engine[BENCH_LIST];  /* by threads */
    q3n_session    **session[BENCH_LIST]; /* by threads: [max] */
    q3n_snapshot   **start[BENCH_LIST];   /* by depths: [max], NULL = an empty session */
    q3n_engine_item *items;               /* [max], each with logits of its own */
    batch_case     *cases;
    int             n_cases;
} batch_run;

/* ---- Sessions after a text ---- */

/* A stream in memory for q3n_session_save_to and _load_from. */
typedef struct stream {
    cli_buffer bytes;
    size_t     at;
} stream;

static int write_stream(void *user, const void *data, size_t bytes)
{
    stream *s = user;
    cli_buffer_add(&s->bytes, data, bytes);
    return 0;
}

static int read_stream(void *user, void *data, size_t bytes)
{
    stream *s = user;
    if (bytes > s->bytes.n - s->at) return 1;
    memcpy(data, s->bytes.data + s->at, bytes);
    s->at += bytes;
    return 0;
}

/* Sessions after the same text, with pages of their own: a fork would share the first's, and less
 * memory would be read than by sessions of different texts. */
static void make_starts(batch_run *r, int depth)
{
    bench *b = r->b;
    q3n_session **s = r->session[0];
    stream copy = { .at = 0 };
    const q3n_sink sink = { write_stream, &copy };
    const q3n_source source = { read_stream, &copy };
    r->start[depth] = cli_alloc((size_t)r->max, sizeof *r->start[depth]);
    if (b->depths.value[depth] == 0) return;

    q3n_session_reset(s[0]);
    cli_eval(s[0], b->ids, b->depths.value[depth], b->logits);
    if (r->max > 1) cli_check(q3n_session_save_to(s[0], &sink), s[0]);
    for (int i = 0; i < r->max; i++) {
        copy.at = 0;
        if (i) cli_check(q3n_session_load_from(s[i], &source), s[i]);
        cli_check(q3n_session_snapshot(s[i], &r->start[depth][i]), s[i]);
    }
    cli_buffer_free(&copy.bytes);
}

static void make_sessions(batch_run *r, int thread, int room)
{
    bench *b = r->b;
    q3n_error err = { .offset = -1 };
    q3n_session_options o = bench_options(b, thread, room);
    if (q3n_engine_create(&r->engine[thread], b->m, o.engine_options, &err) != Q3N_OK) {
        cli_fail_with(b->setup.model, &err);
    }
    o.engine = r->engine[thread];
    o.engine_options = NULL;
    r->session[thread] = cli_alloc((size_t)r->max, sizeof *r->session[thread]);
    for (int i = 0; i < r->max; i++) {
        r->session[thread][i] = cli_create_session(&b->setup, b->m, &o);
    }
}

/* ---- Measuring ---- */

/* One token in each of the n first items: token t of that session. */
static void step(batch_run *r, int thread, int n, int t)
{
    const bench *b = r->b;
    for (int i = 0; i < n; i++) {
        r->items[i].tokens = b->ids + (size_t)i * ((size_t)b->n_decode + 1) + t;
        r->items[i].n      = 1;
        r->items[i].done   = 0;
    }
    if (q3n_engine_eval(r->engine[thread], r->items, n, NULL) == Q3N_OK) return;
    q3n_error err = *q3n_engine_error(r->engine[thread]);
    err.offset = -1;
    cli_fail_with("evaluation", &err);
}

/* Tokens per second.  A first token, which is not measured, takes what memory is needed. */
static double measure(batch_run *r, const batch_case *c)
{
    const bench *b = r->b;
    for (int i = 0; i < c->n; i++) {
        q3n_session *s = r->session[c->thread][i];
        const q3n_snapshot *start = r->start[c->depth][i];
        r->items[i].session = s;
        if (start) cli_check(q3n_session_restore(s, start), s);
        else       q3n_session_reset(s);
    }
    step(r, c->thread, c->n, 0);
    const double begin = cli_clock();
    for (int t = 1; t <= b->n_decode; t++) step(r, c->thread, c->n, t);
    return (double)c->n * b->n_decode / (cli_clock() - begin);
}

/* The first case of each depth and number of threads is one session. */
static void measure_round(void *user, int record)
{
    batch_run *r = user;
    double one = 0.0;
    for (int i = 0; i < r->n_cases; i++) {
        batch_case *c = &r->cases[i];
        const double tok_s = measure(r, c);
        if (c->n == 1) one = tok_s;
        if (!record) continue;
        bench_add(&c->tok_s, tok_s);
        bench_add(&c->ratio, tok_s / one);
    }
}

static void make_cases(batch_run *r)
{
    const bench *b = r->b;
    const int alone = b->batches.value[0] != 1;      /* what the others are compared with */
    r->cases = cli_alloc((size_t)(BENCH_LIST + 1) * BENCH_LIST * BENCH_LIST, sizeof *r->cases);
    for (int t = 0; t < b->threads.n; t++) {
        for (int d = 0; d < b->depths.n; d++) {
            for (int i = -alone; i < b->batches.n; i++) {
                const int n = i < 0 ? 1 : b->batches.value[i];
                r->cases[r->n_cases++] = (batch_case){ .n = n, .depth = d, .thread = t };
            }
        }
    }
}

/* ---- Output ---- */

static void print_json(const batch_run *r)
{
    const bench *b = r->b;
    bench_json_head(b);
    printf("\"batch\": [");
    for (int i = 0; i < r->n_cases; i++) {
        const batch_case *c = &r->cases[i];
        printf("%s{\"sessions\": %d, \"depth\": %d, \"threads\": %d, ", i ? ", " : "", c->n,
               b->depths.value[c->depth], b->threads.value[c->thread]);
        bench_json_samples("tok_s", &c->tok_s);
        printf(", ");
        bench_json_samples("ratio", &c->ratio);
        printf("}");
    }
    printf("]}\n");
}

static void print_text(const batch_run *r)
{
    const bench *b = r->b;
    bench_print_head(b);
    for (int i = 0; i < r->n_cases; i++) {
        const batch_case *c = &r->cases[i];
        const bench_spread tok_s = bench_spread_of(&c->tok_s);
        printf("decode at %6d  %3d threads  %4d sessions  %10.2f tokens/s (%.2f .. %.2f)"
               "  %8.2f each  %.2f x one\n", b->depths.value[c->depth],
               b->threads.value[c->thread], c->n, tok_s.median, tok_s.min, tok_s.max,
               tok_s.median / c->n, bench_median(&c->ratio));
    }
}

void bench_batch(bench *b)
{
    batch_run r = { .b = b, .max = bench_largest(&b->batches) };
    const int n_ids = r.max * (b->n_decode + 1), depth = bench_largest(&b->depths);
    if (b->n_decode == 0) cli_misuse("--batch: there must be tokens to decode (-n)");
    bench_make_ids(b, n_ids > depth ? n_ids : depth);
    const size_t vocab = (size_t)q3n_model_config(b->m)->vocab_size;
    r.items = cli_alloc((size_t)r.max, sizeof *r.items);
    for (int i = 0; i < r.max; i++) {
        r.items[i].size   = sizeof r.items[i];
        r.items[i].logits = cli_alloc(vocab, sizeof(float));
    }
    for (int t = 0; t < b->threads.n; t++) make_sessions(&r, t, depth + b->n_decode + 1);
    for (int d = 0; d < b->depths.n; d++)  make_starts(&r, d);
    make_cases(&r);
    bench_repeat(b, measure_round, &r);
    if (b->json) print_json(&r);
    else         print_text(&r);

    for (int d = 0; d < b->depths.n; d++) {
        for (int i = 0; i < r.max; i++) q3n_snapshot_free(r.start[d][i]);
        free(r.start[d]);
    }
    for (int t = 0; t < b->threads.n; t++) {
        for (int i = 0; i < r.max; i++) q3n_session_destroy(r.session[t][i]);
        q3n_engine_destroy(r.engine[t]);
        free(r.session[t]);
    }
    for (int i = 0; i < r.max; i++) free(r.items[i].logits);
    free(r.items);
    free(r.cases);
}
