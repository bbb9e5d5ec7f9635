#ifndef EP_EXPERT_SHARD_SHARD_H
#define EP_EXPERT_SHARD_SHARD_H
/*
 * expert_shard: a shard rank. It loads the experts it owns (and nothing else of the model), packs
 * them stacked per layer and role, checksums each, and serves slices from any router in order of
 * arrival: rows grouped by expert, gate and up, SwiGLU, down, one unreduced f32 row back per pair.
 * It keeps no state between slices, so the same slice may come twice.
 *
 * One thread drives a shard (shard_serve); shard_counters, shard_stop and shard_drain may be called
 * from any.
 */
#include "base/base.h"
#include "kernels/compute.h"
#include "model/model.h"
#include "transport/net.h"

typedef struct shard shard;

typedef struct shard_options {
    const model *m;                   /* read while loading and by name; must outlive the shard */
    const model_placement *placement; /* must outlive the shard */
    int shard_i;                      /* which shard of the placement */
    const char *device;               /* "cpu", "cuda:N", "auto" */
    const char *packed;               /* file of shard_cache_write, or NULL: pack from the model */
    int n_threads;
    int max_rows; /* rows of one slice at most (limits.max_tokens_per_step) */
    net *n;       /* NULL until shard_serve; transport is the caller's */
    void (*progress)(void *arg, uint64_t done_bytes,
                     uint64_t all_bytes); /* on the loading thread; may be NULL */
    void *progress_arg;
} shard_options;

/* Loads everything; takes long. err names layer, tensor and expert. */
ep_status shard_open(shard **out, const shard_options *opt, ep_err *err);
void shard_close(shard *s);

/* Serves until shard_stop, or until shard_drain was called and what was received before is
 * answered. `tick` is called between messages at least every 200 ms (control work of the rank); may
 * be NULL. EP_ERR_DEVICE when the device was lost: what was received is answered (refused), and
 * shard_failure says what happened. */
ep_status shard_serve(shard *s, net *n, void (*tick)(void *arg), void *tick_arg);
/* "shard 1, layer 3: device cuda:0: ..." once the device is lost, else "". */
const char *shard_failure(const shard *s);
void shard_stop(shard *s);  /* any thread */
void shard_drain(shard *s); /* any thread: finish, then return from shard_serve */

/* One slice in, one reply or error out, without a transport (tests, benchmarks). `reply` has room
 * for wire_reply_bytes; *reply_bytes is set in every case: bad input gives a WIRE_ERROR message,
 * WIRE_HELLO a WIRE_HELLO, and a WIRE_ERROR nothing (0). Both buffers are aligned to 8 bytes.
 * `sender` is named in the answer to a message too short to name its router. */
void shard_answer(shard *s, const void *msg, size_t msg_bytes, uint16_t sender, void *reply,
                  size_t *reply_bytes);

typedef struct shard_layer_counters {
    uint64_t slices, rows, pairs, bytes_in, bytes_out, compute_ns;
} shard_layer_counters;

typedef struct shard_counters {
    shard_layer_counters *layers; /* [n_layers], owned by the shard: relaxed snapshots */
    uint64_t *expert_pairs;       /* [n_layers * n_owned] in local expert order */
    int n_layers, n_owned;
    uint64_t wait_ns, errors[32]; /* by wire_reason */
    uint64_t unsent;       /* replies given up: no buffer or credit in time, or the peer is gone */
    uint64_t weight_bytes; /* packed experts held */
} shard_counters;
/* A view whose numbers keep changing (each is written by the serving thread only). */
const shard_counters *shard_counters_get(const shard *s);
/* Checksum of one packed expert, as computed at load. */
uint64_t shard_expert_checksum(const shard *s, int layer, int local_expert);
/* "cpu, avx512, 1 thread" */
const char *shard_describe(const shard *s);
kern_act shard_layer_form(const shard *s, int layer);

#endif
