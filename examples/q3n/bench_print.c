/* What q3n bench found, for people and for programs. */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

static int compare_reals(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

bench_spread bench_spread_of(const bench_samples *samples)
{
    const int n = samples->n;
    double x[BENCH_REPEATS * BENCH_READS];
    if (n == 0) return (bench_spread){ 0.0, 0.0, 0.0 };
    memcpy(x, samples->x, (size_t)n * sizeof *x);
    qsort(x, (size_t)n, sizeof *x, compare_reals);
    return (bench_spread){ (x[(n - 1) / 2] + x[n / 2]) / 2.0, x[0], x[n - 1] };
}

double bench_median(const bench_samples *samples)
{
    return bench_spread_of(samples).median;
}

/* ---- Sizes ---- */

/* Bytes of DeltaNet's matrices and convolution columns, which every token reads. */
static double state_bytes(const q3n_config *c)
{
    const int keys = c->linear_num_key_heads * c->linear_key_head_dim;
    const int values = c->linear_num_value_heads * c->linear_value_head_dim;
    int layers = 0;
    for (int l = 0; l < c->num_hidden_layers; l++) layers += c->layer_types[l] != 0;
    return 4.0 * layers * ((double)values * c->linear_key_head_dim
                           + (double)(2 * keys + values) * (c->linear_conv_kernel_dim - 1));
}

/* Bytes that one decoded token reads, in the middle of the measured ones. */
static double bytes_per_token(const bench *b, const bench_case *c)
{
    const int page_tokens = 256;
    const q3n_session_options o = bench_options(b, c->thread, 1);
    q3n_session_memory memory = { 0 };
    q3n_session_bytes(b->m, &o, &memory);
    const double half = 0.5 * b->n_decode;
    /* Behind a depth, one run to warm up comes before those that count. */
    const double length = c->value ? c->value + half * (b->done + 2) : half;
    return (double)b->stats.decode_bytes + state_bytes(q3n_model_config(b->m))
         + (double)memory.page * length / page_tokens;
}

/* Share of the read bandwidth that decoding reaches: in each repetition of what was measured just
 * before and behind it, so that a machine that changes its speed does not count. */
static double roof_share(const bench *b, const bench_case *c, double bytes)
{
    bench_samples shares = { .n = c->tok_s.n };
    for (int i = 0; i < shares.n; i++) {
        const double *gb_s = &b->read[c->thread].x[(i + 1) * BENCH_READS - 2];
        shares.x[i] = 1e-9 * bytes * c->tok_s.x[i] / (0.5 * (gb_s[0] + gb_s[1]));
    }
    return bench_spread_of(&shares).median;
}

/* Multiply-adds with weights for a prompt of n tokens: only the last one needs the head. */
static double prompt_macs(const bench *b, int n)
{
    q3n_tensor head = { 0 };
    const char *name = q3n_model_config(b->m)->tie_word_embeddings ? "embed_tokens.weight"
                                                                   : "lm_head.weight";
    (void)q3n_model_find_tensor(b->m, name, &head);
    const double head_macs = head.name ? (double)head.dim[0] * (double)head.dim[1] : 0.0;
    return ((double)b->stats.n_weights_active - head_macs) * n + head_macs;
}

/* Bits of storage for a weight, and the type that most weights have. */
static double bits_per_weight(const bench *b, const char **type)
{
    double bytes = 0.0, weights = 0.0, by_type[Q3N_TYPE_COUNT] = { 0.0 };
    int most = 0;
    for (int i = 0; i < q3n_model_n_tensors(b->m); i++) {
        q3n_tensor t;
        if (q3n_model_tensor(b->m, i, &t) != Q3N_OK) continue;
        const double n = (double)t.dim[0] * (double)t.dim[1] * (double)t.dim[2];
        bytes   += (double)t.bytes;
        weights += n;
        by_type[t.type] += n;
    }
    for (int i = 1; i < Q3N_TYPE_COUNT; i++) {
        if (by_type[i] > by_type[most]) most = i;
    }
    *type = q3n_type_name((q3n_type)most);
    return weights > 0.0 ? 8.0 * bytes / weights : 0.0;
}

static const char *compiler_name(char text[64])
{
#if defined(__clang__)
    snprintf(text, 64, "clang %d.%d.%d", __clang_major__, __clang_minor__, __clang_patchlevel__);
#elif defined(__GNUC__)
    snprintf(text, 64, "gcc %d.%d.%d", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#elif defined(_MSC_VER)
    snprintf(text, 64, "msvc %d", _MSC_VER);
#else
    snprintf(text, 64, "unknown");
#endif
    return text;
}

/* ---- For programs ---- */

static void json_text(const char *key, const char *text)
{
    printf("\"%s\": ", key);
    cli_json_string(stdout, text, strlen(text));
    printf(", ");
}

double bench_json_samples(const char *key, const bench_samples *samples)
{
    const bench_spread s = bench_spread_of(samples);
    printf("\"%s\": %.6g, \"%s_min\": %.6g, \"%s_max\": %.6g, \"%s_samples\": [", key, s.median,
           key, s.least, key, s.most, key);
    for (int i = 0; i < samples->n; i++) printf("%s%.6g", i ? ", " : "", samples->x[i]);
    printf("]");
    return s.median;
}

static void json_read(const bench *b)
{
    double best = 0.0;
    printf("\"read\": [");
    for (int i = 0; i < b->threads.n; i++) {
        printf("%s{\"threads\": %d, ", i ? ", " : "", b->threads.value[i]);
        const double gb_s = bench_json_samples("gb_s", &b->read[i]);
        printf("}");
        if (gb_s > best) best = gb_s;
    }
    printf("], \"read_gb_s\": %.6g", best);
}

static void json_case(const bench *b, const bench_case *c)
{
    printf("{\"%s\": %d, \"threads\": %d, ", c->decode ? "depth" : "n", c->value,
           b->threads.value[c->thread]);
    const double tok_s = bench_json_samples("tok_s", &c->tok_s);
    if (!c->decode) {
        printf(", \"gmac_s\": %.6g}", 1e-9 * prompt_macs(b, c->value) / c->value * tok_s);
        return;
    }
    const double bytes = bytes_per_token(b, c);
    printf(", \"bytes\": %.0f, \"gb_s\": %.6g, \"roof_share\": %.5g}", bytes,
           1e-9 * bytes * tok_s, roof_share(b, c, bytes));
}

static void json_cases(const bench *b, int decode)
{
    int n = 0;
    printf(", \"%s\": [", decode ? "decode" : "prefill");
    for (int i = 0; i < b->n_cases; i++) {
        if (b->cases[i].decode != decode) continue;
        printf("%s", n++ ? ", " : "");
        json_case(b, &b->cases[i]);
    }
    printf("]");
}

void bench_json_head(const bench *b)
{
    char text[CLI_NAME_ROOM];
    const char *type = NULL;
    const double bits = bits_per_weight(b, &type);
    printf("{");
    json_text("model", b->setup.model);
    json_text("name", q3n_model_name(b->m));
    json_text("type", type);
    printf("\"file_bytes\": %lld, \"weights\": %lld, \"active_weights\": %lld, "
           "\"bits_per_weight\": %.5g, ", (long long)b->stats.file_bytes,
           (long long)b->stats.n_weights, (long long)b->stats.n_weights_active, bits);
    json_text("cpu", cli_cpu_name(text));
    printf("\"cpus\": %d, ", cli_n_cpus());
    json_text("compiler", compiler_name(text));
    json_text("isa", b->isa);
    json_text("kv", b->setup.kv ? b->setup.kv : "f32");
    printf("\"open_s\": %.6g, \"first_token_s\": %.6g, \"peak_rss_bytes\": %zu, \"repeats\": %d, "
           "\"tokens\": %d, ", b->open_s, b->first_token_s, b->peak_bytes, b->done, b->n_decode);
}

static void print_json(const bench *b)
{
    bench_json_head(b);
    json_read(b);
    json_cases(b, 0);
    json_cases(b, 1);
    printf("}\n");
}

/* ---- For people ---- */

void bench_print_head(const bench *b)
{
    char cpu[CLI_NAME_ROOM], compiler[64], size[32], total[32], active[32], peak[32];
    const char *type = NULL;
    const double bits = bits_per_weight(b, &type);
    printf("%s, %d CPUs, %s, %s\n", cli_cpu_name(cpu), cli_n_cpus(), b->isa,
           compiler_name(compiler));
    printf("%s  %s, %s, %.2f bits a weight, %s weights, %s used per token\n", b->setup.model, type,
           cli_format_bytes(size, (double)b->stats.file_bytes), bits,
           cli_format_count(total, (double)b->stats.n_weights),
           cli_format_count(active, (double)b->stats.n_weights_active));
    printf("opened in %.1f ms, first token after %.1f ms, at most %s resident; medians of %d\n",
           1e3 * b->open_s, 1e3 * b->first_token_s, cli_format_bytes(peak, (double)b->peak_bytes),
           b->done);
}

static void print_case(const bench *b, const bench_case *c)
{
    char text[32];
    const bench_spread tok_s = bench_spread_of(&c->tok_s);
    printf("%s %6d  %3d threads  %10.2f tokens/s (%.2f .. %.2f)  ",
           c->decode ? "decode at" : "prefill  ", c->value, b->threads.value[c->thread],
           tok_s.median, tok_s.least, tok_s.most);
    if (!c->decode) {
        printf("%8.1f GMAC/s\n", 1e-9 * prompt_macs(b, c->value) / c->value * tok_s.median);
        return;
    }
    const double bytes = bytes_per_token(b, c);
    printf("%s a token  %.2f GB/s  %.1f %% of the roof\n", cli_format_bytes(text, bytes),
           1e-9 * bytes * tok_s.median, 100.0 * roof_share(b, c, bytes));
}

void bench_print(const bench *b)
{
    if (b->json) {
        print_json(b);
        return;
    }
    bench_print_head(b);
    for (int i = 0; i < b->threads.n; i++) {
        const bench_spread gb_s = bench_spread_of(&b->read[i]);
        printf("reading           %3d threads  %10.2f GB/s     (%.2f .. %.2f)\n",
               b->threads.value[i], gb_s.median, gb_s.least, gb_s.most);
    }
    for (int i = 0; i < b->n_cases; i++) print_case(b, &b->cases[i]);
}
