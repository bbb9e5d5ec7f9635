/*
 * A build with CUDA on a machine that may have no GPU: names, refusals, the choice of "auto" and
 * the choice between the forms of the product.
 */
#include <stdlib.h>
#include "kernels/compute.h"
#include "kernels/cuda/form.h"
#include "kernels/kernels.h"
#include "tests/test.h"

static bool has(const ep_err *err, const char *part)
{
    if (strstr(err->text, part) != NULL) return true;
    printf("    \"%s\" does not say \"%s\"\n", err->text, part);
    return false;
}

static void test_names(void)
{
    static const char *const bad[] = {"cuda",    "cuda:",   "cuda:x",      "cuda:-1",
                                      "cuda:1x", "cuda: 1", "cuda:9999999"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        ep_err err = {{0}};
        CHECK_INT(compute_cuda.can_open(bad[i], &err), EP_ERR_INVALID);
        CHECK(has(&err, bad[i]) && has(&err, "cuda:0"));
    }
}

static void test_no_device(void)
{
    ep_err err = {{0}};
    const compute_ops *ops = NULL;
    compute *c = NULL;
    CHECK_INT(compute_open(&ops, &c, "cuda:1000", 1, &err), EP_ERR_UNSUPPORTED);
    CHECK(has(&err, "device cuda:1000"));
    CHECK(c == NULL && ops == NULL);
    if (compute_cuda.can_open("cuda:0", &err) == EP_OK) {
        test_skip("this machine has a GPU");
        return;
    }
    CHECK_INT(compute_open(&ops, &c, "cuda:0", 1, &err), EP_ERR_UNSUPPORTED);
    CHECK(has(&err, "device cuda:0: no usable GPU"));
    printf("    %s\n", err.text);
    CHECK_INT(compute_open(&ops, &c, "auto", 1, &err), EP_OK);
    if (c == NULL) return;
    CHECK_STR(ops->kind, "cpu");
    ops->close(c);
}

static void test_form_names(void)
{
    gpu_forms f;
    ep_err err = {{0}};
    setenv("MOED_CUDA_FORM", "wgmm", 1);
    CHECK_INT(gpu_forms_open(&f, 0, 0, &err), EP_ERR_INVALID);
    CHECK(has(&err, "MOED_CUDA_FORM") && has(&err, "\"wgmm\"") && has(&err, "wgmma, mma"));
    unsetenv("MOED_CUDA_FORM");
    setenv("MOED_CUDA_CHAIN", "1", 1);
    CHECK_INT(gpu_forms_open(&f, 0, 0, &err), EP_ERR_INVALID);
    CHECK(has(&err, "MOED_CUDA_CHAIN") && has(&err, "\"1\""));
    unsetenv("MOED_CUDA_CHAIN");
}

/* What is chosen was thought possible, so it has a graph; few pairs split, many take wgmma where
 * it serves. */
static void test_choice(void)
{
    for (int only = 0; only < 2; only++)
        for (int wgmma = only; wgmma < 2; wgmma++)
            for (int active = 1; active <= 128; active += 127)
                for (int pairs = active; pairs < 5000; pairs++) {
                    gpu_forms f = {.only_wgmma = only};
                    int form = gpu_forms_choose(&f, wgmma, pairs, active);
                    CHECK(gpu_forms_possible(&f, wgmma, pairs, form));
                    CHECK(form != GPU_FORM_WGMMA || wgmma);
                    if (only) continue;
                    if (pairs <= 16 * active) CHECK_INT(form, GPU_FORM_SPLIT);
                    if (pairs > 32 * active)
                        CHECK_INT(form, wgmma ? GPU_FORM_WGMMA : GPU_FORM_WIDE);
                }
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {{"names", test_names},
                                      {"no_device", test_no_device},
                                      {"form_names", test_form_names},
                                      {"choice", test_choice}};
    ep_log_open("test", EP_LOG_INFO);
    kern_select("scalar", NULL);
    return test_main(argc, argv, cases, sizeof cases / sizeof cases[0]);
}
