/* q3n init: a model file of any geometry with random weights. */
#include "cli.h"
#include "../../tools/q3n_make.h"

static void print_presets(void)
{
    printf("%-28s %7s %7s %8s %8s %8s\n", "preset", "layers", "hidden", "experts", "context",
           "vocab");
    for (int i = 0; q3n_config_preset_name(i); i++) {
        q3n_config c = Q3N_INIT(q3n_config);
        const char *name = q3n_config_preset_name(i);
        if (q3n_config_preset(name, &c, NULL) != Q3N_OK) continue;
        printf("%-28s %7d %7d %8d %8d %8d\n", name, c.num_hidden_layers, c.hidden_size,
               c.num_experts, c.max_position_embeddings, c.vocab_size);
    }
}

static void write_model(const char *path, const q3n_config *c, q3n_init_options *o)
{
    cli_catch_interrupt();
    cli_bar bar = cli_bar_begin("init", "B");
    o->progress = (q3n_progress){ cli_bar_report, &bar };
    q3n_error err = { .offset = -1 };
    const q3n_result r = q3n_init_file(path, c, o, &err);
    cli_bar_end(&bar);
    if (r != Q3N_OK) cli_fail_with(path, &err);
}

static void print_summary(const char *path, const q3n_model_stats *stats)
{
    char total[32], active[32], size[32];
    printf("%s: %s parameters, %s active per token, %s\n", path,
           cli_format_count(total, (double)stats->n_weights),
           cli_format_count(active, (double)stats->n_weights_active),
           cli_format_bytes(size, (double)stats->file_bytes));
}

int cmd_init(int argc, char **argv)
{
    cli_geometry geometry = { .n = 0 };
    q3n_init_options o = { .size = sizeof o, .seed = 0 };
    const char *type = NULL;
    int list = 0;
    const cli_option options[] = {
        { "--preset", "NAME", CLI_TEXT, &geometry.preset, 0, 0,
          "the geometry to start from" },
        { "--list", NULL, CLI_FLAG, &list, 0, 0, "print the presets" },
        { "--type", "TYPE", CLI_TYPE, &type, 0, 0, "of the matrices (bf16)" },
        { "-s --seed", "N", CLI_U64, &o.seed, 0, 0, "of the random numbers (0)" },
        { "--threads", "N", CLI_INT, &o.n_threads, 0, 1024, "0 = one per CPU (0)" },
        { "--stddev", "X", CLI_REAL, &o.stddev, 1e-6, 10.0, "of the weights (0.02)" },
        { "--name", "NAME", CLI_TEXT, &o.name, 0, 0, "kept in the file (the preset)" },
    };
    const cli_syntax syntax = {
        "init OUT.q3n --preset NAME [--FIELD VALUE ...] [options]",
        "Writes a model with random weights (normal, truncated at two deviations), as a stream:\n"
        "any size fits.  --FIELD VALUE or --set FIELD=VALUE overrides a field of the geometry, as\n"
        "--layers 4, --hidden-size 512 or --rope_theta 1e6; q3n info shows all fields.",
        options, CLI_COUNT(options), 1, cli_geometry_option, &geometry,
    };
    cli_words words;
    if (!cli_parse(&syntax, argc, argv, &words)) return cli_finish();
    if (list) {
        print_presets();
        return cli_finish();
    }
    if (words.n == 0) cli_misuse("no file: give the name of the model to write");
    o.type = cli_type(type);
    q3n_config c = Q3N_INIT(q3n_config);
    cli_geometry_config(&geometry, &c);
    if (!o.name) o.name = geometry.preset;
    q3n_model_stats written = Q3N_INIT(q3n_model_stats);
    o.written = &written;
    write_model(words.word[0], &c, &o);
    print_summary(words.word[0], &written);
    return cli_finish();
}
