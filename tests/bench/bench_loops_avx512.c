/* Full-rate loops with AVX-512 VNNI (see bench.h). Exports its table and nothing else. */
#include <immintrin.h>
#include "tests/bench/bench.h"

enum { ACCUMULATORS = 16 };

static double int8(long rounds)
{
    __m512i acc[ACCUMULATORS], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    for (int i = 0; i < ACCUMULATORS; i++)
        acc[i] = _mm512_setzero_si512();
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 16
        for (int i = 0; i < ACCUMULATORS; i++)
            acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
        __asm__ volatile("" : "+v"(a), "+v"(b));
    }
    for (int i = 1; i < ACCUMULATORS; i++)
        acc[0] = _mm512_add_epi32(acc[0], acc[i]);
    __asm__ volatile("" : : "v"(acc[0]));
    return (double)rounds * ACCUMULATORS * 64 * 2;
}

static double f32(long rounds)
{
    __m512 acc[ACCUMULATORS], a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
    for (int i = 0; i < ACCUMULATORS; i++)
        acc[i] = _mm512_setzero_ps();
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 16
        for (int i = 0; i < ACCUMULATORS; i++)
            acc[i] = _mm512_fmadd_ps(a, b, acc[i]);
        __asm__ volatile("" : "+v"(a), "+v"(b));
    }
    for (int i = 1; i < ACCUMULATORS; i++)
        acc[0] = _mm512_add_ps(acc[0], acc[i]);
    __asm__ volatile("" : : "v"(acc[0]));
    return (double)rounds * ACCUMULATORS * 16 * 2;
}

/* One stream with the software prefetch that the kernels use. */
static uint64_t read_all(const uint8_t *p, size_t bytes)
{
    __m512i sum[4];
    for (int i = 0; i < 4; i++)
        sum[i] = _mm512_setzero_si512();
    for (size_t at = 0; at < bytes; at += 256) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            _mm_prefetch((const char *)p + at + 4096 + 64 * i, _MM_HINT_T1);
            sum[i] = _mm512_xor_si512(sum[i], _mm512_loadu_si512(p + at + 64 * i));
        }
    }
    sum[0] = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
    return (uint64_t)_mm_cvtsi128_si64(_mm512_castsi512_si128(sum[0]));
}

const bench_loops bench_loops_avx512 = {
    .name = "avx512", .int8 = int8, .f32 = f32, .read = read_all};
