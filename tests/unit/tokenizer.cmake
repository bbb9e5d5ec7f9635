moed_test(test_tokenizer LABEL unit TIMEOUT 60 SOURCES unit/test_tokenizer.c LIBS moed_model PkgConfig::JANSSON)
