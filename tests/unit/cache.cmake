moed_test(test_cache LABEL unit TIMEOUT 60 SOURCES unit/test_cache.c LIBS moed_shard)
