/* test_paths.c - the rules of files that hold on every system, Windows too: names in UTF-8 for all
 * that reads and writes, codes and reasons of errors, a file that is replaced, protected, written
 * twice at once or read at the same time.  test_files.c has what POSIX systems can do besides. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "q3n_make.h"
#include "engines.h"
#include "folder.h"
#include "small.h"

#define COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))

/* Two, three and four bytes a character, none of them in a code page with another. */
#define NAME "\xC3\xA9\xD0\xB6\xE2\x82\xAC\xE4\xB8\xAD\xF0\x9F\x98\x80"

static char path[400];

static int begin(void **state)
{
    (void)state;
    if (make_folder("paths") != 0) return -1;
    in_folder(path, NAME);
    return 0;
}

static void make_model(const char *name)
{
    const q3n_config c = small_config();
    const q3n_init_options o = { .size = sizeof o, .n_threads = 1 };
    q3n_error err;
    if (q3n_init_file(name, &c, &o, &err) != Q3N_OK) fail_msg("%s", err.message);
}

static q3n_model *open_model(const char *name)
{
    q3n_error err;
    q3n_model *m;
    if (q3n_model_open(&m, name, NULL, &err) != Q3N_OK) fail_msg("%s", err.message);
    return m;
}

static void remove_file(const char *name) { assert_int_equal(q3n__file_remove(name), 0); }

/* Every function that takes a path takes the same one. */
static void test_names(void **state)
{
    (void)state;
    char other[400], directory[400];
    q3n_error err;
    q3n_session *s;
    q3n_cache *cache;
    q3n_cache_stats stats = Q3N_INIT(q3n_cache_stats);
    int32_t ids[300];
    for (int i = 0; i < 300; i++) ids[i] = i % 99;
    make_model(path);
    q3n_model *m = open_model(path);
    snprintf(other, sizeof other, "%.300s-q", path);
    const q3n_quantize_options qo = { .size = sizeof qo, .recipe = "q8", .n_threads = 1 };
    assert_int_equal(q3n_quantize_file(other, m, &qo, &err), Q3N_OK);
    q3n_model_close(open_model(other));
    remove_file(other);

    /* A cache in a directory of that name, whose files are found again. */
    snprintf(directory, sizeof directory, "%.300s", folder);
    for (int round = 0; round < 2; round++) {
        int n_reused = -1;
        const q3n_cache_options co = { .size = sizeof co,
                                       .max_bytes = 1 << 24, .directory = directory };
        assert_int_equal(q3n_cache_create(&cache, m, &co, &err), Q3N_OK);
        const q3n_session_options so = { .size = sizeof so, .cache = cache,
                                         .engine_options = &one_thread };
        assert_int_equal(q3n_session_create(&s, m, &so, &err), Q3N_OK);
        assert_int_equal(q3n_session_prefill(s, ids, 300, NULL, &n_reused), Q3N_OK);
        assert_int_equal(n_reused, round ? 300 : 0);
        q3n_cache_stats_get(cache, &stats);
        assert_int_equal(stats.n_files, round);
        snprintf(other, sizeof other, "%.300s-s", path);
        assert_int_equal(q3n_file_check(other, &err), Q3N_OK);
        assert_int_equal(q3n_session_load(s, other), round ? Q3N_OK : Q3N_ERR_NO_FILE);
        assert_int_equal(q3n_session_save(s, other), Q3N_OK);
        q3n_session_destroy(s);
        q3n_cache_destroy(cache);
    }
    q3n_model_close(m);
    assert_int_equal(count_files(NULL), 3);
}

/* What is refused, by every function, and why. */
static void test_refused(void **state)
{
    (void)state;
    char none[400], bad[400], longest[6000];
    q3n_error err;
    q3n_model *m;
    in_folder(none, "none/" NAME);
    in_folder(bad, "\xC3");
    memset(longest, 'x', sizeof longest);
    longest[sizeof longest - 1] = 0;
    const struct { const char *name; q3n_result read; } list[] = {
        { none, Q3N_ERR_NO_FILE }, { folder, Q3N_ERR_IO }, { longest, Q3N_ERR_IO },
        { "", Q3N_ERR_NO_FILE },
#ifdef _WIN32
        { bad, Q3N_ERR_IO }, { "NUL", Q3N_ERR_IO },
#endif
    };
    for (int i = 0; i < COUNT(list); i++) {
        assert_int_equal(q3n_model_open(&m, list[i].name, NULL, &err), list[i].read);
        assert_null(m);
        assert_int_equal(q3n_file_check(list[i].name, &err), Q3N_ERR_IO);
        const char *reason = strstr(err.message, ": cannot write: ");
        assert_non_null(reason);
        assert_true(strlen(reason) > strlen(": cannot write: "));
    }
    assert_int_equal(q3n_model_open(&m, folder, NULL, &err), Q3N_ERR_IO);
    assert_non_null(strstr(err.message, "it is a directory"));
    assert_int_equal(count_files(NULL), 0);
}

static void test_input_is_output(void **state)
{
    (void)state;
    char spelled[400];
    q3n_error err;
    make_model(path);
    q3n_model *m = open_model(path);
    snprintf(spelled, sizeof spelled, "%.60s/./" NAME, folder);
    assert_int_equal(q3n_quantize_file(path, m, NULL, &err), Q3N_ERR_ARG);
    assert_int_equal(q3n_quantize_file(spelled, m, NULL, &err), Q3N_ERR_ARG);
    assert_non_null(strstr(err.message, "give another name"));
    q3n_model_close(m);
    assert_int_equal(count_files(NULL), 1);
}

/* A protected file stays as it is. */
static void test_protected(void **state)
{
    (void)state;
    q3n_error err;
    make_model(path);
#ifdef _WIN32
    wchar_t wide[Q3N__PATH_ROOM];
    assert_int_equal(q3n__file_wide(path, wide), 0);
    assert_true(SetFileAttributesW(wide, FILE_ATTRIBUTE_READONLY));
    assert_int_equal(q3n_file_check(path, &err), Q3N_ERR_IO);
    assert_true(SetFileAttributesW(wide, FILE_ATTRIBUTE_NORMAL));
#else
    assert_int_equal(chmod(path, 0444), 0);
    assert_int_equal(q3n_file_check(path, &err), geteuid() ? Q3N_ERR_IO : Q3N_OK);
#endif
    assert_int_equal(count_files(NULL), 1);
}

/* Two begin before either ends; who ends last is read, and who is stopped leaves nothing. */
static void test_two_at_once(void **state)
{
    (void)state;
    q3n_error err;
    for (int stopped = 0; stopped < 2; stopped++) {
        q3n__output a, b;
        q3n__input in;
        char text[7] = "";
        assert_int_equal(q3n__output_open(&a, path, NULL, &err), Q3N_OK);
        assert_int_equal(q3n__output_open(&b, path, NULL, &err), Q3N_OK);
        assert_true(q3n__output_write(&a, "wrong1", 6) && q3n__output_write(&b, "second", 6));
        assert_true(q3n__output_rewind(&a) && q3n__output_write(&a, "first!", 6));
        assert_int_equal(q3n__output_close(&a, Q3N_OK, &err), Q3N_OK);
        const q3n_result r = stopped ? Q3N_ERR_CANCELLED : Q3N_OK;
        assert_int_equal(q3n__output_close(&b, r, &err), r);
        assert_int_equal(q3n__input_open(&in, path, &err), Q3N_OK);
        assert_int_equal(in.info.bytes, 6);
        assert_true(q3n__input_read(&in, text, 6));
        assert_string_equal(text, stopped ? "first!" : "second");
        assert_false(q3n__input_read(&in, text, 1));     /* the end */
        assert_int_equal(in.code, Q3N__FILE_ENDS);
        q3n__input_close(&in, Q3N_OK, &err);
        assert_int_equal(count_files(NULL), 1);
    }
}

/* A reader goes on reading the old file.  POSIX systems replace it meanwhile, Windows does not: an
 * error, and nothing is left. */
static void test_replaced_while_read(void **state)
{
    (void)state;
    q3n_error err;
    q3n__output out;
    q3n__input in;
    char text[4] = "";
#ifdef _WIN32
    const q3n_result want = Q3N_ERR_IO;
#else
    const q3n_result want = Q3N_OK;
#endif
    assert_int_equal(q3n__output_open(&out, path, NULL, &err), Q3N_OK);
    assert_true(q3n__output_write(&out, "old", 3));
    assert_int_equal(q3n__output_close(&out, Q3N_OK, &err), Q3N_OK);
    assert_int_equal(q3n__input_open(&in, path, &err), Q3N_OK);
    assert_int_equal(q3n__output_open(&out, path, NULL, &err), Q3N_OK);
    assert_true(q3n__output_write(&out, "new", 3));
    assert_int_equal(q3n__output_close(&out, Q3N_OK, &err), want);
    assert_int_equal(count_files(NULL), 1);
    assert_true(q3n__input_read(&in, text, 3));
    assert_string_equal(text, "old");
    q3n__input_close(&in, Q3N_OK, &err);
}

/* Removes by the library: the C library of Windows knows no UTF-8. */
static void note_name(void *user, const char *name, int64_t bytes, int64_t when)
{
    assert_true(bytes >= 0 && when > 1000000000);
    in_folder((char *)user, name);
}

static int clear(void **state)
{
    (void)state;
    for (char name[400] = "";; name[0] = 0) {
        if (q3n__directory_list(folder, "", note_name, name) != 0) return -1;
        if (!name[0]) return 0;
        if (q3n__file_remove(name) != 0) return -1;
    }
}

#define TEST(f) cmocka_unit_test_teardown(f, clear)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_names), TEST(test_refused), TEST(test_input_is_output), TEST(test_protected),
        TEST(test_two_at_once), TEST(test_replaced_while_read),
    };
    return cmocka_run_group_tests_name("paths", tests, begin, remove_folder);
}
