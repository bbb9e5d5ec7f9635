/*
 * moed-bench layer: the experts of one MoE layer through loopback. N shards are threads of this
 * process, the caller is the router: it converts rows, makes slices, waits, combines, as a router
 * rank does. The same rows go through kern_ffn directly in the same run, on the threads of one
 * shard; "ratio" is the whole layer over that. With one shard it is the price of the way there and
 * back (1.0: free); N shards on N free cores come down towards 1/N.
 *
 * CSV on standard output, times in microseconds, medians. `wait` is the time from the last slice
 * sent to the last reply in, `compute` the largest time that a shard reports; `direct` converts the
 * rows and computes all pairs, without combine. Experts are chosen at random for each row, so every
 * expert is busy, as with mixed traffic.
 */
#include "tests/bench/bench_layer.h"

#include "expert_shard/shard.h"
#include "kernels/kernels.h"
#include "proto/wire.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_SHARDS  16
#define MAX_REPEATS 200
#define MIN_REPEATS 5
#define POINT_MS    400 /* time spent on one line */
#define WAIT_MS     20000

enum { DISPATCH, WAIT, COMPUTE, COMBINE, TOTAL, DIRECT, N_TIMES };

typedef struct server {
    shard *s;
    net *n;
    pthread_t thread;
    bool is_running;
} server;

typedef struct bench {
    model *m;
    model_placement p;
    int layer, n_shards, max_rows, hidden, top_k;
    kern_act form;
    net_hub *hub;
    net *n; /* the router's, rank 0 */
    server servers[MAX_SHARDS];
    ep_pool *pool; /* of the direct run */
    kern_stack stack;
    size_t gate_up_bytes, down_bytes, scratch_bytes;
    void *scratch;
    float *x, *y, *pairs_out; /* [rows, hidden], [rows, hidden], [pairs, hidden] */
    uint8_t *acts;
    int16_t *experts;                      /* [rows, top_k] */
    int32_t *offset, *pair_row, *pair_out; /* of the direct run */
    uint32_t *of_shard;   /* [n_shards][max_pairs] pairs in the order of the slice */
    const float **row_of; /* [pairs] row of a reply */
    net_buf *replies[MAX_SHARDS];
    uint64_t sequence, state;
    double times[N_TIMES][MAX_REPEATS];
} bench;

static uint32_t next_random(bench *b)
{
    b->state = b->state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(b->state >> 33);
}

static void *serve_main(void *arg)
{
    server *sv = arg;
    (void)shard_serve(sv->s, sv->n, NULL, NULL);
    return NULL;
}

/* ---- the direct run -----------------------------------------------------------------------------
 */

static ep_status open_direct(bench *b, int n_threads)
{
    const model_layer *l = &b->m->layers[b->layer];
    int n_experts = b->m->shape.n_experts, max_pairs = b->max_rows * b->top_k;
    kern_stack_shape(&b->stack, l->gate_exps->type, l->up_exps->type, l->down_exps->type, b->hidden,
                     b->m->shape.inter, n_experts);
    b->gate_up_bytes = b->stack.gate_up_stride * (size_t)n_experts;
    b->down_bytes = b->stack.down_stride * (size_t)n_experts;
    b->stack.gate_up = ep_map(b->gate_up_bytes);
    b->stack.down = ep_map(b->down_bytes);
    b->scratch_bytes = kern_ffn_scratch_bytes(&b->stack, b->max_rows, max_pairs, n_threads);
    b->scratch = ep_map(b->scratch_bytes);
    if (b->stack.gate_up == NULL || b->stack.down == NULL || b->scratch == NULL)
        return EP_ERR_NOMEM;
    ep_buf made[3] = {{0}};
    ep_status status = EP_OK;
    for (int e = 0; e < n_experts && status == EP_OK; e++) {
        const uint8_t *rows[3];
        for (int r = 0; r < 3 && status == EP_OK; r++)
            status =
                model_rows(b->m, model_experts(b->m, b->layer, r), e, &made[r], &rows[r], NULL);
        if (status == EP_OK) kern_stack_put(&b->stack, e, rows[0], rows[1], rows[2]);
    }
    for (int r = 0; r < 3; r++)
        ep_buf_fini(&made[r]);
    return status == EP_OK ? ep_pool_open(&b->pool, n_threads) : status;
}

/* Sorts outside of the measured time: a plan belongs to the router in either case. */
static void sort_direct(bench *b, int rows)
{
    int n_experts = b->m->shape.n_experts, n = 0;
    for (int e = 0; e < n_experts; e++) {
        b->offset[e] = n;
        for (int i = 0; i < rows * b->top_k; i++) {
            if (b->experts[i] != e) continue;
            b->pair_row[n] = i / b->top_k;
            b->pair_out[n++] = i;
        }
    }
    b->offset[n_experts] = n;
}

static double run_direct(bench *b, int rows)
{
    ep_time begin = ep_now();
    kern_act_rows(b->form, b->acts, b->x, (size_t)b->hidden, rows, b->hidden);
    kern_ffn_args args = {.rows = b->acts,
                          .act = b->form,
                          .n_rows = rows,
                          .n_pairs = rows * b->top_k,
                          .expert_offset = b->offset,
                          .pair_row = b->pair_row,
                          .pair_out = b->pair_out,
                          .out = b->pairs_out};
    kern_ffn(b->pool, &b->stack, &args, b->scratch);
    return (double)ep_time_diff_ns(ep_now(), begin) / 1e3;
}

/* ---- through the shards -------------------------------------------------------------------------
 */

/* One slice: the rows that this shard needs, once each, and the pairs. 0: nothing for it. */
static ep_status send_slice(bench *b, int shard_i, int rows, uint32_t *n_pairs)
{
    size_t row_bytes = kern_act_row_bytes(b->form, b->hidden);
    uint32_t *order = b->of_shard + (size_t)shard_i * (size_t)(b->max_rows * b->top_k);
    wire_header h = {.kind = WIRE_SLICE,
                     .epoch = b->p.epoch,
                     .shard = (uint16_t)shard_i,
                     .sequence = ++b->sequence,
                     .layer = (uint16_t)b->layer,
                     .form = (uint16_t)b->form,
                     .hidden = (uint32_t)b->hidden};
    *n_pairs = 0;
    int last = -1;
    for (int i = 0; i < rows * b->top_k; i++) {
        if (b->p.owner[b->experts[i]] != shard_i) continue;
        h.n_rows += i / b->top_k != last;
        last = i / b->top_k;
        order[h.n_pairs++] = (uint32_t)i;
    }
    if (h.n_pairs == 0) return EP_OK;
    net_buf *m = net_take(b->n, wire_slice_bytes(b->form, h.hidden, h.n_rows, h.n_pairs));
    if (m == NULL) return EP_ERR_NOMEM;
    m->len = wire_slice_bytes(b->form, h.hidden, h.n_rows, h.n_pairs);
    uint8_t *to = m->data + wire_slice_rows_at(),
            *pairs = m->data + wire_slice_pairs_at(b->form, h.hidden, h.n_rows);
    uint32_t row = 0;
    last = -1;
    for (uint32_t i = 0; i < h.n_pairs; i++) {
        int r = (int)order[i] / b->top_k;
        if (r != last) {
            memcpy(to + row * row_bytes, b->acts + (size_t)r * row_bytes, row_bytes);
            row++;
        }
        last = r;
        wire_put_pair(pairs, i,
                      (wire_pair){.row = row - 1,
                                  .expert = (uint16_t)b->experts[order[i]],
                                  .slot = (uint16_t)((int)order[i] % b->top_k)});
    }
    memset(to + row * row_bytes, 0, (size_t)(pairs - to) - row * row_bytes);
    wire_seal(m->data, m->len, &h);
    *n_pairs = h.n_pairs;
    return net_send(b->n, 1 + shard_i, m);
}

static ep_status take_replies(bench *b, int n_replies, uint64_t *compute_ns)
{
    ep_time give_up = ep_time_after_ms(ep_now(), WAIT_MS);
    *compute_ns = 0;
    while (n_replies > 0) {
        net_buf *r;
        ep_status status = net_next(b->n, &r);
        if (status == EP_AGAIN) {
            if (ep_time_is_past(give_up, ep_now())) return EP_ERR_DEADLINE;
            (void)net_wait(b->n, give_up);
            continue;
        }
        if (status != EP_OK) return status;
        wire_header h;
        wire_reason why;
        if (wire_open(r->data, r->len, &h, &why) != EP_OK || h.kind != WIRE_REPLY)
            return EP_ERR_PROTO;
        const uint32_t *order = b->of_shard + (size_t)h.shard * (size_t)(b->max_rows * b->top_k);
        const float *rows = wire_reply_rows(r->data, &h);
        for (uint32_t i = 0; i < h.n_pairs; i++)
            b->row_of[order[i]] = rows + (size_t)i * h.hidden;
        if (h.compute_ns > *compute_ns) *compute_ns = h.compute_ns;
        b->replies[h.shard] = r;
        n_replies--;
    }
    return EP_OK;
}

static ep_status run_layer(bench *b, int rows, double *times)
{
    ep_time t0 = ep_now();
    int n_replies = 0;
    kern_act_rows(b->form, b->acts, b->x, (size_t)b->hidden, rows, b->hidden);
    for (int s = 0; s < b->n_shards; s++) {
        uint32_t n_pairs;
        ep_status status = send_slice(b, s, rows, &n_pairs);
        if (status != EP_OK) return status;
        n_replies += n_pairs > 0;
    }
    ep_time t1 = ep_now();
    uint64_t compute_ns;
    ep_status status = take_replies(b, n_replies, &compute_ns);
    if (status != EP_OK) return status;
    ep_time t2 = ep_now();
    memset(b->y, 0, (size_t)rows * (size_t)b->hidden * sizeof(float));
    for (int i = 0; i < rows * b->top_k; i++)
        kern_axpy(b->y + (size_t)(i / b->top_k) * (size_t)b->hidden, b->row_of[i],
                  1.0f / (float)b->top_k, b->hidden);
    ep_time t3 = ep_now();
    for (int s = 0; s < b->n_shards; s++) {
        net_give(b->n, b->replies[s]);
        b->replies[s] = NULL;
    }
    times[DISPATCH] = (double)ep_time_diff_ns(t1, t0) / 1e3;
    times[WAIT] = (double)ep_time_diff_ns(t2, t1) / 1e3;
    times[COMPUTE] = (double)compute_ns / 1e3;
    times[COMBINE] = (double)ep_time_diff_ns(t3, t2) / 1e3;
    times[TOTAL] = (double)ep_time_diff_ns(t3, t0) / 1e3;
    return EP_OK;
}

/* ---- open and close -----------------------------------------------------------------------------
 */

static ep_status open_buffers(bench *b)
{
    size_t rows = (size_t)b->max_rows, hidden = (size_t)b->hidden, pairs = rows * (size_t)b->top_k;
    b->x = ep_alloc(rows * hidden * sizeof(float));
    b->y = ep_alloc(rows * hidden * sizeof(float));
    b->pairs_out = ep_alloc(pairs * hidden * sizeof(float));
    b->acts = ep_alloc(rows * kern_act_row_bytes(b->form, b->hidden));
    b->experts = ep_alloc(pairs * sizeof(*b->experts));
    b->offset = ep_alloc(((size_t)b->m->shape.n_experts + 1) * sizeof(*b->offset));
    b->pair_row = ep_alloc(pairs * sizeof(*b->pair_row));
    b->pair_out = ep_alloc(pairs * sizeof(*b->pair_out));
    b->of_shard = ep_alloc((size_t)b->n_shards * pairs * sizeof(*b->of_shard));
    b->row_of = ep_calloc(pairs, sizeof(const float *));
    if (b->x == NULL || b->y == NULL || b->pairs_out == NULL || b->acts == NULL ||
        b->experts == NULL || b->offset == NULL || b->pair_row == NULL || b->pair_out == NULL ||
        b->of_shard == NULL || b->row_of == NULL)
        return EP_ERR_NOMEM;
    for (size_t i = 0; i < rows * hidden; i++)
        b->x[i] = (float)next_random(b) / 1073741824.0f - 1.0f;
    return EP_OK;
}

static ep_status open_servers(bench *b, int n_threads, ep_err *err)
{
    ep_status status = net_hub_open(&b->hub, b->n_shards + 1, NULL, NULL);
    if (status != EP_OK) return ep_fail(err, status, "no loopback for %d shards", b->n_shards);
    uint32_t pairs = (uint32_t)(b->max_rows * b->top_k), hidden = (uint32_t)b->hidden;
    net_options opt = net_options_default();
    size_t slice = wire_slice_bytes(KERN_ACT_F32, hidden, (uint32_t)b->max_rows, pairs);
    opt.max_message =
        wire_reply_bytes(hidden, pairs) > slice ? wire_reply_bytes(hidden, pairs) : slice;
    opt.n_ranks = b->n_shards + 1;
    opt.n_buffers = 2 * b->n_shards + 4;
    for (int i = 0; i <= b->n_shards; i++) {
        opt.rank = i;
        status = net_loopback_open(i == 0 ? &b->n : &b->servers[i - 1].n, b->hub, &opt);
        if (status != EP_OK) return ep_fail(err, status, "loopback rank %d", i);
    }
    for (int i = 0; i < b->n_shards; i++) {
        server *sv = &b->servers[i];
        shard_options so = {.m = b->m,
                            .placement = &b->p,
                            .shard_i = i,
                            .device = "cpu",
                            .n_threads = n_threads,
                            .max_rows = b->max_rows};
        status = shard_open(&sv->s, &so, err);
        if (status != EP_OK) return status;
        sv->is_running = pthread_create(&sv->thread, NULL, serve_main, sv) == 0;
        if (!sv->is_running) return ep_fail(err, EP_ERR_NOMEM, "no thread for shard %d", i);
    }
    b->form = shard_layer_form(b->servers[0].s, b->layer);
    return EP_OK;
}

static void bench_close(bench *b)
{
    for (int i = 0; i < b->n_shards; i++) {
        server *sv = &b->servers[i];
        if (sv->s != NULL) shard_stop(sv->s);
        if (sv->is_running) pthread_join(sv->thread, NULL);
        shard_close(sv->s);
        net_close(sv->n);
    }
    net_close(b->n);
    net_hub_close(b->hub);
    ep_pool_close(b->pool);
    ep_unmap(b->stack.gate_up, b->gate_up_bytes);
    ep_unmap(b->stack.down, b->down_bytes);
    ep_unmap(b->scratch, b->scratch_bytes);
    ep_free(b->x);
    ep_free(b->y);
    ep_free(b->pairs_out);
    ep_free(b->acts);
    ep_free(b->experts);
    ep_free(b->offset);
    ep_free(b->pair_row);
    ep_free(b->pair_out);
    ep_free(b->of_shard);
    ep_free(b->row_of);
    model_placement_fini(&b->p);
    model_close(b->m);
}

/* ---- one line -----------------------------------------------------------------------------------
 */

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, int n)
{
    qsort(x, (size_t)n, sizeof(*x), compare_doubles);
    return x[n / 2];
}

/* Different experts for each row, uniformly. */
static void choose_experts(bench *b, int rows)
{
    int n_experts = b->m->shape.n_experts;
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < b->top_k; k++) {
            int16_t *row = b->experts + r * b->top_k;
            bool taken = true;
            while (taken) {
                row[k] = (int16_t)(next_random(b) % (uint32_t)n_experts);
                taken = false;
                for (int j = 0; j < k; j++)
                    taken |= row[j] == row[k];
            }
        }
}

static ep_status run_point(bench *b, int rows)
{
    int n = 0;
    ep_time end = ep_time_after_ms(ep_now(), POINT_MS);
    for (int i = -2; n < MIN_REPEATS || (n < MAX_REPEATS && !ep_time_is_past(end, ep_now())); i++) {
        double times[N_TIMES] = {0};
        choose_experts(b, rows);
        sort_direct(b, rows);
        ep_status status = run_layer(b, rows, times);
        if (status != EP_OK) return status;
        times[DIRECT] = run_direct(b, rows);
        if (i < 0) continue; /* warm-up */
        for (int t = 0; t < N_TIMES; t++)
            b->times[t][n] = times[t];
        n++;
    }
    double m[N_TIMES];
    for (int t = 0; t < N_TIMES; t++)
        m[t] = median(b->times[t], n);
    printf("%d,%d,%d,%d,%.1f,%.1f,%.1f,%.1f,%.1f,%.1f,%.2f\n", rows, rows * b->top_k, b->n_shards,
           n, m[DISPATCH], m[WAIT], m[COMPUTE], m[COMBINE], m[TOTAL], m[DIRECT],
           m[TOTAL] / m[DIRECT]);
    fflush(stdout);
    return EP_OK;
}

static int usage(FILE *to, int status)
{
    fprintf(to, "usage: moed-bench layer MODEL.gguf [SHARDS [THREADS [MAX_ROWS [LAYER]]]]\n"
                "Defaults: 2 shards of 1 thread, 512 rows, layer 0.\n");
    return status;
}

/* A number between least and most; -1: none. */
static int number(const char *text, int least, int most)
{
    char *end;
    long v = strtol(text, &end, 10);
    return *text == '\0' || *end != '\0' || v < least || v > most ? -1 : (int)v;
}

int bench_layer(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "--help") == 0) return usage(stdout, 0);
    if (argc < 2 || argc > 6) return usage(stderr, 2);
    int n_shards = argc > 2 ? number(argv[2], 1, MAX_SHARDS) : 2;
    int n_threads = argc > 3 ? number(argv[3], 1, 256) : 1;
    int max_rows = argc > 4 ? number(argv[4], 1, 4096) : 512;
    int layer = argc > 5 ? number(argv[5], 0, 65535) : 0;
    if (n_shards < 0 || n_threads < 0 || max_rows < 0 || layer < 0) return usage(stderr, 2);

    ep_err err = {{0}};
    int result = 1;
    bench *b = ep_calloc(1, sizeof(*b));
    if (b == NULL) return 1;
    b->state = 20260711;
    b->n_shards = n_shards;
    b->max_rows = max_rows;
    b->layer = layer;
    ep_status status = kern_select("auto", &err);
    if (status == EP_OK) status = model_open(&b->m, argv[1], &err);
    if (status != EP_OK) goto fail;
    b->hidden = b->m->shape.hidden;
    b->top_k = b->m->shape.top_k;
    if (layer >= b->m->shape.n_layers || n_shards > b->m->shape.n_experts) {
        status = ep_fail(&err, EP_ERR_INVALID, "%s has %d layers and %d experts", argv[1],
                         b->m->shape.n_layers, b->m->shape.n_experts);
        goto fail;
    }
    status = model_placement_make(&b->p, b->m->shape.n_experts, n_shards, NULL, 1, &err);
    if (status == EP_OK) status = open_servers(b, n_threads, &err);
    if (status == EP_OK) status = open_buffers(b);
    if (status == EP_OK) status = open_direct(b, n_threads);
    if (status != EP_OK) goto fail;
    fprintf(stderr,
            "kernels %s, %d shards of %d threads, layer %d, hidden %d, inter %d, top %d of %d\n",
            kern_level(), n_shards, n_threads, layer, b->hidden, b->m->shape.inter, b->top_k,
            b->m->shape.n_experts);
    printf(
        "rows,pairs,shards,n,dispatch_us,wait_us,compute_us,combine_us,total_us,direct_us,ratio\n");
    for (int rows = 1; rows <= max_rows && status == EP_OK; rows *= 2)
        status = run_point(b, rows);
    if (status != EP_OK) goto fail;
    result = 0;
fail:
    if (status != EP_OK)
        fprintf(stderr, "moed-bench layer: %s\n",
                err.text[0] != '\0' ? err.text : ep_status_name(status));
    bench_close(b);
    ep_free(b);
    return result;
}
