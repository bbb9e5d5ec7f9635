/*
 * check_vec: proves the vector functions. Each instruction set against the specification, bit for
 * bit (the bits of a NaN are free), on every length up to 80 and typical ones, on random and
 * adversarial values, with guard words around everything that is written. The specification itself
 * is held against double precision, with the bounds written beside each check.
 *
 * check_vec [--isa LEVEL] [--quick]: without --isa all levels that the machine has; a level that it
 * lacks is skipped aloud, and asking for one by name ends with 77. --quick is for emulated
 * machines.
 */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "kernels/cpu/ops.h"

enum { MAX_N = 4608, GUARD = 32, GUARD_WORD = 0x5a5a5a5a };

static const uint64_t seed = 20261120;
static uint64_t state;
static int failures;
static bool is_quick;

static void fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

static void fail(const char *fmt, ...)
{
    if (++failures > 20) return;
    va_list args;
    va_start(args, fmt);
    printf("FAILED: ");
    vprintf(fmt, args);
    printf("\n");
    va_end(args);
}

/* ---- values ---- */

static uint32_t next_random(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static float uniform(float low, float high)
{
    return low + (high - low) * (float)(next_random() >> 8) * 0x1p-24f;
}

enum { MODE_UNIFORM, MODE_WIDE, MODE_EDGES, MODE_TINY, MODE_POISON, N_MODES };
static const char *const mode_names[N_MODES] = {"uniform", "wide", "edges", "tiny", "poison"};

static float value(int mode)
{
    static const uint32_t edges[] = {0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007fffff,
                                     0x807fffff, 0x00800000, 0x80800000, 0x7f7fffff, 0xff7fffff,
                                     0x3f800000, 0xbf800000, 0x42b00000, 0xc2ae999a, 0x3f7fffff,
                                     0x4b400000, 0x33800000, 0x3f808000, 0x3f818000, 0x7f7f8000};
    uint32_t r = next_random();
    switch (mode) {
    case MODE_WIDE: /* any finite exponent up to 2^40 or down to 2^-40 */
        return float_of((r & 0x807fffffu) | (87u + next_random() % 80u) << 23);
    case MODE_EDGES:
        return float_of(edges[r % (sizeof edges / sizeof edges[0])]);
    case MODE_TINY:
        return float_of(r & 0x80ffffffu);
    case MODE_POISON:
        if (r % 50 == 0) return float_of(r & 0x100 ? 0x7fc00001u : 0xff800000u);
        return uniform(-90.0f, 90.0f);
    default:
        return uniform(-4.0f, 4.0f);
    }
}

static void fill(float *x, int mode, int n)
{
    for (int i = 0; i < n; i++)
        x[i] = value(mode);
}

/* ---- comparing ---- */

static float in_a[MAX_N], in_b[MAX_N], start[MAX_N];
static union guarded {
    float f[MAX_N + 2 * GUARD];
    uint32_t u[MAX_N + 2 * GUARD];
    uint16_t h[2 * (MAX_N + 2 * GUARD)];
    int8_t q[4 * (MAX_N + 2 * GUARD)];
} want, got;

static void guard(union guarded *g)
{
    for (int i = 0; i < MAX_N + 2 * GUARD; i++)
        g->u[i] = GUARD_WORD;
}

static bool is_same(uint32_t a, uint32_t b)
{
    if (a == b) return true;
    return isnan(float_of(a)) && isnan(float_of(b));
}

/* The whole buffers, guards included: `what` over n elements. */
static void compare(const char *level, const char *what, int mode, int n)
{
    for (int i = 0; i < MAX_N + 2 * GUARD; i++) {
        if (is_same(want.u[i], got.u[i])) continue;
        fail("%s %s, %s, n %d: word %d is %08x, specified %08x", level, what, mode_names[mode], n,
             i - GUARD, got.u[i], want.u[i]);
        return;
    }
}

/* Starts both outputs from `start`, between guards. */
static void begin(int n)
{
    guard(&want);
    guard(&got);
    memcpy(want.f + GUARD, start, (size_t)n * sizeof(float));
    memcpy(got.f + GUARD, start, (size_t)n * sizeof(float));
}

static void check_elements(const char *level, const kern_vec *v, int mode, int n)
{
    const kern_vec *s = &kern_vec_scalar;
    float *w = want.f + GUARD, *g = got.f + GUARD;
    fill(in_a, mode, n);
    fill(in_b, mode, n);
    fill(start, mode, n);

    begin(n);
    s->rms_norm(w, in_a, in_b, n, 1e-6f);
    v->rms_norm(g, in_a, in_b, n, 1e-6f);
    compare(level, "rms_norm", mode, n);
    begin(n);
    s->rms_norm(w, w, in_b, n, 1e-5f);
    v->rms_norm(g, g, in_b, n, 1e-5f);
    compare(level, "rms_norm in place", mode, n);
    begin(n);
    s->axpy(w, in_a, 0.37f, n);
    v->axpy(g, in_a, 0.37f, n);
    compare(level, "axpy", mode, n);
    begin(n);
    s->add(w, in_a, n);
    v->add(g, in_a, n);
    compare(level, "add", mode, n);
    begin(n);
    s->silu_mul(w, in_a, in_b, n);
    v->silu_mul(g, in_a, in_b, n);
    compare(level, "silu_mul", mode, n);
    begin(n);
    s->silu_mul(w, w, in_b, n);
    v->silu_mul(g, g, in_b, n);
    compare(level, "silu_mul in place", mode, n);
    float a = s->dot(in_a, in_b, n), b = v->dot(in_a, in_b, n);
    if (!is_same(bits_of(a), bits_of(b)))
        fail("%s dot, %s, n %d: %a, specified %a", level, mode_names[mode], n, (double)b,
             (double)a);
    begin(n);
    bool a_ok = s->softmax(w, n), b_ok = v->softmax(g, n);
    if (a_ok != b_ok) fail("%s softmax, %s, n %d: says %d", level, mode_names[mode], n, b_ok);
    if (a_ok) compare(level, "softmax", mode, n);
    begin(n);
    s->exp_sub(w, in_a, 0.75f, n);
    v->exp_sub(g, in_a, 0.75f, n);
    compare(level, "exp_sub", mode, n);
    if (n % 2 == 0) {
        begin(n);
        s->rope(w, in_b, n);
        v->rope(g, in_b, n);
        compare(level, "rope", mode, n);
    }
    guard(&want);
    guard(&got);
    s->act_bf16(want.h + 2 * GUARD, in_a, n);
    v->act_bf16(got.h + 2 * GUARD, in_a, n);
    if (memcmp(&want, &got, sizeof want) != 0)
        fail("%s act_bf16, %s, n %d", level, mode_names[mode], n);
}

static void check_quantise(const char *level, const kern_vec *v, int mode, int k, int block)
{
    static float scale_w[MAX_N / 32 + GUARD], scale_g[MAX_N / 32 + GUARD];
    static int16_t sums_w[MAX_N / 8 + GUARD], sums_g[MAX_N / 8 + GUARD];
    fill(in_a, mode, k);
    for (int i = 0; i < block && mode == MODE_EDGES; i++)
        in_a[i] = 0.0f;
    guard(&want);
    guard(&got);
    memset(scale_w, 0x5a, sizeof scale_w);
    memset(scale_g, 0x5a, sizeof scale_g);
    kern_vec_scalar.act_q8(want.q + 4 * GUARD, scale_w, in_a, k, block);
    v->act_q8(got.q + 4 * GUARD, scale_g, in_a, k, block);
    if (memcmp(&want, &got, sizeof want) != 0)
        fail("%s act_q8, %s, k %d, block %d: values", level, mode_names[mode], k, block);
    for (int i = 0; i < MAX_N / 32 + GUARD; i++)
        if (!is_same(bits_of(scale_w[i]), bits_of(scale_g[i])))
            fail("%s act_q8, %s, k %d, block %d: scale %d", level, mode_names[mode], k, block, i);

    memset(sums_w, 0x5a, sizeof sums_w);
    memset(sums_g, 0x5a, sizeof sums_g);
    kern_vec_scalar.act_sums(sums_w, sums_w + k / 16 + 4, want.q + 4 * GUARD, k);
    v->act_sums(sums_g, sums_g + k / 16 + 4, want.q + 4 * GUARD, k);
    if (memcmp(sums_w, sums_g, sizeof sums_w) != 0)
        fail("%s act_sums, %s, k %d", level, mode_names[mode], k);
}

/* ---- attention ---- */

enum { PAGE_TOKENS = 5, MAX_POS = 133, MAX_DIM = 272 };

/* A cache of pages out of order, positions further apart than they are long. */
typedef struct cache {
    float *memory;
    float *pages[MAX_POS / PAGE_TOKENS + 1];
    kern_attn_args args;
    float q[MAX_DIM];
} cache;

static bool cache_open(cache *c, int mode, int n_pos, int dim)
{
    size_t stride = 2 * (size_t)dim + 7, page = PAGE_TOKENS * stride;
    size_t n_pages = (size_t)(n_pos + PAGE_TOKENS - 1) / PAGE_TOKENS;
    c->memory = ep_alloc((n_pages * page + 1) * sizeof(float));
    if (c->memory == NULL) return false;
    for (size_t i = 0; i < n_pages * page; i++)
        c->memory[i] = value(mode);
    for (size_t i = 0; i < n_pages; i++)
        c->pages[i] = c->memory + (n_pages - 1 - i) * page;
    fill(c->q, mode, dim);
    c->args = (kern_attn_args){.q = c->q,
                               .pages = c->pages,
                               .page_tokens = PAGE_TOKENS,
                               .n_pos = n_pos,
                               .dim = dim,
                               .stride = stride,
                               .k_off = 3,
                               .v_off = (size_t)dim + 5,
                               .scale = 0.088f};
    return true;
}

static void check_attention(const char *level, const kern_vec *v, int mode, int n_pos, int dim)
{
    static float scores_w[MAX_POS + GUARD], scores_g[MAX_POS + GUARD];
    cache c;
    if (!cache_open(&c, mode, n_pos, dim)) {
        fail("no memory");
        return;
    }
    guard(&want);
    guard(&got);
    memset(scores_w, 0x5a, sizeof scores_w);
    memset(scores_g, 0x5a, sizeof scores_g);
    kern_vec_scalar.attn_head(want.f + GUARD, &c.args, scores_w);
    v->attn_head(got.f + GUARD, &c.args, scores_g);
    char what[64];
    snprintf(what, sizeof what, "attention of dim %d", dim);
    compare(level, what, mode, n_pos);
    if (memcmp(scores_w + n_pos, scores_g + n_pos, GUARD * sizeof(float)) != 0)
        fail("%s %s: writes past the scores", level, what);
    ep_free(c.memory);
}

/* Heads together have the bits of each alone, with a poisoned one among them too. */
static void check_heads(const char *level, const kern_vec *v, int mode, int n_pos, int dim, int n)
{
    enum { MAX_HEADS = 9, MAX_SCORES = MAX_HEADS * (MAX_POS + 15) };
    static float q[MAX_HEADS * MAX_DIM], out[MAX_HEADS * MAX_DIM + GUARD];
    static float scores[MAX_SCORES + GUARD], end[GUARD];
    cache c;
    if (!cache_open(&c, mode, n_pos, dim)) {
        fail("no memory");
        return;
    }
    fill(q, mode, n * dim);
    if (n > 2) q[dim + dim / 2] = NAN;
    memset(end, 0x5a, sizeof end);
    size_t n_scores = (size_t)n * kern_attn_scores(n_pos);
    memcpy(scores + n_scores, end, sizeof end);
    memcpy(out + n * dim, end, sizeof end);
    c.args.q = q;
    v->attn_heads(out, &c.args, n, scores);
    char what[64];
    snprintf(what, sizeof what, "head of %d, dim %d", n, dim);
    if (memcmp(scores + n_scores, end, sizeof end) != 0 ||
        memcmp(out + n * dim, end, sizeof end) != 0)
        fail("%s %s: writes past the end", level, what);
    for (int h = 0; h < n; h++) {
        static float alone[MAX_POS];
        guard(&want);
        guard(&got);
        c.args.q = q + h * dim;
        kern_vec_scalar.attn_head(want.f + GUARD, &c.args, alone);
        memcpy(got.f + GUARD, out + h * dim, (size_t)dim * sizeof(float));
        compare(level, what, mode, n_pos);
    }
    ep_free(c.memory);
}

/* ---- a level ---- */

static void check_level(const char *level)
{
    ep_err err;
    if (kern_select(level, &err) != EP_OK) {
        fail("kern_select(\"%s\"): %s", level, err.text);
        return;
    }
    if (strcmp(kern_level(), level) != 0) fail("%s was chosen, not %s", kern_level(), level);
    static const int sizes[] = {128, 255, 256, 768, 2048, 4096, 4103};
    static const int blocks[] = {32, 128, 256};
    static const int dims[] = {8, 16, 40, 64, 80, 96, 128, 192, 200, 256, 272};
    static const int counts[] = {1, 2, 4, 5, 15, 16, 17, 31, 33, 64, MAX_POS};
    int n_sizes = is_quick ? 4 : (int)(sizeof sizes / sizeof sizes[0]);
    int n_dims = (int)(sizeof dims / sizeof dims[0]), n_blocks = 3;
    int n_counts = (int)(sizeof counts / sizeof counts[0]);
    const kern_vec *v = &kern_vec_now;
    int before = failures;
    state = seed;
    for (int mode = 0; mode < N_MODES; mode++) {
        for (int n = 1; n <= 80; n++)
            check_elements(level, v, mode, n);
        for (int i = 0; i < n_sizes; i++)
            check_elements(level, v, mode, sizes[i]);
        for (int i = 0; i < n_blocks; i++)
            for (int n = 1; n <= (is_quick ? 4 : 12); n++)
                check_quantise(level, v, mode, n * blocks[i], blocks[i]);
        for (int i = 0; i < n_dims; i++)
            for (int j = 0; j < n_counts; j += is_quick ? 3 : 1)
                check_attention(level, v, mode, counts[j], dims[i]);
        for (int i = 0; i < n_dims && v->attn_heads != NULL; i += is_quick ? 2 : 1)
            for (int j = 0; j < n_counts; j += 3)
                for (int n = 1; n <= 9; n += 3 + n % 2)
                    check_heads(level, v, mode, counts[j], dims[i], n);
    }
    if (failures == before) printf("%-8s agrees with the specification (%s)\n", level, v->name);
}

/* ---- the specification against double precision ---- */

static void check_exp(void)
{
    double worst = 0;
    uint32_t step = is_quick ? 9973 : 97; /* over all floats between -87.3 and 88 */
    for (uint32_t u = 0; u < 0x42b00000u; u += step) {
        for (int sign = 0; sign < 2; sign++) {
            float x = float_of(u | (uint32_t)sign << 31);
            if (x < -87.3f) continue;
            double want_value = exp((double)x);
            double error = fabs((double)kern_exp(x) / want_value - 1.0);
            if (error > worst) worst = error;
        }
    }
    if (worst > 1.2e-7) fail("exp: relative error %.3g", worst);
    printf("exp      worst relative error %.3g (bound 1.2e-7)\n", worst);
    if (kern_exp(-87.4f) != 0.0f || kern_exp(-INFINITY) != 0.0f) fail("exp far below");
    if (!isinf(kern_exp(88.1f)) || !isinf(kern_exp(INFINITY))) fail("exp far above");
    if (!isnan(kern_exp(NAN))) fail("exp of NaN");
    if (kern_exp(0.0f) != 1.0f || kern_exp(-0.0f) != 1.0f) fail("exp(0)");
}

/* |got - want| <= bound * eps * size; the bound counts roundings. */
static void near(const char *what, int n, double g, double w, double size, double bound)
{
    if (!(fabs(g - w) <= bound * 0x1p-24 * size + 1e-40))
        fail("specification, %s, n %d: %.9g, double gives %.9g", what, n, g, w);
}

static void check_sums(int n)
{
    const kern_vec *s = &kern_vec_scalar;
    double lanes = n / 16 + 6; /* additions in a row */
    double sum = 0, size = 0, squares = 0, all = 0, max = -INFINITY;
    fill(in_a, MODE_UNIFORM, n);
    fill(in_b, MODE_UNIFORM, n);
    for (int i = 0; i < n; i++) {
        double p = (double)in_a[i] * (double)in_b[i];
        sum += p;
        size += fabs(p);
        squares += (double)in_a[i] * (double)in_a[i];
        if ((double)in_a[i] > max) max = (double)in_a[i];
    }
    near("dot", n, (double)s->dot(in_a, in_b, n), sum, size, lanes);
    s->rms_norm(got.f, in_a, in_b, n, 1e-6f);
    double inv = 1.0 / sqrt(squares / n + 1e-6);
    for (int i = 0; i < n; i++) {
        double w = (double)in_a[i] * inv * (double)in_b[i];
        near("rms_norm", n, (double)got.f[i], w, fabs(w), lanes + 8);
    }
    for (int i = 0; i < n; i++)
        all += exp((double)in_a[i] - max);
    memcpy(got.f, in_a, (size_t)n * sizeof(float));
    if (!s->softmax(got.f, n)) fail("softmax refuses finite values");
    for (int i = 0; i < n; i++) {
        double w = exp((double)in_a[i] - max) / all;
        near("softmax", n, (double)got.f[i], w, w, lanes + 16); /* x - max rounds: 8 eps of 8 */
    }
    s->silu_mul(got.f, in_a, in_b, n);
    for (int i = 0; i < n; i++) {
        double a = (double)in_a[i], w = a / (1.0 + exp(-a)) * (double)in_b[i];
        near("silu_mul", n, (double)got.f[i], w, fabs(w), 8);
    }
    int half = n / 2;
    memcpy(got.f, in_a, (size_t)n * sizeof(float));
    s->rope(got.f, in_b, 2 * half);
    for (int i = 0; i < half; i++) {
        double a = (double)in_a[i], b = (double)in_a[i + half], c = (double)in_b[i],
               t = (double)in_b[i + half];
        near("rope", n, (double)got.f[i], a * c - b * t, fabs(a * c) + fabs(b * t), 2);
        near("rope", n, (double)got.f[i + half], a * t + b * c, fabs(a * t) + fabs(b * c), 2);
    }
}

static void check_forms(void)
{
    static const struct {
        uint32_t from;
        uint16_t to;
    } pairs[] = {{0x3f800000, 0x3f80}, {0x3f808000, 0x3f80}, {0x3f808001, 0x3f81},
                 {0x3f818000, 0x3f82}, {0x00000001, 0x0000}, {0x807fffff, 0x8000},
                 {0x00800000, 0x0080}, {0x7f7fffff, 0x7f80}, {0x7f800000, 0x7f80},
                 {0xff800000, 0xff80}, {0x7f800001, 0x7fc0}, {0x80000000, 0x8000}};
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        float x = float_of(pairs[i].from);
        uint16_t h;
        kern_vec_scalar.act_bf16(&h, &x, 1);
        if (h != pairs[i].to) fail("bf16 of %08x is %04x", pairs[i].from, h);
    }
    int8_t q[256];
    float scale;
    for (int round = 0; round < 50; round++) {
        fill(in_a, round % 2 ? MODE_UNIFORM : MODE_WIDE, 256);
        kern_vec_scalar.act_q8(q, &scale, in_a, 256, 256);
        for (int i = 0; i < 256; i++) /* half a step, and the rounding of scale and product */
            near("act_q8", i, (double)scale * q[i], (double)in_a[i], (double)scale,
                 0.5 * 0x1p24 + 512);
    }
    fill(in_a, MODE_UNIFORM, 256);
    in_a[77] = INFINITY;
    kern_vec_scalar.act_q8(q, &scale, in_a, 256, 256);
    if (!isnan(scale)) fail("an infinity is not seen in the scale");
}

/* Positions of a cache against the same sums in double. */
static void check_attention_sums(int n_pos, int dim)
{
    static float scores[MAX_POS];
    static double p[MAX_POS];
    cache c;
    if (!cache_open(&c, MODE_UNIFORM, n_pos, dim)) {
        fail("no memory");
        return;
    }
    double all = 0;
    for (int t = 0; t < n_pos; t++) {
        const float *at = c.pages[t / PAGE_TOKENS] + (size_t)(t % PAGE_TOKENS) * c.args.stride;
        double sum = 0;
        for (int i = 0; i < dim; i++)
            sum += (double)c.q[i] * (double)at[c.args.k_off + (size_t)i];
        p[t] = exp(sum * (double)c.args.scale);
        all += p[t];
    }
    kern_vec_scalar.attn_head(got.f, &c.args, scores);
    for (int i = 0; i < dim; i++) {
        double sum = 0, size = 0;
        for (int t = 0; t < n_pos; t++) {
            const float *at = c.pages[t / PAGE_TOKENS] + (size_t)(t % PAGE_TOKENS) * c.args.stride;
            double v = p[t] / all * (double)at[c.args.v_off + (size_t)i];
            sum += v;
            size += fabs(v);
        }
        near("attention", n_pos, (double)got.f[i], sum, size, n_pos + 64.0 * dim / 16);
    }
    ep_free(c.memory);
}

static void check_rows(void)
{
    uint8_t row[2 * 264];
    float x[256];
    kern_select("scalar", NULL);
    state = seed;
    fill(x, MODE_UNIFORM, 256);
    kern_act_rows(KERN_ACT_Q8_256, row, x, 0, 2, 256);
    size_t bytes = kern_act_row_bytes(KERN_ACT_Q8_256, 256);
    float scale;
    memcpy(&scale, row + 256, sizeof scale);
    if (bytes != 260 || memcmp(row, row + bytes, bytes) != 0) fail("rows of a stride of 0 differ");
    near("act_rows", 0, (double)scale * (int8_t)row[9], (double)x[9], (double)scale, 0.51 * 0x1p24);
}

int main(int argc, char **argv)
{
    static const char *const levels[] = {"scalar", "avx2", "avx512", "amx"};
    const char *only = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") == 0)
            is_quick = true;
        else if (strcmp(argv[i], "--isa") == 0 && i + 1 < argc)
            only = argv[++i];
        else {
            printf("usage: check_vec [--isa LEVEL] [--quick]\n");
            return 2;
        }
    }
    unsetenv("MOED_KERNELS"); /* the levels are chosen here */
    printf("seed %llu\n", (unsigned long long)seed);
    if (only != NULL && !kern_has_level(only)) {
        printf("skipped: this machine lacks %s\n", only);
        return 77;
    }
    state = seed;
    check_exp();
    for (int n = 1; n <= 80; n++)
        check_sums(n);
    check_sums(2048);
    check_forms();
    for (int n = 1; n < MAX_POS; n += 13)
        check_attention_sums(n, 128);
    for (size_t i = 0; i < sizeof levels / sizeof levels[0]; i++) {
        if (only != NULL && strcmp(levels[i], only) != 0) continue;
        if (kern_has_level(levels[i]))
            check_level(levels[i]);
        else
            printf("%-8s skipped: this machine lacks it\n", levels[i]);
    }
    check_rows();
    printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
