if(TARGET moed_config)
  moed_fuzz(config LIBS moed_config)
endif()
