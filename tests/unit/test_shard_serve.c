/*
 * The serving loop over loopback: ranks 0 and 1 ask, rank 2 is the shard. Every answer is compared
 * by bits with shard_answer of a second shard, whatever happens to the messages on their way.
 */
#include "expert_shard/store.h"
#include "tests/unit/shard_fixture.h"

#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>

#define N_QUESTIONS 48
#define SHARD_RANK  2
#define ROWS_MAX    6

typedef struct question {
    void *msg;
    size_t bytes;
    wire_header h;
    float *want; /* [n_pairs, hidden] */
} question;

typedef struct rig {
    world w; /* its shard answers in advance */
    question q[2][N_QUESTIONS];
    net_hub *hub;
    net *nets[3];
    shard *s; /* its shard serves */
    pthread_t thread;
    bool is_running;
    ep_status served;
    atomic_int ticks;
} rig;

static void on_tick(void *arg)
{
    atomic_fetch_add(&((rig *)arg)->ticks, 1);
}

static void *serve_main(void *arg)
{
    rig *r = arg;
    r->served = shard_serve(r->s, r->nets[SHARD_RANK], on_tick, r);
    return NULL;
}

/* Layers in turn, 1 to ROWS_MAX rows, floats now and then; sequence is the index. */
static bool make_question(rig *r, int router, int i)
{
    world *w = &r->w;
    question *q = &r->q[router][i];
    int top_k = w->m->shape.top_k, n_rows = 1 + (int)(fixture_random() % ROWS_MAX);
    q->h = w->h;
    q->h.router = (uint16_t)router;
    q->h.layer = (uint16_t)((i + router) % w->m->shape.n_layers);
    q->h.form = i % 5 == 4 ? KERN_ACT_F32 : (uint16_t)shard_layer_form(w->s, q->h.layer);
    q->h.sequence = (uint64_t)i;
    q->h.n_rows = (uint32_t)n_rows;
    q->h.n_pairs = (uint32_t)(n_rows * top_k);
    choose_pairs(w, 0, top_k);
    const float *x = w->x + (size_t)(fixture_random() % (MAX_ROWS - ROWS_MAX)) * q->h.hidden;
    q->msg = fixture_slice(&q->h, x, w->pairs, &q->bytes);
    q->want = ep_alloc((size_t)q->h.n_pairs * q->h.hidden * sizeof(float));
    return q->msg != NULL && q->want != NULL && ask(w, w->s, &q->h, x, w->pairs, q->want);
}

/* Everything but the thread that serves. */
static bool rig_make(rig *r, net_script script, int shard_buffers, const compute_ops *ops)
{
    memset(r, 0, sizeof(*r));
    if (!world_open(&r->w, FIXTURE_MICRO, 1, NULL, 0)) return false;
    for (int router = 0; router < 2; router++)
        for (int i = 0; i < N_QUESTIONS; i++) {
            bool made = make_question(r, router, i);
            CHECK(made);
            if (!made) return false;
        }
    r->s = fixture_shard(r->w.m, &r->w.p, 0, 1, ROWS_MAX);
    CHECK(r->s != NULL && net_hub_open(&r->hub, 3, script, NULL) == EP_OK);
    if (r->s == NULL || r->hub == NULL) return false;
    net_options opt = net_options_default();
    opt.n_ranks = 3;
    opt.max_message = wire_reply_bytes(r->w.h.hidden, (uint32_t)(ROWS_MAX * r->w.m->shape.top_k));
    size_t slice = wire_slice_bytes(KERN_ACT_F32, r->w.h.hidden, ROWS_MAX,
                                    (uint32_t)(ROWS_MAX * r->w.m->shape.top_k));
    if (opt.max_message < slice) opt.max_message = slice;
    for (int i = 0; i < 3; i++) {
        opt.rank = i;
        opt.n_buffers = i == SHARD_RANK ? shard_buffers : 64;
        CHECK(net_loopback_open(&r->nets[i], r->hub, &opt) == EP_OK);
        if (r->nets[i] == NULL) return false;
    }
    if (ops != NULL) r->s->store.ops = ops;
    return true;
}

static bool rig_start(rig *r)
{
    r->is_running = pthread_create(&r->thread, NULL, serve_main, r) == 0;
    CHECK(r->is_running);
    return r->is_running;
}

static bool rig_open(rig *r, net_script script, int shard_buffers)
{
    return rig_make(r, script, shard_buffers, NULL) && rig_start(r);
}

static void rig_join(rig *r)
{
    if (r->is_running) pthread_join(r->thread, NULL);
    r->is_running = false;
}

static void rig_close(rig *r)
{
    if (r->s != NULL) shard_stop(r->s);
    rig_join(r);
    for (int i = 0; i < 3; i++)
        net_close(r->nets[i]);
    net_hub_close(r->hub);
    shard_close(r->s);
    for (int router = 0; router < 2; router++)
        for (int i = 0; i < N_QUESTIONS; i++) {
            ep_free(r->q[router][i].msg);
            ep_free(r->q[router][i].want);
        }
    world_close(&r->w);
}

/* ---- a router's side ----------------------------------------------------------------------------
 */

#define RESEND_MS 50
#define GIVE_UP_S 40

typedef struct asker {
    net *n;
    question *q;
    int window; /* questions under way at once */
    bool answered[N_QUESTIONS];
    ep_time sent[N_QUESTIONS]; /* 0: not */
    int n_sent, n_answered, n_again, n_wrong, n_errors, n_resent, n_broken;
    struct asker *other; /* on another thread, or NULL */
    atomic_bool ended;
} asker;

static void ask_one(asker *a, int i)
{
    net_buf *b = net_take(a->n, a->q[i].bytes);
    if (b == NULL) return; /* later */
    memcpy(b->data, a->q[i].msg, a->q[i].bytes);
    b->len = a->q[i].bytes;
    ep_status status = net_send(a->n, SHARD_RANK, b);
    if (status == EP_AGAIN) net_give(a->n, b);
    if (status != EP_OK) return;
    a->n_resent += a->sent[i].ns != 0;
    a->sent[i] = ep_now();
}

static void take_answer(asker *a, const net_buf *b)
{
    wire_header h = {0};
    wire_reason why = WIRE_WHY_NONE;
    if (wire_open(b->data, b->len, &h, &why) != EP_OK || h.sequence >= N_QUESTIONS) {
        a->n_broken++;
        return;
    }
    question *q = &a->q[h.sequence];
    if (h.kind == WIRE_ERROR) {
        a->n_errors++;
        if (!a->answered[h.sequence]) a->sent[h.sequence].ns = 1; /* long ago: send again */
        return;
    }
    a->n_wrong +=
        h.kind != WIRE_REPLY || h.router != q->h.router || h.layer != q->h.layer ||
        h.n_pairs != q->h.n_pairs ||
        memcmp(wire_reply_rows(b->data, &h), q->want, (size_t)h.n_pairs * h.hidden * 4) != 0;
    if (a->answered[h.sequence]) a->n_again++;
    a->n_answered += !a->answered[h.sequence];
    a->answered[h.sequence] = true;
}

static void take_all(asker *a)
{
    net_buf *b;
    while (net_next(a->n, &b) == EP_OK) {
        take_answer(a, b);
        net_give(a->n, b);
    }
}

/* Asks everything and asks again what is not answered, until n_enough answers are in. */
static void ask_all(asker *a, int n_enough)
{
    ep_time give_up = ep_time_after_ms(ep_now(), GIVE_UP_S * 1000);
    while (a->n_answered < n_enough && !ep_time_is_past(give_up, ep_now())) {
        int under_way = 0;
        for (int i = 0; i < N_QUESTIONS && under_way < a->window; i++) {
            if (a->answered[i]) continue;
            under_way++;
            if (a->sent[i].ns == 0 ||
                ep_time_is_past(ep_time_after_ms(a->sent[i], RESEND_MS), ep_now()))
                ask_one(a, i);
        }
        take_all(a);
        if (a->n_answered < n_enough) (void)net_wait(a->n, ep_time_after_ms(ep_now(), 5));
    }
    /* Second answers may still be on their way. A router that leaves them lying keeps the shard's
     * buffers under way until they are quarantined, and with few of them that is the end of the
     * other router. */
    atomic_store(&a->ended, true);
    while (a->other != NULL && !atomic_load(&a->other->ended) &&
           !ep_time_is_past(give_up, ep_now())) {
        take_all(a);
        (void)net_wait(a->n, ep_time_after_ms(ep_now(), 5));
    }
}

static void *ask_main(void *arg)
{
    ask_all(arg, N_QUESTIONS);
    return NULL;
}

static asker asker_make(rig *r, int router, int window)
{
    return (asker){.n = r->nets[router], .q = r->q[router], .window = window};
}

/* ---- tests --------------------------------------------------------------------------------------
 */

static rig the_rig; /* large */

static void two_routers(void)
{
    rig *r = &the_rig;
    if (rig_open(r, NULL, 64)) {
        asker first = asker_make(r, 0, 8), second = asker_make(r, 1, 5);
        uint64_t before = ep_alloc_count();
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, ask_main, &second) == 0);
        ask_all(&first, N_QUESTIONS);
        pthread_join(thread, NULL);
        CHECK_INT(ep_alloc_count(), before);
        CHECK_INT(first.n_answered, N_QUESTIONS);
        CHECK_INT(second.n_answered, N_QUESTIONS);
        CHECK_INT(first.n_wrong + second.n_wrong, 0);
        CHECK_INT(first.n_errors + second.n_errors + first.n_broken + second.n_broken, 0);
        const shard_counters *c = shard_counters_get(r->s);
        uint64_t slices = 0;
        for (int l = 0; l < c->n_layers; l++)
            slices += c->layers[l].slices;
        CHECK(slices >= 2 * N_QUESTIONS); /* more when a slow machine made somebody ask again */
        CHECK_INT(c->unsent, 0);
    }
    rig_close(r);
}

static net_fault faults(void *arg, int from, int to, uint64_t i, const void *msg, size_t len)
{
    (void)arg, (void)from, (void)to, (void)msg;
    return (net_fault){.lose = i % 7 == 3,
                       .duplicates = i % 5 == 2,
                       .delay_ms = i % 4 == 1 ? 3 : 0,
                       .truncate_to = i % 11 == 6 ? len / 2 : 0,
                       .corrupt = i % 13 == 8};
}

static void bad_network(void)
{
    rig *r = &the_rig;
    if (rig_open(r, faults, 64)) {
        asker first = asker_make(r, 0, 6), second = asker_make(r, 1, 3);
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, ask_main, &second) == 0);
        ask_all(&first, N_QUESTIONS);
        pthread_join(thread, NULL);
        CHECK_INT(first.n_answered, N_QUESTIONS);
        CHECK_INT(second.n_answered, N_QUESTIONS);
        CHECK_INT(first.n_wrong + second.n_wrong, 0);
        CHECK(first.n_errors > 0 && first.n_resent > 0 && first.n_again > 0 && first.n_broken > 0);
        const shard_counters *c = shard_counters_get(r->s);
        uint64_t refused = 0;
        for (int i = 1; i < WIRE_N_REASONS; i++)
            refused += c->errors[i];
        CHECK(c->errors[WIRE_WHY_LENGTH] > 0);
        CHECK(refused > c->errors[WIRE_WHY_LENGTH]); /* damaged bits: checksum mostly */
        printf("    again %d, errors %d, broken %d, twice %d\n", first.n_resent, first.n_errors,
               first.n_broken, first.n_again);
    }
    rig_close(r);
}

/* A flood over few buffers: nothing is lost for good and nothing locks up. */
static void few_buffers(void)
{
    rig *r = &the_rig;
    if (rig_open(r, NULL, 4)) {
        asker first = asker_make(r, 0, N_QUESTIONS), second = asker_make(r, 1, N_QUESTIONS);
        first.other = &second;
        second.other = &first;
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, ask_main, &second) == 0);
        ask_all(&first, N_QUESTIONS);
        pthread_join(thread, NULL);
        CHECK_INT(first.n_answered, N_QUESTIONS);
        CHECK_INT(second.n_answered, N_QUESTIONS);
        CHECK_INT(first.n_wrong + second.n_wrong, 0);
    }
    rig_close(r);
}

static void router_dies(void)
{
    rig *r = &the_rig;
    if (rig_open(r, NULL, 64)) {
        asker first = asker_make(r, 0, 8), second = asker_make(r, 1, 5);
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, ask_main, &second) == 0);
        ask_all(&first, 5);
        net_hub_kill(r->hub, 0);
        pthread_join(thread, NULL);
        CHECK(first.n_answered >= 5);
        CHECK_INT(second.n_answered, N_QUESTIONS);
        CHECK_INT(second.n_wrong, 0);
    }
    rig_close(r);
}

/* What was sent before the drain is answered, then the shard returns by itself. */
static void drain(void)
{
    rig *r = &the_rig;
    if (rig_open(r, NULL, 64)) {
        asker a = asker_make(r, 0, 5);
        for (int i = 0; i < 5; i++)
            ask_one(&a, i);
        shard_drain(r->s);
        rig_join(r);
        CHECK_INT(r->served, EP_OK);
        ep_time give_up = ep_time_after_ms(ep_now(), 20000);
        while (a.n_answered < 5 && !ep_time_is_past(give_up, ep_now())) {
            net_buf *b;
            while (net_next(a.n, &b) == EP_OK) {
                take_answer(&a, b);
                net_give(a.n, b);
            }
            if (a.n_answered < 5) (void)net_wait(a.n, ep_time_after_ms(ep_now(), 5));
        }
        CHECK_INT(a.n_answered, 5);
        CHECK_INT(a.n_wrong, 0);
    }
    rig_close(r);
}

/* ---- a device that works by itself ----
 * The CPU, late: a pass reads its rows and writes its results when it ends, so buffers that are
 * given away before that, or passes that end in another order, give other bits. */

#define LATE_LOOKS 3 /* before a pass is done */

static struct late {
    compute_stack *stack[COMPUTE_DEPTH];
    compute_ffn_args args[COMPUTE_DEPTH];
    int32_t lists[COMPUTE_DEPTH][3][ROWS_MAX * 64 + 65];
    int at, n, most, looks, n_good; /* n_good: passes before the device is lost */
    bool is_lost_at_begin;
    const uint8_t *pinned;
    size_t pinned_bytes;
    int n_elsewhere; /* rows or results outside of what is pinned */
    ep_status status;
} late;

static void keep_list(const int32_t **list, int32_t *to, int n)
{
    memcpy(to, *list, (size_t)n * sizeof(*to));
    *list = to;
}

static bool is_pinned(const void *p)
{
    return (const uint8_t *)p >= late.pinned &&
           (const uint8_t *)p < late.pinned + late.pinned_bytes;
}

static ep_status late_begin(compute *c, compute_stack *s, const compute_ffn_args *a)
{
    (void)c;
    if (late.n == COMPUTE_DEPTH) return late.status = EP_ERR_INVALID;
    if (late.is_lost_at_begin && late.n_good <= late.n) return EP_ERR_DEVICE;
    int i = (late.at + late.n++) % COMPUTE_DEPTH;
    compute_ffn_args *k = &late.args[i];
    late.stack[i] = s;
    *k = *a;
    keep_list(&k->expert_offset, late.lists[i][0], the_rig.s->store.n_owned + 1);
    keep_list(&k->pair_row, late.lists[i][1], a->n_pairs);
    keep_list(&k->pair_out, late.lists[i][2], a->n_pairs);
    late.n_elsewhere += !is_pinned(a->rows) + !is_pinned(a->out);
    if (late.n > late.most) late.most = late.n;
    return EP_OK;
}

static bool late_is_done(compute *c)
{
    (void)c;
    return ++late.looks % LATE_LOOKS == 0;
}

static ep_status late_end(compute *c)
{
    if (late.n == 0) return late.status = EP_ERR_INVALID;
    int i = late.at;
    late.at = (late.at + 1) % COMPUTE_DEPTH;
    late.n--;
    if (late.n_good-- <= 0) return EP_ERR_DEVICE;
    return compute_ffn(&compute_cpu, c, late.stack[i], &late.args[i]);
}

static ep_status late_pin(compute *c, void *memory, size_t bytes)
{
    (void)c;
    late.pinned = memory;
    late.pinned_bytes = bytes;
    return EP_OK;
}

static void late_unpin(compute *c, void *memory)
{
    (void)c;
    if (memory != late.pinned || late.n > 0) late.status = EP_ERR_INVALID;
    late.pinned = NULL;
}

static const char *failing_why(const compute *c)
{
    (void)c;
    return "device cuda:7: gate_up kernel: out of order";
}

/* The rig's shard gets that device. What is asked before rig_start waits for it together. */
static bool late_rig_make(rig *r, net_script script, int shard_buffers, int n_good)
{
    static compute_ops ops;
    ops = compute_cpu;
    ops.depth = COMPUTE_DEPTH;
    ops.ffn_begin = late_begin;
    ops.ffn_is_done = late_is_done;
    ops.ffn_end = late_end;
    ops.pin = late_pin;
    ops.unpin = late_unpin;
    ops.failure = failing_why;
    memset(&late, 0, sizeof(late));
    late.n_good = n_good;
    return rig_make(r, script, shard_buffers, &ops);
}

/* Two slices are under way at once, over a bad network and with few buffers too. */
static void overlap(void)
{
    rig *r = &the_rig;
    const struct {
        net_script script;
        int buffers;
    } runs[] = {{NULL, 64}, {faults, 64}, {NULL, 4}};
    for (int i = 0; i < 3; i++) {
        if (late_rig_make(r, runs[i].script, runs[i].buffers, INT_MAX)) {
            asker first = asker_make(r, 0, 8), second = asker_make(r, 1, 8);
            for (int j = 0; j < 8; j++)
                ask_one(&first, j);
            CHECK(rig_start(r));
            first.other = &second;
            second.other = &first;
            pthread_t thread;
            CHECK(pthread_create(&thread, NULL, ask_main, &second) == 0);
            ask_all(&first, N_QUESTIONS);
            pthread_join(thread, NULL);
            CHECK_INT(first.n_answered + second.n_answered, 2 * N_QUESTIONS);
            CHECK_INT(first.n_wrong + second.n_wrong, 0);
            shard_stop(r->s);
            rig_join(r);
            if (runs[i].buffers > 4) CHECK_INT(late.most, COMPUTE_DEPTH);
            CHECK_INT(late.n, 0);
            CHECK_INT(late.n_elsewhere, 0);
            CHECK_INT(late.status, EP_OK);
            CHECK(late.pinned == NULL);
        }
        rig_close(r);
    }
}

/* A stop with passes under way: the device is done with the buffers before they go. */
static void stop_under_way(void)
{
    rig *r = &the_rig;
    if (late_rig_make(r, NULL, 64, INT_MAX)) {
        asker a = asker_make(r, 0, 8);
        for (int i = 0; i < 8; i++)
            ask_one(&a, i);
        CHECK(rig_start(r));
        ep_time give_up = ep_time_after_ms(ep_now(), 20000);
        while (a.n_answered == 0 && !ep_time_is_past(give_up, ep_now()))
            take_all(&a);
        shard_stop(r->s);
        rig_join(r);
        CHECK_INT(r->served, EP_OK);
        CHECK_INT(late.n, 0);
        CHECK_INT(late.status, EP_OK);
    }
    rig_close(r);
}

/* The shard refuses what it has, leaves by itself, and says which shard, device and kernel. */
static void lost_device(void)
{
    rig *r = &the_rig;
    for (int at_begin = 0; at_begin < 2; at_begin++) {
        if (late_rig_make(r, NULL, 64, 3)) {
            late.is_lost_at_begin = at_begin;
            CHECK(rig_start(r));
            asker a = asker_make(r, 0, 1);
            CHECK_STR(shard_failure(r->s), "");
            ask_all(&a, 3);
            for (int i = 3; i < 6; i++)
                ask_one(&a, i);
            rig_join(r);
            CHECK_INT(r->served, EP_ERR_DEVICE);
            take_all(&a);
            CHECK_INT(a.n_answered, 3);
            CHECK(a.n_errors > 0 && a.n_wrong == 0);
            CHECK(shard_counters_get(r->s)->errors[WIRE_WHY_DEVICE] > 0);
            CHECK(strstr(shard_failure(r->s), "shard 0, layer ") != NULL);
            CHECK(strstr(shard_failure(r->s), ": device cuda:7: gate_up kernel: ") != NULL);
            CHECK_INT(late.status, EP_OK);
        }
        rig_close(r);
    }
}

static void ticks_and_stop(void)
{
    rig *r = &the_rig;
    if (rig_open(r, NULL, 64)) {
        ep_time begin = ep_now(), give_up = ep_time_after_ms(begin, 10000);
        while (atomic_load(&r->ticks) < 4 && !ep_time_is_past(give_up, ep_now()))
            (void)net_wait(r->nets[0], ep_time_after_ms(ep_now(), 10));
        CHECK(atomic_load(&r->ticks) >= 4);
        /* A wake-up without a message is a tick too. */
        int before = atomic_load(&r->ticks);
        net_wake(r->nets[SHARD_RANK]);
        while (atomic_load(&r->ticks) == before && !ep_time_is_past(give_up, ep_now()))
            (void)net_wait(r->nets[0], ep_time_after_ms(ep_now(), 1));
        shard_stop(r->s);
        rig_join(r);
        CHECK_INT(r->served, EP_OK);
        CHECK(!ep_time_is_past(give_up, ep_now()));
        shard_stop(r->s); /* after the end: nothing */
    }
    rig_close(r);
}

/* A transport whose messages are too small for a reply is refused at once. */
static void small_messages(void)
{
    rig *r = &the_rig;
    if (rig_open(r, NULL, 64)) {
        shard_stop(r->s);
        rig_join(r);
        net_hub *hub = NULL;
        net *n = NULL;
        net_options opt = net_options_default();
        opt.n_ranks = 1;
        opt.max_message = 256;
        CHECK(net_hub_open(&hub, 1, NULL, NULL) == EP_OK);
        CHECK(net_loopback_open(&n, hub, &opt) == EP_OK);
        shard *s = fixture_shard(r->w.m, &r->w.p, 0, 1, ROWS_MAX);
        CHECK(s != NULL);
        if (s != NULL && n != NULL) CHECK_INT(shard_serve(s, n, NULL, NULL), EP_ERR_TOO_LARGE);
        shard_close(s);
        net_close(n);
        net_hub_close(hub);
    }
    rig_close(r);
}

static const test_case cases[] = {
    {"two_routers", two_routers},
    {"bad_network", bad_network},
    {"few_buffers", few_buffers},
    {"router_dies", router_dies},
    {"drain", drain},
    {"overlap", overlap},
    {"stop_under_way", stop_under_way},
    {"lost_device", lost_device},
    {"ticks_and_stop", ticks_and_stop},
    {"small_messages", small_messages},
};

int main(int argc, char **argv)
{
    printf("seed %u\n", FIXTURE_SEED);
    ep_err err = {{0}};
    if (kern_select("auto", &err) != EP_OK) {
        printf("%s\n", err.text);
        return 1;
    }
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
