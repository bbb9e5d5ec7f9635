// The product kernels of Q4_K; templates must be instantiated where they are launched.
#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/gemm_types.h"

extern "C" int gpu_launch_q4k(const gpu_gemm *g, int split, int n_blocks, void *stream)
{
    return launch_type<KERN_Q4_K>(g, split, n_blocks, (cudaStream_t)stream);
}
extern "C" int gpu_prepare_q4k(int smem_limit)
{
    return prepare_type<KERN_Q4_K>(smem_limit);
}
extern "C" int gpu_occupancy_q4k(const gpu_gemm *g, int split)
{
    return occupancy_type<KERN_Q4_K>(g, split);
}
