/*
 * engine: what requests answer, over loopback. Tokens and every bit of the logits are compared with
 * the plainest job, over shards, placements, batches, chunks, threads and instruction sets; then
 * the life of a request, router_forward, and opening. Message faults: test_exchange.c.
 */
#include "tests/unit/engine_fixture.h"

/* ---- bits ---------------------------------------------------------------------------------------
 */

typedef struct variant {
    const char *name;
    int routers, shards, sequences, chunk, rows, router_threads, shard_threads;
    bool one_row_messages;
    const char *experts[5];
} variant;

static void run_variant(const model *m, const cluster *reference, const variant *v)
{
    cluster_options o = plain(m);
    o.n_routers = v->routers;
    o.n_shards = v->shards;
    o.experts = v->experts[0] != NULL ? v->experts : NULL;
    o.router.max_sequences = v->sequences;
    o.router.prefill_chunk = v->chunk;
    o.router.max_tokens_per_step = v->rows;
    o.router_threads = v->router_threads;
    o.shard_threads = v->shard_threads;
    if (v->one_row_messages)
        o.max_message = wire_reply_bytes((uint32_t)m->shape.hidden, (uint32_t)m->shape.top_k);
    cluster *c = run(&o, N_REQUESTS);
    if (c == NULL) return;
    check_same(reference, c, N_REQUESTS, m->shape.vocab, v->name);
    const router_counters *k = router_counters_get(cluster_router(c, 0));
    router_layer_counters sum = layer_sum(k);
    CHECK(sum.slices > 0 && sum.rows > 0 && (!v->one_row_messages || sum.slices == sum.rows));
    CHECK_INT(sum.resent + k->bad_replies + k->late_replies + k->error_replies, 0);
    CHECK_INT(k->kv_pages_free, k->kv_pages);
    CHECK_INT(router_load(cluster_router(c, 0)), 0);
    cluster_close(c);
}

static const variant variants[] = {
    {"batch 4", 1, 1, 4, 0, 64, 1, 1, false, {NULL}},
    {"batch 16", 1, 1, 16, 0, 64, 1, 1, false, {NULL}},
    {"chunk 1", 1, 1, 4, 1, 64, 1, 1, false, {NULL}},
    {"chunk 7", 1, 1, 16, 7, 64, 1, 1, false, {NULL}},
    {"5 rows a step", 1, 2, 16, 0, 5, 1, 1, false, {NULL}},
    {"2 shards", 1, 2, 4, 64, 64, 1, 1, false, {NULL}},
    {"3 shards", 1, 3, 16, 7, 64, 1, 2, false, {NULL}},
    {"5 shards", 1, 5, 1, 64, 64, 1, 1, false, {NULL}},
    {"uneven", 1, 3, 16, 0, 64, 1, 1, false, {"0", "1-8", "9"}},
    {"scattered", 1, 2, 16, 7, 64, 1, 1, false, {"0,2,4,6,8", "1,3,5,7,9"}},
    {"an empty shard", 1, 3, 16, 7, 64, 1, 1, false, {"5-9", "", "0-4"}},
    {"2 threads", 1, 2, 16, 7, 64, 2, 2, false, {NULL}},
    {"2 routers", 2, 3, 4, 7, 64, 1, 1, false, {NULL}},
    {"2 routers, 2 threads", 2, 5, 16, 1, 64, 2, 1, false, {NULL}},
    {"a row a message", 1, 3, 16, 0, 64, 1, 1, true, {NULL}},
};

static void test_bits(void)
{
    cluster *reference = reference_of(micro);
    if (reference == NULL) return;
    printf("    seed %llu\n", (unsigned long long)seed);
    for (size_t i = 0; i < sizeof(variants) / sizeof(variants[0]); i++)
        run_variant(micro, reference, &variants[i]);
    cluster_close(reference);
}

/* The same over a file of K-quants, where rows travel as integers. */
static void test_bits_q4_k_m(void)
{
    static const variant some[] = {
        {"batch 16", 1, 1, 16, 0, 64, 1, 1, false, {NULL}},
        {"3 shards", 1, 3, 16, 7, 64, 2, 1, false, {NULL}},
        {"2 routers", 2, 2, 4, 1, 64, 1, 2, false, {"0,15", "1-14"}},
        {"a row a message", 1, 2, 16, 0, 64, 1, 1, true, {NULL}},
    };
    ep_err err;
    model *m;
    const char *path = cluster_source_path("deploy/demo/tinymoe-q4_k_m.gguf");
    if (model_open(&m, path, &err) != EP_OK) {
        printf("    %s\n", err.text);
        CHECK(!"the shipped model opens");
        return;
    }
    cluster *reference = reference_of(m);
    for (size_t i = 0; reference != NULL && i < sizeof(some) / sizeof(some[0]); i++)
        run_variant(m, reference, &some[i]);
    cluster_close(reference);
    model_close(m);
}

/* Every instruction set of this machine gives the bits of the one chosen by itself. */
static void test_bits_of_instruction_sets(void)
{
    static const char *const levels[] = {"scalar", "avx2", "avx512", "amx"};
    static const char *const files[] = {"tests/golden/micro-f32.gguf",
                                        "deploy/demo/tinymoe-q4_k_m.gguf"};
    ep_err err;
    if (getenv("MOED_KERNELS") != NULL) {
        test_skip("MOED_KERNELS chooses the instruction set");
        return;
    }
    for (int f = 0; f < 2; f++) {
        model *m;
        CHECK_INT(model_open(&m, cluster_source_path(files[f]), &err), EP_OK);
        cluster_options o = plain(m);
        o.router.max_sequences = 4;
        o.router.per_layer_ms = 600000; /* scalar code under a sanitizer takes its time */
        cluster *reference = run(&o, 4);
        for (int i = 0; i < 4 && reference != NULL; i++) {
            if (!kern_has_level(levels[i])) {
                printf("    this machine has no %s\n", levels[i]);
                continue;
            }
            CHECK_INT(kern_select(levels[i], &err), EP_OK);
            cluster *c = run(&o, 4);
            if (c != NULL) check_same(reference, c, 4, m->shape.vocab, levels[i]);
            cluster_close(c);
            CHECK_INT(kern_select("auto", &err), EP_OK);
        }
        cluster_close(reference);
        model_close(m);
    }
}

/* A request's answer does not change when it is continued from what was sent so far (replay). */
static void test_replay(void)
{
    cluster_options o = plain(micro);
    cluster *c = start(&o);
    if (c == NULL) return;
    int32_t prompt[MAX_PROMPT + 8];
    router_request q = request_of(5, micro->shape.vocab, prompt); /* sampled */
    CHECK(q.sampling.temperature > 0);
    q.max_tokens = 6;
    submit(c, q);
    CHECK_INT(cluster_run(c), EP_OK);
    const answer *a = cluster_answer(c, 5);
    for (int i = 0; i < 2; i++)
        prompt[q.n_prompt++] = a->tokens[i];
    q.id = 6;
    q.max_tokens = 4;
    submit(c, q);
    CHECK_INT(cluster_run(c), EP_OK);
    const answer *b = cluster_answer(c, 6);
    CHECK_INT(b->n_tokens, 4);
    CHECK(memcmp(b->tokens, a->tokens + 2, 4 * sizeof(int32_t)) == 0);
    cluster_close(c);
}

/* ---- requests -----------------------------------------------------------------------------------
 */

/* Late replies take no memory either. */
static net_fault twice(void *arg, int from, int to, uint64_t i, const void *msg, size_t len)
{
    (void)arg, (void)from, (void)to, (void)msg, (void)len;
    return (net_fault){.duplicates = i % 3 == 0};
}

static void test_no_allocation(void)
{
    cluster_options o = plain(micro);
    o.keep_logits = false;
    o.n_shards = 2;
    o.router.max_sequences = 16;
    o.router.prefill_chunk = 7;
    o.router_threads = 2;
    o.script = twice;
    cluster *c = start(&o);
    if (c == NULL) return;
    int32_t prompt[MAX_PROMPT];
    submit(c, request_of(0, micro->shape.vocab, prompt));
    CHECK_INT(cluster_run(c), EP_OK);
    for (uint64_t i = 1; i < N_REQUESTS; i++)
        submit(c, request_of(i, micro->shape.vocab, prompt));
    uint64_t before = ep_alloc_count();
    CHECK_INT(cluster_run(c), EP_OK);
    CHECK_INT(ep_alloc_count() - before, 0);
    CHECK(router_counters_get(cluster_router(c, 0))->steps > 10);
    cluster_close(c);
}

static void test_cancel(void)
{
    cluster *reference = reference_of(micro);
    cluster_options o = plain(micro);
    o.router.max_sequences = 3;
    cluster *c = start(&o);
    if (c == NULL || reference == NULL) return;
    submit_all(c, micro, 5);
    router *r = cluster_router(c, 0);
    CHECK_INT(router_step(r), EP_OK);
    CHECK_INT(router_step(r), EP_OK);
    router_cancel(r, 2); /* running */
    router_cancel(r, 4); /* waiting */
    router_cancel(r, 99);
    CHECK_INT(cluster_run(c), EP_OK);
    for (uint64_t i = 0; i < 5; i++) {
        const answer *a = cluster_answer(c, i);
        bool is_cancelled = i == 2 || i == 4;
        CHECK(a->failed == is_cancelled && a->done == !is_cancelled);
        if (is_cancelled) CHECK_INT(a->status, EP_ERR_CANCELED);
        if (!is_cancelled) CHECK(is_same(cluster_answer(reference, i), a, micro->shape.vocab));
    }
    const router_counters *k = router_counters_get(r);
    CHECK_INT(k->kv_pages_free, k->kv_pages);
    cluster_close(c), cluster_close(reference);
}

/* Memory for few: the others wait their turn, in order, and all finish with the same bits. */
static void test_kv_exhaustion(void)
{
    cluster *reference = reference_of(micro);
    cluster_options o = plain(micro);
    o.router.max_sequences = 16;
    o.router.kv_tokens = 96;
    cluster *c = run(&o, N_REQUESTS);
    if (c == NULL || reference == NULL) return;
    check_same(reference, c, N_REQUESTS, micro->shape.vocab, "96 positions");
    const router_counters *k = router_counters_get(cluster_router(c, 0));
    CHECK_INT(k->kv_pages, 6);
    CHECK_INT(k->kv_pages_free, 6);
    ep_err err;
    int32_t prompt[100] = {0};
    router_request q = cluster_request(500, prompt, 97, 0);
    CHECK_INT(router_submit(cluster_router(c, 0), &q, &err), EP_ERR_INVALID);
    CHECK(has(err.text, "do not fit in the 96 positions"));
    cluster_close(c), cluster_close(reference);
}

static void test_turns(void)
{
    enum { N = 5 };
    cluster_options o = plain(micro);
    o.keep_logits = false;
    o.router.max_sequences = N;
    o.router.max_tokens_per_step = 2;
    cluster *c = start(&o);
    if (c == NULL) return;
    int32_t prompt[] = {3, 4, 5};
    for (uint64_t i = 0; i < N; i++) {
        router_request q = cluster_request(i, prompt, 3, 12);
        q.ignore_end = true;
        submit(c, q);
    }
    router *r = cluster_router(c, 0);
    int least = 0, most = 0;
    for (int step = 0; step < 10000 && most < 12; step++) {
        if (router_step(r) != EP_OK) break;
        least = 1000, most = 0;
        for (uint64_t i = 0; i < N; i++) {
            int n = cluster_answer(c, i)->n_tokens;
            least = n < least ? n : least, most = n > most ? n : most;
        }
    }
    CHECK_INT(most, 12);
    CHECK(least >= 6); /* nobody is left behind */
    CHECK_INT(cluster_run(c), EP_OK);
    for (uint64_t i = 0; i < N; i++) /* the same prompt: the same answer */
        CHECK(memcmp(cluster_answer(c, i)->tokens, cluster_answer(c, 0)->tokens, 12 * 4) == 0);
    cluster_close(c);
}

static void test_refused(void)
{
    cluster_options o = plain(micro);
    o.router.max_waiting = 2;
    cluster *c = start(&o);
    if (c == NULL) return;
    router *r = cluster_router(c, 0);
    ep_err err;
    int vocab = micro->shape.vocab, context = micro->shape.context;
    int32_t prompt[4] = {1, 2, 3, vocab};
    router_request good = cluster_request(1, prompt, 3, 4), q = good;
    q.n_prompt = 4;
    CHECK_INT(router_submit(r, &q, &err), EP_ERR_INVALID);
    CHECK(has(err.text, "prompt token 3 is "));
    q = good, q.n_prompt = 0;
    CHECK_INT(router_submit(r, &q, &err), EP_ERR_INVALID);
    q = good, q.max_tokens = context - 1;
    CHECK_INT(router_submit(r, &q, &err), EP_ERR_INVALID);
    CHECK(has(err.text, "context"));
    q = good, q.max_tokens = -1;
    CHECK_INT(router_submit(r, &q, &err), EP_ERR_INVALID);
    q = good, q.max_tokens = INT32_MAX;
    CHECK_INT(router_submit(r, &q, &err), EP_ERR_INVALID);
    q = good, q.n_logprobs = 21;
    CHECK_INT(router_submit(r, &q, &err), EP_ERR_INVALID);
    q = good, q.sampling.top_p = 2.0f;
    CHECK_INT(router_submit(r, &q, &err), EP_ERR_INVALID);
    CHECK_INT(router_load(r), 0);
    CHECK_INT(router_step(r), EP_AGAIN);
    for (uint64_t i = 1; i <= 2; i++) {
        q = good, q.id = i;
        q.deadline = (ep_time){1}; /* long past */
        submit(c, q);
    }
    q = good, q.id = 3;
    CHECK_INT(router_submit(r, &q, &err), EP_ERR_BUSY);
    CHECK_INT(cluster_run(c), EP_OK);
    CHECK_INT(cluster_answer(c, 2)->status, EP_ERR_DEADLINE);
    CHECK(has(cluster_answer(c, 2)->text, "before it could start"));
    cluster_close(c);
}

static void test_end_token(void)
{
    int32_t prompt[MAX_PROMPT];
    router_request q = request_of(4, micro->shape.vocab, prompt);
    cluster_options o = plain(micro);
    cluster *c = start(&o);
    if (c == NULL) return;
    submit(c, q);
    CHECK_INT(cluster_run(c), EP_OK);
    int32_t ends[] = {-5, cluster_answer(c, 4)->tokens[2]};
    int first = 2;
    while (first > 0 && cluster_answer(c, 4)->tokens[first - 1] == ends[1])
        first--;
    cluster_close(c);
    o.router.end_ids = ends;
    o.router.n_end_ids = 2;
    c = start(&o);
    if (c == NULL) return;
    submit(c, q);
    q.id = 40;
    q.ignore_end = false;
    submit(c, q);
    CHECK_INT(cluster_run(c), EP_OK);
    CHECK_INT(cluster_answer(c, 4)->finish, ROUTER_FINISH_LENGTH);
    CHECK_INT(cluster_answer(c, 4)->n_tokens, q.max_tokens);
    CHECK_INT(cluster_answer(c, 40)->finish, ROUTER_FINISH_STOP);
    CHECK_INT(cluster_answer(c, 40)->n_tokens, first + 1);
    cluster_close(c);
}

/* Scores are the same in one chunk and in many, and are those of the logits. */
static void test_scores(void)
{
    int32_t prompt[MAX_PROMPT];
    router_request q = request_of(1, micro->shape.vocab, prompt);
    q.max_tokens = 0;
    q.score_from = 1;
    double first[MAX_PROMPT] = {0};
    for (int chunk = 0; chunk < 2; chunk++) {
        cluster_options o = plain(micro);
        o.router.prefill_chunk = chunk == 0 ? 0 : 3;
        cluster *c = start(&o);
        if (c == NULL) return;
        submit(c, q);
        CHECK_INT(cluster_run(c), EP_OK);
        const answer *a = cluster_answer(c, 1);
        CHECK(a->done && a->n_tokens == 0);
        CHECK_INT(a->n_scores, MAX_PROMPT - 1);
        for (int t = 1; t < MAX_PROMPT; t++) {
            const float *logits = a->logits + (size_t)(t - 1) * (size_t)micro->shape.vocab;
            double top = -INFINITY, sum = 0;
            for (int i = 0; i < micro->shape.vocab; i++)
                top = fmax(top, (double)logits[i]);
            for (int i = 0; i < micro->shape.vocab; i++)
                sum += exp((double)logits[i] - top);
            CHECK_INT(a->logit_positions[t - 1], t - 1);
            CHECK(fabs(a->scores[t] - ((double)logits[prompt[t]] - top - log(sum))) < 1e-5);
            if (chunk == 0) first[t] = a->scores[t];
            CHECK(a->scores[t] == first[t]);
        }
        cluster_close(c);
    }
}

/* ---- one layer ----------------------------------------------------------------------------------
 */

static void test_forward(void)
{
    enum { ROWS = 150 };
    size_t hidden = (size_t)micro->shape.hidden, k = (size_t)micro->shape.top_k;
    float *x = calloc(ROWS * hidden, sizeof(float)), *y[3] = {NULL};
    int32_t *experts = calloc(ROWS * k, sizeof(int32_t));
    float *weights = calloc(ROWS * k, sizeof(float));
    for (size_t i = 0; i < ROWS * hidden; i++)
        x[i] = (float)(mix(seed + i) % 2001) / 1000.0f - 1.0f;
    ep_err err = {""};
    for (int run_i = 0; run_i < 3; run_i++) {
        cluster_options o = plain(micro);
        o.n_shards = run_i == 0 ? 1 : 3;
        cluster *c = start(&o);
        if (c == NULL) return;
        router *r = cluster_router(c, 0);
        y[run_i] = calloc(ROWS * hidden, sizeof(float));
        if (run_i < 2) {
            CHECK_INT(router_forward(r, 1, x, ROWS, y[run_i], experts, weights, &err), EP_OK);
        } else { /* row by row */
            for (size_t i = 0; i < ROWS; i++)
                CHECK_INT(
                    router_forward(r, 1, x + i * hidden, 1, y[2] + i * hidden, NULL, NULL, &err),
                    EP_OK);
            CHECK_INT(router_forward(r, 3, x, 1, y[2], NULL, NULL, &err), EP_ERR_INVALID);
            CHECK_INT(router_forward(r, 0, x, 0, y[2], NULL, NULL, &err), EP_OK);
            x[77 * hidden] = NAN;
            float *other = calloc(ROWS * hidden, sizeof(float));
            CHECK_INT(router_forward(r, 0, x, ROWS, other, NULL, NULL, &err), EP_ERR_INVALID);
            CHECK(has(err.text, "layer 0, position 77"));
            free(other);
        }
        CHECK(memcmp(y[0], y[run_i], ROWS * hidden * sizeof(float)) == 0);
        cluster_close(c);
    }
    double size = 0;
    for (size_t i = 0; i < ROWS * hidden; i++)
        size = fmax(size, fabs((double)y[0][i]));
    CHECK(size > 1e-3);
    for (size_t i = 0; i < ROWS; i++) {
        double sum = 0;
        for (size_t slot = 0; slot < k; slot++) {
            sum += (double)weights[i * k + slot];
            CHECK(experts[i * k + slot] >= 0 && experts[i * k + slot] < micro->shape.n_experts);
        }
        CHECK(fabs(sum - 1.0) < 1e-5);
    }
    for (int i = 0; i < 3; i++)
        free(y[i]);
    free(x), free(experts), free(weights);
}

/* ---- opening ------------------------------------------------------------------------------------
 */

static void no_event(void *arg, const router_event *e)
{
    (void)arg, (void)e;
}

static void test_open(void)
{
    ep_err err;
    net_hub *hub;
    net *n;
    model_placement where;
    CHECK_INT(net_hub_open(&hub, 3, NULL, NULL), EP_OK);
    net_options no = net_options_default();
    no.rank = 0, no.n_ranks = 3, no.max_message = 65536, no.n_buffers = 16, no.credit = 4;
    CHECK_INT(net_loopback_open(&n, hub, &no), EP_OK);
    CHECK_INT(model_placement_make(&where, micro->shape.n_experts, 2, NULL, 1, &err), EP_OK);
    router_options o = router_options_default(), bad;
    o.m = micro, o.placement = &where, o.n = n, o.on_event = no_event;
    o.max_tokens_per_step = 32, o.kv_tokens = 256, o.max_message = 65536;

    router *r = NULL;
    bad = o, bad.top_k = 11;
    CHECK_INT(router_open(&r, &bad, &err), EP_ERR_INVALID);
    CHECK(has(err.text, "top_k 11"));
    bad = o, bad.max_message = wire_reply_bytes(64, 3) - 1;
    CHECK_INT(router_open(&r, &bad, &err), EP_ERR_TOO_LARGE);
    CHECK(has(err.text, "does not fit a message"));
    bad = o, bad.first_shard_rank = 2;
    CHECK_INT(router_open(&r, &bad, &err), EP_ERR_INVALID);
    bad = o, bad.kv_tokens = 0;
    CHECK_INT(router_open(&r, &bad, &err), EP_ERR_INVALID);
    CHECK(r == NULL);

    /* Every allocation fails once; then a request's. */
    int tried = 0;
    for (;; tried++) {
        ep_alloc_fail_at(tried + 1);
        ep_status status = router_open(&r, &o, &err);
        ep_alloc_fail_at(0);
        if (status == EP_OK) break;
        CHECK_INT(status, EP_ERR_NOMEM);
        CHECK(has(err.text, "no memory"));
        CHECK(r == NULL);
        if (tried > 200) break;
    }
    printf("    %d allocations failed one by one\n", tried);
    CHECK(tried >= 10 && tried <= 200);
    int32_t prompt[] = {1, 2, 3};
    router_request q = cluster_request(1, prompt, 3, 4);
    for (tried = 0; tried < 20; tried++) {
        ep_alloc_fail_at(tried + 1);
        ep_status status = router_submit(r, &q, &err);
        ep_alloc_fail_at(0);
        if (status == EP_OK) break;
        CHECK_INT(status, EP_ERR_NOMEM);
        CHECK_INT(router_load(r), 0);
    }
    CHECK_INT(tried, 3);
    CHECK_INT(router_load(r), 1);
    router_close(r); /* with a request inside */
    router_close(NULL);
    model_placement_fini(&where);
    net_close(n);
    net_hub_close(hub);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"bits", test_bits},
        {"bits_q4_k_m", test_bits_q4_k_m},
        {"bits_of_instruction_sets", test_bits_of_instruction_sets},
        {"replay", test_replay},
        {"no_allocation", test_no_allocation},
        {"cancel", test_cancel},
        {"kv_exhaustion", test_kv_exhaustion},
        {"turns", test_turns},
        {"refused", test_refused},
        {"end_token", test_end_token},
        {"scores", test_scores},
        {"forward", test_forward},
        {"open", test_open},
    };
    if (!open_micro()) return 1;
    int rc = test_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
    close_micro();
    return rc;
}
