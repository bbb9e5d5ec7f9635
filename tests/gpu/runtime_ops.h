#ifndef EP_TESTS_GPU_RUNTIME_OPS_H
#define EP_TESTS_GPU_RUNTIME_OPS_H
/*
 * runtime_ops: what the files of the emulated run-time library share. runtime_emulated.c has its
 * state, failures and reports; runtime_memory.c the memory of host and device; runtime_order.c
 * operations, their order and their races; runtime_streams.c and runtime_graphs.c the calls that
 * make them; kernels_emulated.c the device code.
 */
#include "tests/gpu/runtime_emulated.h"

enum {
    EMU_STREAMS = 48, /* since start; 0 is the default stream */
    EMU_NAME = 64,
    EMU_ARGS = 256 /* bytes of a kernel's arguments */
};

/* ---- calls ---- */

/* Whether a call may come while this thread captures a graph. */
typedef enum emu_when { EMU_ANY, EMU_NOT_CAPTURED } emu_when;

/* Opens a call: takes the lock, lets time pass, fails where it is to fail. Every call ends with
 * emu_end, whose value is the call's. */
int emu_begin(const char *call, emu_when when);
int emu_end(int error);
/* A misuse, named by the call that is open or the operation that is being done. */
void emu_report(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void emu_lock(void);
void emu_unlock(void);

extern emulated_options emu_options;
int emu_device_now(void); /* of the calling thread */
void emu_set_captures(bool on);
bool emu_has_failed(void); /* a failure was injected: what is left undone then is no misuse */
int emu_sticky(void);      /* the error that stays, or 0 */
void emu_fail(int error);  /* the device is lost */
uint64_t emu_random(void);
/* Whether the operation about to be done is the one that fails; counts it. */
bool emu_op_fails(void);

/* ---- memory ---- */

typedef enum emu_kind { EMU_DEVICE, EMU_PINNED, EMU_REGISTERED, EMU_PAGEABLE } emu_kind;

typedef struct emu_memory {
    struct emu_memory *next;
    emu_kind kind;
    bool live;
    int device;
    uintptr_t at;
    size_t bytes, mapped;
    uint8_t *contents;    /* of device memory, whose addresses nobody can read */
    uint8_t *page, *want; /* protection of each whole page, as it is and as it ought to be */
    uintptr_t page_at;
    size_t pages;
} emu_memory;

/* What lies at these addresses; reports memory of a device that was freed, or too little of it, and
 * gives NULL. */
emu_memory *emu_memory_at(const void *p, size_t bytes, emu_kind *kind);
/* Inside an operation: where the contents of device memory lie, and that the operation reads or
 * writes them. After a report, memory of nobody. */
const void *emu_read(const void *p, size_t bytes);
void *emu_write(void *p, size_t bytes);
/* Host memory of a copy that is being done. */
void emu_open_pages(const void *p, size_t bytes);
/* Pages are out of bounds as the operations in flight demand. */
void emu_protect(void);
void emu_memory_forget(void);
int emu_memory_left(void);

/* ---- operations ---- */

typedef struct emu_clock {
    uint64_t at[EMU_STREAMS];
} emu_clock;

typedef struct emu_range {
    uintptr_t at, end;
    bool write;
} emu_range;

typedef enum emu_what { EMU_COPY, EMU_SET, EMU_KERNEL, EMU_WAIT, EMU_RECORD } emu_what;

typedef struct emu_op {
    struct emu_op *next;
    emu_what what;
    char name[EMU_NAME];
    int stream, device;
    uint64_t seq;
    emu_clock seen; /* which operations are ordered before it, itself included */
    /* copies and memsets */
    void *dst;
    const void *src;
    size_t bytes;
    int value;
    uint8_t *staged; /* the source, taken when it was queued */
    emu_range host;  /* of pinned memory; at 0: none */
    bool told;       /* host code that got in its way was reported */
    /* kernels */
    void (*run)(const void *args);
    bool chained, endless;
    _Alignas(16) uint8_t args[EMU_ARGS];
    /* waits */
    int of_stream;
    uint64_t of_seq;
    /* what it touched, known once it is done */
    emu_range *ranges;
    int n_ranges;
} emu_op;

typedef struct emu_stream {
    int i, device;
    bool live;
    uint64_t queued, done; /* numbers */
    emu_clock seen;        /* of its last operation */
    emu_what last;
    emu_op *first, **end;
    uint64_t asked;
    struct emu_graph *graph; /* that it captures */
} emu_stream;

/* A live one; reports others and gives NULL. A null pointer is the default stream. */
emu_stream *emu_stream_of(void *p);
emu_stream *emu_stream_new(void);
emu_stream *emu_stream_default(void); /* of the current device now */
/* Queues a copy of `op`, or captures it. `to`: a cudaStream_t. */
int emu_queue(const emu_op *op, void *to);
void emu_push(emu_stream *s, const emu_op *op);
/* A kernel; `args` is copied. Without a function it never ends. */
int emu_launch(const char *name, void (*run)(const void *), const void *args, size_t bytes,
               int chained, void *to);
/* The host waits for, or asks about, number `seq` of a stream. */
void emu_wait(int stream_i, uint64_t seq, const emu_clock *seen);
void emu_wait_all(void);
int emu_ask(int stream_i, uint64_t seq, const emu_clock *seen);
/* The operation being done, or NULL. */
emu_op *emu_current(void);
void emu_touch(uintptr_t at, size_t bytes, bool write);
/* Which operation uses pinned memory at this address that the host has not waited for. */
emu_op *emu_in_flight(uintptr_t at, bool *writes);
void emu_each_in_flight(void (*fn)(const emu_op *op));
/* Does everything; then reports who touched these bytes that the host has not waited for. */
void emu_settle(uintptr_t at, size_t bytes);
void emu_some_time(void);
void emu_drop_all(void);
void emu_order_forget(void);
int emu_order_left(void);
void emu_streams_forget(void);
int emu_streams_left(void);

/* ---- capture ---- */

/* Appends to a graph that is captured. */
void emu_capture(struct emu_graph *g, const emu_op *op);
void emu_graphs_forget(void);
int emu_graphs_left(void);

#endif
