if(TARGET moed_model)
  pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson)
  moed_test(test_gguf LABEL unit TIMEOUT 60 SOURCES unit/test_gguf.c LIBS moed_model)
endif()
