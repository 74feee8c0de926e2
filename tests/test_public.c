/* The public API as a host program sees it: this file includes no implementation and links an
 * object of it.  Every function's errors, what the host supplies, and that an evaluation allocates
 * nothing but its pages. */
#include "qwen3next.h"
#include "q3n_make.h"
#include "engines.h"
#include "isas.h"
#include "sample.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))
#define HYBRID  "build/models/qwen3_next.q3n"
#define STORIES "build/models/stories.q3n"

/* tests/golden/qwen3_next/golden.json, "greedy" */
static const int32_t golden_prompt[] = { 218, 232, 264, 88, 264, 143, 140, 126, 239 };
static const int32_t golden_output[] = { 239, 239, 181, 25, 110, 43, 168, 285 };

static q3n_model *open_model(const char *path)
{
    q3n_model *m = NULL;
    q3n_error err = { .code = Q3N_OK };
    if (q3n_model_open(&m, path, NULL, &err) != Q3N_OK) fail_msg("%s: %s", path, err.message);
    assert_non_null(m);
    return m;
}

static q3n_session *create_session(const q3n_model *m, const q3n_session_options *o)
{
    q3n_session *s = NULL;
    q3n_error err = { .code = Q3N_OK };
    if (q3n_session_create(&s, m, o, &err) != Q3N_OK) fail_msg("session: %s", err.message);
    assert_non_null(s);
    return s;
}

static float *new_floats(size_t n)
{
    float *x = calloc(n, sizeof *x);
    assert_non_null(x);
    return x;
}

static int vocab(const q3n_model *m)
{
    return q3n_model_config(m)->vocab_size;
}

/* A whole file at a 64-byte boundary; free it. */
static void *read_file(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    const long size = ftell(f);
    assert_true(size > 0);
    rewind(f);
    *bytes = (size_t)size;
    void *data = aligned_alloc(64, (*bytes + 63) / 64 * 64);
    assert_non_null(data);
    assert_int_equal(fread(data, 1, *bytes, f), *bytes);
    fclose(f);
    return data;
}

/* The record tells the same code, and something to read. */
static void assert_error(q3n_result got, q3n_result want, const q3n_error *err)
{
    assert_int_equal(got, want);
    assert_int_equal(err->code, want);
    assert_true(strlen(err->message) > 5);
    assert_true(err->offset >= -1);
}

/* ---- Names ---- */

static void test_results(void **state)
{
    (void)state;
#define Q3N__X(name, value, message) assert_string_equal(q3n_result_string(Q3N_##name), message);
    Q3N_RESULT_LIST(Q3N__X)
#undef Q3N__X
    assert_non_null(q3n_result_string((q3n_result)-100));
    assert_int_equal(q3n_version(), Q3N_VERSION);
    assert_int_equal(q3n_abi_version(), Q3N_ABI);
}

static void test_types_and_isas(void **state)
{
    (void)state;
    q3n_type t = Q3N_TYPE_F32;
    for (int i = 0; i < Q3N_TYPE_COUNT; i++) {
        const char *name = q3n_type_name((q3n_type)i);
        assert_non_null(name);
        assert_int_equal(q3n_type_from_name(name, &t), Q3N_OK);
        assert_int_equal(t, i);
    }
    assert_null(q3n_type_name(Q3N_TYPE_COUNT));
    assert_null(q3n_type_name((q3n_type)100000));
    assert_int_equal(q3n_type_from_name("f33", &t), Q3N_ERR_ARG);
    assert_int_equal(q3n_type_from_name("", &t), Q3N_ERR_ARG);

    q3n_isa isa = Q3N_ISA_SCALAR;
    for (q3n_isa i = isa_after(Q3N_ISA_AUTO); i; i = isa_after(i)) {
        const char *name = q3n_isa_name(i);
        assert_non_null(name);
        assert_int_equal(q3n_isa_from_name(name, &isa), Q3N_OK);
        assert_int_equal(isa, i);
    }
    assert_null(q3n_isa_name(Q3N_ISA_AUTO));
    assert_null(q3n_isa_name((q3n_isa)2));
    assert_int_equal(q3n_isa_from_name("auto", &isa), Q3N_ERR_ARG);
    assert_int_equal(q3n_isa_from_name("mmx", &isa), Q3N_ERR_ARG);
    assert_true(q3n_isa_supported(Q3N_ISA_SCALAR));
    assert_true(q3n_isa_supported(q3n_isa_best()));
    assert_false(q3n_isa_supported(Q3N_ISA_AUTO));
    assert_false(q3n_isa_supported((q3n_isa)2));
}

/* ---- Configuration ---- */

static void test_presets(void **state)
{
    (void)state;
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_error err = { .code = Q3N_OK };
    int n = 0;
    for (; q3n_config_preset_name(n); n++) {
        if (q3n_config_preset(q3n_config_preset_name(n), &c, &err) != Q3N_OK
            || q3n_config_check(&c, &err) != Q3N_OK)
            fail_msg("%s: %s", q3n_config_preset_name(n), err.message);
    }
    assert_true(n > 8);
    assert_null(q3n_config_preset_name(-1));
    assert_error(q3n_config_preset("no such model", &c, &err), Q3N_ERR_ARG, &err);
    assert_non_null(strstr(err.message, "tiny"));
    assert_int_equal(q3n_config_preset("no such model", &c, NULL), Q3N_ERR_ARG);
}

static void test_config_fields(void **state)
{
    (void)state;
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_error err = { .code = Q3N_OK };
    char text[64];
    assert_int_equal(q3n_config_preset("tiny", &c, &err), Q3N_OK);
    assert_int_equal(q3n_config_set(&c, "num_experts", "16", &err), Q3N_OK);
    assert_int_equal(c.num_experts, 16);
    assert_int_equal(q3n_config_set(&c, "layers", "9", &err), Q3N_OK);
    assert_int_equal(c.num_hidden_layers, 9);
    assert_int_equal(q3n_config_set(&c, "rope_theta", "5e5", &err), Q3N_OK);
    assert_true(c.rope_theta > 499999.0 && c.rope_theta < 500001.0);
    assert_int_equal(q3n_config_set(&c, "rope_type", "yarn", &err), Q3N_OK);
    assert_int_equal(c.rope_type, Q3N_ROPE_YARN);

    static const char *const bad[][2] = {
        { "no_such_field", "1" }, { "num_experts", "-1" }, { "num_experts", "many" },
        { "num_experts", "12x" }, { "num_experts", "" }, { "hidden_size", "0" },
        { "hidden_size", "99999999999999999999" }, { "rope_type", "spiral" },
        { "rope_theta", "nan" }, { "causal", "2" }, { "layer_types", "0,2" } };
    for (int i = 0; i < COUNT(bad); i++) {
        const q3n_config before = c;
        assert_error(q3n_config_set(&c, bad[i][0], bad[i][1], &err), Q3N_ERR_ARG, &err);
        assert_memory_equal(&c, &before, sizeof c);
        assert_int_equal(q3n_config_set(&c, bad[i][0], bad[i][1], NULL), Q3N_ERR_ARG);
    }
    int n = 0;
    while (q3n_config_field(&c, n, text)) n++;
    assert_true(n > 30);
    assert_null(q3n_config_field(&c, -1, text));

    c.num_key_value_heads = 3;      /* 8 heads do not divide into 3 groups */
    assert_error(q3n_config_check(&c, &err), Q3N_ERR_ARG, &err);
    assert_int_equal(q3n_config_check(&c, NULL), Q3N_ERR_ARG);
}

/* Every field of the list by its name, each with a value of its own. */
static void test_config_values(void **state)
{
    (void)state;
    q3n_config c = Q3N_INIT(q3n_config);
    char text[64];
    double v = -1.0;
    int n = 0;
#define Q3N__X(kind, name, min, max) c.name = ++n;
    Q3N_CONFIG_LIST(Q3N__X)
#undef Q3N__X
    n = 0;
#define Q3N__X(kind, name, min, max)                                                    \
    assert_string_equal(q3n_config_field(&c, n++, text), #name);                        \
    assert_int_equal(q3n_config_value(&c, #name, &v), Q3N_OK);                          \
    if (v != n) fail_msg("%s is %g, expected %d", #name, v, n);
    Q3N_CONFIG_LIST(Q3N__X)
#undef Q3N__X
    assert_null(q3n_config_field(&c, n, text));
    c.rms_norm_eps = 1e-6;
    assert_int_equal(q3n_config_value(&c, "rms_norm_eps", &v), Q3N_OK);
    assert_true(v == 1e-6);
    static const char *const none[] = { "", "layer_types", "size", "vocab_siz", "vocab_size " };
    for (int i = 0; i < COUNT(none); i++)
        assert_int_equal(q3n_config_value(&c, none[i], &v), Q3N_ERR_ARG);
    assert_true(v == 1e-6);
}

/* ---- Model ---- */

static void test_open_errors(void **state)
{
    (void)state;
    q3n_model *m = (q3n_model *)8;
    q3n_error err = { .code = Q3N_OK };
    assert_error(q3n_model_open(&m, "no/such/file.q3n", NULL, &err), Q3N_ERR_NO_FILE, &err);
    assert_null(m);
    assert_error(q3n_model_open(&m, "tests", NULL, &err), Q3N_ERR_IO, &err);
    assert_error(q3n_model_open(&m, "LICENSE", NULL, &err), Q3N_ERR_FORMAT, &err);
    assert_null(m);
    assert_int_equal(q3n_model_open(&m, "LICENSE", NULL, NULL), Q3N_ERR_FORMAT);

    size_t bytes = 0;
    unsigned char *data = read_file(HYBRID, &bytes);
    assert_error(q3n_model_open_memory(&m, data + 1, bytes - 1, NULL, &err), Q3N_ERR_ARG, &err);
    assert_error(q3n_model_open_memory(&m, data, 0, NULL, &err), Q3N_ERR_FORMAT, &err);
    assert_error(q3n_model_open_memory(&m, data, bytes - 1, NULL, &err), Q3N_ERR_FORMAT, &err);
    data[100] ^= 1;
    assert_error(q3n_model_open_memory(&m, data, bytes, NULL, &err), Q3N_ERR_CHECKSUM, &err);
    assert_null(m);
    data[100] ^= 1;
    assert_int_equal(q3n_model_open_memory(&m, data, bytes, NULL, &err), Q3N_OK);
    q3n_model_close(m);
    q3n_model_close(NULL);
    free(data);
}

static void test_model_getters(void **state)
{
    (void)state;
    q3n_model *m = open_model(STORIES);
    const q3n_config *c = q3n_model_config(m);
    assert_int_equal(c->family, Q3N_FAMILY_QWEN3_NEXT);
    assert_int_equal(q3n_model_n_layers(m), 8);          /* examples/stories/config.json */
    assert_int_equal(c->num_hidden_layers, 8);
    assert_int_equal(q3n_model_vocab_size(m), 4096);
    assert_int_equal(q3n_model_hidden_size(m), 192);
    assert_int_equal(q3n_model_context_length(m), 2048);
    assert_int_equal(q3n_model_n_labels(m), 0);
    for (int l = -1; l <= 8; l++) {
        assert_int_equal(q3n_model_layer_is_delta(m, l), l >= 0 && l < 8 && l % 4 != 3);
        assert_int_equal(q3n_model_layer_has_experts(m, l), l >= 0 && l < 8);
    }
    assert_non_null(q3n_model_name(m));
    assert_non_null(q3n_model_chat_kind(m));
    int n_eos = -1;
    const int32_t *eos = q3n_model_eos_ids(m, &n_eos);
    assert_true(n_eos >= 1);
    for (int i = 0; i < n_eos; i++) assert_true(q3n_model_is_eos(m, eos[i]));
    assert_false(q3n_model_is_eos(m, -1));
    assert_false(q3n_model_is_eos(m, 100));

    q3n_model_stats stats = Q3N_INIT(q3n_model_stats);
    q3n_model_stats_get(m, &stats);
    assert_true(stats.n_weights > 7000000 && stats.n_weights < 8000000);
    assert_true(stats.n_weights_active > 3700000 && stats.n_weights_active < 4000000);
    assert_true(stats.mtp_weights > 800000 && stats.mtp_weights < 1000000);
    assert_true(stats.decode_bytes >= 2 * stats.n_weights_active - 100000);
    assert_true(stats.file_bytes > 2 * stats.n_weights);
    q3n_model_close(m);

    m = open_model("build/models/qwen3_dense.q3n");
    assert_false(q3n_model_layer_has_experts(m, 0));
    assert_false(q3n_model_layer_is_delta(m, 0));
    q3n_model_close(m);
}

static void test_tensors(void **state)
{
    (void)state;
    q3n_model *m = open_model(HYBRID);
    size_t bytes = 0;
    unsigned char *data = read_file(HYBRID, &bytes);
    const int n = q3n_model_n_tensors(m);
    assert_true(n > 50);
    for (int i = 0; i < n; i++) {
        const q3n_tensor *t = q3n_model_tensor(m, i);
        assert_non_null(t);
        assert_ptr_equal(q3n_model_find_tensor(m, t->name), t);
        assert_int_equal(t->offset % 64, 0);
        assert_memory_equal(t->data, data + t->offset, 4);
    }
    const q3n_tensor *t = q3n_model_find_tensor(m, "layers.0.mlp.experts.up_proj.weight");
    assert_non_null(t);
    assert_int_equal(t->n_dims, 3);
    assert_int_equal(t->stride % 4096, 0);
    assert_int_equal(t->dim[0], q3n_model_config(m)->num_experts);
    assert_null(q3n_model_tensor(m, -1));
    assert_null(q3n_model_tensor(m, n));
    assert_null(q3n_model_find_tensor(m, "no.such.weight"));
    assert_null(q3n_model_find_tensor(m, ""));
    free(data);
    q3n_model_close(m);
}

typedef struct {
    int64_t done, total;
    int     calls, stop_at;      /* 0 = never */
} progress_log;

static int log_progress(void *user, int64_t done, int64_t total)
{
    progress_log *log = user;
    assert_true(done >= log->done && done <= total);
    log->done = done;
    log->total = total;
    log->calls++;
    return log->stop_at && log->calls >= log->stop_at;
}

static void test_verify(void **state)
{
    (void)state;
    q3n_model *m = NULL;
    q3n_error err = { .code = Q3N_OK };
    size_t bytes = 0;
    unsigned char *data = read_file(HYBRID, &bytes);
    assert_int_equal(q3n_model_open_memory(&m, data, bytes, NULL, &err), Q3N_OK);
    progress_log log = { 0, 0, 0, 0 };
    q3n_progress progress = { log_progress, &log };
    assert_int_equal(q3n_model_verify(m, &progress, &err), Q3N_OK);
    assert_true(log.calls > 0);
    assert_int_equal(log.done, log.total);
    assert_int_equal(q3n_model_verify(m, NULL, NULL), Q3N_OK);

    log = (progress_log){ .stop_at = 1 };
    assert_error(q3n_model_verify(m, &progress, &err), Q3N_ERR_CANCELLED, &err);

    const q3n_tensor *t = q3n_model_find_tensor(m, "layers.3.self_attn.k_proj.weight");
    assert_non_null(t);
    data[t->offset + t->bytes - 1] ^= 0x10;
    assert_error(q3n_model_verify(m, NULL, &err), Q3N_ERR_CHECKSUM, &err);
    assert_non_null(strstr(err.message, "layers.3.self_attn.k_proj.weight"));
    q3n_model_close(m);
    free(data);
}

/* ---- What the host supplies ---- */

typedef struct {
    int    n_alloc, n_free;
    size_t bytes, largest;       /* held now; the largest single block */
} counter;

static void *counting_alloc(void *user, size_t bytes)
{
    counter *c = user;
    c->n_alloc++;
    c->bytes += bytes;
    if (bytes > c->largest) c->largest = bytes;
    return malloc(bytes);
}

static void counting_free(void *user, void *memory, size_t bytes)
{
    counter *c = user;
    c->n_free++;
    c->bytes -= bytes;
    free(memory);
}

static void test_allocator(void **state)
{
    (void)state;
    counter c = { 0, 0, 0, 0 };
    q3n_model_options mo = { .size = sizeof mo,
                             .allocator = { counting_alloc, counting_free, &c } };
    q3n_error err = { .code = Q3N_OK };
    q3n_model *m = NULL;
    assert_int_equal(q3n_model_open(&m, HYBRID, &mo, &err), Q3N_OK);
    assert_true(c.n_alloc > 0);
    assert_true(c.bytes < 1000000);     /* the weights stay where they are */

    const q3n_session_options so = { .size = sizeof so,
                                     .capacity = 100,
                                     .engine_options = OWN_ENGINE(.batch_size = 16,
                                                                  .n_threads = 3) };
    const counter before = c;
    q3n_session_memory memory = Q3N_INIT(q3n_session_memory);
    const size_t bytes = q3n_session_bytes(m, &so, &memory);
    q3n_session *s = create_session(m, &so);
    assert_int_equal(c.bytes, before.bytes + memory.initial);

    float *logits = new_floats((size_t)vocab(m));
    assert_int_equal(q3n_session_eval(s, golden_prompt, 9, logits), Q3N_OK);
    assert_int_equal(c.bytes, before.bytes + bytes);
    const counter made = c;
    for (int i = 0; i < 5; i++) {       /* within the page of 256 tokens that is there now */
        assert_int_equal(q3n_session_eval(s, golden_prompt, 9, logits), Q3N_OK);
        assert_int_equal(q3n_session_eval(s, golden_prompt, 1, NULL), Q3N_OK);
    }
    assert_int_equal(c.n_alloc, made.n_alloc);
    assert_int_equal(c.n_free, made.n_free);
    free(logits);
    q3n_session_destroy(s);
    assert_int_equal(c.bytes, before.bytes);
    q3n_model_close(m);
    assert_int_equal(c.n_alloc, c.n_free);
    assert_int_equal(c.bytes, 0);

    mo.allocator.free = NULL;
    assert_error(q3n_model_open(&m, HYBRID, &mo, &err), Q3N_ERR_ARG, &err);
}

typedef struct {
    int  warnings, notes;
    char text[1024];             /* of all warnings */
} message_log;

static void log_message(void *user, q3n_log_level level, const char *message)
{
    message_log *log = user;
    const size_t used = strlen(log->text);
    if (level == Q3N_LOG_WARNING) {
        log->warnings++;
        snprintf(log->text + used, sizeof log->text - used, "%s\n", message);
    } else {
        log->notes++;
    }
}

static void test_logger(void **state)
{
    (void)state;
    message_log log = { 0, 0, "" };
    const q3n_model_options o = { .size = sizeof o, .logger = { log_message, &log } };
    q3n_model *m = NULL;
    q3n_error err = { .code = Q3N_OK };
    const char *const path = "build/models/seed_patched_zero_rope.q3n";
    assert_int_equal(q3n_model_open(&m, path, &o, &err), Q3N_OK);
    assert_true(log.warnings > 0);
    assert_non_null(strstr(log.text, "zero"));
    q3n_model_close(m);
    log.warnings = 0;
    assert_int_equal(q3n_model_open(&m, HYBRID, &o, &err), Q3N_OK);
    assert_int_equal(log.warnings, 0);
    q3n_model_close(m);
}

/* An executor with threads of its own, started anew for every job. */
typedef struct {
    void (*task)(void *arg, int i);
    void  *arg;
    int    i;
} job;

static int n_runs;

static void *job_main(void *memory)
{
    const job *j = memory;
    j->task(j->arg, j->i);
    return NULL;
}

static void run_on_threads(void *user, int n, void (*task)(void *arg, int i), void *arg)
{
    pthread_t thread[8];
    job jobs[8];
    assert_ptr_equal(user, &n_runs);
    assert_true(n >= 1 && n <= 8);
    n_runs++;
    for (int i = 0; i < n; i++) {
        jobs[i] = (job){ task, arg, i };
        assert_int_equal(pthread_create(&thread[i], NULL, job_main, &jobs[i]), 0);
    }
    for (int i = 0; i < n; i++) pthread_join(thread[i], NULL);
}

static void evaluate_prompts(const q3n_model *m, const q3n_session_options *o, float *logits)
{
    q3n_session *s = create_session(m, o);
    int32_t ids[70];
    for (int i = 0; i < 70; i++) ids[i] = (i * 37 + 11) % vocab(m);
    assert_int_equal(q3n_session_eval(s, ids, 70, logits), Q3N_OK);
    assert_int_equal(q3n_session_eval(s, ids, 1, logits + vocab(m)), Q3N_OK);
    q3n_session_destroy(s);
}

static void test_executor(void **state)
{
    (void)state;
    q3n_model *m = open_model(HYBRID);
    const size_t n = 2 * (size_t)vocab(m);
    float *want = new_floats(n), *got = new_floats(n);
    const q3n_session_options alone = { .size = sizeof alone, .capacity = 128,
                                        .engine_options = &one_thread };
    evaluate_prompts(m, &alone, want);

    q3n_engine_options eo = Q3N_INIT(q3n_engine_options);
    const q3n_session_options o = { .size = sizeof o, .capacity = 128, .engine_options = &eo };
    void (*const runs[])(void *, int, void (*)(void *, int), void *) = { run_on_threads,
                                                                         run_backwards };
    for (int i = 0; i < COUNT(runs); i++) {
        eo.executor = (q3n_executor){ runs[i], &n_runs, 4 };
        n_runs = 0;
        evaluate_prompts(m, &o, got);
        assert_true(n_runs > 0);
        assert_memory_equal(got, want, n * sizeof *got);
    }
    eo.executor.run = NULL;
    for (eo.n_threads = 2; eo.n_threads <= 5; eo.n_threads++) {
        evaluate_prompts(m, &o, got);
        assert_memory_equal(got, want, n * sizeof *got);
    }
    free(want);
    free(got);
    q3n_model_close(m);
}

typedef struct {
    const q3n_model *m;
    const float     *want;
    int              same;
} worker;

static void *evaluate_alone(void *memory)
{
    worker *w = memory;
    const size_t n = 2 * (size_t)vocab(w->m);
    const q3n_session_options o = { .size = sizeof o, .capacity = 128,
                                    .engine_options = OWN_ENGINE(.n_threads = 2) };
    float *got = new_floats(n);
    evaluate_prompts(w->m, &o, got);
    w->same = memcmp(got, w->want, n * sizeof *got) == 0;
    free(got);
    return NULL;
}

static void test_concurrent_sessions(void **state)
{
    (void)state;
    q3n_model *m = open_model(HYBRID);
    float *want = new_floats(2 * (size_t)vocab(m));
    const q3n_session_options o = { .size = sizeof o, .capacity = 128,
                                    .engine_options = &one_thread };
    evaluate_prompts(m, &o, want);
    pthread_t thread[3];
    worker w[3];
    for (int i = 0; i < COUNT(w); i++) {
        w[i] = (worker){ m, want, 0 };
        assert_int_equal(pthread_create(&thread[i], NULL, evaluate_alone, &w[i]), 0);
    }
    for (int i = 0; i < COUNT(w); i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < COUNT(w); i++) assert_true(w[i].same);
    free(want);
    q3n_model_close(m);
}

typedef struct {
    int   calls, next, d, rows;
    float last[1024];            /* the last row of the last call */
} hook_log;

static void log_layer(void *user, int l, const float *x, int n, int d)
{
    hook_log *log = user;
    assert_int_equal(l, log->next);
    log->next++;
    log->calls++;
    log->rows = n;
    log->d = d;
    memcpy(log->last, x + (size_t)(n - 1) * (size_t)d, (size_t)d * sizeof *x);
}

static void test_layer_hook(void **state)
{
    (void)state;
    q3n_model *m = open_model(HYBRID);
    const q3n_config *c = q3n_model_config(m);
    hook_log log = { .next = -1 };
    const q3n_engine_options eo = { .size = sizeof eo, .layer_hook = { log_layer, &log } };
    const q3n_session_options o = { .size = sizeof o, .capacity = 32, .engine_options = &eo };
    q3n_session *s = create_session(m, &o);
    float *hidden = new_floats((size_t)c->hidden_size);
    const q3n_outputs out = { .size = sizeof out, .hidden = hidden };
    assert_int_equal(q3n_session_eval_outputs(s, golden_prompt, 9, &out), Q3N_OK);
    assert_int_equal(log.calls, c->num_hidden_layers + 2);
    assert_int_equal(log.d, c->hidden_size);
    assert_memory_equal(log.last, hidden, (size_t)c->hidden_size * sizeof *hidden);
    free(hidden);
    q3n_session_destroy(s);
    q3n_model_close(m);
}

/* ---- Session ---- */

static void test_session_options(void **state)
{
    (void)state;
    q3n_model *m = open_model(HYBRID);
    q3n_session_memory memory = Q3N_INIT(q3n_session_memory);
    const size_t bytes = q3n_session_bytes(m, NULL, &memory);
    assert_true(bytes > 0);
    assert_int_equal(bytes, memory.total);
    assert_int_equal(memory.total, memory.kv_cache + memory.delta_state + memory.conv_state
                                       + memory.scratch + memory.other);
    q3n_session *s = create_session(m, NULL);
    assert_int_equal(q3n_session_capacity(s), 512);     /* max_position_embeddings */
    assert_int_equal(q3n_session_length(s), 0);
    assert_true(q3n_engine_n_threads(q3n_session_engine(s)) >= 1);
    assert_int_equal(q3n_engine_batch_size(q3n_session_engine(s)), 512);
    assert_int_equal(q3n_engine_isa(q3n_session_engine(s)), q3n_isa_best());
    q3n_session_destroy(s);
    q3n_session_destroy(NULL);

    q3n_engine *other = NULL;
    assert_int_equal(q3n_engine_create(&other, m, &one_thread, NULL), Q3N_OK);
    q3n_session_options bad[] = {
        { .capacity = -1 }, { .kv_type = Q3N_TYPE_COUNT },
        { .engine_options = &(q3n_engine_options){ .n_threads = 1 } },      /* without a size */
        { .engine_options = OWN_ENGINE(.batch_size = -1) },
        { .engine_options = OWN_ENGINE(.n_threads = -1) },
        { .engine_options = OWN_ENGINE(.n_threads = 1 << 30) },
        { .engine_options = OWN_ENGINE(.isa = (q3n_isa)2) },
        { .engine_options = OWN_ENGINE(.executor = { run_backwards, NULL, 0 }) },
        { .engine_options = &one_thread, .engine = other } };
    for (int i = 0; i < COUNT(bad); i++) {
        bad[i].size = sizeof bad[i];
        q3n_error err = { .code = Q3N_OK };
        s = (q3n_session *)8;
        assert_int_equal(q3n_session_bytes(m, &bad[i], NULL), 0);
        assert_error(q3n_session_create(&s, m, &bad[i], &err), Q3N_ERR_ARG, &err);
        assert_null(s);
    }
    q3n_engine_destroy(other);
    const q3n_session_options scalar = { .size = sizeof scalar, .capacity = 16,
                                         .engine_options = OWN_ENGINE(.isa = Q3N_ISA_SCALAR,
                                                                      .n_threads = 2) };
    s = create_session(m, &scalar);
    assert_int_equal(q3n_engine_isa(q3n_session_engine(s)), Q3N_ISA_SCALAR);
    assert_int_equal(q3n_engine_n_threads(q3n_session_engine(s)), 2);
    assert_int_equal(q3n_engine_batch_size(q3n_session_engine(s)), 16);
    assert_int_equal(q3n_session_capacity(s), 16);
    q3n_session_destroy(s);
    q3n_model_close(m);
}

/* What an engine says that it is; a session names it, and makes itself one of the same options. */
static void check_engine(const q3n_model *m, const q3n_engine_options *o, int n_threads,
                         int batch_size, q3n_isa isa)
{
    q3n_engine *e = NULL;
    q3n_error err = { .code = Q3N_OK };
    if (q3n_engine_create(&e, m, o, &err) != Q3N_OK) fail_msg("engine: %s", err.message);
    assert_true(q3n_engine_bytes(m, o) > 0);
    assert_int_equal(q3n_engine_n_threads(e), n_threads);
    assert_int_equal(q3n_engine_batch_size(e), batch_size);
    assert_int_equal(q3n_engine_isa(e), isa);
    assert_int_equal(q3n_engine_error(e)->code, Q3N_OK);
    const q3n_session_options so = { .size = sizeof so, .capacity = 16, .engine = e };
    q3n_session *s = create_session(m, &so);
    assert_ptr_equal(q3n_session_engine(s), e);
    q3n_session_destroy(s);
    q3n_engine_destroy(e);
    const q3n_session_options own = { .size = sizeof own, .capacity = 16, .engine_options = o };
    s = create_session(m, &own);
    assert_int_equal(q3n_engine_isa(q3n_session_engine(s)), isa);
    assert_int_equal(q3n_engine_n_threads(q3n_session_engine(s)), n_threads);
    q3n_session_destroy(s);
}

static void test_engine(void **state)
{
    (void)state;
    q3n_model *m = open_model(HYBRID);
    q3n_engine_options o = { .size = sizeof o, .n_threads = 2, .batch_size = 7 };
    for (q3n_isa isa = isa_after(Q3N_ISA_AUTO); isa; isa = isa_after(isa)) {     /* this or none */
        q3n_engine *e = NULL;
        q3n_error err = { .code = Q3N_OK };
        o.isa = isa;
        if (q3n_isa_supported(isa)) {
            check_engine(m, &o, 2, 7, isa);
            continue;
        }
        assert_int_equal(q3n_engine_bytes(m, &o), 0);
        assert_error(q3n_engine_create(&e, m, &o, &err), Q3N_ERR_UNSUPPORTED, &err);
        assert_non_null(strstr(err.message, q3n_isa_name(q3n_isa_best())));
        assert_null(e);
        const q3n_session_options own = { .size = sizeof own, .engine_options = &o };
        q3n_session *s = NULL;
        assert_error(q3n_session_create(&s, m, &own, &err), Q3N_ERR_UNSUPPORTED, &err);
    }
    o.isa = Q3N_ISA_AUTO;
    o.executor = (q3n_executor){ run_backwards, NULL, 3 };
    check_engine(m, &o, 3, 7, q3n_isa_best());

    q3n_session *s = create_session(m, NULL);        /* without options: as a session's own */
    check_engine(m, NULL, q3n_engine_n_threads(q3n_session_engine(s)), 512, q3n_isa_best());
    q3n_session_destroy(s);

    q3n_engine_options bad[] = {
        { .batch_size = -1 }, { .batch_size = (1 << 16) + 1 }, { .n_threads = -1 },
        { .n_threads = 1 << 30 }, { .isa = (q3n_isa)2 }, { .isa = (q3n_isa)-1 },
        { .executor = { run_backwards, NULL, 0 } } };
    for (int i = 0; i < COUNT(bad); i++) {
        q3n_engine *e = (q3n_engine *)8;
        q3n_error err = { .code = Q3N_OK };
        bad[i].size = sizeof bad[i];
        assert_int_equal(q3n_engine_bytes(m, &bad[i]), 0);
        assert_error(q3n_engine_create(&e, m, &bad[i], &err), Q3N_ERR_ARG, &err);
        assert_null(e);
    }
    q3n_engine_destroy(NULL);
    q3n_model_close(m);
}

static void test_greedy(void **state)
{
    (void)state;
    q3n_model *m = open_model(HYBRID);
    const q3n_session_options o = { .size = sizeof o, .capacity = 64 };
    q3n_session *s = create_session(m, &o);
    q3n_sampler *sampler = NULL;
    assert_int_equal(q3n_sampler_create(&sampler, m, NULL, NULL), Q3N_OK);
    float *logits = new_floats((size_t)vocab(m));
    assert_int_equal(q3n_session_eval(s, golden_prompt, COUNT(golden_prompt), logits), Q3N_OK);
    for (int i = 0; i < COUNT(golden_output); i++) {
        const int32_t id = sample(sampler, logits);
        assert_int_equal(id, golden_output[i]);
        assert_int_equal(q3n_session_eval(s, &id, 1, logits), Q3N_OK);
    }
    assert_int_equal(q3n_session_length(s), COUNT(golden_prompt) + COUNT(golden_output));
    free(logits);
    q3n_sampler_destroy(sampler);
    q3n_session_destroy(s);
    q3n_model_close(m);
}

static void assert_refused(q3n_session *s, const int32_t *tokens, int n, q3n_result want)
{
    const int length = q3n_session_length(s);
    assert_int_equal(q3n_session_eval(s, tokens, n, NULL), want);
    assert_error(want, want, q3n_session_error(s));
    assert_int_equal(q3n_session_length(s), length);
}

/* A refused evaluation leaves the session as it was: what follows gives the same bits. */
static void test_eval_errors(void **state)
{
    (void)state;
    q3n_model *m = open_model(HYBRID);
    const q3n_session_options o = { .size = sizeof o, .capacity = 12,
                                    .engine_options = OWN_ENGINE(.batch_size = 4) };
    q3n_session *s = create_session(m, &o);
    const size_t n = (size_t)vocab(m);
    float *want = new_floats(n), *got = new_floats(n);
    assert_int_equal(q3n_session_eval(s, golden_prompt, 9, NULL), Q3N_OK);
    assert_int_equal(q3n_session_eval(s, golden_prompt, 3, want), Q3N_OK);
    assert_refused(s, golden_prompt, 1, Q3N_ERR_FULL);

    q3n_session_reset(s);
    assert_int_equal(q3n_session_length(s), 0);
    assert_refused(s, golden_prompt, 0, Q3N_ERR_ARG);
    assert_refused(s, golden_prompt, -1, Q3N_ERR_ARG);
    assert_int_equal(q3n_session_eval(s, golden_prompt, 9, NULL), Q3N_OK);
    int32_t ids[6] = { 1, 2, 3, 4, 5, 6 };
    ids[2] = vocab(m);
    assert_refused(s, ids, 3, Q3N_ERR_ARG);
    ids[2] = -1;
    assert_refused(s, ids, 3, Q3N_ERR_ARG);
    ids[2] = 3;
    assert_refused(s, ids, 4, Q3N_ERR_FULL);
    assert_int_equal(q3n_session_eval(s, golden_prompt, 3, got), Q3N_OK);
    assert_memory_equal(got, want, n * sizeof *got);
    free(want);
    free(got);
    q3n_session_destroy(s);
    q3n_model_close(m);
}

static void test_outputs(void **state)
{
    (void)state;
    q3n_model *m = open_model(HYBRID);
    const q3n_session_options o = { .size = sizeof o, .capacity = 32,
                                    .engine_options = OWN_ENGINE(.batch_size = 4) };
    q3n_session *s = create_session(m, &o);
    const size_t n = (size_t)vocab(m), d = (size_t)q3n_model_config(m)->hidden_size;
    float *last = new_floats(n), *all = new_floats(9 * n), *one = new_floats(n);
    float *hidden = new_floats(d), *all_hidden = new_floats(9 * d);
    const q3n_outputs out = { sizeof out, last, all, hidden, all_hidden };
    assert_int_equal(q3n_session_eval_outputs(s, golden_prompt, 9, &out), Q3N_OK);
    assert_memory_equal(last, all + 8 * n, n * sizeof *last);
    assert_memory_equal(hidden, all_hidden + 8 * d, d * sizeof *hidden);
    q3n_session_reset(s);
    for (int t = 0; t < 9; t++) {
        assert_int_equal(q3n_session_eval(s, &golden_prompt[t], 1, one), Q3N_OK);
        float largest = 0.0f, difference = 0.0f;
        for (size_t i = 0; i < n; i++) {
            const float w = all[(size_t)t * n + i], e = one[i] - w;
            if (w > largest) largest = w;
            if (e > difference || -e > difference) difference = e < 0 ? -e : e;
        }
        assert_true(largest > 0.1f && difference <= 2e-5f * largest);
    }
    const q3n_outputs nothing = Q3N_INIT(q3n_outputs);
    assert_int_equal(q3n_session_eval_outputs(s, golden_prompt, 1, &nothing), Q3N_OK);
    assert_int_equal(q3n_session_eval_outputs(s, golden_prompt, 0, &nothing), Q3N_ERR_ARG);
    free(last);
    free(all);
    free(one);
    free(hidden);
    free(all_hidden);
    q3n_session_destroy(s);
    q3n_model_close(m);
}

static void test_expert_counts(void **state)
{
    (void)state;
    q3n_model *m = open_model(HYBRID);
    const q3n_config *c = q3n_model_config(m);
    q3n_session_options o = { .size = sizeof o, .capacity = 32, .count_experts = 1 };
    q3n_session *s = create_session(m, &o);
    float *vector = new_floats((size_t)c->hidden_size);
    for (int n = 9; n <= 18; n += 9) {                         /* another text adds to them */
        assert_int_equal(n == 9 ? q3n_session_eval(s, golden_prompt, 9, NULL)
                                : q3n_session_embed(s, golden_prompt, 9, NULL, vector), Q3N_OK);
        for (int l = 0; l < c->num_hidden_layers; l++) {
            const int64_t *counts = q3n_session_expert_counts(s, l);
            assert_non_null(counts);
            int64_t sum = 0;
            for (int e = 0; e < c->num_experts; e++) sum += counts[e];
            assert_int_equal(sum, n * c->num_experts_per_tok);
        }
    }
    free(vector);
    assert_null(q3n_session_expert_counts(s, -1));
    assert_null(q3n_session_expert_counts(s, c->num_hidden_layers));
    q3n_session_reset(s);
    assert_int_equal(q3n_session_expert_counts(s, 0)[0], 0);
    q3n_session_destroy(s);
    o.count_experts = 0;
    s = create_session(m, &o);
    assert_null(q3n_session_expert_counts(s, 0));
    q3n_session_destroy(s);
    q3n_model_close(m);
}

static void test_classify(void **state)
{
    (void)state;
    q3n_model *m = open_model("build/models/qwen3_next_cls.q3n");
    const q3n_session_options o = { .size = sizeof o, .capacity = 16 };
    q3n_session *s = create_session(m, &o);
    const size_t n = (size_t)q3n_model_config(m)->num_labels;
    assert_true(n > 1);
    assert_int_equal(q3n_model_n_labels(m), n);
    float *first = new_floats(n), *again = new_floats(n);
    assert_int_equal(q3n_session_classify(s, golden_prompt, 9, first), Q3N_OK);
    assert_int_equal(q3n_session_classify(s, golden_prompt, 9, again), Q3N_OK);
    assert_memory_equal(first, again, n * sizeof *first);
    int32_t padded[12] = { 0 };                          /* the file's pad_id is 0 */
    memcpy(padded, golden_prompt, 9 * sizeof *padded);
    assert_int_equal(q3n_session_classify(s, padded, 12, again), Q3N_OK);
    assert_memory_equal(first, again, n * sizeof *first);
    memset(padded, 0, sizeof padded);                    /* nothing but padding: its first token */
    assert_int_equal(q3n_session_classify(s, padded, 12, first), Q3N_OK);
    assert_int_equal(q3n_session_classify(s, padded, 1, again), Q3N_OK);
    assert_memory_equal(first, again, n * sizeof *first);
    assert_string_equal(q3n_model_label(m, 1), "LABEL_1");
    assert_null(q3n_model_label(m, (int)n));
    float sum = 0.0f;
    assert_int_equal(q3n_model_probabilities(m, first, again), Q3N_OK);
    for (size_t i = 0; i < n; i++) sum += again[i];
    assert_true(sum > 0.9999f && sum < 1.0001f);
    assert_int_equal(q3n_session_classify(s, golden_prompt, 0, again), Q3N_ERR_ARG);
    assert_error(Q3N_ERR_ARG, Q3N_ERR_ARG, q3n_session_error(s));
    q3n_session_destroy(s);
    q3n_model_close(m);

    m = open_model(HYBRID);
    s = create_session(m, &o);
    assert_int_equal(q3n_session_classify(s, golden_prompt, 9, first), Q3N_ERR_UNSUPPORTED);
    assert_error(Q3N_ERR_UNSUPPORTED, Q3N_ERR_UNSUPPORTED, q3n_session_error(s));
    q3n_session_destroy(s);
    q3n_model_close(m);
    free(first);
    free(again);
}

/* ---- Tokenizer ---- */

static void test_tokenize(void **state)
{
    (void)state;
    static const char text[] = "<|endoftext|>Once upon a time";
    static const int32_t want[] = { 4093, 761, 630, 258, 465 };     /* stories/golden.json */
    q3n_model *m = open_model(STORIES);
    int32_t ids[64];
    size_t n = 0;
    assert_int_equal(q3n_tokenize(m, text, strlen(text), 0, NULL, 0, &n), Q3N_ERR_FULL);
    assert_int_equal(n, COUNT(want));
    assert_int_equal(q3n_tokenize(m, text, strlen(text), 0, ids, 64, &n), Q3N_OK);
    assert_int_equal(n, COUNT(want));
    assert_memory_equal(ids, want, sizeof want);
    memset(ids, 0xff, sizeof ids);
    assert_int_equal(q3n_tokenize(m, text, strlen(text), 0, ids, 3, &n), Q3N_ERR_FULL);
    assert_int_equal(n, COUNT(want));
    assert_memory_equal(ids, want, 3 * sizeof *ids);
    assert_int_equal(ids[3], -1);
    assert_int_equal(q3n_tokenize(m, "", 0, 0, NULL, 0, &n), Q3N_OK);
    assert_int_equal(n, 0);
    assert_int_equal(q3n_tokenize(m, text, strlen(text), Q3N_TOKENIZE_NO_SPECIAL, ids, 64, &n),
                     Q3N_OK);
    assert_true(n > (size_t)COUNT(want));
    for (size_t i = 0; i < n; i++) assert_false(q3n_token_is_special(m, ids[i]));

    size_t bytes = 0;
    assert_true(q3n_token_is_special(m, 4093));
    assert_memory_equal(q3n_token_text(m, 4093, &bytes), "<|endoftext|>", 13);
    assert_int_equal(bytes, 13);
    assert_int_equal(q3n_model_n_tokens(m), 4096);
    assert_null(q3n_token_text(m, -1, &bytes));
    assert_null(q3n_token_text(m, 4096, &bytes));
    assert_false(q3n_token_is_special(m, -1));
    assert_false(q3n_token_is_special(m, 4096));
    q3n_model_close(m);

    m = open_model(HYBRID);
    assert_int_equal(q3n_model_n_tokens(m), 0);
    assert_int_equal(q3n_tokenize(m, text, 5, 0, ids, 64, &n), Q3N_ERR_UNSUPPORTED);
    assert_null(q3n_token_text(m, 0, &bytes));
    q3n_model_close(m);
}

/* The id whose text is this one byte. */
static int32_t byte_token(const q3n_model *m, unsigned char byte)
{
    for (int32_t id = 0; id < q3n_model_n_tokens(m); id++) {
        size_t bytes = 0;
        const char *text = q3n_token_text(m, id, &bytes);
        if (text && bytes == 1 && (unsigned char)text[0] == byte) return id;
    }
    fail_msg("no token for byte %d", byte);
    return -1;
}

static void test_decoder(void **state)
{
    (void)state;
    q3n_model *m = open_model(STORIES);
    q3n_detokenizer dec = { .skip_special = 1 };
    char out[64];
    size_t n = 99;
    /* U+20AC in three tokens comes when it is whole. */
    const int32_t euro[] = { byte_token(m, 0xe2), byte_token(m, 0x82), byte_token(m, 0xac) };
    for (int i = 0; i < 2; i++) {
        assert_int_equal(q3n_detokenizer_next(&dec, m, euro[i], out, sizeof out, &n), Q3N_OK);
        assert_int_equal(n, 0);
    }
    assert_int_equal(q3n_detokenizer_next(&dec, m, euro[2], out, 2, &n), Q3N_ERR_FULL);
    assert_int_equal(n, 3);
    assert_int_equal(q3n_detokenizer_next(&dec, m, euro[2], out, sizeof out, &n), Q3N_OK);
    assert_int_equal(n, 3);
    assert_memory_equal(out, "\xe2\x82\xac", 3);
    assert_int_equal(q3n_detokenizer_next(&dec, m, 4093, out, sizeof out, &n), Q3N_OK);
    assert_int_equal(n, 0);
    assert_int_equal(q3n_detokenizer_next(&dec, m, -1, out, sizeof out, &n), Q3N_ERR_ARG);
    assert_int_equal(q3n_detokenizer_next(&dec, m, 4096, out, sizeof out, &n), Q3N_ERR_ARG);
    q3n_detokenizer_finish(&dec, out, &n);
    assert_int_equal(n, 0);
    assert_int_equal(q3n_detokenizer_next(&dec, m, euro[0], out, sizeof out, &n), Q3N_OK);
    q3n_detokenizer_finish(&dec, out, &n);
    assert_int_equal(n, 3);
    assert_memory_equal(out, "\xef\xbf\xbd", 3);

    assert_int_equal(q3n_detokenize(m, euro, 3, NULL, 0, &n), Q3N_ERR_FULL);
    assert_int_equal(n, 3);
    assert_int_equal(q3n_detokenize(m, euro, 3, out, 3, &n), Q3N_OK);
    assert_memory_equal(out, "\xe2\x82\xac", 3);
    assert_int_equal(q3n_detokenize(m, euro, 0, NULL, 0, &n), Q3N_OK);
    assert_int_equal(n, 0);
    const int32_t wrong = 5000;
    assert_int_equal(q3n_detokenize(m, &wrong, 1, out, sizeof out, &n), Q3N_ERR_ARG);
    q3n_model_close(m);
}

/* ---- Sampler ---- */

static void test_sampler(void **state)
{
    (void)state;
    q3n_model *m = open_model(HYBRID);
    const int n = vocab(m);
    float *logits = new_floats((size_t)n);
    for (int i = 0; i < n; i++) logits[i] = (float)(i % 7);
    q3n_sampler *s = NULL;
    q3n_error err = { .code = Q3N_OK };
    q3n_sampler_options o = Q3N_INIT(q3n_sampler_options);
    assert_int_equal(q3n_sampler_create(&s, m, &o, &err), Q3N_OK);
    assert_int_equal(sample(s, logits), 6);     /* the lowest id among equals */
    q3n_sampler_destroy(s);

    o.repetition_penalty = 2.0f;
    assert_int_equal(q3n_sampler_create(&s, m, &o, &err), Q3N_OK);
    q3n_sampler_accept(s, 6);
    q3n_sampler_accept(s, -5);      /* no id: nothing to remember */
    assert_int_equal(sample(s, logits), 13);
    assert_int_equal(sample(s, logits), 20);
    q3n_sampler_reset(s);
    assert_int_equal(sample(s, logits), 6);
    q3n_sampler_destroy(s);
    q3n_sampler_destroy(NULL);

    int32_t first[50];
    o = (q3n_sampler_options){ .size = sizeof o, .temperature = 1.5f, .top_k = 100,
                               .seed = 7 };
    assert_int_equal(q3n_sampler_create(&s, m, &o, &err), Q3N_OK);
    int different = 0;
    for (int i = 0; i < COUNT(first); i++) {
        first[i] = sample(s, logits);
        assert_true(first[i] >= 0 && first[i] < n);
        different += first[i] != first[0];
    }
    assert_true(different > 10);
    q3n_sampler_reset(s);
    for (int i = 0; i < COUNT(first); i++)
        assert_int_equal(sample(s, logits), first[i]);
    q3n_sampler_destroy(s);

    q3n_sampler_options bad[] = { { .temperature = -1.0f }, { .top_k = -1 },
                                  { .top_p = -0.5f }, { .top_p = 1.5f }, { .min_p = -0.1f },
                                  { .min_p = 1.5f }, { .repetition_penalty = -1.0f },
                                  { .penalty_window = -1 } };
    for (int i = 0; i < COUNT(bad); i++) {
        s = (q3n_sampler *)8;
        bad[i].size = sizeof bad[i];
        assert_error(q3n_sampler_create(&s, m, &bad[i], &err), Q3N_ERR_ARG, &err);
        assert_null(s);
    }
    free(logits);
    q3n_model_close(m);
}

/* ---- Making files ---- */

static int exists(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (f) fclose(f);
    return f != NULL;
}

static void test_init_file(void **state)
{
    (void)state;
    char path[64];
    snprintf(path, sizeof path, "build/test_public_%ld.q3n", (long)getpid());
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_error err = { .code = Q3N_OK };
    assert_int_equal(q3n_config_preset("tiny", &c, &err), Q3N_OK);
    assert_int_equal(q3n_config_set(&c, "vocab", "500", &err), Q3N_OK);
    assert_int_equal(q3n_config_set(&c, "layers", "2", &err), Q3N_OK);
    progress_log log = { 0, 0, 0, 0 };
    q3n_init_options o = { .size = sizeof o, .type = Q3N_TYPE_BF16, .seed = 5, .name = "test",
                           .progress = { log_progress, &log } };
    remove(path);
    assert_int_equal(q3n_init_file(path, &c, &o, &err), Q3N_OK);
    assert_true(log.calls > 0 && log.done == log.total);
    q3n_model *m = open_model(path);
    assert_int_equal(q3n_model_verify(m, NULL, NULL), Q3N_OK);
    assert_string_equal(q3n_model_name(m), "test");
    assert_int_equal(vocab(m), 500);
    q3n_session *s = create_session(m, NULL);
    float *logits = new_floats(500);
    assert_int_equal(q3n_session_eval(s, golden_prompt, 9, logits), Q3N_OK);
    int different = 0;
    for (int i = 1; i < 500; i++) different += logits[i] < logits[0] || logits[i] > logits[0];
    assert_true(different > 400);
    free(logits);
    q3n_session_destroy(s);
    q3n_model_close(m);

    /* The same seed gives the same file, another one another. */
    size_t bytes = 0, again_bytes = 0;
    void *first = read_file(path, &bytes);
    log = (progress_log){ 0, 0, 0, 0 };
    assert_int_equal(q3n_init_file(path, &c, &o, &err), Q3N_OK);
    void *again = read_file(path, &again_bytes);
    assert_int_equal(bytes, again_bytes);
    assert_memory_equal(first, again, bytes);
    free(again);
    o.seed = 6;
    log = (progress_log){ 0, 0, 0, 0 };
    assert_int_equal(q3n_init_file(path, &c, &o, &err), Q3N_OK);
    again = read_file(path, &again_bytes);
    assert_memory_not_equal(first, again, bytes);
    free(first);
    free(again);
    remove(path);

    log = (progress_log){ .stop_at = 2 };
    assert_error(q3n_init_file(path, &c, &o, &err), Q3N_ERR_CANCELLED, &err);
    assert_false(exists(path));
    log = (progress_log){ 0, 0, 0, 0 };
    assert_error(q3n_init_file("no/such/folder/x.q3n", &c, &o, &err), Q3N_ERR_IO, &err);
    o.type = Q3N_TYPE_COUNT;
    assert_error(q3n_init_file(path, &c, &o, &err), Q3N_ERR_ARG, &err);
    o.type = Q3N_TYPE_F32;
    c.num_key_value_heads = 3;
    assert_error(q3n_init_file(path, &c, &o, &err), Q3N_ERR_ARG, &err);
    assert_false(exists(path));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_results),
        cmocka_unit_test(test_types_and_isas),
        cmocka_unit_test(test_presets),
        cmocka_unit_test(test_config_fields),
        cmocka_unit_test(test_config_values),
        cmocka_unit_test(test_open_errors),
        cmocka_unit_test(test_model_getters),
        cmocka_unit_test(test_tensors),
        cmocka_unit_test(test_verify),
        cmocka_unit_test(test_allocator),
        cmocka_unit_test(test_logger),
        cmocka_unit_test(test_executor),
        cmocka_unit_test(test_concurrent_sessions),
        cmocka_unit_test(test_layer_hook),
        cmocka_unit_test(test_session_options),
        cmocka_unit_test(test_engine),
        cmocka_unit_test(test_greedy),
        cmocka_unit_test(test_eval_errors),
        cmocka_unit_test(test_outputs),
        cmocka_unit_test(test_expert_counts),
        cmocka_unit_test(test_classify),
        cmocka_unit_test(test_tokenize),
        cmocka_unit_test(test_decoder),
        cmocka_unit_test(test_sampler),
        cmocka_unit_test(test_init_file),
    };
    return cmocka_run_group_tests_name("public", tests, NULL, NULL);
}
