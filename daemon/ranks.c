/*
 * Control connections. A connection becomes a rank by its Hello: the job's secret, this protocol,
 * the same configuration (else the first key that differs is named on both sides) and a rank number
 * nobody else has. From then on its end is the rank's death, and silence beyond SILENT_MS too.
 */
#include "daemon/up.h"

#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/listener.h>
#include <event2/util.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

enum { SILENT_MS = 15000, HELLO_S = 10, MAX_STRANGERS = 32 };

static void set_text(char **to, const char *from)
{
    char *copy = ep_strdup(from != NULL ? from : "");
    if (copy == NULL) return;
    ep_free(*to);
    *to = copy;
}

const char *ranks_name(const up *u, int rank, char *out, size_t n)
{
    const rank_link *r = &u->ranks[rank];
    snprintf(out, n, "%s %s (rank %d, host %s, pid %llu)",
             config_is_router(u->cfg, rank) ? "router" : "shard",
             config_rank_at(u->cfg, rank)->name, rank, r->host != NULL ? r->host : "unknown",
             (unsigned long long)r->pid);
    return out;
}

void ranks_send(rank_link *r, const Moed__Envelope *e)
{
    if (r->bev == NULL) return;
    ep_buf frame = {0};
    if (proto_frame_add(&frame, e, NULL, 0) != EP_OK ||
        bufferevent_write(r->bev, frame.data, frame.len) != 0)
        log_error("no memory for a message to rank %d", r->rank);
    ep_buf_fini(&frame);
}

bool ranks_all(const up *u, rank_state state)
{
    for (int i = 0; i < u->n_ranks; i++)
        if (u->ranks[i].state != state) return false;
    return true;
}

void ranks_reset(up *u)
{
    for (int i = 0; i < u->n_ranks; i++) {
        rank_link *r = &u->ranks[i];
        if (r->bev != NULL) bufferevent_free(r->bev);
        ep_free(r->host);
        ep_free(r->describe);
        ep_free(r->data_address);
        *r = (rank_link){.u = u, .rank = i};
    }
}

void ranks_drain(up *u)
{
    Moed__Drain m = MOED__DRAIN__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    e.body_case = MOED__ENVELOPE__BODY_DRAIN;
    e.drain = &m;
    for (int i = 0; i < u->n_ranks; i++)
        ranks_send(&u->ranks[i], &e);
}

/* ---- what ranks say ---- */

static void on_progress(rank_link *r, const Moed__Progress *p)
{
    r->state = RANK_LOADING;
    r->done_bytes = p->done_bytes;
    r->all_bytes = p->all_bytes;
}

static void on_ready(rank_link *r, const Moed__Ready *m)
{
    up *u = r->u;
    char name[160];
    if (m->model_digest != u->m->digest) {
        char text[256];
        snprintf(text, sizeof(text), "%s has another model file than the daemon",
                 ranks_name(u, r->rank, name, sizeof(name)));
        u->relaunch_held = true;
        job_rank_lost(u, r, text);
        return;
    }
    r->state = RANK_READY;
    set_text(&r->describe, m->describe);
    set_text(&r->data_address, m->data_address);
    r->weight_bytes = m->weight_bytes;
    r->rss_bytes = m->rss_bytes;
    r->kv_tokens = m->kv_tokens;
    r->done_bytes = r->all_bytes;
    up_advance(u);
}

/* Failed with id 0 speaks of the rank itself, which is about to end. */
static void on_failed(rank_link *r, const Moed__Failed *f)
{
    if (f->id != 0) {
        requests_failed(r->u, f);
        return;
    }
    char name[160], text[768];
    bool loading = r->state != RANK_READY;
    snprintf(text, sizeof(text), "%s: %s", ranks_name(r->u, r->rank, name, sizeof(name)), f->text);
    /* What a file or a configuration says will be said again: a relaunch would not help. */
    if (loading && (f->status == EP_ERR_INVALID || f->status == EP_ERR_UNSUPPORTED))
        r->u->relaunch_held = true;
    job_rank_lost(r->u, r, text);
}

/* Statistics are kept as the frames they came in until all have answered. Returns true if it kept
 * f. */
static bool on_stats(rank_link *r, proto_frame *f)
{
    up *u = r->u;
    if (u->n_stats_wanted == 0 || u->stats_frames[r->rank].envelope != NULL) return false;
    u->stats_frames[r->rank] = *f;
    if (++u->n_stats == u->n_stats_wanted) clients_stats_ready(u);
    return true;
}

static void on_frame(rank_link *r, proto_frame *f)
{
    Moed__Envelope *e = f->envelope;
    bool kept = false;
    r->heard = ep_now();
    switch (e->body_case) {
    case MOED__ENVELOPE__BODY_BEAT:
        break;
    case MOED__ENVELOPE__BODY_PROGRESS:
        on_progress(r, e->progress);
        break;
    case MOED__ENVELOPE__BODY_READY:
        on_ready(r, e->ready);
        break;
    case MOED__ENVELOPE__BODY_TOKEN:
        requests_token(r->u, e->token);
        break;
    case MOED__ENVELOPE__BODY_SCORES:
        requests_scores(r->u, e->scores);
        break;
    case MOED__ENVELOPE__BODY_DONE:
        requests_done(r->u, e->done);
        break;
    case MOED__ENVELOPE__BODY_FAILED:
        on_failed(r, e->failed);
        break;
    case MOED__ENVELOPE__BODY_RANK_STATS:
        kept = on_stats(r, f);
        break;
    case MOED__ENVELOPE__BODY_DRAINED:
        r->drained = true;
        up_advance(r->u);
        break;
    default:
        log_warn("rank %d sent '%s', which is not a rank's message", r->rank,
                 proto_envelope_name(e));
    }
    if (!kept) proto_frame_free(f);
}

static void on_read(struct bufferevent *bev, void *arg)
{
    rank_link *r = arg;
    up *u = r->u;
    proto_frame f;
    ep_status status;
    while ((status = listen_frame(bev, &f)) == EP_OK) {
        on_frame(r, &f);
        if (r->bev != bev) return; /* the job was ended meanwhile */
    }
    if (status != EP_AGAIN) {
        char name[160], text[256];
        snprintf(text, sizeof(text), "%s sent something that is no frame",
                 ranks_name(u, r->rank, name, sizeof(name)));
        job_rank_lost(u, r, text);
    }
}

static void on_end(struct bufferevent *bev, short what, void *arg)
{
    rank_link *r = arg;
    up *u = r->u;
    (void)what;
    bool drained = r->drained;
    if (!drained) { /* its last words may still be unread */
        on_read(bev, r);
        if (r->bev != bev) return;
    }
    bufferevent_free(bev);
    r->bev = NULL;
    if (drained) {
        up_advance(u);
        return;
    }
    char name[160], text[256];
    snprintf(text, sizeof(text), "%s died", ranks_name(u, r->rank, name, sizeof(name)));
    job_rank_lost(u, r, text);
}

void ranks_tick(up *u, ep_time now)
{
    for (int i = 0; i < u->n_ranks; i++) {
        rank_link *r = &u->ranks[i];
        if (r->bev == NULL || r->state == RANK_LOST) continue;
        if (!ep_time_is_past(ep_time_after_ms(r->heard, SILENT_MS), now)) continue;
        char name[160], text[256];
        snprintf(text, sizeof(text), "%s has been silent for %d s",
                 ranks_name(u, i, name, sizeof(name)), SILENT_MS / 1000);
        job_rank_lost(u, r, text);
        return;
    }
}

/* ---- Hello ---- */

/* Whoever connects is a stranger until its Hello. Only so many at once, or they could take every
 * descriptor of the daemon; the rest wait in the backlog. */
void ranks_accept_again(up *u)
{
    int room = MAX_STRANGERS - u->n_strangers;
    for (int i = 0; i < u->n_ranks; i++)
        room += u->ranks[i].bev == NULL;
    if (room > 0)
        evconnlistener_enable(u->rank_listener);
    else
        evconnlistener_disable(u->rank_listener);
}

static void no_stranger_any_more(up *u)
{
    u->n_strangers--;
    ranks_accept_again(u);
}

static void refuse(up *u, struct bufferevent *bev, const char *text)
{
    Moed__Failed m = MOED__FAILED__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    char copy[512];
    snprintf(copy, sizeof(copy), "%s", text);
    log_error("refused a rank: %s", copy);
    m.status = EP_ERR_INVALID;
    m.text = copy;
    e.body_case = MOED__ENVELOPE__BODY_FAILED;
    e.failed = &m;
    ep_buf frame = {0};
    if (proto_frame_add(&frame, &e, NULL, 0) == EP_OK) {
        /* Best effort: the answer is small and the socket's buffer empty. */
        ssize_t n =
            send(bufferevent_getfd(bev), frame.data, frame.len, MSG_NOSIGNAL | MSG_DONTWAIT);
        (void)n;
    }
    ep_buf_fini(&frame);
    bufferevent_free(bev);
    if (u->state != UP_READY) u->relaunch_held = true; /* it would be refused again */
}

/* NULL if the rank may join, else why not. */
static const char *hello_fault(const up *u, const Moed__Hello *h, char *text, size_t n)
{
    if (h->version != PROTO_VERSION) {
        snprintf(text, n, "it speaks version %u of the protocol, the daemon %d", h->version,
                 PROTO_VERSION);
    } else if (h->rank >= (uint32_t)u->n_ranks || u->ranks[h->rank].bev != NULL) {
        snprintf(text, n, "rank %u is not free", h->rank);
    } else if (h->config_digest != u->config_digest) {
        char difference[384];
        config_first_difference(u->config_lines, h->config, difference, sizeof(difference));
        snprintf(text, n, "rank %u on %s has another configuration: %s", h->rank, h->host,
                 difference);
    } else {
        return NULL;
    }
    return text;
}

static void on_hello(struct bufferevent *bev, void *arg)
{
    up *u = arg;
    proto_frame f;
    ep_status status = listen_frame(bev, &f);
    if (status == EP_AGAIN) return;
    no_stranger_any_more(u);
    if (status != EP_OK || f.envelope->body_case != MOED__ENVELOPE__BODY_HELLO ||
        strcmp(f.envelope->hello->job, u->job) != 0) {
        /* Not ours, or a straggler of an earlier launch. */
        log_debug("a connection to the control address did not say the job's Hello");
        if (status == EP_OK) proto_frame_free(&f);
        bufferevent_free(bev);
        return;
    }
    const Moed__Hello *h = f.envelope->hello;
    char text[512];
    if (hello_fault(u, h, text, sizeof(text)) != NULL) {
        rank_link *place = h->rank < (uint32_t)u->n_ranks ? &u->ranks[h->rank] : NULL;
        refuse(u, bev, text);
        proto_frame_free(&f);
        /* The job can never get complete: end it now rather than when loading takes too long. */
        if (place != NULL && place->bev == NULL) job_rank_lost(u, place, text);
        return;
    }
    rank_link *r = &u->ranks[h->rank];
    bufferevent_set_timeouts(bev, NULL, NULL); /* from here on ranks_tick watches */
    r->bev = bev;
    r->state = RANK_LOADING;
    r->pid = h->pid;
    r->heard = ep_now();
    set_text(&r->host, h->host);
    proto_frame_free(&f);
    Moed__Welcome w = MOED__WELCOME__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    w.n_ranks = (uint32_t)u->n_ranks;
    e.body_case = MOED__ENVELOPE__BODY_WELCOME;
    e.welcome = &w;
    ranks_send(r, &e);
    bufferevent_setcb(bev, on_read, NULL, on_end, r);
    on_read(bev, r);
}

static void on_stranger_end(struct bufferevent *bev, short what, void *arg)
{
    (void)what;
    bufferevent_free(bev);
    no_stranger_any_more(arg);
}

static void on_accept(struct evconnlistener *l, evutil_socket_t fd, struct sockaddr *a, int len,
                      void *arg)
{
    up *u = arg;
    (void)l;
    (void)a;
    (void)len;
    struct bufferevent *bev = bufferevent_socket_new(u->base, fd, BEV_OPT_CLOSE_ON_FREE);
    if (bev == NULL) {
        evutil_closesocket(fd);
        return;
    }
    u->n_strangers++;
    ranks_accept_again(u);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1},
               sizeof(int)); /* fails on a Unix socket: no harm */
    const struct timeval patience = {.tv_sec = HELLO_S};
    bufferevent_set_timeouts(bev, &patience, NULL);
    bufferevent_setcb(bev, on_hello, NULL, on_stranger_end, u);
    bufferevent_setwatermark(bev, EV_READ, 0, PROTO_MAX_ENVELOPE + PROTO_FRAME_BYTES);
    bufferevent_enable(bev, EV_READ | EV_WRITE);
}

ep_status ranks_listen(up *u, ep_err *err)
{
    return listen_open(u, u->cfg->front.control, &u->rank_listener, on_accept, err);
}
