#ifndef EP_MODEL_MODEL_H
#define EP_MODEL_MODEL_H
/*
 * model: what a checkpoint says. Reads GGUF (v2, v3, single or split) and folders of Hugging Face's
 * form (config.json, safetensors, tokenizer.json) by mmap, checks every length, offset, count, type
 * and string before use, resolves hyper-parameters and tensors of an architecture, tokenises, and
 * decides which shard owns which expert. Computes nothing.
 *
 * A model is read-only after open and may be used from any thread. Pointers into it live until
 * close.
 */
#include "base/base.h"
#include "kernels/formats.h"

/* ---- files --------------------------------------------------------------------------------------
 */

/* A GGUF file or the parts of a split one as one set of keys and tensors. */
typedef struct model_file model_file;

typedef struct model_tensor {
    const char *name;
    int type; /* GGUF type id, checked to be one whose size is known, or KERN_GPTQ4 */
    int n_dims;
    uint64_t ne[4];      /* fastest first; missing dimensions are 1 */
    const uint8_t *data; /* mapped, all bytes inside the file; NULL: made of parts (model_rows) */
    size_t bytes;        /* of all its rows */
    const struct hf_matrix *parts; /* where data is NULL: [ne[2]], one matrix each */
} model_tensor;

/* path: a GGUF file, or any part of a split one (siblings NAME-0000i-of-0000n.gguf are found).
 * err names the file and what is wrong with it. */
ep_status model_file_open(model_file **out, const char *path, ep_err *err);
/* The same over bytes in memory (fuzzing, tests); data must outlive the file. */
ep_status model_file_open_bytes(model_file **out, const void *data, size_t n, ep_err *err);
void model_file_close(model_file *f);

size_t model_file_n_tensors(const model_file *f);
const model_tensor *model_file_tensor(const model_file *f, size_t i);
const model_tensor *model_file_find(const model_file *f, const char *name); /* NULL: absent */

/* Metadata. EP_ERR_INVALID when present with another type or out of range (err says so), EP_AGAIN
 * when absent (err untouched), so that a caller can supply a default. Any integer type is accepted.
 */
ep_status model_file_u64(const model_file *f, const char *key, uint64_t *out, ep_err *err);
ep_status model_file_f64(const model_file *f, const char *key, double *out, ep_err *err);
ep_status model_file_bool(const model_file *f, const char *key, bool *out, ep_err *err);
/* Not NUL-terminated: the length counts. */
ep_status model_file_str(const model_file *f, const char *key, const char **s, size_t *n,
                         ep_err *err);
size_t model_file_arr_len(const model_file *f, const char *key); /* 0: absent or no array */
ep_status model_file_arr_str(const model_file *f, const char *key, size_t i, const char **s,
                             size_t *n);
ep_status model_file_arr_i64(const model_file *f, const char *key, size_t i, int64_t *out);
ep_status model_file_arr_f64(const model_file *f, const char *key, size_t i, double *out);

/* Prints what a file or a folder holds and what would refuse it: to `out` as text for people, or
 * JSON. */
ep_status model_inspect(const char *path, bool json, ep_buf *out, ep_err *err);

/* ---- a model ------------------------------------------------------------------------------------
 */

typedef enum model_gate_kind { MODEL_GATE_SOFTMAX_TOPK } model_gate_kind;

typedef struct model_shape {
    char arch[32];
    char name[128];
    int n_layers, hidden, n_heads, n_kv_heads, head_dim; /* head_dim of q, k and v */
    int rope_dim; /* rotated elements of a head, NEOX layout */
    int n_experts, top_k, inter, vocab, context;
    double rope_base;
    float rms_eps;
    model_gate_kind gate;
    bool renormalise; /* divide the chosen weights by their sum */
} model_shape;

typedef struct model_layer {
    const model_tensor *attn_norm, *q, *k, *v, *o, *q_norm, *k_norm, *ffn_norm, *gate_inp;
    const model_tensor *gate_exps, *up_exps, *down_exps;
} model_layer;

typedef struct model {
    model_file *file;         /* where it is from: a GGUF file, */
    struct hf_folder *folder; /* or a folder; the other is NULL */
    model_shape shape;
    const model_tensor *token_embd, *output_norm, *output; /* output == token_embd when tied */
    model_layer *layers;                                   /* [n_layers] */
    /* XXH3 over the tensor directory, metadata and a sample of the data: equal on every rank or
     * refused */
    uint64_t digest;
} model;

/* path: as model_file_open, or a folder with a safetensors checkpoint, its index or only file.
 * Opens and resolves everything; a missing, misshapen or unserved tensor is refused with layer,
 * name, expected and found shape. Another architecture, rope scaling etc. is refused by name. */
ep_status model_open(model **out, const char *path, ep_err *err);
/* The same over an opened file, which the model then owns (also on failure it is closed). */
ep_status model_open_file(model **out, model_file *file, ep_err *err);
void model_close(model *m);

/* The experts of a layer: role 0 gate, 1 up, 2 down. */
const model_tensor *model_experts(const model *m, int layer, int role);

/* Rows of matrix i of a tensor (an expert; 0 where there is one only), model_rows_bytes long, of
 * any alignment: where they lie in the file, or made in `made`, the caller's, until its next use.
 * What only contents can tell (GPTQ zero points, order, scales) is refused here. Any thread. */
ep_status model_rows(const model *m, const model_tensor *t, int i, ep_buf *made,
                     const uint8_t **rows, ep_err *err);
size_t model_rows_bytes(const model_tensor *t);
/* Lets go of the pages that matrix i was read from: they leave this process's memory (not the page
 * cache) and are read again when touched. Nothing happens to a file in memory. Any thread. */
void model_forget(const model *m, const model_tensor *t, int i);

/* ---- tokenizer ----------------------------------------------------------------------------------
 */

typedef struct model_tokenizer model_tokenizer;

/* From the GGUF's tokenizer.* keys, or tokenizer.json and its neighbours: byte-level BPE with a
 * known pre-tokenizer, others are refused by name. Text is not normalised, whatever the checkpoint
 * says. Thread safe after open (encode allocates; it locks nothing). */
ep_status model_tokenizer_open(model_tokenizer **out, const model *m, ep_err *err);
/* The same of a GGUF file alone. */
ep_status model_tokenizer_open_file(model_tokenizer **out, const model_file *f, ep_err *err);
void model_tokenizer_close(model_tokenizer *t);
/* Appends ids to *ids (ep_alloc'ed array of *n, grown; free with ep_free). Special tokens written
 * in the text are recognised if parse_special. Any bytes are accepted and round-trip. add_bos is
 * the caller's. */
ep_status model_encode(const model_tokenizer *t, const char *text, size_t len, bool parse_special,
                       int32_t **ids, size_t *n);
/* Appends the bytes of one token. Control tokens give nothing unless `special`. */
ep_status model_decode(const model_tokenizer *t, int32_t id, bool special, ep_buf *out);
int model_n_tokens(const model_tokenizer *t);
int32_t model_bos(const model_tokenizer *t); /* -1: none */
bool model_adds_bos(const model_tokenizer *t);
bool model_is_end(const model_tokenizer *t, int32_t id); /* eos, eot or eom */

/* ---- placement ----------------------------------------------------------------------------------
 */

/* Which shard owns which expert: the same for every layer. */
typedef struct model_placement {
    int n_experts, n_shards;
    int16_t *owner;   /* [n_experts] shard index */
    int16_t *local;   /* [n_experts] index among the owner's experts, ascending by id */
    int16_t *n_owned; /* [n_shards] */
    uint32_t epoch;
} model_placement;

/* lists[s]: NULL (shard takes part of what is left, evenly, in order) or "0-3,8,10-11". Uncovered,
 * doubly owned or out-of-range experts are refused with the expert and the shard named. A shard may
 * own none (list ""). */
ep_status model_placement_make(model_placement *out, int n_experts, int n_shards,
                               const char *const *lists, uint32_t epoch, ep_err *err);
void model_placement_fini(model_placement *p);

#endif
