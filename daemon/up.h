#ifndef EP_DAEMON_UP_H
#define EP_DAEMON_UP_H
/*
 * up: the daemon's own state, shared by the files that make it up: up.c (life cycle), job.c (mpirun
 * and what becomes of it), ranks.c (control connections), clients.c (client connections),
 * requests.c (the journal: admission, routing, streaming). Everything runs on one thread, the event
 * loop.
 *
 * The journal of a request (prompt, tokens so far, sampling) lives here and nowhere else, so that a
 * request can be given to another router after a loss.
 */
#include "daemon/config.h"
#include "model/model.h"
#include "proto/frame.h"

#include <sys/types.h>

struct bufferevent;
struct event;
struct event_base;
struct evconnlistener;
struct sockaddr;
typedef struct up up;

typedef enum rank_state { RANK_STARTING, RANK_LOADING, RANK_READY, RANK_LOST } rank_state;

typedef struct rank_link {
    up *u;
    int rank;
    rank_state state;
    struct bufferevent *bev; /* NULL: not connected */
    char *host, *describe, *data_address;
    uint64_t pid, done_bytes, all_bytes, weight_bytes, rss_bytes;
    uint32_t kv_tokens;
    ep_time heard; /* last frame */
    bool drained;
    int running;     /* routers: requests given to it */
    int64_t kv_used; /* routers: positions promised to them */
} rank_link;

typedef struct client {
    up *u;
    struct bufferevent *bev;
    struct client *next, *prev;
    uint64_t n_requests;  /* so far; a request's number on its connection */
    bool wants_drained;   /* asked for a drain */
    bool cut_off;         /* did not read: nothing goes to it any more, the loop closes it */
    uint64_t stats_round; /* waits for statistics of this round, 0: does not */
} client;

typedef struct request {
    uint64_t id;        /* in the daemon */
    uint64_t client_id; /* the n-th Generate of its connection, from 0 */
    client *from;       /* NULL: it left */
    int32_t *ids;       /* prompt, then what was generated */
    size_t n_prompt, n_ids, cap_ids;
    Moed__Sampling sampling;
    uint32_t max_tokens, n_logprobs, score_from;
    bool ignore_eos;
    int router; /* -1: waiting */
    ep_time arrived, deadline;
    uint8_t held[8]; /* bytes of a character that is not complete */
    int n_held;
    struct request *next, *prev;
} request;

typedef enum up_state { UP_LOADING, UP_READY, UP_DRAINING, UP_RELAUNCHING } up_state;

struct up {
    const config *cfg;
    const char *exe; /* absolute path of this program, what mpirun starts */
    bool no_launch, once;
    model *m;
    model_tokenizer *tokenizer;
    model_placement placement;
    char *config_lines;
    uint64_t config_digest;
    struct event_base *base;
    struct event *on_int, *on_term, *on_hangup, *on_child, *tick;
    struct evconnlistener *client_listener, *rank_listener;
    up_state state;
    ep_time started;
    int exit_status;

    /* the job (job.c) */
    char job[40];       /* secret of this launch */
    char *run_dir;      /* shared memory and session files of mpirun, removed afterwards */
    pid_t mpirun;       /* 0: none */
    bool job_lost;      /* a rank was lost: mpirun is being ended */
    bool relaunch_held; /* the next launch would not help */
    int failed_launches;
    uint64_t launches;
    ep_time launched, kill_at, drain_deadline;
    int drain_signals;
    bool drain_sent;

    rank_link *ranks;
    int n_ranks, n_strangers; /* strangers: connections without a Hello yet */

    client *clients;
    int n_clients, max_clients;
    ep_time full_said;                     /* when the log last said that connections are refused */
    request *waiting_first, *waiting_last; /* in order of arrival */
    request *running;
    int n_waiting, n_running;
    uint64_t next_request, completed, failed;

    uint64_t stats_round;      /* of the query under way */
    Moed__RankStats **stats;   /* [n_ranks], room for an answer */
    proto_frame *stats_frames; /* [n_ranks], without an envelope until answered */
    int n_stats, n_stats_wanted;
    ep_time stats_deadline;
};

/* up.c: `moed up`. Exit status. */
typedef struct up_options {
    const char *config_path;
    bool no_launch; /* ranks are started by hand and dial in */
    bool once;      /* end when the last request has ended */
} up_options;
int up_main(const up_options *opt);
void up_begin_drain(up *u, const char *why);
/* Something changed that may let the daemon go on: all ready, all drained, all done. */
void up_advance(up *u);
const char *up_state_name(const up *u);

/* job.c */
ep_status job_launch(up *u, ep_err *err);
/* A rank is gone: fail what it carried, end the job, relaunch when mpirun has ended. */
void job_rank_lost(up *u, rank_link *r, const char *why);
void job_child_ended(up *u); /* SIGCHLD */
void job_tick(up *u, ep_time now);
void job_kill(up *u);  /* now, and wait for it */
void job_clean(up *u); /* files of the ended job */
/* The mpirun command as words, NULL-terminated; *n without the NULL. Words live in `words`. */
ep_status job_command(const config *cfg, const char *exe, const char *run_dir, ep_buf *text,
                      char ***words);

/* ranks.c */
ep_status ranks_listen(up *u, ep_err *err);
void ranks_accept_again(up *u); /* takes connections if there is room for some */
void ranks_send(rank_link *r, const Moed__Envelope *e);
void ranks_reset(up *u); /* before a launch */
void ranks_drain(up *u);
void ranks_tick(up *u, ep_time now);
bool ranks_all(const up *u, rank_state state);
const char *ranks_name(const up *u, int rank, char *out,
                       size_t n); /* "shard s1 (rank 2, host h, pid 7)" */

/* clients.c */
ep_status clients_listen(up *u, ep_err *err);
void clients_send(client *c, const Moed__Envelope *e);
void clients_send_failed(client *c, uint64_t id, ep_status status, const char *text);
void clients_stats_ready(up *u);
void clients_close_all(up *u);

/* requests.c */
void requests_accept(up *u, client *c, const Moed__Generate *g);
void requests_assign(up *u);
void requests_token(up *u, const Moed__Token *t);
void requests_scores(up *u, Moed__Scores *s);
void requests_done(up *u, const Moed__Done *d);
void requests_failed(up *u, const Moed__Failed *f);
void requests_fail_running(up *u, int router, ep_status status, const char *text); /* -1: all */
void requests_fail_all(up *u, ep_status status, const char *text);
void requests_client_left(up *u, client *c);
void requests_cancel(up *u, client *c, uint64_t client_id);
void requests_tick(up *u, ep_time now);

/* listen.c: a listener on "unix:PATH" (stale sockets are removed, a living one refused) or
 * "tcp:HOST:PORT". */
ep_status listen_open(up *u, const char *address, struct evconnlistener **out,
                      void (*cb)(struct evconnlistener *, int, struct sockaddr *, int, void *),
                      ep_err *err);
/* Says, at most every few seconds, that a connection could not be taken. */
void listen_say_full(up *u, const char *why);
/* The next frame of a connection: EP_AGAIN, EP_OK or EP_ERR_PROTO. The frame owns its envelope. */
ep_status listen_frame(struct bufferevent *bev, proto_frame *out);

#endif
