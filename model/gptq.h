#ifndef EP_MODEL_GPTQ_H
#define EP_MODEL_GPTQ_H
/*
 * gptq: the experts of a Qwen3-MoE checkpoint quantised by GPTQ (safetensors, symmetric int4,
 * groups of 128), as rows of kern_block_gptq4: what kern_stack_put and compute's stack_load take
 * for KERN_GPTQ4. Nothing is rounded: codes move, scales stay the halves of the file.
 *
 * Refused by name: other architectures, methods, widths, group sizes and file layouts, zero points
 * other than the middle, rows in another order than the file's (desc_act), experts that are not all
 * alike. Names and shapes are checked at open; what lies in zeros and indexes of an expert when it
 * is read.
 *
 * Read-only after open; experts may be read from several threads.
 */
#include "model/safetensors.h"

enum { GPTQ_GROUP = 128 };

typedef struct gptq_config {
    int n_layers, n_experts, hidden, inter, n_heads, n_kv_heads, head_dim, vocab;
    bool tied; /* no lm_head of its own */
    bool desc_act;
    int version;    /* 1: stored zero points are one less; 2: as they are */
    uint32_t zeros; /* eight zero points in the middle, as this version stores them */
} gptq_config;

typedef struct gptq_model gptq_model;

/* path as st_open; config.json and quantize_config.json lie in the same folder. */
ep_status gptq_open(gptq_model **out, const char *path, ep_err *err);
/* The same over an opened file, which the model then owns (also on failure it is closed), and texts
 * in memory. quantize may be NULL. */
ep_status gptq_open_file(gptq_model **out, st_file *file, const st_bytes *config,
                         const st_bytes *quantize, ep_err *err);
void gptq_close(gptq_model *m);

const gptq_config *gptq_shape(const gptq_model *m);
const st_file *gptq_file(const gptq_model *m);

/* Rows of one expert (role 0 gate, 1 up: [inter, hidden]; 2 down: [hidden, inter]). */
size_t gptq_expert_bytes(const gptq_model *m, int role);
ep_status gptq_expert_rows(const gptq_model *m, int layer, int role, int expert, void *rows,
                           ep_err *err);
/* The same checks without the rows. */
ep_status gptq_expert_check(const gptq_model *m, int layer, int role, int expert, ep_err *err);

/* The conversion alone, n rows of k weights (k a multiple of 128), and its inverse. qweight:
 * little-endian words [k/8][n], the weights 8r..8r+7 of column c in word (r, c), lowest nibble
 * first; scales: halves [k/128][n]. No alignment is asked of them; rows take even addresses. */
void gptq_rows_from_words(int n, int k, const void *qweight, const void *scales, void *rows);
void gptq_rows_to_words(int n, int k, const void *rows, void *qweight, void *scales);

/* ---- between gptq.c and gptq_config.c ---- */

struct model_json;
/* config: the parsed config.json; quantize: quantize_config.json or NULL. `where` opens messages.
 */
ep_status gptq_config_read(gptq_config *out, const struct model_json *config,
                           const struct model_json *quantize, const char *where, ep_err *err);

#endif
