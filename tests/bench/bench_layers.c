/*
 * Weights and routing for moed-bench kernels: layers of random but valid experts in one mapping
 * larger than the last-level cache, and pairs drawn from a seed.
 *
 * Only a few experts are packed from different rows; the others are copies at other addresses,
 * which memory and caches cannot tell from different ones. Routing is uniform: which rows share an
 * expert is drawn; which of the layer's experts it is, is the one longest untouched, so that
 * weights are cold.
 */
#include <stdlib.h>
#include <string.h>
#include "tests/bench/bench.h"

enum { N_DISTINCT = 4 };

uint32_t bench_next(bench_random *r)
{
    r->state = r->state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(r->state >> 32);
}

int bench_below(bench_random *r, int n)
{
    return (int)((uint64_t)bench_next(r) * (uint64_t)n >> 32);
}

/* ---- weights ---- */

/* A positive half between 2^-9 and 2^-7. */
static uint16_t random_half(bench_random *r)
{
    return (uint16_t)(6u << 10 | (bench_next(r) & 0x7ffu));
}

/* Where a block holds its half scales: offsets in bytes, -1: none. */
static void scale_places(int type, int place[2])
{
    place[0] = place[1] = -1;
    switch (type) {
    case KERN_Q4_K:
        place[0] = 0, place[1] = 2;
        break;
    case KERN_Q5_K:
        place[0] = 0, place[1] = 2;
        break;
    case KERN_Q6_K:
        place[0] = 208;
        break;
    default:
        place[0] = 0;
        break; /* the legacy types and GPTQ4 begin with d */
    }
}

static void random_float(bench_random *r, int type, uint8_t *dst)
{
    float x = ((float)(bench_next(r) >> 8) * 0x1p-24f - 0.5f) * 0.1f;
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    uint16_t bf16 = (uint16_t)(u >> 16), half = (uint16_t)(random_half(r) | (u >> 31) << 15);
    if (type == KERN_F32)
        memcpy(dst, &x, 4);
    else
        memcpy(dst, type == KERN_F16 ? &half : &bf16, 2);
}

void bench_weights(bench_random *r, int type, int n, int k, uint8_t *dst)
{
    int block_bytes = kern_type_block_bytes(type);
    size_t bytes = kern_type_row_bytes(type, k) * (size_t)n;
    if (kern_type_block(type) == 1) {
        for (size_t i = 0; i < bytes; i += (size_t)block_bytes)
            random_float(r, type, dst + i);
        return;
    }
    for (size_t i = 0; i < bytes; i++)
        dst[i] = (uint8_t)(bench_next(r) >> 24);
    int place[2];
    scale_places(type, place);
    for (size_t i = 0; i < bytes; i += (size_t)block_bytes) {
        for (int j = 0; j < 2 && place[j] >= 0; j++) {
            uint16_t h = random_half(r);
            memcpy(dst + i + place[j], &h, sizeof h);
        }
    }
}

/* Packs one expert of fresh random rows. */
static ep_status put_expert(kern_stack *s, int expert_i, bench_random *r)
{
    size_t in_bytes = kern_type_row_bytes(s->gate_type, s->hidden) * (size_t)s->inter;
    size_t out_bytes = kern_type_row_bytes(s->down_type, s->inter) * (size_t)s->hidden;
    uint8_t *rows = ep_alloc(2 * in_bytes + out_bytes);
    if (rows == NULL) return EP_ERR_NOMEM;
    bench_weights(r, s->gate_type, s->inter, s->hidden, rows);
    bench_weights(r, s->up_type, s->inter, s->hidden, rows + in_bytes);
    bench_weights(r, s->down_type, s->hidden, s->inter, rows + 2 * in_bytes);
    kern_stack_put(s, expert_i, rows, rows + in_bytes, rows + 2 * in_bytes);
    ep_free(rows);
    return EP_OK;
}

ep_status bench_layers_open(bench_layers *l, const bench_shape *shape, int type, size_t bytes,
                            size_t most, bench_random *r)
{
    kern_stack s;
    *l = (bench_layers){.shape = *shape, .type = type};
    kern_stack_shape(&s, type, type, type, shape->hidden, shape->inter, shape->n_experts);
    size_t per_expert = s.gate_up_stride + s.down_stride;
    while (l->shape.n_experts > 2 * l->shape.top_k &&
           per_expert * (size_t)l->shape.n_experts > most)
        l->shape.n_experts /= 2;
    s.n_experts = l->shape.n_experts;
    l->layer_bytes = per_expert * (size_t)s.n_experts;
    l->n_layers = (int)((bytes + l->layer_bytes - 1) / l->layer_bytes);
    l->bytes = l->layer_bytes * (size_t)l->n_layers;
    size_t n_all = (size_t)l->n_layers * (size_t)s.n_experts;
    l->memory = ep_map(l->bytes);
    l->stack = ep_calloc((size_t)l->n_layers, sizeof *l->stack);
    l->used = ep_calloc(n_all, sizeof *l->used);
    if (l->memory == NULL || l->stack == NULL || l->used == NULL) goto fail;
    for (int i = 0; i < l->n_layers; i++) {
        l->stack[i] = s;
        l->stack[i].gate_up = l->memory + (size_t)i * l->layer_bytes;
        l->stack[i].down = l->stack[i].gate_up + s.gate_up_stride * (size_t)s.n_experts;
        for (int e = 0; e < s.n_experts; e++) {
            if (i == 0 && e < N_DISTINCT) {
                if (put_expert(&l->stack[0], e, r) != EP_OK) goto fail;
                continue;
            }
            size_t from = (size_t)(e % (s.n_experts < N_DISTINCT ? s.n_experts : N_DISTINCT));
            memcpy(l->stack[i].gate_up + (size_t)e * s.gate_up_stride,
                   l->stack[0].gate_up + from * s.gate_up_stride, s.gate_up_stride);
            memcpy(l->stack[i].down + (size_t)e * s.down_stride,
                   l->stack[0].down + from * s.down_stride, s.down_stride);
        }
    }
    return EP_OK;
fail:
    bench_layers_close(l);
    return EP_ERR_NOMEM;
}

void bench_layers_close(bench_layers *l)
{
    ep_unmap(l->memory, l->bytes);
    ep_free(l->stack);
    ep_free(l->used);
    *l = (bench_layers){0};
}

/* ---- routing ---- */

ep_status bench_route_open(bench_route *t, const bench_layers *l, int max_rows, bench_random *r)
{
    size_t rows = (size_t)max_rows, pairs = rows * (size_t)l->shape.top_k;
    size_t hidden = (size_t)l->shape.hidden, experts = (size_t)l->shape.n_experts;
    *t = (bench_route){.offset = ep_calloc(experts + 1, sizeof *t->offset),
                       .pair_row = ep_calloc(pairs, sizeof *t->pair_row),
                       .pair_out = ep_calloc(pairs, sizeof *t->pair_out),
                       .chosen = ep_calloc(pairs, sizeof *t->chosen),
                       .label = ep_calloc(2 * experts, sizeof *t->label),
                       .x = ep_alloc(rows * hidden * sizeof *t->x),
                       .out = ep_calloc(pairs * hidden, sizeof *t->out)};
    if (t->offset == NULL || t->pair_row == NULL || t->pair_out == NULL || t->chosen == NULL ||
        t->label == NULL || t->x == NULL || t->out == NULL) {
        bench_route_close(t);
        return EP_ERR_NOMEM;
    }
    for (size_t i = 0; i < rows * hidden; i++)
        t->x[i] = (float)(bench_next(r) >> 8) * 0x1p-23f - 1.0f;
    return EP_OK;
}

void bench_route_close(bench_route *t)
{
    ep_free(t->offset);
    ep_free(t->pair_row);
    ep_free(t->pair_out);
    ep_free(t->chosen);
    ep_free(t->label);
    ep_free(t->x);
    ep_free(t->out);
    *t = (bench_route){0};
}

/* The untaken expert of a layer that was touched longest ago. */
static int coldest(const uint64_t *used, const int32_t *taken, int n)
{
    int best = -1;
    for (int e = 0; e < n; e++)
        if (!taken[e] && (best < 0 || used[e] < used[best])) best = e;
    return best;
}

void bench_route_draw(bench_route *t, bench_layers *l, int layer_i, int rows, bench_random *r)
{
    int n = l->shape.n_experts, k = l->shape.top_k;
    int32_t *label = t->label, *taken = t->label + n;
    uint64_t *used = l->used + (size_t)layer_i * (size_t)n;
    for (int e = 0; e < n; e++)
        label[e] = -1, taken[e] = 0;
    t->rows = rows;
    t->n_pairs = rows * k;
    t->n_touched = 0;
    l->clock++;
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j < k; j++) {
            int e, is_new;
            do { /* distinct within a row */
                e = bench_below(r, n);
                is_new = 1;
                for (int m = 0; m < j; m++)
                    is_new = is_new && t->chosen[i * k + m] != e;
            } while (!is_new);
            t->chosen[i * k + j] = e;
        }
    }
    for (int p = 0; p < t->n_pairs; p++) {
        int e = t->chosen[p];
        if (label[e] < 0) {
            label[e] = coldest(used, taken, n);
            taken[label[e]] = 1;
            t->n_touched++;
        }
        t->chosen[p] = label[e];
    }
    int at = 0;
    for (int e = 0; e < n; e++) {
        t->offset[e] = at;
        if (!taken[e]) continue;
        used[e] = l->clock;
        for (int p = 0; p < t->n_pairs; p++) {
            if (t->chosen[p] != e) continue;
            t->pair_row[at] = p / k;
            t->pair_out[at++] = p;
        }
    }
    t->offset[n] = at;
}
