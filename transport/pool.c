/*
 * Buffers of a net: one mapping cut into equal parts, a free list, and two counters that keep a
 * share for each direction. A quarantined buffer is simply never put back. Last used is first
 * reused, so that a quiet rank touches little memory. Not locked; does not know what a peer is.
 */
#include "transport/pool.h"

#include <limits.h>

bool net_options_are_valid(const net_options *opt)
{
    return opt->n_ranks >= 1 && opt->rank >= 0 && opt->rank < opt->n_ranks &&
           opt->max_message >= 1 && opt->max_message <= INT_MAX - 64 && opt->n_buffers >= 4 &&
           opt->credit >= 1 && opt->credit < 64 && opt->send_deadline_ms >= 1 && opt->spin_us >= 0;
}

ep_status net_pool_init(net_pool *p, void *slots, size_t slot_bytes, const net_options *opt)
{
    size_t cap = (opt->max_message + 63) & ~(size_t)63, bytes;
    if (__builtin_mul_overflow(cap, (size_t)opt->n_buffers, &bytes)) return EP_ERR_TOO_LARGE;
    p->memory = ep_map(bytes);
    if (p->memory == NULL) return EP_ERR_NOMEM;
    p->bytes = bytes;
    p->limit = opt->n_buffers - opt->n_buffers / 4;
    for (int i = opt->n_buffers - 1; i >= 0; i--) {
        net_slot *s = (net_slot *)((uint8_t *)slots + (size_t)i * slot_bytes);
        s->pub.data = p->memory + (size_t)i * cap;
        s->pub.cap = opt->max_message;
        s->next = p->free;
        p->free = s;
    }
    return EP_OK;
}

bool net_pool_has(const net_pool *p, bool received)
{
    return p->free != NULL && p->held[received] < p->limit;
}

net_slot *net_pool_get(net_pool *p, bool received)
{
    if (!net_pool_has(p, received)) return NULL;
    net_slot *s = p->free;
    p->free = s->next;
    p->held[received]++;
    s->received = received;
    s->pub.len = 0;
    s->pub.peer = -1;
    return s;
}

void net_pool_put(net_pool *p, net_slot *s)
{
    p->held[s->received]--;
    s->next = p->free;
    p->free = s;
}

void net_pool_turn(net_pool *p, net_slot *s)
{
    if (!s->received) return;
    p->held[true]--;
    p->held[false]++;
    s->received = false;
}

void net_pool_fini(net_pool *p)
{
    ep_unmap(p->memory, p->bytes);
    p->memory = NULL;
    p->free = NULL;
}
