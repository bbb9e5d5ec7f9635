/*
 * A shard as an object: open, close, and one slice in, one reply or error out. Invariant: a slice
 * is checked completely before any of its numbers is used as an index or a size, and every refusal
 * becomes a WIRE_ERROR to the sender and a count by reason. Nothing is allocated after open. No
 * state outlives a slice but counters and a time, so a slice may come twice and rows never meet
 * each other.
 *
 * Order of checks: envelope (wire_open), kind, epoch and shard, layer, form and hidden size,
 * counts, then each pair. A wrong shard index answers as a wrong epoch (the sender follows another
 * placement), a wrong hidden size as a wrong form, a slot out of range as a wrong row. It moves no
 * messages: serve.c does.
 */
#include "expert_shard/store.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_ROWS 65536 /* of one slice; far above any useful step, keeps every size within int */

void shard_count(uint64_t *counter, uint64_t more)
{
    __atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}

/* ---- open and close -----------------------------------------------------------------------------
 */

static ep_status check_options(const shard_options *opt, ep_err *err)
{
    if (opt->m == NULL || opt->placement == NULL || opt->device == NULL)
        return ep_fail(err, EP_ERR_INVALID, "shard: model, placement and device are required");
    const model_placement *p = opt->placement;
    const model_shape *shape = &opt->m->shape;
    if (opt->shard_i < 0 || opt->shard_i >= p->n_shards)
        return ep_fail(err, EP_ERR_INVALID, "shard %d: the placement has %d shards", opt->shard_i,
                       p->n_shards);
    if (p->n_experts != shape->n_experts)
        return ep_fail(err, EP_ERR_INVALID, "shard %d: placement of %d experts, the model has %d",
                       opt->shard_i, p->n_experts, shape->n_experts);
    if (shape->n_layers > UINT16_MAX || shape->n_experts > INT16_MAX || shape->top_k < 1)
        return ep_fail(err, EP_ERR_UNSUPPORTED, "shard %d: %d layers, %d experts, top %d",
                       opt->shard_i, shape->n_layers, shape->n_experts, shape->top_k);
    if (opt->max_rows < 1 || opt->max_rows > MAX_ROWS)
        return ep_fail(err, EP_ERR_INVALID, "shard %d: max_rows %d, 1 to %d are possible",
                       opt->shard_i, opt->max_rows, MAX_ROWS);
    if (opt->n_threads < 1)
        return ep_fail(err, EP_ERR_INVALID, "shard %d: %d threads", opt->shard_i, opt->n_threads);
    return EP_OK;
}

static ep_status open_scratch(shard *s, ep_err *err)
{
    size_t n_owned = (size_t)s->store.n_owned, n_layers = (size_t)s->store.n_layers;
    int per_row = s->top_k < s->store.n_owned ? s->top_k : s->store.n_owned;
    int64_t pairs = (int64_t)s->max_rows * per_row;
    if (pairs > INT32_MAX)
        return ep_fail(err, EP_ERR_TOO_LARGE, "shard %d: %d rows of %d experts are too many pairs",
                       s->shard_i, s->max_rows, per_row);
    s->max_pairs = (int)pairs;
    size_t n_pairs = (size_t)pairs;
    s->pair_local = ep_calloc(n_pairs, sizeof(int32_t));
    s->pair_row = ep_calloc(n_pairs, sizeof(int32_t));
    s->pair_out = ep_calloc(n_pairs, sizeof(int32_t));
    s->expert_offset = ep_calloc(n_owned + 1, sizeof(int32_t));
    s->next = ep_calloc(n_owned, sizeof(int32_t));
    s->counters.layers = ep_calloc(n_layers, sizeof(*s->counters.layers));
    s->counters.expert_pairs = ep_calloc(n_layers * n_owned, sizeof(uint64_t));
    if (s->pair_local == NULL || s->pair_row == NULL || s->pair_out == NULL ||
        s->expert_offset == NULL || s->next == NULL || s->counters.layers == NULL ||
        s->counters.expert_pairs == NULL)
        return ep_fail(err, EP_ERR_NOMEM, "shard %d: no memory for slices of %d rows", s->shard_i,
                       s->max_rows);
    s->counters.n_layers = s->store.n_layers;
    s->counters.n_owned = s->store.n_owned;
    s->counters.weight_bytes = s->store.weight_bytes;
    if (s->store.n_owned == 0) return EP_OK;
    ep_status status = s->store.ops->reserve(s->store.device, s->max_rows, s->max_pairs);
    if (status != EP_OK)
        return ep_fail(err, status, "shard %d: scratch for %d rows, %d pairs: %s", s->shard_i,
                       s->max_rows, s->max_pairs, ep_status_name(status));
    return EP_OK;
}

ep_status shard_open(shard **out, const shard_options *opt, ep_err *err)
{
    ep_status status = check_options(opt, err);
    if (status != EP_OK) return status;
    shard *s = ep_calloc(1, sizeof(*s));
    if (s == NULL) return ep_fail(err, EP_ERR_NOMEM, "no memory for shard %d", opt->shard_i);
    s->placement = opt->placement;
    s->shard_i = opt->shard_i;
    s->hidden = opt->m->shape.hidden;
    s->top_k = opt->m->shape.top_k;
    s->max_rows = opt->max_rows;
    if (pthread_mutex_init(&s->lock, NULL) != 0) {
        status = ep_fail(err, EP_ERR_NOMEM, "no lock for shard %d", opt->shard_i);
        goto fail;
    }
    s->has_lock = true;
    status = shard_store_init(&s->store, opt, err);
    if (status != EP_OK) goto fail;
    status = open_scratch(s, err);
    if (status != EP_OK) goto fail;
    *out = s;
    return EP_OK;
fail:
    shard_close(s);
    return status;
}

void shard_close(shard *s)
{
    if (s == NULL) return;
    shard_store_fini(&s->store);
    ep_free(s->pair_local);
    ep_free(s->pair_row);
    ep_free(s->pair_out);
    ep_free(s->expert_offset);
    ep_free(s->next);
    ep_free(s->counters.layers);
    ep_free(s->counters.expert_pairs);
    if (s->has_lock) pthread_mutex_destroy(&s->lock);
    ep_free(s);
}

const shard_counters *shard_counters_get(const shard *s)
{
    return &s->counters;
}

uint64_t shard_expert_checksum(const shard *s, int layer, int local_expert)
{
    return s->store.checksums[(size_t)layer * (size_t)s->store.n_owned + (size_t)local_expert];
}

const char *shard_describe(const shard *s)
{
    return s->store.ops->describe(s->store.device);
}

const char *shard_failure(const shard *s)
{
    return s->failure;
}

kern_act shard_layer_form(const shard *s, int layer)
{
    return s->store.forms[layer];
}

/* ---- one slice ----------------------------------------------------------------------------------
 */

static wire_reason check_header(const shard *s, const wire_header *h)
{
    if (h->epoch != s->placement->epoch || h->shard != s->shard_i) return WIRE_WHY_EPOCH;
    if (h->layer >= s->store.n_layers) return WIRE_WHY_LAYER;
    if (h->hidden != (uint32_t)s->hidden) return WIRE_WHY_FORM;
    if (h->form != s->store.forms[h->layer] && h->form != KERN_ACT_F32) return WIRE_WHY_FORM;
    if (s->store.n_owned == 0) return WIRE_WHY_EXPERT;
    if (h->n_rows == 0 || h->n_rows > (uint32_t)s->max_rows) return WIRE_WHY_COUNT;
    if (h->n_pairs == 0 || h->n_pairs > (uint32_t)s->max_pairs) return WIRE_WHY_COUNT;
    return WIRE_WHY_NONE;
}

/* Checks the pairs and sorts them by local expert, keeping the slice's order within an expert. */
static wire_reason sort_pairs(shard *s, const void *msg, const wire_header *h)
{
    const model_placement *p = s->placement;
    int n_owned = s->store.n_owned;
    memset(s->expert_offset, 0, ((size_t)n_owned + 1) * sizeof(int32_t));
    for (uint32_t i = 0; i < h->n_pairs; i++) {
        wire_pair pair = wire_slice_pair(msg, h, i);
        if (pair.expert >= p->n_experts || p->owner[pair.expert] != s->shard_i)
            return WIRE_WHY_EXPERT;
        if (pair.row >= h->n_rows || pair.slot >= s->top_k) return WIRE_WHY_ROW;
        s->pair_local[i] = p->local[pair.expert];
        s->expert_offset[s->pair_local[i] + 1]++;
    }
    for (int e = 0; e < n_owned; e++) {
        s->next[e] = s->expert_offset[e];
        s->expert_offset[e + 1] += s->expert_offset[e];
    }
    for (uint32_t i = 0; i < h->n_pairs; i++) {
        int32_t at = s->next[s->pair_local[i]]++;
        s->pair_row[at] = (int32_t)wire_slice_pair(msg, h, i).row;
        s->pair_out[at] = (int32_t)i;
    }
    return WIRE_WHY_NONE;
}

/* Says it once, and keeps what shard_failure says. */
static wire_reason device_failed(shard *s, const wire_header *h, ep_status status)
{
    if (!s->device_failed)
        log_error("shard %d, layer %d: the device failed: %s", s->shard_i, h->layer,
                  ep_status_name(status));
    s->device_failed = true;
    if (status == EP_ERR_DEVICE && !s->device_lost) {
        const char *what = s->store.ops->failure != NULL ? s->store.ops->failure(s->store.device)
                                                         : shard_describe(s);
        snprintf(s->failure, sizeof(s->failure), "shard %d, layer %d: %s", s->shard_i, h->layer,
                 what);
        s->device_lost = true;
    }
    return WIRE_WHY_DEVICE;
}

static wire_reason begin_pass(shard *s, const void *msg, const wire_header *h, void *reply)
{
    wire_reason why = sort_pairs(s, msg, h);
    if (why != WIRE_WHY_NONE) return why;
    compute_ffn_args args = {.rows = wire_slice_rows(msg, h),
                             .act = (kern_act)h->form,
                             .n_rows = (int)h->n_rows,
                             .n_pairs = (int)h->n_pairs,
                             .expert_offset = s->expert_offset,
                             .pair_row = s->pair_row,
                             .pair_out = s->pair_out,
                             .out = (float *)((uint8_t *)reply + WIRE_HEADER_BYTES)};
    ep_status status = s->store.ops->ffn_begin(s->store.device, s->store.stacks[h->layer], &args);
    if (status != EP_OK) return device_failed(s, h, status);
    uint64_t *pairs = &s->counters.expert_pairs[(size_t)h->layer * (size_t)s->store.n_owned];
    for (int e = 0; e < s->store.n_owned; e++)
        shard_count(&pairs[e], (uint64_t)(s->expert_offset[e + 1] - s->expert_offset[e]));
    return WIRE_WHY_NONE;
}

static void count_slice(shard *s, const wire_header *h, size_t bytes_in, size_t bytes_out,
                        uint64_t ns)
{
    shard_layer_counters *c = &s->counters.layers[h->layer];
    shard_count(&c->slices, 1);
    shard_count(&c->rows, h->n_rows);
    shard_count(&c->pairs, h->n_pairs);
    shard_count(&c->bytes_in, bytes_in);
    shard_count(&c->bytes_out, bytes_out);
    shard_count(&c->compute_ns, ns);
}

/* An answer without payload: the header of what came, so that the sender knows what is meant. */
static void answer_short(shard_flight *f, wire_kind kind, wire_reason why)
{
    wire_header answer = f->h;
    answer.kind = (uint16_t)kind;
    answer.reason = (uint16_t)why;
    answer.form = 0;
    answer.n_rows = answer.n_pairs = answer.hidden = answer.flags = 0;
    f->reply_bytes = WIRE_HEADER_BYTES;
    wire_seal(f->reply, f->reply_bytes, &answer);
}

static void refuse(shard *s, shard_flight *f, wire_reason why)
{
    shard_count(&s->counters.errors[why], 1);
    /* An error that answers an error could go back and forth for ever. */
    if (f->h.kind != WIRE_ERROR) answer_short(f, WIRE_ERROR, why);
}

/* For the checksums of large messages. */
static ep_pool *host_pool(const shard *s)
{
    return s->store.ops->pool(s->store.device);
}

void shard_answer_begin(shard *s, shard_flight *f, const void *msg, size_t msg_bytes,
                        uint16_t sender, uint64_t wait_ns, void *reply)
{
    wire_reason why = WIRE_WHY_NONE;
    *f = (shard_flight){.msg_bytes = msg_bytes, .reply = reply, .begin = ep_now()};
    ep_status status = wire_open_on(host_pool(s), msg, msg_bytes, &f->h, &why);
    if (msg_bytes < WIRE_HEADER_BYTES) f->h.router = sender;
    shard_count(&s->counters.wait_ns, wait_ns);
    f->h.wait_ns = wait_ns;
    f->h.compute_ns = 0;
    if (status == EP_OK && f->h.kind == WIRE_HELLO) {
        f->h.shard = (uint16_t)s->shard_i;
        f->h.epoch = s->placement->epoch;
        answer_short(f, WIRE_HELLO, WIRE_WHY_NONE);
        return;
    }
    if (status == EP_OK && f->h.kind != WIRE_SLICE) why = WIRE_WHY_KIND;
    if (why == WIRE_WHY_NONE) why = check_header(s, &f->h);
    if (why == WIRE_WHY_NONE) why = begin_pass(s, msg, &f->h, reply);
    f->is_computing = why == WIRE_WHY_NONE;
    if (!f->is_computing) refuse(s, f, why);
}

void shard_answer_end(shard *s, shard_flight *f)
{
    ep_status status = s->store.ops->ffn_end(s->store.device);
    f->is_computing = false;
    if (status != EP_OK) {
        refuse(s, f, device_failed(s, &f->h, status));
        return;
    }
    /* The device works on one pass at a time: this one since the one before it was over (as far as
     * this thread has looked). Until then it waited. */
    int64_t behind = ep_time_diff_ns(s->computed, f->begin);
    ep_time from = behind > 0 ? s->computed : f->begin;
    if (behind > 0) {
        shard_count(&s->counters.wait_ns, (uint64_t)behind);
        f->h.wait_ns += (uint64_t)behind;
    }
    s->computed = ep_now();
    uint64_t ns = (uint64_t)ep_time_diff_ns(s->computed, from);
    f->reply_bytes = wire_reply_bytes(f->h.hidden, f->h.n_pairs);
    count_slice(s, &f->h, f->msg_bytes, f->reply_bytes, ns);
    f->h.kind = WIRE_REPLY;
    f->h.form = KERN_ACT_F32;
    f->h.reason = WIRE_WHY_NONE;
    f->h.compute_ns = ns;
    wire_seal_on(host_pool(s), f->reply, f->reply_bytes, &f->h);
}

void shard_answer(shard *s, const void *msg, size_t msg_bytes, uint16_t sender, void *reply,
                  size_t *reply_bytes)
{
    shard_flight f;
    shard_answer_begin(s, &f, msg, msg_bytes, sender, 0, reply);
    if (f.is_computing) shard_answer_end(s, &f);
    *reply_bytes = f.reply_bytes;
}
