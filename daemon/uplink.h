#ifndef EP_DAEMON_UPLINK_H
#define EP_DAEMON_UPLINK_H
/*
 * uplink: a rank's control connection to the daemon, on a thread of its own. Frames that arrive
 * become items of the engine's queue; what the engine sends is packed into a fixed buffer, so a
 * step does not allocate for it. The end of the connection is the end of the daemon: the rank
 * leaves at once.
 */
#include "base/base.h"
#include "proto/frame.h"

/* What the engine finds in its queue. */
typedef struct rank_item {
    proto_frame frame; /* from the daemon, or a Forward of a data connection */
    uint8_t *bytes;    /* what frame borrows from */
    void (*answer)(struct rank_item *item, const Moed__Envelope *e, const void *payload,
                   size_t payload_bytes); /* data connections; NULL for the daemon's */
    void *connection;
} rank_item;
void rank_item_free(rank_item *item);

typedef struct uplink uplink;

/* Connects (trying again for up to 10 s) to "unix:PATH" or "tcp:HOST:PORT" and starts the thread.
 * Items go to `in`, which must wake the engine. */
ep_status uplink_open(uplink **out, const char *address, ep_queue *in, ep_err *err);
/* Any thread. Waits while the buffer is full; never fails (a dead connection ends the process). */
void uplink_send(uplink *u, const Moed__Envelope *e);
/* Sends everything that waits, then closes. */
void uplink_close(uplink *u);

#endif
