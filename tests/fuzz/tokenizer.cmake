moed_fuzz(tokenizer LIBS moed_model)
