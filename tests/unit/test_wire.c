/*
 * Proves the row protocol: fields survive a round trip, the bytes are little-endian at their
 * documented places, every single flipped bit and every shortened message is refused with the right
 * reason, sizes that do not exist are 0, and sealed messages whose counts lie are refused before a
 * view is made.
 */
#include "proto/wire.h"
#include "tests/test.h"

#include <stdlib.h>

#define SEED UINT64_C(0x1234567)

static uint64_t next_random(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

static wire_header sample_header(uint16_t kind)
{
    return (wire_header){
        .kind = kind,
        .epoch = 0x01020304,
        .router = 0x1112,
        .shard = 0x2122,
        .step = UINT64_C(0x3132333435363738),
        .sequence = UINT64_C(0x4142434445464748),
        .layer = 0x5152,
        .micro = 0x6162,
        .form = KERN_ACT_Q8_32,
        .n_rows = 3,
        .n_pairs = 5,
        .hidden = 64,
        .compute_ns = UINT64_C(0x7172737475767778),
        .wait_ns = UINT64_C(0x0182838485868788),
    };
}

/* A sealed slice of random rows; the caller frees it. */
static uint8_t *make_slice(const wire_header *h, size_t *bytes)
{
    uint64_t s = SEED;
    *bytes = wire_slice_bytes((kern_act)h->form, h->hidden, h->n_rows, h->n_pairs);
    uint8_t *msg = ep_calloc(1, *bytes);
    if (msg == NULL) abort();
    size_t at = wire_slice_pairs_at((kern_act)h->form, h->hidden, h->n_rows);
    for (size_t i = wire_slice_rows_at(); i < at; i++)
        msg[i] = (uint8_t)next_random(&s);
    for (uint32_t i = 0; i < h->n_pairs; i++) {
        wire_pair p = {.row = i % h->n_rows, .expert = (uint16_t)(7 * i), .slot = (uint16_t)i};
        wire_put_pair(msg + at, i, p);
    }
    wire_seal(msg, *bytes, h);
    return msg;
}

static void check_fields(const wire_header *h, const wire_header *want)
{
    CHECK_INT(h->magic, WIRE_MAGIC);
    CHECK_INT(h->version, WIRE_VERSION);
    CHECK_INT(h->kind, want->kind);
    CHECK_INT(h->epoch, want->epoch);
    CHECK_INT(h->router, want->router);
    CHECK_INT(h->shard, want->shard);
    CHECK(h->step == want->step);
    CHECK(h->sequence == want->sequence);
    CHECK_INT(h->layer, want->layer);
    CHECK_INT(h->micro, want->micro);
    CHECK_INT(h->form, want->form);
    CHECK_INT(h->reason, want->reason);
    CHECK_INT(h->n_rows, want->n_rows);
    CHECK_INT(h->n_pairs, want->n_pairs);
    CHECK_INT(h->hidden, want->hidden);
    CHECK_INT(h->flags, 0);
    CHECK(h->compute_ns == want->compute_ns);
    CHECK(h->wait_ns == want->wait_ns);
}

static void test_slice(void)
{
    const kern_act forms[] = {KERN_ACT_F32, KERN_ACT_Q8_256, KERN_ACT_Q8_32, KERN_ACT_Q8_128,
                              KERN_ACT_BF16};
    for (size_t f = 0; f < sizeof(forms) / sizeof(forms[0]); f++) {
        wire_header want = sample_header(WIRE_SLICE), h;
        wire_reason why;
        size_t bytes;
        want.form = (uint16_t)forms[f];
        want.hidden = 256;
        uint8_t *msg = make_slice(&want, &bytes);
        CHECK_INT(wire_open(msg, bytes, &h, &why), EP_OK);
        CHECK_INT(why, WIRE_WHY_NONE);
        check_fields(&h, &want);
        CHECK(h.bytes == bytes - WIRE_HEADER_BYTES);
        CHECK(wire_slice_rows(msg, &h) == msg + WIRE_HEADER_BYTES);
        size_t at = wire_slice_pairs_at(forms[f], 256, 3);
        CHECK(at % 8 == 0 && at >= WIRE_HEADER_BYTES + 3 * kern_act_row_bytes(forms[f], 256));
        CHECK(at < WIRE_HEADER_BYTES + 3 * kern_act_row_bytes(forms[f], 256) + 8);
        CHECK(bytes == at + 5 * 8);
        for (uint32_t i = 0; i < want.n_pairs; i++) {
            wire_pair p = wire_slice_pair(msg, &h, i);
            CHECK_INT(p.row, i % 3);
            CHECK_INT(p.expert, 7 * i);
            CHECK_INT(p.slot, i);
        }
        ep_free(msg);
    }
}

static void test_layout(void)
{
    static const uint8_t want[] = {
        'm',  'o',  'e',  'd',  2,    0,    4,    0,    /* magic, version, kind */
        4,    3,    2,    1,    0x12, 0x11, 0x22, 0x21, /* epoch, router, shard */
        0x38, 0x37, 0x36, 0x35, 0x34, 0x33, 0x32, 0x31, /* step */
        0x48, 0x47, 0x46, 0x45, 0x44, 0x43, 0x42, 0x41, /* sequence */
        0x52, 0x51, 0x62, 0x61, 2,    0,    0,    0,    /* layer, micro, form, reason */
        3,    0,    0,    0,    5,    0,    0,    0,    /* rows, pairs */
        64,   0,    0,    0,    0,    0,    0,    0,    /* hidden, flags */
        0,    0,    0,    0,    0,    0,    0,    0,    /* bytes */
        0x78, 0x77, 0x76, 0x75, 0x74, 0x73, 0x72, 0x71, /* compute */
        0x88, 0x87, 0x86, 0x85, 0x84, 0x83, 0x82, 0x01, /* wait */
    };
    uint8_t msg[WIRE_HEADER_BYTES];
    memset(msg, 0xee, sizeof(msg));
    wire_header h = sample_header(WIRE_HELLO);
    wire_seal(msg, sizeof(msg), &h);
    CHECK_INT(sizeof(want), 80);
    for (size_t i = 0; i < sizeof(want); i++)
        CHECK_INT(msg[i], want[i]);
    for (size_t i = 88; i < 96; i++)
        CHECK_INT(msg[i], 0);

    uint8_t pair[8];
    wire_put_pair(pair, 0, (wire_pair){.row = 0x01020304, .expert = 0x0506, .slot = 0x0708});
    static const uint8_t want_pair[8] = {4, 3, 2, 1, 6, 5, 8, 7};
    CHECK(memcmp(pair, want_pair, 8) == 0);
}

static void test_reply(void)
{
    wire_header want = sample_header(WIRE_REPLY), h;
    wire_reason why;
    size_t bytes = wire_reply_bytes(64, 5);
    CHECK_INT(bytes, 96 + 64 * 5 * 4);
    uint8_t *msg = ep_calloc(1, bytes);
    if (msg == NULL) abort();
    float *rows = (float *)(msg + WIRE_HEADER_BYTES);
    for (int i = 0; i < 64 * 5; i++)
        rows[i] = (float)i;
    wire_seal(msg, bytes, &want);
    CHECK_INT(wire_open(msg, bytes, &h, &why), EP_OK);
    check_fields(&h, &want);
    CHECK(wire_reply_rows(msg, &h)[319] == 319.0f);
    ep_free(msg);
}

static void test_error(void)
{
    wire_header want = sample_header(WIRE_ERROR), h;
    wire_reason why;
    uint8_t msg[WIRE_HEADER_BYTES + 8] = {0};
    want.reason = WIRE_WHY_DRAINING;
    wire_seal(msg, WIRE_HEADER_BYTES, &want);
    CHECK_INT(wire_open(msg, WIRE_HEADER_BYTES, &h, &why), EP_OK);
    check_fields(&h, &want);
    wire_seal(msg, sizeof(msg), &want); /* errors and heartbeats have no payload */
    CHECK_INT(wire_open(msg, sizeof(msg), &h, &why), EP_ERR_PROTO);
    CHECK_INT(why, WIRE_WHY_COUNT);
    want.kind = WIRE_HELLO;
    wire_seal(msg, sizeof(msg), &want);
    CHECK_INT(wire_open(msg, sizeof(msg), &h, &why), EP_ERR_PROTO);
    CHECK_INT(why, WIRE_WHY_COUNT);
}

static void test_every_bit(void)
{
    wire_header want = sample_header(WIRE_SLICE), h;
    wire_reason why;
    size_t bytes;
    uint8_t *msg = make_slice(&want, &bytes);
    for (size_t bit = 0; bit < bytes * 8; bit++) {
        msg[bit / 8] ^= (uint8_t)(1u << bit % 8);
        wire_reason expected = bit < 32                  ? WIRE_WHY_MAGIC
                               : bit < 48                ? WIRE_WHY_VERSION
                               : bit >= 448 && bit < 512 ? WIRE_WHY_LENGTH
                                                         : WIRE_WHY_CHECKSUM;
        CHECK_INT(wire_open(msg, bytes, &h, &why), EP_ERR_PROTO);
        CHECK_INT(why, expected);
        msg[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    CHECK_INT(wire_open(msg, bytes, &h, &why), EP_OK);
    ep_free(msg);
}

/* Of several MiB, the last of them not full: the same with and without threads, and each MiB
 * counts.
 */
static void test_large(void)
{
    wire_header want = sample_header(WIRE_REPLY), h;
    wire_reason why;
    want.hidden = 1024;
    want.n_pairs = 1100;
    size_t bytes = wire_reply_bytes(want.hidden, want.n_pairs), mib = (size_t)1 << 20;
    uint64_t state = SEED;
    uint8_t *msg = ep_alloc(bytes), header[WIRE_HEADER_BYTES];
    ep_pool *pool = NULL;
    if (msg == NULL || ep_pool_open(&pool, 3) != EP_OK) abort();
    for (size_t i = 0; i < bytes; i++)
        msg[i] = (uint8_t)next_random(&state);
    wire_seal(msg, bytes, &want);
    memcpy(header, msg, sizeof(header));
    wire_seal_on(pool, msg, bytes, &want);
    CHECK(memcmp(header, msg, sizeof(header)) == 0);
    CHECK_INT(wire_open(msg, bytes, &h, &why), EP_OK);
    CHECK_INT(wire_open_on(pool, msg, bytes, &h, &why), EP_OK);
    for (size_t at = WIRE_HEADER_BYTES; at < bytes; at += mib)
        for (int last = 0; last < 2; last++) {
            size_t byte = !last ? at : at + mib <= bytes ? at + mib - 1 : bytes - 1;
            msg[byte] ^= 16;
            CHECK_INT(wire_open_on(pool, msg, bytes, &h, &why), EP_ERR_PROTO);
            CHECK_INT(why, WIRE_WHY_CHECKSUM);
            msg[byte] ^= 16;
        }
    uint8_t *first = msg + WIRE_HEADER_BYTES, *part = ep_alloc(mib); /* in another order */
    if (part == NULL) abort();
    memcpy(part, first, mib);
    memmove(first, first + mib, mib);
    memcpy(first + mib, part, mib);
    CHECK_INT(wire_open_on(pool, msg, bytes, &h, &why), EP_ERR_PROTO);
    ep_pool_close(pool);
    ep_free(part);
    ep_free(msg);
}

static void test_every_length(void)
{
    wire_header want = sample_header(WIRE_SLICE), h;
    wire_reason why;
    size_t bytes;
    uint8_t *msg = make_slice(&want, &bytes);
    for (size_t n = 0; n < bytes; n++) {
        /* An exact heap copy, so that an address sanitizer sees a read past the end. */
        uint8_t *cut = ep_alloc(n);
        if (cut == NULL) abort();
        memcpy(cut, msg, n);
        memset(&h, 0xff, sizeof(h));
        CHECK_INT(wire_open(cut, n, &h, &why), EP_ERR_PROTO);
        CHECK_INT(why, WIRE_WHY_LENGTH);
        CHECK(h.sequence == (n < WIRE_HEADER_BYTES ? 0 : want.sequence));
        ep_free(cut);
    }
    uint8_t *longer = ep_calloc(1, bytes + 1);
    if (longer == NULL) abort();
    memcpy(longer, msg, bytes);
    CHECK_INT(wire_open(longer, bytes + 1, &h, &why), EP_ERR_PROTO);
    CHECK_INT(why, WIRE_WHY_LENGTH);
    ep_free(longer);
    ep_free(msg);
}

/* Seals the message with a lying header (length and checksum are right) and returns the reason. */
static wire_reason sealed_reason(uint8_t *msg, size_t bytes, const wire_header *lie)
{
    wire_header h;
    wire_reason why;
    wire_seal(msg, bytes, lie);
    return wire_open(msg, bytes, &h, &why) == EP_ERR_PROTO ? why : WIRE_WHY_NONE;
}

static void test_lies(void)
{
    const wire_header good = sample_header(WIRE_SLICE);
    size_t bytes;
    uint8_t *msg = make_slice(&good, &bytes);
    wire_header lie;
#define LIE(field, value, reason)                                                                  \
    lie = good;                                                                                    \
    lie.field = value;                                                                             \
    CHECK_INT(sealed_reason(msg, bytes, &lie), reason)
    LIE(n_rows, 0, WIRE_WHY_COUNT);
    LIE(n_rows, 4, WIRE_WHY_COUNT);
    LIE(n_rows, UINT32_MAX, WIRE_WHY_COUNT);
    LIE(n_pairs, 0, WIRE_WHY_COUNT);
    LIE(n_pairs, 4, WIRE_WHY_COUNT);
    LIE(n_pairs, UINT32_MAX, WIRE_WHY_COUNT);
    LIE(hidden, 0, WIRE_WHY_COUNT);
    LIE(hidden, 96, WIRE_WHY_COUNT);
    LIE(hidden, 65, WIRE_WHY_COUNT);
    LIE(hidden, UINT32_MAX, WIRE_WHY_COUNT);
    LIE(hidden, 0x80000000u, WIRE_WHY_COUNT);
    LIE(form, 5, WIRE_WHY_FORM);
    LIE(form, 65535, WIRE_WHY_FORM);
    LIE(form, KERN_ACT_Q8_256, WIRE_WHY_COUNT); /* 64 is no multiple of its block */
    LIE(kind, 0, WIRE_WHY_KIND);
    LIE(kind, 5, WIRE_WHY_KIND);
    LIE(kind, WIRE_REPLY, WIRE_WHY_COUNT);
    LIE(flags, 1, WIRE_WHY_VERSION);
#undef LIE
    ep_free(msg);
}

static void test_sizes(void)
{
    CHECK_INT(wire_slice_bytes(KERN_ACT_F32, 4, 1, 1), 96 + 16 + 8);
    CHECK_INT(wire_slice_bytes(KERN_ACT_F32, 3, 1, 1), 96 + 16 + 8);
    CHECK_INT(wire_slice_bytes(KERN_ACT_Q8_256, 512, 2, 3), 96 + 2 * (512 + 8) + 24);
    CHECK_INT(wire_slice_bytes((kern_act)77, 512, 2, 3), 0);
    CHECK_INT(wire_slice_bytes((kern_act)-1, 512, 2, 3), 0);
    CHECK_INT(wire_slice_bytes(KERN_ACT_Q8_256, 255, 2, 3), 0);
    CHECK_INT(wire_slice_bytes(KERN_ACT_F32, 0, 2, 3), 0);
    CHECK_INT(wire_slice_bytes(KERN_ACT_F32, UINT32_MAX, 2, 3), 0);
    CHECK_INT(wire_slice_bytes(KERN_ACT_F32, 1u << 28, 1u << 31, 1u << 31) >> 40, 1 << 21);
    CHECK_INT(wire_reply_bytes(UINT32_MAX, UINT32_MAX), 0); /* 2^66 bytes */
    CHECK_INT(wire_reply_bytes(1u << 31, 1u << 30) >> 60, 8);
    CHECK_INT(wire_reply_bytes(16, 2), 96 + 128);
}

static void test_names(void)
{
    for (int r = 0; r < WIRE_N_REASONS; r++) {
        CHECK(wire_reason_name((wire_reason)r) != NULL);
        CHECK(strcmp(wire_reason_name((wire_reason)r), "unknown") != 0);
    }
    CHECK_STR(wire_reason_name((wire_reason)WIRE_N_REASONS), "unknown");
    CHECK_STR(wire_reason_name((wire_reason)-1), "unknown");
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"slice", test_slice}, {"layout", test_layout},       {"reply", test_reply},
        {"error", test_error}, {"every_bit", test_every_bit}, {"every_length", test_every_length},
        {"lies", test_lies},   {"sizes", test_sizes},         {"names", test_names},
        {"large", test_large},
    };
    printf("seed %llx\n", (unsigned long long)SEED);
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
