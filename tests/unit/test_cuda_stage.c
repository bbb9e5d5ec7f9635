/*
 * The stage of the wgmma form, proved without a device: what is gathered lies where descriptors
 * read, operands and results are those of the PTX manual (written out here in its own words),
 * items cover each pair and tile once, and a product that goes through a stage adds the same
 * numbers in the same steps as one that goes through the registers of mma.sync.
 */
#include <math.h>
#include <stdlib.h>
#include "base/base.h"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/stage.h"
#include "kernels/kernels.h"
#include "tests/test.h"

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

/* ---- what the hardware reads ---- */

/* The byte of element (col, k) of a K-major operand with 16-bit elements that descriptor `d` names.
 * The manual's canonical layouts, in units of 16 bytes: without a swizzle ((8, cols/8), 2) : ((1,
 * SBO), LBO); with 128 bytes ((8, cols/8), 2) : ((8, SBO), 1), then bits 4-6 of the address are
 * xored with bits 7-9. */
static uint32_t hardware_byte(uint64_t d, int col, int k)
{
    uint32_t start = (uint32_t)(d & 0x3fff), lbo = (uint32_t)(d >> 16 & 0x3fff);
    uint32_t sbo = (uint32_t)(d >> 32 & 0x3fff), mode = (uint32_t)(d >> 62);
    uint32_t in_group = (uint32_t)col % 8, group = (uint32_t)col / 8, column = (uint32_t)k / 8;
    uint32_t unit =
        mode == 1 ? in_group * 8 + group * sbo + column : in_group + group * sbo + column * lbo;
    uint32_t address = ((start + unit) << 4) + (uint32_t)k % 8 * 2;
    if (mode == 1) address ^= (address >> 7 & 7) << 4;
    return address;
}

static void test_descriptors(void)
{
    for (uint32_t stage = 0; stage < 200 * 1024; stage += 49 * 1024) {
        for (int col = 0; col < GPU_ITEM_COLS; col++)
            for (int k = 0; k < GPU_TILE_K; k++) {
                uint64_t d = gpu_operand_step(gpu_operand_values(stage), k / 16);
                CHECK((d & ~(uint64_t)0xc0003fff3fff3fff) == 0); /* no base offset, nothing else */
                CHECK_INT(hardware_byte(d, col, k % 16), stage + (uint32_t)gpu_stage_value(col, k));
            }
        for (int col = 0; col < GPU_ITEM_COLS; col++)
            for (int j = 0; j < 16; j++)
                CHECK_INT(hardware_byte(gpu_operand_sums(stage), col, j),
                          stage + GPU_VALUE_BYTES + (uint32_t)gpu_stage_sum(col, j));
    }
}

static void test_stage_parts(void)
{
    static uint8_t seen[GPU_VALUE_BYTES], sums[GPU_SUM_BYTES];
    memset(seen, 0, sizeof seen);
    memset(sums, 0, sizeof sums);
    for (int col = 0; col < GPU_ITEM_COLS; col++)
        for (int k = 0; k < GPU_TILE_K; k++)
            for (int b = 0; b < 2; b++) {
                seen[gpu_stage_value(col, k) + b]++;
                if (k < 16) sums[gpu_stage_sum(col, k) + b]++;
            }
    for (size_t i = 0; i < sizeof seen; i++)
        CHECK_INT(seen[i], 1);
    for (size_t i = 0; i < sizeof sums; i++)
        CHECK_INT(sums[i], 1);
    for (int t = 0; t < N_TYPES; t++) {
        int weights = gpu_stage_weights(types[t]), bytes = gpu_stage_bytes(types[t]);
        CHECK(weights % 16 == 0 && gpu_tile_bytes(types[t]) % 16 == 0 && bytes % 1024 == 0);
        CHECK(weights >= GPU_VALUE_BYTES + (types[t] == KERN_Q4_K ? GPU_SUM_BYTES : 0));
        CHECK(weights + GPU_ITEM_TILES * gpu_tile_bytes(types[t]) <= bytes);
        CHECK(2 * bytes + 2048 <= 227 * 1024); /* two stages at least */
    }
}

/* Every 16-byte piece of every column and of its sums is copied once, and to its place. */
static void test_gather(void)
{
    static int seen[GPU_ITEM_COLS][32], sums[GPU_ITEM_COLS][2];
    memset(seen, 0, sizeof seen);
    memset(sums, 0, sizeof sums);
    for (int thread = 0; thread < GPU_GATHERERS; thread++) {
        for (int i = 0; i < GPU_ITEM_COLS / 16; i++)
            for (int slab = 0; slab < GPU_TILE_K / GPU_SLAB_K; slab++) {
                int col = gpu_gather_col(thread, i), piece = gpu_gather_piece(thread);
                int to = gpu_stage_value(col, piece * 8) + slab * GPU_SLAB_BYTES;
                for (int v = 0; v < 8; v++)
                    CHECK_INT(gpu_stage_value(col, slab * GPU_SLAB_K + piece * 8 + v), to + 2 * v);
                seen[col][slab * 8 + piece]++;
                /* the first n copies of a thread are the first 16n columns */
                CHECK(col / GPU_COLS_STEP == i);
            }
        for (int v = 0; v < 8; v++)
            CHECK_INT(gpu_stage_sum(thread / 2, thread % 2 * 8 + v),
                      gpu_stage_sum(thread / 2, thread % 2 * 8) + 2 * v);
        sums[thread / 2][thread % 2]++;
    }
    for (int col = 0; col < GPU_ITEM_COLS; col++)
        for (int i = 0; i < 32; i++) {
            CHECK_INT(seen[col][i], 1);
            if (i < 2) CHECK_INT(sums[col][i], 1);
        }
}

/* The manual, m64nNk16: warp i of the warpgroup has rows 16i..16i+15; within, groupID = lane / 4,
 * threadID = lane % 4. A in registers: row groupID for elements 0, 1, 4, 5, else + 8; column 2 *
 * threadID + (i & 1), + 8 for i >= 4. D: row groupID for i % 4 < 2, else + 8; column 8 * (i / 4) +
 * 2 * threadID + (i & 1). */
static void test_group_fragments(void)
{
    static int a[64][16], d[64][GPU_ITEM_COLS];
    memset(a, 0, sizeof a);
    memset(d, 0, sizeof d);
    for (int thread = 0; thread < 128; thread++) {
        int base = 16 * (thread / 32), group = thread % 32 / 4, in = thread % 4;
        for (int i = 0; i < 8; i++) {
            int row = base + group + (i == 2 || i == 3 || i == 6 || i == 7 ? 8 : 0);
            CHECK_INT(gpu_group_a_row(thread, i), row);
            a[row][2 * in + (i & 1) + (i >= 4 ? 8 : 0)]++;
            CHECK_INT(gpu_a_k(thread % 32, i), 2 * in + (i & 1) + (i >= 4 ? 8 : 0));
        }
        for (int i = 0; i < GPU_ITEM_COLS / 2; i++) {
            int row = base + group + (i % 4 < 2 ? 0 : 8), col = 8 * (i / 4) + 2 * in + (i & 1);
            CHECK_INT(gpu_group_c_row(thread, i), row);
            CHECK_INT(gpu_group_c_col(thread, i), col);
            d[row][col]++;
        }
    }
    for (int r = 0; r < 64; r++)
        for (int c = 0; c < GPU_ITEM_COLS; c++) {
            CHECK_INT(d[r][c], 1);
            if (c < 16) CHECK_INT(a[r][c], 1);
        }
}

/* ---- work ---- */

/* Items of all blocks together: each pair of each expert meets each row tile once; the entries of
 * an expert come one after another at a chunk. */
static void check_items(const int32_t *counts, int n_experts, int row_tiles)
{
    int32_t *offset = ep_calloc((size_t)n_experts + 1, sizeof(int32_t));
    for (int e = 0; e < n_experts; e++)
        offset[e + 1] = offset[e] + counts[e];
    int n_pairs = offset[n_experts];
    gpu_entry *list =
        ep_calloc((size_t)gpu_entries_most(n_pairs, n_experts, GPU_ITEM_COLS) + 1, sizeof *list);
    int n = gpu_entries_build(list, offset, n_experts, GPU_ITEM_COLS);
    gpu_matrix m = gpu_matrix_make(KERN_Q4_K, 16 * row_tiles, 512, 0, 288);
    gpu_cut cut = gpu_cut_make(&m, 0, 1, GPU_ITEM_TILES);
    int chunks = gpu_cut_chunks(&cut), before_expert = -1, before_chunk = -1;
    uint8_t *seen = ep_calloc((size_t)(n_pairs * row_tiles) + 1, 1);
    CHECK(cut.chunk == GPU_ITEM_TILES && cut.segs == 1 && cut.seg_tiles == m.k_tiles);
    for (int item = 0; item < n * chunks; item++) {
        gpu_entry any = list[item / chunks];
        int at = gpu_item_entry(any, chunks, item), chunk = gpu_item_chunk(any, chunks, item);
        CHECK(at >= 0 && at < n && chunk >= 0 && chunk < chunks);
        gpu_entry e = list[at];
        CHECK(e.expert == any.expert);
        CHECK(e.expert != before_expert || chunk == before_chunk || e.nth == 0);
        before_expert = e.expert;
        before_chunk = chunk;
        for (int r = 0; r < gpu_cut_rows(&cut, chunk); r++)
            for (int c = 0; c < e.cols; c++)
                seen[(e.first + c) * row_tiles + chunk * GPU_ITEM_TILES + r]++;
    }
    for (int i = 0; i < n_pairs * row_tiles; i++)
        CHECK_INT(seen[i], 1);
    ep_free(offset);
    ep_free(list);
    ep_free(seen);
}

static void test_items(void)
{
    static const int32_t odd[] = {63, 0, 64, 65, 0, 0, 127, 128, 129, 1000, 1};
    static const int tiles[] = {1, 7, 8, 9, 16, 96};
    for (int i = 0; i < 6; i++) {
        check_items(odd, 11, tiles[i]);
        int32_t counts[128];
        for (int e = 0; e < 128; e++)
            counts[e] = draw() % 3 ? (int32_t)(draw() % 200) : 0;
        check_items(counts, 128, tiles[i]);
    }
}

/* ---- the same numbers in the same steps ---- */

enum { COLS = 21, K = 2 * GPU_TILE_K };

/* One k-step of a tensor core on one element, as any hardware may do it: here ascending. */
static float step_product(const float a[16], const float b[16], float c)
{
    for (int k = 0; k < 16; k++)
        c = fmaf(a[k], b[k], c);
    return c;
}

/* Raw operand values of a code; scales are not at stake here. */
static float code_value(int type, uint32_t code)
{
    return type == KERN_F16 || type == KERN_BF16 ? (float)(int)(code % 509) - 254.0f : (float)code;
}

/* Row r of a tile and step s, from the places of the fragment. */
static void a_of(int type, const uint8_t *tile, int row, int step, float a[16])
{
    for (int lane = row % 8 * 4; lane < row % 8 * 4 + 4; lane++)
        for (int i = 0; i < 8; i++)
            if (gpu_a_row(lane, i) == row)
                a[gpu_a_k(lane, i)] =
                    code_value(type, gpu_tile_code(type, tile, row, 16 * step + gpu_a_k(lane, i)));
}

/* Rows in both orders that rows_kernel writes, and the second gathered into a stage. */
typedef struct columns {
    uint16_t by_lane[COLS][K], natural[COLS][K];
    uint8_t stage[GPU_VALUE_BYTES];
} columns;

static void gather_stage(columns *c, int kt)
{
    for (int thread = 0; thread < GPU_GATHERERS; thread++)
        for (int i = 0; i < (COLS + GPU_COLS_STEP - 1) / GPU_COLS_STEP; i++)
            for (int slab = 0; slab < GPU_TILE_K / GPU_SLAB_K; slab++) {
                int col = gpu_gather_col(thread, i), piece = gpu_gather_piece(thread);
                int row = col < COLS ? col : COLS - 1;
                memcpy(c->stage + gpu_stage_value(col, piece * 8) + slab * GPU_SLAB_BYTES,
                       &c->natural[row][kt * GPU_TILE_K + slab * GPU_SLAB_K + piece * 8], 16);
            }
}

static float as_float(uint16_t v)
{
    return (float)(int16_t)v / 64.0f;
}

/* mma.sync: a lane reads 16 bytes of two steps, halves 4p..4p+3 are its B operand of step p. */
static void b_by_lane(const columns *c, int col, int kt, int step, float b[16])
{
    for (int t = 0; t < 4; t++)
        for (int i = 0; i < 4; i++)
            b[gpu_b_k(t, i)] = as_float(
                c->by_lane[col][kt * GPU_TILE_K + step / 2 * 32 + 8 * t + 4 * (step % 2) + i]);
}

/* wgmma: what the descriptor names. */
static void b_by_stage(const columns *c, int col, int step, float b[16])
{
    for (int k = 0; k < 16; k++) {
        uint16_t v;
        memcpy(&v, c->stage + hardware_byte(gpu_operand_step(gpu_operand_values(0), step), col, k),
               2);
        b[k] = as_float(v);
    }
}

static void test_steps(void)
{
    static columns c;
    for (int col = 0; col < COLS; col++)
        for (int k = 0; k < K; k++)
            c.natural[col][k] = c.by_lane[col][gpu_act_at(k)] = (uint16_t)draw();
    for (int t = 0; t < N_TYPES; t++) {
        const int type = types[t];
        gpu_matrix m = gpu_matrix_make(type, 16, K, 0, kern_type_row_bytes(type, K));
        uint8_t *src = ep_alloc(16 * m.row_bytes), *packed = ep_alloc(m.bytes);
        for (size_t i = 0; i < 16 * m.row_bytes; i++)
            src[i] = (uint8_t)draw();
        gpu_pack(&m, src, NULL, packed);
        int apart = 0;
        for (int kt = 0; kt < m.k_tiles; kt++) {
            const uint8_t *tile = packed + (size_t)kt * (size_t)m.tile_bytes;
            gather_stage(&c, kt);
            for (int row = 0; row < 16; row++)
                for (int col = 0; col < COLS; col++) {
                    float plain = 0.0f, by_lane = 0.0f, by_stage = 0.0f;
                    for (int step = 0; step < GPU_TILE_STEPS; step++) {
                        float a[16], b[16];
                        a_of(type, tile, row, step, a);
                        b_by_lane(&c, col, kt, step, b);
                        by_lane = step_product(a, b, by_lane);
                        b_by_stage(&c, col, step, b);
                        by_stage = step_product(a, b, by_stage);
                    }
                    for (int k = 0; k < GPU_TILE_K; k++)
                        plain = fmaf(code_value(type, gpu_tile_code(type, tile, row, k)),
                                     as_float(c.natural[col][kt * GPU_TILE_K + k]), plain);
                    apart += by_lane != plain || by_stage != plain;
                }
        }
        CHECK_INT(apart, 0);
        ep_free(src);
        ep_free(packed);
    }
}

/* Sums of 32 lie where the step of minimums reads them: eight, then what their rounding lost. */
static void test_sums(void)
{
    int seen[64] = {0};
    for (int j = 0; j < 32; j++)
        for (int rest = 0; rest < 2; rest++) {
            int at = gpu_sum_at(j, rest);
            CHECK_INT(at / 16, j / 8); /* the tile's step */
            CHECK_INT(at % 16, j % 8 + 8 * rest);
            seen[at]++;
        }
    for (int i = 0; i < 64; i++)
        CHECK_INT(seen[i], 1);
    /* a lane's words of mma.sync: t and t + 4 are elements 0, 1 and 2, 3 of its B operand */
    for (int t = 0; t < 4; t++)
        for (int i = 0; i < 4; i++)
            CHECK_INT(gpu_b_k(t, i), 2 * (i < 2 ? t : t + 4) + i % 2);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"descriptors", test_descriptors},
        {"stage_parts", test_stage_parts},
        {"gather", test_gather},
        {"group_fragments", test_group_fragments},
        {"items", test_items},
        {"steps", test_steps},
        {"sums", test_sums},
    };
    printf("seed %llu\n", (unsigned long long)seed);
    return test_main(argc, argv, cases, sizeof cases / sizeof cases[0]);
}
