moed_test(test_shard LABEL unit TIMEOUT 120 SOURCES unit/test_shard.c LIBS moed_shard)
moed_test(test_shard_refuse LABEL unit TIMEOUT 120 SOURCES unit/test_shard_refuse.c LIBS moed_shard)
moed_test(test_shard_serve LABEL unit TIMEOUT 120 SOURCES unit/test_shard_serve.c LIBS moed_shard)
