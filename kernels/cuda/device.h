#ifndef EP_KERNELS_CUDA_DEVICE_H
#define EP_KERNELS_CUDA_DEVICE_H
/*
 * device: a GPU behind the device contract, as compute_cuda.c (opening, stacks) and pass.c
 * (scratch, passes) see it. Private to these two. Called by the thread that drives the
 * device.
 */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include "kernels/compute.h"
#include "kernels/cuda/form.h"

enum {
    GPU_BUCKETS = 4, /* of pairs: <= 16, 128, 1024, more */
    GPU_PINNED = 4   /* ranges of host memory */
};

enum { ROLE_GATE_UP, ROLE_DOWN };

/* A pass under way, or room for one. */
typedef struct gpu_slot {
    uint8_t *in;                         /* device: rows as they came */
    int32_t *control;                    /* device: counts and lists (control_of) */
    float *out;                          /* device: result rows */
    int32_t *lists;                      /* pinned: what `control` becomes */
    cudaEvent_t arrived, computed, done; /* rows are there; results are; the pass is over */
    bool is_empty;                       /* nothing was asked of the device */
    int form;
    float *to; /* results that gpu_pass_end copies itself, as that memory is not pinned; or NULL */
    size_t bytes;
} gpu_slot;

struct compute {
    int device, n_sm, smem_limit;
    bool lost, has_lock;
    char line[240], failure[240]; /* failure: of what was lost */
    gpu_forms forms;
    ep_pool *pool; /* of the host, for checksums of messages */
    pthread_mutex_t lock;
    cudaStream_t stream, in_stream, out_stream; /* computing and packing; copies of large passes */
    compute_stack *stacks;
    struct {
        const uint8_t *at;
        size_t bytes; /* 0: not in use */
    } pinned[GPU_PINNED];
    /* scratch, made by reserve */
    int max_rows, max_pairs, max_experts;
    gpu_slot slots[COMPUTE_DEPTH];
    int oldest, n_under_way; /* of slots, a ring */
    gpu_entry *list;
    gpu_rows x, hx;
    float *h;
};

struct compute_stack {
    compute *owner;
    compute_stack *next;
    compute_shape shape;
    gpu_matrix m[2];
    uint8_t *w[2];
    bool wgmma;               /* that form may serve it */
    int blocks[2][GPU_FORMS]; /* [role][form] */
    /* [slot][bucket][form][rows are floats] */
    cudaGraphExec_t graph[COMPUTE_DEPTH][GPU_BUCKETS][GPU_FORMS][2];
};

static inline size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* The status of a call that returned e; a device error is remembered, said once, and is for good.
 */
ep_status gpu_check(compute *c, int e, const char *what);
/* The device belongs to the thread that calls. EP_ERR_DEVICE once it is lost. */
ep_status gpu_enter(compute *c);
/* Fills in what depends on the form of a product over the stack's weights. */
gpu_gemm gpu_stack_plan(const compute_stack *s, int role, int form);
kern_act gpu_stack_act(const compute_stack *s);
void gpu_stack_close_graphs(compute_stack *s);

/* pass.c: streams and events (a cudaError_t), then the operations of compute_ops. */
int gpu_passes_open(compute *c);
void gpu_passes_close(compute *c);
ep_status gpu_reserve(compute *c, int max_rows, int max_pairs);
ep_status gpu_pass_begin(compute *c, compute_stack *s, const compute_ffn_args *a);
bool gpu_pass_is_done(compute *c);
ep_status gpu_pass_end(compute *c);
ep_status gpu_pin(compute *c, void *memory, size_t bytes);
void gpu_unpin(compute *c, void *memory);

#endif
