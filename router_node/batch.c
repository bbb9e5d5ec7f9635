/*
 * batch: requests, and which of their tokens make the next step.
 *
 *  1. Waiting requests are admitted in order of arrival, when a running place is free and all the
 * pages the request can ever need are reserved. The head of the queue waits for memory and others
 * wait behind it: nobody is overtaken, so nobody starves, and what runs can always finish.
 *  2. A batch holds at most max_tokens_per_step rows: first one row per decoding sequence, then
 * prompt tokens, at most prefill_chunk of each sequence.
 *  3. The running list is ordered by last service: who was served goes to its end. So when the
 * budget does not reach everybody, turns are taken.
 *  4. A sequence that ended (done, failed, cancelled, expired) has its event at once; its memory
 * goes back between steps (sweep).
 */
#include <stdio.h>
#include <string.h>

#include "router_node/internal.h"

void router_sequence_free(router_sequence *q)
{
    if (q == NULL) return;
    ep_free(q->pages);
    ep_free(q->tokens);
    ep_free(q);
}

static void leave_out(router *r, const router_sequence *q)
{
    for (int i = 0; i < q->n_rows; i++)
        r->row_out[q->row_first + i] = true;
}

void router_sequence_fail(router *r, router_sequence *q, ep_status status, const char *text)
{
    if (q->ended) return;
    q->ended = true;
    leave_out(r, q);
    router_event e = {
        .kind = ROUTER_EVENT_FAILED, .request = q->req.id, .status = status, .text = text};
    r->opt.on_event(r->opt.event_arg, &e);
}

void router_sequence_done(router *r, router_sequence *q, router_finish finish)
{
    q->ended = true;
    ep_time now = ep_now(), first = q->n_generated > 0 ? q->first_token : now;
    router_event e = {.kind = ROUTER_EVENT_DONE,
                      .request = q->req.id,
                      .finish = finish,
                      .n_prompt = q->req.n_prompt,
                      .n_generated = q->n_generated,
                      .queue_ns = ep_time_diff_ns(q->admitted, q->submitted),
                      .prefill_ns = ep_time_diff_ns(first, q->admitted),
                      .decode_ns = ep_time_diff_ns(now, first)};
    r->opt.on_event(r->opt.event_arg, &e);
}

void router_row_fail(router *r, int row, ep_status status, const char *text)
{
    if (r->row_seq[row] != NULL) {
        router_sequence_fail(r, r->row_seq[row], status, text);
    } else {
        r->row_out[row] = true;
        if (r->forward_status == EP_OK)
            r->forward_status = ep_fail(r->forward_err, status, "%s", text);
    }
}

/* Whether the sequence has to end now; ends it. */
static bool expire_one(router *r, router_sequence *q, ep_time now, const char *where)
{
    char text[256];
    if (q->ended) return true;
    if (q->cancelled) {
        router_sequence_fail(r, q, EP_ERR_CANCELED, "cancelled");
        return true;
    }
    if (!ep_time_is_past(q->req.deadline, now)) return false;
    snprintf(text, sizeof(text), "the deadline passed after %d of %d tokens%s", q->n_generated,
             q->req.max_tokens, where);
    router_sequence_fail(r, q, EP_ERR_DEADLINE, text);
    return true;
}

ep_time router_expire(router *r, ep_time now, const char *where)
{
    ep_time next = EP_TIME_NEVER;
    for (int i = 0; i < r->n_running; i++) {
        router_sequence *q = r->running[i];
        if (!expire_one(r, q, now, where) && q->req.deadline.ns < next.ns) next = q->req.deadline;
    }
    return next;
}

bool router_admit(router *r, ep_time now)
{
    int kept = 0, n = r->n_waiting;
    bool is_blocked = false, any_ended = false;
    for (int i = 0; i < n; i++) {
        router_sequence *q = r->waiting[i];
        if (expire_one(r, q, now, ", before it could start")) {
            any_ended = true;
            router_sequence_free(q);
            continue;
        }
        if (!is_blocked && r->n_running < r->opt.max_sequences &&
            router_kv_reserve(&r->kv, q->n_pages)) { /* 1. */
            q->admitted = now;
            r->running[r->n_running++] = q;
            continue;
        }
        is_blocked = true;
        r->waiting[kept++] = q;
    }
    /* An event may have submitted another one behind the n looked at. */
    memmove(r->waiting + kept, r->waiting + n, sizeof(r->waiting[0]) * (size_t)(r->n_waiting - n));
    r->n_waiting -= n - kept;
    return any_ended;
}

/* Rows for up to n positions of q, with the pages they need. */
static void add_rows(router *r, router_sequence *q, int n)
{
    q->row_first = r->n_rows;
    q->n_rows = n;
    for (int i = 0; i < n; i++) {
        int row = r->n_rows++, position = q->n_done + i;
        r->row_seq[row] = q;
        r->row_position[row] = position;
        r->row_request[row] = q->req.id;
        r->row_out[row] = false;
        if (position / ROUTER_PAGE_TOKENS >= q->n_taken)
            q->pages[q->n_taken++] = router_kv_take(&r->kv);
    }
}

static bool is_decoding(const router_sequence *q)
{
    return q->n_done >= q->req.n_prompt;
}

static int min_int(int a, int b)
{
    return a < b ? a : b;
}

/* One row of a decoding sequence, or a chunk of a prompt, within the budget. */
static void add_turn(router *r, router_sequence *q)
{
    int budget = r->opt.max_tokens_per_step - r->n_rows;
    int chunk = r->opt.prefill_chunk > 0 ? r->opt.prefill_chunk : budget;
    int n = is_decoding(q) ? 1 : min_int(q->req.n_prompt - q->n_done, chunk);
    if (budget == 0) return;
    add_rows(r, q, min_int(n, budget));
    if (is_decoding(q))
        r->counters.tokens_decode++;
    else
        r->counters.tokens_prefill += (uint64_t)q->n_rows;
}

int router_batch(router *r)
{
    int n_decoding = 0;
    r->n_rows = 0;
    for (int i = 0; i < r->n_running; i++) {
        r->running[i]->n_rows = 0;
        n_decoding += is_decoding(r->running[i]);
    }
    if (n_decoding >= r->opt.max_tokens_per_step) { /* 2. nothing would be left for prompts */
        for (int i = 0; i < r->n_running; i++)
            add_turn(r, r->running[i]);
    } else {
        for (int pass = 0; pass < 2; pass++)
            for (int i = 0; i < r->n_running; i++)
                if (is_decoding(r->running[i]) == (pass == 0)) add_turn(r, r->running[i]);
    }

    int n = 0; /* 3. */
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < r->n_running; i++)
            if ((r->running[i]->n_rows > 0) == (pass == 1)) r->spare[n++] = r->running[i];
    router_sequence **list = r->running;
    r->running = r->spare;
    r->spare = list;
    return r->n_rows;
}

void router_sweep(router *r)
{
    int kept = 0;
    for (int i = 0; i < r->n_running; i++) {
        router_sequence *q = r->running[i];
        q->n_rows = 0;
        if (!q->ended) {
            r->running[kept++] = q;
            continue;
        }
        router_kv_release(&r->kv, q->pages, q->n_taken, q->n_pages);
        router_sequence_free(q);
    }
    r->n_running = kept;
    r->n_rows = 0;
}

/* ---- requests -----------------------------------------------------------------------------------
 */

static ep_status check_request(const router *r, const router_request *q, ep_err *err)
{
    if (q->n_prompt < 1) return ep_fail(err, EP_ERR_INVALID, "the prompt has no tokens");
    if (q->max_tokens < 0) return ep_fail(err, EP_ERR_INVALID, "max_tokens is %d", q->max_tokens);
    /* The last token is not fed back, so its position is not held. */
    int64_t positions = (int64_t)q->n_prompt + (q->max_tokens > 0 ? q->max_tokens - 1 : 0);
    if (positions > r->shape.context)
        return ep_fail(
            err, EP_ERR_INVALID,
            "%d prompt tokens and %d to generate are more than the model's context of %d",
            q->n_prompt, q->max_tokens, r->shape.context);
    if (router_kv_pages((int)positions) > r->kv.n_pages)
        return ep_fail(err, EP_ERR_INVALID,
                       "%d prompt tokens and %d to generate do not fit in the %d positions of this "
                       "router (kv_tokens)",
                       q->n_prompt, q->max_tokens, r->kv.n_pages * ROUTER_PAGE_TOKENS);
    for (int i = 0; i < q->n_prompt; i++)
        if (q->prompt[i] < 0 || q->prompt[i] >= r->shape.vocab)
            return ep_fail(err, EP_ERR_INVALID, "prompt token %d is %d, not in 0..%d", i,
                           q->prompt[i], r->shape.vocab - 1);
    if (q->n_logprobs < 0 || q->n_logprobs > 20)
        return ep_fail(err, EP_ERR_INVALID, "logprobs is %d, not in 0..20", q->n_logprobs);
    if (q->score_from < 0) return ep_fail(err, EP_ERR_INVALID, "score_from is %d", q->score_from);
    return router_sampling_check(&q->sampling, err);
}

ep_status router_submit(router *r, const router_request *req, ep_err *err)
{
    ep_status status = check_request(r, req, err);
    if (status != EP_OK) return status;
    if (r->n_waiting >= r->opt.max_waiting)
        return ep_fail(err, EP_ERR_BUSY, "%d requests wait already", r->n_waiting);

    router_sequence *q = ep_calloc(1, sizeof(*q));
    if (q == NULL) goto no_memory;
    q->n_pages = router_kv_pages(req->n_prompt + (req->max_tokens > 0 ? req->max_tokens - 1 : 0));
    q->tokens = ep_alloc(sizeof(int32_t) * ((size_t)req->n_prompt + (size_t)req->max_tokens));
    q->pages = ep_calloc((size_t)q->n_pages, sizeof(float *));
    if (q->tokens == NULL || q->pages == NULL) goto no_memory;
    q->req = *req;
    q->req.prompt = q->tokens;
    memcpy(q->tokens, req->prompt, sizeof(int32_t) * (size_t)req->n_prompt);
    q->n_tokens = req->n_prompt;
    q->submitted = ep_now();
    r->waiting[r->n_waiting++] = q;
    return EP_OK;
no_memory:
    router_sequence_free(q);
    return ep_fail(err, EP_ERR_NOMEM, "no memory for a request of %d tokens", req->n_prompt);
}

void router_cancel(router *r, uint64_t id)
{
    for (int i = 0; i < r->n_waiting; i++)
        if (r->waiting[i]->req.id == id) r->waiting[i]->cancelled = true;
    for (int i = 0; i < r->n_running; i++)
        if (r->running[i]->req.id == id) r->running[i]->cancelled = true;
}

int router_load(const router *r)
{
    return r->n_waiting + r->n_running;
}
