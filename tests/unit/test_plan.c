/*
 * plan: compared with a brute-force statement of what a plan must be, on random and degenerate
 * routings.
 */
#include <stdlib.h>

#include "kernels/kernels.h"
#include "router_node/plan.h"
#include "tests/test.h"

static uint64_t random_state;

static int random_below(int n)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (int)((random_state >> 33) % (uint64_t)n);
}

typedef struct routing {
    int n_tokens, top_k, n_experts, n_shards, slice_rows;
    int32_t *experts;
    bool *is_out;
    model_placement where;
} routing;

static bool has_shard(const routing *g, int token, int shard)
{
    if (g->is_out[token]) return false;
    for (int c = token * g->top_k; c < (token + 1) * g->top_k; c++)
        if (g->where.owner[g->experts[c]] == shard) return true;
    return false;
}

/* Rows: for each shard the tokens that choose it, in order, once; cut every slice_rows. */
static void check_rows(const routing *g, const router_plan *p)
{
    int row = 0, slice = 0;
    for (int s = 0; s < g->n_shards; s++) {
        int in_slice = 0;
        for (int t = 0; t < g->n_tokens; t++) {
            if (!has_shard(g, t, s)) continue;
            if (in_slice == 0 || in_slice == g->slice_rows) {
                CHECK(slice < p->n_slices);
                if (slice >= p->n_slices) return;
                CHECK_INT(p->slices[slice].shard_i, s);
                CHECK_INT(p->slices[slice].row_first, row);
                slice++;
                in_slice = 0;
            }
            CHECK_INT(p->row_token[row], t);
            row++, in_slice++;
            CHECK(p->slices[slice - 1].n_rows >= in_slice);
        }
    }
    CHECK_INT(p->n_rows, row);
    CHECK_INT(p->n_slices, slice);
}

/* Pairs: a slice's choices by (expert, token, slot), contiguous; every choice kept exactly once. */
static void check_pairs(const routing *g, const router_plan *p)
{
    int n_choices = g->n_tokens * g->top_k, n_kept = 0, next_pair = 0, next_row = 0;
    for (int c = 0; c < n_choices; c++) {
        if (g->is_out[c / g->top_k]) {
            CHECK_INT(p->choice_pair[c], -1);
            continue;
        }
        n_kept++;
        int pair = p->choice_pair[c];
        CHECK(pair >= 0 && pair < p->n_pairs);
        if (pair < 0 || pair >= p->n_pairs) return;
        CHECK_INT(p->pair_choice[pair], c);
    }
    CHECK_INT(p->n_pairs, n_kept);
    for (int i = 0; i < p->n_slices; i++) {
        const router_plan_slice *s = &p->slices[i];
        CHECK_INT(s->pair_first, next_pair);
        CHECK_INT(s->row_first, next_row);
        CHECK(s->n_rows >= 1 && s->n_rows <= g->slice_rows && s->n_pairs >= s->n_rows);
        next_pair += s->n_pairs, next_row += s->n_rows;
        for (int j = s->pair_first; j < next_pair; j++) {
            int c = p->pair_choice[j], before = j > s->pair_first ? p->pair_choice[j - 1] : -1;
            CHECK(p->pair_row[j] >= 0 && p->pair_row[j] < s->n_rows);
            CHECK_INT(p->row_token[s->row_first + p->pair_row[j]], c / g->top_k);
            CHECK_INT(g->where.owner[g->experts[c]], s->shard_i);
            if (before >= 0)
                CHECK(g->experts[before] < g->experts[c] ||
                      (g->experts[before] == g->experts[c] && before < c));
        }
    }
    CHECK_INT(next_pair, p->n_pairs);
    CHECK_INT(next_row, p->n_rows);
}

/* Combine: slot order, each step a fused multiply-add; rows left out afterwards become zero. */
static void check_combine(const routing *g, const router_plan *p)
{
    enum { HIDDEN = 19 };
    size_t n_choices = (size_t)g->n_tokens * (size_t)g->top_k;
    float *replies = ep_calloc((size_t)p->n_pairs, HIDDEN * sizeof(float));
    const float **reply_row = ep_calloc((size_t)p->n_pairs + 1, sizeof(float *));
    float *out = ep_calloc((size_t)g->n_tokens, HIDDEN * sizeof(float));
    float *weights = ep_calloc(n_choices, sizeof(float));
    for (int i = 0; i < p->n_pairs * HIDDEN; i++)
        replies[i] = (float)random_below(2000) / 7.0f - 140.0f;
    for (int i = 0; i < p->n_pairs; i++)
        reply_row[i] = replies + (size_t)i * HIDDEN;
    for (size_t i = 0; i < n_choices; i++)
        weights[i] = (float)random_below(1000) / 999.0f;
    for (int i = 0; i < g->n_tokens * HIDDEN; i++)
        out[i] = -99.0f; /* dirty on purpose */
    int late_out = g->n_tokens > 0 ? random_below(g->n_tokens) : -1;
    if (late_out >= 0) g->is_out[late_out] = true;
    int half = g->n_tokens / 2;
    router_plan_combine(p, reply_row, weights, HIDDEN, g->is_out, half, g->n_tokens, out);
    router_plan_combine(p, reply_row, weights, HIDDEN, g->is_out, 0, half, out);
    int wrong = 0;
    for (int t = 0; t < g->n_tokens; t++)
        for (int i = 0; i < HIDDEN; i++) {
            float acc = 0.0f;
            for (int c = t * g->top_k; c < (t + 1) * g->top_k && !g->is_out[t]; c++)
                acc = __builtin_fmaf(weights[c], replies[p->choice_pair[c] * HIDDEN + i], acc);
            wrong += out[t * HIDDEN + i] != acc;
        }
    CHECK_INT(wrong, 0);
    ep_free(replies), ep_free((void *)reply_row), ep_free(out), ep_free(weights);
}

static void make_routing(routing *g, int kind)
{
    ep_err err;
    int choices = g->n_tokens * g->top_k;
    g->experts = ep_calloc((size_t)choices + 1, sizeof(int32_t));
    g->is_out = ep_calloc((size_t)g->n_tokens + 1, sizeof(bool));
    for (int c = 0; c < choices; c++)
        g->experts[c] = kind == 1   ? g->n_experts - 1 /* all on one, k times each */
                        : kind == 2 ? (c / g->top_k) % g->n_experts
                                    : random_below(g->n_experts); /* duplicates happen */
    for (int t = 0; t < g->n_tokens; t++)
        g->is_out[t] = kind == 3 || (kind == 0 && random_below(5) == 0);
    CHECK_INT(model_placement_make(&g->where, g->n_experts, g->n_shards, NULL, 1, &err), EP_OK);
    if (kind >= 4) /* scattered owners, some shards without experts */
        for (int e = 0; e < g->n_experts; e++)
            g->where.owner[e] = (int16_t)random_below((g->n_shards + 1) / 2);
}

static void run_one(int kind, int n_tokens, int top_k, int n_experts, int n_shards, int slice_rows)
{
    routing g = {.n_tokens = n_tokens,
                 .top_k = top_k,
                 .n_experts = n_experts,
                 .n_shards = n_shards,
                 .slice_rows = slice_rows};
    make_routing(&g, kind);
    int before = test_failures;
    router_plan p;
    CHECK_INT(router_plan_init(&p, n_tokens + 3, top_k, n_experts, n_shards, slice_rows), EP_OK);
    for (int twice = 0; twice < 2; twice++) { /* nothing is left over from the first time */
        CHECK_INT(router_plan_make(&p, &g.where, g.experts, n_tokens, g.is_out, slice_rows), EP_OK);
        check_rows(&g, &p);
        check_pairs(&g, &p);
    }
    check_combine(&g, &p);
    if (test_failures > before)
        printf("    kind %d, %d tokens, top %d of %d, %d shards, %d rows a slice\n", kind, n_tokens,
               top_k, n_experts, n_shards, slice_rows);
    router_plan_fini(&p);
    model_placement_fini(&g.where);
    ep_free(g.experts), ep_free(g.is_out);
}

static void test_random(void)
{
    random_state = 77101;
    printf("    seed %llu\n", (unsigned long long)random_state);
    for (int round = 0; round < 600 && test_failures == 0; round++) {
        int n_experts = 1 + random_below(40);
        run_one(random_below(6), random_below(30), 1 + random_below(n_experts < 6 ? n_experts : 6),
                n_experts, 1 + random_below(n_experts < 7 ? n_experts : 7), 1 + random_below(12));
    }
}

static void test_degenerate(void)
{
    random_state = 5;
    run_one(0, 0, 2, 8, 3, 4);     /* no tokens */
    run_one(3, 9, 2, 8, 3, 4);     /* all left out */
    run_one(1, 50, 4, 8, 3, 1000); /* everything on one expert, duplicates */
    run_one(1, 50, 4, 8, 3, 1);    /* the same, a slice a row */
    run_one(2, 33, 1, 4, 4, 3);    /* round robin */
    run_one(0, 64, 8, 512, 1, 64); /* one shard */
    run_one(5, 64, 8, 512, 16, 7);
}

static void test_bad_ids(void)
{
    ep_err err;
    model_placement where;
    router_plan p;
    CHECK_INT(model_placement_make(&where, 4, 2, NULL, 1, &err), EP_OK);
    CHECK_INT(router_plan_init(&p, 4, 2, 4, 2, 4), EP_OK);
    CHECK_INT(router_plan_make(&p, &where, (int32_t[]){0, 1, 4, 2}, 2, NULL, 4), EP_ERR_BUG);
    CHECK_INT(p.n_slices, 0);
    CHECK_INT(router_plan_make(&p, &where, (int32_t[]){0, -1, 3, 2}, 2, NULL, 4), EP_ERR_BUG);
    CHECK_INT(p.n_pairs, 0);
    where.owner[3] = 2;
    CHECK_INT(router_plan_make(&p, &where, (int32_t[]){0, 1, 3, 2}, 2, NULL, 4), EP_ERR_BUG);
    bool is_out[2] = {false, true}; /* ids of rows left out are not looked at */
    CHECK_INT(router_plan_make(&p, &where, (int32_t[]){0, 1, -1, 99}, 2, is_out, 4), EP_OK);
    CHECK_INT(p.n_pairs, 2);
    CHECK_INT(router_plan_make(&p, &where, (int32_t[]){0}, 5, NULL, 4), EP_ERR_BUG);
    router_plan_fini(&p);
    model_placement_fini(&where);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"random", test_random}, {"degenerate", test_degenerate}, {"bad_ids", test_bad_ids}};
    ep_err err;
    if (kern_select("auto", &err) != EP_OK) {
        printf("kern_select: %s\n", err.text);
        return 1;
    }
    return test_main(argc, argv, cases, 3);
}
