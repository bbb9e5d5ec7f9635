/*
 * kv: the memory of keys and values. One mapping cut into pages; a sequence holds pages in the
 * order of its positions. A sequence is admitted only when all pages it can ever need are reserved,
 * and takes them one by one as it grows: so a running sequence never waits for memory and nothing
 * deadlocks. A page comes back dirty; every position is written before it is read.
 */
#include <string.h>

#include "router_node/internal.h"

ep_status router_kv_open(router_kv *kv, const model_shape *shape, int n_tokens)
{
    memset(kv, 0, sizeof(*kv));
    kv->n_pages = kv->n_free = n_tokens / ROUTER_PAGE_TOKENS;
    kv->stride = 2 * (size_t)shape->n_kv_heads * (size_t)shape->head_dim;
    kv->layer_floats = ROUTER_PAGE_TOKENS * kv->stride;
    kv->page_floats = kv->layer_floats * (size_t)shape->n_layers;
    kv->bytes = kv->page_floats * sizeof(float) * (size_t)kv->n_pages;
    kv->free_pages = ep_calloc((size_t)kv->n_pages, sizeof(int32_t));
    kv->base = ep_map(kv->bytes);
    if (kv->base == NULL || kv->free_pages == NULL) {
        router_kv_close(kv);
        return EP_ERR_NOMEM;
    }
    for (int i = 0; i < kv->n_pages; i++)
        kv->free_pages[i] = kv->n_pages - 1 - i;
    return EP_OK;
}

void router_kv_close(router_kv *kv)
{
    if (kv->base != NULL) ep_unmap(kv->base, kv->bytes);
    ep_free(kv->free_pages);
    memset(kv, 0, sizeof(*kv));
}

bool router_kv_reserve(router_kv *kv, int n_pages)
{
    if (n_pages > kv->n_pages - kv->n_reserved) return false;
    kv->n_reserved += n_pages;
    return true;
}

float *router_kv_take(router_kv *kv)
{
    return kv->base + (size_t)kv->free_pages[--kv->n_free] * kv->page_floats;
}

void router_kv_release(router_kv *kv, float *const *pages, int n_taken, int n_reserved)
{
    for (int i = n_taken; i-- > 0;)
        kv->free_pages[kv->n_free++] = (int32_t)((size_t)(pages[i] - kv->base) / kv->page_floats);
    kv->n_reserved -= n_reserved;
}
