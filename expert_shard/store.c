/*
 * The expert store: opens the device, makes room for the owned experts of every layer, and packs
 * them from the mapped file. Work items are (layer, expert), handed out by a counter, so that
 * threads finish together whatever the sizes are. Invariant: only the bytes of owned experts are
 * read, and their file pages leave this process's memory as soon as they are packed; what stays
 * resident is the packed copy. (The page cache keeps the file for the next shard of this machine.)
 *
 * It does not decide who owns what (placement) and does not check the model's shapes a second time
 * beyond what packing needs.
 */
#include "expert_shard/store.h"

#include <stdlib.h>
#include <string.h>

typedef struct load_job {
    shard_store *store;
    const model *m;
    atomic_int next_item, failed;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    int n_done, n_workers;
    int n_reported; /* the caller's alone: of n_done, what progress has told */
    uint64_t done_bytes, all_bytes;
    ep_status status; /* the first failure */
    ep_err err;
    void (*progress)(void *arg, uint64_t done_bytes, uint64_t all_bytes);
    void *progress_arg;
} load_job;

/* Of one expert, by its shape. */
static size_t rows_bytes(const model_tensor *t)
{
    return kern_type_row_bytes(t->type, (int)t->ne[0]) * (size_t)t->ne[1];
}

/* made: for rows that are not in the file as they are needed, by role; kept from call to call. */
static ep_status load_expert(load_job *job, int layer, int local, ep_buf made[3],
                             uint64_t *bytes_read, ep_err *err)
{
    shard_store *s = job->store;
    int expert = s->experts[local];
    const model_tensor *t[3];
    const uint8_t *rows[3];
    uint64_t *checksum = &s->checksums[(size_t)layer * (size_t)s->n_owned + (size_t)local];
    *bytes_read = 0;
    for (int role = 0; role < 3; role++) {
        t[role] = model_experts(job->m, layer, role);
        size_t have = model_rows_bytes(t[role]), want = rows_bytes(t[role]);
        if (have != want || want == 0)
            return ep_fail(err, EP_ERR_INVALID,
                           "layer %d, tensor %s, expert %d: %zu bytes in the file, expected %zu",
                           layer, t[role]->name, expert, have, want);
        *bytes_read += want;
    }
    if (s->cache != NULL)
        return shard_cache_map(s->cache, s->ops, s->stacks[layer], layer, expert, local, checksum,
                               err);
    for (int role = 0; role < 3; role++) {
        ep_status status = model_rows(job->m, t[role], expert, &made[role], &rows[role], err);
        if (status != EP_OK) return status;
    }
    ep_status status =
        s->ops->stack_load(s->stacks[layer], local, rows[0], rows[1], rows[2], checksum);
    for (int role = 0; role < 3; role++)
        model_forget(job->m, t[role], expert);
    if (status != EP_OK)
        return ep_fail(err, status, "layer %d, tensor %s (and up, down), expert %d: packing: %s",
                       layer, t[0]->name, expert, ep_status_name(status));
    return EP_OK;
}

/* Takes items until there are none. The calling thread of shard_open reports progress. */
static void work(load_job *job, bool is_caller)
{
    shard_store *s = job->store;
    int n_items = s->n_layers * s->n_owned;
    ep_buf made[3] = {{0}};
    while (!atomic_load_explicit(&job->failed, memory_order_relaxed)) {
        int item = atomic_fetch_add_explicit(&job->next_item, 1, memory_order_relaxed);
        if (item >= n_items) break;
        ep_err err = {{0}};
        uint64_t bytes;
        ep_status status =
            load_expert(job, item / s->n_owned, item % s->n_owned, made, &bytes, &err);
        pthread_mutex_lock(&job->lock);
        if (status == EP_OK) {
            job->n_done++;
            job->done_bytes += bytes;
        } else {
            if (job->status == EP_OK) {
                job->status = status;
                job->err = err;
            }
            atomic_store(&job->failed, 1);
        }
        uint64_t done = job->done_bytes;
        if (is_caller) job->n_reported = job->n_done;
        pthread_cond_signal(&job->changed);
        pthread_mutex_unlock(&job->lock);
        if (is_caller && status == EP_OK && job->progress != NULL)
            job->progress(job->progress_arg, done, job->all_bytes);
    }
    for (int role = 0; role < 3; role++)
        ep_buf_fini(&made[role]);
}

static void *worker_main(void *arg)
{
    load_job *job = arg;
    work(job, false);
    pthread_mutex_lock(&job->lock);
    job->n_workers--;
    pthread_cond_signal(&job->changed);
    pthread_mutex_unlock(&job->lock);
    return NULL;
}

/* The caller has run out of items: reports what the others still finish, and what they finished
 * between the caller's last report and now. */
static void wait_for_workers(load_job *job)
{
    pthread_mutex_lock(&job->lock);
    for (;;) {
        if (job->n_done > job->n_reported && job->progress != NULL) {
            job->n_reported = job->n_done;
            uint64_t done = job->done_bytes;
            pthread_mutex_unlock(&job->lock);
            job->progress(job->progress_arg, done, job->all_bytes);
            pthread_mutex_lock(&job->lock);
        } else if (job->n_workers > 0) {
            pthread_cond_wait(&job->changed, &job->lock);
        } else {
            break;
        }
    }
    pthread_mutex_unlock(&job->lock);
}

static uint64_t owned_file_bytes(const shard_store *s, const model *m)
{
    uint64_t all = 0;
    for (int l = 0; l < s->n_layers; l++)
        for (int role = 0; role < 3; role++)
            all += (uint64_t)rows_bytes(model_experts(m, l, role)) * (uint64_t)s->n_owned;
    return all;
}

static ep_status load_all(shard_store *s, const shard_options *opt, ep_err *err)
{
    load_job job = {.store = s,
                    .m = opt->m,
                    .all_bytes = owned_file_bytes(s, opt->m),
                    .progress = opt->progress,
                    .progress_arg = opt->progress_arg};
    int n_items = s->n_layers * s->n_owned;
    int n_workers = opt->n_threads - 1 < n_items - 1 ? opt->n_threads - 1 : n_items - 1;
    pthread_t *threads = ep_calloc(n_workers > 0 ? (size_t)n_workers : 0, sizeof(*threads));
    if (threads == NULL) return ep_fail(err, EP_ERR_NOMEM, "no memory to load experts");
    pthread_mutex_init(&job.lock, NULL);
    pthread_cond_init(&job.changed, NULL);

    /* A thread that cannot be had costs time only. */
    int n_started = 0;
    for (int i = 0; i < n_workers; i++) {
        pthread_mutex_lock(&job.lock);
        job.n_workers++;
        pthread_mutex_unlock(&job.lock);
        if (pthread_create(&threads[n_started], NULL, worker_main, &job) == 0) {
            n_started++;
            continue;
        }
        pthread_mutex_lock(&job.lock);
        job.n_workers--;
        pthread_mutex_unlock(&job.lock);
        break;
    }
    work(&job, true);
    wait_for_workers(&job);
    for (int i = 0; i < n_started; i++)
        pthread_join(threads[i], NULL);

    pthread_cond_destroy(&job.changed);
    pthread_mutex_destroy(&job.lock);
    ep_free(threads);
    if (job.status != EP_OK) return ep_fail(err, job.status, "%s", job.err.text);
    return EP_OK;
}

static ep_status open_stacks(shard_store *s, const model *m, ep_err *err)
{
    for (int l = 0; l < s->n_layers; l++) {
        const model_layer *layer = &m->layers[l];
        s->forms[l] = kern_gate_up_act(layer->gate_exps->type, layer->up_exps->type);
        if (s->n_owned == 0) continue;
        compute_shape shape = {.gate_type = layer->gate_exps->type,
                               .up_type = layer->up_exps->type,
                               .down_type = layer->down_exps->type,
                               .hidden = m->shape.hidden,
                               .inter = m->shape.inter,
                               .n_experts = s->n_owned,
                               .paged = s->cache != NULL};
        ep_err why = {{0}};
        ep_status status = s->ops->stack_open(s->device, &shape, &s->stacks[l], &why);
        if (status != EP_OK)
            return ep_fail(err, status,
                           "layer %d, tensors %s, %s, %s, experts %d..%d (%d owned): %s", l,
                           layer->gate_exps->name, layer->up_exps->name, layer->down_exps->name,
                           s->experts[0], s->experts[s->n_owned - 1], s->n_owned,
                           why.text[0] != '\0' ? why.text : ep_status_name(status));
        s->forms[l] = s->ops->stack_act(s->stacks[l]);
        s->weight_bytes += s->ops->stack_bytes(s->stacks[l]);
    }
    return EP_OK;
}

ep_status shard_store_init(shard_store *s, const shard_options *opt, ep_err *err)
{
    const model *m = opt->m;
    const model_placement *p = opt->placement;
    s->n_layers = m->shape.n_layers;
    s->n_owned = p->n_owned[opt->shard_i];
    size_t n_layers = (size_t)s->n_layers, n_owned = (size_t)s->n_owned;
    s->experts = ep_calloc(n_owned, sizeof(*s->experts));
    s->stacks = ep_calloc(n_layers, sizeof(compute_stack *));
    s->forms = ep_calloc(n_layers, sizeof(*s->forms));
    s->checksums = ep_calloc(n_layers * n_owned, sizeof(*s->checksums));
    if (s->experts == NULL || s->stacks == NULL || s->forms == NULL || s->checksums == NULL)
        return ep_fail(err, EP_ERR_NOMEM, "no memory for the expert store");
    int n_found = 0;
    for (int e = 0; e < p->n_experts; e++) {
        if (p->owner[e] != opt->shard_i) continue;
        if (n_found >= s->n_owned || p->local[e] != n_found)
            return ep_fail(err, EP_ERR_BUG,
                           "placement: expert %d of shard %d is not in local order", e,
                           opt->shard_i);
        s->experts[n_found++] = (int16_t)e;
    }
    if (n_found != s->n_owned)
        return ep_fail(err, EP_ERR_BUG, "placement: shard %d owns %d experts, %d expected",
                       opt->shard_i, n_found, s->n_owned);

    ep_status status = compute_open(&s->ops, &s->device, opt->device, opt->n_threads, err);
    if (status != EP_OK) return status;
    if (opt->packed != NULL && s->ops->stack_map == NULL)
        log_info("device %s packs its own layout: %s is not used", opt->device, opt->packed);
    else if (opt->packed != NULL)
        status = shard_cache_open(&s->cache, opt->packed, m, err);
    if (status == EP_OK) status = open_stacks(s, m, err);
    if (status == EP_OK && s->n_owned > 0) status = load_all(s, opt, err);
    shard_cache_close(s->cache); /* the maps stay */
    s->cache = NULL;
    return status;
}

void shard_store_fini(shard_store *s)
{
    for (int l = 0; s->stacks != NULL && l < s->n_layers; l++)
        if (s->stacks[l] != NULL) s->ops->stack_close(s->stacks[l]);
    if (s->device != NULL) s->ops->close(s->device);
    ep_free(s->experts);
    ep_free(s->stacks);
    ep_free(s->forms);
    ep_free(s->checksums);
    *s = (shard_store){0};
}
