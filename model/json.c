/*
 * JSON for model/, on jansson. The library is strict where it matters (numbers out of range, lone
 * surrogates, bad UTF-8 and trailing text are faults); keys that are there twice are made one too,
 * because two readers of such a file would see two checkpoints. The type that callers see is never
 * defined: it stands for json_t, so that jansson's names stay behind this door.
 *
 * Its memory comes from malloc: changing that is a setting of the whole process, which others use
 * too.
 */
#include "model/json.h"

#include <jansson.h>

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static json_t *inner(const model_json *v)
{
    return (json_t *)(uintptr_t)v;
}

static bool fits(const char *digits, size_t n, bool negative)
{
    const char *most = negative ? "9223372036854775808" : "9223372036854775807";
    return n < 19 || (n == 19 && memcmp(digits, most, 19) <= 0);
}

/* Whole numbers that do not fit become reals of as many letters, so that places in messages stay
 * true: the last two digits make room for an exponent. */
static void loosen(char *text, size_t n)
{
    bool in_string = false;
    for (size_t i = 0; i < n; i++) {
        if (text[i] == '"') in_string = !in_string;
        if (in_string && text[i] == '\\') i++;
        if (in_string || text[i] < '0' || text[i] > '9') continue;
        size_t from = i, digits = 0;
        for (; i < n && text[i] != '\0' && strchr("0123456789+-.eE", text[i]) != NULL; i++)
            digits += text[i] >= '0' && text[i] <= '9';
        if (digits == i - from && !fits(text + from, digits, from > 0 && text[from - 1] == '-'))
            memcpy(text + i - 2, "e2", 2);
        i--;
    }
}

/* jansson refuses a document for a whole number that does not fit, even where nobody asks for it:
 * tokenizer_config.json has 10^30 for "no limit". Such a number is a real here. */
static json_t *load(const void *text, size_t n, json_error_t *e, bool *no_memory)
{
    json_t *doc = json_loadb(n > 0 ? text : "", n, JSON_REJECT_DUPLICATES, e);
    *no_memory = doc == NULL && json_error_code(e) == json_error_out_of_memory;
    if (doc != NULL || json_error_code(e) != json_error_numeric_overflow) return doc;
    char *copy = ep_alloc(n);
    *no_memory = copy == NULL;
    if (copy == NULL) return NULL;
    memcpy(copy, text, n);
    loosen(copy, n);
    doc = json_loadb(copy, n, JSON_REJECT_DUPLICATES, e);
    ep_free(copy);
    return doc;
}

ep_status model_json_parse(model_json **out, const void *text, size_t n, const char *where,
                           ep_err *err)
{
    json_error_t e;
    bool no_memory;
    json_t *doc = load(text, n, &e, &no_memory);
    if (doc == NULL) {
        if (no_memory) return ep_fail(err, EP_ERR_NOMEM, "%s: no memory for its JSON", where);
        for (char *c = e.text; *c != '\0'; c++)
            if ((unsigned char)*c < 0x20 || *c == 0x7f) *c = '?';
        return ep_fail(err, EP_ERR_INVALID, "%s: line %d, column %d: %s", where, e.line, e.column,
                       e.text);
    }
    *out = (model_json *)doc;
    return EP_OK;
}

/* All bytes of an open file; its size may change while it is read, then it is refused. */
static ep_status read_all(int fd, const char *path, size_t most, ep_buf *b, ep_err *err)
{
    struct stat st;
    if (fstat(fd, &st) != 0) return ep_fail(err, EP_ERR_IO, "%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) return ep_fail(err, EP_ERR_INVALID, "%s: not a regular file", path);
    if (st.st_size > (off_t)most)
        return ep_fail(err, EP_ERR_TOO_LARGE, "%s: %lld bytes are more than the limit of %zu", path,
                       (long long)st.st_size, most);
    size_t want = (size_t)st.st_size, end = b->len + want;
    if (ep_buf_reserve(b, want + 1) != EP_OK)
        return ep_fail(err, EP_ERR_NOMEM, "%s: no memory", path);
    while (b->len < end) {
        ssize_t got = read(fd, b->data + b->len, end - b->len);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return ep_fail(err, EP_ERR_IO, "%s: %s", path, strerror(errno));
        if (got == 0) return ep_fail(err, EP_ERR_IO, "%s: became shorter while it was read", path);
        b->len += (size_t)got;
    }
    return EP_OK;
}

ep_status model_json_bytes(ep_buf *out, const char *path, size_t most, ep_err *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 && errno == ENOENT) return EP_AGAIN;
    if (fd < 0) return ep_fail(err, EP_ERR_IO, "%s: %s", path, strerror(errno));
    ep_status status = read_all(fd, path, most, out, err);
    close(fd);
    return status;
}

ep_status model_json_load(model_json **out, const char *path, size_t most, ep_err *err)
{
    ep_buf b = {0};
    ep_status status = model_json_bytes(&b, path, most, err);
    if (status == EP_OK) status = model_json_parse(out, b.data, b.len, path, err);
    ep_buf_fini(&b);
    return status;
}

void model_json_free(model_json *doc)
{
    json_decref(inner(doc));
}

bool model_json_is_object(const model_json *v)
{
    return json_is_object(inner(v));
}

bool model_json_is_array(const model_json *v)
{
    return json_is_array(inner(v));
}

size_t model_json_size(const model_json *v)
{
    return json_is_object(inner(v)) ? json_object_size(inner(v)) : json_array_size(inner(v));
}

model_json *model_json_member(const model_json *v, const char *key)
{
    json_t *member = json_object_get(inner(v), key);
    return json_is_null(member) ? NULL : (model_json *)member;
}

model_json *model_json_item(const model_json *v, size_t i)
{
    return (model_json *)json_array_get(inner(v), i);
}

bool model_json_int(const model_json *v, int64_t *out)
{
    if (!json_is_integer(inner(v))) return false;
    *out = json_integer_value(inner(v));
    return true;
}

bool model_json_real(const model_json *v, double *out)
{
    if (!json_is_number(inner(v))) return false;
    *out = json_number_value(inner(v));
    return true;
}

bool model_json_bool(const model_json *v, bool *out)
{
    if (!json_is_boolean(inner(v))) return false;
    *out = json_is_true(inner(v));
    return true;
}

const char *model_json_str(const model_json *v)
{
    return json_string_value(inner(v));
}

bool model_json_next(model_json *object, void **at, const char **key, model_json **value)
{
    *at = *at == NULL ? json_object_iter(inner(object)) : json_object_iter_next(inner(object), *at);
    if (*at == NULL) return false;
    *key = json_object_iter_key(*at);
    *value = (model_json *)json_object_iter_value(*at);
    return true;
}
