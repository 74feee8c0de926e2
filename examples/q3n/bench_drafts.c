/* q3n bench --mtp: greedy decoding with each source of drafts and with none. */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

/* One row: a source of drafts and a number of threads. */
typedef struct draft_case {
    q3n_speculate   how;
    int             thread;
    q3n_session    *s;
    bench_samples   tok_s;       /* over all texts of a repetition */
    bench_samples   ratio;       /* to no drafts in the same repetition */
    q3n_speculation sum;         /* of all repetitions */
} draft_case;

typedef struct draft_run {
    bench       *b;
    cli_ids      text[BENCH_TEXTS];
    int          n_texts;
    draft_case  *cases;          /* by threads, the first of each without drafts */
    int          n_cases;
    int32_t     *want[BENCH_TEXTS];      /* [n_decode] what is written without drafts */
    int32_t     *got;            /* [n_decode] */
} draft_run;

/* ---- Measuring ---- */

/* Writes got after a text; returns seconds.  Nothing stops at the end of a text. */
static double write_behind(draft_run *r, const draft_case *c, const cli_ids *text)
{
    const bench *b = r->b;
    q3n_session_reset(c->s);
    cli_eval(c->s, text->id, (int)text->n, b->logits);
    int32_t chosen[Q3N_MAX_DRAFT + 1] = { cli_sample(q3n_session_sampler(c->s), b->logits) };
    const double start = cli_clock();
    for (int n = 0, n_chosen = 1; n < b->n_decode; n += n_chosen) {
        const int32_t token = chosen[n_chosen - 1];
        const int left = b->n_decode - n;
        const int max = left < CLI_COUNT(chosen) ? left : CLI_COUNT(chosen);
        cli_check(q3n_session_decode(c->s, token, chosen, max, &n_chosen), c->s);
        memcpy(r->got + n, chosen, (size_t)n_chosen * sizeof *chosen);
    }
    return cli_clock() - start;
}

static void check_tokens(const draft_run *r, const draft_case *c, int text)
{
    for (int t = 0; t < r->b->n_decode; t++) {
        if (r->got[t] == r->want[text][t]) continue;
        cli_fail("drafts (%s) change the text: token %d after text %d is %ld, without them %ld",
                 cli_speculate_name(c->how), t, text, (long)r->got[t], (long)r->want[text][t]);
    }
}

static void add_counts(draft_case *c, const q3n_speculation *before)
{
    q3n_speculation s = Q3N_INIT(q3n_speculation);
    q3n_session_speculation(c->s, &s);
    c->sum.n_steps    += s.n_steps - before->n_steps;
    c->sum.n_tokens   += s.n_tokens - before->n_tokens;
    c->sum.n_drafted  += s.n_drafted - before->n_drafted;
    c->sum.n_accepted += s.n_accepted - before->n_accepted;
}

/* Each text with all cases in turn. */
static void measure_round(void *user, int record)
{
    draft_run *r = user;
    const bench *b = r->b;
    double *seconds = cli_alloc((size_t)r->n_cases, sizeof *seconds);
    for (int i = 0; i < r->n_texts; i++) {
        for (int k = 0; k < r->n_cases; k++) {
            draft_case *c = &r->cases[k];
            q3n_speculation before = Q3N_INIT(q3n_speculation);
            q3n_session_speculation(c->s, &before);
            seconds[k] += write_behind(r, c, &r->text[i]);
            if (record) add_counts(c, &before);
            if (!record && k == 0) {
                memcpy(r->want[i], r->got, (size_t)b->n_decode * sizeof *r->got);
            }
            check_tokens(r, c, i);
        }
    }
    double off = 0.0;
    for (int k = 0; k < r->n_cases; k++) {
        draft_case *c = &r->cases[k];
        if (c->how == Q3N_SPECULATE_OFF) off = seconds[k];
        if (!record) continue;
        bench_add(&c->tok_s, (double)r->n_texts * b->n_decode / seconds[k]);
        bench_add(&c->ratio, off / seconds[k]);
    }
    free(seconds);
}

static void make_cases(draft_run *r)
{
    static const q3n_speculate sources[] = {
        Q3N_SPECULATE_OFF, Q3N_SPECULATE_MTP, Q3N_SPECULATE_LOOKUP, Q3N_SPECULATE_AUTO,
    };
    const q3n_sampler_options greedy = Q3N_INIT(q3n_sampler_options);
    const bench *b = r->b;
    const int has_mtp = q3n_model_config(b->m)->num_mtp_layers > 0;
    size_t longest = 0;
    for (int i = 0; i < r->n_texts; i++) {
        if (r->text[i].n > longest) longest = r->text[i].n;
    }
    const int room = (int)longest + b->n_decode + Q3N_MAX_DRAFT;
    r->cases = cli_alloc(CLI_COUNT(sources) * BENCH_LIST, sizeof *r->cases);
    for (int t = 0; t < b->threads.n; t++) {
        for (int i = 0; i < CLI_COUNT(sources); i++) {
            if (sources[i] == Q3N_SPECULATE_MTP && !has_mtp) continue;
            q3n_session_options o = bench_options(b, t, room);
            o.speculate = sources[i];
            draft_case *c = &r->cases[r->n_cases++];
            *c = (draft_case){ .how = sources[i], .thread = t };
            c->s = cli_create_session(&b->setup, b->m, &o);
            cli_check(q3n_session_set_sampler(c->s, &greedy), c->s);
        }
    }
}

/* ---- Output ---- */

static double per_step(int64_t n, const q3n_speculation *s)
{
    return s->n_steps ? (double)n / (double)s->n_steps : 0.0;
}

static void print_json(const draft_run *r)
{
    const bench *b = r->b;
    bench_json_head(b);
    printf("\"texts\": %d, \"equal\": true, \"drafts\": [", r->n_texts);
    for (int i = 0; i < r->n_cases; i++) {
        const draft_case *c = &r->cases[i];
        printf("%s{\"speculate\": \"%s\", \"threads\": %d, ", i ? ", " : "",
               cli_speculate_name(c->how), b->threads.value[c->thread]);
        bench_json_samples("tok_s", &c->tok_s);
        printf(", ");
        bench_json_samples("ratio", &c->ratio);
        printf(", \"steps\": %lld, \"tokens\": %lld, \"drafted\": %lld, \"accepted\": %lld, "
               "\"drafts_per_step\": %.5g, \"tokens_per_step\": %.5g}", (long long)c->sum.n_steps,
               (long long)c->sum.n_tokens, (long long)c->sum.n_drafted,
               (long long)c->sum.n_accepted, per_step(c->sum.n_drafted, &c->sum),
               per_step(c->sum.n_tokens, &c->sum));
    }
    printf("]}\n");
}

static void print_text(const draft_run *r)
{
    const bench *b = r->b;
    bench_print_head(b);
    for (int i = 0; i < r->n_cases; i++) {
        const draft_case *c = &r->cases[i];
        const bench_spread tok_s = bench_spread_of(&c->tok_s);
        printf("drafts %-6s  %3d threads  %10.2f tokens/s (%.2f .. %.2f)",
               cli_speculate_name(c->how), b->threads.value[c->thread], tok_s.median, tok_s.min,
               tok_s.max);
        if (c->how != Q3N_SPECULATE_OFF) {
            printf("  %.2f x off  %lld of %lld accepted, %.2f drafts and %.2f tokens a step",
                   bench_median(&c->ratio), (long long)c->sum.n_accepted,
                   (long long)c->sum.n_drafted, per_step(c->sum.n_drafted, &c->sum),
                   per_step(c->sum.n_tokens, &c->sum));
        }
        printf("\n");
    }
    printf("the same %d tokens after each of %d texts in all of them\n", b->n_decode, r->n_texts);
}

void bench_drafts(bench *b)
{
    draft_run r = { .b = b };
    const int n = b->prompts.value[0] > 0 ? b->prompts.value[0] : 1;
    if (b->n_decode == 0) cli_misuse("--mtp: there must be tokens to decode (-n)");
    bench_make_ids(b, n * BENCH_TEXTS);
    r.n_texts = q3n_model_n_tokens(b->m) ? BENCH_TEXTS : 1;
    for (int i = 0; i < r.n_texts; i++) {
        bench_text(b, i, n, &r.text[i]);
        r.want[i] = cli_alloc((size_t)b->n_decode, sizeof *r.want[i]);
    }
    r.got = cli_alloc((size_t)b->n_decode, sizeof *r.got);
    make_cases(&r);
    bench_repeat(b, measure_round, &r);
    if (b->json) print_json(&r);
    else         print_text(&r);

    for (int k = 0; k < r.n_cases; k++) q3n_session_destroy(r.cases[k].s);
    for (int i = 0; i < r.n_texts; i++) {
        free(r.text[i].id);
        free(r.want[i]);
    }
    free(r.cases);
    free(r.got);
}
