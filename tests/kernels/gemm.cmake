set(CHECK_KERNELS_SOURCES kernels/check_kernels.c kernels/check_data.c kernels/check_panels.c kernels/check_ffn.c
    kernels/amx_emulation.c)
moed_test(check_kernels LABEL kernels TIMEOUT 300 SOURCES ${CHECK_KERNELS_SOURCES} LIBS moed_kernels moed_base xxhash)
moed_add_test(check_kernels_nehalem kernels 300 ${CMAKE_CURRENT_LIST_DIR}/qemu.sh Nehalem scalar $<TARGET_FILE:check_kernels>)
moed_add_test(check_kernels_haswell kernels 300 ${CMAKE_CURRENT_LIST_DIR}/qemu.sh Haswell avx2 $<TARGET_FILE:check_kernels>)
moed_add_test(check_kernels_amx kernels 300 $<TARGET_FILE:check_kernels> --emulate-amx)
moed_test(check_amx LABEL kernels TIMEOUT 60 SOURCES kernels/check_amx.c kernels/check_amx_refusals.c
    kernels/amx_emulation.c LIBS moed_kernels moed_base)
