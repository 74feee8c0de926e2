/* q3n bench --session: a chat whose turns find the state of the turns before, what is done with
 * states, and the memory that all of it takes. */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

enum { TURNS = 10, BACK = 300 };

typedef struct chat_turn {
    int           n;             /* tokens of the text up to the end of the turn's prompt */
    int           n_reused;
    bench_samples prefill;       /* seconds to the first logits, from what the session knows */
    bench_samples read;          /* from nothing */
    bench_samples ratio;
    size_t        allocated, planned;    /* bytes of a session with so many tokens */
} chat_turn;

typedef enum chat_op {
    OP_SNAPSHOT, OP_RESTORE, OP_FORK, OP_REWIND_1, OP_REWIND, OP_SAVE, OP_LOAD, OP_EVAL, N_OPS
} chat_op;

typedef struct chat_run {
    bench        *b;
    int           n_prompt, n_answer, length;
    int32_t      *ids;           /* [length] the whole chat */
    q3n_session_options options;
    q3n_session_memory  memory;  /* of length tokens */
    q3n_session  *fed;           /* with a cache of its own */
    q3n_session  *fresh;
    float        *other;         /* [vocab] */
    const char   *path;          /* of the file that states are saved in */
    chat_turn     turn[TURNS];
    bench_samples seconds[N_OPS];
    size_t        made, snapshot, fork;  /* bytes allocated */
    size_t        snapshot_bytes, file_bytes;
    int           back;
} chat_run;

/* ---- The text ---- */

/* Prompts of the model's kind, over and over, until the turn has its tokens. */
static void add_prompt(chat_run *r, int turn, int32_t *ids)
{
    for (int n = 0, i = turn; n < r->n_prompt; i++) {
        cli_ids text = { 0 };
        bench_text(r->b, i % BENCH_TEXTS, r->n_prompt, &text);
        for (size_t t = 0; t < text.n && n < r->n_prompt; t++) ids[n++] = text.id[t];
        free(text.id);
    }
}

/* The answers are the model's own, sampled. */
static void write_text(chat_run *r)
{
    bench *b = r->b;
    const q3n_sampler_options sampling = { .size = sizeof sampling, .temperature = 0.8f,
                                           .top_p = 0.95f, .seed = 1 };
    q3n_session *s = cli_create_session(&b->setup, b->m, &r->options);
    cli_bar bar = cli_bar_begin("writing the chat", "turns");
    cli_check(q3n_session_set_sampler(s, &sampling), s);
    for (int i = 0; i < TURNS; i++) {
        int32_t *turn = r->ids + i * (r->n_prompt + r->n_answer), *answer = turn + r->n_prompt;
        add_prompt(r, i, turn);
        cli_eval(s, turn, r->n_prompt, b->logits);
        for (int t = 0; t < r->n_answer; t++) {
            answer[t] = cli_sample(q3n_session_sampler(s), b->logits);
            cli_eval(s, answer + t, 1, b->logits);
        }
        cli_bar_update(&bar, i + 1, TURNS, NULL);
    }
    cli_bar_end(&bar);
    q3n_session_destroy(s);
}

/* ---- Memory ---- */

static q3n_session_memory plan(const chat_run *r, int n)
{
    q3n_session_options o = r->options;
    q3n_session_memory memory = Q3N_INIT(q3n_session_memory);
    o.capacity = n;
    q3n_session_bytes(r->b->m, &o, &memory);
    return memory;
}

/* With the scratch of the session that is measured: one for n tokens alone may need less. */
static size_t planned_bytes(const chat_run *r, int n)
{
    return r->memory.total - r->memory.kv_cache + plan(r, n).kv_cache;
}

/* Makes the session that reads all again, and notes what it and its copies take. */
static void measure_memory(chat_run *r)
{
    const bench *b = r->b;
    const size_t before = b->heap.bytes;
    r->fresh = cli_create_session(&b->setup, b->m, &r->options);
    r->made  = b->heap.bytes - before;
    for (int i = 0, n = 0; i < TURNS; i++) {
        chat_turn *t = &r->turn[i];
        cli_eval(r->fresh, r->ids + n, t->n - n, NULL);
        n = t->n;
        t->allocated = b->heap.bytes - before;
        t->planned   = planned_bytes(r, n);
    }
    const size_t full = b->heap.bytes;
    q3n_snapshot *snapshot = NULL;
    q3n_session *fork = NULL;
    q3n_error err = { .offset = -1 };
    cli_check(q3n_session_snapshot(r->fresh, &snapshot), r->fresh);
    r->snapshot = b->heap.bytes - full;
    r->snapshot_bytes = q3n_snapshot_bytes(snapshot);
    q3n_snapshot_free(snapshot);
    if (q3n_session_fork(&fork, r->fresh, NULL, &err) != Q3N_OK) cli_fail_with("fork", &err);
    r->fork = b->heap.bytes - full;
    q3n_session_destroy(fork);
}

/* ---- Measuring ---- */

static void new_session(chat_run *r)
{
    q3n_session_options o = r->options;
    /* Every mark and every page, with room to spare. */
    o.snapshot_bytes = (TURNS + 2) * r->memory.snapshot + 2 * r->memory.kv_cache;
    q3n_session_destroy(r->fed);
    r->fed = cli_create_session(&r->b->setup, r->b->m, &o);
}

static void measure_turn(chat_run *r, int i, int record)
{
    bench *b = r->b;
    chat_turn *t = &r->turn[i];
    const size_t vocab = (size_t)q3n_model_config(b->m)->vocab_size;

    double start = cli_clock();
    cli_check(q3n_session_prefill(r->fed, r->ids, t->n, b->logits, &t->n_reused), r->fed);
    const double prefill = cli_clock() - start;

    start = cli_clock();
    q3n_session_reset(r->fresh);
    cli_eval(r->fresh, r->ids, t->n, r->other);
    const double read = cli_clock() - start;

    if (memcmp(b->logits, r->other, vocab * sizeof *b->logits) != 0) {
        cli_fail("turn %d: the logits are not those of the text read again", i + 1);
    }
    cli_eval(r->fed, r->ids + t->n, r->n_answer, NULL);
    if (!record) return;
    bench_add(&t->prefill, prefill);
    bench_add(&t->read, read);
    bench_add(&t->ratio, read / prefill);
}

/* Seconds of one thing done with the state of the whole chat. */
static double measure_op(chat_run *r, chat_op op, q3n_snapshot **snapshot)
{
    q3n_session *s = r->fed, *fork = NULL;
    q3n_error err = { .offset = -1 };
    q3n_result result = Q3N_OK;
    if (op == OP_LOAD || op == OP_EVAL) {
        s = r->fresh;
        q3n_session_reset(s);
    }
    const double start = cli_clock();
    switch (op) {
    case OP_SNAPSHOT: result = q3n_session_snapshot(s, snapshot);                    break;
    case OP_RESTORE:  result = q3n_session_restore(s, *snapshot);                    break;
    case OP_FORK:     result = q3n_session_fork(&fork, s, NULL, &err);               break;
    case OP_REWIND_1: result = q3n_session_rewind(s, r->length - 1);                 break;
    case OP_REWIND:   result = q3n_session_rewind(s, r->length - r->back);           break;
    case OP_SAVE:     result = q3n_session_save(s, r->path);                         break;
    case OP_LOAD:     result = q3n_session_load(s, r->path);                         break;
    case OP_EVAL:     result = q3n_session_eval(s, r->ids, r->length, r->b->logits); break;
    case N_OPS:       break;
    }
    const double seconds = cli_clock() - start;
    if (op == OP_FORK && result != Q3N_OK) cli_fail_with("fork", &err);
    cli_check(result, s);
    q3n_session_destroy(fork);
    if (op == OP_REWIND_1 || op == OP_REWIND) cli_check(q3n_session_restore(s, *snapshot), s);
    return seconds;
}

static void measure_round(void *user, int record)
{
    chat_run *r = user;
    q3n_snapshot *snapshot = NULL;
    new_session(r);
    for (int i = 0; i < TURNS && !cli_interrupted(); i++) measure_turn(r, i, record);
    if (cli_interrupted()) cli_stop();
    for (int op = 0; op < N_OPS; op++) {
        const double seconds = measure_op(r, (chat_op)op, &snapshot);
        if (cli_interrupted()) cli_stop();
        if (record) bench_add(&r->seconds[op], seconds);
    }
    q3n_snapshot_free(snapshot);
    if (r->file_bytes == 0) r->file_bytes = (size_t)cli_file_bytes(r->path);
}

/* ---- Output ---- */

static const char *const op_names[N_OPS] = {
    "snapshot", "restore", "fork", "rewind 1", "rewind", "save", "load", "evaluate",
};

/* Bytes that an operation copies, or allocates (fork); 0 = it evaluates. */
static size_t op_bytes(const chat_run *r, int op)
{
    switch (op) {
    case OP_SNAPSHOT: return r->snapshot_bytes;
    case OP_RESTORE:  return r->snapshot_bytes;
    case OP_FORK:     return r->fork;
    case OP_SAVE:     return r->file_bytes;
    case OP_LOAD:     return r->file_bytes;
    default:          return 0;
    }
}

static void print_json(const chat_run *r)
{
    bench_json_head(r->b);
    printf("\"length\": %d, \"turns\": [", r->length);
    for (int i = 0; i < TURNS; i++) {
        const chat_turn *t = &r->turn[i];
        printf("%s{\"tokens\": %d, \"reused\": %d, ", i ? ", " : "", t->n, t->n_reused);
        bench_json_samples("prefill_s", &t->prefill);
        printf(", ");
        bench_json_samples("read_s", &t->read);
        printf(", ");
        bench_json_samples("ratio", &t->ratio);
        printf(", \"allocated\": %zu, \"planned\": %zu}", t->allocated, t->planned);
    }
    printf("], \"states\": [");
    for (int op = 0; op < N_OPS; op++) {
        printf("%s{\"what\": \"%s\", \"tokens\": %d, \"bytes\": %zu, ", op ? ", " : "",
               op_names[op], op == OP_REWIND ? r->back : op == OP_REWIND_1 ? 1 : r->length,
               op_bytes(r, op));
        bench_json_samples("s", &r->seconds[op]);
        printf("}");
    }
    printf("], \"memory\": {\"made\": %zu, \"made_planned\": %zu, \"snapshot\": %zu, "
           "\"snapshot_planned\": %zu, \"fork\": %zu}}\n", r->made, r->memory.initial, r->snapshot,
           r->memory.snapshot, r->fork);
}

static void print_seconds(const bench_samples *samples)
{
    const bench_spread s = bench_spread_of(samples);
    printf("%10.3f ms (%.3f .. %.3f)", 1e3 * s.median, 1e3 * s.min, 1e3 * s.max);
}

static void print_ops(const chat_run *r)
{
    const double eval = bench_median(&r->seconds[OP_EVAL]);
    char name[32], text[32];
    for (int op = 0; op < N_OPS; op++) {
        const double s = bench_median(&r->seconds[op]), bytes = (double)op_bytes(r, op);
        if (op == OP_REWIND) snprintf(name, sizeof name, "rewind %d", r->back);
        else                 snprintf(name, sizeof name, "%s", op_names[op]);
        printf("%-12s", name);
        print_seconds(&r->seconds[op]);
        if (bytes > 0.0)    printf("  %s", cli_format_bytes(text, bytes));
        if (bytes > 0.0 && op != OP_FORK) printf(", %.2f GB/s", 1e-9 * bytes / s);
        if (op != OP_EVAL)  printf("  %.*f x as fast as evaluating\n", eval < 100.0 * s, eval / s);
        else                printf("  %d tokens\n", r->length);
    }
}

static void print_bytes(const char *name, size_t allocated, size_t planned)
{
    char a[32], p[32];
    printf("%-24s %9s allocated  %9s planned\n", name, cli_format_bytes(a, (double)allocated),
           planned ? cli_format_bytes(p, (double)planned) : "-");
}

static void print_text(const chat_run *r)
{
    bench_print_head(r->b);
    printf("a chat of %d turns, each %d tokens of prompt and %d of answer; to the first logits:\n",
           TURNS, r->n_prompt, r->n_answer);
    for (int i = 0; i < TURNS; i++) {
        const chat_turn *t = &r->turn[i];
        printf("turn %2d  %6d tokens, %6d reused", i + 1, t->n, t->n_reused);
        print_seconds(&t->prefill);
        printf("  all again");
        print_seconds(&t->read);
        printf("  %.2f x\n", bench_median(&t->ratio));
    }
    printf("the logits of both are the same bits; with the state of %d tokens:\n", r->length);
    print_ops(r);
    print_bytes("session when made", r->made, r->memory.initial);
    for (int i = 0; i < TURNS; i += TURNS - 1) {
        char name[32];
        snprintf(name, sizeof name, "session of %d tokens", r->turn[i].n);
        print_bytes(name, r->turn[i].allocated, r->turn[i].planned);
    }
    print_bytes("snapshot", r->snapshot, r->memory.snapshot);
    print_bytes("fork", r->fork, 0);
}

void bench_chat(bench *b)
{
    if (b->threads.n != 1) cli_misuse("--session: one number of threads (-t)");
    chat_run r = { .b = b, .n_prompt = b->prompts.value[0], .n_answer = b->n_decode };
    if (r.n_prompt == 0 || r.n_answer == 0) cli_misuse("--session: -p and -n cannot be 0");
    r.length = TURNS * (r.n_prompt + r.n_answer);
    r.back   = BACK < r.length / 2 ? BACK : r.length / 2;
    bench_make_ids(b, r.length > BENCH_TEXTS * r.n_prompt ? r.length : BENCH_TEXTS * r.n_prompt);
    r.options = bench_options(b, 0, r.length);
    r.options.capacity = r.length;
    r.memory  = plan(&r, r.length);
    r.other   = cli_alloc((size_t)q3n_model_config(b->m)->vocab_size, sizeof *r.other);
    r.ids     = cli_alloc((size_t)r.length, sizeof *r.ids);
    memcpy(r.ids, b->ids, (size_t)r.length * sizeof *r.ids);
    for (int i = 0; i < TURNS; i++) r.turn[i].n = i * (r.n_prompt + r.n_answer) + r.n_prompt;
    if (q3n_model_n_tokens(b->m)) write_text(&r);
    measure_memory(&r);
    cli_catch_interrupt();
    r.path = cli_scratch_file();
    bench_repeat(b, measure_round, &r);
    if (b->json) print_json(&r);
    else         print_text(&r);

    q3n_session_destroy(r.fed);
    q3n_session_destroy(r.fresh);
    free(r.other);
    free(r.ids);
}
