moed_test(test_engine LABEL unit TIMEOUT 240 SOURCES unit/test_engine.c cluster.c
  LIBS moed_router moed_shard m)
moed_test(test_exchange LABEL unit TIMEOUT 240 SOURCES unit/test_exchange.c cluster.c
  LIBS moed_router moed_shard m)
