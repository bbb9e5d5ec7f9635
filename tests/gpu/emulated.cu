// The product kernels' own source on a CPU (emulated.cuh): all forms of every type give the same bits and end, for
// entries of every width, ragged chunks, segments of one and of two tiles, in random orders of their threads; and
// the numbers are those of plain loops over the tiles. Built and run by emulated.sh.
#include "tests/gpu/emulated.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "tests/unit/tile_product.h"

enum { N_ROWS = 136, EXPERTS = 3, PAIRS = 130, SOURCES = 29, BLOCKS = 3 };

// Entries of 64, 41, 20 and 5 pairs.
static const int32_t offsets[EXPERTS + 1] = {0, 105, 125, 130};

struct problem {
    gpu_gemm g;
    std::vector<uint8_t> weights;
    std::vector<float> x; // [SOURCES, k]
    std::vector<uint16_t> value[2], sum;
    std::vector<float> scale, weight, out;
    std::vector<int32_t> row, place;
    std::vector<gpu_entry> list;
    int32_t n_entries;
};
static problem p;

static uint16_t bits_of(float v, bool bf16)
{
    if (bf16) {
        uint32_t u;
        memcpy(&u, &v, 4);
        return (uint16_t)(u >> 16);
    }
    if (v == 0) return 0;
    int e;
    float f = frexpf(fabsf(v), &e);
    uint32_t frac = (uint32_t)ldexpf(f, 11);
    assert(e + 14 >= 1 && (float)frac == ldexpf(f, 11));
    return (uint16_t)((v < 0 ? 0x8000u : 0u) | (uint32_t)(e + 14) << 10 | (frac & 1023u));
}

static void make(int type, int k, int interleaved)
{
    gpu_matrix m = gpu_matrix_make(type, N_ROWS / (interleaved ? 2 : 1) - 3, k, interleaved, 0);
    p.weights.resize(EXPERTS * m.bytes);
    for (size_t i = 0; i < p.weights.size(); i += 4) {
        uint32_t r = any_number() & 0xbfffbfffu; // finite in any form
        if (type == KERN_BF16) r = (any_number() & 0x80ff80ffu) | 0x3f003f00u;
        memcpy(&p.weights[i], &r, 4);
    }
    p.x.assign((size_t)(SOURCES * k), 0.0f);
    for (int i = 0; i < 2; i++)
        p.value[i].assign((size_t)(SOURCES * k), 0);
    p.sum.assign((size_t)(SOURCES * k / 16), 0);
    for (int row = 0; row < SOURCES; row++)
        for (int j = 0; j < k / 32; j++) {
            float sum = 0.0f;
            for (int i = 32 * j; i < 32 * j + 32; i++) {
                float v = rounded((float)(int)(any_number() % 2001 - 1000) / 64.0f, type == KERN_BF16 ? 8 : 11);
                size_t line = (size_t)(row * k);
                p.x[line + (size_t)i] = v;
                p.value[0][line + (size_t)gpu_act_at(i)] = p.value[1][line + (size_t)i] =
                    bits_of(v, type == KERN_BF16);
                sum += v;
            }
            uint16_t *to = &p.sum[(size_t)(row * k / 16)];
            float whole = rounded(sum / 32, 11);
            to[gpu_sum_at(j, 0)] = bits_of(whole, false);
            to[gpu_sum_at(j, 1)] = bits_of(rounded(sum / 32 - whole, 11), false);
        }
    p.scale.clear(), p.weight.clear(), p.row.clear(), p.place.clear();
    for (int i = 0; i < SOURCES; i++)
        p.scale.push_back(ldexpf(1.0f, i % 5 - 2));
    for (int i = 0; i < PAIRS; i++) {
        p.row.push_back(i * 7 % SOURCES);
        p.place.push_back(PAIRS - 1 - i);
        p.weight.push_back(0.5f + (float)i / PAIRS);
    }
    p.g = gpu_gemm{};
    p.g.w = p.weights.data();
    p.g.m = m;
    p.g.x = gpu_rows{nullptr, p.scale.data(), p.sum.data()};
    p.g.pair_row = p.row.data();
    p.g.pair_out = p.place.data();
    p.g.pair_weight = p.weight.data();
    p.g.ld = m.n + 1;
    p.g.n_entries = &p.n_entries;
}

template <int TYPE> static std::vector<float> run(int form, bool *ended)
{
    p.out.assign((size_t)(PAIRS * p.g.ld), -7.0f);
    p.list.resize(16);
    p.n_entries = gpu_entries_build(p.list.data(), offsets, EXPERTS, gpu_form_width(form));
    p.g.list = p.list.data();
    p.g.out = p.out.data();
    p.g.x.value = p.value[form == GPU_FORM_WGMMA].data();
    gpu_gemm_plan(&p.g, form, SHARED_BYTES);
    assert(gpu_gemm_smem(&p.g, form) <= SHARED_BYTES);
    void (*work)() = form == GPU_FORM_WGMMA   ? +[] { wgmma_kernel<TYPE>(p.g); }
                     : form == GPU_FORM_SPLIT ? +[] { gemm_kernel<TYPE, 1, GPU_NARROW_COLS / 8, true>(p.g); }
                                              : +[] { gemm_kernel<TYPE, GPU_WIDE_ROWS, GPU_WIDE_COLS / 8, false>(p.g); };
    *ended = run_grid(work, BLOCKS, form == GPU_FORM_WGMMA ? WGMMA_THREADS : GPU_WARPS * 32);
    return p.out;
}

// Channel n of one pair, in the same order of segments.
static double plain(int pair, int n)
{
    const gpu_matrix &m = p.g.m;
    int e = 0;
    while (offsets[e + 1] <= pair)
        e++;
    float v[2] = {0.0f, 0.0f};
    for (int half = 0; half <= m.interleaved; half++) {
        const int rows = m.interleaved ? 8 : 16, row = n % rows + 8 * half, each = gpu_segment_tiles(m.k_tiles);
        const uint8_t *tiles = p.g.w + (size_t)e * m.bytes + (size_t)(n / rows * m.k_tiles) * (size_t)m.tile_bytes;
        for (int from = 0; from < m.k_tiles; from += each) {
            float segment = 0.0f;
            for (int kt = from; kt < from + each && kt < m.k_tiles; kt++)
                segment += tile_product(m.type, tiles + (size_t)(kt * m.tile_bytes), row,
                                        &p.x[(size_t)(p.row[(size_t)pair] * m.k + kt * GPU_TILE_K)]);
            v[half] += segment;
        }
        v[half] *= p.scale[(size_t)p.row[(size_t)pair]];
    }
    if (m.interleaved) v[0] = silu_mul(v[0], v[1]);
    return v[0] * p.weight[(size_t)pair];
}

template <int TYPE> static int check(const char *name, int k, int interleaved)
{
    std::vector<float> out[GPU_FORMS];
    int failed = 0;
    make(TYPE, k, interleaved);
    for (int form = 0; form < GPU_FORMS; form++) {
        bool ended;
        out[form] = run<TYPE>(form, &ended);
        if (!ended) printf("FAILED: form %d: its threads wait for each other\n", form);
        size_t apart = 0;
        for (size_t i = 0; i < out[0].size(); i++)
            apart += memcmp(&out[0][i], &out[form][i], 4) != 0;
        if (apart > 0) printf("FAILED: form %d: %zu of %zu values have other bits\n", form, apart, out[0].size());
        failed += !ended || apart > 0;
        if (!ended) exit(1);
    }
    double error = 0, size = 0;
    for (int pair = 0; pair < PAIRS; pair += 3)
        for (int n = 0; n <= p.g.m.n; n++) {
            float got = out[0][(size_t)(p.place[(size_t)pair] * p.g.ld + n)];
            if (n == p.g.m.n) {
                if (got != -7.0f) printf("FAILED: written past a row\n"), failed++;
                continue;
            }
            double want = plain(pair, n);
            error += fabs(got - want);
            size += fabs(want);
        }
    bool close = error <= 1e-5 * size;
    printf("%s%-5s k %4d%s: %.1e from plain loops\n", close ? "" : "FAILED: ", name, k,
           interleaved ? ", gate and up" : "", error / size);
    return failed + !close;
}

template <int TYPE> static int check_type(const char *name)
{
    // 2304: segments of two tiles; once is enough of that
    return check<TYPE>(name, 512, 0) + check<TYPE>(name, TYPE == KERN_Q4_K ? 2304 : 256, 1);
}

int main()
{
    int failed = check_type<KERN_Q4_K>("Q4_K") + check_type<KERN_Q6_K>("Q6_K") + check_type<KERN_Q8_0>("Q8_0") +
                 check_type<KERN_GPTQ4>("GPTQ4") + check_type<KERN_F16>("F16") + check_type<KERN_BF16>("BF16");
    printf(failed ? "%d failures\n" : "all forms agree\n", failed);
    return failed != 0;
}
