/* Options: one table per command parses them and prints the help. */
#include "cli.h"
#include "../../tools/q3n_make.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Values ---- */

int64_t cli_parse_int(const char *name, const char *text, int64_t min, int64_t max)
{
    char *end = NULL;
    errno = 0;
    const long long x = strtoll(text, &end, 10);
    if (end == text || *end) cli_misuse("%s: '%s' is not a whole number", name, text);
    if (errno == ERANGE || x < min || x > max) {
        cli_misuse("%s: %s is not between %lld and %lld", name, text, (long long)min,
                   (long long)max);
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

double cli_parse_real(const char *name, const char *text, double min, double max)
{
    char *end = NULL;
    const double x = strtod(text, &end);
    if (end == text || *end || !isfinite(x)) cli_misuse("%s: '%s' is not a number", name, text);
    if (x < min || x > max) {
        cli_misuse("%s: %s is not between %g and %g", name, text, min, max);
    }
    return x;
}

int cli_parse_list(const char *name, const char *text, int min, int *values, int max)
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
            values[n++] = (int)cli_parse_int(name, item, min, 1 << 30);
        }
        p += len + (p[len] != 0);
    }
    if (n == 0) cli_misuse("%s: '%s' is not a list of numbers", name, text);
    return n;
}

/* ---- Tables of names ---- */

const char *cli_next_name(const char **names, size_t *n)
{
    const char *name = *names + strspn(*names, " ");
    *n = strcspn(name, " ");
    *names = name + *n;
    return *n ? name : NULL;
}

q3n_isa cli_isa(int i)
{
    static const q3n_isa list[] = {
#define CLI_ISA(ID, id, number) Q3N_ISA_##ID,
        Q3N_ISA_LIST(CLI_ISA)
#undef CLI_ISA
    };
    return i < CLI_COUNT(list) ? list[i] : Q3N_ISA_AUTO;
}

static const char *type_at(int i)
{
    return q3n_type_name((q3n_type)i);
}

static const char *kv_type_at(int i)
{
    static const q3n_type types[] = { Q3N_TYPE_F32, Q3N_TYPE_F16, Q3N_TYPE_BF16, Q3N_TYPE_Q8 };
    return i < CLI_COUNT(types) ? q3n_type_name(types[i]) : NULL;
}

static const char *state_type_at(int i)
{
    static const q3n_type types[] = { Q3N_TYPE_F32, Q3N_TYPE_BF16 };
    return i < CLI_COUNT(types) ? q3n_type_name(types[i]) : NULL;
}

static const char *shell_at(int i)
{
    static const char *const shells[] = { "bash", "zsh", "fish" };
    return i < CLI_COUNT(shells) ? shells[i] : NULL;
}

const char *cli_choice_at(cli_kind kind, int i)
{
    switch (kind) {
    case CLI_ISA:        return q3n_isa_name(cli_isa(i));
    case CLI_TYPE:       return type_at(i);
    case CLI_KV_TYPE:    return kv_type_at(i);
    case CLI_STATE_TYPE: return state_type_at(i);
    case CLI_SPECULATE:  return cli_speculate_name(i);
    case CLI_RECIPE:     return q3n_recipe_name(i);
    case CLI_SHELL:      return shell_at(i);
    default:             return NULL;
    }
}

enum { CHOICES_ROOM = 160 };

/* "f32, f16, ..." */
static const char *choice_names(cli_kind kind, char text[CHOICES_ROOM])
{
    size_t n = 0;
    const char *name;
    text[0] = 0;
    for (int i = 0; (name = cli_choice_at(kind, i)) != NULL && n < CHOICES_ROOM; i++) {
        n += (size_t)snprintf(text + n, CHOICES_ROOM - n, "%s%s", i ? ", " : "", name);
    }
    return text;
}

static const char *parse_choice(cli_kind kind, const char *option, const char *value)
{
    char names[CHOICES_ROOM];
    const char *name;
    for (int i = 0; (name = cli_choice_at(kind, i)) != NULL; i++) {
        if (strcmp(name, value) == 0) return name;
    }
    cli_misuse("%s: '%s' is none of %s", option, value, choice_names(kind, names));
}

/* ---- Help ---- */

const cli_option cli_help_option = { "-h --help", NULL, CLI_FLAG, NULL, 0, 0, "print this" };

static void print_option(const cli_option *o)
{
    char left[80], names[CHOICES_ROOM];
    size_t n = 0;
    for (const char *p = o->names; *p && n + 2 < sizeof left; p++) {
        if (*p == ' ') left[n++] = ',';
        left[n++] = *p;
    }
    left[n] = 0;
    if (o->value) snprintf(left + n, sizeof left - n, " %s", o->value);
    if (strlen(left) > 28) printf("  %s\n  %-28s %s\n", left, "", o->help);
    else                   printf("  %-28s %s\n", left, o->help);
    if (cli_choice_at(o->kind, 0)) printf("  %-28s %s\n", "", choice_names(o->kind, names));
}

static void print_help(const cli_syntax *syntax)
{
    printf("Usage: q3n %s\n\n%s\n\nOptions:\n", syntax->synopsis, syntax->about);
    for (int i = 0; i < syntax->n_options; i++) print_option(&syntax->options[i]);
    print_option(&cli_help_option);
    printf("\nExit status: " CLI_EXIT_STATUS "\n");
}

static cli_describe_fn *describe = print_help;

void cli_describe_by(cli_describe_fn *fn)
{
    describe = fn;
}

/* ---- Parsing ---- */

/* The len bytes of arg are one of the names; _ counts as -. */
static int has_name(const char *names, const char *arg, size_t len)
{
    const char *name;
    for (size_t n; (name = cli_next_name(&names, &n)) != NULL;) {
        size_t i = 0;
        while (n == len && i < n && name[i] == (arg[i] == '_' ? '-' : arg[i])) i++;
        if (n == len && i == n) return 1;
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

/* ---- What was meant ---- */

static int min3(int a, int b, int c)
{
    const int ab = a < b ? a : b;
    return ab < c ? ab : c;
}

/* How many characters must be inserted, removed, replaced or swapped with the next to make b of a
 * (restricted Damerau-Levenshtein distance). */
static int distance(const char *a, size_t n_a, const char *b, size_t n_b)
{
    enum { ROOM = 48 };
    int d[3][ROOM] = { { 0 } };          /* rows i - 2, i - 1 and i of the table, in turn */
    if (n_a >= ROOM || n_b >= ROOM) return ROOM;
    for (size_t j = 0; j <= n_b; j++) d[0][j] = (int)j;
    for (size_t i = 1; i <= n_a; i++) {
        const int *before = d[(i + 1) % 3], *above = d[(i + 2) % 3];
        int *row = d[i % 3];
        row[0] = (int)i;
        for (size_t j = 1; j <= n_b; j++) {
            const int same = a[i - 1] == b[j - 1];
            row[j] = min3(above[j] + 1, row[j - 1] + 1, above[j - 1] + !same);
            const int swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
            if (swapped && before[j - 2] + 1 < row[j]) row[j] = before[j - 2] + 1;
        }
    }
    return d[n_a % 3][n_b];
}

const char *cli_nearest(const char *names, const char *typed, size_t len, int *best)
{
    static char found[64];
    const char *nearest = NULL, *name;
    for (size_t n; (name = cli_next_name(&names, &n)) != NULL;) {
        const int far = n < sizeof found ? distance(name, n, typed, len) : *best;
        if (far < *best) {
            *best = far;
            nearest = found;
            memcpy(found, name, n);
            found[n] = 0;
        }
    }
    return nearest;
}

/* Ends the program; names an option that is near. */
static _Noreturn void unknown_option(const cli_syntax *syntax, const char *arg, size_t len)
{
    const char *meant = NULL;
    int best = len < 6 ? 2 : 3;          /* a short name is near to everything */
    for (int i = 0; i < syntax->n_options && strncmp(arg, "--", 2) == 0; i++) {
        const char *name = cli_nearest(syntax->options[i].names, arg, len, &best);
        if (name) meant = name;
    }
    if (meant) cli_misuse("unknown option '%.*s' (is it %s?)", (int)len, arg, meant);
    cli_misuse("unknown option '%.*s'", (int)len, arg);
}

/* ---- Parsing an argument ---- */

static void set_option(const cli_option *o, const char *name, const char *value)
{
    switch (o->kind) {
    case CLI_FLAG:
        *(int *)o->target = 1;
        break;
    case CLI_INT:
        *(int *)o->target = (int)cli_parse_int(name, value, (int64_t)o->min, (int64_t)o->max);
        break;
    case CLI_U64:
        *(uint64_t *)o->target = parse_u64(name, value);
        break;
    case CLI_REAL:
        *(double *)o->target = cli_parse_real(name, value, o->min, o->max);
        break;
    case CLI_TEXT:
        *(const char **)o->target = value;
        break;
    default:
        *(const char **)o->target = parse_choice(o->kind, name, value);
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
    const int other = syntax->other && strncmp(arg, "--", 2) == 0;
    if (len >= sizeof name || (!o && !other)) unknown_option(syntax, arg, len);
    memcpy(name, arg, len);
    name[len] = 0;
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

int cli_parse(const cli_syntax *syntax, int argc, char **argv, cli_words *words)
{
    int only_words = 0;
    words->n = 0;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (!only_words && strcmp(arg, "--") == 0) {
            only_words = 1;
        } else if (!only_words && (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0)) {
            describe(syntax);
            return 0;
        } else if (!only_words && arg[0] == '-' && arg[1]) {
            i = take_option(syntax, argc, argv, i);
        } else {
            if (words->n == syntax->max_words || words->n == CLI_MAX_WORDS) {
                cli_misuse("unexpected argument '%s'", arg);
            }
            words->word[words->n++] = arg;
        }
    }
    return 1;
}
