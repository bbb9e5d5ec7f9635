/*
 * The products as the specification has them (ops.h), in plain C: what every other instruction set
 * must equal bit for bit. Written to be read, not to be fast: blocks ascend, each block of each
 * column is brought to its neutral form once and used for all rows. Sums of products inside a block
 * are exact in int32; every float operation is spelled out, fmaf being the only fused one.
 */
#include "kernels/cpu/ops.h"
#include "kernels/pack.h"

#include <float.h>
#include <math.h>

static void clear(float *y, size_t ldy, int m)
{
    for (int r = 0; r < m; r++)
        for (int n = 0; n < KERN_PANEL; n++)
            y[(size_t)r * ldy + (size_t)n] = 0.0f;
}

/* Sum of code * x over one run. */
static int32_t dot(const uint8_t *code, const int8_t *x, int count)
{
    int32_t sum = 0;
    for (int i = 0; i < count; i++)
        sum += (int32_t)code[i] * x[i];
    return sum;
}

static void mins_panel(int type, float *y, size_t ldy, const uint8_t *panel, const kern_rows *rows)
{
    clear(y, ldy, rows->m);
    kern_colblock c;
    for (int b = 0; b < rows->k / 256; b++)
        for (int n = 0; n < KERN_PANEL; n++) {
            kern_colblock_from_panel(type, rows->k, panel, b, n, &c);
            float d = kern_half_to_float(c.d), dmin = kern_half_to_float(c.dmin);
            for (int r = 0; r < rows->m; r++) {
                const int8_t *x = rows->q + (size_t)r * rows->ldq + (size_t)b * 256;
                const int16_t *sum32 = rows->sum32 + (size_t)r * rows->ldsum + (size_t)b * 8;
                int32_t i1 = 0, i2 = 0;
                for (int j = 0; j < 8; j++) {
                    i1 += c.sc[j] * dot(c.code + 32 * j, x + 32 * j, 32);
                    i2 += c.mn[j] * sum32[j];
                }
                float t = dmin * (float)i2;
                float v = fmaf(d, (float)i1, -t);
                float *acc = &y[(size_t)r * ldy + (size_t)n];
                *acc = fmaf(rows->scale[(size_t)r * rows->lds + (size_t)b], v, *acc);
            }
        }
}

static void q4_k_panel(float *y, size_t ldy, const uint8_t *panel, const kern_rows *rows)
{
    mins_panel(KERN_Q4_K, y, ldy, panel, rows);
}

static void q5_k_panel(float *y, size_t ldy, const uint8_t *panel, const kern_rows *rows)
{
    mins_panel(KERN_Q5_K, y, ldy, panel, rows);
}

static void q6_k_panel(float *y, size_t ldy, const uint8_t *panel, const kern_rows *rows)
{
    clear(y, ldy, rows->m);
    kern_colblock c;
    for (int b = 0; b < rows->k / 256; b++)
        for (int n = 0; n < KERN_PANEL; n++) {
            kern_colblock_from_panel(KERN_Q6_K, rows->k, panel, b, n, &c);
            float d = kern_half_to_float(c.d);
            for (int r = 0; r < rows->m; r++) {
                const int8_t *x = rows->q + (size_t)r * rows->ldq + (size_t)b * 256;
                const int16_t *sum16 = rows->sum16 + (size_t)r * rows->ldsum + (size_t)b * 16;
                int32_t i1 = 0;
                for (int j = 0; j < 16; j++)
                    i1 += (int8_t)c.sc[j] * (dot(c.code + 16 * j, x + 16 * j, 16) - 32 * sum16[j]);
                float v = d * (float)i1;
                float *acc = &y[(size_t)r * ldy + (size_t)n];
                *acc = fmaf(rows->scale[(size_t)r * rows->lds + (size_t)b], v, *acc);
            }
        }
}

/* The types with one scale a block and a zero point. */
static void plain_panel(int type, float *y, size_t ldy, const uint8_t *panel, const kern_rows *rows)
{
    int block = kern_type_block(type), zero = kern_code_zero(type);
    clear(y, ldy, rows->m);
    kern_colblock c;
    for (int b = 0; b < rows->k / block; b++)
        for (int n = 0; n < KERN_PANEL; n++) {
            kern_colblock_from_panel(type, rows->k, panel, b, n, &c);
            float d = kern_half_to_float(c.d);
            for (int r = 0; r < rows->m; r++) {
                const int8_t *x = rows->q + (size_t)r * rows->ldq + (size_t)(b * block);
                int32_t i1 = 0;
                for (int i = 0; i < block; i++)
                    i1 += (c.code[i] - zero) * x[i];
                float v = d * (float)i1;
                float *acc = &y[(size_t)r * ldy + (size_t)n];
                *acc = fmaf(rows->scale[(size_t)r * rows->lds + (size_t)b], v, *acc);
            }
        }
}

static void q4_0_panel(float *y, size_t ldy, const uint8_t *panel, const kern_rows *rows)
{
    plain_panel(KERN_Q4_0, y, ldy, panel, rows);
}

static void q5_0_panel(float *y, size_t ldy, const uint8_t *panel, const kern_rows *rows)
{
    plain_panel(KERN_Q5_0, y, ldy, panel, rows);
}

static void q8_0_panel(float *y, size_t ldy, const uint8_t *panel, const kern_rows *rows)
{
    plain_panel(KERN_Q8_0, y, ldy, panel, rows);
}

static void gptq4_panel(float *y, size_t ldy, const uint8_t *panel, const kern_rows *rows)
{
    plain_panel(KERN_GPTQ4, y, ldy, panel, rows);
}

static void f32_panel(float *y, size_t ldy, const uint8_t *panel, const kern_rows *rows)
{
    for (int r = 0; r < rows->m; r++)
        for (int n = 0; n < KERN_PANEL; n++) {
            float acc = 0.0f;
            for (int k = 0; k < rows->k; k++) {
                float w;
                memcpy(&w, panel + ((size_t)k * KERN_PANEL + (size_t)n) * 4, 4);
                acc = fmaf(w, rows->x[(size_t)r * rows->ldx + (size_t)k], acc);
            }
            y[(size_t)r * ldy + (size_t)n] = acc;
        }
}

static void f16_panel(float *y, size_t ldy, const uint8_t *panel, const kern_rows *rows)
{
    for (int r = 0; r < rows->m; r++)
        for (int n = 0; n < KERN_PANEL; n++) {
            float acc = 0.0f;
            for (int k = 0; k < rows->k; k++) {
                uint16_t w;
                memcpy(&w, panel + ((size_t)k * KERN_PANEL + (size_t)n) * 2, 2);
                acc = fmaf(kern_half_to_float(w), rows->x[(size_t)r * rows->ldx + (size_t)k], acc);
            }
            y[(size_t)r * ldy + (size_t)n] = acc;
        }
}

/* Denormals count as zero of the same sign. */
static float flush(float x)
{
    return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x;
}

/* fma whose result is flushed if it is below the normal range after rounding to 24 bits. Rounding
 * at the denormal spacing can lift such a result to FLT_MIN, so that value is looked at again,
 * scaled up. */
static float flush_fma(float a, float b, float c)
{
    float r = fmaf(a, b, c);
    if (fabsf(r) == FLT_MIN && fabsf(fmaf(a * 0x1p64f, b, c * 0x1p64f)) < FLT_MIN * 0x1p64f)
        return copysignf(0.0f, r);
    return flush(r);
}

static void bf16_panel(float *y, size_t ldy, const uint8_t *panel, const kern_rows *rows)
{
    int blocks = (rows->k + 31) / 32;
    for (int r = 0; r < rows->m; r++)
        for (int n = 0; n < KERN_PANEL; n++) {
            const uint16_t *x = rows->h + (size_t)r * rows->ldh;
            const uint8_t *at = panel + 4 * (size_t)n;
            float acc = 0.0f;
            for (int b = 0; b < blocks; b++) {
                float even = 0.0f, odd = 0.0f;
                for (int p = 0; p < 16; p++, x += 2, at += 64) {
                    uint16_t w[2];
                    memcpy(w, at, 4);
                    even = flush_fma(flush(kern_bf16_to_float(x[0])),
                                     flush(kern_bf16_to_float(w[0])), even);
                    odd = flush_fma(flush(kern_bf16_to_float(x[1])),
                                    flush(kern_bf16_to_float(w[1])), odd);
                }
                acc = flush(acc + flush(even + odd));
            }
            y[(size_t)r * ldy + (size_t)n] = acc;
        }
}

const kern_gemm kern_gemm_scalar = {.name = "scalar",
                                    .q4_0 = q4_0_panel,
                                    .q5_0 = q5_0_panel,
                                    .q8_0 = q8_0_panel,
                                    .q4_k = q4_k_panel,
                                    .q5_k = q5_k_panel,
                                    .q6_k = q6_k_panel,
                                    .gptq4 = gptq4_panel,
                                    .f32 = f32_panel,
                                    .f16 = f16_panel,
                                    .bf16 = bf16_panel};
