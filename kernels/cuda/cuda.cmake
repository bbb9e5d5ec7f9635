# The CUDA half. Layout, packing and plans are part of every build, so that they are proved everywhere; device
# code is an OBJECT library: its objects join moed_kernels without making CUDA the language that links,
# so programs stay C programs linked by the C compiler.
list(APPEND KERN_SOURCES cuda/pack.c cuda/plan.c)
if(MOED_HAVE_CUDA)
  list(APPEND KERN_SOURCES cuda/gemm.c cuda/form.c cuda/compute_cuda.c cuda/pass.c)
  set(KERN_CUDA_SOURCES cuda/side.cu cuda/gemm_q4k.cu cuda/gemm_q6k.cu cuda/gemm_q8.cu cuda/gemm_gptq.cu
    cuda/gemm_f16.cu cuda/gemm_bf16.cu)
endif()
