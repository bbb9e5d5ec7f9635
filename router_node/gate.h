#ifndef EP_ROUTER_NODE_GATE_H
#define EP_ROUTER_NODE_GATE_H
/* gate: from the logits of a row to its experts and weights. Pure functions, private to
 * router_node. */
#include "base/base.h"

typedef struct router_gate {
    int n_experts, top_k; /* top_k after a lowering by configuration */
    bool renormalise;
} router_gate;

/* EP_ERR_INVALID when top_k is not in 1..n_experts. */
ep_status router_gate_check(const router_gate *g, ep_err *err);
/* One row. logits: [n_experts], overwritten. experts, weights: [top_k], by descending score.
 * Returns false, with both outputs unset, when a logit is not finite. */
bool router_gate_row(const router_gate *g, float *logits, int32_t *experts, float *weights);

#endif
