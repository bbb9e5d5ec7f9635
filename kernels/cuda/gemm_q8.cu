// The product kernels of Q8_0; templates must be instantiated where they are launched.
#include "kernels/cuda/gemm_types.h"
#include "kernels/cuda/launch.cuh"

extern "C" int gpu_launch_q8(const gpu_gemm *g, int form, int n_blocks, int chained, void *stream)
{
    return launch_type<KERN_Q8_0>(g, form, n_blocks, chained, (cudaStream_t)stream);
}
extern "C" int gpu_prepare_q8(int smem_limit)
{
    return prepare_type<KERN_Q8_0>(smem_limit);
}
extern "C" int gpu_occupancy_q8(const gpu_gemm *g, int form)
{
    return occupancy_type<KERN_Q8_0>(g, form);
}
