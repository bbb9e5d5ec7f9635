/*
 * vec_avx512: the vector functions with AVX-512 (F, BW, VL, DQ). One register is the 16 lanes of
 * the specification (vec_scalar.c), so the order of every sum falls out of the width; tails are
 * masked, and a masked lane keeps its value, since adding a zero to it could change the sign of a
 * zero.
 *
 * Attention takes 16 positions at a time: their 16 accumulators hide the latency of the fused
 * multiply-add, and their 16 trees of additions become one transposing tree. There is no software
 * prefetch: positions often lie 4 KB apart, in the same few sets of L1, and fetching ahead evicted
 * what was about to be read (a head over 2048 positions took 110 us with it, 86 without).
 */
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "kernels/cpu/ops.h"

#define INLINE static inline __attribute__((always_inline))

enum { POSITIONS = 16 }; /* scored together */

INLINE __mmask16 tail_mask(int n)
{
    return (__mmask16)((1u << n) - 1u);
}

INLINE float add_lanes(__m512 v)
{
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}

/* kern_exp in 16 lanes. */
INLINE __m512 exp16(__m512 x)
{
    const __m512 magic = _mm512_set1_ps(0x1.8p23f);
    __mmask16 is_low = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_LT_OQ);
    __mmask16 is_high = _mm512_cmp_ps_mask(x, _mm512_set1_ps(88.0f), _CMP_GT_OQ);
    __m512 z = _mm512_fmadd_ps(x, _mm512_set1_ps(0x1.715476p+0f), magic);
    __m512 n = _mm512_sub_ps(z, magic);
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0x1.62e430p-1f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(0x1.05c610p-29f), r);
    __m512 q = _mm512_set1_ps(0x1.6d117cp-10f);
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.120be2p-7f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.555518p-5f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.5554dcp-3f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.5f));
    __m512 p = _mm512_add_ps(_mm512_fmadd_ps(q, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    __m512i scale = _mm512_sub_epi32(_mm512_castps_si512(z), _mm512_set1_epi32(0x4b400000 - 127));
    p = _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(scale, 23)));
    p = _mm512_mask_mov_ps(p, is_high, _mm512_set1_ps(INFINITY));
    return _mm512_mask_mov_ps(p, is_low, _mm512_setzero_ps());
}

INLINE __m512i magnitude(__m512 x)
{
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

static float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static void act_q8(int8_t *q, float *scale, const float *x, int k, int block)
{
    for (int b = 0; b < k / block; b++, x += block, q += block) {
        __m512i m = _mm512_setzero_si512();
        for (int i = 0; i < block; i += 16)
            m = _mm512_max_epu32(m, magnitude(_mm512_loadu_ps(x + i)));
        uint32_t top = _mm512_reduce_max_epu32(m);
        float amax = float_of(top);
        if (top >= 0x7f800000u || amax < 1e-36f) {
            memset(q, 0, (size_t)block);
            scale[b] = top >= 0x7f800000u ? float_of(0x7fc00000u) : 0.0f;
            continue;
        }
        __m512 inv = _mm512_set1_ps(127.0f / amax);
        scale[b] = amax / 127.0f;
        for (int i = 0; i < block; i += 16) {
            __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inv));
            _mm_storeu_si128((__m128i *)(void *)(q + i), _mm512_cvtepi32_epi8(v));
        }
    }
}

INLINE __m256i bf16_of(__m512 x)
{
    __m512i u = _mm512_castps_si512(x), m = magnitude(x), top = _mm512_srli_epi32(u, 16);
    __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    r = _mm512_srli_epi32(r, 16);
    __mmask16 is_nan = _mm512_cmpgt_epu32_mask(m, _mm512_set1_epi32(0x7f800000));
    __mmask16 is_tiny = _mm512_cmplt_epu32_mask(m, _mm512_set1_epi32(0x00800000));
    r = _mm512_mask_or_epi32(r, is_nan, top, _mm512_set1_epi32(0x40));
    r = _mm512_mask_and_epi32(r, is_tiny, top, _mm512_set1_epi32(0x8000));
    return _mm512_cvtepi32_epi16(r);
}

static void act_bf16(uint16_t *h, const float *x, int k)
{
    int i = 0;
    for (; i + 16 <= k; i += 16)
        _mm256_storeu_si256((__m256i *)(void *)(h + i), bf16_of(_mm512_loadu_ps(x + i)));
    if (i < k) {
        __mmask16 mask = tail_mask(k - i);
        _mm256_mask_storeu_epi16(h + i, mask, bf16_of(_mm512_maskz_loadu_ps(mask, x + i)));
    }
}

/* Sums of 8 neighbours of 64 values; the absolute difference to zero sums unsigned bytes. */
INLINE __m128i sums_of_8(const int8_t *q)
{
    __m512i v = _mm512_xor_si512(_mm512_loadu_si512(q), _mm512_set1_epi8((char)0x80));
    __m512i s = _mm512_sad_epu8(v, _mm512_setzero_si512());
    return _mm_sub_epi16(_mm512_cvtepi64_epi16(s), _mm_set1_epi16(8 * 128));
}

static void act_sums(int16_t *sum16, int16_t *sum32, const int8_t *q, int k)
{
    int i = 0;
    for (; i + 256 <= k; i += 256) {
        __m512i s8 = _mm512_castsi128_si512(sums_of_8(q + i));
        s8 = _mm512_inserti32x4(s8, sums_of_8(q + i + 64), 1);
        s8 = _mm512_inserti32x4(s8, sums_of_8(q + i + 128), 2);
        s8 = _mm512_inserti32x4(s8, sums_of_8(q + i + 192), 3);
        __m256i s16 = _mm512_cvtepi32_epi16(_mm512_madd_epi16(s8, _mm512_set1_epi16(1)));
        _mm256_storeu_si256((__m256i *)(void *)(sum16 + i / 16), s16);
        __m128i s32 = _mm256_cvtepi32_epi16(_mm256_madd_epi16(s16, _mm256_set1_epi16(1)));
        _mm_storeu_si128((__m128i *)(void *)(sum32 + i / 32), s32);
    }
    for (; i < k; i += 16) {
        int sum = 0;
        for (int j = 0; j < 16; j++)
            sum += q[i + j];
        sum16[i / 16] = (int16_t)sum;
        if (i % 32 == 16) sum32[i / 32] = (int16_t)(sum16[i / 16 - 1] + sum);
    }
}

static void rms_norm(float *y, const float *x, const float *w, int n, float eps)
{
    __m512 sum = _mm512_setzero_ps();
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    __mmask16 mask = tail_mask(n - i);
    __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    sum = _mm512_mask3_fmadd_ps(v, v, sum, mask);
    __m512 inv = _mm512_set1_ps(1.0f / sqrtf(add_lanes(sum) / (float)n + eps));
    for (i = 0; i + 16 <= n; i += 16) {
        __m512 t = _mm512_mul_ps(_mm512_loadu_ps(x + i), inv);
        _mm512_storeu_ps(y + i, _mm512_mul_ps(t, _mm512_loadu_ps(w + i)));
    }
    __m512 t = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inv);
    _mm512_mask_storeu_ps(y + i, mask, _mm512_mul_ps(t, _mm512_maskz_loadu_ps(mask, w + i)));
}

static void axpy(float *y, const float *x, float a, int n)
{
    __m512 f = _mm512_set1_ps(a);
    int i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(y + i, _mm512_fmadd_ps(f, _mm512_loadu_ps(x + i), _mm512_loadu_ps(y + i)));
    __mmask16 mask = tail_mask(n - i);
    __m512 v =
        _mm512_fmadd_ps(f, _mm512_maskz_loadu_ps(mask, x + i), _mm512_maskz_loadu_ps(mask, y + i));
    _mm512_mask_storeu_ps(y + i, mask, v);
}

static void add(float *y, const float *x, int n)
{
    int i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(y + i, _mm512_add_ps(_mm512_loadu_ps(y + i), _mm512_loadu_ps(x + i)));
    __mmask16 mask = tail_mask(n - i);
    __m512 v =
        _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y + i), _mm512_maskz_loadu_ps(mask, x + i));
    _mm512_mask_storeu_ps(y + i, mask, v);
}

static float dot(const float *a, const float *b, int n)
{
    __m512 sum = _mm512_setzero_ps();
    int i = 0;
    for (; i + 16 <= n; i += 16)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
    __mmask16 mask = tail_mask(n - i);
    sum = _mm512_mask3_fmadd_ps(_mm512_maskz_loadu_ps(mask, a + i),
                                _mm512_maskz_loadu_ps(mask, b + i), sum, mask);
    return add_lanes(sum);
}

static bool softmax(float *x, int n)
{
    __m512 max = _mm512_set1_ps(-INFINITY);
    __m512i top = _mm512_setzero_si512();
    int full = n & ~15;
    __mmask16 mask = tail_mask(n - full);
    for (int i = 0; i < full; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        top = _mm512_max_epu32(top, magnitude(v));
        max = _mm512_max_ps(max, v);
    }
    __m512 rest = _mm512_maskz_loadu_ps(mask, x + full);
    top = _mm512_max_epu32(top, magnitude(rest));
    max = _mm512_mask_max_ps(max, mask, max, rest);
    if (_mm512_reduce_max_epu32(top) >= 0x7f800000u) return false;
    __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(max)), sum = _mm512_setzero_ps();
    for (int i = 0; i < full; i += 16) {
        __m512 e = exp16(_mm512_sub_ps(_mm512_loadu_ps(x + i), most));
        sum = _mm512_add_ps(sum, e);
        _mm512_storeu_ps(x + i, e);
    }
    rest = exp16(_mm512_sub_ps(rest, most));
    sum = _mm512_mask_add_ps(sum, mask, sum, rest);
    __m512 all = _mm512_set1_ps(add_lanes(sum));
    for (int i = 0; i < full; i += 16)
        _mm512_storeu_ps(x + i, _mm512_div_ps(_mm512_loadu_ps(x + i), all));
    _mm512_mask_storeu_ps(x + full, mask, _mm512_div_ps(rest, all));
    return true;
}

static void exp_sub(float *y, const float *x, float shift, int n)
{
    const __m512 minus = _mm512_set1_ps(shift);
    for (int i = 0; i < n; i += 16) {
        __mmask16 mask = n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : (__mmask16)0xffff;
        __m512 e = exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), minus));
        _mm512_mask_storeu_ps(y + i, mask, e);
    }
}

INLINE __m512 silu16(__m512 gate, __m512 up)
{
    __m512 e = exp16(_mm512_xor_ps(gate, _mm512_set1_ps(-0.0f)));
    __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), e);
    return _mm512_mul_ps(_mm512_div_ps(gate, d), up);
}

static void silu_mul(float *y, const float *gate, const float *up, int n)
{
    int i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(y + i, silu16(_mm512_loadu_ps(gate + i), _mm512_loadu_ps(up + i)));
    __mmask16 mask = tail_mask(n - i);
    __m512 v = silu16(_mm512_maskz_loadu_ps(mask, gate + i), _mm512_maskz_loadu_ps(mask, up + i));
    _mm512_mask_storeu_ps(y + i, mask, v);
}

static void rope(float *x, const float *cos_sin, int dim)
{
    int half = dim / 2;
    for (int i = 0; i < half; i += 16) {
        __mmask16 mask = tail_mask(half - i < 16 ? half - i : 16);
        __m512 a = _mm512_maskz_loadu_ps(mask, x + i);
        __m512 b = _mm512_maskz_loadu_ps(mask, x + half + i);
        __m512 c = _mm512_maskz_loadu_ps(mask, cos_sin + i);
        __m512 s = _mm512_maskz_loadu_ps(mask, cos_sin + half + i);
        _mm512_mask_storeu_ps(x + i, mask, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        _mm512_mask_storeu_ps(x + half + i, mask, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
    }
}

/* ---- attention ---- */

/* Trees of 16 accumulators at once: after each step a register holds the halves of two of the last.
 * Lane t of the result is the sum of a[t]. */
INLINE __m512 add_lanes_16(__m512 *a)
{
    __m512 b[8], c[4], d[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) /* 8+8: the low half is that of position i, the high of i + 8 */
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 8], 0x44),
                             _mm512_shuffle_f32x4(a[i], a[i + 8], 0xee));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) /* 4+4: quarters of i, i + 8, i + 4, i + 12 */
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[i], b[i + 4], 0x88),
                             _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) /* 2+2: within quarters, pairs of i and i + 2 */
        d[i] = _mm512_add_ps(_mm512_shuffle_ps(c[i], c[i + 2], 0x44),
                             _mm512_shuffle_ps(c[i], c[i + 2], 0xee));
    __m512 e =
        _mm512_add_ps(_mm512_shuffle_ps(d[0], d[1], 0x88), _mm512_shuffle_ps(d[0], d[1], 0xdd));
    /* e: quarters base 0, 8, 4, 12; in each the positions +0, +2, +1, +3 */
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return _mm512_permutexvar_ps(order, e);
}

/* Walks over the positions without dividing. */
typedef struct walk {
    float *const *page;
    size_t slot, at; /* the slot in the page, and its offset */
} walk;

INLINE const float *next_position(walk *w, const kern_attn_args *a)
{
    const float *p = *w->page + w->at;
    w->at += a->stride;
    if (++w->slot == (size_t)a->page_tokens) {
        w->page++;
        w->slot = w->at = 0;
    }
    return p;
}

/* Scores of positions t .. t+15, before the factor. */
INLINE __m512 dot_positions(const kern_attn_args *a, const float *const *key)
{
    __m512 sum[POSITIONS];
#pragma GCC unroll 16
    for (int j = 0; j < POSITIONS; j++)
        sum[j] = _mm512_setzero_ps();
    int i = 0;
    for (; i + 16 <= a->dim; i += 16) {
        __m512 q = _mm512_loadu_ps(a->q + i);
#pragma GCC unroll 16
        for (int j = 0; j < POSITIONS; j++)
            sum[j] = _mm512_fmadd_ps(q, _mm512_loadu_ps(key[j] + i), sum[j]);
    }
    if (i < a->dim) {
        __mmask16 mask = tail_mask(a->dim - i);
        __m512 q = _mm512_maskz_loadu_ps(mask, a->q + i);
#pragma GCC unroll 16
        for (int j = 0; j < POSITIONS; j++)
            sum[j] =
                _mm512_mask3_fmadd_ps(q, _mm512_maskz_loadu_ps(mask, key[j] + i), sum[j], mask);
    }
    return add_lanes_16(sum);
}

/* scores[t] for all positions. A last group that is not full repeats the last position. */
static void score(float *scores, const kern_attn_args *a)
{
    const float *key[POSITIONS];
    __m512 factor = _mm512_set1_ps(a->scale);
    walk here = {a->pages, 0, 0};
    for (int t = 0; t < a->n_pos; t += POSITIONS) {
        int n = a->n_pos - t < POSITIONS ? a->n_pos - t : POSITIONS;
        for (int j = 0; j < POSITIONS; j++) {
            key[j] = j < n ? next_position(&here, a) + a->k_off : key[n - 1];
        }
        __m512 s = _mm512_mul_ps(dot_positions(a, key), factor);
        _mm512_mask_storeu_ps(scores + t, tail_mask(n), s);
    }
}

/* 128 outputs (fewer with the mask of the last vector) over all positions, in registers. */
INLINE void weigh(float *out, const kern_attn_args *a, const float *p, int at, int n_vec,
                  __mmask16 last)
{
    __m512 sum[8];
#pragma GCC unroll 8
    for (int j = 0; j < n_vec; j++)
        sum[j] = _mm512_setzero_ps();
    walk here = {a->pages, 0, 0};
    for (int t = 0; t < a->n_pos; t++) {
        const float *v = next_position(&here, a) + a->v_off + at;
        __m512 f = _mm512_set1_ps(p[t]);
#pragma GCC unroll 8
        for (int j = 0; j < n_vec; j++) {
            __mmask16 mask = j == n_vec - 1 ? last : (__mmask16)0xffff;
            sum[j] = _mm512_fmadd_ps(f, _mm512_maskz_loadu_ps(mask, v + 16 * j), sum[j]);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < n_vec; j++)
        _mm512_mask_storeu_ps(out + at + 16 * j, j == n_vec - 1 ? last : (__mmask16)0xffff, sum[j]);
}

static void attn_head(float *out, const kern_attn_args *a, float *scores)
{
    score(scores, a);
    if (!softmax(scores, a->n_pos)) {
        for (int i = 0; i < a->dim; i++)
            out[i] = float_of(0x7fc00000u);
        return;
    }
    int i = 0;
    for (; i + 128 <= a->dim; i += 128)
        weigh(out, a, scores, i, 8, 0xffff);
    for (; i + 64 <= a->dim; i += 64)
        weigh(out, a, scores, i, 4, 0xffff);
    for (; i < a->dim; i += 16)
        weigh(out, a, scores, i, 1, tail_mask(a->dim - i < 16 ? a->dim - i : 16));
}

/* ---- attention of several heads over the same keys and values ---- */

enum { HEADS = 4, TILE = 4 }; /* heads and positions, or heads and vectors, of 16 accumulators */

/* Scores of 4 heads at 4 positions, before the factor: quarter h of the result holds head h. */
INLINE __m512 dot_tile(const float *q, size_t dim, const float *const *key)
{
    __m512 sum[HEADS * TILE];
#pragma GCC unroll 16
    for (int j = 0; j < HEADS * TILE; j++)
        sum[j] = _mm512_setzero_ps();
    size_t i = 0;
    for (; i + 16 <= dim; i += 16) {
        __m512 k[TILE];
#pragma GCC unroll 4
        for (int j = 0; j < TILE; j++)
            k[j] = _mm512_loadu_ps(key[j] + i);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
            __m512 v = _mm512_loadu_ps(q + (size_t)h * dim + i);
#pragma GCC unroll 4
            for (int j = 0; j < TILE; j++)
                sum[h * TILE + j] = _mm512_fmadd_ps(v, k[j], sum[h * TILE + j]);
        }
    }
    if (i < dim) {
        __mmask16 mask = tail_mask((int)(dim - i));
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
            __m512 v = _mm512_maskz_loadu_ps(mask, q + (size_t)h * dim + i);
#pragma GCC unroll 4
            for (int j = 0; j < TILE; j++)
                sum[h * TILE + j] = _mm512_mask3_fmadd_ps(
                    v, _mm512_maskz_loadu_ps(mask, key[j] + i), sum[h * TILE + j], mask);
        }
    }
    return add_lanes_16(sum);
}

/* Scores of n heads (a multiple of 4), lds apart. A last tile repeats the last position: what it
 * stores past n_pos is never read. */
static void score_heads(float *scores, size_t lds, const kern_attn_args *a, int n)
{
    const float *key[TILE];
    __m512 factor = _mm512_set1_ps(a->scale);
    size_t dim = (size_t)a->dim;
    walk here = {a->pages, 0, 0};
    for (int t = 0; t < a->n_pos; t += TILE) {
        for (int j = 0; j < TILE; j++)
            key[j] = t + j < a->n_pos ? next_position(&here, a) + a->k_off : key[j - 1];
        for (int h = 0; h < n; h += HEADS) {
            float *to = scores + (size_t)h * lds + (size_t)t;
            __m512 s = _mm512_mul_ps(dot_tile(a->q + (size_t)h * dim, dim, key), factor);
            _mm_storeu_ps(to, _mm512_castps512_ps128(s));
            _mm_storeu_ps(to + lds, _mm512_extractf32x4_ps(s, 1));
            _mm_storeu_ps(to + 2 * lds, _mm512_extractf32x4_ps(s, 2));
            _mm_storeu_ps(to + 3 * lds, _mm512_extractf32x4_ps(s, 3));
        }
    }
}

/* 16 * n_vec outputs (fewer with the mask of the last vector) of 4 heads over all positions. */
INLINE void weigh_heads(float *out, const kern_attn_args *a, const float *p, size_t lds, int at,
                        int n_vec, __mmask16 last)
{
    __m512 sum[HEADS][TILE];
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vec; j++)
            sum[h][j] = _mm512_setzero_ps();
    walk here = {a->pages, 0, 0};
    for (int t = 0; t < a->n_pos; t++) {
        const float *v = next_position(&here, a) + a->v_off + at;
        __m512 x[TILE];
#pragma GCC unroll 4
        for (int j = 0; j < n_vec; j++)
            x[j] = _mm512_maskz_loadu_ps(j == n_vec - 1 ? last : (__mmask16)0xffff, v + 16 * j);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
            __m512 f = _mm512_set1_ps(p[(size_t)h * lds + (size_t)t]);
#pragma GCC unroll 4
            for (int j = 0; j < n_vec; j++)
                sum[h][j] = _mm512_fmadd_ps(f, x[j], sum[h][j]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vec; j++)
            _mm512_mask_storeu_ps(out + (size_t)h * (size_t)a->dim + at + 16 * j,
                                  j == n_vec - 1 ? last : (__mmask16)0xffff, sum[h][j]);
}

static void attn_heads(float *out, const kern_attn_args *a, int n, float *scores)
{
    size_t dim = (size_t)a->dim, lds = kern_attn_scores(a->n_pos);
    int n_tiled = n / HEADS * HEADS;
    score_heads(scores, lds, a, n_tiled);
    for (int h = 0; h < n_tiled; h += HEADS) {
        float *p = scores + (size_t)h * lds, *to = out + (size_t)h * dim;
        bool is_ok[HEADS];
        for (int j = 0; j < HEADS; j++)
            is_ok[j] = softmax(p + (size_t)j * lds, a->n_pos);
        int i = 0;
        for (; i + 64 <= a->dim; i += 64)
            weigh_heads(to, a, p, lds, i, 4, 0xffff);
        for (; i < a->dim; i += 16)
            weigh_heads(to, a, p, lds, i, 1, tail_mask(a->dim - i < 16 ? a->dim - i : 16));
        for (int j = 0; j < HEADS; j++)
            for (size_t d = 0; d < dim && !is_ok[j]; d++)
                to[(size_t)j * dim + d] = float_of(0x7fc00000u);
    }
    kern_attn_args one = *a;
    for (int h = n_tiled; h < n; h++) {
        one.q = a->q + (size_t)h * dim;
        attn_head(out + (size_t)h * dim, &one, scores);
    }
}

const kern_vec kern_vec_avx512 = {
    .name = "avx512",
    .act_q8 = act_q8,
    .act_bf16 = act_bf16,
    .act_sums = act_sums,
    .rms_norm = rms_norm,
    .axpy = axpy,
    .add = add,
    .dot = dot,
    .softmax = softmax,
    .exp_sub = exp_sub,
    .silu_mul = silu_mul,
    .rope = rope,
    .attn_head = attn_head,
    .attn_heads = attn_heads,
};
