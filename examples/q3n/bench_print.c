/* What q3n bench found, for people and for programs. */
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

bench_spread bench_spread_of(const bench_samples *samples)
{
    const int n = samples->n;
    double x[BENCH_REPEATS * BENCH_READS];
    if (n == 0) return (bench_spread){ 0.0, 0.0, 0.0 };
    memcpy(x, samples->x, (size_t)n * sizeof *x);
    cli_sort(x, (size_t)n);
    return (bench_spread){ (x[(n - 1) / 2] + x[n / 2]) / 2.0, x[0], x[n - 1] };
}

double bench_median(const bench_samples *samples)
{
    return bench_spread_of(samples).median;
}

/* ---- For both ---- */

static const char *compiler_name(char text[CLI_NAME_ROOM])
{
#if defined(__clang__)
    snprintf(text, CLI_NAME_ROOM, "clang %d.%d.%d", __clang_major__, __clang_minor__,
             __clang_patchlevel__);
#elif defined(__GNUC__)
    snprintf(text, CLI_NAME_ROOM, "gcc %d.%d.%d", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#elif defined(_MSC_VER)
    snprintf(text, CLI_NAME_ROOM, "msvc %d", _MSC_VER);
#else
    snprintf(text, CLI_NAME_ROOM, "unknown");
#endif
    return text;
}

/* ---- For programs ---- */

static void json_text(const char *key, const char *text)
{
    cli_json_member(stdout, key, text);
    printf(", ");
}

double bench_json_samples(const char *key, const bench_samples *samples)
{
    const bench_spread s = bench_spread_of(samples);
    printf("\"%s\": %.6g, \"%s_min\": %.6g, \"%s_max\": %.6g, \"%s_samples\": [", key, s.median,
           key, s.min, key, s.max, key);
    for (int i = 0; i < samples->n; i++) printf("%s%.6g", i ? ", " : "", samples->x[i]);
    printf("]");
    return s.median;
}

static void json_read(const bench *b)
{
    double best = 0.0;
    printf("\"read\": [");
    for (int i = 0; i < b->threads.n; i++) {
        printf("%s{\"threads\": %d, \"loop\": \"%s\", ", i ? ", " : "", b->threads.value[i],
               bench_loop_name(b->memory_reading[i].loop));
        const double gb_s = bench_json_samples("gb_s", &b->read[i]);
        printf("}");
        if (gb_s > best) best = gb_s;
    }
    printf("], \"read_gb_s\": %.6g", best);
}

/* Of the roof, and of what memory alone gives for the bytes that must come from it, in each
 * repetition: a machine that changes its speed does not count. */
static void share_samples(const bench *b, const bench_case *c, bench_samples *roof,
                          bench_samples *memory)
{
    const bench_reading r = bench_token(b, c, b->done);
    const double from_memory = bench_memory_bytes(&r, (double)cli_cache_bytes());
    roof->n = memory->n = 0;
    for (int i = 0; i < c->tok_s.n; i++) {
        const double gb_s = 0.5 * (c->roof.x[2 * i] + c->roof.x[2 * i + 1]);
        bench_add(roof, 1e-9 * (r.hot + r.cold) * c->tok_s.x[i] / gb_s);
        bench_add(memory, 1e-9 * from_memory * c->tok_s.x[i] / b->read[c->thread].x[i]);
    }
}

static void json_case(const bench *b, const bench_case *c)
{
    printf("{\"%s\": %d, \"threads\": %d, ", c->decode ? "depth" : "n", c->value,
           b->threads.value[c->thread]);
    const double tok_s = bench_json_samples("tok_s", &c->tok_s);
    if (!c->decode) {
        printf(", \"gmac_s\": %.6g}", 1e-9 * bench_prompt_macs(b, c->value) / c->value * tok_s);
        return;
    }
    bench_samples roof, memory;
    const bench_reading r = bench_token(b, c, b->done);
    const double bytes = r.hot + r.cold, cache = (double)cli_cache_bytes();
    share_samples(b, c, &roof, &memory);
    printf(", \"bytes\": %.0f, \"gb_s\": %.6g, \"roof_loop\": \"%s\", ", bytes,
           1e-9 * bytes * tok_s, bench_loop_name(c->reading.loop));
    bench_json_samples("roof_gb_s", &c->roof);
    printf(", ");
    bench_json_samples("roof_share", &roof);
    printf(", \"memory_bytes\": ");
    cli_json_real(stdout, cache > 0.0 ? bench_memory_bytes(&r, cache) : NAN);
    printf(", \"memory_share\": ");
    cli_json_real(stdout, cache > 0.0 ? bench_median(&memory) : NAN);
    printf("}");
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

void bench_json_machine(void)
{
    char text[CLI_NAME_ROOM];
    json_text("cpu", cli_cpu_name(text));
    printf("\"cpus\": %d, \"cache_bytes\": ", cli_n_cpus());
    cli_json_real(stdout, cli_cache_bytes() ? (double)cli_cache_bytes() : NAN);
    printf(", ");
    json_text("compiler", compiler_name(text));
}

void bench_json_head(const bench *b)
{
    const char *type = NULL;
    const double bits = bench_bits_per_weight(b, &type);
    printf("{");
    json_text("model", b->setup.model);
    json_text("name", q3n_model_name(b->m));
    json_text("type", type);
    printf("\"file_bytes\": %lld, \"weights\": %lld, \"active_weights\": %lld, "
           "\"bits_per_weight\": %.5g, ", (long long)b->stats.file_bytes,
           (long long)b->stats.n_weights, (long long)b->stats.n_weights_active, bits);
    bench_json_machine();
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

void bench_print_machine(void)
{
    char cpu[CLI_NAME_ROOM], compiler[CLI_NAME_ROOM], size[32];
    printf("%s, %d CPUs, %s of caches, %s", cli_cpu_name(cpu), cli_n_cpus(),
           cli_cache_bytes() ? cli_format_bytes(size, (double)cli_cache_bytes()) : "unknown size",
           compiler_name(compiler));
}

void bench_print_head(const bench *b)
{
    char size[32], total[32], active[32], peak[32];
    const char *type = NULL;
    const double bits = bench_bits_per_weight(b, &type);
    bench_print_machine();
    printf(", %s\n", b->isa);
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
    char text[2][32];
    const bench_spread tok_s = bench_spread_of(&c->tok_s);
    printf("%s %6d  %3d threads  %10.2f tokens/s (%.2f .. %.2f)  ",
           c->decode ? "decode at" : "prefill  ", c->value, b->threads.value[c->thread],
           tok_s.median, tok_s.min, tok_s.max);
    if (!c->decode) {
        printf("%8.1f GMAC/s\n", 1e-9 * bench_prompt_macs(b, c->value) / c->value * tok_s.median);
        return;
    }
    bench_samples roof, memory;
    const bench_reading r = bench_token(b, c, b->done);
    const double bytes = r.hot + r.cold, cache = (double)cli_cache_bytes();
    share_samples(b, c, &roof, &memory);
    printf("%s a token", cli_format_bytes(text[0], bytes));
    if (cache > 0.0) {
        printf(", %s from memory", cli_format_bytes(text[1], bench_memory_bytes(&r, cache)));
    }
    printf("  %.2f GB/s  %.1f %% of the roof\n", 1e-9 * bytes * tok_s.median,
           100.0 * bench_median(&roof));
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
        printf("from memory       %3d threads  %10.2f GB/s     (%.2f .. %.2f)\n",
               b->threads.value[i], gb_s.median, gb_s.min, gb_s.max);
    }
    for (int i = 0; i < b->n_cases; i++) print_case(b, &b->cases[i]);
}
