/*
 * vec: the public vector functions: each calls the table that kern_select filled. Rows of
 * activations are laid out here, in one place, so that every sender and every kernel agrees on the
 * bytes.
 *
 * Holds no arithmetic of its own: the specification is cpu/vec_scalar.c.
 */
#include "kernels/cpu/ops.h"
#include <string.h>

void kern_act_rows(kern_act act, void *dst, const float *x, size_t ldx, int rows, int k)
{
    size_t row_bytes = kern_act_row_bytes(act, k);
    int block = kern_act_block(act);
    for (int r = 0; r < rows; r++) {
        uint8_t *to = (uint8_t *)dst + (size_t)r * row_bytes;
        const float *from = x + (size_t)r * ldx;
        switch (act) {
        case KERN_ACT_F32:
            memcpy(to, from, (size_t)k * sizeof *from);
            break;
        case KERN_ACT_BF16:
            kern_vec_now.act_bf16((uint16_t *)(void *)to, from, k);
            /* an odd k leaves two bytes of padding, which are sent and so must be defined */
            if (k & 1) memset(to + (size_t)k * 2, 0, 2);
            break;
        case KERN_ACT_Q8_256:
        case KERN_ACT_Q8_32:
        case KERN_ACT_Q8_128:
            kern_vec_now.act_q8((int8_t *)to, (float *)(void *)(to + k), from, k, block);
            break;
        }
    }
}

void kern_rms_norm(float *y, const float *x, const float *w, int n, float eps)
{
    kern_vec_now.rms_norm(y, x, w, n, eps);
}

void kern_axpy(float *y, const float *x, float a, int n)
{
    kern_vec_now.axpy(y, x, a, n);
}

void kern_add(float *y, const float *x, int n)
{
    kern_vec_now.add(y, x, n);
}

float kern_dot(const float *a, const float *b, int n)
{
    return kern_vec_now.dot(a, b, n);
}

void kern_exp_sub(float *y, const float *x, float shift, int n)
{
    kern_vec_now.exp_sub(y, x, shift, n);
}

bool kern_softmax(float *x, int n)
{
    return kern_vec_now.softmax(x, n);
}

void kern_silu_mul(float *y, const float *gate, const float *up, int n)
{
    kern_vec_now.silu_mul(y, gate, up, n);
}

void kern_rope(float *x, const float *cos_sin, int dim)
{
    kern_vec_now.rope(x, cos_sin, dim);
}

void kern_attn_head(float *out, const kern_attn_args *a, float *scores)
{
    kern_vec_now.attn_head(out, a, scores);
}

void kern_attn_heads(float *out, const kern_attn_args *a, int n, float *scores)
{
    if (kern_vec_now.attn_heads != NULL) {
        kern_vec_now.attn_heads(out, a, n, scores);
        return;
    }
    kern_attn_args one = *a;
    for (int h = 0; h < n; h++, one.q += a->dim)
        kern_vec_now.attn_head(out + (size_t)h * (size_t)a->dim, &one, scores);
}
