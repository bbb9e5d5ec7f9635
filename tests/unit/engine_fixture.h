#ifndef EP_TESTS_UNIT_ENGINE_FIXTURE_H
#define EP_TESTS_UNIT_ENGINE_FIXTURE_H
/*
 * What test_engine and test_exchange share: the micro model, requests that follow from their
 * number, and the comparison with the plainest job there is: one router, one shard, one thread, one
 * request at a time.
 */
#include "kernels/kernels.h"
#include "proto/wire.h"
#include "tests/cluster.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>

#define N_REQUESTS 16
#define MAX_PROMPT 70

static const uint64_t seed = 4711;
static uint8_t *micro_bytes;
static size_t micro_n;
static model *micro;

static inline uint64_t mix(uint64_t x)
{
    x ^= x >> 33, x *= 0xff51afd7ed558ccdu, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53u;
    return x ^ x >> 33;
}

/* The i-th request: prompts of 1 to 70 tokens, every third one sampled; the last id is never used.
 */
static inline router_request request_of(uint64_t i, int vocab, int32_t *prompt)
{
    int n = i == 0 ? 1 : i == 1 ? MAX_PROMPT : 1 + (int)(mix(seed + i) % 40);
    for (int t = 0; t < n; t++)
        prompt[t] = (int32_t)(mix(seed * 1000 + i * 100 + (uint64_t)t) % (uint64_t)(vocab - 1));
    router_request q = cluster_request(i, prompt, n, 3 + (int)(i % 5));
    q.ignore_end = true;
    q.n_logprobs = (int)(i % 4);
    if (i % 3 == 2) {
        q.sampling.temperature = 0.9f;
        q.sampling.top_k = 50;
        q.sampling.seed = i;
    }
    return q;
}

static inline cluster *start(const cluster_options *o)
{
    ep_err err = {""};
    cluster *c = NULL;
    if (cluster_open(&c, o, &err) != EP_OK) {
        printf("    cluster_open: %s\n", err.text);
        CHECK(!"cluster opens");
        return NULL;
    }
    return c;
}

static inline void submit(cluster *c, router_request q)
{
    ep_err err = {""};
    CHECK_INT(cluster_submit(c, &q, &err), EP_OK);
    CHECK_STR(err.text, "");
}

static inline void submit_all(cluster *c, const model *m, int n)
{
    int32_t prompt[MAX_PROMPT];
    for (uint64_t i = 0; i < (uint64_t)n; i++)
        submit(c, request_of(i, m->shape.vocab, prompt));
}

/* Runs n requests under the options; the caller closes. */
static inline cluster *run(const cluster_options *o, int n)
{
    cluster *c = start(o);
    if (c == NULL) return NULL;
    submit_all(c, o->m, n);
    CHECK_INT(cluster_run(c), EP_OK);
    return c;
}

static inline cluster_options plain(const model *m)
{
    cluster_options o = cluster_options_default(m);
    o.keep_logits = true;
    o.router.max_sequences = 1;
    return o;
}

static inline cluster *reference_of(const model *m)
{
    cluster_options o = plain(m);
    return run(&o, N_REQUESTS);
}

static inline bool is_same_top(const answer *a, const answer *b)
{
    for (int i = 0; i < a->n_top && a->n_top == b->n_top; i++)
        if (a->top[i].id != b->top[i].id || a->top[i].logprob != b->top[i].logprob) return false;
    return a->n_top == b->n_top;
}

static inline bool is_same(const answer *a, const answer *b, int vocab)
{
    size_t n = (size_t)a->n_tokens;
    return a->done && b->done && a->n_tokens == b->n_tokens && a->n_logits == b->n_logits &&
           n > 0 && memcmp(a->tokens, b->tokens, n * sizeof(int32_t)) == 0 &&
           memcmp(a->logprobs, b->logprobs, n * sizeof(double)) == 0 && is_same_top(a, b) &&
           memcmp(a->logits, b->logits, sizeof(float) * (size_t)vocab * (size_t)a->n_logits) == 0;
}

static inline void check_same(const cluster *want, const cluster *got, int n, int vocab,
                              const char *name)
{
    for (uint64_t i = 0; i < (uint64_t)n; i++) {
        const answer *a = cluster_answer(got, i);
        if (a->failed) printf("    %s: request %d: %s\n", name, (int)i, a->text);
        if (!is_same(cluster_answer(want, i), a, vocab)) {
            printf("    %s: request %d differs from the reference\n", name, (int)i);
            CHECK(!"bits are the same");
        }
    }
}

static inline router_layer_counters layer_sum(const router_counters *k)
{
    router_layer_counters sum = {0};
    for (int i = 0; i < k->n_layers; i++) {
        sum.rows += k->layers[i].rows, sum.slices += k->layers[i].slices;
        sum.resent += k->layers[i].resent;
    }
    return sum;
}

static inline bool has(const char *text, const char *part)
{
    if (strstr(text, part) != NULL) return true;
    printf("    \"%s\" does not say \"%s\"\n", text, part);
    return false;
}

static inline bool open_micro(void)
{
    ep_err err = {""};
    if (kern_select("auto", &err) != EP_OK) {
        printf("kern_select: %s\n", err.text);
        return false;
    }
    micro_bytes = cluster_read_file(cluster_source_path("tests/golden/micro-f32.gguf"), &micro_n);
    if (micro_bytes != NULL) micro = cluster_open_model(micro_bytes, micro_n);
    return micro != NULL;
}

static inline void close_micro(void)
{
    model_close(micro);
    free(micro_bytes);
}

#endif
