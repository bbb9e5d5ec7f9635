#ifndef EP_DAEMON_CONFIG_H
#define EP_DAEMON_CONFIG_H
/*
 * config: the one YAML file that a cluster is, read strictly. Every mistake is reported in one run
 * as "file:line:column: what", with the key's path and, for a near miss, the key that was probably
 * meant. A config is read-only after config_load; its strings live until config_close.
 */
#include "base/base.h"

typedef struct config_rank {
    const char *name, *host, *device;
    int threads;
    int kv_tokens;       /* routers */
    const char *experts; /* shards: "0-3,8", or NULL: left to the placement */
    size_t line, column; /* of its entry in the file, from 0; no key */
} config_rank;

typedef struct config {
    const char *path;   /* the file, absolute */
    const char *model;  /* resolved: relative paths are relative to the file's folder */
    const char *packed; /* resolved likewise, or NULL */
    const char *kernels;
    struct {
        const char *socket;  /* Unix socket of clients */
        const char *control; /* where ranks dial in: "unix:/path" or "tcp:host:port" */
    } front;
    config_rank *routers, *shards;
    int n_routers, n_shards;
    struct {
        const char *strategy;
        int replicas;
    } placement;
    struct {
        const char *combine;
    } wire;
    struct {
        int max_tokens_per_step, prefill_chunk, max_sequences, max_queue, top_k;
        int deadline_s, per_layer_ms, layer_tries, load_s, drain_s;
    } limits;
    struct {
        const char *mpirun;  /* program */
        const char *options; /* extra words, split at blanks */
        const char *bind;    /* "auto": ranks to NUMA nodes where there are several */
        int relaunches;      /* in a row without becoming ready, before giving up */
    } launch;
    ep_arena strings;
} config;

/* Reads and checks a file. On failure err holds every mistake found, one per line (as many as fit).
 */
ep_status config_load(config **out, const char *path, ep_err *err);
/* The same over text; `name` stands in messages and gives the folder of relative paths (fuzzing,
 * tests). */
ep_status config_parse(config **out, const char *name, const char *text, size_t len, ep_err *err);
void config_close(config *c);

/* Where clients and daemon meet if nobody says: the same for both, and another for each user. */
void config_default_socket(char *out, size_t out_bytes);

/* The resolved configuration: as YAML that parses to the same again, or one "path: value" per line.
 */
ep_status config_print_yaml(const config *c, ep_buf *out);
ep_status config_print_lines(const config *c, ep_buf *out);
/* XXH3 over the lines. */
uint64_t config_digest(const config *c);
/* Names the first key in which two prints by config_print_lines differ: "limits.max_queue (256
 * here, 128 there)". */
void config_first_difference(const char *here, const char *there, char *out, size_t out_bytes);

/* Ranks: routers first, then shards. */
int config_n_ranks(const config *c);
bool config_is_router(const config *c, int rank);
const config_rank *config_rank_at(const config *c, int rank);
/* True when every host is this machine ("localhost"). */
bool config_is_local(const config *c);

#endif
