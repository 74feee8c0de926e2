/* isas.h - for tests that run once for every instruction set.  isa_runs and print_isas look into
 * the implementation: they are there if it is. */
#ifndef Q3N_TESTS_ISAS_H
#define Q3N_TESTS_ISAS_H

#include <stdio.h>

enum { N_ISAS = 0
#define Q3N__X(ID, id, number) + 1
    Q3N_ISA_LIST(Q3N__X)
#undef Q3N__X
};

/* Instruction set i of the list; AUTO if there is none. */
static inline q3n_isa isa_at(int i)
{
    static const q3n_isa list[N_ISAS] = {
#define Q3N__X(ID, id, number) Q3N_ISA_##ID,
        Q3N_ISA_LIST(Q3N__X)
#undef Q3N__X
    };
    return i >= 0 && i < N_ISAS ? list[i] : Q3N_ISA_AUTO;
}

/* Its place in the list; N_ISAS if it has none. */
static inline int isa_place(q3n_isa isa)
{
    int i = 0;
    while (i < N_ISAS && isa_at(i) != isa) i++;
    return i;
}

/* The next of the list, the first after AUTO, and AUTO after the last and after what is no
 * instruction set. */
static inline q3n_isa isa_after(q3n_isa isa)
{
    return isa_at(isa == Q3N_ISA_AUTO ? 0 : isa_place(isa) + 1);
}

#ifdef Q3N__IMPLEMENTED

/* 1 if this processor runs the kernels of an instruction set.  Those of its own architecture that
 * it lacks are told once a test, in the form that run.sh counts as a skipped one. */
static inline int isa_runs(q3n_isa isa, const char *test)
{
    static const char *told[N_ISAS];
    const int i = isa_place(isa);
    if (q3n_isa_supported(isa)) return 1;
    if (i < N_ISAS && q3n__isas[i].bind && told[i] != test) {
        printf("skipped: %s(%s): this processor lacks it\n", test, q3n_isa_name(isa));
        fflush(stdout);
        told[i] = test;
    }
    return 0;
}

/* One line for the summary. */
static inline void print_isas(void)
{
    printf("instruction sets:");
    for (int i = 0; i < N_ISAS; i++)
        printf("%s %s%s", i ? "," : "", q3n_isa_name(isa_at(i)),
               q3n_isa_supported(isa_at(i)) ? " ran"
               : q3n__isas[i].bind ? " NOT RUN (this processor lacks it)" : " not compiled");
    printf("\n");
    fflush(stdout);
}

#endif /* Q3N__IMPLEMENTED */

#endif
