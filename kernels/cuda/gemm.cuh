// The product of packed experts with gathered activation rows, on mma.sync (sm_80 and later).
//
// Weights are the A operand (16 rows), pairs the B operand (8 columns each). Every warp streams its own tiles
// through its own ring in shared memory: one bulk copy per tile on sm_90 and later, cp.async before. Codes
// become exact small halves; scales meet the f32 sums, so nothing but the activations was ever rounded.
//
// The order of additions of an element is that of layout.h: groups inside a tile, tiles inside a segment,
// segments. Two forms compute the same bits: `SPLIT` gives segments to different warps, which add up in
// shared memory (few pairs per expert: latency counts), else a warp owns row tiles and adds in registers
// (many pairs: a decoded weight meets more columns). There are no atomics.
#ifndef EP_KERNELS_CUDA_GEMM_CUH
#define EP_KERNELS_CUDA_GEMM_CUH
#include "kernels/cuda/chain.cuh"
#include "kernels/cuda/gpu.h"
#include "kernels/cuda/mma.cuh"

enum { MAX_SLOTS = 4, BARRIER_BYTES = 512, PART_LD = 17, PART_FLOATS = 16 * PART_LD };

// ---- one tile ----

__device__ __forceinline__ uint32_t word_of(const uint4 &v, int i)
{
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// A word of scales for row lane/4 + 8h, from k-step `step` on: it serves SPAN steps.
template <int TYPE> struct span {
    static constexpr int steps = TYPE == KERN_Q4_K ? 8 : TYPE == KERN_GPTQ4 ? 16 : 4;
};
// k-steps under one scale; 16: none.
template <int TYPE> struct group {
    static constexpr int steps = TYPE == KERN_Q6_K                        ? 1
                                 : TYPE == KERN_Q4_K || TYPE == KERN_Q8_0 ? 2
                                 : TYPE == KERN_GPTQ4                     ? 8
                                                                          : 16;
};
template <int TYPE> __device__ __forceinline__ uint32_t read_scales(const uint8_t *tile, int lane, int h, int step)
{
    const int row = lane / 4 + 8 * h;
    if constexpr (TYPE == KERN_Q4_K) {
        uint4 head = *(const uint4 *)(tile + 16 * row);
        uint32_t sc[2], mn[2];
        gpu_q4k_scales(head.y, head.z, head.w, sc, mn);
        return step < 8 ? sc[0] : sc[1];
    }
    if constexpr (TYPE == KERN_Q6_K) return *(const uint32_t *)(tile + 16 * row + step) ^ 0x80808080u;
    if constexpr (TYPE == KERN_Q8_0) return *(const uint32_t *)(tile + 16 * row + step);
    if constexpr (TYPE == KERN_GPTQ4) return *(const uint32_t *)(tile + 4 * row);
    return 0;
}
// The factor of k-step `step` out of that word.
template <int TYPE> __device__ __forceinline__ float scale_of(uint32_t w, int step)
{
    if constexpr (TYPE == KERN_Q4_K) return byte_float(w, step / 2 % 4, 0.0f);
    if constexpr (TYPE == KERN_Q6_K) return byte_float(w, step % 4, 128.0f);
    if constexpr (TYPE == KERN_Q8_0) return step / 2 % 2 ? half_hi(w) : half_lo(w);
    if constexpr (TYPE == KERN_GPTQ4) return step < 8 ? half_lo(w) : half_hi(w);
    return 1.0f;
}

// Eight nibbles to the exact halves q - zero.
template <int ZERO> __device__ __forceinline__ void nibbles(uint32_t q, uint32_t (&a)[4])
{
    const uint32_t magic = 0x64006400u;                                   // 1024 in both halves
    const uint32_t low = ZERO == 8 ? 0x64086408u : 0x64006400u;           // 1024 + zero
    const uint32_t high = ZERO == 8 ? 0xd480d480u : 0xd400d400u;          // -(64 + zero)
    const uint32_t sixteenth = 0x2c002c00u;
    a[0] = half2_sub(and_or(q, 0x000f000fu, magic), low);
    a[1] = half2_fma(and_or(q, 0x00f000f0u, magic), sixteenth, high);
    q >>= 8;
    a[2] = half2_sub(and_or(q, 0x000f000fu, magic), low);
    a[3] = half2_fma(and_or(q, 0x00f000f0u, magic), sixteenth, high);
}

// Steps 2j and 2j + 1 of a tile as A operands. `four`: the nibble words of steps 4(j/2) .. 4(j/2) + 3, read once for two pairs.
template <int TYPE>
__device__ __forceinline__ void read_steps(const uint8_t *tile, int lane, int j, const uint4 &four,
                                           uint32_t (&a)[2][4])
{
    const uint4 *plane = (const uint4 *)(tile + gpu_head_bytes(TYPE));
    if constexpr (TYPE == KERN_F16 || TYPE == KERN_BF16) {
#pragma unroll
        for (int p = 0; p < 2; p++) {
            uint4 v = plane[(2 * j + p) * 32 + lane];
            a[p][0] = v.x, a[p][1] = v.y, a[p][2] = v.z, a[p][3] = v.w;
        }
    } else if constexpr (TYPE == KERN_Q8_0) {
        uint4 v = plane[j * 32 + lane];
#pragma unroll
        for (int p = 0; p < 2; p++)
#pragma unroll
            for (int r = 0; r < 4; r++) { // 1024 + (q + 128)
                uint32_t h = __byte_perm(word_of(v, 2 * p + r / 2), 0x64646464u, r % 2 ? 0x4342 : 0x4140);
                a[p][r] = half2_sub(h, 0x64806480u);
            }
    } else {
        const uint2 v = j % 2 ? make_uint2(four.z, four.w) : make_uint2(four.x, four.y);
        if constexpr (TYPE == KERN_Q6_K) {
            uint32_t high = *((const uint32_t *)(plane + 128 + j / 4 * 32 + lane) + j % 4);
#pragma unroll
            for (int p = 0; p < 2; p++)
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    int at = 8 * p + 2 * r; // of the field; it belongs at bit 4
                    uint32_t up = at >= 4 ? high >> (at - 4) : high << (4 - at);
                    uint32_t h = and_or((p ? v.y : v.x) >> 4 * r, 0x000f000fu, 0x64006400u);
                    a[p][r] = half2_sub(and_or(up, 0x00300030u, h), 0x64206420u); // 1024 + 32
                }
        } else {
            nibbles<TYPE == KERN_GPTQ4 ? 8 : 0>(v.x, a[0]);
            nibbles<TYPE == KERN_GPTQ4 ? 8 : 0>(v.y, a[1]);
        }
    }
}

// The minimums of Q4_K as one step's A operand: the eight of a row twice, for the sums' two halves (gpu_sum_at).
// They are small integers, so exact; dmin takes back the factor 32 of the sums.
__device__ __forceinline__ void read_minimums(const uint8_t *tile, int lane, uint32_t (&a)[4], float (&d)[2],
                                              float (&dmin)[2])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint4 head = *(const uint4 *)(tile + 16 * (lane / 4 + 8 * h));
        uint32_t sc[2], mn[2];
        gpu_q4k_scales(head.y, head.z, head.w, sc, mn);
        uint32_t four = lane % 4 < 2 ? mn[0] : mn[1];
        a[h] = half2_sub(__byte_perm(four, 0x64646464u, lane % 2 ? 0x4342 : 0x4140), 0x64006400u);
        a[h + 2] = a[h];
        d[h] = half_lo(head.x);
        dmin[h] = 32.0f * half_hi(head.x);
    }
}

// Where a lane finds the columns of its entry: offsets of the rows of its B operands, in units of 16 bytes; the sums
// of a row lie at a quarter of that, in words.
template <int NT> struct columns {
    uint32_t value[NT];
    int live; // n8 tiles that hold a pair
};

// acc += rows of one tile per r times the columns; `kt`: the k-tile.
template <int TYPE, int MR, int NT>
__device__ __forceinline__ void tile_product(const gpu_rows &x, const columns<NT> &col, int kt,
                                             const uint8_t *tile, int tile_stride, int lane,
                                             float (&acc)[MR][NT][4])
{
    constexpr bool BF16 = TYPE == KERN_BF16;
    constexpr int GROUP = group<TYPE>::steps;
    float block[MR][NT][4] = {}, part[MR][NT][4] = {};
    uint32_t scales[MR][2];
    const uint4 *value = (const uint4 *)x.value + kt * (GPU_TILE_K / 8) + lane % 4;
    constexpr bool NIBBLES = TYPE == KERN_Q4_K || TYPE == KERN_Q6_K || TYPE == KERN_GPTQ4;
    uint4 four[MR];
    // As far as registers allow without spilling (cuda_spills watches).
    constexpr int AHEAD = (TYPE == KERN_Q4_K || TYPE == KERN_Q8_0) && MR > 1 ? 2 : 4;
#pragma unroll AHEAD
    for (int j = 0; j < 8; j++) {
        uint4 b[NT];
#pragma unroll
        for (int n = 0; n < NT; n++)
            if (n < col.live) b[n] = value[col.value[n] + 4 * j];
#pragma unroll
        for (int r = 0; r < MR; r++) {
            uint32_t a[2][4];
            if (NIBBLES && j % 2 == 0)
                four[r] = ((const uint4 *)(tile + r * tile_stride + gpu_head_bytes(TYPE)))[j / 2 * 32 + lane];
            read_steps<TYPE>(tile + r * tile_stride, lane, j, four[r], a);
#pragma unroll
            for (int p = 0; p < 2; p++) {
                const int step = 2 * j + p;
                if (GROUP < 16 && step % span<TYPE>::steps == 0)
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        scales[r][h] = read_scales<TYPE>(tile + r * tile_stride, lane, h, step);
                const bool ends = (step + 1) % GROUP == 0;
                float s0 = 1.0f, s1 = 1.0f;
                if (ends && GROUP < 16) {
                    s0 = scale_of<TYPE>(scales[r][0], step);
                    s1 = scale_of<TYPE>(scales[r][1], step);
                }
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    if (n >= col.live) continue;
                    mma<BF16>(part[r][n], a[p], p ? b[n].z : b[n].x, p ? b[n].w : b[n].y);
                    if (!ends || GROUP == 16) continue;
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        block[r][n][i] = fmaf(i < 2 ? s0 : s1, part[r][n][i], block[r][n][i]);
                        part[r][n][i] = 0.0f;
                    }
                }
            }
        }
    }
    // The tile's own factor, and the minimums times the sums of the activations.
#pragma unroll
    for (int r = 0; r < MR; r++) {
        if constexpr (TYPE == KERN_Q4_K) {
            uint32_t least[4];
            float d[2], dmin[2];
            read_minimums(tile + r * tile_stride, lane, least, d, dmin);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                if (n >= col.live) continue;
                const uint32_t *sum = (const uint32_t *)x.sum + col.value[n] / 4 + kt * 8 + lane % 4;
                float m[4] = {};
                mma<false>(m, least, sum[0], sum[4]);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    acc[r][n][i] += fmaf(d[i / 2], block[r][n][i], -(dmin[i / 2] * m[i]));
            }
        } else {
            float d0 = 1.0f, d1 = 1.0f;
            if constexpr (TYPE == KERN_Q6_K) {
                const uint8_t *d = tile + r * tile_stride + 256 + 2 * (lane / 4);
                d0 = half_lo(*(const uint16_t *)d);
                d1 = half_lo(*(const uint16_t *)(d + 16));
            }
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if constexpr (GROUP == 16)
                        acc[r][n][i] += part[r][n][i];
                    else if constexpr (TYPE == KERN_Q6_K)
                        acc[r][n][i] += (i < 2 ? d0 : d1) * block[r][n][i];
                    else
                        acc[r][n][i] += block[r][n][i];
                }
        }
    }
}

// ---- the ring of a warp ----

// Walks over the tiles of a warp's units in the order in which they are multiplied.
struct cursor {
    int item, unit, left;
    int rows;
    const uint8_t *at;
};

struct job {
    const gpu_gemm *g;
    int chunks, from, to, warp, lane;
};

__device__ __forceinline__ void cursor_enter(const job &j, cursor &c)
{
    const gpu_cut *cut = &j.g->cut;
    while (c.item < j.to && c.unit >= gpu_cut_units(cut, c.item % j.chunks)) {
        c.item++;
        c.unit = j.warp;
    }
    if (c.item >= j.to) return;
    gpu_unit u = gpu_cut_unit(cut, c.item % j.chunks, c.unit);
    c.left = u.tiles;
    c.rows = u.rows;
    c.at = j.g->w + (size_t)load_entry(j.g->list + c.item / j.chunks).expert * j.g->m.bytes +
           (size_t)(u.row_tile * cut->k_tiles + u.tile) * j.g->m.tile_bytes;
}

// Fetches the tiles (one per row tile of the unit) that the cursor stands on, and moves it on.
template <int TYPE, int MR>
__device__ __forceinline__ void fetch(const job &j, cursor &c, uint8_t *slot, uint32_t bar)
{
    const uint32_t bytes = gpu_tile_bytes(TYPE);
    if (c.item < j.to) {
        const size_t row = (size_t)j.g->cut.k_tiles * bytes;
#if __CUDA_ARCH__ >= 900
        if (j.lane == 0) {
            barrier_expect(bar, bytes * c.rows);
            for (int r = 0; r < c.rows; r++)
                bulk_copy(shared_address(slot + r * bytes), c.at + r * row, bytes, bar);
        }
#else
        for (int r = 0; r < c.rows; r++)
            for (uint32_t i = j.lane * 16; i < bytes; i += 512)
                copy_16(shared_address(slot + r * bytes + i), c.at + r * row + i);
#endif
        c.at += bytes;
        if (--c.left == 0) {
            c.unit += GPU_WARPS;
            cursor_enter(j, c);
        }
    }
#if __CUDA_ARCH__ < 900
    copy_commit(); // an empty group too, so that counting groups counts slots
#endif
}

// ---- ends ----

__device__ __forceinline__ float silu_mul(float gate, float up)
{
    return gate / (1.0f + expf(-gate)) * up;
}

// Row `row` of a tile's results (or channel, interleaved), pair `pair`.
__device__ __forceinline__ void put(const gpu_gemm &g, int row_tile, int row, int pair, float a, float b)
{
    int source = g.pair_row != nullptr ? g.pair_row[pair] : pair;
    float scale = g.x.scale[source], v;
    int n;
    if (g.m.interleaved) {
        n = row_tile * (GPU_TILE_ROWS / 2) + row;
        v = silu_mul(a * scale, b * scale);
    } else {
        n = row_tile * GPU_TILE_ROWS + row;
        v = a * scale;
    }
    if (n >= g.m.n) return;
    if (g.pair_weight != nullptr) v *= g.pair_weight[pair];
    int to = g.pair_out != nullptr ? g.pair_out[pair] : pair;
    g.out[(size_t)to * g.ld + n] = v;
}

template <int NT>
__device__ __forceinline__ void find_columns(const gpu_gemm &g, const gpu_entry &e, int lane, columns<NT> &col)
{
    const uint32_t k8 = g.cut.k_tiles * (GPU_TILE_K / 8);
    col.live = (e.cols + 7) / 8;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        // Columns past the last pair read that pair's row again; what they give is never stored.
        int c = min(8 * n + gpu_b_token(lane, 0), e.cols - 1);
        int row = g.pair_row != nullptr ? g.pair_row[e.first + c] : e.first + c;
        col.value[n] = (uint32_t)row * k8;
    }
}

// Adds the segments of an item's row tiles, in ascending order, and stores.
__device__ __forceinline__ void reduce(const gpu_gemm &g, const gpu_entry &e, int chunk_i, const float *parts)
{
    const int rows = g.m.interleaved ? GPU_TILE_ROWS / 2 : GPU_TILE_ROWS, segs = g.cut.segs;
    const int tiles = gpu_cut_rows(&g.cut, chunk_i), all = tiles * rows * e.cols;
    for (int i = threadIdx.x; i < all; i += blockDim.x) {
        int row = i % rows, col = i / rows % e.cols, tile = i / (rows * e.cols);
        const float *p = parts + (size_t)tile * segs * PART_FLOATS + row * PART_LD + col;
        float a = 0.0f, b = 0.0f;
        for (int s = 0; s < segs; s++, p += PART_FLOATS) {
            a += p[0];
            if (g.m.interleaved) b += p[8 * PART_LD];
        }
        put(g, chunk_i * g.cut.chunk + tile, row, e.first + col, a, b);
    }
}

// ---- the kernel ----

template <int TYPE, int MR, int NT, bool SPLIT>
__global__ void __launch_bounds__(GPU_WARPS * 32, SPLIT ? 2 : 1) gemm_kernel(const gpu_gemm g)
{
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int SLOT = MR * GPU_TILE_ROWS * (TYPE == KERN_Q4_K    ? 144
                                               : TYPE == KERN_Q6_K  ? 210
                                               : TYPE == KERN_Q8_0  ? 272
                                               : TYPE == KERN_GPTQ4 ? 132
                                                                    : 512);
    uint8_t *ring = shared + BARRIER_BYTES + warp * g.slots * SLOT;
    float *parts = (float *)(shared + BARRIER_BYTES + GPU_WARPS * g.slots * SLOT);
    const uint32_t bars = shared_address(shared) + warp * MAX_SLOTS * 8;
    const int chunks = gpu_cut_chunks(&g.cut);
    int64_t from, to;
    gpu_share((int64_t)load_count(g.n_entries) * chunks, blockIdx.x, gridDim.x, &from, &to);
    const job j = {&g, chunks, (int)from, (int)to, warp, lane};

#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        for (int s = 0; s < g.slots; s++)
            barrier_init(bars + 8 * s, 1);
        barrier_init_fence();
    }
    __syncwarp();
#endif
    cursor next = {j.from, warp, 0, 0, nullptr};
    cursor_enter(j, next);
    for (int s = 0; s < g.slots; s++)
        fetch<TYPE, MR>(j, next, ring + s * SLOT, bars + 8 * s);
    chain_wait();
    chain_release();

    int slot = 0;
    uint32_t parity = 0;
    for (int item = j.from; item < j.to; item++) {
        const int chunk_i = item % chunks, units = gpu_cut_units(&g.cut, chunk_i);
        const gpu_entry e = load_entry(g.list + item / chunks);
        columns<NT> col;
        if (warp < units) find_columns<NT>(g, e, lane, col);
        for (int unit = warp; unit < units; unit += GPU_WARPS) {
            const gpu_unit u = gpu_cut_unit(&g.cut, chunk_i, unit);
            float total[MR][NT][4] = {}, acc[MR][NT][4] = {};
            for (int t = 0; t < u.tiles; t++) {
#if __CUDA_ARCH__ >= 900
                barrier_wait(bars + 8 * slot, parity);
#else
                copy_wait(g.slots - 1);
                __syncwarp();
#endif
                tile_product<TYPE, MR, NT>(g.x, col, u.tile + t, ring + slot * SLOT, SLOT / MR, lane, acc);
                __syncwarp();
                fetch<TYPE, MR>(j, next, ring + slot * SLOT, bars + 8 * slot);
                if (++slot == g.slots) {
                    slot = 0;
                    parity ^= 1;
                }
                if constexpr (!SPLIT) {
                    if ((t + 1) % gpu_segment_tiles(g.cut.k_tiles) != 0 && t + 1 < u.tiles) continue;
#pragma unroll
                    for (int r = 0; r < MR; r++)
#pragma unroll
                        for (int n = 0; n < NT; n++)
#pragma unroll
                            for (int i = 0; i < 4; i++) {
                                total[r][n][i] += acc[r][n][i];
                                acc[r][n][i] = 0.0f;
                            }
                }
            }
            if constexpr (SPLIT) {
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        parts[unit * PART_FLOATS + gpu_c_row(lane, i) * PART_LD + 8 * n + gpu_c_token(lane, i)] =
                            acc[0][n][i];
            } else {
#pragma unroll
                for (int r = 0; r < MR; r++)
#pragma unroll
                    for (int n = 0; n < NT; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            int c = 8 * n + gpu_c_token(lane, i);
                            if (r >= u.rows || c >= e.cols) continue;
                            float v = total[r][n][i];
                            if (!g.m.interleaved)
                                put(g, u.row_tile + r, gpu_c_row(lane, i), e.first + c, v, 0.0f);
                            else if (i < 2)
                                put(g, u.row_tile + r, lane / 4, e.first + c, v, total[r][n][i + 2]);
                        }
            }
        }
        if constexpr (SPLIT) {
            __syncthreads();
            reduce(g, e, chunk_i, parts);
            __syncthreads();
        }
    }
}
#endif
