#ifndef EP_EXPERT_SHARD_CACHE_H
#define EP_EXPERT_SHARD_CACHE_H
/*
 * cache: all experts of a model in the packed form of the CPU kernels, in one file, so that a shard
 * is ready in the time it takes to map its part. The packed layout is the same for every
 * instruction set, so one file serves every machine. Each expert carries the checksum it had when
 * it was packed, and is checked against it when it is mapped.
 *
 * File, little-endian: a header, per layer a record (types, places, strides), per (layer, expert) a
 * checksum, a checksum over all of that; then the experts, each at a multiple of the page size.
 */
#include "base/base.h"
#include "kernels/compute.h"
#include "model/model.h"

typedef struct shard_cache shard_cache;

/* Packs every expert of m with n_threads threads and writes path (through a temporary name, so a
 * file that is there is whole). progress is called on the calling thread; may be NULL. */
ep_status shard_cache_write(const model *m, const char *path, int n_threads,
                            void (*progress)(void *arg, uint64_t done, uint64_t all), void *arg,
                            ep_err *err);

/* Opens a file made from m (its digest is compared). The cache must outlive nothing: maps stay. */
ep_status shard_cache_open(shard_cache **out, const char *path, const model *m, ep_err *err);
void shard_cache_close(shard_cache *c);
/* Maps one expert into a stack opened with compute_shape.paged, and checks it. err names file,
 * layer and expert. Different experts may be mapped from different threads. */
ep_status shard_cache_map(const shard_cache *c, const compute_ops *ops, compute_stack *s, int layer,
                          int expert, int local, uint64_t *checksum, ep_err *err);

#endif
