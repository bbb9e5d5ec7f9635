/*
 * Test data: the seeded stream, file rows and activation rows, random and adversarial, and an
 * independent reading of the file formats (one weight at a time, in double).
 */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *const check_mode_names[N_MODES] = {"random", "max", "denormal", "zero", "negative"};

bool check_quick;
int check_failures;
static uint64_t state = CHECK_SEED * 2 + 1, first_state = CHECK_SEED * 2 + 1;

void check_seed(uint64_t seed)
{
    first_state = seed * 2 + 1; /* never zero, which it would stay */
    check_reseed();
}

void check_reseed(void)
{
    state = first_state;
}

uint64_t check_random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545f4914f6cdd1dull;
}

int check_below(int n)
{
    return (int)(check_random() >> 33) % n;
}

float check_normal(void)
{
    float sign = check_random() & 1 ? -1.0f : 1.0f;
    return sign * (float)(1 + check_below(2000)) * 0x1p-10f * (check_below(8) ? 1.0f : 0.01f);
}

static double half_value(uint16_t h)
{
    int exp = h >> 10 & 31, frac = h & 1023;
    double v = exp == 0 ? ldexp(frac, -24) : ldexp(1024 + frac, exp - 25);
    return h & 0x8000 ? -v : v;
}

static uint16_t half_of(int mode)
{
    uint16_t sign = check_random() & 1 ? 0x8000 : 0, frac = (uint16_t)check_below(1024);
    switch (mode) {
    case MODE_MAX:
        return 0x7bff;
    case MODE_DENORMAL:
        return (uint16_t)(sign | frac);
    case MODE_ZERO:
        return sign;
    case MODE_NEGATIVE:
        return (uint16_t)(0x8000 | 0x2c00 | frac);
    default:
        return (uint16_t)(sign | (4 + check_below(14)) << 10 | frac);
    }
}

static uint16_t bf16_of(int mode)
{
    uint16_t sign = check_random() & 1 ? 0x8000 : 0, frac = (uint16_t)check_below(128);
    switch (mode) {
    case MODE_MAX:
        return (uint16_t)(sign | 180 << 7 | 127);
    /* products around the smallest normal float, and denormal inputs */
    case MODE_DENORMAL:
        return (uint16_t)(sign | (check_below(4) ? 52 + check_below(24) : 0) << 7 | frac);
    case MODE_ZERO:
        return sign;
    case MODE_NEGATIVE:
        return (uint16_t)(0x8000 | 126 << 7 | frac);
    default:
        return (uint16_t)(sign | (110 + check_below(18)) << 7 | frac);
    }
}

static float f32_of(int mode)
{
    switch (mode) {
    case MODE_MAX:
        return check_random() & 1 ? 1e15f : -1e15f;
    case MODE_DENORMAL:
        return check_normal() * (check_below(3) ? 1e-21f : 1e-38f);
    case MODE_ZERO:
        return check_random() & 1 ? 0.0f : -0.0f;
    case MODE_NEGATIVE:
        return -fabsf(check_normal());
    default:
        return check_normal();
    }
}

/* Where the half scales of a block lie; -1 ends. */
static void half_places(int type, int at[2])
{
    at[0] = type == KERN_Q6_K ? 208 : 0;
    at[1] = type == KERN_Q4_K || type == KERN_Q5_K ? 2 : -1;
}

void check_file_rows(int type, int mode, int n, int k, uint8_t *dst)
{
    size_t total = (size_t)n * kern_type_row_bytes(type, k);
    if (type == KERN_F32 || type == KERN_F16 || type == KERN_BF16) {
        for (size_t i = 0; i < (size_t)n * (size_t)k; i++) {
            uint16_t h = type == KERN_F16 ? half_of(mode) : type == KERN_BF16 ? bf16_of(mode) : 0;
            float f = type == KERN_F32 ? f32_of(mode) : 0;
            if (type == KERN_F32)
                memcpy(dst + 4 * i, &f, 4);
            else
                memcpy(dst + 2 * i, &h, 2);
        }
        return;
    }
    for (size_t i = 0; i < total; i++) {
        uint8_t random = (uint8_t)(check_random() >> 40);
        dst[i] = mode == MODE_MAX        ? 0xff
                 : mode == MODE_ZERO     ? 0
                 : mode == MODE_NEGATIVE ? (uint8_t)(random & 1 ? 0x80 : 0x7f)
                                         : random;
    }
    size_t bytes = (size_t)kern_type_block_bytes(type);
    int at[2];
    half_places(type, at);
    for (size_t b = 0; b < total / bytes; b++)
        for (int i = 0; i < 2 && at[i] >= 0; i++) {
            uint16_t h = half_of(mode);
            memcpy(dst + b * bytes + (size_t)at[i], &h, 2);
        }
    if (type == KERN_Q6_K && (mode == MODE_MAX || mode == MODE_NEGATIVE))
        for (size_t b = 0; b < total / bytes; b++)
            memset(dst + b * bytes + 192, mode == MODE_MAX ? 127 : 0x80, 16);
}

/* ---- one weight from the file, by the formats' description ---- */

static uint16_t u16_at(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static double k_weight(int type, const uint8_t *block, int i, double *magnitude)
{
    const uint8_t *s = block + 4, *high = block + 16, *q = block + (type == KERN_Q5_K ? 48 : 16);
    int j = i / 32, scale, min, code = q[32 * (i / 64) + i % 32] >> (i % 64 >= 32 ? 4 : 0) & 15;
    if (j < 4) {
        scale = s[j] & 63;
        min = s[j + 4] & 63;
    } else {
        scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        min = s[j + 4] >> 4 | (s[j] >> 6) << 4;
    }
    if (type == KERN_Q5_K) code += (high[i % 32] >> (i / 32) & 1) * 16;
    double a = half_value(u16_at(block)) * scale * code, b = half_value(u16_at(block + 2)) * min;
    *magnitude = fabs(a) + fabs(b);
    return a - b;
}

static double q6_weight(const uint8_t *block, int i)
{
    int h = i / 128, part = i % 128 / 32, l = i % 32;
    const uint8_t *ql = block + 64 * h, *qh = block + 128 + 32 * h;
    const int8_t *scales = (const int8_t *)(block + 192) + 8 * h;
    int low[4] = {ql[l] & 15, ql[32 + l] & 15, ql[l] >> 4, ql[32 + l] >> 4};
    int code = low[part] | (qh[l] >> 2 * part & 3) << 4;
    return half_value(u16_at(block + 208)) * scales[l / 16 + 2 * part] * (code - 32);
}

double check_weight(int type, const uint8_t *row, int i, double *magnitude)
{
    int size = kern_type_block(type), j = i % size;
    const uint8_t *b = row + (size_t)(i / size) * (size_t)kern_type_block_bytes(type);
    double w = 0;
    float f;
    uint32_t bits;
    switch (type) {
    case KERN_F32:
        memcpy(&f, b, 4);
        w = f;
        break;
    case KERN_F16:
        w = half_value(u16_at(b));
        break;
    case KERN_BF16:
        bits = (uint32_t)u16_at(b) << 16;
        memcpy(&f, &bits, 4);
        w = f;
        break;
    case KERN_Q4_0:
        w = half_value(u16_at(b)) * ((b[2 + j % 16] >> (j < 16 ? 0 : 4) & 15) - 8);
        break;
    case KERN_Q5_0: {
        uint32_t high =
            (uint32_t)b[2] | (uint32_t)b[3] << 8 | (uint32_t)b[4] << 16 | (uint32_t)b[5] << 24;
        int code = (b[6 + j % 16] >> (j < 16 ? 0 : 4) & 15) | (int)(high >> j & 1) << 4;
        w = half_value(u16_at(b)) * (code - 16);
        break;
    }
    case KERN_Q8_0:
        w = half_value(u16_at(b)) * (int8_t)b[2 + j];
        break;
    case KERN_Q4_K:
    case KERN_Q5_K:
        return k_weight(type, b, j, magnitude);
    case KERN_Q6_K:
        w = q6_weight(b, j);
        break;
    case KERN_GPTQ4:
        w = half_value(u16_at(b)) * ((b[2 + j / 2] >> (j % 2 ? 4 : 0) & 15) - 8);
        break;
    }
    *magnitude = fabs(w);
    return w;
}

/* ---- activation rows ---- */

static void *part(check_rows *r, int i, size_t bytes)
{
    r->parts[i] = ep_calloc(1, bytes + 64); /* rows may be read 64 bytes past their end */
    if (r->parts[i] == NULL) abort();
    memset(r->parts[i], 0x55, bytes + 64);
    return r->parts[i];
}

static int8_t q_of(int mode)
{
    switch (mode) {
    case MODE_MAX:
        return 127;
    case MODE_NEGATIVE:
        return -127;
    case MODE_ZERO:
        return 0;
    default:
        return (int8_t)(check_below(255) - 127);
    }
}

static void make_q8(check_rows *r, int mode, int m, int k)
{
    kern_rows *v = &r->view;
    size_t block = (size_t)kern_act_block(v->act), n = (size_t)k;
    v->ldq = ((n + 63) & ~(size_t)63) + 64 * (size_t)check_below(2);
    v->lds = n / block + (size_t)check_below(3);
    v->ldsum = n / 16 + (size_t)check_below(3);
    int8_t *q = part(r, 0, (size_t)m * v->ldq);
    float *scale = part(r, 1, (size_t)m * v->lds * 4);
    int16_t *sum16 = part(r, 2, (size_t)m * v->ldsum * 2);
    int16_t *sum32 = part(r, 3, (size_t)m * v->ldsum * 2);
    for (size_t row = 0; row < (size_t)m; row++) {
        int8_t *x = q + row * v->ldq;
        for (size_t i = 0; i < n; i++)
            x[i] = q_of(mode);
        memset(x + n, 0, v->ldq - n);
        for (size_t b = 0; b < n / block; b++)
            scale[row * v->lds + b] = mode == MODE_ZERO       ? 0.0f
                                      : mode == MODE_DENORMAL ? 1e-44f * (float)check_below(100)
                                                              : fabsf(check_normal()) / 127.0f;
        for (size_t i = 0; i < n / 16; i++) {
            int16_t s = 0;
            for (size_t j = 0; j < 16; j++)
                s = (int16_t)(s + x[16 * i + j]);
            sum16[row * v->ldsum + i] = s;
        }
        for (size_t i = 0; i < n / 32; i++)
            sum32[row * v->ldsum + i] =
                (int16_t)(sum16[row * v->ldsum + 2 * i] + sum16[row * v->ldsum + 2 * i + 1]);
    }
    v->q = q;
    v->scale = scale;
    v->sum16 = sum16;
    v->sum32 = sum32;
}

void check_rows_make(check_rows *r, kern_act act, int mode, int m, int k)
{
    *r = (check_rows){.view = {.act = act, .m = m, .k = k}};
    kern_rows *v = &r->view;
    if (act == KERN_ACT_F32) {
        v->ldx = (size_t)(k + check_below(3));
        float *x = part(r, 0, (size_t)m * v->ldx * 4);
        for (size_t i = 0; i < (size_t)m * v->ldx; i++)
            x[i] = f32_of(mode);
        v->x = x;
    } else if (act == KERN_ACT_BF16) {
        v->ldh = (size_t)((k + 31) & ~31) + 2 * (size_t)check_below(2);
        uint16_t *h = part(r, 0, (size_t)m * v->ldh * 2);
        for (size_t i = 0; i < (size_t)m * v->ldh; i++) {
            h[i] = bf16_of(mode);
            if ((h[i] & 0x7f80) == 0) h[i] &= 0x8000; /* act_bf16 flushes denormals */
            if (i % v->ldh >= (size_t)k) h[i] = 0;
        }
        v->h = h;
    } else {
        make_q8(r, mode, m, k);
    }
}

void check_rows_free(check_rows *r)
{
    for (int i = 0; i < 5; i++)
        ep_free(r->parts[i]);
}

double check_rows_value(const kern_rows *v, int row, int i)
{
    size_t r = (size_t)row, at = (size_t)i;
    if (v->act == KERN_ACT_F32) return v->x[r * v->ldx + at];
    if (v->act == KERN_ACT_BF16) {
        uint32_t bits = (uint32_t)v->h[r * v->ldh + at] << 16;
        float f;
        memcpy(&f, &bits, 4);
        return f;
    }
    size_t block = (size_t)kern_act_block(v->act);
    return (double)v->q[r * v->ldq + at] * (double)v->scale[r * v->lds + at / block];
}
