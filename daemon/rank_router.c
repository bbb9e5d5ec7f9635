/*
 * The router role: requests from the daemon into the engine, the engine's events back as messages,
 * the tensor service between steps. Everything here runs on the engine's thread.
 */
#include "daemon/data_server.h"
#include "daemon/rank.h"
#include "daemon/rank_stats.h"
#include "kernels/kernels.h"
#include "router_node/router.h"

#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <arpa/inet.h>
#include <unistd.h>

enum {
    MAX_DEFERRED = 1024,
    MAX_TOP = 20,
    SCORES_BATCH = 256,
    IDLE_MS = 200,
    MAX_FORWARD_ROWS = 1 << 16
};

typedef struct role {
    rank *r;
    router *ro;
    data_server *data;
    bool draining;
    rank_item *deferred[MAX_DEFERRED]; /* came during a step, for after it */
    int n_deferred;
    /* Scores of one request, sent in batches. */
    uint64_t scores_of;
    uint32_t score_position[SCORES_BATCH];
    double score_logprob[SCORES_BATCH];
    int n_scores;
} role;

/* ---- events of the engine ---- */

static void flush_scores(role *me)
{
    if (me->n_scores == 0) return;
    Moed__Scores s = MOED__SCORES__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    s.id = me->scores_of;
    s.n_position = s.n_logprob = (size_t)me->n_scores;
    s.position = me->score_position;
    s.logprob = me->score_logprob;
    e.body_case = MOED__ENVELOPE__BODY_SCORES;
    e.scores = &s;
    uplink_send(me->r->up, &e);
    me->n_scores = 0;
}

static void add_score(role *me, const router_event *ev)
{
    if (me->n_scores == SCORES_BATCH || me->scores_of != ev->request) flush_scores(me);
    me->scores_of = ev->request;
    me->score_position[me->n_scores] = (uint32_t)ev->position;
    me->score_logprob[me->n_scores++] = ev->logprob;
}

static void send_token(role *me, const router_event *ev)
{
    Moed__Token t = MOED__TOKEN__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    Moed__TokenProb top[MAX_TOP], *top_p[MAX_TOP];
    t.id = ev->request;
    t.token = ev->token;
    t.position = (uint32_t)ev->position;
    t.logprob = ev->logprob;
    for (int i = 0; i < ev->n_top && i < MAX_TOP; i++) {
        moed__token_prob__init(&top[i]);
        top[i].id = ev->top[i].id;
        top[i].logprob = ev->top[i].logprob;
        top_p[i] = &top[i];
        t.n_top++;
    }
    t.top = top_p;
    e.body_case = MOED__ENVELOPE__BODY_TOKEN;
    e.token = &t;
    uplink_send(me->r->up, &e);
}

static void send_done(role *me, const router_event *ev)
{
    static char stop[] = "stop", length[] = "length";
    Moed__Done d = MOED__DONE__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    d.id = ev->request;
    d.finish = ev->finish == ROUTER_FINISH_STOP ? stop : length;
    d.n_prompt = (uint32_t)ev->n_prompt;
    d.n_generated = (uint32_t)ev->n_generated;
    d.queue_ns = (uint64_t)ev->queue_ns;
    d.prefill_ns = (uint64_t)ev->prefill_ns;
    d.decode_ns = (uint64_t)ev->decode_ns;
    e.body_case = MOED__ENVELOPE__BODY_DONE;
    e.done = &d;
    uplink_send(me->r->up, &e);
}

static void send_failed(role *me, uint64_t id, ep_status status, const char *text)
{
    char copy[512];
    Moed__Failed f = MOED__FAILED__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    snprintf(copy, sizeof(copy), "%s",
             text != NULL && text[0] != '\0' ? text : ep_status_name(status));
    f.id = id;
    f.status = status;
    f.text = copy;
    e.body_case = MOED__ENVELOPE__BODY_FAILED;
    e.failed = &f;
    uplink_send(me->r->up, &e);
}

static void on_event(void *arg, const router_event *ev)
{
    role *me = arg;
    if (ev->kind == ROUTER_EVENT_SCORE) {
        add_score(me, ev);
        return;
    }
    flush_scores(me);
    switch (ev->kind) {
    case ROUTER_EVENT_TOKEN:
        send_token(me, ev);
        break;
    case ROUTER_EVENT_DONE:
        send_done(me, ev);
        break;
    case ROUTER_EVENT_FAILED:
        send_failed(me, ev->request, ev->status, ev->text);
        break;
    case ROUTER_EVENT_SCORE:
        break;
    }
}

/* ---- the daemon's messages ---- */

static void submit(role *me, const Moed__RankRequest *q)
{
    router_request req = {.id = q->id,
                          .prompt = q->ids,
                          .n_prompt = (int)q->n_ids,
                          .max_tokens = (int)q->max_tokens,
                          .n_logprobs = (int)q->n_logprobs,
                          .ignore_end = q->ignore_eos,
                          .score_from = (int)q->score_from,
                          .deadline = ep_time_after_ms(ep_now(), q->deadline_ms)};
    if (q->sampling != NULL)
        req.sampling = (router_sampling){.temperature = q->sampling->temperature,
                                         .top_k = q->sampling->top_k,
                                         .top_p = q->sampling->top_p,
                                         .min_p = q->sampling->min_p,
                                         .repetition_penalty = q->sampling->repetition_penalty,
                                         .seed = q->sampling->seed};
    else
        req.sampling = (router_sampling){.top_p = 1.0f, .repetition_penalty = 1.0f};
    ep_err err = {""};
    ep_status status = me->draining ? ep_fail(&err, EP_ERR_BUSY, "the router is draining")
                                    : router_submit(me->ro, &req, &err);
    if (status != EP_OK) send_failed(me, q->id, status, err.text);
}

static float bf16_value(const uint8_t *p)
{
    uint32_t bits = ((uint32_t)p[0] | (uint32_t)p[1] << 8) << 16;
    float v;
    memcpy(&v, &bits, sizeof(v));
    return v;
}

/* Rounds to nearest even; a NaN stays one. */
static void put_bf16(uint8_t *p, float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof(bits));
    bits = (bits & 0x7fffffffu) > 0x7f800000u ? (bits | 0x400000u)
                                              : bits + 0x7fffu + ((bits >> 16) & 1);
    p[0] = (uint8_t)(bits >> 16);
    p[1] = (uint8_t)(bits >> 24);
}

static ep_status check_forward(const role *me, const Moed__Forward *f, size_t payload_bytes,
                               ep_err *err)
{
    const model_shape *s = &me->r->m->shape;
    size_t width = f->dtype == MOED__DTYPE__BF16 ? 2 : 4;
    if (f->dtype != MOED__DTYPE__BF16 && f->dtype != MOED__DTYPE__F32)
        return ep_fail(err, EP_ERR_INVALID, "dtype %d is neither F32 nor BF16", (int)f->dtype);
    if (f->layer >= (uint32_t)s->n_layers)
        return ep_fail(err, EP_ERR_INVALID, "layer %u: the model has %d layers", f->layer,
                       s->n_layers);
    if (f->hidden != (uint32_t)s->hidden)
        return ep_fail(err, EP_ERR_INVALID, "hidden is %u, the model's is %d", f->hidden,
                       s->hidden);
    if (f->rows == 0 || f->rows > MAX_FORWARD_ROWS)
        return ep_fail(err, EP_ERR_TOO_LARGE, "%u rows: between 1 and %d are possible", f->rows,
                       MAX_FORWARD_ROWS);
    if (payload_bytes != (size_t)f->rows * f->hidden * width)
        return ep_fail(err, EP_ERR_INVALID, "%zu payload bytes for %u x %u values", payload_bytes,
                       f->rows, f->hidden);
    return EP_OK;
}

/* Runs a Forward. *out is ep_alloc'ed: rows x hidden values in the request's dtype. */
static ep_status forward(role *me, const rank_item *item, uint8_t **out, size_t *out_bytes,
                         ep_err *err)
{
    const Moed__Forward *f = item->frame.envelope->forward;
    ep_status status = check_forward(me, f, item->frame.payload_bytes, err);
    if (status != EP_OK) return status;
    size_t n = (size_t)f->rows * f->hidden;
    bool bf16 = f->dtype == MOED__DTYPE__BF16;
    float *x = ep_alloc(n * sizeof(float)), *y = ep_alloc(n * sizeof(float));
    uint8_t *packed = bf16 ? ep_alloc(n * 2) : NULL;
    if (x == NULL || y == NULL || (bf16 && packed == NULL)) {
        status = ep_fail(err, EP_ERR_BUSY, "no memory for %u rows", f->rows);
        goto done;
    }
    if (bf16)
        for (size_t i = 0; i < n; i++)
            x[i] = bf16_value(item->frame.payload + 2 * i);
    else
        memcpy(x, item->frame.payload, n * sizeof(float));
    status = router_forward(me->ro, (int)f->layer, x, (int)f->rows, y, NULL, NULL, err);
    if (status != EP_OK) goto done;
    for (size_t i = 0; bf16 && i < n; i++)
        put_bf16(packed + 2 * i, y[i]);
    *out = bf16 ? packed : (uint8_t *)y;
    *out_bytes = n * (bf16 ? 2 : 4);
    if (bf16)
        packed = NULL;
    else
        y = NULL;
done:
    ep_free(x);
    ep_free(y);
    ep_free(packed);
    return status;
}

static void serve_forward(role *me, rank_item *item)
{
    const Moed__Forward *f = item->frame.envelope->forward;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    Moed__ForwardReply reply = MOED__FORWARD_REPLY__INIT;
    Moed__Failed failed = MOED__FAILED__INIT;
    ep_err err = {""};
    uint8_t *out = NULL;
    size_t out_bytes = 0;
    ep_status status = forward(me, item, &out, &out_bytes, &err);
    if (status == EP_OK) {
        reply.rows = f->rows;
        reply.hidden = f->hidden;
        reply.dtype = f->dtype;
        reply.top_k = (uint32_t)me->r->m->shape.top_k;
        e.body_case = MOED__ENVELOPE__BODY_FORWARD_REPLY;
        e.forward_reply = &reply;
    } else {
        failed.status = status;
        failed.text = err.text;
        e.body_case = MOED__ENVELOPE__BODY_FAILED;
        e.failed = &failed;
    }
    item->answer(item, &e, out, out_bytes);
    ep_free(out);
}

static void take_item(role *me, rank_item *item)
{
    const Moed__Envelope *e = item->frame.envelope;
    if (item->answer != NULL) {
        serve_forward(me, item);
        return;
    }
    switch (e->body_case) {
    case MOED__ENVELOPE__BODY_RANK_REQUEST:
        submit(me, e->rank_request);
        break;
    case MOED__ENVELOPE__BODY_CANCEL:
        router_cancel(me->ro, e->cancel->id);
        break;
    case MOED__ENVELOPE__BODY_STATS_QUERY:
        rank_stats_send_router(me->r, me->ro);
        break;
    case MOED__ENVELOPE__BODY_DRAIN:
        me->draining = true;
        break;
    case MOED__ENVELOPE__BODY_LOST: {
        int lost = (int)e->lost->rank, first = me->r->cfg->n_routers;
        if (lost < 0 || lost >= me->r->n_ranks) break;
        net_forget(me->r->n, lost);
        if (lost >= first) router_shard_lost(me->ro, lost - first);
        break;
    }
    default:
        log_warn("the daemon sent '%s', which a router does not know", proto_envelope_name(e));
    }
    rank_item_free(item);
}

/* While a step waits for shards: what must not wait until it ends. */
static void on_tick(void *arg)
{
    role *me = arg;
    void *got;
    while (me->n_deferred < MAX_DEFERRED && ep_queue_pop(me->r->in, &got) == EP_OK) {
        rank_item *item = got;
        Moed__Envelope__BodyCase body = item->frame.envelope->body_case;
        if (body == MOED__ENVELOPE__BODY_CANCEL || body == MOED__ENVELOPE__BODY_LOST)
            take_item(me, item);
        else
            me->deferred[me->n_deferred++] = item;
    }
}

/* Handling one may defer more (a Forward waits for shards too): they queue up behind. */
static void take_deferred(role *me)
{
    for (int i = 0; i < me->n_deferred; i++)
        take_item(me, me->deferred[i]);
    me->n_deferred = 0;
}

/* Until the queue is empty, or one Forward was served, so that tensor clients do not starve
 * generation. True if items may be left. */
static bool take_items(role *me)
{
    void *got;
    take_deferred(me);
    while (ep_queue_pop(me->r->in, &got) == EP_OK) {
        bool forward = ((rank_item *)got)->answer != NULL;
        take_item(me, got);
        take_deferred(me);
        if (forward) return true;
    }
    return false;
}

/* ---- the loop ---- */

static ep_status serve(role *me)
{
    rank *r = me->r;
    for (;;) {
        bool more = take_items(me);
        ep_status status = router_step(me->ro);
        if (status == EP_OK) continue;
        if (status != EP_AGAIN) return status;
        if (more) continue;
        if (me->draining && router_load(me->ro) == 0) return EP_OK;
        /* Nothing to compute: replies of slices nobody waits for are dropped here, or they would
         * pile up. */
        net_buf *late;
        while (net_next(r->n, &late) == EP_OK)
            net_give(r->n, late);
        net_wait(r->n, ep_time_after_ms(ep_now(), IDLE_MS));
    }
}

/* Where clients of the tensor service connect: beside the daemon's socket for one machine, else on
 * the address of this host. */
static void data_address(const rank *r, char *out, size_t out_bytes)
{
    if (config_is_local(r->cfg)) {
        snprintf(out, out_bytes, "unix:%s.r%d", r->cfg->front.socket, r->rank);
        return;
    }
    char host[256] = "localhost", ip[64] = "127.0.0.1";
    gethostname(host, sizeof(host) - 1);
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *list = NULL;
    if (getaddrinfo(host, NULL, &hints, &list) == 0) {
        struct sockaddr_in a;
        memcpy(&a, list->ai_addr, sizeof(a));
        inet_ntop(AF_INET, &a.sin_addr, ip, sizeof(ip));
        freeaddrinfo(list);
    }
    snprintf(out, out_bytes, "tcp:%s:0", ip);
}

static ep_status end_tokens(const rank *r, int32_t **ids, int *n, ep_err *err)
{
    model_tokenizer *t = NULL;
    ep_status status = model_tokenizer_open(&t, r->m, err);
    if (status != EP_OK) return status;
    int32_t *list = ep_alloc((size_t)model_n_tokens(t) * sizeof(*list));
    if (list == NULL) status = ep_fail(err, EP_ERR_NOMEM, "out of memory");
    for (int32_t i = 0; status == EP_OK && i < model_n_tokens(t); i++)
        if (model_is_end(t, i)) list[(*n)++] = i;
    model_tokenizer_close(t);
    *ids = list;
    return status;
}

static ep_status open_engine(role *me, ep_pool *pool, const int32_t *end_ids, int n_end,
                             ep_err *err)
{
    rank *r = me->r;
    const config *c = r->cfg;
    router_options opt = router_options_default();
    opt.m = r->m;
    opt.placement = &r->placement;
    opt.router_i = r->rank;
    opt.first_shard_rank = c->n_routers;
    opt.n = r->n;
    opt.pool = pool;
    opt.kv_tokens = r->self->kv_tokens;
    opt.max_tokens_per_step = c->limits.max_tokens_per_step;
    opt.prefill_chunk = c->limits.prefill_chunk;
    opt.max_sequences = c->limits.max_sequences;
    opt.max_waiting = 2 * c->limits.max_sequences + c->limits.max_queue; /* the daemon gives less */
    opt.per_layer_ms = c->limits.per_layer_ms;
    opt.layer_tries = c->limits.layer_tries;
    opt.top_k = c->limits.top_k;
    opt.end_ids = end_ids;
    opt.n_end_ids = n_end;
    opt.max_message = rank_max_message(r);
    opt.tick = on_tick;
    opt.tick_arg = me;
    opt.on_event = on_event;
    opt.event_arg = me;
    return router_open(&me->ro, &opt, err);
}

ep_status rank_router_run(rank *r, ep_err *err)
{
    role me = {.r = r};
    ep_pool *pool = NULL;
    int32_t *end_ids = NULL;
    int n_end = 0;
    char address[256];
    data_address(r, address, sizeof(address));
    rank_send_progress(r, 0, 1, "router weights");
    ep_status status = end_tokens(r, &end_ids, &n_end, err);
    if (status == EP_OK && r->self->threads > 1) {
        status = ep_pool_open(&pool, r->self->threads);
        if (status != EP_OK) ep_fail(err, status, "cannot start %d threads", r->self->threads);
    }
    /* A slice out and a reply in per shard, doubled for re-sends. */
    if (status == EP_OK)
        status = rank_open_net(r, rank_max_message(r), 4 * r->cfg->n_shards + 4, err);
    if (status == EP_OK) status = open_engine(&me, pool, end_ids, n_end, err);
    if (status == EP_OK) status = data_server_open(&me.data, address, r->in, err);
    if (status == EP_OK) {
        char describe[128];
        snprintf(describe, sizeof(describe), "cpu, %s, %d thread%s", kern_level(), r->self->threads,
                 r->self->threads == 1 ? "" : "s");
        rank_send_ready(r, describe, router_counters_get(me.ro)->weight_bytes,
                        data_server_address(me.data), (uint32_t)r->self->kv_tokens);
        status = serve(&me);
        if (status != EP_OK) ep_fail(err, status, "the engine ended: %s", ep_status_name(status));
    }
    if (status == EP_OK) {
        r->drained = true;
        rank_send_drained(r);
    }
    data_server_close(me.data);
    router_close(me.ro);
    ep_pool_close(pool);
    ep_free(end_ids);
    return status;
}
