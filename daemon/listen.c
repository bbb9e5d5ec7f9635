/*
 * Listeners and frames on libevent connections, for clients and ranks alike.
 */
#include "daemon/dial.h"
#include "daemon/up.h"

#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/listener.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { BACKLOG = 4096, FULL_SAY_MS = 5000 };

typedef void (*listen_cb)(struct evconnlistener *, int, struct sockaddr *, int, void *);

/* Between looking for another daemon and listening nobody else may do the same in this folder. The
 * lock leaves no file; whoever holds it for long is no daemon, and is not waited for. */
static int lock_folder(const char *folder)
{
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (int i = 0; fd >= 0 && i < 200 && flock(fd, LOCK_EX | LOCK_NB) != 0; i++)
        usleep(10000);
    return fd;
}

static ep_status listen_unix(up *u, const struct sockaddr_un *a, struct evconnlistener **out,
                             listen_cb cb, ep_err *err)
{
    char address[sizeof(a->sun_path) + 8];
    snprintf(address, sizeof(address), "unix:%s", a->sun_path);
    int other = dial_open(address, NULL);
    if (other >= 0) {
        close(other);
        return ep_fail(err, EP_ERR_BUSY, "%s: another daemon serves this socket", a->sun_path);
    }
    ep_status status = dial_remove_stale(a->sun_path, err);
    if (status != EP_OK) return status;
    mode_t mask = umask(077); /* the socket is the owner's */
    *out = evconnlistener_new_bind(u->base, cb, u, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC,
                                   BACKLOG, (const struct sockaddr *)a, sizeof(*a));
    umask(mask);
    return *out != NULL ? EP_OK : ep_fail(err, EP_ERR_IO, "%s: %s", a->sun_path, strerror(errno));
}

static ep_status open_unix(up *u, const char *path, struct evconnlistener **out, listen_cb cb,
                           ep_err *err)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(a.sun_path))
        return ep_fail(err, EP_ERR_INVALID, "%s: path too long for a socket", path);
    memcpy(a.sun_path, path, strlen(path));
    char folder[sizeof(a.sun_path)];
    snprintf(folder, sizeof(folder), "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash != NULL && slash != folder) {
        *slash = '\0';
        if (mkdir(folder, 0755) != 0 && errno != EEXIST)
            return ep_fail(err, EP_ERR_IO, "%s: cannot make the folder: %s", folder,
                           strerror(errno));
    }
    int lock = lock_folder(slash == NULL ? "." : slash == folder ? "/" : folder);
    ep_status status = listen_unix(u, &a, out, cb, err);
    if (lock >= 0) close(lock);
    return status;
}

static ep_status open_tcp(up *u, const char *host_port, struct evconnlistener **out, listen_cb cb,
                          ep_err *err)
{
    char host[256];
    const char *colon = strrchr(host_port, ':');
    if (colon == NULL || (size_t)(colon - host_port) >= sizeof(host))
        return ep_fail(err, EP_ERR_INVALID, "%s: not HOST:PORT", host_port);
    snprintf(host, sizeof(host), "%.*s", (int)(colon - host_port), host_port);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *list = NULL;
    int rc = getaddrinfo(host[0] != '\0' ? host : NULL, colon + 1, &hints, &list);
    if (rc != 0) return ep_fail(err, EP_ERR_INVALID, "%s: %s", host_port, gai_strerror(rc));
    *out = evconnlistener_new_bind(
        u->base, cb, u, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC | LEV_OPT_REUSEABLE, BACKLOG,
        list->ai_addr, (int)list->ai_addrlen);
    int saved = errno;
    freeaddrinfo(list);
    return *out != NULL ? EP_OK : ep_fail(err, EP_ERR_IO, "%s: %s", host_port, strerror(saved));
}

void listen_say_full(up *u, const char *why)
{
    ep_time now = ep_now();
    if (!ep_time_is_past(ep_time_after_ms(u->full_said, FULL_SAY_MS), now)) return;
    u->full_said = now;
    log_warn("connections are refused: %s", why);
}

/* Most likely no descriptor is free. The connection stays in the backlog and would be reported
 * again at once; the daemon's tick looks again. */
static void on_accept_error(struct evconnlistener *l, void *arg)
{
    listen_say_full(arg, strerror(errno));
    evconnlistener_disable(l);
}

ep_status listen_open(up *u, const char *address, struct evconnlistener **out, listen_cb cb,
                      ep_err *err)
{
    ep_status status = strncmp(address, "unix:", 5) == 0 ? open_unix(u, address + 5, out, cb, err)
                                                         : open_tcp(u, address + 4, out, cb, err);
    if (status == EP_OK) evconnlistener_set_error_cb(*out, on_accept_error);
    return status;
}

ep_status listen_frame(struct bufferevent *bev, proto_frame *out)
{
    struct evbuffer *in = bufferevent_get_input(bev);
    uint8_t head[PROTO_FRAME_BYTES];
    size_t have = evbuffer_get_length(in), need;
    if (have < sizeof(head)) return EP_AGAIN;
    evbuffer_copyout(in, head, sizeof(head));
    ep_status status = proto_frame_take(head, sizeof(head), PROTO_MAX_ENVELOPE, 0, out, &need);
    if (status != EP_AGAIN) return status;
    if (have < need) {
        bufferevent_setwatermark(bev, EV_READ, need, PROTO_MAX_ENVELOPE + PROTO_FRAME_BYTES);
        return EP_AGAIN;
    }
    const uint8_t *bytes = evbuffer_pullup(in, (ssize_t)need);
    if (bytes == NULL) return EP_ERR_NOMEM;
    status = proto_frame_take(bytes, need, PROTO_MAX_ENVELOPE, 0, out, &need);
    if (status == EP_OK) {
        evbuffer_drain(in, need);
        bufferevent_setwatermark(bev, EV_READ, 0, PROTO_MAX_ENVELOPE + PROTO_FRAME_BYTES);
    }
    return status == EP_AGAIN ? EP_ERR_PROTO : status;
}
