pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson)
moed_test(test_golden LABEL golden TIMEOUT 300 SOURCES golden/test_golden.c cluster.c
  LIBS moed_router moed_shard PkgConfig::JANSSON m)
