/* The roof: how fast threads that only read get the bytes of a token.
 *
 * A token reads some bytes that every token reads, which may stay in a cache, and some that depend
 * on the token, its experts.  So do the threads here, in the same amounts: hot bytes from one
 * place, over and over, and cold bytes from random places of a pool as large as all experts.  What
 * a cache then gives, to them or to the model, need not be known.
 */
#include "bench.h"

#include <stdlib.h>

/* ---- Loops that read ---- */

/* Sums of n lines of 64 bytes, n a multiple of UNIT_LINES; what they sum keeps the loads alive. */
enum { LINE = 64, PAGE_LINES = 4096 / LINE, UNIT_LINES = 2 * PAGE_LINES, UNIT = UNIT_LINES * LINE };

typedef uint64_t (*read_fn)(const void *lines, size_t n);

typedef struct read_loop {
    const char *name;
    read_fn     fn;
    q3n_isa     isa;             /* that it needs */
} read_loop;

#if defined(__GNUC__)

/* stream: line after line.  ahead: the same, and the line a page further is prefetched, which the
 * hardware does not do across pages.  pages: two pages side by side, and the same lines of the two
 * pages after them are prefetched.
 *
 * GB/s from memory and of 16 MB in the last-level cache, one thread of a Cascade Lake server by its
 * CPU time: stream 7.7, 7.0; ahead 9.1, 9.0; pages 9.3, 9.4 (AVX2 9.5, 10.1).  Prefetching 8 to 48
 * or 96 and 128 lines ahead was worse than 64; 2, 4 or 8 streams far apart were worse than stream;
 * small pages cost a fifth.  On a Zen 4 server stream is the best: 33.0, with prefetch 29.9, 2, 4
 * or 8 streams 23.5, 28.1, 29.7.  So all are tried, and the fastest is taken. */
#define UNROLL _Pragma("GCC unroll 4")
#define READ_LOOPS(isa, width, attributes)                                                        \
    typedef uint64_t isa##_vector __attribute__((vector_size(width)));                            \
    enum { isa##_PARTS = LINE / (width) };                                                        \
    attributes static uint64_t sum_##isa(const isa##_vector *v)                                   \
    {                                                                                             \
        uint64_t sum = 0;                                                                         \
        for (int k = 0; k < isa##_PARTS; k++) {                                                   \
            for (int i = 0; i < (width) / 8; i++) sum += v[k][i];                                 \
        }                                                                                         \
        return sum;                                                                               \
    }                                                                                             \
    attributes static uint64_t stream_##isa(const void *lines, size_t n)                          \
    {                                                                                             \
        const isa##_vector *p = lines;                                                            \
        isa##_vector v[isa##_PARTS] = { { 0 } };                                                  \
        for (size_t i = 0; i < n; i++, p += isa##_PARTS) {                                        \
            UNROLL for (int k = 0; k < isa##_PARTS; k++) v[k] += p[k];                            \
        }                                                                                         \
        return sum_##isa(v);                                                                      \
    }                                                                                             \
    attributes static uint64_t ahead_##isa(const void *lines, size_t n)                           \
    {                                                                                             \
        const isa##_vector *p = lines;                                                            \
        isa##_vector v[isa##_PARTS] = { { 0 } };                                                  \
        for (size_t i = 0; i < n; i++, p += isa##_PARTS) {                                        \
            __builtin_prefetch(p + PAGE_LINES * isa##_PARTS);                                     \
            UNROLL for (int k = 0; k < isa##_PARTS; k++) v[k] += p[k];                            \
        }                                                                                         \
        return sum_##isa(v);                                                                      \
    }                                                                                             \
    attributes static uint64_t pages_##isa(const void *lines, size_t n)                           \
    {                                                                                             \
        enum { PAGE = PAGE_LINES * isa##_PARTS };                                                 \
        const isa##_vector *p = lines;                                                            \
        isa##_vector v[isa##_PARTS] = { { 0 } };                                                  \
        for (size_t i = 0; i < n; i += UNIT_LINES, p += PAGE) {                                   \
            for (int line = 0; line < PAGE_LINES; line++, p += isa##_PARTS) {                     \
                __builtin_prefetch(p + 2 * PAGE);                                                 \
                __builtin_prefetch(p + 3 * PAGE);                                                 \
                UNROLL for (int k = 0; k < isa##_PARTS; k++) v[k] += p[k] + p[k + PAGE];          \
            }                                                                                     \
        }                                                                                         \
        return sum_##isa(v);                                                                      \
    }

#define LOOP_ROWS(name, id, isa)                                                                  \
    { "stream" name, stream_##id, isa }, { "ahead" name, ahead_##id, isa },                       \
    { "pages" name, pages_##id, isa }

READ_LOOPS(plain, 16, )
#if defined(__x86_64__)
READ_LOOPS(avx2, 32, __attribute__((target("avx2"))))
READ_LOOPS(avx512, 64, __attribute__((target("avx512f"))))
#endif

static const read_loop loops[] = {
    LOOP_ROWS("", plain, Q3N_ISA_SCALAR),
#if defined(__x86_64__)
    LOOP_ROWS("-avx2", avx2, Q3N_ISA_AVX2),
    LOOP_ROWS("-avx512", avx512, Q3N_ISA_AVX512),
#endif
};

#else

static uint64_t stream_plain(const void *lines, size_t n)
{
    const uint64_t *p = lines;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = 0; i < n * (LINE / 8); i += 8) {
        a += p[i + 0] + p[i + 4];
        b += p[i + 1] + p[i + 5];
        c += p[i + 2] + p[i + 6];
        d += p[i + 3] + p[i + 7];
    }
    return a + b + c + d;
}

static const read_loop loops[] = { { "stream", stream_plain, Q3N_ISA_SCALAR } };

#endif

const char *bench_loop_name(int loop)
{
    return loop < CLI_COUNT(loops) ? loops[loop].name : NULL;
}

int bench_loop_possible(int loop)
{
    return loops[loop].isa == Q3N_ISA_SCALAR || q3n_isa_supported(loops[loop].isa);
}

/* ---- The buffer ---- */

/* One half is read over and over, the other is the pool.  Each is several times as large as all
 * caches together, and every thread reads its own slices of both. */
struct bench_buffer {
    char  *data;                 /* [2 half + UNIT]: a prefetch reaches UNIT bytes further */
    size_t half;
};

typedef struct fill_job {
    bench_buffer *buffer;
    int           threads;
} fill_job;

/* Writing a slice first places its pages near the thread. */
static void fill_slice(void *arg, int i)
{
    const fill_job *job = arg;
    const size_t words = 2 * job->buffer->half / 8, n = words / (size_t)job->threads;
    uint64_t *p = (uint64_t *)(void *)job->buffer->data;
    const size_t end = i + 1 == job->threads ? words : (size_t)(i + 1) * n;
    for (size_t k = (size_t)i * n; k < end; k++) p[k] = k;
}

bench_buffer *bench_buffer_create(int max_threads)
{
    const size_t min = (size_t)256 << 20, physical = cli_physical_memory();
    const size_t parts = ((size_t)32 << 20) * (size_t)max_threads;
    size_t half = 4 * cli_cache_bytes();
    if (half < parts) half = parts;
    if (half < min) half = min;
    if (physical && half > physical / 8) half = physical / 8;
    bench_buffer *buffer = cli_alloc(1, sizeof *buffer);
    buffer->half = half / UNIT * UNIT;
    buffer->data = cli_alloc_pages(2 * buffer->half + UNIT);
    fill_job job = { buffer, max_threads };
    cli_run_threads(max_threads, fill_slice, &job);
    return buffer;
}

void bench_buffer_destroy(bench_buffer *buffer)
{
    if (!buffer) return;
    cli_free_pages(buffer->data);
    free(buffer);
}

size_t bench_buffer_half(const bench_buffer *buffer)
{
    return buffer->half;
}

/* ---- Threads that read ---- */

typedef struct read_job {
    const bench_buffer *buffer;
    const bench_reading *what;
    read_fn read;
    double  start, seconds;      /* counted from when all threads should run, for so long */
    double  gb_s[BENCH_THREADS];
    uint64_t sums[BENCH_THREADS];        /* so that no pass can be left out */
} read_job;

/* Bytes of a region, read from at on; in runs that begin at a random place if run is not n. */
typedef struct read_cursor {
    const char *base;
    size_t      n, run;          /* multiples of UNIT; 0 = nothing is read */
    size_t      at, end;
    uint64_t    random;
} read_cursor;

static size_t whole_units(double bytes, size_t max)
{
    const size_t n = bytes < (double)max ? (size_t)bytes : max;
    return n < UNIT ? (n ? UNIT : 0) : n / UNIT * UNIT;
}

/* The slice of thread i of a region of `bytes`, runs of `run` bytes, all threads together. */
static read_cursor cursor_of(const read_job *job, int i, size_t offset, double bytes, double run)
{
    const size_t max = job->buffer->half / (size_t)job->what->threads;
    const double share = 1.0 / job->what->threads;
    read_cursor c = { .n = whole_units(bytes * share, max) };
    c.random = 88172645463325252u + (uint64_t)i;
    c.run  = whole_units(run * share, c.n);
    c.base = job->buffer->data + offset + (size_t)i * (max / UNIT * UNIT);
    c.end  = c.run;
    return c;
}

/* Another run (xorshift64, Marsaglia 2003). */
static void next_run(read_cursor *c)
{
    c->random ^= c->random << 13;
    c->random ^= c->random >> 7;
    c->random ^= c->random << 17;
    c->at  = (size_t)(c->random >> 11) % ((c->n - c->run) / UNIT + 1) * UNIT;
    c->end = c->at + c->run;
}

/* Reads `bytes`, a multiple of UNIT. */
static uint64_t read_on(read_cursor *c, size_t bytes, read_fn read)
{
    uint64_t sum = 0;
    while (bytes) {
        if (c->at == c->end) next_run(c);
        const size_t n = bytes < c->end - c->at ? bytes : c->end - c->at;
        sum += read(c->base + c->at, n / LINE);
        c->at += n;
        bytes -= n;
    }
    return sum;
}

/* In turn some hot and some cold bytes, in their proportion, as layers do. */
static void read_thread(void *arg, int i)
{
    enum { STEP = 256 << 10 };
    read_job *job = arg;
    const bench_reading *what = job->what;
    read_cursor hot  = cursor_of(job, i, 0, what->hot, what->hot);
    read_cursor cold = cursor_of(job, i, job->buffer->half, what->pool, what->cold);
    const double all = what->hot + what->cold;
    size_t hot_step  = whole_units(STEP * what->hot / all, SIZE_MAX / 2);
    size_t cold_step = whole_units(STEP * what->cold / all, SIZE_MAX / 2);
    uint64_t sum = 0;
    double start = 0.0, now = 0.0, bytes = 0.0, warm = 0.0;
    do {
        sum += read_on(&hot, hot_step, job->read) + read_on(&cold, cold_step, job->read);
        now  = cli_clock();
        if (start > 0.0) {
            bytes += (double)(hot_step + cold_step);
        } else {
            warm += (double)hot_step;
            if (now >= job->start && warm >= (double)hot.n) start = now;
        }
    } while (start == 0.0 || now < start + job->seconds);
    job->sums[i] = sum;
    job->gb_s[i] = 1e-9 * bytes / (now - start);
}

static double measure(const bench_buffer *buffer, const bench_reading *what, int loop,
                      double seconds)
{
    read_job *job = cli_alloc(1, sizeof *job);
    *job = (read_job){ .buffer = buffer, .what = what, .read = loops[loop].fn,
                       .start = cli_clock() + 0.25 * seconds, .seconds = seconds };
    cli_run_threads(what->threads, read_thread, job);
    double gb_s = 0.0;
    for (int i = 0; i < what->threads; i++) gb_s += job->gb_s[i];
    free(job);
    return gb_s;
}

double bench_read(const bench_buffer *buffer, const bench_reading *what, double seconds)
{
    return measure(buffer, what, what->loop, seconds);
}

void bench_choose_loop(const bench_buffer *buffer, bench_reading *what)
{
    double best = 0.0;
    for (int attempt = 0; attempt < 3; attempt++) {
        for (int loop = 0; loop < CLI_COUNT(loops); loop++) {
            if (!bench_loop_possible(loop)) continue;
            const double gb_s = measure(buffer, what, loop, 0.008);
            if (gb_s <= best) continue;
            best = gb_s;
            what->loop = loop;
        }
    }
}
