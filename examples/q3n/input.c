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

/* Fails if one is no id of m. */
static void check_ids(const cli_ids *ids, const cli_input *in, const q3n_model *m)
{
    const int vocab = q3n_model_config(m)->vocab_size;
    for (size_t i = 0; i < ids->n; i++) {
        if (ids->id[i] < 0 || ids->id[i] >= vocab) {
            cli_fail("%s: token id %ld (number %zu) is not in %s, which has 0 to %d",
                     in->source, (long)ids->id[i], i + 1, in->model, vocab - 1);
        }
    }
    if (ids->n > INT_MAX / 2) cli_fail("%s: %zu tokens are too many", in->source, ids->n);
}

void cli_tokenize(cli_ids *out, const cli_input *in, const q3n_model *m, const char *text, size_t n)
{
    const int flags = (in->no_special ? Q3N_TOKENIZE_NO_SPECIAL : 0) | (in->alone ? 0 : in->around);
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
        cli_fail("%s: the model has no tokenizer: give token ids (--ids LIST or --ids-file FILE)",
                 in->model);
    }
    if (r != Q3N_OK) cli_fail("%s: cannot tokenize it: %s", in->source, q3n_result_string(r));
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

#define TEXT_SOURCES                                                                              \
    ": give it as a word after the model, by -p TEXT, -f FILE or --ids LIST, or through a pipe"

static void read_text_file(cli_ids *out, const cli_input *in, const q3n_model *m)
{
    cli_buffer text = { 0 };
    cli_read_file(&text, in->file);
    size_t n = text.n;
    if (in->piped && n == 0) cli_misuse("no text: stdin is empty" TEXT_SOURCES);
    if (in->drop_newline && n && text.data[n - 1] == '\n') n--;
    cli_tokenize(out, in, m, text.data, n);
    cli_buffer_free(&text);
}

void cli_input_choose(cli_input *in, const cli_setup *setup, const cli_words *words)
{
    const struct {
        const char *name, *value;
    } sources[] = {
        { "the word after the model", words->n ? words->word[0] : NULL },
        { "--prompt", in->prompt }, { "--file", in->file }, { "--ids", in->ids },
        { "--ids-file", in->ids_file },
    };
    in->model = setup->model;
    if (words->n > 1) {
        cli_misuse("unexpected argument '%s': a text of several words is one in quotes",
                   words->word[1]);
    }
    for (int i = 0; i < CLI_COUNT(sources); i++) {
        if (!sources[i].value) continue;
        if (in->source) {
            cli_misuse("two texts, by %s and by %s: give one", in->source, sources[i].name);
        }
        in->source = sources[i].name;
    }
    if (words->n) in->prompt = words->word[0];
    if (in->file || in->ids_file) in->source = cli_file_name(in->file ? in->file : in->ids_file);
    if (in->source) return;
    if (cli_is_terminal(stdin)) cli_misuse("no text" TEXT_SOURCES);
    in->file   = "-";
    in->source = "stdin";
    in->piped  = 1;
}

void cli_input_cases(cli_cases *out, const cli_input *in, const q3n_model *m)
{
    if (in->ids_file)     read_ids_file(out, in->ids_file);
    else if (in->ids)     cli_ids_parse(add_case(out), in->ids, strlen(in->ids), "--ids");
    else if (in->file)    read_text_file(add_case(out), in, m);
    else                  cli_tokenize(add_case(out), in, m, in->prompt, strlen(in->prompt));

    for (size_t i = 0; i < out->n; i++) {
        if (out->item[i].n == 0) cli_fail("%s is empty: at least one token is needed", in->source);
        check_ids(&out->item[i], in, m);
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
