/*
 * bench_cuda [type]: microseconds of a whole expert layer on cuda:0 (rows, list, gate_up with
 * SwiGLU, hidden rows, down), as a shard queues it. A graph holds one pass over each of eight
 * layers, whose weights are apart in memory, with four routings in turn, so that no cache serves
 * twice; events stand around replays of it. Every form of the product kernels is timed (0: not on
 * this device), also one that does not serve because its bits differ; the columns behind are of the
 * fastest that serves. The ceiling is a pure read of 4 GiB in the same run. MOED_CUDA_CHAIN=off
 * times launches that do not overlap.
 *
 * Weights: four random experts of the type, packed on the CPU and repeated. The error is that of
 * two result rows against float64 of the same weights.
 */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/base.h"
#include "kernels/cuda/form.h"
#include "kernels/cuda/pack.h"
#include "kernels/kernels.h"
#include "tests/kernels/check.h"

enum { LAYERS = 8, ROUTINGS = 4, KINDS = 4, SAMPLES = 9 };

int bench_launch_read(const void *p, size_t bytes, uint32_t *never, int blocks, void *stream);

static const struct {
    const char *name;
    int hidden, inter, local, experts, top_k;
} shapes[] = {{"qwen3-30b-a3b", 2048, 768, 128, 128, 8},
              {"mixtral-8x7b", 4096, 14336, 8, 8, 2},
              {"deepseek-v3/8", 7168, 2048, 32, 256, 8}};
static const int tokens[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048};
enum { MOST_TOKENS = 2048 };

static cudaStream_t stream;
static int n_sm, smem_limit;
static gpu_forms forms;

void check_fail(const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    vprintf(fmt, args);
    va_end(args);
    exit(1);
}

static void must(int e, const char *what)
{
    if (e != cudaSuccess) check_fail("%s: %s (%d)\n", what, cudaGetErrorString((cudaError_t)e), e);
}

static void *room(size_t bytes)
{
    void *p;
    must(cudaMalloc(&p, bytes + 256), "cudaMalloc");
    return p;
}

/* ---- one shape on the device ---- */

typedef struct bench {
    int type, hidden, inter, local;
    gpu_matrix m[2];
    uint8_t *w[2];
    uint8_t *file[KINDS][3];
    float *x_host;
    void *x_in;
    gpu_rows x, hx;
    float *h, *out;
    gpu_entry *list;
    int32_t *n_entries;
    int most_pairs;
} bench;

static gpu_rows rows_room(size_t n, int k_tiles)
{
    gpu_rows r = {room(n * (size_t)k_tiles * 512), room(n * 4), room(n * (size_t)k_tiles * 32)};
    return r;
}

static void bench_open(bench *b, int shape, int type)
{
    b->type = type;
    b->hidden = shapes[shape].hidden;
    b->inter = shapes[shape].inter;
    b->local = shapes[shape].local;
    b->m[0] = gpu_matrix_make(type, b->inter, b->hidden, 1, kern_type_row_bytes(type, b->hidden));
    b->m[1] = gpu_matrix_make(type, b->hidden, b->inter, 0, kern_type_row_bytes(type, b->inter));
    size_t n = (size_t)(LAYERS * b->local);
    for (int r = 0; r < 2; r++)
        b->w[r] = room(n * b->m[r].bytes);
    for (int kind = 0; kind < KINDS; kind++) {
        for (int r = 0; r < 3; r++) {
            const gpu_matrix *m = &b->m[r / 2];
            b->file[kind][r] = ep_alloc((size_t)m->n * m->row_bytes);
            check_file_rows(type, MODE_RANDOM, m->n, m->k, b->file[kind][r]);
        }
        for (int r = 0; r < 2; r++) {
            const gpu_matrix *m = &b->m[r];
            uint8_t *packed = ep_alloc(m->bytes);
            gpu_pack(m, b->file[kind][2 * r], r ? NULL : b->file[kind][1], packed);
            uint8_t *first = b->w[r] + (size_t)kind * m->bytes;
            must(cudaMemcpy(first, packed, m->bytes, cudaMemcpyHostToDevice), "weights");
            for (size_t e = (size_t)kind + KINDS; e < n; e += KINDS)
                must(cudaMemcpy(b->w[r] + e * m->bytes, first, m->bytes, cudaMemcpyDeviceToDevice),
                     "weights");
            ep_free(packed);
        }
    }
    b->most_pairs = MOST_TOKENS * shapes[shape].top_k;
    size_t x_bytes = (size_t)MOST_TOKENS * (size_t)b->hidden * 4, pairs = (size_t)b->most_pairs;
    b->x_host = ep_alloc(x_bytes);
    for (size_t i = 0; i < x_bytes / 4; i++)
        b->x_host[i] = check_normal();
    b->x_in = room(x_bytes);
    must(cudaMemcpy(b->x_in, b->x_host, x_bytes, cudaMemcpyHostToDevice), "rows");
    b->x = rows_room(MOST_TOKENS, b->m[0].k_tiles);
    b->hx = rows_room(pairs, b->m[1].k_tiles);
    b->h = room(pairs * (size_t)b->inter * 4);
    b->out = room(pairs * (size_t)b->hidden * 4);
    b->list = room((size_t)gpu_entries_most(b->most_pairs, b->local, GPU_NARROW_COLS) *
                   sizeof(gpu_entry));
    b->n_entries = room(4);
}

static void bench_close(bench *b)
{
    void *all[] = {b->w[0],  b->w[1],     b->x_in,     b->x.value, b->x.scale,
                   b->x.sum, b->hx.value, b->hx.scale, b->hx.sum,  b->h,
                   b->out,   b->list,     b->n_entries};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        cudaFree(all[i]);
    for (int kind = 0; kind < KINDS; kind++)
        for (int r = 0; r < 3; r++)
            ep_free(b->file[kind][r]);
    ep_free(b->x_host);
}

/* ---- routings ---- */

typedef struct routing {
    int n_rows, n_pairs, active;
    int32_t *host, *device; /* counts[2], offset[local + 1], pair_row[], as in one block */
} routing;

static routing route(const bench *b, int shape, int n_tokens)
{
    int experts = shapes[shape].experts, top_k = shapes[shape].top_k, local = b->local;
    routing r = {.n_rows = n_tokens};
    size_t words = 3 + (size_t)local + (size_t)b->most_pairs;
    int32_t *owner = ep_calloc((size_t)n_tokens * (size_t)top_k, 4),
            *next = ep_calloc((size_t)local + 1, 4);
    r.host = ep_calloc(words, 4);
    int32_t *offset = r.host + 2, *row = offset + local + 1;
    for (int t = 0; t < n_tokens; t++)
        for (int s = 0; s < top_k; s++) {
            int32_t *mine = owner + (size_t)t * (size_t)top_k;
            bool again = true;
            while (again) {
                mine[s] = check_below(experts);
                again = false;
                for (int o = 0; o < s; o++)
                    again |= mine[o] == mine[s];
            }
            if (mine[s] < local) offset[mine[s] + 1]++;
        }
    for (int e = 0; e < local; e++) {
        r.active += offset[e + 1] > 0;
        offset[e + 1] += offset[e];
        next[e] = offset[e];
    }
    for (int i = 0; i < n_tokens * top_k; i++)
        if (owner[i] < local) row[next[owner[i]]++] = i / top_k;
    r.n_pairs = offset[local];
    r.host[0] = r.n_rows;
    r.host[1] = r.n_pairs;
    r.device = room(words * 4);
    must(cudaMemcpy(r.device, r.host, words * 4, cudaMemcpyHostToDevice), "routing");
    ep_free(owner);
    ep_free(next);
    return r;
}

/* ---- time ---- */

static void queue_layer(const bench *b, const routing *r, int layer, int form)
{
    size_t first = (size_t)(layer * b->local);
    gpu_gemm g = {.w = b->w[0] + first * b->m[0].bytes,
                  .m = b->m[0],
                  .x = b->x,
                  .list = b->list,
                  .n_entries = b->n_entries,
                  .pair_row = r->device + 3 + b->local,
                  .out = b->h,
                  .ld = b->inter};
    gpu_gemm d = {.w = b->w[1] + first * b->m[1].bytes,
                  .m = b->m[1],
                  .x = b->hx,
                  .list = b->list,
                  .n_entries = b->n_entries,
                  .out = b->out,
                  .ld = b->hidden};
    gpu_gemm_plan(&g, form, smem_limit);
    gpu_gemm_plan(&d, form, smem_limit);
    int bf16 = b->type == KERN_BF16, chained = forms.chained;
    must(gpu_launch_list(r->device + 2, b->local, gpu_form_width(form), b->list, b->n_entries,
                         stream),
         "list");
    must(gpu_launch_rows(KERN_ACT_F32, b->x_in, b->x, r->device, r->n_rows, b->hidden, bf16, form,
                         chained, stream),
         "rows");
    must(gpu_launch_gemm(&g, form, n_sm * gpu_gemm_occupancy(&g, form), chained, stream),
         "gate_up");
    must(gpu_launch_rows(KERN_ACT_F32, b->h, b->hx, r->device + 1, r->n_pairs, b->inter, bf16, form,
                         chained, stream),
         "hidden");
    must(gpu_launch_gemm(&d, form, n_sm * gpu_gemm_occupancy(&d, form), chained, stream), "down");
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Median microseconds of one layer; 0 when the device has no such form. */
static double time_layers(const bench *b, const routing *r, int form)
{
    if (form == GPU_FORM_WGMMA && !forms.runs_wgmma) return 0;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t from, to;
    float sample[SAMPLES], ms = 0;
    must(cudaEventCreate(&from), "event");
    must(cudaEventCreate(&to), "event");
    must(cudaDeviceSynchronize(), "copies"); /* they are not of the stream, which waits for none */
    must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int l = 0; l < LAYERS; l++)
        queue_layer(b, &r[l % ROUTINGS], l, form);
    must(cudaStreamEndCapture(stream, &graph), "capture");
    must(cudaGraphInstantiate(&exec, graph, 0), "graph");
    int replays = 1;
    for (int i = -2; i < SAMPLES; i++) { /* two to warm up; the second says how many fill 8 ms */
        must(cudaEventRecord(from, stream), "event");
        for (int k = 0; k < replays; k++)
            must(cudaGraphLaunch(exec, stream), "graph");
        must(cudaEventRecord(to, stream), "event");
        must(cudaEventSynchronize(to), "a pass");
        must(cudaEventElapsedTime(&ms, from, to), "event");
        if (i == -1) replays = ms > 8 ? 1 : (int)(8 / ms) + 1;
        if (i >= 0) sample[i] = ms * 1000 / (float)(replays * LAYERS);
    }
    qsort(sample, SAMPLES, sizeof sample[0], by_value);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaEventDestroy(from);
    cudaEventDestroy(to);
    return sample[SAMPLES / 2];
}

/* ---- truth ---- */

static double dot(const gpu_matrix *m, const uint8_t *file, int row, const double *x, float *w)
{
    double sum = 0;
    kern_dequant_row(m->type, file + (size_t)row * m->row_bytes, w, m->k);
    for (int i = 0; i < m->k; i++)
        sum += (double)w[i] * x[i];
    return sum;
}

/* Mean relative error of the first and the last pair of the last routing, after a pass over layer
 * 0. */
static double error_of(const bench *b, const routing *r, int form)
{
    const int32_t *offset = r->host + 2, *row = offset + b->local + 1;
    double *x = ep_alloc((size_t)b->hidden * 8), *h = ep_alloc((size_t)b->inter * 8), error = 0,
           size = 0;
    float *w = ep_alloc((size_t)(b->hidden + b->inter) * 4), *got = ep_alloc((size_t)b->hidden * 4);
    queue_layer(b, r, 0, form);
    must(cudaStreamSynchronize(stream), "a pass");
    for (int n = 0; n < 2; n++) {
        int pair = n ? r->n_pairs - 1 : 0, e = 0;
        while (offset[e + 1] <= pair)
            e++;
        uint8_t *const *file = b->file[e % KINDS];
        for (int i = 0; i < b->hidden; i++)
            x[i] = b->x_host[(size_t)row[pair] * (size_t)b->hidden + (size_t)i];
        for (int i = 0; i < b->inter; i++) {
            double g = dot(&b->m[0], file[0], i, x, w);
            h[i] = g / (1 + exp(-g)) * dot(&b->m[0], file[1], i, x, w);
        }
        must(cudaMemcpy(got, b->out + (size_t)pair * (size_t)b->hidden, (size_t)b->hidden * 4,
                        cudaMemcpyDeviceToHost),
             "result");
        for (int i = 0; i < b->hidden; i++) {
            double y = dot(&b->m[1], file[2], i, h, w);
            error += fabs(got[i] - y);
            size += fabs(y);
        }
    }
    ep_free(x);
    ep_free(h);
    ep_free(w);
    ep_free(got);
    return error / size;
}

/* Bytes per microsecond of a pure read. */
static double read_ceiling(void)
{
    size_t bytes = (size_t)4 << 30;
    uint8_t *p = room(bytes);
    cudaEvent_t from, to;
    float ms, best = 1e30f;
    must(cudaEventCreate(&from), "event");
    must(cudaEventCreate(&to), "event");
    must(cudaMemsetAsync(p, 1, bytes, stream), "memset");
    for (int per_sm = 1; per_sm <= 4; per_sm *= 2)
        for (int i = 0; i < 5; i++) {
            must(cudaEventRecord(from, stream), "event");
            must(bench_launch_read(p, bytes, (uint32_t *)(void *)p, n_sm * per_sm, stream), "read");
            must(cudaEventRecord(to, stream), "event");
            must(cudaEventSynchronize(to), "read");
            must(cudaEventElapsedTime(&ms, from, to), "event");
            if (ms < best) best = ms;
        }
    cudaFree(p);
    return (double)bytes / (best * 1000);
}

static void bench_shape(int shape, int type, double ceiling)
{
    bench b = {0};
    bench_open(&b, shape, type);
    printf("\n%s, %s: %.1f MB per expert, %d experts here\n", shapes[shape].name,
           kern_type_name(type), (double)(b.m[0].bytes + b.m[1].bytes) / 1e6, b.local);
    printf("tokens pairs active  split_us   wide_us  wgmma_us        MB  of_ceiling  TFLOP/s     "
           "error\n");
    for (size_t t = 0; t < sizeof tokens / sizeof tokens[0]; t++) {
        routing r[ROUTINGS];
        double pairs = 0, active = 0;
        for (int i = 0; i < ROUTINGS; i++) {
            do
                r[i] = route(&b, shape, tokens[t]);
            while (r[i].n_pairs == 0);
            pairs += (double)r[i].n_pairs / ROUTINGS;
            active += (double)r[i].active / ROUTINGS;
        }
        double us[GPU_FORMS];
        int best_form = 0;
        for (int form = 0; form < GPU_FORMS; form++) {
            bool serves = form != GPU_FORM_WGMMA || gpu_forms_serve(&forms, type, type);
            us[form] = time_layers(&b, r, form);
            if (serves && us[form] > 0 && us[form] < us[best_form]) best_form = form;
        }
        double best = us[best_form], error = error_of(&b, &r[0], best_form);
        double bytes = active * (double)(b.m[0].bytes + b.m[1].bytes) +
                       pairs * (b.hidden * 4.0 + b.inter * 12.0);
        double flop = pairs * 6.0 * b.hidden * b.inter;
        printf("%6d %5.0f %6.1f %9.1f %9.1f %9.1f %9.1f %10.1f%% %8.1f  %.2e\n", tokens[t], pairs,
               active, us[GPU_FORM_SPLIT], us[GPU_FORM_WIDE], us[GPU_FORM_WGMMA], bytes / 1e6,
               100 * bytes / best / ceiling, flop / best / 1e6, error);
        fflush(stdout);
        for (int i = 0; i < ROUTINGS; i++) {
            cudaFree(r[i].device);
            ep_free(r[i].host);
        }
    }
    bench_close(&b);
}

int main(int argc, char **argv)
{
    static const int types[] = {KERN_Q4_K, KERN_GPTQ4, KERN_Q6_K, KERN_Q8_0, KERN_F16, KERN_BF16};
    int n = 0, type = KERN_Q4_K;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n < 1) {
        printf("skipped: no usable GPU: %s (%d)\n", cudaGetErrorString(e), (int)e);
        return 77;
    }
    for (int i = 0; i < 6 && argc > 1; i++)
        if (strcmp(argv[1], kern_type_name(types[i])) == 0) type = types[i];
    must(cudaSetDevice(0), "cudaSetDevice");
    must(cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, 0), "attribute");
    must(cudaDeviceGetAttribute(&smem_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0),
         "attribute");
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    must(gpu_gemm_prepare(smem_limit), "kernels for this GPU");
    ep_err err = {{0}};
    if (gpu_forms_open(&forms, 0, smem_limit, &err) != EP_OK) check_fail("%s\n", err.text);
    double ceiling = read_ceiling();
    printf("seed %llu, %d multiprocessors, %s, launches %schained, read ceiling %.2f TB/s\n",
           (unsigned long long)CHECK_SEED, n_sm, forms.line, forms.chained ? "" : "not ",
           ceiling / 1e6);
    for (int shape = 0; shape < 3; shape++)
        bench_shape(shape, type, ceiling);
    return 0;
}
