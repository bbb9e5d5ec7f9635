/*
 * Counted memory. Every allocation of the project passes through `take`, so a test can count them
 * (a step must make none) and the variable EP_ALLOC_FAIL=n can make the n-th fail (every error path
 * must come out clean). Blocks are ordinary malloc memory, aligned to 64 bytes when large enough to
 * be vector data. Arenas and byte buffers stand on the same functions.
 */
#include "base/base.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static atomic_uint_fast64_t n_allocs, n_calls;
static atomic_int_fast64_t fail_at = -1; /* -1: environment not read yet, 0: never */

/* Counts a call and says whether it may succeed. */
static bool take(void)
{
    int_fast64_t at = atomic_load_explicit(&fail_at, memory_order_relaxed);
    if (at < 0) {
        const char *env = getenv("EP_ALLOC_FAIL");
        at = env != NULL ? strtoll(env, NULL, 10) : 0;
        atomic_store(&fail_at, at < 0 ? 0 : at);
    }
    uint_fast64_t call = atomic_fetch_add_explicit(&n_calls, 1, memory_order_relaxed) + 1;
    if (at > 0 && call == (uint_fast64_t)at) return false;
    return true;
}

void ep_alloc_fail_at(int64_t n)
{
    atomic_store(&fail_at, n < 0 ? 0 : n);
    atomic_store(&n_calls, 0);
}

uint64_t ep_alloc_count(void)
{
    return atomic_load_explicit(&n_allocs, memory_order_relaxed);
}

void *ep_alloc(size_t bytes)
{
    if (!take()) return NULL;
    void *p = NULL;
    if (bytes >= 64) {
        if (bytes > SIZE_MAX - 64) return NULL;
        p = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    } else {
        p = malloc(bytes ? bytes : 1);
    }
    if (p != NULL) atomic_fetch_add_explicit(&n_allocs, 1, memory_order_relaxed);
    return p;
}

void *ep_calloc(size_t n, size_t bytes)
{
    size_t total;
    if (__builtin_mul_overflow(n, bytes, &total)) return NULL;
    void *p = ep_alloc(total);
    if (p != NULL) memset(p, 0, total);
    return p;
}

void *ep_grow(void *p, size_t old_bytes, size_t new_bytes)
{
    void *q = ep_alloc(new_bytes);
    if (q == NULL) return NULL;
    size_t keep = old_bytes < new_bytes ? old_bytes : new_bytes;
    if (p != NULL && keep > 0) memcpy(q, p, keep);
    ep_free(p);
    return q;
}

char *ep_strdup(const char *s)
{
    size_t n = strlen(s) + 1;
    char *copy = ep_alloc(n);
    if (copy != NULL) memcpy(copy, s, n);
    return copy;
}

char *ep_strfmt(const char *fmt, ...)
{
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    char *s = n < 0 ? NULL : ep_alloc((size_t)n + 1);
    if (s != NULL) vsnprintf(s, (size_t)n + 1, fmt, again);
    va_end(again);
    return s;
}

void ep_free(void *p)
{
    free(p);
}

void *ep_map(size_t bytes)
{
    if (!take()) return NULL;
    /* Huge pages need 2 MiB alignment; the kernel aligns large anonymous maps by itself. */
    void *p =
        mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (bytes >= (size_t)2 << 20) (void)madvise(p, bytes, MADV_HUGEPAGE);
    atomic_fetch_add_explicit(&n_allocs, 1, memory_order_relaxed);
    return p;
}

void ep_unmap(void *p, size_t bytes)
{
    if (p != NULL) munmap(p, bytes ? bytes : 1);
}

/* ---- arena ---- */

ep_status ep_arena_init(ep_arena *a, size_t bytes)
{
    uint8_t *base = ep_alloc(bytes < 64 ? 64 : bytes);
    if (base == NULL) return EP_ERR_NOMEM;
    *a = (ep_arena){.base = base, .size = bytes};
    return EP_OK;
}

void *ep_arena_get(ep_arena *a, size_t bytes)
{
    if (bytes > SIZE_MAX - 63) return NULL;
    size_t need = (bytes + 63) & ~(size_t)63;
    if (need > a->size - a->used) return NULL;
    void *p = a->base + a->used;
    a->used += need;
    if (a->used > a->peak) a->peak = a->used;
    return p;
}

void ep_arena_reset(ep_arena *a)
{
    a->used = 0;
}

void ep_arena_fini(ep_arena *a)
{
    ep_free(a->base);
    *a = (ep_arena){0};
}

/* ---- byte buffer ---- */

ep_status ep_buf_reserve(ep_buf *b, size_t more)
{
    if (more > SIZE_MAX / 2 - b->len) return EP_ERR_NOMEM;
    size_t need = b->len + more;
    if (need <= b->cap) return EP_OK;
    size_t cap = b->cap ? b->cap : 256;
    while (cap < need)
        cap *= 2;
    uint8_t *data = ep_grow(b->data, b->len, cap);
    if (data == NULL) return EP_ERR_NOMEM;
    b->data = data;
    b->cap = cap;
    return EP_OK;
}

ep_status ep_buf_add(ep_buf *b, const void *p, size_t n)
{
    if (n == 0) return EP_OK;
    ep_status status = ep_buf_reserve(b, n);
    if (status != EP_OK) return status;
    memcpy(b->data + b->len, p, n);
    b->len += n;
    return EP_OK;
}

ep_status ep_buf_printf(ep_buf *b, const char *fmt, ...)
{
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    ep_status status = n < 0 ? EP_ERR_INVALID : ep_buf_reserve(b, (size_t)n + 1);
    if (status == EP_OK) {
        vsnprintf((char *)b->data + b->len, (size_t)n + 1, fmt, again);
        b->len += (size_t)n; /* the terminator stays outside len, so text can be printed */
    }
    va_end(again);
    return status;
}

void ep_buf_fini(ep_buf *b)
{
    ep_free(b->data);
    *b = (ep_buf){0};
}
