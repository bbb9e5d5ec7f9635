#ifndef EP_ROUTER_NODE_PLAN_H
#define EP_ROUTER_NODE_PLAN_H
/*
 * plan: which rows go to which shard, and where the answers come back. Private to router_node.
 *
 * Four index spaces, never mixed:
 *   token  row of the step's batch                                   0 .. n_tokens-1
 *   choice token * top_k + slot                                      0 .. n_tokens*top_k-1
 *   row    row to send: a token once per shard, shards in order, within a shard in token order
 *   pair   reply row: sorted by (slice, expert), equal ones in order of choice
 * A slice is one message: at most slice_rows consecutive rows of one shard with their pairs.
 */
#include "base/base.h"
#include "model/model.h"

typedef struct router_plan_slice {
    int shard_i;
    int row_first, n_rows;   /* into row_token */
    int pair_first, n_pairs; /* into the pair arrays, and of the reply rows */
} router_plan_slice;

typedef struct router_plan {
    int max_tokens, top_k, n_experts, n_shards, max_slices;
    /* the result of router_plan_make */
    int n_tokens, n_rows, n_pairs, n_slices;
    int32_t *row_token;        /* [n_rows] token that the row holds */
    int32_t *pair_row;         /* [n_pairs] row within its slice */
    int32_t *pair_choice;      /* [n_pairs] */
    int32_t *choice_pair;      /* [n_tokens * top_k] -1: the token was left out */
    router_plan_slice *slices; /* [n_slices] by shard, then by row */
    /* scratch */
    int32_t *choice_row;               /* row within its shard, then slice */
    int32_t *by_expert;                /* [choices] in order of expert */
    int32_t *expert_at;                /* [n_experts + 1] */
    int32_t *shard_rows, *shard_token; /* [n_shards] rows so far; last token seen */
    int32_t *shard_slice, *shard_row;  /* [n_shards] first slice, first row */
    void *memory;
} router_plan;

/* Sizes everything for max_tokens tokens; slices hold min_slice_rows rows at least. */
ep_status router_plan_init(router_plan *p, int max_tokens, int top_k, int n_experts, int n_shards,
                           int min_slice_rows);
void router_plan_fini(router_plan *p);

/* experts: [n_tokens, top_k] global ids; is_out: [n_tokens] tokens to leave out, or NULL.
 * slice_rows >= min_slice_rows. EP_ERR_BUG, logged, when an id or its owner is out of range. */
ep_status router_plan_make(router_plan *p, const model_placement *where, const int32_t *experts,
                           int n_tokens, const bool *is_out, int slice_rows);

/* out[token] = sum over slots 0..k-1 of weight * reply row, each an fma onto a row of zeros: the
 * order is that of the slots, whatever the order of arrival. Rows of left-out tokens, and of those
 * in is_out now, are zero. reply_row: [n_pairs] rows of hidden values; tokens first..last-1. */
void router_plan_combine(const router_plan *p, const float *const *reply_row, const float *weights,
                         int hidden, const bool *is_out, int first, int last, float *out);

#endif
