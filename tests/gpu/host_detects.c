/*
 * Proof of the emulated machine itself: faults made on purpose, by calls of the run-time library,
 * each found under every policy; the same done right is not complained of. And its products are
 * those of plain loops over the tiles.
 */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "base/base.h"
#include "kernels/cuda/gpu.h"
#include "kernels/cuda/pack.h"
#include "tests/gpu/host_tests.h"
#include "tests/gpu/runtime_emulated.h"
#include "tests/kernels/check.h"
#include "tests/test.h"
#include "tests/unit/tile_product.h"

enum { BYTES = 8192 };

static cudaStream_t s[2];
static cudaEvent_t event;
static uint8_t *pinned, *device, *other, pageable[BYTES];

static void open_all(void)
{
    cudaSetDevice(1);
    for (int i = 0; i < 2; i++)
        cudaStreamCreateWithFlags(&s[i], cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    cudaHostAlloc((void **)&pinned, BYTES, 0);
    cudaMalloc((void **)&device, BYTES);
    cudaMalloc((void **)&other, BYTES);
}

static void close_all(void)
{
    for (int i = 0; i < 2; i++)
        cudaStreamSynchronize(s[i]);
    cudaFree(other);
    cudaFree(device);
    cudaFreeHost(pinned);
    cudaEventDestroy(event);
    for (int i = 0; i < 2; i++)
        cudaStreamDestroy(s[i]);
}

static void in(int i)
{
    cudaMemcpyAsync(device, pinned, BYTES, cudaMemcpyHostToDevice, s[i]);
}

/* ---- what is right ---- */

static void right_order(void)
{
    memset(pinned, 1, BYTES);
    in(0);
    cudaEventRecord(event, s[0]);
    cudaStreamWaitEvent(s[1], event, 0);
    cudaMemcpyAsync(other, device, BYTES, cudaMemcpyDeviceToDevice, s[1]);
    cudaEventSynchronize(event);
    memset(pinned, 2, BYTES);
    cudaMemcpyAsync(pageable, other, BYTES, cudaMemcpyDeviceToHost, s[1]);
    CHECK_INT(pageable[BYTES - 1], 1);
}

static void right_polling(void)
{
    memset(pinned, 1, BYTES);
    in(0);
    cudaEventRecord(event, s[0]);
    while (cudaEventQuery(event) == cudaErrorNotReady) {
    }
    memset(pinned, 2, BYTES);
    cudaGetLastError(); /* "not ready", which the next launch would find */
    cudaMemsetAsync(device, 0, 64, s[0]);
    CHECK_INT(gpu_launch_list((int32_t *)device, 1, 16, (gpu_entry *)other, (int32_t *)other, s[0]),
              cudaSuccess);
}

static void right_registered(void)
{
    uint8_t *mine = NULL;
    if (posix_memalign((void **)&mine, 4096, BYTES) != 0) abort();
    memset(mine, 3, BYTES);
    cudaHostRegister(mine, BYTES, 0);
    cudaMemcpyAsync(device, mine, BYTES, cudaMemcpyHostToDevice, s[0]);
    CHECK_INT(mine[77], 3); /* reading is allowed */
    cudaMemcpyAsync(mine, device, BYTES, cudaMemcpyDeviceToHost, s[0]);
    cudaStreamSynchronize(s[0]);
    mine[0] = 4;
    cudaHostUnregister(mine);
    free(mine);
}

/* ---- what is wrong ---- */

static void no_wait(void)
{
    memset(pinned, 1, BYTES);
    in(0);
    cudaMemcpyAsync(other, device, BYTES, cudaMemcpyDeviceToDevice, s[1]);
}

static void early_record(void)
{
    cudaEventRecord(event, s[0]);
    in(0);
    cudaStreamWaitEvent(s[1], event, 0);
    cudaMemcpyAsync(other, device, BYTES, cudaMemcpyDeviceToDevice, s[1]);
}

static void never_recorded(void)
{
    in(0);
    cudaStreamWaitEvent(s[1], event, 0);
    cudaMemsetAsync(device, 0, 1, s[1]);
}

static void default_stream(void)
{
    cudaMemcpy(device, pageable, BYTES, cudaMemcpyHostToDevice);
    cudaMemcpyAsync(other, device, BYTES, cudaMemcpyDeviceToDevice, s[0]);
}

static void pinned_too_early(void)
{
    in(0);
    cudaEventRecord(event, s[1]);
    cudaEventSynchronize(event);
    pinned[5000] = 1;
}

static void read_too_early(void)
{
    cudaMemsetAsync(device, 7, BYTES, s[0]);
    cudaMemcpyAsync(pinned, device, 100, cudaMemcpyDeviceToHost, s[0]);
    pageable[0] = *(volatile uint8_t *)(pinned + 99);
}

static void free_too_early(void)
{
    void *p;
    cudaMalloc(&p, BYTES);
    cudaMemsetAsync(p, 0, BYTES, s[0]);
    cudaFree(p);
}

static void used_after_free(void)
{
    void *p;
    cudaMalloc(&p, BYTES);
    cudaFree(p);
    cudaMemsetAsync(p, 0, BYTES, s[0]);
}

static void too_long(void)
{
    cudaMemsetAsync(device + 1, 0, BYTES, s[0]);
}

static void wrong_kind(void)
{
    cudaMemcpyAsync(pageable, pinned, BYTES, cudaMemcpyDeviceToHost, s[0]);
}

static void wrong_device(void)
{
    void *p;
    cudaSetDevice(0);
    cudaMalloc(&p, BYTES);
    cudaMemsetAsync(p, 0, BYTES, s[0]);
    cudaStreamSynchronize(s[0]);
    cudaFree(p);
}

static void unset_device(void)
{
    cudaSetDevice(0);
    gpu_launch_list((int32_t *)device, 1, 16, (gpu_entry *)other, (int32_t *)device + 8, s[0]);
}

static void twice(void)
{
    cudaEvent_t e;
    cudaEventCreateWithFlags(&e, 0);
    cudaEventDestroy(e);
    cudaEventDestroy(e);
}

static void leak(void)
{
    void *p;
    cudaHostAlloc(&p, BYTES, 0);
}

static void alloc_in_capture(void)
{
    cudaGraph_t graph;
    void *p;
    cudaStreamBeginCapture(s[0], cudaStreamCaptureModeThreadLocal);
    cudaMalloc(&p, 16);
    cudaStreamEndCapture(s[0], &graph);
    cudaGraphDestroy(graph);
}

static void counts_of_nobody(void)
{
    gpu_rows to = {(uint16_t *)other, (float *)other, (uint16_t *)other};
    gpu_launch_rows(KERN_ACT_F32, device, to, (int32_t *)device, 1, 256, 1, 0, 0, s[0]);
}

static void chained_first(void)
{
    gpu_rows to = {(uint16_t *)other, (float *)(other + 4096), NULL};
    cudaMemsetAsync(device, 0, BYTES, s[0]);
    gpu_launch_rows(KERN_ACT_F32, device, to, (int32_t *)device, 1, 256, 1, 0, 1, s[0]);
}

typedef struct scene {
    const char *name;
    void (*act)(void);
    const char *says; /* NULL: nothing */
} scene;

static const scene scenes[] = {
    {"right order", right_order, NULL},
    {"right polling", right_polling, NULL},
    {"right registered", right_registered, NULL},
    {"no wait", no_wait, "races with"},
    {"early record", early_record, "races with"},
    {"never recorded", never_recorded, "races with"},
    {"default stream", default_stream, "races with"},
    {"pinned too early", pinned_too_early, "host code writes"},
    {"read too early", read_too_early, "host code touches"},
    {"free too early", free_too_early, "nobody waited for"},
    {"used after free", used_after_free, "was freed"},
    {"too long", too_long, "of a piece of"},
    {"wrong kind", wrong_kind, "a copy of kind"},
    {"wrong device", wrong_device, "memory of device 0"},
    {"unset device", unset_device, "device 0 is set"},
    {"twice", twice, "was destroyed"},
    {"leak", leak, "never given back"},
    {"alloc in capture", alloc_in_capture, "captures a graph"},
    {"counts of nobody", counts_of_nobody, "-1 rows"},
    {"chained first", chained_first, "no kernel"},
};

int host_detects(void)
{
    test_failures = 0;
    for (size_t i = 0; i < sizeof scenes / sizeof scenes[0]; i++)
        for (int policy = EMULATED_EAGER; policy <= EMULATED_RANDOM; policy++) {
            const scene *c = &scenes[i];
            emulated_options o = emulated_options_default();
            o.policy = (emulated_policy)policy;
            emulated_start(&o);
            emulated_quiet(c->says != NULL);
            open_all();
            c->act();
            close_all();
            int n = emulated_finish();
            emulated_quiet(false);
            bool found = c->says == NULL
                             ? n == 0
                             : n > 0 && strstr(emulated_first_report(), c->says) != NULL;
            CHECK(found);
            if (!found) printf("    %s: \"%s\"\n", c->name, emulated_first_report());
        }
    /* host code in device memory cannot go on */
    emulated_options o = emulated_options_default();
    emulated_start(&o);
    open_all();
    fflush(stdout);
    int status = 0;
    pid_t child = fork();
    if (child == 0) {
        fclose(stdout);
        device[0] = 1;
        _exit(0);
    }
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    close_all();
    return test_failures;
}

/* ---- the products ---- */

enum { N = 24, ROWS = 11, EXPERTS = 2 };

static const int32_t offsets[EXPERTS + 1] = {0, 9, ROWS};

static void *to_device(const void *p, size_t bytes)
{
    void *d;
    cudaMalloc(&d, bytes);
    if (p != NULL) cudaMemcpy(d, p, bytes, cudaMemcpyHostToDevice);
    cudaDeviceSynchronize();
    return d;
}

static float plain(const gpu_matrix *m, const uint8_t *w, int row, const float *x)
{
    float sum = 0.0f;
    const uint8_t *tiles = w + (size_t)(row / 16 * m->k_tiles) * (size_t)m->tile_bytes;
    for (int kt = 0; kt < m->k_tiles; kt++)
        sum += tile_product(m->type, tiles + (size_t)(kt * m->tile_bytes), row % 16,
                            x + kt * GPU_TILE_K);
    return sum;
}

static void check_type(int type, int form)
{
    const int k = 512;
    gpu_matrix m = gpu_matrix_make(type, N, k, 0, kern_type_row_bytes(type, k));
    uint8_t *file = ep_alloc(N * m.row_bytes), *w = ep_alloc(EXPERTS * m.bytes);
    float *x = ep_alloc(sizeof(float) * (size_t)(ROWS * k)), out[ROWS * N];
    for (int e = 0; e < EXPERTS; e++) {
        check_file_rows(type, MODE_RANDOM, N, k, file);
        gpu_pack(&m, file, NULL, w + (size_t)e * m.bytes);
    }
    for (int i = 0; i < ROWS * k; i++)
        x[i] = (float)(check_below(255) - 127) / 16; /* exact in both small forms */
    const int32_t n = ROWS;
    gpu_rows rows = {to_device(NULL, (size_t)(ROWS * k * 2)), to_device(NULL, sizeof(float) * ROWS),
                     to_device(NULL, (size_t)(ROWS * k / 8))};
    gpu_gemm g = {.w = to_device(w, EXPERTS * m.bytes),
                  .m = m,
                  .x = rows,
                  .list = to_device(NULL, sizeof(gpu_entry) * 8),
                  .n_entries = to_device(NULL, 4),
                  .out = to_device(NULL, sizeof out),
                  .ld = N};
    void *src = to_device(x, sizeof(float) * (size_t)(ROWS * k));
    int32_t *count = to_device(&n, 4), *offset = to_device(offsets, sizeof offsets);
    gpu_gemm_plan(&g, form, 227 * 1024);
    gpu_launch_list(offset, EXPERTS, gpu_form_width(form), (gpu_entry *)(uintptr_t)g.list,
                    (int32_t *)(uintptr_t)g.n_entries, s[0]);
    gpu_launch_rows(KERN_ACT_F32, src, rows, count, ROWS, k, type == KERN_BF16, form, 0, s[0]);
    CHECK_INT(gpu_launch_gemm(&g, form, 4, 0, s[0]), 0);
    cudaMemcpyAsync(out, g.out, sizeof out, cudaMemcpyDeviceToHost, s[0]);
    double error = 0, size = 0;
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < N; j++) {
            float want = plain(&m, w + (i < offsets[1] ? 0 : m.bytes), j, x + i * k);
            error += fabs((double)out[i * N + j] - want);
            size += fabs((double)want);
        }
    CHECK(error <= 1e-5 * size);
    ep_free(file);
    ep_free(w);
    ep_free(x);
}

int host_stand_in(void)
{
    test_failures = 0;
    static const int types[] = {KERN_Q4_K, KERN_Q6_K, KERN_Q8_0, KERN_GPTQ4, KERN_F16, KERN_BF16};
    emulated_options o = emulated_options_default();
    emulated_start(&o);
    open_all();
    for (int i = 0; i < 6; i++)
        for (int form = 0; form < GPU_FORMS; form++)
            check_type(types[i], form);
    emulated_quiet(true); /* nothing is freed */
    emulated_finish();
    emulated_quiet(false);
    CHECK(strstr(emulated_first_report(), "pieces of memory") != NULL);
    return test_failures;
}
