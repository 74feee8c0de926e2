/* Texts that q3n bench lets a model continue: drafts are worth what the model makes of them. */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

/* For models without a chat template, such as the built-in one, which tells stories. */
static const char *const openings[BENCH_TEXTS] = {
    "<|endoftext|>Once upon a time",
    "<|endoftext|>The old king",
    "<|endoftext|>There was a little girl who",
    "<|endoftext|>Tom and Lily went to the park. They",
};

static const char *const questions[BENCH_TEXTS] = {
    "Why is the sky blue? Answer in three short paragraphs.",
    "Write a C function that reverses a singly linked list, and a test for it.",
    "List the twelve months with their number of days as a Markdown table.",
    "Correct the spelling and give the whole text again: The libary maps the modell from a file, "
    "so the sistem keeps in memmory what is used and may drop it agian. A sesion holds the state "
    "of one text; it is saved to a file and continnued later, on the same machine or annother.",
};

static void add_random(const bench *b, int i, int n, cli_ids *out)
{
    for (int t = 0; t < n; t++) cli_ids_add(out, b->ids[i * n + t]);
}

void bench_text(const bench *b, int i, int n, cli_ids *out)
{
    if (q3n_model_n_tokens(b->m) == 0) {
        add_random(b, i, n, out);
        return;
    }
    char text[800];
    const int chat = strcmp(q3n_model_chat_kind(b->m), "none") != 0;
    snprintf(text, sizeof text, chat ? "<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"
                                     : "%s", chat ? questions[i] : openings[i]);
    const cli_input in = { .model = b->setup.model, .source = "the prompt of the benchmark" };
    cli_tokenize(out, &in, b->m, text, strlen(text));
    if (out->n == 0) add_random(b, i, n, out);
}
