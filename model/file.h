#ifndef EP_MODEL_FILE_H
#define EP_MODEL_FILE_H
/*
 * file: what the sources of model/ share about checkpoints and nobody else sees. gguf.c turns the
 * bytes of one part of a GGUF file into a gguf_part; file.c makes a model_file of one or several
 * parts.
 *
 * Everything points into the mapped bytes; only indexes are allocated, and never more than a small
 * multiple of the bytes they describe.
 */
#include "model/model.h"

typedef enum gguf_kind {
    GGUF_U8,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64,
    GGUF_N_KINDS
} gguf_kind;

#define GGUF_MARK 16 /* every 16th string of an array has its offset kept */

typedef struct gguf_key {
    const char *name; /* in the map, name_len bytes */
    size_t name_len;
    gguf_kind kind, elem; /* elem: of an array */
    uint64_t n;           /* elements of an array, else 1 */
    const uint8_t *data;  /* the value; for a string its text */
    size_t bytes;
    uint64_t *marks; /* string arrays: [ceil(n / GGUF_MARK)] offsets from data */
} gguf_key;

typedef struct gguf_tensor {
    model_tensor t; /* t.name points into the map until file.c copies it */
    size_t name_len;
    uint64_t offset; /* from the part's data section */
} gguf_tensor;

typedef struct gguf_part {
    char *path;
    const uint8_t *map;
    size_t size;
    bool mapped; /* map is ours to unmap */
    uint32_t version;
    uint64_t alignment;
    size_t n_keys, n_tensors;
    gguf_key *keys;               /* [n_keys] in file order */
    const gguf_key **keys_sorted; /* [n_keys] by name */
    gguf_tensor *tensors;         /* [n_tensors] in file order */
    size_t directory_end;         /* header, keys and tensor directory lie before it */
    size_t data_start;
} gguf_part;

/* Reads p->map; path, map and size are set. What was allocated is freed by fini, also on failure.
 */
ep_status gguf_part_parse(gguf_part *p, ep_err *err);
void gguf_part_fini(gguf_part *p);
const gguf_key *gguf_part_find(const gguf_part *p, const char *name);

/* "u32"; "?" when out of range. */
const char *gguf_kind_name(int kind);
/* "Q4_K", "IQ2_XS"; NULL for a number no one knows. Also types that are known but not served. */
const char *gguf_type_name(int type);
/* Weights per block and bytes per block; false for a type of unknown size. */
bool gguf_type_size(int type, uint32_t *block, uint32_t *block_bytes);
/* "[256, 64]", the dimensions that the file gave. Returns buf. */
char *gguf_shape_text(char *buf, size_t n, int n_dims, const uint64_t *ne);

/* Element i of an array of integers or booleans, floats, strings. False: another kind or i outside.
 */
bool gguf_int_at(const gguf_key *k, uint64_t i, bool *negative, uint64_t *magnitude);
bool gguf_float_at(const gguf_key *k, uint64_t i, double *out);
bool gguf_string_at(const gguf_key *k, uint64_t i, const char **s, size_t *n);

/* Appends text in quotes as JSON wants it, any bytes; `most` of them, then "...". */
ep_status model_print_text(ep_buf *out, const char *text, size_t n, size_t most);

size_t model_file_n_parts(const model_file *f);
const gguf_part *model_file_part(const model_file *f, size_t i); /* part 0 has the keys */
const char *model_file_path(const model_file *f);
const gguf_key *model_file_key(const model_file *f, const char *name); /* NULL: absent */
/* Goes on with the XXH3 h over a sample of n bytes of weights, 16 places evenly spaced: two
 * trainings of one model differ in nothing else. */
uint64_t model_sample(const uint8_t *data, size_t n, uint64_t h);
/* XXH3 over header, metadata and directory of every part, the sizes of the files, and a sample of
 * their data. */
uint64_t model_file_digest(const model_file *f);
/* model_forget of bytes of this file. */
void model_file_forget(const model_file *f, const void *p, size_t bytes);
/* Gives back the pages of a map around these bytes if they lie in it; false: they do not. */
bool model_forget_in(const uint8_t *map, size_t size, const void *p, size_t bytes);

/* ---- of every format ---- */

enum {
    MODEL_MAX_DIM = 1 << 24,
    MODEL_MAX_LAYERS = 4096,
    MODEL_MAX_EXPERTS = 4096,
    MODEL_MAX_TOP_K = 32,
    MODEL_MAX_HEADS = 65536 /* and elements of one */
};

/* What of a shape contradicts itself or is not computed, written to buf; NULL: nothing. */
const char *model_shape_fault(const model_shape *s, char *buf, size_t n);
/* Why moed would not serve the path; empty if it would. Only a lack of memory is no answer. */
ep_status model_verdict(const char *path, ep_err *why);

#endif
