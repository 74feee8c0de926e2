/* The smallest useful host program: opens a model, continues a prompt, prints the text as it comes.
 *
 *     make && build/embed build/models/stories.q3n "Once upon a time" [TEMPERATURE]
 *
 * The library is compiled into this file: nothing is linked but -lm and -lpthread. */
#define Q3N_IMPLEMENTATION
#include "../qwen3next.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "embed: %s: %s\n", what, why);
    return 1;
}

int main(int argc, char **argv)
{
    if (argc < 3) return fail("usage", "embed MODEL.q3n PROMPT [TEMPERATURE]");
    q3n_error err = { 0 };
    q3n_model *model = NULL;
    q3n_session *session = NULL;
    q3n_session_options options = { .size = sizeof options, .capacity = 1024 };
    q3n_sampler_options sampling = { .size = sizeof sampling, .top_p = 0.95f, .seed = 1,
                                     .temperature = argc > 3 ? (float)atof(argv[3]) : 0.8f };
    if (q3n_model_open(&model, argv[1], NULL, &err)
        || q3n_session_create(&session, model, &options, &err))
        return fail(argv[1], err.message);
    if (q3n_session_set_sampler(session, &sampling))
        return fail("sampler", q3n_session_error(session)->message);

    int32_t ids[1024];
    size_t n = 0;
    q3n_result r = q3n_tokenize(model, argv[2], strlen(argv[2]), Q3N_TOKENIZE_PREFIX, ids, 512, &n);
    if (r || n == 0) return fail("prompt", n ? q3n_result_string(r) : "empty");

    float *logits = malloc((size_t)q3n_model_vocab_size(model) * sizeof *logits);
    if (!logits) return fail("logits", "out of memory");
    q3n_detokenizer decoder = { .skip_special = 1 };
    char text[1024];
    int32_t id = 0;
    r = q3n_session_eval(session, ids, (int)n, logits);
    if (!r) r = q3n_sampler_sample(q3n_session_sampler(session), logits, &id);
    for (int i = 0, n_chosen; i < 200 && !r && !q3n_model_is_eos(model, id); i++) {
        r = q3n_detokenizer_next(&decoder, model, id, text, sizeof text, &n);
        if (!r) fwrite(text, 1, n, stdout);
        fflush(stdout);
        if (!r) r = q3n_session_decode(session, id, &id, 1, &n_chosen);
    }
    q3n_detokenizer_finish(&decoder, text, &n);
    printf("%.*s\n", (int)n, text);
    if (r) fail("evaluation", q3n_session_error(session)->message);
    free(logits);
    q3n_session_destroy(session);
    q3n_model_close(model);
    return r != 0;
}
