/* q3n bench: speed, and how near it comes to what the memory gives.
 *
 * Decoding reads the weights that a token uses, the KV cache up to the current depth and the
 * DeltaNet and convolution states: their bytes times tokens per second, over the measured read
 * bandwidth of the same number of threads, is the share of the roof.
 */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_LIST = 16, MAX_REPEATS = 100 };

typedef struct list {
    int value[MAX_LIST];
    int n;
} list;

/* Median, least and most of the repeated measurements. */
typedef struct spread {
    double median, least, most;
} spread;

typedef struct bench {
    cli_setup  setup;
    q3n_model *m;
    q3n_model_stats stats;
    list       prompts, threads, depths;
    int        n_decode, repeats, json;
    double     read_gb_s[MAX_LIST];          /* by index of threads */
    int        n_rows;                       /* printed of the current JSON array */
    int32_t   *ids;                          /* a text: ids that follow no pattern */
    float     *logits;                       /* [vocab] */
} bench;

static int compare_reals(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static spread spread_of(double *x, int n)
{
    qsort(x, (size_t)n, sizeof *x, compare_reals);
    return (spread){ (x[(n - 1) / 2] + x[n / 2]) / 2.0, x[0], x[n - 1] };
}

/* ---- Read bandwidth ---- */

/* Passes over one buffer, far larger than a last-level cache; every thread reads its part. */
typedef struct read_job {
    uint64_t *data;
    size_t    n;                 /* words of the whole buffer */
    int       threads, passes;
    int       fill;              /* 1 = write the part first, which places its pages */
    uint64_t  sums[1024];
} read_job;

/* One cache line a step, four sums that do not wait for one another.  Written out, because gcc -O2
 * left an inner loop over an array of sums rolled: 22 GB/s where this reads 30 (a Zen 4 core). */
static uint64_t sum_words(const uint64_t *p, size_t n)
{
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = 0; i + 8 <= n; i += 8) {
        a += p[i + 0] + p[i + 4];
        b += p[i + 1] + p[i + 5];
        c += p[i + 2] + p[i + 6];
        d += p[i + 3] + p[i + 7];
    }
    return a + b + c + d;
}

static void read_part(void *arg, int i)
{
    read_job *job = arg;
    const size_t part = job->n / (size_t)job->threads / 8 * 8;
    uint64_t *p = job->data + (size_t)i * part;
    uint64_t sum = 0;
    if (job->fill) {
        for (size_t k = 0; k < part; k++) p[k] = k;
    }
    for (int pass = 0; pass < job->passes; pass++) sum += sum_words(p, part);
    job->sums[i] = sum;
}

/* The best of three medians of five rounds, GB/s: other work on the machine only lowers it. */
static double measure_bandwidth(int threads)
{
    enum { ROUNDS = 5, PASSES = 4 };
    const size_t bytes = (size_t)512 << 20;
    read_job *job = cli_alloc(1, sizeof *job);
    job->n       = bytes / sizeof *job->data;
    job->data    = cli_alloc(job->n, sizeof *job->data);
    job->threads = threads;
    job->fill    = 1;
    cli_run_threads(threads, read_part, job);
    job->fill    = 0;
    job->passes  = PASSES;

    double best = 0.0;
    for (int group = 0; group < 3; group++) {
        double gb_s[ROUNDS];
        for (int i = 0; i < ROUNDS; i++) {
            const double start = cli_clock();
            cli_run_threads(threads, read_part, job);
            gb_s[i] = 1e-9 * (double)bytes * PASSES / (cli_clock() - start);
        }
        const double median = spread_of(gb_s, ROUNDS).median;
        if (median > best) best = median;
    }
    free(job->data);
    free(job);
    return best;
}

/* ---- The model ---- */

static q3n_session *open_session(bench *b, int thread_index, int capacity)
{
    b->setup.threads = b->threads.value[thread_index];
    return cli_open_session(&b->setup, b->m, (size_t)capacity, 0);
}

static void measure_prefill(bench *b, q3n_session *s, int n, spread *tok_s)
{
    double x[MAX_REPEATS];
    const int warm = n < 64 ? n : 64;
    q3n_session_reset(s);
    cli_eval(s, b->ids, warm, b->logits);
    for (int i = 0; i < b->repeats; i++) {
        q3n_session_reset(s);
        const double start = cli_clock();
        cli_eval(s, b->ids, n, b->logits);
        x[i] = (double)n / (cli_clock() - start);
    }
    *tok_s = spread_of(x, b->repeats);
}

/* Decodes repeats times n_decode tokens.  Behind depth 0 each run starts anew; behind a longer
 * text the runs follow one another, so the depth grows by a few tokens. */
static void measure_decode(bench *b, q3n_session *s, int depth, spread *tok_s)
{
    double x[MAX_REPEATS];
    const int warm = 2;
    q3n_session_reset(s);
    cli_eval(s, b->ids, depth + warm, b->logits);
    for (int i = 0; i < b->repeats; i++) {
        if (depth == 0) q3n_session_reset(s);
        const int32_t *ids = b->ids + q3n_session_length(s);
        const double start = cli_clock();
        for (int t = 0; t < b->n_decode; t++) cli_eval(s, ids + t, 1, b->logits);
        x[i] = (double)b->n_decode / (cli_clock() - start);
    }
    *tok_s = spread_of(x, b->repeats);
}

static int decode_capacity(const bench *b, int depth)
{
    return depth == 0 ? (b->n_decode > 2 ? b->n_decode : 2) : depth + 2 + b->repeats * b->n_decode;
}

/* Bytes that one decoded token reads, in the middle of the measurement. */
static double bytes_per_token(const bench *b, int depth)
{
    q3n_session_options o = cli_session_options(&b->setup);
    q3n_session_memory memory = { 0 };
    o.capacity = decode_capacity(b, depth);
    q3n_session_bytes(b->m, &o, &memory);
    const double length = depth == 0 ? 0.5 * b->n_decode
                                     : depth + 2 + 0.5 * b->repeats * b->n_decode;
    return (double)b->stats.decode_bytes + (double)memory.delta_state + (double)memory.conv_state
         + (double)memory.kv_cache * length / (double)o.capacity;
}

/* ---- Output ---- */

static void json_row(bench *b, const char *key, int value, int threads, const spread *tok_s)
{
    printf("%s{\"%s\": %d, \"threads\": %d, \"tok_s\": %.6g, \"tok_s_min\": %.6g, "
           "\"tok_s_max\": %.6g", b->n_rows++ ? ", " : "", key, value, threads, tok_s->median,
           tok_s->least, tok_s->most);
}

static void print_prefill(bench *b, int n, int threads, const spread *tok_s)
{
    const double gmac_s = 1e-9 * (double)b->stats.n_weights_active * tok_s->median;
    if (b->json) {
        json_row(b, "n", n, threads, tok_s);
        printf(", \"gmac_s\": %.6g}", gmac_s);
    } else {
        printf("prefill %6d  %3d threads  %10.2f tokens/s (%.2f .. %.2f)  %8.1f GMAC/s\n", n,
               threads, tok_s->median, tok_s->least, tok_s->most, gmac_s);
    }
    fflush(stdout);
}

static void print_decode(bench *b, int depth, int thread_index, const spread *tok_s)
{
    const int threads = b->threads.value[thread_index];
    const double bytes = bytes_per_token(b, depth);
    const double gb_s  = 1e-9 * bytes * tok_s->median;
    const double share = gb_s / b->read_gb_s[thread_index];
    if (b->json) {
        json_row(b, "depth", depth, threads, tok_s);
        printf(", \"bytes\": %.0f, \"gb_s\": %.6g, \"roof_share\": %.4g}", bytes, gb_s, share);
    } else {
        char text[32];
        printf("decode at %4d  %3d threads  %10.2f tokens/s (%.2f .. %.2f)  %s a token  "
               "%.2f GB/s  %.1f %% of the roof\n", depth, threads, tok_s->median, tok_s->least,
               tok_s->most, cli_format_bytes(text, bytes), gb_s, 100.0 * share);
    }
    fflush(stdout);
}

static void print_machine(const bench *b)
{
    double best = 0.0;
    for (int i = 0; i < b->threads.n; i++) {
        if (b->read_gb_s[i] > best) best = b->read_gb_s[i];
    }
    if (b->json) {
        printf("{\"model\": ");
        cli_json_string(stdout, b->setup.model, strlen(b->setup.model));
        printf(", \"isa\": \"%s\", \"weights\": %lld, \"active_weights\": %lld, "
               "\"read_gb_s\": %.6g, \"read\": [",
               b->setup.isa ? b->setup.isa : q3n_isa_name(q3n_isa_best()),
               (long long)b->stats.n_weights, (long long)b->stats.n_weights_active, best);
        for (int i = 0; i < b->threads.n; i++) {
            printf("%s{\"threads\": %d, \"gb_s\": %.6g}", i ? ", " : "", b->threads.value[i],
                   b->read_gb_s[i]);
        }
        printf("], ");
        return;
    }
    for (int i = 0; i < b->threads.n; i++) {
        printf("read bandwidth  %3d threads  %.2f GB/s\n", b->threads.value[i], b->read_gb_s[i]);
    }
}

/* ---- All of it ---- */

static void run_prefill(bench *b)
{
    b->n_rows = 0;
    for (int i = 0; i < b->prompts.n; i++) {
        const int n = b->prompts.value[i];
        for (int t = 0; n > 0 && t < b->threads.n; t++) {
            q3n_session *s = open_session(b, t, n);
            spread tok_s;
            measure_prefill(b, s, n, &tok_s);
            print_prefill(b, n, b->threads.value[t], &tok_s);
            q3n_session_destroy(s);
        }
    }
}

static void run_decode(bench *b)
{
    b->n_rows = 0;
    for (int i = 0; i < b->depths.n; i++) {
        const int depth = b->depths.value[i];
        for (int t = 0; b->n_decode > 0 && t < b->threads.n; t++) {
            q3n_session *s = open_session(b, t, decode_capacity(b, depth));
            spread tok_s;
            measure_decode(b, s, depth, &tok_s);
            print_decode(b, depth, t, &tok_s);
            q3n_session_destroy(s);
        }
    }
}

/* Ids without a pattern, so that tokens go to different experts (xorshift64, Marsaglia 2003). */
static void make_ids(bench *b)
{
    size_t n = 64;
    for (int i = 0; i < b->prompts.n; i++) {
        if ((size_t)b->prompts.value[i] > n) n = (size_t)b->prompts.value[i];
    }
    for (int i = 0; i < b->depths.n; i++) {
        const size_t all = (size_t)decode_capacity(b, b->depths.value[i]);
        if (all > n) n = all;
    }
    b->ids = cli_alloc(n, sizeof *b->ids);
    const uint64_t vocab = (uint64_t)q3n_model_config(b->m)->vocab_size;
    uint64_t x = 88172645463325252u;
    for (size_t i = 0; i < n; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        b->ids[i] = (int32_t)((x >> 32) % vocab);
    }
    b->logits = cli_alloc((size_t)vocab, sizeof *b->logits);
}

static void parse_options(bench *b, int argc, char **argv, cli_words *words)
{
    const char *prompts = "512", *threads = NULL, *depths = "0";
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(b->setup),
        { "-p --prompt", "LIST", CLI_TEXT, &prompts, 0, 0, "tokens of the prompts (512); 0: none" },
        { "-n --tokens", "N", CLI_INT, &b->n_decode, 0, 1 << 20, "tokens to decode (64); 0: none" },
        { "-t --threads", "LIST", CLI_TEXT, &threads, 0, 0, "numbers of threads (one a CPU)" },
        { "-d --depth", "LIST", CLI_TEXT, &depths, 0, 0,
          "tokens before the decoded ones (0)" },
        { "-r --repeat", "N", CLI_INT, &b->repeats, 1, MAX_REPEATS, "repetitions (3)" },
        { "--json", NULL, CLI_FLAG, &b->json, 0, 0, "one object" },
        CLI_CONTEXT_OPTIONS(b->setup),
    };
    const cli_syntax syntax = {
        "bench MODEL.q3n [options]",
        "Measures prefill and decode: the median of the repetitions with the least and the most,\n"
        "the bytes that a decoded token reads, and their share of this machine's read bandwidth,\n"
        "which is measured with the same number of threads.",
        options, CLI_COUNT(options), 1, NULL, NULL,
    };
    cli_parse(&syntax, argc, argv, words);
    b->prompts.n = cli_parse_list("-p", prompts, 0, b->prompts.value, MAX_LIST);
    b->depths.n  = cli_parse_list("--depth", depths, 0, b->depths.value, MAX_LIST);
    b->threads   = (list){ { cli_n_cpus() }, 1 };
    if (threads) b->threads.n = cli_parse_list("-t", threads, 1, b->threads.value, MAX_LIST);
    for (int i = 0; i < b->threads.n; i++) {
        if (b->threads.value[i] > 1024) cli_misuse("-t: at most 1024 threads");
    }
    for (int i = 0; i < b->depths.n; i++) {
        if (b->depths.value[i] > (1 << 26)) cli_misuse("--depth: at most %d tokens", 1 << 26);
    }
}

int cmd_bench(int argc, char **argv)
{
    bench b = { .n_decode = 64, .repeats = 3 };
    cli_words words;
    parse_options(&b, argc, argv, &words);
    b.m = cli_open_model(&b.setup, &words);
    if (!q3n_model_config(b.m)->causal) {
        cli_fail("%s attends both ways: it cannot decode, so there is nothing to measure",
                 b.setup.model);
    }
    q3n_model_stats_get(b.m, &b.stats);
    make_ids(&b);
    for (int i = 0; i < b.threads.n; i++) {
        b.read_gb_s[i] = measure_bandwidth(b.threads.value[i]);
    }
    print_machine(&b);
    if (b.json) printf("\"prefill\": [");
    run_prefill(&b);
    if (b.json) printf("], \"decode\": [");
    run_decode(&b);
    if (b.json) printf("]}\n");
    free(b.ids);
    free(b.logits);
    q3n_model_close(b.m);
    return cli_finish();
}
