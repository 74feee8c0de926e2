/* q3n info: what is in a model file, and what running it takes. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

typedef struct type_sum {
    int     n;
    int64_t bytes, elements;
} type_sum;

static void sum_types(const q3n_model *m, type_sum sums[Q3N_TYPE_COUNT])
{
    memset(sums, 0, Q3N_TYPE_COUNT * sizeof *sums);
    for (int i = 0; i < q3n_model_n_tensors(m); i++) {
        const q3n_tensor t = *q3n_model_tensor(m, i);
        sums[t.type].n++;
        sums[t.type].bytes    += t.bytes;
        sums[t.type].elements += t.dim[0] * t.dim[1] * t.dim[2];
    }
}

static int count_layers(const unsigned char *kinds, int n)
{
    int count = 0;
    for (int l = 0; l < n; l++) count += kinds[l] != 0;
    return count;
}

/* Session memory for options o; 0 if they are impossible. */
static q3n_session_memory plan_memory(const q3n_model *m, const q3n_session_options *o)
{
    q3n_session_memory memory = Q3N_INIT(q3n_session_memory);
    q3n_session_bytes(m, o, &memory);
    return memory;
}

/* What it takes to run the model: `capacity` tokens in one session, and snapshots of it. */
typedef struct plan {
    int64_t weights;             /* mapped */
    int     capacity, snapshots;
    q3n_session_memory session;
    double  total;
} plan;

static plan make_plan(const q3n_model *m, const q3n_session_options *o, int snapshots)
{
    q3n_model_stats s = Q3N_INIT(q3n_model_stats);
    q3n_model_stats_get(m, &s);
    plan p = { .weights = s.file_bytes, .snapshots = snapshots };
    p.capacity = o->capacity ? o->capacity : q3n_model_config(m)->max_position_embeddings;
    p.session  = plan_memory(m, o);
    p.total    = (double)p.weights + (double)p.session.total
               + (double)p.session.snapshot * snapshots;
    return p;
}

/* ---- For people ---- */

static void print_config(const q3n_model *m)
{
    const q3n_config *c = q3n_model_config(m);
    printf("configuration\n");
    char text[64];
    const char *name;
    for (int i = 0; (name = q3n_config_field(c, i, text)) != NULL; i++) {
        printf("  %-32s %s\n", name, text);
    }
    const int n = c->num_hidden_layers;
    const int delta = count_layers(c->layer_types, n), moe = count_layers(c->layer_experts, n);
    printf("  %-32s %d attention, %d DeltaNet; %d with experts, %d dense\n", "layers", n - delta,
           delta, moe, n - moe);
}

static void print_sizes(const q3n_model *m)
{
    q3n_model_stats s = Q3N_INIT(q3n_model_stats);
    type_sum sums[Q3N_TYPE_COUNT];
    char a[32], b[32];
    q3n_model_stats_get(m, &s);
    sum_types(m, sums);
    printf("parameters\n  %-32s %s\n  %-32s %s\n", "total",
           cli_format_count(a, (double)s.n_weights), "active per token",
           cli_format_count(b, (double)s.n_weights_active));
    if (s.mtp_weights) {
        printf("  %-32s %s\n", "multi-token prediction",
               cli_format_count(a, (double)s.mtp_weights));
    }
    printf("  %-32s %s\n", "weights read per decoded token",
           cli_format_bytes(a, (double)s.decode_bytes));
    printf("tensors\n");
    for (int t = 0; t < Q3N_TYPE_COUNT; t++) {
        if (!sums[t].n) continue;
        printf("  %-8s %6d tensors  %9s elements  %9s\n", q3n_type_name((q3n_type)t), sums[t].n,
               cli_format_count(a, (double)sums[t].elements),
               cli_format_bytes(b, (double)sums[t].bytes));
    }
}

static void print_tensors(const q3n_model *m)
{
    for (int i = 0; i < q3n_model_n_tensors(m); i++) {
        const q3n_tensor t = *q3n_model_tensor(m, i);
        char shape[72], size[32];
        int n = 0;
        for (int d = 0; d < t.n_dims; d++) {
            n += snprintf(shape + n, sizeof shape - (size_t)n, "%s%lld", d ? ", " : "[",
                          (long long)t.dim[d]);
        }
        const int pad = 56 - (int)strlen(t.name);
        printf("  ");
        cli_print_text(stdout, t.name, strlen(t.name));
        printf("%*s %-5s %s]  %s at %lld\n", pad > 0 ? pad : 0, "", q3n_type_name(t.type), shape,
               cli_format_bytes(size, (double)t.bytes), (long long)t.offset);
    }
}

/* A string of the file, to the end of the line. */
static void print_string(const char *text)
{
    cli_print_text(stdout, text, strlen(text));
    printf("\n");
}

/* What an empty text gets. */
static void print_around(const q3n_model *m, int flags, const char *what)
{
    int32_t ids[64];
    size_t n = 0;
    if (q3n_tokenize(m, NULL, 0, flags, ids, CLI_COUNT(ids), &n) != Q3N_OK || n == 0) return;
    printf("  %-32s", what);
    for (size_t i = 0; i < n; i++) {
        printf(" %ld ", (long)ids[i]);
        cli_print_piece(stdout, m, ids[i]);
    }
    printf("\n");
}

static void print_text(const q3n_model *m)
{
    int n_eos = 0;
    const int32_t *eos = q3n_model_eos_ids(m, &n_eos);
    printf("text\n");
    if (q3n_model_n_tokens(m)) printf("  %-32s %d tokens\n", "tokenizer", q3n_model_n_tokens(m));
    else                       printf("  %-32s none: the model works on ids\n", "tokenizer");
    printf("  %-32s", "end-of-text ids");
    for (int i = 0; i < n_eos; i++) {
        printf(" %ld ", (long)eos[i]);
        cli_print_piece(stdout, m, eos[i]);
    }
    printf("\n");
    print_around(m, Q3N_TOKENIZE_PREFIX, "put before a text");
    print_around(m, Q3N_TOKENIZE_SUFFIX, "put after a text");
    printf("  %-32s ", "chat template");
    print_string(q3n_model_chat_kind(m));
    if (q3n_model_label(m, 0)) printf("labels\n");
    for (int i = 0; q3n_model_label(m, i); i++) {
        printf("  %-32d ", i);
        print_string(q3n_model_label(m, i));
    }
}

static void print_memory_row(const q3n_model *m, const q3n_session_options *o)
{
    const q3n_session_memory memory = plan_memory(m, o);
    const size_t part[] = { memory.kv_cache, memory.delta_state + memory.conv_state,
                            memory.scratch, memory.other, memory.total };
    printf("  %9d", o->capacity);
    for (int i = 0; i < CLI_COUNT(part); i++) {
        char text[32];
        if (memory.total) printf(" %10s", cli_format_bytes(text, (double)part[i]));
        else              printf(" %10s", "-");
    }
    printf("\n");
}

static void print_part(const char *name, double bytes)
{
    char text[32];
    printf("  %-32s %s\n", name, cli_format_bytes(text, bytes));
}

static void print_plan(const plan *p)
{
    const q3n_session_memory *s = &p->session;
    char name[64], initial[32], page[32];
    printf("memory\n");
    print_part("weights, mapped", (double)p->weights);
    if (s->total == 0) {
        printf("  a session of %d tokens is impossible\n", p->capacity);
        return;
    }
    snprintf(name, sizeof name, "session of %d tokens", p->capacity);
    print_part(name, (double)s->total);
    print_part("  keys, values, ids", (double)s->kv_cache);
    print_part("  DeltaNet states", (double)s->delta_state);
    print_part("  convolution columns", (double)s->conv_state);
    print_part("  scratch", (double)s->scratch);
    print_part("  other", (double)s->other);
    printf("  %-32s %s, then %s for each 256 tokens\n", "  of it when it is made",
           cli_format_bytes(initial, (double)s->initial),
           cli_format_bytes(page, (double)s->page));
    snprintf(name, sizeof name, "%d snapshot%s", p->snapshots, p->snapshots == 1 ? "" : "s");
    print_part(p->snapshots ? name : "a snapshot would take",
               (double)s->snapshot * (p->snapshots ? p->snapshots : 1));
    print_part("total", p->total);
}

static void print_memory(const q3n_model *m, const q3n_session_options *o, const plan *p)
{
    print_plan(p);
    printf("a session by tokens\n  %9s %10s %10s %10s %10s %10s\n", "tokens", "kv cache", "states",
           "scratch", "other", "total");
    q3n_session_options row = *o;
    for (int64_t n = 1024; !o->capacity && n < p->capacity; n *= 4) {
        row.capacity = (int)n;
        print_memory_row(m, &row);
    }
    row.capacity = p->capacity;
    print_memory_row(m, &row);
}

static void print_isas(void)
{
    printf("instruction sets\n  %-32s", "of this machine");
    for (int i = 0; cli_isa(i); i++) {
        if (q3n_isa_supported(cli_isa(i))) printf(" %s", q3n_isa_name(cli_isa(i)));
    }
    printf("\n");
}

/* ---- For programs ---- */

static void json_config(const q3n_config *c)
{
    char text[64];
    const char *name;
    printf("\"config\": {");
    for (int i = 0; (name = q3n_config_field(c, i, text)) != NULL; i++) {
        char *end = NULL;
        (void)strtod(text, &end);
        printf("%s", i ? ", " : "");
        if (text[0] && *end == 0) printf("\"%s\": %s", name, text);
        else                      cli_json_member(stdout, name, text);
    }
    const unsigned char *const kinds[] = { c->layer_types, c->layer_experts };
    const char *const names[] = { "layer_types", "layer_experts" };
    for (int k = 0; k < 2; k++) {
        printf(", \"%s\": [", names[k]);
        for (int l = 0; l < c->num_hidden_layers; l++) printf("%s%d", l ? ", " : "", kinds[k][l]);
        printf("]");
    }
    printf("}, ");
}

static void json_sizes(const q3n_model *m)
{
    q3n_model_stats s = Q3N_INIT(q3n_model_stats);
    type_sum sums[Q3N_TYPE_COUNT];
    q3n_model_stats_get(m, &s);
    sum_types(m, sums);
    printf("\"file_bytes\": %lld, \"parameters\": %lld, \"active_parameters\": %lld, "
           "\"mtp_parameters\": %lld, \"decode_bytes\": %lld, \"types\": {",
           (long long)s.file_bytes, (long long)s.n_weights, (long long)s.n_weights_active,
           (long long)s.mtp_weights, (long long)s.decode_bytes);
    for (int t = 0, first = 1; t < Q3N_TYPE_COUNT; t++) {
        if (!sums[t].n) continue;
        printf("%s\"%s\": {\"tensors\": %d, \"elements\": %lld, \"bytes\": %lld}",
               first ? "" : ", ", q3n_type_name((q3n_type)t), sums[t].n,
               (long long)sums[t].elements, (long long)sums[t].bytes);
        first = 0;
    }
    printf("}, ");
}

static void json_tensors(const q3n_model *m)
{
    printf("\"tensors\": [");
    for (int i = 0; i < q3n_model_n_tensors(m); i++) {
        const q3n_tensor t = *q3n_model_tensor(m, i);
        printf("%s{", i ? ", " : "");
        cli_json_member(stdout, "name", t.name);
        printf(", \"type\": \"%s\", \"shape\": [", q3n_type_name(t.type));
        for (int d = 0; d < t.n_dims; d++) printf("%s%lld", d ? ", " : "", (long long)t.dim[d]);
        printf("], \"offset\": %lld, \"bytes\": %lld}", (long long)t.offset, (long long)t.bytes);
    }
    printf("], ");
}

static void json_plan(const plan *p)
{
    const q3n_session_memory *s = &p->session;
    printf("\"session\": {\"capacity\": %d, \"kv_cache\": %zu, \"delta_state\": %zu, "
           "\"conv_state\": %zu, \"scratch\": %zu, \"other\": %zu, \"total\": %zu, "
           "\"initial\": %zu, \"page\": %zu, \"snapshot\": %zu}, ", p->capacity, s->kv_cache,
           s->delta_state, s->conv_state, s->scratch, s->other, s->total, s->initial, s->page,
           s->snapshot);
    printf("\"plan\": {\"weights\": %lld, \"session\": %zu, \"snapshots\": %d, "
           "\"snapshot_bytes\": %.0f, \"total\": %.0f}",
           (long long)p->weights, s->total,
           p->snapshots, (double)s->snapshot * p->snapshots, p->total);
}

static void json_rest(const q3n_model *m, const plan *p)
{
    int n_eos = 0;
    const int32_t *eos = q3n_model_eos_ids(m, &n_eos);
    printf("\"tokens\": %d, \"eos_ids\": ", q3n_model_n_tokens(m));
    cli_json_ids(stdout, eos, (size_t)n_eos);
    printf(", ");
    cli_json_member(stdout, "chat", q3n_model_chat_kind(m));
    printf(", \"labels\": [");
    for (int i = 0; q3n_model_label(m, i); i++) {
        const char *name = q3n_model_label(m, i);
        if (i) printf(", ");
        cli_json_string(stdout, name, strlen(name));
    }
    printf("], \"isas\": [");
    for (int i = 0, n = 0; cli_isa(i); i++) {
        if (!q3n_isa_supported(cli_isa(i))) continue;
        printf("%s\"%s\"", n++ ? ", " : "", q3n_isa_name(cli_isa(i)));
    }
    printf("], ");
    json_plan(p);
}

int cmd_info(int argc, char **argv)
{
    cli_setup setup = { 0 };
    int json = 0, tensors = 0, snapshots = 0;
    const cli_option options[] = {
        CLI_MODEL_OPTIONS(setup),
        { "--tensors", NULL, CLI_FLAG, &tensors, 0, 0, "list every tensor" },
        { "--json", NULL, CLI_FLAG, &json, 0, 0, "one object" },
        { "--snapshots", "N", CLI_INT, &snapshots, 0, 1 << 20,
          "plan memory for so many snapshots" },
        CLI_SESSION_OPTIONS(setup),
    };
    const cli_syntax syntax = {
        "info MODEL.q3n [options]",
        "Prints configuration, types, sizes, tokenizer and the memory that running takes:\n"
        "weights, a session of --ctx tokens by part, --snapshots of it.  Pages that only a\n"
        "snapshot holds come on top: one for each 256 tokens that the session no longer shares.",
        options, CLI_COUNT(options), 1, NULL, NULL,
    };
    cli_words words;
    if (!cli_parse(&syntax, argc, argv, &words)) return cli_finish();
    q3n_model *m = cli_open_model(&setup, &words);
    const q3n_session_options o = cli_session_options(&setup);
    const plan p = make_plan(m, &o, snapshots);
    if (json) {
        printf("{");
        cli_json_member(stdout, "name", q3n_model_name(m));
        printf(", ");
        json_config(q3n_model_config(m));
        json_sizes(m);
        if (tensors) json_tensors(m);
        json_rest(m, &p);
        printf("}\n");
    } else {
        printf("%s  ", setup.model);
        print_string(q3n_model_name(m));
        print_config(m);
        print_sizes(m);
        if (tensors) print_tensors(m);
        print_text(m);
        print_memory(m, &o, &p);
        print_isas();
    }
    q3n_model_close(m);
    return cli_finish();
}
