/* Threads of the host's that share a model and a prefix cache, each with a session of its own: the
 * cache is so small that snapshots come and go.  Meant for a library without threads of its own
 * (Q3N_NO_THREADS), under the thread sanitizer.  Exits with 0 if every text's logits are those of a
 * session without a cache.
 *
 * usage: build_threads MODEL.q3n */
#include "qwen3next.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_THREADS = 4, N_TEXTS = 6, N_ROUNDS = 6, TEXT_LEN = 24 };

typedef struct {
    q3n_model *model;
    q3n_cache *cache;
    float     *want[N_TEXTS];      /* logits after each text                                     */
    size_t     logits_bytes;
    int        first, n_wrong;
} worker;

/* Text i: texts share beginnings of different lengths. */
static void make_text(const q3n_model *m, int i, int32_t *tokens)
{
    for (int t = 0; t < TEXT_LEN; t++)
        tokens[t] = (t * 7 + (t >= 4 * i ? i : 0)) % q3n_model_config(m)->vocab_size;
}

static q3n_session *make_session(worker *w)
{
    q3n_session *s = NULL;
    q3n_error err;
    q3n_session_options o = { .size = sizeof o,
                              .capacity = 64, .cache = w->cache, .snapshot_every = 4 };
    if (q3n_session_create(&s, w->model, &o, &err)) fprintf(stderr, "%s\n", err.message);
    return s;
}

static void *work(void *arg)
{
    worker *w = (worker *)arg;
    q3n_session *s = make_session(w);
    float *logits = (float *)malloc(w->logits_bytes);
    int32_t tokens[TEXT_LEN];
    q3n_cache_stats stats = Q3N_INIT(q3n_cache_stats);
    w->n_wrong += !s || !logits;
    for (int i = 0; w->n_wrong == 0 && i < N_ROUNDS; i++) {
        const int text = (w->first + i) % N_TEXTS;
        make_text(w->model, text, tokens);
        w->n_wrong += q3n_session_prefill(s, tokens, TEXT_LEN, logits, NULL) != Q3N_OK
                   || memcmp(logits, w->want[text], w->logits_bytes) != 0;
        q3n_session_reset(s);
        q3n_cache_stats_get(w->cache, &stats);
        if (i % 5 == 4) q3n_cache_clear(w->cache);
    }
    free(logits);
    q3n_session_destroy(s);
    return NULL;
}

int main(int argc, char **argv)
{
    worker w = { 0 }, workers[N_THREADS];
    pthread_t threads[N_THREADS];
    int32_t tokens[TEXT_LEN];
    q3n_error err;
    int n_wrong = 0;
    if (argc < 2 || q3n_model_open(&w.model, argv[1], NULL, &err)) return 2;
    w.logits_bytes = (size_t)q3n_model_config(w.model)->vocab_size * sizeof(float);
    for (int i = 0; i < N_TEXTS; i++) {
        q3n_session *s = make_session(&w);
        w.want[i] = (float *)malloc(w.logits_bytes);
        make_text(w.model, i, tokens);
        if (!s || !w.want[i] || q3n_session_eval(s, tokens, TEXT_LEN, w.want[i])) return 2;
        if (i == 0) {
            q3n_snapshot *snap;
            if (q3n_session_snapshot(s, &snap)) return 2;
            q3n_cache_options o = { .size = sizeof o, .max_bytes = 20 * q3n_snapshot_bytes(snap) };
            q3n_snapshot_free(snap);
            if (q3n_cache_create(&w.cache, w.model, &o, &err)) return 2;
        }
        q3n_session_destroy(s);
    }
    for (int i = 0; i < N_THREADS; i++) {
        workers[i] = w;
        workers[i].first = i;
        if (pthread_create(&threads[i], NULL, work, &workers[i])) return 2;
    }
    for (int i = 0; i < N_THREADS; i++) {
        pthread_join(threads[i], NULL);
        n_wrong += workers[i].n_wrong;
    }
    q3n_cache_stats stats = Q3N_INIT(q3n_cache_stats);
    q3n_cache_stats_get(w.cache, &stats);
    const int used = stats.n_hits > 0 && stats.n_evicted > 0;
    printf("%d wrong, %s\n", n_wrong, used ? "used" : "not used");
    q3n_cache_destroy(w.cache);
    for (int i = 0; i < N_TEXTS; i++) free(w.want[i]);
    q3n_model_close(w.model);
    return n_wrong > 0;
}
