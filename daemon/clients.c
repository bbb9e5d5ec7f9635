/*
 * Client connections: frames in, frames out. A client that does not read is cut off at OUT_LIMIT
 * bytes, so that one slow reader costs the daemon a bounded amount; what a client asked for ends
 * when it leaves.
 */
#include "daemon/up.h"

#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/listener.h>
#include <event2/util.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

enum { OUT_LIMIT = 16 << 20, STATS_MS = 5000 };

static void client_close(client *c)
{
    up *u = c->u;
    requests_client_left(u, c);
    if (c->prev != NULL)
        c->prev->next = c->next;
    else
        u->clients = c->next;
    if (c->next != NULL) c->next->prev = c->prev;
    u->n_clients--;
    bufferevent_free(c->bev);
    ep_free(c);
    up_advance(u);
}

void clients_send(client *c, const Moed__Envelope *e)
{
    ep_buf frame = {0};
    if (c->cut_off) return;
    if (proto_frame_add(&frame, e, NULL, 0) != EP_OK ||
        bufferevent_write(c->bev, frame.data, frame.len) != 0)
        log_error("no memory for a message to a client");
    ep_buf_fini(&frame);
    if (evbuffer_get_length(bufferevent_get_output(c->bev)) > OUT_LIMIT) {
        /* Closing here would pull the ground from under the caller: shut down, and the loop closes.
         */
        log_warn("a client does not read its answers: closed");
        c->cut_off = true;
        bufferevent_disable(c->bev, EV_READ | EV_WRITE);
        bufferevent_trigger_event(c->bev, BEV_EVENT_ERROR, BEV_TRIG_DEFER_CALLBACKS);
    }
}

void clients_send_failed(client *c, uint64_t id, ep_status status, const char *text)
{
    Moed__Failed m = MOED__FAILED__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    char copy[768];
    snprintf(copy, sizeof(copy), "%s", text);
    m.id = id;
    m.status = status;
    m.text = copy;
    e.body_case = MOED__ENVELOPE__BODY_FAILED;
    e.failed = &m;
    clients_send(c, &e);
}

/* ---- questions ---- */

static const char *state_name(rank_state s)
{
    static const char *const names[] = {"starting", "loading", "ready", "lost"};
    return names[s];
}

/* The experts of a shard as a list of ranges. */
static void experts_text(const up *u, int shard_i, char *out, size_t n)
{
    size_t len = 0;
    out[0] = '\0';
    for (int e = 0; e < u->placement.n_experts; e++) {
        if (u->placement.owner[e] != shard_i) continue;
        int last = e;
        while (last + 1 < u->placement.n_experts && u->placement.owner[last + 1] == shard_i)
            last++;
        if (len + 16 > n) return;
        len += (size_t)snprintf(out + len, n - len, last > e ? "%s%d-%d" : "%s%d", len ? "," : "",
                                e, last);
        e = last;
    }
}

static void fill_rank(const up *u, int i, Moed__RankStatus *out, char *experts, size_t n)
{
    static char nothing[] = "";
    const rank_link *r = &u->ranks[i];
    const config_rank *c = config_rank_at(u->cfg, i);
    moed__rank_status__init(out);
    experts[0] = '\0';
    if (!config_is_router(u->cfg, i)) experts_text(u, i - u->cfg->n_routers, experts, n);
    out->rank = (uint32_t)i;
    out->role = (char *)(config_is_router(u->cfg, i) ? "router" : "shard");
    out->name = (char *)c->name;
    out->host = r->host != NULL ? r->host : (char *)c->host;
    out->pid = r->pid;
    out->state = (char *)state_name(r->state);
    out->describe = r->describe != NULL ? r->describe : nothing;
    out->done_bytes = r->done_bytes;
    out->all_bytes = r->all_bytes;
    out->weight_bytes = r->weight_bytes;
    out->rss_bytes = r->rss_bytes;
    out->experts = experts;
    out->data_address = r->data_address != NULL ? r->data_address : nothing;
    out->running = (uint32_t)r->running;
}

enum { EXPERTS_TEXT = 2048 };

static void send_status(client *c)
{
    up *u = c->u;
    const model_shape *shape = &u->m->shape;
    Moed__Status s = MOED__STATUS__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    size_t n = (size_t)u->n_ranks;
    Moed__RankStatus *ranks = ep_calloc(n, sizeof(*ranks)),
                     **pointers = ep_calloc(n, sizeof(*pointers));
    char *experts = ep_alloc(n * EXPERTS_TEXT);
    if (ranks == NULL || pointers == NULL || experts == NULL) {
        clients_send_failed(c, 0, EP_ERR_NOMEM, "out of memory");
        goto done;
    }
    for (size_t i = 0; i < n; i++) {
        fill_rank(u, (int)i, &ranks[i], experts + i * EXPERTS_TEXT, EXPERTS_TEXT);
        pointers[i] = &ranks[i];
    }
    s.state = (char *)up_state_name(u);
    s.model = (char *)u->cfg->model;
    s.model_name = (char *)shape->name;
    s.n_ranks = n;
    s.ranks = pointers;
    s.running = (uint32_t)u->n_running;
    s.waiting = (uint32_t)u->n_waiting;
    s.launches = u->launches;
    s.uptime_ms = (uint64_t)(ep_time_diff_ns(ep_now(), u->started) / 1000000);
    s.vocab = (uint32_t)shape->vocab;
    s.context = (uint32_t)shape->context;
    s.n_layers = (uint32_t)shape->n_layers;
    s.n_experts = (uint32_t)shape->n_experts;
    s.top_k = (uint32_t)shape->top_k;
    s.hidden = (uint32_t)shape->hidden;
    s.completed = u->completed;
    s.failed = u->failed;
    s.version = (char *)MOED_VERSION;
    e.body_case = MOED__ENVELOPE__BODY_STATUS;
    e.status = &s;
    clients_send(c, &e);
done:
    ep_free(ranks);
    ep_free(pointers);
    ep_free(experts);
}

static void send_tokens(client *c, const Moed__Tokenize *q)
{
    Moed__Tokens t = MOED__TOKENS__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    int32_t *ids = NULL;
    size_t n = 0;
    ep_status status =
        model_encode(c->u->tokenizer, (const char *)q->text.data, q->text.len, !q->plain, &ids, &n);
    if (status != EP_OK) {
        clients_send_failed(c, 0, status, "the text cannot be tokenised");
        return;
    }
    t.n_ids = n;
    t.ids = ids;
    e.body_case = MOED__ENVELOPE__BODY_TOKENS;
    e.tokens = &t;
    if (proto_frame_size(&e, 0) > PROTO_MAX_ENVELOPE)
        clients_send_failed(c, 0, EP_ERR_TOO_LARGE, "the text has too many tokens for one answer");
    else
        clients_send(c, &e);
    ep_free(ids);
}

/* Asks every rank once; all clients that ask meanwhile get the same answer. */
static void query_stats(client *c)
{
    up *u = c->u;
    if (u->n_stats_wanted == 0) {
        Moed__StatsQuery m = MOED__STATS_QUERY__INIT;
        Moed__Envelope e = MOED__ENVELOPE__INIT;
        e.body_case = MOED__ENVELOPE__BODY_STATS_QUERY;
        e.stats_query = &m;
        u->stats_round++;
        u->stats_deadline = ep_time_after_ms(ep_now(), STATS_MS);
        for (int i = 0; i < u->n_ranks; i++)
            if (u->ranks[i].state == RANK_READY) u->n_stats_wanted++;
        for (int i = 0; i < u->n_ranks; i++)
            if (u->ranks[i].state == RANK_READY) ranks_send(&u->ranks[i], &e);
    }
    c->stats_round = u->stats_round;
    if (u->n_stats_wanted == 0) clients_stats_ready(u);
}

void clients_stats_ready(up *u)
{
    Moed__Stats m = MOED__STATS__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    for (int i = 0; i < u->n_ranks; i++) /* in their order, however they answered */
        if (u->stats_frames[i].envelope != NULL)
            u->stats[m.n_ranks++] = u->stats_frames[i].envelope->rank_stats;
    m.ranks = u->stats;
    e.body_case = MOED__ENVELOPE__BODY_STATS;
    e.stats = &m;
    for (client *c = u->clients; c != NULL; c = c->next) {
        if (c->stats_round != u->stats_round) continue;
        c->stats_round = 0;
        clients_send(c, &e);
    }
    for (int i = 0; i < u->n_ranks; i++)
        if (u->stats_frames[i].envelope != NULL) proto_frame_free(&u->stats_frames[i]);
    u->n_stats = u->n_stats_wanted = 0;
}

static void on_frame(client *c, const Moed__Envelope *e)
{
    switch (e->body_case) {
    case MOED__ENVELOPE__BODY_GENERATE:
        requests_accept(c->u, c, e->generate);
        break;
    case MOED__ENVELOPE__BODY_CANCEL:
        requests_cancel(c->u, c, e->cancel->id);
        break;
    case MOED__ENVELOPE__BODY_STATUS_QUERY:
        send_status(c);
        break;
    case MOED__ENVELOPE__BODY_STATS_QUERY:
        query_stats(c);
        break;
    case MOED__ENVELOPE__BODY_TOKENIZE:
        send_tokens(c, e->tokenize);
        break;
    case MOED__ENVELOPE__BODY_DRAIN:
        c->wants_drained = true;
        up_begin_drain(c->u, "a client asked for it");
        break;
    default:
        clients_send_failed(c, 0, EP_ERR_PROTO, "this message is not for the daemon");
    }
}

static void on_read(struct bufferevent *bev, void *arg)
{
    client *c = arg;
    proto_frame f;
    ep_status status;
    while ((status = listen_frame(bev, &f)) == EP_OK) {
        on_frame(c, f.envelope);
        proto_frame_free(&f);
        if (c->cut_off) return;
    }
    if (status != EP_AGAIN) {
        log_warn("a client sent something that is no frame: closed");
        client_close(c);
    }
}

static void on_end(struct bufferevent *bev, short what, void *arg)
{
    (void)bev;
    (void)what;
    client_close(arg);
}

static void on_accept(struct evconnlistener *l, evutil_socket_t fd, struct sockaddr *a, int len,
                      void *arg)
{
    up *u = arg;
    (void)l;
    (void)a;
    (void)len;
    if (u->n_clients >= u->max_clients) {
        listen_say_full(u, "too many clients");
        evutil_closesocket(fd);
        return;
    }
    client *c = ep_calloc(1, sizeof(*c));
    struct bufferevent *bev =
        c != NULL ? bufferevent_socket_new(u->base, fd, BEV_OPT_CLOSE_ON_FREE) : NULL;
    if (bev == NULL) {
        ep_free(c);
        evutil_closesocket(fd);
        return;
    }
    *c = (client){.u = u, .bev = bev, .next = u->clients};
    if (c->next != NULL) c->next->prev = c;
    u->clients = c;
    u->n_clients++;
    bufferevent_setcb(bev, on_read, NULL, on_end, c);
    bufferevent_setwatermark(bev, EV_READ, 0, PROTO_MAX_ENVELOPE + PROTO_FRAME_BYTES);
    bufferevent_enable(bev, EV_READ | EV_WRITE);
}

/* What waits for a client, in one write without waiting: the loop has ended, and last messages are
 * small. */
static void send_rest(client *c)
{
    struct evbuffer *out = bufferevent_get_output(c->bev);
    size_t n = evbuffer_get_length(out);
    const uint8_t *bytes = n > 0 ? evbuffer_pullup(out, -1) : NULL;
    if (bytes == NULL) return;
    ssize_t sent = send(bufferevent_getfd(c->bev), bytes, n, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < (ssize_t)n) log_warn("a client did not take its last message");
}

void clients_close_all(up *u)
{
    Moed__Drained m = MOED__DRAINED__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    e.body_case = MOED__ENVELOPE__BODY_DRAINED;
    e.drained = &m;
    while (u->clients != NULL) {
        client *c = u->clients;
        if (c->wants_drained) clients_send(c, &e);
        send_rest(c);
        client_close(c);
    }
}

ep_status clients_listen(up *u, ep_err *err)
{
    char address[128];
    snprintf(address, sizeof(address), "unix:%s", u->cfg->front.socket);
    return listen_open(u, address, &u->client_listener, on_accept, err);
}
