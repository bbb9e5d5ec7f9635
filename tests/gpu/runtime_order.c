/*
 * Operations of the emulated machine: their order, when they are done, and which of them race.
 *
 * 1. Every call that queues makes an operation with a number in its stream and a clock: the number,
 *    per stream, up to which operations are ordered before it. It joins the clock of its stream, of
 *    the host (what has been waited for), and for a wait that of the event.
 * 2. Operations are done in the order of their stream, waits when what they wait for is done.
 * 3. When one is done, what it touched is known; it is compared with every operation that touched
 *    memory and is not ordered before or after it. Two that overlap, one of them writing, race.
 * 4. An operation is forgotten when the host and all that is still queued are ordered after it.
 *
 * The default stream is ordered with itself only, as all others must be non-blocking.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "tests/gpu/runtime_ops.h"

static emu_stream streams[EMU_STREAMS];
static int n_streams;
static emu_clock host;
static emu_op *active; /* done, not forgotten */
static emu_op *current;

/* ---- order ---- */

static void join(emu_clock *a, const emu_clock *b)
{
    for (int i = 0; i < n_streams; i++)
        if (a->at[i] < b->at[i]) a->at[i] = b->at[i];
}

static bool is_before(const emu_op *a, const emu_clock *c)
{
    return a->seq <= c->at[a->stream];
}

static void free_op(emu_op *op)
{
    free(op->staged);
    free(op->ranges);
    free(op);
}

/* Rule 4. Clocks of a stream ascend, so its first operation stands for all. */
static void forget_old(void)
{
    emu_clock all = host;
    for (int s = 0; s < n_streams; s++)
        for (int i = 0; i < n_streams && streams[s].first != NULL; i++)
            if (all.at[i] > streams[s].first->seen.at[i]) all.at[i] = streams[s].first->seen.at[i];
    for (emu_op **at = &active; *at != NULL;) {
        emu_op *op = *at;
        if (!is_before(op, &all)) {
            at = &op->next;
            continue;
        }
        *at = op->next;
        free_op(op);
    }
}

/* ---- races ---- */

emu_op *emu_current(void)
{
    return current;
}

void emu_touch(uintptr_t at, size_t bytes, bool write)
{
    if (bytes == 0) return;
    emu_op *op = current;
    emu_range *r = realloc(op->ranges, (size_t)(op->n_ranges + 1) * sizeof *r);
    if (r == NULL) abort();
    op->ranges = r;
    r[op->n_ranges++] = (emu_range){at, at + bytes, write};
}

static const emu_range *overlap(const emu_op *a, const emu_op *b)
{
    for (int i = 0; i < a->n_ranges; i++)
        for (int j = 0; j < b->n_ranges; j++) {
            const emu_range *x = &a->ranges[i], *y = &b->ranges[j];
            if (x->at < y->end && y->at < x->end && (x->write || y->write)) return x;
        }
    return NULL;
}

/* Rule 3. */
static void compare(const emu_op *op)
{
    for (const emu_op *a = active; a != NULL; a = a->next) {
        if (is_before(a, &op->seen) || is_before(op, &a->seen)) continue;
        const emu_range *r = overlap(op, a);
        if (r == NULL) continue;
        emu_report("races with \"%s\" (streams %d and %d): %s", a->name, op->stream, a->stream,
                   r->write ? "it writes what the other uses" : "it reads what the other writes");
    }
}

/* ---- doing ---- */

static void copy(const emu_op *op)
{
    emu_kind kind[2];
    emu_memory *to = emu_memory_at(op->dst, op->bytes, &kind[0]);
    emu_memory *from = op->staged ? NULL : emu_memory_at(op->src, op->bytes, &kind[1]);
    void *dst = op->dst;
    const void *src = op->staged ? op->staged : op->src;
    if (kind[0] == EMU_DEVICE) dst = emu_write(op->dst, op->bytes);
    if (!op->staged && kind[1] == EMU_DEVICE) src = emu_read(op->src, op->bytes);
    if (to != NULL && kind[0] != EMU_DEVICE) {
        emu_open_pages(op->dst, op->bytes);
        emu_touch((uintptr_t)op->dst, op->bytes, true);
    }
    if (from != NULL && kind[1] != EMU_DEVICE) {
        emu_open_pages(op->src, op->bytes);
        emu_touch((uintptr_t)op->src, op->bytes, false);
    }
    memcpy(dst, src, op->bytes);
}

static bool can_run(const emu_stream *s)
{
    const emu_op *op = s->first;
    if (op == NULL || op->endless) return false;
    return op->what != EMU_WAIT || streams[op->of_stream].done >= op->of_seq;
}

static void run_first(emu_stream *s)
{
    emu_op *op = s->first;
    s->first = op->next;
    if (s->first == NULL) s->end = &s->first;
    current = op;
    if (op->what <= EMU_KERNEL && emu_op_fails()) {
        s->first = op; /* goes with the others */
        if (op->next == NULL) s->end = &op->next;
        current = NULL;
        emu_fail(emu_options.error);
        return;
    }
    if (op->what == EMU_COPY) copy(op);
    if (op->what == EMU_SET) memset(emu_write(op->dst, op->bytes), op->value, op->bytes);
    if (op->what == EMU_KERNEL) op->run(op->args);
    compare(op);
    current = NULL;
    s->done = op->seq;
    op->next = active;
    active = op;
    forget_old();
}

/* One step towards number `seq` of a stream; false when nothing can be done. */
static bool step_towards(emu_stream *s, uint64_t seq)
{
    while (s->done < seq && s->first != NULL && !s->first->endless && !can_run(s)) {
        uint64_t of_seq = s->first->of_seq; /* a wait: its event was recorded earlier */
        s = &streams[s->first->of_stream];
        seq = of_seq;
    }
    if (s->done >= seq || !can_run(s)) return false;
    run_first(s);
    return true;
}

/* Rule 2, as far as somebody waits. */
static void run_up_to(emu_stream *s, uint64_t seq)
{
    while (s->done < seq && step_towards(s, seq)) {
    }
    if (s->done >= seq || emu_sticky() != 0) return;
    emu_report("waits for ever");
    emu_fail(cudaErrorLaunchTimeout);
}

void emu_some_time(void)
{
    if (emu_options.policy != EMULATED_RANDOM) return;
    /* seeds differ in how fast things go */
    const uint64_t most = 2 + 4 * (emu_options.seed % 3);
    for (uint64_t n = emu_random() % most; n > 0; n--) {
        emu_stream *s = &streams[emu_random() % (uint64_t)n_streams];
        if (can_run(s)) run_first(s);
    }
}

void emu_wait(int stream_i, uint64_t seq, const emu_clock *seen)
{
    run_up_to(&streams[stream_i], seq);
    join(&host, seen);
    forget_old();
}

void emu_wait_all(void)
{
    for (int i = 0; i < n_streams; i++)
        emu_wait(i, streams[i].queued, &streams[i].seen);
}

int emu_ask(int stream_i, uint64_t seq, const emu_clock *seen)
{
    emu_stream *s = &streams[stream_i];
    if (s->done >= seq) {
        join(&host, seen);
        forget_old();
        return cudaSuccess;
    }
    /* who asks often enough is told, so that polling ends */
    if (emu_options.policy == EMULATED_LAZY && ++s->asked % 2 == 0) step_towards(s, seq);
    return emu_sticky() != 0 ? emu_sticky() : cudaErrorNotReady;
}

void emu_settle(uintptr_t at, size_t bytes)
{
    const emu_clock seen = host;
    for (int i = 0; i < n_streams && emu_sticky() == 0; i++)
        run_up_to(&streams[i], streams[i].queued);
    if (emu_has_failed()) return;
    for (const emu_op *a = active; a != NULL; a = a->next)
        for (int i = 0; i < a->n_ranges && !is_before(a, &seen); i++) {
            if (a->ranges[i].at >= at + bytes || at >= a->ranges[i].end) continue;
            emu_report("of what \"%s\" uses, which nobody waited for", a->name);
            break;
        }
}

void emu_drop_all(void)
{
    for (int i = 0; i < n_streams; i++) {
        emu_stream *s = &streams[i];
        while (s->first != NULL) {
            emu_op *op = s->first;
            s->first = op->next;
            free_op(op);
        }
        s->end = &s->first;
        s->done = s->queued;
    }
    while (active != NULL) {
        emu_op *op = active;
        active = op->next;
        free_op(op);
    }
}

/* ---- the host's share of memory ---- */

void emu_each_in_flight(void (*fn)(const emu_op *op))
{
    for (const emu_op *op = active; op != NULL; op = op->next)
        if (op->host.at != 0 && !is_before(op, &host)) fn(op);
    for (int i = 0; i < n_streams; i++)
        for (const emu_op *op = streams[i].first; op != NULL; op = op->next)
            if (op->host.at != 0) fn(op);
}

static emu_op *found;
static uintptr_t sought;

static void match(const emu_op *op)
{
    if (sought >= op->host.at && sought < op->host.end && (found == NULL || op->host.write))
        found = (emu_op *)(uintptr_t)op;
}

emu_op *emu_in_flight(uintptr_t at, bool *writes)
{
    found = NULL;
    sought = at;
    emu_each_in_flight(match);
    *writes = found != NULL && found->host.write;
    return found;
}

/* ---- queueing ---- */

emu_stream *emu_stream_of(void *p)
{
    if (p == NULL) return &streams[0];
    for (int i = 1; i < n_streams; i++)
        if (p == (void *)&streams[i] && streams[i].live) return &streams[i];
    emu_report("no stream, or one that was destroyed");
    return NULL;
}

/* Rule 1. */
void emu_push(emu_stream *s, const emu_op *from)
{
    if (emu_sticky() != 0) return; /* lost while a graph was being queued */
    emu_op *op = malloc(sizeof *op);
    if (op == NULL) abort();
    *op = *from;
    op->next = NULL;
    op->stream = s->i;
    op->device = s->device;
    op->seq = ++s->queued;
    s->last = op->what;
    join(&s->seen, &host);
    join(&s->seen, &from->seen);
    s->seen.at[s->i] = op->seq;
    op->seen = s->seen;
    *s->end = op;
    s->end = &op->next;
    if (emu_options.policy == EMULATED_EAGER)
        while (can_run(s))
            run_first(s);
}

int emu_queue(const emu_op *op, void *to)
{
    emu_stream *s = emu_stream_of(to);
    if (s == NULL) return cudaErrorInvalidResourceHandle;
    if (op->what == EMU_KERNEL && s->device != emu_device_now()) {
        emu_report("a stream of device %d, while device %d is set", s->device, emu_device_now());
        return cudaErrorInvalidResourceHandle;
    }
    if (s->graph != NULL) {
        emu_capture(s->graph, op);
        return cudaSuccess;
    }
    if (op->chained && (s->queued == 0 || s->last != EMU_KERNEL))
        emu_report("chained to what is no kernel");
    emu_push(s, op);
    return cudaSuccess;
}

int emu_launch(const char *name, void (*run)(const void *), const void *args, size_t bytes,
               int chained, void *to)
{
    int e = emu_begin(name, EMU_ANY);
    emu_op op = {.what = EMU_KERNEL, .run = run, .chained = chained != 0, .endless = run == NULL};
    if (e == cudaSuccess) {
        if (bytes > sizeof op.args) abort();
        snprintf(op.name, sizeof op.name, "%s", name);
        memcpy(op.args, args, bytes);
        if (chained && emu_options.major < 9) emu_report("chained on an older device");
        e = emu_queue(&op, to);
    }
    return emu_end(e);
}

emu_stream *emu_stream_new(void)
{
    if (n_streams == EMU_STREAMS) abort();
    emu_stream *s = &streams[n_streams];
    *s = (emu_stream){.i = n_streams++, .device = emu_device_now(), .live = true};
    s->end = &s->first;
    return s;
}

emu_stream *emu_stream_default(void)
{
    streams[0].device = emu_device_now();
    return &streams[0];
}

/* ---- the end of a machine ---- */

void emu_order_forget(void)
{
    emu_drop_all();
    memset(streams, 0, sizeof streams);
    memset(&host, 0, sizeof host);
    n_streams = 1;
    streams[0].live = true;
    streams[0].end = &streams[0].first;
}

int emu_order_left(void)
{
    int n = 0;
    for (int i = 1; i < n_streams; i++) {
        n += streams[i].live;
        if (streams[i].graph != NULL) emu_report("stream %d still captures a graph", i);
    }
    return n;
}
