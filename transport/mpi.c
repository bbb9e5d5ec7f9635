/*
 * Messages over MPI point-to-point; the only file that sees mpi.h. Every message is one MPI_Isend
 * with one tag; receiving is MPI_Improbe and MPI_Imrecv into a buffer of the pool, so senders need
 * no agreement on sizes and a flooded rank leaves messages where they are.
 *
 * Open MPI 4.1 never reports a dead peer: what is under way with it stays so for ever. So every
 * send and every receive has a deadline; past it the buffer is quarantined (MPI may still write to
 * it or read from it), the request is abandoned, and the peer is forgotten: no further sends, and
 * what it left unmatched is dropped unmatched. Credit bounds what a dead peer can hold. After the
 * first such loss MPI_Finalize is out of the question, and net_mpi_stop does nothing.
 *
 * MPI has no progress of its own: while a send or receive is under way a wait polls, in ever longer
 * naps; only a rank with nothing under way sleeps (bell.c). Nothing is allocated after open.
 */
#include "transport/bell.h"
#include "transport/pool.h"

#include <mpi.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define TAG              1
#define RUNG_SPIN_NS     1000000 /* after a bell: the message may be some way behind it */
#define NAP_MIN_NS       1000
#define NAP_MAX_NS       100000
#define NAP_START_NS     1000000
#define N_YIELDS         200 /* polls that only yield before the naps start */
#define N_LAST_LOOKS     10  /* Open MPI looks at its sockets in every 8th poll */
#define FINALIZE_LIMIT_S 5

typedef struct mpi_slot {
    net_slot slot; /* first */
    bool is_out;   /* with the engine; guards against giving twice */
} mpi_slot;

typedef struct receive {
    mpi_slot *buf;
    MPI_Request request;
    ep_time deadline;
    bool done;
    void *discard; /* where a message larger than any buffer goes, NULL for others */
    size_t discard_bytes;
} receive;

typedef struct mpi_net {
    net pub; /* first */
    net_options opt;
    net_pool pool;
    mpi_slot *slots;  /* [n_buffers] */
    int *outstanding; /* [n_ranks] sends under way */
    bool *lost;       /* [n_ranks] */
    /* Sends under way, compact: the same index in all four. */
    MPI_Request *send_requests;
    mpi_slot **send_bufs;
    ep_time *send_deadlines;
    int *completed; /* scratch of MPI_Testsome */
    int n_sends;
    receive *receives; /* [n_buffers] matched and not yet fetched by net_next, in order */
    int n_receives, n_open_receives;
    bell *bell;
    atomic_bool woken;
    bool starved; /* a take or send was refused: the next completion ends a wait */
    bool refilled;
} mpi_net;

static bool started, faulted;

/* ---- start and stop ---- */

ep_status net_mpi_start(int *rank, int *n_ranks, ep_err *err)
{
    int provided = MPI_THREAD_SINGLE;
    /* A write to the socket of a dead rank raises it (BTL tcp). */
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_TIMERSLACK, 1000UL, 0UL, 0UL, 0UL);
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS)
        return ep_fail(err, EP_ERR_IO, "MPI_Init_thread failed");
    if (provided < MPI_THREAD_FUNNELED)
        return ep_fail(err, EP_ERR_UNSUPPORTED, "this MPI cannot run with threads");
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, rank);
    MPI_Comm_size(MPI_COMM_WORLD, n_ranks);
    started = true;
    return EP_OK;
}

/* The end of a collective of the start. Others may be loading for minutes, and may need this
 * processor for it: MPI's own wait would not leave it to them. */
static ep_status await_all(int started_as, MPI_Request *request)
{
    int done = 0;
    while (started_as == MPI_SUCCESS && !done) {
        if (MPI_Test(request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS) return EP_ERR_IO;
        if (!done) nanosleep(&(struct timespec){.tv_nsec = NAP_START_NS}, NULL);
    }
    return started_as == MPI_SUCCESS ? EP_OK : EP_ERR_IO;
}

ep_status net_mpi_allgather(const void *mine, size_t n, void *out)
{
    if (n > INT32_MAX) return EP_ERR_TOO_LARGE;
    MPI_Request request;
    int r = MPI_Iallgather(mine, (int)n, MPI_BYTE, out, (int)n, MPI_BYTE, MPI_COMM_WORLD, &request);
    return await_all(r, &request);
}

/* The work is done and only MPI's own goodbye hangs: ending here is the clean end. */
static void end_process(int sig)
{
    (void)sig;
    _exit(0);
}

void net_mpi_stop(bool clean)
{
    if (!clean || !started || faulted) return;
    started = false;
    signal(SIGALRM, end_process);
    alarm(FINALIZE_LIMIT_S);
    MPI_Finalize();
    alarm(0);
}

/* ---- buffers and loss ---- */

static net_buf *mpi_take(net *n, size_t bytes)
{
    mpi_net *m = (mpi_net *)n;
    if (bytes > m->opt.max_message) return NULL;
    mpi_slot *s = (mpi_slot *)net_pool_get(&m->pool, false);
    if (s == NULL) {
        m->starved = true;
        return NULL;
    }
    s->is_out = true;
    return &s->slot.pub;
}

static void put_back(mpi_net *m, mpi_slot *s)
{
    s->is_out = false;
    net_pool_put(&m->pool, &s->slot);
}

static void mpi_give(net *n, net_buf *b)
{
    mpi_slot *s = (mpi_slot *)b;
    if (s->is_out) put_back((mpi_net *)n, s);
}

/* Takes a send out of the compact arrays; the order of sends does not matter. */
static mpi_slot *remove_send(mpi_net *m, int i)
{
    mpi_slot *s = m->send_bufs[i];
    int last = --m->n_sends;
    m->outstanding[s->slot.pub.peer]--;
    m->send_requests[i] = m->send_requests[last];
    m->send_bufs[i] = m->send_bufs[last];
    m->send_deadlines[i] = m->send_deadlines[last];
    return s;
}

/* The order of receives does matter. */
static void remove_receive(mpi_net *m, int i)
{
    if (!m->receives[i].done) m->n_open_receives--;
    m->n_receives--;
    memmove(&m->receives[i], &m->receives[i + 1],
            (size_t)(m->n_receives - i) * sizeof(m->receives[0]));
}

/* Gives up everything under way with a peer. Buffers and requests are MPI's for ever. */
static void lose(mpi_net *m, int peer)
{
    m->lost[peer] = true;
    m->refilled = m->starved; /* who waits for credit is to learn that none will come */
    for (int i = m->n_sends - 1; i >= 0; i--) {
        if (m->send_bufs[i]->slot.pub.peer != peer) continue;
        remove_send(m, i);
        m->pub.stats.quarantined++;
        faulted = true;
    }
    for (int i = m->n_receives - 1; i >= 0; i--) {
        receive r = m->receives[i];
        if (r.buf->slot.pub.peer != peer) continue;
        remove_receive(m, i);
        if (r.done) { /* behind one that will never come: without it there would be a gap */
            put_back(m, r.buf);
            m->pub.stats.dropped++;
        } else {
            m->pub.stats.quarantined++;
            faulted = true;
        }
    }
}

static void mpi_forget(net *n, int peer)
{
    faulted = true; /* dead or not, it is not going to take part in MPI_Finalize with us */
    lose((mpi_net *)n, peer);
}

/* ---- sending ---- */

static void check_deadlines(mpi_net *m)
{
    if (m->n_sends == 0 && m->n_open_receives == 0) return;
    ep_time now = ep_now();
    int late = -1;
    do { /* lose() reorders both lists, so look again after each */
        late = -1;
        for (int i = 0; i < m->n_sends && late < 0; i++)
            if (ep_time_is_past(m->send_deadlines[i], now)) late = m->send_bufs[i]->slot.pub.peer;
        for (int i = 0; i < m->n_receives && late < 0; i++)
            if (!m->receives[i].done && ep_time_is_past(m->receives[i].deadline, now))
                late = m->receives[i].buf->slot.pub.peer;
        if (late >= 0) lose(m, late);
    } while (late >= 0);
}

static int compare_int(const void *a, const void *b)
{
    return *(const int *)a - *(const int *)b;
}

static void progress_sends(mpi_net *m)
{
    int n = 0;
    if (m->n_sends == 0) return;
    MPI_Testsome(m->n_sends, m->send_requests, &n, m->completed, MPI_STATUSES_IGNORE);
    if (n == MPI_UNDEFINED || n <= 0) return;
    /* From the back, so that what remove_send moves forward was looked at already. */
    qsort(m->completed, (size_t)n, sizeof(int), compare_int);
    for (int i = n - 1; i >= 0; i--) {
        mpi_slot *s = remove_send(m, m->completed[i]);
        /* It took a while: the peer may have looked for it too early and be asleep again. */
        bell_ring(m->bell, s->slot.pub.peer);
        put_back(m, s);
    }
    m->refilled = m->starved;
}

static ep_status mpi_send(net *n, int peer, net_buf *b)
{
    mpi_net *m = (mpi_net *)n;
    mpi_slot *s = (mpi_slot *)b;
    if (m->lost[peer]) {
        put_back(m, s);
        return EP_ERR_PEER_LOST;
    }
    if (m->outstanding[peer] >= m->opt.credit) progress_sends(m);
    if (m->outstanding[peer] >= m->opt.credit) {
        check_deadlines(m);
        n->stats.no_credit++;
        m->starved = true;
        return EP_AGAIN;
    }
    net_pool_turn(&m->pool, &s->slot);
    s->is_out = false;
    b->peer = peer;
    MPI_Request request;
    int done = 0;
    if (MPI_Isend(b->data, (int)b->len, MPI_BYTE, peer, TAG, MPI_COMM_WORLD, &request) !=
        MPI_SUCCESS) { /* who knows what MPI did with the buffer */
        n->stats.quarantined++;
        lose(m, peer);
        return EP_ERR_PEER_LOST;
    }
    n->stats.sent++;
    n->stats.sent_bytes += b->len;
    /* Short ones are complete at once, and then a wait may sleep. */
    MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    bell_ring(m->bell, peer);
    if (done) {
        put_back(m, s);
        return EP_OK;
    }
    m->send_requests[m->n_sends] = request;
    m->send_bufs[m->n_sends] = s;
    m->send_deadlines[m->n_sends] = ep_time_after_ms(ep_now(), m->opt.send_deadline_ms);
    m->n_sends++;
    m->outstanding[peer]++;
    return EP_OK;
}

/* ---- receiving ---- */

static void finish_receive(mpi_net *m, int i)
{
    receive *r = &m->receives[i];
    r->done = true;
    m->n_open_receives--;
    if (r->discard == NULL) return;
    mpi_slot *s = r->buf;
    ep_unmap(r->discard, r->discard_bytes);
    remove_receive(m, i);
    put_back(m, s);
    m->pub.stats.dropped++;
}

static void test_receives(mpi_net *m)
{
    for (int i = m->n_receives - 1; i >= 0 && m->n_open_receives > 0; i--) {
        int done = 0;
        if (m->receives[i].done) continue;
        MPI_Test(&m->receives[i].request, &done, MPI_STATUS_IGNORE);
        if (done) finish_receive(m, i);
    }
}

/* Matches one message that has arrived. False when there is none. */
static bool match_one(mpi_net *m)
{
    int flag = 0, bytes = 0, done = 0;
    MPI_Message message;
    MPI_Status status;
    if (MPI_Improbe(MPI_ANY_SOURCE, TAG, MPI_COMM_WORLD, &flag, &message, &status) != MPI_SUCCESS)
        return false;
    if (!flag) return false;
    if (m->lost[status.MPI_SOURCE]) {
        m->pub.stats.dropped++; /* never received: it might hold a buffer for ever */
        return true;
    }
    MPI_Get_count(&status, MPI_BYTE, &bytes);
    if (bytes < 0) { /* more than 2 GiB: no rank of this program sent that */
        m->pub.stats.dropped++;
        return true;
    }
    void *discard = NULL, *into;
    if ((size_t)bytes > m->opt.max_message) {
        /* Received whole and thrown away. Never into a smaller buffer: with a single-copy transport
         * Open MPI 4.1 writes all of it. Without memory it stays unreceived. */
        discard = ep_map((size_t)bytes);
        if (discard == NULL) {
            m->pub.stats.dropped++;
            return true;
        }
    }
    mpi_slot *s = (mpi_slot *)net_pool_get(&m->pool, true);
    receive *r = &m->receives[m->n_receives];
    *r = (receive){.buf = s,
                   .deadline = ep_time_after_ms(ep_now(), m->opt.send_deadline_ms),
                   .discard = discard,
                   .discard_bytes = (size_t)bytes};
    s->slot.pub.peer = status.MPI_SOURCE;
    s->slot.pub.len = discard != NULL ? 0 : (size_t)bytes;
    into = discard != NULL ? discard : s->slot.pub.data;
    MPI_Imrecv(into, bytes, MPI_BYTE, &message, &r->request);
    m->n_receives++;
    m->n_open_receives++;
    MPI_Test(&r->request, &done, MPI_STATUS_IGNORE);
    if (done) finish_receive(m, m->n_receives - 1);
    return true;
}

/* Index of the first complete message that overtakes none of its own sender; -1 for none. */
static int first_done(const mpi_net *m)
{
    for (int i = 0; i < m->n_receives; i++) {
        if (!m->receives[i].done) continue;
        int peer = m->receives[i].buf->slot.pub.peer, j = 0;
        while (j < i && m->receives[j].buf->slot.pub.peer != peer)
            j++;
        if (j == i) return i;
    }
    return -1;
}

/* Moves everything that can move. */
static void progress(mpi_net *m)
{
    progress_sends(m);
    test_receives(m);
    while (net_pool_has(&m->pool, true) && match_one(m))
        continue;
    check_deadlines(m);
}

static ep_status mpi_next(net *n, net_buf **out)
{
    mpi_net *m = (mpi_net *)n;
    int i = first_done(m);
    if (i < 0) {
        progress(m);
        i = first_done(m);
    }
    if (i < 0) return EP_AGAIN;
    mpi_slot *s = m->receives[i].buf;
    remove_receive(m, i);
    s->is_out = true;
    n->stats.received++;
    n->stats.received_bytes += s->slot.pub.len;
    *out = &s->slot.pub;
    return EP_OK;
}

/* ---- waiting ---- */

static bool take_event(mpi_net *m)
{
    bool event = atomic_exchange_explicit(&m->woken, false, memory_order_seq_cst);
    if (event) m->pub.stats.wakes++;
    if (m->refilled) {
        m->refilled = m->starved = false;
        event = true;
    }
    return event || first_done(m) >= 0;
}

/* Looks as often as Open MPI needs to look everywhere, then sleeps. True when there is an event. */
static bool sleep_once(mpi_net *m, ep_time deadline)
{
    uint32_t armed = bell_arm(m->bell);
    for (int i = 0; i < N_LAST_LOOKS; i++) {
        progress(m);
        if (take_event(m)) {
            bell_disarm(m->bell);
            return true;
        }
        if (m->n_sends > 0 || m->n_open_receives > 0) {
            bell_disarm(m->bell);
            return false;
        }
    }
    int64_t ns = ep_time_diff_ns(deadline, ep_now());
    if (ns > BELL_NET_MS * INT64_C(1000000)) ns = BELL_NET_MS * INT64_C(1000000);
    m->pub.stats.sleeps++;
    bell_sleep(m->bell, armed, ns);
    return false;
}

static void nap(int64_t ns, ep_time now, ep_time deadline)
{
    int64_t left = ep_time_diff_ns(deadline, now);
    if (ns > left) ns = left;
    if (ns <= 0) return;
    struct timespec ts = {.tv_nsec = ns};
    nanosleep(&ts, NULL);
}

static ep_status mpi_wait(net *n, ep_time deadline)
{
    mpi_net *m = (mpi_net *)n;
    int64_t nap_ns = NAP_MIN_NS;
    int n_yields = 0;
    ep_time spin_until = {ep_now().ns + (int64_t)m->opt.spin_us * 1000};
    for (;;) {
        progress(m);
        if (take_event(m)) return EP_OK;
        ep_time now = ep_now();
        if (ep_time_is_past(deadline, now)) return EP_AGAIN;
        if (bell_rang(m->bell)) spin_until.ns = now.ns + RUNG_SPIN_NS;
        if (!ep_time_is_past(spin_until, now)) {
            sched_yield();
        } else if (m->n_sends > 0 || m->n_open_receives > 0) {
            if (n_yields++ < N_YIELDS) {
                sched_yield();
            } else {
                nap(nap_ns, now, deadline);
                if (nap_ns < NAP_MAX_NS) nap_ns = nap_ns * 3 / 2;
            }
        } else if (sleep_once(m, deadline)) {
            return EP_OK;
        }
    }
}

static void mpi_wake(net *n)
{
    mpi_net *m = (mpi_net *)n;
    atomic_store_explicit(&m->woken, true, memory_order_seq_cst);
    bell_ring_self(m->bell);
}

/* ---- opening ---- */

static void mpi_close(net *n)
{
    mpi_net *m = (mpi_net *)n;
    bell_close(m->bell);
    /* What is under way belongs to MPI until the process ends, and so do the buffers then. */
    if (m->n_sends == 0 && m->n_open_receives == 0 && m->pub.stats.quarantined == 0)
        net_pool_fini(&m->pool);
    ep_free(m->slots);
    ep_free(m->outstanding);
    ep_free(m->lost);
    ep_free(m->send_requests);
    ep_free(m->send_bufs);
    ep_free(m->send_deadlines);
    ep_free(m->completed);
    ep_free(m->receives);
    ep_free(m);
}

static const net_ops mpi_ops = {
    .name = "mpi",
    .take = mpi_take,
    .give = mpi_give,
    .send = mpi_send,
    .next = mpi_next,
    .wait = mpi_wait,
    .wake = mpi_wake,
    .forget = mpi_forget,
    .close = mpi_close,
};

static ep_status init_arrays(mpi_net *m, ep_err *err)
{
    size_t n = (size_t)m->opt.n_buffers, ranks = (size_t)m->opt.n_ranks;
    m->slots = ep_calloc(n, sizeof(*m->slots));
    m->outstanding = ep_calloc(ranks, sizeof(*m->outstanding));
    m->lost = ep_calloc(ranks, sizeof(*m->lost));
    m->send_requests = ep_calloc(n, sizeof(MPI_Request));
    m->send_bufs = ep_calloc(n, sizeof(*m->send_bufs));
    m->send_deadlines = ep_calloc(n, sizeof(*m->send_deadlines));
    m->completed = ep_calloc(n, sizeof(*m->completed));
    m->receives = ep_calloc(n, sizeof(*m->receives));
    if (m->slots == NULL || m->outstanding == NULL || m->lost == NULL || m->send_requests == NULL ||
        m->send_bufs == NULL || m->send_deadlines == NULL || m->completed == NULL ||
        m->receives == NULL)
        return ep_fail(err, EP_ERR_NOMEM, "transport: no memory");
    ep_status status = net_pool_init(&m->pool, m->slots, sizeof(*m->slots), &m->opt);
    if (status != EP_OK)
        return ep_fail(err, status, "transport: no memory for %d buffers of %zu bytes",
                       m->opt.n_buffers, m->opt.max_message);
    m->pub.memory = m->pool.memory;
    m->pub.memory_bytes = m->pool.bytes;
    return EP_OK;
}

/* All ranks open their bells together. A rank whose own part failed takes part to the end, so that
 * nobody is left waiting, and then all of them fail. */
static ep_status open_bell(mpi_net *m, ep_status mine, ep_err *err)
{
    size_t ranks = (size_t)m->opt.n_ranks;
    bell_card card;
    bell_card *cards = ep_calloc(ranks, sizeof(*cards));
    int32_t *joined = ep_calloc(ranks, sizeof(*joined));
    ep_status status = EP_ERR_NOMEM;
    if (cards == NULL || joined == NULL) {
        ep_fail(err, status, "transport: no memory");
        goto done;
    }
    status = bell_open(&m->bell, m->opt.rank, m->opt.n_ranks, &card, mine == EP_OK ? err : NULL);
    if (mine != EP_OK) status = mine;
    card.is_ok = status == EP_OK;
    if (net_mpi_allgather(&card, sizeof(card), cards) != EP_OK) {
        status = ep_fail(err, EP_ERR_IO, "transport: MPI_Allgather failed");
        goto done;
    }
    for (int i = 0; i < m->opt.n_ranks; i++)
        if (!cards[i].is_ok && status == EP_OK)
            status = ep_fail(err, EP_ERR_PEER_LOST, "transport: rank %d could not open it", i);
    if (status != EP_OK) goto done;
    bell_share(m->bell, cards);
    MPI_Request barrier;
    int r = MPI_Ibarrier(MPI_COMM_WORLD, &barrier);
    if (await_all(r, &barrier) != EP_OK) {
        status = ep_fail(err, EP_ERR_IO, "transport: MPI_Ibarrier failed");
        goto done;
    }
    int32_t owner = bell_join(m->bell, cards);
    net_mpi_allgather(&owner, sizeof(owner), joined);
    status = bell_connect(m->bell, cards, joined, err);
    log_debug("transport open, %d peers on this host, %d elsewhere",
              m->opt.n_ranks - 1 - bell_n_remote(m->bell), bell_n_remote(m->bell));
done:
    ep_free(joined);
    ep_free(cards);
    return status;
}

ep_status net_mpi_open(net **out, const net_options *opt, ep_err *err)
{
    int rank, n_ranks;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &n_ranks);
    if (!net_options_are_valid(opt) || opt->rank != rank || opt->n_ranks != n_ranks)
        return ep_fail(err, EP_ERR_INVALID, "transport: options out of range");
    mpi_net *m = ep_calloc(1, sizeof(*m));
    if (m == NULL) return ep_fail(err, EP_ERR_NOMEM, "transport: no memory");
    m->opt = *opt;
    m->pub.ops = &mpi_ops;
    m->pub.rank = opt->rank;
    m->pub.n_ranks = opt->n_ranks;
    m->pub.n_buffers = opt->n_buffers;
    ep_status status = init_arrays(m, err);
    status = open_bell(m, status, err);
    if (status != EP_OK) {
        mpi_close(&m->pub);
        return status;
    }
    *out = &m->pub;
    return EP_OK;
}
