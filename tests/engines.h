/* engines.h - options of the engine that a session of a test makes.  Include after qwen3next.h. */
#ifndef Q3N_TESTS_ENGINES_H
#define Q3N_TESTS_ENGINES_H

/* `.engine_options = OWN_ENGINE(.n_threads = 2)`: lives as long as the block that it stands in. */
#define OWN_ENGINE(...) (&(q3n_engine_options){ .size = sizeof(q3n_engine_options), __VA_ARGS__ })

/* What tests use unless it is threads that they test. */
static const q3n_engine_options one_thread = { .size = sizeof one_thread, .n_threads = 1 };

/* An executor on the calling thread that begins with the last task; user is an int that counts the
 * tasks, or NULL. */
static inline void run_backwards(void *user, int n, void (*task)(void *arg, int i), void *arg)
{
    if (user) *(int *)user += n;
    for (int i = n - 1; i >= 0; i--) task(arg, i);
}

#endif
