moed_test(test_cuda_layout LABEL unit TIMEOUT 60 SOURCES unit/test_cuda_layout.c LIBS moed_kernels moed_base m)
moed_test(test_cuda_stage LABEL unit TIMEOUT 60 SOURCES unit/test_cuda_stage.c LIBS moed_kernels moed_base m)
