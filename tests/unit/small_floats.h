#ifndef EP_TESTS_UNIT_SMALL_FLOATS_H
#define EP_TESTS_UNIT_SMALL_FLOATS_H
/*
 * small_floats: halves and bfloat16 as floats, for programs that prove the CUDA kernels on a CPU.
 * C11 and C++.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

static float half_float(uint32_t h)
{
    int exp = (int)(h >> 10 & 31), frac = (int)(h & 1023);
    float v = exp == 0 ? ldexpf((float)frac, -24) : ldexpf((float)(1024 + frac), exp - 25);
    return h & 0x8000 ? -v : v;
}

/* The nearest value with `bits` bits of mantissa (11: half, 8: bfloat16), ties to even. */
static float rounded(float x, int bits)
{
    int e;
    float f = frexpf(x, &e);
    return ldexpf(nearbyintf(ldexpf(f, bits)), e - bits);
}

static float bf16_float(uint32_t h)
{
    float f;
    h <<= 16;
    memcpy(&f, &h, 4);
    return f;
}

#endif
