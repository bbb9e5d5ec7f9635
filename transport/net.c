/*
 * The transport-neutral face: defaults, and one line per operation that goes to the transport's
 * table. What every transport has to check the same way (a buffer's length, a peer's number) is
 * checked here, so a transport sees only sends it can make. Keeps no state.
 */
#include "transport/net.h"

net_options net_options_default(void)
{
    return (net_options){
        .rank = 0,
        .n_ranks = 1,
        .max_message = (size_t)1 << 20,
        .n_buffers = 64,
        .credit = 16,
        .send_deadline_ms = 2000,
        .spin_us = 50,
    };
}

net_buf *net_take(net *n, size_t bytes)
{
    return n->ops->take(n, bytes);
}

void net_give(net *n, net_buf *b)
{
    if (b != NULL) n->ops->give(n, b);
}

ep_status net_send(net *n, int peer, net_buf *b)
{
    ep_status status = EP_OK;
    if (peer < 0 || peer >= n->n_ranks) status = EP_ERR_INVALID;
    if (b->len > b->cap) status = EP_ERR_TOO_LARGE;
    if (status != EP_OK) {
        n->ops->give(n, b);
        return status;
    }
    return n->ops->send(n, peer, b);
}

ep_status net_next(net *n, net_buf **out)
{
    return n->ops->next(n, out);
}

ep_status net_wait(net *n, ep_time deadline)
{
    return n->ops->wait(n, deadline);
}

void net_wake(net *n)
{
    n->ops->wake(n);
}

void net_forget(net *n, int peer)
{
    if (peer >= 0 && peer < n->n_ranks) n->ops->forget(n, peer);
}

void net_close(net *n)
{
    if (n != NULL) n->ops->close(n);
}
