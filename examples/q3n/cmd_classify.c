/* q3n classify: the scores of a classification model. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

static void json_scores(const q3n_model *m, const float *scores, const float *probability)
{
    const int n = q3n_model_config(m)->num_labels, label = cli_argmax(scores, n);
    printf("{\"scores\": ");
    cli_json_reals(stdout, scores, (size_t)n);
    printf(", \"probabilities\": ");
    cli_json_reals(stdout, probability, (size_t)n);
    printf(", \"label\": %d", label);
    const char *name = q3n_model_label(m, label);
    if (name) {
        printf(", \"name\": ");
        cli_json_string(stdout, name, strlen(name));
    }
    printf("}\n");
}

/* Values of a regression stand alone; one label has no rival to be marked against. */
static void print_scores(const q3n_model *m, const float *scores, const float *probability)
{
    const q3n_config *c = q3n_model_config(m);
    const int n = c->num_labels, label = cli_argmax(scores, n);
    const int many = c->problem_type == Q3N_PROBLEM_MULTI_LABEL_CLASSIFICATION;
    for (int i = 0; i < n; i++) {
        const char *name = q3n_model_label(m, i);
        printf("%5d %12.5f", i, (double)scores[i]);
        if (c->problem_type != Q3N_PROBLEM_REGRESSION) {
            printf("  %5.1f %%%s", 100.0 * (double)probability[i],
                   n > 1 && !many ? i == label ? "  <" : "   " : "");
        }
        if (name) {
            printf("  ");
            cli_print_text(stdout, name, strlen(name));
        }
        printf("\n");
    }
}

int cmd_classify(int argc, char **argv)
{
    cli_setup setup = { 0 };
    cli_input in = { .around = Q3N_TOKENIZE_WHOLE };
    int json = 0;
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(setup),
        CLI_INPUT_OPTIONS(in),
        { "--json", NULL, CLI_FLAG, &json, 0, 0,
          "{\"scores\": [...], \"probabilities\": [...], \"label\": i}, one a line" },
        CLI_SESSION_OPTIONS(setup),
    };
    const cli_syntax syntax = {
        "classify MODEL.q3n [TEXT] [options]",
        "Prints number, score, probability and name of every label for a text: probabilities of\n"
        "one, or of each by itself, as the model's problem_type says; a regression has none.",
        options, CLI_COUNT(options), 3, NULL, NULL,
    };
    cli_words words;
    if (!cli_parse(&syntax, argc, argv, &words)) return cli_finish();
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
    float *probability = cli_alloc((size_t)n_labels, sizeof *probability);
    for (size_t i = 0; i < cases.n; i++) {
        const cli_ids *ids = &cases.item[i];
        cli_check(q3n_session_classify(s, ids->id, (int)ids->n, scores), s);
        (void)q3n_model_probabilities(m, scores, probability);   /* fails without labels only */
        if (!json && cases.n > 1) printf("case %zu\n", i + 1);
        if (json) json_scores(m, scores, probability);
        else      print_scores(m, scores, probability);
        fflush(stdout);
    }
    free(probability);
    free(scores);
    q3n_session_destroy(s);
    cli_cases_free(&cases);
    q3n_model_close(m);
    return cli_finish();
}
