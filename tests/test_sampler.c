/* test_sampler.c - every filter, alone and together, against a plain implementation that sorts;
 * penalties, ties and extreme logits; the distribution of what is drawn, with drafts too;
 * repeatability. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "isas.h"
#include "steps.h"

#define COUNT(a) (sizeof(a) / sizeof(a)[0])
#define BIG_VOCAB 151936

static uint64_t random_state;

static double random_unit(void)   /* [0, 1) */
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(random_state >> 33) / 2147483648.0;
}

static int random_below(int n) { return (int)(random_unit() * n); }

static float random_normal(void)
{
    return (float)(sqrt(-2.0 * log(1.0 - random_unit())) * cos(6.283185307179586 * random_unit()));
}

static q3n_sampler *create(int vocab, q3n_sampler_options o)
{
    static q3n_model m;   /* the sampler reads only these two fields */
    memset(&m.allocator, 0, sizeof m.allocator);
    m.config.vocab_size = vocab;
    q3n_sampler *s = NULL;
    q3n_error err = { .code = Q3N_OK };
    o.size = sizeof o;
    if (q3n_sampler_create(&s, &m, &o, &err) != Q3N_OK) fail_msg("%s", err.message);
    assert_non_null(s);
    return s;
}

/* ---- The plain implementation ---- */
typedef struct { float v; int id; } entry;

static int by_rank(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    if (x->v != y->v) return x->v > y->v ? -1 : 1;
    return x->id - y->id;
}

static int by_id(const void *a, const void *b)
{
    return ((const entry *)a)->id - ((const entry *)b)->id;
}

/* What is left of logits [n] after all filters, with relative probabilities, in order of rank. */
static int plain_filter(const float *logits, int n, const q3n_sampler_options *o,
                        const int32_t *recent, int n_recent, entry *e)
{
    float scale = 1.44269504f / o->temperature;
    if (scale > FLT_MAX) scale = FLT_MAX;
    for (int i = 0; i < n; i++) {
        float x = isnan(logits[i]) ? -INFINITY : logits[i] > FLT_MAX ? FLT_MAX : logits[i];
        int seen = 0;
        for (int j = 0; j < n_recent; j++) seen |= recent[j] == i;
        if (seen && o->repetition_penalty != 0.0f)
            x = x > 0 ? x / o->repetition_penalty : x * o->repetition_penalty;
        e[i] = (entry){ x > FLT_MAX ? FLT_MAX : x, i };
    }
    qsort(e, (size_t)n, sizeof *e, by_rank);
    if (o->top_k > 0 && o->top_k < n) n = o->top_k;
    const float max = e[0].v;
    double total = 0.0, sum = 0.0;
    for (int i = 0; i < n; i++) {
        e[i].v = q3n__sampler_weight(e[i].v, max, scale);
        total += e[i].v;
    }
    qsort(e, (size_t)n, sizeof *e, by_rank);   /* equal probabilities from unequal logits */
    if (o->top_p > 0.0f && o->top_p < 1.0f) {
        int m = 0;
        while (m < n && (m == 0 || sum < (double)o->top_p * total)) sum += e[m++].v;
        n = m;
    }
    int kept = 0;
    for (int i = 0; i < n; i++) if (e[i].v > 0.0f && e[i].v >= o->min_p) e[kept++] = e[i];
    return kept;
}

static entry want[BIG_VOCAB], got[BIG_VOCAB];
static float logits[BIG_VOCAB];

/* What s keeps, by id; returns how many. */
static int kept_tokens(q3n_sampler *s, entry *e)
{
    int n = 0;
    for (int b = 0; b < s->n_blocks; b++) {
        if (s->block_sum[b] == 0.0f) continue;
        const float *y = q3n__sampler_block(s, b);
        double sum = 0.0;
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i++) {
            sum += (double)y[i];
            if (y[i] > 0.0f) e[n++] = (entry){ y[i], b * Q3N__SAMPLER_BLOCK + i };
        }
        assert_true(fabs(sum - (double)s->block_sum[b]) <= 1e-6 * sum);
    }
    return n;
}

/* The sampler keeps the first tokens by rank, as many as the plain implementation does; in top-p of
 * sums that are rounded, one may be on the other side of the target. */
static void compare(q3n_sampler *s, int n, const int32_t *recent, int n_recent)
{
    q3n_sampler_options o = s->o;
    if (o.repetition_penalty == 1.0f) o.repetition_penalty = 0.0f;
    int n_want = plain_filter(logits, n, &o, recent, n_recent, want);
    const float *x = q3n__sampler_prepare(s, logits, NULL, 0);
    q3n__sampler_filter(s, x, q3n__sampler_maxima(s, x), o.top_k);
    const int n_got = kept_tokens(s, got);
    double sum = 0.0;
    if (n_got != n_want && o.top_p < 1.0f) {
        q3n_sampler_options other = o;
        other.top_p = o.top_p * (n_got > n_want ? 1.0f + 1e-6f : 1.0f - 1e-6f);
        n_want = plain_filter(logits, n, &other, recent, n_recent, want);
    }
    if (n_got != n_want) fail_msg("%d tokens are kept, expected %d", n_got, n_want);
    qsort(want, (size_t)n_want, sizeof *want, by_id);
    for (int i = 0; i < n_want; i++) {
        assert_int_equal(got[i].id, want[i].id);
        assert_true(got[i].v == want[i].v);
        sum += want[i].v;
    }
    assert_true(fabs(s->kept - sum) <= 1e-6 * sum);
}

/* ---- Filters ---- */
static q3n_sampler_options random_options(int n)
{
    q3n_sampler_options o = { .temperature = 0.0f };
    static const float temperatures[] = { 1.0f, 0.7f, 0.05f, 3.0f, 1e-6f, 100.0f };
    o.temperature = temperatures[random_below((int)COUNT(temperatures))];
    if (random_below(2)) o.top_k = 1 + random_below(random_below(2) ? n : 50);
    if (random_below(2)) o.top_p = (float)random_unit();
    if (random_below(8) == 0) o.top_p = 1.0f - (float)random_unit() * 1e-4f;
    if (random_below(2)) o.min_p = (float)(random_unit() * (random_below(2) ? 1.0 : 0.05));
    if (random_below(3) == 0) o.repetition_penalty = (float)(0.5 + random_unit());
    o.penalty_window = random_below(20);
    o.seed = 1;
    return o;
}

static void random_logits(int n)
{
    const int kind = random_below(5);
    for (int i = 0; i < n; i++) {
        const float x = random_normal();
        logits[i] = kind == 0 ? 4.0f * x
                  : kind == 1 ? floorf(2.0f * x)                 /* many ties */
                  : kind == 2 ? 0.01f * x                        /* nearly flat */
                  : kind == 3 ? 30.0f * x * x : (float)i * 0.001f;
        if (random_below(50) == 0) logits[i] = random_below(2) ? NAN : -INFINITY;
        if (random_below(1000) == 0) logits[i] = 1e38f;
    }
    logits[random_below(n)] = 1.0f;
}

static void test_filters_against_sorting(void **state)
{
    (void)state;
    random_state = 11;
    static const int sizes[] = { 1, 2, 3, 17, 63, 64, 65, 200, 1000, 5000 };
    for (int round = 0; round < 600; round++) {
        const int n = sizes[random_below((int)COUNT(sizes))];
        q3n_sampler *s = create(n, random_options(n));
        int32_t recent[64];
        int n_recent = 0;
        const int window = s->o.penalty_window, n_accept = random_below(30);
        for (int i = 0; i < n_accept; i++) {
            const int32_t id = random_below(n);
            q3n_sampler_accept(s, id);
            if (n_accept - i <= window) recent[n_recent++] = id;
        }
        random_logits(n);
        compare(s, n, recent, n_recent);
        q3n_sampler_destroy(s);
    }
}

static void test_filters_on_a_whole_vocabulary(void **state)
{
    (void)state;
    static const q3n_sampler_options list[] = {
        { .temperature = 1.0f, .top_k = 20 }, { .temperature = 0.6f, .top_k = 20, .top_p = 0.95f },
        { .temperature = 1.0f, .top_p = 0.9f }, { .temperature = 1.0f, .min_p = 0.05f },
        { .temperature = 1.0f, .top_k = 3000, .top_p = 0.5f, .min_p = 1e-4f },
        { .temperature = 5.0f, .top_p = 0.999f }, { .temperature = 1.0f, .top_k = 100000 },
        { .temperature = 1.0f }
    };
    random_state = 5;
    for (int kind = 0; kind < 3; kind++) {
        for (int i = 0; i < BIG_VOCAB; i++)
            logits[i] = kind == 0 ? 3.0f * random_normal() : kind == 1 ? 0.0f : (float)(i % 7);
        for (size_t k = 0; k < COUNT(list); k++) {
            q3n_sampler *s = create(BIG_VOCAB, list[k]);
            compare(s, BIG_VOCAB, NULL, 0);
            q3n_sampler_destroy(s);
        }
    }
}

/* Small cases worked by hand: probabilities 1/2, 1/4, 1/8, 1/8. */
static void test_filters_by_hand(void **state)
{
    (void)state;
    static const struct { q3n_sampler_options o; int n, ids[4]; } list[] = {
        { { .temperature = 1.0f }, 4, { 0, 1, 2, 3 } },
        { { .temperature = 1.0f, .top_k = 3 }, 3, { 1, 2, 3 } },   /* ids 0 and 2: equal, 0 first */
        { { .temperature = 1.0f, .top_k = 1 }, 1, { 3 } },
        { { .temperature = 1.0f, .top_p = 0.4f }, 1, { 3 } },
        { { .temperature = 1.0f, .top_p = 0.6f }, 2, { 1, 3 } },
        { { .temperature = 1.0f, .top_p = 0.8f }, 3, { 0, 1, 3 } },
        { { .temperature = 1.0f, .top_p = 0.9f }, 4, { 0, 1, 2, 3 } },
        { { .temperature = 1.0f, .min_p = 0.3f }, 2, { 1, 3 } },
        { { .temperature = 1.0f, .min_p = 1.0f }, 1, { 3 } },
        { { .temperature = 1.0f, .top_p = 1e-30f }, 1, { 3 } },
        /* Of the two that top-k leaves the first has 2/3. */
        { { .temperature = 1.0f, .top_k = 2, .top_p = 0.6f }, 1, { 3 } },
        { { .temperature = 1.0f, .top_k = 2, .top_p = 0.7f }, 2, { 1, 3 } },
        { { .temperature = 1.0f, .top_p = 0.8f, .min_p = 0.4f }, 2, { 1, 3 } }
    };
    const float x[4] = { logf(0.125f), logf(0.25f), logf(0.125f), logf(0.5f) };
    for (size_t k = 0; k < COUNT(list); k++) {
        q3n_sampler *s = create(4, list[k].o);
        q3n__sampler_filter(s, x, q3n__sampler_maxima(s, x), s->o.top_k);
        const int n = kept_tokens(s, got);
        int mask = 0, expected = 0;
        for (int i = 0; i < n; i++) mask |= 1 << got[i].id;
        for (int i = 0; i < list[k].n; i++) expected |= 1 << list[k].ids[i];
        if (k == 1) expected = 1 << 3 | 1 << 1 | 1 << 0;
        assert_int_equal(mask, expected);
        q3n_sampler_destroy(s);
    }
}

/* ---- Greedy, penalty ---- */

/* The token chosen, -1 if there is none, which is an error that says so and changes nothing. */
static int sample(q3n_sampler *s, const float *x)
{
    int32_t id = -7;
    const uint64_t rng = s->rng;
    const int n_window = s->n_window;
    const q3n_result r = q3n_sampler_sample(s, x, &id);
    if (r == Q3N_OK) return id;
    assert_int_equal(r, Q3N_ERR_NUMERIC);
    assert_int_equal(q3n_sampler_error(s)->code, r);
    assert_non_null(strstr(q3n_sampler_error(s)->message, "NaN"));
    assert_true(id == -7 && s->rng == rng && s->n_window == n_window);
    return -1;
}

static int choose(q3n_sampler *s, const float *x, const q3n__draft *d)
{
    int32_t id = 0;
    return q3n__sampler_choose(s, x, NULL, 0, d, &id) == Q3N_OK ? id : -1;
}

static void test_greedy(void **state)
{
    (void)state;
    q3n_sampler *s = create(5, (q3n_sampler_options){ .temperature = 0.0f });
    const float ties[5] = { -1.0f, 2.0f, 2.0f, 0.0f, 2.0f };
    const float nans[5] = { NAN, -5.0f, NAN, -INFINITY, -4.0f };
    const float infinite[5] = { 3e38f, 0.0f, INFINITY, INFINITY, 0.0f };
    const float nothing[5] = { NAN, -INFINITY, NAN, -INFINITY, NAN };
    assert_int_equal(sample(s, ties), 1);
    assert_int_equal(sample(s, nans), 4);
    assert_int_equal(sample(s, infinite), 2);
    assert_int_equal(sample(s, nothing), -1);
    assert_int_equal(sample(s, ties), 1);                  /* it goes on */
    assert_int_equal(q3n_sampler_sample(s, NULL, NULL), Q3N_ERR_ARG);
    assert_int_equal(q3n_sampler_sample(NULL, ties, NULL), Q3N_ERR_ARG);
    q3n_sampler_destroy(s);
    s = create(5, (q3n_sampler_options){ .temperature = 1.0f, .top_p = 0.5f, .min_p = 0.1f });
    assert_int_equal(sample(s, nothing), -1);
    for (int i = 0; i < 20; i++) {
        const int id = sample(s, infinite);
        assert_true(id == 2 || id == 3);
        assert_int_equal(sample(s, nans), 4);
    }
    q3n_sampler_destroy(s);
    s = create(1, (q3n_sampler_options){ .temperature = 1.0f, .top_k = 5, .top_p = 0.1f });
    assert_int_equal(sample(s, infinite), 0);
    q3n_sampler_destroy(s);
}

/* The first of the largest, wherever it stands in a block: NaN and infinities, ties, penalty. */
static void test_greedy_against_a_plain_loop(void **state)
{
    (void)state;
    random_state = 17;
    for (int round = 0; round < 2000; round++) {
        const int n = 1 + random_below(300);
        const int penalised = random_below(2) ? random_below(n) : -1;
        q3n_sampler *s = create(n, (q3n_sampler_options){ .repetition_penalty = 1.5f });
        q3n_sampler_accept(s, penalised);
        random_logits(n);
        if (random_below(3) == 0) logits[random_below(n)] = INFINITY;
        const int nothing = random_below(9) == 0;
        for (int i = 0; nothing && i < n; i++) logits[i] = random_below(2) ? NAN : -INFINITY;
        int best = -1;
        float max = -INFINITY;
        for (int i = 0; i < n; i++) {
            float x = logits[i] > FLT_MAX ? FLT_MAX : logits[i];
            if (i == penalised) x = x > 0.0f ? x / 1.5f : x * 1.5f;
            if (!(x > max)) continue;
            max = x;
            best = i;
        }
        assert_int_equal(sample(s, logits), best);
        q3n_sampler_destroy(s);
    }
}

/* With temperature 0 the penalty alone decides. */
static void test_penalty(void **state)
{
    (void)state;
    const q3n_sampler_options o = { .repetition_penalty = 2.0f, .penalty_window = 3 };
    const float positive[4] = { 4.0f, 3.0f, 1.9f, 1.0f };
    const float negative[4] = { -1.0f, -1.5f, -1.8f, -9.0f };
    q3n_sampler *s = create(4, o);
    assert_int_equal(sample(s, positive), 0);   /* then 2, 3, 1.9, 1    */
    assert_int_equal(sample(s, positive), 1);   /* then 2, 1.5, 1.9, 1  */
    assert_int_equal(sample(s, positive), 0);   /* 0 twice in the window, halved once */
    assert_int_equal(sample(s, positive), 0);   /* window 1 0 0         */
    q3n_sampler_accept(s, 0);                               /* window 0 0 0: 1 is forgotten */
    assert_int_equal(sample(s, positive), 1);
    q3n_sampler_reset(s);
    assert_int_equal(sample(s, negative), 0);   /* then -2, -1.5        */
    assert_int_equal(sample(s, negative), 1);   /* then -2, -3, -1.8    */
    assert_int_equal(sample(s, negative), 2);
    q3n_sampler_accept(s, -1);                              /* no such ids: nothing happens */
    q3n_sampler_accept(s, 4);
    assert_int_equal(sample(s, negative), 0);   /* window 0 1 2         */
    q3n_sampler_destroy(s);
}

static void test_default_window(void **state)
{
    (void)state;
    q3n_sampler *s = create(3, (q3n_sampler_options){ .repetition_penalty = 10.0f });
    const float x[3] = { 2.0f, 1.0f, -9.0f };
    q3n_sampler_accept(s, 0);
    for (int i = 0; i < 63; i++) q3n_sampler_accept(s, 2);
    assert_int_equal(sample(s, x), 1);   /* 0 is the 64th token back */
    q3n_sampler_reset(s);
    q3n_sampler_accept(s, 0);
    for (int i = 0; i < 64; i++) q3n_sampler_accept(s, 2);
    assert_int_equal(sample(s, x), 0);   /* the 65th */
    q3n_sampler_destroy(s);
}

static void test_logits_are_left_alone(void **state)
{
    (void)state;
    q3n_sampler *s = create(300, (q3n_sampler_options){ .temperature = 0.8f, .top_p = 0.9f,
                                                        .repetition_penalty = 1.5f });
    random_state = 3;
    random_logits(300);
    float before[300];
    memcpy(before, logits, sizeof before);
    for (int i = 0; i < 50; i++) sample(s, logits);
    assert_memory_equal(before, logits, sizeof before);
    q3n_sampler_destroy(s);
}

/* ---- Drawing ---- */

/* Pearson's statistic of hits [n] against probabilities p; tokens expected less than five times
 * count as one.  The bound is Wilson and Hilferty's for five standard deviations: chance exceeds it
 * once in some million seeds, and never with these. */
static void check_hits(const int *hits, const double *p, int n, const char *what)
{
    int draws = 0, classes = 0, rare_hits = 0;
    double chi2 = 0.0, rare = 0.0;
    for (int i = 0; i < n; i++) draws += hits[i];
    for (int i = 0; i < n; i++) {
        const double expected = draws * p[i], d = hits[i] - expected;
        if (p[i] == 0.0) {
            if (hits[i]) fail_msg("%s: token %d came %d times", what, i, hits[i]);
        } else if (expected < 5.0) {
            rare += expected;
            rare_hits += hits[i];
        } else {
            chi2 += d * d / expected;
            classes++;
        }
    }
    if (rare > 0.0) {
        chi2 += (rare_hits - rare) * (rare_hits - rare) / rare;
        classes++;
    }
    const double v = 2.0 / (9.0 * (classes > 1 ? classes - 1 : 1));
    const double bound = classes > 1 ? (classes - 1) * pow(1.0 - v + 5.0 * sqrt(v), 3.0) : 1e-9;
    if (chi2 > bound) fail_msg("%s: chi-square %.1f of %d classes", what, chi2, classes);
}

/* The probabilities of the n tokens of x after all filters, by id. */
static void plain_p(const float *x, int n, const q3n_sampler_options *o, const int32_t *recent,
                    int n_recent, double *p)
{
    const int kept = plain_filter(x, n, o, recent, n_recent, want);
    double total = 0.0;
    for (int i = 0; i < n; i++) p[i] = 0.0;
    for (int i = 0; i < kept; i++) total += want[i].v;
    for (int i = 0; i < kept; i++) p[want[i].id] = want[i].v / total;
}

static void check_distribution(const q3n_sampler_options *o, int n)
{
    int hits[64] = { 0 };
    double p[64];
    assert_true(n <= 64);
    q3n_sampler *s = create(n, *o);
    for (int i = 0; i < 200000; i++) {
        const int32_t id = sample(s, logits);
        assert_in_range(id, 0, n - 1);
        hits[id]++;
    }
    q3n_sampler_destroy(s);
    plain_p(logits, n, o, NULL, 0, p);
    check_hits(hits, p, n, "sample");
}

static void test_distribution(void **state)
{
    (void)state;
    random_state = 21;
    for (int i = 0; i < 64; i++) logits[i] = 0.9f * random_normal();
    static const q3n_sampler_options list[] = {
        { .temperature = 1.0f, .seed = 1 }, { .temperature = 2.0f, .seed = 2 },
        { .temperature = 1.0f, .top_k = 10, .seed = 3 }, { .temperature = 1.0f, .top_p = 0.7f },
        { .temperature = 1.0f, .min_p = 0.2f, .seed = UINT64_MAX },
        { .temperature = 0.8f, .top_k = 30, .top_p = 0.9f, .min_p = 0.05f, .seed = 4 },
        { .temperature = 1.0f, .top_k = 1, .seed = 5 }
    };
    for (size_t k = 0; k < COUNT(list); k++) check_distribution(&list[k], 64);
}

/* ---- Drafts ---- */
enum { SAME, NEAR, UNLIKE, OPPOSITE, BY_HAND, POINT, POOR_POINT, DRAFT_KINDS };

/* The logits that a draft of this kind is drawn from, for the target's x; 0 if there are none. */
static int draft_logits(int kind, const float *x, int n, float *y)
{
    for (int i = 0; i < n; i++)
        y[i] = kind == SAME ? x[i] : kind == NEAR ? x[i] + 0.5f * random_normal()
             : kind == UNLIKE ? 2.0f * random_normal() : -3.0f * x[i];
    return kind <= OPPOSITE;
}

/* A draft of this kind: from y, a quarter each of four tokens, or a point. */
static void make_draft(q3n_sampler *s, int kind, const float *y, int n, q3n__draft *d)
{
    if (kind <= OPPOSITE) {
        assert_true(q3n__sampler_draft(s, y, NULL, 0, d));
    } else if (kind == BY_HAND) {
        *d = (q3n__draft){ .n = 4, .ids = { n - 1, 0, n / 2, 1 }, .p = { .25f, .25f, .25f, .25f } };
        d->id = d->ids[random_below(4)];
    } else {
        int best = 0, worst = 0;
        for (int i = 0; i < n; i++) best = y[i] < y[best] ? i : best;
        for (int i = 0; i < n; i++) worst = y[i] > y[worst] ? i : worst;
        q3n__draft_point(d, kind == POINT ? best : worst);   /* y is the opposite of x */
    }
}

static void set_window(q3n_sampler *s, const int32_t *recent, int n)
{
    s->n_window = s->next = 0;
    for (int i = 0; i < n; i++) q3n_sampler_accept(s, recent[i]);
}

/* Tokens chosen with drafts have the sampler's distribution p, drafts the one they say, q, and
 * sum min(p, q) of them are accepted. */
static void check_drafts(const q3n_sampler_options *o, int n, int kind, int draws)
{
    static const int32_t recent[] = { 3, 1, 3, 6 };
    int hits[64] = { 0 }, drafts[64] = { 0 }, accepted = 0;
    double p[64], q[64], plain_q[64], rate = 0.0;
    float y[64];
    char what[99];
    snprintf(what, sizeof what, "T %g, top-k %d, top-p %g, min-p %g, penalty %g, draft %d",
             (double)o->temperature, o->top_k, (double)o->top_p, (double)o->min_p,
             (double)o->repetition_penalty, kind);
    const int drawn = draft_logits(kind, logits, n, y);
    q3n_sampler *s = create(n, *o);
    q3n__draft d;
    for (int i = 0; i < draws; i++) {
        set_window(s, recent, COUNT(recent));
        make_draft(s, kind, y, n, &d);
        assert_int_equal(s->n_window, COUNT(recent));
        const int32_t id = choose(s, logits, &d);
        assert_int_equal(s->window[COUNT(recent)], id);
        hits[id]++;
        drafts[d.id]++;
        accepted += id == d.id;
    }
    q3n_sampler_destroy(s);
    for (int i = 0; i < n; i++) q[i] = 0.0;
    for (int i = 0; i < d.n; i++) q[d.ids[i]] += (double)d.p[i];
    if (drawn) plain_p(y, n, o, recent, COUNT(recent), plain_q);
    plain_p(logits, n, o, recent, COUNT(recent), p);
    for (int i = 0; i < n; i++) {
        if (drawn) assert_true(fabs(plain_q[i] - q[i]) < 1e-6);
        rate += p[i] < q[i] ? p[i] : q[i];
    }
    check_hits(hits, p, n, what);
    check_hits(drafts, q, n, what);
    if (kind == SAME) assert_true(rate > 1.0 - 1e-5);
    const double noise = 5.0 * sqrt(draws * fabs(rate * (1.0 - rate))) + 1e-3;
    if (fabs(accepted - draws * rate) > noise + 1e-6 * draws)
        fail_msg("%s: %d accepted, expected %.0f", what, accepted, draws * rate);
}

static void test_drafts(void **state)
{
    (void)state;
    static const q3n_sampler_options list[] = {
        { .temperature = 1.0f }, { .temperature = 0.7f }, { .temperature = 1.5f, .seed = 1 },
        { .temperature = 1.0f, .top_k = 5, .seed = 2 }, { .temperature = 1.0f, .top_p = 0.7f },
        { .temperature = 1.0f, .min_p = 0.1f, .seed = 3 },
        { .temperature = 1.5f, .repetition_penalty = 1.8f, .seed = 4 },
        { .temperature = 0.7f, .top_k = 7, .top_p = 0.9f, .min_p = 0.02f,
          .repetition_penalty = 1.1f, .seed = 5 }
    };
    static const int sizes[] = { 8, 12, 50 };
    random_state = 31;
    for (size_t k = 0; k < COUNT(list); k++)
        for (int kind = 0; kind < DRAFT_KINDS; kind++) {
            const int n = sizes[((int)k + kind) % 3];
            for (int i = 0; i < n; i++) logits[i] = 1.2f * random_normal();
            check_drafts(&list[k], n, kind, 10000);
        }
    for (int kind = NEAR; kind <= BY_HAND; kind++) check_drafts(&list[0], 10, kind, 100000);
}

/* A point, of the vocabulary or not, does not change the text; nor does any draft when greedy. */
static void test_drafts_that_change_nothing(void **state)
{
    (void)state;
    random_state = 13;
    for (int round = 0; round < 100; round++) {
        const int n = 5 + random_below(200), greedy = round % 2;
        q3n_sampler_options o = random_options(n);
        if (greedy) o.temperature = 0.0f;
        q3n_sampler *a = create(n, o), *b = create(n, o);
        for (int i = 0; i < 20; i++) {
            q3n__draft d;
            random_logits(n);
            make_draft(a, BY_HAND, NULL, n, &d);
            if (!greedy) q3n__draft_point(&d, random_below(n + 2) - 1);
            const int32_t id = sample(a, logits);
            if (greedy && random_below(2)) {
                assert_true(q3n__sampler_draft(b, logits, NULL, 0, &d));
                assert_true(d.id == id && d.n == 1 && d.ids[0] == id && d.p[0] == 1.0f);
            }
            assert_int_equal(choose(b, logits, i % 5 ? &d : NULL), id);
            assert_true(a->rng == b->rng);
        }
        q3n_sampler_destroy(a);
        q3n_sampler_destroy(b);
    }
}

/* The residual of all candidates against a search for each; the most that a draft can hold. */
static void check_residual(q3n_sampler *s, int n)
{
    q3n__draft d;
    double sum = 0.0;
    random_logits(n);
    assert_true(q3n__sampler_draft(s, logits, NULL, 0, &d));
    random_logits(n);
    const float *x = q3n__sampler_prepare(s, logits, NULL, 0);
    q3n__sampler_filter(s, x, q3n__sampler_maxima(s, x), s->o.top_k);
    const int n_p = kept_tokens(s, got);
    int n_want = 0;
    for (int i = 0; i < n_p; i++) {
        double q = 0.0;
        for (int j = 0; j < d.n; j++) if (d.ids[j] == got[i].id) q = (double)d.p[j];
        const float left = (float)((double)got[i].v - q * s->kept);
        if (left > 0.0f) want[n_want++] = (entry){ left, got[i].id };
    }
    q3n__sampler_residual(s, &d);
    const int n_left = kept_tokens(s, got);
    assert_int_equal(n_left, n_want);
    for (int i = 0; i < n_left; i++) {
        assert_int_equal(got[i].id, want[i].id);
        assert_true(got[i].v == want[i].v);
        sum += (double)want[i].v;
    }
    assert_true(fabs(s->kept - sum) <= 1e-6 * sum);
}

static void test_residual(void **state)
{
    (void)state;
    random_state = 41;
    for (int round = 0; round < 304; round++) {
        const int n = round < 4 ? BIG_VOCAB : 70 + random_below(2000);
        q3n_sampler *s = create(n, round < 4 ? (q3n_sampler_options){ .temperature = 1.0f }
                                             : random_options(n));
        check_residual(s, n);
        q3n_sampler_destroy(s);
    }
    /* More than p everywhere, as rounding can make it: p is what is left. */
    const float x[3] = { 0.0f, 1.0f, 0.0f };
    const q3n__draft d = { .n = 3, .ids = { 2, 0, 1 }, .p = { 0.3f, 0.3f, 0.6f } };
    q3n_sampler *s = create(3, (q3n_sampler_options){ .temperature = 1.0f });
    q3n__sampler_filter(s, x, q3n__sampler_maxima(s, x), 0);
    const double before = s->kept;
    q3n__sampler_residual(s, &d);
    assert_int_equal(kept_tokens(s, got), 3);
    assert_true(s->kept == before && got[1].v == 1.0f);
    q3n_sampler_destroy(s);
}

/* Whatever the logits of draft and target are: drafts are distributions over tokens that differ,
 * and what is chosen is a token that the filters leave. */
static void test_drafts_of_extreme_logits(void **state)
{
    (void)state;
    random_state = 19;
    for (int round = 0; round < 1000; round++) {
        const int n = 2 + random_below(150), nothing = random_below(10);
        const q3n_sampler_options o = random_options(n);
        static double p[200];
        q3n_sampler *s = create(n, o);
        q3n__draft d;
        random_logits(n);
        if (random_below(3) == 0) logits[random_below(n)] = INFINITY;
        for (int i = 0; nothing == 0 && i < n; i++) logits[i] = random_below(2) ? NAN : -INFINITY;
        assert_int_equal(q3n__sampler_draft(s, logits, NULL, 0, &d), nothing != 0);
        if (nothing == 0) q3n__draft_point(&d, 0);
        assert_in_range(d.n, 1, Q3N__DRAFT_MAX);
        double sum = 0.0;
        int among = 0;
        for (int i = 0; i < d.n; i++) {
            assert_in_range(d.ids[i], 0, n - 1);
            for (int j = 0; j < i; j++) assert_int_not_equal(d.ids[i], d.ids[j]);
            assert_true(d.p[i] >= 0.0f);
            sum += (double)d.p[i];
            among |= d.ids[i] == d.id;
        }
        assert_true(among && fabs(sum - 1.0) < 1e-5);
        random_logits(n);
        if (random_below(3) == 0) logits[random_below(n)] = INFINITY;
        for (int i = 0; nothing == 1 && i < n; i++) logits[i] = random_below(2) ? NAN : -INFINITY;
        const int32_t id = choose(s, logits, &d);
        if (nothing != 1) plain_p(logits, n, &o, NULL, 0, p);
        assert_true(nothing == 1 ? id == -1 : p[id] > 0.0);
        q3n_sampler_destroy(s);
    }
}

/* The same seed gives the same text; another one does not; reset starts again. */
static void test_seed(void **state)
{
    (void)state;
    q3n_sampler_options o = { .temperature = 1.0f, .seed = 42, .repetition_penalty = 1.1f };
    q3n_sampler *a = create(1000, o), *b = create(1000, o);
    o.seed = 43;
    q3n_sampler *c = create(1000, o);
    int32_t first[100];
    int same = 0;
    random_state = 8;
    for (int i = 0; i < 1000; i++) logits[i] = random_normal();
    for (int i = 0; i < 100; i++) {
        first[i] = sample(a, logits);
        assert_int_equal(sample(b, logits), first[i]);
        same += sample(c, logits) == first[i];
    }
    assert_true(same < 20);
    q3n_sampler_reset(a);
    for (int i = 0; i < 100; i++) assert_int_equal(sample(a, logits), first[i]);
    q3n_sampler_destroy(a);
    q3n_sampler_destroy(b);
    q3n_sampler_destroy(c);
}

/* SplitMix64's published first outputs for seed 1234567. */
static void test_random_numbers(void **state)
{
    (void)state;
    static const uint64_t outputs[] = { 6457827717110365317u, 3203168211198807973u,
                                        9817491932198370423u, 4593380528125082431u };
    uint64_t rng = 1234567;
    for (size_t i = 0; i < COUNT(outputs); i++)
        assert_true(q3n__random_unit(&rng) == (double)(outputs[i] >> 11) / 9007199254740992.0);
}

/* Another seed: its own numbers, the tokens remembered stay; reset begins it again. */
static void test_another_seed(void **state)
{
    (void)state;
    const q3n_sampler_options o = { .temperature = 2.0f, .seed = 5, .repetition_penalty = 1.5f };
    q3n_sampler_options other = o;
    other.seed = 6;
    q3n_sampler *a = create(500, o), *b = create(500, other);
    for (int i = 0; i < 500; i++) logits[i] = (float)(i % 9) - 4.0f;
    for (int i = 0; i < 30; i++) {
        const int32_t id = sample(a, logits);
        q3n_sampler_accept(b, id);
    }
    q3n_sampler_seed(a, 6);
    for (int i = 0; i < 20; i++) assert_int_equal(sample(a, logits), sample(b, logits));
    q3n_sampler_reset(a);
    q3n_sampler_reset(b);
    for (int i = 0; i < 20; i++) assert_int_equal(sample(a, logits), sample(b, logits));
    q3n_sampler_destroy(a);
    q3n_sampler_destroy(b);
}

/* State: the window from its oldest token, into samplers with as large a window or another. */
static void test_state(void **state)
{
    (void)state;
    q3n__sampler_state *st = (q3n__sampler_state *)calloc(1, q3n__sampler_state_bytes(1 + 8));
    assert_non_null(st);
    for (int i = 0; i < 500; i++) logits[i] = (float)(i % 9) - 4.0f;
    for (int n = 0; n < 30; n++)
        for (int room = 1; room <= 11; room++) {
            q3n_sampler_options o = { .temperature = 1.0f, .repetition_penalty = 1.5f,
                                      .penalty_window = 8, .seed = 3 };
            q3n_sampler *a = create(500, o);
            for (int i = 0; i < n; i++) q3n_sampler_accept(a, 10 + i);
            a->rng += (uint64_t)n;
            const int kept = n < 8 ? n : 8, fit = kept < room ? kept : room;
            assert_int_equal(a->n_window, kept);
            q3n__sampler_get_state(a, st);
            for (int i = 0; i < kept; i++) assert_int_equal(st->window[i], 10 + n - kept + i);
            o.penalty_window = room;
            o.seed = 99;
            q3n_sampler *b = create(500, o), *c = create(500, o);
            for (int i = 0; i < n % 5; i++) q3n_sampler_accept(b, 400 + i);
            q3n__sampler_set_state(b, st, kept);
            for (int i = fit; i > 0; i--) q3n_sampler_accept(c, 10 + n - i);
            c->rng = a->rng;
            assert_int_equal(b->n_window, fit);
            assert_true(b->rng == a->rng);
            for (int i = 0; i < 15; i++) {
                const int32_t id = sample(b, logits);
                assert_int_equal(id, sample(c, logits));
                if (room == 8) assert_int_equal(id, sample(a, logits));
            }
            q3n_sampler_destroy(a);
            q3n_sampler_destroy(b);
            q3n_sampler_destroy(c);
        }
    free(st);
}

/* ---- The hook ---- */
typedef struct { int calls, forced, n_tokens; const int32_t *tokens; } hook_calls;

/* forced: the only token left; -1 = none is; -2 = logits [10, 20) gain 100. */
static void hook(void *user, float *x, int n_vocab, const int32_t *tokens, int n_tokens)
{
    hook_calls *h = (hook_calls *)user;
    h->calls++;
    h->tokens = tokens;
    h->n_tokens = n_tokens;
    for (int i = 0; h->forced == -2 && i < 20; i++) if (i >= 10) x[i] += 100.0f;
    for (int i = 0; h->forced > -2 && i < n_vocab; i++)
        if (i != h->forced) x[i] = i % 2 ? -INFINITY : NAN;
}

static void test_hook(void **state)
{
    (void)state;
    static const q3n_sampler_options list[] = {
        { .temperature = 0.0f }, { .temperature = 1.0f, .seed = 3 },
        { .temperature = 1.0f, .top_k = 7 }, { .temperature = 1.0f, .top_p = 0.9f },
        { .temperature = 1.0f, .min_p = 0.1f, .repetition_penalty = 1.3f },
        { .repetition_penalty = 1e6f } };
    float before[200];
    for (int i = 0; i < 200; i++) before[i] = logits[i] = (float)(i * 7 % 50);
    for (size_t k = 0; k < COUNT(list); k++) {
        hook_calls h = { .forced = 0 };
        q3n_sampler_options o = list[k];
        o.logits_hook = (q3n_logits_hook){ hook, &h };
        q3n_sampler *s = create(200, o);
        for (int i = 0; i < 200; i++) {
            h.forced = i;                        /* tokens that no filter would keep, and again */
            assert_int_equal(sample(s, logits), i);
            assert_int_equal(sample(s, logits), i);
            assert_true(h.n_tokens == 0 && h.tokens == NULL && h.calls == 2 * i + 2);
        }
        const uint64_t rng = s->rng;
        const int n_window = s->n_window, next = s->next;
        int32_t token = -7;
        h.forced = -1;
        assert_int_equal(q3n_sampler_sample(s, logits, &token), Q3N_ERR_NUMERIC);
        assert_non_null(strstr(q3n_sampler_error(s)->message, "masked"));
        assert_true(token == -7 && s->rng == rng && s->n_window == n_window && s->next == next);
        q3n__draft d;
        assert_int_equal(q3n__sampler_draft(s, logits, &token, 1, &d), 0);
        assert_true(h.tokens == &token && h.n_tokens == 1 && s->rng == rng);
        h.forced = -2;
        assert_in_range(sample(s, logits), 10, 19);
        assert_memory_equal(logits, before, sizeof before);
        q3n_sampler_destroy(s);
    }
}

/* What the hook makes of logits is chosen from as logits of that kind are, penalty and all. */
static void test_hook_comes_first(void **state)
{
    (void)state;
    random_state = 55;
    for (int round = 0; round < 100; round++) {
        const int n = 20 + random_below(500);
        hook_calls h = { .forced = -2 };
        q3n_sampler_options o = random_options(n);
        q3n_sampler *plain = create(n, o);
        o.logits_hook = (q3n_logits_hook){ hook, &h };
        q3n_sampler *hooked = create(n, o);
        for (int i = 0; i < 20; i++) {
            static float edited[5000];
            random_logits(n);
            memcpy(edited, logits, (size_t)n * sizeof *edited);
            for (int k = 10; k < 20; k++) edited[k] += 100.0f;
            assert_int_equal(sample(hooked, logits), sample(plain, edited));
        }
        q3n_sampler_destroy(plain);
        q3n_sampler_destroy(hooked);
    }
}

/* ---- Options, memory, time ---- */
static void test_option_errors(void **state)
{
    (void)state;
    static const struct { q3n_sampler_options o; const char *why; } list[] = {
        { { .temperature = -1.0f }, "temperature" }, { { .temperature = NAN }, "temperature" },
        { { .temperature = INFINITY }, "temperature" }, { { .top_k = -1 }, "top_k" },
        { { .top_p = -0.1f }, "top_p" }, { { .top_p = NAN }, "top_p" },
        { { .top_p = 1.001f }, "top_p" }, { { .top_p = INFINITY }, "top_p" },
        { { .repetition_penalty = INFINITY }, "repetition_penalty" },
        { { .min_p = -0.1f }, "min_p" }, { { .min_p = 1.1f }, "min_p" },
        { { .min_p = NAN }, "min_p" }, { { .repetition_penalty = -1.0f }, "repetition_penalty" },
        { { .repetition_penalty = NAN }, "repetition_penalty" },
        { { .penalty_window = -1 }, "penalty_window" },
        { { .penalty_window = INT_MAX }, "penalty_window" }
    };
    static q3n_model m;
    m.config.vocab_size = 10;
    for (size_t k = 0; k < COUNT(list); k++) {
        q3n_sampler *s = (q3n_sampler *)&m;
        q3n_error err = { .code = Q3N_OK };
        q3n_sampler_options o = list[k].o;
        o.size = sizeof o;
        assert_int_equal(q3n_sampler_create(&s, &m, &o, &err), Q3N_ERR_ARG);
        assert_null(s);
        if (!strstr(err.message, list[k].why)) fail_msg("'%s'", err.message);
    }
    q3n_sampler *s;
    assert_int_equal(q3n_sampler_create(&s, &m, NULL, NULL), Q3N_OK);   /* greedy */
    const float x[10] = { [7] = 1.0f };
    assert_int_equal(sample(s, x), 7);
    q3n_sampler_destroy(s);
    q3n_sampler_destroy(NULL);
}

static int allocations, frees, fail_next;
static void *counted_alloc(void *user, size_t bytes)
{
    (void)user;
    allocations++;
    return fail_next ? NULL : malloc(bytes);
}
static void counted_free(void *user, void *memory, size_t bytes)
{
    (void)user; (void)bytes;
    frees++;
    free(memory);
}

static void test_memory(void **state)
{
    (void)state;
    static q3n_model m;
    m.allocator = (q3n_allocator){ counted_alloc, counted_free, NULL };
    m.config.vocab_size = 1000;
    hook_calls h = { .forced = -2 };
    const q3n_sampler_options o = { .size = sizeof o, .temperature = 1.0f, .top_k = 40,
                                    .top_p = 0.9f, .logits_hook = { hook, &h } };
    q3n_sampler *s;
    assert_int_equal(q3n_sampler_create(&s, &m, &o, NULL), Q3N_OK);
    for (int i = 0; i < 1000; i++) logits[i] = (float)(i % 10);
    for (int i = 0; i < 100; i++) sample(s, logits);
    assert_int_equal(allocations, 1);
    q3n_sampler_destroy(s);
    assert_int_equal(frees, 1);
    fail_next = 1;
    q3n_error err;
    assert_int_equal(q3n_sampler_create(&s, &m, &o, &err), Q3N_ERR_MEMORY);
    assert_null(s);
}

/* Steps of selecting from candidates are bounded, whatever the logits are. */
static void test_selection_is_bounded(void **state)
{
    (void)state;
    static const q3n_sampler_options list[] = {
        { .temperature = 1.0f, .top_k = 20 }, { .temperature = 1.0f, .top_k = 100000 },
        { .temperature = 1.0f, .top_p = 0.5f }, { .temperature = 1.0f, .top_p = 0.999999f },
        { .temperature = 1.0f, .top_k = 5000, .top_p = 0.3f }
    };
    random_state = 77;
    for (int kind = 0; kind < 6; kind++) {
        for (int i = 0; i < BIG_VOCAB; i++)
            logits[i] = kind == 0 ? 0.0f : kind == 1 ? (float)i * 1e-4f : kind == 2
                      ? -(float)i * 1e-4f : kind == 3 ? (float)(i % 2) : kind == 4
                      ? random_normal() : (float)(i % 777) * 1e-7f;
        for (size_t k = 0; k < COUNT(list); k++) {
            q3n_sampler *s = create(BIG_VOCAB, list[k]);
            steps = 0;
            assert_in_range(sample(s, logits), 0, BIG_VOCAB - 1);
            assert_in_range(steps, 0, 2 * 8 * BIG_VOCAB);
            q3n_sampler_destroy(s);
        }
    }
}

/* Choices depend on the logits alone, not on the instruction set. */
static void test_every_isa_chooses_alike(void **state)
{
    (void)state;
    random_state = 99;
    for (int round = 0; round < 60; round++) {
        const int n = round % 10 ? 1 + random_below(5000) : BIG_VOCAB;
        const q3n_sampler_options o = random_options(n);
        random_logits(n);
        int32_t first[20] = { 0 };
        for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {
            if (!q3n_isa_supported(isa)) continue;
            q3n_sampler *s = create(n, o);
            q3n__kernels_init(&s->k, isa);
            for (size_t k = 0; k < COUNT(first); k++) {
                const int id = sample(s, logits);
                if (isa == Q3N_ISA_SCALAR) first[k] = id;
                assert_int_equal(id, first[k]);
            }
            q3n_sampler_destroy(s);
        }
    }
}

/* A whole vocabulary, often enough that work of its square would take hours: tests/run.sh ends a
 * suite by the CPU seconds that it used. */
static void test_linear_work(void **state)
{
    (void)state;
    static const q3n_sampler_options list[] = {
        { .temperature = 0.0f }, { .temperature = 1.0f, .top_k = 20 },
        { .temperature = 1.0f, .top_p = 0.95f }, { .temperature = 1.0f },
        { .temperature = 1.0f, .min_p = 0.05f }
    };
    static float other[BIG_VOCAB];
    random_state = 4;
    for (int i = 0; i < BIG_VOCAB; i++) logits[i] = 2.0f * random_normal();
    for (int i = 0; i < BIG_VOCAB; i++) other[i] = 2.0f * random_normal();
    for (size_t k = 0; k < COUNT(list); k++) {
        q3n_sampler *s = create(BIG_VOCAB, list[k]);
        for (int i = 0; i < 20; i++) {
            q3n__draft d;
            int id = sample(s, logits);
            assert_true(id >= 0 && id < BIG_VOCAB);
            assert_true(q3n__sampler_draft(s, other, NULL, 0, &d));
            id = choose(s, logits, &d);     /* rejected, but for chance */
            assert_true(id >= 0 && id < BIG_VOCAB);
        }
        q3n_sampler_destroy(s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_filters_against_sorting),
        cmocka_unit_test(test_filters_on_a_whole_vocabulary),
        cmocka_unit_test(test_filters_by_hand), cmocka_unit_test(test_greedy),
        cmocka_unit_test(test_greedy_against_a_plain_loop), cmocka_unit_test(test_penalty),
        cmocka_unit_test(test_default_window),
        cmocka_unit_test(test_logits_are_left_alone), cmocka_unit_test(test_distribution),
        cmocka_unit_test(test_drafts), cmocka_unit_test(test_drafts_that_change_nothing),
        cmocka_unit_test(test_residual), cmocka_unit_test(test_drafts_of_extreme_logits),
        cmocka_unit_test(test_seed), cmocka_unit_test(test_random_numbers),
        cmocka_unit_test(test_another_seed), cmocka_unit_test(test_state),
        cmocka_unit_test(test_hook),
        cmocka_unit_test(test_hook_comes_first),
        cmocka_unit_test(test_option_errors), cmocka_unit_test(test_memory),
        cmocka_unit_test(test_selection_is_bounded),
        cmocka_unit_test(test_every_isa_chooses_alike),
        cmocka_unit_test(test_linear_work)
    };
    return cmocka_run_group_tests_name("sampler", tests, NULL, NULL);
}
