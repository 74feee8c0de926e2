/* test_speculate.c - drafts against the reference implementation; generating with drafts gives the
 * tokens, or the distribution, that generating without them gives. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "isas.h"
#include "sample.h"
#include "failing.h"
#include "sessions.h"

/* ---- Drafts against the reference implementation ---- */

/* What the module drafts after each token but the last, by a session that evaluates one token at a
 * time: [n - 1] ids, and logits [n - 1, vocab] that other ways must give to the bit. */
static void drafts_one_by_one(q3n_session *s, const int32_t *ids, int n, int32_t *drafts,
                              float *logits)
{
    const size_t V = (size_t)q3n_model_config(s->model)->vocab_size;
    for (int i = 0; i + 1 < n; i++) {
        must(s, q3n_session_eval(s, ids + i, 1, NULL), Q3N_OK);
        must(s, q3n_session_draft(s, ids[i + 1], drafts + i, 1, logits + (size_t)i * V), Q3N_OK);
        assert_int_equal(q3n_session_length(s), i + 1);
    }
}

static void check_draft(q3n_session *s, const int32_t *ids, const float *logits, const char *what)
{
    const int n = q3n_session_length(s), V = q3n_model_config(s->model)->vocab_size;
    int32_t draft[2];
    float *got = new_floats((size_t)V);
    must(s, q3n_session_draft(s, ids[n], draft, 2, got), Q3N_OK);
    check_same(got, logits + (size_t)(n - 1) * (size_t)V, (size_t)V, what);
    assert_int_equal(draft[0], argmax(got, V));
    free(got);
}

/* The same drafts in a session that evaluated in one call, went back, was restored, loaded. */
static void check_draft_paths(const q3n_model *m, const q3n_session_options *o, const int32_t *ids,
                              int n, const float *logits)
{
    q3n_session *s = create_session(m, o), *other = create_session(m, o), *fork = NULL;
    q3n_snapshot *snap = NULL;
    memory_file b = { 0 };
    must(s, q3n_session_eval(s, ids, n - 1, NULL), Q3N_OK);
    check_draft(s, ids, logits, "one call");
    must(s, q3n_session_snapshot(s, &snap), Q3N_OK);
    must(s, save_to(&b, s, SIZE_MAX), Q3N_OK);
    for (int at = n - 2; at > 0; at -= 1 + at / 5) {
        must(s, q3n_session_rewind(s, at), Q3N_OK);
        check_draft(s, ids, logits, "rewound");
        must(s, q3n_session_eval(s, ids + at, 1, NULL), Q3N_OK);
        check_draft(s, ids, logits, "rewound, and one token on");
    }
    must(s, q3n_session_restore(s, snap), Q3N_OK);
    check_draft(s, ids, logits, "restored");
    must(other, q3n_session_restore(other, snap), Q3N_OK);
    q3n_snapshot_free(snap);
    check_draft(other, ids, logits, "restored elsewhere");
    assert_int_equal(q3n_session_fork(&fork, other, NULL, NULL), Q3N_OK);
    check_draft(fork, ids, logits, "forked");
    must(other, q3n_session_prefill(other, ids, n / 2, NULL, NULL), Q3N_OK);
    check_draft(other, ids, logits, "fed");
    q3n_session_reset(other);
    must(other, load_from(&b, other, SIZE_MAX), Q3N_OK);
    check_draft(other, ids, logits, "loaded");
    must(other, q3n_session_rewind(other, n / 3), Q3N_OK);
    check_draft(other, ids, logits, "loaded and rewound");
    q3n_session_destroy(fork);
    q3n_session_destroy(other);
    q3n_session_destroy(s);
    free(b.bytes);
}

/* Drafts of one source with one instruction set; last NULL = logits are not known. */
static void check_draft_source(const q3n_model *m, q3n_session_options *o, const int32_t *ids,
                               int n, const int32_t *want, const double *last)
{
    const int V = q3n_model_config(m)->vocab_size;
    int32_t *drafts = (int32_t *)malloc((size_t)n * sizeof *drafts);
    assert_non_null(drafts);
    float *logits = new_floats((size_t)n * (size_t)V);
    q3n_session *s = create_session(m, o);
    drafts_one_by_one(s, ids, n, drafts, logits);
    q3n_session_destroy(s);
    for (int i = 0; i + 1 < n; i++) assert_int_equal(drafts[i], want[i]);
    double scale = 0.0;
    for (int i = 0; last && i < V; i++) scale = fmax(scale, fabs(last[i]));
    for (int i = 0; last && i < V; i++) {           /* the bound of test_model.c's logits */
        const double got = (double)logits[(size_t)(n - 2) * (size_t)V + (size_t)i];
        if (!(fabs(got - last[i]) <= 5e-5 * scale))
            fail_msg("draft's logit %d is %g, expected %g", i, got, last[i]);
    }
    q3n_engine_options eo = *o->engine_options;
    eo.n_threads = 2;
    eo.batch_size = eo.isa == Q3N_ISA_SCALAR ? 7 : 0;
    o->engine_options = &eo;
    check_draft_paths(m, o, ids, n, logits);
    free(logits);
    free(drafts);
}

static void check_draft_golden(const q3n_model *m, const int32_t *ids, int n, const int32_t *want,
                               const double *last)
{
    static const q3n_speculate sources[] = { Q3N_SPECULATE_AUTO, Q3N_SPECULATE_MTP };
    const int n_sources = SLOW && !last ? 1 : COUNT(sources);
    for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {
        if (!isa_runs(isa, __func__)) continue;
        const int slow = isa == Q3N_ISA_SCALAR && !last;
        for (int i = 0; i < n_sources; i++) {
            q3n_session_options o = plain_options(n + 8);
            q3n_engine_options eo = one_thread;
            o.engine_options = &eo;
            eo.isa = isa;
            o.speculate = sources[i];
            check_draft_source(m, &o, ids, slow && n > 40 ? 40 : n, want, last);
        }
    }
}

static void test_draft_golden(void **state)
{
    (void)state;
    q3n_model *m = open_model("qwen3_next_mtp", NULL);
    char *golden = golden_read(Q3N_TEST_GOLDEN "/qwen3_next_mtp/golden.json");
    const char *mtp = golden_member(golden, "mtp");
    int n, n_want, n_last;
    int32_t *ids = golden_ids(golden_member(mtp, "input_ids"), &n);
    int32_t *want = golden_ids(golden_member(mtp, "draft_argmax"), &n_want);
    double *last = golden_numbers(golden_member(mtp, "last_draft_logits"), &n_last);
    assert_int_equal(n_want, n - 1);
    assert_int_equal(n_last, q3n_model_config(m)->vocab_size);
    check_draft_golden(m, ids, n, want, last);
    free(last);
    free(want);
    free(ids);
    free(golden);
    q3n_model_close(m);
}

#define STORIES_GOLDEN "examples/stories/golden.json"

static void test_draft_stories(void **state)
{
    (void)state;
    q3n_model *m = open_model("stories", NULL);
    char *golden = golden_read(STORIES_GOLDEN);
    int n_ids, n_want;
    int32_t *ids = golden_ids(golden_member(golden, "valid_ids"), &n_ids);
    const char *mtp = golden_member(golden, "mtp");
    int32_t *want = golden_ids(golden_member(mtp, "draft_argmax"), &n_want);
    check_draft_golden(m, ids, SLOW ? 20 : 120, want, NULL);
    free(want);
    free(ids);
    free(golden);
    q3n_model_close(m);
}

/* Who may draft, how much, and how far. */
static void test_draft_limits(void **state)
{
    (void)state;
    q3n_model *m = open_model("qwen3_next_mtp", NULL), *none = open_model("qwen3_next", NULL);
    q3n_session_options o = plain_options(20);
    int32_t ids[20] = { 0 }, drafts[Q3N_MAX_DRAFT + 1];
    q3n_error err = { .code = Q3N_OK };
    o.speculate = Q3N_SPECULATE_MTP;
    q3n_session *s = create_session(m, &o);
    assert_int_equal(q3n_session_draft(s, 0, drafts, 1, NULL), Q3N_ERR_ARG);     /* no text */
    must(s, q3n_session_eval(s, ids, 15, NULL), Q3N_OK);
    assert_int_equal(q3n_session_draft(s, 0, drafts, 0, NULL), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_draft(s, 0, drafts, Q3N_MAX_DRAFT + 1, NULL), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_draft(s, -1, drafts, 1, NULL), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_draft(s, 320, drafts, 1, NULL), Q3N_ERR_ARG);
    must(s, q3n_session_draft(s, 0, drafts, 4, NULL), Q3N_OK);
    assert_int_equal(q3n_session_draft(s, 0, drafts, 8, NULL), Q3N_ERR_FULL);
    must(s, q3n_session_eval(s, ids, 5, NULL), Q3N_OK);
    assert_int_equal(q3n_session_draft(s, 0, drafts, 1, NULL), Q3N_ERR_FULL);
    q3n_session_destroy(s);
    for (int i = 0; i < 2; i++) {
        o.speculate = i ? Q3N_SPECULATE_LOOKUP : Q3N_SPECULATE_OFF;
        s = create_session(m, &o);
        must(s, q3n_session_eval(s, ids, 5, NULL), Q3N_OK);
        must(s, q3n_session_draft(s, 0, drafts, 1, NULL), Q3N_ERR_UNSUPPORTED);
        q3n_session_destroy(s);
    }
    o.speculate = Q3N_SPECULATE_AUTO;                /* without a module: lookup alone */
    s = create_session(none, &o);
    must(s, q3n_session_eval(s, ids, 5, NULL), Q3N_OK);
    must(s, q3n_session_draft(s, 0, drafts, 1, NULL), Q3N_ERR_UNSUPPORTED);
    q3n_session_destroy(s);
    o.speculate = Q3N_SPECULATE_MTP;
    assert_int_equal(q3n_session_create(&s, none, &o, &err), Q3N_ERR_UNSUPPORTED);
    q3n_model_close(none);
    q3n_model_close(m);
}

/* A session's own engine has room for the module only if that session drafts with it. */
static void test_engine_of_another(void **state)
{
    (void)state;
    q3n_model *m = open_model("qwen3_next_mtp", NULL);
    q3n_session_options o = plain_options(40), shared = o;
    const int32_t ids[20] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 };
    int32_t want[4], drafts[4];
    q3n_error err = { .code = Q3N_OK };
    for (int own = Q3N_SPECULATE_OFF; own < Q3N_SPECULATE_COUNT; own++) {
        o.speculate = (q3n_speculate)own;
        q3n_session *owner = create_session(m, &o), *s = NULL;
        must(owner, q3n_session_eval(owner, ids, 20, NULL), Q3N_OK);
        set_engine(&shared, q3n_session_engine(owner), NULL);
        for (int how = Q3N_SPECULATE_OFF; how < Q3N_SPECULATE_COUNT; how++) {
            const int wants = how == Q3N_SPECULATE_AUTO || how == Q3N_SPECULATE_MTP;
            const int has = own == Q3N_SPECULATE_AUTO || own == Q3N_SPECULATE_MTP;
            shared.speculate = (q3n_speculate)how;
            const q3n_result r = q3n_session_create(&s, m, &shared, &err);
            assert_int_equal(r, wants && !has ? Q3N_ERR_ARG : Q3N_OK);
            if (r != Q3N_OK) {
                assert_null(s);
                assert_non_null(strstr(err.message, "MTP"));
                continue;
            }
            must(s, q3n_session_eval(s, ids, 20, NULL), Q3N_OK);
            if (wants) {
                must(s, q3n_session_draft(s, 7, drafts, 4, NULL), Q3N_OK);
                must(owner, q3n_session_draft(owner, 7, want, 4, NULL), Q3N_OK);
                assert_memory_equal(drafts, want, sizeof want);
            }
            q3n_session_destroy(s);
        }
        q3n_session_destroy(owner);
    }
    q3n_model_close(m);
}

/* ---- Speculation that is greedy changes no token ---- */
typedef struct {
    const q3n_model *m;
    const int32_t   *prompt;
    int              n_prompt;
    int32_t          want[128];  /* what is chosen without drafts                                */
    int              n;
    float            penalty;
} generation;

static q3n_sampler *greedy_sampler(q3n_session *s, const generation *g)
{
    set_sampler(s, (q3n_sampler_options){ .repetition_penalty = g->penalty });
    q3n_sampler *sampler = q3n_session_sampler(s);
    for (int i = 0; i < g->n_prompt; i++) q3n_sampler_accept(sampler, g->prompt[i]);
    return sampler;
}

static void generate_plain(generation *g, int n)
{
    const q3n_session_options o = plain_options(g->n_prompt + n);
    q3n_session *s = create_session(g->m, &o);
    q3n_sampler *sampler = greedy_sampler(s, g);
    float *logits = new_floats((size_t)q3n_model_config(g->m)->vocab_size);
    must(s, q3n_session_eval(s, g->prompt, g->n_prompt, logits), Q3N_OK);
    for (int i = 0; i < n; i++) {
        g->want[i] = sample(sampler, logits);
        must(s, q3n_session_eval(s, &g->want[i], 1, logits), Q3N_OK);
    }
    g->n = n;
    free(logits);
    q3n_session_destroy(s);
}

/* Generate with q3n_session_decode, in calls of at most `step` tokens (0 = of changing sizes), up
 * to the session's capacity, the end of the text or of what is known. */
static void check_generation(const generation *g, const q3n_session_options *o, int step,
                             q3n_speculation *stats)
{
    q3n_session *s = create_session(g->m, o);
    q3n_sampler *sampler = greedy_sampler(s, g);
    float *logits = new_floats((size_t)q3n_model_config(g->m)->vocab_size);
    must(s, q3n_session_eval(s, g->prompt, g->n_prompt, logits), Q3N_OK);
    int32_t token = sample(sampler, logits), tokens[16];
    int at = 0, n_steps = 0;                     /* token is want[at] */
    assert_int_equal(token, g->want[0]);
    while (at + 1 < g->n && !q3n_model_is_eos(g->m, token)) {
        const int room = q3n_session_capacity(s) - q3n_session_length(s);
        int max = step ? step : 1 + (5 * n_steps + 2) % 16, n = -1;
        if (room == 0) break;
        if (max > room) max = room;
        if (max > g->n - 1 - at) max = g->n - 1 - at;
        must(s, q3n_session_decode(s, token, tokens, max, &n), Q3N_OK);
        assert_in_range(n, 1, max);
        n_steps++;
        for (int i = 0; i < n; i++) {
            if (tokens[i] != g->want[++at])
                fail_msg("speculate %d, %d drafts, at most %d: token %d is %d, plain greedy gives "
                         "%d", (int)o->speculate, o->draft, step, at, tokens[i], g->want[at]);
            if (q3n_model_is_eos(g->m, tokens[i])) assert_int_equal(i, n - 1);
        }
        token = tokens[n - 1];
        assert_int_equal(q3n_session_length(s), g->n_prompt + at);
    }
    if (q3n_session_length(s) == q3n_session_capacity(s)) {
        int n = 0;
        must(s, q3n_session_decode(s, token, tokens, 1, &n), Q3N_ERR_FULL);
        assert_int_equal(at, q3n_session_capacity(s) - g->n_prompt);
    } else if (!q3n_model_is_eos(g->m, token)) {
        assert_int_equal(at, g->n - 1);
    }
    q3n_session_speculation(s, stats);
    assert_int_equal(stats->n_steps, n_steps);
    assert_int_equal(stats->n_tokens, at);
    assert_in_range(stats->n_accepted, stats->n_tokens - stats->n_steps, stats->n_drafted);
    if (step == 1 || o->speculate == Q3N_SPECULATE_OFF) assert_int_equal(stats->n_drafted, 0);
    free(logits);
    q3n_session_destroy(s);
}

/* All sources, with all numbers of drafts or a few; adds how many drafts of each were accepted. */
static void check_speculation(const generation *g, int capacity, int all,
                              int64_t accepted[Q3N_SPECULATE_COUNT])
{
    static const int drafts[] = { 0, 1, 2, 3, 4, 5, 6, 7, 8 }, few[] = { 0, 3, 8, 1 };
    const int small = SLOW || !all, n_few = SLOW ? 2 : COUNT(few);
    for (int source = 0; source < Q3N_SPECULATE_COUNT; source++) {
        if (source == Q3N_SPECULATE_MTP && !q3n_model_config(g->m)->num_mtp_layers) continue;
        for (int i = 0; i < (small ? n_few : COUNT(drafts)); i++) {
            q3n_session_options o = plain_options(capacity);
            q3n_engine_options eo = one_thread;
            o.engine_options = &eo;
            q3n_speculation stats = Q3N_INIT(q3n_speculation);
            o.speculate = (q3n_speculate)source;
            o.draft = small ? few[i] : drafts[i];
            eo.n_threads = 1 + i % 2;
            check_generation(g, &o, i == 3 ? 1 : i % 2 ? 16 : 0, &stats);
            accepted[source] += stats.n_accepted;
            if (source == Q3N_SPECULATE_MTP && o.draft && i != 3 && stats.n_steps > 3)
                assert_true(stats.n_drafted > 0);
        }
    }
}

/* Each source had so many of its drafts accepted, those that are not asked none. */
static void check_accepted(const int64_t accepted[Q3N_SPECULATE_COUNT], int min, int has_mtp)
{
    assert_int_equal(accepted[Q3N_SPECULATE_OFF], 0);
    for (int source = Q3N_SPECULATE_AUTO; source < Q3N_SPECULATE_COUNT; source++)
        if (source == Q3N_SPECULATE_MTP && !has_mtp) assert_int_equal(accepted[source], 0);
        else if (accepted[source] < min)
            fail_msg("source %d: %d drafts accepted, expected %d", source, (int)accepted[source],
                     min);
}

/* Make the model end at the token that first appears latest among want [20, n - 20). */
static void end_in_the_middle(q3n_model *m, generation *g)
{
    int end = 0;
    for (int i = 1; i < g->n - 20; i++) {
        int first = 0;
        while (g->want[first] != g->want[i]) first++;
        if (first == i) end = i;
    }
    m->eos.id[0] = g->want[end];
    m->eos.n = 1;
    g->n = end + 1;
}

/* Rows of the passes over the trunk: the hook sees each with the embeddings. */
static void count_rows(void *user, int l, const float *x, int n, int d)
{
    (void)x;
    (void)d;
    if (l == -1) *(int *)user += n;
}

/* One step after text and token: how many drafts it evaluates, and that these are all its rows. */
static void check_step_drafts(q3n_model *m, q3n_speculate source, const int32_t *text, int n,
                              int n_want)
{
    int rows = 0;
    q3n_session_options o = plain_options(60);
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    o.speculate = source;
    o.draft = 4;
    eo.layer_hook = (q3n_layer_hook){ count_rows, &rows };
    q3n_session *s = create_session(m, &o);
    const generation g = { .m = m, .prompt = text, .n_prompt = n };
    greedy_sampler(s, &g);
    int32_t tokens[8];
    q3n_speculation stats = Q3N_INIT(q3n_speculation);
    must(s, q3n_session_eval(s, text, n - 1, NULL), Q3N_OK);
    rows = 0;
    must(s, q3n_session_decode(s, text[n - 1], tokens, 8, &n), Q3N_OK);
    q3n_session_speculation(s, &stats);
    if (stats.n_drafted != n_want || stats.draft != n_want || rows != 1 + n_want)
        fail_msg("source %d: %d drafts, %d rows; expected %d drafts", (int)source,
                 (int)stats.n_drafted, rows, n_want);
    q3n_session_destroy(s);
}

/* A draft that ends the text is not evaluated, nor is what was drafted after it. */
static void test_no_drafts_beyond_the_end(void **state)
{
    (void)state;
    enum { N = 20, REPEATED = 6 };
    q3n_model *m = open_model("qwen3_next_mtp", NULL);
    int32_t text[N], drafts[4];
    m->eos.n = 1;
    m->eos.id[0] = -1;
    for (int i = 0; i < N; i++) text[i] = 10 + i % (N - REPEATED);   /* the end is the beginning */
    check_step_drafts(m, Q3N_SPECULATE_LOOKUP, text, N, 4);
    check_step_drafts(m, Q3N_SPECULATE_MTP, text, N, 4);
    for (int i = 0; i < 4; i++) {
        m->eos.id[0] = text[REPEATED + i];
        check_step_drafts(m, Q3N_SPECULATE_LOOKUP, text, N, i);
    }
    m->eos.id[0] = -1;
    q3n_session_options o = plain_options(60);
    o.speculate = Q3N_SPECULATE_MTP;
    q3n_session *s = create_session(m, &o);
    must(s, q3n_session_eval(s, text, N - 1, NULL), Q3N_OK);
    must(s, q3n_session_draft(s, text[N - 1], drafts, 4, NULL), Q3N_OK);
    q3n_session_destroy(s);
    for (int i = 0; i < 4; i++) {
        int first = 0;
        while (drafts[first] != drafts[i]) first++;
        m->eos.id[0] = drafts[i];
        check_step_drafts(m, Q3N_SPECULATE_MTP, text, N, first);
    }
    q3n_model_close(m);
}

static void test_greedy_speculation(void **state)
{
    const char *name = (const char *)*state;
    q3n_model *m = open_model(name, NULL);
    const q3n_config *c = q3n_model_config(m);
    uint64_t rng = 5;
    int32_t prompt[12];
    const int n = c->max_position_embeddings < 200 ? c->max_position_embeddings - COUNT(prompt)
                : SLOW ? 60 : 110;
    random_tokens(&rng, prompt, COUNT(prompt), c->vocab_size);
    generation g = { .m = m, .prompt = prompt, .n_prompt = COUNT(prompt) };
    int64_t accepted[Q3N_SPECULATE_COUNT] = { 0 };
    for (int i = 0; i < 2; i++) {
        g.penalty = i ? 1.1f : 1.0f;
        generate_plain(&g, n);
        m->eos.n = 0;
        check_speculation(&g, COUNT(prompt) + n, i == 0, accepted);
        check_speculation(&g, COUNT(prompt) + n / 2, 0, accepted);
        end_in_the_middle(m, &g);
        check_speculation(&g, COUNT(prompt) + n, 0, accepted);
    }
    if (c->num_mtp_layers > 0 && !SLOW) check_accepted(accepted, 1, 1);   /* who repeats a thing */
    q3n_model_close(m);
}

static void test_greedy_stories(void **state)
{
    (void)state;
    q3n_model *m = open_model("stories", NULL);
    char *golden = golden_read(STORIES_GOLDEN);
    const char *all = golden_member(golden, "greedy"), *one;
    int64_t accepted[Q3N_SPECULATE_COUNT] = { 0 };
    for (int i = 0; (one = golden_next(&all)) != NULL; i++) {
        int n;
        generation g = { .m = m };
        int32_t *prompt = golden_ids(golden_member(one, "prompt_ids"), &g.n_prompt);
        int32_t *want = golden_ids(golden_member(one, "output_ids"), &n);
        assert_true(n >= 100 && n <= COUNT(g.want));
        g.prompt = prompt;
        g.n = SLOW && i != 1 ? 30 : n;
        memcpy(g.want, want, (size_t)n * sizeof *want);
        if (i == 1) assert_true(q3n_model_is_eos(m, want[n - 1]));
        if (!SLOW || i == 1) check_speculation(&g, g.n_prompt + g.n, 0, accepted);
        free(want);
        free(prompt);
    }
    check_accepted(accepted, SLOW ? 20 : 100, 1);
    free(golden);
    q3n_model_close(m);
}

/* ---- Speculation that samples has the same distribution ---- */
#define CHOICES 3                /* top_k, and tokens of a run                                   */
#define TRIPLES (CHOICES * CHOICES * CHOICES)

typedef struct {
    q3n_model *m;
    int        vocab, n;
    int        hooked;           /* 1 = logits are edited before they are chosen from            */
    int32_t    ids[40], token;   /* token follows ids [n]                                        */
    int32_t    choice[TRIPLES][CHOICES];
    double     p[TRIPLES];
} draw;

/* A hook's work that depends on the last token alone. */
static void lean(float *logits, int vocab, int32_t last)
{
    for (int i = 0; i < vocab; i++) logits[i] += 0.25f * (float)((i * 13 + last * 5) % 7);
}

static void lean_hook(void *user, float *logits, int n_vocab, const int32_t *tokens, int n_tokens)
{
    *(int *)user += 1;
    assert_true(n_tokens > 0);
    lean(logits, n_vocab, tokens[n_tokens - 1]);
}

/* The CHOICES largest logits with their probabilities. */
static void choices_of(const float *logits, int vocab, int32_t *ids, double *p)
{
    double sum = 0.0;
    for (int k = 0; k < CHOICES; k++) {
        ids[k] = -1;
        for (int i = 0; i < vocab; i++) {
            int taken = 0;
            for (int j = 0; j < k; j++) taken |= ids[j] == i;
            if (!taken && (ids[k] < 0 || logits[i] > logits[ids[k]])) ids[k] = i;
        }
        p[k] = exp((double)logits[ids[k]] - (double)logits[ids[0]]);
        sum += p[k];
    }
    for (int k = 0; k < CHOICES; k++) p[k] /= sum;
}

/* Probabilities of all triples after the token, from plain runs. */
static void draw_expect(draw *d)
{
    const q3n_session_options o = plain_options(d->n + 4);
    q3n_session *s = create_session(d->m, &o);
    float *logits = new_floats((size_t)d->vocab);
    for (int i = 0; i < TRIPLES; i++) d->p[i] = 1.0;
    for (int depth = 0, size = TRIPLES; depth < CHOICES; depth++, size /= CHOICES)
        for (int i = 0; i < TRIPLES; i += size) {
            int32_t ids[CHOICES];
            double p[CHOICES];
            q3n_session_reset(s);
            must(s, q3n_session_eval(s, d->ids, d->n, NULL), Q3N_OK);
            must(s, q3n_session_eval(s, &d->token, 1, logits), Q3N_OK);
            if (depth) must(s, q3n_session_eval(s, d->choice[i], depth, logits), Q3N_OK);
            if (d->hooked)
                lean(logits, d->vocab, depth ? d->choice[i][depth - 1] : d->token);
            choices_of(logits, d->vocab, ids, p);
            for (int j = 0; j < size; j++) {
                d->choice[i + j][depth] = ids[j / (size / CHOICES)];
                d->p[i + j] *= p[j / (size / CHOICES)];
            }
        }
    free(logits);
    q3n_session_destroy(s);
}

/* A chi-square value that few random ones exceed: 1 in 100 000, by Wilson and Hilferty. */
static double chi_square_bound(int degrees)
{
    const double v = 2.0 / (9.0 * degrees), x = 1.0 - v + 4.265 * sqrt(v);
    return degrees * x * x * x;
}

static void check_counts(const draw *d, const int *counts, int n, const char *what)
{
    double sum = 0.0, rare_p = 0.0;
    int degrees = -1, rare = 0;
    for (int i = 0; i < TRIPLES; i++) {
        const double e = d->p[i] * n;
        if (e < 8.0) {
            rare_p += d->p[i];
            rare += counts[i];
            continue;
        }
        sum += (counts[i] - e) * (counts[i] - e) / e;
        degrees++;
    }
    if (rare_p > 0.0) {
        sum += (rare - rare_p * n) * (rare - rare_p * n) / (rare_p * n);
        degrees++;
    }
    assert_true(degrees > 5);
    if (!(sum <= chi_square_bound(degrees)))
        fail_msg("%s: chi-square %.1f for %d degrees of freedom, bound %.1f", what, sum, degrees,
                 chi_square_bound(degrees));
}

/* Draw n triples through q3n_session_decode. */
static void check_draws(const draw *d, q3n_speculate speculate, int draft, int n)
{
    char what[100];
    int counts[TRIPLES] = { 0 };
    q3n_session_options o = plain_options(d->n + 8);
    o.speculate = speculate;
    o.draft = draft;
    q3n_session *s = create_session(d->m, &o);
    q3n_snapshot *snap = NULL;
    q3n_sampler_options so = { .temperature = 1.0f, .top_k = CHOICES, .seed = 11 };
    int n_edits = 0;
    if (d->hooked) so.logits_hook = (q3n_logits_hook){ lean_hook, &n_edits };
    must(s, q3n_session_eval(s, d->ids, d->n, NULL), Q3N_OK);
    must(s, q3n_session_snapshot(s, &snap), Q3N_OK);     /* without the sampler, which goes on */
    set_sampler(s, so);
    for (int i = 0; i < n; i++) {
        int32_t out[CHOICES];
        int have = 0, some = 0, k = 0;
        must(s, q3n_session_restore(s, snap), Q3N_OK);
        for (; have < CHOICES; have += some)
            must(s, q3n_session_decode(s, have ? out[have - 1] : d->token, out + have,
                                       CHOICES - have, &some), Q3N_OK);
        while (k < TRIPLES && memcmp(out, d->choice[k], sizeof out) != 0) k++;
        if (k == TRIPLES) fail_msg("%d %d %d is not to be chosen", out[0], out[1], out[2]);
        counts[k]++;
    }
    q3n_speculation stats = Q3N_INIT(q3n_speculation);
    q3n_session_speculation(s, &stats);
    snprintf(what, sizeof what, "speculate %d, %d drafts, %d of %d accepted", (int)speculate, draft,
             (int)stats.n_accepted, (int)stats.n_drafted);
    check_counts(d, counts, n, what);
    assert_true(d->hooked ? n_edits >= CHOICES * n : n_edits == 0);
    if (speculate != Q3N_SPECULATE_OFF && draft > 0 && stats.n_accepted < n / 10)
        fail_msg("%s: too few to say anything", what);
    q3n_snapshot_free(snap);
    q3n_session_destroy(s);
}

/* A random text after which the module's draft is among the choices. */
static void draw_for_module(draw *d, uint64_t *rng)
{
    q3n_session_options o = plain_options(40);
    o.speculate = Q3N_SPECULATE_MTP;
    q3n_session *s = create_session(d->m, &o);
    float *logits = new_floats((size_t)d->vocab), *guess = new_floats((size_t)d->vocab);
    int32_t draft, ids[CHOICES];
    double p[CHOICES];
    d->n = 10;
    for (int found = 0; !found; ) {
        random_tokens(rng, d->ids, d->n, d->vocab);
        d->token = random_below(rng, d->vocab);
        q3n_session_reset(s);
        must(s, q3n_session_eval(s, d->ids, d->n, NULL), Q3N_OK);
        must(s, q3n_session_draft(s, d->token, &draft, 1, guess), Q3N_OK);
        must(s, q3n_session_eval(s, &d->token, 1, logits), Q3N_OK);
        if (d->hooked) {
            lean(guess, d->vocab, d->token);
            lean(logits, d->vocab, d->token);
            draft = argmax(guess, d->vocab);
        }
        choices_of(logits, d->vocab, ids, p);
        for (int i = 0; i < CHOICES; i++) found |= ids[i] == draft;
    }
    free(guess);
    free(logits);
    q3n_session_destroy(s);
}

/* A text with a piece that comes twice, and what followed it is among the choices. */
static void draw_for_lookup(draw *d, uint64_t *rng)
{
    const q3n_session_options o = plain_options(40);
    q3n_session *s = create_session(d->m, &o);
    float *logits = new_floats((size_t)d->vocab);
    int32_t ids[CHOICES];
    double p[CHOICES];
    for (int found = 0; !found; ) {
        d->n = 26;                               /* 6 tokens, 5 after them, and 6 again */
        random_tokens(rng, d->ids, d->n, d->vocab);
        memcpy(d->ids + 20, d->ids + 3, 6 * sizeof *d->ids);
        d->token = d->ids[9];
        q3n_session_reset(s);
        must(s, q3n_session_eval(s, d->ids, d->n, NULL), Q3N_OK);
        must(s, q3n_session_eval(s, &d->token, 1, logits), Q3N_OK);
        choices_of(logits, d->vocab, ids, p);
        for (int i = 0; i < CHOICES; i++) found |= ids[i] == d->ids[10];
    }
    free(logits);
    q3n_session_destroy(s);
}

static void test_sampled_speculation(void **state)
{
    (void)state;
    const int n = SLOW ? 300 : 2000;
    uint64_t rng = 3;
    draw d = { .m = open_model("qwen3_next_mtp", NULL) };
    d.vocab = q3n_model_config(d.m)->vocab_size;
    d.m->eos.n = 0;
    draw_for_module(&d, &rng);
    draw_expect(&d);
    check_draws(&d, Q3N_SPECULATE_OFF, 0, n);
    check_draws(&d, Q3N_SPECULATE_MTP, 1, n);
    check_draws(&d, Q3N_SPECULATE_MTP, 2, n);
    check_draws(&d, Q3N_SPECULATE_AUTO, 0, n);
    draw_for_lookup(&d, &rng);
    draw_expect(&d);
    check_draws(&d, Q3N_SPECULATE_LOOKUP, 1, n);
    check_draws(&d, Q3N_SPECULATE_LOOKUP, 3, n);
    check_draws(&d, Q3N_SPECULATE_AUTO, 2, n);
    d.hooked = 1;
    draw_for_module(&d, &rng);
    draw_expect(&d);
    check_draws(&d, Q3N_SPECULATE_OFF, 0, n);
    check_draws(&d, Q3N_SPECULATE_MTP, 2, n);
    check_draws(&d, Q3N_SPECULATE_AUTO, 0, n);
    q3n_model_close(d.m);
}

/* All that the next steps depend on, beside the text. */
typedef struct {
    q3n__learned learned;
    q3n__unread  unread;
    uint64_t     rng;
    int          n_window, next;
    int32_t      window[32];
    float        hidden[Q3N__HIDDEN_ROWS * 64];
} memory_of_steps;

static memory_of_steps *remember(const q3n_session *s, const q3n_sampler *sampler)
{
    const size_t floats = (size_t)s->unread.n * (size_t)s->shape.hidden_size;
    memory_of_steps *m = (memory_of_steps *)calloc(1, sizeof *m);
    assert_non_null(m);
    assert_true(floats <= sizeof m->hidden / sizeof *m->hidden);
    assert_true(sampler->o.penalty_window == COUNT(m->window));
    memcpy(&m->learned, &s->learned, sizeof m->learned);
    m->unread = s->unread;
    m->unread.at = 0;                            /* where the rows lie is no matter */
    m->rng = sampler->rng;
    m->n_window = sampler->n_window;
    m->next = sampler->next;
    memcpy(m->window, sampler->window, sizeof m->window);
    memcpy(m->hidden, q3n__unread_row(s, 0), floats * sizeof *m->hidden);
    return m;
}

/* ---- A hook on logits: with drafts as without ---- */
#define STEERED 60               /* tokens that are written                                      */

typedef struct {
    q3n_session *s;
    int          n_calls;
    int          empty_at;       /* position of which nothing is left, -1 = none                 */
    int          cancel_at;      /* call that cancels, 0 = none                                  */
    int          n_log;
    struct { uint64_t context, logits; } log[STEERED * 20];
} steering;

/* About one token in sixteen may follow `last`. */
static int may_follow(int32_t last, int32_t id)
{
    return (uint32_t)(id * 7919 + last * 131) % 97 < 6;
}

static uint64_t hash_bytes(uint64_t h, const void *data, size_t bytes)
{
    const uint8_t *p = (const uint8_t *)data;
    for (size_t i = 0; i < bytes; i++) h = mix64(h + p[i] + 1);
    return h;
}

/* Masks and leans by the last token, and notes which logits came after which text. */
static void steer(void *user, float *logits, int n_vocab, const int32_t *tokens, int n_tokens)
{
    steering *k = (steering *)user;
    int32_t text[400];
    const int length = q3n_session_length(k->s), n = length + n_tokens;
    assert_true(n > 0 && n <= COUNT(text));
    assert_int_equal(q3n_session_tokens(k->s, 0, length, text), Q3N_OK);
    if (n_tokens) memcpy(text + length, tokens, (size_t)n_tokens * sizeof *tokens);
    assert_true(k->n_log < COUNT(k->log));
    k->log[k->n_log].context = hash_bytes(0, text, (size_t)n * sizeof *text);
    k->log[k->n_log++].logits = hash_bytes(0, logits, (size_t)n_vocab * sizeof *logits);
    lean(logits, n_vocab, text[n - 1]);
    for (int i = 0; i < n_vocab; i++)
        if (n == k->empty_at || !may_follow(text[n - 1], i)) logits[i] = -INFINITY;
    if (++k->n_calls == k->cancel_at) assert_int_equal(q3n_session_cancel(k->s), 1);
}

/* Write STEERED tokens after a prompt; returns how many drafts were accepted. */
static int64_t write_steered(const q3n_model *m, const q3n_session_options *o,
                             q3n_sampler_options so, int32_t *text, steering *k)
{
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    int32_t prompt[20];
    uint64_t rng = 97;
    q3n_speculation stats = Q3N_INIT(q3n_speculation);
    float *logits = new_floats(V), *after = new_floats(V);
    q3n_session *s = create_session(m, o);
    memset(k, 0, sizeof *k);
    k->s = s;
    k->empty_at = -1;
    so.logits_hook = (q3n_logits_hook){ steer, k };
    set_sampler(s, so);
    random_tokens(&rng, prompt, COUNT(prompt), (int)V);
    must(s, q3n_session_eval(s, prompt, COUNT(prompt), logits), Q3N_OK);
    text[0] = sample(q3n_session_sampler(s), logits);
    must(s, q3n_session_logits(s, after), Q3N_OK);       /* the model's, not the hook's */
    check_same(after, logits, V, "logits after the hook");
    for (int at = 1, n = 0; at < STEERED; at += n)
        must(s, q3n_session_decode(s, text[at - 1], text + at, STEERED - at, &n), Q3N_OK);
    for (int i = 0; i < STEERED; i++)
        assert_true(may_follow(i ? text[i - 1] : prompt[COUNT(prompt) - 1], text[i]));
    q3n_session_speculation(s, &stats);
    free(after);
    free(logits);
    q3n_session_destroy(s);
    return stats.n_accepted;
}

/* Every choice of the plain text was made from the same logits, to the last bit. */
static void check_log(const steering *plain, const steering *k)
{
    for (int i = 0; i < plain->n_log; i++) {
        int found = 0;
        for (int j = 0; j < k->n_log && !found; j++)
            found = k->log[j].context == plain->log[i].context
                 && k->log[j].logits == plain->log[i].logits;
        if (!found) fail_msg("the hook never saw the logits of choice %d of the plain text", i);
    }
}

static void test_hook(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const int has_mtp = q3n_model_config(m)->num_mtp_layers > 0;
    static const q3n_sampler_options how[] = {
        { .temperature = 0.0f }, { .repetition_penalty = 1.2f, .penalty_window = 9 },
        { .temperature = 1.0f, .seed = 3 }, { .temperature = 0.8f, .top_k = 5, .seed = 4 } };
    static steering plain, k;
    int32_t want[STEERED], got[STEERED];
    int64_t accepted[Q3N_SPECULATE_COUNT] = { 0 };
    m->eos.n = 0;
    for (int i = 0; i < COUNT(how); i++) {
        q3n_session_options o = plain_options(20 + STEERED + Q3N_MAX_DRAFT);
        write_steered(m, &o, how[i], want, &plain);
        assert_int_equal(plain.n_calls, STEERED);
        for (int source = 1; source < Q3N_SPECULATE_COUNT; source++)
            for (int draft = 0; draft <= 8; draft += SLOW ? 4 : 2) {
                o.speculate = (q3n_speculate)source;
                o.draft = draft;
                if (source == Q3N_SPECULATE_MTP && !has_mtp) continue;
                accepted[source] += write_steered(m, &o, how[i], got, &k);
                const int by_module = has_mtp && source != Q3N_SPECULATE_LOOKUP;
                if (by_module && how[i].temperature > 0.0f) continue;    /* other random numbers */
                assert_memory_equal(got, want, sizeof want);
                check_log(&plain, &k);
            }
    }
    check_accepted(accepted, 1, has_mtp);
    assert_true(accepted[Q3N_SPECULATE_AUTO] > 20);
    q3n_model_close(m);
}

/* Where the hook leaves nothing drafts end, and the step that begins there fails; so does one in
 * which the hook cancels.  Both leave everything as it was. */
static void test_hook_that_stops(void **state)
{
    (void)state;
    enum { N = 20, EMPTY = N + 13 };
    q3n_model *m = open_model("qwen3_next_mtp", NULL);
    static steering k;
    int32_t prompt[N], tokens[16];
    uint64_t rng = 101;
    random_tokens(&rng, prompt, N, q3n_model_config(m)->vocab_size);
    m->eos.n = 0;
    for (int source = 0; source < Q3N_SPECULATE_COUNT; source++) {
        q3n_session_options o = plain_options(100);
        const q3n_sampler_options so = { .temperature = source % 2 ? 1.0f : 0.0f, .seed = 5,
                                         .repetition_penalty = 1.1f, .penalty_window = 32,
                                         .logits_hook = { steer, &k } };
        o.speculate = (q3n_speculate)source;
        o.draft = 4;
        q3n_session *s = create_session(m, &o);
        k = (steering){ .s = s, .empty_at = EMPTY };
        set_sampler(s, so);
        must(s, q3n_session_eval(s, prompt, N - 1, NULL), Q3N_OK);
        int32_t token = prompt[N - 1];
        int n = 0;
        for (int at = N; at < EMPTY; at += n, token = tokens[n - 1]) {
            memory_of_steps *before = remember(s, q3n_session_sampler(s));
            k.n_log = 0;
            k.cancel_at = k.n_calls + 1;                 /* in the first choice or draft */
            must(s, q3n_session_decode(s, token, tokens, 16, &n), Q3N_ERR_CANCELLED);
            memory_of_steps *after = remember(s, q3n_session_sampler(s));
            assert_memory_equal(after, before, sizeof *after);
            free(before);
            free(after);
            k.cancel_at = 0;
            must(s, q3n_session_decode(s, token, tokens, 16, &n), Q3N_OK);
            assert_in_range(at + n, N + 1, EMPTY);
        }
        assert_int_equal(q3n_session_length(s), EMPTY - 1);
        memory_of_steps *before = remember(s, q3n_session_sampler(s));
        must(s, q3n_session_decode(s, token, tokens, 16, &n), Q3N_ERR_NUMERIC);
        assert_non_null(strstr(q3n_session_error(s)->message, "masked"));
        assert_int_equal(n, 0);
        assert_int_equal(q3n_session_length(s), EMPTY - 1);
        memory_of_steps *after = remember(s, q3n_session_sampler(s));
        assert_memory_equal(after, before, sizeof *after);
        k.empty_at = -1;
        must(s, q3n_session_decode(s, token, tokens, 16, &n), Q3N_OK);
        free(before);
        free(after);
        q3n_session_destroy(s);
    }
    q3n_model_close(m);
}

/* ---- What is kept goes on as the text that would have been ---- */
#define KEPT (SLOW ? 16 : 36)    /* tokens that are chosen                                       */

typedef struct {
    q3n_session_options o;
    q3n_sampler_options so;
    int32_t             text[20 + KEPT];     /* prompt, tokens                                   */
    const char         *what;
} kept_case;

/* Go on in s from text [at], which is chosen and not evaluated: the rest must be the same. */
static void check_goes_on(kept_case *k, q3n_session *s, int at, const char *how)
{
    assert_int_equal(q3n_session_length(s), at);
    for (int n = 0; at + 1 < COUNT(k->text); at += n) {
        int32_t tokens[KEPT];
        must(s, q3n_session_decode(s, k->text[at], tokens, COUNT(k->text) - at - 1, &n), Q3N_OK);
        for (int i = 0; i < n; i++)
            if (tokens[i] != k->text[at + 1 + i])
                fail_msg("%s, %s: token %d is %d, straight it is %d", k->what, how, at + 1 + i,
                         tokens[i], k->text[at + 1 + i]);
    }
}

/* Written, restored and forked before every step of the straight text. */
static void check_kept(const q3n_model *m, kept_case *k)
{
    const int n_prompt = COUNT(k->text) - KEPT;
    q3n_sampler_options other = k->so;       /* a sampler that has been somewhere else */
    memory_file file[KEPT] = { { 0 } };
    q3n_snapshot *snap[KEPT] = { NULL };
    q3n_session *fork[KEPT] = { NULL };
    q3n_session *s = create_session(m, &k->o), *same;
    uint64_t rng = 97;
    int steps[KEPT], n_steps = 0;
    random_tokens(&rng, k->text, n_prompt, q3n_model_config(m)->vocab_size);
    for (int i = 8; i < n_prompt; i++) k->text[i] = k->text[i - 8];
    set_sampler(s, k->so);
    for (int i = 0; i < n_prompt; i++) q3n_sampler_accept(q3n_session_sampler(s), k->text[i]);
    must(s, q3n_session_eval(s, k->text, n_prompt - 1, NULL), Q3N_OK);
    for (int at = n_prompt - 1, n = 0; at + 1 < COUNT(k->text); at += n, n_steps++) {
        must(s, save_to(&file[n_steps], s, SIZE_MAX), Q3N_OK);
        must(s, q3n_session_snapshot(s, &snap[n_steps]), Q3N_OK);
        assert_int_equal(q3n_session_fork(&fork[n_steps], s, NULL, NULL), Q3N_OK);
        steps[n_steps] = at;
        must(s, q3n_session_decode(s, k->text[at], k->text + at + 1, COUNT(k->text) - at - 1, &n),
             Q3N_OK);
    }
    same = create_session(m, &k->o);                     /* all in one, never kept */
    set_sampler(same, k->so);
    for (int i = 0; i < n_prompt; i++) q3n_sampler_accept(q3n_session_sampler(same), k->text[i]);
    must(same, q3n_session_eval(same, k->text, n_prompt - 1, NULL), Q3N_OK);
    check_goes_on(k, same, n_prompt - 1, "never kept");
    q3n_session_destroy(same);
    other.seed += 100;
    for (int i = 0; i < n_steps; i++) {
        same = create_session(m, &k->o);
        set_sampler(same, other);
        for (int t = 0; t < 7; t++) q3n_sampler_accept(q3n_session_sampler(same), t);
        must(same, load_from(&file[i], same, SIZE_MAX), Q3N_OK);
        check_goes_on(k, same, steps[i], "loaded");
        q3n_session_destroy(same);
        must(s, q3n_session_restore(s, snap[i]), Q3N_OK);
        check_goes_on(k, s, steps[i], "restored");
        check_goes_on(k, fork[i], steps[i], "forked");
        q3n_session_destroy(fork[i]);
        q3n_snapshot_free(snap[i]);
        free(file[i].bytes);
    }
    q3n_session_destroy(s);
}

static void test_kept(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const int has_mtp = q3n_model_config(m)->num_mtp_layers > 0;
    int n_edits = 0;
    static const q3n_sampler_options how[] = {
        { .repetition_penalty = 1.3f, .penalty_window = 9 },
        { .temperature = 1.0f, .top_k = 6, .seed = 3, .repetition_penalty = 1.2f,
          .penalty_window = 30 } };
    m->eos.n = 0;
    for (int i = 0; i < COUNT(how); i++)
        for (int source = 0; source < Q3N_SPECULATE_COUNT; source++) {
            char what[80];
            kept_case k = { .o = plain_options(60 + Q3N_MAX_DRAFT), .so = how[i], .what = what };
            k.o.speculate = (q3n_speculate)source;
            k.o.draft = 3;
            k.o.kv_type = source % 2 ? Q3N_TYPE_F32 : Q3N_TYPE_F16;
            if (source % 2) k.so.logits_hook = (q3n_logits_hook){ lean_hook, &n_edits };
            snprintf(what, sizeof what, "sampling %d, source %d", i, source);
            if (source == Q3N_SPECULATE_MTP && !has_mtp) continue;
            check_kept(m, &k);
        }
    assert_true(n_edits > (SLOW ? 200 : 1000));
    q3n_model_close(m);
}

/* Forks choose the same until one is seeded; a sampler that one side lacks is nobody's loss; what a
 * cache keeps is no sampler's. */
static void test_kept_apart(void **state)
{
    (void)state;
    enum { N = 20 };
    q3n_model *m = open_model("qwen3_next", NULL);
    q3n_session_options o = plain_options(100);
    const q3n_sampler_options so = { .temperature = 2.0f, .seed = 3 };
    int32_t ids[N], text[3][N];
    uint64_t rng = 5;
    q3n_session *s[3], *none = create_session(m, &o);
    q3n_snapshot *with = NULL, *without = NULL;
    memory_file file = { 0 };
    o.snapshot_bytes = 1 << 24;
    m->eos.n = 0;
    random_tokens(&rng, ids, N, q3n_model_config(m)->vocab_size);
    s[0] = create_session(m, &o);
    set_sampler(s[0], so);
    must(s[0], q3n_session_eval(s[0], ids, N, NULL), Q3N_OK);
    for (int i = 1; i < 3; i++) assert_int_equal(q3n_session_fork(&s[i], s[0], &o, NULL), Q3N_OK);
    q3n_sampler_seed(q3n_session_sampler(s[2]), 4);
    for (int i = 0; i < 3; i++)
        for (int at = 0, n; at < N; at++)
            must(s[i], q3n_session_decode(s[i], at ? text[i][at - 1] : 7, text[i] + at, 1, &n),
                 Q3N_OK);
    assert_memory_equal(text[0], text[1], sizeof text[0]);
    assert_memory_not_equal(text[0], text[2], sizeof text[0]);

    q3n_sampler *a = q3n_session_sampler(s[0]);
    const uint64_t numbers = a->rng;
    must(s[0], q3n_session_snapshot(s[0], &with), Q3N_OK);
    must(none, q3n_session_restore(none, with), Q3N_OK);      /* passes it over */
    assert_null(q3n_session_sampler(none));
    must(none, q3n_session_snapshot(none, &without), Q3N_OK);
    must(none, save_to(&file, none, SIZE_MAX), Q3N_OK);
    assert_int_equal(q3n__load_u32(file.bytes + 8), 1);
    must(s[0], q3n_session_restore(s[0], without), Q3N_OK);   /* leaves it alone */
    must(s[0], load_from(&file, s[0], SIZE_MAX), Q3N_OK);
    assert_true(a->rng == numbers && a->n_window == N);
    must(s[0], save_to(&file, s[0], SIZE_MAX), Q3N_OK);
    assert_int_equal(q3n__load_u32(file.bytes + 8), 2);
    assert_int_equal(q3n_snapshot_bytes(with) - q3n_snapshot_bytes(without), 128);

    must(s[0], q3n_session_checkpoint(s[0]), Q3N_OK);
    must(s[0], q3n_session_rewind(s[0], N), Q3N_OK);
    must(s[0], q3n_session_prefill(s[0], ids, N - 1, NULL, NULL), Q3N_OK);
    assert_true(a->rng == numbers && a->n_window == N);
    q3n_sampler_accept(a, 1);
    must(s[0], q3n_session_prefill(s[0], ids, N, NULL, NULL), Q3N_OK);
    assert_true(a->rng == numbers && a->n_window == N + 1);
    for (int i = 0; i < 3; i++) q3n_session_destroy(s[i]);
    q3n_session_destroy(none);
    q3n_snapshot_free(with);
    q3n_snapshot_free(without);
    free(file.bytes);
    q3n_model_close(m);
}

/* Sessions of a batch: who chooses from their logits asks the same hooks. */
static void test_hook_in_a_batch(void **state)
{
    (void)state;
    enum { N = 3 };
    q3n_model *m = open_model("qwen3_next", NULL);
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    static steering alone, k[N];
    static int32_t want[STEERED], got[N][STEERED];
    q3n_session_options o = plain_options(20 + STEERED);
    m->eos.n = 0;
    for (int greedy = 0; greedy < 2; greedy++) {
        q3n_engine_item item[N];
        int32_t prompt[20];
        uint64_t rng = 97;
        random_tokens(&rng, prompt, COUNT(prompt), (int)V);
        q3n_sampler_options so = { .temperature = greedy ? 0.0f : 1.0f, .seed = 8 };
        set_engine(&o, NULL, &one_thread);
        write_steered(m, &o, so, want, &alone);
        q3n_engine *e = create_engine(m, o.engine_options);
        set_engine(&o, e, NULL);
        for (int i = 0; i < N; i++) {
            q3n_session *s = create_session(m, &o);
            k[i] = (steering){ .s = s, .empty_at = -1 };
            so.logits_hook = (q3n_logits_hook){ steer, &k[i] };
            set_sampler(s, so);
            item[i] = (q3n_engine_item){ .size = sizeof item[i], .session = s, .tokens = prompt,
                                         .n = COUNT(prompt), .logits = new_floats(V) };
        }
        for (int at = 0; at < STEERED; at++) {
            assert_int_equal(q3n_engine_eval(e, item, N, NULL), Q3N_OK);
            for (int i = 0; i < N; i++) {
                got[i][at] = sample(q3n_session_sampler(item[i].session), item[i].logits);
                item[i].tokens = &got[i][at];
                item[i].n = 1;
                item[i].done = 0;
            }
        }
        for (int i = 0; i < N; i++) {
            assert_memory_equal(got[i], want, sizeof want);
            check_log(&alone, &k[i]);
            free(item[i].logits);
            q3n_session_destroy(item[i].session);
        }
        q3n_engine_destroy(e);
    }
    q3n_model_close(m);
}

/* ---- Steps that fail ---- */
static int stop_at = -2;         /* layer, -2 = none                                             */
static int spoil_at = -2;        /* layer whose output becomes NaN: no logit is a number then    */

static void stop_in_hook(void *user, int l, const float *x, int n, int d)
{
    for (size_t i = 0; l == spoil_at && i < (size_t)n * (size_t)d; i++)
        ((float *)(uintptr_t)x)[i] = NAN;
    if (l == stop_at) assert_int_equal(q3n_session_cancel(*(q3n_session **)user), 1);
}

typedef struct {
    q3n_model   *m;
    heap        *h;
    q3n_session *s;
    q3n_sampler *sampler;
    int          n_failed[3];    /* cancelled, without memory, without a number                  */
} step_case;

/* The step, after it was made to fail for want of memory, where it may need the second page, in
 * every layer, and when tokens are chosen. */
static void step_after_failures(step_case *c, int32_t token, int32_t *tokens, int max, int *n)
{
    memory_of_steps *before = remember(c->s, c->sampler);
    const int n_layers = q3n_model_config(c->m)->num_hidden_layers;
    for (int l = -2; l <= n_layers + 1; l++) {   /* -2: for want of memory; the last: of numbers */
        static const q3n_result why[] = { Q3N_ERR_CANCELLED, Q3N_ERR_MEMORY, Q3N_ERR_NUMERIC };
        const int kind = l == -2 ? 1 : l <= n_layers ? 0 : 2;
        if (l == -2 && c->s->state.kv.page[1]) continue;
        stop_at = l;
        spoil_at = kind == 2 ? n_layers : -2;
        c->h->calls = 0;
        c->h->fail_at = l == -2;
        const q3n_result r = q3n_session_decode(c->s, token, tokens, max, n);
        stop_at = spoil_at = -2;
        c->h->fail_at = 0;
        if (l == -2 && r == Q3N_OK) {            /* it asked for none */
            free(before);
            return;
        }
        must(c->s, r, why[kind]);
        c->n_failed[kind]++;
        assert_int_equal(*n, 0);
        memory_of_steps *after = remember(c->s, c->sampler);
        assert_memory_equal(after, before, sizeof *after);
        free(after);
    }
    free(before);
    must(c->s, q3n_session_decode(c->s, token, tokens, max, n), Q3N_OK);
}

/* A text whose steps all fail first is the undisturbed text, with as many drafts.  draft 0: how
 * many are drafted depends on time, so only what is kept from step to step is compared; idle: the
 * module has lapsed and begins anew. */
static void sampled_with_failures(q3n_speculate how, int draft, int idle)
{
    heap h = { 0 };
    step_case c = { .m = open_model("qwen3_next_mtp", &h), .h = &h };
    int32_t prompt[252], text[2][40];
    q3n_speculation stats[2] = { Q3N_INIT(q3n_speculation), Q3N_INIT(q3n_speculation) };
    uint64_t rng = 89;
    random_tokens(&rng, prompt, 9, q3n_model_config(c.m)->vocab_size);
    for (int i = 9; i < COUNT(prompt); i++) prompt[i] = prompt[i - 9];    /* to be looked up */
    c.m->eos.n = 0;
    for (int i = 0; i < 2; i++) {
        q3n_session_options o = plain_options(COUNT(prompt) + COUNT(text[0]));
        q3n_engine_options eo = one_thread;
        o.engine_options = &eo;
        const q3n_sampler_options so = { .temperature = 1.0f, .top_k = 4, .seed = 17,
                                         .repetition_penalty = 1.1f, .penalty_window = 32 };
        o.speculate = how;
        o.draft = draft;
        eo.layer_hook = (q3n_layer_hook){ stop_in_hook, &c.s };
        c.s = create_session(c.m, &o);
        set_sampler(c.s, so);
        c.sampler = q3n_session_sampler(c.s);
        must(c.s, q3n_session_eval(c.s, prompt, COUNT(prompt) - 1, NULL), Q3N_OK);
        int32_t token = prompt[COUNT(prompt) - 1];
        for (int at = 0, n = 0; at < COUNT(text[0]); at += n) {
            const int max = COUNT(text[0]) - at;
            if (idle) c.s->learned.mtp_idle = Q3N__MTP_IDLE + 1, c.s->learned.try_credit = 8.0;
            if (i) step_after_failures(&c, token, text[i] + at, max, &n);
            else must(c.s, q3n_session_decode(c.s, token, text[i] + at, max, &n), Q3N_OK);
            token = text[i][at + n - 1];
        }
        must(c.s, q3n_session_speculation(c.s, &stats[i]), Q3N_OK);
        q3n_session_destroy(c.s);
    }
    assert_true(c.n_failed[0] > 10 && c.n_failed[1] == 1 && c.n_failed[2] > 1);
    if (draft) {
        assert_memory_equal(text[0], text[1], sizeof text[0]);
        assert_memory_equal(&stats[0], &stats[1], sizeof stats[0]);
        assert_true(stats[0].n_drafted > (how == Q3N_SPECULATE_LOOKUP ? 0 : 10));
    }
    q3n_model_close(c.m);
    assert_int_equal(h.live, 0);
}

static void test_failed_steps(void **state)
{
    (void)state;
    sampled_with_failures(Q3N_SPECULATE_MTP, 3, 0);
    sampled_with_failures(Q3N_SPECULATE_LOOKUP, 2, 0);
    sampled_with_failures(Q3N_SPECULATE_AUTO, 4, 0);
    sampled_with_failures(Q3N_SPECULATE_AUTO, 0, 0);
    sampled_with_failures(Q3N_SPECULATE_AUTO, 0, 1);
}

/* Looked-up drafts change no token of a seed's text either. */
static void test_sampled_lookup(void **state)
{
    q3n_model *m = open_model((const char *)*state, NULL);
    const int vocab = q3n_model_config(m)->vocab_size;
    int32_t prompt[40], text[2][100];
    uint64_t rng = 79;
    random_tokens(&rng, prompt, 10, vocab);
    for (int i = 10; i < COUNT(prompt); i++) prompt[i] = prompt[i - 10];
    m->eos.n = 0;
    for (int i = 0; i < 2; i++) {
        q3n_session_options o = plain_options(COUNT(prompt) + COUNT(text[0]));
        const q3n_sampler_options so = {
            .temperature = 0.5f, .top_k = 4, .repetition_penalty = 0.5f, .seed = 13 };
        o.speculate = i ? Q3N_SPECULATE_LOOKUP : Q3N_SPECULATE_OFF;
        o.draft = 5;
        q3n_session *s = create_session(m, &o);
        set_sampler(s, so);
        must(s, q3n_session_eval(s, prompt, COUNT(prompt) - 1, NULL), Q3N_OK);
        int32_t token = prompt[COUNT(prompt) - 1];
        for (int at = 0, n = 0; at < COUNT(text[0]); at += n) {
            must(s, q3n_session_decode(s, token, text[i] + at, COUNT(text[0]) - at, &n), Q3N_OK);
            token = text[i][at + n - 1];
        }
        q3n_speculation stats = Q3N_INIT(q3n_speculation);
        q3n_session_speculation(s, &stats);
        if (i) assert_true(stats.n_accepted > 5 && stats.n_accepted < stats.n_drafted);
        q3n_session_destroy(s);
    }
    assert_memory_equal(text[0], text[1], sizeof text[0]);
    q3n_model_close(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_draft_golden),
        cmocka_unit_test(test_draft_stories),
        cmocka_unit_test(test_no_drafts_beyond_the_end),
        cmocka_unit_test(test_draft_limits),
        cmocka_unit_test(test_engine_of_another),
#define GREEDY(model) CASE(test_greedy_speculation, model),
        FAMILIES_TO_TRY(GREEDY)
        GREEDY(qwen3_head_all_moe)
        cmocka_unit_test(test_greedy_stories),
        cmocka_unit_test(test_sampled_speculation),
        CASE(test_hook, qwen3_next_mtp),
        CASE(test_hook, qwen3_moe),
        cmocka_unit_test(test_hook_that_stops),
        cmocka_unit_test(test_hook_in_a_batch),
        CASE(test_kept, qwen3_next_mtp),
        CASE(test_kept, qwen3_moe),
        cmocka_unit_test(test_kept_apart),
        cmocka_unit_test(test_failed_steps),
        CASE(test_sampled_lookup, qwen3_next),
        CASE(test_sampled_lookup, qwen3_moe),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
