#ifndef EP_KERNELS_CPU_X256_H
#define EP_KERNELS_CPU_X256_H
/*
 * x256: how AVX2 code reads the packed layout of formats.h, and the exact integer steps of its
 * products; x512.h's counterpart, for gemm_avx2.c and gemm_avx2_many.c. Everything is inlined: an
 * ISA file must not leak a function that general code could be linked against. Nothing here rounds.
 */
#include <immintrin.h>
#include <string.h>
#include "kernels/cpu/ops.h"

#define INLINE static inline __attribute__((always_inline))
/* Loops over arrays of vectors must vanish, or the arrays live in memory. */
#define UNROLL _Pragma("GCC unroll 8")
/* A sum the compiler must not look into: regrouped as trees, sums outnumber the registers. */
#define IN_ORDER(sum) __asm__("" : "+x"(sum))

enum {
    HEAD_K = 256,
    BLOCK_Q4_K = 2304,
    BLOCK_Q5_K = 2816,
    BLOCK_Q6_K = 3328,
    NIBBLES = 256, /* bytes of the nibble vectors of 32 weights */
    MAX_ROWS = 4,  /* sums, products and unpacked weights of so many rows fit in 16 registers */
    AHEAD = 4096   /* distance of the software prefetch in bytes; the next panel follows this one */
};

INLINE __m256i load(const void *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}

INLINE __m256i word4(const void *p) /* four bytes in every lane */
{
    int32_t v;
    memcpy(&v, p, sizeof(v));
    return _mm256_set1_epi32(v);
}

INLINE __m256 half8(const void *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

INLINE void ahead(const uint8_t *p, int bytes)
{
    UNROLL
    for (int i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)p + AHEAD + i, _MM_HINT_T0);
}

/* Shuffle index that makes the 16-bit pair (byte a, byte b) of each lane, zero extended. */
INLINE __m256i pair_index(int a, int b)
{
    const int v = (int)(0x80008000U | (unsigned)b << 16 | (unsigned)a);
    return _mm256_add_epi8(_mm256_set1_epi32(v),
                           _mm256_setr_epi32(0, 0x00040004, 0x00080008, 0x000c000c, 0, 0x00040004,
                                             0x00080008, 0x000c000c));
}

/* The same with each byte in the upper half of its 16 bits, for sign extension by a shift. */
INLINE __m256i pair_index_top(int a, int b)
{
    const int v = (int)(0x00800080U | (unsigned)b << 24 | (unsigned)a << 8);
    return _mm256_add_epi8(_mm256_set1_epi32(v),
                           _mm256_setr_epi32(0, 0x04000400, 0x08000800, 0x0c000c00, 0, 0x04000400,
                                             0x08000800, 0x0c000c00));
}

/* Bytes a and b of each lane as words, sign extended. */
INLINE __m256i signed_pair(__m256i v, int a, int b)
{
    return _mm256_srai_epi16(_mm256_shuffle_epi8(v, pair_index_top(a, b)), 8);
}

INLINE __m256i madd_add(__m256i sum, __m256i a, __m256i b)
{
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    IN_ORDER(sum);
    return sum;
}

/* s[i] += w . x[i] in pairs of 16 bits, x at byte `at` of each row's 32 */
INLINE void meet(__m256i *s, __m256i w, const int8_t *const *x, const int at, const int rows)
{
    UNROLL
    for (int i = 0; i < rows; i++) {
        s[i] = _mm256_add_epi16(s[i], _mm256_maddubs_epi16(w, word4(x[i] + at)));
        IN_ORDER(s[i]);
    }
}

INLINE void zero(__m256i *s, const int rows)
{
    UNROLL
    for (int i = 0; i < rows; i++)
        s[i] = _mm256_setzero_si256();
}

/* Halves of d come first in panels of types with nothing else beside their codes, and of Q6_K. */
INLINE size_t panel_head(int blocks)
{
    return ((size_t)blocks * 32 + 63) & ~(size_t)63;
}

/* Bytes of 32 weights of such a type. */
INLINE int flat_bytes(const int type)
{
    return type == KERN_Q8_0 ? 512 : type == KERN_Q5_0 ? 320 : 256;
}

/* The head of a Q4_K or Q5_K block. */
typedef struct head {
    __m256i sc[8];  /* pairs (sc, sc) */
    __m256i min[4]; /* pairs (m[2p], m[2p + 1]) */
    __m256 d, dmin;
} head;

INLINE void head_k(head *h, const uint8_t *p, const int half)
{
    const __m256i low = _mm256_set1_epi8(15), top = _mm256_set1_epi8(0x30);
    p += 32 * half;
    const __m256i s0 = load(p), s1 = load(p + 64), s2 = load(p + 128);
    __m256i sc[2], m[2];
    sc[0] =
        _mm256_or_si256(_mm256_and_si256(s0, low), _mm256_and_si256(_mm256_slli_epi16(s2, 4), top));
    sc[1] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(s0, 4), low),
                            _mm256_and_si256(_mm256_slli_epi16(s2, 2), top));
    m[0] = _mm256_or_si256(_mm256_and_si256(s1, low), _mm256_and_si256(s2, top));
    m[1] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(s1, 4), low),
                           _mm256_and_si256(_mm256_srli_epi16(s2, 2), top));
    UNROLL
    for (int c = 0; c < 8; c++)
        h->sc[c] = _mm256_shuffle_epi8(sc[c / 4], pair_index(c % 4, c % 4));
    UNROLL
    for (int c = 0; c < 4; c++)
        h->min[c] = _mm256_shuffle_epi8(m[c / 2], pair_index(c % 2 * 2, c % 2 * 2 + 1));
    h->d = half8(p + 192 - 16 * half);
    h->dmin = half8(p + 224 - 16 * half);
}

#endif
