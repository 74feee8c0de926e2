/* q3n verify: reads every tensor and compares its checksum. */
#include "cli.h"

int cmd_verify(int argc, char **argv)
{
    cli_setup setup = { 0 };
    const cli_option options[] = { CLI_MODEL_OPTIONS(setup) };
    const cli_syntax syntax = {
        "verify MODEL.q3n",
        "Reads every tensor of a model and compares its checksum; fails at the first difference.",
        options, CLI_COUNT(options), 1, NULL, NULL,
    };
    cli_words words;
    if (!cli_parse(&syntax, argc, argv, &words)) return cli_finish();
    q3n_model *m = cli_open_model(&setup, &words);
    cli_catch_interrupt();
    cli_bar bar = cli_bar_begin("verify", "B");
    const q3n_progress progress = { cli_bar_report, &bar };
    q3n_error err = { .offset = -1 };
    const q3n_result r = q3n_model_verify(m, &progress, &err);
    cli_bar_end(&bar);
    if (r != Q3N_OK) cli_fail_with(setup.model, &err);

    q3n_model_stats stats = Q3N_INIT(q3n_model_stats);
    char size[32];
    q3n_model_stats_get(m, &stats);
    printf("%s: %d tensors, %s: all checksums match\n", setup.model, q3n_model_n_tensors(m),
           cli_format_bytes(size, (double)stats.file_bytes));
    q3n_model_close(m);
    return cli_finish();
}
