#ifndef EP_TESTS_TEST_H
#define EP_TESTS_TEST_H
/*
 * The harness of the unit tests: a table of named functions, `--list`, one test by name, and a
 * closing line "N passed, N failed, N skipped". CHECK records a failure with its place and goes on,
 * so one run shows all of them; a test that cannot go on returns.
 */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

typedef struct test_case {
    const char *name;
    void (*run)(void);
} test_case;

static int test_failures;
static const char *test_skip_reason;

#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            test_failures++;                                                                       \
            printf("    %s:%d: failed: %s\n", __FILE__, __LINE__, #cond);                          \
        }                                                                                          \
    } while (0)
#define CHECK_INT(got, want)                                                                       \
    do {                                                                                           \
        long long got_ = (long long)(got), want_ = (long long)(want);                              \
        if (got_ != want_) {                                                                       \
            test_failures++;                                                                       \
            printf("    %s:%d: %s is %lld, expected %lld\n", __FILE__, __LINE__, #got, got_,       \
                   want_);                                                                         \
        }                                                                                          \
    } while (0)
#define CHECK_STR(got, want)                                                                       \
    do {                                                                                           \
        const char *got_ = (got), *want_ = (want);                                                 \
        if (got_ == NULL || strcmp(got_, want_) != 0) {                                            \
            test_failures++;                                                                       \
            printf("    %s:%d: %s is \"%s\", expected \"%s\"\n", __FILE__, __LINE__, #got,         \
                   got_ ? got_ : "(null)", want_);                                                 \
        }                                                                                          \
    } while (0)

/* Marks the running test as skipped; the reason is printed. */
static inline void test_skip(const char *reason)
{
    test_skip_reason = reason;
}

static inline int test_main(int argc, char **argv, const test_case *cases, int n)
{
    int passed = 0, failed = 0, skipped = 0;
    for (int i = 0; i < n; i++) {
        if (argc > 1 && strcmp(argv[1], "--list") == 0) {
            printf("%s\n", cases[i].name);
            continue;
        }
        if (argc > 1 && strcmp(argv[1], cases[i].name) != 0) continue;
        test_failures = 0;
        test_skip_reason = NULL;
        cases[i].run();
        const char *what = test_failures ? "FAILED" : test_skip_reason ? "skipped" : "ok";
        printf("%-8s %s%s%s\n", what, cases[i].name, test_skip_reason ? ": " : "",
               test_skip_reason ? test_skip_reason : "");
        fflush(stdout);
        failed += test_failures != 0;
        skipped += !test_failures && test_skip_reason != NULL;
        passed += !test_failures && test_skip_reason == NULL;
    }
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed ? 1 : (passed == 0 && skipped > 0) ? 77 : 0;
}

#endif
