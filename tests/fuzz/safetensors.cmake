moed_fuzz(safetensors LIBS moed_model)
