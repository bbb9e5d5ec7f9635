#ifndef EP_KERNELS_CUDA_LAYOUT_H
#define EP_KERNELS_CUDA_LAYOUT_H
/*
 * layout: where everything lies on a CUDA device, as plain arithmetic. Compiled for the host (C11)
 * and for the device (CUDA C++), so that tests prove on a CPU what the kernels use: tiles of packed
 * weights, fragment maps of the tensor cores, the order of activations, the order of additions,
 * work lists.
 *
 * A matrix [n, k] is cut into tiles of 16 rows by 256 weights along k; the tiles of a row of tiles
 * follow one another, rows of tiles follow one another, so an expert's role is one run of bytes and
 * a stage of a kernel is one linear copy. A tile holds its own scales (the head) and has exactly
 * the bytes of the file: packing permutes, it rounds nothing. Rows and weights past the edge are
 * blocks of zero bytes.
 *
 * In the interleaved form (gate and up of one type) rows 0-7 of a tile are gate, rows 8-15 up, of
 * the same eight channels: one thread of a tensor-core product then holds both halves of SwiGLU.
 *
 * Tiles, by type (head, then code planes; all planes are multiples of 16 bytes):
 *   Q4_K   2304: per row the file's 16 bytes (d, dmin, twelve scale bytes); nibble plane 2048
 *   Q6_K   3360: 16 x 16 int8 scales, 16 half d; nibble plane 2048; two-bit plane 1024
 *   Q8_0   4352: per row 8 half d; byte plane 4096, codes as q + 128
 *   GPTQ4  2112: per row 2 half d; nibble plane 2048
 *   F16, BF16 8192: 16-bit plane
 * The nibble plane: 4 vectors x 32 lanes x 4 words; word j of vector v is k-step s = 4v + j (16
 * weights along k). The byte plane: 8 vectors x 32 lanes x 4 words, words 2(s%2), 2(s%2)+1 of
 * vector s/2. The 16-bit plane: vector s, word r. The two-bit plane: 2 vectors, word u = 4v + j
 * holds steps 2u and 2u+1.
 */
#include "kernels/formats.h"

#ifdef __CUDACC__
#define GPU_FN static inline __host__ __device__
#else
#define GPU_FN static inline
#endif

enum {
    GPU_TILE_ROWS = 16,
    GPU_TILE_K = 256,
    GPU_TILE_STEPS = 16, /* k-steps of 16 weights */
    GPU_SEGMENTS = 8     /* k is summed in at most so many segments */
};

/* ---- fragments ---- */

/* Element i (0..7) of a lane's A operand of mma.m16n8k16 (and, per warp, of wgmma m64k16 with A in
 * registers): register i/2, half i%2. */
GPU_FN int gpu_a_row(int lane, int i)
{
    return lane / 4 + 8 * ((i / 2) & 1);
}
GPU_FN int gpu_a_k(int lane, int i)
{
    return 2 * (lane % 4) + (i & 1) + 8 * (i / 4);
}
GPU_FN int gpu_a_lane(int row, int k)
{
    return (row % 8) * 4 + (k % 8) / 2;
}
GPU_FN int gpu_a_index(int row, int k)
{
    return (k & 1) + 2 * (row / 8) + 4 * (k / 8);
}
/* Element i (0..3) of a lane's B operand: token (column) and k. */
GPU_FN int gpu_b_token(int lane, int i)
{
    (void)i;
    return lane / 4;
}
GPU_FN int gpu_b_k(int lane, int i)
{
    return 2 * (lane % 4) + (i & 1) + 8 * (i / 2);
}
/* Element i (0..3) of a lane's f32 result: row and token. */
GPU_FN int gpu_c_row(int lane, int i)
{
    return lane / 4 + 8 * (i / 2);
}
GPU_FN int gpu_c_token(int lane, int i)
{
    return 2 * (lane % 4) + (i & 1);
}

/* Where value k of an activation row lies: inside each 32 the eight values that one lane feeds to
 * two steps are side by side, so that a lane reads 16 bytes. */
GPU_FN int gpu_act_at(int k)
{
    int in = k % 32, step = in / 16, kc = in % 16;
    return k - in + (kc % 8) / 2 * 8 + step * 4 + (kc & 1) + 2 * (kc / 8);
}
/* Where the sum of values 32j .. 32j + 31 of a row lies, in halves: the sum over 32 as a half, then
 * (`rest`) what that half lost. Those of one tile are 16 halves, one more step of a product whose A
 * operand is the eight minimums of a row, twice. */
GPU_FN int gpu_sum_at(int j, int rest)
{
    return j / 8 * 16 + rest * 8 + j % 8;
}
/* The 128-byte swizzle of shared memory that wgmma reads: rows of 128 bytes (64 values along k). */
GPU_FN int gpu_swizzle(int row, int byte)
{
    return row * 128 + (byte ^ ((row & 7) << 4));
}

/* ---- types ---- */

GPU_FN bool gpu_type_is_served(int type)
{
    return type == KERN_Q4_K || type == KERN_Q6_K || type == KERN_Q8_0 || type == KERN_GPTQ4 ||
           type == KERN_F16 || type == KERN_BF16;
}
/* Bytes of a file row's 256 weights; a tile has sixteen times as many. */
GPU_FN int gpu_chunk_bytes(int type)
{
    return type == KERN_Q4_K    ? 144
           : type == KERN_Q6_K  ? 210
           : type == KERN_Q8_0  ? 272
           : type == KERN_GPTQ4 ? 132
                                : 512;
}
GPU_FN int gpu_tile_bytes(int type)
{
    return GPU_TILE_ROWS * gpu_chunk_bytes(type);
}
GPU_FN int gpu_head_bytes(int type)
{
    return type == KERN_Q4_K || type == KERN_Q8_0 ? 256
           : type == KERN_Q6_K                    ? 288
           : type == KERN_GPTQ4                   ? 64
                                                  : 0;
}

/* ---- one role of one expert ---- */

typedef struct gpu_matrix {
    int type, n, k;  /* n: rows of each source matrix */
    int interleaved; /* two sources of n rows each, else one */
    int row_tiles, k_tiles;
    int tile_bytes;
    size_t row_bytes; /* of a file row */
    size_t bytes;     /* of the packed role: the stride from expert to expert */
} gpu_matrix;

GPU_FN gpu_matrix gpu_matrix_make(int type, int n, int k, int interleaved, size_t row_bytes)
{
    gpu_matrix m;
    int per_tile = interleaved ? GPU_TILE_ROWS / 2 : GPU_TILE_ROWS;
    m.type = type;
    m.n = n;
    m.k = k;
    m.interleaved = interleaved;
    m.row_tiles = (n + per_tile - 1) / per_tile;
    m.k_tiles = (k + GPU_TILE_K - 1) / GPU_TILE_K;
    m.tile_bytes = gpu_tile_bytes(type);
    m.row_bytes = row_bytes;
    m.bytes = (size_t)m.row_tiles * (size_t)m.k_tiles * (size_t)m.tile_bytes;
    return m;
}

/* Row r of a row of tiles: which source (0, 1) and which row of it; -1 past the edge. */
GPU_FN int gpu_source_row(const gpu_matrix *m, int row_tile, int r, int *source)
{
    int half = GPU_TILE_ROWS / 2;
    int row = m->interleaved ? row_tile * half + r % half : row_tile * GPU_TILE_ROWS + r;
    *source = m->interleaved && r >= half;
    return row < m->n ? row : -1;
}

/* ---- packing: one word at a time, so that a loop on a CPU and a grid of threads give the same
 * ---- */

/* Byte b of the head: whose row's, and which byte of that row's chunk. */
GPU_FN int gpu_head_source(int type, int b, int *row)
{
    switch (type) {
    case KERN_Q4_K:
        *row = b / 16;
        return b % 16;
    case KERN_Q6_K:
        *row = b < 256 ? b / 16 : (b - 256) / 2;
        return b < 256 ? 192 + b % 16 : 208 + b % 2;
    case KERN_Q8_0:
        *row = b / 16;
        return 34 * (b % 16 / 2) + b % 2;
    default: /* GPTQ4 */
        *row = b / 4;
        return 66 * (b % 4 / 2) + b % 2;
    }
}

/* Byte b of the 256 weights at k-tile kt of row r; zero past the edges. */
GPU_FN uint32_t gpu_file_byte(const gpu_matrix *m, const uint8_t *const src[2], int row_tile,
                              int kt, int r, int b)
{
    int source, row = gpu_source_row(m, row_tile, r, &source);
    size_t at = (size_t)kt * (size_t)gpu_chunk_bytes(m->type) + (size_t)b;
    if (row < 0 || at >= m->row_bytes) return 0;
    const uint8_t *from = source ? src[1] : src[0];
    return from[(size_t)row * m->row_bytes + at];
}

/* Which byte of a chunk holds the code (or its low part) of weight k, and from which bit. */
GPU_FN int gpu_code_byte(int type, int k, int *shift)
{
    int i;
    switch (type) {
    case KERN_Q4_K:
        *shift = k % 64 / 32 * 4;
        return 16 + 32 * (k / 64) + k % 32;
    case KERN_Q6_K: /* part s = i/32 of half h: byte 64h + 32(s%2) + l, nibble s/2 */
        i = k % 128;
        *shift = i / 64 * 4;
        return 64 * (k / 128) + 32 * (i / 32 % 2) + i % 32;
    case KERN_Q8_0:
        *shift = 0;
        return 34 * (k / 32) + 2 + k % 32;
    case KERN_GPTQ4:
        *shift = k % 2 * 4;
        return 66 * (k / 128) + 2 + k % 128 / 2;
    default:
        *shift = 0;
        return 2 * k;
    }
}
/* The upper two bits of a Q6_K code. */
GPU_FN int gpu_high_byte(int k, int *shift)
{
    *shift = k % 128 / 32 * 2;
    return 128 + 32 * (k / 128) + k % 32;
}

/* Word w of tile (row_tile, kt) of one expert. src[1] is read in the interleaved form only. */
GPU_FN uint32_t gpu_pack_word(const gpu_matrix *m, const uint8_t *const src[2], int row_tile,
                              int kt, int w)
{
    const int type = m->type, head = gpu_head_bytes(type) / 4;
    uint32_t out = 0;
    int row, shift, at;
    if (w < head) {
        for (int i = 0; i < 4; i++) {
            at = gpu_head_source(type, 4 * w + i, &row);
            out |= gpu_file_byte(m, src, row_tile, kt, row, at) << 8 * i;
        }
        return out;
    }
    w -= head;
    const int vec = w / 128, lane = w % 128 / 4, j = w % 4;
    if (type == KERN_Q8_0) {
        for (int i = 0; i < 4; i++) {
            int a = 4 * (j % 2) + i, k = 16 * (2 * vec + j / 2) + gpu_a_k(lane, a);
            at = gpu_code_byte(type, k, &shift);
            out |= (gpu_file_byte(m, src, row_tile, kt, gpu_a_row(lane, a), at) ^ 128u) << 8 * i;
        }
        return out;
    }
    if (type == KERN_F16 || type == KERN_BF16) {
        for (int h = 0; h < 2; h++) {
            int a = 2 * j + h, k = 16 * vec + gpu_a_k(lane, a);
            at = gpu_code_byte(type, k, &shift);
            row = gpu_a_row(lane, a);
            out |= (gpu_file_byte(m, src, row_tile, kt, row, at) |
                    gpu_file_byte(m, src, row_tile, kt, row, at + 1) << 8)
                   << 16 * h;
        }
        return out;
    }
    if (w < 512) { /* the nibble plane: register r of the fragment is nibbles r and r + 4 */
        for (int a = 0; a < 8; a++) {
            int k = 16 * (4 * vec + j) + gpu_a_k(lane, a);
            at = gpu_code_byte(type, k, &shift);
            uint32_t b = gpu_file_byte(m, src, row_tile, kt, gpu_a_row(lane, a), at);
            out |= (b >> shift & 15u) << 4 * (a / 2 + 4 * (a & 1));
        }
        return out;
    }
    for (int p = 0; p < 2; p++) /* the two-bit plane */
        for (int a = 0; a < 8; a++) {
            int k = 16 * (2 * (4 * (vec - 4) + j) + p) + gpu_a_k(lane, a);
            at = gpu_high_byte(k, &shift);
            uint32_t b = gpu_file_byte(m, src, row_tile, kt, gpu_a_row(lane, a), at);
            out |= (b >> shift & 3u) << (16 * (a & 1) + 2 * (4 * p + a / 2));
        }
    return out;
}

/* ---- reading a packed tile (unpacking, and the emulation that tests compare with) ---- */

GPU_FN uint32_t gpu_tile_u16(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8;
}
GPU_FN uint32_t gpu_tile_u32(const uint8_t *p)
{
    return gpu_tile_u16(p) | gpu_tile_u16(p + 2) << 16;
}

/* The code of weight (row, k) of a tile: 0..15, 0..63, q + 128, or 16 bits. */
GPU_FN uint32_t gpu_tile_code(int type, const uint8_t *tile, int row, int k)
{
    const uint8_t *plane = tile + gpu_head_bytes(type);
    int step = k / 16, a = gpu_a_index(row, k % 16), lane = gpu_a_lane(row, k % 16);
    if (type == KERN_Q8_0)
        return plane[((step / 2 * 32 + lane) * 4 + 2 * (step % 2) + a / 4) * 4 + a % 4];
    if (type == KERN_F16 || type == KERN_BF16)
        return gpu_tile_u16(plane + ((step * 32 + lane) * 4 + a / 2) * 4 + 2 * (a & 1));
    uint32_t word = gpu_tile_u32(plane + ((step / 4 * 32 + lane) * 4 + step % 4) * 4);
    uint32_t code = word >> 4 * (a / 2 + 4 * (a & 1)) & 15u;
    if (type != KERN_Q6_K) return code;
    int u = step / 2;
    word = gpu_tile_u32(plane + 2048 + ((u / 4 * 32 + lane) * 4 + u % 4) * 4);
    return code | (word >> (16 * (a & 1) + 2 * (4 * (step % 2) + a / 2)) & 3u) << 4;
}

/* The place in the head of byte b of a row's chunk; -1 if it is no head byte. */
GPU_FN int gpu_head_place(int type, int row, int b)
{
    switch (type) {
    case KERN_Q4_K:
        return b < 16 ? 16 * row + b : -1;
    case KERN_Q6_K:
        return b < 192 ? -1 : b < 208 ? 16 * row + b - 192 : 256 + 2 * row + b - 208;
    case KERN_Q8_0:
        return b % 34 < 2 ? 16 * row + 2 * (b / 34) + b % 34 : -1;
    case KERN_GPTQ4:
        return b % 66 < 2 ? 4 * row + 2 * (b / 66) + b % 66 : -1;
    default:
        return -1;
    }
}

/* Byte b of the chunk of a row, from its tile: what the file had. */
GPU_FN uint8_t gpu_unpack_byte(int type, const uint8_t *tile, int row, int b)
{
    int place = gpu_head_place(type, row, b), k;
    if (place >= 0) return tile[place];
    uint32_t out = 0;
    switch (type) {
    case KERN_Q4_K:
        k = 64 * ((b - 16) / 32) + (b - 16) % 32;
        out = gpu_tile_code(type, tile, row, k) | gpu_tile_code(type, tile, row, k + 32) << 4;
        break;
    case KERN_Q6_K:
        if (b < 128) {
            k = 128 * (b / 64) + b % 64;
            out = (gpu_tile_code(type, tile, row, k) & 15u) |
                  (gpu_tile_code(type, tile, row, k + 64) & 15u) << 4;
        } else {
            k = 128 * ((b - 128) / 32) + (b - 128) % 32;
            for (int s = 0; s < 4; s++)
                out |= gpu_tile_code(type, tile, row, k + 32 * s) >> 4 << 2 * s;
        }
        break;
    case KERN_Q8_0:
        out = gpu_tile_code(type, tile, row, 32 * (b / 34) + b % 34 - 2) ^ 128u;
        break;
    case KERN_GPTQ4:
        k = 128 * (b / 66) + 2 * (b % 66 - 2);
        out = gpu_tile_code(type, tile, row, k) | gpu_tile_code(type, tile, row, k + 1) << 4;
        break;
    default:
        out = gpu_tile_code(type, tile, row, b / 2) >> 8 * (b % 2);
    }
    return (uint8_t)out;
}

/* Scale j (0..7) and min j of the twelve scale bytes of Q4_K, four at a time as the kernels do it:
 * words of the bytes 0-3, 4-7, 8-11. */
GPU_FN void gpu_q4k_scales(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t sc[2], uint32_t mn[2])
{
    sc[0] = w0 & 0x3f3f3f3fu;
    mn[0] = w1 & 0x3f3f3f3fu;
    sc[1] = (w2 & 0x0f0f0f0fu) | (w0 >> 2 & 0x30303030u);
    mn[1] = (w2 >> 4 & 0x0f0f0f0fu) | (w1 >> 2 & 0x30303030u);
}

/* ---- the order of additions: a function of the matrix alone ---- */

/* Tiles are summed in ascending order inside a segment, segments in ascending order. Which warp
 * does a segment is free. */
GPU_FN int gpu_segment_tiles(int k_tiles)
{
    return (k_tiles + GPU_SEGMENTS - 1) / GPU_SEGMENTS;
}
GPU_FN int gpu_segment_count(int k_tiles)
{
    int tiles = gpu_segment_tiles(k_tiles);
    return (k_tiles + tiles - 1) / tiles;
}

/* ---- work lists ---- */

/* Some of the pairs of one expert: pairs first .. first + cols - 1 of the sorted list. It is entry
 * `nth` of the expert's `of`. */
typedef struct gpu_entry {
    int32_t expert, first, cols;
    uint16_t nth, of;
} gpu_entry;

/* What `of` can count, with entries of 16 pairs. */
enum { GPU_MOST_PAIRS = 16 * 65535 };

GPU_FN int gpu_entries_of(int m, int width)
{
    return (m + width - 1) / width;
}
/* The most entries a list can have. */
GPU_FN int gpu_entries_most(int n_pairs, int n_experts, int width)
{
    int active = n_pairs < n_experts ? n_pairs : n_experts;
    return active + n_pairs / width;
}
/* Writes the entries of one expert from place `at` on. */
GPU_FN void gpu_entries_put(gpu_entry *list, int at, int expert, int first, int m, int width)
{
    for (int i = 0; i * width < m; i++) {
        gpu_entry e;
        e.expert = expert;
        e.first = first + i * width;
        e.cols = m - i * width < width ? m - i * width : width;
        e.nth = (uint16_t)i;
        e.of = (uint16_t)gpu_entries_of(m, width);
        list[at + i] = e;
    }
}
/* The same list on the host; returns its length. */
GPU_FN int gpu_entries_build(gpu_entry *list, const int32_t *offset, int n_experts, int width)
{
    int at = 0;
    for (int e = 0; e < n_experts; e++) {
        int m = offset[e + 1] - offset[e];
        gpu_entries_put(list, at, e, offset[e], m, width);
        at += gpu_entries_of(m, width);
    }
    return at;
}
/* Items (entry, chunk of row tiles), entry by entry: a worker's share is one stretch, so it streams
 * weights in the order of memory. Worker w of n does items from .. to-1. */
GPU_FN void gpu_share(int64_t items, int w, int n, int64_t *from, int64_t *to)
{
    *from = items * w / n;
    *to = items * (w + 1) / n;
}

/* ---- units: what one warp does of an item ---- */

/* How a launch cuts a matrix. An item is an entry and `chunk` row tiles; a unit is `rows` row tiles
 * (one after another) of it and one segment of k (split) or all of k (segs 1). */
typedef struct gpu_cut {
    int row_tiles, k_tiles;
    int chunk, rows, segs, seg_tiles;
} gpu_cut;

typedef struct gpu_unit {
    int row_tile, rows, tile, tiles;
} gpu_unit;

/* Row tiles per item when warps split k: at most 24 units, the number that keeps `warps` busiest.
 */
GPU_FN int gpu_chunk_rows(int segs, int warps)
{
    int best = 1, best_busy = 0;
    for (int rows = 1; rows * segs <= 24; rows++) {
        int units = rows * segs, rounds = (units + warps - 1) / warps;
        int busy = units * 1000 / (rounds * warps);
        if (busy >= best_busy) {
            best = rows;
            best_busy = busy;
        }
    }
    return best;
}
GPU_FN gpu_cut gpu_cut_make(const gpu_matrix *m, int split, int rows, int warps)
{
    gpu_cut c;
    c.row_tiles = m->row_tiles;
    c.k_tiles = m->k_tiles;
    c.rows = split ? 1 : rows;
    c.segs = split ? gpu_segment_count(m->k_tiles) : 1;
    c.seg_tiles = split ? gpu_segment_tiles(m->k_tiles) : m->k_tiles;
    c.chunk = split ? gpu_chunk_rows(c.segs, warps) : rows * warps;
    return c;
}
GPU_FN int gpu_cut_chunks(const gpu_cut *c)
{
    return (c->row_tiles + c->chunk - 1) / c->chunk;
}
GPU_FN int gpu_cut_rows(const gpu_cut *c, int chunk_i)
{
    int left = c->row_tiles - chunk_i * c->chunk;
    return left < c->chunk ? left : c->chunk;
}
GPU_FN int gpu_cut_units(const gpu_cut *c, int chunk_i)
{
    return (gpu_cut_rows(c, chunk_i) + c->rows - 1) / c->rows * c->segs;
}
GPU_FN gpu_unit gpu_cut_unit(const gpu_cut *c, int chunk_i, int unit)
{
    gpu_unit u;
    int row = unit / c->segs * c->rows, left = gpu_cut_rows(c, chunk_i) - row;
    u.row_tile = chunk_i * c->chunk + row;
    u.rows = left < c->rows ? left : c->rows;
    u.tile = unit % c->segs * c->seg_tiles;
    u.tiles = c->k_tiles - u.tile < c->seg_tiles ? c->k_tiles - u.tile : c->seg_tiles;
    return u;
}

#endif
