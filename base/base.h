#ifndef EP_BASE_BASE_H
#define EP_BASE_BASE_H
/*
 * base: what every other folder stands on and that knows nothing of MoE: status codes, error texts,
 * logging, counted memory, time, byte cursors, a worker pool and a bounded queue.
 *
 * Every function that can fail returns ep_status; outputs are set only on success. Unless a
 * function says otherwise it may be called from any thread as long as two threads do not share an
 * object.
 */
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- status ------------------------------------------------------------------------------------
 */

/* The range says who is hurt: -1..-19 this request, -20..-39 this peer, -40..-59 this process. */
typedef enum ep_status {
    EP_OK = 0,
    EP_AGAIN = 1, /* not an error: nothing ready yet */
    EP_ERR_INVALID = -1,
    EP_ERR_TOO_LARGE = -2,
    EP_ERR_BUSY = -3,
    EP_ERR_CANCELED = -4,
    EP_ERR_DEADLINE = -5,
    EP_ERR_UNSUPPORTED = -6,
    EP_ERR_PROTO = -20,
    EP_ERR_PEER_LOST = -21,
    EP_ERR_NOMEM = -40,
    EP_ERR_IO = -41,
    EP_ERR_DEVICE = -42,
    EP_ERR_BUG = -59
} ep_status;

/* Static text such as "invalid", never NULL. */
const char *ep_status_name(ep_status s);

/* A message for a person, "file:line: what" where there is a file. Passed as the last argument of
 * functions that read what a person wrote; may be NULL where the caller does not care. */
typedef struct ep_err {
    char text[1024];
} ep_err;

/* Formats into err (if not NULL) and returns s, so that a failure is one statement. */
ep_status ep_fail(ep_err *err, ep_status s, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* ---- logging -----------------------------------------------------------------------------------
 */

typedef enum ep_level { EP_LOG_ERROR, EP_LOG_WARN, EP_LOG_INFO, EP_LOG_DEBUG } ep_level;

/* Name printed in front of each line ("router r0"), and the most verbose level that is printed.
 * Call once before threads start; the text is copied. The environment variable MOED_LOG
 * (error, warn, info, debug) overrides the level. */
void ep_log_open(const char *who, ep_level level);
/* Opens /dev/null for each of descriptors 0 to 2 that is closed: a socket that got such a number
 * would be sent what is printed and logged. First thing in main. */
void ep_standard_files(void);
/* One line to stderr, prefixed with the syslog priority <N> where stderr is the journal; keeps
 * errno. */
void ep_log(ep_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
#define log_error(...) ep_log(EP_LOG_ERROR, __VA_ARGS__)
#define log_warn(...)  ep_log(EP_LOG_WARN, __VA_ARGS__)
#define log_info(...)  ep_log(EP_LOG_INFO, __VA_ARGS__)
#define log_debug(...) ep_log(EP_LOG_DEBUG, __VA_ARGS__)

/* ---- memory ------------------------------------------------------------------------------------
 */

/* All memory of the project comes from here, so that a test can count it and make it fail.
 * NULL when there is none (or when EP_ALLOC_FAIL=n says that the n-th call fails). 64-byte aligned
 * for ep_alloc/ep_calloc of 64 bytes or more. A size of 0 gives a valid pointer to nothing. */
void *ep_alloc(size_t bytes);
void *ep_calloc(size_t n, size_t bytes); /* zeroed; NULL on overflow of n * bytes */
void *ep_grow(void *p, size_t old_bytes, size_t new_bytes); /* realloc; p kept valid on NULL */
char *ep_strdup(const char *s);
char *ep_strfmt(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void ep_free(void *p);
/* Number of successful allocations since the process started. */
uint64_t ep_alloc_count(void);
/* For tests: makes the n-th allocation call from now fail once; 0 switches it off. */
void ep_alloc_fail_at(int64_t n);

/* Large, zeroed, page-aligned memory with huge pages where the kernel grants them. NULL on failure.
 */
void *ep_map(size_t bytes);
void ep_unmap(void *p, size_t bytes);

/* A bump allocator of fixed size: everything got from it is given back at once by reset. */
typedef struct ep_arena {
    uint8_t *base;
    size_t size, used, peak;
} ep_arena;
ep_status ep_arena_init(ep_arena *a, size_t bytes);
void *ep_arena_get(ep_arena *a, size_t bytes); /* 64-byte aligned, not zeroed; NULL when full */
void ep_arena_reset(ep_arena *a);
void ep_arena_fini(ep_arena *a);

/* A growable byte buffer, zero-initialised by the caller ({0}). */
typedef struct ep_buf {
    uint8_t *data;
    size_t len, cap;
} ep_buf;
ep_status ep_buf_reserve(ep_buf *b, size_t more); /* room for more bytes after len */
ep_status ep_buf_add(ep_buf *b, const void *p, size_t n);
ep_status ep_buf_printf(ep_buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void ep_buf_fini(ep_buf *b);

/* ---- time --------------------------------------------------------------------------------------
 */

typedef struct ep_time {
    int64_t ns; /* CLOCK_MONOTONIC */
} ep_time;
ep_time ep_now(void);
ep_time ep_time_after_ms(ep_time t, int64_t ms);
int64_t ep_time_diff_ns(ep_time later, ep_time earlier);
bool ep_time_is_past(ep_time deadline, ep_time now);
#define EP_TIME_NEVER ((ep_time){INT64_MAX})

/* ---- byte cursors ------------------------------------------------------------------------------
 */

/* Reads little-endian values from untrusted bytes. Reading past the end returns 0 and sets `bad`,
 * which stays set: check it once after a group of reads. */
typedef struct ep_cursor {
    const uint8_t *at, *end;
    bool bad;
} ep_cursor;
ep_cursor ep_cursor_make(const void *p, size_t n);
size_t ep_cursor_left(const ep_cursor *c);
uint8_t ep_get_u8(ep_cursor *c);
uint16_t ep_get_u16(ep_cursor *c);
uint32_t ep_get_u32(ep_cursor *c);
uint64_t ep_get_u64(ep_cursor *c);
float ep_get_f32(ep_cursor *c);
const uint8_t *ep_get_bytes(ep_cursor *c, size_t n); /* borrowed; NULL and bad when short */
/* n (at most 8) little-endian bytes at p, whose presence the caller has checked. */
uint64_t ep_load_le(const uint8_t *p, size_t n);
void ep_store_le(uint8_t *p, uint64_t v, size_t n);

/* ---- worker pool -------------------------------------------------------------------------------
 */

/* n threads that run one function together. Workers spin briefly, then sleep. */
typedef struct ep_pool ep_pool;
typedef void (*ep_pool_fn)(void *arg, int thread_i, int n_threads);
/* n_threads counts the caller, which works as thread 0: 1 starts no thread. */
ep_status ep_pool_open(ep_pool **out, int n_threads);
int ep_pool_size(const ep_pool *p); /* 1 for NULL: a NULL pool runs everything in the caller */
/* Runs fn on all threads and returns when all are done. Not reentrant; one caller at a time. */
void ep_pool_run(ep_pool *p, ep_pool_fn fn, void *arg);
/* Inside fn: waits until all threads of the pool are here. Memory before is visible after. */
void ep_pool_barrier(ep_pool *p);
void ep_pool_close(ep_pool *p);

/* ---- bounded queue -----------------------------------------------------------------------------
 */

/* Any number of producers and consumers, pointers in order. It does not wake anybody: the owner of
 * a consumer passes `wake`, which is called after each push, on the pushing thread. */
typedef struct ep_queue ep_queue;
ep_status ep_queue_open(ep_queue **out, size_t cap, void (*wake)(void *), void *wake_arg);
ep_status ep_queue_push(ep_queue *q, void *item); /* EP_ERR_BUSY when full */
ep_status ep_queue_pop(ep_queue *q, void **item); /* EP_AGAIN when empty */
void ep_queue_close(ep_queue *q);                 /* items still inside are the caller's */

#endif
