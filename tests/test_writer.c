/* test_writer.c - files written by q3n_init_file and the writer under it, read back byte by byte
 * without the loader: layout, checksums, configuration; the same bytes on every machine; how the
 * random weights are distributed; stopped and failing runs leave nothing after. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <signal.h>
#include <sys/resource.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#define Q3N_MAKE_IMPLEMENTATION
#include "q3n_make.h"
#include "failing.h"
#include "folder.h"
#include "read.h"

#define COUNT(a) (sizeof(a) / sizeof(a)[0])

static char path[400];            /* of the file that a test writes, alone in its folder */

static int name_files(void **state)
{
    (void)state;
    if (make_folder("writer") != 0) return -1;
    in_folder(path, "x.q3n");
    return 0;
}

/* ---- Reading back: plain code for the FILE FORMAT comment ---- */
static uint64_t number(const uint8_t *p, int bytes)
{
    uint64_t v = 0;
    for (int i = 0; i < bytes; i++) v |= (uint64_t)p[i] << (8 * i);
    return v;
}

static uint32_t plain_crc(uint32_t crc, const uint8_t *p, size_t bytes)   /* bit by bit */
{
    crc = ~crc;
    for (size_t i = 0; i < bytes; i++) {
        crc ^= p[i];
        for (int k = 0; k < 8; k++) crc = crc & 1 ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
    }
    return ~crc;
}

typedef struct {
    char     name[256];
    int      type, n_dims;
    int64_t  dim[3], offset, slice_bytes, stride;
    uint32_t crc;
} record;

typedef struct {
    uint8_t *data;
    size_t   bytes, meta_bytes;
    struct { size_t offset, bytes; uint32_t flags; } section[5];
    int      n_sections, n_tensors;
    record  *tensors;
    uint8_t *covered;   /* [bytes] 1 = metadata or tensor data */
} parsed;

static void cover(parsed *f, size_t from, size_t bytes)
{
    assert_true(from + bytes <= f->bytes);
    for (size_t i = from; i < from + bytes; i++) {
        assert_int_equal(f->covered[i], 0);   /* nothing lies on anything */
        f->covered[i] = 1;
    }
}

static void parse_header(parsed *f)
{
    static const uint8_t magic[8] = { 0x89, 0x51, 0x33, 0x4E, 0x0D, 0x0A, 0x1A, 0x0A };
    const uint8_t *p = f->data;
    assert_true(f->bytes > 64);
    assert_memory_equal(p, magic, 8);
    assert_int_equal(number(p + 8, 4), 1);
    f->n_sections = (int)number(p + 12, 4);
    assert_in_range(f->n_sections, 3, 4);
    assert_int_equal(number(p + 16, 8), f->bytes);
    f->meta_bytes = number(p + 24, 8);
    assert_true(f->meta_bytes <= f->bytes);
    for (int i = 36; i < 64; i++) assert_int_equal(p[i], 0);
    const uint32_t crc = (uint32_t)number(p + 32, 4);
    memset(f->data + 32, 0, 4);
    assert_int_equal(plain_crc(0, p, f->meta_bytes), crc);
    size_t end = 64 + 32 * (size_t)f->n_sections;
    for (int i = 0; i < f->n_sections; i++) {
        const uint8_t *s = p + 64 + 32 * i;
        const int kind = (int)number(s, 4);
        assert_int_equal(kind, i + 1);
        f->section[kind].flags = (uint32_t)number(s + 4, 4);
        f->section[kind].offset = number(s + 8, 8);
        f->section[kind].bytes = number(s + 16, 8);
        assert_int_equal(number(s + 24, 8), 0);
        assert_int_equal(f->section[kind].offset, (end + 7) / 8 * 8);
        end = f->section[kind].offset + f->section[kind].bytes;
    }
    assert_int_equal(f->meta_bytes, (end + 7) / 8 * 8);
    cover(f, 0, f->meta_bytes);
}

static void parse_tensors(parsed *f)
{
    const uint8_t *p = f->data + f->section[2].offset;
    const uint8_t *names = f->data + f->section[3].offset;
    size_t name_offset = 0;
    f->n_tensors = (int)number(p, 4);
    assert_int_equal(number(p + 4, 4), 80);
    assert_int_equal(f->section[2].bytes, 8 + 80 * (size_t)f->n_tensors);
    f->tensors = calloc((size_t)f->n_tensors, sizeof *f->tensors);
    assert_non_null(f->tensors);
    for (int i = 0; i < f->n_tensors; i++) {
        const uint8_t *r = p + 8 + 80 * i;
        record *t = &f->tensors[i];
        const size_t name_bytes = number(r + 4, 4);
        assert_int_equal(number(r, 4), name_offset);
        assert_in_range(name_bytes, 1, 255);
        memcpy(t->name, names + name_offset, name_bytes);
        name_offset += name_bytes;
        t->type = (int)number(r + 8, 4);
        t->n_dims = (int)number(r + 12, 4);
        for (int k = 0; k < 3; k++) t->dim[k] = (int64_t)number(r + 16 + 8 * k, 8);
        for (int k = t->n_dims; k < 3; k++) assert_true(t->dim[k] == 1);
        t->offset = (int64_t)number(r + 40, 8);
        t->slice_bytes = (int64_t)number(r + 48, 8);
        t->stride = (int64_t)number(r + 56, 8);
        t->crc = (uint32_t)number(r + 64, 4);
        for (int k = 68; k < 80; k++) assert_int_equal(r[k], 0);
    }
    assert_int_equal(f->section[3].bytes, name_offset);
}

/* Sizes, alignment, checksums, and that what no tensor covers is zero. */
static void check_data(parsed *f)
{
    for (int i = 0; i < f->n_tensors; i++) {
        const record *t = &f->tensors[i];
        static const int64_t of_64[] = { 256, 128, 128, 68, 52, 36, 28 };    /* bytes */
        const int64_t *d = t->n_dims == 3 ? t->dim + 1 : t->dim;
        const int64_t rows = t->n_dims == 1 ? 1 : d[0], cols = t->n_dims == 1 ? d[0] : d[1];
        const int64_t want = t->type < 3 ? rows * cols * of_64[t->type] / 64
                           : (rows + 15) / 16 * 16 * ((cols + 63) / 64) * of_64[t->type];
        const int64_t slices = t->n_dims == 3 ? t->dim[0] : 1;
        uint32_t crc = 0;
        assert_true(t->slice_bytes == want);
        assert_true(t->offset % 64 == 0);
        assert_true(t->n_dims == 3 ? t->stride % 4096 == 0 && t->stride > 0 : t->stride == 0);
        for (int64_t e = 0; e < slices; e++) {
            const size_t at = (size_t)(t->offset + e * t->stride);
            cover(f, at, (size_t)t->slice_bytes);
            crc = plain_crc(crc, f->data + at, (size_t)t->slice_bytes);
        }
        assert_int_equal(crc, t->crc);
        if (!strstr(t->name, "experts.gate_proj.weight")) continue;
        assert_true(t->offset % 4096 == 0 && t[1].stride == t->stride && t[2].stride == t->stride);
        assert_true(t[1].offset == t->offset + (t->slice_bytes + 63) / 64 * 64);
        assert_true(t[2].offset == t[1].offset + (t[1].slice_bytes + 63) / 64 * 64);
        assert_true(t[2].offset + t[2].slice_bytes <= t->offset + t->stride);
    }
    for (size_t i = 0; i < f->bytes; i++) if (!f->covered[i]) assert_int_equal(f->data[i], 0);
}

static parsed parse_file(void)
{
    parsed f;
    memset(&f, 0, sizeof f);
    f.data = read_file(path, &f.bytes);
    f.covered = calloc(f.bytes, 1);
    assert_non_null(f.covered);
    parse_header(&f);
    parse_tensors(&f);
    check_data(&f);
    return f;
}

static void free_parsed(parsed *f)
{
    free(f->data);
    free(f->covered);
    free(f->tensors);
}

static const record *find(const parsed *f, const char *name)
{
    for (int i = 0; i < f->n_tensors; i++)
        if (strcmp(f->tensors[i].name, name) == 0) return &f->tensors[i];
    fail_msg("no tensor %s", name);
    return NULL;
}

/* The value of a configuration key; NULL = not there.  *n is its number of bytes. */
static const uint8_t *config_value(const parsed *f, const char *key, int type, size_t *n)
{
    const uint8_t *p = f->data + f->section[1].offset, *end = p + f->section[1].bytes;
    const uint8_t *found = NULL;
    while (p < end) {
        const size_t key_bytes = p[0], value_bytes = number(p + 4, 4);
        const size_t step = (8 + key_bytes + value_bytes + 7) / 8 * 8;
        assert_true(key_bytes > 0 && step <= (size_t)(end - p));
        assert_int_equal(number(p + 2, 2), 0);
        for (size_t i = 8 + key_bytes + value_bytes; i < step; i++) assert_int_equal(p[i], 0);
        if (key_bytes == strlen(key) && memcmp(p + 8, key, key_bytes) == 0) {
            assert_null(found);   /* once */
            assert_int_equal(p[1], type);
            found = p + 8 + key_bytes;
            *n = value_bytes;
        }
        p += step;
    }
    return found;
}

/* ---- Geometries ---- */
static void set(q3n_config *c, const char *field, const char *value)
{
    q3n_error err = { .code = Q3N_OK };
    if (q3n_config_set(c, field, value, &err) != Q3N_OK) fail_msg("%s", err.message);
}

/* DeltaNet and attention, experts and dense, MTP, lengths that are not round. */
static q3n_config small_model(void)
{
    q3n_config c = Q3N_INIT(q3n_config);
    assert_int_equal(q3n_config_preset("g1", &c, NULL), Q3N_OK);
    static const char *const sets[][2] = {
        { "vocab", "301" }, { "hidden", "24" }, { "layers", "4" }, { "layer_types", "1,0" },
        { "layer_experts", "1,1,0,0" }, { "heads", "4" }, { "kv_heads", "2" }, { "head_dim", "6" },
        { "rotary_dim", "2" }, { "intermediate_size", "10" }, { "experts", "3" }, { "top_k", "2" },
        { "moe_intermediate_size", "5" }, { "shared_expert_intermediate_size", "7" },
        { "linear_num_key_heads", "2" }, { "linear_num_value_heads", "4" },
        { "linear_key_head_dim", "3" }, { "linear_value_head_dim", "5" }, { "num_mtp_layers", "1" },
        { "rope_theta", "12345.5" }, { "context", "77" }
    };
    for (size_t i = 0; i < COUNT(sets); i++) set(&c, sets[i][0], sets[i][1]);
    return c;
}

static void init_file(const q3n_config *c, const q3n_init_options *o)
{
    q3n_error err = { .code = Q3N_OK };
    if (q3n_init_file(path, c, o, &err) != Q3N_OK) fail_msg("%s", err.message);
    assert_int_equal(count_files(NULL), 1);
}

static void check_open(const q3n_config *c, const char *name)
{
    q3n_model *m;
    q3n_error err = { .code = Q3N_OK };
    if (q3n_model_open(&m, path, NULL, &err) != Q3N_OK) fail_msg("%s", err.message);
    if (q3n_model_verify(m, NULL, &err) != Q3N_OK) fail_msg("%s", err.message);
    assert_string_equal(q3n_model_name(m), name);
    assert_memory_equal(q3n_model_config(m), c, sizeof *c);
    q3n_model_close(m);
}

/* ---- Files ---- */
static void test_layout(void **state)
{
    (void)state;
    const q3n_config c = small_model();
    static const q3n_type types[] = { Q3N_TYPE_F32, Q3N_TYPE_F16, Q3N_TYPE_BF16 };
    for (size_t k = 0; k < COUNT(types); k++) {
        const q3n_init_options o = { .size = sizeof o, .type = types[k], .name = "a small one" };
        init_file(&c, &o);
        parsed f = parse_file();
        assert_int_equal(f.n_sections, 3);
        for (int kind = 1; kind <= 3; kind++) assert_int_equal(f.section[kind].flags, 1);
        assert_int_equal(f.n_tensors, 79);
        assert_int_equal(find(&f, "embed_tokens.weight")->type, types[k]);
        assert_int_equal(find(&f, "layers.0.mlp.experts.up_proj.weight")->type, types[k]);
        assert_int_equal(find(&f, "layers.0.mlp.gate.weight")->type, types[k]);
        assert_int_equal(find(&f, "layers.0.linear_attn.conv1d.weight")->type, Q3N_TYPE_F32);
        assert_int_equal(find(&f, "mtp.norm.weight")->type, Q3N_TYPE_F32);
        free_parsed(&f);
        check_open(&c, "a small one");
    }
}

static void test_config_entries(void **state)
{
    (void)state;
    const q3n_config c = small_model();
    init_file(&c, NULL);
    parsed f = parse_file();
    size_t n;
    const uint8_t *v = config_value(&f, "family", 3, &n);
    assert_non_null(v);
    assert_int_equal(n, 10);
    assert_memory_equal(v, "qwen3_next", 10);
    v = config_value(&f, "vocab_size", 1, &n);
    assert_non_null(v);
    assert_int_equal(number(v, 8), 301);
    v = config_value(&f, "rope_theta", 2, &n);
    assert_non_null(v);
    double theta;
    memcpy(&theta, v, 8);
    assert_true(n == 8 && theta == 12345.5);
    v = config_value(&f, "layer_types", 1, &n);
    assert_non_null(v);
    assert_int_equal(n, 4 * 8);
    for (int l = 0; l < 4; l++) assert_int_equal(number(v + 8 * l, 8), l % 2 == 0);
    v = config_value(&f, "layer_experts", 1, &n);
    assert_non_null(v);
    for (int l = 0; l < 4; l++) assert_int_equal(number(v + 8 * l, 8), l < 2);
    assert_null(config_value(&f, "name", 3, &n));
    static const char *const fields[] = {
#define Q3N__X(kind, name, min, max) #name,
        Q3N_CONFIG_LIST(Q3N__X)
#undef Q3N__X
    };
    for (size_t i = 0; i < COUNT(fields); i++) {
        const char kind = q3n__config_find(fields[i])->kind;
        assert_non_null(config_value(&f, fields[i], kind == 'F' ? 2 : kind == 'E' ? 3 : 1, &n));
    }
    free_parsed(&f);
}

/* Every preset family at toy size, and what is optional or absent. */
static void test_other_geometries(void **state)
{
    (void)state;
    static const char *const presets[] = { "tiny", "qwen3-0.6b", "qwen3-30b-a3b", "qwen3.5-2b" };
    static const char *const sets[][2] = {
        { "vocab", "33" }, { "hidden", "8" }, { "layers", "4" }, { "heads", "2" },
        { "kv_heads", "1" }, { "head_dim", "8" }, { "rotary_dim", "4" }, { "context", "9" },
        { "linear_num_key_heads", "1" }, { "linear_num_value_heads", "2" },
        { "linear_key_head_dim", "4" }, { "linear_value_head_dim", "4" }
    };
    for (size_t p = 0; p < COUNT(presets); p++) {
        q3n_config c = Q3N_INIT(q3n_config);
        assert_int_equal(q3n_config_preset(presets[p], &c, NULL), Q3N_OK);
        for (size_t i = 0; i < COUNT(sets); i++) set(&c, sets[i][0], sets[i][1]);
        if (c.num_experts > 0) set(&c, "experts", "9");
        if (c.num_experts > 0) set(&c, "moe_intermediate_size", "6");
        if (c.intermediate_size > 0) set(&c, "intermediate_size", "12");
        init_file(&c, NULL);
        parsed f = parse_file();
        free_parsed(&f);
        check_open(&c, "");
    }
}

static void test_rope_tables_and_score(void **state)
{
    (void)state;
    q3n_config c = small_model();
    set(&c, "layer_types", "0");
    set(&c, "rope_type", "table");
    set(&c, "rotary_dim", "6");
    set(&c, "num_labels", "4");
    set(&c, "attention_bias", "1");
    init_file(&c, NULL);
    parsed f = parse_file();
    const record *cosines = find(&f, "rope.cos"), *sines = find(&f, "rope.sin");
    assert_true(cosines->dim[0] == 77 && cosines->dim[1] == 3);
    for (int pos = 0; pos < 77; pos++)
        for (int j = 0; j < 3; j++) {
            const double angle = pos * pow(12345.5, -2.0 * j / 6);
            float got[2];
            memcpy(&got[0], f.data + cosines->offset + 4 * (3 * pos + j), 4);
            memcpy(&got[1], f.data + sines->offset + 4 * (3 * pos + j), 4);
            assert_true(fabs(got[0] - cos(angle)) < 1e-6 && fabs(got[1] - sin(angle)) < 1e-6);
        }
    assert_true(find(&f, "score.weight")->dim[0] == 4);
    const record *bias = find(&f, "layers.1.self_attn.q_proj.bias");
    for (int i = 0; i < 48 * 4; i++) assert_int_equal(f.data[bias->offset + i], 0);
    for (int i = 0; i < f.n_tensors; i++)   /* optional ones are not made */
        assert_true(strcmp(f.tensors[i].name, "lm_head.weight") != 0
                    && strcmp(f.tensors[i].name, "score.bias") != 0);
    free_parsed(&f);
    check_open(&c, "");
}

/* ---- The same bytes everywhere ---- */

/* One number for all tensor data. */
static uint32_t data_crc(const q3n_config *c, q3n_type type, uint64_t seed)
{
    uint32_t crc = 0;
    init_file(c, &(q3n_init_options){ .size = sizeof(q3n_init_options),
                                      .type = type, .seed = seed });
    parsed f = parse_file();
    for (int i = 0; i < f.n_tensors; i++) {
        uint8_t bytes[4];
        for (int k = 0; k < 4; k++) bytes[k] = (uint8_t)(f.tensors[i].crc >> (8 * k));
        crc = plain_crc(crc, bytes, 4);
    }
    free_parsed(&f);
    return crc;
}

/* The numbers are those of x86-64 with gcc; another compiler or machine must give the same. */
static void test_determinism(void **state)
{
    (void)state;
    const q3n_config c = small_model();
    assert_int_equal(data_crc(&c, Q3N_TYPE_F32, 1), 0x9C2044E3u);
    assert_int_equal(data_crc(&c, Q3N_TYPE_F16, 1), 0x3DABA4F0u);
    assert_int_equal(data_crc(&c, Q3N_TYPE_BF16, 1), 0x750D30DAu);
    assert_int_not_equal(data_crc(&c, Q3N_TYPE_F32, 2), 0x9C2044E3u);
    size_t bytes[2];
    uint8_t *files[2];
    for (int i = 0; i < 2; i++) {
        init_file(&c, &(q3n_init_options){ .size = sizeof(q3n_init_options),
                                           .type = Q3N_TYPE_F16, .seed = UINT64_MAX });
        files[i] = read_file(path, &bytes[i]);
    }
    assert_int_equal(bytes[0], bytes[1]);
    assert_memory_equal(files[0], files[1], bytes[0]);
    free(files[0]);
    free(files[1]);
}

/* A weight depends on seed, tensor and place: not on the type, nor on the other tensors. */
static void test_weights_do_not_depend_on_the_file(void **state)
{
    (void)state;
    q3n_config c = small_model();
    init_file(&c, &(q3n_init_options){ .size = sizeof(q3n_init_options),
                                       .type = Q3N_TYPE_F32, .seed = 3 });
    parsed a = parse_file();
    init_file(&c, &(q3n_init_options){ .size = sizeof(q3n_init_options),
                                       .type = Q3N_TYPE_BF16, .seed = 3 });
    parsed b = parse_file();
    set(&c, "num_mtp_layers", "0");
    set(&c, "attention_bias", "1");
    init_file(&c, &(q3n_init_options){ .size = sizeof(q3n_init_options),
                                       .type = Q3N_TYPE_F32, .seed = 3 });
    parsed d = parse_file();
    static const char *const names[] = { "lm_head.weight", "layers.0.mlp.experts.down_proj.weight",
                                         "layers.1.self_attn.q_proj.weight" };
    for (size_t k = 0; k < COUNT(names); k++) {
        const record *x = find(&a, names[k]), *y = find(&b, names[k]), *z = find(&d, names[k]);
        const int64_t slices = x->n_dims == 3 ? x->dim[0] : 1;
        for (int64_t e = 0; e < slices; e++)
            for (int64_t i = 0; i < x->slice_bytes / 4; i++) {
                const uint8_t *p = a.data + x->offset + e * x->stride + 4 * i;
                float v;
                memcpy(&v, p, 4);
                assert_memory_equal(p, d.data + z->offset + e * z->stride + 4 * i, 4);
                assert_int_equal(number(b.data + y->offset + e * y->stride + 2 * i, 2),
                                 q3n__f32_to_bf16(v));
            }
    }
    free_parsed(&a);
    free_parsed(&b);
    free_parsed(&d);
}

/* ---- Random weights ---- */
static double normal_cdf(double z) { return 0.5 * erfc(-z / sqrt(2.0)); }

static double truncated_cdf(double z)   /* of N(0, 1) inside [-2, 2] */
{
    const double low = normal_cdf(-2.0), high = normal_cdf(2.0);
    return (normal_cdf(z) - low) / (high - low);
}

static void test_quantiles(void **state)
{
    (void)state;
    static q3n__quantiles q;
    q3n__quantiles_make(&q);
    assert_int_equal(q.z[0], 0);
    assert_int_equal(q.z[Q3N__QUANTILES], 2 * Q3N__Z_ONE);
    for (int j = 0; j < Q3N__QUANTILES; j++) {
        const double z = (double)q.z[j] / Q3N__Z_ONE, next = (double)q.z[j + 1] / Q3N__Z_ONE;
        const double mid = 0.5 * (z + next);
        const double density = exp(-z * z / 2) / sqrt(2 * 3.14159265358979) / 0.954499736;
        assert_true(q.z[j + 1] > q.z[j]);
        assert_true(fabs(truncated_cdf(z) - (0.5 + 0.5 * j / Q3N__QUANTILES)) < 1e-6 * density);
        assert_true(fabs(truncated_cdf(mid) - (0.5 + 0.5 * (j + 0.5) / Q3N__QUANTILES))
                    < 3e-6 * density);
    }
}

static int by_value(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Kolmogorov-Smirnov distance of x [n] (sorted here) from a distribution function. */
static double distance(float *x, int n, double scale, double (*cdf)(double))
{
    double d = 0.0;
    qsort(x, (size_t)n, sizeof *x, by_value);
    for (int i = 0; i < n; i++) {
        const double F = cdf(x[i] / scale), below = fabs(F - (double)i / n);
        const double above = fabs(F - (double)(i + 1) / n);
        if (below > d) d = below;
        if (above > d) d = above;
    }
    return d;
}

static void test_normal_weights(void **state)
{
    (void)state;
    q3n_config c = small_model();
    set(&c, "vocab", "20000");
    const double stddevs[] = { 0.0, 0.5 };   /* 0 = 0.02 */
    for (size_t k = 0; k < COUNT(stddevs); k++) {
        const double sigma = stddevs[k] > 0 ? stddevs[k] : 0.02;
        init_file(&c, &(q3n_init_options){ .size = sizeof(q3n_init_options),
                                           .seed = 9, .stddev = stddevs[k] });
        parsed f = parse_file();
        const record *t = find(&f, "embed_tokens.weight");
        const int n = 20000 * 24;
        float *x = malloc((size_t)n * sizeof *x);
        assert_non_null(x);
        memcpy(x, f.data + t->offset, (size_t)n * sizeof *x);
        double sum = 0.0, square = 0.0, lag = 0.0, down = 0.0, max = 0.0;
        for (int i = 0; i < n; i++) {
            const double z = x[i] / sigma;
            sum += z;
            square += z * z;
            if (i > 0)   lag  += z * x[i - 1] / sigma;
            if (i >= 24) down += z * x[i - 24] / sigma;
            if (fabs(z) > max) max = fabs(z);
        }
        /* The variance of the truncated distribution: 1 - 4 phi(2) / (2 Phi(2) - 1). */
        const double variance = 1.0 - 4.0 * exp(-2.0) / sqrt(2 * 3.14159265358979) / 0.954499736;
        assert_true(fabs(sum / n) < 4.0 * sqrt(variance / n));
        assert_true(fabs(square / n - variance) < 4.0 * sqrt(2.0 / n));
        assert_true(fabs(lag / n) < 4.0 / sqrt(n) && fabs(down / n) < 4.0 / sqrt(n));
        assert_true(max <= 2.0000002 && max > 1.999);
        assert_true(distance(x, n, sigma, truncated_cdf) < 1.95 / sqrt(n));   /* 0.1 % level */
        free(x);
        free_parsed(&f);
    }
}

static double a_log_cdf(double y) { return exp(y) / 16.0; }   /* ln of a uniform number */

static void test_other_weights(void **state)
{
    (void)state;
    q3n_config c = small_model();
    set(&c, "linear_num_key_heads", "1024");
    set(&c, "linear_num_value_heads", "4096");
    set(&c, "linear_key_head_dim", "1");
    set(&c, "linear_value_head_dim", "1");
    set(&c, "hidden", "2");
    init_file(&c, &(q3n_init_options){ .size = sizeof(q3n_init_options),
                                       .seed = 5, .type = Q3N_TYPE_BF16 });
    parsed f = parse_file();
    static float x[4096], conv[4 * 6144];
    memcpy(x, f.data + find(&f, "layers.2.linear_attn.A_log")->offset, sizeof x);
    for (int i = 0; i < 4096; i++) assert_true(x[i] < 2.7725888f && x[i] > -20.0f);
    assert_true(distance(x, 4096, 1.0, a_log_cdf) < 1.95 / sqrt(4096));
    memcpy(x, f.data + find(&f, "layers.2.linear_attn.dt_bias")->offset, sizeof x);
    for (int i = 0; i < 4096; i++) assert_true(x[i] == 1.0f);
    memcpy(conv, f.data + find(&f, "layers.2.linear_attn.conv1d.weight")->offset, sizeof conv);
    assert_true(distance(conv, 4 * 6144, 0.02, truncated_cdf) < 1.95 / sqrt(4 * 6144));
    static const char *const ones[] = { "norm.weight", "layers.0.input_layernorm.weight",
                                        "layers.1.self_attn.q_norm.weight",
                                        "layers.0.linear_attn.norm.weight", "mtp.norm.weight" };
    for (size_t k = 0; k < COUNT(ones); k++) {
        const record *t = find(&f, ones[k]);
        for (int64_t i = 0; i < t->dim[0]; i++) {
            memcpy(x, f.data + t->offset + 4 * i, 4);
            assert_true(x[0] == 1.0f);
        }
    }
    free_parsed(&f);
}

static void test_integer_logarithm(void **state)
{
    (void)state;
    uint32_t u = 1;
    for (int i = 0; i < 20000; i++) {
        u = u * 1664525u + 1013904223u;
        const uint32_t v = u >> (i % 32);
        const double expected = log((double)(v | 1) / 268435456.0);
        assert_true(fabs(q3n__random_log(v) - expected) < 1e-7 * (1.0 + fabs(expected)));
    }
    assert_true(fabs(q3n__random_log(UINT32_MAX) - log(16.0)) < 1e-6);
}

/* ---- Quantised types ---- */

/* Where a tensor may not have the type it has the next finer one. */
static void test_quantised_types(void **state)
{
    (void)state;
    q3n_config c = small_model();
    static const struct { q3n_type type, experts, other, head, router; } list[] = {
        { Q3N_TYPE_Q3, Q3N_TYPE_Q3, Q3N_TYPE_Q4, Q3N_TYPE_Q6, Q3N_TYPE_BF16 },
        { Q3N_TYPE_Q4, Q3N_TYPE_Q4, Q3N_TYPE_Q4, Q3N_TYPE_Q6, Q3N_TYPE_BF16 },
        { Q3N_TYPE_Q6, Q3N_TYPE_Q6, Q3N_TYPE_Q6, Q3N_TYPE_Q6, Q3N_TYPE_BF16 },
        { Q3N_TYPE_Q8, Q3N_TYPE_Q8, Q3N_TYPE_Q8, Q3N_TYPE_Q8, Q3N_TYPE_BF16 }
    };
    for (size_t i = 0; i < COUNT(list); i++) {
        const q3n_init_options o = { .size = sizeof o,
                                     .type = list[i].type, .name = "quantised", .n_threads = 2 };
        init_file(&c, &o);
        parsed f = parse_file();
        assert_int_equal(find(&f, "layers.0.mlp.experts.up_proj.weight")->type, list[i].experts);
        assert_int_equal(find(&f, "layers.1.self_attn.q_proj.weight")->type, list[i].other);
        assert_int_equal(find(&f, "lm_head.weight")->type, list[i].head);
        assert_int_equal(find(&f, "mtp.fc.weight")->type, list[i].head);
        assert_int_equal(find(&f, "layers.0.mlp.gate.weight")->type, list[i].router);
        assert_int_equal(find(&f, "norm.weight")->type, Q3N_TYPE_F32);
        free_parsed(&f);
        check_open(&c, "quantised");
    }
}

/* Mean and deviation of the weights are those of the float types; after the last row: zeros. */
static void test_quantised_weights(void **state)
{
    (void)state;
    q3n_config c = small_model();
    set(&c, "vocab", "4001");
    set(&c, "hidden", "84");
    static const q3n_type types[] = { Q3N_TYPE_Q8, Q3N_TYPE_Q6, Q3N_TYPE_Q4 };
    for (size_t i = 0; i < COUNT(types); i++) {
        init_file(&c, &(q3n_init_options){ .size = sizeof(q3n_init_options),
                                           .type = types[i], .stddev = 0.5, .seed = 4 });
        parsed f = parse_file();
        const record *t = find(&f, "embed_tokens.weight");
        double sum = 0.0, square = 0.0, lag = 0.0;
        float x[84];
        const int n = 4001 * 84;
        for (int r = 0; r < 4001 + 15; r++) {
            q3n__dequantize_row(types[i], x, f.data + t->offset, r, 84);
            for (int k = 0; k < 84; k++) {
                assert_true(r < 4001 || x[k] == 0.0f);
                sum += x[k];
                square += x[k] * x[k];
                if (k > 0) lag += x[k] * x[k - 1];
            }
        }
        assert_true(fabs(sum / n) < 0.012);
        assert_true(fabs(sqrt(square / n) - 0.5 * 0.8796) < 0.002);
        assert_true(fabs(lag / n) < 0.25 * 4.0 / sqrt(n));
        free_parsed(&f);
    }
}

/* Memory gets the bytes of the file, whatever the number of threads. */
static void test_memory_is_the_file(void **state)
{
    (void)state;
    q3n_config c = small_model();
    set(&c, "vocab", "20001");
    for (int type = 0; type < Q3N_TYPE_COUNT; type++)
        for (int threads = 0; threads < 4; threads++) {
            q3n_init_options o = { .size = sizeof o,
                                   .type = (q3n_type)type, .seed = 8, .n_threads = 1 };
            if (threads == 0) init_file(&c, &o);
            o.n_threads = threads;
            size_t bytes;
            q3n_error err = { .code = Q3N_OK };
            uint8_t *file = read_file(path, &bytes), *memory = q3n__alloc(NULL, bytes);
            assert_non_null(memory);
            assert_int_equal(q3n_init_bytes(&c, &o, &err), bytes);
            assert_int_equal(q3n_init_memory(memory, bytes, &c, &o, &err), Q3N_OK);
            assert_memory_equal(memory, file, bytes);
            q3n_model *m;
            assert_int_equal(q3n_model_open_memory(&m, memory, bytes, NULL, &err), Q3N_OK);
            assert_int_equal(q3n_model_verify(m, NULL, &err), Q3N_OK);
            q3n_model_close(m);
            q3n__free(NULL, memory);
            free(file);
        }
}

static int stop_late(void *user, int64_t done, int64_t total)
{
    (void)user;
    return done > total / 2;
}

static void test_memory_errors(void **state)
{
    (void)state;
    q3n_config c = small_model();
    q3n_error err = { .code = Q3N_OK };
    const size_t bytes = (size_t)q3n_init_bytes(&c, NULL, &err);
    uint8_t *memory = q3n__alloc(NULL, bytes + 64);
    assert_true(bytes > 0);
    assert_non_null(memory);
    assert_int_equal(q3n_init_memory(memory, bytes + 1, &c, NULL, &err), Q3N_ERR_ARG);
    assert_int_equal(q3n_init_memory(memory, bytes - 1, &c, NULL, &err), Q3N_ERR_ARG);
    assert_int_equal(q3n_init_memory(memory + 8, bytes, &c, NULL, &err), Q3N_ERR_ARG);
    assert_int_equal(q3n_init_memory(NULL, bytes, &c, NULL, &err), Q3N_ERR_ARG);
    assert_int_equal(q3n_init_memory(memory, bytes, &c, NULL, &err), Q3N_OK);
    const q3n_init_options o = { .size = sizeof o, .progress = { stop_late, NULL } };
    q3n_model *m;
    assert_int_equal(q3n_init_memory(memory, bytes, &c, &o, &err), Q3N_ERR_CANCELLED);
    assert_int_equal(q3n_model_open_memory(&m, memory, bytes, NULL, &err), Q3N_ERR_FORMAT);
    q3n__free(NULL, memory);
    c.num_key_value_heads = 3;
    assert_int_equal(q3n_init_bytes(&c, NULL, &err), 0);
    assert_non_null(strstr(err.message, "num_key_value_heads"));
}

/* The checksum of two texts from theirs. */
static void test_joined_checksums(void **state)
{
    (void)state;
    uint8_t x[700];
    for (size_t i = 0; i < sizeof x; i++) x[i] = (uint8_t)(i * i * 31 + 7);
    for (size_t n = 0; n <= sizeof x; n += n < 20 ? 1 : 97) {
        const uint32_t a = plain_crc(0, x, n), b = plain_crc(0, x + n, sizeof x - n);
        assert_int_equal(q3n__crc_join(a, b, sizeof x - n), plain_crc(0, x, sizeof x));
    }
}

/* ---- Stopped and failing runs ---- */
typedef struct { int calls, stop_at; int64_t last, total; } stopper;

static int count_progress(void *user, int64_t done, int64_t total)
{
    stopper *s = user;
    assert_true(done > s->last && done <= total);
    assert_true(s->total == 0 || s->total == total);
    s->last = done;
    s->total = total;
    return s->calls++ == s->stop_at;
}

static void write_old_file(void)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    fputs("old", f);
    fclose(f);
}

static void check_old_file(void)
{
    size_t bytes;
    uint8_t *data = read_file(path, &bytes);
    assert_int_equal(bytes, 3);
    assert_memory_equal(data, "old", 3);
    free(data);
    assert_int_equal(count_files(NULL), 1);
}

static void test_progress_and_cancel(void **state)
{
    (void)state;
    const q3n_config c = small_model();
    stopper s = { 0, -1, 0, 0 };
    q3n_init_options o = { .size = sizeof o, .progress = { count_progress, &s } };
    init_file(&c, &o);
    size_t bytes;
    free(read_file(path, &bytes));
    assert_true(s.total == (int64_t)bytes && s.last == s.total);
    const int calls = s.calls;
    assert_true(calls > 100);
    write_old_file();
    for (int k = 0; k < calls; k += k < 5 || k > calls - 5 ? 1 : 13) {
        s = (stopper){ 0, k, 0, 0 };
        q3n_error err = { .code = Q3N_OK };
        assert_int_equal(q3n_init_file(path, &c, &o, &err), Q3N_ERR_CANCELLED);
        assert_int_equal(err.code, Q3N_ERR_CANCELLED);
        assert_int_equal(s.calls, k + 1);
        check_old_file();
    }
    remove(path);
    s = (stopper){ 0, 20, 0, 0 };
    assert_int_equal(q3n_init_file(path, &c, &o, NULL), Q3N_ERR_CANCELLED);
    assert_int_equal(count_files(NULL), 0);
}

static void test_failing_memory(void **state)
{
    (void)state;
    const q3n_config c = small_model();
    counter k = { 0, -1, 0 };
    const q3n_init_options o = { .size = sizeof o,
                                 .allocator = { failing_alloc, counted_free, &k } };
    init_file(&c, &o);
    assert_int_equal(k.live, 0);
    const int calls = k.calls;
    assert_true(calls >= 4);
    write_old_file();
    for (int i = 0; i < calls; i++) {
        k = (counter){ 0, i, 0 };
        assert_int_equal(q3n_init_file(path, &c, &o, NULL), Q3N_ERR_MEMORY);
        assert_int_equal(k.live, 0);
        check_old_file();
    }
}

static void test_paths(void **state)
{
    (void)state;
    const q3n_config c = small_model();
    q3n_error err = { .code = Q3N_OK };
    assert_int_equal(q3n_init_file("build/no/such/directory/x.q3n", &c, NULL, &err), Q3N_ERR_IO);
    assert_non_null(strstr(err.message, "build/no/such/directory/x.q3n"));
    assert_int_equal(q3n_init_file("build", &c, NULL, &err), Q3N_ERR_IO);   /* a directory */
    assert_non_null(strstr(err.message, "directory"));
}

/* The system refuses to let the file grow, as a full disk does. */
static void test_full_disk(void **state)
{
    (void)state;
    const q3n_config c = small_model();
    struct rlimit before, low;
    q3n_error err = { .code = Q3N_OK };
    size_t bytes;
    init_file(&c, NULL);
    free(read_file(path, &bytes));
    write_old_file();
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    signal(SIGXFSZ, SIG_IGN);
    const size_t limits[] = { 1000, bytes / 2, bytes - 1 };
    for (size_t i = 0; i < COUNT(limits); i++) {
        low = before;
        low.rlim_cur = limits[i];
        if (setrlimit(RLIMIT_FSIZE, &low) != 0) skip();
        const q3n_result r = q3n_init_file(path, &c, NULL, &err);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
        assert_int_equal(r, Q3N_ERR_IO);
        assert_non_null(strstr(err.message, path));
        assert_non_null(strstr(err.message, strerror(EFBIG)));
        check_old_file();
    }
}

static void test_options(void **state)
{
    (void)state;
    q3n_config c = small_model();
    static const struct { q3n_init_options o; q3n_result r; } list[] = {
        { { .type = Q3N_TYPE_COUNT }, Q3N_ERR_ARG }, { { .type = (q3n_type)-1 }, Q3N_ERR_ARG },
        { { .n_threads = -1 }, Q3N_ERR_ARG },
        { { .type = Q3N_TYPE_Q6, .stddev = 1e-7 }, Q3N_ERR_ARG },
        { { .stddev = -1.0 }, Q3N_ERR_ARG }, { { .stddev = NAN }, Q3N_ERR_ARG },
        { { .stddev = INFINITY }, Q3N_ERR_ARG },
        { { .allocator = { failing_alloc, NULL, NULL } }, Q3N_ERR_ARG }
    };
    for (size_t i = 0; i < COUNT(list); i++)
        assert_int_equal(q3n_init_file(path, &c, &list[i].o, NULL), list[i].r);
    char name[300];
    memset(name, 'n', sizeof name);
    name[256] = 0;
    assert_int_equal(q3n_init_file(path, &c, &(q3n_init_options){ .size = sizeof(q3n_init_options),
                                                                  .name = name }, NULL),
                     Q3N_ERR_ARG);
    name[255] = 0;
    init_file(&c, &(q3n_init_options){ .size = sizeof(q3n_init_options), .name = name });
    check_open(&c, name);
    remove(path);
    q3n_error err = { .code = Q3N_OK };
    c.num_key_value_heads = 3;
    assert_int_equal(q3n_init_file(path, &c, NULL, &err), Q3N_ERR_ARG);
    assert_non_null(strstr(err.message, "num_key_value_heads"));
    assert_int_equal(count_files(NULL), 0);
}

/* ---- The writer, as a converter uses it ---- */
typedef struct { const char *name; q3n_type type; int leave_out; } choice;

/* bf16 matrices, f32 vectors, but for the tensor named. */
static int choose(void *user, q3n__plan_item *item, q3n_type *type)
{
    const choice *ch = user;
    *type = item->role == Q3N__ROLE_VEC ? Q3N_TYPE_F32 : Q3N_TYPE_BF16;
    if (strcmp(item->name, ch->name) != 0) return 1;
    *type = ch->type;
    return !ch->leave_out;
}

static int make_some(void *user, q3n__piece *piece)
{
    (void)user;
    for (size_t i = 0; i < piece->bytes; i++) piece->data[i] = (uint8_t)(i * 7 + piece->bytes);
    return 1;
}

static void test_sections_and_mixed_types(void **state)
{
    (void)state;
    const q3n_config c = small_model();
    static const uint8_t entries[] = { 6, 1, 0, 0, 8, 0, 0, 0, 'b', 'o', 's', '_', 'i', 'd',
                                       5, 0, 0, 0, 0, 0, 0, 0, 0, 0 };
    static const uint8_t tokenizer[] = "only copied, not looked at";
    choice ch = { "layers.0.mlp.gate.weight", Q3N_TYPE_F16, 0 };
    q3n__writer_options o = { .config = &c, .config_section = entries,
                              .config_section_bytes = sizeof entries, .tokenizer = tokenizer,
                              .tokenizer_bytes = sizeof tokenizer, .choose = choose,
                              .make = make_some, .path = path, .user = &ch };
    q3n__writer w;
    q3n_error err = { .code = Q3N_OK };
    for (int threads = 0; threads < 4; threads++) {
        o.n_threads = threads;
        assert_int_equal(q3n__writer_open(&w, &o, &err), Q3N_OK);
        char name[400];
        assert_int_equal(count_files(name), 1);          /* another name until it is whole */
        assert_true(strncmp(name, "x.q3n.", 6) == 0 && strcmp(name + 22, ".part") == 0);
        assert_int_equal(q3n__writer_close(&w, q3n__writer_run(&w)), Q3N_OK);
        parsed f = parse_file();
        size_t n;
        assert_int_equal(f.n_sections, 4);
        assert_int_equal(f.section[4].flags, 0);
        assert_int_equal(f.section[4].bytes, sizeof tokenizer);
        assert_memory_equal(f.data + f.section[4].offset, tokenizer, sizeof tokenizer);
        const uint8_t *v = config_value(&f, "bos_id", 1, &n);
        assert_non_null(v);
        assert_int_equal(number(v, 8), 5);
        assert_int_equal(find(&f, "layers.0.mlp.gate.weight")->type, Q3N_TYPE_F16);
        assert_int_equal(find(&f, "layers.1.mlp.gate.weight")->type, Q3N_TYPE_BF16);
        free_parsed(&f);
        remove(path);
    }
    assert_int_equal(q3n__writer_open(&w, &o, &err), Q3N_OK);   /* a failure on the way */
    assert_int_equal(q3n__writer_close(&w, Q3N_ERR_CHECKSUM), Q3N_ERR_CHECKSUM);
    assert_int_equal(count_files(NULL), 0);
}

static void test_choices_that_break_a_model(void **state)
{
    (void)state;
    q3n_config c = small_model();
    set(&c, "num_labels", "2");
    static const struct { choice ch; int passes; } list[] = {
        { { "norm.weight", Q3N_TYPE_BF16, 0 }, 0 }, { { "norm.weight", Q3N_TYPE_F32, 1 }, 0 },
        { { "layers.0.mlp.experts.up_proj.weight", Q3N_TYPE_BF16, 1 }, 0 },
        { { "score.bias", Q3N_TYPE_F32, 1 }, 1 }, { { "lm_head.weight", Q3N_TYPE_F32, 1 }, 1 }
    };
    for (size_t i = 0; i < COUNT(list); i++) {
        choice ch = list[i].ch;
        const q3n__writer_options o = { .config = &c, .choose = choose, .make = make_some,
                                        .path = path, .n_threads = 1, .user = &ch };
        q3n__writer w;
        q3n_error err = { .code = Q3N_OK };
        const q3n_result r = q3n__writer_open(&w, &o, &err);
        assert_int_equal(r, list[i].passes ? Q3N_OK : Q3N_ERR_ARG);
        if (r != Q3N_OK) { assert_non_null(strstr(err.message, ch.name)); continue; }
        assert_int_equal(q3n__writer_close(&w, q3n__writer_run(&w)), Q3N_OK);
        parsed f = parse_file();
        for (int t = 0; t < f.n_tensors; t++)
            assert_true(strcmp(f.tensors[t].name, ch.name) != 0);
        free_parsed(&f);
        check_open(&c, "");
    }
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, NULL, empty_folder)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_layout), TEST(test_config_entries), TEST(test_other_geometries),
        TEST(test_rope_tables_and_score), TEST(test_determinism),
        TEST(test_weights_do_not_depend_on_the_file), TEST(test_quantiles),
        TEST(test_normal_weights), TEST(test_other_weights), TEST(test_integer_logarithm),
        TEST(test_quantised_types), TEST(test_quantised_weights),
        TEST(test_memory_is_the_file), TEST(test_memory_errors), TEST(test_joined_checksums),
        TEST(test_progress_and_cancel), TEST(test_failing_memory), TEST(test_paths),
        TEST(test_full_disk), TEST(test_options), TEST(test_sections_and_mixed_types),
        TEST(test_choices_that_break_a_model)
    };
    return cmocka_run_group_tests_name("writer", tests, name_files, remove_folder);
}
