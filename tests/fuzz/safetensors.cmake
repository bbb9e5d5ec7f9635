if(TARGET moed_model)
  moed_fuzz(safetensors LIBS moed_model)
endif()
