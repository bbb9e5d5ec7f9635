#ifndef EP_KERNELS_COMPUTE_H
#define EP_KERNELS_COMPUTE_H
/*
 * compute: the device contract, the only thing a shard sees of where its experts live. Whole
 * operations on opaque objects, each returning ep_status; never "get me the pointer".
 * cpu/compute_cpu.c serves it with kernels.h, cuda/compute_cuda.c with a GPU. One thread drives a
 * compute object.
 */
#include "base/base.h"
#include "kernels/formats.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct compute compute;             /* a device */
typedef struct compute_stack compute_stack; /* the owned experts of one layer on it */

typedef struct compute_shape {
    int gate_type, up_type, down_type; /* kern_type of the file */
    int hidden, inter, n_experts;
    bool paged; /* experts come by stack_map: strides are multiples of KERN_PAGE */
} compute_shape;

typedef struct compute_ffn_args {
    const void *rows; /* host memory: n_rows rows of kern_act_row_bytes(act, hidden) */
    kern_act act;     /* compute_ops.stack_act of this stack, or KERN_ACT_F32 */
    int n_rows, n_pairs;
    const int32_t *expert_offset; /* [n_experts + 1], pairs sorted by (local) expert */
    const int32_t *pair_row;      /* [n_pairs] */
    const int32_t *pair_out;      /* [n_pairs] row of out */
    float *out;                   /* host memory [n_pairs, hidden] */
} compute_ffn_args;

enum { COMPUTE_DEPTH = 2 }; /* passes under way on any device at most */

typedef struct compute_ops {
    const char *kind; /* "cpu", "cuda" */
    /* Whether `device` ("cpu", "cuda:1") can be opened here; EP_ERR_UNSUPPORTED with the reason. */
    ep_status (*can_open)(const char *device, ep_err *err);
    ep_status (*open)(compute **out, const char *device, int n_threads, ep_err *err);
    void (*close)(compute *c);
    /* One line for status: "cpu, avx512, 2 threads". Lives as long as c. */
    const char *(*describe)(compute *c);
    /* Its threads on the host, free for other work except inside calls of this table. Belongs to c;
     * NULL: none. */
    ep_pool *(*pool)(compute *c);
    /* Room for the experts of a layer. Sizes are checked: EP_ERR_NOMEM, EP_ERR_UNSUPPORTED (type).
     */
    ep_status (*stack_open)(compute *c, const compute_shape *shape, compute_stack **out,
                            ep_err *err);
    /* Loads and packs one expert from file rows; *checksum is that of the packed bytes. Different
     * experts of a stack may be loaded from different threads at once. */
    ep_status (*stack_load)(compute_stack *s, int expert_i, const void *gate, const void *up,
                            const void *down, uint64_t *checksum);
    /* Maps one expert, packed already, from a file: gate_up and down of the stack's strides at
     * these places (multiples of KERN_PAGE). The stack was opened with `paged`. errno says why not.
     * NULL for devices that cannot: they load and pack. Threads as stack_load. */
    ep_status (*stack_map)(compute_stack *s, int expert_i, int fd, uint64_t gate_up_at,
                           uint64_t down_at);
    /* Recomputes the checksum of a loaded expert. */
    uint64_t (*stack_checksum)(compute_stack *s, int expert_i);
    kern_act (*stack_act)(const compute_stack *s);
    size_t (*stack_bytes)(const compute_stack *s); /* memory held */
    void (*stack_close)(compute_stack *s);
    /* Scratch for passes of at most max_rows rows and max_pairs pairs over any stack opened so far.
     * Call after all stacks are open; afterwards a pass does not allocate. */
    ep_status (*reserve)(compute *c, int max_rows, int max_pairs);
    /* A pass is gate, up, SwiGLU, down for every pair. It has two halves, so that a device copies
     * the rows of one pass while it computes another; at most `depth` are under way, 1 to
     * COMPUTE_DEPTH. ffn_begin reads the lists before it returns; rows and out belong to the
     * device until the pass is ended. On failure this pass is not under way. */
    int depth;
    ep_status (*ffn_begin)(compute *c, compute_stack *s, const compute_ffn_args *a);
    /* Whether ffn_end would not wait for the device (but for copies to memory not pinned). */
    bool (*ffn_is_done)(compute *c);
    /* Ends the oldest pass under way: its `out` is complete. After EP_ERR_DEVICE, from either half,
     * the device is lost to this process: every call gives the same. */
    ep_status (*ffn_end)(compute *c);
    /* Host memory (a transport's buffers) that the device may read rows from and write results to
     * by itself from now on; elsewhere copies cost the host time. No pass is under way in unpin,
     * which comes before the memory goes and before close. Failure changes nothing but speed. NULL
     * for devices without use for it. */
    ep_status (*pin)(compute *c, void *memory, size_t bytes);
    void (*unpin)(compute *c, void *memory);
    /* Which device was lost, in which kernel or copy, and how; "" before. Lives as long as c. NULL
     * for devices that cannot be lost. */
    const char *(*failure)(const compute *c);
} compute_ops;

extern const compute_ops compute_cpu;
#ifdef MOED_CUDA
extern const compute_ops compute_cuda;
#endif

/* device: "cpu", "cuda:N", or "auto" (the first device that answers, else the CPU). On success *ops
 * is the table that serves *out. */
ep_status compute_open(const compute_ops **ops, compute **out, const char *device, int n_threads,
                       ep_err *err);

/* For devices: offsets ascend from 0 to n_pairs, and every pair names a row and a place that exist.
 */
bool compute_args_are_sound(const compute_ffn_args *a, int n_experts);
/* A whole pass: begin, then end. None is under way. */
ep_status compute_ffn(const compute_ops *ops, compute *c, compute_stack *s,
                      const compute_ffn_args *a);

#ifdef __cplusplus
}
#endif
#endif
