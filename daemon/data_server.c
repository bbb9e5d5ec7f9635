/*
 * A thread per connection, at most MAX_CONNECTIONS: tensor clients are few and each waits for its
 * answer before it asks again, so blocking reads are the simplest thing that is right. When all
 * places are taken, the connection that has been silent for longest gives way to a new one. A frame
 * is bounded before memory is asked for. The engine never touches a socket: `answer` leaves the
 * packed reply with the connection's thread and wakes it.
 */
#include "daemon/data_server.h"
#include "daemon/dial.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 16, MAX_FORWARD_ENVELOPE = 4096 };

typedef struct connection connection;

struct data_server {
    int fd;
    ep_queue *in;
    char address[256], path[108];
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t left;                 /* a place became free */
    connection *places[MAX_CONNECTIONS]; /* under the lock; NULL: free */
};

struct connection {
    data_server *s;
    int fd, place;
    atomic_bool asked;        /* its request is with the engine */
    _Atomic int64_t heard_ns; /* when its last byte came */
    pthread_mutex_t lock;
    pthread_cond_t answered;
    bool done;
    ep_buf reply;
};

/* On the engine's thread. */
static void answer(rank_item *item, const Moed__Envelope *e, const void *payload,
                   size_t payload_bytes)
{
    connection *c = item->connection;
    rank_item_free(item);
    pthread_mutex_lock(&c->lock);
    c->reply.len = 0;
    if (proto_frame_add(&c->reply, e, payload, payload_bytes) != EP_OK) c->reply.len = 0;
    c->done = true;
    pthread_cond_signal(&c->answered);
    pthread_mutex_unlock(&c->lock);
}

static bool read_all(connection *c, uint8_t *p, size_t n)
{
    while (n > 0) {
        ssize_t got = recv(c->fd, p, n, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        atomic_store(&c->heard_ns, ep_now().ns);
        p += got;
        n -= (size_t)got;
    }
    return true;
}

static bool write_all(int fd, const uint8_t *p, size_t n)
{
    while (n > 0) {
        ssize_t put = send(fd, p, n, MSG_NOSIGNAL);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) return false;
        p += put;
        n -= (size_t)put;
    }
    return true;
}

/* One request: NULL when the connection ended or sent what is no Forward. */
static rank_item *read_item(connection *c)
{
    uint8_t head[PROTO_FRAME_BYTES];
    if (!read_all(c, head, sizeof(head))) return NULL;
    proto_frame f;
    size_t need;
    if (proto_frame_take(head, sizeof(head), MAX_FORWARD_ENVELOPE, PROTO_MAX_PAYLOAD, &f, &need) !=
        EP_AGAIN)
        return NULL;
    rank_item *item = ep_calloc(1, sizeof(*item));
    uint8_t *bytes = ep_alloc(need);
    if (item == NULL || bytes == NULL) goto fail;
    memcpy(bytes, head, sizeof(head));
    if (!read_all(c, bytes + sizeof(head), need - sizeof(head))) goto fail;
    if (proto_frame_take(bytes, need, MAX_FORWARD_ENVELOPE, PROTO_MAX_PAYLOAD, &f, &need) != EP_OK)
        goto fail;
    item->frame = f;
    item->bytes = bytes;
    item->answer = answer;
    item->connection = c;
    if (f.envelope->body_case == MOED__ENVELOPE__BODY_FORWARD) return item;
    rank_item_free(item);
    return NULL;
fail:
    ep_free(item);
    ep_free(bytes);
    return NULL;
}

static void free_connection(connection *c)
{
    data_server *s = c->s;
    pthread_mutex_lock(&s->lock);
    s->places[c->place] = NULL;
    close(c->fd); /* under the lock: whoever makes room must not hit another's descriptor */
    pthread_cond_signal(&s->left);
    pthread_mutex_unlock(&s->lock);
    ep_buf_fini(&c->reply);
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->answered);
    ep_free(c);
}

static void *connection_main(void *arg)
{
    connection *c = arg;
    for (rank_item *item; (item = read_item(c)) != NULL;) {
        c->done = false;
        atomic_store(&c->asked, true);
        while (ep_queue_push(c->s->in, item) == EP_ERR_BUSY)
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        pthread_mutex_lock(&c->lock);
        while (!c->done)
            pthread_cond_wait(&c->answered, &c->lock);
        pthread_mutex_unlock(&c->lock);
        /* from here on it may be shut down: a client that does not read holds no place for ever */
        atomic_store(&c->heard_ns, ep_now().ns);
        atomic_store(&c->asked, false);
        if (c->reply.len == 0 || !write_all(c->fd, c->reply.data, c->reply.len)) break;
    }
    free_connection(c);
    return NULL;
}

static int free_place(const data_server *s)
{
    for (int i = 0; i < MAX_CONNECTIONS; i++)
        if (s->places[i] == NULL) return i;
    return -1;
}

/* A place, under the lock; -1 if every connection has a request with the engine. */
static int make_room(data_server *s)
{
    int place = free_place(s);
    while (place < 0) {
        connection *silent = NULL;
        for (int i = 0; i < MAX_CONNECTIONS; i++) {
            connection *c = s->places[i];
            if (atomic_load(&c->asked)) continue;
            if (silent == NULL || atomic_load(&c->heard_ns) < atomic_load(&silent->heard_ns))
                silent = c;
        }
        if (silent == NULL) return -1;
        shutdown(silent->fd, SHUT_RDWR); /* its thread ends */
        pthread_cond_wait(&s->left, &s->lock);
        place = free_place(s);
    }
    return place;
}

static void serve(data_server *s, int fd)
{
    pthread_t t;
    connection *c = ep_calloc(1, sizeof(*c));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1},
               sizeof(int)); /* fails on a Unix socket: no harm */
    pthread_mutex_lock(&s->lock);
    int place = c != NULL ? make_room(s) : -1;
    if (place >= 0) {
        *c = (connection){.s = s, .fd = fd, .place = place, .heard_ns = ep_now().ns};
        pthread_mutex_init(&c->lock, NULL);
        pthread_cond_init(&c->answered, NULL);
        s->places[place] = c;
    }
    pthread_mutex_unlock(&s->lock);
    if (place < 0) {
        log_warn("a data connection was refused: too many, or no memory");
        ep_free(c);
        close(fd);
    } else if (pthread_create(&t, NULL, connection_main, c) == 0) {
        pthread_detach(t);
    } else {
        log_warn("a data connection was refused: no thread for it");
        free_connection(c);
    }
}

static void *accept_main(void *arg)
{
    data_server *s = arg;
    for (;;) {
        int fd = accept4(s->fd, NULL, NULL, SOCK_CLOEXEC);
        if (fd >= 0)
            serve(s, fd);
        else if (errno == EINVAL || errno == EBADF)
            return NULL; /* shut down by close */
        else
            nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
}

static ep_status listen_unix(data_server *s, const char *path, ep_err *err)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(a.sun_path))
        return ep_fail(err, EP_ERR_INVALID, "%s: path too long for a socket", path);
    memcpy(a.sun_path, path, strlen(path));
    ep_status status = dial_remove_stale(path, err);
    if (status != EP_OK) return status;
    snprintf(s->path, sizeof(s->path), "%s", path);
    s->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (s->fd < 0 || bind(s->fd, (struct sockaddr *)&a, sizeof(a)) != 0 || chmod(path, 0600) != 0)
        return ep_fail(err, EP_ERR_IO, "%s: %s", path, strerror(errno));
    snprintf(s->address, sizeof(s->address), "unix:%s", path);
    return EP_OK;
}

/* host_port: an IPv4 address and ":0", a port of the system's choice. */
static ep_status listen_tcp(data_server *s, const char *host_port, ep_err *err)
{
    struct sockaddr_in a = {.sin_family = AF_INET};
    socklen_t len = sizeof(a);
    char host[64];
    snprintf(host, sizeof(host), "%.*s", (int)strcspn(host_port, ":"), host_port);
    if (inet_pton(AF_INET, host, &a.sin_addr) != 1)
        return ep_fail(err, EP_ERR_INVALID, "%s: not an IPv4 address", host);
    s->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (s->fd < 0 || bind(s->fd, (struct sockaddr *)&a, sizeof(a)) != 0 ||
        getsockname(s->fd, (struct sockaddr *)&a, &len) != 0)
        return ep_fail(err, EP_ERR_IO, "%s: %s", host, strerror(errno));
    snprintf(s->address, sizeof(s->address), "tcp:%s:%u", host, ntohs(a.sin_port));
    return EP_OK;
}

ep_status data_server_open(data_server **out, const char *address, ep_queue *in, ep_err *err)
{
    data_server *s = ep_calloc(1, sizeof(*s));
    if (s == NULL) return ep_fail(err, EP_ERR_NOMEM, "out of memory");
    s->fd = -1;
    s->in = in;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->left, NULL);
    bool is_unix = strncmp(address, "unix:", 5) == 0;
    ep_status status = is_unix ? listen_unix(s, address + 5, err) : listen_tcp(s, address + 4, err);
    if (status != EP_OK) goto fail;
    if (listen(s->fd, SOMAXCONN) != 0 || pthread_create(&s->thread, NULL, accept_main, s) != 0) {
        status = ep_fail(err, EP_ERR_IO, "%s: %s", address, strerror(errno));
        goto fail;
    }
    *out = s;
    return EP_OK;
fail:
    if (s->fd >= 0) close(s->fd);
    if (s->path[0] != '\0') unlink(s->path);
    ep_free(s);
    return status;
}

const char *data_server_address(const data_server *s)
{
    return s->address;
}

void data_server_close(data_server *s)
{
    if (s == NULL) return;
    if (s->path[0] != '\0') unlink(s->path);
    shutdown(s->fd, SHUT_RDWR);
    pthread_join(s->thread, NULL);
    close(s->fd);
    /* Connection threads may still hold s: it is freed with the process, which ends now. */
}
