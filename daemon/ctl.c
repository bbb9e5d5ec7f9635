/*
 * The connection of moectl: blocking, one frame at a time, every fault said on standard error.
 */
#include "daemon/ctl.h"
#include "daemon/dial.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { READ_BYTES = 64 << 10 };

bool ctl_open(ctl *c, const char *address)
{
    ep_err err = {""};
    *c = (ctl){.fd = dial_open(address, &err)};
    if (c->fd >= 0) return true;
    fprintf(stderr, "moectl: no daemon at %s\n", err.text);
    return false;
}

void ctl_close(ctl *c)
{
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    ep_buf_fini(&c->in);
}

bool ctl_send(ctl *c, const Moed__Envelope *e, const void *payload, size_t payload_bytes)
{
    ep_buf out = {0};
    bool ok = proto_frame_add(&out, e, payload, payload_bytes) == EP_OK;
    if (!ok) fprintf(stderr, "moectl: out of memory\n");
    for (size_t at = 0; ok && at < out.len;) {
        ssize_t n = send(c->fd, out.data + at, out.len - at, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            fprintf(stderr, "moectl: the connection broke: %s\n", strerror(errno));
            ok = false;
        } else {
            at += (size_t)n;
        }
    }
    ep_buf_fini(&out);
    return ok;
}

bool ctl_receive(ctl *c, proto_frame *f)
{
    if (c->taken > 0) memmove(c->in.data, c->in.data + c->taken, c->in.len - c->taken);
    c->in.len -= c->taken;
    c->taken = 0;
    for (;;) {
        size_t need;
        ep_status status = c->in.len == 0
                               ? EP_AGAIN
                               : proto_frame_take(c->in.data, c->in.len, PROTO_MAX_ENVELOPE,
                                                  PROTO_MAX_PAYLOAD, f, &need);
        if (status == EP_OK) {
            c->taken = f->frame_bytes;
            return true;
        }
        if (status != EP_AGAIN) {
            fprintf(stderr, "moectl: the answer is no frame\n");
            return false;
        }
        if (ep_buf_reserve(&c->in, READ_BYTES) != EP_OK) {
            fprintf(stderr, "moectl: out of memory\n");
            return false;
        }
        ssize_t n = recv(c->fd, c->in.data + c->in.len, c->in.cap - c->in.len, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            fprintf(stderr, "moectl: the daemon closed the connection\n");
            return false;
        }
        c->in.len += (size_t)n;
    }
}

bool ctl_ask(ctl *c, const Moed__Envelope *question, Moed__Envelope__BodyCase kind,
             proto_frame *answer)
{
    if (!ctl_send(c, question, NULL, 0) || !ctl_receive(c, answer)) return false;
    if (answer->envelope->body_case == kind) return true;
    if (answer->envelope->body_case == MOED__ENVELOPE__BODY_FAILED)
        fprintf(stderr, "moectl: %s\n", answer->envelope->failed->text);
    else
        fprintf(stderr, "moectl: unexpected answer '%s'\n", proto_envelope_name(answer->envelope));
    proto_frame_free(answer);
    return false;
}
