/*
 * weights: what a router computes with. Dense matrices are packed once, in the type the file has;
 * norms become floats; the rotation angles of every position are tabulated in double. Token
 * embeddings stay in the mapped file and are expanded row by row. Experts are the shards' business
 * and are not touched.
 *
 * All of it lies in one mapping: measured first, then filled, by the same code (place returns NULL
 * while it measures). Shapes were checked by model/; products still refuse a type without kernels
 * here.
 */
#include <math.h>
#include <string.h>

#include "router_node/internal.h"

typedef struct placer {
    const model *m;
    uint8_t *base; /* NULL: measuring */
    size_t used;
    ep_buf made; /* rows that are made, one matrix at a time */
} placer;

static void *place(placer *p, size_t bytes)
{
    uint8_t *at = p->base == NULL ? NULL : p->base + p->used;
    p->used += (bytes + 63) & ~(size_t)63;
    return at;
}

static ep_status put_matrix(placer *p, kern_matrix *out, const model_tensor *t, ep_err *err)
{
    if (!kern_type_is_served(t->type))
        return ep_fail(err, EP_ERR_UNSUPPORTED, "%s: tensor type %d has no kernels", t->name,
                       t->type);
    int k = (int)t->ne[0], n = (int)t->ne[1];
    size_t row = kern_type_row_bytes(t->type, k);
    if (row == 0 || row * (size_t)n != t->bytes)
        return ep_fail(err, EP_ERR_INVALID, "%s: rows of %d weights do not fit type %s", t->name, k,
                       kern_type_name(t->type));
    uint8_t *to = place(p, kern_packed_bytes(t->type, n, k));
    if (to != NULL) {
        const uint8_t *rows;
        ep_status status = model_rows(p->m, t, 0, &p->made, &rows, err);
        if (status != EP_OK) return status;
        kern_pack(t->type, n, k, rows, to);
        model_forget(p->m, t, 0); /* not held twice */
    }
    *out = (kern_matrix){t->type, n, k, to};
    return EP_OK;
}

static ep_status put_vector(placer *p, float **out, const model_tensor *t, ep_err *err)
{
    int n = (int)t->ne[0];
    if (!kern_type_is_served(t->type) || kern_type_row_bytes(t->type, n) == 0)
        return ep_fail(err, EP_ERR_UNSUPPORTED, "%s: tensor type %d has no kernels", t->name,
                       t->type);
    *out = place(p, (size_t)n * sizeof(float));
    if (*out != NULL) kern_dequant_row(t->type, t->data, *out, n);
    return EP_OK;
}

static void put_rope(placer *p, router_weights *w, const model_shape *shape)
{
    int half = shape->rope_dim / 2;
    w->rope = place(p, sizeof(float) * (size_t)shape->rope_dim * (size_t)w->n_positions);
    if (w->rope == NULL) return;
    for (int i = 0; i < half; i++) {
        double freq = pow(shape->rope_base, -(double)i / (double)half);
        for (int t = 0; t < w->n_positions; t++) {
            float *row = w->rope + (size_t)t * (size_t)shape->rope_dim;
            row[i] = (float)cos((double)t * freq);
            row[half + i] = (float)sin((double)t * freq);
        }
    }
}

static ep_status put_layer(placer *p, router_layer *to, const model_layer *from, ep_err *err)
{
    const model_tensor *vectors[] = {from->attn_norm, from->ffn_norm, from->q_norm, from->k_norm};
    float **vector_to[] = {&to->attn_norm, &to->ffn_norm, &to->q_norm, &to->k_norm};
    for (int i = 0; i < 4; i++) {
        ep_status status = put_vector(p, vector_to[i], vectors[i], err);
        if (status != EP_OK) return status;
    }
    const model_tensor *matrices[] = {from->q, from->k, from->v, from->o, from->gate_inp};
    kern_matrix *matrix_to[] = {&to->q, &to->k, &to->v, &to->o, &to->gate};
    for (int i = 0; i < 5; i++) {
        ep_status status = put_matrix(p, matrix_to[i], matrices[i], err);
        if (status != EP_OK) return status;
    }
    return EP_OK;
}

static ep_status put_all(placer *p, router_weights *w, const model *m, ep_err *err)
{
    for (int i = 0; i < m->shape.n_layers; i++) {
        ep_status status = put_layer(p, &w->layers[i], &m->layers[i], err);
        if (status != EP_OK) return status;
    }
    ep_status status = put_vector(p, &w->output_norm, m->output_norm, err);
    if (status == EP_OK) status = put_matrix(p, &w->head, m->output, err);
    if (status == EP_OK) put_rope(p, w, &m->shape);
    return status;
}

ep_status router_weights_open(router_weights *w, const model *m, int n_positions,
                              const kern_act *forms, ep_err *err)
{
    memset(w, 0, sizeof(*w));
    w->n_positions = n_positions;
    w->layers = ep_calloc((size_t)m->shape.n_layers, sizeof(router_layer));
    if (w->layers == NULL)
        return ep_fail(err, EP_ERR_NOMEM, "no memory for %d layers", m->shape.n_layers);
    for (int i = 0; i < m->shape.n_layers; i++)
        w->layers[i].form = forms != NULL ? forms[i]
                                          : kern_gate_up_act(m->layers[i].gate_exps->type,
                                                             m->layers[i].up_exps->type);

    placer p = {.m = m};
    ep_status status = put_all(&p, w, m, err);
    if (status != EP_OK) goto fail;
    w->block_bytes = p.used;
    w->block = ep_map(w->block_bytes);
    if (w->block == NULL) {
        status = ep_fail(err, EP_ERR_NOMEM, "no memory for %zu bytes of router weights", p.used);
        goto fail;
    }
    p = (placer){.m = m, .base = w->block};
    status = put_all(&p, w, m, err);
    ep_buf_fini(&p.made);
    if (status != EP_OK) goto fail;
    return EP_OK;
fail:
    router_weights_close(w);
    return status;
}

void router_weights_close(router_weights *w)
{
    if (w->block != NULL) ep_unmap(w->block, w->block_bytes);
    ep_free(w->layers);
    memset(w, 0, sizeof(*w));
}

void router_weights_embed(const model *m, int32_t token, float *x)
{
    const model_tensor *t = m->token_embd;
    size_t row = kern_type_row_bytes(t->type, m->shape.hidden);
    kern_dequant_row(t->type, t->data + row * (size_t)token, x, m->shape.hidden);
}
