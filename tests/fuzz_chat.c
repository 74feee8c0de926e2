/* Opens whatever template it is given and renders whatever request it is given: the bytes up to the
 * first 0 are the template, those after it the request.
 *
 *     make fuzz                        libFuzzer, for FUZZ_SECONDS
 *     build/tests/replay_chat FILE...  every file as it is, cut off and with bytes changed
 */
#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "fuzz.h"

#include <stdlib.h>
#include <string.h>

static const char plain[] =
    "{\"messages\": [{\"role\": \"user\", \"content\": \"a <|x|>\"}], "
    "\"options\": {\"d\": {\"b\": 2, \"a\": [1, 2.5, null]}, \"words\": [\"x\", \"Y\"]}}";

static void check_prompt(const q3n_prompt *p)
{
    size_t bytes, n, at = 0;
    const char *text = q3n_prompt_text(p, &bytes);
    const q3n_span *spans = q3n_prompt_spans(p, &n);
    for (size_t i = 0; i < n; i++) {
        require(spans[i].begin == at && spans[i].end > at, "spans that do not touch");
        require(spans[i].flags >= 0 && spans[i].flags <= 3, "a span of nowhere");
        at = spans[i].end;
    }
    require(at == bytes && text[bytes] == 0, "spans that do not cover the text");
    for (size_t i = 0, step; i < bytes; i += step) {
        uint32_t c;
        step = (size_t)q3n__utf8_decode((const uint8_t *)text + i, (const uint8_t *)text + bytes,
                                        &c);
        require(step > 0, "text that is not UTF-8");
    }
}

static void render(const q3n_chat *c, const char *request)
{
    const q3n_chat_input in = { .size = sizeof in, .request = request, .now = 86400 };
    q3n_prompt *first = NULL, *second = NULL;
    q3n_error err;
    size_t n, m;
    const q3n_result r = q3n_chat_render(c, &in, &first, &err);
    if (r != Q3N_OK) {
        check_error(&err, r);
        return;
    }
    check_prompt(first);
    require(q3n_chat_render(c, &in, &second, &err) == Q3N_OK, "it renders once only");
    const char *a = q3n_prompt_text(first, &n), *b = q3n_prompt_text(second, &m);
    require(n == m && memcmp(a, b, n) == 0, "it renders in two ways");
    q3n_prompt_free(first);
    q3n_prompt_free(second);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const uint8_t *zero = bytes ? (const uint8_t *)memchr(data, 0, bytes) : NULL;
    const size_t n = zero ? (size_t)(zero - data) : bytes, rest = zero ? bytes - n - 1 : 0;
    char *text = (char *)malloc(n + 1), *request = (char *)malloc(rest + 1);
    q3n_chat_options o = { .size = sizeof o, .template_text = text, .max_steps = 300000,
                           .max_memory = 8 << 20, .max_text = 1 << 20 };
    q3n_error err;
    q3n_chat *c;
    require(text != NULL && request != NULL, "out of memory");
    memcpy(text, data, n);
    text[n] = 0;
    if (rest) memcpy(request, zero + 1, rest);
    request[rest] = 0;
    const q3n_result r = q3n_chat_open(&c, NULL, &o, &err);
    if (r != Q3N_OK) check_error(&err, r);
    if (r == Q3N_OK) render(c, rest ? request : plain);
    if (r == Q3N_OK && rest) render(c, plain);
    q3n_chat_close(c);
    free(text);
    free(request);
    return 0;
}

#ifdef Q3N_FUZZ_REPLAY

/* Bytes changed, doubled or left out, and parts of templates put where they do not belong. */
static void mutate(uint8_t *data, size_t n, uint32_t *state)
{
    static const char *const parts[] = {
        "{{", "}}", "{%", "%}", "-%}", "{#", "#}", "(", ")", "[", "]", "{", "}", "|", ".", ",",
        "\\", "'", " if ", " else ", " in ", " not ", " is ", "loop", "loop(", "[::-1]", "\n",
        "x", "0", "~", "**", "{% endfor %}", "{% for x in d %}", "{% else %}", "{% break %}",
        "{% set x %}", "\xC3\xA9", "\xFF", "|map('", "|selectattr", "|sort", "|join", "|list",
        "|tojson", ".split(", ".removeprefix(", ".startswith(", ".items()", "loop.cycle(",
        "|dictsort(by=", "|int(", "|replace(", "namespace(", "range(9)", "strftime_now(",
    };
    for (uint32_t changes = 1 + next_random(state) % 3; changes > 0; changes--) {
        const size_t at = next_random(state) % n;
        const char *part = parts[next_random(state) % (sizeof parts / sizeof *parts)];
        const size_t len = strlen(part) < n - at ? strlen(part) : n - at;
        const uint32_t kind = next_random(state) % 4;
        if (kind == 0) data[at] ^= (uint8_t)(1u << next_random(state) % 8);
        else if (kind == 1) memcpy(data + at, part, len);
        else if (kind == 2) memmove(data + at, data + at + len, n - at - len);
        else {
            memmove(data + at + len, data + at, n - at - len);
            memcpy(data + at, part, len);
        }
    }
}

static void replay(const uint8_t *data, size_t bytes)
{
    uint8_t *copy = (uint8_t *)malloc(bytes + 1);
    const uint8_t *zero = bytes ? (const uint8_t *)memchr(data, 0, bytes) : NULL;
    const size_t template_bytes = zero ? (size_t)(zero - data) + 1 : bytes;
    uint32_t state = 1;
    require(copy != NULL, "out of memory");
    LLVMFuzzerTestOneInput(data, bytes);
    /* Requests are much alike: they are cut at some places of each file, others in another. */
    for (size_t cut = 0; cut < bytes; cut += cut < template_bytes ? 1 : 1 + template_bytes)
        LLVMFuzzerTestOneInput(data, cut);
    for (int i = 0; bytes > 0 && i < 50; i++) {           /* mostly the template: it comes first */
        memcpy(copy, data, bytes);
        mutate(copy, i % 3 ? template_bytes : bytes, &state);
        LLVMFuzzerTestOneInput(copy, bytes);
    }
    free(copy);
}

int main(int argc, char **argv) { return replay_files(argc, argv, replay); }
#endif
