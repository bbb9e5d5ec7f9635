#ifndef EP_KERNELS_PACK_H
#define EP_KERNELS_PACK_H
/*
 * pack: the neutral form between a file block and its place in a panel, private to kernels/.
 * Packing, unpacking, the expansion to floats and the scalar products all go through it, so that
 * each layout is written down twice only: file <-> neutral and panel <-> neutral. General code:
 * files of an instruction set do not include this.
 */
#include <stdint.h>
#include <string.h>
#include "kernels/formats.h"

/* One quantised block of one column: unsigned codes in the order of k and the scales as stored. */
typedef struct kern_colblock {
    uint16_t d, dmin;  /* half bits */
    uint8_t sc[16];    /* Q4_K, Q5_K: 8 scales of 6 bits; Q6_K: 16 signed bytes */
    uint8_t mn[8];     /* Q4_K, Q5_K: 8 mins of 6 bits */
    uint8_t code[256]; /* Q8_0: q + 128 */
} kern_colblock;

/* The zero point of a type's codes: weight = scale * (code - zero) (Q4_K and Q5_K: 0, they have
 * mins). */
int kern_code_zero(int type);

void kern_colblock_from_file(int type, const void *block, kern_colblock *c);
void kern_colblock_to_file(int type, const kern_colblock *c, void *block);
/* Block `b` of column `n` in a panel over k weights. Storing assumes that the panel was zero. */
void kern_colblock_from_panel(int type, int k, const uint8_t *panel, int b, int n,
                              kern_colblock *c);
void kern_colblock_to_panel(int type, int k, uint8_t *panel, int b, int n, const kern_colblock *c);

static inline float kern_half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = (h >> 10) & 31, frac = h & 1023, bits;
    if (exp == 0) { /* zero or a denormal, which a float holds exactly */
        float f = (float)frac * 0x1p-24f;
        return sign ? -f : f;
    }
    bits = sign | (exp == 31 ? 0x7f800000u : (exp + 112) << 23) | frac << 13;
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

static inline float kern_bf16_to_float(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

#endif
