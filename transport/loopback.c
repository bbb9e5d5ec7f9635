/*
 * N ranks in one process, for tests and for a job of one process. The hub owns everything that two
 * ranks can see: the inboxes, and the buffers, which outlive their net so that a message of a rank
 * that closed still arrives. A message stays in its sender's buffer until the receiver has copied
 * it into one of its own; then the send is complete. So credit, slow receivers and lost peers
 * behave as they do over MPI, and nothing is allocated after open.
 *
 * Invariants: a buffer is in exactly one state; only its owner's thread moves it out of FREE and
 * USED; QUARANTINED is final. One mutex guards states, inboxes and faults; payloads are copied
 * outside of it while the source is pinned by `copying`.
 *
 * Not done here: flow between processes, and fairness between senders beyond order of arrival.
 */
#include "transport/pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

typedef enum buf_state { FREE, USED, SENDING, QUARANTINED } buf_state;

typedef struct loop_buf {
    net_slot slot; /* first: a net_buf of this transport is a loop_buf */
    buf_state state;
    /* of a send */
    struct loop_buf *next; /* in the inbox, in order of sending */
    int from, to;
    uint64_t pair_i;  /* of this message from `from` to `to` */
    ep_time arrives;  /* not visible before */
    ep_time deadline; /* of the send */
    net_fault fault;
    int deliveries; /* still to come */
    bool queued, copying;
} loop_buf;

typedef struct loop_rank {
    pthread_cond_t cond;
    bool dead, woken;
    bool starved; /* a take or send was refused: the next completion ends a wait */
    loop_buf *inbox, *inbox_last;
    loop_buf *bufs;
    int n_bufs;
    net_pool pool;
    int *outstanding; /* [n_ranks] sends under way, quarantined ones included */
    bool *lost;       /* [n_ranks] forgotten peers */
} loop_rank;

struct net_hub {
    pthread_mutex_t lock;
    int n_ranks;
    net_script script;
    void *script_arg;
    uint64_t *pair_counts; /* [n_ranks, n_ranks] */
    loop_rank *ranks;      /* [n_ranks] */
    int n_conds;
    bool has_lock;
};

typedef struct loop_net {
    net pub; /* first */
    net_hub *hub;
    loop_rank *me;
    net_options opt;
} loop_net;

/* ---- buffers ---- */

static void free_push(loop_rank *r, loop_buf *b)
{
    b->state = FREE;
    net_pool_put(&r->pool, &b->slot);
}

static loop_buf *free_pop(loop_rank *r, bool received)
{
    loop_buf *b = (loop_buf *)net_pool_get(&r->pool, received);
    if (b != NULL) b->state = USED;
    return b;
}

static net_buf *loop_take(net *n, size_t bytes)
{
    loop_net *l = (loop_net *)n;
    loop_buf *b = NULL;
    if (bytes > l->opt.max_message) return NULL;
    pthread_mutex_lock(&l->hub->lock);
    b = free_pop(l->me, false);
    if (b == NULL) l->me->starved = true;
    pthread_mutex_unlock(&l->hub->lock);
    return b != NULL ? &b->slot.pub : NULL;
}

static void loop_give(net *n, net_buf *buf)
{
    loop_net *l = (loop_net *)n;
    loop_buf *b = (loop_buf *)buf;
    pthread_mutex_lock(&l->hub->lock);
    if (b->state == USED) free_push(l->me, b);
    pthread_mutex_unlock(&l->hub->lock);
}

/* ---- inboxes (hub locked) ---- */

static void inbox_remove(loop_rank *r, loop_buf *b)
{
    loop_buf **at = &r->inbox, *before = NULL;
    while (*at != b) {
        before = *at;
        at = &(*at)->next;
    }
    *at = b->next;
    if (r->inbox_last == b) r->inbox_last = before;
    b->queued = false;
}

static void inbox_add(loop_rank *r, loop_buf *b)
{
    b->next = NULL;
    if (r->inbox_last != NULL) {
        r->inbox_last->next = b;
    } else {
        r->inbox = b;
    }
    r->inbox_last = b;
    b->queued = true;
}

/* The send of b is over: the buffer goes back to its owner unless it was given up. */
static void send_done(net_hub *h, loop_buf *b)
{
    loop_rank *owner = &h->ranks[b->from];
    if (b->state != SENDING) return;
    owner->outstanding[b->to]--;
    free_push(owner, b);
    if (owner->starved) {
        owner->starved = false;
        owner->woken = true;
    }
    pthread_cond_signal(&owner->cond);
}

/* The message that arrives first of those not being copied; NULL when there is none. */
static loop_buf *inbox_first(const loop_rank *r)
{
    loop_buf *first = NULL;
    for (loop_buf *b = r->inbox; b != NULL; b = b->next) {
        if (b->copying) continue;
        if (first == NULL || b->arrives.ns < first->arrives.ns) first = b;
    }
    return first;
}

static bool inbox_is_ready(const loop_rank *r, ep_time now)
{
    const loop_buf *b = inbox_first(r);
    return b != NULL && net_pool_has(&r->pool, true) && ep_time_is_past(b->arrives, now);
}

/* ---- sending ---- */

static void quarantine(loop_net *l, loop_buf *b)
{
    b->state = QUARANTINED;
    l->pub.stats.quarantined++;
    if (!l->me->starved) return;
    l->me->starved = false; /* who waits for credit is to learn that none will come */
    l->me->woken = true;
}

/* Gives up sends whose deadline passed and forgets their peers. Returns the nearest deadline left.
 */
static ep_time check_deadlines(loop_net *l, ep_time now)
{
    ep_time nearest = EP_TIME_NEVER;
    loop_rank *me = l->me;
    for (int i = 0; i < me->n_bufs; i++) {
        loop_buf *b = &me->bufs[i];
        if (b->state != SENDING) continue;
        if (ep_time_is_past(b->deadline, now)) me->lost[b->to] = true;
        if (me->lost[b->to]) {
            quarantine(l, b);
        } else if (b->deadline.ns < nearest.ns) {
            nearest = b->deadline;
        }
    }
    return nearest;
}

static void post(loop_net *l, loop_buf *b, int to)
{
    net_hub *h = l->hub;
    ep_time now = ep_now();
    b->from = l->pub.rank;
    b->to = to;
    b->pair_i = h->pair_counts[(size_t)b->from * (size_t)h->n_ranks + (size_t)to]++;
    memset(&b->fault, 0, sizeof(b->fault));
    if (h->script != NULL) {
        b->fault =
            h->script(h->script_arg, b->from, to, b->pair_i, b->slot.pub.data, b->slot.pub.len);
    }
    net_pool_turn(&l->me->pool, &b->slot);
    b->state = SENDING;
    b->queued = b->copying = false;
    b->arrives = ep_time_after_ms(now, b->fault.delay_ms);
    b->deadline = ep_time_after_ms(b->arrives, l->opt.send_deadline_ms);
    b->deliveries = 1 + (b->fault.duplicates > 0 ? b->fault.duplicates : 0);
    l->me->outstanding[to]++;
    l->pub.stats.sent++;
    l->pub.stats.sent_bytes += b->slot.pub.len;
    /* What goes to a dead rank stays under way until its deadline, as over MPI. */
    if (l->me->dead || h->ranks[to].dead) return;
    if (b->fault.lose) {
        send_done(h, b);
        return;
    }
    inbox_add(&h->ranks[to], b);
    pthread_cond_signal(&h->ranks[to].cond);
}

static ep_status loop_send(net *n, int peer, net_buf *buf)
{
    loop_net *l = (loop_net *)n;
    loop_buf *b = (loop_buf *)buf;
    ep_status status = EP_OK;
    pthread_mutex_lock(&l->hub->lock);
    if (l->me->lost[peer]) {
        free_push(l->me, b);
        status = EP_ERR_PEER_LOST;
    } else if (l->me->outstanding[peer] >= l->opt.credit) {
        check_deadlines(l, ep_now());
        n->stats.no_credit++;
        l->me->starved = true;
        status = EP_AGAIN;
    } else {
        post(l, b, peer);
    }
    pthread_mutex_unlock(&l->hub->lock);
    return status;
}

/* ---- receiving ---- */

/* Copies what the script left of a message. The source is pinned; the hub is not locked. */
static bool copy_message(loop_buf *to, const loop_buf *from)
{
    size_t len = from->slot.pub.len;
    if (from->fault.truncate_to != 0 && from->fault.truncate_to < len)
        len = from->fault.truncate_to;
    if (len > to->slot.pub.cap) return false;
    memcpy(to->slot.pub.data, from->slot.pub.data, len);
    to->slot.pub.len = len;
    to->slot.pub.peer = from->from;
    if (from->fault.corrupt && len > 0) {
        uint64_t bit = (from->pair_i + 1) * UINT64_C(0x9e3779b97f4a7c15) % (len * 8);
        to->slot.pub.data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    return true;
}

static ep_status loop_next(net *n, net_buf **out)
{
    loop_net *l = (loop_net *)n;
    net_hub *h = l->hub;
    ep_status status = EP_AGAIN;
    pthread_mutex_lock(&h->lock);
    ep_time now = ep_now();
    check_deadlines(l, now);
    while (status == EP_AGAIN && inbox_is_ready(l->me, now)) {
        loop_buf *from = inbox_first(l->me), *to = free_pop(l->me, true);
        from->copying = true;
        pthread_mutex_unlock(&h->lock);
        bool fits = copy_message(to, from);
        pthread_mutex_lock(&h->lock);
        from->copying = false;
        if (l->me->dead || h->ranks[from->from].dead) from->deliveries = 0;
        if (--from->deliveries <= 0) {
            if (from->queued) inbox_remove(l->me, from);
            send_done(h, from);
        }
        if (fits) {
            n->stats.received++;
            n->stats.received_bytes += to->slot.pub.len;
            *out = &to->slot.pub;
            status = EP_OK;
        } else {
            n->stats.dropped++;
            free_push(l->me, to);
        }
    }
    pthread_mutex_unlock(&h->lock);
    return status;
}

/* ---- waiting ---- */

/* True when a wait has a reason to return (hub locked). */
static bool take_event(loop_net *l, ep_time now)
{
    if (l->me->woken) {
        l->me->woken = false;
        l->pub.stats.wakes++;
        return true;
    }
    return inbox_is_ready(l->me, now);
}

static void sleep_until(loop_net *l, ep_time until)
{
    if (until.ns == INT64_MAX) {
        pthread_cond_wait(&l->me->cond, &l->hub->lock);
        return;
    }
    struct timespec ts = {.tv_sec = until.ns / 1000000000, .tv_nsec = until.ns % 1000000000};
    pthread_cond_timedwait(&l->me->cond, &l->hub->lock, &ts);
}

static ep_time earlier(ep_time a, ep_time b)
{
    return a.ns < b.ns ? a : b;
}

static ep_status loop_wait(net *n, ep_time deadline)
{
    loop_net *l = (loop_net *)n;
    ep_time start = ep_now();
    ep_status status = EP_AGAIN;
    pthread_mutex_lock(&l->hub->lock);
    for (;;) {
        ep_time now = ep_now();
        ep_time until = earlier(deadline, check_deadlines(l, now));
        if (take_event(l, now)) {
            status = EP_OK;
            break;
        }
        if (ep_time_is_past(deadline, now)) break;
        if (ep_time_diff_ns(now, start) < (int64_t)l->opt.spin_us * 1000) {
            pthread_mutex_unlock(&l->hub->lock);
            sched_yield();
            pthread_mutex_lock(&l->hub->lock);
            continue;
        }
        const loop_buf *first = inbox_first(l->me);
        if (first != NULL && net_pool_has(&l->me->pool, true))
            until = earlier(until, first->arrives);
        n->stats.sleeps++;
        sleep_until(l, until);
    }
    pthread_mutex_unlock(&l->hub->lock);
    return status;
}

static void loop_wake(net *n)
{
    loop_net *l = (loop_net *)n;
    pthread_mutex_lock(&l->hub->lock);
    l->me->woken = true;
    pthread_cond_signal(&l->me->cond);
    pthread_mutex_unlock(&l->hub->lock);
}

static void loop_forget(net *n, int peer)
{
    loop_net *l = (loop_net *)n;
    pthread_mutex_lock(&l->hub->lock);
    l->me->lost[peer] = true;
    check_deadlines(l, ep_now());
    pthread_mutex_unlock(&l->hub->lock);
}

static void loop_close(net *n)
{
    ep_free((loop_net *)n); /* its buffers are the hub's */
}

static const net_ops loop_ops = {
    .name = "loopback",
    .take = loop_take,
    .give = loop_give,
    .send = loop_send,
    .next = loop_next,
    .wait = loop_wait,
    .wake = loop_wake,
    .forget = loop_forget,
    .close = loop_close,
};

/* ---- opening ---- */

static void rank_fini(loop_rank *r)
{
    net_pool_fini(&r->pool);
    ep_free(r->bufs);
    ep_free(r->outstanding);
    ep_free(r->lost);
    r->bufs = NULL;
    r->outstanding = NULL;
    r->lost = NULL;
}

static ep_status rank_init(loop_rank *r, const net_options *opt)
{
    r->bufs = ep_calloc((size_t)opt->n_buffers, sizeof(*r->bufs));
    r->outstanding = ep_calloc((size_t)opt->n_ranks, sizeof(*r->outstanding));
    r->lost = ep_calloc((size_t)opt->n_ranks, sizeof(*r->lost));
    if (r->bufs == NULL || r->outstanding == NULL || r->lost == NULL) return EP_ERR_NOMEM;
    r->n_bufs = opt->n_buffers;
    return net_pool_init(&r->pool, r->bufs, sizeof(*r->bufs), opt);
}

ep_status net_loopback_open(net **out, net_hub *hub, const net_options *opt)
{
    if (opt->n_ranks != hub->n_ranks || !net_options_are_valid(opt)) return EP_ERR_INVALID;
    loop_net *l = ep_calloc(1, sizeof(*l));
    if (l == NULL) return EP_ERR_NOMEM;
    loop_rank *r = &hub->ranks[opt->rank];
    pthread_mutex_lock(&hub->lock);
    /* A rank's buffers stay with the hub when it closes, so it opens once. */
    ep_status status = r->bufs != NULL ? EP_ERR_INVALID : rank_init(r, opt);
    if (status != EP_OK) {
        if (status != EP_ERR_INVALID) rank_fini(r);
        pthread_mutex_unlock(&hub->lock);
        ep_free(l);
        return status;
    }
    pthread_mutex_unlock(&hub->lock);
    l->pub.ops = &loop_ops;
    l->pub.rank = opt->rank;
    l->pub.n_ranks = opt->n_ranks;
    l->pub.n_buffers = opt->n_buffers;
    l->pub.memory = r->pool.memory;
    l->pub.memory_bytes = r->pool.bytes;
    l->hub = hub;
    l->me = r;
    l->opt = *opt;
    *out = &l->pub;
    return EP_OK;
}

/* ---- the hub ---- */

ep_status net_hub_open(net_hub **out, int n_ranks, net_script script, void *script_arg)
{
    ep_status status = EP_ERR_NOMEM;
    pthread_condattr_t attr;
    if (n_ranks < 1 || n_ranks > 1024) return EP_ERR_INVALID;
    net_hub *h = ep_calloc(1, sizeof(*h));
    if (h == NULL) return EP_ERR_NOMEM;
    h->n_ranks = n_ranks;
    h->script = script;
    h->script_arg = script_arg;
    h->ranks = ep_calloc((size_t)n_ranks, sizeof(*h->ranks));
    h->pair_counts = ep_calloc((size_t)n_ranks * (size_t)n_ranks, sizeof(*h->pair_counts));
    if (h->ranks == NULL || h->pair_counts == NULL) goto fail;
    if (pthread_mutex_init(&h->lock, NULL) != 0) goto fail;
    h->has_lock = true;
    if (pthread_condattr_init(&attr) != 0) goto fail;
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    while (h->n_conds < n_ranks && pthread_cond_init(&h->ranks[h->n_conds].cond, &attr) == 0)
        h->n_conds++;
    pthread_condattr_destroy(&attr);
    if (h->n_conds < n_ranks) goto fail;
    *out = h;
    return EP_OK;
fail:
    net_hub_close(h);
    return status;
}

/* Takes messages to and from a dead rank out of an inbox. One being copied right now still arrives.
 */
static void inbox_purge(net_hub *h, int inbox_rank, int dead)
{
    loop_rank *r = &h->ranks[inbox_rank];
    for (loop_buf *b = r->inbox, *next; b != NULL; b = next) {
        next = b->next;
        if (b->copying || (b->from != dead && inbox_rank != dead)) continue;
        inbox_remove(r, b);
    }
}

void net_hub_kill(net_hub *h, int rank)
{
    if (rank < 0 || rank >= h->n_ranks) return;
    pthread_mutex_lock(&h->lock);
    h->ranks[rank].dead = true;
    for (int i = 0; i < h->n_ranks; i++)
        inbox_purge(h, i, rank);
    pthread_mutex_unlock(&h->lock);
}

void net_hub_close(net_hub *h)
{
    if (h == NULL) return;
    for (int i = 0; h->ranks != NULL && i < h->n_ranks; i++)
        rank_fini(&h->ranks[i]);
    for (int i = 0; i < h->n_conds; i++)
        pthread_cond_destroy(&h->ranks[i].cond);
    if (h->has_lock) pthread_mutex_destroy(&h->lock);
    ep_free(h->pair_counts);
    ep_free(h->ranks);
    ep_free(h);
}
