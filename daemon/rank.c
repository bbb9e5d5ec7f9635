/*
 * A rank from start to end: die with the parent, start MPI, read the same file as everybody, dial
 * the daemon, introduce itself (the daemon refuses another configuration by its first differing
 * key), open the model, take the role that the rank number gives, and leave without lingering.
 *
 * MPI is finalised only if every rank drained in order; after any loss a finalise may hang, so the
 * process just ends.
 */
#include "daemon/rank.h"
#include "daemon/locality.h"
#include "kernels/kernels.h"
#include "proto/wire.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

static _Atomic(net *) wake_target;

/* The queue may get items before the transport is open; then the engine is not waiting in it. */
static void wake_engine(void *arg)
{
    (void)arg;
    net *n = atomic_load(&wake_target);
    if (n != NULL) net_wake(n);
}

uint64_t rank_rss_bytes(void)
{
    unsigned long pages = 0, resident = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (f == NULL) return 0;
    if (fscanf(f, "%lu %lu", &pages, &resident) != 2) resident = 0;
    fclose(f);
    return (uint64_t)resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* ---- messages ---- */

static void send_hello(rank *r)
{
    Moed__Hello h = MOED__HELLO__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    ep_buf lines = {0};
    char host[256] = "", nothing[] = "";
    char *job = getenv("MOED_JOB");
    gethostname(host, sizeof(host) - 1);
    if (config_print_lines(r->cfg, &lines) != EP_OK) lines.len = 0;
    h.version = PROTO_VERSION;
    h.job = job != NULL ? job : nothing;
    h.rank = (uint32_t)r->rank;
    h.pid = (uint64_t)getpid();
    h.host = host;
    h.config = lines.len > 0 ? (char *)lines.data : nothing;
    h.config_digest = config_digest(r->cfg);
    e.body_case = MOED__ENVELOPE__BODY_HELLO;
    e.hello = &h;
    uplink_send(r->up, &e);
    ep_buf_fini(&lines);
}

static void send_failed(rank *r, ep_status status, char *text)
{
    Moed__Failed f = MOED__FAILED__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    f.status = status;
    f.text = text;
    e.body_case = MOED__ENVELOPE__BODY_FAILED;
    e.failed = &f;
    uplink_send(r->up, &e);
}

void rank_send_progress(rank *r, uint64_t done, uint64_t all, const char *what)
{
    Moed__Progress p = MOED__PROGRESS__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    char text[64];
    snprintf(text, sizeof(text), "%s", what);
    p.done_bytes = done;
    p.all_bytes = all;
    p.what = text;
    e.body_case = MOED__ENVELOPE__BODY_PROGRESS;
    e.progress = &p;
    uplink_send(r->up, &e);
}

void rank_send_ready(rank *r, const char *describe, uint64_t weight_bytes, const char *data_address,
                     uint32_t kv_tokens)
{
    Moed__Ready m = MOED__READY__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    char what[256], address[256];
    snprintf(what, sizeof(what), "%s", describe);
    snprintf(address, sizeof(address), "%s", data_address);
    m.describe = what;
    m.weight_bytes = weight_bytes;
    m.rss_bytes = rank_rss_bytes();
    m.data_address = address;
    m.model_digest = r->m->digest;
    m.kv_tokens = kv_tokens;
    e.body_case = MOED__ENVELOPE__BODY_READY;
    e.ready = &m;
    uplink_send(r->up, &e);
    log_info("ready, %s, %.1f MiB of weights, %.1f MiB resident", describe,
             (double)weight_bytes / 1048576.0, (double)m.rss_bytes / 1048576.0);
}

void rank_send_drained(rank *r)
{
    Moed__Drained d = MOED__DRAINED__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    e.body_case = MOED__ENVELOPE__BODY_DRAINED;
    e.drained = &d;
    uplink_send(r->up, &e);
}

/* ---- transport ---- */

size_t rank_max_message(const rank *r)
{
    const model_shape *s = &r->m->shape;
    uint32_t rows = (uint32_t)r->cfg->limits.max_tokens_per_step, pairs = rows * (uint32_t)s->top_k;
    size_t slice = wire_slice_bytes(KERN_ACT_F32, (uint32_t)s->hidden, rows, pairs);
    size_t reply = wire_reply_bytes((uint32_t)s->hidden, pairs);
    return slice > reply ? slice : reply;
}

ep_status rank_open_net(rank *r, size_t max_message, int n_buffers, ep_err *err)
{
    net_options opt = net_options_default();
    opt.rank = r->rank;
    opt.n_ranks = r->n_ranks;
    opt.max_message = max_message;
    opt.n_buffers = n_buffers;
    /* A rank that computes takes no messages meanwhile. The dead are known from their control
     * connection; this only bounds what else may go wrong, so it need not be short. */
    opt.send_deadline_ms = r->cfg->limits.deadline_s * 1000;
    ep_status status = net_mpi_open(&r->n, &opt, err);
    if (status == EP_OK) atomic_store(&wake_target, r->n);
    return status;
}

/* ---- start and end ---- */

/* Waits for the daemon's answer to Hello: Welcome, or Failed with the reason. */
static ep_status await_welcome(rank *r, ep_err *err)
{
    for (int i = 0; i < 30000; i++) {
        void *got;
        if (ep_queue_pop(r->in, &got) != EP_OK) {
            usleep(1000);
            continue;
        }
        rank_item *item = got;
        const Moed__Envelope *e = item->frame.envelope;
        bool welcome = e->body_case == MOED__ENVELOPE__BODY_WELCOME;
        if (!welcome && e->body_case == MOED__ENVELOPE__BODY_FAILED)
            ep_fail(err, EP_ERR_INVALID, "refused by the daemon: %s", e->failed->text);
        rank_item_free(item);
        if (welcome) return EP_OK;
        return EP_ERR_INVALID;
    }
    return ep_fail(err, EP_ERR_DEADLINE, "the daemon at %s did not answer in 30 s",
                   r->cfg->front.control);
}

static ep_status place_experts(rank *r, ep_err *err)
{
    const char *lists[4096];
    for (int i = 0; i < r->cfg->n_shards; i++)
        lists[i] = r->cfg->shards[i].experts;
    return model_placement_make(&r->placement, r->m->shape.n_experts, r->cfg->n_shards, lists, 1,
                                err);
}

static ep_status start(rank *r, ep_err *err)
{
    int want = config_n_ranks(r->cfg);
    if (r->n_ranks != want)
        return ep_fail(err, EP_ERR_INVALID, "%s describes %d ranks, mpirun started %d",
                       r->cfg->path, want, r->n_ranks);
    ep_status status = ep_queue_open(&r->in, 1024, wake_engine, NULL);
    if (status != EP_OK) return ep_fail(err, status, "out of memory");
    status = uplink_open(&r->up, r->cfg->front.control, r->in, err);
    if (status != EP_OK) return status;
    send_hello(r);
    status = await_welcome(r, err);
    if (status == EP_OK) status = kern_select(r->cfg->kernels, err);
    if (status == EP_OK) status = model_open(&r->m, r->cfg->model, err);
    if (status == EP_OK) status = place_experts(r, err);
    return status;
}

static void finish(rank *r)
{
    uplink_close(r->up); /* sends what waits, so the daemon learns the reason */
    net_mpi_stop(r->drained);
    _exit(r->drained ? 0 : 1);
}

int rank_main(const char *config_path)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGINT, SIG_IGN); /* Ctrl-C is the daemon's: it drains, then ends the ranks */
    signal(SIGUSR1, SIG_IGN);
    rank r = {0};
    ep_err err = {""};
    ep_log_open("rank", EP_LOG_INFO);
    ep_status status = net_mpi_start(&r.rank, &r.n_ranks, &err);
    if (status != EP_OK) {
        log_error("%s", err.text);
        return 1;
    }
    config *cfg = NULL;
    status = config_load(&cfg, config_path, &err);
    if (status != EP_OK) {
        log_error("%s", err.text);
        _exit(2);
    }
    r.cfg = cfg;
    char who[64];
    bool is_router = config_is_router(cfg, r.rank);
    r.self = r.rank < config_n_ranks(cfg) ? config_rank_at(cfg, r.rank) : NULL;
    snprintf(who, sizeof(who), "%s %s", is_router ? "router" : "shard",
             r.self ? r.self->name : "?");
    ep_log_open(who, EP_LOG_INFO);
    if (r.self != NULL) locality_bind(cfg, r.rank); /* before threads and memory */
    status = start(&r, &err);
    if (status == EP_OK) status = is_router ? rank_router_run(&r, &err) : rank_shard_run(&r, &err);
    if (status != EP_OK) {
        log_error("%s", err.text[0] != '\0' ? err.text : ep_status_name(status));
        if (r.up != NULL) send_failed(&r, status, err.text);
        r.drained = false;
    }
    if (r.up == NULL) _exit(1);
    finish(&r);
    return 0;
}
