moed_test(test_hf LABEL unit TIMEOUT 120 SOURCES unit/test_hf.c hf_make.c cluster.c
  LIBS moed_router moed_shard PkgConfig::JANSSON m)
moed_test(test_hf_refuse LABEL unit TIMEOUT 120 SOURCES unit/test_hf_refuse.c hf_make.c
  LIBS moed_model moed_kernels PkgConfig::JANSSON m)
