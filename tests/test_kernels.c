/* test_kernels.c - every instruction set x type x kernel against the definition in double
 * precision, and the promise that no output depends on how the work is cut: bit for bit. */
#define _GNU_SOURCE      /* MAP_ANONYMOUS under -std=c11 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cmocka.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "isas.h"

/* ---- Memory: a page that nobody may read after each input, guard bytes around outputs ---- */
#define GUARD      64
#define MAX_BLOCKS 96
#define SLOT       (1 << 20)     /* bytes of the largest input */

static struct { uint8_t *base; size_t bytes; } blocks[MAX_BLOCKS];   /* base NULL: an input */
static int      n_blocks;
static uint8_t *slots;           /* [MAX_BLOCKS] of SLOT bytes and a page */
static size_t   page;

static void map_slots(void)
{
    page = (size_t)sysconf(_SC_PAGESIZE);
    slots = (uint8_t *)mmap(NULL, MAX_BLOCKS * (SLOT + page), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(slots != MAP_FAILED);
    for (size_t i = 0; i < MAX_BLOCKS; i++)
        assert_int_equal(mprotect(slots + i * (SLOT + page) + SLOT, page, PROT_NONE), 0);
}

static int random_int(int n);

/* Ends at the forbidden page or one element before it: aligned for no vector, or by chance. */
static void *take_in(size_t bytes, size_t element)
{
    if (!slots) map_slots();
    assert_true(n_blocks < MAX_BLOCKS && bytes + element <= SLOT);
    uint8_t *end = slots + (size_t)n_blocks * (SLOT + page) + SLOT;
    blocks[n_blocks++].base = NULL;
    return end - bytes - (random_int(2) ? element : 0);
}

static float *new_in(size_t n) { return (float *)take_in(n * 4, 4); }

static float *new_out(size_t n)
{
    const size_t bytes = n * 4;
    assert_true(n_blocks < MAX_BLOCKS);
    uint8_t *p = (uint8_t *)malloc(GUARD + 4 + bytes + GUARD);
    assert_non_null(p);
    memset(p, 0xA5, GUARD + 4 + bytes + GUARD);
    blocks[n_blocks].base = p;
    blocks[n_blocks++].bytes = bytes;
    return (float *)(void *)(p + GUARD + 4);
}

/* Check and free all blocks but the first `keep`. */
static void release_to(int keep)
{
    for (int i = keep; i < n_blocks; i++) {
        const uint8_t *p = blocks[i].base;
        for (size_t j = 0; p && j < GUARD; j++) {
            if (p[j] != 0xA5) fail_msg("wrote %d bytes before an output", (int)(GUARD - j));
            if (p[GUARD + 4 + blocks[i].bytes + j] != 0xA5)
                fail_msg("wrote %d bytes behind", (int)j + 1);
        }
        free(blocks[i].base);
    }
    n_blocks = keep;
}

static void release(void) { release_to(0); }

/* ---- Numbers ---- */
enum { PLAIN, TINY, HUGE_RANGE, N_KINDS };

static uint32_t random_state = 1;

static uint32_t random_u32(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

static int random_int(int n) { return (int)(random_u32() % (uint32_t)n); }

static float random_float(void)   /* about normal, variance 1 */
{
    double s = 0.0;
    for (int i = 0; i < 3; i++) s += (double)random_u32() / 2147483648.0 - 1.0;
    return (float)s;
}

/* TINY: zeros of both signs and denormals between; HUGE_RANGE: 30 orders of magnitude. */
static float random_of(int kind)
{
    const float x = random_float();
    const int pick = random_int(6);
    if (kind == TINY) return pick == 0 ? 0.0f : pick == 1 ? -0.0f : pick < 4 ? x * 1e-39f : x;
    if (kind == HUGE_RANGE) return x * powf(10.0f, (float)(random_int(31) - 15));
    return x;
}

static void fill(float *x, size_t n, int kind)
{
    for (size_t i = 0; i < n; i++) x[i] = random_of(kind);
}

/* Store x in a tensor type; x becomes what was stored. */
static void *encode(q3n_type type, float *x, size_t n)
{
    if (type == Q3N_TYPE_F32) {
        float *p = new_in(n);
        memcpy(p, x, n * 4);
        return p;
    }
    uint16_t *p = (uint16_t *)take_in(n * 2, 2);
    for (size_t i = 0; i < n; i++) {
        if (type == Q3N_TYPE_F16) {
            p[i] = q3n__f32_to_f16(fmaxf(fminf(x[i], 65504.0f), -65504.0f));
            x[i] = q3n__f16_to_f32(p[i]);
        } else {
            p[i] = q3n__f32_to_bf16(x[i]);
            x[i] = q3n__bf16_to_f32(p[i]);
        }
    }
    return p;
}

#define U    (FLT_EPSILON / 2.0)   /* one rounding, relative */
#define TINY_STEP 0x1p-149         /* one rounding of a denormal, absolute; two of them */

static void check(double got, double want, double bound, const char *what)
{
    if (!(fabs(got - want) <= bound))
        fail_msg("%s: %.9g, expected %.9g, error %.3g, bound %.3g", what, got, want,
                 fabs(got - want), bound);
}

static void check_same(const void *a, const void *b, size_t bytes, const char *what)
{
    if (memcmp(a, b, bytes) != 0) fail_msg("%s: not the same bits", what);
}

/* ---- The kernels under test: each instruction set of this machine ---- */
static q3n_isa      isa;
static q3n__kernels kernels;

static int lanes(void)
{
    return isa == Q3N_ISA_AVX512 || isa == Q3N_ISA_AVX512VNNI ? 16
         : isa == Q3N_ISA_AVX2 ? 8 : isa == Q3N_ISA_NEON ? 4 : 1;
}

/* Roundings of a sum of n products whose accumulator is a vector: its steps and its last sum. */
static double sum_error(int n) { return (n / lanes() + 8) * U; }

#define FOR_EACH_ISA(test) run_on_each_isa(__func__, test)

/* Each has a table of its own: no two are the same kernels by another name. */
static void test_tables(void **state)
{
    (void)state;
    q3n__kernels table[N_ISAS];
    for (int i = 0; i < N_ISAS; i++) {
        if (!isa_runs(isa_at(i), __func__)) continue;
        q3n__kernels_init(&table[i], isa_at(i));
        for (int j = 0; j < i; j++)
            if (q3n_isa_supported(isa_at(j)))
                assert_memory_not_equal(&table[i], &table[j], sizeof table[i]);
    }
}

static void run_on_each_isa(const char *name, void (*test)(void))
{
    for (isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {
        if (!isa_runs(isa, name)) continue;
        q3n__kernels_init(&kernels, isa);
        random_state = 12345;
        test();
    }
}

/* ---- Sampling: the same bits as scalar ---- */
#define SAMPLED 37               /* blocks */

static float any_logit(uint32_t kind)
{
    static const float odd[] = { NAN, -NAN, INFINITY, -INFINITY, 0.0f, -0.0f, FLT_MAX, -FLT_MAX,
                                 FLT_MIN, 1e-45f, 1e38f, -1e38f };
    if (random_u32() % 8 < kind) return odd[random_u32() % (sizeof odd / sizeof *odd)];
    if (kind == 3) return q3n__bits_f32(random_u32());     /* signalling NaN too */
    return (float)(random_u32() % 100000) * 1e-3f - 50.0f;
}

static void same_bits(const void *got, const void *want, size_t n, const char *what)
{
    if (memcmp(got, want, n * 4) != 0) fail_msg("%s: other bits than scalar", what);
}

static void sampling_values(void)
{
    static float x[SAMPLED * 64], y[SAMPLED * 64], want[SAMPLED * 64];
    static float got_f[SAMPLED], want_f[SAMPLED];
    static int32_t got_n[SAMPLED], want_n[SAMPLED];
    for (uint32_t round = 0; round < 400; round++) {
        const int n = (int)(random_u32() % (SAMPLED + 1));
        for (int i = 0; i < n * 64; i++) x[i] = any_logit(round % 4);
        for (int i = 0; round % 16 == 5 && i < n * 64; i++) x[i] = i % 3 ? NAN : -INFINITY;
        kernels.block_max(got_f, x, n);
        q3n__block_max_scalar(want_f, x, n);
        same_bits(got_f, want_f, (size_t)n, "block_max");
        for (int b = 0; b < n; b++) {
            float m = -INFINITY;
            for (int i = 0; i < 64; i++) m = x[64 * b + i] > m ? x[64 * b + i] : m;
            assert_true(want_f[b] == (m > FLT_MAX ? FLT_MAX : m));
        }
        const float max = round % 5 ? 50.0f : FLT_MAX, scale = round % 3 ? 1.5f : 1e-30f;
        kernels.block_weights(y, got_f, x, n, max, scale);
        q3n__block_weights_scalar(want, want_f, x, n, max, scale);
        same_bits(y, want, (size_t)n * 64, "block_weights");
        same_bits(got_f, want_f, (size_t)n, "sums of block_weights");
        const float floor = n ? want[random_u32() % (uint32_t)(n * 64)] : 0.0f;
        kernels.block_sums(got_f, got_n, want, n, floor);
        q3n__block_sums_scalar(want_f, want_n, want, n, floor);
        same_bits(got_f, want_f, (size_t)n, "block_sums");
        same_bits(got_n, want_n, (size_t)n, "counts");
        memcpy(y, x, sizeof y);
        kernels.block_weights(y, got_f, y, n, max, scale);
        same_bits(y, want, (size_t)n * 64, "block_weights in place");
    }
}

/* Every 61st exponent: 2^t within 2.5 units in the last place, 0 where it does not count. */
static void weight_values(void)
{
    static float x[64], y[64];
    float sum;
    double worst = 0.0;
    for (uint32_t bits = 0x80000000u; bits < 0xFF800000u; bits += 61 * 64) {
        for (uint32_t i = 0; i < 64; i++) x[i] = q3n__bits_f32(bits + 61 * i);
        kernels.block_weights(y, &sum, x, 1, 0.0f, 1.0f);
        for (int i = 0; i < 64; i++) {
            if (!(x[i] >= -124.0f)) {
                assert_true(y[i] == 0.0f);
                continue;
            }
            const double want = exp2((double)x[i]);
            const double unit = ldexp(1.0, ilogb(want) - 23);
            const double error = fabs((double)y[i] - want) / unit;
            if (error > worst) worst = error;
        }
    }
    if (worst > 2.5) fail_msg("%g units in the last place", worst);
}

static void test_sampling(void **state)
{
    (void)state;
    FOR_EACH_ISA(sampling_values);
    FOR_EACH_ISA(weight_values);
}

static const q3n_type float_types[] = { Q3N_TYPE_F32, Q3N_TYPE_F16, Q3N_TYPE_BF16 };
#define N_FLOAT_TYPES 3

/* Lengths 0 .. 2 N + 1 of the widest vector, then round ones and their neighbours. */
static const int more_lengths[] = { 47, 48, 49, 63, 64, 65, 96, 127, 128, 129, 191, 192, 256, 300 };
#define N_LENGTHS (34 + 14)
static int length(int i) { return i < 34 ? i : more_lengths[i - 34]; }

/* ---- matmul ---- */
typedef struct {
    q3n__matmul m;
    q3n_type    type;
    float      *w;               /* decoded */
    int         n_rows;
} product;

static product new_product(q3n_type type, int n, int n_rows, int n_cols, int kind)
{
    product p;
    memset(&p, 0, sizeof p);
    p.type = type;
    p.n_rows = n_rows;
    p.w = new_in((size_t)(n_rows * n_cols));
    fill(p.w, (size_t)(n_rows * n_cols), kind);
    p.m.w = encode(type, p.w, (size_t)(n_rows * n_cols));
    p.m.n = n;
    p.m.n_cols = n_cols;
    p.m.row1 = n_rows;
    p.m.x_stride = n_cols + random_int(3);
    p.m.y_stride = n_rows + random_int(3);
    float *x = new_in((size_t)((n - 1) * p.m.x_stride + n_cols));
    fill(x, (size_t)((n - 1) * p.m.x_stride + n_cols), kind);
    p.m.x = x;
    if (random_int(2)) {
        int *rows = (int *)(void *)new_in((size_t)n);
        for (int t = 0; t < n; t++) rows[t] = random_int(n);
        p.m.x_rows = rows;
    }
    if (random_int(2)) {
        float *bias = new_in((size_t)n_rows);
        fill(bias, (size_t)n_rows, kind);
        p.m.bias = bias;
    }
    p.m.y = new_out((size_t)(n * p.m.y_stride));
    return p;
}

static void check_product(const product *p)
{
    const q3n__matmul *m = &p->m;
    for (int t = 0; t < m->n; t++)
        for (int r = 0; r < m->y_stride; r++) {
            const float *y = m->y + t * m->y_stride + r;
            if (r < m->row0 || r >= m->row1) {
                assert_int_equal(q3n__f32_bits(*y), 0xA5A5A5A5u);
                continue;
            }
            const float *x = m->x + (m->x_rows ? m->x_rows[t] : t) * m->x_stride;
            double s = m->bias ? m->bias[r] : 0.0, sum = fabs(s);
            for (int j = 0; j < m->n_cols; j++) {
                const double term = (double)p->w[r * m->n_cols + j] * x[j];
                s += term;
                sum += fabs(term);
            }
            check(*y, s, sum_error(m->n_cols) * sum + m->n_cols * TINY_STEP, "matmul");
        }
}

static void matmul_values(void)
{
    static const int shapes[][2] = {/* tokens, rows */
                                    {1, 1}, {1, 7}, {1, 17}, {2, 3}, {3, 4},
                                    {4, 5}, {5, 8}, {6, 9},  {13, 6}};
    for (int type = 0; type < N_FLOAT_TYPES; type++)
        for (int i = 0; i < N_LENGTHS; i++)
            for (int s = 0; s < 9; s++) {
                product p = new_product(float_types[type], shapes[s][0], shapes[s][1], length(i),
                                        (i + s) % N_KINDS);
                p.m.row0 = random_int(p.n_rows);
                p.m.row1 = p.m.row0 + 1 + random_int(p.n_rows - p.m.row0);
                kernels.matmul[p.type](&p.m);
                check_product(&p);
                release();
            }
}

static void test_matmul(void **state) { (void)state; FOR_EACH_ISA(matmul_values); }

/* One call for everything, one call for each element, and random rectangles between. */
static void matmul_cuts(void)
{
    static const int cols[] = { 1, 13, 16, 31, 64, 100, 515 };
    for (int type = 0; type < N_FLOAT_TYPES; type++)
        for (int i = 0; i < 7; i++) {
            const int n = 61, n_rows = 21;
            product p = new_product(float_types[type], n, n_rows, cols[i], PLAIN);
            const int keep = n_blocks;
            kernels.matmul[p.type](&p.m);
            for (int k = 0; k < 300; k++) {
                q3n__matmul part = p.m;
                const int t = random_int(n);
                part.row0 = random_int(n_rows);
                part.n    = k % 3 == 0 ? 1 : 1 + random_int(n - t);
                part.row1 =
                    k % 3 == 1 ? part.row0 + 1 : part.row0 + 1 + random_int(n_rows - part.row0);
                part.y_stride = n_rows;
                part.y = new_out((size_t)(part.n * n_rows));
                int *rows = (int *)(void *)new_in((size_t)part.n);
                for (int u = 0; u < part.n; u++) rows[u] = p.m.x_rows ? p.m.x_rows[t + u] : t + u;
                part.x_rows = rows;
                kernels.matmul[p.type](&part);
                for (int u = 0; u < part.n; u++)
                    check_same(part.y + u * n_rows + part.row0,
                               p.m.y + (t + u) * p.m.y_stride + part.row0,
                               (size_t)(part.row1 - part.row0) * 4, "matmul in pieces");
                release_to(keep);
            }
            release();
        }
}

static void test_matmul_cuts(void **state) { (void)state; FOR_EACH_ISA(matmul_cuts); }

/* ---- Quantised matrices ---- */
static const q3n_type quant_types[] = { Q3N_TYPE_Q8, Q3N_TYPE_Q6, Q3N_TYPE_Q4, Q3N_TYPE_Q3 };
#define N_QUANT_TYPES 4

typedef struct {
    q3n_type    type;
    int         rows;
    q3n__matmul m;
} quantised;

/* Any codes, scales of both signs and many sizes; activations of n + 3 tokens, chosen by x_rows. */
static quantised new_quantised(q3n_type type, int n, int rows, int cols)
{
    static int x_rows[64];
    const size_t row_bytes = q3n__row_bytes(type, cols);
    const size_t bytes = (size_t)q3n__stored_rows(type, rows) * row_bytes;
    const size_t block = (size_t)q3n__types[type].block_bytes * Q3N__TILE_ROWS;
    const int n_x8 = q3n__x8_blocks(cols);
    uint8_t *w = (uint8_t *)take_in(bytes, 64);
    for (size_t i = 0; i < bytes; i++) w[i] = (uint8_t)random_u32();
    for (size_t b = 0; b < bytes; b += block)
        for (int i = 0; i < 2 * Q3N__TILE_ROWS; i++) {
            const uint16_t scale = q3n__f32_to_f16(random_of(TINY) * 0.1f);
            memcpy(w + b + 2 * i, &scale, sizeof scale);
        }
    q3n__x8 *xq = (q3n__x8 *)take_in((size_t)((n + 3) * n_x8) * sizeof *xq, 4);
    for (int t = 0; t < n + 3; t++) {
        float *x = (float *)malloc((size_t)cols * sizeof *x);
        fill(x, (size_t)cols, PLAIN);
        kernels.quantize_x(xq + t * n_x8, x, cols);
        free(x);
    }
    for (int t = 0; t < n; t++) x_rows[t] = random_int(n + 3);
    quantised p = { .type = type, .rows = rows };
    p.m.w = w;
    p.m.xq = xq;
    p.m.x_rows = random_int(2) ? x_rows : NULL;
    p.m.bias = random_int(2) ? new_in((size_t)rows) : NULL;
    if (p.m.bias) for (int i = 0; i < rows; i++) ((float *)(uintptr_t)p.m.bias)[i] = random_float();
    p.m.y_stride = rows + random_int(3);
    p.m.y = new_out((size_t)(n * p.m.y_stride));
    p.m.n = n;
    p.m.n_cols = cols;
    p.m.row1 = rows;
    return p;
}

/* y of token t, row r from its definition, in double; the bound of its roundings. */
static double quantised_value(const quantised *p, int t, int r, double *bound)
{
    const q3n__matmul *m = &p->m;
    const size_t block = (size_t)q3n__types[p->type].block_bytes * Q3N__TILE_ROWS;
    const q3n__x8 *x = q3n__matmul_xq(m, t);
    const uint8_t *tile = (const uint8_t *)m->w + (size_t)(r / Q3N__TILE_ROWS) * Q3N__TILE_ROWS
                                                * q3n__row_bytes(p->type, m->n_cols);
    double sum = 0.0, size = 0.0;
    for (int g = 0; g < 2 * q3n__x8_blocks(m->n_cols); g++) {
        const uint8_t *b = tile + (size_t)(g / 2) * block;
        uint16_t scale;
        int dot = 0;
        memcpy(&scale, b + 32 * (g % 2) + 2 * (r % Q3N__TILE_ROWS), sizeof scale);
        for (int c = 0; c < Q3N__GROUP; c++)
            dot += x[g / 2].q[g % 2 * Q3N__GROUP + c]
                 * q3n__code_level(p->type,
                                   q3n__code_get(p->type, b + 64 + (size_t)(g % 2)
                                                          * q3n__group_bytes(p->type),
                                                 r % Q3N__TILE_ROWS, c));
        const double term = dot * ((double)q3n__f16_to_f32(scale) * (double)x[g / 2].scale[g % 2]);
        sum += term;
        size += fabs(term);
    }
    if (m->bias) { sum += (double)m->bias[r]; size += fabs((double)m->bias[r]); }
    *bound = (2 * q3n__x8_blocks(m->n_cols) + 4) * U * size + 1e-40;
    return sum;
}

static void quantised_values(void)
{
    static const int rows[] = { 1, 15, 16, 17, 33, 48 }, cols[] = { 1, 31, 32, 33, 64, 100, 520 };
    for (int type = 0; type < N_QUANT_TYPES; type++)
        for (int i = 0; i < 6; i++)
            for (int k = 0; k < 7; k++)
                for (int n = 1; n <= 19; n += n < 10 ? 1 : 3) {
                    const quantised p = new_quantised(quant_types[type], n, rows[i], cols[k]);
                    kernels.matmul[p.type](&p.m);
                    for (int t = 0; t < n; t++)
                        for (int r = 0; r < rows[i]; r++) {
                            double bound;
                            const double want = quantised_value(&p, t, r, &bound);
                            check((double)p.m.y[t * p.m.y_stride + r], want, bound, "quantised");
                        }
                    release();
                }
}

static void test_quantised(void **state) { (void)state; FOR_EACH_ISA(quantised_values); }

/* Any rectangle gives the bits of the whole; the x86 kernels with multiply-add give one result. */
static void quantised_cuts(void)
{
    for (int type = 0; type < N_QUANT_TYPES; type++)
        for (int k = 0; k < 40; k++) {
            const int n = 1 + random_int(30), rows = 1 + random_int(70);
            const quantised p = new_quantised(quant_types[type], n, rows, 1 + random_int(300));
            kernels.matmul[p.type](&p.m);
            for (int cut = 0; cut < 20; cut++) {
                q3n__matmul part = p.m;
                const int t = random_int(n), keep = n_blocks;
                part.row0 = random_int((rows + 15) / 16) * 16;
                part.row1 = part.row0 + 1 + random_int(rows - part.row0);
                part.n = 1 + random_int(n - t);
                if (part.x_rows) part.x_rows += t;
                else             part.xq += t * q3n__x8_blocks(part.n_cols);
                part.y = new_out((size_t)(part.n * part.y_stride));
                kernels.matmul[p.type](&part);
                for (int u = 0; u < part.n; u++)
                    check_same(part.y + u * part.y_stride + part.row0,
                               p.m.y + (t + u) * p.m.y_stride + part.row0,
                               (size_t)(part.row1 - part.row0) * 4, "quantised, cut");
                release_to(keep);
            }
            if (isa == Q3N_ISA_AVX512VNNI) {
                q3n__kernels narrow;
                q3n__matmul same = p.m;
                q3n__kernels_init(&narrow, Q3N_ISA_AVX2);
                same.y = new_out((size_t)(n * p.m.y_stride));
                narrow.matmul[p.type](&same);
                for (int t = 0; t < n; t++)
                    check_same(same.y + t * p.m.y_stride, p.m.y + t * p.m.y_stride,
                               (size_t)rows * 4, "AVX2 and VNNI");
            }
            release();
        }
}

static void test_quantised_cuts(void **state) { (void)state; FOR_EACH_ISA(quantised_cuts); }

/* Activations are quantised to the same bytes everywhere. */
static void quantize_x_values(void)
{
    static const float odd[] = { NAN, -NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, 1e-30f, 9e-31f,
                                 FLT_MIN, 1e-45f, -1e-45f, 0.0f, -0.0f };
    for (int k = 0; k < 3000; k++) {
        const int n = 1 + random_int(200), n_x8 = q3n__x8_blocks(n);
        float *x = new_in((size_t)n);
        q3n__x8 got[4], want[4];
        memset(got, 0x5A, sizeof got);
        memset(want, 0x5A, sizeof want);
        fill(x, (size_t)n, k % N_KINDS);
        if (k % 5 == 0) x[random_int(n)] = odd[random_int(13)];
        if (k % 7 == 0)                       /* halves, which round to even */
            for (int i = 0; i < n; i++)
                x[i] = i % 32 == 0 ? 127.0f : (float)random_int(250) - 124.5f;
        kernels.quantize_x(got, x, n);
        q3n__quantize_x_scalar(want, x, n);
        for (int b = 0; b < n_x8; b++) {
            check_same(got[b].q, want[b].q, sizeof got[b].q, "quantize_x: q");
            check_same(got[b].minus_sum, want[b].minus_sum, sizeof got[b].minus_sum, "sum");
            for (int g = 0; g < 2; g++)
                if (!(isnan(got[b].scale[g]) && isnan(want[b].scale[g])))
                    check_same(&got[b].scale[g], &want[b].scale[g], 4, "quantize_x: scale");
        }
        check_same(got + n_x8, want + n_x8, (size_t)(4 - n_x8) * sizeof *got, "behind");
        release();
    }
}

static void test_quantize_x(void **state) { (void)state; FOR_EACH_ISA(quantize_x_values); }

/* A row as floats is what the product with unit vectors gives. */
static void test_dequantize_row(void **state)
{
    (void)state;
    enum { ROWS = 20, COLS = 70 };
    q3n__kernels_init(&kernels, Q3N_ISA_SCALAR);
    for (int type = 0; type < N_QUANT_TYPES; type++) {
        quantised p = new_quantised(quant_types[type], 1, ROWS, COLS);
        float row[COLS];
        q3n__x8 unit[2];
        p.m.bias = NULL;
        p.m.x_rows = NULL;
        p.m.xq = unit;
        for (int c = 0; c < COLS; c++) {
            memset(unit, 0, sizeof unit);
            unit[c / 64].q[c % 64] = 1;
            unit[c / 64].minus_sum[c % 64 / 32] = -1;
            unit[c / 64].scale[c % 64 / 32] = 1.0f;
            kernels.matmul[p.type](&p.m);
            for (int r = 0; r < ROWS; r++) {
                q3n__dequantize_row(p.type, row, p.m.w, r, COLS);
                check((double)row[c], (double)p.m.y[r], 0.0, "row of a quantised matrix");
            }
        }
        release();
    }
}

/* ---- attend ---- */
static const q3n_type kv_types[] = { Q3N_TYPE_F32, Q3N_TYPE_F16, Q3N_TYPE_BF16, Q3N_TYPE_Q8 };
#define N_KV_TYPES 4

/* Store keys (dimension i of key j at i * KV_BLOCK + j) or values (at j * dim + i) in a cache's
 * type; x becomes what was stored.  Scales depend on the key alone; unknown keys have NaN. */
static const void *encode_kv(q3n_type type, float *x, int dim, int is_key, const float **scales)
{
    if (type != Q3N_TYPE_Q8) return encode(type, x, (size_t)dim * Q3N__KV_BLOCK);
    int8_t *bytes = (int8_t *)take_in((size_t)dim * Q3N__KV_BLOCK, 1);
    float *scale = new_in(Q3N__KV_BLOCK);
    for (int j = 0; j < Q3N__KV_BLOCK; j++) {
        scale[j] = (float)(1 + j % 7) * 0.01f;
        for (int i = 0; i < dim; i++) {
            const size_t at = (size_t)(is_key ? i * Q3N__KV_BLOCK + j : j * dim + i);
            if (isnan(x[at])) scale[j] = NAN;
            const float q = isnan(x[at])
                          ? 0.0f : rintf(fmaxf(-127.0f, fminf(127.0f, x[at] / scale[j])));
            bytes[at] = (int8_t)q;
            x[at] = q * scale[j];
        }
    }
    *scales = scale;
    return bytes;
}

typedef struct {
    q3n__attend a;
    float      *k, *v;           /* decoded; NaN from key `known` on */
    int         known;
} attention;

static attention new_attention(q3n_type type, int n, int dim, const int *n_keys)
{
    attention p;
    memset(&p, 0, sizeof p);
    const size_t size = (size_t)dim * Q3N__KV_BLOCK;
    p.a.n_keys = n_keys;
    for (int i = 0; i < n; i++) if (n_keys[i] > p.known) p.known = n_keys[i];
    p.k = new_in(size);
    p.v = new_in(size);
    fill(p.k, size, PLAIN);
    fill(p.v, size, PLAIN);
    for (int c = 0; c < dim; c++)
        for (int j = p.known; j < Q3N__KV_BLOCK; j++)
            p.k[c * Q3N__KV_BLOCK + j] = p.v[j * dim + c] = NAN;
    p.a.k = encode_kv(type, p.k, dim, 1, &p.a.k_scale);
    p.a.v = encode_kv(type, p.v, dim, 0, &p.a.v_scale);
    p.a.n = n;
    p.a.dim = dim;
    p.a.q_stride = dim + random_int(3);
    p.a.o_stride = dim + random_int(3);
    float *q = new_in((size_t)((n - 1) * p.a.q_stride + dim));
    fill(q, (size_t)((n - 1) * p.a.q_stride + dim), PLAIN);
    for (int i = 0; i < n * p.a.q_stride - (p.a.q_stride - dim); i++)
        q[i] *= 2.0f / sqrtf((float)dim);
    p.a.q = q;
    p.a.o = new_out((size_t)(n * p.a.o_stride));
    p.a.m = new_out((size_t)n);
    p.a.l = new_out((size_t)n);
    p.a.scores = new_out((size_t)n * Q3N__KV_BLOCK);
    return p;
}

static void check_attention(const attention *p)
{
    const q3n__attend *a = &p->a;
    const int scaled = a->k_scale ? 2 : 0;   /* a scale is multiplied; decoding here rounds too */
    double s[Q3N__KV_BLOCK];
    for (int i = 0; i < a->n; i++) {
        const float *q = a->q + i * a->q_stride, *o = a->o + i * a->o_stride;
        double m = -FLT_MAX, min = FLT_MAX, l = 0.0, e = 0.0;
        for (int j = 0; j < a->n_keys[i]; j++) {
            double sum = 0.0;
            s[j] = 0.0;
            for (int c = 0; c < a->dim; c++) {
                const double term = (double)q[c] * p->k[c * Q3N__KV_BLOCK + j];
                s[j] += term;
                sum += fabs(term);
            }
            m = fmax(m, s[j]);
            min = fmin(min, s[j]);
            e = fmax(e, (a->dim + 1 + scaled) * U * sum);  /* of a score: one chain over dim */
        }
        check(a->m[i], m, e, "attend: m");
        for (int j = 0; j < a->n_keys[i]; j++) l += s[j] = exp(s[j] - m);
        /* a weight: errors of s and m, of their difference, e^x to 2 ulp */
        const double weight = 2.0 * e + (m - min) * U + 4.0 * U;
        check(a->l[i], l, l * (weight + a->n_keys[i] * U), "attend: l");
        for (int c = 0; c < a->o_stride; c++) {
            double sum = 0.0, abs_sum = 0.0;
            if (c >= a->dim) {
                assert_int_equal(q3n__f32_bits(o[c]), 0xA5A5A5A5u);
                continue;
            }
            for (int j = 0; j < a->n_keys[i]; j++) {
                sum += s[j] * p->v[j * a->dim + c];
                abs_sum += fabs(s[j] * p->v[j * a->dim + c]);
            }
            check(o[c], sum, abs_sum * (weight + (a->n_keys[i] + 1 + scaled) * U) + 256 * TINY_STEP,
                  "attend: o");
        }
    }
}

/* Query i alone, with NaN after its own last key, gives the bits it got in company. */
static void check_alone(q3n_type type, const attention *p, int i)
{
    const q3n__attend *a = &p->a;
    const size_t size = (size_t)a->dim * Q3N__KV_BLOCK;
    float *k = new_in(size), *v = new_in(size), m, l;
    memcpy(k, p->k, size * 4);
    memcpy(v, p->v, size * 4);
    for (int c = 0; c < a->dim; c++)
        for (int j = a->n_keys[i]; j < Q3N__KV_BLOCK; j++)
            k[c * Q3N__KV_BLOCK + j] = v[j * a->dim + c] = NAN;
    q3n__attend one = *a;
    one.k = encode_kv(type, k, a->dim, 1, &one.k_scale);
    one.v = encode_kv(type, v, a->dim, 0, &one.v_scale);
    one.n = 1;
    one.q += i * a->q_stride;
    one.n_keys += i;
    one.o = new_out((size_t)a->dim);
    one.scores = new_out(Q3N__KV_BLOCK);
    one.m = &m;
    one.l = &l;
    kernels.attend[type](&one);
    check_same(one.o, a->o + i * a->o_stride, (size_t)a->dim * 4, "attend alone: o");
    check_same(&m, a->m + i, 4, "attend alone: m");
    check_same(&l, a->l + i, 4, "attend alone: l");
}

static void attend_values(void)
{
    static const int dims[] = { 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 96, 128, 200, 256 };
    static const int keys[][9] = {
        { 256, 256, 256, 256, 256, 256, 256, 256, 256 }, { 0, 1, 2, 3, 4, 5, 6, 7, 8 },
        { 1, 1, 1, 1, 255, 255, 255, 255, 256 },         { 17, 17, 18, 18, 0, 0, 0, 0, 0 },
        { 100, 100, 101, 101, 102, 102, 255, 256, 0 },   { 15, 16, 31, 32, 33, 63, 64, 65, 128 } };
    for (int type = 0; type < N_KV_TYPES; type++)
        for (int d = 0; d < 15; d++)
            for (int i = 0; i < 6; i++) {
                const int n = 1 + (d + 2 * i + type) % 9;
                attention p = new_attention(kv_types[type], n, dims[d], keys[i]);
                kernels.attend[kv_types[type]](&p.a);
                check_attention(&p);
                if ((d + i) % 3 == 0)
                    for (int k = 0; k < n; k++) check_alone(kv_types[type], &p, k);
                release();
            }
}

static void test_attend(void **state) { (void)state; FOR_EACH_ISA(attend_values); }

/* ---- delta ---- */
#define DELTA_TOKENS 5

typedef struct {
    q3n__delta d;
    float     *before;           /* S of before the call */
} memory;

static memory new_memory(int n, int dk, int dv)
{
    static const float decays[] = { 0.0f, -1e-4f, -0.1f, -3.0f, -200.0f };
    memory p;
    memset(&p, 0, sizeof p);
    q3n__delta *d = &p.d;
    d->n = d->n_store = n;
    d->dk = dk;
    d->dv = d->col1 = dv;
    d->qk_stride = 2 * dk + random_int(3);
    d->v_stride = dv + random_int(3);
    d->o_stride = dv + random_int(3);
    d->gb_stride = 2;
    float *qk = new_in((size_t)(n * d->qk_stride)), *v = new_in((size_t)(n * d->v_stride));
    float *gb = new_in((size_t)(2 * n));
    fill(qk, (size_t)(n * d->qk_stride), PLAIN);
    for (int i = 0; i < n * d->qk_stride; i++) qk[i] /= sqrtf((float)dk);
    fill(v, (size_t)(n * d->v_stride), PLAIN);
    for (int t = 0; t < n; t++) {
        gb[2 * t] = decays[random_int(5)];
        gb[2 * t + 1] = (float)(1 + random_int(99)) / 100.0f;
    }
    d->q = qk;
    d->k = qk + dk;
    d->v = v;
    d->g = gb;
    d->beta = gb + 1;
    d->S = d->S_out = new_out((size_t)(dk * dv));
    d->o = new_out((size_t)(n * d->o_stride));
    p.before = new_in((size_t)(dk * dv));
    fill(p.before, (size_t)(dk * dv), random_int(2) ? PLAIN : TINY);
    memcpy(d->S_out, p.before, (size_t)(dk * dv) * 4);
    return p;
}

/* One token from a known state; longer runs follow from the test of cuts. */
static void check_memory(const memory *p)
{
    const q3n__delta *h = &p->d;
    const double decay = exp((double)h->g[0]), beta = h->beta[0], chain = (h->dk + 1) * U;
    for (int j = 0; j < h->dv; j++) {
        if (j < h->col0 || j >= h->col1) {
            assert_int_equal(q3n__f32_bits(h->o[j]), 0xA5A5A5A5u);
            for (int i = 0; i < h->dk; i++)
                check_same(h->S + i * h->dv + j, p->before + i * h->dv + j, 4,
                           "delta: other columns");
            continue;
        }
        double read = 0.0, abs_read = 0.0, o = 0.0, o_error = 0.0;
        for (int i = 0; i < h->dk; i++) {
            read     += (double)p->before[i * h->dv + j] * h->k[i];
            abs_read += fabs((double)p->before[i * h->dv + j] * h->k[i]);
        }
        const double d = beta * (h->v[j] - decay * read);
        const double d_error = beta * decay * abs_read * (chain + 4 * U)
                             + beta * (fabs((double)h->v[j]) + decay * abs_read) * 3 * U;
        for (int i = 0; i < h->dk; i++) {
            const double kept = decay * p->before[i * h->dv + j], s = kept + h->k[i] * d;
            const double error = fabs(kept) * 5 * U + fabs(h->k[i] * d) * 3 * U
                               + fabs((double)h->k[i]) * d_error + 4 * TINY_STEP;
            check(h->S[i * h->dv + j], s, error, "delta: S");
            o += s * h->q[i];
            o_error += fabs(s * h->q[i]) * chain + fabs((double)h->q[i]) * error + TINY_STEP;
        }
        check(h->o[j], o, o_error, "delta: o");
    }
}

static void delta_values(void)
{
    static const int keys[] = { 1, 2, 3, 16, 33, 64, 128 };
    for (int i = 0; i < 7; i++)
        for (int l = 1; l < 40; l++) {
            memory p = new_memory(1, keys[i], l < 34 ? l : more_lengths[l - 34 + 3]);
            if (l % 2) {
                p.d.col0 = random_int(p.d.dv);
                p.d.col1 = p.d.col0 + random_int(p.d.dv - p.d.col0 + 1);
            }
            kernels.delta(&p.d);
            check_memory(&p);
            release();
        }
    memory none = new_memory(1, 8, 8);
    none.d.n = none.d.n_store = 0;
    none.d.q = none.d.k = none.d.v = none.d.g = none.d.beta = NULL;
    kernels.delta(&none.d);
    check_same(none.d.S, none.before, 64 * 4, "delta: no token");
    release();
}

static void test_delta(void **state) { (void)state; FOR_EACH_ISA(delta_values); }

/* All tokens and columns at once = token by token, in ranges of columns of any width. */
static void delta_cuts(void)
{
    static const int widths[] = { 1, 15, 16, 17, 32, 63, 64, 100, 128, 160, 257 };
    for (int i = 0; i < 11; i++)
        for (int cut = 0; cut < 4; cut++) {
            const int dv = widths[i], dk = 1 + random_int(70), step = 1 + random_int(dv);
            memory p = new_memory(DELTA_TOKENS, dk, dv);
            q3n__delta part = p.d;
            part.S = part.S_out = new_out((size_t)(dk * dv));
            part.o = new_out((size_t)(p.d.n * p.d.o_stride));
            memcpy(part.S_out, p.before, (size_t)(dk * dv) * 4);
            kernels.delta(&p.d);
            for (int j = 0; j < dv; j += step)
                for (int t = 0; t < p.d.n; t += part.n) {
                    q3n__delta one = part;
                    one.n = one.n_store = part.n = cut == 0 || t + 2 > p.d.n ? 1 : 2;
                    one.q += t * p.d.qk_stride;
                    one.k += t * p.d.qk_stride;
                    one.v += t * p.d.v_stride;
                    one.o += t * p.d.o_stride;
                    one.g += t * p.d.gb_stride;
                    one.beta += t * p.d.gb_stride;
                    one.col0 = j;
                    one.col1 = j + step < dv ? j + step : dv;
                    kernels.delta(&one);
                }
            check_same(part.S, p.d.S, (size_t)(dk * dv) * 4, "delta in pieces: S");
            check_same(part.o, p.d.o, (size_t)(p.d.n * p.d.o_stride) * 4, "delta in pieces: o");
            release();
        }
}

static void test_delta_cuts(void **state) { (void)state; FOR_EACH_ISA(delta_cuts); }

/* Columns [begin, end) of out [n_rows, n_cols] are those of want; nobody wrote the others. */
static void check_columns(const float *out, const float *want, int n_rows, int n_cols,
                          const int range[2], const char *what)
{
    for (int i = 0; i < n_rows * n_cols; i++) {
        const int mine = i % n_cols >= range[0] && i % n_cols < range[1];
        if (q3n__f32_bits(out[i]) != (mine ? q3n__f32_bits(want[i]) : 0xA5A5A5A5u))
            fail_msg("%s: row %d, column %d", what, i / n_cols, i % n_cols);
    }
}

/* The call's tokens one by one, each in place: S_out becomes the state after n_store of them. */
static void delta_alone(const q3n__delta *h, const float *before, float *S_out, float *o)
{
    const size_t bytes = (size_t)(h->dk * h->dv) * 4;
    q3n__delta one = *h;
    float *S = new_out((size_t)(h->dk * h->dv));
    memcpy(S, before, bytes);
    one.S = one.S_out = S;
    one.scratch = NULL;
    one.n = one.n_store = 1;
    one.n_skip = 0;
    for (int t = 0; t <= h->n; t++) {
        if (t == h->n_store) memcpy(S_out, S, bytes);
        if (t == h->n) return;
        one.o = t < h->n_skip ? NULL : o + t * h->o_stride;
        kernels.delta(&one);
        one.q += h->qk_stride;
        one.k += h->qk_stride;
        one.v += h->v_stride;
        one.g += h->gb_stride;
        one.beta += h->gb_stride;
    }
}

/* One call whose stored state lags after, in place and apart, with and without outputs. */
static void check_lag(const memory *p, int n_store, int n_skip)
{
    const int keep = n_blocks, range[2] = { p->d.col0, n_store ? p->d.col1 : p->d.col0 };
    const size_t len = (size_t)(p->d.dk * p->d.dv), o_len = (size_t)(p->d.n * p->d.o_stride);
    q3n__delta d = p->d;
    d.n_store = n_store;
    d.n_skip = n_skip;
    float *S = new_out(len), *o = new_out(o_len), *old = new_in(len), *S_place = new_out(len);
    delta_alone(&d, p->before, S, o);
    memcpy(old, p->before, len * 4);
    memcpy(S_place, p->before, len * 4);

    if (d.n > n_store + 1) d.scratch = new_out((size_t)(d.dk * (d.col1 - d.col0)));
    d.S = d.S_out = S_place;
    d.o = new_out(o_len);
    kernels.delta(&d);
    check_same(S_place, S, len * 4, "delta in place: S");
    check_same(d.o, o, o_len * 4, "delta in place: o");

    if (d.scratch) d.scratch = new_out((size_t)(d.dk * (d.col1 - d.col0)));
    d.S = old;
    d.S_out = new_out(len);
    d.o = new_out(o_len);
    kernels.delta(&d);
    check_columns(d.S_out, S, d.dk, d.dv, range, "delta apart: S");
    check_same(d.o, o, o_len * 4, "delta apart: o");

    d.S_out = n_store ? new_out(len) : NULL;
    d.o = NULL;
    kernels.delta(&d);
    if (n_store) check_columns(d.S_out, S, d.dk, d.dv, range, "delta without o: S");
    check_same(old, p->before, len * 4, "delta apart: the old S");
    release_to(keep);
}

static void delta_lag(void)
{
    static const int widths[] = { 1, 7, 8, 17, 32, 47, 64, 100, 128, 160, 257 };
    for (int i = 0; i < 22; i++)
        for (int n = 0; n <= 6; n++) {
            const int dv = widths[i / 2];
            memory p = new_memory(n, i % 8 == 7 ? 128 : 1 + random_int(70), dv);
            if (i % 2) {
                p.d.col0 = random_int(dv);
                p.d.col1 = p.d.col0 + random_int(dv - p.d.col0 + 1);
            }
            for (int n_store = 0; n_store <= n; n_store++)
                for (int n_skip = 0; n_skip <= n; n_skip++) check_lag(&p, n_store, n_skip);
            release();
        }
}

static void test_delta_lag(void **state) { (void)state; FOR_EACH_ISA(delta_lag); }

/* ---- conv ---- */
static double silu(double x) { return x / (1.0 + exp(-x)); }

/* Error of silu(s) where s is known to within `error`: its slope is below 1.1. */
static double silu_error(double s, double error) { return 1.1 * error + fabs(silu(s)) * 6 * U; }

typedef struct {
    q3n__conv c;
    float    *before;
} convolution;

static convolution new_convolution(int n, int width, int n_channels)
{
    convolution p;
    memset(&p, 0, sizeof p);
    p.c.n = n;
    p.c.width = width;
    p.c.n_channels = p.c.c1 = n_channels;
    p.c.x_stride = n_channels + random_int(3);
    p.c.y_stride = n_channels + random_int(3);
    float *w = new_in((size_t)(width * n_channels)), *x = new_in((size_t)(n * p.c.x_stride));
    fill(w, (size_t)(width * n_channels), PLAIN);
    fill(x, (size_t)(n * p.c.x_stride), random_int(2) ? PLAIN : HUGE_RANGE);
    const size_t state = (size_t)((width - 1) * n_channels);
    p.c.w = w;
    p.c.x = x;
    p.c.state = p.c.state_out = new_out(state);
    p.c.y = new_out((size_t)(n * p.c.y_stride));
    p.before = new_in(state);
    fill(p.before, state, PLAIN);
    memcpy(p.c.state_out, p.before, state * 4);
    return p;
}

static const float *convolution_input(const convolution *p, int i)
{
    return i < p->c.width - 1 ? p->before + i * p->c.n_channels
                              : p->c.x + (i - p->c.width + 1) * p->c.x_stride;
}

static void check_convolution(const convolution *p)
{
    const q3n__conv *c = &p->c;
    for (int ch = 0; ch < c->n_channels; ch++) {
        const int mine = ch >= c->c0 && ch < c->c1;
        for (int t = 0; t < c->n; t++) {
            const float *y = c->y + t * c->y_stride + ch;
            double s = 0.0, sum = 0.0;
            for (int j = 0; j < c->width; j++) {
                const double term = (double)c->w[j * c->n_channels + ch]
                                  * convolution_input(p, t + j)[ch];
                s += term;
                sum += fabs(term);
            }
            if (mine)
                check(*y, silu(s), silu_error(s, sum * (c->width + 1) * U) + TINY_STEP, "conv");
            else      assert_int_equal(q3n__f32_bits(*y), 0xA5A5A5A5u);
        }
        for (int j = 0; j < c->width - 1; j++)
            check_same(c->state + j * c->n_channels + ch,
                       convolution_input(p, mine ? c->n + j : j) + ch, 4, "conv: state");
    }
}

static void conv_values(void)
{
    for (int i = 1; i < 40; i++)
        for (int width = 1; width <= 16; width += width < 5 ? 1 : 11)
            for (int n = 0; n < 6; n += n < 3 ? 1 : 2) {
                convolution p = new_convolution(n, width, i < 34 ? i : more_lengths[i - 34]);
                if (i % 2) {
                    p.c.c0 = random_int(p.c.n_channels);
                    p.c.c1 = p.c.c0 + random_int(p.c.n_channels - p.c.c0 + 1);
                }
                kernels.conv(&p.c);
                check_convolution(&p);
                release();
            }
}

static void test_conv(void **state) { (void)state; FOR_EACH_ISA(conv_values); }

static void conv_cuts(void)
{
    for (int k = 0; k < 60; k++) {
        const int n = 1 + random_int(9), channels = 1 + random_int(80),
                  step = 1 + random_int(channels);
        convolution p = new_convolution(n, 4, channels);
        q3n__conv part = p.c;
        part.state = part.state_out = new_out((size_t)(3 * channels));
        part.y = new_out((size_t)(n * p.c.y_stride));
        memcpy(part.state_out, p.before, (size_t)(3 * channels) * 4);
        kernels.conv(&p.c);
        for (int c = 0; c < channels; c += step)
            for (int t = 0; t < n; t++) {
                q3n__conv one = part;
                one.n = 1;
                one.c0 = c;
                one.c1 = c + step < channels ? c + step : channels;
                one.x += t * p.c.x_stride;
                one.y += t * p.c.y_stride;
                kernels.conv(&one);
            }
        check_same(part.state, p.c.state, (size_t)(3 * channels) * 4, "conv in pieces: state");
        check_same(part.y, p.c.y, (size_t)(n * p.c.y_stride) * 4, "conv in pieces: y");
        release();
    }
}

static void test_conv_cuts(void **state) { (void)state; FOR_EACH_ISA(conv_cuts); }

static void conv_elsewhere(void)
{
    for (int i = 0; i < 300; i++) {
        const int n = i % 7, width = i % 3 ? 4 : 1 + random_int(16),
                  channels = i < 70 ? 1 + i : 1 + random_int(150);
        convolution p = new_convolution(n, width, channels);
        if (i % 2) {
            p.c.c0 = random_int(channels);
            p.c.c1 = p.c.c0 + random_int(channels - p.c.c0 + 1);
        }
        const int nothing[2] = { 0, 0 }, range[2] = { p.c.c0, p.c.c1 };
        const size_t len = (size_t)((width - 1) * channels), y_len = (size_t)(n * p.c.y_stride);
        float *old = new_in(len);
        memcpy(old, p.before, len * 4);
        q3n__conv apart = p.c;
        apart.state = old;
        apart.state_out = new_out(len);
        apart.y = new_out(y_len);
        kernels.conv(&p.c);
        kernels.conv(&apart);
        check_columns(apart.state_out, p.c.state, width - 1, channels, n ? range : nothing,
                      "conv elsewhere: state");
        check_same(apart.y, p.c.y, y_len * 4, "conv elsewhere: y");
        check_same(old, p.before, len * 4, "conv elsewhere: the old state");
        release();
    }
}

static void test_conv_elsewhere(void **state) { (void)state; FOR_EACH_ISA(conv_elsewhere); }

/* ---- dot, axpy, rms_norm ---- */
static void vector_values(void)
{
    for (int i = 0; i < N_LENGTHS; i++)
        for (int kind = 0; kind < N_KINDS; kind++) {
            const int n = length(i);
            float *a = new_in((size_t)n), *b = new_in((size_t)n), *y = new_out((size_t)n);
            const float eps = 1e-6f, factor = random_of(kind);
            double dot = 0.0, abs_dot = 0.0, squares = 0.0;
            fill(a, (size_t)n, kind);
            fill(b, (size_t)n, kind);
            for (int j = 0; j < n; j++) {
                dot += (double)a[j] * b[j];
                abs_dot += fabs((double)a[j] * b[j]);
                squares += (double)a[j] * a[j];
            }
            check(kernels.dot(a, b, n), dot, sum_error(n) * abs_dot + n * TINY_STEP, "dot");
            memcpy(y, b, (size_t)n * 4);
            kernels.axpy(y, factor, a, n);
            for (int j = 0; j < n; j++) {
                const double term = (double)factor * a[j];
                check(y[j], b[j] + term, 2 * U * (fabs(term) + fabs((double)b[j])) + TINY_STEP,
                      "axpy");
            }
            if (n == 0) continue;
            float *in_place = new_out((size_t)n);
            memcpy(in_place, a, (size_t)n * 4);
            kernels.rms_norm(y, a, b, n, eps);
            kernels.rms_norm(in_place, in_place, b, n, eps);
            check_same(y, in_place, (size_t)n * 4, "rms_norm in place");
            const double scale = 1.0 / sqrt(squares / n + (double)eps);
            for (int j = 0; j < n; j++)      /* half the error of the mean, then six roundings */
                check(y[j], a[j] * scale * b[j],
                      fabs(a[j] * scale * b[j]) * (sum_error(n) / 2 + 6 * U)
                      + (1.0 + fabs((double)b[j])) * TINY_STEP, "rms_norm");
            release();
        }
}

static void test_vectors(void **state) { (void)state; FOR_EACH_ISA(vector_values); }

/* ---- softmax, silu, sigmoid ---- */
static void softmax_values(void)
{
    for (int i = 1; i < N_LENGTHS; i++)
        for (int kind = 0; kind < 4; kind++) {
            const int n = length(i);
            float *x = new_in((size_t)n), *y = new_out((size_t)n);
            double m = -INFINITY, l = 0.0;
            for (int j = 0; j < n; j++) {
                x[j] = kind == 0 ? random_float() : kind == 1 ? 40.0f * random_float()
                     : kind == 2 ? -1e30f * (float)random_int(2) : 3.0f;
                if (kind == 3 && j != n / 2 && random_int(3) == 0) x[j] = -INFINITY;
                m = fmax(m, (double)x[j]);
            }
            memcpy(y, x, (size_t)n * 4);
            kernels.softmax(y, n);
            for (int j = 0; j < n; j++) l += exp(x[j] - m);
            for (int j = 0; j < n; j++) {    /* of x - m, e^x, the sum, the quotient */
                const double want = exp(x[j] - m) / l, away = isinf(x[j]) ? 0.0 : m - x[j];
                const double relative = fmin(away, 104.0) * U + 40.0 * U + 8 * U + sum_error(n);
                check(y[j], want, want * relative + 2 * TINY_STEP, "softmax");
            }
            release();
        }
}

static void test_softmax(void **state) { (void)state; FOR_EACH_ISA(softmax_values); }

static void gate_values(void)
{
    static const float special[] = {0.0f, -0.0f, 1e-45f, -1e-39f, 88.0f, -88.0f, 104.0f, -104.0f,
                                    1e4f, -1e4f, 1e37f,  -1e37f,  20.0f, -20.0f, -87.5f, -89.5f};
    for (int i = 0; i < N_LENGTHS; i++)
        for (int kind = 0; kind < N_KINDS; kind++) {
            const int n = length(i);
            float *gate = new_in((size_t)n), *x = new_in((size_t)n);
            float *y = new_out((size_t)n), *z = new_out((size_t)n);
            fill(x, (size_t)n, PLAIN);
            for (int j = 0; j < n; j++)
                gate[j] = random_int(2) ? random_of(kind) : special[random_int(16)];
            memcpy(y, x, (size_t)n * 4);
            memcpy(z, x, (size_t)n * 4);
            kernels.silu_mul(y, gate, n);
            kernels.sigmoid_mul(z, gate, n);
            for (int j = 0; j < n; j++) {
                /* where e^-g overflows to infinity, 1 / (1 + e^-g) < 2^-128 becomes 0 */
                const double g = gate[j], sigmoid = 1.0 / (1.0 + exp(-g)),
                             lost = g < -88.0 ? sigmoid : 0.0;
                const double v = fabs((double)x[j]), small = (1.0 + v) * TINY_STEP;
                check(y[j], x[j] * silu(g), v * fabs(silu(g)) * 8 * U + v * fabs(g) * lost + small,
                      "silu");
                check(z[j], x[j] * sigmoid, v * sigmoid * 8 * U + v * lost + small, "sigmoid");
            }
            release();
        }
}

static void test_gates(void **state) { (void)state; FOR_EACH_ISA(gate_values); }

/* ---- e^x of the vector ISAs, reached through the sum that softmax and attend use ---- */
static float exp_scalar(float *x, int n, float m)
{
    for (int i = 0; i < n; i++) x[i] = expf(x[i] - m);
    return 0.0f;
}

static float (*exp_of_isa(void))(float *x, int n, float m)
{
#if Q3N__X86 && !defined(Q3N_NO_AVX2)
    if (isa == Q3N_ISA_AVX2) return q3n__exp_sum_avx2;
#endif
#if Q3N__X86 && !defined(Q3N_NO_AVX512)
    if (isa == Q3N_ISA_AVX512) return q3n__exp_sum_avx512;
#endif
#if Q3N__ARM64 && !defined(Q3N_NO_NEON)
    if (isa == Q3N_ISA_NEON) return q3n__exp_sum_neon;
#endif
    return exp_scalar;
}

#define EXP_POINTS 4096
static double worst_exp;

/* Distance in units of the last place of the exact value; denormals have a fixed unit, infinity
 * counts as 2^128. */
static double exp_ulps(float x, float got)
{
    const double want = exp((double)x);
    int e;
    if (want >= 0x1.ffffffp127) return isinf(got) && got > 0.0f ? 0.0 : HUGE_VAL;
    frexp(want, &e);
    return fabs((isinf(got) ? 0x1p128 : (double)got) - want)
           / ldexp(1.0, e - 24 < -149 ? -149 : e - 24);
}

static void check_exp(float *x, int n)
{
    float y[EXP_POINTS];
    memcpy(y, x, (size_t)n * 4);
    exp_of_isa()(y, n, 0.0f);
    for (int i = 0; i < n; i++) {
        const double ulps = exp_ulps(x[i], y[i]);
        if (!(ulps <= 1.0)) fail_msg("exp(%a) is off by %g ulp", (double)x[i], ulps);
        worst_exp = fmax(worst_exp, ulps);
    }
}

static void exp_values(void)
{
    float x[EXP_POINTS];
    for (uint32_t e = 0; e < 255; e++) {                /* every exponent, both signs */
        for (int i = 0; i < 256; i++)
            x[i] = q3n__bits_f32((random_u32() & 0x807fffffu) | (e << 23));
        x[0] = q3n__bits_f32(e << 23);
        x[1] = -x[0];
        check_exp(x, 256);
    }
    for (int k = 0; k < 50; k++) {                      /* where the result is finite and not 0 */
        for (int i = 0; i < EXP_POINTS; i++)
            x[i] = -104.5f + 194.0f * (float)(random_u32() >> 8) / 16777216.0f;
        check_exp(x, EXP_POINTS);
    }
    for (int i = 0; i < EXP_POINTS; i++)                /* the last before infinity */
        x[i] = q3n__bits_f32(q3n__f32_bits(88.72f) + (uint32_t)i);
    check_exp(x, EXP_POINTS);
    float special[] = { NAN, INFINITY, -INFINITY, 0.0f, -0.0f, -NAN, FLT_MAX, -FLT_MAX };
    exp_of_isa()(special, 8, 0.0f);
    assert_true(isnan(special[0]) && isnan(special[5]));
    assert_true(isinf(special[1]) && isinf(special[6]));
    assert_true(special[2] == 0.0f && special[7] == 0.0f);
    assert_true(special[3] == 1.0f && special[4] == 1.0f);
}

static void test_exp(void **state) { (void)state; FOR_EACH_ISA(exp_values); }

/* ---- Conversions ---- */

/* Value of an f16 from the definition: 1 sign, 5 exponent (bias 15), 10 mantissa bits. */
static double f16_value(uint16_t h)
{
    const int e = (h >> 10) & 31, f = h & 1023;
    const double sign = h & 0x8000 ? -1.0 : 1.0;
    if (e == 31) return f ? NAN : sign * INFINITY;
    return sign * (e ? ldexp(1024 + f, e - 25) : ldexp(f, -24));
}

static double bf16_value(uint16_t h)
{
    const int e = (h >> 7) & 255, f = h & 127;
    const double sign = h & 0x8000 ? -1.0 : 1.0;
    if (e == 255) return f ? NAN : sign * INFINITY;
    return sign * (e ? ldexp(128 + f, e - 134) : ldexp(f, -133));
}

static void conversions_to_f32(void)
{
    uint16_t *h = (uint16_t *)take_in(65536 * 2, 2);
    float *y = new_out(65536);
    for (int i = 0; i < 65536; i++) h[i] = (uint16_t)i;
    for (int type = 1; type < N_FLOAT_TYPES; type++) {
        kernels.to_f32[float_types[type]](y, h, 65536);
        for (int i = 0; i < 65536; i++) {
            const int half = float_types[type] == Q3N_TYPE_F16;
            const double want = half ? f16_value(h[i]) : bf16_value(h[i]);
            const float one = half ? q3n__f16_to_f32(h[i]) : q3n__bf16_to_f32(h[i]);
            if (isnan(want)) {
                assert_true(isnan(y[i]) && isnan(one));
                continue;
            }
            assert_true((double)y[i] == want && !signbit(y[i]) == !(i >> 15));
            check_same(y + i, &one, 4, "to_f32");
        }
    }
    for (int i = 0; i < N_LENGTHS; i++)
        for (int type = 0; type < N_FLOAT_TYPES; type++) {
            const int n = length(i);
            float *x = new_in((size_t)n), *z = new_out((size_t)n);
            fill(x, (size_t)n, TINY);
            kernels.to_f32[float_types[type]](z, encode(float_types[type], x, (size_t)n), n);
            check_same(z, x, (size_t)n * 4, "to_f32");
            release_to(2);
        }
    release();
}

static void test_to_f32(void **state) { (void)state; FOR_EACH_ISA(conversions_to_f32); }

/* Nearest of the 16-bit floats, ties to the even one: by bisection over their values, where what
 * stands for infinity counts as the next power of two. */
static uint16_t nearest(float f, double (*value)(uint16_t), uint16_t infinity, double next)
{
    const uint16_t sign = signbit(f) ? 0x8000 : 0;
    const double a = fabs((double)f);
    uint16_t lo = 0, hi = infinity;
    if (isinf(f)) return (uint16_t)(sign | infinity);
    while (hi - lo > 1) {
        const uint16_t mid = (uint16_t)((lo + hi) / 2);
        if (value(mid) <= a) lo = mid;
        else                 hi = mid;
    }
    const double up = (hi == infinity ? next : value(hi)) - a, down = a - value(lo);
    return (uint16_t)(sign | (up < down || (up == down && (hi & 1) == 0) ? hi : lo));
}

#if Q3N__X86 && !defined(Q3N_NO_AVX2)
Q3N__TARGET_BEGIN("avx2,fma,f16c")
static uint16_t hardware_f16(float f)
{
    return (uint16_t)_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(f), 0), 0);
}
Q3N__TARGET_END
#else
#  define hardware_f16 q3n__f32_to_f16
#endif

static int has_f16c;             /* asked once: cpuid takes 13 us in a virtual machine */

static void check_rounding(float f)
{
    const uint16_t half = q3n__f32_to_f16(f), brain = q3n__f32_to_bf16(f);
    if (has_f16c) assert_int_equal(half, hardware_f16(f));
    if (isnan(f)) {
        assert_true(isnan(f16_value(half)) && isnan(bf16_value(brain)));
        return;
    }
    assert_int_equal(half, nearest(f, f16_value, 0x7c00, 65536.0));
    assert_int_equal(brain, nearest(f, bf16_value, 0x7f80, 0x1p128));
}

static void test_from_f32(void **state)
{
    (void)state;
    has_f16c = q3n_isa_supported(Q3N_ISA_AVX2);
    for (uint32_t i = 0; i < 65536; i++) {
        const float brain = q3n__bf16_to_f32((uint16_t)i), half = q3n__f16_to_f32((uint16_t)i);
        if (!isnan(brain)) assert_int_equal(q3n__f32_to_bf16(brain), i);
        if (!isnan(half)) assert_int_equal(q3n__f32_to_f16(half), i);
        check_rounding(brain);
        check_rounding(half);
        for (uint32_t j = 0; j < 3; j++) {   /* half-way to the next and its neighbours */
            check_rounding(q3n__bits_f32((i << 16) + 0x7fffu + j));
            if ((i & 0x7c00) != 0x7c00)
                check_rounding(q3n__bits_f32(q3n__f32_bits(half) + 0xfffu + j));
        }
    }
    for (int i = 0; i < 100000; i++) check_rounding(q3n__bits_f32(random_u32()));
    for (int i = -20; i < 20; i++)           /* half the least denormal, where zero begins */
        check_rounding(q3n__bits_f32((uint32_t)((int)0x33000000 + i)));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tables),
        cmocka_unit_test(test_to_f32),
        cmocka_unit_test(test_from_f32),
        cmocka_unit_test(test_exp),
        cmocka_unit_test(test_vectors),
        cmocka_unit_test(test_softmax),
        cmocka_unit_test(test_sampling),
        cmocka_unit_test(test_gates),
        cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_matmul_cuts),
        cmocka_unit_test(test_quantised),
        cmocka_unit_test(test_quantised_cuts),
        cmocka_unit_test(test_quantize_x),
        cmocka_unit_test(test_dequantize_row),
        cmocka_unit_test(test_attend),
        cmocka_unit_test(test_delta),
        cmocka_unit_test(test_delta_cuts),
        cmocka_unit_test(test_delta_lag),
        cmocka_unit_test(test_conv),
        cmocka_unit_test(test_conv_cuts),
        cmocka_unit_test(test_conv_elsewhere),
    };
    print_isas();
    return cmocka_run_group_tests_name("kernels", tests, NULL, NULL);
}
