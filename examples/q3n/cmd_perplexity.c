/* q3n perplexity: exp of the mean negative log-likelihood per token; with --kl also how far the
 * model's predictions are from those of another file, as of the same model before quantisation.
 *
 * At each scored position, with p of the base and q of the model over the vocabulary:
 *
 *     KL = sum_i p_i (log p_i - log q_i)       natural log, in double from log-softmax
 *
 * Nothing is kept of a position but its KL, which the percentiles need.
 */
#include "cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Losses -log p of the tokens of a text under one model. */
typedef struct losses {
    int64_t n;
    double  sum, squares;
} losses;

typedef struct measure {
    const cli_ids *ids;          /* of the window */
    int     vocab;
    losses  model, base;
    losses  gain;                /* log-likelihood of the model minus that of the base */
    double *kl;                  /* [model.n] with --kl, else NULL */
    losses  kl_sum;
    int64_t agree;               /* positions where both have the same first of the largest */
} measure;

static void add_loss(losses *l, double x)
{
    l->n++;
    l->sum     += x;
    l->squares += x * x;
}

static double mean(const losses *l)
{
    return l->sum / (double)l->n;
}

/* Standard error of the mean. */
static double mean_error(const losses *l)
{
    const double n = (double)l->n, variance = l->squares / n - mean(l) * mean(l);
    return n < 2.0 || variance <= 0.0 ? 0.0 : sqrt(variance / (n - 1.0));
}

static double perplexity(const losses *l)
{
    return exp(mean(l));
}

static double perplexity_error(const losses *l)
{
    return perplexity(l) * mean_error(l);
}

/* ---- Positions ---- */

/* A window from a fresh state, without its first token. */
static void add_window(measure *s, q3n_session *session, double *log_probs)
{
    q3n_session_reset(session);
    cli_check(q3n_session_score(session, s->ids->id, (int)s->ids->n, log_probs), session);
    for (size_t i = 1; i < s->ids->n; i++) add_loss(&s->model, -log_probs[i]);
}

static void add_pair(void *user, int position, const float *logits, const float *base)
{
    measure *s = user;
    if ((size_t)position + 1 == s->ids->n) return;
    const int32_t next = s->ids->id[position + 1];
    const double norm = cli_log_sum_exp(logits, s->vocab);
    const double base_norm = cli_log_sum_exp(base, s->vocab);
    double kl = 0.0;
    for (int i = 0; i < s->vocab; i++) {
        const double log_p = (double)base[i] - base_norm, p = exp(log_p);
        if (p > 0.0) kl += p * (log_p - ((double)logits[i] - norm));
    }
    if (kl < 0.0) kl = 0.0;      /* by rounding: it cannot be */

    const double loss = norm - (double)logits[next], base_loss = base_norm - (double)base[next];
    s->kl[s->model.n] = kl;
    add_loss(&s->kl_sum, kl);
    add_loss(&s->model, loss);
    add_loss(&s->base, base_loss);
    add_loss(&s->gain, base_loss - loss);
    s->agree += cli_argmax(logits, s->vocab) == cli_argmax(base, s->vocab);
}

/* Of x [n], sorted: between two values it is on the line that joins them. */
static double quantile(const double *x, int64_t n, double share)
{
    const double at = share * (double)(n - 1);
    const int64_t i = (int64_t)at;
    return i + 1 < n ? x[i] + (at - (double)i) * (x[i + 1] - x[i]) : x[n - 1];
}

static double agreement(const measure *s)
{
    return 100.0 * (double)s->agree / (double)s->model.n;
}

/* ---- Output ---- */

static void json_value(const char *key, double x)
{
    printf(", \"%s\": ", key);
    cli_json_real(stdout, x);
}

static void json_losses(const losses *l, const char *prefix)
{
    printf(", \"%snll\": ", prefix);
    if (isfinite(l->sum)) printf("%.15g", l->sum);
    else                  printf("null");
    printf(", \"%sperplexity\": ", prefix);
    cli_json_real(stdout, perplexity(l));
    printf(", \"%sstandard_error\": ", prefix);
    cli_json_real(stdout, perplexity_error(l));
}

static void print_json(const measure *s, size_t windows)
{
    printf("{\"windows\": %zu, \"scored\": %lld", windows, (long long)s->model.n);
    json_losses(&s->model, "");
    if (s->kl) {
        json_losses(&s->base, "base_");
        json_value("kl_mean", mean(&s->kl_sum));
        json_value("kl_standard_error", mean_error(&s->kl_sum));
        json_value("kl_median", quantile(s->kl, s->model.n, 0.5));
        json_value("kl_p999", quantile(s->kl, s->model.n, 0.999));
        json_value("kl_max", s->kl[s->model.n - 1]);
        json_value("top1_agreement", agreement(s));
        json_value("log_likelihood_difference", mean(&s->gain));
        json_value("log_likelihood_difference_error", mean_error(&s->gain));
    }
    printf("}\n");
}

static void print_text(const measure *s, size_t windows, size_t window)
{
    printf("tokens scored %lld in %zu windows of up to %zu\nnll %.6f (%.6f per token)\n"
           "perplexity %.4f +- %.4f\n", (long long)s->model.n, windows, window, s->model.sum,
           mean(&s->model), perplexity(&s->model), perplexity_error(&s->model));
    if (!s->kl) return;
    printf("base perplexity %.4f +- %.4f\n"
           "KL(base || model) %.6f +- %.6f per token; median %.6f, 99.9 %% below %.6f, "
           "largest %.6f\n"
           "same first choice %.3f %%\n"
           "log-likelihood per token, model minus base %.6f +- %.6f\n",
           perplexity(&s->base), perplexity_error(&s->base), mean(&s->kl_sum),
           mean_error(&s->kl_sum), quantile(s->kl, s->model.n, 0.5),
           quantile(s->kl, s->model.n, 0.999), s->kl[s->model.n - 1], agreement(s),
           mean(&s->gain), mean_error(&s->gain));
}

/* ---- All of it ---- */

/* sides: the model, and with --kl the base. */
static size_t measure_windows(measure *s, const cli_side sides[2], const cli_ids *text,
                              size_t window)
{
    double *log_probs = cli_alloc(window < text->n ? window : text->n, sizeof *log_probs);
    cli_bar bar = cli_bar_begin("perplexity", "tokens");
    size_t windows = 0;
    for (size_t at = 0; at + 1 < text->n; at += window) {
        const size_t left = text->n - at;
        const cli_ids ids = { text->id + at, left < window ? left : window, 0 };
        s->ids = &ids;
        if (s->kl) cli_eval_pairs(sides, &ids, add_pair, s);
        else       add_window(s, sides[0].s, log_probs);
        windows++;
        char note[80];
        int n = snprintf(note, sizeof note, "perplexity %.4f", perplexity(&s->model));
        if (s->kl) snprintf(note + n, sizeof note - (size_t)n, "  KL %.6f", mean(&s->kl_sum));
        cli_bar_update(&bar, (int64_t)(at + ids.n), (int64_t)text->n, note);
    }
    cli_bar_end(&bar);
    free(log_probs);
    if (s->kl) cli_sort(s->kl, (size_t)s->model.n);
    return windows;
}

/* The same ids must mean the same in both, or the numbers mean nothing. */
static void check_vocabularies(const q3n_model *m, const q3n_model *base, const char *path)
{
    const int vocab = q3n_model_config(m)->vocab_size;
    if (vocab != q3n_model_config(base)->vocab_size) {
        cli_fail("%s has a vocabulary of %d tokens, the model one of %d: they cannot be compared",
                 path, q3n_model_config(base)->vocab_size, vocab);
    }
    if (q3n_model_n_tokens(m) == 0 || q3n_model_n_tokens(base) == 0) return;
    for (int32_t id = 0; id < vocab; id++) {
        size_t n = 0, n_base = 0;
        const char *a = q3n_token_text(m, id, &n), *b = q3n_token_text(base, id, &n_base);
        if (a && b ? n == n_base && memcmp(a, b, n) == 0 : a == b) continue;
        cli_fail("%s has another vocabulary than the model: token %ld has another text", path,
                 (long)id);
    }
}

int cmd_perplexity(int argc, char **argv)
{
    cli_setup setup = { 0 };
    cli_input in = { .around = Q3N_TOKENIZE_PREFIX };
    int given_window = 0, json = 0, restore = 0;
    const char *base = NULL;
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(setup),
        CLI_INPUT_OPTIONS(in),
        CLI_WINDOW_OPTION(given_window, 2),
        { "--kl", "BASE.q3n", CLI_TEXT, &base, 0, 0,
          "compare with another file of the same vocabulary" },
        { "--restore", "N", CLI_INT, &restore, 1, 1 << 30,
          "with --kl: every N tokens the state goes through a snapshot" },
        { "--json", NULL, CLI_FLAG, &json, 0, 0,
          "one object: windows, scored, nll, perplexity, standard_error" },
        CLI_SESSION_OPTIONS(setup),
    };
    const cli_syntax syntax = {
        "perplexity MODEL.q3n [TEXT] [options]",
        "Perplexity of a text in windows without overlap, each from a fresh state; the first\n"
        "token of a window is not scored.  The lines of --ids-file are one text.\n\n"
        "With --kl the base is evaluated beside the model, always with a KV cache of f32: its\n"
        "perplexity, KL(base || model) per\n"
        "token in nats, how often both have the same first choice, and the mean difference of\n"
        "their log-likelihoods.  --json then has also base_nll, base_perplexity,\n"
        "base_standard_error, kl_mean, kl_standard_error, kl_median, kl_p999 (99.9 % of the\n"
        "tokens are below), kl_max, top1_agreement (in %), log_likelihood_difference (model minus\n"
        "base, per token) and log_likelihood_difference_error (standard error).",
        options, CLI_COUNT(options), 3, NULL, NULL,
    };
    cli_words words;
    if (!cli_parse(&syntax, argc, argv, &words)) return cli_finish();
    cli_setup setups[2] = { setup, setup };
    cli_side sides[2] = { { NULL, NULL, 0 } };
    q3n_model *models[2] = { cli_open_model(&setups[0], &words), NULL };
    cli_ids text = { 0 };
    cli_input_choose(&in, &setups[0], &words);
    cli_input_stream(&text, &in, models[0]);
    if (text.n < 2) cli_fail("%s has one token: at least two are needed", in.source);

    size_t window = cli_window(given_window, &setups[0], models[0]);
    measure s = { .vocab = q3n_model_config(models[0])->vocab_size };
    if (base) {
        setups[1].model = base;
        setups[1].kv = NULL;
        models[1] = cli_open_model(&setups[1], &words);
        check_vocabularies(models[0], models[1], base);
        const size_t max = cli_window(given_window, &setups[1], models[1]);
        if (max < window) window = max;
        s.kl = cli_alloc(text.n, sizeof *s.kl);
    }
    if (window < 2) cli_fail("a window of one token scores nothing: at least 2 are needed");

    const size_t longest = text.n < window ? text.n : window;
    for (int k = 0; k < 2 && models[k]; k++) {
        sides[k] = (cli_side){ models[k], cli_open_session(&setups[k], models[k], longest, 0),
                               k == 0 ? restore : 0 };
    }
    const size_t windows = measure_windows(&s, sides, &text, window);
    if (json) print_json(&s, windows);
    else      print_text(&s, windows, window);
    free(text.id);
    free(s.kl);
    for (int k = 0; k < 2 && models[k]; k++) {
        q3n_session_destroy(sides[k].s);
        q3n_model_close(models[k]);
    }
    return cli_finish();
}
