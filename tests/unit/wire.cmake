moed_test(test_wire LABEL unit TIMEOUT 60 SOURCES unit/test_wire.c LIBS moed_proto)
