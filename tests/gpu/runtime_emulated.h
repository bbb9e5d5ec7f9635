#ifndef EP_TESTS_GPU_RUNTIME_EMULATED_H
#define EP_TESTS_GPU_RUNTIME_EMULATED_H
/*
 * runtime_emulated: a CUDA run-time library and device code without a device, for programs that
 * prove the host side of CUDA shards (compute_cuda.c, form.c) on a CPU. It defines the functions of
 * cuda_runtime_api.h and of kernels/cuda/gpu.h that those files call; neither cudart nor an object
 * made by nvcc is linked.
 *
 * Time is the adversary. Copies, launches, records and waits are queued, keep the order of their
 * stream, and are otherwise done when a policy likes. Whatever the policy, two operations that
 * touch the same bytes without one being ordered before the other are a race and reported; so is
 * host code that touches device memory, or pinned memory that an operation not yet waited for uses.
 *
 * Every report is printed and counted. Host threads count as one: what orders them among each other
 * is not seen here.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum emulated_policy {
    EMULATED_EAGER, /* at once */
    EMULATED_LAZY,  /* only what somebody waits for */
    EMULATED_RANDOM /* some of any stream, between any two calls */
} emulated_policy;

/* What the kernels answer to the question of form.c. All but the first are cheap. */
typedef enum emulated_answer {
    EMULATED_COMPUTED,
    EMULATED_EQUAL,
    EMULATED_DIFFERENT, /* of Q6_K only */
    EMULATED_MISSING,   /* the wgmma kernel writes nothing */
    EMULATED_ENDLESS    /* it never ends */
} emulated_answer;

typedef struct emulated_options {
    emulated_policy policy;
    uint64_t seed;
    int n_devices;    /* each one's memory, streams and events serve no other */
    int major, minor; /* compute capability; its code was compiled for the same */
    int smem_limit;
    emulated_answer answer;
    /* One failure: the n-th call, or the n-th copy, memset or kernel while it is done; 0: none. */
    int fail_call, fail_op;
    int error; /* cudaErrorMemoryAllocation is over with the call, others stay for ever */
} emulated_options;
/* Two devices of compute capability 9.0, eager, equal answers. */
emulated_options emulated_options_default(void);

/* A new machine; everything of the one before is forgotten. */
void emulated_start(const emulated_options *o);
/* What was never freed or destroyed is reported. Returns the reports since start. */
int emulated_finish(void);

/* For tests that provoke reports: nothing is printed. */
void emulated_quiet(bool on);
const char *emulated_first_report(void); /* "" when there was none since start */

int emulated_calls(void);   /* calls since start that could have failed */
int emulated_ops(void);     /* copies, memsets and kernels done since start */
bool emulated_failed(void); /* whether the failure asked for has happened */

#endif
