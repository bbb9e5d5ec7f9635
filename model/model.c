/*
 * What an architecture needs of a file: hyper-parameters from metadata and every tensor, with its
 * shape, resolved once at open. A missing, misshapen or unserved tensor is refused there with
 * layer, name, expected and found shape; so is every feature of the metadata that moed does not
 * compute. After open nobody looks a name up again.
 *
 * The architecture is a table of tensors and a list of refusals; today there is one, qwen3moe. This
 * is its reading from a GGUF file; hf.c reads the same from a folder.
 */
#include "model/file.h"
#include "model/hf.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT = 64 };

/* One reading of a model's metadata; the first fault sticks. */
typedef struct reader {
    const model_file *f;
    const char *arch;
    ep_err *err;
    ep_status status;
} reader;

static ep_status refuse(reader *r, ep_status status, const char *what)
{
    if (r->status == EP_OK)
        r->status = ep_fail(r->err, status, "%s: %s", model_file_path(r->f), what);
    return r->status;
}

static const char *key_name(const reader *r, const char *suffix, char *buf, size_t n)
{
    snprintf(buf, n, "%s.%s", r->arch, suffix);
    return buf;
}

/* A whole number in min..max. fallback < 0: the key must be there. */
static int get_int(reader *r, const char *suffix, int64_t fallback, int64_t min, int64_t max)
{
    char key[128], what[256];
    uint64_t v = 0;
    if (r->status != EP_OK) return 0;
    ep_status status = model_file_u64(r->f, key_name(r, suffix, key, sizeof(key)), &v, r->err);
    if (status == EP_AGAIN && fallback >= 0) return (int)fallback;
    if (status == EP_AGAIN) {
        snprintf(what, sizeof(what), "key %s is missing", key);
        refuse(r, EP_ERR_INVALID, what);
        return 0;
    }
    if (status != EP_OK) {
        r->status = status;
        return 0;
    }
    if (v < (uint64_t)min || v > (uint64_t)max) {
        snprintf(what, sizeof(what), "key %s is %" PRIu64 ", expected %" PRId64 " to %" PRId64, key,
                 v, min, max);
        refuse(r, EP_ERR_INVALID, what);
        return 0;
    }
    return (int)v;
}

static double get_real(reader *r, const char *suffix, double fallback, double min, double max)
{
    char key[128], what[256];
    double v = 0;
    if (r->status != EP_OK) return 0;
    ep_status status = model_file_f64(r->f, key_name(r, suffix, key, sizeof(key)), &v, r->err);
    if (status == EP_AGAIN && isfinite(fallback)) return fallback;
    if (status == EP_AGAIN) {
        snprintf(what, sizeof(what), "key %s is missing", key);
        refuse(r, EP_ERR_INVALID, what);
        return 0;
    }
    if (status != EP_OK) {
        r->status = status;
        return 0;
    }
    if (!(v >= min && v <= max)) {
        snprintf(what, sizeof(what), "key %s is %g, expected %g to %g", key, v, min, max);
        refuse(r, EP_ERR_INVALID, what);
    }
    return v;
}

/* Bytes of the file as text that garbles no message. Returns buf. */
static char *clean_text(char *buf, size_t size, const char *s, size_t n)
{
    size_t at = 0;
    for (; at < n && at + 1 < size; at++)
        buf[at] = (unsigned char)s[at] < 0x20 || s[at] == 0x7f ? '?' : s[at];
    buf[at] = '\0';
    return buf;
}

/* ---- what is not computed ---- */

/* Refuses a whole number that is there with another value than the one that means "off". */
static void refuse_int(reader *r, const char *suffix, uint64_t off, const char *what)
{
    char key[128], text[256];
    uint64_t v = off;
    if (r->status != EP_OK) return;
    ep_status status = model_file_u64(r->f, key_name(r, suffix, key, sizeof(key)), &v, r->err);
    if (status != EP_OK && status != EP_AGAIN) {
        r->status = status;
    } else if (v != off) {
        snprintf(text, sizeof(text), "%s (%s = %" PRIu64 ") is not implemented", what, key, v);
        refuse(r, EP_ERR_UNSUPPORTED, text);
    }
}

static void refuse_real(reader *r, const char *suffix, double off, const char *what)
{
    char key[128], text[256];
    double v = off;
    if (r->status != EP_OK) return;
    ep_status status = model_file_f64(r->f, key_name(r, suffix, key, sizeof(key)), &v, r->err);
    if (status != EP_OK && status != EP_AGAIN) {
        r->status = status;
    } else if (v != off) {
        snprintf(text, sizeof(text), "%s (%s = %g) is not implemented", what, key, v);
        refuse(r, EP_ERR_UNSUPPORTED, text);
    }
}

/* Without a type a factor means linear scaling. */
static void refuse_rope_scaling(reader *r)
{
    char key[128], text[256];
    const char *s = "linear";
    size_t n = strlen(s);
    if (r->status != EP_OK) return;
    ep_status status =
        model_file_str(r->f, key_name(r, "rope.scaling.type", key, sizeof(key)), &s, &n, r->err);
    if (status != EP_OK && status != EP_AGAIN) {
        r->status = status;
        return;
    }
    bool linear = n == 6 && memcmp(s, "linear", 6) == 0;
    if (linear) {
        refuse_real(r, "rope.scaling.factor", 1.0, "linear rope scaling");
    } else if (n != 4 || memcmp(s, "none", 4) != 0) {
        char shown[TEXT];
        snprintf(text, sizeof(text), "rope scaling '%s' is not implemented",
                 clean_text(shown, sizeof(shown), s, n));
        refuse(r, EP_ERR_UNSUPPORTED, text);
    }
}

static void refuse_features(reader *r)
{
    /* Factors for which 0 and 1 both mean none, and terms that 0 switches off. */
    static const struct {
        const char *suffix, *what;
    } factors[] = {{"expert_weights_scale", "scaling of expert weights"},
                   {"rope.scale_linear", "linear rope scaling"},
                   {"logit_scale", "scaling of logits"},
                   {"embedding_scale", "scaling of the embedding"},
                   {"residual_scale", "scaling of the residual"}},
      terms[] = {{"attention.scale", "an attention scale"},
                 {"attention.clamp_kqv", "clamping of q, k and v"},
                 {"attention.max_alibi_bias", "ALiBi"},
                 {"attn_logit_softcapping", "soft-capping of attention"},
                 {"final_logit_softcapping", "soft-capping of logits"}};
    refuse_rope_scaling(r);
    refuse_int(r, "expert_shared_count", 0, "a shared expert");
    refuse_int(r, "leading_dense_block_count", 0, "dense leading layers");
    refuse_int(r, "expert_group_count", 0, "grouped routing");
    refuse_int(r, "nextn_predict_layers", 0, "multi-token prediction");
    refuse_int(r, "attention.sliding_window", 0, "a sliding window");
    refuse_int(r, "expert_gating_func", 1, "another gate than softmax");
    for (size_t i = 0; i < sizeof(terms) / sizeof(terms[0]); i++)
        refuse_real(r, terms[i].suffix, 0.0, terms[i].what);
    char key[128];
    for (size_t i = 0; i < sizeof(factors) / sizeof(factors[0]) && r->status == EP_OK; i++) {
        double v = 1.0;
        ep_status status =
            model_file_f64(r->f, key_name(r, factors[i].suffix, key, sizeof(key)), &v, NULL);
        /* A key of the wrong kind is worded by refuse_real. */
        if ((status != EP_OK && status != EP_AGAIN) || v != 0.0)
            refuse_real(r, factors[i].suffix, 1.0, factors[i].what);
    }
    bool causal = true;
    if (r->status != EP_OK) return;
    ep_status status =
        model_file_bool(r->f, key_name(r, "attention.causal", key, sizeof(key)), &causal, r->err);
    if (status != EP_OK && status != EP_AGAIN)
        r->status = status;
    else if (!causal)
        refuse(r, EP_ERR_UNSUPPORTED, "attention that looks ahead is not implemented");
}

/* ---- hyper-parameters ---- */

static void get_text(const model_file *f, const char *key, char *out, size_t size)
{
    const char *s;
    size_t n;
    if (model_file_str(f, key, &s, &n, NULL) == EP_OK) clean_text(out, size, s, n);
}

static void read_shape(reader *r, model_shape *s)
{
    char key[128];
    s->n_layers = get_int(r, "block_count", -1, 1, MODEL_MAX_LAYERS);
    s->hidden = get_int(r, "embedding_length", -1, 1, MODEL_MAX_DIM);
    s->context = get_int(r, "context_length", -1, 1, MODEL_MAX_DIM);
    s->n_heads = get_int(r, "attention.head_count", -1, 1, MODEL_MAX_HEADS);
    s->n_kv_heads = get_int(r, "attention.head_count_kv", s->n_heads, 1, MODEL_MAX_HEADS);
    int even = r->status == EP_OK ? s->hidden / s->n_heads : 1;
    s->head_dim = get_int(r, "attention.key_length", even, 1, MODEL_MAX_HEADS);
    int value = get_int(r, "attention.value_length", s->head_dim, 1, MODEL_MAX_HEADS);
    s->rope_dim = get_int(r, "rope.dimension_count", s->head_dim, 2, MODEL_MAX_HEADS);
    s->rope_base = get_real(r, "rope.freq_base", 10000.0, 1.0, 1e12);
    s->rms_eps = (float)get_real(r, "attention.layer_norm_rms_epsilon", (double)NAN, 1e-12, 1.0);
    s->n_experts = get_int(r, "expert_count", -1, 1, MODEL_MAX_EXPERTS);
    s->top_k = get_int(r, "expert_used_count", -1, 1, MODEL_MAX_TOP_K);
    int dense = get_int(r, "feed_forward_length", 0, 0, MODEL_MAX_DIM);
    s->inter = get_int(r, "expert_feed_forward_length", dense > 0 ? dense : -1, 1, MODEL_MAX_DIM);
    s->gate = MODEL_GATE_SOFTMAX_TOPK;
    s->renormalise = true; /* qwen3moe's norm_topk_prob is not stored unless it is false */
    bool norm = true;
    if (r->status == EP_OK) {
        ep_status status = model_file_bool(
            r->f, key_name(r, "expert_weights_norm", key, sizeof(key)), &norm, r->err);
        if (status == EP_OK)
            s->renormalise = norm;
        else if (status != EP_AGAIN)
            r->status = status;
    }
    if (r->status != EP_OK) return;
    char what[256];
    if (value != s->head_dim) {
        snprintf(what, sizeof(what),
                 "keys of %d and values of %d per head: unequal lengths are not implemented",
                 s->head_dim, value);
        refuse(r, EP_ERR_INVALID, what);
    }
    if (model_shape_fault(s, what, sizeof(what)) != NULL) refuse(r, EP_ERR_INVALID, what);
}

const char *model_shape_fault(const model_shape *s, char *buf, size_t n)
{
    if (s->n_heads % s->n_kv_heads != 0)
        snprintf(buf, n, "%d heads do not divide among %d KV heads", s->n_heads, s->n_kv_heads);
    else if (s->rope_dim > s->head_dim || s->rope_dim % 2 != 0)
        snprintf(buf, n, "rope over %d elements of a head of %d", s->rope_dim, s->head_dim);
    else if (s->top_k > s->n_experts)
        snprintf(buf, n, "%d experts used of %d", s->top_k, s->n_experts);
    else if (s->hidden % 16 != 0 || s->inter % 16 != 0)
        snprintf(buf, n, "hidden %d and expert width %d must be multiples of 16", s->hidden,
                 s->inter);
    else if ((int64_t)s->n_heads * s->head_dim > MODEL_MAX_DIM)
        snprintf(buf, n, "%d heads of %d are too many", s->n_heads, s->head_dim);
    else
        return NULL;
    return buf;
}

/* ---- tensors ---- */

static void check_tensor(reader *r, const model_tensor *t, int layer, int n_dims,
                         const uint64_t *ne)
{
    char where[32] = "", expected[96], found[96], what[512];
    if (layer >= 0) snprintf(where, sizeof(where), "layer %d: ", layer);
    bool same = true;
    for (int i = 0; i < 4; i++)
        same &= t->ne[i] == (i < n_dims ? ne[i] : 1);
    if (!same) {
        snprintf(what, sizeof(what), "%stensor %s has shape %s, expected %s", where, t->name,
                 gguf_shape_text(found, sizeof(found), t->n_dims, t->ne),
                 gguf_shape_text(expected, sizeof(expected), n_dims, ne));
        refuse(r, EP_ERR_INVALID, what);
    } else if (!kern_type_is_served(t->type)) {
        const char *type = gguf_type_name(t->type);
        snprintf(what, sizeof(what), "%stensor %s has type %s (%d), which is not implemented",
                 where, t->name, type != NULL ? type : "unknown", t->type);
        refuse(r, EP_ERR_UNSUPPORTED, what);
    }
}

/* A tensor by name, required; layer < 0: not of a layer. */
static const model_tensor *want(reader *r, const char *name, int layer, int n_dims,
                                const uint64_t *ne)
{
    char full[TEXT + 32], what[256], expected[96];
    if (r->status != EP_OK) return NULL;
    if (layer < 0)
        snprintf(full, sizeof(full), "%s", name);
    else
        snprintf(full, sizeof(full), "blk.%d.%s", layer, name);
    const model_tensor *t = model_file_find(r->f, full);
    if (t == NULL) {
        snprintf(what, sizeof(what), "%stensor %s %s is missing", layer >= 0 ? "layer " : "", full,
                 gguf_shape_text(expected, sizeof(expected), n_dims, ne));
        if (layer >= 0)
            snprintf(what, sizeof(what), "layer %d: tensor %s %s is missing", layer, full,
                     gguf_shape_text(expected, sizeof(expected), n_dims, ne));
        refuse(r, EP_ERR_INVALID, what);
        return NULL;
    }
    check_tensor(r, t, layer, n_dims, ne);
    return r->status == EP_OK ? t : NULL;
}

/* Vectors and norms are read as floats where they lie. */
static const model_tensor *want_vector(reader *r, const char *name, int layer, int n)
{
    char what[256];
    const model_tensor *t = want(r, name, layer, 1, (uint64_t[]){(uint64_t)n});
    if (t != NULL && t->type != KERN_F32) {
        snprintf(what, sizeof(what), "tensor %s has type %s, expected F32", t->name,
                 gguf_type_name(t->type));
        refuse(r, EP_ERR_UNSUPPORTED, what);
    }
    return t;
}

static const model_tensor *want_matrix(reader *r, const char *name, int layer, int k, int n)
{
    return want(r, name, layer, 2, (uint64_t[]){(uint64_t)k, (uint64_t)n});
}

static const model_tensor *want_experts(reader *r, const char *name, int layer, int k, int n,
                                        int n_experts)
{
    return want(r, name, layer, 3, (uint64_t[]){(uint64_t)k, (uint64_t)n, (uint64_t)n_experts});
}

/* Tensors whose presence means a computation that moed does not do. One that ends in '.' or '_'
 * stands for all that begin so. */
typedef struct unserved {
    const char *name, *what;
} unserved;
static const unserved unserved_in_layers[] = {
    {"attn_q.bias", "a bias of the query projection"},
    {"attn_k.bias", "a bias of the key projection"},
    {"attn_v.bias", "a bias of the value projection"},
    {"attn_output.bias", "a bias of the output projection"},
    {"attn_qkv.", "a fused query, key and value projection"},
    {"attn_sinks.", "attention sinks"},
    {"attn_norm.bias", "a norm with a bias"},
    {"attn_q_norm.bias", "a norm with a bias"},
    {"attn_k_norm.bias", "a norm with a bias"},
    {"ffn_norm.bias", "a norm with a bias"},
    {"attn_norm_2.", "a second norm"},
    {"post_attention_norm.", "a norm after attention"},
    {"post_ffw_norm.", "a norm after the experts"},
    {"ffn_gate_up_exps.", "fused gate and up experts (convert the model with separate ones)"},
    {"ffn_gate_exps.bias", "a bias of the gate experts"},
    {"ffn_up_exps.bias", "a bias of the up experts"},
    {"ffn_down_exps.bias", "a bias of the down experts"},
    {"ffn_gate_exps.", "a scale per expert"},
    {"ffn_up_exps.", "a scale per expert"},
    {"ffn_down_exps.", "a scale per expert"},
    {"ffn_gate_inp.bias", "a bias of the gate"},
    {"exp_probs_b.", "a selection bias of the gate"},
    {"ffn_gate_inp_shexp.", "a shared expert"},
    {"ffn_gate_shexp.", "a shared expert"},
    {"ffn_up_shexp.", "a shared expert"},
    {"ffn_down_shexp.", "a shared expert"},
    {"ffn_gate.weight", "a dense layer"},
    {"ffn_up.weight", "a dense layer"},
    {"ffn_down.weight", "a dense layer"},
    {"ffn_gate.", "experts as one matrix each (an old file: convert the model again)"},
    {"ffn_up.", "experts as one matrix each (an old file: convert the model again)"},
    {"ffn_down.", "experts as one matrix each (an old file: convert the model again)"},
    {"nextn.", "multi-token prediction"},
    {"ssm_", "linear attention"},
    {NULL, NULL},
};
static const unserved unserved_alone[] = {
    {"rope_freqs.", "scaled rope frequencies"},
    {"rope_factors_", "scaled rope frequencies"},
    {"output.bias", "a bias of the output matrix"},
    {"output_norm.bias", "a norm with a bias"},
    {"token_embd_norm.", "a norm of the embedding"},
    {"position_embd.", "learned positions"},
    {"token_types.", "token types"},
    {NULL, NULL},
};
static const char *const known_in_layers[] = {
    "attn_norm.weight",
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_output.weight",
    "attn_q_norm.weight",
    "attn_k_norm.weight",
    "ffn_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_up_exps.weight",
    "ffn_gate_exps.weight",
    "ffn_down_exps.weight",
    NULL,
};
static const char *const known_alone[] = {"token_embd.weight", "output_norm.weight",
                                          "output.weight", NULL};

/* "blk.12.attn_q.weight" is 12 and the rest; -1: not of a layer. */
static int layer_of(const char *name, const char **rest)
{
    int layer = 0, at = 4;
    *rest = name;
    if (strncmp(name, "blk.", 4) != 0) return -1;
    for (; name[at] >= '0' && name[at] <= '9' && at < 12; at++)
        layer = layer * 10 + (name[at] - '0');
    if (at == 4 || name[at] != '.') return -1;
    *rest = name + at + 1;
    return layer;
}

static bool is_known(const char *const *known, const char *name)
{
    for (; *known != NULL; known++)
        if (strcmp(*known, name) == 0) return true;
    return false;
}

static const char *unserved_what(const unserved *list, const char *name)
{
    for (; list->name != NULL; list++) {
        size_t n = strlen(list->name);
        bool all = list->name[n - 1] == '.' || list->name[n - 1] == '_';
        if (all ? strncmp(name, list->name, n) == 0 : strcmp(name, list->name) == 0)
            return list->what;
    }
    return NULL;
}

/* Nothing is accepted silently: a tensor is known, refused, or mentioned. */
static void refuse_tensors(reader *r, const model_shape *s)
{
    char what[512];
    for (size_t i = 0; i < model_file_n_tensors(r->f) && r->status == EP_OK; i++) {
        const char *name = model_file_tensor(r->f, i)->name, *rest;
        int layer = layer_of(name, &rest);
        bool of_layer = layer >= 0;
        if (layer < s->n_layers && is_known(of_layer ? known_in_layers : known_alone, rest))
            continue;
        const char *no = unserved_what(of_layer ? unserved_in_layers : unserved_alone, rest);
        if (no != NULL && of_layer)
            snprintf(what, sizeof(what), "layer %d: tensor %s: %s is not implemented", layer, name,
                     no);
        else if (no != NULL)
            snprintf(what, sizeof(what), "tensor %s: %s is not implemented", name, no);
        else if (layer >= s->n_layers)
            snprintf(what, sizeof(what),
                     "tensor %s belongs to a layer that %s.block_count %d rules out", name, r->arch,
                     s->n_layers);
        if (no != NULL || layer >= s->n_layers)
            refuse(r, no != NULL ? EP_ERR_UNSUPPORTED : EP_ERR_INVALID, what);
        else
            log_debug("%s: tensor %s is not used", model_file_path(r->f), name);
    }
}

static void read_layer(reader *r, const model_shape *s, int l, model_layer *y)
{
    int q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
    y->attn_norm = want_vector(r, "attn_norm.weight", l, s->hidden);
    y->q = want_matrix(r, "attn_q.weight", l, s->hidden, q);
    y->k = want_matrix(r, "attn_k.weight", l, s->hidden, kv);
    y->v = want_matrix(r, "attn_v.weight", l, s->hidden, kv);
    y->o = want_matrix(r, "attn_output.weight", l, q, s->hidden);
    y->q_norm = want_vector(r, "attn_q_norm.weight", l, s->head_dim);
    y->k_norm = want_vector(r, "attn_k_norm.weight", l, s->head_dim);
    y->ffn_norm = want_vector(r, "ffn_norm.weight", l, s->hidden);
    y->gate_inp = want_matrix(r, "ffn_gate_inp.weight", l, s->hidden, s->n_experts);
    y->gate_exps = want_experts(r, "ffn_gate_exps.weight", l, s->hidden, s->inter, s->n_experts);
    y->up_exps = want_experts(r, "ffn_up_exps.weight", l, s->hidden, s->inter, s->n_experts);
    y->down_exps = want_experts(r, "ffn_down_exps.weight", l, s->inter, s->hidden, s->n_experts);
}

/* token_embd gives the vocabulary; the tokenizer's list must agree where there is one. */
static void read_ends(reader *r, model *m)
{
    model_shape *s = &m->shape;
    char what[256];
    const model_tensor *embd = model_file_find(r->f, "token_embd.weight");
    size_t tokens = model_file_arr_len(r->f, "tokenizer.ggml.tokens");
    uint64_t vocab = embd != NULL ? embd->ne[1] : tokens;
    if (vocab == 0 || vocab > MODEL_MAX_DIM) {
        refuse(r, EP_ERR_INVALID,
               "tensor token_embd.weight is missing, or its vocabulary is out of range");
        return;
    }
    s->vocab = (int)vocab;
    int said = get_int(r, "vocab_size", s->vocab, 1, MODEL_MAX_DIM);
    if (r->status == EP_OK && said != s->vocab) {
        snprintf(what, sizeof(what), "key %s.vocab_size is %d, but token_embd.weight has %d rows",
                 r->arch, said, s->vocab);
        refuse(r, EP_ERR_INVALID, what);
    }
    if (tokens != 0 && tokens != vocab) {
        snprintf(what, sizeof(what), "the tokenizer has %zu tokens, token_embd.weight %" PRIu64,
                 tokens, vocab);
        refuse(r, EP_ERR_INVALID, what);
        return;
    }
    m->token_embd = want_matrix(r, "token_embd.weight", -1, s->hidden, s->vocab);
    m->output_norm = want_vector(r, "output_norm.weight", -1, s->hidden);
    m->output = m->token_embd;
    if (model_file_find(r->f, "output.weight") != NULL)
        m->output = want_matrix(r, "output.weight", -1, s->hidden, s->vocab);
}

/* ---- a model ---- */

ep_status model_open_file(model **out, model_file *file, ep_err *err)
{
    reader r = {.f = file, .err = err};
    model *m = ep_calloc(1, sizeof(*m));
    if (m == NULL) {
        ep_fail(err, EP_ERR_NOMEM, "%s: no memory", model_file_path(file));
        model_file_close(file);
        return EP_ERR_NOMEM;
    }
    m->file = file;
    get_text(file, "general.architecture", m->shape.arch, sizeof(m->shape.arch));
    get_text(file, "general.name", m->shape.name, sizeof(m->shape.name));
    r.arch = m->shape.arch;
    if (strcmp(r.arch, "qwen3moe") != 0) {
        char what[128];
        snprintf(what, sizeof(what), "architecture '%s' is not implemented, only qwen3moe",
                 r.arch[0] != '\0' ? r.arch : "(none)");
        refuse(&r, EP_ERR_UNSUPPORTED, what);
    }
    if (r.status == EP_OK) read_shape(&r, &m->shape);
    if (r.status == EP_OK) refuse_features(&r);
    if (r.status == EP_OK) {
        m->layers = ep_calloc((size_t)m->shape.n_layers, sizeof(*m->layers));
        if (m->layers == NULL) refuse(&r, EP_ERR_NOMEM, "no memory");
    }
    if (r.status == EP_OK) refuse_tensors(&r, &m->shape);
    if (r.status == EP_OK) read_ends(&r, m);
    for (int l = 0; l < m->shape.n_layers && r.status == EP_OK; l++)
        read_layer(&r, &m->shape, l, &m->layers[l]);
    if (r.status != EP_OK) {
        model_close(m);
        return r.status;
    }
    m->digest = model_file_digest(file);
    *out = m;
    return EP_OK;
}

ep_status model_open(model **out, const char *path, ep_err *err)
{
    model_file *f;
    if (model_safetensors_is(path)) return hf_open(out, path, err);
    ep_status status = model_file_open(&f, path, err);
    return status == EP_OK ? model_open_file(out, f, err) : status;
}

void model_close(model *m)
{
    if (m == NULL) return;
    model_file_close(m->file);
    hf_close(m->folder);
    ep_free(m->layers);
    ep_free(m);
}

const model_tensor *model_experts(const model *m, int layer, int role)
{
    const model_layer *y = &m->layers[layer];
    return role == 0 ? y->gate_exps : role == 1 ? y->up_exps : y->down_exps;
}

size_t model_rows_bytes(const model_tensor *t)
{
    return t->bytes / (size_t)t->ne[2];
}

ep_status model_rows(const model *m, const model_tensor *t, int i, ep_buf *made,
                     const uint8_t **rows, ep_err *err)
{
    if (t->data == NULL) return hf_rows(m->folder, t, i, made, rows, err);
    *rows = t->data + (size_t)i * model_rows_bytes(t);
    return EP_OK;
}

void model_forget(const model *m, const model_tensor *t, int i)
{
    size_t n = model_rows_bytes(t);
    if (m->folder != NULL)
        hf_forget(m->folder, t, i);
    else
        model_file_forget(m->file, t->data + (size_t)i * n, n);
}
