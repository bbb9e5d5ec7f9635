#ifndef EP_DAEMON_RANK_H
#define EP_DAEMON_RANK_H
/*
 * rank: what mpirun starts. rank.c brings the process up (MPI, configuration, control connection,
 * model) and hands over to the role: rank_router.c or rank_shard.c. Private to the rank's files.
 */
#include "daemon/config.h"
#include "daemon/uplink.h"
#include "model/model.h"
#include "transport/net.h"

typedef struct rank {
    const config *cfg;
    const config_rank *self;
    int rank, n_ranks;
    model *m;
    model_placement placement;
    ep_queue *in; /* rank_items for the engine */
    uplink *up;
    net *n;
    bool drained; /* the role ended because the daemon asked */
} rank;

/* `moed rank`: never returns before the job ends. Exit status. */
int rank_main(const char *config_path);

/* The roles. They load, announce Ready, serve until drained. */
ep_status rank_router_run(rank *r, ep_err *err);
ep_status rank_shard_run(rank *r, ep_err *err);

/* Helpers of the roles. */
void rank_send_progress(rank *r, uint64_t done, uint64_t all, const char *what);
void rank_send_ready(rank *r, const char *describe, uint64_t weight_bytes, const char *data_address,
                     uint32_t kv_tokens);
void rank_send_drained(rank *r);
/* Resident memory of this process in bytes. */
uint64_t rank_rss_bytes(void);
/* Opens the transport for messages of at most max_message bytes. A wake of the queue wakes it. */
ep_status rank_open_net(rank *r, size_t max_message, int n_buffers, ep_err *err);
/* Largest slice and reply of this cluster. */
size_t rank_max_message(const rank *r);

#endif
