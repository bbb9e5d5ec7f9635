/*
 * A build with CUDA on a machine that may have no GPU: names, refusals and the choice of "auto".
 */
#include "kernels/compute.h"
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

int main(int argc, char **argv)
{
    static const test_case cases[] = {{"names", test_names}, {"no_device", test_no_device}};
    ep_log_open("test", EP_LOG_INFO);
    kern_select("scalar", NULL);
    return test_main(argc, argv, cases, sizeof cases / sizeof cases[0]);
}
