moed_fuzz(config LIBS moed_config)
