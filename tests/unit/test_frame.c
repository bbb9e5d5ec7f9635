/*
 * Proves frames: a message and its payload survive a round trip, also when bytes arrive one by one
 * and when frames stand back to back; lengths beyond the limits, a foreign magic, an Envelope
 * without a body, bytes that are no protobuf, and random garbage are refused; a frame that is
 * refused or incomplete allocates nothing that stays. Allocation failures at every point give a
 * clean status.
 */
#include "proto/frame.h"
#include "tests/test.h"

#include <stdlib.h>

#define SEED UINT64_C(0x5eed0f7a3e)

static uint64_t next_random(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

/* A token message with payload, as a frame. */
static ep_buf token_frame(uint64_t id, const void *payload, size_t payload_bytes)
{
    Moed__Token t = MOED__TOKEN__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    Moed__TokenProb p = MOED__TOKEN_PROB__INIT, *top[1] = {&p};
    uint8_t text[] = {'o', 'n', 'c', 'e'};
    ep_buf out = {0};
    p.id = 7;
    p.logprob = -0.5f;
    t.id = id;
    t.token = 521;
    t.position = 3;
    t.logprob = -1.25;
    t.n_top = 1;
    t.top = top;
    t.text.data = text;
    t.text.len = sizeof(text);
    e.body_case = MOED__ENVELOPE__BODY_TOKEN;
    e.token = &t;
    if (proto_frame_add(&out, &e, payload, payload_bytes) != EP_OK) abort();
    CHECK_INT(out.len, proto_frame_size(&e, payload_bytes));
    return out;
}

static ep_status take(const void *p, size_t n, proto_frame *f, size_t *need)
{
    return proto_frame_take(p, n, 4096, 4096, f, need);
}

static void test_round(void)
{
    const float payload[3] = {1.0f, -2.0f, 0.5f};
    ep_buf b = token_frame(UINT64_C(0x1122334455667788), payload, sizeof(payload));
    proto_frame f;
    size_t need;
    CHECK_INT(take(b.data, b.len, &f, &need), EP_OK);
    CHECK_INT(f.frame_bytes, b.len);
    CHECK_INT(f.envelope->body_case, MOED__ENVELOPE__BODY_TOKEN);
    CHECK_STR(proto_envelope_name(f.envelope), "token");
    const Moed__Token *t = f.envelope->token;
    CHECK(t->id == UINT64_C(0x1122334455667788));
    CHECK_INT(t->token, 521);
    CHECK_INT(t->position, 3);
    CHECK(t->logprob == -1.25);
    CHECK_INT(t->n_top, 1);
    CHECK(t->top[0]->id == 7 && t->top[0]->logprob == -0.5f);
    CHECK_INT(t->text.len, 4);
    CHECK_INT(f.payload_bytes, sizeof(payload));
    CHECK(memcmp(f.payload, payload, sizeof(payload)) == 0);
    CHECK(f.payload >= b.data && f.payload + f.payload_bytes == b.data + b.len); /* borrowed */
    proto_frame_free(&f);
    CHECK(f.envelope == NULL);
    proto_frame_free(&f); /* twice does no harm */
    ep_buf_fini(&b);
}

/* The documented layout, byte by byte. */
static void test_bytes(void)
{
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    Moed__Drain d = MOED__DRAIN__INIT;
    ep_buf b = {0};
    e.body_case = MOED__ENVELOPE__BODY_DRAIN;
    e.drain = &d;
    CHECK_INT(proto_frame_add(&b, &e, "xyz", 3), EP_OK);
    /* field 26, length-delimited, empty: tag 26 << 3 | 2 = 210 = d2 01, length 0 */
    const uint8_t want[] = {'M', 'O', 'F', '1', 3, 0,    0,    0, 3,   0,   0,
                            0,   0,   0,   0,   0, 0xd2, 0x01, 0, 'x', 'y', 'z'};
    CHECK_INT(b.len, sizeof(want));
    CHECK(b.len == sizeof(want) && memcmp(b.data, want, sizeof(want)) == 0);
    ep_buf_fini(&b);
}

/* Every shorter input asks for more, never more than the frame. */
static void test_pieces(void)
{
    ep_buf b = token_frame(1, "payload", 7);
    for (size_t n = 0; n < b.len; n++) {
        proto_frame f;
        size_t need = 0;
        uint8_t *part = malloc(n ? n : 1); /* exact, so a sanitizer sees a read past it */
        if (part == NULL) abort();
        memcpy(part, b.data, n);
        CHECK_INT(take(part, n, &f, &need), EP_AGAIN);
        CHECK(need > n && need <= b.len);
        CHECK_INT(need, n < PROTO_FRAME_BYTES ? PROTO_FRAME_BYTES : b.len);
        free(part);
    }
    ep_buf_fini(&b);
}

static void test_back_to_back(void)
{
    ep_buf stream = {0};
    for (uint64_t i = 0; i < 5; i++) {
        ep_buf b = token_frame(i, "abcdefgh", (size_t)i);
        CHECK_INT(ep_buf_add(&stream, b.data, b.len), EP_OK);
        ep_buf_fini(&b);
    }
    size_t at = 0;
    for (uint64_t i = 0; i < 5; i++) {
        proto_frame f;
        size_t need;
        CHECK_INT(take(stream.data + at, stream.len - at, &f, &need), EP_OK);
        CHECK(f.envelope->token->id == i);
        CHECK_INT(f.payload_bytes, i);
        at += f.frame_bytes;
        proto_frame_free(&f);
    }
    CHECK_INT(at, stream.len);
    ep_buf_fini(&stream);
}

static void put_u32(uint8_t *p, uint32_t v)
{
    for (int i = 0; i < 4; i++)
        p[i] = (uint8_t)(v >> (8 * i));
}

static void test_limits(void)
{
    ep_buf b = token_frame(1, "payload", 7);
    size_t envelope = b.len - PROTO_FRAME_BYTES - 7, need;
    proto_frame f;
    uint64_t before = ep_alloc_count();
    CHECK_INT(proto_frame_take(b.data, b.len, envelope - 1, 4096, &f, &need), EP_ERR_PROTO);
    CHECK_INT(proto_frame_take(b.data, b.len, envelope, 6, &f, &need), EP_ERR_PROTO);
    CHECK_INT(proto_frame_take(b.data, b.len, 0, 0, &f, &need), EP_ERR_PROTO);
    /* Refused from the header alone: nobody is asked to send 4 GiB first. */
    put_u32(b.data + 4, UINT32_MAX);
    CHECK_INT(take(b.data, PROTO_FRAME_BYTES, &f, &need), EP_ERR_PROTO);
    put_u32(b.data + 4, (uint32_t)envelope);
    put_u32(b.data + 12, UINT32_MAX);
    CHECK_INT(take(b.data, PROTO_FRAME_BYTES, &f, &need), EP_ERR_PROTO);
    CHECK(ep_alloc_count() == before); /* and nothing was allocated on the way */
    put_u32(b.data + 12, 0);
    CHECK_INT(proto_frame_take(b.data, b.len, envelope, 7, &f, &need), EP_OK);
    proto_frame_free(&f);
    ep_buf_fini(&b);
}

static void test_foreign(void)
{
    ep_buf b = token_frame(1, NULL, 0);
    proto_frame f;
    size_t need;
    for (int i = 0; i < 4; i++) {
        b.data[i] ^= 0x20;
        CHECK_INT(take(b.data, b.len, &f, &need), EP_ERR_PROTO);
        b.data[i] ^= 0x20;
    }
    const char http[] = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    CHECK_INT(take(http, sizeof(http) - 1, &f, &need), EP_ERR_PROTO);
    put_u32(b.data + 4, 0); /* an empty Envelope is a valid protobuf message, and says nothing */
    CHECK_INT(take(b.data, PROTO_FRAME_BYTES, &f, &need), EP_ERR_PROTO);
    ep_buf_fini(&b);
    /* An Envelope that holds only a field nobody knows: no body either. */
    const uint8_t unknown[] = {'M', 'O', 'F', '1', 3, 0, 0,    0,    0, 0,
                               0,   0,   0,   0,   0, 0, 0xf8, 0x3f, 1};
    CHECK_INT(take(unknown, sizeof(unknown), &f, &need), EP_ERR_PROTO);
    /* Ends inside a field. */
    const uint8_t cut[] = {'M', 'O', 'F', '1', 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xd2, 0x01};
    CHECK_INT(take(cut, sizeof(cut), &f, &need), EP_ERR_PROTO);
}

/* Random bytes, and a good frame with random bytes changed: an answer, never a crash. */
static void test_garbage(void)
{
    uint64_t s = SEED;
    int taken = 0, refused = 0;
    printf("    seed %llu\n", (unsigned long long)SEED);
    for (int i = 0; i < 20000; i++) {
        ep_buf b = token_frame(next_random(&s), "payload", 7);
        int changes = (int)(next_random(&s) % 4) + 1;
        size_t from = i % 2 ? PROTO_FRAME_BYTES : 0;
        for (int j = 0; j < changes; j++)
            b.data[from + next_random(&s) % (b.len - from)] = (uint8_t)next_random(&s);
        proto_frame f;
        size_t need;
        ep_status status = take(b.data, b.len, &f, &need);
        if (status == EP_OK) {
            CHECK(f.envelope->body_case != MOED__ENVELOPE__BODY__NOT_SET);
            proto_frame_free(&f);
            taken++;
        } else {
            CHECK(status == EP_ERR_PROTO || (status == EP_AGAIN && need > b.len));
            refused++;
        }
        ep_buf_fini(&b);
    }
    CHECK(taken > 0 && refused > 0); /* the changes reach both sides */
}

static void test_no_memory(void)
{
    ep_buf b = token_frame(1, "payload", 7);
    bool ended = false;
    for (int64_t n = 1; n < 64 && !ended; n++) {
        proto_frame f;
        size_t need;
        ep_alloc_fail_at(n);
        ep_status status = take(b.data, b.len, &f, &need);
        ep_alloc_fail_at(0);
        ended = status == EP_OK;
        if (status == EP_OK)
            proto_frame_free(&f);
        else
            CHECK(status == EP_ERR_PROTO || status == EP_ERR_NOMEM);
    }
    CHECK(ended);
    ep_buf_fini(&b);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"round", test_round},     {"bytes", test_bytes},
        {"pieces", test_pieces},   {"back_to_back", test_back_to_back},
        {"limits", test_limits},   {"foreign", test_foreign},
        {"garbage", test_garbage}, {"no_memory", test_no_memory},
    };
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
