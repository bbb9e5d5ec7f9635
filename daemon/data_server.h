#ifndef EP_DAEMON_DATA_SERVER_H
#define EP_DAEMON_DATA_SERVER_H
/*
 * data_server: the tensor service of a router rank (MoeForward). Clients connect to the router's
 * own address, so that megabytes of hidden states make no detour through the daemon. Each
 * connection has a thread that reads a frame, hands it to the engine as a rank_item, and waits for
 * the answer.
 */
#include "base/base.h"
#include "daemon/uplink.h"

typedef struct data_server data_server;

/* Listens on `address` ("unix:PATH", or "tcp:HOST:0" for a free port). Items go to `in`; the engine
 * must call item->answer once for each, which frees the item. */
ep_status data_server_open(data_server **out, const char *address, ep_queue *in, ep_err *err);
/* The address clients use. */
const char *data_server_address(const data_server *s);
/* Removes the socket; connections end with the process. */
void data_server_close(data_server *s);

#endif
