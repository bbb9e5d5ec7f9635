#ifndef EP_TESTS_UNIT_TILE_PRODUCT_H
#define EP_TESTS_UNIT_TILE_PRODUCT_H
/*
 * tile_product: the product of one packed tile in plain loops, in the order of the kernels, for
 * programs that prove them on a CPU. C11 and C++.
 */
#include "kernels/cuda/layout.h"
#include "tests/unit/small_floats.h"

/* One row of one tile times one activation row; the formula of gemm.cuh and wgmma.cuh. */
static float tile_product(int type, const uint8_t *tile, int row, const float *x)
{
    const int group = type == KERN_Q4_K || type == KERN_Q8_0 ? 32
                      : type == KERN_Q6_K                    ? 16
                      : type == KERN_GPTQ4                   ? 128
                                                             : 256;
    float block = 0.0f, mins[2] = {0.0f, 0.0f}; /* with sums of 32, with what their rounding lost */
    const uint8_t *head = tile + 16 * row;
    uint32_t sc[2] = {0}, mn[2] = {0};
    if (type == KERN_Q4_K)
        gpu_q4k_scales(gpu_tile_u32(head + 4), gpu_tile_u32(head + 8), gpu_tile_u32(head + 12), sc,
                       mn);
    for (int j = 0; j < GPU_TILE_K / group; j++) {
        float part = 0.0f, sum = 0.0f, scale = 1.0f;
        for (int i = j * group; i < (j + 1) * group; i++) {
            uint32_t code = gpu_tile_code(type, tile, row, i);
            float w = type == KERN_Q4_K    ? (float)code
                      : type == KERN_Q6_K  ? (float)((int)code - 32)
                      : type == KERN_Q8_0  ? (float)((int)code - 128)
                      : type == KERN_GPTQ4 ? (float)((int)code - 8)
                      : type == KERN_F16   ? half_float(code)
                                           : bf16_float(code);
            part = fmaf(w, x[i], part);
            sum += x[i];
        }
        if (type == KERN_Q4_K) {
            scale = (float)(sc[j / 4] >> 8 * (j % 4) & 255);
            float least = (float)(mn[j / 4] >> 8 * (j % 4) & 255), whole = rounded(sum / 32, 11);
            mins[0] = fmaf(least, whole, mins[0]);
            mins[1] = fmaf(least, rounded(sum / 32 - whole, 11), mins[1]);
        } else if (type == KERN_Q6_K) {
            scale = (float)(int8_t)head[j];
        } else if (type == KERN_Q8_0) {
            scale = half_float(gpu_tile_u16(head + 2 * j));
        } else if (type == KERN_GPTQ4) {
            scale = half_float(gpu_tile_u16(tile + 4 * row + 2 * j));
        }
        block = fmaf(scale, part, block);
    }
    if (type == KERN_Q4_K)
        return fmaf(half_float(gpu_tile_u16(head)), block,
                    -(32 * half_float(gpu_tile_u16(head + 2)) * (mins[0] + mins[1])));
    if (type == KERN_Q6_K) return half_float(gpu_tile_u16(tile + 256 + 2 * row)) * block;
    return block;
}

#endif
