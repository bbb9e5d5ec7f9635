// The product kernels of F16; templates must be instantiated where they are launched.
#include "kernels/cuda/gemm_types.h"
#include "kernels/cuda/launch.cuh"

extern "C" int gpu_launch_f16(const gpu_gemm *g, int form, int n_blocks, int chained, void *stream)
{
    return launch_type<KERN_F16>(g, form, n_blocks, chained, (cudaStream_t)stream);
}
extern "C" int gpu_prepare_f16(int smem_limit)
{
    return prepare_type<KERN_F16>(smem_limit);
}
extern "C" int gpu_occupancy_f16(const gpu_gemm *g, int form)
{
    return occupancy_type<KERN_F16>(g, form);
}
