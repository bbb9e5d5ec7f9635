#ifndef EP_EXPERT_SHARD_STORE_H
#define EP_EXPERT_SHARD_STORE_H
/*
 * Private to expert_shard. store: the owned experts, packed on a device, and what is known about
 * them. Read-only once loaded. state: the shard as shard.c and serve.c see it.
 */
#include "expert_shard/cache.h"
#include "expert_shard/shard.h"
#include "proto/wire.h"

#include <pthread.h>
#include <stdatomic.h>

typedef struct shard_store {
    const compute_ops *ops;
    compute *device;
    shard_cache *cache; /* while loading from packed experts, else NULL */
    int n_layers, n_owned;
    int16_t *experts;       /* [n_owned] global ids, ascending: the local order */
    compute_stack **stacks; /* [n_layers]; all NULL when nothing is owned */
    kern_act *forms;        /* [n_layers] form of a slice's rows */
    uint64_t *checksums;    /* [n_layers * n_owned] */
    uint64_t weight_bytes;
} shard_store;

/* Opens the device and loads. s is zeroed by the caller; shard_store_fini is due on every result.
 */
ep_status shard_store_init(shard_store *s, const shard_options *opt, ep_err *err);
void shard_store_fini(shard_store *s);

#define SHARD_WAITING_MAX 16 /* messages taken from the transport and not yet answered */

typedef struct shard_waiting {
    net_buf *buf;
    ep_time since;
} shard_waiting;

/* A slice that is being answered. */
typedef struct shard_flight {
    wire_header h; /* as it came; of what is refused, what could be read of it */
    size_t msg_bytes;
    void *reply;
    size_t reply_bytes; /* once answered; 0: nothing is to be sent */
    ep_time begin;
    bool is_computing; /* the device has message and reply until shard_answer_end */
} shard_flight;

/* Its buffers, in the serving loop. */
typedef struct shard_flying {
    shard_flight f;
    net_buf *msg, *reply;
} shard_flying;

struct shard {
    shard_store store;
    const model_placement *placement;
    int shard_i, hidden, top_k, max_rows, max_pairs;

    /* One slice, sorted by expert. */
    int32_t *pair_local;    /* [max_pairs] in the slice's order */
    int32_t *expert_offset; /* [n_owned + 1] */
    int32_t *next;          /* [n_owned] */
    int32_t *pair_row;      /* [max_pairs] sorted */
    int32_t *pair_out;      /* [max_pairs] sorted */

    shard_counters counters;
    bool device_failed; /* said once */
    bool device_lost;   /* no slice will be computed any more */
    char failure[320];  /* what shard_failure says */

    ep_time computed; /* the end of the last pass */

    /* The serving loop; `waiting` and `flying` are rings. */
    shard_waiting waiting[SHARD_WAITING_MAX];
    int waiting_at, n_waiting;
    shard_flying flying[COMPUTE_DEPTH];
    int flying_at, n_flying;
    net_buf *spare;     /* for the next reply */
    bool is_pinned;     /* the transport's buffers, for the device */
    size_t reply_bytes; /* of the largest */
    void (*tick)(void *arg);
    void *tick_arg;
    ep_time next_tick;
    bool net_lost; /* the transport returned what cannot be gone on from */
    ep_status net_status;

    atomic_bool stop, drain;
    pthread_mutex_t lock; /* guards n against shard_stop and shard_drain from other threads */
    bool has_lock;
    net *n; /* while serving */
};

/* shard_answer in two halves, at most the device's depth of them under way; wait_ns: how long the
 * message waited here. The first answers what needs no computing. The second ends the oldest that
 * is_computing. */
void shard_answer_begin(shard *s, shard_flight *f, const void *msg, size_t msg_bytes,
                        uint16_t sender, uint64_t wait_ns, void *reply);
void shard_answer_end(shard *s, shard_flight *f);
/* Counters are read by other threads while this one writes. */
void shard_count(uint64_t *counter, uint64_t more);

#endif
