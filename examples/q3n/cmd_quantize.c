/* q3n quantize: a copy of a model in smaller types. */
#include "cli.h"
#include "../../tools/q3n_make.h"

static q3n_model *open_model(const char *path)
{
    q3n_model *m = NULL;
    q3n_error err = { .offset = -1 };
    if (q3n_model_open(&m, path, NULL, &err) != Q3N_OK) cli_fail_with(path, &err);
    return m;
}

static void write_copy(const char *path, const q3n_model *m, q3n_quantize_options *o)
{
    cli_catch_interrupt();
    cli_bar bar = cli_bar_begin("quantize", "B");
    o->progress = (q3n_progress){ cli_bar_report, &bar };
    q3n_error err = { .offset = -1 };
    const q3n_result r = q3n_quantize_file(path, m, o, &err);
    cli_bar_end(&bar);
    if (r == Q3N_ERR_UNSUPPORTED && !o->allow_requantize) {
        cli_fail("%s (--allow-requantize does it)", err.message);
    }
    if (r != Q3N_OK) cli_fail_with(path, &err);
}

static void print_types(const q3n_model_stats *stats)
{
    for (int type = 0; type < Q3N_TYPE_COUNT; type++) {
        const q3n_type_stats *t = &stats->types[type];
        char count[32], size[32];
        if (t->n_tensors > 0) {
            printf("  %-5s %6lld tensors %10s weights %10s\n", q3n_type_name((q3n_type)type),
                   (long long)t->n_tensors, cli_format_count(count, (double)t->n_weights),
                   cli_format_bytes(size, (double)t->bytes));
        }
    }
}

static void print_summary(const char *path, const q3n_model *in, const q3n_model_stats *after,
                          double seconds)
{
    q3n_model_stats before = Q3N_INIT(q3n_model_stats);
    char size[2][32];
    q3n_model_stats_get(in, &before);
    const double n = (double)(after->n_weights + after->mtp_weights);
    printf("%s: %s -> %s, %.2f bits per weight, %.1f s\n", path,
           cli_format_bytes(size[0], (double)before.file_bytes),
           cli_format_bytes(size[1], (double)after->file_bytes),
           8.0 * (double)after->file_bytes / n, seconds);
    print_types(after);
}

int cmd_quantize(int argc, char **argv)
{
    q3n_quantize_options o = { .size = sizeof o, .recipe = "q4" };
    const cli_option options[] = {
        { "-t --type", "RECIPE", CLI_RECIPE, &o.recipe, 0, 0, "types of the copy (q4)" },
        { "--threads", "N", CLI_INT, &o.n_threads, 0, 1024, "0 = one per CPU (0)" },
        { "--allow-requantize", NULL, CLI_FLAG, &o.allow_requantize, 0, 0,
          "also change tensors that are quantised already" },
    };
    const cli_syntax syntax = {
        "quantize IN.q3n OUT.q3n [options]",
        "Writes a copy of a model in other types.  Recipes name the type of the experts: q4m and\n"
        "q4l keep the other matrices in q6 and q8, q3 keeps them in q6.  Routers and norms keep\n"
        "float types.  Start from bf16, f16 or f32: quantising twice loses more.",
        options, CLI_COUNT(options), 2, NULL, NULL,
    };
    cli_words words;
    if (!cli_parse(&syntax, argc, argv, &words)) return cli_finish();
    if (words.n < 2) cli_misuse("give the model and the name of the file to write");
    q3n_model *m = open_model(words.word[0]);
    q3n_model_stats written = Q3N_INIT(q3n_model_stats);
    o.written = &written;
    const double start = cli_clock();
    write_copy(words.word[1], m, &o);
    print_summary(words.word[1], m, &written, cli_clock() - start);
    q3n_model_close(m);
    return cli_finish();
}
