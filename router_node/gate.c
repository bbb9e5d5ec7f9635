/*
 * gate: softmax over all experts, then the k best. This is the one place that chooses: shards are
 * told ids and never recompute them.
 *
 *  1. Every logit is finite, or the row is refused and nothing is written for it.
 *  2. score = softmax over all logits in f32 (kern_softmax: one order on every machine).
 *  3. k times: the highest score not yet taken; of equals the lowest id. Equality is that of the
 *     scores, not of the logits, as in the reference implementations.
 *  4. So slots stand in descending score; their order is the order of additions downstream.
 *  5. With renormalisation each weight is divided by the sum of the k chosen, added in slot order;
 * a sum that is not positive gives 1/k. Lowering k by configuration happens before: renormalisation
 * follows the truncation. Without it the weights are the scores.
 */
#include "router_node/gate.h"

#include <math.h>

#include "kernels/kernels.h"

ep_status router_gate_check(const router_gate *g, ep_err *err)
{
    if (g->top_k < 1 || g->top_k > g->n_experts)
        return ep_fail(err, EP_ERR_INVALID, "top_k %d is not between 1 and the %d experts",
                       g->top_k, g->n_experts);
    return EP_OK;
}

bool router_gate_row(const router_gate *g, float *logits, int32_t *experts, float *weights)
{
    for (int e = 0; e < g->n_experts; e++) /* 1. */
        if (!isfinite(logits[e])) return false;
    if (!kern_softmax(logits, g->n_experts)) return false; /* 2. */

    float sum = 0.0f;
    for (int slot = 0; slot < g->top_k; slot++) { /* 3., 4. */
        int best = -1;
        for (int e = 0; e < g->n_experts; e++)
            if (logits[e] >= 0.0f && (best < 0 || logits[e] > logits[best])) best = e;
        experts[slot] = best;
        weights[slot] = logits[best];
        sum += logits[best];
        logits[best] = -1.0f; /* taken: scores are never negative */
    }
    if (!g->renormalise) return true;
    for (int slot = 0; slot < g->top_k; slot++) /* 5. */
        weights[slot] = sum > 0.0f ? weights[slot] / sum : 1.0f / (float)g->top_k;
    return true;
}
