/* Stack: what the manual says that a thread needs, measured.  Long and short evaluations of models
 * of every kind, drafts, batches, snapshots, files, quantising and making of models run on a stack
 * that was painted before. */
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE 1     /* mkdtemp */
#endif
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "qwen3next.h"
#include "q3n_make.h"
#include "isas.h"

#include "failing.h"
#include "sessions.h"

#if defined(_WIN32) || !defined(__OPTIMIZE__) \
    || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)

int main(void)
{
    puts("stack: measured where code is optimised, without a sanitizer, and not on Windows");
    return 77;
}

#else
#include <pthread.h>

#define MANUAL_BYTES (48 * 1024)   /* STACK in the manual                                        */
#define STACK_BYTES  (1 << 20)
#define PAINT        0xA5

typedef struct {
    const char   *model;
    q3n_isa       isa;
    q3n_type      kv_type;
} job;

static void nothing(const job *j) { (void)j; }

/* 600 tokens at once: several blocks of attention; then few, then one by one, with drafts. */
static void evaluate(q3n_session *s, const q3n_model *m, float *logits)
{
    const int vocab = q3n_model_config(m)->vocab_size;
    int32_t tokens[600], out[Q3N_MAX_DRAFT + 1], last = 1;
    const q3n_sampler_options o = { .temperature = 0.7f, .top_k = 20, .top_p = 0.9f };
    for (int i = 0; i < COUNT(tokens); i++) tokens[i] = i * i % 41 % vocab;
    must(s, q3n_session_eval(s, tokens, COUNT(tokens), logits), Q3N_OK);
    must(s, q3n_session_eval(s, tokens, 4, logits), Q3N_OK);
    set_sampler(s, o);
    for (int i = 0, n; i < 20; i++, last = out[n - 1])
        must(s, q3n_session_decode(s, last, out, COUNT(out), &n), Q3N_OK);
}

/* States: snapshots, back again, saved and read again, shared with a batch. */
static void keep(q3n_session *s, const q3n_model *m, const char *path)
{
    q3n_snapshot *snap;
    q3n_engine *batch;
    q3n_session *other;
    q3n_error err;
    q3n_session_options o = plain_options(700);
    int32_t tokens[] = { 1, 2, 3 };
    must(s, q3n_session_snapshot(s, &snap), Q3N_OK);
    must(s, q3n_session_rewind(s, 500), Q3N_OK);
    must(s, q3n_session_restore(s, snap), Q3N_OK);
    q3n_snapshot_free(snap);
    must(s, q3n_session_save(s, path), Q3N_OK);
    must(s, q3n_session_load(s, path), Q3N_OK);
    remove(path);
    batch = create_engine(m, o.engine_options);
    set_engine(&o, batch, NULL);
    assert_int_equal(q3n_session_create(&other, m, &o, &err), Q3N_OK);
    q3n_engine_item item = { .size = sizeof item, .session = other, .tokens = tokens, .n = 3 };
    assert_int_equal(q3n_engine_eval(batch, &item, 1, NULL), Q3N_OK);
    q3n_session_destroy(other);
    q3n_engine_destroy(batch);
}

static void sessions(const job *j)
{
    char directory[] = "/tmp/q3n_stack_XXXXXX", path[64];
    q3n_model *m = open_model(j->model, NULL);
    float *logits = new_floats((size_t)q3n_model_config(m)->vocab_size);
    q3n_cache *cache;
    q3n_error err;
    assert_non_null(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/state", directory);
    q3n_cache_options co = { .size = sizeof co, .max_bytes = 1 << 20, .directory = directory };
    assert_int_equal(q3n_cache_create(&cache, m, &co, &err), Q3N_OK);
    q3n_session_options o = plain_options(700);
    q3n_engine_options eo = one_thread;
    o.engine_options = &eo;
    eo.isa = j->isa;
    o.kv_type = j->kv_type;
    o.cache = cache;
    o.snapshot_every = 200;
    o.speculate = Q3N_SPECULATE_AUTO;
    q3n_session *s = create_session(m, &o);
    evaluate(s, m, logits);
    keep(s, m, path);
    q3n_session_destroy(s);
    q3n_cache_destroy(cache);
    remove_directory(directory);
    free(logits);
    q3n_model_close(m);
}
/* Models made, quantised, checked, and refused. */
static void files(const job *j)
{
    char directory[] = "/tmp/q3n_stack_XXXXXX", path[64], copy[64];
    static const char *const fields[][2] = {
        { "layers", "4" }, { "hidden", "64" }, { "vocab", "50" }, { "experts", "2" },
        { "top_k", "1" },
    };
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_error err;
    q3n_model *m;
    q3n_init_options io = { .size = sizeof io, .type = Q3N_TYPE_BF16, .n_threads = 1 };
    q3n_quantize_options qo = { .size = sizeof qo, .recipe = j->model, .n_threads = 1 };
    assert_non_null(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/model", directory);
    snprintf(copy, sizeof copy, "%s/copy", directory);
    assert_int_equal(q3n_config_preset("g2", &c, &err), Q3N_OK);
    for (int i = 0; i < COUNT(fields); i++)
        assert_int_equal(q3n_config_set(&c, fields[i][0], fields[i][1], &err), Q3N_OK);
    assert_int_equal(q3n_init_file(path, &c, &io, &err), Q3N_OK);
    assert_int_equal(q3n_model_open(&m, path, NULL, &err), Q3N_OK);
    if (q3n_quantize_file(copy, m, &qo, &err) != Q3N_OK) fail_msg("%s", err.message);
    assert_int_equal(q3n_model_verify(m, NULL, &err), Q3N_OK);
    q3n_model_close(m);
    assert_true(q3n_model_open(&m, directory, NULL, &err) != Q3N_OK);
    remove_directory(directory);
}

static void words(const job *j)
{
    q3n_model *m = open_model(j->model, NULL);
    char text[2000], back[8000];
    int32_t ids[2000];
    size_t n, n_bytes;
    for (int i = 0; i < COUNT(text); i++) text[i] = i % 100 == 99 ? ' ' : (char)(i * i % 251 + 4);
    assert_int_equal(q3n_tokenize(m, text, sizeof text, 0, ids, COUNT(ids), &n), Q3N_OK);
    assert_int_equal(q3n_detokenize(m, ids, n, back, sizeof back, &n_bytes), Q3N_OK);
    q3n_model_close(m);
}

/* Templates as deep as they may be, values as deep, in everything that walks through them. */
static void chat(const job *j)
{
    static const char uses[] = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(150) }}{{ x }}{{ x | tojson }}{{ x == y }}{{ x < y }}{{ x | string | sort | length }}"
        "{% for i in x recursive %}{% if i %}{{ loop(i) }}{% endif %}{% endfor %}"
        "{{ messages[0].content.split() }}";
    char text[2000] = "";
    char json[1000] = "{\"messages\": [{\"content\": \"a b\"}], \"options\": {\"x\": ";
    q3n_model *m = open_model(j->model, NULL);
    int32_t ids[4000];
    size_t n;
    for (int i = 0; i < 2; i++) {
        for (int k = 0; k < 90; k++) strcat(json, "[");
        strcat(json, i ? "1" : "0");
        for (int k = 0; k < 90; k++) strcat(json, "]");
        strcat(json, i ? "}}" : ", \"y\": ");
    }
    for (int opened = 0; opened < 2; opened++) {
        text[0] = 0;
        if (opened) strcpy(text, "{{ ");
        for (int k = 0; opened && k < 30; k++) strcat(text, "([x if not ");
        strcat(text, opened ? "x" : uses);
        for (int k = 0; opened && k < 30; k++) strcat(text, "])");
        if (opened) strcat(text, " }}");
        const q3n_chat_options o = { .size = sizeof o, .template_text = text };
        const q3n_chat_input in = { .size = sizeof in, .request = json };
        q3n_chat *c;
        q3n_prompt *p;
        q3n_error err;
        const q3n_result r = q3n_chat_open(&c, m, &o, &err);
        assert_int_equal(r, opened ? Q3N_ERR_TEMPLATE : Q3N_OK);            /* too deep */
        if (r == Q3N_OK) {
            assert_int_equal(q3n_chat_render(c, &in, &p, &err), Q3N_OK);
            assert_int_equal(q3n_prompt_ids(p, ids, COUNT(ids), &n), Q3N_OK);
            q3n_prompt_free(p);
        }
        q3n_chat_close(c);
    }
    q3n_model_close(m);
}

/* ---- Measuring ---- */

typedef struct {
    void      (*run)(const job *j);
    const job  *job;
} call;

static void *call_main(void *arg)
{
    const call *c = (const call *)arg;
    (c->run)(c->job);
    return NULL;
}

/* Bytes of the stack that are painted no longer. */
static size_t stack_used(void (*run)(const job *j), const job *j)
{
    const call c = { run, j };
    pthread_attr_t attr;
    pthread_t thread;
    void *stack = NULL;
    size_t left = 0;
    assert_int_equal(posix_memalign(&stack, 4096, STACK_BYTES), 0);
    memset(stack, PAINT, STACK_BYTES);
    assert_int_equal(pthread_attr_init(&attr), 0);
    assert_int_equal(pthread_attr_setstack(&attr, stack, STACK_BYTES), 0);
    assert_int_equal(pthread_create(&thread, &attr, call_main, (void *)(uintptr_t)&c), 0);
    pthread_join(thread, NULL);
    pthread_attr_destroy(&attr);
    while (left < STACK_BYTES && ((unsigned char *)stack)[left] == PAINT) left++;
    free(stack);
    return STACK_BYTES - left;
}

/* `own` bytes are what the test itself has on the stack. */
static void check(const char *what, void (*run)(const job *j), const job *j, size_t own)
{
    static const job none;
    const size_t used = stack_used(run, j) - stack_used(nothing, &none);
    printf("%-10s %-12s %-18s %6zu bytes\n", what, q3n_isa_name(j->isa), j->model, used);
    assert_true(used <= MANUAL_BYTES + own);
}

static void test_sessions(void **state)
{
    (void)state;
    static const char *const models[] = { "qwen3_next_mtp", "qwen3_5_moe", "qwen3_dense_yarn" };
    for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {
        if (!q3n_isa_supported(isa)) continue;
        for (int i = 0; i < COUNT(models); i++) {
            const job j = { models[i], isa, i % 2 ? Q3N_TYPE_Q8 : Q3N_TYPE_F32 };
            check("session", sessions, &j, 4096);
        }
    }
}

static void test_files(void **state)
{
    (void)state;
    for (int i = 0; q3n_recipe_name(i) != NULL; i++) {
        const job j = { q3n_recipe_name(i), Q3N_ISA_SCALAR, Q3N_TYPE_F32 };
        check("files", files, &j, 4096);
    }
}

static void test_words(void **state)
{
    (void)state;
    const job j = { "tokenizer_qwen3", Q3N_ISA_SCALAR, Q3N_TYPE_F32 };
    check("words", words, &j, 20000);
}

static void test_chat(void **state)
{
    (void)state;
    const job j = { "tokenizer_qwen3", Q3N_ISA_SCALAR, Q3N_TYPE_F32 };
    check("chat", chat, &j, 20000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chat),
        cmocka_unit_test(test_sessions),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_words),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
#endif
