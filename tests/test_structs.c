/* test_structs.c - structs that begin with their size, at every size that a caller may give them:
 * of a library before this one, of one after it, and none.  Blocks have exactly that size, so that
 * AddressSanitizer sees an access behind them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define Q3N_IMPLEMENTATION
#define Q3N_MAKE_IMPLEMENTATION
#include "q3n_make.h"

#include "failing.h"
#include "sessions.h"
#include "folder.h"
#include "small.h"

enum { MORE = 64 };              /* sizes go so far beyond this header's                         */

static struct {
    q3n_model   *m;
    q3n_session *s;
    q3n_cache   *cache;
    q3n_engine  *engine;
    q3n_config   config;         /* of small                                                     */
    q3n_model   *small;
    void        *bytes;          /* its file                                                     */
    size_t       n_bytes;
    float        vector[256];    /* [hidden_size]                                                */
} with;

static const int32_t one_id[1] = { 1 };

/* One thread, not as many as there are CPUs, where the struct is as long as the field. */
static void set_field(void *o, size_t offset, const void *value, size_t bytes)
{
    size_t size;
    memcpy(&size, o, sizeof size);
    if (size >= offset + bytes) memcpy((uint8_t *)o + offset, value, bytes);
}

static void set_one_thread(q3n_session_options *o)
{
    const q3n_engine_options *own = &one_thread;
    set_field(o, offsetof(q3n_session_options, engine_options), &own, sizeof own);
}

static const int one = 1;

/* ---- What reads or writes them ---- */
static q3n_result open_model_with(void *o)
{
    q3n_model *m = NULL;
    const q3n_result r = q3n_model_open_memory(&m, with.m->data, with.m->bytes, o, NULL);
    q3n_model_close(m);
    return r;
}

static q3n_result create_session_with(void *o)
{
    q3n_session *s = NULL;
    set_one_thread(o);
    const q3n_result r = q3n_session_create(&s, with.m, o, NULL);
    assert_true((q3n_session_bytes(with.m, o, NULL) != 0) == (r == Q3N_OK));
    q3n_session_destroy(s);
    return r;
}

static q3n_result create_engine_with(void *o)
{
    q3n_engine *e = NULL;
    set_field(o, offsetof(q3n_engine_options, n_threads), &one, sizeof one);
    const q3n_result r = q3n_engine_create(&e, with.m, o, NULL);
    assert_true((q3n_engine_bytes(with.m, o) != 0) == (r == Q3N_OK));
    q3n_engine_destroy(e);
    return r;
}

static q3n_result create_cache_with(void *o)
{
    q3n_cache *c = NULL;
    const q3n_result r = q3n_cache_create(&c, with.m, o, NULL);
    q3n_cache_destroy(c);
    return r;
}

static q3n_result create_sampler_with(void *o)
{
    q3n_sampler *s = NULL;
    const q3n_result r = q3n_sampler_create(&s, with.m, o, NULL);
    assert_true((s != NULL) == (r == Q3N_OK));
    q3n_sampler_destroy(s);
    return r;
}

/* Both need one field: without it, which is an error of its own, there is nothing to see. */
static q3n_result open_chat_with(void *o)
{
    static const char *const text = "x";
    const size_t place = offsetof(q3n_chat_options, template_text);
    size_t size;
    q3n_chat *c = NULL;
    set_field(o, place, &text, sizeof text);
    memcpy(&size, o, sizeof size);
    const q3n_result r = q3n_chat_open(&c, NULL, o, NULL);
    q3n_chat_close(c);
    if (size < sizeof size || size >= place + sizeof text) return r;
    assert_int_equal(r, Q3N_ERR_ARG);
    return Q3N_OK;
}

static q3n_result render_with(void *in)
{
    static const char *const request = "{\"messages\": []}";
    const q3n_chat_options o = { .size = sizeof o, .template_text = "x" };
    const size_t place = offsetof(q3n_chat_input, request);
    size_t size;
    q3n_chat *c = NULL;
    q3n_prompt *p = NULL;
    set_field(in, place, &request, sizeof request);
    memcpy(&size, in, sizeof size);
    assert_int_equal(q3n_chat_open(&c, NULL, &o, NULL), Q3N_OK);
    const q3n_result r = q3n_chat_render(c, in, &p, NULL);
    q3n_prompt_free(p);
    q3n_chat_close(c);
    if (size < sizeof size || size >= place + sizeof request) return r;
    assert_int_equal(r, Q3N_ERR_ARG);
    return Q3N_OK;
}

static q3n_result eval_with_outputs(void *o)
{
    const q3n_result r = q3n_session_eval_outputs(with.s, one_id, 1, o);
    assert_int_equal(q3n_session_length(with.s), r == Q3N_OK);
    q3n_session_reset(with.s);
    return r;
}

static q3n_result embed_with(void *o)
{
    const q3n_result r = q3n_session_embed(with.s, one_id, 1, o, with.vector);
    assert_int_equal(q3n_session_length(with.s), r == Q3N_OK);
    q3n_session_reset(with.s);
    return r;
}

static q3n_result eval_with_limit(void *o)
{
    q3n_engine_item item = { .size = sizeof item, .session = with.s, .tokens = one_id, .n = 1 };
    const q3n_result r = q3n_engine_eval(with.engine, &item, 1, o);
    assert_int_equal(q3n_session_length(with.s), r == Q3N_OK);
    q3n_session_reset(with.s);
    return r;
}

static q3n_result read_config(void *c)
{
    double v = -1.0;
    const q3n_result r = q3n_config_value(c, "vocab_size", &v);
    char text[64];
    assert_int_equal(q3n_config_field(c, 0, text) != NULL, r == Q3N_OK);
    if (r == Q3N_OK) assert_true(v == 0.0);
    return r;
}

static q3n_result init_with(void *o)
{
    q3n_error err = { Q3N_OK, -1, "" };
    assert_true((q3n_init_bytes(&with.m->config, o, &err) > 0) == (err.code == Q3N_OK));
    return err.code;
}

static q3n_result quantize_with(void *o)
{
    char path[400];
    set_field(o, offsetof(q3n_quantize_options, n_threads), &one, sizeof one);
    const q3n_result r = q3n_quantize_file(in_folder(path, "small.q3n"), with.small, o, NULL);
    assert_int_equal(count_files(NULL), r == Q3N_OK);
    assert_int_equal(empty_folder(NULL), 0);
    return r;
}

static q3n_result write_preset(void *c) { return q3n_config_preset("tiny", c, NULL); }

static q3n_result write_written(void *o)
{
    const q3n_init_options io = { .size = sizeof io, .n_threads = 1, .written = o };
    q3n_error err = { Q3N_OK, -1, "" };
    const q3n_result r = q3n_init_memory(with.bytes, with.n_bytes, &with.config, &io, &err);
    if (r != Q3N_OK) assert_non_null(strstr(err.message, "q3n_model_stats"));
    return r;
}

static q3n_result write_memory(void *o)
{
    return q3n_session_bytes(with.m, NULL, o) ? Q3N_OK : Q3N_ERR_ARG;
}

static q3n_result write_model_stats(void *o) { return q3n_model_stats_get(with.m, o); }
static q3n_result write_cache_stats(void *o) { return q3n_cache_stats_get(with.cache, o); }
static q3n_result write_speculation(void *o) { return q3n_session_speculation(with.s, o); }

#define SIZED(type) #type, sizeof(type)

static const struct {
    const char *name;
    size_t      size;
    q3n_result (*call)(void *s);
} readers[] = {
    { SIZED(q3n_model_options), open_model_with },
    { SIZED(q3n_session_options), create_session_with },
    { SIZED(q3n_engine_options), create_engine_with },
    { SIZED(q3n_cache_options), create_cache_with },
    { SIZED(q3n_sampler_options), create_sampler_with },
    { SIZED(q3n_chat_options), open_chat_with },
    { SIZED(q3n_chat_input), render_with },
    { SIZED(q3n_outputs), eval_with_outputs },
    { SIZED(q3n_embed_options), embed_with },
    { SIZED(q3n_limit), eval_with_limit },
    { SIZED(q3n_config), read_config },
    { SIZED(q3n_init_options), init_with },
    { SIZED(q3n_quantize_options), quantize_with },
}, writers[] = {
    { SIZED(q3n_config), write_preset },
    { SIZED(q3n_model_stats), write_written },
    { SIZED(q3n_session_memory), write_memory },
    { SIZED(q3n_model_stats), write_model_stats },
    { SIZED(q3n_cache_stats), write_cache_stats },
    { SIZED(q3n_speculation), write_speculation },
};

static int setup(void **state)
{
    (void)state;
    q3n_session_options o = { .size = sizeof o, .capacity = 8 };
    const q3n_cache_options co = { .size = sizeof co, .max_bytes = 1 << 20 };
    with.m = open_model("qwen3_next", NULL);
    assert_true(q3n_model_hidden_size(with.m) <= COUNT(with.vector));
    o.engine = with.engine = create_engine(with.m, &one_thread);
    with.s = create_session(with.m, &o);
    with.config = small_config();
    with.n_bytes = (size_t)q3n_init_bytes(&with.config, NULL, NULL);
    with.bytes = aligned_alloc(64, (with.n_bytes + 63) / 64 * 64);
    assert_int_equal(q3n_init_memory(with.bytes, with.n_bytes, &with.config, NULL, NULL), Q3N_OK);
    assert_int_equal(q3n_model_open_memory(&with.small, with.bytes, with.n_bytes, NULL, NULL),
                     Q3N_OK);
    assert_int_equal(q3n_cache_create(&with.cache, with.m, &co, NULL), Q3N_OK);
    return make_folder("structs");
}

static int teardown(void **state)
{
    q3n_cache_destroy(with.cache);
    q3n_session_destroy(with.s);
    q3n_engine_destroy(with.engine);
    q3n_model_close(with.small);
    q3n_model_close(with.m);
    free(with.bytes);
    return remove_folder(state);
}

/* A block of size bytes, at least those of the size field. */
static unsigned char *block_of(size_t size, int fill)
{
    const size_t bytes = size < sizeof size ? sizeof size : size;
    unsigned char *p = malloc(bytes);
    assert_non_null(p);
    memset(p, fill, bytes);
    memcpy(p, &size, sizeof size);
    return p;
}

/* A shorter struct has the defaults, a longer one only zeros beyond what is known. */
static void test_readers(void **state)
{
    (void)state;
    for (int k = 0; k < COUNT(readers); k++)
        for (size_t size = 0; size <= readers[k].size + MORE; size++) {
            unsigned char *p = block_of(size, 0);
            q3n_result r = readers[k].call(p);
            if (r != (size < sizeof size ? Q3N_ERR_ARG : Q3N_OK))
                fail_msg("%s of %zu bytes: %d", readers[k].name, size, (int)r);
            if (size > readers[k].size) {
                p[size - 1] = 1;
                r = readers[k].call(p);
                if (r != Q3N_ERR_UNSUPPORTED)
                    fail_msg("%s of %zu bytes, not all known: %d", readers[k].name, size, (int)r);
            }
            free(p);
        }
}

/* A shorter struct gets what it has, a longer one zeros beyond it; its size stays. */
static void test_writers(void **state)
{
    (void)state;
    for (int k = 0; k < COUNT(writers); k++) {
        const size_t full = writers[k].size;
        unsigned char *whole = block_of(full, 0x55), *empty = block_of(0, 0x55);
        assert_int_equal(writers[k].call(whole), Q3N_OK);
        assert_int_equal(writers[k].call(empty), Q3N_ERR_ARG);
        free(empty);
        for (size_t size = 1; size <= full + MORE; size++) {
            unsigned char *p = block_of(size, 0x55);
            const q3n_result r = writers[k].call(p);
            if (r != (size < sizeof size ? Q3N_ERR_ARG : Q3N_OK))
                fail_msg("%s of %zu bytes: %d", writers[k].name, size, (int)r);
            size_t now = 0, same = sizeof size;
            memcpy(&now, p, sizeof now);
            assert_int_equal(now, size);
            if (r == Q3N_OK) {
                while (same < size && p[same] == (same < full ? whole[same] : 0)) same++;
                if (same < size) fail_msg("%s of %zu bytes: byte %zu", writers[k].name, size, same);
            }
            free(p);
        }
        free(whole);
    }
}

/* Sizes that can be none, and the words for them. */
static void test_no_size(void **state)
{
    (void)state;
    q3n_session *s = NULL;
    q3n_error err = { Q3N_OK, -1, "" };
    q3n_session_options o = { .capacity = 5, .engine_options = &one_thread };
    assert_int_equal(q3n_session_create(&s, with.m, &o, &err), Q3N_ERR_ARG);
    assert_non_null(strstr(err.message, "q3n_session_options: its size is not set"));
    o.size = (size_t)1 << 40;
    assert_int_equal(q3n_session_create(&s, with.m, &o, &err), Q3N_ERR_ARG);
    o.size = sizeof o;
    assert_int_equal(q3n_session_create(&s, with.m, &o, &err), Q3N_OK);
    q3n_session_destroy(s);
}

/* Items lie as far apart as they are long, which is at least what this header has. */
static void test_items(void **state)
{
    (void)state;
    const size_t full = sizeof(q3n_engine_item);
    q3n_session_options o = plain_options(8);
    set_engine(&o, with.engine, NULL);
    q3n_session *s[2] = { create_session(with.m, &o), create_session(with.m, &o) };
    for (size_t size = 0; size <= full + MORE; size += sizeof(void *)) {
        unsigned char *p = malloc(2 * size + sizeof size);
        assert_non_null(p);
        memset(p, 0, 2 * size + sizeof size);
        for (size_t i = 0; i < 2 && size > 0; i++) {
            const q3n_engine_item item = { .size = size, .session = s[i], .tokens = one_id,
                                           .n = 1 };
            memcpy(p + i * size, &item, size < full ? size : full);
        }
        q3n_engine_item *items = (q3n_engine_item *)(void *)p;
        const q3n_result r = q3n_engine_eval(with.engine, items, 2, NULL);
        assert_int_equal(r, size < full ? Q3N_ERR_ARG : Q3N_OK);
        for (int i = 0; i < 2; i++) {
            assert_int_equal(q3n_session_length(s[i]), size >= full);
            q3n_session_reset(s[i]);
        }
        if (size > full) {
            items->done = 0;
            p[2 * size - 1] = 1;
            assert_int_equal(q3n_engine_eval(with.engine, items, 2, NULL), Q3N_ERR_UNSUPPORTED);
            p[2 * size - 1] = 0;
            p[size] ^= 8;
            assert_int_equal(q3n_engine_eval(with.engine, items, 2, NULL), Q3N_ERR_ARG);
            items->size = size - 1;              /* the second would have no address of an item */
            assert_int_equal(q3n_engine_eval(with.engine, items, 2, NULL), Q3N_ERR_ARG);
        }
        free(p);
    }
    for (int i = 0; i < 2; i++) q3n_session_destroy(s[i]);
}

/* Fields that wait for a meaning must be 0. */
static void test_zero_fields(void **state)
{
    (void)state;
    q3n_model_options mo = { .size = sizeof mo, .zero = 1 };
    q3n_limit limit = { .size = sizeof limit, .zero = 1 };
    q3n_engine_options eo = { .size = sizeof eo, .zero = 1, .n_threads = 1 };
    assert_int_equal(create_engine_with(&eo), Q3N_ERR_UNSUPPORTED);
    assert_int_equal(open_model_with(&mo), Q3N_ERR_UNSUPPORTED);
    assert_int_equal(eval_with_limit(&limit), Q3N_ERR_UNSUPPORTED);
    mo.zero = limit.zero = 0;
    assert_int_equal(open_model_with(&mo), Q3N_OK);
    assert_int_equal(eval_with_limit(&limit), Q3N_OK);
}

/* A field is read where a struct is as long as it, and not where it ends before. */
static void test_half_a_struct(void **state)
{
    (void)state;
    const size_t end = offsetof(q3n_session_options, capacity) + sizeof(int);
    for (size_t size = sizeof size; size <= sizeof(q3n_session_options); size += sizeof(int)) {
        q3n_session_options o = { .size = size, .capacity = 5 };
        unsigned char *p = block_of(size, 0);
        q3n_session *s = NULL;
        memcpy(p, &o, size);
        set_one_thread((q3n_session_options *)(void *)p);
        assert_int_equal(q3n_session_create(&s, with.m, (const q3n_session_options *)(void *)p,
                                            NULL), Q3N_OK);
        assert_int_equal(q3n_session_capacity(s),
                         size >= end ? 5 : q3n_model_context_length(with.m));
        q3n_session_destroy(s);
        free(p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_readers),
        cmocka_unit_test(test_writers),
        cmocka_unit_test(test_no_size),
        cmocka_unit_test(test_items),
        cmocka_unit_test(test_zero_fields),
        cmocka_unit_test(test_half_a_struct),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
