/*
 * compute_cuda: a GPU behind the device contract: opening it, and stacks, which are two runs of
 * packed experts in device memory. Passes over them are pass.c.
 *
 * After a device error every call fails with EP_ERR_DEVICE, as CUDA's own state is lost. Different
 * experts may be loaded from different threads: they take turns at the device.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "kernels/cuda/device.h"
#include "kernels/cuda/pack.h"

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

ep_status gpu_check(compute *c, int e, const char *what)
{
    return e == cudaSuccess ? EP_OK : lose(c, (cudaError_t)e, what);
}

ep_status gpu_enter(compute *c)
{
    if (c->lost) return EP_ERR_DEVICE;
    return gpu_check(c, cudaSetDevice(c->device), "cudaSetDevice");
}

/* The same for a person who asked. */
static ep_status say(const compute *c, ep_status s, ep_err *err)
{
    if (s == EP_OK) return s;
    if (s == EP_ERR_DEVICE) return ep_fail(err, s, "%s", c->failure);
    return ep_fail(err, s, "device cuda:%d: %s", c->device, ep_status_name(s));
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

static void cuda_close(compute *c)
{
    if (c == NULL) return;
    cudaSetDevice(c->device);
    gpu_passes_close(c);
    if (c->has_lock) pthread_mutex_destroy(&c->lock);
    ep_pool_close(c->pool);
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
    ep_status s = cuda_can_open(device, err);
    if (s != EP_OK) return s;
    compute *c = ep_calloc(1, sizeof *c);
    if (c == NULL) return ep_fail(err, EP_ERR_NOMEM, "device %s: no memory", device);
    s = ep_pool_open(&c->pool, n_threads);
    if (s != EP_OK) {
        cuda_close(c);
        return ep_fail(err, s, "device %s: cannot start %d threads", device, n_threads);
    }
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
        what = "streams and events";
        e = (cudaError_t)gpu_passes_open(c);
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

static ep_pool *cuda_pool(compute *c)
{
    return c->pool;
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

void gpu_stack_close_graphs(compute_stack *s)
{
    cudaGraphExec_t *g = &s->graph[0][0][0][0];
    for (size_t i = 0; i < sizeof s->graph / sizeof *g; i++) {
        if (g[i] != NULL) cudaGraphExecDestroy(g[i]);
        g[i] = NULL;
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
    gpu_stack_close_graphs(s);
    for (int i = 0; i < 2; i++)
        if (s->w[i] != NULL) cudaFree(s->w[i]);
    ep_free(s);
}

gpu_gemm gpu_stack_plan(const compute_stack *s, int role, int form)
{
    gpu_gemm g = {.w = s->w[role], .m = s->m[role]};
    gpu_gemm_plan(&g, form, s->owner->smem_limit);
    return g;
}

/* Memory for one role of all experts, and the blocks that fit. A lost device is not taken for one
 * that is too small. */
static ep_status open_role(compute_stack *s, int role, ep_err *err)
{
    compute *c = s->owner;
    size_t bytes = s->m[role].bytes * (size_t)s->shape.n_experts;
    cudaError_t e = cudaMalloc((void **)&s->w[role], bytes);
    if (e == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return ep_fail(err, EP_ERR_NOMEM, "device cuda:%d: %zu MiB for %d experts: %s", c->device,
                       bytes >> 20, s->shape.n_experts, cudaGetErrorString(e));
    }
    for (int form = 0; form < GPU_FORMS && e == cudaSuccess; form++) {
        if (form == GPU_FORM_WGMMA && !s->wgmma) continue;
        gpu_gemm g = gpu_stack_plan(s, role, form);
        s->blocks[role][form] = c->n_sm * gpu_gemm_occupancy(&g, form);
        if (s->blocks[role][form] > 0) continue;
        e = cudaGetLastError(); /* what made it 0, if not the shared memory */
        if (e == cudaSuccess)
            return ep_fail(err, EP_ERR_UNSUPPORTED,
                           "device cuda:%d: %zu bytes of shared memory needed", c->device,
                           gpu_gemm_smem(&g, form));
    }
    return say(c, gpu_check(c, e, "opening of a stack"), err);
}

static ep_status cuda_stack_open(compute *c, const compute_shape *p, compute_stack **out,
                                 ep_err *err)
{
    ep_status status = check_shape(p, err);
    if (status != EP_OK) return status;
    status = gpu_enter(c);
    if (status != EP_OK) return say(c, status, err);
    compute_stack *s = ep_calloc(1, sizeof *s);
    if (s == NULL) return ep_fail(err, EP_ERR_NOMEM, "no memory for a stack");
    s->owner = c;
    s->shape = *p;
    s->wgmma = gpu_forms_serve(&c->forms, p->gate_type, p->down_type);
    s->m[ROLE_GATE_UP] = gpu_matrix_make(p->gate_type, p->inter, p->hidden, 1,
                                         kern_type_row_bytes(p->gate_type, p->hidden));
    s->m[ROLE_DOWN] = gpu_matrix_make(p->down_type, p->hidden, p->inter, 0,
                                      kern_type_row_bytes(p->down_type, p->inter));
    for (int i = 0; i < 2 && status == EP_OK; i++)
        status = open_role(s, i, err);
    if (status != EP_OK) {
        cuda_stack_close(s);
        return status;
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
    ep_status status = gpu_check(
        c, cudaMemcpyAsync(raw, a, bytes, cudaMemcpyHostToDevice, c->stream), "copy of weights");
    if (status == EP_OK && b != NULL)
        status =
            gpu_check(c, cudaMemcpyAsync(raw + bytes, b, bytes, cudaMemcpyHostToDevice, c->stream),
                      "copy of weights");
    if (status == EP_OK)
        status = gpu_check(c, gpu_launch_pack(m, raw, raw + bytes, to, c->stream), "pack kernel");
    if (status == EP_OK)
        status =
            gpu_check(c, cudaMemcpyAsync(packed, to, m->bytes, cudaMemcpyDeviceToHost, c->stream),
                      "copy of packed weights");
    if (status == EP_OK) status = gpu_check(c, cudaStreamSynchronize(c->stream), "pack kernel");
    return status;
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
    ep_status status = gpu_enter(c);
    if (status == EP_OK)
        status = gpu_check(c, cudaMalloc((void **)&raw, most), "memory for packing");
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
    ep_status status = gpu_enter(c);
    for (int i = 0; i < 2 && status == EP_OK; i++)
        status = gpu_check(c,
                           cudaMemcpy(packed + (i ? m[0].bytes : 0),
                                      s->w[i] + (size_t)expert_i * m[i].bytes, m[i].bytes,
                                      cudaMemcpyDeviceToHost),
                           "copy of packed weights");
    pthread_mutex_unlock(&c->lock);
    if (status == EP_OK) sum = gpu_checksum(packed, m[0].bytes, packed + m[0].bytes, m[1].bytes);
    ep_free(packed);
    return sum;
}

/* What a router works out for itself: the form of the weights' type. */
kern_act gpu_stack_act(const compute_stack *s)
{
    return kern_type_act(s->shape.gate_type);
}

static size_t cuda_stack_bytes(const compute_stack *s)
{
    return (s->m[0].bytes + s->m[1].bytes) * (size_t)s->shape.n_experts;
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
    .pool = cuda_pool,
    .stack_open = cuda_stack_open,
    .stack_load = cuda_stack_load,
    .stack_map = NULL,
    .stack_checksum = cuda_stack_checksum,
    .stack_act = gpu_stack_act,
    .stack_bytes = cuda_stack_bytes,
    .stack_close = cuda_stack_close,
    .reserve = gpu_reserve,
    .depth = COMPUTE_DEPTH,
    .ffn_begin = gpu_pass_begin,
    .ffn_is_done = gpu_pass_is_done,
    .ffn_end = gpu_pass_end,
    .pin = gpu_pin,
    .unpin = gpu_unpin,
    .failure = cuda_failure,
};
