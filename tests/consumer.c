/* What a program does that was given the library by somebody's package: tests/test_install.sh. */
#include <qwen3next.h>
#include <stdio.h>

int main(int argc, char **argv)
{
    q3n_error err;
    q3n_model *model;
    if (argc != 2 || q3n_abi_version() != Q3N_ABI) return 2;
    if (q3n_model_open(&model, argv[1], NULL, &err)) return fprintf(stderr, "%s\n", err.message), 1;
    printf("%s: %d tensors\n", q3n_model_name(model), q3n_model_n_tensors(model));
    q3n_model_close(model);
}
