/*
 * select: which instruction set the kernels use. Looks once at CPUID and XCR0, asks the kernel for
 * the AMX state, and fills the two tables that every other file of this folder calls through.
 *
 * Levels are ordered (scalar < avx2 < avx512 < amx) and each contains those below it, so a NULL
 * entry of a gemm table takes the next lower level's. A level that was asked for by name and is
 * missing is an error that names the first missing feature; only "auto" steps down. It does not
 * choose kernels by shape or row count: where two kernels of one level take turns, their own file
 * decides.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "kernels/cpu/ops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

enum { LEVEL_SCALAR, LEVEL_AVX2, LEVEL_AVX512, LEVEL_AMX, N_LEVELS };

static const char *const level_names[N_LEVELS] = {"scalar", "avx2", "avx512", "amx"};

kern_gemm kern_gemm_now;
kern_vec kern_vec_now;

static int level_now = -1;
static bool is_detected;
static const char *missing[N_LEVELS]; /* NULL: the machine has the level */

static const kern_gemm *gemms[N_LEVELS] = {&kern_gemm_scalar, &kern_gemm_avx2, &kern_gemm_avx512,
                                           &kern_gemm_amx};

static const kern_vec *const vecs[N_LEVELS] = {&kern_vec_scalar, &kern_vec_avx2, &kern_vec_avx512,
                                               &kern_vec_avx512};

#if defined(__x86_64__)

typedef struct feature {
    const char *name;
    int level;
    unsigned leaf, reg, bit; /* subleaf 0; reg 0..3 is eax..edx */
} feature;

static const feature features[] = {
    {"FMA", LEVEL_AVX2, 1, 2, 12},           {"AVX", LEVEL_AVX2, 1, 2, 28},
    {"F16C", LEVEL_AVX2, 1, 2, 29},          {"AVX2", LEVEL_AVX2, 7, 1, 5},
    {"AVX512F", LEVEL_AVX512, 7, 1, 16},     {"AVX512DQ", LEVEL_AVX512, 7, 1, 17},
    {"AVX512BW", LEVEL_AVX512, 7, 1, 30},    {"AVX512VL", LEVEL_AVX512, 7, 1, 31},
    {"AVX512_VNNI", LEVEL_AVX512, 7, 2, 11}, {"AMX-BF16", LEVEL_AMX, 7, 3, 22},
    {"AMX-TILE", LEVEL_AMX, 7, 3, 24},       {"AMX-INT8", LEVEL_AMX, 7, 3, 25},
};

static bool has_feature(const feature *f)
{
    unsigned r[4] = {0, 0, 0, 0};
    if (!__get_cpuid_count(f->leaf, 0, &r[0], &r[1], &r[2], &r[3])) return false;
    return (r[f->reg] >> f->bit) & 1;
}

/* The register state that the operating system saves; 0 where XGETBV is not enabled. */
static uint64_t read_xcr0(void)
{
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !((c >> 27) & 1)) return 0;
    unsigned lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t)hi << 32 | lo;
}

/* Linux gives the 8 KiB of tile state to a process only when it asks; threads inherit the answer.
 */
static bool ask_for_tiles(void)
{
    enum { ask_xcomp_perm = 0x1023, xfeature_xtiledata = 18 };
    return syscall(SYS_arch_prctl, ask_xcomp_perm, xfeature_xtiledata) == 0;
}

/* No part of a level: one more product for the level avx512. */
static bool has_avx512_bf16(void)
{
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

static bool is_amd(void)
{
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx && c == signature_AMD_ecx &&
           d == signature_AMD_edx;
}

static void detect_machine(void)
{
    static const struct {
        int level;
        uint64_t bits;
        const char *name;
    } states[] = {
        {LEVEL_AVX2, 0x6, "AVX registers enabled by the operating system"},
        {LEVEL_AVX512, 0xe6, "AVX-512 registers enabled by the operating system"},
        {LEVEL_AMX, 0x60000, "AMX tiles enabled by the operating system"},
    };
    for (size_t i = 0; i < sizeof features / sizeof features[0]; i++) {
        const feature *f = &features[i];
        if (missing[f->level] == NULL && !has_feature(f)) missing[f->level] = f->name;
    }
    uint64_t xcr0 = read_xcr0();
    for (size_t i = 0; i < sizeof states / sizeof states[0]; i++) {
        int level = states[i].level;
        if (missing[level] == NULL && (xcr0 & states[i].bits) != states[i].bits)
            missing[level] = states[i].name;
    }
    for (int i = LEVEL_AVX2; i < N_LEVELS; i++)
        if (missing[i] == NULL) missing[i] = missing[i - 1];
    if (missing[LEVEL_AMX] == NULL && !ask_for_tiles())
        missing[LEVEL_AMX] = "permission for AMX tiles (arch_prctl refused it)";
    if (is_amd()) gemms[LEVEL_AVX512] = &kern_gemm_avx512_far;
}

#else

static void detect_machine(void)
{
    for (int i = LEVEL_AVX2; i < N_LEVELS; i++)
        missing[i] = "an x86-64 processor";
}

#endif

static void detect(void)
{
    if (is_detected) return;
    detect_machine();
    is_detected = true;
}

static int find_level(const char *name)
{
    for (int i = 0; i < N_LEVELS; i++)
        if (strcmp(name, level_names[i]) == 0) return i;
    return -1;
}

/* Entries that g lacks. */
static void take(kern_gemm *g, const kern_gemm *from)
{
    if (g->q4_0 == NULL) g->q4_0 = from->q4_0;
    if (g->q5_0 == NULL) g->q5_0 = from->q5_0;
    if (g->q8_0 == NULL) g->q8_0 = from->q8_0;
    if (g->q4_k == NULL) g->q4_k = from->q4_k;
    if (g->q5_k == NULL) g->q5_k = from->q5_k;
    if (g->q6_k == NULL) g->q6_k = from->q6_k;
    if (g->gptq4 == NULL) g->gptq4 = from->gptq4;
    if (g->f32 == NULL) g->f32 = from->f32;
    if (g->f16 == NULL) g->f16 = from->f16;
    if (g->bf16 == NULL) g->bf16 = from->bf16;
}

/* Takes the entry of the highest level not above `level` that has one. */
static void fill_gemm(int level)
{
    kern_gemm g = {.name = level_names[level]};
    for (int i = level; i >= 0; i--) {
#if defined(__x86_64__)
        if (i == LEVEL_AVX512 && has_avx512_bf16()) take(&g, &kern_gemm_avx512bf16);
#endif
        take(&g, gemms[i]);
    }
    kern_gemm_now = g;
}

ep_status kern_select(const char *level, ep_err *err)
{
    const char *from_env = getenv("MOED_KERNELS");
    const char *where = "kernels";
    if (from_env != NULL && from_env[0] != '\0') {
        level = from_env;
        where = "MOED_KERNELS";
    }
    detect();
    int want = -1;
    if (level == NULL || strcmp(level, "auto") == 0) {
        want = LEVEL_AMX;
        while (missing[want] != NULL)
            want--; /* scalar is never missing */
    } else {
        want = find_level(level);
    }
    if (want < 0)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: unknown level \"%s\"; valid are auto, scalar, avx2, avx512, amx", where,
                       level);
    if (missing[want] != NULL)
        return ep_fail(err, EP_ERR_UNSUPPORTED, "%s: level %s is not possible here: no %s", where,
                       level_names[want], missing[want]);
    fill_gemm(want);
    kern_vec_now = *vecs[want];
    level_now = want;
    return EP_OK;
}

const char *kern_level(void)
{
    return level_now < 0 ? "none" : level_names[level_now];
}

bool kern_has_level(const char *level)
{
    detect();
    int i = find_level(level);
    return i >= 0 && missing[i] == NULL;
}
