/*
 * The door to hwloc. Ranks of a host are known from the configuration; their nodes are planned by
 * free cores, so a shard's experts lie beside the cores that read them. Only nodes that this
 * process may use count: hwloc shows a container's or a batch system's share, not the whole
 * machine.
 */
#include "daemon/locality.h"

#include <hwloc.h>
#include <string.h>

enum { MAX_NODES = 64, MAX_LOCAL = 4096 };

void locality_plan(const int *cores, int n_nodes, const int *threads, int n_ranks, int *node)
{
    int left[MAX_NODES];
    for (int i = 0; i < n_nodes; i++)
        left[i] = cores[i];
    for (int r = 0; r < n_ranks; r++) {
        int best = 0;
        for (int i = 1; i < n_nodes; i++)
            if (left[i] > left[best]) best = i;
        bool fits = n_nodes > 0 && threads[r] <= left[best];
        node[r] = fits ? best : -1;
        if (fits) left[best] -= threads[r];
    }
}

/* The node planned for `rank` among the ranks of its host; -1: none. */
static int own_node(const config *cfg, int rank, hwloc_topology_t t, int n_nodes)
{
    static int threads[MAX_LOCAL], node[MAX_LOCAL];
    int cores[MAX_NODES], n = 0, me = 0;
    const char *host = config_rank_at(cfg, rank)->host;
    for (int i = 0; i < n_nodes; i++) {
        hwloc_obj_t o = hwloc_get_obj_by_type(t, HWLOC_OBJ_NUMANODE, (unsigned)i);
        cores[i] = hwloc_get_nbobjs_inside_cpuset_by_type(t, o->cpuset, HWLOC_OBJ_CORE);
    }
    for (int i = 0; i < config_n_ranks(cfg) && n < MAX_LOCAL; i++) {
        if (strcmp(config_rank_at(cfg, i)->host, host) != 0) continue;
        if (i == rank) me = n;
        threads[n++] = config_rank_at(cfg, i)->threads;
    }
    locality_plan(cores, n_nodes, threads, n, node);
    return node[me];
}

void locality_bind(const config *cfg, int rank)
{
    hwloc_topology_t t;
    if (strcmp(cfg->launch.bind, "none") == 0 || hwloc_topology_init(&t) != 0) return;
    if (hwloc_topology_load(t) != 0) {
        hwloc_topology_destroy(t);
        return;
    }
    int n_nodes = hwloc_get_nbobjs_by_type(t, HWLOC_OBJ_NUMANODE);
    if (n_nodes > MAX_NODES) n_nodes = MAX_NODES;
    int node = n_nodes > 1 ? own_node(cfg, rank, t, n_nodes) : -1;
    if (node >= 0) {
        hwloc_obj_t o = hwloc_get_obj_by_type(t, HWLOC_OBJ_NUMANODE, (unsigned)node);
        bool cpu = hwloc_set_cpubind(t, o->cpuset, HWLOC_CPUBIND_PROCESS) == 0;
        bool mem = hwloc_set_membind(t, o->nodeset, HWLOC_MEMBIND_BIND,
                                     HWLOC_MEMBIND_PROCESS | HWLOC_MEMBIND_BYNODESET) == 0;
        log_info("NUMA node %d of %d: threads %s, memory %s", node, n_nodes,
                 cpu ? "bound" : "not bound", mem ? "bound" : "not bound");
    } else if (n_nodes > 1) {
        log_info("no NUMA node has %d cores left for this rank: not bound",
                 config_rank_at(cfg, rank)->threads);
    }
    hwloc_topology_destroy(t);
}
