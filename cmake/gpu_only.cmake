# MOED_GPU_ONLY: what run.sh builds, on a machine that has a CUDA toolkit and perhaps nothing else of what the project
# needs. Without xxHash a stand-in hashes: these programs compare checksums with each other only. The compiler may be
# another than the project's, so its warnings are not errors.
list(REMOVE_ITEM MOED_WARNINGS -Werror)
find_path(MOED_XXHASH_INCLUDE xxhash.h)
find_library(MOED_XXHASH_LIBRARY xxhash)
if(MOED_GPU_STAND_IN OR NOT MOED_XXHASH_INCLUDE OR NOT MOED_XXHASH_LIBRARY)
  message(STATUS "xxHash: none, a stand-in hashes")
  add_library(xxhash INTERFACE)
  include_directories(BEFORE ${PROJECT_SOURCE_DIR}/tests/gpu/stand_in)
endif()
enable_testing()
add_subdirectory(base)
add_subdirectory(kernels)
include(tests/gpu/gpu.cmake)
foreach(name layout stage)
  moed_test(test_cuda_${name} LABEL unit TIMEOUT 60 SOURCES unit/test_cuda_${name}.c LIBS moed_kernels moed_base m)
endforeach()
