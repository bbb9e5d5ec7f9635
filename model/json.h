#ifndef EP_MODEL_JSON_H
#define EP_MODEL_JSON_H
/*
 * json: the one door of model/ to the JSON library, for headers, indexes and configurations of
 * checkpoints. Strict: RFC 8259, valid UTF-8, no NUL in strings, no key twice, nothing after the
 * value.
 *
 * A document owns its values; what the functions below return is borrowed from it. One thread at a
 * time.
 */
#include "base/base.h"

typedef struct model_json model_json;

/* `where` stands before ": line L, column C: ..." in err. The value must be an object or an array.
 */
ep_status model_json_parse(model_json **out, const void *text, size_t n, const char *where,
                           ep_err *err);
/* The same of a regular file of at most `most` bytes. EP_AGAIN, err untouched, when it is absent.
 */
ep_status model_json_load(model_json **out, const char *path, size_t most, ep_err *err);
/* Only the bytes of such a file, appended. */
ep_status model_json_bytes(ep_buf *out, const char *path, size_t most, ep_err *err);
void model_json_free(model_json *doc);

bool model_json_is_object(const model_json *v);
bool model_json_is_array(const model_json *v);
/* Members of an object, items of an array; 0 of anything else. */
size_t model_json_size(const model_json *v);
/* NULL when absent or null, or when v is no object (or NULL). */
model_json *model_json_member(const model_json *v, const char *key);
model_json *model_json_item(const model_json *v, size_t i);
/* False when v is NULL or of another kind. A whole number is one without fraction and exponent
 * that fits; one that does not is a real. */
bool model_json_int(const model_json *v, int64_t *out);
bool model_json_real(const model_json *v, double *out); /* whole numbers too */
bool model_json_bool(const model_json *v, bool *out);
const char *model_json_str(const model_json *v); /* UTF-8, NULL: no string */

/* Walks an object: *at starts as NULL; false at the end. */
bool model_json_next(model_json *object, void **at, const char **key, model_json **value);

#endif
