/* q3n run: a prompt, then text as it comes; states that outlive the program. */
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
    int       seeded;              /* 1 = the seed was given */
    int       ignore_eos, stop_eos, special, echo, json, quiet;
    const char *session_file, *cache_dir;
    int       append;              /* the prompt goes after the text of session_file */
    size_t    n_prefix;            /* ids that the tokenizer put before the prompt */
    int       cache_mb, snapshot_every;
} run_options;

/* How much of a prompt is evaluated; the session reports it layer by layer. */
typedef struct prompt_progress {
    cli_bar bar;
    int     shown;                 /* 1 = there is a prompt under way that is worth a bar */
    int     n_text, n_reused, n_done;
} prompt_progress;

/* One text being written. */
typedef struct writer {
    const run_options *o;
    const q3n_model   *m;
    q3n_cache   *cache;            /* NULL = none */
    q3n_session *session;
    q3n_sampler *sampler;          /* the session's */
    q3n_detokenizer  decoder;
    float       *logits;           /* [vocab] */
    size_t       n_loaded;         /* tokens that the session file had */
    size_t       n_prompt, n_reused, n_output;
    cli_ids      output;
    int          last_pending;     /* 1 = the last of output is text and not evaluated yet */
    int          n_printed;        /* ids of a model that has no texts */
    cli_buffer   text;
    int          stop_at_eos;
    double       prompt_s, decode_s;
    int          saving;           /* 1 = what is evaluated now is not interrupted */
    prompt_progress progress;
} writer;

enum {
    NOT_GIVEN = -2, DEFAULT_N = 256, DEFAULT_CACHE_MB = 1024, DEFAULT_EVERY = 1024,
    LONG_PROMPT = 256              /* tokens: shorter ones have no bar */
};

static const q3n_sampler_options *sampler_options(const run_options *o, q3n_sampler_options *out)
{
    *out = (q3n_sampler_options){
        .size = sizeof *out,
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
    if (q3n_detokenizer_next(&w->decoder, w->m, id, out, 3 * (bytes + 3), &n) == Q3N_OK) {
        emit_text(w, out, n);
    }
    if (out != small) free(out);
}

static void emit_end(writer *w)
{
    char rest[4];
    size_t n = 0;
    q3n_detokenizer_finish(&w->decoder, rest, &n);
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

/* ---- State from earlier runs ---- */

static void open_cache(writer *w)
{
    const run_options *o = w->o;
    if (!o->cache_dir && !o->cache_mb) return;
    const size_t mb = (size_t)(o->cache_mb ? o->cache_mb : DEFAULT_CACHE_MB);
    const q3n_cache_options options = {
        .size = sizeof options, .max_bytes = mb << 20, .directory = o->cache_dir,
        .logger = cli_logger(&o->setup),
    };
    q3n_error err = { .offset = -1 };
    if (q3n_cache_create(&w->cache, w->m, &options, &err) != Q3N_OK) cli_fail_with("cache", &err);
}

/* A q3n_layer_hook: stops an interrupted call, shows how far it is. */
static void after_layer(void *user, int l, const float *x, int n, int d)
{
    writer *w = user;
    prompt_progress *p = &w->progress;
    const int n_layers = q3n_model_config(w->m)->num_hidden_layers;
    (void)x;
    (void)d;
    if (cli_interrupted() && !w->saving) q3n_session_cancel(w->session);
    const int total = p->n_text - p->n_reused;
    if (!p->shown || total < LONG_PROMPT) return;
    const int64_t here = l < n_layers ? (int64_t)n * (l + 1) / n_layers : n;
    cli_bar_update(&p->bar, p->n_done + here, total, NULL);
    if (l == n_layers) p->n_done += n;
}

static void open_session(writer *w, size_t longest)
{
    q3n_session_options o = cli_fit_options(&w->o->setup, w->m, longest);
    o.cache = w->cache;
    q3n_engine_options engine = w->o->setup.engine;
    engine.layer_hook = (q3n_layer_hook){ after_layer, w };
    o.engine_options = &engine;
    if (w->cache) o.snapshot_every = w->o->snapshot_every;
    w->session = cli_create_session(&w->o->setup, w->m, &o);
    q3n_sampler_options sampling;
    if (q3n_session_set_sampler(w->session, sampler_options(w->o, &sampling)) != Q3N_OK) {
        cli_fail_with("sampler", q3n_session_error(w->session));
    }
    w->sampler = q3n_session_sampler(w->session);
    const char *path = w->o->session_file;
    if (!path) return;
    const q3n_result r = q3n_session_load(w->session, path);
    if (r != Q3N_OK && r != Q3N_ERR_NO_FILE) cli_fail_with(path, q3n_session_error(w->session));
    w->n_loaded = (size_t)q3n_session_length(w->session);
    if (w->o->seeded) q3n_sampler_seed(w->sampler, w->o->seed);
    q3n_error err = { .offset = -1 };
    if (q3n_file_check(path, &err) != Q3N_OK) cli_fail_with(path, &err);
}

/* Evaluates what was written last, so that the state is that of the whole text.  A token that ended
 * the text is left out: what follows may begin with it or not. */
static void finish_text(writer *w)
{
    const int length = q3n_session_length(w->session);
    w->saving = 1;
    if (w->last_pending && length < q3n_session_capacity(w->session)) {
        cli_eval(w->session, &w->output.id[w->output.n - 1], 1, NULL);
    }
    w->saving = w->last_pending = 0;
}

static void keep_state(writer *w)
{
    if (!w->cache && !w->o->session_file) return;
    finish_text(w);
    w->saving = 1;
    if (q3n_session_length(w->session) == 0) return;
    cli_check(q3n_session_checkpoint(w->session), w->session);
    const char *path = w->o->session_file;
    if (path && q3n_session_save(w->session, path) != Q3N_OK) {
        cli_fail_with(path, q3n_session_error(w->session));
    }
}

/* ---- Writing ---- */

/* The session's text and the prompt after it, or the prompt alone. */
static void whole_text(const writer *w, const cli_ids *prompt, cli_ids *out)
{
    const size_t before = w->o->append ? (size_t)q3n_session_length(w->session) : 0;
    const size_t skip = before ? w->o->n_prefix : 0;     /* that is for the beginning of a text */
    *out = (cli_ids){ .n = before + prompt->n - skip };
    out->id = cli_alloc(out->n, sizeof *out->id);
    if (before) {
        cli_check(q3n_session_tokens(w->session, 0, (int)before, out->id), w->session);
    }
    memcpy(out->id + before, prompt->id + skip, (prompt->n - skip) * sizeof *out->id);
}

/* A text that goes on is sampled as if it had never stopped, another one from the seed. */
static void begin_sampling(writer *w, const cli_ids *text, int length)
{
    const size_t first = w->o->append ? (size_t)length : 0;
    if (first == 0) q3n_sampler_reset(w->sampler);
    for (size_t i = first; i < text->n; i++) q3n_sampler_accept(w->sampler, text->id[i]);
}

/* Evaluates what the session does not have yet; returns 0 if it was interrupted. */
static int read_prompt(writer *w, const cli_ids *prompt)
{
    const double start = cli_clock();
    const int length = q3n_session_length(w->session);
    cli_ids text;
    whole_text(w, prompt, &text);
    /* An echo on the same terminal would be drawn over. */
    const int drawn = !w->o->quiet && !(w->o->echo && cli_is_terminal(stdout));
    w->progress = (prompt_progress){ .bar = cli_bar_begin("prompt", "tokens"), .shown = drawn,
                                     .n_text = (int)text.n };
    const q3n_result r = q3n_session_prefill(w->session, text.id, (int)text.n, w->logits,
                                          &w->progress.n_reused);
    w->progress.shown = 0;
    cli_bar_end(&w->progress.bar);
    if (r != Q3N_ERR_CANCELLED) {
        cli_check(r, w->session);
        begin_sampling(w, &text, length);
        w->n_prompt += text.n;
        w->n_reused += (size_t)w->progress.n_reused;
        w->prompt_s += cli_clock() - start;
    }
    free(text.id);
    return r == Q3N_OK;
}

/* Takes one chosen token; returns why the text ends with it, NULL if it goes on. */
static const char *write_token(writer *w, int32_t id)
{
    cli_ids_add(&w->output, id);
    if (!w->stop_at_eos || !q3n_model_is_eos(w->m, id)) {
        emit_token(w, id);
        return NULL;
    }
    if (w->o->special) emit_token(w, id);
    w->last_pending = 0;
    return "end of text";
}

/* Ends the program where the logits hold nothing to choose from. */
static void check_choice(const writer *w, q3n_result r, const q3n_error *e)
{
    if (r != Q3N_ERR_NUMERIC) return;
    if (!w->o->json) printf("\n");
    cli_fail("%s: %s; check the file with q3n verify, and if it is undamaged the checkpoint that "
             "it was converted from", w->o->setup.model, e->message);
}

/* Chooses and evaluates up to n tokens; returns why it ended, NULL if all were written. */
static const char *write_tokens(writer *w, int n)
{
    int32_t chosen[Q3N_MAX_DRAFT + 1] = { 0 };
    int n_chosen = 1;
    check_choice(w, q3n_sampler_sample(w->sampler, w->logits, chosen),
                 q3n_sampler_error(w->sampler));
    w->last_pending = 1;
    for (;;) {
        for (int i = 0; i < n_chosen; i++) {
            const char *why = write_token(w, chosen[i]);
            if (why) return why;
        }
        const int room = q3n_session_capacity(w->session) - q3n_session_length(w->session);
        const int left = n < 0 ? room : n - (int)w->output.n;
        if (left == 0 && n >= 0) return NULL;
        if (cli_interrupted())   return "interrupted";
        if (room == 0)           return "the context is full";
        const int max = left < room ? left : room;
        const q3n_result r = q3n_session_decode(w->session, chosen[n_chosen - 1], chosen,
                                                max < CLI_COUNT(chosen) ? max : CLI_COUNT(chosen),
                                                &n_chosen);
        if (r == Q3N_ERR_CANCELLED) return "interrupted";
        check_choice(w, r, q3n_session_error(w->session));
        cli_check(r, w->session);
    }
}

static void print_drafts(const writer *w)
{
    q3n_speculation s = Q3N_INIT(q3n_speculation);
    q3n_session_speculation(w->session, &s);
    if (s.n_drafted == 0) return;
    fprintf(stderr, "; %lld of %lld drafts accepted, %.2f tokens a step", (long long)s.n_accepted,
            (long long)s.n_drafted, (double)s.n_tokens / (double)s.n_steps);
}

static void print_speed(const writer *w, double load_s, const char *why)
{
    const size_t n_read = w->n_prompt - w->n_reused;
    fprintf(stderr, "q3n: loaded in %.3f s; ", load_s);
    if (w->n_loaded) fprintf(stderr, "session of %zu tokens; ", w->n_loaded);
    fprintf(stderr, "prompt %zu tokens", w->n_prompt);
    if (w->n_reused) fprintf(stderr, ", %zu reused", w->n_reused);
    if (n_read && w->prompt_s > 0.0) {
        fprintf(stderr, ", %.1f tokens/s", (double)n_read / w->prompt_s);
    }
    fprintf(stderr, "; wrote %zu", w->n_output);
    if (w->decode_s > 0.0) fprintf(stderr, ", %.1f tokens/s", (double)w->n_output / w->decode_s);
    print_drafts(w);
    const q3n_engine *engine = q3n_session_engine(w->session);
    fprintf(stderr, "; %s, %d threads", q3n_isa_name(q3n_engine_isa(engine)),
            q3n_engine_n_threads(engine));
    const int goes_on = w->o->append && w->n_loaded && !w->o->seeded;     /* from that run's */
    if (!w->o->greedy && !goes_on) fprintf(stderr, "; seed %llu", (unsigned long long)w->o->seed);
    if (why) fprintf(stderr, "; %s", why);
    fprintf(stderr, "\n");
}

/* Returns why the text ended. */
static const char *write_case(writer *w, const cli_ids *prompt)
{
    const char *why = "interrupted";
    w->decoder  = (q3n_detokenizer){ .skip_special = !w->o->special };
    w->output.n = 0;
    w->text.n   = 0;
    w->n_printed    = 0;
    w->last_pending = 0;
    if (w->o->echo) {
        for (size_t t = 0; t < prompt->n; t++) emit_token(w, prompt->id[t]);
    }
    if (read_prompt(w, prompt)) {
        const double start = cli_clock();
        why = w->o->n == 0 ? NULL : write_tokens(w, w->o->n);
        w->decode_s += cli_clock() - start;
    }
    emit_end(w);
    if (w->o->append) finish_text(w);
    w->n_output += w->output.n;
    return why;
}

static void write_cases(run_options *o, const q3n_model *m, const cli_cases *prompts,
                        double load_start)
{
    writer w = { .o = o, .m = m, .stop_at_eos = o->stop_eos || !o->ignore_eos };
    open_cache(&w);
    open_session(&w, cli_cases_longest(prompts));
    w.logits = cli_alloc((size_t)q3n_model_config(m)->vocab_size, sizeof *w.logits);
    const double load_s = cli_clock() - load_start;
    const char *why = NULL;
    cli_catch_interrupt();
    for (size_t i = 0; i < prompts->n && !cli_interrupted(); i++) {
        why = write_case(&w, &prompts->item[i]);
    }
    keep_state(&w);
    if (!o->quiet) print_speed(&w, load_s, why);
    free(w.logits);
    free(w.output.id);
    cli_buffer_free(&w.text);
    q3n_session_destroy(w.session);
    q3n_cache_destroy(w.cache);
}

/* ---- Options ---- */

/* Returns 0 if the command ends here. */
static int parse_options(run_options *o, int argc, char **argv, cli_words *words)
{
    const uint64_t drawn = o->seed;
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(o->setup),
        CLI_INPUT_OPTIONS(o->in),
        { "-n --n-predict --tokens", "N", CLI_INT, &o->n, -1, 1 << 30,
          "maximum number of tokens to write (256); -1: until the text or the context ends" },
        { "--greedy", NULL, CLI_FLAG, &o->greedy, 0, 0, "always the most likely token" },
        { "--temp --temperature", "X", CLI_REAL, &o->temperature, 0, 100,
          "0: greedy (0.7)" },
        { "--top-k", "K", CLI_INT, &o->top_k, 0, 1 << 24, "of the K most likely; 0: off (20)" },
        { "--top-p", "P", CLI_REAL, &o->top_p, 1e-6, 1,
          "of the most likely that sum to P; 1: off (0.8)" },
        { "--min-p", "P", CLI_REAL, &o->min_p, 0, 1,
          "at least P times the most likely; 0: off (0)" },
        { "--repeat-penalty --repetition-penalty", "X", CLI_REAL, &o->penalty, 0.01, 100,
          "divides the logits of recent tokens; 1: off (1)" },
        { "--repeat-last-n", "N", CLI_INT, &o->last_n, 1, 1 << 24, "tokens that are recent (64)" },
        { "-s --seed", "N", CLI_U64, &o->seed, 0, 0,
          "of the random numbers (the time; with --append those of the text go on)" },
        { "--ignore-eos", NULL, CLI_FLAG, &o->ignore_eos, 0, 0,
          "do not stop at the end of the text (default with --ids and -n)" },
        { "--stop-eos", NULL, CLI_FLAG, &o->stop_eos, 0, 0, "stop there (default with a text)" },
        { "--special", NULL, CLI_FLAG, &o->special, 0, 0, "print special tokens too" },
        { "--echo", NULL, CLI_FLAG, &o->echo, 0, 0, "print the prompt before the text" },
        { "--json", NULL, CLI_FLAG, &o->json, 0, 0, "{\"output_ids\": [...]} instead of text" },
        { "-q --quiet", NULL, CLI_FLAG, &o->quiet, 0, 0, "no speed and no progress on stderr" },
        { "--session", "FILE", CLI_TEXT, &o->session_file, 0, 0,
          "continue the state in FILE if it is there, save the new one in it" },
        { "--append", NULL, CLI_FLAG, &o->append, 0, 0,
          "the prompt goes after the text of --session; else it is the whole text" },
        { "--cache-dir", "DIR", CLI_TEXT, &o->cache_dir, 0, 0,
          "keep states of prompts there, begin with what is known of a prompt" },
        { "--cache-size", "MB", CLI_INT, &o->cache_mb, 1, 1 << 30,
          "memory for such states (1024)" },
        { "--snapshot-every", "N", CLI_INT, &o->snapshot_every, 0, 1 << 30,
          "tokens between them; 0: at the ends of prompts only (1024)" },
        CLI_THREADS_OPTION(o->setup),
        CLI_CONTEXT_OPTIONS(o->setup, "-b --batch --batch-size", "auto; off with --seed"),
    };
    const cli_syntax syntax = {
        "run MODEL.q3n [TEXT] [options]",
        "Continues a prompt, token by token; speed goes to stderr.  The prompt is TEXT, or\n"
        "what an option gives, or else stdin.  The defaults of sampling are those published for\n"
        "the Qwen models.  --ids works on raw ids: with -n it writes exactly N.  With --session\n"
        "or --cache-dir the prompt is evaluated from where it differs from what is known; a token\n"
        "that ended a text is not part of what is saved.  Ctrl-C ends the text, and what is there\n"
        "is saved; the second one ends the program at once.",
        options, CLI_COUNT(options), 3, NULL, NULL,
    };
    if (!cli_parse(&syntax, argc, argv, words)) return 0;
    if (o->ignore_eos && o->stop_eos) cli_misuse("give one of --ignore-eos and --stop-eos");
    if ((o->in.ids || o->in.ids_file) && o->n >= 0) o->ignore_eos = 1;
    if (o->n == NOT_GIVEN) o->n = DEFAULT_N;
    if (o->temperature == 0.0) o->greedy = 1;
    /* Drafts keep the distribution, not the text of a seed: how many there are depends on time. */
    o->seeded = o->seed != drawn;
    const int any_text = o->greedy || !o->seeded || o->setup.draft;
    if (!o->setup.speculate) o->setup.speculate = any_text ? "auto" : "off";
    if (o->append && !o->session_file) cli_misuse("--append is for a --session");
    return 1;
}

static size_t count_prefix(const q3n_model *m)
{
    size_t n = 0;
    q3n_tokenize(m, NULL, 0, Q3N_TOKENIZE_PREFIX, NULL, 0, &n);
    return n;
}

int cmd_run(int argc, char **argv)
{
    run_options o = {
        .n = NOT_GIVEN, .temperature = 0.7, .top_k = 20, .top_p = 0.8, .penalty = 1.0,
        .seed = (uint64_t)time(NULL),
        .in = { .drop_newline = 1, .around = Q3N_TOKENIZE_PREFIX },      /* the text goes on */
        .snapshot_every = DEFAULT_EVERY,
    };
    cli_words words;
    if (!parse_options(&o, argc, argv, &words)) return cli_finish();

    const double start = cli_clock();
    q3n_model *m = cli_open_model(&o.setup, &words);
    if (!q3n_model_config(m)->causal) {
        cli_fail("%s attends both ways: it cannot write text; try q3n logits or q3n classify",
                 o.setup.model);
    }
    cli_cases prompts = { 0 };
    cli_input_choose(&o.in, &o.setup, &words);
    cli_input_cases(&prompts, &o.in, m);
    if ((o.in.prompt || o.in.file) && !o.in.alone) o.n_prefix = count_prefix(m);
    write_cases(&o, m, &prompts, start);
    cli_cases_free(&prompts);
    q3n_model_close(m);
    const int status = cli_finish();
    return cli_interrupted() ? cli_interrupted() : status;
}
