# What needs the CUDA toolkit. Without a GPU check_cuda skips aloud; the rest is proved anywhere nvcc is.
if(MOED_HAVE_CUDA)
  moed_test(test_cuda_open LABEL gpu TIMEOUT 60 SOURCES gpu/test_cuda_open.c LIBS moed_kernels moed_base)
  moed_test(check_cuda LABEL gpu TIMEOUT 300 SOURCES kernels/check_cuda.c kernels/check_cuda_side.c kernels/check_cuda_forms.c
    kernels/check_data.c LIBS moed_kernels moed_base CUDA::cudart_static m)
  # Its own objects define what compute_cuda.c calls, so neither cudart nor device code is linked.
  moed_test(test_cuda_host LABEL gpu TIMEOUT 300 SOURCES gpu/test_cuda_host.c gpu/host_layers.c gpu/host_detects.c
    gpu/host_failures.c gpu/runtime_emulated.c gpu/runtime_memory.c gpu/runtime_order.c gpu/runtime_streams.c
    gpu/runtime_graphs.c gpu/kernels_emulated.c kernels/check_data.c LIBS moed_kernels moed_base xxhash m)
  target_include_directories(test_cuda_host SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  target_link_options(test_cuda_host PRIVATE -Wl,--wrap=ep_now,--wrap=nanosleep)
  add_library(bench_cuda_read OBJECT ${PROJECT_SOURCE_DIR}/tests/gpu/read.cu)
  target_compile_options(bench_cuda_read PRIVATE ${MOED_CUDA_FLAGS})
  moed_program(bench_cuda ${PROJECT_SOURCE_DIR}/tests/gpu/bench_cuda.c ${PROJECT_SOURCE_DIR}/tests/kernels/check_data.c $<TARGET_OBJECTS:bench_cuda_read>)
  target_link_libraries(bench_cuda PRIVATE moed_kernels moed_base CUDA::cudart_static m)
  moed_program(bench_cuda_copies ${PROJECT_SOURCE_DIR}/tests/gpu/bench_cuda_copies.c ${PROJECT_SOURCE_DIR}/tests/kernels/check_data.c)
  target_link_libraries(bench_cuda_copies PRIVATE moed_kernels moed_base m)
  moed_add_test(cuda_needed gpu 60 ${PROJECT_SOURCE_DIR}/tests/gpu/needed.sh $<TARGET_FILE:test_cuda_open>)
  moed_add_test(cuda_alone gpu 300 ${PROJECT_SOURCE_DIR}/tests/gpu/alone.sh ${PROJECT_SOURCE_DIR})
  moed_add_test(cuda_spills gpu 300 ${PROJECT_SOURCE_DIR}/tests/gpu/spills.sh ${PROJECT_SOURCE_DIR} ${CMAKE_CUDA_COMPILER})
  moed_add_test(cuda_chain gpu 300 ${PROJECT_SOURCE_DIR}/tests/gpu/chain.sh ${PROJECT_SOURCE_DIR} ${CMAKE_CUDA_COMPILER})
  moed_add_test(cuda_emulated gpu 300 ${PROJECT_SOURCE_DIR}/tests/gpu/emulated.sh ${PROJECT_SOURCE_DIR} ${CMAKE_CUDA_COMPILER} emulated)
  moed_add_test(cuda_emulated_side gpu 120 ${PROJECT_SOURCE_DIR}/tests/gpu/emulated.sh ${PROJECT_SOURCE_DIR} ${CMAKE_CUDA_COMPILER} emulated_side)
endif()
