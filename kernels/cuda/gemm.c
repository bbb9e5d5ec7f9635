/*
 * Which product kernels serve a weight type. Knows nothing of layers or of the device's state.
 */
#include "kernels/cuda/gemm_types.h"

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

enum { N_TYPES = sizeof gemm_types / sizeof gemm_types[0] };

static const gemm_type *find(int type)
{
    for (int i = 0; i < N_TYPES; i++)
        if (gemm_types[i].type == type) return &gemm_types[i];
    return NULL;
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
    return t != NULL ? t->launch(g, form, n_blocks, chained, stream)
                     : 1; /* cudaErrorInvalidValue */
}

int gpu_gemm_occupancy(const gpu_gemm *g, int form)
{
    const gemm_type *t = find(g->m.type);
    return t != NULL ? t->occupancy(g, form) : 0;
}
