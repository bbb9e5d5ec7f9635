/*
 * The sampler. Each filter against what its definition says on logits whose shares are known
 * exactly, the distribution of draws by chi-square against probabilities computed here (seeds are
 * fixed, so the figure is too), replay of single positions, and inputs that must be refused.
 */
#include "kernels/kernels.h"
#include "router_node/sample.h"
#include "tests/test.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

enum { MAX_VOCAB = 4096 };
static _Alignas(64) uint8_t scratch[MAX_VOCAB * 9 + 64];

static int32_t sample(const router_sampling *p, const float *logits, int vocab, uint64_t position)
{
    int32_t token = -1;
    /* What an earlier call left in the scratch must not matter. */
    memset(scratch, (int)(position * 37 & 0xFF), router_sample_scratch_bytes(vocab));
    CHECK_INT(router_sample(p, logits, vocab, NULL, 0, position, scratch, &token), EP_OK);
    CHECK(token >= 0 && token < vocab);
    return token;
}

static int32_t sample_after(const router_sampling *p, const float *logits, int vocab,
                            const int32_t *history, size_t n)
{
    int32_t token = -1;
    CHECK_INT(router_sample(p, logits, vocab, history, n, n, scratch, &token), EP_OK);
    return token;
}

static router_sampling at_temperature(float t, uint64_t seed)
{
    router_sampling p = router_sampling_default();
    p.temperature = t;
    p.seed = seed;
    return p;
}

/* Bit i is set when id i was drawn at least once in `draws` positions (vocab <= 32). */
static uint32_t drawn(const router_sampling *p, const float *logits, int vocab, int draws)
{
    uint32_t set = 0;
    for (int i = 0; i < draws; i++)
        set |= 1u << sample(p, logits, vocab, (uint64_t)i);
    return set;
}

static void test_scratch(void)
{
    CHECK(router_sample_scratch_bytes(1) <= sizeof(scratch));
    CHECK(router_sample_scratch_bytes(MAX_VOCAB) <= sizeof(scratch));
}

static void test_check(void)
{
    router_sampling ok = router_sampling_default();
    CHECK_INT(router_sampling_check(&ok, NULL), EP_OK);
    CHECK(ok.temperature == 0.0f && ok.top_k == 0 && ok.top_p == 1.0f && ok.min_p == 0.0f);
    CHECK(ok.repetition_penalty == 1.0f && ok.seed == 0);
    const float bad[] = {-0.001f, 100.5f, NAN, INFINITY, -INFINITY};
    static const char *const names[] = {"temperature", "top_p", "min_p", "repetition_penalty"};
    for (int field = 0; field < 4; field++) {
        for (int i = 0; i < 5; i++) {
            router_sampling p = ok;
            float *at[] = {&p.temperature, &p.top_p, &p.min_p, &p.repetition_penalty};
            ep_err err = {""};
            *at[field] = bad[i];
            CHECK_INT(router_sampling_check(&p, &err), EP_ERR_INVALID);
            CHECK(strncmp(err.text, names[field], strlen(names[field])) == 0);
        }
    }
    router_sampling p = ok;
    p.top_k = -1;
    CHECK_INT(router_sampling_check(&p, NULL), EP_ERR_INVALID);
    p = ok, p.top_p = 1.001f;
    CHECK_INT(router_sampling_check(&p, NULL), EP_ERR_INVALID);
    p = ok, p.min_p = 1.001f;
    CHECK_INT(router_sampling_check(&p, NULL), EP_ERR_INVALID);
    p = ok, p.repetition_penalty = 0.0f;
    CHECK_INT(router_sampling_check(&p, NULL), EP_ERR_INVALID);
    p = ok, p.top_p = 0.0f, p.min_p = 1.0f, p.top_k = INT32_MAX, p.temperature = 100.0f;
    CHECK_INT(router_sampling_check(&p, NULL), EP_OK);
}

static void test_greedy(void)
{
    router_sampling p = router_sampling_default();
    const float logits[] = {1.0f, 3.0f, -2.0f, 3.0f, 2.0f};
    CHECK_INT(sample(&p, logits, 5, 0), 1); /* the lower of two equal ids */
    CHECK_INT(sample(&p, logits, 1, 7), 0);
    const float low[] = {-FLT_MAX, -FLT_MAX, -1e38f};
    CHECK_INT(sample(&p, low, 3, 0), 2);
    const float zeros[] = {-0.0f, 0.0f}; /* equal */
    CHECK_INT(sample(&p, zeros, 2, 0), 0);
    /* Filters do not move the best. */
    p.top_k = 3, p.top_p = 0.5f, p.min_p = 0.9f;
    CHECK_INT(sample(&p, logits, 5, 0), 1);
}

/* Values made by a separate program from the published SplitMix64 mixing: a change of the generator
 * would break the promise that a replayed request goes on unchanged across versions. */
static void test_generator(void)
{
    static const struct {
        uint64_t seed;
        int32_t want[12];
    } rows[] = {
        {0, {167, 179, 99, 168, 201, 37, 199, 67, 96, 145, 102, 36}},
        {42, {87, 244, 124, 17, 173, 17, 50, 188, 28, 183, 164, 98}},
        {UINT64_MAX, {93, 189, 130, 237, 131, 39, 222, 185, 16, 225, 200, 139}},
    };
    float equal[256] = {0};
    for (size_t r = 0; r < 3; r++) {
        router_sampling p = at_temperature(1.0f, rows[r].seed);
        for (uint64_t i = 0; i < 12; i++) {
            CHECK_INT(sample(&p, equal, 256, i < 11 ? i : (uint64_t)1 << 40), rows[r].want[i]);
        }
    }
}

static void test_replay(void)
{
    float logits[64];
    for (int i = 0; i < 64; i++)
        logits[i] = (float)((i * 37) % 64) * 0.05f;
    router_sampling p = at_temperature(0.8f, 99);
    p.top_p = 0.95f;
    int32_t forward[100];
    for (int i = 0; i < 100; i++)
        forward[i] = sample(&p, logits, 64, (uint64_t)i);
    int moved = 0;
    for (int i = 99; i >= 0; i--) {
        CHECK_INT(sample(&p, logits, 64, (uint64_t)i), forward[i]);
        moved += forward[i] != forward[0];
    }
    p.seed = 100;
    int other = 0;
    for (int i = 0; i < 100; i++)
        other += sample(&p, logits, 64, (uint64_t)i) != forward[i];
    CHECK(moved > 50 && other > 50);
}

/* ---- distribution ---- */

/* Chi-square of counts against expected shares; cells that expect fewer than 8 are put together. */
static double chi_square(const int *count, const double *share, int n, int draws, int *freedom)
{
    double sum = 0.0, rest = 0.0;
    int rest_count = 0, cells = 0;
    for (int i = 0; i < n; i++) {
        double want = share[i] * draws;
        if (want < 8.0) {
            rest += want;
            rest_count += count[i];
            if (share[i] == 0.0) CHECK_INT(count[i], 0);
            continue;
        }
        sum += (count[i] - want) * (count[i] - want) / want;
        cells++;
    }
    if (rest >= 1.0) {
        sum += (rest_count - rest) * (rest_count - rest) / rest;
        cells++;
    }
    *freedom = cells - 1;
    return sum;
}

/* Wilson and Hilferty: the value that chi-square of f degrees passes once in 10,000. */
static double chi_limit(int f)
{
    double k = 2.0 / (9.0 * f), t = 1.0 - k + 3.719 * sqrt(k);
    return f * t * t * t;
}

typedef struct entry {
    double x;
    int id;
} entry;

static int by_share(const void *a, const void *b)
{
    const entry *l = a, *r = b;
    return l->x != r->x ? (l->x < r->x ? 1 : -1) : l->id - r->id;
}

/* The definition, in double and with a plain sort. */
static void expected(const router_sampling *p, const float *logits, int n, double *share)
{
    entry e[256];
    double sum = 0.0, head = 0.0, kept = 0.0;
    for (int i = 0; i < n; i++)
        e[i] = (entry){(double)logits[i] / (double)p->temperature, i};
    qsort(e, (size_t)n, sizeof(e[0]), by_share);
    int keep = p->top_k > 0 && p->top_k < n ? p->top_k : n;
    double max = e[0].x;
    for (int i = 0; i < keep; i++)
        sum += e[i].x = exp(e[i].x - max);
    int m = 0;
    while (m < keep && (m == 0 || head < (double)p->top_p * sum))
        head += e[m++].x;
    for (int i = 0; i < n; i++)
        share[i] = 0.0;
    for (int i = 0; i < m; i++) {
        if (e[i].x < (double)p->min_p) break;
        kept += share[e[i].id] = e[i].x;
    }
    for (int i = 0; i < n; i++)
        share[i] /= kept;
}

static void test_distribution(void)
{
    enum { N = 200, DRAWS = 40000 };
    static const router_sampling settings[] = {
        {1.0f, 0, 1.0f, 0.0f, 1.0f, 1},     {0.7f, 0, 1.0f, 0.0f, 1.0f, 2},
        {1.5f, 0, 1.0f, 0.0f, 1.0f, 3},     {1.0f, 20, 1.0f, 0.0f, 1.0f, 4},
        {1.0f, 0, 0.8f, 0.0f, 1.0f, 5},     {1.0f, 0, 1.0f, 0.1f, 1.0f, 6},
        {0.9f, 40, 0.9f, 0.05f, 1.0f, 7},   {2.0f, 50, 0.37f, 0.3f, 1.0f, 8},
        {1.0f, 500, 0.999f, 0.0f, 1.0f, 0}, {0.2f, 3, 0.99f, 0.001f, 1.0f, UINT64_MAX},
    };
    float logits[N];
    for (int i = 0; i < N; i++)
        logits[i] = 4.0f * sinf((float)i * 1.7f) - 11.0f * (float)(i % 7 == 3);
    for (size_t s = 0; s < sizeof(settings) / sizeof(settings[0]); s++) {
        int count[N] = {0}, freedom;
        double share[N];
        expected(&settings[s], logits, N, share);
        for (int i = 0; i < DRAWS; i++)
            count[sample(&settings[s], logits, N, (uint64_t)i)]++;
        double chi = chi_square(count, share, N, DRAWS, &freedom);
        printf("    setting %zu: chi-square %.1f, %d degrees of freedom, limit %.1f\n", s, chi,
               freedom, chi_limit(freedom));
        CHECK(freedom >= 1 && chi < chi_limit(freedom));
    }
}

/* Neighbouring seeds at one position are as good as neighbouring positions of one seed, and pairs
 * of consecutive draws are independent. */
static void test_seeds(void)
{
    enum { DRAWS = 25600 };
    float equal[16] = {0};
    int seeds[16] = {0}, pairs[256] = {0}, freedom;
    double share[256];
    for (int i = 0; i < 256; i++)
        share[i] = 1.0 / 16.0;
    for (int i = 0; i < DRAWS; i++) {
        router_sampling p = at_temperature(1.0f, (uint64_t)i);
        seeds[sample(&p, equal, 16, 5)]++;
    }
    CHECK(chi_square(seeds, share, 16, DRAWS, &freedom) < chi_limit(15));
    router_sampling p = at_temperature(1.0f, 12345);
    int32_t last = sample(&p, equal, 16, 0);
    for (int i = 1; i <= DRAWS; i++) {
        int32_t now = sample(&p, equal, 16, (uint64_t)i);
        pairs[last * 16 + now]++;
        last = now;
    }
    for (int i = 0; i < 256; i++)
        share[i] = 1.0 / 256.0;
    CHECK(chi_square(pairs, share, 256, DRAWS, &freedom) < chi_limit(255));
}

/* ---- filters on exact shares ---- */

static void test_top_k(void)
{
    const float logits[] = {0.0f, 1.0f, 1.0f, 0.5f, 1.0f, -3.0f};
    router_sampling p = at_temperature(1.0f, 1);
    for (int k = 1; k <= 8; k++) {
        static const uint32_t want[] = {0x02, 0x06, 0x16, 0x1E, 0x1F, 0x3F, 0x3F, 0x3F};
        p.top_k = k;
        CHECK_INT(drawn(&p, logits, 6, 3000), want[k - 1]);
    }
}

static void test_top_p(void)
{
    const float equal[] = {2.0f, 2.0f, 2.0f, 2.0f}, one[] = {50.0f, 0.0f, 0.0f, 0.0f};
    static const struct {
        float p;
        uint32_t want;
    } rows[] = {{0.0f, 1}, {0.25f, 1}, {0.26f, 3}, {0.5f, 3}, {0.75f, 7}, {0.76f, 15}, {1.0f, 15}};
    router_sampling p = at_temperature(1.0f, 1);
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        p.top_p = rows[i].p;
        CHECK_INT(drawn(&p, equal, 4, 500), rows[i].want);
    }
    p.top_p = 0.999f;
    CHECK_INT(drawn(&p, one, 4, 500), 1);
    /* top_p counts what top_k left: half of two is one. */
    p.top_k = 2, p.top_p = 0.5f;
    CHECK_INT(drawn(&p, equal, 4, 500), 1);
}

static void test_min_p(void)
{
    const float logits[] = {0.0f, -1.0f, 0.0f, -2.0f}; /* 1, 0.37, 1, 0.14 of the best */
    static const struct {
        float p;
        uint32_t want;
    } rows[] = {{0.0f, 15}, {0.1f, 15}, {0.2f, 7}, {0.36f, 7}, {0.37f, 5}, {1.0f, 5}};
    router_sampling p = at_temperature(1.0f, 1);
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        p.min_p = rows[i].p;
        CHECK_INT(drawn(&p, logits, 4, 1000), rows[i].want);
    }
}

static void test_penalty(void)
{
    router_sampling p = router_sampling_default();
    const float logits[] = {2.0f, 1.5f, -1.0f, 1.2f};
    const int32_t once[] = {0}, often[] = {0, 0, 0, 0}, two[] = {1, 0, 1};
    p.repetition_penalty = 1.5f; /* 2 becomes 1.33, and 0.59 or less if it were counted again */
    CHECK_INT(sample_after(&p, logits, 4, once, 0), 0);
    CHECK_INT(sample_after(&p, logits, 4, once, 1), 1);
    CHECK_INT(sample_after(&p, logits, 4, two, 3), 0); /* 1.33, 1, -1, 1.2 */
    CHECK_INT(sample_after(&p, logits, 3, often, 4), 1);
    const float close[] = {2.0f, 1.2f};
    CHECK_INT(sample_after(&p, close, 2, often, 4), 0); /* once: 1.33 > 1.2 */
    const float negative[] = {-1.0f, -1.4f};
    CHECK_INT(sample_after(&p, negative, 2, once, 1), 1); /* -1.5 */
    p.repetition_penalty = 0.5f;                          /* below 1 it favours */
    const int32_t second[] = {1};
    CHECK_INT(sample_after(&p, close, 2, second, 1), 1);
    int32_t token = -7;
    const int32_t outside[] = {4}, below[] = {-1};
    CHECK_INT(router_sample(&p, logits, 4, outside, 1, 0, scratch, &token), EP_ERR_INVALID);
    CHECK_INT(router_sample(&p, logits, 4, below, 1, 0, scratch, &token), EP_ERR_INVALID);
    CHECK_INT(token, -7);
    /* Past the range of float it stays defined. */
    const float huge[] = {3e38f, -3e38f, 3e38f};
    const int32_t all[] = {0, 1, 2};
    p.repetition_penalty = 0.01f;
    CHECK_INT(sample_after(&p, huge, 3, all, 3), 0);
    p.repetition_penalty = 100.0f, p.temperature = 1e-30f;
    CHECK_INT(sample_after(&p, huge, 3, once, 1), 2);
}

static void test_extremes(void)
{
    router_sampling p = at_temperature(1.0f, 3);
    const float wide[] = {-FLT_MAX, FLT_MAX, 0.0f};
    CHECK_INT(drawn(&p, wide, 3, 200), 2);
    p.top_p = 0.9999f, p.min_p = 0.0001f;
    CHECK_INT(drawn(&p, wide, 3, 200), 2);
    p = at_temperature(1e-38f, 3);
    const float near_equal[] = {1.0f, 1.0000001f, 0.0f};
    CHECK_INT(drawn(&p, near_equal, 3, 200), 2);
    p = at_temperature(100.0f, 3);
    CHECK_INT(drawn(&p, near_equal, 3, 200), 7);
    const float single[] = {-5.0f};
    CHECK_INT(drawn(&p, single, 1, 10), 1);
}

static void test_refused(void)
{
    const float bad[] = {NAN, INFINITY, -INFINITY};
    float logits[40] = {0};
    double lp = 5.0;
    router_logprob top[3];
    for (int i = 0; i < 3; i++) {
        for (int at = 0; at < 40; at += 13) {
            router_sampling p = at_temperature(at == 0 ? 0.0f : 1.0f, 1);
            int32_t token = -7;
            logits[at] = bad[i];
            CHECK_INT(router_sample(&p, logits, 40, NULL, 0, 0, scratch, &token), EP_ERR_INVALID);
            CHECK_INT(token, -7);
            CHECK_INT(router_logprobs(logits, 40, 1, &lp, top, 3), EP_ERR_INVALID);
            logits[at] = 0.0f;
        }
    }
    CHECK_INT(router_logprobs(logits, 40, 40, &lp, NULL, 0), EP_ERR_INVALID);
    CHECK_INT(router_logprobs(logits, 40, -1, &lp, NULL, 0), EP_ERR_INVALID);
    CHECK_INT(router_logprobs(logits, 2, 0, &lp, top, 3), EP_ERR_INVALID);
    CHECK(lp == 5.0);
}

static void test_no_allocation(void)
{
    static float logits[MAX_VOCAB];
    for (int i = 0; i < MAX_VOCAB; i++)
        logits[i] = (float)(i * 7919 % 4093) * 1e-3f;
    router_sampling p = {0.9f, 40, 0.9f, 0.05f, 1.1f, 1};
    const int32_t history[] = {1, 2, 3, 1};
    router_logprob top[20];
    double lp;
    uint64_t before = ep_alloc_count();
    for (int i = 0; i < 20; i++) {
        int32_t token = sample_after(&p, logits, MAX_VOCAB, history, 4);
        CHECK_INT(router_logprobs(logits, MAX_VOCAB, token, &lp, top, 20), EP_OK);
    }
    CHECK_INT(ep_alloc_count() - before, 0);
}

/* ---- log probabilities ---- */

static void test_logprobs(void)
{
    enum { N = 300 };
    float logits[N];
    for (int i = 0; i < N; i++)
        logits[i] = 6.0f * cosf((float)i * 0.9f) + (float)(i % 5);
    logits[17] = logits[250] = 40.0f, logits[40] = 41.0f;
    double max = 41.0, sum = 0.0, total = 0.0, lp = 0.0;
    for (int i = 0; i < N; i++)
        sum += exp((double)logits[i] - max);
    router_logprob top[N];
    CHECK_INT(router_logprobs(logits, N, 123, &lp, top, N), EP_OK);
    CHECK(fabs(lp - ((double)logits[123] - max - log(sum))) < 1e-6);
    bool used[N] = {false};
    for (int i = 0; i < N; i++) {
        int32_t id = top[i].id;
        CHECK(id >= 0 && id < N && !used[id]);
        if (id < 0 || id >= N) return;
        used[id] = true;
        CHECK(fabs(top[i].logprob - ((double)logits[id] - max - log(sum))) < 1e-6);
        if (i > 0) CHECK(top[i - 1].logprob >= top[i].logprob);
        if (i > 0 && logits[top[i - 1].id] == logits[id]) CHECK(top[i - 1].id < id);
        total += exp(top[i].logprob);
    }
    CHECK(fabs(total - 1.0) < 1e-5);
    CHECK(top[0].id == 40 && top[1].id == 17 && top[2].id == 250);
    router_logprob few[2];
    CHECK_INT(router_logprobs(logits, N, -5, NULL, few, 2), EP_OK); /* token is ignored */
    CHECK(memcmp(&few[0].id, &top[0].id, 4) == 0 && few[1].id == 17);
    CHECK(few[0].logprob == top[0].logprob);
    CHECK_INT(router_logprobs(logits, 1, 0, &lp, few, 1), EP_OK);
    CHECK(lp == 0.0 && few[0].logprob == 0.0);
    const float equal[1000] = {0};
    CHECK_INT(router_logprobs(equal, 1000, 999, &lp, NULL, 0), EP_OK);
    CHECK(fabs(lp + log(1000.0)) < 1e-12);
    const float wide[] = {-FLT_MAX, FLT_MAX};
    CHECK_INT(router_logprobs(wide, 2, 0, &lp, few, 2), EP_OK);
    CHECK(isfinite(lp) && lp < -1e38 && few[0].id == 1 && few[0].logprob == 0.0);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"scratch", test_scratch},   {"check", test_check},
        {"greedy", test_greedy},     {"generator", test_generator},
        {"replay", test_replay},     {"distribution", test_distribution},
        {"seeds", test_seeds},       {"top_k", test_top_k},
        {"top_p", test_top_p},       {"min_p", test_min_p},
        {"penalty", test_penalty},   {"extremes", test_extremes},
        {"refused", test_refused},   {"no_allocation", test_no_allocation},
        {"logprobs", test_logprobs},
    };
    ep_err err = {{0}};
    if (kern_select("auto", &err) != EP_OK) {
        printf("%s\n", err.text);
        return 1;
    }
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
