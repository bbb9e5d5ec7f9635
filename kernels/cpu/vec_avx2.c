/*
 * vec_avx2: the vector functions with AVX2 and FMA. Two registers stand for the 16 lanes of the
 * specification (vec_scalar.c): the low one holds lanes 0-7. Tails go through masked loads where a
 * function is element by element, and through plain fmaf on the stored lanes where it adds up,
 * since a lane without an element must keep its value, sign of zero included.
 *
 * Attention takes four positions at a time, whose eight accumulators hide the latency.
 */
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "kernels/cpu/ops.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    POSITIONS = 4, /* scored together */
    NEAR = 32      /* that stay in L1 while heads share them: 16 KB of keys of 128 floats */
};

/* The 16 lanes. */
typedef struct pair {
    __m256 lo, hi;
} pair;

static const int32_t mask_words[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

/* The first n of 8 lanes, n = 0 .. 8. */
INLINE __m256i tail_mask(int n)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)(mask_words + 8 - n));
}

INLINE pair zeros(void)
{
    return (pair){_mm256_setzero_ps(), _mm256_setzero_ps()};
}

INLINE float add_lanes(pair v)
{
    __m256 a = _mm256_add_ps(v.lo, v.hi);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}

INLINE pair fma_lanes(pair sum, const float *a, const float *b)
{
    sum.lo = _mm256_fmadd_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b), sum.lo);
    sum.hi = _mm256_fmadd_ps(_mm256_loadu_ps(a + 8), _mm256_loadu_ps(b + 8), sum.hi);
    return sum;
}

/* Lanes 0 .. n-1, n < 16, one by one. */
static pair fma_tail(pair sum, const float *a, const float *b, int n)
{
    float lane[16];
    _mm256_storeu_ps(lane, sum.lo);
    _mm256_storeu_ps(lane + 8, sum.hi);
    for (int i = 0; i < n; i++)
        lane[i] = fmaf(a[i], b[i], lane[i]);
    return (pair){_mm256_loadu_ps(lane), _mm256_loadu_ps(lane + 8)};
}

/* kern_exp in 8 lanes. */
INLINE __m256 exp8(__m256 x)
{
    const __m256 magic = _mm256_set1_ps(0x1.8p23f);
    __m256 is_low = _mm256_cmp_ps(x, _mm256_set1_ps(-87.3f), _CMP_LT_OQ);
    __m256 is_high = _mm256_cmp_ps(x, _mm256_set1_ps(88.0f), _CMP_GT_OQ);
    __m256 z = _mm256_fmadd_ps(x, _mm256_set1_ps(0x1.715476p+0f), magic);
    __m256 n = _mm256_sub_ps(z, magic);
    __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-0x1.62e430p-1f), x);
    r = _mm256_fmadd_ps(n, _mm256_set1_ps(0x1.05c610p-29f), r);
    __m256 q = _mm256_set1_ps(0x1.6d117cp-10f);
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.120be2p-7f));
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.555518p-5f));
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.5554dcp-3f));
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0.5f));
    __m256 p = _mm256_add_ps(_mm256_fmadd_ps(q, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
    __m256i scale = _mm256_sub_epi32(_mm256_castps_si256(z), _mm256_set1_epi32(0x4b400000 - 127));
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(scale, 23)));
    p = _mm256_blendv_ps(p, _mm256_set1_ps(INFINITY), is_high);
    return _mm256_andnot_ps(is_low, p);
}

INLINE __m256i magnitude(__m256 x)
{
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}

INLINE uint32_t max_lane(__m256i m)
{
    __m128i a = _mm_max_epu32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    a = _mm_max_epu32(a, _mm_shuffle_epi32(a, 0x4e));
    a = _mm_max_epu32(a, _mm_shuffle_epi32(a, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(a);
}

static float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

INLINE __m256i quantise8(const float *x, __m256 inv)
{
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inv));
}

static void act_q8(int8_t *q, float *scale, const float *x, int k, int block)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int b = 0; b < k / block; b++, x += block, q += block) {
        __m256i m = _mm256_setzero_si256();
        for (int i = 0; i < block; i += 8)
            m = _mm256_max_epu32(m, magnitude(_mm256_loadu_ps(x + i)));
        uint32_t top = max_lane(m);
        float amax = float_of(top);
        if (top >= 0x7f800000u || amax < 1e-36f) {
            memset(q, 0, (size_t)block);
            scale[b] = top >= 0x7f800000u ? float_of(0x7fc00000u) : 0.0f;
            continue;
        }
        __m256 inv = _mm256_set1_ps(127.0f / amax);
        scale[b] = amax / 127.0f;
        for (int i = 0; i < block; i += 32) {
            __m256i v0 = _mm256_packs_epi32(quantise8(x + i, inv), quantise8(x + i + 8, inv));
            __m256i v1 = _mm256_packs_epi32(quantise8(x + i + 16, inv), quantise8(x + i + 24, inv));
            __m256i v = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(v0, v1), order);
            _mm256_storeu_si256((__m256i *)(void *)(q + i), v);
        }
    }
}

/* The result in the low half of each 32-bit lane. */
INLINE __m256i bf16_of(__m256 x)
{
    __m256i u = _mm256_castps_si256(x), m = magnitude(x), top = _mm256_srli_epi32(u, 16);
    __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    r = _mm256_srli_epi32(r, 16);
    __m256i is_nan = _mm256_cmpgt_epi32(m, _mm256_set1_epi32(0x7f800000));
    __m256i is_tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x00800000), m);
    r = _mm256_blendv_epi8(r, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), is_nan);
    return _mm256_blendv_epi8(r, _mm256_and_si256(top, _mm256_set1_epi32(0x8000)), is_tiny);
}

INLINE void store_bf16(uint16_t *h, __m256i v)
{
    __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storeu_si128((__m128i *)(void *)h, packed);
}

static void act_bf16(uint16_t *h, const float *x, int k)
{
    int i = 0;
    for (; i + 8 <= k; i += 8)
        store_bf16(h + i, bf16_of(_mm256_loadu_ps(x + i)));
    if (i < k) {
        uint16_t rest[8];
        store_bf16(rest, bf16_of(_mm256_maskload_ps(x + i, tail_mask(k - i))));
        memcpy(h + i, rest, (size_t)(k - i) * sizeof *h);
    }
}

static void act_sums(int16_t *sum16, int16_t *sum32, const int8_t *q, int k)
{
    for (int i = 0; i < k; i += 32) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)(q + i));
        v = _mm256_xor_si256(v, _mm256_set1_epi8((char)0x80));
        __m256i s = _mm256_sad_epu8(v, _mm256_setzero_si256());
        int a = (int)_mm256_extract_epi64(s, 0) + (int)_mm256_extract_epi64(s, 1) - 16 * 128;
        int b = (int)_mm256_extract_epi64(s, 2) + (int)_mm256_extract_epi64(s, 3) - 16 * 128;
        sum16[i / 16] = (int16_t)a;
        sum16[i / 16 + 1] = (int16_t)b;
        sum32[i / 32] = (int16_t)(a + b);
    }
}

static float dot(const float *a, const float *b, int n)
{
    pair sum = zeros();
    int i = 0;
    for (; i + 16 <= n; i += 16)
        sum = fma_lanes(sum, a + i, b + i);
    if (i < n) sum = fma_tail(sum, a + i, b + i, n - i);
    return add_lanes(sum);
}

static void rms_norm(float *y, const float *x, const float *w, int n, float eps)
{
    __m256 inv = _mm256_set1_ps(1.0f / sqrtf(dot(x, x, n) / (float)n + eps));
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 t = _mm256_mul_ps(_mm256_loadu_ps(x + i), inv);
        _mm256_storeu_ps(y + i, _mm256_mul_ps(t, _mm256_loadu_ps(w + i)));
    }
    __m256i mask = tail_mask(n - i);
    __m256 t = _mm256_mul_ps(_mm256_maskload_ps(x + i, mask), inv);
    _mm256_maskstore_ps(y + i, mask, _mm256_mul_ps(t, _mm256_maskload_ps(w + i, mask)));
}

static void axpy(float *y, const float *x, float a, int n)
{
    __m256 f = _mm256_set1_ps(a);
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_fmadd_ps(f, _mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
    __m256i mask = tail_mask(n - i);
    __m256 v = _mm256_fmadd_ps(f, _mm256_maskload_ps(x + i, mask), _mm256_maskload_ps(y + i, mask));
    _mm256_maskstore_ps(y + i, mask, v);
}

static void add(float *y, const float *x, int n)
{
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_add_ps(_mm256_loadu_ps(y + i), _mm256_loadu_ps(x + i)));
    __m256i mask = tail_mask(n - i);
    __m256 v = _mm256_add_ps(_mm256_maskload_ps(y + i, mask), _mm256_maskload_ps(x + i, mask));
    _mm256_maskstore_ps(y + i, mask, v);
}

/* The largest of n finite values; false when one is not finite. */
static bool find_max(float *max, const float *x, int n)
{
    __m256i top = _mm256_setzero_si256();
    __m256 most = _mm256_set1_ps(-INFINITY);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        top = _mm256_max_epu32(top, magnitude(v));
        most = _mm256_max_ps(most, v);
    }
    __m256i mask = tail_mask(n - i);
    __m256 v = _mm256_maskload_ps(x + i, mask);
    top = _mm256_max_epu32(top, magnitude(v));
    most = _mm256_max_ps(most, _mm256_blendv_ps(most, v, _mm256_castsi256_ps(mask)));
    __m128 a = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    *max = _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps(a, a, 1)));
    return max_lane(top) < 0x7f800000u;
}

static bool softmax(float *x, int n)
{
    float max;
    if (!find_max(&max, x, n)) return false;
    __m256 most = _mm256_set1_ps(max), sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int i = 0; i < n; i += 8) {
        __m256i mask = tail_mask(n - i < 8 ? n - i : 8);
        __m256 e = exp8(_mm256_sub_ps(_mm256_maskload_ps(x + i, mask), most));
        _mm256_maskstore_ps(x + i, mask, e);
        __m256 *s =
            &sum[i / 8 % 2]; /* sums stay +0 where nothing is added, so a zero is harmless */
        *s = _mm256_add_ps(*s, _mm256_and_ps(e, _mm256_castsi256_ps(mask)));
    }
    __m256 all = _mm256_set1_ps(add_lanes((pair){sum[0], sum[1]}));
    for (int i = 0; i < n; i += 8) {
        __m256i mask = tail_mask(n - i < 8 ? n - i : 8);
        _mm256_maskstore_ps(x + i, mask, _mm256_div_ps(_mm256_maskload_ps(x + i, mask), all));
    }
    return true;
}

static void exp_sub(float *y, const float *x, float shift, int n)
{
    const __m256 minus = _mm256_set1_ps(shift);
    for (int i = 0; i < n; i += 8) {
        __m256i mask = tail_mask(n - i < 8 ? n - i : 8);
        _mm256_maskstore_ps(y + i, mask,
                            exp8(_mm256_sub_ps(_mm256_maskload_ps(x + i, mask), minus)));
    }
}

INLINE __m256 silu8(__m256 gate, __m256 up)
{
    __m256 e = exp8(_mm256_xor_ps(gate, _mm256_set1_ps(-0.0f)));
    __m256 d = _mm256_add_ps(_mm256_set1_ps(1.0f), e);
    return _mm256_mul_ps(_mm256_div_ps(gate, d), up);
}

static void silu_mul(float *y, const float *gate, const float *up, int n)
{
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, silu8(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i)));
    __m256i mask = tail_mask(n - i);
    __m256 v = silu8(_mm256_maskload_ps(gate + i, mask), _mm256_maskload_ps(up + i, mask));
    _mm256_maskstore_ps(y + i, mask, v);
}

static void rope(float *x, const float *cos_sin, int dim)
{
    int half = dim / 2;
    for (int i = 0; i < half; i += 8) {
        __m256i mask = tail_mask(half - i < 8 ? half - i : 8);
        __m256 a = _mm256_maskload_ps(x + i, mask);
        __m256 b = _mm256_maskload_ps(x + half + i, mask);
        __m256 c = _mm256_maskload_ps(cos_sin + i, mask);
        __m256 s = _mm256_maskload_ps(cos_sin + half + i, mask);
        _mm256_maskstore_ps(x + i, mask, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
        _mm256_maskstore_ps(x + half + i, mask, _mm256_fmadd_ps(a, s, _mm256_mul_ps(b, c)));
    }
}

/* ---- attention ---- */

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

INLINE walk walk_from(const kern_attn_args *a, int t)
{
    size_t slot = (size_t)(t % a->page_tokens);
    return (walk){a->pages + t / a->page_tokens, slot, slot * a->stride};
}

/* Positions from .. to-1 of one head. */
static void score(float *scores, const kern_attn_args *a, int from, int to)
{
    walk here = walk_from(a, from);
    for (int t = from; t < to; t += POSITIONS) {
        int n = to - t < POSITIONS ? to - t : POSITIONS;
        const float *key[POSITIONS];
        pair sum[POSITIONS];
        for (int j = 0; j < POSITIONS; j++) {
            key[j] = j < n ? next_position(&here, a) + a->k_off : key[n - 1];
            sum[j] = zeros();
        }
        int i = 0;
        for (; i + 16 <= a->dim; i += 16) {
#pragma GCC unroll 4
            for (int j = 0; j < POSITIONS; j++)
                sum[j] = fma_lanes(sum[j], a->q + i, key[j] + i);
        }
        for (int j = 0; j < n; j++) {
            if (i < a->dim) sum[j] = fma_tail(sum[j], a->q + i, key[j] + i, a->dim - i);
            scores[t + j] = add_lanes(sum[j]) * a->scale;
        }
    }
}

/* 64 outputs over positions from .. to-1, in registers; from 0 they begin, else they go on. */
static void weigh_64(float *out, const kern_attn_args *a, const float *p, int at, int from, int to)
{
    __m256 sum[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++)
        sum[j] = from > 0 ? _mm256_loadu_ps(out + at + 8 * j) : _mm256_setzero_ps();
    walk here = walk_from(a, from);
    for (int t = from; t < to; t++) {
        const float *v = next_position(&here, a) + a->v_off + at;
        __m256 f = _mm256_set1_ps(p[t]);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            sum[j] = _mm256_fmadd_ps(f, _mm256_loadu_ps(v + 8 * j), sum[j]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++)
        _mm256_storeu_ps(out + at + 8 * j, sum[j]);
}

static void weigh_8(float *out, const kern_attn_args *a, const float *p, int at, int from, int to)
{
    __m256i mask = tail_mask(a->dim - at < 8 ? a->dim - at : 8);
    __m256 sum = from > 0 ? _mm256_maskload_ps(out + at, mask) : _mm256_setzero_ps();
    walk here = walk_from(a, from);
    for (int t = from; t < to; t++) {
        __m256 v = _mm256_maskload_ps(next_position(&here, a) + a->v_off + at, mask);
        sum = _mm256_fmadd_ps(_mm256_set1_ps(p[t]), v, sum);
    }
    _mm256_maskstore_ps(out + at, mask, sum);
}

static void weigh(float *out, const kern_attn_args *a, const float *p, int from, int to)
{
    int i = 0;
    for (; i + 64 <= a->dim; i += 64)
        weigh_64(out, a, p, i, from, to);
    for (; i < a->dim; i += 8)
        weigh_8(out, a, p, i, from, to);
}

/* All heads meet NEAR positions before the next ones, so that keys and values come from L1. */
static void attn_heads(float *out, const kern_attn_args *a, int n, float *scores)
{
    const size_t dim = (size_t)a->dim, lds = kern_attn_scores(a->n_pos);
    kern_attn_args one = *a;
    for (int from = 0; from < a->n_pos; from += NEAR) {
        int to = a->n_pos - from < NEAR ? a->n_pos : from + NEAR;
        for (int h = 0; h < n; h++) {
            one.q = a->q + (size_t)h * dim;
            score(scores + (size_t)h * lds, &one, from, to);
        }
    }
    for (int h = 0; h < n; h++) /* what has no softmax gets a mark that no softmax has */
        if (!softmax(scores + (size_t)h * lds, a->n_pos)) scores[(size_t)h * lds] = -1.0f;
    for (int from = 0; from < a->n_pos; from += NEAR) {
        int to = a->n_pos - from < NEAR ? a->n_pos : from + NEAR;
        for (int h = 0; h < n; h++)
            weigh(out + (size_t)h * dim, a, scores + (size_t)h * lds, from, to);
    }
    for (int h = 0; h < n; h++)
        for (size_t i = 0; i < dim && scores[(size_t)h * lds] < 0.0f; i++)
            out[(size_t)h * dim + i] = float_of(0x7fc00000u);
}

static void attn_head(float *out, const kern_attn_args *a, float *scores)
{
    attn_heads(out, a, 1, scores);
}

const kern_vec kern_vec_avx2 = {
    .name = "avx2",
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
