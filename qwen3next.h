/* qwen3next.h - runs Qwen3-Next, Qwen3.5, Qwen3-MoE and Qwen3 language models on CPUs
 *
 * One header, C11, no dependency but the C library and the operating system.  A model is a flat
 * file (.q3n, made by tools/convert.py from a published checkpoint) that is mapped, not loaded;
 * sessions hold the state of one text each; kernels for AVX2, AVX-512 and NEON are compiled in
 * and chosen at run time.  It is neither a server nor a trainer, and reads no other model families.
 * A second header, tools/q3n_make.h, makes files (quantised copies, random weights).
 *
 * SPDX-License-Identifier: MIT (text: LICENSE)
 *
 * In one C file of its own, so that it is compiled once:
 *
 *     #define Q3N_IMPLEMENTATION
 *     #include "qwen3next.h"
 *
 * and include it without the define wherever else you need it, from C99 or C++11.  Link with -lm,
 * and -lpthread on Unix.  A complete program:
 *
 *     #include <stdio.h>
 *     int main(int argc, char **argv)
 *     {
 *         q3n_error err;
 *         q3n_model *model;
 *         q3n_session *session;
 *         if (argc < 3 || q3n_model_open(&model, argv[1], NULL, &err)
 *             || q3n_session_create(&session, model, NULL, &err))
 *             return argc < 3 ? 2 : (fprintf(stderr, "%s\n", err.message), 1);
 *
 *         int32_t ids[1024], best = 0;
 *         size_t n_ids, n;
 *         const int vocab = q3n_model_vocab_size(model);
 *         float *logits = malloc(sizeof *logits * (size_t)vocab);
 *         if (q3n_tokenize(model, argv[2], strlen(argv[2]), Q3N_TOKENIZE_PREFIX, ids, 1024,
 *                          &n_ids)) return 1;
 *
 *         q3n_result r = q3n_session_eval(session, ids, (int)n_ids, logits);
 *         q3n_detokenizer dec = { 0 };
 *         for (char text[512]; r == Q3N_OK; r = q3n_session_eval(session, &best, 1, logits)) {
 *             best = 0;
 *             for (int i = 1; i < vocab; i++) if (logits[i] > logits[best]) best = i;
 *             if (q3n_model_is_eos(model, best)) break;
 *             if (q3n_detokenizer_next(&dec, model, best, text, sizeof text, &n) == Q3N_OK)
 *                 fwrite(text, 1, n, stdout);
 *         }
 *         if (r != Q3N_OK) fprintf(stderr, "%s\n", q3n_session_error(session)->message);
 *     }
 *
 * CONTENTS                                                    (search for >>tag to jump)
 *
 *     [1] API                             >>api
 *     [2] PLATFORM                        >>platform
 *     [3] MEMORY                          >>memory
 *     [4] ERRORS                          >>errors
 *     [5] FILES                           >>files
 *     [6] PARALLEL                        >>parallel
 *     [7] TYPES                           >>types
 *     [8] TENSORS                         >>tensors
 *     [9] CONFIG                          >>config
 *    [10] MODEL FILES                     >>model-files
 *    [11] LOADER                          >>loader
 *    [12] STATE                           >>state
 *    [13] SESSION FILES                   >>session-files
 *    [14] UNICODE                         >>unicode
 *    [15] VOCABULARY                      >>vocabulary
 *    [16] TOKENIZER                       >>tokenizer
 *    [17] OPS                             >>ops
 *    [18] PASS                            >>pass
 *    [19] ATTENTION                       >>attention
 *    [20] DELTANET                        >>deltanet
 *    [21] MODEL                           >>model
 *    [22] CACHE                           >>cache
 *    [23] ENGINE                          >>engine
 *    [24] SAMPLER                         >>sampler
 *    [25] SESSION                         >>session
 *    [26] MTP                             >>mtp
 *    [27] CHECKPOINTS                     >>checkpoints
 *    [28] EVALUATION                      >>evaluation
 *    [29] REUSE                           >>reuse
 *    [30] SPECULATION                     >>speculation
 *    [31] PUBLIC                          >>public
 *    [32] KERNELS, SCALAR: the definition >>kernels-scalar
 *    [33] KERNELS, AVX2                   >>kernels-avx2
 *    [34] KERNELS, AVX-512                >>kernels-avx512
 *    [35] KERNELS, AVX-512 VNNI           >>kernels-avx512vnni
 *    [36] KERNELS, NEON                   >>kernels-neon
 *    [37] DISPATCH: one row per ISA       >>dispatch
 *
 * THE MODEL ON ONE PAGE.  Shapes are row-major, slowest first; x W' is a linear layer with W
 * [out, in].
 *
 *     x  = embed(token)                                             [d]
 *     for each layer:
 *         h  = x + mix(norm(x))        mix: attention, or gated DeltaNet in 3 of 4 hybrid layers
 *         x  = h + ffn(norm(h))        ffn: SwiGLU, or the k best of E experts and a shared one
 *     logits = norm(x) Whead'                                       [vocab]
 *
 *     norm(x)      = x / sqrt(mean(x^2) + eps) * w
 *     SwiGLU(x)    = (silu(x Wgate') * (x Wup')) Wdown'
 *     attention    q, k per head normed, rotated; softmax(q k' / sqrt(D)) v * sigmoid(gate); Wo'
 *     DeltaNet     S <- e^g S;  S <- S + k (beta (v - S'k))';  o = S'q;  norm(o) w silu(z); Wout'
 *     experts      p = softmax(x Wrouter'); y = sum over the k largest of p_e expert_e(x)
 *                  + sigmoid(x wg') shared(x)
 *
 * WORDS, one meaning each.  Those of the field (prompt, prefill, decode, draft, logits, chunk, KV
 * cache ...) are not listed.
 *     text           the tokens of a session, from its first to its last
 *     state          what evaluating a text leaves: pages, DeltaNet's matrices, the columns before
 *                    each convolution, the last hidden state
 *     page           256 tokens of a text, with the keys and values that all layers have of them
 *     KV block       what one layer and one kv head have in a page
 *     snapshot       a state that is kept and does not change; a checkpoint is one in a cache,
 *                    marked to be evicted after the others
 *     pass           one walk of some rows through all layers; a row is a token that is evaluated,
 *                    with its activations, a segment the rows of one session
 *     tile, block    of quantised matrices: 16 rows together; 64 columns of a tile, or of their
 *                    input
 *     group          32 columns of a block, which share a scale
 *     slice          one expert's matrix in a tensor of three dimensions
 *     weight         a number of the model's file
 *     mixer          what lets a layer's tokens see one another: attention or DeltaNet
 *     trunk, module  the model's own layers; its multi-token-prediction (MTP) module
 *     golden         a small checkpoint with the outputs of [HF], in tests/golden
 *     design         a family: grouped-query attention with rotary embedding and experts, as Keras
 *                    files hold it
 *
 * TRAPS, each with a test that fails when it is stepped in (the goldens of the family named):
 *     - q_proj holds query and gate head by head, not all queries then all gates       (qwen3_next)
 *     - the output gate is applied before o_proj                                       (qwen3_next)
 *     - hybrid norms scale by 1 + w, DeltaNet's gated norm by w: files hold the factor (qwen3_next)
 *     - DeltaNet norms before its gate                                                 (qwen3_next)
 *     - checkpoints of qwen3_next group qkvz and ba by key head, qwen3_5 does not, .q3n never does
 *     - value head h reads key head h / (Hv / Hk)                                      (qwen3_next)
 *     - q and k have unit length, q is also divided by sqrt(dk)                        (qwen3_next)
 *     - g = -exp(A_log) softplus(a + dt_bias) is a logarithm                           (qwen3_next)
 *     - rotary embedding covers the first rotary_dim of a head only                    (qwen3_next)
 *     - router: softmax over all experts, then top-k, then renormalise if the file says so
 *                                                                              (qwen3_moe_nonorm)
 *     - the shared expert has a sigmoid gate of its own                                (qwen3_next)
 *     - older "design" checkpoints attend both ways and may have rotary tables of zeros
 *                                                                        (seed_patched_zero_rope)
 *
 * BUILD MACROS, to define before the implementation:
 *     Q3N_STATIC         all public functions static: only this file can call them
 *     Q3N_DEF            linkage of public functions, for instance __declspec(dllexport)
 *     Q3N_ASSERT(x)      default assert: for bugs in this file, never for input
 *     Q3N_NO_STDIO       no files: models open from memory only, none are written
 *     Q3N_NO_THREADS     no threads of its own: the calling thread or your executor does the work;
 *                        your threads may share models and caches all the same
 *     Q3N_NO_AVX2, Q3N_NO_AVX512, Q3N_NO_NEON, Q3N_NO_SIMD   leave kernels out
 *
 *     KB of code and constants, x86-64, gcc 12 -O2 (make compile-cost): 275; without SIMD 193, AVX2
 *     231, AVX-512 238, files 268, threads 274.  Compiling takes 10 CPU seconds and 260 MB on a
 *     Xeon of 2.5 GHz, 131 MB without SIMD.
 *
 * THREADS.  A model is immutable: share it.  A session belongs to one thread at a time and has a
 * pool of threads of its own, or your executor, or evaluates with an engine that it is given: then
 * engine and sessions belong to one thread together.  There is no writable global state.
 *
 * MEMORY.  Weights are mapped: the system keeps what is used and may drop it again.  Do not
 * truncate an open file: reading beyond its new end is a fault that no library can catch.  A
 * session allocates itself, its engine unless it is given one, and a page for every 256 tokens,
 * before they are evaluated; q3n_session_bytes adds it up.  Snapshots and forks share pages.  A
 * thread needs 48 KiB of stack for this library in an optimised build (33 of them for the scores of
 * attention).
 *
 * ARGUMENTS.  A pointer may be NULL where its comment says so, and an array where its count is 0.
 * Any other NULL, and any number out of its range, is Q3N_ERR_ARG; a function that does not return
 * q3n_result then returns what it returns when there is nothing (0, NULL, an empty name), and a
 * void one does nothing.  _close, _destroy and _free accept NULL.  After an error output handles
 * are NULL and output counts 0, unless a comment says otherwise; output arrays are undefined,
 * output structs unchanged.
 *
 * ERRORS.  Functions that can fail return q3n_result; the error record says what was found and what
 * was expected.  A function that fails changes nothing.  Model and session files are treated as
 * hostile: any bytes give a model, a state or an error.  What a hostile one computes may be
 * nonsense, but nothing out of bounds is ever accessed.
 *
 * FILES.  Paths are UTF-8, on Windows too.  Files to be read must be regular: nothing waits for a
 * pipe or a device.  A file being written is called PATH.<16 hex digits>.part until it is complete
 * and on disk; then it replaces the file at PATH, or the one that a link there leads to, and takes
 * over its mode, and its group and owner where the system permits.  A call that fails or is stopped
 * removes it and leaves the old file as it was; a process that is killed leaves both.  Windows does
 * not replace a file that is open elsewhere.
 *
 * DETERMINISM.  Weights are converted from their stored type and arithmetic is f32, in an order
 * that depends only on the instruction set; for quantised matrices activations are quantised to
 * bytes in groups of 32, and sums within a group are exact integers.  For one ISA the same tokens
 * give the same bits for any number of threads and however the text is split into calls.  Compile
 * with -ffp-contract=off, or this does not hold; -ffast-math is refused.
 *
 * ABI.  A program compiled with one version of this header may use a shared library of another,
 * older or newer, with the same Q3N_ABI.  Q3N_ABI goes up by one when something that exists changes
 * its layout, number or meaning, or is removed; additions leave it as it is.
 *     - Structs of options, outputs and statistics begin with `size`, which the caller sets to its
 *       own sizeof (Q3N_INIT).  They grow at their end, and on 64-bit machines have no padding but
 *       that of a q3n_executor in them.  The library reads no byte beyond `size` and takes missing
 *       fields as 0, which is the default.  Fields that it does not know must be 0, else
 *       Q3N_ERR_UNSUPPORTED: to ignore an option silently would be a bug.  It writes no byte beyond
 *       `size`, and zeros into fields that it does not know.  A size of 0 is Q3N_ERR_ARG.
 *     - Fields named `zero` are reserved and must be 0.
 *     - Structs that the library hands out as `const T *` (a model's q3n_config, q3n_tensor) may
 *       grow at their end: read them through the pointer, do not make arrays of them.
 *     - Structs of a callback and its user pointer (allocator, logger, executor, progress, hooks,
 *       sink, source), q3n_error, q3n_type_stats and q3n_detokenizer do not change.
 *     - Values of enums and flags do not change and are not reused.  New ones may come, also as
 *       results of existing calls: treat a result that you do not know as a failure.  ..._COUNT is
 *       that of the header you compiled with.
 *     - Handles are opaque and belong to the library that made them.
 *     - The wording of messages and notes may change at any time, the bits of results with any
 *       version.
 *     - Model files of version 1 stay readable, session files by the version that wrote them and
 *       later ones.
 *
 * LIMITS.  256 layers, a head_dim of 1024, a vocabulary of 2^24 tokens; little-endian 64-bit
 * machines, and wasm32, where model and session together have less than 4 GiB.
 *
 * REFERENCES
 *     [HF]   Hugging Face transformers 5.17, models/qwen3_next, qwen3_moe, qwen3_5: the numerics
 *     [GDN]  Yang, Kautz, Hatamizadeh: Gated Delta Networks, arXiv 2412.06464
 *     [FA]   Dao et al.: FlashAttention, arXiv 2205.14135
 *     [YaRN] Peng et al.: YaRN, arXiv 2309.00071
 *     [SPEC] Leviathan, Kalman, Matias: Fast Inference from Transformers via Speculative Decoding,
 *            arXiv 2211.17192
 *     [SDM]  Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1
 *     [UAX15] Unicode Standard Annex 15: normalisation forms
 *     [HFT]  Hugging Face tokenizers 0.23: what byte-level BPE does with added tokens
 *     [CRC]  Kounavis, Berry: A systematic approach to building high performance software-based CRC
 *            generators, ISCC 2005
 *
 * FILE FORMATS are described, byte by byte, beside the code that reads them: .q3n in >>model-files,
 * with names and shapes of tensors in >>tensors, quantised types in >>types and the tokenizer's
 * part in >>vocabulary; session files in >>session-files, their hash in >>memory.
 */

/* ---- Where there is no implementation: one line says why, and nothing of it is compiled ---- */
#if defined(Q3N_IMPLEMENTATION) && !defined(Q3N__IMPLEMENTED)
#  if defined(__cplusplus)
#    error "define Q3N_IMPLEMENTATION in a C file: the implementation is C, the API is C and C++"
#  elif defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#    error "qwen3next.h needs a little-endian machine: it uses model files in place"
#  elif (defined(__SIZEOF_SIZE_T__) && __SIZEOF_SIZE_T__ < 8 && !defined(__wasm32__)) \
     || (defined(_WIN32) && !defined(_WIN64))
#    error "qwen3next.h needs a 64-bit machine (or wasm32): it maps models and multiplies sizes"
#  elif defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(_M_FP_FAST) \
     || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#    error "compile the implementation of qwen3next.h without -ffast-math: it needs NaN and order"
#  else
#    define Q3N__IMPLEMENTS
#  endif
#endif

/* Strict C modes hide what POSIX has: see PLATFORM.  This adds to what is seen, hides nothing. */
#if defined(Q3N__IMPLEMENTS) && (defined(__linux__) || defined(__wasi__)) \
    && !defined(_DEFAULT_SOURCE)
#  define _DEFAULT_SOURCE 1
#endif

/* =====================================================================================
 * [1] API                                                                       >>api
 * ===================================================================================== */
#ifndef QWEN3NEXT_H
#define QWEN3NEXT_H

#include <stddef.h>
#include <stdint.h>

/* Initialises a struct that begins with its size:
 *     q3n_session_options o = Q3N_INIT(q3n_session_options);
 * in C { .size = sizeof o, .capacity = 1024 } does too.  Zero in the other fields of options means
 * default; size 0 is Q3N_ERR_ARG.  See ABI in the manual. */
#ifdef __cplusplus
template <typename T> inline T q3n__init()
{
    T zeros = T();
    zeros.size = sizeof(T);
    return zeros;
}
#  define Q3N_INIT(type) q3n__init<type>()
#else
#  define Q3N_INIT(type) { .size = sizeof(type) }
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define Q3N_ABI 1     /* one more when what exists changes its layout or meaning: see the manual */
#define Q3N_VERSION_MAJOR 0
#define Q3N_VERSION_MINOR 2
#define Q3N_VERSION_PATCH 0
#define Q3N_VERSION (Q3N_VERSION_MAJOR * 10000 + Q3N_VERSION_MINOR * 100 + Q3N_VERSION_PATCH)

#ifndef Q3N_DEF
#  if !defined(Q3N_STATIC)
#    define Q3N_DEF extern
#  elif defined(__GNUC__)
#    define Q3N_DEF static __attribute__((unused))   /* no program calls every function */
#  else
#    define Q3N_DEF static
#  endif
#endif

/* ---- Results ---- */

/* Every function that can fail returns one of these: one list makes the enum, names, messages. */
#define Q3N_RESULT_LIST(X)                                                              \
    X(OK,                0, "success")                                                  \
    X(ERR_ARG,          -1, "argument out of range")                                    \
    X(ERR_MEMORY,       -2, "out of memory")                                            \
    X(ERR_IO,           -3, "cannot read or write the file")                            \
    X(ERR_FORMAT,       -4, "not a valid file of its kind")                             \
    X(ERR_CHECKSUM,     -5, "checksum does not match: the file is damaged")             \
    X(ERR_UNSUPPORTED,  -6, "not supported by this version or this model")              \
    X(ERR_FULL,         -7, "context is full")                                          \
    X(ERR_THREAD,       -8, "cannot start a thread")                                    \
    X(ERR_CANCELLED,    -9, "cancelled by the caller")                                  \
    X(ERR_NO_FILE,     -10, "there is no such file")                                    \
    X(ERR_NUMERIC,     -11, "no logit is a number: the weights hold NaN or infinities")

typedef enum q3n_result {
#define Q3N__X(name, value, message) Q3N_##name = value,
    Q3N_RESULT_LIST(Q3N__X)
#undef Q3N__X
    Q3N__RESULT_MIN = -128
} q3n_result;

/* What went wrong, in words for a person.  Filled when a function fails, left alone otherwise.
 * This struct is frozen. */
typedef struct q3n_error {
    q3n_result code;
    int64_t    offset;         /* byte of the file where it was noticed, -1 if none              */
    char       message[500];   /* "layers.3.self_attn.q_proj.weight: shape [..], expected [..]":
                                  UTF-8 in one line; control characters, and bytes of names and
                                  paths that are not UTF-8, appear as \xNN                       */
} q3n_error;

Q3N_DEF const char *q3n_result_string(q3n_result r);  /* never NULL; static storage */
Q3N_DEF int         q3n_version(void);                /* Q3N_VERSION of the implementation */
Q3N_DEF int         q3n_abi_version(void);            /* its Q3N_ABI: must be the header's */

/* ---- Tensor types and instruction sets ---- */

/* One row per stored type: ID, name, number in the file, elements and bytes per block.  The float
 * types are plain arrays, row after row.  The quantised ones keep 16 rows together in tiles
 * (section >>types): there a block is one row's share of 64 columns, so that bits per weight are
 * 8 x bytes / elements: 8.5, 6.5, 4.5, 3.5. */
#define Q3N_TYPE_LIST(X)                                                                \
    Q3N_FLOAT_TYPE_LIST(X)                                                              \
    Q3N_QUANT_TYPE_LIST(X)
#define Q3N_FLOAT_TYPE_LIST(X)                                                          \
    X(F32,  f32,  0, 1, 4)                                                              \
    X(F16,  f16,  1, 1, 2)                                                              \
    X(BF16, bf16, 2, 1, 2)
#define Q3N_QUANT_TYPE_LIST(X)                                                          \
    X(Q8,   q8,   3, 64, 68)                                                            \
    X(Q6,   q6,   4, 64, 52)                                                            \
    X(Q4,   q4,   5, 64, 36)                                                            \
    X(Q3,   q3,   6, 64, 28)

typedef enum q3n_type {
#define Q3N__X(ID, id, number, block_len, block_bytes) Q3N_TYPE_##ID = number,
    Q3N_TYPE_LIST(Q3N__X)
#undef Q3N__X
    Q3N_TYPE_COUNT
} q3n_type;

/* Instruction sets.  Each is compiled in and chosen at run time.  Numbers of different
 * architectures are 32 apart; within one a larger number has the kernels of the smaller ones, or
 * better. */
#define Q3N_ISA_LIST(X)                                                                 \
    X(SCALAR, scalar, 1)                                                                \
    X(AVX2,   avx2,   32)                                                               \
    X(AVX512, avx512, 40)                                                               \
    X(AVX512VNNI, avx512vnni, 44)                                                       \
    X(NEON,   neon,   64)

typedef enum q3n_isa {
    Q3N_ISA_AUTO = 0,    /* in options: the best that compiler, CPU and system allow */
#define Q3N__X(ID, id, number) Q3N_ISA_##ID = number,
    Q3N_ISA_LIST(Q3N__X)
#undef Q3N__X
    Q3N__ISA_MAX = 1 << 16
} q3n_isa;

Q3N_DEF const char *q3n_type_name(q3n_type t);        /* "bf16"; NULL = no such type */
Q3N_DEF q3n_result  q3n_type_from_name(const char *name, q3n_type *out);
/* Bytes of a matrix [rows, cols] in a type; 0 if there is no such type or size. */
Q3N_DEF int64_t q3n_type_bytes(q3n_type type, int64_t rows, int64_t cols);
Q3N_DEF const char *q3n_isa_name(q3n_isa isa);        /* "avx2"; NULL for AUTO, unknown ones */
Q3N_DEF q3n_result  q3n_isa_from_name(const char *name, q3n_isa *out);
Q3N_DEF int         q3n_isa_supported(q3n_isa isa);   /* 1 if compiled in and CPU and OS allow it */
Q3N_DEF q3n_isa     q3n_isa_best(void);

/* ---- What the host may supply ---- */

/* These structs are frozen: anything new becomes a field of the options that hold them. */

/* Memory.  Both functions or neither (then malloc and free).  malloc's alignment is enough.  free
 * is told the bytes that alloc was asked for.  Evaluation allocates one page for every 256 tokens.
 * Sessions on several threads may call both at once. */
typedef struct q3n_allocator {
    void *(*alloc)(void *user, size_t bytes);            /* NULL = out of memory */
    void  (*free)(void *user, void *memory, size_t bytes);
    void   *user;
} q3n_allocator;

typedef enum q3n_log_level { Q3N_LOG_INFO = 0, Q3N_LOG_WARNING = 1 } q3n_log_level;

/* Notes such as "rotary table of the file is all zeros".  NULL = silent.  The message is valid
 * during the call. */
typedef struct q3n_logger {
    void (*log)(void *user, q3n_log_level level, const char *message);
    void  *user;
} q3n_logger;

/* The host's own threads.  run must call task(arg, i) once for each i in [0, n), on any threads,
 * and return when all calls have returned.  n is at most n_threads. */
typedef struct q3n_executor {
    void (*run)(void *user, int n, void (*task)(void *arg, int i), void *arg);
    void  *user;
    int    n_threads;
} q3n_executor;

/* Long work calls this now and then: done of total units.  Return nonzero to stop: the function
 * then returns Q3N_ERR_CANCELLED. */
typedef struct q3n_progress {
    int (*report)(void *user, int64_t done, int64_t total);
    void *user;
} q3n_progress;

/* ---- Configuration ---- */

#define Q3N_MAX_LAYERS 256

typedef enum q3n_family {
    Q3N_FAMILY_DESIGN      = 0, /* GQA + RoPE, top-k experts; Keras checkpoints of that model    */
    Q3N_FAMILY_QWEN3_NEXT  = 1, /* gated DeltaNet hybrid, experts + shared expert                */
    Q3N_FAMILY_QWEN3_5     = 2, /* gated DeltaNet hybrid, dense                                  */
    Q3N_FAMILY_QWEN3_5_MOE = 3,
    Q3N_FAMILY_QWEN3_MOE   = 4,
    Q3N_FAMILY_QWEN3       = 5,
    Q3N_FAMILY_COUNT /* in the file: "design", "qwen3_next", "qwen3_5", "qwen3_5_moe", ... */
} q3n_family;

typedef enum q3n_rope_type {
    Q3N_ROPE_DEFAULT = 0, /* "default"                                                    */
    Q3N_ROPE_LINEAR  = 1, /* "linear": positions divided by rope_factor                   */
    Q3N_ROPE_YARN    = 2, /* "yarn"                                                       */
    Q3N_ROPE_TABLE   = 3, /* "table": cos and sin come from the file                      */
    Q3N_ROPE_TYPE_COUNT
} q3n_rope_type;

typedef enum q3n_pooling {
    Q3N_POOLING_LAST  = 0,
    Q3N_POOLING_FIRST = 1,
    Q3N_POOLING_MEAN  = 2,
    Q3N_POOLING_COUNT
} q3n_pooling; /* "last" "first" "mean" */
typedef enum q3n_classifier_input {
    Q3N_CLASSIFIER_HIDDEN = 0,
    Q3N_CLASSIFIER_LOGITS = 1,
    Q3N_CLASSIFIER_INPUT_COUNT
} q3n_classifier_input; /* "hidden" "logits" */

/* What the scores of a classification head are, with [HF]'s words in the file. */
typedef enum q3n_problem_type {
    Q3N_PROBLEM_NONE       = 0,                  /* not said: one label counts as multi_label_..,
                                                    more as single_label_..                      */
    Q3N_PROBLEM_REGRESSION = 1,                  /* values as they are                           */
    Q3N_PROBLEM_SINGLE_LABEL_CLASSIFICATION = 2, /* logits of labels that exclude one another    */
    Q3N_PROBLEM_MULTI_LABEL_CLASSIFICATION  = 3, /* logits of labels that may hold together      */
    Q3N_PROBLEM_TYPE_COUNT
} q3n_problem_type;

/* Fields by the names that files have for them: kind, name, min, max.
 * Kinds: I int, B 0 or 1, F double, E enum. */
#define Q3N_CONFIG_LIST(X)                                                              \
    X(E, family,                          0, Q3N_FAMILY_COUNT - 1)                      \
    X(I, vocab_size,                      1, 1 << 24)                                   \
    X(I, hidden_size,                     1, 1 << 20)                                   \
    X(I, num_hidden_layers,               1, Q3N_MAX_LAYERS)                            \
    X(I, max_position_embeddings,         1, 1 << 30)                                   \
    X(I, intermediate_size,               0, 1 << 24)                                   \
    X(I, num_attention_heads,             1, 4096)                                      \
    X(I, num_key_value_heads,             1, 4096)                                      \
    X(I, head_dim,                        1, 1024)                                      \
    X(I, rotary_dim,                      0, 1024)                                      \
    X(I, num_experts,                     0, 1 << 16)                                   \
    X(I, num_experts_per_tok,             0, 1024)                                      \
    X(I, moe_intermediate_size,           0, 1 << 24)                                   \
    X(I, shared_expert_intermediate_size, 0, 1 << 24)                                   \
    X(I, linear_num_key_heads,            0, 4096)                                      \
    X(I, linear_num_value_heads,          0, 4096)                                      \
    X(I, linear_key_head_dim,             0, 1024)                                      \
    X(I, linear_value_head_dim,           0, 1024)                                      \
    X(I, linear_conv_kernel_dim,          0, 16)                                        \
    X(I, num_mtp_layers,                  0, 1)                                         \
    X(I, num_labels,                      0, 1 << 20)                                   \
    X(B, norm_topk_prob,                  0, 1)                                         \
    X(B, attention_bias,                  0, 1)                                         \
    X(B, attn_output_gate,                0, 1)                                         \
    X(B, qk_norm,                         0, 1)                                         \
    X(B, mlp_bias,                        0, 1)                                         \
    X(B, router_bias,                     0, 1)                                         \
    X(B, causal,                          0, 1)                                         \
    X(B, tie_word_embeddings,             0, 1)                                         \
    X(E, pooling,                         0, Q3N_POOLING_COUNT - 1)                     \
    X(E, classifier_input,                0, Q3N_CLASSIFIER_INPUT_COUNT - 1)            \
    X(E, problem_type,                    0, Q3N_PROBLEM_TYPE_COUNT - 1)                \
    X(E, rope_type,                       0, Q3N_ROPE_TYPE_COUNT - 1)                   \
    X(I, rope_original_max_position,      0, 1 << 30)                                   \
    X(F, rms_norm_eps,                    0.0, 1.0)                                     \
    X(F, rope_theta,                      1.0, 1e12)                                    \
    X(F, rope_factor,                     1.0, 1e6)                                     \
    X(F, rope_beta_fast,                  0.0, 1e6)                                     \
    X(F, rope_beta_slow,                  0.0, 1e6)                                     \
    X(F, rope_attention_factor,           0.0, 1e6)

/* The geometry of a model.  Field names are those of [HF]'s config.json where it has them. */
typedef struct q3n_config {
    size_t size;                         /* sizeof, as Q3N_INIT sets it                         */
    int family;                          /* q3n_family                                          */
    int vocab_size;
    int hidden_size;                     /* d                                                   */
    int num_hidden_layers;
    int max_position_embeddings;         /* tokens the model was made for                       */
    int intermediate_size;               /* width of a dense FFN                                */
    int num_attention_heads;             /* H                                                   */
    int num_key_value_heads;             /* K; H is a multiple                                  */
    int head_dim;                        /* D                                                   */
    int rotary_dim;                      /* leading dims of a head that rotate; even            */
    int num_experts;                     /* 0 = no layer has experts                            */
    int num_experts_per_tok;             /* k of top-k                                          */
    int moe_intermediate_size;           /* width of one expert                                 */
    int shared_expert_intermediate_size; /* 0 = no shared expert                                */
    int linear_num_key_heads;            /* DeltaNet: Hk                                        */
    int linear_num_value_heads;          /* Hv; a multiple of Hk                                */
    int linear_key_head_dim;             /* dk                                                  */
    int linear_value_head_dim;           /* dv                                                  */
    int linear_conv_kernel_dim;          /* width of the causal convolution                     */
    int num_mtp_layers;                  /* 1 = the file has a multi-token-prediction module    */
    int num_labels;                      /* > 0 = sequence classification head                  */
    int norm_topk_prob;                  /* 1 = the k router weights are divided by their sum   */
    int attention_bias;                  /* biases on q, k, v, o                                */
    int attn_output_gate;                /* q_proj also gives a gate for the attention's output */
    int qk_norm;                         /* RMS norm of every query and key head                */
    int mlp_bias;                        /* biases in FFNs and experts                          */
    int router_bias;
    int causal;                          /* 0 = attends both ways (older design checkpoints)    */
    int tie_word_embeddings;
    int pooling;                         /* q3n_pooling: which token is classified              */
    int classifier_input;                /* q3n_classifier_input                                */
    int problem_type;                    /* q3n_problem_type: what the scores are               */
    int rope_type;                       /* q3n_rope_type                                       */
    int rope_original_max_position;      /* yarn: tokens before scaling                         */
    double rms_norm_eps;
    double rope_theta;
    double rope_factor;                  /* linear, yarn: how many times longer                 */
    double rope_beta_fast;               /* yarn; [HF] default 32                               */
    double rope_beta_slow;               /* yarn; [HF] default 1                                */
    double rope_attention_factor;        /* multiplies cos and sin; 0 = 0.1 ln(factor) + 1 (yarn) */
    unsigned char layer_types[Q3N_MAX_LAYERS];    /* 0 attention, 1 DeltaNet                    */
    unsigned char layer_experts[Q3N_MAX_LAYERS];  /* 0 dense FFN, 1 experts                     */
} q3n_config;

/* The name of field i of Q3N_CONFIG_LIST, NULL after the last; text receives its value. */
Q3N_DEF const char *q3n_config_field(const q3n_config *c, int i, char text[64]);

/* A field of Q3N_CONFIG_LIST by name, as a number, enums included.  Errors: Q3N_ERR_ARG (no such
 * field). */
Q3N_DEF q3n_result  q3n_config_value(const q3n_config *c, const char *field, double *out);

/* Q3N_OK if a model of this geometry can be built; else which fields contradict each other. */
Q3N_DEF q3n_result  q3n_config_check(const q3n_config *c, q3n_error *err);

/* ---- Model: an open file ---- */

/* Immutable once open: any number of threads and sessions may use it.  Close it after the last
 * session. */
typedef struct q3n_model q3n_model;

typedef struct q3n_model_options {       /* begin with Q3N_INIT; zero = default                  */
    size_t        size;
    q3n_allocator allocator;
    q3n_logger    logger;
    int           skip_checksum;         /* 1 = do not check meta_crc (fuzzing)                  */
    int           zero;                  /* 0                                                    */
} q3n_model_options;

/* Map a model file and check it: header, sections, every tensor's type, shape and place.
 * Tensor data are not read: see q3n_model_verify.
 *
 *   out    out: the model, NULL on error
 *   o      NULL = defaults
 *   err    NULL = not wanted
 *
 * Errors: Q3N_ERR_NO_FILE, _IO, _FORMAT, _CHECKSUM, _UNSUPPORTED, _MEMORY.
 */
Q3N_DEF q3n_result q3n_model_open(q3n_model **out, const char *path, const q3n_model_options *o,
                                  q3n_error *err);

/* The same from bytes [bytes] that the caller keeps, unchanged, until the model is closed.
 * data must be aligned to 64 bytes, else Q3N_ERR_ARG. */
Q3N_DEF q3n_result q3n_model_open_memory(q3n_model **out, const void *data, size_t bytes,
                                         const q3n_model_options *o, q3n_error *err);
Q3N_DEF void       q3n_model_close(q3n_model *m);     /* NULL is allowed */

Q3N_DEF const q3n_config *q3n_model_config(const q3n_model *m);      /* lives as long as m      */
Q3N_DEF int               q3n_model_vocab_size(const q3n_model *m);
Q3N_DEF int               q3n_model_hidden_size(const q3n_model *m);
Q3N_DEF int               q3n_model_n_layers(const q3n_model *m);
Q3N_DEF int               q3n_model_n_labels(const q3n_model *m);    /* 0 = it is no classifier */
Q3N_DEF int               q3n_model_context_length(const q3n_model *m);  /* tokens it is made for */
Q3N_DEF int               q3n_model_layer_is_delta(const q3n_model *m, int l);
Q3N_DEF int               q3n_model_layer_has_experts(const q3n_model *m, int l);
Q3N_DEF const char       *q3n_model_name(const q3n_model *m);        /* "" if the file has none */
Q3N_DEF const char       *q3n_model_chat_kind(const q3n_model *m);   /* "none" if it has none   */

/* Ids that end a text; *n of them.  The array lives as long as the model. */
Q3N_DEF const int32_t    *q3n_model_eos_ids(const q3n_model *m, int *n);
Q3N_DEF int               q3n_model_is_eos(const q3n_model *m, int32_t id);

/* The name of label i of a classifier, NULL if the file has none or there is no label i.  It lives
 * as long as the model. */
Q3N_DEF const char       *q3n_model_label(const q3n_model *m, int i);

/* What scores [num_labels] of q3n_session_classify mean: their softmax, the sigmoid of each, or
 * themselves, as q3n_config.problem_type says ([HF]'s text-classification pipeline).
 *   out  [num_labels]  may be scores
 * Errors: Q3N_ERR_ARG (NULL), Q3N_ERR_UNSUPPORTED (no classification head). */
Q3N_DEF q3n_result        q3n_model_probabilities(const q3n_model *m, const float *scores,
                                                  float *out);

typedef struct q3n_tensor {              /* may grow at its end                                  */
    const char *name;                    /* ends with 0; lives as long as the model              */
    q3n_type    type;
    int         n_dims;
    int64_t     dim[3];                  /* slowest first; unused ones 1                         */
    int64_t     offset;                  /* byte in the file                                     */
    int64_t     bytes;                   /* of all slices, without what lies between them        */
    const void *data;                    /* first slice                                          */
    size_t      stride;                  /* bytes from slice to slice, 0 if n_dims < 3           */
} q3n_tensor;

/* Tensors in the order of the file, and by name; NULL = there is none.  They live as long as the
 * model. */
Q3N_DEF int               q3n_model_n_tensors(const q3n_model *m);
Q3N_DEF const q3n_tensor *q3n_model_tensor(const q3n_model *m, int i);
Q3N_DEF const q3n_tensor *q3n_model_find_tensor(const q3n_model *m, const char *name);

/* Read every tensor and compare its checksum.  progress (NULL = none) counts bytes. */
Q3N_DEF q3n_result q3n_model_verify(const q3n_model *m, const q3n_progress *progress,
                                    q3n_error *err);

typedef struct q3n_type_stats {          /* frozen                                               */
    int64_t n_tensors, n_weights, bytes;
} q3n_type_stats;

typedef struct q3n_model_stats {         /* begin with Q3N_INIT                                  */
    size_t  size;
    int64_t file_bytes;
    int64_t n_weights;                   /* all tensors but the MTP module                       */
    int64_t n_weights_active;            /* that one token uses                                  */
    int64_t decode_bytes;                /* weight bytes that one decoded token reads            */
    int64_t mtp_weights;
    q3n_type_stats types[32];            /* all tensors, by q3n_type                             */
} q3n_model_stats;

/* Errors: Q3N_ERR_ARG (NULL, or the size of *out is 0). */
Q3N_DEF q3n_result q3n_model_stats_get(const q3n_model *m, q3n_model_stats *out);

/* ---- Engine: what evaluates ---- */

typedef struct q3n_engine q3n_engine;

/* Called after each layer during evaluation, on the thread that called eval: x [n, d] is the
 * residual stream after layer l (l = -1: the embeddings; l = layers: after the final norm). */
typedef struct q3n_layer_hook {
    void (*layer)(void *user, int l, const float *x, int n, int d);
    void  *user;
} q3n_layer_hook;

typedef struct q3n_engine_options {      /* begin with Q3N_INIT; zero = default                  */
    size_t         size;
    int            n_threads;            /* 0 = one per CPU of the process, within its quota     */
    int            batch_size;           /* most tokens of one pass, at most 65536; 0 = 512.  A
                                            session's own engine takes its capacity if that is less,
                                            or 0 and the model attends both ways                 */
    q3n_isa        isa;                  /* AUTO (0) = the best there is, else exactly this one:
                                            Q3N_ERR_UNSUPPORTED if q3n_isa_supported says no     */
    int            zero;                 /* 0                                                    */
    q3n_executor   executor;             /* run = NULL: the engine makes its own threads         */
    q3n_layer_hook layer_hook;
} q3n_engine_options;

/* Threads, kernels and the scratch of one pass, for any number of sessions (option engine).  One
 * thread at a time, with all its sessions, but for q3n_engine_cancel; it outlives them.
 * q3n_engine_bytes is what it takes when it is made.  With several threads it later takes room for
 * partial results of attention too, not counted there, as it depends on the sessions: up to
 * 4 (head_dim + 2) num_attention_heads floats for every 256 tokens of the longest text, rounded up
 * to a power of two (Qwen3-Next-80B at 262,144 tokens: 68 MB).  o NULL = defaults. */
Q3N_DEF size_t     q3n_engine_bytes(const q3n_model *m, const q3n_engine_options *o);
Q3N_DEF q3n_result q3n_engine_create(q3n_engine **out, const q3n_model *m,
                                     const q3n_engine_options *o, q3n_error *err);
Q3N_DEF void       q3n_engine_destroy(q3n_engine *e);  /* NULL is allowed; after its sessions */
Q3N_DEF int        q3n_engine_n_threads(const q3n_engine *e);
Q3N_DEF int        q3n_engine_batch_size(const q3n_engine *e);
Q3N_DEF q3n_isa    q3n_engine_isa(const q3n_engine *e);

/* ---- Session: the state of one text ---- */

/* Tokens, keys and values of the attention layers in pages of 256 tokens, DeltaNet matrices,
 * convolution columns, and the last token's hidden state and logits.  One thread at a time, but for
 * q3n_session_cancel; sessions of one model may run concurrently, also those that share pages. */
typedef struct q3n_session  q3n_session;
typedef struct q3n_snapshot q3n_snapshot;
typedef struct q3n_cache    q3n_cache;

/* Where q3n_session_decode takes its drafts from. */
typedef enum q3n_speculate {
    Q3N_SPECULATE_OFF    = 0,   /* the default: AUTO chooses by time, and so what is sampled     */
    Q3N_SPECULATE_AUTO   = 1,   /* whichever of the two below pays                               */
    Q3N_SPECULATE_MTP    = 2,   /* the model's multi-token-prediction module                     */
    Q3N_SPECULATE_LOOKUP = 3,   /* what followed the last tokens where they stood before         */
    Q3N_SPECULATE_COUNT
} q3n_speculate;

typedef struct q3n_session_options {     /* begin with Q3N_INIT; zero = default                  */
    size_t         size;
    int            capacity;             /* most tokens; 0 = max_position_embeddings.  Memory is
                                            taken as they come, 256 at a time                    */
    q3n_type       kv_type;              /* KV cache: f32 (0, default), f16, bf16, or q8: bytes
                                            and one scale for each head's key and value          */
    q3n_engine    *engine;               /* evaluates, for other sessions too: they belong to one
                                            thread together, and it outlives them.  NULL = the
                                            session makes an engine of its own                   */
    const q3n_engine_options *engine_options;   /* of its own engine, NULL = defaults; read when
                                            the session is made.  An error beside `engine`       */
    q3n_cache     *cache;                /* snapshots go here and come from here; it outlives the
                                            session                                              */
    size_t         snapshot_bytes;       /* without a cache: > 0 = a cache of the session's own
                                            that holds at most so many bytes                     */
    int            snapshot_every;       /* tokens between snapshots put into the cache; 0 = at
                                            marked points only: ends of q3n_session_prefill,
                                            q3n_session_checkpoint                               */
    q3n_type       snapshot_type;        /* DeltaNet matrices in snapshots and the cache: f32 (0),
                                            which is exact, or bf16, half the bytes and nearly so;
                                            forks and files are exact                            */
    q3n_speculate  speculate;            /* MTP is an error without a module in the model        */
    int            draft;                /* drafts per step: 0 = chosen while running by what they
                                            cost and how many are accepted; else always so many,
                                            1 .. Q3N_MAX_DRAFT                                   */
    int            count_experts;        /* 1 = keep counts for q3n_session_expert_counts; then
                                            q3n_session_decode drafts nothing                    */
    int            zero;                 /* 0                                                    */
} q3n_session_options;

#define Q3N_MAX_DRAFT 8

/* Where a session's memory goes, in bytes. */
typedef struct q3n_session_memory {      /* begin with Q3N_INIT                                  */
    size_t size;
    size_t kv_cache;                     /* pages of `capacity` tokens: keys, values, ids        */
    size_t delta_state;                  /* DeltaNet matrices, before and after a call           */
    size_t conv_state;                   /* last columns before each convolution, the same       */
    size_t scratch;                      /* activations of one batch, logits                     */
    size_t other;                        /* bookkeeping                                          */
    size_t total;                        /* all of these: the most that it holds between calls   */
    size_t initial;                      /* what q3n_session_create takes of it                  */
    size_t page;                         /* one page of 256 tokens                               */
    size_t snapshot;                     /* one snapshot, without the pages that it shares and
                                            without a sampler's state                            */
} q3n_session_memory;

/* Bytes that a session of these options asks of the allocator when `capacity` tokens are in it;
 * 0 if the options are impossible.  memory (NULL = not wanted) explains it.  A call that gives the
 * session another text holds the pages of both until it ends.  Snapshots come on top: each takes
 * memory->snapshot, and pages that no session holds any more.  The threads' stacks are not
 * counted.  o NULL = defaults, here and in q3n_session_create. */
Q3N_DEF size_t     q3n_session_bytes(const q3n_model *m, const q3n_session_options *o,
                                     q3n_session_memory *memory);
Q3N_DEF q3n_result q3n_session_create(q3n_session **out, const q3n_model *m,
                                      const q3n_session_options *o, q3n_error *err);
Q3N_DEF void       q3n_session_destroy(q3n_session *s);   /* NULL is allowed */

/* Append n tokens to the session and evaluate them.
 *
 *   tokens  [n]       0 <= id < vocab_size
 *   n                 1 .. capacity - length
 *   logits  [vocab]   out: unnormalised log-probability of the next token; NULL = not wanted
 *
 * Errors: Q3N_ERR_ARG (id or n out of range), Q3N_ERR_FULL, Q3N_ERR_UNSUPPORTED (a model that
 * attends both ways takes a text whole: length 0, n <= batch_size), Q3N_ERR_MEMORY (for the next
 * page of 256 tokens; taken before anything is evaluated), Q3N_ERR_CANCELLED.  On error the session
 * is as before and q3n_session_error tells more.
 */
Q3N_DEF q3n_result q3n_session_eval(q3n_session *s, const int32_t *tokens, int n, float *logits);

/* What an evaluation gives back; NULL = not wanted. */
typedef struct q3n_outputs {   /* begin with Q3N_INIT                                            */
    size_t size;
    float *logits;             /* [vocab]: last token                                            */
    float *all_logits;         /* [n, vocab]                                                     */
    float *hidden;             /* [d]: last token, after the final norm                          */
    float *all_hidden;         /* [n, d]                                                         */
} q3n_outputs;

Q3N_DEF q3n_result q3n_session_eval_outputs(q3n_session *s, const int32_t *tokens, int n,
                                            const q3n_outputs *out);

/* Scores of a classification model for a text, tokenized with Q3N_TOKENIZE_WHOLE, which becomes the
 * session's.  With pooling "last" the last token that is not the file's pad_id is read, the first
 * if all are, as [HF] does.
 *   scores  [num_labels]  out: unnormalised; q3n_model_probabilities tells what they mean
 * Errors: as q3n_session_eval, Q3N_ERR_UNSUPPORTED (no classification head). */
Q3N_DEF q3n_result q3n_session_classify(q3n_session *s, const int32_t *tokens, int n,
                                        float *scores);

/* The logits [vocab] after the session's last token once more: a copy if they were asked of eval,
 * else the head alone is evaluated.  Q3N_ERR_ARG at length 0. */
Q3N_DEF q3n_result       q3n_session_logits(q3n_session *s, float *logits);

/* Tokens [first, first + n) of the session's text. */
Q3N_DEF q3n_result       q3n_session_tokens(const q3n_session *s, int first, int n,
                                            int32_t *tokens);

/* Stop the evaluation under way, and nothing later: the call of q3n_session_eval, _eval_outputs,
 * _classify, _prefill, _reuse, _rewind, _decode, _draft or q3n_engine_eval that the session takes
 * part in ends within the time of one layer, or of one step's drafts, with Q3N_ERR_CANCELLED
 * (unless something else fails first), and the session is as before it.  A batch stops as a whole,
 * after the pass under way if that has no tokens of the session.
 *
 * Returns 1 if this request stops such a call, else 0: one that comes too early, too late or once
 * more does nothing.  Who must not miss a request between two calls keeps a flag of its own and
 * looks at it from a layer hook, which may cancel.
 * From any thread and from signal handlers, while the session lives: one lock-free atomic. */
Q3N_DEF int              q3n_session_cancel(q3n_session *s);

Q3N_DEF const q3n_model *q3n_session_model(const q3n_session *s);
/* The engine that was given, or the session's own: that is gone with the session, has room for as
 * much as it needs, and is not to be destroyed. */
Q3N_DEF q3n_engine      *q3n_session_engine(const q3n_session *s);
Q3N_DEF int              q3n_session_length(const q3n_session *s);    /* tokens evaluated so far */
Q3N_DEF int              q3n_session_capacity(const q3n_session *s);
Q3N_DEF void             q3n_session_reset(q3n_session *s);           /* back to length 0 */
Q3N_DEF const q3n_error *q3n_session_error(const q3n_session *s);     /* of the last failure */

/* How often layer l's router chose each expert since the session was made or reset: [num_experts],
 * or NULL if the layer has no experts or count_experts was not set. */
Q3N_DEF const int64_t   *q3n_session_expert_counts(const q3n_session *s, int l);

/* ---- Session: going back, copies ---- */

/* Keep the state as it is now: pages are shared, DeltaNet's matrices copied.  With a sampler its
 * state too, random numbers and remembered tokens, but not its options: then what goes on from here
 * is the text that would have gone on.  (Not where drafts of the module are sampled, as many as
 * pay: how many that is depends on time, and they use up random numbers.  Option draft fixes it.)
 * A snapshot does not change; free it before the model is closed.  Any thread may free it or
 * restore from it.
 * Errors: Q3N_ERR_MEMORY, Q3N_ERR_UNSUPPORTED (a model that attends both ways). */
Q3N_DEF q3n_result q3n_session_snapshot(q3n_session *s, q3n_snapshot **out);
Q3N_DEF int        q3n_snapshot_length(const q3n_snapshot *snap);
Q3N_DEF size_t     q3n_snapshot_bytes(const q3n_snapshot *snap);   /* without shared pages */
Q3N_DEF void       q3n_snapshot_free(q3n_snapshot *snap);          /* NULL is allowed */

/* Make the session what snap was, which may come from another session of the same model, with the
 * same kv_type.  Nothing is evaluated.  Where that session had no MTP module in use (speculate AUTO
 * or MTP) and this one has, the module begins with the text that follows.  A session with a sampler
 * takes on the state of one, the last tokens if its penalty_window is smaller; what one of the two
 * does not have is left alone.  Give it the same options to go on as that session would. */
Q3N_DEF q3n_result q3n_session_restore(q3n_session *s, const q3n_snapshot *snap);

/* A new session with the same text; o NULL = the options of s.  Pages are shared until one of the
 * two writes into them.  It gets a sampler of its own with options and state of that of s, if s has
 * one: both choose the same, until q3n_sampler_seed.  Its hook is called with the same user.
 * Without option engine it has an engine of its own, with snapshot_bytes a cache of its own, which
 * is empty. */
Q3N_DEF q3n_result q3n_session_fork(q3n_session **out, q3n_session *s,
                                    const q3n_session_options *o, q3n_error *err);

/* Go back to the first `length` tokens, 0 .. the session's length.  Exact: models without DeltaNet
 * evaluate one token again; others take the nearest snapshot of the cache that lies before and
 * evaluate what is between.  Errors: as q3n_session_eval. */
Q3N_DEF q3n_result q3n_session_rewind(q3n_session *s, int length);

/* Make the session's text tokens [n], a prompt as a whole, from wherever that costs least: what it
 * has already, a snapshot of the cache, or nothing; evaluate the rest, and mark the end
 * (q3n_session_checkpoint).  A model that attends both ways reuses nothing.
 *
 *   logits    [vocab]  out, NULL = not wanted
 *   n_reused  out: tokens that are not evaluated, NULL = not wanted; set before the first layer, so
 *             that a layer_hook can tell how much is done
 *
 * Errors: as q3n_session_eval. */
Q3N_DEF q3n_result q3n_session_prefill(q3n_session *s, const int32_t *tokens, int n, float *logits,
                                    int *n_reused);

/* The first step of q3n_session_prefill alone: afterwards the session's text is the *n_reused first
 * of tokens [n].  For callers that evaluate the rest in bounded steps (q3n_engine_eval). */
Q3N_DEF q3n_result q3n_session_reuse(q3n_session *s, const int32_t *tokens, int n, int *n_reused);

/* Put a snapshot of the state into the cache; marked ones outlive those of snapshot_every.  Does
 * nothing without a cache.  The cache finds states by their text: it keeps no sampler's. */
Q3N_DEF q3n_result q3n_session_checkpoint(q3n_session *s);

/* ---- Session files ---- */

/* The host's own files: both return 0 when all bytes are written or read, else nonzero. */
typedef struct q3n_sink {
    int (*write)(void *user, const void *data, size_t bytes);
    void *user;
} q3n_sink;
typedef struct q3n_source {
    int (*read)(void *user, void *data, size_t bytes);
    void *user;
} q3n_source;

/* Write the state: tokens, keys, values, matrices, hidden state and logits, and the sampler's as
 * q3n_session_snapshot does.  What is under path stays as it is if that fails.  Errors: Q3N_ERR_ARG
 * (path is the model's own file), _IO, _MEMORY, _UNSUPPORTED. */
Q3N_DEF q3n_result q3n_session_save(q3n_session *s, const char *path);
Q3N_DEF q3n_result q3n_session_save_to(q3n_session *s, const q3n_sink *sink);

/* Continue a saved session; nothing is evaluated.  The file is bound to the bytes of the model's
 * metadata, which hold the checksums of its tensors, and to the session's kv_type; an MTP module
 * may be in use in one and not in the other, and so may a sampler (as q3n_session_restore).  A
 * token that was chosen and not evaluated is the caller's to keep.  Files are taken for hostile:
 * on error (Q3N_ERR_IO, _NO_FILE, _FORMAT, _CHECKSUM, _UNSUPPORTED: another model or kv_type,
 * _FULL: more tokens than the session's capacity, _MEMORY) the session is untouched. */
Q3N_DEF q3n_result q3n_session_load(q3n_session *s, const char *path);
Q3N_DEF q3n_result q3n_session_load_from(q3n_session *s, const q3n_source *source);

/* Whether a file can be written at path, to be asked before a long evaluation: begins one beside
 * it and removes that again.  Errors: Q3N_ERR_ARG, _IO, _UNSUPPORTED (Q3N_NO_STDIO). */
Q3N_DEF q3n_result q3n_file_check(const char *path, q3n_error *err);

/* ---- Prefix cache: states by the tokens that led to them ---- */

/* Shared by any number of sessions of one model, on any threads. */
typedef struct q3n_cache_options {       /* begin with Q3N_INIT; zero = default                  */
    size_t      size;
    size_t      max_bytes;               /* snapshots and the pages they hold, each page once; the
                                            least recently used go first, unmarked before marked;
                                            0 = 1 GiB                                            */
    const char *directory;               /* NULL = none.  What leaves the memory goes there, also
                                            when the cache is destroyed, and is found again; the
                                            directory must exist                                 */
    int64_t     max_directory_bytes;     /* 0 = no bound; the oldest files go first.  Of a directory
                                            with more than 65,536 the others are not counted     */
    q3n_logger  logger;                  /* a directory that fails is a warning, never an error  */
} q3n_cache_options;

typedef struct q3n_cache_stats {         /* begin with Q3N_INIT                                  */
    size_t  size;
    size_t  bytes;                       /* in memory now                                        */
    int     n_entries;
    int     n_files;                     /* in the directory                                     */
    int64_t file_bytes;
    int64_t n_hits;                      /* calls of q3n_session_prefill, _reuse and _rewind that
                                            began at a snapshot of the cache                     */
    int64_t n_misses;                    /* ... that began at the empty text                     */
    int64_t n_evicted;                   /* snapshots that left the memory to make room          */
    int64_t n_own;                       /* ... that went on from the session's own text, as a
                                            chat does that only grows.  Calls that go back to 0,
                                            or to where the session is, are not counted          */
} q3n_cache_stats;

/* Sessions find in it what sessions of the same kv_type, snapshot_type and instruction set put
 * there, in this process or, by the directory, in others: with another instruction set the numbers
 * of a state would differ in their last bits, and so would a text, by who came first.
 * Errors: Q3N_ERR_ARG, _MEMORY, _THREAD. */
Q3N_DEF q3n_result q3n_cache_create(q3n_cache **out, const q3n_model *m,
                                    const q3n_cache_options *o, q3n_error *err);
Q3N_DEF void       q3n_cache_destroy(q3n_cache *c);    /* NULL is allowed; after its sessions */
Q3N_DEF void       q3n_cache_clear(q3n_cache *c);      /* empties the memory, into the directory */
/* Errors: Q3N_ERR_ARG (NULL, or the size of *out is 0). */
Q3N_DEF q3n_result q3n_cache_stats_get(q3n_cache *c, q3n_cache_stats *out);

/* ---- Several sessions at once ---- */

typedef struct q3n_engine_item {         /* begin with Q3N_INIT; all of an array of one size     */
    size_t         size;
    q3n_session   *session;              /* of the engine, each at most once in a call           */
    const int32_t *tokens;               /* [n] to append                                        */
    int            n;
    int            done;                 /* in and out: how many of them are evaluated; begin
                                            with 0                                               */
    float         *logits;               /* [vocab] out, when done becomes n; NULL = not wanted  */
} q3n_engine_item;

typedef struct q3n_limit {               /* begin with Q3N_INIT; zero = until all is done        */
    size_t  size;
    int     max_tokens;                  /* evaluated in one call                                */
    int     zero;                        /* 0                                                    */
    int64_t max_microseconds;            /* a pass that is expected to end later does not begin;
                                            one token is always evaluated                        */
} q3n_limit;

/* Evaluate items until all are done or the limit (NULL = none) is reached: call again with the same
 * array to go on.  Each pass takes one token of every unfinished item and fills up with more, in
 * the order of the items.  Every session gets the bits that it would get alone.
 * Errors: as q3n_session_eval, and Q3N_ERR_ARG (session twice, or not of this engine); then every
 * session, and done of every item, is as before the call. */
Q3N_DEF q3n_result       q3n_engine_eval(q3n_engine *e, q3n_engine_item *items, int n_items,
                                         const q3n_limit *limit);
/* As q3n_session_cancel: q3n_engine_eval, or the call of a session of the engine. */
Q3N_DEF int              q3n_engine_cancel(q3n_engine *e);
Q3N_DEF const q3n_error *q3n_engine_error(const q3n_engine *e);

/* ---- Tokenizer: part of the model, no state ---- */

Q3N_DEF int q3n_model_n_tokens(const q3n_model *m);   /* ids with a text; 0 = no tokenizer */

/* Text to ids.
 *
 *   text     [bytes]   UTF-8; invalid bytes are encoded as the bytes they are
 *   flags              0: only the ids of the text, for a part of a prompt; or a sum of
 *                      NO_SPECIAL (special tokens in the text are plain text), PREFIX and SUFFIX
 *                      (ids that the tokenizer's post-processor puts before and after a text).
 *                      A prompt to be continued gets PREFIX, a text to be classified or embedded
 *                      WHOLE, which gives what [HF]'s tokenizer(text) does
 *   ids      [max]     out; NULL with max 0 to count
 *   n        out: number of ids of the whole text, also when it is > max
 *
 * Errors: Q3N_ERR_FULL (n > max; the first max ids are there), Q3N_ERR_UNSUPPORTED (no tokenizer),
 * Q3N_ERR_MEMORY.  Uses the model's allocator for O(longest word) bytes, of the whole text where
 * the file has added tokens that are searched after normalisation.  Thread-safe.
 */
#define Q3N_TOKENIZE_NO_SPECIAL 1
#define Q3N_TOKENIZE_PREFIX     2
#define Q3N_TOKENIZE_SUFFIX     4
#define Q3N_TOKENIZE_WHOLE      (Q3N_TOKENIZE_PREFIX | Q3N_TOKENIZE_SUFFIX)
Q3N_DEF q3n_result q3n_tokenize(const q3n_model *m, const char *text, size_t bytes, int flags,
                                int32_t *ids, size_t max, size_t *n);

/* The bytes of one token, *bytes of them: not always whole characters.  NULL if id has none. */
Q3N_DEF const char *q3n_token_text(const q3n_model *m, int32_t id, size_t *bytes);
Q3N_DEF int         q3n_token_is_special(const q3n_model *m, int32_t id);

/* Ids to text as it comes: whole UTF-8 characters only.  Start from a zeroed struct. */
typedef struct q3n_detokenizer {
    unsigned char pending[4];
    int           n_pending;
    int           skip_special;   /* 1 = special tokens give no text */
} q3n_detokenizer;

/* Append the text of one token to out [max], without terminator; *n bytes are written.  Bytes that
 * can never become a character give U+FFFD, as in other decoders.  *n is at most
 * 3 (token bytes + 3).
 * Errors: Q3N_ERR_ARG (no such id), Q3N_ERR_FULL (nothing was taken in; *n is what is needed),
 * Q3N_ERR_UNSUPPORTED (no tokenizer). */
Q3N_DEF q3n_result q3n_detokenizer_next(q3n_detokenizer *dec, const q3n_model *m, int32_t id,
                                        char *out, size_t max, size_t *n);
/* What is left at the end: an unfinished character gives U+FFFD.  out has room for 3 bytes. */
Q3N_DEF void       q3n_detokenizer_finish(q3n_detokenizer *dec, char *out, size_t *n);

/* Ids to text at once.  *n is the length of the whole text; Q3N_ERR_FULL if it is > max.  Other
 * errors: as q3n_detokenizer_next. */
Q3N_DEF q3n_result q3n_detokenize(const q3n_model *m, const int32_t *ids, size_t n_ids,
                                  char *out, size_t max, size_t *n);

/* ---- Sampler ---- */

/* Chooses tokens: a session has one of its own (q3n_session_set_sampler); hosts with logits from
 * elsewhere make theirs. */
typedef struct q3n_sampler q3n_sampler;

/* Masks and steers: changes logits [n_vocab] in place before a token is chosen from them, wherever
 * one is: by q3n_sampler_sample, and by q3n_session_decode for every token and every draft of the
 * module.  It works on a copy; the logits that sessions give and keep are the model's.
 *
 *   tokens  [n_tokens]  those that follow the session's text before the one to be chosen, drafts
 *                       among them; none in q3n_sampler_sample, which chooses what follows the text
 *
 * What it does must depend on logits, text and tokens alone: then drafts change nothing, and how
 * often it is called is no matter.  -inf masks a token; a position of which nothing is left is
 * Q3N_ERR_NUMERIC.  It runs on the thread that called, and may call q3n_session_tokens and
 * q3n_session_cancel, which stops q3n_session_decode, and nothing else of the session. */
typedef struct q3n_logits_hook {
    void (*edit)(void *user, float *logits, int n_vocab, const int32_t *tokens, int n_tokens);
    void  *user;
} q3n_logits_hook;

typedef struct q3n_sampler_options {     /* begin with Q3N_INIT; zero = default                  */
    size_t   size;
    float    temperature;          /* 0 = greedy: the largest logit, the lowest id among equals  */
    int      top_k;                /* 0 = off; keep the k largest, the lowest ids among equals   */
    float    top_p;                /* (0, 1]: keep the fewest tokens with so much probability
                                      together, at least one; 1 = off, and 0, as it is not set   */
    float    min_p;                /* 0 .. 1: keep p >= min_p x the largest p; 0 = off           */
    float    repetition_penalty;   /* 0 or 1 = off; [HF]'s: logit / r if > 0, else logit x r     */
    int      penalty_window;       /* last tokens that count; 0 = 64                             */
    uint64_t seed;
    q3n_logits_hook logits_hook;   /* edit NULL = none; else vocab_size floats more of memory    */
} q3n_sampler_options;

/* One per text and thread.  Order: hook, repetition penalty, temperature, top-k, top-p, min-p.
 * What is chosen from the same logits is the same on every machine.  Tokens below e^-86 of the
 * largest probability do not come.
 * Errors: Q3N_ERR_ARG (an option out of its range, or NaN), Q3N_ERR_MEMORY. */
Q3N_DEF q3n_result q3n_sampler_create(q3n_sampler **out, const q3n_model *m,
                                      const q3n_sampler_options *o, q3n_error *err);
Q3N_DEF void       q3n_sampler_destroy(q3n_sampler *s);
/* Choose a token from logits [vocab] (left as they are) and remember it for the penalty.  NaN and
 * -inf are never chosen, +inf is the largest float.  Errors: Q3N_ERR_NUMERIC (no logit is a number
 * above -inf); then token and sampler are as before, and q3n_sampler_error tells more. */
Q3N_DEF q3n_result q3n_sampler_sample(q3n_sampler *s, const float *logits, int32_t *token);
Q3N_DEF const q3n_error *q3n_sampler_error(const q3n_sampler *s);    /* of the last failure */
/* Remember a token that was not sampled, such as the prompt's. */
Q3N_DEF void       q3n_sampler_accept(q3n_sampler *s, int32_t id);
Q3N_DEF void       q3n_sampler_reset(q3n_sampler *s);    /* forget tokens, seed again */
/* Other random numbers from here on; the tokens remembered stay.  q3n_sampler_reset goes back to
 * this seed. */
Q3N_DEF void       q3n_sampler_seed(q3n_sampler *s, uint64_t seed);

/* ---- Generating ---- */

/* Give the session a sampler of its own, in the place of the one it had; o NULL = none, as sessions
 * begin.  Its memory comes on top of q3n_session_bytes.  q3n_session_reset resets it; snapshots,
 * forks and files carry its state; whatever else changes the text leaves it as it is.
 * Errors: as q3n_sampler_create; then the session has the sampler that it had. */
Q3N_DEF q3n_result   q3n_session_set_sampler(q3n_session *s, const q3n_sampler_options *o);
/* It is the session's: not to be destroyed, and gone with the session or when another is set. */
Q3N_DEF q3n_sampler *q3n_session_sampler(const q3n_session *s);      /* NULL = none */

/* Evaluate `token`, which followed the session's text, and let the session's sampler choose what
 * comes next.  With drafts (option speculate) several tokens are checked in one pass; how many is
 * chosen while running, down to none where drafts do not pay.
 *
 *   token    the last token chosen, not evaluated yet: from q3n_sampler_sample, or the last of
 *            `tokens` of the call before
 *   tokens   [max]  out: the tokens chosen, *n >= 1 of them; all but the last are evaluated
 *   max      1 or more; the session needs room for one token, and drafts no more than fit
 *
 * A call that fails leaves session, sampler and what both know of drafts as they were.
 * Nothing is drafted beyond a token that ends the text (q3n_model_is_eos).  Greedy output is what
 * it is without drafts; sampled output has the same distribution ([SPEC]), and with looked-up
 * drafts the same tokens for a seed; the module's drafts use up random numbers of their own.
 * Errors: as q3n_session_eval, Q3N_ERR_ARG (the session has no sampler), and Q3N_ERR_NUMERIC (no
 * logit is a number above -inf, or the hook has left none); then session and sampler are as before.
 */
Q3N_DEF q3n_result q3n_session_decode(q3n_session *s, int32_t token, int32_t *tokens, int max,
                                      int *n);

/* What the MTP module would draft after `token`: drafts [n], n in 1 .. Q3N_MAX_DRAFT, each the
 * most probable one; logits [vocab] of the first (NULL = not wanted).  The session stays as it is,
 * and its sampler and hook are not asked.
 * Errors: Q3N_ERR_UNSUPPORTED (no module, or speculate is not AUTO or MTP), Q3N_ERR_FULL.
 * After steps of q3n_session_decode the module may know the end of the text alone: one whose drafts
 * did not pay was left after. */
Q3N_DEF q3n_result q3n_session_draft(q3n_session *s, int32_t token, int32_t *drafts, int n,
                                     float *logits);

typedef struct q3n_speculation {         /* begin with Q3N_INIT                                  */
    size_t  size;
    int64_t n_steps;                     /* calls of q3n_session_decode                          */
    int64_t n_tokens;                    /* that they returned                                   */
    int64_t n_drafted, n_accepted;
    int     draft;                       /* drafts of the last step                              */
    int     zero;
} q3n_speculation;

/* Errors: Q3N_ERR_ARG (NULL, or the size of *out is 0). */
Q3N_DEF q3n_result q3n_session_speculation(const q3n_session *s, q3n_speculation *out);

#ifdef __cplusplus
}
#endif
#endif /* QWEN3NEXT_H */

/* =====================================================================================
 * Below is the implementation: it is compiled where Q3N_IMPLEMENTATION is defined.
 * ===================================================================================== */
#ifdef Q3N__IMPLEMENTS
#undef Q3N__IMPLEMENTS
#define Q3N__IMPLEMENTED

/* =====================================================================================
 * [2] PLATFORM                                                             >>platform
 *
 * Everything that differs between compilers and systems: macros with their defaults, target
 * regions, atomics, threads, mapped and written files.  The only #ifdefs for a system or compiler
 * stand here and around the kernel sections.
 *
 *                       threads             condition          files              CPUs
 *     Linux             pthread             futex              POSIX              set, cgroup quota
 *     macOS, BSD        pthread             pthread            POSIX              those on line
 *     Windows           CreateThread        SRW lock's         Win32, UTF-16      process mask
 *     Q3N_NO_THREADS    none; a spin lock   none               as the system      1
 *     Q3N_NO_STDIO                                             none
 *
 * A new system is one more row: the same functions by the same names; nothing below this section
 * changes.  Later code may assume that they exist in every build, but for those of files: with
 * Q3N_NO_STDIO only FILES knows that they are missing.  Knows only the types of the API.
 * ===================================================================================== */
#if defined(_WIN32)
#  ifndef WIN32_LEAN_AND_MEAN
#    define WIN32_LEAN_AND_MEAN
#  endif
#  ifndef NOMINMAX
#    define NOMINMAX
#  endif
#  include <windows.h>
#else
#  include <sched.h>
#  ifndef Q3N_NO_STDIO
#    include <dirent.h>
#    include <errno.h>
#    include <fcntl.h>
#    include <sys/mman.h>
#    include <sys/stat.h>
#  endif
#  ifndef Q3N_NO_THREADS
#    include <pthread.h>
#  endif
#  ifdef __linux__
#    include <sys/syscall.h>
#  endif
#  include <unistd.h>
#endif
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- Build macros ---- */
#ifndef Q3N_ASSERT
#  include <assert.h>
#  define Q3N_ASSERT(x) assert(x)   /* for what only a bug of this file can break, not for input */
#endif
#if !defined(Q3N_NO_SIMD) && (defined(__x86_64__) || defined(_M_X64))
#  define Q3N__X86 1
#  include <immintrin.h>
#else
#  define Q3N__X86 0
#endif
#if !defined(Q3N_NO_SIMD) && (defined(__aarch64__) || defined(_M_ARM64))
#  define Q3N__ARM64 1
#  include <arm_neon.h>
#else
#  define Q3N__ARM64 0
#endif
/* What strict C modes hide if a header of the C library came before this one, as Linux's and WASI's
 * C libraries have it: declared here as they are there, since a macro such as _GNU_SOURCE would
 * come too late, or change what the host's own file sees. */
#if defined(__linux__)
#  define Q3N__CLOCK 1                   /* CLOCK_MONOTONIC */
long syscall(long number, ...);
int  clock_gettime(int clock, struct timespec *t);
#elif defined(__wasi__)
#  define Q3N__CLOCK (&_CLOCK_MONOTONIC)
struct __clockid;
extern const struct __clockid _CLOCK_MONOTONIC;
int  clock_gettime(const struct __clockid *clock, struct timespec *t);
#elif !defined(_WIN32)
#  define Q3N__CLOCK CLOCK_MONOTONIC
#endif
#if defined(O_CLOEXEC) || !defined(__linux__)
#  define Q3N__O_CLOEXEC O_CLOEXEC
#else
#  define Q3N__O_CLOEXEC 02000000        /* asm-generic/fcntl.h: every machine that is supported */
#endif

#define Q3N__INFINITY HUGE_VALF    /* Linux's <sys/vlimit.h> makes an int of INFINITY */

#if defined(__GNUC__) || defined(__clang__)
#  define Q3N__UNUSED __attribute__((unused))
#  if defined(__MINGW32__) && !defined(__clang__)
#    define Q3N__PRINTF(text, first) __attribute__((format(gnu_printf, text, first)))
#  else
#    define Q3N__PRINTF(text, first) __attribute__((format(printf, text, first)))
#  endif
#else
#  define Q3N__UNUSED
#  define Q3N__PRINTF(text, first)
#endif

/* ---- Target regions ---- */

/* Everything between BEGIN and END is compiled for the named ISA whatever the command line says, so
 * that one translation unit holds every variant.  MSVC compiles any intrinsic anywhere. */
#define Q3N__PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#  define Q3N__TARGET_BEGIN(isa)                                                        \
     Q3N__PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#  define Q3N__TARGET_END Q3N__PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#  define Q3N__TARGET_BEGIN(isa) Q3N__PRAGMA(GCC push_options) Q3N__PRAGMA(GCC target(isa))
#  define Q3N__TARGET_END Q3N__PRAGMA(GCC pop_options)
#else
#  define Q3N__TARGET_BEGIN(isa)
#  define Q3N__TARGET_END
#endif

/* ---- Atomics: sequentially consistent, which costs nothing at the rate they are used; lock-free,
 * for signal handlers ---- */
#if defined(_MSC_VER) && !defined(__clang__)
typedef volatile LONG64 q3n__atomic;
static int64_t q3n__atomic_load(q3n__atomic *a) { return InterlockedCompareExchange64(a, 0, 0); }
static void    q3n__atomic_store(q3n__atomic *a, int64_t v) { InterlockedExchange64(a, v); }
static int64_t q3n__atomic_add(q3n__atomic *a, int64_t v)   /* returns the value before */
{
    return InterlockedExchangeAdd64(a, v);
}
static int q3n__atomic_cas(q3n__atomic *a, int64_t expected, int64_t desired)
{
    return InterlockedCompareExchange64(a, desired, expected) == expected;
}
static void q3n__pause(void) { YieldProcessor(); }
#else
typedef int64_t q3n__atomic;
#  if __GCC_ATOMIC_LLONG_LOCK_FREE != 2
#    error "64-bit atomics are not lock-free on this machine: q3n_session_cancel needs them"
#  endif
static int64_t q3n__atomic_load(q3n__atomic *a) { return __atomic_load_n(a, __ATOMIC_SEQ_CST); }
static void    q3n__atomic_store(q3n__atomic *a, int64_t v)
{
    __atomic_store_n(a, v, __ATOMIC_SEQ_CST);
}
static int64_t q3n__atomic_add(q3n__atomic *a, int64_t v)   /* returns the value before */
{
    return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST);
}
/* 1 = *a was expected and is desired now. */
static int q3n__atomic_cas(q3n__atomic *a, int64_t expected, int64_t desired)
{
    return __atomic_compare_exchange_n(a, &expected, desired, 0, __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST);
}
static void q3n__pause(void)
{
#  if defined(__x86_64__)
    __asm__ volatile("pause");
#  elif defined(__aarch64__)
    __asm__ volatile("yield");
#  endif
}
#endif

static Q3N__UNUSED void q3n__yield(void)   /* let another thread run */
{
#if defined(_WIN32)
    SwitchToThread();
#else
    sched_yield();
#endif
}

/* ---- Threads: start, join, mutex, condition ----
 *
 * _start and _init return 0 on failure.  A thread and a mutex stay where they were made.  Waits may
 * return without a broadcast: callers look at their condition in a loop, with the mutex held, and
 * broadcast with it held. */
#ifdef Q3N_NO_THREADS
#  define Q3N__HAS_THREADS 0
#else
#  define Q3N__HAS_THREADS 1
#endif
#if !Q3N__HAS_THREADS
typedef int q3n__thread;
typedef q3n__atomic q3n__mutex;
typedef int q3n__cond;
static int  q3n__thread_start(q3n__thread *t, void (*fn)(void *), void *arg)
{
    (void)t; (void)fn; (void)arg;
    return 0;
}
static void q3n__thread_join(q3n__thread *t) { (void)t; }
/* The host may have threads where the library has none: they share a cache under this lock, which
 * they hold for the time of a look into memory, never while files are read. */
static int  q3n__mutex_init(q3n__mutex *m) { *m = 0; return 1; }
static void q3n__mutex_free(q3n__mutex *m) { (void)m; }
static void q3n__mutex_lock(q3n__mutex *m)
{
    for (int i = 0; !q3n__atomic_cas(m, 0, 1); i++) {
        if (i < 64) q3n__pause();
        else        q3n__yield();
    }
}
static void q3n__mutex_unlock(q3n__mutex *m) { q3n__atomic_store(m, 0); }
static int  q3n__cond_init(q3n__cond *c) { *c = 0; return 1; }
static void q3n__cond_free(q3n__cond *c) { (void)c; }
static void q3n__cond_wait(q3n__cond *c, q3n__mutex *m) { (void)c; (void)m; }
static void q3n__cond_broadcast(q3n__cond *c) { (void)c; }
static int  q3n__cpu_count(void) { return 1; }
#elif defined(_WIN32)
typedef struct { HANDLE handle; void (*fn)(void *); void *arg; } q3n__thread;
typedef SRWLOCK q3n__mutex;
typedef CONDITION_VARIABLE q3n__cond;
static DWORD WINAPI q3n__thread_main(LPVOID p)
{
    q3n__thread *t = (q3n__thread *)p;
    t->fn(t->arg);
    return 0;
}
static int q3n__thread_start(q3n__thread *t, void (*fn)(void *), void *arg)
{
    t->fn = fn;
    t->arg = arg;
    t->handle = CreateThread(NULL, 0, q3n__thread_main, t, 0, NULL);
    return t->handle != NULL;
}
static void q3n__thread_join(q3n__thread *t)
{
    WaitForSingleObject(t->handle, INFINITE);
    CloseHandle(t->handle);
}
static int  q3n__mutex_init(q3n__mutex *m) { InitializeSRWLock(m); return 1; }
static void q3n__mutex_free(q3n__mutex *m) { (void)m; }
static void q3n__mutex_lock(q3n__mutex *m) { AcquireSRWLockExclusive(m); }
static void q3n__mutex_unlock(q3n__mutex *m) { ReleaseSRWLockExclusive(m); }
static int  q3n__cond_init(q3n__cond *c) { InitializeConditionVariable(c); return 1; }
static void q3n__cond_free(q3n__cond *c) { (void)c; }
static void q3n__cond_wait(q3n__cond *c, q3n__mutex *m)
{
    SleepConditionVariableSRW(c, m, INFINITE, 0);
}
static void q3n__cond_broadcast(q3n__cond *c) { WakeAllConditionVariable(c); }

/* CPUs that this process may run on.  The mask is of one group of at most 64, and empty if the
 * process has CPUs of several: then all of them. */
static int q3n__cpu_count(void)
{
    DWORD_PTR own = 0, all;
    int n = 0;
    if (!GetProcessAffinityMask(GetCurrentProcess(), &own, &all)) own = 0;
    for (; own != 0; own &= own - 1) n++;
    if (n == 0) n = (int)GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
    return n < 1 ? 1 : n > 1024 ? 1024 : n;
}
#else
typedef struct { pthread_t handle; void (*fn)(void *); void *arg; } q3n__thread;
typedef pthread_mutex_t q3n__mutex;
#  ifdef __linux__
typedef int            q3n__cond;
#  else
typedef pthread_cond_t q3n__cond;
#  endif
static void *q3n__thread_main(void *p)
{
    q3n__thread *t = (q3n__thread *)p;
    t->fn(t->arg);
    return NULL;
}
/* t must stay where it is until it is joined: the thread reads fn and arg in it. */
static int q3n__thread_start(q3n__thread *t, void (*fn)(void *), void *arg)
{
    t->fn = fn;
    t->arg = arg;
    return pthread_create(&t->handle, NULL, q3n__thread_main, t) == 0;
}
static void q3n__thread_join(q3n__thread *t) { pthread_join(t->handle, NULL); }
static int  q3n__mutex_init(q3n__mutex *m) { return pthread_mutex_init(m, NULL) == 0; }
static void q3n__mutex_free(q3n__mutex *m) { pthread_mutex_destroy(m); }
static void q3n__mutex_lock(q3n__mutex *m) { pthread_mutex_lock(m); }
static void q3n__mutex_unlock(q3n__mutex *m) { pthread_mutex_unlock(m); }
#  ifdef __linux__
/* A count of broadcasts that threads wait to change, with the mutex held on both sides: glibc's own
 * condition variables before 2.41 lose wake-ups (its bug 25847), seen here with 16 threads on 2
 * CPUs.  128 and 129: FUTEX_WAIT and FUTEX_WAKE, private.
 *
 *     wait        seen = count; unlock; FUTEX_WAIT(seen): at once back if count is no longer seen,
 *                 compared and put to sleep as one step (futex(2)); lock
 *     broadcast   count += 1; FUTEX_WAKE(all)
 *
 * A broadcast after `seen` was read changes the count, so it either prevents the sleep or ends it.
 */
static int  q3n__cond_init(q3n__cond *c) { *c = 0; return 1; }
static void q3n__cond_free(q3n__cond *c) { (void)c; }
static void q3n__cond_wait(q3n__cond *c, q3n__mutex *m)
{
    const int seen = __atomic_load_n(c, __ATOMIC_SEQ_CST);
    q3n__mutex_unlock(m);
    syscall(SYS_futex, c, 128L, (long)seen, NULL, NULL, 0L);
    q3n__mutex_lock(m);
}
static void q3n__cond_broadcast(q3n__cond *c)
{
    __atomic_fetch_add(c, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, c, 129L, (long)INT_MAX, NULL, NULL, 0L);
}
#  else
static int  q3n__cond_init(q3n__cond *c) { return pthread_cond_init(c, NULL) == 0; }
static void q3n__cond_free(q3n__cond *c) { pthread_cond_destroy(c); }
static void q3n__cond_wait(q3n__cond *c, q3n__mutex *m) { pthread_cond_wait(c, m); }
static void q3n__cond_broadcast(q3n__cond *c) { pthread_cond_broadcast(c); }
#  endif

/* The lower of two limits, where 0 means no limit.  CPUs have three: those on line, the process's
 * set, the quota of its cgroups (how a container with --cpus=2 is held on a machine of 64). */
static int q3n__limit_min(int a, int b) { return a == 0 || (b > 0 && b < a) ? b : a; }

#  if defined(__linux__)
/* CPUs that this process may run on (taskset, a container's set).  The system call itself: its
 * function in <sched.h> is for _GNU_SOURCE alone and knows of 1024 CPUs, Linux of 8192. */
static int q3n__cpu_set_count(void)
{
    uint64_t set[128];
    const long bytes = syscall(SYS_sched_getaffinity, 0L, sizeof set, set);
    int n = 0;
    for (long i = 0; i < bytes / 8; i++)
        for (uint64_t w = set[i]; w != 0; w &= w - 1) n++;
    return n;
}
#  endif
#  if defined(__linux__) && !defined(Q3N_NO_STDIO)
/* The first bytes of a file as a text, ended by 0; "" if it cannot be read.  Files of /proc and
 * /sys come in one read. */
static void q3n__text_read(const char *path, char *text, size_t size)
{
    const int fd = open(path, O_RDONLY | Q3N__O_CLOEXEC);
    const ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);
    text[n < 0 ? 0 : n] = '\0';
    if (fd >= 0) close(fd);
}

/* Numbers of a cgroup file: 0 where there is none, as in "max 100000". */
static long long q3n__cgroup_read(const char *directory, const char *name, long long *second)
{
    char path[1200], text[64], *end;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    q3n__text_read(path, text, sizeof text);
    const long long first = strtoll(text, &end, 10);
    if (second) *second = strtoll(end, NULL, 10);
    return first;
}

/* CPUs that the quota of one cgroup comes to, rounded up; 0 = it has none.  Version 2 has
 * cpu.max, "QUOTA PERIOD"; version 1 has a file for each. */
static int q3n__cgroup_cpus(const char *directory)
{
    long long period, quota = q3n__cgroup_read(directory, "cpu.max", &period);
    if (quota <= 0) {
        quota = q3n__cgroup_read(directory, "cpu.cfs_quota_us", NULL);
        period = q3n__cgroup_read(directory, "cpu.cfs_period_us", NULL);
    }
    if (quota <= 0 || period <= 0) return 0;
    const long long n = quota / period + (quota % period != 0);
    return n > INT_MAX ? INT_MAX : (int)n;
}

/* The same for a cgroup and all above it: the lowest.  A container may be told a path of the host's
 * that is not there; what it was given then stands at the root. */
static int q3n__cgroup_path_cpus(const char *root, const char *path, size_t path_len)
{
    char directory[1024];
    const size_t root_len = strlen(root);
    if (path_len >= sizeof directory - root_len) return 0;
    memcpy(directory, root, root_len);
    memcpy(directory + root_len, path, path_len);
    directory[root_len + path_len] = '\0';
    int n = q3n__cgroup_cpus(directory);
    for (char *last; (last = strrchr(directory + root_len, '/')) != NULL; ) {
        *last = '\0';
        n = q3n__limit_min(n, q3n__cgroup_cpus(directory));
    }
    return n;
}

/* Where the hierarchy of a line of /proc/self/cgroup is mounted, below /sys/fs/cgroup: "0::PATH" is
 * version 2, "N:CONTROLLER,...:PATH" version 1; NULL = one without CPU quotas. */
static const char *q3n__cgroup_mount(const char *controllers)
{
    if (*controllers == ':') return "";
    for (size_t n; *controllers != ':'; controllers += n + (controllers[n] == ',')) {
        n = strcspn(controllers, ",:");
        if (n == 3 && memcmp(controllers, "cpu", 3) == 0) return "/cpu";
    }
    return NULL;
}

/* CPUs that the quotas of this process's cgroups come to, 0 = no quota.  system is "", or in tests
 * a folder with files for the system's.  Lines of /proc/self/cgroup, one a hierarchy (cgroups(7)):
 *
 *     "0::/user.slice"           version 2     /sys/fs/cgroup/user.slice/cpu.max
 *     "4:cpu,cpuacct:/jobs"      version 1     /sys/fs/cgroup/cpu/jobs/cpu.cfs_quota_us */
static int q3n__cpu_quota(const char *system)
{
    char text[4096], root[512];
    int cpus = 0;
    snprintf(root, sizeof root, "%s/proc/self/cgroup", system);
    q3n__text_read(root, text, sizeof text);
    for (char *line = text, *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        *end = '\0';
        const char *names = strchr(line, ':'), *path = names ? strchr(names + 1, ':') : NULL;
        const char *mount = path ? q3n__cgroup_mount(names + 1) : NULL;
        if (!mount) continue;
        snprintf(root, sizeof root, "%s/sys/fs/cgroup%s", system, mount);
        cpus = q3n__limit_min(cpus, q3n__cgroup_path_cpus(root, path + 1, strlen(path + 1)));
    }
    return cpus;
}
#  else
static int q3n__cpu_quota(const char *system) { (void)system; return 0; }
#  endif

/* Threads that can run at once, 1 to 1024: CPUs that are on line, of the process's set, within its
 * quota.  More threads than that would take turns while all wait for the slowest range. */
static int q3n__cpu_count(void)
{
    int n = 0;
#  if defined(__linux__)
    n = q3n__cpu_set_count();
#  endif
    if (n < 1) n = (int)sysconf(_SC_NPROCESSORS_ONLN);
    n = q3n__limit_min(q3n__cpu_quota(""), n);
    return n < 1 ? 1 : n > 1024 ? 1024 : n;
}
#endif

/* ---- A monotonic clock, in microseconds from an arbitrary start ---- */
static int64_t q3n__now(void)
{
#if defined(_WIN32)
    LARGE_INTEGER t, f;
    QueryPerformanceCounter(&t);
    QueryPerformanceFrequency(&f);
    return t.QuadPart / f.QuadPart * 1000000 + t.QuadPart % f.QuadPart * 1000000 / f.QuadPart;
#else
    struct timespec t;
    clock_gettime(Q3N__CLOCK, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
#endif
}

/* ---- Files ----
 *
 * Each function asks one thing of the system and returns 0 or a code that q3n__file_reason puts
 * into words: the system's if > 0, one of these if < 0.  Paths are UTF-8 on every system.  What is
 * made of them is in FILES.  Each system has, as q3n__file_*:
 *
 *     look, open, create        what is there; to read; to write, under a name that must be new
 *     read, write, rewind       all of the bytes, or a code; Q3N__FILE_ENDS if there are fewer
 *     writable, resolve, adopt  may it be replaced; where links lead; take over owner and mode
 *     sync, close, rename, remove
 *     map, unmap                a whole file, read only
 *
 * and q3n__directory_list, q3n__directory_sync, q3n__path_folder. */
enum { Q3N__FILE_BAD_PATH = -1, Q3N__FILE_IS_DIRECTORY = -2, Q3N__FILE_NOT_REGULAR = -3,
       Q3N__FILE_ENDS = -4 };

#define Q3N__PATH_ROOM 4096

/* Which file it is, whatever its name; zeros = none. */
typedef struct { uint64_t volume, number; } q3n__file_id;

typedef struct {
    q3n__file_id id;
    int64_t      bytes;
    unsigned     mode, owner, group;     /* 0 where the system has no such numbers               */
} q3n__file_info;

/* Of regular files of a directory: name, size, and when it was written, in seconds. */
typedef void (*q3n__file_found)(void *user, const char *name, int64_t bytes, int64_t when);

#if !defined(Q3N_NO_STDIO)
/* Max bytes of one call: systems refuse or cut what does not fit their int. */
#define Q3N__FILE_STEP ((size_t)1 << 30)
#endif

#if defined(Q3N_NO_STDIO)
#  define Q3N__HAS_FILES 0
typedef int q3n__file;
#elif defined(_WIN32)
#  define Q3N__HAS_FILES 1
typedef struct { HANDLE handle; } q3n__file;

/* UTF-8 to UTF-16, with its 0; Q3N__FILE_BAD_PATH for what is no UTF-8, or too long. */
static int q3n__file_wide(const char *path, wchar_t wide[Q3N__PATH_ROOM])
{
    return MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, Q3N__PATH_ROOM)
         ? 0 : Q3N__FILE_BAD_PATH;
}

/* 0, or why a call failed: never 0, whatever the call left there. */
static int  q3n__file_code(int ok)
{
    const DWORD code = ok ? 0 : GetLastError();
    return ok ? 0 : code ? (int)code : ERROR_GEN_FAILURE;
}
static int  q3n__file_absent(int code)
{
    return code == ERROR_FILE_NOT_FOUND || code == ERROR_PATH_NOT_FOUND;
}
static int  q3n__file_exists(int code)
{
    return code == ERROR_FILE_EXISTS || code == ERROR_ALREADY_EXISTS;
}
/* The system's message without its full stop and line end; a number if it has none. */
static void q3n__file_reason_of(int code, char *text, size_t room)
{
    wchar_t wide[256];
    DWORD n = FormatMessageW(FORMAT_MESSAGE_FROM_SYSTEM | FORMAT_MESSAGE_IGNORE_INSERTS, NULL,
                             (DWORD)code, 0, wide, 255, NULL);
    while (n > 0 && (wide[n - 1] <= L' ' || wide[n - 1] == L'.')) n--;
    wide[n] = 0;
    if (n == 0 || !WideCharToMultiByte(CP_UTF8, 0, wide, -1, text, (int)room, NULL, NULL))
        snprintf(text, room, "error %d of the system", code);
}
static uint64_t q3n__process_id(void) { return GetCurrentProcessId(); }

/* The bytes of the path in front of the file's own name. */
static size_t q3n__path_folder(const char *path)
{
    size_t n = strlen(path);
    while (n > 0 && path[n - 1] != '/' && path[n - 1] != '\\' && path[n - 1] != ':') n--;
    return n;
}

/* What an open handle is: a pipe or a console is no disk file, and refused before its size is
 * asked. */
static int q3n__file_inspect(HANDLE h, q3n__file_info *info)
{
    BY_HANDLE_FILE_INFORMATION d;
    memset(info, 0, sizeof *info);
    if (GetFileType(h) != FILE_TYPE_DISK) return Q3N__FILE_NOT_REGULAR;
    if (!GetFileInformationByHandle(h, &d)) return q3n__file_code(0);
    info->id.volume = d.dwVolumeSerialNumber;
    info->id.number = (uint64_t)d.nFileIndexHigh << 32 | d.nFileIndexLow;
    info->bytes = (int64_t)((uint64_t)d.nFileSizeHigh << 32 | d.nFileSizeLow);
    return d.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY ? Q3N__FILE_IS_DIRECTORY : 0;
}

/* CreateFileW.  access 0 asks for what the file is alone; directories then open too. */
static int q3n__file_handle(q3n__file *f, const char *path, DWORD access, DWORD share, DWORD how)
{
    wchar_t wide[Q3N__PATH_ROOM];
    const DWORD flags = access ? FILE_ATTRIBUTE_NORMAL : FILE_FLAG_BACKUP_SEMANTICS;
    const int code = q3n__file_wide(path, wide);
    if (code) return code;
    f->handle = CreateFileW(wide, access, share, NULL, how, flags, NULL);
    return q3n__file_code(f->handle != INVALID_HANDLE_VALUE);
}

/* What is there, after links. */
static int q3n__file_look(const char *path, q3n__file_info *info)
{
    q3n__file f;
    int code = q3n__file_handle(&f, path, 0, FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE,
                                OPEN_EXISTING);       /* no access asked: directories open too */
    if (code) return code;
    code = q3n__file_inspect(f.handle, info);
    CloseHandle(f.handle);
    return code;
}

/* A regular file, to read; nothing is open on failure. */
static int q3n__file_open(q3n__file *f, const char *path, q3n__file_info *info)
{
    int code = q3n__file_look(path, info);
    if (code == 0)
        code = q3n__file_handle(f, path, GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE,
                                OPEN_EXISTING);
    if (code) return code;
    code = q3n__file_inspect(f->handle, info);
    if (code) CloseHandle(f->handle);
    return code;
}

/* A file that must not exist yet, to be written; if `closed`, others have no access. */
static int q3n__file_create(q3n__file *f, const char *path, int closed)
{
    (void)closed;
    return q3n__file_handle(f, path, GENERIC_WRITE, 0, CREATE_NEW);
}

/* Who may use the file is inherited from its directory. */
static int q3n__file_adopt(q3n__file *f, const q3n__file_info *old)
{
    (void)f; (void)old;
    return 0;
}

static int q3n__file_writable(const char *path)
{
    wchar_t wide[Q3N__PATH_ROOM];
    const int code = q3n__file_wide(path, wide);
    if (code) return code;
    const DWORD attributes = GetFileAttributesW(wide);
    if (attributes == INVALID_FILE_ATTRIBUTES) return q3n__file_code(0);
    return attributes & FILE_ATTRIBUTE_READONLY ? ERROR_ACCESS_DENIED : 0;
}

/* Replace a path by where its links lead. */
static int q3n__file_resolve(char path[Q3N__PATH_ROOM])
{
    wchar_t wide[Q3N__PATH_ROOM];
    q3n__file f;
    int code = q3n__file_wide(path, wide);
    if (code) return code;
    const DWORD attributes = GetFileAttributesW(wide);
    if (attributes == INVALID_FILE_ATTRIBUTES || !(attributes & FILE_ATTRIBUTE_REPARSE_POINT))
        return 0;
    code = q3n__file_handle(&f, path, 0, FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE,
                            OPEN_EXISTING);
    if (code) return code;
    const DWORD n = GetFinalPathNameByHandleW(f.handle, wide, Q3N__PATH_ROOM, 0);
    code = n == 0 ? q3n__file_code(0) : n < Q3N__PATH_ROOM ? 0 : Q3N__FILE_BAD_PATH;
    CloseHandle(f.handle);
    if (code) return code;
    return WideCharToMultiByte(CP_UTF8, 0, wide, -1, path, Q3N__PATH_ROOM, NULL, NULL)
         ? 0 : Q3N__FILE_BAD_PATH;
}

static int q3n__file_write(q3n__file *f, const void *data, size_t bytes)
{
    for (const uint8_t *p = (const uint8_t *)data; bytes > 0; ) {
        DWORD n = 0;
        const DWORD count = (DWORD)(bytes < Q3N__FILE_STEP ? bytes : Q3N__FILE_STEP);
        if (!WriteFile(f->handle, p, count, &n, NULL)) return q3n__file_code(0);
        if (n == 0) return ERROR_WRITE_FAULT;
        p += n;
        bytes -= n;
    }
    return 0;
}

static int q3n__file_read(q3n__file *f, void *data, size_t bytes)
{
    for (uint8_t *p = (uint8_t *)data; bytes > 0; ) {
        DWORD n = 0;
        const DWORD count = (DWORD)(bytes < Q3N__FILE_STEP ? bytes : Q3N__FILE_STEP);
        if (!ReadFile(f->handle, p, count, &n, NULL)) return q3n__file_code(0);
        if (n == 0) return Q3N__FILE_ENDS;
        p += n;
        bytes -= n;
    }
    return 0;
}

static int q3n__file_rewind(q3n__file *f)
{
    LARGE_INTEGER start;
    start.QuadPart = 0;
    return q3n__file_code(SetFilePointerEx(f->handle, start, NULL, FILE_BEGIN));
}

static int q3n__file_sync(q3n__file *f)  { return q3n__file_code(FlushFileBuffers(f->handle)); }
static int q3n__file_close(q3n__file *f) { return q3n__file_code(CloseHandle(f->handle)); }

/* Map bytes > 0 of an open file for reading; the mapping outlives it. */
static int q3n__file_map(q3n__file *f, size_t bytes, const uint8_t **data)
{
    (void)bytes;
    HANDLE mapping = CreateFileMappingW(f->handle, NULL, PAGE_READONLY, 0, 0, NULL);
    if (!mapping) return q3n__file_code(0);
    *data = (const uint8_t *)MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
    const int code = q3n__file_code(*data != NULL);
    CloseHandle(mapping);
    return code;
}

static void q3n__file_unmap(const uint8_t *data, size_t bytes)
{
    (void)bytes;
    UnmapViewOfFile(data);
}

/* Replaces `to`; fails while somebody has it open. */
static int q3n__file_rename(const char *from, const char *to)
{
    wchar_t wide_from[Q3N__PATH_ROOM], wide_to[Q3N__PATH_ROOM];
    int code = q3n__file_wide(from, wide_from);
    if (code == 0) code = q3n__file_wide(to, wide_to);
    if (code) return code;
    return q3n__file_code(MoveFileExW(wide_from, wide_to,
                                      MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH));
}

static int q3n__file_remove(const char *path)
{
    wchar_t wide[Q3N__PATH_ROOM];
    const int code = q3n__file_wide(path, wide);
    return code ? code : q3n__file_code(DeleteFileW(wide));
}

static void q3n__directory_sync(const char *path) { (void)path; }   /* MOVEFILE_WRITE_THROUGH */

/* Report every regular file whose name begins with prefix. */
static int q3n__directory_list(const char *path, const char *prefix, q3n__file_found found,
                               void *user)
{
    char text[Q3N__PATH_ROOM];
    wchar_t wide[Q3N__PATH_ROOM];
    WIN32_FIND_DATAW d;
    const int n = snprintf(text, sizeof text, "%s\\%s*", path, prefix);
    if (n < 0 || n >= (int)sizeof text || q3n__file_wide(text, wide)) return Q3N__FILE_BAD_PATH;
    HANDLE h = FindFirstFileW(wide, &d);
    if (h == INVALID_HANDLE_VALUE)       /* that no file matches is no error */
        return GetLastError() == ERROR_FILE_NOT_FOUND ? 0 : q3n__file_code(0);
    do {
        const uint64_t ticks = (uint64_t)d.ftLastWriteTime.dwHighDateTime << 32
                             | d.ftLastWriteTime.dwLowDateTime;   /* 100 ns since 1601 */
        if (!(d.dwFileAttributes & (FILE_ATTRIBUTE_DIRECTORY | FILE_ATTRIBUTE_REPARSE_POINT))
            && WideCharToMultiByte(CP_UTF8, 0, d.cFileName, -1, text, sizeof text, NULL, NULL))
            found(user, text, (int64_t)((uint64_t)d.nFileSizeHigh << 32 | d.nFileSizeLow),
                  (int64_t)(ticks / 10000000) - 11644473600);
    } while (FindNextFileW(h, &d));
    FindClose(h);
    return 0;
}
#else
#  define Q3N__HAS_FILES 1
typedef struct { int fd; } q3n__file;
#  ifdef __linux__                     /* hidden from strict C11 if a header of libc came first */
int     fsync(int fd);
int     fchmod(int fd, mode_t mode);
int     fchown(int fd, unsigned owner, unsigned group);
ssize_t readlink(const char *restrict path, char *restrict to, size_t room);
#  endif

static int  q3n__file_code(int ok)     { return ok ? 0 : errno; }
static int  q3n__file_absent(int code) { return code == ENOENT; }
static int  q3n__file_exists(int code) { return code == EEXIST; }
static void q3n__file_reason_of(int code, char *text, size_t room)
{
    snprintf(text, room, "%s", strerror(code));
}
static uint64_t q3n__process_id(void) { return (uint64_t)getpid(); }

/* The bytes of the path in front of the file's own name. */
static size_t q3n__path_folder(const char *path)
{
    size_t n = strlen(path);
    while (n > 0 && path[n - 1] != '/') n--;
    return n;
}

/* Identity, size and rights of what was found; a code if it is no regular file. */
static int q3n__file_inspect(const struct stat *st, q3n__file_info *info)
{
    info->id.volume = (uint64_t)st->st_dev;
    info->id.number = (uint64_t)st->st_ino;
    info->bytes = (int64_t)st->st_size;
    info->mode = st->st_mode & 0777;
    info->owner = st->st_uid;
    info->group = st->st_gid;
    return S_ISREG(st->st_mode) ? 0
         : S_ISDIR(st->st_mode) ? Q3N__FILE_IS_DIRECTORY : Q3N__FILE_NOT_REGULAR;
}

/* What is there, after links. */
static int q3n__file_look(const char *path, q3n__file_info *info)
{
    struct stat st;
    return stat(path, &st) == 0 ? q3n__file_inspect(&st, info) : errno;
}

/* open, with close-on-exec; network file systems may be interrupted */
static int q3n__file_descriptor(q3n__file *f, const char *path, int flags, mode_t mode)
{
    do f->fd = open(path, flags | Q3N__O_CLOEXEC, mode); while (f->fd < 0 && errno == EINTR);
    return f->fd < 0 ? errno : 0;
}

/* A regular file, to read; nothing is open on failure.  Opening a pipe or a terminal's line would
 * wait but for O_NONBLOCK. */
static int q3n__file_open(q3n__file *f, const char *path, q3n__file_info *info)
{
    struct stat st;
    int code = q3n__file_descriptor(f, path, O_RDONLY | O_NONBLOCK | O_NOCTTY, 0);
    if (code) return code;
    code = fstat(f->fd, &st) == 0 ? q3n__file_inspect(&st, info) : errno;
    if (code) close(f->fd);
    return code;
}

/* A file that must not exist yet, to be written; if `closed`, others have no access. */
static int q3n__file_create(q3n__file *f, const char *path, int closed)
{
    return q3n__file_descriptor(f, path, O_WRONLY | O_CREAT | O_EXCL, closed ? 0600 : 0666);
}

/* Owner or group, -1 = as it is.  Not being allowed to is no failure; EINVAL: no such id here. */
static int q3n__file_give(q3n__file *f, unsigned owner, unsigned group)
{
    return q3n__file_code(fchown(f->fd, owner, group) == 0 || errno == EPERM || errno == EINVAL);
}

/* Group, owner and mode of the file that this one replaces.  Only root may give files away; others
 * may give them to groups of theirs.  Where the group could not be set, the one there gets no more
 * rights than everybody. */
static int q3n__file_adopt(q3n__file *f, const q3n__file_info *old)
{
    struct stat st;
    const unsigned same = (unsigned)-1;
    if (fstat(f->fd, &st) != 0) return errno;
    int code = st.st_gid == old->group ? 0 : q3n__file_give(f, same, old->group);
    if (code == 0 && st.st_uid != old->owner) code = q3n__file_give(f, old->owner, same);
    if (code == 0) code = q3n__file_code(fstat(f->fd, &st) == 0);
    if (code) return code;
    unsigned mode = old->mode;
    if (st.st_gid != old->group) mode &= 0707u | (mode & 7u) << 3;
    return q3n__file_code((st.st_mode & 0777) == mode || fchmod(f->fd, (mode_t)mode) == 0);
}

static int q3n__file_writable(const char *path) { return q3n__file_code(access(path, W_OK) == 0); }

/* Replace a path by where its links lead; the last of them may lead to no file. */
static int q3n__file_resolve(char path[Q3N__PATH_ROOM])
{
    char link[Q3N__PATH_ROOM];
    for (int hops = 0; hops < 40; hops++) {
        const ssize_t n = readlink(path, link, sizeof link);
        if (n < 0) return errno == EINVAL || errno == ENOENT ? 0 : errno;   /* EINVAL: no link */
        const size_t folder = n > 0 && link[0] == '/' ? 0 : q3n__path_folder(path);
        if (folder + (size_t)n >= Q3N__PATH_ROOM) return ENAMETOOLONG;
        memcpy(path + folder, link, (size_t)n);
        path[folder + (size_t)n] = 0;
    }
    return ELOOP;
}

/* write(2) may take fewer bytes than it was given, or be interrupted before the first: go on. */
static int q3n__file_write(q3n__file *f, const void *data, size_t bytes)
{
    for (const uint8_t *p = (const uint8_t *)data; bytes > 0; ) {
        const ssize_t n = write(f->fd, p, bytes < Q3N__FILE_STEP ? bytes : Q3N__FILE_STEP);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return n < 0 ? errno : EIO;
        p += n;
        bytes -= (size_t)n;
    }
    return 0;
}

static int q3n__file_read(q3n__file *f, void *data, size_t bytes)
{
    for (uint8_t *p = (uint8_t *)data; bytes > 0; ) {
        const ssize_t n = read(f->fd, p, bytes < Q3N__FILE_STEP ? bytes : Q3N__FILE_STEP);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return n < 0 ? errno : Q3N__FILE_ENDS;
        p += n;
        bytes -= (size_t)n;
    }
    return 0;
}

static int q3n__file_rewind(q3n__file *f)
{
    return q3n__file_code(lseek(f->fd, 0, SEEK_SET) == 0);
}

/* Wait until the bytes are on the disk.  EINVAL, ENOTSUP: a file system without such a thing. */
static int q3n__file_sync(q3n__file *f)
{
    int code;
    do code = q3n__file_code(fsync(f->fd) == 0); while (code == EINTR);
    return code == EINVAL || code == ENOTSUP ? 0 : code;
}

static int q3n__file_close(q3n__file *f)   /* interrupted or not, it is closed */
{
    return q3n__file_code(close(f->fd) == 0 || errno == EINTR);
}

/* Map bytes > 0 of an open file for reading; the mapping outlives it. */
static int q3n__file_map(q3n__file *f, size_t bytes, const uint8_t **data)
{
    void *p = mmap(NULL, bytes, PROT_READ, MAP_SHARED, f->fd, 0);
    if (p == MAP_FAILED) return errno;
    *data = (const uint8_t *)p;
    return 0;
}

static void q3n__file_unmap(const uint8_t *data, size_t bytes)
{
    munmap((void *)(uintptr_t)data, bytes);
}

/* Replaces `to` at once (rename(2)); who has the old file open goes on reading it. */
static int q3n__file_rename(const char *from, const char *to)
{
    return q3n__file_code(rename(from, to) == 0);
}

static int q3n__file_remove(const char *path) { return q3n__file_code(unlink(path) == 0); }

/* Let a new name outlive a power failure, where the directory can be opened and the file system can
 * do that: the file is whole either way, so that failing is no error. */
static void q3n__directory_sync(const char *path)
{
    q3n__file f;
    if (q3n__file_descriptor(&f, path[0] ? path : ".", O_RDONLY | O_NONBLOCK, 0) != 0) return;
    q3n__file_sync(&f);
    q3n__file_close(&f);
}

/* Report every regular file whose name begins with prefix. */
static int q3n__directory_list(const char *path, const char *prefix, q3n__file_found found,
                               void *user)
{
    DIR *dir = opendir(path);
    if (!dir) return errno;
    for (const struct dirent *e; (e = readdir(dir)) != NULL; ) {
        struct stat st;
        char file[Q3N__PATH_ROOM];
        if (strncmp(e->d_name, prefix, strlen(prefix)) != 0) continue;
        const int n = snprintf(file, sizeof file, "%s/%s", path, e->d_name);
        if (n > 0 && n < (int)sizeof file && stat(file, &st) == 0 && S_ISREG(st.st_mode))
            found(user, e->d_name, (int64_t)st.st_size, (int64_t)st.st_mtime);
    }
    closedir(dir);
    return 0;
}
#endif

/* ---- CPU features ---- */
#if Q3N__X86
/* CPUID of a leaf and sub-leaf: EAX, EBX, ECX, EDX ([SDM]). */
static void q3n__cpuid(uint32_t leaf, uint32_t sub, uint32_t r[4])
{
#  if defined(_MSC_VER) && !defined(__clang__)
    __cpuidex((int *)r, (int)leaf, (int)sub);
#  else
    __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3])
                             : "a"(leaf), "c"(sub));
#  endif
}

/* Which registers the operating system saves (XCR0; [SDM] vol. 1, 13.3). */
static uint64_t q3n__xcr0(void)
{
#  if defined(_MSC_VER) && !defined(__clang__)
    return _xgetbv(0);
#  else
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return ((uint64_t)hi << 32) | lo;
#  endif
}

/* CPU flag and OS state-saving are both needed: a CPU can have AVX-512 while the kernel does not
 * save ZMM registers ([SDM] vol. 1, 14.3 and 15.2).  Leaf 1 ECX bit 27: XGETBV may be asked; XCR0
 * bits 1 and 2: XMM and YMM; 5 to 7: masks and both halves of ZMM.  Leaf 7 EBX: AVX2 and AVX-512,
 * ECX bit 11: VNNI. */
static int q3n__cpu_has(q3n_isa isa)
{
    uint32_t r0[4], r1[4], r7[4];
    q3n__cpuid(0, 0, r0);
    q3n__cpuid(1, 0, r1);
    if (r0[0] < 7 || !(r1[2] & (1u << 27))) return 0;
    q3n__cpuid(7, 0, r7);
    const uint64_t os = q3n__xcr0();
    const int avx2 = (os & 0x06) == 0x06 && (r7[1] & (1u << 5))                   /* AVX2     */
                  && (r1[2] & (1u << 12)) && (r1[2] & (1u << 29));                /* FMA F16C */
    const uint32_t f512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);   /* F DQ BW VL */
    if (isa == Q3N_ISA_AVX2)   return avx2;
    const int avx512 = avx2 && (os & 0xe6) == 0xe6 && (r7[1] & f512) == f512;
    if (isa == Q3N_ISA_AVX512)     return avx512;
    if (isa == Q3N_ISA_AVX512VNNI) return avx512 && (r7[2] & (1u << 11));
    return 0;
}
#else
static int q3n__cpu_has(q3n_isa isa) { return Q3N__ARM64 && isa == Q3N_ISA_NEON; }
#endif

/* =====================================================================================
 * [3] MEMORY                                                                 >>memory
 *
 * Sizes that cannot wrap, unaligned little-endian reads, UTF-8, the host's allocator, an arena that
 * lays out one allocation, buffers that grow, sorting, CRC-32, a hash of 64 bits.
 *
 * Later code may assume that what q3n__alloc or an arena gives starts at a multiple of 64 bytes,
 * and that nothing here is global: any thread may call any of it.  Knows nothing of files, models
 * or error records: it answers NULL or 0 and the caller finds words.
 * ===================================================================================== */

/* ---- Sizes and reads ----
 *
 * q3n__mul_size and _add_size return 0, and leave *out as it is, where size_t does not hold the
 * result.  The loads exist because the numbers of a file may lie at any byte: reading them through
 * a pointer of their type would be undefined there. */
static int q3n__mul_size(size_t a, size_t b, size_t *out)
{
    if (b != 0 && a > SIZE_MAX / b) return 0;
    *out = a * b;
    return 1;
}

static int q3n__add_size(size_t a, size_t b, size_t *out)
{
    if (a > SIZE_MAX - b) return 0;
    *out = a + b;
    return 1;
}

static Q3N__UNUSED uint16_t q3n__load_u16(const void *p) { uint16_t v; memcpy(&v, p, 2); return v; }
static uint32_t q3n__load_u32(const void *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static uint64_t q3n__load_u64(const void *p) { uint64_t v; memcpy(&v, p, 8); return v; }
static int64_t  q3n__load_i64(const void *p) { int64_t  v; memcpy(&v, p, 8); return v; }
static double   q3n__load_f64(const void *p) { double   v; memcpy(&v, p, 8); return v; }

/* ---- UTF-8 ----
 *
 * Valid are the sequences of Unicode 3.9, table 3-7: no overlong forms, no surrogates, nothing
 * beyond U+10FFFF.
 *
 *     lead    00-7F   C2-DF   E0 (A0-BF)  E1-EC  ED (80-9F)  EE-EF   F0 (90-BF)  F1-F3  F4 (80-8F)
 *     bytes   1       2       3, second byte within brackets, else 80-BF   4, the same */

/* Bytes of the character that begins with lead; 0 if none does. */
static int q3n__utf8_bytes(uint8_t lead)
{
    if (lead < 0x80) return 1;
    if (lead < 0xC2 || lead > 0xF4) return 0;
    return lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

/* May b be byte n (1 .. 3) of the character that begins with lead? */
static int q3n__utf8_continues(uint8_t lead, int n, uint8_t b)
{
    if ((b & 0xC0) != 0x80) return 0;
    if (n > 1) return 1;
    switch (lead) {
    case 0xE0: return b >= 0xA0;         /* else overlong */
    case 0xED: return b < 0xA0;          /* surrogates */
    case 0xF0: return b >= 0x90;
    case 0xF4: return b < 0x90;          /* beyond U+10FFFF */
    default:   return 1;
    }
}

/* Decode the character at p < end.  Returns its bytes, 1 to 4, or 0 if there is no valid one, or
 * only its beginning; *cp is then the first byte. */
static int q3n__utf8_decode(const uint8_t *p, const uint8_t *end, uint32_t *cp)
{
    const int n = q3n__utf8_bytes(p[0]);
    *cp = p[0];
    if (n < 2) return n;
    if (end - p < n) return 0;
    uint32_t c = p[0] & (0x7Fu >> n);
    for (int i = 1; i < n; i++) {
        if (!q3n__utf8_continues(p[0], i, p[i])) return 0;
        c = c << 6 | (p[i] & 0x3Fu);
    }
    *cp = c;
    return n;
}

/* cp as UTF-8 to out [4]; returns the bytes written, 1 .. 4.  cp is no surrogate, nor
 * beyond U+10FFFF. */
static int q3n__utf8_encode(uint8_t *out, uint32_t cp)
{
    if (cp < 0x80) {
        out[0] = (uint8_t)cp;
        return 1;
    }
    const int n = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, cp >>= 6) out[i] = (uint8_t)(0x80 | (cp & 0x3F));
    out[0] = (uint8_t)((0xF00u >> n & 0xF0u) | cp);
    return n;
}

/* ---- Allocation ----
 *
 * Hosts promise malloc's alignment only, kernels want 64 bytes; so each allocation knows where it
 * began:
 *
 *     base          p - 16              p, a multiple of 64
 *     | 0 .. 63     | base, total       | bytes that were asked for ...
 *                     q3n__alloc_head
 *
 * total is what the host's free is told, as q3n_allocator promises.  That costs 80 bytes each time
 * (64-bit machines): no caller allocates for each token. */
#define Q3N__ALIGN 64

typedef struct {
    void  *base;
    size_t bytes;
} q3n__alloc_head;

/* What q3n__alloc asks of the host for so many bytes; for accounts: sizes that exist. */
static size_t q3n__with_head(size_t bytes)
{
    return bytes + Q3N__ALIGN + sizeof(q3n__alloc_head);
}

/* NULL = no memory, or more bytes than size_t holds with the head.  They are not zeroed.  a NULL or
 * without functions: malloc. */
static void *q3n__alloc(const q3n_allocator *a, size_t bytes)
{
    size_t total;
    if (!q3n__add_size(bytes, Q3N__ALIGN + sizeof(q3n__alloc_head), &total)) return NULL;
    void *base = a && a->alloc ? a->alloc(a->user, total) : malloc(total);
    if (!base) return NULL;
    const uintptr_t first = (uintptr_t)base + sizeof(q3n__alloc_head);
    uint8_t *p = (uint8_t *)base + ((first + Q3N__ALIGN - 1) / Q3N__ALIGN * Q3N__ALIGN
                                    - (uintptr_t)base);
    const q3n__alloc_head head = { base, total };
    memcpy(p - sizeof head, &head, sizeof head);
    return p;
}

/* memory is of q3n__alloc with the same allocator, or NULL. */
static void q3n__free(const q3n_allocator *a, void *memory)
{
    if (!memory) return;
    q3n__alloc_head head;
    memcpy(&head, (uint8_t *)memory - sizeof head, sizeof head);
    if (a && a->alloc) (a->free)(a->user, head.base, head.bytes);
    else               free(head.base);
}

/* ---- Arena: one allocation, laid out by the code that uses it ----
 *
 * The same function runs twice, so that size and layout cannot differ:
 *
 *     q3n__arena a = { NULL, 0, 0 };  layout(s, &a);     every pointer NULL; a.used is the size
 *     a.base = q3n__alloc(..., a.used);  a.used = 0;
 *     layout(s, &a);                                     the pointers are real
 *
 * overflow stays set once a size did not fit: check it after the first run, not after each take.
 */
typedef struct {
    uint8_t *base;       /* NULL = only measure */
    size_t   used;
    int      overflow;   /* a size did not fit size_t */
} q3n__arena;

/* count elements of elem bytes, 64-byte aligned; NULL while measuring */
static void *q3n__arena_take(q3n__arena *a, size_t count, size_t elem)
{
    size_t bytes, end;
    if (!q3n__mul_size(count, elem, &bytes) || !q3n__add_size(a->used, bytes, &end)
        || end > SIZE_MAX - Q3N__ALIGN) {
        a->overflow = 1;
        return NULL;
    }
    void *p = a->base ? a->base + a->used : NULL;
    a->used = (end + Q3N__ALIGN - 1) / Q3N__ALIGN * Q3N__ALIGN;
    return p;
}

/* ---- Buffers: arrays whose length nobody knows before ---- */

/* Bytes that grow, twofold, so that appending n bytes copies at most 2 n; data is aligned for any
 * element.  Whoever holds one frees data with the allocator that made it. */
typedef struct {
    uint8_t *data;
    size_t   bytes, capacity;
} q3n__buffer;

/* Make room for more bytes.  0 = out of memory, the content stays. */
static int q3n__reserve(q3n__buffer *b, size_t more, const q3n_allocator *a)
{
    if (b->capacity - b->bytes >= more) return 1;
    size_t capacity = b->capacity < 256 ? 256 : b->capacity;
    while (capacity - b->bytes < more)
        if (!q3n__mul_size(capacity, 2, &capacity)) return 0;
    uint8_t *data = (uint8_t *)q3n__alloc(a, capacity);
    if (!data) return 0;
    if (b->bytes) memcpy(data, b->data, b->bytes);
    q3n__free(a, b->data);
    b->data = data;
    b->capacity = capacity;
    return 1;
}

/* ---- Sorting and searching what comes from files ---- */

/* Steps of searches and sorts that hostile input could make long.  Tests define the macro to count
 * them and hold the count against n log n: time would depend on the machine. */
#ifndef Q3N__STEP
#  define Q3N__STEP() ((void)0)
#endif

typedef int (*q3n__compare)(const void *a, const void *b);   /* < 0, 0, > 0, as qsort has it */

static void q3n__swap(uint8_t *a, uint8_t *b, size_t bytes)
{
    uint8_t t[64];
    for (size_t n; bytes > 0; bytes -= n, a += n, b += n) {
        n = bytes < sizeof t ? bytes : sizeof t;
        memcpy(t, a, n);
        memcpy(a, b, n);
        memcpy(b, t, n);
    }
}

/* Restore the heap (no parent below a child, the largest first) for n elements of which only i may
 * be too small for its place. */
static void q3n__sift_down(uint8_t *x, size_t i, size_t n, size_t size, q3n__compare compare)
{
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && compare(x + child * size, x + (child + 1) * size) < 0) child++;
        if (compare(x + i * size, x + child * size) >= 0) return;
        q3n__swap(x + i * size, x + child * size, size);
    }
}

/* Heap sort of n elements: in place, at most 2 n log2 n comparisons whatever their order.  qsort is
 * quadratic in some C libraries, for orders that a file may have, and allocates in others.  Not
 * stable: comparisons that must be stable add the place as their last key. */
static void q3n__sort(void *base, size_t n, size_t size, q3n__compare compare)
{
    uint8_t *x = (uint8_t *)base;
    for (size_t i = n / 2; i-- > 0;) q3n__sift_down(x, i, n, size, compare);
    for (size_t end = n; end > 1;) {
        end--;
        q3n__swap(x, x + end * size, size);
        q3n__sift_down(x, 0, end, size, compare);
    }
}

/* ---- CRC-32 (IEEE 802.3, reflected 0xEDB88320; zlib's), eight bytes a step ---- */

/* table[k][b]: the CRC of byte b followed by k zero bytes ([CRC]: "slicing by 8").  A CRC is
 * linear, so eight bytes contribute eight independent lookups that are XORed; byte by byte each
 * lookup would wait for the one before.  2.1 GB/s a core (EPYC). */
typedef struct { uint32_t t[8][256]; } q3n__crc_table;

static void q3n__crc_table_make(q3n__crc_table *c)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t v = i;
        for (int k = 0; k < 8; k++) v = (v >> 1) ^ (0xEDB88320u & (0u - (v & 1)));
        c->t[0][i] = v;
    }
    for (int k = 1; k < 8; k++)
        for (int i = 0; i < 256; i++)
            c->t[k][i] = (c->t[k - 1][i] >> 8) ^ c->t[0][c->t[k - 1][i] & 255];
}

/* zlib's convention: crc is 0 at first, then the result so far, so that data may be cut anywhere
 * ("123456789" gives CBF43926, in one call or in nine). */
static uint32_t q3n__crc32_with(const q3n__crc_table *c, uint32_t crc, const void *data,
                                size_t bytes)
{
    const uint8_t *p = (const uint8_t *)data;
    crc = ~crc;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        const uint32_t a = crc ^ q3n__load_u32(p), b = q3n__load_u32(p + 4);
        crc = c->t[7][a & 255] ^ c->t[6][(a >> 8) & 255] ^ c->t[5][(a >> 16) & 255]
            ^ c->t[4][a >> 24] ^ c->t[3][b & 255] ^ c->t[2][(b >> 8) & 255]
            ^ c->t[1][(b >> 16) & 255] ^ c->t[0][b >> 24];
    }
    while (bytes--) crc = (crc >> 8) ^ c->t[0][(crc ^ *p++) & 255];
    return ~crc;
}

/* The table is made anew each call (about 10 microseconds): there is no writable global to hold it
 * in.  Callers with many small pieces make it once and use q3n__crc32_with. */
static uint32_t q3n__crc32(uint32_t crc, const void *data, size_t bytes)
{
    q3n__crc_table c;
    q3n__crc_table_make(&c);
    return q3n__crc32_with(&c, crc, data, bytes);
}

/* ---- HASH of 64 bits, as session files have it ----
 *
 * Words of 64 bits, K = 0x9E3779B97F4A7C15, all arithmetic modulo 2^64.
 *     lane[i] = mix(seed + K (i + 1))                         i = 0 .. 7
 *     lane[i] = rotate_left((lane[i] ^ word[i]) K, 29)        for every 64 bytes; zeros fill up
 *     hash    = mix(bytes ^ seed); for each lane hash = rotate_left((hash ^ mix(lane)) K, 29);
 *               mix(hash) at the end
 *     mix(x): x = (x ^ x >> 30) 0xBF58476D1CE4E5B9; x = (x ^ x >> 27) 0x94D049BB133111EB;
 *             x ^ x >> 31
 * Every step is a bijection of the lane and of the word: no change of one word goes unseen.
 *
 * For damage and for finding equal texts, not against forgery: anyone can make a hash that fits.
 * Eight lanes, because a step is a multiplication that waits for the one before it in its lane: 17
 * GB/s in plain C on one core, 14 with four lanes (gcc 12 -O2); CRC-32 above is an eighth of that.
 * The lanes are local variables in q3n__hash_lines so that they stay in registers. */
#define Q3N__GOLDEN 0x9E3779B97F4A7C15ull

/* A bijection of 64-bit words whose outputs for consecutive inputs look independent. */
static uint64_t q3n__mix64(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

static uint64_t q3n__hash_step(uint64_t lane, uint64_t word)
{
    const uint64_t x = (lane ^ word) * Q3N__GOLDEN;
    return x << 29 | x >> 35;
}

typedef struct { uint64_t lane[8], seed, bytes; } q3n__hash;

static void q3n__hash_begin(q3n__hash *h, uint64_t seed)
{
    for (uint64_t i = 0; i < 8; i++) h->lane[i] = q3n__mix64(seed + Q3N__GOLDEN * (i + 1));
    h->seed = seed;
    h->bytes = 0;
}

static void q3n__hash_lines(q3n__hash *h, const uint8_t *p, size_t n)   /* lines of 64 bytes */
{
    uint64_t a = h->lane[0], b = h->lane[1], c = h->lane[2], d = h->lane[3];
    uint64_t e = h->lane[4], f = h->lane[5], g = h->lane[6], i = h->lane[7];
    for (; n > 0; n--, p += 64) {
        a = q3n__hash_step(a, q3n__load_u64(p));
        b = q3n__hash_step(b, q3n__load_u64(p + 8));
        c = q3n__hash_step(c, q3n__load_u64(p + 16));
        d = q3n__hash_step(d, q3n__load_u64(p + 24));
        e = q3n__hash_step(e, q3n__load_u64(p + 32));
        f = q3n__hash_step(f, q3n__load_u64(p + 40));
        g = q3n__hash_step(g, q3n__load_u64(p + 48));
        i = q3n__hash_step(i, q3n__load_u64(p + 56));
    }
    const uint64_t lane[8] = { a, b, c, d, e, f, g, i };
    memcpy(h->lane, lane, sizeof lane);
}

/* Every call but the last adds a multiple of 64 bytes. */
static void q3n__hash_add(q3n__hash *h, const void *data, size_t bytes)
{
    Q3N_ASSERT(h->bytes % 64 == 0);
    const size_t whole = bytes / 64 * 64;
    q3n__hash_lines(h, (const uint8_t *)data, whole / 64);
    if (whole < bytes) {
        uint8_t last[64] = { 0 };
        memcpy(last, (const uint8_t *)data + whole, bytes - whole);
        q3n__hash_lines(h, last, 1);
    }
    h->bytes += bytes;
}

/* The lanes in order, so that words exchanged between lanes do not cancel.  bytes tells texts apart
 * that differ only in zeros at their end, with which the last line is filled up. */
static uint64_t q3n__hash_end(const q3n__hash *h)
{
    uint64_t x = q3n__mix64(h->bytes ^ h->seed);
    for (int i = 0; i < 8; i++) x = q3n__hash_step(x, q3n__mix64(h->lane[i]));
    return q3n__mix64(x);
}

static uint64_t q3n__hash_of(uint64_t seed, const void *data, size_t bytes)
{
    q3n__hash h;
    q3n__hash_begin(&h, seed);
    q3n__hash_add(&h, data, bytes);
    return q3n__hash_end(&h);
}

/* =====================================================================================
 * [4] ERRORS                                                                 >>errors
 *
 * Error records and notes.  Names, words and paths in them may be hostile, so every message is made
 * here, and is valid UTF-8 without control characters whatever went into it.
 *
 * The path of a message, which q3n__fail and q3n__log share:
 *
 *     format, args -> vsnprintf, 5000 bytes -> q3n__show: \xNN for what must not be printed,
 *                                              the middle left out if it is too long -> record
 *
 * Later code may assume that %s takes any bytes of a file up to a 0, and that what it says first
 * and last arrives.  Knows nothing of files and models.
 * ===================================================================================== */

/* Neither a control character (C0, DEL, C1: terminals obey them), nor a line or paragraph separator
 * (U+2028, 2029), nor one that overrides or isolates the direction of text (U+202A to 202E, 2066 to
 * 2069; Unicode Annex 9), which could make a name read as another. */
static int q3n__is_printable(uint32_t cp)
{
    return cp >= 0x20 && !(cp >= 0x7F && cp < 0xA0) && !(cp >= 0x2028 && cp <= 0x202E)
        && !(cp >= 0x2066 && cp <= 0x2069);
}

/* What a message shows of the character at *p < end, which *p leaves after: itself, or \xNN for
 * each of its bytes if it is not printable or no UTF-8.  A backslash stays: what was shown before
 * is shown the same again.  Returns the bytes of shown, without terminator. */
static int q3n__show_char(const uint8_t **p, const uint8_t *end, char shown[16])
{
    static const char digits[] = "0123456789ABCDEF";
    uint32_t cp;
    const int bytes = q3n__utf8_decode(*p, end, &cp), n = bytes ? bytes : 1;
    const int as_is = bytes && q3n__is_printable(cp);
    for (int i = 0; i < n; i++) {
        const uint8_t b = *(*p)++;
        const char escaped[4] = { '\\', 'x', digits[b >> 4], digits[b & 15] };
        if (as_is) shown[i] = (char)b;
        else       memcpy(shown + 4 * i, escaped, 4);
    }
    return as_is ? n : 4 * n;
}

/* Append characters of [p, end) as they are shown to out, which has n bytes, while it stays within
 * room.  Returns where it stopped. */
static const uint8_t *q3n__show_some(char *out, size_t *n, size_t room, const uint8_t *p,
                                     const uint8_t *end)
{
    while (p < end) {
        char shown[16];
        const uint8_t *next = p;
        const size_t bytes = (size_t)q3n__show_char(&next, end, shown);
        if (*n + bytes > room) break;
        memcpy(out + *n, shown, bytes);
        *n += bytes;
        p = next;
    }
    return p;
}

/* Write text [bytes] as it is shown to out [size], ended by 0.  If it does not fit, what lies
 * between its first fifth and its end is left out: a message begins with where and ends with what
 * was expected.  For the 500 bytes of a record: up to 99, " [...] ", up to 393. */
static void q3n__show(char *out, size_t size, const char *text, size_t bytes)
{
    static const char gap[] = " [...] ";
    const size_t room = size - 1, head = room / 5, tail = room - head - (sizeof gap - 1);
    const uint8_t *p = (const uint8_t *)text, *end = p + bytes;
    char shown[16];
    size_t total = 0, n = 0;
    while (p < end) total += (size_t)q3n__show_char(&p, end, shown);
    p = (const uint8_t *)text;
    if (total > room) {
        p = q3n__show_some(out, &n, head, p, end);
        for (total -= n; total > tail;) total -= (size_t)q3n__show_char(&p, end, shown);
        memcpy(out + n, gap, sizeof gap - 1);
        n += sizeof gap - 1;
    }
    q3n__show_some(out, &n, room, p, end);
    out[n] = 0;
}

#define Q3N__MESSAGE_BYTES 5000   /* before they are shown: a path and what is the matter with it */

/* Make a message of at most size - 1 bytes.  What vsnprintf cut off loses its last character too:
 * half of one would be shown as \xNN. */
static void q3n__message(char *out, size_t size, const char *format, va_list args)
{
    char text[Q3N__MESSAGE_BYTES];
    const int n = vsnprintf(text, sizeof text, format, args);
    size_t bytes = n < 0 ? 0 : (size_t)n;
    if (bytes >= sizeof text) {                           /* cut: perhaps within a character */
        bytes = sizeof text - 1;
        while ((text[bytes - 1] & 0xC0) == 0x80 && bytes > sizeof text - 4) bytes--;
        bytes--;
    }
    q3n__show(out, size, text, bytes);
}

/* Fill err (NULL = not wanted) and return code. */
static Q3N__PRINTF(4, 5)
q3n_result q3n__fail(q3n_error *err, q3n_result code, int64_t offset, const char *format, ...)
{
    if (err) {
        va_list args;
        va_start(args, format);
        err->code = code;
        err->offset = offset;
        q3n__message(err->message, sizeof err->message, format, args);
        va_end(args);
    }
    return code;
}

/* A note to the host's logger, in the thread of the call that it is about; without a logger nothing
 * is made. */
static Q3N__PRINTF(3, 4)
void q3n__log(const q3n_logger *l, q3n_log_level level, const char *format, ...)
{
    if (!l || !l->log) return;
    char text[500];
    va_list args;
    va_start(args, format);
    q3n__message(text, sizeof text, format, args);
    va_end(args);
    (l->log)(l->user, level, text);   /* <tgmath.h> has a macro log(x) */
}

/* The error record of objects that are NULL. */
static const q3n_error q3n__no_object = { Q3N_ERR_ARG, -1, "NULL was given for an object" };

Q3N_DEF const char *q3n_result_string(q3n_result r)
{
    switch (r) {
#define Q3N__X(name, value, message) case Q3N_##name: return message;
    Q3N_RESULT_LIST(Q3N__X)
#undef Q3N__X
    case Q3N__RESULT_MIN: break;
    }
    return "unknown result";
}

Q3N_DEF int q3n_version(void)     { return Q3N_VERSION; }
Q3N_DEF int q3n_abi_version(void) { return Q3N_ABI; }

/* ---- Structs that begin with their size ---- */
#define Q3N__MAX_STRUCT 4096     /* a size above it is no size */

/* The size that the caller's struct says it has, 0 if it can be none. */
static size_t q3n__struct_size(const void *s)
{
    size_t size;
    memcpy(&size, s, sizeof size);
    return size < sizeof size || size > Q3N__MAX_STRUCT ? 0 : size;
}

/* The caller's struct has a size, and zeros where this library, which knows [room], has none. */
static q3n_result q3n__struct_check(const void *in, size_t room, const char *name, q3n_error *err)
{
    const uint8_t *bytes = (const uint8_t *)in;
    const size_t size = q3n__struct_size(in);
    if (size == 0)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "%s: its size is not set: begin with Q3N_INIT or "
                         ".size = sizeof", name);
    for (size_t i = room; i < size; i++)
        if (bytes[i])
            return q3n__fail(err, Q3N_ERR_UNSUPPORTED, -1, "%s: byte %zu of %zu is of a field that "
                             "this version of the library, which has %zu, does not know", name, i,
                             size, room);
    return Q3N_OK;
}

/* Read a struct of the caller's, NULL = all defaults, into out [room]: what it does not have is 0,
 * and what this library does not have must be. */
static q3n_result q3n__struct_read(void *out, size_t room, const void *in, const char *name,
                                   q3n_error *err)
{
    const q3n_result r = in ? q3n__struct_check(in, room, name, err) : Q3N_OK;
    if (r != Q3N_OK) return r;
    const size_t size = in ? q3n__struct_size(in) : 0;
    memset(out, 0, room);
    if (in) memcpy(out, in, size < room ? size : room);
    memcpy(out, &room, sizeof room);
    return Q3N_OK;
}

/* Give a struct from [room] to the caller's out: as much as it has, and 0 where it has more. */
static q3n_result q3n__struct_write(void *out, size_t room, const void *from)
{
    const size_t size = q3n__struct_size(out);
    if (size == 0) return Q3N_ERR_ARG;
    memset((uint8_t *)out + sizeof size, 0, size - sizeof size);
    memcpy((uint8_t *)out + sizeof size, (const uint8_t *)from + sizeof size,
           (size < room ? size : room) - sizeof size);
    return Q3N_OK;
}

/* A field that has no meaning yet, so that it can get one. */
static q3n_result q3n__check_zero(int zero, const char *name, q3n_error *err)
{
    return zero == 0 ? Q3N_OK : q3n__fail(err, Q3N_ERR_UNSUPPORTED, -1, "%s: field zero is %d",
                                          name, zero);
}

/* =====================================================================================
 * [5] FILES                                                                   >>files
 *
 * One way to read a file and one to write it, for models, sessions and caches.  What is read is a
 * regular file, and opening never waits.  What is written has a name of its own until it is whole:
 * a writer that fails, is stopped or killed leaves what stood under the path as it was.
 *
 *     q3n__input_open    read ...             close(r)      close adds the system's reason to r
 *     q3n__input_map     -> data, bytes                     a whole file, for models
 *     q3n__output_open   write ... (rewind)   close(r)      only close(Q3N_OK) shows the file
 *
 * Reads and writes return 0 on failure and store the system's code; open and close make the
 * message, "PATH: cannot write: REASON".  After a failed write the others do nothing: a writer may
 * go on and look once, at the end.
 * Later code may assume that all of this links with Q3N_NO_STDIO too, where opening fails.  Knows
 * no format, only bytes.
 * ===================================================================================== */
typedef struct {
    q3n__file      file;
    q3n__file_info info;
    const char    *path;
    int            code;                 /* why a read failed, 0 = none did                      */
} q3n__input;

typedef struct {
    const uint8_t *data;
    size_t         bytes;
    q3n__file_id   id;
} q3n__mapping;

typedef struct {
    q3n__file   file;
    const char *path;                    /* as the caller wrote it                               */
    int         code;                    /* why a write failed, 0 = none did                     */
    char        target[Q3N__PATH_ROOM];  /* where the path's links lead                          */
    char        part[Q3N__PATH_ROOM];    /* the file's name until it is whole                    */
} q3n__output;

#if Q3N__HAS_FILES
static const char *q3n__file_reason(int code, char text[160])
{
    switch (code) {
    case Q3N__FILE_BAD_PATH:     return "the path is empty, too long or not UTF-8";
    case Q3N__FILE_IS_DIRECTORY: return "it is a directory";
    case Q3N__FILE_NOT_REGULAR:  return "it is not a regular file";
    case Q3N__FILE_ENDS:         return "the file ends there";
    }
    q3n__file_reason_of(code, text, 160);
    return text;
}

/* "models/x.q3n: cannot open: Permission denied" */
static q3n_result q3n__file_fail(q3n_error *err, q3n_result r, const char *path, const char *what,
                                 int code)
{
    char reason[160];
    return q3n__fail(err, r, -1, "%.*s: %s: %s", Q3N__PATH_ROOM, path, what,
                     q3n__file_reason(code, reason));
}

/* ---- Reading ---- */

/* Q3N_ERR_NO_FILE if nothing has that name. */
static q3n_result q3n__input_open(q3n__input *in, const char *path, q3n_error *err)
{
    memset(in, 0, sizeof *in);
    in->path = path;
    const int code = q3n__file_open(&in->file, path, &in->info);
    if (code == 0) return Q3N_OK;
    return q3n__file_fail(err, q3n__file_absent(code) ? Q3N_ERR_NO_FILE : Q3N_ERR_IO, path,
                          "cannot open", code);
}

/* 0 = failed: q3n__input_close says why, if it is not that the file ends. */
static int q3n__input_read(q3n__input *in, void *data, size_t bytes)
{
    in->code = q3n__file_read(&in->file, data, bytes);
    return in->code == 0;
}

/* r is how things went.  Returns r; if the system refused a read (code > 0), with its reason as the
 * message.  That the file ended (code < 0) the caller has reported already, in terms of its format.
 */
static q3n_result q3n__input_close(q3n__input *in, q3n_result r, q3n_error *err)
{
    q3n__file_close(&in->file);
    return in->code > 0 ? q3n__file_fail(err, r, in->path, "cannot read", in->code) : r;
}

/* A whole file in memory, as the system reads it when it is used.  The mapping outlives the file's
 * handle; q3n__file_unmap ends it.  Errors: Q3N_ERR_NO_FILE, _IO; _FORMAT (nothing can be mapped of
 * an empty file); _MEMORY (wasm32: size_t is narrower than a file). */
static q3n_result q3n__input_map(q3n__mapping *out, const char *path, q3n_error *err)
{
    q3n__input in;
    memset(out, 0, sizeof *out);
    q3n_result r = q3n__input_open(&in, path, err);
    if (r != Q3N_OK) return r;
    out->bytes = (size_t)in.info.bytes;
    out->id = in.info.id;
    if (out->bytes == 0) {
        r = q3n__fail(err, Q3N_ERR_FORMAT, 0, "%s: the file is empty", path);
    } else if ((int64_t)out->bytes != in.info.bytes) {
        r = q3n__fail(err, Q3N_ERR_MEMORY, -1, "%s: %lld bytes do not fit the address space", path,
                      (long long)in.info.bytes);
    } else {
        const int code = q3n__file_map(&in.file, out->bytes, &out->data);
        if (code) r = q3n__file_fail(err, Q3N_ERR_IO, path, "cannot map", code);
    }
    return q3n__input_close(&in, r, err);
}

/* found is called for each regular file of the directory whose name begins with prefix. */
static q3n_result q3n__input_list(const char *path, const char *prefix, q3n__file_found found,
                                  void *user, q3n_error *err)
{
    const int code = q3n__directory_list(path, prefix, found, user);
    return code ? q3n__file_fail(err, Q3N_ERR_IO, path, "cannot read", code) : Q3N_OK;
}

/* ---- Writing ----
 *
 *     q3n__output_open(path)      target = where links of the path lead, part = TARGET.<hex>.part,
 *                                 made with O_EXCL: no other writer has it, no link is followed
 *     q3n__output_write ...       into the part
 *     q3n__output_close(Q3N_OK)   fsync(part), close, rename(part, target), fsync(directory)
 *     q3n__output_close(other)    unlink(part)
 *
 * The part lies beside the target because rename(2) replaces within one file system only, and at
 * once: who opens the path finds the old file or the new one, whole.  fsync comes first, or a power
 * failure could leave the new name without the new bytes.  A killed process leaves its part. */
#define Q3N__PART_ATTEMPTS 100
#define Q3N__PART_NAME     200           /* bytes of the file's name in the part's, of 255       */

/* Where the path leads, and what is there; info is zeros if nothing is.  A file that may not be
 * written is not replaced either: rename asks only for the permission of the directory. */
static int q3n__output_target(q3n__output *o, q3n__file_info *info)
{
    const size_t bytes = strlen(o->path);
    memset(info, 0, sizeof *info);
    if (bytes == 0 || bytes >= sizeof o->target) return Q3N__FILE_BAD_PATH;
    memcpy(o->target, o->path, bytes + 1);
    int code = q3n__file_look(o->path, info);
    if (code == 0) code = q3n__file_writable(o->path);
    return code && !q3n__file_absent(code) ? code : q3n__file_resolve(o->target);
}

/* A name beside the target that no other writer takes: "x.q3n.0123456789abcdef.part".  Cut before a
 * character, not within. */
static int q3n__output_name(q3n__output *o, uint64_t number)
{
    const size_t folder = q3n__path_folder(o->target);
    size_t bytes = strlen(o->target + folder);
    if (bytes > Q3N__PART_NAME) bytes = Q3N__PART_NAME;
    while (bytes > 0 && (o->target[folder + bytes] & 0xC0) == 0x80) bytes--;
    const int n = snprintf(o->part, sizeof o->part, "%.*s.%016llx.part", (int)(folder + bytes),
                           o->target, (unsigned long long)number);
    return n > 0 && n < (int)sizeof o->part ? 0 : Q3N__FILE_BAD_PATH;
}

/* Make the part.  The number is a guess that need not be good: a name that is taken is answered by
 * the next one, 100 times.  Beside an old file the part is closed to others (0600) until it has
 * that file's owner, group and mode: it may be a secret.  On failure no part is left. */
static int q3n__output_create(q3n__output *o, const q3n__file_info *old)
{
    const int replaces = old->id.volume || old->id.number;
    const uint64_t seed = (uint64_t)q3n__now() ^ q3n__process_id() << 40 ^ (uintptr_t)o;
    int code = 0;
    for (uint64_t i = 0; i < Q3N__PART_ATTEMPTS; i++) {
        code = q3n__output_name(o, q3n__mix64(seed + i));
        if (code == 0) code = q3n__file_create(&o->file, o->part, replaces);
        if (!q3n__file_exists(code)) break;
    }
    if (code || !replaces) return code;
    code = q3n__file_adopt(&o->file, old);
    if (code) {
        q3n__file_close(&o->file);
        q3n__file_remove(o->part);
    }
    return code;
}

/* Begin a file that q3n__output_close puts under path.  A link is followed: the file that it leads
 * to is replaced, its mode is taken over.  input (NULL, zeros = none): the file that is being read
 * meanwhile; to write over it is Q3N_ERR_ARG, however its path is spelt. */
static q3n_result q3n__output_open(q3n__output *o, const char *path, const q3n__file_id *input,
                                   q3n_error *err)
{
    q3n__file_info old;
    o->path = path;
    o->code = 0;
    int code = q3n__output_target(o, &old);
    if (code == 0 && input && (old.id.volume || old.id.number)
        && old.id.volume == input->volume && old.id.number == input->number)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "%s: is the file that is being read: give"
                         " another name", path);
    if (code == 0) code = q3n__output_create(o, &old);
    return code ? q3n__file_fail(err, Q3N_ERR_IO, path, "cannot write", code) : Q3N_OK;
}

/* 0 = failed: q3n__output_close says why. */
static int q3n__output_write(q3n__output *o, const void *data, size_t bytes)
{
    if (o->code == 0) o->code = q3n__file_write(&o->file, data, bytes);
    return o->code == 0;
}

/* Back to the first byte: for tools/q3n_make.h, which knows the head of a file last. */
static Q3N__UNUSED int q3n__output_rewind(q3n__output *o)
{
    if (o->code == 0) o->code = q3n__file_rewind(&o->file);
    return o->code == 0;
}

/* r is how things went: only Q3N_OK puts the file in its place, anything else removes it.  Returns
 * r, or what went wrong with the file. */
static q3n_result q3n__output_close(q3n__output *o, q3n_result r, q3n_error *err)
{
    int code = o->code;
    if (r == Q3N_OK && code == 0) code = q3n__file_sync(&o->file);
    const int closed = q3n__file_close(&o->file);
    if (r == Q3N_OK && code == 0) code = closed;
    if (r == Q3N_OK && code == 0) code = q3n__file_rename(o->part, o->target);
    if (r == Q3N_OK && code == 0) {
        o->part[q3n__path_folder(o->part)] = 0;
        q3n__directory_sync(o->part);
        return Q3N_OK;
    }
    q3n__file_remove(o->part);
    return code ? q3n__file_fail(err, Q3N_ERR_IO, o->path, "cannot write", code) : r;
}
#else
/* ---- Without files (Q3N_NO_STDIO) ----
 *
 * The same functions, so that no caller has an #if: opening fails, and so nothing else is reached.
 */
static q3n_result q3n__no_files(const char *path, q3n_error *err)
{
    return q3n__fail(err, Q3N_ERR_UNSUPPORTED, -1, "%s: built without files (Q3N_NO_STDIO)",
                     path);
}

static q3n_result q3n__input_open(q3n__input *in, const char *path, q3n_error *err)
{
    memset(in, 0, sizeof *in);
    return q3n__no_files(path, err);
}

static int q3n__input_read(q3n__input *in, void *data, size_t bytes)
{
    (void)in; (void)data; (void)bytes;
    return 0;
}

static q3n_result q3n__input_close(q3n__input *in, q3n_result r, q3n_error *err)
{
    (void)in; (void)err;
    return r;
}

static q3n_result q3n__input_map(q3n__mapping *out, const char *path, q3n_error *err)
{
    memset(out, 0, sizeof *out);
    return q3n__no_files(path, err);
}

static void q3n__file_unmap(const uint8_t *data, size_t bytes) { (void)data; (void)bytes; }

static q3n_result q3n__output_open(q3n__output *o, const char *path, const q3n__file_id *input,
                                   q3n_error *err)
{
    (void)input;
    o->path = path;
    return q3n__no_files(path, err);
}

static int q3n__output_write(q3n__output *o, const void *data, size_t bytes)
{
    (void)o; (void)data; (void)bytes;
    return 0;
}

static Q3N__UNUSED int q3n__output_rewind(q3n__output *o) { (void)o; return 0; }

static q3n_result q3n__output_close(q3n__output *o, q3n_result r, q3n_error *err)
{
    (void)o; (void)err;
    return r;
}

static int q3n__file_remove(const char *path) { (void)path; return 0; }

static q3n_result q3n__input_list(const char *path, const char *prefix, q3n__file_found found,
                                  void *user, q3n_error *err)
{
    (void)prefix; (void)found; (void)user;
    return q3n__no_files(path, err);
}
#endif

/* =====================================================================================
 * [6] PARALLEL                                                             >>parallel
 *
 * One primitive: q3n__parallel runs a task over [0, n) in ranges and waits.  Threads claim ranges
 * from a counter, so a thread that waits for a CPU holds up no others; which thread computes a
 * range never changes its result.  Kernels and model know nothing else of threads.
 *
 * A pool has one caller at a time.  Its workers wait between jobs; with an executor of the host's
 * there are none, and the host's threads call q3n__pool_work.  The word `ticket` holds all that a
 * claim depends on, generation << 32 | unclaimed ranges, so that one compare-and-swap decides it:
 *
 *     caller      writes fn, arg, n, n_ranges; n_done = 0; then ticket = (gen + 1, 12)
 *     any thread  ticket (gen + 1, 12) -> (gen + 1, 11): range 12 - 12 = 0 is its own
 *                 ticket (gen + 1, 11) -> (gen + 1, 10): range 1 ...
 *     caller      returns when n_done is 12
 *
 * A thread that wakes late holds an old generation: its claim fails, so it never runs a range of a
 * job that it does not know.  Generations have 31 bits: a ticket is never negative.
 *
 * No wake-up is lost.  Whoever wants to sleep says so first (n_sleeping, caller_sleeps) and then
 * looks once more at what it waits for; whoever makes that true does so first and then looks for
 * sleepers.  All four are sequentially consistent, so at least one sees the other: either nobody
 * sleeps, or the waker finds a sleeper and takes the mutex to broadcast.  The sleeper holds the
 * mutex from its word until the condition variable has it, so the broadcast cannot fall between.
 * ===================================================================================== */
typedef void (*q3n__task)(void *arg, int begin, int end);

typedef struct q3n__pool {
    q3n__atomic  ticket;        /* generation << 32 | ranges not yet claimed                     */
    q3n__atomic  n_done;        /* ranges finished in this generation                            */
    q3n__atomic  n_sleeping;    /* workers asleep                                                */
    q3n__atomic  caller_sleeps;
    q3n__atomic  stop;
    q3n__task    fn;            /* the job: fixed from the ticket's store to the last range      */
    void        *arg;
    int          n, n_ranges;
    int          n_threads;     /* the calling thread counts                                     */
    int          n_started;     /* threads that this pool made                                   */
    int          has_locks;
    int          n_wakes;       /* how often sleeping workers were woken; no one but tests asks  */
    q3n_executor executor;      /* run != NULL: no threads of our own                            */
    q3n__mutex   mutex;
    q3n__cond    work, done;
    q3n__thread *threads;
} q3n__pool;

/* Pause this many times before sleeping: about 50 microseconds, longer than the gaps between two
 * regions of a layer, shorter than anything a person or a battery would notice. */
#define Q3N__SPINS 2000

/* Claim a range of generation gen; -1 when none is left or another generation runs. */
static int q3n__pool_claim(q3n__pool *p, int64_t gen)
{
    for (;;) {
        const int64_t t = q3n__atomic_load(&p->ticket);
        if (t >> 32 != gen || (t & 0xffffffff) == 0) return -1;
        if (q3n__atomic_cas(&p->ticket, t, t - 1)) return p->n_ranges - (int)(t & 0xffffffff);
    }
}

/* Run ranges of generation gen until none is left.  Everything of the job is read before n_done
 * counts the range: after the last one the caller may be writing the next job. */
static void q3n__pool_work(q3n__pool *p, int64_t gen)
{
    int range;
    while ((range = q3n__pool_claim(p, gen)) >= 0) {
        const int begin = (int)((int64_t)p->n * range / p->n_ranges);
        const int end   = (int)((int64_t)p->n * (range + 1) / p->n_ranges);
        const int last  = p->n_ranges - 1;
        p->fn(p->arg, begin, end);
        if (q3n__atomic_add(&p->n_done, 1) == last && q3n__atomic_load(&p->caller_sleeps)) {
            q3n__mutex_lock(&p->mutex);
            q3n__cond_broadcast(&p->done);
            q3n__mutex_unlock(&p->mutex);
        }
    }
}

/* Wait for a generation other than seen, spinning first; returns it. */
static int64_t q3n__pool_next(q3n__pool *p, int64_t seen)
{
    for (int i = 0; i < Q3N__SPINS; i++) {
        const int64_t gen = q3n__atomic_load(&p->ticket) >> 32;
        if (gen != seen || q3n__atomic_load(&p->stop)) return gen;
        q3n__pause();
    }
    q3n__mutex_lock(&p->mutex);
    q3n__atomic_add(&p->n_sleeping, 1);
    while (q3n__atomic_load(&p->ticket) >> 32 == seen && !q3n__atomic_load(&p->stop))
        q3n__cond_wait(&p->work, &p->mutex);
    q3n__atomic_add(&p->n_sleeping, -1);
    q3n__mutex_unlock(&p->mutex);
    return q3n__atomic_load(&p->ticket) >> 32;
}

/* A worker.  It need not see every generation: those that others finished meanwhile are skipped. */
static void q3n__pool_main(void *arg)
{
    q3n__pool *p = (q3n__pool *)arg;
    int64_t gen = 0;
    for (;;) {
        gen = q3n__pool_next(p, gen);
        if (q3n__atomic_load(&p->stop)) return;
        q3n__pool_work(p, gen);
    }
}

/* The caller has no range left to claim; wait for those that workers still run. */
static void q3n__pool_wait(q3n__pool *p)
{
    const int n = p->n_ranges;
    for (int i = 0; i < Q3N__SPINS; i++) {
        if (q3n__atomic_load(&p->n_done) == n) return;
        q3n__pause();
    }
    q3n__mutex_lock(&p->mutex);
    q3n__atomic_store(&p->caller_sleeps, 1);
    while (q3n__atomic_load(&p->n_done) != n) q3n__cond_wait(&p->done, &p->mutex);
    q3n__atomic_store(&p->caller_sleeps, 0);
    q3n__mutex_unlock(&p->mutex);
}

/* What the host's executor calls n_threads times.  The ticket cannot move to another job meanwhile:
 * the caller is inside `run`, which returns after all of these, and they leave no range undone. */
static void q3n__pool_executor_task(void *arg, int i)
{
    q3n__pool *p = (q3n__pool *)arg;
    (void)i;
    q3n__pool_work(p, q3n__atomic_load(&p->ticket) >> 32);
}

/* Run fn over [0, n) in ranges of at least grain items and wait.  Runs inline when one range is all
 * there is.  The split depends on n, grain and the thread count, never on timing.
 *
 *     n 100, grain 8, 3 threads: 100 / 8 = 12 ranges, [0, 8), [8, 16), [16, 25), ... [91, 100)
 *
 * Up to four ranges a thread: fewer would leave all waiting for the slowest, more cost claims.
 * What tasks wrote is visible to the caller on return.  fn must not call q3n__parallel on the same
 * pool. */
static void q3n__parallel(q3n__pool *p, int n, int grain, q3n__task fn, void *arg)
{
    if (n <= 0) return;
    int ranges = n / (grain < 1 ? 1 : grain);
    if (ranges > p->n_threads * 4) ranges = p->n_threads * 4;
    if (ranges <= 1 || p->n_threads == 1) {
        fn(arg, 0, n);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    p->n = n;
    p->n_ranges = ranges;
    q3n__atomic_store(&p->n_done, 0);
    const int64_t gen = ((q3n__atomic_load(&p->ticket) >> 32) + 1) & 0x7fffffff;
    q3n__atomic_store(&p->ticket, (gen << 32) | ranges);
    if (p->executor.run) {
        p->executor.run(p->executor.user, p->n_threads, q3n__pool_executor_task, p);
        return;
    }
    if (q3n__atomic_load(&p->n_sleeping) > 0) {
        p->n_wakes++;
        q3n__mutex_lock(&p->mutex);
        q3n__cond_broadcast(&p->work);
        q3n__mutex_unlock(&p->mutex);
    }
    q3n__pool_work(p, gen);
    q3n__pool_wait(p);
}

/* Stop and join the workers; no job may run.  A pool without threads of its own has nothing to
 * close. */
static void q3n__pool_close(q3n__pool *p)
{
    if (!p->has_locks) return;
    q3n__mutex_lock(&p->mutex);
    q3n__atomic_store(&p->stop, 1);
    q3n__cond_broadcast(&p->work);
    q3n__mutex_unlock(&p->mutex);
    for (int i = 0; i < p->n_started; i++) q3n__thread_join(&p->threads[i]);
    q3n__cond_free(&p->work);
    q3n__cond_free(&p->done);
    q3n__mutex_free(&p->mutex);
    p->has_locks = 0;
}

/* p is zeroed, threads has room for n_threads - 1 and neither moves while the pool is open.
 * n_threads 1, or an executor: no thread is started.  On failure the workers that did start are
 * joined. */
static q3n_result q3n__pool_open(q3n__pool *p, int n_threads, const q3n_executor *executor,
                                 q3n__thread *threads, q3n_error *err)
{
    p->n_threads = n_threads;
    p->threads = threads;
    if (executor->run) p->executor = *executor;
    if (executor->run || n_threads == 1) return Q3N_OK;
    if (!q3n__mutex_init(&p->mutex)) return q3n__fail(err, Q3N_ERR_THREAD, -1, "no mutex");
    if (!q3n__cond_init(&p->work)) {
        q3n__mutex_free(&p->mutex);
        return q3n__fail(err, Q3N_ERR_THREAD, -1, "no condition variable");
    }
    if (!q3n__cond_init(&p->done)) {
        q3n__cond_free(&p->work);
        q3n__mutex_free(&p->mutex);
        return q3n__fail(err, Q3N_ERR_THREAD, -1, "no condition variable");
    }
    p->has_locks = 1;
    while (p->n_started < n_threads - 1) {
        if (!q3n__thread_start(&threads[p->n_started], q3n__pool_main, p)) {
            const int n = p->n_started;
            q3n__pool_close(p);
            return q3n__fail(err, Q3N_ERR_THREAD, -1, "thread %d of %d did not start", n + 2,
                             n_threads);
        }
        p->n_started++;
    }
    return Q3N_OK;
}

/* =====================================================================================
 * [7] TYPES                                                                   >>types
 *
 * What a tensor type is, and the kernel table: every function that the model needs from an
 * instruction set.  The scalar section defines what each entry computes; the model knows only this
 * struct.  Whatever the ISA, one output element depends on its own row and its own token, never on
 * how many tokens or rows a call covers: splitting the work otherwise changes no bit.
 * ===================================================================================== */
typedef struct {
    const char *name;
    int         block_len;      /* elements */
    int         block_bytes;
} q3n__type_info;

#define Q3N__TILE_ROWS 16        /* of a quantised type                                          */
#define Q3N__GROUP     32        /* columns that share a scale; two groups make a block          */

static const q3n__type_info q3n__types[Q3N_TYPE_COUNT] = {
#define Q3N__X(ID, id, number, block_len, block_bytes) [number] = { #id, block_len, block_bytes },
    Q3N_TYPE_LIST(Q3N__X)
#undef Q3N__X
};

/* Types are bits of masks and places in q3n_model_stats. */
typedef char q3n__types_are_32[Q3N_TYPE_COUNT <= 32 ? 1 : -1];

Q3N_DEF const char *q3n_type_name(q3n_type t)
{
    return (unsigned)t < Q3N_TYPE_COUNT ? q3n__types[t].name : NULL;
}

Q3N_DEF q3n_result q3n_type_from_name(const char *name, q3n_type *out)
{
    if (!name || !out) return Q3N_ERR_ARG;
    for (int t = 0; t < Q3N_TYPE_COUNT; t++)
        if (q3n__types[t].name && strcmp(q3n__types[t].name, name) == 0) {
            *out = (q3n_type)t;
            return Q3N_OK;
        }
    return Q3N_ERR_ARG;
}

static int q3n__is_quantised(q3n_type t) { return q3n__types[t].block_len > 1; }

/* Bytes of one row of n elements, or of its share of a tile: rows that are a multiple of 16 start
 * at r * row_bytes in every type.  2048 elements: f32 8192, bf16 4096, q8 2176, q6 1664, q4 1152,
 * q3 896. */
static uint64_t q3n__row_bytes64(q3n_type t, int64_t n)
{
    const uint64_t len = (uint64_t)q3n__types[t].block_len;
    return ((uint64_t)n + len - 1) / len * (uint64_t)q3n__types[t].block_bytes;
}

static size_t q3n__row_bytes(q3n_type t, int n) { return (size_t)q3n__row_bytes64(t, n); }

/* Rows as they are stored: whole tiles. */
static int64_t q3n__stored_rows(q3n_type t, int64_t rows)
{
    return q3n__is_quantised(t) ? (rows + Q3N__TILE_ROWS - 1) / Q3N__TILE_ROWS * Q3N__TILE_ROWS
                                : rows;
}

Q3N_DEF int64_t q3n_type_bytes(q3n_type type, int64_t rows, int64_t cols)
{
    if (!q3n_type_name(type) || rows < 1 || cols < 1 || rows > INT32_MAX || cols > INT32_MAX / 8)
        return 0;
    return q3n__stored_rows(type, rows) * (int64_t)q3n__row_bytes(type, (int)cols);
}

/* ---- Float conversions ---- */
static float q3n__bits_f32(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static uint32_t q3n__f32_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static float q3n__bf16_to_f32(uint16_t h) { return q3n__bits_f32((uint32_t)h << 16); }

/* Round to nearest even; NaN stays NaN. */
static uint16_t q3n__f32_to_bf16(float f)
{
    const uint32_t u = q3n__f32_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

/* Shift exponent and mantissa into place and let the multiplication mend the exponent's bias:
 * exact, denormals included.  Infinity and NaN keep their exponent of all ones. */
static float q3n__f16_to_f32(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    if (rest >= 0x0f800000u) return q3n__bits_f32(sign | rest | 0x70000000u);
    return q3n__bits_f32(sign | q3n__f32_bits(q3n__bits_f32(rest) * 0x1p112f));
}

/* Round to nearest even; too large becomes infinity; NaN stays NaN. */
static uint16_t q3n__f32_to_f16(float f)
{
    const uint32_t u = q3n__f32_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | ((a >> 13) & 0x3ff));
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
    if (a < 0x38800000u) {      /* denormal in f16: adding 0.5 rounds at the right bit */
        const float d = q3n__bits_f32(a) + 0.5f;
        return (uint16_t)(sign | (q3n__f32_bits(d) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13));
}

/* ---- Quantised weights: QUANTISED TYPES of the file format ----
 *
 * Rows are taken in tiles of 16, columns in blocks of 64 made of two groups of 32; rows and columns
 * beyond the last are zero weights.  A weight is scale x level; a group of one row has one scale.
 * Tiles follow one another, in a tile its blocks from left to right:
 *
 *     q4     0      32      64            320           576           bytes in a block of a tile
 *            | s0   | s1    | codes 0     | codes 1     |   next block of the same 16 rows
 *     s      f16[16], a scale for each row: s0 of the first group, s1 of the second
 *     codes  of a group: 512, 384, 256 or 192 bytes (q8, q6, q4, q3), lines of 64 bytes
 *
 * A code belongs to row r (0 .. 15) and column 4 s + j (s 0 .. 7, j 0 .. 3) of its group;
 * b = 4 r + j is the place of its byte in a line.  Bits [x, y) count from the lowest:
 *
 *     q8   byte 64 s + b                                               level = code - 128
 *     q4   bits [4 (s / 4), 4 (s / 4) + 4) of byte 64 (s % 4) + b      level = q4_levels[code]
 *     q6   bits [0, 4) of the code as q4; bits [4, 6): bits [2 (s % 4), 2 (s % 4) + 2) of byte
 *          256 + 64 (s / 4) + b                                        level = code - 32
 *     q3   bits [0, 2) of the code: bits [2 (s % 4), 2 (s % 4) + 2) of byte 64 (s / 4) + b; bit 2:
 *          bit s of byte 128 + b                                       level = q3_levels[code]
 *
 * Where is row 21, column 75 of a q4 matrix of 2048 columns?  A row's share is 2048 / 64 x 36 =
 * 1152 bytes, so its tile (rows 16 to 31) begins at 16 x 1152 = 18432 and block 75 / 64 = 1 at +
 * 576.  In the tile r = 5; in the block column 11, of group 0: s = 11 / 4 = 2, j = 3, b = 4 r + j =
 * 23.
 *
 *     scale  18432 + 576 + 2 x 5             = 19018
 *     code   18432 + 576 + 64 + 64 x 2 + 23  = 19223, low half; its high half is column 91
 *
 * A line is one vector: 16 lanes of 32 bits, a row each, 4 columns in a lane, which is what dot
 * products of bytes take.  Nothing is summed across lanes. */

#define Q3N__Q8_ZERO 128         /* level = code - zero                                          */
#define Q3N__Q6_ZERO 32

/* Levels that leave the least squared error in trained and in normally distributed weights, found
 * by Lloyd's iteration over groups with their best scales.  They span 127, so that kernels may add
 * a zero point and have 7 bits: two products of such a byte and an activation fit 16 bits. */
#define Q3N__Q4_LEVEL_LIST(X)                                                           \
    X(-70) X(-54) X(-42) X(-33) X(-25) X(-18) X(-11) X(-5)                              \
    X(1) X(7) X(13) X(19) X(26) X(34) X(44) X(57)
#define Q3N__Q3_LEVEL_LIST(X) X(-73) X(-46) X(-27) X(-11) X(2) X(16) X(32) X(54)

static const int8_t q3n__q4_levels[16] = {
#define Q3N__X(level) level,
    Q3N__Q4_LEVEL_LIST(Q3N__X)
};
static const int8_t q3n__q3_levels[8] = {
    Q3N__Q3_LEVEL_LIST(Q3N__X)
#undef Q3N__X
};

/* Bytes of the codes of one group of a tile. */
static size_t q3n__group_bytes(q3n_type t)
{
    const size_t block = (size_t)q3n__types[t].block_bytes * Q3N__TILE_ROWS;
    return (block - 2 * Q3N__TILE_ROWS * sizeof(uint16_t)) / 2;
}

/* The code of row r, column c of a group. */
static int q3n__code_get(q3n_type t, const uint8_t *group, int r, int c)
{
    const int s = c / 4, b = 4 * r + c % 4, pair = 2 * (s % 4);
    switch (t) {
    case Q3N_TYPE_Q8: return group[64 * s + b];
    case Q3N_TYPE_Q6: return (group[64 * (s % 4) + b] >> 4 * (s / 4) & 15)
                           | (group[256 + 64 * (s / 4) + b] >> pair & 3) << 4;
    case Q3N_TYPE_Q4: return group[64 * (s % 4) + b] >> 4 * (s / 4) & 15;
    case Q3N_TYPE_Q3: return (group[64 * (s / 4) + b] >> pair & 3)
                           | (group[128 + b] >> s & 1) << 2;
    default: return 0;
    }
}

/* The value of a code is this times its group's scale. */
static int q3n__code_level(q3n_type t, int code)
{
    switch (t) {
    case Q3N_TYPE_Q8: return code - Q3N__Q8_ZERO;
    case Q3N_TYPE_Q6: return code - Q3N__Q6_ZERO;
    case Q3N_TYPE_Q4: return q3n__q4_levels[code];
    case Q3N_TYPE_Q3: return q3n__q3_levels[code];
    default: return 0;
    }
}

/* Row `row` of a quantised matrix of n columns. */
static void q3n__dequantize_row(q3n_type t, float *y, const void *w, int row, int n)
{
    const int r = row % Q3N__TILE_ROWS;
    const uint8_t *tile = (const uint8_t *)w + (size_t)(row - r) * q3n__row_bytes(t, n);
    const size_t block_bytes = (size_t)q3n__types[t].block_bytes * Q3N__TILE_ROWS;
    for (int c = 0; c < n; c += Q3N__GROUP) {
        const uint8_t *block = tile + (size_t)(c / Q3N__GROUP / 2) * block_bytes;
        const int g = c / Q3N__GROUP % 2, count = n - c < Q3N__GROUP ? n - c : Q3N__GROUP;
        const uint8_t *codes = block + 4 * Q3N__TILE_ROWS + (size_t)g * q3n__group_bytes(t);
        uint16_t scale;
        memcpy(&scale, block + 2 * (g * Q3N__TILE_ROWS + r), sizeof scale);
        for (int i = 0; i < count; i++)
            y[c + i] = q3n__f16_to_f32(scale)
                     * (float)q3n__code_level(t, q3n__code_get(t, codes, r, i));
    }
}

/* ---- Operands of the kernels ---- */

/* Activations against quantised weights: 64 of them as bytes, q scale ~ x, in groups of 32.  They
 * are quantised once per token, whatever else is in the batch.  After the last column: zeros. */
typedef struct {
    int8_t  q[2 * Q3N__GROUP];   /* -127 .. 127                                                  */
    float   scale[2];
    int32_t minus_sum[2];        /* -(sum of q): times a zero point it removes that              */
} q3n__x8;

#define Q3N__X8_MIN 1e-30f     /* groups whose largest is smaller are zero                     */

static int q3n__x8_blocks(int n) { return (n + 2 * Q3N__GROUP - 1) / (2 * Q3N__GROUP); }

/* y[t][r] = <w[r], x[t]> (+ bias[r]) for rows [row0, row1) and n tokens.  No aliasing.  row0 is a
 * multiple of 16 for quantised types. */
typedef struct {
    const void  *w;              /* row r starts at w + r * q3n__row_bytes(type, n_cols)         */
    const float *x;              /* token t's input is row x_rows[t] of x, or row t              */
    const q3n__x8 *xq;           /* the same, [rows][x8_blocks(n_cols)], for quantised types     */
    const int   *x_rows;         /* [n], NULL = 0 .. n - 1; how experts pick their tokens        */
    const float *bias;           /* indexed by r, NULL = none                                    */
    float       *y;              /* token t, row r at y[t * y_stride + r]                        */
    int          x_stride, y_stride;   /* floats from row to row                                 */
    int          n, n_cols, row0, row1;
} q3n__matmul;

static const float *q3n__matmul_x(const q3n__matmul *m, int t)
{
    return m->x + (size_t)(m->x_rows ? m->x_rows[t] : t) * (size_t)m->x_stride;
}

static const q3n__x8 *q3n__matmul_xq(const q3n__matmul *m, int t)
{
    return m->xq + (size_t)(m->x_rows ? m->x_rows[t] : t) * (size_t)q3n__x8_blocks(m->n_cols);
}

/* Keys of one KV block: one layer, one KV head.  Both parts have the KV cache's type:
 *   k [D, Q3N__KV_BLOCK]   transposed: dimension i of key j at i * Q3N__KV_BLOCK + j
 *   v [Q3N__KV_BLOCK, D]
 * In a cache of type q8 these are signed bytes, and after each part lie its scales, one for every
 * key or value: f32 [Q3N__KV_BLOCK]. */
#define Q3N__KV_BLOCK 256

/* Softmax attention of n queries over one block, not yet normalised:
 *   s_j = <q, k_j>,  m = max_j s_j,  l = sum_j e^(s_j - m),  o = sum_j e^(s_j - m) v_j
 * over the first n_keys[i] keys for query i.  With n_keys 0: m = -FLT_MAX, l = 0, o = 0.  What
 * the block holds after the last visible key is not looked at: it may be any bytes. */
typedef struct {
    const void  *k, *v;
    const float *k_scale, *v_scale;   /* [Q3N__KV_BLOCK], of q8                                  */
    const float *q;              /* [n, D], rows q_stride apart; divided by sqrt(D) before       */
    float       *o;              /* [n, D], rows o_stride apart                                  */
    float       *m, *l;          /* [n]                                                          */
    float       *scores;         /* [n, Q3N__KV_BLOCK] scratch                                   */
    const int   *n_keys;         /* [n], 0 .. Q3N__KV_BLOCK                                      */
    int          q_stride, o_stride;
    int          n, dim;         /* dim is D                                                     */
} q3n__attend;

/* One token's key and value [dim] become key and value `slot` of a block. */
typedef struct {
    void        *k, *v;          /* as in q3n__attend                                            */
    float       *k_scale, *v_scale;
    const float *key, *value;
    int          slot, dim;
} q3n__store_kv;

/* The gated delta rule over n tokens for one value head, columns [col0, col1) of its state; see
 * q3n__delta_scalar for the equations.  Strides are in floats from token to token.
 *
 * The stored state may lag after the tokens: S_out becomes the state after the first n_store of
 * them.  States after later tokens pass through `scratch`, the last one is not stored at all.  S is
 * not written unless S_out is the same. */
typedef struct {
    const float *S;              /* [dk, dv]: the state before                                   */
    float       *S_out;          /* [dk, dv] out; may be S; not used if n_store is 0             */
    float       *scratch;        /* [dk, col1 - col0]; not used if n <= n_store + 1              */
    const float *q, *k;          /* [n][dk] of the head's key head                               */
    const float *v;              /* [n][dv]                                                      */
    float       *o;              /* [n][dv] out; rows < n_skip are not written; NULL = none are */
    const float *g, *beta;       /* [n]: log decay <= 0, write strength in (0, 1)                */
    int          qk_stride, v_stride, o_stride, gb_stride;
    int          n, n_store, n_skip;    /* tokens; n_store and n_skip are 0 to n                 */
    int          dk, dv, col0, col1;
} q3n__delta;

/* Causal depthwise convolution and SiLU for channels [c0, c1):
 *   y[t][c] = silu(sum_j w[j][c] u[t - width + 1 + j][c])
 * where u is the state's width - 1 columns followed by x; the last of them are the new state.
 * `state` is not written unless `state_out` is the same; without tokens nothing is. */
typedef struct {
    const float *w;              /* [width, n_channels]                                          */
    const float *state;          /* [width - 1, n_channels], oldest first                        */
    float       *state_out;      /* [width - 1, n_channels] out; may be state                    */
    const float *x;              /* [n, ...] rows x_stride apart                                 */
    float       *y;              /* [n, ...] rows y_stride apart; not x                          */
    int          x_stride, y_stride;
    int          n, width, n_channels, c0, c1;
} q3n__conv;

/* Logits of the sampler, in blocks of 64.  Every ISA gives the same bits, so the choice of a token
 * depends on the ISA through the logits only.  Formulas: section >>kernels-scalar. */
#define Q3N__SAMPLER_BLOCK 64

typedef struct q3n__kernels {
    void  (*matmul[Q3N_TYPE_COUNT])(const q3n__matmul *m);
    void  (*to_f32[Q3N_TYPE_COUNT])(float *y, const void *x, int n);       /* float types        */
    void  (*quantize_x)(q3n__x8 *y, const float *x, int n);                /* all of its blocks  */
    void  (*attend[Q3N_TYPE_COUNT])(const q3n__attend *a);                 /* floats and q8      */
    void  (*store_kv[Q3N_TYPE_COUNT])(const q3n__store_kv *s);             /* floats and q8      */
    void  (*delta)(const q3n__delta *d);
    void  (*conv)(const q3n__conv *c);
    float (*dot)(const float *a, const float *b, int n);
    void  (*axpy)(float *y, float a, const float *x, int n);               /* y += a x           */
    void  (*rms_norm)(float *y, const float *x, const float *w, int n, float eps); /* y may be x */
    void  (*softmax)(float *x, int n);                                     /* in place           */
    void  (*silu_mul)(float *y, const float *gate, int n);                 /* y *= silu(gate)    */
    void  (*sigmoid_mul)(float *y, const float *gate, int n);              /* y *= sigmoid(gate) */
    void  (*block_max)(float *max, const float *x, int n_blocks);          /* no NaN, no +inf    */
    void  (*block_weights)(float *y, float *sum, const float *x, int n_blocks, float max,
                           float scale);           /* y = 2^((x - max) scale), may be x          */
    void  (*block_sums)(float *sum, int32_t *count, const float *y, int n_blocks,
                        float floor);              /* of those that are >= floor                 */
} q3n__kernels;

/* One of the numbers that block_weights gives. */
static float q3n__sampler_weight(float x, float max, float scale);

/* Fill k with the kernels of an instruction set that is supported; see >>dispatch. */
static void q3n__kernels_init(q3n__kernels *k, q3n_isa isa);

/* =====================================================================================
 * [8] TENSORS                                                               >>tensors
 *
 * Which tensors a model of some geometry has, in the order of the file, and what they are bound to.
 * The loader binds by this plan and writers of files write by it, so they cannot differ.
 *
 *     q3n_config { num_hidden_layers 48, layer_types 1,1,1,0,.. , num_experts 512, ... }
 *         q3n__config_modules(c, 3) -> ATTENTION | QK_NORM | EXPERTS | SHARED    what layer 3 has
 *         rows of Q3N__LAYER_LIST with such a module, dims as Q3N__DIM_LIST says
 *         -> q3n__plan_item { "layers.3.self_attn.q_proj.weight", MAT, [8192, 2048], .. }
 *
 * A new tensor is a row of a list here and a field of q3n__layer or q3n__weights: the loader and
 * what makes or shows files follow.  Knows of a geometry only its numbers, which q3n_config_check
 * has held against their ranges; nothing of files or memory.
 * ===================================================================================== */

/* ---- What the tensors are bound to ---- */

/* A matrix in the file: n_rows x n_cols of one slice (an expert), slices stride bytes apart.  data
 * points into the mapping: a copy of this struct is a view and owns nothing. */
typedef struct q3n__mat {
    const uint8_t *data;
    size_t         stride;       /* 0 if there is one slice                                      */
    q3n_type       type;
    int            n_rows, n_cols;
} q3n__mat;

/* One layer, with the reference's names.  Absent tensors have data (or pointer) NULL.  Which are
 * there follows from is_delta, has_experts and the configuration; model code asks those, not the
 * pointers, but for biases and norms that are optional.  All point into the mapping, which the
 * model holds. */
typedef struct q3n__layer {
    int          is_delta, has_experts;
    const float *input_norm, *post_norm;                       /* [d]                            */
    q3n__mat     q_proj, k_proj, v_proj, o_proj;               /* attention                      */
    const float *q_bias, *k_bias, *v_bias, *o_bias;
    const float *q_norm, *k_norm;                              /* [D]                            */
    q3n__mat     in_proj_qkvz, in_proj_ba, out_proj;           /* DeltaNet                       */
    const float *conv1d;                                       /* [width, C]                     */
    const float *A_log, *dt_bias;                              /* [Hv]                           */
    const float *delta_norm;                                   /* [dv]                           */
    q3n__mat     router;                                       /* [E, d]                         */
    const float *router_bias;                                  /* [E]                            */
    q3n__mat     gate, up, down;                               /* the dense FFN, or the experts  */
    const float *gate_bias, *up_bias, *down_bias;              /* dense: [I], [I], [d]; experts:
                                                                  [E, I], [E, I], [E, d]         */
    q3n__mat     shared_gate_proj, shared_up_proj, shared_down_proj;
    q3n__mat     shared_expert_gate;                           /* [1, d]                         */
} q3n__layer;

/* What belongs to no layer.  lm_head is embed_tokens itself if the embeddings are tied, and empty
 * in a classifier of hidden states whose file has none. */
typedef struct q3n__weights {
    q3n__mat     embed_tokens, lm_head, score, mtp_fc;
    const float *norm, *score_bias;
    const float *rope_cos, *rope_sin;                          /* [rope_positions, D/2]          */
    const float *mtp_norm_embedding, *mtp_norm_hidden, *mtp_norm;
    int          rope_positions;
} q3n__weights;

/* ---- TENSORS BY NAME: names, shapes and types in the file ----
 *
 * `lN` is layers.N.  d hidden_size, V vocab_size, H heads, K kv heads, D head_dim, E experts,
 * I width.
 *
 *      embed_tokens.weight                      mat [V, d]
 *      norm.weight                              vec [d]
 *      lm_head.weight                           mat [V, d]      absent if tie_word_embeddings
 *      score.weight, score.bias                 router [num_labels, d or V], vec (bias optional)
 *      rope.cos, rope.sin                       vec [positions, D/2]   only if rope_type is "table"
 *      lN.input_layernorm.weight                vec [d]
 *      lN.post_attention_layernorm.weight       vec [d]
 *    attention
 *      lN.self_attn.q_proj.weight               mat [H D, d]; gated: [H 2D, d], per head D rows of
 *                                               query, then D of gate
 *      lN.self_attn.{k,v}_proj.weight           mat [K D, d]
 *      lN.self_attn.o_proj.weight               mat [d, H D]
 *      lN.self_attn.{q,k,v,o}_proj.bias         vec             if attention_bias
 *      lN.self_attn.{q,k}_norm.weight           vec [D]         if qk_norm
 *    DeltaNet (Hk key heads of dk, Hv value heads of dv, channels C = 2 Hk dk + Hv dv)
 *      lN.linear_attn.in_proj_qkvz.weight       mat [C + Hv dv, d]: all q, all k, all v, all z
 *      lN.linear_attn.in_proj_ba.weight         router [2 Hv, d]: all b, all a
 *      lN.linear_attn.conv1d.weight             vec [width, C]: transposed, oldest column first
 *      lN.linear_attn.{A_log,dt_bias}           vec [Hv]
 *      lN.linear_attn.norm.weight               vec [dv]
 *      lN.linear_attn.out_proj.weight           mat [d, Hv dv]
 *    dense FFN
 *      lN.mlp.{gate,up}_proj.weight             mat [I, d]      I = intermediate_size
 *      lN.mlp.down_proj.weight                  mat [d, I]
 *      lN.mlp.{gate,up,down}_proj.bias          vec             if mlp_bias
 *    experts
 *      lN.mlp.gate.weight                       router [E, d]
 *      lN.mlp.gate.bias                         vec [E]         if router_bias
 *      lN.mlp.experts.{gate,up}_proj.weight     mat [E, I, d]   I = moe_intermediate_size
 *      lN.mlp.experts.down_proj.weight          mat [E, d, I]
 *      lN.mlp.experts.{gate,up,down}_proj.bias  vec [E, I], [E, I], [E, d]   if mlp_bias
 *      lN.mlp.shared_expert.{gate,up}_proj.weight   mat [Is, d]  if shared_expert_intermediate_size
 *      lN.mlp.shared_expert.down_proj.weight    mat [d, Is]
 *      lN.mlp.shared_expert_gate.weight         router [1, d]
 *    multi-token prediction (num_mtp_layers = 1)
 *      mtp.fc.weight                            mat [d, 2d]
 *      mtp.{pre_fc_norm_embedding,pre_fc_norm_hidden,norm}.weight   vec [d]
 *      mtp.layers.0....                         a layer with attention, experts as the trunk's
 *
 * Norms hold the factor itself: where the family scales by 1 + w the writer has added the 1 (in
 * f32, exactly as [HF] does at run time).  q and k rows of checkpoints with interleaved rotary
 * pairs are permuted to the half-rotate form.
 *
 * Types: vec f32; router f32, f16, bf16; mat any but q3, which only experts may have.  lm_head, the
 * embedding if it is the head too, and all of mtp: a float type, q8 or q6. */

/* ---- Tensor plan ----
 *
 * What a tensor is to the code that binds it (role), and where it belongs (layer).  The order of
 * the plan is the order of the file: global tensors, layers, MTP module.  Three lists hold it all:
 *
 *     X(MAT, ATTENTION, "self_attn.k_proj.weight", k_proj, KD, d, ONE)
 *       |    |          |                          |       dims [KD, d], slowest first, to ONE
 *       |    |          |                          field of q3n__layer or q3n__weights
 *       |    |          name in the file, after "layers.N." in a layer
 *       role module: the tensor is there where q3n__config_modules has this bit
 *
 * A dense FFN and experts share the fields gate, up and down: a layer has one of the two. */
typedef enum {
    Q3N__ROLE_MAT,               /* bound to a q3n__mat; its types: q3n__plan_types              */
    Q3N__ROLE_VEC,               /* f32; bound to a const float *                                */
    Q3N__ROLE_ROUTER             /* a float type; bound to a q3n__mat                            */
} q3n__role;

/* Where a tensor belongs, besides a number of a layer.  The MTP module's layer has a number that no
 * layer of the trunk can have; in memory it follows the trunk's layers. */
#define Q3N__LAYER_NONE (-1)
#define Q3N__LAYER_MTP  Q3N_MAX_LAYERS

/* One tensor of the plan in full: what a loader compares and a writer writes. */
typedef struct q3n__plan_item {
    char      name[96];
    q3n__role role;
    int       optional;          /* a file may lack it                                           */
    unsigned  module;            /* Q3N__MODULE_*: whose it is                                   */
    int       experts;           /* one of the three tensors whose slices interleave             */
    unsigned  types;             /* bit t is set: type t is allowed                              */
    int       layer;             /* Q3N__LAYER_NONE, 0 .. num_hidden_layers - 1, Q3N__LAYER_MTP  */
    int       n_dims;
    int64_t   dim[3];            /* slowest first, unused ones 1; dim[0] = 0: any number         */
    size_t    field;             /* offset in q3n__layer, or in q3n__weights without a layer     */
} q3n__plan_item;

/* Rows of the lists below: role, the module that has it, name, field, dims. */
#define Q3N__GLOBAL_LIST(X)                                                             \
    X(MAT,    ALWAYS,     "embed_tokens.weight", embed_tokens, V, d, ONE)               \
    X(VEC,    ALWAYS,     "norm.weight",         norm,         d, ONE, ONE)             \
    X(MAT,    HEAD,       "lm_head.weight",      lm_head,      V, d, ONE)               \
    X(ROUTER, SCORE,      "score.weight",        score,        LABELS, SCORE, ONE)      \
    X(VEC,    SCORE_BIAS, "score.bias",          score_bias,   LABELS, ONE, ONE)        \
    X(VEC,    ROPE_TABLE, "rope.cos",            rope_cos,     ANY, HALF, ONE)          \
    X(VEC,    ROPE_TABLE, "rope.sin",            rope_sin,     ANY, HALF, ONE)

#define Q3N__MTP_LIST(X)                                                                          \
    X(MAT,    MTP, "mtp.fc.weight",                    mtp_fc,             d, 2d, ONE)            \
    X(VEC,    MTP, "mtp.pre_fc_norm_embedding.weight", mtp_norm_embedding, d, ONE, ONE)           \
    X(VEC,    MTP, "mtp.pre_fc_norm_hidden.weight",    mtp_norm_hidden,    d, ONE, ONE)           \
    X(VEC,    MTP, "mtp.norm.weight",                  mtp_norm,           d, ONE, ONE)

#define Q3N__LAYER_LIST(X)                                                                        \
    X(VEC,    ALWAYS,  "input_layernorm.weight",          input_norm,   d, ONE, ONE)              \
    X(VEC,    ALWAYS,  "post_attention_layernorm.weight", post_norm,    d, ONE, ONE)              \
    X(MAT,    ATTENTION, "self_attn.q_proj.weight",       q_proj,       Q, d, ONE)                \
    X(MAT,    ATTENTION, "self_attn.k_proj.weight",       k_proj,       KD, d, ONE)               \
    X(MAT,    ATTENTION, "self_attn.v_proj.weight",       v_proj,       KD, d, ONE)               \
    X(MAT,    ATTENTION, "self_attn.o_proj.weight",       o_proj,       d, HD, ONE)               \
    X(VEC,    ATTENTION_BIAS, "self_attn.q_proj.bias",    q_bias,       Q, ONE, ONE)              \
    X(VEC,    ATTENTION_BIAS, "self_attn.k_proj.bias",    k_bias,       KD, ONE, ONE)             \
    X(VEC,    ATTENTION_BIAS, "self_attn.v_proj.bias",    v_bias,       KD, ONE, ONE)             \
    X(VEC,    ATTENTION_BIAS, "self_attn.o_proj.bias",    o_bias,       d, ONE, ONE)              \
    X(VEC,    QK_NORM, "self_attn.q_norm.weight",         q_norm,       D, ONE, ONE)              \
    X(VEC,    QK_NORM, "self_attn.k_norm.weight",         k_norm,       D, ONE, ONE)              \
    X(MAT,    DELTA,   "linear_attn.in_proj_qkvz.weight", in_proj_qkvz, QKVZ, d, ONE)             \
    X(ROUTER, DELTA,   "linear_attn.in_proj_ba.weight",   in_proj_ba,   BA, d, ONE)               \
    X(VEC,    DELTA,   "linear_attn.conv1d.weight",       conv1d,       WIDTH, C, ONE)            \
    X(VEC,    DELTA,   "linear_attn.A_log",               A_log,        HV, ONE, ONE)             \
    X(VEC,    DELTA,   "linear_attn.dt_bias",             dt_bias,      HV, ONE, ONE)             \
    X(VEC,    DELTA,   "linear_attn.norm.weight",         delta_norm,   DV, ONE, ONE)             \
    X(MAT,    DELTA,   "linear_attn.out_proj.weight",     out_proj,     d, HVDV, ONE)             \
    X(MAT,    DENSE,   "mlp.gate_proj.weight",            gate,         I, d, ONE)                \
    X(MAT,    DENSE,   "mlp.up_proj.weight",              up,           I, d, ONE)                \
    X(MAT,    DENSE,   "mlp.down_proj.weight",            down,         d, I, ONE)                \
    X(VEC,    DENSE_BIAS, "mlp.gate_proj.bias",           gate_bias,    I, ONE, ONE)              \
    X(VEC,    DENSE_BIAS, "mlp.up_proj.bias",             up_bias,      I, ONE, ONE)              \
    X(VEC,    DENSE_BIAS, "mlp.down_proj.bias",           down_bias,    d, ONE, ONE)              \
    X(ROUTER, EXPERTS, "mlp.gate.weight",                 router,       E, d, ONE)                \
    X(VEC,    ROUTER_BIAS, "mlp.gate.bias",               router_bias,  E, ONE, ONE)              \
    X(MAT,    EXPERTS, "mlp.experts.gate_proj.weight",    gate,         E, IE, d)                 \
    X(MAT,    EXPERTS, "mlp.experts.up_proj.weight",      up,           E, IE, d)                 \
    X(MAT,    EXPERTS, "mlp.experts.down_proj.weight",    down,         E, d, IE)                 \
    X(VEC,    EXPERTS_BIAS, "mlp.experts.gate_proj.bias", gate_bias,    E, IE, ONE)               \
    X(VEC,    EXPERTS_BIAS, "mlp.experts.up_proj.bias",   up_bias,      E, IE, ONE)               \
    X(VEC,    EXPERTS_BIAS, "mlp.experts.down_proj.bias", down_bias,    E, d, ONE)                \
    X(MAT,    SHARED,  "mlp.shared_expert.gate_proj.weight", shared_gate_proj, IS, d, ONE)        \
    X(MAT,    SHARED,  "mlp.shared_expert.up_proj.weight",   shared_up_proj,   IS, d, ONE)        \
    X(MAT,    SHARED,  "mlp.shared_expert.down_proj.weight", shared_down_proj, d, IS, ONE)        \
    X(ROUTER, SHARED,  "mlp.shared_expert_gate.weight", shared_expert_gate, ROW, d, ONE)

/* Modules of a model or of a layer, as bits.  A tensor has one; those that a model or a layer has
 * are made by q3n__config_modules, and a tensor is there if its module is. */
enum {
    Q3N__MODULE_ALWAYS = 1, Q3N__MODULE_HEAD = 1 << 1, Q3N__MODULE_SCORE = 1 << 2,
    Q3N__MODULE_SCORE_BIAS = 1 << 3, Q3N__MODULE_ROPE_TABLE = 1 << 4, Q3N__MODULE_MTP = 1 << 5,
    Q3N__MODULE_ATTENTION = 1 << 6, Q3N__MODULE_ATTENTION_BIAS = 1 << 7,
    Q3N__MODULE_QK_NORM = 1 << 8, Q3N__MODULE_DELTA = 1 << 9,
    Q3N__MODULE_DENSE = 1 << 10, Q3N__MODULE_DENSE_BIAS = 1 << 11,
    Q3N__MODULE_EXPERTS = 1 << 12, Q3N__MODULE_ROUTER_BIAS = 1 << 13,
    Q3N__MODULE_EXPERTS_BIAS = 1 << 14, Q3N__MODULE_SHARED = 1 << 15
};

/* Lengths of dimensions, as the list of names above has them; c is the configuration.  ONE
 * closes the list of a tensor's dimensions; ROW is a length of 1 that counts as one, so that
 * shared_expert_gate [1, d] is a matrix; ANY is whatever the file has (positions of a table). */
#define Q3N__DIM_LIST(X)                                                                \
    X(ONE,    1)                                                                        \
    X(ROW,    1)                                                                        \
    X(ANY,    0)                                                                        \
    X(V,      c->vocab_size)                                                            \
    X(d,      c->hidden_size)                                                           \
    X(2d,     2 * (int64_t)c->hidden_size)                                              \
    X(LABELS, c->num_labels)                                                            \
    X(SCORE,  c->classifier_input == Q3N_CLASSIFIER_LOGITS ? c->vocab_size : c->hidden_size) \
    X(D,      c->head_dim)                                                              \
    X(HALF,   c->head_dim / 2)                                                          \
    X(HD,     (int64_t)c->num_attention_heads * c->head_dim)                            \
    X(Q,      (int64_t)c->num_attention_heads * c->head_dim * (c->attn_output_gate ? 2 : 1)) \
    X(KD,     (int64_t)c->num_key_value_heads * c->head_dim)                            \
    X(HV,     c->linear_num_value_heads)                                                \
    X(DV,     c->linear_value_head_dim)                                                 \
    X(HVDV,   (int64_t)c->linear_num_value_heads * c->linear_value_head_dim)            \
    X(C,      q3n__config_channels(c))                                                  \
    X(QKVZ,   q3n__config_channels(c)                                                   \
              + (int64_t)c->linear_num_value_heads * c->linear_value_head_dim)          \
    X(BA,     2 * (int64_t)c->linear_num_value_heads)                                   \
    X(WIDTH,  c->linear_conv_kernel_dim)                                                \
    X(I,      c->intermediate_size)                                                     \
    X(E,      c->num_experts)                                                           \
    X(IE,     c->moe_intermediate_size)                                                 \
    X(IS,     c->shared_expert_intermediate_size)

typedef enum {
#define Q3N__X(id, length) Q3N__DIM_##id,
    Q3N__DIM_LIST(Q3N__X)
#undef Q3N__X
    Q3N__DIM_COUNT
} q3n__dim;

typedef struct {
    const char *name;
    q3n__role   role;
    unsigned    module;
    q3n__dim    dim[3];
    size_t      field;
} q3n__plan_row;

/* The lists as tables, which the functions below walk. */
static const q3n__plan_row q3n__global_rows[] = {
#define Q3N__X(role, module, name, field, d0, d1, d2)                                   \
    { name, Q3N__ROLE_##role, Q3N__MODULE_##module,                                     \
      { Q3N__DIM_##d0, Q3N__DIM_##d1, Q3N__DIM_##d2 }, offsetof(q3n__weights, field) },
    Q3N__GLOBAL_LIST(Q3N__X)
};
static const q3n__plan_row q3n__mtp_rows[] = {
    Q3N__MTP_LIST(Q3N__X)
#undef Q3N__X
};
static const q3n__plan_row q3n__layer_rows[] = {
#define Q3N__X(role, module, name, field, d0, d1, d2)                                   \
    { name, Q3N__ROLE_##role, Q3N__MODULE_##module,                                     \
      { Q3N__DIM_##d0, Q3N__DIM_##d1, Q3N__DIM_##d2 }, offsetof(q3n__layer, field) },
    Q3N__LAYER_LIST(Q3N__X)
#undef Q3N__X
};

/* Channels of DeltaNet's convolution: all q, all k, all v. */
static int64_t q3n__config_channels(const q3n_config *c)
{
    return 2 * (int64_t)c->linear_num_key_heads * c->linear_key_head_dim
         + (int64_t)c->linear_num_value_heads * c->linear_value_head_dim;
}

/* A length in elements: fields that are in their ranges make products of at most 2^24, but callers
 * multiply lengths. */
static int64_t q3n__config_dim(const q3n_config *c, q3n__dim id)
{
    switch (id) {
#define Q3N__X(name, length) case Q3N__DIM_##name: return length;
    Q3N__DIM_LIST(Q3N__X)
#undef Q3N__X
    case Q3N__DIM_COUNT: break;
    }
    return 0;
}

/* The modules that layer l has, or the model besides its layers (Q3N__LAYER_NONE).  The MTP
 * module's layer has attention always, and experts if the model has any. */
static unsigned q3n__config_modules(const q3n_config *c, int l)
{
    if (l == Q3N__LAYER_NONE)
        return Q3N__MODULE_ALWAYS
             | (c->tie_word_embeddings ? 0u : Q3N__MODULE_HEAD)
             | (c->num_labels > 0 ? Q3N__MODULE_SCORE | Q3N__MODULE_SCORE_BIAS : 0u)
             | (c->rope_type == Q3N_ROPE_TABLE ? Q3N__MODULE_ROPE_TABLE : 0u)
             | (c->num_mtp_layers > 0 ? Q3N__MODULE_MTP : 0u);
    const int mtp = l == Q3N__LAYER_MTP;
    const int delta   = mtp ? 0 : c->layer_types[l];
    const int experts = mtp ? c->num_experts > 0 : c->layer_experts[l];
    unsigned modules = Q3N__MODULE_ALWAYS;
    if (delta) modules |= Q3N__MODULE_DELTA;
    else       modules |= Q3N__MODULE_ATTENTION
                        | (c->attention_bias ? Q3N__MODULE_ATTENTION_BIAS : 0u)
                        | (c->qk_norm ? Q3N__MODULE_QK_NORM : 0u);
    if (experts) modules |= Q3N__MODULE_EXPERTS | (c->router_bias ? Q3N__MODULE_ROUTER_BIAS : 0u)
                          | (c->mlp_bias ? Q3N__MODULE_EXPERTS_BIAS : 0u)
                          | (c->shared_expert_intermediate_size > 0 ? Q3N__MODULE_SHARED : 0u);
    else         modules |= Q3N__MODULE_DENSE | (c->mlp_bias ? Q3N__MODULE_DENSE_BIAS : 0u);
    return modules;
}

/* Whether a row or item of the plan is embed_tokens. */
static int q3n__is_embedding(int layer, size_t field)
{
    return layer == Q3N__LAYER_NONE && field == offsetof(q3n__weights, embed_tokens);
}

/* Types that an item may have: the rules of the file format, so that no file can be made in which a
 * few bytes saved spoil every token.  Routers decide between experts, and the head between words;
 * both are small beside the experts.  In short: vectors f32; routers floats; the head and MTP
 * floats, q8, q6; matrices also q4; experts also q3. */
static unsigned q3n__plan_types(const q3n_config *c, const q3n__plan_row *row, int layer)
{
    const unsigned floats = 1u << Q3N_TYPE_F32 | 1u << Q3N_TYPE_F16 | 1u << Q3N_TYPE_BF16;
    const unsigned fine = floats | 1u << Q3N_TYPE_Q8 | 1u << Q3N_TYPE_Q6;
    /* A tied embedding is the head: it has the head's types. */
    const int is_head = row->module == Q3N__MODULE_HEAD
                     || (c->tie_word_embeddings && q3n__is_embedding(layer, row->field));
    if (row->role == Q3N__ROLE_VEC) return 1u << Q3N_TYPE_F32;
    if (row->role == Q3N__ROLE_ROUTER) return floats;
    if (is_head || layer == Q3N__LAYER_MTP || row->module == Q3N__MODULE_MTP) return fine;
    return fine | 1u << Q3N_TYPE_Q4 | (row->module == Q3N__MODULE_EXPERTS ? 1u << Q3N_TYPE_Q3 : 0u);
}

/* "f32, f16 or bf16": what an error message expects. */
static const char *q3n__types_string(unsigned types, char text[80])
{
    int at = 0, left = 0;
    for (int t = 0; t < Q3N_TYPE_COUNT; t++) left += (int)(types >> t & 1);
    text[0] = 0;
    for (int t = 0; t < Q3N_TYPE_COUNT; t++)
        if (types >> t & 1) {
            left--;
            at += snprintf(text + at, 80 - (size_t)at, "%s%s", q3n__types[t].name,
                           left > 1 ? ", " : left == 1 ? " or " : "");
        }
    return text;
}

/* Row `row` of a list, for layer l of this configuration: its full name and lengths in numbers. */
static void q3n__plan_item_make(const q3n_config *c, const q3n__plan_row *row, int l,
                                q3n__plan_item *item)
{
    memset(item, 0, sizeof *item);
    char *name = item->name;
    const size_t size = sizeof item->name;
    /* Names of the file, "layers.N." before those of a layer: at most 3 digits, so 96 bytes are
     * room. */
    if (l == Q3N__LAYER_NONE)     snprintf(name, size, "%s", row->name);
    else if (l == Q3N__LAYER_MTP) snprintf(name, size, "mtp.layers.0.%s", row->name);
    else                          snprintf(name, size, "layers.%d.%s", l, row->name);
    item->role = row->role;
    item->module = row->module;
    item->layer = l;
    item->field = row->field;
    item->experts = row->module == Q3N__MODULE_EXPERTS && row->role == Q3N__ROLE_MAT;
    item->types = q3n__plan_types(c, row, l);
    /* A classifier of hidden states has no use for lm_head, and its checkpoints have none. */
    item->optional = row->module == Q3N__MODULE_SCORE_BIAS
                  || (row->module == Q3N__MODULE_HEAD && c->num_labels > 0
                      && c->classifier_input == Q3N_CLASSIFIER_HIDDEN);
    for (int k = 0; k < 3; k++) {
        item->dim[k] = q3n__config_dim(c, row->dim[k]);
        if (row->dim[k] != Q3N__DIM_ONE) item->n_dims = k + 1;
    }
}

/* What is done with each tensor of a plan: bind it, check its size, write it.  Anything but Q3N_OK
 * ends the walk and is its result. */
typedef q3n_result (*q3n__plan_fn)(void *user, const q3n__plan_item *item);

/* Those rows of one list whose module the layer has. */
static q3n_result q3n__plan_visit_rows(const q3n_config *c, const q3n__plan_row *rows, size_t n,
                                       int l, q3n__plan_fn fn, void *user)
{
    const unsigned modules = q3n__config_modules(c, l);
    for (size_t i = 0; i < n; i++) {
        if (!(rows[i].module & modules)) continue;
        q3n__plan_item item;
        q3n__plan_item_make(c, &rows[i], l, &item);
        const q3n_result r = fn(user, &item);
        if (r != Q3N_OK) return r;
    }
    return Q3N_OK;
}

/* Call fn for every tensor that a model of this geometry has, in the order of the file, until one
 * call does not return Q3N_OK; returns the last result.  The experts' gate, up and down follow one
 * another, as writers interleave their slices.  An item lives during its call. */
static q3n_result q3n__plan_visit(const q3n_config *c, q3n__plan_fn fn, void *user)
{
    const size_t n_global = sizeof q3n__global_rows / sizeof q3n__global_rows[0];
    const size_t n_mtp    = sizeof q3n__mtp_rows / sizeof q3n__mtp_rows[0];
    const size_t n_layer  = sizeof q3n__layer_rows / sizeof q3n__layer_rows[0];

    q3n_result r = q3n__plan_visit_rows(c, q3n__global_rows, n_global, Q3N__LAYER_NONE, fn, user);
    for (int l = 0; l < c->num_hidden_layers && r == Q3N_OK; l++)
        r = q3n__plan_visit_rows(c, q3n__layer_rows, n_layer, l, fn, user);
    if (r != Q3N_OK || c->num_mtp_layers == 0) return r;
    r = q3n__plan_visit_rows(c, q3n__mtp_rows, n_mtp, Q3N__LAYER_NONE, fn, user);
    if (r != Q3N_OK) return r;
    return q3n__plan_visit_rows(c, q3n__layer_rows, n_layer, Q3N__LAYER_MTP, fn, user);
}

/* =====================================================================================
 * [9] CONFIG                                                                 >>config
 *
 * The geometry of a model: its fields by name, and what may go together.  Knows nothing of files or
 * memory.
 *
 * A new field is a row of Q3N_CONFIG_LIST: files, listings and the check of ranges follow.  Later
 * code may assume of a geometry that q3n_config_check took: every field is in its range, every
 * tensor has at most 2^46 elements and lengths up to 2^26, heads are multiples, each layer has what
 * its kind needs.
 * ===================================================================================== */

/* ---- Fields by name: Q3N_CONFIG_LIST as a table ----
 *
 * Everything that treats fields alike (files, listings, the check of ranges) walks this table
 * and reaches a field by its offset, with memcpy, since there are two types. */
typedef struct q3n__config_row {
    const char *name;
    char        kind;            /* 'I' int, 'B' 0 or 1, 'E' enum (all int), 'F' double          */
    size_t      offset;          /* in q3n_config                                                */
    double      min, max;
} q3n__config_row;

static const q3n__config_row q3n__config_rows[] = {
#define Q3N__X(kind, name, min, max)                                                    \
    { #name, #kind[0], offsetof(q3n_config, name), min, max },
    Q3N_CONFIG_LIST(Q3N__X)
#undef Q3N__X
};
#define Q3N__N_CONFIG_ROWS (sizeof q3n__config_rows / sizeof q3n__config_rows[0])

/* Words of the enum fields, in the order of their values. */
static const char *const q3n__family_words[] = {
    "design", "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3"
};
static const char *const q3n__rope_type_words[] = { "default", "linear", "yarn", "table" };
static const char *const q3n__pooling_words[] = { "last", "first", "mean" };
static const char *const q3n__classifier_input_words[] = { "hidden", "logits" };
static const char *const q3n__problem_type_words[] = {
    "none", "regression", "single_label_classification", "multi_label_classification"
};

/* Which field has which words, so that one search serves all; the names are those of the fields. */
static const struct {
    const char        *field;
    const char *const *words;
    int                n;
} q3n__config_enums[] = {
#define Q3N__WORDS(field) { #field, q3n__##field##_words,                               \
                            (int)(sizeof q3n__##field##_words / sizeof q3n__##field##_words[0]) }
    Q3N__WORDS(family), Q3N__WORDS(rope_type), Q3N__WORDS(pooling), Q3N__WORDS(classifier_input),
    Q3N__WORDS(problem_type)
#undef Q3N__WORDS
};

/* A walk over forty rows: names are looked up when a file is opened or a host asks, not during
 * evaluation. */
static const q3n__config_row *q3n__config_find(const char *name)   /* NULL = no such field */
{
    for (size_t i = 0; i < Q3N__N_CONFIG_ROWS; i++)
        if (strcmp(q3n__config_rows[i].name, name) == 0) return &q3n__config_rows[i];
    return NULL;
}

/* The word of value v of an enum field; NULL if there is none.  Words are the file's language:
 * it holds no numbers of enums. */
static const char *q3n__config_enum_word(const char *field, int v)
{
    for (size_t i = 0; i < sizeof q3n__config_enums / sizeof q3n__config_enums[0]; i++)
        if (strcmp(q3n__config_enums[i].field, field) == 0)
            return v >= 0 && v < q3n__config_enums[i].n ? q3n__config_enums[i].words[v] : NULL;
    return NULL;
}

/* The inverse of q3n__config_enum_word, for words of files and of the command line. */
static int q3n__config_enum_value(const char *field, const char *word)   /* -1 = no such word */
{
    for (int v = 0; ; v++) {
        const char *w = q3n__config_enum_word(field, v);
        if (!w) return -1;
        if (strcmp(w, word) == 0) return v;
    }
}

/* Any numeric field; ints are exact in a double (53 bits of 32), so that ranges are one comparison
 * for both kinds. */
static double q3n__config_value(const q3n_config *c, const q3n__config_row *row)
{
    double f;
    int i;
    if (row->kind == 'F') {
        memcpy(&f, (const uint8_t *)c + row->offset, sizeof f);
        return f;
    }
    memcpy(&i, (const uint8_t *)c + row->offset, sizeof i);
    return i;
}

/* Read a configuration of the caller's, whose size may be another. */
static q3n_result q3n__config_read(q3n_config *c, const q3n_config *in, q3n_error *err)
{
    if (!in) return q3n__fail(err, Q3N_ERR_ARG, -1, "no configuration");
    return q3n__struct_read(c, sizeof *c, in, "q3n_config", err);
}

Q3N_DEF q3n_result q3n_config_value(const q3n_config *c, const char *field, double *out)
{
    q3n_config config;
    if (!field || !out) return Q3N_ERR_ARG;
    const q3n_result r = q3n__config_read(&config, c, NULL);
    const q3n__config_row *row = q3n__config_find(field);
    if (r != Q3N_OK || !row) return r != Q3N_OK ? r : Q3N_ERR_ARG;
    *out = q3n__config_value(&config, row);
    return Q3N_OK;
}

/* Doubles with 15 digits: a decimal number with that many comes back as it was written (DBL_DIG).
 */
Q3N_DEF const char *q3n_config_field(const q3n_config *c, int i, char text[64])
{
    q3n_config config;
    if (!text || i < 0 || (size_t)i >= Q3N__N_CONFIG_ROWS
        || q3n__config_read(&config, c, NULL) != Q3N_OK) return NULL;
    const q3n__config_row *row = &q3n__config_rows[i];
    const double v = q3n__config_value(&config, row);
    const char *word = row->kind == 'E' ? q3n__config_enum_word(row->name, (int)v) : NULL;
    if (word) {
        snprintf(text, 64, "%s", word);
    } else if (row->kind != 'F') {
        snprintf(text, 64, "%.0f", v);
    } else {
        snprintf(text, 64, "%.15g", v);
        for (char *p = text; *p; p++) if (*p == ',') *p = '.';   /* the host's locale */
    }
    return row->name;
}

/* Values that mean "as usual", for fields that a file does not give. */
static void q3n__config_defaults(q3n_config *c)
{
    *c = (q3n_config)Q3N_INIT(q3n_config);
    c->causal = 1;
    c->norm_topk_prob = 1;
    c->rms_norm_eps = 1e-6;
    c->rope_theta = 1e4;
    c->rope_factor = 1.0;
    c->rope_beta_fast = 32.0;
    c->rope_beta_slow = 1.0;
    c->rope_attention_factor = 1.0;
}

/* ---- What goes together ---- */

/* Lengths stay far enough below INT_MAX, and tensors below SIZE_MAX and every file system, that
 * later code adds and multiplies a few of them freely.  The ranges of single fields allow more: H D
 * is up to 2^22, an expert tensor up to 2^60 elements. */
#define Q3N__MAX_DIM      ((int64_t)1 << 26)
#define Q3N__MAX_ELEMENTS ((int64_t)1 << 46)

/* q3n__plan_fn: a length of 0 is one that the file chooses. */
static q3n_result q3n__check_item(void *user, const q3n__plan_item *item)
{
    q3n_error *err = (q3n_error *)user;
    int64_t elements = 1;
    for (int i = 0; i < item->n_dims; i++) {
        const int64_t d = item->dim[i];
        if (d > Q3N__MAX_DIM || (d > 0 && elements > Q3N__MAX_ELEMENTS / d))
            return q3n__fail(err, Q3N_ERR_ARG, -1, "%s would be too large: [%lld, %lld, %lld]",
                             item->name, (long long)item->dim[0], (long long)item->dim[1],
                             (long long)item->dim[2]);
        if (d > 0) elements *= d;
    }
    return Q3N_OK;
}

/* What a layer of its kind needs: fields that may be 0 in a model without such layers. */
static q3n_result q3n__check_layer(const q3n_config *c, int l, q3n_error *err)
{
    const unsigned modules = q3n__config_modules(c, l);
    char name[32];
    if (l == Q3N__LAYER_MTP) snprintf(name, sizeof name, "mtp.layers.0");
    else                     snprintf(name, sizeof name, "layer %d", l);
    /* Each kind of FFN and mixer, in turn: its sizes must not be 0, its heads must divide. */
    if ((modules & Q3N__MODULE_DENSE) && c->intermediate_size == 0)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "%s has a dense FFN, but intermediate_size is 0",
                         name);
    if ((modules & Q3N__MODULE_EXPERTS)
        && (c->num_experts == 0 || c->num_experts_per_tok == 0 || c->moe_intermediate_size == 0))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "%s has experts, but num_experts is %d,"
                         " num_experts_per_tok %d and moe_intermediate_size %d", name,
                         c->num_experts, c->num_experts_per_tok, c->moe_intermediate_size);
    if ((modules & Q3N__MODULE_EXPERTS) && c->num_experts_per_tok > c->num_experts)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "num_experts_per_tok %d is more than num_experts %d",
                         c->num_experts_per_tok, c->num_experts);
    if (!(modules & Q3N__MODULE_DELTA)) return Q3N_OK;
    if (c->linear_num_key_heads == 0 || c->linear_num_value_heads == 0
        || c->linear_key_head_dim == 0 || c->linear_value_head_dim == 0
        || c->linear_conv_kernel_dim == 0)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "%s is a DeltaNet layer: linear_num_key_heads,"
                         " linear_num_value_heads, linear_key_head_dim, linear_value_head_dim and"
                         " linear_conv_kernel_dim must not be 0", name);
    if (c->linear_num_value_heads % c->linear_num_key_heads != 0)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "linear_num_value_heads %d is not a multiple of"
                         " linear_num_key_heads %d", c->linear_num_value_heads,
                         c->linear_num_key_heads);
    if (!c->causal)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "%s is a DeltaNet layer, so causal must be 1", name);
    return Q3N_OK;
}

/* Rotary dimensions come in pairs (j, j + R/2).  The conditions of yarn are those that leave its
 * logarithms finite: theta > 1, rotations > 0 ([YaRN] 3.2, see q3n__yarn_dim). */
static q3n_result q3n__check_rope(const q3n_config *c, q3n_error *err)
{
    if (c->rotary_dim % 2 != 0 || c->rotary_dim > c->head_dim)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "rotary_dim %d must be even and at most head_dim %d",
                         c->rotary_dim, c->head_dim);
    if (c->rope_type == Q3N_ROPE_TABLE && c->rotary_dim != c->head_dim)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "with rope_type table rotary_dim %d must be head_dim"
                         " %d", c->rotary_dim, c->head_dim);
    if (c->rope_type != Q3N_ROPE_YARN) return Q3N_OK;
    if (c->rope_original_max_position == 0)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "rope_type yarn needs rope_original_max_position");
    if (!(c->rope_theta > 1.0 && c->rope_beta_slow > 0.0 && c->rope_beta_fast >= c->rope_beta_slow))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "rope_type yarn needs rope_theta above 1 and"
                         " rope_beta_fast >= rope_beta_slow > 0");
    return Q3N_OK;
}

/* Ranges first: everything after them multiplies and divides fields.  Then pairs of fields, layers,
 * and at last sizes, by walking the plan. */
static q3n_result q3n__config_check(const q3n_config *c, q3n_error *err)
{
    for (size_t i = 0; i < Q3N__N_CONFIG_ROWS; i++) {
        const q3n__config_row *row = &q3n__config_rows[i];
        const double v = q3n__config_value(c, row);
        if (!(v >= row->min && v <= row->max))
            return q3n__fail(err, Q3N_ERR_ARG, -1, "%s is %.15g, not in [%.15g, %.15g]", row->name,
                             v, row->min, row->max);
    }
    /* Ranges hold from here on: both are at least 1. */
    if (c->num_attention_heads % c->num_key_value_heads != 0)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "num_attention_heads %d is not a multiple of"
                         " num_key_value_heads %d", c->num_attention_heads, c->num_key_value_heads);
    if (c->num_mtp_layers > 0 && !c->causal)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "num_mtp_layers needs causal 1");
    for (int l = 0; l < c->num_hidden_layers; l++)
        if (c->layer_types[l] > 1 || c->layer_experts[l] > 1)
            return q3n__fail(err, Q3N_ERR_ARG, -1, "layer_types and layer_experts of layer %d must"
                             " be 0 or 1", l);
    q3n_result r = q3n__check_rope(c, err);
    for (int l = 0; l < c->num_hidden_layers && r == Q3N_OK; l++) r = q3n__check_layer(c, l, err);
    if (r == Q3N_OK && c->num_mtp_layers > 0) r = q3n__check_layer(c, Q3N__LAYER_MTP, err);
    if (r != Q3N_OK) return r;
    return q3n__plan_visit(c, q3n__check_item, err);
}

Q3N_DEF q3n_result q3n_config_check(const q3n_config *c, q3n_error *err)
{
    q3n_config config;
    const q3n_result r = q3n__config_read(&config, c, err);
    return r == Q3N_OK ? q3n__config_check(&config, err) : r;
}

/* ---- What follows from it: rotary frequencies ---- */

/* Dimension j (of R / 2, as a real number) whose wave turns `rotations` times within the original
 * context ([YaRN] 3.2): theta^(-2 j / R) L = 2 pi rotations, solved for j. */
static double q3n__yarn_dim(const q3n_config *c, double rotations)
{
    const double two_pi = 6.283185307179586;
    return c->rotary_dim * log(c->rope_original_max_position / (rotations * two_pi))
         / (2.0 * log(c->rope_theta));
}

/* inv_freq[j] = theta^(-2j / R), in radians a token, j = 0 .. R / 2 - 1; "linear" divides all by
 * the factor, "yarn" those that turn slowly, with a ramp between beta_fast and beta_slow rotations
 * ([HF] modeling_rope_utils).  Doubles: at position 10^6 rounding to a float turns the angle by
 * 0.06.
 *
 *     ramp   0 up to low: turns often, distances between near tokens: as it is
 *            1 from high on: turned less than beta_slow times in training: stretched by the factor
 */
static void q3n__rope_frequencies(const q3n_config *c, double *inv_freq)
{
    /* [HF] rounds the ends of the ramp outwards and holds them inside [0, R - 1]; equal ends would
     * divide by 0. */
    double low = 0, high = 0;
    if (c->rope_type == Q3N_ROPE_YARN) {
        low  = floor(q3n__yarn_dim(c, c->rope_beta_fast));
        high = ceil(q3n__yarn_dim(c, c->rope_beta_slow));
        if (!(low > 0)) low = 0;
        if (!(high < c->rotary_dim - 1)) high = c->rotary_dim - 1;
        if (high <= low) high = low + 0.001;
    }
    for (int j = 0; j < c->rotary_dim / 2; j++) {
        const double f = pow(c->rope_theta, -2.0 * j / c->rotary_dim);
        double ramp = 0.0;                                 /* share of the divided frequency */
        if (c->rope_type == Q3N_ROPE_LINEAR) ramp = 1.0;
        if (c->rope_type == Q3N_ROPE_YARN) {
            ramp = (j - low) / (high - low);
            ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
        }
        inv_freq[j] = f * (1.0 - ramp) + (ramp > 0 ? f / c->rope_factor * ramp : 0.0);
    }
}

/* What cos and sin are multiplied by: with yarn scores would grow with the context ([YaRN] 3.4). */
static double q3n__rope_scale(const q3n_config *c)
{
    if (c->rope_attention_factor > 0) return c->rope_attention_factor;
    return c->rope_type == Q3N_ROPE_YARN ? 0.1 * log(c->rope_factor) + 1.0 : 1.0;
}

/* =====================================================================================
 * [10] MODEL FILES                                                      >>model-files
 *
 * The bytes of a .q3n file, and an open file as all later code knows it (q3n_model).  Here are the
 * format and the first steps of loading; the LOADER binds what they find.  The input is hostile.
 *
 *     header     sizes, version, checksum                       every section then lies in the file
 *     sections   where CONFIG, TENSORS, NAMES, TOKENIZER are
 *     config     keys -> q3n_config                             and numbers that fit together
 *     tensors    records -> m->tensors, names sorted            every tensor then lies in the file
 *     weights    the plan of the config -> m->weights, layers   type and shape are the plan's
 *     rope       frequencies
 *
 * The order is what makes it safe: each step may use what those before it have proved, and no
 * number of the file is used earlier.  Sections and tensors may overlap: nothing is ever written to
 * them.  Errors name the byte where they were noticed and what was expected there;
 * Q3N_ERR_UNSUPPORTED means that a later library may read the file, Q3N_ERR_FORMAT that none will.
 * Knows of the tokenizer where its section lies, and nothing of sessions, threads and kernels.
 * ===================================================================================== */

/* ---- FILE FORMAT  .q3n, version 1 ----
 *
 * All numbers are little-endian; offsets count bytes from the start of the file.  The file is
 * used in place: the header, the sections and the tensors are read through the mapping and
 * nothing is unpacked.  `meta_bytes` below covers header and sections; the tensors follow.
 *
 *   HEADER, 64 bytes
 *      0  u8[8]  magic           89 51 33 4E 0D 0A 1A 0A  ("\x89Q3N\r\n\x1a\n")
 *      8  u32    version         1; a reader refuses any other
 *     12  u32    n_sections      at most 64
 *     16  u64    file_bytes      size of the whole file
 *     24  u64    meta_bytes      header + section table + all sections
 *     32  u32    meta_crc        CRC-32 of bytes [0, meta_bytes) with this field taken as 0
 *     36  u8[28] zero
 *
 *   SECTION TABLE, at 64: n_sections records of 32 bytes, each kind at most once.
 *      0  u32    kind            1 CONFIG, 2 TENSORS, 3 NAMES, 4 TOKENIZER
 *      4  u32    flags           bit 0: a reader that does not know the kind must refuse the file;
 *                                without it an unknown section is ignored
 *      8  u64    offset          multiple of 8, inside [64 + 32 n_sections, meta_bytes)
 *     16  u64    bytes
 *     24  u64    zero
 *
 *   CONFIG: key/value entries back to back, each padded with zeros to a multiple of 8 bytes.
 *      0  u8     key_bytes       1 .. 255
 *      1  u8     type            1 int (i64 values), 2 float (f64 values), 3 string (UTF-8)
 *      2  u16    zero
 *      4  u32    value_bytes     ints and floats: 8 x the number of values (arrays are > 8)
 *      8  u8[]   key, then (unaligned) value
 *     Unknown keys are ignored; a known key with another type, or given twice, is an error.  Keys:
 *     the fields of q3n_config by name (Q3N_CONFIG_LIST; family, rope_type, pooling,
 *     classifier_input and problem_type as strings), layer_types (ints, one a layer: 0 attention,
 *     1 DeltaNet), layer_experts (ints: 0 dense FFN, 1 experts), name (string, up to 255 bytes),
 *     eos_ids (ints, up to 16), pad_id (of a classifier: ignored at the end of a text), labels
 *     (string: num_labels names, a byte 0 after each), chat (string, up to 31 bytes: "none",
 *     "chatml", "qwen3", ...), tokenizer_pattern (string: "qwen2" or "qwen3_5"), tokenizer_nfc (int
 *     0 or 1), tokenizer_prefix, tokenizer_suffix (ints, up to 16: ids put before and after a
 *     text); and, ignored by this library, bos_id (int) and converter (string, for people).
 *
 *   TENSORS
 *      0  u32    n_tensors
 *      4  u32    record_bytes    80 in version 1; larger records may follow, the rest is ignored
 *      8  records of record_bytes each:
 *          0  u32  name_offset   in NAMES
 *          4  u32  name_bytes    1 .. 255
 *          8  u32  type          id of Q3N_TYPE_LIST; an unknown one is an error
 *         12  u32  n_dims        1 .. 3
 *         16  u64  dim[3]        slowest first, unused ones 1
 *         40  u64  offset        multiple of 64, >= meta_bytes
 *         48  u64  slice_bytes   bytes of one slice: [dim1, dim2] of three dimensions, else all
 *         56  u64  stride        bytes from one slice to the next (three dimensions), else 0
 *         64  u32  crc           CRC-32 of the slices in order, without what lies between them
 *         68  u8[12] zero
 *
 *   NAMES: the tensor names, without terminator.
 *
 *   TENSOR DATA: float types row by row as they are, quantised types in tiles.  Each tensor starts
 *   at a multiple of 64 and ends before the next; gaps are zero.  The experts of a layer are three
 *   tensors of three dimensions, mlp.experts.{gate,up,down}_proj.weight, whose slices interleave:
 *   expert e is gate | up | down, each at a multiple of 64, and the whole starts at a multiple of
 *   4096, so that the three tensors have one stride (a multiple of 4096) and one read fetches an
 *   expert.
 *
 *   TOKENIZER is in section >>vocabulary, tensors by name in >>tensors, the tiles of quantised
 *   types in >>types. */

/* Limits of what a file may ask for, so that what is allocated and searched is bounded before it
 * is. */
#define Q3N__MAX_SECTIONS 64
#define Q3N__MAX_TENSORS  (1 << 16)
#define Q3N__MAX_IDS      16             /* in eos_ids, tokenizer_prefix and tokenizer_suffix     */
#define Q3N__MAX_LABELS   (1 << 20)
#define Q3N__MAX_NAME     255            /* bytes of the model's name                            */
#define Q3N__MAX_CHAT     31             /* bytes of chat                                        */
#define Q3N__SECTION_BYTES 32
#define Q3N__HEADER_BYTES  64

/* Numbers of the file format: kinds of sections, types of values. */
enum { Q3N__SECTION_CONFIG = 1, Q3N__SECTION_TENSORS, Q3N__SECTION_NAMES, Q3N__SECTION_TOKENIZER,
       Q3N__SECTION_COUNT };
enum { Q3N__VALUE_INT = 1, Q3N__VALUE_FLOAT, Q3N__VALUE_STRING };

/* "\x89Q3N\r\n\x1a\n". */
static const uint8_t q3n__magic[8] = { 0x89, 'Q', '3', 'N', 0x0D, 0x0A, 0x1A, 0x0A };

/* Token ids of the configuration. */
typedef struct {
    int32_t id[Q3N__MAX_IDS];
    int     n;
} q3n__ids;

typedef struct {
    const uint8_t *data;                 /* NULL = the file has no such section                  */
    size_t         offset, bytes;
} q3n__section;

/* How text is cut into words before merging: the Split patterns of the published tokenizer.json. */
typedef enum q3n__pattern {
    Q3N__PATTERN_QWEN2,       /* letters \p{L}; "qwen2" in the file */
    Q3N__PATTERN_QWEN3_5      /* letters and marks [\p{L}\p{M}]; "qwen3_5" */
} q3n__pattern;

typedef struct q3n__tokenizer q3n__tokenizer;   /* section >>vocabulary */

/* An open file.  Written while it is loaded, constant afterwards.  What points into `data`:
 * tensors, layers, weights, labels, the tokenizer's lists.  What is allocated: see q3n__model_free,
 * and q3n__tokenizer_close. */
struct q3n_model {
    q3n_allocator  allocator;
    q3n_logger     logger;
    const uint8_t *data;                 /* the whole file                                       */
    size_t         bytes;
    int            mapped;               /* 1 = data is ours to unmap                            */
    q3n__file_id   file;                 /* that data is, zeros = none                           */
    q3n_config     config;
    char           name[Q3N__MAX_NAME + 1], chat[Q3N__MAX_CHAT + 1];
    q3n__ids       eos, prefix, suffix;  /* of a text; what q3n_tokenize puts around it          */
    int32_t        pad_id;               /* -1 = none                                            */
    const char   **labels;               /* [num_labels] in the file, NULL = none                */
    q3n__pattern   pattern;
    int            nfc;
    int            n_tensors;
    const uint8_t *records;              /* of the tensors, record_bytes each, in the file       */
    size_t         record_bytes;
    q3n_tensor    *tensors;              /* [n_tensors], in the order of the file                */
    char          *names;                /* their names, each with a 0 after                     */
    const q3n_tensor **by_name;          /* [n_tensors], sorted by name                          */
    q3n__weights   weights;
    q3n__layer    *layers;               /* [num_hidden_layers + num_mtp_layers], trunk first    */
    double        *inv_freq;             /* [rotary_dim / 2]                                     */
    double         rope_scale;           /* multiplies cos and sin                               */
    int            has_quantised;        /* 1 = a tensor has a quantised type                    */
    q3n__section   words;                /* TOKENIZER of the file                                */
    q3n__tokenizer *tokenizer;           /* made of it when all else is loaded; NULL = none      */
};

/* Configuration keys that are no fields of q3n_config.  The enum numbers the names below it. */
enum { Q3N__KEY_LAYER_TYPES, Q3N__KEY_LAYER_EXPERTS, Q3N__KEY_EOS_IDS, Q3N__KEY_NAME, Q3N__KEY_CHAT,
       Q3N__KEY_NFC, Q3N__KEY_PREFIX, Q3N__KEY_SUFFIX, Q3N__KEY_PAD_ID, Q3N__KEY_LABELS,
       Q3N__KEY_PATTERN, Q3N__N_OTHER_KEYS };
static const char *const q3n__other_keys[Q3N__N_OTHER_KEYS] = {
    "layer_types", "layer_experts", "eos_ids", "name", "chat", "tokenizer_nfc",
    "tokenizer_prefix", "tokenizer_suffix", "pad_id", "labels", "tokenizer_pattern"
};

/* What the parser carries along; it is gone when the model is open. */
typedef struct {
    q3n_model   *m;
    q3n__section section[Q3N__SECTION_COUNT];
    size_t       meta_bytes;
    int          n_types, n_experts;     /* lengths of layer_types and layer_experts             */
    size_t       n_labels;               /* names in labels                                      */
    uint8_t      seen[Q3N__N_OTHER_KEYS + Q3N__N_CONFIG_ROWS];   /* 1 = the key has appeared     */
    q3n_error   *err;
} q3n__load;

/* ---- Header and sections ---- */

/* What the file is, that it is whole, and that its metadata are undamaged: in this order, so that
 * the message says what a person can do.  The magic begins with a byte above 7F and has line ends
 * of both kinds: transfers as text spoil it.  file_bytes finds downloads that were cut off, which
 * the checksum of the metadata would not. */
static q3n_result q3n__load_header(q3n__load *ld, int skip_checksum)
{
    const q3n_model *m = ld->m;
    const uint8_t *p = m->data;
    if (m->bytes < Q3N__HEADER_BYTES)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, 0, "file has %zu bytes, a model has at least %d",
                         m->bytes, Q3N__HEADER_BYTES);
    if (memcmp(p, q3n__magic, sizeof q3n__magic) != 0)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, 0,
                         "not a .q3n file: the first bytes are not \\x89Q3N"
                         " (convert a checkpoint with tools/convert.py)");
    const uint32_t version = q3n__load_u32(p + 8), n_sections = q3n__load_u32(p + 12);
    const uint64_t file_bytes = q3n__load_u64(p + 16), meta_bytes = q3n__load_u64(p + 24);
    if (version != 1)
        return q3n__fail(ld->err, Q3N_ERR_UNSUPPORTED, 8,
                         "file format version %u, this library reads 1", version);
    if (file_bytes != m->bytes)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, 16, "file has %zu bytes, its header says %llu: "
                         "it is cut off or has something after it", m->bytes,
                         (unsigned long long)file_bytes);
    if (n_sections > Q3N__MAX_SECTIONS)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, 12, "%u sections, at most %d", n_sections,
                         Q3N__MAX_SECTIONS);
    if (meta_bytes > file_bytes
        || meta_bytes < Q3N__HEADER_BYTES + (uint64_t)n_sections * Q3N__SECTION_BYTES)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, 24, "metadata of %llu bytes in a file of %llu",
                         (unsigned long long)meta_bytes, (unsigned long long)file_bytes);
    ld->meta_bytes = (size_t)meta_bytes;
    if (skip_checksum) return Q3N_OK;
    /* The checksum's own four bytes count as zeros: they cannot hold a checksum of themselves. */
    const uint8_t zero[4] = { 0, 0, 0, 0 };
    uint32_t crc = q3n__crc32(0, p, 32);
    crc = q3n__crc32(crc, zero, 4);
    crc = q3n__crc32(crc, p + 36, ld->meta_bytes - 36);
    if (crc != q3n__load_u32(p + 32))
        return q3n__fail(ld->err, Q3N_ERR_CHECKSUM, 32, "metadata checksum is %08x, expected %08x: "
                         "the file is damaged", crc, q3n__load_u32(p + 32));
    return Q3N_OK;
}

/* Each section lies after the table and inside the metadata.  Unknown kinds are ignored unless
 * their flag says that a reader must know them: so later versions can add what older ones may
 * ignore. */
static q3n_result q3n__load_sections(q3n__load *ld)
{
    const uint8_t *p = ld->m->data;
    const uint32_t n = q3n__load_u32(p + 12);
    /* q3n__load_header has held the whole table against meta_bytes: no record is cut off. */
    const uint64_t first = Q3N__HEADER_BYTES + (uint64_t)n * Q3N__SECTION_BYTES;
    for (uint32_t i = 0; i < n; i++) {
        const size_t at = Q3N__HEADER_BYTES + (size_t)i * Q3N__SECTION_BYTES;
        const uint32_t kind = q3n__load_u32(p + at), flags = q3n__load_u32(p + at + 4);
        const uint64_t offset = q3n__load_u64(p + at + 8), bytes = q3n__load_u64(p + at + 16);
        if (offset % 8 != 0 || offset < first || offset > ld->meta_bytes
            || bytes > ld->meta_bytes - offset)
            return q3n__fail(ld->err, Q3N_ERR_FORMAT, (int64_t)at,
                             "section %u (kind %u): bytes [%llu, "
                             "+%llu) are not inside the metadata [%llu, %zu)",
                             i, kind, (unsigned long long)offset, (unsigned long long)bytes,
                             (unsigned long long)first, ld->meta_bytes);
        if (kind == 0 || kind >= Q3N__SECTION_COUNT) {
            if (flags & 1)
                return q3n__fail(ld->err, Q3N_ERR_UNSUPPORTED, (int64_t)at, "section of kind %u is "
                                 "needed and not known to this version of the library", kind);
            continue;
        }
        if (ld->section[kind].data)
            return q3n__fail(ld->err, Q3N_ERR_FORMAT, (int64_t)at,
                             "section of kind %u appears twice", kind);
        ld->section[kind].data = p + offset;
        ld->section[kind].offset = (size_t)offset;
        ld->section[kind].bytes = (size_t)bytes;
    }
    /* Only TOKENIZER may be missing. */
    static const char *const names[] = { "", "CONFIG", "TENSORS", "NAMES" };
    for (int kind = Q3N__SECTION_CONFIG; kind <= Q3N__SECTION_NAMES; kind++)
        if (!ld->section[kind].data)
            return q3n__fail(ld->err, Q3N_ERR_FORMAT, Q3N__HEADER_BYTES, "section %s is missing",
                             names[kind]);
    return Q3N_OK;
}

/* ---- Configuration ---- */

/* One key with its value, as it lies in the file.  value points into the mapping, at any address:
 * numbers are read with q3n__load_i64 and _f64. */
typedef struct {
    char           key[256];             /* ends with 0                                          */
    int            type, n_values;       /* ints and floats                                      */
    const uint8_t *value;
    size_t         value_bytes;
    int64_t        offset;               /* of the entry in the file                             */
} q3n__entry;

/* Read the entry at *at and move on.  0 = the section is over; -1 = error.
 *
 *     byte   0          1     4            8    8 + key_bytes
 *            key_bytes  type  value_bytes  key  value, at any address    zeros to a multiple of 8
 *
 * The lengths are held against what is left one after the other, so that their sum cannot wrap.
 * The last entry may lack its padding. */
static int q3n__entry_next(q3n__load *ld, size_t *at, q3n__entry *e)
{
    const q3n__section *s = &ld->section[Q3N__SECTION_CONFIG];
    if (*at >= s->bytes) return 0;
    e->offset = (int64_t)(s->offset + *at);
    const size_t left = s->bytes - *at;
    if (left < 8) {
        q3n__fail(ld->err, Q3N_ERR_FORMAT, e->offset, "configuration entry is cut off");
        return -1;
    }
    const uint8_t *p = s->data + *at;
    const size_t key_bytes = p[0];
    e->type = p[1];
    e->value_bytes = q3n__load_u32(p + 4);
    e->value = p + 8 + key_bytes;
    e->n_values = 0;
    if (key_bytes == 0 || e->value_bytes > left - 8 || key_bytes > left - 8 - e->value_bytes) {
        q3n__fail(ld->err, Q3N_ERR_FORMAT, e->offset, "configuration entry is empty or cut off");
        return -1;
    }
    memcpy(e->key, p + 8, key_bytes);
    e->key[key_bytes] = 0;
    if (e->type == Q3N__VALUE_INT || e->type == Q3N__VALUE_FLOAT) {
        e->n_values = e->value_bytes / 8 > INT_MAX ? INT_MAX : (int)(e->value_bytes / 8);
        if (e->value_bytes % 8 != 0 || e->value_bytes == 0) {
            q3n__fail(ld->err, Q3N_ERR_FORMAT, e->offset, "configuration '%s': %zu bytes are not "
                      "numbers of 8", e->key, e->value_bytes);
            return -1;
        }
    }
    /* At most left + 7, which fits: left is a size in memory. */
    size_t step = (8 + key_bytes + e->value_bytes + 7) / 8 * 8;
    *at += step < left ? step : left;
    return 1;
}

/* "configuration 'eos_ids': expected at most 16 ints", at the byte where the entry begins. */
static q3n_result q3n__entry_error(q3n__load *ld, const q3n__entry *e, const char *expected)
{
    return q3n__fail(ld->err, Q3N_ERR_FORMAT, e->offset, "configuration '%s': expected %s", e->key,
                     expected);
}

/* A string value as text; 0 if it is none, too long, or has a byte 0 in it, which would make it
 * another word for C than for whoever wrote the file. */
static int q3n__entry_string(const q3n__entry *e, char *out, size_t size)
{
    if (e->type != Q3N__VALUE_STRING || e->value_bytes >= size
        || memchr(e->value, 0, e->value_bytes)) return 0;
    memcpy(out, e->value, e->value_bytes);
    out[e->value_bytes] = 0;
    return 1;
}

/* A list of 0 and 1, one a layer.  That it has as many as there are layers is checked when all keys
 * are read: they come in any order. */
static q3n_result q3n__load_layer_kinds(q3n__load *ld, const q3n__entry *e, unsigned char *out,
                                        int *n)
{
    if (e->type != Q3N__VALUE_INT || e->n_values > Q3N_MAX_LAYERS)
        return q3n__entry_error(ld, e, "at most 256 ints, one a layer");
    for (int i = 0; i < e->n_values; i++) {
        const int64_t v = q3n__load_i64(e->value + 8 * (size_t)i);
        if (v != 0 && v != 1) return q3n__entry_error(ld, e, "0 or 1 for every layer");
        out[i] = (unsigned char)v;
    }
    *n = e->n_values;
    return Q3N_OK;
}

/* Up to 16 ids.  Those around a text must be in the vocabulary (q3n__load_config): a session
 * evaluates them.  An end-of-text id outside it does no harm: no token is ever equal to it. */
static q3n_result q3n__load_ids(q3n__load *ld, const q3n__entry *e, q3n__ids *out)
{
    if (e->type != Q3N__VALUE_INT || e->n_values > Q3N__MAX_IDS)
        return q3n__entry_error(ld, e, "at most 16 ints");
    for (int i = 0; i < e->n_values; i++) {
        const int64_t v = q3n__load_i64(e->value + 8 * (size_t)i);
        if (v < 0 || v >= INT32_MAX) return q3n__entry_error(ld, e, "token ids");
        out->id[i] = (int32_t)v;
    }
    out->n = e->n_values;
    return Q3N_OK;
}

/* The padding token: a classifier ignores those at the end of a text. */
static q3n_result q3n__load_pad_id(q3n__load *ld, const q3n__entry *e)
{
    if (e->type != Q3N__VALUE_INT || e->n_values != 1) return q3n__entry_error(ld, e, "one int");
    const int64_t v = q3n__load_i64(e->value);
    if (v < 0 || v >= INT32_MAX) return q3n__entry_error(ld, e, "a token id");
    ld->m->pad_id = (int32_t)v;
    return Q3N_OK;
}

/* Names with a byte 0 after each, "negative\0positive\0": m->labels points at them in the file. */
static q3n_result q3n__load_labels(q3n__load *ld, const q3n__entry *e)
{
    q3n_model *m = ld->m;
    const char *p = (const char *)e->value, *end = p + e->value_bytes;
    if (e->type != Q3N__VALUE_STRING || e->value_bytes == 0 || end[-1] != 0)
        return q3n__entry_error(ld, e, "a string with a byte 0 after each name");
    for (const char *q = p; q < end; q++) ld->n_labels += *q == 0;
    if (ld->n_labels > Q3N__MAX_LABELS) return q3n__entry_error(ld, e, "at most 2^20 names");
    m->labels = (const char **)q3n__alloc(&m->allocator, ld->n_labels * sizeof *m->labels);
    if (!m->labels)
        return q3n__fail(ld->err, Q3N_ERR_MEMORY, -1, "no memory for the names of %zu labels",
                         ld->n_labels);
    for (size_t i = 0; i < ld->n_labels; i++, p += strlen(p) + 1) m->labels[i] = p;
    return Q3N_OK;
}

/* One of q3n_config's fields, inside the range of its row in Q3N_CONFIG_LIST.  A word that is not
 * known is Q3N_ERR_UNSUPPORTED: a later version may know another family. */
static q3n_result q3n__load_field(q3n__load *ld, const q3n__entry *e, const q3n__config_row *row)
{
    q3n_config *c = &ld->m->config;
    uint8_t *field = (uint8_t *)c + row->offset;
    if (row->kind == 'F') {
        if (e->type != Q3N__VALUE_FLOAT || e->n_values != 1)
            return q3n__entry_error(ld, e, "one float");
        const double v = q3n__load_f64(e->value);
        if (!(v >= row->min && v <= row->max))
            return q3n__fail(ld->err, Q3N_ERR_FORMAT, e->offset, "configuration '%s': %g is not in "
                             "[%g, %g]", e->key, v, row->min, row->max);
        memcpy(field, &v, sizeof v);
        return Q3N_OK;
    }
    /* Words and ints come to one range check; -1 is below every range. */
    int64_t v = -1;
    if (row->kind == 'E') {
        char word[64];
        if (!q3n__entry_string(e, word, sizeof word)) return q3n__entry_error(ld, e, "a word");
        v = q3n__config_enum_value(row->name, word);
        if (v < 0)
            return q3n__fail(ld->err, Q3N_ERR_UNSUPPORTED, e->offset,
                             "configuration '%s': '%s' is not "
                             "known to this version of the library",
                             e->key, word);
    } else {
        if (e->type != Q3N__VALUE_INT || e->n_values != 1)
            return q3n__entry_error(ld, e, "one int");
        v = q3n__load_i64(e->value);
    }
    if (v < (int64_t)row->min || v > (int64_t)row->max)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, e->offset, "configuration '%s': %lld is not in "
                         "[%.0f, %.0f]", e->key, (long long)v, row->min, row->max);
    const int value = (int)v;
    memcpy(field, &value, sizeof value);
    return Q3N_OK;
}

/* "qwen2" or "qwen3_5"; patterns are code here, not expressions of the file (section >>tokenizer).
 */
static q3n_result q3n__load_pattern(q3n__load *ld, const q3n__entry *e)
{
    char word[64];
    if (!q3n__entry_string(e, word, sizeof word)) return q3n__entry_error(ld, e, "a word");
    if (strcmp(word, "qwen3_5") == 0)    ld->m->pattern = Q3N__PATTERN_QWEN3_5;
    else if (strcmp(word, "qwen2") == 0) ld->m->pattern = Q3N__PATTERN_QWEN2;
    else
        return q3n__fail(ld->err, Q3N_ERR_UNSUPPORTED, e->offset, "tokenizer pattern '%s' is not"
                         " known to this version of the library", word);
    return Q3N_OK;
}

/* Keys that are no fields of q3n_config; key is Q3N__KEY_*. */
static q3n_result q3n__load_other(q3n__load *ld, const q3n__entry *e, size_t key)
{
    q3n_model *m = ld->m;
    switch (key) {
    case Q3N__KEY_LAYER_TYPES:
        return q3n__load_layer_kinds(ld, e, m->config.layer_types, &ld->n_types);
    case Q3N__KEY_LAYER_EXPERTS:
        return q3n__load_layer_kinds(ld, e, m->config.layer_experts, &ld->n_experts);
    case Q3N__KEY_EOS_IDS:
        return q3n__load_ids(ld, e, &m->eos);
    case Q3N__KEY_PREFIX:
        return q3n__load_ids(ld, e, &m->prefix);
    case Q3N__KEY_SUFFIX:
        return q3n__load_ids(ld, e, &m->suffix);
    case Q3N__KEY_PAD_ID:
        return q3n__load_pad_id(ld, e);
    case Q3N__KEY_LABELS:
        return q3n__load_labels(ld, e);
    case Q3N__KEY_NAME:
        return q3n__entry_string(e, m->name, sizeof m->name) ? Q3N_OK
             : q3n__entry_error(ld, e, "a string of at most 255 bytes");
    case Q3N__KEY_CHAT:
        return q3n__entry_string(e, m->chat, sizeof m->chat) ? Q3N_OK
             : q3n__entry_error(ld, e, "a string of at most 31 bytes");
    case Q3N__KEY_NFC:
        if (e->type != Q3N__VALUE_INT || e->n_values != 1)
            return q3n__entry_error(ld, e, "one int");
        m->nfc = q3n__load_i64(e->value) != 0;
        return Q3N_OK;
    default:
        return q3n__load_pattern(ld, e);
    }
}

/* Unknown keys are ignored, however many; each of the others may appear once.  What has
 * been seen is an array of the known keys: comparing each with all before it would be quadratic in
 * a file of many. */
static q3n_result q3n__load_entry(q3n__load *ld, const q3n__entry *e)
{
    const q3n__config_row *row = q3n__config_find(e->key);
    size_t key = 0;
    while (!row && key < Q3N__N_OTHER_KEYS && strcmp(q3n__other_keys[key], e->key) != 0) key++;
    if (key == Q3N__N_OTHER_KEYS) return Q3N_OK;
    const size_t number = row ? Q3N__N_OTHER_KEYS + (size_t)(row - q3n__config_rows) : key;
    if (ld->seen[number]) return q3n__entry_error(ld, e, "it only once");
    ld->seen[number] = 1;
    return row ? q3n__load_field(ld, e, row) : q3n__load_other(ld, e, key);
}

/* All entries, then what needs more than one of them.  Keys that are missing have the values of
 * q3n__config_defaults, or 0, which the ranges of necessary ones refuse. */
static q3n_result q3n__load_config(q3n__load *ld)
{
    q3n__entry e;
    size_t at = 0;
    int got;
    while ((got = q3n__entry_next(ld, &at, &e)) > 0) {
        const q3n_result r = q3n__load_entry(ld, &e);
        if (r != Q3N_OK) return r;
    }
    if (got < 0) return Q3N_ERR_FORMAT;
    /* Without these lists no layer is known; a file must have both, one number a layer. */
    const int layers = ld->m->config.num_hidden_layers;
    if (ld->n_types != layers || ld->n_experts != layers)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT,
                         (int64_t)ld->section[Q3N__SECTION_CONFIG].offset,
                         "configuration: %s has %d layers, expected %d",
                         ld->n_types != layers ? "layer_types" : "layer_experts",
                         ld->n_types != layers ? ld->n_types : ld->n_experts, layers);
    if (ld->m->labels && ld->n_labels != (size_t)ld->m->config.num_labels)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT,
                         (int64_t)ld->section[Q3N__SECTION_CONFIG].offset,
                         "configuration: labels has %zu names, expected num_labels, %d",
                         ld->n_labels, ld->m->config.num_labels);
    /* A session would evaluate these ids, so they must have rows of the embedding. */
    const q3n__ids *around[] = { &ld->m->prefix, &ld->m->suffix };
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < around[k]->n; i++)
            if (around[k]->id[i] >= ld->m->config.vocab_size)
                return q3n__fail(ld->err, Q3N_ERR_FORMAT,
                                 (int64_t)ld->section[Q3N__SECTION_CONFIG].offset,
                                 "configuration: %s: id %d, expected less than vocab_size, %d",
                                 k ? "tokenizer_suffix" : "tokenizer_prefix",
                                 (int)around[k]->id[i], ld->m->config.vocab_size);
    /* q3n_config_check answers as for an argument; here the file is wrong, at a place of its own.
     */
    q3n_error why;
    if (q3n__config_check(&ld->m->config, &why) != Q3N_OK)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, (int64_t)ld->section[Q3N__SECTION_CONFIG].offset,
                         "configuration: %s", why.message);
    return Q3N_OK;
}

/* =====================================================================================
 * [11] LOADER                                                                >>loader
 *
 * The tensors of a model file: their records become a table, and each tensor of the plan is bound
 * to its field, with type, shape and place checked.  After q3n__load_weights nothing looks up a
 * name or checks a shape again.  Tensor data are not looked at, but for tables of rope: opening
 * reads no weights.  Also what a model weighs, and whether its data are whole.
 * Knows what MODEL FILES knows.
 * ===================================================================================== */

/* ---- Tensor table ---- */

/* By name, then as in the file.  Sorted, so that no choice of names makes a search long: at most
 * 17 comparisons of 255 bytes for Q3N__MAX_TENSORS.  A hash table in its place took 34 to 120 s to
 * open a file of 65,536 names that share one slot. */
static int q3n__compare_names(const void *left, const void *right)
{
    const q3n_tensor *a = *(const q3n_tensor *const *)left;
    const q3n_tensor *b = *(const q3n_tensor *const *)right;
    Q3N__STEP();
    const int order = strcmp(a->name, b->name);
    return order != 0 ? order : a < b ? -1 : a > b;
}

/* Bisection in by_name.  For binding and for callers that ask by name; evaluation never does. */
static const q3n_tensor *q3n__find_tensor(const q3n_model *m, const char *name)   /* NULL = none */
{
    int low = 0, high = m->n_tensors;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        Q3N__STEP();
        const int order = strcmp(name, m->by_name[middle]->name);
        if (order == 0) return m->by_name[middle];
        if (order < 0) high = middle;
        else           low = middle + 1;
    }
    return NULL;
}

/* Name, type and dimensions of the record at p, which begins at byte `at` of the file.  The name is
 * copied to `name` [256] and ended by 0, since NAMES has no terminators.  Lengths are 1 to 2^30:
 * those of real models are far below, and row sizes are computed from an int. */
static q3n_result q3n__load_tensor_shape(q3n__load *ld, const uint8_t *p, int64_t at, q3n_tensor *t,
                                         char *name)
{
    const q3n__section *names = &ld->section[Q3N__SECTION_NAMES];
    const uint32_t name_offset = q3n__load_u32(p), name_bytes = q3n__load_u32(p + 4);
    if (name_bytes == 0 || name_bytes > 255 || name_offset > names->bytes
        || name_bytes > names->bytes - name_offset
        || memchr(names->data + name_offset, 0, name_bytes))
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, at,
                         "tensor name at %u, %u bytes long, is not a name "
                         "inside NAMES of %zu bytes",
                         name_offset, name_bytes, names->bytes);
    memcpy(name, names->data + name_offset, name_bytes);
    name[name_bytes] = 0;
    t->name = name;
    const uint32_t type = q3n__load_u32(p + 8), n_dims = q3n__load_u32(p + 12);
    if (type >= Q3N_TYPE_COUNT || !q3n__types[type].name)
        return q3n__fail(ld->err, Q3N_ERR_UNSUPPORTED, at + 8,
                         "%s: tensor type %u is not known to this "
                         "version of the library",
                         name, type);
    if (n_dims < 1 || n_dims > 3)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, at + 12, "%s: %u dimensions, expected 1 to 3",
                         name, n_dims);
    t->type = (q3n_type)type;
    t->n_dims = (int)n_dims;
    for (int i = 0; i < 3; i++) {
        const uint64_t dim = q3n__load_u64(p + 16 + 8 * i);
        if (dim < 1 || dim > (1u << 30) || (i >= t->n_dims && dim != 1))
            return q3n__fail(ld->err, Q3N_ERR_FORMAT, at + 16 + 8 * i, "%s: dimension %d is %llu",
                             name, i, (unsigned long long)dim);
        t->dim[i] = (int64_t)dim;
    }
    return Q3N_OK;
}

/* Where the tensor lies, and that it lies inside the file.
 *
 *     two dimensions or one   offset [ slice ]                   stride 0
 *     three, an expert each   offset [ slice ] ... [ slice ] ... [ slice ]
 *                                    |<- stride ->|              between them other tensors
 *
 * A slice is rows x bytes of a row; quantised types store whole tiles, so rows are rounded up to
 * 16.  The last slice must end inside the file: (n - 1) x stride is held against what is left after
 * one. */
static q3n_result q3n__load_tensor_place(q3n__load *ld, const uint8_t *p, int64_t at, q3n_tensor *t)
{
    const q3n__type_info *ty = &q3n__types[t->type];
    const uint64_t offset = q3n__load_u64(p + 40), slice = q3n__load_u64(p + 48);
    const uint64_t stride = q3n__load_u64(p + 56), file = ld->m->bytes;
    const int64_t cols = t->dim[t->n_dims - 1];
    /* A vector is one row, [rows, cols] a slice, [slices, rows, cols] the experts of a layer. */
    const int64_t n_slices = t->n_dims == 3 ? t->dim[0] : 1;
    const int64_t rows =
        q3n__stored_rows(t->type, t->n_dims == 3 ? t->dim[1] : t->n_dims == 2 ? t->dim[0] : 1);
    /* In 64 bits, where size_t has 32: a row of 2^30 floats has 2^32 bytes.  Rows times bytes can
     * pass 2^64, so the size is compared through a division. */
    const uint64_t row = q3n__row_bytes64(t->type, cols);
    if (row > file || (uint64_t)rows > file / row || slice != (uint64_t)rows * row)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, at + 48,
                         "%s: slice of %llu bytes, expected %lld rows "
                         "of %llu bytes (type %s)",
                         t->name, (unsigned long long)slice, (long long)rows,
                         (unsigned long long)row, ty->name);
    /* Unsigned and in this order nothing wraps: offset <= file is known before file - offset is
     * taken. */
    if (offset % Q3N__ALIGN != 0 || offset < ld->meta_bytes || offset > file
        || slice > file - offset)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, at + 40,
                         "%s: data at %llu, %llu bytes, are not inside "
                         "the file's [%zu, %llu) or not at a multiple of %d",
                         t->name, (unsigned long long)offset, (unsigned long long)slice,
                         ld->meta_bytes, (unsigned long long)file, Q3N__ALIGN);
    if (t->n_dims == 3
        ? stride % Q3N__ALIGN != 0 || stride < slice
          || (n_slices > 1 && stride > (file - offset - slice) / (uint64_t)(n_slices - 1))
        : stride != 0)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, at + 56,
                         "%s: stride of %llu bytes for %lld slices of "
                         "%llu",
                         t->name, (unsigned long long)stride, (long long)n_slices,
                         (unsigned long long)slice);
    t->offset = (int64_t)offset;
    t->bytes = (int64_t)slice * n_slices;
    t->data = ld->m->data + offset;
    t->stride = (size_t)stride;
    return Q3N_OK;
}

/* A record, a pointer and 256 bytes of name each: at most 25 MB for 65,536 tensors.  One more than
 * n, so that no size is 0. */
static q3n_result q3n__load_table_alloc(q3n__load *ld, uint32_t n)
{
    q3n_model *m = ld->m;
    const size_t room = (size_t)n + 1;
    /* What is made belongs to m at once: q3n__model_free finds it after any failure. */
    m->tensors = (q3n_tensor *)q3n__alloc(&m->allocator, room * sizeof *m->tensors);
    m->by_name = (const q3n_tensor **)q3n__alloc(&m->allocator, room * sizeof *m->by_name);
    m->names   = (char *)q3n__alloc(&m->allocator, room * 256);
    if (!m->tensors || !m->by_name || !m->names)
        return q3n__fail(ld->err, Q3N_ERR_MEMORY, -1, "no memory for a table of %u tensors", n);
    return Q3N_OK;
}

/* Sort the names; none may appear twice.  Records have record bytes and begin at byte `at`.  Equal
 * names are neighbours once sorted, and the later record is the one that the message points at. */
static q3n_result q3n__load_names(q3n__load *ld, int64_t at, uint32_t record)
{
    q3n_model *m = ld->m;
    for (int i = 0; i < m->n_tensors; i++) m->by_name[i] = &m->tensors[i];
    q3n__sort(m->by_name, (size_t)m->n_tensors, sizeof *m->by_name, q3n__compare_names);
    for (int i = 1; i < m->n_tensors; i++) {
        const q3n_tensor *t = m->by_name[i];
        if (strcmp(t->name, m->by_name[i - 1]->name) == 0)
            return q3n__fail(ld->err, Q3N_ERR_FORMAT, at + (t - m->tensors) * (int64_t)record,
                             "%s: the name appears twice", t->name);
    }
    return Q3N_OK;
}

/* All records, at 8 + i x record_bytes of the section.  n_tensors counts those that are whole, so
 * that a model which failed half way is never searched further.  Larger records than 80 bytes are
 * read as far as this version knows them. */
static q3n_result q3n__load_tensors(q3n__load *ld)
{
    q3n_model *m = ld->m;
    const q3n__section *s = &ld->section[Q3N__SECTION_TENSORS];
    if (s->bytes < 8)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, (int64_t)s->offset, "TENSORS is cut off");
    const uint32_t n = q3n__load_u32(s->data), record = q3n__load_u32(s->data + 4);
    /* The product in 64 bits: n and record are any 32-bit numbers until this line. */
    if (n > Q3N__MAX_TENSORS || record < 80 || record > 4096
        || (uint64_t)n * record > s->bytes - 8)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, (int64_t)s->offset,
                         "%u tensor records of %u bytes do "
                         "not fit a section of %zu",
                         n, record, s->bytes);
    m->records = s->data + 8;
    m->record_bytes = record;
    q3n_result r = q3n__load_table_alloc(ld, n);
    for (uint32_t i = 0; i < n && r == Q3N_OK; i++) {
        const size_t in_section = 8 + (size_t)i * record;
        const int64_t at = (int64_t)(s->offset + in_section);
        q3n_tensor *t = &m->tensors[i];
        r = q3n__load_tensor_shape(ld, s->data + in_section, at, t, m->names + (size_t)i * 256);
        if (r == Q3N_OK) r = q3n__load_tensor_place(ld, s->data + in_section, at, t);
        m->n_tensors += r == Q3N_OK;
    }
    return r == Q3N_OK ? q3n__load_names(ld, (int64_t)s->offset + 8, record) : r;
}

/* ---- Binding ----
 *
 * The plan (section >>tensors) says which tensors this configuration has; each is looked up by name
 * and its address stored at the plan's offset in q3n__layer or q3n__weights:
 *
 *     plan  "layers.3.self_attn.k_proj.weight"  MAT  [KD, d]  offsetof(q3n__layer, k_proj)
 *     file   the same name, bf16, [512, 2048], at byte 4096
 *     ->     layers[3].k_proj = { data + 4096, 0, BF16, 512, 2048 }
 *
 * Tensors that the plan does not name are no error: later versions may add some. */

/* "[8192, 2048]"; a length of 0 is "any". */
static const char *q3n__dims_string(const int64_t *dim, int n, char text[80])
{
    int at = snprintf(text, 80, "[");
    for (int i = 0; i < n; i++)
        at += snprintf(text + at, 80 - (size_t)at, dim[i] ? "%s%lld" : "%sany", i ? ", " : "",
                       (long long)dim[i]);
    snprintf(text + at, 80 - (size_t)at, "]");
    return text;
}

/* Shape and type of t are what the item allows; the message has both. */
static q3n_result q3n__bind_check(q3n__load *ld, const q3n__plan_item *item, const q3n_tensor *t)
{
    char found[80], expected[80];
    int same = t->n_dims == item->n_dims;
    /* Unused dimensions are 1 in both. */
    for (int i = 0; i < 3; i++) if (item->dim[i] != 0 && item->dim[i] != t->dim[i]) same = 0;
    if (!same)
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, t->offset, "%s: shape %s, expected %s", t->name,
                         q3n__dims_string(t->dim, t->n_dims, found),
                         q3n__dims_string(item->dim, item->n_dims, expected));
    if (!(item->types >> t->type & 1))
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, t->offset, "%s: type %s, expected %s", t->name,
                         q3n__types[t->type].name, q3n__types_string(item->types, expected));
    return Q3N_OK;
}

/* Bind one item of the plan (q3n__plan_fn; user is the q3n__load).  A vector becomes a pointer: its
 * type is f32 and its place a multiple of 64, so that it is used as it lies.  A matrix has two
 * dimensions or three; the last two are those of a slice. */
static q3n_result q3n__bind(void *user, const q3n__plan_item *item)
{
    q3n__load *ld = (q3n__load *)user;
    q3n_model *m = ld->m;
    const q3n_tensor *t = q3n__find_tensor(m, item->name);
    if (!t) {
        char expected[80];
        if (item->optional) return Q3N_OK;
        return q3n__fail(ld->err, Q3N_ERR_FORMAT, (int64_t)ld->section[Q3N__SECTION_TENSORS].offset,
                         "%s: tensor is missing, expected %s", item->name,
                         q3n__dims_string(item->dim, item->n_dims, expected));
    }
    const q3n_result r = q3n__bind_check(ld, item, t);
    if (r != Q3N_OK) return r;
    /* item->field is an offset in one of two structs; item->layer says in which, and in whose. */
    uint8_t *owner = item->layer == Q3N__LAYER_NONE ? (uint8_t *)&m->weights
                     : item->layer == Q3N__LAYER_MTP
                         ? (uint8_t *)&m->layers[m->config.num_hidden_layers]
                         : (uint8_t *)&m->layers[item->layer];
    if (item->role == Q3N__ROLE_VEC) {
        const float *data = (const float *)t->data;
        memcpy(owner + item->field, &data, sizeof data);
        return Q3N_OK;
    }
    if (q3n__is_quantised(t->type)) m->has_quantised = 1;
    const q3n__mat mat = { (const uint8_t *)t->data, t->stride, t->type,
                           (int)t->dim[t->n_dims - 2], (int)t->dim[t->n_dims - 1] };
    memcpy(owner + item->field, &mat, sizeof mat);
    return Q3N_OK;
}

/* Room for the layers, then the plan, then what it does not say: with tied embeddings lm_head is
 * the embedding's matrix itself; tables of rope may have any number of positions, but both the
 * same. */
static q3n_result q3n__load_weights(q3n__load *ld)
{
    q3n_model *m = ld->m;
    q3n_config *c = &m->config;
    /* The MTP module's layer follows the trunk's, in whose arrays of kinds it has no entry. */
    const int n_layers = c->num_hidden_layers + c->num_mtp_layers;
    m->layers = (q3n__layer *)q3n__alloc(&m->allocator, (size_t)n_layers * sizeof *m->layers);
    if (!m->layers)
        return q3n__fail(ld->err, Q3N_ERR_MEMORY, -1, "no memory for %d layers", n_layers);
    /* Zeros are "absent": data NULL, so that optional tensors need no other mark. */
    memset(m->layers, 0, (size_t)n_layers * sizeof *m->layers);
    for (int l = 0; l < n_layers; l++) {
        const int mtp = l >= c->num_hidden_layers;
        m->layers[l].is_delta = mtp ? 0 : c->layer_types[l];
        m->layers[l].has_experts = mtp ? c->num_experts > 0 : c->layer_experts[l];
    }
    const q3n_result r = q3n__plan_visit(c, q3n__bind, ld);
    if (r != Q3N_OK) return r;
    /* The plan has no lm_head then, so the field is still empty. */
    if (c->tie_word_embeddings) m->weights.lm_head = m->weights.embed_tokens;
    if (c->rope_type == Q3N_ROPE_TABLE) {
        const q3n_tensor *cosines = q3n__find_tensor(m, "rope.cos");
        const q3n_tensor *sines = q3n__find_tensor(m, "rope.sin");
        if (cosines->dim[0] != sines->dim[0])
            return q3n__fail(ld->err, Q3N_ERR_FORMAT, sines->offset,
                             "rope.sin: %lld positions, rope.cos has %lld",
                             (long long)sines->dim[0], (long long)cosines->dim[0]);
        m->weights.rope_positions = (int)cosines->dim[0];
    }
    return Q3N_OK;
}

/* Room for the frequencies, and these: angles are made of them for the positions of each pass, as
 * no table of positions would fit every context. */
static q3n_result q3n__load_rope(q3n__load *ld)
{
    q3n_model *m = ld->m;
    const size_t half = (size_t)m->config.rotary_dim / 2;
    m->inv_freq = (double *)q3n__alloc(&m->allocator, (half + 1) * sizeof *m->inv_freq);
    if (!m->inv_freq)
        return q3n__fail(ld->err, Q3N_ERR_MEMORY, -1, "no memory for rotary frequencies");
    q3n__rope_frequencies(&m->config, m->inv_freq);
    m->rope_scale = q3n__rope_scale(&m->config);
    return Q3N_OK;
}

/* ---- The whole ---- */

/* What is odd, but as the checkpoint has it: a note to the host's logger, no error. */
static void q3n__load_warnings(const q3n_model *m)
{
    if (m->config.rope_type == Q3N_ROPE_TABLE) {
        const size_t n = (size_t)m->weights.rope_positions * (size_t)(m->config.head_dim / 2);
        size_t zeros = 0;
        for (size_t i = 0; i < n; i++)
            zeros += m->weights.rope_cos[i] == 0.0f && m->weights.rope_sin[i] == 0.0f;
        if (zeros == n)
            q3n__log(&m->logger, Q3N_LOG_WARNING,
                     "the file's rotary tables are all zeros: queries and "
                     "keys vanish and attention weighs every token alike, as in the checkpoint");
    }
    if (!m->config.causal)
        q3n__log(&m->logger, Q3N_LOG_WARNING,
                 "the model attends both ways: a text is evaluated whole");
}

/* The steps of the banner.  On failure the caller frees m, whatever it has by then. */
static q3n_result q3n__model_load(q3n_model *m, int skip_checksum, q3n_error *err)
{
    /* Steps in their order; the first that fails has filled err, and nothing after it runs. */
    q3n__load ld;
    memset(&ld, 0, sizeof ld);           /* no section, no key seen */
    ld.m = m;
    ld.err = err;
    q3n_result r = q3n__load_header(&ld, skip_checksum);
    if (r == Q3N_OK) r = q3n__load_sections(&ld);
    if (r == Q3N_OK) r = q3n__load_config(&ld);
    if (r == Q3N_OK) r = q3n__load_tensors(&ld);
    if (r == Q3N_OK) r = q3n__load_weights(&ld);
    if (r == Q3N_OK) r = q3n__load_rope(&ld);
    if (r == Q3N_OK) q3n__load_warnings(m);
    m->words = ld.section[Q3N__SECTION_TOKENIZER];
    return r;
}

/* Frees a model in any state of loading: what is not made yet is NULL.  Its tokenizer is gone. */
static void q3n__model_free(q3n_model *m)
{
    const q3n_allocator a = m->allocator;
    q3n__free(&a, (void *)m->labels);
    q3n__free(&a, m->inv_freq);
    q3n__free(&a, m->layers);
    q3n__free(&a, m->names);
    q3n__free(&a, m->by_name);
    q3n__free(&a, m->tensors);
    if (m->mapped) q3n__file_unmap(m->data, m->bytes);
    q3n__free(&a, m);
}

/* An empty model with the host's hooks and the values of keys that a file may leave out.  All else
 * is zero, so that q3n__model_free can be called from here on.  The caller sets data and bytes. */
static q3n_result q3n__model_create(q3n_model **out, const q3n_model_options *o, q3n_error *err)
{
    *out = NULL;
    const q3n_allocator *a = &o->allocator;
    /* Memory of one allocator may only be given back to the same one. */
    if (!a->alloc != !a->free)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "an allocator needs both alloc and free");
    q3n_model *m = (q3n_model *)q3n__alloc(a, sizeof *m);
    if (!m) return q3n__fail(err, Q3N_ERR_MEMORY, -1, "no memory for a model");
    memset(m, 0, sizeof *m);
    m->allocator = *a;
    m->logger = o->logger;
    /* Before the file's keys are read, which replace these. */
    q3n__config_defaults(&m->config);
    memcpy(m->chat, "none", 5);
    m->pad_id = -1;
    *out = m;
    return Q3N_OK;
}

/* ---- What a model weighs, and whether it is whole ---- */

static int64_t q3n__tensor_len(const q3n_tensor *t) { return t->dim[0] * t->dim[1] * t->dim[2]; }

/* A tensor of a file, whether or not something reads it. */
static void q3n__stats_count(q3n_model_stats *out, const q3n_tensor *t)
{
    q3n_type_stats *type = &out->types[t->type];
    type->n_tensors++;
    type->n_weights += q3n__tensor_len(t);
    type->bytes += t->bytes;
    out->n_weights += q3n__tensor_len(t);
}

/* What one token reads of a tensor that the plan has: k of E experts, whichever the router chooses,
 * since all are of one size; a row of the embedding, unless that is the head too; all of the rest.
 * Plain decoding does not read the MTP module, which counts apart. */
static void q3n__stats_read(q3n_model_stats *out, const q3n_config *c, const q3n__plan_item *item,
                            const q3n_tensor *t)
{
    int64_t n = q3n__tensor_len(t), bytes = t->bytes;
    if (item->layer == Q3N__LAYER_MTP || item->module == Q3N__MODULE_MTP) {
        out->n_weights -= n;
        out->mtp_weights += n;
        return;
    }
    if (item->experts || item->module == Q3N__MODULE_EXPERTS_BIAS) {
        n = n / c->num_experts * c->num_experts_per_tok;
        bytes = bytes / c->num_experts * c->num_experts_per_tok;
    } else if (q3n__is_embedding(item->layer, item->field) && !c->tie_word_embeddings) {
        n = t->dim[1];
        bytes /= t->dim[0];
    }
    out->n_weights_active += n;
    out->decode_bytes += bytes;
}

typedef struct {
    const q3n_model *m;
    q3n_model_stats *out;
} q3n__stats;

/* q3n__plan_fn */
static q3n_result q3n__stats_item(void *user, const q3n__plan_item *item)
{
    const q3n__stats *s = (const q3n__stats *)user;
    const q3n_tensor *t = q3n__find_tensor(s->m, item->name);
    if (t) q3n__stats_read(s->out, &s->m->config, item, t);   /* else it is an optional one */
    return Q3N_OK;
}

static void q3n__stats_make(const q3n_model *m, q3n_model_stats *out)
{
    *out = (q3n_model_stats)Q3N_INIT(q3n_model_stats);
    out->file_bytes = (int64_t)m->bytes;
    for (int i = 0; i < m->n_tensors; i++) q3n__stats_count(out, &m->tensors[i]);
    q3n__stats s = { m, out };
    q3n__plan_visit(&m->config, q3n__stats_item, &s);
}

#define Q3N__VERIFY_STEP ((size_t)16 << 20)   /* bytes from one report of progress to the next */

typedef struct {
    q3n__crc_table      table;
    const q3n_progress *progress;        /* NULL = none                                          */
    int64_t             done, total;     /* bytes                                                */
} q3n__verify;

/* The checksum of a tensor: of its slices in order.  0 = the host stopped it. */
static int q3n__verify_tensor(q3n__verify *v, const q3n_tensor *t, uint32_t *crc)
{
    const q3n_progress *p = v->progress;
    const size_t n_slices = t->n_dims == 3 ? (size_t)t->dim[0] : 1;
    const size_t slice = (size_t)t->bytes / n_slices;
    *crc = 0;
    for (size_t k = 0; k < n_slices; k++)
        for (size_t at = 0, count; at < slice; at += count) {
            count = slice - at < Q3N__VERIFY_STEP ? slice - at : Q3N__VERIFY_STEP;
            *crc = q3n__crc32_with(&v->table, *crc, (const uint8_t *)t->data + k * t->stride + at,
                                   count);
            v->done += (int64_t)count;
            if (p && p->report && p->report(p->user, v->done, v->total)) return 0;
        }
    return 1;
}

/* Every tensor against the checksum of its record, at byte 64; the records were checked when the
 * file was opened. */
static q3n_result q3n__model_verify(const q3n_model *m, const q3n_progress *progress,
                                    q3n_error *err)
{
    q3n__verify v = { .progress = progress };
    q3n__crc_table_make(&v.table);
    for (int i = 0; i < m->n_tensors; i++) v.total += m->tensors[i].bytes;
    for (int i = 0; i < m->n_tensors; i++) {
        const q3n_tensor *t = &m->tensors[i];
        const uint32_t expected = q3n__load_u32(m->records + (size_t)i * m->record_bytes + 64);
        uint32_t crc;
        if (!q3n__verify_tensor(&v, t, &crc))
            return q3n__fail(err, Q3N_ERR_CANCELLED, -1, "cancelled");
        if (crc != expected)
            return q3n__fail(err, Q3N_ERR_CHECKSUM, t->offset, "%s: checksum is %08x, expected"
                             " %08x: the file is damaged", t->name, crc, expected);
    }
    return Q3N_OK;
}

/* =====================================================================================
 * [12] STATE                                                                  >>state
 *
 * What a session knows of its text, as things that can be kept and passed on: pages, which are
 * counted and shared, and snapshots, which do not change.  Knows nothing of evaluation.
 *
 *     session A, 700 tokens     page 0 --- page 1 --- page 2 (188 slots)
 *     snapshot at 600           page 0 --- page 1 --- page 2, of which it knows 88
 *     session B, from it        page 0 --- page 1 --- a copy of its 88 slots, as soon as B appends
 *
 * A page is written by its only holder, or by the session that made it, in slots that no text has;
 * whoever shares it reads no slot beyond its own length, so they need no lock.  Counts of
 * references are atomic and the last holder frees: any thread may release.  Memory comes from the
 * model's allocator, which outlives all of them.
 * ===================================================================================== */

/* ---- KV cache: pages of Q3N__KV_BLOCK tokens ----
 *
 *     position p of a text is slot p % 256 of page p / 256
 *
 *     page      n_refs, n_used, n_layers, tokens[256] | KV block | KV block | ... | KV block
 *               (Q3N__PAGE_HEAD bytes)                  layer 0,         ...       last layer,
 *                                                       kv head 0                  last kv head
 *     KV block  k [D, 256]   scales f32[256] if q8      one side
 *               v [256, D]   scales f32[256] if q8      the other, of as many bytes
 *
 * A slot is the place of one token: in tokens, in a column of k and a row of v of every KV block.
 * Layers are those with attention, counted among themselves.  Sides are multiples of 256 bytes and
 * pages aligned to 64, so both begin on a cache line.  Keys are transposed so that neighbouring
 * lanes of a vector are the scores of neighbouring keys and nothing is summed across lanes; values
 * are not, for an output is a sum of whole rows of v. */

/* Tokens of a text with what all attention layers keep of them: [layer][kv head], of each keys and
 * then values.  The MTP module's layer is the last, if the session drafts with it.  Sessions and
 * snapshots share pages; nobody writes slots that another of them uses (q3n__session_reserve).
 * Kernels load whole vectors of keys, beyond the last one that counts, and drop what lies there. */
typedef struct q3n__page {
    q3n__atomic n_refs;
    int         n_used;          /* slots written so far: for the one session that may append    */
    int         n_layers;        /* that it has room for: sessions with an MTP module share pages
                                    with sessions without                                        */
    int32_t     tokens[Q3N__KV_BLOCK];
} q3n__page;

#define Q3N__PAGE_HEAD ((sizeof(q3n__page) + Q3N__ALIGN - 1) / Q3N__ALIGN * Q3N__ALIGN)

typedef struct {
    q3n__page **page;            /* [pages], as far as the text goes                             */
    q3n_type    type;
    int         n_kv_heads, dim;
    int         skip;            /* leading tokens that have no key, as in the MTP module        */
} q3n__kv_cache;

/* Bytes of one element in a KV cache. */
static size_t q3n__kv_element(q3n_type t)
{
    return q3n__is_quantised(t) ? 1 : (size_t)q3n__types[t].block_bytes;
}

/* Where the scales of a side lie, in bytes from its start. */
static size_t q3n__kv_scales_at(q3n_type t, int dim)
{
    return Q3N__KV_BLOCK * (size_t)dim * q3n__kv_element(t);
}

/* Bytes of one side, the keys or the values of a KV block, scales included. */
static size_t q3n__kv_side_bytes(q3n_type t, int dim)
{
    return q3n__kv_scales_at(t, dim) + (q3n__is_quantised(t) ? Q3N__KV_BLOCK * sizeof(float) : 0);
}

/* Bytes of a KV block: the keys, and after them as many of values. */
static size_t q3n__kv_block_bytes(q3n_type type, int dim)
{
    return 2 * q3n__kv_side_bytes(type, dim);
}

/* Where a layer's keys of one head begin in a page; its values are q3n__kv_side_bytes further. */
static uint8_t *q3n__page_block(q3n__page *page, const q3n__kv_cache *kv, int layer, int head)
{
    const size_t i = (size_t)layer * (size_t)kv->n_kv_heads + (size_t)head;
    return (uint8_t *)page + Q3N__PAGE_HEAD + i * q3n__kv_block_bytes(kv->type, kv->dim);
}

static uint8_t *q3n__kv_block(const q3n__kv_cache *kv, int layer, int block, int head)
{
    return q3n__page_block(kv->page[block], kv, layer, head);
}

/* Sizes that follow from the model and a session's options: states of one shape fit each other, and
 * those too that differ only in has_mtp, since the module's layer is a page's last, or in isa. */
typedef struct {
    q3n_isa  isa;                /* whose bits they are, for caches; AUTO = not said             */
    q3n_type kv_type;
    int      has_mtp;            /* pages hold the MTP module's layer too                        */
    int      n_kv_layers, n_kv_heads, head_dim;
    size_t   page_bytes;
    size_t   delta_len, conv_len;   /* floats of all DeltaNet layers                             */
    int      hidden_size, vocab_size;
} q3n__shape;

/* Pages of n tokens: n / 256, rounded up; for n up to INT_MAX, where n + 255 would not fit. */
static int q3n__pages_of(int n_tokens)
{
    return n_tokens / Q3N__KV_BLOCK + (n_tokens % Q3N__KV_BLOCK != 0);
}

static size_t q3n__page_bytes(const q3n__shape *shape, int n_layers)
{
    return Q3N__PAGE_HEAD + (size_t)n_layers * (size_t)shape->n_kv_heads
                            * q3n__kv_block_bytes(shape->kv_type, shape->head_dim);
}

/* The shape of a session of m.  has_mtp: the session runs the MTP module, whose keys and values are
 * one more attention layer.  Lengths do not overflow: the loader bounds the configuration, and
 * q3n__check_sizes the rest on 32 bits. */
static void q3n__shape_make(const q3n_model *m, q3n_type kv_type, int has_mtp, q3n__shape *s)
{
    const q3n_config *c = &m->config;
    int n_delta = 0;
    for (int l = 0; l < c->num_hidden_layers; l++) n_delta += c->layer_types[l];
    memset(s, 0, sizeof *s);
    s->kv_type = kv_type;
    s->has_mtp = has_mtp;
    s->n_kv_layers = c->num_hidden_layers - n_delta + has_mtp;
    s->n_kv_heads = c->num_key_value_heads;
    s->head_dim = c->head_dim;
    s->page_bytes = q3n__page_bytes(s, s->n_kv_layers);
    s->delta_len = (size_t)n_delta * (size_t)c->linear_num_value_heads
                 * (size_t)c->linear_key_head_dim * (size_t)c->linear_value_head_dim;
    if (n_delta > 0)
        s->conv_len = (size_t)n_delta * (size_t)(c->linear_conv_kernel_dim - 1)
                    * (size_t)q3n__config_channels(c);
    s->hidden_size = c->hidden_size;
    s->vocab_size = c->vocab_size;
}

/* The same with the module's layer, or without it. */
static void q3n__shape_set_mtp(q3n__shape *s, int has_mtp)
{
    s->n_kv_layers += has_mtp - s->has_mtp;
    s->has_mtp = has_mtp;
    s->page_bytes = q3n__page_bytes(s, s->n_kv_layers);
}

/* ---- Pages ---- */

/* A page with one reference and room for the shape's layers; NULL without memory. */
static q3n__page *q3n__page_alloc(const q3n_model *m, const q3n__shape *shape)
{
    q3n__page *p = (q3n__page *)q3n__alloc(&m->allocator, shape->page_bytes);
    if (!p) return NULL;
    memset(p, 0, shape->page_bytes);       /* slots that are never written are zeros in files */
    p->n_refs = 1;
    p->n_layers = shape->n_kv_layers;
    return p;
}

static void q3n__page_retain(q3n__page *p) { q3n__atomic_add(&p->n_refs, 1); }

static void q3n__page_release(const q3n_model *m, q3n__page *p)   /* NULL is allowed */
{
    if (p && q3n__atomic_add(&p->n_refs, -1) == 1) q3n__free(&m->allocator, p);
}

/* The first n slots of a page, in the layers that both have, and not a byte of the others, which
 * someone may be writing.  Slot j of the keys is element j of each of D rows of 256 (they are
 * transposed), of the values row j.  Both pages are of the shape's kv_type. */
static void q3n__page_copy(const q3n__shape *shape, q3n__page *to, q3n__page *from, int n)
{
    const q3n__kv_cache kv = { NULL, shape->kv_type, shape->n_kv_heads, shape->head_dim, 0 };
    const size_t D = (size_t)shape->head_dim, e = q3n__kv_element(shape->kv_type);
    const size_t side = q3n__kv_side_bytes(kv.type, kv.dim);
    const size_t scales = q3n__kv_scales_at(kv.type, kv.dim);
    const int n_layers = from->n_layers < to->n_layers ? from->n_layers : to->n_layers;
    memcpy(to->tokens, from->tokens, (size_t)n * sizeof *to->tokens);
    for (int i = 0; i < n_layers * shape->n_kv_heads; i++) {
        uint8_t *y = q3n__page_block(to, &kv, 0, i);
        const uint8_t *x = q3n__page_block(from, &kv, 0, i);
        for (size_t d = 0; d < D; d++)
            memcpy(y + d * Q3N__KV_BLOCK * e, x + d * Q3N__KV_BLOCK * e, (size_t)n * e);
        memcpy(y + side, x + side, (size_t)n * D * e);
        if (!q3n__is_quantised(kv.type)) continue;
        memcpy(y + scales, x + scales, (size_t)n * sizeof(float));
        memcpy(y + side + scales, x + side + scales, (size_t)n * sizeof(float));
    }
    to->n_used = n;
}

/* ---- What a sampler knows of a text ---- */
typedef struct {
    uint64_t rng;
    int32_t  window[];           /* tokens that the penalty counts, the oldest first             */
} q3n__sampler_state;

#define Q3N__SAMPLER_MAX_WINDOW (1 << 24)

/* n_sampler: 1 + tokens in the window, 0 = there is no sampler. */
static size_t q3n__sampler_state_bytes(int n_sampler)
{
    return n_sampler ? sizeof(q3n__sampler_state) + (size_t)(n_sampler - 1) * sizeof(int32_t) : 0;
}

/* ---- Snapshots: one allocation each, and a hold on pages ----
 *
 * What it takes to go on after `length` tokens without evaluating one again: keys and values (the
 * pages), DeltaNet's matrices and convolution columns with nothing pending, the last hidden state
 * (the MTP module reads it with the next token), and logits if there were any.  Its maker fills it
 * in before anyone else sees it; from then on it is only read, by any thread.  Matrices of bf16
 * take half the memory and are no longer exact. */
struct q3n_snapshot {
    q3n__atomic      n_refs;
    const q3n_model *model;
    q3n__shape       shape;
    size_t           bytes;      /* of this allocation                                           */
    q3n_type         delta_type; /* f32 or bf16                                                  */
    int              length;     /* tokens                                                       */
    int              n_pages;    /* q3n__pages_of(length)                                       */
    int              mtp_first;  /* the MTP module's keys begin at this token, 1 or more; 1
                                    without the module                                           */
    int              has_hidden; /* not at length 0                                              */
    int              has_logits;
    int              n_sampler;  /* 1 + tokens in the window of `sampler`; 0 = it has none       */
    q3n__page      **page;       /* [n_pages]                                                    */
    void            *delta;      /* [shape.delta_len] of delta_type                              */
    float           *conv;       /* [shape.conv_len]                                             */
    float           *hidden;     /* [d] of the last token, after the final norm                  */
    float           *logits;     /* [vocab] after the last token                                 */
    q3n__sampler_state *sampler;
};

/* Arrays after the struct, measured or handed out: all but the pages have the shape's sizes. */
static void q3n__snapshot_layout(q3n__arena *a, q3n_snapshot *s)
{
    const q3n__shape *h = &s->shape;
    s->page   = (q3n__page **)q3n__arena_take(a, (size_t)s->n_pages, sizeof *s->page);
    s->delta  = q3n__arena_take(a, h->delta_len, (size_t)q3n__types[s->delta_type].block_bytes);
    s->conv   = (float *)q3n__arena_take(a, h->conv_len, sizeof(float));
    s->hidden = (float *)q3n__arena_take(a, (size_t)h->hidden_size, sizeof(float));
    s->logits = (float *)q3n__arena_take(a, (size_t)h->vocab_size, sizeof(float));
    if (s->n_sampler)
        s->sampler = (q3n__sampler_state *)q3n__arena_take(
            a, q3n__sampler_state_bytes(s->n_sampler), 1);
}

/* Bytes of the allocation, without pages; 0 = more than a size_t holds. */
static size_t q3n__snapshot_measure(const q3n__shape *shape, q3n_type delta_type, int length,
                                    int n_sampler)
{
    q3n_snapshot s;
    memset(&s, 0, sizeof s);
    s.shape = *shape;
    s.delta_type = delta_type;
    s.n_pages = q3n__pages_of(length);
    s.n_sampler = n_sampler;
    q3n__arena a = { NULL, 0, 0 };
    q3n__arena_take(&a, 1, sizeof s);
    q3n__snapshot_layout(&a, &s);
    return a.overflow ? 0 : a.used;
}

/* A snapshot with one reference and no pages yet (NULL), everything else not filled in; NULL
 * without memory. */
static q3n_snapshot *q3n__snapshot_alloc(const q3n_model *m, const q3n__shape *shape,
                                         q3n_type delta_type, int length, int n_sampler)
{
    const size_t bytes = q3n__snapshot_measure(shape, delta_type, length, n_sampler);
    q3n__arena a = { bytes ? (uint8_t *)q3n__alloc(&m->allocator, bytes) : NULL, 0, 0 };
    if (!a.base) return NULL;
    q3n_snapshot *s = (q3n_snapshot *)q3n__arena_take(&a, 1, sizeof *s);
    memset(s, 0, sizeof *s);
    s->n_refs = 1;
    s->model = m;
    s->shape = *shape;
    s->bytes = bytes;
    s->delta_type = delta_type;
    s->length = length;
    s->mtp_first = 1;
    s->n_pages = q3n__pages_of(length);
    s->n_sampler = n_sampler;
    q3n__snapshot_layout(&a, s);
    if (s->n_pages) memset(s->page, 0, (size_t)s->n_pages * sizeof *s->page);
    return s;
}

static void q3n__snapshot_retain(q3n_snapshot *s) { q3n__atomic_add(&s->n_refs, 1); }

static void q3n__snapshot_release(q3n_snapshot *s)   /* NULL is allowed */
{
    if (!s || q3n__atomic_add(&s->n_refs, -1) != 1) return;
    const q3n_model *m = s->model;
    for (int i = 0; i < s->n_pages; i++) q3n__page_release(m, s->page[i]);
    q3n__free(&m->allocator, s);
}

/* How many of tokens [n] the text of `length` tokens in page begins with: whole pages are compared,
 * and the first that differs is looked into. */
static int q3n__common_prefix(q3n__page *const *page, int length, const int32_t *tokens, int n)
{
    const int max = length < n ? length : n;
    for (int i = 0; i < max; i += Q3N__KV_BLOCK) {
        const int32_t *x = page[i / Q3N__KV_BLOCK]->tokens;
        const int count = max - i < Q3N__KV_BLOCK ? max - i : Q3N__KV_BLOCK;
        if (memcmp(x, tokens + i, (size_t)count * sizeof *x) == 0) continue;
        int t = 0;
        while (x[t] == tokens[i + t]) t++;
        return i + t;
    }
    return max;
}

/* =====================================================================================
 * [13] SESSION FILES                                                  >>session-files
 *
 * A snapshot to bytes and back (SESSION FILE FORMAT).  One walk over its sections serves both ways:
 *
 *     header            q3n__stream_raw       128 bytes, hashed by itself
 *     delta, conv,      q3n__stream_arrays    each a section: hashed, padded to 64 bytes
 *     hidden, logits, sampler
 *     every page        q3n__stream_page      tokens; then keys and values of all layers
 *     hash of sections  q3n__stream_raw       8 bytes
 *
 * A snapshot's arrays lie in memory as they lie in the file: nothing is converted.  What is read is
 * hostile: sizes come from the shape, which comes from the model; the file's numbers are compared
 * with those and believed in nothing but length and flags.  Arrays are made after the header has
 * passed, pages as their bytes arrive, and nothing is handed out before the last hash is right.
 * Hashes find damage, not forgery: what a made-up state computes may be nonsense, but every token
 * in it is checked to be one.
 * Knows models by their hash and size, and nothing of sessions but shape and capacity.
 * ===================================================================================== */

/* ---- SESSION FILE FORMAT, versions 1 and 2 ----
 *
 * The state after a text, as a stream: written and read once, from the first byte to the last.
 * All numbers are little-endian.  A state has exactly one encoding: with a sampler it is version 2,
 * without one version 1, which library 0.1 reads too.
 *
 *   HEADER, 128 bytes
 *      0  u8[8]  magic           89 51 33 53 0D 0A 1A 0A  ("\x89Q3S\r\n\x1a\n")
 *      8  u32    version         1, or 2 with a sampler; a reader refuses any other
 *     12  u32    header_bytes    128
 *     16  u64    header_hash     of bytes [0, 128) with this field taken as 0
 *     24  u64    file_bytes      size of the whole file
 *     32  u64    model_hash      of bytes [0, meta_bytes) of the model's file, which hold the
 *                                checksum of every tensor
 *     40  u64    model_bytes     size of the model's file
 *     48  u32    length          tokens
 *     52  u32    kv_type         id of Q3N_TYPE_LIST: f32, f16, bf16 or q8
 *     56  u32    delta_type      f32 or bf16
 *     60  u32    has_mtp         1 = pages hold the MTP module's layer too, as their last.  Readers
 *                                without the module ignore it; one that has the module and
 *                                reads a file without begins the module's keys after the text
 *     64  u32    has_hidden, has_logits      0 or 1; has_hidden is length > 0
 *     72  u32    page_tokens     256
 *     76  u32    n_kv_layers (the module's included), n_kv_heads, head_dim, hidden_size, vocab_size
 *     96  u64    delta_len, conv_len         elements
 *    112  u64    page_bytes      of one page in the file
 *    120  u32    mtp_first       the MTP module's keys begin at this token: 1 .. length, 1 at 0
 *                                and without the module
 *    124  u32    n_sampler       version 1: 0; version 2: 1 + tokens in the sampler's window,
 *                                at most 1 + 2^24
 *
 *   SECTIONS, one after another, each padded with zeros to a multiple of 64 bytes
 *      delta_type[delta_len]     DeltaNet matrices: [DeltaNet layer][Hv][dk, dv]
 *      f32[conv_len]             inputs of the convolutions: [DeltaNet layer][width - 1, C]
 *      f32[hidden_size]          if has_hidden: last token, after the final norm
 *      f32[vocab_size]           if has_logits
 *      u64, i32[n_sampler - 1]   if n_sampler: state of the random numbers (SplitMix64), and the
 *                                tokens that the repetition penalty counts, the oldest first
 *      pages                     length / page_tokens of them, rounded up:
 *          i32[page_tokens]      tokens
 *          [layer][kv head]      keys [D, page_tokens] of kv_type, values [page_tokens, D]; of type
 *                                q8 signed bytes and after keys and values f32[page_tokens] scales
 *                                What lies after the last token is zero.
 *
 *   END
 *      u64       sections_hash      of all sections, seeded with header_hash; see HASH in section
 *                                   >>memory */

/* Not text: the first byte is above 127, and copying as text changes the line ends that follow. */
static const uint8_t q3n__session_magic[8] = { 0x89, 'Q', '3', 'S', '\r', '\n', 0x1a, '\n' };

/* The 128 bytes of the header as they are; fields are described with the format. */
typedef struct {
    uint8_t  magic[8];
    uint32_t version, header_bytes;
    uint64_t header_hash, file_bytes, model_hash, model_bytes;
    uint32_t length, kv_type, delta_type, has_mtp, has_hidden, has_logits;
    uint32_t page_tokens, n_kv_layers, n_kv_heads, head_dim, hidden_size, vocab_size;
    uint64_t delta_len, conv_len, page_bytes;
    uint32_t mtp_first, n_sampler;
} q3n__session_header;

typedef char q3n__session_header_is_128[sizeof(q3n__session_header) == 128 ? 1 : -1];

/* What a model is: its metadata, which hold the checksum of every tensor.  Byte 24 of the file is
 * meta_bytes, which the loader has checked; tensors are not read, so this is quick. */
static uint64_t q3n__model_hash(const q3n_model *m)
{
    return q3n__hash_of(0, m->data, (size_t)q3n__load_u64(m->data + 24));
}

/* ---- Sizes ---- */
static uint64_t q3n__padded(uint64_t len, size_t element) { return (len * element + 63) / 64 * 64; }

/* Of one page in the file: tokens, keys and values, but no counts.  All are multiples of 64 bytes,
 * so nothing of a page is padded. */
static uint64_t q3n__page_file_bytes(const q3n__shape *shape)
{
    return sizeof ((q3n__page *)0)->tokens + (shape->page_bytes - Q3N__PAGE_HEAD);
}

/* Of the file that a snapshot makes; its pages and arrays are not looked at. */
static uint64_t q3n__snapshot_file_bytes(const q3n_snapshot *s)
{
    const q3n__shape *h = &s->shape;
    return sizeof(q3n__session_header)
         + q3n__padded(h->delta_len, (size_t)q3n__types[s->delta_type].block_bytes)
         + q3n__padded(h->conv_len, sizeof(float))
         + (s->has_hidden ? q3n__padded((uint64_t)h->hidden_size, sizeof(float)) : 0)
         + (s->has_logits ? q3n__padded((uint64_t)h->vocab_size, sizeof(float)) : 0)
         + q3n__padded(q3n__sampler_state_bytes(s->n_sampler), 1)
         + (uint64_t)q3n__pages_of(s->length) * q3n__page_file_bytes(h) + sizeof(uint64_t);
}

/* ---- Header ---- */
static uint64_t q3n__session_header_hash(q3n__session_header h)
{
    h.header_hash = 0;
    return q3n__hash_of(0, &h, sizeof h);
}

/* Of model m and a snapshot's shape, types, length and flags.  One snapshot has one header, so a
 * reader can make the one that it expects and compare. */
static void q3n__session_header_make(q3n__session_header *h, const q3n_model *m,
                                     const q3n_snapshot *s)
{
    const q3n__shape *shape = &s->shape;
    memset(h, 0, sizeof *h);
    memcpy(h->magic, q3n__session_magic, sizeof h->magic);
    h->version = s->n_sampler ? 2 : 1;
    h->header_bytes = sizeof *h;
    h->file_bytes = q3n__snapshot_file_bytes(s);
    h->model_hash = q3n__model_hash(m);
    h->model_bytes = m->bytes;
    h->length = (uint32_t)s->length;
    h->kv_type = (uint32_t)shape->kv_type;
    h->delta_type = (uint32_t)s->delta_type;
    h->has_mtp = (uint32_t)shape->has_mtp;
    h->has_hidden = (uint32_t)s->has_hidden;
    h->has_logits = (uint32_t)s->has_logits;
    h->page_tokens = Q3N__KV_BLOCK;
    h->n_kv_layers = (uint32_t)shape->n_kv_layers;
    h->n_kv_heads = (uint32_t)shape->n_kv_heads;
    h->head_dim = (uint32_t)shape->head_dim;
    h->hidden_size = (uint32_t)shape->hidden_size;
    h->vocab_size = (uint32_t)shape->vocab_size;
    h->delta_len = shape->delta_len;
    h->conv_len = shape->conv_len;
    h->page_bytes = q3n__page_file_bytes(shape);
    h->mtp_first = (uint32_t)s->mtp_first;
    h->n_sampler = (uint32_t)s->n_sampler;
    h->header_hash = q3n__session_header_hash(*h);
}

/* Whether this is a header at all, undamaged, of a version that is known: magic before version
 * before hash, so that a file of a later version is told apart from a damaged one. */
static q3n_result q3n__session_header_open(const q3n__session_header *h, q3n_error *err)
{
    if (memcmp(h->magic, q3n__session_magic, sizeof h->magic) != 0)
        return q3n__fail(err, Q3N_ERR_FORMAT, 0,
                         "not a session file: the first bytes are %02x %02x %02x %02x, expected "
                         "89 51 33 53", h->magic[0], h->magic[1], h->magic[2], h->magic[3]);
    if (h->version != 1 && h->version != 2)
        return q3n__fail(err, Q3N_ERR_UNSUPPORTED, 8,
                         "session file of version %u, expected 1 or 2: use the library that wrote "
                         "it", h->version);
    const uint64_t hash = q3n__session_header_hash(*h);
    if (h->header_hash != hash)
        return q3n__fail(err, Q3N_ERR_CHECKSUM, 16,
                         "hash of the header is %016llx, expected %016llx: the file is damaged",
                         (unsigned long long)hash, (unsigned long long)h->header_hash);
    return Q3N_OK;
}

/* Whether a session of this model and shape can take the file, leaving its sizes aside: what the
 * user can do something about, in words that say what. */
static q3n_result q3n__session_header_fits(const q3n__session_header *h,
                                           const q3n__session_header *want, q3n_error *err)
{
    if (h->model_hash != want->model_hash || h->model_bytes != want->model_bytes)
        return q3n__fail(err, Q3N_ERR_UNSUPPORTED, 32,
                         "the session is of another model: metadata %016llx of a file of %llu bytes"
                         " (%u layers with keys, hidden size %u, %u tokens of vocabulary), expected"
                         " %016llx and %llu bytes: open that model, or evaluate the text again",
                         (unsigned long long)h->model_hash, (unsigned long long)h->model_bytes,
                         h->n_kv_layers, h->hidden_size, h->vocab_size,
                         (unsigned long long)want->model_hash,
                         (unsigned long long)want->model_bytes);
    if (h->kv_type >= Q3N_TYPE_COUNT)
        return q3n__fail(err, Q3N_ERR_FORMAT, 52, "kv_type %u is no type", h->kv_type);
    if (h->kv_type != want->kv_type)
        return q3n__fail(err, Q3N_ERR_UNSUPPORTED, 52,
                         "keys and values are %s, the session's %s: make it with kv_type %s",
                         q3n__types[h->kv_type].name, q3n__types[want->kv_type].name,
                         q3n__types[h->kv_type].name);
    if (h->has_mtp != want->has_mtp)
        return q3n__fail(err, Q3N_ERR_FORMAT, 60, "has_mtp is %u, expected 0, or 1 if the model has"
                         " an MTP module", h->has_mtp);
    return Q3N_OK;
}

/* Numbers that follow from the model, and from what the file says of itself: a header with other
 * ones was not written by this library.  file_bytes comes last, as it follows from the rest. */
static q3n_result q3n__session_header_numbers(const q3n__session_header *h,
                                              const q3n__session_header *want, q3n_error *err)
{
    static const struct { const char *name; int at, bytes; } field[] = {
        { "header_bytes", 12, 4 }, { "page_tokens", 72, 4 }, { "n_kv_layers", 76, 4 },
        { "n_kv_heads", 80, 4 },   { "head_dim", 84, 4 },    { "hidden_size", 88, 4 },
        { "vocab_size", 92, 4 },   { "delta_len", 96, 8 },   { "conv_len", 104, 8 },
        { "page_bytes", 112, 8 },  { "file_bytes", 24, 8 },
    };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++) {
        uint64_t x = 0, y = 0;
        memcpy(&x, (const uint8_t *)h + field[i].at, (size_t)field[i].bytes);
        memcpy(&y, (const uint8_t *)want + field[i].at, (size_t)field[i].bytes);
        if (x != y)
            return q3n__fail(err, Q3N_ERR_FORMAT, field[i].at,
                             "%s is %llu, expected %llu: not a file of this library",
                             field[i].name, (unsigned long long)x, (unsigned long long)y);
    }
    return Q3N_OK;
}

/* Fill `like`, a snapshot without arrays, from a header that a session of like->shape can take; it
 * gets the shape of the file, which may have an MTP module where the session has none.  `want` is
 * the header that this library would have written: first with the numbers that follow from the
 * model, its file_bytes once length and flags have been found to be possible.  After Q3N_OK: length
 * 0 .. capacity, mtp_first 1 .. length (1 without the module), n_sampler 0 .. 1 + 2^24, and every
 * other size is the model's. */
static q3n_result q3n__session_header_check(const q3n__session_header *h, const q3n_model *m,
                                            int capacity, q3n_snapshot *like, q3n_error *err)
{
    q3n__session_header want;
    const int has_mtp = m->config.num_mtp_layers > 0 ? h->has_mtp == 1 : 0;
    q3n__shape_set_mtp(&like->shape, has_mtp);
    like->delta_type = Q3N_TYPE_F32;
    q3n__session_header_make(&want, m, like);
    q3n_result r = q3n__session_header_open(h, err);
    if (r == Q3N_OK) r = q3n__session_header_fits(h, &want, err);
    if (r != Q3N_OK) return r;
    if (h->delta_type != Q3N_TYPE_F32 && h->delta_type != Q3N_TYPE_BF16)
        return q3n__fail(err, Q3N_ERR_FORMAT, 56, "delta_type is %u, expected %d (f32) or %d"
                         " (bf16)", h->delta_type, Q3N_TYPE_F32, Q3N_TYPE_BF16);
    if (h->has_hidden != (h->length > 0) || h->has_logits > h->has_hidden)
        return q3n__fail(err, Q3N_ERR_FORMAT, 64, "has_hidden %u and has_logits %u of %u tokens:"
                         " expected a hidden state, and perhaps logits, of any tokens",
                         h->has_hidden, h->has_logits, h->length);
    if (h->length > (uint32_t)capacity)
        return q3n__fail(err, Q3N_ERR_FULL, 48, "%u tokens do not fit a session of %d: make it with"
                         " a larger capacity", h->length, capacity);
    if (h->mtp_first < 1 || h->mtp_first > (has_mtp && h->length ? h->length : 1))
        return q3n__fail(err, Q3N_ERR_FORMAT, 120, "mtp_first is %u of %u tokens", h->mtp_first,
                         h->length);
    if (h->version == 1 ? h->n_sampler != 0
                        : h->n_sampler < 1 || h->n_sampler > Q3N__SAMPLER_MAX_WINDOW + 1)
        return q3n__fail(err, Q3N_ERR_FORMAT, 124, "n_sampler is %u in version %u: expected 0 in "
                         "version 1, else 1 .. %d", h->n_sampler, h->version,
                         Q3N__SAMPLER_MAX_WINDOW + 1);
    like->delta_type = (q3n_type)h->delta_type;
    like->mtp_first = (int)h->mtp_first;
    like->has_hidden = (int)h->has_hidden;
    like->has_logits = (int)h->has_logits;
    like->length = (int)h->length;
    like->n_sampler = (int)h->n_sampler;
    want.file_bytes = q3n__snapshot_file_bytes(like);
    return q3n__session_header_numbers(h, &want, err);
}

/* ---- Sections: the same walk writes and reads ---- */

/* One direction of it.  In memory sections have no padding; on the way through they have.  The
 * host's sink or source sees the bytes in order, each once, and need not be able to seek. */
typedef struct {
    const q3n_sink   *sink;      /* NULL = read from source                                      */
    const q3n_source *source;
    int64_t           size;      /* of the file that is read, -1 = not known                     */
    q3n__hash         hash;      /* of the sections so far                                       */
    uint64_t          at, bytes; /* so far, in all                                               */
    size_t            kv_bytes;  /* of one page's keys and values                                */
    q3n_error        *err;
} q3n__stream;

/* Bytes to or from the host, as they are: not hashed, not padded. */
static q3n_result q3n__stream_raw(q3n__stream *s, void *data, size_t bytes)
{
    const int failed = s->sink ? (s->sink->write)(s->sink->user, data, bytes)
                               : (s->source->read)(s->source->user, data, bytes);
    if (failed)
        return q3n__fail(s->err, Q3N_ERR_IO, (int64_t)s->at, "cannot %s bytes %llu .. %llu of %llu"
                         " of the session%s", s->sink ? "write" : "read",
                         (unsigned long long)s->at, (unsigned long long)(s->at + bytes),
                         (unsigned long long)s->bytes, s->sink ? "" : " (cut off?)");
    s->at += bytes;
    return Q3N_OK;
}

/* A multiple of 64 bytes that counts for the hash: before it is written, after it is read. */
static q3n_result q3n__stream_hashed(q3n__stream *s, void *data, size_t bytes)
{
    if (s->sink) q3n__hash_add(&s->hash, data, bytes);
    const q3n_result r = q3n__stream_raw(s, data, bytes);
    if (!s->sink && r == Q3N_OK) q3n__hash_add(&s->hash, data, bytes);
    return r;
}

/* Bytes are hashed in steps that stay in the processor's cache between file and hash. */
#define Q3N__STREAM_STEP ((size_t)128 << 10)

/* A section of bytes at data.  What is beyond a multiple of 64 goes through `last`, whose zeros are
 * the padding: data has no room for it. */
static q3n_result q3n__stream_section(q3n__stream *s, void *data, size_t bytes)
{
    uint8_t *p = (uint8_t *)data, last[64] = { 0 };
    const size_t tail = bytes % sizeof last;
    q3n_result r = Q3N_OK;
    for (size_t left = bytes - tail, count; left > 0 && r == Q3N_OK; left -= count, p += count) {
        count = left < Q3N__STREAM_STEP ? left : Q3N__STREAM_STEP;
        r = q3n__stream_hashed(s, p, count);
    }
    if (tail == 0 || r != Q3N_OK) return r;
    if (s->sink) memcpy(last, p, tail);
    r = q3n__stream_hashed(s, last, sizeof last);
    if (!s->sink && r == Q3N_OK) memcpy(p, last, tail);
    return r;
}

/* All of a snapshot but the pages, in the file's order; sections of 0 bytes are not there. */
static q3n_result q3n__stream_arrays(q3n__stream *s, const q3n_snapshot *snap)
{
    const q3n__shape *h = &snap->shape;
    const struct { void *data; size_t bytes; } section[] = {
        { snap->delta, h->delta_len * (size_t)q3n__types[snap->delta_type].block_bytes },
        { snap->conv, h->conv_len * sizeof(float) },
        { snap->hidden, snap->has_hidden ? (size_t)h->hidden_size * sizeof(float) : 0 },
        { snap->logits, snap->has_logits ? (size_t)h->vocab_size * sizeof(float) : 0 },
        { snap->sampler, q3n__sampler_state_bytes(snap->n_sampler) },
    };
    q3n_result r = Q3N_OK;
    for (size_t i = 0; i < sizeof section / sizeof *section && r == Q3N_OK; i++)
        r = q3n__stream_section(s, section[i].data, section[i].bytes);
    return r;
}

/* Bytes of the file, a multiple of 64, for which there is no room in memory: zeros are written,
 * what is read is dropped. */
static q3n_result q3n__stream_gap(q3n__stream *s, size_t bytes)
{
    uint8_t zeros[1024] = { 0 };
    q3n_result r = Q3N_OK;
    for (size_t count; bytes > 0 && r == Q3N_OK; bytes -= count) {
        count = bytes < sizeof zeros ? bytes : sizeof zeros;
        r = q3n__stream_hashed(s, zeros, count);
    }
    return r;
}

/* One page: tokens, then what memory and file both have of keys and values.  The MTP module's
 * layer, the last, may be only in the file. */
static q3n_result q3n__stream_page(q3n__stream *s, const q3n__shape *shape, q3n__page *page)
{
    const size_t room = q3n__page_bytes(shape, page->n_layers) - Q3N__PAGE_HEAD;
    const size_t bytes = room < s->kv_bytes ? room : s->kv_bytes;
    q3n_result r = q3n__stream_section(s, page->tokens, sizeof page->tokens);
    if (r == Q3N_OK) r = q3n__stream_section(s, (uint8_t *)page + Q3N__PAGE_HEAD, bytes);
    return r == Q3N_OK ? q3n__stream_gap(s, s->kv_bytes - bytes) : r;
}

/* ---- Writing ---- */

/* The used slots of a snapshot's last page, zeros after them; NULL without memory.  The page itself
 * may hold more: a session that shares it writes its later tokens there, perhaps right now. */
static q3n__page *q3n__snapshot_last_page(const q3n_snapshot *s)
{
    q3n__page *p = q3n__page_alloc(s->model, &s->shape);
    if (!p) return NULL;
    q3n__page_copy(&s->shape, p, s->page[s->n_pages - 1], s->length % Q3N__KV_BLOCK);
    return p;
}

/* The whole stream to sink, in order.  The hash of the sections is seeded with the header's, so a
 * header put before the sections of another file does not go unseen. */
static q3n_result q3n__snapshot_write(const q3n_snapshot *s, const q3n_sink *sink, q3n_error *err)
{
    q3n__session_header h;
    q3n__session_header_make(&h, s->model, s);
    q3n__page *last = NULL;
    if (s->length % Q3N__KV_BLOCK != 0 && (last = q3n__snapshot_last_page(s)) == NULL)
        return q3n__fail(err, Q3N_ERR_MEMORY, -1, "no memory for a page of %zu bytes",
                         s->shape.page_bytes);
    q3n__stream out = { .sink = sink, .bytes = h.file_bytes, .err = err,
                        .kv_bytes = s->shape.page_bytes - Q3N__PAGE_HEAD };
    q3n__hash_begin(&out.hash, h.header_hash);
    q3n_result r = q3n__stream_raw(&out, &h, sizeof h);
    if (r == Q3N_OK) r = q3n__stream_arrays(&out, s);
    for (int i = 0; i < s->n_pages && r == Q3N_OK; i++)
        r = q3n__stream_page(&out, &s->shape, last && i == s->n_pages - 1 ? last : s->page[i]);
    uint64_t hash = q3n__hash_end(&out.hash);
    if (r == Q3N_OK) r = q3n__stream_raw(&out, &hash, sizeof hash);
    q3n__page_release(s->model, last);
    return r;
}

/* ---- Reading ---- */

/* All pages of s, made one by one: a file that says more than it has takes one page more than its
 * bytes.  On error those that are there belong to s all the same. */
static q3n_result q3n__stream_pages(q3n__stream *in, q3n_snapshot *s)
{
    q3n_result r = Q3N_OK;
    for (int i = 0; i < s->n_pages && r == Q3N_OK; i++) {
        q3n__page *p = s->page[i] = q3n__page_alloc(s->model, &s->shape);
        if (!p)
            return q3n__fail(in->err, Q3N_ERR_MEMORY, -1, "no memory for page %d of %d, %zu bytes",
                             i + 1, s->n_pages, s->shape.page_bytes);
        p->n_used = s->length - i * Q3N__KV_BLOCK;
        if (p->n_used > Q3N__KV_BLOCK) p->n_used = Q3N__KV_BLOCK;
        r = q3n__stream_page(in, &s->shape, p);
    }
    return r;
}

/* The hash of all sections, and every token within the vocabulary: later code takes ids of pages
 * for rows of the embedding. */
static q3n_result q3n__stream_end(q3n__stream *in, const q3n_snapshot *s)
{
    const int V = s->shape.vocab_size;
    uint64_t expected = 0;
    const int64_t at = (int64_t)in->at;
    const q3n_result r = q3n__stream_raw(in, &expected, sizeof expected);
    if (r != Q3N_OK) return r;
    const uint64_t hash = q3n__hash_end(&in->hash);
    if (hash != expected)
        return q3n__fail(in->err, Q3N_ERR_CHECKSUM, at,
                         "hash of the session is %016llx, expected %016llx: the file is damaged",
                         (unsigned long long)hash, (unsigned long long)expected);
    for (int i = 0; i < s->length; i++) {
        const int32_t id = s->page[i / Q3N__KV_BLOCK]->tokens[i % Q3N__KV_BLOCK];
        if (id < 0 || id >= V)
            return q3n__fail(in->err, Q3N_ERR_FORMAT, -1, "token %d is %d, expected 0 .. %d", i, id,
                             V - 1);
    }
    for (int i = 0; i + 1 < s->n_sampler; i++)
        if (s->sampler->window[i] < 0 || s->sampler->window[i] >= V)
            return q3n__fail(in->err, Q3N_ERR_FORMAT, -1, "token %d of the sampler is %d, expected"
                             " 0 .. %d", i, s->sampler->window[i], V - 1);
    return Q3N_OK;
}

/* Header, checks, arrays, pages, hash.  Pages have the module's layer if file and session have it:
 *
 *     in the file   in the session   pages      keys of the module
 *     no            no               without    none
 *     yes           no               without    read and dropped
 *     no            yes              without    begin after the text, when the session takes it
 *     yes           yes              with       from mtp_first on
 *
 * *out is set on success only. */
static q3n_result q3n__stream_read(q3n__stream *in, q3n_snapshot **out, const q3n_model *m,
                                   const q3n__shape *shape, int capacity)
{
    q3n__session_header h;
    q3n_snapshot like;
    memset(&like, 0, sizeof like);
    like.shape = *shape;
    in->bytes = sizeof h;
    q3n_result r = q3n__stream_raw(in, &h, sizeof h);
    if (r == Q3N_OK) r = q3n__session_header_check(&h, m, capacity, &like, in->err);
    if (r != Q3N_OK) return r;
    if (in->size >= 0 && (uint64_t)in->size != h.file_bytes)
        return q3n__fail(in->err, Q3N_ERR_FORMAT, 24, "the file has %lld bytes, its header says"
                         " %llu: it was not copied whole", (long long)in->size,
                         (unsigned long long)h.file_bytes);
    in->bytes = h.file_bytes;
    in->kv_bytes = like.shape.page_bytes - Q3N__PAGE_HEAD;
    if (shape->has_mtp) shape = &like.shape;             /* a file without the module: its pages */
    q3n__hash_begin(&in->hash, h.header_hash);
    q3n_snapshot *s = q3n__snapshot_alloc(m, shape, like.delta_type, like.length, like.n_sampler);
    if (!s)
        return q3n__fail(in->err, Q3N_ERR_MEMORY, -1, "no memory for the state of %d tokens, %zu"
                         " bytes without pages", like.length,
                         q3n__snapshot_measure(shape, like.delta_type, like.length,
                                               like.n_sampler));
    if (shape->has_mtp) s->mtp_first = like.mtp_first;
    s->has_hidden = like.has_hidden;
    s->has_logits = like.has_logits;
    r = q3n__stream_arrays(in, s);
    if (r == Q3N_OK) r = q3n__stream_pages(in, s);
    if (r == Q3N_OK) r = q3n__stream_end(in, s);
    if (r == Q3N_OK) *out = s;
    else             q3n__snapshot_release(s);
    return r;
}

/* What a session of that shape and capacity can take, from a host's stream; *out is NULL on error.
 * Reads to the last hash and no further: what follows in the stream is the host's. */
static q3n_result q3n__snapshot_read(q3n_snapshot **out, const q3n_model *m,
                                     const q3n__shape *shape, int capacity,
                                     const q3n_source *source, q3n_error *err)
{
    q3n__stream in = { .source = source, .size = -1, .err = err };
    *out = NULL;
    return q3n__stream_read(&in, out, m, shape, capacity);
}

/* ---- Files ---- */
/* A file as a sink or source: both return 0 for success, as hosts' functions do. */
static int q3n__sink_output(void *user, const void *data, size_t bytes)
{
    return !q3n__output_write((q3n__output *)user, data, bytes);
}

static int q3n__source_input(void *user, void *data, size_t bytes)
{
    return !q3n__input_read((q3n__input *)user, data, bytes);
}

/* To the file under path, which has another name until it is complete; on failure nothing is left
 * of it and the old file is as it was.  Messages get the path in front. */
static q3n_result q3n__snapshot_save(const q3n_snapshot *s, const char *path, q3n_error *err)
{
    q3n__output out;
    q3n_result r = q3n__output_open(&out, path, &s->model->file, err);
    if (r != Q3N_OK) return r;
    q3n_error why = { Q3N_OK, -1, "" };
    const q3n_sink sink = { q3n__sink_output, &out };
    r = q3n__snapshot_write(s, &sink, &why);
    if (r != Q3N_OK) q3n__fail(err, r, why.offset, "%s: %s", path, why.message);
    return q3n__output_close(&out, r, err);
}

/* As q3n__snapshot_read, from the file under path.  Its size is known, so that one cut off, or one
 * that goes on after its end, is refused before anything is allocated. */
static q3n_result q3n__snapshot_open(q3n_snapshot **out, const q3n_model *m,
                                     const q3n__shape *shape, int capacity, const char *path,
                                     q3n_error *err)
{
    *out = NULL;
    q3n__input file;
    q3n_result r = q3n__input_open(&file, path, err);
    if (r != Q3N_OK) return r;
    q3n_error why = { Q3N_OK, -1, "" };
    const q3n_source source = { q3n__source_input, &file };
    q3n__stream in = { .source = &source, .size = file.info.bytes, .err = &why };
    r = q3n__stream_read(&in, out, m, shape, capacity);
    if (r != Q3N_OK) q3n__fail(err, r, why.offset, "%s: %s", path, why.message);
    return q3n__input_close(&file, r, err);
}

/* =====================================================================================
 * [14] UNICODE                                                              >>unicode
 *
 * Character classes and Normalization Form C for the tokenizer.  Bytes that are no UTF-8 count as
 * characters of class OTHER, which normalisation leaves as they are.  The tables are printed by
 * tools/unicode_tables.py and unpacked once per model: 14 KB of text become 60 KB.
 *
 * Later code may assume that a character's class and its normalisation depend on the tables only,
 * not on the C library or a locale, and that both take any bytes.  Knows nothing of tokens.
 * ===================================================================================== */

/* Numbers in printable characters, '@' 0, 'A' 1, 'B' 2 ...: see q3n__unpack.  Spans: length and
 * properties (below), over all code points from 0 (classes of Unicode 16.0, normalisation of
 * Unicode 9.0: what the published tokenizers were made with, [HFT]).  Decompositions, sorted by
 * character: 2 x step to it, + 1 if it must not be composed again; zigzag step of the first part;
 * second part - 0x2FF, 0 = none.
 *
 *     "I@ ED R@"        9 code points of properties 0; 5, U+0009 to U+000D, of 4 (space); 18 of 0
 *     "(L $F A"         384 = 2 x 192, 130 = zigzag of 65, 1: U+00C0 = U+0041 U+0300
 *     "B @ B"           2 = 2 x 1, 0, 2: the next, U+00C1 = U+0041 U+0301 */
#define Q3N__N_CHAR_SPANS     2394
#define Q3N__N_DECOMPOSITIONS 2060

static const char q3n__packed_spans[][94] = {
    "I@EDR@ADO@JCG@ZAD@AEA@ZAJ@ADZ@ADI@AAG@BFA@AAC@AFAAA@CFA@WAA@`AA@)XAD@LAN@EAG@AAA@AAQ@U/DA/TD-",
    "qA/TA-PE-qB,oD-qB,oK-qEZD-qH/DA0FA/DC-qC/DB-qABC/DD-qA/DA/TB-qA/DA/eB/uA/eB/uA/eM/DDAAIA@BAB@",
    "DAAHAAF@AAAHCAA@AAA@TAA@#UAA@$OAA@E/DBB$kAA@gAB@AAF@jAH@A-qD/DA-qC/DA.BA-qF/DF-qB/DA-qB/DA.BA",
    ".sA/DA#]A#mA#}A$NA$_A$oA%@A%PA%aB%qA&BA&RA&cA@A&sA@A'DA'TA@A/DA-qA@A%aH@[AD@DA^@H/DA(gA(wA)HE",
    "@lAA'uA(FA(VA(gA(wA)HA)XA)iB/DB-qE/DA-qB/DA-qJCD@BAA)y#fAA@AAG/DB@D/DA-qA/DBAB/DA@A-qB/DA-qBA",
    "JCCAB@AAP@AAA*J_AA/DA-qB/DA-qB/DC-qA/DB-qA/DA-qC/DA-qA/DA-qA/DA-qA/DA-qB/DB@#[AKBAAN@JCbAG/DA",
    "-qA/DBAD@AAB@ABB@VAD/DAAI/DAAC/DAAE/DR@YAC-qD@KAE@XAA@FAH@IBkAJBN/DA@A-qB/DA-qB/DA-qC/DC-qA'u",
    "A(FA(VC/DA-qB/DB-qE/DDBwABBAkAAOBA#LBBAAA/DA-qB/DCBHIBABBB@JCA@PACBA@HAB@BAB@VAA@GAA@AAC@DAB@",
    "AkAAAJFBB@BBB@BBA#LAAH@AJD@BIA@AIBABBB@JCBAB@FFB@AAA@ABB@CBA@FAD@BAB@VAA@GAA@AAAIA@AAAIA@BAB@",
    "AkA@EBD@BBB@BBA#LC@ABG@CIAAA@AIG@JCBBCAABK@CBA@IAA@CAA@VAA@GAA@BAA@EAB@AkAAHBA@CBA@BBA#LB@AAO",
    "@BABBB@JCI@AAFBA@CBA@HAB@BAB@VAA@GAA@BAA@EAB@AkAAAJFBB@BBB@BBA#LG@ABBJD@BIA@CABBB@JCA@AAFFJ@A",
    "BAAA@FAC@CAA@DAC@BAA@AAA@BAC@BAC@CAC@LAD@AJDBC@CBA@CBA#LB@AAF@AJN@JCCFM@EBHAA@CAA@WAA@PAB@ABA",
    "AGBA@CBA@CBA#LG@A*ZA*kA@CAB@AAB@BABBB@JCH@GFA@AACBA@HAA@CAA@WAA@JAA@EAB@AkAADBAJBBA@CBA@CBA#L",
    "G@BJF@BAA@BABBB@JCA@BAABL@DBIAA@CAA@jABBAAAJFBA@CBA@CBA#LAAE@CAAJGFCABBB@JCIFA@FAA@CBA@RAC@XA",
    "A@IAA@AAB@GAC@A#LD@AJEBA@ABA@GBAJF@JCB@BBM@qAABBADBB*{A#LE@GAABD+LCBA@JCh@BAA@AAA@EAA@XAA@AAA",
    "@JAABBADBB+]CBAAB@EAA@AAA@D+mCBA@JCB@DAa@AAW@B-qF@JCJFA@A-qA@A-qA@A-PD@BBCAAIDAA@DAAIDAAIDAAI",
    "DAAILAAICAD@A+}A,NAJA,_BJABAJABD,NBBA,NAJB/DA#LA@B/DEAFBAJDBA@DBAJDBAJDBAJDBAJLBAJCBI@A-qz@lA",
    "CBAJHBAkABB#LDBAAJCF@FADBDACBAACBBAGBCADBMAKBA-qAAABJCDBB@gAA@AAE@AAB@lAA@#hAUIsA[I$JAA@DAB@G",
    "AA@AAA@DAB@jAA@DAB@bAA@DAB@GAA@AAA@DAB@OAA@zAA@DAB@#EAB@C/DI@TFC@PAP@#XAB@FAC@,@AB@QAADZAE@#M",
    "AC@CCHAG@RABBA#LABI@SABBA#LK@RABBL@MAA@CAA@BBL@uA_BA#LABC@AAD@AAA/DB@JCF@JFQ@CBA@ABJCF@#[AG@E",
    "ABBcAA.sAAE@#HAJ@`AA@LBD@IBA.BA/DA-qJ@JC_AB@EAK@mAD@ZAF@JCAFf@WAA/DA-qCBD@vAJBA@A#LTBH/DB@A-q",
    "JCF@JCM@AAH@E/DF-qB/DA-qQBr@EBpAAkAJNBA#LHAC@JCQ@A/DA-qG/DL@CB_AIBB#LBBBAJCmAAkKBB#LL@eASBAkH",
    "@JCC@CAJCeAB@KAE@lAB@CAP@C/DA@AZE-qB/DD-qA/DABGZDAA-qFAA/DBAABB/DAAE@%FAB/DA-qG/DA-qB/DA/uA-@",
    "A-qA,of/DEBA/DA/eA-qA/DA-q&_AB@FAB@gAB@FAB@HAA@AAA@AAA@AAA@RAAIAAAIAAAIAAAIAAAIAAAIAAAIB@vAA@",
    "EAAIAAA@AIC@CAA@CAAIAAAIAAC@CAAIB@EAAID@CAAIGAAIAAA@BHB@CAA@CAAIAAAIAAAHB@BLIDA@BEZ@BDE@ADO@B",
    "ES@AEJ@ADP@AFAAB@FFE@AAJFF@MAt@B/DBZD/DCZB/DDBA/DCBBZA/DA-qA/DBZD-qA/DQ@AAD@AAB@JAA@AAC@EAF@A",
    "AA@AIA@AAA@BIBAA@KAB@DAE@EAD@AAA@PFdCBADCAF(l@BH&~@}FZ@uEVF,J@_F/c@AH&l@%lAF@DAC/DBAI@AFB@gAA",
    "@AAE@AAB@yAG@AAO@A#LWAI@GAA@GAA@GAA@GAA@GAA@GAA@GAA@GAA@a/Dp@AA)_@ADD@BAACY@ICA-aA.sA/TA.BB.R",
    "A@EAB@CCBAD@#XAB@B{B@CAA@#]AA@DAE@lAA@#aAC@DFJ@aAq@PAa@JF_@HFA@OFa@JFh@OF'J@%8TA#B@.7WA#E@oAB",
    "@&UAC@PAJCBAT@pAA/DCBA@J/DA@`AB/D#HAJCB/Df@IAB@#jAB@#EAB@BAA@AAA@HAU@PAABCAA#LDAABWAEBD@ABC@F",
    "FJ@uAL@BBsAPBA#LABJ@JCF@R/DFAC@AAA@BAABJC]AEBC-qB@WALBA#LL@^AC@DBpAAkLBA#LN@AAJCF@EAABJAJCEAA",
    "@jANBI@CAABHABBB@JCF@WAC@AACBsAA/DAAB/DA-qBAB/DEAB/DAAA/DAAX@CAB@KAEBB@CAABA#LJ@FAB@FAB@FAI@G",
    "AA@GAA@lAA@NAF@#vAHBA@ABA#LB@JCF@(.LAL@WAD@rA&:T@&VIBAAIAAAIBAJIAAAIAAAIBABICA#FIB@#mIg@GAL@E",
    "AE@AIA'eAIIAA@MIA@EIA@AIA@BIA@BIA@II#fAb@'vAR@#BAB@wAi@LAD@PBP@G/DG-qB/DC@BEX@CEa@EAA@$KAS@JC",
    "G@ZAD@AEA@ZAK@#[AC@FAB@FAB@FAB@CAd@LAA@ZAA@SAA@BAA@OAB@NAc@#~AL@nFL@vCDFQ@BF#t@A-q$F@^AC@rAO@",
    "A-q[FD@aADFI@TAACHAACE@gAE/DE@_AB@eAD@HAA@ECk@$cAB@JCF@eAD@eAD@iAH@uAL@KAA@OAA@GAA@BAA@KAA@OA",
    "A@GAA@BAC@uAL@'AAI@VAJ@HAX@FAA@kAA@IA#G@FAB@AAA@mAA@BAC@AAB@WAB@HFWAB@GF`AH@IFq@SAA@BAE@EFVAF",
    "FD@ZA#H@yAD@BFBAPFB@oFAACBA@BBE@ABA-qABA/DDAA@CAA@^AB@A/DAZA-qD@A#LIFW@^ABFA@^ACFa@HAA@]AA/DA",
    "-qD@EFP@wAJ@VAB@HFSAE@HFRAW@GF#R@#KAx@tAM@tAG@FFeADBH@JCF@JC]AC@EBA@WA%a@`FA@kAA@BBC@BAP@CAx@",
    "DB^AJFAAH@VAKBDF[@RADBk@UAGFT@WAI@CBvANBA#LK@TFJCABBABBAAI@A#LCBnAIBA#LAkG@ABM@YAG@JCF@C/DeAA",
    "JKBB#LA@JCD@AABBAAH@dAAkB@AAI@CBqAMBA#LDAD@ABAkBBA@BBJCAAA@AAD@TFK@RAA@YAIBA#LAkABF@ABBAAB#@@",
    "GAA@AAA@DAA@OAA@JAG@pAJBAkA#LE@JCF@DBA@HAB@BAB@VAA@GAA@BAA@EAA@ABAkAAAJFBB@BBB@BBA#LB@AAF@AJE",
    "@EABBB@G/DC@E/DK@JAA@AAB@AAA@gAA@AAIBA@ABB@ABA@DBA@EBAAABAAM@BB^@vAMBA#LCBAkDAE@JCD@ABCA_@qAA",
    "JIBAJBBAJDBA#LAkBAA@AAH@JC$k@pAAJFBB@GBA#LAkW@DABBc@qAOBA#LABC@AAK@JCg@lAKBA#LAkAAG@JCF@TC]@[",
    "AB@NBA#LD@JCBFD@GA$~@mAOB#h@#BAJCIFL@HAB@AAB@HAA@BAA@XAFBA@BBB@DBAAABAABBL@JC#H@HAB@hAGBB@GBA",
    "AA@AAAB[@AAJBiAGBAADBH@ABH@AAKBoAPBC@AAR@#KA%M@bAO@JCF@IAA@fAHBA@GBA#LAAO@JCSFE@_AB@VBA@NB#K@",
    "GAA@BAA@gAFBC@ABA@BBA@GBAAABH@JCF@FAA@BAA@aAEBA@BBA@EBAAG@JC'@@SADBI@BBAAABMAA@cAGBC@EBM@JCAB",
    "#W@AAO@UFl@0wA#i@#rCQ@%JA#0a@#dAO@3RAP@ABFAOBJ@$*[AE@+YA%<U@_ARBJC=}@+KAG@`AA@JCF@#QAA@JCF@_A",
    "B@EZK@qAG/DI@DAL@JCA@GFA@UAE@SA(}@nAC@JC%L@#BAWF#l@#MAD@ABAAxBG@DBMA#B@BAA@AAABK@BBN@%0}AH@5}",
    "Aj@JA'&G@DAA@GAA@BAA@&lAO@AA^@CAB@AAN@DAH@(XA#+N@#nAE@MAC@IAG@JAC@ABAZ$-W@JC*V@oBB@WB*h@GHB-P",
    "CZC@A.cE-PH@H-qB@E/DB-q_@D/DM@FH$E@C/D#~@TFL@TF#o@YF$K@#WAA@#IAA@BAB@AAB@BAB@DAA@LAA@AAA@GAA@",
    "#CAA@DAB@HAA@GAA@]AA@DAA@EAA@AAC@GAA@'_AB@YAA@YAA@`AA@YAA@`AA@YAA@`AA@YAA@`AA@YAA@HAB@sC*P@xB",
    "D@sBH@ABN@ABV@EBA@OB3s@`AF@FA%[@G/DA@Q/DB@G/DA@B/DA@E/DE@#@Ab@AB#s@nAC@GBGAB@JCD@AA'K@_AABQ@m",
    "ADBJC)e@]ADBJC%]@_ABBAAJC)t@GAA@DAA@BAA@OAA@%KAB@IFG-qj@#FAF/DAkAAD@JC.p@|FA@CFA@DF#N@nFA@OF%",
    "H@DAA@[AA@BAA@AAB@AAA@JAA@DAA@AAA@AAF@AAD@AAA@AAA@AAA@CAA@BAA@AAB@AAA@AAA@AAA@AAA@AAA@BAA@AAB",
    "@DAA@GAA@DAA@DAA@AAA@JAA@QAE@CAA@EAA@QA+V@MFd@ZEF@ZEF@ZE#0{@JC2g@:3BAa@$-@AF@%eAB@%*{AN@&*bAO",
    "@,BA#-q@*oI:R@$9jAE@$-gA04&H@%wB%>=F@",
};

static const char q3n__packed_decompositions[][94] = {
    "(L$FAB@BB@CB@DB@IB@KDDiBDAB@BB@CB@IBHAB@BB@CB@IDJDBBAB@BB@CB@DB@IFLAB@BB@CB@IBHBFPAB@BB@CB@DB",
    "@IB@KDDiBDAB@BB@CB@IBHAB@BB@CB@IDJDBBAB@BB@CB@DB@IFLAB@BB@CB@IBHBD@IB#rEB#BEB#AGB#BGB#AjB#BjB",
    "|BB#BBB#ACB#BCB#AHB#BHB#AMB#BMB~MB#BMF~EB#BEB#AGB#BGB#AHB#BHB#AjB#BjB#AMB#BMB|CB#BCB#AGB#BGB#",
    "AHB#BHB#AiB#BiB~CB#BCF~DB#BDB#AEB#BEB#AGB#BGB#AjB#BjB#AHHBCB#BCB~iB#BiD~BB#BBB#AiB#BiB#AMB#BM",
    "J|BB#BBB#AiB#BiB#AMB#BMH~EB#BEB#AGB#BGB#ALB#BLFzBB#BBB#AiB#BiB#AMB#BMB~BB#BBB#ACB#BCB#AiB#BiB",
    "#AMB#BMB~iB#BiB#AMB#BMF~DB#BDB#AEB#BEB#AGB#BGB#AKB#BKB#ALB#BLB#AjB#BjB|CB#BCB|CB#BCB#AIBBBB#B",
    "BB#AHB#BHB#AMB#BM#F#W]B#B]]t]B#B]{#jMB#BMBpMB#BMBtMB#BMBtMB#BMB%TEB#BEB#ABB#BBB#AMB#BMB#AAB#B",
    "AD#rEB#BEB,XEBBEB-WEB#BEF'GMB#BMBxMB#BMBxjB#BjB.NEBBEB#jMB)DMB3rMH#GBB#BBFrAB#BAB$sBB#BBB~BB#",
    "BBB[BB#BBB'xPB#BPB#ARB#BRBxPB#BPB#ARB#BRBxPB#BPB#ARB#BRBtPB#BPB#ARB#BRBzPB#BPB#ARB#BRBzPB#BPB",
    "#ARB#BRB#EhB#BhB~hB#BhF#YMB#BMN#OHB#BHBxiB#BiB%iEB#BEB#CEB#BEB'UHB#BHB0ZEBBEB1IEB#BE*k6w@BB@D",
    "e@CUB#c$b@T6d@N%aBB:BBB9b@B9kBBDBBDBDLBDLBBHBB#DBu#dIBXIBXBBHBBDBBDBBeBudIBXIBKBBLBBHBJRBB@I#",
    "Z$JAB@IDCBHYIJiBBCABVGVUG#B#BGoEAB@IDCBH#HIJxBBCABVGq#ePBBP$X%CGB#BG]#MGB#BGB#AIB#BIFvGB#BGF'",
    "PIBBIB(QIB#BIB~IB#BIF~EB#BEB#AIB#BIBtIB#BIF'_IBBIB(CIB#BIB#UEB#BEB#AIB#BIB#ALB#BLBxIB#BIFxIB#",
    "BI+e1V/oB@/pB#D/pB#C/qB#H/p&}&_/pDh/pcc/p5R5R;pPP;pFF;p#K|;pCB;pCB;pCJ;pCJ;pCB;pCR;pCH;p%_&y=",
    "vB@>Pb#M=tCB=tEZ=t$n&N##xGL##x#I#E##xCB##xCJ##xG_##x)c+J#([F@#(CB@#(]b#M#(ACB#(A#q%g#*a#o#k#*",
    "GBB#*GBA#*a&@&H#,d%w%y#.gNN#.gB@#.hD@#.SBH#.g&F&@#0SBB#0SBA#0m&e&o#2dD@#2iBF#2dBE#2y-b-i#:aUT",
    "#:aKJ#:aKJ#:aKJ#:a[v#:_U#e#9YE@#9[C$F#9hEB#9hS$G#9hf#D#:aUT#:aKJ#:aKJ#:aKJ#:a[v#:_%a&s#<[%'s%",
    "'s%1}DD%1}DD%1}DD%1}DD%1}HH%1}#T#T%1}DD%1}FD%1}BB%1}DF%1}8g)<~gB#BgB~HB#BHB#AeB#BeB#AsB#BsB%P",
    "BB#BBB'OHB#BHB#AeB#BeB#AsB#BsB#AiB#BiB#AoB#BoB'gABBABABBBBB(hoB#BoB#ArB#BrB0cGBBGB1dHB#BHB~EB",
    "#BEB~HB#BHB#AeB#BeB#AIB#BIB#AiB#BiB#ApB#BpB~rB#BrB%RBB#BBB'QBB#BBB#AeB#BeB#AsB#BsB~eB#BeB*8@E",
    "BBEB*9CsB#BsB#AoB#BoB~BB#BBB#AHB#BHB#AeB#BeB~HB#BHB#AeB#BeB#AsB#BsB#AoB#BoB%TBB#BBB#AIB#BIB$s",
    "ABBABABBBBB*IBB#BBB#AHB#BHB|HB#BHB#AeB#BeB*8}EBBEB*:AsB#BsB~HB#BHB#AeB#BeB)]HBBHBJHBBHB*1aHBB",
    "HB*:MHB#BHB#AeB#BeB#AsB#BsB#AoB#BoB~fB#BfB#ArB#BrB#AoB#BoB)uBBBBBBIBBIB*zDB#BDB#AeB#BeB~AB#BA",
    "B#ABB#BBB#AIB#BIB#AHB#BHB#AeB#BeB~HB#BHB#AIB#BIB~HB#BHB~CB#BCB#AeB#BeB#AsB#BsBdsBXIBFKBDKD*]H",
    "J,OeB#BeB#AJB#BJB%HBB#BBB#AAB#BAB#AJB#BJB#ADB#BDB*7gCBBCB*6fBBBBBAABBABAJBBJBADBBDB*6cGBBGB*<",
    "leB#BeB#AJB#BJB#ADB#BDB%PBB#BBB#AAB#BAB#AJB#BJB#ADB#BDB*8HCBBCB*=UJB#BJB#AeB#BeBteB#BeB#AJB#B",
    "JB%PBB#BBB#AAB#BAB#AJB#BJB#ADB#BDB*8]CBBCB*2zBBBBBAABBABAJBBJBADBBDBAeBBeB,leB#BeB#AJB#BJB,HB",
    "BBBBAABBABAJBBJBADBBDBAeBBeB-CAB#BAB#AeB#BeB#AJB#BJB#ADB#BDN<eTB@UB*#aABBABABBBBBA#EBB#EB*$dT",
    "B@UB*$sABBABABBBBBA#EBB#EB*#jTB@UB*#yABBABABBBBF*$|TB@UB*%LABBABABBBBF*$GTB@UB*$VABBABABBBBBA",
    "#EBB#EB*%YTB@UB*%iABBABABBBBBA#EBB#EB*$dTB@UB*$sABBABABBBBBA#EBB#EB*%vTB@UB*&FABBABABBBBBA#EB",
    "B#EB*$xTB@UB*%HABBABABBBBF*&KTB@UB*&ZABBABABBBBF*%MTB@UB*%]ABBABABBBBBA#EBB#ED*&`UD*&qAD@BD@#",
    "EB*%fTB@UB*%uABBABABBBBBA#EBB#EB*&xTB@UB*'HABBABABBBBBA#EBB#EB*&xABI@BRABO@BTABQ@BVABS@BaABZ@",
    "BMABP@BGABJ@F)>e#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBc#HBB#HBB#HBB#",
    "HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HB#e#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#HBB#",
    "HBB#HBB#HBB#HBB#HBB#HB*'EGB@EB*'H#HB*'G#HBI#HDJ#EB*)X#HB**YGB@EB@ABU@BV#HD#R@F;S#EB+$T#HB*'C#",
    "HBQ#HDR#EB*)m#HB**rABY@B_AB[@B]#HB**aAB@BB@#EB*)YGB@EBcAB#v@F#T#EBc#EB#dGB@EB@AB^@D*,}AB@BB@#",
    "EB*+CGB@EBLABv@BcTB@UBH#EBL#EB#MGB@EB@ABn@BgUB:bAB9i@B;|@F+&y#HB*&n#HBJ#HDI#EB**k#HB*,AABf@B{",
    "ABt@Bu#HB:Y@F+(a@BB@+]*,G@H=r@B%{@%e+4szBDzgDz#@#{zBHzBCz#m#ezJJzFFzqqzDDzwozFNzFDzDFzo,#GzD,",
    "#{zVhzB,#SzBDzB,$@zBBzFZzBBzFFzBBzNFzBBzFNzBBzFFzBBz#HwzBLzBBzBDz#e#`zBBzBizBBzN#BzBBzBBzBBz#",
    "{%<B@BB@$)d#0lz#2y#2u(6RDD(6RDD(6RDD(6RDD(6RDD(6RDD(6RDD(6RDD(6RDD(6RDD(6RDD(6RFF(6RDD(6RDD(6",
    "RNN(6RB@(6SDF(6RB@(6SDF(6RB@(6SDF(6RB@(6SDF(6RB@(6So#l(6RT$s(6R]](6RDD(6RDD(6RDD(6RDD(6RDD(6R",
    "DD(6RDD(6RDD(6RDD(6RDD(6RDD(6RFF(6RDD(6RDD(6RNN(6RB@(6SDF(6RB@(6SDF(6RB@(6SDF(6RB@(6SDF(6RB@(",
    "6So#l(6RF$V(6RBB(6RBB(6RBB(6RHV(6R$$=k<;y@B,>O@B-6}@B2d@B*9[@B+3W@B#5D@B8+P@B@@B66^@B24e@B37v",
    "@B#%@@B$1k@B'>w@B$5N@B#=c@B.N@B,P@B$(k@B-,U@B;e@B#$y@B:{@B&9L@B%:s@B$0Z@B8(z@B#.w@B(<c@B$$c@B",
    "';o@B)#m@B5%I@B'/i@B(.m@B##i@B-,r@B+&_@B#9u@B.'S@B$.c@B#:N@B#4@@B*8P@B5)E@B4F@B+a@B')s@B#8B@B",
    "$%q@B#-}@B$5J@B#7m@B$q@B$(c@B$6_@B#)@@B7@@B-#E@B)u@B#(F@B#8w@B&/q@B%,s@B'8U@B06f@B#8o@B*4]@B#",
    "(@@B&&`@B#:y@B':y@B$>R@B4*~@B##N@B&#D@B#%L@B+}@B&&i@B*a@B)$u@B5;K@B//e@B/7`@B`@B-:y@B#$@@B#9L",
    "@B'.y@B%(^@B->A@B$%]@B+6X@B3;t@B%>}@B#(Z@B'6k@B1q@B,%h@B-&y@B.&`@B&5Z@B''Y@B+#y@B$&`@B(=Z@B.'",
    "h@B#,B@B+#@@B%;k@B#:k@B+%^@B,2}@B,,S@B$8p@B+-]@B+(M@B'(o@B--l@B8c@B%F@B(5g@B'>]@B#3k@B$/P@B$#",
    "m@B41A@B,o@B#0w@B#3L@B#>c@B$>Z@B$5o@B*-]@B#-H@B#(_@B#q@B8/O@B'<c@B#,o@B,2g@B0.C@B;k@B%g@B7_@B",
    "%%@@B3o@B<u@B#1X@B#(X@B6_@B&+a@B$>W@B%*c@B<B@B5(Y@B&a@B3V@B*)e@B)$@@B1o@B.<U@B+k@B##F@B$-m@B&",
    ":q@B$2b@B,7|@B$,o@B#.m@B1D@B5k@B'7o@B'y@B%*Z@B'c@B'*D@B#-R@B$i@B(m@B7-G@B.-}@B)$X@B#/Z@B1:f@B",
    "'-d@B5N@B%)_@B$g@B$7N@B#*Z@B$*X@B#*q@B&+g@B%,}@B&.Z@B28v@B0#_@B5<f@B(&}@B%w@B#1s@B-L@B#2s@B,u",
    "@B;V@B#,V@B*#_@B6;t@B&<V@B1-s@B66b@B%8q@B&<w@B+8e@B0#O@B0N@B#>V@B%,]@B,+@@B6&b@B1k@B$.u@B$9{@",
    "B,J@B-J@B#)@@B$$w@B1V@B$9L@B$7F@Be@B$3i@B#0@@B5<b@B*${@B)9p@B*7P@B8}@B'%c@B&;e@B#5F@B4u@B2([@",
    "B#9N@B'<F@B$$n@B$o@B-{@B$;E@B3p@B):w@B3:W@B1/N@B0.`@B#h@B%6N@B#(_@B)4s@B+9G@B''T@B#:|@B-<k@B$",
    "#O@B&%i@B%7U@B.2p@B%>E@B#+J@F7_@D&&]@F(#~@B+8}@B##{@B6L@B#F@BN@B#V@B*7y@B)9f@B:o@D#:R@D#.]@F#",
    "1V@B(V@H$+g@BZ@B#Z@B#+c@B%7~@B#6R@B6<f@B,F@B%R@B.P@Bw@B%a@B4}@B%X@B%J@B1N@B%V@B#$u@BT@B#(P@B(",
    "u@B#N@B%N@B=q@B&o@B'i@B2H@B#.u@B'P@B*a@B4}@B(F@B2N@B#*g@B'e@BV@BA@BP@BL@BN@B#c@BB@B'o@B$F@B,R",
    "@B4L@Bk@B#s@B+u@B&o@B1o@B&a@B@@B1Z@B#-@@B&T@B-m@B#s@B/N@B#m@B8H@B&L@B#=D@B+J@B#{@B2.d@B'$*R@B",
    "&6,`@F1*|@B##X@B$^@B1n@B0g@B#y@B,c@B#i@B7q@B$S@B$L@B$V@B6X@B$w@B&k@Ba@B*m@B(X@B#$P@BN@B&i@B$L",
    "@B+i@B%s@B$O@B&T@B#^@B&m@B$H@B.y@B$u@B#o@B*X@B+N@B'P@BH@B#y@B#(J@B$F@B.g@B/N@B`@B$s@B*H@B,u@B",
    "#9X@B#2|@B%{@B%}@B,c@B&s@B#m@B)R@BD@B'a@Bc@Bs@B$q@BS@B.q@B1i@B*o@B(B@B)N@B&{@B,i@B(Z@B=P@B'D@",
    "B##N@B0m@B$N@Ba@B+e@B#u@B#[@B#o@BE@Bb@B$]@B$g@B.T@B4D@B,H@B+a@B)H@B#'N@B%T@B%m@B&R@B#J@BX@B#c",
    "@B9]@B#+_@B&%8q@BK@B%-a@B'*5v@B#+@@B#D@B'2+R@B%${@B+>w@B'#.O@B$Z@$M#3+S-KEs-NWQ-XC@-YC$2,T-XC",
    "@-YC$2-G-NC@-OC@-SCB-SCB-SCB-SCB-SCB-SCB-SED-SCB-SCB-SCB-SCB-SED-SED-SCB-SED-SCB-SED-SCB-SCB-",
    "SCB-SCB-SCj-PCG-VCT-VCR-V()w$84_#-7nDD#-7n_T#-7n&N&a#-9_BB#-9_3Z3L#.&GB@#.&a-u-{#.,OB@#.,ED@#",
    ".,R*H*N#.0LBB#.0L#=+b#=+V$.'PCB$.'PCN$.'YC@$.'ZC@$.'[C@$.']C@$.'^$t$y$.'PCB$.'PCB$.'YCB$.'YCA",
    "$.'ZCB$.'Z%$7{&$)|@BI@BR@B&2)P@B&1;~@B$a@BZ@B$R@B%w@B#@@B$a@Bp@B**r@B&;+B@B&2:I@BN@Ba@Bg@B&2/",
    "e@B&:<z@B*.u@B#N@B&20X@B&20C@BZ@B9^@B9o@BR@B(#<@@B(#9z@B]@B*2h@B*4]@BV@B#Z@BJ@B*4h@B*7N@BD@Bw",
    "@Bm@BV@BB@Bc@B#g@BP@BR@Bs@BT@BD@B@@B@@B&3,g@B&*9f@B*.d@Bk@B&33c@B&33I@BL@Bk@B&y@B%Q@Ba@B#B@B#",
    "w@B$m@Bu@B$J@Ba@B#D@B@@Bk@Be@BP@B_@B,}@B*p@B*s@B(W@B#H@B#*b@B$#@@B+Q@B#N@Bs@B&K@B'X@BA@B%}@B&",
    "4>X@B&4<G@BJ@B_@Bi@BP@B$D@B&5+F@B$H@B&5(p@B#a@BX@B$b@B&e@B,.x@B]@B,3k@B#o@B@@B&55c@B&51O@Bk@B",
    "_@BX@B&5:c@B&5:I@BN@B=P@B<U@B,8^@B,:_@B]@B$i@B#h@B&60k@B&6*r@B&6*w@B&6)^@BE@Bc@B%P@BB@B-%S@B-",
    "&L@B#X@Bk@B#Z@B-(A@B'&)P@B'&(Y@B-)_@BF@BF@Bi@B(%*H@B(%([@B&7,R@B@@B&-#I@B,)|@B@@B-*n@B'+(F@B/",
    ";N@B'-6`@BR@B-,K@B--m@B#i@BT@B#F@B&X@B-2U@B|@B-3{@B&7=N@B&7;d@B&J@BH@BD@BC@B#_@Bi@B#J@B[@BV@B",
    "#a@Bi@BH@Bu@BV@B$H@B$m@B#H@B&@@B&8-_@B&8.E@B$E@B%_@Bw@B%H@B&80F@B&8.E@B$~@Bx@B.(b@B..o@Bk@B#@",
    "@B#M@B.-K@B.4J@B{@B&9)R@B&9%[@B*{@B'h@B.6h@B.8}@B.9`@B#I@B(5R@BF@B(*w@B%M@B)5P@B3<S@B,-B@BH@B",
    "L@B#}@BU@B&98T@B'*7~@B/'D@B%p@B(g@B#i@B&93{@B&93h@B%d@B)y@B/-[@B/.{@B%H@B$R@B(H@B&94c@B&92x@B",
    "/8I@B/:Z@B&:%R@B&:#h@B/:S@B/;R@B#]@Bw@BB@B&:0@@B*5j@B*9L@B&:.p@B&:=R@B&:9h@B]@B%Q@B'i@B#R@B#u",
    "@B#n@B#R@B_@BZ@B&:6Z@B&:9A@B*F@B$B@B00b@B03c@BG@B&::D@B&;$l@B.B@B&:9N@B#c@B&:7z@B%m@Bv@BE@B0;",
    "K@B0<m@B#i@BK@B#o@B&)*H@B&)%M@B&;&}@B&;$I@B&;.o@B&;*M@BZ@Bw@B&;<]@B&;:x@Bk@B&<'{@B)L@B&<'n@Bc",
    "@B12f@B13]@B13C@B@@B18R@Bk@Bk@Bi@B$N@B19S@B1<N@B&<<H@B&<;Q@B&<>P@B&<<h@B&0)}@B&0$r@B&=4o@Bo@B",
    "&a@B'18d@BX@B2'c@B&=8R@BA@B#P@Bu@B&=8~@BB@B@@B#X@B2(n@B2*u@B2*Y@B$e@B'27X@B&>+O@B$@@B$D@B2/l@",
    "B'3)m@B&>3b@B&>7R@B#X@B&>6t@B$}@B26`@B29P@BT@BJ@B'#+D@B+i@B@@B'#/d@B28C@B'42B@B'#0~@BF@B2=z@B",
    "'47m@B'#/M@B3&d@B3'R@BI@B{@B'$*m@B'$'`@B3(G@B3+V@B#y@B$J@B3-p@B'6%o@B#@@B'6%b@B'6*P@B'$1l@B'$",
    "4}@B'$4E@B%P@BV@B'$=q@B$V@B'$=K@B'%%_@B'%$|@B&2)m@B'(&K@B3<g@B$g@B3=^@B4#X@B-,M@B'09B@B]@B1,`",
    "@BR@B&1:n@BF@B%>T@B8&~@B4+N@BK@Be@B0%j@B0&T@BD@BT@B#T@B'%>m@B'%>n@B#s@B$P@B$X@B&[@B&}@B#V@B%g",
    "@B*W@B%u@BD@Ba@B'%>u@B+}@B&t@B'85j@B48i@BD@B#H@B'';R@B''8p@B'&.i@B'9+W@BH@B'9/c@B+T@B'98b@B5%",
    "y@BX@BV@BD@B$D@B#C@B&T@B#Y@B&w@B$f@B$J@Bw@B5,Y@B5/V@B#B@B5/Q@B52V@BF@B''5g@B''1v@BN@B54^@B55X",
    "@B:9l@B(%#P@B'{@B';<[@BR@B5>R@B$_@B'D@B(c@B'(,k@B'()x@Bm@B$y@B$}@B'(8L@B#)&E@B%=1W@B^@B#k@B%=",
    "7N@B%=/v@B%N@B'*(a@Bw@B'):I@B%@@B#B@B'*$_@B'*$I@B+L@B'H@BB@B$|@B.R@By@B'*3L@B'*'G@B8-Q@B8.m@B",
    "'*2@@B($<E@B84o@B29O@B2<V@B'+)k@B(w@B(&%~@BP@B89R@B'+:]@B(&3r@B(&8T@B'+=d@B@@B}@B',)y@B',#z@B",
    "8;`@B8=s@B&D@Bw@B#{@B9#j@B((-k@B'-#E@B+o@B(F@B94I@B#@@B96e@B'->N@B()6[@B()8N@B*c@B&N@B'.%r@B9",
    ">I@B:$J@BJ@BN@BT@BN@B#L@B'.>B@",
};

/* ---- Characters ---- */

/* Classes as sets, so that a pattern's brackets become a mask; a character has one bit; the classes
 * that \w divides have two. */
#define Q3N__CLASS_OTHER  (1u | 32u)    /* 32: connectors, joiners, alphabetic symbols: in \w */
#define Q3N__CLASS_LETTER 2u            /* \p{L} */
#define Q3N__CLASS_MARK   4u            /* \p{M} */
#define Q3N__CLASS_NUMBER (8u | 64u)    /* \p{N}; 64: \p{No}, not in \w */
#define Q3N__CLASS_SPACE  16u           /* \s, White_Space */
#define Q3N__CLASS_WORD   (Q3N__CLASS_LETTER | Q3N__CLASS_MARK | 8u | 32u)    /* \w */

/* Properties of a code point: class number (bits 0-2), unstable (bit 3), rank of its canonical
 * combining class (bits 4-9; 0 = starter).  A stable character is a starter that NFC does not
 * change and that joins nothing before it: normalisation may begin anew at each. */
#define Q3N__UNSTABLE     8u
#define Q3N__RANK_SHIFT   4

#define Q3N__HASH_SIZE    4096   /* at most half full */

/* The tables unpacked, constant once made; 59,900 bytes.
 *
 *     class of U+0E01     first_span[0x0E] holds U+0E00; go on while the next span begins
 *                         at or before U+0E01 (at most 73 steps); its low 10 bits
 *     decompose           by_composed[hash(cp)], linear probing: 2060 entries in 4096 slots
 *     compose             by_parts[hash(first, second)]: 940 of them */
typedef struct q3n__unicode {
    uint32_t span[Q3N__N_CHAR_SPANS + 1]; /* first code point << 10 | properties, then 0x110000 */
    uint16_t first_span[0x1100];          /* that which holds code point i << 8 */
    uint16_t latin[256];                  /* properties of the first code points */
    uint32_t composed[Q3N__N_DECOMPOSITIONS];
    uint32_t first[Q3N__N_DECOMPOSITIONS];
    uint32_t second[Q3N__N_DECOMPOSITIONS];   /* 0 = `first` is all of it */
    uint16_t by_composed[Q3N__HASH_SIZE];     /* entry + 1, 0 = empty */
    uint16_t by_parts[Q3N__HASH_SIZE];        /* those that may be composed again */
} q3n__unicode;

/* A number: digits '#' .. '>' are worth 1 .. 28 and lead on, the last is '@' .. '~' without the
 * backslash, worth 0 .. 61.  Zeros end the lines of a table. */
static uint32_t q3n__unpack(const char **p)
{
    uint32_t v = 0;
    for (;;) {
        const uint32_t c = (uint8_t)*(*p)++;
        if (c >= '@') return v * 62 + c - '@' - (c > '\\');
        if (c) v = v * 28 + c - 34;
    }
}

/* Multiplication by an odd number, 12 high bits: a slot of Q3N__HASH_SIZE.  The tables are fixed,
 * so no input can fill them; probing ends at an empty slot, of which half remain. */
static uint32_t q3n__hash_char(uint32_t cp) { return cp * 0x9E3779B1u >> 20; }
/* Of the two parts of a decomposition. */
static uint32_t q3n__hash_parts(uint32_t first, uint32_t second)
{
    return (first * 0x9E3779B1u ^ second * 0x85EBCA77u) * 0xC2B2AE3Du >> 20;
}

/* Linear probing; there is room, since the tables have 4096 slots for 2060 entries. */
static void q3n__hash_put(uint16_t *table, uint32_t slot, uint32_t entry)
{
    while (table[slot]) slot = (slot + 1) % Q3N__HASH_SIZE;
    table[slot] = (uint16_t)(entry + 1);
}

/* Unpack both tables.  A span is first_span[i] for each multiple of 256 that it holds.  Cannot
 * fail: the text was made by the tool and is compared with it by the tests. */
static void q3n__unicode_init(q3n__unicode *u)
{
    memset(u, 0, sizeof *u);
    /* The rows of the array are one text: each is full but for its 0, which unpacking skips.
     */
    const char *p = q3n__packed_spans[0];
    uint32_t cp = 0;
    for (uint32_t i = 0; i < Q3N__N_CHAR_SPANS; i++) {
        const uint32_t length = q3n__unpack(&p), props = q3n__unpack(&p);
        u->span[i] = cp << 10 | props;
        for (uint32_t c = cp; c < cp + length && c < 256; c++) u->latin[c] = (uint16_t)props;
        for (uint32_t k = (cp + 255) >> 8; k << 8 < cp + length; k++)
            u->first_span[k] = (uint16_t)i;
        cp += length;
    }
    u->span[Q3N__N_CHAR_SPANS] = cp << 10;

    p = q3n__packed_decompositions[0];
    uint32_t composed = 0, first = 0;
    for (uint32_t i = 0; i < Q3N__N_DECOMPOSITIONS; i++) {
        const uint32_t step = q3n__unpack(&p), zigzag = q3n__unpack(&p), second = q3n__unpack(&p);
        u->composed[i] = composed += step >> 1;
        u->first[i] = first += zigzag >> 1 ^ (0u - (zigzag & 1));
        u->second[i] = second ? second + 0x2FF : 0;
        q3n__hash_put(u->by_composed, q3n__hash_char(composed), i);
        if (second && !(step & 1))
            q3n__hash_put(u->by_parts, q3n__hash_parts(first, u->second[i]), i);
    }
}

/* cp is at most 0x10FFFF; the entry after the last span ends the search. */
static uint32_t q3n__char_props(const q3n__unicode *u, uint32_t cp)
{
    if (cp < 256) return u->latin[cp];
    uint32_t i = u->first_span[cp >> 8];
    while (u->span[i + 1] >> 10 <= cp) i++;
    return u->span[i] & 1023;
}

typedef struct {
    uint32_t cp;
    uint32_t props;
    uint32_t mask;      /* Q3N__CLASS_*; 0 at the end of the text */
    int      bytes;     /* 0 at the end of the text */
    int      valid;     /* 0: one byte that is no UTF-8: class OTHER, stable, no code point */
} q3n__char;

/* The character at p <= end.  Bytes that are no UTF-8 are one character each, so that every place
 * of a text is reached by whole characters from its start, and every text ends. */
static q3n__char q3n__char_at(const q3n__unicode *u, const uint8_t *p, const uint8_t *end)
{
    q3n__char c = { 0, 0, 0, 0, 0 };
    if (p == end) return c;
    c.bytes = q3n__utf8_decode(p, end, &c.cp);
    c.valid = c.bytes > 0;
    if (c.valid) c.props = q3n__char_props(u, c.cp);
    else         c.bytes = 1;
    c.mask = 1u << (c.props & 7);
    return c;
}

/* The two that the patterns name; white space has more (U+0085, U+2028), which end no line there.
 */
static int q3n__is_line_end(q3n__char c) { return c.cp == '\n' || c.cp == '\r'; }

/* Start of the character that ends at p > begin; p - 1 if there is no valid one. */
static const uint8_t *q3n__char_before(const uint8_t *begin, const uint8_t *p)
{
    uint32_t cp;
    for (int n = 1; n <= 4 && p - begin >= n; n++)
        if ((p[-n] & 0xC0) != 0x80) return q3n__utf8_decode(p - n, p, &cp) == n ? p - n : p - 1;
    return p - 1;
}

/* ---- Normalization Form C ([UAX15]) ----
 *
 * Decompose, sort marks by combining class, compose.  e + circumflex + dot below, all three steps:
 *
 *     65 302 323     decomposed already; classes 0, 230, 220
 *     65 323 302     sorted: marks between two starters by class, equal ones as they stood
 *     1EB9 302       65 + 323 compose; the next mark looks at the starter that came of it
 *     1EC7           1EB9 + 302 compose
 *
 * Most text is in NFC, so only stretches of unstable characters go through this, each with the
 * starter before it.  q3n__append_nfc on  "ab" e 302 323 "c":
 *
 *     q3n__find_unstable -> 302; the character before it, e, goes along;  "ab" is copied
 *     e 302 323 -> z->chars -> q3n__flush_chars -> 1EC7;  "c" is stable: the stretch ends before it
 *
 * Of combining classes only the order matters: tables hold ranks, 0 to 54, in 8 bits above the code
 * point.  Text with a million marks on one letter takes linear time (q3n__sort_marks). */

typedef struct {
    const q3n__unicode  *unicode;
    const q3n_allocator *allocator;
    q3n__buffer          chars;     /* u32 rank << 24 | code point: what is being normalised */
    q3n__buffer          sorted;    /* u32: scratch for a long row of marks */
    q3n__buffer          out;       /* UTF-8 */
} q3n__normalizer;

#define Q3N__HANGUL_S 0xAC00u    /* syllables: ((L x 21) + V) x 28 + T */
#define Q3N__HANGUL_L 0x1100u
#define Q3N__HANGUL_V 0x1161u
#define Q3N__HANGUL_T 0x11A7u    /* T = 0: none */

/* The first unstable character of [p, end), or end: before it the text is in NFC.  Every character
 * below U+0300, that is every byte below CC, is stable. */
static const uint8_t *q3n__find_unstable(const q3n__unicode *u, const uint8_t *p,
                                         const uint8_t *end)
{
    for (;;) {
        while (end - p >= 8 && !(q3n__load_u64(p) & 0x8080808080808080u)) p += 8;
        while (p < end && *p < 0xCC) p++;
        if (p == end) return end;
        const q3n__char c = q3n__char_at(u, p, end);
        if (c.props & Q3N__UNSTABLE) return p;
        p += c.bytes;
    }
}

/* The caller has reserved the room. */
static void q3n__push_char(q3n__normalizer *z, uint32_t cp)
{
    const uint32_t c = q3n__char_props(z->unicode, cp) >> Q3N__RANK_SHIFT << 24 | cp;
    memcpy(z->chars.data + z->chars.bytes, &c, sizeof c);
    z->chars.bytes += sizeof c;
}

/* Append the canonical decomposition of cp to z->chars, at most 5 characters.  Only first parts
 * decompose further, four times at most; both are properties of the table (the tool asserts them),
 * so the seconds are stacked and come out in reverse.  Hangul syllables are arithmetic (Unicode
 * 3.12): U+AC01 is 1100 1161 11A8.  0 = out of memory. */
static int q3n__push_decomposed(q3n__normalizer *z, uint32_t cp)
{
    const q3n__unicode *u = z->unicode;
    if (!q3n__reserve(&z->chars, 5 * sizeof cp, z->allocator)) return 0;
    /* A syllable is LV or LVT: 19 x 21 x 28 of them from U+AC00, T fastest. */
    if (cp - Q3N__HANGUL_S < 11172) {
        const uint32_t s = cp - Q3N__HANGUL_S;
        q3n__push_char(z, Q3N__HANGUL_L + s / 588);
        q3n__push_char(z, Q3N__HANGUL_V + s % 588 / 28);
        if (s % 28) q3n__push_char(z, Q3N__HANGUL_T + s % 28);
        return 1;
    }
    uint32_t seconds[4];
    int n = 0;
    /* Follow first parts until one has no entry: an empty slot ends both the probing and the walk.
     */
    for (uint32_t slot = q3n__hash_char(cp); u->by_composed[slot];) {
        const uint32_t entry = u->by_composed[slot] - 1u;
        if (u->composed[entry] != cp) {
            slot = (slot + 1) % Q3N__HASH_SIZE;
            continue;
        }
        if (u->second[entry]) seconds[n++] = u->second[entry];
        cp = u->first[entry];
        slot = q3n__hash_char(cp);
    }
    q3n__push_char(z, cp);
    while (n) q3n__push_char(z, seconds[--n]);
    return 1;
}

/* The character that two others make, 0 if none: L + V and LV + T of Hangul, else the table.
 * Unsigned subtraction makes one comparison of a range, below it wraps. */
static uint32_t q3n__compose(const q3n__unicode *u, uint32_t first, uint32_t second)
{
    /* L + V, then LV + T; T - 1, because T = 0 stands for none. */
    if (first - Q3N__HANGUL_L < 19 && second - Q3N__HANGUL_V < 21)
        return Q3N__HANGUL_S + ((first - Q3N__HANGUL_L) * 21 + second - Q3N__HANGUL_V) * 28;
    if (first - Q3N__HANGUL_S < 11172 && (first - Q3N__HANGUL_S) % 28 == 0
        && second - Q3N__HANGUL_T - 1 < 27)
        return first + second - Q3N__HANGUL_T;
    uint32_t slot = q3n__hash_parts(first, second);
    for (; u->by_parts[slot]; slot = (slot + 1) % Q3N__HASH_SIZE) {
        const uint32_t entry = u->by_parts[slot] - 1u;
        if (u->first[entry] == first && u->second[entry] == second) return u->composed[entry];
    }
    return 0;
}

/* Stable sort of c [n] by rank.  Marks come in twos and threes; text made to be slow has rows of
 * any length, and those are distributed by counting: linear, where insertion is quadratic.  0 = out
 * of memory. */
static int q3n__sort_marks(q3n__normalizer *z, uint32_t *c, size_t n)
{
    if (n <= 32) {
        for (size_t i = 1; i < n; i++) {
            const uint32_t x = c[i];
            size_t j = i;
            for (; j > 0 && c[j - 1] >> 24 > x >> 24; j--) c[j] = c[j - 1];
            c[j] = x;
        }
        return 1;
    }
    z->sorted.bytes = 0;
    if (!q3n__reserve(&z->sorted, n * sizeof *c, z->allocator)) return 0;
    uint32_t *out = (uint32_t *)(void *)z->sorted.data;
    /* Counting sort: start[r] becomes the place of the first of rank r, in the order that they
     * stood. */
    size_t start[65] = { 0 };
    for (size_t i = 0; i < n; i++) start[(c[i] >> 24) + 1]++;
    for (int r = 0; r < 64; r++) start[r + 1] += start[r];
    for (size_t i = 0; i < n; i++) out[start[c[i] >> 24]++] = c[i];
    memcpy(c, out, n * sizeof *c);
    return 1;
}

/* Bring the decomposed z->chars to canonical order, compose, append to z->out as UTF-8.
 * Composition works in place: c[0 .. kept) is the result so far, c[starter] the last starter in it.
 * 0 = out of memory. */
static int q3n__flush_chars(q3n__normalizer *z)
{
    uint32_t *c = (uint32_t *)(void *)z->chars.data;
    const size_t n = z->chars.bytes / sizeof *c;
    for (size_t i = 0; i < n;) {
        size_t j = i;
        while (j < n && c[j] >> 24) j++;
        if (j - i > 1 && !q3n__sort_marks(z, c + i, j - i)) return 0;
        i = j + 1;
    }
    /* A mark joins the last starter unless one of its own or a higher class stands between. */
    size_t kept = 0, starter = n;
    for (size_t i = 0; i < n; i++) {
        const uint32_t rank = c[i] >> 24;
        if (starter < n && (kept == starter + 1 || c[kept - 1] >> 24 < rank)) {
            const uint32_t both = q3n__compose(z->unicode, c[starter], c[i] & 0xFFFFFF);
            if (both) {
                c[starter] = both;
                continue;
            }
        }
        if (!rank) starter = kept;
        c[kept++] = c[i];
    }
    if (!q3n__reserve(&z->out, 4 * kept, z->allocator)) return 0;
    for (size_t i = 0; i < kept; i++)
        z->out.bytes += (size_t)q3n__utf8_encode(z->out.data + z->out.bytes, c[i] & 0xFFFFFF);
    z->chars.bytes = 0;
    return 1;
}

/* Append [p, end) in NFC to z->out.  Each unstable stretch is normalised with the stable
 * character before it, which it may change; the rest is copied.  A byte that is no UTF-8 is stable
 * and ends a stretch: nothing composes across it.  0 = out of memory. */
static int q3n__append_nfc(q3n__normalizer *z, const uint8_t *p, const uint8_t *end)
{
    const q3n__unicode *u = z->unicode;
    while (p < end) {
        /* [p, q) is in NFC; its last character may still change, so it goes with what follows. */
        const uint8_t *q = q3n__find_unstable(u, p, end);
        if (q > p && q < end) {
            const uint8_t *before = q3n__char_before(p, q);
            if (q3n__char_at(u, before, q).valid) q = before;
        }
        if (!q3n__reserve(&z->out, (size_t)(q - p), z->allocator)) return 0;
        if (q > p) memcpy(z->out.data + z->out.bytes, p, (size_t)(q - p));
        z->out.bytes += (size_t)(q - p);
        /* The stretch: the character at q whatever it is, then unstable ones. */
        for (p = q; p < end;) {
            const q3n__char c = q3n__char_at(u, p, end);
            if (!c.valid || (p > q && !(c.props & Q3N__UNSTABLE))) break;
            if (!q3n__push_decomposed(z, c.cp)) return 0;
            p += c.bytes;
        }
        if (!q3n__flush_chars(z)) return 0;
    }
    return 1;
}

/* Empty buffers: nothing is allocated before something is appended. */
static q3n__normalizer q3n__normalizer_begin(const q3n__unicode *u, const q3n_allocator *a)
{
    return (q3n__normalizer){ u, a, { NULL, 0, 0 }, { NULL, 0, 0 }, { NULL, 0, 0 } };
}

static void q3n__normalizer_end(q3n__normalizer *z)
{
    q3n__free(z->allocator, z->chars.data);
    q3n__free(z->allocator, z->sorted.data);
    q3n__free(z->allocator, z->out.data);
}

/* =====================================================================================
 * [15] VOCABULARY                                                        >>vocabulary
 *
 * What the tokenizer knows of a model: tokens, merges and added tokens, in lists of the file, and
 * the tables that make them quick to search.  The section of the file is hostile.
 *
 * Later code may assume that a q3n__tokenizer does not change once it is open: any number of
 * threads may use it.  What has been checked nothing checks again: token offsets ascend within the
 * text, ids of merges and of added tokens are below n_tokens, every single byte has a token.  Knows
 * of a model its section, some numbers and the allocator.
 * ===================================================================================== */

/* ---- TOKENIZER, the section of a model file; a model without one works on ids ----
 *
 *      0  u32    n_tokens        ids 0 .. n_tokens - 1, added tokens included
 *      4  u32    n_merges
 *      8  u32    n_added
 *     12  u32    zero
 *     16  u32[n_tokens + 1]      token_offset: token i is bytes [offset[i], offset[i + 1]) of TEXT
 *         u32[3][n_merges]       left id, right id, result id; in order of rank
 *         u32[2][n_added]        id, flags: 1 special, 2 lstrip, 4 rstrip, 8 normalized,
 *                                16 single_word
 *         u8[]                   TEXT: raw bytes of every token (the byte-to-unicode map is undone)
 *     An id with no token has length 0. */

/* ---- What a tokenizer is made of ---- */

/* What the loader found in the file: all that the tokenizer knows of a model. */
typedef struct q3n__tokenizer_params {
    const uint8_t *section;       /* [bytes] TOKENIZER, mapped; stays as long as the tokenizer */
    size_t         bytes;
    int64_t        file_offset;   /* of the section, for error records */
    int            vocab_size;
    q3n__pattern   pattern;
    int            nfc;           /* 1 = text is brought to Normalization Form C first */
} q3n__tokenizer_params;

/* Flags of an added token, as the file has them: all but the last. */
#define Q3N__TOKEN_SPECIAL      1u
#define Q3N__TOKEN_LSTRIP       2u      /* takes the white space before it along */
#define Q3N__TOKEN_RSTRIP       4u
#define Q3N__TOKEN_NORMALIZED   8u      /* searched in the normalised text */
#define Q3N__TOKEN_SINGLE_WORD 16u      /* only where no word character touches it */
#define Q3N__TOKEN_FLAGS       31u      /* those that the file may set */
#define Q3N__TOKEN_ADDED      128u      /* always, so that flags tell added tokens from others */

#define Q3N__MAX_ADDED 4096     /* bytes; at worst, finding a token takes as many steps a byte */

typedef struct q3n__added {
    const uint8_t *text;
    uint32_t       bytes, id, flags;
} q3n__added;

/* A merge that found no slot near the home of its pair. */
typedef struct { uint32_t left, right, rank; } q3n__merge_key;

/* A slot of the table of pairs: see q3n__pair_slot_of. */
typedef struct {
    uint32_t check;              /* low half of the pair's hash                                  */
    uint32_t rank_1;             /* rank + 1, 0 = empty                                          */
} q3n__pair_slot;

/* Added tokens sorted by text; those that start with byte b are [first[b], first[b + 1]).  Most
 * bytes of a text start none, which two numbers of this array tell. */
typedef struct q3n__added_index {
    const q3n__added *tokens;
    uint32_t          first[257];
} q3n__added_index;

/* Lists stay in the mapped file: const uint8_t *, since they lie at any byte and are read with
 * q3n__load_u32.  Allocated are the tables: pairs, 8 bytes x 2^k, unicode, 60 KB, added tokens and
 * flags.  What each table promises stands where it is built. */
struct q3n__tokenizer {
    uint32_t          n_tokens;        /* 1 or more */
    uint32_t          vocab_size;      /* >= n_tokens */
    const uint8_t    *token_offset;    /* u32[n_tokens + 1] */
    const uint8_t    *merges;          /* u32[n_merges][3] */
    const uint8_t    *text;            /* bytes of all tokens */
    q3n__pattern      pattern;
    int               nfc;
    uint32_t          byte_id[256];    /* token of each single byte */
    q3n__unicode     *unicode;
    q3n__pair_slot   *pairs;
    uint32_t          pairs_shift;     /* slot = hash >> shift; 2^(64 - shift) slots */
    uint32_t          n_crowded;
    q3n__merge_key   *crowded;         /* [n_crowded] sorted: merges that found no slot near home */
    q3n__added       *added;           /* [n_added] after both indexes */
    uint8_t          *added_text;      /* texts of `normalized` tokens, where NFC changes them */
    uint8_t          *flags;           /* [n_tokens] Q3N__TOKEN_*, 0 unless added */
    q3n__added_index  raw;             /* searched in the text as given */
    q3n__added_index  normalized;      /* searched after normalisation */
};

/* ---- Ranks of pairs ----
 *
 * An open hash table of 2^k slots, k such that at most 2/3 are full.  Qwen3: 151,387 merges, 2^18
 * slots of 8 bytes.  A slot holds half of the hash instead of the pair, which is looked up in the
 * file's list where the halves agree.  A pair lies fewer than Q3N__MAX_PROBES slots from its home,
 * or in a sorted list: so that no choice of merges makes a lookup long, whether the pair exists or
 * not.  Of Qwen3's merges three are in the list.  When only insertion was bounded, at 4096, text of
 * 20 kB and merges made for it took 4 s. */
#define Q3N__NO_RANK     UINT32_MAX
#define Q3N__MAX_PROBES  32

/* The high bits choose the slot, the low half is the slot's check. */
static uint64_t q3n__pair_hash(uint32_t left, uint32_t right)
{
    uint64_t h = ((uint64_t)left << 32 | right) * Q3N__GOLDEN;
    h ^= h >> 32;
    return h * 0xD6E8FEB86659FD93u;
}

/* By pair, then by rank: the first of equal pairs is the one that counts. */
static int q3n__compare_merges(const void *left, const void *right)
{
    const q3n__merge_key *a = (const q3n__merge_key *)left, *b = (const q3n__merge_key *)right;
    Q3N__STEP();
    if (a->left != b->left) return a->left < b->left ? -1 : 1;
    if (a->right != b->right) return a->right < b->right ? -1 : 1;
    return a->rank < b->rank ? -1 : a->rank > b->rank;
}

/* The lowest rank of a pair in the sorted list. */
static uint32_t q3n__crowded_rank(const q3n__tokenizer *t, uint32_t left, uint32_t right)
{
    const q3n__merge_key key = { left, right, 0 };
    uint32_t low = 0, high = t->n_crowded;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (q3n__compare_merges(&t->crowded[middle], &key) < 0) low = middle + 1;
        else                                                    high = middle;
    }
    if (low == t->n_crowded) return Q3N__NO_RANK;         /* also if there is no list */
    const q3n__merge_key *found = &t->crowded[low];
    return found->left == left && found->right == right ? found->rank : Q3N__NO_RANK;
}

/* The slot of a pair: that which holds it, else the empty one where it would go; NULL if there is
 * neither within the probes. */
static inline q3n__pair_slot *q3n__pair_slot_of(const q3n__tokenizer *t, uint32_t left,
                                                uint32_t right)
{
    const uint64_t h = q3n__pair_hash(left, right), mask = UINT64_MAX >> t->pairs_shift;
    const uint64_t home = h >> t->pairs_shift;
    for (uint64_t i = home; i < home + Q3N__MAX_PROBES; i++) {
        q3n__pair_slot *slot = &t->pairs[i & mask];
        Q3N__STEP();
        if (!slot->rank_1) return slot;
        if (slot->check != (uint32_t)h) continue;
        const uint8_t *merge = t->merges + 12 * (size_t)(slot->rank_1 - 1);
        if (q3n__load_u32(merge) == left && q3n__load_u32(merge + 4) == right) return slot;
    }
    return NULL;
}

/* Rank of the merge of two neighbours, Q3N__NO_RANK if they do not merge. */
static uint32_t q3n__pair_rank(const q3n__tokenizer *t, uint32_t left, uint32_t right)
{
    const q3n__pair_slot *slot = q3n__pair_slot_of(t, left, right);
    return slot ? slot->rank_1 - 1 : q3n__crowded_rank(t, left, right);   /* 0 - 1: no rank */
}

/* rank is below n_merges: it came out of the table. */
static uint32_t q3n__merge_result(const q3n__tokenizer *t, uint32_t rank)
{
    return q3n__load_u32(t->merges + 12 * (size_t)rank + 8);
}

/* ---- Tokens ---- */

/* Bytes of a token; 0 if id has none. */
static size_t q3n__token_bytes(const q3n__tokenizer *t, uint32_t id, const uint8_t **text)
{
    *text = NULL;
    if (id >= t->n_tokens) return 0;
    const uint32_t start = q3n__load_u32(t->token_offset + 4 * (size_t)id);
    const uint32_t stop = q3n__load_u32(t->token_offset + 4 * (size_t)id + 4);
    *text = t->text + start;
    return stop - start;
}

/* ---- Opening: the section of a hostile file becomes tables ----
 *
 * split (sizes, in 64 bits) -> check_tokens (offsets, bytes) -> add_merges -> add_added.  Each step
 * relies on those before it; a failure anywhere frees all. */

typedef struct {
    const q3n__tokenizer_params *params;
    q3n_error                   *err;
    uint32_t                     n_tokens, n_merges, n_added;
    const uint8_t               *added;        /* u32[n_added][2] */
    size_t                       text_bytes;
} q3n__tokenizer_layout;

/* Errors of one entry: what is number i of its list, `where` lies in the section, found is its
 * value. */
static q3n_result q3n__tokenizer_bad(const q3n__tokenizer_layout *l, const uint8_t *where,
                                     const char *what, uint32_t i, uint32_t found)
{
    return q3n__fail(l->err, Q3N_ERR_FORMAT,
                     l->params->file_offset + (int64_t)(where - l->params->section),
                     "tokenizer: %s %u: found %u, of %u tokens in %u bytes of text", what,
                     (unsigned)i, (unsigned)found, (unsigned)l->n_tokens, (unsigned)l->text_bytes);
}

/* Find the parts of the section.  n_merges is bounded so that sizes
 * and rank + 1 fit 32 bits; TEXT is what remains after the lists. */
static q3n_result q3n__tokenizer_split(q3n__tokenizer *t, q3n__tokenizer_layout *l)
{
    const q3n__tokenizer_params *p = l->params;
    if (p->bytes < 16)
        return q3n__fail(l->err, Q3N_ERR_FORMAT, p->file_offset,
                         "tokenizer: section of %zu bytes, expected at least 16", p->bytes);
    l->n_tokens = q3n__load_u32(p->section);
    l->n_merges = q3n__load_u32(p->section + 4);
    l->n_added = q3n__load_u32(p->section + 8);
    if (l->n_tokens < 1 || p->vocab_size < 1 || l->n_tokens > (uint32_t)p->vocab_size)
        return q3n__fail(l->err, Q3N_ERR_FORMAT, p->file_offset,
                         "tokenizer: %u tokens, expected 1 to vocab_size %d", (unsigned)l->n_tokens,
                         p->vocab_size);
    if (l->n_added > l->n_tokens || l->n_merges > UINT32_MAX / 4)
        return q3n__fail(l->err, Q3N_ERR_FORMAT, p->file_offset + 4,
                         "tokenizer: %u merges and %u added tokens are too many for %u tokens",
                         (unsigned)l->n_merges, (unsigned)l->n_added, (unsigned)l->n_tokens);
    const uint64_t fixed = 16 + 4 * ((uint64_t)l->n_tokens + 1) + 12 * (uint64_t)l->n_merges
                         + 8 * (uint64_t)l->n_added;
    if (fixed > p->bytes)
        return q3n__fail(l->err, Q3N_ERR_FORMAT, p->file_offset,
                         "tokenizer: %u tokens, %u merges and %u added tokens need %llu bytes, the "
                         "section has %zu", (unsigned)l->n_tokens, (unsigned)l->n_merges,
                         (unsigned)l->n_added, (unsigned long long)fixed, p->bytes);
    t->n_tokens = l->n_tokens;
    t->vocab_size = (uint32_t)p->vocab_size;
    t->pattern = p->pattern;
    t->nfc = p->nfc;
    t->token_offset = p->section + 16;
    t->merges = t->token_offset + 4 * ((size_t)l->n_tokens + 1);
    l->added = t->merges + 12 * (size_t)l->n_merges;
    t->text = l->added + 8 * (size_t)l->n_added;
    l->text_bytes = p->bytes - (size_t)fixed;
    return Q3N_OK;
}

/* Offsets ascend within the text; every byte has a token of its own, the first that there is.  So
 * any bytes can be encoded, and words begin without a lookup that could fail. */
static q3n_result q3n__tokenizer_check_tokens(q3n__tokenizer *t, const q3n__tokenizer_layout *l)
{
    memset(t->byte_id, 0xFF, sizeof t->byte_id);
    uint32_t start = q3n__load_u32(t->token_offset);
    for (uint32_t i = 0; i < l->n_tokens; i++) {
        const uint8_t *next = t->token_offset + 4 * ((size_t)i + 1);
        const uint32_t stop = q3n__load_u32(next);
        if (stop < start || stop > l->text_bytes)
            return q3n__tokenizer_bad(l, next, "end of token", i, stop);
        if (stop - start == 1 && t->byte_id[t->text[start]] == UINT32_MAX)
            t->byte_id[t->text[start]] = i;
        start = stop;
    }
    for (uint32_t b = 0; b < 256; b++)
        if (t->byte_id[b] == UINT32_MAX)
            return q3n__fail(l->err, Q3N_ERR_FORMAT, l->params->file_offset,
                             "tokenizer: no token for the single byte 0x%02X, all 256 need one",
                             (unsigned)b);
    return Q3N_OK;
}

/* Bytes of a token; 0 for ids that are left free. */
static uint32_t q3n__token_length(const q3n__tokenizer *t, uint32_t id)   /* id < n_tokens */
{
    const uint8_t *text;
    return (uint32_t)q3n__token_bytes(t, id, &text);
}

/* Put merge `rank` into the table, unless its pair is there already: the lower rank wins.  One that
 * finds no slot is appended to crowded.  The result must be as long as left and right together;
 * that its bytes are theirs is the file's affair. */
static q3n_result q3n__add_merge(q3n__tokenizer *t, const q3n__tokenizer_layout *l, uint32_t rank,
                                 q3n__buffer *crowded, const q3n_allocator *a)
{
    const uint8_t *merge = t->merges + 12 * (size_t)rank;
    const uint32_t left = q3n__load_u32(merge), right = q3n__load_u32(merge + 4);
    const uint32_t result = q3n__load_u32(merge + 8);
    if (left >= l->n_tokens) return q3n__tokenizer_bad(l, merge, "left id of merge", rank, left);
    if (right >= l->n_tokens)
        return q3n__tokenizer_bad(l, merge + 4, "right id of merge", rank, right);
    if (result >= l->n_tokens)
        return q3n__tokenizer_bad(l, merge + 8, "result of merge", rank, result);
    const uint32_t n_left = q3n__token_length(t, left), n_right = q3n__token_length(t, right);
    if (n_left == 0 || n_right == 0 || q3n__token_length(t, result) - n_left != n_right)
        return q3n__tokenizer_bad(l, merge + 8, "length of the result of merge", rank,
                                  q3n__token_length(t, result));

    q3n__pair_slot *slot = q3n__pair_slot_of(t, left, right);
    if (slot) {
        const q3n__pair_slot first = { (uint32_t)q3n__pair_hash(left, right), rank + 1 };
        if (!slot->rank_1) *slot = first;
        return Q3N_OK;
    }
    const q3n__merge_key key = { left, right, rank };
    if (!q3n__reserve(crowded, sizeof key, a))
        return q3n__fail(l->err, Q3N_ERR_MEMORY, -1, "tokenizer: out of memory for merges");
    memcpy(crowded->data + crowded->bytes, &key, sizeof key);
    crowded->bytes += sizeof key;
    return Q3N_OK;
}

/* 1.5 n slots or more, so that a third at least is empty.  pairs and crowded belong to t at once,
 * also when a merge is bad: q3n__tokenizer_close frees them. */
static q3n_result q3n__tokenizer_add_merges(q3n__tokenizer *t, const q3n__tokenizer_layout *l,
                                            const q3n_allocator *a)
{
    uint32_t bits = 4;
    while ((1ull << bits) < l->n_merges + (uint64_t)l->n_merges / 2) bits++;
    size_t bytes;
    if (!q3n__mul_size(sizeof *t->pairs, (size_t)1 << bits, &bytes)
        || !(t->pairs = (q3n__pair_slot *)q3n__alloc(a, bytes)))
        return q3n__fail(l->err, Q3N_ERR_MEMORY, -1, "tokenizer: out of memory for %u merges",
                         (unsigned)l->n_merges);
    memset(t->pairs, 0, bytes);
    t->pairs_shift = 64 - bits;
    q3n__buffer crowded = { NULL, 0, 0 };
    q3n_result r = Q3N_OK;
    for (uint32_t rank = 0; rank < l->n_merges && r == Q3N_OK; rank++)
        r = q3n__add_merge(t, l, rank, &crowded, a);
    t->crowded = (q3n__merge_key *)(void *)crowded.data;
    t->n_crowded = (uint32_t)(crowded.bytes / sizeof *t->crowded);
    if (t->n_crowded)
        q3n__sort(t->crowded, t->n_crowded, sizeof *t->crowded, q3n__compare_merges);
    return r;
}

/* Order of q3n__tokenizer.added: raw ones first, then by text, then by id. */
static int q3n__compare_added(const void *left, const void *right)
{
    const q3n__added *x = (const q3n__added *)left, *y = (const q3n__added *)right;
    const uint32_t nx = x->flags & Q3N__TOKEN_NORMALIZED, ny = y->flags & Q3N__TOKEN_NORMALIZED;
    Q3N__STEP();
    if (nx != ny) return nx < ny ? -1 : 1;
    const int order = memcmp(x->text, y->text, x->bytes < y->bytes ? x->bytes : y->bytes);
    if (order != 0) return order;
    if (x->bytes != y->bytes) return x->bytes < y->bytes ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

/* first[b]: how many of the n sorted tokens begin with a byte below b; first[256] is n. */
static void q3n__index_added(q3n__added_index *x, const q3n__added *tokens, uint32_t n)
{
    x->tokens = tokens;
    for (uint32_t b = 0, i = 0; b < 257; b++) {
        while (i < n && tokens[i].text[0] < b) i++;
        x->first[b] = i;
    }
}

/* Tokens that are searched in normalised text are themselves normalised.  Two passes: the buffer
 * moves while it grows, so texts are pointed at only when all are in it. */
static q3n_result q3n__normalize_added(q3n__tokenizer *t, uint32_t n_added, const q3n_allocator *a)
{
    q3n__normalizer z = q3n__normalizer_begin(t->unicode, a);
    int ok = 1;
    for (uint32_t i = 0; i < n_added && ok; i++) {
        q3n__added *x = &t->added[i];
        if (!(x->flags & Q3N__TOKEN_NORMALIZED)) continue;
        const size_t before = z.out.bytes;
        ok = q3n__append_nfc(&z, x->text, x->text + x->bytes) && z.out.bytes <= UINT32_MAX;
        x->bytes = (uint32_t)(z.out.bytes - before);
    }
    const uint8_t *text = z.out.data;
    for (uint32_t i = 0; i < n_added && ok; i++) {
        q3n__added *x = &t->added[i];
        if (!(x->flags & Q3N__TOKEN_NORMALIZED)) continue;
        x->text = text;
        text += x->bytes;
    }
    t->added_text = z.out.data;
    z.out.data = NULL;
    q3n__normalizer_end(&z);
    return ok ? Q3N_OK : Q3N_ERR_MEMORY;
}

/* Read and index the list of added tokens.  Their texts stay in the mapped section, but for those
 * that NFC may change.  An id may appear once, its text has 1 to 4096 bytes. */
static q3n_result q3n__tokenizer_add_added(q3n__tokenizer *t, const q3n__tokenizer_layout *l,
                                           const q3n_allocator *a)
{
    uint32_t n_raw = 0;
    memset(t->flags, 0, l->n_tokens);
    for (uint32_t i = 0; i < l->n_added; i++) {
        const uint8_t *record = l->added + 8 * (size_t)i;
        q3n__added *x = &t->added[i];
        x->id = q3n__load_u32(record);
        if (x->id >= l->n_tokens)
            return q3n__tokenizer_bad(l, record, "id of added token", i, x->id);
        if (t->flags[x->id])
            return q3n__tokenizer_bad(l, record, "repeated id of added token", i, x->id);
        x->bytes = (uint32_t)q3n__token_bytes(t, x->id, &x->text);
        if (x->bytes < 1 || x->bytes > Q3N__MAX_ADDED)
            return q3n__tokenizer_bad(l, record, "length of added token", i, x->bytes);
        x->flags = Q3N__TOKEN_ADDED | (q3n__load_u32(record + 4) & Q3N__TOKEN_FLAGS);
        t->flags[x->id] = (uint8_t)x->flags;
        n_raw += !(x->flags & Q3N__TOKEN_NORMALIZED);
    }
    if (t->nfc && n_raw < l->n_added && q3n__normalize_added(t, l->n_added, a) != Q3N_OK)
        return q3n__fail(l->err, Q3N_ERR_MEMORY, -1, "tokenizer: out of memory for added tokens");
    q3n__sort(t->added, l->n_added, sizeof *t->added, q3n__compare_added);
    q3n__index_added(&t->raw, t->added, n_raw);
    q3n__index_added(&t->normalized, t->added + n_raw, l->n_added - n_raw);
    return Q3N_OK;
}

/* Also of a tokenizer that is half open; NULL is allowed. */
static void q3n__tokenizer_close(q3n__tokenizer *t, const q3n_allocator *a)
{
    if (!t) return;
    q3n__free(a, t->unicode);
    q3n__free(a, t->pairs);
    q3n__free(a, t->crowded);
    q3n__free(a, t->added);
    q3n__free(a, t->added_text);
    q3n__free(a, t->flags);
    q3n__free(a, t);
}

/* The tables of t, which is zeroed: everything is NULL until it is made, so that
 * q3n__tokenizer_close works from anywhere. */
static q3n_result q3n__tokenizer_make(q3n__tokenizer *t, const q3n__tokenizer_params *p,
                                      const q3n_allocator *a, q3n_error *err)
{
    q3n__tokenizer_layout l = { p, err, 0, 0, 0, NULL, 0 };
    q3n_result r = q3n__tokenizer_split(t, &l);
    if (r != Q3N_OK) return r;
    size_t bytes;
    t->unicode = (q3n__unicode *)q3n__alloc(a, sizeof *t->unicode);
    t->flags = (uint8_t *)q3n__alloc(a, l.n_tokens);
    t->added = q3n__mul_size(sizeof *t->added, (size_t)l.n_added + 1, &bytes)
                   ? (q3n__added *)q3n__alloc(a, bytes) : NULL;
    if (!t->unicode || !t->flags || !t->added)
        return q3n__fail(err, Q3N_ERR_MEMORY, -1, "tokenizer: out of memory for %u tokens",
                         (unsigned)l.n_tokens);
    q3n__unicode_init(t->unicode);
    r = q3n__tokenizer_check_tokens(t, &l);
    if (r == Q3N_OK) r = q3n__tokenizer_add_merges(t, &l, a);
    if (r == Q3N_OK) r = q3n__tokenizer_add_added(t, &l, a);
    return r;
}

/* Check the section and make the tokenizer; *out is NULL on failure, and nothing left allocated.
 * Errors: Q3N_ERR_FORMAT, Q3N_ERR_MEMORY. */
static q3n_result q3n__tokenizer_open(q3n__tokenizer **out, const q3n__tokenizer_params *p,
                                      const q3n_allocator *a, q3n_error *err)
{
    q3n__tokenizer *t = (q3n__tokenizer *)q3n__alloc(a, sizeof *t);
    *out = NULL;
    if (!t) return q3n__fail(err, Q3N_ERR_MEMORY, -1, "tokenizer: out of memory");
    memset(t, 0, sizeof *t);
    const q3n_result r = q3n__tokenizer_make(t, p, a, err);
    if (r == Q3N_OK) *out = t;
    else             q3n__tokenizer_close(t, a);
    return r;
}

/* Of a model that is loaded; without the section it works on ids. */
static q3n_result q3n__model_open_tokenizer(q3n_model *m, q3n_error *err)
{
    const q3n__tokenizer_params p = { m->words.data, m->words.bytes, (int64_t)m->words.offset,
                                      m->config.vocab_size, m->pattern, m->nfc };
    return p.section ? q3n__tokenizer_open(&m->tokenizer, &p, &m->allocator, err) : Q3N_OK;
}

/* =====================================================================================
 * [16] TOKENIZER                                                          >>tokenizer
 *
 * Byte-level BPE.  Text goes through four steps, each a subsection: added tokens are cut out, the
 * rest is brought to NFC and cut into words by the pattern, each word's bytes are merged pair by
 * pair in order of rank.  Text passes in chunks: memory grows with the longest word only (with the
 * text, if NFC changes it and the file has added tokens that are searched after NFC), time with the
 * length of the text (times its logarithm within one word).  The text is hostile.  Of the model it
 * knows the vocabulary, the allocator and the ids around a text.
 *
 *     "<|im_start|>It's cafe\u0301"
 *      q3n__encode_text     <|im_start|>  is an added token: its id;  the rest is plain
 *      q3n__encode_plain    "It's caf\u00E9"                          NFC, where the model wants it
 *      q3n__encode_normal   added tokens that are searched after NFC
 *      q3n__encode_words    "It" | "'s" | " caf\u00E9"
 *      q3n__encode_short    each word's bytes, merged, become ids
 * ===================================================================================== */

/* ---- What one call of q3n_tokenize holds ---- */
typedef struct {
    const q3n__tokenizer *t;
    int                   no_special;   /* special tokens in the text are plain text */
    q3n__normalizer       nfc;
    q3n__buffer           work;         /* a long word */
    int32_t              *ids;          /* [max] */
    size_t                max, n;       /* n counts on beyond max */
} q3n__encoder;

/* An id that does not fit is counted all the same: the caller learns the room that it needs. */
static void q3n__emit(q3n__encoder *e, uint32_t id)
{
    if (e->n < e->max) e->ids[e->n] = (int32_t)id;
    e->n++;
}

static void q3n__emit_ids(q3n__encoder *e, const q3n__ids *ids)
{
    for (int i = 0; i < ids->n; i++) q3n__emit(e, (uint32_t)ids->id[i]);
}

/* ---- Words: the pre-tokenizer's pattern ----
 *
 *     (?i:'s|'t|'re|'ve|'m|'ll|'d) | [^\r\n\p{L}\p{N}]?\p{L}+ | \p{N} | ?[^\s\p{L}\p{N}]+[\r\n]*
 *     | \s*[\r\n]+ | \s+(?!\S) | \s+
 *
 * (the fourth alternative begins with an optional blank); the qwen3_5 pattern writes [\p{L}\p{M}]+
 * in the second and [^\s\p{L}\p{M}\p{N}]+ in the fourth.  The first alternative that matches wins,
 * and one of them does at every character.  In words, with what each makes of a text:
 *
 *     contraction         It|'s      also where a word goes on: 's|ilent
 *     letters             naive,  " naive"    one other character before them goes along, if it is
 *                                             neither a line end nor a number: a|(b|)
 *     one number          4|2
 *     others              " (",  ")!!\n\n"    after a blank; line ends after them go along
 *     white space         "  \n\n"            up to its last line end
 *                         "  "| end           else all but the last, which a word may take along
 *
 *     "It's 42, a   (b)!!\n\n  end"  ->  It 's ' ' 4 2 , ' a' '  ' ' (' b ')!!\n\n' ' ' ' end'
 *
 * Written out instead of run as an expression: no state but p, one look ahead, so that time is
 * linear in the text whatever it is. */

/* Bytes of the contraction at p, 0 if there is none. */
static int q3n__contraction(const uint8_t *p, const uint8_t *end)
{
    if (end - p < 2 || p[0] != '\'') return 0;
    const int a = p[1] | 0x20, b = end - p > 2 ? p[2] | 0x20 : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
    if (end - p > 2 && p[1] == 0xC5 && p[2] == 0xBF) return 3;   /* U+017F, a long s, folds to s */
    return 0;
}

/* The first character at p or after it that is in no class of mask; end at the latest. */
static const uint8_t *q3n__skip(const q3n__unicode *u, const uint8_t *p, const uint8_t *end,
                                uint32_t mask)
{
    for (;;) {
        const q3n__char c = q3n__char_at(u, p, end);
        if (!(c.mask & mask)) return p;
        p += c.bytes;
    }
}

/* End of the word that begins with white space: up to its last line end; else all of it but the
 * last character, which goes with the next word, if there is one. */
static const uint8_t *q3n__space_end(const q3n__unicode *u, const uint8_t *p, const uint8_t *end)
{
    const uint8_t *q = p, *last = p, *line_end = NULL;
    for (;;) {
        const q3n__char c = q3n__char_at(u, q, end);
        if (!(c.mask & Q3N__CLASS_SPACE)) break;
        last = q;
        q += c.bytes;
        if (q3n__is_line_end(c)) line_end = q;
    }
    if (line_end) return line_end;
    return q == end || last == p ? q : last;
}

/* End of the word at p < end; above p, so that callers move on.  The alternatives in their order;
 * the last three share one function, since what begins with white space is left to them. */
static const uint8_t *q3n__word_end(const q3n__tokenizer *t, const uint8_t *p, const uint8_t *end)
{
    const q3n__unicode *u = t->unicode;
    const int joins = t->pattern == Q3N__PATTERN_QWEN3_5;     /* marks go with letters */
    const uint32_t letters = Q3N__CLASS_LETTER | (joins ? Q3N__CLASS_MARK : 0);
    const uint32_t others = Q3N__CLASS_OTHER | (joins ? 0 : Q3N__CLASS_MARK);
    const int contraction = q3n__contraction(p, end);
    if (contraction) return p + contraction;

    const q3n__char c = q3n__char_at(u, p, end);
    const uint8_t *q = p + c.bytes;
    if (c.mask & letters) return q3n__skip(u, q, end, letters);
    if (c.mask & Q3N__CLASS_NUMBER) return q;

    const q3n__char next = q3n__char_at(u, q, end);
    if ((next.mask & letters) && !q3n__is_line_end(c))
        return q3n__skip(u, q + next.bytes, end, letters);
    if ((c.mask & others) || (c.cp == ' ' && (next.mask & others))) {
        q = q3n__skip(u, q, end, others);
        while (q < end && (*q == '\n' || *q == '\r')) q++;
        return q;
    }
    return q3n__space_end(u, p, end);
}

/* ---- Added tokens: found in the text before it is cut into words ----
 *
 * Sorted by text, so that those which agree in their first bytes are neighbours and a search is a
 * range that becomes narrower:     first['<'] .. first['=']     all that begin with '<'
 *                                  byte 1 '|', byte 2 'i' ...   the longest that ended on the way
 * The text of one token may begin another's: the longest match at the first place wins. */

typedef struct {
    const q3n__added *token;            /* NULL = none, then start = stop = end of the text */
    const uint8_t    *start, *stop;     /* with the white space that it takes along */
} q3n__match;

/* First of tokens [lo, hi), which agree in their first depth bytes, whose byte at depth is >= b. */
static uint32_t q3n__lower_bound(const q3n__added *tokens, uint32_t lo, uint32_t hi, size_t depth,
                                 unsigned b)
{
    while (lo < hi) {
        const uint32_t mid = lo + (hi - lo) / 2;
        if (tokens[mid].text[depth] < b) lo = mid + 1;
        else                             hi = mid;
    }
    return lo;
}

/* The longest token at p < end, NULL if none: narrow the sorted range byte by byte.  Those that end
 * at depth come first in the range (shorter is lower), so the rest has a byte there. */
static const q3n__added *q3n__added_at(const q3n__added_index *x, const uint8_t *p,
                                       const uint8_t *end)
{
    const q3n__added *best = NULL;
    uint32_t lo = x->first[*p], hi = x->first[*p + 1];
    for (size_t depth = 1; lo < hi; depth++) {
        if (x->tokens[lo].bytes == depth) best = &x->tokens[lo];
        while (lo < hi && x->tokens[lo].bytes == depth) lo++;
        if (p + depth == end) break;
        lo = q3n__lower_bound(x->tokens, lo, hi, depth, p[depth]);
        hi = q3n__lower_bound(x->tokens, lo, hi, depth, p[depth] + 1u);
    }
    return best;
}

/* \w of [HFT]'s regular expressions, for single_word; no character at end. */
static int q3n__is_word_char(const q3n__unicode *u, const uint8_t *p, const uint8_t *end)
{
    return (q3n__char_at(u, p, end).mask & Q3N__CLASS_WORD) != 0;
}

/* The next added token in [p, end) of a text that starts at begin.  A match that does not count (a
 * special token with no_special, a single_word beside a word character) is skipped whole: what
 * lies inside it is plain text.  lstrip reaches back to p at most, where the token before ended. */
static q3n__match q3n__next_added(const q3n__encoder *e, const q3n__added_index *x,
                                  const uint8_t *begin, const uint8_t *p, const uint8_t *end)
{
    const q3n__unicode *u = e->t->unicode;
    for (const uint8_t *s = p; s < end; s++) {
        if (x->first[*s] == x->first[*s + 1]) continue;
        const q3n__added *token = q3n__added_at(x, s, end);
        if (!token) continue;
        q3n__match m = { token, s, s + token->bytes };
        const int alone = (s == begin || !q3n__is_word_char(u, q3n__char_before(begin, s), s))
                       && !q3n__is_word_char(u, m.stop, end);
        if (((token->flags & Q3N__TOKEN_SPECIAL) && e->no_special)
            || ((token->flags & Q3N__TOKEN_SINGLE_WORD) && !alone)) {
            s = m.stop - 1;
            continue;
        }
        while ((token->flags & Q3N__TOKEN_LSTRIP) && m.start > p) {
            const uint8_t *before = q3n__char_before(p, m.start);
            if (!(q3n__char_at(u, before, m.start).mask & Q3N__CLASS_SPACE)) break;
            m.start = before;
        }
        if (token->flags & Q3N__TOKEN_RSTRIP) m.stop = q3n__skip(u, m.stop, end, Q3N__CLASS_SPACE);
        return m;
    }
    return (q3n__match){ NULL, end, end };
}

/* ---- Merges ----
 *
 * A word begins as the tokens of its bytes.  The neighbours with the lowest rank merge, the
 * leftmost of equals first, until no two neighbours have a merge.  "lower" with Qwen3's list (ranks
 * between):
 *
 *     l 129 o 107 w 640 e 5 r     ->     l 129 o 107 w 6310 er     ->     l 10047 ow 946 er
 *     l 14516 ower                ->     lower
 *
 * Words of up to 64 bytes look through all ranks after each merge; longer ones, which text made to
 * be slow has, use a heap: n log n. */

#define Q3N__SHORT_WORD 64

/* n <= Q3N__SHORT_WORD bytes: look for the best pair afresh after each merge.  `<` takes the
 * leftmost of equal ranks.  A merge changes two pairs only: with the token before and with the one
 * after. */
static void q3n__encode_short(q3n__encoder *e, const uint8_t *p, size_t n)
{
    const q3n__tokenizer *t = e->t;
    uint32_t id[Q3N__SHORT_WORD], rank[Q3N__SHORT_WORD];   /* rank of the pair (i, i + 1) */
    for (size_t i = 0; i < n; i++) id[i] = t->byte_id[p[i]];
    for (size_t i = 0; i + 1 < n; i++) rank[i] = q3n__pair_rank(t, id[i], id[i + 1]);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best]) best = i;
        if (rank[best] == Q3N__NO_RANK) break;
        id[best] = q3n__merge_result(t, rank[best]);
        n--;
        for (size_t i = best + 1; i < n; i++) {
            id[i] = id[i + 1];
            rank[i - 1] = rank[i];
        }
        if (best > 0) rank[best - 1] = q3n__pair_rank(t, id[best - 1], id[best]);
        if (best + 1 < n) rank[best] = q3n__pair_rank(t, id[best], id[best + 1]);
    }
    for (size_t i = 0; i < n; i++) q3n__emit(e, id[i]);
}

/* A long word is a linked list of tokens with a heap of its pairs, lowest rank and then leftmost
 * first: keys are rank << 32 | node, and one comparison orders both.  Pairs that a merge has undone
 * stay in the heap and are dropped when they come up, since the node has another rank by then; if
 * it has the same one again, the key is right again, for a rank belongs to one pair. */
typedef struct {
    uint32_t id;
    uint32_t rank;              /* of the pair with the next; Q3N__NO_RANK also if merged away */
    uint32_t prev, next;        /* next = n after the last */
} q3n__node;

/* A binary heap of keys, the lowest at heap[0]: restore it after heap[i] grew. */
static void q3n__heap_down(uint64_t *heap, size_t n, size_t i)
{
    const uint64_t x = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        child += child + 1 < n && heap[child + 1] < heap[child];
        if (x <= heap[child]) break;
        heap[i] = heap[child];
    }
    heap[i] = x;
}

/* The same after heap[i] was appended. */
static void q3n__heap_up(uint64_t *heap, size_t i)
{
    const uint64_t x = heap[i];
    for (; i > 0 && heap[(i - 1) / 2] > x; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = x;
}

/* Recompute the pair that begins at node i and put it into the heap of *n keys. */
static void q3n__pair_changed(const q3n__tokenizer *t, q3n__node *nodes, uint32_t i, uint64_t *heap,
                              size_t *n)
{
    nodes[i].rank = q3n__pair_rank(t, nodes[i].id, nodes[nodes[i].next].id);
    if (nodes[i].rank == Q3N__NO_RANK) return;
    heap[*n] = (uint64_t)nodes[i].rank << 32 | i;
    q3n__heap_up(heap, (*n)++);
}

/* Node i is the token that began at byte i of the word; a merge leaves it there and unlinks the
 * other.  Scratch is e->work, which later words use again.  Errors: Q3N_ERR_MEMORY. */
static q3n_result q3n__encode_long(q3n__encoder *e, const uint8_t *p, size_t bytes)
{
    /* n nodes, at most 2n keys: n - 1 at first, and each of n - 1 merges takes one and adds two */
    const size_t each = sizeof(q3n__node) + 2 * sizeof(uint64_t);
    size_t need;
    if (bytes >= UINT32_MAX || !q3n__mul_size(bytes, each, &need)) return Q3N_ERR_MEMORY;
    e->work.bytes = 0;
    if (!q3n__reserve(&e->work, need, e->nfc.allocator)) return Q3N_ERR_MEMORY;
    const q3n__tokenizer *t = e->t;
    const uint32_t n = (uint32_t)bytes;
    uint64_t *heap = (uint64_t *)(void *)e->work.data;
    q3n__node *nodes = (q3n__node *)(void *)(heap + 2 * (size_t)n);
    size_t n_heap = 0;

    for (uint32_t i = 0; i < n; i++) {
        nodes[i] = (q3n__node){ t->byte_id[p[i]], Q3N__NO_RANK, i - 1, i + 1 };
        if (i == 0) continue;
        nodes[i - 1].rank = q3n__pair_rank(t, nodes[i - 1].id, nodes[i].id);
        if (nodes[i - 1].rank != Q3N__NO_RANK)
            heap[n_heap++] = (uint64_t)nodes[i - 1].rank << 32 | (i - 1);
    }
    for (size_t i = n_heap / 2; i-- > 0;) q3n__heap_down(heap, n_heap, i);

    while (n_heap > 0) {
        const uint32_t i = (uint32_t)heap[0], rank = (uint32_t)(heap[0] >> 32);
        heap[0] = heap[--n_heap];
        q3n__heap_down(heap, n_heap, 0);
        /* An undone pair.  Else unite i with its neighbour, unlink that one, renew the pairs on
         * both sides. */
        if (nodes[i].rank != rank) continue;
        const uint32_t gone = nodes[i].next, next = nodes[gone].next;
        nodes[i].id = q3n__merge_result(t, rank);
        nodes[i].next = next;
        nodes[i].rank = nodes[gone].rank = Q3N__NO_RANK;
        if (next < n) {
            nodes[next].prev = i;
            q3n__pair_changed(t, nodes, i, heap, &n_heap);
        }
        if (i > 0) q3n__pair_changed(t, nodes, nodes[i].prev, heap, &n_heap);
    }
    for (uint32_t i = 0; i < n; i = nodes[i].next) q3n__emit(e, nodes[i].id);
    return Q3N_OK;
}

/* ---- Encoding ---- */

#define Q3N__TEXT_CHUNK 4096     /* bytes of text that are normalised at once, if a cut is found */

/* Where a chunk of about Q3N__TEXT_CHUNK bytes may end: before white space that follows something
 * else, or between a line end and something else.  No word of either pattern reaches across such a
 * place, and none looks across it:
 *
 *     word| next       white space begins a word here; none but a line end goes with what is before
 *     ...\n|next       a word that has a line end stops after its last one
 *
 * The character after the cut is stable: normalising the two sides apart gives the same text.  A
 * text without such a place goes whole. */
static const uint8_t *q3n__text_chunk_end(const q3n__unicode *u, const uint8_t *p,
                                          const uint8_t *end)
{
    if (end - p <= Q3N__TEXT_CHUNK) return end;
    p += Q3N__TEXT_CHUNK;
    while (p < end && (*p & 0xC0) == 0x80) p++;
    q3n__char before = q3n__char_at(u, p, end);
    while ((p += before.bytes) < end) {
        const q3n__char c = q3n__char_at(u, p, end);
        /* The two places of the comment above; what begins after the cut must be stable for NFC. */
        const int after_line = q3n__is_line_end(before) && !(c.mask & Q3N__CLASS_SPACE);
        const int after_word = !(before.mask & Q3N__CLASS_SPACE) && (c.mask & Q3N__CLASS_SPACE)
                            && !q3n__is_line_end(c);
        if ((after_line || after_word) && !(c.props & Q3N__UNSTABLE)) return p;
        before = c;
    }
    return end;
}

/* Cut [p, end) into words and encode each.  Both ends are places where a word may begin and end. */
static q3n_result q3n__encode_words(q3n__encoder *e, const uint8_t *p, const uint8_t *end)
{
    while (p < end) {
        const uint8_t *q = q3n__word_end(e->t, p, end);
        const size_t n = (size_t)(q - p);
        if (n <= Q3N__SHORT_WORD) q3n__encode_short(e, p, n);
        else if (q3n__encode_long(e, p, n) != Q3N_OK) return Q3N_ERR_MEMORY;
        p = q;
    }
    return Q3N_OK;
}

/* Text in NFC: cut out the added tokens that are searched there. */
static q3n_result q3n__encode_normal(q3n__encoder *e, const uint8_t *p, const uint8_t *end)
{
    const uint8_t *begin = p;
    if (e->t->normalized.first[256] == 0) return q3n__encode_words(e, p, end);
    while (p < end) {
        const q3n__match m = q3n__next_added(e, &e->t->normalized, begin, p, end);
        if (q3n__encode_words(e, p, m.start) != Q3N_OK) return Q3N_ERR_MEMORY;
        if (m.token) q3n__emit(e, m.token->id);
        p = m.stop;
    }
    return Q3N_OK;
}

/* Text without added tokens that are searched in the raw text: normalise what is not in NFC.  It
 * goes whole where an added token might lie across a cut. */
static q3n_result q3n__encode_plain(q3n__encoder *e, const uint8_t *p, const uint8_t *end)
{
    const q3n__tokenizer *t = e->t;
    /* Without NFC nothing is copied, so chunks would save no memory. */
    const int whole = !t->nfc || t->normalized.first[256] > 0;
    while (p < end) {
        const uint8_t *q = whole ? end : q3n__text_chunk_end(t->unicode, p, end);
        if (!t->nfc || q3n__find_unstable(t->unicode, p, q) == q) {
            if (q3n__encode_normal(e, p, q) != Q3N_OK) return Q3N_ERR_MEMORY;
        } else {
            q3n__buffer *out = &e->nfc.out;
            out->bytes = 0;
            if (!q3n__append_nfc(&e->nfc, p, q)
                || q3n__encode_normal(e, out->data, out->data + out->bytes) != Q3N_OK)
                return Q3N_ERR_MEMORY;
        }
        p = q;
    }
    return Q3N_OK;
}

/* The outermost step: cut out the added tokens of the raw text. */
static q3n_result q3n__encode_text(q3n__encoder *e, const uint8_t *p, const uint8_t *end)
{
    const uint8_t *begin = p;
    while (p < end) {
        const q3n__match m = q3n__next_added(e, &e->t->raw, begin, p, end);
        if (q3n__encode_plain(e, p, m.start) != Q3N_OK) return Q3N_ERR_MEMORY;
        if (m.token) q3n__emit(e, m.token->id);
        p = m.stop;
    }
    return Q3N_OK;
}

/* ---- Decoding ----
 *
 * Tokens are bytes, and a character may be spread over several: E2 82 | AC is the Euro sign.  What
 * is unfinished waits in q3n_detokenizer (up to 3 bytes) until the next token finishes it or shows
 * that it never will; text that was given out is valid UTF-8 at every moment. */

static const char q3n__replacement[] = "\xEF\xBF\xBD";    /* U+FFFD */

/* Bytes after the `at` that out has already; returns how many it has then. */
static size_t q3n__put(char *out, size_t at, const void *bytes, size_t n)   /* out NULL: count */
{
    if (out) memcpy(out + at, bytes, n);
    return at + n;
}

/* Add bytes to the text.  Returns what it writes to out (NULL = only count; the state moves on all
 * the same).  The longest part that could have become a character is replaced by one U+FFFD, as
 * Unicode 3.9 recommends and Python's errors="replace" does: E2 82 41 gives U+FFFD and "A". */
static size_t q3n__decode_bytes(q3n_detokenizer *dec, const uint8_t *p, size_t bytes, char *out)
{
    size_t n = 0;
    for (size_t i = 0; i < bytes; i++) {
        const uint8_t b = p[i];
        if (dec->n_pending > 0) {
            if (q3n__utf8_continues(dec->pending[0], dec->n_pending, b)) {
                dec->pending[dec->n_pending++] = b;
                if (dec->n_pending < q3n__utf8_bytes(dec->pending[0])) continue;
                n = q3n__put(out, n, dec->pending, (size_t)dec->n_pending);
                dec->n_pending = 0;
                continue;
            }
            n = q3n__put(out, n, q3n__replacement, 3);
            dec->n_pending = 0;
        }
        switch (q3n__utf8_bytes(b)) {
        case 0:  n = q3n__put(out, n, q3n__replacement, 3); break;
        case 1:  n = q3n__put(out, n, &b, 1); break;
        default: dec->pending[dec->n_pending++] = b;
        }
    }
    return n;
}

/* The bytes that id adds to the text.  0 = id lies outside the vocabulary. */
static int q3n__detokenizer_input(const q3n__tokenizer *t, const q3n_detokenizer *dec, int32_t id,
                              const uint8_t **text, size_t *bytes)
{
    if (id < 0 || (uint32_t)id >= t->vocab_size) return 0;
    *bytes = q3n__token_bytes(t, (uint32_t)id, text);
    if (*bytes && dec->skip_special && (t->flags[id] & Q3N__TOKEN_SPECIAL)) *bytes = 0;
    return 1;
}

/* ---- Public functions ---- */

Q3N_DEF int q3n_model_n_tokens(const q3n_model *m)
{
    return m && m->tokenizer ? (int)m->tokenizer->n_tokens : 0;
}

/* One encoder on the stack; it allocates for long words and for text that NFC changes only. */
Q3N_DEF q3n_result q3n_tokenize(const q3n_model *m, const char *text, size_t bytes, int flags,
                                int32_t *ids, size_t max, size_t *n)
{
    if (n) *n = 0;
    if (!m || !n || (!text && bytes) || (!ids && max)
        || (flags & ~(Q3N_TOKENIZE_NO_SPECIAL | Q3N_TOKENIZE_WHOLE))) return Q3N_ERR_ARG;
    if (!m->tokenizer) return Q3N_ERR_UNSUPPORTED;
    q3n__encoder e = { m->tokenizer, (flags & Q3N_TOKENIZE_NO_SPECIAL) != 0,
                       q3n__normalizer_begin(m->tokenizer->unicode, &m->allocator),
                       { NULL, 0, 0 }, ids, max, 0 };
    const uint8_t *p = (const uint8_t *)text;
    if (flags & Q3N_TOKENIZE_PREFIX) q3n__emit_ids(&e, &m->prefix);
    const q3n_result r = bytes ? q3n__encode_text(&e, p, p + bytes) : Q3N_OK;
    if (flags & Q3N_TOKENIZE_SUFFIX) q3n__emit_ids(&e, &m->suffix);
    q3n__normalizer_end(&e.nfc);
    q3n__free(&m->allocator, e.work.data);
    if (r != Q3N_OK) return r;
    *n = e.n;
    return e.n > max ? Q3N_ERR_FULL : Q3N_OK;
}

/* Bytes of the file, perhaps not whole characters and without a 0 after them. */
Q3N_DEF const char *q3n_token_text(const q3n_model *m, int32_t id, size_t *bytes)
{
    const uint8_t *text;
    if (bytes) *bytes = 0;
    if (!m || !bytes) return NULL;
    if (m->tokenizer && id >= 0) *bytes = q3n__token_bytes(m->tokenizer, (uint32_t)id, &text);
    return *bytes ? (const char *)text : NULL;
}

Q3N_DEF int q3n_token_is_special(const q3n_model *m, int32_t id)
{
    return id >= 0 && id < q3n_model_n_tokens(m) && (m->tokenizer->flags[id] & Q3N__TOKEN_SPECIAL);
}

/* A trial on a copy counts first: if out is too small, dec is as before and the id can be given
 * again. */
Q3N_DEF q3n_result q3n_detokenizer_next(q3n_detokenizer *dec, const q3n_model *m, int32_t id,
                                        char *out, size_t max, size_t *n)
{
    const uint8_t *text;
    size_t bytes;
    if (n) *n = 0;
    if (!dec || !m || !n || (!out && max) || dec->n_pending < 0 || dec->n_pending > 3)
        return Q3N_ERR_ARG;
    if (!m->tokenizer) return Q3N_ERR_UNSUPPORTED;
    if (!q3n__detokenizer_input(m->tokenizer, dec, id, &text, &bytes)) return Q3N_ERR_ARG;
    q3n_detokenizer trial = *dec;
    *n = q3n__decode_bytes(&trial, text, bytes, NULL);
    if (*n > max) return Q3N_ERR_FULL;
    q3n__decode_bytes(dec, text, bytes, out);
    return Q3N_OK;
}

/* An unfinished character at the end of the text is one U+FFFD. */
Q3N_DEF void q3n_detokenizer_finish(q3n_detokenizer *dec, char *out, size_t *n)
{
    if (n) *n = 0;
    if (!dec || !out || !n) return;
    *n = dec->n_pending > 0 ? 3 : 0;
    if (*n) memcpy(out, q3n__replacement, 3);
    dec->n_pending = 0;
}

/* Twice over the ids, counting and then writing: out is not touched if it is too small. */
Q3N_DEF q3n_result q3n_detokenize(const q3n_model *m, const int32_t *ids, size_t n_ids,
                                  char *out, size_t max, size_t *n)
{
    if (n) *n = 0;
    if (!m || !n || (!ids && n_ids) || (!out && max)) return Q3N_ERR_ARG;
    if (!m->tokenizer) return Q3N_ERR_UNSUPPORTED;
    for (int writing = 0; writing < 2; writing++) {
        q3n_detokenizer dec = { { 0 }, 0, 0 };
        size_t total = 0;
        for (size_t i = 0; i < n_ids; i++) {
            const uint8_t *text;
            size_t bytes;
            if (!q3n__detokenizer_input(m->tokenizer, &dec, ids[i], &text, &bytes)) {
                *n = 0;
                return Q3N_ERR_ARG;
            }
            total += q3n__decode_bytes(&dec, text, bytes, writing ? out + total : NULL);
        }
        if (dec.n_pending) total = q3n__put(writing ? out : NULL, total, q3n__replacement, 3);
        *n = total;
        if (total == 0) return Q3N_OK;
        if (total > max) return Q3N_ERR_FULL;
    }
    return Q3N_OK;
}

/* =====================================================================================
 * [17] OPS                                                                      >>ops
 *
 * Portable drivers over the kernel table: linear layers, rotary embedding, the merge of partial
 * softmaxes.  Each is one parallel region or less.  They know shapes and items of work, not the
 * model's layers, and no session.  Later code may assume that an output element has the same bits
 * however its rows and tokens are cut into ranges and tiles, and for any number of threads.
 * ===================================================================================== */

/* ---- Linear layers: y = x W' (+ bias) ---- */

/* W is [n_rows, n_cols], as a PyTorch Linear stores it.  Layers that read the same x (q, k and v;
 * qkvz and ba; router and shared gate) go into one parallel region as jobs, whose rows are cut into
 * items that are numbered through:
 *
 *     job 0, 100 rows      job 1, 40 rows          rows_per_item 32
 *     [ 0 | 1 | 2 | 3 ]    [ 4 | 5 ]               first_item = 0, 4, 6
 *
 * A range of items may begin in one job and end in a later one. */
typedef struct {
    const q3n__mat *w;
    const float    *bias;        /* [n_rows] or NULL                                             */
    const float    *x;           /* [n, n_cols], rows x_stride apart                             */
    const q3n__x8  *xq;          /* the same quantised, if a matrix of the model is              */
    float          *y;           /* [n, n_rows], rows y_stride apart                             */
    int             x_stride, y_stride;
} q3n__linear;

#define Q3N__MAX_LINEARS 4

typedef struct {
    const q3n__kernels *k;
    const q3n__linear  *job;
    int                 n_jobs, n;
    int                 rows_per_item;
    int first_item[Q3N__MAX_LINEARS + 1];  /* of each job, and their number                      */
} q3n__linear_arg;

/* Tokens and rows of one kernel call in a long pass: 48 tokens of 2048 floats (384 KiB) and 64 rows
 * of bf16 (256 KiB) fit a 1 MiB second-level cache together.  Rows are a multiple of the 16 of a
 * quantised tile. */
#define Q3N__CALL_TOKENS 48
#define Q3N__CALL_ROWS   64

/* whole, cut into calls that fit the cache.  Rows are the outer loop: weights, of which there are
 * more than any cache holds, are read from memory once, and the tokens' inputs again for every 64
 * rows.  In decode the tokens of all calls are the same, and this walks over the rows. */
static void q3n__matmul_calls(const q3n__kernels *k, q3n_type type, const q3n__matmul *whole)
{
    q3n__matmul m = *whole;
    for (int r = whole->row0; r < whole->row1; r += Q3N__CALL_ROWS) {
        m.row0 = r;
        m.row1 = r + Q3N__CALL_ROWS < whole->row1 ? r + Q3N__CALL_ROWS : whole->row1;
        for (int t = 0; t < whole->n; t += Q3N__CALL_TOKENS) {
            m.n = whole->n - t < Q3N__CALL_TOKENS ? whole->n - t : Q3N__CALL_TOKENS;
            m.y = whole->y + (size_t)t * (size_t)whole->y_stride;
            if (whole->x_rows) {
                m.x_rows = whole->x_rows + t;
            } else if (q3n__is_quantised(type)) {
                m.xq = whole->xq + (size_t)t * (size_t)q3n__x8_blocks(whole->n_cols);
            } else {
                m.x = whole->x + (size_t)t * (size_t)whole->x_stride;
            }
            k->matmul[type](&m);
        }
    }
}

/* An item is a multiple of 16 rows, as quantised matrices want it; only the last of a matrix may be
 * shorter. */
static void q3n__linear_task(void *arg, int begin, int end)
{
    const q3n__linear_arg *a = (const q3n__linear_arg *)arg;
    for (int i = 0; i < a->n_jobs; i++) {
        const int i0 = begin > a->first_item[i] ? begin : a->first_item[i];
        const int i1 = end < a->first_item[i + 1] ? end : a->first_item[i + 1];
        if (i0 >= i1) continue;
        const q3n__linear *j = &a->job[i];
        const int row1 = (i1 - a->first_item[i]) * a->rows_per_item;
        const q3n__matmul m = {
            .w = j->w->data, .x = j->x, .xq = j->xq, .bias = j->bias, .y = j->y,
            .x_stride = j->x_stride, .y_stride = j->y_stride, .n = a->n, .n_cols = j->w->n_cols,
            .row0 = (i0 - a->first_item[i]) * a->rows_per_item,
            .row1 = row1 < j->w->n_rows ? row1 : j->w->n_rows,
        };
        q3n__matmul_calls(a->k, j->w->type, &m);
    }
}

/* Multiply-adds below which a range costs more to hand out than to do: about 2 microseconds
 * of one core, as long as waking a spinning thread and waiting for it. */
#define Q3N__RANGE_WORK 32768

/* Rows of one range: enough ranges for every thread, none smaller than Q3N__RANGE_WORK for n
 * tokens, a multiple of 32: kernels of AVX-512 VNNI take two tiles of 16 rows at once. */
static int q3n__rows_per_item(const q3n__pool *p, int64_t n_rows, int n_cols, int n)
{
    const int64_t row_work = (int64_t)n_cols * (n > 0 ? n : 1);
    const int min = (int)((Q3N__RANGE_WORK + row_work - 1) / row_work);
    const int64_t wanted = n_rows / (p->n_threads * 4);
    int rows = wanted > 256 ? 256 : (int)wanted;
    if (rows < min) rows = min;
    return (rows + 31) / 32 * 32;
}

/* All jobs in one parallel region, n tokens each. */
static void q3n__linear_all(q3n__pool *p, const q3n__kernels *k, const q3n__linear *jobs,
                            int n_jobs, int n)
{
    q3n__linear_arg a = { .k = k, .job = jobs, .n_jobs = n_jobs, .n = n };
    int rows = 0;
    for (int i = 0; i < n_jobs; i++) rows += jobs[i].w->n_rows;
    a.rows_per_item = q3n__rows_per_item(p, rows, jobs[0].w->n_cols, n);
    for (int i = 0; i < n_jobs; i++)
        a.first_item[i + 1] = a.first_item[i]
                               + (jobs[i].w->n_rows + a.rows_per_item - 1) / a.rows_per_item;
    q3n__parallel(p, a.first_item[n_jobs], 1, q3n__linear_task, &a);
}

/* 0 and 1 for -inf and +inf, without NaN: expf may be infinite. */
static float q3n__sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* ---- Rotary position embedding ---- */

/* cos and sin [R / 2] at a position, R = rotary_dim ([HF] Qwen3NextRotaryEmbedding; [YaRN]):
 *
 *     angle_j = position theta^(-2j / R)        j = 0 .. R / 2 - 1; scaled types: m->inv_freq
 *
 * cos and sin are multiplied by the attention factor rope_scale, 1 without YaRN.  Angles in double:
 * at position 200,000 a float angle is off by 0.01.  Tables of the model replace the formula where
 * its file has them; they have D / 2 columns, of which the first R / 2 are used. */
static void q3n__rope_at(const q3n_model *m, int position, float *cosines, float *sines)
{
    const int half = m->config.rotary_dim / 2;
    if (m->config.rope_type == Q3N_ROPE_TABLE) {
        const size_t row = (size_t)position * (size_t)(m->config.head_dim / 2);
        memcpy(cosines, m->weights.rope_cos + row, (size_t)half * sizeof *cosines);
        memcpy(sines, m->weights.rope_sin + row, (size_t)half * sizeof *sines);
        return;
    }
    for (int j = 0; j < half; j++) {
        const double angle = position * m->inv_freq[j];
        cosines[j] = (float)(cos(angle) * m->rope_scale);
        sines[j]   = (float)(sin(angle) * m->rope_scale);
    }
}

/* Rotate pairs (j, j + R/2) of one head, half = R / 2 ([HF] apply_rotary_pos_emb):
 *
 *     x_j          <- x_j cos_j - x_{j+R/2} sin_j
 *     x_{j + R/2}  <- x_{j+R/2} cos_j + x_j sin_j       elements from R on stay */
static void q3n__rope_rotate(float *x, const float *cosines, const float *sines, int half)
{
    for (int j = 0; j < half; j++) {
        const float a = x[j], b = x[j + half];
        x[j]        = a * cosines[j] - b * sines[j];
        x[j + half] = b * cosines[j] + a * sines[j];
    }
}

/* ---- Attention over blocks: merging partial softmaxes ----
 *
 * A block gives (m, l, o), relative to its own maximum (see q3n__attend).  What is known of all
 * blocks so far is (M, L, O), and one more changes it to ([FA] algorithm 1)
 *
 *     M' = max(M, m)
 *     L' = L e^(M - M') + l e^(m - M')
 *     O' = O e^(M - M') + o e^(m - M')              at the end: softmax(q k') v = O / L
 *
 * Empty is (-FLT_MAX, 0, 0): merging into it multiplies by 0 and 1 and leaves the bits of the
 * block.  f32 rounds, so the order counts: it is by rising block, everywhere. */
typedef struct { float m, l; } q3n__softmax_partial;

/* Merge one block's part and o [dim] into sum and O [dim]; a part without keys changes nothing. */
static void q3n__attend_merge(q3n__softmax_partial *sum, float *O, q3n__softmax_partial part,
                              const float *o, int dim)
{
    if (part.l == 0.0f) return;
    const float m = sum->m > part.m ? sum->m : part.m;
    const float a = sum->l == 0.0f ? 0.0f : expf(sum->m - m), b = expf(part.m - m);
    sum->l = sum->l * a + part.l * b;
    sum->m = m;
    for (int i = 0; i < dim; i++) O[i] = O[i] * a + o[i] * b;
}

/* =====================================================================================
 * [18] PASS                                                                    >>pass
 *
 * What a pass over the layers works with: the sessions' states, activations, and the small steps
 * that go over all rows.  One path serves one token and five hundred, of one session or of several:
 * a pass is a list of token rows, cut into segments of one session each.
 *
 *     row        0    1    2    3    4    5    6      n = 7, three segments
 *     session    A    A    A    B    C    C    C
 *     position  40   41   42    7    0    1    2      their states' lengths are 40, 7, 0
 *
 * Prefill is one segment of many rows, decode one of a single row, verifying drafts one of a token
 * and its drafts; a batch mixes them.  Norms and matrices see only rows; positions, mixers and
 * counts of experts ask which segment a row belongs to.  A row's numbers depend on its own
 * session's text and on nothing else in the pass: batches, drafts and cuts of a text change no bit.
 *
 * Knows the shapes of states, not who owns them: sessions point them at their memory before a pass
 * and decide after it whether they count.
 * ===================================================================================== */

/* ---- Pending rows of DeltaNet ----
 *
 * Between calls a session's matrices may lack the tokens of the last call.  What these do to a
 * matrix (u, beta and g of each: its pending rows) is kept beside it, and the next pass applies it.
 *
 * Reading and writing the matrices is most of what a decoded token costs in DeltaNet.  A lazy pass,
 * one of few tokens, reads them, applies the pending rows and stores that, in place; the states
 * after its own tokens it uses and does not store.  That takes no more traffic than storing at
 * once, and until the next pass its tokens can be taken back, all or the last of them (cancelled
 * calls, rejected drafts).  A second copy of the matrices, one to read and one to write, took 12
 * microseconds a head from memory in place of 6.
 *
 *     text       t0 .. t9  | t10 t11 t12 | t13         the last call evaluated t10 .. t12,
 *     delta      after t9                               this one evaluates t13
 *     u[now]                 rows 10 11 12              n = 3 pending rows from `first` on
 *     u[!now]                rows 10 11 12   13         made by this pass; its first n are copies
 *
 * The pass stores the state after t12 and leaves row 13 pending.
 *
 *                between calls          during a lazy pass        committed      taken back
 *     now        u[now] has the rows    the pass fills u[!now]    now = !now     as it was
 *     first, n   0 and 3                0 and 3                   3 and 1        0 and 3
 *     delta      after t9               layer by layer after t12  after t12      after t9 or t12
 *     applied    0 in all layers        1 once a layer is done    0              1 where after t12
 *
 * After what was taken back q3n__flush does the layers that are not applied, before the next call:
 * that changes no text.  A call of many tokens applies the pending rows in place too, then writes
 * the state after its own ones to delta_out, and leaves none pending. */
typedef struct {
    float *u[2];                 /* [layer][max, C] q, k, v                                      */
    float *ba[2];                /* [layer][max, 2 Hv] beta, g                                   */
    float *x;                    /* [layer][max, C] this pass's input of the convolution         */
    unsigned char *applied;      /* [layer] 1 = its matrices hold the pending rows               */
    int    now;                  /* 0 or 1: where the pending rows are                           */
    int    first, n;             /* they are rows [first, first + n)                             */
    int    max;                  /* rows that each array has room for                            */
} q3n__pending;

/* What a session, and an engine, is doing.  A request to cancel turns RUNNING into CANCELLED and
 * nothing else, and every call ends at IDLE: no request outlives the call that it meant. */
enum { Q3N__IDLE, Q3N__RUNNING, Q3N__CANCELLED };

static int q3n__cancel(q3n__atomic *a)      /* 1 = that stops a call */
{
    return q3n__atomic_cas(a, Q3N__RUNNING, Q3N__CANCELLED);
}

static int q3n__is_cancelled(q3n__atomic *a) { return q3n__atomic_load(a) == Q3N__CANCELLED; }

static int q3n__leave(q3n__atomic *a)       /* the call ends; 1 = it was cancelled */
{
    if (q3n__atomic_cas(a, Q3N__RUNNING, Q3N__IDLE)) return 0;
    const int cancelled = q3n__is_cancelled(a);
    q3n__atomic_store(a, Q3N__IDLE);
    return cancelled;
}

/* State of one session that the layers read and write.  What a call began with stays until it
 * commits: its first pass reads matrices and columns in one place and writes them in another, later
 * ones work in the second.  Pages are written only in slots from `length` on. */
typedef struct {
    q3n__kv_cache kv;
    float        *delta;         /* [DeltaNet layer][Hv][dk, dv] after all but n_pending tokens  */
    float        *delta_out;     /* after this pass, unless that is lazy; may be delta           */
    const float  *conv;          /* [DeltaNet layer][width - 1, C]                               */
    float        *conv_out;      /* after this pass; may be conv                                 */
    q3n__pending  pending;
    int           lazy;          /* 1 = this pass leaves its tokens pending                      */
    int           n_pending;     /* pending rows that this pass applies: pending.n in the first
                                    of a call, 0 in the others, which find none left             */
    q3n__atomic  *cancel;        /* Q3N__CANCELLED: stop after the layer under way               */
    int           length;        /* tokens before this pass                                      */
    int           kv_valid;      /* tokens whose keys and values the pages hold already          */
    int64_t      *expert_counts; /* [layer][E] or NULL                                           */
} q3n__state;

/* Rows [row0, row0 + n) of a pass: the next n tokens of one session. */
typedef struct {
    q3n__state *state;
    int         row0, n;
} q3n__segment;

/* One feed-forward network applied to some rows: an expert, the shared expert or a dense FFN.
 * gate, up [I, d], down [d, I]; all FFNs of a layer have the same d, the shared one may have
 * another I. */
typedef struct {
    q3n__mat     gate, up, down; /* of one expert: data points at its slice                      */
    const float *gate_bias, *up_bias, *down_bias;
    const int   *rows;           /* [n] rows of the pass, ascending; NULL = all                  */
    const float *weight;         /* [n] factor of each row's output; NULL = 1                    */
    size_t       first;          /* its rows of r->ffn_gate and r->ffn_up begin here             */
    size_t       first_q;        /* its blocks of r->ffn_q begin here                            */
    int          n;
    int          first_block;    /* its items begin here                                         */
} q3n__ffn;

/* Activations of a pass of at most `max` tokens; [max, width] each unless said otherwise.  Arrays
 * are disjoint.  From layer to layer go x, and cos and sin of the rows; all others are scratch of
 * one mixer or FFN. */
typedef struct {
    const q3n_model   *model;
    const q3n__kernels *k;
    q3n__pool         *pool;
    const q3n__segment *segments;
    int    n_segments, n;
    float *x;                    /* [d] residual stream                                          */
    float *a, *b;                /* [d] input and output of a mixer or FFN                       */
    q3n__x8 *a_q;                /* a, quantised; this and the two below: NULL if no matrix is   */
    float *proj;                 /* [Q] or [QKVZ]                                                */
    float *key, *value;          /* [K D]                                                        */
    float *q;                    /* [K][n][H / K, D]: queries of a kv head together              */
    float *attn;                 /* the same for the attention's output                          */
    float *rope_cos, *rope_sin;  /* [R / 2]                                                      */
    float *u;                    /* [C] after the convolution: q, k, v                           */
    float *ba;                   /* [2 Hv]: b, a; then beta, g                                   */
    float *mixed;                /* [H D] or [Hv dv]: input of the last projection               */
    q3n__x8 *mixed_q;
    float *partial_o;            /* split attention: [queries][blocks][D]                        */
    q3n__softmax_partial *partial;   /* split attention: [queries][blocks]                       */
    int    partial_blocks;       /* blocks that both have room for                               */
    float *router;               /* [E] probabilities                                            */
    int   *top;                  /* [k] experts, ascending                                       */
    float *top_weight;           /* [k]                                                          */
    int   *expert_row;           /* [max k] rows by expert                                       */
    float *expert_weight;        /* [max k]                                                      */
    int   *expert_first;         /* [E + 1]                                                      */
    float *shared_weight;        /* [1]                                                          */
    q3n__ffn *ffn;               /* [E + 1] jobs of this layer                                   */
    float *ffn_gate, *ffn_up;    /* [max (k + 1)] rows of the widest FFN                         */
    q3n__x8 *ffn_q;              /* ffn_up, quantised                                            */
    float *mtp_in;               /* [2 d] input of the MTP module; NULL if there is none         */
    q3n__x8 *mtp_in_q;
    q3n__atomic *cancel;         /* Q3N__CANCELLED: stop after the layer under way               */
    int    max;
} q3n__pass;

/* ---- Small steps over all rows ----
 *
 * Items are rows, 8 or more to a range.  Whoever writes the input of a quantised matrix also writes
 * its bytes (q3n__quantize_row), while the row is in the cache: once for all matrices that read
 * it. */
typedef struct {
    const q3n__pass *r;
    float          *y;
    q3n__x8        *q;
    const float    *x, *w;
    int             dim;
} q3n__rows_arg;

/* Row t of x [.., dim] to its blocks of q; nothing if no matrix of the model is quantised. */
static void q3n__quantize_row(const q3n__pass *r, q3n__x8 *q, const float *x, int t, int dim)
{
    if (q) r->k->quantize_x(q + (size_t)t * (size_t)q3n__x8_blocks(dim),
                            x + (size_t)t * (size_t)dim, dim);
}

static void q3n__rms_norm_task(void *arg, int begin, int end)
{
    const q3n__rows_arg *j = (const q3n__rows_arg *)arg;
    for (int t = begin; t < end; t++) {
        j->r->k->rms_norm(j->y + (size_t)t * (size_t)j->dim, j->x + (size_t)t * (size_t)j->dim,
                          j->w, j->dim, (float)j->r->model->config.rms_norm_eps);
        q3n__quantize_row(j->r, j->q, j->y, t, j->dim);
    }
}

/* r->a = norm(r->x), and quantised */
static void q3n__rms_norm(const q3n__pass *r, const float *w)
{
    q3n__rows_arg arg = { r, r->a, r->a_q, r->x, w, r->model->config.hidden_size };
    q3n__parallel(r->pool, r->n, 8, q3n__rms_norm_task, &arg);
}

static void q3n__quantize_task(void *arg, int begin, int end)
{
    const q3n__rows_arg *j = (const q3n__rows_arg *)arg;
    for (int t = begin; t < end; t++) q3n__quantize_row(j->r, j->q, j->x, t, j->dim);
}

/* The first n rows of x [.., dim] to q, for inputs that no step of a pass wrote. */
static void q3n__quantize_rows(const q3n__pass *r, q3n__x8 *q, const float *x, int n, int dim)
{
    q3n__rows_arg arg = { r, NULL, q, x, NULL, dim };
    q3n__parallel(r->pool, n, 8, q3n__quantize_task, &arg);
}

static void q3n__add_task(void *arg, int begin, int end)
{
    const q3n__rows_arg *j = (const q3n__rows_arg *)arg;
    const size_t at = (size_t)begin * (size_t)j->dim;
    for (int t = begin; t < end; t++)
        j->r->k->axpy(j->y + at + (size_t)(t - begin) * (size_t)j->dim, 1.0f,
                      j->x + at + (size_t)(t - begin) * (size_t)j->dim, j->dim);
}

/* y += x for all rows [n, d]: the residual connection. */
static void q3n__add(const q3n__pass *r, float *y, const float *x)
{
    q3n__rows_arg arg = { r, y, NULL, x, NULL, r->model->config.hidden_size };
    q3n__parallel(r->pool, r->n, 8, q3n__add_task, &arg);
}

/* The segment of row t; position in the text is the segment's length + t - row0.  Segments are few
 * and in order of rows. */
static const q3n__segment *q3n__segment_of(const q3n__pass *r, int t)
{
    int i = 0;
    while (t >= r->segments[i].row0 + r->segments[i].n) i++;
    return &r->segments[i];
}

static int q3n__position(const q3n__pass *r, int t)
{
    const q3n__segment *s = q3n__segment_of(r, t);
    return s->state->length + t - s->row0;
}

typedef struct {
    const q3n__pass *r;
    const int32_t  *tokens;
} q3n__embed_arg;

/* A token's embedding to x [d], and cos and sin of the position of row t: these are the same for
 * all heads and layers, so they are made once for a pass. */
static void q3n__embed_row(const q3n__pass *r, int32_t token, int t, float *x)
{
    const q3n__mat *w = &r->model->weights.embed_tokens;
    const size_t half = (size_t)r->model->config.rotary_dim / 2;
    if (q3n__is_quantised(w->type))
        q3n__dequantize_row(w->type, x, w->data, token, w->n_cols);
    else
        r->k->to_f32[w->type](x, w->data + (size_t)token * q3n__row_bytes(w->type, w->n_cols),
                              w->n_cols);
    q3n__rope_at(r->model, q3n__position(r, t), r->rope_cos + (size_t)t * half,
                 r->rope_sin + (size_t)t * half);
}

static void q3n__embed_task(void *arg, int begin, int end)
{
    const q3n__embed_arg *j = (const q3n__embed_arg *)arg;
    const size_t d = (size_t)j->r->model->config.hidden_size;
    float *x = j->r->x;
    for (int t = begin; t < end; t++) q3n__embed_row(j->r, j->tokens[t], t, x + (size_t)t * d);
}

/* r->x = rows of the embedding, for tokens [n]; 0 <= id < vocab was checked before. */
static void q3n__embed(const q3n__pass *r, const int32_t *tokens)
{
    q3n__embed_arg arg = { r, tokens };
    q3n__parallel(r->pool, r->n, 8, q3n__embed_task, &arg);
}

/* =====================================================================================
 * [19] ATTENTION                                                          >>attention
 *
 * Grouped-query attention over pages of keys and values (q3n__attention, at the end).  g = H / K
 * query heads share a kv head, so their queries lie together and read each key and value once:
 *
 *     r->proj    [n, H, D] or [n, H, 2 D]    query, or query and gate, head by head
 *     r->q       [K, n, g, D]                queries by kv head, normed, rotated, / sqrt(D)
 *     r->attn    [K, n, g, D]                outputs
 *     r->mixed   [n, H, D]                   by token again, gated: input of o_proj
 *
 * A block of 256 keys gives a partial softmax (OPS); two ways lead to their sum, of the same bits:
 *
 *     many queries: one item is a tile of queries of one kv head
 *         block 0, 1, ... last: partial, merged at once
 *     few queries, long text: one item is a tile of queries and one block
 *         partials to r->partial and r->partial_o; then, one item a query, merged from block 0 on
 *
 * With one token there are K tiles (2 in the 80B), fewer than threads: the blocks are what is left
 * to share out.  Knows pages by q3n__kv_block alone and writes none but the slots of its own rows.
 * ===================================================================================== */
typedef struct {
    const q3n__pass   *r;
    const q3n__layer *w;
    int               layer;         /* number among the attention layers                        */
    int               n_tiles;       /* of all segments, for one kv head                         */
    int               n_blocks;      /* split attention: blocks of the longest segment           */
} q3n__attention_arg;

/* Items are rows: norm and rotate the heads of q and k, scale q, lay q out by kv head, store k and
 * v.  The region ends before the first query is answered: rows of a pass see one another's keys.
 * Below kv_valid the pages have them already, and may be shared: they are not written again. */
static void q3n__attention_prepare_task(void *arg, int begin, int end)
{
    const q3n__attention_arg *j = (const q3n__attention_arg *)arg;
    const q3n__pass *r = j->r;
    const q3n_config *c = &r->model->config;
    const int D = c->head_dim, H = c->num_attention_heads, K = c->num_key_value_heads, g = H / K;
    const int half = c->rotary_dim / 2, q_step = c->attn_output_gate ? 2 * D : D;
    const float eps = (float)c->rms_norm_eps, scale = 1.0f / sqrtf((float)D);
    for (int t = begin; t < end; t++) {
        const q3n__segment *s = q3n__segment_of(r, t);
        const int position = s->state->length + t - s->row0;
        const float *cosines = r->rope_cos + (size_t)t * (size_t)half;
        const float *sines = r->rope_sin + (size_t)t * (size_t)half;
        for (int h = 0; h < H; h++) {
            const float *from = r->proj + ((size_t)t * (size_t)H + (size_t)h) * (size_t)q_step;
            float *q = r->q + (((size_t)(h / g) * (size_t)r->n + (size_t)t) * (size_t)g
                               + (size_t)(h % g)) * (size_t)D;
            if (j->w->q_norm) r->k->rms_norm(q, from, j->w->q_norm, D, eps);
            else              memcpy(q, from, (size_t)D * sizeof *q);
            q3n__rope_rotate(q, cosines, sines, half);
            for (int i = 0; i < D; i++) q[i] *= scale;
        }
        for (int h = 0; h < K; h++) {
            float *key = r->key + ((size_t)t * (size_t)K + (size_t)h) * (size_t)D;
            const float *value = r->value + ((size_t)t * (size_t)K + (size_t)h) * (size_t)D;
            if (j->w->k_norm) r->k->rms_norm(key, key, j->w->k_norm, D, eps);
            q3n__rope_rotate(key, cosines, sines, half);
            if (position < s->state->kv_valid) continue;
            const q3n__kv_cache *kv = &s->state->kv;
            uint8_t *k = q3n__kv_block(kv, j->layer, position / Q3N__KV_BLOCK, h);
            uint8_t *v = k + q3n__kv_side_bytes(kv->type, D);
            const size_t scales = q3n__kv_scales_at(kv->type, D);
            const q3n__store_kv store = {
                .k = k, .v = v, .k_scale = (float *)(void *)(k + scales),
                .v_scale = (float *)(void *)(v + scales), .key = key, .value = value,
                .slot = position % Q3N__KV_BLOCK, .dim = D,
            };
            r->k->store_kv[kv->type](&store);
        }
    }
}

/* Queries of one kv head that are answered together: enough to share each load of keys and values,
 * few enough for scores, which are on the stack (32 x 256 floats, 32 KiB: most of what a thread
 * needs), and outputs, 8192 floats, to stay near the core.  Heads of up to 256 have 32 queries. */
#define Q3N__QUERY_TILE   32
#define Q3N__TILE_OUTPUTS 8192

typedef struct {
    const q3n__segment *s;
    int                 head;        /* kv head                                                  */
    int                 first, n;    /* queries of r->q, counted within the kv head              */
} q3n__tile;

static int q3n__query_tile(const q3n_config *c)
{
    const int n = Q3N__TILE_OUTPUTS / c->head_dim;
    return n < Q3N__QUERY_TILE ? n : Q3N__QUERY_TILE;
}

/* Tile i of the pass's tiles of one kv head: those of segment 0, then of 1, and so on.  A tile has
 * queries of one segment, for others have other pages; (token, head) pairs are numbered t g + h. */
static q3n__tile q3n__tile_get(const q3n__pass *r, int i, int head)
{
    const q3n_config *c = &r->model->config;
    const int g = c->num_attention_heads / c->num_key_value_heads, size = q3n__query_tile(c);
    const q3n__segment *s = r->segments;
    for (;; s++) {
        const int tiles = (s->n * g + size - 1) / size;
        if (i < tiles) break;
        i -= tiles;
    }
    const int left = s->n * g - i * size;
    return (q3n__tile){ s, head, s->row0 * g + i * size, left < size ? left : size };
}

/* Keys that query i of the tile may see: those of its own and earlier tokens, or all.  Its token is
 * row (first + i) / g; the count is that token's position + 1. */
static int q3n__n_visible(const q3n__pass *r, const q3n__tile *tile, int i)
{
    const q3n_config *c = &r->model->config;
    const q3n__segment *s = tile->s;
    if (!c->causal) return s->state->length + s->n;
    const int g = c->num_attention_heads / c->num_key_value_heads;
    return s->state->length + (tile->first + i) / g - s->row0 + 1;
}

/* A tile against one block: partial [n], o [n, D] with rows o_stride floats apart.  Keys of the
 * first kv.skip positions do not exist (MTP): pointers begin after them and the counts are lower,
 * so kernels know nothing of it.  A query that sees nothing of the block gets l = 0. */
static void q3n__attend_block(const q3n__attention_arg *j, const q3n__tile *tile, int block,
                              q3n__softmax_partial *partial, float *o, int o_stride)
{
    const q3n__pass *r = j->r;
    const q3n__kv_cache *kv = &tile->s->state->kv;
    const int g = r->model->config.num_attention_heads / kv->n_kv_heads, D = kv->dim;
    float scores[Q3N__QUERY_TILE * Q3N__KV_BLOCK], m[Q3N__QUERY_TILE], l[Q3N__QUERY_TILE];
    int n_keys[Q3N__QUERY_TILE];
    int skip = kv->skip - block * Q3N__KV_BLOCK;
    skip = skip < 0 ? 0 : skip;
    if (skip >= Q3N__KV_BLOCK) {                         /* the page may have no such layer */
        for (int i = 0; i < tile->n; i++) partial[i] = (q3n__softmax_partial){ -FLT_MAX, 0.0f };
        return;
    }
    for (int i = 0; i < tile->n; i++) {
        const int n = q3n__n_visible(r, tile, i) - block * Q3N__KV_BLOCK;
        n_keys[i] = n < skip ? 0 : (n > Q3N__KV_BLOCK ? Q3N__KV_BLOCK : n) - skip;
    }
    const uint8_t *keys = q3n__kv_block(kv, j->layer, block, tile->head);
    const size_t query = (size_t)tile->head * (size_t)r->n * (size_t)g + (size_t)tile->first;
    const uint8_t *values = keys + q3n__kv_side_bytes(kv->type, D);
    const size_t scales = q3n__kv_scales_at(kv->type, D), e = q3n__kv_element(kv->type);
    const q3n__attend call = {
        .k = keys + (size_t)skip * e, .v = values + (size_t)skip * (size_t)D * e,
        .k_scale = (const float *)(const void *)(keys + scales) + skip,
        .v_scale = (const float *)(const void *)(values + scales) + skip,
        .q = r->q + query * (size_t)D,
        .o = o, .m = m, .l = l, .scores = scores, .n_keys = n_keys,
        .q_stride = D, .o_stride = o_stride, .n = tile->n, .dim = D,
    };
    r->k->attend[kv->type](&call);
    for (int i = 0; i < tile->n; i++) partial[i] = (q3n__softmax_partial){ m[i], l[i] };
}

/* Items are (tile, kv head): all blocks one after another, merged as they come, then divided by L.
 * r->mixed, which is written after all of them, has room for a block's outputs: each tile takes the
 * rows there that its queries have in r->attn, so threads do not meet. */
static void q3n__attend_task(void *arg, int begin, int end)
{
    const q3n__attention_arg *j = (const q3n__attention_arg *)arg;
    const q3n__pass *r = j->r;
    const q3n_config *c = &r->model->config;
    const int K = c->num_key_value_heads, g = c->num_attention_heads / K, D = c->head_dim;
    for (int i = begin; i < end; i++) {
        const q3n__tile tile = q3n__tile_get(r, i / K, i % K);
        q3n__softmax_partial run[Q3N__QUERY_TILE], partial[Q3N__QUERY_TILE];
        const size_t query = (size_t)tile.head * (size_t)r->n * (size_t)g + (size_t)tile.first;
        float *O = r->attn + query * (size_t)D, *o = r->mixed + query * (size_t)D;
        memset(O, 0, (size_t)tile.n * (size_t)D * sizeof *O);
        for (int q = 0; q < tile.n; q++) run[q] = (q3n__softmax_partial){ -FLT_MAX, 0.0f };
        const int last = (q3n__n_visible(r, &tile, tile.n - 1) - 1) / Q3N__KV_BLOCK;
        for (int block = 0; block <= last; block++) {
            q3n__attend_block(j, &tile, block, partial, o, D);
            for (int q = 0; q < tile.n; q++)
                q3n__attend_merge(&run[q], O + (size_t)q * (size_t)D, partial[q], o + q * D, D);
        }
        for (int q = 0; q < tile.n; q++)
            for (int x = 0; x < D; x++) O[(size_t)q * (size_t)D + (size_t)x] /= run[q].l;
    }
}

/* Items are (tile, kv head, block), for few tokens and long texts: partial results, merged by the
 * next region in the same order and so to the same bits.
 *
 *     partial_o [query][n_blocks][D], partial [query][n_blocks]     query: as in r->q, all kv heads
 *
 * Blocks after the last visible one of a tile have no result and are not looked at. */
static void q3n__attend_split_task(void *arg, int begin, int end)
{
    const q3n__attention_arg *j = (const q3n__attention_arg *)arg;
    const q3n__pass *r = j->r;
    const q3n_config *c = &r->model->config;
    const int K = c->num_key_value_heads, g = c->num_attention_heads / K, D = c->head_dim;
    for (int i = begin; i < end; i++) {
        const int block = i % j->n_blocks, rest = i / j->n_blocks;
        const q3n__tile tile = q3n__tile_get(r, rest / K, rest % K);
        if (block > (q3n__n_visible(r, &tile, tile.n - 1) - 1) / Q3N__KV_BLOCK) continue;
        q3n__softmax_partial partial[Q3N__QUERY_TILE];
        const size_t query = (size_t)tile.head * (size_t)r->n * (size_t)g + (size_t)tile.first;
        const size_t at = query * (size_t)j->n_blocks + (size_t)block;
        q3n__attend_block(j, &tile, block, partial, r->partial_o + at * (size_t)D, j->n_blocks * D);
        for (int q = 0; q < tile.n; q++) r->partial[at + (size_t)(q * j->n_blocks)] = partial[q];
    }
}

/* Items are queries of all kv heads: query q belongs to kv head q / g / n and to row q / g mod n.
 * A tile's earlier queries may see fewer blocks than its last: each merges those that it sees. */
static void q3n__attend_merge_task(void *arg, int begin, int end)
{
    const q3n__attention_arg *j = (const q3n__attention_arg *)arg;
    const q3n__pass *r = j->r;
    const int D = r->model->config.head_dim;
    const int g = r->model->config.num_attention_heads / r->model->config.num_key_value_heads;
    for (int q = begin; q < end; q++) {
        const int t = q / g % r->n;
        const q3n__segment *s = q3n__segment_of(r, t);
        const int visible = r->model->config.causal ? s->state->length + t - s->row0 + 1
                                                    : s->state->length + s->n;
        q3n__softmax_partial run = { -FLT_MAX, 0.0f };
        float *O = r->attn + (size_t)q * (size_t)D;
        memset(O, 0, (size_t)D * sizeof *O);
        for (int block = 0; block <= (visible - 1) / Q3N__KV_BLOCK; block++) {
            const size_t at = (size_t)q * (size_t)j->n_blocks + (size_t)block;
            q3n__attend_merge(&run, O, r->partial[at], r->partial_o + at * (size_t)D, D);
        }
        for (int x = 0; x < D; x++) O[x] /= run.l;
    }
}

/* Back to rows of tokens, times the gate: mixed = attn * sigmoid(gate), elementwise, before o_proj.
 * Of the 2 D elements that q_proj gives a head the gate is the second half. */
static void q3n__attention_gate_task(void *arg, int begin, int end)
{
    const q3n__attention_arg *j = (const q3n__attention_arg *)arg;
    const q3n__pass *r = j->r;
    const q3n_config *c = &r->model->config;
    const int D = c->head_dim, H = c->num_attention_heads, g = H / c->num_key_value_heads;
    for (int t = begin; t < end; t++) {
        for (int h = 0; h < H; h++) {
            float *to = r->mixed + ((size_t)t * (size_t)H + (size_t)h) * (size_t)D;
            memcpy(to, r->attn + (((size_t)(h / g) * (size_t)r->n + (size_t)t) * (size_t)g
                                  + (size_t)(h % g)) * (size_t)D, (size_t)D * sizeof *to);
            if (c->attn_output_gate)
                r->k->sigmoid_mul(to, r->proj + (((size_t)t * (size_t)H + (size_t)h) * 2 + 1)
                                                * (size_t)D, D);
        }
        q3n__quantize_row(r, r->mixed_q, r->mixed, t, H * D);
    }
}

/* Tokens up to which attention may be split by blocks: the scratch is made for so many. */
#define Q3N__SPLIT_TOKENS 4

/* Grouped-query attention with an optional output gate ([HF] Qwen3NextAttention.forward):
 *
 *     q, gate = x Wq';  k = x Wk';  v = x Wv'        q_proj holds both, head by head
 *     q = rope(norm(q)) / sqrt(D);  k = rope(norm(k))
 *     y = (softmax(q k') v * sigmoid(gate)) Wo'       query head h reads kv head h / (H / K)
 *
 *   r->a [n, d] in, r->b [n, d] out     w: this layer's weights     layer: its number in pages
 *
 * Norms, gate and biases are the family's: w->q_norm, w->k_norm and biases may be NULL.  The keys
 * and values of the n rows are in the pages afterwards.  Splitting is a matter of time alone, and
 * where there is no room for partial results (no memory) nothing is split.
 */
static void q3n__attention(q3n__pass *r, const q3n__layer *w, int layer)
{
    const q3n_config *c = &r->model->config;
    const int K = c->num_key_value_heads, g = c->num_attention_heads / K, d = c->hidden_size;
    const int tile = q3n__query_tile(c);
    const q3n__linear in[3] = {
        { &w->q_proj, w->q_bias, r->a, r->a_q, r->proj,  d, w->q_proj.n_rows },
        { &w->k_proj, w->k_bias, r->a, r->a_q, r->key,   d, w->k_proj.n_rows },
        { &w->v_proj, w->v_bias, r->a, r->a_q, r->value, d, w->v_proj.n_rows },
    };
    q3n__linear_all(r->pool, r->k, in, 3, r->n);

    q3n__attention_arg arg = { r, w, layer, 0, 0 };
    q3n__parallel(r->pool, r->n, 1, q3n__attention_prepare_task, &arg);
    for (int i = 0; i < r->n_segments; i++) {
        const q3n__segment *s = &r->segments[i];
        const int blocks = (s->state->length + s->n + Q3N__KV_BLOCK - 1) / Q3N__KV_BLOCK;
        arg.n_tiles += (s->n * g + tile - 1) / tile;
        if (blocks > arg.n_blocks) arg.n_blocks = blocks;
    }
    const int split = r->n <= Q3N__SPLIT_TOKENS && arg.n_blocks > 1 && r->pool->n_threads > 1
                   && arg.n_blocks <= r->partial_blocks;
    if (split) {
        q3n__parallel(r->pool, arg.n_tiles * K * arg.n_blocks, 1, q3n__attend_split_task, &arg);
        q3n__parallel(r->pool, r->n * K * g, 1, q3n__attend_merge_task, &arg);
    } else {
        q3n__parallel(r->pool, arg.n_tiles * K, 1, q3n__attend_task, &arg);
    }
    q3n__parallel(r->pool, r->n, 4, q3n__attention_gate_task, &arg);

    const q3n__linear out = { &w->o_proj, w->o_bias, r->mixed, r->mixed_q, r->b,
                              w->o_proj.n_cols, d };
    q3n__linear_all(r->pool, r->k, &out, 1, r->n);
}

/* =====================================================================================
 * [20] DELTANET                                                            >>deltanet
 *
 * The gated delta rule with its convolution (q3n__deltanet, at the end), for passes that store
 * their states and for passes that leave them pending.
 *
 *     region    items                                   from, to
 *     in_proj   blocks of rows                          a [n, d] -> proj [n, C + Hv dv], ba
 *     conv      tiles of channels                       proj -> u [n, C], columns of the state
 *     prepare   rows                                    unit q and k in u;  ba -> beta, g
 *     delta     (segment, value head, tile of columns)  u, beta, g, S -> mixed [n, Hv dv], S
 *     gate      rows                                    mixed, z in proj -> mixed
 *     out_proj  blocks of rows                          mixed -> b [n, d]
 *
 * u = q [Hk, dk] | k [Hk, dk] | v [Hv, dv] has C elements.  The recurrence over tokens is a loop
 * within an item; parallel is what it does not mix: heads, and columns of S.
 *
 *                    a pass that stores               a lazy pass (decode, a token and drafts)
 *     first          pending rows -> delta,          nothing
 *                    in place
 *     rows of u      r->u: n                         pending.u[!now]: the pending ones, then n
 *     states         delta -> delta_out, after       delta -> delta, in place, after the pending
 *                    all n                           rows; states of the n pass through scratch
 *     outputs        of all n                        of the n, not of the pending ones again
 *
 * A token's output has the same bits both ways: S is f32 in memory and in scratch, and the kernel
 * does the same operations.  Which way a pass goes is the session's decision (state.lazy).
 * ===================================================================================== */
typedef struct {
    const q3n__pass   *r;
    const q3n__layer *w;
    int               layer;         /* number among the DeltaNet layers                         */
    int               channels;      /* C                                                        */
    int               n_cols;        /* columns of an item of the delta rule                     */
} q3n__delta_arg;

/* Channels of one item of the convolution, columns of one item of the delta rule: a state tile of
 * 128 x 32 floats, 16 KiB, stays in the first-level cache for all tokens.  Tiles are read where
 * they lie, rows 4 dv bytes apart: copied together first, the delta rule was 10 % faster in a
 * prefill of 512 tokens and 20 % slower in one of 16 (two cores). */
#define Q3N__CONV_TILE  128
#define Q3N__DELTA_TILE 32

/* Floats of one head's state that an item may have on the stack beside the stored one: a tile of
 * 128 keys, 16 KiB.  More keys, up to 1024 (Q3N_CONFIG_LIST), have narrower tiles. */
#define Q3N__DELTA_SCRATCH 4096

/* One segment's rows of u and beta, g: among the pending ones, after the n_pending there already,
 * or in the pass's scratch.  Both begin with the pending rows, if the pass is lazy. */
typedef struct { float *u, *ba; } q3n__delta_rows;

static q3n__delta_rows q3n__delta_rows_of(const q3n__delta_arg *j, const q3n__segment *s)
{
    const size_t C = (size_t)j->channels;
    const size_t heads2 = 2 * (size_t)j->r->model->config.linear_num_value_heads;
    const q3n__pending *pending = &s->state->pending;
    const size_t at = (size_t)j->layer * (size_t)pending->max;
    if (s->state->lazy)
        return (q3n__delta_rows){ pending->u[!pending->now] + at * C,
                                  pending->ba[!pending->now] + at * heads2 };
    return (q3n__delta_rows){ j->r->u + (size_t)s->row0 * C, j->r->ba + (size_t)s->row0 * heads2 };
}

/* The rows that the matrices do not hold yet. */
static q3n__delta_rows q3n__pending_rows(const q3n__delta_arg *j, const q3n__state *s)
{
    const q3n__pending *pending = &s->pending;
    const size_t at = (size_t)j->layer * (size_t)pending->max + (size_t)pending->first;
    const size_t heads2 = 2 * (size_t)j->r->model->config.linear_num_value_heads;
    return (q3n__delta_rows){ pending->u[pending->now] + at * (size_t)j->channels,
                              pending->ba[pending->now] + at * heads2 };
}

/* Rows of u that stand before the segment's own. */
static int q3n__delta_before(const q3n__segment *s)
{
    return s->state->lazy ? s->state->n_pending : 0;
}

/* u = silu(conv(q | k | v)), depthwise and causal, with columns of the state before the first row:
 *
 *     u[t][c] = silu(sum_j w[j][c] x[t - width + 1 + j][c])        j = 0 .. width - 1
 *
 * Items are channel tiles, each over all segments: no other item touches these channels, of rows or
 * of states.
 *
 * A lazy pass also copies the pending rows before its own, convolved as they are, and saves its
 * inputs: with them q3n__conv_rewind finds the columns after fewer tokens.  A single token needs no
 * inputs, for taken back it leaves the columns of before. */
static void q3n__conv_task(void *arg, int begin, int end)
{
    const q3n__delta_arg *j = (const q3n__delta_arg *)arg;
    const q3n__pass *r = j->r;
    const q3n_config *c = &r->model->config;
    const int C = j->channels, width = c->linear_conv_kernel_dim, rows = j->w->in_proj_qkvz.n_rows;
    const int c0 = begin * Q3N__CONV_TILE;
    const int c1 = end * Q3N__CONV_TILE < C ? end * Q3N__CONV_TILE : C;
    const size_t bytes = (size_t)(c1 - c0) * sizeof(float);
    for (int i = 0; i < r->n_segments; i++) {
        const q3n__segment *s = &r->segments[i];
        q3n__state *st = s->state;
        float *u = q3n__delta_rows_of(j, s).u;
        const int before = q3n__delta_before(s);
        const size_t state = (size_t)j->layer * (size_t)(width - 1) * (size_t)C;
        const q3n__conv call = {
            .w = j->w->conv1d, .state = st->conv + state, .state_out = st->conv_out + state,
            .x = r->proj + (size_t)s->row0 * (size_t)rows, .x_stride = rows,
            .y = u + (size_t)before * (size_t)C, .y_stride = C,
            .n = s->n, .width = width, .n_channels = C, .c0 = c0, .c1 = c1,
        };
        if (before > 0) {
            const float *from = q3n__pending_rows(j, st).u;
            for (int t = 0; t < before; t++)
                memcpy(u + (size_t)t * (size_t)C + c0, from + (size_t)t * (size_t)C + c0, bytes);
        }
        if (st->lazy && s->n > 1) {
            float *x = st->pending.x + (size_t)j->layer * (size_t)st->pending.max * (size_t)C;
            for (int t = 0; t < s->n; t++)
                memcpy(x + (size_t)t * (size_t)C + c0, call.x + (size_t)t * (size_t)rows + c0,
                       bytes);
        }
        r->k->conv(&call);
    }
}

/* log(1 + e^x); above 20 the difference to x is below half a unit in x's last place. */
static float q3n__softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

/* Items are rows:
 *
 *     q, k = x / sqrt(sum x^2 + 1e-6) per key head;  q /= sqrt(dk)      ([HF] l2norm: no mean)
 *     beta = sigmoid(b), in (0, 1);  g = -exp(A_log) softplus(a + dt_bias) <= 0, per value head
 *
 * In place where nothing is pending; a lazy pass's row goes after the pending ones, which the first
 * row of a segment copies.  g stays a logarithm here: kernels take e^g. */
static void q3n__delta_prepare_task(void *arg, int begin, int end)
{
    const q3n__delta_arg *j = (const q3n__delta_arg *)arg;
    const q3n__pass *r = j->r;
    const q3n_config *c = &r->model->config;
    const int Hk = c->linear_num_key_heads, Hv = c->linear_num_value_heads,
              dk = c->linear_key_head_dim;
    for (int t = begin; t < end; t++) {
        const q3n__segment *s = q3n__segment_of(r, t);
        const q3n__delta_rows rows = q3n__delta_rows_of(j, s);
        const int before = q3n__delta_before(s);
        const size_t row = (size_t)(before + t - s->row0);
        if (t == s->row0 && before > 0)
            memcpy(rows.ba, q3n__pending_rows(j, s->state).ba,
                   (size_t)before * 2 * (size_t)Hv * sizeof *rows.ba);
        for (int h = 0; h < 2 * Hk; h++) {                   /* the q heads, then the k heads */
            float *x = rows.u + row * (size_t)j->channels + (size_t)h * (size_t)dk;
            float scale = 1.0f / sqrtf(r->k->dot(x, x, dk) + 1e-6f);
            if (h < Hk) scale /= sqrtf((float)dk);
            for (int i = 0; i < dk; i++) x[i] *= scale;
        }
        const float *b = r->ba + (size_t)t * 2 * (size_t)Hv, *a = b + Hv;
        float *beta = rows.ba + row * 2 * (size_t)Hv, *g = beta + Hv;
        for (int h = 0; h < Hv; h++) {
            beta[h] = q3n__sigmoid(b[h]);
            g[h] = -expf(j->w->A_log[h]) * q3n__softplus(a[h] + j->w->dt_bias[h]);
        }
    }
}

/* The delta rule of value head h over the first n of rows, columns from col0; what is left to fill
 * in: n, where states and outputs go.  Operands are strided views of u [.., C] and ba [.., 2 Hv]:
 * value head h reads q and k of key head h / (Hv / Hk) and its own v. */
static q3n__delta q3n__delta_call(const q3n__delta_arg *j, const q3n__delta_rows *rows, int h,
                                  int col0)
{
    const q3n_config *c = &j->r->model->config;
    const int Hk = c->linear_num_key_heads, Hv = c->linear_num_value_heads;
    const int dk = c->linear_key_head_dim, dv = c->linear_value_head_dim, C = j->channels;
    const int kh = h / (Hv / Hk);
    return (q3n__delta){
        .q = rows->u + (size_t)kh * (size_t)dk,
        .k = rows->u + (size_t)(Hk + kh) * (size_t)dk,
        .qk_stride = C,
        .v = rows->u + 2 * (size_t)Hk * (size_t)dk + (size_t)h * (size_t)dv,
        .v_stride = C,
        .beta = rows->ba + h,
        .g = rows->ba + Hv + h,
        .gb_stride = 2 * Hv,
        .o_stride = Hv * dv,
        .dk = dk,
        .dv = dv,
        .col0 = col0,
        .col1 = col0 + j->n_cols < dv ? col0 + j->n_cols : dv,
    };
}

/* The pending rows of s into its matrices in place: head h, n_cols columns from col0, no outputs.
 * All n states are stored, so no scratch is needed. */
static void q3n__delta_catch_up(const q3n__delta_arg *j, const q3n__state *s, int h, int col0)
{
    const q3n_config *c = &j->r->model->config;
    const q3n__delta_rows rows = q3n__pending_rows(j, s);
    q3n__delta call = q3n__delta_call(j, &rows, h, col0);
    call.S = call.S_out = s->delta
        + ((size_t)j->layer * (size_t)c->linear_num_value_heads + (size_t)h)
          * (size_t)call.dk * (size_t)call.dv;
    call.n = call.n_store = s->pending.n;
    j->r->k->delta(&call);
}

static int q3n__delta_tiles(const q3n__delta_arg *j)
{
    return (j->r->model->config.linear_value_head_dim + j->n_cols - 1) / j->n_cols;
}

/* Items are (segment, value head, column tile), each over all of the segment's tokens, in order.
 * n_skip: rows before the segment's own have no place in r->mixed; row `before` of the call is the
 * segment's first there.  Columns do not mix, so a tile's pending rows may be stored right before
 * its own rows are computed. */
static void q3n__delta_task(void *arg, int begin, int end)
{
    const q3n__delta_arg *j = (const q3n__delta_arg *)arg;
    const q3n__pass *r = j->r;
    const int Hv = r->model->config.linear_num_value_heads, tiles = q3n__delta_tiles(j);
    float scratch[Q3N__DELTA_SCRATCH];
    for (int i = begin; i < end; i++) {
        const int col0 = i % tiles * j->n_cols, h = i / tiles % Hv;
        const q3n__segment *s = &r->segments[i / tiles / Hv];
        const q3n__state *st = s->state;
        const q3n__delta_rows rows = q3n__delta_rows_of(j, s);
        q3n__delta call = q3n__delta_call(j, &rows, h, col0);
        const size_t at = ((size_t)j->layer * (size_t)Hv + (size_t)h)
                        * (size_t)call.dk * (size_t)call.dv;
        const int before = q3n__delta_before(s);
        if (!st->lazy && st->n_pending > 0) q3n__delta_catch_up(j, st, h, col0);
        call.S = st->delta + at;
        call.S_out = (st->lazy ? st->delta : st->delta_out) + at;
        call.n = before + s->n;
        call.n_store = st->lazy ? before : call.n;
        call.n_skip = before;
        call.scratch = scratch;
        call.o = r->mixed + ((size_t)s->row0 * (size_t)Hv + (size_t)h) * (size_t)call.dv
               - (size_t)before * (size_t)call.o_stride;
        r->k->delta(&call);
    }
}

/* Columns of an item: a tile that stays in the cache for all tokens; whole rows for one token: it
 * needs no scratch, and memory is read in longer stretches (AVX-512: 5.5 microseconds a head, in
 * tiles 6.5). */
static int q3n__delta_columns(const q3n__pass *r, int items)
{
    const q3n_config *c = &r->model->config;
    const int dk = c->linear_key_head_dim, dv = c->linear_value_head_dim;
    int n = Q3N__DELTA_TILE;
    while (n * dk > Q3N__DELTA_SCRATCH) n /= 2;
    return r->n == r->n_segments && items >= 4 * r->pool->n_threads ? dv : n;
}

/* Items are (DeltaNet layer, value head): the pending rows of segment 0 into the matrices. */
static void q3n__flush_task(void *arg, int begin, int end)
{
    q3n__delta_arg j = *(const q3n__delta_arg *)arg;
    const int Hv = j.r->model->config.linear_num_value_heads;
    const q3n__state *s = j.r->segments[0].state;
    for (int i = begin; i < end; i++) {
        j.layer = i / Hv;
        if (s->pending.applied[j.layer]) continue;
        for (int tile = 0; tile < q3n__delta_tiles(&j); tile++)
            q3n__delta_catch_up(&j, s, i % Hv, tile * j.n_cols);
    }
}

/* Make the matrices hold the whole text: no row is pending afterwards.  For what needs the state
 * itself (snapshots, files, forks), and after a cancelled pass, which did not do all layers. */
static void q3n__flush(q3n__pass *r, q3n__state *s, int n_delta)
{
    if (s->pending.n == 0) return;
    const q3n__segment segment = { s, 0, 0 };
    const q3n_config *c = &r->model->config;
    q3n__delta_arg arg = { r, NULL, 0, (int)q3n__config_channels(c), Q3N__DELTA_TILE };
    r->segments = &segment;
    q3n__parallel(r->pool, n_delta * c->linear_num_value_heads, 1, q3n__flush_task, &arg);
    r->segments = NULL;
    s->pending.n = 0;
    memset(s->pending.applied, 0, (size_t)n_delta);
}

/* The convolution's columns after the first n tokens of a lazy pass, to conv_out: the last
 * width - 1 columns of [columns before the pass | inputs of its tokens 0 .. n - 1].  0 <= n <
 * tokens of it. */
static void q3n__conv_rewind(const q3n__pass *r, q3n__state *s, int n_delta, int n)
{
    const q3n_config *c = &r->model->config;
    const size_t C = (size_t)q3n__config_channels(c);
    const int back = c->linear_conv_kernel_dim - 1;
    for (int l = 0; l < n_delta; l++) {
        const float *before = s->conv + (size_t)l * (size_t)back * C;
        const float *x = s->pending.x + (size_t)l * (size_t)s->pending.max * C;
        float *out = s->conv_out + (size_t)l * (size_t)back * C;
        for (int i = 0; i < back; i++)
            memcpy(out + (size_t)i * C, i + n < back ? before + (size_t)(i + n) * C
                                                     : x + (size_t)(i + n - back) * C,
                   C * sizeof *out);
    }
}

/* mixed = norm(o) w * silu(z), for each token: the norm, over each head's dv with w [dv] shared by
 * all, comes before the gate ([HF] Qwen3NextRMSNormGated).  z are proj's columns from C on. */
static void q3n__delta_gate_task(void *arg, int begin, int end)
{
    const q3n__delta_arg *j = (const q3n__delta_arg *)arg;
    const q3n__pass *r = j->r;
    const q3n_config *c = &r->model->config;
    const int Hv = c->linear_num_value_heads, dv = c->linear_value_head_dim;
    for (int t = begin; t < end; t++) {
        float *o = r->mixed + (size_t)t * (size_t)Hv * (size_t)dv;
        const float *z = r->proj + (size_t)t * (size_t)j->w->in_proj_qkvz.n_rows
                         + (size_t)j->channels;
        for (int h = 0; h < Hv; h++)
            r->k->rms_norm(o + (size_t)h * (size_t)dv, o + (size_t)h * (size_t)dv,
                           j->w->delta_norm, dv, (float)c->rms_norm_eps);
        r->k->silu_mul(o, z, Hv * dv);
        q3n__quantize_row(r, r->mixed_q, r->mixed, t, Hv * dv);
    }
}

/* Gated DeltaNet ([HF] Qwen3NextGatedDeltaNet.forward; [GDN] eq. 10):
 *
 *     q, k, v, z = x Wqkvz';  b, a = x Wba'
 *     q, k, v = silu(conv(q | k | v));  q, k to unit length;  q /= sqrt(dk)
 *     beta = sigmoid(b);  g = -exp(A_log) softplus(a + dt_bias)          g is a log: decay is e^g
 *     o = delta rule(q, k, v, g, beta)                                   see q3n__delta_scalar
 *     y = (norm(o) w * silu(z)) Wo'
 *
 * Prefill runs the same recurrence, token after token, for a tile of columns whose state stays in
 * the first-level cache.  The chunked form ([GDN] 3.3) saves no multiplications on a CPU: with
 * chunks of 64 tokens and dk = dv = 128 it needs 3 dk dv + 2 x 64 (dk + dv) = 82 k a token and
 * head, against 4 dk dv = 66 k here; and here the result does not depend on how a text is cut.
 *
 *   r->a [n, d] in, r->b [n, d] out     layer: number among the DeltaNet layers, of which delta is
 *   [layer][Hv][dk, dv], conv [layer][width - 1, C]: 2 MiB and 96 KiB a layer in the 80B (Hk 16, Hv
 *   32, dk = dv = 128, width 4), whatever the length of the text
 */
static void q3n__deltanet(q3n__pass *r, const q3n__layer *w, int layer)
{
    const q3n_config *c = &r->model->config;
    const int d = c->hidden_size, Hv = c->linear_num_value_heads;
    const q3n__linear in[2] = {
        { &w->in_proj_qkvz, NULL, r->a, r->a_q, r->proj, d, w->in_proj_qkvz.n_rows },
        { &w->in_proj_ba,   NULL, r->a, r->a_q, r->ba,   d, w->in_proj_ba.n_rows },
    };
    q3n__linear_all(r->pool, r->k, in, 2, r->n);

    q3n__delta_arg arg = { r, w, layer, (int)q3n__config_channels(c), 0 };
    arg.n_cols = q3n__delta_columns(r, r->n_segments * Hv);
    const int conv_tiles = (arg.channels + Q3N__CONV_TILE - 1) / Q3N__CONV_TILE;
    q3n__parallel(r->pool, conv_tiles, 8, q3n__conv_task, &arg);
    q3n__parallel(r->pool, r->n, 1, q3n__delta_prepare_task, &arg);
    q3n__parallel(r->pool, r->n_segments * Hv * q3n__delta_tiles(&arg), arg.n_cols > 64 ? 1 : 4,
                  q3n__delta_task, &arg);
    for (int i = 0; i < r->n_segments; i++)
        if (r->segments[i].state->n_pending > 0)
            r->segments[i].state->pending.applied[layer] = 1;
    q3n__parallel(r->pool, r->n, 1, q3n__delta_gate_task, &arg);

    const q3n__linear out = { &w->out_proj, NULL, r->mixed, r->mixed_q, r->b,
                              w->out_proj.n_cols, d };
    q3n__linear_all(r->pool, r->k, &out, 1, r->n);
}

/* =====================================================================================
 * [21] MODEL                                                                  >>model
 *
 * The forward pass, in the words and letters of the reference: feed-forward networks and experts,
 * layers, the trunk, multi-token prediction.  Knows no instruction set, no file, and of types only
 * which are quantised.
 *
 *     token -> embed -> x [d]
 *     each layer          x -> norm -> a -> attention or DeltaNet -> b,   x += b
 *                         x -> norm -> a -> experts or dense FFN  -> b,   x += b
 *     x -> norm -> a -> lm_head -> logits [vocab]                  only for rows that want them
 *
 * Prefill and decode are this same code; what differs is what the steps find:
 *
 *                    one row                               hundreds of rows
 *     matrices       read once for one token: as fast      read once for all rows, in tiles of 48:
 *                    as memory gives them                  as fast as multiply-adds go
 *     attention      shared out by blocks of keys          by tiles of queries
 *     DeltaNet       state read and written once a token   once for all rows, in the cache between
 *     experts        k of E, one row each                  most of E, about n k / E rows each
 *
 * After q3n__forward the engine owns r->a; the states it wrote are the session's to commit or not.
 * ===================================================================================== */

/* ---- Feed-forward networks and experts ----
 *
 * A dense FFN, an expert with the rows that chose it and the shared expert are the same job
 * (q3n__ffn); a layer is a list of jobs, done in two regions.  E = 8, k = 2, three rows:
 *
 *     top            row 0: 3 7    row 1: 1 3    row 2: 3 6       ascending within a row
 *     expert_first   0 0 1 1 4 4 4 5 6                            [E + 1]
 *     expert_row     1 | 0 1 2 | 2 | 0                            of experts 1, 3, 6, 7
 *     jobs           4 with 1, 3, 1, 1 rows, then the shared expert's with all 3
 *
 *     region 1   items: blocks of I, of all jobs    up = up(x) * silu(gate(x))   [rows of job, I]
 *     region 2   items: blocks of d                 y[row] += weight * down(up), job after job
 *
 * So an expert's weights are read once for all its rows; and an element of y is summed by one
 * thread in one order, experts by rising number and the shared one last, whatever else is in the
 * pass. */
typedef struct {
    const q3n__pass   *r;
    int               n_ffn, rows_per_block, n_blocks;
} q3n__ffn_arg;

/* Items are rows ([HF] Qwen3NextTopKRouter): p = softmax over all E experts, the k largest, divided
 * by their sum if norm_topk_prob; written ascending by number, for sums of outputs go by number.
 * Of equals the lower number is taken.  A NaN never wins a comparison, so hostile weights give k
 * different experts all the same. */
static void q3n__route_task(void *arg, int begin, int end)
{
    const q3n__ffn_arg *j = (const q3n__ffn_arg *)arg;
    const q3n__pass *r = j->r;
    const q3n_config *c = &r->model->config;
    const int E = c->num_experts, k = c->num_experts_per_tok;
    for (int t = begin; t < end; t++) {
        float *p = r->router + (size_t)t * (size_t)E, sum = 0.0f;
        float *weight = r->top_weight + (size_t)t * (size_t)k;
        int *top = r->top + (size_t)t * (size_t)k;
        r->k->softmax(p, E);
        int n = 0;
        for (int e = 0; e < E; e++) {                 /* insertion: top is by weight, falling */
            if (n == k && !(p[e] > weight[k - 1])) continue;
            int at = n < k ? n++ : k - 1;
            for (; at > 0 && p[e] > weight[at - 1]; at--) {
                weight[at] = weight[at - 1];
                top[at] = top[at - 1];
            }
            weight[at] = p[e];
            top[at] = e;
        }
        for (int i = 0; i < k; i++) sum += weight[i];
        for (int i = 1; i < k; i++)                    /* now by number */
            for (int at = i; at > 0 && top[at] < top[at - 1]; at--) {
                const int e = top[at];
                const float v = weight[at];
                top[at] = top[at - 1];
                weight[at] = weight[at - 1];
                top[at - 1] = e;
                weight[at - 1] = v;
            }
        if (c->norm_topk_prob) for (int i = 0; i < k; i++) weight[i] /= sum;
    }
}

/* Rows and weights by expert: counting sort over (row, choice), rows ascending within an expert;
 * see the picture above.  By the calling thread: n k steps.  l >= 0: each session counts the
 * choices of its own rows. */
static void q3n__group_by_expert(const q3n__pass *r, int l)
{
    const int E = r->model->config.num_experts, k = r->model->config.num_experts_per_tok;
    int *first = r->expert_first;
    memset(first, 0, ((size_t)E + 1) * sizeof *first);
    for (int i = 0; i < r->n * k; i++) first[r->top[i] + 1]++;
    for (int e = 0; e < E; e++) first[e + 1] += first[e];
    for (int i = 0; i < r->n * k; i++) {
        const int at = first[r->top[i]]++;
        r->expert_row[at] = i / k;
        r->expert_weight[at] = r->top_weight[i];
    }
    for (int e = E; e > 0; e--) first[e] = first[e - 1];
    first[0] = 0;
    for (int i = 0; i < r->n_segments; i++) {
        const q3n__segment *s = &r->segments[i];
        if (!s->state->expert_counts || l < 0) continue;
        int64_t *counts = s->state->expert_counts + (size_t)l * (size_t)E;
        for (int a = s->row0 * k; a < (s->row0 + s->n) * k; a++) counts[r->top[a]]++;
    }
}

/* Matrix e of a tensor [E, rows, cols], whose slices lie w->stride bytes apart. */
static q3n__mat q3n__slice(const q3n__mat *w, int e)
{
    q3n__mat one = *w;
    one.data += (size_t)e * w->stride;
    return one;
}

/* Row t of an FFN in r->ffn_q; NULL if no matrix of the model is quantised. */
static q3n__x8 *q3n__ffn_row_q(const q3n__pass *r, const q3n__ffn *f, int t)
{
    if (!r->ffn_q) return NULL;
    return r->ffn_q + f->first_q + (size_t)t * (size_t)q3n__x8_blocks(f->up.n_rows);
}

/* Rows [row0, row1) of the gate's or the up projection of one FFN's tokens: x is r->a, picked by
 * f->rows; y is [f->n, I] in r->ffn_gate or r->ffn_up from row f->first on. */
static void q3n__ffn_half(const q3n__ffn_arg *j, const q3n__ffn *f, int is_up, int row0, int row1)
{
    const q3n__mat *w = is_up ? &f->up : &f->gate;
    const float *bias = is_up ? f->up_bias : f->gate_bias;
    float *out = is_up ? j->r->ffn_up : j->r->ffn_gate;
    const q3n__matmul m = {
        .w = w->data,
        .x = j->r->a,
        .xq = j->r->a_q,
        .x_rows = f->rows,
        .bias = bias,
        .y = out + f->first * (size_t)w->n_rows,
        .x_stride = w->n_cols,
        .y_stride = w->n_rows,
        .n = f->n,
        .n_cols = w->n_cols,
        .row0 = row0,
        .row1 = row1,
    };
    q3n__matmul_calls(j->r->k, w->type, &m);
}

/* up = up(x) * silu(gate(x)): items are row blocks of all FFNs, multiples of the columns of a
 * q3n__x8 (64), so that a thread quantises what it computed and no two write one block.  Gate and
 * up of the same rows are one item: silu needs no other region.  Rows of FFNs of one width lie
 * together; the shared expert's, of another width, lie after, at a multiple of its own width. */
static void q3n__ffn_up_task(void *arg, int begin, int end)
{
    const q3n__ffn_arg *j = (const q3n__ffn_arg *)arg;
    const q3n__pass *r = j->r;
    for (int i = 0; i < j->n_ffn; i++) {
        const q3n__ffn *f = &r->ffn[i];
        const int blocks = (f->up.n_rows + j->rows_per_block - 1) / j->rows_per_block;
        const int b0 = begin > f->first_block ? begin - f->first_block : 0;
        const int b1 = end - f->first_block < blocks ? end - f->first_block : blocks;
        if (b0 >= b1) continue;
        const int row0 = b0 * j->rows_per_block, n_rows = f->up.n_rows;
        const int row1 = b1 * j->rows_per_block < n_rows ? b1 * j->rows_per_block : n_rows;
        q3n__ffn_half(j, f, 0, row0, row1);
        q3n__ffn_half(j, f, 1, row0, row1);
        for (int t = 0; t < f->n; t++) {
            const size_t at = (f->first + (size_t)t) * (size_t)n_rows + (size_t)row0;
            r->k->silu_mul(r->ffn_up + at, r->ffn_gate + at, row1 - row0);
            if (r->ffn_q)
                r->k->quantize_x(q3n__ffn_row_q(r, f, t) + q3n__x8_blocks(row0), r->ffn_up + at,
                                 row1 - row0);
        }
    }
}

/* With few tokens long ranges of one expert are read: where reading jumps, it stops.  768 rows at a
 * time instead of 64: 31 GB/s instead of 25, where reading gives 33 (Zen 4). */
#define Q3N__FEW_TOKENS   4
#define Q3N__FEW_CALL_ROWS (Q3N__CALL_TOKENS * Q3N__CALL_ROWS / Q3N__FEW_TOKENS)

/* y[row] = sum over FFNs, in their order, of weight * down(up): items are blocks of the d outputs,
 * so each output is summed by one thread in one order.  `out` holds a job's products for a tile of
 * tokens and outputs before they are weighted and added: 48 x 64 floats, or 4 x 768. */
static void q3n__ffn_down_task(void *arg, int begin, int end)
{
    const q3n__ffn_arg *j = (const q3n__ffn_arg *)arg;
    const q3n__pass *r = j->r;
    const int d = r->model->config.hidden_size;
    float out[Q3N__CALL_TOKENS * Q3N__CALL_ROWS];
    const int step = r->n <= Q3N__FEW_TOKENS ? Q3N__FEW_CALL_ROWS : Q3N__CALL_ROWS;
    const int end_row = end * j->rows_per_block < d ? end * j->rows_per_block : d;
    for (int row0 = begin * j->rows_per_block; row0 < end_row; row0 += step) {
        const int row1 = row0 + step < end_row ? row0 + step : end_row;
        const int n_rows = row1 - row0;
        for (int t = 0; t < r->n; t++)
            memset(r->b + (size_t)t * (size_t)d + (size_t)row0, 0, (size_t)n_rows * sizeof *r->b);
        for (int i = 0; i < j->n_ffn; i++) {
            const q3n__ffn *f = &r->ffn[i];
            for (int t = 0; t < f->n; t += Q3N__CALL_TOKENS) {
                const int width = f->down.n_cols;
                const q3n__matmul m = {
                    .w = f->down.data + (size_t)row0 * q3n__row_bytes(f->down.type, width),
                    .x = r->ffn_up + (f->first + (size_t)t) * (size_t)width,
                    .xq = q3n__ffn_row_q(r, f, t),
                    .x_stride = width,
                    .bias = f->down_bias ? f->down_bias + row0 : NULL,
                    .y = out,
                    .y_stride = step,
                    .n = f->n - t < Q3N__CALL_TOKENS ? f->n - t : Q3N__CALL_TOKENS,
                    .n_cols = width,
                    .row0 = 0,
                    .row1 = n_rows,
                };
                r->k->matmul[f->down.type](&m);
                for (int q = 0; q < m.n; q++) {
                    const int row = f->rows ? f->rows[t + q] : t + q;
                    r->k->axpy(r->b + (size_t)row * (size_t)d + (size_t)row0,
                               f->weight ? f->weight[t + q] : 1.0f, out + q * step,
                               n_rows);
                }
            }
        }
    }
}

/* r->b = the FFNs of r->ffn, n_ffn of them, of r->a: two parallel regions, for down needs all of
 * up.  Blocks are sized by the work in them: in the first region two matrices (2 d columns) times
 * the rows that a job has on average, in the second the rows of all jobs. */
static void q3n__ffn_all(q3n__pass *r, int n_ffn)
{
    q3n__ffn_arg arg = { r, n_ffn, 0, 0 };
    int n_tokens = 0;
    int64_t rows = 0;
    for (int i = 0; i < n_ffn; i++) {
        rows += r->ffn[i].up.n_rows;
        n_tokens += r->ffn[i].n;
    }
    const int d = r->model->config.hidden_size;
    arg.rows_per_block = q3n__rows_per_item(r->pool, rows, 2 * d, n_tokens / n_ffn);
    arg.rows_per_block = q3n__x8_blocks(arg.rows_per_block) * 2 * Q3N__GROUP;
    for (int i = 0; i < n_ffn; i++) {
        r->ffn[i].first_block = arg.n_blocks;
        arg.n_blocks += (r->ffn[i].up.n_rows + arg.rows_per_block - 1) / arg.rows_per_block;
    }
    q3n__parallel(r->pool, arg.n_blocks, 1, q3n__ffn_up_task, &arg);

    arg.rows_per_block = q3n__rows_per_item(r->pool, d, r->ffn[0].down.n_cols, n_tokens);
    q3n__parallel(r->pool, (d + arg.rows_per_block - 1) / arg.rows_per_block, 1, q3n__ffn_down_task,
                  &arg);
}

/* Dense FFN: y = down(silu(gate(x)) * up(x)), one job of all rows ([HF] Qwen3NextMLP.forward) */
static void q3n__mlp(q3n__pass *r, const q3n__layer *w)
{
    r->ffn[0] = (q3n__ffn){.gate = w->gate,
                           .up = w->up,
                           .down = w->down,
                           .gate_bias = w->gate_bias,
                           .up_bias = w->up_bias,
                           .down_bias = w->down_bias,
                           .n = r->n};
    q3n__ffn_all(r, 1);
}

/* Mixture of experts with a shared one ([HF] Qwen3NextSparseMoeBlock.forward):
 *
 *     p = softmax(x Wgate') over all experts, the k largest, divided by their sum if norm_topk_prob
 *     y = sum_e p_e expert_e(x) + sigmoid(x wg') shared(x)
 *
 * summed by rising e, then the shared expert.  l is the layer's number for the counts, -1 = not
 * counted.  Router and shared gate are float matrices of f32 inputs: a choice of experts does not
 * hang on how activations are quantised within this layer. */
static void q3n__moe(q3n__pass *r, const q3n__layer *w, int l)
{
    const q3n_config *c = &r->model->config;
    const int E = c->num_experts, width = c->moe_intermediate_size;
    const int d = c->hidden_size;
    const int shared = w->shared_up_proj.data != NULL;
    const q3n__linear in[2] = {
        { &w->router, w->router_bias, r->a, NULL, r->router, d, E },
        { &w->shared_expert_gate, NULL, r->a, NULL, r->shared_weight, d, 1 },
    };
    q3n__linear_all(r->pool, r->k, in, 1 + shared, r->n);
    q3n__ffn_arg arg = { r, 0, 0, 0 };
    q3n__parallel(r->pool, r->n, 2, q3n__route_task, &arg);
    q3n__group_by_expert(r, l);

    int n = 0;
    for (int e = 0; e < E; e++) {
        const int first = r->expert_first[e], count = r->expert_first[e + 1] - first;
        if (count == 0) continue;
        r->ffn[n++] = (q3n__ffn){
            .gate = q3n__slice(&w->gate, e),
            .up = q3n__slice(&w->up, e),
            .down = q3n__slice(&w->down, e),
            .gate_bias = w->gate_bias ? w->gate_bias + (size_t)e * (size_t)width : NULL,
            .up_bias = w->up_bias ? w->up_bias + (size_t)e * (size_t)width : NULL,
            .down_bias = w->down_bias ? w->down_bias + (size_t)e * (size_t)d : NULL,
            .rows = r->expert_row + first,
            .weight = r->expert_weight + first,
            .n = count,
            .first = (size_t)first,
            .first_q = (size_t)first * (size_t)q3n__x8_blocks(width),
        };
    }
    if (shared) {
        const size_t choices = (size_t)r->n * (size_t)c->num_experts_per_tok;
        const size_t Is = (size_t)c->shared_expert_intermediate_size;
        for (int t = 0; t < r->n; t++) r->shared_weight[t] = q3n__sigmoid(r->shared_weight[t]);
        r->ffn[n++] = (q3n__ffn){
            .gate = w->shared_gate_proj, .up = w->shared_up_proj, .down = w->shared_down_proj,
            .weight = r->shared_weight, .n = r->n,
            .first = (choices * (size_t)width + Is - 1) / Is,
            .first_q = choices * (size_t)q3n__x8_blocks(width),
        };
    }
    q3n__ffn_all(r, n);
}

/* ---- Layers ---- */

/* One decoder layer ([HF] Qwen3NextDecoderLayer.forward):
 *
 *     h = x + mix(norm(x))      mix: attention or gated DeltaNet
 *     y = h + ffn(norm(h))      ffn: experts or dense
 *
 * Every step reads r->a, which is a norm of r->x, and writes r->b, which is added to it.
 *
 * kind_index is the layer's number among those with its kind of state. */
static void q3n__layer_forward(q3n__pass *r, const q3n__layer *w, int l, int kind_index)
{
    q3n__rms_norm(r, w->input_norm);
    if (w->is_delta) q3n__deltanet(r, w, kind_index);
    else             q3n__attention(r, w, kind_index);
    q3n__add(r, r->x, r->b);

    q3n__rms_norm(r, w->post_norm);
    if (w->has_experts) q3n__moe(r, w, l);
    else                q3n__mlp(r, w);
    q3n__add(r, r->x, r->b);
}

/* The host's layer hook, if it has one: x [n, d] is the residual stream after layer l, the
 * embedding with l = -1, the final norm with l = the number of layers. */
static void q3n__hook(const q3n__pass *r, const q3n_layer_hook *hook, int l, const float *x)
{
    if (hook->layer) hook->layer(hook->user, l, x, r->n, r->model->config.hidden_size);
}

static int q3n__run_cancelled(const q3n__pass *r)   /* the engine, or one of the sessions */
{
    if (q3n__is_cancelled(r->cancel)) return 1;
    for (int i = 0; i < r->n_segments; i++)
        if (q3n__is_cancelled(r->segments[i].state->cancel)) return 1;
    return 0;
}

/* Tokens [r->n] through the trunk: afterwards r->a holds the final norm of every row.  States of
 * segments are advanced; their lengths are not.  0 = cancelled on the way, between two layers:
 * then slots after the text, delta_out and conv_out hold anything, and pending.applied says which
 * layers stored their pending rows.  n_kind counts layers of each kind: states are numbered within
 * one. */
static int q3n__forward(q3n__pass *r, const int32_t *tokens, const q3n_layer_hook *hook)
{
    const q3n_model *m = r->model;
    int n_kind[2] = { 0, 0 };
    q3n__embed(r, tokens);
    q3n__hook(r, hook, -1, r->x);
    for (int l = 0; l < m->config.num_hidden_layers; l++) {
        const q3n__layer *w = &m->layers[l];
        if (q3n__run_cancelled(r)) return 0;
        q3n__layer_forward(r, w, l, n_kind[w->is_delta]++);
        q3n__hook(r, hook, l, r->x);
    }
    q3n__rms_norm(r, m->weights.norm);
    q3n__hook(r, hook, m->config.num_hidden_layers, r->a);
    return 1;
}

/* ---- Multi-token prediction ---- */
typedef struct {
    const q3n__pass *r;
    const int32_t  *tokens;      /* [n]                                                          */
    const float    *hidden;      /* [n, d]                                                       */
} q3n__mtp_arg;

/* Items are rows: both halves of the input [2 d], embedding first, each with a norm of its own, and
 * cos and sin of the token's position. */
static void q3n__mtp_input_task(void *arg, int begin, int end)
{
    const q3n__mtp_arg *j = (const q3n__mtp_arg *)arg;
    const q3n__pass *r = j->r;
    const q3n__weights *w = &r->model->weights;
    const int d = r->model->config.hidden_size;
    const float eps = (float)r->model->config.rms_norm_eps;
    for (int t = begin; t < end; t++) {
        float *x = r->mtp_in + (size_t)t * 2 * (size_t)d;
        q3n__embed_row(r, j->tokens[t], t, x);
        r->k->rms_norm(x, x, w->mtp_norm_embedding, d, eps);
        r->k->rms_norm(x + d, j->hidden + (size_t)t * (size_t)d, w->mtp_norm_hidden, d, eps);
        q3n__quantize_row(r, r->mtp_in_q, r->mtp_in, t, 2 * d);
    }
}

/* The module over the rows of a pass, which has one segment (transformers leaves mtp.* out; its
 * tensors are those of the published checkpoints):
 *
 *     x = fc [norm(embed(token[p])); norm(h[p - 1])]     one decoder layer;  norm
 *
 * Row p is about the token after token[p]; its key lies in slot p of the module's layer, so slot 0
 * has none (kv.skip).  tokens [n] are those at the rows' positions, hidden [n, d] the trunk's final
 * norm of the positions before, or the module's own output there.  Afterwards r->a holds the
 * module's output. */
static void q3n__mtp_forward(q3n__pass *r, const int32_t *tokens, const float *hidden)
{
    const q3n_model *m = r->model;
    const int d = m->config.hidden_size;
    int n_attention = 0;
    for (int l = 0; l < m->config.num_hidden_layers; l++) n_attention += !m->layers[l].is_delta;
    q3n__mtp_arg arg = { r, tokens, hidden };
    q3n__parallel(r->pool, r->n, 1, q3n__mtp_input_task, &arg);
    const q3n__linear fc = { &m->weights.mtp_fc, NULL, r->mtp_in, r->mtp_in_q, r->x, 2 * d, d };
    q3n__linear_all(r->pool, r->k, &fc, 1, r->n);
    q3n__layer_forward(r, &m->layers[m->config.num_hidden_layers], -1, n_attention);
    q3n__rms_norm(r, m->weights.mtp_norm);
}

/* logits [n, vocab] = hidden lm_head', of n rows [n, d] of normed hidden states.  lm_head is the
 * embedding where the file ties them.  r->mixed_q is free after the last layer and has room for a
 * row of d; logits must not be part of the pass's activations. */
static void q3n__logits(const q3n__pass *r, const float *hidden, int n, float *logits)
{
    const q3n__mat *w = &r->model->weights.lm_head;
    const q3n__linear out = { w, NULL, hidden, r->mixed_q, logits, w->n_cols, w->n_rows };
    if (q3n__is_quantised(w->type)) q3n__quantize_rows(r, r->mixed_q, hidden, n, w->n_cols);
    q3n__linear_all(r->pool, r->k, &out, 1, n);
}

/* =====================================================================================
 * [22] CACHE                                                                  >>cache
 *
 * Snapshots by the text that led to them, for any number of threads.  An item is a text, in memory,
 * in a file, or both; items are sorted by length, so that one walk over a text finds the longest
 * that it begins with.  Texts are compared, hashes only point.
 *
 *     items, sorted          300 tokens       512 tokens        900 tokens
 *     by (length, key, text) in memory        a file            both
 *                                |                |                 |
 *     prompt, 1000 tokens    t0 .. t299 ..... t511 ............ t899 .. t999
 *     chained hash           equal: found     equal: longer     not equal
 *
 *     chain(0) = Q3N__TEXT_START;  chain(i + 1) = step(chain(i), t_i);  text = mix(chain(length))
 *
 * One multiplication a token, as far as the longest item that could be found; the state after 512
 * tokens serves.  The ways of an item, which is in one or two of these places, or is removed:
 *
 *             put               drop                  drain, with a directory
 *     nothing -----> in memory -------> leaving ---------------------------------> file
 *                        ^                 '-- drain, without: removed              | |
 *                        '-------------------- find: read, compared, stays a file --' |
 *                                              make_room: the oldest is deleted ------'
 *
 *     drop    bytes > max_bytes: unmarked before marked, the least recently used first; off the
 *             account at once
 *     drain   write and release what was dropped: without the lock, by the thread that dropped it
 *     touch   what a session would put is in memory: it counts as used now
 *     hold, unhold   on the account and off it: bytes of snapshots and pages in memory, a page that
 *             several snapshots hold counted once
 *
 * Eviction promises: whenever the lock is free, bytes <= max_bytes; a state that could never fit is
 * not taken, so it drives out no other; a caller that has found a snapshot holds it, whatever
 * leaves meanwhile.  One lock is over everything but snapshots, which do not change: it is never
 * held while a file is read, written or deleted.  What a directory holds may be hostile, of another
 * program, or gone the next moment: a file that does not serve is forgotten with a warning, and is
 * never an error of the session.  Knows snapshots and their shapes, and no session.
 * ===================================================================================== */
/* One text of one kind of state: in memory (snap), on its way out (leaving), in a file (has_file),
 * or in several of them; in none it is removed (q3n__cache_item_tidy). */
typedef struct {
    uint64_t      key;           /* q3n__cache_key: the kind of state                            */
    uint64_t      text;          /* hash of the tokens                                           */
    int           length;
    int           marked;
    uint64_t      used;          /* the cache's clock when it was last used                      */
    q3n_snapshot *snap;          /* NULL = not in memory                                         */
    q3n_snapshot *leaving;       /* out of the budget, not yet written and released              */
    int           has_file;
    int64_t       file_bytes, file_time;   /* time in seconds                                    */
    uint64_t      file_order;    /* among files of one second                                    */
} q3n__cache_item;

/* A slot of the hash table of pages, which serves the account only: linear probing from the
 * mixed address. */
typedef struct {
    q3n__page *page;             /* NULL = free slot                                             */
    int        n;                /* snapshots that hold it                                       */
} q3n__cache_page;

/* What is above the mutex and the directory's name do not change after create.  The model outlives
 * the cache and the cache the sessions that use it; memory is from the model's allocator. */
struct q3n_cache {
    const q3n_model  *model;
    uint64_t          model_hash;      /* for the names of files; 0 without a directory           */
    q3n__mutex        mutex;     /* for all below                                                */
    size_t            max_bytes, bytes;
    q3n__buffer       memory;    /* of the items                                                 */
    q3n__cache_item  *items;     /* [n_items] by length, key, text                               */
    int               n_items;
    int               n_leaving;
    q3n__cache_page  *pages;     /* [page_room] hash table, at most half full                    */
    size_t            n_pages, page_room;
    uint64_t          clock, file_order;
    int64_t           n_hits, n_misses, n_own, n_evicted;
    int               n_files;
    int64_t           file_bytes, max_directory_bytes;
    int64_t           pending_bytes;   /* files being written                                    */
    q3n_logger        logger;
    const char       *directory; /* NULL = none                                                  */
};

/* max_bytes if the options do not say it. */
#define Q3N__CACHE_BYTES ((size_t)1 << 30)

/* ---- Texts ---- */

/* States of one key can take one another's place: same model, instruction set, type of keys and
 * values, MTP layer or not, and, where there is DeltaNet, type of the matrices.  The instruction
 * set is in it because it decides the bits: where sessions or processes of several sets share a
 * cache, a text must not depend on who was there first.  Only a file's name tells it, and that is
 * not checked: numbers of another set are as sound.  model_hash is 0 without a directory: the cache
 * is of one model. */
static uint64_t q3n__cache_key(const q3n_cache *c, const q3n__shape *shape, q3n_type delta_type)
{
    const int type = shape->delta_len ? (int)delta_type : 0;
    return q3n__mix64(c->model_hash ^ q3n__mix64((uint64_t)shape->isa << 24
                                                 | (uint64_t)shape->kv_type << 16
                                                 | (uint64_t)shape->has_mtp << 8 | (uint64_t)type));
}

/* The keys under which states for this shape may be: its own, and with the MTP module or without it
 * where the shape is otherwise (the same again if the model has no module).  A session takes states
 * of both; where both are as long, the first key's serves it without beginning the module anew. */
static void q3n__cache_keys(const q3n_cache *c, const q3n__shape *shape, q3n_type delta_type,
                            uint64_t key[2])
{
    q3n__shape other = *shape;
    if (c->model->config.num_mtp_layers > 0) other.has_mtp = !shape->has_mtp;
    key[0] = q3n__cache_key(c, shape, delta_type);
    key[1] = q3n__cache_key(c, &other, delta_type);
}

/* Takes up the chain after tokens that are in it; q3n__mix64 makes it a hash.  So the hashes of all
 * beginnings of a text cost one walk over it; one of q3n__hash for each would cost a walk each. */
#define Q3N__TEXT_START Q3N__GOLDEN

static uint64_t q3n__text_chain(uint64_t chain, const int32_t *tokens, int n)
{
    for (int i = 0; i < n; i++) chain = q3n__hash_step(chain, (uint32_t)tokens[i]);
    return chain;
}

/* The hash of a snapshot's text, as an item has it. */
static uint64_t q3n__snapshot_text(const q3n_snapshot *s)
{
    uint64_t chain = Q3N__TEXT_START;
    for (int i = 0, n = s->length; n > 0; i++, n -= Q3N__KV_BLOCK)
        chain = q3n__text_chain(chain, s->page[i]->tokens, n < Q3N__KV_BLOCK ? n : Q3N__KV_BLOCK);
    return q3n__mix64(chain);
}

static int q3n__snapshot_is_prefix(const q3n_snapshot *s, const int32_t *tokens, int n)
{
    return s->length <= n && q3n__common_prefix(s->page, s->length, tokens, n) == s->length;
}

/* Whether two snapshots are of one text; pages that they share need no comparing. */
static int q3n__snapshot_same_text(const q3n_snapshot *a, const q3n_snapshot *b)
{
    if (a->length != b->length) return 0;
    for (int i = 0, n = a->length; n > 0; i++, n -= Q3N__KV_BLOCK)
        if (a->page[i] != b->page[i]
            && memcmp(a->page[i]->tokens, b->page[i]->tokens,
                      (size_t)(n < Q3N__KV_BLOCK ? n : Q3N__KV_BLOCK) * sizeof(int32_t)) != 0)
            return 0;
    return 1;
}

/* ---- Items: a sorted array; an index is good while the lock is held and none is added ---- */

/* Length first: a search for the longest beginning of a text goes up the array with the chain. */
static int q3n__cache_compare(const void *left, const void *right)
{
    const q3n__cache_item *a = (const q3n__cache_item *)left, *b = (const q3n__cache_item *)right;
    if (a->length != b->length) return a->length < b->length ? -1 : 1;
    if (a->key != b->key) return a->key < b->key ? -1 : 1;
    return a->text == b->text ? 0 : a->text < b->text ? -1 : 1;
}

/* The first item that does not come before (length, key, text); n_items if all do.  With text 0, or
 * key and text 0, the first of a length and key, or of a length. */
static int q3n__cache_lower(const q3n_cache *c, int length, uint64_t key, uint64_t text)
{
    q3n__cache_item at;
    memset(&at, 0, sizeof at);
    at.length = length;
    at.key = key;
    at.text = text;
    int low = 0, high = c->n_items;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (q3n__cache_compare(&c->items[middle], &at) < 0) low = middle + 1;
        else                                                high = middle;
    }
    return low;
}

/* Whether item i is there and of this length and key. */
static int q3n__cache_is(const q3n_cache *c, int i, int length, uint64_t key)
{
    return i < c->n_items && c->items[i].length == length && c->items[i].key == key;
}

/* Room for one more item; 0 = no memory, and everything is as it was. */
static int q3n__cache_items_reserve(q3n_cache *c)
{
    c->memory.bytes = (size_t)c->n_items * sizeof *c->items;
    if (c->n_items == INT_MAX
        || !q3n__reserve(&c->memory, sizeof *c->items, &c->model->allocator)) return 0;
    c->items = (q3n__cache_item *)(void *)c->memory.data;
    return 1;
}

/* The item of a text, a new one, which is nowhere yet, if there is none; -1 = no memory.  Items
 * after it move: indices from before are void. */
static int q3n__cache_item_at(q3n_cache *c, int length, uint64_t key, uint64_t text)
{
    const int i = q3n__cache_lower(c, length, key, text);
    if (q3n__cache_is(c, i, length, key) && c->items[i].text == text) return i;
    if (!q3n__cache_items_reserve(c)) return -1;
    memmove(c->items + i + 1, c->items + i, (size_t)(c->n_items - i) * sizeof *c->items);
    c->n_items++;
    memset(&c->items[i], 0, sizeof c->items[i]);
    c->items[i].length = length;
    c->items[i].key = key;
    c->items[i].text = text;
    return i;
}

/* Forget an item that is nowhere any more. */
static void q3n__cache_item_tidy(q3n_cache *c, int i)
{
    const q3n__cache_item *e = &c->items[i];
    if (e->snap || e->leaving || e->has_file) return;
    c->n_items--;
    memmove(c->items + i, c->items + i + 1, (size_t)(c->n_items - i) * sizeof *c->items);
}

/* ---- Pages, each counted once ----
 *
 * The snapshots of a chat share their full pages.  The cache has to know what it would
 * give back by dropping one: the pages that no other of its snapshots holds. */

/* Where a page is looked for first; page_room is a power of two. */
static size_t q3n__cache_page_home(const q3n_cache *c, const q3n__page *page)
{
    return (size_t)q3n__mix64((uint64_t)(uintptr_t)page) & (c->page_room - 1);
}

/* The slot of a page, or the free one where it would go.  Ends, as half of the slots are free. */
static size_t q3n__cache_page_slot(const q3n_cache *c, const q3n__page *page)
{
    size_t i = q3n__cache_page_home(c, page);
    while (c->pages[i].page && c->pages[i].page != page) i = (i + 1) & (c->page_room - 1);
    return i;
}

/* Room for n more pages with half of the slots free; 0 = no memory, and the table is as it was.
 * Called before anything is put on the account: q3n__cache_hold cannot fail. */
static int q3n__cache_pages_reserve(q3n_cache *c, size_t n)
{
    size_t room = c->page_room ? c->page_room : 64, bytes;
    while (room / 2 < c->n_pages + n) room *= 2;
    if (room == c->page_room) return 1;
    q3n__cache_page *old = c->pages;
    const size_t old_room = c->page_room;
    if (!q3n__mul_size(room, sizeof *old, &bytes)) return 0;
    q3n__cache_page *pages = (q3n__cache_page *)q3n__alloc(&c->model->allocator, bytes);
    if (!pages) return 0;
    memset(pages, 0, bytes);
    c->pages = pages;
    c->page_room = room;
    for (size_t i = 0; i < old_room; i++)
        if (old[i].page) pages[q3n__cache_page_slot(c, old[i].page)] = old[i];
    q3n__free(&c->model->allocator, old);
    return 1;
}

/* Free a slot without leaving a mark: those after it move up to where they are looked for.  Entry i
 * may go to the hole unless its home lies after the hole, cyclically: then a search for it would
 * begin beyond. */
static void q3n__cache_page_remove(q3n_cache *c, size_t hole)
{
    const size_t mask = c->page_room - 1;
    for (size_t i = (hole + 1) & mask; c->pages[i].page; i = (i + 1) & mask) {
        const size_t home = q3n__cache_page_home(c, c->pages[i].page);
        if (((i - home) & mask) < ((i - hole) & mask)) continue;
        c->pages[hole] = c->pages[i];
        hole = i;
    }
    c->pages[hole].page = NULL;
    c->n_pages--;
}

/* What a page costs: what was allocated for it, by the layers that it has room for, which may be
 * more than the shape of a snapshot says. */
static size_t q3n__cache_page_bytes(const q3n_snapshot *s, int i)
{
    return q3n__with_head(q3n__page_bytes(&s->shape, s->page[i]->n_layers));
}

/* Put a snapshot's bytes and pages on the account; room for its pages is there. */
static void q3n__cache_hold(q3n_cache *c, const q3n_snapshot *s)
{
    c->bytes += q3n__with_head(s->bytes);
    for (int i = 0; i < s->n_pages; i++) {
        q3n__cache_page *p = &c->pages[q3n__cache_page_slot(c, s->page[i])];
        if (!p->page) {
            c->bytes += q3n__cache_page_bytes(s, i);
            c->n_pages++;
            p->page = s->page[i];
            p->n = 0;
        }
        p->n++;
    }
}

/* The reverse: a page goes off the account with the last snapshot that holds it. */
static void q3n__cache_unhold(q3n_cache *c, const q3n_snapshot *s)
{
    c->bytes -= q3n__with_head(s->bytes);
    for (int i = 0; i < s->n_pages; i++) {
        const size_t slot = q3n__cache_page_slot(c, s->page[i]);
        if (--c->pages[slot].n > 0) continue;
        c->bytes -= q3n__cache_page_bytes(s, i);
        q3n__cache_page_remove(c, slot);
    }
}

/* ---- Directory ----
 *
 * A file's name is its item: q3n-<key>-<text>-<length>.session, numbers of 16 hexadecimal digits
 * and one of decimal ones; nothing else is kept there, so several processes may use one directory.
 * A name is a hint: length, kind of state and every token are checked when the file is read. */
#define Q3N__CACHE_PATH      4096
#define Q3N__CACHE_NAME      64
#define Q3N__CACHE_MAX_FILES 65536      /* that are taken note of                               */
#define Q3N__CACHE_MAX_FILE_BYTES ((int64_t)1 << 46)   /* of each: then their sum fits 63 bits   */
#define Q3N__CACHE_STALE      86400      /* seconds after which an unfinished file is abandoned  */

static void q3n__cache_name(const q3n__cache_item *e, char name[Q3N__CACHE_NAME])
{
    snprintf(name, Q3N__CACHE_NAME, "q3n-%016llx-%016llx-%d.session", (unsigned long long)e->key,
             (unsigned long long)e->text, e->length);
}

/* Always whole: q3n__cache_scan refuses directories whose name leaves no room for a file's. */
static void q3n__cache_path(const q3n_cache *c, const char *name, char path[Q3N__CACHE_PATH])
{
    snprintf(path, Q3N__CACHE_PATH, "%s/%s", c->directory, name);
}

/* The item of a file's name: 0 if q3n__cache_name does not make it.  What strtoull lets pass
 * (signs, blanks, overflow) makes another name and is refused by that. */
static int q3n__cache_parse(const char *name, q3n__cache_item *e)
{
    char again[Q3N__CACHE_NAME];
    memset(e, 0, sizeof *e);
    if (strlen(name) < 39) return 0;     /* "q3n-", 16 digits, "-", 16 digits, "-", a digit */
    e->key = strtoull(name + 4, NULL, 16);
    e->text = strtoull(name + 21, NULL, 16);
    const long long length = strtoll(name + 38, NULL, 10);
    if (length < 0 || length > INT_MAX) return 0;
    e->length = (int)length;
    q3n__cache_name(e, again);
    return strcmp(name, again) == 0;
}

/* Forget the item's file, and the item if that was all of it. */
static void q3n__cache_file_forget(q3n_cache *c, int i)
{
    q3n__cache_item *e = &c->items[i];
    c->n_files--;
    c->file_bytes -= e->file_bytes;
    e->has_file = 0;
    q3n__cache_item_tidy(c, i);
}

/* The item's file is there now; 0 = no memory to take note of it.  The item may have gone while the
 * file was written, or have been found meanwhile: it is looked for again. */
static int q3n__cache_file_note(q3n_cache *c, const q3n__cache_item *file)
{
    const int i = q3n__cache_item_at(c, file->length, file->key, file->text);
    if (i < 0) return 0;
    q3n__cache_item *e = &c->items[i];
    if (e->has_file) c->file_bytes -= e->file_bytes;
    else             c->n_files++;
    c->file_bytes += file->file_bytes;
    e->has_file = 1;
    e->marked |= file->marked;
    e->file_bytes = file->file_bytes;
    e->file_time = file->file_time;
    e->file_order = ++c->file_order;
    return 1;
}

/* Older files first. */
static int q3n__cache_compare_age(const void *left, const void *right)
{
    const q3n__cache_item *a = (const q3n__cache_item *)left, *b = (const q3n__cache_item *)right;
    if (a->file_time != b->file_time) return a->file_time < b->file_time ? -1 : 1;
    return a->file_order == b->file_order ? 0 : a->file_order < b->file_order ? -1 : 1;
}

/* The item with the oldest file, -1 = none.  One walk over all items. */
static int q3n__cache_oldest_file(const q3n_cache *c)
{
    int oldest = -1;
    for (int i = 0; i < c->n_items; i++)
        if (c->items[i].has_file
            && (oldest < 0 || q3n__cache_compare_age(&c->items[i], &c->items[oldest]) < 0))
            oldest = i;
    return oldest;
}

/* Delete the item's file, if it is still there.  e is a copy: called without the lock. */
static void q3n__cache_file_remove(const q3n_cache *c, const q3n__cache_item *e)
{
    char name[Q3N__CACHE_NAME], path[Q3N__CACHE_PATH];
    q3n__cache_name(e, name);
    q3n__cache_path(c, name, path);
    q3n__file_remove(path);
}

/* Delete the oldest files until `bytes` more fit, and reserve these in pending_bytes, so that
 * threads that write at once do not count on the same room; 0 = they do not fit at all.  One file a
 * turn: forgotten under the lock, deleted without it.  Called without the lock. */
static int q3n__cache_make_room(q3n_cache *c, int64_t bytes)
{
    const int64_t max = c->max_directory_bytes > 0 ? c->max_directory_bytes : INT64_MAX;
    for (;;) {
        q3n__cache_item e;
        q3n__mutex_lock(&c->mutex);
        const int fits = bytes <= max - c->file_bytes - c->pending_bytes;
        const int oldest = fits || bytes > max ? -1 : q3n__cache_oldest_file(c);
        if (fits) c->pending_bytes += bytes;
        if (oldest >= 0) {
            e = c->items[oldest];
            q3n__cache_file_forget(c, oldest);
        }
        q3n__mutex_unlock(&c->mutex);
        if (oldest < 0) return fits;
        q3n__cache_file_remove(c, &e);
    }
}

/* Write a snapshot that has left the memory; e, a copy of its item, gets size and time.  What
 * cannot be written is a warning and a lost state.  Called without the lock. */
static void q3n__cache_store(q3n_cache *c, q3n__cache_item *e, const q3n_snapshot *s)
{
    char name[Q3N__CACHE_NAME], path[Q3N__CACHE_PATH];
    q3n_error err;
    e->file_bytes = (int64_t)q3n__snapshot_file_bytes(s);
    if (!q3n__cache_make_room(c, e->file_bytes)) return;
    q3n__cache_name(e, name);
    q3n__cache_path(c, name, path);
    const q3n_result r = q3n__snapshot_save(s, path, &err);
    if (r != Q3N_OK) q3n__log(&c->logger, Q3N_LOG_WARNING, "cache: %s", err.message);
    e->file_time = (int64_t)time(NULL);
    q3n__mutex_lock(&c->mutex);
    c->pending_bytes -= e->file_bytes;
    const int lost = r == Q3N_OK && !q3n__cache_file_note(c, e);
    q3n__mutex_unlock(&c->mutex);
    if (lost) q3n__file_remove(path);
}

/* Read the file of an item, whose text tokens [length] should be.  NULL = there is none any more,
 * or it holds something else: then it is forgotten.  Damaged files are deleted; those of another
 * model or version stay, for somebody else may want them.  Without memory nothing is forgotten.
 * Called without the lock, so the item is looked for again before it is changed. */
static q3n_snapshot *q3n__cache_load(q3n_cache *c, const q3n__cache_item *e,
                                     const q3n__shape *shape, const int32_t *tokens)
{
    char name[Q3N__CACHE_NAME], path[Q3N__CACHE_PATH];
    q3n_snapshot *s;
    q3n_error err;
    q3n__cache_name(e, name);
    q3n__cache_path(c, name, path);
    uint64_t key[2] = { 0, 0 };
    q3n_result r = q3n__snapshot_open(&s, c->model, shape, e->length, path, &err);
    if (r == Q3N_OK) q3n__cache_keys(c, shape, s->delta_type, key);
    if (r == Q3N_OK && (s->length != e->length || (e->key != key[0] && e->key != key[1])
                        || !q3n__snapshot_is_prefix(s, tokens, e->length))) {
        q3n__snapshot_release(s);
        s = NULL;
        r = q3n__fail(&err, Q3N_ERR_UNSUPPORTED, -1, "%s: holds another text than its name"
                      " says", path);
    }
    if (r == Q3N_OK || r == Q3N_ERR_MEMORY) return s;
    if (r != Q3N_ERR_NO_FILE) q3n__log(&c->logger, Q3N_LOG_WARNING, "cache: %s", err.message);
    if (r == Q3N_ERR_FORMAT || r == Q3N_ERR_CHECKSUM) q3n__file_remove(path);
    q3n__mutex_lock(&c->mutex);
    const int i = q3n__cache_lower(c, e->length, e->key, e->text);
    if (q3n__cache_is(c, i, e->length, e->key) && c->items[i].text == e->text
        && c->items[i].has_file)
        q3n__cache_file_forget(c, i);
    q3n__mutex_unlock(&c->mutex);
    return NULL;
}

/* A file of the directory: appended; q3n__cache_scan sorts.  Names do not say whether a state was
 * marked, so all that are found count as marked.  Unfinished files of processes that were killed
 * are deleted when they are a day old; younger ones may be under way. */
static void q3n__cache_found(void *user, const char *name, int64_t bytes, int64_t when)
{
    q3n_cache *c = (q3n_cache *)user;
    q3n__cache_item e;
    if (q3n__cache_parse(name, &e)) {
        if (c->n_items >= Q3N__CACHE_MAX_FILES || !q3n__cache_items_reserve(c)) return;
        e.marked = 1;
        e.has_file = 1;
        e.file_bytes = bytes < Q3N__CACHE_MAX_FILE_BYTES ? bytes : Q3N__CACHE_MAX_FILE_BYTES;
        e.file_time = when;
        e.file_order = ++c->file_order;
        c->items[c->n_items++] = e;
        c->n_files++;
        c->file_bytes += e.file_bytes;
        return;
    }
    const size_t n = strlen(name);       /* ends with ".session.", 16 digits, ".part" */
    if (n > 30 && strncmp(name + n - 30, ".session.", 9) == 0 && strcmp(name + n - 5, ".part") == 0
        && when < (int64_t)time(NULL) - Q3N__CACHE_STALE) {
        char path[Q3N__CACHE_PATH];
        q3n__cache_path(c, name, path);
        q3n__file_remove(path);
    }
}

/* Take note of the directory's files, before the cache has other items; a directory that cannot be
 * read is done without.  First the oldest are deleted that exceed the bound, so they are sorted by
 * age, and then as items are. */
static void q3n__cache_scan(q3n_cache *c)
{
    q3n_error err;
    const q3n_result r = strlen(c->directory) > Q3N__CACHE_PATH - 512
        ? q3n__fail(&err, Q3N_ERR_ARG, -1, "%s: the path is too long", c->directory)
        : q3n__input_list(c->directory, "q3n-", q3n__cache_found, c, &err);
    if (r != Q3N_OK) {
        q3n__log(&c->logger, Q3N_LOG_WARNING, "cache: %s (going on without it)", err.message);
        c->directory = NULL;
        return;
    }
    if (c->n_items == 0) return;
    if (c->n_items >= Q3N__CACHE_MAX_FILES)
        q3n__log(&c->logger, Q3N_LOG_WARNING, "cache: %s: more than %d files, the others are"
                 " not used", c->directory, Q3N__CACHE_MAX_FILES);
    int gone = 0;
    q3n__sort(c->items, (size_t)c->n_items, sizeof *c->items, q3n__cache_compare_age);
    for (; c->max_directory_bytes > 0 && c->file_bytes > c->max_directory_bytes; gone++) {
        q3n__cache_file_remove(c, &c->items[gone]);
        c->file_bytes -= c->items[gone].file_bytes;
    }
    c->n_files = c->n_items -= gone;
    memmove(c->items, c->items + gone, (size_t)c->n_items * sizeof *c->items);
    q3n__sort(c->items, (size_t)c->n_items, sizeof *c->items, q3n__cache_compare);
}

/* ---- What leaves the memory ---- */

/* Take an item's snapshot off the account, under the lock; q3n__cache_drain writes and releases it.
 * Until then the item does not serve, unless it has a file.  One that is leaving already gives way
 * to the newer state of its text. */
static void q3n__cache_drop(q3n_cache *c, int i)
{
    q3n__cache_item *e = &c->items[i];
    q3n__cache_unhold(c, e->snap);
    if (e->leaving) q3n__snapshot_release(e->leaving);
    else            c->n_leaving++;
    e->leaving = e->snap;
    e->snap = NULL;
}

/* The item in memory that goes first, -1 = none: unmarked before marked, among equals the one that
 * was not used for the longest.  One walk over all items. */
static int q3n__cache_victim(const q3n_cache *c)
{
    int first = -1;
    for (int i = 0; i < c->n_items; i++) {
        const q3n__cache_item *e = &c->items[i], *f = &c->items[first < 0 ? 0 : first];
        if (e->snap && (first < 0 || e->marked < f->marked
                        || (e->marked == f->marked && e->used < f->used)))
            first = i;
    }
    return first;
}

/* Write and release what was dropped, oldest first.  Called without the lock, by whoever dropped
 * it: the thread that put a state pays for what had to go.  Several may drain at once, for each
 * takes its items out under the lock.  A text that has a file already is not written again. */
static void q3n__cache_drain(q3n_cache *c)
{
    for (;;) {
        q3n__cache_item e;
        int oldest = -1;
        q3n__mutex_lock(&c->mutex);
        for (int i = 0; i < c->n_items && c->n_leaving > 0; i++)
            if (c->items[i].leaving && (oldest < 0 || c->items[i].used < c->items[oldest].used))
                oldest = i;
        if (oldest >= 0) {
            e = c->items[oldest];
            c->items[oldest].leaving = NULL;
            c->n_leaving--;
            q3n__cache_item_tidy(c, oldest);
        }
        q3n__mutex_unlock(&c->mutex);
        if (oldest < 0) return;
        if (c->directory && !e.has_file) q3n__cache_store(c, &e, e.leaving);
        q3n__snapshot_release(e.leaving);
    }
}

/* ---- For sessions ---- */

/* Take in a snapshot, unless its text is there; takes its own reference.  Where another text has
 * the same hash the newer one stays.  Any thread.  Does nothing without memory, or if the snapshot
 * by itself is more than max_bytes: a cache is no promise to remember.  The loop ends: with
 * everything but this snapshot dropped, bytes is `alone`; and it is dropped itself if all others
 * are marked. */
static void q3n__cache_put(q3n_cache *c, q3n_snapshot *snap, int marked)
{
    const uint64_t key = q3n__cache_key(c, &snap->shape, snap->delta_type);
    const uint64_t text = q3n__snapshot_text(snap);
    size_t alone = q3n__with_head(snap->bytes);
    for (int i = 0; i < snap->n_pages; i++) alone += q3n__cache_page_bytes(snap, i);
    Q3N_ASSERT(snap->model == c->model);
    if (alone > c->max_bytes) return;
    q3n__mutex_lock(&c->mutex);
    const int i = q3n__cache_pages_reserve(c, (size_t)snap->n_pages)
                ? q3n__cache_item_at(c, snap->length, key, text) : -1;
    if (i >= 0) {
        q3n__cache_item *e = &c->items[i];
        if (e->snap && !q3n__snapshot_same_text(e->snap, snap)) q3n__cache_drop(c, i);
        e->marked |= marked;
        e->used = ++c->clock;
        if (!e->snap) {
            q3n__snapshot_retain(snap);
            e->snap = snap;
            q3n__cache_hold(c, snap);
        }
        /* There is a victim: without any in memory bytes is 0. */
        while (c->bytes > c->max_bytes) {
            q3n__cache_drop(c, q3n__cache_victim(c));
            c->n_evicted++;
        }
    }
    q3n__mutex_unlock(&c->mutex);
    q3n__cache_drain(c);
}

/* Whether exactly this text is in memory; then it counts as used, and is marked if marked.  Spares
 * a session the making of a snapshot that the cache has.  Hashes the tokens only if there is an
 * item of that length. */
static int q3n__cache_touch(q3n_cache *c, const q3n__shape *shape, q3n_type delta_type,
                            const int32_t *tokens, int n, int marked)
{
    const uint64_t key = q3n__cache_key(c, shape, delta_type);
    int found = 0;
    q3n__mutex_lock(&c->mutex);
    int i = q3n__cache_lower(c, n, key, 0);
    if (q3n__cache_is(c, i, n, key)) {
        const uint64_t text = q3n__mix64(q3n__text_chain(Q3N__TEXT_START, tokens, n));
        i = q3n__cache_lower(c, n, key, text);
        q3n__cache_item *e = &c->items[i];
        found = q3n__cache_is(c, i, n, key) && e->text == text && e->snap
              && q3n__snapshot_is_prefix(e->snap, tokens, n);
        if (found) {
            e->marked |= marked;
            e->used = ++c->clock;
        }
    }
    q3n__mutex_unlock(&c->mutex);
    return found;
}

/* The longest item whose hash is that of the first tokens, more than min and at most n of them, of
 * equals the one under the first key; -1 = none.  With files 0 it must be in memory.  One walk over
 * the tokens, as far as there are items.  Under the lock. */
static int q3n__cache_longest(const q3n_cache *c, const uint64_t key[2], const int32_t *tokens,
                              int n, int min, int files)
{
    uint64_t chain = Q3N__TEXT_START;
    int longest = -1, done = 0;
    for (int i = q3n__cache_lower(c, min + 1, 0, 0); i < c->n_items; i++) {
        const q3n__cache_item *e = &c->items[i];
        if (e->length > n) break;
        if ((e->key != key[0] && e->key != key[1]) || (!e->snap && !(files && e->has_file)))
            continue;
        chain = q3n__text_chain(chain, tokens + done, e->length - done);
        done = e->length;
        if (q3n__mix64(chain) != e->text) continue;
        if (longest < 0 || c->items[longest].length < e->length || e->key == key[0]) longest = i;
    }
    return longest;
}

/* Files that one search reads: a hostile directory may have one of each length, none of which holds
 * what its name says. */
#define Q3N__CACHE_TRIES 8

/* The longest snapshot for this shape, of more than min and at most n tokens, whose text is a
 * prefix of tokens [n], with a reference for the caller; NULL = none.  Its shape may differ in
 * has_mtp.  A file is read where it is longer than what is in memory; if it does not serve, the
 * search goes on with shorter items, after Q3N__CACHE_TRIES files with those in memory.
 * n_hits counts what was found; else n_own the calls of sessions with `min` > 0 tokens of their own
 * to go on from, n_misses the others. */
static q3n_snapshot *q3n__cache_find(q3n_cache *c, const q3n__shape *shape, q3n_type delta_type,
                                     const int32_t *tokens, int n, int min)
{
    uint64_t key[2];
    q3n_snapshot *snap = NULL;
    int files = Q3N__CACHE_TRIES;
    q3n__cache_keys(c, shape, delta_type, key);
    for (int max = n; !snap;) {
        q3n__cache_item e;
        q3n__mutex_lock(&c->mutex);
        const int i = q3n__cache_longest(c, key, tokens, max, min, files);
        if (i >= 0) {
            e = c->items[i];
            if (e.snap && q3n__snapshot_is_prefix(e.snap, tokens, n)) {
                snap = e.snap;
                q3n__snapshot_retain(snap);
                c->items[i].used = ++c->clock;
            }
        }
        q3n__mutex_unlock(&c->mutex);
        if (i < 0) break;
        max = e.length - 1;
        if (snap || !e.has_file || files == 0) continue;
        files--;
        snap = q3n__cache_load(c, &e, shape, tokens);
        if (snap) q3n__cache_put(c, snap, e.marked);
    }
    q3n__mutex_lock(&c->mutex);
    if (snap)         c->n_hits++;
    else if (min > 0) c->n_own++;
    else              c->n_misses++;
    q3n__mutex_unlock(&c->mutex);
    return snap;
}

/* ---- Public functions ---- */
Q3N_DEF q3n_result q3n_cache_create(q3n_cache **out, const q3n_model *m,
                                    const q3n_cache_options *in, q3n_error *err)
{
    if (!out) return q3n__fail(err, Q3N_ERR_ARG, -1, "no place for the cache");
    *out = NULL;
    if (!m || !in) return q3n__fail(err, Q3N_ERR_ARG, -1, "no model, or no options of the cache");
    q3n_cache_options o;
    const q3n_result r = q3n__struct_read(&o, sizeof o, in, "q3n_cache_options", err);
    if (r != Q3N_OK) return r;
    if (o.max_directory_bytes < 0)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "max_directory_bytes is %lld, expected 0 or more",
                         (long long)o.max_directory_bytes);
    const size_t path_bytes = o.directory ? strlen(o.directory) + 1 : 0;
    q3n_cache *c = (q3n_cache *)q3n__alloc(&m->allocator, sizeof *c + path_bytes);
    if (!c) return q3n__fail(err, Q3N_ERR_MEMORY, -1, "no memory for a cache");
    memset(c, 0, sizeof *c);
    if (!q3n__mutex_init(&c->mutex)) {
        q3n__free(&m->allocator, c);
        return q3n__fail(err, Q3N_ERR_THREAD, -1, "no mutex");
    }
    c->model = m;
    c->max_bytes = o.max_bytes ? o.max_bytes : Q3N__CACHE_BYTES;
    c->max_directory_bytes = o.max_directory_bytes;
    c->logger = o.logger;
    if (o.directory) {
        memcpy(c + 1, o.directory, path_bytes);
        c->directory = (const char *)(c + 1);
        c->model_hash = q3n__mix64(q3n__model_hash(m) ^ m->bytes);
        q3n__cache_scan(c);
    }
    *out = c;
    return Q3N_OK;
}

/* One state at a time: a directory gets those that have no file yet, and memory is not needed. */
Q3N_DEF void q3n_cache_clear(q3n_cache *c)
{
    if (!c) return;
    for (int i = 0; i >= 0; ) {
        q3n__mutex_lock(&c->mutex);
        i = q3n__cache_victim(c);
        if (i >= 0) q3n__cache_drop(c, i);
        q3n__mutex_unlock(&c->mutex);
        q3n__cache_drain(c);
    }
}

Q3N_DEF void q3n_cache_destroy(q3n_cache *c)
{
    if (!c) return;
    q3n_cache_clear(c);
    q3n__free(&c->model->allocator, c->pages);
    q3n__free(&c->model->allocator, c->memory.data);
    q3n__mutex_free(&c->mutex);
    q3n__free(&c->model->allocator, c);
}

Q3N_DEF q3n_result q3n_cache_stats_get(q3n_cache *c, q3n_cache_stats *out)
{
    if (!c || !out) return Q3N_ERR_ARG;
    q3n__mutex_lock(&c->mutex);
    q3n_cache_stats stats = { .bytes = c->bytes, .n_files = c->n_files,
                              .file_bytes = c->file_bytes, .n_hits = c->n_hits,
                              .n_misses = c->n_misses, .n_evicted = c->n_evicted,
                              .n_own = c->n_own };
    for (int i = 0; i < c->n_items; i++) stats.n_entries += c->items[i].snap != NULL;
    q3n__mutex_unlock(&c->mutex);
    return q3n__struct_write(out, sizeof stats, &stats);
}

/* =====================================================================================
 * [23] ENGINE                                                                >>engine
 *
 * What evaluates: threads, kernels and the scratch of one pass, in one allocation that is measured
 * first and then handed out.  A session makes one for itself, or many are given the same.  Options
 * of engines and sessions.  Who owns whom:
 *
 *     q3n_model       weights, configuration, vocabulary: all read it, nobody changes it
 *        ^    ^
 *        |    +--------------------------------+
 *        |                                     |
 *     q3n_engine  <- owns one, or uses -  q3n_session  - owns one, or none ->  q3n_sampler
 *       threads, kernels, costs             a text and its state: pages of       options, random
 *       q3n__pass: activations of a         keys and values, matrices, rows      numbers, last
 *       pass, gone with the next            what drafts have taught it           tokens
 *                                           |    ^
 *                                     takes v    | restores
 *                                         q3n_snapshot  <- finds by its text -  q3n_cache
 *                                           a state that does not change;        of many sessions,
 *                                           pages are counted and shared         on any threads
 *                                           |    ^
 *                                    writes v    | reads
 *                                         session file
 *
 * Who calls whom, only downwards, and so the sections stand in the file, the last one first:
 *
 *     PUBLIC         checks arguments and delegates
 *     SPECULATION    decode: drafts, one pass over them, commit of what was right
 *     REUSE          prefill and rewind: where a text begins
 *     EVALUATION     calls of one session or many; alone calls the model's forward
 *     CHECKPOINTS    a session's snapshots, into the cache and out of it
 *     MTP            the module's keys and drafts; alone calls the module's forward
 *     SESSION        a text, and what a call does beside it until it commits
 *     SAMPLER   ENGINE   CACHE        no session's inside; of these no one knows another
 *     MODEL     STATE                 one pass over rows; what can be kept
 *
 * An engine and its sessions belong to one thread at a time: their calls follow one another, and so
 * one scratch serves all.  What other threads may touch is atomic: requests to cancel, counts of
 * pages and snapshots; and the cache, which has a lock.
 * ===================================================================================== */

/* Measured microseconds of passes, by their rows: bounded calls are planned by them.  They are of
 * this machine under what it has to do now, and of whichever sessions came; nothing but the cut of
 * passes hangs on them, and that changes no bit. */
#define Q3N__COST_ROWS 16
typedef struct {
    double pass[Q3N__COST_ROWS + 1];  /* by rows; 0 = not known                                   */
    double row;                       /* one row of longer passes; 0 = not known                  */
} q3n__costs;

/* The next n tokens of one session in a pass.  last: the call takes no more of this session, so
 * that its rows may be left pending, and the logits wanted are those of its last row. */
typedef struct {
    q3n_session   *s;
    const int32_t *tokens;
    int            n, last;
    int            item;              /* of the call                                              */
} q3n__chunk;

struct q3n_engine {
    const q3n_model    *model;
    q3n_engine_options  options;      /* with the defaults filled in                              */
    int                 has_mtp;
    int                 logit_rows;   /* of `logits`                                              */
    q3n__kernels        kernels;
    q3n__pool           pool;
    q3n__pass           run;
    q3n__segment       *segments;     /* [batch]                                                  */
    int32_t            *tokens;       /* [batch] of a pass                                        */
    float              *hidden;       /* [1 + batch, d] with an MTP module: the trunk's rows, one
                                         row further down                                         */
    float              *row;          /* [d] for q3n__mtp_follow                                  */
    float              *gathered;     /* [logit_rows, d] rows whose logits are wanted             */
    float              *logits;       /* [logit_rows, vocab]                                      */
    void               *split;        /* partial results of split attention, grows               */
    q3n__atomic         cancel;       /* Q3N__IDLE, RUNNING or CANCELLED: the call under way      */
    q3n__costs          costs;
    q3n_error           error;
    q3n__chunk         *chunks;       /* [batch] of a pass                                        */
    int                 turn;         /* item whose turn is first if a pass has no room for all   */
};

/* ---- Options and memory ---- */

/* Sizes of a session are multiplied freely: refuse those that a size_t of 32 bits does not hold.
 * Every array is then at most `limit` bytes, SIZE_MAX / 4 but in tests; with 64 bits
 * (Q3N_CONFIG_LIST) all are.  The arrays: a pass's widest activations, pages, states, what
 * attention has of single blocks. */
static q3n_result q3n__check_sizes(const q3n_config *c, const q3n_engine_options *o, int capacity,
                                   uint64_t limit, q3n_error *err)
{
    const uint64_t layers = (uint64_t)c->num_hidden_layers + 1, D = (uint64_t)c->head_dim;
    const uint64_t HD = D * (uint64_t)c->num_attention_heads;
    const uint64_t v = (uint64_t)c->linear_num_value_heads * (uint64_t)c->linear_value_head_dim;
    const uint64_t C = (uint64_t)q3n__config_channels(c), n = (uint64_t)o->batch_size;
    const uint64_t experts = ((uint64_t)c->num_experts_per_tok + 1)
                           * (uint64_t)c->moe_intermediate_size
                           + 2 * (uint64_t)c->shared_expert_intermediate_size;
    const uint64_t floats[] = {
        n * 2 * HD, n * (C + v), n * experts, n * (uint64_t)c->intermediate_size,
        n * 2 * (uint64_t)c->hidden_size, n * (uint64_t)c->num_experts,
        layers * (uint64_t)c->num_key_value_heads * (2 * D + 2) * Q3N__KV_BLOCK,
        layers * v * (uint64_t)c->linear_key_head_dim, layers * 16 * C,
        o->n_threads == 1 ? 0 : 4 * (HD + 2 * (uint64_t)c->num_attention_heads)
                                * ((uint64_t)capacity / (Q3N__KV_BLOCK / 2) + 4),
    };
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++)
        if (floats[i] > limit / sizeof(float))
            return q3n__fail(err, Q3N_ERR_MEMORY, -1, "batch_size %d and capacity %d take arrays "
                             "of %llu bytes, this machine has at most %llu", o->batch_size,
                             capacity, (unsigned long long)(floats[i] * sizeof(float)),
                             (unsigned long long)limit);
    return Q3N_OK;
}

/* Fill in defaults; an error if the options cannot be. */
static q3n_result q3n__engine_options_set(const q3n_model *m, const q3n_engine_options *in,
                                          q3n_engine_options *o, q3n_error *err)
{
    q3n_result r = q3n__struct_read(o, sizeof *o, in, "q3n_engine_options", err);
    if (r == Q3N_OK) r = q3n__check_zero(o->zero, "q3n_engine_options", err);
    if (r != Q3N_OK) return r;
    if (o->batch_size == 0) o->batch_size = 512;
    if (o->executor.run) o->n_threads = o->executor.n_threads;
    else if (o->n_threads == 0) o->n_threads = q3n__cpu_count();
    if (!Q3N__HAS_THREADS && !o->executor.run) o->n_threads = 1;
    if (o->batch_size < 1 || o->batch_size > (1 << 16))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "a batch of %d tokens: expected 1 .. 65536",
                         o->batch_size);
    if (o->n_threads < 1 || o->n_threads > 1024)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "%d threads: expected 1 .. 1024", o->n_threads);
    if (o->isa == Q3N_ISA_AUTO) o->isa = q3n_isa_best();
    if (!q3n_isa_name(o->isa))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "isa %d is no instruction set", (int)o->isa);
    if (!q3n_isa_supported(o->isa))
        return q3n__fail(err, Q3N_ERR_UNSUPPORTED, -1, "%s is not compiled in, or not of this "
                         "processor and system: the best here is %s", q3n_isa_name(o->isa),
                         q3n_isa_name(q3n_isa_best()));
    return q3n__check_sizes(&m->config, o, 0, SIZE_MAX / 4, err);
}

/* Options of the engine that evaluates: the given one, or one that the session makes. */
static q3n_result q3n__session_engine_options(const q3n_model *m, const q3n_session_options *o,
                                              q3n_engine_options *e, q3n_error *err)
{
    if (o->engine) {
        *e = o->engine->options;
        return Q3N_OK;
    }
    q3n_engine_options own;
    const q3n_result r = q3n__struct_read(&own, sizeof own, o->engine_options,
                                          "q3n_engine_options", err);
    if (r != Q3N_OK) return r;
    /* A model that attends both ways takes a text whole. */
    if (own.batch_size == 0) own.batch_size = m->config.causal ? 512 : 65536;
    if (own.batch_size > o->capacity) own.batch_size = o->capacity;
    return q3n__engine_options_set(m, &own, e, err);
}

/* Fill in defaults of o, and the options of the engine that is to evaluate. */
static q3n_result q3n__session_options_set(const q3n_model *m, const q3n_session_options *in,
                                           q3n_session_options *o, q3n_engine_options *engine,
                                           q3n_error *err)
{
    const q3n_config *c = &m->config;
    q3n_result r = q3n__struct_read(o, sizeof *o, in, "q3n_session_options", err);
    if (r == Q3N_OK) r = q3n__check_zero(o->zero, "q3n_session_options", err);
    if (r != Q3N_OK) return r;
    if (o->capacity == 0)
        o->capacity = c->rope_type == Q3N_ROPE_TABLE
                        && m->weights.rope_positions < c->max_position_embeddings
                    ? m->weights.rope_positions : c->max_position_embeddings;
    if (o->capacity < 1 || o->capacity > (1 << 30))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "capacity %d: expected 1 .. 2^30 tokens",
                         o->capacity);
    if ((unsigned)o->kv_type >= Q3N_TYPE_COUNT
        || (q3n__is_quantised(o->kv_type) && o->kv_type != Q3N_TYPE_Q8))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "KV cache type must be f32, f16, bf16 or q8");
    if (o->snapshot_type != Q3N_TYPE_F32 && o->snapshot_type != Q3N_TYPE_BF16)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "snapshot_type must be f32 or bf16");
    if ((unsigned)o->speculate >= Q3N_SPECULATE_COUNT || o->draft < 0 || o->draft > Q3N_MAX_DRAFT
        || o->snapshot_every < 0)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "speculate %d, draft %d, snapshot_every %d: out of "
                         "range", (int)o->speculate, o->draft, o->snapshot_every);
    if (o->speculate == Q3N_SPECULATE_MTP && c->num_mtp_layers == 0)
        return q3n__fail(err, Q3N_ERR_UNSUPPORTED, -1,
                         "the model has no multi-token-prediction module: choose speculate AUTO "
                         "or LOOKUP");
    if (o->engine && o->engine_options)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "an engine, and options of another: leave one out");
    if (c->rope_type == Q3N_ROPE_TABLE && o->capacity > m->weights.rope_positions)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "capacity %d: the model's rotary tables end at %d",
                         o->capacity, m->weights.rope_positions);
    r = q3n__session_engine_options(m, o, engine, err);
    return r != Q3N_OK ? r : q3n__check_sizes(c, engine, o->capacity, SIZE_MAX / 4, err);
}

static int q3n__wants_mtp(const q3n_model *m, const q3n_session_options *o)
{
    return m->config.num_mtp_layers > 0 && (o->speculate == Q3N_SPECULATE_MTP
                                            || o->speculate == Q3N_SPECULATE_AUTO);
}

/* The quantised copies of inputs, for models that have quantised matrices: one of each input that a
 * matrix reads, as wide as the widest. */
static void q3n__run_layout_quantised(q3n__arena *a, q3n_engine *e)
{
    const q3n_config *c = &e->model->config;
    q3n__pass *r = &e->run;
    const size_t n = (size_t)e->options.batch_size, k = (size_t)c->num_experts_per_tok;
    const int HD = c->num_attention_heads * c->head_dim;
    const int v = c->linear_num_value_heads * c->linear_value_head_dim, d = c->hidden_size;
    const int mixed = HD > v ? HD : v;
    r->a_q = (q3n__x8 *)q3n__arena_take(a, n, sizeof *r->a_q * (size_t)q3n__x8_blocks(d));
    r->mixed_q = (q3n__x8 *)q3n__arena_take(
        a, n, sizeof *r->mixed_q * (size_t)q3n__x8_blocks(mixed > d ? mixed : d));
    const size_t experts = k * (size_t)q3n__x8_blocks(c->moe_intermediate_size)
                         + (size_t)q3n__x8_blocks(c->shared_expert_intermediate_size);
    const size_t dense = (size_t)q3n__x8_blocks(c->intermediate_size);
    r->ffn_q = (q3n__x8 *)q3n__arena_take(a, n, sizeof *r->ffn_q
                                                * (experts > dense ? experts : dense));
    if (e->has_mtp)
        r->mtp_in_q = (q3n__x8 *)q3n__arena_take(
            a, n, sizeof *r->mtp_in_q * (size_t)q3n__x8_blocks(2 * d));
}

/* Activations of a pass of at most e->options.batch_size tokens; see q3n__pass.  Experts have k
 * rows for each token; those of the shared expert lie after them at a multiple of its own width,
 * for which one row more is taken. */
static void q3n__run_layout(q3n__arena *a, q3n_engine *e)
{
    const q3n_config *c = &e->model->config;
    q3n__pass *r = &e->run;
    const size_t n = (size_t)e->options.batch_size, f = sizeof(float), d = (size_t)c->hidden_size;
    const size_t D = (size_t)c->head_dim, H = (size_t)c->num_attention_heads;
    const size_t KD = (size_t)c->num_key_value_heads * D, C = (size_t)q3n__config_channels(c);
    const size_t Hv = (size_t)c->linear_num_value_heads, v = Hv * (size_t)c->linear_value_head_dim;
    const size_t q_rows = H * D * (c->attn_output_gate ? 2 : 1);
    const size_t E = (size_t)c->num_experts, k = (size_t)c->num_experts_per_tok;
    const size_t Is = (size_t)c->shared_expert_intermediate_size;
    r->max = e->options.batch_size;
    r->x = (float *)q3n__arena_take(a, n * d, f);
    r->a = (float *)q3n__arena_take(a, n * d, f);
    r->b = (float *)q3n__arena_take(a, n * d, f);
    r->proj  = (float *)q3n__arena_take(a, n, f * (q_rows > C + v ? q_rows : C + v));
    r->mixed = (float *)q3n__arena_take(a, n, f * (H * D > v ? H * D : v));
    r->key   = (float *)q3n__arena_take(a, n, f * KD);
    r->value = (float *)q3n__arena_take(a, n, f * KD);
    r->q     = (float *)q3n__arena_take(a, n, f * H * D);
    r->attn  = (float *)q3n__arena_take(a, n, f * H * D);
    r->rope_cos = (float *)q3n__arena_take(a, n, f * (size_t)c->rotary_dim / 2);
    r->rope_sin = (float *)q3n__arena_take(a, n, f * (size_t)c->rotary_dim / 2);
    r->u  = (float *)q3n__arena_take(a, n, f * C);
    r->ba = (float *)q3n__arena_take(a, n, f * 2 * Hv);
    r->router        = (float *)q3n__arena_take(a, n, f * E);
    r->top           = (int *)q3n__arena_take(a, n, sizeof(int) * k);
    r->top_weight    = (float *)q3n__arena_take(a, n, f * k);
    r->expert_row    = (int *)q3n__arena_take(a, n, sizeof(int) * k);
    r->expert_weight = (float *)q3n__arena_take(a, n, f * k);
    r->expert_first  = (int *)q3n__arena_take(a, E + 1, sizeof(int));
    r->shared_weight = (float *)q3n__arena_take(a, n, f);
    r->ffn           = (q3n__ffn *)q3n__arena_take(a, E + 1, sizeof *r->ffn);
    size_t experts = 0;
    if (!q3n__mul_size(n * k, (size_t)c->moe_intermediate_size, &experts)
        || !q3n__add_size(experts, (n + 1) * Is, &experts)) a->overflow = 1;
    const size_t dense = n * (size_t)c->intermediate_size;
    r->ffn_gate = (float *)q3n__arena_take(a, experts > dense ? experts : dense, f);
    r->ffn_up   = (float *)q3n__arena_take(a, experts > dense ? experts : dense, f);
    if (e->has_mtp) r->mtp_in = (float *)q3n__arena_take(a, n, f * 2 * d);
    if (e->model->has_quantised) q3n__run_layout_quantised(a, e);
}

/* Everything after the engine's struct, measured (a->base NULL) or handed out.  The threads come
 * last: *threads gets their bytes, for q3n_session_bytes tells scratch from the rest. */
static void q3n__engine_layout(q3n__arena *a, q3n_engine *e, size_t *threads)
{
    const size_t n = (size_t)e->options.batch_size, d = (size_t)e->model->config.hidden_size;
    const size_t V = (size_t)e->model->config.vocab_size, f = sizeof(float);
    q3n__run_layout(a, e);
    e->segments = (q3n__segment *)q3n__arena_take(a, n, sizeof *e->segments);
    e->tokens = (int32_t *)q3n__arena_take(a, n, sizeof *e->tokens);
    e->chunks = (q3n__chunk *)q3n__arena_take(a, n, sizeof *e->chunks);
    e->row = (float *)q3n__arena_take(a, d, f);
    if (e->has_mtp) e->hidden = (float *)q3n__arena_take(a, n + 1, f * d);
    e->gathered = (float *)q3n__arena_take(a, (size_t)e->logit_rows, f * d);
    e->logits = (float *)q3n__arena_take(a, (size_t)e->logit_rows, f * V);
    const size_t at = a->used;
    e->pool.threads =
        (q3n__thread *)q3n__arena_take(a, (size_t)e->options.n_threads, sizeof(q3n__thread));
    *threads = a->used - at;
}

/* Split attention keeps a partial result for each query and block of keys, which is a page of 256
 * tokens.  It is the one scratch that grows with the text: for a capacity of 262,144 tokens and 16
 * heads of 256 it takes 68 MB, for most sessions in vain. */
static size_t q3n__split_queries(const q3n_engine *e)
{
    const int max = e->options.batch_size, n = max < Q3N__SPLIT_TOKENS ? max : Q3N__SPLIT_TOKENS;
    return (size_t)n * (size_t)e->model->config.num_attention_heads;
}

static size_t q3n__split_bytes(const q3n_engine *e, int n_blocks)
{
    const size_t D = (size_t)e->model->config.head_dim;
    return q3n__split_queries(e) * (size_t)n_blocks * (sizeof(float) * D
                                                       + sizeof(q3n__softmax_partial));
}

/* Blocks that the scratch is made for when a text has n: it doubles, so that it seldom grows. */
static int q3n__split_room(const q3n_engine *e, int n_blocks)
{
    if (e->options.n_threads == 1 || n_blocks <= 1) return 0;
    int room = 4;
    while (room < n_blocks) room *= 2;
    return room;
}

/* Room for split attention over n_blocks, before the pass: the threads allocate nothing.  Without
 * memory nothing is split, which is slower and has the same bits. */
static void q3n__engine_reserve(q3n_engine *e, int n_blocks)
{
    const int room = q3n__split_room(e, n_blocks);
    if (room <= e->run.partial_blocks) return;
    q3n__free(&e->model->allocator, e->split);
    e->split = q3n__alloc(&e->model->allocator, q3n__split_bytes(e, room));
    e->run.partial_blocks = e->split ? room : 0;
    e->run.partial_o = (float *)e->split;
    const size_t at = q3n__split_queries(e) * (size_t)room * (size_t)e->model->config.head_dim;
    e->run.partial = e->split ? (q3n__softmax_partial *)(void *)(e->run.partial_o + at) : NULL;
}

/* Rows of logits that an engine computes at once for several sessions; a session's own engine has
 * one: a row is 0.6 MB for a vocabulary of 151,936. */
#define Q3N__LOGIT_ROWS 16

/* What an engine has room for besides its options. */
typedef struct { int has_mtp, logit_rows; } q3n__engine_room;

static q3n__engine_room q3n__engine_room_of(const q3n_model *m)
{
    return (q3n__engine_room){ m->config.num_mtp_layers > 0, Q3N__LOGIT_ROWS };
}

/* Bytes of its one allocation, without the allocator's own head; 0 if it cannot be.  o: as
 * q3n__engine_options_set leaves them; *threads gets the bytes of what is no scratch. */
static size_t q3n__engine_measure(q3n_engine *e, const q3n_model *m, const q3n_engine_options *o,
                                  q3n__engine_room room, size_t *threads)
{
    memset(e, 0, sizeof *e);
    e->model = m;
    e->options = *o;
    e->has_mtp = room.has_mtp;
    e->logit_rows = o->batch_size < room.logit_rows ? o->batch_size : room.logit_rows;
    q3n__arena a = { NULL, 0, 0 };
    q3n__arena_take(&a, 1, sizeof *e);
    q3n__engine_layout(&a, e, threads);
    return a.overflow ? 0 : a.used;
}

/* Threads begin last: until then there is one allocation to free. */
static q3n_result q3n__engine_make(q3n_engine **out, const q3n_model *m,
                                   const q3n_engine_options *o, q3n__engine_room room,
                                   q3n_error *err)
{
    q3n_engine measured;
    size_t threads;
    const size_t bytes = q3n__engine_measure(&measured, m, o, room, &threads);
    q3n__arena a = { bytes ? (uint8_t *)q3n__alloc(&m->allocator, bytes) : NULL, 0, 0 };
    if (!a.base)
        return q3n__fail(err, Q3N_ERR_MEMORY, -1, "no memory for batches of %d tokens, %zu bytes: "
                         "make the batch smaller", o->batch_size, bytes);
    q3n_engine *e = (q3n_engine *)q3n__arena_take(&a, 1, sizeof *e);
    *e = measured;
    q3n__engine_layout(&a, e, &threads);
    q3n__kernels_init(&e->kernels, o->isa);
    e->run.model = e->model;
    e->run.k = &e->kernels;
    e->run.pool = &e->pool;
    e->run.cancel = &e->cancel;
    const q3n_result r = q3n__pool_open(&e->pool, o->n_threads, &o->executor, e->pool.threads,
                                        err);
    if (r == Q3N_OK) *out = e;
    else             q3n__free(&m->allocator, e);
    return r;
}

static q3n_result q3n__cancelled(q3n_error *err)
{
    return q3n__fail(err, Q3N_ERR_CANCELLED, -1, "cancelled: the session is as before the call");
}

/* ---- Costs ---- */
/* Microseconds of a pass, 0 = nothing is known: numbers of rows that were never tried are guessed
 * from the largest that was, at half its price for each further row. */
static double q3n__cost_of(const q3n__costs *c, int rows)
{
    if (rows > Q3N__COST_ROWS && c->row > 0.0) return c->row * rows;
    for (int n = rows < Q3N__COST_ROWS ? rows : Q3N__COST_ROWS; n > 0; n--)
        if (c->pass[n] > 0.0) return c->pass[n] * (1.0 + 0.5 * ((double)rows / n - 1.0));
    return c->row * rows;
}

/* A noisy measurement: outliers count for little, faster ones are believed sooner. */
static void q3n__cost_learn(double *cost, double us)
{
    if (*cost == 0.0) *cost = us;
    else if (us < *cost) *cost += (us - *cost) / 4.0;
    else *cost += ((us < 2.0 * *cost ? us : 2.0 * *cost) - *cost) / 16.0;
}

static void q3n__engine_learn(q3n_engine *e, int rows, int64_t us)
{
    if (rows <= Q3N__COST_ROWS) q3n__cost_learn(&e->costs.pass[rows], (double)us);
    else q3n__cost_learn(&e->costs.row, (double)us / rows);
}

/* =====================================================================================
 * [24] SAMPLER                                                              >>sampler
 *
 * Chooses the next token from logits.  Each filter keeps the tokens ranked before some place in
 * the order "larger first, lower id among equals", so finding that place takes a selection, not a
 * sort.  Logits and weights lie in blocks of 64 with their maxima and sums: whole vocabularies are
 * passed over by kernels, and scalar code looks into few blocks.  A draft, proposed by whatever
 * guesses ahead, changes what is computed and not the distribution.  Allocates nothing after
 * create.
 *
 *     x = logits, penalised         m = max_i x_i         T = temperature
 *     w_i = e^((x_i - m) / T)       the largest weight is 1, so nothing overflows
 *     top-k     the k largest x, lower ids among equals
 *     top-p     of those the fewest largest w that have top_p of their sum
 *     min-p     of those w_i >= min_p (times the largest, which is 1)
 *     draw      token i with probability w_i / kept, kept = sum of what is left
 *
 * Sums of weights are f32 within a block, in the order of >>kernels-scalar, and double over blocks:
 * the same bits on every machine.  Weights are not divided by their sum; probabilities are never
 * written.  A block's weights are cleaned of what a filter dropped when a draw comes to that block
 * (`exact`), for the other blocks their sums are enough.  Knows no session and no model but its
 * vocabulary and allocator.
 * ===================================================================================== */

/* ---- Random numbers: SplitMix64 of Steele, Lea and Flood (2014) ---- */
static double q3n__random_unit(uint64_t *state)   /* [0, 1) in steps of 2^-53 */
{
    *state += Q3N__GOLDEN;
    return (double)(q3n__mix64(*state) >> 11) * 0x1p-53;
}

/* ---- Selection: by rank, "larger first, lower id among equals" ---- */
typedef struct {
    float   v;           /* logit, or probability relative to the largest */
    int32_t id;
} q3n__candidate;

static int q3n__ranks_before(q3n__candidate a, q3n__candidate b)
{
    return a.v > b.v || (a.v == b.v && a.id < b.id);
}

static void q3n__candidate_swap(q3n__candidate *a, q3n__candidate *b)
{
    const q3n__candidate t = *a;
    *a = *b;
    *b = t;
}

/* A number that is the larger the earlier the candidate ranks; no two are equal.  Bits of floats
 * are in their order when the sign bit of positive ones is set and all bits of negative ones are
 * turned over; below them the id, turned over.  v is no NaN. */
static uint64_t q3n__candidate_key(q3n__candidate c)
{
    uint32_t bits = q3n__f32_bits(c.v + 0.0f);             /* -0 ranks with 0 */
    bits ^= bits >> 31 ? 0xFFFFFFFFu : 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~c.id;
}

/* Reorder [*lo, *hi): those whose byte of the key at shift is larger come first, then the equal
 * ones, which [*lo, *hi) become. */
static void q3n__partition(q3n__candidate *c, int *lo, int *hi, int shift, unsigned byte)
{
    int first = *lo, end = *hi;
    for (int i = first; i < end;) {
        const unsigned k = q3n__candidate_key(c[i]) >> shift & 255;
        if (k > byte)      q3n__candidate_swap(&c[i++], &c[first++]);
        else if (k < byte) q3n__candidate_swap(&c[i], &c[--end]);
        else               i++;
    }
    *lo = first;
    *hi = end;
}

/* The fewest first candidates, by rank, that together have the target > 0 (their number, or with
 * by_mass the sum of their v): moves them to the front and returns how many they are, n if all of
 * them do not reach it.  Byte by byte of the keys, most significant first, by what candidates with
 * each value have together: at most 16 passes whatever the logits are, mostly over few.
 *
 *     byte 7        255 ... 130 | 129 | 128 ... 0     mass of those before is short of the target,
 *                    in           |      out           with 129 it is not: byte 6 of those with 129
 *
 * A pivot's place could be known to who makes the logits; bytes of keys have no bad case. */
static int q3n__select(q3n__candidate *c, int n, double target, int by_mass)
{
    int lo = 0, hi = n;
    double before = 0.0;
    for (int shift = 56; shift >= 0 && hi - lo > 1; shift -= 8) {
        double mass[256] = { 0 };
        int k = 255;
        for (int i = lo; i < hi; i++) {
            Q3N__STEP();
            mass[q3n__candidate_key(c[i]) >> shift & 255] += by_mass ? (double)c[i].v : 1.0;
        }
        while (k > 0 && before + mass[k] < target) before += mass[k--];
        q3n__partition(c, &lo, &hi, shift, (unsigned)k);
    }
    return hi;
}

/* ---- The sampler ---- */
/* What every block of weights has from a floor on: sum and number of those >= floor, and of all
 * blocks together. */
typedef struct {
    float   *sum;        /* [n_blocks] */
    int32_t *count;      /* [n_blocks] */
    float    floor;
    double   mass;       /* of all of them, and how many */
    int      n;
} q3n__level;

struct q3n_sampler {
    q3n_allocator       allocator;
    q3n_sampler_options o;           /* top_p and repetition_penalty are 1 when off              */
    int                 vocab, n_blocks;
    uint64_t            rng;
    q3n_error           error;
    q3n__kernels        k;           /* the best: all of them give the same weights              */
    float               scale;       /* log2(e) / temperature                                    */
    int32_t            *window;      /* [o.penalty_window] ring of the last tokens               */
    int                 n_window, next;
    float              *weights;     /* [n_blocks, 64] penalised logits, then weights: e^(logit /
                                        temperature), the largest 1                              */
    float              *block_max;   /* [n_blocks] of the logits                                 */
    float              *block_sum;   /* [n_blocks] of the weights kept; where it is 0 `weights`
                                        is not to be read                                        */
    uint8_t            *exact;       /* [n_blocks] 1 = weights that are not kept are 0           */
    float               floor;       /* kept are weights above it, and equal ones up to this id  */
    int32_t             floor_id;
    double              kept;        /* sum of block_sum                                         */
    q3n__level          level[3];    /* scratch of top-p                                         */
    q3n__candidate     *candidates;  /* [vocab]                                                  */
    float              *edited;      /* [vocab] what the hook edits; NULL without one            */
};

/* Ranges of q3n_sampler_options: 0 is allowed everywhere, for it is what was not set; NaN nowhere.
 */
static q3n_result q3n__sampler_check(const q3n_sampler_options *o, q3n_error *err)
{
    const float r = o->repetition_penalty;
    if (!(o->temperature >= 0.0f && o->temperature <= FLT_MAX))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "temperature %g must be 0 or more",
                         (double)o->temperature);
    if (o->top_k < 0)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "top_k %d must be 0 or more", o->top_k);
    if (!(o->top_p >= 0.0f && o->top_p <= 1.0f))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "top_p %g is not in (0, 1], and not 0 for off",
                         (double)o->top_p);
    if (!(o->min_p >= 0.0f && o->min_p <= 1.0f))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "min_p %g is not in [0, 1]", (double)o->min_p);
    if (!(r == 0.0f || (r > 0.0f && r <= FLT_MAX)))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "repetition_penalty %g must be 0 or more",
                         (double)r);
    if (o->penalty_window < 0 || o->penalty_window > Q3N__SAMPLER_MAX_WINDOW)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "penalty_window %d is not in [0, %d]",
                         o->penalty_window, Q3N__SAMPLER_MAX_WINDOW);
    return Q3N_OK;
}

static size_t q3n__sampler_layout(q3n_sampler *s, uint8_t *base)   /* bytes of the allocation */
{
    q3n__arena a = { base, 0, 0 };
    const size_t vocab = (size_t)s->vocab, n_blocks = (size_t)s->n_blocks;
    q3n__arena_take(&a, 1, sizeof *s);
    s->window     = (int32_t *)q3n__arena_take(&a, (size_t)s->o.penalty_window, sizeof(int32_t));
    s->weights    = (float *)q3n__arena_take(&a, n_blocks * Q3N__SAMPLER_BLOCK, sizeof(float));
    s->block_max  = (float *)q3n__arena_take(&a, n_blocks, sizeof(float));
    s->block_sum  = (float *)q3n__arena_take(&a, n_blocks, sizeof(float));
    s->exact      = (uint8_t *)q3n__arena_take(&a, n_blocks, 1);
    s->candidates = (q3n__candidate *)q3n__arena_take(&a, vocab, sizeof(q3n__candidate));
    for (int i = 0; i < 3; i++) {
        s->level[i].sum   = (float *)q3n__arena_take(&a, n_blocks, sizeof(float));
        s->level[i].count = (int32_t *)q3n__arena_take(&a, n_blocks, sizeof(int32_t));
    }
    if (s->o.logits_hook.edit) s->edited = (float *)q3n__arena_take(&a, vocab, sizeof(float));
    return a.overflow ? SIZE_MAX : a.used;
}

Q3N_DEF q3n_result q3n_sampler_create(q3n_sampler **out, const q3n_model *m,
                                      const q3n_sampler_options *o, q3n_error *err)
{
    if (!out) return q3n__fail(err, Q3N_ERR_ARG, -1, "no place for the sampler");
    *out = NULL;
    if (!m) return q3n__fail(err, Q3N_ERR_ARG, -1, "no model");
    q3n_sampler s;
    memset(&s, 0, sizeof s);
    q3n_result r = q3n__struct_read(&s.o, sizeof s.o, o, "q3n_sampler_options", err);
    if (r == Q3N_OK) r = q3n__sampler_check(&s.o, err);
    if (r != Q3N_OK) return r;
    s.allocator = m->allocator;
    s.vocab = q3n_model_config(m)->vocab_size;
    s.n_blocks = (s.vocab + Q3N__SAMPLER_BLOCK - 1) / Q3N__SAMPLER_BLOCK;
    q3n__kernels_init(&s.k, q3n_isa_best());
    if (s.o.penalty_window == 0) s.o.penalty_window = 64;
    if (s.o.repetition_penalty == 0.0f) s.o.repetition_penalty = 1.0f;
    if (s.o.top_p == 0.0f) s.o.top_p = 1.0f;
    if (s.o.temperature > 0.0f) s.scale = 1.44269504f / s.o.temperature;
    if (s.scale > FLT_MAX) s.scale = FLT_MAX;              /* the temperature is denormal */
    s.rng = s.o.seed;
    uint8_t *memory = (uint8_t *)q3n__alloc(&s.allocator, q3n__sampler_layout(&s, NULL));
    if (!memory) return q3n__fail(err, Q3N_ERR_MEMORY, -1, "no memory for a sampler");
    q3n__sampler_layout(&s, memory);
    memset(s.window, 0, (size_t)s.o.penalty_window * sizeof *s.window);
    memcpy(memory, &s, sizeof s);
    *out = (q3n_sampler *)(void *)memory;
    return Q3N_OK;
}

Q3N_DEF void q3n_sampler_destroy(q3n_sampler *s)
{
    if (!s) return;
    const q3n_allocator a = s->allocator;
    q3n__free(&a, s);
}

Q3N_DEF void q3n_sampler_reset(q3n_sampler *s)
{
    if (!s) return;
    s->n_window = s->next = 0;
    s->rng = s->o.seed;
}

Q3N_DEF void q3n_sampler_seed(q3n_sampler *s, uint64_t seed)
{
    if (s) s->rng = s->o.seed = seed;
}

Q3N_DEF void q3n_sampler_accept(q3n_sampler *s, int32_t id)
{
    if (!s || id < 0 || id >= s->vocab) return;
    s->window[s->next] = id;
    if (++s->next == s->o.penalty_window) s->next = 0;
    if (s->n_window < s->o.penalty_window) s->n_window++;
}

/* What arithmetic can stand: NaN is -inf (never chosen), +inf the largest float.  The kernels of
 * blocks do the same to what they read. */
static float q3n__clean_logit(float x)
{
    if (x > FLT_MAX) return FLT_MAX;
    return x == x ? x : -Q3N__INFINITY;
}

/* The logits to choose from: the given ones, or a copy as the hook leaves it, then one with the
 * penalty.  A token counts once, however often it stands in the window: each is set from the hook's
 * logits.  tokens [n]: what lies between the text and the token that is chosen. */
static const float *q3n__sampler_prepare(q3n_sampler *s, const float *logits,
                                         const int32_t *tokens, int n)
{
    const float r = s->o.repetition_penalty;
    if (s->edited) {
        memcpy(s->edited, logits, (size_t)s->vocab * sizeof *logits);
        (s->o.logits_hook.edit)(s->o.logits_hook.user, s->edited, s->vocab, tokens, n);
        logits = s->edited;
    }
    if (r == 1.0f || s->n_window == 0) return logits;
    memcpy(s->weights, logits, (size_t)s->vocab * sizeof *logits);
    for (int i = 0; i < s->n_window; i++) {
        const int32_t id = s->window[i];
        const float x = q3n__clean_logit(logits[id]);
        s->weights[id] = q3n__clean_logit(x > 0.0f ? x / r : x * r);
    }
    return s->weights;
}

/* Block b of x [vocab]: where it lies, or the last tokens and -inf in tail: x is the host's array,
 * and nothing after its end may be read. */
static const float *q3n__sampler_logits(const q3n_sampler *s, const float *x, int b,
                                        float tail[Q3N__SAMPLER_BLOCK])
{
    const int first = b * Q3N__SAMPLER_BLOCK, left = s->vocab - first;
    if (left >= Q3N__SAMPLER_BLOCK) return x + first;
    for (int i = 0; i < Q3N__SAMPLER_BLOCK; i++) tail[i] = i < left ? x[first + i] : -Q3N__INFINITY;
    return tail;
}

/* Sets the maximum of every block of x [vocab] and returns the largest: below -FLT_MAX if no logit
 * is a number above -inf. */
static float q3n__sampler_maxima(q3n_sampler *s, const float *x)
{
    float tail[Q3N__SAMPLER_BLOCK], max = -Q3N__INFINITY;
    const int last = s->n_blocks - 1;
    s->k.block_max(s->block_max, x, last);
    s->k.block_max(s->block_max + last, q3n__sampler_logits(s, x, last, tail), 1);
    for (int b = 0; b <= last; b++) if (s->block_max[b] > max) max = s->block_max[b];
    return max;
}

/* Weights and their sums of blocks [b0, b1); the last block goes through tail.  x may be s->weights
 * (penalised logits): kernels read an element before they write it. */
static void q3n__sampler_weigh(q3n_sampler *s, const float *x, float max, int b0, int b1)
{
    float tail[Q3N__SAMPLER_BLOCK];
    const int last = s->n_blocks - 1, whole = b1 > last ? last : b1;
    float *y = s->weights + b0 * Q3N__SAMPLER_BLOCK;
    s->k.block_weights(y, s->block_sum + b0, x + b0 * Q3N__SAMPLER_BLOCK, whole - b0, max,
                       s->scale);
    if (b1 > last)
        s->k.block_weights(s->weights + last * Q3N__SAMPLER_BLOCK, s->block_sum + last,
                           q3n__sampler_logits(s, x, last, tail), 1, max, s->scale);
}

/* By rising block, in double: 2,400 sums of a vocabulary of 152k. */
static double q3n__block_total(const float *sum, int n_blocks)
{
    double total = 0.0;
    for (int b = 0; b < n_blocks; b++) total += sum[b];
    return total;
}

/* The first token whose logit is the largest, which max is: of equals the lower id, so greedy text
 * does not depend on anything else. */
static int32_t q3n__sampler_best(const q3n_sampler *s, const float *x, float max)
{
    int b = 0;
    while (s->block_max[b] != max) b++;
    int32_t id = b * Q3N__SAMPLER_BLOCK;
    while (!(x[id] >= max)) id++;   /* +inf counts as max */
    return id;
}

/* The k largest of x as candidates, in no order.  Each of the k blocks with the largest maxima has
 * a logit of at least the smallest of these maxima; so the k-th largest logit is no less, and
 * blocks below that bound have none of the k: few blocks are looked into. */
static int q3n__sampler_top_k(q3n_sampler *s, const float *x, int k)
{
    q3n__candidate *c = s->candidates;
    const int n_blocks = s->n_blocks;
    float bound = -FLT_MAX;
    if (k < n_blocks) {
        for (int b = 0; b < n_blocks; b++) c[b] = (q3n__candidate){ s->block_max[b], b };
        q3n__select(c, n_blocks, k, 0);
        bound = c[0].v;
        for (int i = 1; i < k; i++) if (c[i].v < bound) bound = c[i].v;
        if (bound < -FLT_MAX) bound = -FLT_MAX;
    }
    int n = 0;
    for (int b = 0; b < n_blocks; b++) {
        if (s->block_max[b] < bound) continue;
        const int first = b * Q3N__SAMPLER_BLOCK, left = s->vocab - first;
        const int end = first + (left < Q3N__SAMPLER_BLOCK ? left : Q3N__SAMPLER_BLOCK);
        for (int i = first; i < end; i++)
            if (x[i] >= bound) c[n++] = (q3n__candidate){ q3n__clean_logit(x[i]), i };
    }
    return q3n__select(c, n, k, 0);
}

/* ---- Top-p of the whole vocabulary ----
 *
 * Where the kept weights end is found by their sums above a floor, one pass of a kernel each, until
 * few lie between a floor that keeps enough and one that does not; those are selected from.
 *
 *     floor     low      ...      middle      ...      high
 *     mass      >= target                              < target         target = top_p total
 *     n         many                                   few              until they differ by 128
 *
 * Equal weights may be more than 128: then the floors end as neighbouring floats, and the ids of
 * the equals decide in the selection. */
#define Q3N__LEVEL_FEW 128

/* Fill level in for a floor: one pass over all weights. */
static void q3n__level_at(q3n_sampler *s, q3n__level *level, float floor)
{
    s->k.block_sums(level->sum, level->count, s->weights, s->n_blocks, floor);
    level->floor = floor;
    level->mass = q3n__block_total(level->sum, s->n_blocks);
    level->n = 0;
    for (int b = 0; b < s->n_blocks; b++) level->n += level->count[b];
}

/* Two levels between which the kept weights end: the mass of low reaches the target, that of high
 * does not.  over and under are how far they are from it, halved for the one that stays where it is
 * when the other one has been replaced twice (the Illinois rule, for regula falsi). */
typedef struct {
    q3n__level *low, *high, *other;
    double      target, over, under;
    int         last;            /* what was replaced last: 1 = low, -1 = high                   */
} q3n__bracket;

/* Try a floor between the two: regula falsi on mass as a function of the floor's bits.  The bits of
 * positive floats are in their order, and nearly in that of their logarithms, over which mass is
 * even enough.  The middle after so many turns: 32 more are enough for any weights. */
#define Q3N__BRACKET_TURNS 12

static void q3n__bracket_narrow(q3n_sampler *s, q3n__bracket *k, int turn)
{
    const uint32_t a = q3n__f32_bits(k->low->floor), b = q3n__f32_bits(k->high->floor);
    const double at = turn < Q3N__BRACKET_TURNS ? k->over / (k->over + k->under) : 0.5;
    uint32_t middle = a + (uint32_t)(at * (b - a));
    if (middle <= a) middle = a + 1;
    if (middle >= b) middle = b - 1;
    q3n__level *level = k->other;
    q3n__level_at(s, level, q3n__bits_f32(middle));
    const int side = level->mass >= k->target ? 1 : -1;
    q3n__level **place = side > 0 ? &k->low : &k->high;
    k->other = *place;
    *place = level;
    if (side > 0) k->over = level->mass - k->target;
    else          k->under = k->target - level->mass;
    if (side == k->last && side > 0) k->under *= 0.5;
    if (side == k->last && side < 0) k->over *= 0.5;
    k->last = side;
}

/* Candidates in [low->floor, high->floor); returns how many.  Blocks of which both levels have as
 * many have none. */
static int q3n__level_gather(q3n_sampler *s, const q3n__level *low, const q3n__level *high)
{
    int n = 0;
    for (int b = 0; b < s->n_blocks; b++) {
        if (low->count[b] == high->count[b]) continue;
        const int first = b * Q3N__SAMPLER_BLOCK;
        for (int i = first; i < first + Q3N__SAMPLER_BLOCK; i++)
            if (s->weights[i] >= low->floor && s->weights[i] < high->floor)
                s->candidates[n++] = (q3n__candidate){ s->weights[i], i };
    }
    return n;
}

/* Find where top-p ends among all weights, which sum to total: sets floor, floor_id and block_sum.
 * Those below (1 - top_p) total / vocab have less than (1 - top_p) total together, so the others
 * hold what is wanted (0.999 for roundings).  If they do not after all, FLT_MIN does: weights are 0
 * or 2^-124 at the smallest.  Kept is what ranks before the last one selected, and that one. */
static void q3n__sampler_top_p(q3n_sampler *s, double total)
{
    q3n__bracket k = { &s->level[0], &s->level[1], &s->level[2], (double)s->o.top_p * total, 0, 0,
                       0 };
    const size_t n_blocks = (size_t)s->n_blocks;
    q3n__level_at(s, k.low, (float)((1.0 - (double)s->o.top_p) * total / s->vocab * 0.999));
    if (k.low->floor < FLT_MIN || k.low->mass < k.target) q3n__level_at(s, k.low, FLT_MIN);
    memset(k.high->sum, 0, n_blocks * sizeof *k.high->sum);      /* no weight is above 1 */
    memset(k.high->count, 0, n_blocks * sizeof *k.high->count);
    k.high->floor = 2.0f;
    k.high->mass = 0.0;
    k.high->n = 0;
    k.over = k.low->mass - k.target;
    k.under = k.target;
    for (int turn = 0; k.low->n - k.high->n > Q3N__LEVEL_FEW
                       && q3n__f32_bits(k.high->floor) - q3n__f32_bits(k.low->floor) > 1; turn++)
        q3n__bracket_narrow(s, &k, turn);
    q3n__candidate *c = s->candidates;
    const int n = q3n__level_gather(s, k.low, k.high);
    const int kept = q3n__select(c, n, k.target - k.high->mass, 1);
    q3n__candidate last = c[0];
    memcpy(s->block_sum, k.high->sum, n_blocks * sizeof *s->block_sum);
    for (int i = 0; i < kept; i++) {
        if (q3n__ranks_before(last, c[i])) last = c[i];
        s->block_sum[c[i].id / Q3N__SAMPLER_BLOCK] += c[i].v;
    }
    s->floor = last.v;
    s->floor_id = last.id;
}

/* ---- Filters ---- */

/* Block b with zeros for what is not kept: below the floor, or equal to it with a larger id.  Once
 * for each filter, as exact[b] says. */
static float *q3n__sampler_block(q3n_sampler *s, int b)
{
    float *y = s->weights + b * Q3N__SAMPLER_BLOCK;
    for (int i = 0; i < Q3N__SAMPLER_BLOCK && !s->exact[b]; i++) {
        const int id = b * Q3N__SAMPLER_BLOCK + i;
        if (!(y[i] > s->floor || (y[i] == s->floor && id <= s->floor_id))) y[i] = 0.0f;
    }
    s->exact[b] = 1;
    return y;
}

/* Weights of the k largest logits, or of those of them that top-p and min-p leave.  Only blocks
 * that have one are written, and only their sums are not 0: no pass over the vocabulary but the
 * maxima. */
static void q3n__sampler_few(q3n_sampler *s, const float *x, float max, int k)
{
    q3n__candidate *c = s->candidates;
    int n = q3n__sampler_top_k(s, x, k);
    double total = 0.0;
    for (int i = 0; i < n; i++) {
        c[i].v = q3n__sampler_weight(c[i].v, max, s->scale);
        total += c[i].v;
    }
    if (s->o.top_p < 1.0f) n = q3n__select(c, n, (double)s->o.top_p * total, 1);
    memset(s->block_sum, 0, (size_t)s->n_blocks * sizeof *s->block_sum);
    for (int i = 0; i < n; i++) {
        const int b = c[i].id / Q3N__SAMPLER_BLOCK;
        if (c[i].v < s->o.min_p || c[i].v == 0.0f) continue;
        if (s->block_sum[b] == 0.0f)
            memset(s->weights + b * Q3N__SAMPLER_BLOCK, 0, Q3N__SAMPLER_BLOCK * sizeof(float));
        s->weights[c[i].id] = c[i].v;
        s->block_sum[b] += c[i].v;
        s->exact[b] = 1;
    }
}

/* Weights in blocks whose largest logit is cut or more; the sums of the others become 0. */
static void q3n__sampler_weigh_from(q3n_sampler *s, const float *x, float max, float cut)
{
    for (int b = 0, first = 0; b <= s->n_blocks; b++) {
        if (b < s->n_blocks && s->block_max[b] >= cut) continue;
        if (b > first) q3n__sampler_weigh(s, x, max, first, b);
        if (b < s->n_blocks) s->block_sum[b] = 0.0f;
        first = b + 1;
    }
}

/* Raise the floor to min-p: new sums for the blocks that have any.  Weights equal to it are kept,
 * whatever their id. */
static void q3n__sampler_min_p(q3n_sampler *s)
{
    int32_t count;
    s->floor = s->o.min_p;
    s->floor_id = INT32_MAX;
    for (int b = 0; b < s->n_blocks; b++)
        if (s->block_sum[b] > 0.0f)
            s->k.block_sums(&s->block_sum[b], &count, s->weights + b * Q3N__SAMPLER_BLOCK, 1,
                            s->floor);
}

/* Top-p and min-p of all tokens.  Without top-p nothing is weighed far below what min-p drops:
 * w < p where x < m + T ln p, and 10^-3 in the exponent of 2 covers roundings. */
static void q3n__sampler_many(q3n_sampler *s, const float *x, float max)
{
    const float p = s->o.min_p;
    if (s->o.top_p < 1.0f) {
        q3n__sampler_weigh(s, x, max, 0, s->n_blocks);
        q3n__sampler_top_p(s, q3n__block_total(s->block_sum, s->n_blocks));
    } else {
        const double cut = p > 0.0f ? max + (log2((double)p) - 1e-3) / s->scale : -(double)FLT_MAX;
        q3n__sampler_weigh_from(s, x, max, cut > -(double)FLT_MAX ? (float)cut : -FLT_MAX);
    }
    if (p > s->floor) q3n__sampler_min_p(s);
}

/* What top-k with this k (0 = all) and the other filters leave of x, as weights in blocks.  The
 * largest logit is among them. */
static void q3n__sampler_filter(q3n_sampler *s, const float *x, float max, int k)
{
    memset(s->exact, 0, (size_t)s->n_blocks);
    s->floor = 0.0f;
    s->floor_id = -1;
    if (k > 0 && k < s->vocab) q3n__sampler_few(s, x, max, k);
    else                       q3n__sampler_many(s, x, max);
    s->kept = q3n__block_total(s->block_sum, s->n_blocks);
}

/* A token kept, with its probability: the blocks, then within one, in order of ids.  One random
 * number.  Where roundings leave u over at the end, of blocks or of a block, it is the last that
 * has a weight: what was dropped never comes. */
static int32_t q3n__sampler_draw(q3n_sampler *s)
{
    double u = q3n__random_unit(&s->rng) * s->kept;
    int b = -1;
    for (int i = 0; i < s->n_blocks; i++) {
        if (s->block_sum[i] == 0.0f) continue;
        b = i;
        if (u < (double)s->block_sum[i]) break;
        u -= (double)s->block_sum[i];
    }
    const float *y = q3n__sampler_block(s, b);
    int last = 0;
    for (int i = 0; i < Q3N__SAMPLER_BLOCK; i++) {
        if (y[i] == 0.0f) continue;
        last = i;
        u -= (double)y[i];
        if (u < 0.0) break;
    }
    return b * Q3N__SAMPLER_BLOCK + last;
}

/* ---- State: what snapshots carry ---- */

/* Into st, which has room for n_window tokens. */
static void q3n__sampler_get_state(const q3n_sampler *s, q3n__sampler_state *st)
{
    const int oldest = s->n_window < s->o.penalty_window ? 0 : s->next;
    st->rng = s->rng;
    for (int i = 0; i < s->n_window; i++)
        st->window[i] = s->window[(oldest + i) % s->o.penalty_window];
}

/* Of a window of n tokens the last that fit are remembered. */
static void q3n__sampler_set_state(q3n_sampler *s, const q3n__sampler_state *st, int n)
{
    s->rng = st->rng;
    s->n_window = s->next = 0;
    for (int i = n > s->o.penalty_window ? n - s->o.penalty_window : 0; i < n; i++)
        q3n_sampler_accept(s, st->window[i]);
}

/* ---- Undoing ---- */

/* What a sampler was before the tokens of one step, which choosing them overwrites. */
typedef struct {
    uint64_t rng;
    int      n_window, next;
    int32_t  window[Q3N_MAX_DRAFT + 1];  /* from `next` on, round and round                      */
} q3n__sampler_mark;

static q3n__sampler_mark q3n__sampler_save(const q3n_sampler *s)
{
    q3n__sampler_mark m = { s->rng, s->n_window, s->next, { 0 } };
    for (int i = 0; i <= Q3N_MAX_DRAFT; i++)
        m.window[i] = s->window[(s->next + i) % s->o.penalty_window];
    return m;
}

static void q3n__sampler_restore(q3n_sampler *s, const q3n__sampler_mark *m)
{
    s->rng = m->rng;
    s->n_window = m->n_window;
    s->next = m->next;
    for (int i = 0; i <= Q3N_MAX_DRAFT; i++)
        s->window[(m->next + i) % s->o.penalty_window] = m->window[i];
}

/* ---- Drafts ---- */
#define Q3N__DRAFT_MAX 64

/* A token proposed as the next one and what it was drawn from: 1 <= n tokens of the vocabulary,
 * each once, and their probabilities, which sum to 1.  A point mass has n = 1, p = 1. */
typedef struct {
    int32_t id;
    int     n;
    int32_t ids[Q3N__DRAFT_MAX];
    float   p[Q3N__DRAFT_MAX];
} q3n__draft;

static void q3n__draft_point(q3n__draft *d, int32_t id)   /* greedy or looked up */
{
    d->id = d->ids[0] = id;
    d->n = 1;
    d->p[0] = 1.0f;
}

/* Draw a draft from a draft model's logits [vocab] with the sampler's filters, of the
 * Q3N__DRAFT_MAX largest: any distribution will do (see below), and top-k needs few exponentials.
 * Greedy: the largest.  0 = there is none, as no logit is a number.  The window is left as it is,
 * for the draft is not accepted yet. */
static int q3n__sampler_draft(q3n_sampler *s, const float *logits, const int32_t *tokens, int n,
                              q3n__draft *d)
{
    const float *x = q3n__sampler_prepare(s, logits, tokens, n);
    const float max = q3n__sampler_maxima(s, x);
    if (max < -FLT_MAX) return 0;
    if (s->o.temperature == 0.0f) {
        q3n__draft_point(d, q3n__sampler_best(s, x, max));
        return 1;
    }
    const int k = s->o.top_k > 0 && s->o.top_k < Q3N__DRAFT_MAX ? s->o.top_k : Q3N__DRAFT_MAX;
    q3n__sampler_filter(s, x, max, k);
    d->n = 0;
    for (int b = 0; b < s->n_blocks; b++) {
        if (s->block_sum[b] == 0.0f) continue;
        const float *y = q3n__sampler_block(s, b);
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i++) {
            if (y[i] == 0.0f) continue;
            d->ids[d->n] = b * Q3N__SAMPLER_BLOCK + i;
            d->p[d->n++] = (float)(y[i] / s->kept);
        }
    }
    d->id = q3n__sampler_draw(s);
    return 1;
}

/* Leaves max(0, p - q) of the weights p, with q the draft's.  p stays if rounding leaves none. */
static void q3n__sampler_residual(q3n_sampler *s, const q3n__draft *d)
{
    float before[Q3N__DRAFT_MAX];
    const double kept = s->kept;
    for (int i = 0; i < d->n; i++) {
        const int b = d->ids[i] / Q3N__SAMPLER_BLOCK, at = d->ids[i] % Q3N__SAMPLER_BLOCK;
        before[i] = 0.0f;
        if (s->block_sum[b] == 0.0f) continue;
        float *y = q3n__sampler_block(s, b);
        const float left = (float)(y[at] - d->p[i] * kept);
        before[i] = y[at];
        y[at] = left > 0.0f ? left : 0.0f;
    }
    for (int back = 0; back < 2; back++) {
        for (int i = 0; i < d->n; i++) {
            const int b = d->ids[i] / Q3N__SAMPLER_BLOCK;
            int32_t count;
            if (before[i] == 0.0f) continue;
            if (back) s->weights[d->ids[i]] = before[i];
            s->k.block_sums(&s->block_sum[b], &count, s->weights + b * Q3N__SAMPLER_BLOCK, 1,
                            0.0f);
        }
        s->kept = q3n__block_total(s->block_sum, s->n_blocks);
        if (s->kept > 0.0) return;
    }
}

/* Draw from the weights p, given a draft drawn from q ([SPEC]): it is kept with probability
 * min(1, p / q), else a token is drawn from max(0, p - q) / (1 - a), a = sum min(p, q) being the
 * probability that it is kept.  A token comes with min(p, q) + (1 - a) max(0, p - q) / (1 - a) = p,
 * whatever q is.  The draft does not come back: u q >= p and u < 1 leave nothing of it. */
static int32_t q3n__sampler_verify(q3n_sampler *s, const q3n__draft *d)
{
    const int b = d->id / Q3N__SAMPLER_BLOCK;
    double p = 0.0, q = 0.0;   /* of the draft, times kept */
    if (s->block_sum[b] > 0.0f) p = q3n__sampler_block(s, b)[d->id % Q3N__SAMPLER_BLOCK];
    for (int i = 0; i < d->n; i++) if (d->ids[i] == d->id) q = d->p[i] * s->kept;
    if (q3n__random_unit(&s->rng) * q < p) return d->id;
    q3n__sampler_residual(s, d);
    return q3n__sampler_draw(s);
}

/* Choose the token that follows from the target's logits [vocab], given a draft or NULL, and
 * remember it: it has the sampler's distribution, and the draft is accepted if it is d->id.
 * tokens [n]: for the hook.
 *
 * One random number is used for each token drawn, so that a text can be continued from its seed and
 * length.  That holds with a point mass: to keep it with probability p and to draw from the others
 * otherwise is to draw from p, so it is not looked at and the text is the same as without.  Drafts
 * from a distribution use more. */
static q3n_result q3n__sampler_choose(q3n_sampler *s, const float *logits, const int32_t *tokens,
                                      int n, const q3n__draft *d, int32_t *token)
{
    const float *x = q3n__sampler_prepare(s, logits, tokens, n);
    const float max = q3n__sampler_maxima(s, x);
    if (max < -FLT_MAX)
        return q3n__fail(&s->error, Q3N_ERR_NUMERIC, -1, "none of %d logits is a number above -inf:"
                         " the weights hold NaN or infinities, or all tokens are masked", s->vocab);
    if (s->o.temperature > 0.0f) {
        q3n__sampler_filter(s, x, max, s->o.top_k);
        *token = d && d->n > 1 ? q3n__sampler_verify(s, d) : q3n__sampler_draw(s);
    } else {
        *token = q3n__sampler_best(s, x, max);
    }
    q3n_sampler_accept(s, *token);
    return Q3N_OK;
}

Q3N_DEF q3n_result q3n_sampler_sample(q3n_sampler *s, const float *logits, int32_t *token)
{
    if (!s) return Q3N_ERR_ARG;
    if (!logits || !token)
        return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "no logits, or no place for the token");
    return q3n__sampler_choose(s, logits, NULL, 0, NULL, token);
}

Q3N_DEF const q3n_error *q3n_sampler_error(const q3n_sampler *s)
{
    return s ? &s->error : &q3n__no_object;
}

/* =====================================================================================
 * [25] SESSION                                                              >>session
 *
 * A text, and transactions on it.  Between calls a session holds its text; a call works beside it,
 * and ends with q3n__session_commit or q3n__session_rollback:
 *
 *                         the text                  the call beside it          commit
 *     matrices            delta[delta_now]          delta[!delta_now]           delta_now flips
 *       few tokens        delta, pending rows       the other set of rows       pending.now flips
 *     columns             conv[conv_now]            conv[!conv_now]             conv_now flips
 *     keys and values     slots below length        slots from length on        length grows
 *       another text      saved_page                state.kv.page               saved are released
 *     module's rows       unread rows of hidden     work_hidden, work_mtp;      become unread
 *                                                   if deferred rows after them
 *     logits              logits, if has_logits     logits, has_logits = 0      has_logits is set
 *
 * So rollback takes no more than forgetting.  What a failed call may leave, and nobody sees: logits
 * to be computed again, pages with room, and rows that the matrices hold already (`applied`).
 * ===================================================================================== */

/* Rows of hidden states that a session with an MTP module collects before the module reads them.
 * The call under way adds its own after them, and what it drops is dropped for good only when the
 * next call begins: a call that fails has them back. */
#define Q3N__MAX_HIDDEN  64
#define Q3N__HIDDEN_ROWS (Q3N__MAX_HIDDEN + Q3N_MAX_DRAFT + 1)

/* Which of the session's rows of hidden states the MTP module has not read, and what it knows. */
typedef struct {
    int at, n;                   /* rows [at, at + n) of `hidden`: the trunk's of tokens
                                    mtp_length - 1 .. length - 1; without a module the last alone */
    int mtp_length;              /* tokens whose keys the module's layer holds, but for the first
                                    mtp_first                                                     */
    int mtp_first;
} q3n__unread;

/* What is known of one source of drafts. */
typedef struct {
    double accept[Q3N_MAX_DRAFT];     /* the i-th is right if those before are                    */
    double weight[Q3N_MAX_DRAFT];     /* of what was seen of it                                   */
} q3n__acceptance;

/* What steps with and without drafts have taught a session; one that fails teaches nothing. */
typedef struct {
    q3n_speculation spec;
    q3n__acceptance acceptance[Q3N_SPECULATE_COUNT];
    double          step_us;                     /* a step without drafts would take now          */
    double          step_cost[Q3N_MAX_DRAFT + 1];    /* by drafts, in step_us; 0 = unknown        */
    int             step_tries[Q3N_MAX_DRAFT + 1];
    double          draft_cost[2];               /* of the module, in step_us: first, each more   */
    double          try_credit;                  /* steps to spend on drafts that seem not to pay */
    int             try_left;
    int             since_plain;                 /* steps since one without drafts                */
    int             mtp_idle;                    /* steps since drafts of the module paid         */
} q3n__learned;

/* Three parts: what it is, the text between calls, and the call under way.  A function that is not
 * in a call reads the first two alone. */
struct q3n_session {
    const q3n_model    *model;
    q3n_session_options options;      /* with the defaults filled in                              */
    q3n_engine        *engine;       /* its own, or options.engine                               */
    q3n_cache          *cache;        /* or NULL                                                  */
    q3n_sampler        *sampler;      /* its own, or NULL                                         */
    q3n__shape          shape;
    q3n_error           error;
    q3n__atomic         cancel;       /* Q3N__IDLE, RUNNING or CANCELLED                          */
    int                 n_delta;      /* layers                                                   */
    int                 n_pages;      /* at full capacity                                         */

    /* the text between calls */
    int                 length;
    int                 delta_now, conv_now;   /* which of the two is meant                       */
    float              *delta[2];     /* [shape.delta_len]                                        */
    float              *conv[2];      /* [shape.conv_len]                                         */
    unsigned char      *owned;        /* [n_pages] 1 = no other session appends to the page      */
    float              *hidden;       /* [Q3N__HIDDEN_ROWS, d], without a module [1, d]           */
    q3n__unread         unread;
    float              *logits;       /* [vocab] after the last token                             */
    int                 has_logits;
    int64_t            *counts;       /* of experts: [layer][E]                                   */

    /* the call under way */
    q3n__state          state;        /* what the layers see                                      */
    int                 begun;        /* 1 = the work is in the other delta and conv              */
    int                 deferred;     /* 1 = the MTP module reads this call's rows later          */
    float              *work_hidden;  /* [d] of token state.length - 1                            */
    int                 work_mtp;     /* as mtp_length                                            */
    int                 work_first;   /* as mtp_first                                             */
    int                 has_saved;    /* 1 = the pages of the text are in saved_page              */
    q3n__page         **saved_page;   /* [n_pages]                                               */
    unsigned char      *saved_owned;

    float              *pooled;       /* [d] classification                                       */

    /* drafts */
    float              *draft_logits; /* [Q3N_MAX_DRAFT + 1, vocab] */
    float              *draft_hidden; /* [d] */
    q3n__learned        learned;
};

/* ---- Memory ---- */

/* The pending rows: two calls' of one token each, or of a token and its drafts. */
static void q3n__pending_layout(q3n__arena *a, q3n_session *s)
{
    const q3n_config *c = &s->model->config;
    q3n__pending *t = &s->state.pending;
    t->max = s->options.speculate ? 2 * (Q3N_MAX_DRAFT + 1) : 2;
    const size_t n = (size_t)s->n_delta * (size_t)t->max;
    for (int i = 0; i < 2; i++) {
        t->u[i] = (float *)q3n__arena_take(a, n * (size_t)q3n__config_channels(c), sizeof(float));
        t->ba[i] = (float *)q3n__arena_take(a, n * 2 * (size_t)c->linear_num_value_heads,
                                            sizeof(float));
    }
    if (t->max > 2)
        t->x = (float *)q3n__arena_take(a, n * (size_t)q3n__config_channels(c), sizeof(float));
    t->applied = (unsigned char *)q3n__arena_take(a, (size_t)s->n_delta, 1);
}

/* Measure (a->base NULL) or hand out everything after the session struct. */
static void q3n__session_layout(q3n__arena *a, q3n_session *s, q3n_session_memory *m)
{
    const q3n_config *c = &s->model->config;
    const size_t f = sizeof(float), d = (size_t)c->hidden_size, V = (size_t)c->vocab_size;
    const size_t n_pages = (size_t)s->n_pages;
    size_t at = a->used;
    for (int i = 0; i < 2; i++) s->delta[i] = (float *)q3n__arena_take(a, s->shape.delta_len, f);
    m->delta_state = a->used - at;
    at = a->used;
    for (int i = 0; i < 2; i++) s->conv[i] = (float *)q3n__arena_take(a, s->shape.conv_len, f);
    m->conv_state = a->used - at;
    at = a->used;
    if (s->n_delta > 0) q3n__pending_layout(a, s);
    s->hidden = (float *)q3n__arena_take(a, s->shape.has_mtp ? Q3N__HIDDEN_ROWS : 1, f * d);
    s->work_hidden = (float *)q3n__arena_take(a, d, f);
    s->logits = (float *)q3n__arena_take(a, V, f);
    if (c->num_labels > 0) s->pooled = (float *)q3n__arena_take(a, d, f);
    if (s->options.speculate) {
        s->draft_logits = (float *)q3n__arena_take(a, Q3N_MAX_DRAFT + 1, f * V);
        s->draft_hidden = (float *)q3n__arena_take(a, d, f);
    }
    m->scratch = a->used - at;
    s->state.kv.page = (q3n__page **)q3n__arena_take(a, n_pages, sizeof *s->state.kv.page);
    s->saved_page = (q3n__page **)q3n__arena_take(a, n_pages, sizeof *s->saved_page);
    s->owned = (unsigned char *)q3n__arena_take(a, n_pages, 1);
    s->saved_owned = (unsigned char *)q3n__arena_take(a, n_pages, 1);
    if (s->options.count_experts && c->num_experts > 0) {
        const size_t n = (size_t)c->num_hidden_layers * (size_t)c->num_experts;
        s->counts = (int64_t *)q3n__arena_take(a, n, sizeof *s->counts);
        s->state.expert_counts = (int64_t *)q3n__arena_take(a, n, sizeof *s->counts);
    }
}

/* Everything that create needs to know, also the options of the engine; bytes of its one allocation
 * without the allocator's own head, 0 with err if it cannot be. */
static size_t q3n__session_measure(const q3n_model *m, const q3n_session_options *o,
                                   q3n_session *s, q3n_session_memory *memory,
                                   q3n_engine_options *engine, q3n_error *err)
{
    memset(s, 0, sizeof *s);
    memset(memory, 0, sizeof *memory);
    s->model = m;
    if (q3n__session_options_set(m, o, &s->options, engine, err) != Q3N_OK) return 0;
    if (s->options.engine && s->options.engine->model != m) {
        q3n__fail(err, Q3N_ERR_ARG, -1, "the engine is of another model");
        return 0;
    }
    if (s->options.engine && q3n__wants_mtp(m, &s->options) && !s->options.engine->has_mtp) {
        q3n__fail(err, Q3N_ERR_ARG, -1, "the engine is that of a session without the MTP module: "
                  "q3n_engine_create makes one that has room for it");
        return 0;
    }
    if (s->options.cache && s->options.cache->model != m) {
        q3n__fail(err, Q3N_ERR_ARG, -1, "the cache is of another model");
        return 0;
    }
    q3n__shape_make(m, s->options.kv_type, q3n__wants_mtp(m, &s->options), &s->shape);
    for (int l = 0; l < m->config.num_hidden_layers; l++) s->n_delta += m->config.layer_types[l];
    s->n_pages = q3n__pages_of(s->options.capacity);
    s->state.kv.type = s->options.kv_type;
    s->state.kv.n_kv_heads = m->config.num_key_value_heads;
    s->state.kv.dim = m->config.head_dim;
    q3n__arena a = { NULL, 0, 0 };
    q3n__arena_take(&a, 1, sizeof *s);
    q3n__session_layout(&a, s, memory);
    if (a.overflow) {
        q3n__fail(err, Q3N_ERR_MEMORY, -1, "a session of %d tokens does not fit the address space",
                  s->options.capacity);
        return 0;
    }
    return a.used;
}

/* ---- Pages of a session ---- */

/* How many slots of page i the first n tokens of a text fill. */
static int q3n__slots_of(int n, int i)
{
    const int64_t left = (int64_t)n - (int64_t)i * Q3N__KV_BLOCK;
    return left < 0 ? 0 : left > Q3N__KV_BLOCK ? Q3N__KV_BLOCK : (int)left;
}

/* Make page i one that this session may write from slot `used` on; 0 = no memory.  A page is
 * written by one session alone: by the only one that holds it, or by the one that made it if it has
 * written exactly what the session knows - who shares it knows less, and does not look further.
 * Otherwise the session gets a copy of the slots that it uses. */
static int q3n__page_for_writing(q3n_session *s, int i, int used)
{
    q3n__page **page = &s->state.kv.page[i];
    const int room = *page && (*page)->n_layers >= s->shape.n_kv_layers;
    if (room && q3n__atomic_load(&(*page)->n_refs) == 1) {
        s->owned[i] = 1;
        return 1;
    }
    if (room && s->owned[i] && (*page)->n_used == used) return 1;
    q3n__page *copy = q3n__page_alloc(s->model, &s->shape);
    if (!copy) return 0;
    if (*page) q3n__page_copy(&s->shape, copy, *page, used);
    q3n__page_release(s->model, *page);
    *page = copy;
    s->owned[i] = 1;
    return 1;
}

/* Pages for tokens [first, end), before any of them is evaluated.  What is there when this fails
 * stays with the session, for the next call or its end. */
static q3n_result q3n__session_reserve(q3n_session *s, int first, int end)
{
    int ok = 1;
    q3n__engine_reserve(s->engine, q3n__pages_of(end));
    for (int i = first / Q3N__KV_BLOCK; ok && i < q3n__pages_of(end); i++)
        ok = q3n__page_for_writing(s, i, q3n__slots_of(first, i));
    return ok ? Q3N_OK
              : q3n__fail(&s->error, Q3N_ERR_MEMORY, -1, "no memory for %d tokens: a page of %d "
                          "takes %zu bytes", end, Q3N__KV_BLOCK, s->shape.page_bytes);
}

/* Work with the given pages instead of the text's, which are kept for commit or rollback: until
 * then the session holds both.  A page of both is still its own; others may be of another session,
 * and are copied before they are written. */
static void q3n__session_adopt(q3n_session *s, q3n__page *const *page, int n_pages)
{
    const size_t n = (size_t)s->n_pages;
    memcpy(s->saved_page, s->state.kv.page, n * sizeof *s->saved_page);
    memcpy(s->saved_owned, s->owned, n);
    s->has_saved = 1;
    for (int i = 0; i < s->n_pages; i++) {
        q3n__page *p = i < n_pages ? page[i] : NULL;
        if (p) q3n__page_retain(p);
        s->owned[i] = p && p == s->saved_page[i] && s->saved_owned[i];
        s->state.kv.page[i] = p;
    }
}

static void q3n__session_drop(q3n_session *s, q3n__page **page)
{
    for (int i = 0; i < s->n_pages; i++) {
        q3n__page_release(s->model, page[i]);
        page[i] = NULL;
    }
}

/* ---- Rows that the MTP module has not read ---- */

/* The i-th of them; i = unread.n and on: where a deferred call's rows go. */
static float *q3n__unread_row(const q3n_session *s, int i)
{
    return s->hidden + (size_t)(s->unread.at + i) * (size_t)s->shape.hidden_size;
}

/* The module has read the first n rows, or does without them. */
static void q3n__unread_drop(q3n_session *s, int n)
{
    s->unread.at += n;
    s->unread.n -= n;
    s->unread.mtp_length += n;
}

/* ---- Transactions ---- */

static size_t q3n__session_counts(const q3n_session *s)   /* of experts: [layer][E] */
{
    return (size_t)s->model->config.num_hidden_layers * (size_t)s->model->config.num_experts;
}

/* Back to nothing, as a new session is.  Pages that nobody else holds stay, to be written again:
 * a reset costs the next text no allocation. */
static void q3n__session_clear(q3n_session *s)
{
    s->length = s->has_logits = 0;
    s->unread = (q3n__unread){ 0, 0, 0, 1 };
    s->state.pending.n = 0;
    if (s->n_delta) {
        memset(s->state.pending.applied, 0, (size_t)s->n_delta);
        memset(s->delta[s->delta_now], 0, s->shape.delta_len * sizeof(float));
        memset(s->conv[s->conv_now], 0, s->shape.conv_len * sizeof(float));
    }
    if (s->counts) memset(s->counts, 0, q3n__session_counts(s) * sizeof *s->counts);
    for (int i = 0; i < s->n_pages; i++) {
        q3n__page *p = s->state.kv.page[i];
        if (!p || q3n__atomic_load(&p->n_refs) == 1) continue;
        q3n__page_release(s->model, p);
        s->state.kv.page[i] = NULL;
    }
}

/* Where the MTP module's keys begin in a text of so many tokens: at `first`, or not yet.  Slot 0
 * never has one. */
static int q3n__first_within(int first, int length)
{
    return first < length ? first : length > 0 ? length : 1;
}

/* Nothing is pending afterwards; the text is the same. */
static void q3n__session_flush(q3n_session *s)
{
    s->state.delta = s->delta[s->delta_now];
    q3n__flush(&s->engine->run, &s->state, s->n_delta);
}

/* Begin a call after the session's text.  What a cancelled call did to the matrices is finished
 * first: it changes nothing that can be seen.  Rows that the module has read go only now, so that a
 * call which failed had them back. */
static void q3n__session_begin(q3n_session *s)
{
    const size_t d = (size_t)s->shape.hidden_size;
    if (s->n_delta && memchr(s->state.pending.applied, 1, (size_t)s->n_delta))
        q3n__session_flush(s);
    s->state.length = s->length;
    s->state.kv_valid = 0;
    s->state.lazy = 0;
    s->begun = s->deferred = 0;
    s->work_mtp = s->unread.mtp_length;
    s->work_first = s->unread.mtp_first;
    if (s->unread.at > 0)
        memmove(s->hidden, q3n__unread_row(s, 0), (size_t)s->unread.n * d * sizeof(float));
    s->unread.at = 0;
    if (s->unread.n > 0)
        memcpy(s->work_hidden, q3n__unread_row(s, s->unread.n - 1), d * sizeof(float));
    if (s->counts)
        memset(s->state.expert_counts, 0, q3n__session_counts(s) * sizeof *s->counts);
}

/* The text becomes what was evaluated: all if n < 0, else the first n tokens of one pass, which was
 * lazy if the model has DeltaNet - matrices once stored cannot go back.  Then the rest is a failed
 * call's: the columns of the convolutions go back, pending rows and slots are not counted, and
 * slots of rejected tokens may be written again although others share the page (n_used).
 *
 * Takes no memory and cannot fail. */
static void q3n__session_commit(q3n_session *s, int n)
{
    q3n__state *st = &s->state;
    const int ran = st->length - s->length;
    const size_t d = (size_t)s->shape.hidden_size;
    if (n >= 0) st->length = s->length + n;
    if (st->lazy) {
        if (n >= 0 && n < ran) q3n__conv_rewind(&s->engine->run, st, s->n_delta, n);
        s->conv_now ^= 1;
        st->pending.now ^= 1;
        st->pending.first = st->pending.n;
        st->pending.n = n < 0 ? ran : n;
    } else if (s->begun) {
        s->conv_now ^= 1;
        s->delta_now ^= 1;
        st->pending.n = 0;
    }
    if (s->n_delta) memset(st->pending.applied, 0, (size_t)s->n_delta);
    if (s->has_saved) q3n__session_drop(s, s->saved_page);
    for (size_t i = 0; s->counts && st->expert_counts && i < q3n__session_counts(s); i++)
        s->counts[i] += st->expert_counts[i];           /* NULL: what a rewind runs again */
    const int last = (st->length - 1) / Q3N__KV_BLOCK;
    if (n >= 0 && n < ran && st->length > 0) {
        st->kv.page[last]->n_used = q3n__slots_of(st->length, last);
        for (int i = last + 1; i < q3n__pages_of(s->length + ran); i++) st->kv.page[i]->n_used = 0;
    }
    s->has_saved = s->begun = st->lazy = s->has_logits = 0;
    s->length = st->length;
    s->unread.mtp_first = q3n__first_within(s->work_first, s->length);
    if (s->deferred) {
        s->unread.n += n < 0 ? ran : n;
    } else {
        memcpy(s->hidden, s->work_hidden, d * sizeof(float));
        s->unread.at = 0;
        s->unread.n = s->length > 0;
        s->unread.mtp_length = s->length;
    }
    s->deferred = 0;
}

/* The text stays what it was.  Nothing of the other matrices, columns, rows and slots is undone:
 * they are written before they are read again. */
static void q3n__session_rollback(q3n_session *s)
{
    if (s->has_saved) {
        q3n__session_drop(s, s->state.kv.page);
        memcpy(s->state.kv.page, s->saved_page, (size_t)s->n_pages * sizeof *s->saved_page);
        memcpy(s->owned, s->saved_owned, (size_t)s->n_pages);
    }
    s->has_saved = s->begun = s->deferred = s->state.lazy = 0;
    s->state.length = s->length;
}

/* Point the layers at the state that the pass reads and at the one that it writes: a call's first
 * pass reads the text's and writes the other, later ones stay in the other.
 *
 *   lazy       few tokens, and the last of the call: they are left pending
 *   deferred   the same for the module, if its unread rows have room; else it reads them now */
static void q3n__session_point(q3n_session *s, int n, int last)
{
    q3n__state *st = &s->state;
    const int from_delta = s->begun ? !s->delta_now : s->delta_now;
    const int from_conv = s->begun ? !s->conv_now : s->conv_now;
    st->n_pending = s->begun ? 0 : st->pending.n;
    st->lazy = s->n_delta > 0 && last && !s->begun && 2 * n <= st->pending.max
                 && (n == 1 || st->pending.x);
    st->delta = s->delta[from_delta];
    st->delta_out = s->delta[!s->delta_now];
    st->conv = s->conv[from_conv];
    st->conv_out = s->conv[!s->conv_now];
    s->deferred = s->shape.has_mtp && last && !s->begun && !s->has_saved && s->unread.n > 0
                && n <= Q3N_MAX_DRAFT + 1 && s->unread.n + n <= Q3N__MAX_HIDDEN;
}

/* ---- The text ---- */

/* Tokens [first, first + n), page by page; the caller knows that they are there. */
static void q3n__session_copy_tokens(const q3n_session *s, int first, int n, int32_t *tokens)
{
    for (int i = 0, count; i < n; i += count) {
        const int slot = (first + i) % Q3N__KV_BLOCK;
        count = n - i < Q3N__KV_BLOCK - slot ? n - i : Q3N__KV_BLOCK - slot;
        memcpy(tokens + i, s->state.kv.page[(first + i) / Q3N__KV_BLOCK]->tokens + slot,
               (size_t)count * sizeof *tokens);
    }
}

/* The first n tokens in one array, to be freed; NULL = no memory.  Pages are where a text lives: an
 * array of the capacity beside them would be memory that few calls need. */
static int32_t *q3n__session_text(const q3n_session *s, int n)
{
    int32_t *text = (int32_t *)q3n__alloc(&s->model->allocator, (size_t)n * sizeof *text);
    if (text) q3n__session_copy_tokens(s, 0, n, text);
    return text;
}

/* =====================================================================================
 * [26] MTP                                                                      >>mtp
 *
 * The model's multi-token-prediction module in a session: it follows the text a few rows late, and
 * drafts what may come next.  Whether drafts are right is no matter here.
 *
 *     row p of the module reads    token p, and the trunk's hidden state of token p - 1
 *     its key and value            slot p of the pages' last layer
 *     its output                   about token p + 1
 *
 * In decode each call would run the module's layer for one row; rows wait (unread) until a draft
 * needs them or they have no more room, and are read in one go.  Long passes are followed at once,
 * for their rows are in the scratch.  The scratch is the engine's, and q3n__mtp_forward writes over
 * run.a: what a pass has left there is copied before (e->hidden).
 * ===================================================================================== */

/* The MTP module over positions [first, first + n) of a session, batch_size at a time; see
 * q3n__mtp_forward.  It works on a copy of the state, of which it writes slots of pages alone.
 * Returns its last row, in run.a. */
static const float *q3n__mtp_pass(q3n_session *s, const int32_t *tokens, const float *hidden,
                                 int first, int n)
{
    q3n_engine *e = s->engine;
    const size_t d = (size_t)s->shape.hidden_size;
    q3n__state st = s->state;
    st.kv.skip = s->work_first;
    st.kv_valid = 0;
    st.expert_counts = NULL;
    int count = 0;
    for (int i = 0; i < n; i += count) {
        count = n - i < e->options.batch_size ? n - i : e->options.batch_size;
        st.length = first + i;
        const q3n__segment segment = { &st, 0, count };
        e->run.segments = &segment;
        e->run.n_segments = 1;
        e->run.n = count;
        q3n__mtp_forward(&e->run, tokens + i, hidden + (size_t)i * d);
    }
    e->run.segments = NULL;
    return e->run.a + (size_t)(count - 1) * d;
}

/* Keys of the module for all tokens of the text: afterwards one row of hidden is left, which waits
 * for the token after it.  Changes nothing that can be seen, in a call or between calls; if the
 * call fails the keys stay right. */
static void q3n__mtp_flush(q3n_session *s)
{
    int32_t tokens[Q3N__MAX_HIDDEN];
    const int n = s->unread.n - 1;
    if (!s->shape.has_mtp || n < 1) return;
    s->work_first = s->unread.mtp_first;
    for (int i = 0; i < n; i++) {
        const int p = s->unread.mtp_length + i;
        tokens[i] = s->state.kv.page[p / Q3N__KV_BLOCK]->tokens[p % Q3N__KV_BLOCK];
    }
    q3n__mtp_pass(s, tokens, q3n__unread_row(s, 0), s->unread.mtp_length, n);
    q3n__unread_drop(s, n);
    s->work_mtp = s->unread.mtp_length;
}

/* The module's keys of a pass's tokens, which begin at row0 of e->hidden's rows: each needs the row
 * before it, the first the session's work_hidden, which takes that place while the module reads.
 * Tokens whose keys the pages hold (work_mtp) are passed over. */
static void q3n__mtp_follow(q3n_session *s, const int32_t *tokens, int row0, int n)
{
    q3n_engine *e = s->engine;
    const size_t d = (size_t)s->shape.hidden_size;
    const int p = s->state.length;                     /* before the pass */
    int first = s->work_mtp > p ? s->work_mtp : p;
    if (first < 1) first = 1;
    if (first < p + n) {
        float *before = e->hidden + (size_t)row0 * d;  /* the row before row0: of another chunk */
        memcpy(e->row, before, d * sizeof(float));
        memcpy(before, s->work_hidden, d * sizeof(float));
        q3n__mtp_pass(s, tokens + (first - p), before + (size_t)(first - p) * d, first,
                     p + n - first);
        memcpy(before, e->row, d * sizeof(float));
    }
    if (s->work_mtp < p + n) s->work_mtp = p + n;
}

/* A module that is not asked does not follow the text: that would cost a share of a layer for each
 * token.  Then it begins anew at the last rows, and sees no further back. */
#define Q3N__MTP_RESTART 8

static void q3n__mtp_restart(q3n_session *s)
{
    const int drop = s->unread.n - Q3N__MTP_RESTART;
    if (drop <= 0) return;
    q3n__unread_drop(s, drop);
    s->work_first = s->unread.mtp_first = s->unread.mtp_length;
    s->work_mtp = s->unread.mtp_length;
}

static int32_t q3n__largest_logit(const float *logits, int n)   /* the first of equals; no NaN */
{
    int32_t best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best] || logits[best] != logits[best]) best = i;
    return best;
}

/* Logits for a draft of one row: of the first tokens of the vocabulary alone, which byte-pair
 * merges have numbered by how common they are; the head is most of what a draft costs, and a token
 * that is never drafted is merely chosen without. */
#define Q3N__DRAFT_VOCAB 4   /* one token in so many */
#define Q3N__DRAFT_MIN 2048

static void q3n__draft_logits(const q3n__pass *r, const float *hidden, float *logits)
{
    const int V = r->model->config.vocab_size;
    int n = (V / Q3N__DRAFT_VOCAB + 15) / 16 * 16;
    if (n < Q3N__DRAFT_MIN) n = Q3N__DRAFT_MIN;
    if (n > V) n = V;
    q3n__mat w = r->model->weights.lm_head;
    w.n_rows = n;
    const q3n__linear out = { &w, NULL, hidden, r->mixed_q, logits, w.n_cols, n };
    if (q3n__is_quantised(w.type)) q3n__quantize_rows(r, r->mixed_q, hidden, 1, w.n_cols);
    q3n__linear_all(r->pool, r->k, &out, 1, 1);
    for (int i = n; i < V; i++) logits[i] = -Q3N__INFINITY;
}

/* The module's drafts after token, which follows the text: the first from the trunk's rows, the
 * others from the module's own output.  sampler NULL = the most probable of the whole vocabulary.
 * Returns how many there are: fewer than n where the sampler finds nothing to choose.  Pages must
 * reach n tokens beyond the text. */
static int q3n__draft_mtp(q3n_session *s, q3n_sampler *sampler, int32_t token, q3n__draft *draft,
                          int n)
{
    q3n_engine *e = s->engine;
    const size_t d = (size_t)s->shape.hidden_size, V = (size_t)s->shape.vocab_size;
    int32_t tokens[Q3N__MAX_HIDDEN], after[Q3N_MAX_DRAFT + 1] = { token };
    const int rows = s->unread.n;                       /* the last is about `token` */
    q3n__session_copy_tokens(s, s->unread.mtp_length, rows - 1, tokens);
    tokens[rows - 1] = token;
    const float *out = q3n__mtp_pass(s, tokens, q3n__unread_row(s, 0), s->unread.mtp_length, rows);
    q3n__unread_drop(s, rows - 1);
    s->work_mtp = s->length;
    for (int i = 0; i < n; i++) {
        float *logits = s->draft_logits + (size_t)i * V;
        memcpy(s->draft_hidden, out, d * sizeof(float));
        if (sampler) {
            q3n__draft_logits(&e->run, s->draft_hidden, logits);
            if (!q3n__sampler_draft(sampler, logits, after, i + 1, &draft[i])) return i;
        } else {
            q3n__logits(&e->run, s->draft_hidden, 1, logits);
            q3n__draft_point(&draft[i], q3n__largest_logit(logits, s->shape.vocab_size));
        }
        after[i + 1] = draft[i].id;
        if (i + 1 < n)
            out = q3n__mtp_pass(s, &draft[i].id, s->draft_hidden, s->length + 1 + i, 1);
    }
    return n;
}

/* =====================================================================================
 * [27] CHECKPOINTS                                                      >>checkpoints
 *
 * Snapshots of a session, into the cache and out of it: between calls, and in a call of what is
 * evaluated so far.  A snapshot is whole - nothing pending, no rows unread - so that whoever
 * restores it needs no other's buffers.  Pages are held, not copied; copied are matrices, which
 * change in place: 75 MB for 36 layers of 32 heads of 128 x 128, by all threads.
 * ===================================================================================== */

/* Floats from f32 or bf16 to f32, or to bf16: the pointers that are not NULL say which.  A copy is
 * cut into ranges for the threads, however many layers lie in one. */
typedef struct {
    const float *from;
    float       *to_f32;
    uint16_t    *to_bf16;
    const uint16_t *from_bf16;
    size_t       n;
} q3n__copy_arg;

#define Q3N__COPY_RANGE 65536   /* floats: 256 KB, more than waking a thread costs */

static void q3n__copy_task(void *arg, int begin, int end)
{
    const q3n__copy_arg *j = (const q3n__copy_arg *)arg;
    const size_t first = (size_t)begin * Q3N__COPY_RANGE;
    size_t last = (size_t)end * Q3N__COPY_RANGE;
    if (last > j->n) last = j->n;
    if (j->from && j->to_f32)
        memcpy(j->to_f32 + first, j->from + first, (last - first) * sizeof(float));
    else if (j->from)
        for (size_t i = first; i < last; i++) j->to_bf16[i] = q3n__f32_to_bf16(j->from[i]);
    else
        for (size_t i = first; i < last; i++) j->to_f32[i] = q3n__bf16_to_f32(j->from_bf16[i]);
}

static void q3n__copy(q3n__pool *p, q3n__copy_arg arg)
{
    q3n__parallel(p, (int)((arg.n + Q3N__COPY_RANGE - 1) / Q3N__COPY_RANGE), 1, q3n__copy_task,
                  &arg);
}

/* The state as a snapshot: of the text, or in a call of what is evaluated so far; with that of a
 * sampler, or of none (NULL).  NULL = no memory, and the session is as before.
 *
 * In a call it comes after a pass that was not the last: such a pass is neither lazy nor deferred,
 * so that the matrices are complete and the module has read its rows.  Logits are of the text
 * alone. */
static q3n_snapshot *q3n__session_take(q3n_session *s, q3n_type delta_type, int in_call,
                                       const q3n_sampler *sampler)
{
    const q3n__shape *h = &s->shape;
    if (!in_call) {
        q3n__session_flush(s);
        q3n__mtp_flush(s);
    }
    q3n_snapshot *snap = q3n__snapshot_alloc(s->model, h, delta_type,
                                             in_call ? s->state.length : s->length,
                                             sampler ? 1 + sampler->n_window : 0);
    if (!snap) return NULL;
    if (sampler) q3n__sampler_get_state(sampler, snap->sampler);
    for (int b = 0; b < snap->n_pages; b++) {
        snap->page[b] = s->state.kv.page[b];
        q3n__page_retain(snap->page[b]);
    }
    const int bf16 = snap->delta_type == Q3N_TYPE_BF16;
    const int from = in_call && s->begun;               /* 1 = the other of the two */
    const q3n__copy_arg copy = { .from = s->delta[s->delta_now ^ from],
                                 .to_f32 = bf16 ? NULL : (float *)snap->delta,
                                 .to_bf16 = bf16 ? (uint16_t *)snap->delta : NULL,
                                 .n = h->delta_len };
    q3n__copy(&s->engine->pool, copy);
    if (h->conv_len)
        memcpy(snap->conv, s->conv[s->conv_now ^ from], h->conv_len * sizeof(float));
    snap->mtp_first = q3n__first_within(in_call ? s->work_first : s->unread.mtp_first,
                                        snap->length);
    snap->has_hidden = snap->length > 0;
    snap->has_logits = !in_call && s->has_logits;
    memcpy(snap->hidden, in_call ? s->work_hidden : q3n__unread_row(s, 0),
           (size_t)h->hidden_size * sizeof(float));
    if (snap->has_logits)
        memcpy(snap->logits, s->logits, (size_t)h->vocab_size * sizeof(float));
    return snap;
}

/* Let a call that has begun go on from a snapshot instead of the text; snap NULL = from nothing.
 * Matrices and columns go where the call works, so that the text's wait beside them.  The pages are
 * another matter: q3n__session_adopt. */
static void q3n__session_start(q3n_session *s, const q3n_snapshot *snap)
{
    const q3n__shape *h = &s->shape;
    float *delta = s->delta[!s->delta_now], *conv = s->conv[!s->conv_now];
    s->begun = 1;
    s->state.length = snap ? snap->length : 0;
    s->work_mtp = s->state.length;
    s->work_first = 1;
    if (snap && s->shape.has_mtp)                        /* its keys, or it begins after the text */
        s->work_first = snap->shape.has_mtp ? snap->mtp_first
                                            : q3n__first_within(INT_MAX, snap->length);
    if (!snap) {
        if (h->delta_len) memset(delta, 0, h->delta_len * sizeof(float));
        if (h->conv_len) memset(conv, 0, h->conv_len * sizeof(float));
        return;
    }
    const int bf16 = snap->delta_type == Q3N_TYPE_BF16;
    const q3n__copy_arg copy = { .from = bf16 ? NULL : (const float *)snap->delta,
                                 .from_bf16 = bf16 ? (const uint16_t *)snap->delta : NULL,
                                 .to_f32 = delta, .n = h->delta_len };
    q3n__copy(&s->engine->pool, copy);
    if (h->conv_len) memcpy(conv, snap->conv, h->conv_len * sizeof(float));
    memcpy(s->work_hidden, snap->hidden, (size_t)h->hidden_size * sizeof(float));
}

/* The same from nothing, and with no pages: a text of its own. */
static void q3n__session_start_empty(q3n_session *s)
{
    q3n__session_start(s, NULL);
    q3n__session_adopt(s, NULL, 0);
}

/* The session becomes what snap is: begin and commit, with no pass between.  All checks come first.
 * A sampler takes on the state of another if there is one. */
static q3n_result q3n__session_restore(q3n_session *s, const q3n_snapshot *snap)
{
    if (snap->model != s->model)
        return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "the snapshot is of another model");
    if (snap->shape.kv_type != s->shape.kv_type)
        return q3n__fail(&s->error, Q3N_ERR_UNSUPPORTED, -1, "the snapshot has a KV cache of type "
                         "%s, the session one of %s: give both the same kv_type",
                         q3n__types[snap->shape.kv_type].name, q3n__types[s->shape.kv_type].name);
    if (snap->length > s->options.capacity)
        return q3n__fail(&s->error, Q3N_ERR_FULL, -1, "the snapshot has %d tokens, the session "
                         "room for %d", snap->length, s->options.capacity);
    q3n__session_begin(s);
    q3n__session_start(s, snap);
    q3n__session_adopt(s, snap->page, snap->n_pages);
    q3n__session_commit(s, -1);
    s->has_logits = snap->has_logits;
    if (s->has_logits)
        memcpy(s->logits, snap->logits, (size_t)s->shape.vocab_size * sizeof(float));
    if (s->sampler && snap->n_sampler)
        q3n__sampler_set_state(s->sampler, snap->sampler, snap->n_sampler - 1);
    return Q3N_OK;
}

/* Put the state into the cache unless it is there: then it counts as used, and marked if this is.
 * 0 = no memory: whoever was not asked to keep anything goes on without. */
static int q3n__session_put(q3n_session *s, int in_call, int marked)
{
    const int n = in_call ? s->state.length : s->length;
    if (!s->cache || n == 0 || !s->model->config.causal) return 1;
    const size_t pages = (size_t)q3n__pages_of(n) * s->shape.page_bytes;
    if (pages + q3n__snapshot_measure(&s->shape, s->options.snapshot_type, n, 0)
        > s->cache->max_bytes) return 1;             /* it would not be kept */
    int32_t *text = q3n__session_text(s, n);
    if (!text) return 0;
    const int there = q3n__cache_touch(s->cache, &s->shape, s->options.snapshot_type, text, n,
                                       marked);
    q3n__free(&s->model->allocator, text);
    if (there) return 1;
    q3n_snapshot *snap = q3n__session_take(s, s->options.snapshot_type, in_call, NULL);
    if (!snap) return 0;
    q3n__cache_put(s->cache, snap, marked);
    q3n__snapshot_release(snap);
    return 1;
}

/* Where snapshot_every wants one: in a call at its multiples, where q3n__session_stride has ended
 * the pass; after a call that passed any of them (`before`: length at its beginning). */
static void q3n__session_put_due(q3n_session *s, int in_call, int before)
{
    const int every = s->options.snapshot_every;
    if (!s->cache || every <= 0) return;
    if (in_call ? s->state.length % every == 0 : s->length / every != before / every)
        q3n__session_put(s, in_call, 0);
}

/* =====================================================================================
 * [28] EVALUATION                                                        >>evaluation
 *
 * Tokens of texts through the model.  Everything that evaluates is a call of items, from one
 * session or from many; a session alone is a call of one item.  A call is one transaction of all
 * its sessions:
 *
 *     q3n__call_begin    checks every item and begins its session     cancel: IDLE -> RUNNING
 *     q3n__call_passes   until all items are done or the limit is reached
 *                          plan      which sessions, how many tokens each: e->chunks
 *                          reserve   pages for them
 *                          pass      the forward over all their rows together
 *                          collect   what the caller wants of the rows, before the next pass
 *                                    writes over them
 *                          put_due   snapshots at the multiples of snapshot_every
 *     q3n__call_end      commits all sessions, or rolls all back      cancel: -> IDLE
 *
 * Until the end a text is what it was: passes work beside it (>>session), so to fail takes no more
 * than to forget.  What is already with the caller then - rows of outputs - is undefined, as the
 * manual says; snapshots that the cache has taken on the way stay there, for they are states of
 * texts that were evaluated right.
 *
 * Calls of an engine follow one another on one thread; but cancel may come from any.  SPECULATION
 * commits a part of its pass, and so has an end of its own.  Nobody else calls q3n__forward.
 * ===================================================================================== */

/* What a call of one session gives besides the logits after its last token; NULL = not wanted.  All
 * is the caller's memory, written as passes go. */
typedef struct {
    float      *all_logits;      /* [n, vocab] of the item's tokens                              */
    float      *hidden;          /* [d] of the last token                                        */
    float      *all_hidden;      /* [n, d]                                                       */
    float      *pooled;          /* [d], zeros before the call                                   */
    q3n_pooling pooling;
    int         last;            /* which token pooling "last" reads                             */
} q3n__wanted;

/* The items are the caller's own array: no call allocates, however many they are.  `done` of an
 * item changes with the commit alone. */
typedef struct {
    q3n_engine      *e;
    q3n_engine_item *first;      /* n_items, stride bytes apart: their struct is as long as it is
                                    in the caller's header                                       */
    size_t           stride;
    int              n_items;
    int              n_begun;    /* the first of them, which the end is to touch                 */
    int              alone;      /* 1 = one session's own call: errors are in its record         */
    int              whole;      /* 1 = tokens are a text from its beginning, to be the session's;
                                    0 = they follow what it has                                  */
    const q3n_limit *limit;      /* NULL = none                                                  */
    q3n__wanted      want;       /* if alone                                                     */
} q3n__call;

/* The fields that an item has had from the first: what it has beyond them may be missing. */
#define Q3N__ITEM_MIN (offsetof(q3n_engine_item, logits) + sizeof(float *))

static q3n_engine_item *q3n__item(const q3n__call *c, int i)
{
    return (q3n_engine_item *)(void *)((uint8_t *)c->first + (size_t)i * c->stride);
}

/* Tokens [n] to a session alone. */
static q3n_engine_item q3n__item_of(q3n_session *s, const int32_t *tokens, int n, float *logits)
{
    return (q3n_engine_item){ .size = sizeof(q3n_engine_item), .session = s, .tokens = tokens,
                              .n = n, .logits = logits };
}

static q3n__call q3n__call_alone(q3n_engine_item *it)
{
    return (q3n__call){ .e = it->session->engine, .first = it, .stride = sizeof *it, .n_items = 1,
                        .alone = 1 };
}

/* ---- What can be evaluated ---- */

/* Tokens [n] after a text of `length`. */
static q3n_result q3n__session_check(q3n_session *s, const int32_t *tokens, int n, int length)
{
    const q3n_config *c = &s->model->config;
    const int batch = s->engine->options.batch_size;
    if (!tokens || n < 1) return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "no tokens to evaluate");
    if (n > s->options.capacity - length)
        return q3n__fail(&s->error, Q3N_ERR_FULL, -1,
                         "%d tokens after %d do not fit a session of %d: make "
                         "it with a larger capacity", n, length, s->options.capacity);
    if (!c->causal && (length > 0 || n > batch))
        return q3n__fail(&s->error, Q3N_ERR_UNSUPPORTED, -1,
                         "the model attends both ways: reset the session "
                         "and evaluate the whole text, at most %d tokens (batch_size), at once",
                         batch);
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= c->vocab_size)
            return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "token %d is %d, expected 0 .. %d", i,
                             tokens[i], c->vocab_size - 1);
    return Q3N_OK;
}

static q3n_result q3n__check_head(q3n_session *s, int wanted)
{
    if (!wanted || s->model->weights.lm_head.data) return Q3N_OK;
    return q3n__fail(&s->error, Q3N_ERR_UNSUPPORTED, -1, "the model has no language head: it "
                     "classifies (q3n_session_classify)");
}

static q3n_result q3n__check_causal(q3n_session *s)
{
    if (s->model->config.causal) return Q3N_OK;
    return q3n__fail(&s->error, Q3N_ERR_UNSUPPORTED, -1,
                     "the model attends both ways: its state cannot be continued");
}

/* ---- Items ---- */

/* Items that are done already stay out of the call, even if their session is another's item. */
static int q3n__item_is_in(const q3n__call *c, const q3n_engine_item *it)
{
    return c->alone || it->done < it->n;
}

/* How many of its tokens are evaluated, in calls before and in this one. */
static int q3n__item_at(const q3n__call *c, const q3n_engine_item *it)
{
    const q3n_session *s = it->session;
    return c->whole ? s->state.length : it->done + s->state.length - s->length;
}

static q3n_error *q3n__call_error(const q3n__call *c)
{
    return c->alone ? &c->first->session->error : &c->e->error;
}

/* A session has failed and said why; who called the engine is told there, with the item. */
static q3n_result q3n__item_fail(const q3n__call *c, int i)
{
    const q3n_error *why = &q3n__item(c, i)->session->error;
    return c->alone ? why->code
                    : q3n__fail(&c->e->error, why->code, why->offset, "item %d: %s", i,
                                why->message);
}

/* Whether item i can go on, and its session begun.  A session that is not IDLE has been begun by
 * this same call: other calls of the engine have ended. */
static q3n_result q3n__item_begin(q3n__call *c, int i)
{
    const q3n_engine_item *it = q3n__item(c, i);
    q3n_session *s = it->session;
    if (s->engine != c->e)
        return q3n__fail(&c->e->error, Q3N_ERR_ARG, -1, "item %d: its session has another engine",
                         i);
    if (q3n__atomic_load(&s->cancel) != Q3N__IDLE)
        return q3n__fail(q3n__call_error(c), Q3N_ERR_ARG, -1, "item %d: the session stands in "
                         "another item too", i);
    const int32_t *tokens = it->tokens ? it->tokens + it->done : NULL;
    q3n_result r = c->alone ? Q3N_OK : q3n__check_causal(s);   /* batches may cut a text */
    if (r == Q3N_OK) r = q3n__session_check(s, tokens, it->n - it->done, c->whole ? 0 : s->length);
    if (r == Q3N_OK) r = q3n__check_head(s, it->logits || c->want.all_logits);
    if (r != Q3N_OK) return q3n__item_fail(c, i);
    q3n__atomic_store(&s->cancel, Q3N__RUNNING);
    q3n__session_begin(s);
    return Q3N_OK;
}

/* The text becomes what was evaluated.  A session that no pass came to is left as it is: its text
 * may be a part of `tokens`, or the limit came first. */
static void q3n__item_commit(const q3n__call *c, q3n_engine_item *it)
{
    q3n_session *s = it->session;
    const int before = s->length, at = q3n__item_at(c, it);
    if (!s->begun && !s->has_saved) return;
    q3n__session_commit(s, -1);
    it->done = at;
    if (at == it->n && it->logits) {                    /* q3n__collect_logits has put them there */
        s->has_logits = 1;
        memcpy(it->logits, s->logits, (size_t)s->shape.vocab_size * sizeof *s->logits);
    }
    q3n__session_put_due(s, 0, before);
}

/* Pages for the next n tokens of item i.  Those whose keys and values are stored need none
 * (q3n__session_seek).  To ask for the same pages again is to do nothing. */
static q3n_result q3n__item_reserve(const q3n__call *c, int i, int n)
{
    q3n_session *s = q3n__item(c, i)->session;
    const q3n__state *st = &s->state;
    const int first = st->kv_valid > st->length ? st->kv_valid : st->length, end = st->length + n;
    if (first >= end || q3n__session_reserve(s, first, end) == Q3N_OK) return Q3N_OK;
    return q3n__item_fail(c, i);
}

/* ---- Begin and end ---- */

/* From here on requests to cancel count.  The end comes before the commit, so that a call which
 * took a request is undone: one that succeeds has taken none, and later ones are told that they
 * came too late. */
static q3n_result q3n__call_leave(q3n__call *c, q3n_result r)
{
    int cancelled = q3n__leave(&c->e->cancel);
    for (int i = 0; i < c->n_begun; i++) {
        const q3n_engine_item *it = q3n__item(c, i);
        if (q3n__item_is_in(c, it) && q3n__leave(&it->session->cancel)) cancelled = 1;
    }
    return r == Q3N_OK && cancelled ? q3n__cancelled(q3n__call_error(c)) : r;
}

/* The end of every call that has begun: r is how it went. */
static q3n_result q3n__call_end(q3n__call *c, q3n_result r)
{
    r = q3n__call_leave(c, r);
    for (int i = 0; i < c->n_begun; i++) {
        q3n_engine_item *it = q3n__item(c, i);
        if (!q3n__item_is_in(c, it)) continue;
        if (r == Q3N_OK) q3n__item_commit(c, it);
        else             q3n__session_rollback(it->session);
    }
    return r;
}

/* Where it fails the call has ended: the item that is refused is not touched, those before it are
 * rolled back. */
static q3n_result q3n__call_begin(q3n__call *c)
{
    q3n_result r = Q3N_OK;
    q3n__atomic_store(&c->e->cancel, Q3N__RUNNING);
    for (c->n_begun = 0; c->n_begun < c->n_items; c->n_begun++) {
        if (q3n__item_is_in(c, q3n__item(c, c->n_begun))) r = q3n__item_begin(c, c->n_begun);
        if (r != Q3N_OK) return q3n__call_end(c, r);
    }
    return Q3N_OK;
}

/* Also of sessions that the pass under way leaves out: they stop it as well. */
static int q3n__call_is_cancelled(const q3n__call *c)
{
    if (q3n__is_cancelled(&c->e->cancel)) return 1;
    for (int i = 0; i < c->n_begun; i++) {
        const q3n_engine_item *it = q3n__item(c, i);
        if (q3n__item_is_in(c, it) && q3n__is_cancelled(&it->session->cancel)) return 1;
    }
    return 0;
}

/* ---- The plan of a pass ---- */

/* How many of the next n tokens go into one pass: at most `max`, and no further than the next
 * point of snapshot_every. */
static int q3n__session_stride(const q3n_session *s, int n, int max)
{
    const int every = s->cache && s->model->config.causal ? s->options.snapshot_every : 0;
    if (n > max) n = max;
    if (every > 0 && n > every - s->state.length % every) n = every - s->state.length % every;
    return n;
}

static int q3n__is_limited(const q3n_limit *limit)
{
    return limit && (limit->max_tokens > 0 || limit->max_microseconds > 0);
}

/* The most rows that are expected to end in time, of a call that has evaluated `taken`; 0 = none.
 * A first pass there always is: a bound below the cost of a token still gets that token. */
static int q3n__call_rows(const q3n__call *c, int taken, int64_t elapsed)
{
    const q3n_engine *e = c->e;
    const q3n_limit *limit = c->limit;
    int rows = e->options.batch_size;
    if (!q3n__is_limited(limit)) return rows;
    if (limit->max_tokens > 0 && rows > limit->max_tokens - taken) rows = limit->max_tokens - taken;
    if (limit->max_microseconds <= 0) return rows;
    if (e->costs.pass[1] == 0.0 && e->costs.row == 0.0) return rows < 1 ? rows : 1;
    const double left = (double)(limit->max_microseconds - elapsed);
    while (rows > 1 && q3n__cost_of(&e->costs, rows) > left) rows /= 2;
    if (taken > 0 && q3n__cost_of(&e->costs, 1) > left) return 0;
    return rows;
}

/* Fill e->chunks with at most `rows` tokens: one of every item that is not done, then more of each
 * in their order.  Returns the number of chunks.
 *
 *     items A: 1 left, B: 900 left, C: 1 left, rows 512      chunks A 1, B 510, C 1
 *
 * So sessions that decode go on while another one's prompt is read.  Where a pass has no room for
 * one token of each, the engine remembers whose turn is next. */
static int q3n__call_plan(const q3n__call *c, int rows)
{
    q3n_engine *e = c->e;
    int n = 0, k = 0;
    for (; k < c->n_items && n < rows; k++) {
        const int i = (e->turn + k) % c->n_items;
        const q3n_engine_item *it = q3n__item(c, i);
        const int at = q3n__item_is_in(c, it) ? q3n__item_at(c, it) : it->n;
        if (at >= it->n) continue;
        e->chunks[n++] = (q3n__chunk){ it->session, it->tokens + at, 1, it->n - at == 1, i };
    }
    if (!c->alone) e->turn = k < c->n_items ? (e->turn + k) % c->n_items : 0;
    rows -= n;
    for (k = 0; k < n && rows > 0; k++) {
        q3n__chunk *p = &e->chunks[k];
        const q3n_engine_item *it = q3n__item(c, p->item);
        const int left = it->n - q3n__item_at(c, it);
        p->n = q3n__session_stride(p->s, left, rows + 1);
        p->last = p->n == left;
        rows -= p->n - 1;
    }
    return n;
}

/* ---- The pass ---- */

/* The final norms of a pass's rows.  They stay until the next pass: an engine whose MTP module has
 * run since, and used run.a itself, keeps them in `hidden`. */
static const float *q3n__engine_rows(const q3n_engine *e)
{
    return e->hidden ? e->hidden + e->model->config.hidden_size : e->run.a;
}

/* A pass has evaluated n tokens of s, rows from row0. */
static void q3n__session_advance(q3n_session *s, const int32_t *tokens, int row0, int n)
{
    q3n__state *st = &s->state;
    const size_t d = (size_t)s->shape.hidden_size;
    const float *rows = q3n__engine_rows(s->engine) + (size_t)row0 * d;
    const int end = st->length + n, first = st->kv_valid > st->length ? st->kv_valid : st->length;
    for (int p = first; p < end; p++)
        st->kv.page[p / Q3N__KV_BLOCK]->tokens[p % Q3N__KV_BLOCK] = tokens[p - st->length];
    if (first < end)
        for (int b = first / Q3N__KV_BLOCK; b < q3n__pages_of(end); b++)
            st->kv.page[b]->n_used = q3n__slots_of(end, b);
    if (s->deferred)
        memcpy(q3n__unread_row(s, s->unread.n), rows, (size_t)n * d * sizeof(float));
    else if (s->shape.has_mtp)
        q3n__mtp_follow(s, tokens, row0, n);
    memcpy(s->work_hidden, rows + (size_t)(n - 1) * d, d * sizeof(float));
    st->length = end;
    s->begun = 1;
}

/* One pass over all chunks, at most batch_size tokens together; the sessions have begun and have
 * pages.  Afterwards q3n__engine_rows has the rows of all chunks, one after another.
 * Q3N_ERR_CANCELLED, of the engine or of a session of the pass, leaves the work undone: roll back.
 *
 * A session with more unread rows than its module's next run takes has them read first; not one
 * whose text is being replaced, whose rows are of the text that it had. */
static q3n_result q3n__engine_pass(q3n_engine *e, const q3n__chunk *chunk, int n_chunks)
{
    q3n__pass *r = &e->run;
    int rows = 0;
    const int64_t start = q3n__now();
    for (int i = 0; i < n_chunks; i++) {
        q3n_session *s = chunk[i].s;
        q3n__session_point(s, chunk[i].n, chunk[i].last);
        if (!s->deferred && !s->begun && !s->has_saved) q3n__mtp_flush(s);
    }
    for (int i = 0; i < n_chunks; i++) {
        e->segments[i] = (q3n__segment){ &chunk[i].s->state, rows, chunk[i].n };
        memcpy(e->tokens + rows, chunk[i].tokens, (size_t)chunk[i].n * sizeof *e->tokens);
        rows += chunk[i].n;
    }
    r->segments = e->segments;
    r->n_segments = n_chunks;
    r->n = rows;
    const int done = q3n__forward(r, e->tokens, &e->options.layer_hook);
    r->segments = NULL;
    if (!done) return Q3N_ERR_CANCELLED;
    const size_t d = (size_t)e->model->config.hidden_size;
    if (e->hidden) memcpy(e->hidden + d, r->a, (size_t)rows * d * sizeof(float));
    for (int i = 0, row0 = 0; i < n_chunks; row0 += chunk[i++].n)
        q3n__session_advance(chunk[i].s, chunk[i].tokens, row0, chunk[i].n);
    q3n__engine_learn(e, rows, q3n__now() - start);
    return Q3N_OK;
}

/* ---- Collectors: what the caller wants of a pass's rows ---- */

/* Add the rows of tokens [at, at + n) of the item to want.pooled: in f32 and by rising token, so
 * that passes may cut the text anywhere. */
static void q3n__collect_pooled(const q3n__call *c, const float *rows, int at, int n)
{
    const q3n__wanted *w = &c->want;
    const int d = c->e->model->config.hidden_size;
    const float share = w->pooling == Q3N_POOLING_MEAN ? 1.0f / (float)c->first->n : 1.0f;
    for (int t = 0; t < n; t++)
        if (w->pooling == Q3N_POOLING_MEAN || (w->pooling == Q3N_POOLING_FIRST && at + t == 0)
            || (w->pooling == Q3N_POOLING_LAST && at + t == w->last))
            c->e->run.k->axpy(w->pooled, share, rows + (size_t)t * (size_t)d, d);
}

/* Of a session alone, whose chunk is the only one. */
static void q3n__collect_rows(const q3n__call *c, const q3n__chunk *p)
{
    const q3n__wanted *w = &c->want;
    const size_t d = (size_t)p->s->shape.hidden_size, V = (size_t)p->s->shape.vocab_size;
    const size_t n = (size_t)p->n, at = (size_t)(q3n__item_at(c, c->first) - p->n);
    const float *rows = q3n__engine_rows(c->e);
    if (w->all_hidden) memcpy(w->all_hidden + at * d, rows, n * d * sizeof *rows);
    if (w->all_logits) q3n__logits(&c->e->run, rows, p->n, w->all_logits + at * V);
    if (w->pooled) q3n__collect_pooled(c, rows, (int)at, p->n);
    if (w->hidden && p->last) memcpy(w->hidden, rows + (n - 1) * d, d * sizeof *rows);
}

/* The logits of rows that lie in e->gathered, to their sessions.  They are not the texts', until
 * the call ends well. */
static void q3n__give_logits(q3n_engine *e, q3n_session *const *to, int n)
{
    const size_t V = (size_t)e->model->config.vocab_size;
    float *logits = n == 1 ? to[0]->logits : e->logits;
    q3n__logits(&e->run, e->gathered, n, logits);
    for (int i = 0; i < n; i++) {
        if (n > 1) memcpy(to[i]->logits, logits + (size_t)i * V, V * sizeof *logits);
        to[i]->has_logits = 0;
    }
}

/* The logits after items that this pass has ended, logit_rows at a time: the head, often a tenth of
 * a model's bytes, is read once for all of them. */
static void q3n__collect_logits(const q3n__call *c, int n_chunks)
{
    q3n_engine *e = c->e;
    const size_t d = (size_t)e->model->config.hidden_size;
    const float *row = q3n__engine_rows(e) - d;                /* after i: the last of chunk i */
    q3n_session *to[Q3N__LOGIT_ROWS];
    int n = 0;
    for (int i = 0; i < n_chunks; i++) {
        const q3n__chunk *p = &e->chunks[i];
        row += (size_t)p->n * d;
        if (!p->last || !q3n__item(c, p->item)->logits) continue;
        memcpy(e->gathered + (size_t)n * d, row, d * sizeof *row);
        to[n++] = p->s;
        if (n < e->logit_rows) continue;
        q3n__give_logits(e, to, n);
        n = 0;
    }
    if (n > 0) q3n__give_logits(e, to, n);
}

/* ---- Passes ---- */

/* A request that came during the pass is heard before the head is evaluated, which may take as long
 * as several layers. */
static q3n_result q3n__call_pass(const q3n__call *c, int n_chunks)
{
    q3n_engine *e = c->e;
    for (int i = 0; i < n_chunks; i++) {
        const q3n_result r = q3n__item_reserve(c, e->chunks[i].item, e->chunks[i].n);
        if (r != Q3N_OK) return r;
    }
    if (q3n__call_is_cancelled(c) || q3n__engine_pass(e, e->chunks, n_chunks) != Q3N_OK
        || q3n__call_is_cancelled(c)) return q3n__cancelled(q3n__call_error(c));
    if (c->alone) q3n__collect_rows(c, e->chunks);
    q3n__collect_logits(c, n_chunks);
    for (int i = 0; i < n_chunks; i++)
        if (!e->chunks[i].last) q3n__session_put_due(e->chunks[i].s, 1, 0);
    return Q3N_OK;
}

/* Without a limit it is known what will be evaluated: then all pages are there before the first
 * pass, and a prompt that does not fit memory does not fail after minutes of work. */
static q3n_result q3n__call_passes(q3n__call *c)
{
    const int64_t start = q3n__now();
    int taken = 0;
    for (int i = 0; i < c->n_items && !q3n__is_limited(c->limit); i++) {
        const q3n_engine_item *it = q3n__item(c, i);
        if (!q3n__item_is_in(c, it)) continue;
        const q3n_result r = q3n__item_reserve(c, i, it->n - q3n__item_at(c, it));
        if (r != Q3N_OK) return r;
    }
    for (;;) {
        const int n_chunks = q3n__call_plan(c, q3n__call_rows(c, taken, q3n__now() - start));
        if (n_chunks == 0) return Q3N_OK;
        for (int i = 0; i < n_chunks; i++) taken += c->e->chunks[i].n;
        const q3n_result r = q3n__call_pass(c, n_chunks);
        if (r != Q3N_OK) return r;
    }
}

static q3n_result q3n__call_eval(q3n__call *c)
{
    const q3n_result r = q3n__call_begin(c);
    return r != Q3N_OK ? r : q3n__call_end(c, q3n__call_passes(c));
}

/* ---- One session ---- */

/* The logits after the text, from what is kept of its last token. */
static const float *q3n__session_last_logits(q3n_session *s)
{
    if (!s->has_logits)
        q3n__logits(&s->engine->run, q3n__unread_row(s, s->unread.n - 1), 1, s->logits);
    s->has_logits = 1;
    return s->logits;
}

static q3n_result q3n__session_eval(q3n_session *s, const int32_t *tokens, int n,
                                    const q3n_outputs *out)
{
    q3n_engine_item it = q3n__item_of(s, tokens, n, out->logits);
    q3n__call c = q3n__call_alone(&it);
    c.want.all_logits = out->all_logits;
    c.want.hidden = out->hidden;
    c.want.all_hidden = out->all_hidden;
    return q3n__call_eval(&c);
}

/* The token that pooling "last" reads: the last that is no padding, the first if all are. */
static int q3n__last_token(const q3n_model *m, const int32_t *tokens, int n)
{
    int t = n - 1;
    if (m->pad_id >= 0) while (t > 0 && tokens[t] == m->pad_id) t--;
    return t;
}

/* Evaluate a text of n tokens from nothing; it becomes the session's, and out [d] its hidden states
 * pooled.  Counts of experts begin anew with it. */
static q3n_result q3n__session_pool(q3n_session *s, const int32_t *tokens, int n,
                                    q3n_pooling pooling, float *out)
{
    q3n_engine_item it = q3n__item_of(s, tokens, n, NULL);
    q3n__call c = q3n__call_alone(&it);
    c.whole = 1;
    q3n_result r = q3n__call_begin(&c);
    if (r != Q3N_OK) return r;
    q3n__session_start_empty(s);
    c.want = (q3n__wanted){ .pooled = out, .pooling = pooling,
                            .last = q3n__last_token(s->model, tokens, n) };
    memset(out, 0, (size_t)s->shape.hidden_size * sizeof *out);
    r = q3n__call_end(&c, q3n__call_passes(&c));
    if (r == Q3N_OK && s->counts)
        memcpy(s->counts, s->state.expert_counts, q3n__session_counts(s) * sizeof *s->counts);
    return r;
}

/* Scores from the pooled hidden state; a head over logits is linear in it, so it may pool first. */
static q3n_result q3n__session_classify(q3n_session *s, const int32_t *tokens, int n, float *scores)
{
    const q3n_config *c = &s->model->config;
    q3n_engine *e = s->engine;
    if (c->num_labels == 0)
        return q3n__fail(&s->error, Q3N_ERR_UNSUPPORTED, -1,
                         "the model has no classification head");
    const q3n_result r = q3n__session_pool(s, tokens, n, (q3n_pooling)c->pooling, s->pooled);
    if (r != Q3N_OK) return r;
    const float *input = s->pooled;
    if (c->classifier_input == Q3N_CLASSIFIER_LOGITS) {
        q3n__logits(&e->run, s->pooled, 1, s->logits);
        input = s->logits;
    }
    const q3n__mat *w = &s->model->weights.score;
    const q3n__linear out = { w, s->model->weights.score_bias, input, NULL, scores, w->n_cols,
                              w->n_rows };
    q3n__linear_all(&e->pool, e->run.k, &out, 1, 1);
    return Q3N_OK;
}

/* ---- Many sessions ---- */

/* What is wrong with an item whatever its session is. */
static q3n_result q3n__item_check(const q3n__call *c, int i)
{
    const q3n_engine_item *it = q3n__item(c, i);
    q3n_error *err = &c->e->error;
    char name[24];
    snprintf(name, sizeof name, "item %d", i);
    if (it->size != c->stride)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "%s: size %zu, the first has %zu", name, it->size,
                         c->stride);
    const q3n_result r = q3n__struct_check(it, sizeof *it, name, err);
    if (r != Q3N_OK) return r;
    if (!it->session || it->done < 0 || it->done > it->n || (!it->tokens && it->done < it->n))
        return q3n__fail(err, Q3N_ERR_ARG, -1, "item %d: no session, no tokens, or done %d of %d "
                         "tokens", i, it->done, it->n);
    return Q3N_OK;
}

/* All items are looked at before the first of their sessions is begun. */
static q3n_result q3n__engine_eval(q3n__call *c)
{
    for (int i = 0; i < c->n_items; i++) {
        const q3n_result r = q3n__item_check(c, i);
        if (r != Q3N_OK) return r;
    }
    return q3n__call_eval(c);
}

/* =====================================================================================
 * [29] REUSE                                                                  >>reuse
 *
 * Texts that begin as something does that is known: prompts, and going back.  What is known are
 * states, not texts: attention can be cut anywhere, for its keys and values lie token by token in
 * pages, but DeltaNet's matrices are those after one certain token and nowhere else.  So where a
 * model has DeltaNet a text goes on from the session's end or from a snapshot, and what lies
 * between is evaluated again; without, from any token that both texts share.
 *
 *     text of the session    a b c d e f            known: the end of it (6), snapshots at 2 and 4
 *     wanted                 a b c d x y            shares 4
 *     with DeltaNet          a b c d|x y            begins at the snapshot of 4; without that one
 *                            a b|c d x y            at 2, where c d keep their keys and values
 *                                                   (kv_valid) and run for the matrices alone
 *     without DeltaNet       a b c d|x y            pages alone; no snapshot is needed
 * ===================================================================================== */

/* Where a call begins: n tokens are there.  has_logits: s->logits are those of the snapshot, which
 * is of all tokens, and become the session's when the call ends well. */
typedef struct { int n, has_logits; } q3n__start;

/* Let a call that has begun go on from the longest beginning of tokens [n] that costs nothing: the
 * text itself, a snapshot, or without DeltaNet any part of the text, of which the last token is
 * evaluated again.  What the text's pages hold of tokens [0, kv_valid) is not stored again.
 * only_reuse: nothing is evaluated after that.  Nothing is lost: the call can be rolled back, for
 * pages and matrices of the text wait beside those of the work. */
static q3n__start q3n__session_seek(q3n_session *s, const int32_t *tokens, int n, int only_reuse)
{
    const int m = s->model->config.causal
                ? q3n__common_prefix(s->state.kv.page, s->length, tokens, n) : 0;
    const int stay = m == s->length, any = s->n_delta == 0;
    q3n__mtp_flush(s);                                   /* the module's keys are the text's too */
    int cut = m < n - 1 ? m : n - 1;
    if ((s->shape.has_mtp || only_reuse) && cut == m && cut > 0)
        cut--;                            /* token m, or the caller, needs the row of token m - 1 */
    const int min = stay ? s->length : any ? cut : 0;
    q3n_snapshot *snap = s->cache ? q3n__cache_find(s->cache, &s->shape, s->options.snapshot_type,
                                                    tokens, n, min) : NULL;
    if (!snap && stay) return (q3n__start){ s->length, 0 };
    const int own = !snap || snap->length <= m;          /* its pages reach further, or as far */
    if (snap || !any) q3n__session_start(s, snap);
    else s->state.length = cut;
    if (own) q3n__session_adopt(s, s->state.kv.page, q3n__pages_of(m));
    else     q3n__session_adopt(s, snap->page, snap->n_pages);
    s->state.kv_valid = own ? m : s->state.length;
    if (own) {                                           /* the module's keys, or what is left */
        s->work_mtp = m;
        s->work_first = s->unread.mtp_first < m ? s->unread.mtp_first : m > 0 ? m : 1;
    }
    const int has_logits = snap && snap->has_logits && snap->length == n;
    if (has_logits) {
        memcpy(s->logits, snap->logits, (size_t)s->shape.vocab_size * sizeof(float));
        s->has_logits = 0;                  /* not the text's, until the call ends well */
    }
    q3n__snapshot_release(snap);
    return (q3n__start){ s->state.length, has_logits };
}

/* The tokens are the session's own: what is evaluated again is not counted again, and nobody asks
 * for logits. */
static q3n_result q3n__session_rewind(q3n_session *s, int length)
{
    if (length < 0 || length > s->length)
        return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "rewind to %d: the session has %d tokens",
                         length, s->length);
    const q3n_result causal = q3n__check_causal(s);
    if (causal != Q3N_OK || length == s->length) return causal;
    if (length == 0) {                                   /* takes no pass: nothing to cancel */
        q3n__session_begin(s);
        q3n__session_start_empty(s);
        q3n__session_commit(s, -1);
        return Q3N_OK;
    }
    int32_t *text = q3n__session_text(s, length);
    if (!text) return q3n__fail(&s->error, Q3N_ERR_MEMORY, -1, "no memory for %d ids", length);
    q3n_engine_item it = q3n__item_of(s, text, length, NULL);
    q3n__call c = q3n__call_alone(&it);
    c.whole = 1;
    q3n_result r = q3n__call_begin(&c);
    if (r == Q3N_OK) {
        int64_t *counts = s->state.expert_counts;
        q3n__session_seek(s, text, length, 0);
        s->state.expert_counts = NULL;
        r = q3n__call_end(&c, q3n__call_passes(&c));
        s->state.expert_counts = counts;
    }
    q3n__free(&s->model->allocator, text);
    return r;
}

/* tokens [n] from where that is cheapest; only_reuse: no further than what is there.  n_reused is
 * set before the first pass, for hooks that tell how much is done. */
static q3n_result q3n__session_prefill(q3n_session *s, const int32_t *tokens, int n, float *logits,
                                       int only_reuse, int *n_reused)
{
    q3n_engine_item it = q3n__item_of(s, tokens, n, logits);
    q3n__call c = q3n__call_alone(&it);
    c.whole = 1;
    q3n_result r = q3n__call_begin(&c);
    if (r != Q3N_OK) return r;
    const int m = s->model->config.causal
                ? q3n__common_prefix(s->state.kv.page, s->length, tokens, n) : 0;
    const q3n__start start = q3n__session_seek(s, tokens, n, only_reuse);
    int reused = start.n;
    if (only_reuse) it.n = reused = s->n_delta == 0 && m > start.n ? m : start.n;
    if (n_reused) *n_reused = reused;
    const int passes = start.n < it.n;
    if (!passes) it.logits = NULL;                       /* no pass computes them */
    r = q3n__call_end(&c, q3n__call_passes(&c));
    if (r == Q3N_OK && start.has_logits) s->has_logits = 1;
    if (r == Q3N_OK && !passes && logits)
        memcpy(logits, q3n__session_last_logits(s), (size_t)s->shape.vocab_size * sizeof *logits);
    return r;
}

/* =====================================================================================
 * [30] SPECULATION                                                      >>speculation
 *
 * Several tokens a pass: drafts come from the model's MTP module or from the text itself, one pass
 * of the trunk checks them, and what is rejected is forgotten like a cancelled call.  How many
 * drafts a step tries is chosen from measured times and acceptance, none included.
 *
 *     text, token     | draft 1, draft 2, draft 3       one pass over token and drafts: 4 rows
 *     sampler            a        b        x             chooses from each row in turn
 *     draft 1 = a, draft 2 = b, draft 3 is not x         tokens a b x; the text grows by token a b
 *
 * A pass of few rows reads the weights once, as a pass of one does: right drafts are nearly free,
 * and with experts each row reads some of its own.  The step is a call with an end of its own: it
 * commits the rows that were right, and if it fails gives back what the sampler, the module and the
 * estimates were (q3n__step_mark).
 * ===================================================================================== */

/* The drafts of a step: planned, then made, then without those after the first end of text. */
typedef struct {
    q3n__draft    draft[Q3N_MAX_DRAFT];
    int           n;
    q3n_speculate source;
} q3n__drafts;

/* ---- Drafts ---- */

/* Tokens of context that a looked-up draft must share with the end of the text, and the most that
 * are compared; how far back is looked. */
#define Q3N__LOOKUP_MIN 2
#define Q3N__LOOKUP_MAX  8
#define Q3N__LOOKUP_SPAN  65536

static int32_t q3n__text_at(const q3n_session *s, int32_t token, int i)   /* token ends the text */
{
    return i == s->length ? token
                          : s->state.kv.page[i / Q3N__KV_BLOCK]->tokens[i % Q3N__KV_BLOCK];
}

/* What followed the longest earlier match of the text's end, the latest of equals, and then again
 * what followed that; returns how many of draft [n] there are: n or none.  Looks back from the end
 * at each token once, and compares further only where it is `token`. */
static int q3n__draft_lookup(const q3n_session *s, int32_t token, q3n__draft *draft, int n)
{
    int best = Q3N__LOOKUP_MIN - 1, best_at = -1;
    const int stop = s->length > Q3N__LOOKUP_SPAN ? s->length - Q3N__LOOKUP_SPAN : 0;
    for (int at = s->length - 1; at >= stop && best < Q3N__LOOKUP_MAX; at--) {
        if (q3n__text_at(s, token, at) != token) continue;
        int same = 1;
        while (same < Q3N__LOOKUP_MAX && same <= at
               && q3n__text_at(s, token, at - same) == q3n__text_at(s, token, s->length - same))
            same++;
        if (same > best) {
            best = same;
            best_at = at;
        }
    }
    if (best_at < 0) return 0;
    for (int i = 0; i < n; i++) {
        const int at = best_at + 1 + i;                 /* a text that repeats itself goes on so */
        q3n__draft_point(&draft[i], at <= s->length ? q3n__text_at(s, token, at)
                                                    : draft[at - s->length - 1].id);
    }
    return n;
}

/* ---- How many drafts ---- */

/* Costs are kept in steps without drafts, of which there is one now and then: the machine may have
 * other things to do, and what was measured a while ago stays comparable.  Outliers count for
 * twice what was expected. */
static void q3n__ratio_learn(double *ratio, double seen, double share)
{
    if (*ratio == 0.0) *ratio = seen;
    else *ratio += ((seen < 2.0 * *ratio ? seen : 2.0 * *ratio) - *ratio) * share;
}

/* The first try of a number of drafts meets cold memory and does not count. */
static void q3n__step_learn(q3n__learned *k, int n, double us)
{
    if (k->step_tries[n]++ == 0) return;
    if (n == 0) q3n__ratio_learn(&k->step_us, us, 0.25);
    else if (k->step_us > 0.0) q3n__ratio_learn(&k->step_cost[n], us / k->step_us, 0.125);
}

/* Tries before a measured cost is believed: until then it is taken for low, and so tried again. */
#define Q3N__SURE_TRIES 12

/* A step with n drafts. */
static double q3n__step_cost(const q3n__learned *k, int n)
{
    int known = n;
    while (known > 0 && k->step_cost[known] == 0.0) known--;
    const double seen = (known ? k->step_cost[known] : 1.0) + 0.1 * (n - known);
    const double low = 1.0 + 0.2 * n;
    return n > 0 && k->step_tries[n] < Q3N__SURE_TRIES && low < seen ? low : seen;
}

/* Tokens per unit of time with the best number of drafts, 1 .. max, of a source; *n is it.  A step
 * without has 1. */
static double q3n__best_length(const q3n__learned *k, q3n_speculate source, int max, int *n)
{
    double tokens = 1.0, p = 1.0, draft = 0.0, best = 0.0;
    *n = 0;
    for (int i = 1; i <= max; i++) {
        p *= k->acceptance[source].accept[i - 1];
        tokens += p;
        if (source == Q3N_SPECULATE_MTP) draft += k->draft_cost[i > 1];
        const double rate = tokens / (q3n__step_cost(k, i) + draft);
        if (rate <= best) continue;
        best = rate;
        *n = i;
    }
    return best;
}

/* What drafts must promise to be made; what share of the time goes into others, for texts and
 * estimates change; the steps of such a try if the module has to catch up first, and what that
 * takes. */
#define Q3N__WORTH       1.02
#define Q3N__TRY_SHARE   0.005
#define Q3N__TRY_STEPS   4
#define Q3N__TRY_BEGIN   1.0

/* Steps since drafts of the module paid after which it does not follow the text any more. */
#define Q3N__MTP_IDLE    32

/* Whether to make drafts of the given rate though they do not seem to pay. */
static int q3n__try_drafts(q3n__learned *k, double rate, int mtp)
{
    if (k->try_left > 0) {
        k->try_left--;
        return 1;
    }
    const int lagging = mtp && k->mtp_idle >= Q3N__MTP_IDLE;
    const double loss = rate < 1.0 ? 1.0 - rate : 0.0;
    const double price = lagging ? Q3N__TRY_BEGIN + Q3N__TRY_STEPS * loss : loss;
    if (k->try_credit < 8.0) k->try_credit += Q3N__TRY_SHARE;
    if (k->try_credit < price) return 0;
    k->try_credit -= price;
    k->try_left = lagging ? Q3N__TRY_STEPS - 1 : 0;
    return 1;
}

/* Steps with drafts in a row before one without: it keeps the unit of costs right. */
#define Q3N__PLAIN_GAP   16

/* Choose source and number of drafts: at most `max`, fixed by the options or by what pays.  Drafts
 * that are looked up cost nothing and are there already; the module's are made after the choice.
 * The first steps, and one after every Q3N__PLAIN_GAP, are without drafts. */
static void q3n__drafts_plan(q3n_session *s, int32_t token, int max, q3n__drafts *plan)
{
    const q3n_speculate want = s->options.speculate;
    q3n__drafts *p = plan;
    p->n = 0;
    p->source = Q3N_SPECULATE_LOOKUP;
    if (max < 1) return;
    const int fixed = s->options.draft, mtp = s->shape.has_mtp && s->unread.n > 0;
    if (want != Q3N_SPECULATE_MTP)
        p->n = q3n__draft_lookup(s, token, p->draft, fixed && fixed < max ? fixed : max);
    if (fixed) {
        if (p->n > 0 || !mtp) return;
        p->n = fixed < max ? fixed : max;
        p->source = Q3N_SPECULATE_MTP;
        return;
    }
    if (s->learned.spec.n_steps < 3 || ++s->learned.since_plain > Q3N__PLAIN_GAP) p->n = max = 0;
    if (max < 1) return;                                /* what a plain step costs comes first */
    int by_lookup = 0, by_mtp = 0;
    const double lookup = q3n__best_length(&s->learned, Q3N_SPECULATE_LOOKUP, p->n, &by_lookup);
    const double module = q3n__best_length(&s->learned, Q3N_SPECULATE_MTP, mtp ? max : 0, &by_mtp);
    const double rate = module > lookup ? module : lookup;
    p->n = by_lookup;
    if (module > lookup) {
        p->n = by_mtp;
        p->source = Q3N_SPECULATE_MTP;
    }
    const int pays = p->n > 0 && rate > Q3N__WORTH;
    if (!pays && p->n > 0 && !q3n__try_drafts(&s->learned, rate, module > lookup)) p->n = 0;
    s->learned.mtp_idle = pays && module > lookup ? 0 : s->learned.mtp_idle + 1;
}

/* Whether the module is to begin anew instead of reading all that it has not read: its drafts have
 * not paid for a while, and now it is to draft, or the rows would have no room. */
static int q3n__mtp_lags(const q3n_session *s, const q3n__drafts *p)
{
    const int reads = p->n > 0 && p->source == Q3N_SPECULATE_MTP;
    if (!s->shape.has_mtp || s->options.draft || s->learned.mtp_idle < Q3N__MTP_IDLE) return 0;
    return reads || s->unread.n + p->n + 1 > Q3N__MAX_HIDDEN;
}

/* What a step of n drafts, of which `right` were accepted, teaches: of those after the first wrong
 * one nothing is known.  The last 24 or so count. */
static void q3n__drafts_learn(q3n_session *s, const q3n__drafts *p, int right)
{
    q3n__acceptance *a = &s->learned.acceptance[p->source];
    for (int i = 0; i < p->n && i <= right; i++) {
        if (a->weight[i] < 24.0) a->weight[i] += 1.0;
        a->accept[i] += ((i < right) - a->accept[i]) / a->weight[i];
    }
    s->learned.spec.n_drafted += p->n;
    s->learned.spec.n_accepted += right;
}

/* A new session takes six in ten drafts for right, so that it tries some. */
static void q3n__speculation_reset(q3n_session *s)
{
    memset(&s->learned.spec, 0, sizeof s->learned.spec);
    for (int i = 0; i < Q3N_SPECULATE_COUNT; i++)
        for (int k = 0; k < Q3N_MAX_DRAFT; k++) {
            s->learned.acceptance[i].accept[k] = 0.6;
            s->learned.acceptance[i].weight[k] = 1.0;
        }
}

/* ---- A step ---- */

/* n drafts of the module took so many plain steps: the first has the unread rows to read, each more
 * is one row and a part of the head. */
static void q3n__draft_learn(q3n__learned *k, int n, double cost)
{
    double *first = &k->draft_cost[0], *more = &k->draft_cost[1];
    if (*first == 0.0) *first = cost / n;
    else if (n == 1) q3n__ratio_learn(first, cost, 0.125);
    if (n > 1) q3n__ratio_learn(more, cost > *first ? (cost - *first) / (n - 1) : 0.01, 0.125);
}

/* Make the drafts that the plan wants and put token and drafts into tokens; returns the rows.  What
 * comes after the end of a text is no draft.  Where many rows had been unread the time says nothing
 * about drafts. */
static int q3n__drafts_make(q3n_session *s, q3n__drafts *p, int32_t *tokens)
{
    const int64_t start = q3n__now();
    const int rows = s->unread.n;
    if (p->n > 0 && p->source == Q3N_SPECULATE_MTP) {
        p->n = q3n__draft_mtp(s, s->sampler, tokens[0], p->draft, p->n);
        if (s->learned.step_us > 0.0 && rows <= Q3N_MAX_DRAFT + 1 && p->n > 0)
            q3n__draft_learn(&s->learned, p->n, (double)(q3n__now() - start) / s->learned.step_us);
    }
    for (int i = 0; i < p->n; i++) {
        if (q3n_model_is_eos(s->model, p->draft[i].id)) p->n = i;
        else tokens[1 + i] = p->draft[i].id;
    }
    return 1 + p->n;
}

/* Choose from the logits of rows, a token and its drafts, until a draft is wrong or the text ends:
 * *n tokens.  Logits that hold no number are an error in the first row; in others the next step
 * comes upon them. */
static q3n_result q3n__drafts_choose(q3n_session *s, const int32_t *rows, const q3n__drafts *p,
                                     const float *logits, int32_t *tokens, int *n)
{
    const size_t V = (size_t)s->shape.vocab_size;
    for (int i = 0;; i++) {
        const q3n_result r = q3n__sampler_choose(s->sampler, logits + (size_t)i * V, rows, i + 1,
                                                 i < p->n ? &p->draft[i] : NULL, &tokens[i]);
        if (r != Q3N_OK)
            return i > 0 ? Q3N_OK : q3n__fail(&s->error, r, -1, "%s", s->sampler->error.message);
        *n = i + 1;
        if (i == p->n || tokens[i] != p->draft[i].id || q3n_model_is_eos(s->model, tokens[i]))
            return Q3N_OK;
    }
}

/* The pass over token and drafts, and the choice, which a hook may cancel. */
static q3n_result q3n__step(q3n_session *s, const int32_t *rows, const q3n__drafts *p,
                            int32_t *tokens, int *n)
{
    q3n_engine *e = s->engine;
    if (s->unread.n + p->n + 1 > Q3N__MAX_HIDDEN) q3n__mtp_flush(s);
    const q3n__chunk chunk = { s, rows, p->n + 1, 1, 0 };
    if (q3n__engine_pass(e, &chunk, 1) != Q3N_OK) return q3n__cancelled(&s->error);
    float *logits = p->n > 0 ? s->draft_logits : s->logits;
    if (p->n == 0) s->has_logits = 0;                   /* not the text's, until the commit */
    q3n__logits(&e->run, q3n__engine_rows(e), p->n + 1, logits);
    return q3n__drafts_choose(s, rows, p, logits, tokens, n);
}

/* The text becomes what was right: n rows of the pass.  A step without drafts has the logits after
 * its token, and keeps them; else the last row's are not worth a copy, for the next step has a
 * token already. */
static void q3n__step_commit(q3n_session *s, const q3n__drafts *p, int n)
{
    const size_t d = (size_t)s->shape.hidden_size;
    memcpy(s->work_hidden, q3n__engine_rows(s->engine) + (size_t)(n - 1) * d, d * sizeof(float));
    q3n__session_commit(s, n);
    s->has_logits = p->n == 0;
    if (p->n > 0 && p->source == Q3N_SPECULATE_MTP)
        q3n__unread_drop(s, 1);                         /* the module has seen `token` already */
    if (p->n == 0) s->learned.since_plain = 0;
}

/* As many as the caller has room for, the session and the pass.  Where experts are counted none:
 * the pass would count those of rejected rows. */
static int q3n__max_drafts(const q3n_session *s, int max)
{
    int n = Q3N_MAX_DRAFT;
    if (s->options.speculate == Q3N_SPECULATE_OFF || s->counts) return 0;
    if (n > max - 1) n = max - 1;
    if (n > s->options.capacity - s->length - 1) n = s->options.capacity - s->length - 1;
    if (n > s->engine->options.batch_size - 1) n = s->engine->options.batch_size - 1;
    return n;
}

/* What a step changes before it is sure to succeed, beside the text. */
typedef struct {
    q3n__learned      learned;
    q3n__unread       unread;
    q3n__sampler_mark sampler;
} q3n__step_mark;

/* One step, as q3n_session_decode promises.  Pages come before the drafts, which write into their
 * slots; time is taken from the pass to the commit. */
static q3n_result q3n__session_decode(q3n_session *s, int32_t token, int32_t *tokens, int max,
                                      int *n)
{
    q3n_engine_item it = q3n__item_of(s, &token, 1, NULL);
    q3n__call c = q3n__call_alone(&it);
    q3n_result r = q3n__check_causal(s);
    if (r == Q3N_OK) r = q3n__check_head(s, 1);
    if (r == Q3N_OK) r = q3n__call_begin(&c);
    if (r != Q3N_OK) return r;
    const q3n__step_mark mark = { s->learned, s->unread, q3n__sampler_save(s->sampler) };
    const int before = s->length;
    int32_t rows[Q3N_MAX_DRAFT + 1] = { token };
    q3n__drafts plan;
    q3n__drafts_plan(s, token, q3n__max_drafts(s, max), &plan);
    if (q3n__mtp_lags(s, &plan)) q3n__mtp_restart(s);
    r = q3n__session_reserve(s, s->length, s->length + 1 + plan.n);
    if (r == Q3N_OK) q3n__drafts_make(s, &plan, rows);
    const int64_t start = q3n__now();
    if (r == Q3N_OK) r = q3n__step(s, rows, &plan, tokens, n);
    r = q3n__call_leave(&c, r);
    if (r != Q3N_OK) {
        q3n__session_rollback(s);
        q3n__sampler_restore(s->sampler, &mark.sampler);
        s->learned = mark.learned;
        s->unread = mark.unread;
        *n = 0;
        return r;
    }
    q3n__step_commit(s, &plan, *n);
    q3n__step_learn(&s->learned, plan.n, (double)(q3n__now() - start));
    q3n__drafts_learn(s, &plan, *n - 1);
    s->learned.spec.draft = plan.n;
    s->learned.spec.n_steps++;
    s->learned.spec.n_tokens += *n;
    q3n__session_put_due(s, 0, before);
    return Q3N_OK;
}

/* What decode would draft, and then everything is forgotten. */
static q3n_result q3n__session_draft(q3n_session *s, int32_t token, int32_t *drafts, int n,
                                     float *logits)
{
    q3n__draft draft[Q3N_MAX_DRAFT];
    if (!s->shape.has_mtp || s->length == 0 || n < 1 || n > Q3N_MAX_DRAFT)
        return q3n__fail(&s->error, s->shape.has_mtp ? Q3N_ERR_ARG : Q3N_ERR_UNSUPPORTED, -1,
                         "%d drafts after %d tokens: expected 1 .. %d after at least one, of a "
                         "model with an MTP module and a session that speculates with it", n,
                         s->length, Q3N_MAX_DRAFT);
    q3n_engine_item it = q3n__item_of(s, &token, 1, NULL);
    q3n__call c = q3n__call_alone(&it);
    q3n_result r = q3n__check_head(s, 1);
    if (r == Q3N_OK && n > s->options.capacity - s->length)
        r = q3n__fail(&s->error, Q3N_ERR_FULL, -1, "%d drafts after %d tokens do not fit a session "
                      "of %d", n, s->length, s->options.capacity);
    if (r == Q3N_OK) r = q3n__call_begin(&c);
    if (r != Q3N_OK) return r;
    r = q3n__session_reserve(s, s->length, s->length + n);
    if (r == Q3N_OK) {
        q3n__draft_mtp(s, NULL, token, draft, n);
        for (int i = 0; i < n; i++) drafts[i] = draft[i].id;
        if (logits)
            memcpy(logits, s->draft_logits, (size_t)s->shape.vocab_size * sizeof *logits);
    }
    r = q3n__call_leave(&c, r);
    q3n__session_rollback(s);
    return r;
}

/* =====================================================================================
 * [31] PUBLIC                                                                >>public
 *
 * Public functions of models, sessions and engines: check, delegate.  Those of types, of
 * configurations, of the tokenizer, of caches and of samplers close their sections, since they need
 * nothing beyond.
 * ===================================================================================== */
static q3n_result q3n__model_options_read(q3n_model_options *o, const q3n_model_options *in,
                                          q3n_error *err)
{
    const q3n_result r = q3n__struct_read(o, sizeof *o, in, "q3n_model_options", err);
    return r == Q3N_OK ? q3n__check_zero(o->zero, "q3n_model_options", err) : r;
}

Q3N_DEF void q3n_model_close(q3n_model *m)
{
    if (!m) return;
    q3n__tokenizer_close(m->tokenizer, &m->allocator);
    q3n__model_free(m);
}

/* Load the file that m->data is, and its tokenizer; on failure m is closed. */
static q3n_result q3n__model_start(q3n_model **out, q3n_model *m, int skip_checksum,
                                   q3n_error *err)
{
    q3n_result r = q3n__model_load(m, skip_checksum, err);
    if (r == Q3N_OK) r = q3n__model_open_tokenizer(m, err);
    if (r == Q3N_OK) *out = m;
    else             q3n_model_close(m);
    return r;
}

Q3N_DEF q3n_result q3n_model_open_memory(q3n_model **out, const void *data, size_t bytes,
                                         const q3n_model_options *o, q3n_error *err)
{
    if (!out) return q3n__fail(err, Q3N_ERR_ARG, -1, "no place for the model");
    *out = NULL;
    if (!data || (uintptr_t)data % Q3N__ALIGN != 0)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "data must be aligned to %d bytes", Q3N__ALIGN);
    q3n_model *m;
    q3n_model_options options;
    q3n_result r = q3n__model_options_read(&options, o, err);
    if (r == Q3N_OK) r = q3n__model_create(&m, &options, err);
    if (r != Q3N_OK) return r;
    m->data = (const uint8_t *)data;
    m->bytes = bytes;
    return q3n__model_start(out, m, options.skip_checksum, err);
}

Q3N_DEF q3n_result q3n_model_open(q3n_model **out, const char *path, const q3n_model_options *o,
                                  q3n_error *err)
{
    if (!out) return q3n__fail(err, Q3N_ERR_ARG, -1, "no place for the model");
    *out = NULL;
    if (!path) return q3n__fail(err, Q3N_ERR_ARG, -1, "no path");
    q3n__mapping map;
    q3n_model_options options;
    q3n_result r = q3n__model_options_read(&options, o, err);
    if (r == Q3N_OK) r = q3n__input_map(&map, path, err);
    if (r != Q3N_OK) return r;
    q3n_model *m;
    r = q3n__model_create(&m, &options, err);
    if (r != Q3N_OK) {
        q3n__file_unmap(map.data, map.bytes);
        return r;
    }
    m->data = map.data;
    m->bytes = map.bytes;
    m->file = map.id;
    m->mapped = 1;
    q3n_error why_not;
    r = q3n__model_start(out, m, options.skip_checksum, &why_not);
    return r == Q3N_OK ? r : q3n__fail(err, r, why_not.offset, "%s: %s", path, why_not.message);
}

Q3N_DEF q3n_result q3n_file_check(const char *path, q3n_error *err)
{
    q3n__output o;
    if (!path) return q3n__fail(err, Q3N_ERR_ARG, -1, "no path");
    const q3n_result r = q3n__output_open(&o, path, NULL, err);
    if (r == Q3N_OK) q3n__output_close(&o, Q3N_ERR_CANCELLED, NULL);
    return r;
}

Q3N_DEF const q3n_config *q3n_model_config(const q3n_model *m)  { return m ? &m->config : NULL; }
Q3N_DEF int q3n_model_vocab_size(const q3n_model *m)  { return m ? m->config.vocab_size : 0; }
Q3N_DEF int q3n_model_hidden_size(const q3n_model *m) { return m ? m->config.hidden_size : 0; }
Q3N_DEF int q3n_model_n_labels(const q3n_model *m)    { return m ? m->config.num_labels : 0; }
Q3N_DEF int q3n_model_n_layers(const q3n_model *m)
{
    return m ? m->config.num_hidden_layers : 0;
}

Q3N_DEF int q3n_model_context_length(const q3n_model *m)
{
    return m ? m->config.max_position_embeddings : 0;
}

Q3N_DEF int q3n_model_layer_is_delta(const q3n_model *m, int l)
{
    return l >= 0 && l < q3n_model_n_layers(m) && m->config.layer_types[l];
}

Q3N_DEF int q3n_model_layer_has_experts(const q3n_model *m, int l)
{
    return l >= 0 && l < q3n_model_n_layers(m) && m->config.layer_experts[l];
}

Q3N_DEF const char *q3n_model_name(const q3n_model *m)          { return m ? m->name : ""; }
Q3N_DEF const char *q3n_model_chat_kind(const q3n_model *m)     { return m ? m->chat : "none"; }

Q3N_DEF const int32_t *q3n_model_eos_ids(const q3n_model *m, int *n)
{
    if (n) *n = m ? m->eos.n : 0;
    return m ? m->eos.id : NULL;
}

Q3N_DEF int q3n_model_is_eos(const q3n_model *m, int32_t id)
{
    for (int i = 0; m && i < m->eos.n; i++) if (m->eos.id[i] == id) return 1;
    return 0;
}

Q3N_DEF const char *q3n_model_label(const q3n_model *m, int i)
{
    return m && m->labels && i >= 0 && i < m->config.num_labels ? m->labels[i] : NULL;
}

Q3N_DEF q3n_result q3n_model_probabilities(const q3n_model *m, const float *scores, float *out)
{
    if (!m || !scores || !out) return Q3N_ERR_ARG;
    const int n = m->config.num_labels, kind = m->config.problem_type;
    if (n == 0) return Q3N_ERR_UNSUPPORTED;
    if (kind == Q3N_PROBLEM_REGRESSION) {
        memmove(out, scores, (size_t)n * sizeof *out);
        return Q3N_OK;
    }
    const int sigmoid = n == 1 || kind == Q3N_PROBLEM_MULTI_LABEL_CLASSIFICATION;
    float max = scores[0];
    double sum = 0.0;
    for (int i = 1; i < n; i++) if (scores[i] > max) max = scores[i];
    for (int i = 0; i < n && !sigmoid; i++) sum += exp((double)scores[i] - (double)max);
    for (int i = 0; i < n; i++)
        out[i] = (float)(sigmoid ? 1.0 / (1.0 + exp(-(double)scores[i]))
                                 : exp((double)scores[i] - (double)max) / sum);
    return Q3N_OK;
}

Q3N_DEF int q3n_model_n_tensors(const q3n_model *m) { return m ? m->n_tensors : 0; }

Q3N_DEF const q3n_tensor *q3n_model_tensor(const q3n_model *m, int i)
{
    return m && i >= 0 && i < m->n_tensors ? &m->tensors[i] : NULL;
}

Q3N_DEF const q3n_tensor *q3n_model_find_tensor(const q3n_model *m, const char *name)
{
    return m && name ? q3n__find_tensor(m, name) : NULL;
}

Q3N_DEF q3n_result q3n_model_verify(const q3n_model *m, const q3n_progress *progress,
                                    q3n_error *err)
{
    if (!m) return q3n__fail(err, Q3N_ERR_ARG, -1, "no model");
    return q3n__model_verify(m, progress, err);
}

Q3N_DEF q3n_result q3n_model_stats_get(const q3n_model *m, q3n_model_stats *out)
{
    if (!m || !out) return Q3N_ERR_ARG;
    q3n_model_stats stats;
    q3n__stats_make(m, &stats);
    return q3n__struct_write(out, sizeof stats, &stats);
}

/* ---- Sessions ---- */
/* A session's own engine serves no other, unless that gets on with the room of this one. */
static q3n__engine_room q3n__own_engine_room(const q3n_session *s)
{
    return (q3n__engine_room){ s->shape.has_mtp, 1 };
}

Q3N_DEF size_t q3n_session_bytes(const q3n_model *m, const q3n_session_options *o,
                                 q3n_session_memory *memory)
{
    q3n_session s;
    q3n_session_memory parts;
    q3n_engine_options eo;
    const size_t bytes = m ? q3n__session_measure(m, o, &s, &parts, &eo, NULL) : 0;
    if (bytes == 0) return 0;
    size_t engine = 0, threads = 0, split = 0;
    if (!s.options.engine) {
        q3n_engine e;
        engine = q3n__engine_measure(&e, m, &eo, q3n__own_engine_room(&s), &threads);
        if (engine == 0) return 0;
        const int room = q3n__split_room(&e, s.n_pages);
        split = room ? q3n__with_head(q3n__split_bytes(&e, room)) : 0;
    }
    parts.page = q3n__with_head(s.shape.page_bytes);
    parts.snapshot = q3n__with_head(q3n__snapshot_measure(&s.shape, s.options.snapshot_type,
                                                          s.options.capacity, 0));
    parts.initial = q3n__with_head(bytes) + (engine ? q3n__with_head(engine) : 0);
    if (!q3n__mul_size(parts.page, (size_t)s.n_pages, &parts.kv_cache)
        || !q3n__add_size(parts.initial + split, parts.kv_cache, &parts.total)) return 0;
    parts.scratch += engine - threads;
    parts.other = parts.initial - parts.delta_state - parts.conv_state - parts.scratch;
    parts.scratch += split;
    if (memory && q3n__struct_write(memory, sizeof parts, &parts) != Q3N_OK) return 0;
    return parts.total;
}

static q3n_result q3n__session_open_cache(q3n_session *s, q3n_error *err)
{
    s->cache = s->options.cache;
    if (s->cache || s->options.snapshot_bytes == 0) return Q3N_OK;
    const q3n_cache_options o = { .size = sizeof o, .max_bytes = s->options.snapshot_bytes };
    return q3n_cache_create(&s->cache, s->model, &o, err);
}

Q3N_DEF q3n_result q3n_session_create(q3n_session **out, const q3n_model *m,
                                      const q3n_session_options *o, q3n_error *err)
{
    if (out) *out = NULL;
    if (!out || !m) return q3n__fail(err, Q3N_ERR_ARG, -1, "no model, or no place for the session");
    q3n_session measured;
    q3n_session_memory memory;
    q3n_engine_options eo;
    q3n_error why = { Q3N_ERR_ARG, -1, "" };
    const size_t bytes = q3n__session_measure(m, o, &measured, &memory, &eo, &why);
    if (bytes == 0) return q3n__fail(err, why.code, -1, "%s", why.message);
    q3n__arena arena = { (uint8_t *)q3n__alloc(&m->allocator, bytes), 0, 0 };
    if (!arena.base)
        return q3n__fail(err, Q3N_ERR_MEMORY, -1, "no memory for a session of %zu bytes (%d "
                         "tokens): make capacity smaller", bytes, measured.options.capacity);
    q3n_session *s = (q3n_session *)q3n__arena_take(&arena, 1, sizeof *s);
    *s = measured;
    q3n__session_layout(&arena, s, &memory);
    memset(s->state.kv.page, 0, (size_t)s->n_pages * sizeof *s->state.kv.page);
    memset(s->owned, 0, (size_t)s->n_pages);
    s->state.cancel = &s->cancel;
    q3n__session_clear(s);
    q3n__speculation_reset(s);
    s->engine = s->options.engine;
    q3n_result r = Q3N_OK;
    if (!s->engine) r = q3n__engine_make(&s->engine, m, &eo, q3n__own_engine_room(s), err);
    s->options.engine_options = s->options.engine || !s->engine ? NULL : &s->engine->options;
    if (r == Q3N_OK) s->shape.isa = s->engine->options.isa;
    if (r == Q3N_OK) r = q3n__session_open_cache(s, err);
    if (r == Q3N_OK) *out = s;
    else             q3n_session_destroy(s);
    return r;
}

Q3N_DEF void q3n_session_destroy(q3n_session *s)
{
    if (!s) return;
    q3n__session_drop(s, s->state.kv.page);
    if (!s->options.engine) q3n_engine_destroy(s->engine);
    if (s->cache != s->options.cache) q3n_cache_destroy(s->cache);
    q3n_sampler_destroy(s->sampler);
    q3n__free(&s->model->allocator, s);
}

Q3N_DEF q3n_result q3n_session_eval(q3n_session *s, const int32_t *tokens, int n, float *logits)
{
    const q3n_outputs out = { .size = sizeof out, .logits = logits };
    return q3n_session_eval_outputs(s, tokens, n, &out);
}

Q3N_DEF q3n_result q3n_session_eval_outputs(q3n_session *s, const int32_t *tokens, int n,
                                            const q3n_outputs *out)
{
    q3n_outputs outputs;
    if (!s) return Q3N_ERR_ARG;
    const q3n_result r = q3n__struct_read(&outputs, sizeof outputs, out, "q3n_outputs", &s->error);
    if (r != Q3N_OK) return r;
    return q3n__session_eval(s, tokens, n, &outputs);
}

Q3N_DEF q3n_result q3n_session_classify(q3n_session *s, const int32_t *tokens, int n, float *scores)
{
    if (!s) return Q3N_ERR_ARG;
    if (!scores) return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "no place for the scores");
    return q3n__session_classify(s, tokens, n, scores);
}

Q3N_DEF q3n_result q3n_session_logits(q3n_session *s, float *logits)
{
    if (!s) return Q3N_ERR_ARG;
    if (!logits || s->length == 0)
        return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "no place for the logits, or no token yet");
    const q3n_result r = q3n__check_head(s, 1);
    if (r != Q3N_OK) return r;
    memcpy(logits, q3n__session_last_logits(s), (size_t)s->shape.vocab_size * sizeof *logits);
    return Q3N_OK;
}

Q3N_DEF q3n_result q3n_session_tokens(const q3n_session *s, int first, int n, int32_t *tokens)
{
    if (!s || first < 0 || n < 0 || first > s->length || n > s->length - first
        || (n > 0 && !tokens)) return Q3N_ERR_ARG;
    q3n__session_copy_tokens(s, first, n, tokens);
    return Q3N_OK;
}

Q3N_DEF int q3n_session_cancel(q3n_session *s) { return s ? q3n__cancel(&s->cancel) : 0; }

Q3N_DEF const q3n_model *q3n_session_model(const q3n_session *s) { return s ? s->model : NULL; }
Q3N_DEF q3n_engine *q3n_session_engine(const q3n_session *s) { return s ? s->engine : NULL; }
Q3N_DEF int     q3n_session_length(const q3n_session *s)    { return s ? s->length : 0; }
Q3N_DEF int     q3n_session_capacity(const q3n_session *s)  { return s ? s->options.capacity : 0; }

Q3N_DEF void q3n_session_reset(q3n_session *s)
{
    if (!s) return;
    q3n__session_clear(s);
    q3n_sampler_reset(s->sampler);
}

Q3N_DEF const q3n_error *q3n_session_error(const q3n_session *s)
{
    return s ? &s->error : &q3n__no_object;
}

Q3N_DEF const int64_t *q3n_session_expert_counts(const q3n_session *s, int l)
{
    if (!s || !s->counts || l < 0 || l >= s->model->config.num_hidden_layers) return NULL;
    if (!s->model->config.layer_experts[l]) return NULL;
    return s->counts + (size_t)l * (size_t)s->model->config.num_experts;
}

/* ---- Going back, copies ---- */
static q3n_result q3n__session_snapshot(q3n_session *s, q3n_type delta_type, q3n_snapshot **out)
{
    *out = NULL;
    const q3n_result r = q3n__check_causal(s);
    if (r != Q3N_OK) return r;
    *out = q3n__session_take(s, delta_type, 0, s->sampler);
    if (*out) return Q3N_OK;
    return q3n__fail(&s->error, Q3N_ERR_MEMORY, -1, "no memory for a snapshot of %zu bytes",
                     q3n__snapshot_measure(&s->shape, delta_type, s->length,
                                           s->sampler ? 1 + s->sampler->n_window : 0));
}

Q3N_DEF q3n_result q3n_session_snapshot(q3n_session *s, q3n_snapshot **out)
{
    if (out) *out = NULL;
    if (!s) return Q3N_ERR_ARG;
    if (!out) return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "no place for the snapshot");
    return q3n__session_snapshot(s, s->options.snapshot_type, out);
}

Q3N_DEF int    q3n_snapshot_length(const q3n_snapshot *snap) { return snap ? snap->length : 0; }
Q3N_DEF size_t q3n_snapshot_bytes(const q3n_snapshot *snap)
{
    return snap ? q3n__with_head(snap->bytes) : 0;
}

Q3N_DEF void   q3n_snapshot_free(q3n_snapshot *snap)         { q3n__snapshot_release(snap); }

Q3N_DEF q3n_result q3n_session_restore(q3n_session *s, const q3n_snapshot *snap)
{
    if (!s) return Q3N_ERR_ARG;
    if (!snap) return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "no snapshot");
    return q3n__session_restore(s, snap);
}

Q3N_DEF q3n_result q3n_session_fork(q3n_session **out, q3n_session *s,
                                    const q3n_session_options *o, q3n_error *err)
{
    if (out) *out = NULL;
    if (!out || !s)
        return q3n__fail(err, Q3N_ERR_ARG, -1, "no session, or no place for the new one");
    q3n_snapshot *snap = NULL;
    q3n_result r = q3n__session_snapshot(s, Q3N_TYPE_F32, &snap);
    if (r != Q3N_OK) return q3n__fail(err, r, -1, "%s", s->error.message);
    r = q3n_session_create(out, s->model, o ? o : &s->options, err);
    if (r == Q3N_OK) {
        if (s->sampler) r = q3n_session_set_sampler(*out, &s->sampler->o);
        if (r == Q3N_OK) r = q3n__session_restore(*out, snap);
        if (r != Q3N_OK) {
            q3n__fail(err, r, -1, "%s", (*out)->error.message);
            q3n_session_destroy(*out);
            *out = NULL;
        }
    }
    q3n_snapshot_free(snap);
    return r;
}

Q3N_DEF q3n_result q3n_session_rewind(q3n_session *s, int length)
{
    return s ? q3n__session_rewind(s, length) : Q3N_ERR_ARG;
}

Q3N_DEF q3n_result q3n_session_checkpoint(q3n_session *s)
{
    if (!s) return Q3N_ERR_ARG;
    const q3n_result r = q3n__check_causal(s);
    if (r != Q3N_OK || q3n__session_put(s, 0, 1)) return r;
    return q3n__fail(&s->error, Q3N_ERR_MEMORY, -1, "no memory for a snapshot");
}

static q3n_result q3n__session_reuse_call(q3n_session *s, const int32_t *tokens, int n,
                                          float *logits, int only_reuse, int *n_reused)
{
    if (n_reused) *n_reused = 0;
    if (!s) return Q3N_ERR_ARG;
    const q3n_result r = q3n__session_prefill(s, tokens, n, logits, only_reuse, n_reused);
    if (r != Q3N_OK && n_reused) *n_reused = 0;
    return r;
}

Q3N_DEF q3n_result q3n_session_prefill(q3n_session *s, const int32_t *tokens, int n, float *logits,
                                    int *n_reused)
{
    const q3n_result r = q3n__session_reuse_call(s, tokens, n, logits, 0, n_reused);
    if (r == Q3N_OK) q3n__session_put(s, 0, 1);   /* without memory: not kept */
    return r;
}

Q3N_DEF q3n_result q3n_session_reuse(q3n_session *s, const int32_t *tokens, int n, int *n_reused)
{
    return q3n__session_reuse_call(s, tokens, n, NULL, 1, n_reused);
}

/* ---- Session files ---- */
static q3n_result q3n__session_load_from(q3n_session *s, const q3n_source *source, const char *path)
{
    q3n_snapshot *snap = NULL;
    q3n_result r = q3n__check_causal(s);
    if (r != Q3N_OK) return r;
    r = path ? q3n__snapshot_open(&snap, s->model, &s->shape, s->options.capacity, path, &s->error)
             : q3n__snapshot_read(&snap, s->model, &s->shape, s->options.capacity, source,
                                  &s->error);
    if (r == Q3N_OK) r = q3n__session_restore(s, snap);
    q3n__snapshot_release(snap);
    return r;
}

static q3n_result q3n__session_save_to(q3n_session *s, const q3n_sink *sink, const char *path)
{
    q3n_snapshot *snap = NULL;
    q3n_result r = q3n__session_snapshot(s, Q3N_TYPE_F32, &snap);
    if (r != Q3N_OK) return r;
    r = path ? q3n__snapshot_save(snap, path, &s->error)
             : q3n__snapshot_write(snap, sink, &s->error);
    q3n__snapshot_release(snap);
    return r;
}

Q3N_DEF q3n_result q3n_session_save(q3n_session *s, const char *path)
{
    if (!s) return Q3N_ERR_ARG;
    if (!path) return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "no path");
    return q3n__session_save_to(s, NULL, path);
}

Q3N_DEF q3n_result q3n_session_save_to(q3n_session *s, const q3n_sink *sink)
{
    if (!s) return Q3N_ERR_ARG;
    if (!sink || !sink->write) return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "no sink");
    return q3n__session_save_to(s, sink, NULL);
}

Q3N_DEF q3n_result q3n_session_load(q3n_session *s, const char *path)
{
    if (!s) return Q3N_ERR_ARG;
    if (!path) return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "no path");
    return q3n__session_load_from(s, NULL, path);
}

Q3N_DEF q3n_result q3n_session_load_from(q3n_session *s, const q3n_source *source)
{
    if (!s) return Q3N_ERR_ARG;
    if (!source || !source->read) return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "no source");
    return q3n__session_load_from(s, source, NULL);
}

/* ---- Engines ---- */
Q3N_DEF size_t q3n_engine_bytes(const q3n_model *m, const q3n_engine_options *o)
{
    q3n_engine_options options;
    q3n_engine e;
    size_t threads;
    if (!m || q3n__engine_options_set(m, o, &options, NULL) != Q3N_OK) return 0;
    const size_t bytes = q3n__engine_measure(&e, m, &options, q3n__engine_room_of(m), &threads);
    return bytes ? q3n__with_head(bytes) : 0;
}

Q3N_DEF q3n_result q3n_engine_create(q3n_engine **out, const q3n_model *m,
                                     const q3n_engine_options *o, q3n_error *err)
{
    q3n_engine_options options;
    if (out) *out = NULL;
    if (!out || !m) return q3n__fail(err, Q3N_ERR_ARG, -1, "no model, or no place for the engine");
    const q3n_result r = q3n__engine_options_set(m, o, &options, err);
    return r != Q3N_OK ? r : q3n__engine_make(out, m, &options, q3n__engine_room_of(m), err);
}

Q3N_DEF void q3n_engine_destroy(q3n_engine *e)
{
    if (!e) return;
    q3n__pool_close(&e->pool);
    q3n__free(&e->model->allocator, e->split);
    q3n__free(&e->model->allocator, e);
}

Q3N_DEF int q3n_engine_n_threads(const q3n_engine *e)  { return e ? e->options.n_threads : 0; }
Q3N_DEF int q3n_engine_batch_size(const q3n_engine *e) { return e ? e->options.batch_size : 0; }
Q3N_DEF q3n_isa q3n_engine_isa(const q3n_engine *e)
{
    return e ? e->options.isa : Q3N_ISA_AUTO;
}

Q3N_DEF q3n_result q3n_engine_eval(q3n_engine *e, q3n_engine_item *items, int n_items,
                                   const q3n_limit *limit)
{
    q3n_limit l = { 0 };                 /* gcc does not see that it is read or not used */
    if (!e) return Q3N_ERR_ARG;
    q3n_result r = q3n__struct_read(&l, sizeof l, limit, "q3n_limit", &e->error);
    if (r == Q3N_OK) r = q3n__check_zero(l.zero, "q3n_limit", &e->error);
    if (r != Q3N_OK) return r;
    if (n_items < 0 || (n_items > 0 && !items) || l.max_tokens < 0)
        return q3n__fail(&e->error, Q3N_ERR_ARG, -1, "%d items, at most %d tokens: out of range",
                         n_items, l.max_tokens);
    q3n__call c = { .e = e, .first = items, .stride = n_items ? q3n__struct_size(items) : 0,
                    .n_items = n_items, .limit = &l };
    if (n_items > 0 && (c.stride < Q3N__ITEM_MIN || c.stride % sizeof(void *) != 0))
        return q3n__fail(&e->error, Q3N_ERR_ARG, -1, "q3n_engine_item: its size is not set: begin "
                         "with Q3N_INIT or .size = sizeof");
    return q3n__engine_eval(&c);
}

Q3N_DEF int q3n_engine_cancel(q3n_engine *e) { return e ? q3n__cancel(&e->cancel) : 0; }

Q3N_DEF const q3n_error *q3n_engine_error(const q3n_engine *e)
{
    return e ? &e->error : &q3n__no_object;
}

/* ---- Generating ---- */
Q3N_DEF q3n_result q3n_session_set_sampler(q3n_session *s, const q3n_sampler_options *o)
{
    if (!s) return Q3N_ERR_ARG;
    q3n_sampler *sampler = NULL;
    const q3n_result r = o ? q3n_sampler_create(&sampler, s->model, o, &s->error) : Q3N_OK;
    if (r != Q3N_OK) return r;
    q3n_sampler_destroy(s->sampler);
    s->sampler = sampler;
    return Q3N_OK;
}

Q3N_DEF q3n_sampler *q3n_session_sampler(const q3n_session *s) { return s ? s->sampler : NULL; }

Q3N_DEF q3n_result q3n_session_decode(q3n_session *s, int32_t token, int32_t *tokens, int max,
                                      int *n)
{
    if (n) *n = 0;
    if (!s) return Q3N_ERR_ARG;
    if (!tokens || !n || max < 1)
        return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "no place for a token");
    if (!s->sampler)
        return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "the session has no sampler to choose tokens: "
                         "q3n_session_set_sampler gives it one");
    return q3n__session_decode(s, token, tokens, max, n);
}

Q3N_DEF q3n_result q3n_session_draft(q3n_session *s, int32_t token, int32_t *drafts, int n,
                                     float *logits)
{
    if (!s) return Q3N_ERR_ARG;
    if (!drafts) return q3n__fail(&s->error, Q3N_ERR_ARG, -1, "no place for the drafts");
    return q3n__session_draft(s, token, drafts, n, logits);
}

Q3N_DEF q3n_result q3n_session_speculation(const q3n_session *s, q3n_speculation *out)
{
    if (!s || !out) return Q3N_ERR_ARG;
    return q3n__struct_write(out, sizeof s->learned.spec, &s->learned.spec);
}

/* =====================================================================================
 * [32] KERNELS, SCALAR: the definition                               >>kernels-scalar
 *
 * Written from the equations; every other ISA is tested against these.  Operands, strides and what
 * may alias stand with the structs in TYPES; here is what the numbers are.
 *
 *     the same bits on every ISA    conversions, store_kv, quantize_x, block_*: what they round is
 *                                   written down below
 *     the same within a bound       matmul, attend, delta, conv, dot, rms_norm, softmax, gates: an
 *                                   ISA may sum in another order and fuse multiply-adds, but in one
 *                                   order for each output element, whatever else a call covers
 *
 * Here sums go by rising index in f32, every operation rounded for itself.  Integers of quantised
 * groups are exact, so there only the sum over groups may differ.  store_kv has no other version:
 * it writes one key and value a head, against all those that attend reads.
 * At the end: what the sections of the other ISAs share.
 * ===================================================================================== */

/* ---- Reading and writing elements: one pair per type ----
 *
 * Element i of p.  Reading is exact; writing rounds to nearest even (see the conversions in TYPES).
 * q8 is a KV cache's byte without its scale. */
static float q3n__get_f32(const void *p, size_t i) { return ((const float *)p)[i]; }
static float q3n__get_f16(const void *p, size_t i)
{
    return q3n__f16_to_f32(((const uint16_t *)p)[i]);
}
static float q3n__get_bf16(const void *p, size_t i)
{
    return q3n__bf16_to_f32(((const uint16_t *)p)[i]);
}

static float q3n__get_q8(const void *p, size_t i) { return (float)((const int8_t *)p)[i]; }

static void q3n__put_f32(void *p, size_t i, float f)  { ((float *)p)[i] = f; }
static void q3n__put_f16(void *p, size_t i, float f)  { ((uint16_t *)p)[i] = q3n__f32_to_f16(f); }
static void q3n__put_bf16(void *p, size_t i, float f) { ((uint16_t *)p)[i] = q3n__f32_to_bf16(f); }

/* The largest |x|, 0 of none; infinity if one of them is not finite, NaN too: one number says what
 * a group of activations is. */
static float q3n__largest_scalar(const float *x, int n)
{
    float m = 0.0f;
    for (int i = 0; i < n; i++) {
        if (!(fabsf(x[i]) <= FLT_MAX)) return Q3N__INFINITY;
        if (fabsf(x[i]) > m) m = fabsf(x[i]);
    }
    return m;
}

/* ---- Matrix product, row to float, attention: one instance per float type ----
 *
 *     matmul      y[t][r] = sum_j w[r][j] x[t][j] (+ bias[r])           rows [row0, row1)
 *     store_kv    k[i][slot] = key[i];  v[slot][i] = value[i]           k is [D, 256], v [256, D]
 *     attend      s_j = sum_c q[c] k[c][j];  m = max_j s_j;  l = sum_j e^(s_j - m)
 *                 o[c] = sum_j e^(s_j - m) v[j][c]                      j < n_keys[i]
 *
 * In a cache of q8 k_j and v_j are bytes times a scale of the key or value.  The scale is taken out
 * of both sums, which leaves the products those of the other types:
 *
 *     s_j = k_scale_j (q k_j);   o = sum_j (e^(s_j - m) v_scale_j) v_j;   l without v_scale
 *
 * The division by l is not here: blocks are merged first (OPS). */

/* m, l of query i and, in place, e^(s_j - m).  Without keys m = -FLT_MAX, l = 0. */
static void q3n__attend_softmax_scalar(const q3n__attend *a, int i)
{
    float *s = a->scores + (size_t)i * Q3N__KV_BLOCK;
    float m = -FLT_MAX, l = 0.0f;
    for (int j = 0; j < a->n_keys[i]; j++) if (s[j] > m) m = s[j];
    for (int j = 0; j < a->n_keys[i]; j++) l += s[j] = expf(s[j] - m);
    a->m[i] = m;
    a->l[i] = l;
}

/* s_j *= scale_j for query i, if the cache has scales (has_scales is a constant in every use). */
static void q3n__attend_scale_scalar(const q3n__attend *a, int i, const float *scale,
                                     int has_scales)
{
    float *s = a->scores + (size_t)i * Q3N__KV_BLOCK;
    for (int j = 0; has_scales && j < a->n_keys[i]; j++) s[j] *= scale[j];
}

#define Q3N__DEFINE_FLOAT_TYPE_SCALAR(id)                                                          \
    static void q3n__matmul_##id##_scalar(const q3n__matmul *m)                                    \
    {                                                                                              \
        for (int t = 0; t < m->n; t++)                                                             \
            for (int r = m->row0; r < m->row1; r++) {                                              \
                const float *x = q3n__matmul_x(m, t);                                              \
                const size_t first = (size_t)r * (size_t)m->n_cols;                                \
                float s = 0.0f;                                                                    \
                for (int j = 0; j < m->n_cols; j++)                                                \
                    s += q3n__get_##id(m->w, first + (size_t)j) * x[j];                            \
                m->y[(size_t)t * (size_t)m->y_stride + (size_t)r] = m->bias ? s + m->bias[r] : s;  \
            }                                                                                      \
    }                                                                                              \
    static void q3n__to_f32_##id##_scalar(float *y, const void *x, int n)                          \
    {                                                                                              \
        for (int i = 0; i < n; i++) y[i] = q3n__get_##id(x, (size_t)i);                            \
    }                                                                                              \
    static void q3n__store_kv_##id##_scalar(const q3n__store_kv *s)                                \
    {                                                                                              \
        for (int i = 0; i < s->dim; i++) {                                                         \
            q3n__put_##id(s->k, (size_t)i * Q3N__KV_BLOCK + (size_t)s->slot, s->key[i]);           \
            q3n__put_##id(s->v, (size_t)s->slot * (size_t)s->dim + (size_t)i, s->value[i]);        \
        }                                                                                          \
    }

#define Q3N__DEFINE_ATTEND_SCALAR(id, has_scales)                                                  \
    static void q3n__attend_##id##_scalar(const q3n__attend *a)                                    \
    {                                                                                              \
        for (int i = 0; i < a->n; i++) {                                                           \
            const float *q = a->q + (size_t)i * (size_t)a->q_stride;                               \
            float *s = a->scores + (size_t)i * Q3N__KV_BLOCK;                                      \
            float *o = a->o + (size_t)i * (size_t)a->o_stride;                                     \
            for (int j = 0; j < a->n_keys[i]; j++) {                                               \
                s[j] = 0.0f;                                                                       \
                for (int c = 0; c < a->dim; c++)                                                   \
                    s[j] += q[c] * q3n__get_##id(a->k, (size_t)c * Q3N__KV_BLOCK + (size_t)j);     \
            }                                                                                      \
            q3n__attend_scale_scalar(a, i, a->k_scale, has_scales);                                \
            q3n__attend_softmax_scalar(a, i);                                                      \
            q3n__attend_scale_scalar(a, i, a->v_scale, has_scales);                                \
            for (int c = 0; c < a->dim; c++) {                                                     \
                o[c] = 0.0f;                                                                       \
                for (int j = 0; j < a->n_keys[i]; j++)                                             \
                    o[c] += s[j] * q3n__get_##id(a->v, (size_t)j * (size_t)a->dim + (size_t)c);    \
            }                                                                                      \
        }                                                                                          \
    }

Q3N__DEFINE_FLOAT_TYPE_SCALAR(f32)
Q3N__DEFINE_FLOAT_TYPE_SCALAR(f16)
Q3N__DEFINE_FLOAT_TYPE_SCALAR(bf16)
Q3N__DEFINE_ATTEND_SCALAR(f32, 0)
Q3N__DEFINE_ATTEND_SCALAR(f16, 0)
Q3N__DEFINE_ATTEND_SCALAR(bf16, 0)
Q3N__DEFINE_ATTEND_SCALAR(q8, 1)

/* x to bytes, the i-th at q + i * stride; returns the scale:
 *
 *     scale = max |x| / 127;   q = x (127 / max |x|), to the nearest integer, halves to even
 *
 * The largest becomes 127 exactly and -128 is not used.  What is not finite becomes a scale of NaN,
 * so that it is seen in every product; what is as good as zero a scale of 0. */
static float q3n__bytes_scalar(int8_t *q, size_t stride, const float *x, int n)
{
    const float m = q3n__largest_scalar(x, n);
    const int usable = m >= Q3N__X8_MIN && m <= FLT_MAX;
    const float inverse = usable ? 127.0f / m : 0.0f;
    for (int i = 0; i < n; i++)
        q[(size_t)i * stride] = (int8_t)(usable ? lrintf(x[i] * inverse) : 0);
    return usable ? m / 127.0f : m < Q3N__X8_MIN ? 0.0f : NAN;
}

/* One scale for a key, one for a value: over all D of a head, not in groups, so that attend has one
 * number to multiply by. */
static void q3n__store_kv_q8_scalar(const q3n__store_kv *s)
{
    int8_t *k = (int8_t *)s->k + s->slot, *v = (int8_t *)s->v + (size_t)s->slot * (size_t)s->dim;
    s->k_scale[s->slot] = q3n__bytes_scalar(k, Q3N__KV_BLOCK, s->key, s->dim);
    s->v_scale[s->slot] = q3n__bytes_scalar(v, 1, s->value, s->dim);
}

/* ---- Quantised matrices ----
 *
 *     y[t][r] = sum_g (sum_c level[r][c] q[t][c]) (scale[r][g] scale[t][g])      c: the 32 columns
 *                                                                                  of group g
 *
 * The inner sum is an exact integer: 32 products of |level| <= 128 and |q| <= 127.  The scales are
 * multiplied first, then with the sum: vector kernels do the same. */

/* 64 activations to a block: scale = max |x| / 127 of a group, q = x (127 / max |x|) to the nearest
 * integer, halves to even; the factor is rounded to f32 first.  A group that is as good as zero, or
 * not finite, has q 0; its scale says which. */
static void q3n__quantize_x_group_scalar(q3n__x8 *y, int g, const float *x, int n)
{
    const float m = q3n__largest_scalar(x, n);
    const int usable = m >= Q3N__X8_MIN && m <= FLT_MAX;
    const float inverse = 127.0f / m;
    int sum = 0;
    memset(y->q + g * Q3N__GROUP, 0, Q3N__GROUP);
    for (int i = 0; i < n && usable; i++) {
        const int q = (int)lrintf(x[i] * inverse);
        y->q[g * Q3N__GROUP + i] = (int8_t)q;
        sum += q;
    }
    y->scale[g] = usable ? m / 127.0f : m < Q3N__X8_MIN ? 0.0f : NAN;
    y->minus_sum[g] = -sum;
}

/* x [n] to x8_blocks(n) blocks; columns from n on are 0 with scale 0. */
static void q3n__quantize_x_scalar(q3n__x8 *y, const float *x, int n)
{
    for (int i = 0; i < n; i += 2 * Q3N__GROUP, y++)
        for (int g = 0; g < 2; g++) {
            const int left = n - i - g * Q3N__GROUP;
            q3n__quantize_x_group_scalar(y, g, x + i + g * Q3N__GROUP,
                                         left < 0 ? 0 : left < Q3N__GROUP ? left : Q3N__GROUP);
        }
}

/* One group of one row: the integers are exact, so all that may differ elsewhere is rounding in
 *     sum over groups of (float)(sum of level q) (scale of the row) (scale of x) */
static float q3n__group_dot_scalar(q3n_type t, const uint8_t *block, int g, int r,
                                   const q3n__x8 *x)
{
    const uint8_t *codes = block + 4 * Q3N__TILE_ROWS + (size_t)g * q3n__group_bytes(t);
    uint16_t scale;
    int sum = 0;
    memcpy(&scale, block + 2 * (g * Q3N__TILE_ROWS + r), sizeof scale);
    for (int c = 0; c < Q3N__GROUP; c++)
        sum += q3n__code_level(t, q3n__code_get(t, codes, r, c)) * x->q[g * Q3N__GROUP + c];
    return (float)sum * (q3n__f16_to_f32(scale) * x->scale[g]);
}

/* Row r lies in the tile of 16 rows that begins at r - r % 16; blocks of a tile are 64 columns. */
static void q3n__matmul_quantised_scalar(q3n_type type, const q3n__matmul *m)
{
    const size_t block_bytes = (size_t)q3n__types[type].block_bytes * Q3N__TILE_ROWS;
    const int blocks = q3n__x8_blocks(m->n_cols);
    for (int t = 0; t < m->n; t++)
        for (int r = m->row0; r < m->row1; r++) {
            const q3n__x8 *x = q3n__matmul_xq(m, t);
            const int in_tile = r % Q3N__TILE_ROWS;
            const uint8_t *w = (const uint8_t *)m->w
                             + (size_t)(r - in_tile) * q3n__row_bytes(type, m->n_cols);
            float s = 0.0f;
            for (int g = 0; g < 2 * blocks; g++)
                s += q3n__group_dot_scalar(type, w + (size_t)(g / 2) * block_bytes, g % 2, in_tile,
                                           x + g / 2);
            m->y[(size_t)t * (size_t)m->y_stride + (size_t)r] = m->bias ? s + m->bias[r] : s;
        }
}

#define Q3N__X(ID, id, number, block_len, block_bytes)                                  \
    static void q3n__matmul_##id##_scalar(const q3n__matmul *m)                         \
    {                                                                                   \
        q3n__matmul_quantised_scalar(Q3N_TYPE_##ID, m);                                 \
    }
Q3N_QUANT_TYPE_LIST(Q3N__X)
#undef Q3N__X

/* ---- DeltaNet ----
 *
 * States of n tokens, n_store of them stored:
 *
 *     S --t0--> S_out --t1--> S_out ... --> S_out  --> scratch ... --> scratch --> (not kept)
 *               token 0                     n_store - 1                n - 2       n - 1
 *
 * so after a call S_out is the state after n_store tokens and has been written n_store times.  With
 * S_out = S, n_store = 1, n = 2 that is decode: the pending token goes in, the new one is only
 * answered, and memory sees one read and one write of S. */

/* Where the state after token t goes, from column j on; NULL: nobody reads it. */
static float *q3n__delta_after(const q3n__delta *h, int t, int j)
{
    return t < h->n_store ? h->S_out + j : t + 1 < h->n ? h->scratch + (j - h->col0) : NULL;
}

/* Floats from row to row of that state, also of the one before token 0 (t = -1), which is S. */
static size_t q3n__delta_stride(const q3n__delta *h, int t)
{
    return (size_t)(t < 0 || t < h->n_store ? h->dv : h->col1 - h->col0);
}

static int q3n__delta_has_output(const q3n__delta *h, int t) { return h->o && t >= h->n_skip; }

/* The gated delta rule ([HF] torch_recurrent_gated_delta_rule; [GDN] eq. 10), for each token:
 *
 *     S <- e^g S                 forget
 *     d  = beta (v - S' k)       what the memory gets wrong about k
 *     S <- S + k d'              correct it
 *     o  = S' q                  read; q arrives divided by sqrt(dk)
 *
 * S [dk, dv], q, k [dk], v, d, o [dv].  Columns of S do not mix, so any range of them may be
 * computed alone.  The read is taken before the decay, (e^g S)' k = e^g (S' k), so that S is passed
 * over twice and not three times: once to read, once to decay, correct and answer. */
static void q3n__delta_scalar(const q3n__delta *h)
{
    for (int t = 0; t < h->n; t++) {
        const float *q = h->q + (size_t)t * (size_t)h->qk_stride;
        const float *k = h->k + (size_t)t * (size_t)h->qk_stride;
        const float *v = h->v + (size_t)t * (size_t)h->v_stride;
        const float beta  = h->beta[(size_t)t * (size_t)h->gb_stride];
        const float decay = expf(h->g[(size_t)t * (size_t)h->gb_stride]);
        const size_t from_stride = q3n__delta_stride(h, t - 1), to_stride = q3n__delta_stride(h, t);
        for (int j = h->col0; j < h->col1; j++) {
            const float *from = t == 0 ? h->S + j : q3n__delta_after(h, t - 1, j);
            float *to = q3n__delta_after(h, t, j);
            float read = 0.0f, o = 0.0f;
            for (int i = 0; i < h->dk; i++) read += from[(size_t)i * from_stride] * k[i];
            const float d = beta * (v[j] - decay * read);
            for (int i = 0; i < h->dk; i++) {
                const float s = decay * from[(size_t)i * from_stride] + k[i] * d;
                if (to) to[(size_t)i * to_stride] = s;
                o += s * q[i];
            }
            if (q3n__delta_has_output(h, t)) h->o[(size_t)t * (size_t)h->o_stride + (size_t)j] = o;
        }
    }
}

/* x sigmoid(x); -0 for x below -88.7, where expf is infinite. */
static float q3n__silu(float x) { return x / (1.0f + expf(-x)); }

/* See q3n__conv.  u are the last `width` inputs of a channel, the oldest first: those of the state,
 * then the rows'.  w is [width, channels], so w[width - 1] is the newest input's. */
static void q3n__conv_scalar(const q3n__conv *c)
{
    const int back = c->width - 1;
    for (int ch = c->c0; ch < c->c1 && c->n > 0; ch++) {
        float u[16];                                   /* width <= 16 (Q3N_CONFIG_LIST) */
        const float *state = c->state + ch;
        float *state_out = c->state_out + ch;
        for (int j = 0; j < back; j++) u[j] = state[(size_t)j * (size_t)c->n_channels];
        for (int t = 0; t < c->n; t++) {
            u[back] = c->x[(size_t)t * (size_t)c->x_stride + (size_t)ch];
            float s = 0.0f;
            for (int j = 0; j < c->width; j++)
                s += c->w[(size_t)j * (size_t)c->n_channels + (size_t)ch] * u[j];
            c->y[(size_t)t * (size_t)c->y_stride + (size_t)ch] = q3n__silu(s);
            for (int j = 0; j < back; j++) u[j] = u[j + 1];
        }
        for (int j = 0; j < back; j++) state_out[(size_t)j * (size_t)c->n_channels] = u[j];
    }
}

/* ---- Vectors: n from 0 on, of softmax from 1 ---- */
static float q3n__dot_scalar(const float *a, const float *b, int n)
{
    float s = 0.0f;
    for (int i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}

static void q3n__axpy_scalar(float *y, float a, const float *x, int n)
{
    for (int i = 0; i < n; i++) y[i] += a * x[i];
}

/* y = x / sqrt(mean(x^2) + eps) * w ([HF] Qwen3NextRMSNorm; the file's w holds 1 + weight) */
static void q3n__rms_norm_scalar(float *y, const float *x, const float *w, int n, float eps)
{
    float s = 0.0f;
    for (int i = 0; i < n; i++) s += x[i] * x[i];
    const float scale = 1.0f / sqrtf(s / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * w[i];
}

/* x = e^(x - max) / sum, in place: exponents are 0 at most, so nothing overflows. */
static void q3n__softmax_scalar(float *x, int n)
{
    float m = x[0], l = 0.0f;
    for (int i = 1; i < n; i++) if (x[i] > m) m = x[i];
    for (int i = 0; i < n; i++) l += x[i] = expf(x[i] - m);
    for (int i = 0; i < n; i++) x[i] /= l;
}

/* y *= silu(gate): SwiGLU's product, and DeltaNet's output times its gate. */
static void q3n__silu_mul_scalar(float *y, const float *gate, int n)
{
    for (int i = 0; i < n; i++) y[i] *= q3n__silu(gate[i]);
}

/* y *= sigmoid(gate): attention's output times its gate. */
static void q3n__sigmoid_mul_scalar(float *y, const float *gate, int n)
{
    for (int i = 0; i < n; i++) y[i] *= q3n__sigmoid(gate[i]);
}

/* ---- Sampling: fixed to the bit ----
 *
 * A choice compares sums of weights with a random number: one bit more or less would be another
 * token on another machine.  So order and rounding of all that follows are part of the definition,
 * and nothing of it may be fused. */

/* Largest of each block; NaN does not count, +inf is the largest float. */
static void q3n__block_max_scalar(float *max, const float *x, int n_blocks)
{
    for (int b = 0; b < n_blocks; b++, x += Q3N__SAMPLER_BLOCK) {
        float m = -Q3N__INFINITY;
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i++) if (x[i] > m) m = x[i];
        max[b] = m < FLT_MAX ? m : FLT_MAX;
    }
}

/* Sum of a block of 64: 16 running sums (elements i, i + 16, i + 32, i + 48), then halves on
 * halves: what one vector of 16, two of 8 or four of 4 lanes do as they are. */
static float q3n__block_sum_scalar(const float *y)
{
    float s[16];
    for (int i = 0; i < 16; i++) s[i] = y[i];
    for (int i = 16; i < Q3N__SAMPLER_BLOCK; i++) s[i % 16] += y[i];
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}

/* 2^t for t <= 0, 0 below 2^-124 and for NaN; 1 above 0 (+inf).  Adding 1.5 x 2^23 leaves round(t)
 * in the low bits; 2^f of the rest is a polynomial, minimax on [-1/2, 1/2] with p(0) = 1 (relative
 * error 9.2e-8; with roundings below 2.5 units in the last place).  Nothing is fused. */
#define Q3N__WEIGHT_MIN -124.0f
#define Q3N__ROUND      0x1.8p23f
#define Q3N__EXP2_1     0x1.62e42ap-1f
#define Q3N__EXP2_2     0x1.ebf9bcp-3f
#define Q3N__EXP2_3     0x1.c6b752p-5f
#define Q3N__EXP2_4     0x1.3cea88p-7f
#define Q3N__EXP2_5     0x1.5bba14p-10f

static float q3n__sampler_weight(float x, float max, float scale)
{
    float t = (x - max) * scale;
    if (!(t >= Q3N__WEIGHT_MIN)) return 0.0f;
    if (t > 0.0f) t = 0.0f;
    const float z = t + Q3N__ROUND, f = t - (z - Q3N__ROUND);
    float p = Q3N__EXP2_5 * f + Q3N__EXP2_4;
    p = p * f + Q3N__EXP2_3;
    p = p * f + Q3N__EXP2_2;
    p = p * f + Q3N__EXP2_1;
    p = p * f + 1.0f;
    return q3n__bits_f32(q3n__f32_bits(p) + (q3n__f32_bits(z) << 23));   /* p 2^round(t) */
}

/* y = 2^((x - max) scale) and each block's sum of them; y may be x.  scale = log2(e) / temperature
 * makes y = e^((x - max) / temperature). */
static void q3n__block_weights_scalar(float *y, float *sum, const float *x, int n_blocks, float max,
                                      float scale)
{
    for (int b = 0; b < n_blocks; b++, x += Q3N__SAMPLER_BLOCK, y += Q3N__SAMPLER_BLOCK) {
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i++) y[i] = q3n__sampler_weight(x[i], max, scale);
        sum[b] = q3n__block_sum_scalar(y);
    }
}

/* Of each block the sum and the number of what is floor or more.  Smaller ones are added as zeros:
 * the order of the sum is the same for every floor. */
static void q3n__block_sums_scalar(float *sum, int32_t *count, const float *y, int n_blocks,
                                   float floor)
{
    for (int b = 0; b < n_blocks; b++, y += Q3N__SAMPLER_BLOCK) {
        float above[Q3N__SAMPLER_BLOCK];
        count[b] = 0;
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i++) {
            above[i] = y[i] >= floor ? y[i] : 0.0f;
            count[b] += y[i] >= floor;
        }
        sum[b] = q3n__block_sum_scalar(above);
    }
}

/* Every entry of the table: later ISAs may leave any of them as it is.  attend and store_kv of
 * quantised types other than q8 stay NULL, as no KV cache has them. */
static void q3n__bind_scalar(q3n__kernels *k)
{
#define Q3N__X(ID, id, number, block_len, block_bytes)                                  \
    k->matmul[Q3N_TYPE_##ID] = q3n__matmul_##id##_scalar;                               \
    k->to_f32[Q3N_TYPE_##ID] = q3n__to_f32_##id##_scalar;                               \
    k->attend[Q3N_TYPE_##ID] = q3n__attend_##id##_scalar;                               \
    k->store_kv[Q3N_TYPE_##ID] = q3n__store_kv_##id##_scalar;
    Q3N_FLOAT_TYPE_LIST(Q3N__X)
#undef Q3N__X
#define Q3N__X(ID, id, number, block_len, block_bytes)                                  \
    k->matmul[Q3N_TYPE_##ID] = q3n__matmul_##id##_scalar;
    Q3N_QUANT_TYPE_LIST(Q3N__X)
#undef Q3N__X
    k->attend[Q3N_TYPE_Q8]   = q3n__attend_q8_scalar;
    k->store_kv[Q3N_TYPE_Q8] = q3n__store_kv_q8_scalar;
    k->quantize_x  = q3n__quantize_x_scalar;
    k->delta       = q3n__delta_scalar;
    k->conv        = q3n__conv_scalar;
    k->dot         = q3n__dot_scalar;
    k->axpy        = q3n__axpy_scalar;
    k->rms_norm    = q3n__rms_norm_scalar;
    k->softmax     = q3n__softmax_scalar;
    k->silu_mul    = q3n__silu_mul_scalar;
    k->sigmoid_mul = q3n__sigmoid_mul_scalar;
    k->block_max     = q3n__block_max_scalar;
    k->block_weights = q3n__block_weights_scalar;
    k->block_sums    = q3n__block_sums_scalar;
}

/* ---- Shared by the ISA sections ---- */
#if defined(_MSC_VER) && !defined(__clang__)
#  define Q3N__INLINE static __forceinline
#  define Q3N__UNROLL
#elif defined(__clang__)
#  define Q3N__INLINE static inline __attribute__((always_inline))
#  define Q3N__UNROLL _Pragma("unroll")
#else
#  define Q3N__INLINE static inline __attribute__((always_inline))
#  define Q3N__UNROLL _Pragma("GCC unroll 8")
#endif


/* e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln(2) / 2: r in two steps (Cody and Waite's
 * reduction), the first exact because LN2_HI has 15 bits.  e^r = 1 + r + r^2 (EXP_2 + EXP_3 r + ...
 * + EXP_6 r^4): minimax in the relative error, 3.1e-9, by Remez exchange in 40 digits.  Beyond MIN
 * and MAX the result is 0 and infinity.  Off by at most 1.0 unit in the last place in 24 million
 * samples, denormals included. */
#define Q3N__EXP_MIN -104.0f
#define Q3N__EXP_MAX 89.0f
#define Q3N__LOG2_E  0x1.715476p+0f
#define Q3N__LN2_HI  0x1.62e4p-1f
#define Q3N__LN2_LO  0x1.7f7d1cp-20f
#define Q3N__EXP_2   0x1.fffffcp-2f
#define Q3N__EXP_3   0x1.555492p-3f
#define Q3N__EXP_4   0x1.5558f2p-5f
#define Q3N__EXP_5   0x1.123a2p-7f
#define Q3N__EXP_6   0x1.6a23dp-10f

/* out [n, width] = sum over i in [step0, step1) of x[., i] m[i, .]; step0 > 0 continues from out */
typedef struct {
    const void  *m;              /* [steps, m_stride] of a type of the KV cache                  */
    const float *x;              /* [n, x_stride]                                                */
    float       *out;            /* [n, out_stride]                                              */
    size_t       m_stride, x_stride, out_stride;
    int          n, step0, step1, width;   /* n is 1 to 4                                        */
    q3n_type     type;
} q3n__mix;

/* Rows of m that are fetched into L2 ahead: its tiles are too narrow for the hardware's prefetch
 * (keys and values from memory, 4 queries of 256, bf16: 17.6 instead of 28 ns a query and key with
 * 64 rows, 22.5 with 16, Zen 4). */
#define Q3N__MIX_AHEAD 64

/* What attention needs of an ISA.  A tile of its mix has `columns` columns. */
typedef struct {
    void  (*mix)(const q3n__mix *p);
    float (*highest)(const float *x, int n);                 /* max(-FLT_MAX, x_0, ...)          */
    float (*exp_sum)(float *x, int n, float m);              /* x_i = e^(x_i - m); their sum     */
    void  (*scale)(float *s, const float *scale, int n);     /* s_j *= scale_j                   */
    int     columns;
} q3n__attend_parts;

/* Up to four queries from query i on.  Both products are mixes:
 *
 *     scores [T, keys]    = q [T, D] k [D, 256]          to the largest count, rounded up to a tile
 *     o [T, D]            = weights [T, keys] v [keys, D]
 *
 * Scores after a query's count are computed and dropped; values must not be, for 0 times NaN is
 * NaN.  So they share the values up to the smallest of their counts, and each goes on alone from
 * there: none sees a value that is not its own. */
static void q3n__attend_group(const q3n__attend_parts *f, q3n_type type, const q3n__attend *a,
                              int i, int T)
{
    int min = Q3N__KV_BLOCK, max = 0;
    for (int t = i; t < i + T; t++) {
        if (a->n_keys[t] < min) min = a->n_keys[t];
        if (a->n_keys[t] > max)  max  = a->n_keys[t];
    }
    const int has_scales = type == Q3N_TYPE_Q8;
    float *scores = a->scores + (size_t)i * Q3N__KV_BLOCK;
    float *o = a->o + (size_t)i * (size_t)a->o_stride;
    const q3n__mix qk = { a->k, a->q + (size_t)i * (size_t)a->q_stride, scores, Q3N__KV_BLOCK,
                          (size_t)a->q_stride, Q3N__KV_BLOCK, T, 0, a->dim,
                          (max + f->columns - 1) / f->columns * f->columns, type };
    f->mix(&qk);
    for (int t = 0; t < T; t++) {
        float *s = scores + t * Q3N__KV_BLOCK;
        if (has_scales) f->scale(s, a->k_scale, a->n_keys[i + t]);
        a->m[i + t] = f->highest(s, a->n_keys[i + t]);
        a->l[i + t] = f->exp_sum(s, a->n_keys[i + t], a->m[i + t]);
        if (has_scales) f->scale(s, a->v_scale, a->n_keys[i + t]);
    }
    const q3n__mix pv = { a->v, scores, o, (size_t)a->dim, Q3N__KV_BLOCK, (size_t)a->o_stride, T, 0,
                          min, a->dim, type };
    f->mix(&pv);
    for (int t = 0; t < T; t++) {
        if (a->n_keys[i + t] == min) continue;
        const q3n__mix rest = { a->v, scores + t * Q3N__KV_BLOCK,
                                o + (size_t)t * (size_t)a->o_stride, (size_t)a->dim, 0, 0, 1,
                                min, a->n_keys[i + t], a->dim, type };
        f->mix(&rest);
    }
}

static Q3N__UNUSED void q3n__attend_groups(const q3n__attend_parts *f, q3n_type type,
                                           const q3n__attend *a)
{
    /* Three are two and one: as four of which one is dropped they took up to half as long again. */
    for (int i = 0, T; i < a->n; i += T) {
        T = a->n - i < 3 ? a->n - i : a->n - i == 3 ? 2 : 4;
        q3n__attend_group(f, type, a, i, T);
    }
}

/* Entries of the table for the types of matrices and of the KV cache: what they call asks for the
 * type once a tile or once a vector of several rows, so that one body serves all. */
#define Q3N__DEFINE_FLOAT_TYPE(id, ID, isa)                                                        \
    static void q3n__matmul_##id##_##isa(const q3n__matmul *m)                                     \
    {                                                                                              \
        q3n__matmul_##isa(Q3N_TYPE_##ID, m);                                                       \
    }                                                                                              \
    static void q3n__to_f32_##id##_##isa(float *y, const void *x, int n)                           \
    {                                                                                              \
        q3n__to_f32_##isa(Q3N_TYPE_##ID, y, x, n);                                                 \
    }
#define Q3N__DEFINE_ATTEND(id, ID, isa)                                                            \
    static void q3n__attend_##id##_##isa(const q3n__attend *a)                                     \
    {                                                                                              \
        q3n__attend_groups(&q3n__attend_##isa, Q3N_TYPE_##ID, a);                                  \
    }
#define Q3N__DEFINE_FLOAT_TYPES(isa)                                                               \
    Q3N__DEFINE_FLOAT_TYPE(f32, F32, isa)                                                          \
    Q3N__DEFINE_FLOAT_TYPE(f16, F16, isa)                                                          \
    Q3N__DEFINE_FLOAT_TYPE(bf16, BF16, isa)                                                        \
    Q3N__DEFINE_ATTEND(f32, F32, isa)                                                              \
    Q3N__DEFINE_ATTEND(f16, F16, isa)                                                              \
    Q3N__DEFINE_ATTEND(bf16, BF16, isa)                                                            \
    Q3N__DEFINE_ATTEND(q8, Q8, isa)

/* Tokens of the next tile: at most `max`, and no tile of one after a full one. */
static Q3N__UNUSED int q3n__tile_tokens(int left, int max)
{
    return left <= max ? left : left < 2 * max ? (left + 1) / 2 : max;
}

/* Tokens whose inputs stay in L2 while all rows pass, a multiple of a tile. */
static Q3N__UNUSED int q3n__block_tokens(int n_cols, int tile)
{
    const int tiles = 65536 / ((n_cols > 0 ? n_cols : 1) * tile);         /* 256 KiB of inputs */
    return (tiles < 1 ? 1 : tiles) * tile;
}

/* The operands of a tile of float weights.  The last columns, fewer than a vector, are copied to
 * tail_w and tail_x with zeros after them, and go through the loop as one more vector: nothing is
 * read beyond an array, and a tile has one loop. */
typedef struct {
    const void  *w[8];           /* where its rows begin; those after the last are copies of it  */
    const float *x[8];           /* ... and its tokens                                           */
    size_t       ahead;          /* bytes to the rows that come next, 0 = do not fetch them      */
    size_t       size;           /* bytes of a weight                                            */
    uint8_t      tail_w[8][64];
    float        tail_x[8][16];
} q3n__operands;

/* Rows from r and tokens from t on.  What would be after the last row or token is a copy: it is
 * computed with the others and not stored. */
static Q3N__UNUSED void q3n__operands_at(q3n__operands *p, q3n_type type, const q3n__matmul *m,
                                         int r, int t, int max)
{
    p->size = (size_t)q3n__types[type].block_bytes;
    for (int i = 0; i < 8; i++) {
        const int row = r + i < m->row1 ? r + i : m->row1 - 1, token = t + i < m->n ? t + i : t;
        p->w[i] = (const uint8_t *)m->w + (size_t)row * (size_t)m->n_cols * p->size;
        p->x[i] = q3n__matmul_x(m, token);
    }
    const int first = t % q3n__block_tokens(m->n_cols, max) == 0, rows = m->n == 1 ? 8 : 4;
    p->ahead = first ? (size_t)rows * (size_t)m->n_cols * p->size : 0;
}

/* The operands become their last n columns, fewer than a vector, with zeros after them. */
static Q3N__UNUSED void q3n__operands_tail(q3n__operands *p, int n_cols, int n)
{
    const size_t at = (size_t)(n_cols - n);
    memset(p->tail_w, 0, sizeof p->tail_w);
    memset(p->tail_x, 0, sizeof p->tail_x);
    for (int i = 0; i < 8; i++) {
        memcpy(p->tail_w[i], (const uint8_t *)p->w[i] + at * p->size, (size_t)n * p->size);
        memcpy(p->tail_x[i], p->x[i] + at, (size_t)n * sizeof(float));
        p->w[i] = p->tail_w[i];
        p->x[i] = p->tail_x[i];
    }
    p->ahead = 0;
}

/* Row i of the convolution's input: the state's columns, then x. */
static Q3N__UNUSED const float *q3n__conv_input(const q3n__conv *c, int i)
{
    const int back = c->width - 1;
    return i < back ? c->state + (size_t)i * (size_t)c->n_channels
                    : c->x + (size_t)(i - back) * (size_t)c->x_stride;
}

/* The new state is the last width - 1 rows of the input.  In place a row comes from one after it
 * that is not written yet. */
static Q3N__UNUSED void q3n__conv_shift(const q3n__conv *c)
{
    if (c->n < 1 || c->c1 <= c->c0) return;
    for (int j = 0; j < c->width - 1; j++)
        memcpy(c->state_out + (size_t)j * (size_t)c->n_channels + c->c0,
               q3n__conv_input(c, c->n + j) + c->c0, (size_t)(c->c1 - c->c0) * sizeof(float));
}

/* =====================================================================================
 * [33] KERNELS, AVX2                                                   >>kernels-avx2
 *
 * How the sections of AVX2, AVX-512 and NEON work.  An element of a product has one accumulator
 * vector that walks the columns in steps of one vector; a shorter last step reads zeros after the
 * end; then one order of horizontal sums.  Tiles of several rows and tokens only put independent
 * elements next to each other, so no tile shape changes a bit.  Loops over constants, marked
 * Q3N__UNROLL, unroll completely and their arrays live in registers.
 *
 * Whoever includes this file compiles every body in it: one more shape or type that is a constant
 * has to be worth that.  What a call or a branch does not slow is shared: the beginning and the end
 * of a tile, the types where many products stand beside the branch, the number of tokens of a
 * quantised tile, whose accumulators live in the first-level cache.
 * ===================================================================================== */

#if Q3N__X86 && !defined(Q3N_NO_AVX2)
Q3N__TARGET_BEGIN("avx2,fma,f16c")

/* ---- Loads, stores, sums.  n elements are real, n >= 8 = all; the rest reads as zero ---- */
/* Lane i is all ones if i < n.  Lanes that are masked off are neither read nor written: tails end
 * where their array ends. */
Q3N__INLINE __m256i q3n__mask_avx2(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

Q3N__INLINE __m256 q3n__loadf_avx2(const float *p, int n)
{
    return n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, q3n__mask_avx2(n));
}

Q3N__INLINE void q3n__storef_avx2(float *p, __m256 v, int n)
{
    if (n >= 8) _mm256_storeu_ps(p, v);
    else        _mm256_maskstore_ps(p, q3n__mask_avx2(n), v);
}

/* Elements [i, i + 8) of a row of floats, or of bytes (q8).  bf16 is the upper half of an f32. */
Q3N__INLINE __m256 q3n__load8_avx2(q3n_type type, const void *row, size_t i)
{
    if (type == Q3N_TYPE_F32) return _mm256_loadu_ps((const float *)row + i);
    if (type == Q3N_TYPE_Q8) {
        const void *bytes = (const int8_t *)row + i;
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)bytes)));
    }
    const void *halves = (const uint16_t *)row + i;
    const __m128i h = _mm_loadu_si128((const __m128i *)halves);
    if (type == Q3N_TYPE_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

/* The same as far as they are real, through a copy: AVX2 masks only loads of 32 bits or more. */
static __m256 q3n__load_avx2(q3n_type type, const void *row, size_t i, int n)
{
    const size_t size = q3n__kv_element(type);
    uint8_t part[8 * sizeof(float)] = { 0 };
    if (n >= 8) return q3n__load8_avx2(type, row, i);
    memcpy(part, (const uint8_t *)row + i * size, (size_t)n * size);
    return q3n__load8_avx2(type, part, 0);
}

/* Elements [i, i + 8) of n rows.  n is a constant in every use, the type need not be. */
Q3N__INLINE void q3n__loads_avx2(q3n_type type, int n, const void *const *row, size_t i, __m256 *v)
{
    if (type == Q3N_TYPE_BF16) {
        Q3N__UNROLL
        for (int r = 0; r < n; r++) v[r] = q3n__load8_avx2(Q3N_TYPE_BF16, row[r], i);
    } else if (type == Q3N_TYPE_F32) {
        Q3N__UNROLL
        for (int r = 0; r < n; r++) v[r] = q3n__load8_avx2(Q3N_TYPE_F32, row[r], i);
    } else if (type == Q3N_TYPE_F16) {
        Q3N__UNROLL
        for (int r = 0; r < n; r++) v[r] = q3n__load8_avx2(Q3N_TYPE_F16, row[r], i);
    } else {
        Q3N__UNROLL
        for (int r = 0; r < n; r++) v[r] = q3n__load8_avx2(Q3N_TYPE_Q8, row[r], i);
    }
}

/* The sums of four vectors, of a in lane 0: neighbours, then pairs, then the halves.  Rows of a
 * tile are summed four at a time and stored by one instruction. */
Q3N__INLINE __m128 q3n__sum4_avx2(__m256 a, __m256 b, __m256 c, __m256 d)
{
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

/* The sum of one: halves on halves, as q3n__block_sum_scalar ends; the sampler relies on it. */
Q3N__INLINE float q3n__sum_avx2(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* ---- e^x: the clamps and the rest keep NaN; 2^n in two factors, so that a denormal result is
 *      rounded once and 2^128 does not overflow too early ---- */
Q3N__INLINE __m256 q3n__pow2_avx2(__m256i n)   /* -126 <= n <= 127 */
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

Q3N__INLINE __m256 q3n__exp_avx2(__m256 x)
{
    x = _mm256_max_ps(_mm256_set1_ps(Q3N__EXP_MIN), _mm256_min_ps(_mm256_set1_ps(Q3N__EXP_MAX), x));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(Q3N__LOG2_E)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(Q3N__LN2_HI), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(Q3N__LN2_LO), r);
    __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(Q3N__EXP_6), r, _mm256_set1_ps(Q3N__EXP_5));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(Q3N__EXP_4));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(Q3N__EXP_3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(Q3N__EXP_2));
    p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r);
    p = _mm256_add_ps(p, _mm256_set1_ps(1.0f));
    const __m256i ni = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(ni, 1);
    p = _mm256_mul_ps(p, q3n__pow2_avx2(half));
    return _mm256_mul_ps(p, q3n__pow2_avx2(_mm256_sub_epi32(ni, half)));
}

/* 1 + e^-x */
Q3N__INLINE __m256 q3n__exp1_avx2(__m256 x)
{
    const __m256 minus = _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
    return _mm256_add_ps(_mm256_set1_ps(1.0f), q3n__exp_avx2(minus));
}

/* ---- Matrix product: a tile of R rows x T tokens, one accumulator for each ---- */
#define Q3N__TOKENS_AVX2 3     /* 4 x 3 accumulators, 3 inputs, 1 weight: 16 registers */

/* y of token t, rows [r, r + 4) as far as they are wanted */
Q3N__INLINE void q3n__store_rows_avx2(const q3n__matmul *m, int r, int t, __m128 v)
{
    float *y = m->y + (size_t)t * (size_t)m->y_stride + r;
    const __m128i k = _mm_cmpgt_epi32(_mm_set1_epi32(m->row1 - r), _mm_setr_epi32(0, 1, 2, 3));
    if (m->bias) v = _mm_add_ps(v, _mm_maskload_ps(m->bias + r, k));
    _mm_maskstore_ps(y, k, v);
}

/* s [T][R]: sums of rows and tokens that are there, R a multiple of 4. */
static void q3n__store_tile_avx2(const q3n__matmul *m, int r0, int t0, int R, int T,
                                 const __m256 *s)
{
    for (int t = t0; t < t0 + T && t < m->n; t++)
        for (int r = r0; r < r0 + R; r += 4, s += 4)
            if (r < m->row1) q3n__store_rows_avx2(m, r, t, q3n__sum4_avx2(s[0], s[1], s[2], s[3]));
}

/* Rows after the last are computed as copies of it and dropped: every output takes one path.  The
 * first tile of a row fetches the next R rows into L2, a line more than once: the hardware's
 * prefetch stops at each row's end (bf16 from memory, rows of 512: 24 instead of 11 GB/s, Zen 4;
 * into L1, or each line once, it gains less).  type, R and T are constants in every use, so that s
 * stays in registers: of 16 there is none for a second weight, so every type has its own body.  To
 * ask whether to fetch takes longer than to fetch what is there (bf16: 10 % of a tile of 3 tokens,
 * Cascade Lake), but for f32, which loads twice as much. */
Q3N__INLINE void q3n__tile_avx2(q3n_type type, int R, int T, const q3n__matmul *m, int r0, int t0)
{
    __m256 s[8][Q3N__TOKENS_AVX2], sums[8 * Q3N__TOKENS_AVX2], x[Q3N__TOKENS_AVX2];
    q3n__operands p;
    q3n__operands_at(&p, type, m, r0, t0, Q3N__TOKENS_AVX2);
    Q3N__UNROLL
    for (int r = 0; r < R; r++)
        Q3N__UNROLL
        for (int t = 0; t < T; t++) s[r][t] = _mm256_setzero_ps();
    const int left = m->n_cols % 8;
    for (int pass = 0; pass < 1 + (left > 0); pass++) {
        const int n = pass ? 8 : m->n_cols - left;
        if (pass) q3n__operands_tail(&p, m->n_cols, left);
        for (int j = 0; j < n; j += 8) {
            if (p.ahead || type != Q3N_TYPE_F32) {
                Q3N__UNROLL
                for (int r = 0; r < R; r++)
                    _mm_prefetch((const char *)p.w[r] + p.ahead + (size_t)j * p.size, _MM_HINT_T1);
            }
            Q3N__UNROLL
            for (int t = 0; t < T; t++) x[t] = _mm256_loadu_ps(p.x[t] + j);
            Q3N__UNROLL
            for (int r = 0; r < R; r++) {
                const __m256 w = q3n__load8_avx2(type, p.w[r], (size_t)j);
                Q3N__UNROLL
                for (int t = 0; t < T; t++) s[r][t] = _mm256_fmadd_ps(w, x[t], s[r][t]);
            }
        }
    }
    Q3N__UNROLL
    for (int t = 0; t < T; t++)
        Q3N__UNROLL
        for (int r = 0; r < R; r++) sums[t * R + r] = s[r][t];
    q3n__store_tile_avx2(m, r0, t0, R, T, sums);
}

/* Four rows, tokens [t, t1): the weights come from L1 for all but the first tile. */
Q3N__INLINE void q3n__rows_avx2(q3n_type type, const q3n__matmul *m, int r, int t, int t1)
{
    while (t < t1) {
        const int T = q3n__tile_tokens(t1 - t, Q3N__TOKENS_AVX2);
        switch (T) {
        case 1:              /* as two, the second a copy that is not stored */
        case 2: q3n__tile_avx2(type, 4, 2, m, r, t); break;
        case 3: q3n__tile_avx2(type, 4, 3, m, r, t); break;
        }
        t += T;
    }
}

/* One token: 8 rows at once, so that 8 sums are under way.  More: a block of tokens whose inputs
 * stay in L2 passes over all rows, four at a time; weights are read from memory once for a block.
 */
Q3N__INLINE void q3n__matmul_avx2(q3n_type type, const q3n__matmul *m)
{
    if (m->n == 1) {
        for (int r = m->row0; r < m->row1; r += 8) q3n__tile_avx2(type, 8, 1, m, r, 0);
        return;
    }
    const int block = q3n__block_tokens(m->n_cols, Q3N__TOKENS_AVX2);
    for (int t = 0; t < m->n; t += block) {
        const int t1 = m->n - t > block ? t + block : m->n;
        for (int r = m->row0; r < m->row1; r += 4) q3n__rows_avx2(type, m, r, t, t1);
    }
}

/* ---- Attention: both products are out += x M with the vectors along M's rows ---- */

/* Columns [c, c + 8 V) of T rows of out: out[t] += x[t][j] m[j] for rising j, so each element has
 * one sum, which a later call may take up (step0 > 0).  Of m a row is read once for T rows of x.  V
 * and T are constants in every use. */
Q3N__INLINE void q3n__mix_tile_avx2(q3n_type type, int V, int T, const q3n__mix *p, int c)
{
    const size_t size = q3n__kv_element(type);
    const void *m[4];
    const float *x[4];
    float *out[4];
    __m256 s[4][4], v[4];
    Q3N__UNROLL
    for (int i = 0; i < V; i++) m[i] = (const uint8_t *)p->m + (size_t)(c + 8 * i) * size;
    Q3N__UNROLL
    for (int t = 0; t < T; t++) {
        x[t] = p->x + (size_t)t * p->x_stride;
        out[t] = p->out + (size_t)t * p->out_stride + c;
        Q3N__UNROLL
        for (int i = 0; i < V; i++)
            s[t][i] = p->step0 == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(out[t] + 8 * i);
    }
    for (int j = p->step0; j < p->step1; j++) {
        const size_t at = (size_t)j * p->m_stride;
        Q3N__UNROLL
        for (int i = 0; i < V; i++)
            _mm_prefetch((const char *)m[i] + (at + Q3N__MIX_AHEAD * p->m_stride) * size,
                         _MM_HINT_T1);
        q3n__loads_avx2(type, V, m, at, v);
        Q3N__UNROLL
        for (int t = 0; t < T; t++) {
            const __m256 xt = _mm256_set1_ps(x[t][j]);
            Q3N__UNROLL
            for (int i = 0; i < V; i++) s[t][i] = _mm256_fmadd_ps(v[i], xt, s[t][i]);
        }
    }
    Q3N__UNROLL
    for (int t = 0; t < T; t++)
        Q3N__UNROLL
        for (int i = 0; i < V; i++) _mm256_storeu_ps(out[t] + 8 * i, s[t][i]);
}

/* The columns that are left, from c on: few heads have any. */
static void q3n__mix_rest_avx2(const q3n__mix *p, int c)
{
    for (; c < p->width; c += 8)
        for (int t = 0; t < p->n; t++) {
            float *out = p->out + (size_t)t * p->out_stride + c;
            const float *x = p->x + (size_t)t * p->x_stride;
            const int n = p->width - c;
            __m256 s = p->step0 == 0 ? _mm256_setzero_ps() : q3n__loadf_avx2(out, n);
            for (int j = p->step0; j < p->step1; j++) {
                const size_t at = (size_t)j * p->m_stride + (size_t)c;
                s = _mm256_fmadd_ps(q3n__load_avx2(p->type, p->m, at, n), _mm256_set1_ps(x[j]), s);
            }
            q3n__storef_avx2(out, s, n);
        }
}

Q3N__INLINE int q3n__mix_tiles_avx2(q3n_type type, int V, int T, const q3n__mix *p)
{
    int c = 0;
    for (; c + 8 * V <= p->width; c += 8 * V) q3n__mix_tile_avx2(type, V, T, p, c);
    return c;
}

/* Of one or two rows each type has its own body, as in AVX-512. */
Q3N__INLINE int q3n__mix_typed_avx2(int T, const q3n__mix *p)
{
    if (p->type == Q3N_TYPE_F32) return q3n__mix_tiles_avx2(Q3N_TYPE_F32, 4, T, p);
    if (p->type == Q3N_TYPE_F16) return q3n__mix_tiles_avx2(Q3N_TYPE_F16, 4, T, p);
    if (p->type == Q3N_TYPE_Q8)  return q3n__mix_tiles_avx2(Q3N_TYPE_Q8, 4, T, p);
    return q3n__mix_tiles_avx2(Q3N_TYPE_BF16, 4, T, p);
}

static void q3n__mix_avx2(const q3n__mix *p)   /* tiles of 16 registers: accumulators, m and x */
{
    const int c = p->n == 1 ? q3n__mix_typed_avx2(1, p)
                : p->n == 2 ? q3n__mix_typed_avx2(2, p) : q3n__mix_tiles_avx2(p->type, 2, 4, p);
    q3n__mix_rest_avx2(p, c);
}

/* max(-FLT_MAX, x_0, ...).  The instruction gives its second operand if one is NaN, so m stays. */
static float q3n__max_avx2(const float *x, int n)
{
    const __m256 min = _mm256_set1_ps(-FLT_MAX);
    __m256 m = min;
    int i = 0;
    for (; i + 8 <= n; i += 8) m = _mm256_max_ps(_mm256_loadu_ps(x + i), m);
    if (i < n) {
        const __m256i k = q3n__mask_avx2(n - i);
        const __m256 v = _mm256_maskload_ps(x + i, k);
        m = _mm256_max_ps(_mm256_blendv_ps(min, v, _mm256_castsi256_ps(k)), m);
    }
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

/* x_i = e^(x_i - m); returns their sum.  Lanes that are not real hold e^-m: masked off. */
static float q3n__exp_sum_avx2(float *x, int n, float m)
{
    const __m256 vm = _mm256_set1_ps(m);
    __m256 sum = _mm256_setzero_ps();
    for (int i = 0; i < n; i += 8) {
        const __m256 k = _mm256_castsi256_ps(q3n__mask_avx2(n - i));
        const __m256 e = q3n__exp_avx2(_mm256_sub_ps(q3n__loadf_avx2(x + i, n - i), vm));
        q3n__storef_avx2(x + i, e, n - i);
        sum = _mm256_add_ps(sum, _mm256_and_ps(e, k));
    }
    return q3n__sum_avx2(sum);
}

/* s_j *= scale_j, of a key's or value's bytes. */
static void q3n__attend_scale_avx2(float *s, const float *scale, int n)
{
    for (int j = 0; j < n; j += 8)
        q3n__storef_avx2(s + j, _mm256_mul_ps(q3n__loadf_avx2(s + j, n - j),
                                              q3n__loadf_avx2(scale + j, n - j)), n - j);
}

static const q3n__attend_parts q3n__attend_avx2 = {
    q3n__mix_avx2, q3n__max_avx2, q3n__exp_sum_avx2, q3n__attend_scale_avx2, 32
};

/* ---- One instance for each float type ---- */
static void q3n__to_f32_avx2(q3n_type type, float *y, const void *x, int n)
{
    for (int i = 0; i < n; i += 8)
        q3n__storef_avx2(y + i, q3n__load_avx2(type, x, (size_t)i, n - i), n - i);
}

Q3N__DEFINE_FLOAT_TYPES(avx2)

/* ---- DeltaNet: a block of V vectors of the state's columns for all tokens ----
 *
 * One pass over the block a token: while a row of S is in registers it is decayed and corrected,
 * and read twice, by q for this token's output and by the next token's k for its correction:
 *
 *     before      read = S' k_0
 *     token t     d = beta (v_t - e^g read)
 *                 each row i:  s = e^g S_i + k_t,i d;   o += s q_t,i;   read' += s k_(t+1),i
 *
 * read' is what token t + 1 begins with.  Lanes are columns, which do not mix: nothing is summed
 * across, and a block of any width gives the same bits. */
typedef struct {
    const float *from;           /* the block's first column where the token reads the state ... */
    float       *to;             /* ... and where it writes it                                   */
    size_t       from_stride, to_stride;
    float        decay;
    int          dk, n;          /* n columns are real if V is 1                                 */
    __m256       d[8], o[8], read[8];
} q3n__delta_cols_avx2;

/* read = S' k */
Q3N__INLINE void q3n__delta_read_avx2(int V, q3n__delta_cols_avx2 *p, const float *k)
{
    Q3N__UNROLL
    for (int v = 0; v < V; v++) p->read[v] = _mm256_setzero_ps();
    for (int i = 0; i < p->dk; i++) {
        const float *S = p->from + (size_t)i * p->from_stride;
        const __m256 ki = _mm256_set1_ps(k[i]);
        Q3N__UNROLL
        for (int v = 0; v < V; v++)
            p->read[v] = _mm256_fmadd_ps(q3n__loadf_avx2(S + 8 * v, p->n), ki, p->read[v]);
    }
}

/* S <- decay S + k d' and, while S is at hand, o = S' q and read = S' next.  `keeps`, a constant,
 * says whether the new S is stored; q and next are NULL if nobody needs what they read. */
Q3N__INLINE void q3n__delta_step_avx2(int V, q3n__delta_cols_avx2 *p, int keeps,
                                      const float *q, const float *k, const float *next)
{
    const __m256 keep = _mm256_set1_ps(p->decay);
    Q3N__UNROLL
    for (int v = 0; v < V; v++) p->o[v] = p->read[v] = _mm256_setzero_ps();
    for (int i = 0; i < p->dk; i++) {
        const float *from = p->from + (size_t)i * p->from_stride;
        const __m256 ki = _mm256_set1_ps(k[i]);
        const __m256 qi = q ? _mm256_set1_ps(q[i]) : ki, ni = next ? _mm256_set1_ps(next[i]) : ki;
        Q3N__UNROLL
        for (int v = 0; v < V; v++) {
            __m256 s = q3n__loadf_avx2(from + 8 * v, p->n);
            s = _mm256_fmadd_ps(keep, s, _mm256_mul_ps(ki, p->d[v]));
            if (keeps) q3n__storef_avx2(p->to + (size_t)i * p->to_stride + 8 * v, s, p->n);
            if (q)     p->o[v] = _mm256_fmadd_ps(s, qi, p->o[v]);
            if (next)  p->read[v] = _mm256_fmadd_ps(s, ni, p->read[v]);
        }
    }
}

/* Columns [j, j + 8 V) of which n are real if V is 1.  A token whose output and state nobody reads
 * is passed over: the last one of a call without outputs, if it is not stored. */
Q3N__INLINE void q3n__delta_block_avx2(int V, const q3n__delta *h, int j, int n)
{
    q3n__delta_cols_avx2 p;
    p.from = h->S + j;
    p.from_stride = (size_t)h->dv;
    p.dk = h->dk;
    p.n = n;
    q3n__delta_read_avx2(V, &p, h->k);
    for (int t = 0; t < h->n; t++) {
        const float *q = h->q + (size_t)t * (size_t)h->qk_stride;
        const float *k = h->k + (size_t)t * (size_t)h->qk_stride;
        const float *values = h->v + (size_t)t * (size_t)h->v_stride + j;
        p.decay = expf(h->g[(size_t)t * (size_t)h->gb_stride]);
        const __m256 beta = _mm256_set1_ps(h->beta[(size_t)t * (size_t)h->gb_stride]);
        Q3N__UNROLL
        for (int v = 0; v < V; v++) {
            const __m256 x = q3n__loadf_avx2(values + 8 * v, n);
            p.d[v] = _mm256_mul_ps(beta, _mm256_fnmadd_ps(_mm256_set1_ps(p.decay), p.read[v], x));
        }
        const int has_output = q3n__delta_has_output(h, t);
        p.to = q3n__delta_after(h, t, j);
        p.to_stride = q3n__delta_stride(h, t);
        if (t + 1 < h->n && has_output) q3n__delta_step_avx2(V, &p, 1, q, k, k + h->qk_stride);
        else if (t + 1 < h->n)      q3n__delta_step_avx2(V, &p, 1, NULL, k, k + h->qk_stride);
        else if (p.to)              q3n__delta_step_avx2(V, &p, 1, q, k, NULL);
        else if (has_output)            q3n__delta_step_avx2(V, &p, 0, q, k, NULL);
        p.from = p.to;
        p.from_stride = p.to_stride;
        if (!has_output) continue;
        float *o = h->o + (size_t)t * (size_t)h->o_stride + j;
        Q3N__UNROLL
        for (int v = 0; v < V; v++) q3n__storef_avx2(o + 8 * v, p.o[v], n);
    }
}

/* One token reads the state from memory, in whole rows as far as they go; more read it from the
 * first-level cache, where narrow blocks are faster. */
static void q3n__delta_avx2(const q3n__delta *h)
{
    if (h->n < 1) return;
    int j = h->col0;
    if (h->n == 1)
        for (; j + 32 <= h->col1; j += 32) q3n__delta_block_avx2(4, h, j, 8);
    for (; j + 16 <= h->col1; j += 16) q3n__delta_block_avx2(2, h, j, 8);
    for (; j < h->col1; j += 8) q3n__delta_block_avx2(1, h, j, h->col1 - j);
}

/* ---- Convolution: lanes are channels; u[j] is row t - width + 1 + j of the input ---- */
static void q3n__conv_avx2(const q3n__conv *c)
{
    const float *u[16];                                /* width <= 16 (Q3N_CONFIG_LIST) */
    for (int t = 0; t < c->n; t++) {
        float *y = c->y + (size_t)t * (size_t)c->y_stride;
        for (int j = 0; j < c->width; j++) u[j] = q3n__conv_input(c, t + j);
        for (int ch = c->c0; ch < c->c1; ch += 8) {
            const int n = c->c1 - ch;
            __m256 s = _mm256_setzero_ps();
            for (int j = 0; j < c->width; j++) {
                const float *w = c->w + (size_t)j * (size_t)c->n_channels + ch;
                s = _mm256_fmadd_ps(q3n__loadf_avx2(w, n), q3n__loadf_avx2(u[j] + ch, n), s);
            }
            q3n__storef_avx2(y + ch, _mm256_div_ps(s, q3n__exp1_avx2(s)), n);
        }
    }
    q3n__conv_shift(c);
}

/* ---- Vectors ---- */

/* Four sums of vectors, so that four multiply-adds are under way; what is left goes to the first.
 */
static float q3n__dot_avx2(const float *a, const float *b, int n)
{
    __m256 s[4];
    Q3N__UNROLL
    for (int v = 0; v < 4; v++) s[v] = _mm256_setzero_ps();
    int i = 0;
    for (; i + 32 <= n; i += 32)
        Q3N__UNROLL
        for (int v = 0; v < 4; v++)
            s[v] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * v), _mm256_loadu_ps(b + i + 8 * v),
                                   s[v]);
    for (; i < n; i += 8)
        s[0] = _mm256_fmadd_ps(q3n__loadf_avx2(a + i, n - i), q3n__loadf_avx2(b + i, n - i), s[0]);
    return q3n__sum_avx2(_mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3])));
}

static void q3n__axpy_avx2(float *y, float a, const float *x, int n)
{
    const __m256 va = _mm256_set1_ps(a);
    for (int i = 0; i < n; i += 8) {
        const __m256 vy = q3n__loadf_avx2(y + i, n - i);
        q3n__storef_avx2(y + i, _mm256_fmadd_ps(va, q3n__loadf_avx2(x + i, n - i), vy), n - i);
    }
}

/* y may be x: the sum is complete before the first element is written. */
static void q3n__rms_norm_avx2(float *y, const float *x, const float *w, int n, float eps)
{
    const float mean = q3n__dot_avx2(x, x, n) / (float)n;
    const __m256 scale = _mm256_set1_ps(1.0f / sqrtf(mean + eps));
    for (int i = 0; i < n; i += 8) {
        const __m256 v = _mm256_mul_ps(q3n__loadf_avx2(x + i, n - i), scale);
        q3n__storef_avx2(y + i, _mm256_mul_ps(v, q3n__loadf_avx2(w + i, n - i)), n - i);
    }
}

static void q3n__softmax_avx2(float *x, int n)
{
    const __m256 l = _mm256_set1_ps(q3n__exp_sum_avx2(x, n, q3n__max_avx2(x, n)));
    for (int i = 0; i < n; i += 8)
        q3n__storef_avx2(x + i, _mm256_div_ps(q3n__loadf_avx2(x + i, n - i), l), n - i);
}

/* silu(g) = g / (1 + e^-g): one division, and -0 where e^-g is infinite. */
static void q3n__silu_mul_avx2(float *y, const float *gate, int n)
{
    for (int i = 0; i < n; i += 8) {
        const __m256 g = q3n__loadf_avx2(gate + i, n - i), v = q3n__loadf_avx2(y + i, n - i);
        const __m256 s = _mm256_div_ps(g, q3n__exp1_avx2(g));
        q3n__storef_avx2(y + i, _mm256_mul_ps(v, s), n - i);
    }
}

/* ---- Sampling: the operations of the scalar kernels, one for one ---- */
static void q3n__block_max_avx2(float *max, const float *x, int n_blocks)
{
    for (int b = 0; b < n_blocks; b++, x += Q3N__SAMPLER_BLOCK) {
        __m256 m = _mm256_set1_ps(-Q3N__INFINITY), m2 = m;      /* max(NaN, m) is m */
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i += 16) {
            m = _mm256_max_ps(_mm256_loadu_ps(x + i), m);
            m2 = _mm256_max_ps(_mm256_loadu_ps(x + i + 8), m2);
        }
        m = _mm256_max_ps(m, m2);
        __m128 s = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
        s = _mm_max_ps(s, _mm_movehl_ps(s, s));
        s = _mm_max_ss(s, _mm_movehdup_ps(s));
        max[b] = _mm_cvtss_f32(_mm_min_ss(s, _mm_set_ss(FLT_MAX)));
    }
}

/* q3n__sampler_weight: no multiply-add is fused, as scalar has none.  A comparison with NaN fails,
 * so its weight is masked to 0 as those below WEIGHT_MIN are. */
Q3N__INLINE __m256 q3n__weight_avx2(__m256 x, __m256 max, __m256 scale)
{
    const __m256 round = _mm256_set1_ps(Q3N__ROUND);
    __m256 t = _mm256_mul_ps(_mm256_sub_ps(x, max), scale);
    const __m256 counts = _mm256_cmp_ps(t, _mm256_set1_ps(Q3N__WEIGHT_MIN), _CMP_GE_OQ);
    t = _mm256_min_ps(t, _mm256_setzero_ps());
    const __m256 z = _mm256_add_ps(t, round), f = _mm256_sub_ps(t, _mm256_sub_ps(z, round));
    __m256 p = _mm256_mul_ps(_mm256_set1_ps(Q3N__EXP2_5), f);
    p = _mm256_mul_ps(_mm256_add_ps(p, _mm256_set1_ps(Q3N__EXP2_4)), f);
    p = _mm256_mul_ps(_mm256_add_ps(p, _mm256_set1_ps(Q3N__EXP2_3)), f);
    p = _mm256_mul_ps(_mm256_add_ps(p, _mm256_set1_ps(Q3N__EXP2_2)), f);
    p = _mm256_mul_ps(_mm256_add_ps(p, _mm256_set1_ps(Q3N__EXP2_1)), f);
    p = _mm256_add_ps(p, _mm256_set1_ps(1.0f));
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(z), 23);
    p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), n));
    return _mm256_and_ps(p, counts);
}

/* Two vectors are the 16 running sums; they are added before halves go on halves. */
static void q3n__block_weights_avx2(float *y, float *sum, const float *x, int n_blocks, float max,
                                    float scale)
{
    const __m256 m = _mm256_set1_ps(max), c = _mm256_set1_ps(scale);
    for (int b = 0; b < n_blocks; b++, x += Q3N__SAMPLER_BLOCK, y += Q3N__SAMPLER_BLOCK) {
        __m256 s[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() };
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i += 16)
            for (int k = 0; k < 2; k++) {
                const __m256 w = q3n__weight_avx2(_mm256_loadu_ps(x + i + 8 * k), m, c);
                _mm256_storeu_ps(y + i + 8 * k, w);
                s[k] = _mm256_add_ps(s[k], w);
            }
        sum[b] = q3n__sum_avx2(_mm256_add_ps(s[0], s[1]));
    }
}

/* What is below the floor is added as 0: the order of the sum does not depend on the floor.  A
 * comparison that holds is -1, so counting is subtracting. */
static void q3n__block_sums_avx2(float *sum, int32_t *count, const float *y, int n_blocks,
                                 float floor)
{
    const __m256 min = _mm256_set1_ps(floor);
    for (int b = 0; b < n_blocks; b++, y += Q3N__SAMPLER_BLOCK) {
        __m256 s[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() };
        __m256i n = _mm256_setzero_si256();
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i += 16)
            for (int k = 0; k < 2; k++) {
                const __m256 w = _mm256_loadu_ps(y + i + 8 * k);
                const __m256 counts = _mm256_cmp_ps(w, min, _CMP_GE_OQ);
                s[k] = _mm256_add_ps(s[k], _mm256_and_ps(w, counts));
                n = _mm256_sub_epi32(n, _mm256_castps_si256(counts));
            }
        sum[b] = q3n__sum_avx2(_mm256_add_ps(s[0], s[1]));
        __m128i k = _mm_add_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
        k = _mm_add_epi32(k, _mm_srli_si128(k, 8));
        count[b] = _mm_cvtsi128_si32(_mm_add_epi32(k, _mm_srli_si128(k, 4)));
    }
}

static void q3n__sigmoid_mul_avx2(float *y, const float *gate, int n)
{
    for (int i = 0; i < n; i += 8) {
        const __m256 g = q3n__loadf_avx2(gate + i, n - i), v = q3n__loadf_avx2(y + i, n - i);
        const __m256 s = _mm256_div_ps(_mm256_set1_ps(1.0f), q3n__exp1_avx2(g));
        q3n__storef_avx2(y + i, _mm256_mul_ps(v, s), n - i);
    }
}

/* ---- Quantised matrices: 16 rows are two vectors of 8; see section >>kernels-avx512vnni ----
 *
 * vpmaddubsw adds two products of unsigned and signed bytes to 16 bits and saturates: levels of q4
 * and q3 span 127 and q6 63 for that.  q8 multiplies |level| by the activation with its sign.
 *
 *     largest sums     q4, q3  2 x 127 x 127 = 32258      q8  2 x 128 x 127 = 32512
 *                      q6      4 x 63 x 127 = 32004, so two of its sums may be added in 16 bits
 *
 * Where a zero point makes levels unsigned it comes out by the sum of the activations:
 *
 *     sum (level + zero) q - zero sum q = sum level q          minus_sum = -sum q */
#define Q3N__Q4_ZERO_AVX2 70             /* makes the least level 0                              */
#define Q3N__Q3_ZERO_AVX2 73
#define Q3N__AHEAD_AVX2   4096           /* bytes to what is fetched                             */
#define Q3N__TOKENS_QUANT_AVX2 8         /* their accumulators live in the first-level cache     */

static const uint8_t q3n__q4_bytes_avx2[16] = {
#define Q3N__X(level) (uint8_t)((level) + Q3N__Q4_ZERO_AVX2),
    Q3N__Q4_LEVEL_LIST(Q3N__X)
#undef Q3N__X
};
static const uint8_t q3n__q3_bytes_avx2[16] = {
#define Q3N__X(level) (uint8_t)((level) + Q3N__Q3_ZERO_AVX2),
    Q3N__Q3_LEVEL_LIST(Q3N__X)
#undef Q3N__X
};

Q3N__INLINE __m256i q3n__half_avx2(const uint8_t *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

/* A table of 16 bytes in both halves: vpshufb looks up within each. */
Q3N__INLINE __m256i q3n__table_avx2(const uint8_t *bytes)
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)bytes));
}

/* Columns 4 s .. 4 s + 3 of 8 rows: level + zero, of q8 the level.  p is the rows' half of the
 * group's lines.  type and s are constants in every use. */
Q3N__INLINE __m256i q3n__unpack_avx2(q3n_type type, const uint8_t *p, int s)
{
    const __m256i low4 = _mm256_set1_epi8(15);
    if (type == Q3N_TYPE_Q8)
        return _mm256_xor_si256(q3n__half_avx2(p + 64 * s), _mm256_set1_epi8(-128));
    if (type == Q3N_TYPE_Q3) {
        const __m256i low = q3n__half_avx2(p + 64 * (s / 4)), top = q3n__half_avx2(p + 128);
        const __m256i t = s < 2 ? _mm256_slli_epi16(top, 2 - s) : _mm256_srli_epi16(top, s - 2);
        const __m256i code = _mm256_or_si256(
            _mm256_and_si256(_mm256_srli_epi16(low, 2 * (s % 4)), _mm256_set1_epi8(3)),
            _mm256_and_si256(t, _mm256_set1_epi8(4)));
        return _mm256_shuffle_epi8(q3n__table_avx2(q3n__q3_bytes_avx2), code);
    }
    const __m256i v = q3n__half_avx2(p + 64 * (s % 4));
    const __m256i low = _mm256_and_si256(s < 4 ? v : _mm256_srli_epi16(v, 4), low4);
    if (type == Q3N_TYPE_Q4)
        return _mm256_shuffle_epi8(q3n__table_avx2(q3n__q4_bytes_avx2), low);
    const __m256i top = q3n__half_avx2(p + 256 + 64 * (s / 4));
    const __m256i t = s % 4 == 0 ? _mm256_slli_epi16(top, 4)
                    : s % 4 == 1 ? _mm256_slli_epi16(top, 2)
                    : s % 4 == 2 ? top : _mm256_srli_epi16(top, 2);
    return _mm256_or_si256(low, _mm256_and_si256(t, _mm256_set1_epi8(0x30)));
}

/* 16-bit sums of two products each. */
Q3N__INLINE __m256i q3n__products_avx2(q3n_type type, __m256i w, __m256i x)
{
    if (type != Q3N_TYPE_Q8) return _mm256_maddubs_epi16(w, x);
    return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}

/* What unpacking added to the levels of a type. */
Q3N__INLINE int q3n__zero_avx2(q3n_type type)
{
    return type == Q3N_TYPE_Q4 ? Q3N__Q4_ZERO_AVX2 : type == Q3N_TYPE_Q3 ? Q3N__Q3_ZERO_AVX2
         : type == Q3N_TYPE_Q6 ? Q3N__Q6_ZERO : 0;
}

/* Activations of columns 4 s .. 4 s + 3, in all lanes.  One load of 4 bytes each: from 8 bytes at
 * once gcc takes the fours by way of a general register, half as slow again. */
Q3N__INLINE __m256i q3n__four_avx2(const q3n__x8 *x, int g, int s)
{
    int32_t four;
    memcpy(&four, x->q + Q3N__GROUP * g + 4 * s, sizeof four);
    return _mm256_set1_epi32(four);
}

/* The sums of a group for 8 rows: exact integers, so their order is free.  vpmaddwd with ones adds
 * pairs of 16 bits to 32. */
Q3N__INLINE __m256i q3n__group_avx2(q3n_type type, const __m256i u[8], const q3n__x8 *x, int g)
{
    const __m256i one = _mm256_set1_epi16(1);
    __m256i sum = _mm256_set1_epi32(x->minus_sum[g] * q3n__zero_avx2(type));
    Q3N__UNROLL
    for (int s = 0; s < 8; s += 2) {
        const __m256i a = q3n__products_avx2(type, u[s], q3n__four_avx2(x, g, s));
        const __m256i b = q3n__products_avx2(type, u[s + 1], q3n__four_avx2(x, g, s + 1));
        if (type == Q3N_TYPE_Q6) {
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(a, b), one));
        } else {
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, one));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(b, one));
        }
    }
    return sum;
}

/* Rows [r, r + 16) of token t, as far as they are wanted. */
static void q3n__put_rows_avx2(const q3n__matmul *m, int r, int t, const __m256 acc[2])
{
    float *y = m->y + (size_t)t * (size_t)m->y_stride + r;
    for (int h = 0; h < 2 && r + 8 * h < m->row1; h++) {
        const int n = m->row1 - r - 8 * h;
        __m256 v = acc[h];
        if (m->bias) v = _mm256_add_ps(v, q3n__loadf_avx2(m->bias + r + 8 * h, n));
        q3n__storef_avx2(y + 8 * h, v, n);
    }
}

/* 16 rows and T tokens.  type is a constant in every use, T where it is 1.  A block of the tile:
 *
 *     w   scales f16[2][16], 64 bytes | codes of group 0 | codes of group 1       (64 columns)
 *
 * Half a group, 8 rows, is unpacked once for all tokens, which it meets in registers:
 *
 *     8 of weights, 1 of ones, the rest a token's: sum, product, scales
 *
 * The tile of the first tokens fetches ahead, the others find its weights in the cache. */
Q3N__INLINE void q3n__quant_tile_avx2(q3n_type type, int T, const q3n__matmul *m, int r, int t0)
{
    const size_t block_bytes = (size_t)q3n__types[type].block_bytes * Q3N__TILE_ROWS;
    const uint8_t *w = (const uint8_t *)m->w + (size_t)r * q3n__row_bytes(type, m->n_cols);
    const q3n__x8 *x[Q3N__TOKENS_QUANT_AVX2];
    __m256 acc[Q3N__TOKENS_QUANT_AVX2][2];
    for (int t = 0; t < T; t++) {
        x[t] = q3n__matmul_xq(m, t0 + t);
        acc[t][0] = acc[t][1] = _mm256_setzero_ps();
    }
    const int blocks = q3n__x8_blocks(m->n_cols);
    for (int b = 0; b < blocks; b++, w += block_bytes) {
        for (size_t i = 0; i < block_bytes && t0 == 0; i += 64)
            _mm_prefetch((const char *)w + Q3N__AHEAD_AVX2 + i, _MM_HINT_T0);
        for (int g = 0; g < 2; g++)
            for (int h = 0; h < 2; h++) {
                __m256i u[8];
                const uint8_t *codes = w + 64 + (size_t)g * q3n__group_bytes(type) + 32 * h;
                Q3N__UNROLL
                for (int s = 0; s < 8; s++) u[s] = q3n__unpack_avx2(type, codes, s);
                const __m256 scales = _mm256_cvtph_ps(
                    _mm_loadu_si128((const __m128i *)(const void *)(w + 32 * g + 16 * h)));
                for (int t = 0; t < T; t++) {
                    const __m256i sum = q3n__group_avx2(type, u, x[t] + b, g);
                    const __m256 scale = _mm256_mul_ps(scales, _mm256_set1_ps(x[t][b].scale[g]));
                    acc[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, acc[t][h]);
                }
            }
    }
    for (int t = 0; t < T; t++) q3n__put_rows_avx2(m, r, t0 + t, acc[t]);
}

Q3N__INLINE void q3n__matmul_quantised_avx2(q3n_type type, const q3n__matmul *m)
{
    for (int r = m->row0; r < m->row1; r += Q3N__TILE_ROWS)
        for (int t = 0, T; t < m->n; t += T) {
            /* two or three of q8 are faster one by one: it has little to unpack */
            const int left = m->n - t, apart = left == 1 || (type == Q3N_TYPE_Q8 && left < 4);
            T = apart ? 1 : q3n__tile_tokens(left, Q3N__TOKENS_QUANT_AVX2);
            if (apart) q3n__quant_tile_avx2(type, 1, m, r, t);
            else       q3n__quant_tile_avx2(type, T, m, r, t);
        }
}

#define Q3N__X(ID, id, number, block_len, block_bytes)                                  \
    static void q3n__matmul_##id##_avx2(const q3n__matmul *m)                           \
    {                                                                                   \
        q3n__matmul_quantised_avx2(Q3N_TYPE_##ID, m);                                   \
    }
Q3N_QUANT_TYPE_LIST(Q3N__X)
#undef Q3N__X

/* As q3n__quantize_x_group_scalar.  |x| are compared as integers: NaN is the largest.  Packing
 * works within halves of a vector; `order` puts the fours of bytes in their places. */
Q3N__INLINE void q3n__quantize_x_group_avx2(q3n__x8 *y, int g, const float *x, int n)
{
    const __m256i no_sign = _mm256_set1_epi32(0x7fffffff);
    __m256 v[4];
    __m256i max = _mm256_setzero_si256(), sum = max, q[4];
    Q3N__UNROLL
    for (int i = 0; i < 4; i++) {
        v[i] = q3n__loadf_avx2(x + 8 * i, n < 8 * i ? 0 : n - 8 * i);
        max = _mm256_max_epi32(max, _mm256_and_si256(_mm256_castps_si256(v[i]), no_sign));
    }
    __m128i top = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1));
    const float m = q3n__bits_f32((uint32_t)_mm_cvtsi128_si32(top));
    const int usable = m >= Q3N__X8_MIN && m <= FLT_MAX;
    const __m256 inverse = _mm256_set1_ps(usable ? 127.0f / m : 0.0f);
    Q3N__UNROLL
    for (int i = 0; i < 4; i++) {
        q[i] = usable ? _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse)) : _mm256_setzero_si256();
        sum = _mm256_add_epi32(sum, q[i]);
    }
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]),
                                             _mm256_packs_epi32(q[2], q[3]));
    _mm256_storeu_si256((__m256i *)(void *)(y->q + Q3N__GROUP * g),
                        _mm256_permutevar8x32_epi32(bytes, order));
    __m128i all = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    all = _mm_add_epi32(all, _mm_shuffle_epi32(all, 0x4e));
    all = _mm_add_epi32(all, _mm_shuffle_epi32(all, 0xb1));
    y->scale[g] = usable ? m / 127.0f : m < Q3N__X8_MIN ? 0.0f : NAN;
    y->minus_sum[g] = -_mm_cvtsi128_si32(all);
}

static void q3n__quantize_x_avx2(q3n__x8 *y, const float *x, int n)
{
    for (int i = 0; i < n; i += 2 * Q3N__GROUP, y++) {
        q3n__quantize_x_group_avx2(y, 0, x + i, n - i);
        if (n - i > Q3N__GROUP) q3n__quantize_x_group_avx2(y, 1, x + i + 32, n - i - 32);
        else                    q3n__quantize_x_group_scalar(y, 1, x, 0);
    }
}

/* store_kv is left to scalar. */
static void q3n__bind_avx2(q3n__kernels *k)
{
#define Q3N__X(ID, id, number, block_len, block_bytes)                                  \
    k->matmul[Q3N_TYPE_##ID] = q3n__matmul_##id##_avx2;                               \
    k->to_f32[Q3N_TYPE_##ID] = q3n__to_f32_##id##_avx2;                               \
    k->attend[Q3N_TYPE_##ID] = q3n__attend_##id##_avx2;
    Q3N_FLOAT_TYPE_LIST(Q3N__X)
#undef Q3N__X
#define Q3N__X(ID, id, number, block_len, block_bytes)                                  \
    k->matmul[Q3N_TYPE_##ID] = q3n__matmul_##id##_avx2;
    Q3N_QUANT_TYPE_LIST(Q3N__X)
#undef Q3N__X
    k->quantize_x  = q3n__quantize_x_avx2;
    k->attend[Q3N_TYPE_Q8] = q3n__attend_q8_avx2;
    k->delta       = q3n__delta_avx2;
    k->conv        = q3n__conv_avx2;
    k->dot         = q3n__dot_avx2;
    k->axpy        = q3n__axpy_avx2;
    k->rms_norm    = q3n__rms_norm_avx2;
    k->softmax     = q3n__softmax_avx2;
    k->silu_mul    = q3n__silu_mul_avx2;
    k->sigmoid_mul = q3n__sigmoid_mul_avx2;
    k->block_max     = q3n__block_max_avx2;
    k->block_weights = q3n__block_weights_avx2;
    k->block_sums    = q3n__block_sums_avx2;
}

Q3N__TARGET_END
#else
#  define q3n__bind_avx2 NULL
#endif

/* =====================================================================================
 * [34] KERNELS, AVX-512                                              >>kernels-avx512
 *
 * As the AVX2 section, with vectors of 16, masks for all widths and 32 registers: tiles are wider,
 * so a weight that was loaded serves 6 tokens and not 3.  Sums of float products go over 16 lanes
 * and differ from AVX2's in their last bits; the sampler's do not.
 * ===================================================================================== */
#if Q3N__X86 && !defined(Q3N_NO_AVX512)
Q3N__TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq")

/* ---- Loads, stores, sums.  n elements are real, n >= 16 = all; the rest reads as zero ---- */
/* The first n lanes, n 0 or more.  Masked lanes are neither read nor written. */
Q3N__INLINE __mmask16 q3n__mask_avx512(int n)
{
    return (__mmask16)(n >= 16 ? 0xffffu : (1u << n) - 1u);
}

Q3N__INLINE __m512 q3n__loadf_avx512(const float *p, int n)
{
    return n >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(q3n__mask_avx512(n), p);
}

Q3N__INLINE void q3n__storef_avx512(float *p, __m512 v, int n)
{
    if (n >= 16) _mm512_storeu_ps(p, v);
    else         _mm512_mask_storeu_ps(p, q3n__mask_avx512(n), v);
}

/* bf16 is the upper half of an f32. */
Q3N__INLINE __m512 q3n__bf16_avx512(__m256i h)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

Q3N__INLINE __m256i q3n__half_avx512(const void *row, size_t i)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)((const uint16_t *)row + i));
}

/* Elements [i, i + 16) of n rows of floats, or of bytes (q8).  n is a constant in every use, the
 * type need not be: the branch goes the same way each time, and beside the products of a tile of 4
 * rows or queries it takes 2 % (Cascade Lake). */
Q3N__INLINE void q3n__loads_avx512(q3n_type type, int n, const void *const *row, size_t i,
                                   __m512 *v)
{
    if (type == Q3N_TYPE_BF16) {
        Q3N__UNROLL
        for (int r = 0; r < n; r++) v[r] = q3n__bf16_avx512(q3n__half_avx512(row[r], i));
    } else if (type == Q3N_TYPE_F32) {
        Q3N__UNROLL
        for (int r = 0; r < n; r++) v[r] = _mm512_loadu_ps((const float *)row[r] + i);
    } else if (type == Q3N_TYPE_F16) {
        Q3N__UNROLL
        for (int r = 0; r < n; r++) v[r] = _mm512_cvtph_ps(q3n__half_avx512(row[r], i));
    } else {
        Q3N__UNROLL
        for (int r = 0; r < n; r++) {
            const int8_t *b = (const int8_t *)row[r] + i;
            const __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)b);
            v[r] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
        }
    }
}

/* The same of one row, as far as they are real. */
Q3N__INLINE __m512 q3n__load_avx512(q3n_type type, const void *row, size_t i, int n)
{
    const __mmask16 k = q3n__mask_avx512(n);
    if (type == Q3N_TYPE_F32) return _mm512_maskz_loadu_ps(k, (const float *)row + i);
    if (type == Q3N_TYPE_Q8) {
        const __m128i bytes = _mm_maskz_loadu_epi8(k, (const int8_t *)row + i);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    const __m256i h = _mm256_maskz_loadu_epi16(k, (const uint16_t *)row + i);
    return type == Q3N_TYPE_F16 ? _mm512_cvtph_ps(h) : q3n__bf16_avx512(h);
}

Q3N__INLINE __m256 q3n__halves_avx512(__m512 v)   /* lower half + upper half */
{
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

/* The sums of four vectors, of a in lane 0: upper on lower halves, then as AVX2. */
Q3N__INLINE __m128 q3n__sum4_avx512(__m512 a, __m512 b, __m512 c, __m512 d)
{
    const __m256 ab = _mm256_hadd_ps(q3n__halves_avx512(a), q3n__halves_avx512(b));
    const __m256 cd = _mm256_hadd_ps(q3n__halves_avx512(c), q3n__halves_avx512(d));
    const __m256 s  = _mm256_hadd_ps(ab, cd);
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

/* The sum of one: halves on halves, as q3n__block_sum_scalar ends. */
Q3N__INLINE float q3n__sum_avx512(__m512 v)
{
    const __m256 h = q3n__halves_avx512(v);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* ---- e^x as in q3n__exp_avx2; scalef gives denormals, zero and infinity ---- */

/* No roundscale: gcc 12 warns of its own macro at -O0 under -Wconversion. */
Q3N__INLINE __m512 q3n__exp_avx512(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(Q3N__EXP_MIN), _mm512_min_ps(_mm512_set1_ps(Q3N__EXP_MAX), x));
    const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(Q3N__LOG2_E));
    const __m512 n = _mm512_cvtepi32_ps(_mm512_cvtps_epi32(t));
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(Q3N__LN2_HI), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(Q3N__LN2_LO), r);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(Q3N__EXP_6), r, _mm512_set1_ps(Q3N__EXP_5));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(Q3N__EXP_4));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(Q3N__EXP_3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(Q3N__EXP_2));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
    return _mm512_scalef_ps(_mm512_add_ps(p, _mm512_set1_ps(1.0f)), n);
}

/* 1 + e^-x */
Q3N__INLINE __m512 q3n__exp1_avx512(__m512 x)
{
    const __m512 minus = _mm512_xor_ps(x, _mm512_set1_ps(-0.0f));
    return _mm512_add_ps(_mm512_set1_ps(1.0f), q3n__exp_avx512(minus));
}

/* ---- Matrix product: a tile of R rows x T tokens, one accumulator for each ---- */
#define Q3N__TOKENS_AVX512 6     /* 4 x 6 accumulators, 4 weights, 1 input: 29 of 32 registers */

/* y of token t, rows [r, r + 4) as far as they are wanted */
Q3N__INLINE void q3n__store_rows_avx512(const q3n__matmul *m, int r, int t, __m128 v)
{
    float *y = m->y + (size_t)t * (size_t)m->y_stride + r;
    const __mmask8 k = (__mmask8)(m->row1 - r >= 4 ? 15 : (1 << (m->row1 - r)) - 1);
    if (m->bias) v = _mm_add_ps(v, _mm_maskz_loadu_ps(k, m->bias + r));
    _mm_mask_storeu_ps(y, k, v);
}

/* s [T][R]: sums of rows and tokens that are there, R a multiple of 4. */
static void q3n__store_tile_avx512(const q3n__matmul *m, int r0, int t0, int R, int T,
                                   const __m512 *s)
{
    for (int t = t0; t < t0 + T && t < m->n; t++)
        for (int r = r0; r < r0 + R; r += 4, s += 4)
            if (r < m->row1)
                q3n__store_rows_avx512(m, r, t, q3n__sum4_avx512(s[0], s[1], s[2], s[3]));
}

/* Rows after the last are computed as copies of it and dropped: every output takes one path.  The
 * first tile of a row fetches the next R rows into L2, a line four times: the hardware's prefetch
 * stops at each row's end (bf16 from memory, rows of 2048: 26 GB/s where a plain loop reads 24 and
 * asking for each line twice gives 21, on a core of Zen 4; into L1 it gains less).  R and T are
 * constants in every use, so that s stays in registers. */
Q3N__INLINE void q3n__tile_avx512(q3n_type type, int R, int T, const q3n__matmul *m, int r0, int t0)
{
    __m512 s[Q3N__TOKENS_AVX512][8], v[8], sums[8 * Q3N__TOKENS_AVX512];
    q3n__operands p;
    q3n__operands_at(&p, type, m, r0, t0, Q3N__TOKENS_AVX512);
    Q3N__UNROLL
    for (int t = 0; t < T; t++)
        Q3N__UNROLL
        for (int r = 0; r < R; r++) s[t][r] = _mm512_setzero_ps();
    const int left = m->n_cols % 16;
    for (int pass = 0; pass < 1 + (left > 0); pass++) {
        const int n = pass ? 16 : m->n_cols - left;
        if (pass) q3n__operands_tail(&p, m->n_cols, left);
        for (int j = 0; j < n; j += 16) {
            if (p.ahead) {
                Q3N__UNROLL
                for (int r = 0; r < R; r++) {
                    const char *next = (const char *)p.w[r] + p.ahead + (size_t)j * p.size;
                    _mm_prefetch(next, _MM_HINT_T1);
                    _mm_prefetch(next + 64, _MM_HINT_T1);
                }
            }
            q3n__loads_avx512(type, R, p.w, (size_t)j, v);
            Q3N__UNROLL
            for (int t = 0; t < T; t++) {
                const __m512 x = _mm512_loadu_ps(p.x[t] + j);
                Q3N__UNROLL
                for (int r = 0; r < R; r++) s[t][r] = _mm512_fmadd_ps(v[r], x, s[t][r]);
            }
        }
    }
    Q3N__UNROLL
    for (int t = 0; t < T; t++)
        Q3N__UNROLL
        for (int r = 0; r < R; r++) sums[t * R + r] = s[t][r];
    q3n__store_tile_avx512(m, r0, t0, R, T, sums);
}

/* Four rows, tokens [t, t1): the weights come from L1 for all but the first tile. */
static void q3n__rows_avx512(q3n_type type, const q3n__matmul *m, int r, int t, int t1)
{
    while (t < t1) {
        const int T = q3n__tile_tokens(t1 - t, Q3N__TOKENS_AVX512);
        switch (T) {
        case 1:              /* as two, the second a copy that is not stored */
        case 2: q3n__tile_avx512(type, 4, 2, m, r, t); break;
        case 3: q3n__tile_avx512(type, 4, 3, m, r, t); break;
        case 4: q3n__tile_avx512(type, 4, 4, m, r, t); break;
        case 5: q3n__tile_avx512(type, 4, 5, m, r, t); break;
        case 6: q3n__tile_avx512(type, 4, 6, m, r, t); break;
        }
        t += T;
    }
}

/* One token: 8 rows at once.  More: blocks of tokens over all rows, as in AVX2. */
static void q3n__matmul_avx512(q3n_type type, const q3n__matmul *m)
{
    if (m->n == 1) {
        for (int r = m->row0; r < m->row1; r += 8) q3n__tile_avx512(type, 8, 1, m, r, 0);
        return;
    }
    const int block = q3n__block_tokens(m->n_cols, Q3N__TOKENS_AVX512);
    for (int t = 0; t < m->n; t += block) {
        const int t1 = m->n - t > block ? t + block : m->n;
        for (int r = m->row0; r < m->row1; r += 4) q3n__rows_avx512(type, m, r, t, t1);
    }
}

/* ---- Attention: both products are out += x M with the vectors along M's rows ---- */

/* Columns [c, c + 64) of T rows of out, as in AVX2: four lines of m, 4 T sums.  T is a constant in
 * every use. */
Q3N__INLINE void q3n__mix_tile_avx512(q3n_type type, int T, const q3n__mix *p, int c)
{
    const size_t size = q3n__kv_element(type);
    const void *m[4];
    const float *x[4];
    float *out[4];
    __m512 s[4][4], v[4];
    Q3N__UNROLL
    for (int i = 0; i < 4; i++) m[i] = (const uint8_t *)p->m + (size_t)(c + 16 * i) * size;
    Q3N__UNROLL
    for (int t = 0; t < T; t++) {
        x[t] = p->x + (size_t)t * p->x_stride;
        out[t] = p->out + (size_t)t * p->out_stride + c;
        Q3N__UNROLL
        for (int i = 0; i < 4; i++)
            s[t][i] = p->step0 == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(out[t] + 16 * i);
    }
    for (int j = p->step0; j < p->step1; j++) {
        const size_t at = (size_t)j * p->m_stride;
        Q3N__UNROLL
        for (int i = 0; i < 4; i++)
            _mm_prefetch((const char *)m[i] + (at + Q3N__MIX_AHEAD * p->m_stride) * size,
                         _MM_HINT_T1);
        q3n__loads_avx512(type, 4, m, at, v);
        Q3N__UNROLL
        for (int t = 0; t < T; t++) {
            const __m512 xt = _mm512_set1_ps(x[t][j]);
            Q3N__UNROLL
            for (int i = 0; i < 4; i++) s[t][i] = _mm512_fmadd_ps(v[i], xt, s[t][i]);
        }
    }
    Q3N__UNROLL
    for (int t = 0; t < T; t++)
        Q3N__UNROLL
        for (int i = 0; i < 4; i++) _mm512_storeu_ps(out[t] + 16 * i, s[t][i]);
}

/* The columns that are left, from c on: few heads have any. */
static void q3n__mix_rest_avx512(const q3n__mix *p, int c)
{
    for (; c < p->width; c += 16)
        for (int t = 0; t < p->n; t++) {
            float *out = p->out + (size_t)t * p->out_stride + c;
            const float *x = p->x + (size_t)t * p->x_stride;
            const int n = p->width - c;
            __m512 s = p->step0 == 0 ? _mm512_setzero_ps() : q3n__loadf_avx512(out, n);
            for (int j = p->step0; j < p->step1; j++) {
                const size_t at = (size_t)j * p->m_stride + (size_t)c;
                const __m512 m = q3n__load_avx512(p->type, p->m, at, n);
                s = _mm512_fmadd_ps(m, _mm512_set1_ps(x[j]), s);
            }
            q3n__storef_avx512(out, s, n);
        }
}

/* Tiles from column c on; returns where they end. */
Q3N__INLINE int q3n__mix_tiles_avx512(q3n_type type, int T, const q3n__mix *p)
{
    int c = 0;
    for (; c + 64 <= p->width; c += 64) q3n__mix_tile_avx512(type, T, p, c);
    return c;
}

/* Of one or two rows each type has its own body: the branch takes 5 to 40 % (Cascade Lake). */
Q3N__INLINE int q3n__mix_typed_avx512(int T, const q3n__mix *p)
{
    if (p->type == Q3N_TYPE_F32) return q3n__mix_tiles_avx512(Q3N_TYPE_F32, T, p);
    if (p->type == Q3N_TYPE_F16) return q3n__mix_tiles_avx512(Q3N_TYPE_F16, T, p);
    if (p->type == Q3N_TYPE_Q8)  return q3n__mix_tiles_avx512(Q3N_TYPE_Q8, T, p);
    return q3n__mix_tiles_avx512(Q3N_TYPE_BF16, T, p);
}

static void q3n__mix_avx512(const q3n__mix *p)
{
    const int c = p->n == 1 ? q3n__mix_typed_avx512(1, p)
                : p->n == 2 ? q3n__mix_typed_avx512(2, p) : q3n__mix_tiles_avx512(p->type, 4, p);
    q3n__mix_rest_avx512(p, c);
}

/* max(-FLT_MAX, x_0, ...); the second operand, m, stays where x is NaN. */
static float q3n__max_avx512(const float *x, int n)
{
    const __m512 min = _mm512_set1_ps(-FLT_MAX);
    __m512 m = min;
    int i = 0;
    for (; i + 16 <= n; i += 16) m = _mm512_max_ps(_mm512_loadu_ps(x + i), m);
    if (i < n) {
        const __mmask16 k = q3n__mask_avx512(n - i);
        m = _mm512_max_ps(_mm512_mask_loadu_ps(min, k, x + i), m);
    }
    return _mm512_reduce_max_ps(m);
}

/* x_i = e^(x_i - m); returns their sum */
static float q3n__exp_sum_avx512(float *x, int n, float m)
{
    const __m512 vm = _mm512_set1_ps(m);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        const __mmask16 k = q3n__mask_avx512(n - i);
        const __m512 e = q3n__exp_avx512(_mm512_sub_ps(_mm512_maskz_loadu_ps(k, x + i), vm));
        _mm512_mask_storeu_ps(x + i, k, e);
        sum = _mm512_mask_add_ps(sum, k, sum, e);
    }
    return q3n__sum_avx512(sum);
}

static void q3n__attend_scale_avx512(float *s, const float *scale, int n)
{
    for (int j = 0; j < n; j += 16)
        q3n__storef_avx512(s + j, _mm512_mul_ps(q3n__loadf_avx512(s + j, n - j),
                                                q3n__loadf_avx512(scale + j, n - j)), n - j);
}

static const q3n__attend_parts q3n__attend_avx512 = {
    q3n__mix_avx512, q3n__max_avx512, q3n__exp_sum_avx512, q3n__attend_scale_avx512, 64
};

/* ---- One instance for each float type ---- */
static void q3n__to_f32_avx512(q3n_type type, float *y, const void *x, int n)
{
    for (int i = 0; i < n; i += 16)
        q3n__storef_avx512(y + i, q3n__load_avx512(type, x, (size_t)i, n - i), n - i);
}

Q3N__DEFINE_FLOAT_TYPES(avx512)

/* ---- DeltaNet: a block of V vectors of the state's columns for all tokens ---- */
typedef struct {
    const float *from;           /* the block's first column where the token reads the state ... */
    float       *to;             /* ... and where it writes it                                   */
    size_t       from_stride, to_stride;
    float        decay;
    int          dk, n;          /* n columns are real if V is 1                                 */
    __m512       d[8], o[8], read[8];
} q3n__delta_cols_avx512;

/* read = S' k */
Q3N__INLINE void q3n__delta_read_avx512(int V, q3n__delta_cols_avx512 *p, const float *k)
{
    Q3N__UNROLL
    for (int v = 0; v < V; v++) p->read[v] = _mm512_setzero_ps();
    for (int i = 0; i < p->dk; i++) {
        const float *S = p->from + (size_t)i * p->from_stride;
        const __m512 ki = _mm512_set1_ps(k[i]);
        Q3N__UNROLL
        for (int v = 0; v < V; v++)
            p->read[v] = _mm512_fmadd_ps(q3n__loadf_avx512(S + 16 * v, p->n), ki, p->read[v]);
    }
}

/* S <- decay S + k d' and, while S is at hand, o = S' q and read = S' next.  Constants: whether the
 * new S is kept; q and next are NULL if nobody needs what they read. */
Q3N__INLINE void q3n__delta_step_avx512(int V, q3n__delta_cols_avx512 *p, int keeps,
                                        const float *q, const float *k, const float *next)
{
    const __m512 keep = _mm512_set1_ps(p->decay);
    Q3N__UNROLL
    for (int v = 0; v < V; v++) p->o[v] = p->read[v] = _mm512_setzero_ps();
    for (int i = 0; i < p->dk; i++) {
        const float *from = p->from + (size_t)i * p->from_stride;
        const __m512 ki = _mm512_set1_ps(k[i]);
        const __m512 qi = q ? _mm512_set1_ps(q[i]) : ki, ni = next ? _mm512_set1_ps(next[i]) : ki;
        Q3N__UNROLL
        for (int v = 0; v < V; v++) {
            __m512 s = q3n__loadf_avx512(from + 16 * v, p->n);
            s = _mm512_fmadd_ps(keep, s, _mm512_mul_ps(ki, p->d[v]));
            if (keeps) q3n__storef_avx512(p->to + (size_t)i * p->to_stride + 16 * v, s, p->n);
            if (q)     p->o[v] = _mm512_fmadd_ps(s, qi, p->o[v]);
            if (next)  p->read[v] = _mm512_fmadd_ps(s, ni, p->read[v]);
        }
    }
}

/* Columns [j, j + 16 V) for all tokens; see the equations in AVX2. */
Q3N__INLINE void q3n__delta_block_avx512(int V, const q3n__delta *h, int j, int n)
{
    q3n__delta_cols_avx512 p;
    p.from = h->S + j;
    p.from_stride = (size_t)h->dv;
    p.dk = h->dk;
    p.n = n;
    q3n__delta_read_avx512(V, &p, h->k);
    for (int t = 0; t < h->n; t++) {
        const float *q = h->q + (size_t)t * (size_t)h->qk_stride;
        const float *k = h->k + (size_t)t * (size_t)h->qk_stride;
        const float *values = h->v + (size_t)t * (size_t)h->v_stride + j;
        p.decay = expf(h->g[(size_t)t * (size_t)h->gb_stride]);
        const __m512 beta = _mm512_set1_ps(h->beta[(size_t)t * (size_t)h->gb_stride]);
        Q3N__UNROLL
        for (int v = 0; v < V; v++) {
            const __m512 x = q3n__loadf_avx512(values + 16 * v, n);
            p.d[v] = _mm512_mul_ps(beta, _mm512_fnmadd_ps(_mm512_set1_ps(p.decay), p.read[v], x));
        }
        const int has_output = q3n__delta_has_output(h, t);
        p.to = q3n__delta_after(h, t, j);
        p.to_stride = q3n__delta_stride(h, t);
        if (t + 1 < h->n && has_output) q3n__delta_step_avx512(V, &p, 1, q, k, k + h->qk_stride);
        else if (t + 1 < h->n)      q3n__delta_step_avx512(V, &p, 1, NULL, k, k + h->qk_stride);
        else if (p.to)              q3n__delta_step_avx512(V, &p, 1, q, k, NULL);
        else if (has_output)            q3n__delta_step_avx512(V, &p, 0, q, k, NULL);
        p.from = p.to;
        p.from_stride = p.to_stride;
        if (!has_output) continue;
        float *o = h->o + (size_t)t * (size_t)h->o_stride + j;
        Q3N__UNROLL
        for (int v = 0; v < V; v++) q3n__storef_avx512(o + 16 * v, p.o[v], n);
    }
}

/* Whole lines of the state, four at a time: eight are no faster (Cascade Lake). */
static void q3n__delta_avx512(const q3n__delta *h)
{
    if (h->n < 1) return;
    int j = h->col0;
    for (; j + 64 <= h->col1; j += 64) q3n__delta_block_avx512(4, h, j, 16);
    for (; j + 32 <= h->col1; j += 32) q3n__delta_block_avx512(2, h, j, 16);
    for (; j < h->col1; j += 16) q3n__delta_block_avx512(1, h, j, h->col1 - j);
}

/* ---- Convolution: lanes are channels ---- */
static void q3n__conv_avx512(const q3n__conv *c)
{
    const float *u[16];                                /* width <= 16 (Q3N_CONFIG_LIST) */
    for (int t = 0; t < c->n; t++) {
        float *y = c->y + (size_t)t * (size_t)c->y_stride;
        for (int j = 0; j < c->width; j++) u[j] = q3n__conv_input(c, t + j);
        for (int ch = c->c0; ch < c->c1; ch += 16) {
            const int n = c->c1 - ch;
            __m512 s = _mm512_setzero_ps();
            for (int j = 0; j < c->width; j++) {
                const float *w = c->w + (size_t)j * (size_t)c->n_channels + ch;
                s = _mm512_fmadd_ps(q3n__loadf_avx512(w, n), q3n__loadf_avx512(u[j] + ch, n), s);
            }
            q3n__storef_avx512(y + ch, _mm512_div_ps(s, q3n__exp1_avx512(s)), n);
        }
    }
    q3n__conv_shift(c);
}

/* ---- Vectors ---- */
/* Four sums of vectors, as in AVX2: so that four multiply-adds are under way. */
static float q3n__dot_avx512(const float *a, const float *b, int n)
{
    __m512 s[4];
    Q3N__UNROLL
    for (int v = 0; v < 4; v++) s[v] = _mm512_setzero_ps();
    int i = 0;
    for (; i + 64 <= n; i += 64)
        Q3N__UNROLL
        for (int v = 0; v < 4; v++)
            s[v] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16 * v), _mm512_loadu_ps(b + i + 16 * v),
                                   s[v]);
    for (; i < n; i += 16)
        s[0] = _mm512_fmadd_ps(q3n__loadf_avx512(a + i, n - i), q3n__loadf_avx512(b + i, n - i),
                               s[0]);
    return q3n__sum_avx512(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
}

static void q3n__axpy_avx512(float *y, float a, const float *x, int n)
{
    const __m512 va = _mm512_set1_ps(a);
    for (int i = 0; i < n; i += 16) {
        const __m512 vy = q3n__loadf_avx512(y + i, n - i);
        q3n__storef_avx512(y + i, _mm512_fmadd_ps(va, q3n__loadf_avx512(x + i, n - i), vy), n - i);
    }
}

/* y may be x. */
static void q3n__rms_norm_avx512(float *y, const float *x, const float *w, int n, float eps)
{
    const float mean = q3n__dot_avx512(x, x, n) / (float)n;
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(mean + eps));
    for (int i = 0; i < n; i += 16) {
        const __m512 v = _mm512_mul_ps(q3n__loadf_avx512(x + i, n - i), scale);
        q3n__storef_avx512(y + i, _mm512_mul_ps(v, q3n__loadf_avx512(w + i, n - i)), n - i);
    }
}

static void q3n__softmax_avx512(float *x, int n)
{
    const __m512 l = _mm512_set1_ps(q3n__exp_sum_avx512(x, n, q3n__max_avx512(x, n)));
    for (int i = 0; i < n; i += 16)
        q3n__storef_avx512(x + i, _mm512_div_ps(q3n__loadf_avx512(x + i, n - i), l), n - i);
}

static void q3n__silu_mul_avx512(float *y, const float *gate, int n)
{
    for (int i = 0; i < n; i += 16) {
        const __m512 g = q3n__loadf_avx512(gate + i, n - i), v = q3n__loadf_avx512(y + i, n - i);
        const __m512 s = _mm512_div_ps(g, q3n__exp1_avx512(g));
        q3n__storef_avx512(y + i, _mm512_mul_ps(v, s), n - i);
    }
}

/* ---- Sampling: as in AVX2 ---- */

static void q3n__block_max_avx512(float *max, const float *x, int n_blocks)
{
    for (int b = 0; b < n_blocks; b++, x += Q3N__SAMPLER_BLOCK) {
        __m512 m = _mm512_set1_ps(-Q3N__INFINITY);
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i += 16)
            m = _mm512_max_ps(_mm512_loadu_ps(x + i), m);
        const float largest = _mm512_reduce_max_ps(m);
        max[b] = largest < FLT_MAX ? largest : FLT_MAX;
    }
}

/* q3n__sampler_weight, unfused; the mask leaves 0 below WEIGHT_MIN and of NaN. */
Q3N__INLINE __m512 q3n__weight_avx512(__m512 x, __m512 max, __m512 scale)
{
    const __m512 round = _mm512_set1_ps(Q3N__ROUND);
    __m512 t = _mm512_mul_ps(_mm512_sub_ps(x, max), scale);
    const __mmask16 counts = _mm512_cmp_ps_mask(t, _mm512_set1_ps(Q3N__WEIGHT_MIN), _CMP_GE_OQ);
    t = _mm512_min_ps(t, _mm512_setzero_ps());
    const __m512 z = _mm512_add_ps(t, round), f = _mm512_sub_ps(t, _mm512_sub_ps(z, round));
    __m512 p = _mm512_mul_ps(_mm512_set1_ps(Q3N__EXP2_5), f);
    p = _mm512_mul_ps(_mm512_add_ps(p, _mm512_set1_ps(Q3N__EXP2_4)), f);
    p = _mm512_mul_ps(_mm512_add_ps(p, _mm512_set1_ps(Q3N__EXP2_3)), f);
    p = _mm512_mul_ps(_mm512_add_ps(p, _mm512_set1_ps(Q3N__EXP2_2)), f);
    p = _mm512_mul_ps(_mm512_add_ps(p, _mm512_set1_ps(Q3N__EXP2_1)), f);
    p = _mm512_add_ps(p, _mm512_set1_ps(1.0f));
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(z), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(counts, _mm512_castps_si512(p), n));
}

/* One vector is the 16 running sums. */
static void q3n__block_weights_avx512(float *y, float *sum, const float *x, int n_blocks,
                                      float max, float scale)
{
    const __m512 m = _mm512_set1_ps(max), c = _mm512_set1_ps(scale);
    for (int b = 0; b < n_blocks; b++, x += Q3N__SAMPLER_BLOCK, y += Q3N__SAMPLER_BLOCK) {
        __m512 s = _mm512_setzero_ps();
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i += 16) {
            const __m512 w = q3n__weight_avx512(_mm512_loadu_ps(x + i), m, c);
            _mm512_storeu_ps(y + i, w);
            s = _mm512_add_ps(s, w);
        }
        sum[b] = q3n__sum_avx512(s);
    }
}

static void q3n__block_sums_avx512(float *sum, int32_t *count, const float *y, int n_blocks,
                                   float floor)
{
    const __m512 min = _mm512_set1_ps(floor);
    for (int b = 0; b < n_blocks; b++, y += Q3N__SAMPLER_BLOCK) {
        __m512 s = _mm512_setzero_ps();
        __m512i n = _mm512_setzero_si512();
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i += 16) {
            const __m512 w = _mm512_loadu_ps(y + i);
            const __mmask16 counts = _mm512_cmp_ps_mask(w, min, _CMP_GE_OQ);
            s = _mm512_add_ps(s, _mm512_maskz_mov_ps(counts, w));
            n = _mm512_mask_add_epi32(n, counts, n, _mm512_set1_epi32(1));
        }
        sum[b] = q3n__sum_avx512(s);
        count[b] = _mm512_reduce_add_epi32(n);
    }
}

static void q3n__sigmoid_mul_avx512(float *y, const float *gate, int n)
{
    for (int i = 0; i < n; i += 16) {
        const __m512 g = q3n__loadf_avx512(gate + i, n - i), v = q3n__loadf_avx512(y + i, n - i);
        const __m512 s = _mm512_div_ps(_mm512_set1_ps(1.0f), q3n__exp1_avx512(g));
        q3n__storef_avx512(y + i, _mm512_mul_ps(v, s), n - i);
    }
}

/* Quantised matrices and activations are AVX2's where the CPU has no VNNI. */
static void q3n__bind_avx512(q3n__kernels *k)
{
#define Q3N__X(ID, id, number, block_len, block_bytes)                                  \
    k->matmul[Q3N_TYPE_##ID] = q3n__matmul_##id##_avx512;                               \
    k->to_f32[Q3N_TYPE_##ID] = q3n__to_f32_##id##_avx512;                               \
    k->attend[Q3N_TYPE_##ID] = q3n__attend_##id##_avx512;
    Q3N_FLOAT_TYPE_LIST(Q3N__X)
#undef Q3N__X
    k->attend[Q3N_TYPE_Q8] = q3n__attend_q8_avx512;
    k->delta       = q3n__delta_avx512;
    k->conv        = q3n__conv_avx512;
    k->dot         = q3n__dot_avx512;
    k->axpy        = q3n__axpy_avx512;
    k->rms_norm    = q3n__rms_norm_avx512;
    k->softmax     = q3n__softmax_avx512;
    k->silu_mul    = q3n__silu_mul_avx512;
    k->sigmoid_mul = q3n__sigmoid_mul_avx512;
    k->block_max     = q3n__block_max_avx512;
    k->block_weights = q3n__block_weights_avx512;
    k->block_sums    = q3n__block_sums_avx512;
}

Q3N__TARGET_END
#else
#  define q3n__bind_avx512 NULL
#endif

/* =====================================================================================
 * [35] KERNELS, AVX-512 VNNI                                     >>kernels-avx512vnni
 *
 * Quantised matrices.  A vector of weights is 4 columns of 16 rows, so 16 lanes are 16 rows: four
 * activations are broadcast, multiplied and added to the lanes' 32-bit sums by one instruction
 * (vpdpbusd: unsigned x signed bytes), and 8 of them make a group.  Its exact integer is then
 * scaled and added in f32, group after group: that order is the same whatever else is computed
 * beside, so tiles may be cut at will.
 * ===================================================================================== */
#if Q3N__X86 && !defined(Q3N_NO_AVX512)
Q3N__TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

/* Levels + 128: bytes without sign. */
static const uint8_t q3n__q4_bytes_avx512vnni[16] = {
#define Q3N__X(level) (uint8_t)((level) + 128),
    Q3N__Q4_LEVEL_LIST(Q3N__X)
};
static const uint8_t q3n__q3_bytes_avx512vnni[16] = {
    Q3N__Q3_LEVEL_LIST(Q3N__X)
#undef Q3N__X
};

/* log2 of what unpacking adds to the levels. */
Q3N__INLINE int q3n__zero_bits_avx512vnni(q3n_type type) { return type == Q3N_TYPE_Q6 ? 5 : 7; }

Q3N__INLINE __m512i q3n__line_avx512vnni(const uint8_t *p)
{
    return _mm512_loadu_si512((const void *)p);
}

/* A table of 16 bytes in each quarter: vpshufb looks up within quarters. */
Q3N__INLINE __m512i q3n__table_avx512vnni(const uint8_t *bytes)
{
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)bytes));
}

/* Bits [shift, shift + bits) of every byte, for 0 <= shift; mask has them at the bottom. */
Q3N__INLINE __m512i q3n__field_avx512vnni(__m512i v, int shift, __m512i mask)
{
    return _mm512_and_si512(shift ? _mm512_srli_epi16(v, (uint8_t)shift) : v, mask);
}

/* The 8 vectors of a group: level + zero of columns 4 s .. 4 s + 3, byte 4 r + j for row r, column
 * j.
 *
 *     q8  line s                       q4  line s mod 4, the lower half of a byte for s < 4
 *     q6  as q4, and two bits from line 4 + s / 4
 *     q3  two bits from line s / 4, one from line 2
 *
 * q8 and q6 are levels with their zero point as they are; q4 and q3 are looked up.  Shifts are of
 * 16 bits, as there are none of 8: what comes over from the neighbour byte is masked off. */
Q3N__INLINE void q3n__unpack_avx512vnni(q3n_type type, const uint8_t *p, __m512i u[8])
{
    const __m512i low4 = _mm512_set1_epi8(15), low2 = _mm512_set1_epi8(3);
    if (type == Q3N_TYPE_Q8) {
        Q3N__UNROLL
        for (int s = 0; s < 8; s++) u[s] = q3n__line_avx512vnni(p + 64 * s);
    }
    if (type == Q3N_TYPE_Q4 || type == Q3N_TYPE_Q6) {
        Q3N__UNROLL
        for (int s = 0; s < 4; s++) {
            const __m512i v = q3n__line_avx512vnni(p + 64 * s);
            u[s]     = q3n__field_avx512vnni(v, 0, low4);
            u[s + 4] = q3n__field_avx512vnni(v, 4, low4);
        }
    }
    if (type == Q3N_TYPE_Q6) {
        const __m512i high = _mm512_set1_epi8(0x30);
        Q3N__UNROLL
        for (int h = 0; h < 2; h++) {
            const __m512i v = q3n__line_avx512vnni(p + 256 + 64 * h);
            u[4 * h + 0] = _mm512_or_si512(u[4 * h + 0],
                                           _mm512_and_si512(_mm512_slli_epi16(v, 4), high));
            u[4 * h + 1] = _mm512_or_si512(u[4 * h + 1],
                                           _mm512_and_si512(_mm512_slli_epi16(v, 2), high));
            u[4 * h + 2] = _mm512_or_si512(u[4 * h + 2], _mm512_and_si512(v, high));
            u[4 * h + 3] = _mm512_or_si512(u[4 * h + 3],
                                           _mm512_and_si512(_mm512_srli_epi16(v, 2), high));
        }
    }
    if (type == Q3N_TYPE_Q4) {
        const __m512i levels = q3n__table_avx512vnni(q3n__q4_bytes_avx512vnni);
        Q3N__UNROLL
        for (int s = 0; s < 8; s++) u[s] = _mm512_shuffle_epi8(levels, u[s]);
    }
    if (type == Q3N_TYPE_Q3) {
        const __m512i levels = q3n__table_avx512vnni(q3n__q3_bytes_avx512vnni);
        const __m512i top = q3n__line_avx512vnni(p + 128), four = _mm512_set1_epi8(4);
        Q3N__UNROLL
        for (int s = 0; s < 8; s++) {
            const __m512i v = q3n__line_avx512vnni(p + 64 * (s / 4));
            const __m512i t = s < 2 ? _mm512_slli_epi16(top, (uint8_t)(2 - s))
                                    : _mm512_srli_epi16(top, (uint8_t)(s - 2));
            u[s] = _mm512_or_si512(q3n__field_avx512vnni(v, 2 * (s % 4), low2),
                                   _mm512_and_si512(t, four));
            u[s] = _mm512_shuffle_epi8(levels, u[s]);
        }
    }
}

/* Scales of the 16 rows for group g: a vector, as lanes are rows. */
Q3N__INLINE __m512 q3n__scales_avx512vnni(const uint8_t *block, int g)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(block + 32 * g)));
}

/* Activations of columns 4 s .. 4 s + 3, in all lanes. */
Q3N__INLINE __m512i q3n__four_avx512vnni(const q3n__x8 *x, int g, int s)
{
    int32_t four;
    memcpy(&four, x->q + Q3N__GROUP * g + 4 * s, sizeof four);
    return _mm512_set1_epi32(four);
}

/* -zero sum q: the zero point of unpacked levels, 32 or 128, is taken off before adding begins. */
Q3N__INLINE __m512i q3n__start_avx512vnni(q3n_type type, const q3n__x8 *x, int g)
{
    return _mm512_slli_epi32(_mm512_set1_epi32(x->minus_sum[g]),
                             (unsigned)q3n__zero_bits_avx512vnni(type));
}

/* acc + sum (scale of rows x scale of x): the one rounding step of a group, as in every ISA. */
Q3N__INLINE __m512 q3n__scale_add_avx512vnni(__m512i sum, __m512 scales, const q3n__x8 *x, int g,
                                             __m512 acc)
{
    const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x->scale[g]));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc);
}

/* ---- Tiles: 32 rows and some tokens; the weights of a group are unpacked once for them ----
 *
 * Two of the file's tiles of 16 rows, so that four activations that were broadcast serve two
 * products:
 *
 *     rows r .. r + 15         u[0 .. 7]    x four --> even, odd    acc[t][0]
 *     rows r + 16 .. r + 31    u[8 .. 15]   x four --> even, odd    acc[t][1]
 *
 * A token's 16 vpdpbusd find their weights in registers; accumulators live in the first-level cache
 * so that one body serves any number of tokens, and adding to them is one load and one store of
 * about 40 instructions.  What limits it is how many instructions wait for a sum (5 cycles each):
 * even and odd steps have sums of their own.  Against one tile of two groups with one sum each
 * (Cascade Lake, q4, weights in the second level): 1.26 times as fast with 2 tokens, 1.33 with 4,
 * 1.37 with 48; one token takes 1.1 times as long there, but 0.93 from memory, where two tiles are
 * two streams. */
#define Q3N__TOKENS_AVX512VNNI 16
#define Q3N__ROWS_AVX512VNNI   (2 * Q3N__TILE_ROWS)

/* Bytes between what is being read and what is fetched: the hardware's prefetch ends at pages.  The
 * longer blocks of q8 and q6 go to the second level: with q8 22 instead of 20.5 GB/s on a core of
 * Zen 4 that reads 23; q4 goes to the first, 21.7 instead of 20.7. */
#define Q3N__AHEAD_AVX512VNNI 4096

/* A block of both tiles: the second begins `second` bytes after the first. */
Q3N__INLINE void q3n__fetch_avx512vnni(const uint8_t *w, size_t second, size_t block_bytes)
{
    for (size_t i = 0; i < block_bytes; i += 64) {
        const char *ahead = (const char *)w + Q3N__AHEAD_AVX512VNNI + i;
        if (block_bytes > 576) {                                        /* q6 and q8 */
            _mm_prefetch(ahead, _MM_HINT_T1);
            _mm_prefetch(ahead + second, _MM_HINT_T1);
        } else {
            _mm_prefetch(ahead, _MM_HINT_T0);
            _mm_prefetch(ahead + second, _MM_HINT_T0);
        }
    }
}

typedef struct {
    const q3n__x8 *x[Q3N__TOKENS_AVX512VNNI];
    __m512         acc[Q3N__TOKENS_AVX512VNNI][2];       /* of both tiles' rows                  */
    size_t         second;
    int            n;                                    /* tokens                               */
} q3n__tile_args_avx512vnni;

/* acc += group g of block b, whose scales begin at w.  Sums are exact, so even and odd steps may be
 * added apart; each element's groups are added in rising order. */
Q3N__INLINE void q3n__group_avx512vnni(q3n_type type, q3n__tile_args_avx512vnni *p,
                                       const uint8_t *w, int b, int g)
{
    __m512i u[16];
    const uint8_t *codes = w + 64 + (size_t)g * q3n__group_bytes(type);
    q3n__unpack_avx512vnni(type, codes, u);
    q3n__unpack_avx512vnni(type, codes + p->second, u + 8);
    const __m512 scales0 = q3n__scales_avx512vnni(w, g);
    const __m512 scales1 = q3n__scales_avx512vnni(w + p->second, g);
    for (int t = 0; t < p->n; t++) {
        const q3n__x8 *x = p->x[t] + b;
        __m512i even0 = q3n__start_avx512vnni(type, x, g), odd0 = _mm512_setzero_si512();
        __m512i even1 = even0, odd1 = odd0;
        Q3N__UNROLL
        for (int s = 0; s < 8; s += 2) {
            const __m512i a = q3n__four_avx512vnni(x, g, s), c = q3n__four_avx512vnni(x, g, s + 1);
            even0 = _mm512_dpbusd_epi32(even0, u[s], a);
            even1 = _mm512_dpbusd_epi32(even1, u[8 + s], a);
            odd0 = _mm512_dpbusd_epi32(odd0, u[s + 1], c);
            odd1 = _mm512_dpbusd_epi32(odd1, u[9 + s], c);
        }
        even0 = _mm512_add_epi32(even0, odd0);
        even1 = _mm512_add_epi32(even1, odd1);
        p->acc[t][0] = q3n__scale_add_avx512vnni(even0, scales0, x, g, p->acc[t][0]);
        p->acc[t][1] = q3n__scale_add_avx512vnni(even1, scales1, x, g, p->acc[t][1]);
    }
}

/* Rows [r, r + 32) of token t, as far as they are wanted. */
static void q3n__put_avx512vnni(const q3n__matmul *m, int r, int t, const __m512 acc[2])
{
    float *y = m->y + (size_t)t * (size_t)m->y_stride + r;
    for (int i = 0; i < 2 && r + 16 * i < m->row1; i++) {
        const __mmask16 k = q3n__mask_avx512(m->row1 - r - 16 * i);
        __m512 v = acc[i];
        if (m->bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(k, m->bias + r + 16 * i));
        _mm512_mask_storeu_ps(y + 16 * i, k, v);
    }
}

/* type is a constant in every use.  Without a second tile the first takes its place, and what it
 * gives is not stored.  The tile of the first tokens fetches ahead. */
Q3N__INLINE void q3n__tile_avx512vnni(q3n_type type, int T, const q3n__matmul *m, int r, int t0)
{
    const size_t block_bytes = (size_t)q3n__types[type].block_bytes * Q3N__TILE_ROWS;
    const size_t row_bytes = q3n__row_bytes(type, m->n_cols);
    const uint8_t *w = (const uint8_t *)m->w + (size_t)r * row_bytes;
    q3n__tile_args_avx512vnni p;
    p.n = T;
    p.second = r + Q3N__TILE_ROWS < m->row1 ? Q3N__TILE_ROWS * row_bytes : 0;
    for (int t = 0; t < T; t++) {
        p.x[t] = q3n__matmul_xq(m, t0 + t);
        p.acc[t][0] = p.acc[t][1] = _mm512_setzero_ps();
    }
    const int blocks = q3n__x8_blocks(m->n_cols);
    for (int b = 0; b < blocks; b++, w += block_bytes) {
        if (t0 == 0) q3n__fetch_avx512vnni(w, p.second, block_bytes);
        q3n__group_avx512vnni(type, &p, w, b, 0);
        q3n__group_avx512vnni(type, &p, w, b, 1);
    }
    for (int t = 0; t < T; t++) q3n__put_avx512vnni(m, r, t0 + t, p.acc[t]);
}

Q3N__INLINE void q3n__matmul_quantised_avx512vnni(q3n_type type, const q3n__matmul *m)
{
    for (int r = m->row0; r < m->row1; r += Q3N__ROWS_AVX512VNNI)
        for (int t = 0, T; t < m->n; t += T) {
            T = q3n__tile_tokens(m->n - t, Q3N__TOKENS_AVX512VNNI);
            q3n__tile_avx512vnni(type, T, m, r, t);
        }
}

#define Q3N__X(ID, id, number, block_len, block_bytes)                                  \
    static void q3n__matmul_##id##_avx512vnni(const q3n__matmul *m)                     \
    {                                                                                   \
        q3n__matmul_quantised_avx512vnni(Q3N_TYPE_##ID, m);                             \
    }
Q3N_QUANT_TYPE_LIST(Q3N__X)
#undef Q3N__X

/* ---- Activations ---- */
Q3N__INLINE void q3n__quantize_x_group_avx512vnni(q3n__x8 *y, int g, const float *x, int n)
{
    const __m512 a = q3n__loadf_avx512(x, n < 0 ? 0 : n);
    const __m512 b = q3n__loadf_avx512(x + 16, n < 16 ? 0 : n - 16);
    const __m512i sign = _mm512_set1_epi32(0x7fffffff);    /* |x| as integers: NaN is the largest */
    const __m512i max = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), sign),
                                          _mm512_and_si512(_mm512_castps_si512(b), sign));
    const float m = q3n__bits_f32((uint32_t)_mm512_reduce_max_epi32(max));
    const int usable = m >= Q3N__X8_MIN && m <= FLT_MAX;
    const __m512 inverse = _mm512_set1_ps(usable ? 127.0f / m : 0.0f);
    const __mmask16 all = usable ? 0xffff : 0;
    const __m512i qa = _mm512_maskz_cvtps_epi32(all, _mm512_mul_ps(a, inverse));
    const __m512i qb = _mm512_maskz_cvtps_epi32(all, _mm512_mul_ps(b, inverse));
    _mm_storeu_si128((__m128i *)(void *)(y->q + 32 * g), _mm512_cvtepi32_epi8(qa));
    _mm_storeu_si128((__m128i *)(void *)(y->q + 32 * g + 16), _mm512_cvtepi32_epi8(qb));
    y->scale[g] = usable ? m / 127.0f : m < Q3N__X8_MIN ? 0.0f : NAN;
    y->minus_sum[g] = -_mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb));
}

static void q3n__quantize_x_avx512vnni(q3n__x8 *y, const float *x, int n)
{
    for (int i = 0; i < n; i += 2 * Q3N__GROUP, y++) {
        q3n__quantize_x_group_avx512vnni(y, 0, x + i, n - i);
        q3n__quantize_x_group_avx512vnni(y, 1, x + i + 32, n - i - 32);
    }
}

static void q3n__bind_avx512vnni(q3n__kernels *k)
{
#define Q3N__X(ID, id, number, block_len, block_bytes)                                  \
    k->matmul[Q3N_TYPE_##ID] = q3n__matmul_##id##_avx512vnni;
    Q3N_QUANT_TYPE_LIST(Q3N__X)
#undef Q3N__X
    k->quantize_x = q3n__quantize_x_avx512vnni;
}

Q3N__TARGET_END
#else
#  define q3n__bind_avx512vnni NULL
#endif

/* =====================================================================================
 * [36] KERNELS, NEON                                                   >>kernels-neon
 *
 * Baseline AArch64: no extension is asked for, so there is no target region.  32 registers of four
 * floats allow wider tiles than those of AVX2.  There are no masked loads: tails go through four
 * floats on the stack.  Checked under emulation; its speed has not been measured.
 * ===================================================================================== */
#if Q3N__ARM64 && !defined(Q3N_NO_NEON)

/* ---- Loads, stores, sums.  n elements are real, n >= 4 = all; the rest reads as zero ---- */
Q3N__INLINE float32x4_t q3n__loadf_neon(const float *p, int n)
{
    float part[4] = { 0 };
    if (n >= 4) return vld1q_f32(p);
    memcpy(part, p, (size_t)n * sizeof *p);
    return vld1q_f32(part);
}

/* The first n elements of v, n 0 or more; nothing after them is written. */
Q3N__INLINE void q3n__storef_neon(float *p, float32x4_t v, int n)
{
    float part[4];
    if (n >= 4) {
        vst1q_f32(p, v);
        return;
    }
    vst1q_f32(part, v);
    memcpy(p, part, (size_t)n * sizeof *p);
}

/* Elements [i, i + 4) of a row of a float type, or of the signed bytes of a q8 cache, n of them
 * real: a tail is copied, so nothing is read beyond it.  type is a constant in every use. */
Q3N__INLINE float32x4_t q3n__load_neon(q3n_type type, const void *row, size_t i, int n)
{
    if (type == Q3N_TYPE_F32) return q3n__loadf_neon((const float *)row + i, n);
    if (type == Q3N_TYPE_Q8) {
        uint32_t four = 0;
        memcpy(&four, (const int8_t *)row + i, n < 4 ? (size_t)n : sizeof four);
        const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    }
    const uint16_t *p = (const uint16_t *)row + i;
    uint16_t part[4] = { 0 };
    if (n < 4) {
        memcpy(part, p, (size_t)n * sizeof *p);
        p = part;
    }
    const uint16x4_t h = vld1_u16(p);
    if (type == Q3N_TYPE_F16) return vcvt_f32_f16(vreinterpret_f16_u16(h));
    /* h << 16 in one instruction: gcc makes two of a widening and a shift */
    const uint16x8_t high = vcombine_u16(h, vdup_n_u16(0));
    return vreinterpretq_f32_u16(vzip1q_u16(vdupq_n_u16(0), high));
}

/* v with zeros after the first n */
Q3N__INLINE float32x4_t q3n__first_neon(float32x4_t v, int n)
{
    static const int32_t lane[4] = { 0, 1, 2, 3 };
    const uint32x4_t k = vcgtq_s32(vdupq_n_s32(n), vld1q_s32(lane));
    return vreinterpretq_f32_u32(vandq_u32(k, vreinterpretq_u32_f32(v)));
}

/* The sums of four vectors, of a in lane 0: neighbours, then pairs. */
Q3N__INLINE float32x4_t q3n__sum4_neon(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d)
{
    return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
}

/* The sum of one: neighbours, then pairs. */
Q3N__INLINE float q3n__sum_neon(float32x4_t v)
{
    return vgetq_lane_f32(q3n__sum4_neon(v, v, v, v), 0);
}

/* ---- e^x: the clamps and the rest keep NaN; 2^n in two factors, so that a denormal result is
 *      rounded once and 2^128 does not overflow too early ---- */
Q3N__INLINE float32x4_t q3n__pow2_neon(int32x4_t n)   /* -126 <= n <= 127 */
{
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}

Q3N__INLINE float32x4_t q3n__exp_neon(float32x4_t x)
{
    x = vmaxq_f32(vdupq_n_f32(Q3N__EXP_MIN), vminq_f32(vdupq_n_f32(Q3N__EXP_MAX), x));
    const float32x4_t n = vrndnq_f32(vmulq_f32(x, vdupq_n_f32(Q3N__LOG2_E)));
    float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(Q3N__LN2_HI));
    r = vfmsq_f32(r, n, vdupq_n_f32(Q3N__LN2_LO));
    float32x4_t p = vfmaq_f32(vdupq_n_f32(Q3N__EXP_5), vdupq_n_f32(Q3N__EXP_6), r);
    p = vfmaq_f32(vdupq_n_f32(Q3N__EXP_4), p, r);
    p = vfmaq_f32(vdupq_n_f32(Q3N__EXP_3), p, r);
    p = vfmaq_f32(vdupq_n_f32(Q3N__EXP_2), p, r);
    p = vfmaq_f32(r, p, vmulq_f32(r, r));
    p = vaddq_f32(p, vdupq_n_f32(1.0f));
    const int32x4_t ni = vcvtq_s32_f32(n), half = vshrq_n_s32(ni, 1);
    p = vmulq_f32(p, q3n__pow2_neon(half));
    return vmulq_f32(p, q3n__pow2_neon(vsubq_s32(ni, half)));
}

/* 1 + e^-x */
Q3N__INLINE float32x4_t q3n__exp1_neon(float32x4_t x)
{
    return vaddq_f32(vdupq_n_f32(1.0f), q3n__exp_neon(vnegq_f32(x)));
}

/* ---- Matrix product: a tile of R rows x T tokens, one accumulator for each ---- */
#define Q3N__TOKENS_NEON 4     /* 4 x 4 accumulators, 4 inputs, 1 weight: 21 registers */

typedef struct {
    const void  *w[8];
    const float *x[Q3N__TOKENS_NEON];
    float32x4_t  s[8][Q3N__TOKENS_NEON];
} q3n__tile_regs_neon;

/* One vector of columns.  R and T are constants in every use, so that s stays in registers. */
Q3N__INLINE void q3n__tile_step_neon(q3n_type type, int R, int T,
                                     q3n__tile_regs_neon *p, int j, int n)
{
    float32x4_t x[Q3N__TOKENS_NEON];
    Q3N__UNROLL
    for (int t = 0; t < T; t++) x[t] = q3n__loadf_neon(p->x[t] + j, n);
    Q3N__UNROLL
    for (int r = 0; r < R; r++) {
        const float32x4_t w = q3n__load_neon(type, p->w[r], (size_t)j, n);
        Q3N__UNROLL
        for (int t = 0; t < T; t++) p->s[r][t] = vfmaq_f32(p->s[r][t], w, x[t]);
    }
}

/* y of token t, rows [r, r + 4) as far as they are wanted */
Q3N__INLINE void q3n__store_rows_neon(const q3n__matmul *m, int r, int t, float32x4_t v)
{
    const int n = m->row1 - r;
    if (m->bias) v = vaddq_f32(v, q3n__loadf_neon(m->bias + r, n));
    q3n__storef_neon(m->y + (size_t)t * (size_t)m->y_stride + r, v, n);
}

/* Rows after the last are computed as copies of it and dropped: every output takes one path. */
Q3N__INLINE void q3n__tile_neon(q3n_type type, int R, int T, const q3n__matmul *m, int r0, int t0)
{
    const size_t row_bytes = q3n__row_bytes(type, m->n_cols);
    q3n__tile_regs_neon p;
    Q3N__UNROLL
    for (int t = 0; t < T; t++) p.x[t] = q3n__matmul_x(m, t0 + t);
    Q3N__UNROLL
    for (int r = 0; r < R; r++) {
        const int row = r0 + r < m->row1 ? r0 + r : m->row1 - 1;
        p.w[r] = (const uint8_t *)m->w + (size_t)row * row_bytes;
        Q3N__UNROLL
        for (int t = 0; t < T; t++) p.s[r][t] = vdupq_n_f32(0.0f);
    }
    int j = 0;
    for (; j + 4 <= m->n_cols; j += 4) q3n__tile_step_neon(type, R, T, &p, j, 4);
    if (j < m->n_cols) q3n__tile_step_neon(type, R, T, &p, j, m->n_cols - j);
    Q3N__UNROLL
    for (int r = 0; r < R; r += 4) {
        if (r0 + r >= m->row1) break;
        Q3N__UNROLL
        for (int t = 0; t < T; t++)
            q3n__store_rows_neon(m, r0 + r, t0 + t,
                                 q3n__sum4_neon(p.s[r][t], p.s[r + 1][t], p.s[r + 2][t],
                                                p.s[r + 3][t]));
    }
}

/* Four rows, tokens [t, t1): the weights come from L1 for all but the first tile. */
Q3N__INLINE void q3n__rows_neon(q3n_type type, const q3n__matmul *m, int r, int t, int t1)
{
    while (t < t1) {
        const int T = q3n__tile_tokens(t1 - t, Q3N__TOKENS_NEON);
        switch (T) {
        case 1: q3n__tile_neon(type, 4, 1, m, r, t); break;
        case 2: q3n__tile_neon(type, 4, 2, m, r, t); break;
        case 3: q3n__tile_neon(type, 4, 3, m, r, t); break;
        case 4: q3n__tile_neon(type, 4, 4, m, r, t); break;
        }
        t += T;
    }
}

/* One token: 8 rows at once.  More: blocks of tokens over all rows, as in AVX2. */
Q3N__INLINE void q3n__matmul_neon(q3n_type type, const q3n__matmul *m)
{
    if (m->n == 1) {
        for (int r = m->row0; r < m->row1; r += 8) q3n__tile_neon(type, 8, 1, m, r, 0);
        return;
    }
    const int block = q3n__block_tokens(m->n_cols, Q3N__TOKENS_NEON);
    for (int t = 0; t < m->n; t += block) {
        const int t1 = m->n - t > block ? t + block : m->n;
        for (int r = m->row0; r < m->row1; r += 4) q3n__rows_neon(type, m, r, t, t1);
    }
}

/* ---- Attention: both products are out += x M with the vectors along M's rows ---- */

/* Columns [c, c + 4 V) of T rows of out: out[t] += x[t][i] m[i] for rising i, as in AVX2; n is how
 * many are real if V is 1.  T, V are constants. */
Q3N__INLINE void q3n__mix_tile_neon(q3n_type type, int V, int T, const q3n__mix *p, int c, int n)
{
    float32x4_t s[8][4], x[4];
    Q3N__UNROLL
    for (int v = 0; v < V; v++)
        Q3N__UNROLL
        for (int t = 0; t < T; t++)
            s[v][t] = p->step0 == 0 ? vdupq_n_f32(0.0f)
                    : q3n__loadf_neon(p->out + (size_t)t * p->out_stride + c + 4 * v, n);
    for (int i = p->step0; i < p->step1; i++) {
        Q3N__UNROLL
        for (int t = 0; t < T; t++) x[t] = vdupq_n_f32(p->x[(size_t)t * p->x_stride + (size_t)i]);
        const size_t first = (size_t)i * p->m_stride + (size_t)c;
        Q3N__UNROLL
        for (int v = 0; v < V; v++) {
            const float32x4_t m = q3n__load_neon(type, p->m, first + 4 * (size_t)v, n);
            Q3N__UNROLL
            for (int t = 0; t < T; t++) s[v][t] = vfmaq_f32(s[v][t], m, x[t]);
        }
    }
    Q3N__UNROLL
    for (int v = 0; v < V; v++)
        Q3N__UNROLL
        for (int t = 0; t < T; t++)
            q3n__storef_neon(p->out + (size_t)t * p->out_stride + c + 4 * v, s[v][t], n);
}

Q3N__INLINE void q3n__mix_rows_neon(q3n_type type, int T, const q3n__mix *p)
{
    const int V = T <= 2 ? 8 : 4;    /* V x T accumulators, T inputs, 1 of m: 21 registers */
    int c = 0;
    for (; c + 4 * V <= p->width; c += 4 * V) q3n__mix_tile_neon(type, V, T, p, c, 4);
    for (; c + 4 <= p->width; c += 4) q3n__mix_tile_neon(type, 1, T, p, c, 4);
    if (c < p->width) q3n__mix_tile_neon(type, 1, T, p, c, p->width - c);
}

Q3N__INLINE void q3n__mix_typed_neon(q3n_type type, const q3n__mix *p)
{
    switch (p->n) {
    case 1: q3n__mix_rows_neon(type, 1, p); break;
    case 2: q3n__mix_rows_neon(type, 2, p); break;
    case 4: q3n__mix_rows_neon(type, 4, p); break;
    }
}

/* Types and numbers of rows are constants below here: a body for each. */
static void q3n__mix_neon(const q3n__mix *p)
{
    switch (p->type) {
    case Q3N_TYPE_F32:  q3n__mix_typed_neon(Q3N_TYPE_F32, p); break;
    case Q3N_TYPE_F16:  q3n__mix_typed_neon(Q3N_TYPE_F16, p); break;
    case Q3N_TYPE_BF16: q3n__mix_typed_neon(Q3N_TYPE_BF16, p); break;
    default:            q3n__mix_typed_neon(Q3N_TYPE_Q8, p); break;
    }
}

/* max(-FLT_MAX, x_0, ...); NaN does not count: vmaxnm gives the number where one is none. */
static float q3n__max_neon(const float *x, int n)
{
    float32x4_t v = vdupq_n_f32(-FLT_MAX);
    int i = 0;
    for (; i + 4 <= n; i += 4) v = vmaxnmq_f32(v, vld1q_f32(x + i));
    float m = vmaxnmvq_f32(v);
    for (; i < n; i++) if (x[i] > m) m = x[i];
    return m;
}

/* x_i = e^(x_i - m); returns their sum, without the lanes that are not real. */
static float q3n__exp_sum_neon(float *x, int n, float m)
{
    const float32x4_t vm = vdupq_n_f32(m);
    float32x4_t sum = vdupq_n_f32(0.0f);
    for (int i = 0; i < n; i += 4) {
        const float32x4_t e = q3n__exp_neon(vsubq_f32(q3n__loadf_neon(x + i, n - i), vm));
        q3n__storef_neon(x + i, e, n - i);
        sum = vaddq_f32(sum, q3n__first_neon(e, n - i));
    }
    return q3n__sum_neon(sum);
}

static void q3n__attend_scale_neon(float *s, const float *scale, int n)
{
    for (int j = 0; j < n; j += 4)
        q3n__storef_neon(s + j, vmulq_f32(q3n__loadf_neon(s + j, n - j),
                                          q3n__loadf_neon(scale + j, n - j)), n - j);
}

static const q3n__attend_parts q3n__attend_neon = {
    q3n__mix_neon, q3n__max_neon, q3n__exp_sum_neon, q3n__attend_scale_neon, 4
};

/* ---- One instance for each float type ---- */
static void q3n__to_f32_neon(q3n_type type, float *y, const void *x, int n)
{
    for (int i = 0; i < n; i += 4)
        q3n__storef_neon(y + i, q3n__load_neon(type, x, (size_t)i, n - i), n - i);
}

Q3N__DEFINE_FLOAT_TYPES(neon)

/* ---- DeltaNet: a block of V vectors of the state's columns for all tokens ---- */
typedef struct {
    const float *from;           /* the block's first column where the token reads the state ... */
    float       *to;             /* ... and where it writes it                                   */
    size_t       from_stride, to_stride;
    float        decay;
    int          dk, n;          /* n columns are real if V is 1                                 */
    float32x4_t  d[8], o[8], read[8];
} q3n__delta_cols_neon;

/* read = S' k */
Q3N__INLINE void q3n__delta_read_neon(int V, q3n__delta_cols_neon *p, const float *k)
{
    Q3N__UNROLL
    for (int v = 0; v < V; v++) p->read[v] = vdupq_n_f32(0.0f);
    for (int i = 0; i < p->dk; i++) {
        const float *S = p->from + (size_t)i * p->from_stride;
        const float32x4_t ki = vdupq_n_f32(k[i]);
        Q3N__UNROLL
        for (int v = 0; v < V; v++)
            p->read[v] = vfmaq_f32(p->read[v], q3n__loadf_neon(S + 4 * v, p->n), ki);
    }
}

/* S <- decay S + k d' and, while S is at hand, o = S' q and read = S' next.  Constants: whether the
 * new S is kept; q and next are NULL if nobody needs what they read. */
Q3N__INLINE void q3n__delta_step_neon(int V, q3n__delta_cols_neon *p, int keeps,
                                      const float *q, const float *k, const float *next)
{
    const float32x4_t keep = vdupq_n_f32(p->decay);
    Q3N__UNROLL
    for (int v = 0; v < V; v++) p->o[v] = p->read[v] = vdupq_n_f32(0.0f);
    for (int i = 0; i < p->dk; i++) {
        const float *from = p->from + (size_t)i * p->from_stride;
        const float32x4_t ki = vdupq_n_f32(k[i]);
        const float32x4_t qi = q ? vdupq_n_f32(q[i]) : ki, ni = next ? vdupq_n_f32(next[i]) : ki;
        Q3N__UNROLL
        for (int v = 0; v < V; v++) {
            float32x4_t s = q3n__loadf_neon(from + 4 * v, p->n);
            s = vfmaq_f32(vmulq_f32(ki, p->d[v]), keep, s);
            if (keeps) q3n__storef_neon(p->to + (size_t)i * p->to_stride + 4 * v, s, p->n);
            if (q)     p->o[v] = vfmaq_f32(p->o[v], s, qi);
            if (next)  p->read[v] = vfmaq_f32(p->read[v], s, ni);
        }
    }
}

/* Columns [j, j + 4 V) for all tokens; see the equations in AVX2. */
Q3N__INLINE void q3n__delta_block_neon(int V, const q3n__delta *h, int j, int n)
{
    q3n__delta_cols_neon p;
    p.from = h->S + j;
    p.from_stride = (size_t)h->dv;
    p.dk = h->dk;
    p.n = n;
    q3n__delta_read_neon(V, &p, h->k);
    for (int t = 0; t < h->n; t++) {
        const float *q = h->q + (size_t)t * (size_t)h->qk_stride;
        const float *k = h->k + (size_t)t * (size_t)h->qk_stride;
        const float *values = h->v + (size_t)t * (size_t)h->v_stride + j;
        p.decay = expf(h->g[(size_t)t * (size_t)h->gb_stride]);
        const float32x4_t beta = vdupq_n_f32(h->beta[(size_t)t * (size_t)h->gb_stride]);
        Q3N__UNROLL
        for (int v = 0; v < V; v++) {
            const float32x4_t x = q3n__loadf_neon(values + 4 * v, n);
            p.d[v] = vmulq_f32(beta, vfmsq_f32(x, vdupq_n_f32(p.decay), p.read[v]));
        }
        const int has_output = q3n__delta_has_output(h, t);
        p.to = q3n__delta_after(h, t, j);
        p.to_stride = q3n__delta_stride(h, t);
        if (t + 1 < h->n && has_output) q3n__delta_step_neon(V, &p, 1, q, k, k + h->qk_stride);
        else if (t + 1 < h->n)      q3n__delta_step_neon(V, &p, 1, NULL, k, k + h->qk_stride);
        else if (p.to)              q3n__delta_step_neon(V, &p, 1, q, k, NULL);
        else if (has_output)            q3n__delta_step_neon(V, &p, 0, q, k, NULL);
        p.from = p.to;
        p.from_stride = p.to_stride;
        if (!has_output) continue;
        float *o = h->o + (size_t)t * (size_t)h->o_stride + j;
        Q3N__UNROLL
        for (int v = 0; v < V; v++) q3n__storef_neon(o + 4 * v, p.o[v], n);
    }
}

/* One or two tokens read the state from memory, in whole rows as far as they go; more read it from
 * the first-level cache. */
static void q3n__delta_neon(const q3n__delta *h)
{
    if (h->n < 1) return;
    int j = h->col0;
    if (h->n <= 2)
        for (; j + 32 <= h->col1; j += 32) q3n__delta_block_neon(8, h, j, 4);
    for (; j + 16 <= h->col1; j += 16) q3n__delta_block_neon(4, h, j, 4);
    for (; j < h->col1; j += 4) q3n__delta_block_neon(1, h, j, h->col1 - j);
}

/* ---- Convolution: lanes are channels ---- */
static void q3n__conv_neon(const q3n__conv *c)
{
    const float *u[16];                                /* width <= 16 (Q3N_CONFIG_LIST) */
    for (int t = 0; t < c->n; t++) {
        float *y = c->y + (size_t)t * (size_t)c->y_stride;
        for (int j = 0; j < c->width; j++) u[j] = q3n__conv_input(c, t + j);
        for (int ch = c->c0; ch < c->c1; ch += 4) {
            const int n = c->c1 - ch;
            float32x4_t s = vdupq_n_f32(0.0f);
            for (int j = 0; j < c->width; j++) {
                const float *w = c->w + (size_t)j * (size_t)c->n_channels + ch;
                s = vfmaq_f32(s, q3n__loadf_neon(w, n), q3n__loadf_neon(u[j] + ch, n));
            }
            q3n__storef_neon(y + ch, vdivq_f32(s, q3n__exp1_neon(s)), n);
        }
    }
    q3n__conv_shift(c);
}

/* ---- Vectors ---- */
/* Four sums of vectors, as in AVX2. */
static float q3n__dot_neon(const float *a, const float *b, int n)
{
    float32x4_t s[4];
    Q3N__UNROLL
    for (int v = 0; v < 4; v++) s[v] = vdupq_n_f32(0.0f);
    int i = 0;
    for (; i + 16 <= n; i += 16)
        Q3N__UNROLL
        for (int v = 0; v < 4; v++)
            s[v] = vfmaq_f32(s[v], vld1q_f32(a + i + 4 * v), vld1q_f32(b + i + 4 * v));
    for (; i < n; i += 4)
        s[0] = vfmaq_f32(s[0], q3n__loadf_neon(a + i, n - i), q3n__loadf_neon(b + i, n - i));
    return q3n__sum_neon(vaddq_f32(vaddq_f32(s[0], s[1]), vaddq_f32(s[2], s[3])));
}

static void q3n__axpy_neon(float *y, float a, const float *x, int n)
{
    const float32x4_t va = vdupq_n_f32(a);
    for (int i = 0; i < n; i += 4) {
        const float32x4_t vy = q3n__loadf_neon(y + i, n - i);
        q3n__storef_neon(y + i, vfmaq_f32(vy, va, q3n__loadf_neon(x + i, n - i)), n - i);
    }
}

/* y may be x. */
static void q3n__rms_norm_neon(float *y, const float *x, const float *w, int n, float eps)
{
    const float mean = q3n__dot_neon(x, x, n) / (float)n;
    const float32x4_t scale = vdupq_n_f32(1.0f / sqrtf(mean + eps));
    for (int i = 0; i < n; i += 4) {
        const float32x4_t v = vmulq_f32(q3n__loadf_neon(x + i, n - i), scale);
        q3n__storef_neon(y + i, vmulq_f32(v, q3n__loadf_neon(w + i, n - i)), n - i);
    }
}

static void q3n__softmax_neon(float *x, int n)
{
    const float32x4_t l = vdupq_n_f32(q3n__exp_sum_neon(x, n, q3n__max_neon(x, n)));
    for (int i = 0; i < n; i += 4)
        q3n__storef_neon(x + i, vdivq_f32(q3n__loadf_neon(x + i, n - i), l), n - i);
}

static void q3n__silu_mul_neon(float *y, const float *gate, int n)
{
    for (int i = 0; i < n; i += 4) {
        const float32x4_t g = q3n__loadf_neon(gate + i, n - i), v = q3n__loadf_neon(y + i, n - i);
        const float32x4_t s = vdivq_f32(g, q3n__exp1_neon(g));
        q3n__storef_neon(y + i, vmulq_f32(v, s), n - i);
    }
}

/* ---- Sampling: the operations of the scalar kernels, one for one ---- */
static void q3n__block_max_neon(float *max, const float *x, int n_blocks)
{
    for (int b = 0; b < n_blocks; b++, x += Q3N__SAMPLER_BLOCK) {
        float32x4_t m = vdupq_n_f32(-Q3N__INFINITY);
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i += 4) {   /* vmaxnm forgets m at signalling NaN */
            const float32x4_t v = vld1q_f32(x + i);
            m = vbslq_f32(vcgtq_f32(v, m), v, m);
        }
        const float largest = vmaxnmvq_f32(m);
        max[b] = largest < FLT_MAX ? largest : FLT_MAX;
    }
}

/* Halves on halves, as q3n__block_sum_scalar ends. */
Q3N__INLINE float q3n__halves_neon(const float32x4_t s[4])
{
    const float32x4_t four = vaddq_f32(vaddq_f32(s[0], s[2]), vaddq_f32(s[1], s[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

/* q3n__sampler_weight, unfused: vmulq and vaddq apart.  NaN fails the comparison and becomes 0. */
Q3N__INLINE float32x4_t q3n__weight_neon(float32x4_t x, float32x4_t max, float32x4_t scale)
{
    const float32x4_t round = vdupq_n_f32(Q3N__ROUND);
    float32x4_t t = vmulq_f32(vsubq_f32(x, max), scale);
    const uint32x4_t counts = vcgeq_f32(t, vdupq_n_f32(Q3N__WEIGHT_MIN));
    t = vminq_f32(t, vdupq_n_f32(0.0f));
    const float32x4_t z = vaddq_f32(t, round), f = vsubq_f32(t, vsubq_f32(z, round));
    float32x4_t p = vmulq_f32(vdupq_n_f32(Q3N__EXP2_5), f);
    p = vmulq_f32(vaddq_f32(p, vdupq_n_f32(Q3N__EXP2_4)), f);
    p = vmulq_f32(vaddq_f32(p, vdupq_n_f32(Q3N__EXP2_3)), f);
    p = vmulq_f32(vaddq_f32(p, vdupq_n_f32(Q3N__EXP2_2)), f);
    p = vmulq_f32(vaddq_f32(p, vdupq_n_f32(Q3N__EXP2_1)), f);
    p = vaddq_f32(p, vdupq_n_f32(1.0f));
    const uint32x4_t n = vshlq_n_u32(vreinterpretq_u32_f32(z), 23);
    return vreinterpretq_f32_u32(vandq_u32(vaddq_u32(vreinterpretq_u32_f32(p), n), counts));
}

/* Four vectors are the 16 running sums. */
static void q3n__block_weights_neon(float *y, float *sum, const float *x, int n_blocks, float max,
                                    float scale)
{
    const float32x4_t m = vdupq_n_f32(max), c = vdupq_n_f32(scale), zero = vdupq_n_f32(0.0f);
    for (int b = 0; b < n_blocks; b++, x += Q3N__SAMPLER_BLOCK, y += Q3N__SAMPLER_BLOCK) {
        float32x4_t s[4] = { zero, zero, zero, zero };
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i += 16)
            for (int k = 0; k < 4; k++) {
                const float32x4_t w = q3n__weight_neon(vld1q_f32(x + i + 4 * k), m, c);
                vst1q_f32(y + i + 4 * k, w);
                s[k] = vaddq_f32(s[k], w);
            }
        sum[b] = q3n__halves_neon(s);
    }
}

static void q3n__block_sums_neon(float *sum, int32_t *count, const float *y, int n_blocks,
                                 float floor)
{
    const float32x4_t min = vdupq_n_f32(floor), zero = vdupq_n_f32(0.0f);
    for (int b = 0; b < n_blocks; b++, y += Q3N__SAMPLER_BLOCK) {
        float32x4_t s[4] = { zero, zero, zero, zero };
        uint32x4_t n = vdupq_n_u32(0);
        for (int i = 0; i < Q3N__SAMPLER_BLOCK; i += 16)
            for (int k = 0; k < 4; k++) {
                const float32x4_t w = vld1q_f32(y + i + 4 * k);
                const uint32x4_t counts = vcgeq_f32(w, min);
                s[k] = vaddq_f32(s[k], vreinterpretq_f32_u32(
                                           vandq_u32(vreinterpretq_u32_f32(w), counts)));
                n = vsubq_u32(n, counts);
            }
        sum[b] = q3n__halves_neon(s);
        count[b] = (int32_t)vaddvq_u32(n);
    }
}

static void q3n__sigmoid_mul_neon(float *y, const float *gate, int n)
{
    for (int i = 0; i < n; i += 4) {
        const float32x4_t g = q3n__loadf_neon(gate + i, n - i), v = q3n__loadf_neon(y + i, n - i);
        const float32x4_t s = vdivq_f32(vdupq_n_f32(1.0f), q3n__exp1_neon(g));
        q3n__storef_neon(y + i, vmulq_f32(v, s), n - i);
    }
}

/* ---- Quantised matrices: 16 rows are four vectors; the sums are those of the x86 sections ---- */
#define Q3N__TOKENS_QUANT_NEON 4

/* Levels of 4 rows: columns 4 s .. 4 s + 3 in w[s].  p is the rows' quarter of the group's lines.
 * Shifting left and inserting (vsli) puts a code's upper bits above its lower ones; what it brings
 * along above them is masked off. */
Q3N__INLINE void q3n__unpack_neon(q3n_type type, const uint8_t *p, int8x16_t w[8])
{
    if (type == Q3N_TYPE_Q8) {
        Q3N__UNROLL
        for (int s = 0; s < 8; s++)
            w[s] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 64 * s), vdupq_n_u8(Q3N__Q8_ZERO)));
    }
    if (type == Q3N_TYPE_Q6) {
        uint8x16_t upper[2] = { vld1q_u8(p + 256), vld1q_u8(p + 320) };
        Q3N__UNROLL
        for (int s = 0; s < 8; s++) {
            const uint8x16_t v = vld1q_u8(p + 64 * (s % 4)), low = s < 4 ? v : vshrq_n_u8(v, 4);
            const uint8x16_t code = vandq_u8(vsliq_n_u8(low, upper[s / 4], 4), vdupq_n_u8(63));
            w[s] = vsubq_s8(vreinterpretq_s8_u8(code), vdupq_n_s8(Q3N__Q6_ZERO));
            upper[s / 4] = vshrq_n_u8(upper[s / 4], 2);
        }
    }
    if (type == Q3N_TYPE_Q4) {
        const int8x16_t levels = vld1q_s8(q3n__q4_levels);
        Q3N__UNROLL
        for (int s = 0; s < 4; s++) {
            const uint8x16_t v = vld1q_u8(p + 64 * s);
            w[s]     = vqtbl1q_s8(levels, vandq_u8(v, vdupq_n_u8(15)));
            w[s + 4] = vqtbl1q_s8(levels, vshrq_n_u8(v, 4));
        }
    }
    if (type == Q3N_TYPE_Q3) {
        const int8x8_t half = vld1_s8(q3n__q3_levels);
        const int8x16_t levels = vcombine_s8(half, half);
        uint8x16_t lower[2] = { vld1q_u8(p), vld1q_u8(p + 64) }, top = vld1q_u8(p + 128);
        Q3N__UNROLL
        for (int s = 0; s < 8; s++) {
            w[s] = vqtbl1q_s8(levels, vandq_u8(vsliq_n_u8(lower[s / 4], top, 2), vdupq_n_u8(7)));
            lower[s / 4] = vshrq_n_u8(lower[s / 4], 2);
            top = vshrq_n_u8(top, 1);
        }
    }
}

/* Sums of a group for 4 rows.  16 bits hold `chain` products: 2 x 128 x 127, of q6 8 x 32 x 127. */
Q3N__INLINE int32x4_t q3n__group_neon(q3n_type type, const int8x16_t w[8], const int8_t *x)
{
    const int chain = type == Q3N_TYPE_Q6 ? 8 : 2;
    int32x4_t a = vdupq_n_s32(0), b = a;          /* rows 0 and 1, rows 2 and 3: two sums each */
    Q3N__UNROLL
    for (int s = 0; s < 8; s += chain) {
        int16x8_t c = vdupq_n_s16(0), d = c;
        Q3N__UNROLL
        for (int i = s; i < s + chain; i++) {
            int32_t four;
            memcpy(&four, x + 4 * i, sizeof four);
            const int8x16_t v = vreinterpretq_s8_s32(vdupq_n_s32(four));
            c = i == s ? vmull_s8(vget_low_s8(w[i]), vget_low_s8(v))
                       : vmlal_s8(c, vget_low_s8(w[i]), vget_low_s8(v));
            d = i == s ? vmull_high_s8(w[i], v) : vmlal_high_s8(d, w[i], v);
        }
        a = vpadalq_s16(a, c);
        b = vpadalq_s16(b, d);
    }
    return vpaddq_s32(a, b);
}

/* 16 rows and T tokens: a quarter of 4 rows is unpacked to 8 registers and used for all T tokens.
 * Groups are added in rising order with one multiply-add each, as on x86, so the sums are the same
 * bits.  type and T are constants in every use. */
Q3N__INLINE void q3n__quant_tile_neon(q3n_type type, int T, const q3n__matmul *m, int r, int t0)
{
    const size_t block_bytes = (size_t)q3n__types[type].block_bytes * Q3N__TILE_ROWS;
    const size_t group_bytes = (block_bytes - 64) / 2;
    const uint8_t *w = (const uint8_t *)m->w + (size_t)r * q3n__row_bytes(type, m->n_cols);
    const q3n__x8 *x[Q3N__TOKENS_QUANT_NEON];
    float32x4_t acc[Q3N__TOKENS_QUANT_NEON][4];
    for (int t = 0; t < T; t++) {
        x[t] = q3n__matmul_xq(m, t0 + t);
        for (int i = 0; i < 4; i++) acc[t][i] = vdupq_n_f32(0.0f);
    }
    const int blocks = q3n__x8_blocks(m->n_cols);
    for (int b = 0; b < blocks; b++, w += block_bytes)
        for (int g = 0; g < 2; g++) {
            const uint8_t *codes = w + 64 + (size_t)g * group_bytes;
            Q3N__UNROLL
            for (int i = 0; i < 4; i++) {
                int8x16_t u[8];
                q3n__unpack_neon(type, codes + 16 * i, u);
                const float32x4_t scales =
                    q3n__load_neon(Q3N_TYPE_F16, w + 32 * g + 8 * i, 0, 4);
                Q3N__UNROLL
                for (int t = 0; t < T; t++) {
                    const int32x4_t sum = q3n__group_neon(type, u, x[t][b].q + Q3N__GROUP * g);
                    acc[t][i] = vfmaq_f32(acc[t][i], vcvtq_f32_s32(sum),
                                          vmulq_n_f32(scales, x[t][b].scale[g]));
                }
            }
        }
    for (int t = 0; t < T; t++)
        for (int i = 0; i < 4 && r + 4 * i < m->row1; i++) {
            const int row = r + 4 * i, n = m->row1 - row;
            if (m->bias) acc[t][i] = vaddq_f32(acc[t][i], q3n__loadf_neon(m->bias + row, n));
            q3n__storef_neon(m->y + (size_t)(t0 + t) * (size_t)m->y_stride + row, acc[t][i], n);
        }
}

Q3N__INLINE void q3n__matmul_quantised_neon(q3n_type type, const q3n__matmul *m)
{
    for (int r = m->row0; r < m->row1; r += Q3N__TILE_ROWS)
        for (int t = 0; t < m->n; ) {
            const int T = q3n__tile_tokens(m->n - t, Q3N__TOKENS_QUANT_NEON);
            switch (T) {
            case 1: q3n__quant_tile_neon(type, 1, m, r, t); break;
            case 2: q3n__quant_tile_neon(type, 2, m, r, t); break;
            case 3: q3n__quant_tile_neon(type, 3, m, r, t); break;
            case 4: q3n__quant_tile_neon(type, 4, m, r, t); break;
            }
            t += T;
        }
}

#define Q3N__X(ID, id, number, block_len, block_bytes)                                  \
    static void q3n__matmul_##id##_neon(const q3n__matmul *m)                           \
    {                                                                                   \
        q3n__matmul_quantised_neon(Q3N_TYPE_##ID, m);                                   \
    }
Q3N_QUANT_TYPE_LIST(Q3N__X)
#undef Q3N__X

/* 32 activations, n of them real.  |x| is compared as an integer, so that NaN is the largest; a
 * product of 0 and what is not finite is NaN, which converts to 0. */
Q3N__INLINE void q3n__quantize_x_group_neon(q3n__x8 *y, int g, const float *x, int n)
{
    float32x4_t a[8];
    int32x4_t q[8], max = vdupq_n_s32(0), sum = max;
    Q3N__UNROLL
    for (int v = 0; v < 8; v++) {
        a[v] = n > 4 * v ? q3n__loadf_neon(x + 4 * v, n - 4 * v) : vdupq_n_f32(0.0f);
        max = vmaxq_s32(max, vreinterpretq_s32_f32(vabsq_f32(a[v])));
    }
    const float m = q3n__bits_f32((uint32_t)vmaxvq_s32(max));
    const int usable = m >= Q3N__X8_MIN && m <= FLT_MAX;
    const float32x4_t inverse = vdupq_n_f32(usable ? 127.0f / m : 0.0f);
    Q3N__UNROLL
    for (int v = 0; v < 8; v++) {
        q[v] = vcvtnq_s32_f32(vmulq_f32(a[v], inverse));
        sum = vaddq_s32(sum, q[v]);
    }
    Q3N__UNROLL
    for (int v = 0; v < 8; v += 2)
        vst1_s8(y->q + Q3N__GROUP * g + 4 * v,
                vmovn_s16(vcombine_s16(vmovn_s32(q[v]), vmovn_s32(q[v + 1]))));
    y->scale[g] = usable ? m / 127.0f : m < Q3N__X8_MIN ? 0.0f : NAN;
    y->minus_sum[g] = -vaddvq_s32(sum);
}

static void q3n__quantize_x_neon(q3n__x8 *y, const float *x, int n)
{
    for (int i = 0; i < n; i += 2 * Q3N__GROUP, y++) {
        q3n__quantize_x_group_neon(y, 0, x + i, n - i);
        q3n__quantize_x_group_neon(y, 1, x + i + Q3N__GROUP, n - i - Q3N__GROUP);
    }
}

/* store_kv is left to scalar. */
static void q3n__bind_neon(q3n__kernels *k)
{
#define Q3N__X(ID, id, number, block_len, block_bytes)                                  \
    k->matmul[Q3N_TYPE_##ID] = q3n__matmul_##id##_neon;
    Q3N_QUANT_TYPE_LIST(Q3N__X)
#undef Q3N__X
#define Q3N__X(ID, id, number, block_len, block_bytes)                                  \
    k->matmul[Q3N_TYPE_##ID] = q3n__matmul_##id##_neon;                                 \
    k->to_f32[Q3N_TYPE_##ID] = q3n__to_f32_##id##_neon;                                 \
    k->attend[Q3N_TYPE_##ID] = q3n__attend_##id##_neon;
    Q3N_FLOAT_TYPE_LIST(Q3N__X)
#undef Q3N__X
    k->attend[Q3N_TYPE_Q8] = q3n__attend_q8_neon;
    k->quantize_x  = q3n__quantize_x_neon;
    k->delta       = q3n__delta_neon;
    k->conv        = q3n__conv_neon;
    k->dot         = q3n__dot_neon;
    k->axpy        = q3n__axpy_neon;
    k->rms_norm    = q3n__rms_norm_neon;
    k->softmax     = q3n__softmax_neon;
    k->silu_mul    = q3n__silu_mul_neon;
    k->sigmoid_mul = q3n__sigmoid_mul_neon;
    k->block_max     = q3n__block_max_neon;
    k->block_weights = q3n__block_weights_neon;
    k->block_sums    = q3n__block_sums_neon;
}

#else
#  define q3n__bind_neon NULL
#endif

/* =====================================================================================
 * [37] DISPATCH: one row per ISA                                           >>dispatch
 *
 * Which kernels a table gets: names, what this machine has, binding.  The only code that knows all
 * ISAs; everything before it knows q3n__kernels_init, q3n_isa_best and the table.  Nothing is
 * cached: a table is made for each engine and sampler, so there is no global to guard and isa
 * may differ between them.
 * ===================================================================================== */
/* By number, families together.  bind is NULL where the kernels are not compiled in: another
 * architecture, or a Q3N_NO_ macro. */
static const struct q3n__isa_row {
    q3n_isa     isa;
    const char *name;
    void      (*bind)(q3n__kernels *);
} q3n__isas[] = {
#define Q3N__X(ID, id, number) { Q3N_ISA_##ID, #id, q3n__bind_##id },
    Q3N_ISA_LIST(Q3N__X)
#undef Q3N__X
};
#define Q3N__N_ISAS (sizeof q3n__isas / sizeof q3n__isas[0])

static const struct q3n__isa_row *q3n__isa_find(q3n_isa isa)    /* NULL = there is none */
{
    for (size_t i = 0; i < Q3N__N_ISAS; i++) if (q3n__isas[i].isa == isa) return &q3n__isas[i];
    return NULL;
}

Q3N_DEF int q3n_isa_supported(q3n_isa isa)
{
    const struct q3n__isa_row *row = q3n__isa_find(isa);
    return row && row->bind && (isa == Q3N_ISA_SCALAR || q3n__cpu_has(isa));
}

/* The last of the list that this machine has: within an architecture later is better. */
Q3N_DEF q3n_isa q3n_isa_best(void)
{
    q3n_isa best = Q3N_ISA_SCALAR;
    for (size_t i = 0; i < Q3N__N_ISAS; i++)
        if (q3n_isa_supported(q3n__isas[i].isa)) best = q3n__isas[i].isa;
    return best;
}

Q3N_DEF const char *q3n_isa_name(q3n_isa isa)
{
    const struct q3n__isa_row *row = q3n__isa_find(isa);
    return row ? row->name : NULL;
}

Q3N_DEF q3n_result q3n_isa_from_name(const char *name, q3n_isa *out)
{
    if (!name || !out) return Q3N_ERR_ARG;
    for (size_t i = 0; i < Q3N__N_ISAS; i++)
        if (strcmp(q3n__isas[i].name, name) == 0) {
            *out = q3n__isas[i].isa;
            return Q3N_OK;
        }
    return Q3N_ERR_ARG;
}

/* Scalar first, then each supported row of the same family up to isa overrides what it does better
 * than those before it: AVX-512 VNNI has its quantised products from its own section, the rest from
 * AVX-512 and AVX2. */
static void q3n__kernels_init(q3n__kernels *k, q3n_isa isa)
{
    memset(k, 0, sizeof *k);
    for (size_t i = 0; i < Q3N__N_ISAS && q3n__isas[i].isa <= isa; i++) {
        const int family = (int)q3n__isas[i].isa >> 5;
        if ((family == 0 || family == (int)isa >> 5) && q3n_isa_supported(q3n__isas[i].isa))
            (q3n__isas[i].bind)(k);
    }
}

#endif /* Q3N__IMPLEMENTS */
