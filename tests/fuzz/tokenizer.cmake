if(TARGET moed_model)
  moed_fuzz(tokenizer LIBS moed_model)
endif()
