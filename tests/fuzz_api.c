/* Walks the whole API as the fuzzer's bytes say: opens a model file that was changed and signed
 * again, and calls one function after the other on whatever came of it, with an allocator that
 * fails now and then and any of the instruction sets.
 *
 *     make fuzz                    libFuzzer, for FUZZ_SECONDS
 *     build/tests/replay_api       some thousand inputs of its own
 *
 * What must hold: no access outside, no undefined behaviour, all memory given back, a failed call
 * leaves the session as long as it was, and every message is clean.
 */
#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "q3n_make.h"
#include "engines.h"
#include "fuzz.h"
#include "isas.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What an input may cost: it should take some milliseconds. */
#define MAX_CALLS         48
#define MAX_TOKENS        96            /* evaluated */
#define MAX_WEIGHTS       60000         /* of a token: a hostile geometry may use a tensor often */
#define MAX_SESSION_BYTES ((size_t)4 << 20)
#define MAX_VOCAB         1024

/* ---- The input: a byte at a time, zeros after its end ---- */
typedef struct { const uint8_t *p, *end; } input;

static unsigned take(input *in) { return in->p < in->end ? *in->p++ : 0; }
static unsigned take2(input *in) { const unsigned low = take(in); return low | take(in) << 8; }
static int      take_int(input *in, int n) { return (int)(take(in) % (unsigned)n); }

/* A number of tokens or a length: mostly near [0, n], now and then anything. */
static int take_count(input *in, int n)
{
    const unsigned k = take(in);
    if (k < 250) return (int)(k % (unsigned)(n + 2)) - (k == 249);
    return k == 250 ? INT_MAX : k == 251 ? INT_MIN : k == 252 ? -1 : n;
}

/* ---- Memory that ends: the call after fail_after fails, and every later one with every ---- */
typedef struct {
    size_t live, n_calls, fail_after, every;
} memory;

static void *memory_alloc(void *user, size_t bytes)
{
    memory *m = (memory *)user;
    m->n_calls++;
    if (bytes > (size_t)64 << 20) return NULL;
    if (m->n_calls == m->fail_after || (m->every && m->n_calls % m->every == 0)) return NULL;
    void *p = malloc(bytes);
    if (p) m->live += bytes;
    return p;
}

static void memory_free(void *user, void *p, size_t bytes)
{
    ((memory *)user)->live -= bytes;
    free(p);
}

/* ---- Model files with every kind of tensor and a tokenizer, made once ---- */
#define N_FILES 4

typedef struct { uint8_t *data; size_t bytes; } file;

static file base[N_FILES];

static void put32(uint8_t **p, uint32_t v) { memcpy(*p, &v, 4); *p += 4; }

/* A token for each byte, some merges, and added tokens of every kind. */
static size_t tokenizer_section(uint8_t *out)
{
    static const uint32_t merges[][3] = { { 'h', 'e', 256 }, { 'l', 'o', 257 }, { 256, 'l', 258 },
                                          { 258, 257, 259 }, { ' ', 'a', 260 } };
    static const uint32_t added[][2] = { { 261, 1 }, { 262, 0 }, { 263, 2 | 4 }, { 264, 8 },
                                         { 265, 16 } };
    static const char *const texts[] = { "he", "lo", "hel", "hello", " a", "<|end|>", "<think>",
                                         "<s>", "e\xcc\x81x", "ab" };
    uint8_t *p = out;
    uint32_t at = 0;
    put32(&p, 266); put32(&p, 5); put32(&p, 5); put32(&p, 0);
    for (uint32_t i = 0; i < 266; i++) {
        put32(&p, at);
        at += i < 256 ? 1 : (uint32_t)strlen(texts[i - 256]);
    }
    put32(&p, at);
    for (int i = 0; i < 5; i++) for (int k = 0; k < 3; k++) put32(&p, merges[i][k]);
    for (int i = 0; i < 5; i++) for (int k = 0; k < 2; k++) put32(&p, added[i][k]);
    for (int b = 0; b < 256; b++) *p++ = (uint8_t)b;
    for (int i = 0; i < 10; i++) {
        memcpy(p, texts[i], strlen(texts[i]));
        p += strlen(texts[i]);
    }
    return (size_t)(p - out);
}

static void sign(file *f)
{
    if (f->bytes < 64) return;
    const uint64_t bytes = f->bytes;
    uint64_t meta = q3n__load_u64(f->data + 24);
    memcpy(f->data + 16, &bytes, 8);
    if (meta > bytes) meta = bytes;
    memset(f->data + 32, 0, 4);
    const uint32_t crc = q3n__crc32(0, f->data, (size_t)meta);
    memcpy(f->data + 32, &crc, 4);
}

/* Put a TOKENIZER section between the metadata and the tensors, which move up by a page. */
static file with_tokenizer(const file *f)
{
    enum { SHIFT = 8192 };
    static uint8_t section[SHIFT];
    const size_t bytes = tokenizer_section(section), n = q3n__load_u32(f->data + 12);
    const size_t meta = (size_t)q3n__load_u64(f->data + 24), first = 64 + 32 * n;
    const uint64_t at = (meta + 32 + 7) / 8 * 8, end = (at + bytes + 7) / 8 * 8;
    file g = { NULL, f->bytes + SHIFT };
    require(bytes + 64 < SHIFT && posix_memalign((void **)&g.data, 64, g.bytes) == 0, "no memory");
    memset(g.data, 0, g.bytes);
    memcpy(g.data, f->data, first);
    memcpy(g.data + first + 32, f->data + first, meta - first);
    memcpy(g.data + meta + SHIFT, f->data + meta, f->bytes - meta);
    for (size_t i = 0; i < n; i++) {
        uint8_t *record = g.data + 64 + 32 * i;
        const uint64_t moved = q3n__load_u64(record + 8) + 32;
        memcpy(record + 8, &moved, 8);
        if (q3n__load_u32(record) != Q3N__SECTION_TENSORS) continue;
        for (uint32_t t = 0; t < q3n__load_u32(g.data + moved); t++) {
            uint8_t *place = g.data + moved + 8 + 80 * t + 40;
            const uint64_t offset = q3n__load_u64(place) + SHIFT;
            memcpy(place, &offset, 8);
        }
    }
    uint8_t *p = g.data + first;
    const uint64_t place[3] = { at, bytes, 0 };
    put32(&p, Q3N__SECTION_TOKENIZER);
    put32(&p, 1);
    memcpy(p, place, sizeof place);
    memcpy(g.data + at, section, bytes);
    p = g.data + 12;
    put32(&p, (uint32_t)n + 1);
    memcpy(g.data + 24, &end, 8);
    sign(&g);
    return g;
}

static file make_file(const char *preset, const char *const (*set)[2], q3n_type type)
{
    q3n_config c = Q3N_INIT(q3n_config);
    q3n_error err = { Q3N_OK, -1, "" };
    require(q3n_config_preset(preset, &c, &err) == Q3N_OK, err.message);
    for (int i = 0; set[i][0]; i++)
        require(q3n_config_set(&c, set[i][0], set[i][1], &err) == Q3N_OK, err.message);
    const q3n_init_options o = { .size = sizeof o,
                                 .type = type, .seed = 5, .stddev = 0.3, .n_threads = 1 };
    file f = { NULL, (size_t)q3n_init_bytes(&c, &o, &err) };
    require(f.bytes > 0 && posix_memalign((void **)&f.data, 64, f.bytes) == 0, err.message);
    require(q3n_init_memory(f.data, f.bytes, &c, &o, &err) == Q3N_OK, err.message);
    const file g = with_tokenizer(&f);
    free(f.data);
    return g;
}

static void make_files(void)
{
    static const char *const hybrid[][2] = {
        { "layers", "2" }, { "layer_types", "1,0" }, { "layer_experts", "1,1" }, { "hidden", "16" },
        { "heads", "2" }, { "kv_heads", "1" }, { "head_dim", "8" }, { "rotary_dim", "4" },
        { "vocab", "270" }, { "experts", "3" }, { "top_k", "2" }, { "context", "600" },
        { "moe_intermediate_size", "8" }, { "shared_expert_intermediate_size", "8" },
        { "linear_num_key_heads", "1" }, { "linear_num_value_heads", "2" },
        { "linear_key_head_dim", "8" }, { "linear_value_head_dim", "8" },
        { "num_mtp_layers", "1" }, { NULL, NULL }
    };
    static const char *const dense[][2] = {
        { "layers", "2" }, { "hidden", "32" }, { "heads", "2" }, { "kv_heads", "1" },
        { "head_dim", "16" }, { "rotary_dim", "16" }, { "intermediate_size", "24" },
        { "vocab", "270" }, { "context", "600" }, { "num_labels", "3" }, { NULL, NULL }
    };
    base[0] = make_file("g1", hybrid, Q3N_TYPE_F32);
    base[1] = make_file("g1", hybrid, Q3N_TYPE_Q8);
    base[2] = make_file("qwen3-0.6b", dense, Q3N_TYPE_Q4);
    base[3] = make_file("qwen3-0.6b", dense, Q3N_TYPE_BF16);
}

/* A copy of a good file with up to seven changes, signed unless the fuzzer wants it not. */
static file changed_file(input *in)
{
    const unsigned how = take(in);
    const file *from = &base[how % N_FILES];
    file f = { NULL, from->bytes };
    require(posix_memalign((void **)&f.data, 64, f.bytes) == 0, "no memory");
    memcpy(f.data, from->data, f.bytes);
    const size_t meta = (size_t)q3n__load_u64(f.data + 24);
    for (unsigned i = 0; i < (how >> 2) % 8; i++) {
        static const uint32_t odd[] = { 0, 1, 255, 65535, 0x7FFFFFFF, 0x80000000u, 0xFFFFFFFFu,
                                        0x7FC00000 };
        const unsigned kind = take(in), at = take2(in), value = take(in);
        uint8_t *p = f.data + at % (kind & 8 ? f.bytes : meta);
        const size_t left = (size_t)(f.data + f.bytes - p), n = left < 4 ? left : 4;
        if (kind % 4 == 0) *p = (uint8_t)value;
        if (kind % 4 == 1) *p ^= (uint8_t)(1u << value % 8);
        if (kind % 4 == 2) memcpy(p, &odd[value % 8], n);
        if (kind % 4 == 3) *p = (uint8_t)(*p + (value & 1 ? 1 : -1));
    }
    if (how & 0x20 && how & 0x40) f.bytes = f.bytes * take(in) / 256;
    if (how & 0x80) return f;
    sign(&f);
    return f;
}

/* ---- What the calls work on ---- */
#define N_SESSIONS 3

typedef struct {
    input          *in;
    const q3n_model *m;
    int             vocab, tokens_left;
    q3n_session    *s[N_SESSIONS];
    q3n_snapshot   *snap;
    q3n_cache      *cache;
    q3n_engine     *batch;
    q3n_engine_options own;               /* of the engine of the session that is made next */
    q3n_sampler    *sampler;
    int32_t         last;                 /* token */
    file            saved;                /* by q3n_session_save_to */
    float          *row;                  /* [4, vocab] */
} world;

static void check_session(const q3n_session *s, q3n_result r, int length)
{
    if (r == Q3N_OK) return;
    require(q3n_session_length(s) == length, "a failed call changed the session");
    check_error(q3n_session_error(s), r);
}

/* Tokens that may be evaluated, some of them no tokens; *n of them, as many as are left. */
static const int32_t *take_tokens(world *w, int *n, int32_t room[64])
{
    const unsigned kind = take(w->in);
    *n = (int)(kind % 40);
    if (*n > w->tokens_left) *n = w->tokens_left;
    w->tokens_left -= *n;
    for (int i = 0; i < *n; i++)
        room[i] = kind & 0x80 ? (int32_t)((unsigned)i % 5 * 7) % w->vocab
                              : (int32_t)(take(w->in) % (unsigned)w->vocab);
    if (kind == 0x7f) room[0] = w->vocab;
    return room;
}

static q3n_session_options take_session_options(world *w)
{
    input *in = w->in;
    q3n_session_options o = Q3N_INIT(q3n_session_options);
    o.capacity = take_count(in, 400);
    w->own = one_thread;
    w->own.batch_size = take_int(in, 40);
    o.engine_options = &w->own;
    const int isa = take_int(in, N_ISAS + 2);                /* AUTO, those of the list, none */
    w->own.isa = isa > N_ISAS ? (q3n_isa)77 : isa_at(isa - 1);
    const unsigned flags = take(in);
    if (flags & 1) w->own.isa = Q3N_ISA_SCALAR;
    o.count_experts = flags >> 1 & 1;
    if (flags & 4) o.cache = w->cache;
    if (flags & 8) o.snapshot_bytes = 1000u * take(in);
    if (flags & 16) o.snapshot_every = take_count(in, 20);
    if (flags & 32) o.engine = w->batch;
    if (o.engine && !(flags & 128)) o.engine_options = NULL;        /* both are an error */
    o.kv_type = (q3n_type)take_int(in, Q3N_TYPE_COUNT + 1);
    o.snapshot_type = flags & 64 ? Q3N_TYPE_BF16 : Q3N_TYPE_F32;
    o.speculate = (q3n_speculate)take_int(in, Q3N_SPECULATE_COUNT + 1);
    o.draft = take_count(in, 4);
    return o;
}

/* ---- Calls ---- */
static void call_create(world *w, q3n_session **s)
{
    q3n_error err = { Q3N_OK, -1, "" };
    const q3n_session_options o = take_session_options(w);
    q3n_session_destroy(*s);
    *s = NULL;
    const size_t bytes = q3n_session_bytes(w->m, &o, NULL);
    if (bytes > MAX_SESSION_BYTES) return;
    const q3n_result r = q3n_session_create(s, w->m, &o, &err);
    require((r == Q3N_OK) == (*s != NULL), "result and session disagree");
    if (r != Q3N_OK) check_error(&err, r);
}

static void call_eval(world *w, q3n_session *s)
{
    int32_t room[64];
    int n;
    const unsigned kind = take(w->in);
    const int length = q3n_session_length(s);
    const int32_t *tokens = take_tokens(w, &n, room);
    float *rows = kind & 8 && n <= 4 ? w->row : NULL;
    const q3n_outputs out = { .size = sizeof out, .logits = w->row, .all_logits = rows };
    int reused = 0;
    q3n_result r = kind % 4 == 0 ? q3n_session_eval(s, tokens, n, kind & 4 ? w->row : NULL)
                 : kind % 4 == 1 ? q3n_session_eval_outputs(s, tokens, n, &out)
                 : kind % 4 == 2 ? q3n_session_prefill(s, tokens, n, w->row, &reused)
                                 : q3n_session_reuse(s, tokens, n, &reused);
    if (kind % 4 < 2 && r == Q3N_OK)
        require(q3n_session_length(s) == length + n, "a call that went well has another length");
    check_session(s, r, length);
}

static void call_next(world *w, q3n_session *s)
{
    int32_t tokens[8];
    int n = 0;
    const int length = q3n_session_length(s), max = 1 + take_int(w->in, 8);
    if (w->tokens_left < 16) return;
    w->tokens_left -= 9;
    const q3n_result r = q3n_session_decode(s, w->last, tokens, max, &n);
    check_session(s, r, length);
    if (r != Q3N_OK) return;
    require(n >= 1 && n <= max && q3n_session_length(s) == length + n, "drafts miscounted");
    for (int i = 0; i < n; i++)
        require(tokens[i] >= 0 && tokens[i] < w->vocab, "a token beyond the vocabulary");
    w->last = tokens[n - 1];
}

static void call_state(world *w, q3n_session *s)
{
    int32_t tokens[64];
    float scores[64];
    const int length = q3n_session_length(s), n = take_count(w->in, 8);
    q3n_result r = Q3N_OK;
    double log_probs[8];
    const q3n_embed_options eo = { .size = sizeof eo, .pooling = (q3n_pooling)(n % 4),
                                   .raw = n & 1 };
    switch (take_int(w->in, 12)) {
    case 0: r = q3n_session_rewind(s, take_count(w->in, length)); break;
    case 1: q3n_snapshot_free(w->snap);
            w->snap = NULL;
            r = q3n_session_snapshot(s, &w->snap);
            break;
    case 2: if (w->snap) {
                r = q3n_session_restore(s, w->snap);
                if (r == Q3N_OK) require(q3n_session_length(s) == q3n_snapshot_length(w->snap),
                                         "restored to another length");
                require(q3n_snapshot_bytes(w->snap) > 0, "a snapshot of nothing");
            }
            break;
    case 3: r = q3n_session_checkpoint(s); break;
    case 4: q3n_session_reset(s); break;
    case 5: r = q3n_session_logits(s, w->row); break;
    case 6: r = q3n_session_tokens(s, n, 5, tokens); break;
    case 7: if (length > 0 && w->tokens_left > 8)
                r = q3n_session_draft(s, w->last, tokens, n, w->row);
            break;
    case 8: q3n_session_cancel(s); break;                 /* nothing is under way */
    case 9:
        if (w->tokens_left < 8) break;
        for (int i = 0; i < 8; i++) tokens[i] = i * n % w->vocab;
        w->tokens_left -= 8;
        r = q3n_session_score(s, tokens, n < 8 ? n : 8, log_probs);
        if (r != Q3N_OK) check_session(s, r, length);
        else require(!(log_probs[n < 8 ? n - 1 : 7] > 0.0), "a probability above one");
        return;
    case 10:
        if (q3n_model_hidden_size(w->m) > 4 * w->vocab || w->tokens_left < 8) break;
        for (int i = 0; i < 8; i++) tokens[i] = i;
        w->tokens_left -= 8;
        r = q3n_session_embed(s, tokens, n < 8 ? n : 8, &eo, w->row);
        if (r != Q3N_OK) check_session(s, r, length);
        return;
    default:
        if (q3n_model_config(w->m)->num_labels > 64 || w->tokens_left < 8) break;
        for (int i = 0; i < 8; i++) tokens[i] = i;
        w->tokens_left -= 8;
        r = q3n_session_classify(s, tokens, n < 8 ? n : 8, scores);
        if (r != Q3N_OK) check_error(q3n_session_error(s), r);   /* its text may be gone */
        return;
    }
    if (r != Q3N_OK && r != Q3N_ERR_ARG) check_session(s, r, length);
    require(q3n_session_length(s) <= q3n_session_capacity(s), "longer than it may be");
}

static int save_bytes(void *user, const void *data, size_t bytes)
{
    file *f = (file *)user;
    uint8_t *more = (uint8_t *)realloc(f->data, f->bytes + bytes + 1);
    if (!more) return 1;
    f->data = more;
    memcpy(f->data + f->bytes, data, bytes);
    f->bytes += bytes;
    return f->bytes > (size_t)8 << 20;
}

static int load_bytes(void *user, void *data, size_t bytes)
{
    file *f = (file *)user;
    if (bytes > f->bytes) return 1;
    memcpy(data, f->data, bytes);
    f->data += bytes;
    f->bytes -= bytes;
    return 0;
}

static void call_files(world *w, q3n_session *s)
{
    const unsigned kind = take(w->in);
    const int length = q3n_session_length(s);
    if (kind & 1) {
        const q3n_sink sink = { save_bytes, &w->saved };
        w->saved.bytes = 0;
        check_session(s, q3n_session_save_to(s, &sink), length);
        return;
    }
    if (!w->saved.data) return;
    file f = w->saved;
    const size_t at = take2(w->in);
    if (kind & 2 && f.bytes > 0) f.data[at % f.bytes] ^= (uint8_t)(1u << kind % 8);
    const q3n_source source = { load_bytes, &f };
    check_session(s, q3n_session_load_from(s, &source), length);
}

static void call_fork(world *w, int from)
{
    q3n_error err = { Q3N_OK, -1, "" };
    q3n_session **to = &w->s[(from + 1) % N_SESSIONS];
    q3n_session_destroy(*to);
    *to = NULL;
    const q3n_session_options o = take_session_options(w);
    const int own = take_int(w->in, 2);
    if (own && q3n_session_bytes(w->m, &o, NULL) > MAX_SESSION_BYTES) return;
    const q3n_result r = q3n_session_fork(to, w->s[from], own ? &o : NULL, &err);
    if (r != Q3N_OK) check_error(&err, r);
    else require(q3n_session_length(*to) == q3n_session_length(w->s[from]), "a fork differs");
}

static void call_batch(world *w)
{
    int32_t tokens[N_SESSIONS][64];
    q3n_engine_item items[N_SESSIONS];
    int n = 0, lengths[N_SESSIONS];
    if (!w->batch) return;
    for (int i = 0; i < N_SESSIONS; i++) {
        if (!w->s[i]) continue;
        lengths[i] = q3n_session_length(w->s[i]);
        if (q3n_session_engine(w->s[i]) != w->batch && take(w->in) < 250) continue;
        items[n].size = sizeof items[n];
        items[n].session = w->s[take(w->in) < 250 ? i : 0];
        if (!items[n].session) items[n].session = w->s[i];
        items[n].tokens = take_tokens(w, &items[n].n, tokens[n]);
        items[n].done = 0;
        items[n].logits = take_int(w->in, 2) ? w->row + (size_t)n * (size_t)w->vocab : NULL;
        n++;
    }
    const q3n_limit limit = { .size = sizeof limit, .max_tokens = take_count(w->in, 20),
                              .max_microseconds = take_int(w->in, 3) ? 0 : 100 };
    if (take(w->in) > 240) q3n_engine_cancel(w->batch);
    const q3n_result r = q3n_engine_eval(w->batch, items, n, take_int(w->in, 2) ? &limit : NULL);
    if (r == Q3N_OK) return;
    check_error(q3n_engine_error(w->batch), r);
    for (int i = 0; i < n; i++) require(items[i].done == 0, "a failed batch has done something");
    for (int i = 0; i < N_SESSIONS; i++)
        if (w->s[i]) require(q3n_session_length(w->s[i]) == lengths[i], "a failed batch went on");
}

static float take_real(input *in)
{
    static const float odd[] = { 0.0f, 1.0f, 0.5f, -1.0f, 1e-9f, 1e30f, NAN, INFINITY };
    const unsigned k = take(in);
    return k < 64 ? odd[k % 8] : (float)(k - 64) / 128.0f;
}

/* Masks by the token before, now and then everything. */
static void mask(void *user, float *logits, int n_vocab, const int32_t *tokens, int n_tokens)
{
    const int last = n_tokens ? tokens[n_tokens - 1] : 0;
    for (int i = 0; i < n_vocab; i++)
        if ((i + last) % 5 == 0 || last % 11 == 7) logits[i] = -INFINITY;
    require(last >= 0 && last < n_vocab && user, "the hook is told of a strange token");
}

static void call_sampler(world *w, q3n_session *s)
{
    q3n_error err = { Q3N_OK, -1, "" };
    q3n_sampler_options o = Q3N_INIT(q3n_sampler_options);
    o.temperature = take_real(w->in);
    o.top_k = take_count(w->in, 60);
    o.top_p = take_real(w->in);
    o.min_p = take_real(w->in);
    o.repetition_penalty = take_real(w->in);
    o.penalty_window = take_count(w->in, 9);
    const int kind = take_int(w->in, 4);
    if (kind == 1) o.logits_hook = (q3n_logits_hook){ mask, w };
    if (s) {
        const q3n_result set = q3n_session_set_sampler(s, kind ? &o : NULL);
        if (set != Q3N_OK) check_error(q3n_session_error(s), set);
        q3n_sampler_seed(q3n_session_sampler(s), (uint64_t)kind);
    }
    q3n_sampler_destroy(w->sampler);
    w->sampler = NULL;
    const q3n_result r = q3n_sampler_create(&w->sampler, w->m, &o, &err);
    if (r != Q3N_OK) check_error(&err, r);
}

static void call_sample(world *w)
{
    if (!w->sampler) return;
    for (int i = 0; i < w->vocab; i++) w->row[i] = take_real(w->in) * 9.0f;
    if (take_int(w->in, 4) == 0) q3n_sampler_accept(w->sampler, take_count(w->in, w->vocab));
    if (take_int(w->in, 16) == 0) q3n_sampler_reset(w->sampler);
    int32_t token = 0;
    const q3n_result r = q3n_sampler_sample(w->sampler, w->row, &token);
    if (r != Q3N_OK) {
        check_error(q3n_sampler_error(w->sampler), r);
        return;
    }
    require(token >= 0 && token < w->vocab && w->row[token] > -INFINITY, "a token that may not be");
    w->last = token;
}

static void call_text(world *w)
{
    char text[96], back[512];
    int32_t ids[96];
    size_t n = 0, n_back = 0, bytes = take(w->in) % sizeof text;
    for (size_t i = 0; i < bytes; i++) text[i] = (char)take(w->in);
    static const char known[] = "hello e\xcc\x81x<|end|> <s> ab";
    if (take_int(w->in, 2)) {
        memcpy(text, known, sizeof known);
        if (bytes < sizeof known) bytes = sizeof known;
    }
    const q3n_result r = q3n_tokenize(w->m, text, bytes, take_int(w->in, 3), ids, 96, &n);
    if (r != Q3N_OK) return;
    require(n <= bytes + 1, "more ids than bytes");
    for (size_t i = 0; i < n; i++)
        require(ids[i] >= 0 && ids[i] < q3n_model_n_tokens(w->m), "an id without a text");
    q3n_detokenize(w->m, ids, n, back, sizeof back, &n_back);
    q3n_detokenizer decoder = { { 0 }, 0, take_int(w->in, 2) };
    for (size_t i = 0; i < n; i++) {
        q3n_detokenizer_next(&decoder, w->m, ids[i], back, sizeof back, &n_back);
        q3n_token_is_special(w->m, ids[i]);
    }
    q3n_detokenizer_next(&decoder, w->m, (int32_t)take2(w->in) - 9, back, take(w->in), &n_back);
    q3n_detokenizer_finish(&decoder, back, &n_back);
}

static void call_open_others(world *w)
{
    q3n_error err = { Q3N_OK, -1, "" };
    q3n_result r;
    q3n_cache_stats stats = Q3N_INIT(q3n_cache_stats);
    for (int i = 0; i < N_SESSIONS; i++) {                  /* they may use what goes */
        q3n_session_destroy(w->s[i]);
        w->s[i] = NULL;
    }
    if (take_int(w->in, 2)) {
        const q3n_cache_options o = { .size = sizeof o, .max_bytes = 512u * take2(w->in) };
        if (w->cache) q3n_cache_stats_get(w->cache, &stats);
        q3n_cache_destroy(w->cache);
        r = q3n_cache_create(&w->cache, w->m, &o, &err);
    } else {
        take_session_options(w);
        q3n_engine_destroy(w->batch);
        w->batch = NULL;
        if (q3n_engine_bytes(w->m, &w->own) > MAX_SESSION_BYTES) return;
        r = q3n_engine_create(&w->batch, w->m, &w->own, &err);
    }
    if (r != Q3N_OK) check_error(&err, r);
}

/* Geometry by words, files in memory of what is small, rows in every type. */
static void call_make(world *w)
{
    q3n_config c = *q3n_model_config(w->m);
    q3n_error err = { Q3N_OK, -1, "" };
    char value[8] = { 0 }, text[64];
    for (int i = 0; i < 5; i++) value[i] = (char)(' ' + take_int(w->in, 95));
    if (take_int(w->in, 2)) snprintf(value, sizeof value, "%d", take_int(w->in, 256));
    const char *field = q3n_config_field(&c, take_int(w->in, 48), text);
    q3n_result r = q3n_config_set(&c, field ? field : value, value, &err);
    if (r != Q3N_OK) check_error(&err, r);
    if ((r = q3n_config_check(&c, &err)) != Q3N_OK) {
        check_error(&err, r);
        return;
    }
    const q3n_init_options o = { .size = sizeof o,
                                 .type = (q3n_type)take_int(w->in, Q3N_TYPE_COUNT), .n_threads = 1,
                                 .name = value };
    const int64_t bytes = q3n_init_bytes(&c, &o, &err);
    void *data = NULL;
    if (bytes <= 0 || bytes > 300000 || posix_memalign(&data, 64, (size_t)bytes) != 0) return;
    r = q3n_init_memory(data, (size_t)bytes, &c, &o, &err);
    if (r != Q3N_OK) check_error(&err, r);
    q3n_model *m = NULL;
    if (r == Q3N_OK) {
        r = q3n_model_open_memory(&m, data, (size_t)bytes, NULL, &err);
        if (r != Q3N_OK) require(0, err.message);
        require(q3n_model_verify(m, NULL, &err) == Q3N_OK, "a new file is damaged");
    }
    q3n_model_close(m);
    free(data);
}

static void call_quantise(world *w)
{
    float x[3 * 70];
    uint8_t out[16 * 2 * 68 + 16 * 280];
    const int rows = take_int(w->in, 4), cols = take_int(w->in, 71);
    q3n_error err = { Q3N_OK, -1, "" };
    for (int i = 0; i < rows * cols; i++) x[i] = take_real(w->in);
    const q3n_type type = (q3n_type)take_int(w->in, Q3N_TYPE_COUNT + 1);
    const q3n_rows r = { x, rows, cols, NULL };
    const int64_t bytes = q3n_type_bytes(type, rows, cols);
    require(bytes <= (int64_t)sizeof out, "more bytes than there can be");
    const q3n_result result = q3n_quantize_rows(type, &r, out, (size_t)bytes, &err);
    if (result != Q3N_OK) check_error(&err, result);
}

static void look_through(const q3n_model *m)
{
    q3n_error err;
    q3n_model_stats stats = Q3N_INIT(q3n_model_stats);
    size_t bytes;
    int n = 0;
    for (int i = 0; i < q3n_model_n_tensors(m); i++) {
        const q3n_tensor *t = q3n_model_tensor(m, i);
        require(t != NULL, "a tensor of the table is not there");
        require(q3n_model_find_tensor(m, t->name) == t, "another tensor is found, or none");
    }
    for (int32_t id = -1; id <= q3n_model_n_tokens(m) && id < 300; id++)
        q3n_token_text(m, id, &bytes);
    const int32_t *eos = q3n_model_eos_ids(m, &n);
    for (int i = 0; i < n; i++) require(q3n_model_is_eos(m, eos[i]), "an EOS id is none");
    require(strlen(q3n_model_name(m)) < 256 && strlen(q3n_model_chat_kind(m)) < 32, "a long name");
    q3n_model_stats_get(m, &stats);
    if (q3n_model_verify(m, NULL, &err) != Q3N_OK) check_error(&err, err.code);
}

static void walk(world *w)
{
    for (int i = 0; i < MAX_CALLS && w->in->p < w->in->end; i++) {
        const unsigned what = take(w->in);
        const int k = (int)(what >> 4) % N_SESSIONS;
        q3n_session *s = w->s[k];
        switch (what % 16) {
        case 0: case 1: call_create(w, &w->s[k]); break;
        case 2: case 3: case 4: if (s) call_eval(w, s); break;
        case 5: case 6: if (s) call_next(w, s); break;
        case 7: case 8: if (s) call_state(w, s); break;
        case 9: if (s) call_files(w, s); break;
        case 10: if (s) call_fork(w, k); break;
        case 11: call_batch(w); break;
        case 12: call_sampler(w, s); call_sample(w); break;
        case 13: call_text(w); break;
        case 14: call_open_others(w); break;
        default: if (what & 16) call_make(w); else call_quantise(w); break;
        }
    }
}

static void close_all(world *w)
{
    for (int i = 0; i < N_SESSIONS; i++) q3n_session_destroy(w->s[i]);
    q3n_snapshot_free(w->snap);
    q3n_engine_destroy(w->batch);
    if (w->cache) q3n_cache_clear(w->cache);
    q3n_cache_destroy(w->cache);
    q3n_sampler_destroy(w->sampler);
    free(w->saved.data);
    free(w->row);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (!base[0].data) make_files();
    input in = { data, data + bytes };
    memory mem = { 0, 0, 0, 0 };
    file f = changed_file(&in);
    const unsigned failing = take(&in);
    if (failing & 1) mem.fail_after = 1 + failing / 2;
    const q3n_model_options o = { .size = sizeof o,
                                  .allocator = { memory_alloc, memory_free, &mem } };
    q3n_error err = { Q3N_OK, -1, "" };
    q3n_model *m = NULL;
    const q3n_result r = q3n_model_open_memory(&m, f.data, f.bytes, &o, &err);
    require((r == Q3N_OK) == (m != NULL), "result and model disagree");
    if (m) {
        q3n_model_stats stats = Q3N_INIT(q3n_model_stats);
        q3n_model_stats_get(m, &stats);
        world w = { .in = &in, .m = m, .vocab = q3n_model_config(m)->vocab_size,
                    .tokens_left = MAX_TOKENS };
        look_through(m);
        if (w.vocab <= MAX_VOCAB && stats.n_weights_active <= MAX_WEIGHTS) {
            w.row = (float *)malloc(4 * (size_t)w.vocab * sizeof *w.row);
            require(w.row != NULL, "no memory");
            mem.n_calls = 0;
            mem.fail_after = failing & 2 ? 1 + failing / 4 : 0;
            mem.every = failing & 4 ? 2 + failing / 8 : 0;
            walk(&w);
        }
        close_all(&w);
        q3n_model_close(m);
    } else {
        check_error(&err, r);
        require(err.offset >= -1 && err.offset <= (int64_t)f.bytes, "an offset outside the file");
    }
    require(mem.live == 0, "memory was not given back");
    free(f.data);
    return 0;
}

#ifdef Q3N_FUZZ_REPLAY

int main(void)
{
    uint32_t state = 1;
    enum { INPUTS = 2000 };
    for (int i = 0; i < INPUTS; i++) {
        uint8_t data[400];
        const size_t n = 16 + next_random(&state) % (sizeof data - 16);
        for (size_t k = 0; k < n; k++) data[k] = (uint8_t)(next_random(&state) >> 8);
        if (i % 3 != 0) data[0] &= 0x03;         /* the file as it is */
        if (i % 2 != 0) data[i % 3 ? 1 : 0] &= 0xF8;   /* memory holds out, mostly */
        LLVMFuzzerTestOneInput(data, n);
    }
    for (int i = 0; i < N_FILES; i++) free(base[i].data);
    printf("%d inputs, replayed\n", INPUTS);
    return 0;
}

#endif
