#ifndef EP_MODEL_SAFETENSORS_H
#define EP_MODEL_SAFETENSORS_H
/*
 * safetensors: a checkpoint of one file, or of several under an index, as one set of tensors. The
 * files are mapped; every name, type, shape and offset is checked before anyone sees a tensor. What
 * the tensors mean is not known here (hf.h knows).
 *
 * Read-only after open, any thread; pointers live until close. Data need not be aligned: the format
 * promises nothing, so read it by memcpy.
 */
#include "model/model.h"

enum { ST_DIMS = 8 };

typedef enum st_type {
    ST_BOOL,
    ST_F4,
    ST_F6_E2M3,
    ST_F6_E3M2,
    ST_U8,
    ST_I8,
    ST_F8_E5M2,
    ST_F8_E4M3,
    ST_F8_E8M0,
    ST_I16,
    ST_U16,
    ST_F16,
    ST_BF16,
    ST_I32,
    ST_U32,
    ST_F32,
    ST_C64,
    ST_F64,
    ST_I64,
    ST_U64,
    ST_N_TYPES
} st_type;

typedef struct st_tensor {
    const char *name;
    st_type type;
    int n_dims;            /* 0: a single value */
    uint64_t dim[ST_DIMS]; /* as the file writes them, slowest first; may be 0 */
    const uint8_t *data;   /* all bytes inside the file */
    size_t bytes;
    size_t part;
} st_tensor;

/* A file in memory, for tests and fuzzing. */
typedef struct st_bytes {
    const char *name;
    const void *data;
    size_t size;
} st_bytes;

typedef struct st_file st_file;

/* path: a file, an index (NAME.safetensors.index.json), or a folder that holds one of either. */
ep_status st_open(st_file **out, const char *path, ep_err *err);
/* The same over memory, which must outlive the file. index NULL: parts[0] alone. */
ep_status st_open_bytes(st_file **out, const st_bytes *parts, size_t n_parts, const st_bytes *index,
                        ep_err *err);
void st_close(st_file *f);

const char *st_path(const st_file *f);   /* what was opened: the file or the index */
const char *st_folder(const st_file *f); /* where it lies */
size_t st_n_parts(const st_file *f);
const char *st_part_name(const st_file *f, size_t i);
size_t st_n_tensors(const st_file *f);
const st_tensor *st_tensor_at(const st_file *f, size_t i);    /* in order of names */
const st_tensor *st_find(const st_file *f, const char *name); /* NULL: absent */
size_t st_n_notes(const st_file *f);                          /* __metadata__ of part 0 */
void st_note(const st_file *f, size_t i, const char **key, const char **value);

/* XXH3 over names, headers and sizes of the files, and a sample of their data. */
uint64_t st_digest(const st_file *f);
/* model_forget of bytes of this checkpoint. */
void st_forget(const st_file *f, const void *p, size_t bytes);

const char *st_type_name(st_type t); /* "BF16" */
/* "[256, 64]". Returns buf. */
char *st_shape_text(char *buf, size_t n, const st_tensor *t);
const char *st_tensor_path(const st_file *f, const st_tensor *t); /* its file, for messages */
/* Refuses a tensor: "FILE: tensor X is F16 [2, 3], expected WANT". */
ep_status st_misshapen(const st_file *f, const st_tensor *t, const char *want, ep_err *err);

/* Whether a path is for this reader: *.safetensors, *.safetensors.index.json, or a folder. */
bool model_safetensors_is(const char *path);
/* model_inspect of such a path. */
ep_status model_safetensors_inspect(const char *path, bool json, ep_buf *out, ep_err *err);

#endif
