/*
 * gemm_avx2: the panel products for AVX2 with FMA and F16C. A panel is taken as two halves of eight
 * columns, a vector of 32 bytes each holding four weights of every column.
 *
 * Weights meet a row by vpmaddubsw, whose 16-bit pairs must not saturate: |x| <= 127, so nibbles
 * (2 * 15 * 127 = 3810) may be added up eight times, five-bit codes four times and six-bit codes
 * twice before vpmaddwd widens them, together with the sub-block's scale. Q8_0 uses |w| <= 128 and
 * moves the sign to x: 2 * 128 * 127 fits as well, once. Up to MAX_ROWS rows share one unpacking;
 * more go to gemm_avx2_many.c, except those of floats. Integers are exact, so only the float step
 * of a block has a fixed form: ops.h's, bit for bit.
 */
#include "kernels/cpu/x256.h"

/* BF16: so many rows meet so many blocks before the next ones, so that memory is read at one pace;
 * more rows meet a whole panel, since their own bytes no longer stay in L1. */
enum { BF16_ROWS = 12, BF16_BLOCKS = 4 };

typedef struct job {
    float *y;
    size_t ldy;
    const uint8_t *panel;
    const kern_rows *a;
    int r;           /* first row of the group */
    int first, last; /* BF16: blocks of 32 that the rows meet in this round */
} job;

INLINE const int8_t *row_q(const job *j, int i)
{
    return j->a->q + (size_t)(j->r + i) * j->a->ldq;
}

INLINE float row_scale(const job *j, int i, int b)
{
    return j->a->scale[(size_t)(j->r + i) * j->a->lds + (size_t)b];
}

INLINE const int16_t *row_sum16(const job *j, int i)
{
    return j->a->sum16 + (size_t)(j->r + i) * j->a->ldsum;
}

INLINE const int16_t *row_sum32(const job *j, int i)
{
    return j->a->sum32 + (size_t)(j->r + i) * j->a->ldsum;
}

INLINE void add_block(float (*acc)[16], const int rows, const int half, const job *j, int b,
                      const __m256 *v)
{
    UNROLL
    for (int i = 0; i < rows; i++) {
        float *at = acc[i] + 8 * half;
        _mm256_store_ps(
            at, _mm256_fmadd_ps(_mm256_set1_ps(row_scale(j, i, b)), v[i], _mm256_load_ps(at)));
    }
}

INLINE void store_rows(const job *j, const float (*acc)[16], const int rows)
{
    for (int i = 0; i < rows; i++)
        memcpy(j->y + (size_t)(j->r + i) * j->ldy, acc[i], 16 * sizeof(float));
}

/* ---- Q4_K, Q5_K ---- */

INLINE void block_k(const job *j, const int rows, const bool five, const uint8_t *p, int b,
                    const int half, float (*acc)[16])
{
    const __m256i low = _mm256_set1_epi8(15), bit = _mm256_set1_epi8(16);
    const uint8_t *high = p + HEAD_K + 32 * half, *nibbles = high + (five ? 512 : 0);
    const int8_t *x[MAX_ROWS];
    __m256i total[MAX_ROWS], s[MAX_ROWS];
    __m256 v[MAX_ROWS];
    head h;
    head_k(&h, p, half);
    zero(total, rows);
    UNROLL
    for (int i = 0; i < rows; i++)
        x[i] = row_q(j, i) + 256 * b;
    for (int c = 0; c < 8; c++, nibbles += NIBBLES, high += 64) {
        zero(s, rows);
        if (half == 0) ahead(nibbles, NIBBLES);
        if (!five) {
            UNROLL
            for (int t = 0; t < 4; t++) {
                const __m256i w = load(nibbles + 64 * t);
                meet(s, _mm256_and_si256(w, low), x, 4 * t, rows);
                meet(s, _mm256_and_si256(_mm256_srli_epi16(w, 4), low), x, 16 + 4 * t, rows);
            }
        } else {
            /* all low nibbles, then all high ones: four five-bit codes a sum */
            __m256i fifth = load(high), fifth_up = _mm256_slli_epi16(fifth, 4);
            UNROLL
            for (int t = 0; t < 4; t++) {
                const __m256i w = _mm256_and_si256(load(nibbles + 64 * t), low);
                meet(s, _mm256_or_si256(w, _mm256_and_si256(fifth_up, bit)), x, 4 * t, rows);
                fifth_up = _mm256_srli_epi16(fifth_up, 1);
            }
            UNROLL
            for (int i = 0; i < rows; i++)
                total[i] = madd_add(total[i], s[i], h.sc[c]);
            zero(s, rows);
            UNROLL
            for (int t = 0; t < 4; t++) {
                const __m256i w =
                    _mm256_and_si256(_mm256_srli_epi16(load(nibbles + 64 * t), 4), low);
                meet(s, _mm256_or_si256(w, _mm256_and_si256(fifth, bit)), x, 16 + 4 * t, rows);
                fifth = _mm256_srli_epi16(fifth, 1);
            }
        }
        UNROLL
        for (int i = 0; i < rows; i++) {
            total[i] = madd_add(total[i], s[i], h.sc[c]);
            x[i] += 32;
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++) {
        const int16_t *sums = row_sum32(j, i) + 8 * b;
        __m256i mins = _mm256_setzero_si256();
        UNROLL
        for (int c = 0; c < 4; c++)
            mins = madd_add(mins, h.min[c], word4(sums + 2 * c));
        const __m256 t = _mm256_mul_ps(h.dmin, _mm256_cvtepi32_ps(mins));
        v[i] = _mm256_fmsub_ps(h.d, _mm256_cvtepi32_ps(total[i]), t);
    }
    add_block(acc, rows, half, j, b, v);
}

INLINE void rows_k(const job *j, const int rows, const bool five)
{
    _Alignas(32) float acc[MAX_ROWS][16] = {{0}};
    const uint8_t *p = j->panel;
    for (int b = 0; b < j->a->k / 256; b++, p += five ? BLOCK_Q5_K : BLOCK_Q4_K) {
        ahead(p, five ? 768 : 256);
        block_k(j, rows, five, p, b, 0, acc);
        block_k(j, rows, five, p, b, 1, acc);
    }
    store_rows(j, (const float(*)[16])acc, rows);
}

/* ---- Q6_K ---- */

/* 16 weights: vectors 4u .. 4u+3 of the 32 at x, codes from nibbles (shifted by `shift`) and high.
 */
INLINE void six16(__m256i *total, const uint8_t *nibbles, const int shift, __m256i high,
                  __m256i scale, const int8_t *const *x, const int at, const int rows)
{
    const __m256i low = _mm256_set1_epi8(15), two = _mm256_set1_epi8(0x30);
    const __m256i up[4] = {_mm256_slli_epi16(high, 4), _mm256_slli_epi16(high, 2), high,
                           _mm256_srli_epi16(high, 2)};
    __m256i s[MAX_ROWS];
    UNROLL
    for (int t = 0; t < 4; t++) {
        __m256i w = load(nibbles + 64 * t);
        if (shift) w = _mm256_srli_epi16(w, 4);
        w = _mm256_or_si256(_mm256_and_si256(w, low), _mm256_and_si256(up[t], two));
        if (t % 2 == 0) zero(s, rows);
        meet(s, w, x, at + 4 * t, rows);
        if (t % 2 == 0) continue;
        UNROLL
        for (int i = 0; i < rows; i++)
            total[i] = madd_add(total[i], s[i], scale);
    }
}

INLINE void block_q6(const job *j, const int rows, const uint8_t *p, int b, const int half,
                     float (*acc)[16])
{
    const uint8_t *high = p + 256 + 32 * half, *nibbles = p + 1280 + 32 * half;
    const __m256i minus = _mm256_set1_epi32(-32);
    const int8_t *x[MAX_ROWS];
    __m256i total[MAX_ROWS], offset[MAX_ROWS];
    __m256 v[MAX_ROWS];
    zero(total, rows);
    zero(offset, rows);
    UNROLL
    for (int i = 0; i < rows; i++)
        x[i] = row_q(j, i) + 256 * b;
    for (int g = 0; g < 4; g++) { /* 64 weights, four scales in the bytes of each lane */
        const __m256i scales = load(p + 64 * g + 32 * half);
        UNROLL
        for (int c = 0; c < 2; c++) {
            UNROLL
            for (int u = 0; u < 2; u++) {
                const int n = 2 * c + u;
                const __m256i scale = signed_pair(scales, n, n);
                six16(total, nibbles, 4 * u, load(high + 64 * u), scale, x, 16 * u, rows);
            }
            const __m256i both = signed_pair(scales, 2 * c, 2 * c + 1);
            UNROLL
            for (int i = 0; i < rows; i++) {
                offset[i] =
                    madd_add(offset[i], both, word4(row_sum16(j, i) + 16 * b + 4 * g + 2 * c));
                x[i] += 32;
            }
            if (half == 0) ahead(nibbles, NIBBLES);
            nibbles += NIBBLES;
            high += 128;
        }
    }
    const __m256 d = half8(j->panel + 32 * (size_t)b + 16 * half);
    UNROLL
    for (int i = 0; i < rows; i++) {
        total[i] = _mm256_add_epi32(total[i], _mm256_mullo_epi32(offset[i], minus));
        v[i] = _mm256_mul_ps(d, _mm256_cvtepi32_ps(total[i]));
    }
    add_block(acc, rows, half, j, b, v);
}

INLINE void rows_q6_k(const job *j, const int rows)
{
    _Alignas(32) float acc[MAX_ROWS][16] = {{0}};
    const int blocks = j->a->k / 256;
    const uint8_t *p = j->panel + panel_head(blocks);
    for (int b = 0; b < blocks; b++, p += BLOCK_Q6_K) {
        ahead(p, 1280);
        block_q6(j, rows, p, b, 0, acc);
        block_q6(j, rows, p, b, 1, acc);
    }
    store_rows(j, (const float(*)[16])acc, rows);
}

/* ---- Q4_0, Q5_0, Q8_0, GPTQ4 ---- */

/* 32 weights of eight columns into 32-bit sums, the zero point still inside (not for Q8_0). */
INLINE void part_flat(__m256i *total, const uint8_t *p, const int type, const int8_t *const *x,
                      const int rows)
{
    const __m256i low = _mm256_set1_epi8(15), bit = _mm256_set1_epi8(16);
    const __m256i ones = _mm256_set1_epi16(1), flip = _mm256_set1_epi8((char)0x80);
    __m256i s[MAX_ROWS];
    if (type == KERN_Q8_0) {
        UNROLL
        for (int t = 0; t < 8; t++) {
            const __m256i w = _mm256_xor_si256(load(p + 64 * t), flip), size = _mm256_abs_epi8(w);
            UNROLL
            for (int i = 0; i < rows; i++) {
                const __m256i signed_x = _mm256_sign_epi8(word4(x[i] + 4 * t), w);
                total[i] = madd_add(total[i], _mm256_maddubs_epi16(size, signed_x), ones);
            }
        }
        return;
    }
    __m256i fifth = _mm256_setzero_si256();
    if (type == KERN_Q5_0) {
        fifth = load(p);
        p += 64;
    }
    UNROLL
    for (int nibble = 0; nibble < 2; nibble++) {
        if (nibble == 0 || type == KERN_Q5_0) zero(s, rows);
        UNROLL
        for (int t = 0; t < 4; t++) {
            __m256i w = load(p + 64 * t);
            if (nibble) w = _mm256_srli_epi16(w, 4);
            w = _mm256_and_si256(w, low);
            if (type == KERN_Q5_0) {
                const __m256i up =
                    nibble ? _mm256_srli_epi16(fifth, t) : _mm256_slli_epi16(fifth, 4 - t);
                w = _mm256_or_si256(w, _mm256_and_si256(up, bit));
            }
            meet(s, w, x, 16 * nibble + 4 * t, rows);
        }
        if (nibble == 0 && type != KERN_Q5_0) continue;
        UNROLL
        for (int i = 0; i < rows; i++)
            total[i] = madd_add(total[i], s[i], ones);
    }
}

INLINE void rows_flat(const job *j, const int rows, const int type)
{
    _Alignas(32) float acc[MAX_ROWS][16] = {{0}};
    const int parts = type == KERN_GPTQ4 ? 4 : 1, blocks = j->a->k / (32 * parts);
    const int bytes = flat_bytes(type);
    const int zero_point = type == KERN_Q8_0 ? 0 : type == KERN_Q5_0 ? 16 : 8;
    const uint8_t *p = j->panel + panel_head(blocks);
    const int8_t *x[MAX_ROWS];
    for (int b = 0; b < blocks; b++, p += bytes * parts) {
        ahead(p, bytes);
        UNROLL
        for (int half = 0; half < 2; half++) {
            const __m256 d = half8(j->panel + 32 * (size_t)b + 16 * half);
            __m256i total[MAX_ROWS];
            __m256 v[MAX_ROWS];
            UNROLL
            for (int i = 0; i < rows; i++) {
                const int16_t *sums = row_sum32(j, i) + parts * b;
                int32_t sum = 0;
                for (int c = 0; c < parts && zero_point; c++)
                    sum += sums[c];
                total[i] = _mm256_set1_epi32(-zero_point * sum);
                x[i] = row_q(j, i) + 32 * parts * b;
            }
            for (int part = 0; part < parts; part++) {
                if (half == 0 && part > 0) ahead(p + part * bytes, bytes);
                part_flat(total, p + part * bytes + 32 * half, type, x, rows);
                UNROLL
                for (int i = 0; i < rows; i++)
                    x[i] += 32;
            }
            UNROLL
            for (int i = 0; i < rows; i++)
                v[i] = _mm256_mul_ps(d, _mm256_cvtepi32_ps(total[i]));
            add_block(acc, rows, half, j, b, v);
        }
    }
    store_rows(j, (const float(*)[16])acc, rows);
}

/* ---- floats ---- */

INLINE void rows_float(const job *j, const int rows, const bool is_half)
{
    const uint8_t *p = j->panel;
    const float *x[MAX_ROWS];
    __m256 a[MAX_ROWS], c[MAX_ROWS];
    UNROLL
    for (int i = 0; i < rows; i++) {
        x[i] = j->a->x + (size_t)(j->r + i) * j->a->ldx;
        a[i] = c[i] = _mm256_setzero_ps();
    }
    for (int k = 0; k < j->a->k; k++, p += is_half ? 32 : 64) {
        const __m256 w0 = is_half ? half8(p) : _mm256_loadu_ps((const float *)(const void *)p);
        const __m256 w1 =
            is_half ? half8(p + 16) : _mm256_loadu_ps((const float *)(const void *)(p + 32));
        ahead(p, 64);
        UNROLL
        for (int i = 0; i < rows; i++) {
            const __m256 v = _mm256_broadcast_ss(x[i] + k);
            a[i] = _mm256_fmadd_ps(w0, v, a[i]);
            c[i] = _mm256_fmadd_ps(w1, v, c[i]);
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++) {
        float *y = j->y + (size_t)(j->r + i) * j->ldy;
        _mm256_storeu_ps(y, a[i]);
        _mm256_storeu_ps(y + 8, c[i]);
    }
}

/* The chains of the even or the odd ones of 32 weights, of all 16 columns: of four rows eight, as
 * many as it takes to keep two multipliers of four cycles busy. */
INLINE void chains(__m256 (*c)[2], const float (*x)[16], const uint8_t *p, const bool odd,
                   const int rows)
{
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000U);
    UNROLL
    for (int i = 0; i < rows; i++)
        c[i][0] = c[i][1] = _mm256_setzero_ps();
    for (int t = 0; t < 16; t++, p += 64) {
        __m256i w0 = load(p), w1 = load(p + 32);
        if (!odd) ahead(p, 64); /* the second time it is there */
        w0 = odd ? _mm256_and_si256(w0, upper) : _mm256_slli_epi32(w0, 16);
        w1 = odd ? _mm256_and_si256(w1, upper) : _mm256_slli_epi32(w1, 16);
        UNROLL
        for (int i = 0; i < rows; i++) {
            const __m256 v = _mm256_broadcast_ss(&x[i][t]);
            c[i][0] = _mm256_fmadd_ps(v, _mm256_castsi256_ps(w0), c[i][0]);
            c[i][1] = _mm256_fmadd_ps(v, _mm256_castsi256_ps(w1), c[i][1]);
        }
    }
}

INLINE void rows_bf16(const job *j, const int rows)
{
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000U);
    _Alignas(32) float acc[MAX_ROWS][16], even[MAX_ROWS][16], odd[MAX_ROWS][16];
    const uint8_t *p = j->panel + (size_t)j->first * 1024;
    for (int i = 0; i < rows; i++)
        memcpy(acc[i], j->y + (size_t)(j->r + i) * j->ldy, sizeof acc[i]);
    for (int b = j->first; b < j->last; b++, p += 1024) {
        __m256 e[MAX_ROWS][2], o[MAX_ROWS][2];
        UNROLL
        for (int i = 0; i < rows; i++) {
            const uint16_t *h = j->a->h + (size_t)(j->r + i) * j->a->ldh + 32 * (size_t)b;
            UNROLL
            for (int c = 0; c < 2; c++) {
                const __m256i x = load(h + 16 * c);
                _mm256_store_si256((__m256i *)(even[i] + 8 * c), _mm256_slli_epi32(x, 16));
                _mm256_store_si256((__m256i *)(odd[i] + 8 * c), _mm256_and_si256(x, upper));
            }
        }
        chains(e, (const float(*)[16])even, p, false, rows);
        chains(o, (const float(*)[16])odd, p, true, rows);
        UNROLL
        for (int i = 0; i < rows; i++) {
            UNROLL
            for (int c = 0; c < 2; c++) {
                float *at = acc[i] + 8 * c;
                _mm256_store_ps(at,
                                _mm256_add_ps(_mm256_load_ps(at), _mm256_add_ps(e[i][c], o[i][c])));
            }
        }
    }
    store_rows(j, (const float(*)[16])acc, rows);
}

/* ---- entries ---- */

INLINE void rows_any(const job *j, const int rows, const int type)
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

INLINE void groups(job *j, const int type)
{
    for (; j->a->m - j->r >= MAX_ROWS; j->r += MAX_ROWS)
        rows_any(j, MAX_ROWS, type);
    switch (j->a->m - j->r) {
    case 3:
        rows_any(j, 3, type);
        break;
    case 2:
        rows_any(j, 2, type);
        break;
    case 1:
        rows_any(j, 1, type);
        break;
    default:
        break;
    }
}

INLINE void all_rows(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a, const int type)
{
    job j = {.y = y, .ldy = ldy, .panel = panel, .a = a};
    groups(&j, type);
}

static void q4_0(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    if (a->m > MAX_ROWS)
        kern_gemm_avx2_many.q4_0(y, ldy, panel, a);
    else
        all_rows(y, ldy, panel, a, KERN_Q4_0);
}

static void q5_0(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    if (a->m > MAX_ROWS)
        kern_gemm_avx2_many.q5_0(y, ldy, panel, a);
    else
        all_rows(y, ldy, panel, a, KERN_Q5_0);
}

static void q8_0(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    if (a->m > MAX_ROWS)
        kern_gemm_avx2_many.q8_0(y, ldy, panel, a);
    else
        all_rows(y, ldy, panel, a, KERN_Q8_0);
}

static void q4_k(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    if (a->m > MAX_ROWS)
        kern_gemm_avx2_many.q4_k(y, ldy, panel, a);
    else
        all_rows(y, ldy, panel, a, KERN_Q4_K);
}

static void q5_k(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    if (a->m > MAX_ROWS)
        kern_gemm_avx2_many.q5_k(y, ldy, panel, a);
    else
        all_rows(y, ldy, panel, a, KERN_Q5_K);
}

static void q6_k(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    if (a->m > MAX_ROWS)
        kern_gemm_avx2_many.q6_k(y, ldy, panel, a);
    else
        all_rows(y, ldy, panel, a, KERN_Q6_K);
}

static void gptq4(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    if (a->m > MAX_ROWS)
        kern_gemm_avx2_many.gptq4(y, ldy, panel, a);
    else
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
    const int blocks = (a->k + 31) / 32;
    const unsigned saved = _mm_getcsr();
    _mm_setcsr(saved | 0x8040); /* denormals are zero, going in and coming out */
    for (int r = 0; r < a->m; r++)
        memset(y + (size_t)r * ldy, 0, 16 * sizeof(float));
    for (job j = {.y = y, .ldy = ldy, .panel = panel, .a = a}; j.last < blocks; j.first = j.last) {
        j.last =
            a->m > BF16_ROWS || blocks - j.first < BF16_BLOCKS ? blocks : j.first + BF16_BLOCKS;
        j.r = 0;
        groups(&j, KERN_BF16);
    }
    _mm_setcsr(saved);
}

const kern_gemm kern_gemm_avx2 = {.name = "avx2",
                                  .q4_0 = q4_0,
                                  .q5_0 = q5_0,
                                  .q8_0 = q8_0,
                                  .q4_k = q4_k,
                                  .q5_k = q5_k,
                                  .q6_k = q6_k,
                                  .gptq4 = gptq4,
                                  .f32 = f32,
                                  .f16 = f16,
                                  .bf16 = bf16};
