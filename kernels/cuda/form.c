/*
 * The choice between the forms of the product, and the question to a device whether its wgmma gives
 * the bits of its mma.sync. All forms add in one order down to the k-step of sixteen weights; how a
 * tensor core adds inside a step is not documented, so it is tried: values of very different size,
 * values that cancel, scales, minimums and segments, for every type, every width of the wgmma
 * kernel, full and ragged chunks. Where one bit differs, mma.sync serves the type alone.
 */
#include "kernels/cuda/form.h"
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "kernels/cuda/stage.h"

/* Pairs per active expert up to which a form serves, predictions until bench_cuda's columns say
 * better. SPLIT: few columns, so the time is that of reading weights. WGMMA: mma.sync decodes a
 * weight once for 32 columns at most, and falls behind memory at 24 to 32 (4.9 TB/s of four-bit
 * weights at half the rate of wgmma); wgmma computes multiples of 16 columns. */
enum { SPLIT_PAIRS = 16, WGMMA_PAIRS = 24 };

int gpu_forms_choose(const gpu_forms *f, bool wgmma, int pairs, int active)
{
    if (f->only_wgmma) return GPU_FORM_WGMMA;
    if (pairs <= SPLIT_PAIRS * active) return GPU_FORM_SPLIT;
    return wgmma && pairs > WGMMA_PAIRS * active ? GPU_FORM_WGMMA : GPU_FORM_WIDE;
}

bool gpu_forms_possible(const gpu_forms *f, bool wgmma, int most, int form)
{
    if (f->only_wgmma || form == GPU_FORM_WGMMA)
        return form == GPU_FORM_WGMMA && wgmma && (f->only_wgmma || most > WGMMA_PAIRS);
    return form == GPU_FORM_SPLIT || most > SPLIT_PAIRS;
}

/* ---- the question ---- */

static const int types[] = {KERN_Q4_K, KERN_Q6_K, KERN_Q8_0, KERN_GPTQ4, KERN_F16, KERN_BF16};

enum {
    N_TYPES = sizeof types / sizeof types[0],
    N_ROWS = 136, /* of weights: a chunk of eight row tiles, and one of one */
    K_TILES = 9,  /* more than segments; the second time two, so that a tile is a segment */
    N_EXPERTS = 3,
    N_PAIRS = 130,
    MOST_ENTRIES = 8,
    WAIT_MS = 10000 /* the answers take under one; tools that instrument kernels are slow */
};

/* Entries of 64, 41, 20 and 5 pairs: each width of the wgmma kernel. */
static const int32_t offsets[N_EXPERTS + 1] = {0, 105, 125, 130};

/* What goes to the device, in one copy. */
typedef struct question {
    uint8_t weights[9 * K_TILES * 16 * 512];           /* of all three experts */
    uint16_t value[2][N_PAIRS * K_TILES * GPU_TILE_K]; /* [form is wgmma]: the two orders */
    uint16_t sum[N_PAIRS * K_TILES * 16];
    gpu_entry list[2][MOST_ENTRIES]; /* up to here places are multiples of 16 */
    int32_t n_entries[2];
    float scale[N_PAIRS];
} question;

typedef struct answer {
    float out[N_PAIRS * N_ROWS];
} answer;

static uint64_t draw(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* Sign and mantissa at random, the exponent as well, within what rows can hold. */
static uint16_t any_value(uint64_t r, bool bf16)
{
    uint32_t bits = (uint32_t)r & 0xffff, e = (uint32_t)(r >> 32);
    return (uint16_t)(bf16 ? (bits & 0x807f) | (107 + e % 34) << 7
                           : (bits & 0x83ff) | e % 29 << 10);
}

static void ask_for(question *q, int type, int k_tiles)
{
    const bool bf16 = type == KERN_BF16;
    const int k = k_tiles * GPU_TILE_K;
    uint64_t state = 0x9e3779b97f4a7c15ull;
    for (size_t i = 0; i < sizeof q->weights; i += 8) {
        /* the upper bit of exponents stays clear: scales and 16-bit weights are finite */
        uint64_t r = draw(&state) & 0xbfffbfffbfffbfffull;
        memcpy(q->weights + i, &r, 8);
    }
    for (int row = 0; row < N_PAIRS; row++)
        for (int i = 0; i < k; i++) {
            uint16_t *to = q->value[1] + row * k;
            /* every other row: neighbours that cancel but for their last bit */
            to[i] = row % 2 && i % 2 ? to[i - 1] ^ 0x8001 : any_value(draw(&state), bf16);
            q->value[0][row * k + gpu_act_at(i)] = to[i];
        }
    for (int i = 0; i < N_PAIRS * k_tiles * 16; i++)
        q->sum[i] = any_value(draw(&state), false);
    for (int i = 0; i < N_PAIRS; i++)
        q->scale[i] = 1.0f;
    for (int i = 0; i < 2; i++)
        q->n_entries[i] = gpu_entries_build(q->list[i], offsets, N_EXPERTS,
                                            gpu_form_width(i ? GPU_FORM_WGMMA : GPU_FORM_WIDE));
}

/* Both forms of one question, queued; answers by [form is wgmma]. */
static int queue(question *on_device, answer *answers, int type, int k_tiles, int smem_limit,
                 cudaStream_t stream)
{
    int e = cudaSuccess;
    for (int i = 0; i < 2 && e == cudaSuccess; i++) {
        int form = i ? GPU_FORM_WGMMA : GPU_FORM_WIDE;
        gpu_gemm g = {.w = on_device->weights,
                      .m = gpu_matrix_make(type, N_ROWS, k_tiles * GPU_TILE_K, 0, 0),
                      .x = {on_device->value[i], on_device->scale, on_device->sum},
                      .list = on_device->list[i],
                      .n_entries = &on_device->n_entries[i],
                      .out = answers[i].out,
                      .ld = N_ROWS};
        g.m.bytes = 0; /* experts share their weights */
        gpu_gemm_plan(&g, form, smem_limit);
        e = gpu_launch_gemm(&g, form, 4, 0, stream);
    }
    return e;
}

/* A kernel that never ends must not take the caller along. */
static int wait_for(cudaStream_t stream)
{
    const struct timespec pause = {0, 100000};
    const ep_time end = ep_time_after_ms(ep_now(), WAIT_MS);
    int e = cudaStreamQuery(stream);
    while (e == cudaErrorNotReady && !ep_time_is_past(end, ep_now())) {
        nanosleep(&pause, NULL);
        e = cudaStreamQuery(stream);
    }
    cudaGetLastError(); /* "not ready" would be found there by the next launch */
    return e;
}

typedef struct probe {
    question *q, *on_device;
    answer *got, *answers; /* two each: host, device */
    cudaStream_t stream;
    int smem_limit;
} probe;

/* Whether the answers are equal, for one type; *missing when the wgmma kernel wrote nothing. */
static int ask(const probe *p, int type, bool *equal, bool *missing)
{
    int e = cudaSuccess;
    *equal = true;
    for (int k_tiles = K_TILES; k_tiles >= 2 && e == cudaSuccess; k_tiles -= K_TILES - 2) {
        ask_for(p->q, type, k_tiles);
        e = cudaMemcpyAsync(p->on_device, p->q, sizeof *p->q, cudaMemcpyHostToDevice, p->stream);
        if (e == cudaSuccess) e = cudaMemsetAsync(p->answers, 0xff, 2 * sizeof(answer), p->stream);
        if (e == cudaSuccess)
            e = queue(p->on_device, p->answers, type, k_tiles, p->smem_limit, p->stream);
        if (e == cudaSuccess) e = wait_for(p->stream);
        if (e == cudaSuccess)
            e = cudaMemcpyAsync(p->got, p->answers, 2 * sizeof(answer), cudaMemcpyDeviceToHost,
                                p->stream);
        if (e == cudaSuccess) e = cudaStreamSynchronize(p->stream);
        uint32_t first;
        memcpy(&first, p->got[1].out, sizeof first);
        *missing = first == UINT32_MAX;
        *equal = *equal && memcmp(&p->got[0], &p->got[1], sizeof(answer)) == 0;
    }
    return e;
}

/* Fills `wgmma` with the types whose answers are equal. After cudaErrorNotReady the device is still
 * busy: its memory stays. */
static int ask_all(gpu_forms *f, int smem_limit, bool *missing)
{
    probe p = {.smem_limit = smem_limit};
    int e = cudaErrorMemoryAllocation;
    p.q = ep_calloc(1, sizeof *p.q);
    p.got = ep_calloc(2, sizeof *p.got);
    if (p.q != NULL && p.got != NULL) e = cudaMalloc((void **)&p.on_device, sizeof *p.q);
    if (e == cudaSuccess) e = cudaMalloc((void **)&p.answers, 2 * sizeof(answer));
    if (e == cudaSuccess) e = cudaStreamCreateWithFlags(&p.stream, cudaStreamNonBlocking);
    for (int t = 0; t < N_TYPES && e == cudaSuccess && !*missing; t++) {
        bool equal;
        e = ask(&p, types[t], &equal, missing);
        if (e == cudaSuccess && equal) f->wgmma |= 1u << t;
    }
    if (e != cudaErrorNotReady) {
        if (p.stream != NULL) cudaStreamDestroy(p.stream);
        if (p.answers != NULL) cudaFree(p.answers);
        if (p.on_device != NULL) cudaFree(p.on_device);
    }
    ep_free(p.got);
    ep_free(p.q);
    return e;
}

/* ---- opening ---- */

static int type_bit(int type)
{
    int i = 0;
    while (types[i] != type)
        i++;
    return i;
}

bool gpu_forms_serve(const gpu_forms *f, int gate_type, int down_type)
{
    return f->only_wgmma ||
           ((f->wgmma >> type_bit(gate_type) & f->wgmma >> type_bit(down_type)) & 1);
}

static void say_found(gpu_forms *f, bool asked, const char *forced)
{
    const uint32_t all = (1u << N_TYPES) - 1;
    size_t at = (size_t)snprintf(f->line, sizeof f->line, "%s%s",
                                 f->only_wgmma     ? "wgmma"
                                 : f->wgmma == all ? "wgmma and mma.sync"
                                 : f->wgmma != 0   ? "mma.sync and in part wgmma"
                                                   : "mma.sync",
                                 forced != NULL ? " by MOED_CUDA_FORM" : "");
    if (!asked || f->wgmma == all) return;
    at += (size_t)snprintf(f->line + at, sizeof f->line - at, " (wgmma gives other bits:");
    for (int t = 0; t < N_TYPES && at < sizeof f->line; t++)
        if (!(f->wgmma >> t & 1))
            at += (size_t)snprintf(f->line + at, sizeof f->line - at, " %s",
                                   kern_type_name(types[t]));
    if (at < sizeof f->line) snprintf(f->line + at, sizeof f->line - at, ")");
}

static const char *from_environment(const char *name)
{
    const char *v = getenv(name);
    return v != NULL && v[0] != '\0' ? v : NULL;
}

ep_status gpu_forms_open(gpu_forms *f, int device, int smem_limit, ep_err *err)
{
    const char *form = from_environment("MOED_CUDA_FORM");
    const char *chain = from_environment("MOED_CUDA_CHAIN");
    int major = 0, minor = 0;
    memset(f, 0, sizeof *f);
    if (form != NULL && strcmp(form, "wgmma") != 0 && strcmp(form, "mma") != 0)
        return ep_fail(err, EP_ERR_INVALID,
                       "MOED_CUDA_FORM: unknown form \"%s\"; valid are wgmma, mma", form);
    if (chain != NULL && strcmp(chain, "on") != 0 && strcmp(chain, "off") != 0)
        return ep_fail(err, EP_ERR_INVALID, "MOED_CUDA_CHAIN: \"%s\"; valid are on, off", chain);
    f->only_wgmma = form != NULL && strcmp(form, "wgmma") == 0;
    int e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    /* Graphs take such launches since 12.3. Kernels that the driver made from code for an older
     * device do not wait (chain.cuh), so they must not overlap. */
    f->chained = CUDART_VERSION >= 12030 && major >= 9 && gpu_compiled_for() >= 90 &&
                 (chain == NULL || strcmp(chain, "on") == 0);
    bool possible = major == 9 && minor == 0, missing = false;
    bool asks = possible && (form == NULL || f->only_wgmma);
    if (e == cudaSuccess && asks) e = ask_all(f, smem_limit, &missing);
    if (e == cudaErrorNotReady)
        return ep_fail(err, EP_ERR_DEVICE,
                       "device cuda:%d: the wgmma kernels did not end in %d ms; with "
                       "MOED_CUDA_FORM=mma they are not used",
                       device, WAIT_MS);
    if (e != cudaSuccess)
        return ep_fail(err, EP_ERR_UNSUPPORTED,
                       "device cuda:%d: trying the wgmma kernels: %s (%d); with MOED_CUDA_FORM=mma "
                       "they are not used",
                       device, cudaGetErrorString((cudaError_t)e), e);
    if (f->only_wgmma && (!possible || missing))
        return ep_fail(err, EP_ERR_UNSUPPORTED, "device cuda:%d: MOED_CUDA_FORM=wgmma, but %s",
                       device,
                       possible ? "this program was not built for sm_90a"
                                : "that needs compute capability 9.0");
    f->runs_wgmma = asks && !missing;
    say_found(f, f->runs_wgmma, form);
    return EP_OK;
}
