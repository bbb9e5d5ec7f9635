#ifndef EP_TESTS_KERNELS_CHECK_CUDA_H
#define EP_TESTS_KERNELS_CHECK_CUDA_H
/* check_cuda: proves the CUDA device against the CPU and float64. The kernels around
 * the products in check_cuda_side.c, the forms of the products in check_cuda_forms.c. */
#include <cuda_runtime_api.h>
#include "kernels/compute.h"
#include "tests/kernels/check.h"

/* Ends the program with a message if a CUDA call failed. */
void check_cuda_call(int e, const char *what);
void check_lists(void);
void check_gate(void);
void check_combine(void);
void check_forms(void);

#endif
