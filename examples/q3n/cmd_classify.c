/* q3n classify: the scores of a classification model. */
#include "cli.h"

#include <math.h>
#include <stdlib.h>

static void print_scores(const float *scores, int n, int json)
{
    const int label = cli_argmax(scores, n);
    if (json) {
        printf("{\"scores\": ");
        cli_json_reals(stdout, scores, (size_t)n);
        printf(", \"label\": %d}\n", label);
        return;
    }
    const double norm = cli_log_sum_exp(scores, n);
    for (int i = 0; i < n; i++) {
        printf("%5d %12.5f  %5.1f %%%s\n", i, (double)scores[i],
               100.0 * exp((double)scores[i] - norm), i == label ? "  <" : "");
    }
}

int cmd_classify(int argc, char **argv)
{
    cli_setup setup = { 0 };
    cli_input in = { 0 };
    int json = 0;
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(setup),
        CLI_INPUT_OPTIONS(in),
        { "--json", NULL, CLI_FLAG, &json, 0, 0, "{\"scores\": [...], \"label\": i}, one a line" },
        CLI_SESSION_OPTIONS(setup),
    };
    const cli_syntax syntax = {
        "classify MODEL.q3n [TEXT] [options]",
        "Prints label, score and probability of every class for a text.",
        options, CLI_COUNT(options), 3, NULL, NULL,
    };
    cli_words words;
    cli_parse(&syntax, argc, argv, &words);
    q3n_model *m = cli_open_model(&setup, &words);
    const int n_labels = q3n_model_config(m)->num_labels;
    if (n_labels == 0) {
        cli_fail("%s has no classification head (num_labels is 0): q3n logits evaluates it",
                 setup.model);
    }

    cli_cases cases = { 0 };
    cli_input_choose(&in, &setup, &words);
    cli_input_cases(&cases, &in, m);
    q3n_session *s = cli_open_session(&setup, m, cli_cases_longest(&cases), 0);
    float *scores = cli_alloc((size_t)n_labels, sizeof *scores);
    for (size_t i = 0; i < cases.n; i++) {
        const cli_ids *ids = &cases.item[i];
        if (q3n_session_classify(s, ids->id, (int)ids->n, scores) != Q3N_OK) {
            cli_fail_with("evaluation", q3n_session_error(s));
        }
        if (!json && cases.n > 1) printf("case %zu\n", i + 1);
        print_scores(scores, n_labels, json);
        fflush(stdout);
    }
    free(scores);
    q3n_session_destroy(s);
    cli_cases_free(&cases);
    q3n_model_close(m);
    return cli_finish();
}
