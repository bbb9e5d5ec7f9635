# Vector parts, the choice of the instruction set, and the CPU behind the device contract.
list(APPEND KERN_SOURCES select.c vec.c compute.c cpu/vec_scalar.c cpu/compute_cpu.c)
list(APPEND KERN_avx2_SOURCES cpu/vec_avx2.c)
list(APPEND KERN_avx512_SOURCES cpu/vec_avx512.c)
