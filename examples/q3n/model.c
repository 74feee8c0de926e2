/* Opening models and sessions, and evaluating whole texts. */
#include "cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void print_note(void *user, q3n_log_level level, const char *message)
{
    const int verbose = *(const int *)user;
    if (level == Q3N_LOG_WARNING) cli_warn("%s", message);
    else if (verbose)             fprintf(stderr, "q3n: %s\n", message);
}

q3n_logger cli_logger(const cli_setup *setup)
{
    return (q3n_logger){ print_note, (void *)&setup->verbose };
}

static q3n_model_options model_options(const cli_setup *setup)
{
    return (q3n_model_options){ .size = sizeof(q3n_model_options),
                                .allocator = setup->allocator, .logger = cli_logger(setup) };
}

/* The name of the ISA was checked by options.c. */
static void set_engine(cli_setup *setup)
{
    q3n_engine_options *o = &setup->engine;
    o->size = sizeof *o;
    if (!setup->isa) return;
    (void)q3n_isa_from_name(setup->isa, &o->isa);
    if (!q3n_isa_supported(o->isa)) {
        cli_fail("this machine cannot run %s: its best instruction set is %s", setup->isa,
                 q3n_isa_name(q3n_isa_best()));
    }
}

q3n_model *cli_open_model(cli_setup *setup, cli_words *words)
{
    if (!setup->model) {
        if (words->n == 0) cli_misuse("no model: give a .q3n file as the first argument");
        setup->model = words->word[0];
        words->n--;
        memmove(&words->word[0], &words->word[1], (size_t)words->n * sizeof words->word[0]);
    }
    const q3n_model_options options = model_options(setup);
    q3n_error err = { .offset = -1 };
    q3n_model *m = NULL;
    set_engine(setup);
    if (q3n_model_open(&m, setup->model, &options, &err) != Q3N_OK) {
        cli_fail_with(setup->model, &err);
    }
    return m;
}

q3n_model *cli_open_memory(cli_setup *setup, const void *data, size_t bytes)
{
    const q3n_model_options options = model_options(setup);
    q3n_error err = { .offset = -1 };
    q3n_model *m = NULL;
    set_engine(setup);
    if (q3n_model_open_memory(&m, data, bytes, &options, &err) != Q3N_OK) {
        cli_fail_with(setup->model, &err);
    }
    return m;
}

/* ---- Sessions ---- */

static const char *const speculate_names[Q3N_SPECULATE_COUNT] = {
    [Q3N_SPECULATE_OFF] = "off", [Q3N_SPECULATE_AUTO]   = "auto",
    [Q3N_SPECULATE_MTP] = "mtp", [Q3N_SPECULATE_LOOKUP] = "lookup",
};

const char *cli_speculate_name(int s)
{
    return s >= 0 && s < Q3N_SPECULATE_COUNT ? speculate_names[s] : NULL;
}

static void set_speculate(q3n_session_options *o, const char *name)
{
    for (int i = 0; i < Q3N_SPECULATE_COUNT; i++) {
        if (strcmp(name, speculate_names[i]) == 0) o->speculate = (q3n_speculate)i;
    }
}

q3n_session_options cli_session_options(const cli_setup *setup)
{
    q3n_session_options o = {
        .size = sizeof o, .capacity = setup->ctx, .draft = setup->draft,
        .engine_options = &setup->engine,
    };
    if (setup->kv)            (void)q3n_type_from_name(setup->kv, &o.kv_type);
    if (setup->snapshot_type) (void)q3n_type_from_name(setup->snapshot_type, &o.snapshot_type);
    if (setup->speculate)     set_speculate(&o, setup->speculate);
    return o;
}

q3n_session_options cli_fit_options(const cli_setup *setup, const q3n_model *m, size_t n)
{
    q3n_session_options o = cli_session_options(setup);
    const q3n_config *c = q3n_model_config(m);
    if (setup->ctx && n > (size_t)setup->ctx) {
        cli_fail("the text needs %zu tokens, --ctx gives %d: raise it", n, setup->ctx);
    }
    if (n > (size_t)c->max_position_embeddings) {
        if (!setup->ctx) {
            cli_fail("the text needs %zu tokens, the model was made for %d: shorten it, or give"
                     " --ctx %zu to go beyond that", n, c->max_position_embeddings, n);
        }
        cli_warn("%zu tokens are more than the %d that the model was made for", n,
                 c->max_position_embeddings);
    }
    /* A model that attends both ways takes a text whole. */
    if (!c->causal && !setup->ctx) o.capacity = (int)n;
    return o;
}

q3n_session *cli_create_session(const cli_setup *setup, const q3n_model *m,
                                const q3n_session_options *o)
{
    q3n_session *s = NULL;
    q3n_error err = { .offset = -1 };
    if (q3n_session_create(&s, m, o, &err) != Q3N_OK) cli_fail_with(setup->model, &err);
    return s;
}

q3n_session *cli_open_session(const cli_setup *setup, const q3n_model *m, size_t n,
                              int count_experts)
{
    q3n_session_options o = cli_fit_options(setup, m, n);
    o.count_experts = count_experts;
    return cli_create_session(setup, m, &o);
}

size_t cli_window(int given, const cli_setup *setup, const q3n_model *m)
{
    const int max = setup->ctx ? setup->ctx : q3n_model_context_length(m);
    if (given) return (size_t)given;
    return max < 1024 ? (size_t)max : 1024;
}

/* ---- Evaluation ---- */

void cli_check(q3n_result r, const q3n_session *s)
{
    if (r == Q3N_OK) return;
    q3n_error err = *q3n_session_error(s);
    err.offset = -1;
    cli_fail_with("evaluation", &err);
}

int32_t cli_sample(q3n_sampler *s, const float *logits)
{
    int32_t token = 0;
    if (q3n_sampler_sample(s, logits, &token) != Q3N_OK) {
        cli_fail_with("sampler", q3n_sampler_error(s));
    }
    return token;
}

void cli_eval(q3n_session *s, const int32_t *ids, int n, float *logits)
{
    cli_check(q3n_session_eval(s, ids, n, logits), s);
}

/* As many tokens at once as have their logits in 256 MiB, whole chunks of 64 if that splits a
 * text. */
static int default_piece(const q3n_config *c, int n)
{
    const size_t rows = ((size_t)256 << 20) / ((size_t)c->vocab_size * sizeof(float));
    if (!c->causal || (size_t)n <= rows) return n;
    return rows < 64 ? 64 : (int)(rows / 64 * 64);
}

static void eval_piece(q3n_session *s, const int32_t *ids, int n, float *rows)
{
    const q3n_outputs out = { .size = sizeof out, .all_logits = rows };
    cli_check(q3n_session_eval_outputs(s, ids, n, &out), s);
}

void cli_eval_rows(q3n_session *s, const q3n_model *m, const cli_ids *ids,
                   const cli_pieces *pieces, cli_row_fn fn, void *user)
{
    const q3n_config *c = q3n_model_config(m);
    const int n = (int)ids->n;
    const int fallback = default_piece(c, n);
    int largest = pieces->n ? 0 : fallback;
    for (int i = 0; i < pieces->n; i++) {
        if (pieces->size[i] > largest) largest = pieces->size[i];
    }
    if (largest > n) largest = n;
    float *rows = cli_alloc((size_t)largest * (size_t)c->vocab_size, sizeof *rows);

    q3n_session_reset(s);
    for (int done = 0, i = 0; done < n; i++) {
        int piece = pieces->n ? pieces->size[i % pieces->n] : fallback;
        if (piece > n - done) piece = n - done;
        eval_piece(s, ids->id + done, piece, rows);
        for (int t = 0; t < piece; t++) {
            fn(user, done + t, rows + (size_t)t * (size_t)c->vocab_size);
        }
        done += piece;
    }
    free(rows);
}

/* A snapshot and back: what its type rounds is rounded. */
static void pass_through_snapshot(q3n_session *s)
{
    q3n_snapshot *snap = NULL;
    cli_check(q3n_session_snapshot(s, &snap), s);
    cli_check(q3n_session_restore(s, snap), s);
    q3n_snapshot_free(snap);
}

void cli_eval_pairs(const cli_side sides[2], const cli_ids *ids, cli_pair_fn fn, void *user)
{
    const int n = (int)ids->n;
    const size_t vocab = (size_t)q3n_model_vocab_size(sides[0].m);
    int max = 0;
    float *rows[2];
    for (int k = 0; k < 2; k++) {
        const int piece = default_piece(q3n_model_config(sides[k].m), n);
        if (piece > max) max = piece;         /* one that attends both ways takes all */
        q3n_session_reset(sides[k].s);
    }
    for (int k = 0; k < 2; k++) {
        if (sides[k].restore > 0 && sides[k].restore < max) max = sides[k].restore;
    }
    for (int k = 0; k < 2; k++) rows[k] = cli_alloc((size_t)max * vocab, sizeof *rows[k]);
    for (int done = 0, piece = max; done < n; done += piece) {
        if (piece > n - done) piece = n - done;
        for (int k = 0; k < 2; k++) {
            eval_piece(sides[k].s, ids->id + done, piece, rows[k]);
            if (sides[k].restore > 0) pass_through_snapshot(sides[k].s);
        }
        for (int t = 0; t < piece; t++) {
            const size_t at = (size_t)t * vocab;
            fn(user, done + t, rows[0] + at, rows[1] + at);
        }
    }
    for (int k = 0; k < 2; k++) free(rows[k]);
}

/* ---- Numbers ---- */

static int compare_reals(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void cli_sort(double *x, size_t n)
{
    qsort(x, n, sizeof *x, compare_reals);
}

int cli_argmax(const float *x, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++) {
        if (x[i] > x[best]) best = i;
    }
    return best;
}

double cli_log_sum_exp(const float *x, int n)
{
    const double max = (double)x[cli_argmax(x, n)];
    double sum = 0.0;
    for (int i = 0; i < n; i++) sum += exp((double)x[i] - max);
    return max + log(sum);
}
