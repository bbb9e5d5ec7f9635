// Launches of a pass follow one another on one stream. Chained, a launch may come to the multiprocessors while the
// one before it still runs (programmatic dependent launch, sm_90 and later).
//
// Rules that keep this free of races, whatever the launches read and write:
//   1. every thread of a chained kernel calls chain_wait; before it, it writes no global memory;
//   2. it calls chain_release after chain_wait, never before;
//   3. before chain_wait it reads only what was complete before the pass began (weights, its arguments) and what the
//      launch BEFORE the one before it, or an earlier one, wrote. By 2 all blocks of the launch before have passed
//      their own wait, so that launch is complete; such reads go to the L2 (load_entry, load_count), as the L1 may
//      hold what an earlier pass left there;
//   4. what an earlier launch of the pass wrote is not read through the read-only path (__ldg): it may be fetched
//      before chain_wait.
// The first launch of a pass is not chained, so nothing of one pass meets anything of the pass before.
#ifndef EP_KERNELS_CUDA_CHAIN_CUH
#define EP_KERNELS_CUDA_CHAIN_CUH
#include <cuda_runtime.h>
#include "kernels/cuda/layout.h"

// Returns when all earlier launches of the pass are complete and what they wrote can be read.
__device__ __forceinline__ void chain_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Once every block has called this, the next launch may start.
__device__ __forceinline__ void chain_release()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ int load_count(const int32_t *p)
{
    int v;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ gpu_entry load_entry(const gpu_entry *p)
{
    int4 v;
    asm volatile("ld.relaxed.gpu.global.v4.s32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    gpu_entry e;
    e.expert = v.x;
    e.first = v.y;
    e.cols = v.z;
    e.nth = (uint16_t)v.w;
    e.of = (uint16_t)((uint32_t)v.w >> 16);
    return e;
}

template <typename... P, typename... A>
static cudaError_t launch(void (*kernel)(P...), int blocks, int threads, size_t smem, cudaStream_t stream, int chained,
                          A... args)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3(blocks);
    how.blockDim = dim3(threads);
    how.dynamicSmemBytes = smem;
    how.stream = stream;
    how.attrs = &attribute;
    how.numAttrs = chained ? 1 : 0;
    return cudaLaunchKernelEx(&how, kernel, args...);
}
#endif
