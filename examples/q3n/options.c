/* Options: one table per command parses them and prints the help. */
#include "cli.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Values ---- */

int64_t cli_parse_int(const char *name, const char *text, int64_t least, int64_t most)
{
    char *end = NULL;
    errno = 0;
    const long long x = strtoll(text, &end, 10);
    if (end == text || *end) cli_misuse("%s: '%s' is not a whole number", name, text);
    if (errno == ERANGE || x < least || x > most) {
        cli_misuse("%s: %s is not between %lld and %lld", name, text, (long long)least,
                   (long long)most);
    }
    return x;
}

static uint64_t parse_u64(const char *name, const char *text)
{
    char *end = NULL;
    errno = 0;
    const unsigned long long x = strtoull(text, &end, 10);
    if (end == text || *end || strchr(text, '-')) {
        cli_misuse("%s: '%s' is not a whole number", name, text);
    }
    if (errno == ERANGE) cli_misuse("%s: %s is more than 2^64 - 1", name, text);
    return x;
}

double cli_parse_real(const char *name, const char *text, double least, double most)
{
    char *end = NULL;
    const double x = strtod(text, &end);
    if (end == text || *end || !isfinite(x)) cli_misuse("%s: '%s' is not a number", name, text);
    if (x < least || x > most) {
        cli_misuse("%s: %s is not between %g and %g", name, text, least, most);
    }
    return x;
}

int cli_parse_list(const char *name, const char *text, int least, int *values, int max)
{
    int n = 0;
    for (const char *p = text; *p;) {
        const size_t len = strcspn(p, ", ");
        char item[24];
        if (len >= sizeof item) cli_misuse("%s: '%s' is not a list of numbers", name, text);
        memcpy(item, p, len);
        item[len] = 0;
        if (len) {
            if (n == max) cli_misuse("%s: at most %d numbers", name, max);
            values[n++] = (int)cli_parse_int(name, item, least, 1 << 30);
        }
        p += len + (p[len] != 0);
    }
    if (n == 0) cli_misuse("%s: '%s' is not a list of numbers", name, text);
    return n;
}

/* ---- Help ---- */

static void print_option(const cli_option *o)
{
    char left[80];
    size_t n = 0;
    for (const char *p = o->names; *p && n + 2 < sizeof left; p++) {
        if (*p == ' ') left[n++] = ',';
        left[n++] = *p;
    }
    left[n] = 0;
    if (o->value) snprintf(left + n, sizeof left - n, " %s", o->value);
    if (strlen(left) > 28) printf("  %s\n  %-28s %s\n", left, "", o->help);
    else                   printf("  %-28s %s\n", left, o->help);
}

static _Noreturn void print_help(const cli_syntax *syntax)
{
    printf("Usage: q3n %s\n\n%s\n\nOptions:\n", syntax->synopsis, syntax->about);
    for (int i = 0; i < syntax->n_options; i++) print_option(&syntax->options[i]);
    printf("  %-28s %s\n", "-h, --help", "print this");
    exit(cli_finish());
}

/* ---- Parsing ---- */

/* The len bytes of arg are one of the names; _ counts as -. */
static int has_name(const char *names, const char *arg, size_t len)
{
    for (const char *p = names; *p; p += *p == ' ') {
        const size_t n = strcspn(p, " ");
        size_t i = 0;
        while (n == len && i < n && p[i] == (arg[i] == '_' ? '-' : arg[i])) i++;
        if (n == len && i == n) return 1;
        p += n;
    }
    return 0;
}

static const cli_option *find_option(const cli_syntax *syntax, const char *arg, size_t len)
{
    for (int i = 0; i < syntax->n_options; i++) {
        if (has_name(syntax->options[i].names, arg, len)) return &syntax->options[i];
    }
    return NULL;
}

static void set_option(const cli_option *o, const char *name, const char *value)
{
    switch (o->kind) {
    case CLI_FLAG:
        *(int *)o->target = 1;
        break;
    case CLI_INT:
        *(int *)o->target = (int)cli_parse_int(name, value, (int64_t)o->least, (int64_t)o->most);
        break;
    case CLI_U64:
        *(uint64_t *)o->target = parse_u64(name, value);
        break;
    case CLI_REAL:
        *(double *)o->target = cli_parse_real(name, value, o->least, o->most);
        break;
    case CLI_TEXT:
        *(const char **)o->target = value;
        break;
    }
}

/* Takes argv[i] and perhaps its value; returns the index of the last word taken. */
static int take_option(const cli_syntax *syntax, int argc, char **argv, int i)
{
    const char  *arg   = argv[i];
    const char  *equal = strncmp(arg, "--", 2) == 0 ? strchr(arg, '=') : NULL;
    const size_t len   = equal ? (size_t)(equal - arg) : strlen(arg);
    const cli_option *o = find_option(syntax, arg, len);

    char name[64];
    if (len >= sizeof name) cli_misuse("unknown option '%s'", arg);
    memcpy(name, arg, len);
    name[len] = 0;
    if (!o && (!syntax->other || strncmp(name, "--", 2) != 0)) {
        cli_misuse("unknown option '%s'", name);
    }
    if (o && o->kind == CLI_FLAG) {
        if (equal) cli_misuse("%s takes no value", name);
        set_option(o, name, NULL);
        return i;
    }
    if (!equal && i + 1 >= argc) cli_misuse("%s needs a value", name);
    const char *value = equal ? equal + 1 : argv[i + 1];
    if (o) set_option(o, name, value);
    else   syntax->other(syntax->user, name + 2, value);
    return equal ? i : i + 1;
}

void cli_parse(const cli_syntax *syntax, int argc, char **argv, cli_words *words)
{
    int only_words = 0;
    words->n = 0;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (!only_words && strcmp(arg, "--") == 0) {
            only_words = 1;
        } else if (!only_words && (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0)) {
            print_help(syntax);
        } else if (!only_words && arg[0] == '-' && arg[1]) {
            i = take_option(syntax, argc, argv, i);
        } else {
            if (words->n == syntax->max_words || words->n == CLI_MAX_WORDS) {
                cli_misuse("unexpected argument '%s'", arg);
            }
            words->word[words->n++] = arg;
        }
    }
}
