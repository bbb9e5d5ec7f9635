# moed_library, moed_program, moed_test, moed_fuzz: how every target of the project is made.
set(MOED_WARNINGS -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wformat=2
    -Wundef -Wpointer-arith -Werror)
set(MOED_FLAGS -ffp-contract=off -fno-math-errno -fvisibility=hidden)

function(moed_target_flags name)
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:C>:${MOED_WARNINGS}> $<$<COMPILE_LANGUAGE:C>:${MOED_FLAGS}>)
  target_compile_definitions(${name} PRIVATE _GNU_SOURCE)
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
endfunction()

function(moed_library name)
  add_library(${name} STATIC ${ARGN})
  moed_target_flags(${name})
endfunction()

function(moed_program name)
  add_executable(${name} ${ARGN})
  moed_target_flags(${name})
  # objects made by nvcc do not make it the linker
  set_target_properties(${name} PROPERTIES LINKER_LANGUAGE C)
endfunction()

# moed_test(name LABEL l TIMEOUT s SOURCES files... LIBS libs... ARGS args...)
# Exit status 77 means skipped; the test prints why.
function(moed_test name)
  cmake_parse_arguments(T "" "LABEL;TIMEOUT;COST" "SOURCES;LIBS;ARGS" ${ARGN})
  list(TRANSFORM T_SOURCES PREPEND ${PROJECT_SOURCE_DIR}/tests/)
  moed_program(${name} ${T_SOURCES})
  target_link_libraries(${name} PRIVATE ${T_LIBS})
  moed_add_test(${name} ${T_LABEL} ${T_TIMEOUT} $<TARGET_FILE:${name}> ${T_ARGS})
endfunction()

# moed_add_test(name label timeout command...): a ctest entry with the project's environment.
function(moed_add_test name label timeout)
  add_test(NAME ${name} COMMAND ${ARGN})
  set_tests_properties(${name} PROPERTIES LABELS ${label} TIMEOUT ${timeout} SKIP_RETURN_CODE 77
    ENVIRONMENT "MOED_SHARED=${MOED_SHARED};MOED_SOURCE=${PROJECT_SOURCE_DIR};MOED_BUILD=${PROJECT_BINARY_DIR};OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")
endfunction()

# moed_fuzz(name LIBS libs...): tests/fuzz/fuzz_<name>.c as a libFuzzer binary (MOED_FUZZ) and always
# as a replay of tests/fuzz/corpus/<name>, which is a test.
function(moed_fuzz name)
  cmake_parse_arguments(F "" "" "LIBS" ${ARGN})
  set(source ${PROJECT_SOURCE_DIR}/tests/fuzz/fuzz_${name}.c)
  moed_program(replay_${name} ${source} ${PROJECT_SOURCE_DIR}/tests/fuzz/replay.c)
  target_link_libraries(replay_${name} PRIVATE ${F_LIBS})
  moed_add_test(replay_${name} fuzz 120 $<TARGET_FILE:replay_${name}>
    ${PROJECT_SOURCE_DIR}/tests/fuzz/corpus/${name})
  if(MOED_FUZZ)
    moed_program(fuzz_${name} ${source})
    target_link_libraries(fuzz_${name} PRIVATE ${F_LIBS})
    target_link_options(fuzz_${name} PRIVATE -fsanitize=fuzzer)
  endif()
endfunction()
