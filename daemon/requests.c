/*
 * The journal: every request from its arrival to its last message. Admission is bounded; a request
 * waits until the job is ready and a router has room, and goes to the router with the most free KV
 * memory. Text is made here: bytes of a character that is not complete are held back until it is.
 *
 * A request leaves the journal exactly once, through `finish`.
 */
#include "daemon/up.h"

#include <stdio.h>
#include <string.h>

enum {
    GRACE_MS = 2000, /* past a deadline, for the router to say so itself */
    MAX_LOGPROBS = 20
};

static void unlink_request(up *u, request *q)
{
    if (q->prev != NULL)
        q->prev->next = q->next;
    else if (q->router < 0)
        u->waiting_first = q->next;
    else
        u->running = q->next;
    if (q->next != NULL)
        q->next->prev = q->prev;
    else if (q->router < 0)
        u->waiting_last = q->prev;
    if (q->router < 0)
        u->n_waiting--;
    else
        u->n_running--;
    q->next = q->prev = NULL;
}

static int64_t kv_need(const request *q)
{
    return (int64_t)q->n_prompt + q->max_tokens;
}

static void finish(up *u, request *q, bool ok)
{
    if (q->router >= 0) {
        u->ranks[q->router].running--;
        u->ranks[q->router].kv_used -= kv_need(q);
    }
    unlink_request(u, q);
    if (ok)
        u->completed++;
    else
        u->failed++;
    ep_free(q->ids);
    ep_free(q);
}

static void fail(up *u, request *q, ep_status status, const char *text)
{
    if (q->from != NULL) clients_send_failed(q->from, q->client_id, status, text);
    finish(u, q, false);
}

/* ---- arrival ---- */

static ep_status take_prompt(up *u, request *q, const Moed__Generate *g)
{
    if (!g->has_ids) {
        if (model_adds_bos(u->tokenizer) && model_bos(u->tokenizer) >= 0) {
            q->ids = ep_alloc(sizeof(*q->ids));
            if (q->ids == NULL) return EP_ERR_NOMEM;
            q->ids[0] = model_bos(u->tokenizer);
            q->n_ids = 1;
        }
        ep_status status = model_encode(u->tokenizer, (const char *)g->prompt.data, g->prompt.len,
                                        true, &q->ids, &q->n_ids);
        q->cap_ids = q->n_ids;
        return status;
    }
    q->ids = ep_alloc((g->n_prompt_ids ? g->n_prompt_ids : 1) * sizeof(*q->ids));
    if (q->ids == NULL) return EP_ERR_NOMEM;
    if (g->n_prompt_ids > 0) memcpy(q->ids, g->prompt_ids, g->n_prompt_ids * sizeof(*q->ids));
    q->n_ids = q->cap_ids = g->n_prompt_ids;
    return EP_OK;
}

/* What can be refused without asking a router. */
static ep_status check(const up *u, const request *q, ep_err *err)
{
    int64_t largest = 0;
    for (int i = 0; i < u->cfg->n_routers; i++)
        if (u->cfg->routers[i].kv_tokens > largest) largest = u->cfg->routers[i].kv_tokens;
    if (q->n_prompt == 0) return ep_fail(err, EP_ERR_INVALID, "the prompt is empty");
    for (size_t i = 0; i < q->n_prompt; i++)
        if (q->ids[i] < 0 || q->ids[i] >= u->m->shape.vocab)
            return ep_fail(err, EP_ERR_INVALID,
                           "token %d of the prompt is %d, the vocabulary has %d", (int)i, q->ids[i],
                           u->m->shape.vocab);
    if (q->n_logprobs > MAX_LOGPROBS)
        return ep_fail(err, EP_ERR_INVALID, "%u log probabilities per token: at most %d",
                       q->n_logprobs, MAX_LOGPROBS);
    if (q->score_from > q->n_prompt)
        return ep_fail(err, EP_ERR_INVALID, "scores from position %u on, the prompt has %zu tokens",
                       q->score_from, q->n_prompt);
    if (kv_need(q) > u->m->shape.context)
        return ep_fail(err, EP_ERR_TOO_LARGE,
                       "%zu prompt tokens and %u to generate exceed the context of %d", q->n_prompt,
                       q->max_tokens, u->m->shape.context);
    if (kv_need(q) > largest)
        return ep_fail(err, EP_ERR_TOO_LARGE,
                       "%zu prompt tokens and %u to generate exceed the KV cache of %lld",
                       q->n_prompt, q->max_tokens, (long long)largest);
    return EP_OK;
}

void requests_accept(up *u, client *c, const Moed__Generate *g)
{
    uint64_t number = c->n_requests++;
    if (u->state == UP_DRAINING) {
        clients_send_failed(c, number, EP_ERR_BUSY, "the daemon is draining");
        return;
    }
    if (u->n_waiting >= u->cfg->limits.max_queue) {
        clients_send_failed(c, number, EP_ERR_BUSY, "the queue is full");
        return;
    }
    request *q = ep_calloc(1, sizeof(*q));
    ep_status status = q != NULL ? take_prompt(u, q, g) : EP_ERR_NOMEM;
    if (status != EP_OK) {
        clients_send_failed(c, number, status, "the prompt cannot be taken");
        if (q != NULL) ep_free(q->ids);
        ep_free(q);
        return;
    }
    int64_t deadline_ms = (int64_t)u->cfg->limits.deadline_s * 1000;
    if (g->deadline_ms > 0 && g->deadline_ms < deadline_ms) deadline_ms = g->deadline_ms;
    moed__sampling__init(&q->sampling);
    q->sampling.top_p = q->sampling.repetition_penalty = 1.0f;
    if (g->sampling != NULL) {
        const ProtobufCMessage own = q->sampling.base;
        q->sampling = *g->sampling;
        q->sampling.base = own; /* fields this version does not know stay with the frame */
    }
    q->id = ++u->next_request;
    q->client_id = number;
    q->from = c;
    q->n_prompt = q->n_ids;
    q->max_tokens = g->max_tokens;
    q->n_logprobs = g->n_logprobs;
    q->score_from = g->score_from;
    q->ignore_eos = g->ignore_eos;
    q->router = -1;
    q->arrived = ep_now();
    q->deadline = ep_time_after_ms(q->arrived, deadline_ms);
    q->prev = u->waiting_last;
    if (q->prev != NULL)
        q->prev->next = q;
    else
        u->waiting_first = q;
    u->waiting_last = q;
    u->n_waiting++;
    ep_err err;
    status = check(u, q, &err);
    if (status != EP_OK)
        fail(u, q, status, err.text);
    else
        requests_assign(u);
}

/* ---- to a router ---- */

/* The router with the most free KV memory that this request fits into; -1: none now. */
static int choose_router(const up *u, const request *q)
{
    int best = -1;
    int64_t best_free = -1;
    for (int i = 0; i < u->cfg->n_routers; i++) {
        int64_t room = (int64_t)u->ranks[i].kv_tokens - u->ranks[i].kv_used;
        /* An idle router takes anything that fits its cache: rounding to pages is its business. */
        bool fits = room >= kv_need(q) || u->ranks[i].running == 0;
        /* A batch and the next one: more would wait there instead of here. */
        fits = fits && u->ranks[i].running < 2 * u->cfg->limits.max_sequences;
        if (u->ranks[i].state == RANK_READY && fits && room > best_free) best = i, best_free = room;
    }
    return best;
}

static void give(up *u, request *q, int router)
{
    unlink_request(u, q);
    q->router = router;
    q->next = u->running;
    if (q->next != NULL) q->next->prev = q;
    u->running = q;
    u->n_running++;
    u->ranks[router].running++;
    u->ranks[router].kv_used += kv_need(q);
    int64_t left_ms = ep_time_diff_ns(q->deadline, ep_now()) / 1000000;
    Moed__RankRequest m = MOED__RANK_REQUEST__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    m.id = q->id;
    m.n_ids = q->n_prompt;
    m.ids = q->ids;
    m.max_tokens = q->max_tokens;
    m.sampling = &q->sampling;
    m.n_logprobs = q->n_logprobs;
    m.ignore_eos = q->ignore_eos;
    m.score_from = q->score_from;
    m.deadline_ms = (uint32_t)(left_ms > 0 ? left_ms : 0);
    e.body_case = MOED__ENVELOPE__BODY_RANK_REQUEST;
    e.rank_request = &m;
    ranks_send(&u->ranks[router], &e);
}

void requests_assign(up *u)
{
    if (u->state != UP_READY &&
        !(u->state == UP_DRAINING && !u->drain_sent && ranks_all(u, RANK_READY)))
        return;
    while (u->waiting_first != NULL) {
        int router = choose_router(u, u->waiting_first);
        if (router < 0) return; /* the first waits until one has room: nobody overtakes */
        give(u, u->waiting_first, router);
    }
}

/* ---- from a router ---- */

static request *find(up *u, uint64_t id)
{
    for (request *q = u->running; q != NULL; q = q->next)
        if (q->id == id) return q;
    return NULL; /* ended here already: its last messages are nobody's */
}

/* Bytes at the end of text that begin a character which is not complete. */
static size_t incomplete(const uint8_t *p, size_t n)
{
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        uint8_t b = p[n - back];
        if ((b & 0xc0) == 0x80) continue;
        size_t need = b >= 0xf0 ? 4 : b >= 0xe0 ? 3 : b >= 0xc0 ? 2 : 1;
        return need > back ? back : 0;
    }
    return 0;
}

static void journal(request *q, int32_t token)
{
    if (q->n_ids == q->cap_ids) {
        size_t cap = q->cap_ids + q->max_tokens + 1;
        int32_t *ids = ep_grow(q->ids, q->n_ids * sizeof(*ids), cap * sizeof(*ids));
        if (ids == NULL) return; /* streaming goes on; only a replay would miss it */
        q->ids = ids;
        q->cap_ids = cap;
    }
    q->ids[q->n_ids++] = token;
}

void requests_token(up *u, const Moed__Token *t)
{
    request *q = find(u, t->id);
    if (q == NULL) return;
    journal(q, t->token);
    if (q->from == NULL) return;
    ep_buf text = {0};
    if (ep_buf_add(&text, q->held, (size_t)q->n_held) != EP_OK ||
        model_decode(u->tokenizer, t->token, false, &text) != EP_OK)
        text.len = 0;
    size_t held = incomplete(text.data, text.len);
    q->n_held = (int)held;
    if (held > 0) memcpy(q->held, text.data + text.len - held, held);
    Moed__Token out = *t;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    out.id = q->client_id;
    out.text.data = text.data;
    out.text.len = text.len - held;
    e.body_case = MOED__ENVELOPE__BODY_TOKEN;
    e.token = &out;
    clients_send(q->from, &e);
    ep_buf_fini(&text);
}

void requests_scores(up *u, Moed__Scores *s)
{
    request *q = find(u, s->id);
    if (q == NULL || q->from == NULL) return;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    s->id = q->client_id;
    e.body_case = MOED__ENVELOPE__BODY_SCORES;
    e.scores = s;
    clients_send(q->from, &e);
}

void requests_done(up *u, const Moed__Done *d)
{
    request *q = find(u, d->id);
    if (q == NULL) return;
    if (q->from != NULL) {
        Moed__Done out = *d;
        Moed__Envelope e = MOED__ENVELOPE__INIT;
        out.id = q->client_id;
        out.text.data = q->held;
        out.text.len = (size_t)q->n_held;
        e.body_case = MOED__ENVELOPE__BODY_DONE;
        e.done = &out;
        clients_send(q->from, &e);
    }
    finish(u, q, true);
    requests_assign(u);
    up_advance(u);
}

void requests_failed(up *u, const Moed__Failed *f)
{
    request *q = find(u, f->id);
    if (q == NULL) return;
    fail(u, q, (ep_status)f->status, f->text);
    requests_assign(u);
    up_advance(u);
}

/* ---- ends from this side ---- */

void requests_fail_running(up *u, int router, ep_status status, const char *text)
{
    for (request *q = u->running, *next; q != NULL; q = next) {
        next = q->next;
        if (router < 0 || q->router == router) fail(u, q, status, text);
    }
}

void requests_fail_all(up *u, ep_status status, const char *text)
{
    requests_fail_running(u, -1, status, text);
    while (u->waiting_first != NULL)
        fail(u, u->waiting_first, status, text);
}

static void cancel(up *u, request *q)
{
    if (q->router < 0) {
        fail(u, q, EP_ERR_CANCELED, "canceled");
        return;
    }
    Moed__Cancel m = MOED__CANCEL__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    m.id = q->id;
    e.body_case = MOED__ENVELOPE__BODY_CANCEL;
    e.cancel = &m;
    ranks_send(&u->ranks[q->router], &e); /* its Failed message ends the request */
}

void requests_client_left(up *u, client *c)
{
    for (int list = 0; list < 2; list++)
        for (request *q = list ? u->running : u->waiting_first, *next; q != NULL; q = next) {
            next = q->next;
            if (q->from != c) continue;
            q->from = NULL;
            cancel(u, q);
        }
}

void requests_cancel(up *u, client *c, uint64_t client_id)
{
    for (int list = 0; list < 2; list++)
        for (request *q = list ? u->running : u->waiting_first, *next; q != NULL; q = next) {
            next = q->next;
            if (q->from == c && q->client_id == client_id) cancel(u, q);
        }
}

void requests_tick(up *u, ep_time now)
{
    for (request *q = u->waiting_first, *next; q != NULL; q = next) {
        next = q->next;
        if (!ep_time_is_past(q->deadline, now)) continue;
        char text[128];
        snprintf(text, sizeof(text), "deadline passed while waiting (the daemon is %s)",
                 up_state_name(u));
        fail(u, q, EP_ERR_DEADLINE, text);
    }
    for (request *q = u->running, *next; q != NULL; q = next) {
        next = q->next;
        if (!ep_time_is_past(ep_time_after_ms(q->deadline, GRACE_MS), now)) continue;
        char text[256], name[160];
        snprintf(text, sizeof(text), "deadline passed, %s did not answer",
                 ranks_name(u, q->router, name, sizeof(name)));
        fail(u, q, EP_ERR_DEADLINE, text);
    }
}
