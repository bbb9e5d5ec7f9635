moed_fuzz(wire LIBS moed_proto)
