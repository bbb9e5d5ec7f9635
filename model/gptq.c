/*
 * The tensors of a GPTQ checkpoint of Qwen3-MoE: found by name, checked by type and shape, handed
 * out expert by expert. The invariant: after open every matrix of every expert has qweight, scales
 * and qzeros of the only layout that is computed with, and either all of them have g_idx or none
 * has; an expert's rows are given only if its zero points are in the middle, its weights in the
 * order of the file, its scales finite and its bias (which some tools write for layers without one)
 * zero.
 *
 * Contents are read when an expert is, not at open: a shard touches its own experts only.
 */
#include "model/gptq.h"
#include "model/json.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT = 160, MAX_CONFIG = 64 << 20 };

static const char *const roles[3] = {"gate_proj", "up_proj", "down_proj"};

typedef struct matrix {
    const st_tensor *qweight, *scales, *qzeros, *g_idx, *bias; /* the last two may be NULL */
} matrix;

struct gptq_model {
    st_file *file;
    gptq_config config;
    matrix *matrices; /* [n_layers][n_experts][3] */
};

static int role_n(const gptq_config *c, int role)
{
    return role == 2 ? c->hidden : c->inter;
}

static int role_k(const gptq_config *c, int role)
{
    return role == 2 ? c->inter : c->hidden;
}

static matrix *matrix_at(const gptq_model *m, int layer, int expert, int role)
{
    size_t at = (size_t)layer * (size_t)m->config.n_experts + (size_t)expert;
    return &m->matrices[at * 3 + (size_t)role];
}

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

/* What a tensor among the experts is that does not belong there; NULL: it does. */
static const char *unknown_part(const char *rest)
{
    static const char *const known[] = {"qweight", "scales", "qzeros", "g_idx", "bias"};
    const char *part = NULL;
    for (int i = 0; i < 3 && part == NULL; i++)
        if ((part = after(rest, roles[i])) != NULL) part = *part == '.' ? part + 1 : NULL;
    if (part == NULL) return "an unknown matrix of an expert";
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
        if (strcmp(part, known[i]) == 0) return NULL;
    if (strcmp(part, "weight") == 0) return "an expert that is not quantised";
    if (after(part, "weight_") != NULL) return "an expert in the compressed-tensors or fp8 layout";
    return "an unknown part of an expert";
}

/* Every tensor of an expert is one that is looked at: nothing else may change what it computes. */
static ep_status refuse_strangers(const gptq_model *m, ep_err *err)
{
    const gptq_config *c = &m->config;
    for (size_t i = 0; i < st_n_tensors(m->file); i++) {
        const char *name = st_tensor_at(m->file, i)->name, *rest = after(name, "model.layers.");
        int layer, expert;
        if (rest == NULL || !take_number(&rest, c->n_layers, &layer)) continue;
        if (layer >= c->n_layers)
            return ep_fail(err, EP_ERR_INVALID,
                           "%s: tensor %s belongs to a layer that num_hidden_layers %d rules out",
                           st_path(m->file), name, c->n_layers);
        const char *what = NULL;
        if (after(rest, "mlp.shared_expert") != NULL) what = "a shared expert";
        const char *in = after(rest, "mlp.experts.");
        if (in != NULL && !take_number(&in, c->n_experts, &expert))
            what = "experts fused into one tensor";
        else if (in != NULL && expert >= c->n_experts)
            return ep_fail(err, EP_ERR_INVALID,
                           "%s: tensor %s belongs to an expert that num_experts %d rules out",
                           st_path(m->file), name, c->n_experts);
        else if (in != NULL)
            what = unknown_part(in);
        if (what != NULL)
            return ep_fail(err, EP_ERR_UNSUPPORTED,
                           "%s: layer %d: tensor %s: %s is not implemented", st_path(m->file),
                           layer, name, what);
    }
    return EP_OK;
}

/* ---- shapes ---- */

static bool has_dims(const st_tensor *t, uint64_t rows, uint64_t columns)
{
    return t->n_dims == 2 && t->dim[0] == rows && t->dim[1] == columns;
}

static ep_status misshapen(const gptq_model *m, const st_tensor *t, const char *want, ep_err *err)
{
    char shape[256];
    return ep_fail(err, EP_ERR_INVALID, "%s: tensor %s is %s %s, expected %s", st_path(m->file),
                   t->name, st_type_name(t->type), st_shape_text(shape, sizeof(shape), t), want);
}

/* A tensor that must be there with this type and these dimensions. */
static ep_status want(const gptq_model *m, const char *name, st_type type, uint64_t rows,
                      uint64_t columns, const st_tensor **out, ep_err *err)
{
    char text[96];
    const st_tensor *t = st_find(m->file, name);
    if (t == NULL)
        return ep_fail(err, EP_ERR_INVALID, "%s: tensor %s is missing", st_path(m->file), name);
    snprintf(text, sizeof(text), "%s [%" PRIu64 ", %" PRIu64 "]", st_type_name(type), rows,
             columns);
    if (t->type != type || !has_dims(t, rows, columns)) return misshapen(m, t, text, err);
    *out = t;
    return EP_OK;
}

/* qweight in a form that other tools or widths have is named, because "expected" alone helps
 * nobody. */
static ep_status refuse_forms(const gptq_model *m, const char *name, uint64_t n, uint64_t k,
                              ep_err *err)
{
    const st_tensor *t = st_find(m->file, name);
    const char *what = NULL;
    if (t == NULL || t->n_dims != 2 || has_dims(t, k / 8, n)) return EP_OK;
    if (has_dims(t, k, n / 8))
        what = "the AWQ layout, packed along the outputs,";
    else if (has_dims(t, n, k / 8))
        what = "a transposed layout, outputs first,";
    else if (has_dims(t, k / 4, n))
        what = "a width of 8 bits";
    else if (has_dims(t, k / 16, n))
        what = "a width of 2 bits";
    else if (has_dims(t, k * 3 / 32, n))
        what = "a width of 3 bits";
    if (what == NULL) return EP_OK;
    return ep_fail(err, EP_ERR_UNSUPPORTED, "%s: tensor %s: %s is not implemented",
                   st_path(m->file), name, what);
}

static ep_status find_matrix(const gptq_model *m, int layer, int expert, int role, ep_err *err)
{
    matrix *x = matrix_at(m, layer, expert, role);
    uint64_t n = (uint64_t)role_n(&m->config, role), k = (uint64_t)role_k(&m->config, role);
    char name[TEXT];
    size_t at = (size_t)snprintf(name, sizeof(name), "model.layers.%d.mlp.experts.%d.%s.", layer,
                                 expert, roles[role]);
    snprintf(name + at, sizeof(name) - at, "qweight");
    ep_status s = refuse_forms(m, name, n, k, err);
    if (s == EP_OK) s = want(m, name, ST_I32, k / 8, n, &x->qweight, err);
    snprintf(name + at, sizeof(name) - at, "scales");
    if (s == EP_OK) s = want(m, name, ST_F16, k / GPTQ_GROUP, n, &x->scales, err);
    snprintf(name + at, sizeof(name) - at, "qzeros");
    if (s == EP_OK) s = want(m, name, ST_I32, k / GPTQ_GROUP, n / 8, &x->qzeros, err);
    if (s != EP_OK) return s;
    snprintf(name + at, sizeof(name) - at, "g_idx");
    x->g_idx = st_find(m->file, name);
    if (x->g_idx != NULL &&
        (x->g_idx->type != ST_I32 || x->g_idx->n_dims != 1 || x->g_idx->dim[0] != k))
        return misshapen(m, x->g_idx, "I32 with one index for each input", err);
    if ((x->g_idx != NULL) != (m->matrices[0].g_idx != NULL))
        return ep_fail(
            err, EP_ERR_INVALID,
            "%s: some experts have g_idx and others have none: tensor %s is %s, unlike that "
            "of layer 0, expert 0",
            st_path(m->file), name, x->g_idx != NULL ? "there" : "missing");
    snprintf(name + at, sizeof(name) - at, "bias");
    x->bias = st_find(m->file, name);
    if (x->bias != NULL && (x->bias->n_dims != 1 || x->bias->dim[0] != n ||
                            (x->bias->type != ST_F16 && x->bias->type != ST_BF16)))
        return misshapen(m, x->bias, "F16 with one value for each output", err);
    return EP_OK;
}

/* ---- the rest of a layer ---- */

/* A tensor of floats: n_dims 1 or 2. Dense weights may be quantised too (columns then 0: not). */
static ep_status want_floats(const gptq_model *m, const char *name, uint64_t rows, uint64_t columns,
                             ep_err *err)
{
    char text[96];
    const st_tensor *t = st_find(m->file, name);
    if (t == NULL)
        return ep_fail(err, EP_ERR_INVALID, "%s: tensor %s is missing", st_path(m->file), name);
    bool fits = columns == 0 ? t->n_dims == 1 && t->dim[0] == rows : has_dims(t, rows, columns);
    if (fits && (t->type == ST_F16 || t->type == ST_BF16 || t->type == ST_F32)) return EP_OK;
    if (columns == 0)
        snprintf(text, sizeof(text), "floats [%" PRIu64 "]", rows);
    else
        snprintf(text, sizeof(text), "floats [%" PRIu64 ", %" PRIu64 "]", rows, columns);
    return misshapen(m, t, text, err);
}

/* NAME.weight, or the four tensors of a quantised matrix, whose first is checked. */
static ep_status want_linear(const gptq_model *m, const char *prefix, uint64_t n, uint64_t k,
                             ep_err *err)
{
    char name[TEXT];
    const st_tensor *t;
    snprintf(name, sizeof(name), "%s.qweight", prefix);
    if (st_find(m->file, name) != NULL) return want(m, name, ST_I32, k / 8, n, &t, err);
    snprintf(name, sizeof(name), "%s.weight", prefix);
    return want_floats(m, name, n, k, err);
}

static ep_status check_layer(const gptq_model *m, int layer, ep_err *err)
{
    const gptq_config *c = &m->config;
    uint64_t h = (uint64_t)c->hidden, d = (uint64_t)c->head_dim;
    uint64_t q = (uint64_t)c->n_heads * d, kv = (uint64_t)c->n_kv_heads * d;
    const struct {
        const char *name;
        uint64_t rows, columns;
        bool linear;
    } parts[] = {{"mlp.gate.weight", (uint64_t)c->n_experts, h, false},
                 {"input_layernorm.weight", h, 0, false},
                 {"post_attention_layernorm.weight", h, 0, false},
                 {"self_attn.q_norm.weight", d, 0, false},
                 {"self_attn.k_norm.weight", d, 0, false},
                 {"self_attn.q_proj", q, h, true},
                 {"self_attn.k_proj", kv, h, true},
                 {"self_attn.v_proj", kv, h, true},
                 {"self_attn.o_proj", h, q, true}};
    char name[TEXT];
    ep_status s = EP_OK;
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]) && s == EP_OK; i++) {
        snprintf(name, sizeof(name), "model.layers.%d.%s", layer, parts[i].name);
        s = parts[i].linear ? want_linear(m, name, parts[i].rows, parts[i].columns, err)
                            : want_floats(m, name, parts[i].rows, parts[i].columns, err);
    }
    return s;
}

static ep_status check_ends(const gptq_model *m, ep_err *err)
{
    uint64_t h = (uint64_t)m->config.hidden, v = (uint64_t)m->config.vocab;
    ep_status s = want_floats(m, "model.embed_tokens.weight", v, h, err);
    if (s == EP_OK) s = want_floats(m, "model.norm.weight", h, 0, err);
    if (s == EP_OK && !m->config.tied) s = want_linear(m, "lm_head", v, h, err);
    return s;
}

/* ---- opening ---- */

static ep_status find_all(gptq_model *m, ep_err *err)
{
    const gptq_config *c = &m->config;
    uint64_t n = (uint64_t)c->n_layers * (uint64_t)c->n_experts * 3;
    ep_status s = refuse_strangers(m, err);
    if (s == EP_OK) s = check_ends(m, err);
    if (s != EP_OK) return s;
    /* Three tensors each at least: memory is never more than a multiple of the file's own
     * directory. */
    if (n > st_n_tensors(m->file))
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: %d layers of %d experts need more tensors than the %zu that are there",
                       st_path(m->file), c->n_layers, c->n_experts, st_n_tensors(m->file));
    m->matrices = ep_calloc((size_t)n, sizeof(*m->matrices));
    if (m->matrices == NULL) return ep_fail(err, EP_ERR_NOMEM, "%s: no memory", st_path(m->file));
    for (int l = 0; l < c->n_layers && s == EP_OK; l++) {
        s = check_layer(m, l, err);
        for (int e = 0; e < c->n_experts && s == EP_OK; e++)
            for (int role = 0; role < 3 && s == EP_OK; role++)
                s = find_matrix(m, l, e, role, err);
    }
    if (s == EP_OK && c->desc_act && m->matrices[0].g_idx == NULL)
        s = ep_fail(err, EP_ERR_UNSUPPORTED,
                    "%s: desc_act is true, but no g_idx says in which order the weights are",
                    st_path(m->file));
    return s;
}

static ep_status open_parsed(gptq_model **out, st_file *file, const model_json *config,
                             const model_json *quantize, ep_err *err)
{
    gptq_model *m = ep_calloc(1, sizeof(*m));
    if (m == NULL) {
        ep_fail(err, EP_ERR_NOMEM, "%s: no memory", st_path(file));
        st_close(file);
        return EP_ERR_NOMEM;
    }
    m->file = file;
    ep_status status = gptq_config_read(&m->config, config, quantize, st_path(file), err);
    if (status == EP_OK) status = find_all(m, err);
    if (status != EP_OK) {
        gptq_close(m);
        return status;
    }
    *out = m;
    return EP_OK;
}

ep_status gptq_open_file(gptq_model **out, st_file *file, const st_bytes *config,
                         const st_bytes *quantize, ep_err *err)
{
    model_json *c = NULL, *q = NULL;
    ep_status status = model_json_parse(&c, config->data, config->size, "config.json", err);
    if (status == EP_OK && quantize != NULL)
        status = model_json_parse(&q, quantize->data, quantize->size, "quantize_config.json", err);
    if (status == EP_OK)
        status = open_parsed(out, file, c, q, err);
    else
        st_close(file);
    model_json_free(c);
    model_json_free(q);
    return status;
}

/* A JSON file beside the checkpoint; *out stays NULL when it is absent. */
static ep_status load_beside(const st_file *f, const char *name, model_json **out, ep_err *err)
{
    char *path = ep_strfmt("%s/%s", st_folder(f), name);
    if (path == NULL) return ep_fail(err, EP_ERR_NOMEM, "%s: no memory", name);
    ep_status status = model_json_load(out, path, MAX_CONFIG, err);
    ep_free(path);
    return status == EP_AGAIN ? EP_OK : status;
}

ep_status gptq_open(gptq_model **out, const char *path, ep_err *err)
{
    st_file *f;
    model_json *c = NULL, *q = NULL;
    ep_status status = st_open(&f, path, err);
    if (status != EP_OK) return status;
    status = load_beside(f, "config.json", &c, err);
    if (status == EP_OK) status = load_beside(f, "quantize_config.json", &q, err);
    if (status == EP_OK && c == NULL)
        status = ep_fail(err, EP_ERR_INVALID, "%s/config.json is missing", st_folder(f));
    if (status == EP_OK)
        status = open_parsed(out, f, c, q, err);
    else
        st_close(f);
    model_json_free(c);
    model_json_free(q);
    return status;
}

void gptq_close(gptq_model *m)
{
    if (m == NULL) return;
    st_close(m->file);
    ep_free(m->matrices);
    ep_free(m);
}

/* ---- experts ---- */

const gptq_config *gptq_shape(const gptq_model *m)
{
    return &m->config;
}

const st_file *gptq_file(const gptq_model *m)
{
    return m->file;
}

size_t gptq_expert_bytes(const gptq_model *m, int role)
{
    return (size_t)role_n(&m->config, role) *
           kern_type_row_bytes(KERN_GPTQ4, role_k(&m->config, role));
}

static ep_status bad(const gptq_model *m, const st_tensor *t, ep_status status, const char *what,
                     size_t at, ep_err *err)
{
    return ep_fail(err, status, "%s: tensor %s, element %zu: %s", st_path(m->file), t->name, at,
                   what);
}

ep_status gptq_expert_check(const gptq_model *m, int layer, int role, int expert, ep_err *err)
{
    const matrix *x = matrix_at(m, layer, expert, role);
    for (size_t i = 0; i < x->qzeros->bytes; i += 4) {
        ep_cursor c = ep_cursor_make(x->qzeros->data + i, 4);
        if (ep_get_u32(&c) != m->config.zeros)
            return bad(m, x->qzeros, EP_ERR_UNSUPPORTED,
                       m->config.version == 2
                           ? "asymmetric zero points (other than 0x88888888) are not implemented"
                           : "asymmetric zero points (other than 0x77777777) are not implemented",
                       i / 4, err);
    }
    for (size_t i = 0; x->g_idx != NULL && i < x->g_idx->bytes; i += 4) {
        ep_cursor c = ep_cursor_make(x->g_idx->data + i, 4);
        if (ep_get_u32(&c) != i / 4 / GPTQ_GROUP)
            return bad(m, x->g_idx, EP_ERR_UNSUPPORTED,
                       "weights ordered by activation (desc_act) are not implemented", i / 4, err);
    }
    for (size_t i = 0; i < x->scales->bytes; i += 2) {
        ep_cursor c = ep_cursor_make(x->scales->data + i, 2);
        if ((ep_get_u16(&c) & 0x7c00) == 0x7c00)
            return bad(m, x->scales, EP_ERR_INVALID, "the scale is not finite", i / 2, err);
    }
    for (size_t i = 0; x->bias != NULL && i < x->bias->bytes; i += 2) {
        ep_cursor c = ep_cursor_make(x->bias->data + i, 2);
        if ((ep_get_u16(&c) & 0x7fff) != 0)
            return bad(m, x->bias, EP_ERR_UNSUPPORTED, "a bias of an expert is not implemented",
                       i / 2, err);
    }
    return EP_OK;
}

ep_status gptq_expert_rows(const gptq_model *m, int layer, int role, int expert, void *rows,
                           ep_err *err)
{
    const matrix *x = matrix_at(m, layer, expert, role);
    ep_status status = gptq_expert_check(m, layer, role, expert, err);
    if (status == EP_OK)
        gptq_rows_from_words(role_n(&m->config, role), role_k(&m->config, role), x->qweight->data,
                             x->scales->data, rows);
    return status;
}
