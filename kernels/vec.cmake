# Vector parts, the choice of the instruction set, and the CPU behind the device contract.
list(APPEND KERN_SOURCES select.c vec.c compute.c cpu/vec_scalar.c cpu/compute_cpu.c)
foreach(isa avx2 avx512)
  if(EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/cpu/vec_${isa}.c)
    list(APPEND KERN_${isa}_SOURCES cpu/vec_${isa}.c)
    string(TOUPPER ${isa} upper)
    set_property(SOURCE select.c APPEND PROPERTY COMPILE_DEFINITIONS KERN_HAVE_VEC_${upper})
  endif()
endforeach()
