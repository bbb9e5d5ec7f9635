/* base: cursors, counted memory, arena, buffer, pool and queue. */
#include "base/base.h"
#include "tests/test.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

static void cursor_is_sticky(void)
{
    const uint8_t bytes[] = {1, 2, 0, 3, 0, 0, 0, 9};
    ep_cursor c = ep_cursor_make(bytes, sizeof(bytes));
    CHECK_INT(ep_get_u8(&c), 1);
    CHECK_INT(ep_get_u16(&c), 2);
    CHECK_INT(ep_get_u32(&c), 3);
    CHECK_INT(ep_cursor_left(&c), 1);
    CHECK_INT(ep_get_u64(&c), 0);
    CHECK(c.bad);
    CHECK_INT(ep_get_u8(&c), 0); /* one byte is left, but the cursor is bad */
    CHECK(ep_get_bytes(&c, 0) == NULL);
}

static void memory_counts_and_fails(void)
{
    uint64_t before = ep_alloc_count();
    void *p = ep_alloc(100), *q = ep_calloc(3, 40);
    CHECK_INT(ep_alloc_count() - before, 2);
    CHECK_INT((uintptr_t)p % 64, 0);
    CHECK_INT(((char *)q)[119], 0);
    CHECK(ep_calloc(SIZE_MAX / 2, 4) == NULL);
    ep_alloc_fail_at(2);
    void *a = ep_alloc(8), *b = ep_alloc(8), *d = ep_alloc(8);
    CHECK(a != NULL && b == NULL && d != NULL);
    ep_alloc_fail_at(0);
    ep_free(a);
    ep_free(d);
    ep_free(p);
    ep_free(q);
}

static void arena_gives_and_resets(void)
{
    ep_arena a;
    CHECK_INT(ep_arena_init(&a, 256), EP_OK);
    void *p = ep_arena_get(&a, 1);
    CHECK(p != NULL && ep_arena_get(&a, 100) != NULL);
    CHECK(ep_arena_get(&a, 128) == NULL);
    ep_arena_reset(&a);
    CHECK(ep_arena_get(&a, 256) == p);
    CHECK_INT(a.peak, 256);
    ep_arena_fini(&a);
}

static void buffer_grows(void)
{
    ep_buf b = {0};
    for (int i = 0; i < 1000; i++)
        CHECK_INT(ep_buf_printf(&b, "%d,", i), EP_OK);
    CHECK_INT(b.len, 10 * 2 + 90 * 3 + 900 * 4);
    CHECK(memcmp(b.data, "0,1,2,", 6) == 0);
    ep_buf_fini(&b);
}

enum { ROUNDS = 200 };
typedef struct pool_work {
    ep_pool *pool;
    atomic_int hits[8];
    int sums[8], total;
} pool_work;

static void pool_fn(void *arg, int i, int n)
{
    pool_work *w = arg;
    atomic_fetch_add(&w->hits[i], 1);
    w->sums[i] = i + 1;
    ep_pool_barrier(w->pool);
    if (i == n - 1) { /* sees what the others wrote before the barrier */
        w->total = 0;
        for (int j = 0; j < n; j++)
            w->total += w->sums[j];
    }
}

static void pool_runs_on_all(void)
{
    for (int n = 1; n <= 4; n++) {
        pool_work w = {0};
        CHECK_INT(ep_pool_open(&w.pool, n), EP_OK);
        for (int r = 0; r < ROUNDS; r++) {
            w.total = -1;
            ep_pool_run(w.pool, pool_fn, &w);
            CHECK_INT(w.total, n * (n + 1) / 2);
        }
        for (int i = 0; i < n; i++)
            CHECK_INT(atomic_load(&w.hits[i]), ROUNDS);
        ep_pool_close(w.pool);
    }
}

static atomic_int wakes;
static void count_wake(void *arg)
{
    (void)arg;
    atomic_fetch_add(&wakes, 1);
}

static void *producer(void *arg)
{
    static int items[1000];
    for (int i = 0; i < 1000; i++) {
        items[i] = i;
        while (ep_queue_push(arg, &items[i]) == EP_ERR_BUSY)
            sched_yield();
    }
    return NULL;
}

static void queue_keeps_order(void)
{
    ep_queue *q;
    CHECK_INT(ep_queue_open(&q, 7, count_wake, NULL), EP_OK);
    pthread_t t;
    pthread_create(&t, NULL, producer, q);
    for (int i = 0; i < 1000;) {
        void *item;
        if (ep_queue_pop(q, &item) != EP_OK) {
            sched_yield();
            continue;
        }
        CHECK_INT(*(int *)item, i);
        i++;
    }
    pthread_join(t, NULL);
    CHECK_INT(atomic_load(&wakes), 1000);
    void *item;
    CHECK_INT(ep_queue_pop(q, &item), EP_AGAIN);
    ep_queue_close(q);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"cursor_is_sticky", cursor_is_sticky},
        {"memory_counts_and_fails", memory_counts_and_fails},
        {"arena_gives_and_resets", arena_gives_and_resets},
        {"buffer_grows", buffer_grows},
        {"pool_runs_on_all", pool_runs_on_all},
        {"queue_keeps_order", queue_keeps_order},
    };
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
