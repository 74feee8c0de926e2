/* What q3n bench measures, and the parts that measure and print it. */
#ifndef Q3N_BENCH_H
#define Q3N_BENCH_H

#include "cli.h"

enum {
    BENCH_LIST    = 16,          /* numbers of threads, prompts, depths, sessions */
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

/* What is allocated now through the model's allocator. */
typedef struct bench_heap {
    size_t bytes, n;
} bench_heap;

typedef enum bench_mode { BENCH_SPEED, BENCH_BATCH, BENCH_DRAFTS, BENCH_CHAT } bench_mode;

typedef struct bench {
    bench_mode      mode;
    cli_setup       setup;
    cli_geometry    geometry;    /* with a preset: random weights in memory, no file */
    const char     *type;        /* of them; NULL = bf16 */
    void           *memory;
    size_t          memory_bytes;
    bench_heap      heap;
    q3n_model      *m;
    q3n_model_stats stats;
    const char     *isa;
    bench_list      prompts, threads, depths, batches;
    int             n_decode, repeats, json;
    double          limit;       /* seconds: no repetition begins that would end later */
    int             done;        /* repetitions */
    bench_case     *cases;       /* BENCH_SPEED: prefills, then decodes; threads fastest */
    int             n_cases;
    q3n_session    *shared[BENCH_LIST];     /* by threads: for prefill and decoding from nothing */
    bench_buffer   *buffer;
    bench_samples   read[BENCH_LIST];       /* GB/s by threads */
    double          open_s, first_token_s;
    size_t          peak_bytes;
    int32_t        *ids;         /* a text: ids that follow no pattern */
    float          *logits;      /* [vocab] */
} bench;

/* ---- cmd_bench.c: for all modes ---- */

/* Room in each session that decodes behind depth tokens. */
int          bench_decode_room(const bench *b, int depth);
/* ids [n] and logits of b. */
void         bench_make_ids(bench *b, int n);
int          bench_largest(const bench_list *list);
/* Options of a session for n tokens with bench.threads[thread] threads. */
q3n_session_options bench_options(const bench *b, int thread, int n);
q3n_session *bench_open_session(const bench *b, int thread, int n);
/* One round to warm up, then b->repeats with record set, or as many as the limit allows. */
void         bench_repeat(bench *b, void (*round)(void *user, int record), void *user);
void         bench_add(bench_samples *samples, double x);

/* ---- The modes: measure and print ---- */

void bench_batch(bench *b);      /* --batch: many sessions at once */
void bench_drafts(bench *b);     /* --mtp: decoding with drafts */
void bench_chat(bench *b);       /* --session: a chat, and what is done with states */

/* ---- bench_text.c: texts of the model's kind ---- */

enum { BENCH_TEXTS = 4 };
/* Text i in ids; random ones of b->ids, n of them, if the model has no tokenizer. */
void bench_text(const bench *b, int i, int n, cli_ids *out);

/* ---- bench_read.c ---- */

bench_buffer *bench_buffer_create(int most_threads);
void          bench_buffer_destroy(bench_buffer *buffer);
double        bench_read(bench_buffer *buffer, int threads);      /* GB/s */

/* ---- bench_print.c ---- */

bench_spread bench_spread_of(const bench_samples *samples);
double       bench_median(const bench_samples *samples);
/* "key": median, "key_min": least, "key_max": most, "key_samples": [...].  Returns the median. */
double       bench_json_samples(const char *key, const bench_samples *samples);
/* The object's beginning: machine, model, what was asked. */
void         bench_json_head(const bench *b);
void         bench_print_head(const bench *b);
void         bench_print(const bench *b);

#endif
