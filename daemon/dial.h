#ifndef EP_DAEMON_DIAL_H
#define EP_DAEMON_DIAL_H
#include "base/base.h"

/* A blocking connection to "unix:PATH" or "tcp:HOST:PORT": a file descriptor of the caller's, or -1
 * with err set (may be NULL). Any thread. */
int dial_open(const char *address, ep_err *err);

/* Makes room for a new socket: removes one that lies at `path`, refuses to touch anything else. */
ep_status dial_remove_stale(const char *path, ep_err *err);

#endif
