/*
 * gemm_avx2_many: the panel products for AVX2 where more rows meet a panel than fit in registers
 * at once. Blocks come first and rows second: 256 weights of all sixteen columns are unpacked into
 * a plane that stays in L1, and every row meets it there. So a block is unpacked once for all rows,
 * a broadcast of a row's bytes serves both halves of the columns, and memory is read at one pace
 * all through the panel, not all of it for the first rows. The float steps are gemm_avx2.c's, their
 * sums lie in y between blocks.
 */
#include "kernels/cpu/x256.h"

typedef struct plane {
    __m256i code[64][2];     /* unsigned codes, a k-group of four each, halves of the columns */
    __m256i sign[64][2];     /* Q8_0: the weights, whose sizes are the codes */
    __m256i scale[16][2];    /* words (s, s), one for 32 weights; Q6_K: for 16 */
    __m256i offset[8][2];    /* what meets pairs of the row's sums: mins, or scales times -32 */
    __m256 d[8][2], dmin[2]; /* d of each 32 weights, or of all */
} plane;

typedef struct job {
    float *y;
    size_t ldy;
    const kern_rows *a;
    int r, k;            /* first row of the group, first weight of the plane */
    const uint8_t *next; /* what to ask memory for, NULL: nothing */
} job;

/* ---- unpacking ---- */

INLINE __m256i shift(__m256i v, const int left)
{
    return left > 0 ? _mm256_slli_epi16(v, left) : left < 0 ? _mm256_srli_epi16(v, -left) : v;
}

/* Codes of 32 weights: nibbles, and above them `bits` bits of the vectors at `high`. */
INLINE void codes(__m256i (*code)[2], const uint8_t *nibbles, const uint8_t *high, const int bits)
{
    const __m256i low = _mm256_set1_epi8(15), top = _mm256_set1_epi8(bits == 1 ? 16 : 48);
    UNROLL
    for (int half = 0; half < 2; half++) {
        __m256i up[2] = {low, low};
        if (bits) up[0] = up[1] = load(high + 32 * half);
        if (bits == 2) up[1] = load(high + 64 + 32 * half);
        UNROLL
        for (int t = 0; t < 4; t++) {
            const __m256i w = load(nibbles + 64 * t + 32 * half);
            __m256i c[2] = {_mm256_and_si256(w, low), _mm256_and_si256(shift(w, -4), low)};
            UNROLL
            for (int u = 0; u < 2; u++) {
                const int left = bits == 1 ? 4 - t - 4 * u : 4 - 2 * t;
                if (bits) c[u] = _mm256_or_si256(c[u], _mm256_and_si256(shift(up[u], left), top));
                code[4 * u + t][half] = c[u];
            }
        }
    }
}

INLINE void unpack_k(plane *o, const uint8_t *p, const bool five)
{
    const uint8_t *high = p + HEAD_K, *nibbles = high + (five ? 512 : 0);
    UNROLL
    for (int half = 0; half < 2; half++) {
        head h;
        head_k(&h, p, half);
        UNROLL
        for (int c = 0; c < 8; c++)
            o->scale[c][half] = h.sc[c];
        UNROLL
        for (int c = 0; c < 4; c++)
            o->offset[c][half] = h.min[c];
        o->d[0][half] = h.d;
        o->dmin[half] = h.dmin;
    }
    for (int c = 0; c < 8; c++, nibbles += NIBBLES, high += 64) {
        codes(o->code + 8 * c, nibbles, high, five);
    }
}

INLINE void unpack_q6(plane *o, const uint8_t *p, const uint8_t *d)
{
    for (int g = 0; g < 8; g++) {
        const int half = g % 2;
        const __m256i scales = load(p + 32 * g), times = _mm256_set1_epi16(-32);
        UNROLL
        for (int n = 0; n < 4; n++)
            o->scale[g / 2 * 4 + n][half] = signed_pair(scales, n, n);
        UNROLL
        for (int n = 0; n < 2; n++)
            o->offset[g / 2 * 2 + n][half] =
                _mm256_mullo_epi16(signed_pair(scales, 2 * n, 2 * n + 1), times);
        o->d[0][half] = half8(d + 16 * half);
    }
    for (int c = 0; c < 8; c++) {
        const uint8_t *nibbles = p + 1280 + NIBBLES * c;
        codes(o->code + 8 * c, nibbles, p + 256 + 128 * c, 2);
    }
}

/* n times 32 weights */
INLINE void unpack_flat(plane *o, const uint8_t *p, const uint8_t *d, const int n, const int type)
{
    const int bytes = flat_bytes(type), parts = type == KERN_GPTQ4 ? 4 : 1;
    for (int c = 0; c < n; c++, p += bytes) {
        UNROLL
        for (int half = 0; half < 2; half++)
            o->d[c][half] = half8(d + 32 * (c / parts) + 16 * half);
        if (type != KERN_Q8_0) {
            codes(o->code + 8 * c, type == KERN_Q5_0 ? p + 64 : p, p, type == KERN_Q5_0);
            continue;
        }
        UNROLL
        for (int t = 0; t < 16; t++) {
            const __m256i w = _mm256_xor_si256(load(p + 32 * t), _mm256_set1_epi8((char)0x80));
            o->sign[8 * c + t / 2][t % 2] = w;
            o->code[8 * c + t / 2][t % 2] = _mm256_abs_epi8(w);
        }
    }
}

/* Bytes of 256 weights of sixteen columns. */
INLINE int bytes256(const int type)
{
    return type == KERN_Q4_K   ? BLOCK_Q4_K
           : type == KERN_Q5_K ? BLOCK_Q5_K
           : type == KERN_Q6_K ? BLOCK_Q6_K
                               : 8 * flat_bytes(type);
}

/* n times 32 weights from k on. Returns where the next ones lie. */
INLINE const uint8_t *unpack(plane *o, const uint8_t *panel, const kern_rows *a, int k, int n,
                             const int type)
{
    const bool is_k = type == KERN_Q4_K || type == KERN_Q5_K;
    const int block = type == KERN_Q6_K ? 256 : type == KERN_GPTQ4 ? 128 : 32;
    const uint8_t *d = panel + (size_t)(k / block) * 32;
    const uint8_t *p = panel + (is_k ? 0 : panel_head(a->k / block));
    p += (size_t)(k / 256) * (size_t)bytes256(type);
    if (is_k)
        unpack_k(o, p, type == KERN_Q5_K);
    else if (type == KERN_Q6_K)
        unpack_q6(o, p, d);
    else
        unpack_flat(o, p, d, n, type);
    return p + bytes256(type);
}

/* ---- rows ---- */

/* total += scale * (32 codes . x). Sums of 16 bits hold so many products as gemm_avx2.c says. */
INLINE void sum32(__m256i (*total)[2], const __m256i (*code)[2], const __m256i (*scale)[2],
                  const int8_t *const *x, const int type, const int rows)
{
    const int span = type == KERN_Q6_K ? 2 : type == KERN_Q5_K || type == KERN_Q5_0 ? 4 : 8;
    __m256i s[MAX_ROWS][2];
    UNROLL
    for (int t = 0; t < 8; t++) {
        UNROLL
        for (int i = 0; i < rows; i++) {
            const __m256i v = word4(x[i] + 4 * t);
            UNROLL
            for (int half = 0; half < 2; half++) {
                if (t % span == 0) s[i][half] = _mm256_setzero_si256();
                s[i][half] = _mm256_add_epi16(s[i][half], _mm256_maddubs_epi16(code[t][half], v));
                IN_ORDER(s[i][half]);
            }
        }
        if (t % span != span - 1) continue;
        UNROLL
        for (int i = 0; i < 2 * rows; i++) {
            const __m256i by = scale[type == KERN_Q6_K ? t / 4 : 0][i % 2];
            total[i / 2][i % 2] = madd_add(total[i / 2][i % 2], s[i / 2][i % 2], by);
        }
    }
}

/* Of Q8_0, where products of 16 bits cannot be added up. */
INLINE void sum32_q8(__m256i (*total)[2], const __m256i (*code)[2], const __m256i (*sign)[2],
                     const int8_t *const *x, const int rows)
{
    const __m256i ones = _mm256_set1_epi16(1);
    UNROLL
    for (int t = 0; t < 8; t++) {
        UNROLL
        for (int i = 0; i < rows; i++) {
            const __m256i v = word4(x[i] + 4 * t);
            UNROLL
            for (int half = 0; half < 2; half++)
                total[i][half] = madd_add(
                    total[i][half],
                    _mm256_maddubs_epi16(code[t][half], _mm256_sign_epi8(v, sign[t][half])), ones);
        }
    }
}

INLINE void add_step(const job *j, int i, const int half, float scale, __m256 v)
{
    float *at = j->y + (size_t)(j->r + i) * j->ldy + 8 * half;
    _mm256_storeu_ps(at, _mm256_fmadd_ps(_mm256_set1_ps(scale), v, _mm256_loadu_ps(at)));
}

INLINE float scale_of(const job *j, int i, int b)
{
    return j->a->scale[(size_t)(j->r + i) * j->a->lds + (size_t)b];
}

/* The rows' bytes from the plane's first weight on, and their sums of 32 (Q6_K: of 16) weights. */
INLINE void rows_at(const job *j, const int8_t **x, const int16_t **sums, const int type,
                    const int rows)
{
    const int16_t *all = type == KERN_Q6_K ? j->a->sum16 : j->a->sum32;
    UNROLL
    for (int i = 0; i < rows; i++) {
        const size_t r = (size_t)(j->r + i);
        x[i] = j->a->q + r * j->a->ldq + (size_t)j->k;
        sums[i] = all + r * j->a->ldsum + (size_t)j->k / (type == KERN_Q6_K ? 16 : 32);
    }
}

INLINE void clear(__m256i (*total)[2], const int rows)
{
    UNROLL
    for (int i = 0; i < rows; i++)
        total[i][0] = total[i][1] = _mm256_setzero_si256();
}

/* Lines of memory in a sixteenth of 256 weights, rounded up. */
INLINE int share(const int type)
{
    return (bytes256(type) / 64 + 15) / 16;
}

/* Asks for a share of the next 256 weights at each of the eight steps of the first two groups:
 * asked for all at once, while these are unpacked, they made the rows wait, and then memory idled.
 */
INLINE void fetch(const job *j, int step, const int type)
{
    if (j->next == NULL) return;
    UNROLL
    for (int i = 0; i < share(type); i++)
        _mm_prefetch((const char *)j->next + 64 * (share(type) * step + i), _MM_HINT_T0);
}

INLINE void meet_k(const job *j, const plane *o, const int type, const int rows)
{
    const int pairs = type == KERN_Q6_K ? 8 : 4, scales = type == KERN_Q6_K ? 2 : 1;
    const int8_t *x[MAX_ROWS];
    const int16_t *sums[MAX_ROWS];
    __m256i total[MAX_ROWS][2];
    rows_at(j, x, sums, type, rows);
    clear(total, rows);
    for (int c = 0; c < 8; c++) {
        fetch(j, c, type);
        sum32(total, o->code + 8 * c, o->scale + scales * c, x, type, rows);
        UNROLL
        for (int i = 0; i < rows; i++)
            x[i] += 32;
    }
    UNROLL
    for (int i = 0; i < rows; i++) {
        __m256i by[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        UNROLL
        for (int c = 0; c < 2 * pairs; c++)
            by[c % 2] = madd_add(by[c % 2], o->offset[c / 2][c % 2], word4(sums[i] + c / 2 * 2));
        UNROLL
        for (int half = 0; half < 2; half++) {
            __m256i sum = total[i][half];
            if (type == KERN_Q6_K) sum = _mm256_add_epi32(sum, by[half]);
            __m256 v = _mm256_cvtepi32_ps(sum);
            if (type == KERN_Q6_K)
                v = _mm256_mul_ps(o->d[0][half], v);
            else
                v = _mm256_fmsub_ps(o->d[0][half], v,
                                    _mm256_mul_ps(o->dmin[half], _mm256_cvtepi32_ps(by[half])));
            add_step(j, i, half, scale_of(j, i, j->k / 256), v);
        }
    }
}

INLINE void meet_flat(const job *j, const plane *o, const int n, const int type, const int rows)
{
    const int parts = type == KERN_GPTQ4 ? 4 : 1, zero = type == KERN_Q5_0 ? 16 : 8;
    const __m256i zeros = _mm256_set1_epi32(-zero & 0xffff), one = _mm256_set1_epi16(1);
    const __m256i ones[1][2] = {{one, one}};
    const int8_t *x[MAX_ROWS];
    const int16_t *sums[MAX_ROWS];
    __m256i total[MAX_ROWS][2];
    rows_at(j, x, sums, type, rows);
    clear(total, rows);
    for (int c = 0; c < n; c++) {
        fetch(j, c, type);
        if (type == KERN_Q8_0)
            sum32_q8(total, o->code + 8 * c, o->sign + 8 * c, x, rows);
        else
            sum32(total, o->code + 8 * c, ones, x, type, rows);
        UNROLL
        for (int i = 0; i < rows; i++) {
            x[i] += 32;
            if (type == KERN_Q8_0) continue;
            const __m256i by = _mm256_madd_epi16(word4(sums[i] + c), zeros);
            total[i][0] = _mm256_add_epi32(total[i][0], by);
            total[i][1] = _mm256_add_epi32(total[i][1], by);
        }
        if (c % parts != parts - 1) continue;
        UNROLL
        for (int i = 0; i < 2 * rows; i++)
            add_step(j, i / 2, i % 2, scale_of(j, i / 2, (j->k / 32 + c) / parts),
                     _mm256_mul_ps(o->d[c][i % 2], _mm256_cvtepi32_ps(total[i / 2][i % 2])));
        clear(total, rows);
    }
}

/* ---- entries ---- */

INLINE void meet_any(const job *j, const plane *o, int n, const int type, const int rows)
{
    if (type == KERN_Q4_K || type == KERN_Q5_K || type == KERN_Q6_K)
        meet_k(j, o, type, rows);
    else
        meet_flat(j, o, n, type, rows);
}

INLINE void all_rows(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a, const int type)
{
    const int most = type == KERN_Q6_K ? 3 : MAX_ROWS; /* Q6_K needs its totals too often */
    job j = {.y = y, .ldy = ldy, .a = a};
    plane o;
    for (int r = 0; r < a->m; r++)
        memset(y + (size_t)r * ldy, 0, 16 * sizeof(float));
    for (; j.k < a->k; j.k += 256) {
        const int n = a->k - j.k < 256 ? (a->k - j.k) / 32 : 8;
        j.next = unpack(&o, panel, a, j.k, n, type);
        for (j.r = 0; a->m - j.r >= most; j.r += most) {
            meet_any(&j, &o, n, type, most);
            j.next = j.r == 0 ? j.next + 8 * 64 * share(type) : NULL;
        }
        switch (a->m - j.r) {
        case 3:
            meet_any(&j, &o, n, type, 3);
            break;
        case 2:
            meet_any(&j, &o, n, type, 2);
            break;
        case 1:
            meet_any(&j, &o, n, type, 1);
            break;
        default:
            break;
        }
    }
}

static void q4_0(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_Q4_0);
}

static void q5_0(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_Q5_0);
}

static void q8_0(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_Q8_0);
}

static void q4_k(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_Q4_K);
}

static void q5_k(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_Q5_K);
}

static void q6_k(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_Q6_K);
}

static void gptq4(float *y, size_t ldy, const uint8_t *panel, const kern_rows *a)
{
    all_rows(y, ldy, panel, a, KERN_GPTQ4);
}

const kern_gemm kern_gemm_avx2_many = {.name = "avx2 for many rows",
                                       .q4_0 = q4_0,
                                       .q5_0 = q5_0,
                                       .q8_0 = q8_0,
                                       .q4_k = q4_k,
                                       .q5_k = q5_k,
                                       .q6_k = q6_k,
                                       .gptq4 = gptq4};
