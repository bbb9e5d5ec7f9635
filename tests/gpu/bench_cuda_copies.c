/*
 * bench_cuda_copies [type]: microseconds of a pass with its copies, as a shard drives cuda:0: rows
 * and lists to the device, the layer, results back. Qwen3-30B-A3B's layer (hidden 2048,
 * intermediate 768, 128 experts, top 8), four layers in turn. Three ways: from ordinary memory,
 * from pinned memory one at a time, from pinned memory with two under way (copies overlap
 * computing). GB/s: rows and results of the last way. Medians of nine runs.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "kernels/compute.h"
#include "kernels/kernels.h"
#include "tests/kernels/check.h"

enum { HIDDEN = 2048, INTER = 768, EXPERTS = 128, TOP_K = 8, LAYERS = 4, RUNS = 9, MOST = 1024 };

static const int tokens[] = {1, 8, 32, 128, 512, 1024};

static compute *gpu;
static compute_stack *stacks[LAYERS];

void check_fail(const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    vprintf(fmt, args);
    va_end(args);
    exit(1);
}

static void must(ep_status s, const char *what)
{
    if (s != EP_OK) check_fail("%s: %s %s\n", what, ep_status_name(s), compute_cuda.failure(gpu));
}

/* One expert's random rows serve all. */
static void load(int type)
{
    ep_err err = {{0}};
    const compute_shape shape = {type, type, type, HIDDEN, INTER, EXPERTS, false};
    uint8_t *rows[3];
    for (int r = 0; r < 3; r++) {
        int n = r < 2 ? INTER : HIDDEN, k = r < 2 ? HIDDEN : INTER;
        rows[r] = ep_alloc((size_t)n * kern_type_row_bytes(type, k));
        check_file_rows(type, MODE_RANDOM, n, k, rows[r]);
    }
    for (int l = 0; l < LAYERS; l++) {
        if (compute_cuda.stack_open(gpu, &shape, &stacks[l], &err) != EP_OK)
            check_fail("%s\n", err.text);
        for (int e = 0; e < EXPERTS; e++) {
            uint64_t sum;
            must(compute_cuda.stack_load(stacks[l], e, rows[0], rows[1], rows[2], &sum), "load");
        }
    }
    for (int r = 0; r < 3; r++)
        ep_free(rows[r]);
}

/* Each row's top_k different experts, sorted by expert. */
static void route(compute_ffn_args *a, int n_rows)
{
    int32_t *offset = ep_calloc(EXPERTS + 1, 4), *row = ep_alloc((size_t)n_rows * TOP_K * 4),
            *place = ep_alloc((size_t)n_rows * TOP_K * 4), n = 0;
    uint8_t *chosen = ep_calloc((size_t)n_rows, EXPERTS);
    for (int r = 0; r < n_rows; r++)
        for (int k = 0; k < TOP_K;) {
            uint8_t *c = &chosen[r * EXPERTS + check_below(EXPERTS)];
            k += !*c;
            *c = 1;
        }
    for (int e = 0; e < EXPERTS; e++) {
        for (int r = 0; r < n_rows; r++)
            if (chosen[r * EXPERTS + e]) row[n] = r, place[n] = n, n++;
        offset[e + 1] = n;
    }
    ep_free(chosen);
    *a = (compute_ffn_args){.act = compute_cuda.stack_act(stacks[0]),
                            .n_rows = n_rows,
                            .n_pairs = n,
                            .expert_offset = offset,
                            .pair_row = row,
                            .pair_out = place};
}

/* Passes over the layers in turn; pass i has its memory at i % 2. */
static double run(const compute_ffn_args *a, uint8_t *memory[2], size_t rows_bytes, int under_way,
                  int n)
{
    ep_time from = ep_now();
    for (int i = 0; i < n + under_way; i++) {
        if (i >= under_way) must(compute_cuda.ffn_end(gpu), "end of a pass");
        if (i >= n) continue;
        compute_ffn_args b = *a;
        b.rows = memory[i % 2];
        b.out = (float *)(void *)(memory[i % 2] + rows_bytes);
        must(compute_cuda.ffn_begin(gpu, stacks[i % LAYERS], &b), "begin of a pass");
    }
    return (double)ep_time_diff_ns(ep_now(), from) / 1000 / n;
}

static int by_value(const void *a, const void *b)
{
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static double median(const compute_ffn_args *a, uint8_t *memory[2], size_t rows_bytes,
                     int under_way)
{
    double us[RUNS], first = run(a, memory, rows_bytes, under_way, 4);
    int n = first > 10000 ? 4 : (int)(40000 / first) + 4;
    for (int i = 0; i < RUNS; i++)
        us[i] = run(a, memory, rows_bytes, under_way, n);
    qsort(us, RUNS, sizeof us[0], by_value);
    return us[RUNS / 2];
}

static void bench(int n_rows)
{
    compute_ffn_args a;
    route(&a, n_rows);
    size_t rows = ((size_t)n_rows * kern_act_row_bytes(a.act, HIDDEN) + 63) & ~(size_t)63;
    size_t each = rows + (size_t)a.n_pairs * HIDDEN * 4;
    uint8_t *all = ep_map(2 * each), *memory[2] = {all, all + each};
    float *x = ep_alloc((size_t)n_rows * HIDDEN * 4);
    for (int i = 0; i < n_rows * HIDDEN; i++)
        x[i] = check_normal();
    for (int i = 0; i < 2; i++)
        kern_act_rows(a.act, memory[i], x, HIDDEN, n_rows, HIDDEN);
    double ordinary = median(&a, memory, rows, 1);
    must(compute_cuda.pin(gpu, all, 2 * each), "pin");
    double alone = median(&a, memory, rows, 1), two = median(&a, memory, rows, COMPUTE_DEPTH);
    compute_cuda.unpin(gpu, all);
    printf("%6d %6d %12.1f %12.1f %14.1f %8.2f %8.1f\n", n_rows, a.n_pairs, ordinary, alone, two,
           alone / two, (double)each / two / 1000);
    fflush(stdout);
    ep_free(x);
    ep_unmap(all, 2 * each);
    ep_free((void *)(uintptr_t)a.expert_offset);
    ep_free((void *)(uintptr_t)a.pair_row);
    ep_free((void *)(uintptr_t)a.pair_out);
}

int main(int argc, char **argv)
{
    static const int types[] = {KERN_Q4_K, KERN_GPTQ4, KERN_Q6_K, KERN_Q8_0, KERN_F16, KERN_BF16};
    ep_err err = {{0}};
    int type = KERN_Q4_K;
    for (int i = 0; i < 6 && argc > 1; i++)
        if (strcmp(argv[1], kern_type_name(types[i])) == 0) type = types[i];
    if (kern_select("auto", &err) != EP_OK) check_fail("%s\n", err.text);
    if (compute_cuda.can_open("cuda:0", &err) != EP_OK) {
        printf("skipped: %s\n", err.text);
        return 77;
    }
    if (compute_cuda.open(&gpu, "cuda:0", 1, &err) != EP_OK) check_fail("%s\n", err.text);
    load(type);
    must(compute_cuda.reserve(gpu, MOST, MOST * TOP_K), "reserve");
    printf("%s\n%s, seed %llu\ntokens  pairs  ordinary_us    pinned_us  two_at_once_us    ratio    "
           " GB/s\n",
           compute_cuda.describe(gpu), kern_type_name(type), (unsigned long long)CHECK_SEED);
    for (size_t i = 0; i < sizeof tokens / sizeof tokens[0]; i++)
        bench(tokens[i]);
    for (int l = 0; l < LAYERS; l++)
        compute_cuda.stack_close(stacks[l]);
    compute_cuda.close(gpu);
    return 0;
}
