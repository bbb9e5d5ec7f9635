/*
 * Packing: file rows to panels of 16 columns and back, and file rows to floats. Every quantised
 * block passes through kern_colblock (pack.h). The invariant is that unpack(pack(x)) gives the
 * bytes of x for any bytes x, so a packed cache can stand for its file. Loops over 32-bit words of
 * four codes, since a shard packs gigabytes at start. Little-endian machines only.
 */
#include "kernels/kernels.h"
#include "kernels/pack.h"

#include <assert.h>

enum { VEC = 64 }; /* bytes of a vector: 16 columns x 4 */

static uint32_t load32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

static void store32(uint8_t *p, uint32_t v)
{
    memcpy(p, &v, 4);
}

static uint16_t load16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

static void store16(uint8_t *p, uint16_t v)
{
    memcpy(p, &v, 2);
}

int kern_code_zero(int type)
{
    switch (type) {
    case KERN_Q4_0:
    case KERN_GPTQ4:
        return 8;
    case KERN_Q5_0:
        return 16;
    case KERN_Q6_K:
        return 32;
    case KERN_Q8_0:
        return 128;
    default:
        return 0;
    }
}

/* ---- file <-> neutral ---- */

/* Codes of 32 weights from 16 bytes: low nibbles first. */
static void split16(const uint8_t *q, uint8_t *code)
{
    for (int i = 0; i < 16; i++) {
        code[i] = q[i] & 15;
        code[16 + i] = q[i] >> 4;
    }
}

static void join16(const uint8_t *code, uint8_t *q)
{
    for (int i = 0; i < 16; i++)
        q[i] = (uint8_t)((code[i] & 15) | (code[16 + i] & 15) << 4);
}

/* The K-quants: 64 weights from 32 bytes. */
static void split32(const uint8_t *q, uint8_t *code)
{
    for (int i = 0; i < 32; i++) {
        code[i] = q[i] & 15;
        code[32 + i] = q[i] >> 4;
    }
}

static void join32(const uint8_t *code, uint8_t *q)
{
    for (int i = 0; i < 32; i++)
        q[i] = (uint8_t)((code[i] & 15) | (code[32 + i] & 15) << 4);
}

/* 8 six-bit scales and 8 six-bit mins in 12 bytes: bytes 0-3 hold scales 0-3, bytes 4-7 mins 0-3,
 * each in its low six bits; bytes 8-11 the low nibbles of scales (low) and mins (high) 4-7, whose
 * upper two bits sit on top of bytes 0-3 and 4-7. */
static void scales_get(const uint8_t *s, uint8_t *sc, uint8_t *mn)
{
    for (int j = 0; j < 4; j++) {
        sc[j] = s[j] & 63;
        mn[j] = s[4 + j] & 63;
        sc[4 + j] = (uint8_t)((s[8 + j] & 15) | (s[j] >> 6) << 4);
        mn[4 + j] = (uint8_t)((s[8 + j] >> 4) | (s[4 + j] >> 6) << 4);
    }
}

static void scales_set(uint8_t *s, const uint8_t *sc, const uint8_t *mn)
{
    for (int j = 0; j < 4; j++) {
        s[j] = (uint8_t)(sc[j] | (sc[4 + j] >> 4) << 6);
        s[4 + j] = (uint8_t)(mn[j] | (mn[4 + j] >> 4) << 6);
        s[8 + j] = (uint8_t)((sc[4 + j] & 15) | (mn[4 + j] & 15) << 4);
    }
}

static void q6_from_file(const kern_block_q6_k *b, kern_colblock *c)
{
    c->d = b->d;
    memcpy(c->sc, b->scales, 16);
    for (int h = 0; h < 2; h++) {
        const uint8_t *low = b->low + 64 * h, *high = b->high + 32 * h;
        uint8_t *code = c->code + 128 * h;
        for (int i = 0; i < 32; i++) {
            code[i] = (uint8_t)((low[i] & 15) | (high[i] & 3) << 4);
            code[32 + i] = (uint8_t)((low[32 + i] & 15) | (high[i] >> 2 & 3) << 4);
            code[64 + i] = (uint8_t)(low[i] >> 4 | (high[i] >> 4 & 3) << 4);
            code[96 + i] = (uint8_t)(low[32 + i] >> 4 | high[i] >> 6 << 4);
        }
    }
}

static void q6_to_file(const kern_colblock *c, kern_block_q6_k *b)
{
    b->d = c->d;
    memcpy(b->scales, c->sc, 16);
    for (int h = 0; h < 2; h++) {
        uint8_t *low = b->low + 64 * h, *high = b->high + 32 * h;
        const uint8_t *code = c->code + 128 * h;
        for (int i = 0; i < 32; i++) {
            low[i] = (uint8_t)((code[i] & 15) | (code[64 + i] & 15) << 4);
            low[32 + i] = (uint8_t)((code[32 + i] & 15) | (code[96 + i] & 15) << 4);
            high[i] = (uint8_t)(code[i] >> 4 | code[32 + i] >> 4 << 2 | code[64 + i] >> 4 << 4 |
                                code[96 + i] >> 4 << 6);
        }
    }
}

void kern_colblock_from_file(int type, const void *block, kern_colblock *c)
{
    switch (type) {
    case KERN_Q4_0: {
        const kern_block_q4_0 *b = block;
        memcpy(&c->d, &b->d, 2);
        split16(b->q, c->code);
        break;
    }
    case KERN_Q5_0: {
        const kern_block_q5_0 *b = block;
        memcpy(&c->d, &b->d, 2);
        split16(b->q, c->code);
        for (int i = 0; i < 32; i++)
            c->code[i] |= (uint8_t)((b->high[i / 8] >> i % 8 & 1) << 4);
        break;
    }
    case KERN_Q8_0: {
        const kern_block_q8_0 *b = block;
        memcpy(&c->d, &b->d, 2);
        for (int i = 0; i < 32; i++)
            c->code[i] = (uint8_t)((uint8_t)b->q[i] ^ 128);
        break;
    }
    case KERN_Q4_K: {
        const kern_block_q4_k *b = block;
        memcpy(&c->d, &b->d, 4);
        scales_get(b->scales, c->sc, c->mn);
        for (int i = 0; i < 4; i++)
            split32(b->q + 32 * i, c->code + 64 * i);
        break;
    }
    case KERN_Q5_K: {
        const kern_block_q5_k *b = block;
        memcpy(&c->d, &b->d, 4);
        scales_get(b->scales, c->sc, c->mn);
        for (int i = 0; i < 4; i++)
            split32(b->q + 32 * i, c->code + 64 * i);
        for (int j = 0; j < 8; j++)
            for (int i = 0; i < 32; i++)
                c->code[32 * j + i] |= (uint8_t)((b->high[i] >> j & 1) << 4);
        break;
    }
    case KERN_Q6_K: {
        kern_block_q6_k b;
        memcpy(&b, block, sizeof(b)); /* rows may start at odd multiples of 2 bytes */
        q6_from_file(&b, c);
        break;
    }
    case KERN_GPTQ4: {
        const kern_block_gptq4 *b = block;
        memcpy(&c->d, &b->d, 2);
        for (int i = 0; i < 64; i++) {
            c->code[2 * i] = b->q[i] & 15;
            c->code[2 * i + 1] = b->q[i] >> 4;
        }
        break;
    }
    default:
        assert(!"type without blocks");
    }
}

void kern_colblock_to_file(int type, const kern_colblock *c, void *block)
{
    switch (type) {
    case KERN_Q4_0: {
        kern_block_q4_0 *b = block;
        memcpy(&b->d, &c->d, 2);
        join16(c->code, b->q);
        break;
    }
    case KERN_Q5_0: {
        kern_block_q5_0 *b = block;
        memcpy(&b->d, &c->d, 2);
        join16(c->code, b->q);
        memset(b->high, 0, sizeof(b->high));
        for (int i = 0; i < 32; i++)
            b->high[i / 8] |= (uint8_t)(c->code[i] >> 4 << i % 8);
        break;
    }
    case KERN_Q8_0: {
        kern_block_q8_0 *b = block;
        memcpy(&b->d, &c->d, 2);
        for (int i = 0; i < 32; i++)
            b->q[i] = (int8_t)(uint8_t)(c->code[i] ^ 128);
        break;
    }
    case KERN_Q4_K: {
        kern_block_q4_k *b = block;
        memcpy(&b->d, &c->d, 4);
        scales_set(b->scales, c->sc, c->mn);
        for (int i = 0; i < 4; i++)
            join32(c->code + 64 * i, b->q + 32 * i);
        break;
    }
    case KERN_Q5_K: {
        kern_block_q5_k *b = block;
        memcpy(&b->d, &c->d, 4);
        scales_set(b->scales, c->sc, c->mn);
        for (int i = 0; i < 4; i++)
            join32(c->code + 64 * i, b->q + 32 * i);
        memset(b->high, 0, sizeof(b->high));
        for (int j = 0; j < 8; j++)
            for (int i = 0; i < 32; i++)
                b->high[i] |= (uint8_t)(c->code[32 * j + i] >> 4 << j);
        break;
    }
    case KERN_Q6_K: {
        kern_block_q6_k b;
        q6_to_file(c, &b);
        memcpy(block, &b, sizeof(b));
        break;
    }
    case KERN_GPTQ4: {
        kern_block_gptq4 *b = block;
        memcpy(&b->d, &c->d, 2);
        for (int i = 0; i < 64; i++)
            b->q[i] = (uint8_t)((c->code[2 * i] & 15) | (c->code[2 * i + 1] & 15) << 4);
        break;
    }
    default:
        assert(!"type without blocks");
    }
}

/* ---- panel <-> neutral ---- */

/* Where the parts of a block lie: halves (dmin 16 halves further on), and the body. */
typedef struct place {
    const uint8_t *halves, *body;
} place;

static place find_block(int type, int k, const uint8_t *panel, int b)
{
    int blocks = k / kern_type_block(type);
    size_t head = ((size_t)blocks * 32 + 63) & ~(size_t)63;
    switch (type) {
    case KERN_Q4_K:
        panel += (size_t)b * 2304;
        return (place){panel + 3 * VEC, panel};
    case KERN_Q5_K:
        panel += (size_t)b * 2816;
        return (place){panel + 3 * VEC, panel};
    case KERN_Q6_K:
        return (place){panel + 32 * b, panel + head + (size_t)b * 3328};
    case KERN_Q8_0:
        return (place){panel + 32 * b, panel + head + (size_t)b * 512};
    case KERN_Q4_0:
        return (place){panel + 32 * b, panel + head + (size_t)b * 256};
    case KERN_Q5_0:
        return (place){panel + 32 * b, panel + head + (size_t)b * 320};
    case KERN_GPTQ4:
        return (place){panel + 32 * b, panel + head + (size_t)b * 1024};
    default:
        assert(!"type without blocks");
        return (place){panel, panel};
    }
}

static void nibbles_get(const uint8_t *lane, int n32, uint8_t *code)
{
    for (int j = 0; j < n32; j++, lane += 4 * VEC, code += 32)
        for (int v = 0; v < 4; v++) {
            uint32_t w = load32(lane + v * VEC);
            store32(code + 4 * v, w & 0x0f0f0f0f);
            store32(code + 16 + 4 * v, w >> 4 & 0x0f0f0f0f);
        }
}

static void nibbles_set(uint8_t *lane, int n32, const uint8_t *code)
{
    for (int j = 0; j < n32; j++, lane += 4 * VEC, code += 32)
        for (int v = 0; v < 4; v++) {
            uint32_t low = load32(code + 4 * v) & 0x0f0f0f0f;
            uint32_t high = load32(code + 16 + 4 * v) & 0x0f0f0f0f;
            store32(lane + v * VEC, low | high << 4);
        }
}

/* The fifth bits of 32 weights in one vector, and back. */
static void bits_get(const uint8_t *lane, uint8_t *code)
{
    uint32_t w = load32(lane);
    for (int t = 0; t < 8; t++)
        store32(code + 4 * t, load32(code + 4 * t) | (w >> t & 0x01010101) << 4);
}

static void bits_set(uint8_t *lane, const uint8_t *code)
{
    uint32_t w = 0;
    for (int t = 0; t < 8; t++)
        w |= (load32(code + 4 * t) >> 4 & 0x01010101) << t;
    store32(lane, w);
}

/* Upper two bits of 16 weights. */
static void pairs_get(const uint8_t *lane, uint8_t *code)
{
    uint32_t w = load32(lane);
    for (int s = 0; s < 4; s++)
        store32(code + 4 * s, load32(code + 4 * s) | (w >> 2 * s & 0x03030303) << 4);
}

static void pairs_set(uint8_t *lane, const uint8_t *code)
{
    uint32_t w = 0;
    for (int s = 0; s < 4; s++)
        w |= (load32(code + 4 * s) >> 4 & 0x03030303) << 2 * s;
    store32(lane, w);
}

static void kscales_get(const uint8_t *lane, kern_colblock *c)
{
    for (int b = 0; b < 4; b++) {
        uint8_t s0 = lane[b], s1 = lane[VEC + b], s2 = lane[2 * VEC + b];
        c->sc[b] = (uint8_t)((s0 & 15) | (s2 & 3) << 4);
        c->sc[4 + b] = (uint8_t)(s0 >> 4 | (s2 >> 2 & 3) << 4);
        c->mn[b] = (uint8_t)((s1 & 15) | (s2 >> 4 & 3) << 4);
        c->mn[4 + b] = (uint8_t)(s1 >> 4 | s2 >> 6 << 4);
    }
}

static void kscales_set(uint8_t *lane, const kern_colblock *c)
{
    for (int b = 0; b < 4; b++) {
        uint8_t s0 = c->sc[b], s4 = c->sc[4 + b], m0 = c->mn[b], m4 = c->mn[4 + b];
        lane[b] = (uint8_t)((s0 & 15) | (s4 & 15) << 4);
        lane[VEC + b] = (uint8_t)((m0 & 15) | (m4 & 15) << 4);
        lane[2 * VEC + b] = (uint8_t)(s0 >> 4 | s4 >> 4 << 2 | m0 >> 4 << 4 | m4 >> 4 << 6);
    }
}

void kern_colblock_from_panel(int type, int k, const uint8_t *panel, int b, int n, kern_colblock *c)
{
    place at = find_block(type, k, panel, b);
    const uint8_t *lane = at.body + 4 * n;
    c->d = load16(at.halves + 2 * n);
    switch (type) {
    case KERN_Q4_K:
    case KERN_Q5_K:
        c->dmin = load16(at.halves + 32 + 2 * n);
        kscales_get(lane, c);
        nibbles_get(lane + (type == KERN_Q4_K ? 4 : 12) * VEC, 8, c->code);
        for (int j = 0; type == KERN_Q5_K && j < 8; j++)
            bits_get(lane + (4 + j) * VEC, c->code + 32 * j);
        break;
    case KERN_Q6_K:
        for (int g = 0; g < 4; g++)
            memcpy(c->sc + 4 * g, lane + g * VEC, 4);
        nibbles_get(lane + 20 * VEC, 8, c->code);
        for (int u = 0; u < 16; u++)
            pairs_get(lane + (4 + u) * VEC, c->code + 16 * u);
        break;
    case KERN_Q8_0:
        for (int t = 0; t < 8; t++)
            memcpy(c->code + 4 * t, lane + t * VEC, 4);
        break;
    case KERN_Q4_0:
        nibbles_get(lane, 1, c->code);
        break;
    case KERN_Q5_0:
        nibbles_get(lane + VEC, 1, c->code);
        bits_get(lane, c->code);
        break;
    case KERN_GPTQ4:
        nibbles_get(lane, 4, c->code);
        break;
    }
}

void kern_colblock_to_panel(int type, int k, uint8_t *panel, int b, int n, const kern_colblock *c)
{
    place at = find_block(type, k, panel, b);
    uint8_t *halves = panel + (at.halves - panel), *lane = panel + (at.body - panel) + 4 * n;
    store16(halves + 2 * n, c->d);
    switch (type) {
    case KERN_Q4_K:
    case KERN_Q5_K:
        store16(halves + 32 + 2 * n, c->dmin);
        kscales_set(lane, c);
        nibbles_set(lane + (type == KERN_Q4_K ? 4 : 12) * VEC, 8, c->code);
        for (int j = 0; type == KERN_Q5_K && j < 8; j++)
            bits_set(lane + (4 + j) * VEC, c->code + 32 * j);
        break;
    case KERN_Q6_K:
        for (int g = 0; g < 4; g++)
            memcpy(lane + g * VEC, c->sc + 4 * g, 4);
        nibbles_set(lane + 20 * VEC, 8, c->code);
        for (int u = 0; u < 16; u++)
            pairs_set(lane + (4 + u) * VEC, c->code + 16 * u);
        break;
    case KERN_Q8_0:
        for (int t = 0; t < 8; t++)
            memcpy(lane + t * VEC, c->code + 4 * t, 4);
        break;
    case KERN_Q4_0:
        nibbles_set(lane, 1, c->code);
        break;
    case KERN_Q5_0:
        nibbles_set(lane + VEC, 1, c->code);
        bits_set(lane, c->code);
        break;
    case KERN_GPTQ4:
        nibbles_set(lane, 4, c->code);
        break;
    }
}

/* ---- whole matrices ---- */

/* Byte offset of weight (n, k) of a float type in its panel. */
static size_t float_at(int type, int n, int k)
{
    if (type == KERN_F32) return ((size_t)k * 16 + (size_t)n) * 4;
    if (type == KERN_F16) return ((size_t)k * 16 + (size_t)n) * 2;
    return (((size_t)(k / 2) * 16 + (size_t)n) * 2 + (size_t)(k % 2)) * 2;
}

static void pack_panel(int type, int cols, int k, const uint8_t *src, uint8_t *dst)
{
    size_t row = kern_type_row_bytes(type, k);
    int block = kern_type_block(type), bytes = kern_type_block_bytes(type);
    memset(dst, 0, kern_panel_bytes(type, k));
    if (block == 1) {
        for (int i = 0; i < k; i++)
            for (int n = 0; n < cols; n++)
                memcpy(dst + float_at(type, n, i), src + (size_t)n * row + (size_t)(i * bytes),
                       (size_t)bytes);
        return;
    }
    kern_colblock c;
    for (int b = 0; b < k / block; b++)
        for (int n = 0; n < cols; n++) {
            kern_colblock_from_file(type, src + (size_t)n * row + (size_t)b * (size_t)bytes, &c);
            kern_colblock_to_panel(type, k, dst, b, n, &c);
        }
}

void kern_pack(int type, int n, int k, const void *src, void *dst)
{
    size_t row = kern_type_row_bytes(type, k), panel = kern_panel_bytes(type, k);
    assert(row > 0);
    for (int at = 0; at < n; at += KERN_PANEL) {
        int cols = n - at < KERN_PANEL ? n - at : KERN_PANEL;
        pack_panel(type, cols, k, (const uint8_t *)src + (size_t)at * row,
                   (uint8_t *)dst + (size_t)(at / KERN_PANEL) * panel);
    }
}

static void unpack_panel(int type, int cols, int k, const uint8_t *src, uint8_t *dst)
{
    size_t row = kern_type_row_bytes(type, k);
    int block = kern_type_block(type), bytes = kern_type_block_bytes(type);
    if (block == 1) {
        for (int i = 0; i < k; i++)
            for (int n = 0; n < cols; n++)
                memcpy(dst + (size_t)n * row + (size_t)(i * bytes), src + float_at(type, n, i),
                       (size_t)bytes);
        return;
    }
    kern_colblock c;
    for (int b = 0; b < k / block; b++)
        for (int n = 0; n < cols; n++) {
            kern_colblock_from_panel(type, k, src, b, n, &c);
            kern_colblock_to_file(type, &c, dst + (size_t)n * row + (size_t)b * (size_t)bytes);
        }
}

void kern_unpack(int type, int n, int k, const void *packed, void *dst)
{
    size_t row = kern_type_row_bytes(type, k), panel = kern_panel_bytes(type, k);
    assert(row > 0);
    for (int at = 0; at < n; at += KERN_PANEL) {
        int cols = n - at < KERN_PANEL ? n - at : KERN_PANEL;
        unpack_panel(type, cols, k, (const uint8_t *)packed + (size_t)(at / KERN_PANEL) * panel,
                     (uint8_t *)dst + (size_t)at * row);
    }
}

/* ---- to floats ---- */

static void dequant_block(int type, const kern_colblock *c, float *dst, int block)
{
    float d = kern_half_to_float(c->d);
    int zero = kern_code_zero(type);
    if (type == KERN_Q4_K || type == KERN_Q5_K) {
        float dmin = kern_half_to_float(c->dmin);
        for (int j = 0; j < 8; j++) {
            float scale = d * (float)c->sc[j], min = dmin * (float)c->mn[j];
            for (int i = 32 * j; i < 32 * j + 32; i++)
                dst[i] = scale * (float)c->code[i] - min;
        }
        return;
    }
    for (int i = 0; i < block; i++) {
        float scale = type == KERN_Q6_K ? d * (float)(int8_t)c->sc[i / 16] : d;
        dst[i] = scale * (float)(c->code[i] - zero);
    }
}

void kern_dequant_row(int type, const void *src, float *dst, int k)
{
    const uint8_t *p = src;
    if (type == KERN_F32) {
        memcpy(dst, src, (size_t)k * 4);
    } else if (type == KERN_F16) {
        for (int i = 0; i < k; i++)
            dst[i] = kern_half_to_float(load16(p + 2 * (size_t)i));
    } else if (type == KERN_BF16) {
        for (int i = 0; i < k; i++)
            dst[i] = kern_bf16_to_float(load16(p + 2 * (size_t)i));
    } else {
        int block = kern_type_block(type), bytes = kern_type_block_bytes(type);
        kern_colblock c;
        for (int b = 0; b < k / block; b++, p += bytes) {
            kern_colblock_from_file(type, p, &c);
            dequant_block(type, &c, dst + (size_t)b * (size_t)block, block);
        }
    }
}
