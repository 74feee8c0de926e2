/* q3n tokenize and q3n detokenize. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

typedef struct token_options {
    cli_setup setup;
    cli_input in;
    int       jsonl, json, show;
} token_options;

/* ---- tokenize ---- */

static void print_ids(const token_options *o, const q3n_model *m, const cli_ids *ids)
{
    if (o->json || o->jsonl) {
        cli_json_ids(stdout, ids->id, ids->n);
    } else {
        for (size_t i = 0; i < ids->n; i++) {
            printf("%s%ld", i && !o->show ? " " : "", (long)ids->id[i]);
            if (!o->show) continue;
            printf("\t");
            cli_print_piece(stdout, m, ids->id[i]);
            if (i + 1 < ids->n) printf("\n");
        }
    }
    printf("\n");
}

static void tokenize_lines(const token_options *o, const q3n_model *m)
{
    const char *path = o->in.file;
    FILE *f = cli_open_file(path);
    cli_buffer line = { 0 }, text = { 0 };
    cli_ids ids = { 0 };
    for (long number = 1; cli_read_line(&line, f, path); number++) {
        size_t at = 0;
        const char *why = cli_json_read_string(&text, line.data, line.n, &at);
        if (why) cli_fail("%s line %ld, byte %zu: %s", cli_file_name(path), number, at + 1, why);
        cli_tokenize(&ids, &o->in, m, text.data, text.n);
        print_ids(o, m, &ids);
        fflush(stdout);
    }
    free(ids.id);
    cli_buffer_free(&text);
    cli_buffer_free(&line);
    cli_close_file(f);
}

int cmd_tokenize(int argc, char **argv)
{
    token_options o = { .in = { .around = Q3N_TOKENIZE_WHOLE } };
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(o.setup),
        CLI_TEXT_OPTIONS(o.in),
        CLI_SPECIAL_OPTIONS(o.in),
        { "--json", NULL, CLI_FLAG, &o.json, 0, 0, "print an array" },
        { "--show", NULL, CLI_FLAG, &o.show, 0, 0, "print one token a line, with its text" },
        { "--jsonl", NULL, CLI_FLAG, &o.jsonl, 0, 0,
          "one JSON string a line in, one array a line out" },
    };
    const cli_syntax syntax = {
        "tokenize MODEL.q3n [TEXT] [options]",
        "Prints the token ids of a text: the argument, a file or stdin.  They are those of\n"
        "transformers' tokenizer(TEXT): with what the tokenizer puts before and after a text.",
        options, CLI_COUNT(options), 3, NULL, NULL,
    };
    cli_words words;
    if (!cli_parse(&syntax, argc, argv, &words)) return cli_finish();
    q3n_model *m = cli_open_model(&o.setup, &words);
    if (o.jsonl && (o.in.prompt || words.n)) cli_misuse("--jsonl reads a file or stdin");
    if (o.jsonl) {
        if (!o.in.file) o.in.file = "-";
        o.in.model  = o.setup.model;
        o.in.source = cli_file_name(o.in.file);
        tokenize_lines(&o, m);
    } else {
        cli_input_choose(&o.in, &o.setup, &words);
        cli_buffer text = { 0 };
        cli_ids ids = { 0 };
        if (o.in.prompt) cli_buffer_add(&text, o.in.prompt, strlen(o.in.prompt));
        else             cli_read_file(&text, o.in.file);
        cli_tokenize(&ids, &o.in, m, text.data, text.n);
        print_ids(&o, m, &ids);
        free(ids.id);
        cli_buffer_free(&text);
    }
    q3n_model_close(m);
    return cli_finish();
}

/* ---- detokenize ---- */

static void print_text(const token_options *o, const q3n_model *m, const cli_ids *ids)
{
    size_t n = 0;
    q3n_result r = q3n_detokenize(m, ids->id, ids->n, NULL, 0, &n);
    char *text = cli_alloc(n + 1, 1);
    if (r == Q3N_ERR_FULL) r = q3n_detokenize(m, ids->id, ids->n, text, n, &n);
    if (r == Q3N_ERR_UNSUPPORTED || q3n_model_n_tokens(m) == 0) {
        cli_fail("%s: the model has no tokenizer: the file was made without one", o->setup.model);
    }
    if (r == Q3N_ERR_ARG) {
        cli_fail("one of the ids is no token of %s: ids are 0 to %d", o->setup.model,
                 q3n_model_config(m)->vocab_size - 1);
    }
    if (r != Q3N_OK) cli_fail("cannot turn the ids into text: %s", q3n_result_string(r));
    if (o->json || o->jsonl) {
        cli_json_string(stdout, text, n);
        printf("\n");
    } else {
        fwrite(text, 1, n, stdout);
        if (cli_is_terminal(stdout)) printf("\n");
    }
    free(text);
}

static void detokenize_lines(const token_options *o, const q3n_model *m)
{
    const char *path = o->in.file ? o->in.file : "-";
    FILE *f = cli_open_file(path);
    cli_buffer line = { 0 };
    cli_ids ids = { 0 };
    for (long number = 1; cli_read_line(&line, f, path); number++) {
        char where[300];
        snprintf(where, sizeof where, "%.250s line %ld", cli_file_name(path), number);
        ids.n = 0;
        cli_ids_parse(&ids, line.data, line.n, where);
        print_text(o, m, &ids);
        fflush(stdout);
    }
    free(ids.id);
    cli_buffer_free(&line);
    cli_close_file(f);
}

/* The ids of --ids, of the words after the model, or else of the file. */
static void read_ids(cli_ids *out, const token_options *o, const cli_words *words)
{
    const char *path = o->in.file ? o->in.file : "-";
    const char *where = o->in.ids ? "--ids" : words->n ? "token ids" : cli_file_name(path);
    cli_buffer text = { 0 };
    if (o->in.ids) {
        cli_buffer_add(&text, o->in.ids, strlen(o->in.ids));
    } else if (words->n) {
        for (int i = 0; i < words->n; i++) {
            cli_buffer_add(&text, words->word[i], strlen(words->word[i]));
            cli_buffer_add(&text, " ", 1);
        }
    } else {
        cli_read_file(&text, path);
    }
    cli_ids_parse(out, text.data, text.n, where);
    cli_buffer_free(&text);
}

int cmd_detokenize(int argc, char **argv)
{
    token_options o = { 0 };
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(o.setup),
        CLI_IDS_OPTION(o.in),
        { "-f --file", "FILE", CLI_TEXT, &o.in.file, 0, 0, "the ids from a file; - is stdin" },
        { "--json", NULL, CLI_FLAG, &o.json, 0, 0, "print a JSON string" },
        { "--jsonl", NULL, CLI_FLAG, &o.jsonl, 0, 0,
          "one array a line in, one JSON string a line out" },
    };
    const cli_syntax syntax = {
        "detokenize MODEL.q3n [ID ...] [options]",
        "Prints the text of token ids: the arguments, a file or stdin.  Bytes that are no\n"
        "character give U+FFFD.",
        options, CLI_COUNT(options), CLI_MAX_WORDS, NULL, NULL,
    };
    cli_words words;
    if (!cli_parse(&syntax, argc, argv, &words)) return cli_finish();
    q3n_model *m = cli_open_model(&o.setup, &words);
    if (!!o.in.ids + !!o.in.file + (words.n > 0) > 1) cli_misuse("give the ids once");
    if (o.jsonl && (o.in.ids || words.n)) cli_misuse("--jsonl reads a file or stdin");
    if (o.jsonl) {
        detokenize_lines(&o, m);
    } else {
        cli_ids ids = { 0 };
        read_ids(&ids, &o, &words);
        print_text(&o, m, &ids);
        free(ids.id);
    }
    q3n_model_close(m);
    return cli_finish();
}
