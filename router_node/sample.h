#ifndef EP_ROUTER_NODE_SAMPLE_H
#define EP_ROUTER_NODE_SAMPLE_H
/*
 * From a row of logits to a token. The draw depends on the logits, the settings, the history and
 * the position, and on nothing else: no state is kept, so a request replayed on another router from
 * prompt and tokens sent so far continues with the tokens it would have had. Nothing here
 * allocates.
 */
#include "base/base.h"

typedef struct router_sampling {
    float temperature; /* 0: greedy, the highest logit (lowest id of equals) */
    int top_k;         /* keep the k highest; 0: all */
    float top_p;       /* keep the shortest head of the sorted list holding this mass; 1: all */
    float min_p;       /* drop what is less probable than min_p times the best; 0: none */
    float repetition_penalty; /* > 1 makes tokens of the history less likely; 1: off */
    uint64_t seed;
} router_sampling;

/* Greedy, nothing filtered, seed 0. */
router_sampling router_sampling_default(void);
/* EP_ERR_INVALID, with the field and its range in err. */
ep_status router_sampling_check(const router_sampling *p, ep_err *err);

/* Bytes of scratch (64-byte aligned) that router_sample needs. */
size_t router_sample_scratch_bytes(int vocab);

/*
 * Order: repetition penalty (each distinct id of the history once), temperature, top_k, softmax,
 * top_p, min_p, draw. position is that of the token to be chosen in its sequence: (seed, position)
 * gives the random number. p has passed router_sampling_check. EP_ERR_INVALID: a logit is not
 * finite, or an id of the history is outside the vocabulary.
 */
ep_status router_sample(const router_sampling *p, const float *logits, int vocab,
                        const int32_t *history, size_t n_history, uint64_t position, void *scratch,
                        int32_t *token);

typedef struct router_logprob {
    int32_t id;
    double logprob; /* natural logarithm */
} router_logprob;

/* Log probabilities of the raw logits (no penalty, temperature or filter). top: the n_top most
 * probable (at most vocab), descending, equal ones by ascending id; may be NULL with n_top 0.
 * token: the id whose log probability goes to *token_logprob; may be NULL, then token is ignored.
 * EP_ERR_INVALID: a logit is not finite, token outside the vocabulary, or n_top not in 0..vocab. */
ep_status router_logprobs(const float *logits, int vocab, int32_t token, double *token_logprob,
                          router_logprob *top, int n_top);

#endif
