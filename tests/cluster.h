#ifndef EP_TESTS_CLUSTER_H
#define EP_TESTS_CLUSTER_H
/*
 * cluster: routers and shards of one job inside a test, over loopback. Ranks 0..n_routers-1 are
 * routers, driven by cluster_run (one thread each), the rest are shards with a thread each. What
 * comes out of the routers is collected per request as an answer.
 */
#include "expert_shard/shard.h"
#include "model/model.h"
#include "router_node/router.h"
#include "transport/net.h"

typedef struct answer {
    uint64_t id;
    int32_t *tokens;
    double *logprobs;
    int n_tokens;
    double *scores; /* by prompt position */
    int n_scores;
    router_logprob top[20]; /* of the last token */
    int n_top;
    float *logits; /* [n_logits, vocab] in order of position, when kept */
    int *logit_positions;
    int n_logits;
    bool done, failed;
    router_finish finish;
    int n_prompt, n_generated;
    ep_status status;
    char text[256];
    ep_time ended;
} answer;

typedef struct cluster_options {
    const model *m;
    int n_routers, n_shards;
    const char *const *experts; /* [n_shards] as model_placement_make, or NULL */
    net_script script;
    void *script_arg;
    int router_threads, shard_threads;
    size_t max_message; /* 0: as large as needed */
    int n_buffers;      /* of each rank's transport; 0: 64 */
    bool keep_logits;
    router_options router; /* limits, timing, top_k, tap.moe, end_ids; the rest is filled in */
} cluster_options;
/* 1 router, 1 shard, one thread each, 64 rows a step. */
cluster_options cluster_options_default(const model *m);

typedef struct cluster cluster;

ep_status cluster_open(cluster **out, const cluster_options *opt, ep_err *err);
void cluster_close(cluster *c);

router *cluster_router(cluster *c, int i);
net_hub *cluster_hub(cluster *c);
int cluster_shard_rank(const cluster *c, int shard_i);

/* Gives the request to router (n-th request) % n_routers; returns what it answered. */
ep_status cluster_submit(cluster *c, const router_request *req, ep_err *err);
/* A greedy request without deadline. */
router_request cluster_request(uint64_t id, const int32_t *prompt, int n_prompt, int max_tokens);
/* Steps every router until none has anything to do. Returns the first error of a step. */
ep_status cluster_run(cluster *c);
/* The answer of a request; never NULL. */
const answer *cluster_answer(const cluster *c, uint64_t id);

/* A copy of a file in memory, to be changed before model_file_open_bytes. */
uint8_t *cluster_read_file(const char *path, size_t *n);
/* Opens the model of bytes in memory (which must outlive it); NULL with a message printed. */
model *cluster_open_model(const void *bytes, size_t n);
/* $MOED_SOURCE/name, or the same below the working directory; static buffer. */
const char *cluster_source_path(const char *name);
/* $MOED_SHARED/name if it can be read, else NULL; static buffer. */
const char *cluster_shared_path(const char *name);

#endif
