/*
 * NumPy's .npy format, versions 1 to 3, two dimensions, C order. NumPy has no bfloat16 of its own:
 * files made with ml_dtypes say "<V2" (or "|V2"), and raw bits are often kept as "<u2"; both are
 * read as bfloat16 and written back with the same description.
 */
#include "daemon/ctl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_HEADER = 1 << 16 };
#define MAX_VALUE_BYTES ((uint64_t)1 << 34)

static bool refuse(const char *path, const char *why)
{
    fprintf(stderr, "moectl: %s: %s\n", path, why);
    return false;
}

/* The value after 'key': in the header's Python dictionary, NULL if absent. */
static const char *value_of(const char *header, const char *key)
{
    char quoted[32];
    snprintf(quoted, sizeof(quoted), "'%s'", key);
    const char *at = strstr(header, quoted);
    if (at == NULL) return NULL;
    at += strlen(quoted);
    at += strspn(at, " ");
    if (*at != ':') return NULL;
    at++;
    return at + strspn(at, " ");
}

static bool parse_header(const char *path, const char *header, ctl_array *out)
{
    const char *descr = value_of(header, "descr"), *order = value_of(header, "fortran_order"),
               *shape = value_of(header, "shape");
    if (descr == NULL || order == NULL || shape == NULL)
        return refuse(path, "its header lacks a key");
    if (strncmp(order, "False", 5) != 0) return refuse(path, "it is in Fortran order");
    static const char *const known[] = {"<f4", "<V2", "|V2", "<u2"};
    for (size_t i = 0; i < 4; i++)
        if (descr[0] == '\'' && strncmp(descr + 1, known[i], 3) == 0 && descr[4] == '\'') {
            snprintf(out->descr, sizeof(out->descr), "%s", known[i]);
            out->bf16 = i > 0;
        }
    if (out->descr[0] == '\0')
        return refuse(path, "its values are neither float32 (<f4) nor bfloat16 (<V2, <u2)");
    char *end;
    if (*shape != '(') return refuse(path, "its shape is not [rows, hidden]");
    out->rows = strtoull(shape + 1, &end, 10);
    if (end == shape + 1 || *end != ',') return refuse(path, "its shape is not [rows, hidden]");
    const char *second = end + 1;
    out->columns = strtoull(second, &end, 10);
    bool two = end != second;
    if (*end == ',') end++; /* "(3, 64,)" is two dimensions as well */
    end += strspn(end, " ");
    if (!two || *end != ')' || out->rows == 0 || out->columns == 0)
        return refuse(path, "its shape is not [rows, hidden]");
    return true;
}

static bool read_header(FILE *f, const char *path, ctl_array *out)
{
    uint8_t head[12];
    size_t len, fixed = 10;
    if (fread(head, 1, 10, f) != 10 || memcmp(head, "\x93NUMPY", 6) != 0)
        return refuse(path, "not a .npy file");
    len = (size_t)head[8] | (size_t)head[9] << 8;
    if (head[6] >= 2) {
        if (fread(head + 10, 1, 2, f) != 2) return refuse(path, "truncated");
        len |= (size_t)head[10] << 16 | (size_t)head[11] << 24;
        fixed = 12;
    }
    if (head[6] < 1 || head[6] > 3 || len > MAX_HEADER - fixed)
        return refuse(path, "unknown .npy version");
    char *header = ep_calloc(1, len + 1);
    if (header == NULL) return refuse(path, "out of memory");
    bool ok = fread(header, 1, len, f) == len ? parse_header(path, header, out)
                                              : refuse(path, "truncated");
    ep_free(header);
    return ok;
}

bool ctl_npy_read(const char *path, ctl_array *out)
{
    FILE *f = fopen(path, "rb");
    if (f == NULL) return refuse(path, strerror(errno));
    bool ok = read_header(f, path, out);
    uint64_t bytes = 0;
    if (ok &&
        (__builtin_mul_overflow(out->rows, out->columns, &bytes) ||
         __builtin_mul_overflow(bytes, out->bf16 ? 2u : 4u, &bytes) || bytes > MAX_VALUE_BYTES))
        ok = refuse(path, "too large");
    if (ok) {
        out->bytes = (size_t)bytes;
        out->values = ep_alloc(out->bytes);
        if (out->values == NULL)
            ok = refuse(path, "out of memory");
        else if (fread(out->values, 1, out->bytes, f) != out->bytes)
            ok = refuse(path, "truncated: fewer values than its shape says");
    }
    fclose(f);
    return ok;
}

bool ctl_npy_write(const char *path, const ctl_array *a)
{
    char header[256];
    int n = snprintf(header, sizeof(header),
                     "{'descr': '%s', 'fortran_order': False, 'shape': (%llu, %llu), }", a->descr,
                     (unsigned long long)a->rows, (unsigned long long)a->columns);
    size_t len = ((size_t)n + 1 + 10 + 63) / 64 * 64 - 10; /* data starts at a multiple of 64 */
    memset(header + n, ' ', len - (size_t)n);
    header[len - 1] = '\n';
    const uint8_t head[10] = {0x93, 'N', 'U', 'M',          'P',
                              'Y',  1,   0,   (uint8_t)len, (uint8_t)(len >> 8)};
    FILE *f = fopen(path, "wb");
    if (f == NULL) return refuse(path, strerror(errno));
    bool ok = fwrite(head, 1, 10, f) == 10 && fwrite(header, 1, len, f) == len &&
              fwrite(a->values, 1, a->bytes, f) == a->bytes;
    if (fclose(f) != 0 || !ok) return refuse(path, "cannot be written");
    return true;
}
