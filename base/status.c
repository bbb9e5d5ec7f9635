/*
 * Status names and error texts. An ep_err is filled once, by whoever first knows the exact cause;
 * those above pass the status on and leave the text alone.
 */
#include "base/base.h"

#include <stdio.h>

const char *ep_status_name(ep_status s)
{
    switch (s) {
    case EP_OK:
        return "ok";
    case EP_AGAIN:
        return "nothing ready";
    case EP_ERR_INVALID:
        return "invalid";
    case EP_ERR_TOO_LARGE:
        return "too large";
    case EP_ERR_BUSY:
        return "busy";
    case EP_ERR_CANCELED:
        return "canceled";
    case EP_ERR_DEADLINE:
        return "deadline exceeded";
    case EP_ERR_UNSUPPORTED:
        return "not supported";
    case EP_ERR_PROTO:
        return "protocol error";
    case EP_ERR_PEER_LOST:
        return "peer lost";
    case EP_ERR_NOMEM:
        return "out of memory";
    case EP_ERR_IO:
        return "input/output error";
    case EP_ERR_DEVICE:
        return "device error";
    case EP_ERR_BUG:
        return "internal error";
    }
    return "unknown status";
}

ep_status ep_fail(ep_err *err, ep_status s, const char *fmt, ...)
{
    if (err != NULL) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(err->text, sizeof(err->text), fmt, ap);
        va_end(ap);
    }
    return s;
}
