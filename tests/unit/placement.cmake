moed_test(test_placement LABEL unit TIMEOUT 60 SOURCES unit/test_placement.c LIBS moed_model)
