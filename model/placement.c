/*
 * Which shard owns which expert.
 *
 * Rules:
 *  1. A shard with a list owns exactly the listed experts; lists are read in shard order.
 *  2. What no list names is dealt to the shards without a list, in order of id, in runs: with r
 * experts left and n such shards, the first r % n get one more than the rest.
 *  3. Every expert ends with exactly one owner, or the placement is refused and the experts are
 * named.
 *  4. A shard's local index follows the expert's id, whatever the order of its list.
 *
 * The result depends on the arguments alone, so every rank computes the same.
 */
#include "model/model.h"

#include <stdio.h>
#include <string.h>

#define MAX_EXPERTS 32767 /* ids and shards are int16_t */

static bool is_blank(char c)
{
    return c == ' ' || c == '\t';
}

static void skip_blanks(const char **p)
{
    while (is_blank(**p))
        (*p)++;
}

/* A decimal number without sign; saturates, so that what is too large stays too large. */
static bool read_number(const char **p, long *out)
{
    if (**p < '0' || **p > '9') return false;
    long v = 0;
    for (; **p >= '0' && **p <= '9'; (*p)++)
        v = v > MAX_EXPERTS ? v : v * 10 + (**p - '0');
    *out = v;
    return true;
}

static ep_status own_range(model_placement *p, int shard, long first, long last, ep_err *err)
{
    if (last < first)
        return ep_fail(err, EP_ERR_INVALID, "shard %d: experts %ld-%ld: the range runs backwards",
                       shard, first, last);
    if (last >= p->n_experts)
        return ep_fail(err, EP_ERR_INVALID,
                       "shard %d: expert %ld does not exist: the model has experts 0-%d", shard,
                       first >= p->n_experts ? first : last, p->n_experts - 1);
    for (long e = first; e <= last; e++) {
        if (p->owner[e] == shard)
            return ep_fail(err, EP_ERR_INVALID, "shard %d: expert %ld is listed twice", shard, e);
        if (p->owner[e] >= 0)
            return ep_fail(err, EP_ERR_INVALID, "expert %ld is owned by shard %d and by shard %d",
                           e, p->owner[e], shard);
        p->owner[e] = (int16_t)shard;
    }
    return EP_OK;
}

static ep_status own_list(model_placement *p, int shard, const char *list, ep_err *err)
{
    const char *at = list;
    skip_blanks(&at);
    while (*at != '\0') {
        long first, last;
        if (!read_number(&at, &first)) break;
        last = first;
        skip_blanks(&at);
        if (*at == '-') {
            at++;
            skip_blanks(&at);
            if (!read_number(&at, &last)) break;
            skip_blanks(&at);
        }
        ep_status status = own_range(p, shard, first, last, err);
        if (status != EP_OK) return status;
        if (*at == '\0') return EP_OK;
        if (*at != ',') break;
        at++;
        skip_blanks(&at);
        if (*at == '\0') break; /* a comma promises more */
    }
    if (*at == '\0' && at == list + strspn(list, " \t")) return EP_OK;
    return ep_fail(err, EP_ERR_INVALID,
                   "shard %d: experts \"%.100s\": expected a list such as 0-3,8 at column %d",
                   shard, list, (int)(at - list) + 1);
}

/* Names what nobody owns, as ranges; the text is cut where it would not fit. */
static ep_status refuse_uncovered(const model_placement *p, ep_err *err)
{
    char text[256];
    size_t at = 0;
    int n = 0;
    for (int e = 0; e < p->n_experts; e++) {
        if (p->owner[e] >= 0) continue;
        int first = e;
        while (e + 1 < p->n_experts && p->owner[e + 1] < 0)
            e++;
        n += e - first + 1;
        if (at > sizeof(text) - 32) continue;
        at += (size_t)snprintf(text + at, sizeof(text) - at, at ? ",%d" : "%d", first);
        if (e > first) at += (size_t)snprintf(text + at, sizeof(text) - at, "-%d", e);
        if (at > sizeof(text) - 32) at += (size_t)snprintf(text + at, sizeof(text) - at, ",...");
    }
    if (n == 0) return EP_OK;
    return ep_fail(err, EP_ERR_INVALID, "%d of %d experts are owned by no shard: %s", n,
                   p->n_experts, text);
}

/* Rule 2. */
static void deal_rest(model_placement *p, const char *const *lists)
{
    int rest = 0, takers = 0, e = 0;
    for (int i = 0; i < p->n_experts; i++)
        rest += p->owner[i] < 0;
    for (int s = 0; s < p->n_shards; s++)
        takers += lists == NULL || lists[s] == NULL;
    for (int s = 0, taker = 0; s < p->n_shards; s++) {
        if (lists != NULL && lists[s] != NULL) continue;
        int share = rest / takers + (taker < rest % takers);
        for (; share > 0; e++) {
            if (p->owner[e] >= 0) continue;
            p->owner[e] = (int16_t)s;
            share--;
        }
        taker++;
    }
}

ep_status model_placement_make(model_placement *out, int n_experts, int n_shards,
                               const char *const *lists, uint32_t epoch, ep_err *err)
{
    if (n_experts < 1 || n_experts > MAX_EXPERTS || n_shards < 1 || n_shards > MAX_EXPERTS)
        return ep_fail(err, EP_ERR_INVALID, "%d experts on %d shards: both must be from 1 to %d",
                       n_experts, n_shards, MAX_EXPERTS);
    model_placement p = {.n_experts = n_experts, .n_shards = n_shards, .epoch = epoch};
    ep_status status = EP_ERR_NOMEM;
    p.owner = ep_alloc((size_t)n_experts * sizeof(*p.owner));
    p.local = ep_calloc((size_t)n_experts, sizeof(*p.local));
    p.n_owned = ep_calloc((size_t)n_shards, sizeof(*p.n_owned));
    if (p.owner == NULL || p.local == NULL || p.n_owned == NULL) {
        ep_fail(err, status, "no memory for the placement of %d experts", n_experts);
        goto fail;
    }
    for (int e = 0; e < n_experts; e++)
        p.owner[e] = -1;
    for (int s = 0; s < n_shards && lists != NULL; s++) {
        if (lists[s] == NULL) continue;
        status = own_list(&p, s, lists[s], err);
        if (status != EP_OK) goto fail;
    }
    deal_rest(&p, lists);
    status = refuse_uncovered(&p, err);
    if (status != EP_OK) goto fail;
    for (int e = 0; e < n_experts; e++)
        p.local[e] = p.n_owned[p.owner[e]]++;
    *out = p;
    return EP_OK;
fail:
    model_placement_fini(&p);
    return status;
}

void model_placement_fini(model_placement *p)
{
    if (p == NULL) return;
    ep_free(p->owner);
    ep_free(p->local);
    ep_free(p->n_owned);
    memset(p, 0, sizeof(*p));
}
