#ifndef EP_KERNELS_CUDA_GEMM_TYPES_H
#define EP_KERNELS_CUDA_GEMM_TYPES_H
/* gemm_types: the product kernels of each weight type, one translation unit each; gemm.c chooses.
 */
#include "kernels/cuda/gpu.h"

#ifdef __cplusplus
extern "C" {
#endif

int gpu_launch_q4k(const gpu_gemm *g, int form, int n_blocks, int chained, gpu_stream stream);
int gpu_launch_q6k(const gpu_gemm *g, int form, int n_blocks, int chained, gpu_stream stream);
int gpu_launch_q8(const gpu_gemm *g, int form, int n_blocks, int chained, gpu_stream stream);
int gpu_launch_gptq(const gpu_gemm *g, int form, int n_blocks, int chained, gpu_stream stream);
int gpu_launch_f16(const gpu_gemm *g, int form, int n_blocks, int chained, gpu_stream stream);
int gpu_launch_bf16(const gpu_gemm *g, int form, int n_blocks, int chained, gpu_stream stream);
int gpu_prepare_q4k(int smem_limit);
int gpu_prepare_q6k(int smem_limit);
int gpu_prepare_q8(int smem_limit);
int gpu_prepare_gptq(int smem_limit);
int gpu_prepare_f16(int smem_limit);
int gpu_prepare_bf16(int smem_limit);
int gpu_occupancy_q4k(const gpu_gemm *g, int form);
int gpu_occupancy_q6k(const gpu_gemm *g, int form);
int gpu_occupancy_q8(const gpu_gemm *g, int form);
int gpu_occupancy_gptq(const gpu_gemm *g, int form);
int gpu_occupancy_f16(const gpu_gemm *g, int form);
int gpu_occupancy_bf16(const gpu_gemm *g, int form);

#ifdef __cplusplus
}
#endif
#endif
