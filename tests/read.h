/* read.h - a file in memory.  Include after cmocka.h. */
#ifndef Q3N_TESTS_READ_H
#define Q3N_TESTS_READ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* The bytes of a file, and a 0 after them.  Free them. */
static inline uint8_t *read_file(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    if (!f) fail_msg("%s: cannot open", path);
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    const long size = ftell(f);
    assert_true(size >= 0);
    rewind(f);
    *bytes = (size_t)size;
    uint8_t *data = (uint8_t *)malloc(*bytes + 1);
    assert_non_null(data);
    assert_int_equal(fread(data, 1, *bytes, f), *bytes);
    data[*bytes] = 0;
    fclose(f);
    return data;
}

#endif
