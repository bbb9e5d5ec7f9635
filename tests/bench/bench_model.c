/*
 * moed-bench model: writes a GGUF of a known model's shape with random weights, for measuring a
 * whole model where none can be had. Types are those of a Q4_K_M file (Q6_K for attn_v, ffn_down of
 * half the layers and the output, Q4_K elsewhere) or one type throughout. The tokenizer is the
 * bytes and fillers: enough for every program that wants one. What it generates is noise.
 */
#include <argp.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "tests/bench/bench.h"

enum { VOCAB = 2048, CONTEXT = 4096, ALIGN = 32, CHUNK_ROWS = 64 };

typedef struct tensor {
    char name[64];
    int n_dims, type;
    uint64_t ne[3], offset, rows;
} tensor;

typedef struct writer {
    FILE *f;
    bench_random random;
    const char *path, *types;
    int layers, hidden, heads, kv_heads, head_dim, experts, top_k, inter;
    tensor *tensors;
    int n_tensors;
    uint64_t data_bytes;
    bool failed;
} writer;

static void put(writer *w, const void *p, size_t n)
{
    if (fwrite(p, 1, n, w->f) != n) w->failed = true;
}
static void put_u32(writer *w, uint32_t v)
{
    put(w, &v, 4);
}
static void put_u64(writer *w, uint64_t v)
{
    put(w, &v, 8);
}
static void put_text(writer *w, const char *s)
{
    put_u64(w, strlen(s));
    put(w, s, strlen(s));
}
static void key_u32(writer *w, const char *k, int v)
{
    put_text(w, k);
    put_u32(w, 4);
    put_u32(w, (uint32_t)v);
}
static void key_f32(writer *w, const char *k, float v)
{
    put_text(w, k);
    put_u32(w, 6);
    put(w, &v, 4);
}
static void key_text(writer *w, const char *k, const char *v)
{
    put_text(w, k);
    put_u32(w, 8);
    put_text(w, v);
}

/* GPT-2's printable character for a byte, in UTF-8. */
static void byte_token(int b, char *out)
{
    bool plain = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
    int code = b, skipped = 0;
    for (int i = 0; !plain && i < b; i++)
        skipped += !((i >= 33 && i <= 126) || (i >= 161 && i <= 172) || (i >= 174 && i <= 255));
    if (!plain) code = 256 + skipped;
    if (code < 128) {
        out[0] = (char)code;
        out[1] = '\0';
    } else {
        out[0] = (char)(0xc0 | code >> 6);
        out[1] = (char)(0x80 | (code & 63));
        out[2] = '\0';
    }
}

static void put_tokenizer(writer *w)
{
    char text[32];
    key_text(w, "tokenizer.ggml.model", "gpt2");
    key_text(w, "tokenizer.ggml.pre", "qwen2");
    put_text(w, "tokenizer.ggml.tokens");
    put_u32(w, 9);
    put_u32(w, 8);
    put_u64(w, VOCAB);
    for (int i = 0; i < VOCAB; i++) {
        if (i < 256)
            byte_token(i, text);
        else
            snprintf(text, sizeof(text),
                     i == VOCAB - 1 ? "<|endoftext|>"
                     : i == 256     ? "ee"
                                    : "<f%d>",
                     i);
        put_text(w, text);
    }
    put_text(w, "tokenizer.ggml.token_type");
    put_u32(w, 9);
    put_u32(w, 5);
    put_u64(w, VOCAB);
    for (int i = 0; i < VOCAB; i++)
        put_u32(w, i == VOCAB - 1 ? 3 : 1);
    put_text(w, "tokenizer.ggml.merges");
    put_u32(w, 9);
    put_u32(w, 8);
    put_u64(w, 1);
    put_text(w, "e e");
    key_u32(w, "tokenizer.ggml.eos_token_id", VOCAB - 1);
}

enum { N_KEYS = 15 + 6 }; /* what put_keys and put_tokenizer write */

static void put_keys(writer *w)
{
    key_text(w, "general.architecture", "qwen3moe");
    key_text(w, "general.name", "random weights");
    key_u32(w, "qwen3moe.context_length", CONTEXT);
    key_u32(w, "qwen3moe.embedding_length", w->hidden);
    key_u32(w, "qwen3moe.block_count", w->layers);
    key_u32(w, "qwen3moe.feed_forward_length", w->inter);
    key_u32(w, "qwen3moe.expert_feed_forward_length", w->inter);
    key_u32(w, "qwen3moe.attention.head_count", w->heads);
    key_u32(w, "qwen3moe.attention.head_count_kv", w->kv_heads);
    key_u32(w, "qwen3moe.attention.key_length", w->head_dim);
    key_u32(w, "qwen3moe.attention.value_length", w->head_dim);
    key_f32(w, "qwen3moe.rope.freq_base", 1e6f);
    key_f32(w, "qwen3moe.attention.layer_norm_rms_epsilon", 1e-6f);
    key_u32(w, "qwen3moe.expert_count", w->experts);
    key_u32(w, "qwen3moe.expert_used_count", w->top_k);
    put_tokenizer(w);
}

static void add(writer *w, const char *name, int type, int n_dims, uint64_t a, uint64_t b,
                uint64_t c)
{
    tensor *t = &w->tensors[w->n_tensors++];
    *t = (tensor){
        .n_dims = n_dims, .type = type, .ne = {a, b, c}, .offset = w->data_bytes, .rows = b * c};
    snprintf(t->name, sizeof(t->name), "%s", name);
    uint64_t bytes = kern_type_row_bytes(type, (int)a) * t->rows;
    w->data_bytes += (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

static void add_layer(writer *w, int l)
{
    bool mixed = strcmp(w->types, "q4_k_m") == 0;
    int low = mixed ? KERN_Q4_K : strcmp(w->types, "q8_0") == 0 ? KERN_Q8_0 : KERN_BF16;
    int high = mixed && l % 2 == 0 ? KERN_Q6_K : low;
    uint64_t h = (uint64_t)w->hidden, q = (uint64_t)(w->heads * w->head_dim),
             kv = (uint64_t)(w->kv_heads * w->head_dim), e = (uint64_t)w->experts,
             f = (uint64_t)w->inter, d = (uint64_t)w->head_dim;
    const struct {
        const char *name;
        int type, n_dims;
        uint64_t ne[3];
    } list[] = {
        {"attn_norm", KERN_F32, 1, {h, 1, 1}},    {"attn_q", low, 2, {h, q, 1}},
        {"attn_k", low, 2, {h, kv, 1}},           {"attn_v", high, 2, {h, kv, 1}},
        {"attn_output", low, 2, {q, h, 1}},       {"attn_q_norm", KERN_F32, 1, {d, 1, 1}},
        {"attn_k_norm", KERN_F32, 1, {d, 1, 1}},  {"ffn_norm", KERN_F32, 1, {h, 1, 1}},
        {"ffn_gate_inp", KERN_F32, 2, {h, e, 1}}, {"ffn_gate_exps", low, 3, {h, f, e}},
        {"ffn_up_exps", low, 3, {h, f, e}},       {"ffn_down_exps", high, 3, {f, h, e}},
    };
    for (size_t i = 0; i < sizeof(list) / sizeof(list[0]); i++) {
        char name[64];
        snprintf(name, sizeof(name), "blk.%d.%s.weight", l, list[i].name);
        add(w, name, list[i].type, list[i].n_dims, list[i].ne[0], list[i].ne[1], list[i].ne[2]);
    }
}

static void add_all(writer *w)
{
    bool mixed = strcmp(w->types, "q4_k_m") == 0;
    int ends = mixed ? KERN_Q6_K : strcmp(w->types, "q8_0") == 0 ? KERN_Q8_0 : KERN_BF16;
    add(w, "token_embd.weight", ends == KERN_Q6_K ? KERN_Q4_K : ends, 2, (uint64_t)w->hidden, VOCAB,
        1);
    add(w, "output_norm.weight", KERN_F32, 1, (uint64_t)w->hidden, 1, 1);
    add(w, "output.weight", ends, 2, (uint64_t)w->hidden, VOCAB, 1);
    for (int l = 0; l < w->layers; l++)
        add_layer(w, l);
}

static void put_padding(writer *w)
{
    static const char zeros[ALIGN];
    long at = ftell(w->f);
    if (at < 0)
        w->failed = true;
    else if (at % ALIGN != 0)
        put(w, zeros, (size_t)(ALIGN - at % ALIGN));
}

static void put_tensor(writer *w, const tensor *t)
{
    int k = (int)t->ne[0];
    size_t row = kern_type_row_bytes(t->type, k);
    uint8_t *buffer = ep_alloc(row * CHUNK_ROWS);
    float one = 1.0f;
    if (buffer == NULL) w->failed = true;
    for (uint64_t at = 0; at < t->rows && !w->failed; at += CHUNK_ROWS) {
        int n = (int)(t->rows - at < CHUNK_ROWS ? t->rows - at : CHUNK_ROWS);
        if (t->n_dims == 1) /* norms */
            for (int i = 0; i < k; i++)
                memcpy(buffer + 4 * i, &one, 4);
        else
            bench_weights(&w->random, t->type, n, k, buffer);
        put(w, buffer, row * (size_t)n);
    }
    ep_free(buffer);
    put_padding(w);
}

static void put_file(writer *w)
{
    put(w, "GGUF", 4);
    put_u32(w, 3);
    put_u64(w, (uint64_t)w->n_tensors);
    put_u64(w, N_KEYS);
    put_keys(w);
    for (int i = 0; i < w->n_tensors; i++) {
        const tensor *t = &w->tensors[i];
        put_text(w, t->name);
        put_u32(w, (uint32_t)t->n_dims);
        for (int d = 0; d < t->n_dims; d++)
            put_u64(w, t->ne[d]);
        put_u32(w, (uint32_t)t->type);
        put_u64(w, t->offset);
    }
    put_padding(w);
    for (int i = 0; i < w->n_tensors && !w->failed; i++) {
        fprintf(stderr, "\r%d of %d tensors ", i + 1, w->n_tensors);
        put_tensor(w, &w->tensors[i]);
    }
    fprintf(stderr, "\n");
}

static const struct argp_option model_options[] = {
    {"layers", 'l', "N", 0, "layers (4)", 0},
    {"types", 't', "NAME", 0, "q4_k_m (the default), q8_0 or bf16", 0},
    {"shape", 's', "NAME", 0, "qwen3-30b (the default) or small (hidden 512, 16 experts)", 0},
    {0}};

static error_t parse_model(int key, char *arg, struct argp_state *state)
{
    writer *w = state->input;
    switch (key) {
    case 'l':
        w->layers = atoi(arg);
        if (w->layers < 1 || w->layers > 128) argp_error(state, "--layers needs 1 to 128");
        return 0;
    case 't':
        w->types = arg;
        if (strcmp(arg, "q4_k_m") != 0 && strcmp(arg, "q8_0") != 0 && strcmp(arg, "bf16") != 0)
            argp_error(state, "there are no types \"%s\"", arg);
        return 0;
    case 's':
        if (strcmp(arg, "small") == 0) {
            w->hidden = 512, w->heads = 8, w->kv_heads = 2, w->head_dim = 64, w->experts = 16,
            w->top_k = 4, w->inter = 256;
        } else if (strcmp(arg, "qwen3-30b") != 0) {
            argp_error(state, "there is no shape \"%s\"", arg);
        }
        return 0;
    case ARGP_KEY_ARG:
        if (w->path != NULL) argp_error(state, "one file");
        w->path = arg;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_error(state, "which file? moed-bench model OUT.gguf");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int bench_model(int argc, char **argv)
{
    static const struct argp argp = {.options = model_options,
                                     .parser = parse_model,
                                     .args_doc = "OUT.gguf",
                                     .doc = "Writes a model file with random weights."};
    writer w = {.types = "q4_k_m",
                .layers = 4,
                .hidden = 2048,
                .heads = 32,
                .kv_heads = 4,
                .head_dim = 128,
                .experts = 128,
                .top_k = 8,
                .inter = 768,
                .random = {.state = 20261120}};
    if (argp_parse(&argp, argc, argv, 0, NULL, &w) != 0) return 2;
    w.tensors = ep_calloc(3 + 12 * (size_t)w.layers, sizeof(*w.tensors));
    w.f = w.tensors != NULL ? fopen(w.path, "wb") : NULL;
    if (w.f == NULL) {
        fprintf(stderr, "%s: %s\n", w.path, strerror(errno));
        ep_free(w.tensors);
        return 1;
    }
    add_all(&w);
    put_file(&w);
    if (fclose(w.f) != 0) w.failed = true;
    ep_free(w.tensors);
    if (w.failed) {
        fprintf(stderr, "%s: cannot be written\n", w.path);
        return 1;
    }
    printf("%s: %d layers, %s, %.0f MiB\n", w.path, w.layers, w.types,
           (double)w.data_bytes / 1048576.0);
    return 0;
}
