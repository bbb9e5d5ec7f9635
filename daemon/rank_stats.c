/*
 * Counters to messages. The counters are the engine's own, read on its thread between steps; the
 * message is built in one piece of memory per call, because statistics are asked for by people, not
 * by steps.
 */
#include "daemon/rank_stats.h"
#include "proto/wire.h"

#include <stdio.h>
#include <string.h>

enum { MAX_COUNTERS = 48 };

/* A RankStats with room for its parts. */
typedef struct stats_message {
    Moed__RankStats stats;
    Moed__LayerStats *layers, **layer_p;
    Moed__ExpertStats *experts, **expert_p;
    Moed__Counter counters[MAX_COUNTERS], *counter_p[MAX_COUNTERS];
    char names[MAX_COUNTERS][48], role[16], name[64], describe[128];
} stats_message;

static void message_close(stats_message *m)
{
    if (m == NULL) return;
    ep_free(m->layers);
    ep_free(m->layer_p);
    ep_free(m->experts);
    ep_free(m->expert_p);
    ep_free(m);
}

static stats_message *message_open(const rank *r, const char *role, const char *describe,
                                   size_t n_layers, size_t n_experts)
{
    stats_message *m = ep_calloc(1, sizeof(*m));
    if (m == NULL) return NULL;
    m->layers = ep_calloc(n_layers, sizeof(*m->layers));
    m->layer_p = ep_calloc(n_layers, sizeof(*m->layer_p));
    m->experts = ep_calloc(n_experts, sizeof(*m->experts));
    m->expert_p = ep_calloc(n_experts, sizeof(*m->expert_p));
    if (m->layers == NULL || m->layer_p == NULL || m->experts == NULL || m->expert_p == NULL) {
        message_close(m);
        return NULL;
    }
    moed__rank_stats__init(&m->stats);
    snprintf(m->role, sizeof(m->role), "%s", role);
    snprintf(m->name, sizeof(m->name), "%s", r->self->name);
    snprintf(m->describe, sizeof(m->describe), "%s", describe);
    m->stats.rank = (uint32_t)r->rank;
    m->stats.role = m->role;
    m->stats.name = m->name;
    m->stats.describe = m->describe;
    m->stats.layers = m->layer_p;
    m->stats.experts = m->expert_p;
    m->stats.counters = m->counter_p;
    return m;
}

static Moed__LayerStats *add_layer(stats_message *m)
{
    size_t i = m->stats.n_layers++;
    moed__layer_stats__init(&m->layers[i]);
    m->layer_p[i] = &m->layers[i];
    m->layers[i].layer = (uint32_t)i;
    return &m->layers[i];
}

static void add_expert(stats_message *m, int layer, int expert, uint64_t rows)
{
    if (rows == 0) return;
    size_t i = m->stats.n_experts++;
    moed__expert_stats__init(&m->experts[i]);
    m->expert_p[i] = &m->experts[i];
    m->experts[i].layer = (uint32_t)layer;
    m->experts[i].expert = (uint32_t)expert;
    m->experts[i].rows = rows;
}

static void add_counter(stats_message *m, const char *name, uint64_t value)
{
    size_t i = m->stats.n_counters;
    if (i == MAX_COUNTERS) return;
    m->stats.n_counters++;
    moed__counter__init(&m->counters[i]);
    m->counter_p[i] = &m->counters[i];
    snprintf(m->names[i], sizeof(m->names[i]), "%s", name);
    m->counters[i].name = m->names[i];
    m->counters[i].value = value;
}

static void add_net(stats_message *m, const net *n)
{
    const net_stats *s = &n->stats;
    add_counter(m, "net_sent", s->sent);
    add_counter(m, "net_received", s->received);
    add_counter(m, "net_sent_bytes", s->sent_bytes);
    add_counter(m, "net_received_bytes", s->received_bytes);
    add_counter(m, "net_no_credit", s->no_credit);
    add_counter(m, "net_quarantined", s->quarantined);
    add_counter(m, "net_dropped", s->dropped);
}

static void message_send(rank *r, stats_message *m)
{
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    add_net(m, r->n);
    add_counter(m, "rss_bytes", rank_rss_bytes());
    e.body_case = MOED__ENVELOPE__BODY_RANK_STATS;
    e.rank_stats = &m->stats;
    uplink_send(r->up, &e);
    message_close(m);
}

void rank_stats_send_shard(rank *r, const shard *s)
{
    const shard_counters *c = shard_counters_get(s);
    int shard_i = r->rank - r->cfg->n_routers;
    stats_message *m = message_open(r, "shard", shard_describe(s), (size_t)c->n_layers,
                                    (size_t)c->n_layers * (size_t)c->n_owned);
    if (m == NULL) {
        log_warn("no memory for statistics");
        return;
    }
    for (int l = 0; l < c->n_layers; l++) {
        Moed__LayerStats *out = add_layer(m);
        const shard_layer_counters *in = &c->layers[l];
        out->rows = in->rows;
        out->pairs = in->pairs;
        out->slices = in->slices;
        out->bytes_in = in->bytes_in;
        out->bytes_out = in->bytes_out;
        out->compute_ns = in->compute_ns;
        for (int e = 0; e < r->placement.n_experts; e++)
            if (r->placement.owner[e] == shard_i)
                add_expert(m, l, e, c->expert_pairs[l * c->n_owned + r->placement.local[e]]);
    }
    add_counter(m, "weight_bytes", c->weight_bytes);
    add_counter(m, "wait_ns", c->wait_ns);
    for (int i = 1; i < WIRE_N_REASONS; i++) {
        char name[48];
        snprintf(name, sizeof(name), "refused_%s", wire_reason_name((wire_reason)i));
        for (char *p = name; *p != '\0'; p++)
            if (*p == ' ' || *p == '-') *p = '_';
        if (c->errors[i] > 0) add_counter(m, name, c->errors[i]);
    }
    message_send(r, m);
}

void rank_stats_send_router(rank *r, const router *ro)
{
    const router_counters *c = router_counters_get(ro);
    char describe[128];
    snprintf(describe, sizeof(describe), "cpu, %d thread%s", r->self->threads,
             r->self->threads == 1 ? "" : "s");
    stats_message *m = message_open(r, "router", describe, (size_t)c->n_layers,
                                    (size_t)c->n_layers * (size_t)c->n_experts);
    if (m == NULL) {
        log_warn("no memory for statistics");
        return;
    }
    for (int l = 0; l < c->n_layers; l++) {
        Moed__LayerStats *out = add_layer(m);
        const router_layer_counters *in = &c->layers[l];
        out->rows = in->rows;
        out->slices = in->slices;
        out->resent = in->resent;
        out->bytes_in = in->bytes_in;
        out->bytes_out = in->bytes_out;
        out->attention_ns = in->attention_ns;
        out->gate_ns = in->gate_ns;
        out->plan_ns = in->plan_ns;
        out->scatter_ns = in->scatter_ns;
        out->wait_ns = in->wait_ns;
        out->combine_ns = in->combine_ns;
        for (int e = 0; e < c->n_experts; e++)
            add_expert(m, l, e, c->expert_rows[l * c->n_experts + e]);
    }
    add_counter(m, "weight_bytes", c->weight_bytes);
    add_counter(m, "steps", c->steps);
    add_counter(m, "tokens_prefill", c->tokens_prefill);
    add_counter(m, "tokens_decode", c->tokens_decode);
    add_counter(m, "head_ns", c->head_ns);
    add_counter(m, "sample_ns", c->sample_ns);
    add_counter(m, "late_replies", c->late_replies);
    add_counter(m, "bad_replies", c->bad_replies);
    add_counter(m, "error_replies", c->error_replies);
    add_counter(m, "non_finite_rows", c->non_finite_rows);
    add_counter(m, "kv_pages", (uint64_t)c->kv_pages);
    add_counter(m, "kv_pages_free", (uint64_t)c->kv_pages_free);
    for (int s = 0; s < c->n_shards && s < 8; s++) {
        char name[48];
        snprintf(name, sizeof(name), "shard_%d_wait_ns", s);
        add_counter(m, name, c->shard_wait_ns[s]);
        snprintf(name, sizeof(name), "shard_%d_slices", s);
        add_counter(m, name, c->shard_slices[s]);
    }
    message_send(r, m);
}
