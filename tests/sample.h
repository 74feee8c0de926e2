/* sample.h - what tests of other things want of a sampler; after qwen3next.h. */
#ifndef SAMPLE_H
#define SAMPLE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

/* The token that a sampler chooses from logits that have numbers. */
static inline int32_t sample(q3n_sampler *s, const float *logits)
{
    int32_t token = -1;
    assert_int_equal(q3n_sampler_sample(s, logits, &token), Q3N_OK);
    return token;
}

#endif
