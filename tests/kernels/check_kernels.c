/*
 * check_kernels [--isa LEVEL | --emulate-amx] [--quick] [--seed N]: runs every check for one level
 * or for all that this machine has. Exit status 77 if the level asked for is missing here.
 *
 * --emulate-amx proves the AMX code where the processor has no AMX, by its tables: kern_select goes
 * on refusing the level.
 */
#include "amx_emulation.h"
#include "check.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool check_emulated;
const int check_types[] = {KERN_F32,  KERN_F16,  KERN_BF16, KERN_Q4_0, KERN_Q5_0,
                           KERN_Q8_0, KERN_Q4_K, KERN_Q5_K, KERN_Q6_K, KERN_GPTQ4};
const int check_n_types = (int)(sizeof(check_types) / sizeof(check_types[0]));

void check_fail(const char *fmt, ...)
{
    if (++check_failures > 20) return;
    va_list ap;
    va_start(ap, fmt);
    printf("  FAILED: ");
    vprintf(fmt, ap);
    printf("\n");
    va_end(ap);
    fflush(stdout);
}

static void step(const char *name, const char *level)
{
    printf("%-14s %s\n", name, level);
    fflush(stdout);
}

static void run_level(const char *level)
{
    ep_err err;
    if (kern_select(level, &err) != EP_OK) {
        check_fail("kern_select(\"%s\"): %s", level, err.text);
        return;
    }
    if (strcmp(kern_level(), level) != 0)
        check_fail("level is %s, asked for %s", kern_level(), level);
    step("panels", level);
    check_panels(level);
#ifdef __x86_64__
    if (strcmp(level, "avx512") == 0) { /* what kern_select takes on other processors */
        const kern_gemm chosen = kern_gemm_now;
        step("panels of the near and the far table", level);
        kern_gemm_now = kern_gemm_avx512;
        check_panels(level);
        kern_gemm_now = kern_gemm_avx512_far;
        check_panels(level);
        kern_gemm_now = chosen;
    }
#endif
    if (strcmp(level, "amx") == 0) {
        step("tiles", level);
        check_tiles();
    }
    step("linear", level);
    check_linear(level);
    step("ffn", level);
    check_ffn(level);
}

/* Runs a check, which fails too if it met no tile instruction. */
static void run_emulated_check(const char *name, void (*check)(const char *), bool quick)
{
    const uint64_t before = amx_emulation_count();
    step(name, "amx, emulated");
    check_quick = quick;
    check("amx");
    const uint64_t n = amx_emulation_count() - before;
    printf("  %llu instructions emulated\n", (unsigned long long)n);
    if (n == 0) check_fail("%s used no tiles", name);
}

static void check_tiles_of(const char *level)
{
    (void)level;
    check_tiles();
}

static int run_emulated(void)
{
    ep_err err;
    const char *why_not = amx_emulation_start();
    if (why_not != NULL) {
        printf("skipped: AMX is not emulated: %s\n", why_not);
        return 77;
    }
    check_emulated = check_quick = true;
    if (kern_select("avx512", &err) != EP_OK) {
        printf("FAILED: avx512: %s\n", err.text);
        return 1;
    }
    step("ffn", "avx512"); /* the bits that the emulated level must give too */
    check_ffn("avx512");
#ifdef __x86_64__
    /* What kern_select does on a machine with AMX. */
    const kern_gemm below = kern_gemm_now;
    kern_gemm_now = kern_gemm_amx;
    kern_gemm_now.f32 = below.f32;
    kern_gemm_now.f16 = below.f16;
#endif
    /* An instruction costs a signal: what stands on the tile routines sees fewer shapes. */
    run_emulated_check("tiles", check_tiles_of, false);
    run_emulated_check("panels", check_panels, true);
    run_emulated_check("linear", check_linear, false);
    run_emulated_check("ffn", check_ffn, true);
    printf("%d failures\n", check_failures);
    return check_failures ? 1 : 0;
}

int main(int argc, char **argv)
{
    const char *const levels[] = {"scalar", "avx2", "avx512", "amx"};
    const char *isa = NULL;
    bool emulate = false;
    uint64_t seed = 20261120;
    unsetenv("MOED_KERNELS"); /* the levels are chosen here */
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") == 0) {
            check_quick = true;
        } else if (strcmp(argv[i], "--emulate-amx") == 0) {
            emulate = true;
        } else if (strcmp(argv[i], "--isa") == 0 && i + 1 < argc) {
            isa = argv[++i];
        } else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
            seed = strtoull(argv[++i], NULL, 10);
        } else {
            fprintf(stderr,
                    "usage: check_kernels [--isa LEVEL | --emulate-amx] [--quick] [--seed N]\n");
            return 2;
        }
    }
    int known = isa == NULL;
    for (int i = 0; i < 4; i++)
        known |= isa != NULL && strcmp(isa, levels[i]) == 0;
    if (!known) {
        fprintf(stderr, "check_kernels: no level \"%s\"\n", isa);
        return 2;
    }
    printf("seed %llu\n", (unsigned long long)seed);
    check_seed(seed);
    if (emulate) return run_emulated();
    if (isa != NULL && !kern_has_level(isa)) {
        printf("skipped: this machine has no %s\n", isa);
        return 77;
    }
    ep_err err;
    if (kern_select("scalar", &err) != EP_OK) {
        printf("FAILED: scalar: %s\n", err.text);
        return 1;
    }
    step("packing", "");
    check_packing();
    step("bounds", "scalar");
    check_scalar_bounds();
    for (size_t i = 0; i < sizeof(levels) / sizeof(levels[0]); i++) {
        if (isa != NULL && strcmp(isa, levels[i]) != 0) continue;
        if (kern_has_level(levels[i]))
            run_level(levels[i]);
        else
            printf("skipped: this machine has no %s\n", levels[i]);
    }
    printf("%d failures\n", check_failures);
    return check_failures ? 1 : 0;
}
