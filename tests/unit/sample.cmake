moed_test(test_sample LABEL unit TIMEOUT 60 SOURCES unit/test_sample.c LIBS moed_router m)
