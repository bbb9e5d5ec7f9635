/*
 * locality: the plan that puts the ranks of a host on its NUMA nodes.
 */
#include "daemon/locality.h"
#include "tests/test.h"

static void ranks_spread_over_nodes(void)
{
    const int cores[] = {8, 8}, threads[] = {4, 4, 4, 4};
    int node[4];
    locality_plan(cores, 2, threads, 4, node);
    CHECK_INT(node[0], 0);
    CHECK_INT(node[1], 1);
    CHECK_INT(node[2], 0);
    CHECK_INT(node[3], 1);
}

static void larger_nodes_come_first(void)
{
    const int cores[] = {4, 16, 8}, threads[] = {8, 8, 8, 4, 4};
    int node[5];
    locality_plan(cores, 3, threads, 5, node);
    CHECK_INT(node[0], 1);
    CHECK_INT(node[1], 1); /* 8 left on 1 and on 2: the lower number */
    CHECK_INT(node[2], 2);
    CHECK_INT(node[3], 0);
    CHECK_INT(node[4], -1); /* nothing is left */
}

static void a_rank_too_large_stays_free(void)
{
    const int cores[] = {4, 4}, threads[] = {6, 2};
    int node[2];
    locality_plan(cores, 2, threads, 2, node);
    CHECK_INT(node[0], -1);
    CHECK_INT(node[1], 0);
    locality_plan(cores, 0, threads, 2, node);
    CHECK_INT(node[0], -1);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"ranks_spread_over_nodes", ranks_spread_over_nodes},
        {"larger_nodes_come_first", larger_nodes_come_first},
        {"a_rank_too_large_stays_free", a_rank_too_large_stays_free},
    };
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
