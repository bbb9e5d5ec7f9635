/*
 * `moed up`: the daemon's life. Sockets open before the job is launched, so clients find the door
 * from the first moment and wait in the queue; Ready is announced when every rank has loaded. A
 * lost rank ends the job and the next launch follows by itself; `launch.relaunches` launches in a
 * row that do not get ready end the daemon. SIGTERM or Ctrl-C drains; a second one ends at once.
 *
 * up_advance is the one place where states change because of what others did.
 */
#include "daemon/up.h"
#include "kernels/kernels.h"

#include <event2/event.h>
#include <event2/listener.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { TICK_MS = 200, DRAIN_RANKS_MS = 10000, OTHER_FILES = 64, LEAST_CLIENTS = 16 };

const char *up_state_name(const up *u)
{
    static const char *const names[] = {"loading", "ready", "draining", "relaunching"};
    return names[u->state];
}

static void leave(up *u, int exit_status)
{
    if (u->exit_status < 0) u->exit_status = exit_status;
    event_base_loopbreak(u->base);
}

/* ---- progress of loading, for a person ---- */

static void show_progress(const up *u)
{
    static int64_t shown_ns;
    uint64_t done = 0, all = 0;
    int ready = 0;
    for (int i = 0; i < u->n_ranks; i++) {
        done += u->ranks[i].done_bytes;
        all += u->ranks[i].all_bytes;
        ready += u->ranks[i].state == RANK_READY;
    }
    int64_t now = ep_now().ns, every = isatty(STDERR_FILENO) ? 1000000000LL : 5000000000LL;
    if (now - shown_ns < every || all == 0 || now - u->launched.ns < 1000000000LL) return;
    shown_ns = now;
    log_info("loading: %d of %d ranks ready, %.0f of %.0f MiB (%.0f %%)", ready, u->n_ranks,
             (double)done / 1048576.0, (double)all / 1048576.0, 100.0 * (double)done / (double)all);
}

static void announce_ready(up *u)
{
    uint64_t bytes = 0;
    for (int i = 0; i < u->n_ranks; i++) {
        bytes += u->ranks[i].weight_bytes;
        char name[160];
        log_info("%s: %s, %.1f MiB of weights", ranks_name(u, i, name, sizeof(name)),
                 u->ranks[i].describe ? u->ranks[i].describe : "",
                 (double)u->ranks[i].weight_bytes / 1048576.0);
    }
    log_info("ready: %s, %d router%s, %d shard%s, %.1f MiB of weights, %.1f s after launch",
             u->m->shape.name, u->cfg->n_routers, u->cfg->n_routers == 1 ? "" : "s",
             u->cfg->n_shards, u->cfg->n_shards == 1 ? "" : "s", (double)bytes / 1048576.0,
             (double)ep_time_diff_ns(ep_now(), u->launched) / 1e9);
    log_info("try: moectl -s %s generate -p 'Once upon a time' -n 64", u->cfg->front.socket);
}

/* ---- states ---- */

static void relaunch(up *u)
{
    ep_err err;
    if (u->relaunch_held || ++u->failed_launches > u->cfg->launch.relaunches) {
        log_error(u->relaunch_held ? "giving up: another launch would fail the same way"
                                   : "giving up after %d launches that did not get ready",
                  u->failed_launches);
        leave(u, 1);
        return;
    }
    log_warn("launching again");
    u->state = UP_LOADING;
    if (job_launch(u, &err) != EP_OK) {
        log_error("%s", err.text);
        leave(u, 1);
    }
}

/* Ranks hang up first: a daemon that did so before them would look lost to one still closing. */
static bool all_hung_up(const up *u)
{
    for (int i = 0; i < u->n_ranks; i++)
        if (u->ranks[i].bev != NULL) return false;
    return true;
}

static void advance_drain(up *u)
{
    if (u->n_running + u->n_waiting > 0 && !u->job_lost) return;
    if (!u->drain_sent) {
        if (u->n_running + u->n_waiting > 0)
            requests_fail_all(u, EP_ERR_BUSY, "the daemon is draining and its job was lost");
        u->drain_sent = true;
        u->drain_deadline = ep_time_after_ms(ep_now(), DRAIN_RANKS_MS);
        if (!ranks_all(u, RANK_READY)) { /* nothing worth waiting for */
            leave(u, 0);
            return;
        }
        ranks_drain(u);
    }
    if (u->mpirun == 0 && all_hung_up(u)) leave(u, 0);
}

void up_advance(up *u)
{
    if (u->exit_status >= 0) return; /* the end has begun */
    switch (u->state) {
    case UP_LOADING:
        if (!ranks_all(u, RANK_READY)) return;
        u->state = UP_READY;
        u->failed_launches = 0;
        u->relaunch_held = false;
        announce_ready(u);
        requests_assign(u);
        break;
    case UP_READY:
        if (u->once && u->completed + u->failed > 0 && u->n_running + u->n_waiting == 0 &&
            u->clients == NULL)
            up_begin_drain(u, "nothing is left to do");
        break;
    case UP_DRAINING:
        advance_drain(u);
        break;
    case UP_RELAUNCHING:
        if (u->mpirun == 0 && u->job_lost) relaunch(u);
        break;
    }
}

void up_begin_drain(up *u, const char *why)
{
    if (u->state == UP_DRAINING) return;
    log_info("draining: %s; %d running, %d waiting", why, u->n_running, u->n_waiting);
    bool loading = u->state != UP_READY;
    u->state = UP_DRAINING;
    u->drain_deadline = ep_time_after_ms(ep_now(), (int64_t)u->cfg->limits.drain_s * 1000);
    if (loading) requests_fail_all(u, EP_ERR_BUSY, "the daemon is draining");
    up_advance(u);
}

/* ---- events ---- */

static void on_stop_signal(evutil_socket_t sig, short what, void *arg)
{
    up *u = arg;
    (void)what;
    if (u->drain_signals++ > 0) {
        log_warn("second signal: ending now");
        requests_fail_all(u, EP_ERR_CANCELED, "the daemon was stopped");
        leave(u, 1);
        return;
    }
    up_begin_drain(u, sig == SIGINT   ? "interrupt"
                      : sig == SIGHUP ? "the terminal is gone"
                                      : "termination signal");
}

static void on_child(evutil_socket_t sig, short what, void *arg)
{
    (void)sig;
    (void)what;
    job_child_ended(arg);
}

static void on_tick(evutil_socket_t fd, short what, void *arg)
{
    up *u = arg;
    (void)fd;
    (void)what;
    ep_time now = ep_now();
    requests_tick(u, now);
    ranks_tick(u, now);
    job_tick(u, now);
    requests_assign(u); /* what ended by time made room, or was the last */
    up_advance(u);
    evconnlistener_enable(u->client_listener); /* off after a failed accept */
    ranks_accept_again(u);
    if (u->state == UP_LOADING) show_progress(u);
    if (u->n_stats_wanted > 0 && ep_time_is_past(u->stats_deadline, now)) clients_stats_ready(u);
    if (u->state == UP_DRAINING && ep_time_is_past(u->drain_deadline, now)) {
        if (u->drain_sent) {
            log_warn("ranks did not drain in time");
            leave(u, 1);
        } else {
            log_warn("%d requests did not end in time", u->n_running + u->n_waiting);
            requests_fail_all(u, EP_ERR_BUSY, "the daemon is draining");
            up_advance(u);
        }
    }
}

/* ---- start and end ---- */

static ep_status open_model(up *u, ep_err *err)
{
    const char *lists[4096];
    ep_status status =
        kern_select(u->cfg->kernels, err); /* a missing level is refused before any rank starts */
    if (status == EP_OK) status = model_open(&u->m, u->cfg->model, err);
    if (status == EP_OK) status = model_tokenizer_open(&u->tokenizer, u->m, err);
    for (int i = 0; i < u->cfg->n_shards; i++)
        lists[i] = u->cfg->shards[i].experts;
    if (status == EP_OK)
        status = model_placement_make(&u->placement, u->m->shape.n_experts, u->cfg->n_shards, lists,
                                      1, err);
    return status;
}

/* A terminal that closes is a wish to stop, unless whoever started the daemon said no (nohup). */
static ep_status watch_hangup(up *u, ep_err *err)
{
    struct sigaction old;
    if (sigaction(SIGHUP, NULL, &old) != 0 || old.sa_handler == SIG_IGN) return EP_OK;
    u->on_hangup = evsignal_new(u->base, SIGHUP, on_stop_signal, u);
    if (u->on_hangup == NULL || event_add(u->on_hangup, NULL) != 0)
        return ep_fail(err, EP_ERR_NOMEM, "cannot start the event loop");
    return EP_OK;
}

/* Clients may take the descriptors that ranks and the daemon itself do not need. */
static int client_limit(const up *u)
{
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0 || files.rlim_cur > INT_MAX) return INT_MAX;
    int left = (int)files.rlim_cur - u->n_ranks - OTHER_FILES;
    return left > LEAST_CLIENTS ? left : LEAST_CLIENTS;
}

static ep_status open_all(up *u, ep_err *err)
{
    ep_buf lines = {0};
    ep_status status = open_model(u, err);
    if (status != EP_OK) return status;
    if (config_print_lines(u->cfg, &lines) != EP_OK)
        return ep_fail(err, EP_ERR_NOMEM, "out of memory");
    u->config_lines = (char *)lines.data;
    u->config_digest = config_digest(u->cfg);
    u->n_ranks = config_n_ranks(u->cfg);
    u->ranks = ep_calloc((size_t)u->n_ranks, sizeof(*u->ranks));
    u->stats = ep_calloc((size_t)u->n_ranks, sizeof(*u->stats));
    u->stats_frames = ep_calloc((size_t)u->n_ranks, sizeof(*u->stats_frames));
    u->base = event_base_new();
    if (u->ranks == NULL || u->stats == NULL || u->stats_frames == NULL || u->base == NULL)
        return ep_fail(err, EP_ERR_NOMEM, "out of memory");
    ranks_reset(u);
    u->on_int = evsignal_new(u->base, SIGINT, on_stop_signal, u);
    u->on_term = evsignal_new(u->base, SIGTERM, on_stop_signal, u);
    u->on_child = evsignal_new(u->base, SIGCHLD, on_child, u);
    u->tick = event_new(u->base, -1, EV_PERSIST, on_tick, u);
    const struct timeval period = {.tv_usec = TICK_MS * 1000};
    if (u->on_int == NULL || u->on_term == NULL || u->on_child == NULL || u->tick == NULL ||
        event_add(u->on_int, NULL) != 0 || event_add(u->on_term, NULL) != 0 ||
        event_add(u->on_child, NULL) != 0 || event_add(u->tick, &period) != 0)
        return ep_fail(err, EP_ERR_NOMEM, "cannot start the event loop");
    u->max_clients = client_limit(u);
    status = watch_hangup(u, err);
    if (status == EP_OK) status = clients_listen(u, err);
    if (status == EP_OK) status = ranks_listen(u, err);
    if (status == EP_OK) status = job_launch(u, err);
    return status;
}

static void unlink_address(const char *address)
{
    if (strncmp(address, "unix:", 5) == 0) unlink(address + 5);
}

static void close_all(up *u)
{
    if (u->base != NULL) {
        requests_fail_all(u, EP_ERR_BUSY, "the daemon is stopping");
        clients_close_all(u);
    }
    job_kill(u);
    if (u->ranks != NULL) ranks_reset(u);
    if (u->client_listener != NULL) {
        evconnlistener_free(u->client_listener);
        unlink(u->cfg->front.socket);
    }
    if (u->rank_listener != NULL) {
        evconnlistener_free(u->rank_listener);
        unlink_address(u->cfg->front.control);
    }
    struct event *events[] = {u->on_int, u->on_term, u->on_hangup, u->on_child, u->tick};
    for (size_t i = 0; i < sizeof(events) / sizeof(events[0]); i++)
        if (events[i] != NULL) event_free(events[i]);
    if (u->base != NULL) event_base_free(u->base);
    model_placement_fini(&u->placement);
    model_tokenizer_close(u->tokenizer);
    model_close(u->m);
    ep_free(u->config_lines);
    ep_free(u->ranks);
    ep_free(u->stats);
    ep_free(u->stats_frames);
}

int up_main(const up_options *opt)
{
    static char exe[PATH_MAX];
    ep_err err = {""};
    config *cfg = NULL;
    signal(SIGPIPE, SIG_IGN);
    ep_log_open("moed", EP_LOG_INFO);
    if (config_load(&cfg, opt->config_path, &err) != EP_OK) {
        fprintf(stderr, "%s\n", err.text);
        return 2;
    }
    ssize_t n = readlink("/proc/self/exe", exe, sizeof(exe) - 1);
    if (n <= 0) snprintf(exe, sizeof(exe), "moed");
    up u = {.cfg = cfg,
            .exe = exe,
            .no_launch = opt->no_launch,
            .once = opt->once,
            .started = ep_now(),
            .exit_status = -1};
    ep_status status = open_all(&u, &err);
    if (status != EP_OK) {
        log_error("%s", err.text);
        u.exit_status = status == EP_ERR_INVALID || status == EP_ERR_UNSUPPORTED ? 2 : 1;
    } else {
        log_info("serving on %s, starting %d ranks", cfg->front.socket, u.n_ranks);
        event_base_dispatch(u.base);
    }
    close_all(&u);
    config_close(cfg);
    if (status == EP_OK) log_info("stopped");
    return u.exit_status < 0 ? 0 : u.exit_status;
}
