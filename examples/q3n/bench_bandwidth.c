/* q3n bench --read: what this machine reads, by loop and by how much is read over and over. */
#include "bench.h"

#include <stdlib.h>

enum { MAX_LOOPS = 16, MEMORY = 0 };

/* Megabytes read over and over; MEMORY = half of a buffer that no cache holds. */
static const int sizes[] = { 1, 4, 16, 64, 128, 256, 512, MEMORY };

typedef struct bandwidth_run {
    bench         *b;
    bench_samples *gb_s;         /* [threads, sizes, MAX_LOOPS] */
} bandwidth_run;

static bench_samples *samples_of(const bandwidth_run *r, int thread, int size, int loop)
{
    return &r->gb_s[(thread * CLI_COUNT(sizes) + size) * MAX_LOOPS + loop];
}

static void measure_round(void *user, int record)
{
    bandwidth_run *r = user;
    const bench *b = r->b;
    if (!record) return;                 /* every measurement warms up by itself */
    for (int t = 0; t < b->threads.n; t++) {
        for (int s = 0; s < CLI_COUNT(sizes); s++) {
            bench_reading what = { .threads = b->threads.value[t], .hot = 1e6 * sizes[s] };
            if (sizes[s] == MEMORY) what.cold = what.pool = (double)bench_buffer_half(b->buffer);
            for (what.loop = 0; bench_loop_name(what.loop); what.loop++) {
                if (!bench_loop_possible(what.loop)) continue;
                bench_add(samples_of(r, t, s, what.loop),
                          bench_read(b->buffer, &what, BENCH_READ_SECONDS));
            }
        }
    }
}

/* ---- Output ---- */

static void print_json(const bandwidth_run *r)
{
    const bench *b = r->b;
    int n = 0;
    printf("{");
    bench_json_machine();
    printf("\"repeats\": %d, \"bandwidth\": [", b->done);
    for (int t = 0; t < b->threads.n; t++) {
        for (int s = 0; s < CLI_COUNT(sizes); s++) {
            for (int loop = 0; bench_loop_name(loop); loop++) {
                const bench_samples *samples = samples_of(r, t, s, loop);
                if (samples->n == 0) continue;
                printf("%s{\"threads\": %d, \"bytes\": %.0f, \"memory\": %s, \"loop\": \"%s\", ",
                       n++ ? ", " : "", b->threads.value[t],
                       sizes[s] == MEMORY ? (double)bench_buffer_half(b->buffer) : 1e6 * sizes[s],
                       sizes[s] == MEMORY ? "true" : "false", bench_loop_name(loop));
                bench_json_samples("gb_s", samples);
                printf("}");
            }
        }
    }
    printf("]}\n");
}

static void print_text(const bandwidth_run *r)
{
    const bench *b = r->b;
    bench_print_machine();
    printf("\n");
    for (int t = 0; t < b->threads.n; t++) {
        printf("%4d threads, GB/s", b->threads.value[t]);
        for (int loop = 0; bench_loop_name(loop); loop++) {
            if (bench_loop_possible(loop)) printf(" %13s", bench_loop_name(loop));
        }
        for (int s = 0; s < CLI_COUNT(sizes); s++) {
            if (sizes[s] == MEMORY) printf("\n%18s", "memory");
            else                    printf("\n%15d MB", sizes[s]);
            for (int loop = 0; bench_loop_name(loop); loop++) {
                const bench_samples *samples = samples_of(r, t, s, loop);
                if (samples->n) printf(" %13.2f", bench_median(samples));
            }
        }
        printf("\n");
    }
}

void bench_bandwidth(bench *b)
{
    bandwidth_run r = { .b = b };
    const size_t rows = (size_t)b->threads.n * CLI_COUNT(sizes);
    r.gb_s = cli_alloc(rows * MAX_LOOPS, sizeof *r.gb_s);
    b->buffer = bench_buffer_create(bench_largest(&b->threads));
    bench_repeat(b, measure_round, &r);
    if (b->json) print_json(&r);
    else         print_text(&r);
    bench_buffer_destroy(b->buffer);
    free(r.gb_s);
}
