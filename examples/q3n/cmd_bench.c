/* q3n bench: speed, and how near it comes to what the memory gives.
 *
 * Decoding reads the weights that a token uses, the KV cache up to the current depth and the
 * DeltaNet and convolution states: their bytes times tokens per second, over the read bandwidth of
 * the same number of threads measured just before and behind, is the share of the roof.
 *
 * Every repetition measures everything in turn: bandwidth, prefill, bandwidth, decode, bandwidth.
 * What else a shared machine does then slows all of them alike, and medians are comparable.
 */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

/* ---- Cases ---- */

/* The run that warms up and the measured ones follow one another behind a depth; from nothing each
 * begins anew. */
int bench_decode_room(const bench *b, int depth)
{
    return depth ? depth + (b->repeats + 1) * b->n_decode : b->n_decode;
}

static int largest(const bench_list *list)
{
    int most = 0;
    for (int i = 0; i < list->n; i++) {
        if (list->value[i] > most) most = list->value[i];
    }
    return most;
}

static q3n_session *open_session(const bench *b, int thread, int room)
{
    cli_setup setup = b->setup;
    setup.threads = b->threads.value[thread];
    return cli_open_session(&setup, b->m, (size_t)room, 0);
}

static void add_cases(bench *b, int decode, const bench_list *values)
{
    for (int i = 0; i < values->n; i++) {
        const int value = values->value[i];
        for (int t = 0; (decode ? b->n_decode : value) > 0 && t < b->threads.n; t++) {
            bench_case *c = &b->cases[b->n_cases++];
            *c = (bench_case){ .decode = decode, .value = value, .thread = t, .s = b->shared[t] };
            if (!decode || value == 0) continue;
            c->s = open_session(b, t, bench_decode_room(b, value));
            cli_eval(c->s, b->ids, value, b->logits);
        }
    }
}

static void make_cases(bench *b)
{
    const int prompt = largest(&b->prompts), room = prompt > b->n_decode ? prompt : b->n_decode;
    for (int t = 0; t < b->threads.n; t++) {
        b->shared[t] = open_session(b, t, room > 0 ? room : 1);
    }
    b->cases = cli_alloc(2 * BENCH_LIST * BENCH_LIST, sizeof *b->cases);
    add_cases(b, 0, &b->prompts);
    add_cases(b, 1, &b->depths);
}

/* Ids without a pattern, so that tokens go to different experts (xorshift64, Marsaglia 2003). */
static void make_ids(bench *b)
{
    int n = largest(&b->prompts);
    for (int i = 0; i < b->depths.n; i++) {
        const int room = bench_decode_room(b, b->depths.value[i]);
        if (room > n) n = room;
    }
    b->ids = cli_alloc((size_t)n, sizeof *b->ids);
    const uint64_t vocab = (uint64_t)q3n_model_config(b->m)->vocab_size;
    uint64_t x = 88172645463325252u;
    for (int i = 0; i < n; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        b->ids[i] = (int32_t)((x >> 32) % vocab);
    }
    b->logits = cli_alloc((size_t)vocab, sizeof *b->logits);
}

/* ---- Measuring ---- */

/* The bytes of a model file with random weights. */
static void make_model(bench *b)
{
    q3n_config c;
    cli_geometry_config(&b->geometry, &c);
    cli_bar bar = cli_bar_begin("random weights", 1);
    const q3n_init_options o = {
        .type = cli_parse_type("--type", b->type), .seed = 1, .name = b->geometry.preset,
        .progress = { cli_bar_report, &bar },
    };
    q3n_error err = { .offset = -1 };
    const int64_t bytes = q3n_init_bytes(&c, &o, &err);
    if (bytes == 0) cli_fail_with(b->geometry.preset, &err);
    const size_t physical = cli_physical_memory();
    if ((uint64_t)bytes > SIZE_MAX / 2 || (physical && (uint64_t)bytes > physical)) {
        char need[32], have[32];
        cli_fail("%s needs %s of memory, this machine has %s", b->geometry.preset,
                 cli_format_bytes(need, (double)bytes), cli_format_bytes(have, (double)physical));
    }
    b->memory_bytes = (size_t)bytes;
    b->memory = cli_alloc_pages(b->memory_bytes);
    const q3n_result r = q3n_init_memory(b->memory, b->memory_bytes, &c, &o, &err);
    cli_bar_end(&bar);
    if (r != Q3N_OK) cli_fail_with(b->geometry.preset, &err);
    b->setup.model = b->geometry.preset;
}

/* From nothing to the logits behind a prompt of one token, with the first number of threads. */
static void open_and_eval(bench *b, cli_words *words)
{
    if (b->geometry.preset) make_model(b);
    const double start = cli_clock();
    b->m = b->memory ? cli_open_memory(&b->setup, b->memory, b->memory_bytes)
                     : cli_open_model(&b->setup, words);
    b->open_s = cli_clock() - start;
    if (!q3n_model_config(b->m)->causal) {
        cli_fail("%s attends both ways: it cannot decode, so there is nothing to measure",
                 b->setup.model);
    }
    q3n_session *s = open_session(b, 0, 1);
    float *logits = cli_alloc((size_t)q3n_model_config(b->m)->vocab_size, sizeof *logits);
    const int32_t id = 0;
    cli_eval(s, &id, 1, logits);
    b->first_token_s = cli_clock() - start;
    free(logits);
    q3n_session_destroy(s);
}

/* Tokens per second. */
static double measure(const bench *b, const bench_case *c)
{
    if (!c->decode || c->value == 0) q3n_session_reset(c->s);
    const int n = c->decode ? b->n_decode : c->value;
    const int32_t *ids = b->ids + q3n_session_length(c->s);
    const double start = cli_clock();
    if (!c->decode) cli_eval(c->s, ids, n, b->logits);
    for (int t = 0; c->decode && t < n; t++) cli_eval(c->s, ids + t, 1, b->logits);
    return (double)n / (cli_clock() - start);
}

/* All prefills, or all decodes; what they give is kept if record is set. */
static void measure_cases(bench *b, int decode, int record, cli_bar *bar)
{
    const int64_t total = (int64_t)(b->repeats + 1) * b->n_cases;
    for (int i = 0; i < b->n_cases; i++) {
        bench_case *c = &b->cases[i];
        if (c->decode != decode) continue;
        const double tok_s = measure(b, c);
        if (record) c->tok_s.x[c->tok_s.n++] = tok_s;
        cli_bar_update(bar, (int64_t)(record ? b->done + 1 : 0) * b->n_cases + i, total,
                       decode ? "decode" : "prefill");
    }
}

static void measure_reading(bench *b)
{
    for (int t = 0; t < b->threads.n; t++) {
        bench_samples *samples = &b->read[t];
        samples->x[samples->n++] = bench_read(b->buffer, b->threads.value[t]);
    }
}

/* Brings what the warm-up did not use into the page tables too, if there is memory for it, so that
 * no measured token is the first to use an expert. */
static void touch_weights(const bench *b)
{
    enum { PAGE = 4096 };
    if ((double)b->stats.file_bytes > 0.8 * (double)cli_physical_memory()) return;
    for (int i = 0; i < q3n_model_n_tensors(b->m); i++) {
        q3n_tensor t;
        if (q3n_model_tensor(b->m, i, &t) != Q3N_OK) continue;
        const int64_t n_slices = t.stride ? t.dim[0] : 1, bytes = t.bytes / n_slices;
        for (int64_t k = 0; k < n_slices; k++) {
            const volatile unsigned char *p = (const unsigned char *)t.data + (size_t)k * t.stride;
            for (int64_t at = 0; at < bytes; at += PAGE) (void)p[at];
        }
    }
}

static void measure_all(bench *b)
{
    cli_bar bar = cli_bar_begin("bench", 0);
    measure_cases(b, 0, 0, &bar);
    measure_cases(b, 1, 0, &bar);
    b->peak_bytes = cli_peak_memory();       /* before the buffer counts */
    touch_weights(b);
    b->buffer = bench_buffer_create(largest(&b->threads));

    const double start = cli_clock();
    double last = 0.0;
    while (b->done < b->repeats) {
        const double begin = cli_clock();
        if (b->done && begin - start + last > b->limit) break;
        measure_reading(b);
        measure_cases(b, 0, 1, &bar);
        measure_reading(b);
        measure_cases(b, 1, 1, &bar);
        measure_reading(b);
        last = cli_clock() - begin;
        b->done++;
    }
    cli_bar_end(&bar);
    bench_buffer_destroy(b->buffer);
}

/* ---- All of it ---- */

static void parse_options(bench *b, int argc, char **argv, cli_words *words)
{
    const char *prompts = "512", *threads = NULL, *depths = "0";
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(b->setup),
        { "--preset", "NAME", CLI_TEXT, &b->geometry.preset, 0, 0,
          "random weights in memory instead of a file" },
        { "--type", "TYPE", CLI_TEXT, &b->type, 0, 0,
          "of the preset's matrices:" CLI_TYPE_NAMES " (bf16)" },
        { "-p --prompt", "LIST", CLI_TEXT, &prompts, 0, 0, "tokens of the prompts (512); 0: none" },
        { "-n --tokens", "N", CLI_INT, &b->n_decode, 0, 1 << 16, "tokens to decode (64); 0: none" },
        { "-t --threads", "LIST", CLI_TEXT, &threads, 0, 0, "numbers of threads (one a CPU)" },
        { "-d --depth", "LIST", CLI_TEXT, &depths, 0, 0,
          "tokens before the decoded ones (0)" },
        { "-r --repeat", "N", CLI_INT, &b->repeats, 1, BENCH_REPEATS, "repetitions (5)" },
        { "--limit", "SECONDS", CLI_REAL, &b->limit, 0, 1e9,
          "begin no repetition that would end later (300)" },
        { "--json", NULL, CLI_FLAG, &b->json, 0, 0, "one object" },
        CLI_CONTEXT_OPTIONS(b->setup),
    };
    const cli_syntax syntax = {
        "bench MODEL.q3n | --preset NAME [--FIELD VALUE ...] [options]",
        "Measures prefill and decode: the median of the repetitions with the least and the most,\n"
        "the bytes that a decoded token reads, and their share of this machine's read bandwidth.\n"
        "All are measured in turn, the bandwidth with the same numbers of threads; the share is\n"
        "the median of each repetition's.  Before that, one run warms up; the time to the first\n"
        "token is from opening the file, with the first number of threads; the resident memory is\n"
        "that of all sessions and the weights used.  --preset measures a geometry without a file;\n"
        "--FIELD VALUE overrides its fields as in q3n init.",
        options, CLI_COUNT(options), 1, cli_geometry_option, &b->geometry,
    };
    cli_parse(&syntax, argc, argv, words);
    if (!b->geometry.preset && (b->geometry.n || b->type)) {
        cli_misuse("--%s is for a --preset", b->type ? "type" : b->geometry.field[0]);
    }
    if (b->geometry.preset && (b->setup.model || words->n)) {
        cli_misuse("give a model or --preset, not both");
    }
    b->prompts.n = cli_parse_list("-p", prompts, 0, b->prompts.value, BENCH_LIST);
    b->depths.n  = cli_parse_list("--depth", depths, 0, b->depths.value, BENCH_LIST);
    b->threads   = (bench_list){ { cli_n_cpus() }, 1 };
    if (threads) b->threads.n = cli_parse_list("-t", threads, 1, b->threads.value, BENCH_LIST);
    if (largest(&b->threads) > 1024) cli_misuse("-t: at most 1024 threads");
    if (largest(&b->depths) > (1 << 26) || largest(&b->prompts) > (1 << 26)) {
        cli_misuse("at most %d tokens", 1 << 26);
    }
}

int cmd_bench(int argc, char **argv)
{
    bench *b = cli_alloc(1, sizeof *b);
    b->n_decode = 64;
    b->repeats  = 5;
    b->limit    = 300.0;
    cli_words words;
    parse_options(b, argc, argv, &words);
    open_and_eval(b, &words);
    q3n_model_stats_get(b->m, &b->stats);
    make_ids(b);
    make_cases(b);
    measure_all(b);
    bench_print(b);

    for (int i = 0; i < b->n_cases; i++) {
        if (b->cases[i].decode && b->cases[i].value) q3n_session_destroy(b->cases[i].s);
    }
    for (int t = 0; t < b->threads.n; t++) q3n_session_destroy(b->shared[t]);
    q3n_model_close(b->m);
    cli_free_pages(b->memory);
    free(b->cases);
    free(b->ids);
    free(b->logits);
    free(b);
    return cli_finish();
}
