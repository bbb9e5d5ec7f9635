/*
 * The host side of a CUDA shard, compute_cuda.c and form.c as they are, on a machine that is
 * emulated (runtime_emulated.h): results against float64 and the CPU device, the same bits however
 * late or early the device does things, no race, nothing left behind, and what each failure at each
 * call leads to (host_failures.c). That the emulation finds faults is proved in host_detects.c.
 */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "kernels/kernels.h"
#include "tests/gpu/host_layers.h"
#include "tests/gpu/host_tests.h"
#include "tests/gpu/runtime_emulated.h"
#include "tests/kernels/check.h"
#include "tests/test.h"

enum { LAYERS = 5, COUNTS = 7, PASSES = LAYERS * COUNTS * 2, PAIRS = 264, ROWS = PAIRS / 2 + 1 };

static const int counts[COUNTS][HOST_EXPERTS] = {
    {1},       {0, 2}, {3, 2}, {0, 17}, /* wide */
    {20, 20},                           /* wide */
    {105, 25},                          /* many */
    {0, PAIRS} /* all that is reserved; more than 2 MiB of the widest layer */
};

static host_layer layers[LAYERS];
static host_pass passes[PASSES];
static compute *cpu;

/* ---- time that passes when somebody sleeps ---- */

static int64_t slept;

ep_time __real_ep_now(void);
ep_time __wrap_ep_now(void);
int __wrap_nanosleep(const struct timespec *t, struct timespec *left);

ep_time __wrap_ep_now(void)
{
    ep_time t = __real_ep_now();
    t.ns += slept;
    return t;
}

/* A hundred times as long, so that a wait for ten seconds ends soon. */
int __wrap_nanosleep(const struct timespec *t, struct timespec *left)
{
    (void)left;
    slept += 100 * (t->tv_sec * 1000000000 + t->tv_nsec);
    return 0;
}

/* ---- helpers ---- */

static void make_data(void)
{
    ep_err err;
    if (compute_cpu.open(&cpu, "cpu", 1, &err) != EP_OK) abort();
    host_layer_make(&layers[0], cpu, KERN_Q4_K, KERN_Q6_K, 256, 256, 6);
    host_layer_make(&layers[1], cpu, KERN_GPTQ4, KERN_GPTQ4, 384, 128, 5);
    host_layer_make(&layers[2], cpu, KERN_Q8_0, KERN_Q8_0, 2048, 32, 2);
    host_layer_make(&layers[3], cpu, KERN_BF16, KERN_Q8_0, 272, 96, 4);
    host_layer_make(&layers[4], cpu, KERN_Q6_K, KERN_BF16, 256, 48, 3);
    if (compute_cpu.reserve(cpu, ROWS, PAIRS) != EP_OK) abort();
    for (int i = 0; i < PASSES; i++) {
        const host_layer *l = &layers[i % LAYERS];
        const bool again = i >= PASSES / 2 && i / LAYERS % COUNTS == COUNTS - 1;
        const int *n = counts[again ? 1 : i / LAYERS % COUNTS]; /* once is enough of the most */
        kern_act act =
            i < PASSES / 2 ? KERN_ACT_F32 : kern_gate_up_act(l->shape.gate_type, l->shape.up_type);
        host_pass_make(&passes[i], l, n, act);
    }
}

static void free_data(void)
{
    for (int i = 0; i < PASSES; i++)
        host_pass_free(&passes[i]);
    for (int i = 0; i < LAYERS; i++)
        host_layer_free(&layers[i]);
    compute_cpu.close(cpu);
}

static compute *open_device(const char *device)
{
    ep_err err = {{0}};
    compute *c = NULL;
    CHECK_INT(compute_cuda.open(&c, device, 1, &err), EP_OK);
    if (c == NULL) printf("    %s\n", err.text);
    return c;
}

static void run_checked(compute *c, compute_stack *const *s, int pass_i)
{
    host_pass *p = &passes[pass_i];
    if (c == NULL || s[pass_i % LAYERS] == NULL) return; /* counted already */
    memset(p->a.out, 0xff, host_pass_out_bytes(p));
    CHECK_INT(host_run(&compute_cuda, c, s[pass_i % LAYERS], &p->a), EP_OK);
    CHECK(host_pass_check(p, p->a.out, cpu));
}

/* ---- several under way, as a shard has them ---- */

/* Messages: rows, then results. One more than are under way, so that a reply is still read while
 * its successor is begun. */
enum { MESSAGES = COMPUTE_DEPTH + 1 };

typedef struct traffic {
    compute *c;
    compute_stack *const *s;
    uint8_t *message[MESSAGES];
    size_t rows, bytes; /* of a message; results begin after `rows` */
    int pass[MESSAGES];
    int begun, ended;
} traffic;

static size_t whole_pages(size_t bytes)
{
    return (bytes + 4095) & ~(size_t)4095;
}

static void traffic_open(traffic *t, compute *c, compute_stack *const *s)
{
    *t = (traffic){.c = c, .s = s};
    size_t out = 0;
    for (int i = 0; i < PASSES; i++) {
        if (t->rows < host_pass_rows_bytes(&passes[i])) t->rows = host_pass_rows_bytes(&passes[i]);
        if (out < host_pass_out_bytes(&passes[i])) out = host_pass_out_bytes(&passes[i]);
    }
    t->rows = whole_pages(t->rows);
    t->bytes = t->rows + whole_pages(out);
    for (int i = 0; i < MESSAGES; i++)
        t->message[i] = ep_map(t->bytes);
}

/* Which of the messages' parts the device may use by itself. */
static void traffic_pin(traffic *t, bool rows, bool results)
{
    for (int i = 0; i < MESSAGES; i++) {
        uint8_t *from = t->message[i] + (rows ? 0 : t->rows);
        size_t bytes = (rows ? t->rows : 0) + (results ? t->bytes - t->rows : 0);
        if (bytes > 0) CHECK_INT(compute_cuda.pin(t->c, from, bytes), EP_OK);
    }
}

static void traffic_close(traffic *t)
{
    for (int i = 0; i < MESSAGES; i++) {
        compute_cuda.unpin(t->c, t->message[i]);
        compute_cuda.unpin(t->c, t->message[i] + t->rows);
        ep_unmap(t->message[i], t->bytes);
    }
}

static void end_one(traffic *t, bool polls)
{
    const int at = t->ended++ % MESSAGES;
    for (int i = 0; polls && !compute_cuda.ffn_is_done(t->c) && i < 1000000; i++) {
    }
    CHECK_INT(compute_cuda.ffn_end(t->c), EP_OK);
    const float *out = (const float *)(const void *)(t->message[at] + t->rows);
    CHECK(host_pass_check(&passes[t->pass[at]], out, cpu));
}

static void begin_one(traffic *t, int pass_i)
{
    const int at = t->begun % MESSAGES;
    const host_pass *p = &passes[pass_i];
    compute_ffn_args a = p->a;
    if (t->begun - t->ended == compute_cuda.depth) end_one(t, pass_i % 3 == 0);
    memcpy(t->message[at], p->a.rows, host_pass_rows_bytes(p));
    memset(t->message[at] + t->rows, 0xff, host_pass_out_bytes(p));
    a.rows = t->message[at];
    a.out = (float *)(void *)(t->message[at] + t->rows);
    t->pass[at] = pass_i;
    ep_status status = compute_cuda.ffn_begin(t->c, t->s[pass_i % LAYERS], &a);
    CHECK_INT(status, EP_OK);
    t->begun += status == EP_OK;
}

/* All passes, in an order and from memory that the seed decides. */
static void run_traffic(compute *c, compute_stack *const *s, uint64_t seed)
{
    traffic t;
    compute_ffn_args nothing = passes[0].a;
    const int32_t no_pairs[HOST_EXPERTS + 1] = {0};
    const int step = (int)(seed % 5) * 2 + 3; /* prime to the 70 passes, but for 5 and 7 */
    const int odd = step % 5 == 0 || step % 7 == 0 ? 1 : step;
    nothing.n_pairs = 0;
    nothing.expert_offset = no_pairs;
    traffic_open(&t, c, s);
    traffic_pin(&t, seed % 4 == 1 || seed % 4 == 2, seed % 4 == 1 || seed % 4 == 3);
    for (int i = 0; i < PASSES; i++) {
        begin_one(&t, i * odd % PASSES);
        if (i % 10 > 0) continue;
        while (t.ended < t.begun) /* nothing is left to do, nor is anything asked */
            end_one(&t, i % 20 == 0);
        CHECK(compute_cuda.ffn_is_done(c));
        CHECK_INT(compute_cuda.ffn_end(c), EP_ERR_INVALID);
        CHECK_INT(compute_cuda.ffn_begin(c, s[0], &nothing), EP_OK);
        CHECK(compute_cuda.ffn_is_done(c));
        CHECK_INT(compute_cuda.ffn_end(c), EP_OK);
    }
    CHECK(t.begun - t.ended == compute_cuda.depth);
    CHECK_INT(compute_cuda.ffn_begin(c, s[0], &passes[0].a), EP_ERR_INVALID);
    CHECK_INT(compute_cuda.reserve(c, ROWS, PAIRS), EP_ERR_INVALID);
    while (t.ended < t.begun)
        end_one(&t, seed % 2 == 0);
    traffic_close(&t);
}

static void check_sums(compute_stack *const *s)
{
    for (int i = 0; i < LAYERS; i++)
        for (int e = 0; e < layers[i].shape.n_experts; e++)
            CHECK(compute_cuda.stack_checksum(s[i], e) == layers[i].packed[e]);
}

/* Everything that a shard does, and more than once. */
static void whole_run(const emulated_options *o)
{
    compute_stack *s[LAYERS] = {0};
    ep_err err = {{0}};
    emulated_start(o);
    compute *c = open_device("cuda:1");
    if (c == NULL) return;
    bool opened = true;
    for (int i = 0; i < LAYERS; i++) {
        opened = opened && host_layer_open(&layers[i], c, &s[i], &err) == EP_OK;
        if (i != LAYERS - 2) continue;
        /* too small at first, and a layer comes later */
        CHECK_INT(compute_cuda.reserve(c, 8, 4), EP_OK);
        run_checked(c, s, 0);
        CHECK_INT(host_run(&compute_cuda, c, s[0], &passes[(COUNTS - 1) * LAYERS].a),
                  EP_ERR_TOO_LARGE);
    }
    CHECK(opened);
    CHECK_INT(compute_cuda.reserve(c, ROWS, PAIRS), EP_OK);
    if (opened && compute_cuda.failure(c)[0] == '\0') {
        run_traffic(c, s, o->seed);
        /* an expert once more, and graphs, after the device was asked whether it is done */
        CHECK_INT(host_layer_load(&layers[2], s[2], 1), EP_OK);
        CHECK_INT(compute_cuda.reserve(c, ROWS, PAIRS), EP_OK);
        check_sums(s);
        /* one layer goes, the others are served */
        compute_cuda.stack_close(s[1]);
        s[1] = NULL;
        run_checked(c, s, 5);
        run_checked(c, s, PASSES - 3);
    }
    CHECK_STR(compute_cuda.failure(c), "");
    for (int i = 0; i < LAYERS; i++)
        compute_cuda.stack_close(s[i]);
    compute_cuda.close(c);
    CHECK_INT(emulated_finish(), 0);
}

/* ---- tests ---- */

static void test_eager(void)
{
    emulated_options o = emulated_options_default();
    whole_run(&o);
}

static void test_lazy(void)
{
    emulated_options o = emulated_options_default();
    o.policy = EMULATED_LAZY;
    whole_run(&o);
}

static void test_random(void)
{
    emulated_options o = emulated_options_default();
    o.policy = EMULATED_RANDOM;
    for (o.seed = 1; o.seed <= 4; o.seed++)
        whole_run(&o);
}

/* Older devices: no wgmma, nothing chained. */
static void test_older(void)
{
    emulated_options o = emulated_options_default();
    o.major = 8;
    o.policy = EMULATED_RANDOM;
    whole_run(&o);
    setenv("MOED_CUDA_CHAIN", "off", 1);
    o.major = 9;
    whole_run(&o);
    unsetenv("MOED_CUDA_CHAIN");
}

typedef struct loader {
    pthread_t thread;
    compute_stack *stack;
    const host_layer *layer;
    int first, status;
} loader;

static void *load_some(void *arg)
{
    loader *l = arg;
    for (int e = l->first; e < l->layer->shape.n_experts; e += 2)
        if (l->status == EP_OK) l->status = host_layer_load(l->layer, l->stack, e);
    return NULL;
}

/* Loading threads have set no device before. */
static void test_threads(void)
{
    emulated_options o = emulated_options_default();
    loader l[4] = {0};
    compute_stack *s[LAYERS] = {0};
    o.policy = EMULATED_RANDOM;
    emulated_start(&o);
    compute *c = open_device("cuda:1");
    for (int i = 0; i < 2; i++)
        CHECK_INT(compute_cuda.stack_open(c, &layers[i].shape, &s[i], NULL), EP_OK);
    for (int i = 0; i < 4; i++) {
        l[i] = (loader){.stack = s[i / 2], .layer = &layers[i / 2], .first = i % 2};
        pthread_create(&l[i].thread, NULL, load_some, &l[i]);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(l[i].thread, NULL);
        CHECK_INT(l[i].status, EP_OK);
    }
    CHECK_INT(compute_cuda.reserve(c, ROWS, PAIRS), EP_OK);
    run_checked(c, s, 10);
    run_checked(c, s, 11);
    compute_cuda.stack_close(s[0]);
    compute_cuda.stack_close(s[1]);
    compute_cuda.close(c);
    CHECK_INT(emulated_finish(), 0);
}

static ep_status open_shape(compute *c, int gate, int up, int down, int hidden, int inter, int n,
                            ep_err *err)
{
    compute_shape p = {gate, up, down, hidden, inter, n, false};
    compute_stack *s = NULL;
    ep_status status = compute_cuda.stack_open(c, &p, &s, err);
    CHECK((status == EP_OK) == (s != NULL));
    if (status != EP_OK) CHECK(err->text[0] != '\0');
    compute_cuda.stack_close(s);
    return status;
}

static void refuse_stacks(compute *c)
{
    ep_err e = {{0}};
    const int q4 = KERN_Q4_K, q6 = KERN_Q6_K;
    CHECK_INT(open_shape(c, KERN_Q5_K, KERN_Q5_K, q4, 256, 256, 1, &e), EP_ERR_UNSUPPORTED);
    CHECK_INT(open_shape(c, q4, q6, q4, 256, 256, 1, &e), EP_ERR_UNSUPPORTED);
    CHECK_INT(open_shape(c, q4, q4, 77, 256, 256, 1, &e), EP_ERR_UNSUPPORTED);
    CHECK_INT(open_shape(c, q4, q4, q4, 200, 256, 1, &e), EP_ERR_UNSUPPORTED);
    CHECK_INT(open_shape(c, q4, q4, q4, 256, 65536 + 256, 1, &e), EP_ERR_UNSUPPORTED);
    CHECK_INT(open_shape(c, q4, q4, q4, 256, 256, 0, &e), EP_ERR_INVALID);
    CHECK_INT(open_shape(c, q4, q4, q4, 256, 256, 1, &e), EP_OK);
}

static void refuse_passes(compute *c, compute_stack *const *s)
{
    const host_pass *p = &passes[2 * LAYERS]; /* {3, 2} of layer 0 */
    compute_ffn_args a = p->a;
    int32_t offset[HOST_EXPERTS + 1], place[5], row[5];
    a.act = KERN_ACT_Q8_128;
    CHECK_INT(host_run(&compute_cuda, c, s[0], &a), EP_ERR_INVALID);
    a = p->a;
    a.n_rows = ROWS + 1;
    CHECK_INT(host_run(&compute_cuda, c, s[0], &a), EP_ERR_TOO_LARGE);
    for (int i = 0; i < 4; i++) {
        a = p->a;
        memcpy(offset, p->offset, sizeof offset);
        memcpy(place, p->place, sizeof place);
        memcpy(row, p->row, sizeof row);
        if (i == 0) offset[0] = 1;
        if (i == 1) offset[1] = 6;
        if (i == 2) place[4] = 5;
        if (i == 3) row[2] = -1;
        a.expert_offset = offset;
        a.pair_out = place;
        a.pair_row = row;
        CHECK_INT(host_run(&compute_cuda, c, s[0], &a), EP_ERR_INVALID);
    }
    a = p->a;
    memset(offset, 0, sizeof offset);
    a.expert_offset = offset;
    a.n_pairs = 0;
    CHECK_INT(host_run(&compute_cuda, c, s[0], &a), EP_OK);
}

/* What is refused says so, and leaves the device as it was. */
static void test_refusals(void)
{
    emulated_options o = emulated_options_default();
    compute_stack *s[LAYERS] = {0};
    ep_err err = {{0}};
    uint64_t sum;
    emulated_start(&o);
    compute_cuda.close(NULL);
    compute_cuda.stack_close(NULL);
    compute *c = open_device("cuda:0");
    compute_cuda.close(c); /* without a stack or a pass */
    CHECK_INT(compute_cuda.open(&c, "cuda:2", 1, &err), EP_ERR_UNSUPPORTED);
    CHECK(strstr(err.text, "cuda:2") != NULL);
    c = open_device("cuda:0");
    CHECK(strstr(compute_cuda.describe(c), "wgmma") != NULL);
    refuse_stacks(c);
    CHECK_INT(host_layer_open(&layers[0], c, &s[0], &err), EP_OK);
    CHECK_INT(compute_cuda.stack_load(s[0], -1, NULL, NULL, NULL, &sum), EP_ERR_INVALID);
    CHECK_INT(compute_cuda.stack_load(s[0], 6, NULL, NULL, NULL, &sum), EP_ERR_INVALID);
    CHECK_INT(host_run(&compute_cuda, c, s[0], &passes[0].a), EP_ERR_TOO_LARGE);
    CHECK_INT(compute_cuda.reserve(c, 1, 1 << 30), EP_ERR_TOO_LARGE);
    CHECK_INT(compute_cuda.reserve(c, ROWS, PAIRS), EP_OK);
    refuse_passes(c, s);
    run_checked(c, s, 2 * LAYERS);
    compute_cuda.stack_close(s[0]);
    compute_cuda.close(c);
    CHECK_INT(emulated_finish(), 0);
}

/* A device with little shared memory refuses what does not fit. */
static void test_small_device(void)
{
    emulated_options o = emulated_options_default();
    ep_err err = {{0}};
    o.major = 8;
    o.minor = 9;
    o.smem_limit = 99 * 1024;
    emulated_start(&o);
    compute *c = open_device("cuda:0");
    CHECK_INT(open_shape(c, KERN_Q4_K, KERN_Q4_K, KERN_Q6_K, 256, 256, 1, &err), EP_OK);
    CHECK_INT(open_shape(c, KERN_BF16, KERN_BF16, KERN_BF16, 256, 256, 1, &err),
              EP_ERR_UNSUPPORTED);
    CHECK(strstr(err.text, "shared memory") != NULL);
    compute_cuda.close(c);
    CHECK_INT(emulated_finish(), 0);
}

/* The question to the device, by its answers. */
static void test_answers(void)
{
    static const struct {
        emulated_answer answer;
        const char *form, *text;
        ep_status status;
    } cases[] = {
        {EMULATED_COMPUTED, "", "wgmma and mma.sync", EP_OK},
        {EMULATED_EQUAL, "", "wgmma and mma.sync", EP_OK},
        {EMULATED_DIFFERENT, "", "(wgmma gives other bits: Q6_K)", EP_OK},
        {EMULATED_MISSING, "", "mma.sync", EP_OK},
        {EMULATED_MISSING, "wgmma", "not built for sm_90a", EP_ERR_UNSUPPORTED},
        {EMULATED_DIFFERENT, "mma", "mma.sync by MOED_CUDA_FORM", EP_OK},
        {EMULATED_DIFFERENT, "wgmma", "wgmma by MOED_CUDA_FORM", EP_OK},
        {EMULATED_ENDLESS, "", "did not end", EP_ERR_DEVICE},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (int policy = EMULATED_EAGER; policy <= EMULATED_RANDOM; policy++) {
            emulated_options o = emulated_options_default();
            ep_err err = {{0}};
            compute *c = NULL;
            if (cases[i].answer == EMULATED_COMPUTED && policy != EMULATED_RANDOM) continue;
            setenv("MOED_CUDA_FORM", cases[i].form, 1);
            o.answer = cases[i].answer;
            o.policy = (emulated_policy)policy;
            emulated_start(&o);
            CHECK_INT(compute_cuda.open(&c, "cuda:1", 1, &err), cases[i].status);
            const char *text = c != NULL ? compute_cuda.describe(c) : err.text;
            CHECK(strstr(text, cases[i].text) != NULL);
            if (strstr(text, cases[i].text) == NULL) printf("    %s\n", text);
            compute_cuda.close(c);
            /* a device that is busy for ever keeps its memory and its stream */
            if (cases[i].answer != EMULATED_ENDLESS) CHECK_INT(emulated_finish(), 0);
        }
    unsetenv("MOED_CUDA_FORM");
}

/* The wgmma form for everything, and for what else than one type. */
static void test_forms(void)
{
    emulated_options o = emulated_options_default();
    o.answer = EMULATED_DIFFERENT;
    whole_run(&o);
    setenv("MOED_CUDA_FORM", "wgmma", 1);
    whole_run(&o);
    unsetenv("MOED_CUDA_FORM");
}

static void test_detects(void)
{
    CHECK_INT(host_detects(), 0);
}

static void test_stand_in(void)
{
    CHECK_INT(host_stand_in(), 0);
}

static void test_failing_calls(void)
{
    CHECK_INT(host_failing_calls(), 0);
}

static void test_failing_ops(void)
{
    CHECK_INT(host_failing_ops(), 0);
}

static void test_no_memory(void)
{
    CHECK_INT(host_no_memory(), 0);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {{"detects", test_detects},
                                      {"stand_in", test_stand_in},
                                      {"eager", test_eager},
                                      {"lazy", test_lazy},
                                      {"random", test_random},
                                      {"older", test_older},
                                      {"forms", test_forms},
                                      {"answers", test_answers},
                                      {"threads", test_threads},
                                      {"refusals", test_refusals},
                                      {"small_device", test_small_device},
                                      {"failing_calls", test_failing_calls},
                                      {"failing_ops", test_failing_ops},
                                      {"no_memory", test_no_memory}};
    ep_log_open("test", EP_LOG_ERROR);
    kern_select("scalar", NULL);
    make_data();
    int failed = test_main(argc, argv, cases, sizeof cases / sizeof cases[0]);
    free_data();
    if (check_failures > 0) printf("%d failures of data\n", check_failures);
    return failed != 0 ? failed : check_failures != 0;
}
