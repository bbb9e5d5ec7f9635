# The GEMM half: formats, packing, the loops over experts and the panel functions per instruction set.
set(KERN_SOURCES formats.c pack.c rows.c stack.c ffn.c linear.c cpu/gemm_scalar.c)
link_libraries(xxhash)
foreach(isa avx2 avx512 avx512bf16 amx)
  set(KERN_${isa}_SOURCES cpu/gemm_${isa}.c)
endforeach()
list(APPEND KERN_avx2_SOURCES cpu/gemm_avx2_many.c)
set(KERN_avx512_far_SOURCES cpu/gemm_avx512.c)
