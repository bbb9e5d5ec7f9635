#ifndef EP_KERNELS_FORMATS_H
#define EP_KERNELS_FORMATS_H
/*
 * formats: what a weight looks like in a file and in memory, and what a row of activations looks
 * like when it meets it. Knows sizes and layouts only; no code that computes. model/ reads nothing
 * else of kernels/.
 *
 * File blocks are GGML's (values here are GGUF's type ids). Matrices are [n, k] with k fastest: a
 * row of k weights makes one output. kernels.h has the packed layout and the specification.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kern_type {
    KERN_F32 = 0,
    KERN_F16 = 1,
    KERN_Q4_0 = 2,
    KERN_Q5_0 = 6,
    KERN_Q8_0 = 8,
    KERN_Q4_K = 12,
    KERN_Q5_K = 13,
    KERN_Q6_K = 14,
    KERN_BF16 = 30,
    KERN_MXFP4 = 39,  /* layout prepared, not served */
    KERN_GPTQ4 = 1000 /* symmetric int4, group 128 (no GGUF id: the Marlin/GPTQ checkpoint form) */
} kern_type;

/* The form of an activation row that a weight type consumes. */
typedef enum kern_act {
    KERN_ACT_F32 = 0,    /* k floats */
    KERN_ACT_Q8_256 = 1, /* K-quants: k int8, then k/256 float scales */
    KERN_ACT_Q8_32 = 2,  /* legacy:   k int8, then k/32 float scales */
    KERN_ACT_Q8_128 = 3, /* GPTQ:     k int8, then k/128 float scales */
    KERN_ACT_BF16 = 4    /* k bfloat16, denormals flushed to zero */
} kern_act;

#define KERN_PACK_VERSION 1 /* of the packed layout below: a cache of packed experts carries it */
#define KERN_PAGE         4096 /* stride granularity of stacks whose experts are mapped from a file */
#define KERN_PANEL        16   /* output columns (rows of the file's matrix) in one packed panel */

/* On-disk blocks, sizes checked below. d and m scales are IEEE half bits. */
typedef struct kern_block_q4_0 {
    uint16_t d;
    uint8_t q[16]; /* byte i: weights i (low nibble) and i+16 (high); w = d * (q - 8) */
} kern_block_q4_0;
typedef struct kern_block_q5_0 {
    uint16_t d;
    uint8_t high[4]; /* bit i: fifth bit of weight i */
    uint8_t q[16];   /* as q4_0; w = d * (q - 16) */
} kern_block_q5_0;
typedef struct kern_block_q8_0 {
    uint16_t d;
    int8_t q[32]; /* w = d * q */
} kern_block_q8_0;
typedef struct kern_block_q4_k {
    uint16_t d, dmin;
    uint8_t scales[12]; /* 8 six-bit scales and 8 six-bit mins */
    uint8_t q[128];     /* byte 32*(i/64) + i%32, nibble (i%64)/32; w = d*sc*q - dmin*m */
} kern_block_q4_k;
typedef struct kern_block_q5_k {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t high[32]; /* byte i%32, bit i/32: fifth bit of weight i */
    uint8_t q[128];
} kern_block_q5_k;
typedef struct kern_block_q6_k {
    /* Weight i = 128h + 32s + l (s = 0..3, l = 0..31): lower four bits in byte 64h + 32(s%2) + l of
     * low, nibble s/2; upper two in byte 32h + l of high, bits 2s and 2s+1. */
    uint8_t low[128];
    uint8_t high[64];
    int8_t scales[16];
    uint16_t d; /* w = d * sc[i/16] * (q - 32) */
} kern_block_q6_k;
typedef struct kern_block_gptq4 {
    uint16_t d;
    uint8_t q[64]; /* byte i: weights 2i (low nibble) and 2i+1 (high); w = d * (q - 8); our own row
                    * form, made by the safetensors reader from qweight and scales */
} kern_block_gptq4;
typedef struct kern_block_mxfp4 {
    uint8_t e;     /* E8M0 exponent */
    uint8_t q[16]; /* byte i: weights i (low nibble) and i+16 (high), E2M1 */
} kern_block_mxfp4;

#ifndef __cplusplus
_Static_assert(sizeof(kern_block_q4_0) == 18, "q4_0");
_Static_assert(sizeof(kern_block_q5_0) == 22, "q5_0");
_Static_assert(sizeof(kern_block_q8_0) == 34, "q8_0");
_Static_assert(sizeof(kern_block_q4_k) == 144, "q4_k");
_Static_assert(sizeof(kern_block_q5_k) == 176, "q5_k");
_Static_assert(sizeof(kern_block_q6_k) == 210, "q6_k");
_Static_assert(sizeof(kern_block_gptq4) == 66, "gptq4");
_Static_assert(sizeof(kern_block_mxfp4) == 17, "mxfp4");
#endif

/*
 * The packed layout of a panel: 16 columns n = 0..15, the whole of k, one contiguous run.
 * A "vector" is 64 bytes: 16 lanes of 4 bytes, lane n belongs to column n, byte i of the lane to
 * weight k = 4*group + i. Everything is lossless and of the file's size (plus rounding to 64
 * bytes).
 *
 * "Nibble vectors of 32 weights" are 4 vectors v = 0..3: the low nibble of byte (n, i) is weight
 * 4v + i, the high nibble weight 16 + 4v + i (both relative to the 32).
 *
 *   Q4_K  per 256 block, 2304 bytes:
 *         S0 (vector): byte b: low nibble sc[b] & 15, high nibble sc[b+4] & 15        b = 0..3
 *         S1 (vector): the same of the mins m[b], m[b+4]
 *         S2 (vector): byte b: bits 0-1 sc[b]>>4, 2-3 sc[b+4]>>4, 4-5 m[b]>>4, 6-7 m[b+4]>>4
 *         16 half d, 16 half dmin (64 bytes), then 8 x nibble vectors of 32
 *   Q5_K  per 256 block, 2816 bytes: the same 256-byte head; 8 high-bit vectors, one per 32
 * weights: bit t of byte (n, i) is the fifth bit of weight 4t + i; then 8 x nibble vectors of 32
 *   Q6_K  head of the panel: d as 16 half per block, rounded up to 64 bytes in all; then per 256
 * block 3328 bytes: 4 scale vectors g (byte b of lane n: sc[4g+b]); 16 high vectors, two (u = 0, 1)
 *         per 32 weights: bits 2s..2s+1 of byte (n, i) are the upper two bits of weight 16u + 4s +
 * i; then 8 x nibble vectors of 32 Q8_0  head: d as 16 half per block, rounded up to 64; per 32
 * block 8 vectors t: weight 4t + i, stored as q + 128 (unsigned) Q4_0  head as Q8_0; per 32 block
 * the nibble vectors Q5_0  head as Q8_0; per 32 block one high-bit vector (as Q5_K), then the
 * nibble vectors GPTQ4 head: d as 16 half per group of 128, rounded up to 64; per group 4 x nibble
 * vectors of 32 F32   [k][16] floats      F16  [k][16] halves      BF16  [k/2][16][2], k rounded up
 * to 32 with zeros
 */

/* True if the type can be computed with (KERN_MXFP4 cannot yet). Unknown values: false. */
bool kern_type_is_served(int type);
/* "Q4_K"; "type 17" style names for what is not served come from model/. NULL when unknown. */
const char *kern_type_name(int type);
/* Weights per block along k (1 for float types) and bytes per block; 0 for unknown types. */
int kern_type_block(int type);
int kern_type_block_bytes(int type);
/* Bytes of one file row of k weights; 0 if k is no multiple of the block. */
size_t kern_type_row_bytes(int type, int k);

/* The activation form that a weight type consumes. */
kern_act kern_type_act(int type);
/* The form in which rows meet a gate and an up matrix: the one they have in common, else floats.
 * Router and shard follow this rule each for itself, so it stands here once. */
kern_act kern_gate_up_act(int gate_type, int up_type);
/* Bytes of one activation row of k values, a multiple of 4. k must be a multiple of the block. */
size_t kern_act_row_bytes(kern_act act, int k);
int kern_act_block(kern_act act); /* 256, 32, 128; 1 for F32 and BF16 */

/* Bytes of an [n, k] matrix in the packed layout; n is rounded up to a multiple of KERN_PANEL. */
size_t kern_packed_bytes(int type, int n, int k);
/* Bytes of one panel: KERN_PANEL rows over the whole of k. A multiple of 64 wherever the type's
 * layout allows; panels of a matrix follow one another without gaps. */
size_t kern_panel_bytes(int type, int k);

#ifdef __cplusplus
}
#endif
#endif
