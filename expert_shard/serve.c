/*
 * The serving loop: messages in order of arrival, each answered to whoever sent it. Rules:
 *  1. What has arrived is taken into a short ring with its time, so that a reply can say how long
 *     its slice waited. (The loop looks only between slices: the time is a lower bound.) The
 *     transport keeps buffers for sending, so waiting messages cannot starve replies.
 *  2. Replies go to whoever sent the message, whatever its header claims.
 *  3. A reply without a free buffer or without credit waits for progress, at most
 *     REPLY_DEADLINE_MS; after that it is given up and counted. The router sends the slice again.
 *  4. tick is called when something woke the loop without a message, and at least every TICK_MS.
 *  5. After shard_drain, and when the device is lost, what was received is answered, then the loop
 *     returns; stop returns at once.
 * It does not look into messages (shard.c) and never allocates.
 */
#include "expert_shard/store.h"

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

/* A buffer for a reply. False: none came free in time (rule 3). */
static bool take_spare(shard *s)
{
    ep_time deadline = ep_time_after_ms(ep_now(), REPLY_DEADLINE_MS);
    while (s->spare == NULL) {
        s->spare = net_take(s->n, s->reply_bytes);
        if (s->spare != NULL) break;
        if (is_stopped(s) || ep_time_is_past(deadline, ep_now())) return false;
        make_progress(s);
    }
    return true;
}

/* Sends the reply in `spare`; gives it up after the deadline. */
static void send_reply(shard *s, int peer)
{
    ep_time deadline = ep_time_after_ms(ep_now(), REPLY_DEADLINE_MS);
    for (;;) {
        net_buf *b = s->spare;
        ep_status status = net_send(s->n, peer, b);
        if (status != EP_AGAIN) {
            s->spare = NULL;
            if (status != EP_OK) shard_count(&s->counters.unsent, 1);
            return;
        }
        if (is_stopped(s) || ep_time_is_past(deadline, ep_now())) {
            shard_count(&s->counters.unsent, 1);
            return; /* the buffer stays the spare one */
        }
        make_progress(s);
    }
}

static void answer_next(shard *s)
{
    shard_waiting w = s->waiting[s->waiting_at];
    s->waiting_at = (s->waiting_at + 1) % SHARD_WAITING_MAX;
    s->n_waiting--;
    if (!take_spare(s)) {
        shard_count(&s->counters.unsent, 1);
        net_give(s->n, w.buf);
        return;
    }
    size_t bytes;
    int peer = w.buf->peer;
    shard_answer_waited(s, w.buf->data, w.buf->len, (uint16_t)peer,
                        (uint64_t)ep_time_diff_ns(ep_now(), w.since), s->spare->data, &bytes);
    net_give(s->n, w.buf);
    if (bytes == 0) return;
    s->spare->len = bytes;
    send_reply(s, peer);
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
        if (s->n_waiting > 0) {
            answer_next(s);
            if (ep_time_is_past(s->next_tick, ep_now())) run_tick(s);
        } else if (is_draining) {
            flush(s);
            break;
        } else {
            wait_idle(s);
        }
    }
}

ep_status shard_serve(shard *s, net *n, void (*tick)(void *arg), void *tick_arg)
{
    s->tick = tick;
    s->tick_arg = tick_arg;
    s->net_lost = false;
    s->net_status = EP_OK;
    s->waiting_at = s->n_waiting = 0;
    s->reply_bytes = wire_reply_bytes((uint32_t)s->hidden, (uint32_t)s->max_pairs);
    s->next_tick = ep_time_after_ms(ep_now(), TICK_MS);
    pthread_mutex_lock(&s->lock);
    s->n = n;
    pthread_mutex_unlock(&s->lock);

    if (take_spare(s))
        serve_loop(s);
    else if (!is_stopped(s)) {
        log_error("shard %d: the transport has no buffer for a reply of %zu bytes", s->shard_i,
                  s->reply_bytes);
        lose_net(s, EP_ERR_TOO_LARGE);
    }

    while (s->n_waiting > 0) { /* only after stop or a lost transport */
        net_give(n, s->waiting[s->waiting_at].buf);
        s->waiting_at = (s->waiting_at + 1) % SHARD_WAITING_MAX;
        s->n_waiting--;
    }
    if (s->spare != NULL) net_give(n, s->spare);
    s->spare = NULL;
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
