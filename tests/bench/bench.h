#ifndef EP_TESTS_BENCH_BENCH_H
#define EP_TESTS_BENCH_BENCH_H
/*
 * bench: what the files of moed-bench share: the subcommands, a seeded generator, the limits of the
 * machine, and one CSV line of `moed-bench kernels`. A subcommand gets argv[0] = its own name and
 * returns the exit status.
 */
#include "kernels/kernels.h"

int bench_kernels(int argc, char **argv);
int bench_compare(int argc, char **argv);
int bench_model(int argc, char **argv);
int bench_e2e(int argc, char **argv);

/* ---- seeded values ---- */

typedef struct bench_random {
    uint64_t state;
} bench_random;
uint32_t bench_next(bench_random *r);
int bench_below(bench_random *r, int n);
/* n rows of k random weights of a type, as a file has them, with scales that keep results finite.
 */
void bench_weights(bench_random *r, int type, int n, int k, uint8_t *dst);

/* ---- limits ---- */

/* Loops that do nothing but run at full rate, one table per instruction set; each returns the
 * number of operations (multiply and add count as two). NULL: the level has no such unit. */
typedef struct bench_loops {
    const char *name;
    double (*int8)(long rounds);
    double (*bf16)(long rounds);
    double (*f32)(long rounds);
    uint64_t (*read)(const uint8_t *p, size_t bytes); /* bytes a multiple of 4096 */
} bench_loops;
extern const bench_loops bench_loops_avx2, bench_loops_avx512, bench_loops_amx;

/* What the machine gives in this moment to all threads of a pool together. */
typedef struct bench_limits {
    double read_gbps; /* 1e9 bytes/s out of memory */
    double peak_gops; /* 1e9 operations/s of the unit that a weight type uses at the level in use */
} bench_limits;
/* `memory` is read once, so make it larger than the caches. peak is 0 where there is no loop. */
bench_limits bench_limits_measure(ep_pool *pool, int type, const uint8_t *memory, size_t bytes);

/* ---- one expert layer ---- */

typedef struct bench_shape {
    const char *name;
    int hidden, inter, n_experts, top_k;
    const char *note; /* what differs from the model of that name; NULL: nothing */
} bench_shape;

/* Layers of one shape and type in one mapping. */
typedef struct bench_layers {
    bench_shape shape; /* n_experts may be less than the model's */
    int type, n_layers;
    kern_stack *stack; /* [n_layers] */
    uint8_t *memory;
    size_t bytes, layer_bytes;
    uint64_t *used; /* [n_layers * n_experts] when an expert was last touched, for cold routing */
    uint64_t clock;
} bench_layers;
/* As many layers as `bytes` needs, at least one; fewer experts when a layer would exceed `most`. */
ep_status bench_layers_open(bench_layers *l, const bench_shape *shape, int type, size_t bytes,
                            size_t most, bench_random *r);
void bench_layers_close(bench_layers *l);

/* Rows and where they go; buffers for at most max_rows. */
typedef struct bench_route {
    int rows, n_pairs, n_touched; /* experts with at least one pair */
    int32_t *offset, *pair_row, *pair_out, *chosen, *label;
    float *x, *out; /* [rows, hidden], [pairs, hidden] */
} bench_route;
ep_status bench_route_open(bench_route *t, const bench_layers *l, int max_rows, bench_random *r);
void bench_route_close(bench_route *t);
/* Chooses top_k experts per row at random. Then the experts that were drawn are renamed so that
 * those of the layer which were not touched for longest come first: as random, and cold. */
void bench_route_draw(bench_route *t, bench_layers *l, int layer_i, int rows, bench_random *r);

#endif
