/* golden.h - reads the recorded results in tests/golden: as much of JSON as they hold.  A value is
 * a pointer to its first character; the text must be valid JSON.  Include after cmocka.h. */
#ifndef Q3N_TEST_GOLDEN_H
#define Q3N_TEST_GOLDEN_H

#include "read.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef Q3N_TEST_MODELS
#  define Q3N_TEST_MODELS "build/models"
#endif
#ifndef Q3N_TEST_GOLDEN
#  define Q3N_TEST_GOLDEN "tests/golden"
#endif

static inline const char *golden_blank(const char *p) { return p + strspn(p, " \t\r\n"); }

/* After the value at p. */
static inline const char *golden_skip(const char *p)
{
    p = golden_blank(p);
    if (*p != '{' && *p != '[' && *p != '"') return p + strcspn(p, ",]} \t\r\n");
    int depth = 0, quoted = 0;
    do {
        assert_true(*p != 0);
        if (quoted) {
            if (*p == '\\') p++;
            else if (*p == '"') quoted = 0;
        } else if (*p == '"') {
            quoted = 1;
        } else {
            depth += (*p == '{' || *p == '[') - (*p == '}' || *p == ']');
        }
        p++;
    } while (depth > 0 || quoted);
    return p;
}

/* The next item of an array or member of an object; *p starts at its bracket.  NULL at the end. */
static inline const char *golden_next(const char **p)
{
    const char *at = golden_blank(*p);
    if (*at == '[' || *at == '{' || *at == ',') at = golden_blank(at + 1);
    if (*at == ']' || *at == '}') return NULL;
    *p = golden_blank(golden_skip(at));
    if (**p == ':') *p = golden_blank(golden_skip(*p + 1));
    return at;
}

/* The value of a key; NULL if the object has none. */
static inline const char *golden_member(const char *object, const char *key)
{
    const size_t n = strlen(key);
    const char *p = object, *member;
    while ((member = golden_next(&p)) != NULL)
        if (strncmp(member + 1, key, n) == 0 && member[n + 1] == '"')
            return golden_blank(golden_blank(member + n + 2) + 1);
    return NULL;
}

static inline int golden_length(const char *array)
{
    int n = 0;
    for (const char *p = array; golden_next(&p); ) n++;
    return n;
}

/* The numbers of an array, however deep its rows nest; *n of them.  Free them. */
static inline double *golden_numbers(const char *array, int *n)
{
    const char *end = golden_skip(array);
    int count = 1;
    for (const char *p = array; p < end; p++) count += *p == ',';
    double *out = (double *)malloc((size_t)count * sizeof *out);
    assert_non_null(out);
    *n = 0;
    for (const char *p = array; p < end; ) {
        if (strchr("[], \t\r\n", *p)) { p++; continue; }
        char *behind;
        out[*n] = strtod(p, &behind);
        assert_true(behind > p && *n < count);
        p = behind;
        (*n)++;
    }
    return out;
}

/* A whole number array as token ids.  Free them. */
static inline int32_t *golden_ids(const char *array, int *n)
{
    double *x = golden_numbers(array, n);
    int32_t *ids = (int32_t *)malloc(((size_t)*n + 1) * sizeof *ids);
    assert_non_null(ids);
    for (int i = 0; i < *n; i++) ids[i] = (int32_t)x[i];
    free(x);
    return ids;
}

/* The text of a file, with a 0 after.  Free it. */
static inline char *golden_read(const char *path)
{
    size_t bytes;
    return (char *)read_file(path, &bytes);
}

#endif
