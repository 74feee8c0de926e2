/* test_model.c - the forward pass against results recorded from the reference implementations of
 * every family, layer by layer; and the promise that no bit of a result depends on how a text is
 * cut into calls, on threads, on batch sizes or on who runs the threads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "q3n_make.h"
#include "failing.h"
#include "isas.h"
#include "sessions.h"

/* ---- Models and sessions ---- */
static q3n_engine_options engine_of(q3n_isa isa)
{
    q3n_engine_options o = one_thread;
    o.isa = isa;
    return o;
}

static q3n_session_options options_of(const q3n_engine_options *engine)
{
    q3n_session_options o = Q3N_INIT(q3n_session_options);
    o.capacity = 256;
    o.engine_options = engine;
    return o;
}

static q3n_isa isa_of(const q3n_session *s) { return q3n_engine_isa(q3n_session_engine(s)); }

static float *new_logits(const q3n_model *m, int n)
{
    return new_floats((size_t)n * (size_t)q3n_model_config(m)->vocab_size);
}

static void evaluate(q3n_session *s, const int32_t *ids, int n, float *all_logits)
{
    const q3n_outputs out = { .size = sizeof out, .all_logits = all_logits };
    if (q3n_session_eval_outputs(s, ids, n, &out) != Q3N_OK)
        fail_msg("%s", q3n_session_error(s)->message);
}

/* ---- Comparing with recorded numbers ---- */
static double largest(const double *x, int n)
{
    double m = 0.0;
    for (int i = 0; i < n; i++) m = fmax(m, fabs(x[i]));
    return m;
}

static void check_near(const float *got, const double *want, int n, double bound, const char *what)
{
    for (int i = 0; i < n; i++)
        if (!(fabs(got[i] - want[i]) <= bound))
            fail_msg("%s: element %d is %.7g, expected %.7g within %.2g", what, i, (double)got[i],
                     want[i], bound);
}

static double log_probability(const float *logits, int n, int id)
{
    double sum = 0.0;
    const double top = logits[argmax(logits, n)];
    for (int i = 0; i < n; i++) sum += exp(logits[i] - top);
    return logits[id] - top - log(sum);
}

/* ---- Goldens of the published families ---- */

/* Last token's row after each layer: [0] the embeddings, [l + 1] layer l, [layers + 1] the norm. */
typedef struct {
    float *rows;
    int    d, n_calls;
} trace;

static void trace_layer(void *user, int l, const float *x, int n, int d)
{
    trace *t = (trace *)user;
    assert_int_equal(d, t->d);
    assert_int_equal(l, t->n_calls - 1);
    memcpy(t->rows + (size_t)(l + 1) * (size_t)d, x + (size_t)(n - 1) * (size_t)d,
           (size_t)d * sizeof *x);
    t->n_calls++;
}

static trace trace_new(const q3n_model *m)
{
    const q3n_config *c = q3n_model_config(m);
    const trace t = { new_floats((size_t)(c->num_hidden_layers + 2) * (size_t)c->hidden_size),
                      c->hidden_size, 0 };
    return t;
}

/* The recorded rows are written with six decimals (5e-7 off) and computed in float32, as ours are,
 * with sums in another order.  An output sums 64 to 400 products, a few layers follow one another,
 * and errors grow like sqrt(terms) eps relative to the largest element: 1e-5 of that is four times
 * the largest seen in these models, and far below what a wrong formula does. */
#define HIDDEN_BOUND(scale) (1e-6 + 1e-5 * (scale))

static void check_hidden(const q3n_model *m, const trace *t, const char *want, const char *what)
{
    const int layers = q3n_model_config(m)->num_hidden_layers;
    char text[200];
    assert_int_equal(t->n_calls, layers + 2);
    assert_int_equal(golden_length(want), layers + 1);
    for (int i = 0; i <= layers; i++) {
        int n;
        const char *row = golden_next(&want);
        double *x = golden_numbers(row, &n);
        assert_int_equal(n, t->d);
        const int behind = i < layers ? i : layers + 1;   /* the last: after the final norm */
        snprintf(text, sizeof text, "%s: hidden state %d of %d", what, i, layers);
        check_near(t->rows + (size_t)behind * (size_t)t->d, x, n, HIDDEN_BOUND(largest(x, n)),
                   text);
        free(x);
    }
}

static void check_logits(const q3n_model *m, const float *logits, int n, const int32_t *ids,
                         const char *golden, const char *what)
{
    const int V = q3n_model_config(m)->vocab_size;
    int count;
    double *x = golden_numbers(golden_member(golden, "last_logits"), &count);
    assert_int_equal(count, V);
    check_near(logits + (size_t)(n - 1) * (size_t)V, x, V, 5e-5 * largest(x, V), what);
    free(x);
    x = golden_numbers(golden_member(golden, "token_logprobs"), &count);
    assert_int_equal(count, n - 1);
    for (int t = 0; t + 1 < n; t++) {
        const double p = log_probability(logits + (size_t)t * (size_t)V, V, ids[t + 1]);
        if (!(fabs(p - x[t]) <= 1e-3))
            fail_msg("%s: log probability %d is %g, expected %g", what, t, p, x[t]);
    }
    free(x);
    int32_t *best = golden_ids(golden_member(golden, "argmax"), &count);
    for (int t = 0; t < count; t++)
        assert_int_equal(argmax(logits + (size_t)(n - count + t) * (size_t)V, V), best[t]);
    assert_true(count == 1 || count == n);
    free(best);
}

/* The session's log-probabilities: those of its logits, and near the recorded ones. */
static void check_log_probs(q3n_session *s, const float *logits, int n, const int32_t *ids,
                            const char *golden, const char *what)
{
    const int V = q3n_model_config(q3n_session_model(s))->vocab_size;
    int count;
    double *want = golden_numbers(golden_member(golden, "token_logprobs"), &count);
    double *got = (double *)malloc((size_t)n * sizeof *got);
    assert_non_null(got);
    assert_int_equal(q3n_session_score(s, ids, n, got), Q3N_OK);
    assert_true(got[0] == 0.0);
    for (int t = 0; t < count; t++) {
        const double p = log_probability(logits + (size_t)t * (size_t)V, V, ids[t + 1]);
        if (!(fabs(got[t + 1] - p) <= 1e-12 * fabs(p)))
            fail_msg("%s: log probability %d is %.17g, by logits %.17g", what, t, got[t + 1], p);
        if (!(fabs(got[t + 1] - want[t]) <= 1e-3))
            fail_msg("%s: log probability %d is %g, expected %g", what, t, got[t + 1], want[t]);
    }
    free(got);
    free(want);
}

/* The last token's vector: as recorded, and of length 1. */
static void check_embedding(q3n_session *s, int n, const int32_t *ids, const char *hidden,
                            const char *what)
{
    const int d = q3n_model_hidden_size(q3n_session_model(s));
    const q3n_embed_options raw = { .size = sizeof raw, .raw = 1 };
    const char *row = NULL, *next;
    int count;
    while ((next = golden_next(&hidden)) != NULL) row = next;
    double *want = golden_numbers(row, &count), sum = 0.0;
    float *got = new_floats((size_t)d);
    assert_int_equal(count, d);
    assert_int_equal(q3n_session_embed(s, ids, n, &raw, got), Q3N_OK);
    check_near(got, want, d, HIDDEN_BOUND(largest(want, d)), what);
    for (int i = 0; i < d; i++) sum += (double)got[i] * (double)got[i];
    for (int i = 0; i < d; i++) want[i] = (double)got[i] / sqrt(sum);
    assert_int_equal(q3n_session_embed(s, ids, n, NULL, got), Q3N_OK);
    check_near(got, want, d, 1e-7, "of length 1");
    free(got);
    free(want);
}

static void check_case(const q3n_model *m, q3n_isa isa, const char *golden, const char *name)
{
    int n;
    char what[160];
    int32_t *ids = golden_ids(golden_member(golden, "input_ids"), &n);
    float *logits = new_logits(m, n);
    trace t = trace_new(m);
    q3n_engine_options eo = engine_of(isa);
    eo.layer_hook = (q3n_layer_hook){ trace_layer, &t };
    const q3n_session_options o = options_of(&eo);
    q3n_session *s = create_session(m, &o);
    assert_int_equal(isa_of(s), isa);
    evaluate(s, ids, n, logits);
    snprintf(what, sizeof what, "%s, %d tokens, %s", name, n, q3n_isa_name(isa));
    const char *hidden = golden_member(golden, "hidden_last_token");
    if (hidden) check_hidden(m, &t, hidden, what);
    check_logits(m, logits, n, ids, golden, what);
    q3n_session_destroy(s);
    eo.layer_hook = (q3n_layer_hook){ NULL, NULL };
    s = create_session(m, &o);
    check_log_probs(s, logits, n, ids, golden, what);
    if (hidden) check_embedding(s, n, ids, hidden, what);
    q3n_session_destroy(s);
    free(t.rows);
    free(logits);
    free(ids);
}

static void check_greedy(const q3n_model *m, q3n_isa isa, const char *golden)
{
    int n, n_out;
    const int V = q3n_model_config(m)->vocab_size;
    int32_t *ids = golden_ids(golden_member(golden, "prompt_ids"), &n);
    int32_t *want = golden_ids(golden_member(golden, "output_ids"), &n_out);
    float *logits = new_logits(m, 1);
    const q3n_engine_options eo = engine_of(isa);
    const q3n_session_options o = options_of(&eo);
    q3n_session *s = create_session(m, &o);
    assert_true(n_out > 0);
    assert_int_equal(q3n_session_eval(s, ids, n, logits), Q3N_OK);
    for (int i = 0; i < n_out; i++) {
        const int32_t id = argmax(logits, V);
        assert_int_equal(id, want[i]);
        assert_int_equal(q3n_session_eval(s, &id, 1, logits), Q3N_OK);
    }
    q3n_session_destroy(s);
    free(logits);
    free(want);
    free(ids);
}

static char *read_golden(const char *name, const char *file)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s/%s", Q3N_TEST_GOLDEN, name, file);
    return golden_read(path);
}

static void test_golden(void **state)
{
    const char *name = (const char *)*state;
    q3n_model *m = open_model(name, NULL);
    char *golden = read_golden(name, "golden.json");
    const char *cases = golden_member(golden, "cases"), *greedy = golden_member(golden, "greedy");
    assert_true(golden_length(cases) >= 2);
    for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {
        if (!isa_runs(isa, __func__)) continue;
        const char *p = cases, *one;
        while ((one = golden_next(&p)) != NULL) check_case(m, isa, one, name);
        if (greedy) check_greedy(m, isa, greedy);
    }
    free(golden);
    q3n_model_close(m);
}

static void test_golden_classifier(void **state)
{
    const char *name = (const char *)*state;
    q3n_model *m = open_model(name, NULL);
    char *golden = read_golden(name, "golden.json");
    const int n_labels = q3n_model_config(m)->num_labels;
    for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {
        if (!isa_runs(isa, __func__)) continue;
        const char *p = golden_member(golden, "cases"), *one;
        while ((one = golden_next(&p)) != NULL) {
            int n, count;
            float scores[16];
            int32_t *ids = golden_ids(golden_member(one, "input_ids"), &n);
            double *want = golden_numbers(golden_member(one, "class_logits"), &count);
            trace t = trace_new(m);
            q3n_engine_options eo = engine_of(isa);
            eo.layer_hook = (q3n_layer_hook){ trace_layer, &t };
            const q3n_session_options o = options_of(&eo);
            q3n_session *s = create_session(m, &o);
            assert_int_equal(count, n_labels);
            assert_int_equal(q3n_session_classify(s, ids, n, scores), Q3N_OK);
            check_near(scores, want, n_labels, 5e-5 * largest(want, n_labels), name);
            if (golden_member(one, "hidden_last_token"))
                check_hidden(m, &t, golden_member(one, "hidden_last_token"), name);
            q3n_session_destroy(s);
            free(t.rows);
            free(want);
            free(ids);
        }
    }
    free(golden);
    q3n_model_close(m);
}

/* Checkpoints of the design model: logits of every token of every row.  Float32 of another library:
 * the same bound as for logits. */
static void test_golden_keras(void **state)
{
    const char *name = (const char *)*state;
    char file[200];
    snprintf(file, sizeof file, "%s.json", name);
    q3n_model *m = open_model(name, NULL);
    char *golden = read_golden("keras", file);
    const int V = q3n_model_config(m)->vocab_size;
    const char *one = golden_member(golden, "nomask");
    if (!one) one = golden_member(golden, "nomask_bidirectional");
    assert_non_null(one);
    const char *inputs = golden_member(one, "input_ids"), *outputs = golden_member(one, "output");
    const char *row;
    while ((row = golden_next(&inputs)) != NULL) {
        int n, count;
        int32_t *ids = golden_ids(row, &n);
        double *want = golden_numbers(golden_next(&outputs), &count);
        assert_int_equal(count, n * V);
        for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {
            if (!isa_runs(isa, __func__)) continue;
            const q3n_engine_options eo = engine_of(isa);
            q3n_session_options o = options_of(&eo);
            o.capacity = n;
            float *logits = new_logits(m, n);
            q3n_session *s = create_session(m, &o);
            evaluate(s, ids, n, logits);
            check_near(logits, want, count, 5e-5 * largest(want, count), name);
            q3n_session_destroy(s);
            free(logits);
        }
        free(want);
        free(ids);
    }
    assert_null(golden_next(&outputs));
    free(golden);
    q3n_model_close(m);
}

/* ---- Not a bit depends on how the work is cut ---- */

/* Sizes of the pieces a text is given in, repeated until it ends. */
typedef struct {
    const char *name;
    int         size[9];         /* up to the first 0                                            */
} cutting;

static const cutting cuttings[] = {
    { "token by token", { 1 } },
    { "uneven pieces",  { 7, 1, 64, 2, 33, 4, 3 } },
};

static void evaluate_cut(q3n_session *s, const int32_t *ids, int n, const cutting *cut,
                         float *logits)
{
    const size_t V = (size_t)q3n_model_config(s->model)->vocab_size;
    for (int at = 0, i = 0; at < n; i++) {
        if (cut->size[i] == 0) i = 0;
        const int some = cut->size[i] < n - at ? cut->size[i] : n - at;
        evaluate(s, ids + at, some, logits + (size_t)at * V);
        at += some;
    }
}

typedef struct {
    const q3n_model *m;
    const int32_t   *ids;
    int              n;
    const float     *want;       /* [n, vocab]: one call, one thread                             */
} identity;

static void check_identity(const identity *id, const q3n_session_options *o, const cutting *cut)
{
    char what[200];
    float *logits = new_logits(id->m, id->n);
    q3n_session *s = create_session(id->m, o);
    if (cut) evaluate_cut(s, id->ids, id->n, cut, logits);
    else     evaluate(s, id->ids, id->n, logits);
    snprintf(what, sizeof what, "%s, %s, %d threads, batch %d", cut ? cut->name : "one call",
             q3n_isa_name(isa_of(s)), o->engine_options->n_threads, o->engine_options->batch_size);
    check_same(logits, id->want, (size_t)id->n * (size_t)q3n_model_config(id->m)->vocab_size, what);
    q3n_session_destroy(s);
    free(logits);
}

/* The same for every test, whichever ran before. */
static int32_t *random_ids(int n, int vocab)
{
    uint32_t random_state = 7;
    int32_t *ids = (int32_t *)malloc((size_t)n * sizeof *ids);
    assert_non_null(ids);
    for (int i = 0; i < n; i++) {
        random_state = random_state * 1664525u + 1013904223u;
        ids[i] = (int32_t)((random_state >> 8) % (uint32_t)vocab);
    }
    return ids;
}

static void check_threads(const identity *id, q3n_isa isa)
{
    q3n_engine_options eo = engine_of(isa);
    const q3n_session_options o = options_of(&eo);
    static const int threads[] = { 1, 2, 3, 7 }, batches[] = { 1, 5, 64 };
    for (int i = 0; i < COUNT(threads); i++)
        for (int k = 0; k < COUNT(batches); k++) {
            eo.n_threads = threads[i];
            eo.batch_size = batches[k];
            check_identity(id, &o, NULL);
        }
    int calls = 0;
    eo.executor = (q3n_executor){ run_backwards, &calls, 3 };
    check_identity(id, &o, NULL);
    assert_true(calls > 0);
}

static void check_all_cuttings(const q3n_model *m, q3n_isa isa, const int32_t *ids, int n)
{
    const q3n_engine_options eo = engine_of(isa);
    const q3n_session_options o = options_of(&eo);
    float *want = new_logits(m, n);
    q3n_session *s = create_session(m, &o);
    evaluate(s, ids, n, want);
    const identity id = { m, ids, n, want };
    for (int i = 0; i < COUNT(cuttings); i++) check_identity(&id, &o, &cuttings[i]);
    if (isa == q3n_isa_best()) check_threads(&id, isa);

    /* logits of the last token alone, with and without all others; then the same session anew */
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    float *again = new_logits(m, n), *last = new_logits(m, 1);
    q3n_session_reset(s);
    assert_int_equal(q3n_session_length(s), 0);
    assert_int_equal(q3n_session_eval(s, ids, n, last), Q3N_OK);
    check_same(last, want + (size_t)(n - 1) * V, V, "last logits alone");
    q3n_session_reset(s);
    const q3n_outputs both = { .size = sizeof both, .logits = last, .all_logits = again };
    assert_int_equal(q3n_session_eval_outputs(s, ids, n, &both), Q3N_OK);
    check_same(again, want, (size_t)n * V, "again after a reset");
    check_same(last, want + (size_t)(n - 1) * V, V, "last logits beside all");
    q3n_session_destroy(s);
    free(last);
    free(again);
    free(want);
}

static void test_identity(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const int n = 70;
    int32_t *ids = random_ids(n, q3n_model_config(m)->vocab_size);
    for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa))
        if (isa_runs(isa, __func__)) check_all_cuttings(m, isa, ids, n);
    free(ids);
    q3n_model_close(m);
}

/* A model that attends both ways takes a text whole; threads and executor must not matter. */
static void test_identity_bidirectional(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    int32_t *ids = random_ids(9, q3n_model_config(m)->vocab_size);
    for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {
        if (!isa_runs(isa, __func__)) continue;
        q3n_engine_options eo = engine_of(isa);
        q3n_session_options o = options_of(&eo);
        o.capacity = 9;
        float *want = new_logits(m, 9);
        q3n_session *s = create_session(m, &o);
        evaluate(s, ids, 9, want);
        assert_int_equal(q3n_session_eval(s, ids, 1, NULL), Q3N_ERR_FULL);
        q3n_session_reset(s);
        assert_int_equal(q3n_session_eval(s, ids, 8, NULL), Q3N_OK);
        assert_int_equal(q3n_session_eval(s, ids, 1, NULL), Q3N_ERR_UNSUPPORTED);
        assert_int_equal(q3n_session_length(s), 8);
        q3n_session_destroy(s);
        const identity id = { m, ids, 9, want };
        for (eo.n_threads = 2; eo.n_threads <= 7; eo.n_threads++) check_identity(&id, &o, NULL);
        eo.batch_size = 8;
        s = create_session(m, &o);
        assert_int_equal(q3n_session_eval(s, ids, 9, NULL), Q3N_ERR_UNSUPPORTED);
        q3n_session_destroy(s);
        free(want);
    }
    free(ids);
    q3n_model_close(m);
}

/* Under a sanitizer the scalar kernels would take most of the time: long texts and quantised models
 * are for the others there.  test_kernels and the goldens check all. */
static int is_too_slow(q3n_isa isa)
{
    return SLOW && isa == Q3N_ISA_SCALAR && q3n_isa_best() != Q3N_ISA_SCALAR;
}

/* More than two blocks of the KV cache.  With several threads, calls of up to four tokens split
 * attention by blocks; with one thread nothing is split. */
static void test_identity_long(void **state)
{
    static const cutting one = { "token by token", { 1 } };
    static const cutting few = { "255, then few at a time", { 255, 2, 3, 4, 1, 2, 3, 5 } };
    static const cutting edges = { "over the edges of blocks", { 254, 4, 252, 4, 150 } };
    q3n_model *m = open_model((const char *)*state, NULL);
    const int n = SLOW ? 530 : 700;
    int32_t *ids = random_ids(n, q3n_model_config(m)->vocab_size);
    for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {
        if (is_too_slow(isa) || !isa_runs(isa, __func__)) continue;
        q3n_engine_options eo = engine_of(isa);
        q3n_session_options o = options_of(&eo);
        o.capacity = 1024;
        float *want = new_logits(m, n);
        q3n_session *s = create_session(m, &o);
        evaluate(s, ids, n, want);
        q3n_session_destroy(s);
        const identity id = { m, ids, n, want };
        const int alone = !SLOW || isa == q3n_isa_best();    /* a call in eight of few is, too */
        if (alone) check_identity(&id, &o, &one);
        int calls = 0;
        eo.executor = (q3n_executor){ run_backwards, &calls, 4 };
        check_identity(&id, &o, &few);
        if (alone) check_identity(&id, &o, &one);
        assert_true(calls > 0);
        eo.executor.run = NULL;
        eo.n_threads = 2;
        check_identity(&id, &o, &few);
        check_identity(&id, &o, &edges);
        eo.n_threads = 3;
        eo.batch_size = 64;
        check_identity(&id, &o, &edges);
        if (isa == q3n_isa_best()) check_identity(&id, &o, &one);
        free(want);
    }
    free(ids);
    q3n_model_close(m);
}

/* ---- Attention over several blocks, against its definition ---- */
typedef struct {
    q3n_session *s;
    int          n_layers, n_attention, n, checked;      /* n: tokens of the whole text          */
} attention_check;

/* All tokens; under sanitizers, where comparing is most of the work, the last and one in seven. */
static int is_compared(const attention_check *c, int token)
{
    return !SLOW || token % 7 == 0 || token >= c->n - 8;
}

/* After the last layer, which is an attention layer, the run still has its queries (scaled) and
 * outputs: [kv head][token][head of the group][D].  Each is compared with softmax(q k') v in double
 * precision over all keys of the cache.  A score is off by a few eps times the products it sums, a
 * weight by as much of itself, an output by a few times that of the largest value: 1e-6 is eight
 * times eps. */
static void check_attention(void *user, int l, const float *x, int n, int d)
{
    attention_check *c = (attention_check *)user;
    if (l != c->n_layers - 1) return;
    const q3n__pass *r = &c->s->engine->run;
    const q3n__kv_cache *kv = &c->s->state.kv;
    const int g = r->model->config.num_attention_heads / kv->n_kv_heads, D = kv->dim;
    const size_t B = Q3N__KV_BLOCK;
    (void)x;
    (void)d;
    for (int i = 0; i < kv->n_kv_heads * n * g; i++) {
        const int head = i / (n * g), last = c->s->state.length + i / g % n;
        if (!is_compared(c, last)) continue;
        const float *q = r->q + (size_t)i * (size_t)D, *got = r->attn + (size_t)i * (size_t)D;
        double out[256] = { 0.0 }, sum = 0.0, top = 0.0, largest_value = 0.0;
        for (int pass = 0; pass < 2; pass++)
            for (int j = 0; j <= last; j++) {
                const float *k = (const float *)(const void *)
                    q3n__kv_block(kv, c->n_attention - 1, j / (int)B, head);
                const float *v = k + (size_t)D * B + (size_t)j % B * (size_t)D;
                double score = 0.0;
                for (int a = 0; a < D; a++)
                    score += (double)q[a] * (double)k[(size_t)a * B + (size_t)j % B];
                if (pass == 0) {
                    top = j == 0 || score > top ? score : top;
                    continue;
                }
                const double p = exp(score - top);
                sum += p;
                for (int a = 0; a < D; a++) {
                    out[a] += p * (double)v[a];
                    largest_value = fmax(largest_value, fabs((double)v[a]));
                }
            }
        for (int a = 0; a < D; a++)
            if (!(fabs(out[a] / sum - (double)got[a]) <= 1e-6 * largest_value))
                fail_msg("query %d after %d keys: %.8g, expected %.8g", i, last, (double)got[a],
                         out[a] / sum);
        c->checked++;
    }
}

static void test_attention_long(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const int n = 700;
    int32_t *ids = random_ids(n, q3n_model_config(m)->vocab_size);
    for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {
        if (is_too_slow(isa) || !isa_runs(isa, __func__)) continue;
        for (int n_threads = 1; n_threads <= 2; n_threads++) {   /* two split few tokens */
            attention_check c = { .n_layers = q3n_model_config(m)->num_hidden_layers, .n = n };
            for (int l = 0; l < c.n_layers; l++) c.n_attention += !m->layers[l].is_delta;
            q3n_engine_options eo = engine_of(isa);
            eo.batch_size = 100;
            eo.n_threads = n_threads;
            eo.layer_hook = (q3n_layer_hook){ check_attention, &c };
            q3n_session_options o = options_of(&eo);
            o.capacity = 1024;
            c.s = create_session(m, &o);
            assert_true(c.n_attention > 0 && !m->layers[c.n_layers - 1].is_delta);
            assert_int_equal(q3n_session_eval(c.s, ids, n - 4, NULL), Q3N_OK);
            assert_int_equal(q3n_session_eval(c.s, ids + n - 4, 3, NULL), Q3N_OK);
            assert_int_equal(q3n_session_eval(c.s, ids + n - 1, 1, NULL), Q3N_OK);
            int compared = 0;
            for (int i = 0; i < n; i++) compared += is_compared(&c, i);
            assert_int_equal(c.checked, compared * q3n_model_config(m)->num_attention_heads);
            q3n_session_destroy(c.s);
        }
    }
    free(ids);
    q3n_model_close(m);
}

/* ---- KV cache types ---- */

/* A key or value in f16 is off by at most 2^-12 of itself, in bf16 by 2^-9, in q8 by 2^-8 of the
 * largest of its head; the logits move by less than that, relative to the largest; the bounds
 * leave room for other ids. */
static void test_kv_types(void **state)
{
    static const struct { q3n_type type; double bound; } rows[] = {
        { Q3N_TYPE_F16, 0x1p-10 }, { Q3N_TYPE_BF16, 0x1p-7 }, { Q3N_TYPE_Q8, 0x1p-6 },
    };
    q3n_model *m = open_model((const char *)*state, NULL);
    const int n = 70, V = q3n_model_config(m)->vocab_size;
    int32_t *ids = random_ids(n, V);
    for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {
        if (!isa_runs(isa, __func__)) continue;
        const q3n_engine_options eo = engine_of(isa);
        q3n_session_options o = options_of(&eo);
        float *want = new_logits(m, 1), *got = new_logits(m, 1), *piecewise = new_logits(m, n);
        q3n_session *s = create_session(m, &o);
        assert_int_equal(q3n_session_eval(s, ids, n, want), Q3N_OK);
        q3n_session_destroy(s);
        double scale = 0.0;
        for (int i = 0; i < V; i++) scale = fmax(scale, fabs((double)want[i]));
        for (int k = 0; k < COUNT(rows); k++) {
            o.kv_type = rows[k].type;
            s = create_session(m, &o);
            assert_int_equal(q3n_session_eval(s, ids, n, got), Q3N_OK);
            for (int i = 0; i < V; i++)
                if (!(fabs((double)got[i] - (double)want[i]) <= rows[k].bound * scale))
                    fail_msg("KV %s, %s: logit %d is %g, with f32 %g", q3n_type_name(rows[k].type),
                             q3n_isa_name(isa), i, (double)got[i], (double)want[i]);
            assert_memory_not_equal(got, want, (size_t)V * sizeof *got);
            q3n_session_reset(s);
            evaluate_cut(s, ids, n, &cuttings[1], piecewise);
            check_same(piecewise + (size_t)(n - 1) * (size_t)V, got, (size_t)V,
                       "KV type, in pieces");
            q3n_session_destroy(s);
        }
        free(piecewise);
        free(got);
        free(want);
    }
    free(ids);
    q3n_model_close(m);
}

/* ---- Quantised models: cuts and threads change no bit; near the original ---- */

/* An expert that changes places with another is a jump in the logits, which says nothing of the
 * arithmetic; with every expert chosen there is none. */
static q3n_model *with_all_experts(q3n_model *m)
{
    m->config.num_experts_per_tok = m->config.num_experts;
    return m;
}

static q3n_model *quantised(const q3n_model *m, const char *recipe, int again)
{
    const q3n_quantize_options o = { .size = sizeof o, .recipe = recipe, .n_threads = 2,
                                     .allow_requantize = again };
    char path[64];
    q3n_model *made = NULL;
    q3n_error err;
    snprintf(path, sizeof path, "build/test_model_%ld.q3n", (long)getpid());
    if (q3n_quantize_file(path, m, &o, &err) != Q3N_OK) fail_msg("%s", err.message);
    if (q3n_model_open(&made, path, NULL, &err) != Q3N_OK) fail_msg("%s", err.message);
    remove(path);
    return made;
}

/* Of all logits of a text, the root of mean squares. */
static double relative_error(const q3n_model *a, const q3n_model *b, q3n_isa isa,
                             const int32_t *ids, int n)
{
    const q3n_engine_options eo = engine_of(isa);
    const q3n_session_options o = options_of(&eo);
    float *want = new_logits(a, n), *got = new_logits(b, n);
    q3n_session *s[2] = { create_session(a, &o), create_session(b, &o) };
    evaluate(s[0], ids, n, want);
    evaluate(s[1], ids, n, got);
    double size = 0.0, error = 0.0;
    for (int i = 0; i < n * q3n_model_config(a)->vocab_size; i++) {
        const double off = (double)got[i] - (double)want[i];
        size += (double)want[i] * (double)want[i];
        error += off * off;
    }
    for (int i = 0; i < 2; i++) q3n_session_destroy(s[i]);
    free(got);
    free(want);
    return sqrt(error / size);
}

/* Against the same weights in f32 only activations differ, by their rounding to bytes: at most
 * 0.055 in twelve texts of each model and recipe, and one wrong row of 70 is 0.12.  The bounds
 * against the original are 1.5 times the largest of the same texts: 0.060, 0.39, 0.30. */
#define SAME_WEIGHTS_BOUND 0.1

static void test_quantised(void **state)
{
    static const struct { const char *recipe; double bound; } rows[] = {
        { "q8", 0.1 }, { "q4", 0.6 }, { "q3", 0.45 },
    };
    q3n_model *m = open_model((const char *)*state, NULL);
    q3n_model *all = with_all_experts(open_model((const char *)*state, NULL));
    const int n = 70;
    int32_t *ids[2];
    for (int t = 0; t < COUNT(ids); t++) ids[t] = random_ids(n, q3n_model_config(m)->vocab_size);
    for (int k = 0; k < COUNT(rows); k++) {
        q3n_model *small = quantised(m, rows[k].recipe, 0);
        q3n_model *same = with_all_experts(quantised(small, "f32", 1));
        for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa))
            if (!is_too_slow(isa) && isa_runs(isa, __func__))
                check_all_cuttings(small, isa, ids[0], n);
        with_all_experts(small);
        for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {
            if (is_too_slow(isa) || !isa_runs(isa, __func__)) continue;
            for (int t = 0; t < COUNT(ids); t++) {
                const double arithmetic = relative_error(same, small, isa, ids[t], n);
                const double weights = relative_error(all, small, isa, ids[t], n);
                if (!(arithmetic <= SAME_WEIGHTS_BOUND && arithmetic > 0.0)
                    || !(weights <= rows[k].bound))
                    fail_msg("%s, %s, text %d: the logits are off by %.3g of those of the same "
                             "weights in f32, %.3g of the original's", rows[k].recipe,
                             q3n_isa_name(isa), t, arithmetic, weights);
            }
        }
        q3n_model_close(same);
        q3n_model_close(small);
    }
    for (int t = 0; t < COUNT(ids); t++) free(ids[t]);
    q3n_model_close(all);
    q3n_model_close(m);
}

/* ---- Errors leave the session as it was ---- */
static memory_file state_of(q3n_session *s)
{
    memory_file f = { 0 };
    must(s, save_to(&f, s, SIZE_MAX), Q3N_OK);
    return f;
}

static void check_state(const memory_file *before, q3n_session *s)
{
    memory_file now = state_of(s);
    assert_int_equal(now.n, before->n);
    assert_memory_equal(now.bytes, before->bytes, now.n);
    free(now.bytes);
}

static void test_errors_change_nothing(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const int V = q3n_model_config(m)->vocab_size;
    int32_t *ids = random_ids(40, V);
    q3n_engine_options eo = one_thread;
    eo.batch_size = 4;
    q3n_session_options o = options_of(&eo);
    o.capacity = 20;
    float *want = new_logits(m, 20), *got = new_logits(m, 20);
    q3n_session *s = create_session(m, &o);
    evaluate(s, ids, 20, want);
    q3n_session_reset(s);
    evaluate(s, ids, 15, got);
    const memory_file before = state_of(s);

    int32_t bad[5] = { 1, 2, 3, 4, V };              /* the first batch of four is valid */
    assert_int_equal(q3n_session_eval(s, bad, 5, got), Q3N_ERR_ARG);
    check_state(&before, s);
    bad[4] = -1;
    assert_int_equal(q3n_session_eval(s, bad, 5, got), Q3N_ERR_ARG);
    check_state(&before, s);
    bad[4] = INT32_MIN;
    assert_int_equal(q3n_session_eval(s, bad, 5, NULL), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_error(s)->code, Q3N_ERR_ARG);
    assert_non_null(strstr(q3n_session_error(s)->message, "token 4"));
    assert_int_equal(q3n_session_eval(s, ids, 6, got), Q3N_ERR_FULL);
    assert_int_equal(q3n_session_error(s)->code, Q3N_ERR_FULL);
    check_state(&before, s);
    assert_int_equal(q3n_session_eval(s, ids, INT_MAX, got), Q3N_ERR_FULL);
    assert_int_equal(q3n_session_eval(s, ids, 0, got), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_eval(s, ids, -1, got), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_eval(s, NULL, 1, got), Q3N_ERR_ARG);
    if (q3n_model_config(m)->num_labels == 0) {
        float scores[16];
        const q3n_result r = q3n_session_classify(s, ids, 2, scores);
        assert_int_equal(r, Q3N_ERR_UNSUPPORTED);
    }
    check_state(&before, s);

    evaluate(s, ids + 15, 5, got + (size_t)15 * (size_t)V);
    check_same(got + (size_t)15 * (size_t)V, want + (size_t)15 * (size_t)V, 5 * (size_t)V,
               "after errors");
    assert_int_equal(q3n_session_eval(s, ids, 1, got), Q3N_ERR_FULL);
    q3n_session_destroy(s);
    free(before.bytes);
    free(got);
    free(want);
    free(ids);
    q3n_model_close(m);
}

/* ---- Scores and vectors of texts ---- */

/* The text cut into calls of so many tokens; each goes on from the logits of the one before. */
static void check_scores_cut(q3n_session *s, const int32_t *ids, int n, int step,
                             const double *want)
{
    double *got = (double *)malloc((size_t)n * sizeof *got);
    assert_non_null(got);
    q3n_session_reset(s);
    for (int i = 0; i < n; i += step)
        assert_int_equal(q3n_session_score(s, ids + i, n - i < step ? n - i : step, got + i),
                         Q3N_OK);
    assert_int_equal(q3n_session_length(s), n);
    assert_memory_equal(got, want, (size_t)n * sizeof *got);
    free(got);
}

/* The same bits however the text is cut, on engines of their own with room for few rows of logits
 * and on one for many sessions; afterwards the session is one that has evaluated the text. */
static void test_scores(void **state)
{
    enum { N = 70 };
    q3n_model *m = open_model((const char *)*state, NULL);
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    int32_t *ids = random_ids(N, (int)V);
    float *rows = new_logits(m, N), *last = new_logits(m, 1);
    double want[N];
    static const int batches[] = { 1, 5, 64 }, steps[] = { 1, 7, 33, N };
    for (int own = 0; own < 2; own++)
        for (int k = 0; k < COUNT(batches); k++) {
            q3n_engine_options eo = engine_of(q3n_isa_best());
            eo.batch_size = batches[k];
            eo.n_threads = 1 + k;
            q3n_session_options o = options_of(&eo);
            q3n_engine *e = NULL;
            if (!own) {
                assert_int_equal(q3n_engine_create(&e, m, &eo, NULL), Q3N_OK);
                o.engine = e;
                o.engine_options = NULL;
            }
            q3n_session *s = create_session(m, &o);
            if (!own && k == 0) {
                evaluate(s, ids, N, rows);
                want[0] = 0.0;
                for (int t = 1; t < N; t++)
                    want[t] = log_probability(rows + (size_t)(t - 1) * V, (int)V, ids[t]);
                q3n_session_reset(s);
                double first[N];
                assert_int_equal(q3n_session_score(s, ids, N, first), Q3N_OK);
                for (int t = 0; t < N; t++)
                    assert_true(fabs(first[t] - want[t]) <= 1e-12 * fabs(want[t]));
                memcpy(want, first, sizeof want);
            }
            for (int i = 0; i < COUNT(steps); i++) check_scores_cut(s, ids, N, steps[i], want);
            assert_int_equal(q3n_session_logits(s, last), Q3N_OK);
            check_same(last, rows + (N - 1) * V, V, "logits after a score");
            q3n_session_destroy(s);
            q3n_engine_destroy(e);
        }
    free(last);
    free(rows);
    free(ids);
    q3n_model_close(m);
}

/* Pooled by hand from all hidden states. */
static void test_embeddings(void **state)
{
    enum { N = 41 };
    q3n_model *m = open_model((const char *)*state, NULL);
    const size_t d = (size_t)q3n_model_hidden_size(m);
    int32_t *ids = random_ids(N, q3n_model_vocab_size(m));
    float *rows = new_floats(N * d), *got = new_floats(d), *again = new_floats(d);
    double *mean = (double *)calloc(d, sizeof *mean), sum = 0.0;
    assert_non_null(mean);
    q3n_engine_options eo = engine_of(q3n_isa_best());
    q3n_session_options o = options_of(&eo);
    q3n_session *s = create_session(m, &o);
    const q3n_outputs out = { .size = sizeof out, .all_hidden = rows };
    assert_int_equal(q3n_session_eval_outputs(s, ids, N, &out), Q3N_OK);
    q3n_embed_options raw = { .size = sizeof raw, .raw = 1 };
    m->pad_id = ids[N - 1];              /* Qwen3-Embedding ends texts by it: it is read */
    assert_int_equal(q3n_session_embed(s, ids, N, &raw, got), Q3N_OK);
    check_same(got, rows + (N - 1) * d, d, "last");
    assert_int_equal(q3n_session_length(s), N);
    raw.pooling = Q3N_POOLING_FIRST;
    assert_int_equal(q3n_session_embed(s, ids, N, &raw, got), Q3N_OK);
    check_same(got, rows, d, "first");
    raw.pooling = Q3N_POOLING_MEAN;
    assert_int_equal(q3n_session_embed(s, ids, N, &raw, got), Q3N_OK);
    for (size_t i = 0; i < N * d; i++) mean[i % d] += (double)rows[i] / N;
    check_near(got, mean, (int)d, N * 1.2e-7 * largest(mean, (int)d) + 1e-6, "mean");
    if (q3n_model_config(m)->causal) {
        eo.batch_size = 3;                               /* cut into passes: the same bits */
        q3n_session *small = create_session(m, &o);
        assert_int_equal(q3n_session_embed(small, ids, N, &raw, again), Q3N_OK);
        check_same(again, got, d, "mean, in passes of 3");
        q3n_session_destroy(small);
    }
    for (size_t i = 0; i < d; i++) sum += (double)got[i] * (double)got[i];
    for (size_t i = 0; i < d; i++) mean[i] = (double)got[i] / sqrt(sum);
    raw.raw = 0;
    assert_int_equal(q3n_session_embed(s, ids, N, &raw, got), Q3N_OK);
    check_near(got, mean, (int)d, 1e-7, "of length 1");
    raw.pooling = Q3N_POOLING_COUNT;
    assert_int_equal(q3n_session_embed(s, ids, N, &raw, got), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_length(s), N);
    q3n_session_destroy(s);
    free(mean);
    free(again);
    free(got);
    free(rows);
    free(ids);
    q3n_model_close(m);
}

/* Who attends both ways has no probability of what comes next. */
static void test_no_scores(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const q3n_engine_options eo = engine_of(q3n_isa_best());
    const q3n_session_options o = options_of(&eo);
    q3n_session *s = create_session(m, &o);
    const int32_t ids[3] = { 1, 2, 3 };
    double log_probs[3];
    assert_int_equal(q3n_session_score(s, ids, 3, log_probs), Q3N_ERR_UNSUPPORTED);
    assert_int_equal(q3n_session_length(s), 0);
    q3n_session_destroy(s);
    q3n_model_close(m);
}

/* ---- All of them ---- */
int main(void)
{
    const struct CMUnitTest tests[] = {
#define GOLDEN(model) CASE(test_golden, model),
        FAMILIES(GOLDEN)
        CASE(test_golden_classifier, qwen3_next_cls),
        CASE(test_golden_keras, qwen3_head_all_moe),
        CASE(test_golden_keras, seed_patched_real_rope),
        CASE(test_golden_keras, seed_patched_zero_rope),
#define IDENTITY(model) CASE(test_identity, model),
        FAMILIES_TO_TRY(IDENTITY)
        CASE(test_identity_bidirectional, seed_patched_real_rope),
        CASE(test_identity_long, qwen3_next),
        CASE(test_identity_long, qwen3_moe),
        CASE(test_attention_long, qwen3_next),
        CASE(test_attention_long, qwen3_moe),
        CASE(test_quantised, qwen3_next),
        CASE(test_quantised, qwen3_moe),
        CASE(test_kv_types, qwen3_next),
        CASE(test_kv_types, qwen3_dense_yarn),
        CASE(test_errors_change_nothing, qwen3_next),
        CASE(test_errors_change_nothing, qwen3_moe),
        CASE(test_scores, qwen3_next),
        CASE(test_scores, qwen3_next_mtp),
        CASE(test_scores, qwen3_moe),
        CASE(test_no_scores, seed_patched_real_rope),
        CASE(test_embeddings, qwen3_next),
        CASE(test_embeddings, qwen3_next_cls),
        CASE(test_embeddings, seed_patched_real_rope),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
