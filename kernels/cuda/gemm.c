/*
 * Which product kernels serve a weight type, and how much shared memory their rings get. The plan of
 * a launch never changes bits: it only says who does what. Knows nothing of layers or of the
 * device's state.
 */
#include "kernels/cuda/gemm_types.h"
#include "kernels/cuda/stage.h"

typedef struct gemm_type {
    int type;
    int (*launch)(const gpu_gemm *g, int form, int n_blocks, int chained, gpu_stream stream);
    int (*prepare)(int smem_limit);
    int (*occupancy)(const gpu_gemm *g, int form);
} gemm_type;

static const gemm_type gemm_types[] = {
    {KERN_Q4_K, gpu_launch_q4k, gpu_prepare_q4k, gpu_occupancy_q4k},
    {KERN_Q6_K, gpu_launch_q6k, gpu_prepare_q6k, gpu_occupancy_q6k},
    {KERN_Q8_0, gpu_launch_q8, gpu_prepare_q8, gpu_occupancy_q8},
    {KERN_GPTQ4, gpu_launch_gptq, gpu_prepare_gptq, gpu_occupancy_gptq},
    {KERN_F16, gpu_launch_f16, gpu_prepare_f16, gpu_occupancy_f16},
    {KERN_BF16, gpu_launch_bf16, gpu_prepare_bf16, gpu_occupancy_bf16},
};

enum {
    N_TYPES = sizeof gemm_types / sizeof gemm_types[0],
    BARRIERS = 512,          /* bytes; gemm.cuh */
    PART_BYTES = 16 * 17 * 4 /* of a unit's sums */
};

static const gemm_type *find(int type)
{
    for (int i = 0; i < N_TYPES; i++)
        if (gemm_types[i].type == type) return &gemm_types[i];
    return NULL;
}

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
    size_t parts =
        form == GPU_FORM_SPLIT ? (size_t)(g->cut.chunk * g->cut.segs) * PART_BYTES : 0;
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

int gpu_gemm_prepare(int smem_limit)
{
    int e = gpu_side_prepare();
    for (int i = 0; i < N_TYPES && e == 0; i++)
        e = gemm_types[i].prepare(smem_limit);
    return e;
}

int gpu_launch_gemm(const gpu_gemm *g, int form, int n_blocks, int chained, gpu_stream stream)
{
    const gemm_type *t = find(g->m.type);
    return t != NULL ? t->launch(g, form, n_blocks, chained, stream) : 1; /* cudaErrorInvalidValue */
}

int gpu_gemm_occupancy(const gpu_gemm *g, int form)
{
    const gemm_type *t = find(g->m.type);
    return t != NULL ? t->occupancy(g, form) : 0;
}
