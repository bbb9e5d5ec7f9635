/*
 * moed-bench kernels: one expert layer (gate, up, SwiGLU, down) per call, rows as floats in, rows
 * per (row, expert) pair out, for each shape, type and number of rows. Weights are cold
 * (bench_layers.c), and each case stands beside the limits measured next to it: `share` is the
 * larger of bytes over the read bandwidth and operations over the peak rate, divided by the time.
 *
 * Before a type is timed, its level is proved to give the bits of the scalar level on a few pairs;
 * a difference ends the program with status 1.
 */
#include <argp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "tests/bench/bench.h"

enum { MAX_LIST = 16, MAX_ROWS = 4096, MAX_CALLS = 400, MIN_CALLS = 5 };

static const bench_shape shapes[] = {
    {"qwen3-30b", 2048, 768, 128, 8, NULL},
    {"mixtral", 4096, 14336, 8, 2, NULL},
    {"deepseek-v3", 7168, 2048, 32, 1,
     "one shard of eight: 32 of the 256 experts, which get 1 of a row's 8 pairs"},
    {"demo", 256, 256, 16, 4, NULL},
};
static const int types[] = {KERN_Q4_K, KERN_Q5_K,  KERN_Q6_K, KERN_Q8_0, KERN_Q4_0,
                            KERN_Q5_0, KERN_GPTQ4, KERN_BF16, KERN_F16,  KERN_F32};

enum { n_shapes = sizeof shapes / sizeof shapes[0], n_types = sizeof types / sizeof types[0] };

typedef struct options {
    int type[MAX_LIST], n_type;
    int rows[MAX_LIST], n_rows;
    const bench_shape *shape[MAX_LIST];
    int n_shape, threads;
    const char *level, *csv;
    double seconds;
    size_t memory;
    uint64_t seed;
} options;

typedef struct run {
    const options *o;
    FILE *csv;
    ep_pool *pool;
    bench_layers layers;
    bench_route route;
    bench_random random;
    void *scratch;
    size_t scratch_bytes;
    int next_layer;
    double ms[MAX_CALLS];
} run;

/* ---- one call ---- */

static double call(run *b, int layer_i)
{
    const kern_stack *s = &b->layers.stack[layer_i];
    kern_ffn_args args = {.rows = b->route.x,
                          .act = KERN_ACT_F32,
                          .n_rows = b->route.rows,
                          .n_pairs = b->route.n_pairs,
                          .expert_offset = b->route.offset,
                          .pair_row = b->route.pair_row,
                          .pair_out = b->route.pair_out,
                          .out = b->route.out};
    ep_time begin = ep_now();
    kern_ffn(b->pool, s, &args, b->scratch);
    return (double)ep_time_diff_ns(ep_now(), begin) * 1e-6;
}

/* The level in use against scalar on the same pairs; out lies in two halves of a copy. */
static ep_status prove(run *b, const char *level, ep_err *err)
{
    int rows = b->layers.layer_bytes / (size_t)b->layers.shape.n_experts > (4u << 20) ? 1 : 3;
    bench_route_draw(&b->route, &b->layers, 0, rows, &b->random);
    size_t bytes = (size_t)b->route.n_pairs * (size_t)b->layers.shape.hidden * sizeof(float);
    float *want = ep_alloc(bytes);
    if (want == NULL) return ep_fail(err, EP_ERR_NOMEM, "no memory");
    ep_status s = kern_select("scalar", err);
    if (s == EP_OK) {
        call(b, 0);
        memcpy(want, b->route.out, bytes);
        memset(b->route.out, 0, bytes);
        s = kern_select(level, err);
    }
    if (s == EP_OK) {
        call(b, 0);
        if (memcmp(want, b->route.out, bytes) != 0)
            s = ep_fail(err, EP_ERR_BUG, "%s and scalar differ on %s", level,
                        kern_type_name(b->layers.type));
    }
    ep_free(want);
    return s;
}

/* ---- one case ---- */

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static bench_limits measure_limits(run *b)
{
    size_t bytes = (size_t)1 << 30; /* of the weights themselves */
    if (bytes > b->layers.bytes) bytes = b->layers.bytes & ~(size_t)4095;
    return bench_limits_measure(b->pool, b->layers.type, b->layers.memory, bytes);
}

static void report(run *b, int rows, int n, double touched, bench_limits limits)
{
    const bench_shape *p = &b->layers.shape;
    double ms = b->ms[n / 2];
    double expert_bytes = (double)b->layers.layer_bytes / p->n_experts;
    double bytes = touched * expert_bytes;
    double ops = 6.0 * p->hidden * p->inter * rows * p->top_k;
    double by_read = bytes / limits.read_gbps * 1e-6;
    double by_ops = limits.peak_gops > 0 ? ops / limits.peak_gops * 1e-6 : 0;
    double limit = by_read > by_ops ? by_read : by_ops;
    printf("%-11s %-6s %5d %8.1f %9.3f %9.3f %7.1f %8.1f %7.1f %8.0f %8.3f %-4s %5.1f%%\n", p->name,
           kern_type_name(b->layers.type), rows, touched, ms, b->ms[0], bytes / ms * 1e-6,
           ops / ms * 1e-6, limits.read_gbps, limits.peak_gops, limit,
           by_read > by_ops ? "read" : "ops", 100 * limit / ms);
    fflush(stdout);
    if (b->csv == NULL) return;
    fprintf(b->csv, "%s,%s,%s,%d,%d,%d,%.2f,%.6f,%.6f,%d,%.0f,%.3f,%.3f,%.3f,%.3f,%.6f,%.4f,%llu\n",
            p->name, kern_type_name(b->layers.type), kern_level(), b->o->threads, rows,
            rows * p->top_k, touched, ms, b->ms[0], n, bytes, bytes / ms * 1e-6, ops / ms * 1e-6,
            limits.read_gbps, limits.peak_gops, limit, limit / ms, (unsigned long long)b->o->seed);
    fflush(b->csv);
}

static void run_case(run *b, int rows)
{
    double touched = 0;
    int n = 0;
    bench_limits before = measure_limits(b);
    ep_time begin = ep_now();
    for (int warm = 1; n < MAX_CALLS; warm = 0) {
        int layer_i = b->next_layer++ % b->layers.n_layers;
        bench_route_draw(&b->route, &b->layers, layer_i, rows, &b->random);
        double ms = call(b, layer_i);
        if (warm) continue; /* the first call touches the scratch */
        b->ms[n++] = ms;
        touched += b->route.n_touched;
        double spent = (double)ep_time_diff_ns(ep_now(), begin) * 1e-9;
        if (n >= MIN_CALLS && spent > b->o->seconds) break;
    }
    bench_limits after = measure_limits(b);
    if (after.read_gbps > before.read_gbps) before.read_gbps = after.read_gbps;
    if (after.peak_gops > before.peak_gops) before.peak_gops = after.peak_gops;
    qsort(b->ms, (size_t)n, sizeof b->ms[0], compare_double);
    report(b, rows, n, touched / n, before);
}

static bool is_possible(const bench_shape *p, int type)
{
    int block = kern_type_block(type);
    return p->hidden % block == 0 && p->inter % block == 0;
}

/* All numbers of rows of one shape and type. */
static ep_status run_type(run *b, const bench_shape *shape, int type, ep_err *err)
{
    if (!is_possible(shape, type)) {
        printf("%-11s %-6s skipped: %d or %d is no multiple of a block\n", shape->name,
               kern_type_name(type), shape->hidden, shape->inter);
        return EP_OK;
    }
    size_t most = (size_t)sysconf(_SC_AVPHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE) / 3;
    int max_rows = 1;
    for (int i = 0; i < b->o->n_rows; i++)
        if (b->o->rows[i] > max_rows) max_rows = b->o->rows[i];
    if (max_rows < 3) max_rows = 3; /* of the proof */
    b->next_layer = 0;
    ep_status s = bench_layers_open(&b->layers, shape, type, b->o->memory, most, &b->random);
    if (s == EP_OK) s = bench_route_open(&b->route, &b->layers, max_rows, &b->random);
    if (s != EP_OK) {
        ep_fail(err, s, "no memory for %s %s", shape->name, kern_type_name(type));
        goto done;
    }
    b->scratch_bytes = kern_ffn_scratch_bytes(&b->layers.stack[0], max_rows,
                                              max_rows * shape->top_k, b->o->threads);
    b->scratch = ep_map(b->scratch_bytes);
    if (b->scratch == NULL) {
        s = ep_fail(err, EP_ERR_NOMEM, "no memory for scratch");
        goto done;
    }
    printf("# %s %s: %d layers of %d experts, %zu MiB in rotation%s%s%s\n", shape->name,
           kern_type_name(type), b->layers.n_layers, b->layers.shape.n_experts,
           b->layers.bytes >> 20, shape->note != NULL ? "; " : "",
           shape->note != NULL ? shape->note : "",
           b->layers.shape.n_experts < shape->n_experts ? "; FEWER experts than the model: memory"
                                                        : "");
    s = prove(b, kern_level(), err);
    for (int i = 0; i < b->o->n_rows && s == EP_OK; i++)
        run_case(b, b->o->rows[i]);
done:
    ep_unmap(b->scratch, b->scratch_bytes);
    b->scratch = NULL;
    bench_route_close(&b->route);
    bench_layers_close(&b->layers);
    return s;
}

/* ---- arguments ---- */

static int find_type(const char *name)
{
    for (int i = 0; i < n_types; i++)
        if (strcasecmp(name, kern_type_name(types[i])) == 0) return types[i];
    return -1;
}

static const bench_shape *find_shape(const char *name)
{
    for (int i = 0; i < n_shapes; i++)
        if (strcmp(name, shapes[i].name) == 0) return &shapes[i];
    return NULL;
}

/* One word of a comma separated list. */
static void take(options *o, int key, const char *word, struct argp_state *state)
{
    char *end;
    long v = strtol(word, &end, 10);
    if (key == 't') {
        int type = find_type(word);
        if (type < 0) argp_error(state, "unknown type \"%s\"", word);
        if (o->n_type < MAX_LIST) o->type[o->n_type++] = type;
    } else if (key == 's') {
        const bench_shape *shape = find_shape(word);
        if (shape == NULL) argp_error(state, "unknown shape \"%s\"", word);
        if (o->n_shape < MAX_LIST) o->shape[o->n_shape++] = shape;
    } else {
        if (*end != '\0' || v < 1 || v > MAX_ROWS)
            argp_error(state, "rows \"%s\": 1 to %d", word, MAX_ROWS);
        if (o->n_rows < MAX_LIST) o->rows[o->n_rows++] = (int)v;
    }
}

static double number(const char *text, double least, double most, struct argp_state *state)
{
    char *end;
    double v = strtod(text, &end);
    if (*text == '\0' || *end != '\0' || !(v >= least && v <= most))
        argp_error(state, "\"%s\": a number from %g to %g", text, least, most);
    return v;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    options *o = state->input;
    char *rest = NULL;
    switch (key) {
    case 't':
    case 's':
    case 'r':
        for (char *w = strtok_r(arg, ",", &rest); w != NULL; w = strtok_r(NULL, ",", &rest))
            take(o, key, w, state);
        return 0;
    case 'n':
        o->threads = (int)number(arg, 1, 256, state);
        return 0;
    case 'k':
        o->level = arg;
        return 0;
    case 'c':
        o->csv = arg;
        return 0;
    case 'w':
        o->seconds = number(arg, 0.01, 60, state);
        return 0;
    case 'm':
        o->memory = (size_t)number(arg, 16, 1 << 20, state) << 20;
        return 0;
    case 'x':
        o->seed = (uint64_t)number(arg, 0, 1e15, state);
        return 0;
    case ARGP_KEY_ARG:
        argp_usage(state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option argp_options[] = {
    {"type", 't', "T,..", 0, "Weight types (all)", 0},
    {"shape", 's', "S,..", 0, "qwen3-30b (default), mixtral, deepseek-v3, demo", 0},
    {"rows", 'r', "N,..", 0, "Rows per call (1,2,4,8,16,32,64,128,256,512)", 0},
    {"threads", 'n', "N", 0, "Threads (all processors)", 0},
    {"kernels", 'k', "LEVEL", 0, "auto, scalar, avx2, avx512 or amx", 0},
    {"csv", 'c', "FILE", 0, "Write the figures to FILE too", 0},
    {"seconds", 'w', "S", 0, "Time spent on a case (0.5)", 0},
    {"memory", 'm', "MIB", 0, "Weights in rotation, at least (1536)", 0},
    {"seed", 'x', "N", 0, "Seed of weights and routing", 0},
    {0}};

static void fill_defaults(options *o)
{
    if (o->n_type == 0)
        for (int i = 0; i < n_types; i++)
            o->type[o->n_type++] = types[i];
    if (o->n_shape == 0) o->shape[o->n_shape++] = &shapes[0];
    if (o->n_rows == 0)
        for (int rows = 1; rows <= 512; rows *= 2)
            o->rows[o->n_rows++] = rows;
    if (o->threads == 0) o->threads = (int)sysconf(_SC_NPROCESSORS_ONLN);
}

int bench_kernels(int argc, char **argv)
{
    static const struct argp argp = {.options = argp_options,
                                     .parser = parse,
                                     .doc =
                                         "Times one expert layer against this machine's limits."};
    options o = {.seconds = 0.5, .memory = (size_t)1536 << 20, .seed = 20261120};
    if (argp_parse(&argp, argc, argv, 0, NULL, &o) != 0) return 2;
    fill_defaults(&o);
    ep_err err = {{0}};
    run *b = ep_calloc(1, sizeof *b);
    if (b == NULL) return 1;
    b->o = &o;
    b->random.state = o.seed;
    ep_status s = kern_select(o.level, &err); /* before the threads: see kernels.h */
    unsetenv("MOED_KERNELS");                 /* the proof selects again, by name */
    if (s == EP_OK) s = ep_pool_open(&b->pool, o.threads);
    if (s == EP_OK && o.csv != NULL && (b->csv = fopen(o.csv, "w")) == NULL)
        s = ep_fail(&err, EP_ERR_IO, "cannot write %s", o.csv);
    if (s != EP_OK) goto done;
    printf("# kernels %s, %d threads, seed %llu; times in ms: median and least\n", kern_level(),
           o.threads, (unsigned long long)o.seed);
    printf("%-11s %-6s %5s %8s %9s %9s %7s %8s %7s %8s %8s %-4s %6s\n", "shape", "type", "rows",
           "experts", "median", "least", "GB/s", "GFLOP/s", "read", "peak", "limit", "by", "share");
    if (b->csv != NULL)
        fprintf(b->csv, "shape,type,level,threads,rows,pairs,experts,time_ms,least_ms,calls,bytes,"
                        "gbps,gflops,read_gbps,peak_gops,limit_ms,share,seed\n");
    for (int i = 0; i < o.n_shape && s == EP_OK; i++)
        for (int j = 0; j < o.n_type && s == EP_OK; j++)
            s = run_type(b, o.shape[i], o.type[j], &err);
done:
    if (s != EP_OK)
        fprintf(stderr, "moed-bench kernels: %s\n",
                err.text[0] != '\0' ? err.text : ep_status_name(s));
    if (b->csv != NULL) fclose(b->csv);
    ep_pool_close(b->pool);
    ep_free(b);
    return s == EP_OK ? 0 : 1;
}
