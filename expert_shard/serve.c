/*
 * The serving loop: messages in order of arrival, each answered to whoever sent it. Rules:
 *  1. What has arrived is taken into a short ring with its time, so that a reply can say how long
 *     its slice waited. (A CPU computes without looking: the time is a lower bound.) The
 *     transport keeps buffers for sending, so waiting messages cannot starve replies.
 *  2. Replies go to whoever sent the message, whatever its header claims.
 *  3. A reply without a free buffer or without credit waits for progress, at most
 *     REPLY_DEADLINE_MS; after that it is given up and counted. The router sends the slice again.
 *  4. tick is called when something woke the loop without a message, and at least every TICK_MS.
 *  5. While the device computes one slice the next one is begun (rows on their way to it), as many
 *     as the device takes at once. Answers leave in the order in which slices were begun.
 *  6. After shard_drain, and when the device is lost, what was received is answered, then the loop
 *     returns; stop ends the passes under way, then returns.
 * It does not look into messages (shard.c) and never allocates.
 */
#include "expert_shard/store.h"

#include <sched.h>
#include <time.h>

#define TICK_MS           100
#define REPLY_DEADLINE_MS 2000
#define DRAIN_MS          1000 /* a sender that does not stop cannot keep a draining shard */
#define STEP_MS           5    /* of a wait for progress */
#define FLUSH_MS          50   /* large replies need the transport's attention after net_send */

static void run_tick(shard *s)
{
    s->next_tick = ep_time_after_ms(ep_now(), TICK_MS);
    if (s->tick != NULL) s->tick(s->tick_arg);
}

static bool is_stopped(const shard *s)
{
    return s->net_lost || atomic_load_explicit(&s->stop, memory_order_acquire);
}

static void lose_net(shard *s, ep_status status)
{
    s->net_lost = true;
    s->net_status = status;
}

/* Takes messages into the ring while there is room. True: took one. */
static bool receive(shard *s)
{
    bool any = false;
    while (s->n_waiting < SHARD_WAITING_MAX && !s->net_lost) {
        net_buf *b = NULL;
        ep_status status = net_next(s->n, &b);
        if (status == EP_AGAIN) break;
        if (status != EP_OK) {
            lose_net(s, status);
            break;
        }
        int at = (s->waiting_at + s->n_waiting++) % SHARD_WAITING_MAX;
        s->waiting[at] = (shard_waiting){.buf = b, .since = ep_now()};
        any = true;
    }
    return any;
}

/* Lets the transport work for a moment while a reply cannot go out. */
static void make_progress(shard *s)
{
    ep_status status = net_wait(s->n, ep_time_after_ms(ep_now(), STEP_MS));
    if (status == EP_OK) {
        /* A message or a wake-up. When it cannot be taken now, do not spin on it. */
        if (!receive(s)) nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
    } else if (status != EP_AGAIN) {
        lose_net(s, status);
    }
    if (ep_time_is_past(s->next_tick, ep_now())) run_tick(s);
}

static void put_spare(shard *s, net_buf *b)
{
    if (s->spare == NULL)
        s->spare = b;
    else
        net_give(s->n, b);
}

/* A buffer for a reply. False: none came free in time (rule 3). While a pass is under way nothing
 * is waited for: its end sends a reply, and that gives buffers. */
static bool take_spare(shard *s)
{
    ep_time deadline = ep_time_after_ms(ep_now(), REPLY_DEADLINE_MS);
    while (s->spare == NULL) {
        s->spare = net_take(s->n, s->reply_bytes);
        if (s->spare != NULL) break;
        if (s->n_flying > 0 || is_stopped(s) || ep_time_is_past(deadline, ep_now())) return false;
        make_progress(s);
    }
    return true;
}

/* After the deadline the reply is given up, and its buffer is the spare one. */
static void send_reply(shard *s, int peer, net_buf *b)
{
    ep_time deadline = ep_time_after_ms(ep_now(), REPLY_DEADLINE_MS);
    for (;;) {
        ep_status status = net_send(s->n, peer, b);
        if (status == EP_OK) return;
        if (status != EP_AGAIN || is_stopped(s) || ep_time_is_past(deadline, ep_now())) {
            shard_count(&s->counters.unsent, 1);
            if (status == EP_AGAIN) put_spare(s, b);
            return;
        }
        make_progress(s);
    }
}

static shard_waiting pop_waiting(shard *s)
{
    shard_waiting w = s->waiting[s->waiting_at];
    s->waiting_at = (s->waiting_at + 1) % SHARD_WAITING_MAX;
    s->n_waiting--;
    return w;
}

/* Begins to answer the next waiting message. False: there is none, or only once a pass under way
 * has ended. */
static bool take_off(shard *s)
{
    if (s->n_waiting == 0 || s->n_flying == s->store.ops->depth) return false;
    if (!take_spare(s)) {
        if (s->n_flying > 0) return false;
        shard_count(&s->counters.unsent, 1);
        net_give(s->n, pop_waiting(s).buf);
        return true;
    }
    shard_waiting w = pop_waiting(s);
    shard_flying *y = &s->flying[(s->flying_at + s->n_flying++) % COMPUTE_DEPTH];
    *y = (shard_flying){.msg = w.buf, .reply = s->spare};
    s->spare = NULL;
    shard_answer_begin(s, &y->f, w.buf->data, w.buf->len, (uint16_t)w.buf->peer,
                       (uint64_t)ep_time_diff_ns(ep_now(), w.since), y->reply->data);
    return true;
}

/* Ends the oldest answer under way and sends it. */
static void land(shard *s)
{
    shard_flying y = s->flying[s->flying_at];
    s->flying_at = (s->flying_at + 1) % COMPUTE_DEPTH;
    s->n_flying--;
    if (y.f.is_computing) shard_answer_end(s, &y.f);
    int peer = y.msg->peer;
    net_give(s->n, y.msg);
    if (y.f.reply_bytes == 0) {
        put_spare(s, y.reply);
        return;
    }
    y.reply->len = y.f.reply_bytes;
    send_reply(s, peer, y.reply);
}

static bool can_land(const shard *s)
{
    const shard_flying *y = &s->flying[s->flying_at];
    return s->n_flying > 0 && (!y->f.is_computing || s->store.ops->ffn_is_done(s->store.device));
}

static void wait_idle(shard *s)
{
    ep_status status = net_wait(s->n, s->next_tick);
    if (status != EP_OK && status != EP_AGAIN) lose_net(s, status);
    /* A wake-up without a message is for tick. */
    if (!s->net_lost && !receive(s)) run_tick(s);
}

/* The end of a drain: the last replies leave. The transport does not say when they have. */
static void flush(shard *s)
{
    ep_time end = ep_time_after_ms(ep_now(), FLUSH_MS);
    while (!is_stopped(s) && !ep_time_is_past(end, ep_now()))
        if (net_wait(s->n, end) == EP_OK) nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
}

static void serve_loop(shard *s)
{
    ep_time drain_end = EP_TIME_NEVER;
    while (!is_stopped(s)) {
        ep_time now = ep_now();
        bool is_draining = s->device_lost || atomic_load_explicit(&s->drain, memory_order_acquire);
        if (is_draining && drain_end.ns == EP_TIME_NEVER.ns)
            drain_end = ep_time_after_ms(now, DRAIN_MS);
        bool is_late = is_draining && ep_time_is_past(drain_end, now);
        if (!is_late) receive(s);
        if (s->n_waiting + s->n_flying > 0) {
            bool has_begun = take_off(s);
            if (can_land(s))
                land(s);
            else if (!has_begun)
                sched_yield(); /* the device works; receiving goes on */
            if (ep_time_is_past(s->next_tick, ep_now())) run_tick(s);
        } else if (is_draining) {
            flush(s);
            break;
        } else {
            wait_idle(s);
        }
    }
}

/* The device reads rows from the transport's buffers and writes results into them by itself. */
static void pin(shard *s)
{
    const compute_ops *ops = s->store.ops;
    s->is_pinned = ops->pin != NULL && s->n->memory != NULL && s->store.n_owned > 0 &&
                   ops->pin(s->store.device, s->n->memory, s->n->memory_bytes) == EP_OK;
}

static void unpin(shard *s)
{
    if (s->is_pinned) s->store.ops->unpin(s->store.device, s->n->memory);
    s->is_pinned = false;
}

/* What was received and not answered. The device may still be writing to its buffers. */
static void abandon(shard *s)
{
    for (; s->n_flying > 0; s->n_flying--) {
        shard_flying *y = &s->flying[s->flying_at];
        s->flying_at = (s->flying_at + 1) % COMPUTE_DEPTH;
        if (y->f.is_computing) shard_answer_end(s, &y->f);
        net_give(s->n, y->msg);
        net_give(s->n, y->reply);
    }
    while (s->n_waiting > 0)
        net_give(s->n, pop_waiting(s).buf);
}

ep_status shard_serve(shard *s, net *n, void (*tick)(void *arg), void *tick_arg)
{
    s->tick = tick;
    s->tick_arg = tick_arg;
    s->net_lost = false;
    s->net_status = EP_OK;
    s->waiting_at = s->n_waiting = s->flying_at = s->n_flying = 0;
    s->reply_bytes = wire_reply_bytes((uint32_t)s->hidden, (uint32_t)s->max_pairs);
    s->next_tick = ep_time_after_ms(ep_now(), TICK_MS);
    pthread_mutex_lock(&s->lock);
    s->n = n;
    pthread_mutex_unlock(&s->lock);
    pin(s);

    if (take_spare(s))
        serve_loop(s);
    else if (!is_stopped(s)) {
        log_error("shard %d: the transport has no buffer for a reply of %zu bytes", s->shard_i,
                  s->reply_bytes);
        lose_net(s, EP_ERR_TOO_LARGE);
    }

    abandon(s); /* only after stop or a lost transport there is anything */
    if (s->spare != NULL) net_give(n, s->spare);
    s->spare = NULL;
    unpin(s);
    pthread_mutex_lock(&s->lock);
    s->n = NULL;
    pthread_mutex_unlock(&s->lock);
    return s->net_lost ? s->net_status : s->device_lost ? EP_ERR_DEVICE : EP_OK;
}

static void set_and_wake(shard *s, atomic_bool *flag)
{
    atomic_store_explicit(flag, true, memory_order_release);
    pthread_mutex_lock(&s->lock);
    if (s->n != NULL) net_wake(s->n);
    pthread_mutex_unlock(&s->lock);
}

void shard_stop(shard *s)
{
    set_and_wake(s, &s->stop);
}

void shard_drain(shard *s)
{
    set_and_wake(s, &s->drain);
}
