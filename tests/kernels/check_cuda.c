/*
 * check_cuda [quick]: the CUDA device against the specification. Every weight type and pair of
 * types, ragged shapes, counts that fill, miss and exceed every tile; the forms of the product
 * kernels one by one in check_cuda_forms.c:
 *   - packed on the device = packed on the CPU, by checksum of the bytes;
 *   - mean relative error against float64 of the same quantised weights and rows, 1e-3 (2e-3 for
 * bf16), and against the CPU device within the CPU's own bound;
 *   - a row's bits do not depend on the batch: m = 1, 4, 16, 17, 25, 64, 257 for one expert, nor on
 * another pass under way.
 * Skipped aloud (77) without a device. The seed is fixed and printed.
 */
#include "check_cuda.h"
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/base.h"
#include "kernels/cuda/pack.h"
#include "kernels/kernels.h"

void check_fail(const char *fmt, ...)
{
    va_list args;
    if (check_failures++ >= 20) return;
    va_start(args, fmt);
    printf("FAILED: ");
    vprintf(fmt, args);
    printf("\n");
    va_end(args);
}

void check_cuda_call(int e, const char *what)
{
    if (e == cudaSuccess) return;
    printf("FAILED: %s: %s (%d)\n", what, cudaGetErrorString((cudaError_t)e), e);
    exit(1);
}

/* ---- a layer on both devices ---- */

typedef struct layer {
    compute_shape shape;
    compute_stack *gpu, *cpu;
    uint8_t **file[3]; /* [gate, up, down][expert] */
} layer;

static compute *gpu, *cpu;

static ep_status layer_open(layer *l, int gate_type, int down_type, int hidden, int inter,
                            int experts)
{
    l->shape = (compute_shape){gate_type, gate_type, down_type, hidden, inter, experts, false};
    ep_err err = {{0}};
    ep_status s = compute_cuda.stack_open(gpu, &l->shape, &l->gpu, &err);
    if (s == EP_OK) s = compute_cpu.stack_open(cpu, &l->shape, &l->cpu, &err);
    if (s != EP_OK) {
        check_fail("stack: %s", err.text);
        return s;
    }
    gpu_matrix m[2] = {
        gpu_matrix_make(gate_type, inter, hidden, 1, kern_type_row_bytes(gate_type, hidden)),
        gpu_matrix_make(down_type, hidden, inter, 0, kern_type_row_bytes(down_type, inter))};
    uint8_t *packed = ep_alloc(m[0].bytes + m[1].bytes);
    for (int r = 0; r < 3; r++) {
        int type = r < 2 ? gate_type : down_type, n = r < 2 ? inter : hidden,
            k = r < 2 ? hidden : inter;
        l->file[r] = ep_calloc((size_t)experts, sizeof(uint8_t *));
        for (int e = 0; e < experts; e++) {
            l->file[r][e] = ep_alloc((size_t)n * kern_type_row_bytes(type, k));
            check_file_rows(type, MODE_RANDOM, n, k, l->file[r][e]);
        }
    }
    for (int e = 0; e < experts; e++) {
        uint64_t sum = 0, other = 0;
        s = compute_cuda.stack_load(l->gpu, e, l->file[0][e], l->file[1][e], l->file[2][e], &sum);
        if (s != EP_OK) check_fail("load: %s", ep_status_name(s));
        compute_cpu.stack_load(l->cpu, e, l->file[0][e], l->file[1][e], l->file[2][e], &other);
        gpu_pack(&m[0], l->file[0][e], l->file[1][e], packed);
        gpu_pack(&m[1], l->file[2][e], NULL, packed + m[0].bytes);
        if (sum != gpu_checksum(packed, m[0].bytes, packed + m[0].bytes, m[1].bytes))
            check_fail("expert %d: the device packs other bytes", e);
        if (sum != compute_cuda.stack_checksum(l->gpu, e))
            check_fail("expert %d: checksum changes", e);
    }
    ep_free(packed);
    return EP_OK;
}

static void layer_close(layer *l)
{
    compute_cuda.stack_close(l->gpu);
    compute_cpu.stack_close(l->cpu);
    for (int r = 0; r < 3; r++) {
        for (int e = 0; e < l->shape.n_experts; e++)
            ep_free(l->file[r][e]);
        ep_free(l->file[r]);
    }
}

typedef struct pass {
    compute_ffn_args a;
    int32_t *offset, *row, *out_row;
    float *x; /* the rows in float */
} pass;

static pass pass_make(const layer *l, const int *counts, kern_act act)
{
    pass p = {0};
    int n = l->shape.n_experts, hidden = l->shape.hidden;
    p.offset = ep_calloc((size_t)n + 1, 4);
    for (int e = 0; e < n; e++)
        p.offset[e + 1] = p.offset[e] + counts[e];
    int pairs = p.offset[n], rows = pairs / 2 + 1;
    p.row = ep_calloc((size_t)pairs + 1, 4);
    p.out_row = ep_calloc((size_t)pairs + 1, 4);
    for (int i = 0; i < pairs; i++) {
        p.row[i] = check_below(rows);
        p.out_row[i] = pairs - 1 - i;
    }
    p.x = ep_alloc((size_t)rows * (size_t)hidden * sizeof(float));
    for (size_t i = 0; i < (size_t)rows * (size_t)hidden; i++)
        p.x[i] = check_normal();
    size_t bytes = kern_act_row_bytes(act, hidden);
    uint8_t *wire = ep_calloc((size_t)rows, bytes);
    if (act == KERN_ACT_F32)
        memcpy(wire, p.x, (size_t)rows * bytes);
    else
        kern_act_rows(act, wire, p.x, (size_t)hidden, rows, hidden);
    for (int r = 0; r < rows; r++) /* what the wire form says, in float */
        for (int i = 0; i < hidden; i++) {
            const uint8_t *from = wire + (size_t)r * bytes;
            float *to = &p.x[(size_t)r * (size_t)hidden + (size_t)i], scale;
            if (act == KERN_ACT_BF16) {
                uint32_t bits = (uint32_t)(from[2 * i] | from[2 * i + 1] << 8) << 16;
                memcpy(to, &bits, 4);
            } else if (act != KERN_ACT_F32) {
                memcpy(&scale, from + hidden + 4 * (i / kern_act_block(act)), 4);
                *to = (float)(int8_t)from[i] * scale;
            }
        }
    p.a = (compute_ffn_args){.rows = wire,
                             .act = act,
                             .n_rows = rows,
                             .n_pairs = pairs,
                             .expert_offset = p.offset,
                             .pair_row = p.row,
                             .pair_out = p.out_row};
    p.a.out = ep_calloc((size_t)pairs * (size_t)hidden + 1, sizeof(float));
    return p;
}

static void pass_free(pass *p)
{
    ep_free((void *)(uintptr_t)p->a.rows);
    ep_free(p->a.out);
    ep_free(p->offset);
    ep_free(p->row);
    ep_free(p->out_row);
    ep_free(p->x);
}

static double dot(int type, const uint8_t *rows, int row, const double *x, int k, float *w)
{
    double sum = 0;
    kern_dequant_row(type, rows + (size_t)row * kern_type_row_bytes(type, k), w, k);
    for (int i = 0; i < k; i++)
        sum += (double)w[i] * x[i];
    return sum;
}

/* One pair in float64. */
static void exact(const layer *l, int e, const float *row, double *y)
{
    int hidden = l->shape.hidden, inter = l->shape.inter;
    double *x = ep_alloc((size_t)hidden * 8), *h = ep_alloc((size_t)inter * 8);
    float *w = ep_alloc((size_t)(hidden > inter ? hidden : inter) * 4);
    for (int i = 0; i < hidden; i++)
        x[i] = row[i];
    for (int i = 0; i < inter; i++) {
        double g = dot(l->shape.gate_type, l->file[0][e], i, x, hidden, w);
        h[i] = g / (1 + exp(-g)) * dot(l->shape.up_type, l->file[1][e], i, x, hidden, w);
    }
    for (int i = 0; i < hidden; i++)
        y[i] = dot(l->shape.down_type, l->file[2][e], i, h, inter, w);
    ep_free(x);
    ep_free(h);
    ep_free(w);
}

static void check_pass(const layer *l, const int *counts, kern_act act, const char *what)
{
    pass p = pass_make(l, counts, act);
    size_t hidden = (size_t)l->shape.hidden, all = (size_t)p.a.n_pairs * hidden;
    float *by_cpu = ep_calloc(all + 1, 4);
    double *want = ep_alloc(hidden * 8), error = 0, size = 0, apart = 0;
    ep_status s = compute_ffn(&compute_cuda, gpu, l->gpu, &p.a);
    if (s != EP_OK) check_fail("%s: %s", what, ep_status_name(s));
    compute_ffn_args a = p.a;
    a.out = by_cpu;
    s = compute_ffn(&compute_cpu, cpu, l->cpu, &a);
    if (s != EP_OK) check_fail("%s: cpu: %s", what, ep_status_name(s));
    int most = check_quick || l->shape.hidden * l->shape.inter > 500000 ? 4 : 32;
    int step = p.a.n_pairs / most + 1;
    for (int e = 0; e < l->shape.n_experts; e++)
        for (int i = p.offset[e]; i < p.offset[e + 1]; i += step) {
            exact(l, e, p.x + (size_t)p.row[i] * hidden, want);
            for (size_t j = 0; j < hidden; j++) {
                size_t at = (size_t)p.out_row[i] * hidden + j;
                error += fabs(p.a.out[at] - want[j]);
                apart += fabs((double)p.a.out[at] - by_cpu[at]);
                size += fabs(want[j]);
            }
        }
    bool bf16 = l->shape.gate_type == KERN_BF16 || l->shape.down_type == KERN_BF16;
    /* rows of floats lose more than the form that comes with bf16 weights */
    double bound = !bf16 ? 1e-3 : act == KERN_ACT_F32 ? 4e-3 : 2e-3;
    if (p.a.n_pairs < 16) bound *= 3; /* the mean of few has more luck in it */
    printf("%-28s %5d pairs: mean relative error %.2e, from the CPU %.2e\n", what, p.a.n_pairs,
           error / size, apart / size);
    if (!(error <= bound * size)) check_fail("%s: error %.2e", what, error / size);
    if (!(apart <= 6e-2 * size)) check_fail("%s: %.2e from the CPU", what, apart / size);
    ep_free(by_cpu);
    ep_free(want);
    pass_free(&p);
}

/* The first m rows of expert 1 alone, for every m, and together with others. */
static void check_bits(const layer *l)
{
    enum { MOST = 257 };
    static const int sizes[] = {1, 4, 16, 17, 25, 64, 257};
    int counts[8] = {3, MOST, 40}, n = l->shape.n_experts;
    size_t hidden = (size_t)l->shape.hidden;
    pass p = pass_make(l, counts, KERN_ACT_F32);
    int first = counts[0];
    if (compute_ffn(&compute_cuda, gpu, l->gpu, &p.a) != EP_OK) check_fail("bits: a pass");
    int32_t *offset = ep_calloc((size_t)n + 1, 4), out_row[MOST];
    float *out = ep_alloc(MOST * hidden * 4);
    for (int i = 0; i < MOST; i++)
        out_row[i] = i;
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        int m = sizes[s];
        for (int e = 0; e <= n; e++)
            offset[e] = e < 2 ? 0 : m;
        compute_ffn_args a = p.a;
        a.n_pairs = m;
        a.expert_offset = offset;
        a.pair_row = p.row + first;
        a.pair_out = out_row;
        a.out = out;
        if (compute_ffn(&compute_cuda, gpu, l->gpu, &a) != EP_OK)
            check_fail("bits: a pass of %d", m);
        for (int i = 0; i < m; i++)
            if (memcmp(out + (size_t)i * hidden, p.a.out + (size_t)p.out_row[first + i] * hidden,
                       hidden * 4) != 0) {
                check_fail("%s: row %d of %d has other bits than alone among %d",
                           kern_type_name(l->shape.gate_type), i, m, MOST);
                break;
            }
    }
    ep_free(offset);
    ep_free(out);
    pass_free(&p);
}

/* Passes of every size one after the other, two under way at a time, from and to pinned memory:
 * the bits of passes that were alone. */
static void check_under_way(const layer *l)
{
    enum { N = 8 };
    static const int counts[N][8] = {{1},  {0, 300, 200}, {90, 80, 70, 60, 50},     {2, 1},
                                     {17}, {400, 400},    {1, 1, 1, 1, 1, 1, 1, 1}, {0, 5}};
    size_t hidden = (size_t)l->shape.hidden, each = (size_t)1024 * hidden * 4;
    pass p[N];
    float *want[N];
    uint8_t *memory = ep_map(2 * N * each); /* rows and results of each */
    if (compute_cuda.pin(gpu, memory, 2 * N * each) != EP_OK) check_fail("pin");
    for (int i = 0; i < N; i++) {
        p[i] = pass_make(l, counts[i], i % 3 == 0 ? KERN_ACT_F32 : compute_cuda.stack_act(l->gpu));
        want[i] = p[i].a.out;
        if (compute_ffn(&compute_cuda, gpu, l->gpu, &p[i].a) != EP_OK) check_fail("a pass alone");
    }
    for (int i = 0; i < N; i++) {
        compute_ffn_args a = p[i].a;
        uint8_t *rows = memory + 2 * (size_t)i * each;
        memcpy(rows, a.rows, (size_t)a.n_rows * kern_act_row_bytes(a.act, l->shape.hidden));
        a.rows = rows;
        a.out = (float *)(void *)(rows + each);
        if (i >= COMPUTE_DEPTH && compute_cuda.ffn_end(gpu) != EP_OK) check_fail("end of a pass");
        if (compute_cuda.ffn_begin(gpu, l->gpu, &a) != EP_OK) check_fail("begin of a pass");
    }
    for (int i = 0; i < COMPUTE_DEPTH; i++)
        if (compute_cuda.ffn_end(gpu) != EP_OK) check_fail("end of a pass");
    for (int i = 0; i < N; i++)
        if (memcmp(memory + (2 * (size_t)i + 1) * each, want[i],
                   (size_t)p[i].a.n_pairs * hidden * 4) != 0)
            check_fail("pass %d has other bits while others are under way", i);
    compute_cuda.unpin(gpu, memory);
    ep_unmap(memory, 2 * N * each);
    for (int i = 0; i < N; i++)
        pass_free(&p[i]);
}

static void check_layer(int gate_type, int down_type, int hidden, int inter)
{
    static const int counts[][8] = {{1},
                                    {0, 1, 2},
                                    {8, 9, 7},
                                    {16, 17, 15},
                                    {63, 0, 64, 65, 127, 128, 129},
                                    {0, 0, 0, 0, 0, 0, 0, 1000}};
    layer l = {0};
    char what[64];
    if (layer_open(&l, gate_type, down_type, hidden, inter, 8) != EP_OK) return;
    if (compute_cuda.reserve(gpu, 1024, 2048) != EP_OK ||
        compute_cpu.reserve(cpu, 1024, 2048) != EP_OK)
        check_fail("reserve");
    snprintf(what, sizeof what, "%s/%s %dx%d", kern_type_name(gate_type), kern_type_name(down_type),
             hidden, inter);
    int n = check_quick ? 4 : 6;
    for (int i = 0; i < n; i++) {
        check_pass(&l, counts[i], KERN_ACT_F32, what);
        check_pass(&l, counts[i], compute_cuda.stack_act(l.gpu), what);
    }
    check_under_way(&l);
    if (!check_quick) check_bits(&l);
    layer_close(&l);
}

int main(int argc, char **argv)
{
    ep_err err = {{0}};
    const compute_ops *ops;
    check_quick = argc > 1 && strcmp(argv[1], "quick") == 0;
    printf("seed %llu\n", (unsigned long long)CHECK_SEED);
    if (kern_select("auto", &err) != EP_OK) return 1;
    if (compute_cuda.can_open("cuda:0", &err) != EP_OK) {
        printf("skipped: %s\n", err.text);
        return 77;
    }
    if (compute_open(&ops, &gpu, "cuda:0", 1, &err) != EP_OK) { /* there is one: no skip */
        printf("FAILED: %s\n", err.text);
        return 1;
    }
    printf("%s\n", ops->describe(gpu));
    if (compute_open(&ops, &cpu, "cpu", 4, &err) != EP_OK) return 1;
    check_lists();
    check_gate();
    check_combine();
    check_forms();
    check_layer(KERN_Q4_K, KERN_Q4_K, 256, 256);
    check_layer(KERN_Q4_K, KERN_Q6_K, 768, 512);
    check_layer(KERN_GPTQ4, KERN_GPTQ4, 384, 128);
    check_layer(KERN_Q8_0, KERN_Q8_0, 160, 96);
    check_layer(KERN_F16, KERN_F16, 80, 48);
    check_layer(KERN_BF16, KERN_BF16, 272, 144);
    check_layer(KERN_Q6_K, KERN_Q8_0, 256, 32);
    if (!check_quick) {
        check_layer(KERN_Q4_K, KERN_Q6_K, 2048, 768);
        check_layer(KERN_GPTQ4, KERN_GPTQ4, 4096, 1792);
        check_layer(KERN_Q8_0, KERN_Q8_0, 2048, 2304);
    }
    compute_cuda.close(gpu);
    compute_cpu.close(cpu);
    printf(check_failures ? "%d failures\n" : "all passed\n", check_failures);
    return check_failures != 0;
}
