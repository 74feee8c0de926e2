/* Geometries by name with fields overridden, and weight types by name. */
#include "cli.h"
#include "../../tools/q3n_make.h"

#include <string.h>

static void add_override(cli_geometry *g, const char *field, size_t len, const char *value)
{
    if (g->n == CLI_MAX_OVERRIDES) cli_misuse("at most %d fields can be set", CLI_MAX_OVERRIDES);
    if (len >= sizeof g->field[0]) cli_misuse("there is no field '%s'", field);
    for (size_t i = 0; i < len; i++) g->field[g->n][i] = field[i] == '-' ? '_' : field[i];
    g->field[g->n][len] = 0;
    g->value[g->n++] = value;
}

void cli_geometry_option(void *user, const char *name, const char *value)
{
    if (strcmp(name, "set") != 0) {
        add_override((cli_geometry *)user, name, strlen(name), value);
        return;
    }
    const char *equal = strchr(value, '=');
    if (!equal) cli_misuse("--set: '%s' is not FIELD=VALUE", value);
    add_override((cli_geometry *)user, value, (size_t)(equal - value), equal + 1);
}

void cli_geometry_config(const cli_geometry *g, q3n_config *c)
{
    q3n_error err = { .offset = -1 };
    if (!g->preset) {
        cli_misuse("no geometry: give --preset NAME (q3n init --list shows the names)");
    }
    if (q3n_config_preset(g->preset, c, &err) != Q3N_OK) cli_misuse("--preset: %s", err.message);
    for (int i = 0; i < g->n; i++) {
        if (q3n_config_set(c, g->field[i], g->value[i], &err) != Q3N_OK) {
            cli_misuse("--%s %s: %s", g->field[i], g->value[i], err.message);
        }
    }
    if (q3n_config_check(c, &err) != Q3N_OK) {
        cli_fail("this geometry does not fit: %s", err.message);
    }
}

q3n_type cli_type(const char *name)
{
    q3n_type type = Q3N_TYPE_BF16;
    if (name) (void)q3n_type_from_name(name, &type);     /* options.c has checked it */
    return type;
}
