/*
 * Refusals of check_amx: wrong configurations and shapes end the process with a word on what is
 * wrong, instructions that AMX does not have stay illegal.
 */
#if defined(__x86_64__)

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check_amx.h"

static config bad;
static const uint8_t bytes[1024];
static int failures;

static void load_bad(void)
{
    load_config(&bad);
}

static void multiply_bad(void)
{
    load_config(&bad);
    MULTIPLY("tdpbsud");
}

static void multiply_bad_bf16(void)
{
    load_config(&bad);
    MULTIPLY("tdpbf16ps");
}

static void load_unconfigured(void)
{
    release();
    LOAD(0, bytes, 64);
}

static void store_other_tile(void)
{
    uint8_t out[1024];
    load_config(&bad);
    STORE(6, out, 64);
}

static void multiply_same_tile(void)
{
    load_config(&bad);
    __asm__ volatile(".byte 0xc4, 0xe2, 0x70, 0x5e, 0xc1"); /* tdpbuud of tiles 0, 1, 1 */
}

static void no_tile_8(void)
{
    load_config(&bad);
    __asm__ volatile(".byte 0xc4, 0x62, 0x7b, 0x49, 0xc0"); /* tilezero with VEX.R */
}

static void no_instruction(void)
{
    __asm__ volatile("ud2");
}

static void no_amx_instruction(void)
{
    __asm__ volatile(".byte 0xc4, 0xe2, 0x6b, 0x5c, 0xc1"); /* tdpfp16ps, newer */
}

static void sent_signal(void)
{
    raise(SIGILL);
}

/* Runs f in a child; it must end by `want_signal` and say `text`. */
static void refused(const char *text, void (*f)(void), int want_signal)
{
    int ends[2], status = 0;
    char said[256] = "";
    fflush(stdout);
    if (pipe(ends) != 0) abort();
    const pid_t child = fork();
    if (child < 0) abort();
    if (child == 0) {
        const struct rlimit no_core = {0, 0};
        setrlimit(RLIMIT_CORE, &no_core);
        dup2(ends[1], STDERR_FILENO);
        f();
        _exit(0);
    }
    close(ends[1]);
    size_t n = 0;
    ssize_t got;
    while (n + 1 < sizeof(said) && (got = read(ends[0], said + n, sizeof(said) - 1 - n)) > 0)
        n += (size_t)got;
    close(ends[0]);
    if (waitpid(child, &status, 0) != child) abort();
    const int by = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    if (by == want_signal && strstr(said, text) != NULL) return;
    failures++;
    printf("    \"%s\": ended by signal %d, expected %d; said \"%s\"\n", text, by, want_signal,
           said);
}

int check_amx_refusals(void)
{
    failures = 0;
    const config good = shape(2, 2, 2);
    bad = good;
    refused("", multiply_bad, 0);
    refused("tile 6 is not configured", store_other_tile, SIGABRT);
    refused("tiles 0, 1, 1 are not distinct", multiply_same_tile, SIGABRT);
    refused("tileloadd: no tile configuration is loaded", load_unconfigured, SIGABRT);

    bad.palette = 0;
    refused("tdpbsud: no tile configuration is loaded", multiply_bad, SIGABRT);
    bad.palette = 2;
    refused("ldtilecfg: palette 2", load_bad, SIGABRT);
    bad = good;
    bad.start_row = 1;
    refused("start_row 1", load_bad, SIGABRT);
    bad = good;
    bad.reserved[3] = 1;
    refused("reserved byte 5", load_bad, SIGABRT);
    bad = good;
    bad.reserved_rows[7] = 9;
    refused("reserved byte 63 is 9", load_bad, SIGABRT);
    bad = good;
    bad.rows[7] = 17;
    bad.row_bytes[7] = 4;
    refused("tile 7 of 17 rows of 4 bytes", load_bad, SIGABRT);
    bad.rows[7] = 1;
    bad.row_bytes[7] = 65;
    refused("tile 7 of 1 rows of 65 bytes", load_bad, SIGABRT);
    bad.row_bytes[7] = 0;
    refused("tile 7 of 1 rows of 0 bytes", load_bad, SIGABRT);
    bad.rows[7] = 0;
    bad.row_bytes[7] = 4;
    refused("tile 7 of 0 rows of 4 bytes", load_bad, SIGABRT);

    bad = good;
    bad.rows[0] = 3;
    refused("tdpbf16ps: C has 3 rows, A 2", multiply_bad_bf16, SIGABRT);
    bad = good;
    bad.row_bytes[0] = 12;
    refused("rows of C have 12 bytes, of B 8", multiply_bad, SIGABRT);
    bad = good;
    bad.rows[2] = 3;
    refused("B has 3 rows, A 2 groups along k", multiply_bad, SIGABRT);
    bad = good;
    bad.row_bytes[1] = 10;
    refused("rows of 8, 10, 8 bytes are no groups of four", multiply_bad, SIGABRT);
    bad = good;
    bad.rows[1] = 0;
    bad.row_bytes[1] = 0;
    refused("tile 1 is not configured", multiply_bad, SIGABRT);

    /* Not for the emulation: these stay what they are. */
    bad = good;
    refused("", no_tile_8, SIGILL);
    refused("", no_instruction, SIGILL);
    refused("", no_amx_instruction, SIGILL);
    refused("", sent_signal, SIGILL);
    return failures;
}

#else

typedef int no_amx_here; /* a file may not be empty */

#endif
