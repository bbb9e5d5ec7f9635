/*
 * gemm_amx: the panel products on AMX tiles (int8, and bf16 where weights are bf16).
 *
 * Weights are unpacked into byte planes in L1 that are AMX B tiles (16 k-groups of 64 bytes), meet
 * up to two tiles of 16 rows, and the float step of ops.h follows from the stored int32 tiles.
 * Three things overlap, cut into parts small enough for the core's window to see all of them: tile
 * products of this block, unpacking a little ahead of it, the float step of the block before.
 * Sub-block scales are folded into the bytes without losing a bit: Q4_K, Q5_K: sc = 8a + b; q*a and
 * q*b fit a byte, so two planes and I1 = 8 Ca + Cb; Q6_K: sc * (q - 32) = 256h + l, h signed, l
 * unsigned, so I = 256 Ch + Cl. The types with one d per block need no folding; their zero point is
 * taken off while unpacking.
 *
 * What is in flight must stay in L1 beside the rows that stream through it, or loads and stores of
 * the three wait for each other: planes are a ring of one block, not two, and more than 32 rows
 * come back for the panel in chunks (it is in L2 by then). Both are worth a third of the time at 32
 * rows.
 *
 * Tiles stay configured between calls: a call asks what is configured (18 cycles here) and loads
 * the configuration (300 cycles) only if it differs. Permission to use tiles is select.c's
 * business. Row counts too small to pay go to the AVX-512 table.
 */
/* Longer than AVX-512's: tiles loaded from L2 keep the buffers for misses busy too, and a panel
 * takes its time. Cold panels at 12 and 16 rows, one thread, ns per 256 block at 2 and 4 KB: Q8_0
 * 372 and 349, 399 and 370; Q6_K 323 and 311, 334 and 330; Q4_K 240 and 233, 257 and 250 (a loop
 * over panels, neighbours busy). */
#define X_AHEAD 4096
#include "kernels/cpu/x512.h"

enum { CHUNK = 32, TILE_BYTES = 1024 };

/* Tiles 0..3 hold C, 4 and 5 A (activation rows), 6 and 7 B (weights). */
typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;
_Static_assert(sizeof(tile_config) == 64, "tile configuration");

/* For tiles and configurations that this file writes itself: gcc's intrinsics do not say what they
 * read (of a tile nothing, of a configuration 8 of its 64 bytes), so stores might come after them.
 */
#define TILE_LOAD(t, from, bytes)                                                                  \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t                                               \
                     :                                                                             \
                     : "r"(from), "r"(64l), "m"(*(const uint8_t(*)[bytes])(from)))

static void configure(int rows, int k_bytes)
{
    _Alignas(64) tile_config want = {.palette = 1}, have;
    for (int t = 0; t < 8; t++) {
        want.row_bytes[t] = (uint16_t)(t == 4 || t == 5 ? k_bytes : 64);
        want.rows[t] = (uint8_t)(t < 6 ? rows : k_bytes / 4);
    }
    __asm__ volatile("sttilecfg %0" : "=m"(have));
    if (_mm512_cmpneq_epi64_mask(x_load(&have), x_load(&want)))
        __asm__ volatile("ldtilecfg %0" : : "m"(want));
}

/* The rows of a chunk cut into tiles of equal height; the last tile may begin early and overlap the
 * one before it, its doubled rows are skipped by the float step. */
typedef struct cut {
    int m, tiles, height;
} cut;

static cut cut_rows(int m)
{
    cut c = {.m = m, .tiles = (m + 15) / 16};
    c.height = (m + c.tiles - 1) / c.tiles;
    return c;
}

static int tile_start(const cut *c, int t)
{
    const int start = t * c->height, last = c->m - c->height;
    return start < last ? start : last;
}

/* ---- K-quants: two byte planes ------------------------------------------------------------------
 */

/* Parts of 32 weights that unpacking runs ahead of the products: one block less the quarter in use.
 */
enum { AHEAD = 4 };

typedef struct k_block {
    x_head h;            /* Q6_K uses d only */
    __m512i digit[2][2]; /* Q4_K, Q5_K: digits a, b of the scales, as x_head.sc */
    const uint8_t *p;
} k_block;

typedef struct k_work {
    _Alignas(64) uint8_t plane[4][2][TILE_BYTES]; /* [quarter of the block][a or high, b or low] */
    _Alignas(64) uint8_t
        c[4][TILE_BYTES]; /* a pair: [tile * 2 + plane]; one tile: [(block & 1) * 2 + plane] */
    _Alignas(64) float acc[CHUNK][KERN_PANEL];
    k_block block[4]; /* [block & 3]: one is unpacked, one multiplied, one finished */
} k_work;

X_INLINE void open_block(k_block *k, const uint8_t *panel, int blocks, int b, const int type)
{
    if (type == KERN_Q6_K) {
        k->p = panel + x_panel_head(blocks) + (size_t)b * X_BLOCK_Q6_K;
        k->h.d = x_half16(panel + 32 * (size_t)b);
        x_ahead(k->p, 256);
        return;
    }
    k->p = panel + (size_t)b * (type == KERN_Q5_K ? X_BLOCK_Q5_K : X_BLOCK_Q4_K);
    x_head_k(&k->h, k->p);
    x_ahead(k->p, type == KERN_Q5_K ? 768 : 256);
    X_UNROLL
    for (int g = 0; g < 2; g++) {
        k->digit[0][g] = _mm512_and_si512(_mm512_srli_epi16(k->h.sc[g], 3), x_set8(7));
        k->digit[1][g] = _mm512_and_si512(k->h.sc[g], x_set8(7));
    }
}

/* Byte `b` of each lane as both 16-bit halves of the lane. */
X_INLINE __m512i both_halves(__m512i v, int b)
{
    return _mm512_shuffle_epi8(v,
                               _mm512_add_epi8(x_index(0, 0), _mm512_set1_epi32(b * 0x00010001)));
}

/* 32 weights of Q4_K or Q5_K: one 16-bit product serves two bytes, 31 * 7 < 256 carries nothing. */
X_INLINE void unpack_k(const k_block *k, int j, uint8_t *a, uint8_t *b, const int type)
{
    const uint8_t *nibbles = k->p + X_HEAD_K + (type == KERN_Q5_K ? 512 : 0) + j * X_NIBBLES;
    __m512i w[8];
    if (type == KERN_Q5_K)
        x_nibbles5(w, nibbles, x_load(k->p + X_HEAD_K + 64 * j));
    else
        x_nibbles(w, nibbles);
    x_ahead(nibbles, X_NIBBLES);
    const __m512i da = both_halves(k->digit[0][j / 4], j % 4);
    const __m512i db = both_halves(k->digit[1][j / 4], j % 4);
    X_UNROLL
    for (int t = 0; t < 8; t++) {
        _mm512_store_si512(a + 64 * t, _mm512_mullo_epi16(w[t], da));
        _mm512_store_si512(b + 64 * t, _mm512_mullo_epi16(w[t], db));
    }
}

/* 32 weights of Q6_K. The products of even and of odd bytes are 16 bits each; the planes take their
 * upper and lower bytes. */
X_INLINE void unpack_q6(const k_block *k, int j, uint8_t *high, uint8_t *low)
{
    const __m512i lower = _mm512_set1_epi16(255);
    const __m512i scales = x_load(k->p + 64 * (j / 2));
    __m512i w[8];
    x_nibbles6(w, k->p + 1280 + j * X_NIBBLES, k->p + 256 + j * 128);
    x_ahead(k->p + 256 + j * 384, 384);
    X_UNROLL
    for (int half = 0; half < 2; half++) {
        const __m512i even = both_halves(scales, 2 * (j % 2) + half);
        const __m512i odd = _mm512_slli_epi16(even, 8);
        const __m512i offset = _mm512_srai_epi16(odd, 3); /* 32 sc */
        X_UNROLL
        for (int t = 4 * half; t < 4 * half + 4; t++) {
            const __m512i e = _mm512_sub_epi16(_mm512_maddubs_epi16(w[t], even), offset);
            const __m512i o = _mm512_sub_epi16(_mm512_maddubs_epi16(w[t], odd), offset);
            _mm512_store_si512(high + 64 * t, x_pick(lower, _mm512_srli_epi16(e, 8), o));
            _mm512_store_si512(low + 64 * t, x_pick(lower, e, _mm512_slli_epi16(o, 8)));
        }
    }
}

/* Part n of a panel, 32 weights, into both planes of its slot; opens the block that it begins. */
X_INLINE void unpack_part(k_work *w, const uint8_t *panel, int blocks, int n, const int type)
{
    k_block *k = &w->block[(n / 8) & 3];
    uint8_t(*plane)[TILE_BYTES] = w->plane[(n / 2) & 3];
    const int j = n % 8, at = 512 * (n % 2);
    if (j == 0) open_block(k, panel, blocks, n / 8, type);
    if (type == KERN_Q6_K)
        unpack_q6(k, j, plane[0] + at, plane[1] + at);
    else
        unpack_k(k, j, plane[0] + at, plane[1] + at, type);
}

/* Part u of a block's products. With two row tiles the even parts are the first one's, else the
 * even parts are the first plane's. */
X_INLINE void multiply_part(const int8_t *x0, const int8_t *x1, size_t ldq,
                            uint8_t (*plane)[TILE_BYTES], int u, bool two, const int type)
{
    if (u % 2 == 0) {
        _tile_loadd(4, x0 + 32 * u, ldq);
        TILE_LOAD(6, plane[0], TILE_BYTES);
        if (type == KERN_Q6_K)
            _tile_dpbssd(0, 4, 6);
        else
            _tile_dpbsud(0, 4, 6);
    } else if (two) {
        _tile_loadd(5, x1 + 32 * (u - 1), ldq);
        if (type == KERN_Q6_K)
            _tile_dpbssd(2, 5, 6);
        else
            _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    if ((u % 2 == 0) == two) {
        TILE_LOAD(7, plane[1], TILE_BYTES);
        _tile_dpbsud(1, 4, 7);
    }
}

/* The float step for rows from..to-1 of tile t, whose two planes' sums lie at c[0] and c[1]. */
X_INLINE void finish_rows(k_work *w, const kern_rows *a, const cut *cu, int b, int t,
                          uint8_t (*c)[TILE_BYTES], int from, int to, const int type)
{
    const int start = tile_start(cu, t), skip = t * cu->height - start;
    const x_head h = w->block[b & 3].h; /* a copy: stores to acc must not make it reload */
    for (int i = from > skip ? from : skip; i < to; i++) {
        const __m512i high = _mm512_load_si512(c[0] + 64 * i);
        const __m512i low = _mm512_load_si512(c[1] + 64 * i);
        const size_t r = (size_t)(start + i);
        const float dx = a->scale[r * a->lds + (size_t)b];
        const __m512 acc = _mm512_load_ps(w->acc[r]);
        __m512 next;
        if (type == KERN_Q6_K) {
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
            next = _mm512_fmadd_ps(_mm512_set1_ps(dx), _mm512_mul_ps(h.d, _mm512_cvtepi32_ps(sum)),
                                   acc);
        } else {
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high, 3), low);
            next = x_step_k(acc, sum, &h, a->sum32 + r * a->ldsum + 8 * (size_t)b, dx);
        }
        _mm512_store_ps(w->acc[r], next);
    }
}

/* Part u of the float step of block b: of a pair every other part does half a tile, of one tile the
 * first does all. The way into a run of rows costs as much as two of them, so runs are long. */
X_INLINE void finish_part(k_work *w, const kern_rows *a, const cut *cu, int b, int u,
                          const int type)
{
    const int n = cu->height, half = n / 2;
    if (cu->tiles == 2 && u % 4 == 0)
        finish_rows(w, a, cu, b, u / 4, w->c + 2 * (u / 4), 0, half, type);
    else if (cu->tiles == 2 && u % 4 == 2)
        finish_rows(w, a, cu, b, u / 4, w->c + 2 * (u / 4), half, n, type);
    else if (cu->tiles == 1 && u == 0)
        finish_rows(w, a, cu, b, 0, w->c + 2 * (b & 1), 0, n, type);
}

/* At most CHUNK rows (a points at the first) over the whole panel. */
X_INLINE void chunk_k(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a, int m,
                      const int type)
{
    k_work w;
    const cut cu = cut_rows(m);
    const int blocks = a->k / 256, parts = 8 * blocks;
    const bool two = cu.tiles == 2;
    /* The float step follows a pair's products one block behind, so that one set of C suffices: its
     * first tile is stored early. One tile has two sets, and follows later. */
    const int delay = two ? 8 : 10;
    const int8_t *x0 = a->q, *x1 = a->q + (size_t)tile_start(&cu, cu.tiles - 1) * a->ldq;
    int unpacked = 0;
    configure(cu.height, 64);
    for (int r = 0; r < m; r++)
        _mm512_store_ps(w.acc[r], _mm512_setzero_ps());
    while (unpacked < AHEAD)
        unpack_part(&w, panel, blocks, unpacked++, type);
    for (int b = 0; b < blocks; b++, x0 += 256, x1 += 256) {
        uint8_t(*c)[TILE_BYTES] = w.c + (two ? 0 : 2 * (b & 1));
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int u = 0; u < 8; u++) {
            multiply_part(x0, x1, a->ldq, w.plane[u / 2], u, two, type);
            if (two && u == 7) {
                _tile_stored(0, c[0], 64);
                _tile_stored(1, c[1], 64);
            }
            if (unpacked < parts) unpack_part(&w, panel, blocks, unpacked++, type);
            const int late = 8 * b + u - delay;
            if (late >= 0) finish_part(&w, a, &cu, late / 8, late % 8, type);
        }
        if (two) {
            _tile_stored(2, c[2], 64);
            _tile_stored(3, c[3], 64);
        } else {
            _tile_stored(0, c[0], 64);
            _tile_stored(1, c[1], 64);
        }
    }
    for (int late = parts < delay ? 0 : parts - delay; late < parts; late++)
        finish_part(&w, a, &cu, late / 8, late % 8, type);
    for (int r = 0; r < m; r++)
        _mm512_storeu_ps(y + (size_t)r * ldy, _mm512_load_ps(w.acc[r]));
}

/* ---- one d per block: Q8_0, Q4_0, Q5_0 (32), GPTQ4 (128) ----------------------------------------
 */

/* A group is two blocks of 32, or one of 128 (GPTQ4), done in four units. A tile is stored two
 * units after its product and finished when the store has long reached L1. */
enum { UNITS = 4, LATE = 6 };

typedef struct flat_work {
    _Alignas(64) uint8_t plane[8][512];           /* a ring of 32 weights each */
    _Alignas(64) uint8_t c[2][UNITS][TILE_BYTES]; /* [group & 1][block * 2 + tile] */
    _Alignas(64) float acc[CHUNK][KERN_PANEL];
} flat_work;

/* 32 weights as signed bytes. */
X_INLINE void unpack_flat(const uint8_t *p, uint8_t *out, const int type)
{
    __m512i w[8];
    if (type == KERN_Q8_0) {
        X_UNROLL
        for (int t = 0; t < 8; t++)
            w[t] = _mm512_xor_si512(x_load(p + 64 * t), x_set8(-128));
        x_ahead(p, 512);
    } else if (type == KERN_Q5_0) {
        x_nibbles5(w, p + 64, x_load(p));
        x_ahead(p, 320);
    } else {
        x_nibbles(w, p);
        x_ahead(p, 256);
    }
    if (type != KERN_Q8_0) {
        X_UNROLL
        for (int t = 0; t < 8; t++)
            w[t] = _mm512_sub_epi8(w[t], x_set8(type == KERN_Q5_0 ? 16 : 8));
    }
    X_UNROLL
    for (int t = 0; t < 8; t++)
        _mm512_store_si512(out + 64 * t, w[t]);
}

X_INLINE int flat_bytes(const int type)
{
    return type == KERN_Q8_0 ? 512 : type == KERN_Q5_0 ? 320 : 256;
}

/* Unit u = 2 * block + tile of a group of blocks of 32. */
X_INLINE void multiply_32(const int8_t *x, size_t ldq, const uint8_t *plane, int u)
{
    switch (u) {
    case 0:
        _tile_zero(0);
        TILE_LOAD(6, plane, TILE_BYTES / 2);
        _tile_loadd(4, x, ldq);
        _tile_dpbssd(0, 4, 6);
        break;
    case 1:
        _tile_zero(1);
        _tile_loadd(5, x, ldq);
        _tile_dpbssd(1, 5, 6);
        break;
    case 2:
        _tile_zero(2);
        TILE_LOAD(7, plane, TILE_BYTES / 2);
        _tile_loadd(4, x, ldq);
        _tile_dpbssd(2, 4, 7);
        break;
    default:
        _tile_zero(3);
        _tile_loadd(5, x, ldq);
        _tile_dpbssd(3, 5, 7);
        break;
    }
}

/* Unit u = 2 * tile + half of a block of 128. */
X_INLINE void multiply_128(const int8_t *x, size_t ldq, const uint8_t *plane, int u)
{
    switch (u) {
    case 0:
        _tile_zero(0);
        TILE_LOAD(6, plane, TILE_BYTES);
        _tile_loadd(4, x, ldq);
        _tile_dpbssd(0, 4, 6);
        break;
    case 1:
        TILE_LOAD(7, plane, TILE_BYTES);
        _tile_loadd(5, x, ldq);
        _tile_dpbssd(0, 5, 7);
        break;
    case 2:
        _tile_zero(1);
        _tile_loadd(4, x, ldq);
        _tile_dpbssd(1, 4, 6);
        break;
    default:
        _tile_loadd(5, x, ldq);
        _tile_dpbssd(1, 5, 7);
        break;
    }
}

typedef struct flat_job {
    const uint8_t *panel;
    const int8_t *x[2]; /* the two row tiles */
    cut cu;
    int blocks, groups, per_group; /* blocks in a group */
} flat_job;

/* The store that follows unit u of group g (g = groups: those left at the end). */
X_INLINE void store_late(flat_work *w, const flat_job *j, int g, int u, const int type)
{
    const bool two = j->cu.tiles == 2, before = g > 0, inside = g < j->groups;
    uint8_t(*c)[TILE_BYTES] = w->c[g & 1], (*last)[TILE_BYTES] = w->c[~g & 1];
    if (u == 2 && inside) _tile_stored(0, c[0], 64);
    if (type == KERN_GPTQ4) {
        if (u == 0 && before && two) _tile_stored(1, last[1], 64);
        return;
    }
    if (u == 3 && inside && two) _tile_stored(1, c[1], 64);
    if (u == 0 && before) _tile_stored(2, last[2], 64);
    if (u == 1 && before && two) _tile_stored(3, last[3], 64);
}

/* Part p of the float step of group g, for which odd parts do the work: of a pair a whole tile, of
 * one tile half of it. Long runs of rows matter here more than even spreading. */
X_INLINE void finish_flat(flat_work *w, const kern_rows *a, const flat_job *j, int g, int p,
                          const int type)
{
    const cut *cu = &j->cu;
    const bool two = cu->tiles == 2;
    const int which = two ? p / 2 : 0, b = g * j->per_group;
    if (p % 2 == 0) return;
    const int start = tile_start(cu, which), skip = which * cu->height - start;
    const int from = two ? skip : cu->height * (p / 2) / 2;
    const int rows = (two ? cu->height : cu->height * (p / 2 + 1) / 2) - from;
    const bool second = type != KERN_GPTQ4 && b + 1 < j->blocks;
    const __m512 d0 = x_half16(j->panel + 32 * (size_t)b);
    const __m512 d1 = x_half16(j->panel + 32 * (size_t)(second ? b + 1 : b));
    const uint8_t *c = w->c[g & 1][which] + 64 * from;
    float *acc = w->acc[start + from];
    const float *dx = a->scale + (size_t)(start + from) * a->lds + b;
    for (int i = 0; i < rows; i++, c += 64, acc += KERN_PANEL, dx += a->lds) {
        __m512 v = _mm512_mul_ps(d0, _mm512_cvtepi32_ps(_mm512_load_si512(c)));
        __m512 next = _mm512_fmadd_ps(_mm512_set1_ps(dx[0]), v, _mm512_load_ps(acc));
        if (second) {
            v = _mm512_mul_ps(d1, _mm512_cvtepi32_ps(_mm512_load_si512(c + 2 * TILE_BYTES)));
            next = _mm512_fmadd_ps(_mm512_set1_ps(dx[1]), v, next);
        }
        _mm512_store_ps(acc, next);
    }
}

X_INLINE void multiply_flat(const flat_work *w, const flat_job *j, size_t ldq, int g, int u,
                            const int type)
{
    const bool two = j->cu.tiles == 2;
    if (type == KERN_GPTQ4) {
        if (u < 2 || two)
            multiply_128(j->x[u / 2] + 128 * (size_t)g + 64 * (u % 2), ldq,
                         w->plane[4 * (g & 1) + 2 * (u % 2)], u);
    } else if ((u % 2 == 0 || two) && 2 * g + u / 2 < j->blocks) {
        const int slice = 2 * g + u / 2;
        multiply_32(j->x[u % 2] + 32 * (size_t)slice, ldq, w->plane[slice & 7], u);
    }
}

X_INLINE void chunk_flat(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a, int m,
                         const int type)
{
    flat_work w;
    const int slices = a->k / 32, per_group = type == KERN_GPTQ4 ? 1 : 2;
    flat_job j = {.panel = panel, .cu = cut_rows(m), .per_group = per_group};
    int unpacked = 0;
    j.blocks = type == KERN_GPTQ4 ? slices / 4 : slices;
    j.groups = (j.blocks + per_group - 1) / per_group;
    j.x[0] = a->q;
    j.x[1] = a->q + (size_t)tile_start(&j.cu, j.cu.tiles - 1) * a->ldq;
    const uint8_t *p = panel + x_panel_head(j.blocks);
    configure(j.cu.height, type == KERN_GPTQ4 ? 64 : 32);
    for (int r = 0; r < m; r++)
        _mm512_store_ps(w.acc[r], _mm512_setzero_ps());
    for (; unpacked < 4 && unpacked < slices; unpacked++, p += flat_bytes(type))
        unpack_flat(p, w.plane[unpacked & 7], type);
    for (int g = 0; g < j.groups; g++) {
        X_UNROLL
        for (int u = 0; u < UNITS; u++) {
            multiply_flat(&w, &j, a->ldq, g, u, type);
            if ((u % 2 == 0 || type == KERN_GPTQ4) && unpacked < slices) {
                unpack_flat(p, w.plane[unpacked++ & 7], type);
                p += flat_bytes(type);
            }
            const int late = UNITS * g + u - LATE;
            if (late >= 0) finish_flat(&w, a, &j, late / UNITS, late % UNITS, type);
            store_late(&w, &j, g, u, type);
        }
    }
    const bool whole =
        j.blocks == j.groups * per_group; /* else the last group has no second block */
    for (int u = 0; u < 2; u++)
        if (whole) store_late(&w, &j, j.groups, u, type);
    for (int late = UNITS * j.groups < LATE ? 0 : UNITS * j.groups - LATE; late < UNITS * j.groups;
         late++)
        finish_flat(&w, a, &j, late / UNITS, late % UNITS, type);
    for (int r = 0; r < m; r++)
        _mm512_storeu_ps(y + (size_t)r * ldy, _mm512_load_ps(w.acc[r]));
}

/* ---- BF16: tiles straight from the panel
 * --------------------------------------------------------- */

/* At most 64 rows: four C tiles take every 32 weights as the specification orders them. */
static void chunk_bf16(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a, int m)
{
    const cut cu = cut_rows(m);
    const int blocks = (a->k + 31) / 32;
    const size_t ld = a->ldh * 2;
    const uint16_t *x[4];
    _Alignas(64) float c[4][16][16];
    configure(cu.height, 64);
    for (int t = 0; t < 4; t++)
        x[t] = a->h + (size_t)tile_start(&cu, t < cu.tiles ? t : 0) * a->ldh;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int b = 0; b < blocks; b++) {
        const size_t at = 32 * (size_t)b;
        x_ahead_near(panel + TILE_BYTES * (size_t)b, TILE_BYTES);
        _tile_loadd(6, panel + TILE_BYTES * (size_t)b, 64);
        _tile_loadd(4, x[0] + at, ld);
        _tile_dpbf16ps(0, 4, 6);
        if (cu.tiles > 1) {
            _tile_loadd(5, x[1] + at, ld);
            _tile_dpbf16ps(1, 5, 6);
        }
        if (cu.tiles > 2) {
            _tile_loadd(4, x[2] + at, ld);
            _tile_dpbf16ps(2, 4, 6);
        }
        if (cu.tiles > 3) {
            _tile_loadd(5, x[3] + at, ld);
            _tile_dpbf16ps(3, 5, 6);
        }
    }
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[1], 64);
    _tile_stored(2, c[2], 64);
    _tile_stored(3, c[3], 64);
    for (int t = 0; t < cu.tiles; t++)
        for (int i = 0; i < cu.height; i++)
            _mm512_storeu_ps(y + (size_t)(tile_start(&cu, t) + i) * ldy, _mm512_load_ps(c[t][i]));
}

/* ---- the table
 * ----------------------------------------------------------------------------------- */

/* The rows from r on, as rows of their own. */
static kern_rows rows_from(const kern_rows *a, int r)
{
    kern_rows s = *a;
    const size_t n = (size_t)r;
    s.m -= r;
    if (a->act == KERN_ACT_BF16) {
        s.h += n * a->ldh;
    } else {
        s.q += n * a->ldq;
        s.scale += n * a->lds;
        s.sum16 += n * a->ldsum;
        s.sum32 += n * a->ldsum;
    }
    return s;
}

/* clang-format off */
/* Rows from which tiles beat vectors. Taken from a loop over cold panels, one thread, neighbours
 * busy (not from moed-bench): cycles per 256 block at 3 GHz, AVX-512 against AMX:
 *   rows   Q4_K      Q5_K      Q6_K      Q8_0       Q4_0      Q5_0     GPTQ4    BF16
 *      4   490/619   620/697   735/878   745/960    483/551   643/666  446/441  1207/1355
 *      5   605/623   746/718   866/889   878/1014   666/562   785/646  543/435  1964/1380
 *      8   590/652   743/753   842/918   891/1000   642/615   763/688  554/472  1938/1392
 *     16  1122/786  1367/867  1630/979  1322/1102  1114/787            905/526
 */
/* clang-format on */
static int least_rows(const int type)
{
    switch (type) {
    case KERN_Q4_0:
    case KERN_Q5_0:
    case KERN_GPTQ4:
    case KERN_BF16:
        return 5;
    default:
        return 9;
    }
}

X_INLINE void tile_rows(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a,
                        const int type)
{
    const int most = type == KERN_BF16 ? 64 : CHUNK, chunks = (a->m + most - 1) / most;
    for (int i = 0, r = 0; i < chunks; i++) {
        const int m = (a->m - r) / (chunks - i);
        const kern_rows part = rows_from(a, r);
        float *out = y + (size_t)r * ldy;
        if (type == KERN_BF16)
            chunk_bf16(out, ldy, panel, &part, m);
        else if (type == KERN_Q4_K || type == KERN_Q5_K || type == KERN_Q6_K)
            chunk_k(out, ldy, panel, &part, m, type);
        else
            chunk_flat(out, ldy, panel, &part, m, type);
        r += m;
    }
}

static void q4_0_tiles(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    tile_rows(y, ldy, panel, a, KERN_Q4_0);
}

static void q5_0_tiles(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    tile_rows(y, ldy, panel, a, KERN_Q5_0);
}

static void q8_0_tiles(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    tile_rows(y, ldy, panel, a, KERN_Q8_0);
}

static void q4_k_tiles(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    tile_rows(y, ldy, panel, a, KERN_Q4_K);
}

static void q5_k_tiles(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    tile_rows(y, ldy, panel, a, KERN_Q5_K);
}

static void q6_k_tiles(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    tile_rows(y, ldy, panel, a, KERN_Q6_K);
}

static void gptq4_tiles(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    tile_rows(y, ldy, panel, a, KERN_GPTQ4);
}

static void bf16_tiles(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    tile_rows(y, ldy, panel, a, KERN_BF16);
}

static void q4_0(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    (a->m < least_rows(KERN_Q4_0) ? kern_gemm_avx512.q4_0 : q4_0_tiles)(y, ldy, panel, a);
}

static void q5_0(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    (a->m < least_rows(KERN_Q5_0) ? kern_gemm_avx512.q5_0 : q5_0_tiles)(y, ldy, panel, a);
}

static void q8_0(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    (a->m < least_rows(KERN_Q8_0) ? kern_gemm_avx512.q8_0 : q8_0_tiles)(y, ldy, panel, a);
}

static void q4_k(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    (a->m < least_rows(KERN_Q4_K) ? kern_gemm_avx512.q4_k : q4_k_tiles)(y, ldy, panel, a);
}

static void q5_k(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    (a->m < least_rows(KERN_Q5_K) ? kern_gemm_avx512.q5_k : q5_k_tiles)(y, ldy, panel, a);
}

static void q6_k(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    (a->m < least_rows(KERN_Q6_K) ? kern_gemm_avx512.q6_k : q6_k_tiles)(y, ldy, panel, a);
}

static void gptq4(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    (a->m < least_rows(KERN_GPTQ4) ? kern_gemm_avx512.gptq4 : gptq4_tiles)(y, ldy, panel, a);
}

static void bf16(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    (a->m < least_rows(KERN_BF16) ? kern_gemm_avx512.bf16 : bf16_tiles)(y, ldy, panel, a);
}

/* F32 and F16 have no tile form: kern_select takes them from the AVX-512 table. */
const kern_gemm kern_gemm_amx = {
    .name = "amx",
    .q4_0 = q4_0,
    .q5_0 = q5_0,
    .q8_0 = q8_0,
    .q4_k = q4_k,
    .q5_k = q5_k,
    .q6_k = q6_k,
    .gptq4 = gptq4,
    .bf16 = bf16,
};

const kern_gemm kern_gemm_tiles = {
    .name = "tiles",
    .q4_0 = q4_0_tiles,
    .q5_0 = q5_0_tiles,
    .q8_0 = q8_0_tiles,
    .q4_k = q4_k_tiles,
    .q5_k = q5_k_tiles,
    .q6_k = q6_k_tiles,
    .gptq4 = gptq4_tiles,
    .bf16 = bf16_tiles,
};
