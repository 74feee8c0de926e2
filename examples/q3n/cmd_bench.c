/* q3n bench: speed, and how near it comes to what the memory gives.
 *
 * Decoding reads the weights that a token uses, the KV cache up to the current depth and the
 * DeltaNet and convolution states.  The roof is reading alone: as many threads read as many bytes,
 * those that every token reads from one place, those of experts from changing ones, just before
 * and after the decoding.  Caches give to both what they can.
 *
 * Every repetition measures everything in turn: bandwidth, prefill, and for each row of decoding
 * roof, decode, roof.  What else a shared machine does then slows all of them alike, and medians
 * are comparable.  The other modes, in bench_*.c, do the same with what they compare.
 */
#include "bench.h"
#include "../../tools/q3n_make.h"

#include <stdlib.h>
#include <string.h>

/* ---- Cases ---- */

/* The run that warms up and the measured ones follow one another after a depth; from nothing each
 * begins anew. */
int bench_decode_room(const bench *b, int depth)
{
    return depth ? depth + (b->repeats + 1) * b->n_decode : b->n_decode;
}

int bench_largest(const bench_list *list)
{
    int max = 0;
    for (int i = 0; i < list->n; i++) {
        if (list->value[i] > max) max = list->value[i];
    }
    return max;
}

q3n_session_options bench_options(const bench *b, int thread, int n)
{
    q3n_session_options o = cli_fit_options(&b->setup, b->m, (size_t)n);
    o.engine_options = &b->engine[thread];
    return o;
}

q3n_session *bench_open_session(const bench *b, int thread, int n)
{
    const q3n_session_options o = bench_options(b, thread, n);
    return cli_create_session(&b->setup, b->m, &o);
}

static void add_cases(bench *b, int decode, const bench_list *values)
{
    for (int i = 0; i < values->n; i++) {
        const int value = values->value[i];
        for (int t = 0; (decode ? b->n_decode : value) > 0 && t < b->threads.n; t++) {
            bench_case *c = &b->cases[b->n_cases++];
            *c = (bench_case){ .decode = decode, .value = value, .thread = t, .s = b->shared[t] };
            if (!decode || value == 0) continue;
            c->s = bench_open_session(b, t, bench_decode_room(b, value));
            cli_eval(c->s, b->ids, value, b->logits);
        }
    }
}

static void make_cases(bench *b)
{
    const int prompt = bench_largest(&b->prompts);
    const int room = prompt > b->n_decode ? prompt : b->n_decode;
    for (int t = 0; t < b->threads.n; t++) {
        b->shared[t] = bench_open_session(b, t, room > 0 ? room : 1);
    }
    b->cases = cli_alloc(2 * BENCH_LIST * BENCH_LIST, sizeof *b->cases);
    add_cases(b, 0, &b->prompts);
    add_cases(b, 1, &b->depths);
}

/* Ids without a pattern, so that tokens go to different experts (xorshift64, Marsaglia 2003). */
void bench_make_ids(bench *b, int n)
{
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
    q3n_config c = Q3N_INIT(q3n_config);
    cli_geometry_config(&b->geometry, &c);
    /* What drafts cost can be measured with random weights too. */
    q3n_config with_mtp = c;
    with_mtp.num_mtp_layers = 1;
    if (b->mode == BENCH_DRAFTS && q3n_config_check(&with_mtp, NULL) == Q3N_OK) c = with_mtp;
    cli_bar bar = cli_bar_begin("random weights", "B");
    const q3n_init_options o = {
        .size = sizeof o, .type = cli_type(b->type), .seed = 1, .name = b->geometry.preset,
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

/* From nothing to the logits after a prompt of one token, with the first number of threads. */
static void open_and_eval(bench *b, cli_words *words)
{
    if (b->geometry.preset) make_model(b);
    const double start = cli_clock();
    b->m = b->memory ? cli_open_memory(&b->setup, b->memory, b->memory_bytes)
                     : cli_open_model(&b->setup, words);
    b->open_s = cli_clock() - start;
    for (int t = 0; t < b->threads.n; t++) {
        b->engine[t] = b->setup.engine;
        b->engine[t].n_threads = b->threads.value[t];
    }
    if (!q3n_model_config(b->m)->causal) {
        cli_fail("%s attends both ways: it cannot decode, so there is nothing to measure",
                 b->setup.model);
    }
    q3n_session *s = bench_open_session(b, 0, 1);
    float *logits = cli_alloc((size_t)q3n_model_config(b->m)->vocab_size, sizeof *logits);
    const int32_t id = 0;
    cli_eval(s, &id, 1, logits);
    b->first_token_s = cli_clock() - start;
    b->isa = q3n_isa_name(q3n_engine_isa(q3n_session_engine(s)));
    free(logits);
    q3n_session_destroy(s);
}

/* Tokens per second. */
static double measure(const bench *b, bench_case *c)
{
    if (!c->decode || c->value == 0) q3n_session_reset(c->s);
    const int n = c->decode ? b->n_decode : c->value;
    const int32_t *ids = b->ids + q3n_session_length(c->s);
    const double start = cli_clock();
    if (!c->decode) cli_eval(c->s, ids, n, b->logits);
    for (int t = 0; c->decode && t < n; t++) cli_eval(c->s, ids + t, 1, b->logits);
    c->seconds = cli_clock() - start;
    return (double)n / c->seconds;
}

void bench_add(bench_samples *samples, double x)
{
    samples->x[samples->n++] = x;
}

/* What is read, and by which loop. */
static void prepare_reading(bench *b)
{
    b->buffer = bench_buffer_create(bench_largest(&b->threads));
    const double half = (double)bench_buffer_half(b->buffer);
    for (int t = 0; t < b->threads.n; t++) {
        b->memory_reading[t] = (bench_reading){ .threads = b->threads.value[t], .cold = half,
                                                .pool = half };
        bench_choose_loop(b->buffer, &b->memory_reading[t]);
    }
    for (int i = 0; i < b->n_cases; i++) {
        bench_case *c = &b->cases[i];
        if (!c->decode) continue;
        c->reading = bench_token(b, c, b->repeats);
        bench_choose_loop(b->buffer, &c->reading);
    }
}

/* Before and after together as long as the decoding, so that a machine with other work has as much
 * of it in both; within bounds. */
static void measure_roof(const bench *b, bench_case *c)
{
    double seconds = c->seconds / BENCH_READS;
    if (seconds < BENCH_READ_SECONDS) seconds = BENCH_READ_SECONDS;
    if (seconds > 1.0)                seconds = 1.0;
    bench_add(&c->roof, bench_read(b->buffer, &c->reading, seconds));
}

/* What it gives is noted if record is set. */
static void measure_round(void *user, int record)
{
    bench *b = user;
    if (record && !b->buffer) prepare_reading(b);
    for (int t = 0; record && t < b->threads.n; t++) {
        bench_add(&b->read[t], bench_read(b->buffer, &b->memory_reading[t], 0.1));
    }
    for (int i = 0; i < b->n_cases; i++) {
        bench_case *c = &b->cases[i];
        if (record && c->decode) measure_roof(b, c);
        const double tok_s = measure(b, c);
        if (!record) continue;
        bench_add(&c->tok_s, tok_s);
        if (c->decode) measure_roof(b, c);
    }
}

/* Brings what the warm-up did not use into the page tables too, if there is memory for it, so that
 * no measured token is the first to use an expert. */
static void touch_weights(const bench *b)
{
    enum { PAGE = 4096 };
    if ((double)b->stats.file_bytes > 0.8 * (double)cli_physical_memory()) return;
    for (int i = 0; i < q3n_model_n_tensors(b->m); i++) {
        const q3n_tensor t = *q3n_model_tensor(b->m, i);
        const int64_t n_slices = t.stride ? t.dim[0] : 1, bytes = t.bytes / n_slices;
        for (int64_t k = 0; k < n_slices; k++) {
            const volatile unsigned char *p = (const unsigned char *)t.data + (size_t)k * t.stride;
            for (int64_t at = 0; at < bytes; at += PAGE) (void)p[at];
        }
    }
}

void bench_repeat(bench *b, void (*round)(void *user, int record), void *user)
{
    cli_bar bar = cli_bar_begin("bench", "rounds");
    cli_bar_update(&bar, 0, b->repeats + 1, "warming up");
    round(user, 0);
    b->peak_bytes = cli_peak_memory();       /* before the weights and buffers of this program */
    if (b->m) touch_weights(b);

    const double start = cli_clock();
    double last = 0.0;
    while (b->done < b->repeats) {
        const double begin = cli_clock();
        if (b->done && begin - start + last > b->limit) break;
        cli_bar_update(&bar, b->done + 1, b->repeats + 1, "measuring");
        round(user, 1);
        last = cli_clock() - begin;
        b->done++;
    }
    cli_bar_end(&bar);
}

static void bench_speed(bench *b)
{
    int n = bench_largest(&b->prompts);
    for (int i = 0; i < b->depths.n; i++) {
        const int room = bench_decode_room(b, b->depths.value[i]);
        if (room > n) n = room;
    }
    bench_make_ids(b, n);
    make_cases(b);
    bench_repeat(b, measure_round, b);
    bench_buffer_destroy(b->buffer);
    bench_print(b);
    for (int i = 0; i < b->n_cases; i++) {
        if (b->cases[i].decode && b->cases[i].value) q3n_session_destroy(b->cases[i].s);
    }
    for (int t = 0; t < b->threads.n; t++) q3n_session_destroy(b->shared[t]);
    free(b->cases);
}

/* ---- Memory that counts itself ---- */

static void *heap_alloc(void *user, size_t bytes)
{
    bench_heap *heap = user;
    void *memory = malloc(bytes);
    if (!memory) return NULL;
    heap->bytes += bytes;
    heap->n++;
    return memory;
}

static void heap_free(void *user, void *memory, size_t bytes)
{
    bench_heap *heap = user;
    heap->bytes -= bytes;
    heap->n--;
    free(memory);
}

/* ---- All of it ---- */

/* What an option that was not given means in each mode: tokens of prompts, decoded tokens. */
static const struct {
    const char *prompts;
    int         n_decode;
} defaults[] = {
    [BENCH_SPEED] = { "512", 64 }, [BENCH_BATCH] = { "512", 64 }, [BENCH_DRAFTS] = { "128", 128 },
    [BENCH_CHAT]  = { "300", 100 }, [BENCH_BANDWIDTH] = { "0", 0 },
};

typedef struct bench_words {
    const char *prompts, *threads, *depths, *batches;
    int         mtp, session, read;
} bench_words;

static void set_lists(bench *b, const bench_words *w)
{
    const char *prompts = w->prompts ? w->prompts : defaults[b->mode].prompts;
    b->prompts.n = cli_parse_list("-p", prompts, 0, b->prompts.value, BENCH_LIST);
    b->depths.n  = cli_parse_list("--depth", w->depths, 0, b->depths.value, BENCH_LIST);
    b->threads   = (bench_list){ { cli_n_cpus() }, 1 };
    if (w->threads) {
        b->threads.n = cli_parse_list("-t", w->threads, 1, b->threads.value, BENCH_LIST);
    }
    if (w->batches) {
        b->batches.n = cli_parse_list("--batch", w->batches, 1, b->batches.value, BENCH_LIST);
    }
    if (bench_largest(&b->threads) > BENCH_THREADS) cli_misuse("-t: at most 1024 threads");
    if (bench_largest(&b->batches) > 1024) cli_misuse("--batch: at most 1024 sessions");
    if (bench_largest(&b->depths) > (1 << 26) || bench_largest(&b->prompts) > (1 << 26)) {
        cli_misuse("at most %d tokens", 1 << 26);
    }
    if (b->n_decode < 0) b->n_decode = defaults[b->mode].n_decode;
}

/* Returns 0 if the command ends here. */
static int parse_options(bench *b, int argc, char **argv, cli_words *words)
{
    bench_words w = { .depths = "0" };
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(b->setup),
        { "--preset", "NAME", CLI_TEXT, &b->geometry.preset, 0, 0,
          "random weights in memory instead of a file" },
        { "--type", "TYPE", CLI_TYPE, &b->type, 0, 0, "of the preset's matrices (bf16)" },
        { "-p --prompt", "LIST", CLI_TEXT, &w.prompts, 0, 0,
          "tokens of the prompts (512); 0: none" },
        { "-n --tokens", "N", CLI_INT, &b->n_decode, 0, 1 << 16, "tokens to decode (64); 0: none" },
        { "-t --threads", "LIST", CLI_TEXT, &w.threads, 0, 0, "numbers of threads (one a CPU)" },
        { "-d --depth", "LIST", CLI_TEXT, &w.depths, 0, 0, "tokens before the decoded ones (0)" },
        { "--batch", "LIST", CLI_TEXT, &w.batches, 0, 0,
          "instead: decode that many sessions at once" },
        { "--mtp", NULL, CLI_FLAG, &w.mtp, 0, 0,
          "instead: decode with and without drafts (128 tokens)" },
        { "--session", NULL, CLI_FLAG, &w.session, 0, 0,
          "instead: 10 turns of a chat (300 and 100 tokens), states" },
        { "--read", NULL, CLI_FLAG, &w.read, 0, 0,
          "instead, without a model: read bandwidth by sizes and loops" },
        { "-r --repeat", "N", CLI_INT, &b->repeats, 1, BENCH_REPEATS, "repetitions (5)" },
        { "--limit", "SECONDS", CLI_REAL, &b->limit, 0, 1e9,
          "begin no repetition that would end later (300)" },
        { "--json", NULL, CLI_FLAG, &b->json, 0, 0, "one object" },
        CLI_CONTEXT_OPTIONS(b->setup, "-b --batch-size", "off"),
    };
    const cli_syntax syntax = {
        "bench MODEL.q3n | --preset NAME [--FIELD VALUE ...] [options]",
        "Measures prefill and decode: the median of the repetitions with their min and max,\n"
        "the bytes that a decoded token reads, how many of them must come from memory, and the\n"
        "share of the roof.  Before that, one run warms up; the time to the first token is from\n"
        "opening the file, with the first number of threads; the resident memory is that of all\n"
        "sessions and the weights used.  --preset measures a geometry without a file;\n"
        "--FIELD VALUE overrides its fields as in q3n init.\n\n"
        "The roof is reading alone, measured just before and after each decoding: as many threads\n"
        "read as many bytes a token, those that every token reads (weights but experts, states,\n"
        "KV cache) over and over, those of experts from random places, with the fastest of\n"
        "several loops.  So what stays in a cache is fast for both, and no share passes 100 % but\n"
        "by noise.  At least those bytes come from memory that are left if the caches hold what\n"
        "every token reads, and then experts.  JSON has both, and memory_share: the latter over\n"
        "the bandwidth of memory alone.\n\n"
        "--batch decodes -n tokens in each of several sessions together: tokens per second of\n"
        "all, and over those of one.  --mtp writes the same text with each source of drafts, from\n"
        "prompts of the model's kind, or of -p random ids if it has no tokenizer; with --preset\n"
        "the model gets an MTP module if its family may have one.  --session holds a chat of 10\n"
        "turns of -p and -n tokens: the time to the first logits of each, with what the session\n"
        "knows and with the whole text read again; then snapshot, restore, fork, rewind, save,\n"
        "load, and the memory that is allocated beside the memory that was planned.",
        options, CLI_COUNT(options), 1, cli_geometry_option, &b->geometry,
    };
    if (!cli_parse(&syntax, argc, argv, words)) return 0;
    if (!b->geometry.preset && (b->geometry.n || b->type)) {
        cli_misuse("--%s is for a --preset", b->type ? "type" : b->geometry.field[0]);
    }
    if (b->geometry.preset && (b->setup.model || words->n)) {
        cli_misuse("give a model or --preset, not both");
    }
    if ((w.batches != NULL) + w.mtp + w.session + w.read > 1) {
        cli_misuse("give one of --batch, --mtp, --session and --read");
    }
    if (w.read && (b->geometry.preset || b->setup.model || words->n)) {
        cli_misuse("--read needs no model");
    }
    b->mode = w.batches ? BENCH_BATCH : w.mtp ? BENCH_DRAFTS : w.session ? BENCH_CHAT
            : w.read ? BENCH_BANDWIDTH : BENCH_SPEED;
    set_lists(b, &w);
    return 1;
}

int cmd_bench(int argc, char **argv)
{
    static void (*const modes[])(bench *b) = {
        [BENCH_SPEED]  = bench_speed,  [BENCH_BATCH] = bench_batch,
        [BENCH_DRAFTS] = bench_drafts, [BENCH_CHAT]  = bench_chat,
        [BENCH_BANDWIDTH] = bench_bandwidth,
    };
    bench *b = cli_alloc(1, sizeof *b);
    b->n_decode = -1;
    b->repeats  = 5;
    b->limit    = 300.0;
    b->setup.allocator = (q3n_allocator){ heap_alloc, heap_free, &b->heap };
    cli_words words;
    if (!parse_options(b, argc, argv, &words)) {
        free(b);
        return cli_finish();
    }
    if (b->mode != BENCH_BANDWIDTH) {
        open_and_eval(b, &words);
        b->stats = (q3n_model_stats)Q3N_INIT(q3n_model_stats);
        q3n_model_stats_get(b->m, &b->stats);
    }
    modes[b->mode](b);
    q3n_model_close(b->m);
    cli_free_pages(b->memory);
    free(b->ids);
    free(b->logits);
    free(b);
    return cli_finish();
}
