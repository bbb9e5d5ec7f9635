/*
 * The control connection of a rank. One thread polls the socket and an eventfd: it reads frames,
 * writes what the engine packed, and beats once a second, so that the daemon tells a silent host
 * from an idle one.
 *
 * Outgoing bytes: two buffers. Senders append to one under the lock while the thread writes the
 * other; when that is empty they change places. Buffers grow only for a message larger than any
 * before, so a steady engine does not allocate.
 */
#include "daemon/uplink.h"
#include "daemon/dial.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    OUT_BYTES = 1 << 20,
    READ_BYTES = 64 << 10,
    BEAT_MS = 1000,
    DIAL_TRIES = 100,
    DIAL_PAUSE_MS = 100,
    HUNG_UP_MS = 200
};

struct uplink {
    int fd, wake_fd;
    ep_queue *in;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t room;
    ep_buf filling, writing; /* filling: under the lock */
    size_t written;          /* of writing */
    ep_buf received;
    rank_item *pending; /* the queue has no room for it: nothing is read meanwhile */
    atomic_bool stop;
    bool gone; /* the daemon hung up while the engine was closing: nothing is left to do */
};

void rank_item_free(rank_item *item)
{
    proto_frame_free(&item->frame);
    ep_free(item->bytes);
    ep_free(item);
}

/* ---- the thread ---- */

/* The daemon is gone or speaks nonsense: nothing of a rank is worth keeping then. */
static void leave(const char *why)
{
    log_info("leaving: %s", why);
    _exit(0);
}

/* The connection is no more. Its last frame may be why the daemon refuses this rank, so the engine
 * gets a moment to say that. An engine that closes in this moment goes on to its own end: other
 * ranks may be waiting for it in MPI_Finalize. */
static void hung_up(uplink *u, const char *why)
{
    for (int i = 0; i < HUNG_UP_MS && !atomic_load(&u->stop); i++)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    if (!atomic_load(&u->stop)) leave(why);
    u->gone = true;
}

/* Never waits for the engine: it may be waiting for this thread to write. */
static void deliver(uplink *u)
{
    for (;;) {
        if (u->pending != NULL && ep_queue_push(u->in, u->pending) != EP_OK) return;
        u->pending = NULL;
        proto_frame f;
        size_t need;
        ep_status status =
            proto_frame_take(u->received.data, u->received.len, PROTO_MAX_ENVELOPE, 0, &f, &need);
        if (status == EP_AGAIN) {
            if (ep_buf_reserve(&u->received, need) != EP_OK) leave("out of memory");
            return;
        }
        if (status != EP_OK) leave("the daemon sent something that is no frame");
        memmove(u->received.data, u->received.data + f.frame_bytes,
                u->received.len - f.frame_bytes);
        u->received.len -= f.frame_bytes;
        rank_item *item = ep_calloc(1, sizeof(*item));
        if (item == NULL) leave("out of memory");
        item->frame = f; /* no payload on this connection: nothing borrowed */
        u->pending = item;
    }
}

static void receive(uplink *u)
{
    if (ep_buf_reserve(&u->received, READ_BYTES) != EP_OK) leave("out of memory");
    ssize_t n = recv(u->fd, u->received.data + u->received.len, u->received.cap - u->received.len,
                     MSG_DONTWAIT);
    if (n == 0) hung_up(u, "the daemon closed the connection");
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        hung_up(u, "the connection to the daemon broke");
    if (n > 0) {
        u->received.len += (size_t)n;
        deliver(u);
    }
}

/* Writes what it can; true if bytes are left. */
static bool transmit(uplink *u)
{
    for (;;) {
        if (u->written == u->writing.len) {
            pthread_mutex_lock(&u->lock);
            ep_buf done = u->writing;
            done.len = 0;
            u->writing = u->filling;
            u->filling = done;
            u->written = 0;
            pthread_cond_broadcast(&u->room);
            pthread_mutex_unlock(&u->lock);
            if (u->writing.len == 0) return false;
        }
        ssize_t n = send(u->fd, u->writing.data + u->written, u->writing.len - u->written,
                         MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) return true;
        if (n < 0) {
            hung_up(u, "the connection to the daemon broke");
            return false;
        }
        u->written += (size_t)n;
    }
}

static void beat(uplink *u)
{
    Moed__Beat b = MOED__BEAT__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    e.body_case = MOED__ENVELOPE__BODY_BEAT;
    e.beat = &b;
    uint8_t bytes[64];
    size_t n = proto_frame_size(&e, 0);
    pthread_mutex_lock(&u->lock);
    if (u->filling.len == 0 && n <= sizeof(bytes)) { /* a full pipe is sign of life enough */
        proto_frame_put(bytes, &e, NULL, 0);
        (void)ep_buf_add(&u->filling, bytes, n);
    }
    pthread_mutex_unlock(&u->lock);
}

static void *thread_main(void *arg)
{
    uplink *u = arg;
    ep_time next_beat = ep_time_after_ms(ep_now(), BEAT_MS);
    for (;;) {
        bool stopping = atomic_load(&u->stop);
        bool more = transmit(u);
        if (u->gone || (stopping && !more)) return NULL;
        bool full = u->pending != NULL;
        struct pollfd p[2] = {{.fd = full && !more ? -1 : u->fd,
                               .events = (short)((full ? 0 : POLLIN) | (more ? POLLOUT : 0))},
                              {.fd = u->wake_fd, .events = POLLIN}};
        int64_t left = full ? 1 : ep_time_diff_ns(next_beat, ep_now()) / 1000000 + 1;
        poll(p, 2, left < 0 ? 0 : (int)left);
        if (p[1].revents & POLLIN) {
            uint64_t count;
            ssize_t n = read(u->wake_fd, &count, sizeof(count));
            (void)n;
        }
        if (full)
            deliver(u);
        else if (p[0].revents & (POLLIN | POLLHUP | POLLERR))
            receive(u);
        if (ep_time_is_past(next_beat, ep_now())) {
            beat(u);
            next_beat = ep_time_after_ms(ep_now(), BEAT_MS);
        }
    }
}

/* ---- the engine's side ---- */

static void poke(uplink *u)
{
    uint64_t one = 1;
    ssize_t n = write(u->wake_fd, &one, sizeof(one));
    (void)n; /* full counter: the thread is awake already */
}

void uplink_send(uplink *u, const Moed__Envelope *e)
{
    size_t n = proto_frame_size(e, 0);
    pthread_mutex_lock(&u->lock);
    while (u->filling.len > 0 && u->filling.len + n > OUT_BYTES)
        pthread_cond_wait(&u->room, &u->lock);
    ep_status status = proto_frame_add(&u->filling, e, NULL, 0);
    pthread_mutex_unlock(&u->lock);
    if (status != EP_OK) leave("out of memory");
    poke(u);
}

ep_status uplink_open(uplink **out, const char *address, ep_queue *in, ep_err *err)
{
    uplink *u = ep_calloc(1, sizeof(*u));
    if (u == NULL) return ep_fail(err, EP_ERR_NOMEM, "out of memory");
    ep_status status = EP_ERR_IO;
    u->wake_fd = -1;
    u->in = in;
    pthread_mutex_init(&u->lock, NULL);
    pthread_cond_init(&u->room, NULL);
    u->fd = dial_open(address, err);
    for (int i = 0; u->fd < 0 && i < DIAL_TRIES; i++) {
        nanosleep(&(struct timespec){.tv_nsec = DIAL_PAUSE_MS * 1000000}, NULL);
        u->fd = dial_open(address, err);
    }
    if (u->fd < 0) goto fail;
    status = EP_ERR_NOMEM;
    u->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (u->wake_fd < 0 || ep_buf_reserve(&u->filling, OUT_BYTES) != EP_OK ||
        ep_buf_reserve(&u->writing, OUT_BYTES) != EP_OK ||
        pthread_create(&u->thread, NULL, thread_main, u) != 0) {
        ep_fail(err, status, "cannot start the control connection: %s", strerror(errno));
        goto fail;
    }
    *out = u;
    return EP_OK;
fail:
    if (u->fd >= 0) close(u->fd);
    if (u->wake_fd >= 0) close(u->wake_fd);
    ep_buf_fini(&u->filling);
    ep_buf_fini(&u->writing);
    ep_free(u);
    return status;
}

void uplink_close(uplink *u)
{
    if (u == NULL) return;
    atomic_store(&u->stop, true);
    poke(u);
    pthread_join(u->thread, NULL);
    close(u->fd);
    close(u->wake_fd);
    ep_buf_fini(&u->filling);
    ep_buf_fini(&u->writing);
    ep_buf_fini(&u->received);
    if (u->pending != NULL) rank_item_free(u->pending);
    pthread_mutex_destroy(&u->lock);
    pthread_cond_destroy(&u->room);
    ep_free(u);
}
