moed_fuzz(vocab_hf LIBS moed_model)
