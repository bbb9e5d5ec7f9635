/*
 * check_amx: AMX instructions against figures worked out by hand. Where AMX is emulated it proves
 * the emulation (amx_emulation.c), forms of operands and refusals included; where the processor has
 * AMX the same cases run on it, so it proves the figures.
 */
#include "tests/test.h"

#if defined(__x86_64__)

#include <pthread.h>
#include <stdlib.h>

#include "amx_emulation.h"
#include "check_amx.h"
#include "kernels/kernels.h"

static bool is_emulated;

static bool is_filled(const void *p, int byte, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (((const uint8_t *)p)[i] != byte) return false;
    return true;
}

/* ---- configuration ---- */

static void test_config(void)
{
    config want = shape(3, 2, 4), got;
    memset(&got, 0xaa, sizeof(got));
    release();
    store_config(&got);
    CHECK(is_filled(&got, 0, sizeof(got)));
    load_config(&want);
    memset(&got, 0xaa, sizeof(got));
    store_config(&got);
    CHECK(memcmp(&got, &want, sizeof(got)) == 0);

    /* Configuring clears the tiles, releasing forgets the configuration. */
    uint8_t data[16 * 64];
    memset(data, 1, sizeof(data));
    LOAD(0, data, 64);
    load_config(&want);
    STORE(0, data, 8);
    CHECK(is_filled(data, 0, 3 * 8) && data[3 * 8] == 1);
    const config none = {.palette = 0};
    load_config(&none);
    store_config(&got);
    CHECK(is_filled(&got, 0, sizeof(got)));
}

/* ---- loads and stores ---- */

static void test_rows_and_strides(void)
{
    config c = {.palette = 1};
    uint8_t in[400], out[16 * 64];
    for (int i = 0; i < 400; i++)
        in[i] = (uint8_t)i;
    c.rows[5] = 3;
    c.row_bytes[5] = 7; /* any number of bytes, as long as nothing is multiplied */
    load_config(&c);

    memset(out, 0xaa, sizeof(out));
    LOAD(5, in + 10, 20);
    STORE(5, out + 64, 16);
    for (int i = 0; i < (int)sizeof(out); i++) {
        const int row = (i - 64) / 16, at = i % 16;
        const bool inside = i >= 64 && row < 3 && at < 7;
        CHECK_INT(out[i], inside ? 10 + 20 * row + at : 0xaa);
    }

    /* Downwards, by a stride below zero, and back. */
    LOAD(5, in + 90, -30);
    STORE(5, out + 32, -16);
    for (int row = 0; row < 3; row++)
        CHECK(memcmp(out + 32 - 16 * row, in + 90 - 30 * row, 7) == 0);

    /* Without an index register each row is the same. */
    __asm__ volatile("tileloadd (%0), %%tmm5" ::"r"(in + 33) : "memory");
    STORE(5, out, 7);
    for (int row = 0; row < 3; row++)
        CHECK(memcmp(out + 7 * row, in + 33, 7) == 0);

    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm5" ::"r"(in + 1), "r"(9l) : "memory");
    STORE(5, out, 7);
    for (int row = 0; row < 3; row++)
        CHECK(memcmp(out + 7 * row, in + 1 + 9 * row, 7) == 0);

    __asm__ volatile("tilezero %%tmm5" ::: "memory");
    memset(out, 0xaa, sizeof(out));
    STORE(5, out, 7);
    CHECK(is_filled(out, 0, 21) && out[21] == 0xaa);
    release();
}

static void test_full_tiles(void)
{
    config c = {.palette = 1};
    static uint8_t in[8][16][64], out[8][16][64];
    for (int t = 0; t < 8; t++) {
        c.rows[t] = 16;
        c.row_bytes[t] = 64;
    }
    for (size_t i = 0; i < sizeof(in); i++)
        ((uint8_t *)in)[i] = (uint8_t)(i * 37 + i / 64 + i / 1024);
    load_config(&c);
    LOAD(0, in[0], 64);
    LOAD(1, in[1], 64);
    LOAD(2, in[2], 64);
    LOAD(3, in[3], 64);
    LOAD(4, in[4], 64);
    LOAD(5, in[5], 64);
    LOAD(6, in[6], 64);
    LOAD(7, in[7], 64);
    STORE(7, out[7], 64);
    STORE(6, out[6], 64);
    STORE(5, out[5], 64);
    STORE(4, out[4], 64);
    STORE(3, out[3], 64);
    STORE(2, out[2], 64);
    STORE(1, out[1], 64);
    STORE(0, out[0], 64);
    CHECK(memcmp(in, out, sizeof(in)) == 0);
    release();
}

/* Every way to write an address: scales, displacements, upper registers, rbp and r13 (which cannot
 * do without a displacement), r12 (which looks like rsp), relative to the instruction, no base. */
static config relative __asm__("check_amx_relative") __attribute__((used));

/* Whether tile 0, two rows of four bytes, holds what lies at these places. */
static bool has_loaded(const uint8_t *first, const uint8_t *second)
{
    uint8_t out[8];
    STORE(0, out, 4);
    return memcmp(out, first, 4) == 0 && memcmp(out + 4, second, 4) == 0;
}

static void test_addresses(void)
{
    config c = {.palette = 1};
    uint8_t in[1024];
    for (int i = 0; i < 1024; i++)
        in[i] = (uint8_t)(i ^ i >> 3);
    c.rows[0] = 2;
    c.row_bytes[0] = 4;
    relative = c;
#define LOAD_FROM(base, operand)                                                                   \
    __asm__ volatile("movq %0, %%" base "\n\tmovq %1, %%r14\n\ttileloadd " operand                 \
                     ", %%tmm0" ::"r"(in),                                                         \
                     "r"(10l)                                                                      \
                     : base, "r14", "memory")
    __asm__ volatile("ldtilecfg check_amx_relative(%%rip)" ::: "memory");
    LOAD_FROM("r8", "(%%r8,%%r14,1)");
    CHECK(has_loaded(in, in + 10));
    LOAD_FROM("r12", "100(%%r12,%%r14,2)");
    CHECK(has_loaded(in + 100, in + 120));
    LOAD_FROM("r13", "(%%r13,%%r14,4)");
    CHECK(has_loaded(in, in + 40));
    LOAD_FROM("r15", "500(%%r15,%%r14,8)");
    CHECK(has_loaded(in + 500, in + 580));
    LOAD_FROM("rdi", "127(%%rdi,%%r14,1)");
    CHECK(has_loaded(in + 127, in + 137));
    __asm__ volatile("tileloadd -20(%0,%1,2), %%tmm0" ::"r"(in + 220), "r"(50l) : "memory");
    CHECK(has_loaded(in + 200, in + 300));
    __asm__ volatile("tileloadd -400(%0,%1,1), %%tmm0" ::"r"(in + 500), "r"(-7l) : "memory");
    CHECK(has_loaded(in + 100, in + 93));
    const uint8_t *p = in + 64;
    __asm__ volatile("xchgq %%rbp, %0\n\ttileloadd (%%rbp,%1,1), %%tmm0\n\txchgq %%rbp, %0"
                     : "+D"(p)
                     : "a"(3l)
                     : "memory");
    CHECK(has_loaded(in + 64, in + 67));
    __asm__ volatile("tileloadd 8(%0), %%tmm0" ::"r"(in) : "memory");
    CHECK(has_loaded(in + 8, in + 8));

    config got[3];
    memset(got, 0, sizeof(got));
    __asm__ volatile("sttilecfg 64(%0)" ::"r"(got) : "memory");
    CHECK(memcmp(&got[1], &c, sizeof(c)) == 0 && is_filled(&got[0], 0, sizeof(c)));
    __asm__ volatile("sttilecfg -128(%0,%1,8)" ::"r"(got + 2), "r"(16l) : "memory");
    CHECK(memcmp(&got[2], &c, sizeof(c)) == 0);
    /* No base: a displacement of four bytes, and the index is the rest of the address. */
    memset(got, 0, sizeof(got));
    __asm__ volatile("sttilecfg -64(,%0,1)" ::"r"(got + 2) : "memory");
    CHECK(memcmp(&got[1], &c, sizeof(c)) == 0);
    c.rows[0] = 1;
    __asm__ volatile("movq %0, %%r13\n\tldtilecfg (%%r13)" ::"r"(&c) : "r13", "memory");
    store_config(got);
    CHECK(memcmp(got, &c, sizeof(c)) == 0);
    c.rows[0] = 2;
    __asm__ volatile("leaq -0x1000(%0), %%r12\n\tldtilecfg 0x1000(%%r12)" ::"r"(&c)
                     : "r12", "memory");
    store_config(got);
    CHECK(memcmp(got, &c, sizeof(c)) == 0);
    release();
}

/* ---- products of bytes ---- */

/* Runs all four on the same operands: 2 rows, 3 columns, 2 groups. */
static void multiply_bytes(int32_t c[4][2][3], const uint8_t a[2][8], const uint8_t b[2][12],
                           int32_t start)
{
    const config s = shape(2, 3, 2);
    int32_t from[2][3];
    for (int i = 0; i < 6; i++)
        from[i / 3][i % 3] = start;
    load_config(&s);
    LOAD(1, a, 8);
    LOAD(2, b, 12);
    LOAD(0, from, 12);
    MULTIPLY("tdpbssd");
    STORE(0, c[0], 12);
    LOAD(0, from, 12);
    MULTIPLY("tdpbsud");
    STORE(0, c[1], 12);
    LOAD(0, from, 12);
    MULTIPLY("tdpbusd");
    STORE(0, c[2], 12);
    LOAD(0, from, 12);
    MULTIPLY("tdpbuud");
    STORE(0, c[3], 12);
    release();
}

static void test_bytes(void)
{
    int32_t c[4][2][3];
    /* Which byte meets which: powers of ten tell the places apart. Row 0 of A has group 0, row 1
     * has group 1; column n of B has 1, 2, 3, 4 times n + 1 in group 0, and 5, 6, 7, 8 in 1. */
    const uint8_t places[2][8] = {{1, 10, 100, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 1, 10, 100}};
    const uint8_t digits[2][12] = {{1, 2, 3, 4, 2, 4, 6, 8, 3, 6, 9, 12},
                                   {5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7, 8}};
    multiply_bytes(c, places, digits, 1000000);
    for (int i = 0; i < 4; i++)
        for (int n = 0; n < 3; n++) {
            CHECK_INT(c[i][0][n], 1000000 + 321 * (n + 1));
            CHECK_INT(c[i][1][n], 1000000 + 876);
        }

    /* Signs: A is 255 or -1 throughout; columns of B 128 or -128, 127, 255 or -1. 8 products. */
    uint8_t a[2][8], b[2][12];
    memset(a, 255, sizeof(a));
    for (int i = 0; i < 24; i++)
        b[i / 12][i % 12] = (uint8_t)(i % 12 < 4 ? 128 : i % 12 < 8 ? 127 : 255);
    static const int32_t want[4][3] = {{8 * 128, 8 * -127, 8},
                                       {8 * -128, 8 * -127, 8 * -255},
                                       {8 * 255 * -128, 8 * 255 * 127, 8 * -255},
                                       {8 * 255 * 128, 8 * 255 * 127, 8 * 255 * 255}};
    multiply_bytes(c, (const uint8_t(*)[8])a, (const uint8_t(*)[12])b, 0);
    for (int i = 0; i < 4; i++)
        for (int n = 0; n < 6; n++)
            CHECK_INT(c[i][n / 3][n % 3], want[i][n % 3]);

    /* Sums wrap; they do not saturate. */
    multiply_bytes(c, (const uint8_t(*)[8])a, (const uint8_t(*)[12])b, INT32_MAX);
    CHECK_INT(c[0][0][0], INT32_MIN + 8 * 128 - 1);
    CHECK_INT(c[3][1][2], INT32_MIN + 8 * 255 * 255 - 1);
    multiply_bytes(c, (const uint8_t(*)[8])a, (const uint8_t(*)[12])b, INT32_MIN);
    CHECK_INT(c[1][0][1], INT32_MAX - 8 * 127 + 1);
    CHECK_INT(c[2][1][0], INT32_MAX - 8 * 255 * 128 + 1);
}

/* All of a tile: C[m][n] = 64 (m + 1) (n + 1), then twice that. */
static void test_full_product(void)
{
    static uint8_t a[16][64], b[16][64];
    static int32_t c[16][16];
    const config s = shape(16, 16, 16);
    for (int i = 0; i < 1024; i++) {
        a[i / 64][i % 64] = (uint8_t)(i / 64 + 1);
        b[i / 64][i % 64] = (uint8_t)(i % 64 / 4 + 1);
    }
    load_config(&s);
    LOAD(1, a, 64);
    LOAD(2, b, 64);
    for (int times = 1; times <= 2; times++) {
        MULTIPLY("tdpbssd");
        STORE(0, c, 64);
        for (int i = 0; i < 256; i++)
            CHECK_INT(c[i / 16][i % 16], times * 64 * (i / 16 + 1) * (i % 16 + 1));
    }
    release();
}

/* ---- products of bf16 ---- */

static uint16_t bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)(bits >> 16); /* exact for the values here */
}

/* One element: three groups, so up to three even and three odd products, of x[i] by w[i]. */
static float multiply_bf16(float c, const float x[6], const float w[6])
{
    const config s = shape(1, 1, 3);
    uint16_t a[6], b[6];
    for (int i = 0; i < 6; i++) {
        a[i] = bf16(x[i]);
        b[i] = bf16(w[i]);
    }
    load_config(&s);
    LOAD(0, &c, 4);
    LOAD(1, a, 12);
    LOAD(2, b, 4);
    MULTIPLY("tdpbf16ps");
    STORE(0, &c, 4);
    release();
    return c;
}

static float sum_bf16(float c, float e0, float o0, float e1, float o1, float e2, float o2)
{
    static const float ones[6] = {1, 1, 1, 1, 1, 1};
    return multiply_bf16(c, (const float[6]){e0, o0, e1, o1, e2, o2}, ones);
}

static bool is_zero(float x, bool negative)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits == (negative ? 0x80000000u : 0);
}

static void test_bf16(void)
{
    CHECK(sum_bf16(7, 1, 2, 4, 8, 16, 32) == 70);
    CHECK(multiply_bf16(0.5f, (const float[6]){1, -2, 3, -4, 5, -6},
                        (const float[6]){10, 100, 1000, 1, -1, 0.5f}) == 2798.5f);

    /* Order. 2^24 + 1 is no float and goes to 2^24. Even and odd have sums of their own, which meet
     * before C. */
    CHECK(sum_bf16(0, 0x1p24f, 0, 1, 0, 1, 0) == 0x1p24f);
    CHECK(sum_bf16(0, 0x1p24f, 1, 0, 1, 0, 0) == 0x1p24f + 2);
    CHECK(sum_bf16(0, 1, 0, 1, 0, 0x1p24f, 0) == 0x1p24f + 2);
    CHECK(sum_bf16(-0x1p24f, 0x1p24f, 1, 0, 0, 0, 0) == 0);
    CHECK(sum_bf16(-0x1p24f, 0x1p24f, 0, 1, 0, 1, 0) == 0);
    CHECK(sum_bf16(1, 0x1p24f, 0, 0, 1, 0, -0x1p24f) == 2); /* the odd sum, 1 - 2^24, is exact */
    /* To nearest even, both ways. */
    CHECK(sum_bf16(0, 0x1p24f, 3, 0, 0, 0, 0) == 0x1p24f + 4);
    CHECK(sum_bf16(0, -0x1p24f, -1, 0, 0, 0, 0) == -0x1p24f);

    /* Denormal inputs are zero, however large what they meet; of A, of B, of C. */
    const float tiny = 0x1p-127f, small = 0x1p-126f;
    CHECK(multiply_bf16(0, (const float[6]){tiny}, (const float[6]){0x1p120f}) == 0);
    CHECK(multiply_bf16(0, (const float[6]){0, 0x1p120f}, (const float[6]){0, tiny}) == 0);
    CHECK(is_zero(sum_bf16(tiny, 0, 0, 0, 0, 0, 0), false));
    CHECK(sum_bf16(0, small, 0, 0, 0, 0, 0) == small);
    /* Denormal results are zero after each step: of a product, of the sum of a pair, and with C. */
    CHECK(multiply_bf16(0, (const float[6]){0x1p-63f, 0, 0x1p-63f},
                        (const float[6]){0x1p-64f, 0, 0x1p-64f}) == 0);
    CHECK(sum_bf16(small, 1.5f * small, -small, 0, 0, 0, 0) == small);
    CHECK(is_zero(sum_bf16(1.5f * small, -small, 0, 0, 0, 0, 0), false));
    CHECK(is_zero(sum_bf16(-1.5f * small, small, 0, 0, 0, 0, 0), true));
    /* A step of 1.5 small down to half of it is zero, and what follows starts from there. */
    CHECK(sum_bf16(0, 1.5f * small, 0, -small, 0, small, 0) == small);
    /* Infinity needs no care. */
    CHECK(sum_bf16(0, 0x1p127f, 0, 0x1p127f, 0, 0, 0) == __builtin_inff());
}

/* Two rows, two columns, one group: which row and column meets which. */
static void test_bf16_places(void)
{
    const config s = shape(2, 2, 1);
    float c[2][2] = {{1, 2}, {3, 4}};
    const uint16_t a[4] = {bf16(1), bf16(10), bf16(100), bf16(1000)};
    const uint16_t b[4] = {bf16(2), bf16(3), bf16(4), bf16(5)};
    load_config(&s);
    LOAD(0, c, 8);
    LOAD(1, a, 4);
    LOAD(2, b, 8);
    MULTIPLY("tdpbf16ps");
    STORE(0, c, 8);
    release();
    CHECK(c[0][0] == 33 && c[0][1] == 56 && c[1][0] == 3203 && c[1][1] == 5404);
}

/* ---- threads ---- */

static void *other_thread(void *all_zero)
{
    config c = shape(1, 1, 1), got;
    const uint32_t other = 99;
    store_config(&got);
    *(bool *)all_zero = is_filled(&got, 0, sizeof(got));
    load_config(&c);
    LOAD(0, &other, 4);
    return NULL;
}

static void test_threads(void)
{
    config c = shape(1, 1, 1), got;
    const uint32_t mine = 7;
    uint32_t after = 0;
    bool all_zero = false;
    pthread_t thread;
    load_config(&c);
    LOAD(0, &mine, 4);
    if (pthread_create(&thread, NULL, other_thread, &all_zero) != 0) abort();
    pthread_join(thread, NULL);
    STORE(0, &after, 4);
    store_config(&got);
    CHECK(all_zero);
    CHECK_INT(after, 7);
    CHECK(memcmp(&got, &c, sizeof(c)) == 0);
    release();
}

static void test_refusals(void)
{
    if (!is_emulated)
        test_skip("the processor's own refusals are not looked at");
    else
        CHECK_INT(check_amx_refusals(), 0);
}

static const test_case cases[] = {
    {"config", test_config},
    {"rows_and_strides", test_rows_and_strides},
    {"full_tiles", test_full_tiles},
    {"addresses", test_addresses},
    {"bytes", test_bytes},
    {"full_product", test_full_product},
    {"bf16", test_bf16},
    {"bf16_places", test_bf16_places},
    {"threads", test_threads},
    {"refusals", test_refusals},
};

int main(int argc, char **argv)
{
    const char *why_not = amx_emulation_start();
    is_emulated = why_not == NULL;
    if (is_emulated) {
        printf("AMX is emulated\n");
    } else if (kern_has_level("amx")) { /* asks for the tiles too */
        printf("AMX is not emulated: %s\n", why_not);
    } else {
        printf("skipped: AMX is not emulated: %s\n", why_not);
        return 77;
    }
    return test_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}

#else

int main(void)
{
    printf("skipped: no x86-64 processor\n");
    return 77;
}

#endif
