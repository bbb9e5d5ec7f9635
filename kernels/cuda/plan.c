/*
 * How a product is cut, and how much shared memory its rings get; part of every build, so that it
 * is proved everywhere. A plan never changes bits: it only says who does what.
 */
#include "kernels/cuda/gpu.h"
#include "kernels/cuda/stage.h"

enum {
    BARRIERS = 512,          /* bytes; gemm.cuh, wgmma.cuh */
    PART_BYTES = 16 * 17 * 4 /* of a unit's sums */
};

int gpu_form_width(int form)
{
    return form == GPU_FORM_WGMMA   ? GPU_ITEM_COLS
           : form == GPU_FORM_SPLIT ? GPU_NARROW_COLS
                                    : GPU_WIDE_COLS;
}

size_t gpu_gemm_smem(const gpu_gemm *g, int form)
{
    if (form == GPU_FORM_WGMMA) /* and what moves the stages to a multiple of 1024 */
        return (size_t)(g->slots * gpu_stage_bytes(g->m.type)) + BARRIERS + 1008;
    size_t ring = (size_t)(GPU_WARPS * g->slots * g->cut.rows * g->m.tile_bytes);
    size_t parts = form == GPU_FORM_SPLIT ? (size_t)(g->cut.chunk * g->cut.segs) * PART_BYTES : 0;
    return BARRIERS + ring + parts;
}

/* Split: two blocks per multiprocessor hide each other's ends; four slots are what that leaves for
 * four-bit weights, larger tiles get fewer. */
void gpu_gemm_plan(gpu_gemm *g, int form, int smem_limit)
{
    g->cut = form == GPU_FORM_WGMMA
                 ? gpu_cut_make(&g->m, 0, 1, GPU_ITEM_TILES)
                 : gpu_cut_make(&g->m, form == GPU_FORM_SPLIT, GPU_WIDE_ROWS, GPU_WARPS);
    size_t limit = (size_t)smem_limit;
    if (form == GPU_FORM_SPLIT && limit > 112 * 1024) limit = 112 * 1024;
    for (g->slots = 4; g->slots > 1 && gpu_gemm_smem(g, form) > limit; g->slots--) {
    }
}
