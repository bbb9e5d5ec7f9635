#ifndef EP_PROTO_WIRE_H
#define EP_PROTO_WIRE_H
/*
 * wire: what a router and a shard say to each other about rows. Every message starts with one fixed
 * header of 96 bytes, little-endian, followed by the payload the kind defines; the sizes are a
 * function of the header alone and are checked before anything is used. Encoders write into the
 * caller's buffer, decoders give borrowed views into the caller's bytes. No allocation, no state,
 * any thread.
 */
#include "base/base.h"
#include "kernels/formats.h"

#define WIRE_MAGIC        0x64656f6du /* "moed" */
#define WIRE_VERSION      2
#define WIRE_HEADER_BYTES 96

typedef enum wire_kind {
    WIRE_SLICE = 1, /* router -> shard: rows and (row, expert, slot) pairs of one layer */
    WIRE_REPLY = 2, /* shard -> router: one f32 row per pair, in the slice's pair order */
    WIRE_ERROR = 3, /* shard -> router: why a slice was refused (wire_reason), no payload */
    WIRE_HELLO = 4  /* either way: heartbeat and connection check, no payload */
} wire_kind;

typedef enum wire_reason {
    WIRE_WHY_NONE = 0,
    WIRE_WHY_MAGIC,
    WIRE_WHY_VERSION,
    WIRE_WHY_LENGTH,
    WIRE_WHY_CHECKSUM,
    WIRE_WHY_KIND,
    WIRE_WHY_EPOCH, /* the placement's epoch is not the receiver's */
    WIRE_WHY_LAYER,
    WIRE_WHY_COUNT,  /* rows, pairs: zero, too many, or not matching the length */
    WIRE_WHY_EXPERT, /* an expert the shard does not own */
    WIRE_WHY_ROW,    /* a pair's row out of range */
    WIRE_WHY_FORM,   /* activation form not the layer's */
    WIRE_WHY_DRAINING,
    WIRE_WHY_DEVICE, /* the device failed; the slice may be sent elsewhere */
    WIRE_N_REASONS
} wire_reason;
const char *wire_reason_name(wire_reason r);

typedef struct wire_header {
    uint32_t magic;
    uint16_t version;
    uint16_t kind;
    uint32_t epoch;  /* of the placement */
    uint16_t router; /* index of the router (rank of the asking side) */
    uint16_t shard;  /* index of the shard */
    uint64_t step;   /* router's step counter */
    uint64_t
        sequence; /* unique per router: identifies a slice, repeated by its reply and by re-sends */
    uint16_t layer;
    uint16_t micro;  /* micro-batch of the step */
    uint16_t form;   /* kern_act of the rows */
    uint16_t reason; /* wire_reason in WIRE_ERROR */
    uint32_t n_rows, n_pairs;
    uint32_t hidden;
    uint32_t flags;      /* 0 */
    uint64_t bytes;      /* of the payload */
    uint64_t compute_ns; /* reply: time the shard spent on it */
    uint64_t wait_ns;    /* reply: time it waited at the shard before that */
    uint64_t checksum;   /* XXH3-64 over header (this field 0) and the XXH3-64 of every MiB of the
                            payload; of payloads of a GiB and more, of larger powers of two */
} wire_header;

/* One (row, expert, slot) of a slice, 8 bytes on the wire. expert is the model's global id. */
typedef struct wire_pair {
    uint32_t row;
    uint16_t expert;
    uint16_t slot;
} wire_pair;

/* Payload of a slice: rows (n_rows x kern_act_row_bytes(form, hidden), padded to 8), then n_pairs
 * pairs. Payload of a reply: n_pairs x hidden floats. */
size_t wire_slice_bytes(kern_act form, uint32_t hidden, uint32_t n_rows,
                        uint32_t n_pairs);                  /* with header */
size_t wire_reply_bytes(uint32_t hidden, uint32_t n_pairs); /* with header */
/* Offset of the pairs / rows inside a slice message. */
size_t wire_slice_rows_at(void);
size_t wire_slice_pairs_at(kern_act form, uint32_t hidden, uint32_t n_rows);

/* Writes h into msg (WIRE_HEADER_BYTES) after the payload stands behind it: fills magic, version,
 * bytes and checksum. msg_bytes is the whole message. */
void wire_seal(void *msg, size_t msg_bytes, const wire_header *h);
/* Checks magic, version, length, checksum, kind and that counts agree with the length. On any fault
 * returns EP_ERR_PROTO and *why; *h then holds the header as far as it could be read (for the
 * answer), zeroed where the message is shorter than a header. */
ep_status wire_open(const void *msg, size_t msg_bytes, wire_header *h, wire_reason *why);
/* The same; the threads of an idle pool (or NULL) share the work on messages of more than a MiB. */
void wire_seal_on(ep_pool *pool, void *msg, size_t msg_bytes, const wire_header *h);
ep_status wire_open_on(ep_pool *pool, const void *msg, size_t msg_bytes, wire_header *h,
                       wire_reason *why);
/* Views into an opened slice. Pairs are copied out of unaligned bytes one by one. */
const void *wire_slice_rows(const void *msg, const wire_header *h);
wire_pair wire_slice_pair(const void *msg, const wire_header *h, uint32_t i);
void wire_put_pair(void *pairs, uint32_t i, wire_pair p);
const float *wire_reply_rows(const void *msg, const wire_header *h);

#endif
