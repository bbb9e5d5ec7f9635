/*
 * The row protocol: header in, header out, sizes from counts. Every field is written and read one
 * by one at a fixed offset, little-endian, so neither padding nor byte order of the machine shows
 * on the wire. wire_open is the only door for bytes of a peer: behind it the counts of a header are
 * proved to agree with the length of the message, so the views can do plain arithmetic. All
 * arithmetic on counts that were not proved yet is overflow-checked; a size that does not exist is
 * 0.
 *
 * Not done here: whether an expert, a layer, an epoch or a pair's row means something to the
 * receiver (router and shard know), and any allocation.
 */
#include "proto/wire.h"

#include <limits.h>
#include <string.h>

#define XXH_STATIC_LINKING_ONLY /* the streaming state lives on our stack */
#include <xxhash.h>

/* Offsets on the wire. Each is the one before plus its size; the compiler checks the sum. */
enum {
    AT_MAGIC = 0,
    AT_VERSION = AT_MAGIC + 4,
    AT_KIND = AT_VERSION + 2,
    AT_EPOCH = AT_KIND + 2,
    AT_ROUTER = AT_EPOCH + 4,
    AT_SHARD = AT_ROUTER + 2,
    AT_STEP = AT_SHARD + 2,
    AT_SEQUENCE = AT_STEP + 8,
    AT_LAYER = AT_SEQUENCE + 8,
    AT_MICRO = AT_LAYER + 2,
    AT_FORM = AT_MICRO + 2,
    AT_REASON = AT_FORM + 2,
    AT_N_ROWS = AT_REASON + 2,
    AT_N_PAIRS = AT_N_ROWS + 4,
    AT_HIDDEN = AT_N_PAIRS + 4,
    AT_FLAGS = AT_HIDDEN + 4,
    AT_BYTES = AT_FLAGS + 4,
    AT_COMPUTE_NS = AT_BYTES + 8,
    AT_WAIT_NS = AT_COMPUTE_NS + 8,
    AT_CHECKSUM = AT_WAIT_NS + 8,
    AT_RESERVED = AT_CHECKSUM + 8, /* 8 zero bytes: the payload starts 32-byte aligned */
    AT_PAYLOAD = AT_RESERVED + 8
};
_Static_assert(AT_PAYLOAD == WIRE_HEADER_BYTES, "the header has 96 bytes");
_Static_assert(sizeof(wire_pair) == 8, "a pair has 8 bytes");
_Static_assert(sizeof(float) == 4, "reply rows are 4-byte floats");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rows are sent as they lie in memory");

static void put_u16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

static void put_u32(uint8_t *p, uint32_t v)
{
    put_u16(p, (uint16_t)v);
    put_u16(p + 2, (uint16_t)(v >> 16));
}

static void put_u64(uint8_t *p, uint64_t v)
{
    put_u32(p, (uint32_t)v);
    put_u32(p + 4, (uint32_t)(v >> 32));
}

static uint16_t get_u16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static uint32_t get_u32(const uint8_t *p)
{
    return get_u16(p) | (uint32_t)get_u16(p + 2) << 16;
}

static uint64_t get_u64(const uint8_t *p)
{
    return get_u32(p) | (uint64_t)get_u32(p + 4) << 32;
}

const char *wire_reason_name(wire_reason r)
{
    static const char *const names[WIRE_N_REASONS] = {
        [WIRE_WHY_NONE] = "none",         [WIRE_WHY_MAGIC] = "magic",
        [WIRE_WHY_VERSION] = "version",   [WIRE_WHY_LENGTH] = "length",
        [WIRE_WHY_CHECKSUM] = "checksum", [WIRE_WHY_KIND] = "kind",
        [WIRE_WHY_EPOCH] = "epoch",       [WIRE_WHY_LAYER] = "layer",
        [WIRE_WHY_COUNT] = "count",       [WIRE_WHY_EXPERT] = "expert",
        [WIRE_WHY_ROW] = "row",           [WIRE_WHY_FORM] = "form",
        [WIRE_WHY_DRAINING] = "draining", [WIRE_WHY_DEVICE] = "device",
    };
    unsigned i = (unsigned)r;
    return i < WIRE_N_REASONS ? names[i] : "unknown";
}

/* ---- sizes ---- */

static bool form_is_known(unsigned form)
{
    switch (form) {
    case KERN_ACT_F32:
    case KERN_ACT_Q8_256:
    case KERN_ACT_Q8_32:
    case KERN_ACT_Q8_128:
    case KERN_ACT_BF16:
        return true;
    default:
        return false;
    }
}

/* Bytes of one row, 0 where the form cannot have rows of that length. */
static size_t row_bytes(unsigned form, uint32_t hidden)
{
    if (!form_is_known(form) || hidden == 0 || hidden > INT_MAX / 4) return 0;
    if (hidden % (uint32_t)kern_act_block((kern_act)form) != 0) return 0;
    return kern_act_row_bytes((kern_act)form, (int)hidden);
}

/* Offset of the pairs; 0 when it does not exist. */
static size_t pairs_at(unsigned form, uint32_t hidden, uint32_t n_rows)
{
    size_t row = row_bytes(form, hidden), rows;
    if (row == 0 || __builtin_mul_overflow(row, (size_t)n_rows, &rows)) return 0;
    if (__builtin_add_overflow(rows, (size_t)WIRE_HEADER_BYTES + 7, &rows)) return 0;
    return rows & ~(size_t)7; /* the header is a multiple of 8, so this pads the rows */
}

size_t wire_slice_bytes(kern_act form, uint32_t hidden, uint32_t n_rows, uint32_t n_pairs)
{
    size_t at = pairs_at((unsigned)form, hidden, n_rows), pairs, total;
    if (at == 0 || __builtin_mul_overflow((size_t)n_pairs, sizeof(wire_pair), &pairs)) return 0;
    return __builtin_add_overflow(at, pairs, &total) ? 0 : total;
}

size_t wire_reply_bytes(uint32_t hidden, uint32_t n_pairs)
{
    size_t n, total;
    if (__builtin_mul_overflow((size_t)hidden, (size_t)n_pairs, &n)) return 0;
    if (__builtin_mul_overflow(n, sizeof(float), &n)) return 0;
    return __builtin_add_overflow(n, (size_t)WIRE_HEADER_BYTES, &total) ? 0 : total;
}

size_t wire_slice_rows_at(void)
{
    return WIRE_HEADER_BYTES;
}

size_t wire_slice_pairs_at(kern_act form, uint32_t hidden, uint32_t n_rows)
{
    return pairs_at((unsigned)form, hidden, n_rows);
}

/* ---- header ---- */

/* The payload is hashed in chunks, so that several threads can share a large one. */
enum { CHUNK = 1 << 20, MOST_CHUNKS = 1024 };

typedef struct chunks {
    const uint8_t *payload;
    size_t bytes, chunk, n;
    uint64_t sum[MOST_CHUNKS];
} chunks;

static void hash_chunks(void *arg, int thread_i, int n_threads)
{
    chunks *c = arg;
    for (size_t i = (size_t)thread_i; i < c->n; i += (size_t)n_threads) {
        size_t at = i * c->chunk, left = c->bytes - at;
        c->sum[i] = XXH3_64bits(c->payload + at, left < c->chunk ? left : c->chunk);
    }
}

/* As if the checksum field were 0. The message may belong to a transport, so it is not written to.
 */
static uint64_t checksum(const uint8_t *msg, size_t msg_bytes, ep_pool *pool)
{
    uint8_t header[WIRE_HEADER_BYTES];
    chunks c; /* no initialiser: it would clear 8 KiB for every message */
    c.payload = msg + WIRE_HEADER_BYTES;
    c.bytes = msg_bytes - WIRE_HEADER_BYTES;
    c.chunk = CHUNK;
    while (c.bytes / c.chunk >= MOST_CHUNKS)
        c.chunk *= 2;
    c.n = (c.bytes + c.chunk - 1) / c.chunk;
    ep_pool_run(c.n > 1 ? pool : NULL, hash_chunks, &c);
    memcpy(header, msg, sizeof(header));
    put_u64(header + AT_CHECKSUM, 0);
    XXH3_state_t state;
    XXH3_64bits_reset(&state);
    XXH3_64bits_update(&state, header, sizeof(header));
    XXH3_64bits_update(&state, c.sum, c.n * sizeof(c.sum[0]));
    return XXH3_64bits_digest(&state);
}

void wire_seal_on(ep_pool *pool, void *msg, size_t msg_bytes, const wire_header *h)
{
    uint8_t *p = msg;
    put_u32(p + AT_MAGIC, WIRE_MAGIC);
    put_u16(p + AT_VERSION, WIRE_VERSION);
    put_u16(p + AT_KIND, h->kind);
    put_u32(p + AT_EPOCH, h->epoch);
    put_u16(p + AT_ROUTER, h->router);
    put_u16(p + AT_SHARD, h->shard);
    put_u64(p + AT_STEP, h->step);
    put_u64(p + AT_SEQUENCE, h->sequence);
    put_u16(p + AT_LAYER, h->layer);
    put_u16(p + AT_MICRO, h->micro);
    put_u16(p + AT_FORM, h->form);
    put_u16(p + AT_REASON, h->reason);
    put_u32(p + AT_N_ROWS, h->n_rows);
    put_u32(p + AT_N_PAIRS, h->n_pairs);
    put_u32(p + AT_HIDDEN, h->hidden);
    put_u32(p + AT_FLAGS, h->flags);
    put_u64(p + AT_BYTES, (uint64_t)(msg_bytes - WIRE_HEADER_BYTES));
    put_u64(p + AT_COMPUTE_NS, h->compute_ns);
    put_u64(p + AT_WAIT_NS, h->wait_ns);
    put_u64(p + AT_RESERVED, 0);
    put_u64(p + AT_CHECKSUM, checksum(p, msg_bytes, pool));
}

void wire_seal(void *msg, size_t msg_bytes, const wire_header *h)
{
    wire_seal_on(NULL, msg, msg_bytes, h);
}

static void read_header(const uint8_t *p, wire_header *h)
{
    h->magic = get_u32(p + AT_MAGIC);
    h->version = get_u16(p + AT_VERSION);
    h->kind = get_u16(p + AT_KIND);
    h->epoch = get_u32(p + AT_EPOCH);
    h->router = get_u16(p + AT_ROUTER);
    h->shard = get_u16(p + AT_SHARD);
    h->step = get_u64(p + AT_STEP);
    h->sequence = get_u64(p + AT_SEQUENCE);
    h->layer = get_u16(p + AT_LAYER);
    h->micro = get_u16(p + AT_MICRO);
    h->form = get_u16(p + AT_FORM);
    h->reason = get_u16(p + AT_REASON);
    h->n_rows = get_u32(p + AT_N_ROWS);
    h->n_pairs = get_u32(p + AT_N_PAIRS);
    h->hidden = get_u32(p + AT_HIDDEN);
    h->flags = get_u32(p + AT_FLAGS);
    h->bytes = get_u64(p + AT_BYTES);
    h->compute_ns = get_u64(p + AT_COMPUTE_NS);
    h->wait_ns = get_u64(p + AT_WAIT_NS);
    h->checksum = get_u64(p + AT_CHECKSUM);
}

/* What is wrong with the counts of a header whose length and checksum are right. */
static wire_reason check_counts(const wire_header *h, size_t msg_bytes)
{
    size_t want = WIRE_HEADER_BYTES;
    switch (h->kind) {
    case WIRE_SLICE:
        if (!form_is_known(h->form)) return WIRE_WHY_FORM;
        if (h->n_rows == 0 || h->n_pairs == 0) return WIRE_WHY_COUNT;
        want = wire_slice_bytes((kern_act)h->form, h->hidden, h->n_rows, h->n_pairs);
        break;
    case WIRE_REPLY:
        if (h->n_pairs == 0 || h->hidden == 0) return WIRE_WHY_COUNT;
        want = wire_reply_bytes(h->hidden, h->n_pairs);
        break;
    case WIRE_ERROR:
    case WIRE_HELLO:
        break;
    default:
        return WIRE_WHY_KIND;
    }
    return want == msg_bytes ? WIRE_WHY_NONE : WIRE_WHY_COUNT;
}

ep_status wire_open_on(ep_pool *pool, const void *msg, size_t msg_bytes, wire_header *h,
                       wire_reason *why)
{
    const uint8_t *p = msg;
    wire_reason reason;
    if (msg_bytes < WIRE_HEADER_BYTES) {
        memset(h, 0, sizeof(*h));
        *why = WIRE_WHY_LENGTH;
        return EP_ERR_PROTO;
    }
    read_header(p, h);
    if (h->magic != WIRE_MAGIC) {
        reason = WIRE_WHY_MAGIC;
    } else if (h->version != WIRE_VERSION) {
        reason = WIRE_WHY_VERSION;
    } else if (h->bytes != (uint64_t)(msg_bytes - WIRE_HEADER_BYTES)) {
        reason = WIRE_WHY_LENGTH;
    } else if (h->checksum != checksum(p, msg_bytes, pool)) {
        reason = WIRE_WHY_CHECKSUM;
    } else if (h->flags != 0 || get_u64(p + AT_RESERVED) != 0) {
        reason = WIRE_WHY_VERSION; /* asks for something this version does not know */
    } else {
        reason = check_counts(h, msg_bytes);
    }
    *why = reason;
    return reason == WIRE_WHY_NONE ? EP_OK : EP_ERR_PROTO;
}

ep_status wire_open(const void *msg, size_t msg_bytes, wire_header *h, wire_reason *why)
{
    return wire_open_on(NULL, msg, msg_bytes, h, why);
}

/* ---- views ---- */

const void *wire_slice_rows(const void *msg, const wire_header *h)
{
    (void)h;
    return (const uint8_t *)msg + WIRE_HEADER_BYTES;
}

wire_pair wire_slice_pair(const void *msg, const wire_header *h, uint32_t i)
{
    const uint8_t *p = (const uint8_t *)msg + pairs_at(h->form, h->hidden, h->n_rows);
    p += (size_t)i * sizeof(wire_pair);
    return (wire_pair){.row = get_u32(p), .expert = get_u16(p + 4), .slot = get_u16(p + 6)};
}

void wire_put_pair(void *pairs, uint32_t i, wire_pair pair)
{
    uint8_t *p = (uint8_t *)pairs + (size_t)i * sizeof(wire_pair);
    put_u32(p, pair.row);
    put_u16(p + 4, pair.expert);
    put_u16(p + 6, pair.slot);
}

const float *wire_reply_rows(const void *msg, const wire_header *h)
{
    (void)h;
    return (const float *)((const uint8_t *)msg + WIRE_HEADER_BYTES);
}
