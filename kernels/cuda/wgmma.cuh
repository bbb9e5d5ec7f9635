// The product for many pairs per expert, on wgmma (sm_90a only; elsewhere the kernel is empty and the host does not
// choose it). Maps and sizes are those of stage.h.
//
// One block per multiprocessor, three warpgroups. The first fills the stages: one thread asks for the packed tiles
// (bulk copies), all gather the columns, 16 bytes at a time, into the swizzle. The other two each multiply 64 rows:
// a warp decodes its tile into A registers while the product of the step before runs, and puts scales on the sums of
// the group before. The order of additions of an element is that of gemm.cuh, step by step.
#ifndef EP_KERNELS_CUDA_WGMMA_CUH
#define EP_KERNELS_CUDA_WGMMA_CUH
#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/stage.h"

// A block starts with START_REGISTERS per thread (cuda_spills checks it); who takes more waits until others have given
// them, for ever if they are too few.
enum {
    WGMMA_THREADS = 384,
    GROUP_THREADS = 128,
    START_REGISTERS = 65536 / 384 / 8 * 8,
    FILLER_REGISTERS = 72,
    MULTIPLIER_REGISTERS = 216
};
static_assert(FILLER_REGISTERS % 8 == 0 && MULTIPLIER_REGISTERS % 8 == 0, "what setmaxnreg takes");
static_assert(FILLER_REGISTERS <= START_REGISTERS && MULTIPLIER_REGISTERS >= START_REGISTERS, "give, take");
static_assert(FILLER_REGISTERS * GROUP_THREADS + MULTIPLIER_REGISTERS * (WGMMA_THREADS - GROUP_THREADS) <=
                  START_REGISTERS * WGMMA_THREADS,
              "a block has no more registers than it started with");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// ---- the ring ----

// A place in the ring of stages; `full` and `empty` are its barriers.
struct place {
    uint32_t stages, barriers, bytes;
    int slots, slot;
    uint32_t parity;
};
__device__ __forceinline__ uint32_t stage_of(const place &p)
{
    return p.stages + p.slot * p.bytes;
}
__device__ __forceinline__ uint32_t full_of(const place &p)
{
    return p.barriers + 16 * p.slot;
}
__device__ __forceinline__ uint32_t empty_of(const place &p)
{
    return p.barriers + 16 * p.slot + 8;
}
__device__ __forceinline__ void step_on(place &p)
{
    if (++p.slot < p.slots) return;
    p.slot = 0;
    p.parity ^= 1;
}

// ---- work ----

// The items of this block. `entry` and `chunk` of an item are those of stage.h.
struct items {
    int from, to, chunks;
};
__device__ __forceinline__ items items_of(const gpu_gemm &g)
{
    items w;
    int64_t from, to;
    w.chunks = gpu_cut_chunks(&g.cut);
    gpu_share((int64_t)load_count(g.n_entries) * w.chunks, blockIdx.x, gridDim.x, &from, &to);
    w.from = (int)from;
    w.to = (int)to;
    return w;
}
__device__ __forceinline__ gpu_entry item_of(const gpu_gemm &g, const items &w, int item, int *chunk)
{
    const gpu_entry any = load_entry(g.list + item / w.chunks);
    *chunk = gpu_item_chunk(any, w.chunks, item);
    return load_entry(g.list + gpu_item_entry(any, w.chunks, item));
}

// ---- filling ----

// Asks for the tiles of the item's chunk at k-tile kt.
template <int TYPE>
__device__ __forceinline__ void ask_weights(const gpu_gemm &g, int expert, int chunk, int kt, const place &p)
{
    const uint32_t bytes = gpu_tile_bytes(TYPE);
    const int rows = gpu_cut_rows(&g.cut, chunk);
    const size_t row = (size_t)g.cut.k_tiles * bytes;
    const uint8_t *at = g.w + (size_t)expert * g.m.bytes + (size_t)(chunk * GPU_ITEM_TILES) * row + (size_t)kt * bytes;
    uint32_t to = stage_of(p) + gpu_stage_weights(TYPE);
    barrier_expect(full_of(p), bytes * rows);
    for (int r = 0; r < rows; r++, at += row, to += bytes)
        bulk_copy(to, at, bytes, full_of(p));
}

// Rows of x, of the columns that a thread gathers; columns past the last pair read that pair's row again, what they
// give is never stored.
struct gathered {
    uint32_t row[GPU_ITEM_COLS / 16], sum_row;
    int n;
};
__device__ __forceinline__ uint32_t source_of(const gpu_gemm &g, const gpu_entry &e, int col)
{
    int pair = e.first + min(col, e.cols - 1);
    return g.pair_row != nullptr ? g.pair_row[pair] : pair;
}
__device__ __forceinline__ void find_rows(const gpu_gemm &g, const gpu_entry &e, int thread, gathered &c)
{
    c.n = (e.cols + GPU_COLS_STEP - 1) / GPU_COLS_STEP;
#pragma unroll
    for (int i = 0; i < GPU_ITEM_COLS / 16; i++)
        c.row[i] = source_of(g, e, gpu_gather_col(thread, i));
    c.sum_row = source_of(g, e, thread / 2);
}
template <int TYPE>
__device__ __forceinline__ void gather(const gpu_gemm &g, const gathered &c, int thread, int kt, uint32_t stage)
{
    const int piece = gpu_gather_piece(thread);
    const size_t k8 = (size_t)g.cut.k_tiles * (GPU_TILE_K / 8);
    const uint4 *value = (const uint4 *)g.x.value + kt * (GPU_TILE_K / 8) + piece;
#pragma unroll
    for (int i = 0; i < GPU_ITEM_COLS / 16; i++) {
        if (i >= c.n) break;
        const uint4 *from = value + c.row[i] * k8;
        const uint32_t to = stage + gpu_stage_value(gpu_gather_col(thread, i), piece * 8);
#pragma unroll
        for (int slab = 0; slab < GPU_TILE_K / GPU_SLAB_K; slab++)
            copy_16(to + slab * GPU_SLAB_BYTES, from + slab * (GPU_SLAB_K / 8));
    }
    if (gpu_stage_sums(TYPE) != 0)
        copy_16(stage + GPU_VALUE_BYTES + gpu_stage_sum(thread / 2, thread % 2 * 8),
                (const uint4 *)g.x.sum + c.sum_row * (k8 / 16) + kt * 2 + thread % 2);
}

// This thread's copies into a stage are complete: wgmma may read them.
__device__ __forceinline__ void publish(uint32_t full)
{
    fence_async();
    barrier_arrive(full);
}

template <int TYPE> __device__ __forceinline__ void fill_stages(const gpu_gemm &g, const items &w, place p)
{
    const int thread = threadIdx.x;
    int early = 0, chunk; // stages whose weights were asked for before the activations were there
    if (thread == 0) {
        place q = p;
        for (int item = w.from; item < w.to && early < p.slots; item++) {
            const gpu_entry e = item_of(g, w, item, &chunk);
            for (int kt = 0; kt < g.cut.k_tiles && early < p.slots; kt++, early++, step_on(q))
                ask_weights<TYPE>(g, e.expert, chunk, kt, q);
        }
    }
    chain_wait();
    chain_release();
    // The copies into one stage are on their way while the next is asked for. When that next one is not free yet,
    // nothing is held back: who waits to free it may be waiting for this one.
    uint32_t unpublished = 0;
    for (int item = w.from; item < w.to; item++) {
        gathered c;
        const gpu_entry e = item_of(g, w, item, &chunk);
        find_rows(g, e, thread, c);
        for (int kt = 0; kt < g.cut.k_tiles; kt++, step_on(p)) {
            if (!barrier_test(empty_of(p), p.parity ^ 1)) {
                if (unpublished != 0) {
                    copy_wait(0);
                    publish(unpublished);
                    unpublished = 0;
                }
                barrier_wait(empty_of(p), p.parity ^ 1);
            }
            if (thread == 0 && --early < 0) ask_weights<TYPE>(g, e.expert, chunk, kt, p);
            gather<TYPE>(g, c, thread, kt, stage_of(p));
            copy_commit();
            if (unpublished != 0) {
                copy_wait(1);
                publish(unpublished);
            }
            unpublished = full_of(p);
        }
    }
    if (unpublished != 0) {
        copy_wait(0);
        publish(unpublished);
    }
}

// ---- multiplying ----

// The sums of a tile's scale group that ended with k-step `step`, onto those of the tile.
template <int TYPE, int D>
__device__ __forceinline__ void put_scale(float (&block)[D], const float (&part)[D], const uint32_t (&scales)[2],
                                          int step)
{
    const float s0 = scale_of<TYPE>(scales[0], step), s1 = scale_of<TYPE>(scales[1], step);
#pragma unroll
    for (int i = 0; i < D; i++)
        block[i] = fmaf(i % 4 < 2 ? s0 : s1, part[i], block[i]);
}

// The sums of an item: tiles add to their segment's, which goes to the total where it ends.
template <int D> struct sums {
    float segment[D], total[D];
};
template <int D> __device__ __forceinline__ void add_tile(sums<D> &s, const float (&tile)[D], bool opens, bool closes)
{
    if (opens && closes) { // most often: at most eight tiles along k, then no sum of a segment is needed
#pragma unroll
        for (int i = 0; i < D; i++)
            s.total[i] += tile[i];
        return;
    }
#pragma unroll
    for (int i = 0; i < D; i++)
        s.segment[i] += tile[i];
    if (!closes) return;
#pragma unroll
    for (int i = 0; i < D; i++) {
        s.total[i] += s.segment[i];
        s.segment[i] = 0.0f;
    }
}

// One packed tile per warp times the columns of the stage. Products run in batches; when one has been queued, the
// scales of the group that the batch before ended are put on. `out`: the tile's sums.
template <int TYPE, int D>
__device__ __forceinline__ void multiply_tile(uint32_t stage, const uint8_t *tile, int lane, float (&out)[D])
{
    constexpr bool BF16 = TYPE == KERN_BF16;
    constexpr int GROUP = group<TYPE>::steps, BATCH = GROUP == 1 ? 1 : 2;
    constexpr bool NIBBLES = TYPE == KERN_Q4_K || TYPE == KERN_Q6_K || TYPE == KERN_GPTQ4;
    float part[GROUP == 16 ? 1 : 2][D], block[D] = {};
    uint32_t a[2][2][4], scales[2][2]; // [pair of steps % 2][step % 2]; [span % 2][row half]
    uint4 four;
    const uint64_t values = gpu_operand_values(stage);
#pragma unroll
    for (int step = 0; step < GPU_TILE_STEPS; step++) {
        const int j = step / 2;
        if (step % 2 == 0) {
            if (NIBBLES && j % 2 == 0) four = ((const uint4 *)(tile + gpu_head_bytes(TYPE)))[j / 2 * 32 + lane];
            read_steps<TYPE>(tile, lane, j, four, a[j % 2]);
        }
        if (GROUP < 16 && step % span<TYPE>::steps == 0)
#pragma unroll
            for (int h = 0; h < 2; h++)
                scales[step / span<TYPE>::steps % 2][h] = read_scales<TYPE>(tile, lane, h, step);
        if (step % BATCH == 0) { // decoded before the fence, not after it
#pragma unroll
            for (int b = 0; b < BATCH; b++)
                hold(a[j % 2][(step + b) % 2]);
            wgmma_fence();
        }
        wgmma<BF16>(part[GROUP == 16 ? 0 : step / GROUP % 2], a[j % 2][step % 2], gpu_operand_step(values, step),
                    step % GROUP != 0);
        if ((step + 1) % BATCH != 0) continue;
        wgmma_commit();
        wgmma_wait<1>();
        const int done = step - BATCH; // the last step of the batch before
        if (done < 0) continue;
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            hold(a[(done - b) / 2 % 2][(done - b) % 2]);
        if (GROUP == 16 || (done + 1) % GROUP != 0) continue;
        hold(part[done / GROUP % 2]);
        put_scale<TYPE>(block, part[done / GROUP % 2], scales[done / span<TYPE>::steps % 2], done);
    }
    uint32_t least[4];
    float d[2] = {1.0f, 1.0f}, dmin[2];
    if constexpr (TYPE == KERN_Q4_K) { // one more product, of the minimums, while the last group is scaled
        read_minimums(tile, lane, least, d, dmin);
        hold(least);
        wgmma_fence();
        wgmma<false>(part[0], least, gpu_operand_sums(stage), 0);
        wgmma_commit();
        wgmma_wait<1>();
    } else {
        wgmma_wait<0>();
    }
#pragma unroll
    for (int p = 0; p < 2; p++)
        hold(a[1][p]);
    constexpr int LAST = GPU_TILE_STEPS - 1;
    if constexpr (GROUP < 16) {
        hold(part[LAST / GROUP % 2]);
        put_scale<TYPE>(block, part[LAST / GROUP % 2], scales[LAST / span<TYPE>::steps % 2], LAST);
    }
    if constexpr (TYPE == KERN_Q4_K) {
        wgmma_wait<0>();
        hold(least);
    }
    if constexpr (TYPE == KERN_Q4_K || GROUP == 16) hold(part[0]);
    if constexpr (TYPE == KERN_Q6_K) {
        d[0] = half_lo(*(const uint16_t *)(tile + 256 + 2 * (lane / 4)));
        d[1] = half_lo(*(const uint16_t *)(tile + 256 + 2 * (lane / 4) + 16));
    }
#pragma unroll
    for (int i = 0; i < D; i++) {
        const int h = i % 4 / 2;
        if constexpr (TYPE == KERN_Q4_K)
            out[i] = fmaf(d[h], block[i], -(dmin[h] * part[0][i]));
        else if constexpr (TYPE == KERN_Q6_K)
            out[i] = d[h] * block[i];
        else if constexpr (GROUP == 16)
            out[i] = part[0][i];
        else
            out[i] = block[i];
    }
}

// Stores as `put` does, but a lane looks up what belongs to column lane (and lane + 32) and the others ask it.
template <int D>
__device__ __forceinline__ void put_item(const gpu_gemm &g, const gpu_entry &e, int row_tile, int lane,
                                         const float (&total)[D])
{
    float scale[(D + 15) / 16], weight[(D + 15) / 16];
    int to[(D + 15) / 16];
#pragma unroll
    for (int i = 0; i < (D + 15) / 16; i++) {
        const int col = min(lane + 32 * i, e.cols - 1), pair = e.first + col;
        scale[i] = g.x.scale[source_of(g, e, col)];
        weight[i] = g.pair_weight != nullptr ? g.pair_weight[pair] : 1.0f;
        to[i] = g.pair_out != nullptr ? g.pair_out[pair] : pair;
    }
    const int n = row_tile * (g.m.interleaved ? GPU_TILE_ROWS / 2 : GPU_TILE_ROWS) + lane / 4;
    const bool first = n < g.m.n, second = !g.m.interleaved && n + 8 < g.m.n;
#pragma unroll
    for (int i = 0; i < D; i += 4)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int col = gpu_group_c_col(lane, i + c);
            const float by = __shfl_sync(~0u, scale[i / 16], col % 32);
            const float times = __shfl_sync(~0u, weight[i / 16], col % 32);
            float *out = g.out + (size_t)__shfl_sync(~0u, to[i / 16], col % 32) * g.ld + n;
            if (col >= e.cols) continue;
            const float a = total[i + c] * by, b = total[i + 2 + c] * by;
            if (first) out[0] = (g.m.interleaved ? silu_mul(a, b) : a) * times;
            if (second) out[8] = b * times;
        }
}

template <int TYPE, int COLS>
__device__ __forceinline__ void multiply_item(const gpu_gemm &g, const gpu_entry &e, int chunk, place &p,
                                              const uint8_t *shared)
{
    const int warp = threadIdx.x / 32 - GROUP_THREADS / 32, lane = threadIdx.x % 32;
    const int rows = gpu_cut_rows(&g.cut, chunk), each = gpu_segment_tiles(g.cut.k_tiles);
    // A warp without a tile works on the last one, as a product is of all four warps.
    const int tile_at = gpu_stage_weights(TYPE) + min(warp, rows - 1) * gpu_tile_bytes(TYPE);
    sums<COLS / 2> s;
#pragma unroll
    for (int i = 0; i < COLS / 2; i++)
        s.segment[i] = s.total[i] = 0.0f;
    for (int kt = 0; kt < g.cut.k_tiles; kt++, step_on(p)) {
        float tile[COLS / 2];
        barrier_wait(full_of(p), p.parity);
        multiply_tile<TYPE>(stage_of(p), shared + p.slot * p.bytes + tile_at, lane, tile);
        __syncwarp();
        if (lane == 0) barrier_arrive(empty_of(p));
        add_tile(s, tile, kt % each == 0, (kt + 1) % each == 0 || kt + 1 == g.cut.k_tiles);
    }
    if (warp < rows) put_item(g, e, chunk * GPU_ITEM_TILES + warp, lane, s.total);
}

template <int TYPE>
__device__ __forceinline__ void multiply_stages(const gpu_gemm &g, const items &w, place p, const uint8_t *shared)
{
    chain_wait();
    chain_release();
    for (int item = w.from; item < w.to; item++) {
        int chunk;
        const gpu_entry e = item_of(g, w, item, &chunk);
        if (e.cols > 48)
            multiply_item<TYPE, 64>(g, e, chunk, p, shared);
        else if (e.cols > 32)
            multiply_item<TYPE, 48>(g, e, chunk, p, shared);
        else if (e.cols > 16)
            multiply_item<TYPE, 32>(g, e, chunk, p, shared);
        else
            multiply_item<TYPE, 16>(g, e, chunk, p, shared);
    }
}
#endif

template <int TYPE> __global__ void __launch_bounds__(WGMMA_THREADS, 1) wgmma_kernel(const gpu_gemm g)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(128) uint8_t shared[];
    // The run-time does not promise the alignment that the swizzle needs; gpu_gemm_smem has room for it.
    const uint32_t begin = shared_address(shared), pad = (1024 - begin % 1024) % 1024;
    place p;
    p.stages = begin + pad;
    p.bytes = gpu_stage_bytes(TYPE);
    p.slots = g.slots;
    p.barriers = p.stages + p.slots * p.bytes;
    p.slot = 0;
    p.parity = 0;
    if (threadIdx.x == 0) {
        for (int s = 0; s < p.slots; s++) { // full: each gatherer, and the bulk copies' bytes; empty: each warp
            barrier_init(p.barriers + 16 * s, GPU_GATHERERS + 1);
            barrier_init(p.barriers + 16 * s + 8, GPU_ITEM_TILES);
        }
        barrier_init_fence();
    }
    __syncthreads();
    const items w = items_of(g);
    if (threadIdx.x < GROUP_THREADS) {
        registers_give<FILLER_REGISTERS>();
        fill_stages<TYPE>(g, w, p);
    } else {
        registers_take<MULTIPLIER_REGISTERS>();
        multiply_stages<TYPE>(g, w, p, shared + pad);
    }
#else
    (void)g;
#endif
}
#endif
