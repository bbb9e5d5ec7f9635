moed_test(test_frame LABEL unit TIMEOUT 60 SOURCES unit/test_frame.c LIBS moed_proto)
