/* test_tokenizer.c - Unicode classes and NFC, the words of both patterns, merges against a naive
 * rewriting, added tokens, streaming decoding, hostile sections, failing memory, and the two real
 * tokenizers in Q3N_TEST_MODELS. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "steps.h"

#ifndef Q3N_TEST_MODELS
#  define Q3N_TEST_MODELS "build/models"
#endif

#define COUNT(a) (sizeof(a) / sizeof(a)[0])
#define FFFD "\xEF\xBF\xBD"

static uint32_t random_state = 1;

static uint32_t random_below(uint32_t n)
{
    random_state = random_state * 1664525u + 1013904223u;
    return (uint32_t)(((uint64_t)random_state * n) >> 32);
}

/* ---- Memory: counted, and failing on request ---- */
typedef struct {
    size_t live, peak;           /* bytes */
    int    blocks, calls;
    int    fail_at;              /* this call fails (0 = the first), -1 = none */
} memory;

static void *memory_alloc(void *user, size_t bytes)
{
    memory *m = (memory *)user;
    if (m->calls++ == m->fail_at) return NULL;
    m->live += bytes;
    m->blocks++;
    if (m->live > m->peak) m->peak = m->live;
    return malloc(bytes);
}

static void memory_free(void *user, void *p, size_t bytes)
{
    memory *m = (memory *)user;
    m->live -= bytes;
    m->blocks--;
    free(p);
}

/* ---- A section made by hand: token b is the byte b, the others follow ---- */
#define MAX_TOKENS 400
#define MAX_ROWS   64

typedef struct {
    char     text[16384];
    uint32_t offset[MAX_TOKENS + 1], n_tokens;
    uint32_t merge[MAX_ROWS][3], n_merges;
    uint32_t added[MAX_ROWS][2], n_added;
} section;

static uint32_t add_token(section *s, const char *text, size_t bytes)
{
    assert_true(s->n_tokens < MAX_TOKENS);
    const uint32_t start = s->offset[s->n_tokens];
    assert_true(start + bytes <= sizeof s->text);
    if (bytes) memcpy(s->text + start, text, bytes);
    s->offset[++s->n_tokens] = start + (uint32_t)bytes;
    return s->n_tokens - 1;
}

static void begin_section(section *s)
{
    memset(s, 0, sizeof *s);
    for (int b = 0; b < 256; b++) {
        const char c = (char)b;
        add_token(s, &c, 1);
    }
}

static uint32_t find_token(const section *s, const char *text, size_t bytes)
{
    for (uint32_t i = 0; i < s->n_tokens; i++)
        if (s->offset[i + 1] - s->offset[i] == bytes
            && memcmp(s->text + s->offset[i], text, bytes) == 0) return i;
    return UINT32_MAX;
}

/* Merge left + right, in order of rank; the result is made if there is no such token. */
static uint32_t add_merge(section *s, const char *left, const char *right)
{
    char both[64];
    const size_t n = strlen(left), m = strlen(right);
    memcpy(both, left, n);
    memcpy(both + n, right, m);
    uint32_t result = find_token(s, both, n + m);
    if (result == UINT32_MAX) result = add_token(s, both, n + m);
    uint32_t *row = s->merge[s->n_merges++];
    row[0] = find_token(s, left, n);
    row[1] = find_token(s, right, m);
    row[2] = result;
    assert_true(row[0] != UINT32_MAX && row[1] != UINT32_MAX);
    return result;
}

static uint32_t add_added(section *s, const char *text, uint32_t flags)
{
    const uint32_t id = add_token(s, text, strlen(text));
    s->added[s->n_added][0] = id;
    s->added[s->n_added++][1] = flags;
    return id;
}

static void put_u32(uint8_t **p, const uint32_t *v, size_t n)
{
    for (size_t i = 0; i < n; i++, *p += 4)
        for (int b = 0; b < 4; b++) (*p)[b] = (uint8_t)(v[i] >> 8 * b);
}

/* The bytes of the section, in a block of exactly that size. */
static uint8_t *section_bytes(const section *s, size_t *bytes)
{
    const uint32_t head[4] = { s->n_tokens, s->n_merges, s->n_added, 0 };
    const uint32_t text = s->offset[s->n_tokens];
    *bytes = 16 + 4 * (size_t)(s->n_tokens + 1) + 12 * (size_t)s->n_merges
           + 8 * (size_t)s->n_added + text;
    uint8_t *all = (uint8_t *)malloc(*bytes), *p = all;
    assert_non_null(all);
    put_u32(&p, head, 4);
    put_u32(&p, s->offset, s->n_tokens + 1);
    put_u32(&p, s->merge[0], 3 * (size_t)s->n_merges);
    put_u32(&p, s->added[0], 2 * (size_t)s->n_added);
    memcpy(p, s->text, text);
    return all;
}

/* ---- A model that is nothing but a tokenizer ---- */
typedef struct {
    q3n_model model;
    uint8_t  *bytes;
    size_t    n_bytes;
    memory    mem;
} fixture;

#define FILE_OFFSET 4096         /* where the section is said to lie in its file */

static q3n_result open_bytes(fixture *f, const uint8_t *bytes, size_t n, q3n__pattern pattern,
                             q3n_error *err)
{
    const q3n__tokenizer_params p = { bytes, n, FILE_OFFSET, 512, pattern, 1 };
    return q3n__tokenizer_open(&f->model.tokenizer, &p, &f->model.allocator, err);
}

static void fixture_init(fixture *f)
{
    memset(f, 0, sizeof *f);
    f->mem.fail_at = -1;
    f->model.allocator = (q3n_allocator){ memory_alloc, memory_free, &f->mem };
}

static void open_section(fixture *f, const section *s, q3n__pattern pattern)
{
    q3n_error err = { Q3N_OK, -1, "" };
    fixture_init(f);
    f->bytes = section_bytes(s, &f->n_bytes);
    if (open_bytes(f, f->bytes, f->n_bytes, pattern, &err) != Q3N_OK) fail_msg("%s", err.message);
}

static void close_section(fixture *f)
{
    q3n__tokenizer_close(f->model.tokenizer, &f->model.allocator);
    assert_int_equal(f->mem.blocks, 0);
    assert_int_equal((int)f->mem.live, 0);
    free(f->bytes);
}

/* Encode and compare; the ids end with -1. */
static void check_ids(const q3n_model *m, const char *text, size_t bytes, int flags,
                      const int32_t *want)
{
    int32_t ids[256];
    size_t n, n_want = 0;
    while (want[n_want] >= 0) n_want++;
    assert_int_equal(q3n_tokenize(m, text, bytes, flags, ids, COUNT(ids), &n), Q3N_OK);
    for (size_t i = 0; i < n && i < n_want; i++)
        if (ids[i] != want[i])
            fail_msg("\"%s\": id %d is %d, expected %d", text, (int)i, (int)ids[i], (int)want[i]);
    if (n != n_want) fail_msg("\"%s\": %d ids, expected %d", text, (int)n, (int)n_want);
}

/* The text must give these ids. */
#define CHECK_IDS(m, text, ...)                                                         \
    check_ids(m, text, sizeof(text) - 1, 0, (const int32_t[]){ __VA_ARGS__, -1 })

/* ---- Unicode ---- */
static q3n__unicode unicode;

static int unicode_setup(void **state)
{
    (void)state;
    q3n__unicode_init(&unicode);
    return 0;
}

/* The numbers of characters are those of Unicode 16.0's DerivedGeneralCategory and PropList. */
static void test_classes(void **state)
{
    (void)state;
    int n[8] = { 0 };
    for (uint32_t cp = 0; cp < 0x110000; cp++) n[q3n__char_props(&unicode, cp) & 7]++;
    assert_int_equal(n[1], 141028);     /* \p{L} */
    assert_int_equal(n[2], 2501);       /* \p{M} */
    assert_int_equal(n[3], 996);        /* \p{Nd}, \p{Nl} */
    assert_int_equal(n[4], 25);         /* White_Space */
    assert_int_equal(n[5], 142);        /* \p{Pc}, Join_Control, symbols that are Alphabetic */
    assert_int_equal(n[6], 915);        /* \p{No} */
    assert_int_equal(n[7], 0);
    const struct { uint32_t cp, number; } one[] = {
        { 'a', 1 }, { '_', 5 }, { '7', 3 }, { ' ', 4 }, { '\t', 4 }, { 0x1C, 0 }, { 0x85, 4 },
        { 0xA0, 4 }, { 0xAA, 1 }, { 0xB2, 6 }, { 0xD7, 0 }, { 0x17F, 1 }, { 0x301, 2 },
        { 0x93E, 2 }, { 0x16EE, 3 }, { 0x200B, 0 }, { 0x200D, 5 }, { 0x2028, 4 },
        { 0x3000, 4 }, { 0x3007, 3 },
        { 0x4E00, 1 }, { 0x9FFF, 1 }, { 0xAC00, 1 }, { 0xD7A3, 1 }, { 0xD7A4, 0 }, { 0xD800, 0 },
        { 0xFE0F, 2 }, { 0xFEFF, 0 }, { 0xFF11, 3 }, { 0x1C89, 1 }, { 0x10D40, 3 },
        { 0x1F600, 0 }, { 0x2A6DF, 1 }, { 0x2A6E0, 0 }, { 0xE0100, 2 }, { 0x10FFFF, 0 } };
    for (size_t i = 0; i < COUNT(one); i++)
        if ((q3n__char_props(&unicode, one[i].cp) & 7) != one[i].number)
            fail_msg("U+%04X is of class %d", (unsigned)one[i].cp,
                     (int)(q3n__char_props(&unicode, one[i].cp) & 7));
}

static void test_utf8(void **state)
{
    (void)state;
    for (uint32_t cp = 0; cp < 0x110000; cp++) {
        uint8_t b[4];
        uint32_t back;
        const int n = q3n__utf8_encode(b, cp);
        const int surrogate = cp >= 0xD800 && cp < 0xE000;
        if (q3n__utf8_decode(b, b + n, &back) != (surrogate ? 0 : n))
            fail_msg("U+%04X", (unsigned)cp);
        if (!surrogate && back != cp) fail_msg("U+%04X", (unsigned)cp);
        if (n > 1 && q3n__utf8_decode(b, b + n - 1, &back) != 0)
            fail_msg("U+%04X cut short", (unsigned)cp);
    }
    static const char *const invalid[] = { "\x80", "\xBF", "\xC0\x80", "\xC1\xBF", "\xE0\x80\x80",
        "\xE0\x9F\xBF", "\xED\xA0\x80", "\xED\xBF\xBF", "\xF0\x80\x80\x80", "\xF0\x8F\xBF\xBF",
        "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF", "\xE4\xB8\x41", "\xF0\x9F\x98\x41" };
    for (size_t i = 0; i < COUNT(invalid); i++) {
        uint32_t cp;
        const uint8_t *p = (const uint8_t *)invalid[i];
        assert_int_equal(q3n__utf8_decode(p, p + strlen(invalid[i]), &cp), 0);
    }
}

static size_t to_nfc(const char *text, size_t bytes, char *out, size_t max)
{
    q3n__normalizer z = q3n__normalizer_begin(&unicode, NULL);
    const uint8_t *p = (const uint8_t *)text;
    assert_true(q3n__append_nfc(&z, p, p + bytes));
    const size_t n = z.out.bytes;
    assert_true(n <= max);
    memcpy(out, z.out.data, n);
    q3n__normalizer_end(&z);
    return n;
}

static void check_nfc(const char *text, const char *want)
{
    char out[512];
    const size_t n = to_nfc(text, strlen(text), out, sizeof out);
    if (n != strlen(want) || memcmp(out, want, n) != 0)
        fail_msg("NFC of \"%s\" is \"%.*s\", expected \"%s\"", text, (int)n, out, want);
    const uint8_t *p = (const uint8_t *)want;       /* and NFC of NFC changes nothing */
    assert_int_equal((int)to_nfc(want, strlen(want), out, sizeof out), (int)strlen(want));
    assert_memory_equal(out, want, strlen(want));
    assert_true(q3n__find_unstable(&unicode, p, p + n) <= p + n);
}

static void test_nfc(void **state)
{
    (void)state;
    check_nfc("plain", "plain");
    check_nfc("e\u0301", "\u00E9");
    check_nfc("\u00E9", "\u00E9");
    check_nfc("xe\u0301y", "x\u00E9y");
    check_nfc("q\u0307\u0323", "q\u0323\u0307");                 /* reordered, nothing to compose */
    check_nfc("e\u0323\u0302", "\u1EC7");                        /* composed twice */
    check_nfc("e\u0302\u0323", "\u1EC7");
    check_nfc("\u00EA\u0323", "\u1EC7");                         /* through decomposition */
    check_nfc("a\u0315\u0301", "\u00E1\u0315");                  /* 232 does not block 230 */
    check_nfc("a\u0316\u0301", "\u00E1\u0316");
    check_nfc("a\u0305\u0301", "a\u0305\u0301");                 /* blocked by an equal class */
    check_nfc("a\u034F\u0301", "a\u034F\u0301");                 /* blocked by a starter */
    check_nfc("A\u030A", "\u00C5");
    check_nfc("\u212B", "\u00C5");                               /* singletons */
    check_nfc("\u2126", "\u03A9");
    check_nfc("\u037E", ";");
    check_nfc("\u0958", "\u0915\u093C");                         /* composition exclusions */
    check_nfc("\u0915\u093C", "\u0915\u093C");
    check_nfc("\u2ADC", "\u2ADD\u0338");
    check_nfc("\uFB1D", "\u05D9\u05B4");
    check_nfc("\u0344", "\u0308\u0301");                         /* does not start with a starter */
    check_nfc("\u0301e\u0301", "\u0301\u00E9");
    check_nfc("\u0301", "\u0301");
    check_nfc("\u1F82", "\u1F82");                               /* four parts */
    check_nfc("\u03B1\u0313\u0300\u0345", "\u1F82");
    check_nfc("\u03B1\u0345\u0313\u0300", "\u1F82");
    check_nfc("\u09C7\u09BE", "\u09CB");                         /* two starters */
    check_nfc("\u304B\u3099", "\u304C");
    check_nfc("\uF900", "\u8C48");
    check_nfc("\U0002F800", "\u4E3D");
    check_nfc("\U0001D15E", "\U0001D157\U0001D165");
    check_nfc("\U00011099\U000110BA", "\U0001109A");
    check_nfc("\u1100\u1161", "\uAC00");                         /* Hangul */
    check_nfc("\u1100\u1161\u11A8", "\uAC01");
    check_nfc("\uAC00\u11A8", "\uAC01");
    check_nfc("\uAC01\u11A8", "\uAC01\u11A8");
    check_nfc("\u1100\u1100\u1161", "\u1100\uAC00");
    check_nfc("\u1112\u1161\u11AB\u1100\u1173\u11AF", "\uD55C\uAE00");
    check_nfc("\uAC00\u11A7", "\uAC00\u11A7");                   /* T begins at 11A8 */
    check_nfc("\u1100\u0301\u1161", "\u1100\u0301\u1161");
    check_nfc("e\xFF\u0301", "e\xFF\u0301");                     /* invalid bytes stay and divide */
    check_nfc("\xE4\xB8" "e\u0301\x80\u0301", "\xE4\xB8\u00E9\x80\u0301");
    /* Encoded after Unicode 9.0: [HFT] neither composes nor reorders them. */
    check_nfc("\U00011935\U00011930", "\U00011935\U00011930");
    check_nfc("a\U00010F48\u0316", "a\U00010F48\u0316");
}

/* Characters that NFC changes: 1120 in Unicode 9.0.  Every 16th of those that are marked stable is
 * tried too. */
static void test_nfc_all(void **state)
{
    (void)state;
    int changed = 0;
    for (uint32_t cp = 0; cp < 0x110000; cp++) {
        if (cp >= 0xD800 && cp < 0xE000) continue;
        char text[4], once[32], twice[32];
        const size_t n = (size_t)q3n__utf8_encode((uint8_t *)text, cp);
        const int unstable = (q3n__char_props(&unicode, cp) & Q3N__UNSTABLE) != 0;
        if (!unstable && (cp < 0xA0 || cp % 16)) continue;
        const size_t m = to_nfc(text, n, once, sizeof once);
        const int same = m == n && memcmp(text, once, n) == 0;
        if (!same && !unstable) fail_msg("U+%04X is marked stable", (unsigned)cp);
        changed += !same;
        assert_int_equal((int)to_nfc(once, m, twice, sizeof twice), (int)m);
        assert_memory_equal(once, twice, m);
    }
    assert_int_equal(changed, 1120);
    for (uint32_t s = 0xAC00; s < 0xD7A4; s += 7) {              /* Hangul apart and together */
        char jamo[9], whole[4], out[16];
        size_t n = (size_t)q3n__utf8_encode((uint8_t *)jamo, 0x1100 + (s - 0xAC00) / 588);
        n += (size_t)q3n__utf8_encode((uint8_t *)jamo + n, 0x1161 + (s - 0xAC00) % 588 / 28);
        if ((s - 0xAC00) % 28)
            n += (size_t)q3n__utf8_encode((uint8_t *)jamo + n, 0x11A7 + (s - 0xAC00) % 28);
        q3n__utf8_encode((uint8_t *)whole, s);
        assert_int_equal((int)to_nfc(jamo, n, out, sizeof out), 3);
        assert_memory_equal(out, whole, 3);
    }
}

/* Runs of marks too long for insertion sort come out in the same order. */
static void test_nfc_long_run(void **state)
{
    (void)state;
    static char text[4001], want[4001], out[4001];
    char *p = text, *below = want, *above;
    *p++ = *below++ = 'q';
    above = below + 2 * 1000;
    for (int i = 0; i < 2000; i++) {
        const int is_above = i % 2 == 0;
        const uint8_t *mark = (const uint8_t *)(is_above ? "\u0305" : "\u0323");   /* 230, 220 */
        memcpy(p, mark, 2);
        memcpy(is_above ? above : below, mark, 2);
        p += 2;
        if (is_above) above += 2;
        else          below += 2;
    }
    assert_int_equal((int)to_nfc(text, sizeof text, out, sizeof out), (int)sizeof want);
    assert_memory_equal(out, want, sizeof want);
}

/* ---- Words ---- */

/* Cut text and compare with words joined by '|' (which the texts do not have). */
static void check_words(q3n__pattern pattern, const char *text, const char *want)
{
    q3n__tokenizer t;
    memset(&t, 0, sizeof t);
    t.unicode = &unicode;
    t.pattern = pattern;
    char got[256];
    size_t n = 0;
    const uint8_t *p = (const uint8_t *)text, *end = p + strlen(text);
    while (p < end) {
        const uint8_t *q = q3n__word_end(&t, p, end);
        assert_true(q > p && q <= end);
        if (n) got[n++] = '|';
        memcpy(got + n, p, (size_t)(q - p));
        n += (size_t)(q - p);
        p = q;
    }
    got[n] = 0;
    if (strcmp(got, want) != 0) fail_msg("\"%s\" gives \"%s\", expected \"%s\"", text, got, want);
}

static void check_words_both(const char *text, const char *want)
{
    check_words(Q3N__PATTERN_QWEN2, text, want);
    check_words(Q3N__PATTERN_QWEN3_5, text, want);
}

static void test_words(void **state)
{
    (void)state;
    check_words_both("Hello world", "Hello| world");
    /* 1: contractions, in any case; a long s is an s; they win over the rules that follow */
    check_words_both("it's don't we're I've I'm he'll she'd",
                     "it|'s| don|'t| we|'re| I|'ve| I|'m| he|'ll| she|'d");
    check_words_both("IT'S WE'RE 'LL'Ve", "IT|'S| WE|'RE| '|LL|'Ve");
    check_words_both("'s'\u017F'\u017Ft", "'s|'\u017F|'\u017F|t");
    check_words_both("'save 'rest 'lx 'r", "'s|ave| '|rest| '|lx| '|r");
    check_words_both("'x'", "'x|'");
    check_words_both("'", "'");
    check_words_both("\u2019s", "\u2019s");
    /* 2: letters with one character before them that is no letter, digit or line end */
    check_words_both("(abc) $x _y", "(abc|)| $|x| _|y");
    check_words_both("\tx\u00A0y", "\tx|\u00A0y");
    check_words_both("\nx\rx", "\n|x|\r|x");
    check_words_both("1a", "1|a");
    check_words_both("..a", "..|a");
    check_words_both("\u4E2D\u6587 \u0416\u0436\u00DF", "\u4E2D\u6587| \u0416\u0436\u00DF");
    check_words_both("\U0001F600a", "\U0001F600a");
    /* 3: digits one by one, whatever script; no blank goes with them */
    check_words_both("123 4", "1|2|3| |4");
    check_words_both("\u0663\u00BD\u216B", "\u0663|\u00BD|\u216B");
    /* 4: the rest, with one blank before and line ends after */
    check_words_both("a, b!!\n\nc", "a|,| b|!!\n\n|c");
    check_words_both(" ...\r\n x", " ...\r\n| x");
    check_words_both("!! ??", "!!| ??");
    check_words_both("\t!!", "\t|!!");
    check_words_both("!\t", "!|\t");
    check_words_both("\U0001F468\u200D\U0001F469", "\U0001F468\u200D\U0001F469");
    /* 5: white space up to its last line end */
    check_words_both("a \n \r\n  b", "a| \n \r\n| | b");
    check_words_both("\n\n\n", "\n\n\n");
    check_words_both("\u2028\n\u3000x", "\u2028\n|\u3000x");
    /* 6, 7: other white space, all but the last if something follows */
    check_words_both("a   b", "a|  | b");
    check_words_both("a   1", "a|  | |1");
    check_words_both("a  ", "a|  ");
    check_words_both("   ", "   ");
    check_words_both(" \t !", " \t| !");
    check_words_both("  \u3000!", "  |\u3000|!");
    /* marks: part of a word only in qwen3_5 */
    check_words(Q3N__PATTERN_QWEN2, "q\u0323x", "q|\u0323x");
    check_words(Q3N__PATTERN_QWEN3_5, "q\u0323x", "q\u0323x");
    check_words(Q3N__PATTERN_QWEN2, " \u0323\u0323", " \u0323\u0323");
    check_words(Q3N__PATTERN_QWEN3_5, " \u0323\u0323", " \u0323\u0323");
    check_words(Q3N__PATTERN_QWEN2, "!\u0323\n", "!\u0323\n");
    check_words(Q3N__PATTERN_QWEN3_5, "!\u0323\n", "!\u0323|\n");
    check_words(Q3N__PATTERN_QWEN3_5, "!!\u0323", "!!|\u0323");
    check_words(Q3N__PATTERN_QWEN2, "!!\u0323", "!!\u0323");
    check_words(Q3N__PATTERN_QWEN2, "\u0915\u093F\u0924", "\u0915|\u093F\u0924");
    check_words(Q3N__PATTERN_QWEN3_5, "\u0915\u093F\u0924", "\u0915\u093F\u0924");
    check_words(Q3N__PATTERN_QWEN3_5, "1\u0323", "1|\u0323");
    check_words(Q3N__PATTERN_QWEN3_5, "\n\u0323", "\n|\u0323");
    /* invalid bytes are neither letters nor digits nor white space */
    check_words_both("a\xFF\xFE b", "a|\xFF\xFE| b");
    check_words_both("\xFFz \x80\n", "\xFFz| \x80\n");
    check_words_both("\xC3 \xED\xA0\x80z", "\xC3| \xED\xA0\x80|z");
}

/* Cutting at a piece's end and cutting on gives the words of the whole. */
static void test_pieces(void **state)
{
    (void)state;
    static const char *const part[] = {
        "a", "Z", " ", " ", "  ", "\n", "\r\n", "\t", "!", "'s", "7", "\u00E9", "\u4E2D", "\u0323",
        "\u3000", "\u2028", "\u2000", "\xFF", "\xE4\xB8", "\U0001F600" };
    static char text[20000];
    q3n__tokenizer t;
    memset(&t, 0, sizeof t);
    t.unicode = &unicode;
    int cuts = 0;
    for (int round = 0; round < 40; round++) {
        size_t n = 0;
        while (n < sizeof text - 8) {
            const char *s = part[random_below(round % 2 ? COUNT(part) : 14)];
            memcpy(text + n, s, strlen(s));
            n += strlen(s);
        }
        t.pattern = round % 4 < 2 ? Q3N__PATTERN_QWEN2 : Q3N__PATTERN_QWEN3_5;
        const uint8_t *p = (const uint8_t *)text, *end = p + n;
        const uint8_t *piece = q3n__text_chunk_end(&unicode, p, end);
        while (p < end) {
            const uint8_t *next = q3n__word_end(&t, p, end);
            assert_ptr_equal(q3n__word_end(&t, p, piece), next);
            p = next;
            if (p < piece || p == end) continue;
            cuts++;
            piece = q3n__text_chunk_end(&unicode, p, end);
        }
    }
    assert_true(cuts > 100);
}

/* ---- Merges ---- */
static void merge_section(section *s)
{
    begin_section(s);
    add_merge(s, "a", "b");
    add_merge(s, "b", "c");
    add_merge(s, "ab", "c");
    add_merge(s, "a", "a");
    add_merge(s, "c", "d");
    add_merge(s, "aa", "aa");
    add_merge(s, "bc", "d");
    add_merge(s, "aa", "b");
    add_merge(s, "d", "abc");
    add_merge(s, "b", "b");
    add_merge(s, "cd", "cd");
    add_merge(s, "aaaa", "aaaa");
}

static void test_merges(void **state)
{
    (void)state;
    section s;
    fixture f;
    merge_section(&s);
    open_section(&f, &s, Q3N__PATTERN_QWEN2);
    const int32_t ab = 256, bc = 257, abc = 258, aa = 259, aaaa = 261, bcd = 262, cdcd = 266;
    assert_int_equal(find_token(&s, "cdcd", 4), cdcd);
    assert_int_equal(q3n_model_n_tokens(&f.model), (int)s.n_tokens);
    CHECK_IDS(&f.model, "a", 'a');
    CHECK_IDS(&f.model, "abc", abc);           /* rank 0 before rank 1 */
    CHECK_IDS(&f.model, "bc", bc);
    CHECK_IDS(&f.model, "bcd", bcd);           /* bc, then bc + d; c + d is of rank 4 */
    CHECK_IDS(&f.model, "abcd", abc, 'd');
    CHECK_IDS(&f.model, "aaa", aa, 'a');       /* leftmost first */
    CHECK_IDS(&f.model, "aaaaa", aaaa, 'a');
    CHECK_IDS(&f.model, "aab", 'a', ab);
    CHECK_IDS(&f.model, "cdcd", cdcd);
    CHECK_IDS(&f.model, "ab ab", ab, ' ', ab);
    CHECK_IDS(&f.model, "a bc", 'a', ' ', bc);
    CHECK_IDS(&f.model, "a1a", 'a', '1', 'a');
    CHECK_IDS(&f.model, "a\0b", 'a', 0, 'b');
    CHECK_IDS(&f.model, "\xFF" "abc", 0xFF, abc);
    size_t n = 1;
    assert_int_equal(q3n_tokenize(&f.model, NULL, 0, 0, NULL, 0, &n), Q3N_OK);
    assert_int_equal((int)n, 0);
    close_section(&f);
}

/* The definition: merge the leftmost pair of least rank until there is none. */
static size_t naive_merge(const section *s, const char *text, size_t n, int32_t *ids)
{
    for (size_t i = 0; i < n; i++) ids[i] = (uint8_t)text[i];
    for (;;) {
        size_t best = n;
        uint32_t best_rank = s->n_merges;
        for (size_t i = 0; i + 1 < n; i++)
            for (uint32_t r = 0; r < best_rank; r++)
                if (s->merge[r][0] == (uint32_t)ids[i] && s->merge[r][1] == (uint32_t)ids[i + 1]) {
                    best = i;
                    best_rank = r;
                }
        if (best == n) return n;
        ids[best] = (int32_t)s->merge[best_rank][2];
        memmove(ids + best + 1, ids + best + 2, (n - best - 2) * sizeof *ids);
        n--;
    }
}

static void test_merges_naive(void **state)
{
    (void)state;
    section s;
    fixture f;
    merge_section(&s);
    open_section(&f, &s, Q3N__PATTERN_QWEN2);
    for (int round = 0; round < 600; round++) {
        char text[300];
        int32_t want[300], got[300];
        const size_t n = round < 300 ? 1 + (size_t)round % 80 : 60 + random_below(240);
        const uint32_t letters = 1 + random_below(4);
        for (size_t i = 0; i < n; i++) text[i] = (char)('a' + random_below(letters));
        const size_t n_want = naive_merge(&s, text, n, want);
        size_t n_got;
        assert_int_equal(q3n_tokenize(&f.model, text, n, 0, got, COUNT(got), &n_got), Q3N_OK);
        assert_int_equal((int)n_got, (int)n_want);
        assert_memory_equal(got, want, n_want * sizeof *want);
    }
    close_section(&f);
}

/* Of two merges of one pair the first counts. */
/* ---- Merges made to be slow ---- */
#define CROWD_TOKENS 4096        /* of one byte each, the last of two */

typedef struct {
    uint32_t (*pair)[2];         /* [n] */
    uint32_t  n, room;
} pairs;

static void add_pair(pairs *p, uint32_t left, uint32_t right)
{
    if (p->n == p->room) return;
    p->pair[p->n][0] = left;
    p->pair[p->n++][1] = right;
}

/* Pairs whose home is one of the first `homes` slots of a table of 2^bits, each home at most
 * `each` times; none of two single bytes, so that every lookup of a text is of an absent pair. */
static void pairs_at(pairs *p, uint32_t bits, uint32_t homes, uint32_t each)
{
    uint8_t *taken = (uint8_t *)calloc(homes, 1);
    assert_non_null(taken);
    for (uint32_t a = 0; a < CROWD_TOKENS - 1; a++)
        for (uint32_t b = 0; b < CROWD_TOKENS - 1 && p->n < p->room; b++) {
            const uint64_t home = q3n__pair_hash(a, b) >> (64 - bits);
            if ((a < 256 && b < 256) || home >= homes || taken[home] == each) continue;
            taken[home]++;
            add_pair(p, a, b);
        }
    free(taken);
}

static uint8_t *crowd_section(const pairs *p, size_t *bytes)
{
    const uint32_t head[4] = { CROWD_TOKENS, p->n, 0, 0 };
    *bytes = 16 + 4 * (CROWD_TOKENS + 1) + 12 * (size_t)p->n + CROWD_TOKENS + 1;
    uint8_t *all = (uint8_t *)malloc(*bytes), *at = all;
    assert_non_null(all);
    put_u32(&at, head, 4);
    for (uint32_t i = 0; i <= CROWD_TOKENS; i++)
        put_u32(&at, (const uint32_t[]){ i + (i == CROWD_TOKENS) }, 1);
    for (uint32_t i = 0; i < p->n; i++) {
        const uint32_t row[3] = { p->pair[i][0], p->pair[i][1], CROWD_TOKENS - 1 };
        put_u32(&at, row, 3);
    }
    for (uint32_t i = 0; i <= CROWD_TOKENS; i++) *at++ = (uint8_t)i;
    return all;
}

static int log2_up(size_t n)
{
    int k = 0;
    while ((size_t)1 << k < n) k++;
    return k;
}

/* Opens merges of these pairs and finds each at its lowest rank; no lookup, of pairs that are there
 * or not, takes more steps than the table promises, and a text at most three lookups a byte. */
static void check_crowd(const pairs *p, const char *what)
{
    fixture f;
    q3n_error err = { Q3N_OK, -1, "" };
    fixture_init(&f);
    f.bytes = crowd_section(p, &f.n_bytes);
    const q3n__tokenizer_params params = { f.bytes, f.n_bytes, FILE_OFFSET, CROWD_TOKENS,
                                           Q3N__PATTERN_QWEN2, 1 };
    const uint64_t lookup = Q3N__MAX_PROBES + (uint64_t)log2_up(p->n + 1) + 1;
    steps = 0;
    if (q3n__tokenizer_open(&f.model.tokenizer, &params, &f.model.allocator, &err) != Q3N_OK)
        fail_msg("%s: %s", what, err.message);
    assert_in_range(steps, p->n, p->n * (Q3N__MAX_PROBES + 2 * lookup));
    const q3n__tokenizer *t = f.model.tokenizer;
    for (uint32_t i = 0; i < p->n; i++) {
        steps = 0;
        const uint32_t rank = q3n__pair_rank(t, p->pair[i][0], p->pair[i][1]);
        assert_in_range(steps, 1, lookup);
        assert_true(rank <= i && p->pair[rank][0] == p->pair[i][0]
                    && p->pair[rank][1] == p->pair[i][1]);
    }
    for (uint32_t a = 0; a < 256; a++)
        for (uint32_t b = 0; b < 256; b++) {
            steps = 0;
            assert_true(q3n__pair_rank(t, a, b) == Q3N__NO_RANK);
            assert_in_range(steps, 1, lookup);
        }
    char text[20000];
    size_t n;
    for (size_t i = 0; i < sizeof text; i++) text[i] = (char)('a' + random_below(26));
    steps = 0;
    assert_int_equal(q3n_tokenize(&f.model, text, sizeof text, 0, NULL, 0, &n), Q3N_ERR_FULL);
    assert_int_equal((int)n, (int)sizeof text);
    assert_in_range(steps, sizeof text - 1, 3 * lookup * sizeof text);
    close_section(&f);
}

static void test_merges_made_slow(void **state)
{
    (void)state;
    enum { BITS = 14, MOST = (1 << BITS) * 2 / 3 };
    static const struct { const char *what; uint32_t n, homes, each; } list[] = {
        { "a run, all at home", MOST, MOST, 1 }, { "one home", 1000, 1, 255 },
        { "few homes", MOST, 64, 250 }, { "a full table", MOST, 1 << BITS, 255 },
        { "three in a home", MOST, MOST / 3, 3 }
    };
    pairs p = { (uint32_t (*)[2])malloc((MOST + 1000) * sizeof(uint32_t[2])), 0, 0 };
    assert_non_null(p.pair);
    for (size_t k = 0; k < COUNT(list); k++) {
        p.n = 0;
        p.room = list[k].n;
        pairs_at(&p, BITS, list[k].homes, list[k].each);
        assert_in_range(p.n, 200, MOST);
        check_crowd(&p, list[k].what);
    }
    p.n = 0;                                            /* each twice: the second is not found */
    p.room = MOST / 2;
    pairs_at(&p, BITS, 64, 250);
    p.room = MOST;
    for (uint32_t i = 0, n = p.n; i < n; i++) add_pair(&p, p.pair[n - 1 - i][0],
                                                       p.pair[n - 1 - i][1]);
    check_crowd(&p, "each twice");
    free(p.pair);
}

/* A lookup in the tables of characters is short, whatever the characters are. */
static void test_character_tables(void **state)
{
    (void)state;
    const uint16_t *tables[2] = { unicode.by_composed, unicode.by_parts };
    for (int k = 0; k < 2; k++)
        for (uint32_t i = 0, run = 0; i < 2 * Q3N__HASH_SIZE; i++) {
            run = tables[k][i % Q3N__HASH_SIZE] ? run + 1 : 0;
            assert_in_range(run, 0, 64);
        }
    for (uint32_t page = 1; page < 0x1100; page++) {
        uint32_t n = 0;
        uint32_t i = unicode.first_span[page];
        for (; unicode.span[i + 1] >> 10 <= (page << 8 | 255); i++) n++;
        assert_in_range(n, 0, 128);
    }
}

static void test_merges_repeated(void **state)
{
    (void)state;
    section s;
    fixture f;
    begin_section(&s);
    add_merge(&s, "a", "b");
    add_merge(&s, "b", "c");
    add_merge(&s, "a", "b");
    s.merge[2][2] = add_token(&s, "zz", 2);
    open_section(&f, &s, Q3N__PATTERN_QWEN2);
    CHECK_IDS(&f.model, "abc", 256, 'c');
    close_section(&f);
}

/* The tokens' bytes are the text's, whatever bytes these are.  No character that the bytes can make
 * is one that NFC changes. */
static void test_any_bytes(void **state)
{
    (void)state;
    static const char byte[] = "aab\n '\x80\xBF\xC3\xA9\xE4\xB8\xAD\xFF\xF0\x9F\x98\xED\xA0\xF4\x90"
                               "\xC0";              /* and the terminator */
    section s;
    fixture f;
    merge_section(&s);
    open_section(&f, &s, Q3N__PATTERN_QWEN3_5);
    for (int round = 0; round < 4000; round++) {
        int32_t ids[200];
        const size_t bytes = 1 + random_below(200);
        char *text = (char *)malloc(bytes);              /* reading beyond it shows */
        assert_non_null(text);
        for (size_t i = 0; i < bytes; i++) text[i] = byte[random_below(sizeof byte)];
        size_t n_ids, n, at = 0;
        assert_int_equal(q3n_tokenize(&f.model, text, bytes, 0, ids, COUNT(ids), &n_ids), Q3N_OK);
        for (size_t i = 0; i < n_ids; i++, at += n) {
            const char *part = q3n_token_text(&f.model, ids[i], &n);
            assert_true(part && n <= bytes - at);
            assert_memory_equal(part, text + at, n);
        }
        assert_int_equal((int)at, (int)bytes);
        free(text);
    }
    close_section(&f);
}

/* ---- Added tokens ---- */
static void test_added(void **state)
{
    (void)state;
    section s;
    fixture f;
    begin_section(&s);
    add_merge(&s, "e", "f");
    const int32_t sp = (int32_t)add_added(&s, "<s>", Q3N__TOKEN_SPECIAL);
    const int32_t longer = (int32_t)add_added(&s, "<s>>", 0);
    const int32_t left = (int32_t)add_added(&s, "<l>", Q3N__TOKEN_LSTRIP);
    const int32_t right = (int32_t)add_added(&s, "<r>", Q3N__TOKEN_RSTRIP);
    const int32_t word = (int32_t)add_added(&s, "word", Q3N__TOKEN_SINGLE_WORD);
    const int32_t norm = (int32_t)add_added(&s, "e\u0301!", Q3N__TOKEN_NORMALIZED);
    const int32_t raw = (int32_t)add_added(&s, "o\u0308!", 0);
    const int32_t begins = (int32_t)add_added(&s, "<", 0);
    open_section(&f, &s, Q3N__PATTERN_QWEN2);
    const q3n_model *m = &f.model;

    CHECK_IDS(m, "a<s>b", 'a', sp, 'b');
    CHECK_IDS(m, "<s><s>>", sp, longer);                 /* the longest wins */
    CHECK_IDS(m, "<s", begins, 's');
    CHECK_IDS(m, "<<s>", begins, sp);
    CHECK_IDS(m, "e<s>f", 'e', sp, 'f');                 /* no merge reaches across */
    CHECK_IDS(m, "a \t<l> b", 'a', left, ' ', 'b');
    CHECK_IDS(m, "a<r> \u3000b", 'a', right, 'b');
    CHECK_IDS(m, "<r>  <l>", right, left);
    CHECK_IDS(m, "<s> <l>", sp, left);
    CHECK_IDS(m, "  <s>  ", ' ', ' ', sp, ' ', ' ');
    CHECK_IDS(m, "word", word);
    CHECK_IDS(m, ".word.", '.', word, '.');
    CHECK_IDS(m, "words", 'w', 'o', 'r', 'd', 's');
    CHECK_IDS(m, "a_word", 'a', '_', 'w', 'o', 'r', 'd');
    CHECK_IDS(m, "1word", '1', 'w', 'o', 'r', 'd');
    CHECK_IDS(m, "\u00E9word", 0xC3, 0xA9, 'w', 'o', 'r', 'd');
    CHECK_IDS(m, "<s>word<s>", sp, word, sp);            /* > and < are no word characters */
    CHECK_IDS(m, "e\u0301!", norm);                      /* either form, in the normalised text */
    CHECK_IDS(m, "\u00E9!", norm);
    CHECK_IDS(m, "a\u00E9!b", 'a', norm, 'b');
    CHECK_IDS(m, "o\u0308!", raw);                       /* the raw form alone */
    CHECK_IDS(m, "\u00F6!", 0xC3, 0xB6, '!');
    check_ids(m, "<s>", 3, Q3N_TOKENIZE_NO_SPECIAL, (const int32_t[]){ '<', 's', '>', -1 });
    check_ids(m, "<s>><s>", 7, Q3N_TOKENIZE_NO_SPECIAL,
              (const int32_t[]){ longer, '<', 's', '>', -1 });

    size_t n;
    assert_true(q3n_token_is_special(m, sp));
    assert_false(q3n_token_is_special(m, longer));
    assert_false(q3n_token_is_special(m, 'a'));
    assert_false(q3n_token_is_special(m, -1));
    assert_false(q3n_token_is_special(m, (int32_t)s.n_tokens));
    assert_memory_equal(q3n_token_text(m, left, &n), "<l>", 3);
    assert_int_equal((int)n, 3);
    assert_memory_equal(q3n_token_text(m, norm, &n), "e\u0301!", 4);     /* as it is in the file */
    assert_null(q3n_token_text(m, -1, &n));
    assert_null(q3n_token_text(m, (int32_t)s.n_tokens, &n));
    assert_int_equal((int)n, 0);
    close_section(&f);
}

/* Characters inside and outside \w, of every category and at the ends of its ranges, as Hugging
 * Face tokenizers 0.23 takes them beside a single_word token. */
static const uint32_t word_chars[] = {
    0x49, 0x5F, 0x1CB, 0x1F2, 0x32F, 0x410, 0x45A, 0x489, 0x662, 0x6D5, 0x860, 0x9AA, 0x9B6,
    0x9C7, 0x9CB, 0x9DD, 0xA13, 0xA28, 0xA51, 0xA85, 0xAC9, 0xACB, 0xAFF, 0xB9A, 0xC3C, 0xCDD,
    0xCE3, 0xD57, 0xD96, 0xE8C, 0xEDC, 0x1064, 0x1096, 0x1318, 0x180B, 0x18AA, 0x1B41, 0x1B6E,
    0x1BB9, 0x1C58, 0x1D3F, 0x1DA3, 0x1EEE, 0x1F88, 0x1F8D, 0x1F8E, 0x1FAB, 0x1FEC, 0x200C,
    0x200D, 0x203F, 0x2040, 0x2054, 0x20DE, 0x20DF, 0x20E3, 0x2113, 0x2133, 0x2160, 0x24B6,
    0x24BE, 0x24C3, 0x24E9, 0x2D25, 0x3007, 0x5AF7, 0x8DF7, 0x95B2, 0xA48C, 0xA670, 0xA672,
    0xA6E8, 0xA71F, 0xA7C5, 0xA980, 0xAA7A, 0xCF3A, 0xFB38, 0xFB40, 0xFE33, 0xFE34, 0xFE4D,
    0xFE4E, 0xFE4F, 0xFF3F, 0x10000, 0x1000D, 0x1003D, 0x10153, 0x1029C, 0x103A0, 0x105B9,
    0x1078A, 0x1079D, 0x108F2, 0x10A0F, 0x10C85, 0x10CF0, 0x10D27, 0x10D74, 0x10D84, 0x10EAC,
    0x10EC4, 0x111B3, 0x112A8, 0x113E1, 0x114D0, 0x116D0, 0x116D6, 0x118C2, 0x11906, 0x11959,
    0x11A47, 0x11C59, 0x11D98, 0x11F34, 0x12403, 0x1240D, 0x12425, 0x1244A, 0x16A60, 0x16A63,
    0x16E40, 0x1D170, 0x1D505, 0x1D50D, 0x1D636, 0x1D74E, 0x1D788, 0x1D7C2, 0x1E023, 0x1E045,
    0x1E05E, 0x1E8D6, 0x1E959, 0x1F130, 0x1F149, 0x1F150, 0x1F169, 0x1F170, 0x1F189, 0x25AFC,
    0x2C220, 0xE01A7, 0xE01A9, 0xE01EF,
};
static const uint32_t other_chars[] = {
    0x18, 0x20, 0x27, 0x2D, 0x83, 0x89, 0x8C, 0x97, 0x98, 0xAB, 0xB2, 0xBD, 0x2D8, 0x2F7, 0x5BE,
    0x605, 0x6E9, 0x70D, 0x82E, 0x888, 0x9B3, 0x9BB, 0x9FD, 0xA04, 0xA3B, 0xAB4, 0xAF0, 0xB31,
    0xB9B, 0xBC3, 0xCA9, 0xE85, 0x104D, 0x10FB, 0x12B6, 0x1390, 0x166E, 0x1680, 0x17DB, 0x1806,
    0x1945, 0x1CCF, 0x1FFD, 0x2002, 0x2004, 0x2006, 0x2008, 0x200B, 0x200F, 0x2010, 0x2012,
    0x2018, 0x2019, 0x201B, 0x2028, 0x2029, 0x203A, 0x203C, 0x2060, 0x206F, 0x208D, 0x20A9,
    0x20BF, 0x2114, 0x214A, 0x215F, 0x2262, 0x22B4, 0x2448, 0x24B5, 0x24EA, 0x2773, 0x27C5,
    0x27CC, 0x27E2, 0x2998, 0x2A3E, 0x2B3C, 0x2B5D, 0x2BF5, 0x2CFF, 0x2DC7, 0x2E05, 0x2E09,
    0x2E0A, 0x2E0C, 0x2E0D, 0x2E1C, 0x2E21, 0x2E3D, 0x300A, 0x3017, 0x3018, 0x301B, 0x30FB,
    0x319F, 0x3255, 0x33FF, 0xA702, 0xA712, 0xA8FA, 0xFBBB, 0xFE32, 0xFE37, 0xFE47, 0xFE5C,
    0xFE63, 0xFF63, 0xFF65, 0xFFE5, 0xFFFF, 0x100FB, 0x102E5, 0x102F6, 0x1075F, 0x107B1, 0x10A14,
    0x10A44, 0x10EC1, 0x110E9, 0x1114F, 0x111F0, 0x11329, 0x11349, 0x1136D, 0x113C3, 0x1145A,
    0x1157F, 0x115DE, 0x116B9, 0x1183B, 0x1190B, 0x11936, 0x119D8, 0x119E2, 0x11A48, 0x11C6B,
    0x11FDE, 0x11FE0, 0x12544, 0x13438, 0x16AEE, 0x1AFFF, 0x1BD94, 0x1CDB0, 0x1CF2F, 0x1D184,
    0x1D9FF, 0x1EE78, 0x1F12F, 0x1F14A, 0x1F16A, 0x1F18A, 0x1F1F5, 0x1F3FC, 0x4D5E1, 0xAF088,
    0xB2E3B, 0xD87EA, 0xE0036, 0xE0073, 0xEA011, 0xFB3B7, 0xFCF2E, 0x10531A, 0x10814F, 0x10DF9D,
    0x10F911,
};

static void check_single_word(const q3n_model *m, int32_t word, uint32_t cp, int touches)
{
    char text[16];
    int32_t ids[16];
    size_t n;
    for (int after = 0; after < 2; after++) {
        const size_t at = after ? 4 : 0;
        const size_t bytes = (size_t)q3n__utf8_encode((uint8_t *)text + at, cp) + 4;
        memcpy(text + (after ? 0 : bytes - 4), "word", 4);
        assert_int_equal(q3n_tokenize(m, text, bytes, 0, ids, COUNT(ids), &n), Q3N_OK);
        if ((ids[after ? 0 : n - 1] == word) == touches)
            fail_msg("U+%04X %s the token: %s", (unsigned)cp, after ? "after" : "before",
                     touches ? "found, expected a word character" : "not found");
    }
}

static void test_single_word(void **state)
{
    (void)state;
    section s;
    fixture f;
    begin_section(&s);
    const int32_t word = (int32_t)add_added(&s, "word", Q3N__TOKEN_SINGLE_WORD);
    open_section(&f, &s, Q3N__PATTERN_QWEN2);
    int n = 0;                          /* of all characters, without the surrogates */
    for (uint32_t cp = 0; cp < 0x110000; cp++)
        n += (1u << (q3n__char_props(f.model.tokenizer->unicode, cp) & 7) & Q3N__CLASS_WORD) != 0;
    assert_int_equal(n, 144667);
    for (size_t i = 0; i < COUNT(word_chars); i++)
        check_single_word(&f.model, word, word_chars[i], 1);
    for (size_t i = 0; i < COUNT(other_chars); i++)
        check_single_word(&f.model, word, other_chars[i], 0);
    close_section(&f);
}

/* Ids before and after a text, also an empty one; a full array gets the first of them. */
static void test_around(void **state)
{
    (void)state;
    section s;
    fixture f;
    begin_section(&s);
    open_section(&f, &s, Q3N__PATTERN_QWEN2);
    f.model.prefix = (q3n__ids){ { 1, 2 }, 2 };
    f.model.suffix = (q3n__ids){ { 3 }, 1 };
    static const struct { int flags; int32_t text[8], none[4]; } rows[] = {
        { 0, { 'a', 'b', -1 }, { -1 } },
        { Q3N_TOKENIZE_PREFIX, { 1, 2, 'a', 'b', -1 }, { 1, 2, -1 } },
        { Q3N_TOKENIZE_SUFFIX, { 'a', 'b', 3, -1 }, { 3, -1 } },
        { Q3N_TOKENIZE_WHOLE, { 1, 2, 'a', 'b', 3, -1 }, { 1, 2, 3, -1 } },
        { Q3N_TOKENIZE_WHOLE | Q3N_TOKENIZE_NO_SPECIAL, { 1, 2, 'a', 'b', 3, -1 },
          { 1, 2, 3, -1 } },
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        check_ids(&f.model, "ab", 2, rows[i].flags, rows[i].text);
        check_ids(&f.model, NULL, 0, rows[i].flags, rows[i].none);
    }
    int32_t ids[3] = { 0 };
    size_t n;
    assert_int_equal(q3n_tokenize(&f.model, "ab", 2, Q3N_TOKENIZE_WHOLE, ids, 3, &n),
                     Q3N_ERR_FULL);
    assert_true(n == 5 && ids[0] == 1 && ids[1] == 2 && ids[2] == 'a');
    close_section(&f);
}

static void test_arguments(void **state)
{
    (void)state;
    section s;
    fixture f;
    merge_section(&s);
    open_section(&f, &s, Q3N__PATTERN_QWEN2);
    int32_t ids[4] = { -7, -7, -7, -7 };
    size_t n;
    assert_int_equal(q3n_tokenize(&f.model, "x y z", 5, 0, ids, 3, &n), Q3N_ERR_FULL);
    assert_int_equal((int)n, 5);
    assert_true(ids[0] == 'x' && ids[1] == ' ' && ids[2] == 'y' && ids[3] == -7);
    assert_int_equal(q3n_tokenize(&f.model, "x y z", 5, 0, NULL, 0, &n), Q3N_ERR_FULL);
    assert_int_equal((int)n, 5);
    assert_int_equal(q3n_tokenize(&f.model, "x", 1, 0, NULL, 1, &n), Q3N_ERR_ARG);
    assert_int_equal(q3n_tokenize(&f.model, NULL, 1, 0, ids, 1, &n), Q3N_ERR_ARG);
    assert_int_equal(q3n_tokenize(&f.model, "x", 1, 8, ids, 1, &n), Q3N_ERR_ARG);
    char out[8];
    const int32_t good[2] = { 'a', 256 }, bad[2] = { 'a', 512 };
    assert_int_equal(q3n_detokenize(&f.model, good, 2, out, 2, &n), Q3N_ERR_FULL);
    assert_int_equal((int)n, 3);
    assert_int_equal(q3n_detokenize(&f.model, good, 2, NULL, 0, &n), Q3N_ERR_FULL);
    assert_int_equal((int)n, 3);
    assert_int_equal(q3n_detokenize(&f.model, good, 2, out, 3, &n), Q3N_OK);
    assert_memory_equal(out, "aab", 3);
    assert_int_equal(q3n_detokenize(&f.model, bad, 2, out, 8, &n), Q3N_ERR_ARG);
    assert_int_equal(q3n_detokenize(&f.model, bad, 0, NULL, 0, &n), Q3N_OK);
    close_section(&f);

    memset(&f, 0, sizeof f);                             /* a model without a tokenizer */
    assert_int_equal(q3n_model_n_tokens(&f.model), 0);
    assert_int_equal(q3n_tokenize(&f.model, "x", 1, 0, ids, 4, &n), Q3N_ERR_UNSUPPORTED);
    q3n_detokenizer dec = { { 0 }, 0, 0 };
    assert_int_equal(q3n_detokenize(&f.model, good, 1, out, 8, &n), Q3N_ERR_UNSUPPORTED);
    assert_int_equal(q3n_detokenizer_next(&dec, &f.model, 0, out, 8, &n), Q3N_ERR_UNSUPPORTED);
    assert_int_equal(q3n_token_is_special(&f.model, -1), 0);
    assert_null(q3n_token_text(&f.model, 0, &n));
    assert_false(q3n_token_is_special(&f.model, 0));
}

/* ---- Decoding ---- */

/* Decode bytes as single-byte tokens: as a stream, where each part must be whole characters, and at
 * once. */
static void check_decode(const q3n_model *m, const char *bytes, size_t n, const char *want)
{
    q3n_detokenizer dec = { { 0 }, 0, 0 };
    int32_t ids[64];
    char got[256], whole[256];
    size_t total = 0, part;
    for (size_t i = 0; i < n; i++) {
        ids[i] = (uint8_t)bytes[i];
        assert_int_equal(q3n_detokenizer_next(&dec, m, ids[i], got + total, 6, &part), Q3N_OK);
        for (const uint8_t *p = (uint8_t *)got + total, *end = p + part; p < end;) {
            uint32_t cp;
            const int length = q3n__utf8_decode(p, end, &cp);
            assert_true(length > 0);
            p += length;
        }
        total += part;
    }
    q3n_detokenizer_finish(&dec, got + total, &part);
    total += part;
    if (total != strlen(want) || memcmp(got, want, total) != 0)
        fail_msg("decoded \"%.*s\", expected \"%s\"", (int)total, got, want);
    q3n_detokenizer_finish(&dec, whole, &part);
    assert_int_equal((int)part, 0);
    assert_int_equal(q3n_detokenize(m, ids, n, whole, sizeof whole, &part), Q3N_OK);
    assert_int_equal((int)part, (int)total);
    assert_memory_equal(whole, got, total);
}

#define CHECK_DECODE(m, bytes, want) check_decode(m, bytes, sizeof(bytes) - 1, want)

static void test_decode(void **state)
{
    (void)state;
    section s;
    fixture f;
    merge_section(&s);
    const int32_t special = (int32_t)add_added(&s, "<s>", Q3N__TOKEN_SPECIAL);
    const int32_t hole = (int32_t)add_token(&s, "", 0);
    const int32_t half = (int32_t)add_token(&s, "x\xF0\x9F", 3);
    open_section(&f, &s, Q3N__PATTERN_QWEN2);
    const q3n_model *m = &f.model;
    CHECK_DECODE(m, "plain", "plain");
    CHECK_DECODE(m, "\U0001F600\u4E2D\u00E9", "\U0001F600\u4E2D\u00E9");
    CHECK_DECODE(m, "\xF4\x8F\xBF\xBF\xEE\x80\x80", "\U0010FFFF\uE000");
    CHECK_DECODE(m, "\xED\x9F\xBF\xF0\x90\x80\x80", "\uD7FF\U00010000");
    /* what Python's bytes.decode("utf-8", "replace") gives */
    CHECK_DECODE(m, "\xF0\x9F\x98" "A", FFFD "A");
    CHECK_DECODE(m, "\xF0\x9F\x98", FFFD);
    CHECK_DECODE(m, "\xE4\xB8", FFFD);
    CHECK_DECODE(m, "\xE4", FFFD);
    CHECK_DECODE(m, "\xE4\xE4\xB8\xAD", FFFD "\u4E2D");
    CHECK_DECODE(m, "\xF0\x9F\xE4\xB8\xAD", FFFD "\u4E2D");
    CHECK_DECODE(m, "\x80\xBF", FFFD FFFD);
    CHECK_DECODE(m, "\xC0\xAF", FFFD FFFD);
    CHECK_DECODE(m, "\xC3\xC3\xA9", FFFD "\u00E9");
    CHECK_DECODE(m, "\xE0\x80\x80", FFFD FFFD FFFD);
    CHECK_DECODE(m, "\xED\xA0\x80", FFFD FFFD FFFD);
    CHECK_DECODE(m, "\xF0\x80\x80\x80", FFFD FFFD FFFD FFFD);
    CHECK_DECODE(m, "\xF4\x90\x80\x80", FFFD FFFD FFFD FFFD);
    CHECK_DECODE(m, "\xF5\xFF", FFFD FFFD);
    CHECK_DECODE(m, "\xE2\x28\xA1", FFFD "(" FFFD);
    CHECK_DECODE(m, "\xE1\x80\xE1\x80\x80", FFFD "\u1000");

    q3n_detokenizer dec = { { 0 }, 0, 0 };
    char out[16];
    size_t n;
    assert_int_equal(q3n_detokenizer_next(&dec, m, half, out, sizeof out, &n), Q3N_OK);
    assert_int_equal((int)n, 1);                         /* x; the rest waits */
    assert_int_equal(q3n_detokenizer_next(&dec, m, special, out, 5, &n), Q3N_ERR_FULL);
    assert_int_equal((int)n, 6);
    assert_int_equal(dec.n_pending, 2);                  /* nothing was taken in */
    assert_int_equal(q3n_detokenizer_next(&dec, m, special, out, 6, &n), Q3N_OK);
    assert_memory_equal(out, FFFD "<s>", 6);
    assert_int_equal(q3n_detokenizer_next(&dec, m, half, out, sizeof out, &n), Q3N_OK);
    dec.skip_special = 1;                                /* then bytes join across the token */
    assert_int_equal(q3n_detokenizer_next(&dec, m, special, NULL, 0, &n), Q3N_OK);
    assert_int_equal((int)n, 0);
    assert_int_equal(q3n_detokenizer_next(&dec, m, 0x98, NULL, 0, &n), Q3N_OK);
    assert_int_equal(q3n_detokenizer_next(&dec, m, 0x80, out, 3, &n), Q3N_ERR_FULL);
    assert_int_equal((int)n, 4);
    assert_int_equal(q3n_detokenizer_next(&dec, m, 0x80, out, 4, &n), Q3N_OK);
    assert_memory_equal(out, "\U0001F600", 4);
    assert_int_equal(q3n_detokenizer_next(&dec, m, hole, NULL, 0, &n), Q3N_OK);
    assert_int_equal((int)n, 0);
    assert_int_equal(q3n_detokenizer_next(&dec, m, 511, NULL, 0, &n), Q3N_OK);  /* < vocab_size */
    assert_int_equal(q3n_detokenizer_next(&dec, m, 512, out, 16, &n), Q3N_ERR_ARG);
    assert_int_equal(q3n_detokenizer_next(&dec, m, -1, out, 16, &n), Q3N_ERR_ARG);
    dec.n_pending = 5;
    assert_int_equal(q3n_detokenizer_next(&dec, m, 'a', out, 16, &n), Q3N_ERR_ARG);
    close_section(&f);
}

/* ---- Hostile sections ---- */
static void hostile_section(section *s)
{
    merge_section(s);
    add_added(s, "<s>", Q3N__TOKEN_SPECIAL);
    add_token(s, "", 0);
    add_added(s, "e\u0301", Q3N__TOKEN_NORMALIZED | Q3N__TOKEN_LSTRIP);
}

/* Opening must fail at this byte of the section, with these words. */
static void check_bad(const uint8_t *bytes, size_t n, int64_t at, const char *words)
{
    fixture f;
    fixture_init(&f);
    q3n_error err = { Q3N_OK, -1, "" };
    assert_int_equal(open_bytes(&f, bytes, n, Q3N__PATTERN_QWEN2, &err), Q3N_ERR_FORMAT);
    assert_int_equal(err.code, Q3N_ERR_FORMAT);
    if (at >= 0) assert_int_equal((int)err.offset, (int)(FILE_OFFSET + at));
    if (!strstr(err.message, words)) fail_msg("\"%s\" lacks \"%s\"", err.message, words);
    assert_int_equal(f.mem.blocks, 0);
    assert_null(f.model.tokenizer);
    assert_int_equal(open_bytes(&f, bytes, n, Q3N__PATTERN_QWEN2, NULL), Q3N_ERR_FORMAT);
}

/* One wrong number in a sound section. */
static void check_bad_u32(size_t at, uint32_t value, int64_t reported, const char *words)
{
    section s;
    hostile_section(&s);
    size_t n;
    uint8_t *bytes = section_bytes(&s, &n), *p = bytes + at;
    put_u32(&p, &value, 1);
    check_bad(bytes, n, reported, words);
    free(bytes);
}

static void test_hostile_values(void **state)
{
    (void)state;
    section s;
    hostile_section(&s);
    const uint32_t n = s.n_tokens;
    const size_t offsets = 16, merges = offsets + 4 * (size_t)(n + 1);
    const size_t added = merges + 12 * (size_t)s.n_merges;

    check_bad_u32(0, 0, 0, "0 tokens");
    check_bad_u32(0, 513, 0, "513 tokens, expected 1 to vocab_size 512");
    check_bad_u32(0, UINT32_MAX, 0, "expected 1 to vocab_size 512");
    check_bad_u32(4, s.n_merges + 1000, 0, "the section has");
    check_bad_u32(4, UINT32_MAX, 4, "too many");
    check_bad_u32(4, UINT32_MAX / 12, 0, "the section has");
    check_bad_u32(8, UINT32_MAX, 4, "too many");
    check_bad_u32(8, n, 0, "the section has");
    check_bad_u32(offsets, 9, (int64_t)offsets + 4, "end of token 0");
    check_bad_u32(offsets + 4 * 40, 9, (int64_t)offsets + 160, "end of token 39");
    check_bad_u32(offsets + 4 * (size_t)n, 5, (int64_t)(offsets + 4 * (size_t)n), "end of token");
    check_bad_u32(offsets + 4 * (size_t)n, 100000, (int64_t)(offsets + 4 * (size_t)n),
                  "found 100000");
    check_bad_u32(offsets + 4 * 66, 67, 0, "single byte 0x41");      /* "A" becomes "AB" */
    check_bad_u32(merges + 12, n, (int64_t)merges + 12, "left id of merge 1");
    check_bad_u32(merges + 16, n, (int64_t)merges + 16, "right id of merge 1");
    check_bad_u32(merges + 20, n, (int64_t)merges + 20, "result of merge 1");
    check_bad_u32(merges + 20, 258, (int64_t)merges + 20, "length of the result of merge 1");
    check_bad_u32(merges + 16, n - 2, (int64_t)merges + 20, "length of the result of merge 1");
    check_bad_u32(added, n, (int64_t)added, "id of added token 0");
    check_bad_u32(added, n - 1, (int64_t)added + 8, "repeated id of added token 1");
    check_bad_u32(added, n - 2, (int64_t)added, "length of added token 0");
}

static void test_hostile_truncation(void **state)
{
    (void)state;
    section s;
    hostile_section(&s);
    size_t n;
    uint8_t *bytes = section_bytes(&s, &n);
    for (size_t i = 0; i < n; i++) {
        uint8_t *cut = (uint8_t *)malloc(i ? i : 1);
        assert_non_null(cut);
        memcpy(cut, bytes, i);
        check_bad(cut, i, -1, "tokenizer: ");
        free(cut);
    }
    free(bytes);
}

/* Any damage gives an error or a tokenizer that works on its own terms. */
static void test_hostile_damage(void **state)
{
    (void)state;
    static const char text[] = "abcabc <s> e\u0301aaaa\n\xFF" "dabcd 12 aaaaaaaaaaaaaaaaaaaaaaaaa"
                               "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    section s;
    hostile_section(&s);
    size_t n;
    uint8_t *bytes = section_bytes(&s, &n);
    int opened = 0;
    for (size_t i = 0; i < 3 * n; i++) {
        const size_t at = i / 3;
        const uint8_t before = bytes[at];
        bytes[at] = (uint8_t)(i % 3 == 2 ? 0xFF : before ^ 1u << (i % 8));
        fixture f;
        fixture_init(&f);
        if (open_bytes(&f, bytes, n, Q3N__PATTERN_QWEN3_5, NULL) == Q3N_OK) {
            int32_t ids[512];
            char out[2048];
            size_t n_ids, n_out;
            assert_int_equal(q3n_tokenize(&f.model, text, sizeof text, 0, ids, COUNT(ids), &n_ids),
                             Q3N_OK);
            for (size_t k = 0; k < n_ids; k++)
                assert_true(ids[k] >= 0 && ids[k] < q3n_model_n_tokens(&f.model));
            assert_int_equal(q3n_detokenize(&f.model, ids, n_ids, out, sizeof out, &n_out), Q3N_OK);
            opened++;
        }
        q3n__tokenizer_close(f.model.tokenizer, &f.model.allocator);
        assert_int_equal(f.mem.blocks, 0);
        bytes[at] = before;
    }
    assert_true(opened > 100 && opened < (int)(2 * n));
    free(bytes);
}

/* ---- Failing memory ---- */
static void test_memory_fails(void **state)
{
    (void)state;
    static char text[6000];
    section s;
    hostile_section(&s);
    size_t n_bytes, n_text = 0;
    uint8_t *bytes = section_bytes(&s, &n_bytes);
    for (; n_text < 200; n_text++) text[n_text] = "ab"[n_text % 2];    /* a long word */
    for (; n_text < 3000; n_text += 2)                         /* a long run of marks */
        memcpy(text + n_text, n_text % 4 ? "\u0323" : "\u0301", 2);
    for (int k = 0, done = 0; !done; k++) {
        fixture f;
        fixture_init(&f);
        q3n_error err = { Q3N_OK, -1, "" };
        f.mem.fail_at = k;
        int32_t ids[6000];
        size_t n = 9;
        q3n_result r = open_bytes(&f, bytes, n_bytes, Q3N__PATTERN_QWEN2, &err);
        if (r == Q3N_OK) {
            assert_true(k >= 4);
            const int blocks = f.mem.blocks;
            r = q3n_tokenize(&f.model, text, n_text, 0, ids, COUNT(ids), &n);
            assert_int_equal(f.mem.blocks, blocks);
            if (r == Q3N_ERR_MEMORY) assert_int_equal((int)n, 0);
            done = r == Q3N_OK;
            assert_true(!done || k > 8);
        } else {
            assert_int_equal(err.code, Q3N_ERR_MEMORY);
            assert_non_null(strstr(err.message, "out of memory"));
        }
        if (!done) assert_int_equal(r, Q3N_ERR_MEMORY);
        q3n__tokenizer_close(f.model.tokenizer, &f.model.allocator);
        assert_int_equal(f.mem.blocks, 0);
    }
    free(bytes);
}

/* ---- The published tokenizers ---- */
static memory real_memory = { 0, 0, 0, 0, -1 };

static q3n_model *open_model(const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", Q3N_TEST_MODELS, name);
    q3n_model_options o = Q3N_INIT(q3n_model_options);
    o.allocator = (q3n_allocator){ memory_alloc, memory_free, &real_memory };
    q3n_model *m = NULL;
    q3n_error err = { Q3N_OK, -1, "" };
    if (q3n_model_open(&m, path, &o, &err) != Q3N_OK) fail_msg("%s: %s", path, err.message);
    return m;
}

static void test_qwen3(void **state)
{
    (void)state;
    q3n_model *m = open_model("tokenizer_qwen3.q3n");
    assert_int_equal(q3n_model_n_tokens(m), 151669);
    CHECK_IDS(m, "Hello world", 9707, 1879);
    CHECK_IDS(m, "don't I'LL we'Ve they'D it'S 'tis", 15007, 944, 358, 6, 4086, 582, 6, 42612, 807,
              27705, 432, 13272, 364, 83, 285);
    CHECK_IDS(m, "1234567890", 16, 17, 18, 19, 20, 21, 22, 23, 24, 15);
    CHECK_IDS(m, "e\u0301\u1112\u1161\u11AB", 963, 23573);
    CHECK_IDS(m, "\U0001F600", 141334);
    CHECK_IDS(m, "\u4E2D\u6587\u5B57\u7B26", 104811, 48391);
    CHECK_IDS(m, "'\u017Ft", 6, 144815, 83);
    CHECK_IDS(m, "  \n\n x  ", 18611, 856, 256);
    CHECK_IDS(m, "a\0b", 64, 188, 65);
    CHECK_IDS(m, "<|im_start|>user\nHi<|im_end|>\n", 151644, 872, 198, 13048, 151645, 198);
    CHECK_IDS(m, "<think>x</think>", 151667, 87, 151668);
    check_ids(m, "<|im_start|>user<think>", 23, Q3N_TOKENIZE_NO_SPECIAL,
              (const int32_t[]){ 27, 91, 318, 4906, 91, 29, 872, 151667, -1 });
    assert_true(q3n_token_is_special(m, 151643));
    assert_false(q3n_token_is_special(m, 151667));
    q3n_model_close(m);
    assert_int_equal(real_memory.blocks, 0);
}

static void test_stories(void **state)
{
    (void)state;
    q3n_model *m = open_model("stories.q3n");
    CHECK_IDS(m, "Once upon a time, there was a little fox.", 761, 630, 258, 465, 11, 426, 301, 258,
              399, 1680, 13);
    CHECK_IDS(m, "<|im_start|>e\u0301<|endoftext|>", 4094, 127, 102, 4093);
    q3n_model_close(m);
    assert_int_equal(real_memory.blocks, 0);
}

/* One word of a megabyte: in order n log n it takes a fraction of a second; the square of n would
 * take hours, and tests/run.sh ends a suite by the CPU seconds that it used.  The memory is that of
 * the word. */
static void check_long_word(const q3n_model *m, const char *text, size_t bytes, size_t n_want)
{
    int32_t *ids = (int32_t *)malloc(bytes * sizeof *ids);
    char *back = (char *)malloc(bytes);
    assert_true(ids && back);
    real_memory.peak = real_memory.live;
    const size_t before = real_memory.live;
    size_t n, n_back;
    assert_int_equal(q3n_tokenize(m, text, bytes, 0, ids, bytes, &n), Q3N_OK);
    assert_true(real_memory.peak - before <= 64 * bytes);
    assert_int_equal((int)real_memory.live, (int)before);
    if (n_want) assert_int_equal((int)n, (int)n_want);
    assert_int_equal(q3n_detokenize(m, ids, n, back, bytes, &n_back), Q3N_OK);
    assert_int_equal((int)n_back, (int)bytes);
    assert_memory_equal(back, text, bytes);
    free(ids);
    free(back);
}

static void test_long_words(void **state)
{
    (void)state;
    const size_t bytes = 999999;                         /* a multiple of 3 */
    char *text = (char *)malloc(bytes);
    assert_non_null(text);
    q3n_model *m = open_model("tokenizer_qwen3.q3n");
    memset(text, 'a', bytes);
    check_long_word(m, text, bytes - 7, bytes / 8);      /* tokens of eight */
    for (size_t i = 0; i < bytes; i++) text[i] = (char)('a' + random_below(26));
    check_long_word(m, text, bytes, 0);
    for (size_t i = 0; i < bytes; i += 3)
        q3n__utf8_encode((uint8_t *)text + i, 0x4E00 + random_below(0x5000));
    check_long_word(m, text, bytes, 0);
    memset(text, ' ', bytes);
    check_long_word(m, text, bytes, 0);
    for (size_t i = 0; i < bytes; i++) text[i] = "<|"[i % 2];    /* nearly an added token */
    check_long_word(m, text, bytes, 0);
    q3n_model_close(m);
    free(text);
}

/* Each byte string comes back, unless NFC changes it: text without marks. */
static void test_round_trip(void **state)
{
    (void)state;
    q3n_model *m = open_model("tokenizer_qwen3.q3n");
    for (int round = 0; round < 2000; round++) {
        char text[400], back[400];
        int32_t ids[400];
        size_t bytes = 0, n, n_back;
        while (bytes < 390) {
            uint32_t cp = random_below(round % 2 ? 0x300 : 0x3000);
            if (q3n__char_props(&unicode, cp) & Q3N__UNSTABLE) cp = ' ';
            bytes += (size_t)q3n__utf8_encode((uint8_t *)text + bytes, cp);
        }
        assert_int_equal(q3n_tokenize(m, text, bytes, 0, ids, COUNT(ids), &n), Q3N_OK);
        assert_true(n > 0 && n <= bytes);
        assert_int_equal(q3n_detokenize(m, ids, n, back, sizeof back, &n_back), Q3N_OK);
        assert_int_equal((int)n_back, (int)bytes);
        assert_memory_equal(back, text, bytes);
    }
    q3n_model_close(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_classes),
        cmocka_unit_test(test_utf8),
        cmocka_unit_test(test_nfc),
        cmocka_unit_test(test_nfc_all),
        cmocka_unit_test(test_nfc_long_run),
        cmocka_unit_test(test_words),
        cmocka_unit_test(test_pieces),
        cmocka_unit_test(test_merges),
        cmocka_unit_test(test_merges_naive),
        cmocka_unit_test(test_merges_made_slow),
        cmocka_unit_test(test_character_tables),
        cmocka_unit_test(test_merges_repeated),
        cmocka_unit_test(test_any_bytes),
        cmocka_unit_test(test_added),
        cmocka_unit_test(test_single_word),
        cmocka_unit_test(test_around),
        cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_decode),
        cmocka_unit_test(test_hostile_values),
        cmocka_unit_test(test_hostile_truncation),
        cmocka_unit_test(test_hostile_damage),
        cmocka_unit_test(test_memory_fails),
        cmocka_unit_test(test_qwen3),
        cmocka_unit_test(test_stories),
        cmocka_unit_test(test_long_words),
        cmocka_unit_test(test_round_trip),
    };
    return cmocka_run_group_tests_name("tokenizer", tests, unicode_setup, NULL);
}
