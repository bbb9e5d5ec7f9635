/*
 * engine: opening and closing a router, one step, and router_forward.
 *
 * Everything a step uses is sized and allocated here, from the limits in the options; router_step
 * and router_forward only fill it, so they never allocate. A step is: drop late messages, end what
 * was cancelled or expired, admit, choose rows, layers, head, sweep. Numbers are the business of
 * layers.c.
 */
#include <stdio.h>
#include <string.h>

#include "router_node/internal.h"

#define HEAD_FLOATS (4 << 20) /* logits held at a time: 16 MiB */

router_options router_options_default(void)
{
    return (router_options){.first_shard_rank = 1,
                            .kv_tokens = 8192,
                            .max_tokens_per_step = 512,
                            .max_sequences = 64,
                            .max_waiting = 256,
                            .per_layer_ms = 2000,
                            .layer_tries = 3};
}

static ep_status check_options(const router_options *o, ep_err *err)
{
    const struct {
        const char *name;
        int value, least;
    } at_least[] = {
        {"max_tokens_per_step", o->max_tokens_per_step, 1},
        {"kv_tokens", o->kv_tokens, ROUTER_PAGE_TOKENS},
        {"max_sequences", o->max_sequences, 1},
        {"max_waiting", o->max_waiting, 1},
        {"per_layer_ms", o->per_layer_ms, 1},
        {"layer_tries", o->layer_tries, 1},
        {"prefill_chunk", o->prefill_chunk, 0},
        {"top_k", o->top_k, 0},
        {"first_shard_rank", o->first_shard_rank, 0},
        {"number of end tokens", o->n_end_ids, 0},
    };
    for (size_t i = 0; i < sizeof(at_least) / sizeof(at_least[0]); i++)
        if (at_least[i].value < at_least[i].least)
            return ep_fail(err, EP_ERR_INVALID, "%s is %d, at least %d is needed", at_least[i].name,
                           at_least[i].value, at_least[i].least);
    if (o->m == NULL || o->placement == NULL || o->n == NULL || o->on_event == NULL)
        return ep_fail(err, EP_ERR_BUG, "router options without model, placement, net or on_event");
    if (o->placement->n_experts != o->m->shape.n_experts)
        return ep_fail(err, EP_ERR_INVALID, "the placement has %d experts, the model %d",
                       o->placement->n_experts, o->m->shape.n_experts);
    if (o->first_shard_rank + o->placement->n_shards > o->n->n_ranks)
        return ep_fail(err, EP_ERR_INVALID, "%d shards from rank %d on, but the job has %d ranks",
                       o->placement->n_shards, o->first_shard_rank, o->n->n_ranks);
    return EP_OK;
}

int router_slice_rows(const model *m, const kern_act *forms, int top_k, int max_tokens_per_step,
                      size_t max_message)
{
    uint32_t hidden = (uint32_t)m->shape.hidden, k = (uint32_t)(top_k > 0 ? top_k : m->shape.top_k);
    int rows = max_tokens_per_step;
    for (int i = 0; max_message != 0 && i < m->shape.n_layers; i++) {
        kern_act form = forms != NULL ? forms[i]
                                      : kern_gate_up_act(m->layers[i].gate_exps->type,
                                                         m->layers[i].up_exps->type);
        while (rows > 0 &&
               (wire_slice_bytes(form, hidden, (uint32_t)rows, (uint32_t)rows * k) > max_message ||
                wire_reply_bytes(hidden, (uint32_t)rows * k) > max_message))
            rows--;
    }
    return rows;
}

static size_t max_size(size_t a, size_t b)
{
    return a > b ? a : b;
}

static size_t linear_scratch(const router *r)
{
    size_t need = 0;
    int rows = r->opt.max_tokens_per_step;
    for (int i = 0; i < r->shape.n_layers; i++) {
        const router_layer *w = &r->w.layers[i];
        const kern_matrix *all[] = {&w->q, &w->k, &w->v, &w->o, &w->gate};
        for (int j = 0; j < 5; j++)
            need = max_size(need, kern_linear_scratch_bytes(all[j]->type, all[j]->n, all[j]->k,
                                                            rows, r->n_threads));
    }
    const kern_matrix *head = &r->w.head;
    return max_size(
        need, kern_linear_scratch_bytes(head->type, head->n, head->k, r->head_rows, r->n_threads));
}

static size_t act_bytes(const router *r)
{
    size_t row = 0;
    for (int i = 0; i < r->shape.n_layers; i++)
        row = max_size(row, kern_act_row_bytes(r->w.layers[i].form, r->shape.hidden));
    return row * (size_t)r->opt.max_tokens_per_step;
}

/* All that a step computes in, from one arena. */
static ep_status open_arena(router *r)
{
    const model_shape *s = &r->shape;
    size_t rows = (size_t)r->opt.max_tokens_per_step, hidden = (size_t)s->hidden, f = sizeof(float);
    size_t q_dim = (size_t)s->n_heads * (size_t)s->head_dim, k = (size_t)r->top_k;
    size_t kv_dim = (size_t)s->n_kv_heads * (size_t)s->head_dim, head_rows = (size_t)r->head_rows;
    size_t group = (size_t)(s->n_heads / s->n_kv_heads);
    const struct {
        void *at;
        size_t bytes;
    } parts[] = {
        {&r->row_seq, rows * sizeof(router_sequence *)},
        {&r->row_position, rows * sizeof(int)},
        {&r->row_request, rows * sizeof(uint64_t)},
        {&r->row_out, rows * sizeof(bool)},
        {&r->head_list, rows * sizeof(int)},
        {&r->x, rows * hidden * f},
        {&r->h, rows * hidden * f},
        {&r->acc, rows * hidden * f},
        {&r->q, rows * q_dim * f},
        {&r->att, rows * q_dim * f},
        {&r->k, rows * kv_dim * f},
        {&r->v, rows * kv_dim * f},
        {&r->gate_logits, rows * (size_t)s->n_experts * f},
        {&r->experts, rows * k * sizeof(int32_t)},
        {&r->weights, rows * k * f},
        {&r->act, act_bytes(r)},
        {&r->reply_row, rows * k * sizeof(float *)},
        {&r->replies, rows * k * hidden * f},
        {&r->scores, (size_t)r->n_threads * group * kern_attn_scores(r->page_positions) * f},
        {&r->head_in, head_rows * hidden * f},
        {&r->logits, head_rows * (size_t)s->vocab * f},
        {&r->top, 20 * sizeof(router_logprob)},
        {&r->sample_scratch, router_sample_scratch_bytes(s->vocab)},
        {&r->scratch, linear_scratch(r)},
    };
    size_t n = sizeof(parts) / sizeof(parts[0]), total = 0;
    for (size_t i = 0; i < n; i++)
        total += (parts[i].bytes + 127) & ~(size_t)63;
    ep_status status = ep_arena_init(&r->arena, total);
    if (status != EP_OK) return status;
    for (size_t i = 0; i < n; i++) {
        void *p = ep_arena_get(&r->arena, parts[i].bytes);
        if (p == NULL) return EP_ERR_BUG;
        memcpy(parts[i].at, &p, sizeof(p)); /* every member is a pointer to an object */
    }
    return EP_OK;
}

static ep_status open_lists(router *r)
{
    router_counters *c = &r->counters;
    size_t layers = (size_t)r->shape.n_layers, shards = (size_t)r->n_shards;
    size_t sequences = (size_t)r->opt.max_sequences;
    r->waiting = ep_calloc((size_t)r->opt.max_waiting, sizeof(*r->waiting));
    r->running = ep_calloc(sequences, sizeof(*r->running));
    r->spare = ep_calloc(sequences, sizeof(*r->spare));
    r->shards = ep_calloc(shards, sizeof(*r->shards));
    r->max_held = r->opt.n->n_buffers / 4 - 1; /* rule 4 of exchange.c */
    r->held = ep_calloc((size_t)r->max_held + 1, sizeof(net_buf *));
    r->end_ids = ep_alloc(sizeof(int32_t) * (size_t)r->opt.n_end_ids);
    c->layers = ep_calloc(layers, sizeof(*c->layers));
    c->expert_rows = ep_calloc(layers * (size_t)r->shape.n_experts, sizeof(uint64_t));
    c->shard_wait_ns = ep_calloc(shards, sizeof(uint64_t));
    c->shard_slices = ep_calloc(shards, sizeof(uint64_t));
    if (r->waiting == NULL || r->running == NULL || r->spare == NULL || r->shards == NULL ||
        r->held == NULL || r->end_ids == NULL || c->layers == NULL || c->expert_rows == NULL ||
        c->shard_wait_ns == NULL || c->shard_slices == NULL)
        return EP_ERR_NOMEM;
    if (r->opt.n_end_ids > 0)
        memcpy(r->end_ids, r->opt.end_ids, sizeof(int32_t) * (size_t)r->opt.n_end_ids);
    c->n_layers = r->shape.n_layers;
    c->n_experts = r->shape.n_experts;
    c->n_shards = r->n_shards;
    return EP_OK;
}

static ep_status open_parts(router *r, ep_err *err)
{
    const router_options *o = &r->opt;
    ep_status status = router_gate_check(&r->gate, err);
    if (status != EP_OK) return status;
    status = router_weights_open(&r->w, r->m, r->page_positions, o->layer_form, err);
    if (status != EP_OK) return status;
    r->counters.weight_bytes = r->w.block_bytes;
    r->slice_rows =
        router_slice_rows(r->m, o->layer_form, r->top_k, o->max_tokens_per_step, o->max_message);
    if (r->slice_rows == 0)
        return ep_fail(err, EP_ERR_TOO_LARGE,
                       "one row of %d with %d experts does not fit a message of %zu bytes",
                       r->shape.hidden, r->top_k, o->max_message);

    ep_fail(err, EP_ERR_NOMEM, "no memory for %d positions and %d rows a step", o->kv_tokens,
            o->max_tokens_per_step); /* stands unless the rest succeeds */
    status = router_kv_open(&r->kv, &r->shape, o->kv_tokens);
    if (status != EP_OK) return status;
    r->counters.kv_pages = r->counters.kv_pages_free = r->kv.n_pages;
    status = router_plan_init(&r->plan, o->max_tokens_per_step, r->top_k, r->shape.n_experts,
                              r->n_shards, r->slice_rows);
    if (status != EP_OK) return status;
    r->slices = ep_calloc((size_t)r->plan.max_slices, sizeof(*r->slices));
    if (r->slices == NULL) return EP_ERR_NOMEM;
    status = open_lists(r);
    if (status != EP_OK) return status;
    return open_arena(r);
}

ep_status router_open(router **out, const router_options *opt, ep_err *err)
{
    ep_status status = check_options(opt, err);
    if (status != EP_OK) return status;
    router *r = ep_calloc(1, sizeof(*r));
    if (r == NULL) return ep_fail(err, EP_ERR_NOMEM, "no memory for a router");
    r->opt = *opt;
    r->m = opt->m;
    r->shape = opt->m->shape;
    r->top_k = opt->top_k > 0 ? opt->top_k : r->shape.top_k;
    r->gate = (router_gate){r->shape.n_experts, r->top_k, r->shape.renormalise};
    r->n_shards = opt->placement->n_shards;
    r->n_threads = ep_pool_size(opt->pool);
    r->page_positions = opt->kv_tokens < r->shape.context ? opt->kv_tokens : r->shape.context;
    r->head_rows = HEAD_FLOATS / r->shape.vocab;
    if (r->head_rows < 1) r->head_rows = 1;
    if (r->head_rows > opt->max_tokens_per_step) r->head_rows = opt->max_tokens_per_step;
    r->next_sequence = 1;

    status = open_parts(r, err);
    if (status != EP_OK) {
        router_close(r);
        return status;
    }
    if (err != NULL) err->text[0] = '\0';
    *out = r;
    return EP_OK;
}

void router_close(router *r)
{
    if (r == NULL) return;
    for (int i = 0; i < r->n_waiting; i++)
        router_sequence_free(r->waiting[i]);
    for (int i = 0; i < r->n_running; i++)
        router_sequence_free(r->running[i]);
    ep_arena_fini(&r->arena);
    router_plan_fini(&r->plan);
    router_kv_close(&r->kv);
    router_weights_close(&r->w);
    ep_free(r->slices);
    ep_free(r->shards);
    ep_free((void *)r->held);
    ep_free(r->waiting);
    ep_free(r->running);
    ep_free(r->spare);
    ep_free(r->end_ids);
    ep_free(r->counters.layers);
    ep_free(r->counters.expert_rows);
    ep_free(r->counters.shard_wait_ns);
    ep_free(r->counters.shard_slices);
    ep_free(r);
}

/* ---- step ---------------------------------------------------------------------------------------
 */

/* Rows whose logits somebody needs. */
static int list_head(router *r)
{
    int n = 0;
    for (int i = 0; i < r->n_rows; i++) {
        const router_sequence *q = r->row_seq[i];
        int t = r->row_position[i];
        if (r->row_out[i]) continue;
        bool is_scored =
            q->req.score_from > 0 && t + 1 >= q->req.score_from && t + 1 < q->req.n_prompt;
        bool is_last = t == q->n_tokens - 1 && q->req.max_tokens > 0;
        if (is_scored || is_last || r->opt.tap.all_logits) r->head_list[n++] = i;
    }
    return n;
}

/* The rows are done: their positions are cached. */
static void advance(router *r)
{
    for (int i = 0; i < r->n_running; i++) {
        router_sequence *q = r->running[i];
        if (q->ended || q->n_rows == 0) continue;
        q->n_done += q->n_rows;
    }
}

static void finish_prefill_only(router *r)
{
    for (int i = 0; i < r->n_running; i++) {
        router_sequence *q = r->running[i];
        if (!q->ended && q->req.max_tokens == 0 && q->n_done >= q->req.n_prompt)
            router_sequence_done(r, q, ROUTER_FINISH_LENGTH);
    }
}

static void count(router *r)
{
    r->counters.running = r->n_running;
    r->counters.waiting = r->n_waiting;
    r->counters.kv_pages_free = r->kv.n_free;
}

ep_status router_step(router *r)
{
    ep_time now = ep_now();
    router_exchange_drain(r);
    router_expire(r, now, "");
    int before = r->n_running;
    router_sweep(r);
    bool any_ended = before != r->n_running;
    any_ended |= router_admit(r, now);
    if (router_batch(r) == 0) {
        count(r);
        return any_ended ? EP_OK : EP_AGAIN;
    }
    r->counters.steps++;
    ep_status status = router_layers(r);
    if (status != EP_OK) return status;
    advance(r);
    status = router_head(r, list_head(r));
    finish_prefill_only(r);
    router_sweep(r);
    count(r);
    return status;
}

ep_status router_forward(router *r, int layer, const float *x, int rows, float *y, int32_t *experts,
                         float *weights, ep_err *err)
{
    if (layer < 0 || layer >= r->shape.n_layers)
        return ep_fail(err, EP_ERR_INVALID, "layer %d, the model has %d", layer, r->shape.n_layers);
    if (rows < 0) return ep_fail(err, EP_ERR_INVALID, "%d rows", rows);
    size_t hidden = (size_t)r->shape.hidden, k = (size_t)r->top_k;
    ep_status status = EP_OK;
    r->forward_status = EP_OK;
    r->forward_err = err;
    for (int first = 0, n; first < rows && status == EP_OK; first += n) {
        n = rows - first < r->opt.max_tokens_per_step ? rows - first : r->opt.max_tokens_per_step;
        memcpy(r->h, x + (size_t)first * hidden, (size_t)n * hidden * sizeof(float));
        r->n_rows = n;
        for (int i = 0; i < n; i++) {
            r->row_seq[i] = NULL;
            r->row_position[i] = first + i;
            r->row_out[i] = false;
        }
        r->counters.steps++;
        status = router_moe(r, layer);
        if (status != EP_OK) ep_fail(err, status, "layer %d: %s", layer, ep_status_name(status));
        if (status == EP_OK) status = r->forward_status;
        if (status != EP_OK) break;
        memcpy(y + (size_t)first * hidden, r->acc, (size_t)n * hidden * sizeof(float));
        if (experts != NULL)
            memcpy(experts + (size_t)first * k, r->experts, (size_t)n * k * sizeof(int32_t));
        if (weights != NULL)
            memcpy(weights + (size_t)first * k, r->weights, (size_t)n * k * sizeof(float));
    }
    r->n_rows = 0;
    r->forward_err = NULL;
    return status;
}

void router_shard_lost(router *r, int shard_i)
{
    if (shard_i >= 0 && shard_i < r->n_shards) r->shards[shard_i].lost = true;
}

const router_counters *router_counters_get(const router *r)
{
    return &r->counters;
}
