#ifndef EP_KERNELS_CPU_OPS_H
#define EP_KERNELS_CPU_OPS_H
/*
 * ops: the leaf contract between the loops written once (gemm.c, vec.c) and the code per
 * instruction set. Private to kernels/. Leaf functions never fail, allocate, lock or log, and are
 * all static in their files: an ISA file exports its tables and nothing else.
 */
#include <stddef.h>
#include <stdint.h>
#include "kernels/kernels.h"

/* What a machine offers, as levels: each is a bundle of features checked together. */
enum { KERN_CPU_AVX2 = 1, KERN_CPU_AVX512 = 2, KERN_CPU_AMX = 4 };

/* Activation rows of one expert, prepared and contiguous. Which members are set follows from `act`.
 * Arrays may be read up to 64 bytes past their end. */
typedef struct kern_rows {
    kern_act act;
    int m, k;
    const int8_t *q; /* [m, ldq] values -127..127; ldq a multiple of 64, 64-byte aligned */
    size_t ldq;
    const float *scale; /* [m, lds] one per block of kern_act_block(act) */
    size_t lds;
    const int16_t *sum16; /* [m, ldsum] sums of 16 consecutive q */
    const int16_t *sum32; /* [m, ldsum] sums of 32 consecutive q (only k/32 used) */
    size_t ldsum;
    const float *x; /* [m, ldx] KERN_ACT_F32 */
    size_t ldx;
    const uint16_t *h; /* [m, ldh] KERN_ACT_BF16, zero from k to a multiple of 32 */
    size_t ldh;
} kern_rows;

/* clang-format off */
/* y[r * ldy + n] for all m rows and the 16 columns of one panel over the whole of k. Overwrites y.
 *
 * The specification, per output element, acc = 0 and blocks in ascending k; (float) rounds to
 * nearest:
 *   Q4_K, Q5_K: I1 = sum_j sc_j * sum(q x); I2 = sum_j m_j * sum32_j   (int32, exact)
 *               t = dmin * (float)I2;  v = fma(d, (float)I1, -t);  acc = fma(dx, v, acc)
 *   Q6_K:       I = sum_j sc_j * (sum(q x) - 32 sum16_j);  v = d * (float)I;
 *               acc = fma(dx, v, acc)
 *   Q8_0, Q4_0, Q5_0, GPTQ4: I = sum((q - zero) x) with zero 0 (stored +128), 8, 16, 8;
 *               v = d * (float)I;  acc = fma(dx, v, acc)
 *   F32, F16:   acc = fma(w, x, acc) for each k ascending
 *   BF16:       per 32 k (zero padded): e = o = 0; for p = 0..15 ascending:
 *               e = fma(x[2p], w[2p], e), o = fma(x[2p+1], w[2p+1], o);  acc = acc + (e + o);
 *               denormal inputs and results of each step count as zero (what AMX does)
 */
/* clang-format on */
typedef void (*kern_panel_fn)(float *y, size_t ldy, const uint8_t *panel, const kern_rows *rows);

typedef struct kern_gemm {
    const char *name;
    kern_panel_fn q4_0, q5_0, q8_0, q4_k, q5_k, q6_k, gptq4, f32, f16, bf16;
} kern_gemm;

/* kernels/cpu/gemm_<isa>.c; a NULL entry falls back to the next lower level (amx -> avx512 -> avx2
 * -> scalar); scalar has none. */
extern const kern_gemm kern_gemm_scalar, kern_gemm_avx2, kern_gemm_avx512, kern_gemm_amx;
/* What kern_gemm_avx2 leaves to it: quantised types and more rows than four (it takes any). */
extern const kern_gemm kern_gemm_avx2_many;
/* kern_gemm_avx512 with the prefetch that AMD's processors want. */
extern const kern_gemm kern_gemm_avx512_far;
/* BF16 for processors of the level avx512 that have AVX512_BF16; nothing else. */
extern const kern_gemm kern_gemm_avx512bf16;
/* For tests: the tile routines of kern_gemm_amx at any number of rows, where kern_gemm_amx itself
 * leaves a few rows to AVX-512. Exists where gemm_amx.c is compiled; needs AMX, or the tests'
 * emulation of it. */
extern const kern_gemm kern_gemm_tiles;

/* Element-wise and row operations; contracts in kernels.h under the same names. */
typedef struct kern_vec {
    const char *name;
    void (*act_q8)(int8_t *q, float *scale, const float *x, int k, int block);
    void (*act_bf16)(uint16_t *h, const float *x, int k);
    /* sum16[i], sum32[i] of the k values of one row */
    void (*act_sums)(int16_t *sum16, int16_t *sum32, const int8_t *q, int k);
    void (*rms_norm)(float *y, const float *x, const float *w, int n, float eps);
    void (*axpy)(float *y, const float *x, float a, int n);
    void (*add)(float *y, const float *x, int n);
    float (*dot)(const float *a, const float *b, int n);
    bool (*softmax)(float *x, int n);
    void (*exp_sub)(float *y, const float *x, float shift, int n);
    void (*silu_mul)(float *y, const float *gate, const float *up, int n);
    void (*rope)(float *x, const float *cos_sin, int dim);
    void (*attn_head)(float *out, const kern_attn_args *a, float *scores);
    /* NULL: attn_head for each */
    void (*attn_heads)(float *out, const kern_attn_args *a, int n, float *scores);
} kern_vec;

extern const kern_vec kern_vec_scalar, kern_vec_avx2, kern_vec_avx512;

/* The tables in use, set by kern_select (select.c); the gemm table has no NULL entries. */
extern kern_gemm kern_gemm_now;
extern kern_vec kern_vec_now;

#endif
