/*
 * compute_cuda: a GPU behind the device contract. A stack is two runs of packed experts in device
 * memory; a pass is copies in, five launches replayed as one graph, copies out. Copies go through
 * two pinned slots, so that the caller's memory is touched while the device copies.
 *
 * Invariants: graphs hold pointers that stay until the next `reserve`; counts are read on the
 * device, so one graph serves every pass of its bucket; which graph serves a pass never changes a
 * bit of its results (form.h). After a device error every call fails with EP_ERR_DEVICE, as CUDA's
 * own state is lost.
 *
 * Different experts may be loaded from different threads: they take turns at the device.
 */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "kernels/compute.h"
#include "kernels/cuda/form.h"
#include "kernels/cuda/pack.h"

enum {
    COPY_BYTES = 1 << 20, /* of a pinned slot */
    N_BUCKETS = 4         /* of pairs: <= 16, 128, 1024, more */
};

static const int bucket_pairs[N_BUCKETS] = {16, 128, 1024, 1 << 30};

enum { ROLE_GATE_UP, ROLE_DOWN };

struct compute {
    int device, n_sm, smem_limit;
    bool lost, has_lock;
    char line[240], failure[240]; /* failure: of what was lost */
    gpu_forms forms;
    pthread_mutex_t lock;
    cudaStream_t stream;
    cudaEvent_t copied[2];
    uint8_t *pinned[2];
    compute_stack *stacks;
    /* scratch on the device, made by reserve */
    int max_rows, max_pairs, max_experts;
    uint8_t *in;      /* rows as they came */
    int32_t *control; /* gpu_counts, n_entries, then offsets, pair_row, pair_out */
    gpu_entry *list;
    gpu_rows x, hx;
    float *h, *out;
};

struct compute_stack {
    compute *owner;
    compute_stack *next;
    compute_shape shape;
    gpu_matrix m[2];
    uint8_t *w[2];
    bool wgmma;                                     /* that form may serve it */
    int blocks[2][GPU_FORMS];                       /* [role][form] */
    cudaGraphExec_t graph[N_BUCKETS][GPU_FORMS][2]; /* [bucket][form][rows are floats] */
};

/* ---- errors ---- */

static ep_status lose(compute *c, cudaError_t e, const char *what)
{
    if (e == cudaErrorMemoryAllocation && !c->lost) {
        log_error("device cuda:%d: %s: %s (%d)", c->device, what, cudaGetErrorString(e), (int)e);
        cudaGetLastError();
        return EP_ERR_NOMEM;
    }
    if (!c->lost) {
        snprintf(c->failure, sizeof c->failure, "device cuda:%d: %s: %s (%d)", c->device, what,
                 cudaGetErrorString(e), (int)e);
        log_error("%s", c->failure);
    }
    c->lost = true;
    return EP_ERR_DEVICE;
}

static ep_status check(compute *c, int e, const char *what)
{
    return e == cudaSuccess ? EP_OK : lose(c, (cudaError_t)e, what);
}

/* The device belongs to the thread that calls. */
static ep_status enter(compute *c)
{
    if (c->lost) return EP_ERR_DEVICE;
    return check(c, cudaSetDevice(c->device), "cudaSetDevice");
}

/* ---- opening ---- */

static bool parse(const char *device, int *n)
{
    if (strncmp(device, "cuda:", 5) != 0) return false;
    char *end;
    long v = strtol(device + 5, &end, 10);
    if (end == device + 5 || *end != '\0' || v < 0 || v > 1023 || device[5] < '0') return false;
    *n = (int)v;
    return true;
}

static ep_status cuda_can_open(const char *device, ep_err *err)
{
    int i, n = 0, major = 0;
    if (!parse(device, &i))
        return ep_fail(err, EP_ERR_INVALID, "device \"%s\": GPUs are named cuda:0, cuda:1, ...",
                       device);
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess)
        return ep_fail(err, EP_ERR_UNSUPPORTED, "device %s: no usable GPU: %s (%d)", device,
                       cudaGetErrorString(e), (int)e);
    if (i >= n)
        return ep_fail(err, EP_ERR_UNSUPPORTED, "device %s: this machine has %d GPU%s", device, n,
                       n == 1 ? "" : "s");
    e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
    if (e != cudaSuccess || major < 8)
        return ep_fail(err, EP_ERR_UNSUPPORTED,
                       "device %s: compute capability %d.x, 8.0 is the least that is served",
                       device, major);
    return EP_OK;
}

static void free_scratch(compute *c)
{
    void *const all[] = {c->in,       c->control,  c->list,   c->x.value, c->x.scale, c->x.sum,
                         c->hx.value, c->hx.scale, c->hx.sum, c->h,       c->out};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (all[i] != NULL) cudaFree(all[i]);
    c->in = NULL;
    c->control = NULL;
    c->list = NULL;
    c->x = c->hx = (gpu_rows){0};
    c->h = c->out = NULL;
}

static void cuda_close(compute *c)
{
    if (c == NULL) return;
    if (c->stream != NULL) {
        cudaSetDevice(c->device);
        cudaStreamSynchronize(c->stream);
        free_scratch(c);
        cudaStreamDestroy(c->stream);
    }
    for (int i = 0; i < 2; i++) {
        if (c->copied[i] != NULL) cudaEventDestroy(c->copied[i]);
        if (c->pinned[i] != NULL) cudaFreeHost(c->pinned[i]);
    }
    if (c->has_lock) pthread_mutex_destroy(&c->lock);
    ep_free(c);
}

static void describe(compute *c)
{
    struct cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, c->device) != cudaSuccess) return;
    snprintf(c->line, sizeof c->line, "cuda:%d, %.60s, sm_%d%d, %d multiprocessors, %zu GiB, %s",
             c->device, p.name, p.major, p.minor, c->n_sm, p.totalGlobalMem >> 30, c->forms.line);
}

static ep_status cuda_open(compute **out, const char *device, int n_threads, ep_err *err)
{
    (void)n_threads;
    ep_status s = cuda_can_open(device, err);
    if (s != EP_OK) return s;
    compute *c = ep_calloc(1, sizeof *c);
    if (c == NULL) return ep_fail(err, EP_ERR_NOMEM, "device %s: no memory", device);
    parse(device, &c->device);
    const char *what = "cudaSetDevice";
    cudaError_t e = cudaSetDevice(c->device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&c->n_sm, cudaDevAttrMultiProcessorCount, c->device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&c->smem_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   c->device);
    if (e == cudaSuccess) {
        what = "kernels for this GPU";
        e = (cudaError_t)gpu_gemm_prepare(c->smem_limit);
    }
    if (e == cudaSuccess) {
        s = gpu_forms_open(&c->forms, c->device, c->smem_limit, err);
        if (s != EP_OK) {
            cuda_close(c);
            return s;
        }
        describe(c);
        what = "a stream and pinned memory";
        e = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
    }
    for (int i = 0; i < 2 && e == cudaSuccess; i++) {
        e = cudaEventCreateWithFlags(&c->copied[i], cudaEventDisableTiming);
        if (e == cudaSuccess) e = cudaHostAlloc((void **)&c->pinned[i], COPY_BYTES, 0);
    }
    c->has_lock = e == cudaSuccess && pthread_mutex_init(&c->lock, NULL) == 0;
    if (!c->has_lock) {
        s = ep_fail(err, EP_ERR_UNSUPPORTED, "device %s: %s: %s (%d)", device, what,
                    cudaGetErrorString(e), (int)e);
        cuda_close(c);
        return s;
    }
    *out = c;
    return EP_OK;
}

static const char *cuda_describe(compute *c)
{
    return c->line;
}

/* ---- stacks ---- */

static ep_status check_matrix(const char *role, int type, int k, ep_err *err)
{
    const char *name = kern_type_name(type);
    if (!gpu_type_is_served(type))
        return ep_fail(
            err, EP_ERR_UNSUPPORTED,
            "%s: weights of type %d (%s) are not served on CUDA devices (Q4_K, Q6_K, Q8_0, "
            "GPTQ4, F16 and BF16 are)",
            role, type, name != NULL ? name : "unknown");
    if (k <= 0 || k > 65536 || k % kern_type_block(type) != 0)
        return ep_fail(err, EP_ERR_UNSUPPORTED,
                       "%s: rows of %d weights; %s needs a multiple of %d up to 65536", role, k,
                       name, kern_type_block(type));
    return EP_OK;
}

static ep_status check_shape(const compute_shape *p, ep_err *err)
{
    ep_status s = check_matrix("gate", p->gate_type, p->hidden, err);
    if (s == EP_OK) s = check_matrix("up", p->up_type, p->hidden, err);
    if (s == EP_OK) s = check_matrix("down", p->down_type, p->inter, err);
    if (s != EP_OK) return s;
    if (p->gate_type != p->up_type)
        return ep_fail(err, EP_ERR_UNSUPPORTED,
                       "gate is %s and up is %s: CUDA devices interleave them and need one type",
                       kern_type_name(p->gate_type), kern_type_name(p->up_type));
    if (p->n_experts < 1)
        return ep_fail(err, EP_ERR_INVALID, "a stack of %d experts", p->n_experts);
    return EP_OK;
}

static void close_graphs(compute_stack *s)
{
    for (int b = 0; b < N_BUCKETS; b++)
        for (int i = 0; i < 2 * GPU_FORMS; i++) {
            cudaGraphExec_t *g = &s->graph[b][i / 2][i % 2];
            if (*g != NULL) cudaGraphExecDestroy(*g);
            *g = NULL;
        }
}

static void cuda_stack_close(compute_stack *s)
{
    if (s == NULL) return;
    for (compute_stack **at = &s->owner->stacks; *at != NULL; at = &(*at)->next) {
        if (*at != s) continue;
        *at = s->next;
        break;
    }
    cudaSetDevice(s->owner->device);
    close_graphs(s);
    for (int i = 0; i < 2; i++)
        if (s->w[i] != NULL) cudaFree(s->w[i]);
    ep_free(s);
}

static gpu_gemm plan_of(const compute_stack *s, int role, int form)
{
    gpu_gemm g = {.w = s->w[role], .m = s->m[role]};
    gpu_gemm_plan(&g, form, s->owner->smem_limit);
    return g;
}

static ep_status cuda_stack_open(compute *c, const compute_shape *p, compute_stack **out,
                                 ep_err *err)
{
    ep_status status = check_shape(p, err);
    if (status == EP_OK) status = enter(c);
    if (status != EP_OK) return status;
    compute_stack *s = ep_calloc(1, sizeof *s);
    if (s == NULL) return ep_fail(err, EP_ERR_NOMEM, "no memory for a stack");
    s->owner = c;
    s->shape = *p;
    s->wgmma = gpu_forms_serve(&c->forms, p->gate_type, p->down_type);
    s->m[ROLE_GATE_UP] = gpu_matrix_make(p->gate_type, p->inter, p->hidden, 1,
                                         kern_type_row_bytes(p->gate_type, p->hidden));
    s->m[ROLE_DOWN] = gpu_matrix_make(p->down_type, p->hidden, p->inter, 0,
                                      kern_type_row_bytes(p->down_type, p->inter));
    for (int i = 0; i < 2; i++) {
        size_t bytes = s->m[i].bytes * (size_t)p->n_experts;
        cudaError_t e = cudaMalloc((void **)&s->w[i], bytes);
        if (e != cudaSuccess) {
            cudaGetLastError();
            status = ep_fail(err, EP_ERR_NOMEM, "device cuda:%d: %zu MiB for %d experts: %s",
                             c->device, bytes >> 20, p->n_experts, cudaGetErrorString(e));
            cuda_stack_close(s);
            return status;
        }
        for (int form = 0; form < GPU_FORMS; form++) {
            if (form == GPU_FORM_WGMMA && !s->wgmma) continue;
            gpu_gemm g = plan_of(s, i, form);
            s->blocks[i][form] = c->n_sm * gpu_gemm_occupancy(&g, form);
            if (s->blocks[i][form] > 0) continue;
            status = ep_fail(err, EP_ERR_UNSUPPORTED,
                             "device cuda:%d: %zu bytes of shared memory needed", c->device,
                             gpu_gemm_smem(&g, form));
            cuda_stack_close(s);
            return status;
        }
    }
    s->next = c->stacks;
    c->stacks = s;
    *out = s;
    return EP_OK;
}

/* File rows of one role up, packed there, and the packed bytes back for their checksum. */
static ep_status load_role(compute_stack *s, int role, int expert_i, const void *a, const void *b,
                           uint8_t *raw, uint8_t *packed)
{
    compute *c = s->owner;
    const gpu_matrix *m = &s->m[role];
    size_t bytes = (size_t)m->n * m->row_bytes;
    uint8_t *to = s->w[role] + (size_t)expert_i * m->bytes;
    ep_status status = check(c, cudaMemcpyAsync(raw, a, bytes, cudaMemcpyHostToDevice, c->stream),
                             "copy of weights");
    if (status == EP_OK && b != NULL)
        status = check(c, cudaMemcpyAsync(raw + bytes, b, bytes, cudaMemcpyHostToDevice, c->stream),
                       "copy of weights");
    if (status == EP_OK)
        status = check(c, gpu_launch_pack(m, raw, raw + bytes, to, c->stream), "pack kernel");
    if (status == EP_OK)
        status = check(c, cudaMemcpyAsync(packed, to, m->bytes, cudaMemcpyDeviceToHost, c->stream),
                       "copy of packed weights");
    if (status == EP_OK) status = check(c, cudaStreamSynchronize(c->stream), "pack kernel");
    return status;
}

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

static ep_status cuda_stack_load(compute_stack *s, int expert_i, const void *gate, const void *up,
                                 const void *down, uint64_t *checksum)
{
    if (expert_i < 0 || expert_i >= s->shape.n_experts) return EP_ERR_INVALID;
    compute *c = s->owner;
    const gpu_matrix *gu = &s->m[ROLE_GATE_UP], *dn = &s->m[ROLE_DOWN];
    uint8_t *packed = ep_alloc(gu->bytes + dn->bytes), *raw = NULL;
    if (packed == NULL) return EP_ERR_NOMEM;
    size_t most = larger(2 * (size_t)gu->n * gu->row_bytes, (size_t)dn->n * dn->row_bytes);
    pthread_mutex_lock(&c->lock);
    ep_status status = enter(c);
    if (status == EP_OK) status = check(c, cudaMalloc((void **)&raw, most), "memory for packing");
    if (status == EP_OK) status = load_role(s, ROLE_GATE_UP, expert_i, gate, up, raw, packed);
    if (status == EP_OK)
        status = load_role(s, ROLE_DOWN, expert_i, down, NULL, raw, packed + gu->bytes);
    if (raw != NULL) cudaFree(raw);
    pthread_mutex_unlock(&c->lock);
    if (status == EP_OK) *checksum = gpu_checksum(packed, gu->bytes, packed + gu->bytes, dn->bytes);
    ep_free(packed);
    return status;
}

/* 0 when the device no longer answers: no loaded expert's checksum is compared with that. */
static uint64_t cuda_stack_checksum(compute_stack *s, int expert_i)
{
    compute *c = s->owner;
    const gpu_matrix *m = s->m;
    uint8_t *packed = ep_alloc(m[0].bytes + m[1].bytes);
    uint64_t sum = 0;
    if (packed == NULL) return 0;
    pthread_mutex_lock(&c->lock);
    ep_status status = enter(c);
    for (int i = 0; i < 2 && status == EP_OK; i++)
        status =
            check(c,
                  cudaMemcpy(packed + (i ? m[0].bytes : 0), s->w[i] + (size_t)expert_i * m[i].bytes,
                             m[i].bytes, cudaMemcpyDeviceToHost),
                  "copy of packed weights");
    pthread_mutex_unlock(&c->lock);
    if (status == EP_OK) sum = gpu_checksum(packed, m[0].bytes, packed + m[0].bytes, m[1].bytes);
    ep_free(packed);
    return sum;
}

/* What a router works out for itself: the form of the weights' type. */
static kern_act cuda_stack_act(const compute_stack *s)
{
    return kern_type_act(s->shape.gate_type);
}

static size_t cuda_stack_bytes(const compute_stack *s)
{
    return (s->m[0].bytes + s->m[1].bytes) * (size_t)s->shape.n_experts;
}

/* ---- a pass ---- */

typedef struct control {
    int32_t *counts, *n_entries, *offset, *pair_row, *pair_out;
} control;

static control control_of(const compute *c)
{
    int32_t *p = c->control;
    return (control){.counts = p,
                     .n_entries = p + 2,
                     .offset = p + 4,
                     .pair_row = p + 5 + c->max_experts,
                     .pair_out = p + 5 + c->max_experts + c->max_pairs};
}

/* The five launches of a pass, queued on the stream. The list comes first: a product may then read
 * it, and start on its weights, while the rows before it are still being made (chain.cuh). */
static ep_status queue_pass(compute *c, const compute_stack *s, int most_rows, int most_pairs,
                            int form, kern_act act)
{
    const control k = control_of(c);
    const gpu_matrix *m = s->m;
    const int chained = c->forms.chained;
    gpu_gemm gate_up = plan_of(s, ROLE_GATE_UP, form), down = plan_of(s, ROLE_DOWN, form);
    gate_up.x = c->x;
    gate_up.pair_row = k.pair_row;
    gate_up.out = c->h;
    gate_up.ld = s->shape.inter;
    down.x = c->hx;
    down.pair_out = k.pair_out;
    down.out = c->out;
    down.ld = s->shape.hidden;
    gate_up.list = down.list = c->list;
    gate_up.n_entries = down.n_entries = k.n_entries;
    const char *what = "list kernel";
    int e = gpu_launch_list(k.offset, s->shape.n_experts, gpu_form_width(form), c->list,
                            k.n_entries, c->stream);
    if (e == cudaSuccess) {
        what = "rows kernel";
        e = gpu_launch_rows(act, c->in, c->x, k.counts, most_rows, m[0].k, m[0].type == KERN_BF16,
                            form, chained, c->stream);
    }
    if (e == cudaSuccess) {
        what = "gate_up kernel";
        e = gpu_launch_gemm(&gate_up, form, s->blocks[0][form], chained, c->stream);
    }
    if (e == cudaSuccess) {
        what = "hidden rows kernel";
        e = gpu_launch_rows(KERN_ACT_F32, c->h, c->hx, k.counts + 1, most_pairs, m[1].k,
                            m[1].type == KERN_BF16, form, chained, c->stream);
    }
    if (e == cudaSuccess) {
        what = "down kernel";
        e = gpu_launch_gemm(&down, form, s->blocks[1][form], chained, c->stream);
    }
    return check(c, e, what);
}

static int at_most(int a, int b)
{
    return a < b ? a : b;
}

static ep_status capture(compute *c, compute_stack *s, int bucket, int form, int floats)
{
    cudaGraph_t graph = NULL;
    ep_status status = check(c, cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal),
                             "capture of a graph");
    if (status != EP_OK) return status;
    status = queue_pass(c, s, at_most(bucket_pairs[bucket], c->max_rows),
                        at_most(bucket_pairs[bucket], c->max_pairs), form,
                        floats ? KERN_ACT_F32 : cuda_stack_act(s));
    cudaError_t e = cudaStreamEndCapture(c->stream, &graph);
    if (status == EP_OK) status = check(c, e, "capture of a graph");
    if (status == EP_OK)
        status = check(c, cudaGraphInstantiate(&s->graph[bucket][form][floats], graph, 0),
                       "making of a graph");
    if (graph != NULL) cudaGraphDestroy(graph);
    return status;
}

static ep_status take(compute *c, void *p, size_t n, size_t bytes)
{
    void *got = NULL;
    ep_status status = check(c, cudaMalloc(&got, n * bytes + 256), "memory of a pass");
    if (status == EP_OK) memcpy(p, &got, sizeof got); /* a pointer of any type */
    return status;
}

static ep_status take_rows(compute *c, gpu_rows *r, size_t n, size_t k_tiles)
{
    ep_status s = take(c, &r->value, n, k_tiles * GPU_TILE_K * 2);
    if (s == EP_OK) s = take(c, &r->scale, n, sizeof(float));
    if (s == EP_OK) s = take(c, &r->sum, n, k_tiles * (GPU_TILE_K / 16) * sizeof(uint16_t));
    return s;
}

static ep_status take_scratch(compute *c)
{
    size_t hidden = 0, inter = 0, tiles[2] = {0, 0}, rows = (size_t)c->max_rows;
    size_t pairs = (size_t)c->max_pairs;
    for (const compute_stack *s = c->stacks; s != NULL; s = s->next) {
        hidden = larger(hidden, (size_t)s->shape.hidden);
        inter = larger(inter, (size_t)s->shape.inter);
        for (int i = 0; i < 2; i++)
            tiles[i] = larger(tiles[i], (size_t)s->m[i].k_tiles);
        if (s->shape.n_experts > c->max_experts) c->max_experts = s->shape.n_experts;
    }
    ep_status s = take(c, &c->in, rows, 4 * hidden);
    if (s == EP_OK)
        s = take(c, &c->control, 8 + (size_t)c->max_experts + 2 * pairs, sizeof(int32_t));
    int most = gpu_entries_most(c->max_pairs, c->max_experts, GPU_NARROW_COLS);
    if (s == EP_OK) s = take(c, &c->list, (size_t)most, sizeof(gpu_entry));
    if (s == EP_OK) s = take_rows(c, &c->x, rows, tiles[0]);
    if (s == EP_OK) s = take_rows(c, &c->hx, pairs, tiles[1]);
    if (s == EP_OK) s = take(c, &c->h, pairs, inter * sizeof(float));
    if (s == EP_OK) s = take(c, &c->out, pairs, hidden * sizeof(float));
    return s;
}

static ep_status cuda_reserve(compute *c, int max_rows, int max_pairs)
{
    if (max_pairs > GPU_MOST_PAIRS) return EP_ERR_TOO_LARGE;
    ep_status status = enter(c);
    if (status != EP_OK) return status;
    free_scratch(c);
    c->max_rows = max_rows;
    c->max_pairs = max_pairs;
    status = take_scratch(c);
    for (compute_stack *s = c->stacks; s != NULL && status == EP_OK; s = s->next) {
        close_graphs(s);
        for (int b = 0; b < N_BUCKETS && status == EP_OK; b++)
            for (int i = 0; i < 2 * GPU_FORMS && status == EP_OK; i++)
                if (gpu_forms_possible(&c->forms, s->wgmma, bucket_pairs[b], i / 2))
                    status = capture(c, s, b, i / 2, i % 2);
    }
    if (status != EP_OK) {
        free_scratch(c);
        c->max_rows = c->max_pairs = 0;
    }
    return status;
}

/* Copies through the two pinned slots: one is filled or emptied while the device works on the
 * other. */
static ep_status copy_in(compute *c, void *dst, const void *src, size_t bytes, int *slot)
{
    for (size_t at = 0; at < bytes; at += COPY_BYTES, *slot ^= 1) {
        size_t n = bytes - at < COPY_BYTES ? bytes - at : COPY_BYTES;
        ep_status s = check(c, cudaEventSynchronize(c->copied[*slot]), "copy to the device");
        if (s != EP_OK) return s;
        memcpy(c->pinned[*slot], (const uint8_t *)src + at, n);
        s = check(c,
                  cudaMemcpyAsync((uint8_t *)dst + at, c->pinned[*slot], n, cudaMemcpyHostToDevice,
                                  c->stream),
                  "copy to the device");
        if (s == EP_OK)
            s = check(c, cudaEventRecord(c->copied[*slot], c->stream), "copy to the device");
        if (s != EP_OK) return s;
    }
    return EP_OK;
}

/* `after`: the launch that a failure is of, as kernels fail while the host waits for them. */
static ep_status copy_out(compute *c, void *dst, const void *src, size_t bytes, const char *after)
{
    size_t n[2] = {0, 0}, from[2] = {0, 0};
    int slot = 0;
    for (size_t at = 0; at < bytes + 2 * (size_t)COPY_BYTES; at += COPY_BYTES, slot ^= 1) {
        ep_status s = check(c, cudaEventSynchronize(c->copied[slot]), after);
        if (s != EP_OK) return s;
        memcpy((uint8_t *)dst + from[slot], c->pinned[slot], n[slot]);
        n[slot] = 0;
        if (at >= bytes) continue;
        from[slot] = at;
        n[slot] = bytes - at < COPY_BYTES ? bytes - at : COPY_BYTES;
        s = check(c,
                  cudaMemcpyAsync(c->pinned[slot], (const uint8_t *)src + at, n[slot],
                                  cudaMemcpyDeviceToHost, c->stream),
                  "copy from the device");
        if (s == EP_OK)
            s = check(c, cudaEventRecord(c->copied[slot], c->stream), "copy from the device");
        if (s != EP_OK) return s;
    }
    return EP_OK;
}

/* Offsets ascend from 0 to n_pairs, and every pair names a row and a place that exist. */
static bool is_sound(const compute_ffn_args *a, int n_experts, int *active)
{
    *active = 0;
    if (a->n_rows < 0 || a->n_pairs < 0 || a->expert_offset[0] != 0) return false;
    for (int e = 0; e < n_experts; e++) {
        if (a->expert_offset[e] > a->expert_offset[e + 1]) return false;
        *active += a->expert_offset[e] < a->expert_offset[e + 1];
    }
    if (a->expert_offset[n_experts] != a->n_pairs) return false;
    for (int i = 0; i < a->n_pairs; i++) {
        if (a->pair_row[i] < 0 || a->pair_row[i] >= a->n_rows) return false;
        if (a->pair_out[i] < 0 || a->pair_out[i] >= a->n_pairs) return false;
    }
    return true;
}

/* CUDA does not say which kernel of a graph failed. */
static const char *const pass_names[GPU_FORMS] = {
    [GPU_FORM_SPLIT] = "a pass (list, rows and split product kernels)",
    [GPU_FORM_WIDE] = "a pass (list, rows and wide product kernels)",
    [GPU_FORM_WGMMA] = "a pass (list, rows and wgmma product kernels)"};

static ep_status cuda_ffn(compute *c, compute_stack *s, const compute_ffn_args *a)
{
    int active, bucket = 0, slot = 0;
    if (a->n_rows > c->max_rows || a->n_pairs > c->max_pairs) return EP_ERR_TOO_LARGE;
    if (a->act != KERN_ACT_F32 && a->act != cuda_stack_act(s)) return EP_ERR_INVALID;
    if (!is_sound(a, s->shape.n_experts, &active)) return EP_ERR_INVALID;
    if (a->n_pairs == 0) return EP_OK;
    const control k = control_of(c);
    const int32_t counts[2] = {a->n_rows, a->n_pairs};
    const size_t word = sizeof(int32_t), pairs = (size_t)a->n_pairs;
    ep_status status = enter(c);
    if (status == EP_OK)
        status = copy_in(c, c->in, a->rows,
                         (size_t)a->n_rows * kern_act_row_bytes(a->act, s->shape.hidden), &slot);
    if (status == EP_OK) status = copy_in(c, k.counts, counts, sizeof counts, &slot);
    if (status == EP_OK)
        status =
            copy_in(c, k.offset, a->expert_offset, ((size_t)s->shape.n_experts + 1) * word, &slot);
    if (status == EP_OK) status = copy_in(c, k.pair_row, a->pair_row, pairs * word, &slot);
    if (status == EP_OK) status = copy_in(c, k.pair_out, a->pair_out, pairs * word, &slot);
    if (status != EP_OK) return status;
    while (a->n_pairs > bucket_pairs[bucket])
        bucket++;
    int form = gpu_forms_choose(&c->forms, s->wgmma, a->n_pairs, active);
    int floats = a->act == KERN_ACT_F32;
    status = check(c, cudaGraphLaunch(s->graph[bucket][form][floats], c->stream), pass_names[form]);
    if (status == EP_OK)
        status = copy_out(c, a->out, c->out, pairs * (size_t)s->shape.hidden * sizeof(float),
                          pass_names[form]);
    return status;
}

static const char *cuda_failure(const compute *c)
{
    return c->failure;
}

const compute_ops compute_cuda = {
    .kind = "cuda",
    .can_open = cuda_can_open,
    .open = cuda_open,
    .close = cuda_close,
    .describe = cuda_describe,
    .stack_open = cuda_stack_open,
    .stack_load = cuda_stack_load,
    .stack_map = NULL,
    .stack_checksum = cuda_stack_checksum,
    .stack_act = cuda_stack_act,
    .stack_bytes = cuda_stack_bytes,
    .stack_close = cuda_stack_close,
    .reserve = cuda_reserve,
    .ffn = cuda_ffn,
    .failure = cuda_failure,
};
