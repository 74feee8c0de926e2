/* q3n: run, examine and make .q3n models from the command line.
 *
 *     q3n COMMAND MODEL.q3n [options]
 *     q3n --help              the commands
 *     q3n COMMAND --help      what one takes
 *     q3n help --man          all of it as a manual page
 */
#include "cli.h"

#include <string.h>

static const cli_command commands[] = {
    { "run",        cmd_run,        "write text from a prompt" },
    { "info",       cmd_info,       "configuration, types, sizes, memory plan" },
    { "logits",     cmd_logits,     "logits, argmax and log-probabilities for token ids" },
    { "tokenize",   cmd_tokenize,   "text to token ids" },
    { "detokenize", cmd_detokenize, "token ids to text" },
    { "render",     cmd_render,     "messages to a prompt, by a chat template" },
    { "classify",   cmd_classify,   "scores of a classification model" },
    { "perplexity", cmd_perplexity, "how well the model predicts a text" },
    { "experts",    cmd_experts,    "how often each expert is chosen on a text" },
    { "init",       cmd_init,       "make a model with random weights" },
    { "quantize",   cmd_quantize,   "copy a model in smaller types" },
    { "bench",      cmd_bench,      "tokens per second, bytes per token, share of the bandwidth" },
    { "verify",     cmd_verify,     "compare the checksums of all tensors" },
    { "help",       cmd_help,       "options of a command, the manual page, shell completion" },
};

const cli_command *cli_command_at(int i)
{
    return i < CLI_COUNT(commands) ? &commands[i] : NULL;
}

void cli_print_usage(FILE *f)
{
    fprintf(f, "Usage: q3n COMMAND MODEL.q3n [options]\n\n");
    for (int i = 0; i < CLI_COUNT(commands); i++) {
        fprintf(f, "  %-11s %s\n", commands[i].name, commands[i].about);
    }
    fprintf(f, "\nq3n COMMAND --help shows the options of a command, q3n --version the version.\n"
               "Exit status: " CLI_EXIT_STATUS "\n");
}

void cli_print_version(void)
{
    const int v = q3n_version();
    printf("q3n %d.%d.%d", v / 10000, v / 100 % 100, v % 100);
}

int cli_run_command(int argc, char **argv)
{
    for (int i = 0; i < CLI_COUNT(commands); i++) {
        if (strcmp(argv[0], commands[i].name) == 0) {
            cli_name_command(commands[i].name);
            return commands[i].run(argc, argv);
        }
    }
    const char *meant = NULL;
    int best = 3;
    for (int i = 0; i < CLI_COUNT(commands); i++) {
        const char *name = cli_nearest(commands[i].name, argv[0], strlen(argv[0]), &best);
        if (name) meant = name;
    }
    if (meant) cli_misuse("unknown command '%s' (is it %s?)", argv[0], meant);
    cli_misuse("unknown command '%s'", argv[0]);
}

int main(int argc, char **argv)
{
    cli_prepare(&argc, &argv);
    if (argc < 2) {
        cli_print_usage(stderr);
        return CLI_MISUSE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        cli_print_usage(stdout);
        return cli_finish();
    }
    if (strcmp(argv[1], "--version") == 0) {
        cli_print_version();
        printf("\n");
        return cli_finish();
    }
    return cli_run_command(argc - 1, argv + 1);
}
