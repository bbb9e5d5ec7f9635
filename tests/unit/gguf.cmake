moed_test(test_gguf LABEL unit TIMEOUT 60 SOURCES unit/test_gguf.c LIBS moed_model)
moed_test(test_model LABEL unit TIMEOUT 60 SOURCES unit/test_model.c LIBS moed_model)
moed_test(test_model_files LABEL unit TIMEOUT 60 SOURCES unit/test_model_files.c LIBS moed_model PkgConfig::JANSSON)
