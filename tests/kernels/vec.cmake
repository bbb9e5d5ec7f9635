moed_test(check_vec LABEL kernels TIMEOUT 120 SOURCES kernels/check_vec.c LIBS moed_kernels moed_base m)
moed_add_test(check_vec_nehalem kernels 300 ${CMAKE_CURRENT_LIST_DIR}/qemu.sh Nehalem scalar $<TARGET_FILE:check_vec>)
moed_add_test(check_vec_haswell kernels 300 ${CMAKE_CURRENT_LIST_DIR}/qemu.sh Haswell avx2 $<TARGET_FILE:check_vec>)
