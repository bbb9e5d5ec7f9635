/*
 * Sampling. The steps are those of sample.h, in that order:
 *  1. repetition penalty: l > 0 becomes l / penalty, else l * penalty, once per distinct id;
 *  2. temperature: x = (l - max) / temperature, so the best has x = 0 whatever the scale;
 *  3. top_k: the k highest, of equal ones the lower ids;
 *  4. softmax: weight = kern_exp(x), not divided by the sum: shares of a total are compared
 * instead;
 *  5. top_p: the shortest descending head whose weight reaches top_p of the total, at least one;
 *  6. min_p: those of weight >= min_p (the best has weight 1);
 *  7. draw: the first candidate, descending, at which the running sum passes u times the kept
 * total.
 *
 * Invariant: one fixed order of additions (double, ids ascending where all are summed, else
 * descending by logit and ascending by id), so equal inputs give equal tokens on every machine.
 * Candidates leave a heap in descending order only as far as a step needs them: a draw from 150,000
 * ids mostly looks at a few. What it does not do: keep state, allocate, decide when to stop.
 */
#include "router_node/sample.h"

#include "kernels/kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

typedef struct candidate {
    float x;
    int32_t id;
} candidate;

/* Heap of what is left in a[0 .. n_heap), what was taken, best first, in a[n-1], a[n-2], ... */
typedef struct candidates {
    candidate *a;
    int n, n_heap;
} candidates;

router_sampling router_sampling_default(void)
{
    return (router_sampling){.top_p = 1.0f, .repetition_penalty = 1.0f};
}

/* NaN fails every comparison and so every range. */
ep_status router_sampling_check(const router_sampling *p, ep_err *err)
{
    if (!(p->temperature >= 0.0f && p->temperature <= 100.0f)) {
        return ep_fail(err, EP_ERR_INVALID, "temperature is %g, not 0 to 100",
                       (double)p->temperature);
    }
    if (p->top_k < 0) {
        return ep_fail(err, EP_ERR_INVALID, "top_k is %d, not 0 (off) or more", p->top_k);
    }
    if (!(p->top_p >= 0.0f && p->top_p <= 1.0f)) {
        return ep_fail(err, EP_ERR_INVALID, "top_p is %g, not 0 to 1", (double)p->top_p);
    }
    if (!(p->min_p >= 0.0f && p->min_p <= 1.0f)) {
        return ep_fail(err, EP_ERR_INVALID, "min_p is %g, not 0 to 1", (double)p->min_p);
    }
    if (!(p->repetition_penalty >= 0.01f && p->repetition_penalty <= 100.0f)) {
        return ep_fail(err, EP_ERR_INVALID, "repetition_penalty is %g, not 0.01 to 100",
                       (double)p->repetition_penalty);
    }
    return EP_OK;
}

static size_t candidate_bytes(int vocab)
{
    return ((size_t)vocab * sizeof(candidate) + 63) & ~(size_t)63;
}

size_t router_sample_scratch_bytes(int vocab)
{
    return candidate_bytes(vocab) + ((size_t)vocab + 7) / 8;
}

/* ---- random numbers ---- */

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

/* In [0, 1): a hash of seed and position (SplitMix64's mixing), not a generator with a state. */
static double uniform(uint64_t seed, uint64_t position)
{
    const uint64_t gamma = 0x9E3779B97F4A7C15u;
    uint64_t bits = mix(mix(seed + gamma) + (position + 1) * gamma);
    return (double)(bits >> 11) * 0x1p-53;
}

/* ---- candidates in descending order ---- */

static bool better(candidate a, candidate b)
{
    return a.x != b.x ? a.x > b.x : a.id < b.id;
}

/* Puts c into the hole at i of a heap of n. */
static void sift(candidate *a, int n, int i, candidate c)
{
    for (int64_t child = 2 * (int64_t)i + 1; child < n; child = 2 * (int64_t)i + 1) {
        if (child + 1 < n && better(a[child + 1], a[child])) child++;
        if (!better(a[child], c)) break;
        a[i] = a[child];
        i = (int)child;
    }
    a[i] = c;
}

static void heapify(candidates *c)
{
    c->n_heap = c->n;
    for (int i = c->n / 2 - 1; i >= 0; i--)
        sift(c->a, c->n, i, c->a[i]);
}

/* The i-th best, i at most the number taken so far. */
static candidate get(candidates *c, int i)
{
    if (c->n - c->n_heap <= i) {
        candidate best = c->a[0], last = c->a[--c->n_heap];
        if (c->n_heap > 0) sift(c->a, c->n_heap, 0, last);
        c->a[c->n_heap] = best;
    }
    return c->a[c->n - 1 - i];
}

/* ---- steps ---- */

static bool all_finite(const float *x, int n)
{
    int bad = 0;
    for (int i = 0; i < n; i++)
        bad += !(fabsf(x[i]) <= FLT_MAX);
    return bad == 0;
}

/* Step 1; a result past the range of float stays finite, so that differences are defined. */
static ep_status penalise(candidate *a, int vocab, float penalty, const int32_t *history,
                          size_t n_history, uint8_t *seen)
{
    memset(seen, 0, ((size_t)vocab + 7) / 8);
    for (size_t i = 0; i < n_history; i++) {
        int32_t id = history[i];
        if (id < 0 || id >= vocab) return EP_ERR_INVALID;
        if (seen[id / 8] >> (id % 8) & 1) continue;
        seen[id / 8] = (uint8_t)(seen[id / 8] | 1u << (id % 8));
        float l = a[id].x > 0.0f ? a[id].x / penalty : a[id].x * penalty;
        a[id].x = fminf(fmaxf(l, -FLT_MAX), FLT_MAX);
    }
    return EP_OK;
}

static int32_t best_of(const candidate *a, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++) {
        if (a[i].x > a[best].x) best = i; /* ids ascend: of equals the lowest stays */
    }
    return best;
}

static int32_t best_logit(const float *logits, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++) {
        if (logits[i] > logits[best]) best = i;
    }
    return best;
}

/* Below this the weight is under 1e-37, about where normal floats end: none. */
#define NO_WEIGHT (-86.0f)

static double weight(float x)
{
    return x < NO_WEIGHT ? 0.0 : (double)kern_exp(x);
}

enum { BLOCK = 256 };

/* Sum of weights over n values, added in their order: a pass over a vocabulary, so exp runs in
 * blocks. */
static double weigh_all(const float *x, const candidate *a, float shift, int n)
{
    float block[BLOCK], e[BLOCK];
    double total = 0.0;
    for (int at = 0; at < n; at += BLOCK) {
        int m = n - at < BLOCK ? n - at : BLOCK;
        for (int i = 0; i < m; i++)
            block[i] = (a != NULL ? a[at + i].x : x[at + i]) - shift;
        kern_exp_sub(e, block, 0.0f, m);
        for (int i = 0; i < m; i++)
            total += block[i] < NO_WEIGHT ? 0.0 : (double)e[i];
    }
    return total;
}

/* Steps 3 to 7. a holds x of step 2, ids ascending. */
static int32_t draw(const router_sampling *p, candidates *c, double u)
{
    int keep = p->top_k > 0 && p->top_k < c->n ? p->top_k : c->n;
    double total = 0.0;
    if (keep == c->n) {
        total = weigh_all(NULL, c->a, 0.0f, c->n);
        heapify(c);
    } else {
        heapify(c);
        for (int i = 0; i < keep; i++)
            total += weight(get(c, i).x);
    }
    if (p->top_p < 1.0f) {
        double want = (double)p->top_p * total, sum = 0.0;
        int n = 0;
        while (n < keep && (n == 0 || sum < want))
            sum += weight(get(c, n++).x);
        keep = n;
        total = sum;
    }
    if (p->min_p > 0.0f) {
        double sum = 0.0;
        int n = 0;
        for (; n < keep; n++) {
            double w = weight(get(c, n).x);
            if (n > 0 && w < (double)p->min_p) break;
            sum += w;
        }
        keep = n;
        total = sum;
    }
    /* The running sum may round differently from the total: then the last with any weight is it. */
    double target = u * total, sum = 0.0;
    int32_t chosen = get(c, 0).id;
    for (int i = 0; i < keep; i++) {
        candidate x = get(c, i);
        double w = weight(x.x);
        if (w == 0.0) break;
        chosen = x.id;
        sum += w;
        if (sum > target) break;
    }
    return chosen;
}

ep_status router_sample(const router_sampling *p, const float *logits, int vocab,
                        const int32_t *history, size_t n_history, uint64_t position, void *scratch,
                        int32_t *token)
{
    if (vocab <= 0 || !all_finite(logits, vocab)) return EP_ERR_INVALID;
    if (p->temperature == 0.0f && p->repetition_penalty == 1.0f) {
        *token = best_logit(logits, vocab);
        return EP_OK;
    }
    candidates c = {.a = scratch, .n = vocab, .n_heap = vocab};
    for (int i = 0; i < vocab; i++)
        c.a[i] = (candidate){logits[i], i};
    if (p->repetition_penalty != 1.0f) {
        uint8_t *seen = (uint8_t *)scratch + candidate_bytes(vocab);
        ep_status status = penalise(c.a, vocab, p->repetition_penalty, history, n_history, seen);
        if (status != EP_OK) return status;
    }
    int32_t best = best_of(c.a, vocab);
    if (p->temperature == 0.0f) {
        *token = best;
        return EP_OK;
    }
    float max = c.a[best].x;
    for (int i = 0; i < vocab; i++)
        c.a[i].x = (c.a[i].x - max) / p->temperature;
    *token = draw(p, &c, uniform(p->seed, position));
    return EP_OK;
}

/* ---- log probabilities ---- */

/* Natural logarithm of x >= 1 in fixed arithmetic: the C library's differs between machines in the
 * last bit. x = m * 2^e with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh((m-1)/(m+1)) by its series.
 */
static double log_fixed(double x)
{
    int e;
    double m = frexp(x, &e);
    if (m < 0.70710678118654752440) {
        m *= 2.0;
        e--;
    }
    double s = (m - 1.0) / (m + 1.0), s2 = s * s, sum = 0.0;
    for (int k = 25; k >= 1; k -= 2) /* s2 < 0.0295: the next term is below 1e-20 */
        sum = sum * s2 + 1.0 / k;
    return e * 0.69314718055994530942 + 2.0 * s * sum;
}

/* Keeps top sorted: descending, of equals the lower id first (ids come in ascending order). */
static void top_insert(router_logprob *top, int *n, int n_top, int32_t id, double x)
{
    if (n_top == 0 || (*n == n_top && x <= top[*n - 1].logprob)) return;
    int i = *n < n_top ? (*n)++ : n_top - 1;
    for (; i > 0 && x > top[i - 1].logprob; i--)
        top[i] = top[i - 1];
    top[i] = (router_logprob){id, x};
}

ep_status router_logprobs(const float *logits, int vocab, int32_t token, double *token_logprob,
                          router_logprob *top, int n_top)
{
    if (vocab <= 0 || n_top < 0 || n_top > vocab || !all_finite(logits, vocab)) {
        return EP_ERR_INVALID;
    }
    if (token_logprob != NULL && (token < 0 || token >= vocab)) return EP_ERR_INVALID;
    float max = logits[0];
    for (int i = 1; i < vocab; i++)
        max = logits[i] > max ? logits[i] : max;
    double sum = weigh_all(logits, NULL, max, vocab);
    int n = 0;
    for (int i = 0; n_top > 0 && i < vocab; i++)
        top_insert(top, &n, n_top, i, logits[i]);
    double log_sum = (double)max + log_fixed(sum);
    for (int i = 0; i < n; i++)
        top[i].logprob -= log_sum;
    if (token_logprob != NULL) *token_logprob = (double)logits[token] - log_sum;
    return EP_OK;
}
