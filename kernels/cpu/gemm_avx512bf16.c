/*
 * gemm_avx512bf16: the BF16 panel product on VDPBF16PS, twice the rate of fused multiply-adds.
 *
 * The instruction adds the product of the upper halves of its lanes and then that of the lower
 * ones, each by an fma that takes denormals for zero. So two steps of a chain of ops.h, the even
 * one or the odd one, are one instruction once the weights and the activations that follow each
 * other in the chain stand in the upper and the lower half of a lane: values 4i and 4i + 2, 4i + 1
 * and 4i + 3.
 */
#define X_FAR /* processors with VDPBF16PS and without AMX are AMD's; 512 rows: 72 ms, 78 near */
#include "kernels/cpu/x512.h"

/* What the groups of rows have in common. */
typedef struct job {
    float *y;
    size_t ldy;
    const uint8_t *panel;
    const kern_rows *a;
    int r; /* the group's first row */
} job;

/* 32 activations as pairs of a chain: lane 2i holds 4i above 4i + 2, lane 2i + 1 their successors.
 */
X_INLINE __m512i chain_pairs(__m512i x)
{
    return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(_mm_setr_epi8(4, 5, 0, 1, 6, 7, 2, 3, 12,
                                                                       13, 8, 9, 14, 15, 10, 11)));
}

X_INLINE __m512 dot2(__m512 sum, __m512i w, const uint32_t *x)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)*x));
}

X_INLINE void rows_bf16(const job *j, const int rows)
{
    const int blocks = (j->a->k + 31) / 32;
    const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000U);
    const uint8_t *p = j->panel;
    _Alignas(64) uint32_t x[8][16];
    const uint16_t *h[8];
    __m512 acc[8];
    X_UNROLL
    for (int i = 0; i < rows; i++) {
        h[i] = j->a->h + (size_t)(j->r + i) * j->a->ldh;
        acc[i] = _mm512_setzero_ps();
    }
    for (int b = 0; b < blocks; b++) {
        __m512 e[8], o[8];
        X_UNROLL
        for (int i = 0; i < rows; i++) {
            _mm512_store_si512(x[i], chain_pairs(x_load(h[i] + 32 * (size_t)b)));
            e[i] = o[i] = _mm512_setzero_ps();
        }
        for (int t = 0; t < 8; t++, p += 128) {
            const __m512i first = x_load(p), second = x_load(p + 64);
            const __m512i even = x_pick(upper, _mm512_slli_epi32(first, 16), second);
            const __m512i odd = x_pick(upper, first, _mm512_srli_epi32(second, 16));
            x_ahead(p, 128);
            X_UNROLL
            for (int i = 0; i < rows; i++) {
                e[i] = dot2(e[i], even, &x[i][2 * t]);
                o[i] = dot2(o[i], odd, &x[i][2 * t + 1]);
            }
        }
        X_UNROLL
        for (int i = 0; i < rows; i++)
            acc[i] = _mm512_add_ps(acc[i], _mm512_add_ps(e[i], o[i]));
    }
    X_UNROLL
    for (int i = 0; i < rows; i++)
        _mm512_storeu_ps(j->y + (size_t)(j->r + i) * j->ldy, acc[i]);
}

/* A function of its own: inlined beside the others the compiler keeps fewer sums in registers. */
static __attribute__((noinline)) void eight_rows(const job *j)
{
    rows_bf16(j, 8);
}

static void bf16(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    const unsigned saved = _mm_getcsr();
    _mm_setcsr(saved | 0x8040); /* FTZ, DAZ for the additions too */
    for (job j = {.y = y, .ldy = ldy, .panel = panel, .a = a}; j.r < a->m; j.r += 8) {
        switch (a->m - j.r) {
        case 7:
            rows_bf16(&j, 7);
            break;
        case 6:
            rows_bf16(&j, 6);
            break;
        case 5:
            rows_bf16(&j, 5);
            break;
        case 4:
            rows_bf16(&j, 4);
            break;
        case 3:
            rows_bf16(&j, 3);
            break;
        case 2:
            rows_bf16(&j, 2);
            break;
        case 1:
            rows_bf16(&j, 1);
            break;
        default:
            eight_rows(&j);
        }
    }
    _mm_setcsr(saved);
}

const kern_gemm kern_gemm_avx512bf16 = {.name = "avx512bf16", .bf16 = bf16};
