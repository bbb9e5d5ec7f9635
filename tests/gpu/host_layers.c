/* Layers and passes for test_cuda_host (host_layers.h). The data are check_data.c's. */
#include "tests/gpu/host_layers.h"
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "kernels/cuda/pack.h"
#include "kernels/kernels.h"
#include "tests/kernels/check.h"

void check_fail(const char *fmt, ...)
{
    va_list args;
    check_failures++;
    va_start(args, fmt);
    printf("    ");
    vprintf(fmt, args);
    printf("\n");
    va_end(args);
}

/* ---- layers ---- */

static int rows_of(const compute_shape *p, int role)
{
    return role < 2 ? p->inter : p->hidden;
}

static int k_of(const compute_shape *p, int role)
{
    return role < 2 ? p->hidden : p->inter;
}

static int type_of(const compute_shape *p, int role)
{
    return role == 0 ? p->gate_type : role == 1 ? p->up_type : p->down_type;
}

static uint64_t packed_sum(const host_layer *l, int e)
{
    const compute_shape *p = &l->shape;
    gpu_matrix m[2] = {gpu_matrix_make(p->gate_type, p->inter, p->hidden, 1,
                                       kern_type_row_bytes(p->gate_type, p->hidden)),
                       gpu_matrix_make(p->down_type, p->hidden, p->inter, 0,
                                       kern_type_row_bytes(p->down_type, p->inter))};
    uint8_t *packed = ep_alloc(m[0].bytes + m[1].bytes);
    gpu_pack(&m[0], l->file[0][e], l->file[1][e], packed);
    gpu_pack(&m[1], l->file[2][e], NULL, packed + m[0].bytes);
    uint64_t sum = gpu_checksum(packed, m[0].bytes, packed + m[0].bytes, m[1].bytes);
    ep_free(packed);
    return sum;
}

void host_layer_make(host_layer *l, compute *cpu, int gate_type, int down_type, int hidden,
                     int inter, int experts)
{
    l->shape = (compute_shape){gate_type, gate_type, down_type, hidden, inter, experts, false};
    for (int role = 0; role < 3; role++) {
        const int type = type_of(&l->shape, role), k = k_of(&l->shape, role);
        const int n = rows_of(&l->shape, role);
        const size_t bytes = kern_type_row_bytes(type, k);
        for (int e = 0; e < experts; e++) {
            l->file[role][e] = ep_alloc((size_t)n * bytes);
            l->w[role][e] = ep_alloc((size_t)n * (size_t)k * sizeof(float));
            check_file_rows(type, MODE_RANDOM, n, k, l->file[role][e]);
            for (int i = 0; i < n; i++)
                kern_dequant_row(type, l->file[role][e] + (size_t)i * bytes,
                                 l->w[role][e] + (size_t)i * (size_t)k, k);
        }
    }
    if (compute_cpu.stack_open(cpu, &l->shape, &l->cpu, NULL) != EP_OK) abort();
    for (int e = 0; e < experts; e++) {
        uint64_t sum;
        compute_cpu.stack_load(l->cpu, e, l->file[0][e], l->file[1][e], l->file[2][e], &sum);
        l->packed[e] = packed_sum(l, e);
    }
}

void host_layer_free(host_layer *l)
{
    compute_cpu.stack_close(l->cpu);
    for (int role = 0; role < 3; role++)
        for (int e = 0; e < l->shape.n_experts; e++) {
            ep_free(l->file[role][e]);
            ep_free(l->w[role][e]);
        }
}

ep_status host_layer_load(const host_layer *l, compute_stack *s, int e)
{
    uint64_t sum = 0;
    ep_status status =
        compute_cuda.stack_load(s, e, l->file[0][e], l->file[1][e], l->file[2][e], &sum);
    if (status == EP_OK && sum != l->packed[e]) check_fail("expert %d: other bytes", e);
    return status;
}

ep_status host_layer_open(const host_layer *l, compute *c, compute_stack **out, ep_err *err)
{
    compute_stack *s = NULL;
    ep_status status = compute_cuda.stack_open(c, &l->shape, &s, err);
    for (int e = 0; e < l->shape.n_experts && status == EP_OK; e++)
        status = host_layer_load(l, s, e);
    if (status == EP_OK)
        *out = s;
    else
        compute_cuda.stack_close(s);
    return status;
}

/* ---- passes ---- */

/* What the rows say in their own form, in float. */
static void read_rows(const compute_ffn_args *a, int hidden, float *x)
{
    const size_t bytes = kern_act_row_bytes(a->act, hidden);
    for (int r = 0; r < a->n_rows; r++)
        for (int i = 0; i < hidden; i++) {
            const uint8_t *from = (const uint8_t *)a->rows + (size_t)r * bytes;
            float *to = &x[(size_t)r * (size_t)hidden + (size_t)i], scale;
            if (a->act == KERN_ACT_F32) {
                memcpy(to, from + 4 * i, 4);
            } else if (a->act == KERN_ACT_BF16) {
                uint32_t bits = (uint32_t)(from[2 * i] | from[2 * i + 1] << 8) << 16;
                memcpy(to, &bits, 4);
            } else {
                memcpy(&scale, from + hidden + 4 * (i / kern_act_block(a->act)), 4);
                *to = (float)(int8_t)from[i] * scale;
            }
        }
}

void host_pass_make(host_pass *p, const host_layer *l, const int *counts, kern_act act)
{
    const int n = l->shape.n_experts, hidden = l->shape.hidden;
    memset(p, 0, sizeof *p);
    p->layer = l;
    p->offset = ep_calloc((size_t)n + 1, 4);
    for (int e = 0; e < n; e++)
        p->offset[e + 1] = p->offset[e] + counts[e];
    const int pairs = p->offset[n], rows = pairs / 2 + 1;
    p->row = ep_calloc((size_t)pairs + 1, 4);
    p->place = ep_calloc((size_t)pairs + 1, 4);
    for (int i = 0; i < pairs; i++) {
        p->row[i] = check_below(rows);
        p->place[i] = pairs - 1 - i;
    }
    const size_t values = (size_t)rows * (size_t)hidden, bytes = kern_act_row_bytes(act, hidden);
    p->x = ep_alloc(values * sizeof(float));
    for (size_t i = 0; i < values; i++)
        p->x[i] = check_normal();
    uint8_t *wire = ep_calloc((size_t)rows, bytes);
    if (act == KERN_ACT_F32)
        memcpy(wire, p->x, (size_t)rows * bytes);
    else
        kern_act_rows(act, wire, p->x, (size_t)hidden, rows, hidden);
    p->a = (compute_ffn_args){.rows = wire,
                              .act = act,
                              .n_rows = rows,
                              .n_pairs = pairs,
                              .expert_offset = p->offset,
                              .pair_row = p->row,
                              .pair_out = p->place};
    p->a.out = ep_calloc((size_t)pairs * (size_t)hidden + 1, sizeof(float));
    read_rows(&p->a, hidden, p->x);
}

void host_pass_free(host_pass *p)
{
    ep_free((void *)(uintptr_t)p->a.rows);
    ep_free(p->a.out);
    ep_free(p->offset);
    ep_free(p->row);
    ep_free(p->place);
    ep_free(p->x);
    ep_free(p->gold);
}

size_t host_pass_rows_bytes(const host_pass *p)
{
    return (size_t)p->a.n_rows * kern_act_row_bytes(p->a.act, p->layer->shape.hidden);
}

size_t host_pass_out_bytes(const host_pass *p)
{
    return (size_t)p->a.n_pairs * (size_t)p->layer->shape.hidden * sizeof(float);
}

ep_status host_run(const compute_ops *ops, compute *c, compute_stack *s, const compute_ffn_args *a)
{
    return compute_ffn(ops, c, s, a);
}

static double dot(const float *w, const double *x, int k)
{
    double sum = 0;
    for (int i = 0; i < k; i++)
        sum += (double)w[i] * x[i];
    return sum;
}

/* One pair in float64. */
static void exact(const host_layer *l, int e, const float *row, double *y)
{
    const int hidden = l->shape.hidden, inter = l->shape.inter;
    double *x = ep_alloc((size_t)hidden * sizeof *x), *h = ep_alloc((size_t)inter * sizeof *h);
    for (int i = 0; i < hidden; i++)
        x[i] = row[i];
    for (int i = 0; i < inter; i++) {
        const size_t at = (size_t)i * (size_t)hidden;
        double g = dot(l->w[0][e] + at, x, hidden);
        h[i] = g / (1 + exp(-g)) * dot(l->w[1][e] + at, x, hidden);
    }
    for (int i = 0; i < hidden; i++)
        y[i] = dot(l->w[2][e] + (size_t)i * (size_t)inter, h, inter);
    ep_free(x);
    ep_free(h);
}

/* The bounds are check_cuda's; a mean over few pairs may be three times as far off. */
static bool is_close(const host_pass *p, const float *out, compute *cpu)
{
    const host_layer *l = p->layer;
    const size_t hidden = (size_t)l->shape.hidden, all = (size_t)p->a.n_pairs * hidden;
    float *by_cpu = ep_calloc(all + 1, sizeof(float));
    double *want = ep_alloc(hidden * sizeof(double)), error = 0, apart = 0, size = 0, cpu_size = 0;
    compute_ffn_args a = p->a;
    a.out = by_cpu;
    if (host_run(&compute_cpu, cpu, l->cpu, &a) != EP_OK) check_fail("a pass on the CPU");
    for (size_t i = 0; i < all; i++) {
        apart += fabs((double)out[i] - by_cpu[i]);
        cpu_size += fabs((double)by_cpu[i]);
    }
    for (int e = 0; e < l->shape.n_experts; e++)
        for (int i = p->offset[e]; i < p->offset[e + 1]; i += p->a.n_pairs / 8 + 1) {
            exact(l, e, p->x + (size_t)p->row[i] * hidden, want);
            for (size_t j = 0; j < hidden; j++) {
                error += fabs(out[(size_t)p->place[i] * hidden + j] - want[j]);
                size += fabs(want[j]);
            }
        }
    ep_free(by_cpu);
    ep_free(want);
    const bool bf16 = l->shape.gate_type == KERN_BF16 || l->shape.down_type == KERN_BF16;
    double bound = !bf16 ? 1e-3 : p->a.act == KERN_ACT_BF16 ? 2e-3 : 4e-3;
    if (p->a.n_pairs < 16) bound *= 3;
    if (error <= bound * size && apart <= 6e-2 * cpu_size) return true;
    printf("    %s, %d pairs: error %.2e, from the CPU %.2e\n", kern_type_name(l->shape.gate_type),
           p->a.n_pairs, error / size, apart / cpu_size);
    return false;
}

bool host_pass_check(host_pass *p, const float *out, compute *cpu)
{
    const size_t bytes = host_pass_out_bytes(p);
    if (p->gold == NULL) {
        if (!is_close(p, out, cpu)) return false;
        p->gold = ep_alloc(bytes);
        memcpy(p->gold, out, bytes);
        return true;
    }
    if (memcmp(p->gold, out, bytes) == 0) return true;
    printf("    %s, %d pairs: other bits than the first time\n",
           kern_type_name(p->layer->shape.gate_type), p->a.n_pairs);
    return false;
}
