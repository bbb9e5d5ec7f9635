/*
 * Blocking connections by address, for ranks that dial in and for moectl.
 */
#include "daemon/dial.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static int dial_unix(const char *path, ep_err *err)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(a.sun_path)) {
        ep_fail(err, EP_ERR_INVALID, "%s: path too long for a socket", path);
        return -1;
    }
    memcpy(a.sun_path, path, strlen(path));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof(a)) != 0) {
        ep_fail(err, EP_ERR_IO, "%s: %s", path, strerror(errno));
        if (fd >= 0) close(fd);
        return -1;
    }
    return fd;
}

static int dial_tcp(const char *host_port, ep_err *err)
{
    char host[256];
    const char *colon = strrchr(host_port, ':');
    if (colon == NULL || (size_t)(colon - host_port) >= sizeof(host)) {
        ep_fail(err, EP_ERR_INVALID, "%s: not HOST:PORT", host_port);
        return -1;
    }
    snprintf(host, sizeof(host), "%.*s", (int)(colon - host_port), host_port);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list = NULL;
    int rc = getaddrinfo(host, colon + 1, &hints, &list);
    if (rc != 0) {
        ep_fail(err, EP_ERR_IO, "%s: %s", host_port, gai_strerror(rc));
        return -1;
    }
    int fd = -1;
    for (struct addrinfo *a = list; a != NULL && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
        if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen) != 0) {
            ep_fail(err, EP_ERR_IO, "%s: %s", host_port, strerror(errno));
            close(fd);
            fd = -1;
        }
    }
    freeaddrinfo(list);
    if (fd >= 0) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    return fd;
}

ep_status dial_remove_stale(const char *path, ep_err *err)
{
    struct stat st;
    if (lstat(path, &st) != 0) return EP_OK;
    if (!S_ISSOCK(st.st_mode))
        return ep_fail(err, EP_ERR_INVALID, "%s: exists and is no socket", path);
    if (unlink(path) != 0 && errno != ENOENT)
        return ep_fail(err, EP_ERR_IO, "%s: cannot be removed: %s", path, strerror(errno));
    return EP_OK;
}

int dial_open(const char *address, ep_err *err)
{
    if (strncmp(address, "unix:", 5) == 0) return dial_unix(address + 5, err);
    if (strncmp(address, "tcp:", 4) == 0) return dial_tcp(address + 4, err);
    ep_fail(err, EP_ERR_INVALID, "%s: not unix:PATH or tcp:HOST:PORT", address);
    return -1;
}
