#ifndef EP_DAEMON_LOCALITY_H
#define EP_DAEMON_LOCALITY_H
/*
 * locality: on a machine of several NUMA nodes each rank runs on one of them, with its memory
 * beside it. The plan is the same in every rank of a host, because all read the same configuration.
 * On one node nothing is bound: the ranks share the cores and the kernel knows best.
 */
#include "daemon/config.h"

/* Chooses a node for each rank of a host, in rank order: the node with the most free cores (ties to
 * the lower number), a rank taking `threads[i]` of them. -1: a rank that no node has cores for
 * stays free. Pure. */
void locality_plan(const int *cores, int n_nodes, const int *threads, int n_ranks, int *node);

/* Binds this process (threads to come and memory) for rank `rank` of cfg. Does nothing on one node,
 * when `launch.bind` is none, or when the process may not bind; says what it did, once. */
void locality_bind(const config *cfg, int rank);

#endif
