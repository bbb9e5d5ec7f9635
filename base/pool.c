/*
 * Worker pool: n - 1 threads that, with the caller, run one function together. A run is announced
 * by a generation counter; workers spin on it briefly, because the next run of a step follows
 * within microseconds, and then sleep on a futex, because an idle daemon must cost nothing. The end
 * of a run and the barrier use the same counted rendezvous. When there are more threads than
 * processors a spinning waiter would keep the others from working, so waiters yield there instead.
 */
#include "base/base.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A pause takes about 50 ns on current processors: 50 us awake between the runs of a step, as the
 * transport does; and a waiter at the barrier soon lets a descheduled thread have its core. */
enum { SPINS_BEFORE_SLEEP = 1000, SPINS_BEFORE_YIELD = 200 };

struct ep_pool {
    int n, n_started;
    ep_pool_fn fn;
    void *arg;
    _Atomic uint32_t generation, sleepers;
    _Atomic uint32_t barrier_count, barrier_phase;
    atomic_bool stop;
    pthread_t *threads;
    struct worker {
        ep_pool *pool;
        int index;
    } * workers;
};

static void pause_cpu(void)
{
    __builtin_ia32_pause();
}

static void wait_generation(ep_pool *p, uint32_t seen)
{
    for (int i = 0; i < SPINS_BEFORE_SLEEP; i++) {
        if (atomic_load_explicit(&p->generation, memory_order_acquire) != seen) return;
        pause_cpu();
    }
    atomic_fetch_add(&p->sleepers, 1);
    while (atomic_load(&p->generation) == seen)
        syscall(SYS_futex, &p->generation, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&p->sleepers, 1);
}

void ep_pool_barrier(ep_pool *p)
{
    if (p == NULL || p->n == 1) return;
    uint32_t phase = atomic_load(&p->barrier_phase);
    if (atomic_fetch_add(&p->barrier_count, 1) + 1 == (uint32_t)p->n) {
        atomic_store(&p->barrier_count, 0);
        atomic_store_explicit(&p->barrier_phase, phase + 1, memory_order_release);
        return;
    }
    for (int i = 0; atomic_load_explicit(&p->barrier_phase, memory_order_acquire) == phase; i++) {
        if (i < SPINS_BEFORE_YIELD)
            pause_cpu();
        else
            sched_yield();
    }
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    ep_pool *p = w->pool;
    uint32_t seen = 0;
    for (;;) {
        wait_generation(p, seen);
        seen++;
        if (atomic_load(&p->stop)) return NULL;
        p->fn(p->arg, w->index, p->n);
        ep_pool_barrier(p);
    }
}

static void announce(ep_pool *p)
{
    atomic_fetch_add(&p->generation, 1);
    if (atomic_load(&p->sleepers) > 0)
        syscall(SYS_futex, &p->generation, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

ep_status ep_pool_open(ep_pool **out, int n_threads)
{
    if (n_threads < 1) return EP_ERR_INVALID;
    ep_pool *p = ep_calloc(1, sizeof(*p));
    if (p == NULL) return EP_ERR_NOMEM;
    ep_status status = EP_ERR_NOMEM;
    p->n = n_threads;
    p->threads = ep_calloc((size_t)n_threads, sizeof(*p->threads));
    p->workers = ep_calloc((size_t)n_threads, sizeof(*p->workers));
    if (p->threads == NULL || p->workers == NULL) goto fail;
    for (int i = 1; i < n_threads; i++) {
        p->workers[i] = (struct worker){.pool = p, .index = i};
        if (pthread_create(&p->threads[i], NULL, worker_main, &p->workers[i]) != 0) goto fail;
        p->n_started++;
    }
    *out = p;
    return EP_OK;
fail:
    ep_pool_close(p);
    return status;
}

int ep_pool_size(const ep_pool *p)
{
    return p == NULL ? 1 : p->n;
}

void ep_pool_run(ep_pool *p, ep_pool_fn fn, void *arg)
{
    if (p == NULL || p->n == 1) {
        fn(arg, 0, 1);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    announce(p);
    fn(arg, 0, p->n);
    ep_pool_barrier(p);
}

void ep_pool_close(ep_pool *p)
{
    if (p == NULL) return;
    atomic_store(&p->stop, true);
    announce(p);
    for (int i = 1; i <= p->n_started; i++)
        pthread_join(p->threads[i], NULL);
    ep_free(p->threads);
    ep_free(p->workers);
    ep_free(p);
}
