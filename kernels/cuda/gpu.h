#ifndef EP_KERNELS_CUDA_GPU_H
#define EP_KERNELS_CUDA_GPU_H
/*
 * gpu: what the device code offers to compute_cuda.c (and to the programs of tests/gpu): launches,
 * each returning a cudaError_t as int, 0 when it was queued. Pointers are device memory. Counts
 * that change from pass to pass are read on the device, so a launch can be captured in a graph and
 * replayed.
 */
#include "kernels/cuda/layout.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef void *gpu_stream; /* cudaStream_t */

/* The forms of the product, which give the same bits (of the last one form.h makes sure). */
enum {
    GPU_FORM_SPLIT, /* mma.sync, warps share k: few pairs per expert */
    GPU_FORM_WIDE,  /* mma.sync, a warp owns its rows */
    GPU_FORM_WGMMA, /* wgmma: sm_90a only, many pairs per expert */
    GPU_FORMS
};

enum {
    GPU_WARPS = 8,        /* of an mma.sync kernel's block */
    GPU_NARROW_COLS = 16, /* pairs per entry when warps split k */
    GPU_WIDE_COLS = 32,   /* pairs per entry when a warp owns its rows */
    GPU_WIDE_ROWS = 2     /* row tiles of a warp then */
};
/* Pairs per entry of a form. */
int gpu_form_width(int form);

/* Counts of a pass, at the head of its control block. */
typedef struct gpu_counts {
    int32_t rows, pairs;
} gpu_counts;

/* Activation rows as the products want them: 16-bit values padded with zeros to whole tiles, in
 * gpu_act_at order or, for the wgmma form, as they are. Half rows are divided by a power of two
 * (`scale`) that puts their largest value below 2^14, so that no row overflows and small values
 * keep their bits; bfloat16 rows are as they are, scale 1. */
typedef struct gpu_rows {
    uint16_t *value; /* [n, k_tiles * 256] */
    float *scale;    /* [n] */
    uint16_t *sum;   /* [n, k_tiles * 16] half rows only: sums of 32 rounded values, gpu_sum_at */
} gpu_rows;

/* A pass is a list, then rows and products in their order. `chained` launches may come to the
 * device while the one before still runs (chain.cuh); compute capability 9.0 and later, and never
 * the first of a pass. */

/* `n` is read on the device: counts->rows or counts->pairs. At most `most` rows. */
int gpu_launch_rows(int act, const void *src, gpu_rows to, const int32_t *n, int most, int k,
                    int is_bf16, int form, int chained, gpu_stream stream);
/* Entries of at most `width` pairs from offsets of n_experts; *n_entries gets their number. */
int gpu_launch_list(const int32_t *offset, int n_experts, int width, gpu_entry *list,
                    int32_t *n_entries, gpu_stream stream);

/* One product over all entries. Interleaved matrices end in SwiGLU. */
typedef struct gpu_gemm {
    const uint8_t *w; /* the role of expert 0; the next one m.bytes further */
    gpu_matrix m;
    gpu_cut cut;
    gpu_rows x;
    const gpu_entry *list;
    const int32_t *n_entries;
    const int32_t *pair_row;  /* [pairs] row of x; NULL: the pair's own number */
    const int32_t *pair_out;  /* [pairs] row of out; NULL: the pair's own number */
    const float *pair_weight; /* [pairs] factor of a result row; NULL: none */
    float *out;               /* [.., ld] */
    int ld;
    int slots; /* ring slots per warp; wgmma: of the block */
} gpu_gemm;

/* Fills cut and slots. */
void gpu_gemm_plan(gpu_gemm *g, int form, int smem_limit);
size_t gpu_gemm_smem(const gpu_gemm *g, int form);
/* Once per device before launches: loads every kernel, allows the shared memory that plans may ask
 * for. */
int gpu_gemm_prepare(int smem_limit);
int gpu_side_prepare(void); /* a part of it */
/* For which compute capability the kernels in use were compiled: 80, 90, ... (not always the
 * device's: the driver can make kernels from what was built for an older one). 0 on error. */
int gpu_compiled_for(void);
int gpu_launch_gemm(const gpu_gemm *g, int form, int n_blocks, int chained, gpu_stream stream);
/* Blocks of a product kernel that fit on one multiprocessor; 0 on error. */
int gpu_gemm_occupancy(const gpu_gemm *g, int form);

/* Packs one role of one expert from file rows in device memory. */
int gpu_launch_pack(const gpu_matrix *m, const void *a, const void *b, void *dst,
                    gpu_stream stream);

/* For routers on a GPU (none yet): the gate and the sum over slots. Softmax: scores over all
 * experts. Sigmoid: a score per expert, chosen by score + bias. Equal scores: the lowest id. A row
 * with a logit that is not finite gets ids of -1 and no weights. */
typedef struct gpu_gate {
    const float *logits; /* [rows, n_experts] */
    const float *bias;   /* [n_experts] or NULL; for the choice only */
    int n_rows, n_experts, top_k;
    int sigmoid, renormalise;
    float scale;      /* of the weights */
    int32_t *experts; /* [rows, top_k] */
    float *weights;   /* [rows, top_k] */
} gpu_gate;
int gpu_launch_gate(const gpu_gate *g, gpu_stream stream);
/* x[r] += sum over slots, ascending, of weight * y[place[r, slot]]; places below 0 are skipped. */
int gpu_launch_combine(float *x, const float *y, const int32_t *place, const float *weights,
                       int n_rows, int top_k, int hidden, gpu_stream stream);

#ifdef __cplusplus
}
#endif
#endif
