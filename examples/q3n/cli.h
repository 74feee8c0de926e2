/* What the commands of q3n share: errors, options, files, JSON, token ids, models, progress.
 *
 * A command is a function in cmd_*.c that parses its options and works; whatever goes wrong ends
 * the program through cli_fail (status 1) or cli_misuse (status 2), one line on stderr.  The
 * system then takes memory back, so only the paths that succeed release it.  What outlives the
 * program is finished or removed after an interrupt too (SIGINT, SIGTERM, SIGHUP); then the status
 * is 128 + the signal's number.
 */
#ifndef Q3N_CLI_H
#define Q3N_CLI_H

#include "../../qwen3next.h"

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#if defined(__GNUC__)
#  define CLI_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#  define CLI_PRINTF(text, first)
#endif

#define CLI_COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

enum { CLI_FAILURE = 1, CLI_MISUSE = 2 };
#define CLI_EXIT_STATUS \
    "0 success, 1 failure, 2 wrong usage, 130 interrupted (128 + the signal's number)."

/* ---- report.c: what people read ---- */

void cli_name_command(const char *name);    /* for "see q3n NAME --help" */
_Noreturn void cli_fail(const char *format, ...) CLI_PRINTF(1, 2);
_Noreturn void cli_misuse(const char *format, ...) CLI_PRINTF(1, 2);
void cli_warn(const char *format, ...) CLI_PRINTF(1, 2);
/* Ends the program with subject and message of err, which must come from the failed call; after an
 * interrupt, which made the call fail, with that status. */
_Noreturn void cli_fail_with(const char *subject, const q3n_error *err);
_Noreturn void cli_stop(void);              /* after an interrupt, when all is tidy */
/* Flushes stdout and fails if anything could not be written.  Returns 0: the exit status. */
int cli_finish(void);

/* "13.4 GB", "7.4 M": text has room for 32 bytes and is returned. */
const char *cli_format_bytes(char text[32], double bytes);
const char *cli_format_count(char text[32], double count);
/* Text of one token on one line: control characters escaped, bytes that are no UTF-8 as \xNN. */
void cli_print_piece(FILE *f, const q3n_model *m, int32_t id);
/* Text of a file, with its control characters and what is no UTF-8 made visible. */
void cli_print_text(FILE *f, const char *text, size_t n);

/* A bar on stderr, drawn only if that is a terminal. */
typedef struct cli_bar {
    const char *label;
    const char *unit;            /* "B", "tokens", ... */
    int         drawn;
    double      start, shown;    /* seconds */
} cli_bar;

cli_bar cli_bar_begin(const char *label, const char *unit);
void    cli_bar_update(cli_bar *bar, int64_t done, int64_t total, const char *note);
void    cli_bar_end(cli_bar *bar);
/* For q3n_progress: user is a cli_bar.  Stops the work after an interrupt. */
int     cli_bar_report(void *user, int64_t done, int64_t total);

/* ---- platform.c ---- */

double cli_clock(void);                     /* seconds, monotonic */
int    cli_is_terminal(FILE *f);
/* First of all: arguments in UTF-8, no newline translation on stdin and stdout. */
void   cli_prepare(int *argc, char ***argv);
/* A file or a pipe to read; NULL, and why, if it is neither.  Does not wait for a writer: a pipe
 * that has none is empty. */
FILE  *cli_open_stream(const char *path, const char **why);
void   cli_catch_interrupt(void);           /* from now on the first one only sets a flag */
int    cli_interrupted(void);               /* 0, or the exit status */
int    cli_n_cpus(void);                    /* that this process may use */
#define CLI_NAME_ROOM 128
const char *cli_cpu_name(char text[CLI_NAME_ROOM]);     /* "unknown" if the system does not say */
size_t cli_peak_memory(void);               /* most bytes that were resident; 0 = unknown */
size_t cli_physical_memory(void);           /* bytes of this machine; 0 = unknown */
/* Bytes of all caches from level 2 on that the CPUs of this process have; 0 = unknown. */
size_t cli_cache_bytes(void);
/* Large memory, aligned to 64 bytes at least, in huge pages where the system has them.  What is in
 * it is undefined; never NULL. */
void  *cli_alloc_pages(size_t bytes);
void   cli_free_pages(void *memory);
/* Makes an empty file of a new name where the system keeps such; it goes when the program exits.
 * Once in a program. */
const char *cli_scratch_file(void);
/* Runs fn(arg, i) for i in [0, n), each on its own thread. */
void   cli_run_threads(int n, void (*fn)(void *arg, int i), void *arg);

/* ---- memory.c: memory, files ---- */

void *cli_alloc(size_t count, size_t size);           /* zeroed; never NULL */
void *cli_grow(void *memory, size_t count, size_t size);

typedef struct cli_buffer {
    char  *data;                 /* always followed by a 0 once something was added */
    size_t n, room;
} cli_buffer;

void cli_buffer_add(cli_buffer *b, const char *bytes, size_t n);
void cli_buffer_free(cli_buffer *b);
/* The path "-" is stdin. */
FILE *cli_open_file(const char *path);
int64_t cli_file_bytes(const char *path);             /* fails if there is no such file */
const char *cli_file_name(const char *path);          /* for messages */
void  cli_close_file(FILE *f);
void  cli_read_file(cli_buffer *out, const char *path);    /* CLI_TEXT_BYTES at most */
#define CLI_TEXT_BYTES ((size_t)1 << 30)
/* One line without its end, as long at most.  Returns 0 at the end of the file. */
int   cli_read_line(cli_buffer *out, FILE *f, const char *path);

/* ---- options.c ---- */

/* From CLI_ISA on: one name of a table, which parses the value and is listed after the help. */
typedef enum cli_kind {
    CLI_FLAG, CLI_INT, CLI_U64, CLI_REAL, CLI_TEXT,
    CLI_ISA, CLI_TYPE, CLI_KV_TYPE, CLI_STATE_TYPE, CLI_SPECULATE, CLI_RECIPE, CLI_SHELL
} cli_kind;

typedef struct cli_option {
    const char *names;           /* "-n --tokens" */
    const char *value;           /* what --help calls the value; NULL for a flag */
    cli_kind    kind;
    void       *target;          /* int, int, uint64_t, double or else const char * */
    double      min, max;        /* of CLI_INT and CLI_REAL */
    const char *help;
} cli_option;

#define CLI_MAX_WORDS 4096

typedef struct cli_syntax {
    const char       *synopsis;  /* after "q3n" */
    const char       *about;
    const cli_option *options;
    int               n_options;
    int               max_words; /* words that are no option: the model, a text, ... */
    /* Takes "--name value" that is not in options; NULL = such an option is an error. */
    void            (*other)(void *user, const char *name, const char *value);
    void             *user;
} cli_syntax;

typedef struct cli_words {
    const char *word[CLI_MAX_WORDS];
    int         n;
} cli_words;

/* Fills the options' targets.  Returns 0 if --help was asked for and printed: the command ends. */
int cli_parse(const cli_syntax *syntax, int argc, char **argv, cli_words *words);

/* From now on --help calls fn instead of printing help: manual and completion are made so. */
typedef void cli_describe_fn(const cli_syntax *syntax);
void cli_describe_by(cli_describe_fn *fn);
extern const cli_option cli_help_option;    /* -h --help, which every command has */

/* Takes the next of names ("-n --tokens"), of n bytes; NULL after the last. */
const char *cli_next_name(const char **names, size_t *n);
/* Name i of the table of a kind, NULL after the last and for kinds without a table. */
const char *cli_choice_at(cli_kind kind, int i);
q3n_isa     cli_isa(int i);                 /* i of Q3N_ISA_LIST, AUTO after the last */

/* The name that is meant by the len bytes of typed, if one of names ("--a --b") is near; *best is
 * the distance that must be beaten, and then what it is. */
const char *cli_nearest(const char *names, const char *typed, size_t len, int *best);

int64_t  cli_parse_int(const char *name, const char *text, int64_t min, int64_t max);
double   cli_parse_real(const char *name, const char *text, double min, double max);
/* "1,2,4" or "1 2 4" to values [max]; returns how many, at least 1. */
int      cli_parse_list(const char *name, const char *text, int min, int *values, int max);

/* ---- geometry.c ---- */

enum { CLI_MAX_OVERRIDES = 128 };

/* A preset and the fields to set once it is known, in the order given. */
typedef struct cli_geometry {
    const char *preset;
    char        field[CLI_MAX_OVERRIDES][64];
    const char *value[CLI_MAX_OVERRIDES];
    int         n;
} cli_geometry;

/* For cli_syntax.other: --FIELD VALUE and --set FIELD=VALUE; user is a cli_geometry. */
void     cli_geometry_option(void *user, const char *name, const char *value);
void     cli_geometry_config(const cli_geometry *g, q3n_config *c);   /* fails if it does not fit */
q3n_type cli_type(const char *name);           /* of a CLI_TYPE; NULL is bf16 */

/* ---- json.c ---- */

/* Bytes of the UTF-8 character at p [n], 1 to 4; 0 if it is none (a surrogate, overlong, cut). */
size_t cli_character_length(const unsigned char *p, size_t n);

void cli_json_string(FILE *f, const char *bytes, size_t n);   /* bad UTF-8 becomes U+FFFD */
void cli_json_member(FILE *f, const char *key, const char *text);   /* "key": "text" */
void cli_json_real(FILE *f, double x);                        /* 9 digits; null if not finite */
void cli_json_reals(FILE *f, const float *x, size_t n);
void cli_json_ids(FILE *f, const int32_t *ids, size_t n);
/* Reads a text that is one JSON string.  Returns NULL or what is wrong, *at is the byte. */
const char *cli_json_read_string(cli_buffer *out, const char *text, size_t n, size_t *at);

/* ---- What opens a model and makes sessions ---- */

typedef struct cli_setup {
    const char *model;
    int         verbose;
    int         ctx, draft;            /* 0 = default */
    const char *isa, *kv, *speculate, *snapshot_type;
    q3n_engine_options engine;         /* size and isa are set when the model is opened */
    q3n_allocator allocator;           /* of the model and its sessions */
} cli_setup;

/* ---- input.c: token ids from options, files and texts ---- */

typedef struct cli_ids {
    int32_t *id;
    size_t   n, room;
} cli_ids;

typedef struct cli_cases {
    cli_ids *item;
    size_t   n, room;
} cli_cases;

typedef struct cli_input {
    const char *prompt, *file, *ids, *ids_file;
    int         no_special;      /* special tokens in a text are plain text */
    int         around;          /* Q3N_TOKENIZE_PREFIX, _WHOLE: what a text of this command gets */
    int         alone;           /* 1 = and yet nothing */
    int         drop_newline;    /* the last newline of a text file does not count */
    int         piped;           /* 1 = nothing was given, so the text is stdin */
    const char *model, *source;  /* for errors: the file, and which of these it is */
} cli_input;

#define CLI_TEXT_OPTIONS(in)                                                                      \
    { "-p --prompt", "TEXT", CLI_TEXT, &(in).prompt, 0, 0,                                        \
      "the text, if not the word after the model or stdin" },                                     \
    { "-f --file", "FILE", CLI_TEXT, &(in).file, 0, 0, "the text from a file; - is stdin" }

#define CLI_SPECIAL_OPTIONS(in)                                                                   \
    { "--no-add-special", NULL, CLI_FLAG, &(in).alone, 0, 0,                                      \
      "without the ids that the tokenizer puts around a text" },                                  \
    { "--no-special", NULL, CLI_FLAG, &(in).no_special, 0, 0,                                     \
      "special tokens in the text are plain text" }

#define CLI_IDS_OPTION(in)                                                                        \
    { "--ids", "LIST", CLI_TEXT, &(in).ids, 0, 0, "token ids, separated by commas or spaces" }

#define CLI_INPUT_OPTIONS(in)                                                                     \
    CLI_TEXT_OPTIONS(in),                                                                         \
    CLI_IDS_OPTION(in),                                                                           \
    { "--ids-file", "FILE", CLI_TEXT, &(in).ids_file, 0, 0, "token ids, one case a line" },       \
    CLI_SPECIAL_OPTIONS(in)

void cli_ids_add(cli_ids *ids, int32_t id);
/* Numbers between commas and blanks, also as a JSON array; where names the place in errors. */
void cli_ids_parse(cli_ids *out, const char *text, size_t n, const char *where);
void cli_tokenize(cli_ids *out, const cli_input *in, const q3n_model *m, const char *text,
                  size_t n);
/* Which source it is: an option, the word after the model, or without either of them stdin, if
 * that is no terminal.  Fails if there are several. */
void cli_input_choose(cli_input *in, const cli_setup *setup, const cli_words *words);
/* Ids of the chosen source; of ids_file one case a line, empty lines passed over. */
void cli_input_cases(cli_cases *out, const cli_input *in, const q3n_model *m);
/* The same as one text: the lines of ids_file are joined. */
void cli_input_stream(cli_ids *out, const cli_input *in, const q3n_model *m);
size_t cli_cases_longest(const cli_cases *cases);
void cli_cases_free(cli_cases *cases);

/* ---- model.c ---- */

#define CLI_MODEL_OPTIONS(s)                                                                      \
    { "-m --model", "FILE", CLI_TEXT, &(s).model, 0, 0, "the model, if not the first word" },     \
    { "-v --verbose", NULL, CLI_FLAG, &(s).verbose, 0, 0, "print the library's notes" }

#define CLI_WINDOW_OPTION(window, min)                                                            \
    { "--window", "N", CLI_INT, &(window), min, 1 << 24,                                          \
      "tokens evaluated together (1024, or the model's context)" }

/* names_of_batch: q3n bench has another --batch. */
#define CLI_CONTEXT_OPTIONS(s, names_of_batch, speculate_default)                                 \
    { "-c --ctx --ctx-size", "N", CLI_INT, &(s).ctx, 1, 1 << 30,                                  \
      "context size in tokens (what the model was made for)" },                                   \
    { names_of_batch, "N", CLI_INT, &(s).engine.batch_size, 1, 1 << 16,                           \
      "batch size: tokens evaluated at once (512)" },                                             \
    { "--isa", "NAME", CLI_ISA, &(s).isa, 0, 0,                                                   \
      "instruction set to use (the best there is)" },                                             \
    { "--kv --kv-type", "TYPE", CLI_KV_TYPE, &(s).kv, 0, 0, "of the KV cache (f32)" },            \
    { "--snapshot-type", "TYPE", CLI_STATE_TYPE, &(s).snapshot_type, 0, 0,                        \
      "of DeltaNet's states in snapshots; only f32 is exact (f32)" },                             \
    { "--speculate", "HOW", CLI_SPECULATE, &(s).speculate, 0, 0,                                  \
      "where drafts come from (" speculate_default ")" },                                         \
    { "--draft --draft-max", "N", CLI_INT, &(s).draft, 0, Q3N_MAX_DRAFT,                          \
      "drafted tokens a step; 0: as many as pay (0)" }

#define CLI_THREADS_OPTION(s)                                                                     \
    { "-t --threads", "N", CLI_INT, &(s).engine.n_threads, 0, 1024, "threads (0: one a CPU)" }

#define CLI_SESSION_OPTIONS(s)                                                                    \
    CLI_THREADS_OPTION(s), CLI_CONTEXT_OPTIONS(s, "-b --batch --batch-size", "off")

q3n_logger cli_logger(const cli_setup *setup);   /* setup must live as long */
/* The model is setup->model or else the first word, which is taken away. */
q3n_model *cli_open_model(cli_setup *setup, cli_words *words);
q3n_model *cli_open_memory(cli_setup *setup, const void *data, size_t bytes);
const char *cli_speculate_name(int s);           /* of a q3n_speculate; NULL if s is none */
/* Its engine_options are those of setup, which must live as long. */
q3n_session_options cli_session_options(const cli_setup *setup);
/* The same for texts of up to n tokens; --ctx, if given, must hold them. */
q3n_session_options cli_fit_options(const cli_setup *setup, const q3n_model *m, size_t n);
q3n_session *cli_create_session(const cli_setup *setup, const q3n_model *m,
                                const q3n_session_options *o);
q3n_session *cli_open_session(const cli_setup *setup, const q3n_model *m, size_t n,
                              int count_experts);
/* Tokens that perplexity and experts evaluate together: given, or 1024 or what the model holds. */
size_t cli_window(int given, const cli_setup *setup, const q3n_model *m);
/* Ends the program with the session's error if r is one. */
void cli_check(q3n_result r, const q3n_session *s);
void cli_eval(q3n_session *s, const int32_t *ids, int n, float *logits);
/* The token chosen; ends the program if there is none. */
int32_t cli_sample(q3n_sampler *s, const float *logits);

#define CLI_MAX_PIECES 64

/* Sizes of the pieces in which a text is evaluated, used in turn; n = 0: as few as fit. */
typedef struct cli_pieces {
    int size[CLI_MAX_PIECES];
    int n;
} cli_pieces;

typedef void (*cli_row_fn)(void *user, int position, const float *logits);

/* Evaluates ids from a fresh state and calls fn for the logits [vocab] of every position. */
void cli_eval_rows(q3n_session *s, const q3n_model *m, const cli_ids *ids,
                   const cli_pieces *pieces, cli_row_fn fn, void *user);

/* Two models of one vocabulary. */
typedef struct cli_side {
    const q3n_model *m;
    q3n_session     *s;
    int              restore;    /* > 0: every so many tokens the state goes through a snapshot */
} cli_side;

typedef void (*cli_pair_fn)(void *user, int position, const float *first, const float *second);

/* The same for both at once: fn gets the logits of sides[0] and sides[1]. */
void cli_eval_pairs(const cli_side sides[2], const cli_ids *ids, cli_pair_fn fn, void *user);

void   cli_sort(double *x, size_t n);                   /* the smallest first */
int    cli_argmax(const float *x, int n);               /* the first of the largest */
double cli_log_sum_exp(const float *x, int n);

/* ---- main.c ---- */

typedef struct cli_command {
    const char *name;
    int       (*run)(int argc, char **argv);
    const char *about;
} cli_command;

const cli_command *cli_command_at(int i);        /* NULL after the last */
void cli_print_usage(FILE *f);                   /* the commands */
void cli_print_version(void);                    /* "q3n 1.2.3" */
/* The command that argv[0] names; fails if there is none. */
int  cli_run_command(int argc, char **argv);

/* ---- cmd_help.c, complete.c ---- */

void cli_describe_all(cli_describe_fn *fn);      /* calls fn with every command's table */
/* What completes the words of q3n in this shell, a name of CLI_SHELL. */
void cli_print_completion(const char *shell);

/* ---- The commands: argv[0] is the command's name; the exit status is returned ---- */

int cmd_run(int argc, char **argv);
int cmd_info(int argc, char **argv);
int cmd_logits(int argc, char **argv);
int cmd_tokenize(int argc, char **argv);
int cmd_detokenize(int argc, char **argv);
int cmd_render(int argc, char **argv);
int cmd_classify(int argc, char **argv);
int cmd_perplexity(int argc, char **argv);
int cmd_experts(int argc, char **argv);
int cmd_init(int argc, char **argv);
int cmd_quantize(int argc, char **argv);
int cmd_bench(int argc, char **argv);
int cmd_verify(int argc, char **argv);
int cmd_help(int argc, char **argv);

#endif
