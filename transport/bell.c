/*
 * Doorbells. Invariant: a ring is never lost between ranks of one host. The sleeper stores
 * `sleeping`, then looks for messages, then sleeps on the value its word had before; the ringer
 * makes its message visible, then reads `sleeping`. Both sides put a full barrier between, so one
 * of them sees the other.
 *
 * The lowest rank of a host owns the segment. "The same host" is the same host name and boot id,
 * and being able to open the segment and find the owner's token in it: containers that share a
 * kernel but not /dev/shm fall back to datagrams. The name is removed as soon as all have mapped
 * it, so no way of dying later leaves anything behind.
 *
 * Datagrams go to the address that the host's name resolves to, or the first interface that is up
 * where that is a loopback address (Debian's 127.0.1.1); MOED_BELL_ADDRESS overrides. IPv4 only. A
 * small thread receives them and rings the own word. It never calls MPI.
 */
#include "transport/bell.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <linux/futex.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef struct word {
    _Alignas(64) atomic_uint_least32_t rings; /* the futex */
    atomic_uint_least32_t sleeping;
} word;
_Static_assert(sizeof(word) == 64 && sizeof(atomic_uint_least32_t) == 4, "shared layout");

typedef struct segment {
    _Alignas(64) uint64_t token; /* the owner's */
    uint32_t n_ranks;
    word words[]; /* [n_ranks] */
} segment;

typedef struct datagram {
    uint64_t token;
    uint32_t from, zero;
} datagram;

typedef enum reach { BY_WORD, BY_DATAGRAM } reach;
typedef struct peer {
    reach how;
    struct sockaddr_in address;
} peer;

struct bell {
    int rank, n_ranks;
    segment *shared;
    size_t shared_bytes;
    char name[48]; /* of the segment while this rank owns a name, else "" */
    word private_word;
    word *mine;    /* in shared, or private_word */
    uint32_t seen; /* rings this rank knows of */
    peer *peers;   /* [n_ranks] */
    int n_remote;
    uint64_t job_token;
    int socket, stop_fd;
    pthread_t thread;
    bool has_thread;
};

static long futex(word *w, int op, uint32_t value, const struct timespec *timeout)
{
    return syscall(SYS_futex, &w->rings, op, value, timeout, NULL, 0);
}

/* Rings a word; the caller's message is visible already. */
static void ring_word(word *w)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&w->sleeping, memory_order_seq_cst) == 0) return;
    atomic_fetch_add_explicit(&w->rings, 1, memory_order_seq_cst);
    futex(w, FUTEX_WAKE, 1, NULL);
}

/* ---- this rank ---- */

static void read_boot_id(char *out, size_t cap)
{
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, out, cap - 1) : 0;
    if (fd >= 0) close(fd);
    out[n > 0 ? n : 0] = 0;
    out[strcspn(out, "\n")] = 0;
}

static bool is_loopback(struct in_addr a)
{
    return (ntohl(a.s_addr) >> 24) == 127;
}

static bool interface_address(struct in_addr *out)
{
    struct ifaddrs *list, *i;
    bool found = false;
    if (getifaddrs(&list) != 0) return false;
    for (i = list; i != NULL && !found; i = i->ifa_next) {
        if (i->ifa_addr == NULL || i->ifa_addr->sa_family != AF_INET) continue;
        if (!(i->ifa_flags & IFF_UP) || (i->ifa_flags & IFF_LOOPBACK)) continue;
        *out = ((const struct sockaddr_in *)(const void *)i->ifa_addr)->sin_addr;
        found = true;
    }
    freeifaddrs(list);
    return found;
}

/* The address others reach this host at: see the top of the file. */
static bool host_address(const char *host, struct in_addr *out)
{
    const char *forced = getenv("MOED_BELL_ADDRESS");
    if (forced != NULL) return inet_pton(AF_INET, forced, out) == 1;
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_DGRAM}, *list;
    bool found = false;
    if (getaddrinfo(host, NULL, &hints, &list) == 0) {
        *out = ((const struct sockaddr_in *)(const void *)list->ai_addr)->sin_addr;
        found = true;
        freeaddrinfo(list);
    }
    struct in_addr other;
    if ((!found || is_loopback(*out)) && interface_address(&other)) {
        *out = other;
        found = true;
    }
    return found;
}

/* A host without any address has no remote peers either, so that is no failure. */
static ep_status open_socket(bell *b, bell_card *card, ep_err *err)
{
    struct sockaddr_in at = {.sin_family = AF_INET};
    socklen_t len = sizeof(at);
    if (!host_address(card->host, &at.sin_addr)) {
        if (getenv("MOED_BELL_ADDRESS") == NULL) return EP_OK;
        return ep_fail(err, EP_ERR_INVALID, "MOED_BELL_ADDRESS is not an IPv4 address");
    }
    b->socket = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (b->socket < 0) return ep_fail(err, EP_ERR_IO, "doorbell socket: %m");
    if (bind(b->socket, (const struct sockaddr *)&at, sizeof(at)) != 0 ||
        getsockname(b->socket, (struct sockaddr *)&at, &len) != 0) {
        char text[INET_ADDRSTRLEN] = "";
        inet_ntop(AF_INET, &at.sin_addr, text, sizeof(text));
        return ep_fail(err, EP_ERR_IO, "doorbell socket: cannot bind to %s: %m", text);
    }
    card->address = at.sin_addr.s_addr;
    card->port = at.sin_port;
    return EP_OK;
}

ep_status bell_open(bell **out, int rank, int n_ranks, bell_card *card, ep_err *err)
{
    ep_status status = EP_ERR_NOMEM;
    memset(card, 0, sizeof(*card));
    if (gethostname(card->host, sizeof(card->host) - 1) != 0) card->host[0] = 0;
    read_boot_id(card->boot, sizeof(card->boot));
    bell *b = ep_calloc(1, sizeof(*b));
    if (b == NULL) return ep_fail(err, EP_ERR_NOMEM, "doorbell: no memory");
    b->rank = rank;
    b->n_ranks = n_ranks;
    b->socket = b->stop_fd = -1;
    b->mine = &b->private_word;
    b->peers = ep_calloc((size_t)n_ranks, sizeof(*b->peers));
    if (b->peers == NULL) {
        ep_fail(err, status, "doorbell: no memory");
        goto fail;
    }
    if (getrandom(&card->token, sizeof(card->token), 0) != (ssize_t)sizeof(card->token)) {
        status = ep_fail(err, EP_ERR_IO, "doorbell: no random numbers: %m");
        goto fail;
    }
    status = open_socket(b, card, err);
    if (status != EP_OK) goto fail;
    *out = b;
    return EP_OK;
fail:
    bell_close(b);
    return status;
}

/* ---- the host ---- */

static bool same_host(const bell_card *a, const bell_card *b)
{
    return memcmp(a->host, b->host, sizeof(a->host)) == 0 &&
           memcmp(a->boot, b->boot, sizeof(a->boot)) == 0;
}

static int host_owner(const bell *b, const bell_card *cards)
{
    int owner = 0;
    while (!same_host(&cards[owner], &cards[b->rank]))
        owner++;
    return owner;
}

static void segment_name(char *out, size_t cap, const bell_card *owner)
{
    snprintf(out, cap, "/moed-bell-%016llx", (unsigned long long)owner->token);
}

static bool map_segment(bell *b, int fd)
{
    size_t bytes = sizeof(segment) + (size_t)b->n_ranks * sizeof(word);
    off_t end = lseek(fd, 0, SEEK_END);
    if (end < 0 || (size_t)end != bytes) return false;
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) return false;
    b->shared = p;
    b->shared_bytes = bytes;
    return true;
}

/* A host on which this does not work uses datagrams: slower, not wrong. */
void bell_share(bell *b, const bell_card *cards)
{
    b->job_token = cards[0].token;
    if (host_owner(b, cards) != b->rank) return;
    char name[sizeof(b->name)];
    segment_name(name, sizeof(name), &cards[b->rank]);
    int fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        log_warn("no shared memory for doorbells, using datagrams: %m");
        return;
    }
    memcpy(b->name, name, sizeof(name));
    size_t bytes = sizeof(segment) + (size_t)b->n_ranks * sizeof(word);
    /* Allocated, not only sized: a full /dev/shm is an error here and SIGBUS later. */
    int failed = posix_fallocate(fd, 0, (off_t)bytes);
    if (failed == 0 && map_segment(b, fd)) {
        b->shared->n_ranks = (uint32_t)b->n_ranks;
        b->shared->token = cards[b->rank].token;
    } else {
        log_warn("no shared memory for doorbells, using datagrams: %s", strerror(failed));
    }
    close(fd);
}

int32_t bell_join(bell *b, const bell_card *cards)
{
    int owner = host_owner(b, cards);
    if (owner != b->rank) {
        char name[sizeof(b->name)];
        segment_name(name, sizeof(name), &cards[owner]);
        int fd = shm_open(name, O_RDWR | O_CLOEXEC, 0);
        if (fd < 0) return -1;
        map_segment(b, fd);
        close(fd);
    }
    if (b->shared == NULL) return -1;
    if (b->shared->token != cards[owner].token || b->shared->n_ranks != (uint32_t)b->n_ranks) {
        munmap(b->shared, b->shared_bytes);
        b->shared = NULL;
        return -1;
    }
    b->mine = &b->shared->words[b->rank];
    return owner;
}

/* ---- other hosts ---- */

static void *run_listener(void *arg)
{
    bell *b = arg;
    struct pollfd fds[2] = {{.fd = b->socket, .events = POLLIN},
                            {.fd = b->stop_fd, .events = POLLIN}};
    for (;;) {
        if (poll(fds, 2, -1) < 0) continue; /* EINTR */
        if (fds[1].revents != 0) return NULL;
        datagram d;
        ssize_t n = recv(b->socket, &d, sizeof(d), MSG_DONTWAIT | MSG_TRUNC);
        if (n != (ssize_t)sizeof(d) || d.token != b->job_token) continue;
        /* Counted even when this rank is awake: the datagram may have overtaken its message. */
        atomic_fetch_add_explicit(&b->mine->rings, 1, memory_order_seq_cst);
        futex(b->mine, FUTEX_WAKE, 1, NULL);
    }
}

static ep_status start_listener(bell *b, ep_err *err)
{
    sigset_t all, old;
    b->stop_fd = eventfd(0, EFD_CLOEXEC);
    if (b->stop_fd < 0) return ep_fail(err, EP_ERR_IO, "doorbell: eventfd: %m");
    /* Signals are for the thread that runs main. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int failed = pthread_create(&b->thread, NULL, run_listener, b);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (failed != 0) return ep_fail(err, EP_ERR_IO, "doorbell: no thread: %s", strerror(failed));
    b->has_thread = true;
    return EP_OK;
}

ep_status bell_connect(bell *b, const bell_card *cards, const int32_t *joined, ep_err *err)
{
    if (b->name[0] != 0) shm_unlink(b->name);
    b->name[0] = 0;
    for (int i = 0; i < b->n_ranks; i++) {
        if (i == b->rank || (joined[i] >= 0 && joined[i] == joined[b->rank])) continue;
        b->peers[i].how = BY_DATAGRAM;
        b->peers[i].address = (struct sockaddr_in){
            .sin_family = AF_INET, .sin_port = cards[i].port, .sin_addr = {cards[i].address}};
        b->n_remote++;
        if (cards[i].port == 0 || b->socket < 0)
            return ep_fail(err, EP_ERR_IO, "doorbell: rank %d (%s) has no IPv4 address",
                           b->socket < 0 ? b->rank : i, cards[b->socket < 0 ? b->rank : i].host);
    }
    return b->n_remote > 0 ? start_listener(b, err) : EP_OK;
}

/* ---- ringing and sleeping ---- */

void bell_ring(bell *b, int i)
{
    if (i == b->rank) return;
    if (b->peers[i].how == BY_WORD) {
        ring_word(&b->shared->words[i]);
        return;
    }
    datagram d = {.token = b->job_token, .from = (uint32_t)b->rank};
    sendto(b->socket, &d, sizeof(d), MSG_DONTWAIT | MSG_NOSIGNAL,
           (const struct sockaddr *)&b->peers[i].address, sizeof(b->peers[i].address));
}

void bell_ring_self(bell *b)
{
    ring_word(b->mine);
}

uint32_t bell_arm(bell *b)
{
    uint32_t rings = atomic_load_explicit(&b->mine->rings, memory_order_seq_cst);
    atomic_store_explicit(&b->mine->sleeping, 1, memory_order_seq_cst);
    atomic_thread_fence(memory_order_seq_cst);
    return rings;
}

void bell_disarm(bell *b)
{
    atomic_store_explicit(&b->mine->sleeping, 0, memory_order_relaxed);
}

void bell_sleep(bell *b, uint32_t armed, int64_t ns)
{
    struct timespec ts = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    if (ns > 0) futex(b->mine, FUTEX_WAIT, armed, &ts);
    bell_disarm(b);
}

bool bell_rang(bell *b)
{
    uint32_t rings = atomic_load_explicit(&b->mine->rings, memory_order_seq_cst);
    bool rang = rings != b->seen;
    b->seen = rings;
    return rang;
}

int bell_n_remote(const bell *b)
{
    return b->n_remote;
}

void bell_close(bell *b)
{
    if (b == NULL) return;
    if (b->has_thread) {
        uint64_t one = 1;
        ssize_t n = write(b->stop_fd, &one, sizeof(one));
        (void)n; /* an eventfd takes a 1 */
        pthread_join(b->thread, NULL);
    }
    if (b->name[0] != 0) shm_unlink(b->name);
    if (b->shared != NULL) munmap(b->shared, b->shared_bytes);
    if (b->socket >= 0) close(b->socket);
    if (b->stop_fd >= 0) close(b->stop_fd);
    ep_free(b->peers);
    ep_free(b);
}
