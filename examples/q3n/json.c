/* JSON: writing values and reading one string. */
#include "cli.h"

#include <math.h>
#include <string.h>

/* ---- Writing ---- */

size_t cli_character_length(const unsigned char *p, size_t n)
{
    const unsigned char c = p[0];
    if (c < 0x80) return 1;
    const size_t len = c < 0xc2 ? 0 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : c < 0xf5 ? 4 : 0;
    if (len == 0 || len > n) return 0;
    for (size_t i = 1; i < len; i++) {
        if ((p[i] & 0xc0) != 0x80) return 0;
    }
    if ((c == 0xe0 && p[1] < 0xa0) || (c == 0xed && p[1] > 0x9f)) return 0;
    if ((c == 0xf0 && p[1] < 0x90) || (c == 0xf4 && p[1] > 0x8f)) return 0;
    return len;
}

/* U+0085, U+2028 and U+2029 end a line for some readers, so they are escaped: 0 if p is another. */
static unsigned line_separator(const unsigned char *p, size_t len)
{
    if (len == 2 && p[0] == 0xc2 && p[1] == 0x85) return 0x85;
    if (len == 3 && p[0] == 0xe2 && p[1] == 0x80 && (p[2] | 1) == 0xa9) return 0x1f80u + p[2];
    return 0;
}

void cli_json_string(FILE *f, const char *bytes, size_t n)
{
    static const char escapes[] = "\"\"\\\\\bb\ff\nn\rr\tt";
    const unsigned char *p = (const unsigned char *)bytes;
    putc('"', f);
    for (size_t i = 0; i < n;) {
        const size_t len = cli_character_length(p + i, n - i);
        const char *escape = NULL;
        for (const char *e = escapes; len == 1 && *e; e += 2) {
            if (*e == (char)p[i]) escape = e + 1;
        }
        const unsigned separator = line_separator(p + i, len);
        if (len == 0)                       fputs("\xef\xbf\xbd", f);
        else if (escape)                    fprintf(f, "\\%c", *escape);
        else if (separator)                 fprintf(f, "\\u%04x", separator);
        else if (p[i] < 32 || p[i] == 127)  fprintf(f, "\\u%04x", (unsigned)p[i]);
        else                                fwrite(p + i, 1, len, f);
        i += len ? len : 1;
    }
    putc('"', f);
}

void cli_json_member(FILE *f, const char *key, const char *text)
{
    fprintf(f, "\"%s\": ", key);
    cli_json_string(f, text, strlen(text));
}

void cli_json_real(FILE *f, double x)
{
    if (isfinite(x)) fprintf(f, "%.9g", x);
    else             fputs("null", f);
}

void cli_json_reals(FILE *f, const float *x, size_t n)
{
    putc('[', f);
    for (size_t i = 0; i < n; i++) {
        if (i) fputs(", ", f);
        cli_json_real(f, (double)x[i]);
    }
    putc(']', f);
}

void cli_json_ids(FILE *f, const int32_t *ids, size_t n)
{
    putc('[', f);
    for (size_t i = 0; i < n; i++) fprintf(f, "%s%ld", i ? ", " : "", (long)ids[i]);
    putc(']', f);
}

/* ---- Reading ---- */

typedef struct reader {
    const char *text;
    size_t      n, at;
    cli_buffer *out;
} reader;

static void add_character(cli_buffer *out, uint32_t c)
{
    char b[4];
    size_t n = 0;
    if (c < 0x80) {
        b[n++] = (char)c;
    } else if (c < 0x800) {
        b[n++] = (char)(0xc0 | c >> 6);
        b[n++] = (char)(0x80 | (c & 63));
    } else if (c < 0x10000) {
        b[n++] = (char)(0xe0 | c >> 12);
        b[n++] = (char)(0x80 | (c >> 6 & 63));
        b[n++] = (char)(0x80 | (c & 63));
    } else {
        b[n++] = (char)(0xf0 | c >> 18);
        b[n++] = (char)(0x80 | (c >> 12 & 63));
        b[n++] = (char)(0x80 | (c >> 6 & 63));
        b[n++] = (char)(0x80 | (c & 63));
    }
    cli_buffer_add(out, b, n);
}

/* Four hexadecimal digits; -1 if they are none. */
static long read_hex(reader *r)
{
    long x = 0;
    for (int i = 0; i < 4; i++, r->at++) {
        const char c = r->at < r->n ? r->text[r->at] : 0;
        const int digit = c >= '0' && c <= '9' ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0) return -1;
        x = 16 * x + digit;
    }
    return x;
}

/* After "\u".  A surrogate without its other half becomes U+FFFD. */
static const char *read_unicode(reader *r)
{
    const long c = read_hex(r);
    if (c < 0) return "\\u needs four hexadecimal digits";
    if (c < 0xd800 || c > 0xdfff) {
        add_character(r->out, (uint32_t)c);
        return NULL;
    }
    if (c < 0xdc00 && r->at + 6 <= r->n && r->text[r->at] == '\\' && r->text[r->at + 1] == 'u') {
        const size_t here = r->at;
        r->at += 2;
        const long low = read_hex(r);
        if (low >= 0xdc00 && low <= 0xdfff) {
            const uint32_t high = (uint32_t)(c - 0xd800) << 10;
            add_character(r->out, 0x10000 + high + (uint32_t)(low - 0xdc00));
            return NULL;
        }
        r->at = here;
    }
    add_character(r->out, 0xfffd);
    return NULL;
}

static const char *read_escape(reader *r)
{
    static const char names[] = "\"\"\\\\//b\bf\fn\nr\rt\t";
    const char c = r->at < r->n ? r->text[r->at] : 0;
    if (c == 'u') {
        r->at++;
        return read_unicode(r);
    }
    for (const char *p = names; c && *p; p += 2) {
        if (*p != c) continue;
        cli_buffer_add(r->out, p + 1, 1);
        r->at++;
        return NULL;
    }
    return "unknown escape";
}

static void skip_blanks(reader *r)
{
    while (r->at < r->n && r->text[r->at] && strchr(" \t\r\n", r->text[r->at])) r->at++;
}

static const char *read_string(reader *r)
{
    skip_blanks(r);
    if (r->at == r->n || r->text[r->at] != '"') return "a JSON string in double quotes is expected";
    r->at++;
    for (;;) {
        if (r->at == r->n) return "the string has no closing quote";
        const char c = r->text[r->at];
        if ((unsigned char)c < 32) return "control characters must be escaped";
        if (c != '\\' && c != '"') {
            cli_buffer_add(r->out, &c, 1);
            r->at++;
            continue;
        }
        r->at++;
        if (c == '"') break;
        const char *why = read_escape(r);
        if (why) return why;
    }
    skip_blanks(r);
    return r->at == r->n ? NULL : "nothing may follow the string";
}

const char *cli_json_read_string(cli_buffer *out, const char *text, size_t n, size_t *at)
{
    reader r = { .text = text, .n = n, .out = out };
    out->n = 0;
    cli_buffer_add(out, "", 0);
    const char *why = read_string(&r);
    *at = r.at;
    return why;
}
