// The kernels around the products: preparing activation rows, the work list, packing, and the gate and the combine of
// routers to come. Each result element has one writer and one order of additions. Their launches are side.cu.
#ifndef EP_KERNELS_CUDA_SIDE_CUH
#define EP_KERNELS_CUDA_SIDE_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "kernels/cuda/chain.cuh"
#include "kernels/cuda/gpu.h"

// ---- activation rows ----

enum { ROW_THREADS = 256 };

__device__ __forceinline__ float row_value(int act, const void *row, int k, int i)
{
    switch (act) {
    case KERN_ACT_F32:
        return ((const float *)row)[i];
    case KERN_ACT_BF16:
        return __uint_as_float((uint32_t)((const uint16_t *)row)[i] << 16);
    default: {
        int block = act == KERN_ACT_Q8_256 ? 256 : act == KERN_ACT_Q8_128 ? 128 : 32;
        const float *scale = (const float *)((const int8_t *)row + k);
        return (float)((const int8_t *)row)[i] * scale[i / block];
    }
    }
}

__device__ __forceinline__ size_t row_bytes(int act, int k)
{
    return act == KERN_ACT_F32        ? 4 * (size_t)k
           : act == KERN_ACT_BF16     ? (2 * (size_t)k + 3) & ~(size_t)3
           : act == KERN_ACT_Q8_256   ? (size_t)k + 4 * (k / 256)
           : act == KERN_ACT_Q8_128   ? (size_t)k + 4 * (k / 128)
                                      : (size_t)k + 4 * (k / 32);
}

// The exponent that brings `amax` below 2^14, as 2^-shift and 2^shift; 1 for zero and what is not finite.
__device__ __forceinline__ void row_scale(float amax, float *down, float *up)
{
    *down = *up = 1.0f;
    if (!(amax > 0.0f) || !(amax < INFINITY)) return;
    int e;
    frexpf(amax, &e);
    e = max(e, -100);
    *down = ldexpf(1.0f, 14 - e);
    *up = ldexpf(1.0f, e - 14);
}

__global__ void __launch_bounds__(ROW_THREADS)
    rows_kernel(int act, const uint8_t *src, gpu_rows to, const int32_t *n, int k, int is_bf16, int natural)
{
    __shared__ float best[ROW_THREADS / 32];
    const int k_tiles = (k + GPU_TILE_K - 1) / GPU_TILE_K, padded = k_tiles * GPU_TILE_K;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    chain_wait();
    chain_release();
    for (int row = blockIdx.x; row < *n; row += gridDim.x) {
        const uint8_t *from = src + (size_t)row * row_bytes(act, k);
        float down = 1.0f, up = 1.0f;
        if (!is_bf16) {
            float amax = 0.0f;
            for (int i = threadIdx.x; i < k; i += ROW_THREADS)
                amax = fmaxf(amax, fabsf(row_value(act, from, k, i)));
            for (int d = 16; d > 0; d /= 2)
                amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
            __syncthreads(); // the last row's readers are done
            if (lane == 0) best[warp] = amax;
            __syncthreads();
            for (int w = 0; w < ROW_THREADS / 32; w++)
                amax = fmaxf(amax, best[w]);
            row_scale(amax, &down, &up);
        }
        if (threadIdx.x == 0) to.scale[row] = up;
        // A warp takes 32 values at a time: they share a sum, and their places are permuted among them.
        for (int at = warp * 32; at < padded; at += ROW_THREADS) {
            int i = at + lane;
            float v = i < k ? row_value(act, from, k, i) * down : 0.0f;
            uint16_t bits;
            if (is_bf16) {
                __nv_bfloat16 h = __float2bfloat16_rn(v);
                bits = __bfloat16_as_ushort(h);
                v = __bfloat162float(h);
            } else {
                __half h = __float2half_rn(v);
                bits = __half_as_ushort(h);
                v = __half2float(h);
            }
            to.value[(size_t)row * padded + (natural ? i : gpu_act_at(i))] = bits;
            for (int d = 16; d > 0; d /= 2)
                v += __shfl_xor_sync(~0u, v, d);
            if (lane > 0 || is_bf16) continue;
            uint16_t *sum = to.sum + (size_t)row * (padded / 16);
            v *= 1.0f / 32; // below 2^14 again
            __half whole = __float2half_rn(v), rest = __float2half_rn(v - __half2float(whole));
            sum[gpu_sum_at(at / 32, 0)] = __half_as_ushort(whole);
            sum[gpu_sum_at(at / 32, 1)] = __half_as_ushort(rest);
        }
    }
}

// ---- the work list ----

enum { LIST_THREADS = 512 };

// One block: counts of entries are scanned 512 experts at a time.
__global__ void __launch_bounds__(LIST_THREADS)
    list_kernel(const int32_t *offset, int n_experts, int width, gpu_entry *list, int32_t *n_entries)
{
    __shared__ int sum[2][LIST_THREADS];
    int base = 0;
    chain_wait(); // the first launch of a pass: there is nothing to wait for
    chain_release();
    for (int first = 0; first < n_experts; first += LIST_THREADS) {
        const int e = first + threadIdx.x;
        const int m = e < n_experts ? offset[e + 1] - offset[e] : 0, own = gpu_entries_of(m, width);
        int at = 0;
        sum[0][threadIdx.x] = own;
        __syncthreads();
        for (int d = 1; d < LIST_THREADS; d *= 2, at ^= 1) {
            int v = sum[at][threadIdx.x];
            if ((int)threadIdx.x >= d) v += sum[at][threadIdx.x - d];
            sum[at ^ 1][threadIdx.x] = v;
            __syncthreads();
        }
        if (m > 0) gpu_entries_put(list, base + sum[at][threadIdx.x] - own, e, offset[e], m, width);
        base += sum[at][LIST_THREADS - 1];
        __syncthreads();
    }
    if (threadIdx.x == 0) *n_entries = base;
}

// ---- packing ----

__global__ void pack_kernel(const gpu_matrix m, const uint8_t *a, const uint8_t *b, uint32_t *dst)
{
    const uint8_t *const src[2] = {a, b};
    const int64_t words = m.tile_bytes / 4, n = (int64_t)m.row_tiles * m.k_tiles * words;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        int tile = (int)(i / words);
        dst[i] = gpu_pack_word(&m, src, tile / m.k_tiles, tile % m.k_tiles, (int)(i % words));
    }
}

// ---- gate ----

// A warp per row, at most 1024 experts: lane l holds experts l, l + 32, ... Nothing is written for a row
// with a logit that is not finite except ids of -1.
enum { GATE_EACH = 32 };

__device__ __forceinline__ void better(float v, int id, float &best, int &best_id)
{
    if (v > best || (v == best && (unsigned)id < (unsigned)best_id)) {
        best = v;
        best_id = id;
    }
}

__global__ void __launch_bounds__(128) gate_kernel(const gpu_gate g)
{
    const int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= g.n_rows) return;
    const float *logits = g.logits + (size_t)row * g.n_experts;
    float score[GATE_EACH];
    float top = -INFINITY;
    bool sound = true;
#pragma unroll
    for (int i = 0; i < GATE_EACH; i++) {
        int e = lane + 32 * i;
        score[i] = e < g.n_experts ? logits[e] : -INFINITY;
        if (e < g.n_experts) sound &= isfinite(score[i]) != 0;
        top = fmaxf(top, score[i]);
    }
    sound = __all_sync(~0u, sound);
    for (int d = 16; d > 0; d /= 2)
        top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < GATE_EACH; i++) {
        if (lane + 32 * i >= g.n_experts) continue;
        score[i] = g.sigmoid ? 1.0f / (1.0f + expf(-score[i])) : expf(score[i] - top);
        sum += score[i];
    }
    for (int d = 16; d > 0; d /= 2)
        sum += __shfl_xor_sync(~0u, sum, d);
    // Equality is that of the scores, as on the CPU.
#pragma unroll
    for (int i = 0; i < GATE_EACH; i++)
        if (!g.sigmoid) score[i] /= sum;
    uint32_t taken = 0;
    float chosen = 0.0f;
    for (int slot = 0; slot < g.top_k; slot++) {
        float best = -INFINITY;
        int best_id = -1;
#pragma unroll
        for (int i = 0; i < GATE_EACH; i++) {
            int e = lane + 32 * i;
            if (e >= g.n_experts || (taken >> i & 1)) continue;
            better(g.bias != nullptr ? score[i] + g.bias[e] : score[i], e, best, best_id);
        }
        for (int d = 16; d > 0; d /= 2) {
            float v = __shfl_xor_sync(~0u, best, d);
            int id = __shfl_xor_sync(~0u, best_id, d);
            better(v, id, best, best_id);
        }
        float w = 0.0f;
#pragma unroll
        for (int i = 0; i < GATE_EACH; i++)
            if (best_id == lane + 32 * i) {
                w = score[i];
                taken |= 1u << i;
            }
        w = __shfl_sync(~0u, w, best_id & 31);
        chosen += w;
        if (lane == 0) {
            g.experts[(size_t)row * g.top_k + slot] = sound ? best_id : -1;
            if (sound) g.weights[(size_t)row * g.top_k + slot] = w;
        }
    }
    __syncwarp();
    if (!sound) return;
    for (int slot = lane; slot < g.top_k; slot += 32) {
        float *w = g.weights + (size_t)row * g.top_k + slot;
        if (g.renormalise) *w = chosen > 0.0f ? *w / chosen : 1.0f / (float)g.top_k;
        *w *= g.scale;
    }
}

// ---- combine ----

__global__ void combine_kernel(float *x, const float *y, const int32_t *place, const float *weights, int top_k,
                               int hidden)
{
    const int row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= hidden) return;
    float v = x[(size_t)row * hidden + i];
    for (int slot = 0; slot < top_k; slot++) {
        int from = place[(size_t)row * top_k + slot];
        if (from >= 0) v = fmaf(weights[(size_t)row * top_k + slot], y[(size_t)from * hidden + i], v);
    }
    x[(size_t)row * hidden + i] = v;
}
#endif
