/* small.h - the geometry of a model that is made in no time.  Include after cmocka.h and
 * q3n_make.h. */
#ifndef Q3N_TESTS_SMALL_H
#define Q3N_TESTS_SMALL_H

static inline q3n_config small_config(void)
{
    static const char *const set[][2] = {
        { "vocab", "99" }, { "hidden", "32" }, { "layers", "2" }, { "context", "600" },
        { "heads", "2" }, { "kv_heads", "1" }, { "head_dim", "16" }, { "rotary_dim", "16" },
        { "experts", "4" }, { "moe_intermediate_size", "32" }, { "intermediate_size", "32" },
    };
    q3n_config c = Q3N_INIT(q3n_config);
    assert_int_equal(q3n_config_preset("tiny", &c, NULL), Q3N_OK);
    for (size_t i = 0; i < sizeof set / sizeof *set; i++)
        assert_int_equal(q3n_config_set(&c, set[i][0], set[i][1], NULL), Q3N_OK);
    return c;
}

#endif
