/*
 * Whatever is wrong with a slice is refused with the reason, counted, and hurts nothing: every
 * field by itself, damaged bytes, other kinds of messages, random damage behind a good checksum.
 */
#include "tests/unit/shard_fixture.h"

/* ---- refusals -----------------------------------------------------------------------------------
 */

/* Sends bytes as they are and expects an error (or, for why NONE, a reply). */
static void expect_error(world *w, const char *what, const void *msg, size_t bytes, wire_reason why)
{
    const shard_counters *c = shard_counters_get(w->s);
    uint64_t before = c->errors[why], slices = c->layers[1].slices;
    size_t reply_bytes = 0;
    wire_header r = {0};
    wire_reason bad = WIRE_WHY_NONE;
    shard_answer(w->s, msg, bytes, 42, w->reply, &reply_bytes);
    CHECK(wire_open(w->reply, reply_bytes, &r, &bad) == EP_OK);
    if (r.kind != WIRE_ERROR || r.reason != why)
        printf("    %s: kind %d, reason %s, expected %s\n", what, r.kind,
               wire_reason_name((wire_reason)r.reason), wire_reason_name(why));
    CHECK_INT(r.kind, WIRE_ERROR);
    CHECK_INT(r.reason, why);
    CHECK_INT(reply_bytes, WIRE_HEADER_BYTES);
    CHECK_INT(c->errors[why], before + 1);
    CHECK_INT(c->layers[1].slices, slices);
    if (bytes >= WIRE_HEADER_BYTES && why != WIRE_WHY_MAGIC && why != WIRE_WHY_CHECKSUM) {
        CHECK_INT(r.sequence, w->h.sequence);
        CHECK_INT(r.step, w->h.step);
        CHECK_INT(r.router, w->h.router);
    }
    if (bytes < WIRE_HEADER_BYTES) CHECK_INT(r.router, 42);
}

static void expect_refused(world *w, const char *what, wire_header h, const wire_pair *pairs,
                           wire_reason why)
{
    size_t bytes;
    void *msg = fixture_slice(&h, w->x, pairs, &bytes);
    CHECK(msg != NULL);
    if (msg != NULL) expect_error(w, what, msg, bytes, why);
    ep_free(msg);
}

static void refuse_fields(world *w)
{
    wire_header h = w->h;
    h.epoch = 8;
    expect_refused(w, "epoch", h, w->pairs, WIRE_WHY_EPOCH);
    h = w->h;
    h.shard = 0;
    expect_refused(w, "shard", h, w->pairs, WIRE_WHY_EPOCH);
    h = w->h;
    h.layer = (uint16_t)w->m->shape.n_layers;
    expect_refused(w, "layer", h, w->pairs, WIRE_WHY_LAYER);
    h.layer = UINT16_MAX;
    expect_refused(w, "last layer", h, w->pairs, WIRE_WHY_LAYER);
    h = w->h;
    h.hidden /= 2;
    h.form = KERN_ACT_F32;
    expect_refused(w, "hidden", h, w->pairs, WIRE_WHY_FORM);
    h = w->h;
    h.form = h.form == KERN_ACT_Q8_32 ? KERN_ACT_Q8_256 : KERN_ACT_Q8_32;
    if (h.hidden % 256 == 0) expect_refused(w, "form", h, w->pairs, WIRE_WHY_FORM);
    h = w->h;
    h.form = KERN_ACT_BF16;
    expect_refused(w, "form bf16", h, w->pairs, WIRE_WHY_FORM);
}

static void refuse_counts(world *w)
{
    wire_header h = w->h;
    h.form = KERN_ACT_F32;
    h.n_rows = MAX_ROWS + 1;
    float *many = fixture_rows(MAX_ROWS + 1, (int)h.hidden), *x = w->x;
    w->x = many;
    expect_refused(w, "rows", h, w->pairs, WIRE_WHY_COUNT);
    w->x = x;
    ep_free(many);
    int owned = w->p.n_owned[w->h.shard], top_k = w->m->shape.top_k;
    h = w->h;
    h.n_pairs = (uint32_t)(MAX_ROWS * (owned < top_k ? owned : top_k) + 1);
    wire_pair *pairs = ep_alloc(h.n_pairs * sizeof(*pairs));
    for (uint32_t i = 0; i < h.n_pairs; i++)
        pairs[i] = w->pairs[0];
    expect_refused(w, "pairs", h, pairs, WIRE_WHY_COUNT);
    ep_free(pairs);
    h = w->h;
    h.n_pairs = 0;
    expect_refused(w, "no pairs", h, w->pairs, WIRE_WHY_COUNT);
    h = w->h;
    h.n_rows = 0;
    expect_refused(w, "no rows", h, w->pairs, WIRE_WHY_COUNT);
}

static void refuse_pairs(world *w)
{
    wire_pair *last = &w->pairs[w->h.n_pairs - 1], good = *last;
    last->expert = 0; /* the first shard's */
    expect_refused(w, "expert of another shard", w->h, w->pairs, WIRE_WHY_EXPERT);
    last->expert = (uint16_t)w->m->shape.n_experts;
    expect_refused(w, "expert", w->h, w->pairs, WIRE_WHY_EXPERT);
    last->expert = UINT16_MAX;
    expect_refused(w, "last expert", w->h, w->pairs, WIRE_WHY_EXPERT);
    *last = good;
    last->row = w->h.n_rows;
    expect_refused(w, "row", w->h, w->pairs, WIRE_WHY_ROW);
    last->row = UINT32_MAX;
    expect_refused(w, "last row", w->h, w->pairs, WIRE_WHY_ROW);
    *last = good;
    last->slot = (uint16_t)w->m->shape.top_k;
    expect_refused(w, "slot", w->h, w->pairs, WIRE_WHY_ROW);
    *last = good;
}

static void refuse_bytes(world *w)
{
    size_t bytes;
    uint8_t *msg = fixture_slice(&w->h, w->x, w->pairs, &bytes);
    CHECK(msg != NULL);
    if (msg == NULL) return;
    expect_error(w, "nothing", msg, 0, WIRE_WHY_LENGTH);
    expect_error(w, "part of a header", msg, WIRE_HEADER_BYTES - 1, WIRE_WHY_LENGTH);
    expect_error(w, "header alone", msg, WIRE_HEADER_BYTES, WIRE_WHY_LENGTH);
    expect_error(w, "one byte short", msg, bytes - 1, WIRE_WHY_LENGTH);
    msg[bytes - 1] ^= 1;
    expect_error(w, "last byte", msg, bytes, WIRE_WHY_CHECKSUM);
    msg[bytes - 1] ^= 1;
    msg[WIRE_HEADER_BYTES + 3] ^= 0x80;
    expect_error(w, "first row", msg, bytes, WIRE_WHY_CHECKSUM);
    msg[WIRE_HEADER_BYTES + 3] ^= 0x80;
    msg[0] ^= 1;
    expect_error(w, "magic", msg, bytes, WIRE_WHY_MAGIC);
    msg[0] ^= 1;
    msg[4] ^= 2;
    expect_error(w, "version", msg, bytes, WIRE_WHY_VERSION);
    ep_free(msg);
}

static void refusals(void)
{
    world w;
    if (world_open(&w, FIXTURE_DEMO, 2, (const char *const[]){"0-3", NULL}, 1)) {
        refuse_fields(&w);
        refuse_counts(&w);
        refuse_pairs(&w);
        refuse_bytes(&w);
        /* None of it hurt: the slice is still answered. */
        float *got = ep_alloc((size_t)w.h.n_pairs * w.h.hidden * 4);
        CHECK(ask(&w, w.s, &w.h, w.x, w.pairs, got));
        ep_free(got);
    }
    world_close(&w);
}

/* Messages without payload: a hello comes back, an error is never answered, a reply is a wrong
 * kind. */
static void other_kinds(void)
{
    world w;
    if (world_open(&w, FIXTURE_MICRO, 1, NULL, 0)) {
        uint64_t msg[WIRE_HEADER_BYTES / 8];
        wire_header h = {.kind = WIRE_HELLO, .sequence = 99, .router = 2, .step = 4}, r = {0};
        wire_reason why = WIRE_WHY_NONE;
        size_t bytes = 0;
        wire_seal(msg, sizeof(msg), &h);
        shard_answer(w.s, msg, sizeof(msg), 2, w.reply, &bytes);
        CHECK(wire_open(w.reply, bytes, &r, &why) == EP_OK);
        CHECK_INT(r.kind, WIRE_HELLO);
        CHECK_INT(r.sequence, 99);
        CHECK_INT(r.epoch, 7);
        h.kind = WIRE_ERROR;
        h.reason = WIRE_WHY_LAYER;
        wire_seal(msg, sizeof(msg), &h);
        shard_answer(w.s, msg, sizeof(msg), 2, w.reply, &bytes);
        CHECK_INT(bytes, 0);
        CHECK_INT(shard_counters_get(w.s)->errors[WIRE_WHY_KIND], 1);
        h.kind = 77;
        wire_seal(msg, sizeof(msg), &h);
        shard_answer(w.s, msg, sizeof(msg), 2, w.reply, &bytes);
        CHECK(wire_open(w.reply, bytes, &r, &why) == EP_OK);
        CHECK_INT(r.kind, WIRE_ERROR);
        CHECK_INT(r.reason, WIRE_WHY_KIND);
        float *back = ep_calloc(2 * w.h.hidden * 4 + WIRE_HEADER_BYTES, 1);
        h = w.h;
        h.kind = WIRE_REPLY;
        h.form = KERN_ACT_F32;
        h.n_pairs = h.n_rows = 2;
        bytes = wire_reply_bytes(h.hidden, 2);
        wire_seal(back, bytes, &h);
        shard_answer(w.s, back, bytes, 2, w.reply, &bytes);
        CHECK(wire_open(w.reply, bytes, &r, &why) == EP_OK);
        CHECK_INT(r.kind, WIRE_ERROR);
        CHECK_INT(r.reason, WIRE_WHY_KIND);
        ep_free(back);
    }
    world_close(&w);
}

/* Random damage, sealed again so that the checks behind the checksum see it. */
static void random_damage(void)
{
    world w;
    if (world_open(&w, FIXTURE_MICRO, 2, (const char *const[]){"0", NULL}, 1)) {
        size_t bytes, reply_bytes;
        uint8_t *good = fixture_slice(&w.h, w.x, w.pairs, &bytes), *msg = ep_alloc(bytes);
        size_t pairs_at = wire_slice_pairs_at((kern_act)w.h.form, w.h.hidden, w.h.n_rows);
        int n_refused = 0;
        for (int i = 0; i < 3000; i++) {
            memcpy(msg, good, bytes);
            wire_header h = w.h, r = {0};
            wire_reason why = WIRE_WHY_NONE;
            size_t at = pairs_at + fixture_random() % (bytes - pairs_at);
            msg[at] = (uint8_t)fixture_random();
            if (i % 3 == 0)
                ((uint8_t *)&h)[fixture_random() % sizeof(h)] ^= (uint8_t)(1u << (i % 8));
            wire_seal(msg, bytes, &h);
            shard_answer(w.s, msg, i % 5 == 0 ? fixture_random() % bytes : bytes, 0, w.reply,
                         &reply_bytes);
            if (reply_bytes == 0) continue; /* the damage made it an error */
            CHECK(wire_open(w.reply, reply_bytes, &r, &why) == EP_OK);
            CHECK(r.kind == WIRE_REPLY || r.kind == WIRE_ERROR || r.kind == WIRE_HELLO);
            n_refused += r.kind == WIRE_ERROR;
        }
        CHECK(n_refused > 500 && n_refused < 3000);
        ep_free(good);
        ep_free(msg);
    }
    world_close(&w);
}

static void nothing_owned(void)
{
    world w;
    if (world_open(&w, FIXTURE_DEMO, 2, (const char *const[]){NULL, ""}, 1)) {
        CHECK_INT(w.p.n_owned[1], 0);
        CHECK_INT(shard_counters_get(w.s)->weight_bytes, 0);
        shard *all = fixture_shard(w.m, &w.p, 0, 1, MAX_ROWS);
        CHECK(all != NULL);
        for (int l = 0; all != NULL && l < w.m->shape.n_layers; l++)
            CHECK_INT(shard_layer_form(w.s, l), shard_layer_form(all, l));
        shard_close(all);
        expect_refused(&w, "nothing owned", w.h, w.pairs, WIRE_WHY_EXPERT);
        CHECK(strlen(shard_describe(w.s)) > 0);
    }
    world_close(&w);
}

static const test_case cases[] = {
    {"refusals", refusals},
    {"other_kinds", other_kinds},
    {"random_damage", random_damage},
    {"nothing_owned", nothing_owned},
};

int main(int argc, char **argv)
{
    printf("seed %u\n", FIXTURE_SEED);
    ep_err err = {{0}};
    if (kern_select("auto", &err) != EP_OK) {
        printf("%s\n", err.text);
        return 1;
    }
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
