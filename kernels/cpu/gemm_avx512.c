/*
 * gemm_avx512: the panel products for AVX-512 with VNNI, without AMX. Serves few rows at the speed
 * of memory and many rows as well as plain vectors can.
 *
 * Up to eight rows go through a panel together: 32 weights of the 16 columns are unpacked to bytes
 * in registers and meet every row by vpdpbusd (weights unsigned, activations signed, exact in
 * int32). Unpacking is then at most an eighth of the work, so many rows simply come back in groups
 * of eight: the panel is in L2 by then. (Two panels at once, so that a row's activations are loaded
 * for both, gained 10 % from L2 and lost 20 % on cold panels.) The invariant is ops.h's
 * specification, bit for bit; the order of integer sums is free, the order of float operations is
 * not.
 */
#include "kernels/cpu/x512.h"

/* Compiled twice: the second object (X_FAR) differs in how far ahead it fetches. */
#ifdef X_FAR
#define TABLE kern_gemm_avx512_far
#else
#define TABLE kern_gemm_avx512
#endif

/* What the groups of rows have in common. */
typedef struct job {
    float *y;
    size_t ldy;
    const uint8_t *panel;
    const kern_rows *a;
    int r; /* the group's first row */
} job;

X_INLINE const int8_t *row_q(const job *j, int i)
{
    return j->a->q + (size_t)(j->r + i) * j->a->ldq;
}

X_INLINE const float *row_scale(const job *j, int i)
{
    return j->a->scale + (size_t)(j->r + i) * j->a->lds;
}

X_INLINE const int16_t *row_sum16(const job *j, int i)
{
    return j->a->sum16 + (size_t)(j->r + i) * j->a->ldsum;
}

X_INLINE const int16_t *row_sum32(const job *j, int i)
{
    return j->a->sum32 + (size_t)(j->r + i) * j->a->ldsum;
}

X_INLINE void store_rows(const job *j, const __m512 *acc, const int rows)
{
    X_UNROLL
    for (int i = 0; i < rows; i++)
        _mm512_storeu_ps(j->y + (size_t)(j->r + i) * j->ldy, acc[i]);
}

/* s[i] += w . x[i], x pointing at the 32 activations, `at` at the four that meet w. With eight rows
 * the multipliers set the pace, and a broadcast of its own costs nothing. */
X_INLINE void dot(__m512i *s, __m512i w, const int8_t *const *x, const int at, const int rows)
{
    X_UNROLL
    for (int i = 0; i < rows; i++)
        s[i] = rows < 8 ? x_dot_bytes(s[i], w, x[i] + at)
                        : _mm512_dpbusd_epi32(s[i], w, x_pair(x[i] + at));
}

/* The rows' activations, and cleared sums. */
X_INLINE void start(const job *j, const int8_t **x, __m512 *acc, const int rows)
{
    X_UNROLL
    for (int i = 0; i < rows; i++) {
        x[i] = row_q(j, i);
        acc[i] = _mm512_setzero_ps();
    }
}

/* Codes go from low and high nibbles of the same byte, which then is read once. */
static const int order[8] = {0, 4, 1, 5, 2, 6, 3, 7};

/* Q4_K, Q5_K. Parts of 32 are not unrolled: scales and sums would not stay in registers. */
X_INLINE void rows_k(const job *j, const int rows, const bool five)
{
    const int blocks = j->a->k / 256, block_bytes = five ? X_BLOCK_Q5_K : X_BLOCK_Q4_K;
    const uint8_t *p = j->panel;
    const int8_t *x[8];
    __m512 acc[8];
    start(j, x, acc, rows);
    for (int b = 0; b < blocks; b++, p += block_bytes) {
        const uint8_t *high = p + X_HEAD_K, *nibbles = high + (five ? 512 : 0);
        x_head h;
        __m512i i1[8];
        x_head_k(&h, p);
        x_ahead(p, five ? 768 : 256);
        X_UNROLL
        for (int i = 0; i < rows; i++)
            i1[i] = _mm512_setzero_si512();
        for (int part = 0; part < 8; part++, nibbles += X_NIBBLES, high += 64) {
            const __m512i fifth = five ? x_load(high) : _mm512_setzero_si512();
            __m512i s[8];
            x_ahead(nibbles, X_NIBBLES);
            X_UNROLL
            for (int i = 0; i < rows; i++)
                s[i] = _mm512_setzero_si512();
            X_UNROLL
            for (int n = 0; n < 8; n++) {
                const int t = order[n];
                dot(s, five ? x_nibble5(nibbles, fifth, t) : x_nibble(nibbles, t), x, 4 * t, rows);
            }
            const __m512i sc = _mm512_shuffle_epi8(
                h.sc[part / 4], _mm512_add_epi8(x_index_low(0), _mm512_set1_epi32(part % 4)));
            X_UNROLL
            for (int i = 0; i < rows; i++) {
                i1[i] = _mm512_add_epi32(i1[i], _mm512_mullo_epi32(s[i], sc));
                x[i] += 32;
            }
        }
        X_UNROLL
        for (int i = 0; i < rows; i++)
            acc[i] = x_step_k(acc[i], i1[i], &h, row_sum32(j, i) + 8 * b, row_scale(j, i)[b]);
    }
    store_rows(j, acc, rows);
}

/* Codes are 32 above their value: what that adds, 32 sc sum16, is taken off two sub-blocks at a
 * time.
 */
X_INLINE void rows_q6_k(const job *j, const int rows)
{
    const int blocks = j->a->k / 256;
    const uint8_t *p = j->panel + x_panel_head(blocks);
    const int8_t *x[8];
    __m512 acc[8];
    start(j, x, acc, rows);
    for (int b = 0; b < blocks; b++, p += X_BLOCK_Q6_K) {
        __m512i total[8];
        X_UNROLL
        for (int i = 0; i < rows; i++)
            total[i] = _mm512_setzero_si512();
        x_ahead(p, 256);
        for (int g = 0; g < 4; g++) { /* 64 weights, four sub-blocks of 16 */
            const __m512i scales = x_load(p + 64 * g);
            X_UNROLL
            for (int c = 0; c < 4; c++) {
                const int part = 2 * g + c / 2;
                __m512i s[8];
                X_UNROLL
                for (int i = 0; i < rows; i++)
                    s[i] = _mm512_setzero_si512();
                X_UNROLL
                for (int t = 4 * (c % 2); t < 4 * (c % 2) + 4; t++)
                    dot(s, x_nibble6(p + 1280 + part * X_NIBBLES, p + 256 + part * 128, t), x,
                        32 * (c / 2) + 4 * t, rows);
                const __m512i sc =
                    _mm512_srai_epi32(_mm512_shuffle_epi8(scales, x_index_top(c)), 24);
                X_UNROLL
                for (int i = 0; i < rows; i++)
                    total[i] = _mm512_add_epi32(total[i], _mm512_mullo_epi32(s[i], sc));
                if (c % 2 == 0) x_ahead(p + 256 + part * 384, 384);
            }
            X_UNROLL
            for (int c = 0; c < 4; c += 2) { /* a byte in the upper half is 256 sc */
                const __m512i pair = _mm512_sub_epi16(
                    _mm512_setzero_si512(),
                    _mm512_srai_epi16(_mm512_shuffle_epi8(scales, x_index_tops(c, c + 1)), 3));
                X_UNROLL
                for (int i = 0; i < rows; i++)
                    total[i] = _mm512_dpwssd_epi32(total[i], pair,
                                                   x_pair(row_sum16(j, i) + 16 * b + 4 * g + c));
            }
            X_UNROLL
            for (int i = 0; i < rows; i++)
                x[i] += 64;
        }
        const __m512 d = x_half16(j->panel + 32 * b);
        X_UNROLL
        for (int i = 0; i < rows; i++)
            acc[i] = _mm512_fmadd_ps(_mm512_set1_ps(row_scale(j, i)[b]),
                                     _mm512_mul_ps(d, _mm512_cvtepi32_ps(total[i])), acc[i]);
    }
    store_rows(j, acc, rows);
}

X_INLINE __m512i flat_code(const uint8_t *p, const int t, const int type)
{
    if (type == KERN_Q8_0) return x_load(p + 64 * t);
    return type == KERN_Q5_0 ? x_nibble5(p + 64, x_load(p), t) : x_nibble(p, t);
}

/* The types with one d per block: Q8_0, Q4_0, Q5_0 (blocks of 32) and GPTQ4 (128). Stored weights
 * are above their value by a constant, which the sums take off again. */
X_INLINE void rows_flat(const job *j, const int rows, const int type)
{
    const int parts = type == KERN_GPTQ4 ? 4 : 1;
    const int blocks = j->a->k / (32 * parts);
    const int zero = type == KERN_Q8_0 ? 128 : type == KERN_Q5_0 ? 16 : 8;
    const int bytes = type == KERN_Q8_0 ? 512 : type == KERN_Q5_0 ? 320 : 256;
    /* pairs of sums: all of them for GPTQ4, else the first of each pair */
    const __m512i offset =
        parts == 4 ? _mm512_set1_epi16((short)-zero) : _mm512_set1_epi32(-zero & 0xFFFF);
    const uint8_t *p = j->panel + x_panel_head(blocks);
    const int8_t *x[8];
    __m512 acc[8];
    start(j, x, acc, rows);
    for (int b = 0; b < blocks; b++) {
        const __m512 d = x_half16(j->panel + 32 * (size_t)b);
        __m512i s[8];
        X_UNROLL
        for (int i = 0; i < rows; i++) {
            const int16_t *sums = row_sum32(j, i) + parts * b;
            s[i] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), offset, x_pair(sums));
            if (parts == 4) s[i] = _mm512_dpwssd_epi32(s[i], offset, x_pair(sums + 2));
        }
        for (int part = 0; part < parts; part++, p += bytes) {
            x_ahead(p, bytes);
            X_UNROLL
            for (int n = 0; n < 8; n++)
                dot(s, flat_code(p, order[n], type), x, 4 * order[n], rows);
            X_UNROLL
            for (int i = 0; i < rows; i++)
                x[i] += 32;
        }
        X_UNROLL
        for (int i = 0; i < rows; i++)
            acc[i] = _mm512_fmadd_ps(_mm512_set1_ps(row_scale(j, i)[b]),
                                     _mm512_mul_ps(d, _mm512_cvtepi32_ps(s[i])), acc[i]);
    }
    store_rows(j, acc, rows);
}

/* F32, F16: one chain of fused multiply-adds per output, as the specification wants it. */
X_INLINE void rows_float(const job *j, const int rows, const bool half)
{
    const uint8_t *p = j->panel;
    const float *x[8];
    __m512 acc[8];
    X_UNROLL
    for (int i = 0; i < rows; i++) {
        x[i] = j->a->x + (size_t)(j->r + i) * j->a->ldx;
        acc[i] = _mm512_setzero_ps();
    }
    for (int k = 0; k < j->a->k; k++, p += half ? 32 : 64) {
        const __m512 w = half ? x_half16(p) : _mm512_loadu_ps(p);
        x_ahead(p, 64);
        X_UNROLL
        for (int i = 0; i < rows; i++)
            acc[i] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[i][k]), acc[i]);
    }
    store_rows(j, acc, rows);
}

/* BF16 as TDPBF16PS computes it: per 32 weights an even and an odd chain. */
X_INLINE void rows_bf16(const job *j, const int rows)
{
    const int blocks = (j->a->k + 31) / 32;
    const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000U);
    const uint8_t *p = j->panel;
    _Alignas(64) float xe[8][16], xo[8][16]; /* the rows' 32 values as floats, even and odd */
    __m512 acc[8];
    X_UNROLL
    for (int i = 0; i < rows; i++)
        acc[i] = _mm512_setzero_ps();
    for (int b = 0; b < blocks; b++) {
        __m512 e[8], o[8];
        X_UNROLL
        for (int i = 0; i < rows; i++) {
            const __m512i x = x_load(j->a->h + (size_t)(j->r + i) * j->a->ldh + 32 * (size_t)b);
            _mm512_store_si512(xe[i], _mm512_slli_epi32(x, 16));
            _mm512_store_si512(xo[i], _mm512_and_si512(x, upper));
            e[i] = o[i] = _mm512_setzero_ps();
        }
        for (int t = 0; t < 16; t++, p += 64) {
            const __m512i w = x_load(p);
            const __m512 we = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
            const __m512 wo = _mm512_castsi512_ps(_mm512_and_si512(w, upper));
            x_ahead(p, 64);
            X_UNROLL
            for (int i = 0; i < rows; i++) {
                e[i] = _mm512_fmadd_ps(_mm512_set1_ps(xe[i][t]), we, e[i]);
                o[i] = _mm512_fmadd_ps(_mm512_set1_ps(xo[i][t]), wo, o[i]);
            }
        }
        X_UNROLL
        for (int i = 0; i < rows; i++)
            acc[i] = _mm512_add_ps(acc[i], _mm512_add_ps(e[i], o[i]));
    }
    store_rows(j, acc, rows);
}

X_INLINE void rows_any(const job *j, const int rows, const int type)
{
    if (type == KERN_Q4_K || type == KERN_Q5_K)
        rows_k(j, rows, type == KERN_Q5_K);
    else if (type == KERN_Q6_K)
        rows_q6_k(j, rows);
    else if (type == KERN_BF16)
        rows_bf16(j, rows);
    else if (type == KERN_F32 || type == KERN_F16)
        rows_float(j, rows, type == KERN_F16);
    else
        rows_flat(j, rows, type);
}

/* Groups of eight, and one of what is left. */
X_INLINE void all_rows(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a,
                       const int type)
{
    for (job j = {.y = y, .ldy = ldy, .panel = panel, .a = a}; j.r < a->m; j.r += 8) {
        switch (a->m - j.r) {
        case 7:
            rows_any(&j, 7, type);
            break;
        case 6:
            rows_any(&j, 6, type);
            break;
        case 5:
            rows_any(&j, 5, type);
            break;
        case 4:
            rows_any(&j, 4, type);
            break;
        case 3:
            rows_any(&j, 3, type);
            break;
        case 2:
            rows_any(&j, 2, type);
            break;
        case 1:
            rows_any(&j, 1, type);
            break;
        default:
            rows_any(&j, 8, type);
        }
    }
}

static void q4_0(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_Q4_0);
}

static void q5_0(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_Q5_0);
}

static void q8_0(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_Q8_0);
}

static void q4_k(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_Q4_K);
}

static void q5_k(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_Q5_K);
}

static void q6_k(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_Q6_K);
}

static void gptq4(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_GPTQ4);
}

static void f32(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_F32);
}

static void f16(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_F16);
}

static void bf16(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    const unsigned saved = _mm_getcsr();
    _mm_setcsr(saved | 0x8040); /* FTZ, DAZ: what TDPBF16PS does whatever MXCSR says */
    all_rows(y, ldy, panel, a, KERN_BF16);
    _mm_setcsr(saved);
}

const kern_gemm TABLE = {
    .name = "avx512",
    .q4_0 = q4_0,
    .q5_0 = q5_0,
    .q8_0 = q8_0,
    .q4_k = q4_k,
    .q5_k = q5_k,
    .q6_k = q6_k,
    .gptq4 = gptq4,
    .f32 = f32,
    .f16 = f16,
    .bf16 = bf16,
};
