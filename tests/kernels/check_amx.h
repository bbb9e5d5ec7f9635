#ifndef EP_TESTS_KERNELS_CHECK_AMX_H
#define EP_TESTS_KERNELS_CHECK_AMX_H
/*
 * check_amx: AMX instructions one at a time, as its files write them. x86-64 only.
 */
#include <stdint.h>

/* An assembler takes the number of a tile from the text only. */
#define LOAD(t, at, stride)                                                                        \
    __asm__ volatile("tileloadd (%0,%1), %%tmm" #t ::"r"(at), "r"((long)(stride)) : "memory")
#define STORE(t, at, stride)                                                                       \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1)" ::"r"(at), "r"((long)(stride)) : "memory")
/* tile 0 += tile 1 * tile 2, as the tests of products number them */
#define MULTIPLY(name) __asm__ volatile(name " %%tmm2, %%tmm1, %%tmm0" ::: "memory")

typedef struct config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[8], reserved_bytes[8];
    uint8_t rows[8], reserved_rows[8];
} config;
_Static_assert(sizeof(config) == 64, "tile configuration");

static inline void load_config(const config *c)
{
    __asm__ volatile("ldtilecfg (%0)" ::"r"(c) : "memory");
}

static inline void store_config(config *c)
{
    __asm__ volatile("sttilecfg (%0)" ::"r"(c) : "memory");
}

static inline void release(void)
{
    __asm__ volatile("tilerelease" ::: "memory");
}

/* C of m rows and n columns, A of k groups of 4 bytes; also tile 3 as C. */
static inline config shape(int m, int n, int k)
{
    config c = {.palette = 1};
    const int rows[4] = {m, m, k, m}, groups[4] = {n, k, n, n};
    for (int t = 0; t < 4; t++) {
        c.rows[t] = (uint8_t)rows[t];
        c.row_bytes[t] = (uint16_t)(4 * groups[t]);
    }
    return c;
}

/* What the processor refuses, and what is no instruction at all: each in a process that it ends.
 * Returns the number of failures, which are printed. AMX must be emulated. */
int check_amx_refusals(void);

#endif
