/*
 * The packed cache. Writing packs one expert at a time per thread, so memory stays small whatever
 * the model; the file gets its final name only when it is complete and on disk. Reading trusts
 * nothing: places, strides and sizes must be those that the model's shape gives, and each expert's
 * bytes must have their checksum.
 */
#include "expert_shard/cache.h"
#include "kernels/kernels.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

enum { HEADER_BYTES = 64, LAYER_BYTES = 48, VERSION = 1 };
#define MAGIC 0x6b63617064656f6dull /* "moedpack" */

typedef struct layer_place {
    uint32_t types[3];
    uint64_t gate_up_at, gate_up_stride, down_at, down_stride;
} layer_place;

struct shard_cache {
    int fd, n_layers, n_experts;
    char *path;
    layer_place *layers;
    uint64_t *checksums; /* [n_layers * n_experts] */
};

static uint64_t pages(uint64_t bytes)
{
    return (bytes + KERN_PAGE - 1) / KERN_PAGE * KERN_PAGE;
}

/* Where everything of a model lies: writer and reader compute the same. Returns the size of the
 * file. */
static uint64_t place_all(const model *m, layer_place *layers)
{
    const model_shape *s = &m->shape;
    uint64_t n = (uint64_t)s->n_experts;
    uint64_t at = pages(HEADER_BYTES + (uint64_t)s->n_layers * (LAYER_BYTES + 8 * n) + 8);
    for (int l = 0; l < s->n_layers; l++) {
        const model_layer *y = &m->layers[l];
        layer_place *p = &layers[l];
        kern_stack shape;
        kern_stack_shape(&shape, y->gate_exps->type, y->up_exps->type, y->down_exps->type,
                         s->hidden, s->inter, s->n_experts);
        *p = (layer_place){.types = {(uint32_t)shape.gate_type, (uint32_t)shape.up_type,
                                     (uint32_t)shape.down_type},
                           .gate_up_stride = pages(shape.gate_up_stride),
                           .down_stride = pages(shape.down_stride)};
        p->gate_up_at = at;
        p->down_at = at + n * p->gate_up_stride;
        at = p->down_at + n * p->down_stride;
    }
    return at;
}

static uint64_t head_bytes(const model *m)
{
    return HEADER_BYTES +
           (uint64_t)m->shape.n_layers * (LAYER_BYTES + 8 * (uint64_t)m->shape.n_experts) + 8;
}

/* The head of the file from what the model says and the checksums. */
static void encode_head(const model *m, const layer_place *layers, const uint64_t *checksums,
                        uint8_t *out)
{
    const model_shape *s = &m->shape;
    uint64_t n = head_bytes(m);
    memset(out, 0, n);
    ep_store_le(out, MAGIC, 8);
    ep_store_le(out + 8, VERSION, 4);
    ep_store_le(out + 12, KERN_PACK_VERSION, 4);
    ep_store_le(out + 16, m->digest, 8);
    ep_store_le(out + 24, (uint64_t)s->n_layers, 4);
    ep_store_le(out + 28, (uint64_t)s->n_experts, 4);
    ep_store_le(out + 32, (uint64_t)s->hidden, 4);
    ep_store_le(out + 36, (uint64_t)s->inter, 4);
    uint8_t *at = out + HEADER_BYTES;
    for (int l = 0; l < s->n_layers; l++, at += LAYER_BYTES) {
        for (int i = 0; i < 3; i++)
            ep_store_le(at + 4 * i, layers[l].types[i], 4);
        ep_store_le(at + 16, layers[l].gate_up_at, 8);
        ep_store_le(at + 24, layers[l].gate_up_stride, 8);
        ep_store_le(at + 32, layers[l].down_at, 8);
        ep_store_le(at + 40, layers[l].down_stride, 8);
    }
    for (int i = 0; i < s->n_layers * s->n_experts; i++, at += 8)
        ep_store_le(at, checksums[i], 8);
    ep_store_le(at, XXH3_64bits(out, n - 8), 8);
}

/* ---- writing ---- */

typedef struct write_job {
    const model *m;
    const layer_place *layers;
    uint64_t *checksums;
    int fd;
    const char *path;
    atomic_int next, done;
    atomic_bool failed;
    pthread_mutex_t lock; /* guards what follows: the first failure */
    ep_status status;
    ep_err err;
} write_job;

static bool write_at(int fd, const uint8_t *p, size_t n, uint64_t at)
{
    while (n > 0) {
        ssize_t w = pwrite(fd, p, n, (off_t)at);
        if (w < 0 && errno == EINTR) continue;
        if (w <= 0) return false;
        p += w;
        n -= (size_t)w;
        at += (uint64_t)w;
    }
    return true;
}

/* buffer: one packed expert; made: its rows where they are made, by role. */
static ep_status write_expert(write_job *job, int layer, int expert, uint8_t *buffer,
                              ep_buf made[3], ep_err *err)
{
    const model *m = job->m;
    const layer_place *p = &job->layers[layer];
    const uint8_t *rows[3];
    kern_stack s;
    kern_stack_shape(&s, (int)p->types[0], (int)p->types[1], (int)p->types[2], m->shape.hidden,
                     m->shape.inter, 1);
    s.gate_up = buffer;
    s.down = buffer + p->gate_up_stride;
    memset(buffer, 0, p->gate_up_stride + p->down_stride); /* padding is part of the file */
    for (int role = 0; role < 3; role++) {
        ep_status status =
            model_rows(m, model_experts(m, layer, role), expert, &made[role], &rows[role], err);
        if (status != EP_OK) return status;
    }
    kern_stack_put(&s, 0, rows[0], rows[1], rows[2]);
    job->checksums[layer * m->shape.n_experts + expert] = kern_stack_checksum(&s, 0);
    uint64_t e = (uint64_t)expert;
    if (write_at(job->fd, s.gate_up, p->gate_up_stride, p->gate_up_at + e * p->gate_up_stride) &&
        write_at(job->fd, s.down, p->down_stride, p->down_at + e * p->down_stride))
        return EP_OK;
    return ep_fail(err, EP_ERR_IO, "%s: %s", job->path, strerror(errno != 0 ? errno : EIO));
}

static void write_failed(write_job *job, ep_status status, const ep_err *err)
{
    pthread_mutex_lock(&job->lock);
    if (job->status == EP_OK) {
        job->status = status;
        job->err = *err;
    }
    pthread_mutex_unlock(&job->lock);
    atomic_store(&job->failed, true);
}

static void *write_main(void *arg)
{
    write_job *job = arg;
    const model_shape *s = &job->m->shape;
    ep_buf made[3] = {{0}};
    ep_err err = {{0}};
    size_t most = 0;
    for (int l = 0; l < s->n_layers; l++) {
        size_t n = job->layers[l].gate_up_stride + job->layers[l].down_stride;
        if (n > most) most = n;
    }
    uint8_t *buffer = ep_alloc(most);
    if (buffer == NULL)
        write_failed(job, ep_fail(&err, EP_ERR_NOMEM, "%s: no memory", job->path), &err);
    while (!atomic_load(&job->failed)) {
        int i = atomic_fetch_add(&job->next, 1);
        if (i >= s->n_layers * s->n_experts) break;
        ep_status status =
            write_expert(job, i / s->n_experts, i % s->n_experts, buffer, made, &err);
        if (status != EP_OK) write_failed(job, status, &err);
        atomic_fetch_add(&job->done, 1);
    }
    ep_free(buffer);
    for (int role = 0; role < 3; role++)
        ep_buf_fini(&made[role]);
    return NULL;
}

static void run_threads(write_job *job, int n_threads, void (*progress)(void *, uint64_t, uint64_t),
                        void *arg, uint64_t all_bytes)
{
    enum { MAX_THREADS = 256 };
    pthread_t threads[MAX_THREADS];
    int n = 0, items = job->m->shape.n_layers * job->m->shape.n_experts;
    while (n < n_threads && n < MAX_THREADS &&
           pthread_create(&threads[n], NULL, write_main, job) == 0)
        n++;
    if (n == 0) write_main(job);
    while (progress != NULL && atomic_load(&job->done) < items && !atomic_load(&job->failed)) {
        progress(arg, all_bytes / (uint64_t)items * (uint64_t)atomic_load(&job->done), all_bytes);
        usleep(50000);
    }
    for (int i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
    if (progress != NULL && !atomic_load(&job->failed)) progress(arg, all_bytes, all_bytes);
}

ep_status shard_cache_write(const model *m, const char *path, int n_threads,
                            void (*progress)(void *arg, uint64_t done, uint64_t all), void *arg,
                            ep_err *err)
{
    ep_status status = EP_ERR_NOMEM;
    size_t n_experts = (size_t)m->shape.n_layers * (size_t)m->shape.n_experts;
    layer_place *layers = ep_calloc((size_t)m->shape.n_layers, sizeof(*layers));
    uint64_t *checksums = ep_calloc(n_experts, sizeof(*checksums));
    uint8_t *head = ep_alloc(head_bytes(m));
    char *temporary = ep_strfmt("%s.part%ld", path, (long)getpid());
    int fd = -1;
    if (layers == NULL || checksums == NULL || head == NULL || temporary == NULL) {
        ep_fail(err, status, "%s: no memory", path);
        goto done;
    }
    status = EP_ERR_IO;
    fd = open(temporary, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) {
        ep_fail(err, status, "%s: %s", temporary, strerror(errno));
        goto done;
    }
    uint64_t size = place_all(m, layers);
    write_job job = {.m = m,
                     .layers = layers,
                     .checksums = checksums,
                     .fd = fd,
                     .path = path,
                     .lock = PTHREAD_MUTEX_INITIALIZER};
    run_threads(&job, n_threads, progress, arg, size);
    status = job.status;
    if (status == EP_OK) {
        encode_head(m, layers, checksums, head);
        if (!write_at(fd, head, head_bytes(m), 0) || ftruncate(fd, (off_t)size) != 0 ||
            fsync(fd) != 0 || rename(temporary, path) != 0)
            status = ep_fail(err, EP_ERR_IO, "%s: %s", path, strerror(errno != 0 ? errno : EIO));
    } else {
        ep_fail(err, status, "%s", job.err.text);
    }
    if (status != EP_OK) unlink(temporary);
done:
    if (fd >= 0) close(fd);
    ep_free(layers);
    ep_free(checksums);
    ep_free(head);
    ep_free(temporary);
    return status;
}

/* ---- reading ---- */

/* The head must be exactly what this model and this program would write, checksums aside. */
static ep_status check_head(shard_cache *c, const model *m, uint8_t *head, uint8_t *expected,
                            uint64_t size, ep_err *err)
{
    uint64_t n = head_bytes(m);
    if (ep_load_le(head, 8) != MAGIC)
        return ep_fail(err, EP_ERR_INVALID, "%s: not a packed cache", c->path);
    if (ep_load_le(head + 8, 4) != VERSION || ep_load_le(head + 12, 4) != KERN_PACK_VERSION)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: made by another version of moed; run moectl pack again", c->path);
    if (ep_load_le(head + 16, 8) != m->digest)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: made from another model file; run moectl pack again", c->path);
    if (ep_load_le(head + n - 8, 8) != XXH3_64bits(head, n - 8))
        return ep_fail(err, EP_ERR_INVALID, "%s: its head is damaged", c->path);
    const uint8_t *sums = head + HEADER_BYTES + (size_t)c->n_layers * LAYER_BYTES;
    for (int i = 0; i < c->n_layers * c->n_experts; i++)
        c->checksums[i] = ep_load_le(sums + 8 * i, 8);
    uint64_t want = place_all(m, c->layers);
    encode_head(m, c->layers, c->checksums, expected);
    if (memcmp(head, expected, n) != 0)
        return ep_fail(err, EP_ERR_INVALID, "%s: its head does not fit the model", c->path);
    if (size != want)
        return ep_fail(err, EP_ERR_INVALID, "%s: %llu bytes, expected %llu", c->path,
                       (unsigned long long)size, (unsigned long long)want);
    return EP_OK;
}

ep_status shard_cache_open(shard_cache **out, const char *path, const model *m, ep_err *err)
{
    shard_cache *c = ep_calloc(1, sizeof(*c));
    uint8_t *head = ep_calloc(1, head_bytes(m)), *expected = ep_alloc(head_bytes(m));
    ep_status status = EP_ERR_NOMEM;
    struct stat st;
    if (c == NULL) goto fail;
    c->fd = -1;
    c->n_layers = m->shape.n_layers;
    c->n_experts = m->shape.n_experts;
    c->path = ep_strdup(path);
    c->layers = ep_calloc((size_t)c->n_layers, sizeof(*c->layers));
    c->checksums = ep_calloc((size_t)c->n_layers * (size_t)c->n_experts, sizeof(*c->checksums));
    if (head == NULL || expected == NULL || c->path == NULL || c->layers == NULL ||
        c->checksums == NULL)
        goto fail;
    status = EP_ERR_INVALID;
    c->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (c->fd < 0 || fstat(c->fd, &st) != 0) {
        ep_fail(err, status, "%s: %s", path, strerror(errno));
        goto fail;
    }
    ssize_t got = pread(c->fd, head, head_bytes(m), 0);
    if (got < HEADER_BYTES) {
        ep_fail(err, status, "%s: not a packed cache", path);
        goto fail;
    }
    status = check_head(c, m, head, expected, (uint64_t)st.st_size, err);
    if (status != EP_OK) goto fail;
    ep_free(head);
    ep_free(expected);
    *out = c;
    return EP_OK;
fail:
    if (status == EP_ERR_NOMEM) ep_fail(err, status, "%s: no memory", path);
    ep_free(head);
    ep_free(expected);
    shard_cache_close(c);
    return status;
}

void shard_cache_close(shard_cache *c)
{
    if (c == NULL) return;
    if (c->fd >= 0) close(c->fd);
    ep_free(c->path);
    ep_free(c->layers);
    ep_free(c->checksums);
    ep_free(c);
}

ep_status shard_cache_map(const shard_cache *c, const compute_ops *ops, compute_stack *s, int layer,
                          int expert, int local, uint64_t *checksum, ep_err *err)
{
    const layer_place *p = &c->layers[layer];
    uint64_t e = (uint64_t)expert, want = c->checksums[layer * c->n_experts + expert];
    ep_status status = ops->stack_map(s, local, c->fd, p->gate_up_at + e * p->gate_up_stride,
                                      p->down_at + e * p->down_stride);
    if (status != EP_OK)
        return ep_fail(err, status, "%s: layer %d, expert %d: cannot be mapped: %s", c->path, layer,
                       expert, strerror(errno));
    *checksum = ops->stack_checksum(s, local);
    if (*checksum != want)
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: layer %d, expert %d is damaged (checksum); run moectl pack again",
                       c->path, layer, expert);
    return EP_OK;
}
