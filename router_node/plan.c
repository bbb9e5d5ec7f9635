/*
 * plan: a stable counting sort of (token, slot) choices by (shard, slice, expert).
 *
 *  1. Every id must name an expert and its owner a shard; otherwise nothing is planned (loudly: the
 * ids are our own).
 *  2. Scan choices in order. The first choice of a token that falls on a shard makes the token the
 * next row of that shard; further ones reuse the row. So a row travels once per shard, in token
 * order.
 *  3. Rows of a shard are cut into slices of slice_rows; a shard without rows gets no slice.
 *  4. Counting sort of the choices by expert, stable.
 *  5. Distribution of that order into the slices, stable: pairs of a slice stand by expert, equal
 * ones by token and slot.
 *
 * No tokens, all choices on one expert, and the same expert twice for one token are all normal. The
 * sort decides only where rows lie; no number depends on it, because combine goes by slot.
 */
#include "router_node/plan.h"

#include <string.h>

#include "kernels/kernels.h"

ep_status router_plan_init(router_plan *p, int max_tokens, int top_k, int n_experts, int n_shards,
                           int min_slice_rows)
{
    memset(p, 0, sizeof(*p));
    size_t choices = (size_t)max_tokens * (size_t)top_k, shards = (size_t)n_shards;
    size_t per_shard = ((size_t)max_tokens + (size_t)min_slice_rows - 1) / (size_t)min_slice_rows;
    size_t slices = shards * per_shard > choices ? choices : shards * per_shard;
    size_t words = 6 * choices + (size_t)n_experts + 1 + 4 * shards;
    p->memory = ep_calloc(1, slices * sizeof(router_plan_slice) + words * sizeof(int32_t));
    if (p->memory == NULL) return EP_ERR_NOMEM;

    p->max_tokens = max_tokens;
    p->top_k = top_k;
    p->n_experts = n_experts;
    p->n_shards = n_shards;
    p->max_slices = (int)slices;
    p->slices = p->memory;
    int32_t *at = (int32_t *)(p->slices + slices);
    p->row_token = at, at += choices; /* a choice makes one row at most */
    p->pair_row = at, at += choices;
    p->pair_choice = at, at += choices;
    p->choice_pair = at, at += choices;
    p->choice_row = at, at += choices;
    p->by_expert = at, at += choices;
    p->expert_at = at, at += n_experts + 1;
    p->shard_rows = at, at += shards;
    p->shard_token = at, at += shards;
    p->shard_slice = at, at += shards;
    p->shard_row = at;
    return EP_OK;
}

void router_plan_fini(router_plan *p)
{
    ep_free(p->memory);
    memset(p, 0, sizeof(*p));
}

/* Rules 1 and 2; counts experts on the way. */
static ep_status scan(router_plan *p, const model_placement *where, const int32_t *experts,
                      const bool *is_out)
{
    memset(p->expert_at, 0, sizeof(int32_t) * ((size_t)p->n_experts + 1));
    for (int s = 0; s < p->n_shards; s++)
        p->shard_rows[s] = 0, p->shard_token[s] = -1;
    for (int t = 0; t < p->n_tokens; t++) {
        if (is_out != NULL && is_out[t]) continue;
        for (int c = t * p->top_k; c < (t + 1) * p->top_k; c++) {
            int e = experts[c];
            int s = e < 0 || e >= p->n_experts ? -1 : where->owner[e];
            if (s < 0 || s >= p->n_shards) {
                log_error("plan: token %d has expert %d, owner %d, of %d experts on %d shards", t,
                          e, s, p->n_experts, p->n_shards);
                return EP_ERR_BUG;
            }
            if (p->shard_token[s] != t) p->shard_rows[s]++, p->shard_token[s] = t;
            p->choice_row[c] = p->shard_rows[s] - 1;
            p->expert_at[e + 1]++;
        }
    }
    return EP_OK;
}

/* Rule 3. */
static void cut(router_plan *p, int slice_rows)
{
    p->n_slices = p->n_rows = 0;
    for (int s = 0; s < p->n_shards; s++) {
        p->shard_slice[s] = p->n_slices;
        p->shard_row[s] = p->n_rows;
        for (int left = p->shard_rows[s]; left > 0; left -= slice_rows) {
            int n = left < slice_rows ? left : slice_rows;
            p->slices[p->n_slices++] = (router_plan_slice){s, p->n_rows, n, 0, 0};
            p->n_rows += n;
        }
    }
}

ep_status router_plan_make(router_plan *p, const model_placement *where, const int32_t *experts,
                           int n_tokens, const bool *is_out, int slice_rows)
{
    if (n_tokens < 0 || n_tokens > p->max_tokens || where->n_experts != p->n_experts ||
        where->n_shards != p->n_shards || slice_rows < 1)
        return EP_ERR_BUG;
    p->n_tokens = n_tokens;
    p->n_rows = p->n_pairs = p->n_slices = 0;
    ep_status status = scan(p, where, experts, is_out);
    if (status != EP_OK) return status;
    cut(p, slice_rows);
    if (p->n_slices > p->max_slices) return EP_ERR_BUG;

    int n_choices = n_tokens * p->top_k;
    for (int e = 0; e < p->n_experts; e++) /* 4. */
        p->expert_at[e + 1] += p->expert_at[e];
    p->n_pairs = p->expert_at[p->n_experts];
    for (int c = 0; c < n_choices; c++) {
        p->choice_pair[c] = -1;
        if (is_out != NULL && is_out[c / p->top_k]) continue;
        int s = where->owner[experts[c]], slice = p->shard_slice[s] + p->choice_row[c] / slice_rows;
        p->slices[slice].n_pairs++;
        p->row_token[p->shard_row[s] + p->choice_row[c]] = c / p->top_k;
        p->by_expert[p->expert_at[experts[c]]++] = c;
    }
    for (int i = 0, first = 0; i < p->n_slices; i++) {
        p->slices[i].pair_first = first;
        first += p->slices[i].n_pairs;
        p->slices[i].n_pairs = 0; /* counts up again below */
    }
    for (int i = 0; i < p->n_pairs; i++) { /* 5. */
        int c = p->by_expert[i], s = where->owner[experts[c]],
            group = p->choice_row[c] / slice_rows;
        router_plan_slice *slice = &p->slices[p->shard_slice[s] + group];
        int pair = slice->pair_first + slice->n_pairs++;
        p->pair_row[pair] = p->choice_row[c] - group * slice_rows;
        p->pair_choice[pair] = c;
        p->choice_pair[c] = pair;
    }
    return EP_OK;
}

void router_plan_combine(const router_plan *p, const float *const *reply_row, const float *weights,
                         int hidden, const bool *is_out, int first, int last, float *out)
{
    for (int t = first; t < last; t++) {
        float *acc = out + (size_t)t * (size_t)hidden;
        memset(acc, 0, (size_t)hidden * sizeof(float));
        if (is_out != NULL && is_out[t]) continue;
        for (int c = t * p->top_k; c < (t + 1) * p->top_k; c++) {
            if (p->choice_pair[c] < 0) continue;
            kern_axpy(acc, reply_row[p->choice_pair[c]], weights[c], hidden);
        }
    }
}
