moed_test(test_compute LABEL unit TIMEOUT 60 SOURCES unit/test_compute.c LIBS moed_kernels moed_base)
