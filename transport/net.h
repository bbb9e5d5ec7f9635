#ifndef EP_TRANSPORT_NET_H
#define EP_TRANSPORT_NET_H
/*
 * net: how messages travel between ranks. One exchange API over two transports: `loopback` (N ranks
 * in one process, with scripted delay, loss, duplication, truncation, corruption and death) and
 * `mpi` (point-to-point only). A message is bytes with a source; the meaning is proto/wire.h's.
 *
 * One thread, the engine, calls everything here but net_wake. Buffers come from the transport, are
 * allocated and registered once, and change hands: net_take gives one to fill, net_send takes it
 * back, net_next gives one that arrived, net_give returns it.
 *
 * Why messages and not rounds: a shard serves slices of any router and any layer as they arrive; a
 * round (everything to and from every peer) would make routers wait for each other. See
 * docs/architecture.md.
 *
 * Rules kept here: fewer than net_options.credit sends outstanding per peer (EP_AGAIN beyond); a
 * buffer of a send that does not complete before its deadline is quarantined, never reused; nothing
 * waits without a deadline; no collective after open.
 */
#include "base/base.h"

typedef struct net net;

typedef struct net_buf {
    uint8_t *data; /* 64-byte aligned */
    size_t cap;    /* bytes that may be used */
    size_t len;    /* bytes of the message */
    int peer;      /* received: who sent it */
} net_buf;

typedef struct net_stats {
    uint64_t sent, received, sent_bytes, received_bytes;
    uint64_t no_credit, quarantined, dropped, wakes, sleeps;
} net_stats;

typedef struct net_options {
    int rank, n_ranks;
    size_t max_message;   /* largest message in bytes */
    int n_buffers;        /* buffers for sending and receiving together */
    int credit;           /* sends outstanding per peer, below 64 */
    int send_deadline_ms; /* after this an incomplete send is quarantined and its peer suspected */
    int spin_us;          /* net_wait polls this long before it blocks; default 50 */
} net_options;
net_options net_options_default(void);

/* Functions of a transport; callers use the net_* functions below. */
typedef struct net_ops {
    const char *name;
    net_buf *(*take)(net *n, size_t bytes);
    void (*give)(net *n, net_buf *b);
    ep_status (*send)(net *n, int peer, net_buf *b);
    ep_status (*next)(net *n, net_buf **out);
    ep_status (*wait)(net *n, ep_time deadline);
    void (*wake)(net *n);
    void (*forget)(net *n, int peer);
    void (*close)(net *n);
} net_ops;

struct net {
    const net_ops *ops;
    int rank, n_ranks, n_buffers;
    net_stats stats;
    void *memory; /* every buffer lies in it; until net_close, of loopback until net_hub_close */
    size_t memory_bytes;
};

/* A buffer of at least `bytes`, len = 0; NULL when none is free (all in flight) or bytes is too
 * large. A quarter of the buffers is kept for receiving and a quarter for sending, so that neither
 * side of a busy rank can starve the other. */
net_buf *net_take(net *n, size_t bytes);
void net_give(net *n, net_buf *b);
/* Sends b->len bytes to peer and takes b over, on every result but EP_AGAIN (no credit: b stays the
 * caller's). EP_ERR_PEER_LOST when the peer was forgotten. */
ep_status net_send(net *n, int peer, net_buf *b);
/* The next complete message in order of arrival; EP_AGAIN when there is none. Also makes progress.
 */
ep_status net_next(net *n, net_buf **out);
/* Returns EP_OK when a message may be there, net_wake was called or (after a net_take or net_send
 * that was refused) a send completed; EP_AGAIN when the deadline passed. Polls for spin_us, then
 * blocks without using the processor; while own sends are under way it keeps making progress,
 * yielding. */
ep_status net_wait(net *n, ep_time deadline);
/* Makes a net_wait of this rank return; any thread; calls before a wait are not lost. */
void net_wake(net *n);
/* The peer is dead: quarantine what is on its way there, refuse further sends. */
void net_forget(net *n, int peer);
void net_close(net *n);

/* ---- loopback ---- */

/* What happens to a message, decided by a script before it is delivered. */
typedef struct net_fault {
    bool lose;
    int duplicates;     /* extra copies */
    int delay_ms;       /* of this message (others may overtake it) */
    size_t truncate_to; /* 0: no */
    bool corrupt;       /* flips a bit; which one follows from the message number */
} net_fault;
/* Called under a lock for the i-th message (from 0) from `from` to `to`. */
typedef net_fault (*net_script)(void *arg, int from, int to, uint64_t i, const void *msg,
                                size_t len);

typedef struct net_hub net_hub; /* what the ranks of one process share */
ep_status net_hub_open(net_hub **out, int n_ranks, net_script script, void *script_arg);
/* Messages to and from the rank vanish from now on, as with a process that was killed. Any thread.
 */
void net_hub_kill(net_hub *h, int rank);
void net_hub_close(net_hub *h); /* after all nets are closed */
/* Each rank is driven by its own thread. */
ep_status net_loopback_open(net **out, net_hub *hub, const net_options *opt);

/* ---- mpi ---- */

/* MPI_Init_thread(FUNNELED) on the calling thread, which stays the only one to call MPI. Fills rank
 * and n_ranks. Collective. SIGPIPE is ignored from here on. */
ep_status net_mpi_start(int *rank, int *n_ranks, ep_err *err);
/* Start-up only: every rank gives n bytes, out receives n * n_ranks bytes. */
ep_status net_mpi_allgather(const void *mine, size_t n, void *out);
ep_status net_mpi_open(net **out, const net_options *opt, ep_err *err);
/* MPI_Finalize, guarded by an alarm, if `clean`; else nothing: the caller ends with _exit. */
void net_mpi_stop(bool clean);

#endif
