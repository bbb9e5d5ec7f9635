#ifndef EP_DAEMON_RANK_STATS_H
#define EP_DAEMON_RANK_STATS_H
/*
 * rank_stats: a rank's counters as a RankStats message to the daemon. Private to the rank's files.
 */
#include "daemon/rank.h"
#include "expert_shard/shard.h"
#include "router_node/router.h"

void rank_stats_send_shard(rank *r, const shard *s);
void rank_stats_send_router(rank *r, const router *ro);

#endif
