// The product kernels of BF16; templates must be instantiated where they are launched.
#include "kernels/cuda/gemm_types.h"
#include "kernels/cuda/launch.cuh"

extern "C" int gpu_launch_bf16(const gpu_gemm *g, int form, int n_blocks, int chained, void *stream)
{
    return launch_type<KERN_BF16>(g, form, n_blocks, chained, (cudaStream_t)stream);
}
extern "C" int gpu_prepare_bf16(int smem_limit)
{
    return prepare_type<KERN_BF16>(smem_limit);
}
extern "C" int gpu_occupancy_bf16(const gpu_gemm *g, int form)
{
    return occupancy_type<KERN_BF16>(g, form);
}
