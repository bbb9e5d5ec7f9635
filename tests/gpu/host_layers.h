#ifndef EP_TESTS_GPU_HOST_LAYERS_H
#define EP_TESTS_GPU_HOST_LAYERS_H
/*
 * host_layers: layers and passes for test_cuda_host: file rows, what the device has to answer by
 * float64 and by the CPU device, and the one place that drives a pass.
 */
#include "kernels/compute.h"

enum { HOST_EXPERTS = 6 };

typedef struct host_layer {
    compute_shape shape;
    uint8_t *file[3][HOST_EXPERTS]; /* gate, up, down */
    float *w[3][HOST_EXPERTS];      /* the same as floats */
    uint64_t packed[HOST_EXPERTS];  /* checksums of what the CPU packs */
    compute_stack *cpu;
} host_layer;

void host_layer_make(host_layer *l, compute *cpu, int gate_type, int down_type, int hidden,
                     int inter, int experts);
void host_layer_free(host_layer *l);
/* Opens and loads it on a device; checksums are those of the CPU's packing. */
ep_status host_layer_open(const host_layer *l, compute *c, compute_stack **out, ep_err *err);
ep_status host_layer_load(const host_layer *l, compute_stack *s, int expert_i);

typedef struct host_pass {
    const host_layer *layer;
    compute_ffn_args a; /* out: of its own */
    int32_t *offset, *row, *place;
    float *x;    /* the rows in float */
    float *gold; /* the first answer */
} host_pass;

void host_pass_make(host_pass *p, const host_layer *l, const int *counts, kern_act act);
void host_pass_free(host_pass *p);
size_t host_pass_rows_bytes(const host_pass *p);
size_t host_pass_out_bytes(const host_pass *p);
/* Runs one alone, into a->out. */
ep_status host_run(const compute_ops *ops, compute *c, compute_stack *s, const compute_ffn_args *a);
/* The first answer is compared with float64 and the CPU device and kept; later ones must have its
 * bits. False and a line when they do not. `out`: where the answer is. */
bool host_pass_check(host_pass *p, const float *out, compute *cpu);

#endif
