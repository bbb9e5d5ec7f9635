set(CHECK_KERNELS_SOURCES kernels/check_kernels.c kernels/check_data.c kernels/check_panels.c kernels/check_ffn.c)
moed_test(check_kernels LABEL kernels TIMEOUT 120 SOURCES ${CHECK_KERNELS_SOURCES} LIBS moed_kernels moed_base xxhash)
