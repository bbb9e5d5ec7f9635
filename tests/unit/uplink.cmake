moed_test(test_uplink LABEL unit TIMEOUT 30 SOURCES unit/test_uplink.c ../daemon/uplink.c ../daemon/dial.c
  LIBS moed_proto moed_base Threads::Threads)
