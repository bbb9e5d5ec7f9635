/*
 * The limits of the machine, measured by the program that is judged by them: all threads of the
 * pool stream through memory, or run a loop whose operands never leave the registers. Neighbours
 * change both from minute to minute, so they are measured beside each case, not once.
 */
#include <stdatomic.h>
#include <string.h>
#include "tests/bench/bench.h"

typedef struct job {
    const bench_loops *loops;
    double (*loop)(long rounds);
    long rounds;
    const uint8_t *memory;
    size_t bytes;
    ep_pool *pool;
    double ops[256];
    ep_time begin, end;
    _Atomic uint64_t sink;
} job;

static const bench_loops *loops_of(const char *level)
{
    if (strcmp(level, "amx") == 0) return &bench_loops_amx;
    if (strcmp(level, "avx512") == 0) return &bench_loops_avx512;
    if (strcmp(level, "avx2") == 0) return &bench_loops_avx2;
    return NULL;
}

/* The loop of the unit that does the work of a type; lower levels stand in where a level has none.
 */
static double (*loop_of(const char *level, int type))(long rounds)
{
    static const char *const order[] = {"amx", "avx512", "avx2"};
    kern_act act = kern_type_act(type);
    bool is_reached = false;
    for (size_t i = 0; i < sizeof order / sizeof order[0]; i++) {
        is_reached = is_reached || strcmp(level, order[i]) == 0;
        if (!is_reached) continue;
        const bench_loops *l = loops_of(order[i]);
        double (*f)(long) = act == KERN_ACT_F32 ? l->f32 : act == KERN_ACT_BF16 ? l->bf16 : l->int8;
        if (f != NULL) return f;
        if (act == KERN_ACT_BF16 && l->f32 != NULL) return l->f32;
    }
    return NULL;
}

static void start(job *j, int thread_i)
{
    ep_pool_barrier(j->pool);
    if (thread_i == 0) j->begin = ep_now();
}

static void finish(job *j, int thread_i)
{
    ep_pool_barrier(j->pool);
    if (thread_i == 0) j->end = ep_now();
}

static void run_loop(void *arg, int thread_i, int n_threads)
{
    job *j = arg;
    (void)n_threads;
    start(j, thread_i);
    j->ops[thread_i] = j->loop(j->rounds);
    finish(j, thread_i);
}

static uint64_t read_words(const uint8_t *p, size_t bytes)
{
    uint64_t sum[4] = {0};
    for (size_t i = 0; i < bytes; i += sizeof sum) {
        uint64_t v[4];
        memcpy(v, p + i, sizeof v);
        for (int j = 0; j < 4; j++)
            sum[j] += v[j];
    }
    return sum[0] + sum[1] + sum[2] + sum[3];
}

static void run_read(void *arg, int thread_i, int n_threads)
{
    job *j = arg;
    size_t part = j->bytes / (size_t)n_threads & ~(size_t)4095;
    uint64_t (*read)(const uint8_t *, size_t) = j->loops != NULL ? j->loops->read : read_words;
    start(j, thread_i);
    atomic_fetch_add(&j->sink, read(j->memory + (size_t)thread_i * part, part));
    finish(j, thread_i);
}

static double seconds_of(const job *j)
{
    return (double)ep_time_diff_ns(j->end, j->begin) * 1e-9;
}

static double measure_peak(job *j, const char *level, int type)
{
    j->loop = loop_of(level, type);
    if (j->loop == NULL) return 0;
    j->rounds = 1000;
    for (;;) { /* long enough for the clock and for the frequency to settle */
        ep_pool_run(j->pool, run_loop, j);
        if (seconds_of(j) > 4e-3) break;
        j->rounds *= 2;
    }
    double best = 0;
    for (int i = 0; i < 2; i++) {
        ep_pool_run(j->pool, run_loop, j);
        double ops = 0;
        for (int t = 0; t < ep_pool_size(j->pool); t++)
            ops += j->ops[t];
        if (ops / seconds_of(j) > best) best = ops / seconds_of(j);
    }
    return best * 1e-9;
}

bench_limits bench_limits_measure(ep_pool *pool, int type, const uint8_t *memory, size_t bytes)
{
    const char *level = kern_level();
    const char *widest = kern_has_level("avx512") ? "avx512" : kern_has_level("avx2") ? "avx2" : "";
    job j = {.pool = pool, .loops = loops_of(widest), .memory = memory, .bytes = bytes};
    bench_limits l = {0};
    ep_pool_run(pool, run_read, &j); /* memory sets the limit of every level alike */
    l.read_gbps = (double)bytes / seconds_of(&j) * 1e-9;
    l.peak_gops = measure_peak(&j, level, type);
    return l;
}
