/* test_quantize.c - rows of floats to quantised types: codes in and out, errors of normal weights
 * for every type, zeros, odd shapes and places, importance, values that cannot be encoded; copies
 * of whole models by every recipe, for any number of threads, stopped and failing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#define Q3N_MAKE_IMPLEMENTATION
#include "q3n_make.h"
#include "failing.h"
#include "folder.h"
#include "read.h"

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

/* Write a code into a group that was zero there: from the file format, apart from the encoder. */
static void put_code(q3n_type t, uint8_t *group, int r, int c, int code)
{
    const int s = c / 4, b = 4 * r + c % 4, pair = 2 * (s % 4);
    switch (t) {
    case Q3N_TYPE_Q8: group[64 * s + b] = (uint8_t)code; break;
    case Q3N_TYPE_Q6:
        group[64 * (s % 4) + b] |= (uint8_t)((code & 15) << 4 * (s / 4));
        group[256 + 64 * (s / 4) + b] |= (uint8_t)(code >> 4 << pair);
        break;
    case Q3N_TYPE_Q4: group[64 * (s % 4) + b] |= (uint8_t)(code << 4 * (s / 4)); break;
    case Q3N_TYPE_Q3:
        group[64 * (s / 4) + b] |= (uint8_t)((code & 3) << pair);
        group[128 + b] |= (uint8_t)(code >> 2 << s);
        break;
    default: break;
    }
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
                put_code(t, group, r, c, want[r][c]);
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
        double found = 0.0, min = 0.0;
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
            min += best;
            free(x);
        }
        assert_true(found < (quantised[k] == Q3N_TYPE_Q8 ? 1.25 : 1.04) * min);
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
            float beyond[128];                  /* rows after the last are zero */
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

/* The place for the bytes may have any alignment: a sanitizer sees what a processor forgives. */
static void test_any_place(void **state)
{
    (void)state;
    enum { ROWS = 17, COLS = 67 };
    float *x = normal_rows(ROWS * COLS, 0.02);
    for (int t = 0; t < Q3N_TYPE_COUNT; t++) {
        const q3n_rows r = { x, ROWS, COLS, NULL };
        size_t bytes;
        uint8_t *want = encode((q3n_type)t, x, ROWS, COLS, NULL, &bytes);
        uint8_t *y = malloc(bytes + 8);
        assert_non_null(y);
        for (size_t at = 0; at < 8; at++) {
            memset(y, 0xA5, bytes + 8);
            assert_int_equal(q3n_quantize_rows((q3n_type)t, &r, y + at, bytes, NULL), Q3N_OK);
            assert_memory_equal(y + at, want, bytes);
            for (size_t i = 0; i < 8; i++) assert_int_equal(y[i < at ? i : bytes + i], 0xA5);
        }
        free(y);
        free(want);
    }
    free(x);
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
        for (size_t i = 0; i < COUNT(values); i++) {
            x[35] = values[i];
            assert_int_equal(q3n_quantize_rows(type, &r, y, bytes, &err), Q3N_ERR_ARG);
            assert_non_null(strstr(err.message, "row 0, column 35"));
            assert_non_null(strstr(err.message, "not finite"));
        }
        x[35] = -3e38f;
        const int holds = type == Q3N_TYPE_F32 || type == Q3N_TYPE_BF16;
        assert_int_equal(q3n_quantize_rows(type, &r, y, bytes, &err), holds ? Q3N_OK : Q3N_ERR_ARG);
        if (!holds) assert_non_null(strstr(err.message, "column 35: -3e+38 is too large for "));
        x[35] = FLT_MAX;                                 /* bf16 would round it to infinity */
        assert_int_equal(q3n_quantize_rows(type, &r, y, bytes, &err),
                         type == Q3N_TYPE_F32 ? Q3N_OK : Q3N_ERR_ARG);
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

/* ---- Copies of models ---- */
static char path[400];

static int name_files(void **state)
{
    (void)state;
    if (make_folder("quantize") != 0) return -1;
    in_folder(path, "x.q3n");
    return 0;
}

/* A small model in memory: attention, DeltaNet, experts, dense, MTP, odd lengths. */
static q3n_model *open_small(q3n_type type, uint8_t **memory)
{
    static const char *const sets[][2] = {
        { "vocab", "301" }, { "hidden", "40" }, { "layers", "4" }, { "layer_types", "1,0" },
        { "layer_experts", "1,1,0,0" }, { "heads", "4" }, { "kv_heads", "2" }, { "head_dim", "6" },
        { "rotary_dim", "2" }, { "intermediate_size", "70" }, { "experts", "3" }, { "top_k", "2" },
        { "moe_intermediate_size", "33" }, { "shared_expert_intermediate_size", "17" },
        { "linear_num_key_heads", "2" }, { "linear_num_value_heads", "4" },
        { "linear_key_head_dim", "3" }, { "linear_value_head_dim", "5" }, { "num_mtp_layers", "1" }
    };
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_model *m;
    q3n_error err = { Q3N_OK, -1, "" };
    const q3n_init_options o = { .size = sizeof o, .type = type, .name = "small", .n_threads = 1 };
    assert_int_equal(q3n_config_preset("g1", &c, NULL), Q3N_OK);
    for (size_t i = 0; i < COUNT(sets); i++)
        assert_int_equal(q3n_config_set(&c, sets[i][0], sets[i][1], &err), Q3N_OK);
    const size_t bytes = (size_t)q3n_init_bytes(&c, &o, &err);
    *memory = q3n__alloc(NULL, bytes);
    assert_non_null(*memory);
    assert_int_equal(q3n_init_memory(*memory, bytes, &c, &o, &err), Q3N_OK);
    assert_int_equal(q3n_model_open_memory(&m, *memory, bytes, NULL, &err), Q3N_OK);
    return m;
}

static void close_small(q3n_model *m, uint8_t *memory)
{
    q3n_model_close(m);
    q3n__free(NULL, memory);
}

static q3n_tensor tensor_of(const q3n_model *m, const char *name)
{
    const q3n_tensor *t = q3n_model_find_tensor(m, name);
    if (!t) fail_msg("no tensor %s", name);
    return *t;
}

static q3n_type type_of(const q3n_model *m, const char *name)
{
    return tensor_of(m, name).type;
}

static void test_recipes(void **state)
{
    (void)state;
    static const struct { const char *name; q3n_type experts, other, sensitive, ends, router; }
    want[] = {
        { "q8",   Q3N_TYPE_Q8, Q3N_TYPE_Q8, Q3N_TYPE_Q8, Q3N_TYPE_Q8, Q3N_TYPE_BF16 },
        { "q6",   Q3N_TYPE_Q6, Q3N_TYPE_Q6, Q3N_TYPE_Q6, Q3N_TYPE_Q6, Q3N_TYPE_BF16 },
        { "q4",   Q3N_TYPE_Q4, Q3N_TYPE_Q4, Q3N_TYPE_Q6, Q3N_TYPE_Q6, Q3N_TYPE_BF16 },
        { "q4m",  Q3N_TYPE_Q4, Q3N_TYPE_Q6, Q3N_TYPE_Q6, Q3N_TYPE_Q6, Q3N_TYPE_BF16 },
        { "q4l",  Q3N_TYPE_Q4, Q3N_TYPE_Q8, Q3N_TYPE_Q8, Q3N_TYPE_Q8, Q3N_TYPE_BF16 },
        { "q3",   Q3N_TYPE_Q3, Q3N_TYPE_Q6, Q3N_TYPE_Q6, Q3N_TYPE_Q6, Q3N_TYPE_BF16 },
        { "bf16", Q3N_TYPE_BF16, Q3N_TYPE_BF16, Q3N_TYPE_BF16, Q3N_TYPE_BF16, Q3N_TYPE_BF16 },
        { "f16",  Q3N_TYPE_F16, Q3N_TYPE_F16, Q3N_TYPE_F16, Q3N_TYPE_F16, Q3N_TYPE_F16 },
        { "f32",  Q3N_TYPE_F32, Q3N_TYPE_F32, Q3N_TYPE_F32, Q3N_TYPE_F32, Q3N_TYPE_F32 }
    };
    uint8_t *memory;
    q3n_model *in = open_small(Q3N_TYPE_BF16, &memory), *m;
    q3n_error err = { Q3N_OK, -1, "" };
    for (size_t i = 0; i < COUNT(want); i++) {
        assert_string_equal(q3n_recipe_name((int)i), want[i].name);
        const q3n_quantize_options o = { .size = sizeof o, .recipe = want[i].name };
        assert_int_equal(q3n_quantize_file(path, in, &o, &err), Q3N_OK);
        assert_int_equal(q3n_model_open(&m, path, NULL, &err), Q3N_OK);
        assert_int_equal(q3n_model_verify(m, NULL, &err), Q3N_OK);
        assert_string_equal(q3n_model_name(m), "small");
        assert_memory_equal(q3n_model_config(m), q3n_model_config(in), sizeof(q3n_config));
        assert_int_equal(type_of(m, "layers.0.mlp.experts.down_proj.weight"), want[i].experts);
        assert_int_equal(type_of(m, "layers.1.mlp.shared_expert.up_proj.weight"), want[i].other);
        assert_int_equal(type_of(m, "layers.2.mlp.up_proj.weight"), want[i].other);
        assert_int_equal(type_of(m, "layers.1.self_attn.k_proj.weight"), want[i].other);
        assert_int_equal(type_of(m, "layers.1.self_attn.v_proj.weight"), want[i].sensitive);
        assert_int_equal(type_of(m, "layers.0.linear_attn.out_proj.weight"), want[i].sensitive);
        assert_int_equal(type_of(m, "layers.0.linear_attn.in_proj_ba.weight"), want[i].router);
        assert_int_equal(type_of(m, "layers.0.mlp.gate.weight"), want[i].router);
        assert_int_equal(type_of(m, "embed_tokens.weight"), want[i].ends);
        assert_int_equal(type_of(m, "lm_head.weight"), want[i].ends);
        assert_int_equal(type_of(m, "mtp.fc.weight"), want[i].ends);
        assert_int_equal(type_of(m, "mtp.layers.0.mlp.experts.up_proj.weight"), want[i].ends);
        assert_int_equal(type_of(m, "norm.weight"), Q3N_TYPE_F32);
        q3n_model_close(m);
    }
    assert_null(q3n_recipe_name((int)COUNT(want)));
    assert_null(q3n_recipe_name(-1));
    close_small(in, memory);
}

/* Every slice is what q3n_quantize_rows makes of it, and threads change nothing. */
static void test_bytes_of_copies(void **state)
{
    (void)state;
    uint8_t *memory, *first = NULL;
    size_t first_bytes = 0;
    q3n_model *in = open_small(Q3N_TYPE_F32, &memory), *m;
    q3n_error err = { Q3N_OK, -1, "" };
    for (int threads = 1; threads < 6; threads += 2) {
        const q3n_quantize_options o = { .size = sizeof o, .recipe = "q3", .n_threads = threads };
        assert_int_equal(q3n_quantize_file(path, in, &o, &err), Q3N_OK);
        size_t bytes;
        uint8_t *data = read_file(path, &bytes);
        if (first) assert_true(bytes == first_bytes && memcmp(data, first, bytes) == 0);
        free(first);
        first = data;
        first_bytes = bytes;
    }
    free(first);
    assert_int_equal(q3n_model_open(&m, path, NULL, &err), Q3N_OK);
    for (int i = 0; i < q3n_model_n_tensors(m); i++) {
        const q3n_tensor b = *q3n_model_tensor(m, i), a = tensor_of(in, b.name);
        const int64_t slices = b.n_dims == 3 ? b.dim[0] : 1;
        const int64_t rows = b.n_dims == 1 ? 1 : b.dim[b.n_dims - 2], cols = b.dim[b.n_dims - 1];
        for (int64_t e = 0; e < slices; e++) {
            size_t bytes;
            uint8_t *y = encode(b.type, (const float *)((const uint8_t *)a.data
                                                        + (size_t)e * a.stride),
                                rows, cols, NULL, &bytes);
            assert_memory_equal(y, (const uint8_t *)b.data + (size_t)e * b.stride, bytes);
            free(y);
        }
    }
    q3n_model_close(m);
    close_small(in, memory);
}

static void test_requantize(void **state)
{
    (void)state;
    uint8_t *memory;
    q3n_model *in = open_small(Q3N_TYPE_Q8, &memory), *m;
    q3n_error err = { Q3N_OK, -1, "" };
    q3n_quantize_options o = { .size = sizeof o, .recipe = "q4" };
    assert_int_equal(q3n_quantize_file(path, in, &o, &err), Q3N_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "embed_tokens.weight is quantised already"));
    assert_int_equal(count_files(NULL), 0);
    o.recipe = "q8";                    /* a copy */
    assert_int_equal(q3n_quantize_file(path, in, &o, &err), Q3N_OK);
    size_t bytes;
    uint8_t *data = read_file(path, &bytes);
    assert_int_equal(bytes, in->bytes);
    assert_memory_equal(data, memory, bytes);
    free(data);
    o.recipe = "f32";
    o.allow_requantize = 1;
    assert_int_equal(q3n_quantize_file(path, in, &o, &err), Q3N_OK);
    assert_int_equal(q3n_model_open(&m, path, NULL, &err), Q3N_OK);
    const q3n_tensor a = tensor_of(in, "layers.1.mlp.experts.down_proj.weight");
    const q3n_tensor b = tensor_of(m, "layers.1.mlp.experts.down_proj.weight");
    float x[33];
    for (int r = 0; r < 40; r++) {
        q3n__dequantize_row(Q3N_TYPE_Q8, x, (const uint8_t *)a.data + 2 * a.stride, r, 33);
        assert_memory_equal(x, (const uint8_t *)b.data + 2 * b.stride + (size_t)r * 33 * 4, 33 * 4);
    }
    q3n_model_close(m);
    close_small(in, memory);
}

static const float *some_importance(void *user, const q3n_tensor *t)
{
    return strcmp(t->name, "layers.1.self_attn.o_proj.weight") == 0 ? user : NULL;
}

static void test_importance_of_tensors(void **state)
{
    (void)state;
    uint8_t *memory;
    float w[24];
    q3n_model *in = open_small(Q3N_TYPE_F32, &memory), *plain, *m;
    q3n_error err = { Q3N_OK, -1, "" };
    q3n_quantize_options o = { .size = sizeof o,
                               .importance = some_importance, .importance_user = w };
    char other[400];                    /* Windows does not replace a file that is open */
    in_folder(other, "plain.q3n");
    for (int i = 0; i < 24; i++) w[i] = i < 4 ? 100.0f : 0.01f;
    assert_int_equal(q3n_quantize_file(other, in, NULL, &err), Q3N_OK);
    assert_int_equal(q3n_model_open(&plain, other, NULL, &err), Q3N_OK);
    assert_int_equal(q3n_quantize_file(path, in, &o, &err), Q3N_OK);
    assert_int_equal(q3n_model_open(&m, path, NULL, &err), Q3N_OK);
    for (int i = 0; i < q3n_model_n_tensors(m); i++) {
        const q3n_tensor a = *q3n_model_tensor(plain, i), b = *q3n_model_tensor(m, i);
        const int differs = memcmp(a.data, b.data, (size_t)a.bytes / (a.n_dims == 3 ? 3 : 1)) != 0;
        assert_int_equal(differs, strcmp(a.name, "layers.1.self_attn.o_proj.weight") == 0);
    }
    q3n_model_close(m);
    q3n_model_close(plain);
    w[7] = -1.0f;
    assert_int_equal(q3n_quantize_file(path, in, &o, &err), Q3N_ERR_ARG);
    assert_non_null(strstr(err.message, "o_proj.weight: importance of column 7"));
    close_small(in, memory);
}

static int stop_at(void *user, int64_t done, int64_t total)
{
    (void)total;
    return done > *(int64_t *)user;
}

static void test_stopped_and_failing(void **state)
{
    (void)state;
    uint8_t *memory;
    q3n_model *in = open_small(Q3N_TYPE_F32, &memory);
    q3n_error err = { Q3N_OK, -1, "" };
    int64_t at;
    q3n_quantize_options o = { .size = sizeof o, .progress = { stop_at, &at }, .n_threads = 2 };
    for (at = 0; at < 100000; at += 30000) {
        assert_int_equal(q3n_quantize_file(path, in, &o, &err), Q3N_ERR_CANCELLED);
        assert_int_equal(count_files(NULL), 0);
    }
    counter k = { 0, 0, 0 };
    o = (q3n_quantize_options){ .size = sizeof(q3n_quantize_options),
                                .allocator = { failing_alloc, counted_free, &k } };
    for (;; k.fail_at++) {
        k.calls = 0;
        const q3n_result r = q3n_quantize_file(path, in, &o, &err);
        assert_int_equal(k.live, 0);
        if (r == Q3N_OK) break;
        assert_int_equal(r, Q3N_ERR_MEMORY);
        assert_int_equal(count_files(NULL), 0);
    }
    assert_true(k.fail_at >= 8);
    remove(path);
    o = (q3n_quantize_options){ .size = sizeof(q3n_quantize_options), .recipe = "q5" };
    assert_int_equal(q3n_quantize_file(path, in, &o, &err), Q3N_ERR_ARG);
    assert_non_null(strstr(err.message, "'q5'"));
    assert_int_equal(q3n_quantize_file("build/no/such/x.q3n", in, NULL, &err), Q3N_ERR_IO);
    assert_int_equal(q3n_quantize_file(NULL, in, NULL, &err), Q3N_ERR_ARG);
    /* A weight that is none, in the last expert. */
    const q3n_tensor t = tensor_of(in, "layers.0.mlp.experts.down_proj.weight");
    const float nan = NAN;
    memcpy(memory + t.offset + 2 * (int64_t)t.stride + 4 * (39 * 33 + 32), &nan, sizeof nan);
    for (int threads = 1; threads < 4; threads++) {
        o = (q3n_quantize_options){ .size = sizeof(q3n_quantize_options), .n_threads = threads };
        assert_int_equal(q3n_quantize_file(path, in, &o, &err), Q3N_ERR_ARG);
        assert_non_null(strstr(err.message,
                               "layers.0.mlp.experts.down_proj.weight: row 39, column 32"));
        assert_int_equal(count_files(NULL), 0);
    }
    const float zero = 0.0f, inf = INFINITY;
    memcpy(memory + t.offset + 2 * (int64_t)t.stride + 4 * (39 * 33 + 32), &zero, sizeof zero);
    static const char *const copied[] = { "layers.0.input_layernorm.weight",
                                          "layers.0.mlp.gate.weight", "embed_tokens.weight" };
    for (size_t i = 0; i < COUNT(copied); i++) {         /* what no recipe changes is looked at */
        const q3n_tensor other = tensor_of(in, copied[i]);
        memcpy(memory + other.offset + 12, &inf, sizeof inf);
        o = (q3n_quantize_options){ .size = sizeof(q3n_quantize_options), .recipe = "f32" };
        assert_int_equal(q3n_quantize_file(path, in, &o, &err), Q3N_ERR_ARG);
        assert_non_null(strstr(err.message, copied[i]));
        assert_non_null(strstr(err.message, "row 0, column 3: inf cannot be quantised: it is not"));
        memcpy(memory + other.offset + 12, &zero, sizeof zero);
    }
    close_small(in, memory);
}

#define FILE_TEST(f) cmocka_unit_test_setup_teardown(f, NULL, empty_folder)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_codes_in_and_out),
        cmocka_unit_test(test_cells),
        cmocka_unit_test(test_normal_weights),
        cmocka_unit_test(test_search),
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_any_place),
        cmocka_unit_test(test_zeros_and_importance),
        cmocka_unit_test(test_errors),
        FILE_TEST(test_recipes), FILE_TEST(test_bytes_of_copies), FILE_TEST(test_requantize),
        FILE_TEST(test_importance_of_tensors), FILE_TEST(test_stopped_and_failing)
    };
    return cmocka_run_group_tests_name("quantize", tests, name_files, remove_folder);
}
