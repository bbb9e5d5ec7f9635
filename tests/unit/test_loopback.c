/*
 * Proves the exchange over loopback: order, contents, credit, buffers kept for receiving, every
 * scripted fault, death and quarantine, waking, and that nothing is allocated after open. Tests
 * drive the ranks from one thread where the order matters, and from one thread each where the
 * locking matters. Deadlines are used as upper bounds only, so a slow machine changes no result.
 */
#include "tests/test.h"
#include "transport/net.h"

#include <pthread.h>
#include <stdlib.h>

#define MAX_RANKS 5
#define SEED      UINT64_C(0x2545f4914f6cdd1d)

typedef struct world {
    net_hub *hub;
    net *ranks[MAX_RANKS];
    int n;
} world;

static world open_world(int n, net_options opt, net_script script, void *arg)
{
    world w = {.n = n};
    if (net_hub_open(&w.hub, n, script, arg) != EP_OK) abort();
    opt.n_ranks = n;
    for (opt.rank = 0; opt.rank < n; opt.rank++)
        if (net_loopback_open(&w.ranks[opt.rank], w.hub, &opt) != EP_OK) abort();
    return w;
}

static void close_world(world *w)
{
    for (int i = 0; i < w->n; i++)
        net_close(w->ranks[i]);
    net_hub_close(w->hub);
}

static net_options small_options(void)
{
    net_options opt = net_options_default();
    opt.max_message = 1000;
    opt.n_buffers = 16;
    opt.credit = 4;
    return opt;
}

static ep_time soon(int ms)
{
    return ep_time_after_ms(ep_now(), ms);
}

static ep_status send_text(net *n, int peer, const char *text)
{
    net_buf *b = net_take(n, strlen(text));
    if (b == NULL) return EP_ERR_NOMEM;
    b->len = strlen(text);
    memcpy(b->data, text, b->len);
    ep_status status = net_send(n, peer, b);
    if (status == EP_AGAIN) net_give(n, b);
    return status;
}

/* The next message as a text of at most 63 bytes; "" when none comes within ten seconds. */
static const char *next_text(net *n, int *from)
{
    static char text[64];
    net_buf *b;
    ep_time deadline = soon(10000);
    text[0] = 0;
    while (net_next(n, &b) != EP_OK)
        if (net_wait(n, deadline) != EP_OK) return text;
    size_t len = b->len < sizeof(text) ? b->len : sizeof(text) - 1;
    memcpy(text, b->data, len);
    text[len] = 0;
    if (from != NULL) *from = b->peer;
    net_give(n, b);
    return text;
}

static bool is_quiet(net *n)
{
    net_buf *b;
    if (net_next(n, &b) != EP_OK) return true;
    net_give(n, b);
    return false;
}

static void test_order(void)
{
    world w = open_world(3, small_options(), NULL, NULL);
    int from = -1;
    CHECK(is_quiet(w.ranks[0]));
    CHECK_INT(send_text(w.ranks[1], 0, "a"), EP_OK);
    CHECK_INT(send_text(w.ranks[2], 0, "b"), EP_OK);
    CHECK_INT(send_text(w.ranks[1], 0, "c"), EP_OK);
    CHECK_INT(send_text(w.ranks[0], 0, "self"), EP_OK);
    CHECK_STR(next_text(w.ranks[0], &from), "a");
    CHECK_INT(from, 1);
    CHECK_STR(next_text(w.ranks[0], &from), "b");
    CHECK_INT(from, 2);
    CHECK_STR(next_text(w.ranks[0], &from), "c");
    CHECK_STR(next_text(w.ranks[0], &from), "self");
    CHECK_INT(from, 0);
    CHECK(is_quiet(w.ranks[0]) && is_quiet(w.ranks[1]));
    CHECK_INT(w.ranks[0]->stats.received, 4);
    CHECK_INT(w.ranks[1]->stats.sent_bytes, 2);
    close_world(&w);
}

static void test_refusals(void)
{
    net_options opt = small_options();
    world w = open_world(2, opt, NULL, NULL);
    CHECK(net_take(w.ranks[0], opt.max_message + 1) == NULL);
    net_buf *b = net_take(w.ranks[0], opt.max_message);
    CHECK(b != NULL && (uintptr_t)b->data % 64 == 0 && b->cap >= opt.max_message);
    b->len = b->cap + 1;
    CHECK_INT(net_send(w.ranks[0], 1, b), EP_ERR_TOO_LARGE);
    b = net_take(w.ranks[0], 1);
    CHECK_INT(net_send(w.ranks[0], 2, b), EP_ERR_INVALID);
    b = net_take(w.ranks[0], 1);
    CHECK_INT(net_send(w.ranks[0], -1, b), EP_ERR_INVALID);
    /* All three buffers came back: the number that can be taken is still three quarters. */
    int n = 0;
    net_buf *held[16];
    while (n < 16 && (held[n] = net_take(w.ranks[0], 1)) != NULL)
        n++;
    CHECK_INT(n, 12);
    while (n > 0)
        net_give(w.ranks[0], held[--n]);

    net *again;
    opt.n_ranks = 2;
    CHECK_INT(net_loopback_open(&again, w.hub, &opt), EP_ERR_INVALID); /* rank 0 is open */
    opt.rank = 2;
    CHECK_INT(net_loopback_open(&again, w.hub, &opt), EP_ERR_INVALID);
    opt.rank = 0;
    opt.credit = 64;
    CHECK_INT(net_loopback_open(&again, w.hub, &opt), EP_ERR_INVALID);
    close_world(&w);
}

static void test_credit(void)
{
    world w = open_world(3, small_options(), NULL, NULL);
    for (int i = 0; i < 4; i++)
        CHECK_INT(send_text(w.ranks[0], 1, "x"), EP_OK);
    CHECK_INT(send_text(w.ranks[0], 1, "x"), EP_AGAIN);
    CHECK_INT(send_text(w.ranks[0], 2, "y"), EP_OK); /* another peer has its own credit */
    CHECK_INT(w.ranks[0]->stats.no_credit, 1);
    CHECK_INT(net_wait(w.ranks[0], soon(0)), EP_AGAIN);
    CHECK_STR(next_text(w.ranks[1], NULL), "x");
    CHECK_INT(net_wait(w.ranks[0], soon(10000)), EP_OK); /* a send completed after a refusal */
    CHECK_INT(send_text(w.ranks[0], 1, "z"), EP_OK);
    close_world(&w);
}

static void test_no_buffers(void)
{
    net_options opt = small_options();
    opt.n_buffers = 4;
    world w = open_world(2, opt, NULL, NULL);
    net_buf *held[4];
    for (int i = 0; i < 3; i++)
        held[i] = net_take(w.ranks[0], 1);
    CHECK(held[2] != NULL && net_take(w.ranks[0], 1) == NULL);
    CHECK_INT(send_text(w.ranks[1], 0, "1"), EP_OK);
    CHECK_INT(send_text(w.ranks[1], 0, "2"), EP_OK);
    net_buf *got, *more;
    CHECK_INT(net_next(w.ranks[0], &got), EP_OK); /* the one kept for receiving */
    CHECK_INT(net_next(w.ranks[0], &more), EP_AGAIN);
    CHECK_INT(net_wait(w.ranks[0], soon(5)),
              EP_AGAIN); /* nothing could be received: no busy loop */
    CHECK(got->len == 1 && got->data[0] == '1');
    net_give(w.ranks[0], got);
    CHECK_STR(next_text(w.ranks[0], NULL), "2");
    for (int i = 0; i < 3; i++)
        net_give(w.ranks[0], held[i]);
    close_world(&w);
}

/* ---- scripted faults ---- */

static net_fault fault_nth(void *arg, int from, int to, uint64_t i, const void *msg, size_t len)
{
    (void)from, (void)to, (void)msg, (void)len;
    net_fault none = {0};
    return i == 1 ? *(net_fault *)arg : none;
}

/* Sends "aa", "bb", "cc" with the fault on the second; the text that arrives. */
static void check_fault(net_fault fault, const char *const *want, int n_want)
{
    world w = open_world(2, small_options(), fault_nth, &fault);
    CHECK_INT(send_text(w.ranks[0], 1, "aa"), EP_OK);
    CHECK_INT(send_text(w.ranks[0], 1, "bb"), EP_OK);
    CHECK_INT(send_text(w.ranks[0], 1, "cc"), EP_OK);
    for (int i = 0; i < n_want; i++)
        CHECK_STR(next_text(w.ranks[1], NULL), want[i]);
    CHECK(is_quiet(w.ranks[1]));
    /* Whatever happened to it, the send is over: its buffer and its credit are back. */
    for (int i = 0; i < 4; i++)
        CHECK_INT(send_text(w.ranks[0], 1, "x"), EP_OK);
    CHECK_INT(w.ranks[0]->stats.quarantined, 0);
    close_world(&w);
}

static void test_faults(void)
{
    check_fault((net_fault){0}, (const char *[]){"aa", "bb", "cc"}, 3);
    check_fault((net_fault){.lose = true}, (const char *[]){"aa", "cc"}, 2);
    check_fault((net_fault){.duplicates = 2}, (const char *[]){"aa", "bb", "bb", "bb", "cc"}, 5);
    check_fault((net_fault){.delay_ms = 1000}, (const char *[]){"aa", "cc", "bb"}, 3);
    check_fault((net_fault){.truncate_to = 1}, (const char *[]){"aa", "b", "cc"}, 3);
    check_fault((net_fault){.truncate_to = 9}, (const char *[]){"aa", "bb", "cc"}, 3);
}

static void test_corrupt(void)
{
    net_fault fault = {.corrupt = true};
    uint8_t seen[2];
    for (int round = 0; round < 2; round++) {
        world w = open_world(2, small_options(), fault_nth, &fault);
        CHECK_INT(send_text(w.ranks[0], 1, "aa"), EP_OK);
        CHECK_INT(send_text(w.ranks[0], 1, "Q"), EP_OK);
        CHECK_STR(next_text(w.ranks[1], NULL), "aa");
        net_buf *b = NULL;
        CHECK_INT(net_next(w.ranks[1], &b), EP_OK);
        CHECK_INT(b->len, 1);
        seen[round] = b->data[0];
        CHECK_INT(__builtin_popcount(b->data[0] ^ 'Q'), 1);
        net_give(w.ranks[1], b);
        close_world(&w);
    }
    CHECK_INT(seen[0], seen[1]); /* the same bit every time */
}

/* ---- death ---- */

static void test_death(void)
{
    net_options opt = small_options();
    opt.send_deadline_ms = 2000; /* less would pass by itself on a busy machine */
    world w = open_world(3, opt, NULL, NULL);
    CHECK_INT(send_text(w.ranks[1], 0, "before"), EP_OK);
    CHECK_INT(send_text(w.ranks[0], 1, "unread"), EP_OK);
    net_hub_kill(w.hub, 1);
    CHECK(is_quiet(w.ranks[0])); /* vanished with its sender */
    CHECK_INT(send_text(w.ranks[1], 0, "ghost"), EP_OK);
    CHECK(is_quiet(w.ranks[0]));
    CHECK_INT(send_text(w.ranks[0], 1, "after"), EP_OK); /* nobody knows yet */
    CHECK_INT(net_wait(w.ranks[0], soon(2500)), EP_AGAIN);
    CHECK_INT(w.ranks[0]->stats.quarantined, 2);
    CHECK_INT(send_text(w.ranks[0], 1, "late"), EP_ERR_PEER_LOST);
    CHECK_INT(send_text(w.ranks[0], 2, "alive"), EP_OK);
    CHECK_STR(next_text(w.ranks[2], NULL), "alive");
    CHECK(is_quiet(w.ranks[1]));
    close_world(&w);
}

static void test_forget(void)
{
    world w = open_world(2, small_options(), NULL, NULL);
    for (int i = 0; i < 3; i++)
        CHECK_INT(send_text(w.ranks[0], 1, "x"), EP_OK);
    net_forget(w.ranks[0], 1);
    net_forget(w.ranks[0], 7); /* no such rank */
    CHECK_INT(w.ranks[0]->stats.quarantined, 3);
    CHECK_INT(send_text(w.ranks[0], 1, "y"), EP_ERR_PEER_LOST);
    /* Quarantined buffers do not come back even when the peer reads after all. */
    for (int i = 0; i < 3; i++)
        CHECK_STR(next_text(w.ranks[1], NULL), "x");
    int n = 0;
    while (n < 16 && net_take(w.ranks[0], 1) != NULL)
        n++;
    CHECK_INT(n, 9); /* 16 - 3 quarantined - 4 kept for receiving */
    close_world(&w);
}

/* ---- threads ---- */

typedef struct waker {
    net *n;
    int delay_ms;
} waker;

static void *wake_later(void *arg)
{
    waker *w = arg;
    struct timespec ts = {.tv_nsec = w->delay_ms * 1000000L};
    nanosleep(&ts, NULL);
    net_wake(w->n);
    return NULL;
}

static void test_wake(void)
{
    world w = open_world(2, small_options(), NULL, NULL);
    net_wake(w.ranks[0]); /* before the wait: not lost */
    CHECK_INT(net_wait(w.ranks[0], soon(10000)), EP_OK);
    CHECK_INT(net_wait(w.ranks[0], soon(1)), EP_AGAIN); /* and used up */
    waker arg = {.n = w.ranks[0], .delay_ms = 20};
    pthread_t thread;
    if (pthread_create(&thread, NULL, wake_later, &arg) != 0) abort();
    CHECK_INT(net_wait(w.ranks[0], EP_TIME_NEVER), EP_OK);
    pthread_join(thread, NULL);
    CHECK_INT(w.ranks[0]->stats.wakes, 2);
    close_world(&w);
}

typedef struct party {
    net *n;
    int n_rounds;
    uint64_t seed;
    uint64_t bad;
} party;

/* What a message of a given number must hold. */
static uint8_t pattern(int from, uint64_t i, size_t at)
{
    return (uint8_t)((unsigned)from * 31u + (unsigned)i * 7u + (unsigned)at);
}

static void put_message(net_buf *b, int from, uint64_t i, uint64_t seed)
{
    b->len = 8 + (size_t)((seed ^ i * 0x9e37u) % 900);
    memcpy(b->data, &i, 8);
    for (size_t at = 8; at < b->len; at++)
        b->data[at] = pattern(from, i, at);
}

static void check_message(party *p, const net_buf *b, uint64_t *expected)
{
    uint64_t i;
    memcpy(&i, b->data, 8);
    if (i != expected[b->peer]++) p->bad++;
    for (size_t at = 8; at < b->len; at++)
        if (b->data[at] != pattern(b->peer, i, at)) p->bad++;
}

/* Sends n_rounds messages to every other rank and receives as many, in order and unharmed. */
static void *run_party(void *arg)
{
    party *p = arg;
    net *n = p->n;
    uint64_t sent[MAX_RANKS] = {0}, expected[MAX_RANKS] = {0};
    uint64_t want = (uint64_t)p->n_rounds * (uint64_t)(n->n_ranks - 1), left = want;
    ep_time deadline = soon(60000);
    while ((n->stats.received < want || left > 0) && !ep_time_is_past(deadline, ep_now())) {
        net_buf *b;
        bool moved = false;
        for (int peer = 0; peer < n->n_ranks; peer++) {
            if (peer == n->rank || sent[peer] == (uint64_t)p->n_rounds) continue;
            if ((b = net_take(n, 1000)) == NULL) break;
            put_message(b, n->rank, sent[peer], p->seed);
            ep_status status = net_send(n, peer, b);
            if (status == EP_AGAIN) {
                net_give(n, b);
                continue;
            }
            if (status != EP_OK) p->bad++;
            sent[peer]++;
            left--;
            moved = true;
        }
        while (net_next(n, &b) == EP_OK) {
            check_message(p, b, expected);
            net_give(n, b);
            moved = true;
        }
        if (!moved) net_wait(n, deadline);
    }
    if (n->stats.received != want || left != 0) p->bad++;
    return NULL;
}

static void test_parties(void)
{
    net_options opt = small_options();
    opt.send_deadline_ms = 60000;
    world w = open_world(MAX_RANKS, opt, NULL, NULL);
    party parties[MAX_RANKS];
    pthread_t threads[MAX_RANKS];
    uint64_t before = ep_alloc_count();
    for (int i = 0; i < MAX_RANKS; i++) {
        parties[i] = (party){.n = w.ranks[i], .n_rounds = 400, .seed = SEED + (uint64_t)i};
        if (pthread_create(&threads[i], NULL, run_party, &parties[i]) != 0) abort();
    }
    for (int i = 0; i < MAX_RANKS; i++) {
        pthread_join(threads[i], NULL);
        CHECK_INT(parties[i].bad, 0);
        CHECK_INT(w.ranks[i]->stats.quarantined, 0);
    }
    CHECK(ep_alloc_count() == before); /* nothing is allocated after open */
    close_world(&w);
}

static void test_alloc_failure(void)
{
    net_options opt = small_options();
    opt.n_ranks = 2;
    int failures = 0;
    for (int at = 1; at < 20; at++) {
        net_hub *hub = NULL;
        net *n = NULL;
        ep_alloc_fail_at(at);
        ep_status status = net_hub_open(&hub, 2, NULL, NULL);
        if (status == EP_OK) status = net_loopback_open(&n, hub, &opt);
        ep_alloc_fail_at(0);
        CHECK(status == EP_OK || status == EP_ERR_NOMEM);
        failures += status == EP_ERR_NOMEM;
        net_close(n);
        net_hub_close(hub);
    }
    CHECK(failures >= 7); /* hub, ranks, counts; net, buffers, outstanding, lost */
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"order", test_order},
        {"refusals", test_refusals},
        {"credit", test_credit},
        {"no_buffers", test_no_buffers},
        {"faults", test_faults},
        {"corrupt", test_corrupt},
        {"death", test_death},
        {"forget", test_forget},
        {"wake", test_wake},
        {"parties", test_parties},
        {"alloc_failure", test_alloc_failure},
    };
    printf("seed %llx\n", (unsigned long long)SEED);
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
