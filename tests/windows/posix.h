/* posix.h - for the C tests on Windows, in front of every test file: what they use of POSIX.  The
 * library itself needs none of it. */
#ifndef Q3N_TESTS_WINDOWS_POSIX_H
#define Q3N_TESTS_WINDOWS_POSIX_H

#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#undef NEAR
#undef IN
#define POINT test_POINT                  /* a structure of Windows, a kind of draft in a test */

#include <direct.h>
#include <dirent.h>
#include <fcntl.h>
#include <io.h>
#include <process.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utime.h>
#include <unistd.h>

#define posix_first(a, ...) a
#define mkdir(...) _mkdir(posix_first(__VA_ARGS__, 0))   /* also without a mode */

/* ---- Names of files that are not there yet ---- */
static inline void posix_name(char *path)
{
    static LONG count;
    char *end = path + strlen(path) - 6;
    const unsigned n = (unsigned)GetCurrentProcessId() * 31
                     + (unsigned)InterlockedIncrement(&count);
    for (int i = 0; i < 6; i++) end[i] = "0123456789abcdef"[n >> (4 * i) & 15];
    _mkdir("/tmp");
}

static inline char *posix_mkdtemp(char *path)
{
    posix_name(path);
    return _mkdir(path) == 0 ? path : NULL;
}

static inline int posix_mkstemp(char *path)
{
    posix_name(path);
    return _open(path, _O_RDWR | _O_CREAT | _O_EXCL | _O_BINARY, _S_IREAD | _S_IWRITE);
}
/* remove takes folders too. */
static inline int posix_remove(const char *path) { return remove(path) && _rmdir(path) ? -1 : 0; }
#define remove(path) posix_remove(path)
#define unlink(path) posix_remove(path)
#define mkdtemp posix_mkdtemp
#define mkstemp posix_mkstemp

/* ---- Directories, links, times ---- */
typedef int posix_order(const struct dirent **, const struct dirent **);

static inline int alphasort(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

/* As many as tests make; no filter. */
static inline int scandir(const char *path, struct dirent ***names, void *filter,
                          posix_order *order)
{
    enum { MAX = 256 };
    int n = 0;
    DIR *d = opendir(path);
    (void)filter;
    *names = (struct dirent **)calloc(MAX, sizeof **names);
    if (!d || !*names) return -1;
    for (struct dirent *e; n < MAX && (e = readdir(d)) != NULL; n++) {
        (*names)[n] = (struct dirent *)malloc(sizeof *e);
        if (!(*names)[n]) return -1;
        *(*names)[n] = *e;
    }
    closedir(d);
    qsort(*names, (size_t)n, sizeof **names, (int (*)(const void *, const void *))order);
    return n;
}

static inline int link(const char *from, const char *to)
{
    return CreateHardLinkA(to, from, NULL) ? 0 : -1;
}

static inline int posix_utime(const char *path, const struct utimbuf *when)
{
    struct utimbuf copy = *when;
    return _utime(path, (struct _utimbuf *)&copy);
}
#define utime posix_utime

/* A folder stands for what Windows has not: no more a file than they are. */
#define mkfifo(path, mode)   _mkdir(path)
#define symlink(target, path) _mkdir(path)

/* ---- Pages and aligned memory: a region of its own each, which free knows by its address ---- */
enum { PROT_NONE = 0, PROT_READ = 1, PROT_WRITE = 2, MAP_PRIVATE = 1, MAP_ANONYMOUS = 2 };
#define MAP_FAILED      ((void *)-1)
#define _SC_PAGESIZE    1
#define sysconf(what)   4096L

static inline void *mmap(void *at, size_t bytes, int access, int flags, int fd, int64_t offset)
{
    (void)at; (void)access; (void)flags; (void)fd; (void)offset;
    void *p = VirtualAlloc(NULL, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
    return p ? p : MAP_FAILED;
}

static inline int mprotect(void *p, size_t bytes, int access)
{
    DWORD old;
    const DWORD now = access == PROT_NONE ? PAGE_NOACCESS
                    : access == PROT_READ ? PAGE_READONLY : PAGE_READWRITE;
    return VirtualProtect(p, bytes, now, &old) ? 0 : -1;
}

static inline int munmap(void *p, size_t bytes)
{
    (void)bytes;
    return VirtualFree(p, 0, MEM_RELEASE) ? 0 : -1;
}

static inline int posix_memalign(void **out, size_t align, size_t bytes)
{
    (void)align;                          /* VirtualAlloc's blocks begin at multiples of 65536 */
    *out = VirtualAlloc(NULL, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
    return *out ? 0 : -1;
}

static inline void *posix_aligned_alloc(size_t align, size_t bytes)
{
    void *p;
    return posix_memalign(&p, align, bytes) == 0 ? p : NULL;
}

#define aligned_alloc posix_aligned_alloc

static inline void posix_free(void *p)
{
    MEMORY_BASIC_INFORMATION region;
    if (p && (uintptr_t)p % 65536 == 0 && VirtualQuery(p, &region, sizeof region) != 0
        && region.AllocationBase == p)
        VirtualFree(p, 0, MEM_RELEASE);
    else
        free(p);
}
#define free(p) posix_free(p)

/* ---- A signal that a thread sends to itself; Windows forgets the handler each time ---- */
#define SIGUSR1 SIGTERM
struct sigaction { void (*sa_handler)(int); };
static void (*posix_handler)(int);

static inline void posix_on_signal(int number)
{
    signal(number, posix_on_signal);
    posix_handler(number);
}

static inline int sigaction(int number, const struct sigaction *now, struct sigaction *old)
{
    if (old) old->sa_handler = posix_handler;
    posix_handler = now->sa_handler;
    return signal(number, posix_handler ? posix_on_signal : SIG_DFL) == SIG_ERR ? -1 : 0;
}

/* ---- What Windows does not have: tests that need it skip ---- */
enum { RLIMIT_FSIZE, SIGXFSZ = 25 };
#define RLIM_INFINITY ((uint64_t)-1)
struct rlimit { uint64_t rlim_cur, rlim_max; };

static inline int getrlimit(int what, struct rlimit *r)
{
    (void)what;
    r->rlim_cur = r->rlim_max = RLIM_INFINITY;
    return 0;
}

static inline int setrlimit(int what, const struct rlimit *r)
{
    (void)what; (void)r;
    return -1;
}

#endif
