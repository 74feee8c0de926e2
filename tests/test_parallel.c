/* test_parallel.c - q3n__parallel runs every index exactly once, whatever the threads do: many
 * small regions, pools that come and go, the host's executor, more threads than processors.  Meant
 * to run under the thread sanitizer too. */
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE 1     /* mkstemp, nanosleep */
#endif
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"

#include <sys/stat.h>
#include <time.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))
#define MOST_THREADS 16
#define MOST_ITEMS   5000

static const q3n_executor no_executor = { NULL, NULL, 0 };

typedef struct {
    q3n__pool   pool;
    q3n__thread threads[MOST_THREADS];
} host;

static void host_open(host *h, int n_threads)
{
    q3n_error err;
    memset(h, 0, sizeof *h);
    if (q3n__pool_open(&h->pool, n_threads, &no_executor, h->threads, &err) != Q3N_OK)
        fail_msg("%s", err.message);
}

static void host_close(host *h) { q3n__pool_close(&h->pool); }

/* ---- Every index once, in pieces of at least a grain ---- */

/* Plain counters: the region's end must make them visible to the caller. */
typedef struct {
    int          count[MOST_ITEMS];
    int          grain, n;
    q3n__atomic  pieces, too_small;
} tally;

static void count_task(void *arg, int begin, int end)
{
    tally *t = (tally *)arg;
    for (int i = begin; i < end; i++) t->count[i]++;
    q3n__atomic_add(&t->pieces, 1);
    if (end - begin < t->grain && end - begin < t->n) q3n__atomic_add(&t->too_small, 1);
}

static void check_region(q3n__pool *p, tally *t, int n, int grain)
{
    memset(t->count, 0, (size_t)(n > 0 ? n : 0) * sizeof t->count[0]);
    t->n = n;
    t->grain = grain;
    q3n__atomic_store(&t->pieces, 0);
    q3n__parallel(p, n, grain, count_task, t);
    for (int i = 0; i < n; i++)
        if (t->count[i] != 1)
            fail_msg("n %d, grain %d, %d threads: index %d ran %d times", n, grain, p->n_threads, i,
                     t->count[i]);
    const int64_t pieces = q3n__atomic_load(&t->pieces);
    if (n <= 0) assert_int_equal(pieces, 0);
    else        assert_true(pieces >= 1 && pieces <= p->n_threads * 4);
    assert_int_equal(q3n__atomic_load(&t->too_small), 0);
}

static void test_every_index_once(void **state)
{
    static const int threads[] = { 1, 2, 3, 5, 8, MOST_THREADS };
    static const int sizes[] = { -1, 0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 100,
                                 127, 999, 1000, MOST_ITEMS };
    static const int grains[] = { -1, 0, 1, 2, 3, 8, 16, 100, MOST_ITEMS, INT_MAX };
    static tally t;
    (void)state;
    for (int i = 0; i < COUNT(threads); i++) {
        host h;
        host_open(&h, threads[i]);
        for (int k = 0; k < COUNT(sizes); k++)
            for (int g = 0; g < COUNT(grains); g++) check_region(&h.pool, &t, sizes[k], grains[g]);
        host_close(&h);
    }
}

/* The products n * piece exceed 32 bits; no index is visited one by one. */
typedef struct {
    q3n__atomic sum, pieces, wrong;
} span;

static void span_task(void *arg, int begin, int end)
{
    span *s = (span *)arg;
    if (begin < 0 || end <= begin) q3n__atomic_add(&s->wrong, 1);
    q3n__atomic_add(&s->sum, (int64_t)end - begin);
    q3n__atomic_add(&s->pieces, 1);
}

static void test_large_spans(void **state)
{
    (void)state;
    host h;
    host_open(&h, 7);
    for (int n = INT_MAX; n > 1000; n /= 3) {
        span s = { 0, 0, 0 };
        q3n__parallel(&h.pool, n, 1, span_task, &s);
        assert_int_equal(q3n__atomic_load(&s.sum), n);
        assert_int_equal(q3n__atomic_load(&s.pieces), 28);
        assert_int_equal(q3n__atomic_load(&s.wrong), 0);
    }
    host_close(&h);
}

/* ---- Where the cuts are depends on n, grain and threads, never on time ---- */
typedef struct {
    int     end_of[MOST_ITEMS];
    int64_t spent;
} cuts;

static void cut_task(void *arg, int begin, int end)
{
    cuts *c = (cuts *)arg;
    c->end_of[begin] = end;
    volatile int x = 0;
    for (int i = 0; i < (begin * 37) % 500; i++) x = x + i;
}

static void test_same_cuts(void **state)
{
    static cuts first, again;
    (void)state;
    host h;
    host_open(&h, 3);
    memset(&first, 0, sizeof first);
    q3n__parallel(&h.pool, 1001, 2, cut_task, &first);
    for (int round = 0; round < 200; round++) {
        memset(&again, 0, sizeof again);
        q3n__parallel(&h.pool, 1001, 2, cut_task, &again);
        assert_memory_equal(first.end_of, again.end_of, sizeof first.end_of);
    }
    host_close(&h);
}

/* ---- Many regions: each reads what the one before wrote, as layers do ---- */
#define CHAIN 64

typedef struct {
    const int64_t *in;
    int64_t       *out;
} step;

static void chain_task(void *arg, int begin, int end)
{
    const step *s = (const step *)arg;
    for (int i = begin; i < end; i++) s->out[i] = s->in[i] + s->in[(i + 1) % CHAIN] % 1000;
}

static void run_chain(q3n__pool *p, int rounds, int pause_every)
{
    int64_t a[CHAIN], b[CHAIN], want_a[CHAIN], want_b[CHAIN];
    for (int i = 0; i < CHAIN; i++) a[i] = want_a[i] = i * 7;
    for (int r = 0; r < rounds; r++) {
        const step there = { a, b }, alone = { want_a, want_b };
        q3n__parallel(p, CHAIN, 1, chain_task, (void *)(uintptr_t)&there);
        chain_task((void *)(uintptr_t)&alone, 0, CHAIN);
        memcpy(a, b, sizeof a);
        memcpy(want_a, want_b, sizeof want_a);
        if (pause_every && r % pause_every == 0) {       /* long enough for the others to sleep */
            const struct timespec time = { 0, 2000000 };
            nanosleep(&time, NULL);
        }
    }
    assert_memory_equal(a, want_a, sizeof a);
}

static void test_small_regions(void **state)
{
    static const int threads[] = { 2, 3, 4 };
    (void)state;
    for (int i = 0; i < COUNT(threads); i++) {
        host h;
        host_open(&h, threads[i]);
        run_chain(&h.pool, 5000, 0);
        host_close(&h);
    }
}

/* Workers are asleep when a region begins, and wake while it runs or after it. */
static void test_sleeping_workers(void **state)
{
    (void)state;
    host h;
    host_open(&h, 3);
    run_chain(&h.pool, 200, 1);
    run_chain(&h.pool, 300, 3);
    host_close(&h);
}

/* One piece takes so long that the caller sleeps. */
static void slow_task(void *arg, int begin, int end)
{
    q3n__atomic *sum = (q3n__atomic *)arg;
    const struct timespec time = { 0, 3000000 };
    if (begin <= 4 && 4 < end) nanosleep(&time, NULL);
    q3n__atomic_add(sum, end - begin);
}

static void test_sleeping_caller(void **state)
{
    (void)state;
    host h;
    host_open(&h, 4);
    for (int r = 0; r < 60; r++) {
        q3n__atomic sum = 0;
        q3n__parallel(&h.pool, 5 + r % 20, 1, slow_task, &sum);
        assert_int_equal(q3n__atomic_load(&sum), 5 + r % 20);
    }
    host_close(&h);
}

/* ---- Who is woken, and for what ---- */
static void wait_for_sleep(host *h)      /* of all workers: they have nothing else to do */
{
    const struct timespec time = { 0, 100000 };
    while (q3n__atomic_load(&h->pool.n_sleeping) < h->pool.n_started) nanosleep(&time, NULL);
}

typedef struct {
    q3n__atomic n_inside;
    int         n;
} meeting;

/* Every piece waits for all the others: one thread for each must take part. */
static void meet_task(void *arg, int begin, int end)
{
    meeting *m = (meeting *)arg;
    const struct timespec time = { 0, 100000 };
    q3n__atomic_add(&m->n_inside, end - begin);
    while (q3n__atomic_load(&m->n_inside) < m->n) nanosleep(&time, NULL);
}

static int64_t generation(host *h) { return q3n__atomic_load(&h->pool.ticket) >> 32; }

/* Work for several wakes sleeping workers once, work for one begins no generation. */
static void test_wakes(void **state)
{
    static tally t;
    (void)state;
    for (int n = 2; n <= 5; n++) {
        host h;
        host_open(&h, n);
        for (int round = 0; round < 5; round++) {
            wait_for_sleep(&h);
            const int64_t gen = generation(&h);
            const int wakes = h.pool.n_wakes;
            check_region(&h.pool, &t, 1, 1);
            check_region(&h.pool, &t, 100, 100);
            check_region(&h.pool, &t, 199, 100);
            assert_int_equal(generation(&h), gen);
            assert_int_equal(h.pool.n_wakes, wakes);
            meeting m = { 0, n };
            if (round % 2 == 0) {       /* counted before anyone waits for the others */
                check_region(&h.pool, &t, 200, 100);
                assert_int_equal(h.pool.n_wakes, wakes + 1);
                assert_int_equal(generation(&h), gen + 1);
            }
            /* Afterwards every worker is awake, so that whoever counts as asleep is asleep anew. */
            q3n__parallel(&h.pool, n, 1, meet_task, &m);
            assert_in_range(h.pool.n_wakes, wakes + 1, wakes + 1 + (round % 2 == 0));
            assert_int_equal(generation(&h), gen + 1 + (round % 2 == 0));
        }
        host_close(&h);
    }
}

/* ---- Generations wrap round ---- */
static void test_generations_wrap(void **state)
{
    static tally t;
    (void)state;
    host h;
    memset(&h, 0, sizeof h);
    q3n__atomic_store(&h.pool.ticket, (int64_t)0x7ffffff0 << 32);
    assert_int_equal(q3n__pool_open(&h.pool, 3, &no_executor, h.threads, NULL), Q3N_OK);
    for (int r = 0; r < 40; r++) check_region(&h.pool, &t, 50 + r, 1);
    assert_true(q3n__atomic_load(&h.pool.ticket) >> 32 < 100);
    host_close(&h);
}

/* ---- Pools come and go ---- */
static void test_open_close(void **state)
{
    static tally t;
    (void)state;
    for (int r = 0; r < 200; r++) {
        host h;
        host_open(&h, 1 + r % 6);
        if (r % 3 == 1) check_region(&h.pool, &t, 40, 1);
        if (r % 3 == 2) {                                   /* the others sleep by now */
            const struct timespec time = { 0, 1000000 };
            nanosleep(&time, NULL);
        }
        host_close(&h);
        host_close(&h);                                     /* twice does no harm */
    }
}

/* More threads than processors: nobody waits for one that the system has put aside. */
static void test_oversubscription(void **state)
{
    static tally t;
    (void)state;
    host h;
    host_open(&h, MOST_THREADS);
    for (int r = 0; r < 300; r++) check_region(&h.pool, &t, 1 + r * 7 % 600, 1);
    run_chain(&h.pool, 300, 0);
    host_close(&h);
}

/* ---- Two pools at once ---- */
static void *chain_main(void *arg)
{
    host h;
    (void)arg;
    host_open(&h, 3);
    run_chain(&h.pool, 1000, 0);
    host_close(&h);
    return NULL;
}

static void test_pools_side_by_side(void **state)
{
    pthread_t thread[3];
    (void)state;
    for (int i = 0; i < COUNT(thread); i++)
        assert_int_equal(pthread_create(&thread[i], NULL, chain_main, NULL), 0);
    for (int i = 0; i < COUNT(thread); i++) pthread_join(thread[i], NULL);
}

/* ---- The host's executor ---- */
typedef struct {
    int   n_calls, n_tasks;
    int   order;                     /* 0 forwards, 1 backwards, 2 the second one first */
    int   max;
} executor_log;

static void run_serially(void *user, int n, void (*task)(void *arg, int i), void *arg)
{
    executor_log *log = (executor_log *)user;
    log->n_calls++;
    log->n_tasks += n;
    if (n > log->max) log->max = n;
    for (int i = 0; i < n; i++)
        task(arg, log->order == 1 ? n - 1 - i : log->order == 2 ? (i + 1) % n : i);
}

typedef struct {
    void (*task)(void *arg, int i);
    void  *arg;
    int    i;
} call;

static void *call_main(void *arg)
{
    const call *c = (const call *)arg;
    c->task(c->arg, c->i);
    return NULL;
}

static void run_on_threads(void *user, int n, void (*task)(void *arg, int i), void *arg)
{
    pthread_t thread[8];
    call calls[8];
    (void)user;
    assert_in_range(n, 1, 8);
    for (int i = 0; i < n; i++) {
        calls[i] = (call){ task, arg, i };
        assert_int_equal(pthread_create(&thread[i], NULL, call_main, &calls[i]), 0);
    }
    for (int i = 0; i < n; i++) pthread_join(thread[i], NULL);
}

static void test_executor(void **state)
{
    static tally t;
    (void)state;
    for (int order = 0; order < 3; order++) {
        executor_log log = { 0, 0, order, 0 };
        q3n_executor e = { run_serially, &log, 5 };
        q3n__pool p;
        memset(&p, 0, sizeof p);
        assert_int_equal(q3n__pool_open(&p, 5, &e, NULL, NULL), Q3N_OK);
        for (int n = 0; n < 200; n++) check_region(&p, &t, n, 1 + n % 3);
        run_chain(&p, 200, 0);
        assert_int_equal(p.n_started, 0);
        assert_true(log.n_calls > 100 && log.max <= 5);
        q3n__pool_close(&p);
    }
    q3n_executor e = { run_on_threads, NULL, 4 };
    q3n__pool p;
    memset(&p, 0, sizeof p);
    assert_int_equal(q3n__pool_open(&p, 4, &e, NULL, NULL), Q3N_OK);
    for (int n = 1; n < 150; n++) check_region(&p, &t, n, 1);
    run_chain(&p, 100, 0);
    q3n__pool_close(&p);
}

/* ---- The number of threads that fits ---- */
#if defined(__linux__)
typedef struct {
    const char *path, *text;
} system_file;

/* Write (text) or remove (no text) a file of a folder that stands for the system's root, and the
 * folders above it. */
static void put_file(const char *system, const char *name, const char *text)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", system, name);
    for (char *p = path + strlen(system) + 1; text && (p = strchr(p, '/')) != NULL; *p++ = '/') {
        *p = '\0';
        mkdir(path, 0777);
    }
    FILE *f = text ? fopen(path, "w") : NULL;
    if (f) {
        fputs(text, f);
        fclose(f);
        return;
    }
    assert_null(text);
    remove(path);
    for (char *p; (p = strrchr(path, '/')) > path + strlen(system); ) {
        *p = '\0';
        remove(path);
    }
}

static void check_quota(const system_file files[4], int want)
{
    char system[] = "/tmp/q3n_quota_XXXXXX";
    assert_non_null(mkdtemp(system));
    for (int i = 0; i < 4 && files[i].path; i++) put_file(system, files[i].path, files[i].text);
    const int got = q3n__cpu_quota(system);
    for (int i = 0; i < 4 && files[i].path; i++) put_file(system, files[i].path, NULL);
    assert_int_equal(remove(system), 0);
    assert_int_equal(got, want);
}

#define SELF "proc/self/cgroup"
#define V2   "sys/fs/cgroup/"
#define V1   "sys/fs/cgroup/cpu/"

static void test_cpu_quota(void **state)
{
    (void)state;
    check_quota((system_file[4]){ { 0 } }, 0);                                  /* no /proc */
    /* Version 2: in a container, of the group, of one above it, of the nearer one, none. */
    check_quota((system_file[4]){ { SELF, "0::/\n" }, { V2 "cpu.max", "200000 100000\n" } }, 2);
    check_quota((system_file[4]){ { SELF, "0::/a/b\n" }, { V2 "a/b/cpu.max", "500 10000\n" } }, 1);
    check_quota((system_file[4]){ { SELF, "0::/a/b\n" }, { V2 "a/b/cpu.max", "max 100000\n" },
                                  { V2 "a/cpu.max", "250000 100000\n" } }, 3);
    check_quota((system_file[4]){ { SELF, "0::/a/b\n" }, { V2 "a/b/cpu.max", "700000 100000\n" },
                                  { V2 "a/cpu.max", "400000 100000\n" },
                                  { V2 "cpu.max", "9000000 100000\n" } }, 4);
    check_quota((system_file[4]){ { SELF, "0::/a\n" }, { V2 "a/cpu.max", "max 100000\n" } }, 0);
    /* A path of the host's that the container does not have. */
    check_quota((system_file[4]){ { SELF, "0::/../../x\n" }, { V2 "cpu.max", "300000 100000\n" } },
                3);
    /* Version 1: among other controllers, whose names begin alike. */
    const char *v1 = "9:cpuset:/s\n7:cpuacct,cpu:/d/c\n1:name=systemd:/d/c\n0::/u\n";
    check_quota((system_file[4]){ { SELF, v1 }, { V1 "d/c/cpu.cfs_quota_us", "600000\n" },
                                  { V1 "d/c/cpu.cfs_period_us", "100000\n" } }, 6);
    check_quota((system_file[4]){ { SELF, v1 }, { V1 "cpu.cfs_quota_us", "150000\n" },
                                  { V1 "cpu.cfs_period_us", "50000\n" } }, 3);
    check_quota((system_file[4]){ { SELF, v1 }, { V1 "d/c/cpu.cfs_quota_us", "-1\n" },
                                  { V1 "d/c/cpu.cfs_period_us", "100000\n" } }, 0);
    check_quota((system_file[4]){ { SELF, "9:cpuset:/\n8:cpuacct:/\n" },
                                  { V1 "cpu.cfs_quota_us", "100000\n" },
                                  { V1 "cpu.cfs_period_us", "100000\n" } }, 0);
    /* What no kernel writes. */
    check_quota((system_file[4]){ { SELF, "0::/\n" }, { V2 "cpu.max", "5 0\n" } }, 0);
    check_quota((system_file[4]){ { SELF, "0::/\n" }, { V2 "cpu.max", "" } }, 0);
    check_quota((system_file[4]){ { SELF, "0::/\n" }, { V2 "cpu.max", "99999999999999999999 1" } },
                INT_MAX);
    check_quota((system_file[4]){ { SELF, "cpu\n::\n:\n\n3:cpu" },
                                  { V1 "cpu.max", "100000 100000" } }, 0);
}
#endif

static void test_cpu_count(void **state)
{
    (void)state;
    assert_in_range(q3n__cpu_count(), 1, 1024);
#if defined(__linux__)
    /* The set of one CPU. */
    cpu_set_t all, one;
    assert_int_equal(sched_getaffinity(0, sizeof all, &all), 0);
    CPU_ZERO(&one);
    for (size_t i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; i++)
        if (CPU_ISSET(i, &all)) CPU_SET(i, &one);
    assert_int_equal(sched_setaffinity(0, sizeof one, &one), 0);
    const int n = q3n__cpu_count();
    assert_int_equal(sched_setaffinity(0, sizeof all, &all), 0);
    assert_int_equal(n, 1);
    assert_int_equal(q3n__cpu_set_count(), CPU_COUNT(&all));
#endif
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_index_once),
        cmocka_unit_test(test_large_spans),
        cmocka_unit_test(test_same_cuts),
        cmocka_unit_test(test_small_regions),
        cmocka_unit_test(test_sleeping_workers),
        cmocka_unit_test(test_sleeping_caller),
        cmocka_unit_test(test_wakes),
        cmocka_unit_test(test_generations_wrap),
        cmocka_unit_test(test_open_close),
        cmocka_unit_test(test_oversubscription),
        cmocka_unit_test(test_pools_side_by_side),
        cmocka_unit_test(test_executor),
#if defined(__linux__)
        cmocka_unit_test(test_cpu_quota),
#endif
        cmocka_unit_test(test_cpu_count),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
