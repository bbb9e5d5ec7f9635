#ifndef EP_TESTS_ST_BUILD_H
#define EP_TESTS_ST_BUILD_H
/*
 * Small safetensors files, and a Qwen3-MoE checkpoint of two layers quantised like GPTQ, made in
 * memory for tests. A recipe says what is wrong with the checkpoint; all zeros is a good one. Its
 * numbers come from a seed.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/base.h"
#include "model/safetensors.h"

/* ---- files ---- */

typedef struct sb_file {
    ep_buf header, data;
    int n;
} sb_file;

static inline void sb_must(ep_status s)
{
    if (s == EP_OK) return;
    printf("no memory\n");
    exit(1);
}

static inline void sb_add(sb_file *f, const char *name, const char *type, int n_dims,
                          const uint64_t *dim, const void *data, size_t bytes)
{
    sb_must(ep_buf_printf(&f->header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", f->n++ ? "," : "{",
                          name, type));
    for (int d = 0; d < n_dims; d++)
        sb_must(ep_buf_printf(&f->header, "%s%" PRIu64, d ? "," : "", dim[d]));
    sb_must(ep_buf_printf(&f->header, "],\"data_offsets\":[%zu,%zu]}", f->data.len,
                          f->data.len + bytes));
    sb_must(ep_buf_add(&f->data, data, bytes));
}

/* Length, header, data. */
static inline ep_buf sb_join(const char *header, size_t n, const void *data, size_t bytes)
{
    ep_buf b = {0};
    for (int i = 0; i < 8; i++) {
        uint8_t c = (uint8_t)((uint64_t)n >> 8 * i);
        sb_must(ep_buf_add(&b, &c, 1));
    }
    sb_must(ep_buf_add(&b, header, n));
    sb_must(ep_buf_add(&b, data, bytes));
    return b;
}

/* Ends the file, padded with blanks as tools do; frees f's parts. */
static inline ep_buf sb_end(sb_file *f)
{
    sb_must(ep_buf_printf(&f->header, "%s}", f->n ? "" : "{"));
    while (f->header.len % 8 != 0)
        sb_must(ep_buf_printf(&f->header, " "));
    ep_buf b = sb_join((const char *)f->header.data, f->header.len, f->data.data, f->data.len);
    ep_buf_fini(&f->header);
    ep_buf_fini(&f->data);
    return b;
}

/* ---- a checkpoint ---- */

enum {
    GX_LAYERS = 2,
    GX_EXPERTS = 3,
    GX_HIDDEN = 256,
    GX_INTER = 128,
    GX_HEADS = 2,
    GX_KV_HEADS = 1,
    GX_HEAD_DIM = 64,
    GX_VOCAB = 24
};

typedef struct gx_recipe {
    uint64_t seed;
    bool v2, g_idx, bias;
    const char *drop, *retype, *type, *rename, *to, *extra;
    const char *reshape; /* this tensor gets the shape below */
    uint64_t shape[2];
    const char *damage; /* this tensor's byte `at` is xored with `with` */
    size_t at;
    uint8_t with;
} gx_recipe;

typedef struct gx_maker {
    const gx_recipe *r;
    uint64_t state;
    sb_file *file;
    ep_buf *index;
    const char *part;
    int n;
} gx_maker;

static inline uint64_t gx_random(uint64_t *state)
{
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static inline bool gx_is(const char *a, const char *b)
{
    return a != NULL && strcmp(a, b) == 0;
}

/* kind: r random bytes, s scales, z zero points, g groups, 0 zeros. */
static inline void gx_tensor(gx_maker *m, const char *name, const char *type, uint64_t rows,
                             uint64_t columns, char kind)
{
    const gx_recipe *r = m->r;
    uint64_t dim[2] = {rows, columns};
    if (gx_is(r->drop, name)) return;
    if (gx_is(r->reshape, name)) memcpy(dim, r->shape, sizeof(dim));
    if (gx_is(r->retype, name)) type = r->type;
    int n_dims = dim[1] ? 2 : 1;
    size_t width = type[1] == '3' ? 4 : 2; /* I32 and F32, F16 */
    if (strcmp(type, "BF16") == 0) width = 2;
    size_t n = (size_t)(dim[0] * (dim[1] ? dim[1] : 1)), bytes = n * width;
    uint8_t *data = ep_calloc(bytes, 1);
    if (data == NULL) exit(1);
    for (size_t i = 0; i < bytes; i++) {
        if (kind == 'r') data[i] = (uint8_t)gx_random(&m->state);
        if (kind == 'z') data[i] = r->v2 ? 0x88 : 0x77;
        if (kind == 'g' && i % 4 == 0) data[i] = (uint8_t)(i / 4 / 128);
        if (kind == 's' && i % 2 == 0) {
            /* 2^-8 to 2^-5, either sign */
            uint64_t x = gx_random(&m->state);
            uint16_t h = (uint16_t)((x & 0x83ff) | (7 + (x >> 16) % 3) << 10);
            data[i] = (uint8_t)h;
            data[i + 1] = (uint8_t)(h >> 8);
        }
    }
    if (gx_is(r->damage, name)) data[r->at] ^= r->with;
    if (gx_is(r->rename, name)) name = r->to;
    sb_add(m->file, name, type, n_dims, dim, data, bytes);
    if (m->index != NULL)
        sb_must(ep_buf_printf(m->index, "%s\"%s\":\"%s\"", m->n++ ? "," : "", name, m->part));
    ep_free(data);
}

static inline void gx_matrix(gx_maker *m, const char *prefix, uint64_t n, uint64_t k)
{
    char name[128];
    size_t at = (size_t)snprintf(name, sizeof(name), "%s.", prefix);
    strcpy(name + at, "qweight");
    gx_tensor(m, name, "I32", k / 8, n, 'r');
    strcpy(name + at, "scales");
    gx_tensor(m, name, "F16", k / 128, n, 's');
    strcpy(name + at, "qzeros");
    gx_tensor(m, name, "I32", k / 128, n / 8, 'z');
    strcpy(name + at, "g_idx");
    if (m->r->g_idx) gx_tensor(m, name, "I32", k, 0, 'g');
    strcpy(name + at, "bias");
    if (m->r->bias) gx_tensor(m, name, "F16", n, 0, '0');
}

static inline void gx_layer(gx_maker *m, int l)
{
    static const struct {
        const char *name, *type;
        uint64_t rows, columns;
    } parts[] = {{"mlp.gate.weight", "BF16", GX_EXPERTS, GX_HIDDEN},
                 {"input_layernorm.weight", "BF16", GX_HIDDEN, 0},
                 {"post_attention_layernorm.weight", "BF16", GX_HIDDEN, 0},
                 {"self_attn.q_norm.weight", "BF16", GX_HEAD_DIM, 0},
                 {"self_attn.k_norm.weight", "BF16", GX_HEAD_DIM, 0},
                 {"self_attn.q_proj.weight", "BF16", GX_HEADS * GX_HEAD_DIM, GX_HIDDEN},
                 {"self_attn.k_proj.weight", "BF16", GX_KV_HEADS * GX_HEAD_DIM, GX_HIDDEN},
                 {"self_attn.o_proj.weight", "F16", GX_HIDDEN, GX_HEADS * GX_HEAD_DIM}};
    char name[128];
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        snprintf(name, sizeof(name), "model.layers.%d.%s", l, parts[i].name);
        gx_tensor(m, name, parts[i].type, parts[i].rows, parts[i].columns, 'r');
    }
    snprintf(name, sizeof(name), "model.layers.%d.self_attn.v_proj", l);
    gx_matrix(m, name, GX_KV_HEADS * GX_HEAD_DIM, GX_HIDDEN);
    for (int i = 0; i < 3 * GX_EXPERTS; i++) {
        static const char *const roles[] = {"gate_proj", "up_proj", "down_proj"};
        bool down = i % 3 == 2;
        snprintf(name, sizeof(name), "model.layers.%d.mlp.experts.%d.%s", l, i / 3, roles[i % 3]);
        gx_matrix(m, name, down ? GX_HIDDEN : GX_INTER, down ? GX_INTER : GX_HIDDEN);
    }
}

#define GX_PART_0 "model-00001-of-00002.safetensors"
#define GX_PART_1 "model-00002-of-00002.safetensors"
#define GX_INDEX  "model.safetensors.index.json"

/* Two files and their index; with index NULL everything is in parts[0]. */
static inline void gx_make(const gx_recipe *r, ep_buf parts[2], ep_buf *index)
{
    sb_file files[2] = {{.n = 0}, {.n = 0}};
    gx_maker m = {.r = r, .state = r->seed, .index = index};
    if (index != NULL)
        sb_must(ep_buf_printf(index, "{\"metadata\":{\"total_size\":0},\"weight_map\":{"));
    for (int l = 0; l < GX_LAYERS; l++) {
        m.file = &files[index != NULL ? l : 0];
        m.part = l ? GX_PART_1 : GX_PART_0;
        gx_layer(&m, l);
    }
    gx_tensor(&m, "model.embed_tokens.weight", "BF16", GX_VOCAB, GX_HIDDEN, 'r');
    gx_tensor(&m, "model.norm.weight", "BF16", GX_HIDDEN, 0, 'r');
    gx_tensor(&m, "lm_head.weight", "BF16", GX_VOCAB, GX_HIDDEN, 'r');
    if (r->extra != NULL) gx_tensor(&m, r->extra, "BF16", 8, 0, 'r');
    if (index != NULL) sb_must(ep_buf_printf(index, "}}"));
    parts[0] = sb_end(&files[0]);
    parts[1] = sb_end(&files[1]);
}

#define GX_QUANT                                                                                   \
    "\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128,\"sym\":true,\"desc_act\":false"
#define GX_CONFIG                                                                                  \
    "\"model_type\":\"qwen3_moe\",\"hidden_act\":\"silu\",\"num_hidden_layers\":2,\"num_"          \
    "experts\":3,"                                                                                 \
    "\"hidden_size\":256,\"moe_intermediate_size\":128,\"num_attention_heads\":2,"                 \
    "\"num_key_value_heads\":1,\"head_dim\":64,\"vocab_size\":24,\"mlp_only_layers\":[],"          \
    "\"decoder_sparse_step\":1,\"num_experts_per_tok\":2,\"max_position_embeddings\":64"

#endif
