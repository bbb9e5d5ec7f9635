moed_test(test_safetensors LABEL unit TIMEOUT 60 SOURCES unit/test_safetensors.c LIBS moed_model)
moed_test(test_gptq LABEL unit TIMEOUT 60 SOURCES unit/test_gptq.c LIBS moed_model moed_kernels m)
