# A short run that proves the benchmark still answers: every line needs correct replies of 2 shards.
moed_add_test(bench_layer_smoke unit 60 $<TARGET_FILE:moed-bench> layer
  ${PROJECT_SOURCE_DIR}/deploy/demo/tinymoe-q4_k_m.gguf 2 1 4)
