moed_test(test_base LABEL unit TIMEOUT 60 SOURCES unit/test_base.c LIBS moed_base)
