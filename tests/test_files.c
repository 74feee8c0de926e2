/* test_files.c - every function that writes a file and every way in which that can fail; every one
 * that reads a file and everything that is none.  Faults come from the system where it can be made
 * to fail (limits, permissions, links, pipes, signals), and from the functions below, which stand
 * in front of the C library's, where it cannot. */
#ifdef _WIN32
#include <stdio.h>
int main(void)
{
    printf("needs links, pipes, limits and signals of a POSIX system; test_paths runs here\n");
    return 77;
}
#else
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE 1      /* syscall */
#endif
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "q3n_make.h"
#include "engines.h"
#include "folder.h"
#include "small.h"

#define COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))
#define PATIENCE 1800                    /* seconds until a test that waits for a pipe is ended  */
#define NOBODY   65534
#define SHARED   64999                   /* a group that NOBODY is in                            */

/* ---- The C library, failing ---- */
enum { NO_FAULT, WRITE, FSYNC, CLOSE, RENAME, FCHMOD, READ, SEEK, N_FAULTS };

static struct {
    int call, at;                        /* the at-th call of that function fails, from 0        */
    int error;
    int seen;                            /* calls so far                                         */
    int interrupted;                     /* 1 = calls are cut short, every other one by a signal */
    int n_interrupted;
} fault;

static int fails(int call)
{
    if (fault.call != call || fault.seen++ != fault.at) return 0;
    errno = fault.error;
    return 1;
}

/* Bytes that a call may transfer; 0 = it is interrupted. */
static size_t cut(size_t bytes)
{
    if (!fault.interrupted) return bytes;
    if (fault.n_interrupted++ % 2 == 0) {
        errno = EINTR;
        return 0;
    }
    return bytes > 777 ? 777 : bytes;
}

ssize_t write(int fd, const void *data, size_t bytes)
{
    const size_t some = cut(bytes);
    if (fails(WRITE) || (bytes > 0 && some == 0)) return -1;
    return syscall(SYS_write, fd, data, some);
}

ssize_t read(int fd, void *data, size_t bytes)
{
    const size_t some = cut(bytes);
    if (fails(READ) || (bytes > 0 && some == 0)) return -1;
    return syscall(SYS_read, fd, data, some);
}

int fsync(int fd)
{
    if (fails(FSYNC) || cut(1) == 0) return -1;
    return (int)syscall(SYS_fsync, fd);
}

int close(int fd)
{
    const long r = syscall(SYS_close, fd);
    return fails(CLOSE) || cut(1) == 0 ? -1 : (int)r;    /* closed or not, it is gone */
}

int rename(const char *from, const char *to)
{
    return fails(RENAME) ? -1 : renameat(AT_FDCWD, from, AT_FDCWD, to);
}

int fchmod(int fd, mode_t mode)
{
    return fails(FCHMOD) ? -1 : (int)syscall(SYS_fchmod, fd, mode);
}

off_t lseek(int fd, off_t at, int from)
{
    return fails(SEEK) ? -1 : (off_t)syscall(SYS_lseek, fd, at, from);
}

static void fail_call(int call, int at, int error)
{
    memset(&fault, 0, sizeof fault);
    fault.call = call;
    fault.at = at;
    fault.error = error;
}

static void fail_nothing(void) { memset(&fault, 0, sizeof fault); }

/* ---- What writes ---- */
/* A model in a file of its own, and a session with some text. */
static char        model_path[400];
static q3n_model  *model;
static q3n_session *session;

static int open_all(void **state)
{
    (void)state;
    q3n_config c = small_config();
    q3n_error err = { Q3N_OK, -1, "" };
    if (make_folder("files") != 0) return -1;
    snprintf(model_path, sizeof model_path, "%s.q3n", folder);
    q3n_session_options o = { .size = sizeof o, .engine_options = &one_thread };
    if (q3n_init_file(model_path, &c, NULL, &err) != Q3N_OK
        || q3n_model_open(&model, model_path, NULL, &err) != Q3N_OK
        || q3n_session_create(&session, model, &o, &err) != Q3N_OK) {
        print_message("%s\n", err.message);
        return -1;
    }
    int32_t ids[300];
    for (int i = 0; i < 300; i++) ids[i] = i % 99;
    return q3n_session_eval(session, ids, 300, NULL) != Q3N_OK;
}

static int start(void **state)
{
    (void)state;
    alarm(PATIENCE);                     /* ends the program: nothing here may wait */
    return 0;
}

static int close_all(void **state)
{
    q3n_session_destroy(session);
    q3n_model_close(model);
    remove(model_path);
    return remove_folder(state);
}

static q3n_result write_session(const char *path, q3n_error *err)
{
    const q3n_result r = q3n_session_save(session, path);
    *err = *q3n_session_error(session);
    return r;
}

static q3n_result write_quantised(const char *path, q3n_error *err)
{
    const q3n_quantize_options o = { .size = sizeof o, .recipe = "q8", .n_threads = 1 };
    return q3n_quantize_file(path, model, &o, err);
}

static q3n_result write_random(const char *path, q3n_error *err)
{
    const q3n_config c = small_config();
    const q3n_init_options o = { .size = sizeof o, .n_threads = 1 };
    return q3n_init_file(path, &c, &o, err);
}

static const struct {
    const char *name;
    q3n_result (*write)(const char *path, q3n_error *err);
} writers[] = {
    { "q3n_session_save", write_session }, { "q3n_quantize_file", write_quantised },
    { "q3n_init_file", write_random }, { "q3n_file_check", q3n_file_check },
};

/* q3n_file_check writes no bytes and puts nothing in place. */
#define CHECK   (COUNT(writers) - 1)
#define N_WHOLE CHECK

/* ---- What is in the folder ---- */
static void put_file(const char *path, const char *text, mode_t mode)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
    assert_int_equal(chmod(path, mode), 0);
}

static char *get_file(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    struct stat st;
    assert_int_equal(fstat(fileno(f), &st), 0);
    *bytes = (size_t)st.st_size;
    char *data = malloc(*bytes + 1);
    assert_non_null(data);
    assert_int_equal(fread(data, 1, *bytes, f), *bytes);
    data[*bytes] = 0;
    fclose(f);
    return data;
}

static void expect_old(const char *path, mode_t mode)
{
    size_t bytes;
    struct stat st;
    char *data = get_file(path, &bytes);
    assert_string_equal(data, "old");
    free(data);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 07777, mode);
}

/* The file is what the writer writes elsewhere. */
static void expect_written(int w, const char *path)
{
    q3n_error err;
    char other[400];
    size_t a_bytes, b_bytes;
    snprintf(other, sizeof other, "%s.again", folder);
    assert_int_equal(writers[w].write(other, &err), Q3N_OK);
    char *a = get_file(path, &a_bytes), *b = get_file(other, &b_bytes);
    assert_int_equal(a_bytes, b_bytes);
    assert_memory_equal(a, b, a_bytes);
    free(a);
    free(b);
    remove(other);
}

static void must_write(int w, const char *path)
{
    q3n_error err = { Q3N_OK, -1, "" };
    if (writers[w].write(path, &err) != Q3N_OK) fail_msg("%s: %s", writers[w].name, err.message);
}

/* It fails, names the path and gives the reason. */
static void must_fail(int w, const char *path, q3n_result want, const char *reason)
{
    q3n_error err = { Q3N_OK, -1, "" };
    const q3n_result r = writers[w].write(path, &err);
    fail_nothing();
    if (r != want || err.code != want || !strstr(err.message, reason)
        || strncmp(err.message, path, strlen(path) < 100 ? strlen(path) : 80) != 0)
        fail_msg("%s %s: %d '%s', expected %d '%s'", writers[w].name, path, r, err.message, want,
                 reason);
}

/* ---- Writing ---- */
static void test_new_and_again(void **state)
{
    (void)state;
    char path[400];
    struct stat st;
    in_folder(path, "x");
    const mode_t old = umask(027);
    for (int w = 0; w < N_WHOLE; w++) {
        must_write(w, path);
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(st.st_mode & 07777, 0640);
        expect_written(w, path);
        must_write(w, path);             /* over itself */
        expect_written(w, path);
        assert_int_equal(count_files(NULL), 1);
        remove(path);
    }
    umask(old);
    must_write(CHECK, path);
    assert_int_equal(count_files(NULL), 0);
}

static void test_mode_is_kept(void **state)
{
    (void)state;
    char path[400];
    struct stat st;
    in_folder(path, "x");
    static const mode_t modes[] = { 0600, 0640, 0666, 0755 };
    for (int w = 0; w < N_WHOLE; w++)
        for (int i = 0; i < COUNT(modes); i++) {
            put_file(path, "old", modes[i]);
            must_write(w, path);
            assert_int_equal(stat(path, &st), 0);
            assert_int_equal(st.st_mode & 07777, modes[i]);
            assert_true(st.st_size > 100);
        }
    put_file(path, "old", 0600);
    must_write(CHECK, path);
    expect_old(path, 0600);
}

/* Root writes over another's file: it stays the other's. */
static void test_owner_is_kept(void **state)
{
    (void)state;
    char path[400];
    struct stat st;
    if (geteuid() != 0) skip();
    in_folder(path, "x");
    for (int w = 0; w < N_WHOLE; w++) {
        put_file(path, "old", 0600);
        assert_int_equal(chown(path, NOBODY, NOBODY), 0);
        must_write(w, path);
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(st.st_uid, NOBODY);
        assert_int_equal(st.st_gid, NOBODY);
        assert_int_equal(st.st_mode & 07777, 0600);
    }
}

/* Chains of links, absolute and relative, into another folder, and to nothing. */
static void test_links(void **state)
{
    (void)state;
    char one[400], two[400], real[400], absolute[400], where[256];
    struct stat st;
    assert_non_null(getcwd(where, sizeof where));
    in_folder(one, "one");
    in_folder(two, "two");
    snprintf(real, sizeof real, "%s.real", folder);
    snprintf(absolute, sizeof absolute, "%s/%.100s", where, one);
    const char *name = strrchr(folder, '/') + 1;
    char target[400];
    snprintf(target, sizeof target, "../%.100s.real", name);
    assert_int_equal(symlink(target, one), 0);
    assert_int_equal(symlink(absolute, two), 0);
    for (int w = 0; w < N_WHOLE; w++)
        for (int there = 0; there < 2; there++) {
            remove(real);
            if (there) put_file(real, "old", 0600);
            must_write(w, two);
            assert_int_equal(lstat(one, &st), 0);
            assert_true(S_ISLNK(st.st_mode));
            assert_int_equal(lstat(two, &st), 0);
            assert_true(S_ISLNK(st.st_mode));
            assert_int_equal(lstat(real, &st), 0);
            assert_true(S_ISREG(st.st_mode));
            expect_written(w, real);
            assert_int_equal(count_files(NULL), 2);
        }
    remove(real);
}

/* Names that cannot be files, or are none: refused before anything is written. */
static void test_what_is_no_file(void **state)
{
    (void)state;
    char path[400], longest[6000];
    const struct { const char *name, *reason; } list[] = {
        { "directory", "it is a directory" }, { "pipe", "it is not a regular file" },
        { "null", "it is not a regular file" }, { "loop", strerror(ELOOP) },
        { "none/x", strerror(ENOENT) }, { "pipe/x", strerror(ENOTDIR) },
    };
    assert_int_equal(mkdir(in_folder(path, "directory"), 0700), 0);
    assert_int_equal(mkfifo(in_folder(path, "pipe"), 0600), 0);
    assert_int_equal(symlink("/dev/null", in_folder(path, "null")), 0);
    assert_int_equal(symlink("loop", in_folder(path, "loop")), 0);
    memset(longest, 'x', sizeof longest);
    for (int w = 0; w < COUNT(writers); w++) {
        for (int i = 0; i < COUNT(list); i++)
            must_fail(w, in_folder(path, list[i].name), Q3N_ERR_IO, list[i].reason);
        must_fail(w, "", Q3N_ERR_IO, "the path is empty");
        longest[sizeof longest - 1] = 0;
        must_fail(w, longest, Q3N_ERR_IO, "too long");
        in_folder(longest, "");
        const size_t start = strlen(longest);
        longest[start] = 'x';
        longest[start + 256] = 0;        /* one byte more than a name may have */
        must_fail(w, longest, Q3N_ERR_IO, strerror(ENAMETOOLONG));
        longest[start + 255] = 0;
        must_write(w, longest);          /* the longest there is */
        remove(longest);
        longest[start + 255] = longest[start + 256] = 'x';
        assert_int_equal(count_files(NULL), COUNT(list) - 2);
    }
}

/* What a path holds cannot reach a terminal. */
static void test_hostile_paths(void **state)
{
    (void)state;
    char path[400];
    q3n_error err = { Q3N_OK, -1, "" };
    in_folder(path, "a\n\x1b[31m\xff/x");
    for (int k = 0; k < COUNT(writers); k++) {
        assert_int_equal(writers[k].write(path, &err), Q3N_ERR_IO);
        assert_non_null(strstr(err.message, "/a\\x0A\\x1B[31m\\xFF/x: "));
        assert_non_null(strstr(err.message, strerror(ENOENT)));
    }
}

/* A name of characters of several bytes is cut between two of them. */
static void test_part_names(void **state)
{
    (void)state;
    char path[400], name[400];
    for (int extra = 0; extra < 3; extra++) {
        in_folder(path, "");
        for (int i = 0; i < extra; i++) strcat(path, "a");
        for (int i = 0; i < 80; i++) strcat(path, "\xE2\x82\xAC");
        q3n__output o;
        q3n_error err;
        assert_int_equal(q3n__output_open(&o, path, NULL, &err), Q3N_OK);
        assert_int_equal(count_files(name), 1);
        const size_t stem = strlen(name) - strlen(".0123456789abcdef.part");
        assert_true(stem <= 200 && (stem - (size_t)extra) % 3 == 0);
        assert_int_equal(q3n__output_close(&o, Q3N_ERR_CANCELLED, &err), Q3N_ERR_CANCELLED);
        assert_int_equal(count_files(NULL), 0);
    }
}

/* In a process of its own that is not root, but in group SHARED: returns what fn does. */
static int as_nobody(int (*fn)(void))
{
    const gid_t shared = SHARED;
    fflush(NULL);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        alarm(PATIENCE);
        if (geteuid() == 0 && (setgroups(1, &shared) != 0 || setgid(NOBODY) != 0
                               || setuid(NOBODY) != 0)) _exit(100);
        _exit(fn());
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 200;
}

static int refused_everywhere(void)
{
    char path[400];
    for (int w = 0; w < COUNT(writers); w++) {
        q3n_error err = { Q3N_OK, -1, "" };
        if (writers[w].write(in_folder(path, "locked"), &err) != Q3N_ERR_IO
            || !strstr(err.message, strerror(EACCES))) return 1 + w;
        if (writers[w].write(in_folder(path, "closed/x"), &err) != Q3N_ERR_IO
            || !strstr(err.message, strerror(EACCES))) return 11 + w;
        if (writers[w].write(in_folder(path, "closed/there"), &err) != Q3N_ERR_IO
            || !strstr(err.message, strerror(EACCES))) return 21 + w;
    }
    return 0;
}

static void test_no_permission(void **state)
{
    (void)state;
    char path[400];
    put_file(in_folder(path, "locked"), "old", 0444);
    assert_int_equal(mkdir(in_folder(path, "closed"), 0755), 0);
    put_file(in_folder(path, "closed/there"), "old", 0666);
    assert_int_equal(chmod(in_folder(path, "closed"), 0555), 0);
    assert_int_equal(chmod(folder, 0777), 0);
    assert_int_equal(as_nobody(refused_everywhere), 0);
    expect_old(in_folder(path, "locked"), 0444);
    expect_old(in_folder(path, "closed/there"), 0666);
    assert_int_equal(count_files(NULL), 2);
    assert_int_equal(chmod(in_folder(path, "closed"), 0755), 0);
    remove(in_folder(path, "closed/there"));
    assert_int_equal(chmod(folder, 0700), 0);
}

/* Files over which NOBODY writes, and what has their place then. */
static const struct { unsigned owner, group, mode, new_group, new_mode; } given[] = {
    { 0, SHARED, 0660, SHARED, 0660 },   /* it may not give files away, but to its groups        */
    { NOBODY, SHARED, 0640, SHARED, 0640 },
    { NOBODY, 0, 0640, NOBODY, 0600 },   /* root's group could read it, NOBODY's could not       */
    { NOBODY, 0, 0664, NOBODY, 0644 },
    { NOBODY, 0, 0606, NOBODY, 0606 },
    { 0, 0, 0666, NOBODY, 0666 },
};

static int write_given(void)
{
    char path[400], name[40];
    struct stat st;
    for (int w = 0; w < N_WHOLE; w++)
        for (int i = 0; i < COUNT(given); i++) {
            q3n_error err;
            snprintf(name, sizeof name, "%d-%d", w, i);
            if (writers[w].write(in_folder(path, name), &err) != Q3N_OK
                || stat(path, &st) != 0 || st.st_uid != NOBODY || st.st_gid != given[i].new_group
                || (st.st_mode & 07777) != given[i].new_mode) return 1 + 10 * w + i;
        }
    return 0;
}

static void test_group_is_kept(void **state)
{
    (void)state;
    char path[400], name[40];
    if (geteuid() != 0) skip();
    for (int w = 0; w < N_WHOLE; w++)
        for (int i = 0; i < COUNT(given); i++) {
            snprintf(name, sizeof name, "%d-%d", w, i);
            put_file(in_folder(path, name), "old", 0600);
            assert_int_equal(chown(path, given[i].owner, given[i].group), 0);
            assert_int_equal(chmod(path, given[i].mode), 0);
        }
    assert_int_equal(chmod(folder, 0777), 0);
    assert_int_equal(as_nobody(write_given), 0);
    assert_int_equal(chmod(folder, 0700), 0);
}

/* The limit on a file's size stands for the disk. */
static void test_full_disk(void **state)
{
    (void)state;
    char path[400];
    in_folder(path, "x");
    struct rlimit before;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    void (*old)(int) = signal(SIGXFSZ, SIG_IGN);
    for (int w = 0; w < N_WHOLE; w++) {
        size_t bytes;
        must_write(w, path);
        free(get_file(path, &bytes));
        remove(path);
        const size_t limits[] = { 0, 1, 1000, bytes / 2, bytes - 1 };
        for (int there = 0; there < 2; there++)
            for (int i = 0; i < COUNT(limits); i++) {
                if (there) put_file(path, "old", 0600);
                struct rlimit low = before;
                low.rlim_cur = limits[i];
                assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
                q3n_error err = { Q3N_OK, -1, "" };
                const q3n_result r = writers[w].write(path, &err);
                assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
                assert_int_equal(r, Q3N_ERR_IO);
                assert_non_null(strstr(err.message, strerror(EFBIG)));
                assert_int_equal(count_files(NULL), there);
                if (there) expect_old(path, 0600);
            }
        remove(path);
    }
    signal(SIGXFSZ, old);
}

/* Every call of the system that a writer makes fails once, with an old file there and without. */
static void test_each_call_fails(void **state)
{
    (void)state;
    char path[400];
    in_folder(path, "x");
    static const int calls[] = { WRITE, FSYNC, CLOSE, RENAME, FCHMOD, SEEK };
    int n_failed[N_FAULTS] = { 0 };
    for (int w = 0; w < N_WHOLE; w++)
        for (int there = 0; there < 2; there++)
            for (int i = 0; i < COUNT(calls); i++)
                for (int at = 0; at < 5000; at += at < 20 ? 1 : 11) {
                    q3n_error err = { Q3N_OK, -1, "" };
                    remove(path);
                    if (there) put_file(path, "old", 0640);
                    fail_call(calls[i], at, EIO);
                    const q3n_result r = writers[w].write(path, &err);
                    const int reached = fault.seen > at;
                    fail_nothing();
                    if (r == Q3N_OK) {
                        /* What comes after the new name is in place is no failure. */
                        assert_true(!reached || (at == 1 && (calls[i] == FSYNC
                                                             || calls[i] == CLOSE)));
                        assert_int_equal(count_files(NULL), 1);
                        if (!reached) break;
                        continue;
                    }
                    n_failed[calls[i]]++;
                    assert_int_equal(r, Q3N_ERR_IO);
                    assert_true(reached);
                    assert_non_null(strstr(err.message, strerror(EIO)));
                    assert_int_equal(strncmp(err.message, path, strlen(path)), 0);
                    assert_int_equal(count_files(NULL), there);
                    if (there) expect_old(path, 0640);
                }
    for (int i = 0; i < COUNT(calls); i++) assert_true(n_failed[calls[i]] >= 2);
    assert_true(n_failed[WRITE] > 50);
}

/* Signals that interrupt every other call, and calls that transfer less than asked. */
static void test_interrupted(void **state)
{
    (void)state;
    char path[400];
    in_folder(path, "x");
    for (int w = 0; w < N_WHOLE; w++) {
        fail_nothing();
        fault.interrupted = 1;
        must_write(w, path);
        const int n = fault.n_interrupted;
        fail_nothing();
        assert_true(n > 100);
        expect_written(w, path);
    }
    must_write(0, path);
    fault.interrupted = 1;
    q3n_session_reset(session);
    assert_int_equal(q3n_session_load(session, path), Q3N_OK);
    assert_true(fault.n_interrupted > 100);
    fail_nothing();
    assert_int_equal(q3n_session_length(session), 300);
}

/* What was written is told without a look at the file. */
static void test_written(void **state)
{
    (void)state;
    char path[400];
    q3n_error err;
    q3n_model *m;
    q3n_model_stats told = Q3N_INIT(q3n_model_stats), found = Q3N_INIT(q3n_model_stats);
    const q3n_config c = small_config();
    in_folder(path, "x");
    for (int i = -1; i < 0 || q3n_recipe_name(i); i++) {
        const q3n_init_options io = { .size = sizeof io, .n_threads = 1, .written = &told };
        const q3n_quantize_options qo = { .size = sizeof qo,
                                          .recipe = i < 0 ? NULL : q3n_recipe_name(i),
                                          .n_threads = 1, .written = &told };
        memset(&told, 0xC7, sizeof told);
        told.size = sizeof told;
        assert_int_equal(i < 0 ? q3n_init_file(path, &c, &io, &err)
                               : q3n_quantize_file(path, model, &qo, &err), Q3N_OK);
        assert_int_equal(q3n_model_open(&m, path, NULL, &err), Q3N_OK);
        q3n_model_stats_get(m, &found);
        assert_memory_equal(&told, &found, sizeof told);
        int64_t n_tensors = 0;
        for (int t = 0; t < Q3N_TYPE_COUNT; t++) n_tensors += told.types[t].n_tensors;
        assert_int_equal(n_tensors, q3n_model_n_tensors(m));
        q3n_model_close(m);
    }
}

/* ---- Two writers of one file; one that is killed ---- */
static void test_two_at_once(void **state)
{
    (void)state;
    char path[400], name[400];
    q3n__output a, b;
    q3n_error err;
    size_t bytes;
    in_folder(path, "x");
    put_file(path, "old", 0600);
    for (int failing = 0; failing < 2; failing++) {
        assert_int_equal(q3n__output_open(&a, path, NULL, &err), Q3N_OK);
        assert_int_equal(q3n__output_open(&b, path, NULL, &err), Q3N_OK);
        assert_int_equal(count_files(NULL), 3);
        assert_true(q3n__output_write(&a, "first", 5) && q3n__output_write(&b, "second", 6));
        expect_old(path, 0600);
        assert_int_equal(q3n__output_close(&a, Q3N_OK, &err), Q3N_OK);
        const q3n_result r = failing ? Q3N_ERR_CANCELLED : Q3N_OK;
        assert_int_equal(q3n__output_close(&b, r, &err), r);
        char *text = get_file(path, &bytes);
        assert_string_equal(text, failing ? "first" : "second");
        free(text);
        assert_int_equal(count_files(name), 1);
        put_file(path, "old", 0600);
    }
}

/* Processes that write one path over and over: whenever it is read, it is whole. */
static void test_processes(void **state)
{
    (void)state;
    char path[400];
    q3n_error err = { Q3N_OK, -1, "" };
    in_folder(path, "x");
    const q3n_config c = small_config();
    fflush(NULL);
    pid_t child[3];
    for (int k = 0; k < COUNT(child); k++) {
        child[k] = fork();
        assert_true(child[k] >= 0);
        if (child[k] > 0) continue;
        alarm(PATIENCE);
        for (int i = 0; i < 10; i++) {
            const q3n_init_options o = { .size = sizeof o, .n_threads = 1, .seed = (uint64_t)k };
            if (q3n_init_file(path, &c, &o, &err) != Q3N_OK) _exit(1);
        }
        _exit(0);
    }
    int n_seen = 0, n_running = COUNT(child);
    while (n_running > 0) {
        q3n_model *m;
        const q3n_result r = q3n_model_open(&m, path, NULL, &err);
        if (r == Q3N_OK) {
            assert_int_equal(q3n_model_verify(m, NULL, &err), Q3N_OK);
            q3n_model_close(m);
            n_seen++;
        } else {
            assert_int_equal(r, Q3N_ERR_NO_FILE);        /* before the first is whole */
        }
        int status;
        if (waitpid(-1, &status, WNOHANG) > 0) {
            assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
            n_running--;
        }
    }
    assert_true(n_seen > 0);
    assert_int_equal(count_files(NULL), 1);
}

static int kill_at(void *user, int64_t done, int64_t total)
{
    (void)total;
    if (done >= *(const int64_t *)user) kill(getpid(), SIGKILL);
    return 0;
}

/* The old file is as it was; the unfinished one that is left is in nobody's way. */
static void test_killed(void **state)
{
    (void)state;
    char path[400];
    in_folder(path, "x");
    put_file(path, "old", 0600);
    const q3n_config c = small_config();
    const int64_t size = q3n_init_bytes(&c, NULL, NULL);
    const int64_t places[] = { 1, size / 2, size };
    for (int i = 0; i < COUNT(places); i++) {
        const q3n_init_options o = { .size = sizeof o,
                                     .progress = { kill_at, (void *)(uintptr_t)&places[i] },
                                     .n_threads = 1 };
        fflush(NULL);
        const pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) _exit(q3n_init_file(path, &c, &o, NULL) == Q3N_OK);
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        expect_old(path, 0600);
        assert_int_equal(count_files(NULL), 2 + i);
    }
    must_write(2, path);
    expect_written(2, path);
}

/* ---- Input and output that are one file ---- */
static void test_input_is_output(void **state)
{
    (void)state;
    char soft[400], hard[400], spelled[400], gone[400];
    size_t before, after;
    const char *name = strrchr(model_path, '/') + 1;
    char *bytes = get_file(model_path, &before);
    snprintf(spelled, sizeof spelled, "%s/.././%.100s", folder, name);
    snprintf(gone, sizeof gone, "../%.100s", name);
    assert_int_equal(symlink(gone, in_folder(soft, "soft")), 0);
    assert_int_equal(link(model_path, in_folder(hard, "hard")), 0);
    const char *const paths[] = { model_path, spelled, soft, hard };
    for (int i = 0; i < COUNT(paths); i++) {
        must_fail(0, paths[i], Q3N_ERR_ARG, "the file that is being read");
        must_fail(1, paths[i], Q3N_ERR_ARG, "the file that is being read");
    }
    assert_int_equal(count_files(NULL), 2);
    char *again = get_file(model_path, &after);
    assert_int_equal(before, after);
    assert_memory_equal(bytes, again, before);
    free(bytes);
    free(again);
    remove(hard);
    must_write(1, hard);                 /* the same name, once it is another file */
}

/* ---- Reading ---- */
static q3n_result read_model(const char *path, q3n_error *err)
{
    q3n_model *m;
    const q3n_result r = q3n_model_open(&m, path, NULL, err);
    q3n_model_close(m);
    return r;
}

static q3n_result read_session(const char *path, q3n_error *err)
{
    const q3n_result r = q3n_session_load(session, path);
    *err = *q3n_session_error(session);
    assert_int_equal(q3n_session_length(session), 300);      /* untouched */
    return r;
}

static const struct {
    const char *name;
    q3n_result (*read)(const char *path, q3n_error *err);
} readers[] = { { "q3n_model_open", read_model }, { "q3n_session_load", read_session } };

static void test_read_what_is_no_file(void **state)
{
    (void)state;
    char path[400], longest[6000];
    memset(longest, 'x', sizeof longest);
    longest[sizeof longest - 1] = 0;
    assert_int_equal(mkdir(in_folder(path, "directory"), 0700), 0);
    assert_int_equal(mkfifo(in_folder(path, "pipe"), 0600), 0);
    assert_int_equal(symlink("/dev/zero", in_folder(path, "zero")), 0);
    assert_int_equal(symlink("none", in_folder(path, "nowhere")), 0);
    assert_int_equal(symlink("loop", in_folder(path, "loop")), 0);
    put_file(in_folder(path, "empty"), "", 0600);
    const struct { const char *name, *reason; q3n_result r; } list[] = {
        { "directory", "it is a directory", Q3N_ERR_IO },
        { "pipe", "it is not a regular file", Q3N_ERR_IO },
        { "zero", "it is not a regular file", Q3N_ERR_IO },
        { "nowhere", strerror(ENOENT), Q3N_ERR_NO_FILE },
        { "none", strerror(ENOENT), Q3N_ERR_NO_FILE },
        { "none/x", strerror(ENOENT), Q3N_ERR_NO_FILE },
        { "loop", strerror(ELOOP), Q3N_ERR_IO },
        { "empty/x", strerror(ENOTDIR), Q3N_ERR_IO },
        { "empty", "", 0 },
    };
    for (int k = 0; k < COUNT(readers); k++) {
        for (int i = 0; i < COUNT(list); i++) {
            q3n_error err = { Q3N_OK, -1, "" };
            const q3n_result r = readers[k].read(in_folder(path, list[i].name), &err);
            if (r == Q3N_OK || r != err.code || (list[i].r && r != list[i].r)
                || !strstr(err.message, list[i].reason)
                || strncmp(err.message, path, strlen(path)) != 0)
                fail_msg("%s %s: %d '%s'", readers[k].name, list[i].name, r, err.message);
        }
        q3n_error err;
        assert_int_equal(readers[k].read(longest, &err), Q3N_ERR_IO);
        assert_int_equal(readers[k].read("", &err), Q3N_ERR_NO_FILE);
    }
}

static int refused_unreadable(void)
{
    char path[400];
    for (int k = 0; k < COUNT(readers); k++) {
        q3n_error err = { Q3N_OK, -1, "" };
        if (readers[k].read(in_folder(path, "closed"), &err) != Q3N_ERR_IO
            || !strstr(err.message, strerror(EACCES))) return 1 + k;
    }
    return 0;
}

static void test_read_without_permission(void **state)
{
    (void)state;
    char path[400];
    put_file(in_folder(path, "closed"), "old", 0000);
    assert_int_equal(chmod(folder, 0755), 0);
    assert_int_equal(as_nobody(refused_unreadable), 0);
    assert_int_equal(chmod(folder, 0700), 0);
}

static void test_read_fails(void **state)
{
    (void)state;
    char path[400];
    q3n_error err = { Q3N_OK, -1, "" };
    must_write(0, in_folder(path, "x"));
    int n_failed = 0;
    for (int at = 0; at < 1000; at++) {
        fail_call(READ, at, EIO);
        const q3n_result r = read_session(path, &err);
        const int reached = fault.seen > at;
        fail_nothing();
        if (r == Q3N_OK) {
            assert_false(reached);
            break;
        }
        n_failed++;
        assert_int_equal(r, Q3N_ERR_IO);
        assert_non_null(strstr(err.message, strerror(EIO)));
        assert_int_equal(strncmp(err.message, path, strlen(path)), 0);
    }
    assert_true(n_failed >= 4);
}

/* No file is open in a program that is started. */
static void test_closed_on_exec(void **state)
{
    (void)state;
    char path[400];
    q3n__output o;
    q3n__input in;
    q3n_error err;
    in_folder(path, "x");
    put_file(path, "old", 0600);
    assert_int_equal(q3n__output_open(&o, path, NULL, &err), Q3N_OK);
    assert_int_equal(q3n__input_open(&in, path, &err), Q3N_OK);
    assert_true(fcntl(o.file.fd, F_GETFD) & FD_CLOEXEC);
    assert_true(fcntl(in.file.fd, F_GETFD) & FD_CLOEXEC);
    assert_int_equal(q3n__input_close(&in, Q3N_OK, &err), Q3N_OK);
    assert_int_equal(q3n__output_close(&o, Q3N_OK, &err), Q3N_OK);
}

/* ---- The cache's directory: failures are warnings ---- */
static void count_warnings(void *user, q3n_log_level level, const char *message)
{
    (void)message;
    *(int *)user += level == Q3N_LOG_WARNING;
}

static void test_cache(void **state)
{
    (void)state;
    int32_t ids[300];
    q3n_error err;
    for (int i = 0; i < 300; i++) ids[i] = (i * 7) % 99;
    static const int calls[] = { NO_FAULT, WRITE, FSYNC, CLOSE, RENAME };
    for (int i = 0; i < COUNT(calls); i++) {
        int n_warnings = 0, n_reused = 0;
        q3n_cache *cache;
        q3n_session *s;
        const q3n_cache_options o = { .size = sizeof o, .max_bytes = 1 << 24, .directory = folder,
                                      .logger = { count_warnings, &n_warnings } };
        assert_int_equal(q3n_cache_create(&cache, model, &o, &err), Q3N_OK);
        const q3n_session_options so = { .size = sizeof so, .cache = cache,
                                         .engine_options = &one_thread };
        assert_int_equal(q3n_session_create(&s, model, &so, &err), Q3N_OK);
        assert_int_equal(q3n_session_prefill(s, ids, 300, NULL, &n_reused), Q3N_OK);
        q3n_session_destroy(s);
        fail_call(calls[i], 0, ENOSPC);
        q3n_cache_destroy(cache);        /* writes what it holds */
        fail_nothing();
        assert_int_equal(n_warnings, calls[i] != NO_FAULT);
        assert_int_equal(count_files(NULL), calls[i] == NO_FAULT);
        empty_folder(NULL);
    }
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, start, empty_folder)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_new_and_again), TEST(test_mode_is_kept), TEST(test_owner_is_kept),
        TEST(test_group_is_kept),
        TEST(test_links), TEST(test_what_is_no_file), TEST(test_part_names),
        TEST(test_hostile_paths), TEST(test_no_permission), TEST(test_full_disk),
        TEST(test_each_call_fails),
        TEST(test_interrupted), TEST(test_written), TEST(test_two_at_once),
        TEST(test_processes), TEST(test_killed),
        TEST(test_input_is_output), TEST(test_read_what_is_no_file),
        TEST(test_read_without_permission), TEST(test_read_fails), TEST(test_closed_on_exec),
        TEST(test_cache),
    };
    return cmocka_run_group_tests_name("files", tests, open_all, close_all);
}
#endif
