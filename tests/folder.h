/* folder.h - a folder of a test program's own under build/, so that whatever it leaves is seen.
 * Include after cmocka.h. */
#ifndef Q3N_TESTS_FOLDER_H
#define Q3N_TESTS_FOLDER_H

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[64];

static inline char *in_folder(char *path, const char *name)   /* path [400] */
{
    snprintf(path, 400, "%s/%.320s", folder, name);
    return path;
}

/* How many there are.  last [400]: the name of one of them; NULL = not wanted. */
static inline int count_files(char *last)
{
    int n = 0;
    DIR *dir = opendir(folder);
    assert_non_null(dir);
    for (const struct dirent *e; (e = readdir(dir)) != NULL; ) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        if (last) snprintf(last, 400, "%.320s", e->d_name);
        n++;
    }
    closedir(dir);
    return n;
}

static inline int empty_folder(void **state)
{
    (void)state;
    char name[400], path[400];
    for (int left = count_files(NULL); left > 0 && count_files(name) > 0; left--) {
        in_folder(path, name);
        if (remove(path) != 0) return -1;
    }
    return count_files(NULL) == 0 ? 0 : -1;      /* an open file may linger on Windows */
}

static inline int remove_folder(void **state)
{
    return empty_folder(state) || rmdir(folder);
}

static inline int make_folder(const char *suite)
{
    snprintf(folder, sizeof folder, "build/test_%s_%ld", suite, (long)getpid());
#ifdef _WIN32
    if (mkdir(folder) == 0) return 0;
#else
    if (mkdir(folder, 0700) == 0) return 0;
#endif
    print_message("run this from the top of the repository, where build/ is\n");
    return -1;
}

#endif
