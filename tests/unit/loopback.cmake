moed_test(test_loopback LABEL unit TIMEOUT 120 SOURCES unit/test_loopback.c LIBS moed_transport)
