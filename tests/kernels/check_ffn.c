/*
 * The loops over panels: kern_linear against the panel functions, kern_ffn against one pair at a
 * time composed of kern_linear and kern_silu_mul. Bits must not depend on the number of threads,
 * the rows beside, the order of experts or the instruction set, so results are also compared with
 * scalar's.
 */
#include "check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

enum { MAX_THREADS = 3 };

static void *get(size_t bytes)
{
    void *p = ep_alloc(bytes < 64 ? 64 : bytes);
    if (p == NULL) abort();
    return p;
}

static void random_floats(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = check_normal();
}

/* Weights whose products stay moderate: random codes, scales around 2^-8. */
static uint8_t *file_matrix(int type, int n, int k)
{
    uint8_t *p = get((size_t)n * kern_type_row_bytes(type, k));
    check_file_rows(type, MODE_RANDOM, n, k, p);
    return p;
}

/* The seed of a data set is fixed per case, so each level sees the same bytes. */
typedef struct seen {
    uint64_t hash;
    bool set;
} seen;

static void same_as_first_level(seen *s, const char *what, const char *level, const void *p,
                                size_t n)
{
    uint64_t h = XXH3_64bits(p, n);
    if (!s->set)
        *s = (seen){h, true};
    else if (s->hash != h)
        check_fail("%s: %s gives other bits than the first level", what, level);
}

/* ---- linear ---- */

static void linear_case(const char *level, int type, int n, int k, int rows, ep_pool **pools)
{
    enum { GUARD = 5 };
    uint8_t *file = file_matrix(type, n, k), *packed = get(kern_packed_bytes(type, n, k));
    kern_pack(type, n, k, file, packed);
    kern_matrix w = {.type = type, .n = n, .k = k, .data = packed};
    size_t ldx = (size_t)k + 3, ldy = (size_t)n + GUARD, total = (size_t)rows * ldy;
    float *x = get((size_t)rows * ldx * 4), *one = get((size_t)n * 4);
    float *first = get(total * 4), *y = get(total * 4);
    random_floats(x, (size_t)rows * ldx);
    void *scratch = get(kern_linear_scratch_bytes(type, n, k, rows, MAX_THREADS));
    for (int t = 0; t < MAX_THREADS; t++) {
        for (size_t i = 0; i < total; i++)
            y[i] = -7.0f;
        kern_linear(pools[t], &w, x, ldx, rows, y, ldy, scratch);
        if (t == 0) memcpy(first, y, total * 4);
        if (memcmp(first, y, total * 4) != 0)
            check_fail("%s linear %s: %d threads differ from one", level, kern_type_name(type),
                       t + 1);
    }
    for (size_t r = 0; r < (size_t)rows; r++) {
        kern_linear(NULL, &w, x + r * ldx, ldx, 1, one, (size_t)n, scratch);
        if (memcmp(one, first + r * ldy, (size_t)n * 4) != 0)
            check_fail("%s linear %s n %d: row %zu differs when alone", level, kern_type_name(type),
                       n, r);
        for (size_t i = (size_t)n; i < ldy; i++)
            if (first[r * ldy + i] != -7.0f)
                check_fail("%s linear %s n %d: wrote past n", level, kern_type_name(type), n);
    }
    /* and against plain sums in double, loosely: this only catches rows or columns mixed up */
    float *wf = get((size_t)k * 4);
    for (int c = 0; c < n; c += 5) {
        kern_dequant_row(type, file + (size_t)c * kern_type_row_bytes(type, k), wf, k);
        for (int r = 0; r < rows; r += 3) {
            double want = 0, sum = 0, got = first[(size_t)r * ldy + (size_t)c];
            for (int i = 0; i < k; i++) {
                double v = (double)wf[i] * (double)x[(size_t)r * ldx + (size_t)i];
                want += v;
                sum += v < 0 ? -v : v;
            }
            if (!(got - want <= 0.05 * sum && want - got <= 0.05 * sum))
                check_fail("%s linear %s: row %d col %d is %g, about %g expected", level,
                           kern_type_name(type), r, c, got, want);
        }
    }
    ep_free(wf);
    ep_free(file);
    ep_free(packed);
    ep_free(x);
    ep_free(one);
    ep_free(first);
    ep_free(y);
    ep_free(scratch);
}

static void open_pools(ep_pool **pools)
{
    pools[0] = NULL;
    for (int t = 1; t < MAX_THREADS; t++)
        if (ep_pool_open(&pools[t], t + 1) != EP_OK) abort();
}

static void close_pools(ep_pool **pools)
{
    for (int t = 1; t < MAX_THREADS; t++)
        ep_pool_close(pools[t]);
}

void check_linear(const char *level)
{
    ep_pool *pools[MAX_THREADS];
    open_pools(pools);
    for (int t = 0; t < check_n_types; t++) {
        int k = kern_act_block(kern_type_act(check_types[t]));
        if (k == 1) k = 48;
        linear_case(level, check_types[t], 16, k, 3, pools);
        linear_case(level, check_types[t], 37, 2 * k, check_quick ? 5 : 130, pools);
        if (!check_quick) linear_case(level, check_types[t], 320, 2 * k, 66, pools);
    }
    close_pools(pools);
}

/* ---- ffn ---- */

typedef struct model {
    int gate, up, down, hidden, inter, n_experts;
} model;

typedef struct fixture {
    model m;
    kern_stack stack;
    uint8_t **file; /* gate, up, down of each expert */
} fixture;

static void open_fixture(fixture *f, const model *m)
{
    f->m = *m;
    kern_stack *s = &f->stack;
    kern_stack_shape(s, m->gate, m->up, m->down, m->hidden, m->inter, m->n_experts);
    s->gate_up = get(s->gate_up_stride * (size_t)m->n_experts);
    s->down = get(s->down_stride * (size_t)m->n_experts);
    f->file = get((size_t)m->n_experts * 3 * sizeof(*f->file));
    for (int e = 0; e < m->n_experts; e++) {
        uint8_t **w = f->file + 3 * e;
        w[0] = file_matrix(m->gate, m->inter, m->hidden);
        w[1] = file_matrix(m->up, m->inter, m->hidden);
        w[2] = file_matrix(m->down, m->hidden, m->inter);
        kern_stack_put(s, e, w[0], w[1], w[2]);
    }
}

static void close_fixture(fixture *f)
{
    for (int i = 0; i < 3 * f->m.n_experts; i++)
        ep_free(f->file[i]);
    ep_free(f->file);
    ep_free(f->stack.gate_up);
    ep_free(f->stack.down);
}

static void product(int type, int n, int k, const uint8_t *file, const float *x, float *y)
{
    uint8_t *packed = get(kern_packed_bytes(type, n, k));
    void *scratch = get(kern_linear_scratch_bytes(type, n, k, 1, 1));
    kern_pack(type, n, k, file, packed);
    kern_matrix w = {.type = type, .n = n, .k = k, .data = packed};
    kern_linear(NULL, &w, x, (size_t)k, 1, y, (size_t)n, scratch);
    ep_free(packed);
    ep_free(scratch);
}

/* One pair, by three products of one row. */
static void one_pair(const fixture *f, int e, const float *x, float *y)
{
    const model *m = &f->m;
    float *gate = get((size_t)m->inter * 4), *up = get((size_t)m->inter * 4);
    product(m->gate, m->inter, m->hidden, f->file[3 * e], x, gate);
    product(m->up, m->inter, m->hidden, f->file[3 * e + 1], x, up);
    kern_silu_mul(gate, gate, up, m->inter);
    product(m->down, m->hidden, m->inter, f->file[3 * e + 2], gate, y);
    ep_free(gate);
    ep_free(up);
}

/* A routing: experts of each row, in slot order; out row = row * top_k + slot. */
typedef struct routing {
    int n_rows, top_k, n_experts;
    const char *name;
    int32_t expert[512], offset[65], pair_row[512], pair_out[512];
} routing;

static void sort_pairs(routing *r)
{
    int n = 0;
    for (int e = 0; e < r->n_experts; e++) {
        r->offset[e] = n;
        for (int p = 0; p < r->n_rows * r->top_k; p++)
            if (r->expert[p] == e) {
                r->pair_row[n] = p / r->top_k;
                r->pair_out[n++] = p;
            }
    }
    r->offset[r->n_experts] = n;
}

static void make_routing(routing *r, int kind, int n_experts)
{
    *r = (routing){
        .n_rows = check_quick ? 9 : 40, .top_k = 2, .n_experts = n_experts, .name = "random"};
    if (kind == 1)
        *r = (routing){.n_rows = 1, .top_k = 2, .n_experts = n_experts, .name = "one row"};
    if (kind == 2) {
        r->name = "one expert";
        r->n_rows = check_quick ? 20 : 200;
        r->top_k = 1;
    }
    for (int p = 0; p < r->n_rows * r->top_k; p++)
        r->expert[p] = check_below(n_experts);
    if (kind == 2)
        for (int p = 0; p < r->n_rows; p++)
            r->expert[p] = n_experts - 1;
    if (kind == 3) { /* both slots of a row at the same expert, and experts that get nothing */
        r->name = "duplicates";
        for (int p = 0; p < r->n_rows * r->top_k; p++)
            r->expert[p] = p / 2 % 2 ? 1 : 3 % n_experts;
    }
    sort_pairs(r);
}

static void ffn_case(const char *level, fixture *f, const routing *r, ep_pool **pools, seen *s)
{
    const model *m = &f->m;
    size_t hidden = (size_t)m->hidden, n_pairs = (size_t)r->offset[r->n_experts];
    float *x = get((size_t)r->n_rows * hidden * 4), *want = get(n_pairs * hidden * 4);
    float *out = get((n_pairs + 1) * hidden * 4);
    random_floats(x, (size_t)r->n_rows * hidden);
    for (size_t p = 0; p < n_pairs; p++)
        one_pair(f, r->expert[p], x + p / (size_t)r->top_k * hidden, want + p * hidden);
    char what[128];
    snprintf(what, sizeof(what), "ffn %s/%s/%s, %s", kern_type_name(m->gate), kern_type_name(m->up),
             kern_type_name(m->down), r->name);
    same_as_first_level(s, what, level, want, n_pairs * hidden * 4);
    kern_act acts[2] = {kern_stack_act(&f->stack), KERN_ACT_F32};
    uint8_t *rows = get((size_t)r->n_rows * hidden * 4);
    size_t bytes = kern_ffn_scratch_bytes(&f->stack, r->n_rows, (int)n_pairs, MAX_THREADS);
    uint8_t *scratch = get(bytes + 64);
    for (int form = 0; form < (acts[0] == KERN_ACT_F32 ? 1 : 2); form++) {
        kern_act_rows(acts[form], rows, x, hidden, r->n_rows, m->hidden);
        kern_ffn_args a = {.rows = rows,
                           .act = acts[form],
                           .n_rows = r->n_rows,
                           .n_pairs = (int)n_pairs,
                           .expert_offset = r->offset,
                           .pair_row = r->pair_row,
                           .pair_out = r->pair_out,
                           .out = out};
        for (int t = 0; t < MAX_THREADS; t++) {
            for (size_t i = 0; i < (n_pairs + 1) * hidden; i++)
                out[i] = -7.0f;
            memset(scratch, 0xff, bytes); /* nothing may be read before it was written */
            memset(scratch + bytes, 0xaa, 64);
            uint64_t allocs = ep_alloc_count();
            kern_ffn(pools[t], &f->stack, &a, scratch);
            if (ep_alloc_count() != allocs) check_fail("%s: %s allocates", what, level);
            for (int i = 0; i < 64; i++)
                if (scratch[bytes + (size_t)i] != 0xaa) check_fail("%s: scratch overrun", what);
            if (memcmp(out, want, n_pairs * hidden * 4) != 0)
                check_fail("%s: %s with %d threads, form %d, differs from single pairs", what,
                           level, t + 1, (int)acts[form]);
            for (size_t i = 0; i < hidden; i++)
                if (out[n_pairs * hidden + i] != -7.0f) check_fail("%s: wrote past out", what);
        }
    }
    ep_free(x);
    ep_free(want);
    ep_free(out);
    ep_free(rows);
    ep_free(scratch);
}

static void checksum_case(fixture *f)
{
    kern_stack *s = &f->stack;
    uint64_t before = kern_stack_checksum(s, 1), other = kern_stack_checksum(s, 0);
    s->down[s->down_stride + 5] ^= 1;
    if (kern_stack_checksum(s, 1) == before) check_fail("checksum misses a bit of down");
    s->down[s->down_stride + 5] ^= 1;
    s->gate_up[s->gate_up_stride + 77] ^= 1;
    if (kern_stack_checksum(s, 1) == before) check_fail("checksum misses a bit of gate_up");
    s->gate_up[s->gate_up_stride + 77] ^= 1;
    if (kern_stack_checksum(s, 1) != before || kern_stack_checksum(s, 0) != other)
        check_fail("checksum is not stable");
}

void check_ffn(const char *level)
{
    static const model models[] = {
        {KERN_Q4_K, KERN_Q4_K, KERN_Q6_K, 256, 256, 5},
        {KERN_Q4_K, KERN_Q4_K, KERN_Q4_K, 512, 256, 4},
        {KERN_Q5_K, KERN_Q8_0, KERN_Q5_0, 256, 96, 4},
        {KERN_Q8_0, KERN_Q8_0, KERN_Q8_0, 64, 160, 4},
        {KERN_Q4_0, KERN_Q4_0, KERN_Q5_K, 96, 256, 4},
        {KERN_GPTQ4, KERN_GPTQ4, KERN_GPTQ4, 128, 384, 4},
        {KERN_F32, KERN_F32, KERN_F32, 64, 48, 6},
        {KERN_F16, KERN_F16, KERN_F16, 64, 48, 6},
        {KERN_BF16, KERN_BF16, KERN_BF16, 64, 48, 6},
        {KERN_BF16, KERN_F32, KERN_BF16, 80, 112, 4},
    };
    enum { N_MODELS = sizeof(models) / sizeof(models[0]), N_KINDS = 4 };
    static seen first[N_MODELS][N_KINDS];
    ep_pool *pools[MAX_THREADS];
    open_pools(pools);
    check_reseed(); /* every level must see the same data */
    for (int i = 0; i < N_MODELS; i++) {
        fixture f;
        open_fixture(&f, &models[i]);
        checksum_case(&f);
        for (int kind = 0; kind < N_KINDS; kind++) {
            static routing r;
            make_routing(&r, kind, models[i].n_experts);
            ffn_case(level, &f, &r, pools, &first[i][kind]);
        }
        close_fixture(&f);
    }
    close_pools(pools);
}
