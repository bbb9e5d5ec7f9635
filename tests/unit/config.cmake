moed_test(test_config LABEL unit TIMEOUT 60 SOURCES unit/test_config.c LIBS moed_config)
