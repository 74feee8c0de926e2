/* q3n render: messages to a prompt, as the model's chat template has it. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

typedef struct render_options {
    cli_setup   setup;
    const char *template_file, *file, *bos, *eos, *now;
    int         jsonl, trust, spans;
} render_options;

static q3n_chat *open_chat(const render_options *o, const q3n_model *m)
{
    cli_buffer text = { 0 };
    q3n_chat *chat;
    q3n_error err;
    if (!o->template_file) cli_misuse("a template is missing: --template FILE");
    cli_read_file(&text, o->template_file);
    const q3n_chat_options options = {
        .size = sizeof options, .template_text = text.data, .template_bytes = text.n,
        .bos_token = o->bos, .eos_token = o->eos, .allocator = o->setup.allocator,
    };
    if (q3n_chat_open(&chat, m, &options, &err)) {
        cli_fail("%s: %s", cli_file_name(o->template_file), err.message);
    }
    cli_buffer_free(&text);
    return chat;
}

static void print_ids(const q3n_prompt *p)
{
    size_t n = 0;
    q3n_result r = q3n_prompt_ids(p, NULL, 0, &n);
    int32_t *ids = cli_alloc(n + 1, sizeof *ids);
    if (r == Q3N_ERR_FULL) r = q3n_prompt_ids(p, ids, n, &n);
    if (r != Q3N_OK) cli_fail("cannot tokenize the prompt: %s", q3n_result_string(r));
    printf(", \"ids\": ");
    cli_json_ids(stdout, ids, n);
    free(ids);
}

/* [[begin, end, flags], ...] */
static void print_spans(const q3n_prompt *p)
{
    size_t n;
    const q3n_span *spans = q3n_prompt_spans(p, &n);
    printf(", \"spans\": [");
    for (size_t i = 0; i < n; i++) {
        printf("%s[%zu, %zu, %d]", i ? ", " : "", spans[i].begin, spans[i].end, spans[i].flags);
    }
    printf("]");
}

/* One request; where names it in errors. */
static void render(const render_options *o, const q3n_chat *chat, const q3n_model *m,
                   const cli_buffer *request, const char *where)
{
    const q3n_chat_input in = {
        .size = sizeof in, .request = request->data ? request->data : "",
        .trust_messages = o->trust,
        .now = o->now ? cli_parse_int("--now", o->now, 1, INT64_MAX) : 0,
    };
    q3n_prompt *p;
    q3n_error err = { .offset = -1 };
    size_t n;
    if (strlen(in.request) < request->n) cli_fail("%s: a byte 0 in the request", where);
    if (q3n_chat_render(chat, &in, &p, &err)) {
        if (!o->jsonl) cli_fail("%s: %s", where, err.message);
        printf("{");
        cli_json_member(stdout, "error", err.message);
        printf("}\n");
        return;
    }
    const char *text = q3n_prompt_text(p, &n);
    if (o->jsonl) {
        printf("{\"prompt\": ");
        cli_json_string(stdout, text, n);
        if (m) print_ids(p);
        if (o->spans) print_spans(p);
        printf("}\n");
    } else {
        fwrite(text, 1, n, stdout);
    }
    q3n_prompt_free(p);
}

static void render_lines(const render_options *o, const q3n_chat *chat, const q3n_model *m)
{
    FILE *f = cli_open_file(o->file);
    cli_buffer line = { 0 };
    while (cli_read_line(&line, f, o->file)) {
        render(o, chat, m, &line, cli_file_name(o->file));
        fflush(stdout);
    }
    cli_buffer_free(&line);
    cli_close_file(f);
}

int cmd_render(int argc, char **argv)
{
    render_options o = { .file = "-" };
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(o.setup),
        { "--template", "FILE", CLI_TEXT, &o.template_file, 0, 0, "the chat template, in Jinja" },
        { "-f --file", "FILE", CLI_TEXT, &o.file, 0, 0, "the requests, if not stdin" },
        { "--jsonl", NULL, CLI_FLAG, &o.jsonl, 0, 0,
          "one request a line in, one object a line out" },
        { "--spans", NULL, CLI_FLAG, &o.spans, 0, 0,
          "with --jsonl: bytes from, to, 1 = of messages + 2 = of a generation block" },
        { "--trust-messages", NULL, CLI_FLAG, &o.trust, 0, 0,
          "special tokens in messages count, as in transformers" },
        { "--bos", "TEXT", CLI_TEXT, &o.bos, 0, 0, "bos_token of the template" },
        { "--eos", "TEXT", CLI_TEXT, &o.eos, 0, 0, "eos_token of the template" },
        { "--now", "SECONDS", CLI_TEXT, &o.now, 0, 0,
          "local time since 1970 for strftime_now (the clock's)" },
    };
    const cli_syntax syntax = {
        "render [MODEL.q3n] --template FILE [options]",
        "Prints the prompt that a chat template makes of a request, a JSON object:\n"
        "{\"messages\": [...], \"tools\": [...], \"options\": {...}}.  With --jsonl an object\n"
        "with \"prompt\", with a model also \"ids\", or with \"error\".",
        options, CLI_COUNT(options), 1, NULL, NULL,
    };
    cli_words words;
    if (!cli_parse(&syntax, argc, argv, &words)) return cli_finish();
    if (o.spans && !o.jsonl) cli_misuse("--spans is for --jsonl");
    q3n_model *m = o.setup.model || words.n ? cli_open_model(&o.setup, &words) : NULL;
    q3n_chat *chat = open_chat(&o, m);
    if (o.jsonl) {
        render_lines(&o, chat, m);
    } else {
        cli_buffer request = { 0 };
        cli_read_file(&request, o.file);
        render(&o, chat, m, &request, cli_file_name(o.file));
        cli_buffer_free(&request);
    }
    q3n_chat_close(chat);
    q3n_model_close(m);
    return cli_finish();
}
