/* Completion of q3n's commands and options for bash, zsh and fish.
 *
 * One row of shells[] writes the head, each command's table and the tail.  A value is one of a
 * table's names, a file, or something that only the user knows.
 */
#include "cli.h"

#include <string.h>

static int is_path(const char *value)
{
    const size_t n = strlen(value);
    return strcmp(value, "FILE") == 0 || strcmp(value, "DIR") == 0
        || (n > 4 && strcmp(value + n - 4, ".q3n") == 0);
}

static void print_command_name(const cli_syntax *syntax)
{
    printf("%.*s", (int)strcspn(syntax->synopsis, " "), syntax->synopsis);
}

/* Is it q3n help, whose word is a command? */
static int takes_command(const cli_syntax *syntax)
{
    return strncmp(syntax->synopsis, "help ", 5) == 0;
}

static void print_commands(const char *before_each)
{
    const cli_command *c;
    for (int i = 0; (c = cli_command_at(i)) != NULL; i++) printf("%s%s", before_each, c->name);
}

static void print_choices(cli_kind kind)
{
    for (int i = 0; cli_choice_at(kind, i); i++) {
        printf("%s%s", i ? " " : "", cli_choice_at(kind, i));
    }
}

/* Text inside single quotes: those of it end the quotes for a moment, special characters get a
 * backslash. */
static void print_quoted(const char *text, const char *special)
{
    for (const char *p = text; *p; p++) {
        if (*p == '\'') printf("'\\''");
        else            printf("%s%c", strchr(special, *p) ? "\\" : "", *p);
    }
}

/* ---- bash ---- */

static void bash_head(void)
{
    printf("# Made by q3n help --completion bash.\n"
           "_q3n()\n{\n"
           "    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}\n"
           "    local options='' words=''\n"
           "    COMPREPLY=()\n"
           "    if [[ $current == = ]]; then current=''; fi\n"
           "    if [[ $previous == = ]]; then previous=${COMP_WORDS[COMP_CWORD-2]}; fi\n"
           "    if [[ $COMP_CWORD == 1 ]]; then\n"
           "        words='--help --version");
    print_commands(" ");
    printf("'\n    fi\n"
           "    case ${COMP_WORDS[1]} in\n");
}

static void bash_command(const cli_syntax *syntax)
{
    printf("        ");
    print_command_name(syntax);
    printf(")\n            options='%s", cli_help_option.names);
    for (int i = 0; i < syntax->n_options; i++) printf(" %s", syntax->options[i].names);
    printf("'\n            case $previous in\n");
    for (int i = 0; i < syntax->n_options; i++) {
        const cli_option *o = &syntax->options[i];
        if (!cli_choice_at(o->kind, 0)) continue;
        printf("                ");
        for (const char *p = o->names; *p; p++) printf("%c", *p == ' ' ? '|' : *p);
        printf(") words='");
        print_choices(o->kind);
        printf("' ;;\n");
    }
    if (takes_command(syntax)) {
        printf("                help) words='");
        print_commands(" ");
        printf("' ;;\n");
    }
    printf("            esac ;;\n");
}

static void bash_tail(void)
{
    printf("    esac\n"
           "    if [[ $current == -* && $COMP_CWORD != 1 ]]; then words=$options; fi\n"
           "    if [[ $words ]]; then COMPREPLY=($(compgen -W \"$words\" -- \"$current\")); fi\n"
           "}\n"
           "complete -o default -F _q3n q3n\n");
}

/* ---- zsh ---- */

static void zsh_head(void)
{
    const cli_command *c;
    printf("#compdef q3n\n# Made by q3n help --completion zsh.\n"
           "_q3n()\n{\n    local -a commands\n    commands=(\n");
    for (int i = 0; (c = cli_command_at(i)) != NULL; i++) {
        printf("        '%s:", c->name);
        print_quoted(c->about, ":");
        printf("'\n");
    }
    printf("    )\n"
           "    if (( CURRENT == 2 )); then\n"
           "        _describe -t commands command commands\n"
           "        return\n"
           "    fi\n"
           "    local command=$words[2]\n"
           "    shift words\n"
           "    (( CURRENT-- ))\n"
           "    case $command in\n");
}

static void zsh_option(const cli_option *o)
{
    const int several = strchr(o->names, ' ') != NULL;
    printf("                ");
    if (several) printf("'(%s)'{", o->names);
    const char *names = o->names, *name;
    for (size_t n; (name = cli_next_name(&names, &n)) != NULL;) {
        printf("%s%.*s%s", several ? "" : "'", (int)n, name, o->value && n > 2 ? "=" : "");
        if (*names) printf(",");
    }
    printf("%s[", several ? "}'" : "");
    print_quoted(o->help, "[]:\\");
    printf("]");
    if (o->value) {
        printf(":");
        print_quoted(o->value, ":\\");
        printf(":");
        if (cli_choice_at(o->kind, 0)) {
            printf("(");
            print_choices(o->kind);
            printf(")");
        } else {
            printf("%s", is_path(o->value) ? "_files" : " ");
        }
    }
    printf("' \\\n");
}

static void zsh_command(const cli_syntax *syntax)
{
    printf("        ");
    print_command_name(syntax);
    printf(")\n            _arguments \\\n");
    for (int i = 0; i < syntax->n_options; i++) zsh_option(&syntax->options[i]);
    zsh_option(&cli_help_option);
    if (takes_command(syntax)) {
        printf("                ':command:(");
        print_commands(" ");
        printf(")' ;;\n");
    } else {
        printf("                '*:file:_files' ;;\n");
    }
}

static void zsh_tail(void)
{
    printf("    esac\n}\n\n"
           "if [[ $funcstack[1] == _q3n ]]; then _q3n \"$@\"; else compdef _q3n q3n; fi\n");
}

/* ---- fish ---- */

static void fish_head(void)
{
    const cli_command *c;
    printf("# Made by q3n help --completion fish.\n"
           "complete -c q3n -n __fish_use_subcommand -l help -f -d 'list the commands'\n"
           "complete -c q3n -n __fish_use_subcommand -l version -f -d 'print the version'\n");
    for (int i = 0; (c = cli_command_at(i)) != NULL; i++) {
        printf("complete -c q3n -n __fish_use_subcommand -f -a %s -d '", c->name);
        print_quoted(c->about, "\\");
        printf("'\n");
    }
    printf("complete -c q3n -n '__fish_seen_subcommand_from help' -f -a '");
    print_commands(" ");
    printf("'\n");
}

static void fish_option(const cli_syntax *syntax, const cli_option *o)
{
    printf("complete -c q3n -n '__fish_seen_subcommand_from ");
    print_command_name(syntax);
    printf("'");
    const char *names = o->names, *name;
    for (size_t n; (name = cli_next_name(&names, &n)) != NULL;) {
        if (strncmp(name, "--", 2) == 0) printf(" -l %.*s", (int)n - 2, name + 2);
        else                             printf(" -s %.*s", (int)n - 1, name + 1);
    }
    if (cli_choice_at(o->kind, 0)) {
        printf(" -x -a '");
        print_choices(o->kind);
        printf("'");
    } else if (o->value) {
        printf("%s", is_path(o->value) ? " -r -F" : " -x");
    }
    printf(" -d '");
    print_quoted(o->help, "\\");
    printf("'\n");
}

static void fish_command(const cli_syntax *syntax)
{
    for (int i = 0; i < syntax->n_options; i++) fish_option(syntax, &syntax->options[i]);
    fish_option(syntax, &cli_help_option);
}

/* ---- All ---- */

void cli_print_completion(const char *shell)
{
    static const struct {
        const char      *name;
        void           (*head)(void);
        cli_describe_fn *command;
        void           (*tail)(void);      /* NULL = nothing */
    } shells[] = {
        { "bash", bash_head, bash_command, bash_tail },
        { "zsh",  zsh_head,  zsh_command,  zsh_tail },
        { "fish", fish_head, fish_command, NULL },
    };
    for (int i = 0; i < CLI_COUNT(shells); i++) {
        if (strcmp(shells[i].name, shell) != 0) continue;
        shells[i].head();
        cli_describe_all(shells[i].command);
        if (shells[i].tail) shells[i].tail();
    }
}
