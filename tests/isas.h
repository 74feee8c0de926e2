/* isas.h - for tests that run once for every instruction set.  Include after the implementation. */
#ifndef Q3N_TESTS_ISAS_H
#define Q3N_TESTS_ISAS_H

#include <stdio.h>

/* 1 if this processor runs the kernels of an instruction set.  Those of its own architecture that
 * it lacks are told once a test, in the form that run.sh counts as a skipped one. */
static inline int isa_runs(q3n_isa isa, const char *test)
{
    static const char *told[Q3N_ISA_COUNT];
    if (q3n_isa_supported(isa)) return 1;
    if (q3n__isas[isa].bind && told[isa] != test) {
        printf("skipped: %s(%s): this processor lacks it\n", test, q3n_isa_name(isa));
        fflush(stdout);
        told[isa] = test;
    }
    return 0;
}

/* One line for the summary. */
static inline void print_isas(void)
{
    printf("instruction sets:");
    for (int i = 0; i < Q3N_ISA_COUNT; i++)
        printf("%s %s%s", i ? "," : "", q3n_isa_name((q3n_isa)i),
               q3n_isa_supported((q3n_isa)i) ? " ran"
               : q3n__isas[i].bind ? " NOT RUN (this processor lacks it)" : " not compiled");
    printf("\n");
    fflush(stdout);
}

#endif
