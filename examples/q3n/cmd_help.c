/* q3n help: the options of a command, the manual page, completion for shells; all of it comes from
 * the tables that parse. */
#include "cli.h"

#include <string.h>

/* Runs the command with --help. */
static int describe(const char *command)
{
    char name[32], option[] = "--help";
    snprintf(name, sizeof name, "%s", command);
    char *asked[] = { name, option, NULL };
    return cli_run_command(2, asked);
}

void cli_describe_all(cli_describe_fn *fn)
{
    const cli_command *c;
    cli_describe_by(fn);
    for (int i = 0; (c = cli_command_at(i)) != NULL; i++) describe(c->name);
}

/* ---- The manual page: roff with the macros of man(7) ---- */

/* No byte of the text is a command to roff, and an empty line begins a paragraph. */
static void print_roff(const char *text)
{
    for (const char *p = text; *p; p++) {
        const int begins = p == text || p[-1] == '\n';
        if (begins && *p == '\n') {
            printf(".PP\n");
            continue;
        }
        if (begins && (*p == '.' || *p == '\'')) printf("\\&");
        if (*p == '\\')     printf("\\e");
        else if (*p == '-') printf("\\-");
        else                printf("%c", *p);
    }
}

/* "-n --tokens" in bold with commas, then the value in italics. */
static void print_roff_option(const cli_option *o)
{
    const char *names = o->names, *next;
    char name[80];
    printf(".TP\n\\fB");
    for (size_t n; (next = cli_next_name(&names, &n)) != NULL;) {
        snprintf(name, sizeof name, "%.*s", (int)n, next);
        print_roff(name);
        if (*names) printf("\\fR, \\fB");
    }
    if (o->value) {
        printf("\\fR \\fI");
        print_roff(o->value);
    }
    printf("\\fR\n");
    print_roff(o->help);
    for (int i = 0; cli_choice_at(o->kind, i); i++) {
        printf("%s", i ? ", " : "\n.br\n");
        print_roff(cli_choice_at(o->kind, i));
    }
    printf("\n");
}

static void print_roff_command(const cli_syntax *syntax)
{
    printf(".SS \"q3n ");
    print_roff(syntax->synopsis);
    printf("\"\n");
    print_roff(syntax->about);
    printf("\n");
    for (int i = 0; i < syntax->n_options; i++) print_roff_option(&syntax->options[i]);
    print_roff_option(&cli_help_option);
}

static void print_man(void)
{
    const cli_command *c;
    printf(".\\\" Made by q3n help --man.\n.TH Q3N 1 \"\" \"");
    cli_print_version();
    printf("\" \"User Commands\"\n"
           ".SH NAME\nq3n \\- run, examine and make .q3n language models\n"
           ".SH SYNOPSIS\n.B q3n\n\\fICOMMAND\\fR \\fIMODEL.q3n\\fR [\\fIoptions\\fR]\n.br\n"
           ".B q3n\n\\fB\\-\\-help\\fR | \\fB\\-\\-version\\fR\n"
           ".SH DESCRIPTION\n"
           "Runs Qwen3-Next, Qwen3.5, Qwen3-MoE and Qwen3 models on the CPU.  A model is a file,\n"
           "made from a published checkpoint by\n.BR q3n\\-convert .\n"
           "An option may also be written \\fB\\-\\-name=value\\fR; \\fB\\-\\-\\fR ends the\n"
           "options.  The commands:\n");
    for (int i = 0; (c = cli_command_at(i)) != NULL; i++) {
        printf(".TP\n.B %s\n%s\n", c->name, c->about);
    }
    printf(".SH COMMANDS\n");
    cli_describe_all(print_roff_command);
    printf(".SH EXIT STATUS\n" CLI_EXIT_STATUS "\n"
           ".SH SEE ALSO\n.B q3n\\-convert \\-\\-help\n");
}

/* ---- The command ---- */

int cmd_help(int argc, char **argv)
{
    int man = 0;
    const char *shell = NULL;
    const cli_option options[] = {
        { "--man", NULL, CLI_FLAG, &man, 0, 0, "the manual page of all commands, for man(1)" },
        { "--completion", "SHELL", CLI_SHELL, &shell, 0, 0, "what completes commands and options" },
    };
    const cli_syntax syntax = {
        "help [COMMAND] [options]",
        "Prints what there is to know: the commands, or the options of one; the manual page\n"
        "(q3n help --man > q3n.1); completion (eval \"$(q3n help --completion bash)\").",
        options, CLI_COUNT(options), 1, NULL, NULL,
    };
    cli_words words;
    if (!cli_parse(&syntax, argc, argv, &words)) return cli_finish();
    if (man + (shell != NULL) + words.n > 1) {
        cli_misuse("give one of COMMAND, --man and --completion");
    }
    if (words.n)    return describe(words.word[0]);
    if (man)        print_man();
    else if (shell) cli_print_completion(shell);
    else            cli_print_usage(stdout);
    return cli_finish();
}
