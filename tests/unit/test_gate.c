/*
 * gate: the numbered rules of router_node/gate.c, each with a table or a comparison against a plain
 * re-statement in double precision.
 */
#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "router_node/gate.h"
#include "tests/test.h"

static bool is_near(float got, double want)
{
    return fabs((double)got - want) <= 2e-6;
}

static void test_known_rows(void)
{
    static const struct {
        const char *name;
        int k;
        bool renormalise;
        float logits[4];
        int32_t experts[4];
        double weights[4];
    } rows[] = {
        {"order", 2, true, {0.0f, 2.0f, 1.0f, -1.0f}, {1, 2}, {0.731058579, 0.268941421}},
        {"raw", 2, false, {0.0f, 2.0f, 1.0f, -1.0f}, {1, 2}, {0.643914260, 0.236882818}},
        {"all equal", 3, true, {5.0f, 5.0f, 5.0f, 5.0f}, {0, 1, 2}, {1 / 3., 1 / 3., 1 / 3.}},
        {"all equal, raw", 4, false, {5.0f, 5.0f, 5.0f, 5.0f}, {0, 1, 2, 3}, {.25, .25, .25, .25}},
        {"tie behind",
         3,
         true,
         {1.0f, 1.0f, 3.0f, 1.0f},
         {2, 0, 1},
         {0.786986042, 0.106506979, 0.106506979}},
        {"one", 1, true, {-3.0f, -2.0f, -9.0f, -2.5f}, {1}, {1.0}},
        {"one, raw", 1, false, {0.0f, 0.0f, 0.0f, 10.0f}, {3}, {0.999863819}},
        /* scores that vanish are equal: ties are of scores */
        {"underflow", 3, true, {-200.0f, 0.0f, -150.0f, -190.0f}, {1, 0, 2}, {1, 0, 0}},
        {"large", 2, true, {3e38f, -3e38f, 3e38f, 0.0f}, {0, 2}, {0.5, 0.5}},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        int before = test_failures;
        router_gate g = {4, rows[i].k, rows[i].renormalise};
        float logits[4], weights[4] = {-7, -7, -7, -7};
        int32_t experts[4] = {-7, -7, -7, -7};
        memcpy(logits, rows[i].logits, sizeof(logits));
        CHECK(router_gate_row(&g, logits, experts, weights));
        for (int slot = 0; slot < 4; slot++) {
            if (slot >= g.top_k) { /* nothing written behind */
                CHECK_INT(experts[slot], -7);
                CHECK(weights[slot] == -7.0f);
                continue;
            }
            CHECK_INT(experts[slot], rows[i].experts[slot]);
            CHECK(is_near(weights[slot], rows[i].weights[slot]));
        }
        if (test_failures > before) printf("    in row \"%s\"\n", rows[i].name);
    }
}

static void test_not_finite(void)
{
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t b = 0; b < 3; b++)
        for (int at = 0; at < 20; at++)
            for (int renormalise = 0; renormalise < 2; renormalise++) {
                router_gate g = {20, 3, renormalise != 0};
                float logits[20] = {0}, weights[3] = {-7, -7, -7};
                int32_t experts[3] = {-7, -7, -7};
                logits[at] = bad[b];
                CHECK(!router_gate_row(&g, logits, experts, weights));
                for (int slot = 0; slot < 3; slot++)
                    CHECK(experts[slot] == -7 && weights[slot] == -7.0f);
            }
    float all[20], weights[3];
    int32_t experts[3];
    for (int i = 0; i < 20; i++)
        all[i] = -INFINITY;
    CHECK(!router_gate_row(&(router_gate){20, 3, true}, all, experts, weights));
}

static void test_arguments(void)
{
    ep_err err;
    CHECK_INT(router_gate_check(&(router_gate){8, 0, true}, &err), EP_ERR_INVALID);
    CHECK_STR(err.text, "top_k 0 is not between 1 and the 8 experts");
    CHECK_INT(router_gate_check(&(router_gate){8, 9, true}, &err), EP_ERR_INVALID);
    CHECK_INT(router_gate_check(&(router_gate){8, -1, true}, NULL), EP_ERR_INVALID);
    CHECK_INT(router_gate_check(&(router_gate){8, 8, true}, &err), EP_OK);
    CHECK_INT(router_gate_check(&(router_gate){1, 1, false}, &err), EP_OK);
}

/* Random rows against the rules in double; a lowered top_k chooses a prefix and divides by its own
 * sum. */
static void test_random(void)
{
    const uint64_t seed = 20261120;
    uint64_t state = seed;
    printf("    seed %llu\n", (unsigned long long)seed);
    for (int round = 0; round < 400; round++) {
        enum { N = 37 };
        float logits[N], work[N], raw[N];
        for (int i = 0; i < N; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            logits[i] = (float)(int)((state >> 33) % 25) * 0.5f - 6.0f; /* many ties */
        }
        double sum = 0, score[N];
        for (int i = 0; i < N; i++)
            sum += exp((double)logits[i]);
        for (int i = 0; i < N; i++)
            score[i] = exp((double)logits[i]) / sum;
        int32_t full[N], few[N];
        float w_few[N];
        memcpy(work, logits, sizeof(work));
        CHECK(router_gate_row(&(router_gate){N, N, false}, work, full, raw));
        for (int i = 0; i < N; i++)
            CHECK(is_near(raw[i], score[full[i]]));
        for (int i = 1; i < N; i++) /* equal logits have equal scores */
            CHECK(logits[full[i - 1]] > logits[full[i]] ||
                  (logits[full[i - 1]] == logits[full[i]] && full[i - 1] < full[i]));
        int k = 1 + round % 8;
        memcpy(work, logits, sizeof(work));
        CHECK(router_gate_row(&(router_gate){N, k, true}, work, few, w_few));
        double chosen = 0;
        for (int i = 0; i < k; i++)
            chosen += score[full[i]];
        for (int i = 0; i < k; i++) {
            CHECK_INT(few[i], full[i]);
            CHECK(is_near(w_few[i], score[full[i]] / chosen));
        }
    }
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {{"known_rows", test_known_rows},
                                      {"not_finite", test_not_finite},
                                      {"arguments", test_arguments},
                                      {"random", test_random}};
    ep_err err;
    if (kern_select("auto", &err) != EP_OK) {
        printf("kern_select: %s\n", err.text);
        return 1;
    }
    return test_main(argc, argv, cases, 4);
}
