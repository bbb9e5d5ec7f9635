# moed-bench. The loops that measure the limits have an object per instruction set, as kernels/ has.
set(BENCH_ISA_avx2 -mavx2 -mfma)
set(BENCH_ISA_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni)
set(BENCH_ISA_amx -mamx-tile -mamx-int8 -mamx-bf16)
set(BENCH_SOURCES bench_main.c bench_kernels.c bench_layers.c bench_limits.c bench_compare.c bench_layer.c bench_model.c bench_e2e.c)
list(TRANSFORM BENCH_SOURCES PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
moed_program(moed-bench ${BENCH_SOURCES})
foreach(isa avx2 avx512 amx)
  add_library(bench_loops_${isa} OBJECT ${CMAKE_CURRENT_LIST_DIR}/bench_loops_${isa}.c)
  moed_target_flags(bench_loops_${isa})
  target_compile_options(bench_loops_${isa} PRIVATE ${BENCH_ISA_${isa}})
  target_sources(moed-bench PRIVATE $<TARGET_OBJECTS:bench_loops_${isa}>)
endforeach()
target_link_libraries(moed-bench PRIVATE moed_shard moed_transport moed_proto moed_model moed_kernels moed_base PkgConfig::JANSSON xxhash m Threads::Threads)
# Beside moed and moectl, which e2e starts.
set_target_properties(moed-bench PROPERTIES LINKER_LANGUAGE C RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR})
# A short run that proves the fast level against scalar and checks that the report can be read back.
moed_add_test(bench_kernels_smoke kernels 120 ${CMAKE_CURRENT_LIST_DIR}/smoke.sh $<TARGET_FILE:moed-bench>)
