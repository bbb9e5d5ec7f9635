/*
 * What the configuration of a checkpoint says about its quantisation, and the refusals that follow.
 * There are two places for it, config.json and, older, quantize_config.json; where both are there
 * they must agree, because the tools that read only one of them would compute with different
 * numbers.
 *
 * Keys that change how the numbers are read are all looked at; the others (how the quantiser was
 * run) are not. A key that is absent means what the tools that write such files mean by it, except
 * for width and group size, which must be said.
 */
#include "model/gptq.h"
#include "model/json.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { MAX_DIM = 1 << 24, MAX_LAYERS = 4096, MAX_EXPERTS = 4096 };

/* One reading; the first fault sticks. */
typedef struct reader {
    const char *where;
    ep_err *err;
    ep_status status;
} reader;

static void refuse(reader *r, ep_status status, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

static void refuse(reader *r, ep_status status, const char *fmt, ...)
{
    char what[512];
    va_list ap;
    if (r->status != EP_OK) return;
    va_start(ap, fmt);
    vsnprintf(what, sizeof(what), fmt, ap);
    va_end(ap);
    r->status = ep_fail(r->err, status, "%s: %s", r->where, what);
}

/* Numbers, truths and texts: `fallback` when absent or null. */
static int64_t get_int(reader *r, const model_json *o, const char *key, int64_t fallback)
{
    const model_json *v = model_json_member(o, key);
    int64_t n = fallback;
    if (v != NULL && !model_json_int(v, &n))
        refuse(r, EP_ERR_INVALID, "%s is no whole number", key);
    return n;
}

static bool get_bool(reader *r, const model_json *o, const char *key, bool fallback)
{
    const model_json *v = model_json_member(o, key);
    bool b = fallback;
    if (v != NULL && !model_json_bool(v, &b))
        refuse(r, EP_ERR_INVALID, "%s is neither true nor false", key);
    return b;
}

static const char *get_str(reader *r, const model_json *o, const char *key, const char *fallback)
{
    const model_json *v = model_json_member(o, key);
    if (v == NULL) return fallback;
    const char *s = model_json_str(v);
    if (s == NULL) refuse(r, EP_ERR_INVALID, "%s is no text", key);
    return s != NULL ? s : fallback;
}

static int get_dim(reader *r, const model_json *o, const char *key, int64_t fallback, int64_t most)
{
    int64_t n = get_int(r, o, key, fallback);
    if (n < 1 || n > most)
        refuse(r, EP_ERR_INVALID, "%s is %s, expected 1 to %" PRId64, key,
               model_json_member(o, key) == NULL ? "missing" : "out of range", most);
    return r->status == EP_OK ? (int)n : 0;
}

/* ---- the quantisation ---- */

typedef struct quant {
    int64_t bits, group;
    bool sym, desc_act;
    int version;
} quant;

/* Rules that exclude modules ("-:") leave expert layers as they are, or it shows in their tensors;
 * any other changes numbers by a pattern. */
static void refuse_rules(reader *r, const model_json *o)
{
    model_json *rules = model_json_member(o, "dynamic"), *v;
    void *at = NULL;
    const char *key;
    if (!model_json_is_object(rules)) return;
    while (r->status == EP_OK && model_json_next(rules, &at, &key, &v))
        if (strncmp(key, "-:", 2) != 0)
            refuse(r, EP_ERR_UNSUPPORTED,
                   "dynamic rule %.100s: widths by module are not implemented", key);
}

static quant read_quant(reader *r, const model_json *o)
{
    quant q = {0};
    const char *method = get_str(r, o, "quant_method", "gptq");
    if (strcmp(method, "gptq") != 0)
        refuse(r, EP_ERR_UNSUPPORTED, "quant_method %.40s is not implemented, only gptq", method);
    q.bits = get_int(r, o, "bits", 0);
    if (q.bits != 4)
        refuse(r, EP_ERR_UNSUPPORTED, "bits %" PRId64 " is not implemented, only 4", q.bits);
    q.group = get_int(r, o, "group_size", 0);
    if (q.group != GPTQ_GROUP)
        refuse(r, EP_ERR_UNSUPPORTED, "group_size %" PRId64 "%s is not implemented, only %d",
               q.group, q.group == -1 ? " (one scale for a whole column)" : "", GPTQ_GROUP);
    q.sym = get_bool(r, o, "sym", true);
    if (!q.sym)
        refuse(r, EP_ERR_UNSUPPORTED, "sym false: zero points of their own are not implemented");
    q.desc_act = get_bool(r, o, "desc_act", false);
    const char *format = get_str(r, o, "checkpoint_format", get_str(r, o, "format", "gptq"));
    q.version = strcmp(format, "gptq_v2") == 0 ? 2 : 1;
    if (q.version == 1 && strcmp(format, "gptq") != 0)
        refuse(r, EP_ERR_UNSUPPORTED,
               "checkpoint_format %.40s is not implemented, only gptq and gptq_v2", format);
    if (get_bool(r, o, "is_marlin_format", false))
        refuse(r, EP_ERR_UNSUPPORTED,
               "is_marlin_format: weights in another order than gptq's are not "
               "implemented");
    const char *word = get_str(r, o, "pack_dtype", "int32");
    if (strcmp(word, "int32") != 0)
        refuse(r, EP_ERR_UNSUPPORTED, "pack_dtype %.40s is not implemented, only int32", word);
    refuse_rules(r, o);
    return q;
}

static void read_quants(reader *r, const model_json *config, const model_json *quantize,
                        gptq_config *c)
{
    const model_json *inside = model_json_member(config, "quantization_config");
    quant a = {0}, b = {0};
    if (inside == NULL && quantize == NULL) {
        refuse(r, EP_ERR_UNSUPPORTED,
               "no quantization_config in config.json and no quantize_config.json: not a GPTQ "
               "checkpoint");
        return;
    }
    if (inside != NULL && !model_json_is_object(inside))
        refuse(r, EP_ERR_INVALID, "quantization_config is no object");
    if (quantize != NULL && !model_json_is_object(quantize))
        refuse(r, EP_ERR_INVALID, "quantize_config.json is no object");
    if (r->status == EP_OK) a = read_quant(r, inside != NULL ? inside : quantize);
    if (r->status == EP_OK) b = quantize != NULL ? read_quant(r, quantize) : a;
    if (a.desc_act != b.desc_act || a.version != b.version)
        refuse(r, EP_ERR_INVALID, "config.json and quantize_config.json disagree on %s",
               a.desc_act != b.desc_act ? "desc_act" : "checkpoint_format");
    c->desc_act = a.desc_act;
    c->version = a.version;
    c->zeros = a.version == 2 ? 0x88888888u : 0x77777777u;
}

/* ---- the model ---- */

ep_status gptq_config_read(gptq_config *out, const model_json *config, const model_json *quantize,
                           const char *where, ep_err *err)
{
    reader r = {.where = where, .err = err};
    gptq_config c = {0};
    if (!model_json_is_object(config)) refuse(&r, EP_ERR_INVALID, "config.json is no object");
    const char *type = get_str(&r, config, "model_type", "(none)");
    if (strcmp(type, "qwen3_moe") != 0)
        refuse(&r, EP_ERR_UNSUPPORTED, "model_type %.40s is not implemented, only qwen3_moe", type);
    read_quants(&r, config, quantize, &c);
    const char *act = get_str(&r, config, "hidden_act", "silu");
    if (strcmp(act, "silu") != 0)
        refuse(&r, EP_ERR_UNSUPPORTED, "hidden_act %.40s is not implemented, only silu", act);
    if (get_int(&r, config, "decoder_sparse_step", 1) != 1 ||
        model_json_size(model_json_member(config, "mlp_only_layers")) != 0)
        refuse(&r, EP_ERR_UNSUPPORTED,
               "layers without experts (decoder_sparse_step, mlp_only_layers) are not implemented");
    c.n_layers = get_dim(&r, config, "num_hidden_layers", 0, MAX_LAYERS);
    c.n_experts = get_dim(&r, config, "num_experts", 0, MAX_EXPERTS);
    c.hidden = get_dim(&r, config, "hidden_size", 0, MAX_DIM);
    c.inter = get_dim(&r, config, "moe_intermediate_size", 0, MAX_DIM);
    c.n_heads = get_dim(&r, config, "num_attention_heads", 0, MAX_DIM);
    c.n_kv_heads = get_dim(&r, config, "num_key_value_heads", c.n_heads, MAX_DIM);
    c.head_dim = get_dim(&r, config, "head_dim", c.n_heads > 0 ? c.hidden / c.n_heads : 0, MAX_DIM);
    c.vocab = get_dim(&r, config, "vocab_size", 0, MAX_DIM);
    c.tied = get_bool(&r, config, "tie_word_embeddings", false);
    if (r.status == EP_OK && (c.hidden % GPTQ_GROUP != 0 || c.inter % GPTQ_GROUP != 0))
        refuse(
            &r, EP_ERR_UNSUPPORTED,
            "hidden_size %d and moe_intermediate_size %d are not both multiples of the group, %d",
            c.hidden, c.inter, GPTQ_GROUP);
    if (r.status == EP_OK &&
        ((int64_t)c.n_heads * c.head_dim > MAX_DIM || (int64_t)c.n_kv_heads * c.head_dim > MAX_DIM))
        refuse(&r, EP_ERR_INVALID, "num_attention_heads times head_dim is out of range");
    if (r.status == EP_OK) *out = c;
    return r.status;
}
