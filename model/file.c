/*
 * A model file: one GGUF, or the parts of a split one, as one set of keys and tensors.
 *
 * Keys come from the first part; the others only say which part they are. Part names follow the
 * pattern NAME-00001-of-00003.gguf, and every part's own numbers must agree with its name. Tensor
 * names are unique over all parts and found by binary search.
 *
 * The map lives as long as the file; nothing of it is copied but the tensor names, which callers
 * want as C strings. A file cut short by someone else while it is mapped is not survived (SIGBUS).
 */
#include "model/file.h"

#include <xxhash.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct model_file {
    gguf_part *parts;
    size_t n_parts;
    model_tensor *tensors; /* [n_tensors], parts in order, file order within */
    const model_tensor **sorted;
    size_t n_tensors;
    char *names; /* every tensor name, NUL-terminated */
};

/* ---- opening ------------------------------------------------------------------------------------
 */

static void part_close(gguf_part *p)
{
    gguf_part_fini(p);
    if (p->mapped) munmap((void *)(uintptr_t)p->map, p->size);
    ep_free(p->path);
    memset(p, 0, sizeof(*p));
}

static ep_status part_map(gguf_part *p, const char *path, ep_err *err)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return ep_fail(err, EP_ERR_IO, "%s: %s", path, strerror(errno));
    ep_status status = EP_OK;
    if (fstat(fd, &st) != 0)
        status = ep_fail(err, EP_ERR_IO, "%s: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        status = ep_fail(err, EP_ERR_INVALID, "%s: not a regular file", path);
    else if (st.st_size < 4)
        status = ep_fail(err, EP_ERR_INVALID, "%s: not a GGUF file (%lld bytes)", path,
                         (long long)st.st_size);
    if (status == EP_OK) {
        void *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED) {
            status = ep_fail(err, EP_ERR_IO, "%s: cannot map it: %s", path, strerror(errno));
        } else {
            p->map = map;
            p->size = (size_t)st.st_size;
            p->mapped = true;
        }
    }
    close(fd);
    return status;
}

static ep_status part_open(gguf_part *p, const char *path, ep_err *err)
{
    ep_status status = part_map(p, path, err);
    if (status != EP_OK) return status;
    p->path = ep_strdup(path);
    if (p->path == NULL) status = ep_fail(err, EP_ERR_NOMEM, "%s: no memory", path);
    if (status == EP_OK) status = gguf_part_parse(p, err);
    if (status != EP_OK) part_close(p);
    return status;
}

/* A split.* key: absent gives *out unchanged. */
static ep_status split_number(const gguf_part *p, const char *key, uint64_t *out, ep_err *err)
{
    const gguf_key *k = gguf_part_find(p, key);
    bool negative;
    uint64_t v;
    if (k == NULL) return EP_OK;
    if (k->kind == GGUF_ARRAY || !gguf_int_at(k, 0, &negative, &v) || negative)
        return ep_fail(err, EP_ERR_INVALID, "%s: %s is no number", p->path, key);
    *out = v;
    return EP_OK;
}

/* "DIR/NAME" of a path "DIR/NAME-0000i-of-0000n.gguf", NULL (and *nomem) when it has another form.
 */
static char *split_prefix(const char *path, uint64_t no, uint64_t count, bool *nomem)
{
    char tail[64];
    size_t len = strlen(path);
    size_t n =
        (size_t)snprintf(tail, sizeof(tail), "-%05" PRIu64 "-of-%05" PRIu64 ".gguf", no + 1, count);
    *nomem = false;
    if (len <= n || strcmp(path + len - n, tail) != 0) return NULL;
    char *prefix = ep_strdup(path);
    if (prefix == NULL)
        *nomem = true;
    else
        prefix[len - n] = '\0';
    return prefix;
}

/* Opens part i of a split file and checks that it says so itself. */
static ep_status open_sibling(model_file *f, const char *prefix, size_t i, size_t count,
                              ep_err *err)
{
    char *path = ep_strfmt("%s-%05zu-of-%05zu.gguf", prefix, i + 1, count);
    if (path == NULL) return ep_fail(err, EP_ERR_NOMEM, "%s: no memory", prefix);
    ep_status status;
    if (access(path, F_OK) != 0) {
        status = ep_fail(err, EP_ERR_IO, "%s: part %zu of %zu is missing (%s)", path, i + 1, count,
                         strerror(errno));
    } else {
        status = part_open(&f->parts[i], path, err);
    }
    ep_free(path);
    if (status != EP_OK) return status;
    f->n_parts = i + 1;
    uint64_t no = UINT64_MAX, n = 0;
    status = split_number(&f->parts[i], "split.no", &no, err);
    if (status == EP_OK) status = split_number(&f->parts[i], "split.count", &n, err);
    if (status == EP_OK && (no != i || n != count))
        status = ep_fail(err, EP_ERR_INVALID,
                         "%s: is not part %zu of %zu: its split.no is %" PRId64
                         " (from 0) and its split.count %" PRIu64,
                         f->parts[i].path, i + 1, count, (int64_t)no, n);
    return status;
}

/* f->parts[0] is the part that was named; replaces it by all parts in order. */
static ep_status open_siblings(model_file *f, uint64_t no, uint64_t count, ep_err *err)
{
    gguf_part *named = &f->parts[0];
    if (!named->mapped)
        return ep_fail(err, EP_ERR_UNSUPPORTED, "%s: is one part of a split file", named->path);
    if (count > 65535 || no >= count)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: split.no %" PRIu64 " of split.count %" PRIu64 " is impossible",
                       named->path, no, count);
    bool nomem;
    char *prefix = split_prefix(named->path, no, count, &nomem);
    if (prefix == NULL && !nomem)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: is part %" PRIu64 " of %" PRIu64 " of a split file, but is not named "
                       "NAME-%05" PRIu64 "-of-%05" PRIu64 ".gguf, so its siblings cannot be found",
                       named->path, no + 1, count, no + 1, count);
    gguf_part *parts = prefix != NULL ? ep_calloc((size_t)count, sizeof(*parts)) : NULL;
    if (parts == NULL) {
        ep_status status = ep_fail(err, EP_ERR_NOMEM, "%s: no memory", named->path);
        ep_free(prefix);
        return status;
    }
    part_close(named);
    ep_free(f->parts);
    f->parts = parts;
    f->n_parts = 0;
    ep_status status = EP_OK;
    for (size_t i = 0; i < count && status == EP_OK; i++)
        status = open_sibling(f, prefix, i, (size_t)count, err);
    ep_free(prefix);
    return status;
}

/* split.tensors.count, where given, is the sum over all parts. */
static ep_status check_total(const model_file *f, size_t total, ep_err *err)
{
    uint64_t said = total;
    ep_status status = split_number(&f->parts[0], "split.tensors.count", &said, err);
    if (status == EP_OK && said != total)
        status = ep_fail(err, EP_ERR_INVALID,
                         "%s: split.tensors.count is %" PRIu64 ", but the parts hold %zu tensors",
                         f->parts[0].path, said, total);
    return status;
}

static int compare_tensors(const void *a, const void *b)
{
    const model_tensor *x = *(const model_tensor *const *)a, *y = *(const model_tensor *const *)b;
    return strcmp(x->name, y->name);
}

/* One array of tensors and one index over all parts, with names as C strings. */
static ep_status index_tensors(model_file *f, ep_err *err)
{
    size_t total = 0, letters = 0;
    for (size_t i = 0; i < f->n_parts; i++) {
        total += f->parts[i].n_tensors;
        for (size_t j = 0; j < f->parts[i].n_tensors; j++)
            letters += f->parts[i].tensors[j].name_len + 1;
    }
    ep_status status = check_total(f, total, err);
    if (status != EP_OK) return status;
    f->tensors = ep_calloc(total, sizeof(*f->tensors));
    f->sorted = ep_alloc(total * sizeof(*f->sorted));
    f->names = ep_alloc(letters);
    if (f->tensors == NULL || f->sorted == NULL || f->names == NULL)
        return ep_fail(err, EP_ERR_NOMEM, "%s: no memory for its index", f->parts[0].path);
    char *at = f->names;
    for (size_t i = 0; i < f->n_parts; i++) {
        for (size_t j = 0; j < f->parts[i].n_tensors; j++) {
            const gguf_tensor *g = &f->parts[i].tensors[j];
            memcpy(at, g->t.name, g->name_len);
            at[g->name_len] = '\0';
            f->tensors[f->n_tensors] = g->t;
            f->tensors[f->n_tensors].name = at;
            f->sorted[f->n_tensors] = &f->tensors[f->n_tensors];
            f->n_tensors++;
            at += g->name_len + 1;
        }
    }
    qsort(f->sorted, f->n_tensors, sizeof(*f->sorted), compare_tensors);
    for (size_t i = 1; i < f->n_tensors; i++)
        if (strcmp(f->sorted[i - 1]->name, f->sorted[i]->name) == 0)
            return ep_fail(err, EP_ERR_INVALID, "%s: tensor %s is there twice", f->parts[0].path,
                           f->sorted[i]->name);
    return EP_OK;
}

/* path or bytes, whichever is given. */
static ep_status file_open(model_file **out, const char *path, const void *data, size_t n,
                           ep_err *err)
{
    model_file *f = ep_calloc(1, sizeof(*f));
    gguf_part *parts = ep_calloc(1, sizeof(*parts));
    ep_status status = EP_OK;
    if (f == NULL || parts == NULL) {
        ep_free(f);
        ep_free(parts);
        return ep_fail(err, EP_ERR_NOMEM, "%s: no memory", path != NULL ? path : "memory");
    }
    f->parts = parts;
    if (path != NULL) {
        status = part_open(&parts[0], path, err);
    } else {
        parts[0].map = data;
        parts[0].size = n;
        parts[0].path = ep_strdup("memory");
        if (parts[0].path == NULL) status = ep_fail(err, EP_ERR_NOMEM, "memory: no memory");
        f->n_parts = 1;
        if (status == EP_OK) status = gguf_part_parse(&parts[0], err);
    }
    if (status != EP_OK) goto fail;
    f->n_parts = 1;
    uint64_t no = 0, count = 1;
    status = split_number(&parts[0], "split.no", &no, err);
    if (status == EP_OK) status = split_number(&parts[0], "split.count", &count, err);
    if (status == EP_OK && count > 1) status = open_siblings(f, no, count, err);
    if (status == EP_OK) status = index_tensors(f, err);
    if (status != EP_OK) goto fail;
    *out = f;
    return EP_OK;
fail:
    model_file_close(f);
    return status;
}

ep_status model_file_open(model_file **out, const char *path, ep_err *err)
{
    return file_open(out, path, NULL, 0, err);
}

ep_status model_file_open_bytes(model_file **out, const void *data, size_t n, ep_err *err)
{
    return file_open(out, NULL, data, n, err);
}

void model_file_close(model_file *f)
{
    if (f == NULL) return;
    for (size_t i = 0; i < f->n_parts; i++)
        part_close(&f->parts[i]);
    ep_free(f->parts);
    ep_free(f->tensors);
    ep_free(f->sorted);
    ep_free(f->names);
    ep_free(f);
}

/* ---- looking ------------------------------------------------------------------------------------
 */

size_t model_file_n_tensors(const model_file *f)
{
    return f->n_tensors;
}

const model_tensor *model_file_tensor(const model_file *f, size_t i)
{
    return i < f->n_tensors ? &f->tensors[i] : NULL;
}

const model_tensor *model_file_find(const model_file *f, const char *name)
{
    size_t lo = 0, hi = f->n_tensors;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        int c = strcmp(name, f->sorted[mid]->name);
        if (c == 0) return f->sorted[mid];
        if (c < 0)
            hi = mid;
        else
            lo = mid + 1;
    }
    return NULL;
}

size_t model_file_n_parts(const model_file *f)
{
    return f->n_parts;
}

const gguf_part *model_file_part(const model_file *f, size_t i)
{
    return i < f->n_parts ? &f->parts[i] : NULL;
}

const char *model_file_path(const model_file *f)
{
    return f->parts[0].path;
}

const gguf_key *model_file_key(const model_file *f, const char *name)
{
    return gguf_part_find(&f->parts[0], name);
}

uint64_t model_sample(const uint8_t *data, size_t n, uint64_t h)
{
    enum { N_SAMPLES = 16, SAMPLE = 4096 };
    size_t step = n / N_SAMPLES + 1;
    for (size_t at = 0; at < n; at += step) {
        size_t left = n - at, take = step < SAMPLE ? step : SAMPLE;
        h = XXH3_64bits_withSeed(data + at, take < left ? take : left, h);
    }
    return h;
}

uint64_t model_file_digest(const model_file *f)
{
    uint64_t h = 0;
    for (size_t i = 0; i < f->n_parts; i++) {
        const gguf_part *p = &f->parts[i];
        h = XXH3_64bits_withSeed(p->map, p->directory_end, h);
        uint8_t size[8];
        for (int b = 0; b < 8; b++)
            size[b] = (uint8_t)((uint64_t)p->size >> (8 * b));
        h = XXH3_64bits_withSeed(size, sizeof(size), h);
        h = model_sample(p->map + p->data_start, p->size - p->data_start, h);
    }
    return h;
}

/* ---- metadata -----------------------------------------------------------------------------------
 */

static ep_status wrong_kind(const model_file *f, const gguf_key *k, const char *key,
                            const char *want, ep_err *err)
{
    return ep_fail(err, EP_ERR_INVALID, "%s: key %s is of kind %s, expected %s", model_file_path(f),
                   key, gguf_kind_name((int)k->kind), want);
}

ep_status model_file_u64(const model_file *f, const char *key, uint64_t *out, ep_err *err)
{
    const gguf_key *k = model_file_key(f, key);
    bool negative;
    uint64_t v;
    if (k == NULL) return EP_AGAIN;
    if (k->kind == GGUF_ARRAY || k->kind == GGUF_BOOL || !gguf_int_at(k, 0, &negative, &v))
        return wrong_kind(f, k, key, "an integer", err);
    if (negative)
        return ep_fail(err, EP_ERR_INVALID, "%s: key %s is negative", model_file_path(f), key);
    *out = v;
    return EP_OK;
}

ep_status model_file_f64(const model_file *f, const char *key, double *out, ep_err *err)
{
    const gguf_key *k = model_file_key(f, key);
    double v;
    if (k == NULL) return EP_AGAIN;
    if (k->kind == GGUF_ARRAY || !gguf_float_at(k, 0, &v))
        return wrong_kind(f, k, key, "a number", err);
    if (!isfinite(v))
        return ep_fail(err, EP_ERR_INVALID, "%s: key %s is not finite", model_file_path(f), key);
    *out = v;
    return EP_OK;
}

ep_status model_file_bool(const model_file *f, const char *key, bool *out, ep_err *err)
{
    const gguf_key *k = model_file_key(f, key);
    if (k == NULL) return EP_AGAIN;
    if (k->kind != GGUF_BOOL) return wrong_kind(f, k, key, "a boolean", err);
    if (k->data[0] > 1)
        return ep_fail(err, EP_ERR_INVALID, "%s: key %s is %d, neither true nor false",
                       model_file_path(f), key, k->data[0]);
    *out = k->data[0] == 1;
    return EP_OK;
}

ep_status model_file_str(const model_file *f, const char *key, const char **s, size_t *n,
                         ep_err *err)
{
    const gguf_key *k = model_file_key(f, key);
    if (k == NULL) return EP_AGAIN;
    if (k->kind != GGUF_STRING) return wrong_kind(f, k, key, "a string", err);
    *s = (const char *)k->data;
    *n = k->bytes;
    return EP_OK;
}

/* An array under this name, or NULL. */
static const gguf_key *array_find(const model_file *f, const char *key)
{
    const gguf_key *k = model_file_key(f, key);
    return k != NULL && k->kind == GGUF_ARRAY ? k : NULL;
}

size_t model_file_arr_len(const model_file *f, const char *key)
{
    const gguf_key *k = array_find(f, key);
    return k != NULL ? (size_t)k->n : 0;
}

ep_status model_file_arr_str(const model_file *f, const char *key, size_t i, const char **s,
                             size_t *n)
{
    const gguf_key *k = array_find(f, key);
    return k != NULL && gguf_string_at(k, i, s, n) ? EP_OK : EP_ERR_INVALID;
}

ep_status model_file_arr_i64(const model_file *f, const char *key, size_t i, int64_t *out)
{
    const gguf_key *k = array_find(f, key);
    bool negative;
    uint64_t v;
    if (k == NULL || !gguf_int_at(k, i, &negative, &v)) return EP_ERR_INVALID;
    if (v > (uint64_t)INT64_MAX + negative) return EP_ERR_INVALID;
    *out = !negative ? (int64_t)v : v > INT64_MAX ? INT64_MIN : -(int64_t)v;
    return EP_OK;
}

ep_status model_file_arr_f64(const model_file *f, const char *key, size_t i, double *out)
{
    const gguf_key *k = array_find(f, key);
    return k != NULL && gguf_float_at(k, i, out) ? EP_OK : EP_ERR_INVALID;
}
