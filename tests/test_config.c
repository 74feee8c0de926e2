/* test_config.c - presets and their sizes, overrides, which fields contradict each other, and the
 * tensor plan against the header's list of TENSORS BY NAME. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "q3n_make.h"

#define COUNT(a) (sizeof(a) / sizeof(a)[0])

static q3n_config preset(const char *name)
{
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_error err = { .code = Q3N_OK };
    if (q3n_config_preset(name, &c, &err) != Q3N_OK) fail_msg("%s", err.message);
    return c;
}

static void set(q3n_config *c, const char *field, const char *value)
{
    q3n_error err = { .code = Q3N_OK };
    if (q3n_config_set(c, field, value, &err) != Q3N_OK) fail_msg("%s", err.message);
}

static void set_fails(q3n_config *c, const char *field, const char *value, const char *why)
{
    const q3n_config before = *c;
    q3n_error err = { .code = Q3N_OK };
    assert_int_equal(q3n_config_set(c, field, value, &err), Q3N_ERR_ARG);
    assert_int_equal(err.code, Q3N_ERR_ARG);
    if (!strstr(err.message, why)) fail_msg("'%s' does not say '%s'", err.message, why);
    assert_memory_equal(&before, c, sizeof before);
}

static void check_passes(const q3n_config *c)
{
    q3n_error err = { .code = Q3N_OK };
    if (q3n_config_check(c, &err) != Q3N_OK) fail_msg("%s", err.message);
}

static void check_fails(const q3n_config *c, const char *why)
{
    q3n_error err = { .code = Q3N_OK };
    assert_int_equal(q3n_config_check(c, &err), Q3N_ERR_ARG);
    if (!strstr(err.message, why)) fail_msg("'%s' does not say '%s'", err.message, why);
    assert_int_equal(q3n_config_check(c, NULL), Q3N_ERR_ARG);
}

/* ---- Presets ---- */
typedef struct { int64_t trunk, mtp, active; const q3n_config *c; } sizes;

static q3n_result add_size(void *user, const q3n__plan_item *item)
{
    sizes *s = user;
    const int64_t n = item->dim[0] * item->dim[1] * item->dim[2];
    if (strncmp(item->name, "mtp.", 4) == 0) s->mtp += n;
    else                                     s->trunk += n;
    if (strncmp(item->name, "mtp.", 4) == 0 || strcmp(item->name, "embed_tokens.weight") == 0)
        return Q3N_OK;
    s->active += item->experts ? n / s->c->num_experts * s->c->num_experts_per_tok : n;
    return Q3N_OK;
}

static sizes size_of(const q3n_config *c)
{
    sizes s = { 0, 0, 0, c };
    assert_int_equal(q3n__plan_visit(c, add_size, &s), Q3N_OK);
    return s;
}

static void test_presets_are_valid(void **state)
{
    (void)state;
    int n = 0;
    for (const char *name; (name = q3n_config_preset_name(n)) != NULL; n++) {
        const q3n_config c = preset(name);
        check_passes(&c);
        for (int l = c.num_hidden_layers; l < Q3N_MAX_LAYERS; l++)
            assert_int_equal(c.layer_types[l] + c.layer_experts[l], 0);
        for (int i = 0; i < n; i++) assert_string_not_equal(name, q3n_config_preset_name(i));
    }
    assert_true(n >= 28);
    assert_null(q3n_config_preset_name(-1));
    assert_null(q3n_config_preset_name(n));
}

/* Counted weights of published models, and the names' figures where only these are known. */
static void test_preset_sizes(void **state)
{
    (void)state;
    static const struct { const char *name; double billions, tolerance; } list[] = {
        { "qwen3.5-0.8b",  0.752393024, 0 }, { "qwen3.5-2b",      1.881825088, 0 },
        { "qwen3-0.6b",    0.596049920, 0 }, { "qwen3-30b-a3b",  30.532122624, 0 },
        { "qwen3-235b-a22b", 235.093634560, 0 },
        { "qwen3-1.7b", 1.7, 0.02 }, { "qwen3-4b", 4.0, 0.02 }, { "qwen3-8b", 8.2, 0.02 },
        { "qwen3-14b", 14.8, 0.02 }, { "qwen3-32b", 32.8, 0.02 },
        { "qwen3-next-80b-a3b", 80.0, 0.02 }, { "qwen3-coder-next", 80.0, 0.02 },
        { "qwen3-coder-480b-a35b", 480.0, 0.02 },
        { "qwen3.5-4b", 4.2, 0.02 }, { "qwen3.5-9b", 9.0, 0.02 }, { "qwen3.5-27b", 27.0, 0.02 },
        { "qwen3.6-27b", 27.0, 0.02 }, { "qwen3.5-35b-a3b", 35.0, 0.02 },
        { "qwen3.6-35b-a3b", 35.0, 0.02 }, { "qwen3.5-122b-a10b", 122.0, 0.02 },
        { "qwen3.5-397b-a17b", 397.0, 0.02 }
    };
    for (size_t i = 0; i < COUNT(list); i++) {
        const q3n_config c = preset(list[i].name);
        const sizes s = size_of(&c);
        const double got = (double)s.trunk, want = list[i].billions * 1e9;
        if (!(fabs(got - want) <= list[i].tolerance * want + 0.5))
            fail_msg("%s has %.0f weights, expected %.0f", list[i].name, got, want);
        assert_true((s.mtp > 0) == (c.num_mtp_layers > 0));
    }
}

/* G2 is the layer of the 80B model: a token of it reads 336 million weights. */
static void test_preset_active_weights(void **state)
{
    (void)state;
    const q3n_config c = preset("g2"), big = preset("qwen3-next-80b-a3b");
    const double active = (double)size_of(&c).active;
    assert_true(fabs(active - 336e6) < 4e6);
    assert_true(fabs((double)size_of(&big).active - 3.56e9) < 0.05e9);
}

static void test_design_presets(void **state)
{
    (void)state;
    static const struct { const char *name; int d, L, H, K, D, context, E, k, I; } table[] = {
        { "80b_a3b", 2048, 48, 16, 4, 128, 8192, 64, 8, 1536 },
        { "80b",     2048, 48, 16, 4, 128, 8192,  1, 1, 2816 },
        { "small",   1024, 12, 16, 4,  64, 2048,  8, 2,  768 },
        { "tiny",     512,  6,  8, 2,  64, 1024,  4, 1,  512 }
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        const q3n_config c = preset(table[i].name);
        assert_int_equal(c.family, Q3N_FAMILY_DESIGN);
        assert_int_equal(c.vocab_size, 151936);
        assert_int_equal(c.hidden_size, table[i].d);
        assert_int_equal(c.num_hidden_layers, table[i].L);
        assert_int_equal(c.num_attention_heads, table[i].H);
        assert_int_equal(c.num_key_value_heads, table[i].K);
        assert_int_equal(c.head_dim, table[i].D);
        assert_int_equal(c.rotary_dim, table[i].D);
        assert_int_equal(c.max_position_embeddings, table[i].context);
        assert_int_equal(c.num_experts, table[i].E);
        assert_int_equal(c.num_experts_per_tok, table[i].k);
        assert_int_equal(c.moe_intermediate_size, table[i].I);
        assert_int_equal(c.qk_norm + c.attn_output_gate + c.tie_word_embeddings, 0);
        assert_true(c.rope_theta == 1e6 && c.rms_norm_eps == 1e-6);
    }
}

static void test_hybrid_preset(void **state)
{
    (void)state;
    const q3n_config c = preset("qwen3-next-80b-a3b");
    assert_int_equal(c.attn_output_gate + c.qk_norm + c.norm_topk_prob, 3);
    assert_int_equal(c.rotary_dim, 64);
    assert_int_equal(c.linear_num_value_heads, 32);
    for (int l = 0; l < 48; l++) {
        assert_int_equal(c.layer_types[l], l % 4 != 3);
        assert_int_equal(c.layer_experts[l], 1);
    }
}

static void test_unknown_preset(void **state)
{
    (void)state;
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_error err;
    assert_int_equal(q3n_config_preset("qwen9", &c, &err), Q3N_ERR_ARG);
    assert_non_null(strstr(err.message, "'qwen9'"));
    for (int i = 0; q3n_config_preset_name(i); i++)
        assert_non_null(strstr(err.message, q3n_config_preset_name(i)));
    assert_int_equal(q3n_config_preset("", &c, NULL), Q3N_ERR_ARG);
}

/* ---- Overrides ---- */
static void test_set(void **state)
{
    (void)state;
    q3n_config c = preset("tiny");
    set(&c, "num_experts", "64");
    assert_int_equal(c.num_experts, 64);
    set(&c, "experts", "16");      assert_int_equal(c.num_experts, 16);
    set(&c, "top_k", "3");         assert_int_equal(c.num_experts_per_tok, 3);
    set(&c, "hidden", "256");      assert_int_equal(c.hidden_size, 256);
    set(&c, "heads", "4");         assert_int_equal(c.num_attention_heads, 4);
    set(&c, "kv_heads", "1");      assert_int_equal(c.num_key_value_heads, 1);
    set(&c, "vocab", "1000");      assert_int_equal(c.vocab_size, 1000);
    set(&c, "context", "1e3");     assert_int_equal(c.max_position_embeddings, 1000);
    set(&c, "qk_norm", "true");    assert_int_equal(c.qk_norm, 1);
    set(&c, "qk_norm", "0");       assert_int_equal(c.qk_norm, 0);
    set(&c, "family", "qwen3_5_moe"); assert_int_equal(c.family, Q3N_FAMILY_QWEN3_5_MOE);
    set(&c, "family", "5");        assert_int_equal(c.family, Q3N_FAMILY_QWEN3);
    set(&c, "rope_type", "yarn");  assert_int_equal(c.rope_type, Q3N_ROPE_YARN);
    set(&c, "pooling", "mean");    assert_int_equal(c.pooling, Q3N_POOLING_MEAN);
    set(&c, "classifier_input", "logits");
    assert_int_equal(c.classifier_input, Q3N_CLASSIFIER_LOGITS);
    set(&c, "rms_norm_eps", "1e-5");   assert_true(c.rms_norm_eps == 1e-5);
    set(&c, "rms_norm_eps", "0.000001"); assert_true(c.rms_norm_eps == 1e-6);
    set(&c, "rope_theta", "5000000.0"); assert_true(c.rope_theta == 5e6);
    set(&c, "rope_factor", "+1.25e2"); assert_true(c.rope_factor == 125.0);
}

static void test_set_errors(void **state)
{
    (void)state;
    q3n_config c = preset("tiny");
    set_fails(&c, "no_such_field", "1", "no_such_field");
    set_fails(&c, "num_experts", "", "not a number");
    set_fails(&c, "num_experts", "8x", "not a number");
    set_fails(&c, "num_experts", " 8", "not a number");
    set_fails(&c, "num_experts", "0x8", "not a number");
    set_fails(&c, "num_experts", "nan", "not a number");
    set_fails(&c, "num_experts", "1e", "not a number");
    set_fails(&c, "num_experts", "1.2.3", "not a number");
    set_fails(&c, "num_experts", "2.5", "whole number");
    set_fails(&c, "num_experts", "-1", "[0, 65536]");
    set_fails(&c, "num_experts", "99999999999999999999", "[0, 65536]");
    set_fails(&c, "rope_theta", "1,5", "not a number");   /* whatever the host's locale is */
    set_fails(&c, "num_experts", "1e400", "not a number");
    set_fails(&c, "layers", "0", "[1, 256]");
    set_fails(&c, "layers", "257", "[1, 256]");
    set_fails(&c, "qk_norm", "2", "[0, 1]");
    set_fails(&c, "qk_norm", "yes", "not a number");
    set_fails(&c, "family", "llama", "one of its words");
    set_fails(&c, "family", "6", "[0, 5]");
    set_fails(&c, "rope_theta", "0.5", "rope_theta");
    set_fails(&c, "layer_types", "", "0 and 1");
    set_fails(&c, "layer_types", "0,", "0 and 1");
    set_fails(&c, "layer_types", "0,2", "0 and 1");
    set_fails(&c, "layer_types", "01", "0 and 1");
    set_fails(&c, "layer_experts", "1,,1", "0 and 1");
    assert_int_equal(q3n_config_set(&c, "family", "llama", NULL), Q3N_ERR_ARG);
}

static void check_types(const q3n_config *c, const char *types)
{
    assert_int_equal((int)strlen(types), c->num_hidden_layers);
    for (int l = 0; l < Q3N_MAX_LAYERS; l++)
        assert_int_equal(c->layer_types[l], l < c->num_hidden_layers && types[l] == 'd');
}

static void test_layers_keep_the_pattern(void **state)
{
    (void)state;
    q3n_config c = preset("g2");
    check_types(&c, "ddda");
    set(&c, "layers", "10");
    check_types(&c, "dddadddadd");
    set(&c, "num_hidden_layers", "12");
    check_types(&c, "dddadddaddda");
    set(&c, "layers", "5");
    check_types(&c, "dddad");
    set(&c, "layers", "9");
    check_types(&c, "dddadddad");
    for (int l = 0; l < 9; l++) assert_int_equal(c.layer_experts[l], 1);

    /* The kinds of FFN count too: here only six layers repeat. */
    set(&c, "layers", "6");
    set(&c, "layer_types", "1,0");
    set(&c, "layer_experts", "0,1,1");
    set(&c, "layers", "13");
    check_types(&c, "dadadadadadad");
    for (int l = 0; l < 13; l++) assert_int_equal(c.layer_experts[l], l % 3 != 0);

    c = preset("small");
    set(&c, "layers", "256");
    for (int l = 0; l < 256; l++) assert_int_equal(c.layer_types[l] + 2 * c.layer_experts[l], 2);
}

/* Of the output the size alone is read: what is larger than the library's, and holds anything. */
static void test_preset_reads_the_size(void **state)
{
    (void)state;
    struct { q3n_config c; uint8_t more[64]; } out;
    const q3n_config want = preset("g1");
    q3n_error err;
    memset(&out, 0x7f, sizeof out);
    out.c.size = sizeof out;
    assert_int_equal(q3n_config_preset("g1", &out.c, &err), Q3N_OK);
    assert_int_equal(out.c.size, sizeof out);
    out.c.size = sizeof out.c;
    assert_memory_equal(&out.c, &want, sizeof want);
    for (size_t i = 0; i < sizeof out.more; i++) assert_int_equal(out.more[i], 0);

    out.c.size = 0;
    assert_int_equal(q3n_config_preset("g1", &out.c, &err), Q3N_ERR_ARG);
    assert_non_null(strstr(err.message, "q3n_config: its size is not set"));
}

static void test_set_survives_a_broken_struct(void **state)
{
    (void)state;
    q3n_config c = Q3N_INIT(q3n_config);
    memset(&c, 0x7f, sizeof c);
    c.size = sizeof c;
    set(&c, "layers", "3");
    set(&c, "layer_types", "0");
    check_types(&c, "aaa");
}

static void test_layer_kinds(void **state)
{
    (void)state;
    q3n_config c = preset("g1");
    set(&c, "layer_types", "1,1,0");
    check_types(&c, "ddaddaddadda");
    set(&c, "layer_types", "0");
    check_types(&c, "aaaaaaaaaaaa");
    set(&c, "layer_types", "1,0,0,0,0,0,0,0,0,0,0,0,1,1");   /* longer than the model */
    check_types(&c, "daaaaaaaaaaa");
}

/* Every field printed and read back. */
static void test_fields_round_trip(void **state)
{
    (void)state;
    for (int p = 0; q3n_config_preset_name(p); p++) {
        const q3n_config c = preset(q3n_config_preset_name(p));
        q3n_config copy = preset("tiny");
        char text[64];
        int n = 0;
        for (const char *name; (name = q3n_config_field(&c, n, text)) != NULL; n++)
            set(&copy, name, text);
        assert_int_equal(n, Q3N__N_CONFIG_ROWS);
        memcpy(copy.layer_types, c.layer_types, sizeof c.layer_types);
        memcpy(copy.layer_experts, c.layer_experts, sizeof c.layer_experts);
        assert_memory_equal(&copy, &c, sizeof c);
    }
    char text[64];
    const q3n_config c = preset("tiny");
    assert_null(q3n_config_field(&c, -1, text));
    assert_string_equal(q3n_config_field(&c, 0, text), "family");
    assert_string_equal(text, "design");
}

/* ---- Check ---- */
static void test_check_ranges(void **state)
{
    (void)state;
    for (size_t i = 0; i < Q3N__N_CONFIG_ROWS; i++) {
        const q3n__config_row *row = &q3n__config_rows[i];
        q3n_config c = preset("tiny");
        if (row->kind == 'F') {
            const double bad[] = { row->min - 1, row->max * 2, NAN, INFINITY, -INFINITY };
            for (size_t k = 0; k < COUNT(bad); k++) {
                memcpy((uint8_t *)&c + row->offset, &bad[k], sizeof bad[k]);
                check_fails(&c, row->name);
            }
        } else {
            const int bad[] = { (int)row->min - 1, (int)row->max + 1, INT_MIN, INT_MAX };
            for (size_t k = 0; k < COUNT(bad); k++) {
                memcpy((uint8_t *)&c + row->offset, &bad[k], sizeof bad[k]);
                check_fails(&c, row->name);
            }
        }
    }
    const q3n_config zero = Q3N_INIT(q3n_config);
    check_fails(&zero, "vocab_size");
}

static void test_check_contradictions(void **state)
{
    (void)state;
    static const struct { const char *preset, *field, *value, *field2, *value2, *why; } list[] = {
        { "tiny", "kv_heads", "3", NULL, NULL, "multiple of num_key_value_heads" },
        { "tiny", "rotary_dim", "63", NULL, NULL, "rotary_dim" },
        { "tiny", "rotary_dim", "66", NULL, NULL, "rotary_dim" },
        { "tiny", "head_dim", "32", NULL, NULL, "rotary_dim" },
        { "tiny", "experts", "0", NULL, NULL, "layer 0 has experts" },
        { "tiny", "top_k", "0", NULL, NULL, "layer 0 has experts" },
        { "tiny", "moe_intermediate_size", "0", NULL, NULL, "layer 0 has experts" },
        { "tiny", "top_k", "5", NULL, NULL, "num_experts_per_tok 5" },
        { "tiny", "layer_experts", "1,0", NULL, NULL, "layer 1 has a dense FFN" },
        { "tiny", "layer_types", "0,0,1", NULL, NULL, "layer 2 is a DeltaNet layer" },
        { "qwen3-0.6b", "intermediate_size", "0", NULL, NULL, "dense FFN" },
        { "g1", "linear_num_key_heads", "0", NULL, NULL, "DeltaNet" },
        { "g1", "linear_num_key_heads", "5", NULL, NULL, "multiple of linear_num_key_heads" },
        { "g1", "linear_conv_kernel_dim", "0", NULL, NULL, "DeltaNet" },
        { "g1", "linear_key_head_dim", "0", NULL, NULL, "DeltaNet" },
        { "g1", "linear_value_head_dim", "0", NULL, NULL, "DeltaNet" },
        { "g1", "causal", "0", NULL, NULL, "causal" },
        { "tiny", "num_mtp_layers", "1", "causal", "0", "num_mtp_layers" },
        { "qwen3-0.6b", "num_mtp_layers", "1", "experts", "4", "mtp.layers.0 has experts" },
        { "tiny", "rope_type", "yarn", NULL, NULL, "rope_original_max_position" },
        { "tiny", "rope_type", "table", "rotary_dim", "32", "table" },
        { "tiny", "vocab", "16777216", "hidden", "1048576", NULL },
        { "tiny", "experts", "65536", "moe_intermediate_size", "16777216", "too large" },
        { "tiny", "heads", "4096", "head_dim", "1024", NULL },
        { "g1", "linear_num_value_heads", "4096", "linear_value_head_dim", "1024", NULL }
    };
    for (size_t i = 0; i < COUNT(list); i++) {
        q3n_config c = preset(list[i].preset);
        set(&c, list[i].field, list[i].value);
        if (list[i].field2) set(&c, list[i].field2, list[i].value2);
        if (list[i].why) check_fails(&c, list[i].why);
        else             check_passes(&c);
    }
    q3n_config c = preset("tiny");
    set(&c, "rope_type", "yarn");
    set(&c, "rope_original_max_position", "1024");
    check_passes(&c);
    set(&c, "rope_beta_slow", "0");
    check_fails(&c, "rope_beta_slow");
    set(&c, "rope_beta_slow", "64");
    check_fails(&c, "rope_beta_fast");
    set(&c, "rope_beta_slow", "1");
    set(&c, "rope_theta", "1");
    check_fails(&c, "rope_theta");
    c = preset("tiny");
    c.layer_types[3] = 2;
    check_fails(&c, "layer 3");
    c.layer_types[3] = 0;
    c.layer_experts[5] = 255;
    check_fails(&c, "layer 5");
}

/* ---- Tensor plan ---- */
typedef struct { const char *want; size_t at; } listing;

/* One line an item, "name role dims", compared with the expected text. */
static q3n_result compare_line(void *user, const q3n__plan_item *item)
{
    listing *l = user;
    char line[200], dims[80];
    static const char *const roles[] = { "mat", "vec", "router" };
    int at = 0;
    for (int k = 0; k < item->n_dims; k++)
        at += snprintf(dims + at, sizeof dims - (size_t)at, "%s%lld", k ? "x" : "",
                       (long long)item->dim[k]);
    for (int k = item->n_dims; k < 3; k++) assert_true(item->dim[k] == 1);
    snprintf(line, sizeof line, "%s %s %s%s%s\n", item->name, roles[item->role], dims,
             item->optional ? " optional" : "", item->experts ? " experts" : "");
    if (strncmp(l->want + l->at, line, strlen(line)) != 0)
        fail_msg("plan has '%s', expected '%.60s'", line, l->want + l->at);
    l->at += strlen(line);
    return Q3N_OK;
}

static void check_plan(const q3n_config *c, const char *want)
{
    listing l = { want, 0 };
    check_passes(c);
    assert_int_equal(q3n__plan_visit(c, compare_line, &l), Q3N_OK);
    assert_string_equal(want + l.at, "");
}

static q3n_config small_hybrid(void)
{
    q3n_config c = preset("g1");
    static const char *const sets[][2] = {
        { "vocab", "50" }, { "hidden", "8" }, { "layers", "4" }, { "layer_types", "1,0,1,0" },
        { "layer_experts", "1,1,0,0" }, { "heads", "4" }, { "kv_heads", "2" }, { "head_dim", "6" },
        { "rotary_dim", "2" }, { "intermediate_size", "10" }, { "experts", "3" }, { "top_k", "2" },
        { "moe_intermediate_size", "5" }, { "shared_expert_intermediate_size", "7" },
        { "linear_num_key_heads", "2" }, { "linear_num_value_heads", "4" },
        { "linear_key_head_dim", "3" }, { "linear_value_head_dim", "5" }, { "num_mtp_layers", "1" }
    };
    for (size_t i = 0; i < COUNT(sets); i++) set(&c, sets[i][0], sets[i][1]);
    return c;
}

static void test_plan_of_a_hybrid(void **state)
{
    (void)state;
    const q3n_config c = small_hybrid();
    check_plan(&c,
        "embed_tokens.weight mat 50x8\n"
        "norm.weight vec 8\n"
        "lm_head.weight mat 50x8\n"
        "layers.0.input_layernorm.weight vec 8\n"
        "layers.0.post_attention_layernorm.weight vec 8\n"
        "layers.0.linear_attn.in_proj_qkvz.weight mat 52x8\n"
        "layers.0.linear_attn.in_proj_ba.weight router 8x8\n"
        "layers.0.linear_attn.conv1d.weight vec 4x32\n"
        "layers.0.linear_attn.A_log vec 4\n"
        "layers.0.linear_attn.dt_bias vec 4\n"
        "layers.0.linear_attn.norm.weight vec 5\n"
        "layers.0.linear_attn.out_proj.weight mat 8x20\n"
        "layers.0.mlp.gate.weight router 3x8\n"
        "layers.0.mlp.experts.gate_proj.weight mat 3x5x8 experts\n"
        "layers.0.mlp.experts.up_proj.weight mat 3x5x8 experts\n"
        "layers.0.mlp.experts.down_proj.weight mat 3x8x5 experts\n"
        "layers.0.mlp.shared_expert.gate_proj.weight mat 7x8\n"
        "layers.0.mlp.shared_expert.up_proj.weight mat 7x8\n"
        "layers.0.mlp.shared_expert.down_proj.weight mat 8x7\n"
        "layers.0.mlp.shared_expert_gate.weight router 1x8\n"
        "layers.1.input_layernorm.weight vec 8\n"
        "layers.1.post_attention_layernorm.weight vec 8\n"
        "layers.1.self_attn.q_proj.weight mat 48x8\n"
        "layers.1.self_attn.k_proj.weight mat 12x8\n"
        "layers.1.self_attn.v_proj.weight mat 12x8\n"
        "layers.1.self_attn.o_proj.weight mat 8x24\n"
        "layers.1.self_attn.q_norm.weight vec 6\n"
        "layers.1.self_attn.k_norm.weight vec 6\n"
        "layers.1.mlp.gate.weight router 3x8\n"
        "layers.1.mlp.experts.gate_proj.weight mat 3x5x8 experts\n"
        "layers.1.mlp.experts.up_proj.weight mat 3x5x8 experts\n"
        "layers.1.mlp.experts.down_proj.weight mat 3x8x5 experts\n"
        "layers.1.mlp.shared_expert.gate_proj.weight mat 7x8\n"
        "layers.1.mlp.shared_expert.up_proj.weight mat 7x8\n"
        "layers.1.mlp.shared_expert.down_proj.weight mat 8x7\n"
        "layers.1.mlp.shared_expert_gate.weight router 1x8\n"
        "layers.2.input_layernorm.weight vec 8\n"
        "layers.2.post_attention_layernorm.weight vec 8\n"
        "layers.2.linear_attn.in_proj_qkvz.weight mat 52x8\n"
        "layers.2.linear_attn.in_proj_ba.weight router 8x8\n"
        "layers.2.linear_attn.conv1d.weight vec 4x32\n"
        "layers.2.linear_attn.A_log vec 4\n"
        "layers.2.linear_attn.dt_bias vec 4\n"
        "layers.2.linear_attn.norm.weight vec 5\n"
        "layers.2.linear_attn.out_proj.weight mat 8x20\n"
        "layers.2.mlp.gate_proj.weight mat 10x8\n"
        "layers.2.mlp.up_proj.weight mat 10x8\n"
        "layers.2.mlp.down_proj.weight mat 8x10\n"
        "layers.3.input_layernorm.weight vec 8\n"
        "layers.3.post_attention_layernorm.weight vec 8\n"
        "layers.3.self_attn.q_proj.weight mat 48x8\n"
        "layers.3.self_attn.k_proj.weight mat 12x8\n"
        "layers.3.self_attn.v_proj.weight mat 12x8\n"
        "layers.3.self_attn.o_proj.weight mat 8x24\n"
        "layers.3.self_attn.q_norm.weight vec 6\n"
        "layers.3.self_attn.k_norm.weight vec 6\n"
        "layers.3.mlp.gate_proj.weight mat 10x8\n"
        "layers.3.mlp.up_proj.weight mat 10x8\n"
        "layers.3.mlp.down_proj.weight mat 8x10\n"
        "mtp.fc.weight mat 8x16\n"
        "mtp.pre_fc_norm_embedding.weight vec 8\n"
        "mtp.pre_fc_norm_hidden.weight vec 8\n"
        "mtp.norm.weight vec 8\n"
        "mtp.layers.0.input_layernorm.weight vec 8\n"
        "mtp.layers.0.post_attention_layernorm.weight vec 8\n"
        "mtp.layers.0.self_attn.q_proj.weight mat 48x8\n"
        "mtp.layers.0.self_attn.k_proj.weight mat 12x8\n"
        "mtp.layers.0.self_attn.v_proj.weight mat 12x8\n"
        "mtp.layers.0.self_attn.o_proj.weight mat 8x24\n"
        "mtp.layers.0.self_attn.q_norm.weight vec 6\n"
        "mtp.layers.0.self_attn.k_norm.weight vec 6\n"
        "mtp.layers.0.mlp.gate.weight router 3x8\n"
        "mtp.layers.0.mlp.experts.gate_proj.weight mat 3x5x8 experts\n"
        "mtp.layers.0.mlp.experts.up_proj.weight mat 3x5x8 experts\n"
        "mtp.layers.0.mlp.experts.down_proj.weight mat 3x8x5 experts\n"
        "mtp.layers.0.mlp.shared_expert.gate_proj.weight mat 7x8\n"
        "mtp.layers.0.mlp.shared_expert.up_proj.weight mat 7x8\n"
        "mtp.layers.0.mlp.shared_expert.down_proj.weight mat 8x7\n"
        "mtp.layers.0.mlp.shared_expert_gate.weight router 1x8\n");
}

/* The design's older checkpoints: biases everywhere, rotary tables, a classifier over logits. */
static void test_plan_with_everything_optional(void **state)
{
    (void)state;
    q3n_config c = preset("tiny");
    static const char *const sets[][2] = {
        { "vocab", "50" }, { "hidden", "8" }, { "layers", "2" }, { "layer_experts", "1,0" },
        { "heads", "2" }, { "kv_heads", "1" }, { "head_dim", "4" }, { "rotary_dim", "4" },
        { "experts", "3" }, { "moe_intermediate_size", "5" }, { "intermediate_size", "10" },
        { "attention_bias", "1" }, { "mlp_bias", "1" }, { "router_bias", "1" },
        { "rope_type", "table" }, { "num_labels", "3" }, { "classifier_input", "logits" }
    };
    for (size_t i = 0; i < COUNT(sets); i++) set(&c, sets[i][0], sets[i][1]);
    static const char want[] =
        "embed_tokens.weight mat 50x8\n"
        "norm.weight vec 8\n"
        "lm_head.weight mat 50x8\n"
        "score.weight router 3x50\n"
        "score.bias vec 3 optional\n"
        "rope.cos vec 0x2\n"
        "rope.sin vec 0x2\n"
        "layers.0.input_layernorm.weight vec 8\n"
        "layers.0.post_attention_layernorm.weight vec 8\n"
        "layers.0.self_attn.q_proj.weight mat 8x8\n"
        "layers.0.self_attn.k_proj.weight mat 4x8\n"
        "layers.0.self_attn.v_proj.weight mat 4x8\n"
        "layers.0.self_attn.o_proj.weight mat 8x8\n"
        "layers.0.self_attn.q_proj.bias vec 8\n"
        "layers.0.self_attn.k_proj.bias vec 4\n"
        "layers.0.self_attn.v_proj.bias vec 4\n"
        "layers.0.self_attn.o_proj.bias vec 8\n"
        "layers.0.mlp.gate.weight router 3x8\n"
        "layers.0.mlp.gate.bias vec 3\n"
        "layers.0.mlp.experts.gate_proj.weight mat 3x5x8 experts\n"
        "layers.0.mlp.experts.up_proj.weight mat 3x5x8 experts\n"
        "layers.0.mlp.experts.down_proj.weight mat 3x8x5 experts\n"
        "layers.0.mlp.experts.gate_proj.bias vec 3x5\n"
        "layers.0.mlp.experts.up_proj.bias vec 3x5\n"
        "layers.0.mlp.experts.down_proj.bias vec 3x8\n"
        "layers.1.input_layernorm.weight vec 8\n"
        "layers.1.post_attention_layernorm.weight vec 8\n"
        "layers.1.self_attn.q_proj.weight mat 8x8\n"
        "layers.1.self_attn.k_proj.weight mat 4x8\n"
        "layers.1.self_attn.v_proj.weight mat 4x8\n"
        "layers.1.self_attn.o_proj.weight mat 8x8\n"
        "layers.1.self_attn.q_proj.bias vec 8\n"
        "layers.1.self_attn.k_proj.bias vec 4\n"
        "layers.1.self_attn.v_proj.bias vec 4\n"
        "layers.1.self_attn.o_proj.bias vec 8\n"
        "layers.1.mlp.gate_proj.weight mat 10x8\n"
        "layers.1.mlp.up_proj.weight mat 10x8\n"
        "layers.1.mlp.down_proj.weight mat 8x10\n"
        "layers.1.mlp.gate_proj.bias vec 10\n"
        "layers.1.mlp.up_proj.bias vec 10\n"
        "layers.1.mlp.down_proj.bias vec 8\n";
    check_plan(&c, want);

    static const char head[] =
        "embed_tokens.weight mat 50x8\n"
        "norm.weight vec 8\n"
        "lm_head.weight mat 50x8 optional\n"
        "score.weight router 3x8\n"
        "score.bias vec 3 optional\n";
    char hidden[sizeof want + sizeof head];
    snprintf(hidden, sizeof hidden, "%s%s", head, strstr(want, "rope.cos"));
    set(&c, "classifier_input", "hidden");
    check_plan(&c, hidden);

    static const char tied[] = "embed_tokens.weight mat 50x8\nnorm.weight vec 8\n";
    snprintf(hidden, sizeof hidden, "%s%s", tied, strstr(want, "rope.cos"));
    set(&c, "num_labels", "0");
    set(&c, "tie_word_embeddings", "1");
    check_plan(&c, hidden);
}

/* Fields of one owner do not collide, and vectors go to pointers, matrices to q3n__mat. */
typedef struct { uint8_t used[Q3N_MAX_LAYERS + 2][sizeof(q3n__layer)]; } field_map;

static q3n_result mark_field(void *user, const q3n__plan_item *item)
{
    field_map *map = user;
    const size_t bytes = item->role == Q3N__ROLE_VEC ? sizeof(float *) : sizeof(q3n__mat);
    const size_t owner = item->layer == Q3N__LAYER_NONE
                       ? sizeof(q3n__weights) : sizeof(q3n__layer);
    uint8_t *used = map->used[item->layer + 1];
    assert_true(item->field + bytes <= owner);
    for (size_t i = 0; i < bytes; i++) {
        assert_int_equal(used[item->field + i], 0);
        used[item->field + i] = 1;
    }
    return Q3N_OK;
}

static q3n_result stop_at_third(void *user, const q3n__plan_item *item)
{
    (void)item;
    return ++*(int *)user == 3 ? Q3N_ERR_FULL : Q3N_OK;
}

static void test_plan_fields(void **state)
{
    (void)state;
    assert_true(sizeof(q3n__weights) <= sizeof(q3n__layer));
    static field_map map;
    memset(&map, 0, sizeof map);
    q3n_config c = small_hybrid();
    set(&c, "num_labels", "2");
    set(&c, "attention_bias", "1");
    set(&c, "mlp_bias", "1");
    set(&c, "router_bias", "1");
    assert_int_equal(q3n__plan_visit(&c, mark_field, &map), Q3N_OK);
    int calls = 0;
    assert_int_equal(q3n__plan_visit(&c, stop_at_third, &calls), Q3N_ERR_FULL);
    assert_int_equal(calls, 3);
}

/* With a size_t of 32 bits: what would wrap is refused, what runs there is not. */
static void test_sizes_fit(void **state)
{
    (void)state;
    static const struct { const char *preset; int batch, capacity, n_threads; q3n_result want; }
    cases[] = {
        { "g1", 512, 32768, 1, Q3N_OK },
        { "g2", 65536, 65536, 1, Q3N_ERR_MEMORY },      /* activations                            */
        { "g2", 512, 1 << 30, 8, Q3N_ERR_MEMORY },      /* partial results of attention           */
        { "g2", 512, 1 << 30, 1, Q3N_OK },              /* pages come as tokens do                */
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        q3n_config c = Q3N_INIT(q3n_config);
        q3n_error err;
        const q3n_engine_options o = { .size = sizeof o, .batch_size = cases[i].batch,
                                       .n_threads = cases[i].n_threads };
        const int n = cases[i].capacity;
        assert_int_equal(q3n_config_preset(cases[i].preset, &c, &err), Q3N_OK);
        assert_int_equal(q3n__check_sizes(&c, &o, n, UINT32_MAX / 4, &err), cases[i].want);
        assert_int_equal(q3n__check_sizes(&c, &o, n, SIZE_MAX / 4, &err), Q3N_OK);
    }
    /* The largest that a file may say. */
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_error err;
    const q3n_engine_options o = { .size = sizeof o, .batch_size = 1 << 16, .n_threads = 1024 };
    assert_int_equal(q3n_config_preset("g2", &c, &err), Q3N_OK);
    c.num_hidden_layers = Q3N_MAX_LAYERS;
    c.num_attention_heads = c.num_key_value_heads = c.linear_num_value_heads = 4096;
    c.linear_num_key_heads = 4096;
    c.head_dim = c.linear_key_head_dim = c.linear_value_head_dim = 1024;
    c.hidden_size = 1 << 20;
    c.num_experts_per_tok = 1024;
    c.intermediate_size = c.moe_intermediate_size = 1 << 24;
    c.shared_expert_intermediate_size = 1 << 24;
    assert_int_equal(q3n__check_sizes(&c, &o, 1 << 30, UINT32_MAX / 4, &err), Q3N_ERR_MEMORY);
    assert_int_equal(q3n__check_sizes(&c, &o, 1 << 30, SIZE_MAX / 4, &err), Q3N_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_presets_are_valid), cmocka_unit_test(test_preset_sizes),
        cmocka_unit_test(test_preset_reads_the_size),
        cmocka_unit_test(test_preset_active_weights), cmocka_unit_test(test_design_presets),
        cmocka_unit_test(test_hybrid_preset), cmocka_unit_test(test_unknown_preset),
        cmocka_unit_test(test_set), cmocka_unit_test(test_set_errors),
        cmocka_unit_test(test_layers_keep_the_pattern),
        cmocka_unit_test(test_set_survives_a_broken_struct), cmocka_unit_test(test_layer_kinds),
        cmocka_unit_test(test_fields_round_trip), cmocka_unit_test(test_check_ranges),
        cmocka_unit_test(test_check_contradictions),
        cmocka_unit_test(test_plan_of_a_hybrid),
        cmocka_unit_test(test_plan_with_everything_optional), cmocka_unit_test(test_plan_fields),
        cmocka_unit_test(test_sizes_fit),
    };
    return cmocka_run_group_tests_name("config", tests, NULL, NULL);
}
