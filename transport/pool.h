#ifndef EP_TRANSPORT_POOL_H
#define EP_TRANSPORT_POOL_H
/*
 * pool: the buffers of one net, inside transport/ only. A transport keeps an array of its own
 * structs, each beginning with a net_slot; the pool gives them memory and hands them out. Owned by
 * one thread or guarded by the transport's lock.
 *
 * Rule: a quarter of the buffers is kept for each direction. Ranks that only send cannot block each
 * other, and a rank flooded with slices still has a buffer to answer from.
 */
#include "transport/net.h"

typedef struct net_slot {
    net_buf pub; /* first: a net_buf handed out is a net_slot */
    struct net_slot *next;
    bool received; /* which direction it counts for while it is out */
} net_slot;

typedef struct net_pool {
    uint8_t *memory;
    size_t bytes;
    int limit;   /* most buffers one direction may hold */
    int held[2]; /* out for sending, out for receiving; quarantined ones stay counted */
    net_slot *free;
} net_pool;

/* Whether options make sense for any transport. */
bool net_options_are_valid(const net_options *opt);
/* slots: opt->n_buffers zeroed elements of slot_bytes each, kept by the caller. */
ep_status net_pool_init(net_pool *p, void *slots, size_t slot_bytes, const net_options *opt);
bool net_pool_has(const net_pool *p, bool received);
net_slot *net_pool_get(net_pool *p, bool received); /* NULL when there is none for this direction */
void net_pool_put(net_pool *p, net_slot *s);
/* A buffer that was received and is now being sent changes sides. */
void net_pool_turn(net_pool *p, net_slot *s);
void net_pool_fini(net_pool *p);

#endif
