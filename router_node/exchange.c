/*
 * exchange: one layer's rows to the shards and their answers back.
 *
 *  1. A slice has a sequence number, used once; its reply and its re-sends repeat it. Its bytes are
 * written anew from the plan for each send, so nothing is kept but the rows themselves, and serving
 * it twice is harmless.
 *  2. A slice is due at first, and again when its shard has not answered within per_layer_ms,
 * refused it, or sent something unreadable. No credit or no buffer leaves it due.
 *  3. After layer_tries sends without an answer its shard counts as silent: the requests with a row
 * in the slice fail, naming shard, rank and layer; others go on. A silent shard is tried again
 * after a pause and is well again with the first message that can be read. A shard that the control
 * plane calls lost is not asked any more.
 *  4. Answers are taken in any order. One nobody waits for (late, or a second copy) is dropped and
 *     counted. Others are held, and used where they lie, up to a quarter of the transport's buffers
 * less one: sends may take three quarters, and one is always left to receive with. Rows of those
 * beyond are copied.
 *  5. Every wait ends at the earliest of: the next re-send, the earliest deadline of a request in
 * the step, 200 ms (tick). Requests that expire end at once; a slice that only they needed is
 *     abandoned, its answer will be late.
 */
#include <stdio.h>
#include <string.h>

#include "router_node/internal.h"

#define TICK_MS  200
#define PAUSE_MS 1 /* until a slice that found no credit is offered again */

typedef struct exchange {
    router *r;
    int layer, n_open;
    uint64_t first_sequence;
    kern_act form;
    size_t row_bytes;
    const uint8_t *rows;
} exchange;

static ep_time earlier(ep_time a, ep_time b)
{
    return a.ns < b.ns ? a : b;
}

static int rank_of(const router *r, int shard)
{
    return r->opt.first_shard_rank + shard;
}

static void close_slice(exchange *x, int i)
{
    x->r->slices[i].state = SLICE_DONE;
    x->n_open--;
}

/* Rule 3: the rows of a slice cannot be had. */
static void give_up(exchange *x, int i, const char *why)
{
    router *r = x->r;
    const router_plan_slice *s = &r->plan.slices[i];
    char text[256];
    snprintf(text, sizeof(text), "layer %d: shard %d (rank %d) %s", x->layer, s->shard_i,
             rank_of(r, s->shard_i), why);
    close_slice(x, i);
    for (int row = 0; row < s->n_rows; row++)
        router_row_fail(r, r->plan.row_token[s->row_first + row], EP_ERR_PEER_LOST, text);
}

static void give_up_silent(exchange *x, int i, ep_time now)
{
    router *r = x->r;
    router_slice *slice = &r->slices[i];
    router_shard *shard = &r->shards[r->plan.slices[i].shard_i];
    char why[128];
    if (slice->why != WIRE_WHY_NONE) {
        snprintf(why, sizeof(why), "gave no usable answer to %d sends, the last one: %s",
                 slice->sends, wire_reason_name(slice->why));
    } else {
        if (!shard->silent)
            log_warn("layer %d: shard %d (rank %d) did not answer %d sends, each within %d ms",
                     x->layer, r->plan.slices[i].shard_i, rank_of(r, r->plan.slices[i].shard_i),
                     slice->sends, r->opt.per_layer_ms);
        shard->silent = true;
        shard->retry_at = ep_time_after_ms(now, (int64_t)r->opt.per_layer_ms * r->opt.layer_tries);
        snprintf(why, sizeof(why), "did not answer %d sends, each within %d ms", slice->sends,
                 r->opt.per_layer_ms);
    }
    give_up(x, i, why);
}

static void fill(const exchange *x, int i, net_buf *b)
{
    const router *r = x->r;
    const router_plan_slice *s = &r->plan.slices[i];
    uint32_t hidden = (uint32_t)r->shape.hidden, n_rows = (uint32_t)s->n_rows;
    size_t rows_at = wire_slice_rows_at(), pairs_at = wire_slice_pairs_at(x->form, hidden, n_rows);
    uint8_t *to = b->data + rows_at;
    for (int row = 0; row < s->n_rows; row++, to += x->row_bytes)
        memcpy(to, x->rows + (size_t)r->plan.row_token[s->row_first + row] * x->row_bytes,
               x->row_bytes);
    memset(to, 0, (size_t)(b->data + pairs_at - to)); /* padding is part of the checksum */
    for (int p = 0; p < s->n_pairs; p++) {
        int choice = r->plan.pair_choice[s->pair_first + p];
        wire_put_pair(b->data + pairs_at, (uint32_t)p,
                      (wire_pair){.row = (uint32_t)r->plan.pair_row[s->pair_first + p],
                                  .expert = (uint16_t)r->experts[choice],
                                  .slot = (uint16_t)(choice % r->top_k)});
    }
    b->len = wire_slice_bytes(x->form, hidden, n_rows, (uint32_t)s->n_pairs);
    wire_header h = {.kind = WIRE_SLICE,
                     .epoch = r->opt.placement->epoch,
                     .router = (uint16_t)r->opt.router_i,
                     .shard = (uint16_t)s->shard_i,
                     .step = r->counters.steps,
                     .sequence = x->first_sequence + (uint64_t)i,
                     .layer = (uint16_t)x->layer,
                     .form = (uint16_t)x->form,
                     .n_rows = n_rows,
                     .n_pairs = (uint32_t)s->n_pairs,
                     .hidden = hidden};
    wire_seal_on(r->opt.pool, b->data, b->len, &h);
}

/* Rule 2. False when the transport has no room now. */
static bool send_slice(exchange *x, int i, ep_time now)
{
    router *r = x->r;
    const router_plan_slice *s = &r->plan.slices[i];
    router_slice *slice = &r->slices[i];
    size_t bytes = wire_slice_bytes(x->form, (uint32_t)r->shape.hidden, (uint32_t)s->n_rows,
                                    (uint32_t)s->n_pairs);
    net_buf *b = net_take(r->opt.n, bytes);
    if (b == NULL) return false;
    fill(x, i, b);
    ep_status status = net_send(r->opt.n, rank_of(r, s->shard_i), b);
    if (status == EP_AGAIN) {
        net_give(r->opt.n, b);
        return false;
    }
    if (status != EP_OK) {
        give_up(x, i, "is lost to the transport");
        return true;
    }
    router_layer_counters *c = &r->counters.layers[x->layer];
    c->bytes_out += bytes;
    slice->sends++;
    if (slice->first_sent.ns == 0) {
        slice->first_sent = now;
        c->slices++;
    } else {
        c->resent++;
    }
    slice->why = WIRE_WHY_NONE;
    slice->state = SLICE_SENT;
    slice->resend_at = ep_time_after_ms(now, r->opt.per_layer_ms);
    return true;
}

/* Makes a slice due again, or gives it up when its tries are used. */
static void send_again(exchange *x, int i, ep_time now)
{
    if (x->r->slices[i].sends >= x->r->opt.layer_tries)
        give_up_silent(x, i, now);
    else
        x->r->slices[i].state = SLICE_DUE;
}

/* Sends what is due. Returns when to look again. */
static ep_time push(exchange *x, ep_time now)
{
    router *r = x->r;
    ep_time next = EP_TIME_NEVER;
    for (int i = 0; i < r->plan.n_slices; i++) {
        router_slice *slice = &r->slices[i];
        router_shard *shard = &r->shards[r->plan.slices[i].shard_i];
        if (slice->state == SLICE_DONE) continue;
        if (shard->lost) {
            give_up(x, i, "is lost");
            continue;
        }
        if (shard->silent && !ep_time_is_past(shard->retry_at, now) && slice->sends == 0) {
            give_up(x, i, "has stopped answering");
            continue;
        }
        if (ep_time_is_past(slice->resend_at, now)) {
            /* A slice that could not even be sent in all that time counts as a try. */
            if (slice->state == SLICE_DUE) slice->sends++;
            slice->resend_at = ep_time_after_ms(now, r->opt.per_layer_ms);
            send_again(x, i, now);
            if (slice->state == SLICE_DONE) continue;
        }
        if (slice->state == SLICE_DUE && !send_slice(x, i, now))
            next = earlier(next, ep_time_after_ms(now, PAUSE_MS));
        if (slice->state != SLICE_DONE) next = earlier(next, slice->resend_at);
    }
    return next;
}

/* Found before or by the checksum, here or at the shard: no field of that header can be believed.
 */
static bool is_unreadable(wire_reason why)
{
    return why <= WIRE_WHY_KIND || why == WIRE_WHY_COUNT;
}

/* A message that says nothing usable, from a shard's rank. */
static void take_bad(exchange *x, int shard, const wire_header *h, wire_reason why, ep_time now)
{
    router *r = x->r;
    uint64_t i = h->sequence - x->first_sequence;
    if (h->sequence >= x->first_sequence && i < (uint64_t)r->plan.n_slices &&
        r->plan.slices[i].shard_i == shard && r->slices[i].state == SLICE_SENT) {
        r->slices[i].why = why;
        send_again(x, (int)i, now);
        return;
    }
    if (!is_unreadable(why)) return;             /* about a slice that nobody waits for */
    for (int s = 0; s < r->plan.n_slices; s++) { /* could be any of that shard's */
        if (r->plan.slices[s].shard_i != shard || r->slices[s].state != SLICE_SENT) continue;
        r->slices[s].why = why;
        send_again(x, s, now);
    }
}

static bool is_reply_to(const exchange *x, int i, int shard, const wire_header *h)
{
    const router *r = x->r;
    const router_plan_slice *s = &r->plan.slices[i];
    return s->shard_i == shard && h->shard == shard && h->router == r->opt.router_i &&
           h->layer == x->layer && h->epoch == r->opt.placement->epoch &&
           h->n_pairs == (uint32_t)s->n_pairs && h->hidden == (uint32_t)r->shape.hidden;
}

/* Megabytes of rows: each thread copies a stretch. */
enum { COPY_ALONE = 1 << 20 };

typedef struct copy_job {
    float *to;
    const float *from;
    size_t n_rows, row_bytes;
} copy_job;

static void copy_rows(void *arg, int thread_i, int n_threads)
{
    const copy_job *c = arg;
    size_t i = (size_t)thread_i, n = (size_t)n_threads;
    size_t first = c->n_rows * i / n * c->row_bytes, last = c->n_rows * (i + 1) / n * c->row_bytes;
    memcpy((char *)c->to + first, (const char *)c->from + first, last - first);
}

/* Where the rows of a slice lie from now on. True: in b, which is held. */
static bool place_rows(router *r, const router_plan_slice *s, net_buf *b, const wire_header *h)
{
    const bool holds = r->n_held < r->max_held;
    const size_t row = (size_t)r->shape.hidden;
    const float *from = wire_reply_rows(b->data, h);
    if (holds) {
        r->held[r->n_held++] = b;
    } else {
        copy_job copy = {r->replies + (size_t)s->pair_first * row, from, (size_t)s->n_pairs,
                         row * sizeof(float)};
        ep_pool_run(copy.n_rows * copy.row_bytes < COPY_ALONE ? NULL : r->opt.pool, copy_rows,
                    &copy);
        from = copy.to;
    }
    for (int p = 0; p < s->n_pairs; p++)
        r->reply_row[s->pair_first + p] = from + (size_t)p * row;
    return holds;
}

/* True: the buffer is held. */
static bool take_reply(exchange *x, int shard, net_buf *b, const wire_header *h, ep_time now)
{
    router *r = x->r;
    uint64_t i = h->sequence - x->first_sequence;
    if (h->sequence < x->first_sequence || i >= (uint64_t)r->plan.n_slices ||
        r->slices[i].state == SLICE_DONE) { /* rule 4 */
        r->counters.late_replies++;
        return false;
    }
    if (!is_reply_to(x, (int)i, shard, h)) {
        r->counters.bad_replies++;
        take_bad(x, shard, h, WIRE_WHY_COUNT, now);
        return false;
    }
    bool holds = place_rows(r, &r->plan.slices[i], b, h);
    r->counters.layers[x->layer].bytes_in += b->len;
    r->counters.shard_slices[shard]++;
    r->counters.shard_wait_ns[shard] += (uint64_t)ep_time_diff_ns(now, r->slices[i].first_sent);
    close_slice(x, (int)i);
    return holds;
}

/* True: the buffer is held. */
static bool take_message(exchange *x, net_buf *b, ep_time now)
{
    router *r = x->r;
    int shard = b->peer - r->opt.first_shard_rank;
    wire_header h;
    wire_reason why;
    ep_status status = wire_open_on(r->opt.pool, b->data, b->len, &h, &why);
    if (shard < 0 || shard >= r->n_shards) { /* other routers have nothing to say to us */
        r->counters.bad_replies++;
        return false;
    }
    if (status != EP_OK) {
        r->counters.bad_replies++;
        take_bad(x, shard, &h, why, now);
        return false;
    }
    if (r->shards[shard].silent) log_info("shard %d (rank %d) answers again", shard, b->peer);
    r->shards[shard].silent = false;
    if (h.kind == WIRE_REPLY) return take_reply(x, shard, b, &h, now);
    if (h.kind == WIRE_ERROR) {
        r->counters.error_replies++;
        take_bad(x, shard, &h, h.reason < WIRE_N_REASONS ? (wire_reason)h.reason : WIRE_WHY_KIND,
                 now);
    } else if (h.kind != WIRE_HELLO) {
        r->counters.bad_replies++;
    }
    return false;
}

static void take_messages(exchange *x)
{
    net_buf *b;
    while (net_next(x->r->opt.n, &b) == EP_OK)
        if (!take_message(x, b, ep_now())) net_give(x->r->opt.n, b);
}

/* Rule 5: slices of which every row has failed. */
static void abandon(exchange *x)
{
    router *r = x->r;
    for (int i = 0; i < r->plan.n_slices; i++) {
        const router_plan_slice *s = &r->plan.slices[i];
        if (r->slices[i].state == SLICE_DONE) continue;
        bool needed = false;
        for (int row = 0; row < s->n_rows && !needed; row++)
            needed = !r->row_out[r->plan.row_token[s->row_first + row]];
        if (!needed) close_slice(x, i);
    }
}

/* Expired and cancelled requests end now, with the name of a shard that is being waited for. */
static ep_time expire(exchange *x, ep_time now)
{
    router *r = x->r;
    char where[128] = "";
    for (int i = 0; i < r->plan.n_slices; i++) {
        if (r->slices[i].state == SLICE_DONE) continue;
        int shard = r->plan.slices[i].shard_i;
        snprintf(where, sizeof(where), " while layer %d waited for shard %d (rank %d)", x->layer,
                 shard, rank_of(r, shard));
        break;
    }
    ep_time next = router_expire(r, now, where);
    abandon(x);
    return next;
}

/* Rows for the wire, and rows from it, are spread over the pool when there are more than a few:
 * quantising and copying megabytes on one thread is time that the other has nothing to do. */
enum { FEW_ROWS = 4 };

typedef struct conversion {
    router *r;
    kern_act form;
    size_t row_bytes;
} conversion;

static void convert_rows(void *arg, int thread_i, int n_threads)
{
    const conversion *c = arg;
    router *r = c->r;
    size_t hidden = (size_t)r->shape.hidden;
    int first = (int)((int64_t)r->n_rows * thread_i / n_threads);
    int last = (int)((int64_t)r->n_rows * (thread_i + 1) / n_threads);
    kern_act_rows(c->form, r->act + (size_t)first * c->row_bytes, r->h + (size_t)first * hidden,
                  hidden, last - first, r->shape.hidden);
}

static const uint8_t *convert(router *r, kern_act form, size_t *row_bytes)
{
    *row_bytes = kern_act_row_bytes(form, r->shape.hidden);
    if (form == KERN_ACT_F32) return (const uint8_t *)r->h;
    conversion c = {.r = r, .form = form, .row_bytes = *row_bytes};
    ep_pool_run(r->n_rows < FEW_ROWS ? NULL : r->opt.pool, convert_rows, &c);
    return r->act;
}

ep_status router_exchange(router *r, int layer)
{
    router_layer_counters *c = &r->counters.layers[layer];
    ep_time start = ep_now();
    exchange x = {.r = r,
                  .layer = layer,
                  .n_open = r->plan.n_slices,
                  .first_sequence = r->next_sequence,
                  .form = r->w.layers[layer].form};
    if (x.n_open == 0) return EP_OK;
    r->next_sequence += (uint64_t)x.n_open;
    x.rows = convert(r, x.form, &x.row_bytes);
    for (int i = 0; i < x.n_open; i++)
        r->slices[i] = (router_slice){.state = SLICE_DUE,
                                      .resend_at = ep_time_after_ms(start, r->opt.per_layer_ms)};
    ep_time next = push(&x, start), now = ep_now();
    c->scatter_ns += (uint64_t)ep_time_diff_ns(now, start);

    while (x.n_open > 0) {
        take_messages(&x);
        if (x.n_open == 0) break;
        next = push(&x, ep_now());
        next = earlier(next, expire(&x, ep_now()));
        if (x.n_open == 0) break;
        ep_time at_most = ep_time_after_ms(ep_now(), TICK_MS);
        ep_status status = net_wait(r->opt.n, earlier(next, at_most));
        if (status != EP_OK && status != EP_AGAIN) return status;
        if (r->opt.tick != NULL) r->opt.tick(r->opt.tick_arg);
    }
    c->wait_ns += (uint64_t)ep_time_diff_ns(ep_now(), now);
    return EP_OK;
}

void router_exchange_end(router *r)
{
    while (r->n_held > 0)
        net_give(r->opt.n, r->held[--r->n_held]);
}

void router_exchange_drain(router *r)
{
    exchange x = {.r = r, .first_sequence = r->next_sequence};
    r->plan.n_slices = 0; /* nothing is open: whatever comes is late */
    take_messages(&x);
}
