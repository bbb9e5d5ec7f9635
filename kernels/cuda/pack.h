#ifndef EP_KERNELS_CUDA_PACK_H
#define EP_KERNELS_CUDA_PACK_H
/*
 * pack: one expert's role to the device layout and back, on the CPU; part of every build. The
 * device does the same with the same words (side.cuh), so both give the same bytes.
 */
#include "kernels/cuda/layout.h"

/* a: n file rows; b: the other n rows of the interleaved form, else NULL. dst: m->bytes. */
void gpu_pack(const gpu_matrix *m, const void *a, const void *b, void *dst);
void gpu_unpack(const gpu_matrix *m, const void *packed, void *a, void *b);
/* Of the packed bytes of one expert. */
uint64_t gpu_checksum(const void *gate_up, size_t gate_up_bytes, const void *down,
                      size_t down_bytes);

#endif
