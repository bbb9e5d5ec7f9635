#ifndef EP_ROUTER_NODE_ROUTER_H
#define EP_ROUTER_NODE_ROUTER_H
/*
 * router_node: a router rank. It owns sequences with their KV pages, runs everything of the model
 * that is not a routed expert, chooses the experts of each token, scatters slices to the shards,
 * combines their rows in slot order, samples, and reports tokens as events. It takes requests, not
 * sequences of calls: each router_step runs one batch (decode tokens first, then prefill chunks up
 * to a budget).
 *
 * One thread, the engine, calls everything here. Events are delivered on it, from inside
 * router_step. A token's bits do not depend on the other requests of a batch, on chunk sizes, on
 * threads, on the number of routers and shards or on the placement.
 */
#include "base/base.h"
#include "model/model.h"
#include "router_node/sample.h"
#include "transport/net.h"

typedef struct router router;

typedef enum router_event_kind {
    ROUTER_EVENT_TOKEN, /* one generated token */
    ROUTER_EVENT_SCORE, /* log probability of one prompt token (scoring requests) */
    ROUTER_EVENT_DONE,
    ROUTER_EVENT_FAILED
} router_event_kind;

typedef enum router_finish { ROUTER_FINISH_STOP, ROUTER_FINISH_LENGTH } router_finish;

typedef struct router_event {
    router_event_kind kind;
    uint64_t request;
    int32_t token;  /* TOKEN, SCORE */
    int position;   /* of the token in the sequence */
    double logprob; /* SCORE, and TOKEN if n_logprobs > 0: natural log of its probability before
                     * sampling filters; else 0 */
    const router_logprob
        *top; /* TOKEN: the n_top most probable, descending; borrowed during the call */
    int n_top;
    router_finish finish;                    /* DONE */
    int n_prompt, n_generated;               /* DONE */
    int64_t queue_ns, prefill_ns, decode_ns; /* DONE */
    ep_status status;                        /* FAILED */
    const char *text;                        /* FAILED: names shard, layer, rank; borrowed */
} router_event;

typedef struct router_request {
    uint64_t id;           /* the caller's, unique among running requests */
    const int32_t *prompt; /* copied */
    int n_prompt;
    int max_tokens; /* generated at most; 0: prefill only */
    router_sampling sampling;
    int n_logprobs;  /* TOKEN events carry this many, 0..20 */
    bool ignore_end; /* do not stop at eos */
    int score_from;  /* >= 1: SCORE events for prompt positions >= score_from; 0: none */
    ep_time deadline;
} router_request;

/* For tests and `golden`: intermediate results, called on the engine thread. Rows of `x` are in the
 * order of the step's tokens, whose sequences and positions are given. NULL members are not called.
 */
typedef struct router_tap {
    void *arg;
    /* input: rows after the second norm, what gate and experts see; output: rows leaving the layer,
     * residual added; both [n_tokens, hidden]. experts, weights: [n_tokens, top_k]. */
    void (*moe)(void *arg, int layer, int n_tokens, const uint64_t *request, const int *position,
                const float *input, const int32_t *experts, const float *weights, int top_k,
                const float *output);
    void (*logits)(void *arg, uint64_t request, int position, const float *logits); /* [vocab] */
    bool all_logits; /* compute and tap the logits of every position, not only those needed */
} router_tap;

typedef struct router_options {
    const model *m;
    const model_placement *placement; /* shard s is rank first_shard_rank + s of the net */
    int router_i, first_shard_rank;
    net *n;
    ep_pool *pool;           /* NULL: the engine thread alone */
    int kv_tokens;           /* positions held over all sequences */
    int max_tokens_per_step; /* rows of a batch */
    int prefill_chunk; /* prompt tokens of one sequence in one step at most; 0: as budget allows */
    int max_sequences; /* running at once; others wait */
    int max_waiting;   /* beyond this router_submit says EP_ERR_BUSY */
    size_t
        max_message; /* the net's; slices are cut so that they and their replies fit. 0: no limit */
    int per_layer_ms; /* wait for the answers of a layer before sending again */
    int layer_tries;  /* sends of a slice in all before its shard counts as lost */
    const kern_act
        *layer_form; /* [n_layers] form in which slices carry rows (shards agree by rule:
                      * common form of gate and up, else F32); NULL: derived from the model */
    int top_k;       /* 0: the model's; lower allowed, renormalised after truncation */
    const int32_t
        *end_ids; /* tokens that end a generation; copied. The end token is an event too */
    int n_end_ids;
    /* Called while a step waits for shards, at least every 200 ms and after net_wake; router_cancel
     * and router_shard_lost may be called from it. May be NULL. */
    void (*tick)(void *arg);
    void *tick_arg;
    void (*on_event)(void *arg, const router_event *e);
    void *event_arg;
    router_tap tap;
} router_options;
router_options router_options_default(void);

/* Rows of a slice at most, so that it and its reply fit max_message whatever its experts; 0: not
 * even one row does. What a shard takes as max_rows must not be less. forms: layer_form, or NULL;
 * top_k 0: the model's. */
int router_slice_rows(const model *m, const kern_act *forms, int top_k, int max_tokens_per_step,
                      size_t max_message);

/* Resolves and packs the tensors of a router; err names what is missing or too large. */
ep_status router_open(router **out, const router_options *opt, ep_err *err);
void router_close(router *r);

/* Takes a request: EP_ERR_INVALID with the reason in err (token out of range, longer than context
 * or KV, sampling out of range), EP_ERR_BUSY when the queue is full. Events follow only after
 * EP_OK. */
ep_status router_submit(router *r, const router_request *req, ep_err *err);
/* The request ends with a FAILED event of status EP_ERR_CANCELED (unless it ended before). */
void router_cancel(router *r, uint64_t id);

/* One batch. EP_OK: did something; EP_AGAIN: nothing to do. Any other status is the process range:
 * drain and exit. Deadlines are looked at here too. */
ep_status router_step(router *r);

/* The experts of one layer on given hidden states (what the layer's MoE block adds, no norm, no
 * residual): gate, dispatch, combine. x, y: [rows, hidden], any number of rows. Between steps only.
 * experts, weights: [rows, top_k] or NULL. */
ep_status router_forward(router *r, int layer, const float *x, int rows, float *y, int32_t *experts,
                         float *weights, ep_err *err);

/* The shard does not answer any more: its slices fail (or wait for what takes its place). */
void router_shard_lost(router *r, int shard_i);

typedef struct router_layer_counters {
    uint64_t rows, slices, resent, bytes_out, bytes_in;
    uint64_t attention_ns, gate_ns, plan_ns, scatter_ns, wait_ns, combine_ns;
} router_layer_counters;

typedef struct router_counters {
    router_layer_counters *layers; /* [n_layers] */
    uint64_t *expert_rows;         /* [n_layers * n_experts] */
    uint64_t *shard_wait_ns;       /* [n_shards] time from sending to the answer, summed */
    uint64_t *shard_slices;        /* [n_shards] */
    int n_layers, n_experts, n_shards;
    uint64_t steps, tokens_prefill, tokens_decode, head_ns, sample_ns;
    uint64_t late_replies, bad_replies, error_replies, non_finite_rows;
    int running, waiting, kv_pages_free, kv_pages;
    size_t weight_bytes;
} router_counters;
/* A view whose numbers keep changing (each is written by the engine only). */
const router_counters *router_counters_get(const router *r);
/* Requests running or waiting. */
int router_load(const router *r);

#endif
