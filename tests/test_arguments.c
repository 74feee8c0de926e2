/* test_arguments.c - the rule for arguments (ARGUMENTS in the manual), walked over every function
 * of the API: a NULL where none is allowed, numbers out of their range, everything zero.  The
 * functions are read from the header: one without a row here fails the test. */
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE 1     /* getpid */
#endif
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "qwen3next.h"
#include "q3n_make.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))
#define STORIES    "build/models/stories.q3n"           /* has a tokenizer */
#define DRAFTS     "build/models/qwen3_next_mtp.q3n"
#define CLASSIFIER "build/models/qwen3_next_cls.q3n"

/* ---- What functions are called with ---- */
enum { CAPACITY = 32, LENGTH = 5, MAX_VOCAB = 4096, LAST_ID = MAX_VOCAB - 1, DRAFTS_ID = 319 };

/* Places for whatever is written, larger than the longest that is asked for. */
static struct {
    q3n_model        *model;
    q3n_session      *session;
    q3n_snapshot     *snapshot;
    q3n_cache        *cache;
    q3n_engine        *engine;
    q3n_sampler      *sampler;
    q3n_chat         *chat;
    q3n_prompt       *prompt;
    q3n_type          type;
    q3n_isa           isa;
    q3n_config        config;
    q3n_model_stats   model_stats;
    q3n_cache_stats   cache_stats;
    q3n_speculation   speculation;
    q3n_error         err;
    q3n_detokenizer       detokenizer;
    q3n_outputs       outputs;
    q3n_session_memory memory;
    char              text[400];
    float             floats[MAX_VOCAB];
    int32_t           ids[64];
    size_t            n;
    double            number, numbers[CAPACITY];
    int               i;
    unsigned char     bytes[4096];
    char              path[64];
} to;

static const int32_t five_ids[CAPACITY] = { 1, 2, 3, 4, 5 };
static const float zeros[MAX_VOCAB];
static q3n_session_options session_options = {
    .size = sizeof session_options, .capacity = CAPACITY,
    .speculate = Q3N_SPECULATE_AUTO, .draft = 2 };
static const q3n_engine_options engine_options = {
    .size = sizeof engine_options, .batch_size = CAPACITY, .n_threads = 1 };
static const q3n_cache_options cache_options = { .size = sizeof cache_options,
                                                 .max_bytes = 1 << 20 };
static const q3n_sampler_options sampler_options = { .size = sizeof sampler_options,
                                                      .top_k = 3 };
static const q3n_chat_options chat_options = { .size = sizeof chat_options,
                                               .template_text = "{{ messages }}" };
static const q3n_chat_input chat_input = { .size = sizeof chat_input,
                                           .request = "{\"messages\": [1]}" };
static const q3n_rows rows = { zeros, 2, 64, NULL };
static const q3n_embed_options embed_options = { .size = sizeof embed_options,
                                                 .pooling = Q3N_POOLING_MEAN };
static q3n_engine_item item[2];           /* the second has no session                            */
static _Alignas(64) unsigned char file[2 << 20], place[16 << 20];    /* of the two _memory       */
static size_t file_bytes, init_bytes;
static char made[80];                    /* file that is to be made                              */
static FILE *saved;                      /* session file                                         */

static int sink_write(void *user, const void *data, size_t bytes)
{
    (void)user;
    (void)data;
    (void)bytes;
    return 0;
}

static int source_read(void *user, void *data, size_t bytes)
{
    (void)user;
    return fread(data, 1, bytes, saved) != bytes;
}

static q3n_sink sink = { sink_write, NULL };
static q3n_source source = { source_read, NULL };

static struct {
    q3n_model    *m;
    q3n_session  *s;
    q3n_sampler  *sampler;
    q3n_cache    *cache;
    q3n_engine    *engine;
    q3n_snapshot *snap;
    q3n_chat     *chat;
    q3n_prompt   *prompt;
} f;

/* A geometry of some megabytes. */
static void small_config(q3n_config *c)
{
    static const char *const set[][2] = {
        { "vocab", "64" }, { "layers", "1" }, { "hidden", "64" }, { "intermediate_size", "64" } };
    assert_int_equal(q3n_config_preset("qwen3-0.6b", c, NULL), Q3N_OK);
    for (int i = 0; i < COUNT(set); i++)
        assert_int_equal(q3n_config_set(c, set[i][0], set[i][1], NULL), Q3N_OK);
}

static void fixture_open(const char *path)
{
    memset(&to, 0, sizeof to);
    to.config.size = sizeof to.config;
    to.model_stats.size = sizeof to.model_stats;
    to.cache_stats.size = sizeof to.cache_stats;
    to.speculation.size = sizeof to.speculation;
    to.outputs.size = sizeof to.outputs;
    to.memory.size = sizeof to.memory;
    snprintf(to.path, sizeof to.path, "build/test_arguments_%d", (int)getpid());
    assert_int_equal(q3n_model_open(&f.m, path, NULL, NULL), Q3N_OK);
    assert_true(q3n_model_config(f.m)->vocab_size <= MAX_VOCAB);
    assert_int_equal(q3n_cache_create(&f.cache, f.m, &cache_options, NULL), Q3N_OK);
    assert_int_equal(q3n_engine_create(&f.engine, f.m, &engine_options, NULL), Q3N_OK);
    assert_int_equal(q3n_sampler_create(&f.sampler, f.m, NULL, NULL), Q3N_OK);
    session_options.engine = f.engine;
    session_options.engine_options = NULL;
    assert_int_equal(q3n_session_create(&f.s, f.m, &session_options, NULL), Q3N_OK);
    session_options.engine = NULL;
    session_options.engine_options = &engine_options;
    assert_int_equal(q3n_session_set_sampler(f.s, &sampler_options), Q3N_OK);
    assert_int_equal(q3n_session_eval(f.s, five_ids, LENGTH, NULL), Q3N_OK);
    assert_int_equal(q3n_session_snapshot(f.s, &f.snap), Q3N_OK);
    assert_int_equal(q3n_chat_open(&f.chat, f.m, &chat_options, NULL), Q3N_OK);
    assert_int_equal(q3n_chat_render(f.chat, &chat_input, &f.prompt, NULL), Q3N_OK);
    assert_int_equal(q3n_session_save(f.s, to.path), Q3N_OK);
    assert_non_null(saved = fopen(to.path, "rb"));
    small_config(&to.config);
    snprintf(made, sizeof made, "%s.made", to.path);
    item[0] = (q3n_engine_item){ .size = sizeof item[0],
                                 .session = f.s, .tokens = five_ids, .n = 2 };
}

static void fixture_close(void)
{
    q3n_prompt_free(f.prompt);
    q3n_chat_close(f.chat);
    q3n_snapshot_free(f.snap);
    q3n_session_destroy(f.s);
    q3n_sampler_destroy(f.sampler);
    q3n_engine_destroy(f.engine);
    q3n_cache_destroy(f.cache);
    q3n_model_close(f.m);
    fclose(saved);
    remove(to.path);
    remove(made);
}

/* ---- Rows ---- */
typedef union {
    void   *p;
    int64_t i;
} arg;

typedef enum {
    NONE,                        /* no more parameters                                           */
    MODEL, SESSION, SAMPLER, CACHE, ENGINE, CHAT, PROMPT, SNAPSHOT,   /* the fixture's; NULL is
                                                            wrong                                */
    NEEDED,                      /* a pointer; NULL is wrong                                     */
    MAYBE,                       /* a pointer that may be NULL                                   */
    ARRAY,                       /* NULL is wrong unless the parameter that counts it is 0       */
    OPENED,                      /* a place for a handle, NULL after errors; NULL is wrong       */
    COUNTED, COUNTED_MAYBE,      /* a place for a count, 0 after errors; NULL is wrong, or not   */
    NUMBER,                      /* [low, high] is right, nothing else                           */
    AMOUNT,                      /* of what the caller has: nothing more can be right; 0 is      */
} kind;

typedef struct {
    kind        kind;
    const void *p;
    int64_t     i, low, high;    /* the right value; ARRAY: i is the parameter that counts it    */
} parameter;

typedef enum { RESULT, ANSWER, NOTHING } returns;     /* ANSWER: 0 for what is not there         */

typedef struct {
    const char *name;
    returns     returns;
    long long (*call)(const arg *a);
    void      (*end)(void);      /* of what a call that went well has made                       */
    const char *model;
    parameter   parameter[8];
} row;

static void close_model(void)     { q3n_model_close(to.model); }
static void destroy_session(void) { q3n_session_destroy(to.session); }
static void free_snapshot(void)   { q3n_snapshot_free(to.snapshot); }
static void destroy_cache(void)   { q3n_cache_destroy(to.cache); }
static void destroy_engine(void)   { q3n_engine_destroy(to.engine); }
static void close_chat(void)      { q3n_chat_close(to.chat); }
static void free_prompt(void)     { q3n_prompt_free(to.prompt); }
static void destroy_sampler(void) { q3n_sampler_destroy(to.sampler); }

#define P(k)    a[k].p
#define N(k)    ((int)a[k].i)
#define SIZE(k) ((size_t)a[k].i)
#define CALL(name, expression)                                                          \
    static long long call_##name(const arg *a) { (void)a; return (long long)(expression); }
#define DO(name, expression)                                                            \
    static long long call_##name(const arg *a) { expression; return 0; }

CALL(q3n_result_string, q3n_result_string((q3n_result)N(0)) != NULL)
CALL(q3n_version, q3n_version())
CALL(q3n_abi_version, q3n_abi_version())
CALL(q3n_type_name, q3n_type_name((q3n_type)N(0)) != NULL)
CALL(q3n_type_from_name, q3n_type_from_name(P(0), P(1)))
CALL(q3n_isa_name, q3n_isa_name((q3n_isa)N(0)) != NULL)
CALL(q3n_isa_from_name, q3n_isa_from_name(P(0), P(1)))
CALL(q3n_isa_supported, q3n_isa_supported((q3n_isa)N(0)))
CALL(q3n_isa_best, q3n_isa_best())
CALL(q3n_config_preset, q3n_config_preset(P(0), P(1), P(2)))
CALL(q3n_config_preset_name, q3n_config_preset_name(N(0)) != NULL)
CALL(q3n_config_set, q3n_config_set(P(0), P(1), P(2), P(3)))
CALL(q3n_config_field, q3n_config_field(P(0), N(1), P(2)) != NULL)
CALL(q3n_config_value, q3n_config_value(P(0), P(1), P(2)))
CALL(q3n_config_check, q3n_config_check(P(0), P(1)))
CALL(q3n_model_open, q3n_model_open(P(0), P(1), P(2), P(3)))
DO(q3n_model_close, q3n_model_close(P(0)))
CALL(q3n_model_config, q3n_model_config(P(0)) != NULL)
CALL(q3n_model_vocab_size, q3n_model_vocab_size(P(0)))
CALL(q3n_model_hidden_size, q3n_model_hidden_size(P(0)))
CALL(q3n_model_n_layers, q3n_model_n_layers(P(0)))
CALL(q3n_model_n_labels, q3n_model_n_labels(P(0)))
CALL(q3n_model_context_length, q3n_model_context_length(P(0)))
CALL(q3n_model_layer_is_delta, q3n_model_layer_is_delta(P(0), N(1)))
CALL(q3n_model_layer_has_experts, q3n_model_layer_has_experts(P(0), N(1)))
CALL(q3n_model_name, q3n_model_name(P(0))[0] != 0)
CALL(q3n_model_chat_kind, strcmp(q3n_model_chat_kind(P(0)), "none"))
CALL(q3n_model_eos_ids, q3n_model_eos_ids(P(0), P(1)) != NULL)
CALL(q3n_model_is_eos, q3n_model_is_eos(P(0), N(1)))
CALL(q3n_model_label, q3n_model_label(P(0), N(1)) != NULL)
CALL(q3n_model_probabilities, q3n_model_probabilities(P(0), P(1), P(2)))
CALL(q3n_model_n_tensors, q3n_model_n_tensors(P(0)))
CALL(q3n_model_tensor, q3n_model_tensor(P(0), N(1)) != NULL)
CALL(q3n_model_find_tensor, q3n_model_find_tensor(P(0), P(1)) != NULL)
CALL(q3n_model_verify, q3n_model_verify(P(0), P(1), P(2)))
CALL(q3n_model_stats_get, q3n_model_stats_get(P(0), P(1)))
CALL(q3n_session_bytes, q3n_session_bytes(P(0), P(1), P(2)) != 0)
CALL(q3n_session_create, q3n_session_create(P(0), P(1), P(2), P(3)))
DO(q3n_session_destroy, q3n_session_destroy(P(0)))
CALL(q3n_session_eval, q3n_session_eval(P(0), P(1), N(2), P(3)))
CALL(q3n_session_eval_outputs, q3n_session_eval_outputs(P(0), P(1), N(2), P(3)))
CALL(q3n_session_score, q3n_session_score(P(0), P(1), N(2), P(3)))
CALL(q3n_session_embed, q3n_session_embed(P(0), P(1), N(2), P(3), P(4)))
CALL(q3n_session_classify, q3n_session_classify(P(0), P(1), N(2), P(3)))
CALL(q3n_session_logits, q3n_session_logits(P(0), P(1)))
CALL(q3n_session_tokens, q3n_session_tokens(P(0), N(1), N(2), P(3)))
CALL(q3n_session_cancel, q3n_session_cancel(P(0)))
CALL(q3n_session_model, q3n_session_model(P(0)) != NULL)
CALL(q3n_session_length, (long long)q3n_session_length(P(0)))
CALL(q3n_session_capacity, (long long)q3n_session_capacity(P(0)))
DO(q3n_session_reset, q3n_session_reset(P(0)))
CALL(q3n_session_error, q3n_session_error(P(0))->code - Q3N_ERR_ARG)
CALL(q3n_session_expert_counts, q3n_session_expert_counts(P(0), N(1)) != NULL)
CALL(q3n_session_snapshot, q3n_session_snapshot(P(0), P(1)))
CALL(q3n_snapshot_length, q3n_snapshot_length(P(0)))
CALL(q3n_snapshot_bytes, q3n_snapshot_bytes(P(0)) != 0)
DO(q3n_snapshot_free, q3n_snapshot_free(P(0)))
CALL(q3n_session_restore, q3n_session_restore(P(0), P(1)))
CALL(q3n_session_fork, q3n_session_fork(P(0), P(1), P(2), P(3)))
CALL(q3n_session_rewind, q3n_session_rewind(P(0), N(1)))
CALL(q3n_session_prefill, q3n_session_prefill(P(0), P(1), N(2), P(3), P(4)))
CALL(q3n_session_reuse, q3n_session_reuse(P(0), P(1), N(2), P(3)))
CALL(q3n_session_checkpoint, q3n_session_checkpoint(P(0)))
CALL(q3n_session_save, q3n_session_save(P(0), P(1)))
CALL(q3n_session_save_to, q3n_session_save_to(P(0), P(1)))
CALL(q3n_session_load, q3n_session_load(P(0), P(1)))
CALL(q3n_session_load_from, q3n_session_load_from(P(0), P(1)))
CALL(q3n_file_check, q3n_file_check(P(0), P(1)))
CALL(q3n_cache_create, q3n_cache_create(P(0), P(1), P(2), P(3)))
DO(q3n_cache_destroy, q3n_cache_destroy(P(0)))
DO(q3n_cache_clear, q3n_cache_clear(P(0)))
CALL(q3n_cache_stats_get, q3n_cache_stats_get(P(0), P(1)))
CALL(q3n_engine_bytes, q3n_engine_bytes(P(0), P(1)) != 0)
CALL(q3n_engine_n_threads, q3n_engine_n_threads(P(0)))
CALL(q3n_engine_batch_size, q3n_engine_batch_size(P(0)))
CALL(q3n_engine_isa, (long long)q3n_engine_isa(P(0)))
CALL(q3n_session_engine, q3n_session_engine(P(0)) != NULL)
CALL(q3n_engine_create, q3n_engine_create(P(0), P(1), P(2), P(3)))
DO(q3n_engine_destroy, q3n_engine_destroy(P(0)))
CALL(q3n_engine_eval, q3n_engine_eval(P(0), P(1), N(2), P(3)))
CALL(q3n_engine_cancel, q3n_engine_cancel(P(0)))
CALL(q3n_engine_error, q3n_engine_error(P(0))->code - Q3N_ERR_ARG)
CALL(q3n_model_n_tokens, q3n_model_n_tokens(P(0)))
CALL(q3n_tokenize, q3n_tokenize(P(0), P(1), SIZE(2), N(3), P(4), SIZE(5), P(6)))
CALL(q3n_token_text, q3n_token_text(P(0), N(1), P(2)) != NULL)
CALL(q3n_token_is_special, q3n_token_is_special(P(0), N(1)))
CALL(q3n_detokenizer_next, q3n_detokenizer_next(P(0), P(1), N(2), P(3), SIZE(4), P(5)))
DO(q3n_detokenizer_finish, q3n_detokenizer_finish(P(0), P(1), P(2)))
CALL(q3n_detokenize, q3n_detokenize(P(0), P(1), SIZE(2), P(3), SIZE(4), P(5)))
CALL(q3n_chat_open, q3n_chat_open(P(0), P(1), P(2), P(3)))
DO(q3n_chat_close, q3n_chat_close(P(0)))
CALL(q3n_chat_render, q3n_chat_render(P(0), P(1), P(2), P(3)))
CALL(q3n_prompt_text, q3n_prompt_text(P(0), P(1))[0] != 0)
CALL(q3n_prompt_spans, q3n_prompt_spans(P(0), P(1)) != NULL)
CALL(q3n_prompt_ids, q3n_prompt_ids(P(0), P(1), SIZE(2), P(3)))
DO(q3n_prompt_free, q3n_prompt_free(P(0)))
CALL(q3n_sampler_create, q3n_sampler_create(P(0), P(1), P(2), P(3)))
DO(q3n_sampler_destroy, q3n_sampler_destroy(P(0)))
DO(q3n_sampler_accept, q3n_sampler_accept(P(0), N(1)))
DO(q3n_sampler_reset, q3n_sampler_reset(P(0)))
DO(q3n_sampler_seed, q3n_sampler_seed(P(0), (uint64_t)a[1].i))
CALL(q3n_session_set_sampler, q3n_session_set_sampler(P(0), P(1)))
CALL(q3n_session_sampler, q3n_session_sampler(P(0)) != NULL)
CALL(q3n_session_decode, q3n_session_decode(P(0), N(1), P(2), N(3), P(4)))
CALL(q3n_session_draft, q3n_session_draft(P(0), N(1), P(2), N(3), P(4)))
CALL(q3n_session_speculation, q3n_session_speculation(P(0), P(1)))
CALL(q3n_type_bytes, q3n_type_bytes((q3n_type)N(0), a[1].i, a[2].i))
CALL(q3n_quantize_rows, q3n_quantize_rows((q3n_type)N(0), P(1), P(2), SIZE(3), P(4)))
CALL(q3n_recipe_name, q3n_recipe_name(N(0)) != NULL)
CALL(q3n_quantize_file, q3n_quantize_file(P(0), P(1), P(2), P(3)))
CALL(q3n_init_file, q3n_init_file(P(0), P(1), P(2), P(3)))
CALL(q3n_init_bytes, q3n_init_bytes(P(0), P(1), P(2)))
CALL(q3n_model_open_memory,
     q3n_model_open_memory(P(0), P(1), N(2) == 1 ? file_bytes : 0, P(3), P(4)))
CALL(q3n_init_memory, q3n_init_memory(P(0), N(1) == 1 ? init_bytes : 0, P(2), P(3), P(4)))
CALL(q3n_sampler_sample, q3n_sampler_sample(P(0), P(1), P(2)))
CALL(q3n_sampler_error, q3n_sampler_error(P(0))->code - Q3N_ERR_ARG)

#define THE(kind)            { kind, NULL, 0, 0, 0 }
#define IN(p)                { NEEDED, p, 0, 0, 0 }
#define MAY(p)               { MAYBE, p, 0, 0, 0 }
#define ARR(p, counted_by)   { ARRAY, p, counted_by, 0, 0 }
#define NEW(p)               { OPENED, p, 0, 0, 0 }
#define CNT(p)               { COUNTED, p, 0, 0, 0 }
#define CNT_OR_NULL(p)       { COUNTED_MAYBE, p, 0, 0, 0 }
#define NUM(right, low, high) { NUMBER, NULL, right, low, high }
#define LEN(right)           { AMOUNT, NULL, right, 0, 0 }
#define ROW(name, returns, end, model, ...)                                             \
    { #name, returns, call_##name, end, model, { __VA_ARGS__ } }
#define FLAGS (Q3N_TOKENIZE_NO_SPECIAL | Q3N_TOKENIZE_WHOLE)

static const row table[] = {
    ROW(q3n_result_string, NOTHING, NULL, DRAFTS, NUM(0, INT_MIN, INT_MAX)),
    ROW(q3n_version, NOTHING, NULL, DRAFTS, { NONE, NULL, 0, 0, 0 }),
    ROW(q3n_abi_version, NOTHING, NULL, DRAFTS, { NONE, NULL, 0, 0, 0 }),
    ROW(q3n_type_name, ANSWER, NULL, DRAFTS, NUM(0, 0, Q3N_TYPE_COUNT - 1)),
    ROW(q3n_type_from_name, RESULT, NULL, DRAFTS, IN("q8"), IN(&to.type)),
    ROW(q3n_isa_name, ANSWER, NULL, DRAFTS, NUM(Q3N_ISA_SCALAR, 0, INT_MAX - 1)),
    ROW(q3n_isa_from_name, RESULT, NULL, DRAFTS, IN("avx2"), IN(&to.isa)),
    ROW(q3n_isa_supported, ANSWER, NULL, DRAFTS, NUM(Q3N_ISA_SCALAR, 0, INT_MAX - 1)),
    ROW(q3n_isa_best, NOTHING, NULL, DRAFTS, { NONE, NULL, 0, 0, 0 }),
    ROW(q3n_config_preset, RESULT, NULL, DRAFTS, IN("tiny"), IN(&to.config), MAY(&to.err)),
    ROW(q3n_config_preset_name, ANSWER, NULL, DRAFTS, NUM(0, 0, INT_MAX - 1)),
    ROW(q3n_config_set, RESULT, NULL, DRAFTS, IN(&to.config), IN("vocab"), IN("64"),
        MAY(&to.err)),
    ROW(q3n_config_field, ANSWER, NULL, DRAFTS, IN(&to.config), NUM(0, 0, INT_MAX - 1),
        IN(to.text)),
    ROW(q3n_config_value, RESULT, NULL, DRAFTS, IN(&to.config), IN("vocab_size"), IN(&to.number)),
    ROW(q3n_config_check, RESULT, NULL, DRAFTS, IN(&to.config), MAY(&to.err)),
    ROW(q3n_model_open, RESULT, close_model, STORIES, NEW(&to.model), IN(STORIES), MAY(NULL),
        MAY(&to.err)),
    ROW(q3n_model_close, NOTHING, NULL, DRAFTS, MAY(NULL)),
    ROW(q3n_model_config, ANSWER, NULL, DRAFTS, THE(MODEL)),
    ROW(q3n_model_vocab_size, ANSWER, NULL, DRAFTS, THE(MODEL)),
    ROW(q3n_model_hidden_size, ANSWER, NULL, DRAFTS, THE(MODEL)),
    ROW(q3n_model_n_layers, ANSWER, NULL, DRAFTS, THE(MODEL)),
    ROW(q3n_model_n_labels, ANSWER, NULL, CLASSIFIER, THE(MODEL)),
    ROW(q3n_model_context_length, ANSWER, NULL, DRAFTS, THE(MODEL)),
    ROW(q3n_model_layer_is_delta, ANSWER, NULL, DRAFTS, THE(MODEL), NUM(0, 0, INT_MAX - 1)),
    ROW(q3n_model_layer_has_experts, ANSWER, NULL, DRAFTS, THE(MODEL), NUM(0, 0, INT_MAX - 1)),
    ROW(q3n_model_name, ANSWER, NULL, DRAFTS, THE(MODEL)),
    ROW(q3n_model_chat_kind, ANSWER, NULL, DRAFTS, THE(MODEL)),
    ROW(q3n_model_eos_ids, ANSWER, NULL, DRAFTS, THE(MODEL), CNT_OR_NULL(&to.i)),
    ROW(q3n_model_is_eos, ANSWER, NULL, DRAFTS, THE(MODEL), NUM(0, 0, MAX_VOCAB)),
    ROW(q3n_model_label, ANSWER, NULL, CLASSIFIER, THE(MODEL), NUM(0, 0, INT_MAX - 1)),
    ROW(q3n_model_probabilities, RESULT, NULL, CLASSIFIER, THE(MODEL), IN(zeros), IN(to.floats)),
    ROW(q3n_model_n_tensors, ANSWER, NULL, DRAFTS, THE(MODEL)),
    ROW(q3n_model_tensor, ANSWER, NULL, DRAFTS, THE(MODEL), NUM(0, 0, INT_MAX - 1)),
    ROW(q3n_model_find_tensor, ANSWER, NULL, DRAFTS, THE(MODEL), IN("norm.weight")),
    ROW(q3n_model_verify, RESULT, NULL, DRAFTS, THE(MODEL), MAY(NULL), MAY(&to.err)),
    ROW(q3n_model_stats_get, RESULT, NULL, DRAFTS, THE(MODEL), IN(&to.model_stats)),
    ROW(q3n_session_bytes, ANSWER, NULL, DRAFTS, THE(MODEL), MAY(&session_options),
        MAY(&to.memory)),
    ROW(q3n_session_create, RESULT, destroy_session, DRAFTS, NEW(&to.session), THE(MODEL),
        MAY(&session_options), MAY(&to.err)),
    ROW(q3n_session_destroy, NOTHING, NULL, DRAFTS, MAY(NULL)),
    ROW(q3n_session_eval, RESULT, NULL, DRAFTS, THE(SESSION), IN(five_ids),
        NUM(3, 1, CAPACITY - LENGTH), MAY(to.floats)),
    ROW(q3n_session_eval_outputs, RESULT, NULL, DRAFTS, THE(SESSION), IN(five_ids),
        NUM(3, 1, CAPACITY - LENGTH), MAY(&to.outputs)),
    ROW(q3n_session_score, RESULT, NULL, DRAFTS, THE(SESSION), IN(five_ids),
        NUM(3, 1, CAPACITY - LENGTH), IN(to.numbers)),
    ROW(q3n_session_embed, RESULT, NULL, DRAFTS, THE(SESSION), IN(five_ids), NUM(3, 1, CAPACITY),
        MAY(&embed_options), IN(to.floats)),
    ROW(q3n_session_classify, RESULT, NULL, CLASSIFIER, THE(SESSION), IN(five_ids),
        NUM(3, 1, CAPACITY), IN(to.floats)),
    ROW(q3n_session_logits, RESULT, NULL, DRAFTS, THE(SESSION), IN(to.floats)),
    ROW(q3n_session_tokens, RESULT, NULL, DRAFTS, THE(SESSION), NUM(1, 0, LENGTH),
        NUM(2, 0, LENGTH), ARR(to.ids, 2)),
    ROW(q3n_session_cancel, ANSWER, NULL, DRAFTS, THE(SESSION)),
    ROW(q3n_session_model, ANSWER, NULL, DRAFTS, THE(SESSION)),
    ROW(q3n_session_length, ANSWER, NULL, DRAFTS, THE(SESSION)),
    ROW(q3n_session_capacity, ANSWER, NULL, DRAFTS, THE(SESSION)),
    ROW(q3n_session_reset, NOTHING, NULL, DRAFTS, THE(SESSION)),
    ROW(q3n_session_error, ANSWER, NULL, DRAFTS, THE(SESSION)),
    ROW(q3n_session_expert_counts, ANSWER, NULL, DRAFTS, THE(SESSION), NUM(0, 0, INT_MAX - 1)),
    ROW(q3n_session_snapshot, RESULT, free_snapshot, DRAFTS, THE(SESSION), NEW(&to.snapshot)),
    ROW(q3n_snapshot_length, ANSWER, NULL, DRAFTS, THE(SNAPSHOT)),
    ROW(q3n_snapshot_bytes, ANSWER, NULL, DRAFTS, THE(SNAPSHOT)),
    ROW(q3n_snapshot_free, NOTHING, NULL, DRAFTS, MAY(NULL)),
    ROW(q3n_session_restore, RESULT, NULL, DRAFTS, THE(SESSION), THE(SNAPSHOT)),
    ROW(q3n_session_fork, RESULT, destroy_session, DRAFTS, NEW(&to.session), THE(SESSION),
        MAY(&session_options), MAY(&to.err)),
    ROW(q3n_session_rewind, RESULT, NULL, DRAFTS, THE(SESSION), NUM(3, 0, LENGTH)),
    ROW(q3n_session_prefill, RESULT, NULL, DRAFTS, THE(SESSION), IN(five_ids), NUM(9, 1, CAPACITY),
        MAY(to.floats), CNT_OR_NULL(&to.i)),
    ROW(q3n_session_reuse, RESULT, NULL, DRAFTS, THE(SESSION), IN(five_ids), NUM(9, 1, CAPACITY),
        CNT_OR_NULL(&to.i)),
    ROW(q3n_session_checkpoint, RESULT, NULL, DRAFTS, THE(SESSION)),
    ROW(q3n_session_save, RESULT, NULL, DRAFTS, THE(SESSION), IN(made)),
    ROW(q3n_session_save_to, RESULT, NULL, DRAFTS, THE(SESSION), IN(&sink)),
    ROW(q3n_session_load, RESULT, NULL, DRAFTS, THE(SESSION), IN(to.path)),
    ROW(q3n_session_load_from, RESULT, NULL, DRAFTS, THE(SESSION), IN(&source)),
    ROW(q3n_file_check, RESULT, NULL, DRAFTS, IN(made), MAY(&to.err)),
    ROW(q3n_cache_create, RESULT, destroy_cache, DRAFTS, NEW(&to.cache), THE(MODEL),
        MAY(&cache_options), MAY(&to.err)),
    ROW(q3n_cache_destroy, NOTHING, NULL, DRAFTS, MAY(NULL)),
    ROW(q3n_cache_clear, NOTHING, NULL, DRAFTS, THE(CACHE)),
    ROW(q3n_cache_stats_get, RESULT, NULL, DRAFTS, THE(CACHE), IN(&to.cache_stats)),
    ROW(q3n_engine_bytes, ANSWER, NULL, DRAFTS, THE(MODEL), MAY(&engine_options)),
    ROW(q3n_engine_create, RESULT, destroy_engine, DRAFTS, NEW(&to.engine), THE(MODEL),
        MAY(&engine_options), MAY(&to.err)),
    ROW(q3n_engine_n_threads, ANSWER, NULL, DRAFTS, THE(ENGINE)),
    ROW(q3n_engine_batch_size, ANSWER, NULL, DRAFTS, THE(ENGINE)),
    ROW(q3n_engine_isa, ANSWER, NULL, DRAFTS, THE(ENGINE)),
    ROW(q3n_session_engine, ANSWER, NULL, DRAFTS, THE(SESSION)),
    ROW(q3n_engine_destroy, NOTHING, NULL, DRAFTS, MAY(NULL)),
    ROW(q3n_engine_eval, RESULT, NULL, DRAFTS, THE(ENGINE), ARR(item, 2), NUM(1, 0, 1), MAY(NULL)),
    ROW(q3n_engine_cancel, ANSWER, NULL, DRAFTS, THE(ENGINE)),
    ROW(q3n_engine_error, ANSWER, NULL, DRAFTS, THE(ENGINE)),
    ROW(q3n_model_n_tokens, ANSWER, NULL, STORIES, THE(MODEL)),
    ROW(q3n_tokenize, RESULT, NULL, STORIES, THE(MODEL), ARR("abc", 2), LEN(3),
        NUM(0, 0, FLAGS), ARR(to.ids, 5), LEN(64), CNT(&to.n)),
    ROW(q3n_token_text, ANSWER, NULL, STORIES, THE(MODEL), NUM(1, 0, MAX_VOCAB), CNT(&to.n)),
    ROW(q3n_token_is_special, ANSWER, NULL, STORIES, THE(MODEL), NUM(1, 0, MAX_VOCAB)),
    ROW(q3n_detokenizer_next, RESULT, NULL, STORIES, IN(&to.detokenizer), THE(MODEL),
        NUM(1, 0, LAST_ID),
        ARR(to.text, 4), LEN(400), CNT(&to.n)),
    ROW(q3n_detokenizer_finish, NOTHING, NULL, STORIES, IN(&to.detokenizer), IN(to.text),
        CNT(&to.n)),
    ROW(q3n_detokenize, RESULT, NULL, STORIES, THE(MODEL), ARR(five_ids, 2), LEN(5),
        ARR(to.text, 4), LEN(400), CNT(&to.n)),
    ROW(q3n_chat_open, RESULT, close_chat, STORIES, NEW(&to.chat), MAY(NULL), IN(&chat_options),
        MAY(&to.err)),
    ROW(q3n_chat_close, NOTHING, NULL, DRAFTS, MAY(NULL)),
    ROW(q3n_chat_render, RESULT, free_prompt, STORIES, THE(CHAT), IN(&chat_input),
        NEW(&to.prompt), MAY(&to.err)),
    ROW(q3n_prompt_text, ANSWER, NULL, STORIES, THE(PROMPT), CNT_OR_NULL(&to.n)),
    ROW(q3n_prompt_spans, ANSWER, NULL, STORIES, THE(PROMPT), CNT_OR_NULL(&to.n)),
    ROW(q3n_prompt_ids, RESULT, NULL, STORIES, THE(PROMPT), ARR(to.ids, 2), LEN(64), CNT(&to.n)),
    ROW(q3n_prompt_free, NOTHING, NULL, DRAFTS, MAY(NULL)),
    ROW(q3n_sampler_create, RESULT, destroy_sampler, DRAFTS, NEW(&to.sampler), THE(MODEL),
        MAY(NULL), MAY(&to.err)),
    ROW(q3n_sampler_destroy, NOTHING, NULL, DRAFTS, MAY(NULL)),
    ROW(q3n_sampler_accept, NOTHING, NULL, DRAFTS, THE(SAMPLER), NUM(1, INT_MIN, INT_MAX)),
    ROW(q3n_sampler_reset, NOTHING, NULL, DRAFTS, THE(SAMPLER)),
    ROW(q3n_sampler_seed, NOTHING, NULL, DRAFTS, THE(SAMPLER), NUM(1, INT_MIN, INT_MAX)),
    ROW(q3n_session_set_sampler, RESULT, NULL, DRAFTS, THE(SESSION), MAY(&sampler_options)),
    ROW(q3n_session_sampler, ANSWER, NULL, DRAFTS, THE(SESSION)),
    ROW(q3n_session_decode, RESULT, NULL, DRAFTS, THE(SESSION), NUM(1, 0, DRAFTS_ID), IN(to.ids),
        NUM(4, 1, INT_MAX), CNT(&to.i)),
    ROW(q3n_session_draft, RESULT, NULL, DRAFTS, THE(SESSION), NUM(1, 0, DRAFTS_ID), IN(to.ids),
        NUM(2, 1, Q3N_MAX_DRAFT), MAY(to.floats)),
    ROW(q3n_session_speculation, RESULT, NULL, DRAFTS, THE(SESSION), IN(&to.speculation)),
    ROW(q3n_type_bytes, ANSWER, NULL, DRAFTS, NUM(3, 0, Q3N_TYPE_COUNT - 1),
        NUM(2, 1, INT32_MAX), NUM(64, 1, INT32_MAX / 8)),
    ROW(q3n_quantize_rows, RESULT, NULL, DRAFTS, NUM(0, 0, 0), IN(&rows), IN(to.bytes),
        NUM(512, 512, 512), MAY(&to.err)),
    ROW(q3n_recipe_name, ANSWER, NULL, DRAFTS, NUM(0, 0, INT_MAX - 1)),
    ROW(q3n_quantize_file, RESULT, NULL, CLASSIFIER, IN(made), THE(MODEL), MAY(NULL), MAY(&to.err)),
    ROW(q3n_init_file, RESULT, NULL, DRAFTS, IN(made), IN(&to.config), MAY(NULL), MAY(&to.err)),
    ROW(q3n_init_bytes, ANSWER, NULL, DRAFTS, IN(&to.config), MAY(NULL), MAY(&to.err)),
    ROW(q3n_model_open_memory, RESULT, close_model, CLASSIFIER, NEW(&to.model), IN(file),
        NUM(1, 1, 1), MAY(NULL), MAY(&to.err)),
    ROW(q3n_init_memory, RESULT, NULL, DRAFTS, IN(place), NUM(1, 1, 1), IN(&to.config), MAY(NULL),
        MAY(&to.err)),
    ROW(q3n_sampler_error, ANSWER, NULL, DRAFTS, THE(SAMPLER)),
    ROW(q3n_sampler_sample, RESULT, NULL, DRAFTS, THE(SAMPLER), IN(zeros), IN(to.ids)),
};

/* ---- The walk ---- */
static void *object(kind k)
{
    switch (k) {
    case MODEL:    return f.m;
    case SESSION:  return f.s;
    case SAMPLER:  return f.sampler;
    case CACHE:    return f.cache;
    case ENGINE:   return f.engine;
    case CHAT:     return f.chat;
    case PROMPT:   return f.prompt;
    case SNAPSHOT: return f.snap;
    default:       return NULL;
    }
}

static int n_parameters(const row *r)
{
    int n = 0;
    while (n < COUNT(r->parameter) && r->parameter[n].kind != NONE) n++;
    return n;
}

static void right_arguments(const row *r, arg *a)
{
    for (int i = 0; i < n_parameters(r); i++) {
        const parameter *p = &r->parameter[i];
        if (p->kind == NUMBER || p->kind == AMOUNT) a[i].i = p->i;
        else if (p->kind <= SNAPSHOT)               a[i].p = object(p->kind);
        else                                        memcpy(&a[i].p, &p->p, sizeof a[i].p);
    }
}

/* What the call must do: go well, be refused, or merely come back. */
typedef enum { WELL, REFUSED, BACK } outcome;

static void check_call(const row *r, const arg *a, outcome want, const char *what)
{
    void *const junk = (void *)(uintptr_t)64;
    const int n = n_parameters(r);
    for (int i = 0; i < n; i++) {
        const kind k = r->parameter[i].kind;
        if (!a[i].p) continue;
        if (k == OPENED) memcpy(a[i].p, &junk, sizeof junk);
        if (k == COUNTED || k == COUNTED_MAYBE) memset(a[i].p, 0x55, sizeof(int));
    }
    const long long got = r->call(a);
    const int refused = r->returns == RESULT ? got != Q3N_OK : got == 0;
    if (r->returns == RESULT && want == REFUSED && got == Q3N_OK)
        fail_msg("%s, %s: went well", r->name, what);
    if (r->returns == RESULT && want == WELL && got != Q3N_OK)
        fail_msg("%s, %s: %s", r->name, what, q3n_result_string((q3n_result)got));
    if (r->returns == ANSWER && want == REFUSED && got != 0)
        fail_msg("%s, %s: answers %lld", r->name, what, got);
    if (r->returns == RESULT && !refused && r->end) r->end();
    if (r->returns == NOTHING || !refused) return;
    for (int i = 0; i < n; i++) {
        const kind k = r->parameter[i].kind;
        const void *p = NULL;
        int count = 0;
        if (!a[i].p || got == Q3N_ERR_FULL) continue;    /* then counts say what is needed */
        if (k == OPENED) memcpy(&p, a[i].p, sizeof p);
        if (k == COUNTED || k == COUNTED_MAYBE) memcpy(&count, a[i].p, sizeof count);
        if (p || count) fail_msg("%s, %s: argument %d is not zero", r->name, what, i);
    }
}

/* One call with argument i replaced. */
static void check_with(const row *r, int i, arg value, outcome want, const char *what)
{
    arg a[COUNT(r->parameter)] = { { NULL } };
    char text[80];
    fixture_open(r->model);
    right_arguments(r, a);
    if (i >= 0) a[i] = value;
    snprintf(text, sizeof text, "argument %d %s %lld", i, what, (long long)value.i);
    check_call(r, a, want, i < 0 ? "all right" : text);
    fixture_close();
}

static void check_pointer(const row *r, int i)
{
    const kind k = r->parameter[i].kind;
    const arg null = { NULL };
    arg a[COUNT(r->parameter)] = { { NULL } };
    check_with(r, i, null, k == MAYBE || k == COUNTED_MAYBE ? WELL : REFUSED, "NULL");
    if (k != ARRAY) return;
    fixture_open(r->model);                      /* of nothing, NULL is as good as any */
    right_arguments(r, a);
    a[i].p = NULL;
    a[r->parameter[i].i].i = 0;
    check_call(r, a, BACK, "an empty array at NULL");
    if (r->call(a) == Q3N_ERR_ARG) fail_msg("%s: an empty array at NULL", r->name);
    fixture_close();
}

static void check_number(const row *r, int i)
{
    const parameter *p = &r->parameter[i];
    const int64_t values[] = { p->low, p->high, p->low - 1, p->high + 1, 0, -1, 1, INT_MIN,
                               INT_MAX, INT_MIN + 1 };
    for (int k = 0; k < COUNT(values); k++) {
        const int64_t v = values[k];
        if (v < INT_MIN || v > INT_MAX) continue;        /* no int */
        check_with(r, i, (arg){ .i = v }, v < p->low || v > p->high ? REFUSED : BACK, "is");
    }
}

static void test_every_argument(void **state)
{
    (void)state;
    q3n_config config = Q3N_INIT(q3n_config);
    FILE *model = fopen(CLASSIFIER, "rb");
    assert_non_null(model);
    file_bytes = fread(file, 1, sizeof file, model);
    fclose(model);
    small_config(&config);
    init_bytes = (size_t)q3n_init_bytes(&config, NULL, NULL);
    assert_true(init_bytes > 0 && init_bytes <= sizeof place);
    for (int k = 0; k < COUNT(table); k++) {
        const row *r = &table[k];
        const int n = n_parameters(r);
        check_with(r, -1, (arg){ NULL }, WELL, "");
        for (int i = 0; i < n; i++) {
            if (r->parameter[i].kind == NUMBER) check_number(r, i);
            else if (r->parameter[i].kind == AMOUNT)
                check_with(r, i, (arg){ .i = 0 }, BACK, "is");
            else check_pointer(r, i);
        }
        const arg zero[COUNT(r->parameter)] = { { NULL } };
        if (n > 0) check_call(r, zero, BACK, "all zero");
    }
}

/* Structs whose members must be there. */
static void test_members(void **state)
{
    (void)state;
    fixture_open(DRAFTS);
    const q3n_sink no_write = { NULL, NULL };
    const q3n_source no_read = { NULL, NULL };
    const q3n_rows no_rows = { NULL, 2, 64, NULL };
    const q3n_model_options half = { .size = sizeof half, .allocator = { NULL, NULL, &to } };
    q3n_model_options lone = half;
    lone.allocator.free = (void (*)(void *, void *, size_t))(uintptr_t)64;
    assert_int_equal(q3n_session_save_to(f.s, &no_write), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_load_from(f.s, &no_read), Q3N_ERR_ARG);
    assert_int_equal(q3n_quantize_rows(Q3N_TYPE_F32, &no_rows, to.bytes, 512, NULL), Q3N_ERR_ARG);
    assert_int_equal(q3n_model_open(&to.model, STORIES, &lone, NULL), Q3N_ERR_ARG);
    q3n_chat_options chat = chat_options;
    chat.allocator = lone.allocator;
    assert_int_equal(q3n_chat_open(&to.chat, NULL, &chat, NULL), Q3N_ERR_ARG);
    assert_int_equal(q3n_engine_eval(f.engine, item + 1, 1, NULL), Q3N_ERR_ARG);
    item[1].size = sizeof item[1];
    assert_int_equal(q3n_engine_eval(f.engine, item + 1, 1, NULL), Q3N_ERR_ARG);
    q3n_engine_item broken = { .size = sizeof broken, .session = f.s, .n = 2 };
    assert_int_equal(q3n_engine_eval(f.engine, &broken, 1, NULL), Q3N_ERR_ARG);
    broken.done = 1;
    assert_int_equal(q3n_engine_eval(f.engine, &broken, 1, NULL), Q3N_ERR_ARG);
    broken = (q3n_engine_item){ .size = sizeof broken, .session = f.s, .tokens = five_ids,
                                .n = -1, .done = -1 };
    assert_int_equal(q3n_engine_eval(f.engine, &broken, 1, NULL), Q3N_ERR_ARG);
    assert_int_equal(q3n_session_length(f.s), LENGTH);
    fixture_close();
}

/* ---- Every function of the headers has its row, and every row its function ---- */
static void count_functions(const char *path, const char *end, int found[COUNT(table)])
{
    static char text[200000];
    FILE *header = fopen(path, "rb");
    assert_non_null(header);
    const size_t n = fread(text, 1, sizeof text - 1, header);
    fclose(header);
    text[n] = 0;
    char *api_end = strstr(text, end);
    assert_non_null(api_end);
    *api_end = 0;
    for (char *p = text; (p = strstr(p, "\nQ3N_DEF ")) != NULL; p++) {
        const char *stop = strchr(p, '('), *start = stop;
        while (start[-1] == '_' || (start[-1] >= 'a' && start[-1] <= 'z')
               || (start[-1] >= '0' && start[-1] <= '9')) start--;
        int k = 0;
        while (k < COUNT(table) && (strlen(table[k].name) != (size_t)(stop - start)
                                    || strncmp(table[k].name, start, (size_t)(stop - start)) != 0))
            k++;
        if (k == COUNT(table)) fail_msg("%.*s has no row", (int)(stop - start), start);
        found[k]++;
    }
}

static void test_every_function(void **state)
{
    (void)state;
    int found[COUNT(table)] = { 0 };
    count_functions("qwen3next.h", "\n#endif /* QWEN3NEXT_H */", found);
    count_functions("tools/q3n_make.h", "\n#endif /* Q3N_MAKE_H */", found);
    for (int k = 0; k < COUNT(table); k++)
        if (found[k] != 1) fail_msg("%s: %d times in the headers", table[k].name, found[k]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_function),
        cmocka_unit_test(test_every_argument),
        cmocka_unit_test(test_members),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
