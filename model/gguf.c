/*
 * One GGUF part: header, keys, tensor directory. Turns bytes that nobody vouches for into indexes.
 *
 * Invariant: after a successful parse every pointer and length in the gguf_part lies inside the
 * map, every tensor's bytes lie inside the file, are aligned, and overlap no other's; names are
 * unique and hold no control characters. Nothing is allocated before the count it depends on was
 * compared with the bytes that are left, so a lying count costs nothing.
 *
 * It copies no data, knows no architecture and gives values no meaning except general.alignment.
 */
#include "model/file.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_KEYS       65536
#define MAX_TENSORS    (1u << 20)
#define MAX_KEY_NAME   65535
#define MAX_NAME       255
#define MIN_KEY_BYTES  14 /* length, one letter, kind, one byte */
#define MIN_INFO_BYTES 33 /* length, one letter, n_dims, one dimension, type, offset */
#define MAX_ALIGNMENT  (1u << 24)

static const struct {
    const char *name;
    uint8_t bytes; /* of one value; 0: not fixed */
} kinds[GGUF_N_KINDS] = {
    {"u8", 1},   {"i8", 1},     {"u16", 2},   {"i16", 2}, {"u32", 4}, {"i32", 4}, {"f32", 4},
    {"bool", 1}, {"string", 0}, {"array", 0}, {"u64", 8}, {"i64", 8}, {"f64", 8},
};

/* Every type a file may name, also those moed cannot compute with. block 0: no longer part of GGUF.
 */
static const struct {
    int type;
    const char *name;
    uint16_t block, bytes;
} types[] = {
    {0, "F32", 1, 4},         {1, "F16", 1, 2},         {2, "Q4_0", 32, 18},
    {3, "Q4_1", 32, 20},      {4, "Q4_2", 0, 0},        {5, "Q4_3", 0, 0},
    {6, "Q5_0", 32, 22},      {7, "Q5_1", 32, 24},      {8, "Q8_0", 32, 34},
    {9, "Q8_1", 32, 36},      {10, "Q2_K", 256, 84},    {11, "Q3_K", 256, 110},
    {12, "Q4_K", 256, 144},   {13, "Q5_K", 256, 176},   {14, "Q6_K", 256, 210},
    {15, "Q8_K", 256, 292},   {16, "IQ2_XXS", 256, 66}, {17, "IQ2_XS", 256, 74},
    {18, "IQ3_XXS", 256, 98}, {19, "IQ1_S", 256, 50},   {20, "IQ4_NL", 32, 18},
    {21, "IQ3_S", 256, 110},  {22, "IQ2_S", 256, 82},   {23, "IQ4_XS", 256, 136},
    {24, "I8", 1, 1},         {25, "I16", 1, 2},        {26, "I32", 1, 4},
    {27, "I64", 1, 8},        {28, "F64", 1, 8},        {29, "IQ1_M", 256, 56},
    {30, "BF16", 1, 2},       {31, "Q4_0_4_4", 0, 0},   {32, "Q4_0_4_8", 0, 0},
    {33, "Q4_0_8_8", 0, 0},   {34, "TQ1_0", 256, 54},   {35, "TQ2_0", 256, 66},
    {36, "IQ4_NL_4_4", 0, 0}, {37, "IQ4_NL_4_8", 0, 0}, {38, "IQ4_NL_8_8", 0, 0},
    {39, "MXFP4", 32, 17},    {40, "NVFP4", 64, 36},    {41, "Q1_0", 128, 18},
    {42, "Q2_0", 64, 18},
};
#define N_TYPES ((int)(sizeof(types) / sizeof(types[0])))

const char *gguf_kind_name(int kind)
{
    return kind >= 0 && kind < GGUF_N_KINDS ? kinds[kind].name : "?";
}

const char *gguf_type_name(int type)
{
    /* The table is dense: the index is the id. */
    return type >= 0 && type < N_TYPES ? types[type].name : NULL;
}

bool gguf_type_size(int type, uint32_t *block, uint32_t *block_bytes)
{
    if (type < 0 || type >= N_TYPES || types[type].block == 0) return false;
    *block = types[type].block;
    *block_bytes = types[type].bytes;
    return true;
}

char *gguf_shape_text(char *buf, size_t n, int n_dims, const uint64_t *ne)
{
    size_t at = 0;
    for (int i = 0; i < n_dims && at < n; i++)
        at += (size_t)snprintf(buf + at, n - at, "%s%" PRIu64, i ? ", " : "[", ne[i]);
    if (at < n) snprintf(buf + at, n - at, "]");
    return buf;
}

/* Control characters would garble messages and make names that look alike; NUL would cut them. */
static bool name_is_clean(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)s[i] < 0x20 || s[i] == 0x7f) return false;
    return true;
}

/* A length and that many bytes. NULL when short. */
static const char *get_string(ep_cursor *c, size_t *n)
{
    uint64_t len = ep_get_u64(c);
    if (c->bad || len > ep_cursor_left(c)) {
        c->bad = true;
        return NULL;
    }
    *n = (size_t)len;
    return (const char *)ep_get_bytes(c, (size_t)len);
}

/* ---- values -------------------------------------------------------------------------------------
 */

bool gguf_int_at(const gguf_key *k, uint64_t i, bool *negative, uint64_t *magnitude)
{
    gguf_kind kind = k->kind == GGUF_ARRAY ? k->elem : k->kind;
    size_t n = kinds[kind].bytes;
    if (i >= k->n || n == 0 || kind == GGUF_F32 || kind == GGUF_F64) return false;
    uint64_t v = ep_load_le(k->data + i * n, n);
    bool is_signed = kind == GGUF_I8 || kind == GGUF_I16 || kind == GGUF_I32 || kind == GGUF_I64;
    *negative = is_signed && (v >> (8 * n - 1)) != 0;
    /* Two's complement within n bytes: the magnitude of the smallest value still fits. */
    if (*negative) v = (n == 8 ? 0 : (uint64_t)1 << (8 * n)) - v;
    *magnitude = v;
    return true;
}

bool gguf_float_at(const gguf_key *k, uint64_t i, double *out)
{
    gguf_kind kind = k->kind == GGUF_ARRAY ? k->elem : k->kind;
    if (i >= k->n) return false;
    if (kind == GGUF_F32) {
        uint32_t bits = (uint32_t)ep_load_le(k->data + 4 * i, 4);
        float v;
        memcpy(&v, &bits, 4);
        *out = (double)v;
        return true;
    }
    if (kind == GGUF_F64) {
        uint64_t bits = ep_load_le(k->data + 8 * i, 8);
        memcpy(out, &bits, 8);
        return true;
    }
    bool negative;
    uint64_t v;
    if (kind == GGUF_BOOL || !gguf_int_at(k, i, &negative, &v)) return false;
    *out = negative ? -(double)v : (double)v;
    return true;
}

bool gguf_string_at(const gguf_key *k, uint64_t i, const char **s, size_t *n)
{
    if (i >= k->n) return false;
    if (k->kind == GGUF_STRING) {
        *s = (const char *)k->data;
        *n = k->bytes;
        return true;
    }
    if (k->kind != GGUF_ARRAY || k->elem != GGUF_STRING) return false;
    /* Walk from the last mark; the parse saw every length, so they are within the map. */
    const uint8_t *p = k->data + k->marks[i / GGUF_MARK];
    for (uint64_t skip = i % GGUF_MARK; skip > 0; skip--)
        p += 8 + ep_load_le(p, 8);
    *n = (size_t)ep_load_le(p, 8);
    *s = (const char *)p + 8;
    return true;
}

/* ---- keys ---------------------------------------------------------------------------------------
 */

static ep_status parse_array(ep_cursor *c, gguf_key *k, const char *path, ep_err *err)
{
    int shown = k->name_len > 100 ? 100 : (int)k->name_len;
    uint32_t elem = ep_get_u32(c);
    k->n = ep_get_u64(c);
    if (c->bad) return EP_AGAIN; /* the caller words it: the file ends inside the key */
    if (elem == GGUF_ARRAY)
        return ep_fail(err, EP_ERR_UNSUPPORTED, "%s: key %.*s: arrays of arrays are not supported",
                       path, shown, k->name);
    if (elem >= GGUF_N_KINDS)
        return ep_fail(err, EP_ERR_INVALID, "%s: key %.*s: unknown element kind %" PRIu32, path,
                       shown, k->name, elem);
    k->elem = (gguf_kind)elem;
    k->data = c->at;
    size_t left = ep_cursor_left(c), each = kinds[elem].bytes ? kinds[elem].bytes : 8;
    if (k->n > left / each)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: key %.*s: %" PRIu64 " elements of %s do not fit in the %zu bytes left",
                       path, shown, k->name, k->n, kinds[elem].name, left);
    if (elem != GGUF_STRING) {
        k->bytes = (size_t)k->n * each;
        (void)ep_get_bytes(c, k->bytes);
        return EP_OK;
    }
    size_t n_marks = (size_t)((k->n + GGUF_MARK - 1) / GGUF_MARK);
    k->marks = ep_alloc(n_marks * sizeof(uint64_t));
    if (k->marks == NULL) return ep_fail(err, EP_ERR_NOMEM, "%s: no memory for its index", path);
    for (uint64_t i = 0; i < k->n; i++) {
        if (i % GGUF_MARK == 0) k->marks[i / GGUF_MARK] = (uint64_t)(c->at - k->data);
        size_t len;
        if (get_string(c, &len) == NULL)
            return ep_fail(err, EP_ERR_INVALID,
                           "%s: key %.*s: string %" PRIu64 " of %" PRIu64
                           " runs past the end of the file",
                           path, shown, k->name, i, k->n);
    }
    k->bytes = (size_t)(c->at - k->data);
    return EP_OK;
}

static ep_status parse_key(ep_cursor *c, gguf_key *k, size_t i, const char *path, ep_err *err)
{
    k->name = get_string(c, &k->name_len);
    if (k->name == NULL)
        return ep_fail(err, EP_ERR_INVALID, "%s: the name of key %zu runs past the end of the file",
                       path, i);
    if (k->name_len == 0 || k->name_len > MAX_KEY_NAME || !name_is_clean(k->name, k->name_len))
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: the name of key %zu is empty, too long or holds control characters",
                       path, i);
    int shown = k->name_len > 100 ? 100 : (int)k->name_len;
    uint32_t kind = ep_get_u32(c);
    if (!c->bad && kind >= GGUF_N_KINDS)
        return ep_fail(err, EP_ERR_INVALID, "%s: key %.*s: unknown kind %" PRIu32, path, shown,
                       k->name, kind);
    k->kind = (gguf_kind)kind;
    k->n = 1;
    if (!c->bad && kind == GGUF_ARRAY) {
        ep_status s = parse_array(c, k, path, err);
        if (s != EP_AGAIN && s != EP_OK) return s;
    } else if (!c->bad && kind == GGUF_STRING) {
        k->data = (const uint8_t *)get_string(c, &k->bytes);
    } else if (!c->bad) {
        k->bytes = kinds[kind].bytes;
        k->data = ep_get_bytes(c, k->bytes);
    }
    if (c->bad)
        return ep_fail(err, EP_ERR_INVALID, "%s: key %.*s runs past the end of the file", path,
                       shown, k->name);
    return EP_OK;
}

static int compare_names(const char *a, size_t a_len, const char *b, size_t b_len)
{
    size_t n = a_len < b_len ? a_len : b_len;
    int c = memcmp(a, b, n);
    return c != 0 ? c : (a_len > b_len) - (a_len < b_len);
}

static int compare_keys(const void *a, const void *b)
{
    const gguf_key *x = *(const gguf_key *const *)a, *y = *(const gguf_key *const *)b;
    return compare_names(x->name, x->name_len, y->name, y->name_len);
}

static ep_status sort_keys(gguf_part *p, ep_err *err)
{
    p->keys_sorted = ep_alloc(p->n_keys * sizeof(*p->keys_sorted));
    if (p->keys_sorted == NULL)
        return ep_fail(err, EP_ERR_NOMEM, "%s: no memory for its index", p->path);
    for (size_t i = 0; i < p->n_keys; i++)
        p->keys_sorted[i] = &p->keys[i];
    qsort(p->keys_sorted, p->n_keys, sizeof(*p->keys_sorted), compare_keys);
    for (size_t i = 1; i < p->n_keys; i++)
        if (compare_keys(&p->keys_sorted[i - 1], &p->keys_sorted[i]) == 0)
            return ep_fail(
                err, EP_ERR_INVALID, "%s: key %.*s is there twice", p->path,
                (int)(p->keys_sorted[i]->name_len > 100 ? 100 : p->keys_sorted[i]->name_len),
                p->keys_sorted[i]->name);
    return EP_OK;
}

const gguf_key *gguf_part_find(const gguf_part *p, const char *name)
{
    size_t lo = 0, hi = p->n_keys, len = strlen(name);
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        const gguf_key *k = p->keys_sorted[mid];
        int c = compare_names(name, len, k->name, k->name_len);
        if (c == 0) return k;
        if (c < 0)
            hi = mid;
        else
            lo = mid + 1;
    }
    return NULL;
}

static ep_status parse_keys(gguf_part *p, ep_cursor *c, uint64_t n, ep_err *err)
{
    if (n > ep_cursor_left(c) / MIN_KEY_BYTES)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: %" PRIu64 " keys do not fit in a file of %zu bytes", p->path, n,
                       p->size);
    if (n > MAX_KEYS)
        return ep_fail(err, EP_ERR_TOO_LARGE, "%s: %" PRIu64 " keys are more than the limit of %d",
                       p->path, n, MAX_KEYS);
    p->keys = ep_calloc((size_t)n, sizeof(*p->keys));
    if (p->keys == NULL) return ep_fail(err, EP_ERR_NOMEM, "%s: no memory for its index", p->path);
    p->n_keys = (size_t)n;
    for (size_t i = 0; i < p->n_keys; i++) {
        ep_status s = parse_key(c, &p->keys[i], i, p->path, err);
        if (s != EP_OK) return s;
    }
    return sort_keys(p, err);
}

/* ---- tensors ------------------------------------------------------------------------------------
 */

/* Bytes of a tensor from its shape: every product checked, rows whole numbers of blocks. */
static ep_status size_tensor(gguf_tensor *g, const char *path, ep_err *err)
{
    model_tensor *t = &g->t;
    int shown = (int)g->name_len;
    char shape[128];
    uint32_t block, block_bytes;
    if (!gguf_type_size(t->type, &block, &block_bytes)) {
        const char *old = gguf_type_name(t->type);
        return ep_fail(err, EP_ERR_UNSUPPORTED, "%s: tensor %.*s: type %" PRIu32 " %s%s%s", path,
                       shown, t->name, (uint32_t)t->type, old ? "(" : "is unknown", old ? old : "",
                       old ? ") was removed from the format" : "");
    }
    uint64_t elements = 1, bytes;
    for (int i = 0; i < 4; i++)
        if (t->ne[i] == 0 || __builtin_mul_overflow(elements, t->ne[i], &elements))
            return ep_fail(err, EP_ERR_INVALID, "%s: tensor %.*s: impossible shape %s", path, shown,
                           t->name, gguf_shape_text(shape, sizeof(shape), t->n_dims, t->ne));
    if (t->ne[0] % block != 0)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: tensor %.*s: rows of %" PRIu64
                       " are no multiple of %s's block of %" PRIu32,
                       path, shown, t->name, t->ne[0], gguf_type_name(t->type), block);
    if (__builtin_mul_overflow(elements / block, (uint64_t)block_bytes, &bytes) || bytes > SIZE_MAX)
        return ep_fail(err, EP_ERR_INVALID, "%s: tensor %.*s: impossible shape %s", path, shown,
                       t->name, gguf_shape_text(shape, sizeof(shape), t->n_dims, t->ne));
    t->bytes = (size_t)bytes;
    return EP_OK;
}

static ep_status parse_tensor(gguf_part *p, ep_cursor *c, gguf_tensor *g, size_t i, ep_err *err)
{
    model_tensor *t = &g->t;
    t->name = get_string(c, &g->name_len);
    if (t->name == NULL)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: the name of tensor %zu runs past the end of the file", p->path, i);
    if (g->name_len == 0 || g->name_len > MAX_NAME || !name_is_clean(t->name, g->name_len))
        return ep_fail(
            err, EP_ERR_INVALID,
            "%s: the name of tensor %zu is empty, longer than %d or holds control characters",
            p->path, i, MAX_NAME);
    uint32_t n_dims = ep_get_u32(c);
    if (!c->bad && (n_dims < 1 || n_dims > 4))
        return ep_fail(err, EP_ERR_INVALID, "%s: tensor %.*s: %" PRIu32 " dimensions", p->path,
                       (int)g->name_len, t->name, n_dims);
    t->n_dims = (int)n_dims;
    for (uint32_t d = 0; d < 4; d++)
        t->ne[d] = !c->bad && d < n_dims ? ep_get_u64(c) : 1;
    t->type = (int)ep_get_u32(c);
    g->offset = ep_get_u64(c);
    if (c->bad)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: tensor %.*s: its entry runs past the end of the file", p->path,
                       (int)g->name_len, t->name);
    if (g->offset % p->alignment != 0)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: tensor %.*s: offset %" PRIu64 " is not aligned to %" PRIu64, p->path,
                       (int)g->name_len, t->name, g->offset, p->alignment);
    return size_tensor(g, p->path, err);
}

static int compare_offsets(const void *a, const void *b)
{
    const gguf_tensor *x = *(const gguf_tensor *const *)a, *y = *(const gguf_tensor *const *)b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* Each tensor inside the file, and none over another: two names for the same bytes is no real file.
 */
static ep_status place_tensors(gguf_part *p, ep_err *err)
{
    size_t room = p->size - p->data_start;
    for (size_t i = 0; i < p->n_tensors; i++) {
        gguf_tensor *g = &p->tensors[i];
        if (g->offset > room || g->t.bytes > room - (size_t)g->offset)
            return ep_fail(err, EP_ERR_INVALID,
                           "%s: tensor %.*s: its %zu bytes at offset %" PRIu64
                           " reach past the end of the file (%zu bytes of data): truncated?",
                           p->path, (int)g->name_len, g->t.name, g->t.bytes, g->offset, room);
        g->t.data = p->map + p->data_start + (size_t)g->offset;
    }
    const gguf_tensor **order = ep_alloc(p->n_tensors * sizeof(*order));
    if (order == NULL) return ep_fail(err, EP_ERR_NOMEM, "%s: no memory for its index", p->path);
    for (size_t i = 0; i < p->n_tensors; i++)
        order[i] = &p->tensors[i];
    qsort(order, p->n_tensors, sizeof(*order), compare_offsets);
    ep_status status = EP_OK;
    for (size_t i = 1; i < p->n_tensors && status == EP_OK; i++) {
        const gguf_tensor *a = order[i - 1], *b = order[i];
        if (b->offset - a->offset < a->t.bytes)
            status = ep_fail(err, EP_ERR_INVALID, "%s: tensors %.*s and %.*s overlap", p->path,
                             (int)a->name_len, a->t.name, (int)b->name_len, b->t.name);
    }
    ep_free(order);
    return status;
}

static ep_status parse_tensors(gguf_part *p, ep_cursor *c, uint64_t n, ep_err *err)
{
    if (n > ep_cursor_left(c) / MIN_INFO_BYTES)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: %" PRIu64 " tensors do not fit in a file of %zu bytes", p->path, n,
                       p->size);
    if (n > MAX_TENSORS)
        return ep_fail(err, EP_ERR_TOO_LARGE,
                       "%s: %" PRIu64 " tensors are more than the limit of %u", p->path, n,
                       MAX_TENSORS);
    p->tensors = ep_calloc((size_t)n, sizeof(*p->tensors));
    if (p->tensors == NULL)
        return ep_fail(err, EP_ERR_NOMEM, "%s: no memory for its index", p->path);
    p->n_tensors = (size_t)n;
    for (size_t i = 0; i < p->n_tensors; i++) {
        ep_status s = parse_tensor(p, c, &p->tensors[i], i, err);
        if (s != EP_OK) return s;
    }
    p->directory_end = (size_t)(c->at - p->map);
    size_t gap = (size_t)(p->alignment - p->directory_end % p->alignment) % (size_t)p->alignment;
    if (gap > p->size - p->directory_end) {
        if (n > 0)
            return ep_fail(err, EP_ERR_INVALID,
                           "%s: the file ends before its tensor data: truncated?", p->path);
        gap = p->size - p->directory_end; /* a file of keys only needs no padding */
    }
    p->data_start = p->directory_end + gap;
    return place_tensors(p, err);
}

/* ---- the part -----------------------------------------------------------------------------------
 */

static ep_status parse_alignment(gguf_part *p, ep_err *err)
{
    p->alignment = 32;
    const gguf_key *k = gguf_part_find(p, "general.alignment");
    if (k == NULL) return EP_OK;
    bool negative;
    uint64_t v;
    if (k->kind == GGUF_ARRAY || k->kind == GGUF_BOOL || !gguf_int_at(k, 0, &negative, &v) ||
        negative)
        return ep_fail(err, EP_ERR_INVALID, "%s: general.alignment is no number", p->path);
    if (v < 8 || v > MAX_ALIGNMENT || (v & (v - 1)) != 0)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: general.alignment %" PRIu64 " is no power of two from 8 to %u", p->path,
                       v, MAX_ALIGNMENT);
    p->alignment = v;
    return EP_OK;
}

static ep_status parse_header(gguf_part *p, ep_cursor *c, ep_err *err)
{
    const uint8_t *magic = ep_get_bytes(c, 4);
    if (magic == NULL || memcmp(magic, "GGUF", 4) != 0)
        return ep_fail(err, EP_ERR_INVALID, "%s: not a GGUF file", p->path);
    p->version = ep_get_u32(c);
    if (c->bad) return ep_fail(err, EP_ERR_INVALID, "%s: the file ends inside its header", p->path);
    if ((p->version & 0xffff) == 0 && p->version != 0)
        return ep_fail(err, EP_ERR_UNSUPPORTED, "%s: a big-endian GGUF file is not supported",
                       p->path);
    if (p->version == 1)
        return ep_fail(err, EP_ERR_UNSUPPORTED,
                       "%s: GGUF version 1 is not supported (versions 2 and 3 are)", p->path);
    if (p->version != 2 && p->version != 3)
        return ep_fail(err, EP_ERR_UNSUPPORTED,
                       "%s: GGUF version %" PRIu32 " is not known (versions 2 and 3 are)", p->path,
                       p->version);
    return EP_OK;
}

ep_status gguf_part_parse(gguf_part *p, ep_err *err)
{
    ep_cursor c = ep_cursor_make(p->map, p->size);
    ep_status s = parse_header(p, &c, err);
    if (s != EP_OK) return s;
    uint64_t n_tensors = ep_get_u64(&c), n_keys = ep_get_u64(&c);
    if (c.bad) return ep_fail(err, EP_ERR_INVALID, "%s: the file ends inside its header", p->path);
    s = parse_keys(p, &c, n_keys, err);
    if (s == EP_OK) s = parse_alignment(p, err);
    if (s == EP_OK) s = parse_tensors(p, &c, n_tensors, err);
    return s;
}

void gguf_part_fini(gguf_part *p)
{
    for (size_t i = 0; p->keys != NULL && i < p->n_keys; i++)
        ep_free(p->keys[i].marks);
    ep_free(p->keys);
    ep_free(p->keys_sorted);
    ep_free(p->tensors);
    p->keys = NULL;
    p->keys_sorted = NULL;
    p->tensors = NULL;
    p->n_keys = p->n_tensors = 0;
}
