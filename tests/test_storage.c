/* test_storage.c - session files and the prefix cache, with snapshots made by hand: what is written
 * comes back, for every model, cache type and length; damaged and hostile files give errors, and
 * leave nothing; the cache keeps its budget, finds the longest prefix, and shares a directory. */
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE 1     /* mkdtemp */
#endif
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define Q3N_IMPLEMENTATION
#include "qwen3next.h"
#include "golden.h"
#include "random.h"
#include "sign.h"

#include <signal.h>
#include <sys/resource.h>
#include <utime.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* ---- The host: an allocator that counts and fails, a logger that counts ---- */
typedef struct {
    q3n__atomic calls, live, live_bytes;
    int64_t     fail_at;         /* number of the call that fails, 0 = none                      */
    q3n__atomic warnings;
    char        last[500];       /* written only where one thread logs                           */
} host;

static void *host_alloc(void *user, size_t bytes)
{
    host *h = (host *)user;
    if (q3n__atomic_add(&h->calls, 1) + 1 == h->fail_at) return NULL;
    void *p = malloc(bytes);
    if (!p) return NULL;
    memset(p, 0xC7, bytes);      /* what is not initialised shows */
    q3n__atomic_add(&h->live, 1);
    q3n__atomic_add(&h->live_bytes, (int64_t)bytes);
    return p;
}

static void host_free(void *user, void *memory, size_t bytes)
{
    host *h = (host *)user;
    q3n__atomic_add(&h->live, -1);
    q3n__atomic_add(&h->live_bytes, -(int64_t)bytes);
    memset(memory, 0x9D, bytes);
    free(memory);
}

static void host_log(void *user, q3n_log_level level, const char *message)
{
    host *h = (host *)user;
    if (level == Q3N_LOG_WARNING && q3n__atomic_add(&h->warnings, 1) == 0)
        snprintf(h->last, sizeof h->last, "%s", message);
}

static q3n_model *open_model(host *h, const char *name)
{
    char path[512];
    q3n_error err;
    q3n_model *m = NULL;
    q3n_model_options o = Q3N_INIT(q3n_model_options);
    memset(h, 0, sizeof *h);
    o.allocator.alloc = host_alloc;
    o.allocator.free = host_free;
    o.allocator.user = h;
    snprintf(path, sizeof path, "%s/%s.q3n", Q3N_TEST_MODELS, name);
    if (q3n_model_open(&m, path, &o, &err) != Q3N_OK) fail_msg("%s", err.message);
    return m;
}

/* Closes the model; nothing of it may be left. */
static void close_model(host *h, q3n_model *m)
{
    q3n_model_close(m);
    assert_int_equal(h->live, 0);
    assert_int_equal(h->live_bytes, 0);
}

/* ---- Snapshots by hand ---- */

/* A small shape for tests that look at every byte: the model is only asked what it is. */
static q3n__shape small_shape(q3n_type kv_type)
{
    q3n__shape s;
    memset(&s, 0, sizeof s);
    s.kv_type = kv_type;
    s.n_kv_layers = 1;
    s.n_kv_heads = 1;
    s.head_dim = 2;
    s.page_bytes = Q3N__PAGE_HEAD + q3n__kv_block_bytes(kv_type, 2);
    s.delta_len = 37;
    s.conv_len = 5;
    s.hidden_size = 7;
    s.vocab_size = 1000;
    return s;
}

static void fill(void *data, size_t bytes, uint32_t *state)
{
    uint8_t *p = (uint8_t *)data;
    for (; bytes >= 4; bytes -= 4, p += 4) {
        const uint32_t x = next_random(state);
        memcpy(p, &x, 4);
    }
    while (bytes--) *p++ = (uint8_t)next_random(state);
}

/* Token i of text number `text`: texts 10 a + b have the first 300 tokens in common for one a. */
static int32_t token_at(int text, int i)
{
    const uint32_t seed = (uint32_t)(i < 300 ? text / 10 : text) + 1;
    return (int32_t)((seed * 2654435761u + (uint32_t)i * 40503u) % 53);
}

static void tokens_of(int text, int32_t *tokens, int n)
{
    for (int i = 0; i < n; i++) tokens[i] = token_at(text, i);
}

/* Every number follows from the text; what lies after the last token is `rubbish`.  Full pages are
 * shared with `from`, if that is not NULL: a snapshot of the same text. */
static q3n_snapshot *make_snapshot(const q3n_model *m, const q3n__shape *shape, q3n_type delta_type,
                                   int text, int length, const q3n_snapshot *from)
{
    static q3n__atomic counter;
    const int rubbish = (int)q3n__atomic_add(&counter, 1) & 255;
    const int origin = length <= 300 ? text / 10 * 10 : text;
    q3n_snapshot *s = q3n__snapshot_alloc(m, shape, delta_type, length, 0);
    if (!s) return NULL;
    uint32_t state = (uint32_t)(origin * 7919 + length + 1);
    fill(s->delta, shape->delta_len * (size_t)q3n__types[delta_type].block_bytes, &state);
    fill(s->conv, shape->conv_len * sizeof *s->conv, &state);
    fill(s->hidden, (size_t)shape->hidden_size * sizeof *s->hidden, &state);
    fill(s->logits, (size_t)shape->vocab_size * sizeof *s->logits, &state);
    s->has_hidden = length > 0;
    s->has_logits = length > 0 && length % 2;
    for (int i = 0; i < s->n_pages; i++) {
        const int used = length - i * Q3N__KV_BLOCK < Q3N__KV_BLOCK ? length - i * Q3N__KV_BLOCK
                                                                    : Q3N__KV_BLOCK;
        if (from && i < from->n_pages && used == Q3N__KV_BLOCK
            && from->length >= (i + 1) * Q3N__KV_BLOCK) {
            s->page[i] = from->page[i];
            q3n__page_retain(s->page[i]);
            continue;
        }
        q3n__page *whole = q3n__page_alloc(m, shape);
        s->page[i] = whole ? q3n__page_alloc(m, shape) : NULL;
        if (!s->page[i]) {
            q3n__page_release(m, whole);
            q3n__snapshot_release(s);
            return NULL;
        }
        state = (uint32_t)(origin * 31 + i + 1);
        fill((uint8_t *)whole + Q3N__PAGE_HEAD, shape->page_bytes - Q3N__PAGE_HEAD, &state);
        for (int t = 0; t < used; t++) whole->tokens[t] = token_at(text, i * Q3N__KV_BLOCK + t);
        memset((uint8_t *)s->page[i] + Q3N__PAGE_HEAD, rubbish, shape->page_bytes - Q3N__PAGE_HEAD);
        memset(s->page[i]->tokens, rubbish, sizeof s->page[i]->tokens);
        q3n__page_copy(shape, s->page[i], whole, used);
        q3n__page_release(m, whole);
    }
    return s;
}

static q3n_snapshot *new_snapshot(const q3n_model *m, const q3n__shape *shape, q3n_type delta_type,
                                  int text, int length)
{
    q3n_snapshot *s = make_snapshot(m, shape, delta_type, text, length, NULL);
    assert_non_null(s);
    return s;
}

/* The snapshot with the state of a sampler that remembers n tokens, in its place. */
static q3n_snapshot *with_sampler(q3n_snapshot *s, int n)
{
    const q3n__shape *h = &s->shape;
    q3n_snapshot *t = q3n__snapshot_alloc(s->model, h, s->delta_type, s->length, 1 + n);
    assert_non_null(t);
    memcpy(t->delta, s->delta, h->delta_len * (size_t)q3n__types[s->delta_type].block_bytes);
    memcpy(t->conv, s->conv, h->conv_len * sizeof *s->conv);
    memcpy(t->hidden, s->hidden, (size_t)h->hidden_size * sizeof *s->hidden);
    memcpy(t->logits, s->logits, (size_t)h->vocab_size * sizeof *s->logits);
    t->has_hidden = s->has_hidden;
    t->has_logits = s->has_logits;
    t->mtp_first = s->mtp_first;
    for (int i = 0; i < s->n_pages; i++) q3n__page_retain(t->page[i] = s->page[i]);
    t->sampler->rng = UINT64_C(0x0123456789abcdef) + (uint64_t)n;
    for (int i = 0; i < n; i++) t->sampler->window[i] = token_at(n, i);
    q3n__snapshot_release(s);
    return t;
}

static void check_same(const q3n_snapshot *a, const q3n_snapshot *b)
{
    const q3n__shape *h = &a->shape;
    assert_int_equal(a->length, b->length);
    assert_int_equal(a->delta_type, b->delta_type);
    assert_int_equal(a->has_hidden, b->has_hidden);
    assert_int_equal(a->has_logits, b->has_logits);
    assert_int_equal(a->bytes, b->bytes);
    assert_int_equal(a->n_sampler, b->n_sampler);
    if (a->n_sampler)
        assert_memory_equal(a->sampler, b->sampler, q3n__sampler_state_bytes(a->n_sampler));
    assert_memory_equal(a->delta, b->delta,
                        h->delta_len * (size_t)q3n__types[a->delta_type].block_bytes);
    assert_memory_equal(a->conv, b->conv, h->conv_len * sizeof *a->conv);
    if (a->has_hidden)
        assert_memory_equal(a->hidden, b->hidden, (size_t)h->hidden_size * sizeof *a->hidden);
    if (a->has_logits)
        assert_memory_equal(a->logits, b->logits, (size_t)h->vocab_size * sizeof *a->logits);
    uint8_t *clean[2];
    for (int k = 0; k < 2; k++) assert_non_null(clean[k] = (uint8_t *)calloc(1, h->page_bytes));
    for (int i = 0; i < a->n_pages; i++) {
        const int used = a->length - i * Q3N__KV_BLOCK < Q3N__KV_BLOCK
                       ? a->length - i * Q3N__KV_BLOCK : Q3N__KV_BLOCK;
        for (int k = 0; k < 2; k++) {
            memset(clean[k], 0, h->page_bytes);
            q3n__page_copy(h, (q3n__page *)(void *)clean[k], (k ? b : a)->page[i], used);
        }
        assert_memory_equal(clean[0], clean[1], h->page_bytes);
    }
    for (int k = 0; k < 2; k++) free(clean[k]);
}

/* ---- Bytes in memory as sink and source ---- */
typedef struct {
    uint8_t *data;
    size_t   bytes, room, at;
    int      calls, fail_at;     /* call number, from 1, that fails; 0 = none                    */
} bytes_io;

static int write_bytes(void *user, const void *data, size_t bytes)
{
    bytes_io *b = (bytes_io *)user;
    if (++b->calls == b->fail_at) return 1;
    if (b->bytes + bytes > b->room) {
        b->room = 2 * (b->bytes + bytes);
        b->data = (uint8_t *)realloc(b->data, b->room);
        if (!b->data) return 1;
    }
    memcpy(b->data + b->bytes, data, bytes);
    b->bytes += bytes;
    return 0;
}

static int read_bytes(void *user, void *data, size_t bytes)
{
    bytes_io *b = (bytes_io *)user;
    if (++b->calls == b->fail_at || bytes > b->bytes - b->at) return 1;
    memcpy(data, b->data + b->at, bytes);
    b->at += bytes;
    return 0;
}

static bytes_io written(const q3n_snapshot *s)
{
    bytes_io b = { 0 };
    q3n_error err;
    const q3n_sink sink = { write_bytes, &b };
    if (q3n__snapshot_write(s, &sink, &err) != Q3N_OK) fail_msg("%s", err.message);
    assert_int_equal(b.bytes, q3n__snapshot_file_bytes(s));
    return b;
}

static q3n_result read_back(q3n_snapshot **out, bytes_io *b, const q3n_snapshot *like, int capacity,
                            q3n_error *err)
{
    const q3n_source source = { read_bytes, b };
    b->at = 0;
    b->calls = 0;
    memset(err, 0, sizeof *err);
    const q3n_result r = q3n__snapshot_read(out, like->model, &like->shape, capacity, &source, err);
    assert_true((r == Q3N_OK) == (*out != NULL));
    if (r != Q3N_OK) {
        assert_int_equal(err->code, r);
        assert_true(strlen(err->message) > 10);
    }
    return r;
}

/* ---- Directories ---- */
static char *new_directory(void)
{
    char *path = strdup("/tmp/q3n_storage_XXXXXX");
    assert_non_null(path);
    assert_non_null(mkdtemp(path));
    return path;
}

static int file_count(const char *directory)
{
    int n = 0;
    DIR *d = opendir(directory);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL; ) n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

/* Paths of the directory's files, in order of their names. */
static int list_files(const char *directory, char path[][300], int max)
{
    int n = 0;
    struct dirent **names;
    const int found = scandir(directory, &names, NULL, alphasort);
    assert_true(found >= 0);
    for (int i = 0; i < found; i++) {
        if (names[i]->d_name[0] != '.' && n < max)
            snprintf(path[n++], 300, "%.30s/%.255s", directory, names[i]->d_name);
        free(names[i]);
    }
    free(names);
    return n;
}

static void delete_directory(char *directory)
{
    char path[64][300];
    for (int n; (n = list_files(directory, path, 64)) > 0; )
        for (int i = 0; i < n; i++) assert_int_equal(remove(path[i]), 0);
    assert_int_equal(rmdir(directory), 0);
    free(directory);
}

static void write_file(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, bytes, f), bytes);
    assert_int_equal(fclose(f), 0);
}

/* ---- The hash ---- */

/* From the words of SESSION FILE FORMAT. */
static uint64_t hash_as_written(uint64_t seed, const uint8_t *data, size_t bytes)
{
    uint64_t lane[8], h;
    for (uint64_t i = 0; i < 8; i++) lane[i] = q3n__mix64(seed + 0x9E3779B97F4A7C15u * (i + 1));
    for (size_t at = 0; at < bytes; at += 64) {
        uint64_t word[8] = { 0 };
        memcpy(word, data + at, bytes - at < 64 ? bytes - at : 64);
        for (int i = 0; i < 8; i++) {
            const uint64_t x = (lane[i] ^ word[i]) * 0x9E3779B97F4A7C15u;
            lane[i] = x << 29 | x >> 35;
        }
    }
    h = q3n__mix64(bytes ^ seed);
    for (int i = 0; i < 8; i++) {
        const uint64_t x = (h ^ q3n__mix64(lane[i])) * 0x9E3779B97F4A7C15u;
        h = x << 29 | x >> 35;
    }
    return q3n__mix64(h);
}

static void test_hash(void **state)
{
    (void)state;
    uint8_t data[400];
    uint32_t random = 1;
    fill(data, sizeof data, &random);
    for (size_t n = 0; n <= sizeof data; n++) {
        assert_true(q3n__hash_of(n, data, n) == hash_as_written(n, data, n));
        if (n > 0) assert_true(q3n__hash_of(5, data, n) != q3n__hash_of(5, data, n - 1));
    }
    q3n__hash h;
    q3n__hash_begin(&h, 3);
    q3n__hash_add(&h, data, 64);
    q3n__hash_add(&h, data + 64, 0);
    q3n__hash_add(&h, data + 64, 192);
    q3n__hash_add(&h, data + 256, sizeof data - 256);
    assert_true(q3n__hash_end(&h) == q3n__hash_of(3, data, sizeof data));
    const uint64_t whole = q3n__hash_of(3, data, sizeof data);
    for (size_t bit = 0; bit < 8 * sizeof data; bit++) {
        data[bit / 8] ^= (uint8_t)(1u << bit % 8);
        const uint64_t other = q3n__hash_of(3, data, sizeof data);
        int differ = 0;
        for (int i = 0; i < 64; i++) differ += (int)((whole ^ other) >> i & 1);
        assert_in_range(differ, 8, 56);         /* 32 on average, of standard deviation 4 */
        data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    static const uint8_t zeros[256];
    for (size_t n = 1; n <= sizeof zeros; n++)
        assert_true(q3n__hash_of(0, zeros, n) != q3n__hash_of(0, zeros, n - 1));
}

/* ---- Session files ---- */
static const q3n_type kv_types[] = { Q3N_TYPE_F32, Q3N_TYPE_F16, Q3N_TYPE_BF16, Q3N_TYPE_Q8 };

static void check_round_trip(const q3n_snapshot *s, const char *path)
{
    q3n_snapshot *back;
    q3n_error err;
    bytes_io b = written(s);
    if (read_back(&back, &b, s, s->length ? s->length : 1, &err) != Q3N_OK)
        fail_msg("%s", err.message);
    assert_int_equal(b.at, b.bytes);
    check_same(s, back);
    if (s->n_pages)
        assert_int_equal(back->page[s->n_pages - 1]->n_used, (s->length - 1) % Q3N__KV_BLOCK + 1);
    bytes_io again = written(back);     /* one state has one sequence of bytes */
    assert_int_equal(again.bytes, b.bytes);
    assert_memory_equal(again.data, b.data, b.bytes);
    q3n__snapshot_release(back);
    free(again.data);

    if (q3n__snapshot_save(s, path, &err) != Q3N_OK) fail_msg("%s", err.message);
    if (q3n__snapshot_open(&back, s->model, &s->shape, s->length + 1, path, &err) != Q3N_OK)
        fail_msg("%s", err.message);
    check_same(s, back);
    q3n__snapshot_release(back);
    char *text = golden_read(path);
    assert_memory_equal(text, b.data, b.bytes);
    free(text);
    free(b.data);
}

static void test_round_trip(void **state)
{
    static const int lengths[] = { 0, 1, 255, 256, 257, 600 };
    char path[300], *directory = new_directory();
    snprintf(path, sizeof path, "%s/state", directory);
    host h;
    q3n_model *m = open_model(&h, (const char *)*state);
    for (int type = 0; type < COUNT(kv_types); type++)
        for (int mtp = 0; mtp <= m->config.num_mtp_layers; mtp++)
            for (int i = 0; i < COUNT(lengths); i++) {
                q3n__shape shape;
                q3n__shape_make(m, kv_types[type], mtp, &shape);
                const q3n_type delta_type = i % 2 ? Q3N_TYPE_BF16 : Q3N_TYPE_F32;
                q3n_snapshot *s = new_snapshot(m, &shape, delta_type, 1, lengths[i]);
                if (i % 3) s = with_sampler(s, 30 * i);
                check_round_trip(s, path);
                q3n__snapshot_release(s);
            }
    assert_int_equal(file_count(directory), 1);
    delete_directory(directory);
    close_model(&h, m);
}

static void test_round_trip_small(void **state)
{
    (void)state;
    char path[300], *directory = new_directory();
    snprintf(path, sizeof path, "%s/state", directory);
    host h;
    q3n_model *m = open_model(&h, "qwen3_next");
    for (int type = 0; type < COUNT(kv_types); type++)
        for (int length = 0; length < 520; length += 1 + length / 4)
            for (int bf16 = 0; bf16 < 2; bf16++) {
                const q3n__shape shape = small_shape(kv_types[type]);
                q3n_snapshot *s = new_snapshot(m, &shape, bf16 ? Q3N_TYPE_BF16 : Q3N_TYPE_F32, 4,
                                               length);
                check_round_trip(s, path);
                s = with_sampler(s, length % 5 == 0 ? 0 : length / 2);
                check_round_trip(s, path);
                q3n__snapshot_release(s);
            }
    delete_directory(directory);
    close_model(&h, m);
}

/* A page that is shared may be written after the snapshot's end: nothing of that is in the file,
 * and what is there is not even read (a shared page of a sanitizer's eyes: test_threads). */
static void test_same_bytes(void **state)
{
    (void)state;
    host h;
    q3n_model *m = open_model(&h, "qwen3_next");
    for (int type = 0; type < COUNT(kv_types); type++) {
        const q3n__shape shape = small_shape(kv_types[type]);
        q3n_snapshot *a = new_snapshot(m, &shape, Q3N_TYPE_F32, 2, 300);
        q3n_snapshot *b = new_snapshot(m, &shape, Q3N_TYPE_F32, 2, 300);
        assert_memory_not_equal(a->page[1]->tokens, b->page[1]->tokens, sizeof a->page[1]->tokens);
        bytes_io x = written(a), y = written(b);
        assert_int_equal(x.bytes, y.bytes);
        assert_memory_equal(x.data, y.data, x.bytes);
        free(x.data);
        free(y.data);
        q3n__snapshot_release(a);
        q3n__snapshot_release(b);
    }
    close_model(&h, m);
}

static void test_truncated(void **state)
{
    (void)state;
    host h;
    q3n_error err;
    q3n_snapshot *back;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_Q8);
    q3n_snapshot *s = with_sampler(new_snapshot(m, &shape, Q3N_TYPE_F32, 0, 21), 20);
    bytes_io b = written(s);
    const int64_t live = h.live;
    for (size_t cut = 0; cut < b.bytes; cut++) {
        bytes_io short_one = b;
        short_one.bytes = cut;
        assert_int_equal(read_back(&back, &short_one, s, 100, &err), Q3N_ERR_IO);
        assert_true(err.offset >= 0 && err.offset <= (int64_t)cut);
        assert_int_equal(h.live, live);
    }
    char path[300], *directory = new_directory();
    snprintf(path, sizeof path, "%s/state", directory);
    for (size_t cut = 0; cut <= b.bytes + 1; cut += cut > 200 && cut + 70 < b.bytes ? 61 : 1) {
        uint8_t *longer = (uint8_t *)calloc(1, b.bytes + 1);
        assert_non_null(longer);
        memcpy(longer, b.data, b.bytes);
        write_file(path, longer, cut);
        free(longer);
        const q3n_result r = q3n__snapshot_open(&back, m, &shape, 100, path, &err);
        assert_int_equal(r, cut == b.bytes ? Q3N_OK : cut < 128 ? Q3N_ERR_IO : Q3N_ERR_FORMAT);
        if (r == Q3N_OK) q3n__snapshot_release(back);
        else             assert_non_null(strstr(err.message, path));
        assert_int_equal(h.live, live);
    }
    delete_directory(directory);
    free(b.data);
    q3n__snapshot_release(s);
    close_model(&h, m);
}

static void check_flipped(int n_sampler)
{
    host h;
    q3n_error err;
    q3n_snapshot *back;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);
    q3n_snapshot *s = new_snapshot(m, &shape, Q3N_TYPE_BF16, 0, 21);
    if (n_sampler) s = with_sampler(s, n_sampler - 1);
    bytes_io b = written(s);
    const int64_t live = h.live;
    for (size_t bit = 0; bit < 8 * b.bytes; bit += bit < 8 * 256 ? 1 : 3) {
        b.data[bit / 8] ^= (uint8_t)(1u << bit % 8);
        const q3n_result r = read_back(&back, &b, s, 100, &err);
        if (bit < 8 * 8)       assert_int_equal(r, Q3N_ERR_FORMAT);
        else if (bit < 12 * 8) assert_int_equal(r, Q3N_ERR_UNSUPPORTED);
        else                   assert_int_equal(r, Q3N_ERR_CHECKSUM);
        assert_int_equal(h.live, live);
        b.data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    free(b.data);
    q3n__snapshot_release(s);
    close_model(&h, m);
}

static void test_flipped(void **state)
{
    (void)state;
    check_flipped(0);
    check_flipped(11);
}

/* A field of 4 or 8 bytes is changed and everything signed.  That can be right only for a length
 * with as many pages, for another first token of the MTP module, or for as many tokens of the
 * sampler as take the same room. */
static q3n_result read_changed(const bytes_io *b, const q3n_snapshot *s, size_t at, uint64_t value,
                               q3n_error *err)
{
    const size_t width = at >= 16 && at < 120 && (at < 48 || at >= 96) ? 8 : 4;
    bytes_io changed = *b;
    q3n_snapshot *back;
    changed.data = (uint8_t *)malloc(b->bytes);
    assert_non_null(changed.data);
    memcpy(changed.data, b->data, b->bytes);
    memcpy(changed.data + at, &value, width);
    sign_session(changed.data, changed.bytes);
    const int same = memcmp(changed.data, b->data, b->bytes) == 0;
    const q3n_result r = read_back(&back, &changed, s, 600, err);
    const int length = at == 48 && (uint32_t)value > 256 && (uint32_t)value <= 512;
    const uint32_t last = s->shape.has_mtp ? (uint32_t)s->length : 1;
    const int first = at == 120 && (uint32_t)value >= 1 && (uint32_t)value <= last;
    const uint32_t n_sampler = (uint32_t)value;
    const int sampler = at == 124 && s->n_sampler && n_sampler >= 1 && n_sampler < 100
        && (8 + 4 * (n_sampler - 1) + 63) / 64 == (8 + 4 * ((uint32_t)s->n_sampler - 1) + 63) / 64;
    assert_true((same || length || first || sampler) == (r == Q3N_OK));
    q3n__snapshot_release(back);
    free(changed.data);
    return r;
}

static void check_hostile(int n_sampler)
{
    static const uint64_t values[] = { 0, 1, 2, 3, 4, 5, 6, 7, 255, 256, 257, 599, 600, 601,
                                       1 << 20, 1 << 24, (1 << 24) + 1, (1 << 24) + 2, 0x7fffffff,
                                       0x80000000, 0xfffffffe, 0xffffffff,
                                       (uint64_t)1 << 32, ((uint64_t)1 << 62) - 1,
                                       (uint64_t)1 << 62, (uint64_t)1 << 63, UINT64_MAX - 63,
                                       UINT64_MAX };
    host h;
    q3n_error err;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F16);
    q3n_snapshot *s = new_snapshot(m, &shape, Q3N_TYPE_F32, 0, 301);
    if (n_sampler) s = with_sampler(s, n_sampler - 1);
    bytes_io b = written(s);
    const int64_t live = h.live;
    for (size_t at = 8; at < 128; at += at >= 16 && (at < 48 || at >= 96) ? 8 : 4) {
        if (at == 16) continue;      /* the hash itself */
        for (int i = 0; i < COUNT(values); i++) {
            read_changed(&b, s, at, values[i], &err);
            read_changed(&b, s, at, q3n__load_u32(b.data + at) ^ values[i], &err);
            assert_int_equal(h.live, live);
        }
    }
    assert_int_equal(read_changed(&b, s, 48, 601, &err), Q3N_ERR_FULL);
    assert_non_null(strstr(err.message, "601 tokens"));
    assert_non_null(strstr(err.message, "600"));
    assert_int_equal(read_changed(&b, s, 48, 0x80000000u, &err), Q3N_ERR_FULL);
    assert_int_equal(read_changed(&b, s, 48, 256, &err), Q3N_ERR_FORMAT);
    assert_non_null(strstr(err.message, "file_bytes"));
    assert_int_equal(read_changed(&b, s, 32, 1, &err), Q3N_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "another model"));
    assert_int_equal(read_changed(&b, s, 40, 1, &err), Q3N_ERR_UNSUPPORTED);
    assert_int_equal(read_changed(&b, s, 52, Q3N_TYPE_Q8, &err), Q3N_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "are q8, the session's f16"));
    assert_int_equal(read_changed(&b, s, 52, 77, &err), Q3N_ERR_FORMAT);
    assert_int_equal(read_changed(&b, s, 60, 1, &err), Q3N_ERR_FORMAT);
    assert_non_null(strstr(err.message, "has_mtp is 1, expected 0"));
    assert_int_equal(read_changed(&b, s, 56, Q3N_TYPE_F16, &err), Q3N_ERR_FORMAT);
    assert_int_equal(read_changed(&b, s, 84, 3, &err), Q3N_ERR_FORMAT);
    assert_non_null(strstr(err.message, "head_dim is 3, expected 2"));
    assert_int_equal(read_changed(&b, s, 124, (1 << 24) + 2, &err), Q3N_ERR_FORMAT);
    assert_non_null(strstr(err.message, "n_sampler is 16777218"));
    assert_int_equal(read_changed(&b, s, 124, n_sampler ? 0 : 1, &err), Q3N_ERR_FORMAT);
    assert_non_null(strstr(err.message, n_sampler ? "0 in version 2" : "1 in version 1"));
    assert_int_equal(read_changed(&b, s, 8, n_sampler ? 1 : 2, &err), Q3N_ERR_FORMAT);
    assert_non_null(strstr(err.message, "n_sampler"));
    assert_int_equal(read_changed(&b, s, 8, 3, &err), Q3N_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "version 3, expected 1 or 2"));
    assert_int_equal(q3n__load_u32(b.data + 8), n_sampler ? 2 : 1);
    assert_int_equal(q3n__load_u32(b.data + 124), n_sampler);

    /* A token outside the vocabulary, in a file that is right otherwise. */
    q3n_snapshot *back;
    const int32_t bad[] = { -1, 1000, INT32_MAX, INT32_MIN };
    const size_t token_300 = b.bytes - 8 - (size_t)q3n__page_file_bytes(&shape) + 44 * 4;
    assert_int_equal(q3n__load_u32(b.data + token_300), token_at(0, 300));
    for (int i = 0; i < COUNT(bad); i++) {
        memcpy(b.data + token_300, &bad[i], 4);
        sign_session(b.data, b.bytes);
        assert_int_equal(read_back(&back, &b, s, 600, &err), Q3N_ERR_FORMAT);
        assert_non_null(strstr(err.message, "token 300"));
        assert_int_equal(h.live, live);
    }
    if (n_sampler) {                                     /* and one that the sampler remembers */
        const int32_t good = token_at(0, 300);
        const size_t pages = 2 * (size_t)q3n__page_file_bytes(&shape);
        const size_t room = (8 + 4 * (size_t)(n_sampler - 1) + 63) / 64 * 64;
        const size_t window = b.bytes - 8 - pages - room + 8;
        memcpy(b.data + token_300, &good, 4);
        for (int i = 0; i < COUNT(bad); i++) {
            memcpy(b.data + window + 12, &bad[i], 4);
            sign_session(b.data, b.bytes);
            assert_int_equal(read_back(&back, &b, s, 600, &err), Q3N_ERR_FORMAT);
            assert_non_null(strstr(err.message, "token 3 of the sampler"));
            assert_int_equal(h.live, live);
        }
    }
    free(b.data);
    q3n__snapshot_release(s);
    close_model(&h, m);
}

static void test_hostile(void **state)
{
    (void)state;
    check_hostile(0);
    check_hostile(18);
}

/* ---- A file of version 1, written by library 0.1 ----
 *
 * q3n_session_save after tokens 7 i + 3 modulo the vocabulary, i < 12, evaluated with logits by the
 * scalar kernels, KV cache of q8, from tests/golden/qwen3_next.  It is bound to the model's file:
 * that part of the header is made to agree, for the converter may write other metadata. */
#define VERSION_1 "tests/golden/session_v1/qwen3_next.q3s"

static bytes_io read_version_1(const q3n_model *m)
{
    bytes_io b = { .room = 200000 };
    FILE *f = fopen(VERSION_1, "rb");
    assert_non_null(f);
    assert_non_null(b.data = (uint8_t *)malloc(b.room));
    b.bytes = fread(b.data, 1, b.room, f);
    fclose(f);
    uint64_t header_hash, hash;
    uint8_t zeroed[128];
    memcpy(zeroed, b.data, 128);
    memset(zeroed + 16, 0, 8);
    memcpy(&header_hash, b.data + 16, 8);
    memcpy(&hash, b.data + b.bytes - 8, 8);
    assert_true(header_hash == hash_as_written(0, zeroed, 128));
    assert_true(hash == hash_as_written(header_hash, b.data + 128, b.bytes - 136));
    assert_int_equal(q3n__load_u32(b.data + 8), 1);
    assert_int_equal(q3n__load_u32(b.data + 124), 0);
    const uint64_t model[2] = { q3n__model_hash(m), m->bytes };
    memcpy(b.data + 32, model, sizeof model);
    sign_session(b.data, b.bytes);
    return b;
}

static void test_version_1(void **state)
{
    (void)state;
    enum { N = 12, MORE = 6 };
    host h;
    q3n_model *m = open_model(&h, "qwen3_next");
    const int V = m->config.vocab_size;
    bytes_io b = read_version_1(m), again = { 0 };
    const q3n_source source = { read_bytes, &b };
    const q3n_sink sink = { write_bytes, &again };
    const q3n_engine_options eo = { .size = sizeof eo, .n_threads = 1, .isa = Q3N_ISA_SCALAR };
    const q3n_sampler_options so = { .size = sizeof so, .seed = 77 };
    int32_t ids[N], got[N], token[2] = { 5, 5 };
    float *logits[2];
    double scale = 0.0;
    q3n_engine *e = NULL;
    q3n_session *s[2];                                   /* loaded, evaluated */
    for (int i = 0; i < N; i++) ids[i] = (7 * i + 3) % V;
    assert_int_equal(q3n_engine_create(&e, m, &eo, NULL), Q3N_OK);
    const q3n_session_options o = { .size = sizeof o, .engine = e, .capacity = 64,
                                    .kv_type = Q3N_TYPE_Q8 };
    for (int k = 0; k < 2; k++) {
        assert_non_null(logits[k] = (float *)malloc((size_t)V * sizeof(float)));
        assert_int_equal(q3n_session_create(&s[k], m, &o, NULL), Q3N_OK);
        if (k == 0) {
            assert_int_equal(q3n_session_load_from(s[0], &source), Q3N_OK);
            assert_int_equal(q3n_session_save_to(s[0], &sink), Q3N_OK);
        } else {
            assert_int_equal(q3n_session_eval(s[1], ids, N, NULL), Q3N_OK);
        }
        assert_int_equal(q3n_session_logits(s[k], logits[k]), Q3N_OK);
    }
    assert_int_equal(again.bytes, b.bytes);              /* without a sampler the same version */
    assert_memory_equal(again.data, b.data, b.bytes);
    assert_int_equal(q3n_session_length(s[0]), N);
    assert_int_equal(q3n_session_tokens(s[0], 0, N, got), Q3N_OK);
    assert_memory_equal(got, ids, sizeof ids);
    for (int i = 0; i < V; i++) scale = fmax(scale, fabs((double)logits[1][i]));
    for (int i = 0; i < V; i++)
        assert_true(fabs((double)logits[0][i] - (double)logits[1][i]) <= 5e-5 * scale);
    for (int k = 0; k < 2; k++)
        assert_int_equal(q3n_session_set_sampler(s[k], &so), Q3N_OK);
    b.at = 0;                                            /* a file without leaves the sampler be */
    q3n_sampler_accept(q3n_session_sampler(s[0]), 9);
    assert_int_equal(q3n_session_load_from(s[0], &source), Q3N_OK);
    assert_int_equal(s[0]->sampler->n_window, 1);
    assert_true(s[0]->sampler->rng == 77);
    for (int i = 0, n = 0; i < MORE; i++) {
        for (int k = 0; k < 2; k++)
            assert_int_equal(q3n_session_decode(s[k], token[k], &token[k], 1, &n), Q3N_OK);
        assert_int_equal(token[0], token[1]);
    }
    for (int k = 0; k < 2; k++) {
        q3n_session_destroy(s[k]);
        free(logits[k]);
    }
    q3n_engine_destroy(e);
    free(again.data);
    free(b.data);
    close_model(&h, m);
}

static void test_other_model(void **state)
{
    (void)state;
    static const char *const names[] = { "qwen3_next", "qwen3_next_mixed", "qwen3_dense" };
    host h[3];
    q3n_model *m[3];
    q3n_error err;
    q3n_snapshot *back;
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);
    for (int i = 0; i < 3; i++) m[i] = open_model(&h[i], names[i]);
    for (int i = 0; i < 3; i++) {
        q3n_snapshot *s = new_snapshot(m[i], &shape, Q3N_TYPE_F32, 0, 3);
        bytes_io b = written(s);
        for (int k = 0; k < 3; k++) {
            const q3n_source source = { read_bytes, &b };
            b.at = 0;
            const q3n_result r = q3n__snapshot_read(&back, m[k], &shape, 10, &source, &err);
            assert_int_equal(r, k == i ? Q3N_OK : Q3N_ERR_UNSUPPORTED);
            q3n__snapshot_release(back);
        }
        free(b.data);
        q3n__snapshot_release(s);
    }
    for (int i = 0; i < 3; i++) close_model(&h[i], m[i]);
}

/* Sink, source and allocator that fail at each of their calls. */
static void test_failing(void **state)
{
    (void)state;
    host h;
    q3n_error err;
    q3n_snapshot *back;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);
    q3n_snapshot *s = new_snapshot(m, &shape, Q3N_TYPE_F32, 0, 700);
    bytes_io b = written(s);
    const int64_t live = h.live;
    const int n_writes = b.calls;
    for (int k = 1; k <= n_writes; k++) {
        bytes_io out = { .fail_at = k };
        const q3n_sink sink = { write_bytes, &out };
        assert_int_equal(q3n__snapshot_write(s, &sink, &err), Q3N_ERR_IO);
        assert_int_equal(out.calls, k);
        assert_int_equal(h.live, live);
        free(out.data);
    }
    read_back(&back, &b, s, 700, &err);
    q3n__snapshot_release(back);
    const int n_reads = b.calls;
    for (b.fail_at = 1; b.fail_at <= n_reads; b.fail_at++) {
        assert_int_equal(read_back(&back, &b, s, 700, &err), Q3N_ERR_IO);
        assert_int_equal(h.live, live);
    }
    b.fail_at = 0;
    int k = 1;
    for (q3n_result r = Q3N_ERR_MEMORY; r != Q3N_OK; k++) {
        h.fail_at = h.calls + k;
        r = read_back(&back, &b, s, 700, &err);
        assert_true(r == Q3N_OK || r == Q3N_ERR_MEMORY);
        q3n__snapshot_release(back);
        assert_int_equal(h.live, live);
    }
    assert_int_equal(k, 6);      /* a snapshot and three pages failed */
    char path[300], *directory = new_directory();
    snprintf(path, sizeof path, "%s/state", directory);
    h.fail_at = h.calls + 1;             /* the last page, with zeros after its tokens */
    assert_int_equal(q3n__snapshot_save(s, path, &err), Q3N_ERR_MEMORY);
    assert_int_equal(file_count(directory), 0);
    assert_int_equal(h.live, live);
    h.fail_at = 0;
    delete_directory(directory);
    free(b.data);
    q3n__snapshot_release(s);
    close_model(&h, m);
}

static void test_save_fails(void **state)
{
    (void)state;
    host h;
    q3n_error err;
    q3n_snapshot *back;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);
    q3n_snapshot *s = new_snapshot(m, &shape, Q3N_TYPE_F32, 0, 700);
    char path[300], *directory = new_directory();
    snprintf(path, sizeof path, "%s/none/state", directory);
    assert_int_equal(q3n__snapshot_save(s, path, &err), Q3N_ERR_IO);
    assert_non_null(strstr(err.message, path));
    snprintf(path, sizeof path, "%s/state", directory);
    assert_int_equal(mkdir(path, 0700), 0);      /* a directory has the name */
    assert_int_equal(q3n__snapshot_save(s, path, &err), Q3N_ERR_IO);
    assert_int_equal(q3n__snapshot_open(&back, m, &shape, 700, path, &err), Q3N_ERR_IO);
    assert_null(back);
    assert_int_equal(file_count(directory), 1);
    assert_int_equal(rmdir(path), 0);
    assert_int_equal(q3n__snapshot_open(&back, m, &shape, 700, path, &err), Q3N_ERR_NO_FILE);
    assert_int_equal(mkfifo(path, 0600), 0);     /* does not wait for a writer */
    assert_int_equal(q3n__snapshot_open(&back, m, &shape, 700, path, &err), Q3N_ERR_IO);
    assert_int_equal(unlink(path), 0);
    delete_directory(directory);
    q3n__snapshot_release(s);
    close_model(&h, m);
}

/* A full disk: what was there stays.  An unfinished file of another is left alone. */
static void test_disk_full(void **state)
{
    (void)state;
    struct rlimit limit, small = { 4096, RLIM_INFINITY };
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    small.rlim_max = limit.rlim_max;
#ifdef _WIN32
    skip();                                      /* no limit to set */
#endif
    host h;
    q3n_error err;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);
    q3n_snapshot *s = new_snapshot(m, &shape, Q3N_TYPE_F32, 0, 700);
    char path[300], part[340], *directory = new_directory();
    snprintf(path, sizeof path, "%s/state", directory);
    write_file(path, "before", 6);
    snprintf(part, sizeof part, "%s.0123456789abcdef.part", path);
    write_file(part, "mine", 4);
    void (*old)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    const q3n_result r = q3n__snapshot_save(s, path, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    signal(SIGXFSZ, old);
    assert_int_equal(r, Q3N_ERR_IO);
    assert_int_equal(file_count(directory), 2);
    char *text = golden_read(path);
    assert_string_equal(text, "before");
    free(text);
    assert_int_equal(q3n__snapshot_save(s, path, &err), Q3N_OK);
    text = golden_read(part);
    assert_string_equal(text, "mine");
    free(text);
    assert_int_equal(file_count(directory), 2);
    delete_directory(directory);
    q3n__snapshot_release(s);
    close_model(&h, m);
}

/* ---- The cache ---- */
static q3n_cache *new_cache(host *h, const q3n_model *m, size_t max_bytes, const char *directory,
                            int64_t max_directory_bytes)
{
    q3n_cache *c = NULL;
    q3n_error err;
    q3n_cache_options o = { .size = sizeof o, .max_bytes = max_bytes, .directory = directory,
                            .max_directory_bytes = max_directory_bytes };
    o.logger.log = host_log;
    o.logger.user = h;
    if (q3n_cache_create(&c, m, &o, &err) != Q3N_OK) fail_msg("%s", err.message);
    return c;
}

static q3n_cache_stats stats_of(q3n_cache *c)
{
    q3n_cache_stats s = Q3N_INIT(q3n_cache_stats);
    q3n_cache_stats_get(c, &s);
    return s;
}

/* Put a snapshot of a text; the cache alone keeps it. */
static void put(q3n_cache *c, const q3n__shape *shape, int text, int length, int marked)
{
    q3n_snapshot *s = new_snapshot(c->model, shape, Q3N_TYPE_F32, text, length);
    q3n__cache_put(c, s, marked);
    q3n__snapshot_release(s);
}

/* The length that is found of the first n tokens of a text, -1 = none; what is found is right. */
static int find(q3n_cache *c, const q3n__shape *shape, int text, int n, int min)
{
    int32_t tokens[2000];
    assert_true(n <= COUNT(tokens));
    tokens_of(text, tokens, n);
    q3n_snapshot *s = q3n__cache_find(c, shape, Q3N_TYPE_F32, tokens, n, min);
    if (!s) return -1;
    const int length = s->length;
    assert_true(length > min && length <= n);
    assert_int_equal(q3n__common_prefix(s->page, length, tokens, n), length);
    q3n_snapshot *want = new_snapshot(c->model, shape, Q3N_TYPE_F32, text, length);
    check_same(s, want);
    q3n__snapshot_release(want);
    q3n__snapshot_release(s);
    return length;
}

static int has(q3n_cache *c, const q3n__shape *shape, int text, int n, int marked)
{
    int32_t tokens[2000];
    tokens_of(text, tokens, n);
    return q3n__cache_touch(c, shape, Q3N_TYPE_F32, tokens, n, marked);
}

static size_t cost(const q3n__shape *shape, int length, int n_pages)
{
    return q3n__with_head(q3n__snapshot_measure(shape, Q3N_TYPE_F32, length, 0))
         + (size_t)n_pages * q3n__with_head(shape->page_bytes);
}

static void test_common_prefix(void **state)
{
    (void)state;
    host h;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_Q8);
    q3n_snapshot *s = new_snapshot(m, &shape, Q3N_TYPE_F32, 0, 600);
    int32_t tokens[700];
    for (int at = 0; at < 700; at++) {
        tokens_of(0, tokens, 700);
        tokens[at]++;
        assert_int_equal(q3n__common_prefix(s->page, 600, tokens, 700), at < 600 ? at : 600);
        assert_int_equal(q3n__common_prefix(s->page, 600, tokens, at), at < 600 ? at : 600);
        assert_int_equal(q3n__common_prefix(s->page, at < 600 ? at : 600, tokens, 700),
                         at < 600 ? at : 600);
    }
    q3n__snapshot_release(s);
    close_model(&h, m);
}

static void test_longest(void **state)
{
    (void)state;
    static const int lengths[] = { 1, 2, 100, 255, 256, 257, 511, 512, 700, 1000 };
    host h;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32), other = small_shape(Q3N_TYPE_Q8);
    q3n_cache *c = new_cache(&h, m, 1 << 26, NULL, 0);
    assert_int_equal(find(c, &shape, 0, 1000, 0), -1);
    for (int i = COUNT(lengths) - 1; i >= 0; i -= 2) put(c, &shape, 0, lengths[i], 0);
    for (int i = COUNT(lengths) - 2; i >= 0; i -= 2) put(c, &shape, 0, lengths[i], 1);
    for (int text = 10; text < 60; text += 5)    /* other texts, some with 300 tokens in common */
        for (int i = 0; i < COUNT(lengths); i++) put(c, &shape, text, lengths[i], 0);
    for (int n = 0; n <= 1100; n += n < 10 || n % 256 > 250 || n % 256 < 3 ? 1 : 7)
        for (int min = 0; min <= n; min += 1 + n / 5) {
            int want = -1;
            for (int i = 0; i < COUNT(lengths); i++)
                if (lengths[i] <= n && lengths[i] > min) want = lengths[i];
            assert_int_equal(find(c, &shape, 0, n, min), want);
            assert_int_equal(find(c, &other, 0, n, min), -1);
        }
    assert_int_equal(find(c, &shape, 1, 1000, 0), 257);      /* 300 tokens in common */
    assert_int_equal(find(c, &shape, 15, 1000, 0), 1000);
    assert_int_equal(find(c, &shape, 16, 1000, 0), 257);
    assert_int_equal(find(c, &shape, 999, 1000, 1), -1);
    for (int n = 0; n < 1001; n++) {
        int want = 0;
        for (int i = 0; i < COUNT(lengths); i++) want |= lengths[i] == n;
        assert_int_equal(has(c, &shape, 0, n, 0), want);
    }
    q3n__shape with_mtp = shape;
    with_mtp.has_mtp = 1;
    assert_false(has(c, &with_mtp, 0, 256, 0));
    q3n__shape other_set = shape;                /* its numbers differ in their last bits */
    other_set.isa = Q3N_ISA_NEON;
    assert_false(has(c, &other_set, 0, 256, 0));
    assert_int_equal(find(c, &other_set, 0, 256, 0), -1);
    int32_t tokens[256];
    tokens_of(0, tokens, 256);
    assert_null(q3n__cache_find(c, &shape, Q3N_TYPE_BF16, tokens, 256, 0));
    const q3n_cache_stats st = stats_of(c);
    assert_int_equal(st.n_entries, 11 * COUNT(lengths) - 5 * 6);     /* 10 and 15 begin alike */
    assert_true(st.n_hits > 0 && st.n_misses > 0 && st.n_evicted == 0 && st.n_files == 0);
    q3n_cache_clear(c);
    assert_int_equal(stats_of(c).n_entries, 0);
    assert_int_equal(stats_of(c).bytes, 0);
    assert_int_equal(find(c, &shape, 0, 1000, 0), -1);
    q3n_cache_destroy(c);
    close_model(&h, m);
}

/* Least recently used first, unmarked before marked; what is found or touched was used. */
static void test_order(void **state)
{
    (void)state;
    host h;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);
    q3n_cache *c = new_cache(&h, m, 4 * cost(&shape, 10, 1), NULL, 0);
    put(c, &shape, 10, 10, 1);
    for (int text = 20; text <= 40; text += 10) put(c, &shape, text, 10, 0);
    assert_int_equal(stats_of(c).n_entries, 4);
    assert_int_equal(stats_of(c).bytes, 4 * cost(&shape, 10, 1));
    assert_int_equal(find(c, &shape, 20, 15, 0), 10);
    put(c, &shape, 50, 10, 0);                   /* 30 goes */
    assert_true(!has(c, &shape, 30, 10, 0) && has(c, &shape, 20, 10, 0));
    put(c, &shape, 60, 10, 0);                   /* 40 goes */
    assert_true(!has(c, &shape, 40, 10, 0) && has(c, &shape, 50, 10, 0));
    assert_true(has(c, &shape, 20, 10, 1));      /* it is marked now */
    put(c, &shape, 70, 10, 1);                   /* 60 goes: 50 was touched */
    assert_true(!has(c, &shape, 60, 10, 0));
    put(c, &shape, 80, 10, 0);                   /* 50 goes: it alone is not marked */
    assert_true(!has(c, &shape, 50, 10, 0) && has(c, &shape, 80, 10, 0));
    put(c, &shape, 80, 10, 1);                   /* is there: it gets the mark */
    assert_int_equal(stats_of(c).n_evicted, 4);
    put(c, &shape, 90, 10, 0);                   /* does not push out what is marked */
    assert_false(has(c, &shape, 90, 10, 0));
    put(c, &shape, 90, 10, 1);                   /* 10 goes, the least recently used */
    assert_true(has(c, &shape, 90, 10, 0) && !has(c, &shape, 10, 10, 0));
    for (int text = 20; text <= 80; text += text == 20 ? 50 : 10)
        assert_true(has(c, &shape, text, 10, 0));
    assert_int_equal(stats_of(c).bytes, 4 * cost(&shape, 10, 1));
    put(c, &shape, 10, 2000, 1);                 /* too large alone: nothing goes for it */
    assert_int_equal(stats_of(c).n_entries, 4);
    q3n_cache_destroy(c);
    close_model(&h, m);
}

/* Random snapshots, some with pages in common: the account is what the allocator gave out. */
static void test_budget(void **state)
{
    (void)state;
    host h;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_Q8);
    uint32_t random = 7;
    for (int round = 0; round < 3; round++) {
        const size_t budget = (size_t)(round + 1) * 100000;
        q3n_snapshot *parent[4] = { NULL };
        for (int i = 0; i < COUNT(parent); i++)
            parent[i] = make_snapshot(m, &shape, Q3N_TYPE_F32, 10 * i, 900, NULL);
        q3n_cache *c = new_cache(&h, m, budget, NULL, 0);
        for (int i = 0; i < 400; i++) {
            const int which = (int)(next_random(&random) % 4);
            const int shares = i <= 300 && next_random(&random) % 2;
            q3n_snapshot *s = make_snapshot(m, &shape, Q3N_TYPE_F32, 10 * which,
                                            (int)(next_random(&random) % 1000),
                                            shares ? parent[which] : NULL);
            assert_non_null(s);
            q3n__cache_put(c, s, next_random(&random) % 4 == 0);
            q3n__snapshot_release(s);
            if (i == 300) for (int k = 0; k < COUNT(parent); k++) q3n__snapshot_release(parent[k]);
            assert_true(stats_of(c).bytes <= budget);
            if (i < 300) continue;
            int64_t tables = 0;      /* what is not snapshots and pages */
            const void *table[] = { c, c->items, c->pages };
            for (int k = 0; k < COUNT(table); k++) {
                q3n__alloc_head head;
                memcpy(&head, (const uint8_t *)table[k] - sizeof head, sizeof head);
                tables += (int64_t)head.bytes;
            }
            const int64_t model = h.live_bytes - tables - (int64_t)stats_of(c).bytes;
            static int64_t first;
            if (i == 300 && round == 0) first = model;
            assert_int_equal(model, first);
        }
        q3n_cache_destroy(c);
    }
    /* Pages in common are counted once. */
    q3n_cache *c = new_cache(&h, m, 1 << 24, NULL, 0);
    q3n_snapshot *a = make_snapshot(m, &shape, Q3N_TYPE_F32, 0, 512, NULL);
    q3n_snapshot *b = make_snapshot(m, &shape, Q3N_TYPE_F32, 0, 700, a);
    assert_ptr_equal(a->page[1], b->page[1]);
    q3n__cache_put(c, a, 0);
    assert_int_equal(stats_of(c).bytes, cost(&shape, 512, 2));
    q3n__cache_put(c, b, 0);
    assert_int_equal(stats_of(c).bytes, cost(&shape, 512, 2) + cost(&shape, 700, 1));
    c->max_bytes = cost(&shape, 512, 2) + cost(&shape, 700, 1) + cost(&shape, 1, 1) - 1;
    put(c, &shape, 50, 1, 0);        /* a goes, its pages stay for b */
    assert_int_equal(stats_of(c).n_entries, 2);
    assert_int_equal(stats_of(c).bytes, cost(&shape, 700, 3) + cost(&shape, 1, 1));
    q3n__snapshot_release(a);
    q3n__snapshot_release(b);
    q3n_cache_destroy(c);
    close_model(&h, m);
}

/* Two texts of one hash: each is found where it is, and never taken for the other. */
typedef struct { uint64_t chain; int32_t first; } prefix_chain;

static int by_chain(const void *a, const void *b)
{
    const uint64_t x = ((const prefix_chain *)a)->chain, y = ((const prefix_chain *)b)->chain;
    return x < y ? -1 : x > y;
}

static void test_collision(void **state)
{
    (void)state;
    enum { N = 1 << 18 };
    host h;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);
    prefix_chain *p = (prefix_chain *)malloc(N * sizeof *p);
    assert_non_null(p);
    for (int i = 0; i < N; i++) {
        const int32_t tokens[2] = { (int32_t)(q3n__mix64((uint64_t)i) >> 34), 5 };
        p[i] = (prefix_chain){ q3n__text_chain(Q3N__TEXT_START, tokens, 2), tokens[0] };
    }
    qsort(p, N, sizeof *p, by_chain);
    int at = 1;
    while (at < N && ((p[at].chain ^ p[at - 1].chain) >> 32 || p[at].first == p[at - 1].first))
        at++;
    assert_true(at < N);
    int32_t text[2][4] = { { p[at - 1].first, 5, 0, 9 }, { p[at].first, 5, 0, 9 } };
    text[1][2] = (int32_t)(uint32_t)(p[at].chain ^ p[at - 1].chain);
    free(p);
    assert_true(q3n__text_chain(Q3N__TEXT_START, text[0], 3)
                == q3n__text_chain(Q3N__TEXT_START, text[1], 3));
    q3n_snapshot *s[2];
    for (int i = 0; i < 2; i++) {
        s[i] = new_snapshot(m, &shape, Q3N_TYPE_F32, 0, 3);
        memcpy(s[i]->page[0]->tokens, text[i], sizeof text[i]);
    }
    q3n_cache *c = new_cache(&h, m, 1 << 24, NULL, 0);
    q3n_snapshot *one = new_snapshot(m, &shape, Q3N_TYPE_F32, 0, 1);
    one->page[0]->tokens[0] = text[0][0];
    q3n__cache_put(c, one, 0);
    for (int i = 0; i < 2; i++) {
        q3n__cache_put(c, s[i], 0);
        assert_int_equal(stats_of(c).n_entries, 2);
        assert_true(q3n__cache_touch(c, &shape, Q3N_TYPE_F32, text[i], 3, 0));
        assert_false(q3n__cache_touch(c, &shape, Q3N_TYPE_F32, text[!i], 3, 0));
        q3n_snapshot *found = q3n__cache_find(c, &shape, Q3N_TYPE_F32, text[i], 4, 0);
        assert_ptr_equal(found, s[i]);
        q3n__snapshot_release(found);
        found = q3n__cache_find(c, &shape, Q3N_TYPE_F32, text[!i], 4, 0);
        assert_ptr_equal(found, i == 1 ? one : NULL);
        q3n__snapshot_release(found);
    }
    for (int i = 0; i < 2; i++) q3n__snapshot_release(s[i]);
    q3n__snapshot_release(one);
    q3n_cache_destroy(c);
    close_model(&h, m);
}

static void test_cache_allocations(void **state)
{
    (void)state;
    host h;
    q3n_error err;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);
    q3n_cache *c = NULL;
    q3n_cache_options o = { .size = sizeof o, .max_bytes = 1 << 24 };
    q3n_snapshot *s[40];
    for (int i = 0; i < COUNT(s); i++)
        s[i] = new_snapshot(m, &shape, Q3N_TYPE_F32, 10 * i, 400);
    const int64_t live = h.live;
    h.fail_at = h.calls + 1;
    assert_int_equal(q3n_cache_create(&c, m, &o, &err), Q3N_ERR_MEMORY);
    assert_null(c);
    assert_int_equal(q3n_cache_create(NULL, m, &o, &err), Q3N_ERR_ARG);
    assert_int_equal(q3n_cache_create(&c, NULL, &o, &err), Q3N_ERR_ARG);
    h.fail_at = 0;
    assert_int_equal(q3n_cache_create(&c, m, NULL, &err), Q3N_OK);      /* all defaults */
    assert_int_equal(c->max_bytes, (size_t)1 << 30);
    q3n_cache_destroy(c);
    o.max_directory_bytes = -1;
    assert_int_equal(q3n_cache_create(&c, m, &o, &err), Q3N_ERR_ARG);
    q3n_cache_destroy(NULL);
    int failed = 0;
    for (int k = 1; k < 12; k++) {       /* the k-th allocation of a run fails: that is not kept */
        h.fail_at = 0;
        c = new_cache(&h, m, 1 << 24, NULL, 0);
        h.fail_at = h.calls + k;
        for (int i = 0; i < COUNT(s); i++) q3n__cache_put(c, s[i], 0);
        const int n = stats_of(c).n_entries;
        assert_true(n == COUNT(s) || n == COUNT(s) - 1);
        failed += n == COUNT(s) - 1;
        size_t bytes = 0;
        for (int i = 0; i < COUNT(s); i++)
            if (has(c, &shape, 10 * i, 400, 0)) bytes += cost(&shape, 400, 2);
        assert_int_equal(stats_of(c).bytes, bytes);
        q3n_cache_destroy(c);
        assert_int_equal(h.live, live);
    }
    assert_int_equal(failed, 8);         /* 256, 512 .. 4096 bytes of items; 64, 128, 256 pages */
    h.fail_at = 0;
    for (int i = 0; i < COUNT(s); i++) q3n__snapshot_release(s[i]);
    close_model(&h, m);
}

/* ---- The cache's directory ---- */
static void test_directory(void **state)
{
    (void)state;
    host h;
    char path[8][300], *directory = new_directory();
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_Q8);
    q3n_cache *c = new_cache(&h, m, 2 * cost(&shape, 300, 2), directory, 0);
    for (int text = 10; text <= 30; text += 10) put(c, &shape, text, 300, text == 10);
    assert_int_equal(list_files(directory, path, 8), 1);     /* 20 was evicted */
    assert_int_equal(stats_of(c).n_files, 1);
    assert_true(stats_of(c).file_bytes > 0);
    assert_int_equal(find(c, &shape, 20, 700, 0), 300);      /* comes back; 30 goes */
    assert_int_equal(list_files(directory, path, 8), 2);
    assert_int_equal(find(c, &shape, 30, 700, 299), 300);    /* 20 goes and is not written again */
    assert_int_equal(list_files(directory, path, 8), 2);
    put(c, &shape, 20, 100, 1);
    assert_int_equal(find(c, &shape, 20, 200, 0), 100);
    assert_int_equal(find(c, &shape, 20, 300, 0), 300);      /* longer, in a file */
    q3n_cache_stats st = stats_of(c);
    assert_int_equal(st.n_hits, 4);
    q3n_cache_destroy(c);
    assert_int_equal(list_files(directory, path, 8), 4);

    /* As another process would. */
    c = new_cache(&h, m, 1 << 24, directory, 0);
    st = stats_of(c);
    assert_int_equal(st.n_files, 4);
    assert_int_equal(st.n_entries, 0);
    for (int text = 10; text <= 30; text += 10)
        assert_int_equal(find(c, &shape, text, 301, 0), 300);
    assert_int_equal(find(c, &shape, 20, 299, 0), 100);
    assert_int_equal(find(c, &shape, 40, 301, 0), -1);
    const q3n__shape other = small_shape(Q3N_TYPE_F32);
    assert_int_equal(find(c, &other, 10, 301, 0), -1);
    assert_int_equal(stats_of(c).n_entries, 4);
    q3n_cache_clear(c);
    for (int text = 10; text <= 30; text += 10)
        assert_int_equal(find(c, &shape, text, 301, 0), 300);
    q3n_cache_destroy(c);
    assert_int_equal(list_files(directory, path, 8), 4);
    assert_int_equal(h.warnings, 0);

    /* Another model does not touch them. */
    host h2;
    q3n_model *m2 = open_model(&h2, "qwen3_dense");
    c = new_cache(&h2, m2, 1 << 24, directory, 0);
    assert_int_equal(stats_of(c).n_files, 4);
    assert_int_equal(find(c, &shape, 10, 301, 0), -1);
    q3n_cache_destroy(c);
    assert_int_equal(h2.warnings, 0);
    close_model(&h2, m2);

    /* Gone files are misses; without memory a file stays for later. */
    c = new_cache(&h, m, 1 << 24, directory, 0);
    h.fail_at = h.calls + 1;
    int32_t tokens[300];
    tokens_of(10, tokens, 300);
    assert_null(q3n__cache_find(c, &shape, Q3N_TYPE_F32, tokens, 300, 0));
    h.fail_at = 0;
    assert_int_equal(find(c, &shape, 10, 301, 0), 300);
    for (int i = 0; i < 4; i++) assert_int_equal(unlink(path[i]), 0);
    assert_int_equal(find(c, &shape, 20, 301, 0), -1);
    assert_int_equal(find(c, &shape, 10, 301, 0), 300);
    assert_int_equal(h.warnings, 0);
    q3n_cache_destroy(c);
    delete_directory(directory);
    close_model(&h, m);
}

/* Files that are damaged, of another text, no files at all: warned of, not used, never fatal. */
static void test_damaged_files(void **state)
{
    (void)state;
    host h;
    char path[8][300], other[400], *directory = new_directory();
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);
    q3n_cache *c = new_cache(&h, m, 1 << 24, directory, 0);
    put(c, &shape, 10, 50, 0);
    put(c, &shape, 10, 60, 0);
    q3n_cache_destroy(c);
    assert_int_equal(list_files(directory, path, 8), 2);
    const int sixty = strstr(path[0], "-60.session") ? 0 : 1;
    char *good = golden_read(path[sixty]);
    const size_t bytes = (size_t)small_shape(Q3N_TYPE_F32).page_bytes;   /* less than the file */

    c = new_cache(&h, m, 1 << 24, directory, 0);     /* damaged: the next shorter one is found */
    write_file(path[sixty], good, bytes);
    assert_int_equal(find(c, &shape, 10, 100, 0), 50);
    assert_int_equal(h.warnings, 1);
    assert_non_null(strstr(h.last, path[sixty]));
    assert_int_equal(access(path[sixty], F_OK), -1);         /* and it is deleted */
    assert_int_equal(stats_of(c).n_files, 1);
    q3n_cache_destroy(c);

    /* Right, but under the name of another text, length or shape: kept, not used. */
    q3n__cache_item item;
    int32_t tokens[60];
    c = new_cache(&h, m, 1 << 24, directory, 0);
    memset(&item, 0, sizeof item);
    tokens_of(40, tokens, 60);
    item.key = q3n__cache_key(c, &shape, Q3N_TYPE_F32);
    item.text = q3n__mix64(q3n__text_chain(Q3N__TEXT_START, tokens, 60));
    item.length = 60;
    char name[Q3N__CACHE_NAME];
    q3n__cache_name(&item, name);
    snprintf(other, sizeof other, "%s/%s", directory, name);
    const int fifty = !sixty;
    assert_int_equal(link(path[fifty], other), 0);
    q3n_cache_destroy(c);
    h.warnings = 0;
    c = new_cache(&h, m, 1 << 24, directory, 0);
    assert_int_equal(find(c, &shape, 40, 60, 0), -1);
    assert_int_equal(h.warnings, 1);
    assert_non_null(strstr(h.last, "another text"));
    assert_int_equal(find(c, &shape, 40, 60, 0), -1);        /* forgotten */
    assert_int_equal(h.warnings, 1);
    assert_int_equal(access(other, F_OK), 0);
    q3n_cache_destroy(c);
    free(good);
    delete_directory(directory);
    close_model(&h, m);
}

/* A search reads a bounded number of files, and then goes on with what is in memory. */
static void test_many_damaged_files(void **state)
{
    (void)state;
    host h;
    char path[12][300], *directory = new_directory();
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);
    q3n_cache *c = new_cache(&h, m, 0, directory, 0);
    assert_true(c->max_bytes == (size_t)1 << 30);            /* the default */
    for (int i = 0; i < COUNT(path); i++) put(c, &shape, 40, 101 + i, 0);
    assert_int_equal(stats_of(c).n_entries, COUNT(path));
    q3n_cache_destroy(c);
    assert_int_equal(list_files(directory, path, COUNT(path)), COUNT(path));
    for (int i = 0; i < COUNT(path); i++) write_file(path[i], "x", 1);
    c = new_cache(&h, m, 0, directory, 0);
    put(c, &shape, 40, 50, 0);
    assert_int_equal(find(c, &shape, 40, 200, 0), 50);
    assert_int_equal(h.warnings, Q3N__CACHE_TRIES);
    assert_int_equal(stats_of(c).n_files, COUNT(path) - Q3N__CACHE_TRIES);
    assert_int_equal(find(c, &shape, 40, 200, 50), -1);
    assert_int_equal(stats_of(c).n_files, 0);
    q3n_cache_destroy(c);
    delete_directory(directory);
    close_model(&h, m);
}

/* The name of a text's file is a pipe, a directory, a link to nowhere; empty; other names. */
static void test_strange_files(void **state)
{
    (void)state;
    static const char *const strange[] = {
        "q3n-", "q3n-0000000000000000-0000000000000000-0", "q3n-.session",
        "q3n-0000000000000000-0000000000000000-0.sessionx",
        "q3n-0000000000000000-0000000000000000-00.session",
        "q3n-0000000000000000-0000000000000000-99999999999999999999.session",
        "q3n-0000000000000000-0000000000000000--1.session",
        "q3n-000000000000000G-0000000000000000-1.session",
        "q3n-0x00000000000000-0000000000000000-1.session",
        "q3n-ABCDEFABCDEFABCD-0000000000000000-1.session",
        "q3n-0000000000000000-0000000000000000-1.session.x", "unrelated",
        "q3n-0000000000000000-0000000000000000-1.session.0123456789abcdef.part",
        "q3n-weights.q3n.part",
    };
    host h;
    char other[400], name[Q3N__CACHE_NAME], path[4][300], *directory = new_directory();
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);
    q3n_cache *c = new_cache(&h, m, 1 << 24, directory, 0);
    put(c, &shape, 40, 60, 0);
    q3n_cache_destroy(c);
    assert_int_equal(list_files(directory, path, 4), 1);
    snprintf(name, sizeof name, "%.63s", strrchr(path[0], '/') + 1);
    c = new_cache(&h, m, 1 << 24, directory, 0);
    put(c, &shape, 10, 50, 0);
    q3n_cache_destroy(c);
    for (int i = 0; i < COUNT(strange); i++) {
        snprintf(other, sizeof other, "%s/%s", directory, strange[i]);
        write_file(other, "", 0);
        const struct utimbuf old = { 1000, 1000 };
        if (i >= COUNT(strange) - 2) assert_int_equal(utime(other, &old), 0);
    }
    for (int kind = 0; kind < 4; kind++) {
        snprintf(other, sizeof other, "%s/%s", directory, name);
        remove(other);
        if (kind == 0) assert_int_equal(mkfifo(other, 0600), 0);
        if (kind == 1) assert_int_equal(mkdir(other, 0700), 0);
        if (kind == 2) assert_int_equal(symlink("/nowhere/at/all", other), 0);
        if (kind == 3) write_file(other, "", 0);
        c = new_cache(&h, m, 1 << 24, directory, 0);
        assert_int_equal(stats_of(c).n_files, kind == 3 ? 2 : 1);
        assert_int_equal(find(c, &shape, 40, 60, 0), -1);
        assert_int_equal(find(c, &shape, 10, 60, 0), 50);
        if (kind == 3) put(c, &shape, 40, 60, 0);
        q3n_cache_destroy(c);
        assert_int_equal(h.warnings, kind == 3);
    }
    /* The abandoned part is gone, a model's is not; what could not be read was replaced. */
    snprintf(other, sizeof other, "%s/%s", directory, strange[COUNT(strange) - 2]);
    assert_int_equal(access(other, F_OK), -1);
    snprintf(other, sizeof other, "%s/%s", directory, strange[COUNT(strange) - 1]);
    assert_int_equal(access(other, F_OK), 0);
    c = new_cache(&h, m, 1 << 24, directory, 0);
    assert_int_equal(find(c, &shape, 40, 60, 0), 60);
    q3n_cache_destroy(c);
    delete_directory(directory);
    close_model(&h, m);
}

static void test_no_directory(void **state)
{
    (void)state;
    host h;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);

    /* No such directory: a warning, and a cache in memory. */
    q3n_cache *c = new_cache(&h, m, 1 << 24, "/nowhere/at/all", 0);
    assert_int_equal(h.warnings, 1);
    assert_non_null(strstr(h.last, "/nowhere/at/all"));
    put(c, &shape, 10, 50, 0);
    assert_int_equal(find(c, &shape, 10, 60, 0), 50);
    q3n_cache_destroy(c);
    assert_int_equal(h.warnings, 1);

    /* A directory that goes away: each failure is a warning. */
    char *directory = new_directory();
    h.warnings = 0;
    c = new_cache(&h, m, cost(&shape, 50, 1), directory, 0);
    delete_directory(directory);
    put(c, &shape, 10, 50, 0);
    put(c, &shape, 20, 50, 0);
    assert_int_equal(h.warnings, 1);
    assert_int_equal(stats_of(c).n_files, 0);
    assert_int_equal(find(c, &shape, 20, 60, 0), 50);
    q3n_cache_destroy(c);
    assert_int_equal(h.warnings, 2);
    close_model(&h, m);
}

static void test_directory_bytes(void **state)
{
    (void)state;
    host h;
    char path[16][300], *directory = new_directory();
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);
    q3n_snapshot *s = new_snapshot(m, &shape, Q3N_TYPE_F32, 0, 50);
    const int64_t one = (int64_t)q3n__snapshot_file_bytes(s);
    q3n__snapshot_release(s);
    q3n_cache *c = new_cache(&h, m, cost(&shape, 50, 1), directory, 3 * one + one / 2);
    for (int text = 10; text <= 80; text += 10) {
        put(c, &shape, text, 50, 0);
        assert_true(stats_of(c).file_bytes <= 3 * one + one / 2);
        assert_int_equal(stats_of(c).n_files, text < 20 ? 0 : text < 50 ? text / 10 - 1 : 3);
        assert_int_equal(list_files(directory, path, 16), stats_of(c).n_files);
    }
    assert_int_equal(find(c, &shape, 40, 60, 0), -1);        /* 50, 60, 70 are in files */
    assert_int_equal(find(c, &shape, 50, 60, 0), 50);        /* 80 is written, 50's file goes */
    assert_int_equal(stats_of(c).n_files, 3);
    q3n_cache_destroy(c);                                    /* 50 is written, 60's goes */
    assert_int_equal(list_files(directory, path, 16), 3);

    /* Age is what the system says of the files. */
    for (int i = 0; i < 3; i++) {
        const struct utimbuf when = { 1000000 - 1000 * i, 1000000 - 1000 * i };
        assert_int_equal(utime(path[i], &when), 0);
    }
    c = new_cache(&h, m, 1 << 24, directory, 2 * one);       /* the last one is the oldest */
    assert_int_equal(access(path[2], F_OK), -1);
    assert_int_equal(stats_of(c).n_files, 2);
    assert_int_equal(stats_of(c).file_bytes, 2 * one);
    put(c, &shape, 90, 50, 0);
    q3n_cache_clear(c);
    assert_int_equal(access(path[1], F_OK), -1);
    assert_int_equal(access(path[0], F_OK), 0);
    put(c, &shape, 90, 300, 0);                              /* larger than the bound alone */
    c->max_directory_bytes = one;
    q3n_cache_destroy(c);
    assert_int_equal(h.warnings, 0);
    assert_int_equal(list_files(directory, path, 16), 2);
    delete_directory(directory);
    close_model(&h, m);
}

/* ---- Threads ---- */
typedef struct {
    q3n_cache    *cache;
    q3n__shape    shape;
    q3n_snapshot *shared;        /* another thread appends to its last page                      */
    int           number;
    int           wrong;
} job;

static void cache_job(void *arg)
{
    job *j = (job *)arg;
    uint32_t random = (uint32_t)j->number + 1;
    int32_t tokens[700];
    for (int i = 0; i < 100; i++) {
        const int text = (int)(next_random(&random) % 12);
        const int n = 1 + (int)(next_random(&random) % 700);
        tokens_of(text, tokens, n);
        q3n_snapshot *s = q3n__cache_find(j->cache, &j->shape, Q3N_TYPE_F32, tokens, n, 0);
        if (s) {
            j->wrong += s->length > n || !q3n__snapshot_is_prefix(s, tokens, n);
            bytes_io b = { 0 };
            const q3n_sink sink = { write_bytes, &b };
            j->wrong += q3n__snapshot_write(s, &sink, NULL) != Q3N_OK;
            free(b.data);
        }
        q3n_snapshot *more = make_snapshot(j->cache->model, &j->shape, Q3N_TYPE_F32, text,
                                           (n + 255) / 256 * 256 - 10, s);
        if (more) q3n__cache_put(j->cache, more, i % 4 == 0);
        else      j->wrong++;
        q3n__snapshot_release(more);
        q3n__snapshot_release(s);
        q3n__cache_touch(j->cache, &j->shape, Q3N_TYPE_F32, tokens, n, 0);
        q3n_cache_stats st = Q3N_INIT(q3n_cache_stats);
        q3n_cache_stats_get(j->cache, &st);
        j->wrong += st.bytes > j->cache->max_bytes;
        if (i % 40 == 39) q3n_cache_clear(j->cache);
    }
}

/* Appends after the shared snapshot's end, as a session would. */
static void append_job(void *arg)
{
    job *j = (job *)arg;
    q3n__page *page = j->shared->page[j->shared->n_pages - 1];
    const q3n__kv_cache kv = { .type = j->shape.kv_type, .n_kv_heads = j->shape.n_kv_heads,
                               .dim = j->shape.head_dim };
    float *k = (float *)(void *)q3n__page_block(page, &kv, 0, 0);
    float *v = k + Q3N__KV_BLOCK * j->shape.head_dim;
    for (int round = 0; round < 50; round++)
        for (int t = j->shared->length % Q3N__KV_BLOCK; t < Q3N__KV_BLOCK; t++) {
            page->tokens[t] = t + round;
            for (int d = 0; d < j->shape.head_dim; d++) {
                k[d * Q3N__KV_BLOCK + t] = (float)round;
                v[t * j->shape.head_dim + d] = (float)round;
            }
        }
}

static void check_threads(size_t max_bytes, const char *directory, int64_t max_directory_bytes)
{
    host h;
    q3n_model *m = open_model(&h, "qwen3_next");
    const q3n__shape shape = small_shape(Q3N_TYPE_F32);
    q3n_cache *c = new_cache(&h, m, max_bytes, directory, max_directory_bytes);
    q3n_snapshot *shared = new_snapshot(m, &shape, Q3N_TYPE_F32, 1, 300);
    q3n__cache_put(c, shared, 1);
    job jobs[5];
    q3n__thread threads[5];
    for (int i = 0; i < COUNT(jobs); i++) {
        jobs[i] = (job){ c, shape, shared, i, 0 };
        assert_true(q3n__thread_start(&threads[i], i == 4 ? append_job : cache_job, &jobs[i]));
    }
    for (int i = 0; i < COUNT(jobs); i++) {
        q3n__thread_join(&threads[i]);
        assert_int_equal(jobs[i].wrong, 0);
    }
    if (max_directory_bytes) assert_true(stats_of(c).file_bytes <= max_directory_bytes);
    q3n__snapshot_release(shared);
    q3n_cache_destroy(c);
    close_model(&h, m);
}

static void test_threads(void **state)
{
    (void)state;
    check_threads(200000, NULL, 0);
    char *directory = new_directory();
    check_threads(200000, directory, 200000);
    check_threads(60000, directory, 300000);
    delete_directory(directory);
}

/* ---- Main ---- */
#define CASE(test, model) { #test "(" #model ")", test, NULL, NULL, (void *)(uintptr_t)#model }

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_hash),
        CASE(test_round_trip, qwen3_next),
        CASE(test_round_trip, qwen3_next_mtp),
        CASE(test_round_trip, qwen3_5),
        CASE(test_round_trip, qwen3_5_moe),
        CASE(test_round_trip, qwen3_moe),
        CASE(test_round_trip, qwen3_dense),
        CASE(test_round_trip, qwen3_head_all_moe),
        cmocka_unit_test(test_round_trip_small),
        cmocka_unit_test(test_same_bytes),
        cmocka_unit_test(test_truncated),
        cmocka_unit_test(test_flipped),
        cmocka_unit_test(test_hostile),
        cmocka_unit_test(test_version_1),
        cmocka_unit_test(test_other_model),
        cmocka_unit_test(test_failing),
        cmocka_unit_test(test_save_fails),
        cmocka_unit_test(test_disk_full),
        cmocka_unit_test(test_common_prefix),
        cmocka_unit_test(test_longest),
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_budget),
        cmocka_unit_test(test_collision),
        cmocka_unit_test(test_cache_allocations),
        cmocka_unit_test(test_directory),
        cmocka_unit_test(test_damaged_files),
        cmocka_unit_test(test_many_damaged_files),
        cmocka_unit_test(test_strange_files),
        cmocka_unit_test(test_no_directory),
        cmocka_unit_test(test_directory_bytes),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
