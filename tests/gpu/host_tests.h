#ifndef EP_TESTS_GPU_HOST_TESTS_H
#define EP_TESTS_GPU_HOST_TESTS_H
/* host_tests: the parts of test_cuda_host that have files of their own. Each gives how many of its
 * checks failed. */

/* host_detects.c: the emulation finds faults, and its products are those of plain loops. */
int host_detects(void);
int host_stand_in(void);
/* host_failures.c: a failure at each call, at each operation, and of the host's memory. */
int host_failing_calls(void);
int host_failing_ops(void);
int host_no_memory(void);

#endif
