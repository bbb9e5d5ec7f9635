/*
 * Names and layouts here are written down a second time on purpose: what a folder looks like is
 * what the tests hold the reader to. The rounding is that of a quantiser without calibration: the
 * scale of a group brings its largest magnitude to 7.
 */
#include "tests/hf_make.h"
#include "kernels/kernels.h"
#include "kernels/pack.h"
#include "tests/st_build.h"

#include <jansson.h>
#include <math.h>

enum { NAME = 128 };

static void *get(size_t bytes)
{
    void *p = ep_calloc(bytes, 1);
    sb_must(p != NULL ? EP_OK : EP_ERR_NOMEM);
    return p;
}

/* ---- numbers ---- */

static uint16_t to_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* Of a positive normal number, towards zero. */
static uint16_t to_half(float x)
{
    int e;
    float f = frexpf(x, &e); /* 0.5 <= f < 1 */
    if (x == 0 || e < -13) return 0x0400;
    return (uint16_t)((e + 14) << 10 | ((int)(f * 2048) & 1023));
}

/* One row of k floats as blocks. */
static void quantise_row(const float *x, int k, kern_block_gptq4 *out)
{
    for (int g = 0; g < k / GPTQ_GROUP; g++, out++) {
        float most = 0;
        for (int i = 0; i < GPTQ_GROUP; i++)
            most = fmaxf(most, fabsf(x[g * GPTQ_GROUP + i]));
        out->d = to_half(most / 7);
        float d = kern_half_to_float(out->d);
        memset(out->q, 0, sizeof(out->q));
        for (int i = 0; i < GPTQ_GROUP; i++) {
            int q = (int)lrintf(x[g * GPTQ_GROUP + i] / d) + 8;
            q = q < 0 ? 0 : q > 15 ? 15 : q;
            out->q[i / 2] |= (uint8_t)(q << 4 * (i % 2));
        }
    }
}

/* ---- tensors ---- */

typedef struct maker {
    const model *m;
    const hm_options *o;
    sb_file file;
} maker;

static void put_floats(maker *k, const char *name, const float *x, uint64_t n, uint64_t columns)
{
    size_t count = (size_t)(n * (columns ? columns : 1));
    uint64_t dim[2] = {n, columns};
    uint16_t *half = get(count * 2);
    for (size_t i = 0; i < count; i++)
        half[i] = to_bf16(x[i]);
    sb_add(&k->file, name, k->o->bf16 ? "BF16" : "F32", columns ? 2 : 1, dim,
           k->o->bf16 ? (const void *)half : x, count * (k->o->bf16 ? 2 : 4));
    ep_free(half);
}

static void put_words(maker *k, const char *prefix, const void *rows, int n, int columns)
{
    char name[NAME];
    uint64_t groups = (uint64_t)columns / GPTQ_GROUP,
             words[2] = {(uint64_t)columns / 8, (uint64_t)n};
    uint64_t halves[2] = {groups, (uint64_t)n}, zeros[2] = {groups, (uint64_t)n / 8};
    size_t bytes = (size_t)columns * (size_t)n / 2;
    uint8_t *q = get(bytes), *s = get((size_t)groups * (size_t)n * 2),
            *z = get((size_t)groups * (size_t)n / 2);
    gptq_rows_to_words(n, columns, rows, q, s);
    memset(z, k->o->v2 ? 0x88 : 0x77, (size_t)groups * (size_t)n / 2);
    snprintf(name, sizeof(name), "%s.qweight", prefix);
    sb_add(&k->file, name, "I32", 2, words, q, bytes);
    snprintf(name, sizeof(name), "%s.scales", prefix);
    sb_add(&k->file, name, "F16", 2, halves, s, (size_t)groups * (size_t)n * 2);
    snprintf(name, sizeof(name), "%s.qzeros", prefix);
    sb_add(&k->file, name, "I32", 2, zeros, z, (size_t)groups * (size_t)n / 2);
    ep_free(q);
    ep_free(s);
    ep_free(z);
}

/* Matrix i of a tensor of the GGUF file. */
static void put(maker *k, const char *prefix, const model_tensor *t, int i, bool linear)
{
    char name[NAME];
    int columns = (int)t->ne[0], n = (int)t->ne[1];
    size_t row = kern_type_row_bytes(t->type, columns),
           block_row = (size_t)(columns / GPTQ_GROUP) * sizeof(kern_block_gptq4);
    float *x = get((size_t)n * (size_t)columns * 4);
    uint8_t *blocks = get((size_t)n * block_row + 1);
    const uint8_t *rows;
    ep_buf made = {0};
    sb_must(model_rows(k->m, t, i, &made, &rows, NULL));
    bool gptq = linear && k->o->gptq;
    for (int r = 0; r < n; r++) {
        float *to = x + (size_t)r * (size_t)columns;
        uint8_t *block = blocks + (size_t)r * block_row;
        kern_dequant_row(t->type, rows + (size_t)r * row, to, columns);
        if (gptq) quantise_row(to, columns, (kern_block_gptq4 *)(void *)block);
        if (gptq && k->o->plain) kern_dequant_row(KERN_GPTQ4, block, to, columns);
    }
    snprintf(name, sizeof(name), "%s.weight", prefix);
    if (gptq && !k->o->plain)
        put_words(k, prefix, blocks, n, columns);
    else
        put_floats(k, name, x, t->n_dims == 1 ? (uint64_t)columns : (uint64_t)n,
                   t->n_dims == 1 ? 0 : (uint64_t)columns);
    ep_buf_fini(&made);
    ep_free(x);
    ep_free(blocks);
}

static void put_layer(maker *k, int l)
{
    const model_layer *y = &k->m->layers[l];
    const struct {
        const char *name;
        const model_tensor *t;
        bool linear;
    } parts[] = {
        {"input_layernorm", y->attn_norm, false}, {"post_attention_layernorm", y->ffn_norm, false},
        {"self_attn.q_norm", y->q_norm, false},   {"self_attn.k_norm", y->k_norm, false},
        {"mlp.gate", y->gate_inp, false},         {"self_attn.q_proj", y->q, true},
        {"self_attn.k_proj", y->k, true},         {"self_attn.v_proj", y->v, true},
        {"self_attn.o_proj", y->o, true}};
    static const char *const roles[] = {"gate_proj", "up_proj", "down_proj"};
    char name[NAME];
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        snprintf(name, sizeof(name), "model.layers.%d.%s", l, parts[i].name);
        put(k, name, parts[i].t, 0, parts[i].linear);
    }
    for (int i = 0; i < 3 * k->m->shape.n_experts; i++) {
        snprintf(name, sizeof(name), "model.layers.%d.mlp.experts.%d.%s", l, i / 3, roles[i % 3]);
        put(k, name, model_experts(k->m, l, i % 3), i / 3, true);
    }
}

static ep_buf make_tensors(const model *m, const hm_options *o)
{
    maker k = {.m = m, .o = o};
    put(&k, "model.embed_tokens", m->token_embd, 0, false);
    put(&k, "model.norm", m->output_norm, 0, false);
    if (m->output != m->token_embd) put(&k, "lm_head", m->output, 0, false);
    for (int l = 0; l < m->shape.n_layers; l++)
        put_layer(&k, l);
    if (!o->odd) return sb_end(&k.file);
    sb_must(ep_buf_printf(&k.file.header, k.file.header.len % 2 ? "} " : "}"));
    ep_buf b = sb_join((const char *)k.file.header.data, k.file.header.len, k.file.data.data,
                       k.file.data.len);
    ep_buf_fini(&k.file.header);
    ep_buf_fini(&k.file.data);
    return b;
}

/* ---- texts ---- */

static ep_buf dump(json_t *doc)
{
    ep_buf b = {0};
    char *text = json_dumps(doc, JSON_INDENT(1));
    sb_must(doc != NULL && text != NULL ? EP_OK : EP_ERR_NOMEM);
    sb_must(ep_buf_add(&b, text, strlen(text)));
    free(text);
    json_decref(doc);
    return b;
}

static ep_buf make_config(const model *m, const hm_options *o)
{
    const model_shape *s = &m->shape;
    json_t *doc = json_pack(
        "{s:[s], s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:b, s:b, s:s, "
        "s:i, s:[], s:b, s:n, s:b}",
        "architectures", "Qwen3MoeForCausalLM", "model_type", "qwen3_moe", "num_hidden_layers",
        s->n_layers, "hidden_size", s->hidden, "num_attention_heads", s->n_heads,
        "num_key_value_heads", s->n_kv_heads, "head_dim", s->head_dim, "num_experts", s->n_experts,
        "num_experts_per_tok", s->top_k, "moe_intermediate_size", s->inter, "vocab_size", s->vocab,
        "max_position_embeddings", s->context, "rope_theta", s->rope_base, "rms_norm_eps",
        (double)s->rms_eps, "norm_topk_prob", (int)s->renormalise, "tie_word_embeddings",
        (int)(m->output == m->token_embd), "hidden_act", "silu", "decoder_sparse_step", 1,
        "mlp_only_layers", "attention_bias", 0, "rope_scaling", "use_sliding_window", 0);
    if (o->gptq && !o->plain)
        json_object_set_new(doc, "quantization_config",
                            json_pack("{s:s, s:i, s:i, s:b, s:b, s:s}", "quant_method", "gptq",
                                      "bits", 4, "group_size", GPTQ_GROUP, "sym", 1, "desc_act", 0,
                                      "checkpoint_format", o->v2 ? "gptq_v2" : "gptq"));
    return dump(doc);
}

static json_t *text_at(const model_file *f, const char *key, size_t i)
{
    const char *s;
    size_t n;
    sb_must(model_file_arr_str(f, key, i, &s, &n));
    return json_stringn(s, n);
}

static json_t *make_merges(const model_file *f, bool pairs)
{
    json_t *list = json_array();
    for (size_t i = 0; i < model_file_arr_len(f, "tokenizer.ggml.merges"); i++) {
        json_t *whole = text_at(f, "tokenizer.ggml.merges", i);
        const char *s = json_string_value(whole), *space = strchr(s, ' ');
        if (pairs)
            json_array_append_new(list, json_pack("[s#, s]", s, (int)(space - s), space + 1));
        else
            json_array_append(list, whole);
        json_decref(whole);
    }
    return list;
}

#define QWEN2                                                                                      \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+"      \
    "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

static ep_buf make_tokenizer(const model_file *f, bool pairs)
{
    json_t *vocab = json_object(), *added = json_array();
    for (size_t i = 0; i < model_file_arr_len(f, "tokenizer.ggml.tokens"); i++) {
        json_t *text = text_at(f, "tokenizer.ggml.tokens", i);
        int64_t type;
        sb_must(model_file_arr_i64(f, "tokenizer.ggml.token_type", i, &type));
        if (type == 1)
            json_object_set_new(vocab, json_string_value(text), json_integer((json_int_t)i));
        else
            json_array_append_new(added,
                                  json_pack("{s:i, s:O, s:b, s:b, s:b, s:b, s:b}", "id", (int)i,
                                            "content", text, "single_word", 0, "lstrip", 0,
                                            "rstrip", 0, "normalized", 0, "special", type == 3));
        json_decref(text);
    }
    return dump(json_pack(
        "{s:s, s:n, s:n, s:o, s:{s:s}, s:{s:s, s:[{s:s, s:{s:s}, s:s, s:b}, {s:s, s:b, s:b, "
        "s:b}]}, "
        "s:{s:s, s:b, s:b, s:b}, s:{s:s, s:b, s:b, s:b}, s:{s:s, s:n, s:n, s:s, s:s, s:b, s:b, "
        "s:o, "
        "s:o}}",
        "version", "1.0", "truncation", "padding", "added_tokens", added, "normalizer", "type",
        "NFC", "pre_tokenizer", "type", "Sequence", "pretokenizers", "type", "Split", "pattern",
        "Regex", QWEN2, "behavior", "Isolated", "invert", 0, "type", "ByteLevel",
        "add_prefix_space", 0, "trim_offsets", 0, "use_regex", 0, "post_processor", "type",
        "ByteLevel", "add_prefix_space", 0, "trim_offsets", 0, "use_regex", 0, "decoder", "type",
        "ByteLevel", "add_prefix_space", 0, "trim_offsets", 0, "use_regex", 0, "model", "type",
        "BPE", "dropout", "unk_token", "continuing_subword_prefix", "", "end_of_word_suffix", "",
        "fuse_unk", 0, "byte_fallback", 0, "vocab", vocab, "merges", make_merges(f, pairs)));
}

static void make_ends(hm_folder *out, const model_file *f)
{
    uint64_t eos;
    sb_must(model_file_u64(f, "tokenizer.ggml.eos_token_id", &eos, NULL));
    out->texts[HF_GENERATION] = dump(json_pack("{s:[i]}", "eos_token_id", (int)eos));
    json_t *doc = json_pack("{s:b, s:o, s:n}", "add_bos_token", 0, "eos_token",
                            text_at(f, "tokenizer.ggml.tokens", (size_t)eos), "bos_token");
    out->texts[HF_TOKENIZER_CONFIG] = dump(doc);
}

/* ---- a folder ---- */

void hm_make(hm_folder *out, const model *m, const hm_options *o)
{
    *out = (hm_folder){.tensors = make_tensors(m, o)};
    out->texts[HF_CONFIG] = make_config(m, o);
    out->texts[HF_TOKENIZER] = make_tokenizer(m->file, o->pairs);
    make_ends(out, m->file);
    out->tensors_bytes = (st_bytes){"model.safetensors", out->tensors.data, out->tensors.len};
    for (int i = 0; i < HF_N_TEXTS; i++)
        out->texts_bytes[i] = (st_bytes){hf_text_names[i], out->texts[i].data, out->texts[i].len};
}

void hm_free(hm_folder *f)
{
    ep_buf_fini(&f->tensors);
    for (int i = 0; i < HF_N_TEXTS; i++)
        ep_buf_fini(&f->texts[i]);
}

ep_status hm_open(model **out, const hm_folder *f, ep_err *err)
{
    st_file *file = NULL;
    ep_status status = st_open_bytes(&file, &f->tensors_bytes, 1, NULL, err);
    return status == EP_OK ? hf_open_file(out, file, f->texts_bytes, err) : status;
}

static bool write_one(const char *folder, const st_bytes *b)
{
    char path[4096];
    if (b->data == NULL) return true;
    snprintf(path, sizeof(path), "%s/%s", folder, b->name);
    FILE *f = fopen(path, "wb");
    if (f == NULL) return false;
    bool ok = fwrite(b->data, 1, b->size, f) == b->size;
    return fclose(f) == 0 && ok;
}

bool hm_write(const hm_folder *f, const char *folder)
{
    bool ok = write_one(folder, &f->tensors_bytes);
    for (int i = 0; i < HF_N_TEXTS; i++)
        ok = ok && write_one(folder, &f->texts_bytes[i]);
    return ok;
}
