/*
 * vec_scalar: the specification of the vector functions, in plain C. What an instruction set
 * computes is right when it has the bits that this file gives; only the bits of a NaN are free.
 *
 * The order of every sum is written down here: 16 lanes, element i in lane i % 16, lanes added as
 * the tree 8+8, 4+4, 2+2, 1+1. fmaf stands exactly where an instruction set fuses. exp is one
 * polynomial in one order. Nothing here is fast, and nothing may be rearranged.
 */
#include <math.h>
#include <string.h>
#include "kernels/cpu/ops.h"

#define LANES 16

static uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static bool is_finite(float x)
{
    return (bits_of(x) & 0x7f800000u) != 0x7f800000u;
}

static float add_lanes(float *lane)
{
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            lane[i] += lane[i + width];
    return lane[0];
}

/*
 * exp(x) = 2^n * exp(r) with n = round(x / ln 2), |r| <= ln 2 / 2, exp(r) = 1 + (r + r^2 q(r)) and
 * q of degree 4 (interpolated at the Chebyshev nodes). Below -87.3 the result is 0, so that no
 * result is denormal; above 88 it is infinite. 1.5 * 2^23 added and subtracted rounds to the
 * nearest even integer and leaves it in the low bits. Worst relative error 9.3e-8
 * (tests/kernels/check_vec.c bounds it).
 */
float kern_exp(float x)
{
    const float magic = 0x1.8p23f;
    if (x != x) return x + x;
    if (x < -87.3f) return 0.0f;
    if (x > 88.0f) return INFINITY;
    float z = fmaf(x, 0x1.715476p+0f, magic);
    float n = z - magic;
    float r = fmaf(n, -0x1.62e430p-1f, x);
    r = fmaf(n, 0x1.05c610p-29f, r);
    float q = 0x1.6d117cp-10f;
    q = fmaf(q, r, 0x1.120be2p-7f);
    q = fmaf(q, r, 0x1.555518p-5f);
    q = fmaf(q, r, 0x1.5554dcp-3f);
    q = fmaf(q, r, 0.5f);
    float p = fmaf(q, r * r, r) + 1.0f;
    uint32_t scale = (bits_of(z) - bits_of(magic) + 127u) << 23;
    return p * float_of(scale);
}

/* Per block: q = round_to_even(x * (127 / amax)) and scale = amax / 127. A maximum below 1e-36
 * counts as 0 (its inverse would overflow). A block with an infinity or NaN has scale NaN and q =
 * 0, so that the poison is seen in the product and in no other block. */
static void act_q8(int8_t *q, float *scale, const float *x, int k, int block)
{
    const float magic = 0x1.8p23f;
    for (int b = 0; b < k / block; b++) {
        const float *in = x + (size_t)b * (size_t)block;
        int8_t *out = q + (size_t)b * (size_t)block;
        uint32_t top = 0; /* of the bits without sign, whose order is that of |x| with NaN on top */
        for (int i = 0; i < block; i++) {
            uint32_t u = bits_of(in[i]) & 0x7fffffffu;
            if (u > top) top = u;
        }
        float amax = float_of(top);
        if (top >= 0x7f800000u || amax < 1e-36f) {
            memset(out, 0, (size_t)block);
            scale[b] = top >= 0x7f800000u ? float_of(0x7fc00000u) : 0.0f;
            continue;
        }
        float inv = 127.0f / amax;
        scale[b] = amax / 127.0f;
        for (int i = 0; i < block; i++)
            out[i] = (int8_t)(int32_t)(bits_of(in[i] * inv + magic) - bits_of(magic));
    }
}

/* Round to nearest even; a denormal becomes a zero of its sign; a NaN stays one (quiet). */
static void act_bf16(uint16_t *h, const float *x, int k)
{
    for (int i = 0; i < k; i++) {
        uint32_t u = bits_of(x[i]);
        uint32_t magnitude = u & 0x7fffffffu;
        if (magnitude > 0x7f800000u)
            h[i] = (uint16_t)(u >> 16 | 0x40u);
        else if (magnitude < 0x00800000u)
            h[i] = (uint16_t)(u >> 16 & 0x8000u);
        else
            h[i] = (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
    }
}

static void act_sums(int16_t *sum16, int16_t *sum32, const int8_t *q, int k)
{
    for (int b = 0; b < k / 16; b++) {
        int sum = 0;
        for (int i = 0; i < 16; i++)
            sum += q[b * 16 + i];
        sum16[b] = (int16_t)sum;
    }
    for (int b = 0; b < k / 32; b++)
        sum32[b] = (int16_t)(sum16[2 * b] + sum16[2 * b + 1]);
}

static void rms_norm(float *y, const float *x, const float *w, int n, float eps)
{
    float lane[LANES] = {0};
    for (int i = 0; i < n; i++)
        lane[i % LANES] = fmaf(x[i], x[i], lane[i % LANES]);
    float mean = add_lanes(lane) / (float)n;
    float inv = 1.0f / sqrtf(mean + eps);
    for (int i = 0; i < n; i++)
        y[i] = x[i] * inv * w[i];
}

static void axpy(float *y, const float *x, float a, int n)
{
    for (int i = 0; i < n; i++)
        y[i] = fmaf(a, x[i], y[i]);
}

static void add(float *y, const float *x, int n)
{
    for (int i = 0; i < n; i++)
        y[i] += x[i];
}

static float dot(const float *a, const float *b, int n)
{
    float lane[LANES] = {0};
    for (int i = 0; i < n; i++)
        lane[i % LANES] = fmaf(a[i], b[i], lane[i % LANES]);
    return add_lanes(lane);
}

static bool softmax(float *x, int n)
{
    float max = -INFINITY;
    for (int i = 0; i < n; i++) {
        if (!is_finite(x[i])) return false;
        if (x[i] > max) max = x[i];
    }
    float lane[LANES] = {0};
    for (int i = 0; i < n; i++) {
        x[i] = kern_exp(x[i] - max);
        lane[i % LANES] += x[i];
    }
    float sum = add_lanes(lane);
    for (int i = 0; i < n; i++)
        x[i] /= sum;
    return true;
}

static void exp_sub(float *y, const float *x, float shift, int n)
{
    for (int i = 0; i < n; i++)
        y[i] = kern_exp(x[i] - shift);
}

static void silu_mul(float *y, const float *gate, const float *up, int n)
{
    for (int i = 0; i < n; i++)
        y[i] = gate[i] / (1.0f + kern_exp(-gate[i])) * up[i];
}

static void rope(float *x, const float *cos_sin, int dim)
{
    int half = dim / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half], c = cos_sin[i], s = cos_sin[i + half];
        x[i] = fmaf(a, c, -(b * s));
        x[i + half] = fmaf(a, s, b * c);
    }
}

/* A score that is not finite (from a poisoned row) makes the whole output NaN, so that it is seen.
 */
static void attn_head(float *out, const kern_attn_args *a, float *scores)
{
    for (int t = 0; t < a->n_pos; t++) {
        const float *at = a->pages[t / a->page_tokens] + (size_t)(t % a->page_tokens) * a->stride;
        scores[t] = dot(a->q, at + a->k_off, a->dim) * a->scale;
    }
    bool is_ok = softmax(scores, a->n_pos);
    for (int i = 0; i < a->dim; i++)
        out[i] = is_ok ? 0.0f : float_of(0x7fc00000u);
    for (int t = 0; is_ok && t < a->n_pos; t++) {
        const float *at = a->pages[t / a->page_tokens] + (size_t)(t % a->page_tokens) * a->stride;
        axpy(out, at + a->v_off, scores[t], a->dim);
    }
}

const kern_vec kern_vec_scalar = {
    .name = "scalar",
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
};
