#ifndef EP_KERNELS_CUDA_STAGE_H
#define EP_KERNELS_CUDA_STAGE_H
/*
 * stage: the index maps of the wgmma form, as plain arithmetic like layout.h and proved the same
 * way. An item is up to 64 pairs of one expert and 8 row tiles; its k-tiles pass through a ring of
 * stages in shared memory, each holding one k-tile of both operands:
 *
 *   values   32768  4 slabs of 64 columns x 64 values along k, rows of 128 bytes, 128-byte swizzle
 *   sums      2048  64 columns x 16 halves, core matrices of 8 columns x 16 bytes; Q4_K only
 *   weights         8 packed tiles of layout.h, one per row tile
 *
 * filled up to a multiple of 1024, the period of the swizzle. Two warpgroups multiply: warp w
 * (0..7) owns row tile w of the item as the A operand, from registers; the columns are the B
 * operand, from shared memory, which a descriptor describes.
 */
#include "kernels/cuda/layout.h"

enum {
    GPU_ITEM_TILES = 8, /* row tiles: four of each warpgroup */
    GPU_ITEM_COLS = 64, /* pairs */
    GPU_COLS_STEP = 16, /* columns are computed in multiples of so many */
    GPU_SLAB_K = 64,    /* values of a 128-byte row */
    GPU_SLAB_BYTES = GPU_ITEM_COLS * 128,
    GPU_VALUE_BYTES = GPU_TILE_K / GPU_SLAB_K * GPU_SLAB_BYTES,
    GPU_SUM_BYTES = GPU_ITEM_COLS * 32,
    GPU_GATHERERS = 128 /* threads that gather columns */
};

/* ---- a stage ---- */

GPU_FN int gpu_stage_sums(int type)
{
    return type == KERN_Q4_K ? GPU_SUM_BYTES : 0;
}
GPU_FN int gpu_stage_weights(int type)
{
    return GPU_VALUE_BYTES + gpu_stage_sums(type);
}
GPU_FN int gpu_stage_bytes(int type)
{
    return (gpu_stage_weights(type) + GPU_ITEM_TILES * gpu_tile_bytes(type) + 1023) / 1024 * 1024;
}
/* Where value k (0..255) of a column lies in a stage, and half j (0..15) of its sums behind the
 * values. */
GPU_FN int gpu_stage_value(int col, int k)
{
    return k / GPU_SLAB_K * GPU_SLAB_BYTES + gpu_swizzle(col, k % GPU_SLAB_K * 2);
}
GPU_FN int gpu_stage_sum(int col, int j)
{
    return col / 8 * 256 + j / 8 * 128 + col % 8 * 16 + j % 8 * 2;
}

/* Gathering: a thread copies 16-byte piece `gpu_gather_piece` of every slab of the columns
 * `gpu_gather_col(thread, i)`, so a quarter of a warp reads 128 bytes of one row; and one piece of
 * the sums of column thread / 2. */
GPU_FN int gpu_gather_col(int thread, int i)
{
    return thread / 8 + GPU_GATHERERS / 8 * i;
}
GPU_FN int gpu_gather_piece(int thread)
{
    return thread % 8;
}

/* ---- operands ---- */

/* The descriptor of a matrix in shared memory, K the fast direction. `start` and the strides in
 * bytes: `k_stride` between core matrices along k (not read with a swizzle), `col_stride` between
 * groups of 8 columns. */
GPU_FN uint64_t gpu_operand(uint32_t start, int k_stride, int col_stride, int swizzle_128)
{
    return (uint64_t)(start >> 4 & 0x3fff) | (uint64_t)(k_stride >> 4) << 16 |
           (uint64_t)(col_stride >> 4) << 32 | (uint64_t)(swizzle_128 ? 1 : 0) << 62;
}
/* The first k-step's columns of the stage at shared address `stage`; those of step `step`, one
 * addition further; the stage's sums. */
GPU_FN uint64_t gpu_operand_values(uint32_t stage)
{
    return gpu_operand(stage, 16, 1024, 1);
}
GPU_FN uint64_t gpu_operand_step(uint64_t values, int step)
{
    return values + (uint64_t)((step / 4 * GPU_SLAB_BYTES + step % 4 * 32) >> 4);
}
GPU_FN uint64_t gpu_operand_sums(uint32_t stage)
{
    return gpu_operand(stage + GPU_VALUE_BYTES, 128, 256, 0);
}

/* Element i of a thread (0..127 of its warpgroup) of the A operand, rows 0..63 of the warpgroup,
 * and of the f32 result. */
GPU_FN int gpu_group_a_row(int thread, int i)
{
    return thread / 32 * GPU_TILE_ROWS + gpu_a_row(thread % 32, i);
}
GPU_FN int gpu_group_c_row(int thread, int i)
{
    return thread / 32 * GPU_TILE_ROWS + gpu_c_row(thread % 32, i % 4);
}
GPU_FN int gpu_group_c_col(int thread, int i)
{
    return i / 4 * 8 + gpu_c_token(thread % 32, i % 4);
}

/* ---- work ---- */

/* Item `item` of a list: which entry and which chunk of row tiles. The entries of one expert take
 * turns at a chunk, so that its weights are read from memory once and then from the L2. */
GPU_FN int gpu_item_first(gpu_entry any, int entry_i)
{
    return entry_i - any.nth;
}
GPU_FN int gpu_item_entry(gpu_entry any, int chunks, int item)
{
    int in = any.nth * chunks + item % chunks;
    return gpu_item_first(any, item / chunks) + in % any.of;
}
GPU_FN int gpu_item_chunk(gpu_entry any, int chunks, int item)
{
    return (any.nth * chunks + item % chunks) / any.of;
}

#endif
