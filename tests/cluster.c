/*
 * cluster: see cluster.h. Answers are fixed-size tables made at submission, so that collecting them
 * allocates nothing while a step runs and ep_alloc_count shows the router alone. Every router
 * writes only the answers of its own requests; nothing is locked.
 */
#include "tests/cluster.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/wire.h"

#define MAX_RANKS   16
#define MAX_ANSWERS 128

struct cluster {
    cluster_options opt;
    model_placement placement;
    net_hub *hub;
    net *nets[MAX_RANKS];
    shard *shards[MAX_RANKS];
    pthread_t threads[MAX_RANKS];
    bool is_started[MAX_RANKS];
    router *routers[MAX_RANKS];
    ep_pool *pools[MAX_RANKS];
    ep_status step_status[MAX_RANKS];
    answer answers[MAX_ANSWERS];
    int n_answers, n_submitted;
};

typedef struct shard_run {
    shard *s;
    net *n;
} shard_run;

cluster_options cluster_options_default(const model *m)
{
    cluster_options o = {
        .m = m, .n_routers = 1, .n_shards = 1, .router_threads = 1, .shard_threads = 1};
    o.router = router_options_default();
    o.router.max_tokens_per_step = 64;
    o.router.kv_tokens = 2048;
    return o;
}

static void *serve(void *arg)
{
    shard_run *run = arg;
    shard_serve(run->s, run->n, NULL, NULL);
    free(run);
    return NULL;
}

static answer *find(const cluster *c, uint64_t id)
{
    for (int i = 0; i < c->n_answers; i++)
        if (c->answers[i].id == id) return (answer *)&c->answers[i];
    printf("    no request %llu was submitted\n", (unsigned long long)id);
    abort();
}

static void on_event(void *arg, const router_event *e)
{
    answer *a = find(arg, e->request);
    switch (e->kind) {
    case ROUTER_EVENT_TOKEN:
        if (e->position != a->n_prompt + a->n_tokens)
            printf("    token at position %d\n", e->position);
        a->logprobs[a->n_tokens] = e->logprob;
        a->tokens[a->n_tokens++] = e->token;
        a->n_top = e->n_top;
        if (e->n_top > 0) memcpy(a->top, e->top, sizeof(a->top[0]) * (size_t)e->n_top);
        break;
    case ROUTER_EVENT_SCORE:
        a->scores[e->position] = e->logprob;
        a->n_scores++;
        break;
    case ROUTER_EVENT_DONE:
        a->done = true;
        a->finish = e->finish;
        a->n_generated = e->n_generated;
        a->ended = ep_now();
        break;
    case ROUTER_EVENT_FAILED:
        a->failed = true;
        a->status = e->status;
        snprintf(a->text, sizeof(a->text), "%s", e->text);
        a->ended = ep_now();
        break;
    }
}

static void on_logits(void *arg, uint64_t request, int position, const float *logits)
{
    cluster *c = arg;
    answer *a = find(c, request);
    size_t vocab = (size_t)c->opt.m->shape.vocab;
    memcpy(a->logits + (size_t)a->n_logits * vocab, logits, vocab * sizeof(float));
    a->logit_positions[a->n_logits++] = position;
}

static ep_status open_router(cluster *c, int i, size_t max_message, ep_err *err)
{
    router_options o = c->opt.router;
    o.m = c->opt.m;
    o.placement = &c->placement;
    o.router_i = i;
    o.first_shard_rank = c->opt.n_routers;
    o.n = c->nets[i];
    o.max_message = max_message;
    o.on_event = on_event;
    o.event_arg = c;
    if (c->opt.keep_logits) {
        o.tap.arg = c;
        o.tap.logits = on_logits;
    }
    if (c->opt.router_threads > 1) {
        ep_status status = ep_pool_open(&c->pools[i], c->opt.router_threads);
        if (status != EP_OK) return status;
    }
    o.pool = c->pools[i];
    return router_open(&c->routers[i], &o, err);
}

static ep_status open_shard(cluster *c, int i, size_t max_message, ep_err *err)
{
    const router_options *r = &c->opt.router;
    int rows = router_slice_rows(c->opt.m, NULL, r->top_k, r->max_tokens_per_step, max_message);
    int rank = c->opt.n_routers + i;
    shard_options o = {.m = c->opt.m,
                       .placement = &c->placement,
                       .shard_i = i,
                       .device = "cpu",
                       .n_threads = c->opt.shard_threads,
                       .max_rows = rows > 0 ? rows : 1};
    ep_status status = shard_open(&c->shards[i], &o, err);
    if (status != EP_OK) return status;
    shard_run *run = malloc(sizeof(*run));
    if (run == NULL) return EP_ERR_NOMEM;
    *run = (shard_run){c->shards[i], c->nets[rank]};
    if (pthread_create(&c->threads[i], NULL, serve, run) != 0) {
        free(run);
        return EP_ERR_NOMEM;
    }
    c->is_started[i] = true;
    return EP_OK;
}

ep_status cluster_open(cluster **out, const cluster_options *opt, ep_err *err)
{
    cluster *c = calloc(1, sizeof(*c));
    if (c == NULL) return EP_ERR_NOMEM;
    c->opt = *opt;
    const model_shape *s = &opt->m->shape;
    int n_ranks = opt->n_routers + opt->n_shards;
    uint32_t rows = (uint32_t)opt->router.max_tokens_per_step, hidden = (uint32_t)s->hidden;
    size_t max_message = opt->max_message;
    if (max_message == 0) max_message = wire_reply_bytes(hidden, rows * (uint32_t)s->top_k) + 4096;
    ep_status status =
        model_placement_make(&c->placement, s->n_experts, opt->n_shards, opt->experts, 1, err);
    if (status != EP_OK) goto fail;
    status = net_hub_open(&c->hub, n_ranks, opt->script, opt->script_arg);
    for (int i = 0; i < n_ranks && status == EP_OK; i++) {
        net_options o = net_options_default();
        o.rank = i;
        o.n_ranks = n_ranks;
        o.max_message = max_message;
        o.n_buffers = opt->n_buffers > 0 ? opt->n_buffers : 64;
        o.credit = 16;
        o.send_deadline_ms = 20000; /* a slow machine must not turn slowness into a loss */
        status = net_loopback_open(&c->nets[i], c->hub, &o);
    }
    for (int i = 0; i < opt->n_shards && status == EP_OK; i++)
        status = open_shard(c, i, max_message, err);
    for (int i = 0; i < opt->n_routers && status == EP_OK; i++)
        status = open_router(c, i, max_message, err);
    if (status != EP_OK) goto fail;
    *out = c;
    return EP_OK;
fail:
    cluster_close(c);
    return status;
}

void cluster_close(cluster *c)
{
    if (c == NULL) return;
    for (int i = 0; i < MAX_RANKS; i++) {
        if (c->routers[i] != NULL) router_close(c->routers[i]);
        ep_pool_close(c->pools[i]);
    }
    for (int i = 0; i < MAX_RANKS; i++) {
        if (c->is_started[i]) {
            shard_stop(c->shards[i]);
            pthread_join(c->threads[i], NULL);
        }
        shard_close(c->shards[i]);
    }
    for (int i = 0; i < MAX_RANKS; i++)
        if (c->nets[i] != NULL) net_close(c->nets[i]);
    if (c->hub != NULL) net_hub_close(c->hub);
    model_placement_fini(&c->placement);
    for (int i = 0; i < c->n_answers; i++) {
        free(c->answers[i].tokens);
        free(c->answers[i].logprobs);
        free(c->answers[i].scores);
        free(c->answers[i].logits);
        free(c->answers[i].logit_positions);
    }
    free(c);
}

router *cluster_router(cluster *c, int i)
{
    return c->routers[i];
}
net_hub *cluster_hub(cluster *c)
{
    return c->hub;
}
int cluster_shard_rank(const cluster *c, int shard_i)
{
    return c->opt.n_routers + shard_i;
}

router_request cluster_request(uint64_t id, const int32_t *prompt, int n_prompt, int max_tokens)
{
    return (router_request){.id = id,
                            .prompt = prompt,
                            .n_prompt = n_prompt,
                            .max_tokens = max_tokens,
                            .sampling = router_sampling_default(),
                            .deadline = EP_TIME_NEVER};
}

ep_status cluster_submit(cluster *c, const router_request *req, ep_err *err)
{
    if (c->n_answers == MAX_ANSWERS) return EP_ERR_BUSY;
    size_t n = (size_t)req->n_prompt + (size_t)req->max_tokens + 1;
    answer *a = &c->answers[c->n_answers];
    *a = (answer){.id = req->id, .n_prompt = req->n_prompt};
    a->tokens = calloc(n, sizeof(*a->tokens));
    a->logprobs = calloc(n, sizeof(*a->logprobs));
    a->scores = calloc(n, sizeof(*a->scores));
    a->logit_positions = calloc(n, sizeof(int));
    size_t n_logits = c->opt.router.tap.all_logits ? n : (size_t)req->max_tokens + 1;
    if (req->score_from > 0) n_logits = n;
    if (c->opt.keep_logits)
        a->logits = calloc(n_logits, sizeof(float) * (size_t)c->opt.m->shape.vocab);
    c->n_answers++;
    return router_submit(c->routers[c->n_submitted++ % c->opt.n_routers], req, err);
}

typedef struct router_run {
    cluster *c;
    int i;
} router_run;

static void *run_router(void *arg)
{
    router_run *run = arg;
    ep_status status;
    while ((status = router_step(run->c->routers[run->i])) == EP_OK) {
    }
    run->c->step_status[run->i] = status == EP_AGAIN ? EP_OK : status;
    return NULL;
}

ep_status cluster_run(cluster *c)
{
    router_run runs[MAX_RANKS];
    pthread_t threads[MAX_RANKS];
    for (int i = 0; i < c->opt.n_routers; i++) {
        runs[i] = (router_run){c, i};
        if (i > 0 && pthread_create(&threads[i], NULL, run_router, &runs[i]) != 0)
            return EP_ERR_NOMEM;
    }
    run_router(&runs[0]);
    ep_status status = c->step_status[0];
    for (int i = 1; i < c->opt.n_routers; i++) {
        pthread_join(threads[i], NULL);
        if (status == EP_OK) status = c->step_status[i];
    }
    return status;
}

const answer *cluster_answer(const cluster *c, uint64_t id)
{
    return find(c, id);
}

/* ---- files --------------------------------------------------------------------------------------
 */

uint8_t *cluster_read_file(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    if (f == NULL) {
        printf("    cannot read %s\n", path);
        return NULL;
    }
    fseek(f, 0, SEEK_END);
    long size = ftell(f);
    fseek(f, 0, SEEK_SET);
    uint8_t *bytes = size >= 0 ? malloc((size_t)size + 1) : NULL;
    if (bytes != NULL && fread(bytes, 1, (size_t)size, f) != (size_t)size) {
        free(bytes);
        bytes = NULL;
    }
    fclose(f);
    if (bytes != NULL) bytes[size] = '\0', *n = (size_t)size;
    return bytes;
}

model *cluster_open_model(const void *bytes, size_t n)
{
    ep_err err;
    model_file *file;
    model *m;
    if (model_file_open_bytes(&file, bytes, n, &err) == EP_OK &&
        model_open_file(&m, file, &err) == EP_OK)
        return m;
    printf("    %s\n", err.text);
    return NULL;
}

const char *cluster_source_path(const char *name)
{
    static char path[4096];
    const char *root = getenv("MOED_SOURCE");
    snprintf(path, sizeof(path), "%s/%s", root != NULL ? root : ".", name);
    return path;
}

const char *cluster_shared_path(const char *name)
{
    static char path[4096];
    const char *root = getenv("MOED_SHARED");
    snprintf(path, sizeof(path), "%s/%s", root != NULL && *root ? root : "../shared", name);
    return access(path, R_OK) == 0 ? path : NULL;
}
