#ifndef EP_ROUTER_NODE_INTERNAL_H
#define EP_ROUTER_NODE_INTERNAL_H
/*
 * What the files of router_node share: the router itself, its sequences and the state of a step.
 * All sizes are fixed when the router opens; a step only fills what is here.
 */
#include "kernels/kernels.h"
#include "proto/wire.h"
#include "router_node/gate.h"
#include "router_node/plan.h"
#include "router_node/router.h"

/* ---- weights.c ---- */

typedef struct router_layer {
    float *attn_norm, *ffn_norm, *q_norm, *k_norm;
    kern_matrix q, k, v, o, gate;
    kern_act form; /* of the rows that slices of this layer carry */
} router_layer;

typedef struct router_weights {
    router_layer *layers;
    float *output_norm;
    kern_matrix head;
    float *rope;    /* [n_positions][rope_dim]: cosines, then sines */
    uint8_t *block; /* everything above but layers points into it */
    size_t block_bytes;
    int n_positions;
} router_weights;

ep_status router_weights_open(router_weights *w, const model *m, int n_positions,
                              const kern_act *forms, ep_err *err);
void router_weights_close(router_weights *w);
/* The row of a token, as floats. */
void router_weights_embed(const model *m, int32_t token, float *x);

/* ---- kv.c ---- */

#define ROUTER_PAGE_TOKENS 16

/* Pages of ROUTER_PAGE_TOKENS positions, all layers of a position in one page:
 * page[layer][key head][k, v][position % 16][head_dim]: what a head reads lies together. */
typedef struct router_kv {
    float *base;
    size_t bytes, page_floats, layer_floats, stride;
    int n_pages, n_free, n_reserved;
    int32_t *free_pages;
} router_kv;

ep_status router_kv_open(router_kv *kv, const model_shape *shape, int n_tokens);
void router_kv_close(router_kv *kv);
static inline int router_kv_pages(int n_tokens)
{
    return (n_tokens + ROUTER_PAGE_TOKENS - 1) / ROUTER_PAGE_TOKENS;
}
/* Reserves pages for a sequence; take never fails within what was reserved. */
bool router_kv_reserve(router_kv *kv, int n_pages);
float *router_kv_take(router_kv *kv);
/* Gives back n_taken pages and the whole reservation. */
void router_kv_release(router_kv *kv, float *const *pages, int n_taken, int n_reserved);

/* ---- sequences (batch.c) ---- */

typedef struct router_sequence {
    router_request req; /* prompt: tokens */
    int32_t *tokens;    /* [n_prompt + max_tokens] */
    float **pages;      /* [n_pages] */
    int n_tokens;       /* known: prompt and generated */
    int n_done;         /* positions whose keys and values are written */
    int n_generated, n_pages, n_taken;
    int row_first, n_rows; /* in the step's batch */
    bool cancelled, ended;
    ep_time submitted, admitted, first_token;
} router_sequence;

/* One peer that holds experts. */
typedef struct router_shard {
    bool lost;   /* said by the control plane: for good */
    bool silent; /* gave up waiting; tried again after retry_at */
    ep_time retry_at;
} router_shard;

typedef enum router_slice_state { SLICE_DUE, SLICE_SENT, SLICE_DONE } router_slice_state;

typedef struct router_slice {
    router_slice_state state;
    int sends;
    ep_time first_sent, resend_at;
    wire_reason why; /* of the last refusal */
} router_slice;

struct router {
    router_options opt;
    const model *m;
    model_shape shape;
    int top_k, n_shards, n_threads, page_positions;
    int slice_rows; /* rows of a slice at most, from max_message */
    int head_rows;  /* rows of the output matrix at a time */
    int32_t *end_ids;
    router_weights w;
    router_kv kv;
    router_gate gate;
    router_plan plan;
    router_counters counters;

    router_sequence **waiting; /* [max_waiting], in order of arrival */
    router_sequence **running; /* [max_sequences], least recently served first */
    router_sequence **spare;   /* [max_sequences] for reordering */
    int n_waiting, n_running;

    /* the step's rows, decode tokens first */
    int n_rows;
    router_sequence **row_seq; /* [max rows] NULL in router_forward */
    int *row_position;
    uint64_t *row_request;
    bool *row_out;  /* failed: computed on, sent nowhere */
    int *head_list; /* rows that need logits */
    ep_status forward_status;
    ep_err *forward_err;

    ep_arena arena;
    float *x, *h, *acc; /* [rows, hidden] */
    float *q, *att;     /* [rows, heads * head_dim] */
    float *k, *v;       /* [rows, kv heads * head_dim] */
    float *gate_logits; /* [rows, n_experts] */
    int32_t *experts;   /* [rows, top_k] */
    float *weights;     /* [rows, top_k] */
    uint8_t *act;       /* [rows] in the layer's form */
    const float *
        *reply_row; /* [pairs of the plan] where the row of a pair lies, in a held buffer or: */
    float *replies; /* [rows * top_k, hidden] */
    float *scores;  /* [threads][heads of a key head][positions] */
    float *head_in, *logits; /* [head_rows, hidden], [head_rows, vocab] */
    router_logprob *top;     /* [20] */
    void *sample_scratch;
    void *scratch; /* of kern_linear */

    router_shard *shards;
    router_slice *slices; /* [plan.max_slices] */
    net_buf **held;       /* [max_held] replies of the layer */
    int n_held, max_held;
    uint64_t next_sequence;
};

/* Ends a sequence now: FAILED event, rows of this step left out from here on. */
void router_sequence_fail(router *r, router_sequence *q, ep_status status, const char *text);
void router_sequence_done(router *r, router_sequence *q, router_finish finish);
/* Fails what owns the row: its sequence, or the router_forward under way. */
void router_row_fail(router *r, int row, ep_status status, const char *text);
/* Fails running sequences that were cancelled or whose deadline passed. Returns the earliest
 * deadline of those left. `where` is added to the text. */
ep_time router_expire(router *r, ep_time now, const char *where);
/* Ends waiting requests that were cancelled or expired, then moves others to running while pages
 * and places last. Returns whether any ended. */
bool router_admit(router *r, ep_time now);
/* Fills the rows of a step; 0: nothing to do. */
int router_batch(router *r);
/* Removes ended sequences. */
void router_sweep(router *r);
void router_sequence_free(router_sequence *q);

/* ---- layers.c ---- */

/* Embedding and all layers over the step's rows; x holds the result. */
ep_status router_layers(router *r);
/* Routed experts of one layer: h -> acc (weighted sum). */
ep_status router_moe(router *r, int layer);
/* Final norm and output matrix for the rows in head_list, then sampling and events. */
ep_status router_head(router *r, int n_head);

/* ---- exchange.c ---- */

/* Sends the plan's slices of r->h and fills r->reply_row. Rows that cannot be had fail; EP_OK
 * unless the process is in trouble. On every result router_exchange_end is due, once the rows have
 * been used. */
ep_status router_exchange(router *r, int layer);
void router_exchange_end(router *r);
/* Drops what arrived between steps. */
void router_exchange_drain(router *r);

#endif
