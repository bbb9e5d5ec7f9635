/*
 * config.json: the hyper-parameters of a folder, its quantisation, and the refusals that follow.
 * The quantisation has two places, config.json and, older, quantize_config.json; where both are
 * there they must agree, because the tools that read only one of them would compute with different
 * numbers.
 *
 * Keys that change how numbers are read or what is computed are all looked at; the others (how the
 * model was trained, how the quantiser was run) are not. A key that is absent means what the tools
 * that write such files mean by it, except for sizes, width and group, which must be said.
 */
#include "model/file.h"
#include "model/hf.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

const char *const hf_text_names[HF_N_TEXTS] = {"config.json", "quantize_config.json",
                                               "generation_config.json", "tokenizer_config.json",
                                               "tokenizer.json"};

/* ---- the quantisation ---- */

typedef struct quant {
    int64_t bits, group;
    bool sym, desc_act;
    int version;
} quant;

/* Rules that exclude modules ("-:") leave expert layers as they are, or it shows in their tensors;
 * any other changes numbers by a pattern. */
static void refuse_rules(hf_reader *r, const model_json *o)
{
    model_json *rules = model_json_member(o, "dynamic"), *v;
    void *at = NULL;
    const char *key;
    if (rules == NULL) return;
    if (!model_json_is_object(rules)) hf_refuse(r, EP_ERR_INVALID, "dynamic is no object");
    while (r->status == EP_OK && model_json_next(rules, &at, &key, &v))
        if (strncmp(key, "-:", 2) != 0)
            hf_refuse(r, EP_ERR_UNSUPPORTED,
                      "dynamic rule %.100s: widths by module are not implemented", key);
}

static quant read_quant(hf_reader *r, const model_json *o)
{
    quant q = {0};
    const char *method = hf_get_str(r, o, "quant_method", "gptq");
    if (strcmp(method, "gptq") != 0)
        hf_refuse(r, EP_ERR_UNSUPPORTED, "quant_method %.40s is not implemented, only gptq",
                  method);
    q.bits = hf_get_int(r, o, "bits", 0);
    if (q.bits != 4)
        hf_refuse(r, EP_ERR_UNSUPPORTED, "bits %" PRId64 " is not implemented, only 4", q.bits);
    q.group = hf_get_int(r, o, "group_size", 0);
    if (q.group != GPTQ_GROUP)
        hf_refuse(r, EP_ERR_UNSUPPORTED, "group_size %" PRId64 "%s is not implemented, only %d",
                  q.group, q.group == -1 ? " (one scale for a whole column)" : "", GPTQ_GROUP);
    q.sym = hf_get_bool(r, o, "sym", true);
    if (!q.sym)
        hf_refuse(r, EP_ERR_UNSUPPORTED, "sym false: zero points of their own are not implemented");
    q.desc_act = hf_get_bool(r, o, "desc_act", false);
    const char *format = hf_get_str(r, o, "checkpoint_format", hf_get_str(r, o, "format", "gptq"));
    q.version = strcmp(format, "gptq_v2") == 0 ? 2 : 1;
    if (q.version == 1 && strcmp(format, "gptq") != 0)
        hf_refuse(r, EP_ERR_UNSUPPORTED,
                  "checkpoint_format %.40s is not implemented, only gptq and gptq_v2", format);
    if (hf_get_bool(r, o, "is_marlin_format", false))
        hf_refuse(r, EP_ERR_UNSUPPORTED,
                  "is_marlin_format: weights in another order than gptq's are not "
                  "implemented");
    const char *word = hf_get_str(r, o, "pack_dtype", "int32");
    if (strcmp(word, "int32") != 0)
        hf_refuse(r, EP_ERR_UNSUPPORTED, "pack_dtype %.40s is not implemented, only int32", word);
    refuse_rules(r, o);
    return q;
}

/* desc_act and the version of one of the two places. */
static void read_quants(hf_reader *r, const model_json *config, const model_json *quantize,
                        hf_config *c)
{
    const model_json *inside = model_json_member(config, "quantization_config");
    quant a = {0}, b = {0};
    c->quantised = inside != NULL || quantize != NULL;
    if (!c->quantised) return;
    if (inside != NULL && !model_json_is_object(inside))
        hf_refuse(r, EP_ERR_INVALID, "quantization_config is no object");
    if (r->status == EP_OK && inside != NULL) a = read_quant(r, inside);
    if (quantize != NULL) {
        r->name = hf_text_names[HF_QUANTIZE];
        if (!model_json_is_object(quantize)) hf_refuse(r, EP_ERR_INVALID, "it is no object");
        if (r->status == EP_OK) b = read_quant(r, quantize);
        if (inside != NULL && (a.desc_act != b.desc_act || a.version != b.version))
            hf_refuse(r, EP_ERR_INVALID, "it disagrees with config.json on %s",
                      a.desc_act != b.desc_act ? "desc_act" : "checkpoint_format");
        r->name = hf_text_names[HF_CONFIG];
    }
    if (inside == NULL) a = b;
    c->gptq = (gptq_rules){.desc_act = a.desc_act, .version = a.version};
}

/* ---- what is not computed ---- */

static void refuse_layers(hf_reader *r, const model_json *o)
{
    const model_json *types = model_json_member(o, "layer_types");
    const model_json *dense = model_json_member(o, "mlp_only_layers");
    if (types != NULL && !model_json_is_array(types))
        hf_refuse(r, EP_ERR_INVALID, "layer_types is no list");
    if (dense != NULL && !model_json_is_array(dense))
        hf_refuse(r, EP_ERR_INVALID, "mlp_only_layers is no list");
    for (size_t i = 0; i < model_json_size(types); i++) {
        const char *type = model_json_str(model_json_item(types, i));
        if (type == NULL || strcmp(type, "full_attention") != 0)
            hf_refuse(r, EP_ERR_UNSUPPORTED,
                      "layer_types: layer %zu is %.40s; only full_attention is implemented", i,
                      type != NULL ? type : "no text");
    }
    if (hf_get_int(r, o, "decoder_sparse_step", 1) != 1 || model_json_size(dense) != 0)
        hf_refuse(
            r, EP_ERR_UNSUPPORTED,
            "layers without experts (decoder_sparse_step, mlp_only_layers) are not implemented");
}

static void refuse_features(hf_reader *r, const model_json *o)
{
    static const struct {
        const char *key, *what;
    } truths[] = {{"attention_bias", "a bias of the attention projections"},
                  {"use_sliding_window", "a sliding window"},
                  {"mlp_bias", "a bias of the experts"}},
      numbers[] = {{"shared_expert_intermediate_size", "a shared expert"},
                   {"n_shared_experts", "a shared expert"},
                   {"num_nextn_predict_layers", "multi-token prediction"}};
    const char *act = hf_get_str(r, o, "hidden_act", "silu");
    if (strcmp(act, "silu") != 0)
        hf_refuse(r, EP_ERR_UNSUPPORTED, "hidden_act %.40s is not implemented, only silu", act);
    for (size_t i = 0; i < sizeof(truths) / sizeof(truths[0]); i++)
        if (hf_get_bool(r, o, truths[i].key, false))
            hf_refuse(r, EP_ERR_UNSUPPORTED, "%s true: %s is not implemented", truths[i].key,
                      truths[i].what);
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
        if (hf_get_int(r, o, numbers[i].key, 0) != 0)
            hf_refuse(r, EP_ERR_UNSUPPORTED, "%s is not 0: %s is not implemented", numbers[i].key,
                      numbers[i].what);
    refuse_layers(r, o);
}

static void refuse_architecture(hf_reader *r, const model_json *o)
{
    const model_json *list = model_json_member(o, "architectures");
    const char *type = hf_get_str(r, o, "model_type", "(none)");
    if (strcmp(type, "qwen3_moe") != 0)
        hf_refuse(r, EP_ERR_UNSUPPORTED, "model_type %.40s is not implemented, only qwen3_moe",
                  type);
    if (list != NULL && model_json_size(list) == 0)
        hf_refuse(r, EP_ERR_INVALID, "architectures is empty or no list");
    for (size_t i = 0; i < model_json_size(list); i++) {
        const char *name = model_json_str(model_json_item(list, i));
        if (name == NULL || strcmp(name, "Qwen3MoeForCausalLM") != 0)
            hf_refuse(r, EP_ERR_UNSUPPORTED,
                      "architectures: %.60s is not implemented, only Qwen3MoeForCausalLM",
                      name != NULL ? name : "no text");
    }
}

/* ---- the model ---- */

/* Its base stands beside the others or, in newer files, in an object of its own. */
static void read_rope(hf_reader *r, const model_json *o, model_shape *s)
{
    static const char *const keys[] = {"rope_scaling", "rope_parameters"};
    const model_json *from = o;
    for (size_t i = 0; i < 2; i++) {
        const model_json *x = model_json_member(o, keys[i]);
        if (x == NULL) continue;
        if (!model_json_is_object(x)) hf_refuse(r, EP_ERR_INVALID, "%s is no object", keys[i]);
        const char *type =
            hf_get_str(r, x, "rope_type", hf_get_str(r, x, "type", i == 0 ? "(none)" : "default"));
        if (strcmp(type, "default") != 0)
            hf_refuse(r, EP_ERR_UNSUPPORTED, "%s of type %.40s is not implemented", keys[i], type);
        if (model_json_member(x, "rope_theta") != NULL) from = x;
        if (hf_get_real(r, x, "partial_rotary_factor", 1.0, 0.0, 1.0) != 1.0)
            hf_refuse(r, EP_ERR_UNSUPPORTED, "partial_rotary_factor is not implemented");
    }
    if (hf_get_real(r, o, "partial_rotary_factor", 1.0, 0.0, 1.0) != 1.0)
        hf_refuse(r, EP_ERR_UNSUPPORTED, "partial_rotary_factor is not implemented");
    s->rope_base = hf_get_real(r, from, "rope_theta", 10000.0, 1.0, 1e12);
}

/* transformers 5 writes num_local_experts, older ones num_experts. */
static int read_experts(hf_reader *r, const model_json *o)
{
    bool newer = model_json_member(o, "num_experts") == NULL &&
                 model_json_member(o, "num_local_experts") != NULL;
    int n = hf_get_dim(r, o, newer ? "num_local_experts" : "num_experts", 0, MODEL_MAX_EXPERTS);
    int64_t local = hf_get_int(r, o, "num_local_experts", n);
    if (local != n)
        hf_refuse(r, EP_ERR_INVALID, "num_experts is %d, but num_local_experts %" PRId64, n, local);
    return n;
}

static void read_shape(hf_reader *r, const model_json *o, model_shape *s)
{
    char fault[160];
    snprintf(s->arch, sizeof(s->arch), "qwen3moe");
    s->n_layers = hf_get_dim(r, o, "num_hidden_layers", 0, MODEL_MAX_LAYERS);
    s->n_experts = read_experts(r, o);
    s->top_k = hf_get_dim(r, o, "num_experts_per_tok", 0, MODEL_MAX_TOP_K);
    s->hidden = hf_get_dim(r, o, "hidden_size", 0, MODEL_MAX_DIM);
    s->inter = hf_get_dim(r, o, "moe_intermediate_size", 0, MODEL_MAX_DIM);
    s->n_heads = hf_get_dim(r, o, "num_attention_heads", 0, MODEL_MAX_HEADS);
    s->n_kv_heads = hf_get_dim(r, o, "num_key_value_heads", 0, MODEL_MAX_HEADS);
    int even = s->n_heads > 0 ? s->hidden / s->n_heads : 0;
    s->head_dim = hf_get_dim(r, o, "head_dim", even, MODEL_MAX_HEADS);
    s->rope_dim = s->head_dim;
    s->vocab = hf_get_dim(r, o, "vocab_size", 0, MODEL_MAX_DIM);
    s->context = hf_get_dim(r, o, "max_position_embeddings", 0, MODEL_MAX_DIM);
    s->rms_eps = (float)hf_get_real(r, o, "rms_norm_eps", 1e-6, 1e-12, 1.0);
    s->gate = MODEL_GATE_SOFTMAX_TOPK;
    s->renormalise = hf_get_bool(r, o, "norm_topk_prob", false);
    read_rope(r, o, s);
    if (r->status == EP_OK && model_shape_fault(s, fault, sizeof(fault)) != NULL)
        hf_refuse(r, EP_ERR_INVALID, "%s", fault);
}

ep_status hf_config_read(hf_config *out, model_json *const *texts, const char *folder, ep_err *err)
{
    hf_reader r = {.folder = folder, .name = hf_text_names[HF_CONFIG], .err = err};
    const model_json *config = texts[HF_CONFIG];
    hf_config c = {0};
    if (config == NULL) hf_refuse(&r, EP_ERR_INVALID, "it is missing");
    if (!model_json_is_object(config)) hf_refuse(&r, EP_ERR_INVALID, "it is no object");
    refuse_architecture(&r, config);
    read_quants(&r, config, texts[HF_QUANTIZE], &c);
    refuse_features(&r, config);
    read_shape(&r, config, &c.shape);
    c.tied = hf_get_bool(&r, config, "tie_word_embeddings", false);
    if (r.status == EP_OK) *out = c;
    return r.status;
}
