set(isa_objects)
foreach(isa avx2 avx512 avx512_far avx512bf16 amx)
  if(TARGET kern_${isa})
    list(APPEND isa_objects $<TARGET_OBJECTS:kern_${isa}>)
  endif()
endforeach()
add_test(NAME lint_isa_symbols COMMAND ${CMAKE_CURRENT_LIST_DIR}/isa_symbols.sh ${isa_objects} --
  $<TARGET_OBJECTS:moed_kernels> COMMAND_EXPAND_LISTS)
set_tests_properties(lint_isa_symbols PROPERTIES LABELS lint TIMEOUT 60)
