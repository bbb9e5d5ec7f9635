/*
 * What failures lead to: a small shard opens, loads, computes and closes, with one failure at each
 * call of the run-time library, at each operation of the device, and at each allocation of the
 * host's. Demanded of each:
 *
 * 1. nothing that could be given back is left, nothing is misused, nothing crashes;
 * 2. a lost device is EP_ERR_DEVICE (or a refusal to open), with a text that names it, and every
 *    later call says the same;
 * 3. without memory, nothing is lost: the same call once more succeeds;
 * 4. what is said to have succeeded has the right bits.
 */
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/base.h"
#include "kernels/kernels.h"
#include "tests/gpu/host_layers.h"
#include "tests/gpu/host_tests.h"
#include "tests/gpu/runtime_emulated.h"
#include "tests/test.h"

enum { LAYERS = 2, PASSES = 4, ROWS = 25, PAIRS = 48, TEXT = 160 };

/* The last two are under way together; one is large enough for three streams. */
static const int counts[PASSES][HOST_EXPERTS] = {{1, 2}, {20}, {PAIRS}, {3}};

#define MESSAGE_BYTES ((size_t)512 << 10)
#define RESULTS_AT    ((size_t)128 << 10)

static host_layer layers[LAYERS];
static host_pass passes[PASSES]; /* of layers 0, 1, 0, 1 */
static uint8_t *messages;        /* rows and results of the last two, half of it each */
static compute *cpu;

static void make_data(void)
{
    if (compute_cpu.open(&cpu, "cpu", 1, NULL) != EP_OK) abort();
    host_layer_make(&layers[0], cpu, KERN_F16, KERN_F16, 1024, 16, 2);
    host_layer_make(&layers[1], cpu, KERN_BF16, KERN_Q8_0, 48, 32, 1);
    if (compute_cpu.reserve(cpu, ROWS, PAIRS) != EP_OK) abort();
    for (int i = 0; i < PASSES; i++)
        host_pass_make(&passes[i], &layers[i % LAYERS], counts[i], KERN_ACT_F32);
    messages = ep_map(2 * MESSAGE_BYTES);
}

static void free_data(void)
{
    ep_unmap(messages, 2 * MESSAGE_BYTES);
    for (int i = 0; i < PASSES; i++)
        host_pass_free(&passes[i]);
    for (int i = 0; i < LAYERS; i++)
        host_layer_free(&layers[i]);
    compute_cpu.close(cpu);
}

/* Hundreds of failures are logged; standard error comes back with `back`. */
static int hide_log(int back)
{
    fflush(stderr);
    int kept = back >= 0 ? back : dup(STDERR_FILENO);
    int to = back >= 0 ? back : open("/dev/null", O_WRONLY);
    dup2(to, STDERR_FILENO);
    close(to);
    return kept;
}

/* ---- a life ---- */

typedef struct life {
    compute *c;
    compute_stack *s[LAYERS];
    ep_err err;
    bool only_opens, pinned;
    int calls[2];   /* before and after reserve */
    bool no_memory; /* the failure is one of memory */
    bool of_host;   /* of ours, which nobody counts */
    bool lost;
    char what[TEXT]; /* the failure, for messages */
} life;

static bool has_failed(const life *l)
{
    return emulated_failed() || l->of_host;
}

static void complain(life *l, const char *step, const char *what, ep_status status)
{
    test_failures++;
    printf("    %s, %s: %s (%s; \"%s\")\n", l->what, step, what, ep_status_name(status),
           l->err.text);
}

/* Rule 2: the text that names the device, its error and what was done. */
static void check_lost(life *l, const char *step, ep_status status)
{
    l->lost = true;
    if (l->c == NULL) {
        if (strstr(l->err.text, "cuda:1") == NULL) complain(l, step, "no device named", status);
        return;
    }
    const char *text = compute_cuda.failure(l->c);
    if (status != EP_ERR_DEVICE) complain(l, step, "no EP_ERR_DEVICE", status);
    if (strstr(text, "device cuda:1: ") == NULL || strstr(text, "illegal memory access") == NULL ||
        strlen(text) < sizeof "device cuda:1: : an illegal memory access was encountered (700)") {
        snprintf(l->err.text, sizeof l->err.text, "%s", text);
        complain(l, step, "a failure without its text", status);
    }
}

typedef ep_status (*step_fn)(life *l, int i);

/* False when the life is over. */
static bool step(life *l, const char *name, step_fn fn, int i)
{
    l->err.text[0] = '\0';
    ep_status status = fn(l, i);
    if (status == EP_OK) {
        if (l->lost) complain(l, name, "succeeds on a lost device", status);
        return true;
    }
    if (!has_failed(l)) complain(l, name, "fails without reason", status);
    if (l->lost && status != EP_ERR_DEVICE) complain(l, name, "no EP_ERR_DEVICE again", status);
    if (l->lost) return true;
    if (!l->no_memory) {
        check_lost(l, name, status);
        return l->c != NULL;
    }
    if (status == EP_ERR_DEVICE) complain(l, name, "lost for want of memory", status);
    status = fn(l, i); /* rule 3 */
    if (status != EP_OK) complain(l, name, "fails again", status);
    return status == EP_OK;
}

static ep_status open_device(life *l, int i)
{
    (void)i;
    return compute_cuda.open(&l->c, "cuda:1", 1, &l->err);
}

static ep_status open_stack(life *l, int i)
{
    ep_status status = compute_cuda.stack_open(l->c, &layers[i].shape, &l->s[i], &l->err);
    if (status != EP_OK && l->err.text[0] == '\0') complain(l, "stack_open", "no text", status);
    return status;
}

static ep_status load(life *l, int i)
{
    return l->s[i / 2] != NULL ? host_layer_load(&layers[i / 2], l->s[i / 2], i % 2)
                               : EP_ERR_DEVICE;
}

static ep_status reserve(life *l, int i)
{
    (void)i;
    return compute_cuda.reserve(l->c, ROWS, PAIRS);
}

static ep_status pass(life *l, int i)
{
    host_pass *p = &passes[i];
    if (l->s[i % LAYERS] == NULL) return EP_ERR_DEVICE;
    memset(p->a.out, 0xff, host_pass_out_bytes(p));
    ep_status status = host_run(&compute_cuda, l->c, l->s[i % LAYERS], &p->a);
    if (status == EP_OK && !host_pass_check(p, p->a.out, cpu))
        complain(l, "pass", "rule 4", status);
    return status;
}

/* Failure changes nothing but speed; whether the device is lost the next call says. */
static ep_status pin(life *l, int i)
{
    (void)i;
    ep_status status = compute_cuda.pin(l->c, messages, 2 * MESSAGE_BYTES);
    l->pinned = status == EP_OK;
    return status == EP_ERR_UNSUPPORTED && !l->no_memory ? EP_OK : status;
}

static ep_status begin(life *l, int i)
{
    const host_pass *p = &passes[i];
    uint8_t *rows = messages + (size_t)(i % 2) * MESSAGE_BYTES;
    compute_ffn_args a = p->a;
    memcpy(rows, a.rows, host_pass_rows_bytes(p));
    memset(rows + RESULTS_AT, 0xff, host_pass_out_bytes(p));
    a.rows = rows;
    a.out = (float *)(void *)(rows + RESULTS_AT);
    if (l->s[i % LAYERS] == NULL) return EP_ERR_DEVICE;
    ep_status status = compute_cuda.ffn_begin(l->c, l->s[i % LAYERS], &a);
    if (status != EP_OK) memset(rows, 0xff, MESSAGE_BYTES); /* ours again */
    return status;
}

static ep_status end(life *l, int i)
{
    const uint8_t *results = messages + (size_t)(i % 2) * MESSAGE_BYTES + RESULTS_AT;
    while (!compute_cuda.ffn_is_done(l->c)) {
    }
    ep_status status = compute_cuda.ffn_end(l->c);
    if (l->lost && status == EP_ERR_INVALID) return EP_ERR_DEVICE; /* it never began */
    if (status == EP_OK && !host_pass_check(&passes[i], (const float *)(const void *)results, cpu))
        complain(l, "ffn_end", "rule 4", status);
    return status;
}

static void live(const emulated_options *o, life *l)
{
    emulated_start(o);
    bool on = step(l, "open", open_device, 0) && !l->only_opens;
    for (int i = 0; i < LAYERS && on; i++)
        on = step(l, "stack_open", open_stack, i);
    for (int i = 0; i < 3 && on; i++) /* two experts and one */
        on = step(l, "stack_load", load, i);
    l->calls[0] = emulated_calls();
    if (on) on = step(l, "reserve", reserve, 0);
    l->calls[1] = emulated_calls();
    for (int i = 0; i < PASSES && on; i++)
        on = step(l, "a pass", pass, i);
    if (on) on = step(l, "pin", pin, 0);
    for (int i = PASSES - 2; i < PASSES && on; i++)
        on = step(l, "ffn_begin", begin, i);
    for (int i = PASSES - 2; i < PASSES && on; i++)
        on = step(l, "ffn_end", end, i);
    if (l->pinned) compute_cuda.unpin(l->c, messages);
    if (on && l->s[0] != NULL) {
        uint64_t sum = compute_cuda.stack_checksum(l->s[0], 1);
        if (sum != layers[0].packed[1] && !(sum == 0 && has_failed(l)))
            complain(l, "stack_checksum", "rule 4", EP_OK);
    }
    for (int i = 0; i < LAYERS; i++)
        compute_cuda.stack_close(l->s[i]);
    compute_cuda.close(l->c);
    if (emulated_finish() > 0) complain(l, "close", "rule 1", EP_OK);
}

/* ---- which failures ---- */

/* Lives without failure, then with one at each call, or operation. Returns how many there were. */
static int live_with_each(emulated_options o, bool ops, int error, bool only_opens)
{
    life first = {.what = "no failure", .only_opens = only_opens};
    int met = 0;
    o.fail_call = o.fail_op = 0;
    live(&o, &first);
    const int n = ops ? emulated_ops() : emulated_calls();
    o.error = error;
    for (int i = 1; i <= n && test_failures < 20; i++) {
        /* the question is the same for each type, captures are for each graph */
        const bool again = only_opens ? i > 40 : i > first.calls[0] + 60 && i < first.calls[1];
        if (!ops && again && i % 7 != 0) continue;
        life l = {.no_memory = error == cudaErrorMemoryAllocation, .only_opens = only_opens};
        *(ops ? &o.fail_op : &o.fail_call) = i;
        snprintf(l.what, sizeof l.what, "%s %d of %d, error %d, policy %d, seed %d",
                 ops ? "operation" : "call", i, n, error, (int)o.policy, (int)o.seed);
        live(&o, &l);
        met += emulated_failed();
    }
    return met;
}

/* Calls fail at once, so what the device did before matters less than for operations. */
static int under_each_policy(bool ops, int error)
{
    emulated_options o = emulated_options_default();
    int met = 0;
    setenv("MOED_CUDA_FORM", "mma", 1); /* the question has as many calls as the rest */
    for (int policy = EMULATED_EAGER; policy <= EMULATED_RANDOM; policy++) {
        if (!ops && policy == EMULATED_EAGER) continue;
        if (error == cudaErrorMemoryAllocation && policy != EMULATED_RANDOM) continue;
        o.policy = (emulated_policy)policy;
        met += live_with_each(o, ops, error, false);
    }
    unsetenv("MOED_CUDA_FORM");
    return met + live_with_each(o, ops, error, true);
}

int host_failing_calls(void)
{
    test_failures = 0;
    int log = hide_log(-1);
    make_data();
    int n = under_each_policy(false, cudaErrorIllegalAddress) +
            under_each_policy(false, cudaErrorMemoryAllocation);
    free_data();
    hide_log(log);
    CHECK(n > 1000);
    printf("    %d failures of calls\n", n);
    return test_failures;
}

/* Kernels and copies that fail while they run: what is told depends on when. */
int host_failing_ops(void)
{
    test_failures = 0;
    int log = hide_log(-1);
    make_data();
    int n = under_each_policy(true, cudaErrorIllegalAddress);
    free_data();
    hide_log(log);
    CHECK(n > 100);
    printf("    %d failures of operations\n", n);
    return test_failures;
}

int host_no_memory(void)
{
    test_failures = 0;
    emulated_options o = emulated_options_default();
    int log = hide_log(-1);
    make_data();
    for (int i = 1; i < 40 && test_failures < 20; i++) {
        life l = {.no_memory = true, .of_host = true};
        snprintf(l.what, sizeof l.what, "allocation %d", i);
        ep_alloc_fail_at(i);
        live(&o, &l);
        ep_alloc_fail_at(0);
    }
    free_data();
    hide_log(log);
    return test_failures;
}
