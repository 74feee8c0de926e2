/* random.h - numbers without a pattern that are the same in every run. */
#ifndef Q3N_TESTS_RANDOM_H
#define Q3N_TESTS_RANDOM_H

#include <stdint.h>

static inline uint32_t next_random(uint32_t *state)    /* xorshift32; begin with what is not 0 */
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

#endif
