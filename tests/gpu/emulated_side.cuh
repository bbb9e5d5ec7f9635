// What the kernels around the products need beside emulated.cuh: 16-bit numbers, votes and shuffles, arrays of a block,
// rows of blocks. And arrays in global memory with a fence around them.
#ifndef EP_TESTS_GPU_EMULATED_SIDE_CUH
#define EP_TESTS_GPU_EMULATED_SIDE_CUH
#define __CUDA_FP16_H__ // cuda_fp16.h, cuda_bf16.h: their numbers are made here
#define __CUDA_BF16_H__
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>
#include <functional>
#include "tests/gpu/emulated.cuh"

// One block runs at a time. run_grid fills the section anew for each.
#undef __shared__
#define __shared__ static __attribute__((section("of_block")))

static inline int max(int a, int b)
{
    return a > b ? a : b;
}

// ---- faults ----

static char doing[128]; // the case at hand

// Ends at once: this may be a thread's stack, which an orderly exit frees.
__attribute__((format(printf, 1, 2))) static void fail(const char *what, ...)
{
    va_list args;
    va_start(args, what);
    printf("FAILED: %s: ", doing);
    vprintf(what, args);
    printf("\n");
    fflush(stdout);
    _exit(1);
}
static void on_fault(int)
{
    static const char what[] = ": outside of its arrays\n";
    bool said = write(1, "FAILED: ", 8) > 0 && write(1, doing, strlen(doing)) > 0;
    said = said && write(1, what, sizeof what - 1) > 0;
    _exit(said ? 1 : 2);
}
// A thread's own stack may be what it left.
static void watch_faults()
{
    static uint8_t stack[16 * 1024];
    stack_t on = {};
    on.ss_sp = stack;
    on.ss_size = sizeof stack;
    struct sigaction act = {};
    act.sa_handler = on_fault;
    act.sa_flags = SA_ONSTACK;
    if (sigaltstack(&on, nullptr) != 0 || sigaction(SIGSEGV, &act, nullptr) != 0 ||
        sigaction(SIGBUS, &act, nullptr) != 0)
        fail("no handler");
}

// `n` elements that end where memory ends. What is before them must stay as it is; they start as bytes of 0xa5.
template <typename T> class fenced
{
  public:
    explicit fenced(size_t n)
    {
        const size_t page = (size_t)sysconf(_SC_PAGESIZE), used = (n * sizeof(T) + page - 1) / page * page + page;
        size = used + page;
        base = (uint8_t *)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED || mprotect(base + used, page, PROT_NONE) != 0) fail("no memory");
        memset(base, 0xa5, used);
        first = (T *)(base + used) - n;
    }
    fenced(const fenced &) = delete;
    fenced &operator=(const fenced &) = delete;
    ~fenced()
    {
        for (const uint8_t *p = base; p < (const uint8_t *)first; p++)
            if (*p != 0xa5) fail("wrote before an array");
        munmap(base, size);
    }
    T *data()
    {
        return first;
    }
    T &operator[](size_t i)
    {
        return first[i];
    }

  private:
    uint8_t *base;
    size_t size;
    T *first;
};

// ---- numbers ----

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

static uint32_t bits_of(float v)
{
    uint32_t u;
    memcpy(&u, &v, 4);
    return u;
}
// Without its last `by` bits (1 to 31), to the nearest, ties to even.
static uint32_t shortened(uint32_t u, int by)
{
    const uint32_t out = u >> by, rest = u & ((1u << by) - 1), half = 1u << (by - 1);
    return out + (rest > half || (rest == half && (out & 1)));
}
static __half __float2half_rn(float v)
{
    const uint32_t u = bits_of(v) & 0x7fffffffu, sign = bits_of(v) >> 16 & 0x8000u;
    const int exp = (int)(u >> 23);
    uint32_t h = 0;
    if (u > 0x7f800000u) return __half{0x7fff};
    if (exp >= 127 + 16)
        h = 0x7c00;
    else if (exp >= 127 - 14) // a carry goes on into the exponent, up to infinity
        h = shortened(u - ((127u - 15) << 23), 13);
    else if (exp > 101) // units of 2^-24; half of one and less is 0
        h = shortened((u & 0x7fffffu) | 0x800000u, 126 - exp);
    return __half{(uint16_t)(sign | h)};
}
static float __half2float(__half h)
{
    if ((h.bits & 0x7c00) != 0x7c00) return half_value(h.bits);
    return h.bits & 0x3ff ? NAN : h.bits & 0x8000 ? -INFINITY : INFINITY;
}
static uint16_t __half_as_ushort(__half h)
{
    return h.bits;
}
static __nv_bfloat16 __float2bfloat16_rn(float v)
{
    if (isnan(v)) return __nv_bfloat16{0x7fff};
    return __nv_bfloat16{(uint16_t)shortened(bits_of(v), 16)};
}
static float __bfloat162float(__nv_bfloat16 h)
{
    return bf16_value(h.bits);
}
static uint16_t __bfloat16_as_ushort(__nv_bfloat16 h)
{
    return h.bits;
}

// ---- meetings that hardware promises only for threads at the same place of the source ----

static int line_of_warp[MOST_THREADS / 32], line_of_block;
static void same_place(const meeting &m, int &of, int line)
{
    if (m.come == 0) of = line;
    if (of != line) fail("threads meet at line %d and at line %d", of, line);
}
static void sync_block(int line)
{
    same_place(of_block, line_of_block, line);
    __syncthreads();
}
static void warp_at(int line, unsigned mask)
{
    if (mask != ~0u) fail("line %d: not the whole warp", line);
    same_place(of_warp[threadIdx.x / 32], line_of_warp[threadIdx.x / 32], line);
}
static void sync_warp(int line)
{
    warp_at(line, ~0u);
    __syncwarp();
}
template <typename T> static T shuffle(int line, unsigned mask, T v, int lane)
{
    warp_at(line, mask);
    return __shfl_sync(mask, v, lane & 31);
}
static bool all_of(int line, unsigned mask, bool v)
{
    bool all = true;
    warp_at(line, mask);
    self().given[0] = v;
    __syncwarp();
    for (unsigned i = 0; i < 32; i++)
        all &= threads[threadIdx.x / 32 * 32 + i].given[0] != 0;
    __syncwarp();
    return all;
}
#define __syncthreads()               sync_block(__LINE__)
#define __syncwarp()                  sync_warp(__LINE__)
#define __shfl_sync(mask, v, lane)    shuffle(__LINE__, mask, v, lane)
#define __shfl_xor_sync(mask, v, by)  shuffle(__LINE__, mask, v, (int)(threadIdx.x % 32) ^ (by))
#define __all_sync(mask, v)           all_of(__LINE__, mask, v)

// ---- running ----

static std::function<void()> kernel;
static void one_thread()
{
    kernel();
}
static void run(const std::function<void()> &k, int blocks, int n_threads, int rows_of_blocks = 1)
{
    kernel = k;
    if (!run_grid(one_thread, blocks, n_threads, rows_of_blocks)) fail("its threads wait for each other");
}
#endif
