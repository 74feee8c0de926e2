/* q3n_make.h - makes model files for qwen3next.h: quantised copies, models with random weights
 *
 * SPDX-License-Identifier: MIT (text: LICENSE)
 *
 * A second header on top of the first, C11, for tools and tests: a program that only runs models
 * has no use for it.  It calls private functions of qwen3next.h, so both are of one version, and
 * the implementation of one stands after that of the other.  In ONE C file of your program, and
 * nowhere else the implementation of qwen3next.h:
 *
 *     #define Q3N_IMPLEMENTATION
 *     #define Q3N_MAKE_IMPLEMENTATION
 *     #include "q3n_make.h"
 *
 * and include it without the defines wherever else you need it, from C99 or C++11.  It includes
 * "qwen3next.h", which lies beside it or in a folder of -I, unless you have included that before.
 * Link with -lm, and -lpthread on Unix.  A complete program, a copy in q4:
 *
 *     #include <stdio.h>
 *     int main(int argc, char **argv)
 *     {
 *         q3n_error err;
 *         q3n_model *model;
 *         const q3n_quantize_options o = { .size = sizeof o, .recipe = "q4" };
 *         if (argc < 3) return 2;
 *         q3n_result r = q3n_model_open(&model, argv[1], NULL, &err);
 *         if (r == Q3N_OK) {
 *             r = q3n_quantize_file(argv[2], model, &o, &err);
 *             q3n_model_close(model);
 *         }
 *         if (r != Q3N_OK) fprintf(stderr, "%s\n", err.message);
 *         return r != Q3N_OK;
 *     }
 *
 * CONTENTS                                                    (search for >>tag to jump)
 *
 *     [1] API                             >>api
 *     [2] GEOMETRY                        >>geometry
 *     [3] QUANTISE                        >>quantise
 *     [4] WRITER                          >>writer
 *     [5] RANDOM WEIGHTS                  >>random
 *
 * BUILD MACROS are those of qwen3next.h and hold for both: Q3N_STATIC and Q3N_DEF for these
 * functions too; with Q3N_NO_STDIO files are made in memory only; Q3N_NO_THREADS.
 *
 * What qwen3next.h says of arguments, errors, files and the ABI in its manual, and the FILE FORMAT,
 * hold here; q3n_rows is one of the structs that do not change.  Nothing is global: any threads may
 * call these functions at once, also with one open model.  A call that makes a file has threads of
 * its own while it runs.
 *
 * DETERMINISM.  The same input gives the same file on every machine, for any number of threads;
 * tables of rotary embeddings with random weights follow the C library's cos and sin.  Compile with
 * -ffp-contract=off, or this does not hold.
 *
 * REFERENCES
 *     [HF]    Hugging Face transformers 5.17, models/qwen3_next: how weights are initialised
 *     [CARDS] the published models' cards on the Hugging Face hub: geometries
 */

/* The implementation of qwen3next.h, if it is wanted here; its API in any case. */
#if !defined(QWEN3NEXT_H) || (defined(Q3N_IMPLEMENTATION) && !defined(Q3N__IMPLEMENTED))
#  include "qwen3next.h"
#endif

/* =====================================================================================
 * [1] API                                                                       >>api
 * ===================================================================================== */
#ifndef Q3N_MAKE_H
#define Q3N_MAKE_H

#if Q3N_VERSION != 200
#  error "q3n_make.h and qwen3next.h are of different versions: take both from one"
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Geometries ---- */

/* Fill *out, whose size must be set and of which no more is read, with a named geometry: "tiny"
 * "small" "80b" "80b_a3b" (the design model), "g1" "g2" "g3" (benchmarks) and published models such
 * as "qwen3-next-80b-a3b", "qwen3-30b-a3b", "qwen3-0.6b".  Errors: Q3N_ERR_ARG; where there is no
 * such geometry, with the list of names in err. */
Q3N_DEF q3n_result  q3n_config_preset(const char *name, q3n_config *out, q3n_error *err);
Q3N_DEF const char *q3n_config_preset_name(int i);    /* i = 0, 1, ...; NULL after the last */

/* Override one field by its name: ("num_experts", "64").  Enums take their word or number;
 * "layers", "heads", "kv_heads", "hidden", "experts", "top_k", "vocab", "context" are short forms.
 * num_hidden_layers keeps the pattern of layer kinds going.  "layer_types" and "layer_experts"
 * take a comma-separated list of 0 and 1, repeated to the number of layers. */
Q3N_DEF q3n_result q3n_config_set(q3n_config *c, const char *field, const char *value,
                                  q3n_error *err);

/* ---- Quantising ---- */

typedef struct q3n_rows {
    const float *x;                /* [n_rows, n_cols]                                           */
    int64_t      n_rows, n_cols;
    const float *importance;       /* [n_cols] weight of a column's squared error, 0 .. 1e30;
                                      NULL = 1.  Mean squares of the inputs are good ones        */
} q3n_rows;

/* Encode rows as a file holds them.  Scales are searched for the least squared error; the same
 * input gives the same bytes on every machine.  Pieces of a matrix may be encoded on their own, if
 * each but the last has a multiple of 16 rows.
 *
 *   out  [out_bytes]  out: q3n_type_bytes(type, n_rows, n_cols) bytes, no alignment needed
 *
 * Errors: Q3N_ERR_ARG, also for weights that are not finite or that the type cannot hold (f16, and
 * scales, which are f16). */
Q3N_DEF q3n_result q3n_quantize_rows(q3n_type type, const q3n_rows *rows, void *out,
                                     size_t out_bytes, q3n_error *err);

/* Which type a matrix gets: recipe, experts, other matrices, sensitive ones (v_proj of attention,
 * out_proj of DeltaNet), embedding with head and MTP module.  Routers keep a float type; norms and
 * other vectors are f32 in every file. */
#define Q3N_RECIPE_LIST(X)                                                              \
    X(q8,   Q8,   Q8,   Q8,   Q8)                                                       \
    X(q6,   Q6,   Q6,   Q6,   Q6)                                                       \
    X(q4,   Q4,   Q4,   Q6,   Q6)                                                       \
    X(q4m,  Q4,   Q6,   Q6,   Q6)                                                       \
    X(q4l,  Q4,   Q8,   Q8,   Q8)                                                       \
    X(q3,   Q3,   Q6,   Q6,   Q6)                                                       \
    X(bf16, BF16, BF16, BF16, BF16)                                                     \
    X(f16,  F16,  F16,  F16,  F16)                                                      \
    X(f32,  F32,  F32,  F32,  F32)

Q3N_DEF const char *q3n_recipe_name(int i);             /* "q8"; NULL after the last */

typedef struct q3n_quantize_options {  /* begin with Q3N_INIT; zero = default                    */
    size_t        size;
    const char   *recipe;          /* NULL = "q4"                                                */
    int           n_threads;       /* 0 = as for sessions                                        */
    int           allow_requantize;    /* 1 = quantised tensors may get another type, which
                                          loses more than quantising the original does           */
    /* Importance of a tensor's columns, see q3n_rows; NULL = 1.  Called once for each matrix,
     * before anything is written; what it returns is used until the end. */
    const float *(*importance)(void *user, const q3n_tensor *t);
    void         *importance_user;
    q3n_allocator allocator;
    q3n_progress  progress;        /* counts bytes                                               */
    q3n_model_stats *written;      /* out: what the file holds; NULL = not wanted                */
} q3n_quantize_options;

/* Write a copy of a model in other types.  Configuration and tokenizer are copied byte for byte.
 * Uses a few rows of memory for each thread; the file is the same for any number of them.  What is
 * under path stays as it is if that fails or is stopped.
 *
 * Errors: Q3N_ERR_ARG (no such recipe, values that are not finite or that a type cannot hold: the
 * message names tensor, row and column; path is the model's own file, under whatever name),
 * _UNSUPPORTED (quantised input), _IO, _MEMORY, _CANCELLED.
 */
Q3N_DEF q3n_result q3n_quantize_file(const char *path, const q3n_model *in,
                                     const q3n_quantize_options *o, q3n_error *err);

/* ---- Random weights ---- */

typedef struct q3n_init_options {  /* begin with Q3N_INIT; zero = default                        */
    size_t        size;
    q3n_type      type;            /* of the matrices                                            */
    int           n_threads;       /* 0 = as for sessions                                        */
    uint64_t      seed;
    double        stddev;          /* 0 = 0.02                                                   */
    const char   *name;            /* NULL = ""                                                  */
    q3n_allocator allocator;
    q3n_progress  progress;        /* counts bytes                                               */
    q3n_model_stats *written;      /* out: what was written; NULL = not wanted                   */
} q3n_init_options;

/* Write a model file of geometry c with random weights: matrices from a normal distribution
 * truncated at two standard deviations, norms 1, biases 0, A_log and dt_bias as [HF] initialises
 * them.  Quantised matrices get codes as frequent as they are in normal weights, and one scale;
 * tensors that may not have the type have the next finer one.  The file is written as a stream;
 * what is under path stays as it is if that fails or is stopped.  The same seed gives the same file
 * on every machine. */
Q3N_DEF q3n_result q3n_init_file(const char *path, const q3n_config *c, const q3n_init_options *o,
                                 q3n_error *err);

/* The size of that file in bytes, 0 on error; and the file's bytes in memory, aligned to 64, of
 * exactly that size, for q3n_model_open_memory.  After an error memory holds no model. */
Q3N_DEF int64_t    q3n_init_bytes(const q3n_config *c, const q3n_init_options *o, q3n_error *err);
Q3N_DEF q3n_result q3n_init_memory(void *data, size_t bytes, const q3n_config *c,
                                   const q3n_init_options *o, q3n_error *err);

#ifdef __cplusplus
}
#endif
#endif /* Q3N_MAKE_H */

/* =====================================================================================
 * Below is the implementation: it is compiled where Q3N_MAKE_IMPLEMENTATION is defined.
 * ===================================================================================== */
#if defined(Q3N_MAKE_IMPLEMENTATION) && !defined(Q3N__MAKE_IMPLEMENTED)
#  if defined(Q3N__IMPLEMENTED)
#    define Q3N__MAKE_IMPLEMENTS
#    define Q3N__MAKE_IMPLEMENTED
#  elif !defined(Q3N_IMPLEMENTATION)
#    error "Q3N_MAKE_IMPLEMENTATION needs Q3N_IMPLEMENTATION in the same C file: see q3n_make.h"
#  endif                         /* else qwen3next.h has said why there is none */
#endif
#ifdef Q3N__MAKE_IMPLEMENTS
#undef Q3N__MAKE_IMPLEMENTS

/* =====================================================================================
 * [2] GEOMETRY                                                             >>geometry
 *
 * Configurations without a file: named ones, and fields set by name.  Knows nothing of weights.
 * ===================================================================================== */

/* ---- Presets ---- */
typedef struct {
    const char *name;
    int         family, vocab, hidden, layers, context, heads, kv_heads, head_dim;
    int         dense, experts, top_k, moe, shared;    /* widths of FFNs; 0 = none               */
    int         hv;                                    /* DeltaNet value heads; 0 = no DeltaNet  */
    int         tied, mtp;
    double      theta;
} q3n__preset;

/* Geometries of [CARDS], and of the design and the benchmarks.  Columns:
 *   P  name, family, V, d, layers, context, H, K, D, I, E, k, IE, tied, theta
 *   H  name, family, V, d, layers, H, K, I, E, k, IE, Hv, tied, mtp; there D is 256, 16 key
 *      heads of 128, value heads of 128, convolution of 4, the shared expert as wide as one
 *      expert, a quarter of each head rotates and every fourth layer is attention */
#define Q3N__P(name, family, V, d, L, context, H, K, D, I, E, k, IE, tied, theta)       \
    { name, Q3N_FAMILY_##family, V, d, L, context, H, K, D, I, E, k, IE, 0, 0, tied, 0, theta }
#define Q3N__H(name, family, V, d, L, H, K, I, E, k, IE, Hv, tied, mtp)                 \
    { name, Q3N_FAMILY_##family, V, d, L, 262144, H, K, 256, I, E, k, IE, IE, Hv, tied, mtp, 1e7 }

static const q3n__preset q3n__presets[] = {
    Q3N__P("tiny",    DESIGN, 151936,  512,  6, 1024,  8, 2,  64, 0,  4, 1,  512, 0, 1e6),
    Q3N__P("small",   DESIGN, 151936, 1024, 12, 2048, 16, 4,  64, 0,  8, 2,  768, 0, 1e6),
    Q3N__P("80b",     DESIGN, 151936, 2048, 48, 8192, 16, 4, 128, 0,  1, 1, 2816, 0, 1e6),
    Q3N__P("80b_a3b", DESIGN, 151936, 2048, 48, 8192, 16, 4, 128, 0, 64, 8, 1536, 0, 1e6),

    Q3N__H("g1", QWEN3_NEXT, 32000, 1024, 12, 16, 2, 0,  64,  8, 256, 32, 0, 0),
    Q3N__H("g2", QWEN3_NEXT, 32000, 2048,  4, 16, 2, 0, 512, 10, 512, 32, 0, 0),
    Q3N__P("g3", QWEN3_MOE, 151936, 1024, 12, 40960, 16, 4, 128, 0, 8, 2, 2752, 0, 1e6),

    Q3N__H("qwen3-next-80b-a3b", QWEN3_NEXT, 151936, 2048, 48, 16, 2, 0, 512, 10, 512, 32, 0, 1),
    Q3N__H("qwen3-coder-next",   QWEN3_NEXT, 151936, 2048, 48, 16, 2, 0, 512, 10, 512, 32, 0, 1),

    Q3N__H("qwen3.5-0.8b", QWEN3_5, 248320, 1024, 24,  8, 2,  3584, 0, 0, 0, 16, 1, 1),
    Q3N__H("qwen3.5-2b",   QWEN3_5, 248320, 2048, 24,  8, 2,  6144, 0, 0, 0, 16, 1, 1),
    Q3N__H("qwen3.5-4b",   QWEN3_5, 248320, 2560, 32, 16, 4,  9216, 0, 0, 0, 32, 1, 1),
    Q3N__H("qwen3.5-9b",   QWEN3_5, 248320, 4096, 32, 16, 4, 12288, 0, 0, 0, 32, 0, 1),
    Q3N__H("qwen3.5-27b",  QWEN3_5, 248320, 5120, 64, 24, 4, 17408, 0, 0, 0, 48, 0, 1),
    Q3N__H("qwen3.6-27b",  QWEN3_5, 248320, 5120, 64, 24, 4, 17408, 0, 0, 0, 48, 0, 1),

    Q3N__H("qwen3.5-35b-a3b",   QWEN3_5_MOE, 248320, 2048, 40, 16, 2, 0, 256,  8,  512, 32, 0, 1),
    Q3N__H("qwen3.6-35b-a3b",   QWEN3_5_MOE, 248320, 2048, 40, 16, 2, 0, 256,  8,  512, 32, 0, 1),
    Q3N__H("qwen3.5-122b-a10b", QWEN3_5_MOE, 248320, 3072, 48, 32, 2, 0, 256,  8, 1024, 64, 0, 1),
    Q3N__H("qwen3.5-397b-a17b", QWEN3_5_MOE, 248320, 4096, 60, 32, 2, 0, 512, 10, 1024, 64, 0, 1),

    Q3N__P("qwen3-30b-a3b",
           QWEN3_MOE, 151936, 2048, 48, 40960, 32, 4, 128, 0, 128, 8,  768, 0, 1e6),
    Q3N__P("qwen3-235b-a22b",
           QWEN3_MOE, 151936, 4096, 94, 40960, 64, 4, 128, 0, 128, 8, 1536, 0, 1e6),
    Q3N__P("qwen3-coder-480b-a35b",
           QWEN3_MOE, 151936, 6144, 62, 262144, 96, 8, 128, 0, 160, 8, 2560, 0, 1e7),

    Q3N__P("qwen3-0.6b", QWEN3, 151936, 1024, 28, 40960, 16, 8, 128,  3072, 0, 0, 0, 1, 1e6),
    Q3N__P("qwen3-1.7b", QWEN3, 151936, 2048, 28, 40960, 16, 8, 128,  6144, 0, 0, 0, 1, 1e6),
    Q3N__P("qwen3-4b",   QWEN3, 151936, 2560, 36, 40960, 32, 8, 128,  9728, 0, 0, 0, 1, 1e6),
    Q3N__P("qwen3-8b",   QWEN3, 151936, 4096, 36, 40960, 32, 8, 128, 12288, 0, 0, 0, 0, 1e6),
    Q3N__P("qwen3-14b",  QWEN3, 151936, 5120, 40, 40960, 40, 8, 128, 17408, 0, 0, 0, 0, 1e6),
    Q3N__P("qwen3-32b",  QWEN3, 151936, 5120, 64, 40960, 64, 8, 128, 25600, 0, 0, 0, 0, 1e6)
};
#undef Q3N__P
#undef Q3N__H
#define Q3N__N_PRESETS (sizeof q3n__presets / sizeof q3n__presets[0])

static void q3n__preset_fill(const q3n__preset *p, q3n_config *c)
{
    const int hybrid = p->hv > 0;
    q3n__config_defaults(c);
    c->family = p->family;
    c->vocab_size = p->vocab;
    c->hidden_size = p->hidden;
    c->num_hidden_layers = p->layers;
    c->max_position_embeddings = p->context;
    c->intermediate_size = p->dense;
    c->num_attention_heads = p->heads;
    c->num_key_value_heads = p->kv_heads;
    c->head_dim = p->head_dim;
    c->rotary_dim = hybrid ? p->head_dim / 4 : p->head_dim;
    c->num_experts = p->experts;
    c->num_experts_per_tok = p->top_k;
    c->moe_intermediate_size = p->moe;
    c->shared_expert_intermediate_size = p->shared;
    if (hybrid) {
        c->linear_num_key_heads = 16;
        c->linear_num_value_heads = p->hv;
        c->linear_key_head_dim = c->linear_value_head_dim = 128;
        c->linear_conv_kernel_dim = 4;
    }
    c->num_mtp_layers = p->mtp;
    c->attn_output_gate = hybrid;
    c->qk_norm = p->family != Q3N_FAMILY_DESIGN;
    c->tie_word_embeddings = p->tied;
    c->rope_theta = p->theta;
    for (int l = 0; l < p->layers; l++) {
        c->layer_types[l] = hybrid && (l + 1) % 4 != 0;
        c->layer_experts[l] = p->experts > 0;
    }
}

Q3N_DEF const char *q3n_config_preset_name(int i)
{
    return i >= 0 && (size_t)i < Q3N__N_PRESETS ? q3n__presets[i].name : NULL;
}

Q3N_DEF q3n_result q3n_config_preset(const char *name, q3n_config *out, q3n_error *err)
{
    if (!name || !out) return q3n__fail(err, Q3N_ERR_ARG, -1, "no name, or no configuration");
    /* The size alone: what else is in it is not read. */
    const q3n_result r = q3n__struct_check(out, Q3N__MAX_STRUCT, "q3n_config", err);
    if (r != Q3N_OK) return r;
    for (size_t i = 0; i < Q3N__N_PRESETS; i++)
        if (strcmp(q3n__presets[i].name, name) == 0) {
            q3n_config c;
            q3n__preset_fill(&q3n__presets[i], &c);
            return q3n__struct_write(out, sizeof c, &c);
        }
    char list[sizeof err->message];
    size_t at = 0;
    for (size_t i = 0; i < Q3N__N_PRESETS && at < sizeof list; i++)
        at += (size_t)snprintf(list + at, sizeof list - at, " %s", q3n__presets[i].name);
    return q3n__fail(err, Q3N_ERR_ARG, -1, "no preset '%s'; there are%s", name, list);
}

/* ---- Overrides ---- */

/* v is inside [min, max], and whole unless the field is a double. */
static void q3n__config_store(q3n_config *c, const q3n__config_row *row, double v)
{
    const int i = row->kind == 'F' ? 0 : (int)v;
    if (row->kind == 'F') memcpy((uint8_t *)c + row->offset, &v, sizeof v);
    else                  memcpy((uint8_t *)c + row->offset, &i, sizeof i);
}

/* A decimal number in the C locale's form, whatever the host's locale is; 0 = text is none.  Exact
 * for up to 15 digits and powers of ten to 22: both operands are then exact doubles. */
static int q3n__parse_number(const char *text, double *out)
{
    const char *p = text;
    const int negative = *p == '-';
    double v = 0.0, scale = 1.0;
    int digits = 0, fraction = 0, exponent = 0;
    if (*p == '-' || *p == '+') p++;
    for (; (*p >= '0' && *p <= '9') || (*p == '.' && !fraction); p++) {
        if (*p == '.') { fraction = 1; continue; }
        v = v * 10.0 + (*p - '0');
        digits++;
        if (fraction) exponent--;
    }
    if (digits == 0 || digits > 60) return 0;
    if (*p == 'e' || *p == 'E') {
        int e = 0;
        const int minus = *++p == '-';
        if (*p == '-' || *p == '+') p++;
        if (*p < '0' || *p > '9') return 0;
        for (; *p >= '0' && *p <= '9'; p++) if (e < 1000) e = e * 10 + (*p - '0');
        exponent += minus ? -e : e;
    }
    if (*p || exponent > 300 || exponent < -300) return 0;
    for (int i = exponent < 0 ? -exponent : exponent; i > 0; i--) scale *= 10.0;
    v = exponent < 0 ? v / scale : v * scale;
    *out = negative ? -v : v;
    return 1;
}

/* The first n layers show a pattern of kinds: its shortest period. */
static int q3n__layer_period(const q3n_config *c, int n)
{
    for (int period = 1; period < n; period++) {
        int same = 1;
        for (int l = period; l < n && same; l++)
            same = c->layer_types[l] == c->layer_types[l - period]
                && c->layer_experts[l] == c->layer_experts[l - period];
        if (same) return period;
    }
    return n < 1 ? 1 : n;
}

static void q3n__config_set_layers(q3n_config *c, int n)
{
    int before = c->num_hidden_layers;
    if (before < 0 || before > Q3N_MAX_LAYERS) before = 0;
    const int period = q3n__layer_period(c, before);
    for (int l = before; l < n; l++) {
        c->layer_types[l] = l >= period ? c->layer_types[l - period] : 0;
        c->layer_experts[l] = l >= period ? c->layer_experts[l - period] : 0;
    }
    for (int l = n; l < Q3N_MAX_LAYERS; l++) c->layer_types[l] = c->layer_experts[l] = 0;
    c->num_hidden_layers = n;
}

/* "1,1,1,0": repeated to the number of layers. */
static q3n_result q3n__config_set_kinds(const q3n_config *c, unsigned char *kinds,
                                        const char *field, const char *value, q3n_error *err)
{
    unsigned char list[Q3N_MAX_LAYERS];
    int n = 0;
    const char *p = value;
    for (;; p += 2) {
        const int ends = *p ? p[1] == 0 : 1;
        if ((*p != '0' && *p != '1') || (!ends && p[1] != ',') || n == Q3N_MAX_LAYERS)
            return q3n__fail(err, Q3N_ERR_ARG, -1, "%s: '%s', expected at most %d of 0 and 1"
                             " with commas between", field, value, Q3N_MAX_LAYERS);
        list[n++] = (unsigned char)(*p - '0');
        if (ends) break;
    }
    for (int l = 0; l < c->num_hidden_layers && l < Q3N_MAX_LAYERS; l++) kinds[l] = list[l % n];
    return Q3N_OK;
}

static const char *q3n__config_long_name(const char *field)
{
    static const char *const names[][2] = {
        { "layers", "num_hidden_layers" }, { "heads", "num_attention_heads" },
        { "kv_heads", "num_key_value_heads" }, { "hidden", "hidden_size" },
        { "experts", "num_experts" }, { "top_k", "num_experts_per_tok" },
        { "vocab", "vocab_size" }, { "context", "max_position_embeddings" }
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(names[i][0], field) == 0) return names[i][1];
    return field;
}

static q3n_result q3n__config_set(q3n_config *c, const char *field, const char *value,
                                  q3n_error *err)
{
    if (strcmp(field, "layer_types") == 0)
        return q3n__config_set_kinds(c, c->layer_types, field, value, err);
    if (strcmp(field, "layer_experts") == 0)
        return q3n__config_set_kinds(c, c->layer_experts, field, value, err);
    const q3n__config_row *row = q3n__config_find(q3n__config_long_name(field));
    if (!row)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "the configuration has no field '%s'", field);

    double v;
    const int word = row->kind == 'E' ? q3n__config_enum_value(row->name, value) : -1;
    if (word >= 0) v = word;
    else if (row->kind == 'B' && (strcmp(value, "true") == 0 || strcmp(value, "false") == 0))
        v = value[0] == 't';
    else if (!q3n__parse_number(value, &v))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "%s: '%s' is not %s", row->name, value,
                         row->kind == 'E' ? "one of its words" : "a number");
    if (!(v >= row->min && v <= row->max) || (row->kind != 'F' && v != (double)(int)v))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "%s: '%s' is not a %snumber in [%.15g, %.15g]",
                         row->name, value, row->kind == 'F' ? "" : "whole ", row->min, row->max);
    if (row->offset == offsetof(q3n_config, num_hidden_layers)) q3n__config_set_layers(c, (int)v);
    else                                                        q3n__config_store(c, row, v);
    return Q3N_OK;
}

Q3N_DEF q3n_result q3n_config_set(q3n_config *c, const char *field, const char *value,
                                  q3n_error *err)
{
    q3n_config config = Q3N_INIT(q3n_config);
    if (!c || !field || !value)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "no configuration, no field, or no value");
    q3n_result r = q3n__config_read(&config, c, err);
    if (r == Q3N_OK) r = q3n__config_set(&config, field, value, err);
    return r == Q3N_OK ? q3n__struct_write(c, sizeof config, &config) : r;
}

/* =====================================================================================
 * [3] QUANTISE                                                             >>quantise
 *
 * Rows of floats to the bytes that a file holds, in any type.  The bytes depend on the weights
 * alone: float arithmetic in a fixed order, the same on every machine and for every split of the
 * rows.  Knows nothing of files or threads.
 * ===================================================================================== */

/* ---- The scale of a group ---- */

/* What m, the weight of largest magnitude, is divided by to get the first scales to try.  Levels
 * are not symmetric, so both signs of the scale are tried; dividing by less than the last level
 * cuts m off, which is often worth it.  With these few a group of normal weights has 1 % (q3) to
 * 3 % (q6) more squared error than with the best of 1000 scales (q8: 17 %). */
#define Q3N__Q8_DIVISORS { 127.0f, 123.8f, 120.7f }
#define Q3N__Q6_DIVISORS { 31.0f, 30.2f, -32.0f, -28.8f }
#define Q3N__Q4_DIVISORS { 55.6f, 59.9f, -56.0f, -66.5f, -71.75f, -77.0f }
#define Q3N__Q3_DIVISORS { 56.7f, 68.9f, -52.9f, -65.7f, -76.7f, -89.4f }
#define Q3N__MAX_DIVISORS 6

/* Nearest levels without comparisons: levels are whole numbers, so every midpoint of two is a
 * multiple of 1/2 and a cell [k / 2, (k + 1) / 2) has one nearest level. */
#define Q3N__CELLS 512           /* of [-128, 128)                                               */

typedef struct {
    q3n_type type;
    float    divisor[Q3N__MAX_DIVISORS];         /* 0 after the last                             */
    float    level[Q3N__CELLS];                  /* nearest level, and its code                  */
    uint8_t  code[Q3N__CELLS];
} q3n__quantiser;

static int q3n__cell(float v)    /* of a value in units of the scale */
{
    const float at = v * 2.0f + (float)(Q3N__CELLS / 2);
    return at < 0.0f ? 0 : at < (float)(Q3N__CELLS - 1) ? (int)at : Q3N__CELLS - 1;
}

static void q3n__quantiser_make(q3n__quantiser *e, q3n_type type)
{
    static const float divisors[Q3N_TYPE_COUNT][Q3N__MAX_DIVISORS] = {
#define Q3N__X(ID, id, number, block_len, block_bytes) [number] = Q3N__##ID##_DIVISORS,
        Q3N_QUANT_TYPE_LIST(Q3N__X)
#undef Q3N__X
    };
    e->type = type;
    if (!q3n__is_quantised(type)) return;
    memcpy(e->divisor, divisors[type], sizeof e->divisor);
    const int last = type == Q3N_TYPE_Q8 ? 255 : type == Q3N_TYPE_Q6 ? 63
                   : type == Q3N_TYPE_Q4 ? 15 : 7;
    int code = type == Q3N_TYPE_Q8 ? 1 : 0;      /* q8 has -127 .. 127                           */
    for (int k = 0; k < Q3N__CELLS; k++) {       /* k / 2 and the middles of levels, doubled     */
        while (code < last && q3n__code_level(type, code) + q3n__code_level(type, code + 1)
                              <= k - Q3N__CELLS / 2)
            code++;
        e->code[k] = (uint8_t)code;
        e->level[k] = (float)q3n__code_level(type, code);
    }
}

/* With levels q nearest to u t, the scale that leaves the least of sum w (u - s q)^2 is a / b with
 * a = sum w u q, b = sum w q^2; it takes a^2 / b off the error.  Returns a / b.  Four sums each, so
 * that additions need not wait for one another. */
static float q3n__group_fit(const q3n__quantiser *e, const float *u, const float *w, float t,
                            double *gain)
{
    float a[4] = { 0 }, b[4] = { 0 };
    for (int i = 0; i < Q3N__GROUP; i += 4)
        for (int k = 0; k < 4; k++) {
            const float q = e->level[q3n__cell(u[i + k] * t)], wq = w[i + k] * q;
            a[k] += u[i + k] * wq;
            b[k] += q * wq;
        }
    const double sa = (double)((a[0] + a[1]) + (a[2] + a[3])),
                 sb = (double)((b[0] + b[1]) + (b[2] + b[3]));
    *gain = sb > 0.0 ? sa * sa / sb : 0.0;
    return sb > 0.0 ? (float)(sa / sb) : 0.0f;
}

/* The f16 scale of x [32] with weights w [32]; everything is computed for x / m, where nothing
 * overflows.  Infinity if the scale is too large for f16. */
static uint16_t q3n__group_scale(const q3n__quantiser *e, const float *x, const float *w)
{
    float m = 0.0f, u[Q3N__GROUP], best = 0.0f;
    double max = 0.0, gain;
    for (int i = 0; i < Q3N__GROUP; i++) if (fabsf(x[i]) > fabsf(m)) m = x[i];
    if (m == 0.0f) return 0;
    for (int i = 0; i < Q3N__GROUP; i++) u[i] = x[i] / m;
    for (int k = 0; k < Q3N__MAX_DIVISORS && e->divisor[k] != 0.0f; k++) {
        const float s = q3n__group_fit(e, u, w, e->divisor[k], &gain);
        if (gain > max) {
            max = gain;
            best = s;
        }
    }
    if (best != 0.0f) {
        const float s = q3n__group_fit(e, u, w, 1.0f / best, &gain);
        if (gain > max) best = s;
    } else {
        best = 1.0f / e->divisor[0];     /* the weights w are 0, or nearly */
    }
    return q3n__f32_to_f16(m * best);
}

/* The type asked for if the item may have it, else the next finer one that it may: q3, q4, q6, q8,
 * bf16.  Routers have no quantised type, vectors are f32. */
static q3n_type q3n__finer_type(const q3n__plan_item *item, q3n_type wanted)
{
    static const q3n_type finer[Q3N_TYPE_COUNT] = {
        [Q3N_TYPE_Q3] = Q3N_TYPE_Q4, [Q3N_TYPE_Q4] = Q3N_TYPE_Q6, [Q3N_TYPE_Q6] = Q3N_TYPE_Q8,
        [Q3N_TYPE_Q8] = Q3N_TYPE_BF16, [Q3N_TYPE_BF16] = Q3N_TYPE_F32, [Q3N_TYPE_F16] = Q3N_TYPE_F32
    };
    while (!(item->types >> wanted & 1)) wanted = finer[wanted];
    return wanted;
}

/* ---- Recipes ---- */
typedef struct {
    const char *name;
    q3n_type    experts, other, sensitive, ends;     /* ends: embedding, head, MTP               */
} q3n__recipe;

static const q3n__recipe q3n__recipes[] = {
#define Q3N__X(name, experts, other, sensitive, ends)                                   \
    { #name, Q3N_TYPE_##experts, Q3N_TYPE_##other, Q3N_TYPE_##sensitive, Q3N_TYPE_##ends },
    Q3N_RECIPE_LIST(Q3N__X)
#undef Q3N__X
};
#define Q3N__N_RECIPES ((int)(sizeof q3n__recipes / sizeof q3n__recipes[0]))

Q3N_DEF const char *q3n_recipe_name(int i)
{
    return i >= 0 && i < Q3N__N_RECIPES ? q3n__recipes[i].name : NULL;
}

/* The type of an item whose source has type source. */
static q3n_type q3n__recipe_type(const q3n__recipe *recipe, const q3n__plan_item *item,
                                 q3n_type source)
{
    if (item->role == Q3N__ROLE_VEC) return Q3N_TYPE_F32;
    if (item->role == Q3N__ROLE_ROUTER)
        return q3n__is_quantised(recipe->experts) ? source : recipe->experts;
    if (item->layer == Q3N__LAYER_NONE || item->layer == Q3N__LAYER_MTP) return recipe->ends;
    if (item->experts) return recipe->experts;
    const int sensitive = item->field == offsetof(q3n__layer, v_proj)
                       || item->field == offsetof(q3n__layer, out_proj);
    return sensitive ? recipe->sensitive : recipe->other;
}

/* ---- Rows ---- */

/* What is encoded: rows as they stand in a file or in memory, of any type. */
typedef struct {
    q3n_type     type;
    const void  *data;
    int64_t      n_rows;
    int          n_cols;
    const float *importance;     /* [n_cols], NULL = 1 everywhere                                */
} q3n__source;

/* Columns [col, col + n) of a row; n <= 32, col a multiple of 32. */
static void q3n__source_get(const q3n__source *s, int64_t row, int col, int n, float *x)
{
    const size_t row_bytes = q3n__row_bytes(s->type, s->n_cols);
    const int r = q3n__is_quantised(s->type) ? (int)(row % Q3N__TILE_ROWS) : 0;
    const uint8_t *p = (const uint8_t *)s->data + (size_t)(row - r) * row_bytes;
    uint16_t half[Q3N__GROUP];
    if (s->type == Q3N_TYPE_F32) {
        memcpy(x, p + 4 * (size_t)col, 4 * (size_t)n);
    } else if (s->type == Q3N_TYPE_F16 || s->type == Q3N_TYPE_BF16) {
        memcpy(half, p + 2 * (size_t)col, 2 * (size_t)n);
        for (int i = 0; i < n; i++)
            x[i] = s->type == Q3N_TYPE_F16 ? q3n__f16_to_f32(half[i]) : q3n__bf16_to_f32(half[i]);
    } else {                             /* the block alone is a matrix of up to 64 columns */
        float both[2 * Q3N__GROUP];
        const int first = col % (2 * Q3N__GROUP), block = col - first;
        q3n__dequantize_row(s->type, both, p + (size_t)q3n__types[s->type].block_bytes
                            * (size_t)Q3N__TILE_ROWS * (size_t)(block / (2 * Q3N__GROUP)), r,
                            first + n);
        memcpy(x, both + first, 4 * (size_t)n);
    }
}

/* Where encoding stopped. */
typedef struct {
    int64_t row;
    int     col;
    float   value;
} q3n__fault;

static int q3n__first_bad(const float *x, int n, float max)      /* n = none */
{
    int i = 0;
    while (i < n && fabsf(x[i]) <= max) i++;
    return i;
}

/* n floats to a float type.  Returns how many came before one that is not finite, or would not be
 * in that type: n = all. */
static int q3n__encode_floats(q3n_type type, void *y, const float *x, int n)
{
    const int f16 = type == Q3N_TYPE_F16, infinity = f16 ? 0x7c00 : 0x7f80;
    uint8_t *to = (uint8_t *)y;                  /* of any alignment                             */
    n = q3n__first_bad(x, n, FLT_MAX);
    if (type == Q3N_TYPE_F32) memcpy(y, x, (size_t)n * sizeof *x);
    if (!f16 && type != Q3N_TYPE_BF16) return n;
    for (int i = 0; i < n; i++, to += sizeof(uint16_t)) {
        const uint16_t half = f16 ? q3n__f32_to_f16(x[i]) : q3n__f32_to_bf16(x[i]);
        if ((half & 0x7fff) == infinity) return i;
        memcpy(to, &half, sizeof half);
    }
    return n;
}

/* The codes of columns j, 4 + j, .. 28 + j of row r into a group; b is 4 r + j. */
static void q3n__codes_put(q3n_type t, uint8_t *group, int b, const uint8_t c[Q3N__GROUP / 4])
{
    uint8_t *y = group + b;
    switch (t) {
    case Q3N_TYPE_Q8:
        for (int s = 0; s < 8; s++) y[64 * s] = c[s];
        break;
    case Q3N_TYPE_Q6:
        for (int s = 0; s < 4; s++) y[64 * s] = (uint8_t)((c[s] & 15) | (c[s + 4] & 15) << 4);
        for (int h = 0; h < 2; h++, c += 4)
            y[256 + 64 * h] = (uint8_t)(c[0] >> 4 | c[1] >> 4 << 2 | c[2] >> 4 << 4
                                        | c[3] >> 4 << 6);
        break;
    case Q3N_TYPE_Q4:
        for (int s = 0; s < 4; s++) y[64 * s] = (uint8_t)(c[s] | c[s + 4] << 4);
        break;
    case Q3N_TYPE_Q3:
        y[0]   = (uint8_t)((c[0] & 3) | (c[1] & 3) << 2 | (c[2] & 3) << 4 | (c[3] & 3) << 6);
        y[64]  = (uint8_t)((c[4] & 3) | (c[5] & 3) << 2 | (c[6] & 3) << 4 | (c[7] & 3) << 6);
        y[128] = (uint8_t)(c[0] >> 2 | c[1] >> 2 << 1 | c[2] >> 2 << 2 | c[3] >> 2 << 3
                           | c[4] >> 2 << 4 | c[5] >> 2 << 5 | c[6] >> 2 << 6 | c[7] >> 2 << 7);
        break;
    default: break;
    }
}

/* One group of one row of a tile: its scale and codes.  Returns n, or the column that will not. */
static int q3n__encode_group(const q3n__quantiser *e, const float *x, const float *w, int r,
                             uint8_t *scale, uint8_t *codes)
{
    const int bad = q3n__first_bad(x, Q3N__GROUP, FLT_MAX);
    if (bad < Q3N__GROUP) return bad;
    const uint16_t s = q3n__group_scale(e, x, w);
    if ((s & 0x7fff) == 0x7c00) {
        int largest = 0;
        for (int i = 1; i < Q3N__GROUP; i++) if (fabsf(x[i]) > fabsf(x[largest])) largest = i;
        return largest;
    }
    memcpy(scale, &s, sizeof s);
    const float inverse = (s & 0x7fff) == 0 ? 0.0f : 1.0f / q3n__f16_to_f32(s);
    for (int j = 0; j < 4; j++) {
        uint8_t c[Q3N__GROUP / 4];
        for (int k = 0; k < Q3N__GROUP / 4; k++)
            c[k] = e->code[q3n__cell(x[4 * k + j] * inverse)];
        q3n__codes_put(e->type, codes, 4 * r + j, c);
    }
    return Q3N__GROUP;
}

/* Weights w of the columns [col, col + n), 1 if they are all 0. */
static void q3n__group_weights(const float *importance, int col, int n, float *w)
{
    float sum = 0.0f;
    for (int i = 0; i < n && importance; i++) sum += w[i] = importance[col + i];
    for (int i = 0; i < Q3N__GROUP; i++) if (i >= n || !(sum > 0.0f)) w[i] = 1.0f;
}

/* The tile that starts at row0.  Missing rows and groups have scale 0; missing columns of a group
 * are encoded as zeros, which is the level nearest to it: what meets them are zeros. */
static int q3n__encode_tile(const q3n__quantiser *e, const q3n__source *s, int64_t row0, uint8_t *y,
                            q3n__fault *fault)
{
    const size_t block_bytes = (size_t)q3n__types[e->type].block_bytes * Q3N__TILE_ROWS;
    const size_t code_bytes = q3n__group_bytes(e->type);
    const int n_groups = 2 * q3n__x8_blocks(s->n_cols);
    for (int g = 0; g < n_groups; g++) {
        uint8_t *block = y + (size_t)(g / 2) * block_bytes;
        uint8_t *codes = block + 4 * Q3N__TILE_ROWS + (size_t)(g % 2) * code_bytes;
        const int left = s->n_cols - g * Q3N__GROUP, n = left < Q3N__GROUP ? left : Q3N__GROUP;
        float w[Q3N__GROUP];
        q3n__group_weights(s->importance, g * Q3N__GROUP, n, w);
        for (int r = 0; r < Q3N__TILE_ROWS; r++) {
            float x[Q3N__GROUP] = { 0 };
            if (row0 + r < s->n_rows && n > 0)
                q3n__source_get(s, row0 + r, g * Q3N__GROUP, n, x);
            const int end = q3n__encode_group(e, x, w, r,
                                              block + 2 * (g % 2 * Q3N__TILE_ROWS + r), codes);
            if (end < Q3N__GROUP) {
                *fault = (q3n__fault){ row0 + r, g * Q3N__GROUP + end, x[end] };
                return 0;
            }
        }
    }
    return 1;
}

static int q3n__encode_row(const q3n__quantiser *e, const q3n__source *s, int64_t row, uint8_t *y,
                           q3n__fault *fault)
{
    for (int col = 0; col < s->n_cols; col += Q3N__GROUP) {
        float x[Q3N__GROUP];
        const int left = s->n_cols - col, n = left < Q3N__GROUP ? left : Q3N__GROUP;
        q3n__source_get(s, row, col, n, x);
        const int end = q3n__encode_floats(e->type, y + q3n__row_bytes(e->type, col), x, n);
        if (end < n) {
            *fault = (q3n__fault){ row, col + end, x[end] };
            return 0;
        }
    }
    return 1;
}

/* Rows [row0, row1) of the source, both multiples of 16 but for the last, into y.  Returns 0 with
 * *fault filled if a value cannot be encoded. */
static int q3n__encode_rows(const q3n__quantiser *e, const q3n__source *s, int64_t row0,
                            int64_t row1, uint8_t *y, q3n__fault *fault)
{
    const size_t row_bytes = q3n__row_bytes(e->type, s->n_cols);
    const int step = q3n__is_quantised(e->type) ? Q3N__TILE_ROWS : 1;
    for (int64_t row = row0; row < row1; row += step, y += (size_t)step * row_bytes)
        if (!(step == 1 ? q3n__encode_row(e, s, row, y, fault)
                        : q3n__encode_tile(e, s, row, y, fault)))
            return 0;
    return 1;
}

/* Importance beyond these bounds would overflow sums; n_cols = all are fine. */
static int q3n__first_bad_importance(const float *importance, int n_cols)
{
    int i = 0;
    while (importance && i < n_cols && importance[i] >= 0.0f && importance[i] <= 1e30f) i++;
    return importance ? i : n_cols;
}

static q3n_result q3n__fault_fail(const q3n__fault *f, const char *name, q3n_type type,
                                  q3n_error *err)
{
    const int finite = fabsf(f->value) <= FLT_MAX;
    return q3n__fail(err, Q3N_ERR_ARG, -1, "%s%srow %lld, column %d: %g %s%s", name ? name : "",
                     name ? ": " : "", (long long)f->row, f->col, (double)f->value,
                     finite ? "is too large for " : "cannot be quantised: it is not finite",
                     finite ? q3n__types[type].name : "");
}

Q3N_DEF q3n_result q3n_quantize_rows(q3n_type type, const q3n_rows *rows, void *out,
                                     size_t out_bytes, q3n_error *err)
{
    const int64_t bytes = rows ? q3n_type_bytes(type, rows->n_rows, rows->n_cols) : 0;
    if (bytes == 0 || !rows->x || !out)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "no rows, no place, or no such type");
    if ((uint64_t)bytes != out_bytes)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "room for %zu bytes, expected %lld", out_bytes,
                         (long long)bytes);
    const int n_cols = (int)rows->n_cols;
    const int bad = q3n__first_bad_importance(rows->importance, n_cols);
    if (bad < n_cols)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "importance of column %d is %g, expected 0 .. 1e30",
                         bad, (double)rows->importance[bad]);
    q3n__quantiser e;
    q3n__quantiser_make(&e, type);
    const q3n__source s = { Q3N_TYPE_F32, rows->x, rows->n_rows, n_cols, rows->importance };
    q3n__fault fault;
    if (q3n__encode_rows(&e, &s, 0, rows->n_rows, (uint8_t *)out, &fault)) return Q3N_OK;
    return q3n__fault_fail(&fault, NULL, type, err);
}

/* =====================================================================================
 * [4] WRITER                                                                 >>writer
 *
 * Makes model files as a stream, or in memory.  The tensor plan and a choice of types fix the whole
 * layout before the first byte, so every byte is written once and in order; only the checksums are
 * filled in at the end.  Tensors are cut into pieces, made by several threads and written in order.
 * A file has another name until it is complete.
 * ===================================================================================== */

/* ---- Metadata: the same code first measures (base NULL), then writes ---- */
typedef struct {
    uint8_t *base;
    size_t   used;
} q3n__blob;

static void q3n__blob_bytes(q3n__blob *b, const void *data, size_t bytes)
{
    if (b->base && bytes > 0) memcpy(b->base + b->used, data, bytes);
    b->used += bytes;
}

static void q3n__blob_u32(q3n__blob *b, uint32_t v) { q3n__blob_bytes(b, &v, sizeof v); }
static void q3n__blob_u64(q3n__blob *b, uint64_t v) { q3n__blob_bytes(b, &v, sizeof v); }

static void q3n__blob_align(q3n__blob *b, size_t align)
{
    const size_t end = (b->used + align - 1) / align * align;
    if (b->base) memset(b->base + b->used, 0, end - b->used);
    b->used = end;
}

/* One configuration entry; type is a Q3N__VALUE_. */
static void q3n__blob_entry(q3n__blob *b, const char *key, int type, const void *value,
                            size_t bytes)
{
    const size_t key_bytes = strlen(key);
    const uint8_t head[4] = { (uint8_t)key_bytes, (uint8_t)type, 0, 0 };
    q3n__blob_bytes(b, head, sizeof head);
    q3n__blob_u32(b, (uint32_t)bytes);
    q3n__blob_bytes(b, key, key_bytes);
    q3n__blob_bytes(b, value, bytes);
    q3n__blob_align(b, 8);
}

static void q3n__blob_string(q3n__blob *b, const char *key, const char *value)
{
    q3n__blob_entry(b, key, Q3N__VALUE_STRING, value, strlen(value));
}

static void q3n__blob_kinds(q3n__blob *b, const char *key, const unsigned char *kinds, int n)
{
    int64_t values[Q3N_MAX_LAYERS];
    for (int l = 0; l < n; l++) values[l] = kinds[l];
    q3n__blob_entry(b, key, Q3N__VALUE_INT, values, (size_t)n * sizeof values[0]);
}

/* Every field of the configuration, and the kinds of its layers. */
static void q3n__blob_config(q3n__blob *b, const q3n_config *c)
{
    for (size_t i = 0; i < Q3N__N_CONFIG_ROWS; i++) {
        const q3n__config_row *row = &q3n__config_rows[i];
        const double v = q3n__config_value(c, row);
        const int64_t whole = (int64_t)v;
        if (row->kind == 'E')
            q3n__blob_string(b, row->name, q3n__config_enum_word(row->name, (int)v));
        else if (row->kind == 'F')
            q3n__blob_entry(b, row->name, Q3N__VALUE_FLOAT, &v, sizeof v);
        else
            q3n__blob_entry(b, row->name, Q3N__VALUE_INT, &whole, sizeof whole);
    }
    q3n__blob_kinds(b, "layer_types", c->layer_types, c->num_hidden_layers);
    q3n__blob_kinds(b, "layer_experts", c->layer_experts, c->num_hidden_layers);
}

/* ---- What to write ---- */
struct q3n__piece;

typedef struct {
    const q3n_config    *config;
    const char          *name;           /* NULL or "" = none                                    */
    const void          *config_section; /* CONFIG section; NULL = made of config and name       */
    size_t               config_section_bytes;
    const void          *tokenizer;      /* TOKENIZER section, NULL = none                       */
    size_t               tokenizer_bytes;
    const char          *path;           /* NULL = into memory [memory_bytes]                    */
    const q3n__file_id  *input;          /* a file that path may not be; NULL = none             */
    uint8_t             *memory;
    size_t               memory_bytes;
    int                  n_threads;      /* 0 = one per CPU                                      */
    const q3n_allocator *allocator;
    const q3n_progress  *progress;       /* NULL = none; counts bytes of the file                */
    q3n_model_stats     *written;        /* out, when all is well; NULL = not wanted             */
    /* Fills a piece, on any thread; returns 0 with its fault filled if that cannot be. */
    int                (*make)(void *user, struct q3n__piece *piece);
    /* Chooses the item's type and, where its dim[0] is 0, sets that; returns 0 to leave the tensor
     * out, which only an optional one may be. */
    int                (*choose)(void *user, q3n__plan_item *item, q3n_type *type);
    void                *user;
} q3n__writer_options;

typedef struct {
    q3n__plan_item item;
    q3n_type       type;
    int64_t        offset, slice_bytes, stride;
    int            part;                 /* of an expert: 0 gate, 1 up, 2 down                   */
    uint32_t       crc;
} q3n__writer_tensor;

/* Rows [row0, row1) of one slice of a tensor; row0 is a multiple of 16. */
typedef struct q3n__piece {
    const q3n__writer_tensor *tensor;
    int64_t    slice, row0, row1;
    int64_t    offset;                   /* in the file                                          */
    size_t     bytes;
    uint8_t   *data;                     /* [bytes] out                                          */
    uint32_t   crc;
    int        failed;
    q3n__fault fault;
} q3n__piece;

#define Q3N__PIECE_BYTES 262144          /* about; a tile of rows at least                       */

/* Call q3n__writer_open, q3n__writer_run, q3n__writer_close. */
typedef struct {
    q3n__writer_options o;
    q3n_error          *err;
    q3n__output         output;
    int                 writing;         /* 1 = output is open                                   */
    uint8_t            *meta;
    size_t              meta_bytes;
    int64_t             file_bytes, written;
    q3n__writer_tensor *tensors;
    int                 n_tensors;
    int                 tensor;          /* where the next piece starts                          */
    int64_t             slice, row;
    q3n__piece         *pieces;          /* [max_pieces] made together                           */
    int                 n_pieces, max_pieces;
    uint8_t            *buffer;          /* [max_pieces, room], NULL = made in place             */
    size_t              room;
    q3n__pool           pool;
    q3n__thread        *threads;
    q3n__crc_table      crc_table;
} q3n__writer;

static int64_t q3n__align_up(int64_t v, int64_t align) { return (v + align - 1) / align * align; }

/* ---- Layout ---- */

/* A visitor: appends the item to the table, or counts it while there is no table. */
static q3n_result q3n__writer_add(void *user, const q3n__plan_item *planned)
{
    q3n__writer *w = (q3n__writer *)user;
    q3n__plan_item item = *planned;
    q3n_type type = Q3N_TYPE_F32;
    if (!w->o.choose(w->o.user, &item, &type)) {
        if (item.optional) return Q3N_OK;
        return q3n__fail(w->err, Q3N_ERR_ARG, -1, "%s is missing", item.name);
    }
    char allowed[80];
    if (!(item.types >> type & 1))
        return q3n__fail(w->err, Q3N_ERR_ARG, -1, "%s cannot have type %s, only %s", item.name,
                         q3n__types[type].name, q3n__types_string(item.types, allowed));
    if (item.dim[0] <= 0)
        return q3n__fail(w->err, Q3N_ERR_ARG, -1, "%s has no rows", item.name);
    if (w->tensors) {
        q3n__writer_tensor *t = &w->tensors[w->n_tensors];
        memset(t, 0, sizeof *t);
        t->item = item;
        t->type = type;
        t->slice_bytes = (int64_t)q3n__row_bytes(type, (int)item.dim[item.n_dims - 1]);
        if (item.n_dims > 1)
            t->slice_bytes *= q3n__stored_rows(type, item.dim[item.n_dims - 2]);
    }
    w->n_tensors++;
    return Q3N_OK;
}

/* Places of the tensors; the experts of a layer interleave. */
static void q3n__writer_place(q3n__writer *w)
{
    int64_t at = (int64_t)w->meta_bytes;
    for (int i = 0; i < w->n_tensors; ) {
        q3n__writer_tensor *t = &w->tensors[i];
        if (!t->item.experts) {
            t->offset = q3n__align_up(at, Q3N__ALIGN);
            at = t->offset + t->slice_bytes;
            i++;
            continue;
        }
        int64_t within = 0;
        at = q3n__align_up(at, 4096);
        for (int k = 0; k < 3; k++) {
            t[k].offset = at + within;
            within = q3n__align_up(within + t[k].slice_bytes, Q3N__ALIGN);
        }
        within = q3n__align_up(within, 4096);
        for (int k = 0; k < 3; k++) {
            t[k].stride = within;
            t[k].part = k;
        }
        at += within * t->item.dim[0];
        i += 3;
    }
    w->file_bytes = at;
}

static void q3n__writer_record(const q3n__writer_tensor *t, uint32_t name_offset, q3n__blob *b)
{
    q3n__blob_u32(b, name_offset);
    q3n__blob_u32(b, (uint32_t)strlen(t->item.name));
    q3n__blob_u32(b, (uint32_t)t->type);
    q3n__blob_u32(b, (uint32_t)t->item.n_dims);
    for (int k = 0; k < 3; k++) q3n__blob_u64(b, (uint64_t)t->item.dim[k]);
    q3n__blob_u64(b, (uint64_t)t->offset);
    q3n__blob_u64(b, (uint64_t)t->slice_bytes);
    q3n__blob_u64(b, (uint64_t)t->stride);
    q3n__blob_u32(b, t->crc);
    for (int k = 0; k < 3; k++) q3n__blob_u32(b, 0);
}

static void q3n__writer_section(const q3n__writer *w, int kind, q3n__blob *b)
{
    if (kind == Q3N__SECTION_CONFIG && w->o.config_section) {
        q3n__blob_bytes(b, w->o.config_section, w->o.config_section_bytes);
    } else if (kind == Q3N__SECTION_CONFIG) {
        q3n__blob_config(b, w->o.config);
        if (w->o.name && w->o.name[0]) q3n__blob_string(b, "name", w->o.name);
    } else if (kind == Q3N__SECTION_TENSORS) {
        uint32_t name_offset = 0;
        q3n__blob_u32(b, (uint32_t)w->n_tensors);
        q3n__blob_u32(b, 80);
        for (int i = 0; i < w->n_tensors; i++) {
            q3n__writer_record(&w->tensors[i], name_offset, b);
            name_offset += (uint32_t)strlen(w->tensors[i].item.name);
        }
    } else if (kind == Q3N__SECTION_NAMES) {
        for (int i = 0; i < w->n_tensors; i++)
            q3n__blob_bytes(b, w->tensors[i].item.name, strlen(w->tensors[i].item.name));
    } else {
        q3n__blob_bytes(b, w->o.tokenizer, w->o.tokenizer_bytes);
    }
}

/* Header, section table and sections.  Returns their size; writes them if w->meta is there. */
static size_t q3n__writer_metadata(const q3n__writer *w)
{
    const int n = w->o.tokenizer ? Q3N__SECTION_TOKENIZER : Q3N__SECTION_NAMES;
    q3n__blob head = { w->meta, 0 }, table = { w->meta, Q3N__HEADER_BYTES };
    q3n__blob body = { w->meta, Q3N__HEADER_BYTES + (size_t)n * Q3N__SECTION_BYTES };
    for (int kind = Q3N__SECTION_CONFIG; kind <= n; kind++) {
        q3n__blob_align(&body, 8);
        const size_t start = body.used;
        q3n__writer_section(w, kind, &body);
        q3n__blob_u32(&table, (uint32_t)kind);
        q3n__blob_u32(&table, kind == Q3N__SECTION_TOKENIZER ? 0 : 1);
        q3n__blob_u64(&table, start);
        q3n__blob_u64(&table, body.used - start);
        q3n__blob_u64(&table, 0);
    }
    q3n__blob_align(&body, 8);
    q3n__blob_bytes(&head, q3n__magic, sizeof q3n__magic);
    q3n__blob_u32(&head, 1);
    q3n__blob_u32(&head, (uint32_t)n);
    q3n__blob_u64(&head, (uint64_t)w->file_bytes);
    q3n__blob_u64(&head, body.used);
    q3n__blob_align(&head, Q3N__HEADER_BYTES);
    if (w->meta) {
        const uint32_t crc = q3n__crc32_with(&w->crc_table, 0, w->meta, body.used);
        memcpy(w->meta + 32, &crc, sizeof crc);
    }
    return body.used;
}

/* ---- Stream ---- */

/* The next bytes of the file.  In memory they are there already if data is their place. */
static q3n_result q3n__writer_raw(q3n__writer *w, const void *data, size_t bytes)
{
    uint8_t *place = w->o.path ? NULL : w->o.memory + w->written;
    if (place) {
        if (place != data) memcpy(place, data, bytes);
    } else if (!q3n__output_write(&w->output, data, bytes)) {
        return Q3N_ERR_IO;               /* q3n__output_close says why */
    }
    w->written += (int64_t)bytes;
    const q3n_progress *p = w->o.progress;
    if (p && p->report && p->report(p->user, w->written, w->file_bytes))
        return q3n__fail(w->err, Q3N_ERR_CANCELLED, -1, "%s: stopped by the caller",
                         w->o.path ? w->o.path : "memory");
    return Q3N_OK;
}

static q3n_result q3n__writer_pad(q3n__writer *w, int64_t offset)   /* zeros up to offset */
{
    static const uint8_t zeros[4096];
    while (w->written < offset) {
        const int64_t left = offset - w->written;
        const size_t bytes = left < (int64_t)sizeof zeros ? (size_t)left : sizeof zeros;
        const q3n_result r = q3n__writer_raw(w, zeros, bytes);
        if (r != Q3N_OK) return r;
    }
    return Q3N_OK;
}

/* ---- Checksums of pieces, joined ---- */

/* Product of two polynomials modulo the CRC's; bit 31 is the coefficient of 1. */
static uint32_t q3n__crc_times(uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (int bit = 31; bit >= 0; bit--) {
        product ^= b & (0u - (a >> bit & 1));
        b = (b >> 1) ^ (0xEDB88320u & (0u - (b & 1)));
    }
    return product;
}

/* The CRC of a text with CRC a, followed by b_bytes bytes with CRC b: a x^(8 b_bytes) + b. */
static uint32_t q3n__crc_join(uint32_t a, uint32_t b, size_t b_bytes)
{
    for (uint32_t x = 1u << 23; b_bytes > 0; b_bytes >>= 1) {
        if (b_bytes & 1) a = q3n__crc_times(a, x);
        x = q3n__crc_times(x, x);
    }
    return a ^ b;
}

/* ---- Pieces ---- */
static int64_t q3n__writer_rows(const q3n__writer_tensor *t)     /* of a slice */
{
    return t->item.n_dims > 1 ? t->item.dim[t->item.n_dims - 2] : 1;
}

static int64_t q3n__writer_row_bytes(const q3n__writer_tensor *t)
{
    return (int64_t)q3n__row_bytes(t->type, (int)t->item.dim[t->item.n_dims - 1]);
}

static int64_t q3n__writer_piece_rows(const q3n__writer_tensor *t)
{
    const int64_t rows = Q3N__PIECE_BYTES / q3n__writer_row_bytes(t) / Q3N__TILE_ROWS
                       * Q3N__TILE_ROWS;
    return rows > 0 ? rows : Q3N__TILE_ROWS;
}

/* On to the next slice in the order of the file; the experts' gate, up and down take turns. */
static void q3n__writer_next(q3n__writer *w)
{
    const q3n__writer_tensor *t = &w->tensors[w->tensor];
    w->row = 0;
    if (t->part == 2 && w->slice + 1 < t->item.dim[0]) {
        w->tensor -= 2;
        w->slice++;
    } else {
        if (!t->item.experts || t->part == 2) w->slice = 0;
        w->tensor++;
    }
}

/* The next pieces: as many as are made together. */
static void q3n__writer_cut(q3n__writer *w)
{
    w->n_pieces = 0;
    while (w->n_pieces < w->max_pieces && w->tensor < w->n_tensors) {
        const q3n__writer_tensor *t = &w->tensors[w->tensor];
        q3n__piece *p = &w->pieces[w->n_pieces];
        const int64_t rows = q3n__writer_rows(t), left = rows - w->row;
        memset(p, 0, sizeof *p);
        p->tensor = t;
        p->slice = w->slice;
        p->row0 = w->row;
        p->row1 = w->row + (left < q3n__writer_piece_rows(t) ? left : q3n__writer_piece_rows(t));
        p->offset = t->offset + w->slice * t->stride + w->row * q3n__writer_row_bytes(t);
        p->bytes = (size_t)(q3n__stored_rows(t->type, p->row1 - p->row0)
                            * q3n__writer_row_bytes(t));
        p->data = w->buffer ? w->buffer + (size_t)w->n_pieces * w->room : w->o.memory + p->offset;
        w->n_pieces++;
        w->row = p->row1;
        if (w->row == rows) q3n__writer_next(w);
    }
}

static void q3n__writer_make(void *arg, int begin, int end)
{
    q3n__writer *w = (q3n__writer *)arg;
    for (int i = begin; i < end; i++) {
        q3n__piece *p = &w->pieces[i];
        p->failed = !w->o.make(w->o.user, p);
        if (!p->failed) p->crc = q3n__crc32_with(&w->crc_table, 0, p->data, p->bytes);
    }
}

static q3n_result q3n__writer_put(q3n__writer *w, const q3n__piece *p)
{
    q3n__writer_tensor *t = &w->tensors[p->tensor - w->tensors];
    if (p->failed) return q3n__fault_fail(&p->fault, t->item.name, t->type, w->err);
    const q3n_result r = q3n__writer_pad(w, p->offset);
    if (r != Q3N_OK) return r;
    t->crc = q3n__crc_join(t->crc, p->crc, p->bytes);
    return q3n__writer_raw(w, p->data, p->bytes);
}

/* Make and write all tensors. */
static q3n_result q3n__writer_run(q3n__writer *w)
{
    for (q3n__writer_cut(w); w->n_pieces > 0; q3n__writer_cut(w)) {
        q3n__parallel(&w->pool, w->n_pieces, 1, q3n__writer_make, w);
        for (int i = 0; i < w->n_pieces; i++) {
            const q3n_result r = q3n__writer_put(w, &w->pieces[i]);
            if (r != Q3N_OK) return r;
        }
    }
    return q3n__writer_pad(w, w->file_bytes);
}

/* ---- Open and close ---- */

/* The table of tensors and their places: enough to know the file's size. */
static q3n_result q3n__writer_layout(q3n__writer *w, const q3n__writer_options *o, q3n_error *err)
{
    memset(w, 0, sizeof *w);
    w->o = *o;
    w->err = err;
    q3n__crc_table_make(&w->crc_table);
    q3n_result r = q3n__config_check(o->config, err);
    if (r != Q3N_OK) return r;
    if (o->name && strlen(o->name) > 255)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "the name has more than 255 bytes");
    r = q3n__plan_visit(w->o.config, q3n__writer_add, w);   /* counts */
    if (r != Q3N_OK) return r;
    w->tensors = (q3n__writer_tensor *)q3n__alloc(o->allocator,
                                                  (size_t)w->n_tensors * sizeof *w->tensors);
    if (!w->tensors)
        return q3n__fail(err, Q3N_ERR_MEMORY, -1, "no memory for %d tensors", w->n_tensors);
    w->n_tensors = 0;
    r = q3n__plan_visit(w->o.config, q3n__writer_add, w);
    w->meta_bytes = q3n__writer_metadata(w);
    q3n__writer_place(w);
    return r;
}

/* Metadata, pieces, buffers and the threads' handles. */
static q3n_result q3n__writer_memory(q3n__writer *w)
{
    const q3n_allocator *a = w->o.allocator;
    const int n_threads = w->o.n_threads ? w->o.n_threads : q3n__cpu_count();
    for (int i = 0; i < w->n_tensors; i++) {
        const q3n__writer_tensor *t = &w->tensors[i];
        const int64_t rows = q3n__stored_rows(t->type, q3n__writer_rows(t)),
                      count = q3n__writer_piece_rows(t),
                      bytes = (rows < count ? rows : count) * q3n__writer_row_bytes(t);
        if ((size_t)bytes > w->room) w->room = (size_t)bytes;
    }
    w->room = (size_t)q3n__align_up((int64_t)w->room, Q3N__ALIGN);
    w->max_pieces = 4 * n_threads;       /* what q3n__parallel cuts */
    w->meta = (uint8_t *)q3n__alloc(a, w->meta_bytes);
    w->pieces = (q3n__piece *)q3n__alloc(a, (size_t)w->max_pieces * sizeof *w->pieces);
    w->threads = (q3n__thread *)q3n__alloc(a, (size_t)n_threads * sizeof *w->threads);
    if (w->o.path) w->buffer = (uint8_t *)q3n__alloc(a, (size_t)w->max_pieces * w->room);
    if (!w->meta || !w->pieces || !w->threads || (w->o.path && !w->buffer))
        return q3n__fail(w->err, Q3N_ERR_MEMORY, -1, "no memory to write with %d threads",
                         n_threads);
    const q3n_executor none = { NULL, NULL, 0 };
    return q3n__pool_open(&w->pool, n_threads, &none, w->threads, w->err);
}

static void q3n__writer_discard(q3n__writer *w)
{
    const q3n_allocator *a = w->o.allocator;
    q3n__pool_close(&w->pool);
    q3n__free(a, w->buffer);
    q3n__free(a, w->threads);
    q3n__free(a, w->pieces);
    q3n__free(a, w->meta);
    q3n__free(a, w->tensors);
}

/* What options of both kinds of file have: an allocator, and a place for what is written. */
static q3n_result q3n__check_made(const q3n_allocator *a, const q3n_model_stats *written,
                                  q3n_error *err)
{
    if (!a->alloc != !a->free)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "an allocator needs both alloc and free");
    if (written && q3n__struct_size(written) == 0)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "q3n_model_stats: its size is not set: begin with "
                         "Q3N_INIT or .size = sizeof");
    return Q3N_OK;
}

static void q3n__writer_stats(const q3n__writer *w, q3n_model_stats *out)
{
    q3n_model_stats stats = Q3N_INIT(q3n_model_stats);
    stats.file_bytes = w->file_bytes;
    for (int i = 0; i < w->n_tensors; i++) {
        const q3n__writer_tensor *from = &w->tensors[i];
        q3n_tensor t;
        memset(&t, 0, sizeof t);
        t.type = from->type;
        memcpy(t.dim, from->item.dim, sizeof t.dim);
        t.bytes = from->slice_bytes * (from->item.n_dims == 3 ? t.dim[0] : 1);
        q3n__stats_count(&stats, &t);
        q3n__stats_read(&stats, w->o.config, &from->item, &t);
    }
    q3n__struct_write(out, sizeof stats, &stats);
}

/* Close the writer.  r is how things went so far: only Q3N_OK puts a file under its name, anything
 * else removes it, and memory then holds no model.  Returns r, or what went wrong here. */
static q3n_result q3n__writer_close(q3n__writer *w, q3n_result r)
{
    if (r == Q3N_OK) q3n__writer_metadata(w);       /* again, now with the checksums */
    if (w->writing) {
        if (r == Q3N_OK && !(q3n__output_rewind(&w->output)
                             && q3n__output_write(&w->output, w->meta, w->meta_bytes)))
            r = Q3N_ERR_IO;
        r = q3n__output_close(&w->output, r, w->err);
    } else if (r == Q3N_OK) {
        memcpy(w->o.memory, w->meta, w->meta_bytes);
    }
    if (r == Q3N_OK && w->o.written) q3n__writer_stats(w, w->o.written);
    q3n__writer_discard(w);
    return r;
}

static q3n_result q3n__writer_start(q3n__writer *w)
{
    const q3n__writer_options *o = &w->o;
    if (o->n_threads < 0 || o->n_threads > 1024)
        return q3n__fail(w->err, Q3N_ERR_ARG, -1, "%d threads, expected 0 .. 1024", o->n_threads);
    if (!o->path && (!o->memory || (uintptr_t)o->memory % Q3N__ALIGN != 0))
        return q3n__fail(w->err, Q3N_ERR_ARG, -1, "memory must be aligned to %d bytes", Q3N__ALIGN);
    if (!o->path && (uint64_t)o->memory_bytes != (uint64_t)w->file_bytes)
        return q3n__fail(w->err, Q3N_ERR_ARG, -1, "%zu bytes of memory, expected %lld",
                         o->memory_bytes, (long long)w->file_bytes);
    q3n_result r = q3n__writer_memory(w);
    if (r == Q3N_OK && o->path) r = q3n__output_open(&w->output, o->path, o->input, w->err);
    if (r != Q3N_OK) return r;
    w->writing = o->path != NULL;
    if (o->path) q3n__writer_metadata(w);
    else         memset(w->meta, 0, w->meta_bytes);      /* no model before all is there */
    return q3n__writer_raw(w, w->meta, w->meta_bytes);
}

/* Lay out the file, make room and threads.  The writer need not be closed if this fails. */
static q3n_result q3n__writer_open(q3n__writer *w, const q3n__writer_options *o, q3n_error *err)
{
    q3n_result r = q3n__writer_layout(w, o, err);
    if (r == Q3N_OK) r = q3n__writer_start(w);
    return r == Q3N_OK ? r : q3n__writer_close(w, r);
}

static q3n_result q3n__writer_all(const q3n__writer_options *o, q3n_error *err)
{
    q3n__writer w;
    q3n_result r = q3n__writer_open(&w, o, err);
    return r == Q3N_OK ? q3n__writer_close(&w, q3n__writer_run(&w)) : r;
}

/* ---- q3n_quantize_file ---- */
typedef struct {
    const q3n_model            *in;
    const q3n_quantize_options *o;
    const q3n__recipe          *recipe;
    const float               **importance;          /* [n_tensors of the input]                 */
    q3n__quantiser              quantiser[Q3N_TYPE_COUNT];
    char                        blocked[96];         /* a quantised tensor that would change     */
} q3n__quantize_run;

static int q3n__quantize_choose(void *user, q3n__plan_item *item, q3n_type *type)
{
    q3n__quantize_run *run = (q3n__quantize_run *)user;
    const q3n_tensor *t = q3n__find_tensor(run->in, item->name);
    if (!t) return 0;
    item->dim[0] = t->dim[0];
    *type = q3n__recipe_type(run->recipe, item, t->type);
    if (q3n__is_quantised(t->type) && t->type != *type && !run->blocked[0])
        memcpy(run->blocked, item->name, sizeof item->name);
    return 1;
}

static int q3n__quantize_make(void *user, q3n__piece *p)
{
    const q3n__quantize_run *run = (const q3n__quantize_run *)user;
    const q3n__plan_item *item = &p->tensor->item;
    const q3n_tensor *t = q3n__find_tensor(run->in, item->name);
    const uint8_t *data = (const uint8_t *)t->data + (size_t)p->slice * t->stride;
    if (t->type == p->tensor->type && q3n__is_quantised(t->type)) {
        memcpy(p->data, data + p->row0 * q3n__writer_row_bytes(p->tensor), p->bytes);
        return 1;
    }
    const q3n__source s = { t->type, data, q3n__writer_rows(p->tensor),
                            (int)item->dim[item->n_dims - 1],
                            run->importance[t - run->in->tensors] };
    return q3n__encode_rows(&run->quantiser[p->tensor->type], &s, p->row0, p->row1, p->data,
                            &p->fault);
}

/* A section of an open model; NULL = it has none. */
static const uint8_t *q3n__model_section(const q3n_model *m, uint32_t kind, size_t *bytes)
{
    for (uint32_t i = 0; i < q3n__load_u32(m->data + 12); i++) {
        const uint8_t *p = m->data + Q3N__HEADER_BYTES + (size_t)i * Q3N__SECTION_BYTES;
        if (q3n__load_u32(p) != kind) continue;
        *bytes = (size_t)q3n__load_u64(p + 16);
        return m->data + q3n__load_u64(p + 8);
    }
    *bytes = 0;
    return NULL;
}

static q3n_result q3n__quantize_importance(q3n__quantize_run *run, q3n_error *err)
{
    for (int i = 0; i < run->in->n_tensors; i++) {
        const q3n_tensor *t = &run->in->tensors[i];
        const int n_cols = (int)t->dim[t->n_dims - 1];
        run->importance[i] = NULL;
        if (!run->o->importance || t->n_dims < 2) continue;
        run->importance[i] = run->o->importance(run->o->importance_user, t);
        const int bad = q3n__first_bad_importance(run->importance[i], n_cols);
        if (bad < n_cols)
            return q3n__fail(err, Q3N_ERR_ARG, -1,
                             "%s: importance of column %d is %g, expected 0 .. 1e30", t->name, bad,
                             (double)run->importance[i][bad]);
    }
    return Q3N_OK;
}

static q3n_result q3n__quantize_write(const char *path, q3n__quantize_run *run, q3n_error *err)
{
    q3n__writer_options w;
    q3n__writer writer;
    memset(&w, 0, sizeof w);
    w.config = &run->in->config;
    w.config_section = q3n__model_section(run->in, Q3N__SECTION_CONFIG, &w.config_section_bytes);
    w.tokenizer = q3n__model_section(run->in, Q3N__SECTION_TOKENIZER, &w.tokenizer_bytes);
    w.path = path;
    w.input = &run->in->file;
    w.n_threads = run->o->n_threads;
    w.allocator = &run->o->allocator;
    w.progress = &run->o->progress;
    w.written = run->o->written;
    w.choose = q3n__quantize_choose;
    w.make = q3n__quantize_make;
    w.user = run;
    q3n_result r = q3n__writer_layout(&writer, &w, err);
    q3n__writer_discard(&writer);
    if (r == Q3N_OK && run->blocked[0] && !run->o->allow_requantize)
        r = q3n__fail(err, Q3N_ERR_UNSUPPORTED, -1,
                      "%s is quantised already: start from the original, or allow to lose more",
                      run->blocked);
    return r == Q3N_OK ? q3n__writer_all(&w, err) : r;
}

Q3N_DEF q3n_result q3n_quantize_file(const char *path, const q3n_model *in,
                                     const q3n_quantize_options *options, q3n_error *err)
{
    q3n_quantize_options set = Q3N_INIT(q3n_quantize_options);
    const q3n_quantize_options *const o = &set;
    if (!path || !in) return q3n__fail(err, Q3N_ERR_ARG, -1, "no path, or no model");
    q3n_result r = q3n__struct_read(&set, sizeof set, options, "q3n_quantize_options", err);
    if (r == Q3N_OK) r = q3n__check_made(&o->allocator, o->written, err);
    if (r != Q3N_OK) return r;
    const char *name = o->recipe ? o->recipe : "q4";
    int k = 0;
    while (k < Q3N__N_RECIPES && strcmp(name, q3n__recipes[k].name) != 0) k++;
    if (k == Q3N__N_RECIPES)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "there is no recipe '%s'", name);
    q3n__quantize_run *run = (q3n__quantize_run *)q3n__alloc(&o->allocator, sizeof *run);
    const float **importance = (const float **)
        q3n__alloc(&o->allocator, (size_t)in->n_tensors * sizeof *importance);
    if (!run || !importance) {
        r = q3n__fail(err, Q3N_ERR_MEMORY, -1, "no memory to quantise");
    } else {
        memset(run, 0, sizeof *run);
        run->in = in;
        run->o = o;
        run->recipe = &q3n__recipes[k];
        run->importance = importance;
        for (int t = 0; t < Q3N_TYPE_COUNT; t++)
            q3n__quantiser_make(&run->quantiser[t], (q3n_type)t);
        r = q3n__quantize_importance(run, err);
        if (r == Q3N_OK) r = q3n__quantize_write(path, run, err);
    }
    q3n__free(&o->allocator, (void *)importance);
    q3n__free(&o->allocator, run);
    return r;
}

/* =====================================================================================
 * [5] RANDOM WEIGHTS                                                         >>random
 *
 * Models of any geometry without a checkpoint, for tests and measurements.  A weight depends on the
 * seed, its tensor's name and its place alone, so pieces can be made in any order.
 * ===================================================================================== */

/* ---- Numbers ---- */

/* Quantiles of |z| for the normal distribution cut at 2: products of doubles and integers only, so
 * that the table is the same whatever compiler and math library made it. */
#define Q3N__QUANTILES 4096              /* equally probable pieces of [0, 2]                    */
#define Q3N__Z_ONE     (1 << 28)         /* z = 1 in fixed point                                 */

typedef struct { int32_t z[Q3N__QUANTILES + 1]; } q3n__quantiles;

/* The density on a grid of h = 1/2048 comes from exp(-(z + h)^2 / 2) = exp(-z^2 / 2) rho, where rho
 * shrinks by exp(-h^2) each step. */
typedef struct { double density, rho; } q3n__normal;
static const q3n__normal q3n__normal_at_0 = { 1.0, 0.9999998807907176 };   /* exp(-h^2 / 2) */

/* Twice the area below the density's next step, by the trapezoid rule. */
static int64_t q3n__normal_step(q3n__normal *p)
{
    const double next = p->density * p->rho;
    const int64_t mass = (int64_t)(p->density * 0x1p36) + (int64_t)(next * 0x1p36);
    p->density = next;
    p->rho *= 0.9999997615814493;                                          /* exp(-h^2)     */
    return mass;
}

/* The steps' sums are the distribution function, which is inverted linearly: the error in z is
 * below 3e-6.  Made twice, they need no memory. */
static void q3n__quantiles_make(q3n__quantiles *q)
{
    enum { GRID = 2048, STEPS = 2 * GRID };
    const int64_t unit = Q3N__Z_ONE / GRID;
    q3n__normal p = q3n__normal_at_0;
    int64_t total = 0, below = 0;
    for (int k = 0; k < STEPS; k++) total += q3n__normal_step(&p);
    p = q3n__normal_at_0;
    int64_t mass = q3n__normal_step(&p), z = 0;
    for (int j = 0; j < Q3N__QUANTILES; j++) {
        const int64_t target = total / Q3N__QUANTILES * j;
        for (; below + mass <= target; z += unit) {
            below += mass;
            mass = q3n__normal_step(&p);
        }
        q->z[j] = (int32_t)(z + (target - below) * unit / mass);
    }
    q->z[Q3N__QUANTILES] = 2 * Q3N__Z_ONE;
}

/* What a generator needs for one tensor: an element depends on key and number alone. */
typedef struct {
    const q3n__quantiles *quantiles;
    uint64_t              key;
    double                unit;          /* stddev / Q3N__Z_ONE                                  */
} q3n__random;

/* 32 random bits to a number: sign, 12 bits of quantile, 19 between it and the next. */
static float q3n__random_value(const q3n__random *g, uint32_t bits)
{
    const int32_t *z = g->quantiles->z + ((bits >> 19) & (Q3N__QUANTILES - 1));
    const int32_t v = z[0] + (int32_t)(((int64_t)(z[1] - z[0]) * (int64_t)(bits & 0x7ffff)) >> 19);
    const int32_t negative = -(int32_t)(bits >> 31);       /* a branch here would be a coin toss */
    return (float)((double)((v ^ negative) - negative) * g->unit);
}

/* Elements [first, first + n) of the tensor.  One hash makes elements 2i and 2i + 1. */
static void q3n__random_normal(const q3n__random *g, int64_t first, float *y, int64_t n)
{
    const int64_t end = first + n;
    for (int64_t at = first & ~(int64_t)1; at < end; at += 2) {
        const uint64_t h = q3n__mix64(g->key + (uint64_t)(at / 2) * Q3N__GOLDEN);
        if (at >= first)  y[at - first]     = q3n__random_value(g, (uint32_t)h);
        if (at + 1 < end) y[at + 1 - first] = q3n__random_value(g, (uint32_t)(h >> 32));
    }
}

/* ln(a) for a = u / 2^28 in (0, 16), by repeated squaring of integers: one bit of the binary
 * logarithm each. */
static float q3n__random_log(uint32_t u)
{
    int exponent = 31;
    uint64_t m = u | 1;
    for (; !(m >> 31); exponent--) m <<= 1;        /* u = m / 2^31 2^exponent, m / 2^31 in [1, 2) */
    int64_t log2 = exponent - 28;
    for (int bit = 0; bit < 30; bit++) {
        m = (m * m) >> 31;
        log2 = log2 * 2 + (int64_t)(m >> 32);
        if (m >> 32) m >>= 1;
    }
    return (float)((double)log2 * 6.455436167865482e-10);    /* ln(2) / 2^30 */
}

/* What a tensor begins with. */
typedef enum {
    Q3N__INIT_NORMAL, Q3N__INIT_ONES, Q3N__INIT_ZEROS, Q3N__INIT_A_LOG, Q3N__INIT_COS,
    Q3N__INIT_SIN
} q3n__init;

/* Matrices are normal; of vectors the name tells, and those that are none of these are norms or
 * DeltaNet's dt_bias. */
static q3n__init q3n__random_init(const q3n__plan_item *item)
{
    static const struct { const char *end; q3n__init init; } rows[] = {
        { ".bias", Q3N__INIT_ZEROS }, { ".A_log", Q3N__INIT_A_LOG },
        { ".conv1d.weight", Q3N__INIT_NORMAL }, { "rope.cos", Q3N__INIT_COS },
        { "rope.sin", Q3N__INIT_SIN }
    };
    if (item->role != Q3N__ROLE_VEC) return Q3N__INIT_NORMAL;
    const size_t bytes = strlen(item->name);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        const size_t n = strlen(rows[i].end);
        if (bytes >= n && strcmp(item->name + bytes - n, rows[i].end) == 0) return rows[i].init;
    }
    return Q3N__INIT_ONES;
}

/* cos or sin of pos * theta^(-2j / D) for elements [first, first + n) of [positions, D/2].  Unlike
 * the rest these follow the C library's functions to their last bit. */
static void q3n__random_rope(const q3n_config *c, q3n__init init, int64_t first, float *y,
                             int64_t n)
{
    const int half = c->head_dim / 2;
    for (int64_t i = 0; i < n; i++) {
        const int64_t pos = (first + i) / half, j = (first + i) % half;
        const double angle = (double)pos * pow(c->rope_theta, -2.0 * (double)j / c->head_dim);
        y[i] = (float)(init == Q3N__INIT_COS ? cos(angle) : sin(angle));
    }
}

/* Elements [first, first + n) of a tensor as [HF] Qwen3NextPreTrainedModel._init_weights has them:
 * A_log is the logarithm of a uniform number in (0, 16). */
static void q3n__random_fill(const q3n_config *c, const q3n__random *g, q3n__init init,
                             int64_t first, float *y, int64_t n)
{
    if (init == Q3N__INIT_NORMAL) {
        q3n__random_normal(g, first, y, n);
    } else if (init == Q3N__INIT_COS || init == Q3N__INIT_SIN) {
        q3n__random_rope(c, init, first, y, n);
    } else if (init == Q3N__INIT_A_LOG) {
        for (int64_t i = 0; i < n; i++) {
            const uint64_t h = q3n__mix64(g->key + (uint64_t)(first + i) * Q3N__GOLDEN);
            y[i] = q3n__random_log((uint32_t)h);
        }
    } else {
        for (int64_t i = 0; i < n; i++) y[i] = init == Q3N__INIT_ONES ? 1.0f : 0.0f;
    }
}

/* ---- Random quantised weights ---- */

/* Codes are drawn, not searched for: 8 random bits choose a code with the frequency that normal
 * weights cut at two deviations give it, and one scale gives the weights the deviation that the
 * float types have. */
typedef struct {
    uint8_t  code[256], zero;            /* zero: the code nearest to 0                          */
    uint16_t scale;
} q3n__random_codes;

/* Returns 0 if the scale is nothing in f16. */
static int q3n__random_codes_make(q3n__random_codes *rc, q3n_type type, const q3n__quantiles *q,
                                  double stddev)
{
    q3n__quantiser e;
    double z2 = 0.0, level2 = 0.0;
    q3n__quantiser_make(&e, type);
    const double reach = 0.5 * (double)(e.level[Q3N__CELLS - 1] - e.level[0]);
    for (int k = 0; k < 256; k++) {      /* the middle of one of 128 equally probable |z|, a sign */
        const int32_t at = q->z[(2 * (k & 127) + 1) * (Q3N__QUANTILES / 256)];
        const double z = (double)(k < 128 ? at : -at) / Q3N__Z_ONE;
        const int cell = q3n__cell((float)(0.5 * z * reach));
        const double level = (double)e.level[cell];
        rc->code[k] = e.code[cell];
        z2 += z * z;
        level2 += level * level;
    }
    rc->zero = e.code[q3n__cell(0.0f)];
    rc->scale = q3n__f32_to_f16((float)(stddev * sqrt(z2 / level2)));
    return rc->scale != 0;
}

/* Codes of a group of 16 rows from 64 hashes: each has 8 bytes for one row and one column in 4. */
static void q3n__random_group(const q3n__random_codes *rc, q3n_type type, uint64_t key, int n_cols,
                              uint8_t *codes)
{
    for (int b = 0; b < 4 * Q3N__TILE_ROWS; b++) {
        uint64_t h = q3n__mix64(key + (uint32_t)b * Q3N__GOLDEN);
        uint8_t c[Q3N__GROUP / 4];
        for (int s = 0; s < Q3N__GROUP / 4; s++, h >>= 8) c[s] = rc->code[h & 255];
        for (int s = 0; s < Q3N__GROUP / 4 && n_cols < Q3N__GROUP; s++)
            if (4 * s + b % 4 >= n_cols) c[s] = rc->zero;
        q3n__codes_put(type, codes, b, c);
    }
}

/* Rows of a piece.  first is the number of its first group, of 16 rows, in the tensor. */
static void q3n__random_tiles(const q3n__random_codes *rc, uint64_t key, int64_t first,
                              q3n__piece *p)
{
    const q3n_type type = p->tensor->type;
    const int n_cols = (int)p->tensor->item.dim[p->tensor->item.n_dims - 1];
    const int n_groups = 2 * q3n__x8_blocks(n_cols);
    const size_t block_bytes = (size_t)q3n__types[type].block_bytes * Q3N__TILE_ROWS;
    const size_t code_bytes = q3n__group_bytes(type);
    uint8_t *block = p->data;
    for (int64_t row = p->row0; row < p->row1; row += Q3N__TILE_ROWS)
        for (int g = 0; g < n_groups; g++, first++) {
            const int left = n_cols - g * Q3N__GROUP;
            uint8_t *codes = block + 4 * Q3N__TILE_ROWS + (size_t)(g % 2) * code_bytes;
            q3n__random_group(rc, type, key + (uint64_t)(first * 64) * Q3N__GOLDEN, left, codes);
            for (int r = 0; r < Q3N__TILE_ROWS; r++) {
                const uint16_t scale = row + r < p->row1 && left > 0 ? rc->scale : 0;
                memcpy(block + 2 * (g % 2 * Q3N__TILE_ROWS + r), &scale, sizeof scale);
            }
            if (g % 2) block += block_bytes;
        }
}

/* ---- q3n_init_file, q3n_init_memory ---- */
#define Q3N__INIT_CHUNK 2048             /* floats made at a time; even, as one hash makes two   */

typedef struct {
    const q3n_config       *config;
    const q3n_init_options *o;
    double                  stddev;
    q3n__quantiles          quantiles;
    q3n__random_codes       codes[Q3N_TYPE_COUNT];
    q3n__crc_table          crc_table;
} q3n__init_run;

static int q3n__init_choose(void *user, q3n__plan_item *item, q3n_type *type)
{
    const q3n__init_run *run = (const q3n__init_run *)user;
    if (item->optional) return 0;
    if (item->dim[0] == 0) item->dim[0] = run->config->max_position_embeddings;
    *type = q3n__finer_type(item, run->o->type);
    return 1;
}

static int q3n__init_make(void *user, q3n__piece *p)
{
    const q3n__init_run *run = (const q3n__init_run *)user;
    const q3n__writer_tensor *t = p->tensor;
    const int64_t n_cols = t->item.dim[t->item.n_dims - 1], rows = q3n__writer_rows(t);
    const uint32_t name = q3n__crc32_with(&run->crc_table, 0, t->item.name, strlen(t->item.name));
    const q3n__random g = { &run->quantiles, q3n__mix64(run->o->seed ^ ((uint64_t)name << 32)),
                            run->stddev / Q3N__Z_ONE };
    if (q3n__is_quantised(t->type)) {
        const int64_t tiles = q3n__stored_rows(t->type, rows) / Q3N__TILE_ROWS;
        const int64_t tile = p->slice * tiles + p->row0 / Q3N__TILE_ROWS;
        q3n__random_tiles(&run->codes[t->type], g.key,
                          tile * 2 * q3n__x8_blocks((int)n_cols), p);
        return 1;
    }
    const q3n__init init = q3n__random_init(&t->item);
    float x[Q3N__INIT_CHUNK];
    const int64_t first = (p->slice * rows + p->row0) * n_cols, n = (p->row1 - p->row0) * n_cols;
    for (int64_t done = 0; done < n; done += Q3N__INIT_CHUNK) {
        const int64_t count = n - done < Q3N__INIT_CHUNK ? n - done : Q3N__INIT_CHUNK;
        q3n__random_fill(run->config, &g, init, first + done, x, count);
        q3n__encode_floats(t->type, p->data + (size_t)done * q3n__row_bytes(t->type, 1), x,
                           (int)count);
    }
    return 1;
}

static q3n_result q3n__init_check(const q3n_init_options *o, q3n_error *err)
{
    if (!q3n_type_name(o->type))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "there is no type %d", (int)o->type);
    if (!(o->stddev >= 0.0 && o->stddev <= 1e3))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "stddev %g is not in [0, 1000]", o->stddev);
    return q3n__check_made(&o->allocator, o->written, err);
}

/* What the three public functions share: w says where to; bytes != NULL = only measure. */
static q3n_result q3n__init_any(q3n__writer_options *w, const q3n_config *geometry,
                                const q3n_init_options *options, int64_t *bytes, q3n_error *err)
{
    q3n_config config = Q3N_INIT(q3n_config);
    q3n_init_options set = Q3N_INIT(q3n_init_options);
    const q3n_init_options *const o = &set;
    q3n_result r = q3n__struct_read(&set, sizeof set, options, "q3n_init_options", err);
    if (r == Q3N_OK) r = q3n__config_read(&config, geometry, err);
    if (r == Q3N_OK) r = q3n__init_check(o, err);
    if (r != Q3N_OK) return r;
    q3n__init_run *run = (q3n__init_run *)q3n__alloc(&o->allocator, sizeof *run);
    if (!run) return q3n__fail(err, Q3N_ERR_MEMORY, -1, "no memory for random weights");
    run->config = w->config = &config;
    run->o = o;
    run->stddev = o->stddev == 0.0 ? 0.02 : o->stddev;
    w->name = o->name;
    w->n_threads = o->n_threads;
    w->allocator = &o->allocator;
    w->progress = &o->progress;
    w->written = o->written;
    w->choose = q3n__init_choose;
    w->make = q3n__init_make;
    w->user = run;
    if (bytes) {
        q3n__writer writer;
        r = q3n__writer_layout(&writer, w, err);
        if (r == Q3N_OK) *bytes = writer.file_bytes;
        q3n__writer_discard(&writer);
    } else {
        q3n__crc_table_make(&run->crc_table);
        q3n__quantiles_make(&run->quantiles);
        for (int t = 0; t < Q3N_TYPE_COUNT && r == Q3N_OK; t++)
            if (q3n__is_quantised((q3n_type)t)
                && !q3n__random_codes_make(&run->codes[t], (q3n_type)t, &run->quantiles,
                                           run->stddev)
                && q3n__is_quantised(o->type))
                r = q3n__fail(err, Q3N_ERR_ARG, -1, "stddev %g is too small for scales in f16",
                              run->stddev);
        if (r == Q3N_OK) r = q3n__writer_all(w, err);
    }
    q3n__free(&o->allocator, run);
    return r;
}

Q3N_DEF q3n_result q3n_init_file(const char *path, const q3n_config *c, const q3n_init_options *o,
                                 q3n_error *err)
{
    q3n__writer_options w;
    memset(&w, 0, sizeof w);
    if (!path || !c) return q3n__fail(err, Q3N_ERR_ARG, -1, "no path, or no configuration");
    w.path = path;
    return q3n__init_any(&w, c, o, NULL, err);
}

Q3N_DEF int64_t q3n_init_bytes(const q3n_config *c, const q3n_init_options *o, q3n_error *err)
{
    int64_t bytes = 0;
    q3n__writer_options w;
    memset(&w, 0, sizeof w);
    if (!c) q3n__fail(err, Q3N_ERR_ARG, -1, "no configuration");
    else    q3n__init_any(&w, c, o, &bytes, err);
    return bytes;
}

Q3N_DEF q3n_result q3n_init_memory(void *data, size_t bytes, const q3n_config *c,
                                   const q3n_init_options *o, q3n_error *err)
{
    q3n__writer_options w;
    memset(&w, 0, sizeof w);
    if (!data || !c) return q3n__fail(err, Q3N_ERR_ARG, -1, "no memory, or no configuration");
    w.memory = (uint8_t *)data;
    w.memory_bytes = bytes;
    return q3n__init_any(&w, c, o, NULL, err);
}

#endif /* Q3N__MAKE_IMPLEMENTS */
