/*
 * The forms of the product against each other, bit by bit, and against float64: one matrix of each
 * type and kind, the pairs of one expert between others, counts that fill, miss and exceed entries
 * of 16, 32 and 64. Each pair has the same row whatever the count, so equal bits over counts show
 * that a row does not depend on its batch.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/base.h"
#include "check_cuda.h"
#include "kernels/cuda/form.h"
#include "kernels/cuda/pack.h"
#include "kernels/kernels.h"

enum { N = 200, EXPERTS = 3, BEFORE = 5, MOST = 1000, ROWS = 37, PAIRS = BEFORE + MOST };

static const int sizes[] = {1, 4, 16, 63, 64, 65, 128, 129, 257, MOST};
static gpu_forms forms;
static int n_sm, smem_limit;
static cudaStream_t stream;

typedef struct product {
    gpu_matrix m;
    uint8_t *file[EXPERTS][2], *w;
    float *x, *x_in; /* host, device: [ROWS, k] */
    gpu_rows rows;
    gpu_entry *list;
    int32_t *n_entries, *offset, *pair_row, *n_rows;
    float *out;
    float *got[GPU_FORMS]; /* host: [PAIRS, N] of the last count */
    float *first;          /* of the first form and the largest count */
} product;

static void *room(size_t bytes)
{
    void *p;
    check_cuda_call(cudaMalloc(&p, bytes + 256), "cudaMalloc");
    return p;
}

static void to_device(void *dst, const void *src, size_t bytes)
{
    check_cuda_call(cudaMemcpy(dst, src, bytes, cudaMemcpyHostToDevice), "copy");
}

static void product_open(product *p, int type, int k, int interleaved)
{
    p->m = gpu_matrix_make(type, N, k, interleaved, kern_type_row_bytes(type, k));
    p->w = room(EXPERTS * p->m.bytes);
    uint8_t *packed = ep_alloc(p->m.bytes);
    for (int e = 0; e < EXPERTS; e++) {
        for (int i = 0; i <= interleaved; i++) {
            p->file[e][i] = ep_alloc(N * p->m.row_bytes);
            check_file_rows(type, MODE_RANDOM, N, k, p->file[e][i]);
        }
        gpu_pack(&p->m, p->file[e][0], p->file[e][1], packed);
        to_device(p->w + (size_t)e * p->m.bytes, packed, p->m.bytes);
    }
    ep_free(packed);
    size_t values = ROWS * (size_t)k, tiles = ROWS * (size_t)p->m.k_tiles;
    p->x = ep_alloc(values * sizeof(float));
    for (size_t i = 0; i < values; i++)
        p->x[i] = check_normal();
    p->x_in = room(values * sizeof(float));
    to_device(p->x_in, p->x, values * sizeof(float));
    p->rows = (gpu_rows){room(tiles * 512), room(ROWS * sizeof(float)), room(tiles * 32)};
    p->list = room((size_t)gpu_entries_most(PAIRS, EXPERTS, GPU_NARROW_COLS) * sizeof(gpu_entry));
    p->n_entries = room(4);
    p->n_rows = room(4);
    p->offset = room(4 * (EXPERTS + 1));
    p->pair_row = room(4 * PAIRS);
    int32_t row[PAIRS], rows = ROWS;
    for (int i = 0; i < PAIRS; i++)
        row[i] = i * 7 % ROWS;
    to_device(p->pair_row, row, sizeof row);
    to_device(p->n_rows, &rows, 4);
    p->out = room(sizeof(float) * PAIRS * N);
    for (int form = 0; form < GPU_FORMS; form++)
        p->got[form] = ep_calloc(PAIRS * N, sizeof(float));
    p->first = ep_calloc(PAIRS * N, sizeof(float));
}

static void product_close(product *p)
{
    void *all[] = {p->w,         p->x_in,   p->rows.value, p->rows.scale, p->rows.sum, p->list,
                   p->n_entries, p->n_rows, p->offset,     p->pair_row,   p->out};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        cudaFree(all[i]);
    for (int e = 0; e < EXPERTS; e++)
        for (int i = 0; i < 2; i++)
            ep_free(p->file[e][i]);
    for (int form = 0; form < GPU_FORMS; form++)
        ep_free(p->got[form]);
    ep_free(p->first);
    ep_free(p->x);
}

/* List, rows and product of one form, as a pass queues them, chained too where passes are. */
static void run(product *p, int form, int pairs)
{
    gpu_gemm g = {.w = p->w,
                  .m = p->m,
                  .x = p->rows,
                  .list = p->list,
                  .n_entries = p->n_entries,
                  .pair_row = p->pair_row,
                  .out = p->out,
                  .ld = N};
    size_t bytes = sizeof(float) * (size_t)pairs * N;
    gpu_gemm_plan(&g, form, smem_limit);
    int blocks = n_sm * gpu_gemm_occupancy(&g, form);
    check_cuda_call(cudaDeviceSynchronize(), "copies"); /* they are not of that stream */
    check_cuda_call(cudaMemsetAsync(p->out, 0xff, bytes, stream), "memset");
    check_cuda_call(
        gpu_launch_list(p->offset, EXPERTS, gpu_form_width(form), p->list, p->n_entries, stream),
        "list kernel");
    check_cuda_call(gpu_launch_rows(KERN_ACT_F32, p->x_in, p->rows, p->n_rows, ROWS, p->m.k,
                                    p->m.type == KERN_BF16, form, forms.chained, stream),
                    "rows kernel");
    check_cuda_call(gpu_launch_gemm(&g, form, blocks, forms.chained, stream), "product kernel");
    check_cuda_call(cudaDeviceSynchronize(), "product kernel");
    check_cuda_call(cudaMemcpy(p->got[form], p->out, bytes, cudaMemcpyDeviceToHost), "copy");
}

static double dot(const product *p, const uint8_t *file, int row, const float *x, float *w)
{
    double sum = 0;
    kern_dequant_row(p->m.type, file + (size_t)row * p->m.row_bytes, w, p->m.k);
    for (int i = 0; i < p->m.k; i++)
        sum += (double)w[i] * x[i];
    return sum;
}

/* Mean relative error of every eighth channel of some pairs of the middle expert. */
static double error_of(const product *p, const float *got)
{
    float *w = ep_alloc((size_t)p->m.k * sizeof(float));
    double error = 0, size = 0;
    for (int pair = BEFORE; pair < PAIRS; pair += 331) {
        const float *x = p->x + (size_t)(pair * 7 % ROWS) * (size_t)p->m.k;
        for (int n = pair % 8; n < N; n += 8) {
            double want = dot(p, p->file[1][0], n, x, w);
            if (p->m.interleaved) want = want / (1 + exp(-want)) * dot(p, p->file[1][1], n, x, w);
            error += fabs(got[(size_t)pair * N + (size_t)n] - want);
            size += fabs(want);
        }
    }
    ep_free(w);
    return error / size;
}

static void check_product(int type, int k, int interleaved)
{
    product p = {0};
    const bool serves = gpu_forms_serve(&forms, type, type);
    const double bound = type == KERN_BF16 ? 4e-3 : 1e-3;
    double error[GPU_FORMS] = {0};
    product_open(&p, type, k, interleaved);
    for (int s = sizeof sizes / sizeof sizes[0] - 1; s >= 0; s--) {
        const int32_t offset[EXPERTS + 1] = {0, BEFORE, BEFORE + sizes[s], BEFORE + sizes[s]};
        const int pairs = BEFORE + sizes[s];
        to_device(p.offset, offset, sizeof offset);
        for (int form = 0; form < GPU_FORMS; form++) {
            if (form == GPU_FORM_WGMMA && !forms.runs_wgmma) continue;
            run(&p, form, pairs);
            if (sizes[s] == MOST) {
                error[form] = error_of(&p, p.got[form]);
                if (!(error[form] <= bound))
                    check_fail("%s k %d, form %d: error %.2e", kern_type_name(type), k, form,
                               error[form]);
                if (form == 0) memcpy(p.first, p.got[0], sizeof(float) * PAIRS * N);
            }
            int apart = 0;
            for (int i = 0; i < pairs * N; i++)
                apart += memcmp(&p.got[form][i], &p.first[i], sizeof(float)) != 0;
            if (apart > 0 && form == GPU_FORM_WGMMA && !serves) {
                if (sizes[s] == MOST)
                    printf("%s k %d, wgmma, which does not serve: %d of %d values differ\n",
                           kern_type_name(type), k, apart, pairs * N);
            } else if (apart > 0)
                check_fail("%s k %d, form %d, %d pairs: %d of %d values have other bits",
                           kern_type_name(type), k, form, sizes[s], apart, pairs * N);
        }
    }
    printf("%-6s k %4d%s: error %.2e by split, %.2e by wide, ", kern_type_name(type), k,
           interleaved ? ", gate and up" : "", error[GPU_FORM_SPLIT], error[GPU_FORM_WIDE]);
    printf(forms.runs_wgmma ? "%.2e by wgmma%s\n" : "no wgmma here\n", error[GPU_FORM_WGMMA],
           serves ? "" : ", which does not serve: other bits");
    product_close(&p);
}

void check_forms(void)
{
    static const int types[] = {KERN_Q4_K, KERN_Q6_K, KERN_Q8_0, KERN_GPTQ4, KERN_F16, KERN_BF16};
    ep_err err = {{0}};
    check_cuda_call(cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, 0), "attribute");
    check_cuda_call(cudaDeviceGetAttribute(&smem_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0),
                    "attribute");
    if (gpu_forms_open(&forms, 0, smem_limit, &err) != EP_OK) {
        check_fail("forms: %s", err.text);
        return;
    }
    printf("forms: %s, launches %schained\n", forms.line, forms.chained ? "" : "not ");
    check_cuda_call(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    for (int t = 0; t < 6; t++) {
        check_product(types[t], 768, 0);
        check_product(types[t], check_quick ? 512 : 2304, 1); /* 2304: segments of two tiles */
    }
    cudaStreamDestroy(stream);
}
