/*
 * Bounded queue of pointers between threads: a ring under a mutex. Messages are requests, tokens
 * and statistics, thousands a second at most, so a lock is simple and enough. Waking the consumer
 * is the owner's business (`wake`), because an engine sleeps in its transport, not here.
 */
#include "base/base.h"

#include <pthread.h>

struct ep_queue {
    pthread_mutex_t lock;
    size_t cap, head, len;
    void (*wake)(void *);
    void *wake_arg;
    void *items[];
};

ep_status ep_queue_open(ep_queue **out, size_t cap, void (*wake)(void *), void *wake_arg)
{
    if (cap == 0 || cap > SIZE_MAX / sizeof(void *) / 2) return EP_ERR_INVALID;
    ep_queue *q = ep_calloc(1, sizeof(*q) + cap * sizeof(void *));
    if (q == NULL) return EP_ERR_NOMEM;
    if (pthread_mutex_init(&q->lock, NULL) != 0) {
        ep_free(q);
        return EP_ERR_NOMEM;
    }
    q->cap = cap;
    q->wake = wake;
    q->wake_arg = wake_arg;
    *out = q;
    return EP_OK;
}

ep_status ep_queue_push(ep_queue *q, void *item)
{
    pthread_mutex_lock(&q->lock);
    bool full = q->len == q->cap;
    if (!full) q->items[(q->head + q->len++) % q->cap] = item;
    pthread_mutex_unlock(&q->lock);
    if (full) return EP_ERR_BUSY;
    if (q->wake != NULL) q->wake(q->wake_arg);
    return EP_OK;
}

ep_status ep_queue_pop(ep_queue *q, void **item)
{
    ep_status status = EP_AGAIN;
    pthread_mutex_lock(&q->lock);
    if (q->len > 0) {
        *item = q->items[q->head];
        q->head = (q->head + 1) % q->cap;
        q->len--;
        status = EP_OK;
    }
    pthread_mutex_unlock(&q->lock);
    return status;
}

void ep_queue_close(ep_queue *q)
{
    if (q == NULL) return;
    pthread_mutex_destroy(&q->lock);
    ep_free(q);
}
