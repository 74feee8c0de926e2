/* Memory that never runs out quietly, and whole files. */
#include "cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void *cli_alloc(size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size);
    if (!memory) cli_fail("out of memory: %zu x %zu bytes were needed", count, size);
    return memory;
}

void *cli_grow(void *memory, size_t count, size_t size)
{
    void *bigger = count > SIZE_MAX / size ? NULL : realloc(memory, count * size);
    if (!bigger) cli_fail("out of memory: %zu x %zu bytes were needed", count, size);
    return bigger;
}

void cli_buffer_add(cli_buffer *b, const char *bytes, size_t n)
{
    if (n >= SIZE_MAX / 4 - b->n) cli_fail("out of memory: a text of %zu bytes", n);
    if (b->n + n + 1 > b->room) {
        b->room = 2 * (b->n + n + 1);
        b->data = cli_grow(b->data, b->room, 1);
    }
    if (n) memcpy(b->data + b->n, bytes, n);
    b->n += n;
    b->data[b->n] = 0;
}

void cli_buffer_free(cli_buffer *b)
{
    free(b->data);
    *b = (cli_buffer){ 0 };
}

FILE *cli_open_file(const char *path)
{
    const char *why = NULL;
    if (strcmp(path, "-") == 0) return stdin;
    FILE *f = cli_open_stream(path, &why);
    if (!f) cli_fail("%s: cannot read the file: %s", path, why);
    return f;
}

int64_t cli_file_bytes(const char *path)
{
    char part[16384];
    int64_t bytes = 0;
    FILE *f = cli_open_file(path);
    for (size_t n; (n = fread(part, 1, sizeof part, f)) > 0;) bytes += (int64_t)n;
    fclose(f);
    return bytes;
}

const char *cli_file_name(const char *path)
{
    return strcmp(path, "-") == 0 ? "stdin" : path;
}

void cli_close_file(FILE *f)
{
    if (f != stdin) fclose(f);
}

static void check_length(const cli_buffer *text, const char *path)
{
    if (text->n <= CLI_TEXT_BYTES) return;
    cli_fail("%s: a text of more than %zu bytes", cli_file_name(path), CLI_TEXT_BYTES);
}

void cli_read_file(cli_buffer *out, const char *path)
{
    FILE *f = cli_open_file(path);
    char  part[16384];
    size_t n;
    while ((n = fread(part, 1, sizeof part, f)) > 0 && out->n <= CLI_TEXT_BYTES) {
        cli_buffer_add(out, part, n);
    }
    if (ferror(f)) cli_fail("%s: cannot read it: %s", cli_file_name(path), strerror(errno));
    check_length(out, path);
    cli_buffer_add(out, "", 0);
    cli_close_file(f);
}

int cli_read_line(cli_buffer *out, FILE *f, const char *path)
{
    out->n = 0;
    int c;
    while ((c = getc(f)) != EOF && c != '\n' && out->n <= CLI_TEXT_BYTES) {
        const char byte = (char)c;
        cli_buffer_add(out, &byte, 1);
    }
    check_length(out, path);
    if (ferror(f)) cli_fail("%s: cannot read it: %s", cli_file_name(path), strerror(errno));
    if (c == EOF && out->n == 0) return 0;
    cli_buffer_add(out, "", 0);
    if (out->n && out->data[out->n - 1] == '\r') out->data[--out->n] = 0;
    return 1;
}
