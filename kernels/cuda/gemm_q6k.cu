// The product kernels of Q6_K; templates must be instantiated where they are launched.
#include "kernels/cuda/gemm_types.h"
#include "kernels/cuda/launch.cuh"

extern "C" int gpu_launch_q6k(const gpu_gemm *g, int form, int n_blocks, int chained, void *stream)
{
    return launch_type<KERN_Q6_K>(g, form, n_blocks, chained, (cudaStream_t)stream);
}
extern "C" int gpu_prepare_q6k(int smem_limit)
{
    return prepare_type<KERN_Q6_K>(smem_limit);
}
extern "C" int gpu_occupancy_q6k(const gpu_gemm *g, int form)
{
    return occupancy_type<KERN_Q6_K>(g, form);
}
