/* Full-rate loops with AVX2 (see bench.h). int8: the product that the kernels use for nibbles,
 * pairs of bytes summed in 16 bits. Exports its table and nothing else. */
#include <immintrin.h>
#include "tests/bench/bench.h"

enum { ACCUMULATORS = 12 };

static double int8(long rounds)
{
    __m256i sum[8], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
    for (int i = 0; i < 8; i++)
        sum[i] = _mm256_setzero_si256();
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            __asm__ volatile("" : "+x"(b));
            sum[i] = _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(a, b));
        }
    }
    for (int i = 4; i < 8; i++)
        sum[i - 4] = _mm256_add_epi16(sum[i - 4], sum[i]);
    __asm__ volatile("" : : "x"(sum[0]), "x"(sum[1]), "x"(sum[2]), "x"(sum[3]));
    return (double)rounds * 8 * 32 * 2;
}

static double f32(long rounds)
{
    __m256 acc[ACCUMULATORS], a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
    for (int i = 0; i < ACCUMULATORS; i++)
        acc[i] = _mm256_setzero_ps();
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 12
        for (int i = 0; i < ACCUMULATORS; i++)
            acc[i] = _mm256_fmadd_ps(a, b, acc[i]);
        __asm__ volatile("" : "+x"(a), "+x"(b));
    }
    for (int i = 1; i < ACCUMULATORS; i++)
        acc[0] = _mm256_add_ps(acc[0], acc[i]);
    __asm__ volatile("" : : "x"(acc[0]));
    return (double)rounds * ACCUMULATORS * 8 * 2;
}

static uint64_t read_all(const uint8_t *p, size_t bytes)
{
    __m256i sum[4];
    for (int i = 0; i < 4; i++)
        sum[i] = _mm256_setzero_si256();
    for (size_t at = 0; at < bytes; at += 128) {
        _mm_prefetch((const char *)p + at + 2048, _MM_HINT_T0);
        _mm_prefetch((const char *)p + at + 2112, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            sum[i] = _mm256_xor_si256(
                sum[i], _mm256_loadu_si256((const __m256i *)(const void *)(p + at + 32 * i)));
    }
    sum[0] = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
    return (uint64_t)_mm256_extract_epi64(sum[0], 0);
}

const bench_loops bench_loops_avx2 = {.name = "avx2", .int8 = int8, .f32 = f32, .read = read_all};
