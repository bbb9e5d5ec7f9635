#ifndef EP_TESTS_KERNELS_AMX_EMULATION_H
#define EP_TESTS_KERNELS_AMX_EMULATION_H
/*
 * amx_emulation: AMX in software for tests, so that tile code runs also where the processor has
 * none. Not for products: an instruction costs a signal.
 */
#include <stdint.h>

/* From here on AMX instructions of all threads are executed in software; for the rest of the
 * process. NULL, or why that is not done here: the processor has AMX itself, or lacks what tile
 * code needs besides. */
const char *amx_emulation_start(void);

/* Instructions executed so far, of all threads: a test during which it does not rise proved
 * nothing. */
uint64_t amx_emulation_count(void);

#endif
