/* q3n logits: what the model gives for a text, in numbers. */
#include "cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct scores {
    const cli_ids *ids;
    int      vocab, all;
    int      json;
    float   *last;               /* [vocab]  of the last position                       */
    int32_t *argmax;             /* [n]                                                 */
    float   *logprobs;           /* [n - 1]  of ids[t + 1] at position t                */
} scores;

/* Scores of one position; with all and json its logits are printed as they come. */
static void add_row(void *user, int position, const float *logits)
{
    scores *s = user;
    const size_t t = (size_t)position;
    s->argmax[t] = cli_argmax(logits, s->vocab);
    if (t + 1 < s->ids->n) {
        const double x = (double)logits[s->ids->id[t + 1]];
        s->logprobs[t] = (float)(x - cli_log_sum_exp(logits, s->vocab));
    } else {
        memcpy(s->last, logits, (size_t)s->vocab * sizeof *logits);
    }
    if (s->all && s->json) {
        fputs(t ? ", " : "{\"all_logits\": [", stdout);
        cli_json_reals(stdout, logits, (size_t)s->vocab);
        if (t + 1 == s->ids->n) fputs("], ", stdout);
    }
}

static void print_json(const scores *s)
{
    printf("%s\"logits\": ", s->all ? "" : "{");
    cli_json_reals(stdout, s->last, (size_t)s->vocab);
    printf(", \"argmax\": ");
    cli_json_ids(stdout, s->argmax, s->ids->n);
    printf(", \"logprobs\": ");
    cli_json_reals(stdout, s->logprobs, s->ids->n - 1);
    printf("}\n");
    fflush(stdout);
}

static void print_positions(const scores *s, const q3n_model *m)
{
    printf("%8s %8s %8s %12s  text\n", "position", "id", "argmax", "log p(next)");
    for (size_t t = 0; t < s->ids->n; t++) {
        printf("%8zu %8ld %8ld ", t, (long)s->ids->id[t], (long)s->argmax[t]);
        if (t + 1 < s->ids->n) printf("%12.5f  ", (double)s->logprobs[t]);
        else                   printf("%12s  ", "");
        cli_print_piece(stdout, m, s->ids->id[t]);
        printf("\n");
    }
}

static void print_top(const scores *s, const q3n_model *m)
{
    const double norm  = cli_log_sum_exp(s->last, s->vocab);
    const int    n_top = s->vocab < 10 ? s->vocab : 10;
    char *taken = cli_alloc((size_t)s->vocab, 1);
    printf("after %zu tokens\n%8s %12s %12s  text\n", s->ids->n, "id", "logit", "probability");
    for (int rank = 0; rank < n_top; rank++) {
        int best = -1;
        for (int i = 0; i < s->vocab; i++) {
            if (!taken[i] && (best < 0 || s->last[i] > s->last[best])) best = i;
        }
        taken[best] = 1;
        const double x = (double)s->last[best];
        printf("%8d %12.5f %12.6f  ", best, x, exp(x - norm));
        cli_print_piece(stdout, m, best);
        printf("\n");
    }
    free(taken);
}

static void score_case(q3n_session *session, const q3n_model *m, scores *s,
                       const cli_pieces *pieces)
{
    s->vocab    = q3n_model_config(m)->vocab_size;
    s->last     = cli_alloc((size_t)s->vocab, sizeof *s->last);
    s->argmax   = cli_alloc(s->ids->n, sizeof *s->argmax);
    s->logprobs = cli_alloc(s->ids->n, sizeof *s->logprobs);
    cli_eval_rows(session, m, s->ids, pieces, add_row, s);
    if (s->json) {
        print_json(s);
    } else {
        if (s->all) print_positions(s, m);
        print_top(s, m);
    }
    free(s->last);
    free(s->argmax);
    free(s->logprobs);
}

int cmd_logits(int argc, char **argv)
{
    cli_setup setup = { 0 };
    cli_input in = { .around = Q3N_TOKENIZE_PREFIX };
    int all = 0, json = 0;
    const char *piece_list = NULL;
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(setup),
        CLI_INPUT_OPTIONS(in),
        { "--all", NULL, CLI_FLAG, &all, 0, 0, "every position, not only the last" },
        { "--json", NULL, CLI_FLAG, &json, 0, 0, "one object a line: logits, argmax, logprobs" },
        { "--pieces", "LIST", CLI_TEXT, &piece_list, 0, 0,
          "evaluate in pieces of these sizes, in turn (1: token by token)" },
        CLI_SESSION_OPTIONS(setup),
    };
    const cli_syntax syntax = {
        "logits MODEL.q3n [TEXT] [options]",
        "Evaluates token ids or a text and prints the logits after the last token.  --json adds\n"
        "the argmax of every position and the log-probability of each next given token; with\n"
        "--all also \"all_logits\".  Several cases (--ids-file) give one object a line.",
        options, CLI_COUNT(options), 3, NULL, NULL,
    };
    cli_words words;
    if (!cli_parse(&syntax, argc, argv, &words)) return cli_finish();
    cli_pieces pieces = { .n = 0 };
    if (piece_list) {
        pieces.n = cli_parse_list("--pieces", piece_list, 1, pieces.size, CLI_MAX_PIECES);
    }

    q3n_model *m = cli_open_model(&setup, &words);
    cli_cases cases = { 0 };
    cli_input_choose(&in, &setup, &words);
    cli_input_cases(&cases, &in, m);
    q3n_session *session = cli_open_session(&setup, m, cli_cases_longest(&cases), 0);
    for (size_t i = 0; i < cases.n; i++) {
        scores s = { .ids = &cases.item[i], .all = all, .json = json };
        score_case(session, m, &s, &pieces);
    }
    q3n_session_destroy(session);
    cli_cases_free(&cases);
    q3n_model_close(m);
    return cli_finish();
}
