/*
 * Prepared activation rows: layout, making, viewing (rows.h). Padding between the parts of a record
 * is zeroed, so that a panel function which reads whole vectors meets the same bytes every time and
 * a tile padded along k adds nothing.
 */
#include "kernels/rows.h"

#include <assert.h>
#include <string.h>

static size_t lines(size_t bytes)
{
    return (bytes + 63) & ~(size_t)63;
}

kern_record kern_record_make(kern_act act, int k)
{
    kern_record f = {.act = act, .k = k};
    size_t n = (size_t)k, end;
    switch (act) {
    case KERN_ACT_F32:
        end = 4 * n;
        break;
    case KERN_ACT_BF16:
        end = lines(2 * n);
        break;
    default:
        f.scale = lines(n);
        f.sum16 = f.scale + lines(4 * (n / (size_t)kern_act_block(act)));
        f.sum32 = f.sum16 + 2 * (n / 16);
        end = f.sum32 + 2 * (n / 32);
    }
    f.bytes = lines(end) | 64; /* an odd number of lines */
    return f;
}

static bool is_q8(kern_act act)
{
    return act != KERN_ACT_F32 && act != KERN_ACT_BF16;
}

static void add_sums(const kern_record *f, uint8_t *dst)
{
    size_t n = (size_t)f->k, scales = 4 * (n / (size_t)kern_act_block(f->act));
    memset(dst + n, 0, f->scale - n);
    memset(dst + f->scale + scales, 0, f->sum16 - f->scale - scales);
    kern_vec_now.act_sums((int16_t *)(void *)(dst + f->sum16), (int16_t *)(void *)(dst + f->sum32),
                          (const int8_t *)dst, f->k);
    size_t end = f->sum32 + 2 * (n / 32);
    memset(dst + end, 0, f->bytes - end);
}

void kern_record_from_f32(const kern_record *f, uint8_t *dst, const float *x)
{
    size_t n = (size_t)f->k;
    if (f->act == KERN_ACT_F32) {
        memcpy(dst, x, 4 * n);
        memset(dst + 4 * n, 0, f->bytes - 4 * n);
    } else if (f->act == KERN_ACT_BF16) {
        kern_vec_now.act_bf16((uint16_t *)(void *)dst, x, f->k);
        memset(dst + 2 * n, 0, f->bytes - 2 * n);
    } else {
        kern_vec_now.act_q8((int8_t *)dst, (float *)(void *)(dst + f->scale), x, f->k,
                            kern_act_block(f->act));
        add_sums(f, dst);
    }
}

void kern_record_from_row(const kern_record *f, uint8_t *dst, const void *row)
{
    size_t n = (size_t)f->k;
    if (is_q8(f->act)) {
        memcpy(dst, row, n);
        memcpy(dst + f->scale, (const uint8_t *)row + n, 4 * (n / (size_t)kern_act_block(f->act)));
        add_sums(f, dst);
        return;
    }
    size_t bytes = (f->act == KERN_ACT_F32 ? 4 : 2) * n;
    memcpy(dst, row, bytes);
    memset(dst + bytes, 0, f->bytes - bytes);
}

kern_rows kern_record_view(const kern_record *f, const uint8_t *records, int m)
{
    kern_rows r = {.act = f->act, .m = m, .k = f->k};
    switch (f->act) {
    case KERN_ACT_F32:
        r.x = (const float *)(const void *)records;
        r.ldx = f->bytes / 4;
        break;
    case KERN_ACT_BF16:
        r.h = (const uint16_t *)(const void *)records;
        r.ldh = f->bytes / 2;
        break;
    default:
        r.q = (const int8_t *)records;
        r.ldq = f->bytes;
        r.scale = (const float *)(const void *)(records + f->scale);
        r.lds = f->bytes / 4;
        r.sum16 = (const int16_t *)(const void *)(records + f->sum16);
        r.sum32 = (const int16_t *)(const void *)(records + f->sum32);
        r.ldsum = f->bytes / 2;
    }
    return r;
}

kern_panel_fn kern_panel_of(int type)
{
    const kern_gemm *g = &kern_gemm_now;
    switch (type) {
    case KERN_F32:
        return g->f32;
    case KERN_F16:
        return g->f16;
    case KERN_BF16:
        return g->bf16;
    case KERN_Q4_0:
        return g->q4_0;
    case KERN_Q5_0:
        return g->q5_0;
    case KERN_Q8_0:
        return g->q8_0;
    case KERN_Q4_K:
        return g->q4_k;
    case KERN_Q5_K:
        return g->q5_k;
    case KERN_Q6_K:
        return g->q6_k;
    case KERN_GPTQ4:
        return g->gptq4;
    default:
        assert(!"type that is not served");
        return NULL;
    }
}
