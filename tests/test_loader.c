/* test_loader.c - one malformed file for every check of the loader; files cut off at every byte and
 * with every bit of their metadata changed; tensors full of NaN.  Everything handed to the library
 * ends where its allocation ends, so that a sanitizer sees each byte read too far. */
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE 1     /* mkstemp, nanosleep */
#endif
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#define Q3N_MAKE_IMPLEMENTATION
#include "q3n_make.h"
#include "messages.h"
#include "steps.h"
#include "engines.h"
#include "golden.h"
#include "isas.h"
#include "random.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* ---- Files in memory ---- */
typedef struct {
    uint8_t *data;               /* at a multiple of 64; exactly so many bytes                   */
    size_t   bytes;
} image;

static image image_new(size_t bytes)
{
    image f = { NULL, bytes };
    assert_int_equal(posix_memalign((void **)&f.data, 64, bytes ? bytes : 1), 0);
    memset(f.data, 0, bytes);
    return f;
}

static image image_copy(const image *from, size_t bytes)
{
    image f = image_new(bytes);
    memcpy(f.data, from->data, bytes < from->bytes ? bytes : from->bytes);
    return f;
}

static image image_read(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file) fail_msg("%s: cannot open", path);
    fseek(file, 0, SEEK_END);
    image f = image_new((size_t)ftell(file));
    rewind(file);
    assert_int_equal(fread(f.data, 1, f.bytes, file), f.bytes);
    fclose(file);
    return f;
}

static void put_u32(const image *f, size_t at, uint32_t v) { memcpy(f->data + at, &v, sizeof v); }
static void put_u64(const image *f, size_t at, uint64_t v) { memcpy(f->data + at, &v, sizeof v); }
static uint32_t u32(const image *f, size_t at)             { return q3n__load_u32(f->data + at); }
static uint64_t u64(const image *f, size_t at)             { return q3n__load_u64(f->data + at); }

static size_t meta_bytes(const image *f) { return (size_t)u64(f, 24); }

/* Make the checksum right again. */
static void seal(const image *f)
{
    if (f->bytes < 64 || meta_bytes(f) > f->bytes) return;
    put_u32(f, 32, 0);
    put_u32(f, 32, q3n__crc32(0, f->data, meta_bytes(f)));
}

/* ---- The good file that all others come from ---- */
static image good;

/* One DeltaNet layer with experts, one attention layer with experts: every kind of tensor. */
static void small_config(q3n_config *c)
{
    static const char *const fields[][2] = {
        { "layers", "2" }, { "layer_types", "1,0" }, { "hidden", "32" }, { "vocab", "40" },
        { "heads", "4" }, { "kv_heads", "2" }, { "head_dim", "16" }, { "rotary_dim", "8" },
        { "experts", "6" }, { "top_k", "3" }, { "moe_intermediate_size", "16" },
        { "shared_expert_intermediate_size", "24" }, { "linear_num_key_heads", "2" },
        { "linear_num_value_heads", "4" }, { "linear_key_head_dim", "8" },
        { "linear_value_head_dim", "8" }, { "context", "64" },
    };
    q3n_error err;
    assert_int_equal(q3n_config_preset("g1", c, &err), Q3N_OK);
    for (int i = 0; i < COUNT(fields); i++)
        if (q3n_config_set(c, fields[i][0], fields[i][1], &err) != Q3N_OK)
            fail_msg("%s", err.message);
}

static image make_file(const q3n_config *c, q3n_type type)
{
    char path[] = "/tmp/q3n_loader_XXXXXX";
    const int handle = mkstemp(path);
    assert_true(handle >= 0);
    close(handle);
    q3n_error err;
    q3n_init_options o = Q3N_INIT(q3n_init_options);
    o.type = type;
    o.seed = 3;
    o.stddev = 0.3;
    o.name = "small";
    if (q3n_init_file(path, c, &o, &err) != Q3N_OK) fail_msg("%s", err.message);
    const image f = image_read(path);
    remove(path);
    return f;
}

static int setup(void **state)
{
    q3n_config c = Q3N_INIT(q3n_config);
    (void)state;
    small_config(&c);
    good = make_file(&c, Q3N_TYPE_BF16);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    free(good.data);
    return 0;
}

static q3n_result open_image(q3n_model **m, const image *f, int skip_checksum, q3n_error *err)
{
    q3n_model_options o = Q3N_INIT(q3n_model_options);
    o.skip_checksum = skip_checksum;
    err->code = Q3N_OK;
    err->offset = -2;
    err->message[0] = 0;
    *m = (q3n_model *)(uintptr_t)1;
    const q3n_result r = q3n_model_open_memory(m, f->data, f->bytes, &o, err);
    assert_true((r == Q3N_OK) == (*m != NULL));
    if (r != Q3N_OK) {
        assert_int_equal(err->code, r);
        assert_true(message_is_clean(err->message, sizeof err->message));
        assert_true(err->offset >= -1 && err->offset <= (int64_t)f->bytes);
    }
    return r;
}

/* ---- Finding things in a file ---- */
static size_t section_record(const image *f, uint32_t kind)
{
    for (size_t i = 0; i < u32(f, 12); i++)
        if (u32(f, 64 + 32 * i) == kind) return 64 + 32 * i;
    fail_msg("section %u is not there", kind);
    return 0;
}

static size_t section(const image *f, uint32_t kind)
{
    return (size_t)u64(f, section_record(f, kind) + 8);
}

static size_t entry_bytes(const image *f, size_t at)
{
    return (8 + f->data[at] + (size_t)u32(f, at + 4) + 7) / 8 * 8;
}

/* The entry of a configuration key; its value begins at + 8 + strlen(key). */
static size_t entry(const image *f, const char *key)
{
    const size_t end = section(f, 1) + (size_t)u64(f, section_record(f, 1) + 16);
    for (size_t at = section(f, 1); at < end; at += entry_bytes(f, at))
        if (f->data[at] == strlen(key) && memcmp(f->data + at + 8, key, strlen(key)) == 0)
            return at;
    fail_msg("configuration key %s is not there", key);
    return 0;
}

static void put_entry_u64(const image *f, const char *key, uint64_t v)
{
    put_u64(f, entry(f, key) + 8 + strlen(key), v);
}

static void put_entry_f64(const image *f, const char *key, double v)
{
    memcpy(f->data + entry(f, key) + 8 + strlen(key), &v, sizeof v);
}

/* The record of a tensor. */
static size_t tensor(const image *f, const char *name)
{
    const size_t names = section(f, 3), first = section(f, 2) + 8;
    for (size_t i = 0; i < u32(f, section(f, 2)); i++) {
        const size_t at = first + 80 * i;
        if (u32(f, at + 4) == strlen(name)
            && memcmp(f->data + names + u32(f, at), name, strlen(name)) == 0) return at;
    }
    fail_msg("tensor %s is not there", name);
    return 0;
}

/* The file with another section of that kind in place of its own, or one more if it has none. */
static image with_section(const image *f, uint32_t kind, uint32_t flags, const void *data,
                          size_t bytes)
{
    const size_t shift = (bytes + 32 + 8 + 4095) / 4096 * 4096, n = u32(f, 12);
    const size_t old_meta = meta_bytes(f), at = old_meta + 32;
    image g = image_new(f->bytes + shift);
    int found = 0;
    memcpy(g.data, f->data, 64 + 32 * n);
    memcpy(g.data + 64 + 32 * (n + 1), f->data + 64 + 32 * n, old_meta - (64 + 32 * n));
    memcpy(g.data + old_meta + shift, f->data + old_meta, f->bytes - old_meta);
    for (size_t i = 0; i < n; i++) put_u64(&g, 64 + 32 * i + 8, u64(f, 64 + 32 * i + 8) + 32);
    for (size_t i = 0; i < n; i++) found |= u32(&g, 64 + 32 * i) == kind;
    const size_t record = found ? section_record(&g, kind) : 64 + 32 * n;
    put_u32(&g, 12, (uint32_t)(found ? n : n + 1));
    put_u64(&g, 16, g.bytes);
    put_u64(&g, 24, (at + bytes + 7) / 8 * 8);
    put_u32(&g, record, kind);
    put_u32(&g, record + 4, flags);
    put_u64(&g, record + 8, at);
    put_u64(&g, record + 16, bytes);
    if (bytes) memcpy(g.data + at, data, bytes);
    for (size_t i = 0; kind != 2 && i < u32(&g, section(&g, 2)); i++) {
        const size_t t = section(&g, 2) + 8 + 80 * i + 40;
        put_u64(&g, t, u64(&g, t) + shift);
    }
    return g;
}

/* The file with more configuration entries after its own. */
static image with_entries(const image *f, const void *more, size_t bytes)
{
    const size_t own = (size_t)u64(f, section_record(f, 1) + 16);
    uint8_t *data = (uint8_t *)malloc(own + bytes);
    assert_non_null(data);
    memcpy(data, f->data + section(f, 1), own);
    memcpy(data + own, more, bytes);
    const image g = with_section(f, 1, 1, data, own + bytes);
    free(data);
    return g;
}

static image with_entry(const image *f, const char *key, int type, const void *value, size_t bytes)
{
    uint8_t data[4096];
    q3n__blob b = { data, 0 };
    assert_true(strlen(key) + bytes + 16 < sizeof data);
    q3n__blob_entry(&b, key, type, value, bytes);
    return with_entries(f, data, b.used);
}

/* Leave a tensor out: the last record takes its place. */
static void drop_tensor(const image *f, const char *name)
{
    const size_t at = tensor(f, name), head = section(f, 2);
    const uint32_t n = u32(f, head);
    memmove(f->data + at, f->data + head + 8 + 80 * (n - 1), 80);
    put_u32(f, head, n - 1);
}

/* ---- Expectations ---- */

/* Seals and opens f, expects an error at a byte, with a message that holds all parts of `words`,
 * which a | separates.  Frees f. */
static void expect_raw(image f, q3n_result want, int64_t offset, const char *words)
{
    q3n_error err;
    q3n_model *m;
    const q3n_result r = open_image(&m, &f, 0, &err);
    if (r != want)
        fail_msg("result %d (%s), expected %d (%s)", (int)r, err.message, (int)want, words);
    if (err.offset != offset)
        fail_msg("'%s': offset %lld, expected %lld", err.message, (long long)err.offset,
                 (long long)offset);
    char copy[400];
    assert_true(strlen(words) < sizeof copy);
    memcpy(copy, words, strlen(words) + 1);
    for (char *word = strtok(copy, "|"); word; word = strtok(NULL, "|"))
        if (!strstr(err.message, word)) fail_msg("'%s' does not say '%s'", err.message, word);
    assert_int_equal(q3n_model_open_memory(&m, f.data, f.bytes, NULL, NULL), want);
    free(f.data);
}

static void expect(image f, q3n_result want, int64_t offset, const char *words)
{
    seal(&f);
    expect_raw(f, want, offset, words);
}

/* Two tokens: what there is, is there. */
static void evaluate_some(const q3n_model *m)
{
    q3n_session_options o = Q3N_INIT(q3n_session_options);
    o.capacity = 8;
    o.engine_options = OWN_ENGINE(.batch_size = 2, .n_threads = 1);
    const size_t bytes = q3n_session_bytes(m, &o, NULL);
    if (bytes == 0 || bytes > ((size_t)64 << 20)) return;
    q3n_session *s = NULL;
    if (q3n_session_create(&s, m, &o, NULL) != Q3N_OK) return;
    const int32_t ids[2] = { 0, q3n_model_config(m)->vocab_size - 1 };
    float *logits = (float *)malloc((size_t)q3n_model_config(m)->vocab_size * sizeof *logits);
    assert_non_null(logits);
    q3n_session_eval(s, ids, 2, logits);
    free(logits);
    q3n_session_destroy(s);
}

static void expect_good(image f)
{
    q3n_error err;
    q3n_model *m;
    seal(&f);
    if (open_image(&m, &f, 0, &err) != Q3N_OK) fail_msg("%s", err.message);
    if (q3n_model_verify(m, NULL, &err) != Q3N_OK) fail_msg("%s", err.message);
    evaluate_some(m);
    q3n_model_close(m);
    free(f.data);
}

static image fresh(void) { return image_copy(&good, good.bytes); }

/* ---- The file as a whole ---- */
static void test_good(void **state)
{
    (void)state;
    expect_good(fresh());
    expect_good(with_section(&good, 3, 1, good.data + section(&good, 3),
                             (size_t)u64(&good, section_record(&good, 3) + 16)));
    q3n_error err;
    q3n_model *m;
    assert_int_equal(open_image(&m, &good, 0, &err), Q3N_OK);
    assert_string_equal(q3n_model_name(m), "small");
    assert_string_equal(q3n_model_chat_kind(m), "none");
    q3n_config c = Q3N_INIT(q3n_config);
    small_config(&c);
    assert_memory_equal(q3n_model_config(m), &c, sizeof c);
    const q3n_tensor *t = q3n_model_find_tensor(m, "layers.1.mlp.experts.down_proj.weight");
    assert_non_null(t);
    assert_int_equal(t->n_dims, 3);
    assert_true(t->dim[0] == 6 && t->dim[1] == 32 && t->dim[2] == 16 && t->stride % 4096 == 0);
    q3n_model_close(m);

    const image f = image_new(good.bytes + 64);
    memcpy(f.data + 1, good.data, good.bytes);
    assert_int_equal(q3n_model_open_memory(&m, f.data + 1, good.bytes, NULL, &err), Q3N_ERR_ARG);
    assert_int_equal(q3n_model_open_memory(&m, NULL, 64, NULL, &err), Q3N_ERR_ARG);
    free(f.data);
}

static void test_header(void **state)
{
    (void)state;
    for (size_t n = 0; n < 64; n++)
        expect_raw(image_copy(&good, n), Q3N_ERR_FORMAT, 0, "at least 64");
    for (size_t i = 0; i < 8; i++) {
        const image f = fresh();
        f.data[i] ^= 0x20;
        expect(f, Q3N_ERR_FORMAT, 0, "not a .q3n file");
    }
    image f = fresh();
    put_u32(&f, 8, 2);
    expect(f, Q3N_ERR_UNSUPPORTED, 8, "version 2|reads 1");
    f = fresh();
    put_u32(&f, 12, 65);
    expect(f, Q3N_ERR_FORMAT, 12, "65 sections|64");
    f = image_copy(&good, good.bytes + 1);
    expect(f, Q3N_ERR_FORMAT, 16, "cut off or has something after it");
    f = fresh();
    put_u64(&f, 16, UINT64_MAX);
    expect(f, Q3N_ERR_FORMAT, 16, "18446744073709551615");
    f = fresh();
    put_u64(&f, 24, good.bytes + 1);
    expect_raw(f, Q3N_ERR_FORMAT, 24, "metadata of");
    f = fresh();
    put_u64(&f, 24, 64 + 3 * 32 - 1);
    expect(f, Q3N_ERR_FORMAT, 24, "metadata of 159 bytes");
    f = fresh();
    put_u32(&f, 32, u32(&f, 32) ^ 1);
    expect_raw(f, Q3N_ERR_CHECKSUM, 32, "checksum|damaged");
    f = fresh();
    f.data[meta_bytes(&f) - 1] ^= 0x80;
    expect_raw(f, Q3N_ERR_CHECKSUM, 32, "checksum|damaged");
}

static void test_sections(void **state)
{
    (void)state;
    static const char *const names[] = { "", "CONFIG", "TENSORS", "NAMES" };
    for (uint32_t kind = 1; kind <= 3; kind++) {
        const image f = fresh();
        put_u32(&f, section_record(&f, kind) + 4, 0);
        put_u32(&f, section_record(&f, kind), 77);
        expect(f, Q3N_ERR_FORMAT, 64, names[kind]);
    }
    const uint64_t meta = meta_bytes(&good);
    const struct { uint64_t offset, bytes; } places[] = {
        { meta + 8, 0 }, { 64, 8 }, { 0, 8 }, { UINT64_MAX - 7, 8 }, { meta, 1 },
        { 160, meta - 159 }, { 160, UINT64_MAX }, { 161, 8 }, { 164, 8 }, { meta - 8, 16 },
    };
    for (int i = 0; i < COUNT(places); i++)
        for (uint32_t kind = 1; kind <= 3; kind++) {
            const image f = fresh();
            const size_t at = section_record(&f, kind);
            put_u64(&f, at + 8, places[i].offset);
            put_u64(&f, at + 16, places[i].bytes);
            expect(f, Q3N_ERR_FORMAT, (int64_t)at, "not inside the metadata");
        }
    image f = fresh();
    size_t at = section_record(&f, 3);
    put_u32(&f, at, 1);
    expect(f, Q3N_ERR_FORMAT, (int64_t)at, "kind 1 appears twice");
    f = with_section(&good, 900, 1, "abcdefg", 7);
    expect(f, Q3N_ERR_UNSUPPORTED, 64 + 3 * 32, "kind 900");
    f = with_section(&good, 0, 1, "abcdefg", 7);
    expect(f, Q3N_ERR_UNSUPPORTED, 64 + 3 * 32, "kind 0");
    expect_good(with_section(&good, 900, 0, "abcdefg", 7));
    expect_good(with_section(&good, 0, 0, "", 0));
    expect_good(with_section(&good, 5, 0xFFFFFFFEu, "abcdefg", 7));
    f = with_section(&good, 900, 0, "abcdefg", 7);   /* unknown, but its place is checked */
    at = section_record(&f, 900);
    put_u64(&f, at + 16, UINT64_MAX);
    expect(f, Q3N_ERR_FORMAT, (int64_t)at, "not inside the metadata");
}

/* ---- Configuration ---- */
#define BEHIND(f) ((int64_t)(section(&(f), 1) + (size_t)u64(&good, section_record(&good, 1) + 16)))

static void test_entries(void **state)
{
    (void)state;
    static const uint8_t cut[8] = { 1, 1, 0, 0, 8, 0, 0, 0 };
    static const uint8_t no_key[8] = { 0, 1, 0, 0, 0, 0, 0, 0 };
    static const uint8_t long_key[16] = { 9, 3, 0, 0, 0, 0, 0, 0, 'k' };
    static const uint8_t long_value[16] = { 1, 3, 0, 0, 255, 255, 255, 255, 'k' };
    image f;
    for (size_t n = 1; n < 8; n++) {
        f = with_entries(&good, cut, n);
        expect(f, Q3N_ERR_FORMAT, BEHIND(f), "cut off");
    }
    f = with_entries(&good, cut, 8);
    expect(f, Q3N_ERR_FORMAT, BEHIND(f), "cut off");
    f = with_entries(&good, no_key, 8);
    expect(f, Q3N_ERR_FORMAT, BEHIND(f), "empty");
    f = with_entries(&good, long_key, 16);
    expect(f, Q3N_ERR_FORMAT, BEHIND(f), "cut off");
    f = with_entries(&good, long_value, 16);
    expect(f, Q3N_ERR_FORMAT, BEHIND(f), "cut off");
    for (int type = Q3N__VALUE_INT; type <= Q3N__VALUE_FLOAT; type++) {
        f = with_entry(&good, "unknown", type, "1234567", 7);
        expect(f, Q3N_ERR_FORMAT, BEHIND(f), "'unknown'|7 bytes");
        f = with_entry(&good, "unknown", type, "", 0);
        expect(f, Q3N_ERR_FORMAT, BEHIND(f), "'unknown'|0 bytes");
    }
    expect_good(with_entry(&good, "unknown", 1, "12345678abcdefgh", 16));
    expect_good(with_entry(&good, "unknown", 2, "12345678", 8));
    expect_good(with_entry(&good, "unknown", 3, "", 0));
    expect_good(with_entry(&good, "unknown", 200, "abc", 3));
    expect_good(with_entry(&good, "vocab_size2", 3, "abc", 3));
    expect_good(with_entry(&good, "converter", 3, "by hand", 7));
    f = with_entry(&good, "vocab_size", 1, "\x28\0\0\0\0\0\0", 8);
    expect(f, Q3N_ERR_FORMAT, BEHIND(f), "'vocab_size'|once");
    const image twice = with_entry(&good, "unknown", 3, "a", 1);
    expect_good(with_entry(&twice, "unknown", 3, "b", 1));
    free(twice.data);
    f = with_entry(&good, "tokenizer_nfc", 1, "\1\0\0\0\0\0\0", 8);
    const image nfc = with_entry(&f, "tokenizer_nfc", 1, "\1\0\0\0\0\0\0", 8);
    const uint64_t before = u64(&f, section_record(&f, 1) + 16);
    free(f.data);
    expect(nfc, Q3N_ERR_FORMAT, (int64_t)(section(&nfc, 1) + before), "'tokenizer_nfc'|once");

    /* the last entry need not be padded */
    static const uint8_t unpadded[10] = { 2, 3, 0, 0, 0, 0, 0, 0, 'z', 'z' };
    expect_good(with_entries(&good, unpadded, sizeof unpadded));

    static uint8_t many[5000 * 16];
    for (int i = 0; i < 5000; i++) {
        char key[16];
        memset(many + 16 * i, 0, 16);
        many[16 * i] = 5;
        many[16 * i + 1] = 3;
        snprintf(key, sizeof key, "k%04d", i);
        memcpy(many + 16 * i + 8, key, 5);
    }
    expect_good(with_entries(&good, many, sizeof many));
}

/* Every field of the configuration with a value of another type, below and above its range. */
static void test_fields(void **state)
{
    (void)state;
    for (size_t i = 0; i < Q3N__N_CONFIG_ROWS; i++) {
        const q3n__config_row *row = &q3n__config_rows[i];
        char quoted[80];
        snprintf(quoted, sizeof quoted, "'%s'", row->name);
        const int64_t at = (int64_t)entry(&good, row->name);
        image f = fresh();
        f.data[at + 1] = row->kind == 'E' ? 1 : row->kind == 'F' ? 1 : 2;
        if (row->kind == 'E') put_u32(&f, (size_t)at + 4, 0);   /* a string of another length */
        q3n_error err;
        q3n_model *m;
        seal(&f);
        assert_int_equal(open_image(&m, &f, 0, &err), Q3N_ERR_FORMAT);
        assert_int_equal(err.offset, at);
        assert_non_null(strstr(err.message, quoted));
        free(f.data);
        if (row->kind == 'E') {
            f = fresh();
            f.data[(size_t)at + 8 + strlen(row->name)] = '~';
            expect(f, Q3N_ERR_UNSUPPORTED, at, quoted);
            f = fresh();
            f.data[(size_t)at + 8 + strlen(row->name)] = 0;
            expect(f, Q3N_ERR_FORMAT, at, quoted);
            continue;
        }
        for (int k = 0; k < 2; k++) {
            f = fresh();
            if (row->kind == 'F') put_entry_f64(&f, row->name, k ? row->max * 2 : row->min - 1);
            else put_entry_u64(&f, row->name,
                               (uint64_t)(int64_t)(k ? row->max + 1 : row->min - 1));
            expect(f, Q3N_ERR_FORMAT, at, quoted);
        }
        f = fresh();
        if (row->kind == 'F') put_entry_f64(&f, row->name, NAN);
        else put_entry_u64(&f, row->name, (1ull << 32) + 1);     /* 1, if cut to 32 bits */
        expect(f, Q3N_ERR_FORMAT, at, quoted);
    }
}

static void test_other_keys(void **state)
{
    (void)state;
    static const uint8_t ints[8 * 300] = { 1 };
    static const uint8_t large[8] = { 0, 0, 0, 0, 1 };
    static const uint8_t minus[8] = { 255, 255, 255, 255, 255, 255, 255, 255 };
    char text[300];
    memset(text, 'a', sizeof text);
    const struct {
        const char *key;
        int         type;
        const void *value;
        size_t      bytes;
        q3n_result  result;      /* Q3N_OK: the model opens                                      */
    } rows[] = {
        { "eos_ids", 1, ints, 8 * 16, Q3N_OK },
        { "eos_ids", 1, ints, 8 * 17, Q3N_ERR_FORMAT },
        { "eos_ids", 3, "x", 1, Q3N_ERR_FORMAT },        { "eos_ids", 1, minus, 8, Q3N_ERR_FORMAT },
        { "eos_ids", 1, large, 8, Q3N_ERR_FORMAT },      { "eos_ids", 2, ints, 8, Q3N_ERR_FORMAT },
        { "chat", 3, text, 31, Q3N_OK },                 { "chat", 3, text, 32, Q3N_ERR_FORMAT },
        { "chat", 1, ints, 8, Q3N_ERR_FORMAT },          { "chat", 3, "a\0b", 3, Q3N_ERR_FORMAT },
        { "chat", 3, "", 0, Q3N_OK },
        { "tokenizer_nfc", 1, ints, 8, Q3N_OK },
        { "tokenizer_nfc", 1, ints, 16, Q3N_ERR_FORMAT },
        { "tokenizer_nfc", 3, "1", 1, Q3N_ERR_FORMAT },
        { "tokenizer_pattern", 3, "qwen2", 5, Q3N_OK },
        { "tokenizer_pattern", 3, "qwen3_5", 7, Q3N_OK },
        { "tokenizer_pattern", 3, "gpt2", 4, Q3N_ERR_UNSUPPORTED },
        { "tokenizer_pattern", 1, ints, 8, Q3N_ERR_FORMAT },
        { "tokenizer_pattern", 3, text, 64, Q3N_ERR_FORMAT },
        { "tokenizer_prefix", 1, ints, 8 * 16, Q3N_OK },
        { "tokenizer_prefix", 1, ints, 8 * 17, Q3N_ERR_FORMAT },
        { "tokenizer_suffix", 1, minus, 8, Q3N_ERR_FORMAT },
        { "tokenizer_suffix", 3, "x", 1, Q3N_ERR_FORMAT },
        { "pad_id", 1, ints, 8, Q3N_OK },                { "pad_id", 1, ints, 16, Q3N_ERR_FORMAT },
        { "pad_id", 1, minus, 8, Q3N_ERR_FORMAT },       { "pad_id", 1, large, 8, Q3N_ERR_FORMAT },
        { "labels", 3, "a", 1, Q3N_ERR_FORMAT },         { "labels", 3, "", 0, Q3N_ERR_FORMAT },
        { "labels", 1, ints, 8, Q3N_ERR_FORMAT },
    };
    for (int i = 0; i < COUNT(rows); i++) {
        const image f = with_entry(&good, rows[i].key, rows[i].type, rows[i].value, rows[i].bytes);
        if (rows[i].result == Q3N_OK) expect_good(f);
        else expect(f, rows[i].result, BEHIND(f),
                    rows[i].result == Q3N_ERR_FORMAT ? rows[i].key : "pattern");
    }
    static const char *const kinds[] = { "layer_types", "layer_experts" };
    for (int i = 0; i < COUNT(kinds); i++) {
        image f = fresh();
        put_entry_u64(&f, kinds[i], 2);
        expect(f, Q3N_ERR_FORMAT, (int64_t)entry(&f, kinds[i]), "0 or 1");
        f = fresh();
        f.data[entry(&f, kinds[i]) + 1] = 2;
        expect(f, Q3N_ERR_FORMAT, (int64_t)entry(&f, kinds[i]), "ints");
        f = fresh();
        f.data[entry(&f, kinds[i]) + 8] = 'X';               /* the key is another one: not given */
        uint8_t many[8 * 257] = { 0 };
        image g = with_entry(&f, kinds[i], 1, many, sizeof many);
        expect(g, Q3N_ERR_FORMAT, BEHIND(g), "at most 256");
        free(f.data);
    }
    image f = fresh();
    f.data[entry(&f, "name") + 8] = 'n';
    f.data[entry(&f, "name") + 8 + 4] = 0;
    expect(f, Q3N_ERR_FORMAT, (int64_t)entry(&good, "name"), "'name'|255");
}

/* Keys that must agree with others, wherever they stand. */
static void test_keys_together(void **state)
{
    (void)state;
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_error err;
    q3n_model *m;
    small_config(&c);
    uint8_t beyond[8] = { (uint8_t)c.vocab_size, (uint8_t)(c.vocab_size >> 8) };
    image f = with_entry(&good, "tokenizer_suffix", 1, beyond, 8);
    expect(f, Q3N_ERR_FORMAT, (int64_t)section(&f, 1), "tokenizer_suffix|vocab_size");
    f = with_entry(&good, "labels", 3, "a\0b", 4);                 /* C ends it with a 0 */
    expect(f, Q3N_ERR_FORMAT, (int64_t)section(&f, 1), "2 names|num_labels, 0");
    c.num_labels = 2;
    const image head = make_file(&c, Q3N_TYPE_F32);
    f = with_entry(&head, "labels", 3, "\0b c", 4);                /* no byte 0 at the end */
    expect(f, Q3N_ERR_FORMAT, BEHIND(f), "labels");
    const image more = with_entry(&head, "labels", 3, "a\0b", 4);
    seal(&more);
    assert_int_equal(open_image(&m, &more, 0, &err), Q3N_OK);
    assert_string_equal(q3n_model_label(m, 0), "a");
    assert_string_equal(q3n_model_label(m, 1), "b");
    assert_null(q3n_model_label(m, 2));
    assert_null(q3n_model_label(m, -1));
    q3n_model_close(m);
    free(more.data);
    free(head.data);
}

/* Scores as [HF]'s text-classification pipeline shows them. */
static void test_probabilities(void **state)
{
    (void)state;
    static const float e = 2.71828183f;
    const float soft = 1.0f / (1.0f + e), hard = e * soft;         /* softmax of 0 and 1 */
    const struct { int n_labels, problem; float want[2]; } rows[] = {
        { 1, Q3N_PROBLEM_NONE, { 0.5f } },
        { 1, Q3N_PROBLEM_SINGLE_LABEL_CLASSIFICATION, { 0.5f } },
        { 1, Q3N_PROBLEM_REGRESSION, { 0.0f } },
        { 2, Q3N_PROBLEM_NONE, { soft, hard } },
        { 2, Q3N_PROBLEM_SINGLE_LABEL_CLASSIFICATION, { soft, hard } },
        { 2, Q3N_PROBLEM_MULTI_LABEL_CLASSIFICATION, { 0.5f, hard } },
        { 2, Q3N_PROBLEM_REGRESSION, { 0.0f, 1.0f } },
    };
    for (int i = 0; i < COUNT(rows); i++) {
        q3n_config c = Q3N_INIT(q3n_config);
        q3n_error err;
        q3n_model *m;
        small_config(&c);
        c.num_labels = rows[i].n_labels;
        c.problem_type = rows[i].problem;
        const image f = make_file(&c, Q3N_TYPE_F32);
        assert_int_equal(open_image(&m, &f, 0, &err), Q3N_OK);
        assert_int_equal(q3n_model_config(m)->problem_type, rows[i].problem);
        assert_null(q3n_model_label(m, 0));
        float scores[2] = { 0.0f, 1.0f };
        assert_int_equal(q3n_model_probabilities(m, scores, NULL), Q3N_ERR_ARG);
        assert_int_equal(q3n_model_probabilities(m, scores, scores), Q3N_OK);
        for (int k = 0; k < rows[i].n_labels; k++)
            assert_true(fabsf(scores[k] - rows[i].want[k]) < 1e-6f);
        if (rows[i].n_labels == 2) {                     /* as large as scores come */
            const float large[2] = { -3e38f, 3e38f };
            assert_int_equal(q3n_model_probabilities(m, large, scores), Q3N_OK);
            if (rows[i].problem != Q3N_PROBLEM_REGRESSION)
                assert_true(scores[0] == 0.0f && scores[1] == 1.0f);
        }
        q3n_model_close(m);
        free(f.data);
    }
    q3n_error err;
    q3n_model *m;
    float one = 1.0f;
    assert_int_equal(open_image(&m, &good, 0, &err), Q3N_OK);
    assert_int_equal(q3n_model_probabilities(m, &one, &one), Q3N_ERR_UNSUPPORTED);
    q3n_model_close(m);
}

/* Fields that are each in range and contradict one another: the message of q3n_config_check comes
 * through. */
static void test_geometry(void **state)
{
    (void)state;
    static const struct { const char *key; uint64_t v; const char *words; } rows[] = {
        { "num_attention_heads", 5, "num_attention_heads 5" },
        { "rotary_dim", 7, "rotary_dim 7" },
        { "rotary_dim", 18, "rotary_dim 18" },
        { "num_experts_per_tok", 7, "num_experts_per_tok 7|num_experts 6" },
        { "num_experts", 0, "num_experts" },
        { "moe_intermediate_size", 0, "moe_intermediate_size" },
        { "linear_num_key_heads", 3, "linear_num_value_heads 4|linear_num_key_heads 3" },
        { "linear_conv_kernel_dim", 0, "linear_conv_kernel_dim" },
        { "causal", 0, "causal" },
    };
    for (int i = 0; i < COUNT(rows); i++) {
        const image f = fresh();
        put_entry_u64(&f, rows[i].key, rows[i].v);
        expect(f, Q3N_ERR_FORMAT, (int64_t)section(&f, 1), rows[i].words);
    }
    const image f = fresh();                                 /* a field that has no default */
    f.data[entry(&f, "hidden_size") + 8] = 'X';
    expect(f, Q3N_ERR_FORMAT, (int64_t)section(&f, 1), "hidden_size");
}

/* ---- Tensor table ---- */
#define Q_PROJ  "layers.1.self_attn.q_proj.weight"
#define EXPERTS "layers.0.mlp.experts.up_proj.weight"
#define NORM    "layers.0.input_layernorm.weight"
#define ROUTER  "layers.0.mlp.gate.weight"

static void test_table(void **state)
{
    (void)state;
    const size_t head = section(&good, 2);
    static const struct { size_t at; uint32_t v; } heads[] = {
        { 0, 0xFFFFFFFF }, { 0, (1 << 16) + 1 }, { 0, 1 << 16 }, { 4, 79 }, { 4, 0 }, { 4, 4097 },
        { 4, 0xFFFFFFFF }, { 4, 88 },
    };
    image f;
    for (int i = 0; i < COUNT(heads); i++) {
        f = fresh();
        put_u32(&f, head + heads[i].at, heads[i].v);
        expect(f, Q3N_ERR_FORMAT, (int64_t)head, "tensor records");
    }
    for (uint64_t n = 0; n < 8; n++) {
        f = fresh();
        put_u64(&f, section_record(&f, 2) + 16, n);
        expect(f, Q3N_ERR_FORMAT, (int64_t)head, "TENSORS is cut off");
    }
    f = fresh();
    put_u64(&f, section_record(&f, 2) + 16, u64(&f, section_record(&f, 2) + 16) - 1);
    expect(f, Q3N_ERR_FORMAT, (int64_t)head, "do not fit");

    /* larger records: what lies after the known 80 bytes is passed over */
    const uint32_t n = u32(&good, head);
    uint8_t *wide = (uint8_t *)malloc(8 + (size_t)n * 96);
    assert_non_null(wide);
    memset(wide, 0xEE, 8 + (size_t)n * 96);
    memcpy(wide, good.data + head, 8);
    const uint32_t record = 96;
    memcpy(wide + 4, &record, 4);
    const size_t shift = (8 + (size_t)n * 96 + 40 + 4095) / 4096 * 4096;
    for (size_t i = 0; i < n; i++) {
        uint8_t *to = wide + 8 + 96 * i;
        memcpy(to, good.data + head + 8 + 80 * i, 80);
        const uint64_t place = q3n__load_u64(to + 40) + shift;
        memcpy(to + 40, &place, sizeof place);
    }
    expect_good(with_section(&good, 2, 1, wide, 8 + (size_t)n * 96));
    free(wide);
}

static void test_names(void **state)
{
    (void)state;
    const size_t at = tensor(&good, Q_PROJ);
    const uint32_t names = (uint32_t)u64(&good, section_record(&good, 3) + 16);
    const struct { uint32_t offset, bytes; } rows[] = {
        { 0, 0 }, { 0, 256 }, { names, 1 }, { names - 1, 2 }, { 0xFFFFFFFF, 1 }, { names + 1, 1 },
        { 0xFFFFFF80u, 255 },
    };
    image f;
    for (int i = 0; i < COUNT(rows); i++) {
        f = fresh();
        put_u32(&f, at, rows[i].offset);
        put_u32(&f, at + 4, rows[i].bytes);
        expect(f, Q3N_ERR_FORMAT, (int64_t)at, "name");
    }
    f = fresh();
    f.data[section(&f, 3) + u32(&f, at) + 3] = 0;
    expect(f, Q3N_ERR_FORMAT, (int64_t)at, "is not a name");
    f = fresh();
    const size_t k_proj = tensor(&f, "layers.1.self_attn.k_proj.weight");
    memcpy(f.data + k_proj, f.data + at, 8);
    expect(f, Q3N_ERR_FORMAT, (int64_t)(k_proj > at ? k_proj : at), Q_PROJ "|twice");
}

/* ---- Messages ---- */

/* Any bytes, of any length, in any place: the message is clean, says the same when it is put into
 * another one, begins with where and ends with what was expected. */
static void test_messages(void **state)
{
    (void)state;
    uint32_t random = 1;
    for (int round = 0; round < 20000; round++) {
        static char text[6000];
        const uint32_t kind = next_random(&random) % 5, max = next_random(&random) % 8;
        const size_t n = next_random(&random) % (max == 0 ? 5990 : max < 4 ? 600 : 100);
        for (size_t i = 0; i < n; i++) {
            const uint32_t r = next_random(&random) >> 8;
            text[i] = (char)(kind == 0 ? 1 + r % 255 : kind == 1 ? 1 + r % 31
                           : kind == 2 ? 128 + r % 128
                           : kind == 3 ? (uint8_t)"\xE4\xBD\xA0"[i % 3] : 'a' + r % 26);
        }
        text[n] = 0;
        q3n_error e = { Q3N_OK, 0, "" }, again;
        assert_int_equal(q3n__fail(&e, Q3N_ERR_FORMAT, 7, "m.q3n: %s: type q3, expected f32", text),
                         Q3N_ERR_FORMAT);
        assert_true(message_is_clean(e.message, sizeof e.message));
        assert_memory_equal(e.message, "m.q3n: ", 7);
        const size_t length = strlen(e.message);
        if (n < 4900)
            assert_string_equal(e.message + length - 23, ": type q3, expected f32");
        if (kind == 4) assert_int_equal(strstr(e.message, " [...] ") != NULL, 7 + n + 23 > 499);
        q3n__fail(&again, e.code, e.offset, "%s", e.message);
        assert_string_equal(again.message, e.message);
    }
}

/* A name of 255 bytes of each kind, in a record that is wrong: name and found value are read. */
static void test_messages_about_names(void **state)
{
    (void)state;
    static const struct { const char *byte, *shown; } kinds[] = {
        { "\x01", "\\x01" }, { "\x1b", "\\x1B" }, { "\xff", "\\xFF" }, { "\n", "\\x0A" },
        { "\x7f", "\\x7F" }, { "\xc2\x9b", "\\xC2\\x9B" },
        { "\xe2\x80\xae", "\\xE2\\x80\\xAE" },
        { "\xed\xa0\x80", "\\xED\\xA0\\x80" }, { "\xc3\xa9", "\xc3\xa9" },
        { "\xf0\x9f\x98\x80", "\xf0\x9f\x98\x80" }, { "\xf0\x9f\x98", "\\xF0\\x9F\\x98" },
    };
    for (int k = 0; k < COUNT(kinds); k++) {
        char names[256];
        const size_t n = strlen(kinds[k].byte);
        for (size_t i = 0; i < 255; i++) names[i] = kinds[k].byte[i % n];
        image f = with_section(&good, 3, 1, names, 255);
        const size_t at = section(&f, 2) + 8;
        put_u32(&f, at, 0);
        put_u32(&f, at + 4, 255);
        put_u64(&f, at + 16, 0);
        char words[80];
        snprintf(words, sizeof words, "%s|dimension 0 is 0", kinds[k].shown);
        expect(f, Q3N_ERR_FORMAT, (int64_t)at + 16, words);
    }
}

/* ---- As many tensors as there may be, with names made to be slow ---- */
typedef enum {
    NAMES_ASCENDING, NAMES_DESCENDING, NAMES_MIXED, NAMES_LONG, NAMES_KINDS, NAMES_KNOWN
} name_kind;

#define NAME_BYTES 250

static void flood_name(char *name, name_kind kind, uint32_t i, uint32_t n)
{
    const uint32_t number = kind == NAMES_DESCENDING ? n - i : kind == NAMES_ASCENDING ? i
                          : i * 40503u % 65536u;
    memset(name, 'x', NAME_BYTES);
    snprintf(name + (kind == NAMES_LONG ? NAME_BYTES - 8 : 0), 9, "%08x", number);
    if (kind != NAMES_LONG) name[8] = '.';
    if (kind == NAMES_KNOWN) memcpy(name + 9, ".mlp.experts.", 13);
    if (kind == NAMES_KNOWN && i % 2) memcpy(name, "mtp.", 4);
}

/* The good file with n more tensors, all where the first one lies. */
static image with_flood(name_kind kind, uint32_t n)
{
    const uint32_t own = u32(&good, section(&good, 2));
    const size_t own_names = (size_t)u64(&good, section_record(&good, 3) + 16);
    const size_t records = 8 + 80 * (size_t)(own + n), names = own_names + (size_t)n * NAME_BYTES;
    uint8_t *tensors = (uint8_t *)calloc(1, records), *text = (uint8_t *)calloc(1, names + 1);
    assert_true(tensors && text);
    memcpy(text, good.data + section(&good, 3), own_names);
    for (uint32_t i = 0; i < n; i++)
        flood_name((char *)text + own_names + (size_t)i * NAME_BYTES, kind, i, n);
    const image f = with_section(&good, 3, 1, text, names);
    memcpy(tensors, f.data + section(&f, 2), 8 + 80 * (size_t)own);
    const size_t shift = (records + 32 + 8 + 4095) / 4096 * 4096;   /* with_section moves data so */
    for (uint32_t i = 0; i < own + n; i++) {
        uint8_t *record = tensors + 8 + 80 * (size_t)i;
        if (i >= own) memcpy(record, tensors + 8, 80);
        const uint64_t offset = q3n__load_u64(record + 40) + (i < own ? shift : 0);
        const uint32_t name[2] = { (uint32_t)(own_names + (size_t)(i - own) * NAME_BYTES),
                                   NAME_BYTES };
        memcpy(record + 40, &offset, 8);
        if (i >= own) memcpy(record, name, sizeof name);
    }
    const uint32_t count = own + n;
    memcpy(tensors, &count, 4);
    const image g = with_section(&f, 2, 1, tensors, records);
    free(f.data);
    free(tensors);
    free(text);
    return g;
}

/* Opening takes order n log n comparisons of names, finding one log n, whatever the names are. */
static void test_many_names(void **state)
{
    (void)state;
    const uint32_t n = Q3N__MAX_TENSORS - u32(&good, section(&good, 2));
    for (name_kind kind = 0; kind < NAMES_KINDS; kind++) {
        const image f = with_flood(kind, n);
        char name[NAME_BYTES + 1] = "";
        q3n_error err;
        q3n_model *m;
        seal(&f);
        steps = 0;
        if (open_image(&m, &f, 0, &err) != Q3N_OK) fail_msg("%s", err.message);
        assert_in_range(steps, 65536, 2 * 16 * 65536 + 1000 * 17);
        for (uint32_t i = 0; i < n; i += 997) {
            flood_name(name, kind, i, n);
            steps = 0;
            const q3n_tensor *t = q3n_model_find_tensor(m, name);
            assert_non_null(t);
            assert_string_equal(t->name, name);
            name[NAME_BYTES - 1] ^= 1;                     /* absent, or another one's */
            t = q3n_model_find_tensor(m, name);
            if (t) assert_string_equal(t->name, name);
            assert_in_range(steps, 2, 2 * 17);
        }
        q3n_model_close(m);
        free(f.data);
    }
}

/* What a token reads is decided by the plan: not by names that look like its tensors'. */
static void test_strange_tensors(void **state)
{
    (void)state;
    const image plain = fresh(), f = with_flood(NAMES_KNOWN, 4);
    q3n_model_stats want = Q3N_INIT(q3n_model_stats), got = Q3N_INIT(q3n_model_stats);
    const image *images[2] = { &plain, &f };
    for (int i = 0; i < 2; i++) {
        q3n_error err;
        q3n_model *m;
        seal(images[i]);
        if (open_image(&m, images[i], 0, &err) != Q3N_OK) fail_msg("%s", err.message);
        assert_int_equal(q3n_model_stats_get(m, i ? &got : &want), Q3N_OK);
        if (i) {
            const q3n_tensor *first = q3n_model_tensor(m, 0);
            const int64_t n = first->dim[0] * first->dim[1] * first->dim[2];
            assert_int_equal(got.n_weights, want.n_weights + 4 * n);
            assert_int_equal(got.types[first->type].n_tensors,
                             want.types[first->type].n_tensors + 4);
        }
        q3n_model_close(m);
        free(images[i]->data);
    }
    assert_true(want.n_weights_active > 0);
    assert_int_equal(got.n_weights_active, want.n_weights_active);
    assert_int_equal(got.decode_bytes, want.decode_bytes);
    assert_int_equal(got.mtp_weights, want.mtp_weights);
}

static void test_records(void **state)
{
    (void)state;
    const size_t q = tensor(&good, Q_PROJ), e = tensor(&good, EXPERTS);
    const uint64_t file = good.bytes, meta = meta_bytes(&good), slice = u64(&good, e + 48);
    const uint64_t stride = u64(&good, e + 56), place = u64(&good, q + 40);
    const struct {
        size_t      record;
        int         at, wide;    /* byte of the record, 1 = 64 bits                              */
        uint64_t    v;
        q3n_result  result;
        int         noticed;     /* byte of the record that the error names                      */
        const char *words;
    } rows[] = {
        { q,  8, 0, Q3N_TYPE_COUNT, Q3N_ERR_UNSUPPORTED, 8, Q_PROJ "|type" },
        { q,  8, 0, 0xFFFFFFFF, Q3N_ERR_UNSUPPORTED, 8, Q_PROJ "|4294967295" },
        { q, 12, 0, 0, Q3N_ERR_FORMAT, 12, Q_PROJ "|0 dimensions|1 to 3" },
        { q, 12, 0, 4, Q3N_ERR_FORMAT, 12, Q_PROJ "|4 dimensions" },
        { q, 12, 0, 1, Q3N_ERR_FORMAT, 24, Q_PROJ "|dimension 1 is 32" },
        { q, 16, 1, 0, Q3N_ERR_FORMAT, 16, Q_PROJ "|dimension 0 is 0" },
        { q, 16, 1, (1u << 30) + 1, Q3N_ERR_FORMAT, 16, Q_PROJ "|1073741825" },
        { q, 24, 1, UINT64_MAX, Q3N_ERR_FORMAT, 24, Q_PROJ "|dimension 1" },
        { q, 32, 1, 2, Q3N_ERR_FORMAT, 32, Q_PROJ "|dimension 2 is 2" },
        { q, 16, 1, 129, Q3N_ERR_FORMAT, 48, Q_PROJ "|8192 bytes|129 rows" },
        { q, 16, 1, 1u << 30, Q3N_ERR_FORMAT, 48, Q_PROJ "|slice" },
        { q, 24, 1, 1u << 30, Q3N_ERR_FORMAT, 48, Q_PROJ "|slice" },
        { q, 48, 1, 0, Q3N_ERR_FORMAT, 48, Q_PROJ "|slice of 0 bytes" },
        { q, 48, 1, 8193, Q3N_ERR_FORMAT, 48, Q_PROJ "|slice of 8193 bytes" },
        { q,  8, 0, Q3N_TYPE_F32, Q3N_ERR_FORMAT, 48, Q_PROJ "|f32" },
        { q, 40, 1, meta / 64 * 64 - 64, Q3N_ERR_FORMAT, 40, Q_PROJ "|not inside" },
        { q, 40, 1, place + 32, Q3N_ERR_FORMAT, 40, Q_PROJ "|not at a multiple of 64" },
        { q, 40, 1, place + 1, Q3N_ERR_FORMAT, 40, Q_PROJ "|not at a multiple of 64" },
        { q, 40, 1, file - 32, Q3N_ERR_FORMAT, 40, Q_PROJ "|not inside" },
        { q, 40, 1, (file / 64 + 1) * 64, Q3N_ERR_FORMAT, 40, Q_PROJ "|not inside" },
        { q, 40, 1, UINT64_MAX - 63, Q3N_ERR_FORMAT, 40, Q_PROJ "|not inside" },
        { q, 40, 1, (file - 8192) / 64 * 64 + 64, Q3N_ERR_FORMAT, 40, Q_PROJ "|not inside" },
        { q, 56, 1, 64, Q3N_ERR_FORMAT, 56, Q_PROJ "|stride of 64" },
        { e, 56, 1, 0, Q3N_ERR_FORMAT, 56, EXPERTS "|stride of 0" },
        { e, 56, 1, stride + 32, Q3N_ERR_FORMAT, 56, EXPERTS "|stride" },
        { e, 56, 1, slice - 64, Q3N_ERR_FORMAT, 56, EXPERTS "|stride|6 slices" },
        { e, 56, 1, UINT64_MAX - 63, Q3N_ERR_FORMAT, 56, EXPERTS "|stride" },
        { e, 56, 1, file / 64 * 64, Q3N_ERR_FORMAT, 56, EXPERTS "|stride" },
        { e, 16, 1, 1u << 30, Q3N_ERR_FORMAT, 56, EXPERTS "|1073741824 slices" },
    };
    for (int i = 0; i < COUNT(rows); i++) {
        const image f = fresh();
        if (rows[i].wide) put_u64(&f, rows[i].record + (size_t)rows[i].at, rows[i].v);
        else put_u32(&f, rows[i].record + (size_t)rows[i].at, (uint32_t)rows[i].v);
        expect(f, rows[i].result, (int64_t)rows[i].record + rows[i].noticed, rows[i].words);
    }
}

/* ---- What the geometry asks for ---- */

/* Every tensor of the plan: left out, with another shape, a vector with another type. */
static q3n_result check_item(void *user, const q3n__plan_item *item)
{
    const size_t at = tensor(&good, item->name);
    char words[300], shape[80];
    (void)user;
    image f = fresh();
    drop_tensor(&f, item->name);
    q3n__dims_string(item->dim, item->n_dims, shape);
    snprintf(words, sizeof words, "%s|missing|%s", item->name, shape);
    expect(f, Q3N_ERR_FORMAT, (int64_t)section(&f, 2), words);

    f = fresh();                                  /* one more dimension, of the same bytes */
    const int64_t place = (int64_t)u64(&f, at + 40);
    if (item->n_dims == 1) {
        put_u32(&f, at + 12, 2);
        put_u64(&f, at + 24, u64(&f, at + 16));
        put_u64(&f, at + 16, 1);
        snprintf(words, sizeof words, "%s|shape [1, %lld], expected %s", item->name,
                 (long long)item->dim[0], shape);
    } else {                                      /* two dimensions changed places */
        const size_t first = at + 16 + 8 * (size_t)(item->n_dims - 2);
        const uint64_t rows = u64(&f, first), cols = u64(&f, first + 8);
        if (rows == cols) {
            put_u64(&f, first, rows * 2);
            put_u64(&f, first + 8, cols / 2);
        } else {
            put_u64(&f, first, cols);
            put_u64(&f, first + 8, rows);
        }
        snprintf(words, sizeof words, "%s|expected %s", item->name, shape);
    }
    expect(f, Q3N_ERR_FORMAT, place, words);

    if (item->role == Q3N__ROLE_VEC) {
        f = fresh();
        put_u32(&f, at + 8, Q3N_TYPE_F16);
        put_u64(&f, at + 48, u64(&f, at + 48) / 2);
        snprintf(words, sizeof words, "%s|type f16, expected f32", item->name);
        expect(f, Q3N_ERR_FORMAT, place, words);
    }
    return Q3N_OK;
}

static void test_plan(void **state)
{
    (void)state;
    q3n_config c = Q3N_INIT(q3n_config);
    small_config(&c);
    assert_int_equal(q3n__plan_visit(&c, check_item, NULL), Q3N_OK);

    image f = fresh();                            /* tensors that nobody asks for are passed over */
    put_entry_u64(&f, "tie_word_embeddings", 1);
    expect_good(f);
    f = fresh();
    put_entry_u64(&f, "num_labels", 3);
    expect(f, Q3N_ERR_FORMAT, (int64_t)section(&f, 2), "score.weight|missing|[3, 32]");
    f = fresh();
    put_entry_u64(&f, "num_hidden_layers", 3);
    expect(f, Q3N_ERR_FORMAT, (int64_t)section(&f, 1), "layer");   /* two kinds for three layers */
    f = fresh();
    put_entry_u64(&f, "layer_types", 0);
    expect(f, Q3N_ERR_FORMAT, (int64_t)section(&f, 2), "layers.0.self_attn.q_proj.weight|missing");
    f = fresh();
    put_entry_u64(&f, "num_mtp_layers", 1);
    expect(f, Q3N_ERR_FORMAT, (int64_t)section(&f, 2), "mtp.fc.weight|missing|[32, 64]");
}

/* Tables of rotary angles end at different positions. */
static void test_rope_tables(void **state)
{
    (void)state;
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_error err;
    q3n_model *m;
    small_config(&c);
    assert_int_equal(q3n_config_set(&c, "rope_type", "table", &err), Q3N_OK);
    assert_int_equal(q3n_config_set(&c, "rotary_dim", "16", &err), Q3N_OK);
    image f = make_file(&c, Q3N_TYPE_F32);
    assert_int_equal(open_image(&m, &f, 0, &err), Q3N_OK);
    q3n_session_options o = Q3N_INIT(q3n_session_options);
    o.capacity = 65;
    assert_int_equal(q3n_session_bytes(m, &o, NULL), 0);      /* the table has 64 positions */
    o.capacity = 64;
    assert_true(q3n_session_bytes(m, &o, NULL) > 0);
    evaluate_some(m);
    q3n_model_close(m);
    const size_t at = tensor(&f, "rope.sin");
    put_u64(&f, at + 16, 63);
    put_u64(&f, at + 48, 63 * 8 * 4);
    expect(f, Q3N_ERR_FORMAT, (int64_t)u64(&f, at + 40), "rope.sin|63 positions|64");
}

static void append_file(const char *path, const uint8_t *data, size_t bytes)
{
    FILE *f = fopen(path, "ab");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, bytes, f), bytes);
    assert_int_equal(fclose(f), 0);
}

/* Files that are not there, are folders, or end too early. */
static void test_paths(void **state)
{
    (void)state;
    q3n_error err;
    q3n_model *m;
    assert_int_equal(q3n_model_open(&m, "/nonexistent/model.q3n", NULL, &err), Q3N_ERR_NO_FILE);
    assert_null(m);
    assert_non_null(strstr(err.message, "/nonexistent/model.q3n"));
    assert_int_equal(q3n_model_open(&m, "/", NULL, &err), Q3N_ERR_IO);
    char path[] = "/tmp/q3n_loader_XXXXXX";
    const int handle = mkstemp(path);
    assert_true(handle >= 0);
    close(handle);                       /* Windows opens nothing that is open for writing */
    assert_int_not_equal(q3n_model_open(&m, path, NULL, &err), Q3N_OK);    /* no bytes at all */
    assert_non_null(strstr(err.message, path));
    append_file(path, good.data, good.bytes - 1);
    assert_int_equal(q3n_model_open(&m, path, NULL, &err), Q3N_ERR_FORMAT);
    assert_int_equal(err.offset, 16);
    assert_non_null(strstr(err.message, path));
    append_file(path, good.data + good.bytes - 1, 1);
    assert_int_equal(q3n_model_open(&m, path, NULL, &err), Q3N_OK);
    evaluate_some(m);
    q3n_model_close(m);
    remove(path);
}

/* ---- Damage ---- */

/* Cut at every byte of the metadata and just after: as it is; with a header that agrees; with a
 * header that says the metadata end there too, and a checksum that is right. */
static void test_truncation(void **state)
{
    (void)state;
    const size_t meta = meta_bytes(&good);
    q3n_error err;
    q3n_model *m;
    for (size_t n = 0; n <= meta + 200; n++) {
        const image f = image_copy(&good, n);
        assert_int_equal(open_image(&m, &f, 0, &err), Q3N_ERR_FORMAT);
        assert_int_equal(open_image(&m, &f, 1, &err), Q3N_ERR_FORMAT);
        if (n >= 64) {
            put_u64(&f, 16, n);
            seal(&f);
            assert_int_equal(open_image(&m, &f, 0, &err), Q3N_ERR_FORMAT);
            if (n < meta) assert_int_equal(err.offset, 24);
        }
        free(f.data);
    }
}

static void test_short_metadata(void **state)
{
    (void)state;
    const size_t meta = meta_bytes(&good);
    q3n_error err;
    q3n_model *m;
    for (size_t n = 64; n < meta; n++) {
        const image f = image_copy(&good, n);
        put_u64(&f, 16, n);
        put_u64(&f, 24, n);
        seal(&f);
        assert_int_equal(open_image(&m, &f, 0, &err), Q3N_ERR_FORMAT);
        free(f.data);
    }
}

/* Every bit of the metadata of `f`, from byte `from` to byte `to`, `step` bits apart. */
static void flip_bits(const image *f, size_t from, size_t to, size_t step)
{
    q3n_error err;
    q3n_model *m;
    assert_int_equal(open_image(&m, f, 0, &err), Q3N_OK);
    const q3n_config config = *q3n_model_config(m);
    q3n_model_close(m);
    int opened = 0;
    for (size_t bit = from * 8; bit < to * 8; bit += step) {
        uint8_t *byte = &f->data[bit / 8];
        *byte ^= (uint8_t)(1u << (bit % 8));
        if (open_image(&m, f, 0, &err) == Q3N_OK) fail_msg("bit %zu: opened", bit);
        if (open_image(&m, f, 1, &err) == Q3N_OK) {
            const int same = memcmp(q3n_model_config(m), &config, sizeof config) == 0;
            if (!same || opened++ % 16 == 0) evaluate_some(m);
            q3n_model_close(m);
        }
        *byte ^= (uint8_t)(1u << (bit % 8));
    }
    assert_true(opened > 0);
}

static void test_bit_flips(void **state)
{
    (void)state;
    const image f = fresh();
    flip_bits(&f, 0, meta_bytes(&f), 1);
    assert_memory_equal(f.data, good.data, good.bytes);
    free(f.data);
}

/* The checksum is not looked at, as if an attacker had made it right.  Bytes become 0, 255 or one
 * more. */
static void test_byte_changes(void **state)
{
    (void)state;
    const image f = fresh();
    q3n_error err;
    q3n_model *m;
    q3n_config config = Q3N_INIT(q3n_config);
    small_config(&config);
    for (size_t at = 0; at < meta_bytes(&good); at++) {
        const uint8_t was = f.data[at], values[] = { 0, 255, (uint8_t)(was + 1) };
        for (int k = 0; k < COUNT(values); k++) {
            f.data[at] = values[k];
            if (open_image(&m, &f, 1, &err) != Q3N_OK) continue;
            if (at % 16 == 0 || memcmp(q3n_model_config(m), &config, sizeof config) != 0)
                evaluate_some(m);
            q3n_model_close(m);
        }
        f.data[at] = was;
    }
    free(f.data);
}

/* The tokenizer's section, sampled: bits of its tables and text. */
static void test_tokenizer_flips(void **state)
{
    (void)state;
    char path[512];
    snprintf(path, sizeof path, "%s/stories.q3n", Q3N_TEST_MODELS);
    const image f = image_read(path);
    const size_t at = section(&f, 4), end = at + (size_t)u64(&f, section_record(&f, 4) + 16);
    const size_t n_tokens = u32(&f, at), texts = at + 16 + 4 * (n_tokens + 1);
    q3n_error err;
    q3n_model *m;
    flip_bits(&f, section_record(&f, 4), section_record(&f, 4) + 32, 1);
    flip_bits(&f, at, at + 64, 3);
    flip_bits(&f, texts - 64, texts + 64, 7);
    flip_bits(&f, at + 64, end, (end - at) / 20 + 1);
    for (size_t n = 0; n < end - at; n += (end - at) / 61) {   /* the section ends too early */
        put_u64(&f, section_record(&f, 4) + 16, n);
        if (open_image(&m, &f, 1, &err) == Q3N_OK) fail_msg("%zu of %zu bytes opened", n, end - at);
        assert_true(err.offset >= (int64_t)at && err.offset <= (int64_t)end);
    }
    free(f.data);
}

/* ---- Numbers that are none ---- */
typedef struct {
    q3n_session *s;
    int          n_checked;
} routes;

/* Whatever the probabilities are, k different experts are chosen for every token. */
static void check_routes(void *user, int l, const float *x, int n, int d)
{
    routes *r = (routes *)user;
    const q3n_config *c = q3n_model_config(r->s->model);
    (void)x;
    (void)d;
    if (l < 0 || l >= c->num_hidden_layers || !c->layer_experts[l]) return;
    for (int t = 0; t < n; t++) {
        const int *top = r->s->engine->run.top + t * c->num_experts_per_tok;
        for (int i = 0; i < c->num_experts_per_tok; i++) {
            assert_in_range(top[i], 0, c->num_experts - 1);
            if (i > 0) assert_true(top[i] > top[i - 1]);
        }
    }
    r->n_checked++;
}

static int n_without_numbers;

static void evaluate_nonsense(const image *f, q3n_isa isa, int n_threads)
{
    q3n_error err;
    q3n_model *m;
    assert_int_equal(open_image(&m, f, 0, &err), Q3N_OK);
    routes r = { NULL, 0 };
    q3n_session_options o = Q3N_INIT(q3n_session_options);
    o.capacity = 40;
    o.count_experts = 1;
    o.engine_options = OWN_ENGINE(.batch_size = 16, .n_threads = n_threads, .isa = isa,
                                  .layer_hook = { check_routes, &r });
    assert_int_equal(q3n_session_create(&r.s, m, &o, &err), Q3N_OK);
    int32_t ids[40];
    float logits[40];
    assert_int_equal(q3n_model_config(m)->vocab_size, COUNT(logits));
    for (int i = 0; i < COUNT(ids); i++) ids[i] = i;
    assert_int_equal(q3n_session_eval(r.s, ids, 37, logits), Q3N_OK);
    assert_int_equal(q3n_session_eval(r.s, ids, 1, logits), Q3N_OK);
    assert_true(r.n_checked > 0);
    int64_t chosen = 0;
    const int64_t *counts = q3n_session_expert_counts(r.s, 0);
    for (int e = 0; e < q3n_model_config(m)->num_experts; e++) chosen += counts[e];
    assert_int_equal(chosen, 38 * q3n_model_config(m)->num_experts_per_tok);

    const q3n_sampler_options so = { .size = sizeof so, .temperature = 1.0f, .top_k = 5,
                                     .top_p = 0.9f };
    assert_int_equal(q3n_session_set_sampler(r.s, &so), Q3N_OK);
    q3n_sampler *sampler = q3n_session_sampler(r.s);
    int numbers = 0, n_chosen = 0;
    for (int i = 0; i < COUNT(logits); i++) numbers += logits[i] > -INFINITY;
    int32_t token = 0;
    const q3n_result result = q3n_sampler_sample(sampler, logits, &token);
    assert_int_equal(result, numbers ? Q3N_OK : Q3N_ERR_NUMERIC);
    assert_in_range(token, 0, COUNT(logits) - 1);

    /* The next step: chosen from numbers, or an error that leaves session and sampler alone. */
    float next[40];
    const int length = q3n_session_length(r.s);
    assert_int_equal(q3n_session_eval(r.s, &token, 1, next), Q3N_OK);
    assert_int_equal(q3n_session_rewind(r.s, length), Q3N_OK);
    for (int i = numbers = 0; i < COUNT(next); i++) numbers += next[i] > -INFINITY;
    const uint64_t rng = sampler->rng;
    const q3n_result step = q3n_session_decode(r.s, token, &token, 1, &n_chosen);
    assert_int_equal(step, numbers ? Q3N_OK : Q3N_ERR_NUMERIC);
    assert_int_equal(q3n_session_length(r.s), length + (step == Q3N_OK));
    if (step != Q3N_OK) {
        assert_true(sampler->rng == rng);
        assert_non_null(strstr(q3n_session_error(r.s)->message, "NaN"));
        assert_int_equal(q3n_session_logits(r.s, next), Q3N_OK);
        for (int i = 0; i < COUNT(next); i++)
            assert_true(next[i] == logits[i] || (isnan(next[i]) && isnan(logits[i])));
    }
    n_without_numbers += step == Q3N_ERR_NUMERIC;
    q3n_session_destroy(r.s);
    q3n_model_close(m);
}

/* Fill a tensor with one 16-bit or 32-bit pattern. */
static void fill_tensor(const image *f, const char *name, q3n_type type, uint32_t bits)
{
    const size_t at = tensor(f, name);
    const size_t n_slices = u32(f, at + 12) == 3 ? (size_t)u64(f, at + 16) : 1;
    const q3n_type own = (q3n_type)u32(f, at + 8);
    const size_t step = own == Q3N_TYPE_F32 ? 4 : 2;
    const uint32_t v = own == Q3N_TYPE_F32 && type != Q3N_TYPE_F32 ? 0x7F800000 | (bits << 16)
                                                                   : bits;
    for (size_t k = 0; k < n_slices; k++)
        for (size_t i = 0; i < u64(f, at + 48); i += step)
            memcpy(f->data + u64(f, at + 40) + k * u64(f, at + 56) + i, &v, step);
}

typedef struct {
    const image *f;
    q3n_type     type;
    uint32_t     bits;
} filling;

static q3n_result fill_item(void *user, const q3n__plan_item *item)
{
    const filling *x = (const filling *)user;
    fill_tensor(x->f, item->name, x->type, x->bits);
    return Q3N_OK;
}

static void test_not_numbers(void **state)
{
    (void)state;
    static const uint32_t patterns[Q3N_TYPE_COUNT][4] = {   /* NaN, -NaN, infinity, the largest */
        [Q3N_TYPE_F32]  = { 0x7FC00000, 0xFFFFFFFF, 0x7F800000, 0x7F7FFFFF },
        [Q3N_TYPE_F16]  = { 0x7E00, 0xFFFF, 0x7C00, 0x7BFF },
        [Q3N_TYPE_BF16] = { 0x7FC0, 0xFFFF, 0x7F80, 0x7F7F },
        /* scales; the codes are what falls on them */
        [Q3N_TYPE_Q8]   = { 0x7E00, 0xFFFF, 0x7C00, 0x7BFF },
        [Q3N_TYPE_Q6]   = { 0x7E00, 0xFFFF, 0x7C00, 0x7BFF },
        [Q3N_TYPE_Q4]   = { 0x7E00, 0xFFFF, 0x7C00, 0x7BFF },
        [Q3N_TYPE_Q3]   = { 0x7E00, 0xFFFF, 0x7C00, 0x7BFF },
    };
    static const char *const one_tensor[] = {
        ROUTER, "layers.1.mlp.gate.weight", "layers.0.linear_attn.in_proj_ba.weight",
        "layers.1.self_attn.k_proj.weight", "embed_tokens.weight", "lm_head.weight", EXPERTS,
    };
    q3n_config c = Q3N_INIT(q3n_config);
    small_config(&c);
    for (int type = 0; type < Q3N_TYPE_COUNT; type++) {
        const image clean = make_file(&c, (q3n_type)type);
        for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {
            if (!isa_runs(isa, __func__)) continue;
            for (int k = 0; k < 4; k++) {
                const image f = image_copy(&clean, clean.bytes);
                filling all = { &f, (q3n_type)type, patterns[type][k] };
                q3n__plan_visit(&c, fill_item, &all);
                evaluate_nonsense(&f, isa, 1 + k % 2);
                for (int i = 0; i < COUNT(one_tensor); i++) {
                    memcpy(f.data, clean.data, clean.bytes);
                    fill_tensor(&f, one_tensor[i], (q3n_type)type, patterns[type][k]);
                    evaluate_nonsense(&f, isa, 1);
                }
                /* one row of the router: NaN beside numbers */
                memcpy(f.data, clean.data, clean.bytes);
                const size_t at = (size_t)u64(&f, tensor(&f, ROUTER) + 40);
                const size_t row = (size_t)u64(&f, tensor(&f, ROUTER) + 48) / 6;
                for (size_t i = 0; i < row; i += type == Q3N_TYPE_F32 ? 4 : 2)
                    memcpy(f.data + at + 2 * row + i, &patterns[type][k],
                           type == Q3N_TYPE_F32 ? 4 : 2);
                evaluate_nonsense(&f, isa, 1);
                free(f.data);
            }
        }
        free(clean.data);
    }
    assert_true(n_without_numbers > 10);
}

/* All bytes of the tensors at random. */
static void test_noise(void **state)
{
    (void)state;
    const image f = fresh();
    uint32_t x = 99;
    for (int round = 0; round < 4; round++) {
        for (size_t i = meta_bytes(&f); i < f.bytes; i++) {
            x = x * 1664525u + 1013904223u;
            f.data[i] = (uint8_t)(x >> 24);
        }
        for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa))
            if (isa_runs(isa, __func__)) evaluate_nonsense(&f, isa, 2);
    }
    free(f.data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),
        cmocka_unit_test(test_header),
        cmocka_unit_test(test_sections),
        cmocka_unit_test(test_entries),
        cmocka_unit_test(test_fields),
        cmocka_unit_test(test_other_keys),
        cmocka_unit_test(test_keys_together),
        cmocka_unit_test(test_probabilities),
        cmocka_unit_test(test_geometry),
        cmocka_unit_test(test_table),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_many_names),
        cmocka_unit_test(test_messages),
        cmocka_unit_test(test_messages_about_names),
        cmocka_unit_test(test_strange_tensors),
        cmocka_unit_test(test_records),
        cmocka_unit_test(test_plan),
        cmocka_unit_test(test_rope_tables),
        cmocka_unit_test(test_paths),
        cmocka_unit_test(test_truncation),
        cmocka_unit_test(test_short_metadata),
        cmocka_unit_test(test_bit_flips),
        cmocka_unit_test(test_byte_changes),
        cmocka_unit_test(test_tokenizer_flips),
        cmocka_unit_test(test_not_numbers),
        cmocka_unit_test(test_noise),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
