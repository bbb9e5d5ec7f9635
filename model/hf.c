/*
 * A folder made a model: every tensor of Qwen3-MoE found by its name, checked by type and shape,
 * and every tensor that is there known, refused or mentioned. The invariant: after open the
 * matrices of one role of a layer are all of one type, so that a layer's experts are one tensor to
 * everyone else; only where its rows come from is different (hf_rows).
 *
 * Contents are read when rows are asked for, not at open: a shard touches its own experts only.
 */
#include "model/file.h"
#include "model/hf.h"

#include <xxhash.h>

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { TEXT = 160, NAME = 64, N_LINEAR = 4, N_ROLES = 3, N_FLOATS = 5, N_PARTS = 6 };
#define MAX_TEXT ((size_t)128 << 20) /* of a JSON file */

static const char *const linear_names[N_LINEAR] = {"self_attn.q_proj", "self_attn.k_proj",
                                                   "self_attn.v_proj", "self_attn.o_proj"};
static const char *const role_names[N_ROLES] = {"gate_proj", "up_proj", "down_proj"};
static const char *const float_names[N_FLOATS] = {
    "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_norm.weight",
    "self_attn.k_norm.weight", "mlp.gate.weight"};

static const char *const part_names[N_PARTS] = {"weight", "qweight", "scales",
                                                "qzeros", "g_idx",   "bias"};

/* What a model_layer points to. */
typedef struct layer {
    model_tensor floats[N_FLOATS], linear[N_LINEAR], experts[N_ROLES];
    hf_matrix matrices[N_LINEAR];
    char names[N_LINEAR + N_ROLES][NAME];
} layer;

struct hf_folder {
    st_file *file;
    const st_bytes *texts; /* NULL: on disk, beside the file */
    hf_config config;
    model_tensor embedding, norm, head;
    hf_matrix head_matrix;
    layer *layers;      /* [n_layers] */
    hf_matrix *experts; /* [n_layers][N_ROLES][n_experts] */
};

/* ---- names ---- */

/* A number as a name writes it, `most` if it is larger, and what follows its dot; false: none. */
static bool take_number(const char **at, int most, int *out)
{
    const char *s = *at;
    int64_t n = 0;
    if (*s < '0' || *s > '9' || (s[0] == '0' && s[1] != '.')) return false;
    for (; *s >= '0' && *s <= '9'; s++)
        if (n < most) n = n * 10 + (*s - '0');
    if (*s != '.') return false;
    *at = s + 1;
    *out = n > most ? most : (int)n;
    return true;
}

static const char *after(const char *s, const char *prefix)
{
    size_t n = strlen(prefix);
    return strncmp(s, prefix, n) == 0 ? s + n : NULL;
}

/* What follows one of the names and a dot; NULL: it is none of them. */
static const char *part_of(const char *s, const char *const *names, int n)
{
    for (int i = 0; i < n; i++) {
        const char *rest = after(s, names[i]);
        if (rest != NULL && *rest == '.') return rest + 1;
    }
    return NULL;
}

/* What a part of a matrix is that nothing is computed with; NULL: it is looked at. */
static const char *unserved_part(const char *part)
{
    for (size_t i = 0; i < N_PARTS; i++)
        if (strcmp(part, part_names[i]) == 0) return NULL;
    if (after(part, "weight_") != NULL) return "a matrix in the compressed-tensors or fp8 layout";
    return "an unknown part of a matrix";
}

/* Beginnings of names that mean a computation that moed does not do. */
static const char *unserved_in_layer(const char *rest, bool *known)
{
    static const struct {
        const char *begin, *what;
    } list[] = {{"input_layernorm.bias", "a norm with a bias"},
                {"post_attention_layernorm.bias", "a norm with a bias"},
                {"self_attn.q_norm.bias", "a norm with a bias"},
                {"self_attn.k_norm.bias", "a norm with a bias"},
                {"self_attn.qkv_proj.", "a fused query, key and value projection"},
                {"self_attn.sinks", "attention sinks"},
                {"linear_attn.", "linear attention"},
                {"pre_feedforward_layernorm.", "a norm before the experts"},
                {"post_feedforward_layernorm.", "a norm after the experts"},
                {"mlp.shared_expert", "a shared expert"},
                {"mlp.gate.e_score_correction_bias", "a selection bias of the gate"},
                {"mlp.gate.bias", "a bias of the gate"},
                {"mlp.gate.", "a gate that is quantised"},
                {"mlp.gate_proj.", "a dense layer"},
                {"mlp.up_proj.", "a dense layer"},
                {"mlp.down_proj.", "a dense layer"}};
    *known = true;
    for (size_t i = 0; i < N_FLOATS; i++)
        if (strcmp(rest, float_names[i]) == 0) return NULL;
    const char *part = part_of(rest, linear_names, N_LINEAR);
    if (part != NULL) return unserved_part(part);
    for (size_t i = 0; i < sizeof(list) / sizeof(list[0]); i++)
        if (after(rest, list[i].begin) != NULL) return list[i].what;
    *known = false;
    return NULL;
}

/* The same of a tensor among the experts; *outside: it belongs to an expert that is not there. */
static const char *unserved_expert(const char *rest, int n_experts, bool *outside)
{
    int expert;
    if (!take_number(&rest, n_experts, &expert)) return "experts fused into one tensor";
    *outside = expert >= n_experts;
    const char *part = part_of(rest, role_names, N_ROLES);
    return part != NULL ? unserved_part(part) : "an unknown matrix of an expert";
}

/* The same of one that is of no layer. */
static const char *unserved_alone(const char *name, bool *known)
{
    static const char *const head[] = {"lm_head"};
    const char *part = part_of(name, head, 1);
    *known = part != NULL || strcmp(name, "model.embed_tokens.weight") == 0 ||
             strcmp(name, "model.norm.weight") == 0;
    if (part != NULL) return unserved_part(part);
    if (strcmp(name, "model.norm.bias") == 0) return "a norm with a bias";
    return after(name, "mtp.") != NULL ? "multi-token prediction" : NULL;
}

/* Nothing is accepted silently: a tensor is known, refused, or mentioned. */
static ep_status refuse_name(const hf_folder *h, const st_tensor *t, ep_err *err)
{
    const model_shape *s = &h->config.shape;
    const char *name = t->name, *path = st_tensor_path(h->file, t);
    const char *rest = after(name, "model.layers."), *in = NULL, *what;
    bool known = true, outside = false;
    int l = -1;
    if (rest == NULL || !take_number(&rest, s->n_layers, &l))
        what = unserved_alone(name, &known);
    else if ((in = after(rest, "mlp.experts.")) != NULL)
        what = unserved_expert(in, s->n_experts, &outside);
    else
        what = unserved_in_layer(rest, &known);
    if (l >= s->n_layers)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: tensor %s belongs to a layer that num_hidden_layers %d rules out", path,
                       name, s->n_layers);
    if (outside)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: tensor %s belongs to an expert that num_experts %d rules out", path,
                       name, s->n_experts);
    if (what != NULL)
        return ep_fail(err, EP_ERR_UNSUPPORTED, "%s: tensor %s: %s is not implemented", path, name,
                       what);
    if (!known) log_debug("%s: tensor %s is not used", path, name);
    return EP_OK;
}

/* ---- tensors ---- */

static int float_type(st_type type)
{
    return type == ST_F32 ? KERN_F32 : type == ST_F16 ? KERN_F16 : type == ST_BF16 ? KERN_BF16 : -1;
}

static int matrix_type(const hf_matrix *x)
{
    return x->weight != NULL ? float_type(x->weight->type) : KERN_GPTQ4;
}

/* A tensor of floats [n, k], or [n] when k is 0, checked. */
static ep_status check_floats(const hf_folder *h, const char *name, uint64_t n, uint64_t k,
                              const st_tensor **out, ep_err *err)
{
    char text[96];
    const st_tensor *t = st_find(h->file, name);
    if (t == NULL)
        return ep_fail(err, EP_ERR_INVALID, "%s: tensor %s is missing", st_path(h->file), name);
    bool fits = k == 0 ? t->n_dims == 1 && t->dim[0] == n
                       : t->n_dims == 2 && t->dim[0] == n && t->dim[1] == k;
    *out = t;
    if (fits && float_type(t->type) >= 0) return EP_OK;
    if (k == 0)
        snprintf(text, sizeof(text), "floats [%" PRIu64 "]", n);
    else
        snprintf(text, sizeof(text), "floats [%" PRIu64 ", %" PRIu64 "]", n, k);
    return st_misshapen(h->file, t, text, err);
}

static ep_status find_floats(const hf_folder *h, const char *name, uint64_t n, uint64_t k,
                             model_tensor *out, ep_err *err)
{
    const st_tensor *t;
    ep_status status = check_floats(h, name, n, k, &t, err);
    if (status != EP_OK) return status;
    *out = (model_tensor){.name = t->name,
                          .type = float_type(t->type),
                          .n_dims = k == 0 ? 1 : 2,
                          .ne = {k == 0 ? n : k, k == 0 ? 1 : n, 1, 1},
                          .data = t->data,
                          .bytes = t->bytes};
    return EP_OK;
}

/* The first part of a matrix that is there, from part `from` on; NULL: none. */
static const st_tensor *find_part(const hf_folder *h, const char *prefix, int from)
{
    char name[TEXT];
    const st_tensor *t = NULL;
    for (int i = from; i < N_PARTS && t == NULL; i++) {
        snprintf(name, sizeof(name), "%s.%s", prefix, part_names[i]);
        t = st_find(h->file, name);
    }
    return t;
}

/* A matrix [n, k]: PREFIX.weight, or what GPTQ has in its place. */
static ep_status find_matrix(const hf_folder *h, const char *prefix, uint64_t n, uint64_t k,
                             hf_matrix *out, ep_err *err)
{
    char name[TEXT];
    hf_matrix x = {0};
    snprintf(name, sizeof(name), "%s.weight", prefix);
    bool floats = st_find(h->file, name) != NULL;
    snprintf(name, sizeof(name), "%s.qweight", prefix);
    bool codes = st_find(h->file, name) != NULL;
    if (floats == codes)
        return ep_fail(err, EP_ERR_INVALID, "%s: tensors %s.weight and %s.qweight are %s",
                       st_path(h->file), prefix, prefix, floats ? "both there" : "both missing");
    if (codes && !h->config.quantised)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: tensor %s is there, but no quantization_config in config.json",
                       st_path(h->file), name);
    if (codes) {
        ep_status status = gptq_find(&x.gptq, &h->config.gptq, h->file, prefix, n, k, err);
        if (status != EP_OK) return status;
        *out = x;
        return EP_OK;
    }
    snprintf(name, sizeof(name), "%s.weight", prefix);
    ep_status status = check_floats(h, name, n, k, &x.weight, err);
    if (status != EP_OK) return status;
    const st_tensor *more = find_part(h, prefix, 1);
    if (more != NULL)
        return ep_fail(err, EP_ERR_UNSUPPORTED,
                       "%s: tensor %s beside %s.weight: a bias, or scales of floats, is not "
                       "implemented",
                       st_tensor_path(h->file, more), more->name, prefix);
    *out = x;
    return EP_OK;
}

/* n_parts matrices [n, k] of one type as one tensor. */
static void make_tensor(model_tensor *t, const char *name, const hf_matrix *parts, int n_parts,
                        int n, int k)
{
    *t = (model_tensor){.name = name,
                        .type = matrix_type(&parts[0]),
                        .n_dims = n_parts > 1 ? 3 : 2,
                        .ne = {(uint64_t)k, (uint64_t)n, (uint64_t)n_parts, 1},
                        .parts = parts};
    t->bytes = kern_type_row_bytes(t->type, k) * (size_t)n * (size_t)n_parts;
    if (n_parts == 1 && parts[0].weight != NULL) t->data = parts[0].weight->data;
}

static ep_status find_experts(hf_folder *h, int l, int role, ep_err *err)
{
    const model_shape *s = &h->config.shape;
    int n = role == 2 ? s->hidden : s->inter, k = role == 2 ? s->inter : s->hidden;
    hf_matrix *x = h->experts + ((size_t)l * N_ROLES + (size_t)role) * (size_t)s->n_experts;
    layer *y = &h->layers[l];
    char prefix[TEXT], *name = y->names[N_LINEAR + role];
    for (int e = 0; e < s->n_experts; e++) {
        snprintf(prefix, sizeof(prefix), "model.layers.%d.mlp.experts.%d.%s", l, e,
                 role_names[role]);
        ep_status status = find_matrix(h, prefix, (uint64_t)n, (uint64_t)k, &x[e], err);
        if (status != EP_OK) return status;
        if (matrix_type(&x[e]) != matrix_type(&x[0]))
            return ep_fail(err, EP_ERR_UNSUPPORTED,
                           "%s: layer %d: matrix %s is %s, that of expert 0 %s: experts of several "
                           "types in one layer are not implemented",
                           st_path(h->file), l, prefix, kern_type_name(matrix_type(&x[e])),
                           kern_type_name(matrix_type(&x[0])));
    }
    snprintf(name, NAME, "model.layers.%d.mlp.experts.*.%s", l, role_names[role]);
    make_tensor(&y->experts[role], name, x, s->n_experts, n, k);
    return EP_OK;
}

static ep_status find_layer(hf_folder *h, int l, model_layer *out, ep_err *err)
{
    const model_shape *s = &h->config.shape;
    int d = s->head_dim, q = s->n_heads * d, kv = s->n_kv_heads * d;
    const int float_n[N_FLOATS] = {s->hidden, s->hidden, d, d, s->n_experts};
    const int linear_n[N_LINEAR] = {q, kv, kv, s->hidden};
    layer *y = &h->layers[l];
    char name[TEXT];
    ep_status status = EP_OK;
    for (int i = 0; i < N_FLOATS && status == EP_OK; i++) {
        uint64_t k = i == N_FLOATS - 1 ? (uint64_t)s->hidden : 0; /* the gate is a matrix */
        snprintf(name, sizeof(name), "model.layers.%d.%s", l, float_names[i]);
        status = find_floats(h, name, (uint64_t)float_n[i], k, &y->floats[i], err);
    }
    for (int i = 0; i < N_LINEAR && status == EP_OK; i++) {
        int k = i == N_LINEAR - 1 ? q : s->hidden;
        snprintf(y->names[i], NAME, "model.layers.%d.%s", l, linear_names[i]);
        status =
            find_matrix(h, y->names[i], (uint64_t)linear_n[i], (uint64_t)k, &y->matrices[i], err);
        if (status == EP_OK)
            make_tensor(&y->linear[i], y->names[i], &y->matrices[i], 1, linear_n[i], k);
    }
    for (int role = 0; role < N_ROLES && status == EP_OK; role++)
        status = find_experts(h, l, role, err);
    *out = (model_layer){&y->floats[0], &y->linear[0],  &y->linear[1],  &y->linear[2],
                         &y->linear[3], &y->floats[2],  &y->floats[3],  &y->floats[1],
                         &y->floats[4], &y->experts[0], &y->experts[1], &y->experts[2]};
    return status;
}

static ep_status find_ends(hf_folder *h, model *m, ep_err *err)
{
    const model_shape *s = &h->config.shape;
    uint64_t hidden = (uint64_t)s->hidden, vocab = (uint64_t)s->vocab;
    ep_status status =
        find_floats(h, "model.embed_tokens.weight", vocab, hidden, &h->embedding, err);
    if (status == EP_OK) status = find_floats(h, "model.norm.weight", hidden, 0, &h->norm, err);
    /* A head of its own is there although it is tied: it is what counts, as in GGUF files. */
    bool own = !h->config.tied || find_part(h, "lm_head", 0) != NULL;
    if (status == EP_OK && own) {
        status = find_matrix(h, "lm_head", vocab, hidden, &h->head_matrix, err);
        if (status == EP_OK)
            make_tensor(&h->head, "lm_head", &h->head_matrix, 1, s->vocab, s->hidden);
    }
    m->token_embd = &h->embedding;
    m->output_norm = &h->norm;
    m->output = own ? &h->head : &h->embedding;
    return status;
}

static ep_status find_all(hf_folder *h, model *m, ep_err *err)
{
    const model_shape *s = &h->config.shape;
    size_t n_layers = (size_t)s->n_layers, n = n_layers * N_ROLES * (size_t)s->n_experts;
    ep_status status = EP_OK;
    for (size_t i = 0; i < st_n_tensors(h->file) && status == EP_OK; i++)
        status = refuse_name(h, st_tensor_at(h->file, i), err);
    if (status == EP_OK) status = find_ends(h, m, err);
    if (status != EP_OK) return status;
    /* One tensor each at least: memory is never more than a multiple of the file's own directory.
     */
    if (n > st_n_tensors(h->file))
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: %d layers of %d experts need more tensors than the %zu that are there",
                       st_path(h->file), s->n_layers, s->n_experts, st_n_tensors(h->file));
    h->layers = ep_calloc(n_layers, sizeof(*h->layers));
    h->experts = ep_calloc(n, sizeof(*h->experts));
    m->layers = ep_calloc(n_layers, sizeof(*m->layers));
    if (h->layers == NULL || h->experts == NULL || m->layers == NULL)
        return ep_fail(err, EP_ERR_NOMEM, "%s: no memory", st_path(h->file));
    for (int l = 0; l < s->n_layers && status == EP_OK; l++)
        status = find_layer(h, l, &m->layers[l], err);
    return status;
}

/* ---- opening ---- */

ep_status hf_load(const hf_folder *h, hf_text which, model_json **out, uint64_t *digest,
                  ep_err *err)
{
    ep_buf b = {0};
    const st_bytes *text = h->texts != NULL ? &h->texts[which] : NULL;
    char *path = ep_strfmt("%s/%s", st_folder(h->file), hf_text_names[which]);
    ep_status status = EP_OK;
    if (path == NULL)
        status = ep_fail(err, EP_ERR_NOMEM, "%s: no memory", hf_text_names[which]);
    else if (text == NULL)
        status = model_json_bytes(&b, path, MAX_TEXT, err);
    else if (text->data == NULL)
        status = EP_AGAIN;
    else if (ep_buf_add(&b, text->data, text->size) != EP_OK)
        status = ep_fail(err, EP_ERR_NOMEM, "%s: no memory", path);
    if (status == EP_OK && digest != NULL)
        *digest = XXH3_64bits_withSeed(b.data, b.len, *digest + which);
    if (status == EP_OK && out != NULL) status = model_json_parse(out, b.data, b.len, path, err);
    ep_buf_fini(&b);
    ep_free(path);
    return status == EP_AGAIN ? EP_OK : status;
}

/* All texts are part of the digest: ends of generation come from them too. */
static ep_status read_texts(hf_folder *h, uint64_t *digest, ep_err *err)
{
    model_json *texts[HF_N_TEXTS] = {NULL};
    ep_status status = EP_OK;
    *digest = st_digest(h->file);
    for (int i = 0; i < HF_N_TEXTS && status == EP_OK; i++)
        status = hf_load(h, (hf_text)i, i <= HF_QUANTIZE ? &texts[i] : NULL, digest, err);
    if (status == EP_OK) status = hf_config_read(&h->config, texts, st_folder(h->file), err);
    for (int i = 0; i < HF_N_TEXTS; i++)
        model_json_free(texts[i]);
    return status;
}

ep_status hf_open_file(model **out, st_file *file, const st_bytes *texts, ep_err *err)
{
    model *m = ep_calloc(1, sizeof(*m));
    hf_folder *h = ep_calloc(1, sizeof(*h));
    if (m == NULL || h == NULL) {
        ep_fail(err, EP_ERR_NOMEM, "%s: no memory", st_path(file));
        st_close(file);
        ep_free(m);
        ep_free(h);
        return EP_ERR_NOMEM;
    }
    m->folder = h;
    h->file = file;
    h->texts = texts;
    ep_status status = read_texts(h, &m->digest, err);
    if (status == EP_OK) status = find_all(h, m, err);
    if (status == EP_OK) status = hf_check(m, 1, err);
    if (status != EP_OK) {
        model_close(m);
        return status;
    }
    const char *slash = strrchr(st_folder(file), '/');
    m->shape = h->config.shape;
    snprintf(m->shape.name, sizeof(m->shape.name), "%s",
             slash != NULL ? slash + 1 : st_folder(file));
    *out = m;
    return EP_OK;
}

ep_status hf_open(model **out, const char *path, ep_err *err)
{
    st_file *f;
    ep_status status = st_open(&f, path, err);
    return status == EP_OK ? hf_open_file(out, f, NULL, err) : status;
}

void hf_close(hf_folder *h)
{
    if (h == NULL) return;
    st_close(h->file);
    ep_free(h->layers);
    ep_free(h->experts);
    ep_free(h);
}

const st_file *hf_file(const hf_folder *h)
{
    return h->file;
}

int hf_vocab(const hf_folder *h)
{
    return h->config.shape.vocab;
}

/* ---- rows ---- */

ep_status hf_rows(const hf_folder *h, const model_tensor *t, int i, ep_buf *made,
                  const uint8_t **rows, ep_err *err)
{
    const hf_matrix *x = &t->parts[i];
    if (x->weight != NULL) {
        *rows = x->weight->data;
        return EP_OK;
    }
    made->len = 0;
    if (ep_buf_reserve(made, model_rows_bytes(t)) != EP_OK)
        return ep_fail(err, EP_ERR_NOMEM, "%s: no memory", t->name);
    ep_status status = gptq_rows(&x->gptq, &h->config.gptq, h->file, made->data, err);
    if (status == EP_OK) *rows = made->data;
    return status;
}

void hf_forget(const hf_folder *h, const model_tensor *t, int i)
{
    if (t->data != NULL) {
        st_forget(h->file, t->data, t->bytes);
        return;
    }
    const hf_matrix *x = &t->parts[i];
    const st_tensor *parts[] = {x->weight, x->gptq.qweight, x->gptq.scales};
    for (size_t p = 0; p < sizeof(parts) / sizeof(parts[0]); p++)
        if (parts[p] != NULL) st_forget(h->file, parts[p]->data, parts[p]->bytes);
}

ep_status hf_check(const model *m, int n_layers, ep_err *err)
{
    const hf_folder *h = m->folder;
    ep_status status = EP_OK;
    for (int l = 0; l < n_layers; l++) {
        const model_layer *y = &m->layers[l];
        const model_tensor *t[] = {y->q, y->k, y->v, y->o, y->gate_exps, y->up_exps, y->down_exps};
        for (size_t i = 0; i < sizeof(t) / sizeof(t[0]) && status == EP_OK; i++)
            if (t[i]->type == KERN_GPTQ4)
                status = gptq_check(&t[i]->parts[0].gptq, &h->config.gptq, h->file, err);
    }
    return status;
}
