#ifndef EP_KERNELS_CPU_X512_H
#define EP_KERNELS_CPU_X512_H
/*
 * x512: how AVX-512 code reads the packed layout of formats.h; for gemm_avx512.c and gemm_amx.c
 * only (both are compiled with the same AVX-512 flags). Everything is inlined: an ISA file must not
 * leak a function that general code could be linked against. Weights come out as unsigned bytes in
 * k-group order, w[t] = weights 4t .. 4t+3 of the 16 columns, which is the right operand of
 * vpdpbusd and a row of an AMX tile alike. Nothing here rounds.
 */
#include <immintrin.h>
#include <string.h>
#include "kernels/cpu/ops.h"

/* Bytes that the software prefetch runs ahead of the weights, and the cache it fetches to, unless
 * the file that includes this has its own. Panels follow one another, so past the end of one lies
 * the next. A Xeon with AMX, one row of Q4_K, cold, cycles per 256 block at 3 GHz: 425, 377, 438 at
 * 1, 2, 4 KB; Q8_0 739, 751, 855; BF16 1278, 1245, 1164 (a loop over cold panels, one thread,
 * neighbours busy). X_FAR is for processors that want more, to L1 (Zen 5): one row, one thread,
 * GB/s at 4 KB to L2, 6 KB to L1, 16 KB to L1: Q4_K 39, 41, 38; Q5_K 33, 38, 37; Q6_K 34, 39, 37.
 */
#ifdef X_FAR
#define X_AHEAD 6144
#define X_HINT  _MM_HINT_T0
#endif
#ifndef X_AHEAD
#define X_AHEAD 2048
#endif
#ifndef X_HINT
#define X_HINT _MM_HINT_T1
#endif

#define X_INLINE static inline __attribute__((always_inline))
/* Loops over arrays of vectors must vanish, or the arrays live in memory. */
#define X_UNROLL _Pragma("GCC unroll 8")

enum {
    X_HEAD_K = 256, /* scales, mins, d and dmin of a Q4_K or Q5_K block */
    X_BLOCK_Q4_K = 2304,
    X_BLOCK_Q5_K = 2816,
    X_BLOCK_Q6_K = 3328,
    X_NIBBLES = 256, /* bytes of the nibble vectors of 32 weights */
    X_AHEAD_NEAR = 512
};

X_INLINE __m512i x_load(const void *p)
{
    return _mm512_loadu_si512(p);
}

X_INLINE __m512i x_set8(int v)
{
    return _mm512_set1_epi8((char)v);
}

/* Four bytes in every lane; p need not be aligned. */
X_INLINE __m512i x_pair(const void *p)
{
    int32_t v;
    memcpy(&v, p, sizeof v);
    return _mm512_set1_epi32(v);
}

X_INLINE __m512 x_half16(const void *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

X_INLINE void x_ahead(const uint8_t *p, int bytes)
{
    X_UNROLL
    for (int i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)p + X_AHEAD + i, X_HINT);
}

/* For weights that tiles load without unpacking: to L1 and from less far; BF16 at 32 rows took
 * 1518, 1685, 2052 cycles per 256 block at 512, 1024, 2048 bytes. */
X_INLINE void x_ahead_near(const uint8_t *p, int bytes)
{
    X_UNROLL
    for (int i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)p + X_AHEAD_NEAR + i, _MM_HINT_T0);
}

/* (a & mask) | b */
X_INLINE __m512i x_and_or(__m512i a, __m512i mask, __m512i b)
{
    return _mm512_ternarylogic_epi32(a, mask, b, 0xEA);
}

/* mask ? a : b, bit by bit */
X_INLINE __m512i x_pick(__m512i mask, __m512i a, __m512i b)
{
    return _mm512_ternarylogic_epi32(mask, a, b, 0xCA);
}

/* Codes 4t .. 4t + 3 of 32 nibbles. */
X_INLINE __m512i x_nibble(const uint8_t *p, const int t)
{
    const __m512i b = x_load(p + 64 * (t % 4));
    return _mm512_and_si512(t < 4 ? b : _mm512_srli_epi16(b, 4), x_set8(15));
}

/* With a fifth bit: bit t of every byte of h. */
X_INLINE __m512i x_nibble5(const uint8_t *p, __m512i h, const int t)
{
    const __m512i b = x_load(p + 64 * (t % 4));
    const __m512i up = t < 4 ? _mm512_slli_epi16(h, 4 - t) : _mm512_srli_epi16(h, t - 4);
    return x_and_or(t < 4 ? b : _mm512_srli_epi16(b, 4), x_set8(15),
                    _mm512_and_si512(up, x_set8(16)));
}

/* With two upper bits: bits 2s, 2s+1 of high vector u belong to weights 16u + 4s + i. */
X_INLINE __m512i x_nibble6(const uint8_t *p, const uint8_t *high, const int t)
{
    const __m512i b = x_load(p + 64 * (t % 4)), h = x_load(high + 64 * (t / 4));
    const int s = t % 4; /* its bits belong at 4 and 5 */
    const __m512i up = s < 2 ? _mm512_slli_epi16(h, 4 - 2 * s) : _mm512_srli_epi16(h, 2 * s - 4);
    return _mm512_and_si512(x_pick(x_set8(15), t < 4 ? b : _mm512_srli_epi16(b, 4), up),
                            x_set8(63));
}

/* All eight. */
X_INLINE void x_nibbles(__m512i w[8], const uint8_t *p)
{
    X_UNROLL
    for (int t = 0; t < 8; t++)
        w[t] = x_nibble(p, t);
}

X_INLINE void x_nibbles5(__m512i w[8], const uint8_t *p, __m512i h)
{
    X_UNROLL
    for (int t = 0; t < 8; t++)
        w[t] = x_nibble5(p, h, t);
}

X_INLINE void x_nibbles6(__m512i w[8], const uint8_t *p, const uint8_t *high)
{
    X_UNROLL
    for (int t = 0; t < 8; t++)
        w[t] = x_nibble6(p, high, t);
}

/* The head of a Q4_K or Q5_K block: sc[0] holds the scales 0..3 as bytes of each lane, sc[1] 4..7;
 * min[p] the mins 2p, 2p+1 as 16-bit pairs, to be met by the sums 2p, 2p+1 in vpdpwssd. */
typedef struct x_head {
    __m512i sc[2], min[4];
    __m512 d, dmin;
} x_head;

/* Shuffle index: 16-bit pair (byte a, byte b) of each lane, zero extended. */
X_INLINE __m512i x_index(int a, int b)
{
    const int v = (int)(0x80008000U | (unsigned)b << 16 | (unsigned)a);
    return _mm512_broadcast_i32x4(
        _mm_add_epi8(_mm_set1_epi32(v), _mm_setr_epi32(0, 0x00040004, 0x00080008, 0x000C000C)));
}

/* Shuffle index: byte b of each 32-bit lane, zero extended, or moved to the top of its lane. */
X_INLINE __m512i x_index_low(int b)
{
    const int v = (int)(0x80808000U | (unsigned)b);
    return _mm512_broadcast_i32x4(_mm_add_epi8(_mm_set1_epi32(v), _mm_setr_epi32(0, 4, 8, 12)));
}

X_INLINE __m512i x_index_top(int b)
{
    const int v = (int)(0x00808080U | (unsigned)b << 24);
    return _mm512_broadcast_i32x4(
        _mm_add_epi8(_mm_set1_epi32(v), _mm_setr_epi32(0, 0x04000000, 0x08000000, 0x0C000000)));
}

/* Shuffle index: 16-bit pair (byte a, byte b) of each lane, each in the upper half of its 16 bits.
 */
X_INLINE __m512i x_index_tops(int a, int b)
{
    const int v = (int)(0x00800080U | (unsigned)b << 24 | (unsigned)a << 8);
    return _mm512_broadcast_i32x4(
        _mm_add_epi8(_mm_set1_epi32(v), _mm_setr_epi32(0, 0x04000400, 0x08000800, 0x0C000C00)));
}

X_INLINE void x_head_k(x_head *h, const uint8_t *p)
{
    const __m512i low = x_set8(15);
    const __m512i s0 = x_load(p), s1 = x_load(p + 64), s2 = x_load(p + 128);
    const __m512i s0h = _mm512_srli_epi16(s0, 4), s1h = _mm512_srli_epi16(s1, 4);
    const __m512i first = x_index(0, 1), second = x_index(2, 3);
    h->sc[0] = x_and_or(s0, low, _mm512_and_si512(_mm512_slli_epi16(s2, 4), x_set8(0x30)));
    h->sc[1] = x_and_or(s0h, low, _mm512_and_si512(_mm512_slli_epi16(s2, 2), x_set8(0x30)));
    const __m512i m0 = x_and_or(s1, low, _mm512_and_si512(s2, x_set8(0x30)));
    const __m512i m1 = x_and_or(s1h, low, _mm512_and_si512(_mm512_srli_epi16(s2, 2), x_set8(0x30)));
    h->min[0] = _mm512_shuffle_epi8(m0, first);
    h->min[1] = _mm512_shuffle_epi8(m0, second);
    h->min[2] = _mm512_shuffle_epi8(m1, first);
    h->min[3] = _mm512_shuffle_epi8(m1, second);
    h->d = x_half16(p + 192);
    h->dmin = x_half16(p + 224);
}

/* s += the four activations at p, the same for all lanes, times the weights w. Written out, since
 * the compiler would spend a register and an instruction on the broadcast. */
X_INLINE __m512i x_dot_bytes(__m512i s, __m512i w, const int8_t *p)
{
    __asm__("vpdpbusd %2%{1to16%}, %1, %0"
            : "+v"(s)
            : "v"(w), "m"(*(const int8_t(*)[4])(const void *)p));
    return s;
}

/* The float step of Q4_K and Q5_K for one row: i1 the scaled products, sum32 the row's eight sums.
 */
X_INLINE __m512 x_step_k(__m512 acc, __m512i i1, const x_head *h, const int16_t *sum32, float dx)
{
    __m512i i2 = _mm512_setzero_si512();
    X_UNROLL
    for (int p = 0; p < 4; p++)
        i2 = _mm512_dpwssd_epi32(i2, h->min[p], x_pair(sum32 + 2 * p));
    const __m512 t = _mm512_mul_ps(h->dmin, _mm512_cvtepi32_ps(i2));
    const __m512 v = _mm512_fmsub_ps(h->d, _mm512_cvtepi32_ps(i1), t);
    return _mm512_fmadd_ps(_mm512_set1_ps(dx), v, acc);
}

/* Bytes of the panel head of the types that keep their d apart: 16 half per block, whole vectors.
 */
X_INLINE size_t x_panel_head(int blocks)
{
    return ((size_t)blocks * 32 + 63) & ~(size_t)63;
}

#endif
