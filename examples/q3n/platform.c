/* The few things that C11 leaves to the operating system. */
#if !defined(_WIN32)
#  define _POSIX_C_SOURCE 200809L
#endif
#include "cli.h"

#include <signal.h>
#include <stdlib.h>

static volatile sig_atomic_t interrupted;

static void on_interrupt(int number)
{
    (void)number;
    interrupted = 1;
    signal(SIGINT, SIG_DFL);      /* the second one ends the program */
}

void cli_catch_interrupt(void)
{
    signal(SIGINT, on_interrupt);
}

int cli_interrupted(void)
{
    return interrupted != 0;
}

#if defined(_WIN32)

#include <fcntl.h>
#include <io.h>
#include <windows.h>

double cli_clock(void)
{
    LARGE_INTEGER now, rate;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&rate);
    return (double)now.QuadPart / (double)rate.QuadPart;
}

int cli_is_terminal(FILE *f)
{
    return _isatty(_fileno(f));
}

void cli_binary_streams(void)
{
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
    SetConsoleOutputCP(CP_UTF8);
}

int cli_n_cpus(void)
{
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return (int)info.dwNumberOfProcessors;
}

typedef HANDLE thread_handle;

#else

#include <pthread.h>
#include <time.h>
#include <unistd.h>

double cli_clock(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int cli_is_terminal(FILE *f)
{
    return isatty(fileno(f));
}

void cli_binary_streams(void)
{
}

int cli_n_cpus(void)
{
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : (int)n;
}

typedef pthread_t thread_handle;

#endif

/* ---- Threads ---- */

typedef struct thread_job {
    void (*fn)(void *arg, int i);
    void  *arg;
    int    i;
    thread_handle handle;
} thread_job;

#if defined(_WIN32)

static DWORD WINAPI thread_main(void *memory)
{
    const thread_job *job = memory;
    job->fn(job->arg, job->i);
    return 0;
}

static int thread_start(thread_job *job)
{
    job->handle = CreateThread(NULL, 0, thread_main, job, 0, NULL);
    return job->handle != NULL;
}

static void thread_join(thread_job *job)
{
    WaitForSingleObject(job->handle, INFINITE);
    CloseHandle(job->handle);
}

#else

static void *thread_main(void *memory)
{
    const thread_job *job = memory;
    job->fn(job->arg, job->i);
    return NULL;
}

static int thread_start(thread_job *job)
{
    return pthread_create(&job->handle, NULL, thread_main, job) == 0;
}

static void thread_join(thread_job *job)
{
    pthread_join(job->handle, NULL);
}

#endif

void cli_run_threads(int n, void (*fn)(void *arg, int i), void *arg)
{
    thread_job *jobs = cli_alloc((size_t)n, sizeof *jobs);
    for (int i = 1; i < n; i++) {
        jobs[i] = (thread_job){ .fn = fn, .arg = arg, .i = i };
        if (!thread_start(&jobs[i])) cli_fail("cannot start %d threads: use fewer (-t)", n);
    }
    fn(arg, 0);
    for (int i = 1; i < n; i++) thread_join(&jobs[i]);
    free(jobs);
}
