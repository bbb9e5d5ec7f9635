/*
 * exchange: what happens when messages or shards fail, or numbers are not finite. Whatever can be
 * answered is answered with the bits of the plainest job; the rest fails by name and in time.
 */
#include "tests/unit/engine_fixture.h"

#include <stdatomic.h>
#include <unistd.h>

/* ---- faults -------------------------------------------------------------------------------------
 */

typedef enum fault_kind { LOSE, DUPLICATE, DELAY, TRUNCATE, CORRUPT } fault_kind;

typedef struct fault_script {
    fault_kind kind;
    int every;
    atomic_int n_slices, n_replies; /* messages hurt */
} fault_script;

static net_fault hurt(void *arg, int from, int to, uint64_t i, const void *msg, size_t len)
{
    fault_script *f = arg;
    net_fault fault = {0};
    (void)to, (void)msg;
    if (mix(i * 2 + (uint64_t)from) % (uint64_t)f->every != 0) return fault;
    atomic_fetch_add(from == 0 ? &f->n_slices : &f->n_replies, 1);
    switch (f->kind) {
    case LOSE:
        fault.lose = true;
        break;
    case DUPLICATE:
        fault.duplicates = 2;
        break;
    case DELAY:
        fault.delay_ms = 120;
        break;
    case TRUNCATE:
        fault.truncate_to = i % 2 == 0 ? len / 2 : 40;
        break;
    case CORRUPT:
        fault.corrupt = true;
        break;
    }
    return fault;
}

static void test_faults(void)
{
    static const struct {
        const char *name;
        fault_kind kind;
        int every;
    } kinds[] = {{"lost", LOSE, 12},
                 {"duplicated", DUPLICATE, 3},
                 {"late", DELAY, 60},
                 {"truncated", TRUNCATE, 25},
                 {"corrupted", CORRUPT, 10}};
    cluster *reference = reference_of(micro);
    for (size_t i = 0; reference != NULL && i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        fault_script f = {.kind = kinds[i].kind, .every = kinds[i].every};
        cluster_options o = plain(micro);
        o.n_shards = 3;
        o.router.max_sequences = 16;
        o.router.prefill_chunk = 7;
        /* Only what is lost or late needs the clock; the rest is seen when it arrives. */
        o.router.per_layer_ms = kinds[i].kind == LOSE || kinds[i].kind == DELAY ? 60 : 600000;
        o.router.layer_tries = 200; /* a slow machine must not turn a fault into a loss */
        o.script = hurt;
        o.script_arg = &f;
        cluster *c = run(&o, N_REQUESTS);
        if (c == NULL) break;
        check_same(reference, c, N_REQUESTS, micro->shape.vocab, kinds[i].name);
        const router_counters *k = router_counters_get(cluster_router(c, 0));
        router_layer_counters sum = layer_sum(k);
        printf(
            "    %s: %d slices and %d replies hurt; %d sent again, late %d, bad %d, refused %d\n",
            kinds[i].name, f.n_slices, f.n_replies, (int)sum.resent, (int)k->late_replies,
            (int)k->bad_replies, (int)k->error_replies);
        CHECK(f.n_slices > 0 && f.n_replies > 0);
        switch (kinds[i].kind) {
        case LOSE:
            CHECK((int)sum.resent >= f.n_slices);
            break;
        case DUPLICATE:
            CHECK(k->late_replies > 0);
            break;
        case DELAY:
            CHECK(sum.resent > 0);
            break;
        case TRUNCATE: /* fall through */
        case CORRUPT:
            CHECK(k->bad_replies > 0 && k->error_replies > 0 && sum.resent > 0);
            break;
        }
        cluster_close(c);
    }
    cluster_close(reference);
}

/* Slices of one row each over the least number of buffers, and over few that leave some to hold:
 * the transport never runs dry. */
static void test_few_buffers(void)
{
    cluster *reference = reference_of(micro);
    for (int n = 4; reference != NULL && n <= 12; n += 8) {
        cluster_options o = plain(micro);
        o.n_shards = n / 4 + 1;
        o.n_buffers = n;
        o.max_message =
            wire_reply_bytes((uint32_t)micro->shape.hidden, (uint32_t)micro->shape.top_k);
        o.router.max_sequences = 16;
        o.router.max_tokens_per_step = o.router.prefill_chunk = 128;
        o.router.per_layer_ms = 600000;
        cluster *c = run(&o, N_REQUESTS);
        if (c == NULL) break;
        check_same(reference, c, N_REQUESTS, micro->shape.vocab, "few buffers");
        cluster_close(c);
    }
    cluster_close(reference);
}

/* A shard dies: what needs it fails by name long before the deadline; what does not goes on. */
static void test_dead_shard(void)
{
    cluster_options o = plain(micro);
    o.n_shards = 2;
    o.router.max_sequences = 16;
    o.router.per_layer_ms = 400; /* the living shard must not seem dead on a busy machine */
    o.router.layer_tries = 2;
    cluster *c = start(&o);
    if (c == NULL) return;
    int32_t prompt[MAX_PROMPT];
    submit(c, request_of(0, micro->shape.vocab, prompt));
    CHECK_INT(cluster_run(c), EP_OK);
    CHECK(cluster_answer(c, 0)->done);
    net_hub_kill(cluster_hub(c), cluster_shard_rank(c, 1));
    ep_time deadline = ep_time_after_ms(ep_now(), 60000);
    for (uint64_t i = 1; i < 4; i++) {
        router_request q = request_of(i, micro->shape.vocab, prompt);
        q.deadline = deadline;
        submit(c, q);
    }
    CHECK_INT(cluster_run(c), EP_OK);
    for (uint64_t i = 1; i < 4; i++) {
        const answer *a = cluster_answer(c, i);
        CHECK(a->failed && !a->done);
        CHECK_INT(a->status, EP_ERR_PEER_LOST);
        CHECK(has(a->text, "shard 1 (rank 2)") && has(a->text, "layer "));
        CHECK(!ep_time_is_past(deadline, a->ended));
    }
    CHECK_INT(router_load(cluster_router(c, 0)), 0);
    const router_counters *k = router_counters_get(cluster_router(c, 0));
    CHECK_INT(k->kv_pages_free, k->kv_pages);
    cluster_close(c);
}

/* A copy of micro in which the first element decides: tokens 0 have it large and take expert 0,
 * tokens 1 the opposite and take expert 9 (with top_k 1). */
static model *open_two_camps(uint8_t **bytes)
{
    size_t hidden = (size_t)micro->shape.hidden;
    *bytes = malloc(micro_n);
    if (*bytes == NULL) return NULL;
    memcpy(*bytes, micro_bytes, micro_n);
    for (int i = 0; i < micro->shape.n_layers; i++) {
        const model_tensor *t = micro->layers[i].gate_inp;
        float *gate = (float *)(void *)(*bytes + (t->data - micro_bytes));
        memset(gate, 0, t->bytes);
        gate[0] = 10.0f;
        gate[9 * hidden] = -10.0f;
    }
    float *embd = (float *)(void *)(*bytes + (micro->token_embd->data - micro_bytes));
    embd[0] = 1000.0f;
    embd[hidden] = -1000.0f;
    return cluster_open_model(*bytes, micro_n);
}

/* In one batch, requests that need the dead shard fail and the others do not notice. */
static void test_dead_shard_beside(void)
{
    uint8_t *bytes;
    model *m = open_two_camps(&bytes);
    CHECK(m != NULL);
    if (m == NULL) return;
    static const int32_t camps[] = {0, 0, 0, 1, 1, 1};
    cluster *c[2];
    for (int is_dead = 0; is_dead < 2; is_dead++) {
        cluster_options o = plain(m);
        o.n_shards = 2;
        o.router.top_k = 1;
        o.router.max_sequences = 16;
        o.router.per_layer_ms = 400; /* the living shard must not seem dead on a busy machine */
        o.router.layer_tries = is_dead ? 2 : 200;
        c[is_dead] = start(&o);
        if (c[is_dead] == NULL) return;
        if (is_dead) net_hub_kill(cluster_hub(c[1]), cluster_shard_rank(c[1], 1));
        for (uint64_t i = 0; i < 6; i++)
            submit(c[is_dead], cluster_request(i, i % 2 ? camps + 3 : camps, 1 + (int)(i / 2), 1));
        CHECK_INT(cluster_run(c[is_dead]), EP_OK);
    }
    for (uint64_t i = 0; i < 6; i++) {
        const answer *a = cluster_answer(c[1], i);
        CHECK(cluster_answer(c[0], i)->done);
        if (i % 2 == 0)
            CHECK(is_same(cluster_answer(c[0], i), a, m->shape.vocab));
        else
            CHECK(a->status == EP_ERR_PEER_LOST && has(a->text, "layer 0: shard 1 (rank 2)"));
    }
    CHECK_INT(router_counters_get(cluster_router(c[1], 0))->steps, 1);
    cluster_close(c[0]), cluster_close(c[1]);
    model_close(m);
    free(bytes);
}

static net_fault lose_while(void *arg, int from, int to, uint64_t i, const void *msg, size_t len)
{
    (void)from, (void)to, (void)i, (void)msg, (void)len;
    return (net_fault){.lose = atomic_load((atomic_bool *)arg)};
}

/* Silence is not death: after a pause the shard is asked again and serves. */
static void test_silent_shard_returns(void)
{
    atomic_bool is_silent = true;
    cluster *reference = reference_of(micro);
    cluster_options o = plain(micro);
    o.router.per_layer_ms = 20;
    o.router.layer_tries = 2;
    o.script = lose_while;
    o.script_arg = &is_silent;
    cluster *c = start(&o);
    if (c == NULL || reference == NULL) return;
    int32_t prompt[MAX_PROMPT];
    router_request q = request_of(3, micro->shape.vocab, prompt);
    q.id = 100;
    submit(c, q);
    q.id = 101;
    submit(c, q);
    CHECK_INT(cluster_run(c), EP_OK);
    CHECK(has(cluster_answer(c, 100)->text, "did not answer 2 sends, each within 20 ms"));
    CHECK_INT(cluster_answer(c, 101)->status, EP_ERR_PEER_LOST);
    atomic_store(&is_silent, false);
    usleep(100 * 1000);
    /* per_layer_ms is short for a busy machine: late answers must not fail the test */
    bool is_done = false;
    for (int i = 0; i < 50 && !is_done; i++) {
        q.id = 200 + (uint64_t)i;
        submit(c, q);
        CHECK_INT(cluster_run(c), EP_OK);
        is_done = cluster_answer(c, q.id)->done;
        if (!is_done) usleep(100 * 1000);
    }
    CHECK(is_done &&
          is_same(cluster_answer(reference, 3), cluster_answer(c, q.id), micro->shape.vocab));
    cluster_close(c), cluster_close(reference);
}

/* A copy of micro with the gates zero: all scores equal, so every token takes experts 0, 1, .. */
static model *open_zero_gate(uint8_t **bytes)
{
    *bytes = malloc(micro_n);
    if (*bytes == NULL) return NULL;
    memcpy(*bytes, micro_bytes, micro_n);
    for (int i = 0; i < micro->shape.n_layers; i++) {
        const model_tensor *t = micro->layers[i].gate_inp;
        memset(*bytes + (t->data - micro_bytes), 0, t->bytes);
    }
    return cluster_open_model(*bytes, micro_n);
}

static void test_one_expert(void)
{
    static const char *const behind[] = {"1-4", "5-9", "0"};
    static const char *const first_three[] = {"0-2", "3-9"};
    uint8_t *bytes;
    model *m = open_zero_gate(&bytes);
    CHECK(m != NULL);
    if (m == NULL) return;
    cluster_options o = plain(m);
    o.router.top_k = 1;
    cluster *reference = run(&o, N_REQUESTS);
    o.n_shards = 3;
    o.router.max_sequences = 16;
    cluster *even = run(&o, N_REQUESTS);
    o.experts = behind;
    cluster *moved = run(&o, N_REQUESTS);
    check_same(reference, even, N_REQUESTS, m->shape.vocab, "even");
    check_same(reference, moved, N_REQUESTS, m->shape.vocab, "moved");
    const router_counters *k = router_counters_get(cluster_router(moved, 0));
    for (int i = 0; i < k->n_layers * k->n_experts; i++)
        CHECK((k->expert_rows[i] > 0) == (i % k->n_experts == 0));
    CHECK(k->shard_slices[0] == 0 && k->shard_slices[1] == 0 && k->shard_slices[2] > 0);
    cluster_close(moved), cluster_close(even), cluster_close(reference);

    /* The death of a shard nobody needs is not noticed. */
    o = plain(m);
    reference = run(&o, N_REQUESTS);
    o.n_shards = 2;
    o.experts = first_three;
    cluster *c = start(&o);
    if (c != NULL) {
        net_hub_kill(cluster_hub(c), cluster_shard_rank(c, 1));
        submit_all(c, m, N_REQUESTS);
        CHECK_INT(cluster_run(c), EP_OK);
        check_same(reference, c, N_REQUESTS, m->shape.vocab, "dead but not needed");
    }
    cluster_close(c), cluster_close(reference);
    model_close(m);
    free(bytes);
}

/* The deadline ends the wait for a shard, whatever the wait for a layer allows. */
static void test_deadline_in_a_wait(void)
{
    cluster_options o = plain(micro);
    o.router.per_layer_ms = 600000;
    cluster *c = start(&o);
    if (c == NULL) return;
    net_hub_kill(cluster_hub(c), cluster_shard_rank(c, 0));
    int32_t prompt[MAX_PROMPT];
    router_request q = request_of(3, micro->shape.vocab, prompt);
    ep_time begun = ep_now();
    q.deadline = ep_time_after_ms(begun, 100);
    submit(c, q);
    CHECK_INT(cluster_run(c), EP_OK);
    const answer *a = cluster_answer(c, 3);
    CHECK_INT(a->status, EP_ERR_DEADLINE);
    CHECK(has(a->text, "layer 0 waited for shard 0 (rank 1)"));
    CHECK(ep_time_is_past(q.deadline, a->ended));
    CHECK(ep_time_diff_ns(a->ended, begun) < (int64_t)60000 * 1000000);
    cluster_close(c);
}

static cluster *lost_cluster;
static void say_lost(void *arg)
{
    (void)arg;
    router_shard_lost(cluster_router(lost_cluster, 0), 0);
}

/* The control plane knows first: its word ends the wait. */
static void test_told_that_a_shard_is_lost(void)
{
    cluster_options o = plain(micro);
    o.router.per_layer_ms = 600000;
    o.router.tick = say_lost;
    cluster *c = start(&o);
    if (c == NULL) return;
    lost_cluster = c;
    net_hub_kill(cluster_hub(c), cluster_shard_rank(c, 0));
    submit_all(c, micro, 2);
    CHECK_INT(cluster_run(c), EP_OK);
    for (uint64_t i = 0; i < 2; i++) {
        CHECK_INT(cluster_answer(c, i)->status, EP_ERR_PEER_LOST);
        CHECK(has(cluster_answer(c, i)->text, "layer 0: shard 0 (rank 1) is lost"));
    }
    cluster_close(c);
}

/* ---- rows that are not finite -------------------------------------------------------------------
 */

static void test_nan_row(void)
{
    int32_t poison = micro->shape.vocab - 1;
    cluster *reference = reference_of(micro);
    uint8_t *bytes = malloc(micro_n);
    if (bytes == NULL || reference == NULL) return;
    memcpy(bytes, micro_bytes, micro_n);
    size_t at = (size_t)(micro->token_embd->data - micro_bytes);
    CHECK_INT(micro->token_embd->type, KERN_F32);
    float nan_value = NAN;
    memcpy(bytes + at + ((size_t)poison * (size_t)micro->shape.hidden + 5) * sizeof(float),
           &nan_value, sizeof(float));
    model *m = cluster_open_model(bytes, micro_n);
    CHECK(m != NULL);
    cluster_options o = plain(m != NULL ? m : micro);
    o.n_shards = 2;
    o.router.max_sequences = 32;
    o.router.prefill_chunk = 7;
    cluster *c = start(&o);
    if (c != NULL) {
        int32_t bad[] = {1, 2, 3, 4, 5, 6, 7, 8, poison, 9};
        submit(c, cluster_request(1000, bad, 10, 5));
        submit_all(c, m, N_REQUESTS);
        submit(c, cluster_request(1001, bad + 8, 1, 5));
        CHECK_INT(cluster_run(c), EP_OK);
        for (uint64_t i = 1000; i < 1002; i++) {
            CHECK_INT(cluster_answer(c, i)->status, EP_ERR_INVALID);
            CHECK(has(cluster_answer(c, i)->text, "not finite") &&
                  has(cluster_answer(c, i)->text, "layer 0"));
        }
        CHECK(has(cluster_answer(c, 1000)->text, "position 8"));
        check_same(reference, c, N_REQUESTS, micro->shape.vocab, "beside a NaN");
        CHECK_INT(router_counters_get(cluster_router(c, 0))->non_finite_rows, 2);
    }
    cluster_close(c), cluster_close(reference);
    model_close(m);
    free(bytes);
}

/* Logits that are not finite fail the request as well. */
static void test_infinite_logit(void)
{
    uint8_t *bytes = malloc(micro_n);
    if (bytes == NULL) return;
    memcpy(bytes, micro_bytes, micro_n);
    float big = INFINITY;
    memcpy(bytes + (micro->output->data - micro_bytes), &big, sizeof(big));
    model *m = cluster_open_model(bytes, micro_n);
    CHECK(m != NULL && m->output->type == KERN_F32);
    cluster_options o = plain(m != NULL ? m : micro);
    cluster *c = run(&o, 2);
    if (c != NULL) {
        CHECK_INT(cluster_answer(c, 1)->status, EP_ERR_INVALID);
        CHECK(has(cluster_answer(c, 1)->text, "position 69: the logits"));
    }
    cluster_close(c);
    model_close(m);
    free(bytes);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"faults", test_faults},
        {"few_buffers", test_few_buffers},
        {"dead_shard", test_dead_shard},
        {"dead_shard_beside", test_dead_shard_beside},
        {"silent_shard_returns", test_silent_shard_returns},
        {"one_expert", test_one_expert},
        {"deadline_in_a_wait", test_deadline_in_a_wait},
        {"told_that_a_shard_is_lost", test_told_that_a_shard_is_lost},
        {"nan_row", test_nan_row},
        {"infinite_logit", test_infinite_logit},
    };
    if (!open_micro()) return 1;
    int rc = test_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
    close_micro();
    return rc;
}
