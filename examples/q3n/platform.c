/* The few things that C11 leaves to the operating system. */
#if defined(__linux__)
#  define _GNU_SOURCE              /* sched_getaffinity, madvise */
#elif defined(__APPLE__)
#  define _DARWIN_C_SOURCE         /* madvise, getrusage, sysctlbyname */
#elif !defined(_WIN32)
#  define _POSIX_C_SOURCE 200809L
#endif
#include "cli.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

enum { PATH_ROOM = 1024 };

static volatile sig_atomic_t interrupted;

/* What asks a program to end: Ctrl-C, kill and a system that stops, a terminal that is gone. */
static const int interrupts[] = {
    SIGINT, SIGTERM,
#if defined(SIGHUP)
    SIGHUP,
#endif
};

/* Those that are ignored stay so: nohup, jobs in the background. */
static void set_handlers(void (*handler)(int))
{
    for (int i = 0; i < CLI_COUNT(interrupts); i++)
        if (signal(interrupts[i], SIG_IGN) != SIG_IGN) signal(interrupts[i], handler);
}

static void on_interrupt(int number)
{
    interrupted = number;
    set_handlers(SIG_DFL);        /* the second one ends the program */
}

void cli_catch_interrupt(void)
{
    set_handlers(on_interrupt);
}

int cli_interrupted(void)
{
    return interrupted == 0 ? 0 : 128 + interrupted;
}

#if defined(_WIN32)

#include <fcntl.h>
#include <io.h>
#include <windows.h>
#include <psapi.h>
#include <shellapi.h>

static wchar_t *to_wide(const char *text)
{
    const int n = MultiByteToWideChar(CP_UTF8, 0, text, -1, NULL, 0);
    wchar_t *wide = cli_alloc((size_t)n + 1, sizeof *wide);
    MultiByteToWideChar(CP_UTF8, 0, text, -1, wide, n);
    return wide;
}

static char *to_utf8(const wchar_t *wide)
{
    const int n = WideCharToMultiByte(CP_UTF8, 0, wide, -1, NULL, 0, NULL, NULL);
    char *text = cli_alloc((size_t)n + 1, 1);
    WideCharToMultiByte(CP_UTF8, 0, wide, -1, text, n, NULL, NULL);
    return text;
}

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

void cli_prepare(int *argc, char ***argv)
{
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
    SetConsoleOutputCP(CP_UTF8);
    int n = 0;
    wchar_t **wide = CommandLineToArgvW(GetCommandLineW(), &n);
    if (!wide) return;
    char **words = cli_alloc((size_t)n + 1, sizeof *words);
    for (int i = 0; i < n; i++) words[i] = to_utf8(wide[i]);
    LocalFree(wide);
    *argc = n;
    *argv = words;
}

FILE *cli_open_stream(const char *path, const char **why)
{
    wchar_t *wide = to_wide(path);
    FILE *f = _wfopen(wide, L"rb");
    *why = strerror(errno);
    free(wide);
    const DWORD type = f ? GetFileType((HANDLE)_get_osfhandle(_fileno(f))) : FILE_TYPE_DISK;
    if (type == FILE_TYPE_DISK || type == FILE_TYPE_PIPE) return f;
    *why = "it is neither a file nor a pipe";
    fclose(f);
    return NULL;
}

int cli_n_cpus(void)
{
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return (int)info.dwNumberOfProcessors;
}

const char *cli_cpu_name(char text[CLI_NAME_ROOM])
{
    const char *name = getenv("PROCESSOR_IDENTIFIER");
    snprintf(text, CLI_NAME_ROOM, "%s", name ? name : "unknown");
    return text;
}

size_t cli_peak_memory(void)
{
    PROCESS_MEMORY_COUNTERS counters = { .cb = sizeof counters };
    const BOOL ok = K32GetProcessMemoryInfo(GetCurrentProcess(), &counters, sizeof counters);
    return ok ? counters.PeakWorkingSetSize : 0;
}

size_t cli_physical_memory(void)
{
    MEMORYSTATUSEX status = { .dwLength = sizeof status };
    return GlobalMemoryStatusEx(&status) ? (size_t)status.ullTotalPhys : 0;
}

size_t cli_cache_bytes(void)
{
    SYSTEM_LOGICAL_PROCESSOR_INFORMATION *info;
    DWORD room = 0;
    size_t bytes = 0;
    GetLogicalProcessorInformation(NULL, &room);
    info = cli_alloc(room, 1);
    if (GetLogicalProcessorInformation(info, &room)) {
        for (size_t i = 0; i < room / sizeof *info; i++) {
            if (info[i].Relationship == RelationCache && info[i].Cache.Level >= 2) {
                bytes += info[i].Cache.Size;
            }
        }
    }
    free(info);
    return bytes;
}

void *cli_alloc_pages(size_t bytes)
{
    void *memory = VirtualAlloc(NULL, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
    if (!memory) cli_fail("out of memory: %zu bytes were needed", bytes);
    return memory;
}

void cli_free_pages(void *memory)
{
    if (memory) VirtualFree(memory, 0, MEM_RELEASE);
}

static void make_scratch(char path[PATH_ROOM])
{
    wchar_t folder[MAX_PATH + 1], wide[MAX_PATH + 1];
    if (!GetTempPathW(MAX_PATH + 1, folder) || !GetTempFileNameW(folder, L"q3n", 0, wide)) {
        cli_fail("cannot make a file for what is measured: error %lu", GetLastError());
    }
    char *text = to_utf8(wide);
    snprintf(path, PATH_ROOM, "%s", text);
    free(text);
}

static void remove_file(const char *path)
{
    wchar_t *wide = to_wide(path);
    _wremove(wide);
    free(wide);
}

typedef HANDLE thread_handle;

#else

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#  include <sched.h>
#elif defined(__APPLE__)
#  include <sys/sysctl.h>
#endif
#ifndef P_tmpdir
#  define P_tmpdir "."
#endif

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

/* A file larger than allowed is then an error with a reason, as a full disk is, not a signal. */
void cli_prepare(int *argc, char ***argv)
{
    (void)argc; (void)argv;
#if defined(SIGXFSZ)
    signal(SIGXFSZ, SIG_IGN);
#endif
}

FILE *cli_open_stream(const char *path, const char **why)
{
    struct stat st;
    const int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    *why = "it is neither a file nor a pipe";
    if (fd < 0 || fstat(fd, &st) != 0) {
        *why = strerror(errno);
    } else if (S_ISREG(st.st_mode) || S_ISFIFO(st.st_mode)) {
        const int flags = fcntl(fd, F_GETFL);
        FILE *f = flags < 0 || fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) != 0 ? NULL
                                                                             : fdopen(fd, "rb");
        if (f) return f;
        *why = strerror(errno);
    } else if (S_ISDIR(st.st_mode)) {
        *why = strerror(EISDIR);
    }
    if (fd >= 0) close(fd);
    return NULL;
}

int cli_n_cpus(void)
{
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : (int)n;
}

#if defined(__linux__)

/* The value of the first line "key : value" of /proc/cpuinfo; "" if there is none. */
static const char *read_cpuinfo(const char *key, char value[64])
{
    char line[512];
    const size_t len = strlen(key);
    value[0] = 0;
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && !value[0] && fgets(line, sizeof line, f)) {
        if (strncmp(line, key, len) != 0) continue;
        const char *p = line + len + strspn(line + len, "\t ");
        if (*p++ != ':') continue;
        p += strspn(p, "\t ");
        snprintf(value, 64, "%.*s", (int)strcspn(p, "\n"), p);
    }
    if (f) fclose(f);
    return value;
}

/* Virtual machines may hide the model's name, not the numbers of family and model. */
const char *cli_cpu_name(char text[CLI_NAME_ROOM])
{
    char name[64], family[64], number[64];
    if (*read_cpuinfo("model name", name) && *read_cpuinfo("cpu family", family)
        && *read_cpuinfo("model", number)) {
        snprintf(text, CLI_NAME_ROOM, "%s (family %.8s, model %.8s)", name, family, number);
    } else if (name[0]) {
        snprintf(text, CLI_NAME_ROOM, "%s", name);
    } else if (*read_cpuinfo("CPU implementer", name) && *read_cpuinfo("CPU part", number)) {
        snprintf(text, CLI_NAME_ROOM, "implementer %.8s, part %.8s", name, number);
    } else {
        snprintf(text, CLI_NAME_ROOM, "unknown");
    }
    return text;
}

#else

const char *cli_cpu_name(char text[CLI_NAME_ROOM])
{
    snprintf(text, CLI_NAME_ROOM, "unknown");
#if defined(__APPLE__)
    size_t room = CLI_NAME_ROOM;
    if (sysctlbyname("machdep.cpu.brand_string", text, &room, NULL, 0) != 0) {
        snprintf(text, CLI_NAME_ROOM, "unknown");
    }
#endif
    return text;
}

#endif

size_t cli_peak_memory(void)
{
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
#if defined(__APPLE__)
    return (size_t)usage.ru_maxrss;
#else
    return (size_t)usage.ru_maxrss * 1024;
#endif
}

#if defined(__linux__)

/* The first line of a file of sysfs, without its end; "" if there is none. */
static const char *read_sysfs(size_t cpu, int index, const char *name, char text[64])
{
    char path[128];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%zu/cache/index%d/%s", cpu, index,
             name);
    FILE *f = fopen(path, "r");
    text[0] = 0;
    if (f && !fgets(text, 64, f)) text[0] = 0;
    if (f) fclose(f);
    text[strcspn(text, "\n")] = 0;
    return text;
}

/* A cache that CPUs share is counted at the first of them. */
size_t cli_cache_bytes(void)
{
    enum { CACHES = 8, LEVEL = 2 };
    cpu_set_t allowed;
    char text[64];
    size_t bytes = 0;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 0;
    for (size_t cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        for (int i = 0; CPU_ISSET(cpu, &allowed) && i < CACHES; i++) {
            if (atoi(read_sysfs(cpu, i, "level", text)) < LEVEL) continue;
            size_t first = strtoul(read_sysfs(cpu, i, "shared_cpu_list", text), NULL, 10);
            while (first < cpu && !CPU_ISSET(first, &allowed)) first++;
            char *end = text;
            const size_t size = strtoul(read_sysfs(cpu, i, "size", text), &end, 10);
            if (first == cpu) bytes += size << (*end == 'M' ? 20 : *end == 'K' ? 10 : 0);
        }
    }
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const long level3 = sysconf(_SC_LEVEL3_CACHE_SIZE);      /* by CPUID; one of them */
    if (bytes == 0 && level3 > 0) bytes = (size_t)level3;
#endif
    return bytes;
}

#elif defined(__APPLE__)

size_t cli_cache_bytes(void)
{
    static const char *const names[] = { "hw.l3cachesize", "hw.perflevel0.l2cachesize",
                                         "hw.l2cachesize" };
    for (int i = 0; i < CLI_COUNT(names); i++) {
        int64_t bytes = 0;
        size_t room = sizeof bytes;
        if (sysctlbyname(names[i], &bytes, &room, NULL, 0) == 0 && bytes > 0) return (size_t)bytes;
    }
    return 0;
}

#else

size_t cli_cache_bytes(void)
{
    return 0;
}

#endif

size_t cli_physical_memory(void)
{
#if defined(_SC_PHYS_PAGES)
    const long pages = sysconf(_SC_PHYS_PAGES), bytes = sysconf(_SC_PAGESIZE);
    if (pages > 0 && bytes > 0) return (size_t)pages * (size_t)bytes;
#endif
    return 0;
}

void *cli_alloc_pages(size_t bytes)
{
    const size_t huge_page = (size_t)2 << 20;
    void *memory = NULL;
    if (posix_memalign(&memory, huge_page, bytes) != 0) {
        cli_fail("out of memory: %zu bytes were needed", bytes);
    }
#if defined(MADV_HUGEPAGE)
    (void)madvise(memory, bytes, MADV_HUGEPAGE);   /* only advice: without it pages are small */
#endif
    return memory;
}

void cli_free_pages(void *memory)
{
    free(memory);
}

static void make_scratch(char path[PATH_ROOM])
{
    const char *folder = getenv("TMPDIR");
    snprintf(path, PATH_ROOM, "%s/q3n-XXXXXX", folder && folder[0] ? folder : P_tmpdir);
    const int file = mkstemp(path);
    if (file < 0) cli_fail("%s: cannot make the file: %s", path, strerror(errno));
    close(file);
}

static void remove_file(const char *path)
{
    remove(path);
}

typedef pthread_t thread_handle;

#endif

/* ---- A file that goes with the program ---- */

static char scratch[PATH_ROOM];

static void remove_scratch(void)
{
    remove_file(scratch);
}

const char *cli_scratch_file(void)
{
    make_scratch(scratch);
    atexit(remove_scratch);
    return scratch;
}

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
