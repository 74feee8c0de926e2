/* fuzz.h - what the fuzz targets share.  Include after qwen3next.h. */
#ifndef Q3N_TESTS_FUZZ_H
#define Q3N_TESTS_FUZZ_H

#include "messages.h"
#include "random.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

/* Ends the program, as a sanitizer does, where what must hold does not. */
static inline void require(int condition, const char *what)
{
    if (condition) return;
    fprintf(stderr, "fuzz: %s\n", what);
    abort();
}

/* The record of a call that failed with r. */
static inline void check_error(const q3n_error *e, q3n_result r)
{
    require(e->code == r, "the record has another code");
    require(message_is_clean(e->message, sizeof e->message), "a message with other bytes");
}

/* Without a fuzzer: files of a corpus, each as it is and changed in a fixed way. */
static inline int replay_files(int argc, char **argv, void (*replay)(const uint8_t *, size_t))
{
    static uint8_t data[1 << 20];
    require(argc > 1, "no files to replay");
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        require(f != NULL, argv[i]);
        const size_t n = fread(data, 1, sizeof data, f);
        fclose(f);
        replay(data, n);
        printf("%s: %zu bytes, replayed\n", argv[i], n);
    }
    return 0;
}

#endif
