/* test_quantize.c - rows of floats to quantised types: codes in and out, errors of normal weights
 * for every type, zeros, odd shapes, importance, values that cannot be encoded. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define Q3N_IMPLEMENTATION
#include "../qwen3next.h"

#define COUNT(a) (sizeof(a) / sizeof(a)[0])

static const q3n_type quantised[] = {
#define Q3N__X(ID, id, number, block_len, block_bytes) Q3N_TYPE_##ID,
    Q3N_QUANT_TYPE_LIST(Q3N__X)
#undef Q3N__X
};

static uint64_t rng = 1;

static double unit(void)
{
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (double)(rng >> 11) / 9007199254740992.0;
}

/* About normal: a sum of twelve. */
static float *normal_rows(int64_t n, double stddev)
{
    float *x = malloc((size_t)n * sizeof *x);
    assert_non_null(x);
    for (int64_t i = 0; i < n; i++) {
        double sum = -6.0;
        for (int k = 0; k < 12; k++) sum += unit();
        x[i] = (float)(sum * stddev);
    }
    return x;
}

static uint8_t *encode(q3n_type t, const float *x, int64_t rows, int64_t cols, const float *w,
                       size_t *bytes)
{
    const q3n_rows r = { x, rows, cols, w };
    q3n_error err = { Q3N_OK, -1, "" };
    *bytes = (size_t)q3n_type_bytes(t, rows, cols);
    uint8_t *y = malloc(*bytes + 8);
    assert_non_null(y);
    memset(y, 0xA5, *bytes + 8);
    assert_int_equal(q3n_quantize_rows(t, &r, y, *bytes, &err), Q3N_OK);
    for (int i = 0; i < 8; i++) assert_int_equal(y[*bytes + (size_t)i], 0xA5);
    return y;
}

/* sqrt(sum w (x - y)^2 / sum w x^2) */
static double error_of(q3n_type t, const uint8_t *y, const float *x, int rows, int cols,
                       const float *w)
{
    float *got = malloc((size_t)cols * sizeof *got);
    double wrong = 0.0, all = 0.0;
    assert_non_null(got);
    for (int r = 0; r < rows; r++) {
        q3n__dequantize_row(t, got, y, r, cols);
        for (int c = 0; c < cols; c++) {
            const double a = x[(size_t)r * (size_t)cols + (size_t)c], d = got[c] - a;
            wrong += (w ? w[c] : 1.0f) * d * d;
            all += (w ? w[c] : 1.0f) * a * a;
        }
    }
    free(got);
    return sqrt(wrong / all);
}

static void test_codes_in_and_out(void **state)
{
    (void)state;
    static const int n_codes[] = { 256, 64, 16, 8 };
    for (size_t k = 0; k < COUNT(quantised); k++) {
        const q3n_type t = quantised[k];
        uint8_t group[512 + 1] = { 0 };
        int want[Q3N__TILE_ROWS][Q3N__GROUP];
        group[q3n__group_bytes(t)] = 0x5A;
        for (int r = 0; r < Q3N__TILE_ROWS; r++)
            for (int c = 0; c < Q3N__GROUP; c++) {
                want[r][c] = (int)(unit() * n_codes[k]);
                q3n__code_put(t, group, r, c, want[r][c]);
            }
        for (int r = 0; r < Q3N__TILE_ROWS; r++)
            for (int c = 0; c < Q3N__GROUP; c++)
                assert_int_equal(q3n__code_get(t, group, r, c), want[r][c]);
        assert_int_equal(group[q3n__group_bytes(t)], 0x5A);
    }
}

/* Every cell's level is the nearest one to the points inside it. */
static void test_cells(void **state)
{
    (void)state;
    static const int n_codes[] = { 256, 64, 16, 8 };
    for (size_t k = 0; k < COUNT(quantised); k++) {
        q3n__quantiser e;
        q3n__quantiser_make(&e, quantised[k]);
        for (int i = -4 * 150; i <= 4 * 150; i++) {
            const float v = (float)i / 4.0f + 0.1f;
            float nearest = 1e9f;
            for (int code = k == 0; code < n_codes[k]; code++) {
                const float level = (float)q3n__code_level(quantised[k], code);
                if (fabsf(level - v) < fabsf(nearest - v)) nearest = level;
            }
            assert_true(e.level[q3n__cell(v)] == nearest);
            assert_int_equal(q3n__code_level(quantised[k], e.code[q3n__cell(v)]), (int)nearest);
        }
    }
}

static void test_normal_weights(void **state)
{
    (void)state;
    static const double bound[] = { 0.00495, 0.0196, 0.0727, 0.1517 };
    const int rows = 256, cols = 512;
    for (int pass = 0; pass < 2; pass++) {         /* also with scales that are f16 denormals */
        float *x = normal_rows((int64_t)rows * cols, pass ? 0.0005 : 0.02);
        for (size_t k = 0; k < COUNT(quantised); k++) {
            size_t bytes;
            uint8_t *y = encode(quantised[k], x, rows, cols, NULL, &bytes);
            const double e = error_of(quantised[k], y, x, rows, cols, NULL);
            assert_true(e < bound[k] * (pass ? 1.05 : 1.0) && e > bound[k] * 0.95);
            free(y);
        }
        free(x);
    }
}

/* A fine search of scales leaves hardly less of the error (q8: a sixth less, of little). */
static void test_search(void **state)
{
    (void)state;
    for (size_t k = 0; k < COUNT(quantised); k++) {
        q3n__quantiser e;
        q3n__quantiser_make(&e, quantised[k]);
        double found = 0.0, least = 0.0;
        float one[Q3N__GROUP];
        for (int i = 0; i < Q3N__GROUP; i++) one[i] = 1.0f;
        for (int trial = 0; trial < 64; trial++) {
            float *x = normal_rows(Q3N__GROUP, 1.0), m = 0.0f;
            for (int i = 0; i < Q3N__GROUP; i++) if (fabsf(x[i]) > m) m = fabsf(x[i]);
            double best = 1e30, error = 0.0;
            for (int step = 0; step <= 2000; step++) {
                const float s = step == 2000 ? q3n__f16_to_f32(q3n__group_scale(&e, x, one))
                              : (step % 2 ? -m : m) * (0.7f + 0.0006f * (float)(step / 2))
                                / fabsf(e.divisor[0]);
                error = 0.0;
                for (int i = 0; i < Q3N__GROUP; i++) {
                    const double d = x[i] - s * e.level[q3n__cell(x[i] / s)];
                    error += d * d;
                }
                if (error < best) best = error;
            }
            found += error;
            least += best;
            free(x);
        }
        assert_true(found < (quantised[k] == Q3N_TYPE_Q8 ? 1.25 : 1.04) * least);
    }
}

static void test_shapes(void **state)
{
    (void)state;
    static const int shape[][2] = { { 1, 1 }, { 1, 31 }, { 15, 33 }, { 17, 64 }, { 16, 65 },
                                    { 33, 100 } };
    for (size_t k = 0; k < COUNT(quantised); k++)
        for (size_t i = 0; i < COUNT(shape); i++) {
            const int rows = shape[i][0], cols = shape[i][1];
            const q3n_type t = quantised[k];
            float *x = normal_rows((int64_t)rows * cols, 3.0);
            size_t bytes, again;
            uint8_t *y = encode(t, x, rows, cols, NULL, &bytes);
            assert_int_equal(bytes, (rows + 15) / 16 * 16 * ((cols + 63) / 64)
                                    * q3n__types[t].block_bytes);
            assert_true(error_of(t, y, x, rows, cols, NULL) < 0.25);
            float beyond[128];                  /* rows behind the last are zero */
            for (int r = rows; r < (rows + 15) / 16 * 16; r++) {
                q3n__dequantize_row(t, beyond, y, r, cols);
                for (int c = 0; c < cols; c++) assert_true(beyond[c] == 0.0f);
            }
            if (rows > 16) {                    /* in two pieces: the same bytes */
                uint8_t *a = encode(t, x, 16, cols, NULL, &again);
                assert_memory_equal(a, y, again);
                free(a);
                const size_t first = again;
                a = encode(t, x + 16 * cols, rows - 16, cols, NULL, &again);
                assert_memory_equal(a, y + first, again);
                free(a);
            }
            free(y);
            free(x);
        }
}

static void test_zeros_and_importance(void **state)
{
    (void)state;
    const int rows = 32, cols = 128;
    float *x = normal_rows((int64_t)rows * cols, 0.02), w[128], zero[128] = { 0 }, got[128];
    for (int c = 0; c < cols; c++) w[c] = c % 4 == 0 ? 50.0f : 0.1f;
    for (int c = 0; c < 32; c++) x[5 * cols + c] = 0.0f;
    for (size_t k = 0; k < COUNT(quantised); k++) {
        size_t bytes;
        uint8_t *plain = encode(quantised[k], x, rows, cols, NULL, &bytes);
        uint8_t *weighted = encode(quantised[k], x, rows, cols, w, &bytes);
        uint8_t *all_zero = encode(quantised[k], x, rows, cols, zero, &bytes);
        assert_true(error_of(quantised[k], weighted, x, rows, cols, w)
                    < 0.97 * error_of(quantised[k], plain, x, rows, cols, w));
        assert_memory_equal(plain, all_zero, bytes);
        q3n__dequantize_row(quantised[k], got, plain, 5, cols);
        for (int c = 0; c < 32; c++) assert_true(got[c] == 0.0f);
        free(plain);
        free(weighted);
        free(all_zero);
    }
    free(x);
}

static void test_errors(void **state)
{
    (void)state;
    float x[40] = { 0 }, w[40] = { 0 };
    uint8_t y[4096];
    q3n_error err;
    const q3n_rows r = { x, 1, 40, NULL }, weighted = { x, 1, 40, w };
    for (int t = 0; t < Q3N_TYPE_COUNT; t++) {
        const q3n_type type = (q3n_type)t;
        const size_t bytes = (size_t)q3n_type_bytes(type, 1, 40);
        assert_int_equal(q3n_quantize_rows(type, &r, y, bytes - 1, &err), Q3N_ERR_ARG);
        assert_non_null(strstr(err.message, "expected"));
        static const float values[] = { INFINITY, -INFINITY, NAN };
        for (size_t i = 0; i < COUNT(values) && q3n__is_quantised(type); i++) {
            x[35] = values[i];
            assert_int_equal(q3n_quantize_rows(type, &r, y, bytes, &err), Q3N_ERR_ARG);
            assert_non_null(strstr(err.message, "row 0, column 35"));
            assert_non_null(strstr(err.message, "not finite"));
        }
        x[35] = -3e38f;
        const int holds = type == Q3N_TYPE_F32 || type == Q3N_TYPE_BF16;
        assert_int_equal(q3n_quantize_rows(type, &r, y, bytes, &err), holds ? Q3N_OK : Q3N_ERR_ARG);
        if (!holds) assert_non_null(strstr(err.message, "column 35: -3e+38 is too large for "));
        x[35] = 0.0f;
        static const float bad[] = { -1.0f, NAN, INFINITY };
        for (size_t i = 0; i < COUNT(bad); i++) {
            w[3] = bad[i];
            assert_int_equal(q3n_quantize_rows(type, &weighted, y, bytes, &err), Q3N_ERR_ARG);
            assert_non_null(strstr(err.message, "importance of column 3"));
        }
        w[3] = 0.0f;
        assert_int_equal(q3n_quantize_rows(type, &weighted, y, bytes, &err), Q3N_OK);
    }
    assert_int_equal(q3n_quantize_rows(Q3N_TYPE_COUNT, &r, y, 1, &err), Q3N_ERR_ARG);
    assert_int_equal(q3n_quantize_rows(Q3N_TYPE_Q4, NULL, y, 1, &err), Q3N_ERR_ARG);
    assert_int_equal(q3n_type_bytes(Q3N_TYPE_Q4, 1, 0), 0);
    assert_int_equal(q3n_type_bytes(Q3N_TYPE_Q4, 0, 1), 0);
    assert_int_equal(q3n_type_bytes(Q3N_TYPE_Q4, INT64_MAX, INT64_MAX), 0);
    assert_int_equal(q3n_type_bytes(Q3N_TYPE_Q4, 17, 65), 32 * 2 * 36);
    assert_int_equal(q3n_type_bytes(Q3N_TYPE_F32, 17, 65), 17 * 65 * 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_codes_in_and_out),
        cmocka_unit_test(test_cells),
        cmocka_unit_test(test_normal_weights),
        cmocka_unit_test(test_search),
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_zeros_and_importance),
        cmocka_unit_test(test_errors),
    };
    return cmocka_run_group_tests_name("quantise", tests, NULL, NULL);
}
