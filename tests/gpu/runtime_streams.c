/*
 * The calls of the emulated run-time library that queue, wait and ask: copies, streams, events.
 * What they do to the order of operations is runtime_order.c's; here is which call returns when,
 * and what it may be given.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "tests/gpu/runtime_ops.h"

typedef struct event {
    struct event *next;
    bool live, recorded;
    int device, of_stream;
    uint64_t of_seq;
    emu_clock seen;
} event;

static event *events;

/* ---- copies ---- */

static const char *const kind_names[] = {"device", "pinned", "registered", "pageable"};

/* `waits`: the call returns when the copy is done, where CUDA says so. */
static int queue_copy(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind, void *to,
                      bool waits)
{
    emu_kind k[2];
    emu_op op = {.what = EMU_COPY, .dst = dst, .src = src, .bytes = bytes};
    if (bytes == 0) return cudaSuccess;
    emu_stream *s = emu_stream_of(to);
    if (s == NULL) return cudaErrorInvalidResourceHandle;
    emu_memory *a = emu_memory_at(dst, bytes, &k[0]), *b = emu_memory_at(src, bytes, &k[1]);
    bool out = kind == cudaMemcpyDeviceToHost, in = kind == cudaMemcpyHostToDevice;
    if ((!in && !out && kind != cudaMemcpyDeviceToDevice) || (k[0] == EMU_DEVICE) == out ||
        (k[1] == EMU_DEVICE) == in) {
        emu_report("a copy of kind %d from %s to %s memory", (int)kind, kind_names[k[1]],
                   kind_names[k[0]]);
        return cudaErrorInvalidValue;
    }
    if ((a == NULL && k[0] != EMU_PAGEABLE) || (b == NULL && k[1] != EMU_PAGEABLE))
        return cudaErrorInvalidValue; /* and reported */
    snprintf(op.name, sizeof op.name, "copy of %zu bytes, %s to %s", bytes, kind_names[k[1]],
             kind_names[k[0]]);
    if (in && b == NULL) {
        op.staged = malloc(bytes);
        if (op.staged == NULL) abort();
        memcpy(op.staged, src, bytes);
    }
    if (in && b != NULL) op.host = (emu_range){(uintptr_t)src, (uintptr_t)src + bytes, false};
    if (out && a != NULL) op.host = (emu_range){(uintptr_t)dst, (uintptr_t)dst + bytes, true};
    bool pageable = (in && b == NULL) || (out && a == NULL);
    if (s->graph != NULL && pageable) emu_report("pageable memory in a graph is not emulated");
    int e = emu_queue(&op, to);
    if (s->graph != NULL || e != cudaSuccess) return e;
    if ((out && pageable) || (waits && !(in && pageable) && kind != cudaMemcpyDeviceToDevice)) {
        emu_wait(s->i, s->queued, &s->seen);
    }
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t s)
{
    int e = emu_begin("cudaMemcpyAsync", EMU_ANY);
    if (e == cudaSuccess) e = queue_copy(dst, src, bytes, kind, s, false);
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind)
{
    int e = emu_begin("cudaMemcpy", EMU_NOT_CAPTURED);
    emu_stream_default();
    if (e == cudaSuccess) e = queue_copy(dst, src, bytes, kind, NULL, true);
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s)
{
    int e = emu_begin("cudaMemsetAsync", EMU_ANY);
    emu_op op = {.what = EMU_SET, .name = "memset", .dst = p, .value = value, .bytes = bytes};
    if (e == cudaSuccess) e = emu_queue(&op, s);
    return (cudaError_t)emu_end(e);
}

/* ---- streams ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags)
{
    int e = emu_begin("cudaStreamCreateWithFlags", EMU_NOT_CAPTURED);
    if (e == cudaSuccess && flags != cudaStreamNonBlocking)
        emu_report("streams that wait for the default stream are not emulated");
    if (e == cudaSuccess) {
        *out = (cudaStream_t)(void *)emu_stream_new();
    }
    return (cudaError_t)emu_end(e);
}

/* What is queued is still done. */
cudaError_t cudaStreamDestroy(cudaStream_t p)
{
    int e = emu_begin("cudaStreamDestroy", EMU_NOT_CAPTURED);
    emu_stream *s = emu_stream_of(p);
    if (s != NULL && s->i > 0) s->live = false;
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaStreamSynchronize(cudaStream_t p)
{
    int e = emu_begin("cudaStreamSynchronize", EMU_ANY);
    emu_stream *s = e == cudaSuccess ? emu_stream_of(p) : NULL;
    if (e == cudaSuccess && s == NULL) e = cudaErrorInvalidResourceHandle;
    if (e == cudaSuccess && s->graph != NULL) {
        emu_report("the stream captures a graph");
        e = cudaErrorStreamCaptureUnsupported;
    }
    if (e == cudaSuccess) {
        emu_wait(s->i, s->queued, &s->seen);
    }
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaStreamQuery(cudaStream_t p)
{
    int e = emu_begin("cudaStreamQuery", EMU_ANY);
    emu_stream *s = e == cudaSuccess ? emu_stream_of(p) : NULL;
    if (e == cudaSuccess && s == NULL) e = cudaErrorInvalidResourceHandle;
    if (e == cudaSuccess) e = emu_ask(s->i, s->queued, &s->seen);
    return (cudaError_t)emu_end(e);
}

/* ---- events ---- */

static event *event_of(void *p)
{
    for (event *e = events; e != NULL; e = e->next)
        if (p == (void *)e && e->live) return e;
    emu_report("no event, or one that was destroyed");
    return NULL;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags)
{
    int e = emu_begin("cudaEventCreateWithFlags", EMU_ANY);
    (void)flags;
    if (e == cudaSuccess) {
        event *ev = calloc(1, sizeof *ev);
        if (ev == NULL) abort();
        ev->live = true;
        ev->device = emu_device_now();
        ev->next = events;
        events = ev;
        *out = (cudaEvent_t)(void *)ev;
    }
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaEventDestroy(cudaEvent_t p)
{
    int e = emu_begin("cudaEventDestroy", EMU_ANY);
    event *ev = event_of(p);
    if (ev != NULL) ev->live = false;
    return (cudaError_t)emu_end(e);
}

/* An event and a stream; neither may be part of a capture here. */
static int both(void *ep, void *sp, event **ev, emu_stream **s)
{
    *ev = event_of(ep);
    *s = emu_stream_of(sp);
    if (*ev == NULL || *s == NULL) return cudaErrorInvalidResourceHandle;
    if ((*s)->graph == NULL) return cudaSuccess;
    emu_report("events in a graph are not emulated");
    return cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaEventRecord(cudaEvent_t ep, cudaStream_t sp)
{
    int e = emu_begin("cudaEventRecord", EMU_ANY);
    event *ev = NULL;
    emu_stream *s = NULL;
    if (e == cudaSuccess) e = both(ep, sp, &ev, &s);
    if (e == cudaSuccess && ev->device != s->device) {
        emu_report("an event of device %d in a stream of device %d", ev->device, s->device);
        e = cudaErrorInvalidResourceHandle;
    }
    if (e == cudaSuccess) {
        emu_push(s, &(emu_op){.what = EMU_RECORD, .name = "record"});
        ev->recorded = true;
        ev->of_stream = s->i;
        ev->of_seq = s->queued;
        ev->seen = s->seen;
    }
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t sp, cudaEvent_t ep, unsigned flags)
{
    int e = emu_begin("cudaStreamWaitEvent", EMU_ANY);
    event *ev = NULL;
    emu_stream *s = NULL;
    (void)flags;
    if (e == cudaSuccess) e = both(ep, sp, &ev, &s);
    if (e == cudaSuccess && ev->recorded)
        emu_push(s, &(emu_op){.what = EMU_WAIT,
                              .name = "wait",
                              .of_stream = ev->of_stream,
                              .of_seq = ev->of_seq,
                              .seen = ev->seen});
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaEventQuery(cudaEvent_t p)
{
    int e = emu_begin("cudaEventQuery", EMU_ANY);
    event *ev = e == cudaSuccess ? event_of(p) : NULL;
    if (e == cudaSuccess && ev == NULL) e = cudaErrorInvalidResourceHandle;
    if (e == cudaSuccess && ev->recorded) e = emu_ask(ev->of_stream, ev->of_seq, &ev->seen);
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaEventSynchronize(cudaEvent_t p)
{
    int e = emu_begin("cudaEventSynchronize", EMU_ANY);
    event *ev = e == cudaSuccess ? event_of(p) : NULL;
    if (e == cudaSuccess && ev == NULL) e = cudaErrorInvalidResourceHandle;
    if (e == cudaSuccess && ev->recorded) {
        emu_wait(ev->of_stream, ev->of_seq, &ev->seen);
    }
    return (cudaError_t)emu_end(e);
}

/* ---- the end of a machine ---- */

void emu_streams_forget(void)
{
    emu_order_forget();
    while (events != NULL) {
        event *e = events;
        events = e->next;
        free(e);
    }
}

int emu_streams_left(void)
{
    int n = emu_order_left();
    for (const event *e = events; e != NULL; e = e->next)
        n += e->live;
    return n;
}
