/*
 * layers: the transformer over the rows of a step, all but the experts themselves.
 *
 * Every row is computed on its own: norms, rotation and attention row by row, dense products by
 * kern_linear whose rows do not depend on each other. Keys and values of all rows of a step are
 * written before any row attends, and a row at position t reads positions 0..t. So the bits of a
 * row do not depend on how a prompt is cut into chunks, nor on its company. Nothing here branches
 * on the size of the batch.
 *
 * A row whose hidden state or gate logits are not finite fails its request and is computed on
 * unseen.
 */
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "router_node/internal.h"

static uint64_t ns_since(ep_time *mark)
{
    ep_time now = ep_now();
    uint64_t ns = (uint64_t)ep_time_diff_ns(now, *mark);
    *mark = now;
    return ns;
}

typedef struct row_job {
    router *r;
    int layer;
    _Atomic int next; /* item of attend_rows */
} row_job;

/* Work of some microseconds a row: for a few rows it is done before another thread has woken. */
enum { FEW_ROWS = 4 };

static void run_rows(const router *r, ep_pool_fn fn, row_job *job)
{
    ep_pool_run(r->n_rows < FEW_ROWS ? NULL : r->opt.pool, fn, job);
}

/* Rows i, i + n_threads, ... */
static void norm_rows(void *arg, int thread_i, int n_threads)
{
    row_job *job = arg;
    router *r = job->r;
    size_t hidden = (size_t)r->shape.hidden;
    const router_layer *layer = &r->w.layers[job->layer];
    for (int i = thread_i; i < r->n_rows; i += n_threads)
        kern_rms_norm(r->h + (size_t)i * hidden, r->x + (size_t)i * hidden, layer->attn_norm,
                      r->shape.hidden, r->shape.rms_eps);
}

static void ffn_norm_rows(void *arg, int thread_i, int n_threads)
{
    row_job *job = arg;
    router *r = job->r;
    size_t hidden = (size_t)r->shape.hidden;
    const router_layer *layer = &r->w.layers[job->layer];
    for (int i = thread_i; i < r->n_rows; i += n_threads) {
        kern_add(r->x + (size_t)i * hidden, r->acc + (size_t)i * hidden, r->shape.hidden);
        kern_rms_norm(r->h + (size_t)i * hidden, r->x + (size_t)i * hidden, layer->ffn_norm,
                      r->shape.hidden, r->shape.rms_eps);
    }
}

static void head_norm_rope(const router *r, float *x, int n_heads, const float *norm, int position)
{
    int dim = r->shape.head_dim;
    const float *cos_sin = r->w.rope + (size_t)position * (size_t)r->shape.rope_dim;
    for (int i = 0; i < n_heads; i++, x += dim) {
        kern_rms_norm(x, x, norm, dim, r->shape.rms_eps);
        kern_rope(x, cos_sin, r->shape.rope_dim);
    }
}

/* Norm and rotation of q and k, and k and v into the cache. */
static void cache_rows(void *arg, int thread_i, int n_threads)
{
    row_job *job = arg;
    router *r = job->r;
    const router_layer *layer = &r->w.layers[job->layer];
    size_t q_dim = (size_t)r->shape.n_heads * (size_t)r->shape.head_dim, kv_dim = r->kv.stride / 2;
    size_t dim = (size_t)r->shape.head_dim, block = dim * ROUTER_PAGE_TOKENS;
    for (int i = thread_i; i < r->n_rows; i += n_threads) {
        int t = r->row_position[i];
        float *k = r->k + (size_t)i * kv_dim;
        head_norm_rope(r, r->q + (size_t)i * q_dim, r->shape.n_heads, layer->q_norm, t);
        head_norm_rope(r, k, r->shape.n_kv_heads, layer->k_norm, t);
        float *to = r->row_seq[i]->pages[t / ROUTER_PAGE_TOKENS] +
                    (size_t)job->layer * r->kv.layer_floats +
                    (size_t)(t % ROUTER_PAGE_TOKENS) * dim;
        const float *v = r->v + (size_t)i * kv_dim;
        for (size_t at = 0; at < kv_dim; at += dim, to += 2 * block) {
            memcpy(to, k + at, dim * sizeof(float));
            memcpy(to + block, v + at, dim * sizeof(float));
        }
    }
}

/* Heads of one row that are computed together: all that share keys and values, or fewer when there
 * would not be work for every thread. */
static int heads_together(const router *r)
{
    int n = r->shape.n_heads / r->shape.n_kv_heads;
    while (n % 2 == 0 && r->n_rows * (r->shape.n_heads / n) < 2 * r->n_threads)
        n /= 2;
    return n;
}

/* Key head by key head over all rows, so that what one row read from memory the next finds near. */
static void attend_rows(void *arg, int thread_i, int n_threads)
{
    row_job *job = arg;
    router *r = job->r;
    const model_shape *s = &r->shape;
    (void)n_threads;
    int group = s->n_heads / s->n_kv_heads, together = heads_together(r);
    int n_items = r->n_rows * (s->n_heads / together), item;
    size_t dim = (size_t)s->head_dim, block = dim * ROUTER_PAGE_TOKENS;
    float *scores =
        r->scores + (size_t)thread_i * (size_t)group * kern_attn_scores(r->page_positions);
    while ((item = atomic_fetch_add(&job->next, 1)) < n_items) {
        int row = item % r->n_rows, head = item / r->n_rows * together;
        size_t at = ((size_t)row * (size_t)s->n_heads + (size_t)head) * dim;
        size_t off = (size_t)job->layer * r->kv.layer_floats + (size_t)(head / group) * 2 * block;
        kern_attn_args a = {
            .q = r->q + at,
            .pages = r->row_seq[row]->pages,
            .page_tokens = ROUTER_PAGE_TOKENS,
            .n_pos = r->row_position[row] + 1,
            .dim = s->head_dim,
            .stride = dim,
            .k_off = off,
            .v_off = off + block,
            .scale = (float)(1.0 / sqrt((double)s->head_dim)),
        };
        kern_attn_heads(r->att + at, &a, together, scores);
    }
}

/* acc = attention(norm(x)); then x += acc and h = norm(x) for what follows. */
static void attention(router *r, int layer_i)
{
    const router_layer *w = &r->w.layers[layer_i];
    ep_pool *pool = r->opt.pool;
    size_t hidden = (size_t)r->shape.hidden, kv_dim = r->kv.stride / 2;
    size_t q_dim = (size_t)r->shape.n_heads * (size_t)r->shape.head_dim;
    row_job job = {.r = r, .layer = layer_i};
    run_rows(r, norm_rows, &job);
    kern_linear(pool, &w->q, r->h, hidden, r->n_rows, r->q, q_dim, r->scratch);
    kern_linear(pool, &w->k, r->h, hidden, r->n_rows, r->k, kv_dim, r->scratch);
    kern_linear(pool, &w->v, r->h, hidden, r->n_rows, r->v, kv_dim, r->scratch);
    run_rows(r, cache_rows, &job);
    ep_pool_run(pool, attend_rows, &job);
    kern_linear(pool, &w->o, r->att, q_dim, r->n_rows, r->acc, hidden, r->scratch);
    run_rows(r, ffn_norm_rows, &job);
}

static bool is_finite_row(const float *x, int n)
{
    bool ok = true;
    for (int i = 0; i < n; i++)
        ok &= isfinite(x[i]) != 0;
    return ok;
}

static void gate_rows(void *arg, int thread_i, int n_threads)
{
    router *r = ((row_job *)arg)->r;
    size_t n_experts = (size_t)r->shape.n_experts, hidden = (size_t)r->shape.hidden;
    for (int i = thread_i; i < r->n_rows; i += n_threads) {
        int32_t *experts = r->experts + (size_t)i * (size_t)r->top_k;
        float *weights = r->weights + (size_t)i * (size_t)r->top_k;
        if (!r->row_out[i] && is_finite_row(r->h + (size_t)i * hidden, r->shape.hidden) &&
            router_gate_row(&r->gate, r->gate_logits + (size_t)i * n_experts, experts, weights))
            continue;
        for (int slot = 0; slot < r->top_k; slot++)
            experts[slot] = -1, weights[slot] = 0.0f;
    }
}

static void choose_experts(router *r, int layer)
{
    int n_experts = r->shape.n_experts, hidden = r->shape.hidden;
    row_job job = {.r = r, .layer = layer};
    kern_linear(r->opt.pool, &r->w.layers[layer].gate, r->h, (size_t)hidden, r->n_rows,
                r->gate_logits, (size_t)n_experts, r->scratch);
    run_rows(r, gate_rows, &job);
    for (int i = 0; i < r->n_rows; i++) {
        int32_t *experts = r->experts + (size_t)i * (size_t)r->top_k;
        if (!r->row_out[i] && experts[0] >= 0) continue;
        for (int slot = 0; slot < r->top_k; slot++) /* a row before may have failed this one */
            experts[slot] = -1, r->weights[(size_t)i * (size_t)r->top_k + (size_t)slot] = 0.0f;
        if (r->row_out[i]) continue;
        r->counters.non_finite_rows++;
        char text[160];
        snprintf(text, sizeof(text),
                 "layer %d, position %d: the gate sees a number that is not finite", layer,
                 r->row_position[i]);
        router_row_fail(r, i, EP_ERR_INVALID, text);
    }
}

static void combine_rows(void *arg, int thread_i, int n_threads)
{
    router *r = ((row_job *)arg)->r;
    int first = (int)((int64_t)r->n_rows * thread_i / n_threads);
    int last = (int)((int64_t)r->n_rows * (thread_i + 1) / n_threads);
    router_plan_combine(&r->plan, r->reply_row, r->weights, r->shape.hidden, r->row_out, first,
                        last, r->acc);
}

ep_status router_moe(router *r, int layer)
{
    router_layer_counters *c = &r->counters.layers[layer];
    ep_time mark = ep_now();
    choose_experts(r, layer);
    c->gate_ns += ns_since(&mark);

    ep_status status = router_plan_make(&r->plan, r->opt.placement, r->experts, r->n_rows,
                                        r->row_out, r->slice_rows);
    if (status != EP_OK) return status;
    uint64_t *rows = r->counters.expert_rows + (size_t)layer * (size_t)r->shape.n_experts;
    for (int i = 0; i < r->plan.n_pairs; i++)
        rows[r->experts[r->plan.pair_choice[i]]]++;
    c->rows += (uint64_t)r->plan.n_rows;
    c->plan_ns += ns_since(&mark);

    status = router_exchange(r, layer); /* counts its own time */
    if (status == EP_OK) {
        mark = ep_now();
        row_job job = {.r = r, .layer = layer};
        run_rows(r, combine_rows, &job);
        c->combine_ns += ns_since(&mark);
    }
    router_exchange_end(r);
    return status;
}

static void add_rows(void *arg, int thread_i, int n_threads)
{
    router *r = ((row_job *)arg)->r;
    size_t hidden = (size_t)r->shape.hidden;
    for (int i = thread_i; i < r->n_rows; i += n_threads)
        kern_add(r->x + (size_t)i * hidden, r->acc + (size_t)i * hidden, r->shape.hidden);
}

ep_status router_layers(router *r)
{
    int hidden = r->shape.hidden;
    for (int i = 0; i < r->n_rows; i++)
        router_weights_embed(r->m, r->row_seq[i]->tokens[r->row_position[i]],
                             r->x + (size_t)i * (size_t)hidden);
    for (int layer = 0; layer < r->shape.n_layers; layer++) {
        ep_time mark = ep_now();
        attention(r, layer);
        r->counters.layers[layer].attention_ns += ns_since(&mark);
        ep_status status = router_moe(r, layer);
        if (status != EP_OK) return status;
        row_job job = {.r = r, .layer = layer};
        run_rows(r, add_rows, &job);
        if (r->opt.tap.moe != NULL)
            r->opt.tap.moe(r->opt.tap.arg, layer, r->n_rows, r->row_request, r->row_position, r->h,
                           r->experts, r->weights, r->top_k, r->x);
    }
    return EP_OK;
}

/* ---- head ---------------------------------------------------------------------------------------
 */

static bool is_end(const router *r, int32_t token)
{
    for (int i = 0; i < r->opt.n_end_ids; i++)
        if (r->end_ids[i] == token) return true;
    return false;
}

static ep_status score(router *r, router_sequence *q, int position, const float *logits)
{
    router_event e = {.kind = ROUTER_EVENT_SCORE,
                      .request = q->req.id,
                      .token = q->tokens[position + 1],
                      .position = position + 1};
    ep_status status = router_logprobs(logits, r->shape.vocab, e.token, &e.logprob, NULL, 0);
    if (status == EP_OK) r->opt.on_event(r->opt.event_arg, &e);
    return status;
}

static ep_status next_token(router *r, router_sequence *q, const float *logits)
{
    router_event e = {.kind = ROUTER_EVENT_TOKEN,
                      .request = q->req.id,
                      .position = q->n_tokens,
                      .top = r->top,
                      .n_top = q->req.n_logprobs};
    ep_status status =
        router_sample(&q->req.sampling, logits, r->shape.vocab, q->tokens, (size_t)q->n_tokens,
                      (uint64_t)q->n_tokens, r->sample_scratch, &e.token);
    if (status == EP_OK && e.n_top > 0) /* a pass over the vocabulary: only for who asked */
        status = router_logprobs(logits, r->shape.vocab, e.token, &e.logprob, r->top, e.n_top);
    if (status != EP_OK) return status;

    q->tokens[q->n_tokens++] = e.token;
    if (q->n_generated++ == 0) q->first_token = ep_now();
    r->opt.on_event(r->opt.event_arg, &e);
    if (!q->req.ignore_end && is_end(r, e.token))
        router_sequence_done(r, q, ROUTER_FINISH_STOP);
    else if (q->n_generated == q->req.max_tokens)
        router_sequence_done(r, q, ROUTER_FINISH_LENGTH);
    return EP_OK;
}

/* What a row's logits are for. */
static void use_logits(router *r, int row, const float *logits)
{
    router_sequence *q = r->row_seq[row];
    int position = r->row_position[row];
    if (q->ended) return;
    if (r->opt.tap.logits != NULL) r->opt.tap.logits(r->opt.tap.arg, q->req.id, position, logits);
    ep_status status = EP_OK;
    if (q->req.score_from > 0 && position + 1 >= q->req.score_from &&
        position + 1 < q->req.n_prompt)
        status = score(r, q, position, logits);
    ep_time mark = ep_now();
    if (status == EP_OK && position == q->n_tokens - 1 && q->req.max_tokens > 0)
        status = next_token(r, q, logits);
    r->counters.sample_ns += ns_since(&mark);
    if (status == EP_OK) return;
    char text[160];
    snprintf(text, sizeof(text), "position %d: the logits hold a number that is not finite",
             position);
    r->counters.non_finite_rows++;
    router_sequence_fail(r, q, status, text);
}

ep_status router_head(router *r, int n_head)
{
    int hidden = r->shape.hidden, vocab = r->shape.vocab;
    for (int first = 0; first < n_head; first += r->head_rows) {
        int n = n_head - first < r->head_rows ? n_head - first : r->head_rows;
        ep_time mark = ep_now();
        for (int i = 0; i < n; i++)
            kern_rms_norm(r->head_in + (size_t)i * (size_t)hidden,
                          r->x + (size_t)r->head_list[first + i] * (size_t)hidden, r->w.output_norm,
                          hidden, r->shape.rms_eps);
        kern_linear(r->opt.pool, &r->w.head, r->head_in, (size_t)hidden, n, r->logits,
                    (size_t)vocab, r->scratch);
        r->counters.head_ns += ns_since(&mark);
        for (int i = 0; i < n; i++)
            use_logits(r, r->head_list[first + i], r->logits + (size_t)i * (size_t)vocab);
    }
    return EP_OK;
}
