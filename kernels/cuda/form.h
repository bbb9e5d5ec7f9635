#ifndef EP_KERNELS_CUDA_FORM_H
#define EP_KERNELS_CUDA_FORM_H
/*
 * form: which form of the product kernels serves a pass of a device. Owns the crossovers, and the
 * proof that the wgmma form may stand in for the others: a row's bits must not depend on the batch,
 * so a device is asked at opening whether both kinds of tensor-core product give the same bits for
 * the same sums. Called by the thread that opens the device.
 */
#include "base/base.h"
#include "kernels/cuda/gpu.h"

typedef struct gpu_forms {
    bool only_wgmma; /* by MOED_CUDA_FORM */
    uint32_t wgmma;  /* types that the wgmma form serves, by bit */
    bool runs_wgmma; /* it works here, whatever its bits: for tests and measurements */
    bool chained;    /* launches of a pass may overlap */
    char line[112];  /* what was found, for people */
} gpu_forms;

/* Of the current device, after gpu_gemm_prepare. Reads MOED_CUDA_FORM and MOED_CUDA_CHAIN. A
 * failure says why; after EP_ERR_DEVICE the device may still be busy with the question. */
ep_status gpu_forms_open(gpu_forms *f, int device, int smem_limit, ep_err *err);
/* Whether the wgmma form may serve weights of these two types. */
bool gpu_forms_serve(const gpu_forms *f, int gate_type, int down_type);
/* The form of a pass; `wgmma`: it may serve the weights. */
int gpu_forms_choose(const gpu_forms *f, bool wgmma, int pairs, int active);
/* Whether a pass of at most `most` pairs can ever get that form. */
bool gpu_forms_possible(const gpu_forms *f, bool wgmma, int most, int form);

#endif
