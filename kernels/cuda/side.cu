// Launching and loading the kernels around the products (side.cuh).
#include "kernels/cuda/side.cuh"

extern "C" int gpu_launch_rows(int act, const void *src, gpu_rows to, const int32_t *n, int most, int k,
                               int is_bf16, int form, int chained, gpu_stream stream)
{
    int blocks = most < 1 ? 1 : most < 4096 ? most : 4096;
    return launch(rows_kernel, blocks, ROW_THREADS, 0, (cudaStream_t)stream, chained, act, (const uint8_t *)src, to,
                  n, k, is_bf16, (int)(form == GPU_FORM_WGMMA));
}

extern "C" int gpu_launch_list(const int32_t *offset, int n_experts, int width, gpu_entry *list,
                               int32_t *n_entries, gpu_stream stream)
{
    list_kernel<<<1, LIST_THREADS, 0, (cudaStream_t)stream>>>(offset, n_experts, width, list, n_entries);
    return cudaGetLastError();
}

extern "C" int gpu_launch_pack(const gpu_matrix *m, const void *a, const void *b, void *dst, gpu_stream stream)
{
    pack_kernel<<<1024, 256, 0, (cudaStream_t)stream>>>(*m, (const uint8_t *)a, (const uint8_t *)b,
                                                        (uint32_t *)dst);
    return cudaGetLastError();
}

extern "C" int gpu_launch_gate(const gpu_gate *g, gpu_stream stream)
{
    if (g->n_experts < 1 || g->n_experts > 32 * GATE_EACH || g->top_k < 1 || g->top_k > g->n_experts)
        return cudaErrorInvalidValue;
    if (g->n_rows == 0) return cudaSuccess;
    gate_kernel<<<(g->n_rows + 3) / 4, 128, 0, (cudaStream_t)stream>>>(*g);
    return cudaGetLastError();
}

extern "C" int gpu_launch_combine(float *x, const float *y, const int32_t *place, const float *weights, int n_rows,
                                  int top_k, int hidden, gpu_stream stream)
{
    if (n_rows == 0) return cudaSuccess;
    dim3 grid((hidden + 255) / 256, n_rows);
    combine_kernel<<<grid, 256, 0, (cudaStream_t)stream>>>(x, y, place, weights, top_k, hidden);
    return cudaGetLastError();
}

// Kernels are loaded when first asked for; better here than while a graph is captured.
template <typename K> static cudaError_t load(K kernel)
{
    cudaFuncAttributes a;
    return cudaFuncGetAttributes(&a, kernel);
}

extern "C" int gpu_compiled_for(void)
{
    cudaFuncAttributes a;
    return cudaFuncGetAttributes(&a, rows_kernel) == cudaSuccess ? a.ptxVersion : 0;
}

extern "C" int gpu_side_prepare(void)
{
    cudaError_t e = load(rows_kernel);
    if (e == cudaSuccess) e = load(list_kernel);
    if (e == cudaSuccess) e = load(pack_kernel);
    if (e == cudaSuccess) e = load(gate_kernel);
    if (e == cudaSuccess) e = load(combine_kernel);
    return e;
}
