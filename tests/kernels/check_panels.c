/*
 * Packing and panel functions: pack and unpack give the file's bytes back; expansion to floats
 * agrees with an independent reading of the formats; the scalar products agree with double
 * arithmetic within a bound; every other table equals scalar bit for bit, with nothing written
 * outside its outputs.
 */
#include "check.h"

#include <float.h>
#include <stdio.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void *get(size_t bytes)
{
    void *p = ep_alloc(bytes < 64 ? 64 : bytes);
    if (p == NULL) abort();
    return p;
}

static void fill_random(uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)(check_random() >> 32);
}

static void pack_round_trip(int type, int n, int k)
{
    size_t file = (size_t)n * kern_type_row_bytes(type, k), packed = kern_packed_bytes(type, n, k);
    uint8_t *src = get(file), *back = get(file), *dst = get(packed + 64);
    fill_random(src, file);
    memset(back, 0xaa, file);
    memset(dst, 0xaa, packed + 64);
    kern_pack(type, n, k, src, dst);
    for (int i = 0; i < 64; i++)
        if (dst[packed + (size_t)i] != 0xaa)
            check_fail("pack %s writes past its end", kern_type_name(type));
    kern_unpack(type, n, k, dst, back);
    if (memcmp(src, back, file) != 0)
        check_fail("unpack(pack) of %s n %d k %d", kern_type_name(type), n, k);
    /* The packed form may be larger than the file by the rounding of n and of a panel's head only.
     */
    size_t rounded = (size_t)((n + 15) / 16 * 16) * kern_type_row_bytes(type, k);
    size_t slack = (size_t)((n + 15) / 16) * (type == KERN_BF16 ? 31 * 32 : 64);
    if (packed < rounded || packed > rounded + slack)
        check_fail("packed size of %s n %d k %d: %zu for %zu", kern_type_name(type), n, k, packed,
                   rounded);
    ep_free(src);
    ep_free(back);
    ep_free(dst);
}

static void dequant_matches(int type, int mode, int k)
{
    uint8_t *row = get(kern_type_row_bytes(type, k));
    float *f = get((size_t)k * 4);
    check_file_rows(type, mode, 1, k, row);
    kern_dequant_row(type, row, f, k);
    for (int i = 0; i < k; i++) {
        double magnitude, want = check_weight(type, row, i, &magnitude);
        if (fabs(f[i] - want) > 2 * FLT_EPSILON * magnitude) {
            check_fail("dequant %s %s: weight %d is %g, expected %g", kern_type_name(type),
                       check_mode_names[mode], i, (double)f[i], want);
            break;
        }
    }
    ep_free(row);
    ep_free(f);
}

static int k_of(int type, int i)
{
    static const int k256[] = {256, 512, 2048}, k128[] = {128, 384, 2048}, k32[] = {32, 96, 768},
                     floats[] = {64, 48, 500}, bf16[] = {64, 48, 768};
    if (check_quick && i == 2) return 0;
    switch (kern_type_act(type)) {
    case KERN_ACT_Q8_256:
        return k256[i];
    case KERN_ACT_Q8_128:
        return k128[i];
    case KERN_ACT_Q8_32:
        return k32[i];
    case KERN_ACT_BF16:
        return bf16[i];
    default:
        return floats[i];
    }
}

void check_packing(void)
{
    static const int n_of[] = {16, 48, 7, 33};
    for (int t = 0; t < check_n_types; t++)
        for (int i = 0; i < 3; i++) {
            int type = check_types[t], k = k_of(type, i);
            if (k == 0) continue;
            for (int n = 0; n < 4; n++)
                pack_round_trip(type, n_of[n], k);
            for (int mode = 0; mode < N_MODES; mode++)
                dequant_matches(type, mode, k);
        }
    /* Shapes that are no multiple of a block and types nobody knows have no size. */
    if (kern_type_row_bytes(KERN_Q4_K, 300) != 0 || kern_panel_bytes(KERN_Q4_0, 33) != 0 ||
        kern_type_row_bytes(17, 256) != 0 || kern_type_is_served(KERN_MXFP4) ||
        kern_type_name(17) != NULL || kern_type_is_served(-1))
        check_fail("sizes of unserved types or shapes");
}

static kern_panel_fn entry(const kern_gemm *g, int type)
{
    switch (type) {
    case KERN_F32:
        return g->f32;
    case KERN_F16:
        return g->f16;
    case KERN_BF16:
        return g->bf16;
    case KERN_Q4_0:
        return g->q4_0;
    case KERN_Q5_0:
        return g->q5_0;
    case KERN_Q8_0:
        return g->q8_0;
    case KERN_Q4_K:
        return g->q4_k;
    case KERN_Q5_K:
        return g->q5_k;
    case KERN_Q6_K:
        return g->q6_k;
    default:
        return g->gptq4;
    }
}

/* Scalar against double. Each block costs a handful of roundings of partial sums. */
static void bound(int type, int mode, int k)
{
    enum { M = 2 };
    size_t row = kern_type_row_bytes(type, k);
    uint8_t *file = get(16 * row), *panel = get(kern_panel_bytes(type, k));
    check_rows x;
    float y[M * 16];
    check_file_rows(type, mode, 16, k, file);
    kern_pack(type, 16, k, file, panel);
    check_rows_make(&x, kern_type_act(type), mode, M, k);
    entry(&kern_gemm_scalar, type)(y, 16, panel, &x.view);
    double steps = 8 + (double)k / kern_act_block(x.view.act);
    for (int r = 0; r < M; r++)
        for (int n = 0; n < 16; n++) {
            double want = 0, sum = 0, magnitude;
            for (int i = 0; i < k; i++) {
                double w = check_weight(type, file + (size_t)n * row, i, &magnitude);
                double v = check_rows_value(&x.view, r, i);
                want += w * v;
                sum += magnitude * fabs(v);
            }
            /* bf16 drops each denormal step: less than 2^-126 apiece, and inputs of that size */
            double tiny = type == KERN_BF16 ? 0x1p-126 * k * 4 : 0x1p-149 * k;
            if (!(fabs(y[r * 16 + n] - want) <= steps * FLT_EPSILON * sum + tiny))
                check_fail("scalar %s %s k %d: %g, expected %g", kern_type_name(type),
                           check_mode_names[mode], k, (double)y[r * 16 + n], want);
        }
    check_rows_free(&x);
    ep_free(file);
    ep_free(panel);
}

void check_scalar_bounds(void)
{
    for (int t = 0; t < check_n_types; t++)
        for (int i = 0; i < 3; i++)
            for (int mode = 0; mode < N_MODES; mode++)
                if (k_of(check_types[t], i) > 0)
                    bound(check_types[t], mode, k_of(check_types[t], i));
}

/* Row counts of the full check: all up to 33, then around those where tiles, chunks of tiles and
 * their number change. */
static bool is_checked(int m)
{
    if (check_quick) return m <= 5 || m == 8 || m == 16 || m == 17 || m == 33;
    return m <= 33 || (m >= 47 && m <= 49) || (m >= 63 && m <= 65) || m == 100;
}

/* One table against scalar. */
static void equal(const char *level, kern_panel_fn fn, int type, int w_mode, int x_mode, int k)
{
    enum { M = 100 };
    static float want[M * 19 + 64], got[M * 19 + 64];
    uint8_t *file = get(16 * kern_type_row_bytes(type, k)), *panel = get(kern_panel_bytes(type, k));
    check_file_rows(type, w_mode, 16, k, file);
    kern_pack(type, 16, k, file, panel);
    check_rows x;
    check_rows_make(&x, kern_type_act(type), x_mode, check_quick ? 33 : M, k);
    int most = x.view.m;
    for (int i = 0; i < M * 19 + 64; i++)
        want[i] = 12345.0f;
    entry(&kern_gemm_scalar, type)(want, 19, panel, &x.view);
    for (int m = 1; m <= most; m++) {
        if (!is_checked(m)) continue;
        for (int i = 0; i < M * 19 + 64; i++)
            got[i] = 12345.0f;
        kern_rows view = x.view;
        view.m = m;
        fn(got, 19, panel, &view);
        for (int i = 0; i < M * 19 + 64; i++) {
            float expect = i < m * 19 ? want[i] : 12345.0f;
            if (memcmp(&got[i], &expect, 4) == 0) continue;
            check_fail("%s %s weights %s rows %s k %d m %d: row %d col %d is %a, scalar %a", level,
                       kern_type_name(type), check_mode_names[w_mode], check_mode_names[x_mode], k,
                       m, i / 19, i % 19, (double)got[i], (double)expect);
            break;
        }
    }
    check_rows_free(&x);
    ep_free(file);
    ep_free(panel);
}

/* 2^-126 - 1.5 * 2^-151 lies below the normal range but would be lifted to 2^-126 by rounding at
 * the denormal spacing: it counts as denormal, and so as zero. */
static void bf16_edge(const char *level, kern_panel_fn fn)
{
    enum { K = 32, TWO_M63 = 64 << 7, TWO_M75_AND_HALF = 52 << 7 | 64, TWO_M76 = 51 << 7 };
    static uint16_t file[16 * K], x[K + 32];
    static _Alignas(64) uint8_t panel[K * 32];
    float y[16];
    x[0] = TWO_M63;
    x[2] = TWO_M75_AND_HALF;
    for (int n = 0; n < 16; n++) {
        file[n * K] = TWO_M63;
        file[n * K + 2] = n % 2 ? TWO_M76 | 0x8000 : 0;
    }
    kern_pack(KERN_BF16, 16, K, file, panel);
    kern_rows rows = {.act = KERN_ACT_BF16, .m = 1, .k = K, .h = x, .ldh = K};
    fn(y, 16, panel, &rows);
    for (int n = 0; n < 16; n++)
        if (y[n] != (n % 2 ? 0.0f : 0x1p-126f))
            check_fail("%s BF16 at the edge of the normal range: %a", level, (double)y[n]);
}

/* All shapes and modes of one routine. */
static void equal_all(const char *level, kern_panel_fn fn, int type)
{
    const bool few = check_quick || check_emulated;
    for (int i = 0; i < 3; i++)
        for (int w = 0; w < N_MODES; w++)
            for (int x = 0; x < N_MODES; x++)
                if (k_of(type, i) > 0 && (!few || w == x || x == MODE_RANDOM))
                    equal(level, fn, type, w, x, k_of(type, i));
}

void check_panels(const char *level)
{
    bf16_edge(level, kern_gemm_now.bf16);
    for (int t = 0; t < check_n_types; t++) {
        int type = check_types[t];
        kern_panel_fn fn = entry(&kern_gemm_now, type);
        if (fn == entry(&kern_gemm_scalar, type) && strcmp(level, "scalar") != 0)
            printf("  %s of %s is scalar's\n", kern_type_name(type), level);
        equal_all(level, fn, type);
    }
}

/* The tile routines by themselves, also for the few rows that the level leaves to AVX-512. */
void check_tiles(void)
{
#ifdef __x86_64__
    bf16_edge("tiles", kern_gemm_tiles.bf16);
    for (int t = 0; t < check_n_types; t++) {
        kern_panel_fn fn = entry(&kern_gemm_tiles, check_types[t]);
        if (fn != NULL) equal_all("tiles", fn, check_types[t]);
    }
#endif
}
