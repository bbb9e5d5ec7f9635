/*
 * The choice of the instruction set, and the CPU behind the device contract: what each refuses and
 * with which words, the arithmetic of a tiny stack against the specification's functions, arguments
 * from a peer that would leave their buffers, and every allocation failing once.
 */
#include <stdlib.h>
#include <string.h>
#include "base/base.h"
#include "kernels/compute.h"
#include "kernels/kernels.h"
#include "tests/test.h"

enum { HIDDEN = 32, INTER = 48, EXPERTS = 3 };

static bool has(const ep_err *err, const char *part)
{
    if (strstr(err->text, part) != NULL) return true;
    printf("    \"%s\" does not say \"%s\"\n", err->text, part);
    return false;
}

static void test_select(void)
{
    ep_err err = {{0}};
    unsetenv("MOED_KERNELS");
    CHECK_INT(kern_select("sse9", &err), EP_ERR_INVALID);
    CHECK(has(&err, "\"sse9\"") && has(&err, "auto, scalar, avx2, avx512, amx"));
    CHECK_INT(kern_select("", &err), EP_ERR_INVALID);
    CHECK_INT(kern_select("scalar", &err), EP_OK);
    CHECK_STR(kern_level(), "scalar");
    CHECK_INT(kern_select("auto", &err), EP_OK);
    static const char *const levels[] = {"scalar", "avx2", "avx512", "amx"};
    const char *best = "";
    for (int i = 0; i < 4; i++) {
        ep_status s = kern_select(levels[i], &err);
        CHECK_INT(s, kern_has_level(levels[i]) ? EP_OK : EP_ERR_UNSUPPORTED);
        if (s == EP_OK)
            CHECK_STR(kern_level(), levels[i]);
        else
            CHECK(has(&err, levels[i]) && has(&err, "no "));
        if (s == EP_OK) best = levels[i];
    }
    CHECK_INT(kern_select(NULL, &err), EP_OK);
    CHECK_STR(kern_level(), best);
    CHECK(!kern_has_level("auto") && !kern_has_level("sse9"));
}

static void test_select_environment(void)
{
    ep_err err = {{0}};
    setenv("MOED_KERNELS", "scalar", 1);
    CHECK_INT(kern_select("sse9", &err), EP_OK);
    CHECK_STR(kern_level(), "scalar");
    setenv("MOED_KERNELS", "fast", 1);
    CHECK_INT(kern_select("scalar", &err), EP_ERR_INVALID);
    CHECK(has(&err, "MOED_KERNELS") && has(&err, "\"fast\""));
    CHECK_STR(kern_level(), "scalar");
    setenv("MOED_KERNELS", "", 1); /* as if it were not set */
    CHECK_INT(kern_select("scalar", &err), EP_OK);
    unsetenv("MOED_KERNELS");
}

static void test_open_refuses(void)
{
    const compute_ops *ops = NULL;
    compute *c = NULL;
    ep_err err = {{0}};
    CHECK_INT(kern_select("scalar", &err), EP_OK);
    CHECK_INT(compute_open(&ops, &c, "tpu", 1, &err), EP_ERR_INVALID);
    CHECK(has(&err, "\"tpu\"") && has(&err, "cpu, cuda:N and auto"));
    CHECK_INT(compute_open(&ops, &c, "cpu:0", 1, &err), EP_ERR_INVALID);
    CHECK_INT(compute_open(&ops, &c, "cpus", 1, &err), EP_ERR_INVALID);
    CHECK_INT(compute_open(&ops, &c, "cpu", 0, &err), EP_ERR_INVALID);
#ifndef MOED_CUDA
    CHECK_INT(compute_open(&ops, &c, "cuda:0", 1, &err), EP_ERR_UNSUPPORTED);
    CHECK(has(&err, "built without CUDA"));
#endif
    CHECK(c == NULL && ops == NULL);
    CHECK_INT(compute_open(&ops, &c, "cpu", 2, &err), EP_OK);
    if (c == NULL) return;
    CHECK_STR(ops->kind, "cpu");
    CHECK_STR(ops->describe(c), "cpu, scalar, 2 threads");
    ops->close(c);
    ops->close(NULL);
}

static void test_stack_refuses(void)
{
    static const struct {
        compute_shape shape;
        ep_status status;
        const char *says;
    } cases[] = {
        {{KERN_Q4_K, KERN_Q4_K, KERN_MXFP4, 256, 256, 1, false}, EP_ERR_UNSUPPORTED, "down"},
        {{77, KERN_Q4_K, KERN_Q4_K, 256, 256, 1, false}, EP_ERR_UNSUPPORTED, "77"},
        {{KERN_Q4_K, KERN_Q4_K, KERN_Q4_K, 128, 256, 1, false},
         EP_ERR_UNSUPPORTED,
         "multiple of 256"},
        {{KERN_F32, KERN_F32, KERN_F32, 40, 16, 1, false}, EP_ERR_UNSUPPORTED, "multiple"},
        {{KERN_F32, KERN_F32, KERN_F32, 1 << 20, 16, 1, false}, EP_ERR_UNSUPPORTED, "65536"},
        {{KERN_F32, KERN_F32, KERN_F32, -16, 16, 1, false}, EP_ERR_UNSUPPORTED, "-16"},
        {{KERN_F32, KERN_F32, KERN_F32, 16, 16, 0, false}, EP_ERR_INVALID, "0 experts"},
    };
    const compute_ops *ops;
    compute *c;
    compute_stack *s = NULL;
    ep_err err = {{0}};
    CHECK_INT(kern_select("scalar", &err), EP_OK);
    if (compute_open(&ops, &c, "cpu", 1, &err) != EP_OK) return;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        CHECK_INT(ops->stack_open(c, &cases[i].shape, &s, &err), cases[i].status);
        CHECK(has(&err, cases[i].says));
        CHECK(s == NULL);
    }
    ops->close(c);
}

/* ---- a tiny layer ---- */

typedef struct layer {
    const compute_ops *ops;
    compute *c;
    compute_stack *s;
    float gate[EXPERTS][INTER * HIDDEN], up[EXPERTS][INTER * HIDDEN], down[EXPERTS][HIDDEN * INTER];
    float x[2 * HIDDEN], out[3 * HIDDEN];
    uint64_t checksum[EXPERTS];
} layer;

static const compute_shape tiny = {KERN_F32, KERN_F32, KERN_F32, HIDDEN, INTER, EXPERTS, false};

static float small(int i)
{
    return (float)(i * 37 % 101 - 50) * 0.01f;
}

static ep_status layer_open(layer *l, ep_err *err)
{
    ep_status s = compute_open(&l->ops, &l->c, "cpu", 2, err);
    if (s == EP_OK) s = l->ops->stack_open(l->c, &tiny, &l->s, err);
    for (int e = 0; e < EXPERTS && s == EP_OK; e++) {
        for (int i = 0; i < INTER * HIDDEN; i++) {
            l->gate[e][i] = small(i + e);
            l->up[e][i] = small(3 * i + e);
            l->down[e][i] = small(7 * i + e);
        }
        s = l->ops->stack_load(l->s, e, l->gate[e], l->up[e], l->down[e], &l->checksum[e]);
    }
    for (int i = 0; i < 2 * HIDDEN; i++)
        l->x[i] = small(5 * i + 1);
    return s == EP_OK ? l->ops->reserve(l->c, 2, 3) : s;
}

static void layer_close(layer *l)
{
    if (l->s != NULL) l->ops->stack_close(l->s);
    if (l->c != NULL) l->ops->close(l->c);
    l->s = NULL;
    l->c = NULL;
}

/* The same in the plainest way: F32 products are one fma per weight in ascending order. */
static void expect(const layer *l, int e, const float *x, float *y)
{
    float g[INTER], u[INTER];
    for (int n = 0; n < INTER; n++) {
        g[n] = u[n] = 0;
        for (int k = 0; k < HIDDEN; k++) {
            g[n] = __builtin_fmaf(l->gate[e][n * HIDDEN + k], x[k], g[n]);
            u[n] = __builtin_fmaf(l->up[e][n * HIDDEN + k], x[k], u[n]);
        }
    }
    kern_silu_mul(g, g, u, INTER);
    for (int n = 0; n < HIDDEN; n++) {
        y[n] = 0;
        for (int k = 0; k < INTER; k++)
            y[n] = __builtin_fmaf(l->down[e][n * INTER + k], g[k], y[n]);
    }
}

static const int32_t offsets[EXPERTS + 1] = {0, 1, 1, 3}, pair_row[3] = {1, 0, 1},
                                       pair_out[3] = {2, 0, 1};

static compute_ffn_args args_of(layer *l)
{
    return (compute_ffn_args){.rows = l->x,
                              .act = KERN_ACT_F32,
                              .n_rows = 2,
                              .n_pairs = 3,
                              .expert_offset = offsets,
                              .pair_row = pair_row,
                              .pair_out = pair_out,
                              .out = l->out};
}

static void test_ffn(void)
{
    static layer l;
    ep_err err = {{0}};
    CHECK_INT(kern_select("auto", &err), EP_OK);
    CHECK_INT(layer_open(&l, &err), EP_OK);
    if (l.s == NULL) return;
    compute_ffn_args a = args_of(&l);
    uint64_t before = ep_alloc_count();
    CHECK_INT(compute_ffn(l.ops, l.c, l.s, &a), EP_OK);
    CHECK_INT(ep_alloc_count() - before, 0);
    for (int p = 0; p < 3; p++) {
        float want[HIDDEN];
        expect(&l, p == 0 ? 0 : 2, l.x + pair_row[p] * HIDDEN, want);
        CHECK(memcmp(want, l.out + pair_out[p] * HIDDEN, sizeof want) == 0);
    }
    for (int e = 0; e < EXPERTS; e++)
        CHECK(l.ops->stack_checksum(l.s, e) == l.checksum[e]);
    CHECK(l.checksum[0] != l.checksum[1] && l.checksum[1] != l.checksum[2]);
    CHECK(l.ops->stack_bytes(l.s) >= EXPERTS * 3 * INTER * HIDDEN * sizeof(float));
    uint64_t sum;
    CHECK_INT(l.ops->stack_load(l.s, EXPERTS, l.gate[0], l.up[0], l.down[0], &sum), EP_ERR_INVALID);
    CHECK_INT(l.ops->stack_load(l.s, -1, l.gate[0], l.up[0], l.down[0], &sum), EP_ERR_INVALID);
    layer_close(&l);
}

static void test_ffn_refuses(void)
{
    static layer l;
    ep_err err = {{0}};
    CHECK_INT(kern_select("auto", &err), EP_OK);
    CHECK_INT(layer_open(&l, &err), EP_OK);
    if (l.s == NULL) return;
    static const int32_t descending[] = {0, 2, 1, 3}, late[] = {1, 1, 1, 3}, few[] = {0, 1, 1, 2};
    static const int32_t outside[] = {1, 0, 2}, negative[] = {0, -1, 1}, far_out[] = {0, 1, 3};
    compute_ffn_args a = args_of(&l);
    a.n_rows = 3;
    CHECK_INT(compute_ffn(l.ops, l.c, l.s, &a), EP_ERR_TOO_LARGE);
    a = args_of(&l);
    a.act = KERN_ACT_Q8_32;
    CHECK_INT(compute_ffn(l.ops, l.c, l.s, &a), EP_ERR_INVALID);
    static const int32_t *const bad_offsets[] = {descending, late, few};
    for (int i = 0; i < 3; i++) {
        a = args_of(&l);
        a.expert_offset = bad_offsets[i];
        CHECK_INT(compute_ffn(l.ops, l.c, l.s, &a), EP_ERR_INVALID);
    }
    static const int32_t *const bad_rows[] = {outside, negative};
    for (int i = 0; i < 2; i++) {
        a = args_of(&l);
        a.pair_row = bad_rows[i];
        CHECK_INT(compute_ffn(l.ops, l.c, l.s, &a), EP_ERR_INVALID);
    }
    a = args_of(&l);
    a.pair_out = far_out;
    CHECK_INT(compute_ffn(l.ops, l.c, l.s, &a), EP_ERR_INVALID);
    static const int32_t nothing[EXPERTS + 1] = {0};
    a = args_of(&l);
    a.expert_offset = nothing;
    a.n_pairs = 0;
    CHECK_INT(compute_ffn(l.ops, l.c, l.s, &a), EP_OK);
    layer_close(&l);
}

/* The n-th allocation fails, for every n until none does: an error, nothing leaked, nothing
 * crashed. */
static void test_no_memory(void)
{
    static layer l;
    CHECK_INT(kern_select("scalar", NULL), EP_OK);
    for (int n = 1; n < 100; n++) {
        memset(&l, 0, sizeof l);
        ep_alloc_fail_at(n);
        ep_status s = layer_open(&l, NULL);
        ep_alloc_fail_at(0);
        layer_close(&l);
        if (s == EP_OK) {
            CHECK(n > 2);
            return;
        }
        CHECK_INT(s, EP_ERR_NOMEM);
    }
    CHECK(!"it never succeeds");
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"select", test_select},
        {"select_environment", test_select_environment},
        {"open_refuses", test_open_refuses},
        {"stack_refuses", test_stack_refuses},
        {"ffn", test_ffn},
        {"ffn_refuses", test_ffn_refuses},
        {"no_memory", test_no_memory},
    };
    return test_main(argc, argv, cases, sizeof cases / sizeof cases[0]);
}
