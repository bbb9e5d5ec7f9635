moed_fuzz(frame LIBS moed_proto)
