#ifndef EP_MODEL_GPTQ_H
#define EP_MODEL_GPTQ_H
/*
 * gptq: one matrix of a checkpoint quantised by GPTQ (safetensors, symmetric int4, groups of 128),
 * as rows of kern_block_gptq4: what the kernels take for KERN_GPTQ4. Nothing is rounded: codes
 * move, scales stay the halves of the file.
 *
 * Refused by name: other widths, group sizes and layouts, zero points other than the middle, rows
 * in another order than the file's (desc_act). Names and shapes are checked when a matrix is found;
 * what lies in zeros and indexes when it is read. Any thread.
 */
#include "model/safetensors.h"

enum { GPTQ_GROUP = 128 };

/* What the configuration of the checkpoint says about all of its matrices. */
typedef struct gptq_rules {
    bool desc_act;
    int version; /* 1: stored zero points are one less; 2: as they are */
} gptq_rules;

typedef struct gptq_matrix {
    const st_tensor *qweight, *scales, *qzeros, *g_idx, *bias; /* the last two may be NULL */
} gptq_matrix;

/* The tensors PREFIX.qweight, .scales ... of a matrix [n, k]. */
ep_status gptq_find(gptq_matrix *out, const gptq_rules *rules, const st_file *f, const char *prefix,
                    uint64_t n, uint64_t k, ep_err *err);
/* rows: n rows of kern_type_row_bytes(KERN_GPTQ4, k), at an even address. */
ep_status gptq_rows(const gptq_matrix *x, const gptq_rules *rules, const st_file *f, void *rows,
                    ep_err *err);
/* The same checks without the rows. */
ep_status gptq_check(const gptq_matrix *x, const gptq_rules *rules, const st_file *f, ep_err *err);

/* The conversion alone, n rows of k weights (k a multiple of 128), and its inverse. qweight:
 * little-endian words [k/8][n], the weights 8r..8r+7 of column c in word (r, c), lowest nibble
 * first; scales: halves [k/128][n]. No alignment is asked of them; rows take even addresses. */
void gptq_rows_from_words(int n, int k, const void *qweight, const void *scales, void *rows);
void gptq_rows_to_words(int n, int k, const void *rows, void *qweight, void *scales);

#endif
