/*
 * The device code of the emulated machine: gpu.h's launches in plain C, from the maps of layout.h
 * and the numbers that side.cu and gemm.cuh would leave in the same buffers. What a kernel reads
 * and writes it asks runtime_memory.c for, so that is checked and known; counts and indices come
 * from device memory, so they are checked before they are believed.
 *
 * All forms of the product add in one order, as the real ones do. The kernels' own source is proved
 * by emulated.cu; here they are what compute_cuda.c has to feed.
 */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#include "kernels/cuda/gpu.h"
#include "kernels/cuda/pack.h"
#include "tests/gpu/runtime_ops.h"
#include "tests/unit/small_floats.h"

enum { COLS = 8, MOST_COUNT = 1 << 20 };

static void *room(size_t bytes)
{
    void *p = calloc(1, bytes + 1);
    if (p == NULL) abort();
    return p;
}

/* A count that was read on the device; 0 after a report. */
static int count_at(const int32_t *p, const char *what)
{
    int32_t n;
    memcpy(&n, emu_read(p, sizeof n), sizeof n);
    if (n >= 0 && n <= MOST_COUNT) return n;
    emu_report("%d %s", n, what);
    return 0;
}

/* ---- rows ---- */

typedef struct rows_args {
    int act;
    const uint8_t *src;
    gpu_rows to;
    const int32_t *n;
    int k, is_bf16, form;
} rows_args;

static void row_values(int act, const uint8_t *row, int k, float *x)
{
    const int block = kern_act_block((kern_act)act);
    for (int i = 0; i < k; i++)
        if (act == KERN_ACT_F32) {
            memcpy(&x[i], row + 4 * i, 4);
        } else if (act == KERN_ACT_BF16) {
            x[i] = bf16_float(gpu_tile_u16(row + 2 * i));
        } else {
            float scale;
            memcpy(&scale, row + k + 4 * (i / block), 4);
            x[i] = (float)(int8_t)row[i] * scale;
        }
}

/* The values of all halves: looked up, as there are many. */
static const float *halves(void)
{
    static float all[65536];
    if (all[0x3c00] != 1.0f)
        for (int i = 0; i < 65536; i++)
            all[i] = half_float((uint32_t)i);
    return all;
}

/* Rounded to even. */
static uint16_t half_bits(float v)
{
    uint32_t u, sign;
    memcpy(&u, &v, 4);
    sign = u >> 16 & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return 0x7fff;
    if (u < 113u << 23) return (uint16_t)(sign | (uint32_t)nearbyintf(fabsf(v) * 0x1p24f));
    u = (u + 0xfffu + (u >> 13 & 1u) - (112u << 23)) >> 13;
    return (uint16_t)(sign | (u < 0x7c00u ? u : 0x7c00u));
}

static uint16_t bf16_bits(float v)
{
    uint32_t u;
    memcpy(&u, &v, 4);
    if (isnan(v)) return 0x7fff;
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

/* One row as rows_kernel makes it; `sum` is NULL for bfloat16. */
static float make_row(const float *x, int k, int padded, bool natural, uint16_t *value,
                      uint16_t *sum)
{
    const float *of_half = halves();
    float most = 0.0f, down = 1.0f, up = 1.0f;
    for (int i = 0; i < k && sum != NULL; i++)
        most = fmaxf(most, fabsf(x[i]));
    if (most > 0.0f && most < INFINITY) {
        int e;
        frexpf(most, &e);
        if (e < -100) e = -100;
        down = ldexpf(1.0f, 14 - e);
        up = ldexpf(1.0f, e - 14);
    }
    for (int j = 0; j < padded / 32; j++) {
        float total = 0.0f;
        for (int i = 32 * j; i < 32 * j + 32; i++) {
            float v = i < k ? x[i] * down : 0.0f;
            uint16_t bits = sum != NULL ? half_bits(v) : bf16_bits(v);
            value[natural ? i : gpu_act_at(i)] = bits;
            total += of_half[bits];
        }
        if (sum == NULL) continue;
        float whole = rounded(total / 32, 11);
        sum[gpu_sum_at(j, 0)] = half_bits(whole);
        sum[gpu_sum_at(j, 1)] = half_bits(total / 32 - whole);
    }
    return up;
}

static void run_rows(const void *p)
{
    const rows_args *a = p;
    const int n = count_at(a->n, "rows");
    const size_t k_tiles = ((size_t)a->k + GPU_TILE_K - 1) / GPU_TILE_K, rows = (size_t)n;
    const size_t padded = k_tiles * GPU_TILE_K, sums = padded / 16;
    const size_t bytes = kern_act_row_bytes((kern_act)a->act, a->k);
    if (n == 0) return;
    const uint8_t *src = emu_read(a->src, rows * bytes);
    uint16_t *value = emu_write(a->to.value, rows * padded * 2), *sum = NULL;
    float *scale = emu_write(a->to.scale, rows * sizeof(float)), *x = room(padded * sizeof(float));
    if (!a->is_bf16) sum = emu_write(a->to.sum, rows * sums * 2);
    for (size_t r = 0; r < rows; r++) {
        row_values(a->act, src + r * bytes, a->k, x);
        scale[r] = make_row(x, a->k, (int)padded, a->form == GPU_FORM_WGMMA, value + r * padded,
                            sum != NULL ? sum + r * sums : NULL);
    }
    free(x);
}

int gpu_launch_rows(int act, const void *src, gpu_rows to, const int32_t *n, int most, int k,
                    int is_bf16, int form, int chained, gpu_stream stream)
{
    rows_args a = {act, src, to, n, k, is_bf16, form};
    (void)most; /* a loop of the grid */
    return emu_launch("rows kernel", run_rows, &a, sizeof a, chained, stream);
}

/* ---- the list ---- */

typedef struct list_args {
    const int32_t *offset;
    int n_experts, width;
    gpu_entry *list;
    int32_t *n_entries;
} list_args;

static void run_list(const void *p)
{
    const list_args *a = p;
    const int32_t *offset = emu_read(a->offset, ((size_t)a->n_experts + 1) * sizeof *offset);
    int n = 0;
    for (int e = 0; e < a->n_experts; e++) {
        if (offset[e] < 0 || offset[e] > offset[e + 1] || offset[e + 1] > MOST_COUNT) {
            emu_report("offsets %d, %d of expert %d", offset[e], offset[e + 1], e);
            return;
        }
        n += gpu_entries_of(offset[e + 1] - offset[e], a->width);
    }
    gpu_entries_build(emu_write(a->list, (size_t)n * sizeof *a->list), offset, a->n_experts,
                      a->width);
    int32_t got = n;
    memcpy(emu_write(a->n_entries, sizeof got), &got, sizeof got);
}

int gpu_launch_list(const int32_t *offset, int n_experts, int width, gpu_entry *list,
                    int32_t *n_entries, gpu_stream stream)
{
    list_args a = {offset, n_experts, width, list, n_entries};
    emu_launch("list kernel", run_list, &a, sizeof a, 0, stream);
    return cudaGetLastError(); /* as <<<>>> tells it: also of what failed before */
}

/* ---- what was worked out before ---- */

/* Packing and decoding take longer than products, and lives of tests meet the same weights again:
 * both are kept, by a hash of what they are made from. */
typedef struct kept {
    uint64_t hash;
    void *made;
} kept;

enum { KEPT = 128 };

static kept *find_kept(kept *all, int *next, uint64_t hash, size_t bytes)
{
    for (int i = 0; i < KEPT; i++)
        if (all[i].made != NULL && all[i].hash == hash) return &all[i];
    kept *k = &all[(*next)++ % KEPT];
    free(k->made);
    k->hash = 0; /* not made yet */
    k->made = room(bytes);
    return k;
}

/* ---- packing ---- */

typedef struct pack_args {
    gpu_matrix m;
    const void *a, *b;
    void *dst;
} pack_args;

static void run_pack(const void *p)
{
    static kept all[KEPT];
    static int next;
    const pack_args *a = p;
    const size_t bytes = (size_t)a->m.n * a->m.row_bytes;
    const void *first = emu_read(a->a, bytes);
    const void *second = a->m.interleaved ? emu_read(a->b, bytes) : NULL;
    uint64_t hash = XXH3_64bits_withSeed(&a->m, sizeof a->m, XXH3_64bits(first, bytes));
    if (second != NULL) hash = XXH3_64bits_withSeed(second, bytes, hash);
    kept *k = find_kept(all, &next, hash, a->m.bytes);
    if (k->hash != hash) gpu_pack(&a->m, first, second, k->made);
    k->hash = hash;
    memcpy(emu_write(a->dst, a->m.bytes), k->made, a->m.bytes);
}

int gpu_launch_pack(const gpu_matrix *m, const void *a, const void *b, void *dst, gpu_stream stream)
{
    pack_args args = {*m, a, b, dst};
    emu_launch("pack kernel", run_pack, &args, sizeof args, 0, stream);
    return cudaGetLastError();
}

/* ---- decoded weights ---- */

/* One row of one tile: codes, scales of groups, and what the tile's end needs. */
typedef struct tile_row {
    float w[GPU_TILE_K], scale[16], least[8], d, dmin;
} tile_row;

static int group_of(int type)
{
    return type == KERN_Q4_K || type == KERN_Q8_0 ? 32
           : type == KERN_Q6_K                    ? 16
           : type == KERN_GPTQ4                   ? 128
                                                  : GPU_TILE_K;
}

static void decode_row(int type, const uint8_t *tile, int row, tile_row *to)
{
    const uint8_t *head = tile + 16 * row;
    const int zero = type == KERN_Q6_K ? 32 : type == KERN_Q8_0 ? 128 : type == KERN_GPTQ4 ? 8 : 0;
    to->d = 1.0f;
    for (int i = 0; i < GPU_TILE_K; i++) {
        uint32_t code = gpu_tile_code(type, tile, row, i);
        to->w[i] = type == KERN_F16    ? half_float(code)
                   : type == KERN_BF16 ? bf16_float(code)
                                       : (float)((int)code - zero);
    }
    for (int j = 0; j < 16; j++)
        to->scale[j] = 1.0f;
    if (type == KERN_Q4_K) {
        uint32_t sc[2], mn[2];
        gpu_q4k_scales(gpu_tile_u32(head + 4), gpu_tile_u32(head + 8), gpu_tile_u32(head + 12), sc,
                       mn);
        for (int j = 0; j < 8; j++) {
            to->scale[j] = (float)(sc[j / 4] >> 8 * (j % 4) & 255);
            to->least[j] = (float)(mn[j / 4] >> 8 * (j % 4) & 255);
        }
        to->d = half_float(gpu_tile_u16(head));
        to->dmin = 32 * half_float(gpu_tile_u16(head + 2));
    }
    for (int j = 0; j < 16 && type == KERN_Q6_K; j++)
        to->scale[j] = (float)(int8_t)head[j];
    if (type == KERN_Q6_K) to->d = half_float(gpu_tile_u16(tile + 256 + 2 * row));
    for (int j = 0; j < 8 && type == KERN_Q8_0; j++)
        to->scale[j] = half_float(gpu_tile_u16(head + 2 * j));
    for (int j = 0; j < 2 && type == KERN_GPTQ4; j++)
        to->scale[j] = half_float(gpu_tile_u16(tile + 4 * row + 2 * j));
}

/* [row_tiles, 16, k_tiles] */
static const tile_row *decoded(const gpu_matrix *m, const uint8_t *w, size_t bytes)
{
    static kept all[KEPT];
    static int next;
    const uint64_t hash = XXH3_64bits_withSeed(w, bytes, (uint64_t)(m->type * 31 + m->k_tiles));
    const size_t rows = (size_t)m->row_tiles * GPU_TILE_ROWS;
    kept *k = find_kept(all, &next, hash, rows * (size_t)m->k_tiles * sizeof(tile_row));
    tile_row *to = k->made;
    if (k->hash == hash) return to;
    for (int t = 0; t < m->row_tiles; t++)
        for (int r = 0; r < GPU_TILE_ROWS; r++)
            for (int kt = 0; kt < m->k_tiles; kt++)
                decode_row(m->type, w + (size_t)(t * m->k_tiles + kt) * (size_t)m->tile_bytes, r,
                           &to[(t * GPU_TILE_ROWS + r) * m->k_tiles + kt]);
    k->hash = hash;
    return to;
}

/* ---- the product ---- */

/* Up to eight activation rows side by side. */
typedef struct columns {
    float (*x)[COLS];   /* [k_tiles * 256] */
    float (*sum)[COLS]; /* [k_tiles * 16], gpu_sum_at */
} columns;

static void add_tile(const gpu_matrix *m, const tile_row *t, const columns *c, int kt, float *acc)
{
    const int group = group_of(m->type), left = m->k - kt * GPU_TILE_K;
    const int most = left < GPU_TILE_K ? left : GPU_TILE_K;
    float block[COLS] = {0}, mins[2][COLS] = {{0}};
    for (int j = 0; j * group < most; j++) { /* what lies past k adds zeros */
        const int end = (j + 1) * group < most ? (j + 1) * group : most;
        const float(*x)[COLS] = (const float(*)[COLS])c->x + kt * GPU_TILE_K;
        float part[COLS] = {0};
        for (int i = j * group; i < end; i++)
            for (int n = 0; n < COLS; n++)
                part[n] += t->w[i] * x[i][n];
        for (int n = 0; n < COLS; n++)
            block[n] += t->scale[j] * part[n];
        for (int rest = 0; rest < 2 && m->type == KERN_Q4_K; rest++)
            for (int n = 0; n < COLS; n++)
                mins[rest][n] += t->least[j] * c->sum[gpu_sum_at(8 * kt + j, rest)][n];
    }
    for (int n = 0; n < COLS; n++)
        acc[n] += t->d * block[n] - t->dmin * (mins[0][n] + mins[1][n]);
}

/* Tiles in segments, segments, as layout.h says. */
static void product(const gpu_matrix *m, const tile_row *row, const columns *c, float *total)
{
    const int each = gpu_segment_tiles(m->k_tiles);
    memset(total, 0, COLS * sizeof *total);
    for (int from = 0; from < m->k_tiles; from += each) {
        float acc[COLS] = {0};
        for (int kt = from; kt < from + each && kt < m->k_tiles; kt++)
            add_tile(m, row + kt, c, kt, acc);
        for (int n = 0; n < COLS; n++)
            total[n] += acc[n];
    }
}

typedef struct gemm_args {
    gpu_gemm g;
    int form;
} gemm_args;

/* What a launch reads, as the operation sees it. */
typedef struct operands {
    const gpu_entry *list;
    int n_entries, first, pairs; /* pairs first .. first + pairs - 1 */
    const int32_t *row, *place;  /* of the first pair; NULL: its own number */
    int row_from, place_from;
    const uint16_t *value, *sum; /* of row row_from */
    const float *scale;
    float *out; /* of place place_from */
} operands;

static bool bounds(const int32_t *at, int n, int *from, int *to)
{
    *from = *to = at[0];
    for (int i = 0; i < n; i++) {
        if (at[i] < *from) *from = at[i];
        if (at[i] > *to) *to = at[i];
    }
    if (*from >= 0 && *to < MOST_COUNT) return true;
    emu_report("rows or places from %d to %d", *from, *to);
    return false;
}

static bool find_pairs(const gpu_gemm *g, int form, operands *o)
{
    o->n_entries = count_at(g->n_entries, "entries");
    if (o->n_entries == 0) return false;
    o->list = emu_read(g->list, (size_t)o->n_entries * sizeof *o->list);
    int first = MOST_COUNT, end = 0;
    for (int i = 0; i < o->n_entries; i++) {
        const gpu_entry e = o->list[i];
        if (e.expert < 0 || e.expert > 4096 || e.first < 0 || e.first > MOST_COUNT || e.cols < 1 ||
            e.cols > gpu_form_width(form)) {
            emu_report("entry %d: expert %d, %d pairs from %d", i, e.expert, e.cols, e.first);
            return false;
        }
        if (e.first < first) first = e.first;
        if (e.first + e.cols > end) end = e.first + e.cols;
    }
    o->first = first;
    o->pairs = end - first;
    return true;
}

static bool find_operands(const gpu_gemm *g, int form, operands *o)
{
    const size_t padded = (size_t)g->m.k_tiles * GPU_TILE_K;
    if (!find_pairs(g, form, o)) return false;
    const size_t words = (size_t)o->pairs * sizeof(int32_t);
    int rows[2] = {o->first, o->first + o->pairs - 1}, places[2] = {rows[0], rows[1]};
    o->row = g->pair_row != NULL ? emu_read(g->pair_row + o->first, words) : NULL;
    o->place = g->pair_out != NULL ? emu_read(g->pair_out + o->first, words) : NULL;
    if (o->row != NULL && !bounds(o->row, o->pairs, &rows[0], &rows[1])) return false;
    if (o->place != NULL && !bounds(o->place, o->pairs, &places[0], &places[1])) return false;
    const size_t n = (size_t)(rows[1] - rows[0] + 1), from = (size_t)rows[0];
    o->row_from = rows[0];
    o->place_from = places[0];
    o->value = emu_read(g->x.value + from * padded, n * padded * 2);
    o->scale = emu_read(g->x.scale + from, n * sizeof(float));
    o->sum = NULL;
    if (g->m.type == KERN_Q4_K)
        o->sum = emu_read(g->x.sum + from * (padded / 16), n * (padded / 16) * 2);
    o->out = emu_write(g->out + (size_t)places[0] * (size_t)g->ld,
                       (size_t)(places[1] - places[0] + 1) * (size_t)g->ld * sizeof(float));
    return true;
}

static int row_of(const operands *o, int pair)
{
    return (o->row != NULL ? o->row[pair - o->first] : pair) - o->row_from;
}

static void gather(const gpu_gemm *g, const operands *o, int form, int first, int n, columns *c)
{
    const float *of_half = halves();
    const int padded = g->m.k_tiles * GPU_TILE_K;
    for (int col = 0; col < COLS; col++) {
        const size_t row = (size_t)row_of(o, first + (col < n ? col : n - 1));
        const uint16_t *value = o->value + row * (size_t)padded;
        const uint16_t *sum = o->sum + (o->sum != NULL ? row * (size_t)(padded / 16) : 0);
        for (int i = 0; i < g->m.k; i++) {
            uint16_t bits = value[form == GPU_FORM_WGMMA ? i : gpu_act_at(i)];
            c->x[i][col] = g->m.type == KERN_BF16 ? bf16_float(bits) : of_half[bits];
        }
        for (int i = 0; i < padded / 16 && o->sum != NULL; i++)
            c->sum[i][col] = of_half[sum[i]];
    }
}

static void run_columns(const gpu_gemm *g, const operands *o, const tile_row *w, int first, int n,
                        const columns *c)
{
    const gpu_matrix *m = &g->m;
    const int per_tile = m->interleaved ? 8 : 16;
    for (int i = 0; i < m->n; i++) {
        const tile_row *row =
            w + (size_t)(i / per_tile * GPU_TILE_ROWS + i % per_tile) * (size_t)m->k_tiles;
        float a[COLS], b[COLS];
        product(m, row, c, a);
        if (m->interleaved) product(m, row + 8 * m->k_tiles, c, b);
        for (int col = 0; col < n; col++) {
            const int pair = first + col;
            const float scale = o->scale[row_of(o, pair)];
            float v = a[col] * scale;
            if (m->interleaved) v = v / (1.0f + expf(-v)) * (b[col] * scale);
            int to = (o->place != NULL ? o->place[pair - o->first] : pair) - o->place_from;
            o->out[(size_t)to * (size_t)g->ld + (size_t)i] = v;
        }
    }
}

static void run_gemm(const void *p)
{
    const gemm_args *a = p;
    const gpu_gemm *g = &a->g;
    const gpu_matrix *m = &g->m;
    const size_t padded = (size_t)m->k_tiles * GPU_TILE_K;
    const size_t role = (size_t)m->row_tiles * (size_t)m->k_tiles * (size_t)m->tile_bytes;
    operands o;
    if (!find_operands(g, a->form, &o)) return;
    columns c = {room(padded * sizeof *c.x), room(padded / 16 * sizeof *c.sum)};
    const tile_row *w = NULL;
    int expert = -1;
    for (int i = 0; i < o.n_entries; i++) {
        const gpu_entry e = o.list[i];
        if (e.expert != expert)
            w = decoded(m, emu_read(g->w + (size_t)e.expert * m->bytes, role), role);
        expert = e.expert;
        for (int col = 0; col < e.cols; col += COLS) {
            const int n = e.cols - col < COLS ? e.cols - col : COLS;
            gather(g, &o, a->form, e.first + col, n, &c);
            run_columns(g, &o, w, e.first + col, n, &c);
        }
    }
    free(c.x);
    free(c.sum);
}

/* The question of form.c, without its work. */
static void run_answer(const void *p)
{
    const gemm_args *a = p;
    const bool wgmma = a->form == GPU_FORM_WGMMA;
    const bool other = emu_options.answer == EMULATED_DIFFERENT && a->g.m.type == KERN_Q6_K;
    operands o;
    if (!find_operands(&a->g, a->form, &o)) return;
    if (wgmma && emu_options.answer == EMULATED_MISSING) return;
    for (int i = 0; i < o.pairs * a->g.ld; i++)
        o.out[i] = wgmma && other && i == 77 ? 1.5f : 2.5f;
}

int gpu_launch_gemm(const gpu_gemm *g, int form, int n_blocks, int chained, gpu_stream stream)
{
    static const char *const names[GPU_FORMS] = {"split product", "wide product", "wgmma product"};
    const bool question = g->m.row_bytes == 0 && emu_options.answer != EMULATED_COMPUTED;
    const bool endless = question && emu_options.answer == EMULATED_ENDLESS;
    gemm_args a = {*g, form};
    gpu_gemm plan = {.m = g->m};
    gpu_gemm_plan(&plan, form, emu_options.smem_limit);
    if (n_blocks < 1 || memcmp(&plan.cut, &g->cut, sizeof plan.cut) != 0 ||
        plan.slots != g->slots || gpu_gemm_smem(g, form) > (size_t)emu_options.smem_limit ||
        (form == GPU_FORM_WGMMA && emu_options.major != 9)) {
        emu_report("%s: a launch that no device takes", names[form]);
        return cudaErrorInvalidValue;
    }
    void (*run)(const void *) = question ? run_answer : run_gemm;
    return emu_launch(names[form], endless ? NULL : run, &a, sizeof a, chained, stream);
}

/* ---- what else gpu.h offers ---- */

int gpu_gemm_prepare(int smem_limit)
{
    int e = emu_begin("cudaFuncSetAttribute", EMU_NOT_CAPTURED);
    if (e == cudaSuccess && smem_limit != emu_options.smem_limit)
        emu_report("%d bytes of shared memory", smem_limit);
    return emu_end(e);
}

int gpu_compiled_for(void)
{
    int e = emu_begin("cudaFuncGetAttributes", EMU_ANY);
    return emu_end(e) == cudaSuccess ? 10 * emu_options.major + emu_options.minor : 0;
}

int gpu_gemm_occupancy(const gpu_gemm *g, int form)
{
    int e = emu_begin("cudaOccupancyMaxActiveBlocksPerMultiprocessor", EMU_ANY);
    if (emu_end(e) != cudaSuccess || gpu_gemm_smem(g, form) > (size_t)emu_options.smem_limit)
        return 0;
    return form == GPU_FORM_SPLIT ? 2 : 1;
}
