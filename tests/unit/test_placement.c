/*
 * Which shard owns which expert: lists, the even split of the rest, both together, and every way a
 * list can be wrong, with the words that name expert and shard.
 */
#include "model/model.h"
#include "tests/test.h"

#include <stdio.h>
#include <stdlib.h>

#define SEED 20261120u

/* Exactly one owner each, local ids ascending and without gaps, counts that agree. */
static void check_sound(const model_placement *p)
{
    int total = 0;
    for (int s = 0; s < p->n_shards; s++) {
        int next = 0;
        for (int e = 0; e < p->n_experts; e++)
            if (p->owner[e] == s) CHECK_INT(p->local[e], next++);
        CHECK_INT(p->n_owned[s], next);
        total += next;
    }
    CHECK_INT(total, p->n_experts);
}

/* owners: one digit per expert. */
static void made(int n_experts, int n_shards, const char *const *lists, const char *owners)
{
    model_placement p;
    ep_err err = {{0}};
    ep_status status = model_placement_make(&p, n_experts, n_shards, lists, 7, &err);
    CHECK_INT(status, EP_OK);
    if (status != EP_OK) {
        printf("    %s\n", err.text);
        return;
    }
    CHECK_INT(p.n_experts, n_experts);
    CHECK_INT(p.n_shards, n_shards);
    CHECK_INT(p.epoch, 7);
    for (int e = 0; e < n_experts; e++)
        CHECK_INT(p.owner[e], owners[e] - '0');
    check_sound(&p);
    model_placement_fini(&p);
    model_placement_fini(&p); /* twice does no harm */
}

static void refused(int n_experts, int n_shards, const char *const *lists, const char *says)
{
    model_placement p = {.n_experts = -5};
    ep_err err = {{0}};
    ep_status status = model_placement_make(&p, n_experts, n_shards, lists, 1, &err);
    CHECK_INT(status, EP_ERR_INVALID);
    CHECK_INT(p.n_experts, -5); /* outputs are set only on success */
    if (strstr(err.text, says) == NULL) {
        CHECK(false);
        printf("    got \"%s\", expected \"%s\"\n", err.text, says);
    }
    if (status == EP_OK) model_placement_fini(&p);
}

#define LISTS(...) ((const char *const[]){__VA_ARGS__})

static void test_even_split(void)
{
    made(8, 1, NULL, "00000000");
    made(8, 2, NULL, "00001111");
    made(8, 3, NULL, "00011122");
    made(8, 5, NULL, "00112234");
    made(3, 5, NULL, "012"); /* the last two own none */
    made(8, 3, LISTS(NULL, NULL, NULL), "00011122");
}

static void test_lists(void)
{
    made(8, 2, LISTS("0-3", "4-7"), "00001111");
    made(8, 2, LISTS("0-3,6", "7,4-5"), "00001101");
    made(8, 2, LISTS(" 0 - 3 ,\t7 ", "4-6"), "00001110");
    made(8, 3, LISTS("7,6,5,4,3,2,1,0", "", "  "), "00000000");
    made(4, 2, LISTS("00000,1", "2-0003"), "0011");
    made(12, 3, LISTS("0,2,4,6,8,10", "1-1,3-3", "5,7,9,11"), "010102020202");
}

static void test_lists_and_rest(void)
{
    made(8, 2, LISTS("2-3", NULL), "11001111");
    made(8, 3, LISTS(NULL, "0-3", NULL), "11110022");
    made(8, 3, LISTS(NULL, "3", NULL), "00010222");
    made(8, 2, LISTS("0-7", NULL), "00000000"); /* nothing is left */
    made(8, 3, LISTS("", NULL, NULL), "11112222");
}

static void test_refusals(void)
{
    refused(8, 2, LISTS("0-3", "4-6"), "1 of 8 experts are owned by no shard: 7");
    refused(16, 2, LISTS("1", "5-7,9"), "11 of 16 experts are owned by no shard: 0,2-4,8,10-15");
    refused(8, 2, LISTS("", ""), "8 of 8 experts are owned by no shard: 0-7");
    refused(8, 2, LISTS("0-4", "4-7"), "expert 4 is owned by shard 0 and by shard 1");
    refused(8, 2, LISTS("0,1,0", NULL), "shard 0: expert 0 is listed twice");
    refused(8, 2, LISTS("0-3,2-5", NULL), "shard 0: expert 2 is listed twice");
    refused(8, 2, LISTS("0-3", "4-8"),
            "shard 1: expert 8 does not exist: the model has experts 0-7");
    refused(8, 2, LISTS("8", NULL), "shard 0: expert 8 does not exist");
    refused(8, 2, LISTS("4294967296", NULL), "does not exist");
    refused(8, 2, LISTS("18446744073709551617", NULL), "does not exist");
    refused(8, 2, LISTS("3-1", NULL), "shard 0: experts 3-1: the range runs backwards");
    static const struct {
        const char *list, *column;
    } bad[] = {{"x", "column 1"},     {"1,", "column 3"},  {",1", "column 1"},
               {"1,,2", "column 3"},  {"1-", "column 3"},  {"-1", "column 1"},
               {"1-2-3", "column 4"}, {"1 2", "column 3"}, {"0x3", "column 2"},
               {"1;2", "column 2"},   {"+1", "column 1"},  {"1.0", "column 2"},
               {"0 , ", "column 5"}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        refused(8, 2, LISTS(NULL, bad[i].list), "shard 1: experts \"");
        refused(8, 2, LISTS(NULL, bad[i].list), bad[i].column);
    }
    refused(0, 1, NULL, "0 experts on 1 shards");
    refused(8, 0, NULL, "8 experts on 0 shards");
    refused(-1, 1, NULL, "both must be from 1");
    refused(40000, 1, NULL, "both must be from 1");
}

/* Hundreds of gaps: the list in the message is cut, the count is not. */
static void test_many_gaps(void)
{
    ep_buf list = {0};
    for (int e = 0; e < 2000; e += 2)
        CHECK_INT(ep_buf_printf(&list, e ? ",%d" : "%d", e), EP_OK);
    CHECK_INT(ep_buf_add(&list, "", 1), EP_OK);
    refused(2000, 1, LISTS((const char *)list.data),
            "1000 of 2000 experts are owned by no shard: 1,3,5");
    refused(2000, 1, LISTS((const char *)list.data), ",...");
    ep_buf_fini(&list);
}

/* Lists made from random owners give those owners back. */
static void test_random(void)
{
    uint32_t state = SEED;
    printf("    seed %u\n", SEED);
    for (int round = 0; round < 200; round++) {
        int n_experts = 1 + round % 61, n_shards = 1 + round % 7;
        int owner[64];
        ep_buf lists[7] = {{0}};
        const char *texts[7];
        for (int e = 0; e < n_experts; e++) {
            state = state * 1664525u + 1013904223u;
            owner[e] = (int)((state >> 16) % (uint32_t)n_shards);
            ep_buf *l = &lists[owner[e]];
            CHECK_INT(ep_buf_printf(l, l->len ? ",%d" : "%d", e), EP_OK);
        }
        for (int s = 0; s < n_shards; s++) {
            CHECK_INT(ep_buf_add(&lists[s], "", 1), EP_OK);
            texts[s] = (const char *)lists[s].data;
        }
        model_placement p;
        CHECK_INT(model_placement_make(&p, n_experts, n_shards, texts, 1, NULL), EP_OK);
        for (int e = 0; e < n_experts; e++)
            CHECK_INT(p.owner[e], owner[e]);
        check_sound(&p);
        model_placement_fini(&p);
        for (int s = 0; s < n_shards; s++)
            ep_buf_fini(&lists[s]);
    }
}

static void test_memory_fails(void)
{
    for (int n = 1; n <= 3; n++) {
        model_placement p = {.n_experts = -5};
        ep_err err = {{0}};
        ep_alloc_fail_at(n);
        CHECK_INT(model_placement_make(&p, 8, 2, NULL, 1, &err), EP_ERR_NOMEM);
        ep_alloc_fail_at(0);
        CHECK(err.text[0] != '\0' && p.n_experts == -5);
    }
    model_placement p;
    ep_alloc_fail_at(4);
    CHECK_INT(model_placement_make(&p, 8, 2, NULL, 1, NULL), EP_OK);
    ep_alloc_fail_at(0);
    model_placement_fini(&p);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"the rest is split evenly", test_even_split},
        {"lists", test_lists},
        {"lists and the rest", test_lists_and_rest},
        {"what is refused", test_refusals},
        {"many gaps", test_many_gaps},
        {"random owners", test_random},
        {"every allocation fails once", test_memory_fails},
    };
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
