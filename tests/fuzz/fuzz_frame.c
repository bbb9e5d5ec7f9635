/*
 * Fuzzes frames of the control and client sockets. The first two bytes choose the limits; the rest
 * is a stream, taken frame by frame as a reader would. Every answer must be consistent with the
 * bytes: EP_AGAIN asks for more than there is and stays within the limits, a frame lies inside the
 * input, and what was decoded, packed again, is read back as the same message.
 */
#include "proto/frame.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Whether a message holds a field that moed.proto does not know. protobuf-c takes a field of number
 * 0 if its key is written too long, keeps it, and writes it in a form that it refuses: nothing that
 * moed looks at. */
static bool has_unknown(const ProtobufCMessage *m)
{
    if (m->n_unknown_fields > 0) return true;
    for (unsigned i = 0; i < m->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *d = &m->descriptor->fields[i];
        const char *base = (const char *)m;
        if (d->type != PROTOBUF_C_TYPE_MESSAGE) continue;
        if (d->label == PROTOBUF_C_LABEL_REPEATED) {
            size_t n = *(const size_t *)(const void *)(base + d->quantifier_offset);
            ProtobufCMessage *const *list =
                *(ProtobufCMessage *const *const *)(const void *)(base + d->offset);
            for (size_t j = 0; j < n; j++)
                if (has_unknown(list[j])) return true;
            continue;
        }
        bool absent = (d->flags & PROTOBUF_C_FIELD_FLAG_ONEOF) != 0 &&
                      *(const uint32_t *)(const void *)(base + d->quantifier_offset) != d->id;
        const ProtobufCMessage *child =
            absent ? NULL : *(ProtobufCMessage *const *)(const void *)(base + d->offset);
        if (child != NULL && has_unknown(child)) return true;
    }
    return false;
}

static void check_round(const proto_frame *f)
{
    ep_buf out = {0};
    proto_frame again;
    size_t need;
    if (proto_frame_add(&out, f->envelope, f->payload, f->payload_bytes) != EP_OK) abort();
    if (out.len != proto_frame_size(f->envelope, f->payload_bytes)) abort();
    if (has_unknown(&f->envelope->base)) {
        ep_buf_fini(&out);
        return;
    }
    if (proto_frame_take(out.data, out.len, out.len, f->payload_bytes, &again, &need) != EP_OK)
        abort();
    if (again.frame_bytes != out.len || again.envelope->body_case != f->envelope->body_case)
        abort();
    if (again.payload_bytes != f->payload_bytes ||
        (f->payload_bytes > 0 && memcmp(again.payload, f->payload, f->payload_bytes) != 0))
        abort();
    if (proto_envelope_name(f->envelope)[0] == '\0') abort();
    proto_frame_free(&again);
    ep_buf_fini(&out);
}

/* Takes what it can from n bytes. */
static void read_stream(const uint8_t *p, size_t n, size_t max_envelope, size_t max_payload)
{
    for (;;) {
        proto_frame f;
        size_t need = 0;
        ep_status status = proto_frame_take(p, n, max_envelope, max_payload, &f, &need);
        if (status == EP_AGAIN) {
            if (need <= n || need > PROTO_FRAME_BYTES + max_envelope + max_payload) abort();
            return;
        }
        if (status != EP_OK) {
            if (status != EP_ERR_PROTO) abort();
            return;
        }
        if (f.frame_bytes > n || f.payload_bytes > max_payload) abort();
        if (f.payload_bytes > 0 && (f.payload < p || f.payload + f.payload_bytes > p + n)) abort();
        check_round(&f);
        p += f.frame_bytes;
        n -= f.frame_bytes;
        proto_frame_free(&f);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2) return 0;
    size_t max_envelope = data[0] & 1 ? PROTO_MAX_ENVELOPE : (size_t)data[0] * 4;
    size_t max_payload = data[1] & 1 ? PROTO_MAX_PAYLOAD : (size_t)data[1];
    size_t n = size - 2;
    uint8_t *copy = ep_alloc(n); /* of the exact size: reading past the end is seen */
    if (copy == NULL) return 0;
    memcpy(copy, data + 2, n);
    read_stream(copy, n, max_envelope, max_payload);
    ep_free(copy);
    return 0;
}
