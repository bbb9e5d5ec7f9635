/*
 * Frames: length checks before everything else, then protobuf-c. Lengths that exceed the limits of
 * a socket are refused before memory is asked for; an Envelope without a body is refused, because
 * an empty buffer is a valid protobuf message. The Envelope is unpacked through ep_alloc, so that
 * its memory is counted and can be made to fail like all other.
 */
#include "proto/frame.h"

#include <string.h>

static void *counted_alloc(void *arg, size_t n)
{
    (void)arg;
    return ep_alloc(n);
}

static void counted_free(void *arg, void *p)
{
    (void)arg;
    ep_free(p);
}

static ProtobufCAllocator allocator = {.alloc = counted_alloc, .free = counted_free};

size_t proto_frame_size(const Moed__Envelope *e, size_t payload_bytes)
{
    return PROTO_FRAME_BYTES + moed__envelope__get_packed_size(e) + payload_bytes;
}

void proto_frame_put(uint8_t *dst, const Moed__Envelope *e, const void *payload,
                     size_t payload_bytes)
{
    size_t n = moed__envelope__pack(e, dst + PROTO_FRAME_BYTES);
    ep_store_le(dst, PROTO_FRAME_MAGIC, 4);
    ep_store_le(dst + 4, n, 4);
    ep_store_le(dst + 8, payload_bytes, 8);
    if (payload_bytes > 0) memcpy(dst + PROTO_FRAME_BYTES + n, payload, payload_bytes);
}

ep_status proto_frame_add(ep_buf *out, const Moed__Envelope *e, const void *payload,
                          size_t payload_bytes)
{
    size_t n = proto_frame_size(e, payload_bytes);
    ep_status status = ep_buf_reserve(out, n);
    if (status != EP_OK) return status;
    proto_frame_put(out->data + out->len, e, payload, payload_bytes);
    out->len += n;
    return EP_OK;
}

ep_status proto_frame_take(const void *bytes, size_t n, size_t max_envelope, size_t max_payload,
                           proto_frame *out, size_t *need)
{
    *need = PROTO_FRAME_BYTES;
    if (n < PROTO_FRAME_BYTES) return EP_AGAIN;
    ep_cursor c = ep_cursor_make(bytes, n);
    uint32_t magic = ep_get_u32(&c), envelope_bytes = ep_get_u32(&c);
    uint64_t payload_bytes = ep_get_u64(&c);
    if (magic != PROTO_FRAME_MAGIC || envelope_bytes == 0 || envelope_bytes > max_envelope ||
        payload_bytes > max_payload)
        return EP_ERR_PROTO;
    *need = PROTO_FRAME_BYTES + (size_t)envelope_bytes + (size_t)payload_bytes;
    if (n < *need) return EP_AGAIN;
    const uint8_t *packed = ep_get_bytes(&c, envelope_bytes);
    Moed__Envelope *e = moed__envelope__unpack(&allocator, envelope_bytes, packed);
    if (e == NULL) return EP_ERR_PROTO;
    if (e->body_case == MOED__ENVELOPE__BODY__NOT_SET) {
        moed__envelope__free_unpacked(e, &allocator);
        return EP_ERR_PROTO;
    }
    *out = (proto_frame){.envelope = e,
                         .payload = ep_get_bytes(&c, (size_t)payload_bytes),
                         .payload_bytes = (size_t)payload_bytes,
                         .frame_bytes = *need};
    return EP_OK;
}

void proto_frame_free(proto_frame *f)
{
    if (f->envelope != NULL) moed__envelope__free_unpacked(f->envelope, &allocator);
    *f = (proto_frame){0};
}

const char *proto_envelope_name(const Moed__Envelope *e)
{
    const ProtobufCMessageDescriptor *d = e->base.descriptor;
    for (unsigned i = 0; i < d->n_fields; i++)
        if (d->fields[i].id == (uint32_t)e->body_case) return d->fields[i].name;
    return "empty";
}
