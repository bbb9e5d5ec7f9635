#ifndef EP_TESTS_UNIT_MODEL_FIXTURE_H
#define EP_TESTS_UNIT_MODEL_FIXTURE_H
/*
 * A small, right qwen3moe file, and a way to say how one differs from it.
 */
#include "model/model.h"
#include "tests/test.h"
#include "tests/unit/gguf_build.h"

enum { HIDDEN = 32, HEADS = 2, KV = 1, HEAD = 16, EXPERTS = 4, INTER = 48, VOCAB = 24, LAYERS = 2 };
enum { NO_KEY = -1 };

/* How a test departs from the right file: a key or tensor left out, put in, or put in another's
 * place. */
typedef struct change {
    const char *label, *drop, *key;
    int kind; /* GGUF kind of the key */
    double number;
    const char *text;
    const char *tensor;
    int type;
    uint64_t ne[4];
    ep_status status;
    const char *says;
} change;

static inline bool is_changed(const change *c, const char *name)
{
    return c != NULL && ((c->drop != NULL && strcmp(c->drop, name) == 0) ||
                         (c->key != NULL && strcmp(c->key, name) == 0) ||
                         (c->tensor != NULL && strcmp(c->tensor, name) == 0));
}

static inline void add_count(gb *g, const change *c, const char *name, uint32_t v)
{
    if (!is_changed(c, name)) gb_u32(g, name, v);
}

static inline void add_real(gb *g, const change *c, const char *name, float v)
{
    if (!is_changed(c, name)) gb_f32(g, name, v);
}

static inline uint64_t type_bytes(int type, const uint64_t *ne)
{
    uint64_t n = ne[0] * ne[1] * ne[2];
    int block = kern_type_block(type), bytes = kern_type_block_bytes(type);
    if (type == 10) return n / 256 * 84; /* Q2_K: known to the container alone */
    return n / (uint64_t)block * (uint64_t)bytes;
}

static inline void add_tensor(gb *g, const char *name, int type, uint64_t a, uint64_t b, uint64_t c)
{
    uint64_t ne[4] = {a, b ? b : 1, c ? c : 1, 1};
    gb_tensor(g, name, type, c ? 3 : b ? 2 : 1, ne, type_bytes(type, ne));
}

static inline void add(gb *g, const change *c, const char *name, uint64_t a, uint64_t b, uint64_t d)
{
    if (!is_changed(c, name)) add_tensor(g, name, KERN_F32, a, b, d);
}

static inline void add_layer(gb *g, const change *c, int layer)
{
    static const struct {
        const char *name;
        uint64_t a, b, d;
    } tensors[] = {
        {"attn_norm", HIDDEN, 0, 0},
        {"attn_q", HIDDEN, HEADS * HEAD, 0},
        {"attn_k", HIDDEN, KV * HEAD, 0},
        {"attn_v", HIDDEN, KV * HEAD, 0},
        {"attn_output", HEADS * HEAD, HIDDEN, 0},
        {"attn_q_norm", HEAD, 0, 0},
        {"attn_k_norm", HEAD, 0, 0},
        {"ffn_norm", HIDDEN, 0, 0},
        {"ffn_gate_inp", HIDDEN, EXPERTS, 0},
        {"ffn_gate_exps", HIDDEN, INTER, EXPERTS},
        {"ffn_up_exps", HIDDEN, INTER, EXPERTS},
        {"ffn_down_exps", INTER, HIDDEN, EXPERTS},
    };
    char name[64];
    for (size_t i = 0; i < sizeof(tensors) / sizeof(tensors[0]); i++) {
        snprintf(name, sizeof(name), "blk.%d.%s.weight", layer, tensors[i].name);
        add(g, c, name, tensors[i].a, tensors[i].b, tensors[i].d);
    }
}

static inline void add_changes(gb *g, const change *c)
{
    if (c == NULL) return;
    if (c->key != NULL && c->kind == 8) gb_str(g, c->key, c->text);
    if (c->key != NULL && c->kind == 6) gb_f32(g, c->key, (float)c->number);
    if (c->key != NULL && c->kind != 8 && c->kind != 6)
        gb_key_int(g, c->key, (uint32_t)c->kind, (uint64_t)(int64_t)c->number);
    if (c->tensor != NULL) add_tensor(g, c->tensor, c->type, c->ne[0], c->ne[1], c->ne[2]);
}

static inline ep_buf make(const change *c)
{
    gb g = gb_make();
    if (!is_changed(c, "general.architecture")) gb_str(&g, "general.architecture", "qwen3moe");
    gb_str(&g, "general.name", "small\ntest");
    add_count(&g, c, "qwen3moe.block_count", LAYERS);
    add_count(&g, c, "qwen3moe.embedding_length", HIDDEN);
    add_count(&g, c, "qwen3moe.context_length", 512);
    add_count(&g, c, "qwen3moe.attention.head_count", HEADS);
    add_count(&g, c, "qwen3moe.attention.head_count_kv", KV);
    add_count(&g, c, "qwen3moe.attention.key_length", HEAD);
    add_count(&g, c, "qwen3moe.attention.value_length", HEAD);
    add_count(&g, c, "qwen3moe.expert_count", EXPERTS);
    add_count(&g, c, "qwen3moe.expert_used_count", 2);
    add_count(&g, c, "qwen3moe.expert_feed_forward_length", INTER);
    add_real(&g, c, "qwen3moe.attention.layer_norm_rms_epsilon", 1e-6f);
    add_real(&g, c, "qwen3moe.rope.freq_base", 1e6f);
    add(&g, c, "token_embd.weight", HIDDEN, VOCAB, 0);
    add(&g, c, "output_norm.weight", HIDDEN, 0, 0);
    add(&g, c, "output.weight", HIDDEN, VOCAB, 0);
    for (int l = 0; l < LAYERS; l++)
        add_layer(&g, c, l);
    add_changes(&g, c);
    ep_buf b = gb_bytes(&g);
    gb_fini(&g);
    return b;
}

#endif
