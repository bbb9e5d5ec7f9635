#ifndef EP_MODEL_BPE_H
#define EP_MODEL_BPE_H
/*
 * Byte-pair merging over ids. Internal to model.
 */
#include "base/base.h"

/* A growing list of token ids. */
typedef struct model_ids {
    int32_t *at;
    size_t n, cap;
} model_ids;
ep_status model_ids_reserve(model_ids *ids, size_t more);

typedef struct model_merge {
    uint64_t pair; /* left << 32 | right; UINT64_MAX: free slot */
    int32_t rank, id;
} model_merge;

/* (left id, right id) -> (rank, id of both together). */
typedef struct model_merges {
    model_merge *slots;
    size_t mask;
} model_merges;
ep_status model_merges_init(model_merges *m, size_t n);
void model_merges_fini(model_merges *m);
/* The first merge of a pair counts; a later one is ignored. At most the n of init. */
void model_merges_put(model_merges *m, int32_t left, int32_t right, int32_t rank, int32_t id);

/* Working memory of one call chain. */
typedef struct model_bpe {
    struct bpe_symbol *symbols;
    struct bpe_candidate *heap;
    size_t cap;
} model_bpe;
void model_bpe_fini(model_bpe *b);

/* Appends the ids of one word. Starts from the ids of its bytes and merges, again and again, the
 * adjacent pair of lowest rank (of equals the leftmost). O(n log n). */
ep_status model_bpe_word(model_bpe *b, const model_merges *m, const int32_t byte_ids[256],
                         const uint8_t *word, size_t n, model_ids *out);

#endif
