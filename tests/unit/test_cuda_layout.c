/*
 * The layout of CUDA devices, proved without one: packing is a bijection for every type and shape
 * class, fragment maps are those of the PTX manual (written out here as loops of their own),
 * swizzles are bijective and free of bank conflicts, work lists cover every pair once, and a
 * product over packed tiles in the kernels' order of additions is as close to float64 as promised.
 */
#include <math.h>
#include <stdlib.h>
#include "base/base.h"
#include "kernels/cuda/pack.h"
#include "kernels/kernels.h"
#include "tests/test.h"
#include "tests/unit/tile_product.h"

static const int types[] = {KERN_Q4_K, KERN_Q6_K, KERN_Q8_0, KERN_GPTQ4, KERN_F16, KERN_BF16};
enum { N_TYPES = sizeof types / sizeof types[0] };
static uint64_t seed = 0x9e3779b97f4a7c15u;

static uint32_t draw(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t)(seed >> 32);
}

static void fill(uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)draw();
}

static gpu_matrix matrix_of(int type, int n, int k, int interleaved)
{
    return gpu_matrix_make(type, n, k, interleaved, kern_type_row_bytes(type, k));
}

/* Packs and unpacks, at a distance from neighbours that must stay as they are. */
static void check_identity(int type, int n, int k, int interleaved)
{
    gpu_matrix m = matrix_of(type, n, k, interleaved);
    size_t bytes = (size_t)n * m.row_bytes;
    uint8_t *a = ep_alloc(bytes), *b = ep_alloc(bytes), *back_a = ep_alloc(bytes);
    uint8_t *back_b = ep_alloc(bytes), *packed = ep_alloc(m.bytes + 128);
    fill(a, bytes);
    fill(b, bytes);
    memset(packed, 0xa5, m.bytes + 128);
    gpu_pack(&m, a, interleaved ? b : NULL, packed + 64);
    memset(back_a, 0x11, bytes);
    memcpy(back_b, b, bytes);
    if (interleaved) memset(back_b, 0x22, bytes);
    gpu_unpack(&m, packed + 64, back_a, interleaved ? back_b : NULL);
    bool same = memcmp(a, back_a, bytes) == 0 && memcmp(b, back_b, bytes) == 0;
    for (int i = 0; i < 64; i++)
        same &= packed[i] == 0xa5 && packed[64 + m.bytes + (size_t)i] == 0xa5;
    if (!same) printf("    %s n %d k %d interleaved %d\n", kern_type_name(type), n, k, interleaved);
    CHECK(same);
    ep_free(a);
    ep_free(b);
    ep_free(back_a);
    ep_free(back_b);
    ep_free(packed);
}

static void test_pack_identity(void)
{
    static const int rows[] = {1, 7, 8, 9, 15, 16, 17, 32, 48, 100};
    static const int blocks[] = {1, 2, 3, 8, 9};
    for (int t = 0; t < N_TYPES; t++) {
        int step = kern_type_block(types[t]);
        if (step == 1) step = 8;
        for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
            for (size_t j = 0; j < sizeof blocks / sizeof blocks[0]; j++)
                for (int both = 0; both < 2; both++)
                    check_identity(types[t], rows[i], blocks[j] * step, both);
        check_identity(types[t], 24, 768, 1);
    }
}

/* An expert's bytes depend on nothing but the expert: 512 of them side by side, and each alone. */
static void test_pack_experts(void)
{
    enum { EXPERTS = 512, N = 12, K = 256 };
    for (int t = 0; t < N_TYPES; t++) {
        gpu_matrix m = matrix_of(types[t], N, K, 1);
        size_t bytes = N * m.row_bytes;
        uint8_t *src = ep_alloc(2 * bytes * EXPERTS), *all = ep_alloc(m.bytes * EXPERTS);
        uint8_t *one = ep_alloc(m.bytes);
        fill(src, 2 * bytes * EXPERTS);
        for (size_t e = EXPERTS; e-- > 0;)
            gpu_pack(&m, src + 2 * e * bytes, src + (2 * e + 1) * bytes, all + e * m.bytes);
        for (size_t e = 0; e < EXPERTS; e += 73) {
            gpu_pack(&m, src + 2 * e * bytes, src + (2 * e + 1) * bytes, one);
            CHECK(memcmp(one, all + e * m.bytes, m.bytes) == 0);
            CHECK(gpu_checksum(one, m.bytes, one, m.bytes) ==
                  gpu_checksum(all + e * m.bytes, m.bytes, all + e * m.bytes, m.bytes));
        }
        CHECK(gpu_checksum(all, m.bytes, all, m.bytes) !=
              gpu_checksum(all + m.bytes, m.bytes, all + m.bytes, m.bytes));
        ep_free(src);
        ep_free(all);
        ep_free(one);
    }
}

/* Past the edges every weight is zero: codes and scales of a block of zero bytes. */
static void test_pack_edges(void)
{
    for (int t = 0; t < N_TYPES; t++) {
        int type = types[t], k = kern_type_block(type) == 1 ? 40 : kern_type_block(type);
        gpu_matrix m = matrix_of(type, 3, k, 1);
        CHECK_INT(m.row_tiles * m.k_tiles, 1);
        uint8_t *src = ep_alloc(6 * m.row_bytes), *tile = ep_alloc(m.bytes);
        memset(src, 0xff, 6 * m.row_bytes);
        gpu_pack(&m, src, src + 3 * m.row_bytes, tile);
        uint32_t zero = type == KERN_Q8_0 ? 128 : 0, full = type == KERN_Q8_0 ? 127 : 0;
        full = type == KERN_F16 || type == KERN_BF16 ? 0xffff : type == KERN_Q6_K ? 63 : full;
        if (type == KERN_Q4_K || type == KERN_GPTQ4) full = 15;
        for (int r = 0; r < 16; r++)
            for (int i = 0; i < GPU_TILE_K; i++) {
                bool inside = r % 8 < 3 && i < k;
                if (gpu_tile_code(type, tile, r, i) != (inside ? full : zero)) {
                    CHECK(!"a code past the edge");
                    return;
                }
            }
        ep_free(src);
        ep_free(tile);
    }
}

/* The PTX manual, m16n8k16 with 16-bit operands, in its own words: groupID = lane / 4,
 * threadID_in_group = lane % 4; A: row = groupID for i in {0, 1, 4, 5}, else groupID + 8; column =
 * 2 * threadID + (i & 1), plus 8 for i >= 4. B: row (k) = 2 * threadID + (i & 1), plus 8 for i >=
 * 2; column = groupID. C: row = groupID for i < 2, else + 8; column = 2 * threadID + (i & 1). */
static void test_fragments(void)
{
    int seen_a[16][16] = {{0}}, seen_b[8][16] = {{0}}, seen_c[16][8] = {{0}};
    for (int group = 0; group < 8; group++)
        for (int thread = 0; thread < 4; thread++) {
            int lane = 4 * group + thread;
            for (int i = 0; i < 8; i++) {
                int row = i == 0 || i == 1 || i == 4 || i == 5 ? group : group + 8;
                int col = 2 * thread + (i & 1) + (i >= 4 ? 8 : 0);
                CHECK_INT(gpu_a_row(lane, i), row);
                CHECK_INT(gpu_a_k(lane, i), col);
                CHECK_INT(gpu_a_lane(row, col), lane);
                CHECK_INT(gpu_a_index(row, col), i);
                seen_a[row][col]++;
            }
            for (int i = 0; i < 4; i++) {
                CHECK_INT(gpu_b_token(lane, i), group);
                CHECK_INT(gpu_b_k(lane, i), 2 * thread + (i & 1) + (i >= 2 ? 8 : 0));
                CHECK_INT(gpu_c_row(lane, i), i < 2 ? group : group + 8);
                CHECK_INT(gpu_c_token(lane, i), 2 * thread + (i & 1));
                seen_b[gpu_b_token(lane, i)][gpu_b_k(lane, i)]++;
                seen_c[gpu_c_row(lane, i)][gpu_c_token(lane, i)]++;
            }
        }
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < 16; c++) {
            CHECK_INT(seen_a[r][c], 1);
            if (r < 8) CHECK_INT(seen_b[r][c], 1);
            if (c < 8) CHECK_INT(seen_c[r][c], 1);
        }
}

/* What the kernels do with a word: mask, shift, magic numbers; against the code of the element. */
static void test_nibbles(void)
{
    enum { K = 256 };
    gpu_matrix m = matrix_of(KERN_Q6_K, 16, K, 0);
    uint8_t *src = ep_alloc(16 * m.row_bytes), *tile = ep_alloc(m.bytes);
    fill(src, 16 * m.row_bytes);
    gpu_pack(&m, src, NULL, tile);
    const uint8_t *low = tile + gpu_head_bytes(KERN_Q6_K), *high = low + 2048;
    for (int step = 0; step < 16; step++)
        for (int lane = 0; lane < 32; lane++) {
            uint32_t q = gpu_tile_u32(low + (step / 4 * 32 + lane) * 16 + step % 4 * 4);
            uint32_t h = gpu_tile_u32(high + (step / 8 * 32 + lane) * 16 + step / 2 % 4 * 4);
            for (int r = 0; r < 4; r++) {
                uint32_t v =
                    (q >> 4 * r & 0x000f000fu) | (h >> (8 * (step % 2) + 2 * r) & 0x00030003u) << 4;
                for (int i = 0; i < 2; i++) {
                    int a = 2 * r + i;
                    uint32_t want = gpu_tile_code(KERN_Q6_K, tile, gpu_a_row(lane, a),
                                                  16 * step + gpu_a_k(lane, a));
                    if ((v >> 16 * i & 0xffff) != want) {
                        CHECK(!"a register differs from its elements");
                        return;
                    }
                }
            }
        }
    ep_free(src);
    ep_free(tile);
}

/* Register r of k-step `step` as a kernel reads it from the planes: two codes, one in each half. */
static uint32_t register_of(int type, const uint8_t *tile, int lane, int step, int r)
{
    const uint8_t *plane = tile + gpu_head_bytes(type);
    if (type == KERN_F16 || type == KERN_BF16)
        return gpu_tile_u32(plane + (step * 32 + lane) * 16 + 4 * r);
    if (type == KERN_Q8_0) { /* byte_perm with 0x4140 or 0x4342: bytes 0 and 1, or 2 and 3 */
        uint32_t w =
            gpu_tile_u32(plane + (step / 2 * 32 + lane) * 16 + 4 * (2 * (step % 2) + r / 2));
        w >>= 16 * (r % 2);
        return (w & 0xff) | (w & 0xff00) << 8;
    }
    uint32_t q = gpu_tile_u32(plane + (step / 4 * 32 + lane) * 16 + step % 4 * 4);
    return q >> 4 * r & 0x000f000fu;
}

static void test_registers(void)
{
    for (int t = 0; t < N_TYPES; t++) {
        if (types[t] == KERN_Q6_K) continue; /* its two planes: test_nibbles */
        gpu_matrix m = matrix_of(types[t], 16, 256, 0);
        uint8_t *src = ep_alloc(16 * m.row_bytes), *tile = ep_alloc(m.bytes);
        fill(src, 16 * m.row_bytes);
        gpu_pack(&m, src, NULL, tile);
        int wrong = 0;
        for (int i = 0; i < 16 * 32 * 4 * 2; i++) {
            int half = i % 2, r = i / 2 % 4, lane = i / 8 % 32, step = i / 256, a = 2 * r + half;
            uint32_t got = register_of(types[t], tile, lane, step, r) >> 16 * half & 0xffff;
            wrong += got != gpu_tile_code(types[t], tile, gpu_a_row(lane, a),
                                          16 * step + gpu_a_k(lane, a));
        }
        CHECK_INT(wrong, 0);
        ep_free(src);
        ep_free(tile);
    }
}

/* The magic numbers of dequantisation, in the halves' own arithmetic. */
static void test_magic(void)
{
    for (uint32_t q = 0; q < 256; q++) {
        CHECK(half_float(0x6400 | q) == 1024.0f + (float)q);
        if (q < 16) {
            CHECK(half_float(0x6400 | q) - half_float(0x6408) == (float)q - 8.0f);
            CHECK(half_float(0x6400 | q << 4) * half_float(0x2c00) + half_float(0xd400) ==
                  (float)q);
            CHECK(half_float(0x6400 | q << 4) * half_float(0x2c00) + half_float(0xd480) ==
                  (float)q - 8.0f);
        }
        if (q < 64) CHECK(half_float(0x6400 | q) - half_float(0x6420) == (float)q - 32.0f);
        CHECK(half_float(0x6400 | q) - half_float(0x6480) == (float)q - 128.0f);
        float f;
        uint32_t bits = 0x4b000000u | q;
        memcpy(&f, &bits, 4);
        CHECK(f - 8388608.0f == (float)q);
    }
}

static void test_activation_order(void)
{
    int seen[512] = {0};
    for (int k = 0; k < 512; k++)
        seen[gpu_act_at(k)]++;
    for (int k = 0; k < 512; k++)
        CHECK_INT(seen[k], 1);
    /* lane t reads 8 halves: elements 0..3 of step 0, then of step 1 */
    for (int block = 0; block < 16; block++)
        for (int t = 0; t < 4; t++)
            for (int j = 0; j < 8; j++)
                CHECK_INT(gpu_act_at(32 * block + 16 * (j / 4) + gpu_b_k(t, j % 4)),
                          32 * block + 8 * t + j);
}

/* Eight rows of one 16-byte column (what one phase of ldmatrix or one core matrix reads) and eight
 * columns of one row fall into 32 different banks. */
static void test_swizzle(void)
{
    static uint8_t seen[64 * 128];
    memset(seen, 0, sizeof seen);
    for (int row = 0; row < 64; row++)
        for (int byte = 0; byte < 128; byte++)
            seen[gpu_swizzle(row, byte)]++;
    for (size_t i = 0; i < sizeof seen; i++)
        CHECK_INT(seen[i], 1);
    for (int col = 0; col < 8; col++)
        for (int first = 0; first < 64; first += 8) {
            uint32_t banks = 0;
            for (int r = 0; r < 8; r++)
                for (int b = 0; b < 16; b += 4)
                    banks |= 1u << (gpu_swizzle(first + r, 16 * col + b) / 4 % 32);
            CHECK(banks == 0xffffffffu);
        }
}

static void test_segments(void)
{
    for (int tiles = 1; tiles <= 256; tiles++) {
        int each = gpu_segment_tiles(tiles), n = gpu_segment_count(tiles);
        CHECK(n >= 1 && n <= GPU_SEGMENTS);
        CHECK(n * each >= tiles && (n - 1) * each < tiles);
    }
}

static void check_list(const int32_t *counts, int n_experts, int width)
{
    int32_t *offset = ep_calloc((size_t)n_experts + 1, sizeof(int32_t));
    for (int e = 0; e < n_experts; e++)
        offset[e + 1] = offset[e] + counts[e];
    int n_pairs = offset[n_experts], most = gpu_entries_most(n_pairs, n_experts, width);
    gpu_entry *list = ep_calloc((size_t)most + 1, sizeof(gpu_entry));
    int *seen = ep_calloc((size_t)n_pairs + 1, sizeof(int));
    int n = gpu_entries_build(list, offset, n_experts, width);
    CHECK(n <= most);
    for (int i = 0; i < n; i++) {
        gpu_entry e = list[i];
        CHECK(e.cols >= 1 && e.cols <= width);
        CHECK(e.first >= offset[e.expert] && e.first + e.cols <= offset[e.expert + 1]);
        for (int c = 0; c < e.cols; c++)
            seen[e.first + c]++;
    }
    for (int p = 0; p < n_pairs; p++)
        CHECK_INT(seen[p], 1);
    /* the plain loop */
    int want = 0;
    for (int e = 0; e < n_experts; e++)
        for (int at = 0; at < counts[e]; at += width)
            want++;
    CHECK_INT(n, want);
    ep_free(offset);
    ep_free(list);
    ep_free(seen);
}

static void test_work_lists(void)
{
    static const int32_t odd[] = {63, 0, 64, 65, 0, 0, 127, 128, 129, 1000, 1};
    static const int32_t none[] = {0, 0, 0};
    static const int widths[] = {8, 16, 32, 64, 128};
    for (int w = 0; w < 5; w++) {
        check_list(odd, 11, widths[w]);
        check_list(none, 3, widths[w]);
        int32_t counts[512];
        for (int e = 0; e < 512; e++)
            counts[e] = draw() % 3 ? 0 : (int32_t)(draw() % 20);
        check_list(counts, 512, widths[w]);
    }
    for (int n = 1; n <= 264; n += 7)
        for (int64_t items = 0; items < 1000; items += 13) {
            int64_t end = 0, from, to;
            for (int w = 0; w < n; w++) {
                gpu_share(items, w, n, &from, &to);
                CHECK(from == end && to >= from && to - from <= items / n + 1);
                end = to;
            }
            CHECK(end == items);
        }
}

/* Every tile of a matrix belongs to one unit of one warp, whatever the cut. */
static void test_units(void)
{
    static const int rows[] = {1, 2, 15, 16, 17, 96, 128};
    static uint8_t seen[128][64];
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        for (int kt = 1; kt <= 64; kt += kt < 12 ? 1 : 11)
            for (int way = 0; way < 3; way++) {
                gpu_matrix m = matrix_of(KERN_Q4_K, 16 * rows[i], 256 * kt, 0);
                gpu_cut cut = gpu_cut_make(&m, way == 0, way, 8);
                memset(seen, 0, sizeof seen);
                for (int c = 0; c < gpu_cut_chunks(&cut); c++) {
                    int units = gpu_cut_units(&cut, c);
                    if (way == 0) CHECK(units <= 24);
                    for (int u = 0; u < units; u++) {
                        gpu_unit unit = gpu_cut_unit(&cut, c, u);
                        for (int r = 0; r < unit.rows; r++)
                            for (int t = 0; t < unit.tiles; t++)
                                seen[unit.row_tile + r][unit.tile + t]++;
                    }
                }
                for (int r = 0; r < rows[i]; r++)
                    for (int t = 0; t < kt; t++)
                        if (seen[r][t] != 1) {
                            CHECK(!"a tile not done once");
                            return;
                        }
            }
}

/* ---- the product in the kernels' order ---- */

/* Finite scales of moderate size in rows of random bytes. */
static void tame(int type, uint8_t *rows, size_t bytes)
{
    size_t block = (size_t)kern_type_block_bytes(type);
    for (size_t at = 0; at < bytes; at += block) {
        size_t d = type == KERN_Q6_K ? 208 : 0;
        int n = type == KERN_Q4_K ? 2 : 1;
        for (int i = 0; i < n; i++) {
            uint32_t h = draw(), v = type == KERN_BF16 ? (h & 0x807f) | (118 + h / 65536 % 8) << 7
                                                       : (h & 0x83ff) | (5 + h / 65536 % 8) << 10;
            rows[at + d + 2 * (size_t)i] = (uint8_t)v;
            rows[at + d + 2 * (size_t)i + 1] = (uint8_t)(v >> 8);
        }
    }
}

static void test_product(void)
{
    enum { N = 24, K = 2048, TOKENS = 5 };
    float *x = ep_alloc(K * sizeof(float)), *w = ep_alloc(K * sizeof(float));
    for (int t = 0; t < N_TYPES; t++) {
        int type = types[t];
        gpu_matrix m = matrix_of(type, N, K, 0);
        uint8_t *src = ep_alloc(N * m.row_bytes), *packed = ep_alloc(m.bytes);
        fill(src, N * m.row_bytes);
        tame(type, src, N * m.row_bytes);
        gpu_pack(&m, src, NULL, packed);
        double error = 0, size = 0;
        for (int token = 0; token < TOKENS; token++) {
            double *exact_x = ep_alloc(K * sizeof(double));
            for (int i = 0; i < K; i++) {
                float v = ((float)(draw() % 2001) - 1000.0f) / 257.0f;
                exact_x[i] = type == KERN_BF16 ? rounded(v, 8) : v; /* bf16 rows come as such */
                x[i] = rounded(v, type == KERN_BF16 ? 8 : 11);
            }
            for (int r = 0; r < N; r++) {
                double want = 0;
                kern_dequant_row(type, src + (size_t)r * m.row_bytes, w, K);
                for (int i = 0; i < K; i++)
                    want += (double)w[i] * exact_x[i];
                float total = 0.0f;
                int each = gpu_segment_tiles(m.k_tiles);
                for (int from = 0; from < m.k_tiles; from += each) {
                    float segment = 0.0f;
                    for (int kt = from; kt < from + each && kt < m.k_tiles; kt++)
                        segment += tile_product(
                            type, packed + (size_t)(r / 16 * m.k_tiles + kt) * (size_t)m.tile_bytes,
                            r % 16, x + kt * GPU_TILE_K);
                    total += segment;
                }
                error += fabs(total - want);
                size += fabs(want);
            }
            ep_free(exact_x);
        }
        printf("    %-5s mean relative error %.2e\n", kern_type_name(type), error / size);
        CHECK(error <= 1e-3 * size);
        CHECK(size > 0);
        ep_free(src);
        ep_free(packed);
    }
    ep_free(x);
    ep_free(w);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"pack_identity", test_pack_identity},
        {"pack_experts", test_pack_experts},
        {"pack_edges", test_pack_edges},
        {"fragments", test_fragments},
        {"nibbles", test_nibbles},
        {"registers", test_registers},
        {"magic", test_magic},
        {"activation_order", test_activation_order},
        {"swizzle", test_swizzle},
        {"segments", test_segments},
        {"work_lists", test_work_lists},
        {"units", test_units},
        {"product", test_product},
    };
    printf("seed %llu\n", (unsigned long long)seed);
    return test_main(argc, argv, cases, sizeof cases / sizeof cases[0]);
}
