/* What q3n bench measures, and the parts that measure and print it. */
#ifndef Q3N_BENCH_H
#define Q3N_BENCH_H

#include "cli.h"

enum {
    BENCH_LIST    = 16,          /* numbers of threads, prompts, depths, sessions */
    BENCH_THREADS = 1024,        /* at most */
    BENCH_REPEATS = 100,
    BENCH_READS   = 2            /* of the roof a repetition: before and after decoding */
};

#define BENCH_READ_SECONDS 0.04  /* at least, of a measured reading */

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
    double median, min, max;
} bench_spread;

/* Bytes that threads read: of a token, or from memory alone. */
typedef struct bench_reading {
    int    threads;
    int    loop;                 /* of bench_read.c */
    double hot;                  /* the same ones over and over */
    double cold, pool;           /* and so many of the pool's, anywhere in it */
} bench_reading;

/* One row of the result: prompts of n tokens, or tokens decoded after a depth. */
typedef struct bench_case {
    int           decode;        /* 0 = prefill */
    int           value;         /* n or depth */
    int           thread;        /* index in bench.threads */
    q3n_session  *s;
    bench_samples tok_s;
    double        seconds;       /* that it took the last time */
    bench_reading reading;       /* decode: what a token reads */
    bench_samples roof;          /* GB/s of reading that, BENCH_READS a repetition */
} bench_case;

typedef struct bench_buffer bench_buffer;

/* What is allocated now through the model's allocator. */
typedef struct bench_heap {
    size_t bytes, n;
} bench_heap;

typedef enum bench_mode {
    BENCH_SPEED, BENCH_BATCH, BENCH_DRAFTS, BENCH_CHAT, BENCH_BANDWIDTH
} bench_mode;

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
    q3n_engine_options engine[BENCH_LIST];  /* by threads */
    int             n_decode, repeats, json;
    double          limit;       /* seconds: no repetition begins that would end later */
    int             done;        /* repetitions */
    bench_case     *cases;       /* BENCH_SPEED: prefills, then decodes; threads fastest */
    int             n_cases;
    q3n_session    *shared[BENCH_LIST];     /* by threads: for prefill and decoding from nothing */
    bench_buffer   *buffer;
    bench_samples   read[BENCH_LIST];       /* GB/s from memory, by threads */
    bench_reading   memory_reading[BENCH_LIST];
    double          open_s, first_token_s;
    size_t          peak_bytes;
    int32_t        *ids;         /* a text: ids that follow no pattern */
    float          *logits;      /* [vocab] */
} bench;

/* ---- cmd_bench.c: for all modes ---- */

/* Room in each session that decodes after depth tokens. */
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
void bench_bandwidth(bench *b);  /* --read: reading alone, without a model */

/* ---- bench_text.c: texts of the model's kind ---- */

enum { BENCH_TEXTS = 4 };
/* Text i in ids; random ones of b->ids, n of them, if the model has no tokenizer. */
void bench_text(const bench *b, int i, int n, cli_ids *out);

/* ---- bench_read.c ---- */

bench_buffer *bench_buffer_create(int max_threads);
void          bench_buffer_destroy(bench_buffer *buffer);
size_t        bench_buffer_half(const bench_buffer *buffer);      /* bytes; no cache holds them */
double        bench_read(const bench_buffer *buffer, const bench_reading *what,
                         double seconds);                         /* GB/s in so long */
/* Sets what->loop to the one that reads this fastest here. */
void          bench_choose_loop(const bench_buffer *buffer, bench_reading *what);
const char   *bench_loop_name(int loop);                          /* NULL after the last */
int           bench_loop_possible(int loop);                      /* on this CPU */

/* ---- bench_bytes.c ---- */

/* What one decoded token reads, in the middle of the measured ones. */
bench_reading bench_token(const bench *b, const bench_case *c, int repeats);
/* How many of these bytes come from memory at least, if caches hold `cache` bytes. */
double        bench_memory_bytes(const bench_reading *r, double cache);
/* Multiply-adds with weights for a prompt of n tokens: only the last one needs the head. */
double        bench_prompt_macs(const bench *b, int n);
/* Bits of storage for a weight, and the type that most weights have. */
double        bench_bits_per_weight(const bench *b, const char **type);

/* ---- bench_print.c ---- */

bench_spread bench_spread_of(const bench_samples *samples);
double       bench_median(const bench_samples *samples);
/* "key": median, "key_min": min, "key_max": max, "key_samples": [...].  Returns the median. */
double       bench_json_samples(const char *key, const bench_samples *samples);
/* The object's beginning: machine, model, what was asked. */
void         bench_json_machine(void);
void         bench_print_machine(void);
void         bench_json_head(const bench *b);
void         bench_print_head(const bench *b);
void         bench_print(const bench *b);

#endif
