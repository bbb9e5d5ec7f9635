/*
 * The transport over real MPI; started by mpirun (tests/dist/net.cmake). The first argument says
 * what is tried: exchange   every rank sends to every other, sizes from 8 bytes to 200 KiB,
 * contents checked oversize   messages larger than the receiver's buffers are dropped, the rest
 * arrives death      the last rank is killed in mid-exchange, the others go on stopped    the last
 * rank is stopped (SIGSTOP): its peers give it up and go on idle       what waiting costs, and that
 * net_wake ends it bench      round trips of one router and its shards: percentiles, busy and from
 * sleep Every rank prints its verdict; the exit status of a run with a death means nothing, so
 * net_death.sh counts the lines. Deadlines are upper bounds only; nothing but `bench` measures
 * latency.
 */
#include "transport/net.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define MAX_RANKS 16
#define SEED      UINT64_C(0x9e3779b97f4a7c15)
#define LIMIT_MS  60000
#define LOST_MS   5000 /* what a busy machine holds up for longer would rightly be given up */
#define GOODBYE   400  /* the number of the short message that says: I have got everything */

static int rank, n_ranks, n_bad;

#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            n_bad++;                                                                               \
            printf("rank %d: %s:%d: failed: %s\n", rank, __FILE__, __LINE__, #cond);               \
            fflush(stdout);                                                                        \
        }                                                                                          \
    } while (0)

static net *open_net(size_t max_message, int n_buffers, int credit, int deadline_ms)
{
    net *n = NULL;
    ep_err err = {0};
    net_options opt = net_options_default();
    opt.rank = rank;
    opt.n_ranks = n_ranks;
    opt.max_message = max_message;
    opt.n_buffers = n_buffers;
    opt.credit = credit;
    opt.send_deadline_ms = deadline_ms;
    if (net_mpi_open(&n, &opt, &err) != EP_OK) {
        printf("rank %d: open: %s\n", rank, err.text);
        fflush(stdout);
        _exit(1);
    }
    return n;
}

static uint64_t mix(uint64_t x)
{
    x ^= x >> 31;
    x *= UINT64_C(0xbf58476d1ce4e5b9);
    return x ^ x >> 29;
}

/* Message i from `from`: 8 bytes of number, then a pattern; mostly short, sometimes long. */
static size_t message_bytes(int from, uint64_t i, size_t max)
{
    if (i >= GOODBYE) return 8;
    uint64_t r = mix(SEED + i * 64 + (uint64_t)from);
    return 8 + (size_t)(r % (r & 0x70000 ? 3000 : max - 8));
}

static void fill(net_buf *b, uint64_t i, size_t max)
{
    b->len = message_bytes(rank, i, max);
    memcpy(b->data, &i, 8);
    for (size_t at = 8; at < b->len; at++)
        b->data[at] = (uint8_t)(mix((uint64_t)rank + i) + at);
}

static bool is_right(const net_buf *b, uint64_t want, size_t max)
{
    uint64_t i;
    if (b->len < 8) return false;
    memcpy(&i, b->data, 8);
    if (i != want || b->len != message_bytes(b->peer, i, max)) return false;
    for (size_t at = 8; at < b->len; at++)
        if (b->data[at] != (uint8_t)(mix((uint64_t)b->peer + i) + at)) return false;
    return true;
}

typedef struct talk {
    net *n;
    size_t max;
    uint64_t n_messages; /* to each peer */
    uint64_t sent[MAX_RANKS], got[MAX_RANKS];
    bool lost[MAX_RANKS];
} talk;

/* Offers one message to each peer that still has some to get. True if anything went out. */
static bool talk_send(talk *t)
{
    bool moved = false;
    for (int peer = 0; peer < n_ranks; peer++) {
        if (peer == rank || t->lost[peer] || t->sent[peer] == t->n_messages) continue;
        net_buf *b = net_take(t->n, t->max);
        if (b == NULL) break;
        fill(b, t->sent[peer], t->max);
        ep_status status = net_send(t->n, peer, b);
        if (status == EP_AGAIN) {
            net_give(t->n, b);
            continue;
        }
        if (status == EP_ERR_PEER_LOST) {
            t->lost[peer] = true;
        } else {
            CHECK(status == EP_OK);
            t->sent[peer]++;
        }
        moved = true;
    }
    return moved;
}

static bool talk_receive(talk *t)
{
    net_buf *b;
    if (net_next(t->n, &b) != EP_OK) return false;
    CHECK(is_right(b, t->got[b->peer], t->max));
    t->got[b->peer]++;
    net_give(t->n, b);
    return true;
}

/* Everything sent to and got from everybody but `but`. */
static bool talk_is_over(const talk *t, int but)
{
    for (int peer = 0; peer < n_ranks; peer++) {
        if (peer == rank || peer == but) continue;
        if (t->sent[peer] < t->n_messages || t->got[peer] < t->n_messages) return false;
    }
    return true;
}

static void run_exchange(void)
{
    talk t = {.n = open_net(200 << 10, 64, 8, LIMIT_MS), .max = 200 << 10, .n_messages = 300};
    ep_time deadline = ep_time_after_ms(ep_now(), LIMIT_MS);
    uint64_t allocs = ep_alloc_count();
    while (!talk_is_over(&t, -1) && !ep_time_is_past(deadline, ep_now())) {
        bool sent = talk_send(&t), received = talk_receive(&t);
        if (!sent && !received) net_wait(t.n, deadline);
    }
    CHECK(talk_is_over(&t, -1));
    CHECK(t.n->stats.quarantined == 0 && t.n->stats.dropped == 0);
    CHECK(ep_alloc_count() == allocs);
    net_close(t.n);
}

static void run_oversize(void)
{
    static const size_t sizes[] = {500000, 100, 3000, 1000, 1001, 7};
    net *n = open_net(rank == 0 ? 1000 : 500000, 16, 8, LIMIT_MS);
    ep_time deadline = ep_time_after_ms(ep_now(), LIMIT_MS);
    size_t n_sizes = sizeof(sizes) / sizeof(sizes[0]);
    net_buf *b;
    for (size_t i = 0; i < n_sizes && rank != 0; i++) {
        b = net_take(n, sizes[i]);
        if (b == NULL) _exit(1);
        memset(b->data, (int)sizes[i] & 0xff, sizes[i]);
        b->len = sizes[i];
        CHECK(net_send(n, 0, b) == EP_OK);
    }
    if (rank == 0) {
        int n_small = 3 * (n_ranks - 1), got = 0;
        while (got < n_small && !ep_time_is_past(deadline, ep_now())) {
            if (net_next(n, &b) != EP_OK) {
                net_wait(n, deadline);
                continue;
            }
            CHECK(b->len == 100 || b->len == 1000 || b->len == 7);
            for (size_t i = 0; i < b->len; i++)
                CHECK(b->data[i] == (b->len & 0xff));
            net_give(n, b);
            got++;
        }
        CHECK(got == n_small);
        CHECK(n->stats.dropped == (uint64_t)n_small && n->stats.quarantined == 0);
        /* Every buffer came back: three quarters can be taken. */
        int taken = 0;
        while (net_take(n, 1) != NULL)
            taken++;
        CHECK(taken == 12);
    }
    net_close(n);
}

static bool talk_got_from_one(const talk *t, uint64_t n)
{
    for (int peer = 0; peer < n_ranks; peer++)
        if (t->got[peer] >= n) return true;
    return false;
}

/* The last rank is hit by sig in mid-exchange, before anybody has sent it everything, or that one
 * would not notice. The others exchange everything with each other, then
 * prove that the lost one is refused and that what it holds is bounded. */
static void run_loss(int sig)
{
    const int victim = n_ranks - 1, credit = 8;
    pid_t pids[MAX_RANKS], pid = getpid();
    if (net_mpi_allgather(&pid, sizeof(pid), pids) != EP_OK) _exit(1);
    talk t = {
        .n = open_net(200 << 10, 64, credit, LOST_MS), .max = 200 << 10, .n_messages = GOODBYE};
    ep_time deadline = ep_time_after_ms(ep_now(), LIMIT_MS);
    while (!ep_time_is_past(deadline, ep_now())) {
        bool sent = talk_send(&t), received = talk_receive(&t);
        if (rank == victim && talk_got_from_one(&t, 50)) raise(sig);
        /* Whoever ends takes with it what others have not fetched yet, so all say goodbye first. */
        if (talk_is_over(&t, victim) && t.lost[victim] && t.n_messages++ > GOODBYE) break;
        if (!sent && !received) net_wait(t.n, deadline);
    }
    if (rank == victim) _exit(1); /* was not hit */
    CHECK(t.n_messages == GOODBYE + 2);
    CHECK(t.lost[victim] && t.n->stats.quarantined > 0);
    CHECK(t.n->stats.quarantined <= 2 * (uint64_t)credit);
    /* The survivors are not harmed: nothing of theirs was lost. */
    for (int peer = 0; peer < victim; peer++)
        CHECK(!t.lost[peer]);
    net_close(t.n);
    if (rank == 0) kill(pids[victim], SIGKILL);
}

static net_buf *receive(net *n)
{
    net_buf *b;
    while (net_next(n, &b) != EP_OK)
        if (net_wait(n, ep_time_after_ms(ep_now(), LIMIT_MS)) != EP_OK) _exit(1);
    return b;
}

static void send_bytes(net *n, int peer, size_t bytes)
{
    net_buf *b;
    while ((b = net_take(n, bytes)) == NULL)
        net_wait(n, ep_time_after_ms(ep_now(), 1000));
    b->len = bytes;
    while (net_send(n, peer, b) == EP_AGAIN)
        net_wait(n, ep_time_after_ms(ep_now(), 1000));
}

/* The last rank is dead, and nobody knows: rank 0 goes on sending it short messages, which MPI
 * calls complete although they hold its resources. The rest must be able to talk afterwards. */
static void run_flood(void)
{
    const int victim = n_ranks - 1;
    net *n = open_net(4096, 64, 16, LOST_MS);
    ep_time deadline = ep_time_after_ms(ep_now(), LIMIT_MS);
    if (rank == victim) raise(SIGKILL);
    if (rank != 0) {
        for (int i = 0; i < 100; i++) {
            net_buf *b = receive(n);
            CHECK(b->len == 64);
            net_give(n, b);
            send_bytes(n, 0, 64);
        }
        net_give(n, receive(n));
        net_close(n);
        return;
    }
    struct timespec ts = {.tv_nsec = 100000000};
    nanosleep(&ts, NULL);
    int accepted = 0, refused = 0;
    ep_status status = EP_OK;
    while (accepted < 2000 && status != EP_ERR_PEER_LOST && !ep_time_is_past(deadline, ep_now())) {
        net_buf *b = net_take(n, 4096);
        if (b == NULL) break;
        b->len = accepted % 2 ? 3000 : 64;
        status = net_send(n, victim, b);
        if (status == EP_AGAIN) {
            net_give(n, b);
            refused++;
            net_wait(n, ep_time_after_ms(ep_now(), 100));
        }
        accepted += status == EP_OK;
    }
    printf("%d accepted for the dead rank, %d times none, then %s\n", accepted, refused,
           ep_status_name(status));
    CHECK(status == EP_ERR_PEER_LOST);
    CHECK(refused < 1000); /* a wait for credit is a wait */
    for (int i = 0; i < 100; i++) {
        for (int peer = 1; peer < victim; peer++)
            send_bytes(n, peer, 64);
        for (int peer = 1; peer < victim; peer++)
            net_give(n, receive(n));
    }
    for (int peer = 1; peer < victim; peer++)
        send_bytes(n, peer, 8);
    net_close(n);
}

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

static void *wake_later(void *arg)
{
    struct timespec ts = {.tv_nsec = 50000000};
    nanosleep(&ts, NULL);
    net_wake(arg);
    return NULL;
}

/* Sixty times around all ranks, each asleep when its turn comes. Without bells every hop would take
 * what is left of the 200 ms after which a sleeper looks for itself. */
static void run_ring(net *n)
{
    const int n_rounds = 60;
    ep_time start = ep_now();
    for (int i = 0; i < n_rounds; i++) {
        struct timespec ts = {.tv_nsec = 5000000};
        if (rank == 0) {
            nanosleep(&ts, NULL);
            send_bytes(n, 1, 8);
        }
        net_give(n, receive(n));
        if (rank != 0) send_bytes(n, (rank + 1) % n_ranks, 8);
    }
    int64_t ms = ep_time_diff_ns(ep_now(), start) / 1000000;
    if (rank == 0) printf("%d rounds of %d hops in %lld ms\n", n_rounds, n_ranks, (long long)ms);
    CHECK(ms < n_rounds * 195 / 2);
}

static void run_idle(void)
{
    net *n = open_net(4096, 16, 8, LIMIT_MS);
    pthread_t thread;
    net_wake(n); /* before the wait: not lost */
    CHECK(net_wait(n, EP_TIME_NEVER) == EP_OK);
    if (pthread_create(&thread, NULL, wake_later, n) != 0) _exit(1);
    CHECK(net_wait(n, EP_TIME_NEVER) == EP_OK);
    pthread_join(thread, NULL);
    CHECK(n->stats.wakes == 2);

    /* Nobody's first message may end another's wait above. */
    int all[MAX_RANKS];
    CHECK(net_mpi_allgather(&rank, sizeof(rank), all) == EP_OK);
    run_ring(n);

    const int seconds = 4;
    uint64_t sleeps = n->stats.sleeps;
    double before = cpu_seconds();
    CHECK(net_wait(n, ep_time_after_ms(ep_now(), seconds * 1000)) == EP_AGAIN);
    double share = 100 * (cpu_seconds() - before) / seconds;
    printf("rank %d: idle, %.3f %% of a core, %llu sleeps in %d s\n", rank, share,
           (unsigned long long)(n->stats.sleeps - sleeps), seconds);
    CHECK(share < 0.5);
    net_close(n);
}

/* ---- bench ---- */

static int compare_i64(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

/* One router sends `bytes` to each shard and gets as much back. */
static void bench_router(net *n, size_t bytes, int n_rounds, int pause_us)
{
    static int64_t times[20000];
    for (int i = -10; i < n_rounds; i++) {
        if (pause_us > 0) {
            struct timespec ts = {.tv_nsec = pause_us * 1000L};
            nanosleep(&ts, NULL);
        }
        ep_time start = ep_now();
        for (int peer = 1; peer < n_ranks; peer++)
            send_bytes(n, peer, bytes);
        for (int peer = 1; peer < n_ranks; peer++)
            net_give(n, receive(n));
        if (i >= 0) times[i] = ep_time_diff_ns(ep_now(), start);
    }
    qsort(times, (size_t)n_rounds, sizeof(times[0]), compare_i64);
    printf("%d shards %8zu bytes %-10s p50 %8.1f us  p90 %8.1f us  p99 %8.1f us\n", n_ranks - 1,
           bytes, pause_us > 0 ? "from sleep" : "busy", 1e-3 * (double)times[n_rounds / 2],
           1e-3 * (double)times[n_rounds * 9 / 10], 1e-3 * (double)times[n_rounds * 99 / 100]);
    fflush(stdout);
}

static void run_bench(void)
{
    net *n = open_net(1 << 20, 64, 16, LIMIT_MS);
    if (rank == 0) {
        bench_router(n, 4 << 10, 5000, 0);
        bench_router(n, 64 << 10, 2000, 0);
        bench_router(n, 1 << 20, 200, 0);
        bench_router(n, 4 << 10, 300, 5000);
        bench_router(n, 64 << 10, 300, 5000);
        for (int peer = 1; peer < n_ranks; peer++)
            send_bytes(n, peer, 1);
    } else {
        for (;;) {
            net_buf *b = receive(n);
            size_t bytes = b->len;
            if (bytes == 1) break;
            /* A reply of its own: the request's buffer would be a shortcut no shard can take. */
            net_buf *reply = net_take(n, bytes);
            if (reply == NULL) _exit(1);
            reply->len = bytes;
            net_give(n, b);
            if (net_send(n, 0, reply) != EP_OK) _exit(1);
        }
    }
    net_close(n);
}

int main(int argc, char **argv)
{
    ep_err err = {0};
    const char *what = argc > 1 ? argv[1] : "";
    bool clean = true;
    ep_log_open("net_mpi", EP_LOG_INFO);
    alarm(90); /* whatever hangs, the test does not */
    if (net_mpi_start(&rank, &n_ranks, &err) != EP_OK) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    if (n_ranks < 2 || n_ranks > MAX_RANKS) return 2;
    if (rank == 0) printf("seed %llx\n", (unsigned long long)SEED);
    if (strcmp(what, "exchange") == 0) {
        run_exchange();
    } else if (strcmp(what, "oversize") == 0) {
        run_oversize();
    } else if (strcmp(what, "death") == 0) {
        run_loss(SIGKILL);
        clean = false;
    } else if (strcmp(what, "flood") == 0) {
        run_flood();
        clean = false;
    } else if (strcmp(what, "stopped") == 0) {
        run_loss(SIGSTOP);
        clean = false;
    } else if (strcmp(what, "idle") == 0) {
        run_idle();
    } else if (strcmp(what, "bench") == 0) {
        run_bench();
    } else {
        return 2;
    }
    printf("rank %d: %s %s\n", rank, what, n_bad ? "FAILED" : "ok");
    fflush(stdout);
    net_mpi_stop(clean);
    _exit(n_bad ? 1 : 0);
}
