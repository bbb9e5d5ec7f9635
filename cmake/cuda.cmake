# CUDA: MOED_CUDA=AUTO|ON|OFF decides whether shards can live on GPUs. Included before the first target:
# enabling a language later leaves earlier targets without CUDA_ARCHITECTURES.
#
# AUTO takes a toolkit of 12.0 or newer where there is one, and builds for sm_90a only, to stay short.
# MOED_CUDA=ON builds for MOED_CUDA_ARCHS; giving MOED_CUDA_ARCHS decides in both cases.
set(MOED_CUDA_RELEASE_ARCHS "80-real;89-real;90a-real;100-real;120-virtual")
set(MOED_CUDA_ARCHS "" CACHE STRING "CUDA architectures; empty: 90a-real for AUTO, ${MOED_CUDA_RELEASE_ARCHS} for ON")
set(MOED_HAVE_CUDA OFF)
if(NOT MOED_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "MOED_CUDA=${MOED_CUDA}: valid are AUTO, ON and OFF")
endif()

if(MOED_CUDA STREQUAL "OFF")
  message(STATUS "CUDA: off")
  return()
endif()

# Always set before the language is enabled: nvcc's own default (75) lacks what the kernels use.
if(MOED_CUDA_ARCHS)
  set(CMAKE_CUDA_ARCHITECTURES ${MOED_CUDA_ARCHS})
elseif(MOED_CUDA STREQUAL "AUTO")
  set(CMAKE_CUDA_ARCHITECTURES 90a-real)
else()
  set(CMAKE_CUDA_ARCHITECTURES ${MOED_CUDA_RELEASE_ARCHS})
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(MOED_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MOED_CUDA=ON, but no CUDA compiler was found (is nvcc on PATH?)")
  endif()
  message(STATUS "CUDA: no compiler found, shards will be CPU only")
  return()
endif()
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE nvcc_says ERROR_QUIET)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" nvcc_release "${nvcc_says}")
set(nvcc_release ${CMAKE_MATCH_1})
if("${nvcc_release}" VERSION_LESS 12.0)
  if(MOED_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MOED_CUDA=ON, but CUDA ${nvcc_release} is older than 12.0")
  endif()
  message(STATUS "CUDA: ${nvcc_release} is older than 12.0, shards will be CPU only")
  return()
endif()

enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
# C++17 for `if constexpr`. Without these two host flags the stubs need the C++ run-time library.
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(MOED_CUDA_FLAGS -Xcompiler=-fno-threadsafe-statics,-fno-exceptions,-fno-rtti,-fvisibility=hidden
    -fmad=false)
set(MOED_HAVE_CUDA ON)
message(STATUS "CUDA: ${nvcc_release}, architectures ${CMAKE_CUDA_ARCHITECTURES}")
