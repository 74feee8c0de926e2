/* Messages, progress and readable numbers. */
#include "cli.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static const char *command_name;

void cli_name_command(const char *name)
{
    command_name = name;
}

/* Bytes of the character at p [n] if a terminal only shows it: 0 for control characters, those of
 * U+0080 to U+009F too, and for what is no UTF-8. */
static size_t shown_length(const unsigned char *p, size_t n)
{
    const size_t len = cli_character_length(p, n);
    const int control = p[0] < 32 || p[0] == 127 || (len == 2 && p[0] == 0xC2 && p[1] < 0xA0);
    return control ? 0 : len;
}

/* Prints kind, message and tail as one line, whatever bytes a file name or an option brought. */
static void print_line(const char *kind, const char *format, va_list args, const char *tail)
{
    char text[1200];
    vsnprintf(text, sizeof text, format, args);
    const size_t n = strlen(text);
    for (size_t i = 0; i < n;) {
        const size_t len = shown_length((const unsigned char *)text + i, n - i);
        if (len == 0) text[i] = '?';
        i += len ? len : 1;
    }
    fflush(stdout);
    fprintf(stderr, "q3n: %s: %s%s\n", kind, text, tail);
}

void cli_fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print_line("error", format, args, "");
    va_end(args);
    exit(CLI_FAILURE);
}

void cli_misuse(const char *format, ...)
{
    char tail[64] = "; see q3n --help";
    if (command_name) snprintf(tail, sizeof tail, "; see q3n %s --help", command_name);
    va_list args;
    va_start(args, format);
    print_line("error", format, args, tail);
    va_end(args);
    exit(CLI_MISUSE);
}

void cli_warn(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print_line("warning", format, args, "");
    va_end(args);
}

void cli_stop(void)
{
    fflush(stdout);
    fprintf(stderr, "q3n: interrupted\n");
    exit(cli_interrupted());
}

void cli_fail_with(const char *subject, const q3n_error *err)
{
    if (err->code == Q3N_ERR_CANCELLED) cli_stop();
    const char *message = err->message[0] ? err->message : q3n_result_string(err->code);
    /* Errors of the file system name the file themselves, as it can be shown. */
    const int named = err->code == Q3N_ERR_IO || err->code == Q3N_ERR_NO_FILE
                   || strncmp(message, subject, strlen(subject)) == 0;
    const char *colon = named ? "" : ": ";
    if (named) subject = "";
    if (err->offset >= 0) {
        cli_fail("%s%s%s (byte %lld)", subject, colon, message, (long long)err->offset);
    }
    cli_fail("%s%s%s", subject, colon, message);
}

int cli_finish(void)
{
    errno = 0;
    if (fflush(stdout) != 0 || ferror(stdout)) {
        cli_fail("the output could not be written: %s", errno ? strerror(errno) : "no more room");
    }
    return 0;
}

/* ---- Numbers ---- */

static const char *format_scaled(char text[32], double x, const char *unit)
{
    static const char *const prefix[] = { "", " k", " M", " G", " T", " P" };
    int i = 0;
    while (x >= 999.5 && i < CLI_COUNT(prefix) - 1) {
        x /= 1000.0;
        i++;
    }
    const int decimals = i == 0 || x >= 99.95 ? 0 : x >= 9.995 ? 1 : 2;
    const char *space  = i == 0 && unit[0] ? " " : "";
    snprintf(text, 32, "%.*f%s%s%s", decimals, x, prefix[i], space, unit);
    return text;
}

const char *cli_format_bytes(char text[32], double bytes)
{
    return format_scaled(text, bytes, "B");
}

const char *cli_format_count(char text[32], double count)
{
    return format_scaled(text, count, "");
}

/* ---- Token text ---- */

void cli_print_piece(FILE *f, const q3n_model *m, int32_t id)
{
    size_t n = 0;
    const char *text = q3n_token_text(m, id, &n);
    cli_print_text(f, text, n);
}

void cli_print_text(FILE *f, const char *text, size_t n)
{
    const unsigned char *p = (const unsigned char *)text;
    for (size_t i = 0; i < n;) {
        const size_t len = shown_length(p + i, n - i);
        if (p[i] == '\n') {
            fputs("\\n", f);
        } else if (len == 0) {
            fprintf(f, "\\x%02x", (unsigned)p[i]);
        } else {
            fwrite(p + i, 1, len, f);
        }
        i += len ? len : 1;
    }
}

/* ---- Progress ---- */

cli_bar cli_bar_begin(const char *label, const char *unit)
{
    return (cli_bar){ .label = label, .unit = unit, .start = cli_clock(), .shown = -1.0 };
}

static void format_amount(char text[32], double x, int bytes)
{
    if (bytes) cli_format_bytes(text, x);
    else       snprintf(text, 32, "%.*f", x < 9.95 && x != floor(x), x);
}

void cli_bar_update(cli_bar *bar, int64_t done, int64_t total, const char *note)
{
    const double now = cli_clock();
    if ((now - bar->shown < 0.1 && done < total) || !cli_is_terminal(stderr)) return;
    bar->shown = now;
    bar->drawn = 1;

    enum { WIDTH = 28 };
    const double share  = total > 0 ? (double)done / (double)total : 1.0;
    const double spent  = now - bar->start;
    const double rate   = spent > 0.0 ? (double)done / spent : 0.0;
    const double left   = rate > 0.0 ? (double)(total - done) / rate : 0.0;
    const int    filled = (int)(share * WIDTH);
    char cells[WIDTH + 1], amount[3][32];
    const int bytes = strcmp(bar->unit, "B") == 0;
    for (int i = 0; i < WIDTH; i++) cells[i] = i < filled ? '#' : '.';
    cells[WIDTH] = 0;
    format_amount(amount[0], (double)done, bytes);
    format_amount(amount[1], (double)total, bytes);
    format_amount(amount[2], rate, bytes);
    const char *unit = bytes ? "" : " ", *name = bytes ? "" : bar->unit;
    fprintf(stderr, "\r%s [%s] %3.0f %%  %s of %s%s%s  %s%s%s/s  %.0f s left  %s\033[K", bar->label,
            cells, 100.0 * share, amount[0], amount[1], unit, name, amount[2], unit, name,
            ceil(left), note ? note : "");
    fflush(stderr);
}

void cli_bar_end(cli_bar *bar)
{
    if (bar->drawn) fprintf(stderr, "\r\033[K");
    bar->drawn = 0;
}

int cli_bar_report(void *user, int64_t done, int64_t total)
{
    cli_bar_update((cli_bar *)user, done, total, NULL);
    return cli_interrupted();
}
