/* q3n run: a prompt, then text as it comes. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct run_options {
    cli_setup setup;
    cli_input in;
    int       n;                   /* most tokens to write, -1 = until the text or context ends */
    double    temperature, top_p, min_p, penalty;
    int       top_k, last_n, greedy;
    uint64_t  seed;
    int       ignore_eos, stop_eos, special, echo, json, quiet;
} run_options;

/* One text being written. */
typedef struct writer {
    const run_options *o;
    const q3n_model   *m;
    q3n_session *session;
    q3n_sampler *sampler;
    q3n_decoder  decoder;
    float       *logits;           /* [vocab] */
    cli_ids      output;
    int          n_printed;        /* ids of a model that has no texts */
    cli_buffer   text;
    int          stop_at_eos;
    double       prompt_s, decode_s;
} writer;

enum { NOT_GIVEN = -2, DEFAULT_N = 256 };

static const q3n_sampler_options *sampler_options(const run_options *o, q3n_sampler_options *out)
{
    *out = (q3n_sampler_options){
        .temperature = o->greedy ? 0.0f : (float)o->temperature,
        .top_k = o->top_k, .top_p = (float)o->top_p, .min_p = (float)o->min_p,
        .repetition_penalty = (float)o->penalty, .penalty_window = o->last_n, .seed = o->seed,
    };
    return out;
}

/* ---- Output ---- */

static void emit_text(writer *w, const char *bytes, size_t n)
{
    if (w->o->json) {
        cli_buffer_add(&w->text, bytes, n);
    } else {
        fwrite(bytes, 1, n, stdout);
        fflush(stdout);
    }
}

/* The text of one token, or its number if the model has no texts. */
static void emit_token(writer *w, int32_t id)
{
    if (q3n_model_n_tokens(w->m) == 0) {
        if (!w->o->json) {
            printf("%s%ld", w->n_printed++ ? " " : "", (long)id);
            fflush(stdout);
        }
        return;
    }
    size_t bytes = 0;
    q3n_token_text(w->m, id, &bytes);
    char  small[256];
    char *out = bytes + 3 <= sizeof small / 3 ? small : cli_alloc(3 * (bytes + 3), 1);
    size_t n = 0;
    /* An id without a text gives none. */
    if (q3n_decoder_next(&w->decoder, w->m, id, out, 3 * (bytes + 3), &n) == Q3N_OK) {
        emit_text(w, out, n);
    }
    if (out != small) free(out);
}

static void emit_end(writer *w)
{
    char rest[4];
    size_t n = 0;
    q3n_decoder_finish(&w->decoder, rest, &n);
    emit_text(w, rest, n);
    if (!w->o->json) {
        printf("\n");
        return;
    }
    printf("{\"output_ids\": ");
    cli_json_ids(stdout, w->output.id, w->output.n);
    if (w->o->in.prompt || w->o->in.file) {
        printf(", \"text\": ");
        cli_json_string(stdout, w->text.data ? w->text.data : "", w->text.n);
    }
    printf("}\n");
    fflush(stdout);
}

/* ---- Writing ---- */

static void read_prompt(writer *w, const cli_ids *prompt)
{
    const double start = cli_clock();
    q3n_session_reset(w->session);
    q3n_sampler_reset(w->sampler);
    cli_eval(w->session, prompt->id, (int)prompt->n, w->logits);
    for (size_t i = 0; i < prompt->n; i++) q3n_sampler_accept(w->sampler, prompt->id[i]);
    w->prompt_s += cli_clock() - start;
}

/* Samples and evaluates up to n tokens; returns why it ended, NULL if all were written. */
static const char *write_tokens(writer *w, int n)
{
    const double start = cli_clock();
    const char *why = NULL;
    for (int i = 0; n < 0 || i < n; i++) {
        const int32_t id = q3n_sampler_sample(w->sampler, w->logits);
        cli_ids_add(&w->output, id);
        if (w->stop_at_eos && q3n_model_is_eos(w->m, id)) {
            if (w->o->special) emit_token(w, id);
            why = "end of text";
            break;
        }
        emit_token(w, id);
        if (i + 1 == n) break;
        if (cli_interrupted()) {
            why = "interrupted";
            break;
        }
        if (q3n_session_length(w->session) == q3n_session_capacity(w->session)) {
            why = "the context is full";
            break;
        }
        cli_eval(w->session, &id, 1, w->logits);
    }
    w->decode_s += cli_clock() - start;
    return why;
}

static void print_speed(const writer *w, double load_s, size_t prompt_n, size_t output_n,
                        const char *why)
{
    fprintf(stderr, "q3n: loaded in %.3f s; prompt %zu tokens", load_s, prompt_n);
    if (w->prompt_s > 0.0) fprintf(stderr, ", %.1f tokens/s", (double)prompt_n / w->prompt_s);
    fprintf(stderr, "; wrote %zu", output_n);
    if (w->decode_s > 0.0) fprintf(stderr, ", %.1f tokens/s", (double)output_n / w->decode_s);
    fprintf(stderr, "; %s, %d threads", q3n_isa_name(q3n_session_isa(w->session)),
            q3n_session_n_threads(w->session));
    if (!w->o->greedy) fprintf(stderr, "; seed %llu", (unsigned long long)w->o->seed);
    if (why) fprintf(stderr, "; %s", why);
    fprintf(stderr, "\n");
}

/* Tokens that the session must hold: the longest prompt and what is written behind it. */
static size_t tokens_needed(const run_options *o, const cli_cases *prompts, const q3n_model *m)
{
    const size_t longest = cli_cases_longest(prompts);
    const size_t most    = (size_t)q3n_model_config(m)->max_position_embeddings;
    if (o->setup.ctx) {
        if (longest > (size_t)o->setup.ctx) return longest;     /* refused with a message */
        return (size_t)o->setup.ctx;
    }
    size_t want = o->n < 0 ? 4096 : longest + (size_t)o->n;
    if (want > most) want = most;
    return want > longest ? want : longest;
}

static void write_cases(run_options *o, const q3n_model *m, const cli_cases *prompts,
                        double load_start)
{
    q3n_sampler_options sampling;
    q3n_error err = { .offset = -1 };
    writer w = { .o = o, .m = m, .stop_at_eos = o->stop_eos || !o->ignore_eos };
    w.session = cli_open_session(&o->setup, m, tokens_needed(o, prompts, m), 0);
    w.logits  = cli_alloc((size_t)q3n_model_config(m)->vocab_size, sizeof *w.logits);
    if (q3n_sampler_create(&w.sampler, m, sampler_options(o, &sampling), &err) != Q3N_OK) {
        cli_fail_with("sampler", &err);
    }
    const double load_s = cli_clock() - load_start;
    size_t n_prompt = 0, n_output = 0;
    const char *why = NULL;
    for (size_t i = 0; i < prompts->n && !cli_interrupted(); i++) {
        const cli_ids *prompt = &prompts->item[i];
        w.decoder  = (q3n_decoder){ .skip_special = !o->special };
        w.output.n = 0;
        w.text.n   = 0;
        w.n_printed = 0;
        if (o->echo) {
            for (size_t t = 0; t < prompt->n; t++) emit_token(&w, prompt->id[t]);
        }
        read_prompt(&w, prompt);
        cli_catch_interrupt();
        why = write_tokens(&w, o->n);
        emit_end(&w);
        n_prompt += prompt->n;
        n_output += w.output.n;
    }
    if (!o->quiet) print_speed(&w, load_s, n_prompt, n_output, why);
    free(w.logits);
    free(w.output.id);
    cli_buffer_free(&w.text);
    q3n_sampler_destroy(w.sampler);
    q3n_session_destroy(w.session);
}

/* ---- Options ---- */

static void parse_options(run_options *o, int argc, char **argv, cli_words *words)
{
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(o->setup),
        CLI_INPUT_OPTIONS(o->in),
        { "-n --n-predict --tokens", "N", CLI_INT, &o->n, -1, 1 << 30,
          "most tokens to write (256); -1: until the text or the context ends" },
        { "--greedy", NULL, CLI_FLAG, &o->greedy, 0, 0, "always the most likely token" },
        { "--temp --temperature", "X", CLI_REAL, &o->temperature, 0, 100,
          "0: greedy (0.7)" },
        { "--top-k", "K", CLI_INT, &o->top_k, 0, 1 << 24, "of the K most likely; 0: off (20)" },
        { "--top-p", "P", CLI_REAL, &o->top_p, 0, 1,
          "of the most likely that sum to P; 0 or 1: off (0.8)" },
        { "--min-p", "P", CLI_REAL, &o->min_p, 0, 1,
          "at least P times the most likely; 0: off (0)" },
        { "--repeat-penalty --repetition-penalty", "X", CLI_REAL, &o->penalty, 0.01, 100,
          "divides the logits of recent tokens; 1: off (1)" },
        { "--repeat-last-n", "N", CLI_INT, &o->last_n, 1, 1 << 24, "tokens that are recent (64)" },
        { "-s --seed", "N", CLI_U64, &o->seed, 0, 0, "of the random numbers (the time)" },
        { "--ignore-eos", NULL, CLI_FLAG, &o->ignore_eos, 0, 0,
          "do not stop at the end of the text (default with --ids and -n)" },
        { "--stop-eos", NULL, CLI_FLAG, &o->stop_eos, 0, 0, "stop there (default with a text)" },
        { "--special", NULL, CLI_FLAG, &o->special, 0, 0, "print special tokens too" },
        { "--echo", NULL, CLI_FLAG, &o->echo, 0, 0, "print the prompt before the text" },
        { "--json", NULL, CLI_FLAG, &o->json, 0, 0, "{\"output_ids\": [...]} instead of text" },
        { "-q --quiet", NULL, CLI_FLAG, &o->quiet, 0, 0, "no speed on stderr" },
        CLI_SESSION_OPTIONS(o->setup),
    };
    const cli_syntax syntax = {
        "run MODEL.q3n -p TEXT [options]",
        "Writes text behind a prompt, as it comes; speed goes to stderr.  The defaults of\n"
        "sampling are those published for the Qwen models.  --ids works on raw ids: with -n it\n"
        "writes exactly N.",
        options, CLI_COUNT(options), 1, NULL, NULL,
    };
    cli_parse(&syntax, argc, argv, words);
    if (o->ignore_eos && o->stop_eos) cli_misuse("give one of --ignore-eos and --stop-eos");
    if ((o->in.ids || o->in.ids_file) && o->n >= 0) o->ignore_eos = 1;
    if (o->n == NOT_GIVEN) o->n = DEFAULT_N;
    if (o->temperature == 0.0) o->greedy = 1;
}

int cmd_run(int argc, char **argv)
{
    run_options o = {
        .n = NOT_GIVEN, .temperature = 0.7, .top_k = 20, .top_p = 0.8, .penalty = 1.0,
        .seed = (uint64_t)time(NULL), .in = { .drop_newline = 1 },
    };
    cli_words words;
    parse_options(&o, argc, argv, &words);

    const double start = cli_clock();
    q3n_model *m = cli_open_model(&o.setup, &words);
    if (!q3n_model_config(m)->causal) {
        cli_fail("%s attends both ways: it cannot write text; try q3n logits or q3n classify",
                 o.setup.model);
    }
    cli_cases prompts = { 0 };
    cli_input_cases(&prompts, &o.in, m);
    write_cases(&o, m, &prompts, start);
    cli_cases_free(&prompts);
    q3n_model_close(m);
    return cli_finish();
}
