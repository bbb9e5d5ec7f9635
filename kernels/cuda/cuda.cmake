# The CUDA half. Layout and packing are part of every build, so that they are proved everywhere; device
# code is an OBJECT library: its objects join moed_kernels without making CUDA the language that links,
# so programs stay C programs linked by the C compiler.
list(APPEND KERN_SOURCES cuda/pack.c)
