/* Makes a small random model in memory, compares its checksums and evaluates a token; quantises a
 * row of ones and prints the bytes of its codes.  Uses no part of the library that a build macro
 * removes.
 *
 * usage: build_make */
#include "tools/q3n_make.h"
#include "tools/q3n_make.h"
#include <stdio.h>

static _Alignas(64) unsigned char data[1 << 20];

static q3n_result make_model(q3n_model **m, q3n_error *err)
{
    static const char *const set[][2] = {
        { "vocab", "64" }, { "hidden", "64" }, { "layers", "1" }, { "experts", "2" },
        { "top_k", "1" }, { "moe_intermediate_size", "64" }
    };
    const q3n_init_options o = { .size = sizeof o, .type = Q3N_TYPE_Q4, .n_threads = 2 };
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_result r = q3n_config_preset("tiny", &c, err);
    for (size_t i = 0; i < sizeof set / sizeof set[0] && r == Q3N_OK; i++)
        r = q3n_config_set(&c, set[i][0], set[i][1], err);
    const int64_t bytes = r == Q3N_OK ? q3n_init_bytes(&c, &o, err) : 0;
    if (bytes <= 0 || bytes > (int64_t)sizeof data) return r == Q3N_OK ? Q3N_ERR_MEMORY : r;
    r = q3n_init_memory(data, (size_t)bytes, &c, &o, err);
    return r == Q3N_OK ? q3n_model_open_memory(m, data, (size_t)bytes, NULL, err) : r;
}

int main(void)
{
    q3n_model *m = NULL;
    q3n_session *s = NULL;
    q3n_error err = { Q3N_OK, -1, "" };
    const q3n_engine_options one = { .size = sizeof one, .n_threads = 1 };
    const q3n_session_options o = { .size = sizeof o, .capacity = 8, .engine_options = &one };
    const int32_t id = 1;
    float logits[64], ones[64];
    unsigned char codes[16 * 68];
    const q3n_rows rows = { ones, 1, 64, NULL };
    for (int i = 0; i < 64; i++) ones[i] = 1.0f;
    if (make_model(&m, &err) || q3n_model_verify(m, NULL, &err)
        || q3n_session_create(&s, m, &o, &err) || q3n_session_eval(s, &id, 1, logits)
        || q3n_quantize_rows(Q3N_TYPE_Q8, &rows, codes, sizeof codes, &err)) {
        fprintf(stderr, "%s\n", s ? q3n_session_error(s)->message : err.message);
        return 1;
    }
    /* Scale 1/127 in f16, then level 127. */
    printf("%02x%02x %d\n", codes[1], codes[0], codes[64] - 128);
    q3n_session_destroy(s);
    q3n_model_close(m);
    return 0;
}
