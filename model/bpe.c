/*
 * Byte-pair merging. A word is a doubly linked list of symbols in an array; all adjacent pairs that
 * have a merge wait in a heap ordered by (rank, position). Taking the least, merging it and adding
 * its two new neighbours costs O(log n), so a word of 64 kB is not slower per byte than a short
 * one.
 *
 * Invariant: an entry of the heap is acted on only if its left symbol still holds the id it was
 * entered with and is still followed by the right id; entries made stale by other merges are
 * dropped when they come up. A position's symbol keeps the position of its first byte, so ties fall
 * to the left.
 *
 * What it does not do: cut text into words (pretokenize.c), know token texts (tokenizer.c).
 */
#include "model/bpe.h"

#include <string.h>

struct bpe_symbol {
    int32_t id;
    int32_t prev, next; /* -1: none; id -1: merged away */
};

struct bpe_candidate {
    int32_t rank, at;
    int32_t left, right, id;
};

/* ---- lists of ids ---- */

ep_status model_ids_reserve(model_ids *ids, size_t more)
{
    if (more <= ids->cap - ids->n) return EP_OK;
    if (more > SIZE_MAX / 16 - ids->n) return EP_ERR_NOMEM;
    size_t need = ids->n + more, cap = ids->cap + ids->cap / 2 + 16;
    if (cap < need) cap = need;
    int32_t *at = ep_grow(ids->at, ids->n * sizeof(*at), cap * sizeof(*at));
    if (at == NULL) return EP_ERR_NOMEM;
    ids->at = at;
    ids->cap = cap;
    return EP_OK;
}

/* ---- merges ---- */

ep_status model_merges_init(model_merges *m, size_t n)
{
    size_t slots = 16;
    while (slots < n * 2)
        slots *= 2;
    m->slots = ep_calloc(slots, sizeof(*m->slots));
    if (m->slots == NULL) return EP_ERR_NOMEM;
    m->mask = slots - 1;
    memset(m->slots, 0xFF, slots * sizeof(*m->slots));
    return EP_OK;
}

void model_merges_fini(model_merges *m)
{
    ep_free(m->slots);
    *m = (model_merges){0};
}

/* The slot that holds the pair, or the free one where it belongs. At most half of the slots are
 * used. */
static model_merge *slot_of(const model_merges *m, int32_t left, int32_t right)
{
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right, h = pair;
    h = (h ^ h >> 32) * 0x9E3779B97F4A7C15u;
    h ^= h >> 29;
    for (size_t i = h & m->mask;; i = (i + 1) & m->mask) {
        if (m->slots[i].pair == pair || m->slots[i].pair == UINT64_MAX) return &m->slots[i];
    }
}

void model_merges_put(model_merges *m, int32_t left, int32_t right, int32_t rank, int32_t id)
{
    model_merge *slot = slot_of(m, left, right);
    if (slot->pair != UINT64_MAX) return;
    *slot = (model_merge){(uint64_t)(uint32_t)left << 32 | (uint32_t)right, rank, id};
}

/* ---- heap ---- */

static bool before(const struct bpe_candidate *a, const struct bpe_candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(struct bpe_candidate *heap, size_t *n, struct bpe_candidate c)
{
    size_t i = (*n)++;
    while (i > 0 && before(&c, &heap[(i - 1) / 2])) {
        heap[i] = heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    heap[i] = c;
}

static struct bpe_candidate heap_pop(struct bpe_candidate *heap, size_t *n)
{
    struct bpe_candidate top = heap[0], last = heap[--*n];
    size_t i = 0;
    for (size_t child = 1; child < *n; child = 2 * i + 1) {
        if (child + 1 < *n && before(&heap[child + 1], &heap[child])) child++;
        if (!before(&heap[child], &last)) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

/* ---- a word ---- */

void model_bpe_fini(model_bpe *b)
{
    ep_free(b->symbols);
    ep_free(b->heap);
    *b = (model_bpe){0};
}

static ep_status reserve(model_bpe *b, size_t n)
{
    if (n <= b->cap) return EP_OK;
    if (n > INT32_MAX / 2) return EP_ERR_TOO_LARGE;
    size_t cap = b->cap * 2 > n ? b->cap * 2 : n < 64 ? 64 : n;
    /* n - 1 pairs at first, and each of at most n - 1 merges adds two and has taken one. */
    struct bpe_symbol *symbols = ep_alloc(cap * sizeof(*symbols));
    struct bpe_candidate *heap = ep_alloc(cap * 2 * sizeof(*heap));
    if (symbols == NULL || heap == NULL) {
        ep_free(symbols);
        ep_free(heap);
        return EP_ERR_NOMEM;
    }
    model_bpe_fini(b);
    *b = (model_bpe){symbols, heap, cap};
    return EP_OK;
}

/* Enters the pair that starts at symbol `at`, if there is a merge for it. */
static void enter(model_bpe *b, const model_merges *m, size_t *n_heap, int32_t at)
{
    if (at < 0 || b->symbols[at].next < 0) return;
    int32_t left = b->symbols[at].id, right = b->symbols[b->symbols[at].next].id;
    const model_merge *merge = slot_of(m, left, right);
    if (merge->pair == UINT64_MAX) return;
    heap_push(b->heap, n_heap, (struct bpe_candidate){merge->rank, at, left, right, merge->id});
}

ep_status model_bpe_word(model_bpe *b, const model_merges *m, const int32_t byte_ids[256],
                         const uint8_t *word, size_t n, model_ids *out)
{
    ep_status status = model_ids_reserve(out, n);
    if (status == EP_OK) status = reserve(b, n);
    if (status != EP_OK) return status;

    struct bpe_symbol *s = b->symbols;
    size_t n_heap = 0;
    for (size_t i = 0; i < n; i++) {
        s[i] =
            (struct bpe_symbol){byte_ids[word[i]], (int32_t)i - 1, i + 1 < n ? (int32_t)i + 1 : -1};
    }
    for (size_t i = 0; i + 1 < n; i++)
        enter(b, m, &n_heap, (int32_t)i);
    while (n_heap > 0) {
        struct bpe_candidate c = heap_pop(b->heap, &n_heap);
        int32_t next = s[c.at].next;
        if (s[c.at].id != c.left || next < 0 || s[next].id != c.right) continue;
        s[c.at].id = c.id;
        s[c.at].next = s[next].next;
        s[next].id = -1;
        if (s[next].next >= 0) s[s[next].next].prev = c.at;
        enter(b, m, &n_heap, s[c.at].prev);
        enter(b, m, &n_heap, c.at);
    }
    for (int32_t i = n > 0 ? 0 : -1; i >= 0; i = s[i].next)
        out->at[out->n++] = s[i].id;
    return EP_OK;
}
