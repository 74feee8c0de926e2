/* q3n experts: which experts a text uses. */
#include "cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct usage {
    int      layers, experts;
    int64_t *count;              /* [layers, experts] */
    char    *has_experts;        /* [layers]          */
} usage;

static void add_window(usage *u, const q3n_session *s)
{
    for (int l = 0; l < u->layers; l++) {
        const int64_t *counts = q3n_session_expert_counts(s, l);
        if (!counts) continue;
        u->has_experts[l] = 1;
        int64_t *row = u->count + (size_t)l * (size_t)u->experts;
        for (int e = 0; e < u->experts; e++) row[e] += counts[e];
    }
}

static void count_windows(usage *u, q3n_session *s, const cli_ids *text, size_t window)
{
    cli_bar bar = cli_bar_begin("experts", "tokens");
    for (size_t at = 0; at < text->n; at += window) {
        const size_t left = text->n - at;
        const size_t n = left < window ? left : window;
        q3n_session_reset(s);
        cli_eval(s, text->id + at, (int)n, NULL);
        add_window(u, s);
        cli_bar_update(&bar, (int64_t)(at + n), (int64_t)text->n, NULL);
    }
    cli_bar_end(&bar);
}

static void print_json(const usage *u, size_t tokens)
{
    printf("{\"tokens\": %zu, \"counts_per_layer\": [", tokens);
    for (int l = 0; l < u->layers; l++) {
        printf("%s[", l ? ", " : "");
        for (int e = 0; u->has_experts[l] && e < u->experts; e++) {
            printf("%s%lld", e ? ", " : "",
                   (long long)u->count[(size_t)l * (size_t)u->experts + (size_t)e]);
        }
        printf("]");
    }
    printf("]}\n");
}

/* A bar of width cells, drawn to an eighth of a cell; in ASCII to a whole one. */
static void print_bar(double share, int width, int ascii)
{
    static const char *const eighth[] = { "", "▏", "▎", "▍", "▌", "▋", "▊", "▉" };
    const int eighths = (int)(share * width * 8.0 + 0.5);
    for (int i = 0; i < eighths / 8; i++) fputs(ascii ? "#" : "█", stdout);
    if (ascii) fputs(eighths % 8 >= 4 ? "#" : "", stdout);
    else       fputs(eighth[eighths % 8], stdout);
}

/* One row an expert, its count and a bar. */
static void print_rows(const int64_t *count, int n, int64_t max, int64_t sum, int ascii)
{
    for (int e = 0; e < n; e++) {
        printf("  %4d %10lld %5.1f %%  ", e, (long long)count[e],
               sum ? 100.0 * (double)count[e] / (double)sum : 0.0);
        print_bar(max ? (double)count[e] / (double)max : 0.0, 44, ascii);
        printf("\n");
    }
}

/* One cell an expert, 64 a row: for layers with hundreds. */
static void print_cells(const int64_t *count, int n, int64_t max, int ascii)
{
    static const char *const level[] = { "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█" };
    static const char ascii_level[] = ".:-=+*%#";
    for (int e = 0; e < n; e++) {
        if (e % 64 == 0) printf("  %4d  ", e);
        const int i = count[e] ? (int)(7.0 * (double)count[e] / (double)max) : -1;
        if (i < 0)      putchar(' ');
        else if (ascii) putchar(ascii_level[i]);
        else            fputs(level[i], stdout);
        if (e % 64 == 63 || e + 1 == n) printf("\n");
    }
}

static void print_layer(const usage *u, int l, int rows, int ascii)
{
    const int64_t *count = u->count + (size_t)l * (size_t)u->experts;
    int64_t sum = 0, max = 0;
    int busiest = 0, used = 0;
    for (int e = 0; e < u->experts; e++) {
        sum += count[e];
        used += count[e] > 0;
        if (count[e] > max) {
            max = count[e];
            busiest = e;
        }
    }
    /* Entropy of the choice over that of an even one: 1 = all experts are used alike. */
    double entropy = 0.0;
    for (int e = 0; e < u->experts; e++) {
        const double p = sum ? (double)count[e] / (double)sum : 0.0;
        if (p > 0.0) entropy -= p * log(p);
    }
    const double even = u->experts > 1 ? log((double)u->experts) : 1.0;
    printf("layer %d: %d of %d used, busiest %d with %.1f %%, evenness %.3f\n", l, used, u->experts,
           busiest, sum ? 100.0 * (double)max / (double)sum : 0.0, entropy / even);
    if (rows) print_rows(count, u->experts, max, sum, ascii);
    else      print_cells(count, u->experts, max, ascii);
}

static void print_layers(const usage *u, int layer, size_t tokens, int ascii)
{
    if (layer >= u->layers) cli_fail("--layer: the model has layers 0 to %d", u->layers - 1);
    if (layer >= 0 && !u->has_experts[layer]) cli_fail("layer %d has no experts", layer);
    printf("%zu tokens\n", tokens);
    for (int l = 0; l < u->layers; l++) {
        if (layer >= 0 && l != layer) continue;
        if (u->has_experts[l]) print_layer(u, l, u->experts <= 32 || layer >= 0, ascii);
        else                   printf("layer %d: no experts\n", l);
    }
}

int cmd_experts(int argc, char **argv)
{
    cli_setup setup = { 0 };
    cli_input in = { .around = Q3N_TOKENIZE_PREFIX };
    int given_window = 0, layer = -1, ascii = 0, json = 0;
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(setup),
        CLI_INPUT_OPTIONS(in),
        CLI_WINDOW_OPTION(given_window, 1),
        { "--layer", "L", CLI_INT, &layer, 0, Q3N_MAX_LAYERS - 1,
          "this layer only, every expert with its number" },
        { "--ascii", NULL, CLI_FLAG, &ascii, 0, 0, "bars of # for terminals without UTF-8" },
        { "--json", NULL, CLI_FLAG, &json, 0, 0,
          "{\"tokens\": n, \"counts_per_layer\": [[...], ...]}" },
        CLI_SESSION_OPTIONS(setup),
    };
    const cli_syntax syntax = {
        "experts MODEL.q3n [TEXT] [options]",
        "Counts how often each layer's router chooses each expert on a text, in windows without\n"
        "overlap, each from a fresh state.  The lines of --ids-file are one text.",
        options, CLI_COUNT(options), 3, NULL, NULL,
    };
    cli_words words;
    if (!cli_parse(&syntax, argc, argv, &words)) return cli_finish();
    q3n_model *m = cli_open_model(&setup, &words);
    const q3n_config *c = q3n_model_config(m);
    if (c->num_experts == 0) cli_fail("%s has no experts: there is nothing to count", setup.model);
    cli_ids text = { 0 };
    cli_input_choose(&in, &setup, &words);
    cli_input_stream(&text, &in, m);
    const size_t window = cli_window(given_window, &setup, m);

    const size_t longest = text.n < window ? text.n : window;
    q3n_session *s = cli_open_session(&setup, m, longest, 1);
    usage u = { .layers = c->num_hidden_layers, .experts = c->num_experts };
    u.count = cli_alloc((size_t)u.layers * (size_t)u.experts, sizeof *u.count);
    u.has_experts = cli_alloc((size_t)u.layers, 1);
    count_windows(&u, s, &text, window);
    if (json) print_json(&u, text.n);
    else      print_layers(&u, layer, text.n, ascii);
    free(u.count);
    free(u.has_experts);
    free(text.id);
    q3n_session_destroy(s);
    q3n_model_close(m);
    return cli_finish();
}
