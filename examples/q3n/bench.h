/* What q3n bench measures, and the parts that measure and print it. */
#ifndef Q3N_BENCH_H
#define Q3N_BENCH_H

#include "cli.h"

enum {
    BENCH_LIST    = 16,          /* numbers of threads, prompts, depths */
    BENCH_REPEATS = 100,
    BENCH_READS   = 3            /* of the bandwidth a repetition: first, between, last */
};

typedef struct bench_list {
    int value[BENCH_LIST];
    int n;
} bench_list;

/* Measurements of one thing, one or more a repetition. */
typedef struct bench_samples {
    double x[BENCH_REPEATS * BENCH_READS];
    int    n;
} bench_samples;

typedef struct bench_spread {
    double median, least, most;
} bench_spread;

/* One row of the result: prompts of n tokens, or tokens decoded behind a depth. */
typedef struct bench_case {
    int           decode;        /* 0 = prefill */
    int           value;         /* n or depth */
    int           thread;        /* index in bench.threads */
    q3n_session  *s;
    bench_samples tok_s;
} bench_case;

typedef struct bench_buffer bench_buffer;

typedef struct bench {
    cli_setup       setup;
    cli_geometry    geometry;    /* with a preset: random weights in memory, no file */
    const char     *type;        /* of them; NULL = bf16 */
    void           *memory;
    size_t          memory_bytes;
    q3n_model      *m;
    q3n_model_stats stats;
    bench_list      prompts, threads, depths;
    int             n_decode, repeats, json;
    double          limit;       /* seconds: no repetition begins that would end later */
    int             done;        /* repetitions */
    bench_case     *cases;       /* prefills, then decodes; threads fastest */
    int             n_cases;
    q3n_session    *shared[BENCH_LIST];     /* by threads: for prefill and decoding from nothing */
    bench_buffer   *buffer;
    bench_samples   read[BENCH_LIST];       /* GB/s by threads */
    double          open_s, first_token_s;
    size_t          peak_bytes;
    int32_t        *ids;         /* a text: ids that follow no pattern */
    float          *logits;      /* [vocab] */
} bench;

/* Room in each session that decodes behind depth tokens. */
int bench_decode_room(const bench *b, int depth);

/* ---- bench_read.c ---- */

bench_buffer *bench_buffer_create(int most_threads);
void          bench_buffer_destroy(bench_buffer *buffer);
double        bench_read(bench_buffer *buffer, int threads);      /* GB/s */

/* ---- bench_print.c ---- */

bench_spread bench_spread_of(const bench_samples *samples);
void         bench_print(const bench *b);

#endif
