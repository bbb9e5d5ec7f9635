/*
 * Members of an object, typed and bounded: what hf_config.c and vocab_hf.c read JSON with.
 */
#include "model/hf.h"

#include <inttypes.h>
#include <stdio.h>

void hf_refuse(hf_reader *r, ep_status status, const char *fmt, ...)
{
    char what[512];
    va_list ap;
    if (r->status != EP_OK) return;
    va_start(ap, fmt);
    vsnprintf(what, sizeof(what), fmt, ap);
    va_end(ap);
    for (char *c = what; *c != '\0'; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f) *c = '?'; /* texts of the file garble nothing */
    r->status = ep_fail(r->err, status, "%s/%s: %s", r->folder, r->name, what);
}

int64_t hf_get_int(hf_reader *r, const model_json *o, const char *key, int64_t fallback)
{
    const model_json *v = model_json_member(o, key);
    int64_t n = fallback;
    if (v != NULL && !model_json_int(v, &n))
        hf_refuse(r, EP_ERR_INVALID, "%s is no whole number", key);
    return n;
}

bool hf_get_bool(hf_reader *r, const model_json *o, const char *key, bool fallback)
{
    const model_json *v = model_json_member(o, key);
    bool b = fallback;
    if (v != NULL && !model_json_bool(v, &b))
        hf_refuse(r, EP_ERR_INVALID, "%s is neither true nor false", key);
    return b;
}

const char *hf_get_str(hf_reader *r, const model_json *o, const char *key, const char *fallback)
{
    const model_json *v = model_json_member(o, key);
    if (v == NULL) return fallback;
    const char *s = model_json_str(v);
    if (s == NULL) hf_refuse(r, EP_ERR_INVALID, "%s is no text", key);
    return s != NULL ? s : fallback;
}

int hf_get_dim(hf_reader *r, const model_json *o, const char *key, int64_t fallback, int64_t most)
{
    int64_t n = hf_get_int(r, o, key, fallback);
    if (model_json_member(o, key) == NULL && fallback < 1)
        hf_refuse(r, EP_ERR_INVALID, "%s is missing, expected 1 to %" PRId64, key, most);
    if (n < 1 || n > most)
        hf_refuse(r, EP_ERR_INVALID, "%s is %" PRId64 ", expected 1 to %" PRId64, key, n, most);
    return r->status == EP_OK ? (int)n : 0;
}

double hf_get_real(hf_reader *r, const model_json *o, const char *key, double fallback, double min,
                   double max)
{
    const model_json *v = model_json_member(o, key);
    double x = fallback;
    if (v != NULL && !model_json_real(v, &x)) hf_refuse(r, EP_ERR_INVALID, "%s is no number", key);
    if (!(x >= min && x <= max))
        hf_refuse(r, EP_ERR_INVALID, "%s is %g, expected %g to %g", key, x, min, max);
    return x;
}
