// Single instructions: tensor-core products, bit tricks of dequantisation, asynchronous copies. Nothing here
// knows of experts or tiles.
#ifndef EP_KERNELS_CUDA_MMA_CUH
#define EP_KERNELS_CUDA_MMA_CUH
#include <stdint.h>

// (a & mask) | bits
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits)
{
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
    return d;
}
__device__ __forceinline__ uint32_t half2_sub(uint32_t a, uint32_t b)
{
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ float half_lo(uint32_t h)
{
    float f;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(h));
    return f;
}
__device__ __forceinline__ float half_hi(uint32_t h)
{
    float f;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(h));
    return f;
}
// Byte i of w as a float, without the slow conversion: 2^23 + byte.
__device__ __forceinline__ float byte_float(uint32_t w, int i, float zero)
{
    return __uint_as_float(__byte_perm(w, 0x4b000000u, 0x7650 + i)) - (8388608.0f + zero);
}

template <bool BF16>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    if constexpr (BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_init(uint32_t bar, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
// Initialised barriers become visible to bulk copies.
__device__ __forceinline__ void barrier_init_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t bar, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity)
{
    asm volatile("{\n.reg .pred p;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra again;\n}" ::"r"(bar),
                 "r"(parity)
                 : "memory");
}
__device__ __forceinline__ bool barrier_test(uint32_t bar, uint32_t parity)
{
    uint32_t done;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(bar), "r"(parity)
                 : "memory");
    return done != 0;
}
// Weights are read once per pass: let them leave the L2 first.
__device__ __forceinline__ void bulk_copy(uint32_t dst, const void *src, uint32_t bytes, uint32_t bar)
{
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(dst),
                 "l"(src), "r"(bytes), "r"(bar), "l"(policy)
                 : "memory");
}
// What this thread wrote to shared memory becomes visible to wgmma, once a barrier orders the two.
__device__ __forceinline__ void fence_async()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// ---- wgmma: a warpgroup's 64 rows from registers, columns from shared memory ----
//
// A product runs beside the threads that issued it. Until wgmma_wait says it is done its A registers must keep their
// values and its sums must not be touched; `hold` tells the compiler that they are in use up to there, and, before a
// fence, that they are made by then.

template <int N> __device__ __forceinline__ void hold(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(d[i])::"memory");
}
__device__ __forceinline__ void hold(uint32_t (&a)[4])
{
    asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}
// Before the first product, and after any other instruction has written a product's registers.
__device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the newest LEFT groups are done.
template <int LEFT> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// A warpgroup's registers per thread, down to N or up to N.
template <int N> __device__ __forceinline__ void registers_give()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_take()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

#define SUMS_8(d, i)                                                                                          \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define NAMES_8  "%0,%1,%2,%3,%4,%5,%6,%7"
#define NAMES_16 NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_24 NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define NAMES_32 NAMES_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
// `a`..`e`: the operands behind the sums: four registers of A, the descriptor, whether the sums go on.
#define WGMMA(n, type, names, a0, a1, a2, a3, b, go)                                                       \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " go ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
    " {" names "}, {" a0 "," a1 "," a2 "," a3 "}, " b ", p, 1, 1, 0;\n}"
#define WGMMA_16(type) WGMMA("16", type, NAMES_8, "%8", "%9", "%10", "%11", "%12", "%13")
#define WGMMA_32(type) WGMMA("32", type, NAMES_16, "%16", "%17", "%18", "%19", "%20", "%21")
#define WGMMA_48(type) WGMMA("48", type, NAMES_24, "%24", "%25", "%26", "%27", "%28", "%29")
#define WGMMA_64(type) WGMMA("64", type, NAMES_32, "%32", "%33", "%34", "%35", "%36", "%37")
#define WGMMA_IN       "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(goes_on)

// One k-step: d = a * b, added to d if goes_on.
template <bool BF16>
__device__ __forceinline__ void wgmma(float (&d)[8], const uint32_t (&a)[4], uint64_t b, int goes_on)
{
    if constexpr (BF16)
        asm volatile(WGMMA_16("bf16") : SUMS_8(d, 0) : WGMMA_IN);
    else
        asm volatile(WGMMA_16("f16") : SUMS_8(d, 0) : WGMMA_IN);
}
template <bool BF16>
__device__ __forceinline__ void wgmma(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int goes_on)
{
    if constexpr (BF16)
        asm volatile(WGMMA_32("bf16") : SUMS_8(d, 0), SUMS_8(d, 8) : WGMMA_IN);
    else
        asm volatile(WGMMA_32("f16") : SUMS_8(d, 0), SUMS_8(d, 8) : WGMMA_IN);
}
template <bool BF16>
__device__ __forceinline__ void wgmma(float (&d)[24], const uint32_t (&a)[4], uint64_t b, int goes_on)
{
    if constexpr (BF16)
        asm volatile(WGMMA_48("bf16") : SUMS_8(d, 0), SUMS_8(d, 8), SUMS_8(d, 16) : WGMMA_IN);
    else
        asm volatile(WGMMA_48("f16") : SUMS_8(d, 0), SUMS_8(d, 8), SUMS_8(d, 16) : WGMMA_IN);
}
template <bool BF16>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int goes_on)
{
    if constexpr (BF16)
        asm volatile(WGMMA_64("bf16") : SUMS_8(d, 0), SUMS_8(d, 8), SUMS_8(d, 16), SUMS_8(d, 24) : WGMMA_IN);
    else
        asm volatile(WGMMA_64("f16") : SUMS_8(d, 0), SUMS_8(d, 8), SUMS_8(d, 16), SUMS_8(d, 24) : WGMMA_IN);
}
#undef SUMS_8
#undef NAMES_8
#undef NAMES_16
#undef NAMES_24
#undef NAMES_32
#undef WGMMA
#undef WGMMA_16
#undef WGMMA_32
#undef WGMMA_48
#undef WGMMA_64
#undef WGMMA_IN
#endif

__device__ __forceinline__ void copy_16(uint32_t dst, const void *src)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `left` of the newest groups are in flight.
__device__ __forceinline__ void copy_wait(int left)
{
    switch (left) {
    case 0:
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        break;
    case 1:
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        break;
    case 2:
        asm volatile("cp.async.wait_group 2;" ::: "memory");
        break;
    default:
        asm volatile("cp.async.wait_group 3;" ::: "memory");
    }
}
#endif
