/* Token ids from options, files and texts. */
#include "cli.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

void cli_ids_add(cli_ids *ids, int32_t id)
{
    if (ids->n == ids->room) {
        ids->room = 2 * ids->room + 64;
        ids->id   = cli_grow(ids->id, ids->room, sizeof *ids->id);
    }
    ids->id[ids->n++] = id;
}

static int is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

static size_t skip_blanks(const char *text, size_t n, size_t i)
{
    while (i < n && is_blank(text[i])) i++;
    return i;
}

/* The number at text[*i]; fails if there is none. */
static int32_t read_id(const char *text, size_t n, size_t *i, const char *where)
{
    const size_t start = *i;
    int64_t x = 0;
    while (*i < n && text[*i] >= '0' && text[*i] <= '9' && x <= INT32_MAX) {
        x = 10 * x + (text[(*i)++] - '0');
    }
    const int ends = *i == n || is_blank(text[*i]) || text[*i] == ',' || text[*i] == ']';
    if (*i > start && x <= INT32_MAX && ends) return (int32_t)x;

    size_t end = start;
    while (end < n && end - start < 24 && !is_blank(text[end]) && text[end] != ',') end++;
    cli_fail("%s: '%.*s' is not a token id; ids are whole numbers between commas or blanks", where,
             (int)(end - start), text + start);
}

void cli_ids_parse(cli_ids *out, const char *text, size_t n, const char *where)
{
    size_t i = skip_blanks(text, n, 0);
    const int array = i < n && text[i] == '[';
    int closed = 0;
    if (array) i = skip_blanks(text, n, i + 1);
    while (i < n && !closed) {
        if (array && text[i] == ']') {
            closed = 1;
            i = skip_blanks(text, n, i + 1);
            break;
        }
        cli_ids_add(out, read_id(text, n, &i, where));
        i = skip_blanks(text, n, i);
        if (i < n && text[i] == ',') i = skip_blanks(text, n, i + 1);
    }
    if (array && !closed) cli_fail("%s: the array of token ids has no ]", where);
    if (i < n) cli_fail("%s: nothing may follow the array of token ids", where);
}

void cli_ids_check(const cli_ids *ids, const q3n_model *m)
{
    const int vocab = q3n_model_config(m)->vocab_size;
    for (size_t i = 0; i < ids->n; i++) {
        if (ids->id[i] < 0 || ids->id[i] >= vocab) {
            cli_fail("token id %ld (number %zu) is not in the vocabulary: ids are 0 to %d",
                     (long)ids->id[i], i + 1, vocab - 1);
        }
    }
    if (ids->n > INT_MAX / 2) cli_fail("the text has %zu tokens: too many", ids->n);
}

void cli_tokenize(cli_ids *out, const q3n_model *m, const char *text, size_t n, int no_special)
{
    const int flags = no_special ? Q3N_TOKENIZE_NO_SPECIAL : 0;
    size_t room = n / 3 + 16;
    size_t n_ids = 0;
    q3n_result r = Q3N_ERR_FULL;
    for (int attempt = 0; attempt < 2 && r == Q3N_ERR_FULL; attempt++) {
        out->id   = cli_grow(out->id, room, sizeof *out->id);
        out->room = room;
        r = q3n_tokenize(m, text, n, flags, out->id, room, &n_ids);
        room = n_ids;
    }
    if (r == Q3N_ERR_UNSUPPORTED) {
        cli_fail("the model has no tokenizer: give token ids (--ids LIST or --ids-file FILE)");
    }
    if (r != Q3N_OK) cli_fail("cannot tokenize the text: %s", q3n_result_string(r));
    out->n = n_ids;
}

/* ---- The source that was given ---- */

static cli_ids *add_case(cli_cases *cases)
{
    if (cases->n == cases->room) {
        cases->room = 2 * cases->room + 8;
        cases->item = cli_grow(cases->item, cases->room, sizeof *cases->item);
    }
    cases->item[cases->n] = (cli_ids){ 0 };
    return &cases->item[cases->n++];
}

static void read_ids_file(cli_cases *out, const char *path)
{
    FILE *f = cli_open_file(path);
    cli_buffer line = { 0 };
    for (long number = 1; cli_read_line(&line, f, path); number++) {
        if (skip_blanks(line.data, line.n, 0) == line.n) continue;
        char where[300];
        snprintf(where, sizeof where, "%.250s line %ld", cli_file_name(path), number);
        cli_ids_parse(add_case(out), line.data, line.n, where);
    }
    cli_buffer_free(&line);
    cli_close_file(f);
    if (out->n == 0) cli_fail("%s: no token ids in this file", cli_file_name(path));
}

static void read_text_file(cli_ids *out, const cli_input *in, const q3n_model *m)
{
    cli_buffer text = { 0 };
    cli_read_file(&text, in->file);
    size_t n = text.n;
    if (in->drop_newline && n && text.data[n - 1] == '\n') n--;
    cli_tokenize(out, m, text.data, n, in->no_special);
    cli_buffer_free(&text);
}

void cli_input_cases(cli_cases *out, const cli_input *in, const q3n_model *m)
{
    const int n = !!in->prompt + !!in->file + !!in->ids + !!in->ids_file;
    if (n == 0) {
        cli_misuse("no text: give -p TEXT, -f FILE (- is stdin), --ids LIST or --ids-file FILE");
    }
    if (n > 1) cli_misuse("give one of --prompt, --file, --ids and --ids-file");

    if (in->ids_file)     read_ids_file(out, in->ids_file);
    else if (in->ids)     cli_ids_parse(add_case(out), in->ids, strlen(in->ids), "--ids");
    else if (in->file)    read_text_file(add_case(out), in, m);
    else cli_tokenize(add_case(out), m, in->prompt, strlen(in->prompt), in->no_special);

    for (size_t i = 0; i < out->n; i++) {
        if (out->item[i].n == 0) cli_fail("the text is empty: at least one token is needed");
        cli_ids_check(&out->item[i], m);
    }
}

void cli_input_stream(cli_ids *out, const cli_input *in, const q3n_model *m)
{
    cli_cases cases = { 0 };
    cli_input_cases(&cases, in, m);
    for (size_t i = 0; i < cases.n; i++) {
        for (size_t j = 0; j < cases.item[i].n; j++) cli_ids_add(out, cases.item[i].id[j]);
    }
    cli_cases_free(&cases);
}

size_t cli_cases_longest(const cli_cases *cases)
{
    size_t n = 0;
    for (size_t i = 0; i < cases->n; i++) {
        if (cases->item[i].n > n) n = cases->item[i].n;
    }
    return n;
}

void cli_cases_free(cli_cases *cases)
{
    for (size_t i = 0; i < cases->n; i++) free(cases->item[i].id);
    free(cases->item);
    *cases = (cli_cases){ 0 };
}
