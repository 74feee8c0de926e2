/* Evaluates a golden prompt greedily from memory, with two threads if there are any, and prints the
 * ids.  Uses no part of the library that a build macro removes.
 *
 * usage: build_golden MODEL.q3n; compiled with -DPROMPT=1,2,3 */
#include "qwen3next.h"
#include "qwen3next.h"
#include <stdio.h>
#include <stdlib.h>

static _Alignas(64) unsigned char data[1 << 22];

int main(int argc, char **argv)
{
    FILE *f = argc > 1 ? fopen(argv[1], "rb") : NULL;
    const size_t n = f ? fread(data, 1, sizeof data, f) : 0;
    if (f) fclose(f);
    q3n_model *m = NULL;
    q3n_session *s = NULL;
    q3n_sampler *sampler = NULL;
    q3n_error err = { 0 };
    const q3n_engine_options two = { .size = sizeof two, .n_threads = 2 };
    q3n_session_options o = { .size = sizeof o, .capacity = 64, .engine_options = &two };
    q3n_sampler_options greedy = Q3N_INIT(q3n_sampler_options);
    if (q3n_model_open_memory(&m, data, n, NULL, &err)
        || q3n_session_create(&s, m, &o, &err)
        || q3n_sampler_create(&sampler, m, &greedy, &err)) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    int32_t id = 0;
    const int32_t prompt[] = { PROMPT };
    const int n_prompt = (int)(sizeof prompt / sizeof *prompt);
    float *logits = (float *)malloc((size_t)q3n_model_config(m)->vocab_size * sizeof *logits);
    if (!logits || q3n_session_eval(s, prompt, n_prompt, logits)) return 1;
    for (int i = 0; i < 8; i++) {
        if (q3n_sampler_sample(sampler, logits, &id)) return 1;
        printf("%d ", (int)id);
        if (q3n_session_eval(s, &id, 1, logits)) return 1;
    }
    printf("\n");
    free(logits);
    q3n_sampler_destroy(sampler);
    q3n_session_destroy(s);
    q3n_model_close(m);
    return 0;
}
