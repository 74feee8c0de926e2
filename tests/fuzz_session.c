/* Loads whatever session files it is given; a session that takes one goes on evaluating.
 *
 *     make fuzz                     libFuzzer, for FUZZ_SECONDS
 *     build/tests/replay_session    some thousand inputs of its own
 *
 * An input is a recipe, as the hashes of a file keep all others out: which of the good files to
 * begin with, bytes to change in it, where to cut it, and whether the hashes are made right again.
 */
#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "q3n_make.h"
#include "fuzz.h"
#include "sign.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { uint8_t *data; size_t bytes, at; } memory;

static int write_memory(void *user, const void *data, size_t bytes)
{
    memory *m = (memory *)user;
    m->data = (uint8_t *)realloc(m->data, m->bytes + bytes);
    require(m->data != NULL, "out of memory");
    memcpy(m->data + m->bytes, data, bytes);
    m->bytes += bytes;
    return 0;
}

static int read_memory(void *user, void *data, size_t bytes)
{
    memory *m = (memory *)user;
    if (bytes > m->bytes - m->at) return 1;
    memcpy(data, m->data + m->at, bytes);
    m->at += bytes;
    return 0;
}

/* ---- A small model with every kind of state, and good files of it ---- */
#define N_FILES 8
#define CAPACITY 520

static q3n_model *model;
static memory     file[N_FILES];

static const q3n_engine_options own_engine = { .size = sizeof own_engine, .batch_size = 64,
                                               .n_threads = 1 };

static q3n_session_options options_of(int number)
{
    static const q3n_type kv_types[4] = { Q3N_TYPE_F32, Q3N_TYPE_F16, Q3N_TYPE_BF16, Q3N_TYPE_Q8 };
    return (q3n_session_options){
        .size = sizeof(q3n_session_options), .capacity = CAPACITY, .engine_options = &own_engine,
        .kv_type = kv_types[number % 4],
        .speculate = number / 4 % 2 ? Q3N_SPECULATE_MTP : Q3N_SPECULATE_OFF,
    };
}

static void make_model(void)
{
    static const char *const fields[][2] = {
        { "layers", "4" }, { "hidden", "32" }, { "heads", "2" }, { "kv_heads", "1" },
        { "head_dim", "8" }, { "rotary_dim", "4" }, { "vocab", "61" }, { "experts", "4" },
        { "top_k", "2" }, { "moe_intermediate_size", "16" },
        { "shared_expert_intermediate_size", "16" }, { "linear_num_key_heads", "1" },
        { "linear_num_value_heads", "2" }, { "linear_key_head_dim", "8" },
        { "linear_value_head_dim", "8" }, { "num_mtp_layers", "1" },
    };
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_error err;
    require(q3n_config_preset("g1", &c, &err) == Q3N_OK, "no preset");
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (q3n_config_set(&c, fields[i][0], fields[i][1], &err) != Q3N_OK)
            require(0, err.message);
    const q3n_init_options o = { .size = sizeof o,
                                 .type = Q3N_TYPE_F32, .seed = 1, .stddev = 0.3, .n_threads = 1 };
    const int64_t bytes = q3n_init_bytes(&c, &o, &err);
    void *data = NULL;
    require(bytes > 0 && posix_memalign(&data, 64, (size_t)bytes) == 0, err.message);
    require(q3n_init_memory(data, (size_t)bytes, &c, &o, &err) == Q3N_OK, err.message);
    require(q3n_model_open_memory(&model, data, (size_t)bytes, NULL, &err) == Q3N_OK, err.message);
}

static void give_sampler(q3n_session *s, int window)
{
    const q3n_sampler_options o = { .size = sizeof o, .temperature = 1.0f,
                                    .repetition_penalty = 1.2f, .penalty_window = window };
    require(q3n_session_set_sampler(s, &o) == Q3N_OK, "no sampler");
}

static void make_files(void)
{
    for (int i = 0; i < N_FILES; i++) {
        const q3n_session_options o = options_of(i);
        const q3n_sink sink = { write_memory, &file[i] };
        q3n_session *s = NULL;
        int32_t tokens[300];
        for (int t = 0; t < 300; t++) tokens[t] = (t * 7 + i) % 61;
        require(q3n_session_create(&s, model, &o, NULL) == Q3N_OK, "no session");
        if (i % 3) give_sampler(s, 4 * i);
        for (int t = 0; t < 5 * i; t++) q3n_sampler_accept(q3n_session_sampler(s), t);
        require(q3n_session_eval(s, tokens, i % 2 ? 300 : 5, NULL) == Q3N_OK, "no evaluation");
        require(q3n_session_save_to(s, &sink) == Q3N_OK, "not saved");
        q3n_session_destroy(s);
    }
}

/* ---- One input ---- */
static void load(const memory *m, int number)
{
    const q3n_session_options o = options_of(number);
    memory in = *m;
    const q3n_source source = { read_memory, &in };
    q3n_session *s = NULL;
    float logits[61];
    const int32_t token = 3;
    require(q3n_session_create(&s, model, &o, NULL) == Q3N_OK, "no session");
    require(q3n_session_eval(s, &token, 1, logits) == Q3N_OK, "no evaluation");
    if (m->bytes % 3) give_sampler(s, (int)(m->bytes % 13));
    const q3n_result r = q3n_session_load_from(s, &source);
    int n = q3n_session_length(s);
    if (r == Q3N_OK) {
        int32_t tokens[CAPACITY];
        require(n >= 0 && n <= CAPACITY, "a length beyond the capacity");
        require(q3n_session_tokens(s, 0, n, tokens) == Q3N_OK, "no tokens");
        for (int i = 0; i < n; i++) require(tokens[i] >= 0 && tokens[i] < 61, "a strange token");
        if (n > 0) q3n_session_logits(s, logits);
        int32_t drafts[2], chosen;
        int n_chosen;
        if (q3n_session_sampler(s) && n < CAPACITY) {
            if (q3n_session_decode(s, token, &chosen, 1, &n_chosen) == Q3N_OK)
                require(chosen >= 0 && chosen < 61, "a strange choice");
            n = q3n_session_length(s);
        }
        if (q3n_session_draft(s, token, drafts, 2, logits) == Q3N_OK)
            require(drafts[0] >= 0 && drafts[0] < 61 && drafts[1] >= 0 && drafts[1] < 61,
                    "a strange draft");
    } else {
        require(n == 1, "a failed load changed the session");
        check_error(q3n_session_error(s), r);
    }
    for (int i = 0; i < 3 && n + i < CAPACITY; i++)
        require(q3n_session_eval(s, &token, 1, logits) == Q3N_OK, "a session that is no more");
    q3n_session_destroy(s);
}

/* Flags, where to cut, then changes of 4 bytes each: place and value. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (!model) {
        make_model();
        make_files();
    }
    if (bytes < 4) return 0;
    const int number = data[0] % N_FILES;
    memory m = file[number];
    m.data = (uint8_t *)malloc(m.bytes);
    require(m.data != NULL, "out of memory");
    memcpy(m.data, file[number].data, m.bytes);
    if (data[0] & 0x10) m.bytes = q3n__load_u16(data + 2) % (m.bytes + 1);
    for (size_t i = 4; i + 4 <= bytes && m.bytes > 0; i += 4) {
        const size_t at = q3n__load_u16(data + i) % (data[i + 3] & 1 ? 128 : m.bytes);
        if (at < m.bytes) m.data[at] = data[i + 2];
    }
    if (data[0] & 0x20) sign_session(m.data, m.bytes);
    memory exact = { (uint8_t *)malloc(m.bytes ? m.bytes : 1), m.bytes, 0 };
    require(exact.data != NULL, "out of memory");
    memcpy(exact.data, m.data, m.bytes);
    load(&exact, data[0] & 0x40 ? data[1] % N_FILES : number);
    free(exact.data);
    free(m.data);
    return 0;
}

#ifdef Q3N_FUZZ_REPLAY

int main(void)
{
    uint32_t state = 1;
    for (int i = 0; i < 3000; i++) {
        uint8_t input[4 + 4 * 8];
        const size_t changes = next_random(&state) % 8;
        for (size_t k = 0; k < sizeof input; k++) input[k] = (uint8_t)next_random(&state);
        if (i % 4 != 0) input[0] = (uint8_t)((input[0] & 0x0f) | 0x20);   /* whole and signed */
        LLVMFuzzerTestOneInput(input, 4 + 4 * changes);
    }
    for (int i = 0; i < N_FILES; i++) free(file[i].data);
    void *data = (void *)(uintptr_t)model->data;
    q3n_model_close(model);
    free(data);
    printf("3000 inputs, replayed\n");
    return 0;
}

#endif
