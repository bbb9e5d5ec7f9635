// Launching, loading and counting the product kernels of one weight type. A launch's form is a run-time number, its
// kernel a template: the one place that knows which is which.
#ifndef EP_KERNELS_CUDA_LAUNCH_CUH
#define EP_KERNELS_CUDA_LAUNCH_CUH
#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/wgmma.cuh"

typedef void (*product_kernel)(const gpu_gemm);

template <int TYPE> static product_kernel kernel_of(int form, int *threads)
{
    *threads = form == GPU_FORM_WGMMA ? WGMMA_THREADS : GPU_WARPS * 32;
    return form == GPU_FORM_WGMMA   ? wgmma_kernel<TYPE>
           : form == GPU_FORM_SPLIT ? gemm_kernel<TYPE, 1, GPU_NARROW_COLS / 8, true>
                                    : gemm_kernel<TYPE, GPU_WIDE_ROWS, GPU_WIDE_COLS / 8, false>;
}

template <int TYPE> static int launch_type(const gpu_gemm *g, int form, int n_blocks, int chained, cudaStream_t stream)
{
    int threads;
    product_kernel kernel = kernel_of<TYPE>(form, &threads);
    return launch(kernel, n_blocks, threads, gpu_gemm_smem(g, form), stream, chained, *g);
}

template <int TYPE> static int prepare_type(int smem_limit)
{
    cudaError_t e = cudaSuccess;
    for (int form = 0; form < GPU_FORMS && e == cudaSuccess; form++) {
        int threads;
        product_kernel kernel = kernel_of<TYPE>(form, &threads);
        cudaFuncAttributes a;
        e = cudaFuncGetAttributes(&a, kernel);
        if (e == cudaSuccess)
            e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_limit);
    }
    return e;
}

template <int TYPE> static int occupancy_type(const gpu_gemm *g, int form)
{
    int n = 0, threads;
    product_kernel kernel = kernel_of<TYPE>(form, &threads);
    cudaError_t e =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, kernel, threads, gpu_gemm_smem(g, form));
    return e == cudaSuccess ? n : 0;
}
#endif
