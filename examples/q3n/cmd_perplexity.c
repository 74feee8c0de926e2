/* q3n perplexity: exp of the mean negative log-likelihood per token. */
#include "cli.h"

#include <math.h>
#include <stdlib.h>

typedef struct measure {
    const cli_ids *ids;          /* of the window */
    int     vocab;
    int64_t scored;
    double  nll, squares;        /* sums of -log p and of its square */
} measure;

static void add_row(void *user, int position, const float *logits)
{
    measure *s = user;
    if ((size_t)position + 1 == s->ids->n) return;
    const double x = (double)logits[s->ids->id[position + 1]];
    const double loss = cli_log_sum_exp(logits, s->vocab) - x;
    s->scored++;
    s->nll     += loss;
    s->squares += loss * loss;
}

static double perplexity(const measure *s)
{
    return exp(s->nll / (double)s->scored);
}

/* Standard error of the perplexity: of the mean loss, times the perplexity. */
static double perplexity_error(const measure *s)
{
    const double n = (double)s->scored, mean = s->nll / n;
    const double variance = s->squares / n - mean * mean;
    return n < 2.0 || variance <= 0.0 ? 0.0 : perplexity(s) * sqrt(variance / (n - 1.0));
}

static void print_json(const measure *s, size_t windows)
{
    printf("{\"windows\": %zu, \"scored\": %lld, \"nll\": ", windows, (long long)s->scored);
    if (isfinite(s->nll)) printf("%.15g", s->nll);
    else                  printf("null");
    printf(", \"perplexity\": ");
    cli_json_real(stdout, perplexity(s));
    printf(", \"standard_error\": ");
    cli_json_real(stdout, perplexity_error(s));
    printf("}\n");
}

static size_t measure_windows(measure *s, q3n_session *session, const q3n_model *m,
                              const cli_ids *text, size_t window)
{
    const cli_pieces whole = { .n = 0 };
    cli_bar bar = cli_bar_begin("perplexity", 0);
    size_t windows = 0;
    for (size_t at = 0; at + 1 < text->n; at += window) {
        const size_t left = text->n - at;
        const cli_ids ids = { text->id + at, left < window ? left : window, 0 };
        s->ids = &ids;
        cli_eval_rows(session, m, &ids, &whole, add_row, s);
        windows++;
        char note[48];
        snprintf(note, sizeof note, "perplexity %.4f", perplexity(s));
        cli_bar_update(&bar, (int64_t)(at + ids.n), (int64_t)text->n, note);
    }
    cli_bar_end(&bar);
    return windows;
}

int cmd_perplexity(int argc, char **argv)
{
    cli_setup setup = { 0 };
    cli_input in = { 0 };
    int given_window = 0, json = 0;
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(setup),
        CLI_INPUT_OPTIONS(in),
        CLI_WINDOW_OPTION(given_window, 2),
        { "--json", NULL, CLI_FLAG, &json, 0, 0,
          "windows, scored, nll, perplexity, standard_error" },
        CLI_SESSION_OPTIONS(setup),
    };
    const cli_syntax syntax = {
        "perplexity MODEL.q3n --file TEXT [options]",
        "Perplexity of a text in windows without overlap, each from a fresh state; the first\n"
        "token of a window is not scored.  The lines of --ids-file are one text.",
        options, CLI_COUNT(options), 1, NULL, NULL,
    };
    cli_words words;
    cli_parse(&syntax, argc, argv, &words);
    q3n_model *m = cli_open_model(&setup, &words);
    const q3n_config *c = q3n_model_config(m);
    cli_ids text = { 0 };
    cli_input_stream(&text, &in, m);
    if (text.n < 2) cli_fail("the text has one token: at least two are needed");
    const size_t window = cli_window(given_window, &setup, m);
    if (window < 2) cli_fail("a window of one token scores nothing: at least 2 are needed");

    const size_t longest = text.n < window ? text.n : window;
    q3n_session *session = cli_open_session(&setup, m, longest, 0);
    measure s = { .vocab = c->vocab_size };
    const size_t windows = measure_windows(&s, session, m, &text, window);
    if (json) {
        print_json(&s, windows);
    } else {
        printf("tokens scored %lld in %zu windows of up to %zu\nnll %.6f (%.6f per token)\n"
               "perplexity %.4f +- %.4f\n", (long long)s.scored, windows, window, s.nll,
               s.nll / (double)s.scored, perplexity(&s), perplexity_error(&s));
    }
    free(text.id);
    q3n_session_destroy(session);
    q3n_model_close(m);
    return cli_finish();
}
