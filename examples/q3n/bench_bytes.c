/* What a token reads and computes. */
#include "bench.h"

#include <string.h>

/* Bytes of DeltaNet's matrices and convolution columns, which every token reads. */
static double state_bytes(const q3n_config *c)
{
    const int keys = c->linear_num_key_heads * c->linear_key_head_dim;
    const int values = c->linear_num_value_heads * c->linear_value_head_dim;
    int layers = 0;
    for (int l = 0; l < c->num_hidden_layers; l++) layers += c->layer_types[l] != 0;
    return 4.0 * layers * ((double)values * c->linear_key_head_dim
                           + (double)(2 * keys + values) * (c->linear_conv_kernel_dim - 1));
}

/* Bytes of all experts, without those of the MTP module. */
static double expert_bytes(const q3n_model *m)
{
    double bytes = 0.0;
    for (int i = 0; i < q3n_model_n_tensors(m); i++) {
        const q3n_tensor *t = q3n_model_tensor(m, i);
        if (strncmp(t->name, "mtp.", 4) == 0) continue;
        if (strstr(t->name, ".mlp.experts.")) bytes += (double)t->bytes;
    }
    return bytes;
}

/* Tokens in the session in the middle of the measured ones. */
static double middle(const bench *b, const bench_case *c, int repeats)
{
    const double half = 0.5 * b->n_decode;
    /* After a depth, one run to warm up comes before those that count. */
    return c->value ? c->value + half * (repeats + 2) : half;
}

bench_reading bench_token(const bench *b, const bench_case *c, int repeats)
{
    const q3n_config *config = q3n_model_config(b->m);
    const int page_tokens = 256;
    const q3n_session_options o = bench_options(b, c->thread, 1);
    q3n_session_memory memory = Q3N_INIT(q3n_session_memory);
    q3n_session_bytes(b->m, &o, &memory);
    bench_reading r = { .threads = b->threads.value[c->thread], .pool = expert_bytes(b->m) };
    if (config->num_experts > 0) {
        r.cold = r.pool / config->num_experts * config->num_experts_per_tok;
    }
    r.hot = (double)b->stats.decode_bytes - r.cold + state_bytes(config)
          + (double)memory.page * middle(b, c, repeats) / page_tokens;
    return r;
}

/* At best the caches hold what every token reads, and then experts, each as likely to be the next
 * one as another. */
double bench_memory_bytes(const bench_reading *r, double cache)
{
    if (cache < r->hot) return r->hot - cache + r->cold;
    const double rest = cache - r->hot;
    return rest < r->pool ? r->cold * (1.0 - rest / r->pool) : 0.0;
}

double bench_prompt_macs(const bench *b, int n)
{
    const char *name = q3n_model_config(b->m)->tie_word_embeddings ? "embed_tokens.weight"
                                                                   : "lm_head.weight";
    const q3n_tensor *head = q3n_model_find_tensor(b->m, name);
    const double head_macs = head ? (double)head->dim[0] * (double)head->dim[1] : 0.0;
    return ((double)b->stats.n_weights_active - head_macs) * n + head_macs;
}

double bench_bits_per_weight(const bench *b, const char **type)
{
    double bytes = 0.0, weights = 0.0, by_type[Q3N_TYPE_COUNT] = { 0.0 };
    int max = 0;
    for (int i = 0; i < q3n_model_n_tensors(b->m); i++) {
        const q3n_tensor t = *q3n_model_tensor(b->m, i);
        const double n = (double)t.dim[0] * (double)t.dim[1] * (double)t.dim[2];
        bytes   += (double)t.bytes;
        weights += n;
        by_type[t.type] += n;
    }
    for (int i = 1; i < Q3N_TYPE_COUNT; i++) {
        if (by_type[i] > by_type[max]) max = i;
    }
    *type = q3n_type_name((q3n_type)max);
    return weights > 0.0 ? 8.0 * bytes / weights : 0.0;
}
