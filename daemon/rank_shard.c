/*
 * The shard role: load the owned experts, say so, serve slices, answer the daemon between them.
 */
#include "daemon/rank.h"
#include "daemon/rank_stats.h"
#include "expert_shard/shard.h"

#include <stdio.h>

typedef struct role {
    rank *r;
    shard *s;
    ep_time last_progress;
} role;

static void on_progress(void *arg, uint64_t done, uint64_t all)
{
    role *me = arg;
    if (done < all && ep_time_diff_ns(ep_now(), me->last_progress) < 100000000) return;
    me->last_progress = ep_now();
    rank_send_progress(me->r, done, all, "experts");
}

/* Between slices: what the daemon wants. */
static void on_tick(void *arg)
{
    role *me = arg;
    void *got;
    while (ep_queue_pop(me->r->in, &got) == EP_OK) {
        rank_item *item = got;
        const Moed__Envelope *e = item->frame.envelope;
        switch (e->body_case) {
        case MOED__ENVELOPE__BODY_STATS_QUERY:
            rank_stats_send_shard(me->r, me->s);
            break;
        case MOED__ENVELOPE__BODY_DRAIN:
            me->r->drained = true;
            shard_drain(me->s);
            break;
        case MOED__ENVELOPE__BODY_LOST:
            if (e->lost->rank < (uint32_t)me->r->n_ranks) net_forget(me->r->n, (int)e->lost->rank);
            break;
        default:
            log_warn("the daemon sent '%s', which a shard does not know", proto_envelope_name(e));
        }
        rank_item_free(item);
    }
}

ep_status rank_shard_run(rank *r, ep_err *err)
{
    role me = {.r = r, .last_progress = ep_now()};
    const shard_options opt = {.m = r->m,
                               .placement = &r->placement,
                               .shard_i = r->rank - r->cfg->n_routers,
                               .device = r->self->device,
                               .packed = r->cfg->packed,
                               .n_threads = r->self->threads,
                               .max_rows = r->cfg->limits.max_tokens_per_step,
                               .progress = on_progress,
                               .progress_arg = &me};
    ep_status status = shard_open(&me.s, &opt, err);
    if (status != EP_OK) return status;
    /* A slice received and a reply under way per router, doubled for re-sends. */
    status = rank_open_net(r, rank_max_message(r), 4 * r->cfg->n_routers + 4, err);
    if (status == EP_OK) {
        rank_send_ready(r, shard_describe(me.s), shard_counters_get(me.s)->weight_bytes, "", 0);
        status = shard_serve(me.s, r->n, on_tick, &me);
        if (status == EP_OK && r->drained) rank_send_drained(r);
        const char *why = shard_failure(me.s);
        if (status != EP_OK)
            ep_fail(err, status, "serving ended: %s",
                    why[0] != '\0' ? why : ep_status_name(status));
    }
    shard_close(me.s);
    return status;
}
