/*
 * One safetensors file: eight bytes with the length of a JSON header, the header, the data. The
 * header gives each tensor a type, a shape and a range of the data. Here all of them are checked:
 * the range is inside the file and as long as type and shape say, ranges neither overlap nor leave
 * holes, and together they are the whole data. So no byte of a file is there without a name, and
 * none has two.
 *
 * Offsets are numbers of the JSON library (at most 2^63 - 1); products of shapes are checked for
 * overflow. What a tensor is for is not asked.
 */
#include "model/json.h"
#include "model/safetensors_part.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_NAME = 512 };

static const struct {
    const char *name;
    unsigned bits;
} types[ST_N_TYPES] = {
    [ST_BOOL] = {"BOOL", 8},       [ST_F4] = {"F4", 4},           [ST_F6_E2M3] = {"F6_E2M3", 6},
    [ST_F6_E3M2] = {"F6_E3M2", 6}, [ST_U8] = {"U8", 8},           [ST_I8] = {"I8", 8},
    [ST_F8_E5M2] = {"F8_E5M2", 8}, [ST_F8_E4M3] = {"F8_E4M3", 8}, [ST_F8_E8M0] = {"F8_E8M0", 8},
    [ST_I16] = {"I16", 16},        [ST_U16] = {"U16", 16},        [ST_F16] = {"F16", 16},
    [ST_BF16] = {"BF16", 16},      [ST_I32] = {"I32", 32},        [ST_U32] = {"U32", 32},
    [ST_F32] = {"F32", 32},        [ST_C64] = {"C64", 64},        [ST_F64] = {"F64", 64},
    [ST_I64] = {"I64", 64},        [ST_U64] = {"U64", 64},
};

const char *st_type_name(st_type t)
{
    return (unsigned)t < ST_N_TYPES ? types[t].name : "?";
}

char *st_shape_text(char *buf, size_t n, const st_tensor *t)
{
    size_t at = (size_t)snprintf(buf, n, "[");
    for (int d = 0; d < t->n_dims && at < n; d++)
        at += (size_t)snprintf(buf + at, n - at, "%s%" PRIu64, d ? ", " : "", t->dim[d]);
    if (at < n) snprintf(buf + at, n - at, "]");
    return buf;
}

bool st_text_is_clean(const char *s, size_t most)
{
    size_t n = strlen(s);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)s[i] < 0x20 || s[i] == 0x7f) return false;
    return n > 0 && n <= most;
}

/* ---- one entry ---- */

static ep_status bad(const st_part *p, const st_tensor *t, const char *what, ep_err *err)
{
    return ep_fail(err, EP_ERR_INVALID, "%s: tensor %s: %s", p->path, t->name, what);
}

static ep_status read_type(const st_part *p, st_tensor *t, const model_json *v, ep_err *err)
{
    const char *name = model_json_str(v);
    if (name == NULL) return bad(p, t, "its dtype is missing or no string", err);
    for (int i = 0; i < ST_N_TYPES; i++) {
        if (strcmp(types[i].name, name) != 0) continue;
        t->type = (st_type)i;
        return EP_OK;
    }
    return ep_fail(err, EP_ERR_UNSUPPORTED, "%s: tensor %s: dtype %.40s is not known", p->path,
                   t->name, name);
}

static ep_status read_shape(const st_part *p, st_tensor *t, const model_json *v, ep_err *err)
{
    if (!model_json_is_array(v)) return bad(p, t, "its shape is missing or no array", err);
    if (model_json_size(v) > ST_DIMS)
        return ep_fail(err, EP_ERR_UNSUPPORTED, "%s: tensor %s: %zu dimensions, at most %d",
                       p->path, t->name, model_json_size(v), ST_DIMS);
    t->n_dims = (int)model_json_size(v);
    uint64_t bits = types[t->type].bits;
    bool empty = false, huge = false;
    for (int d = 0; d < t->n_dims; d++) {
        int64_t n;
        if (!model_json_int(model_json_item(v, (size_t)d), &n) || n < 0)
            return bad(p, t, "a dimension of its shape is no whole number from 0", err);
        t->dim[d] = (uint64_t)n;
        empty = empty || n == 0;
        huge = huge || __builtin_mul_overflow(bits, (uint64_t)n, &bits);
    }
    if (huge && !empty) return bad(p, t, "its shape is impossible (overflow)", err);
    if (empty) bits = 0;
    if (bits % 8 != 0) return bad(p, t, "its shape is no whole number of bytes", err);
    if (bits / 8 > SIZE_MAX) return bad(p, t, "its shape is impossible (overflow)", err);
    t->bytes = (size_t)(bits / 8);
    return EP_OK;
}

/* Type and shape are read: the range must be as long as they say, and inside the file. */
static ep_status read_range(const st_part *p, st_tensor *t, const model_json *v, ep_err *err)
{
    int64_t from, to;
    char shape[256];
    uint64_t room = p->size - p->data_start;
    if (!model_json_is_array(v) || model_json_size(v) != 2 ||
        !model_json_int(model_json_item(v, 0), &from) ||
        !model_json_int(model_json_item(v, 1), &to))
        return bad(p, t, "its data_offsets are missing or no two whole numbers", err);
    if (from < 0 || to < from) return bad(p, t, "its data_offsets are negative or descend", err);
    if ((uint64_t)to > room)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: tensor %s: its data_offsets [%" PRId64 ", %" PRId64
                       "] reach past the end of the file (%" PRIu64 " bytes of data): truncated?",
                       p->path, t->name, from, to, room);
    if ((uint64_t)(to - from) != t->bytes)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: tensor %s: %s %s is %zu bytes, but its data_offsets span %" PRId64,
                       p->path, t->name, st_type_name(t->type),
                       st_shape_text(shape, sizeof(shape), t), t->bytes, to - from);
    t->data = p->map + p->data_start + (size_t)from;
    return EP_OK;
}

static ep_status read_tensor(const st_part *p, st_tensor *t, const model_json *v, ep_err *err)
{
    if (!model_json_is_object(v)) return bad(p, t, "its entry is no object", err);
    ep_status s = read_type(p, t, model_json_member(v, "dtype"), err);
    if (s == EP_OK) s = read_shape(p, t, model_json_member(v, "shape"), err);
    if (s == EP_OK) s = read_range(p, t, model_json_member(v, "data_offsets"), err);
    if (s == EP_OK && model_json_size(v) != 3)
        s = bad(p, t, "its entry has other keys than dtype, shape and data_offsets", err);
    return s;
}

/* ---- the header ---- */

static bool is_notes(const char *key)
{
    return strcmp(key, "__metadata__") == 0;
}

/* Counts tensors, notes and the bytes of their text; refuses names that no message could carry. */
static ep_status count_entries(st_part *p, model_json *doc, size_t *letters, ep_err *err)
{
    void *at = NULL, *note_at = NULL;
    const char *key, *note;
    model_json *v, *text;
    size_t tensors = 0;
    while (model_json_next(doc, &at, &key, &v)) {
        if (!is_notes(key)) {
            if (!st_text_is_clean(key, MAX_NAME))
                return ep_fail(
                    err, EP_ERR_INVALID,
                    "%s: the name of tensor %zu is empty, longer than %d or holds control "
                    "characters",
                    p->path, tensors, MAX_NAME);
            tensors++;
            *letters += strlen(key) + 1;
            continue;
        }
        if (!model_json_is_object(v))
            return ep_fail(err, EP_ERR_INVALID, "%s: __metadata__ is no object", p->path);
        while (model_json_next(v, &note_at, &note, &text)) {
            if (model_json_str(text) == NULL)
                return ep_fail(err, EP_ERR_INVALID,
                               "%s: __metadata__ holds something else than text", p->path);
            *letters += strlen(note) + strlen(model_json_str(text)) + 2;
            p->n_notes++;
        }
    }
    p->n_tensors = tensors;
    return EP_OK;
}

static const char *keep(char **at, const char *s)
{
    size_t n = strlen(s) + 1;
    char *to = *at;
    memcpy(to, s, n);
    *at += n;
    return to;
}

static ep_status read_entries(st_part *p, model_json *doc, ep_err *err)
{
    size_t letters = 0, n = 0, notes = 0;
    ep_status status = count_entries(p, doc, &letters, err);
    if (status != EP_OK) return status;
    p->tensors = ep_calloc(p->n_tensors, sizeof(*p->tensors));
    p->notes = ep_calloc(p->n_notes, sizeof(*p->notes));
    p->text = ep_alloc(letters);
    if (p->tensors == NULL || p->notes == NULL || p->text == NULL)
        return ep_fail(err, EP_ERR_NOMEM, "%s: no memory for its index", p->path);
    char *text = p->text;
    void *at = NULL, *note_at = NULL;
    const char *key;
    model_json *v, *value;
    while (status == EP_OK && model_json_next(doc, &at, &key, &v)) {
        if (!is_notes(key)) {
            p->tensors[n].name = keep(&text, key);
            status = read_tensor(p, &p->tensors[n], v, err);
            n++;
            continue;
        }
        while (model_json_next(v, &note_at, &key, &value)) {
            p->notes[notes].key = keep(&text, key);
            p->notes[notes].value = keep(&text, model_json_str(value));
            notes++;
        }
    }
    return status;
}

/* ---- the data ---- */

static int compare_places(const void *a, const void *b)
{
    const st_tensor *x = a, *y = b;
    if (x->data != y->data) return (x->data > y->data) - (x->data < y->data);
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static ep_status check_places(st_part *p, ep_err *err)
{
    const uint8_t *at = p->map + p->data_start, *end = p->map + p->size;
    qsort(p->tensors, p->n_tensors, sizeof(*p->tensors), compare_places);
    for (size_t i = 0; i < p->n_tensors; i++) {
        const st_tensor *t = &p->tensors[i];
        if (t->data < at)
            return ep_fail(err, EP_ERR_INVALID, "%s: tensors %.200s and %.200s overlap", p->path,
                           p->tensors[i - 1].name, t->name);
        if (t->data > at)
            return ep_fail(err, EP_ERR_INVALID,
                           "%s: %zu bytes before tensor %s belong to no tensor", p->path,
                           (size_t)(t->data - at), t->name);
        at = t->data + t->bytes;
    }
    if (at != end)
        return ep_fail(err, EP_ERR_INVALID, "%s: the last %zu bytes belong to no tensor", p->path,
                       (size_t)(end - at));
    return EP_OK;
}

ep_status st_part_parse(st_part *p, ep_err *err)
{
    if (p->size < 8)
        return ep_fail(err, EP_ERR_INVALID, "%s: not a safetensors file (%zu bytes)", p->path,
                       p->size);
    ep_cursor c = ep_cursor_make(p->map, p->size);
    uint64_t n = ep_get_u64(&c);
    if (n > ST_MAX_HEADER)
        return ep_fail(err, EP_ERR_TOO_LARGE,
                       "%s: a header of %" PRIu64 " bytes is more than the limit of %zu: not a "
                       "safetensors file?",
                       p->path, n, ST_MAX_HEADER);
    if (n > ep_cursor_left(&c))
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: a header of %" PRIu64
                       " bytes does not fit in a file of %zu: truncated?",
                       p->path, n, p->size);
    const uint8_t *text = ep_get_bytes(&c, (size_t)n);
    if (n < 2 || text[0] != '{')
        return ep_fail(err, EP_ERR_INVALID, "%s: the header is no JSON object", p->path);
    p->data_start = 8 + (size_t)n;
    model_json *doc;
    ep_status status = model_json_parse(&doc, text, (size_t)n, p->path, err);
    if (status != EP_OK) return status;
    status = read_entries(p, doc, err);
    model_json_free(doc);
    return status == EP_OK ? check_places(p, err) : status;
}

void st_part_fini(st_part *p)
{
    ep_free(p->tensors);
    ep_free(p->notes);
    ep_free(p->text);
    p->tensors = NULL;
    p->notes = NULL;
    p->text = NULL;
    p->n_tensors = p->n_notes = 0;
}
