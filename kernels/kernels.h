#ifndef EP_KERNELS_KERNELS_H
#define EP_KERNELS_KERNELS_H
/*
 * kernels: numbers. Packing of weights, stacked GEMMs over experts, dense products and the vector
 * parts of a transformer, for the CPU, behind one set of functions that choose their instruction
 * set once at start. The device contract for shards (CPU or CUDA) is compute.h, built on this.
 *
 * The specification is the scalar code (cpu/gemm_scalar.c, cpu/vec_scalar.c). Every instruction set
 * gives the same bits, for any batch, thread count and order of calls, because:
 *  1. integer products inside a block are exact in int32;
 *  2. the float part of an output element runs over k in ascending blocks, one fixed formula a
 * block (formula per type: cpu/ops.h);
 *  3. vector reductions use 16 lanes (element i goes to lane i%16, lanes are added as a fixed tree:
 *     8+8, 4+4, 2+2, 1+1), and transcendental functions are one polynomial in one order;
 *  4. multiply-add is fused exactly where the specification says fma.
 *
 * Leaf functions never fail, allocate, lock or log. Arguments are the caller's invariants: sizes
 * have been checked where the model was opened.
 */
#include "base/base.h"
#include "kernels/formats.h"

/* ---- selection ----------------------------------------------------------------------------------
 */

/* Chooses the instruction set: "auto", "scalar", "avx2", "avx512" (VNNI) or "amx". The environment
 * variable MOED_KERNELS overrides `level`. A level that this machine lacks is EP_ERR_UNSUPPORTED
 * with the reason in err, never a silent step down. Call once before any other function here,
 * before threads start (tests may call it again while nothing runs). AMX needs a permission that
 * threads inherit: so select before opening pools. */
ep_status kern_select(const char *level, ep_err *err);
const char *kern_level(void); /* the level in use: "scalar", "avx2", "avx512", "amx" */
/* Whether this machine can run a level; for tests and `moed check`. */
bool kern_has_level(const char *level);

/* ---- packing ------------------------------------------------------------------------------------
 */

/*
 * Packed layout: panels of 16 output columns (16 rows of the file's matrix), each panel contiguous
 * over the whole of k, blocks in ascending k. Inside a block 4-byte k-groups of the 16 columns lie
 * side by side, B[k/4][16][4]: the AMX B tile, the VNNI operand. The size equals the file's (n
 * rounded up to 16; columns past n are zero). Packing loses nothing: kern_unpack gives the file's
 * bytes back.
 */

/* src: n rows of kern_type_row_bytes(type, k), where floats lie at any address and blocks at an
 * even one; dst: kern_packed_bytes(type, n, k), 64-byte aligned. */
void kern_pack(int type, int n, int k, const void *src, void *dst);
void kern_unpack(int type, int n, int k, const void *packed, void *dst);
/* Expands such rows to floats (exact products, the reference for tests; embeddings use it too). */
void kern_dequant_row(int type, const void *src, float *dst, int k);

/* ---- activations --------------------------------------------------------------------------------
 */

/* Converts rows of floats to the form a weight type consumes. dst rows lie kern_act_row_bytes
 * apart. Per block: amax = max |x|; scale = amax / 127; q = round_to_even(x * (127 / amax)), 0 when
 * amax is 0. x: [rows, k] with row stride ldx floats. Deterministic per row. */
void kern_act_rows(kern_act act, void *dst, const float *x, size_t ldx, int rows, int k);

/* ---- products -----------------------------------------------------------------------------------
 */

/* One packed matrix, borrowed. */
typedef struct kern_matrix {
    int type, n, k;      /* n: real output columns, before rounding up */
    const uint8_t *data; /* kern_packed_bytes(type, n, k), 64-byte aligned */
} kern_matrix;

/* The experts of one layer as three matrices each, stacked with a fixed stride. Panels of gate and
 * up alternate (gate panel 0, up panel 0, gate panel 1, ...), so that SwiGLU happens before the
 * store. */
typedef struct kern_stack {
    int gate_type, up_type, down_type;
    int hidden, inter; /* both multiples of 16 for served shapes */
    int n_experts;
    size_t gate_up_stride; /* bytes from one expert to the next */
    size_t down_stride;
    uint8_t *gate_up, *down; /* owned by the store, 64-byte aligned */
} kern_stack;

/* Fills types, shape and strides, leaves the pointers NULL. */
void kern_stack_shape(kern_stack *s, int gate_type, int up_type, int down_type, int hidden,
                      int inter, int n_experts);
/* Packs one expert from file rows (gate, up: [inter, hidden]; down: [hidden, inter]). Thread safe
 * for different experts. */
void kern_stack_put(kern_stack *s, int expert_i, const void *gate, const void *up,
                    const void *down);
/* XXH3 of the packed bytes of one expert (both roles). */
uint64_t kern_stack_checksum(const kern_stack *s, int expert_i);

/* The rows form a stack's input takes: the common form of gate and up, else KERN_ACT_F32. */
kern_act kern_stack_act(const kern_stack *s);

/* One call covers every (row, expert) pair of a layer. Pairs are sorted by expert (stable). */
typedef struct kern_ffn_args {
    const void *rows; /* n_rows activation rows, kern_act_row_bytes(act, hidden) apart */
    kern_act act;     /* kern_stack_act(stack), or KERN_ACT_F32 for any stack */
    int n_rows, n_pairs;
    const int32_t
        *expert_offset;      /* [n_experts + 1]: pairs of expert e are offset[e] .. offset[e+1]-1 */
    const int32_t *pair_row; /* [n_pairs] which row each sorted pair reads */
    const int32_t *pair_out; /* [n_pairs] which row of `out` each sorted pair writes */
    float *out;              /* [n_pairs, hidden] */
} kern_ffn_args;

/* Bytes of scratch that kern_ffn needs for at most max_rows rows and max_pairs pairs. */
size_t kern_ffn_scratch_bytes(const kern_stack *s, int max_rows, int max_pairs, int n_threads);
/* down(silu(gate x) * up x) for every pair. Does not allocate. pool NULL: in the caller. */
void kern_ffn(ep_pool *pool, const kern_stack *s, const kern_ffn_args *a, void *scratch);

/* y[r, 0..n-1] = W x[r]: a dense matrix as a stack of one, the same kernels. x: [rows, k] floats
 * with stride ldx, y: stride ldy. scratch: kern_linear_scratch_bytes. */
size_t kern_linear_scratch_bytes(int type, int n, int k, int max_rows, int n_threads);
void kern_linear(ep_pool *pool, const kern_matrix *w, const float *x, size_t ldx, int rows,
                 float *y, size_t ldy, void *scratch);

/* ---- vector parts -------------------------------------------------------------------------------
 */

/* y = x / sqrt(mean(x^2) + eps) * w over n elements; y may be x. */
void kern_rms_norm(float *y, const float *x, const float *w, int n, float eps);
/* y += a * x, each element one fma. */
void kern_axpy(float *y, const float *x, float a, int n);
/* y += x */
void kern_add(float *y, const float *x, int n);
/* 16-lane dot product. */
float kern_dot(const float *a, const float *b, int n);
/* In place: subtract the maximum, exp, divide by the sum (16-lane). Returns false, leaving x
 * unspecified, when an input is not finite. */
bool kern_softmax(float *x, int n);
/* exp as the specification computes it (for sampling and the gate, so that all agree). */
float kern_exp(float x);
/* y[i] = kern_exp(x[i] - shift); y may be x. */
void kern_exp_sub(float *y, const float *x, float shift, int n);
/* y[i] = gate[i] / (1 + exp(-gate[i])) * up[i] */
void kern_silu_mul(float *y, const float *gate, const float *up, int n);
/* Rotates one head in place, NEOX layout (pairs i, i + dim/2); cos_sin: dim/2 cosines, dim/2 sines.
 * Elements past dim are left. */
void kern_rope(float *x, const float *cos_sin, int dim);
/* One query head over a sequence whose cache lies in pages: q [dim]; keys and values of position t
 * at pages[t / page_tokens] + (t % page_tokens) * stride (floats; k_off and v_off inside).
 * Positions are visited in ascending order: score = dot(q, k) * scale, softmax over all, out = sum
 * p * v by fma in ascending t. scores: scratch of n_pos floats. */
typedef struct kern_attn_args {
    const float *q;
    float *const *pages;
    int page_tokens, n_pos, dim;
    size_t stride, k_off, v_off;
    float scale;
} kern_attn_args;
void kern_attn_head(float *out, const kern_attn_args *a, float *scores);
/* n query heads that share keys and values, q [n, dim], out [n, dim]: the bits of n calls of
 * kern_attn_head, with keys and values read once for several heads. scores: scratch of
 * n * kern_attn_scores(n_pos) floats. */
void kern_attn_heads(float *out, const kern_attn_args *a, int n, float *scores);
static inline size_t kern_attn_scores(int n_pos)
{
    return ((size_t)n_pos + 15) & ~(size_t)15;
}

#endif
