/* test_memory.c - the host's allocator: it may fail at any call, gets everything back with the
 * right sizes, is called by evaluation for pages alone, and is asked for exactly what was
 * announced; and sessions of one model on several threads do not disturb one another. */
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE 1     /* mkstemp, nanosleep */
#endif
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "qwen3next.h"
#include "q3n_make.h"
#include "sample.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engines.h"
#include "failing.h"
#include "golden.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

static q3n_model_options options_with(heap *h)
{
    q3n_model_options o = Q3N_INIT(q3n_model_options);
    o.allocator.alloc = heap_alloc;
    o.allocator.free = heap_free;
    o.allocator.user = h;
    return o;
}

static q3n_result open_with(q3n_model **m, heap *h, const char *name, q3n_error *err)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s.q3n", Q3N_TEST_MODELS, name);
    const q3n_model_options o = options_with(h);
    return q3n_model_open(m, path, &o, err);
}

static q3n_model *open_counted(heap *h, const char *name)
{
    q3n_error err;
    q3n_model *m = NULL;
    if (open_with(&m, h, name, &err) != Q3N_OK) fail_msg("%s", err.message);
    return m;
}

static q3n_engine_options engine_of(int n_threads)
{
    q3n_engine_options o = one_thread;
    o.batch_size = 16;
    o.n_threads = n_threads;
    return o;
}

static q3n_session_options session_options(const q3n_engine_options *engine)
{
    q3n_session_options o = Q3N_INIT(q3n_session_options);
    o.capacity = 100;
    o.engine_options = engine;
    return o;
}

static void check_clean(const q3n_error *err, q3n_result r, const heap *h, int live)
{
    assert_int_equal(r, Q3N_ERR_MEMORY);
    assert_int_equal(err->code, Q3N_ERR_MEMORY);
    assert_true(strlen(err->message) > 5);
    assert_int_equal(h->live, live);
}

/* ---- The k-th call fails ---- */
static void test_open_fails(void **state)
{
    const char *name = (const char *)*state;
    for (int once = 0; once < 2; once++) {
        int k = 1;
        for (;; k++) {
            heap h = { .fail_at = k, .once = once };
            q3n_error err = { .code = Q3N_OK };
            q3n_model *m = (q3n_model *)(uintptr_t)1;
            const q3n_result r = open_with(&m, &h, name, &err);
            if (r == Q3N_OK) {
                assert_true(h.calls < k);
                q3n_model_close(m);
                assert_int_equal(h.live, 0);
                assert_int_equal(h.live_bytes, 0);
                break;
            }
            assert_null(m);
            check_clean(&err, r, &h, 0);
        }
        assert_true(k > 4);
    }
}

static void test_session_fails(void **state)
{
    (void)state;
    heap h = { 0 };
    q3n_error err = { .code = Q3N_OK };
    q3n_model *m = open_counted(&h, "qwen3_next");
    const int live = h.live;
    for (int n_threads = 1; n_threads <= 4; n_threads++) {
        const q3n_engine_options eo = engine_of(n_threads);
        const q3n_session_options o = session_options(&eo);
        for (int k = 1; ; k++) {
            q3n_session *s = (q3n_session *)(uintptr_t)1;
            h.calls = 0;
            h.fail_at = k;
            const q3n_result r = q3n_session_create(&s, m, &o, &err);
            h.fail_at = 0;
            if (r == Q3N_OK) {
                assert_true(h.calls < k && k > 1);
                q3n_session_destroy(s);
                break;
            }
            check_clean(&err, r, &h, live);
            assert_null(s);
            if (k == 1) assert_non_null(strstr(err.message, "100 tokens"));
        }
    }
    q3n_model_close(m);
    assert_int_equal(h.live, 0);
}

/* Evaluation that finds no memory for a page has evaluated nothing. */
static void test_eval_fails(void **state)
{
    heap h = { 0 };
    q3n_error err;
    q3n_model *m = open_counted(&h, (const char *)*state);
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    const q3n_engine_options eo = engine_of(2);
    q3n_session_options o = session_options(&eo);
    o.capacity = 600;
    int32_t ids[600];
    for (int i = 0; i < COUNT(ids); i++) ids[i] = (int32_t)((size_t)(i * 37) % V);
    float *want = (float *)malloc(2 * V * sizeof *want);
    assert_non_null(want);
    q3n_session *s = NULL;
    assert_int_equal(q3n_session_create(&s, m, &o, &err), Q3N_OK);
    assert_int_equal(q3n_session_eval(s, ids, 600, want), Q3N_OK);
    q3n_session_destroy(s);
    assert_int_equal(q3n_session_create(&s, m, &o, &err), Q3N_OK);
    for (int at = 0, n_failed = 0; at < 600; ) {
        const int n = at < 300 ? 100 : 300;      /* the last call needs one page, or two at once */
        const int length = q3n_session_length(s), live = h.live;
        h.calls = 0;
        h.fail_at = 1 + n_failed;
        const q3n_result r = q3n_session_eval(s, ids + at, n, want + V);
        h.fail_at = 0;
        if (r == Q3N_OK) {
            at += n;
            n_failed = 0;
            continue;
        }
        assert_int_equal(r, Q3N_ERR_MEMORY);
        assert_int_equal(q3n_session_error(s)->code, r);
        assert_int_equal(q3n_session_length(s), length);
        assert_in_range(h.live, live, live + n_failed);   /* what was got waits for the next try */
        n_failed++;
    }
    assert_memory_equal(want, want + V, V * sizeof *want);
    q3n_session_destroy(s);
    free(want);
    q3n_model_close(m);
    assert_int_equal(h.live, 0);
}

static void test_sampler_fails(void **state)
{
    (void)state;
    heap h = { 0 };
    q3n_error err = { .code = Q3N_OK };
    q3n_model *m = open_counted(&h, "qwen3_next");
    const int live = h.live;
    const q3n_sampler_options o = { .size = sizeof o, .temperature = 0.7f, .top_k = 5,
                                    .repetition_penalty = 1.1f };
    int k = 1;
    for (;; k++) {
        q3n_sampler *sampler = (q3n_sampler *)(uintptr_t)1;
        h.calls = 0;
        h.fail_at = k;
        const q3n_result r = q3n_sampler_create(&sampler, m, &o, &err);
        if (r == Q3N_OK) {
            h.calls = 0;
            float logits[4096];
            assert_true(q3n_model_config(m)->vocab_size <= COUNT(logits));
            for (int i = 0; i < COUNT(logits); i++) logits[i] = (float)(i % 17);
            for (int i = 0; i < 100; i++)
                q3n_sampler_accept(sampler, sample(sampler, logits));
            q3n_sampler_reset(sampler);
            assert_int_equal(h.calls, 0);
            q3n_sampler_destroy(sampler);
            break;
        }
        assert_null(sampler);
        check_clean(&err, r, &h, live);
    }
    assert_true(k > 1);
    q3n_model_close(m);
    assert_int_equal(h.live, 0);
}

static void test_tokenize_fails(void **state)
{
    static const char text[] = "Once upon a time, there was a girl called Lily. \xc3\xa9\xcc\x81 "
                               "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 12345";
    heap h = { 0 };
    q3n_model *m = open_counted(&h, (const char *)*state);
    const int live = h.live;
    int32_t want[sizeof text], ids[sizeof text];
    size_t n_want = 0, n = 0;
    assert_int_equal(q3n_tokenize(m, text, sizeof text - 1, 0, want, sizeof text, &n_want), Q3N_OK);
    assert_int_equal(h.live, live);
    int k = 1;
    for (;; k++) {
        h.calls = 0;
        h.fail_at = k;
        const q3n_result r = q3n_tokenize(m, text, sizeof text - 1, 0, ids, sizeof text, &n);
        assert_int_equal(h.live, live);
        if (r == Q3N_OK) break;
        assert_int_equal(r, Q3N_ERR_MEMORY);
    }
    assert_int_equal(n, n_want);
    assert_memory_equal(ids, want, n * sizeof ids[0]);
    assert_true(k > 1);
    h.fail_at = 0;
    q3n_model_close(m);
    assert_int_equal(h.live, 0);
}

static void test_init_fails(void **state)
{
    (void)state;
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_error err;
    char path[] = "/tmp/q3n_memory_XXXXXX";
    const int handle = mkstemp(path);
    assert_true(handle >= 0);
    close(handle);
    remove(path);
    static const char *const fields[][2] = {
        {"layers", "4"}, {"hidden", "32"}, {"vocab", "50"}, {"experts", "2"}, {"top_k", "1"},
    };
    assert_int_equal(q3n_config_preset("g1", &c, &err), Q3N_OK);
    for (int i = 0; i < COUNT(fields); i++)
        assert_int_equal(q3n_config_set(&c, fields[i][0], fields[i][1], &err), Q3N_OK);
    for (int k = 1; ; k++) {
        heap h = { .fail_at = k };
        q3n_init_options o = Q3N_INIT(q3n_init_options);
        o.allocator = options_with(&h).allocator;
        const q3n_result r = q3n_init_file(path, &c, &o, &err);
        FILE *f = fopen(path, "rb");
        if (f) fclose(f);
        assert_true((f != NULL) == (r == Q3N_OK));
        if (r == Q3N_OK) {
            assert_int_equal(h.live, 0);
            assert_true(k > 2);
            break;
        }
        check_clean(&err, r, &h, 0);
    }
    remove(path);
}

/* ---- Evaluation allocates pages, and from the second on room to split attention ---- */
static void evaluate_pages(q3n_session *s, const heap *h, int n_ids, const int32_t *ids,
                           float *logits)
{
    for (int i = 0; i < n_ids; i++) {
        assert_int_equal(q3n_session_eval(s, ids + i, 1, logits), Q3N_OK);
        assert_in_range(h->calls, 0, i / 256 + 1 + (i >= 256));
    }
    assert_int_equal(q3n_session_eval(s, ids, 1000, logits), Q3N_ERR_FULL);
    assert_in_range(h->calls, 0, (n_ids + 255) / 256 + (n_ids > 256));
}

static void test_eval_allocates_pages(void **state)
{
    const char *name = (const char *)*state;
    heap h = { 0 };
    q3n_error err;
    q3n_model *m = open_counted(&h, name);
    const q3n_config *c = q3n_model_config(m);
    for (int n_threads = 1; n_threads <= 3; n_threads += 2) {
        const q3n_engine_options eo = engine_of(n_threads);
        q3n_session_options o = session_options(&eo);
        if (c->rope_type != Q3N_ROPE_TABLE) o.capacity = 300;
        q3n_session *s = NULL;
        assert_int_equal(q3n_session_create(&s, m, &o, &err), Q3N_OK);
        float *logits = (float *)malloc((size_t)c->vocab_size * sizeof *logits);
        assert_non_null(logits);
        int32_t ids[280];
        for (int i = 0; i < COUNT(ids); i++) ids[i] = (i * 37) % c->vocab_size;
        h.calls = 0;
        if (c->num_labels > 0) {
            for (int i = 0; i < 3; i++)
                assert_int_equal(q3n_session_classify(s, ids, 40, logits), Q3N_OK);
            assert_in_range(h.calls, 0, 3);
        } else {
            evaluate_pages(s, &h, o.capacity < COUNT(ids) ? 20 : COUNT(ids), ids, logits);
        }
        h.calls = 0;
        q3n_session_reset(s);
        assert_int_equal(h.calls, 0);
        double log_probs[15];
        if (c->causal && c->num_labels == 0)
            assert_int_equal(q3n_session_score(s, ids, COUNT(log_probs), log_probs), Q3N_OK);
        if (c->hidden_size <= c->vocab_size)
            assert_int_equal(q3n_session_embed(s, ids, 15, NULL, logits), Q3N_OK);
        assert_in_range(h.calls, 0, 1);                 /* a page of the other text */
        free(logits);
        q3n_session_destroy(s);
    }
    q3n_model_close(m);
    assert_int_equal(h.live, 0);
}

/* ---- What was announced is what is asked for ---- */
static void check_session_bytes(const q3n_model *m, heap *h, const q3n_session_options *o)
{
    q3n_session_memory parts = Q3N_INIT(q3n_session_memory);
    q3n_error err;
    q3n_session *s = NULL;
    const size_t bytes = q3n_session_bytes(m, o, &parts), live = h->live_bytes;
    assert_true(bytes > 0);
    assert_int_equal(q3n_session_bytes(m, o, NULL), bytes);
    assert_int_equal(parts.total, bytes);
    assert_int_equal(parts.kv_cache + parts.delta_state + parts.conv_state + parts.scratch
                     + parts.other, bytes);
    if (q3n_session_create(&s, m, o, &err) != Q3N_OK) fail_msg("%s", err.message);
    assert_int_equal(h->live_bytes - live, parts.initial);

    const q3n_config *c = q3n_model_config(m);
    const size_t capacity = (size_t)(o->capacity ? o->capacity : c->max_position_embeddings);
    const size_t pages = (capacity + 255) / 256;
    size_t kv = 0, delta = 0, conv = 0;
    for (int l = 0; l < c->num_hidden_layers; l++) {
        const size_t v = (size_t)c->linear_num_value_heads * (size_t)c->linear_value_head_dim;
        if (!c->layer_types[l]) {
            const size_t dim = (size_t)c->head_dim;
            const size_t head = o->kv_type == Q3N_TYPE_Q8 ? dim + 4
                              : o->kv_type == Q3N_TYPE_F32 ? 4 * dim : 2 * dim;
            kv += 2 * (size_t)c->num_key_value_heads * head;
            continue;
        }
        delta += 4 * v * (size_t)c->linear_key_head_dim;
        conv += 4 * (size_t)(c->linear_conv_kernel_dim - 1)
              * (v + 2 * (size_t)(c->linear_num_key_heads * c->linear_key_head_dim));
    }
    /* a page also holds its tokens' ids; it has a head of its own, and one from the allocator */
    assert_in_range(parts.page, 256 * (kv + 4), 256 * (kv + 4) + 512);
    assert_int_equal(parts.kv_cache, pages * parts.page);
    assert_in_range(parts.delta_state, 2 * delta, 2 * delta + 127);
    assert_in_range(parts.conv_state, 2 * conv, 2 * conv + 127);
    q3n_session_destroy(s);
}

static void test_session_bytes(void **state)
{
    static const int capacities[] = { 0, 1, 255, 256, 257, 1000 }, batches[] = { 0, 1, 7, 2000 };
    heap h = { 0 };
    q3n_model *m = open_counted(&h, (const char *)*state);
    const int live = h.live;
    for (int i = 0; i < COUNT(capacities); i++)
        for (int k = 0; k < COUNT(batches); k++)
            for (int type = 0; type <= Q3N_TYPE_Q8; type++) {
                const q3n_engine_options eo = { .size = sizeof eo, .batch_size = batches[k],
                                                .n_threads = 1 + (i + k) % 4 };
                q3n_session_options o = session_options(&eo);
                o.capacity = capacities[i];
                o.kv_type = (q3n_type)type;
                o.count_experts = k % 2;
                check_session_bytes(m, &h, &o);
                assert_int_equal(h.live, live);
            }
    q3n_engine_options eo = engine_of(1);
    q3n_session_options bad = session_options(&eo);
    bad.capacity = -1;
    assert_int_equal(q3n_session_bytes(m, &bad, NULL), 0);
    bad.capacity = 100;
    assert_true(q3n_session_bytes(m, &bad, NULL) > 0);
    eo.n_threads = 1025;
    assert_int_equal(q3n_session_bytes(m, &bad, NULL), 0);
    q3n_model_close(m);
    assert_int_equal(h.live, 0);
}

/* Memory of the allocator comes filled with rubbish: results are those of malloc's, to the bit. */
static void test_rubbish(void **state)
{
    char path[512];
    q3n_error err;
    heap h = { 0 };
    q3n_model *m[2] = { open_counted(&h, (const char *)*state), NULL };
    snprintf(path, sizeof path, "%s/%s.q3n", Q3N_TEST_MODELS, (const char *)*state);
    assert_int_equal(q3n_model_open(&m[1], path, NULL, &err), Q3N_OK);
    const size_t V = (size_t)q3n_model_config(m[0])->vocab_size;
    float *logits = (float *)malloc(2 * V * sizeof *logits);
    assert_non_null(logits);
    const int32_t ids[5] = { 3, 1, 4, 1, 5 };
    for (int i = 0; i < 2; i++) {
        const q3n_engine_options eo = engine_of(1 + i);
        const q3n_session_options o = session_options(&eo);
        q3n_session *s = NULL;
        assert_int_equal(q3n_session_create(&s, m[i], &o, &err), Q3N_OK);
        assert_int_equal(q3n_session_eval(s, ids, 5, logits + (size_t)i * V), Q3N_OK);
        q3n_session_destroy(s);
        q3n_model_close(m[i]);
    }
    assert_memory_equal(logits, logits + V, V * sizeof *logits);
    free(logits);
}

/* ---- Sessions on several threads ---- */
typedef struct {
    const q3n_model *m;
    int32_t          ids[48];
    int              n, n_threads;
    float           *logits;     /* [vocab]                                                      */
    q3n_result       result;
} text_job;

static void *text_main(void *arg)
{
    text_job *j = (text_job *)arg;
    const q3n_engine_options eo = engine_of(j->n_threads);
    const q3n_session_options o = session_options(&eo);
    q3n_session *s = NULL;
    j->result = q3n_session_create(&s, j->m, &o, NULL);
    for (int round = 0; round < 4 && j->result == Q3N_OK; round++) {
        q3n_session_reset(s);
        for (int i = 0; i < j->n && j->result == Q3N_OK; i += 5)
            j->result = q3n_session_eval(s, j->ids + i, j->n - i < 5 ? j->n - i : 5, j->logits);
    }
    q3n_session_destroy(s);
    return NULL;
}

static void test_concurrent_sessions(void **state)
{
    char path[512];
    q3n_error err;
    q3n_model *m = NULL;
    text_job jobs[4];
    pthread_t thread[4];
    snprintf(path, sizeof path, "%s/%s.q3n", Q3N_TEST_MODELS, (const char *)*state);
    assert_int_equal(q3n_model_open(&m, path, NULL, &err), Q3N_OK);
    const size_t V = (size_t)q3n_model_config(m)->vocab_size;
    float *alone = (float *)malloc(COUNT(jobs) * V * sizeof *alone);
    float *beside = (float *)malloc(COUNT(jobs) * V * sizeof *beside);
    assert_true(alone && beside);
    for (int i = 0; i < COUNT(jobs); i++) {
        jobs[i] = (text_job){ .m = m, .n = 30 + 6 * i, .n_threads = 1 + i % 2,
                              .logits = alone + (size_t)i * V };
        for (int t = 0; t < jobs[i].n; t++) jobs[i].ids[t] = (int32_t)((size_t)(t * (31 + i)) % V);
        text_main(&jobs[i]);
        assert_int_equal(jobs[i].result, Q3N_OK);
    }
    for (int i = 0; i < COUNT(jobs); i++) {
        jobs[i].logits = beside + (size_t)i * V;
        assert_int_equal(pthread_create(&thread[i], NULL, text_main, &jobs[i]), 0);
    }
    for (int i = 0; i < COUNT(jobs); i++) {
        pthread_join(thread[i], NULL);
        assert_int_equal(jobs[i].result, Q3N_OK);
        assert_memory_equal(jobs[i].logits, alone + (size_t)i * V, V * sizeof *alone);
    }
    assert_memory_not_equal(alone, alone + V, V * sizeof *alone);
    free(beside);
    free(alone);
    q3n_model_close(m);
}

#define CASE(test, model) { #test "(" #model ")", test, NULL, NULL, (void *)(uintptr_t)#model }

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(test_open_fails, qwen3_next),
        CASE(test_open_fails, stories),
        CASE(test_open_fails, tokenizer_qwen3),
        cmocka_unit_test(test_session_fails),
        CASE(test_eval_fails, qwen3_next),
        CASE(test_eval_fails, qwen3_moe),
        cmocka_unit_test(test_sampler_fails),
        CASE(test_tokenize_fails, stories),
        CASE(test_tokenize_fails, tokenizer_qwen3),
        cmocka_unit_test(test_init_fails),
        CASE(test_eval_allocates_pages, qwen3_next),
        CASE(test_eval_allocates_pages, qwen3_next_mixed),
        CASE(test_eval_allocates_pages, qwen3_head_all_moe),
        CASE(test_eval_allocates_pages, qwen3_next_cls),
        CASE(test_session_bytes, qwen3_next),
        CASE(test_session_bytes, qwen3_moe),
        CASE(test_session_bytes, qwen3_next_cls),
        CASE(test_rubbish, qwen3_next),
        CASE(test_rubbish, qwen3_next_mixed),
        CASE(test_rubbish, qwen3_dense),
        CASE(test_concurrent_sessions, qwen3_next),
        CASE(test_concurrent_sessions, qwen3_moe),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
