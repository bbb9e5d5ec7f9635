#ifndef EP_PROTO_FRAME_H
#define EP_PROTO_FRAME_H
/*
 * frame: messages of moed.proto on a stream socket. A frame is 16 bytes (magic, length of the
 * Envelope, length of the payload; little-endian), the Envelope, the payload (a raw tensor, or
 * nothing). The two ends bound both lengths before they allocate anything.
 *
 * This header is the one door to protobuf-c: it brings in the generated messages, because a second
 * set of the same structs would be the same thing twice.
 */
#include "base/base.h"
#include "moed.pb-c.h"

#define PROTO_VERSION      1
#define PROTO_FRAME_MAGIC  0x31464f4du /* "MOF1" */
#define PROTO_FRAME_BYTES  16
#define PROTO_MAX_ENVELOPE ((size_t)16 << 20) /* control and client sockets */
#define PROTO_MAX_PAYLOAD  ((size_t)256 << 20)

typedef struct proto_frame {
    Moed__Envelope *envelope; /* free with proto_frame_free */
    const uint8_t *payload;   /* borrowed from the input bytes */
    size_t payload_bytes;
    size_t frame_bytes; /* how much of the input the frame took */
} proto_frame;

/* Appends one frame to out. */
ep_status proto_frame_add(ep_buf *out, const Moed__Envelope *e, const void *payload,
                          size_t payload_bytes);
/* Size of the frame that add would write. */
size_t proto_frame_size(const Moed__Envelope *e, size_t payload_bytes);
/* Writes into a buffer of exactly proto_frame_size bytes; does not allocate. */
void proto_frame_put(uint8_t *dst, const Moed__Envelope *e, const void *payload,
                     size_t payload_bytes);

/* Takes the first frame of n bytes. EP_AGAIN: incomplete, and *need is how many bytes it takes at
 * least. EP_ERR_PROTO: not a frame, or larger than the limits, or an Envelope that does not decode.
 */
ep_status proto_frame_take(const void *bytes, size_t n, size_t max_envelope, size_t max_payload,
                           proto_frame *out, size_t *need);
void proto_frame_free(proto_frame *f);

/* Name of the message in an envelope ("generate"), "empty" if none: for logs. */
const char *proto_envelope_name(const Moed__Envelope *e);

#endif
