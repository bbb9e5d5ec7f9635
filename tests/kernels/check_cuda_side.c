/*
 * The kernels around the products: work lists against the host's, the gate against the CPU's
 * softmax and plain loops, the combine bit by bit.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "base/base.h"
#include "check_cuda.h"
#include "kernels/cuda/gpu.h"
#include "kernels/kernels.h"

static void *up(const void *src, size_t bytes)
{
    void *p;
    check_cuda_call(cudaMalloc(&p, bytes + 16), "cudaMalloc");
    if (src != NULL) check_cuda_call(cudaMemcpy(p, src, bytes, cudaMemcpyHostToDevice), "copy");
    return p;
}

static void down(void *dst, void *src, size_t bytes)
{
    check_cuda_call(cudaDeviceSynchronize(), "a kernel");
    check_cuda_call(cudaMemcpy(dst, src, bytes, cudaMemcpyDeviceToHost), "copy");
}

void check_lists(void)
{
    static const int sizes[] = {1, 11, 128, 512, 513, 1500};
    for (int i = 0; i < 6; i++)
        for (int width = 16; width <= 64; width *= 2) {
            int n = sizes[i];
            int32_t *offset = ep_calloc((size_t)n + 1, 4), got_n = -1;
            for (int e = 0; e < n; e++)
                offset[e + 1] =
                    offset[e] + (check_below(3) ? check_below(40) : check_below(2) * 1000);
            int most = gpu_entries_most(offset[n], n, width) + 1;
            gpu_entry *want = ep_calloc((size_t)most, sizeof *want),
                      *got = ep_calloc((size_t)most, sizeof *got);
            int want_n = gpu_entries_build(want, offset, n, width);
            void *d_offset = up(offset, ((size_t)n + 1) * 4), *d_n = up(NULL, 4);
            void *d_list = up(NULL, (size_t)most * sizeof *got);
            check_cuda_call(gpu_launch_list(d_offset, n, width, d_list, d_n, NULL), "list kernel");
            down(&got_n, d_n, 4);
            down(got, d_list, (size_t)want_n * sizeof *got);
            if (got_n != want_n || memcmp(got, want, (size_t)want_n * sizeof *got) != 0)
                check_fail("work list of %d experts, width %d", n, width);
            cudaFree(d_offset);
            cudaFree(d_n);
            cudaFree(d_list);
            ep_free(offset);
            ep_free(want);
            ep_free(got);
        }
}

/* Ids must be those of a plain choice over the device's kind of scores in double, unless two scores
 * are within rounding; weights within 1e-5. */
static void gate_case(int experts, int top_k, int sigmoid, int renormalise)
{
    enum { ROWS = 37 };
    size_t n = (size_t)experts * ROWS, k = (size_t)top_k * ROWS;
    float *logits = ep_alloc(n * 4), *bias = ep_alloc((size_t)experts * 4), *w = ep_alloc(k * 4);
    int32_t *id = ep_alloc(k * 4);
    double *score = ep_alloc((size_t)experts * sizeof(double));
    for (size_t i = 0; i < n; i++)
        logits[i] = check_normal() * 3.0f;
    for (int e = 0; e < experts; e++)
        bias[e] = check_normal() * 0.1f;
    gpu_gate g = {.logits = up(logits, n * 4),
                  .bias = sigmoid ? up(bias, (size_t)experts * 4) : NULL,
                  .n_rows = ROWS,
                  .n_experts = experts,
                  .top_k = top_k,
                  .sigmoid = sigmoid,
                  .renormalise = renormalise,
                  .scale = sigmoid ? 2.5f : 1.0f,
                  .experts = up(NULL, k * 4),
                  .weights = up(NULL, k * 4)};
    check_cuda_call(gpu_launch_gate(&g, NULL), "gate kernel");
    down(id, g.experts, k * 4);
    down(w, g.weights, k * 4);
    for (int r = 0; r < ROWS; r++) {
        double top = -1e30, sum = 0, chosen = 0, last = 1e30;
        const float *l = logits + (size_t)r * (size_t)experts;
        for (int e = 0; e < experts; e++)
            top = fmax(top, l[e]);
        for (int e = 0; e < experts; e++)
            sum += score[e] = sigmoid ? 1 / (1 + exp(-l[e])) : exp(l[e] - top);
        for (int e = 0; e < experts && !sigmoid; e++)
            score[e] /= sum;
        const int32_t *mine = id + (size_t)r * (size_t)top_k;
        for (int s = 0; s < top_k; s++)
            chosen += mine[s] >= 0 && mine[s] < experts ? score[mine[s]] : NAN;
        for (int s = 0; s < top_k; s++) {
            int e = mine[s];
            if (e < 0 || e >= experts) {
                check_fail("gate: expert %d of %d", e, experts);
                break;
            }
            double by = score[e] + (sigmoid ? bias[e] : 0), want = score[e];
            if (by > last + 1e-6) check_fail("gate: slot %d is better than the one before", s);
            last = by;
            if (renormalise) want /= chosen;
            want *= g.scale;
            if (fabs(w[(size_t)r * (size_t)top_k + (size_t)s] - want) > 1e-5 * (1 + want))
                check_fail("gate: weight %g, expected %g", w[(size_t)r * (size_t)top_k + (size_t)s],
                           want);
            for (int o = 0; o < s; o++)
                if (mine[o] == e) check_fail("gate: expert %d twice", e);
        }
        for (int e = 0; e < experts; e++) { /* nobody better was left out */
            bool in = false;
            for (int s = 0; s < top_k; s++)
                in |= mine[s] == e;
            if (!in && score[e] + (sigmoid ? bias[e] : 0) > last + 1e-6)
                check_fail("gate: expert %d left out", e);
        }
    }
    cudaFree((void *)(uintptr_t)g.logits);
    cudaFree((void *)(uintptr_t)g.bias);
    cudaFree(g.experts);
    cudaFree(g.weights);
    ep_free(logits);
    ep_free(bias);
    ep_free(w);
    ep_free(id);
    ep_free(score);
}

void check_gate(void)
{
    gate_case(8, 2, 0, 1);
    gate_case(128, 8, 0, 1);
    gate_case(128, 8, 0, 0);
    gate_case(256, 8, 1, 1);
    gate_case(5, 5, 1, 0);
    gate_case(1000, 10, 0, 1);
}

void check_combine(void)
{
    enum { ROWS = 7, TOP_K = 4, HIDDEN = 300 };
    static float x[ROWS * HIDDEN], y[ROWS * TOP_K * HIDDEN], w[ROWS * TOP_K], got[ROWS * HIDDEN];
    int32_t place[ROWS * TOP_K];
    for (int i = 0; i < ROWS * HIDDEN; i++)
        x[i] = check_normal();
    for (int i = 0; i < ROWS * TOP_K * HIDDEN; i++)
        y[i] = check_normal();
    for (int i = 0; i < ROWS * TOP_K; i++) {
        w[i] = check_normal();
        place[i] = i % 5 == 3 ? -1 : ROWS * TOP_K - 1 - i;
    }
    float *d_x = up(x, sizeof x), *d_y = up(y, sizeof y), *d_w = up(w, sizeof w);
    int32_t *d_place = up(place, sizeof place);
    check_cuda_call(gpu_launch_combine(d_x, d_y, d_place, d_w, ROWS, TOP_K, HIDDEN, NULL),
                    "combine kernel");
    down(got, d_x, sizeof got);
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < HIDDEN; i++) {
            float v = x[r * HIDDEN + i];
            for (int s = 0; s < TOP_K; s++)
                if (place[r * TOP_K + s] >= 0)
                    v = fmaf(w[r * TOP_K + s], y[place[r * TOP_K + s] * HIDDEN + i], v);
            if (memcmp(&v, &got[r * HIDDEN + i], 4) != 0) check_fail("combine: row %d, %d", r, i);
        }
    cudaFree(d_x);
    cudaFree(d_y);
    cudaFree(d_w);
    cudaFree(d_place);
}
