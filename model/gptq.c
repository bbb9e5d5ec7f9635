/*
 * A matrix quantised by GPTQ: its tensors found by name, checked by type and shape, turned into
 * rows. The invariant: a matrix that was found has qweight, scales and qzeros of the only layout
 * that is computed with; its rows are given only if its zero points are in the middle, its weights
 * in the order of the file, its scales finite and its bias (which some tools write for layers
 * without one) zero.
 */
#include "model/gptq.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { TEXT = 192 };

/* ---- names and shapes ---- */

static bool has_dims(const st_tensor *t, uint64_t rows, uint64_t columns)
{
    return t->n_dims == 2 && t->dim[0] == rows && t->dim[1] == columns;
}

static const st_tensor *find(const st_file *f, const char *prefix, const char *part)
{
    char name[TEXT];
    snprintf(name, sizeof(name), "%s.%s", prefix, part);
    return st_find(f, name);
}

/* A tensor that must be there with this type and these dimensions. */
static ep_status want(const st_file *f, const char *prefix, const char *part, st_type type,
                      uint64_t rows, uint64_t columns, const st_tensor **out, ep_err *err)
{
    char text[96];
    const st_tensor *t = find(f, prefix, part);
    if (t == NULL)
        return ep_fail(err, EP_ERR_INVALID, "%s: tensor %s.%s is missing", st_path(f), prefix,
                       part);
    snprintf(text, sizeof(text), "%s [%" PRIu64 ", %" PRIu64 "]", st_type_name(type), rows,
             columns);
    if (t->type != type || !has_dims(t, rows, columns)) return st_misshapen(f, t, text, err);
    *out = t;
    return EP_OK;
}

/* qweight in a form that other tools or widths have is named, because "expected" alone helps
 * nobody. */
static ep_status refuse_forms(const st_file *f, const char *prefix, uint64_t n, uint64_t k,
                              ep_err *err)
{
    const st_tensor *t = find(f, prefix, "qweight");
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
                   st_tensor_path(f, t), t->name, what);
}

ep_status gptq_find(gptq_matrix *out, const gptq_rules *rules, const st_file *f, const char *prefix,
                    uint64_t n, uint64_t k, ep_err *err)
{
    gptq_matrix x = {0};
    if (k % GPTQ_GROUP != 0 || n % 8 != 0)
        return ep_fail(err, EP_ERR_UNSUPPORTED,
                       "%s: tensor %s.qweight: %" PRIu64
                       " inputs are no multiple of the group, %d, "
                       "or %" PRIu64 " outputs none of 8: not implemented",
                       st_path(f), prefix, k, GPTQ_GROUP, n);
    ep_status s = refuse_forms(f, prefix, n, k, err);
    if (s == EP_OK) s = want(f, prefix, "qweight", ST_I32, k / 8, n, &x.qweight, err);
    if (s == EP_OK) s = want(f, prefix, "scales", ST_F16, k / GPTQ_GROUP, n, &x.scales, err);
    if (s == EP_OK) s = want(f, prefix, "qzeros", ST_I32, k / GPTQ_GROUP, n / 8, &x.qzeros, err);
    if (s != EP_OK) return s;
    x.g_idx = find(f, prefix, "g_idx");
    if (x.g_idx != NULL &&
        (x.g_idx->type != ST_I32 || x.g_idx->n_dims != 1 || x.g_idx->dim[0] != k))
        return st_misshapen(f, x.g_idx, "I32 with one index for each input", err);
    if (rules->desc_act && x.g_idx == NULL)
        return ep_fail(
            err, EP_ERR_UNSUPPORTED,
            "%s: tensor %s.g_idx is missing: desc_act is true, and nothing says in which "
            "order the weights are",
            st_path(f), prefix);
    x.bias = find(f, prefix, "bias");
    if (x.bias != NULL && (x.bias->n_dims != 1 || x.bias->dim[0] != n ||
                           (x.bias->type != ST_F16 && x.bias->type != ST_BF16)))
        return st_misshapen(f, x.bias, "F16 with one value for each output", err);
    *out = x;
    return EP_OK;
}

/* ---- contents ---- */

static ep_status bad(const st_file *f, const st_tensor *t, ep_status status, const char *what,
                     size_t at, ep_err *err)
{
    return ep_fail(err, status, "%s: tensor %s, element %zu: %s", st_tensor_path(f, t), t->name, at,
                   what);
}

ep_status gptq_check(const gptq_matrix *x, const gptq_rules *rules, const st_file *f, ep_err *err)
{
    uint64_t zeros = rules->version == 2 ? 0x88888888u : 0x77777777u;
    for (size_t i = 0; i < x->qzeros->bytes; i += 4)
        if (ep_load_le(x->qzeros->data + i, 4) != zeros)
            return bad(f, x->qzeros, EP_ERR_UNSUPPORTED,
                       rules->version == 2
                           ? "asymmetric zero points (other than 0x88888888) are not implemented"
                           : "asymmetric zero points (other than 0x77777777) are not implemented",
                       i / 4, err);
    for (size_t i = 0; x->g_idx != NULL && i < x->g_idx->bytes; i += 4)
        if (ep_load_le(x->g_idx->data + i, 4) != i / 4 / GPTQ_GROUP)
            return bad(f, x->g_idx, EP_ERR_UNSUPPORTED,
                       "weights ordered by activation (desc_act) are not implemented", i / 4, err);
    for (size_t i = 0; i < x->scales->bytes; i += 2)
        if ((ep_load_le(x->scales->data + i, 2) & 0x7c00) == 0x7c00)
            return bad(f, x->scales, EP_ERR_INVALID, "the scale is not finite", i / 2, err);
    for (size_t i = 0; x->bias != NULL && i < x->bias->bytes; i += 2)
        if ((ep_load_le(x->bias->data + i, 2) & 0x7fff) != 0)
            return bad(f, x->bias, EP_ERR_UNSUPPORTED, "a bias of a matrix is not implemented",
                       i / 2, err);
    return EP_OK;
}

ep_status gptq_rows(const gptq_matrix *x, const gptq_rules *rules, const st_file *f, void *rows,
                    ep_err *err)
{
    ep_status status = gptq_check(x, rules, f, err);
    if (status == EP_OK)
        gptq_rows_from_words((int)x->qweight->dim[1], (int)x->qweight->dim[0] * 8, x->qweight->data,
                             x->scales->data, rows);
    return status;
}
