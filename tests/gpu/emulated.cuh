// One block of threads on a CPU, for the product kernels' own source: what mma.cuh and chain.cuh offer as single
// instructions is done here in plain C++, as late as the hardware may do it. Threads are contexts that take turns in
// a random order; now and then one of them, or a warp, stands still while the others go as far as they can.
//
// Late means: a cp.async lands when its thread waits for it, a bulk copy at any time before its barrier opens; what
// a thread wrote reaches wgmma only with its next fence; a wgmma reads its operands and writes its sums when its
// warpgroup waits for it. So a missing wait, a stage freed too early or registers reused too early give other
// numbers, and threads that wait for each other for ever are told apart.
//
// A tensor core's step is 16 products added in ascending order: what hardware does inside a step is not at stake.
#ifndef EP_TESTS_GPU_EMULATED_CUH
#define EP_TESTS_GPU_EMULATED_CUH
#define EP_KERNELS_CUDA_MMA_CUH
#define EP_KERNELS_CUDA_CHAIN_CUH
#include <assert.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <deque>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n)            __attribute__((aligned(n)))
#define __shared__
#define __CUDA_ARCH__            900
#define __CUDA_ARCH_FEAT_SM90_ALL 1

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
static inline uint2 make_uint2(uint32_t x, uint32_t y)
{
    return uint2{x, y};
}
static inline int min(int a, int b)
{
    return a < b ? a : b;
}

// ---- threads ----

enum { MOST_THREADS = 512, STACK_BYTES = 64 * 1024, SHARED_BYTES = 227 * 1024, SHARED_AT = 0x410 };

// A shared address is not a multiple of 1024 at the start: the kernel has to see to that itself.
alignas(1024) uint8_t shared[SHARED_BYTES];
static uint8_t seen_by_async[SHARED_BYTES]; // what wgmma sees of it

// Arrays that a kernel declares for its block, where a program puts them into this section.
extern uint8_t __start_of_block[] __attribute__((weak)), __stop_of_block[] __attribute__((weak));

struct dim {
    unsigned x, y;
};
static dim threadIdx, blockIdx, gridDim, blockDim;

struct copy {
    uint32_t to;
    uint8_t bytes[16];
};
struct product {
    float *d;
    int n;
    const uint32_t *a;
    uint64_t b;
    bool goes_on, bf16;
};
struct thread {
    ucontext_t context; // where it begins
    jmp_buf at;         // where it goes on: switching contexts asks the kernel for signal masks
    bool begun, done;
    const uint32_t *waits_at; // until this is not `seen` any more; or NULL
    uint32_t seen;
    std::deque<std::vector<copy>> copies; // groups that are in flight
    std::vector<copy> open;               // the group that is not closed yet
    std::vector<uint32_t> unfenced;       // landed, wgmma does not see them yet
    std::deque<std::vector<product>> products;
    std::vector<product> open_products;
    uint32_t given[8]; // to the others of the warp
};
static thread threads[MOST_THREADS];
static jmp_buf scheduler;
static uint64_t random_state = 0x9e3779b97f4a7c15ull;
static long idle; // turns without anything done

static uint32_t any_number()
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32);
}
static thread &self()
{
    return threads[threadIdx.x];
}
static void yield()
{
    if (_setjmp(self().at) == 0) _longjmp(scheduler, 1);
}

// Between two instructions others may come first.
static void maybe_yield()
{
    if (any_number() % 4 == 0) yield();
}

static void wait_while(const uint32_t &word, uint32_t is)
{
    self().waits_at = &word;
    self().seen = is;
    while (word == is)
        yield();
    self().waits_at = nullptr;
}

// All threads of a group come here before one goes on.
struct meeting {
    int come;
    uint32_t round;
};
static meeting of_warp[MOST_THREADS / 32], of_group[MOST_THREADS / 128], of_block;
static void meet(meeting &m, int size)
{
    const uint32_t round = m.round;
    idle = 0;
    if (++m.come == size) {
        m.come = 0;
        m.round++;
    }
    wait_while(m.round, round);
}
static void __syncwarp()
{
    meet(of_warp[threadIdx.x / 32], 32);
}
static void __syncthreads()
{
    meet(of_block, (int)blockDim.x);
}
template <typename T> static T __shfl_sync(unsigned, T v, int lane)
{
    static_assert(sizeof(T) == 4, "one register");
    memcpy(self().given, &v, 4);
    __syncwarp();
    memcpy(&v, threads[threadIdx.x / 32 * 32 + lane].given, 4);
    __syncwarp();
    return v;
}

// ---- numbers ----

static std::vector<float> half_values()
{
    std::vector<float> all;
    for (uint32_t h = 0; h < 65536; h++) {
        int exp = (int)(h >> 10 & 31), frac = (int)(h & 1023);
        float v = exp == 0 ? ldexpf((float)frac, -24) : ldexpf((float)(1024 + frac), exp - 25);
        all.push_back(h & 0x8000 ? -v : v);
    }
    return all;
}
static float half_value(uint32_t h)
{
    static const std::vector<float> values = half_values();
    return values[h];
}
// Of what the kernels compute in halves, every result is a small integer.
static uint32_t half_of(float v)
{
    assert(v == rintf(v) && fabsf(v) < 2048);
    if (v == 0) return 0;
    int e;
    float f = frexpf(fabsf(v), &e);
    return (v < 0 ? 0x8000u : 0u) | (uint32_t)(e + 14) << 10 | ((uint32_t)ldexpf(f, 11) & 1023u);
}
static float bf16_value(uint32_t h)
{
    float f;
    h <<= 16;
    memcpy(&f, &h, 4);
    return f;
}
static float __uint_as_float(uint32_t u)
{
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t select)
{
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++)
        out |= (uint32_t)(both >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
static uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits)
{
    return (a & mask) | bits;
}
static uint32_t half2_sub(uint32_t a, uint32_t b)
{
    return half_of(half_value(a & 0xffff) - half_value(b & 0xffff)) |
           half_of(half_value(a >> 16) - half_value(b >> 16)) << 16;
}
static uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c)
{
    return half_of(half_value(a & 0xffff) * half_value(b & 0xffff) + half_value(c & 0xffff)) |
           half_of(half_value(a >> 16) * half_value(b >> 16) + half_value(c >> 16)) << 16;
}
static float half_lo(uint32_t h)
{
    return half_value(h & 0xffff);
}
static float half_hi(uint32_t h)
{
    return half_value(h >> 16);
}
static float byte_float(uint32_t w, int i, float zero)
{
    return (float)(w >> 8 * i & 255) - zero;
}
static float operand(uint32_t two, int i, bool bf16)
{
    uint32_t h = two >> 16 * i & 0xffff;
    return bf16 ? bf16_value(h) : half_value(h);
}

// ---- mma.sync ----

template <bool BF16> static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    const int lane = threadIdx.x % 32;
    thread *warp = threads + threadIdx.x / 32 * 32;
    memcpy(self().given, a, 16);
    self().given[4] = b0;
    self().given[5] = b1;
    __syncwarp();
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) { // row lane / 4 (+ 8), column 2 * (lane % 4) (+ 1)
            uint32_t *from_a = warp[lane / 4 * 4 + k % 8 / 2].given;
            uint32_t *from_b = warp[(2 * (lane % 4) + i % 2) * 4 + k % 8 / 2].given;
            c[i] += operand(from_a[i / 2 + 2 * (k / 8)], k % 2, BF16) * operand(from_b[4 + k / 8], k % 2, BF16);
        }
    __syncwarp();
}

// ---- barriers and copies ----

static uint32_t shared_address(const void *p)
{
    return (uint32_t)((const uint8_t *)p - shared) + SHARED_AT;
}
static uint8_t *at(uint32_t address)
{
    assert(address >= SHARED_AT && address < SHARED_AT + SHARED_BYTES);
    return shared + (address - SHARED_AT);
}

struct barrier {
    int32_t arrivals, pending, bytes;
    uint32_t phase;
};
static barrier barriers[SHARED_BYTES / 8];
static barrier &barrier_at(uint32_t address)
{
    assert(address % 8 == 0);
    return barriers[(address - SHARED_AT) / 8];
}
static void settle(barrier &b)
{
    if (b.pending > 0 || b.bytes != 0) return;
    b.phase ^= 1;
    b.pending = b.arrivals;
}
static void barrier_init(uint32_t bar, uint32_t arrivals)
{
    barrier_at(bar) = barrier{(int32_t)arrivals, (int32_t)arrivals, 0, 0};
}
static void barrier_init_fence()
{
}
static void barrier_arrive(uint32_t bar)
{
    barrier &b = barrier_at(bar);
    maybe_yield();
    idle = 0;
    assert(b.pending > 0);
    b.pending--;
    settle(b);
}
static void barrier_expect(uint32_t bar, uint32_t bytes)
{
    barrier_at(bar).bytes += (int32_t)bytes;
    barrier_arrive(bar);
}

struct bulk {
    uint32_t to, bytes, bar;
    const uint8_t *from;
};
static std::deque<bulk> bulks;
static void land_bulk()
{
    bulk b = bulks.front();
    bulks.pop_front();
    idle = 0;
    memcpy(at(b.to), b.from, b.bytes);
    memcpy(seen_by_async + (b.to - SHARED_AT), b.from, b.bytes);
    barrier_at(b.bar).bytes -= (int32_t)b.bytes;
    settle(barrier_at(b.bar));
}
static void bulk_copy(uint32_t to, const void *from, uint32_t bytes, uint32_t bar)
{
    assert(to % 16 == 0 && (uintptr_t)from % 16 == 0 && bytes % 16 == 0);
    at(to + bytes - 1);
    bulks.push_back(bulk{to, bytes, bar, (const uint8_t *)from});
}
static bool barrier_test(uint32_t bar, uint32_t parity)
{
    maybe_yield();
    return barrier_at(bar).phase != parity;
}
static void barrier_wait(uint32_t bar, uint32_t parity)
{
    wait_while(barrier_at(bar).phase, parity);
    maybe_yield();
    idle = 0;
}
static void copy_16(uint32_t to, const void *from)
{
    assert(to % 16 == 0 && (uintptr_t)from % 16 == 0);
    copy c;
    c.to = to;
    memcpy(c.bytes, from, 16);
    self().open.push_back(c);
}
static void copy_commit()
{
    self().copies.push_back(self().open);
    self().open.clear();
    maybe_yield();
}
static void copy_wait(int left)
{
    thread &t = self();
    while ((int)t.copies.size() > left) {
        for (const copy &c : t.copies.front()) {
            memcpy(at(c.to), c.bytes, 16);
            t.unfenced.push_back(c.to);
        }
        t.copies.pop_front();
    }
}
static void fence_async()
{
    for (uint32_t to : self().unfenced)
        memcpy(seen_by_async + (to - SHARED_AT), at(to), 16);
    self().unfenced.clear();
}

// ---- wgmma ----

template <int N> static void registers_give()
{
}
template <int N> static void registers_take()
{
}
template <int N> static void hold(float (&)[N])
{
}
static void hold(uint32_t (&)[4])
{
}
static void wgmma_fence()
{
}
template <bool BF16, int N> static void wgmma(float (&d)[N], const uint32_t (&a)[4], uint64_t b, int goes_on)
{
    self().open_products.push_back(product{d, N, a, b, goes_on != 0, BF16});
}
static void wgmma_commit()
{
    self().products.push_back(self().open_products);
    self().open_products.clear();
}
// Element (column, k) of the operand that a descriptor names: the canonical layouts of the manual.
static float column_value(uint64_t d, int col, int k, bool bf16)
{
    uint32_t start = (uint32_t)(d & 0x3fff), lbo = (uint32_t)(d >> 16 & 0x3fff), sbo = (uint32_t)(d >> 32 & 0x3fff);
    bool swizzle = d >> 62 == 1;
    uint32_t unit = swizzle ? col % 8 * 8 + col / 8 * sbo + k / 8 : col % 8 + col / 8 * sbo + k / 8 * lbo;
    uint32_t address = ((start + unit) << 4) + k % 8 * 2;
    if (swizzle) address ^= (address >> 7 & 7) << 4;
    uint16_t v;
    memcpy(&v, seen_by_async + (address - SHARED_AT), 2);
    return operand(v, 0, bf16);
}
static void do_product(const product &p, const thread *warp, size_t i)
{
    const int lane = threadIdx.x % 32;
    for (int e = 0; e < p.n; e++) {
        const int col = e / 4 * 8 + 2 * (lane % 4) + e % 2;
        float sum = p.goes_on ? p.d[e] : 0.0f;
        for (int k = 0; k < 16; k++) {
            const uint32_t *a = warp[lane / 4 * 4 + k % 8 / 2].products.front()[i].a;
            sum += operand(a[e % 4 / 2 + 2 * (k / 8)], k % 2, p.bf16) * column_value(p.b, col, k, p.bf16);
        }
        p.d[e] = sum;
    }
}
template <int LEFT> static void wgmma_wait()
{
    thread &t = self();
    meeting &group = of_group[threadIdx.x / 128];
    while ((int)t.products.size() > LEFT) {
        meet(group, 128); // all have come: what they point at stands still
        for (size_t i = 0; i < t.products.front().size(); i++)
            do_product(t.products.front()[i], threads + threadIdx.x / 32 * 32, i);
        meet(group, 128);
        t.products.pop_front();
    }
}

// ---- the rest of a pass ----

#include "kernels/cuda/gpu.h"
static void chain_wait()
{
}
static void chain_release()
{
}
static int load_count(const int32_t *p)
{
    return *p;
}
static gpu_entry load_entry(const gpu_entry *p)
{
    assert((uintptr_t)p % 16 == 0);
    return *p;
}

// ---- running ----

static void (*body)();
static void enter()
{
    body();
    self().done = true;
    idle = 0;
    yield();
}

static void go_on()
{
    thread &t = self();
    if (_setjmp(scheduler) != 0) return;
    if (t.begun) _longjmp(t.at, 1);
    t.begun = true;
    setcontext(&t.context);
}

static bool can_go_on(const thread &t)
{
    return !t.done && (t.waits_at == nullptr || *t.waits_at != t.seen);
}

// Threads that stand still for some rounds of turns, or until all others wait for them: one, a warp, or none.
struct sleepers {
    unsigned first, n;
    int rounds;
};
static void fall_asleep(sleepers &s, unsigned n_threads)
{
    if (--s.rounds > 0) return;
    s.n = any_number() % 2 ? 32 : 1;
    s.first = any_number() % (2 * n_threads) / s.n * s.n;
    s.rounds = (int)(any_number() % 64);
}

static void start_block(int n_threads)
{
    static std::vector<uint8_t> stacks((size_t)MOST_THREADS * STACK_BYTES);
    memset(shared, 0xff, sizeof shared); // not a number in any form
    memset(seen_by_async, 0xff, sizeof seen_by_async);
    if (__start_of_block != nullptr) memset(__start_of_block, 0xff, (size_t)(__stop_of_block - __start_of_block));
    for (int i = 0; i < n_threads; i++) {
        threads[i].done = threads[i].begun = false;
        threads[i].waits_at = nullptr;
        getcontext(&threads[i].context);
        threads[i].context.uc_stack.ss_sp = &stacks[(size_t)i * STACK_BYTES];
        threads[i].context.uc_stack.ss_size = STACK_BYTES;
        threads[i].context.uc_link = nullptr;
        makecontext(&threads[i].context, enter, 0);
    }
}

static bool run_block(unsigned n_threads)
{
    sleepers asleep = {};
    start_block((int)n_threads);
    for (idle = 0;;) {
        bool left = false, moved = false;
        const unsigned first = any_number() % n_threads, step = 2 * (any_number() % 64) + 1;
        fall_asleep(asleep, n_threads);
        for (unsigned i = 0; i < n_threads; i++) { // numbers of threads have no odd divisor but 3
            threadIdx.x = (first + i * (step % 3 == 0 ? step + 2 : step)) % n_threads;
            left |= !self().done;
            if (!can_go_on(self()) || threadIdx.x - asleep.first < asleep.n) continue;
            moved = true;
            go_on();
        }
        if (!left) return true;
        if (!moved) asleep.rounds = 0;
        if (!bulks.empty() && any_number() % 4 == 0) land_bulk();
        if (++idle > 1000 && bulks.empty()) return false;
    }
}

// Runs `work` as every thread of every block; false when they wait for each other for ever.
static bool run_grid(void (*work)(), int blocks, int n_threads, int rows_of_blocks = 1)
{
    body = work;
    gridDim = dim{(unsigned)blocks, (unsigned)rows_of_blocks};
    blockDim = dim{(unsigned)n_threads, 1};
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
            if (!run_block((unsigned)n_threads)) return false;
    return true;
}
#endif
