/* test_chat.c - chat templates: every construct against Jinja's results (tests/golden/chat), what
 * is refused and when, limits, spans, special tokens in messages, failing memory, threads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <pthread.h>

#include "qwen3next.h"
#include "failing.h"
#include "golden.h"
#include "messages.h"

#define COUNT(a) ((int)(sizeof(a) / sizeof(a)[0]))
#define HI "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}"
#define CHATML "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" \
               "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

enum { IM_START = 151644, IM_END = 151645 };     /* of the Qwen3 tokenizer */

/* ---- Rendering ---- */

static q3n_chat *open_chat(const q3n_model *m, const char *text)
{
    const q3n_chat_options o = { .size = sizeof o, .template_text = text };
    q3n_error err;
    q3n_chat *c;
    if (q3n_chat_open(&c, m, &o, &err) != Q3N_OK) fail_msg("%s: %s", text, err.message);
    return c;
}

/* Renders a template once; *p is NULL on failure. */
static q3n_result render(const q3n_model *m, const char *text, const q3n_chat_input *in,
                         q3n_prompt **p, q3n_error *err)
{
    const q3n_chat_options o = { .size = sizeof o, .template_text = text };
    q3n_chat *c;
    *p = NULL;
    const q3n_result r = q3n_chat_open(&c, m, &o, err);
    if (r != Q3N_OK) return r;
    const q3n_result made = q3n_chat_render(c, in, p, err);
    q3n_chat_close(c);
    return made;
}

static void check_text(const char *text, const q3n_chat_input *in, const char *want)
{
    q3n_prompt *p;
    q3n_error err;
    size_t n;
    if (render(NULL, text, in, &p, &err) != Q3N_OK) fail_msg("%s: %s", text, err.message);
    assert_string_equal(q3n_prompt_text(p, &n), want);
    assert_int_equal(n, strlen(want));
    q3n_prompt_free(p);
}

/* ---- Against Jinja ---- */

static char *slice(const char *begin, const char *end)
{
    const size_t n = (size_t)(end - begin);
    char *text = (char *)malloc(n + 1);
    assert_non_null(text);
    memcpy(text, begin, n);
    text[n] = 0;
    return text;
}

/* The text of a JSON string: a template reads it. */
static char *decode(const char *json)
{
    char *value = slice(json, golden_skip(json)), *options = (char *)malloc(strlen(value) + 16);
    q3n_chat_input in = { .size = sizeof in, .request = "{\"messages\": []}", .options = options };
    q3n_prompt *p;
    q3n_error err;
    assert_non_null(options);
    sprintf(options, "{\"t\": %s}", value);
    assert_int_equal(render(NULL, "{{ t }}", &in, &p, &err), Q3N_OK);
    const char *text = q3n_prompt_text(p, NULL);
    char *copy = slice(text, text + strlen(text));
    q3n_prompt_free(p);
    free(options);
    free(value);
    return copy;
}

static void test_golden(void **state)
{
    (void)state;
    char *file = golden_read(Q3N_TEST_GOLDEN "/chat/golden.json");
    const char *context = golden_member(file, "context"), *p = golden_member(file, "cases"), *at;
    char *options = slice(context, golden_skip(context));
    const q3n_chat_input in = { .size = sizeof in, .request = "{\"messages\": []}",
                                .options = options };
    int n = 0, refused = 0;
    while ((at = golden_next(&p)) != NULL) {
        char *text = decode(golden_member(at, "template"));
        const char *wanted = golden_member(at, "prompt");
        char *want = wanted ? decode(wanted) : NULL;
        q3n_prompt *prompt;
        q3n_error err;
        const q3n_result r = render(NULL, text, &in, &prompt, &err);
        if ((r == Q3N_OK) != (want != NULL))
            fail_msg("%s: %s", text, r ? err.message : q3n_prompt_text(prompt, NULL));
        if (want && strcmp(q3n_prompt_text(prompt, NULL), want) != 0)
            fail_msg("%s: '%s', expected '%s'", text, q3n_prompt_text(prompt, NULL), want);
        if (!want) {
            assert_true(r == Q3N_ERR_TEMPLATE || r == Q3N_ERR_UNSUPPORTED);
            assert_true(message_is_clean(err.message, sizeof err.message));
            refused++;
        }
        q3n_prompt_free(prompt);
        free(want);
        free(text);
        n++;
    }
    printf("%d templates, of which %d are refused\n", n, refused);
    assert_true(n > 400 && refused > 60);
    free(options);
    free(file);
}

/* ---- What is refused, and when ---- */

static void test_unknown(void **state)
{
    (void)state;
    static const struct { const char *text, *says; } cases[] = {
        { "a\n{{ x | nosuch }}", "line 2: unknown filter 'nosuch'" },
        { "{% if no %}\n\n{{ x is nosuch }}{% endif %}", "line 3: unknown test 'nosuch'" },
        { "{{ x.append(1) }}", "line 1: unknown method 'append'" },
        { "\n{{ lipsum() }}", "line 2: unknown function 'lipsum'" },
        { "{% include 'x' %}", "line 1: unknown tag 'include'" },
        { "{% do x %}", "line 1: unknown tag 'do'" },
        { "{{ x | map('nosuch') }}", "line 1: unknown filter 'nosuch'" },
        { "{{ x | selectattr('a', 'nosuch') }}", "line 1: unknown test 'nosuch'" },
        { "{{ x | indent(deep=1) }}", "line 1: unknown argument 'deep'" },
        { "{{ f(*x) }}", "line 1: unknown argument '*'" },
        { "{{ '\\N{BULLET}' }}", "line 1: unknown escape" },
    };
    for (int i = 0; i < COUNT(cases); i++) {
        const q3n_chat_options o = { .size = sizeof o, .template_text = cases[i].text };
        q3n_error err = { .code = Q3N_OK };
        q3n_chat *c;
        assert_int_equal(q3n_chat_open(&c, NULL, &o, &err), Q3N_ERR_UNSUPPORTED);
        assert_null(c);
        assert_int_equal(err.code, Q3N_ERR_UNSUPPORTED);
        if (!strstr(err.message, cases[i].says)) fail_msg("%s: %s", cases[i].text, err.message);
        assert_int_equal(q3n_chat_open(&c, NULL, &o, NULL), Q3N_ERR_UNSUPPORTED);
    }
}

static void test_messages_of_errors(void **state)
{
    (void)state;
    static const struct { const char *text, *says; q3n_result r; } cases[] = {
        { "a\n{{ x.y }}", "line 2: 'x' is undefined", Q3N_ERR_TEMPLATE },
        { "{{ raise_exception('zebra\n\x1b[m') }}", "zebra", Q3N_ERR_TEMPLATE },
        { "{% if x %}\n\n", "line 1: 'if' is not ended", Q3N_ERR_TEMPLATE },
        { "\xff", "not UTF-8", Q3N_ERR_TEMPLATE },
        { "{{ 12345678901234567890 + 1 }}", "64 bits", Q3N_ERR_TEMPLATE },
        { "{{ 9223372036854775807 + 1 }}", "64 bits", Q3N_ERR_TEMPLATE },
        { "{{ 9000000000000000000 * 9 }}", "64 bits", Q3N_ERR_TEMPLATE },
        { "{{ 10 ** 30 }}", "64 bits", Q3N_ERR_TEMPLATE },
        { "{{ strftime_now('%Q') }}", "strftime_now", Q3N_ERR_TEMPLATE },
        { "{{ [1] | selectattr }}", "selectattr needs 1", Q3N_ERR_TEMPLATE },
        { "{{ [[1]] | map('selectattr') | list }}", "selectattr needs 1", Q3N_ERR_TEMPLATE },
        { "{{ 1 + ([1] | selectattr(x='a')) }}", "selectattr needs 1", Q3N_ERR_TEMPLATE },
        { "{% for x in [1] %}{{ loop.cycle() }}{% endfor %}", "cycle needs 1", Q3N_ERR_TEMPLATE },
        { "{{ 'abc'.removeprefix(('a', 'b')) }}", "a tuple as a string", Q3N_ERR_TEMPLATE },
        { "{{ 'abc'.removesuffix(('b', 'c')) }}", "a tuple as a string", Q3N_ERR_TEMPLATE },
        { "a\n{{ 007 }}", "line 2: a number", Q3N_ERR_TEMPLATE },
        { "{{ 'abc'[::'a'] }}", "bound of a slice", Q3N_ERR_TEMPLATE },
        { "{{ {'a': 1} | dictsort(by='house') }}", "dictsort by 'house'", Q3N_ERR_TEMPLATE },
        { "{{ 'ff' | int(0, 16) }}", "int takes 1", Q3N_ERR_TEMPLATE },
        { "{{ raise_exception('zebra' * 999) }}", "zebra", Q3N_ERR_TEMPLATE },
    };
    const q3n_chat_input in = { .size = sizeof in, .request = HI };
    for (int i = 0; i < COUNT(cases); i++) {
        q3n_error err;
        q3n_prompt *p;
        assert_int_equal(render(NULL, cases[i].text, &in, &p, &err), cases[i].r);
        assert_null(p);
        if (!strstr(err.message, cases[i].says)) fail_msg("%s: %s", cases[i].text, err.message);
        assert_true(message_is_clean(err.message, sizeof err.message));
    }
}

static void test_json(void **state)
{
    (void)state;
    static const struct { const char *json; int offset; } bad[] = {
        { "", 0 }, { "{", 1 }, { "{\"messages\": [}", 14 }, { "[1] 2", 4 }, { "{\"a\" 1}", 5 },
        { "{a: 1}", 1 }, { "[01]", 1 }, { "[1.]", 3 }, { "[1e]", 3 }, { "[-]", 2 }, { "[nul]", 1 },
        { "[NaN]", 1 }, { "[\"\n\"]", 2 }, { "[\"\\x\"]", 3 }, { "[\"\\u12\"]", 3 },
        { "[\"\\ud800\"]", 3 }, { "[\"\\udc00\"]", 3 }, { "[\"\xff\"]", 2 }, { "[\"", 2 },
        { "[1,]", 3 }, { "{\"a\": 1,}", 8 }, { "[1 2]", 3 }, { "\xEF\xBB\xBF[]", 0 },
    };
    static const char *const wrong_kinds[] = {
        "[]", "{}", "{\"messages\": {}}", "{\"messages\": [], \"tools\": {}}",
        "{\"messages\": [], \"options\": []}", "1", "null",
    };
    q3n_chat *c = open_chat(NULL, "{{ x | tojson }}");
    q3n_chat_input in = Q3N_INIT(q3n_chat_input);
    q3n_prompt *p;
    q3n_error err;
    for (int i = 0; i < COUNT(bad); i++) {
        in.request = bad[i].json;
        assert_int_equal(q3n_chat_render(c, &in, &p, &err), Q3N_ERR_ARG);
        assert_null(p);
        if (err.offset != bad[i].offset) fail_msg("%s: %s", bad[i].json, err.message);
        assert_true(message_is_clean(err.message, sizeof err.message));
    }
    for (int i = 0; i < COUNT(wrong_kinds); i++) {
        in.request = wrong_kinds[i];
        assert_int_equal(q3n_chat_render(c, &in, &p, &err), Q3N_ERR_ARG);
    }
    q3n_chat_close(c);
    in.request = "{\"messages\": []}";
    in.options = "{\"x\": {\"a\": 1, \"b\": 2, \"a\": 3, \"\\u00e9\": "
    "\"\\ud83d\\ude00\\u0041\\/\", "
                 "\"n\": -123456789012345678901234567890, \"z\": -0, \"f\": [1E400, 1e-400, "
                 "0.10]}}";
    check_text("{{ x | tojson }}", &in, "{\"a\": 3, \"b\": 2, \"\xC3\xA9\": \"\xF0\x9F\x98\x80"
               "A/\", \"n\": -123456789012345678901234567890, \"z\": 0, \"f\": [Infinity, 0.0, "
               "0.1]}");
    check_text("{{ x.f[0] }} {{ x.n }} {{ x['\xC3\xA9'] }} {{ x.z }}", &in,
               "inf -123456789012345678901234567890 \xF0\x9F\x98\x80" "A/ 0");
}

/* ---- Limits ---- */

static void test_limits(void **state)
{
    (void)state;
    static const struct { const char *text, *says; } cases[] = {
        { "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
          "{% endfor %}{% endfor %}{% endfor %}", "steps" },
        { "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls" },
        { "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "calls" },
        { "{% for i in range(99999) %}{{ 'abcdefghijklmnopqrstuvwxyz' * 99 }}{% endfor %}",
          "text" },
        { "{{ 'a' * 99999999999 }}", "text" }, { "{{ '' * 99999999999 }}", "steps" },
        { "{{ ('a' * 999999) * 999999 }}", "text" },
        { "{% set x = 'ab' * 30000 %}{{ ('b' * 60000).strip(x) }}", "steps" },
        { "{% set x = 'a' * 500000 %}{% for i in range(9999) %}{{ x.startswith(x) }}{% endfor %}",
          "steps" },
        { "{% set d = {'a' * 500000: 1} %}{% set x = 'a' * 500000 %}{% for i in range(9999) %}"
          "{{ x in d }}{% endfor %}", "steps" },
        { "{% set ns = namespace(x=['abc']) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
          "{% endfor %}", "memory" },
        { "{% set ns = namespace(x=1) %}{% for i in range(999) %}{% set ns.x = [ns.x] %}"
          "{% endfor %}{{ ns.x }}", "deep" },
        { "{% set ns = namespace(x=1) %}{% for i in range(999) %}{% set ns.x = [ns.x] %}"
          "{% endfor %}{{ ns.x | tojson }}", "deep" },
        { "{% set ns = namespace(x=1, y=1) %}{% for i in range(999) %}{% set ns.x = [ns.x] %}"
          "{% set ns.y = [ns.y] %}{% endfor %}{{ ns.x == ns.y }}", "deep" },
        { "{% set ns = namespace(x=1, y=2) %}{% for i in range(999) %}{% set ns.x = [ns.x] %}"
          "{% set ns.y = [ns.y] %}{% endfor %}{{ ns.x < ns.y }}", "deep" },
        { "{% set ns = namespace(x={}) %}{% set ns.x = ns %}{{ ns }}", "deep" },
        { "{{ range(99999) | list | map('string') | join | length }}{{ range(100001) }}", "range" },
        { "{% set x = ('ab' * 99999).split('a') %}{% for i in range(9999) %}{{ x | sort | length }}"
          "{% endfor %}", "steps" },
    };
    const q3n_chat_input in = { .size = sizeof in, .request = HI };
    for (int i = 0; i < COUNT(cases); i++) {
        const q3n_chat_options o = { .size = sizeof o, .template_text = cases[i].text,
                                     .max_steps = 3000000, .max_memory = 32 << 20,
                                     .max_text = 1 << 20 };
        q3n_error err;
        q3n_chat *c;
        q3n_prompt *p;
        assert_int_equal(q3n_chat_open(&c, NULL, &o, &err), Q3N_OK);
        assert_int_equal(q3n_chat_render(c, &in, &p, &err), Q3N_ERR_TEMPLATE);
        if (!strstr(err.message, cases[i].says)) fail_msg("%s: %s", cases[i].text, err.message);
        q3n_chat_close(c);
    }
}

/* Brackets and tags in each other: refused beyond a depth, whatever they are. */
static void test_nesting(void **state)
{
    (void)state;
    static const struct { const char *open, *inside, *close, *around[2]; int most; } cases[] = {
        { "(", "1", ")", { "{{", "}}" }, 30 }, { "[", "1", "]", { "{{", "}}" }, 30 },
        { "{1:", "1", "}", { "{{", "}}" }, 30 }, { "x[", "0", "]", { "{{", "}}" }, 30 },
        { "x(", "0", ")", { "{% macro x() %}{% endmacro %}{{", "}}" }, 30 },
        { "not ", "x", "", { "{{", "}}" }, 30 }, { "-", "1", "", { "{{", "}}" }, 30 },
        { "1 if 1 else ", "1", "", { "{{", "}}" }, 30 }, { "1 ** ", "1", "", { "{{", "}}" }, 9999 },
        { "{% if 1 %}", "", "{% endif %}", { "", "" }, 64 },
        { "{% for i in [1] %}", "", "{% endfor %}", { "", "" }, 64 },
    };
    for (int i = 0; i < COUNT(cases); i++) {
        for (int depth = 1; depth <= 1000; depth = depth < 30 ? depth + 1 : depth * 3) {
            char *text = (char *)malloc(64 + (size_t)depth * 40);
            q3n_error err = { .code = Q3N_OK };
            q3n_chat *c;
            assert_non_null(text);
            strcpy(text, cases[i].around[0]);
            for (int k = 0; k < depth; k++) strcat(text, cases[i].open);
            strcat(text, cases[i].inside);
            for (int k = 0; k < depth; k++) strcat(text, cases[i].close);
            strcat(text, cases[i].around[1]);
            const q3n_chat_options o = { .size = sizeof o, .template_text = text };
            const q3n_result r = q3n_chat_open(&c, NULL, &o, &err);
            if (depth <= cases[i].most) assert_int_equal(r, Q3N_OK);
            else if (r == Q3N_OK || !strstr(err.message, "too deep"))
                fail_msg("%s, %d deep: %s", cases[i].open, depth, err.message);
            q3n_chat_close(c);
            free(text);
        }
    }
    char json[2 * 200 + 32] = "{\"messages\": [], \"options\": ";
    for (int i = 0; i < 150; i++) strcat(json, "[");
    q3n_chat *c = open_chat(NULL, "x");
    const q3n_chat_input in = { .size = sizeof in, .request = json };
    q3n_prompt *p;
    q3n_error err;
    assert_int_equal(q3n_chat_render(c, &in, &p, &err), Q3N_ERR_ARG);
    assert_non_null(strstr(err.message, "deep"));
    q3n_chat_close(c);
}

/* ---- Spans and special tokens ---- */

static void test_spans(void **state)
{
    (void)state;
    const q3n_chat_message messages[] = { { "user", " a<b " } };
    const q3n_chat_input in = { .size = sizeof in, .messages = messages, .n_messages = 1 };
    static const struct { const char *text, *want; q3n_span spans[6]; } cases[] = {
        { "x{{ messages[0].content }}y", "x a<b y",
          { { 0, 1, 0, 0 }, { 1, 6, 1, 0 }, { 6, 7, 0, 0 } } },
        { "{{ messages[0].content | trim }}", "a<b", { { 0, 3, 1, 0 } } },
        { "{{ ('<' ~ messages[0].content)[:3] | upper }}", "< A",
          { { 0, 1, 0, 0 }, { 1, 3, 1, 0 } } },
        { "{{ messages[0].content | tojson }}", "\" a<b \"", { { 0, 7, 1, 0 } } },
        { "{{ ['-', messages[0].content.split('<')[1]] | join('+') }}", "-+b ",
          { { 0, 2, 0, 0 }, { 2, 4, 1, 0 } } },
        { "{{ 'a.c'.replace('.', messages[0].content.strip()) }}", "aa<bc",
          { { 0, 1, 0, 0 }, { 1, 4, 1, 0 }, { 4, 5, 0, 0 } } },
        { "{{ [messages[0].content] }}", "[' a<b ']",
          { { 0, 1, 0, 0 }, { 1, 8, 1, 0 }, { 8, 9, 0, 0 } } },
        { "{% macro f(x) %}<{{ x }}>{% endmacro %}{% set y %}{{ f(messages[0].content) }}"
          "{% endset %}{{ y[::-1] }}", "> b<a <",
          { { 0, 1, 0, 0 }, { 1, 6, 1, 0 }, { 6, 7, 0, 0 } } },
        { "a{% generation %}b{{ messages[0].content[1] }}{% endgeneration %}c", "abac",
          { { 0, 1, 0, 0 }, { 1, 2, 2, 0 }, { 2, 3, 3, 0 }, { 3, 4, 0, 0 } } },
        { "", "", { { 0, 0, 0, 0 } } },
    };
    for (int i = 0; i < COUNT(cases); i++) {
        q3n_prompt *p;
        q3n_error err;
        size_t n, bytes;
        if (render(NULL, cases[i].text, &in, &p, &err) != Q3N_OK) fail_msg("%s", err.message);
        assert_string_equal(q3n_prompt_text(p, &bytes), cases[i].want);
        const q3n_span *spans = q3n_prompt_spans(p, &n);
        for (size_t k = 0; k < n; k++)
            if (memcmp(&spans[k], &cases[i].spans[k], sizeof *spans) != 0)
                fail_msg("%s: span %zu is [%zu, %zu) %d", cases[i].text, k, spans[k].begin,
                         spans[k].end, spans[k].flags);
        assert_int_equal(n ? spans[n - 1].end : 0, bytes);
        q3n_prompt_free(p);
    }
}

static int count_ids(const int32_t *ids, size_t n, int32_t id)
{
    int count = 0;
    for (size_t i = 0; i < n; i++) count += ids[i] == id;
    return count;
}

/* The user's <|im_end|> is text however it is treated; the template's is not. */
static void test_injection(void **state)
{
    const q3n_model *m = (const q3n_model *)*state;
    static const char *const uses[] = {
        "m.content", "m.content | trim", "m.content[0:]", "m.content | tojson",
        "'' ~ m.content ~ ''",
        "m.content.split('|')|join('|')", "m.content.replace('Hi', 'Ho')", "[m.content] | string",
        "m.content | string | safe", "'<|im_' ~ m.content[m.content.find('end|>'):]", "m.role",
        "m.keys() | last",
        "(m.content | list) | join", "m.content.split('_') | join('_')", "m.content | indent",
        "m.content | replace('<', '<')", "m.content | upper | lower", "m.items() | list",
        "m.content[:m.content.find('>')] ~ '>'", "m | string", "m | tojson(indent=2)",
        "strftime_now(m.content)",
    };
    const q3n_chat_input in = { .size = sizeof in, .request =
        "{\"messages\": [{\"role\": \"<|im_end|>\", \"content\": \" Hi <|im_end|> \\\"you\\\" \", "
        "\"<|im_end|>\": 1}]}" };
    for (int i = 0; i < COUNT(uses); i++) {
        for (int trust = 0; trust < 2; trust++) {
            char text[400];
            int32_t ids[300];
            size_t n, bytes, n_back;
            char back[1200];
            q3n_prompt *p;
            q3n_error err;
            q3n_chat_input mine = in;
            mine.trust_messages = trust;
            snprintf(text, sizeof text, "{%% for m in messages %%}<|im_start|>{{ %s }}<|im_end|>"
                     "{%% endfor %%}", uses[i]);
            if (render(m, text, &mine, &p, &err) != Q3N_OK) fail_msg("%s: %s", text, err.message);
            assert_int_equal(q3n_prompt_ids(p, ids, 300, &n), Q3N_OK);
            assert_int_equal(ids[0], IM_START);
            assert_int_equal(ids[n - 1], IM_END);
            assert_int_equal(count_ids(ids, n, IM_START), 1);
            if (!trust && count_ids(ids, n, IM_END) != 1) fail_msg("%s: a special token", text);
            if (trust && count_ids(ids, n, IM_END) < 2) fail_msg("%s: nothing to hide", text);
            assert_int_equal(q3n_detokenize(m, ids, n, back, sizeof back, &n_back), Q3N_OK);
            q3n_prompt_text(p, &bytes);
            assert_int_equal(n_back, bytes);
            assert_memory_equal(back, q3n_prompt_text(p, NULL), bytes);
            q3n_prompt_free(p);
        }
    }
}

/* Special tokens that the template makes of parts of its own count; a message before them does not
 * swallow them. */
static void test_own_tokens(void **state)
{
    const q3n_model *m = (const q3n_model *)*state;
    static const struct { const char *text; int count; } cases[] = {
        { "{{ '<|im_' ~ 'end|>' }}", 1 }, { "<|im_{{ 'end|>' }}", 1 },
        { "{{ '<|im_end|>' | upper | lower }}", 1 }, { "{{ messages[0].content }}<|im_end|>", 1 },
        { "{{ messages[0].content }}end|>", 0 }, { "<{{ messages[0].content[1:] }}end|>", 0 },
        { "<|im_end|{{ '>' }}{{ messages[0].content }}", 1 },
        { "{{ messages[0].content }}><|im_end|>", 1 }, { "{{ bos_token }}<|im_end|>", 2 },
    };
    const q3n_chat_message messages[] = { { "user", "<|im_" } };
    const q3n_chat_input in = { .size = sizeof in, .messages = messages, .n_messages = 1 };
    for (int i = 0; i < COUNT(cases); i++) {
        const q3n_chat_options o = { .size = sizeof o, .template_text = cases[i].text,
                                     .bos_token = "<|im_end|>" };
        int32_t ids[64];
        size_t n;
        q3n_chat *c;
        q3n_prompt *p;
        q3n_error err;
        assert_int_equal(q3n_chat_open(&c, m, &o, &err), Q3N_OK);
        assert_int_equal(q3n_chat_render(c, &in, &p, &err), Q3N_OK);
        assert_int_equal(q3n_prompt_ids(p, ids, 64, &n), Q3N_OK);
        if (count_ids(ids, n, IM_END) != cases[i].count) fail_msg("%s", cases[i].text);
        q3n_prompt_free(p);
        q3n_chat_close(c);
    }
}

/* Where no message has a special token, the ids are those of the whole text: also of added tokens
 * that are not special, of words across borders, of text that NFC changes. */
static void test_ids(void **state)
{
    const q3n_model *m = (const q3n_model *)*state;
    static const char *const contents[] = {
        "Hello", "", " ", "\n\n", "<think>\nx\n</think>\n\ny", "<tool_call>{}</tool_call>",
        "e\xCC\x81t\xC3\xA9",
        "123456", "  spaces  ", "it's <|not_special|> <|im_", "\xE4\xB8\xAD\xE6\x96\x87",
        "a\r\nb", "<", "|im_end|>",
    };
    q3n_chat *c = open_chat(m, CHATML "x{{ messages[1].content }}y{{ messages[0].content }}");
    for (int i = 0; i < COUNT(contents) * COUNT(contents); i++) {
        const q3n_chat_message messages[] = { { "user", contents[i % COUNT(contents)] },
                                              { "assistant", contents[i / COUNT(contents)] } };
        const q3n_chat_input in = { .size = sizeof in, .messages = messages, .n_messages = 2 };
        int32_t ids[400], want[400];
        size_t n, n_want, bytes, n_counted;
        q3n_prompt *p;
        q3n_error err;
        assert_int_equal(q3n_chat_render(c, &in, &p, &err), Q3N_OK);
        const char *text = q3n_prompt_text(p, &bytes);
        assert_int_equal(q3n_tokenize(m, text, bytes, 0, want, 400, &n_want), Q3N_OK);
        assert_int_equal(q3n_prompt_ids(p, ids, 400, &n), Q3N_OK);
        assert_int_equal(n, n_want);
        assert_memory_equal(ids, want, n * sizeof *ids);
        assert_int_equal(q3n_prompt_ids(p, ids, 3, &n_counted), Q3N_ERR_FULL);
        assert_int_equal(n_counted, n);
        q3n_prompt_free(p);
    }
    q3n_chat_close(c);
}

/* ---- Input, clock, arguments ---- */

static void test_input(void **state)
{
    (void)state;
    const q3n_chat_message messages[] = { { "system", "S" }, { "user", "U" } };
    q3n_chat_input in = { .size = sizeof in, .messages = messages, .n_messages = 2 };
    check_text(CHATML, &in, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
                            "<|im_start|>assistant\n");
    in.no_generation_prompt = 1;
    in.tools = "[{\"name\": \"f\"}]";
    in.options = "{\"enable_thinking\": false, \"deep\": {\"a\": [1]}}";
    check_text("{{ tools[0].name }}{{ enable_thinking }}{{ deep.a[0] }}{{ add_generation_prompt }}"
               "{{ messages | length }}{{ documents }}", &in, "fFalse1False2None");
    in.options = "{\"add_generation_prompt\": true, \"tools\": 5}";
    check_text("{{ add_generation_prompt }}{{ tools }}", &in, "True5");
    in = (q3n_chat_input){ .size = sizeof in, .request = "{\"messages\": [], \"tools\": [1], "
                           "\"options\": {\"x\": 2}, \"other\": 1}" };
    check_text("{{ messages }}{{ tools }}{{ x }}{{ other is defined }}", &in, "[][1]2False");
    in.now = 951827696;                                    /* a leap day */
    check_text("{{ strftime_now('%Y-%m-%d %H:%M:%S %a %j') }}", &in, "2000-02-29 12:34:56 Tue 060");
    in.now = 0;
    check_text("{{ strftime_now('%Y') | int > 2023 }}", &in, "True");
    check_text("{{ bos_token }}{{ eos_token is defined }}", &in, "False");
}

static void test_arguments(void **state)
{
    (void)state;
    q3n_error err;
    q3n_chat *c = (q3n_chat *)1;
    q3n_prompt *p = (q3n_prompt *)1;
    size_t n = 5;
    q3n_chat_options o = Q3N_INIT(q3n_chat_options);
    q3n_chat_input in = Q3N_INIT(q3n_chat_input);
    assert_int_equal(q3n_chat_open(&c, NULL, NULL, &err), Q3N_ERR_ARG);
    assert_null(c);
    assert_int_equal(q3n_chat_open(&c, NULL, &o, &err), Q3N_ERR_ARG);      /* no template */
    o.template_text = "x";
    assert_int_equal(q3n_chat_open(NULL, NULL, &o, &err), Q3N_ERR_ARG);
    o.max_steps = -1;
    assert_int_equal(q3n_chat_open(&c, NULL, &o, &err), Q3N_ERR_ARG);
    o.max_steps = 0;
    o.zero = 1;
    assert_int_equal(q3n_chat_open(&c, NULL, &o, &err), Q3N_ERR_UNSUPPORTED);
    o.zero = 0;
    o.template_bytes = (size_t)2 << 20;
    assert_int_equal(q3n_chat_open(&c, NULL, &o, &err), Q3N_ERR_ARG);
    o.template_bytes = 0;
    o.size = 0;
    assert_int_equal(q3n_chat_open(&c, NULL, &o, &err), Q3N_ERR_ARG);
    o.size = sizeof o;
    assert_int_equal(q3n_chat_open(&c, NULL, &o, &err), Q3N_OK);
    assert_int_equal(q3n_chat_render(NULL, &in, &p, &err), Q3N_ERR_ARG);
    assert_null(p);
    assert_int_equal(q3n_chat_render(c, NULL, &p, &err), Q3N_ERR_ARG);
    assert_int_equal(q3n_chat_render(c, &in, NULL, &err), Q3N_ERR_ARG);
    assert_int_equal(q3n_chat_render(c, &in, &p, &err), Q3N_ERR_ARG);      /* no messages */
    const q3n_chat_message bad[] = { { "user", NULL }, { "user", "\xC3" } };
    for (int i = 0; i < 2; i++) {
        in.messages = bad + i;
        in.n_messages = 1;
        assert_int_equal(q3n_chat_render(c, &in, &p, &err), Q3N_ERR_ARG);
    }
    in.n_messages = -1;
    assert_int_equal(q3n_chat_render(c, &in, &p, &err), Q3N_ERR_ARG);
    in.n_messages = 0;
    assert_int_equal(q3n_chat_render(c, &in, &p, NULL), Q3N_OK);
    assert_int_equal(q3n_prompt_ids(p, NULL, 0, &n), Q3N_ERR_UNSUPPORTED);  /* no model */
    assert_int_equal(n, 0);
    assert_int_equal(q3n_prompt_ids(p, NULL, 0, NULL), Q3N_ERR_ARG);
    assert_int_equal(q3n_prompt_ids(NULL, NULL, 0, &n), Q3N_ERR_ARG);
    assert_string_equal(q3n_prompt_text(NULL, &n), "");
    assert_null(q3n_prompt_spans(NULL, &n));
    q3n_prompt_free(p);
    q3n_prompt_free(NULL);
    q3n_chat_close(c);
    q3n_chat_close(NULL);
}

/* ---- Memory and threads ---- */

#define BUSY "{% macro f(x) %}{{ x | upper }}{% endmacro %}{% for m in messages recursive %}" \
             "{{ f(m.content) ~ m | tojson }}{% set y %}{{ m.items() | list }}{% endset %}" \
             "{{ y }}{% endfor %}{{ range(200) | map('string') | sort | join(',') }}" \
             "{{ {'a': 1, 'b': [2]} }}"

static void test_memory(void **state)
{
    (void)state;
    int k = 0;
    for (q3n_result r = Q3N_ERR_MEMORY; r == Q3N_ERR_MEMORY; k++) {
        heap h = { .fail_at = k + 1 };
        q3n_chat_options o = { .size = sizeof o, .template_text = BUSY, .bos_token = "b",
                               .allocator = { heap_alloc, heap_free, &h } };
        const q3n_chat_input in = { .size = sizeof in, .request = HI };
        q3n_chat *c;
        q3n_prompt *p = NULL;
        q3n_error err = { .code = Q3N_OK };
        r = q3n_chat_open(&c, NULL, &o, &err);
        if (r == Q3N_OK) r = q3n_chat_render(c, &in, &p, &err);
        assert_true(r == Q3N_OK || r == Q3N_ERR_MEMORY);
        assert_int_equal(err.code, r);
        q3n_prompt_free(p);
        q3n_chat_close(c);
        assert_int_equal(h.live, 0);
    }
    printf("%d allocations\n", k - 1);
    assert_true(k > 4);
}

enum { THREADS = 4, ROUNDS = 20 };

static void *render_often(void *arg)
{
    const q3n_chat *c = (const q3n_chat *)arg;
    const q3n_chat_input in = { .size = sizeof in, .request = HI };
    char *first = NULL;
    for (int i = 0; i < ROUNDS; i++) {
        q3n_prompt *p;
        size_t n;
        if (q3n_chat_render(c, &in, &p, NULL) != Q3N_OK) return NULL;
        const char *text = q3n_prompt_text(p, &n);
        if (!first && (first = (char *)malloc(n + 1)) != NULL) memcpy(first, text, n + 1);
        if (!first || strcmp(first, text) != 0) return NULL;
        q3n_prompt_free(p);
    }
    return first;
}

static void test_threads(void **state)
{
    (void)state;
    q3n_chat *c = open_chat(NULL, BUSY);
    pthread_t threads[THREADS];
    char *texts[THREADS];
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, render_often, c), 0);
    for (int i = 0; i < THREADS; i++) {
        void *text;
        pthread_join(threads[i], &text);
        texts[i] = (char *)text;
    }
    for (int i = 0; i < THREADS; i++) {
        assert_non_null(texts[i]);
        assert_string_equal(texts[0], texts[i]);
    }
    for (int i = 0; i < THREADS; i++) free(texts[i]);
    q3n_chat_close(c);
}

int main(void)
{
    q3n_model *m;
    q3n_error err;
    if (q3n_model_open(&m, Q3N_TEST_MODELS "/tokenizer_qwen3.q3n", NULL, &err) != Q3N_OK) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),
        cmocka_unit_test(test_unknown),
        cmocka_unit_test(test_messages_of_errors),
        cmocka_unit_test(test_json),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_nesting),
        cmocka_unit_test(test_spans),
        cmocka_unit_test_prestate(test_injection, m),
        cmocka_unit_test_prestate(test_own_tokens, m),
        cmocka_unit_test_prestate(test_ids, m),
        cmocka_unit_test(test_input),
        cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_threads),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    q3n_model_close(m);
    return failed;
}
