#ifndef EP_TESTS_UNIT_SHARD_FIXTURE_H
#define EP_TESTS_UNIT_SHARD_FIXTURE_H
/*
 * What the shard tests share: models from the repository, random rows, slices as a router makes
 * them.
 */
#include "expert_shard/shard.h"
#include "kernels/kernels.h"
#include "proto/wire.h"
#include "tests/test.h"

#include <stdlib.h>
#include <string.h>

#define FIXTURE_SEED  20260711u
#define FIXTURE_MICRO "tests/golden/micro-f32.gguf"
#define FIXTURE_DEMO  "deploy/demo/tinymoe-q4_k_m.gguf"

static uint64_t fixture_state = FIXTURE_SEED;

static inline uint32_t fixture_random(void)
{
    fixture_state = fixture_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(fixture_state >> 33);
}

/* Uniform in [-1, 1). */
static inline float fixture_float(void)
{
    return (float)fixture_random() / 1073741824.0f - 1.0f;
}

static inline model *fixture_model(const char *name)
{
    const char *source = getenv("MOED_SOURCE");
    char *path = ep_strfmt("%s/%s", source != NULL ? source : ".", name);
    model *m = NULL;
    ep_err err = {{0}};
    if (path == NULL || model_open(&m, path, &err) != EP_OK) printf("    %s: %s\n", name, err.text);
    ep_free(path);
    return m;
}

static inline shard *fixture_shard(const model *m, const model_placement *p, int shard_i,
                                   int n_threads, int max_rows)
{
    shard_options opt = {.m = m,
                         .placement = p,
                         .shard_i = shard_i,
                         .device = "cpu",
                         .n_threads = n_threads,
                         .max_rows = max_rows};
    shard *s = NULL;
    ep_err err = {{0}};
    if (shard_open(&s, &opt, &err) != EP_OK) printf("    shard %d: %s\n", shard_i, err.text);
    return s;
}

static inline float *fixture_rows(int n_rows, int hidden)
{
    size_t n = (size_t)n_rows * (size_t)hidden;
    float *x = ep_alloc(n * sizeof(float));
    for (size_t i = 0; x != NULL && i < n; i++)
        x[i] = fixture_float();
    return x;
}

/* A sealed slice. h: shard, epoch, layer, form, hidden, n_rows, n_pairs, sequence are set. */
static inline void *fixture_slice(const wire_header *h, const float *x, const wire_pair *pairs,
                                  size_t *bytes)
{
    kern_act form = (kern_act)h->form;
    *bytes = wire_slice_bytes(form, h->hidden, h->n_rows, h->n_pairs);
    uint8_t *msg = ep_calloc(1, *bytes);
    if (msg == NULL) return NULL;
    kern_act_rows(form, msg + wire_slice_rows_at(), x, h->hidden, (int)h->n_rows, (int)h->hidden);
    uint8_t *at = msg + wire_slice_pairs_at(form, h->hidden, h->n_rows);
    for (uint32_t i = 0; i < h->n_pairs; i++)
        wire_put_pair(at, i, pairs[i]);
    wire_seal(msg, *bytes, h);
    return msg;
}

#define MAX_ROWS 24

typedef struct world {
    model *m;
    model_placement p;
    shard *s;
    wire_header h;    /* a slice of 8 rows that is right */
    float *x;         /* [MAX_ROWS, hidden] */
    wire_pair *pairs; /* [MAX_ROWS * top_k] every row top_k different owned experts */
    uint8_t *reply;
} world;

static inline void world_close(world *w)
{
    shard_close(w->s);
    model_placement_fini(&w->p);
    model_close(w->m);
    ep_free(w->x);
    ep_free(w->pairs);
    ep_free(w->reply);
}

/* Every row goes to top_k experts of those that shard_i owns. */
static inline void choose_pairs(world *w, int shard_i, int top_k)
{
    for (int r = 0; r < MAX_ROWS; r++) {
        int expert = (int)(fixture_random() % (uint32_t)w->p.n_experts);
        for (int slot = 0; slot < top_k; slot++) {
            while (w->p.owner[expert] != shard_i)
                expert = (expert + 1) % w->p.n_experts;
            w->pairs[r * top_k + slot] =
                (wire_pair){.row = (uint32_t)r, .expert = (uint16_t)expert, .slot = (uint16_t)slot};
            expert = (expert + 1) % w->p.n_experts;
        }
    }
}

/* A model, the shard that owns everything (or lists), and a slice for it. */
static inline bool world_open(world *w, const char *name, int n_shards, const char *const *lists,
                              int shard_i)
{
    *w = (world){0};
    w->m = fixture_model(name);
    CHECK(w->m != NULL);
    if (w->m == NULL) return false;
    const model_shape *shape = &w->m->shape;
    ep_err err = {{0}};
    CHECK(model_placement_make(&w->p, shape->n_experts, n_shards, lists, 7, &err) == EP_OK);
    w->s = fixture_shard(w->m, &w->p, shard_i, 1, MAX_ROWS);
    w->x = fixture_rows(MAX_ROWS, shape->hidden);
    w->pairs = ep_calloc((size_t)(MAX_ROWS * shape->top_k), sizeof(wire_pair));
    w->reply =
        ep_alloc(wire_reply_bytes((uint32_t)shape->hidden, (uint32_t)(MAX_ROWS * shape->top_k)));
    CHECK(w->s != NULL && w->x != NULL && w->pairs != NULL && w->reply != NULL);
    if (w->s == NULL || w->x == NULL || w->pairs == NULL || w->reply == NULL) return false;
    int owned = w->p.n_owned[shard_i];
    int top_k = shape->top_k < owned ? shape->top_k : owned;
    if (owned > 0) choose_pairs(w, shard_i, top_k);
    w->h = (wire_header){.kind = WIRE_SLICE,
                         .epoch = 7,
                         .router = 3,
                         .shard = (uint16_t)shard_i,
                         .step = 11,
                         .sequence = 12345,
                         .layer = 1,
                         .micro = 1,
                         .form = (uint16_t)shard_layer_form(w->s, 1),
                         .n_rows = 8,
                         .n_pairs = (uint32_t)(8 * (top_k > 0 ? top_k : 1)),
                         .hidden = (uint32_t)shape->hidden};
    return true;
}

/* Asks s; out gets the rows of the reply. False: it was no reply. */
static inline bool ask(world *w, shard *s, const wire_header *h, const float *x,
                       const wire_pair *pairs, float *out)
{
    size_t bytes, reply_bytes = 0;
    void *msg = fixture_slice(h, x, pairs, &bytes);
    if (msg == NULL) return false;
    shard_answer(s, msg, bytes, 0, w->reply, &reply_bytes);
    ep_free(msg);
    wire_header r;
    wire_reason why = WIRE_WHY_NONE;
    if (wire_open(w->reply, reply_bytes, &r, &why) != EP_OK || r.kind != WIRE_REPLY) {
        printf("    kind %d, reason %s\n", r.kind, wire_reason_name((wire_reason)r.reason));
        return false;
    }
    CHECK_INT(r.sequence, h->sequence);
    CHECK_INT(r.step, h->step);
    CHECK_INT(r.layer, h->layer);
    CHECK_INT(r.micro, h->micro);
    CHECK_INT(r.router, h->router);
    CHECK_INT(r.n_pairs, h->n_pairs);
    CHECK(r.compute_ns > 0);
    memcpy(out, wire_reply_rows(w->reply, &r), (size_t)h->n_pairs * h->hidden * sizeof(float));
    return true;
}

#endif
