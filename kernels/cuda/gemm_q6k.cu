// The product kernels of Q6_K; templates must be instantiated where they are launched.
#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/gemm_types.h"

extern "C" int gpu_launch_q6k(const gpu_gemm *g, int split, int n_blocks, void *stream)
{
    return launch_type<KERN_Q6_K>(g, split, n_blocks, (cudaStream_t)stream);
}
extern "C" int gpu_prepare_q6k(int smem_limit)
{
    return prepare_type<KERN_Q6_K>(smem_limit);
}
extern "C" int gpu_occupancy_q6k(const gpu_gemm *g, int split)
{
    return occupancy_type<KERN_Q6_K>(g, split);
}
