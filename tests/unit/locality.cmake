moed_test(test_locality LABEL unit TIMEOUT 30 SOURCES unit/test_locality.c LIBS moed_locality)
