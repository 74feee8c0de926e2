/* Opens whatever bytes it is given; a model that opens is looked through, tokenizes and evaluates.
 *
 *     make fuzz                          libFuzzer, for FUZZ_SECONDS
 *     build/tests/replay_loader FILE...  every file as it is, cut off and with bytes changed
 *
 * The memory given to the library ends with the data, so that a sanitizer sees every byte too far.
 */
#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "engines.h"
#include "fuzz.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A session larger than this is not made: the fuzzer would look for large ones. */
#define MOST_SESSION_BYTES ((size_t)16 << 20)
/* Multiply-adds of one token, roughly: a hostile geometry may name one tensor for many layers. */
#define MOST_WEIGHTS 4000000

static void look_through(const q3n_model *m)
{
    size_t n_bytes = 0;
    volatile size_t sum = 0;
    for (int i = 0; i < q3n_model_n_tensors(m); i++) {
        const q3n_tensor *t = q3n_model_tensor(m, i);
        require(t != NULL, "a tensor of the table is not there");
        const q3n_tensor *found = q3n_model_find_tensor(m, t->name);
        require(found != NULL, "a name is not found");
        n_bytes += (size_t)t->bytes;
    }
    for (int32_t id = -1; id <= q3n_model_n_tokens(m) && id < 4096; id++) {
        const char *text = q3n_token_text(m, id, &n_bytes);
        for (size_t i = 0; text && i < n_bytes; i++) sum += (unsigned char)text[i];
        sum += (size_t)q3n_token_is_special(m, id);
    }
    int n_eos = 0;
    const int32_t *eos = q3n_model_eos_ids(m, &n_eos);
    for (int i = 0; i < n_eos; i++) require(q3n_model_is_eos(m, eos[i]), "an EOS id is none");
    sum += strlen(q3n_model_name(m)) + strlen(q3n_model_chat_kind(m));
    for (int i = 0; q3n_model_label(m, i); i++) sum += strlen(q3n_model_label(m, i));
    q3n_error err;
    q3n_model_verify(m, NULL, &err);    /* right or wrong, all bytes of the tensors are read */
}

static void tokenize(const q3n_model *m)
{
    static const char text[] = "hello the <|end|> <think>\xc3\xa9 e\xcc\x81 \xff 123\r\n\n  it's";
    int32_t ids[sizeof text + 32];      /* and 16 ids before and after it */
    char back[4096];
    size_t n = 0, n_back = 0;
    if (q3n_tokenize(m, text, sizeof text - 1, Q3N_TOKENIZE_WHOLE, ids, sizeof ids / sizeof ids[0],
                     &n) != Q3N_OK) return;
    require(n <= sizeof text + 32, "more ids than bytes");
    for (size_t i = 0; i < n; i++)
        require(ids[i] >= 0 && ids[i] < q3n_model_config(m)->vocab_size, "an id beyond vocab_size");
    q3n_detokenize(m, ids, n, back, sizeof back, &n_back);
}

static void evaluate(const q3n_model *m)
{
    q3n_session_options o = { .size = sizeof o,
                              .capacity = 4, .count_experts = 1,
                              .engine_options = OWN_ENGINE(.batch_size = 2, .n_threads = 1) };
    q3n_model_stats stats = Q3N_INIT(q3n_model_stats);
    q3n_model_stats_get(m, &stats);
    const size_t bytes = q3n_session_bytes(m, &o, NULL);
    if (bytes == 0 || bytes > MOST_SESSION_BYTES || stats.n_weights_active > MOST_WEIGHTS) return;

    q3n_session *s = NULL;
    q3n_error err;
    if (q3n_session_create(&s, m, &o, &err) != Q3N_OK) return;
    const q3n_config *c = q3n_model_config(m);
    float *logits = malloc((size_t)c->vocab_size * sizeof *logits);
    require(logits != NULL, "out of memory");
    const int32_t tokens[2] = { 0, c->vocab_size - 1 };
    if (q3n_session_eval(s, tokens, 2, logits) == Q3N_OK) {
        require(q3n_session_length(s) == 2, "two tokens make another length");
        q3n_session_eval(s, tokens + 1, 1, logits);
    }
    if (c->num_labels > 0 && c->num_labels <= 1024) {
        float scores[1024];
        if (q3n_session_classify(s, tokens, 2, scores) == Q3N_OK)
            require(q3n_model_probabilities(m, scores, scores) == Q3N_OK, "scores mean nothing");
    }
    free(logits);
    q3n_session_destroy(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    void *copy = NULL;
    if (posix_memalign(&copy, 64, bytes ? bytes : 1) != 0) return 0;
    memcpy(copy, data, bytes);

    const q3n_model_options o = { .size = sizeof o, .skip_checksum = 1 };
    q3n_model *m = NULL;
    q3n_error err = { .code = Q3N_OK };
    const q3n_result r = q3n_model_open_memory(&m, copy, bytes, &o, &err);
    require((r == Q3N_OK) == (m != NULL), "result and model disagree");
    if (m) {
        look_through(m);
        tokenize(m);
        evaluate(m);
        q3n_model_close(m);
    } else {
        check_error(&err, r);
        require(err.offset >= -1 && err.offset <= (int64_t)bytes, "an offset outside the file");
    }
    free(copy);
    return 0;
}

#ifdef Q3N_FUZZ_REPLAY

/* Change some bytes of the metadata, mostly by little and mostly in place of other numbers. */
static void mutate(uint8_t *data, size_t n, uint32_t *state)
{
    static const uint8_t favourites[] = { 0x00, 0x01, 0x7f, 0x80, 0xff, 0x40 };
    const uint32_t changes = 1 + next_random(state) % 4;
    for (uint32_t i = 0; i < changes; i++) {
        const size_t at = next_random(state) % n;
        uint8_t *p = data + at;
        const uint32_t kind = next_random(state) % 4;
        if (kind == 0)      *p ^= (uint8_t)(1u << next_random(state) % 8);
        else if (kind == 1) *p = favourites[next_random(state) % sizeof favourites];
        else if (kind == 2) *p = (uint8_t)next_random(state);
        else                memset(p, 0xff, n - at < 8 ? n - at : 8);
    }
}

static void replay(const uint8_t *data, size_t bytes)
{
    uint8_t *copy = malloc(bytes + 1);
    require(copy != NULL, "out of memory");
    LLVMFuzzerTestOneInput(data, bytes);
    for (size_t cut = 0; cut < bytes && cut < 4096; cut += 61) LLVMFuzzerTestOneInput(data, cut);
    uint64_t meta = 0;      /* header and sections: the tensors after them are only numbers */
    if (bytes >= 64) memcpy(&meta, data + 24, sizeof meta);
    if (meta == 0 || meta > bytes) meta = bytes;
    uint32_t state = 1;
    for (int i = 0; meta > 0 && i < 1000; i++) {
        memcpy(copy, data, bytes);
        mutate(copy, (size_t)meta, &state);
        LLVMFuzzerTestOneInput(copy, bytes);
    }
    free(copy);
}

int main(int argc, char **argv) { return replay_files(argc, argv, replay); }

#endif
