// The source of the kernels around the products on a CPU (emulated_side.cuh), against plain loops: bits wherever
// gpu.h and layout.h say which, else bounds. Built and run by emulated.sh.
#include "tests/gpu/emulated_side.cuh"
#include <algorithm>
#include "kernels/cuda/side.cuh"
extern "C" { // a header of C, whose own includes are here already
#include "kernels/cuda/pack.h"
}

enum { ROUNDS = 3 };

static float unit() // -1 .. 1
{
    return (float)((double)any_number() / 2147483648.0 - 1.0);
}
static float normal()
{
    float v = 0.0f;
    for (int i = 0; i < 6; i++)
        v += unit();
    return v * 0.7f;
}

// ---- 16-bit numbers, another way than in emulated_side.cuh ----

struct format {
    int frac, least, bias; // bits of the fraction, exponent of the smallest normal number
};
static const format half_format = {10, -14, 15}, bf16_format = {7, -126, 127};

static uint16_t code_of(double v, const format &f)
{
    const uint32_t inf = (uint32_t)(2 * f.bias + 1) << f.frac, sign = std::signbit(v) ? 0x8000u : 0u;
    if (std::isnan(v)) return 0x7fff;
    if (std::isinf(v)) return (uint16_t)(sign | inf);
    const int e = v == 0 ? f.least : std::max(std::ilogb(v), f.least);
    const double units = nearbyint(ldexp(fabs(v), f.frac - e)); // the current mode: to the nearest, ties to even
    const double code = ldexp(e - f.least, f.frac) + units;
    return (uint16_t)(sign | (code < inf ? (uint32_t)code : inf));
}
static double value_of(uint16_t code, const format &f)
{
    const int e = (code & 0x7fff) >> f.frac, frac = code & ((1 << f.frac) - 1);
    double v = e == 0 ? ldexp(frac, f.least - f.frac) : ldexp((1 << f.frac) + frac, e - f.bias - f.frac);
    if (e == 2 * f.bias + 1) v = frac ? NAN : INFINITY;
    return code & 0x8000 ? -v : v;
}
static bool same_code(uint16_t a, uint16_t b, const format &f)
{
    return a == b || (std::isnan(value_of(a, f)) && std::isnan(value_of(b, f)));
}

// ---- rows ----

struct rows_case {
    int act, k;
    bool bf16, natural;
};
enum { ROWS_N = 8, ROWS_BLOCKS = 3, KINDS = 8 };

static float any_value(int kind, int i, int lone)
{
    switch (kind) {
    case 0: // one value, of any thread, decides on the scale
        return i == lone ? 1000.0f * unit() : unit();
    case 1:
        return i % 2 ? 0.0f : -0.0f;
    case 2:
        return unit() * 3.4e38f;
    case 3:
        return unit() * 1e-39f;
    case 4: // 13 bits: ties of both formats, from 2^-45 to the largest
        return ldexpf((float)(any_number() % 16383) - 8191.0f, -(int)(any_number() % 46));
    case 5:
        return any_number() % 64 == 0 ? NAN : 100.0f * unit();
    case 6:
        return any_number() % 64 == 0 ? unit() * INFINITY : 70000.0f * unit();
    default:
        return NAN;
    }
}

static void make_row(uint8_t *to, const rows_case &c, int kind)
{
    const int block = kern_act_block((kern_act)c.act);
    const int lone = (int)(any_number() % (uint32_t)c.k) / block * block;
    for (int i = 0; i < c.k; i++) {
        float v = any_value(kind, i, lone);
        if (c.act == KERN_ACT_F32)
            memcpy(to + 4 * i, &v, 4);
        else if (c.act == KERN_ACT_BF16)
            memcpy(to + 2 * i, (const uint8_t *)&v + 2, 2);
        else {
            to[i] = (uint8_t)any_number();
            if (i % block == 0) memcpy(to + c.k + 4 * (i / block), &v, 4);
        }
    }
}

static float plain_value(const uint8_t *row, const rows_case &c, int i)
{
    float v;
    uint32_t u;
    if (c.act == KERN_ACT_BF16) {
        u = (uint32_t)(row[2 * i] | row[2 * i + 1] << 8) << 16;
        memcpy(&v, &u, 4);
        return v;
    }
    if (c.act == KERN_ACT_F32) {
        memcpy(&v, row + 4 * i, 4);
        return v;
    }
    memcpy(&v, row + c.k + 4 * (i / kern_act_block((kern_act)c.act)), 4);
    return (float)(int8_t)row[i] * v;
}

// The power of two by which a row is divided: its largest value lands in [2^13, 2^14). Not less than 2^-114.
static int plain_exponent(const std::vector<float> &x)
{
    float most = 0.0f;
    for (float v : x)
        if (fabsf(v) > most) most = fabsf(v);
    if (most == 0.0f || std::isinf(most)) return 0;
    int e = -114;
    while (ldexp(most, -e) >= 16384.0)
        e++;
    return e;
}

// 32 values are added in a tree of halves: 0 + 16, 1 + 17, ... first.
static void check_sums(const std::vector<double> &rounded, const uint16_t *sum)
{
    for (size_t j = 0; j < rounded.size() / 32; j++) {
        float part[32];
        double exact = 0, size = 0;
        for (size_t i = 0; i < 32; i++) {
            double v = rounded[32 * j + i];
            part[i] = (float)v;
            exact += v;
            size += fabs(v);
        }
        for (int n = 16; n > 0; n /= 2)
            for (int i = 0; i < n; i++)
                part[i] += part[i + n];
        const float all = part[0] / 32;
        const uint16_t whole = code_of(all, half_format);
        const double left = all - (float)value_of(whole, half_format);
        const uint16_t rest = code_of(left, half_format);
        const uint16_t got[2] = {sum[gpu_sum_at((int)j, 0)], sum[gpu_sum_at((int)j, 1)]};
        if (!same_code(got[0], whole, half_format) || !same_code(got[1], rest, half_format))
            fail("sum %zu is %04x %04x, not %04x %04x", j, got[0], got[1], whole, rest);
        const double is = 32 * (value_of(got[0], half_format) + value_of(got[1], half_format));
        if (std::isfinite(size) && fabs(is - exact) > 1e-6 * size + 1e-6) fail("sum %zu is %g, not %g", j, is, exact);
    }
}

static void check_row(const rows_case &c, const uint8_t *row, const uint16_t *value, float scale, const uint16_t *sum)
{
    const format &f = c.bf16 ? bf16_format : half_format;
    const int padded = (c.k + GPU_TILE_K - 1) / GPU_TILE_K * GPU_TILE_K;
    std::vector<float> x;
    std::vector<double> rounded;
    for (int i = 0; i < c.k; i++)
        x.push_back(plain_value(row, c, i));
    const int e = c.bf16 ? 0 : plain_exponent(x);
    if (scale != ldexp(1, e)) fail("scale %g, not 2^%d", scale, e);
    for (int i = 0; i < padded; i++) {
        const uint16_t want = i < c.k ? code_of(ldexp(x[(size_t)i], -e), f) : 0;
        const uint16_t got = value[c.natural ? i : gpu_act_at(i)];
        if (!same_code(got, want, f)) fail("value %d is %04x, not %04x", i, got, want);
        rounded.push_back(value_of(want, f));
    }
    if (!c.bf16) check_sums(rounded, sum);
}

static void check_rows_case(const rows_case &c, int n)
{
    const size_t bytes = kern_act_row_bytes((kern_act)c.act, c.k), rows = (size_t)n;
    const size_t padded = (size_t)(c.k + GPU_TILE_K - 1) / GPU_TILE_K * GPU_TILE_K;
    fenced<uint8_t> src(rows * bytes);
    fenced<uint16_t> value(rows * padded), sum(c.bf16 ? 0 : rows * padded / 16);
    fenced<float> scale(rows);
    fenced<int32_t> count(1);
    count[0] = n;
    for (int r = 0; r < n; r++)
        make_row(&src[(size_t)r * bytes], c, (r + c.k) % KINDS);
    gpu_rows to = {value.data(), scale.data(), sum.data()};
    snprintf(doing, sizeof doing, "rows: act %d, k %d, bf16 %d, natural %d", c.act, c.k, c.bf16, c.natural);
    run([&] { rows_kernel(c.act, src.data(), to, count.data(), c.k, c.bf16, c.natural); }, ROWS_BLOCKS, ROW_THREADS);
    for (int r = 0; r < n; r++) {
        snprintf(doing, sizeof doing, "rows: act %d, k %d, bf16 %d, natural %d, row %d of kind %d", c.act, c.k, c.bf16,
                 c.natural, r, (r + c.k) % KINDS);
        check_row(c, &src[(size_t)r * bytes], &value[(size_t)r * padded], scale[(size_t)r],
                  sum.data() + (size_t)r * (padded / 16));
    }
}

static void check_rows()
{
    static const int shapes[][2] = {{KERN_ACT_F32, 1},      {KERN_ACT_F32, 301},    {KERN_ACT_F32, 512},
                                    {KERN_ACT_BF16, 33},    {KERN_ACT_BF16, 515},   {KERN_ACT_Q8_256, 256},
                                    {KERN_ACT_Q8_256, 768}, {KERN_ACT_Q8_128, 384}, {KERN_ACT_Q8_32, 288}};
    for (const auto &s : shapes)
        for (int way = 0; way < 4; way++)
            check_rows_case(rows_case{s[0], s[1], way % 2 == 1, way / 2 == 1}, ROWS_N);
    check_rows_case(rows_case{KERN_ACT_F32, 256, false, false}, 0);
    check_rows_case(rows_case{KERN_ACT_F32, 256, false, false}, 1);
}

// ---- the work list ----

static int any_count(int kind, int e, int n, int width)
{
    switch (kind) {
    case 0: // some empty ones
        return any_number() % 3 ? (int)(any_number() % 40) : (int)(any_number() % 2) * 300;
    case 1:
        return 0;
    case 2: // as many as an entry can count
        return e == n - 1 ? 65535 * width : 0;
    default: // around the width
        return width - 1 + (int)(any_number() % 3);
    }
}

static void check_list_case(int n, int width, int kind)
{
    snprintf(doing, sizeof doing, "list: %d experts, width %d, kind %d", n, width, kind);
    fenced<int32_t> offset((size_t)n + 1), count(1);
    offset[0] = 0;
    for (int e = 0; e < n; e++)
        offset[(size_t)e + 1] = offset[(size_t)e] + any_count(kind, e, n, width);
    std::vector<gpu_entry> want((size_t)gpu_entries_most(offset[(size_t)n], n, width) + 1);
    const int n_want = gpu_entries_build(want.data(), offset.data(), n, width);
    fenced<gpu_entry> got((size_t)n_want);
    run([&] { list_kernel(offset.data(), n, width, got.data(), count.data()); }, 1, LIST_THREADS);
    if (count[0] != n_want) fail("%d entries, not %d", count[0], n_want);
    if (n_want > 0 && memcmp(got.data(), want.data(), (size_t)n_want * sizeof(gpu_entry)) != 0) fail("another list");
}

static void check_lists()
{
    static const int sizes[] = {1, 5, 128, 512, 513, 1100};
    for (int n : sizes)
        for (int width = 16; width <= 64; width *= 2)
            check_list_case(n, width, 0);
    check_list_case(513, 16, 1);
    check_list_case(1, 16, 2);
    check_list_case(1024, 32, 2);
    check_list_case(600, 64, 3);
}

// ---- packing ----

static void check_pack_case(int type, int n, int k, int interleaved)
{
    snprintf(doing, sizeof doing, "pack: %s [%d, %d], interleaved %d", kern_type_name(type), n, k, interleaved);
    const gpu_matrix m = gpu_matrix_make(type, n, k, interleaved, kern_type_row_bytes(type, k));
    const size_t bytes = (size_t)n * m.row_bytes;
    fenced<uint8_t> a(bytes), b(interleaved ? bytes : 0);
    fenced<uint32_t> got(m.bytes / 4);
    std::vector<uint8_t> want(m.bytes);
    for (size_t i = 0; i < bytes; i++) {
        a[i] = (uint8_t)any_number();
        if (interleaved) b[i] = (uint8_t)any_number();
    }
    gpu_pack(&m, a.data(), b.data(), want.data());
    run([&] { pack_kernel(m, a.data(), b.data(), got.data()); }, 3, 64);
    if (memcmp(got.data(), want.data(), m.bytes) != 0) fail("other bytes than on the host");
}

static void check_pack()
{
    static const int types[] = {KERN_Q4_K, KERN_Q6_K, KERN_Q8_0, KERN_GPTQ4, KERN_F16, KERN_BF16};
    for (int type : types)
        for (int interleaved = 0; interleaved < 2; interleaved++) {
            check_pack_case(type, 19, 256 + kern_type_block(type), interleaved); // past the edges that a type can have
            check_pack_case(type, interleaved ? 8 : 16, 256, interleaved);
            check_pack_case(type, 1, kern_type_block(type), interleaved);
        }
}

// ---- gate ----

struct gate_case {
    int n_experts, top_k, sigmoid, renormalise, biased, ties;
};
enum { GATE_ROWS = 7 };

// What an expert is chosen by, and its weight before the factor.
static void plain_scores(const gate_case &c, const float *logits, const float *bias, std::vector<double> *score,
                         std::vector<double> *key)
{
    const size_t n = (size_t)c.n_experts;
    double top = -INFINITY, sum = 0;
    score->resize(n);
    key->resize(n);
    for (size_t e = 0; e < n; e++)
        top = std::max(top, (double)logits[e]);
    for (size_t e = 0; e < n; e++)
        sum += (*score)[e] = c.sigmoid ? 1 / (1 + exp(-(double)logits[e])) : exp(logits[e] - top);
    for (size_t e = 0; e < n; e++) {
        if (!c.sigmoid) (*score)[e] /= sum;
        (*key)[e] = (*score)[e] + (c.biased ? bias[e] : 0.0);
    }
}
static std::vector<int> plain_choice(const std::vector<double> &key)
{
    std::vector<int> id;
    for (size_t e = 0; e < key.size(); e++)
        id.push_back((int)e);
    std::stable_sort(id.begin(), id.end(), [&](int a, int b) { return key[(size_t)a] > key[(size_t)b]; });
    return id;
}
// Two of those that count are so close, but not equal, that rounding decides.
static bool is_close_call(const gate_case &c, const std::vector<double> &key, const std::vector<int> &id)
{
    for (size_t i = 0; i < (size_t)c.top_k && i + 1 < id.size(); i++) {
        const double more = key[(size_t)id[i]], less = key[(size_t)id[i + 1]];
        if (more != less && more - less < (c.sigmoid || c.biased ? 1e-6 : 1e-5 * more)) return true;
    }
    return false;
}

static void check_gate_row(const gate_case &c, const gpu_gate &g, int row, const std::vector<double> &score,
                           const std::vector<int> &id)
{
    double chosen = 0;
    for (int s = 0; s < c.top_k; s++)
        chosen += score[(size_t)id[(size_t)s]];
    for (int s = 0; s < c.top_k; s++) {
        const int32_t got = g.experts[row * c.top_k + s];
        const double w = g.weights[row * c.top_k + s];
        double want = score[(size_t)id[(size_t)s]];
        if (c.renormalise) want /= chosen;
        want *= g.scale;
        if (got != id[(size_t)s]) fail("row %d, slot %d: expert %d, not %d", row, s, got, id[(size_t)s]);
        if (!(fabs(w - want) <= 1e-5 * want)) fail("row %d, slot %d: weight %g, not %g", row, s, w, want);
    }
}

// Rows 2 and 5 have a logit that is not finite: ids of -1, weights as they were.
static void check_gate_case(const gate_case &c)
{
    const size_t n = (size_t)c.n_experts, places = (size_t)(GATE_ROWS * c.top_k);
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    snprintf(doing, sizeof doing, "gate: top %d of %d, sigmoid %d, renormalise %d, bias %d, ties %d", c.top_k,
             c.n_experts, c.sigmoid, c.renormalise, c.biased, c.ties);
    fenced<float> logits(GATE_ROWS * n), bias(c.biased ? n : 0), weights(places), untouched(1);
    fenced<int32_t> experts(places);
    std::vector<double> score[GATE_ROWS], key;
    std::vector<int> id[GATE_ROWS];
    for (size_t e = 0; c.biased && e < n; e++)
        bias[e] = c.ties ? (float)(any_number() % 2) * 0.5f : 0.3f * unit();
    for (int r = 0; r < GATE_ROWS; r++) {
        float *l = &logits[(size_t)r * n];
        do {
            for (size_t e = 0; e < n; e++)
                l[e] = c.ties ? (float)(any_number() % 3) : 3.0f * normal();
            plain_scores(c, l, bias.data(), &score[r], &key);
            id[r] = plain_choice(key);
        } while (is_close_call(c, key, id[r]));
        if (r % 3 == 2) l[r == 2 ? n - 1 : any_number() % n] = bad[any_number() % 3];
    }
    gpu_gate g = {logits.data(), c.biased ? bias.data() : nullptr, GATE_ROWS,      c.n_experts, c.top_k, c.sigmoid,
                  c.renormalise, c.sigmoid ? 2.5f : 1.0f,          experts.data(), weights.data()};
    run([&] { gate_kernel(g); }, (GATE_ROWS + 3) / 4, 128);
    for (int r = 0; r < GATE_ROWS; r++) {
        if (r % 3 != 2) check_gate_row(c, g, r, score[r], id[r]);
        for (size_t s = (size_t)(r * c.top_k); r % 3 == 2 && s < (size_t)((r + 1) * c.top_k); s++)
            if (experts[s] != -1 || memcmp(&weights[s], &untouched[0], 4) != 0)
                fail("row %d is refused, but expert %d, weight %g", r, experts[s], weights[s]);
    }
}

// Scores that are equal only as floats, and all of them 0.
static void check_gate_limits()
{
    static const float logits[4][4] = {
        {-300, -200, 0, -150}, {-200, -300, -150, 0}, {30, 80, 20, 50}, {-200, -150, -99, -300}};
    static const int ids[4][3] = {{2, 0, 1}, {3, 0, 1}, {0, 1, 2}, {0, 1, 2}};
    const float third = 1 / 3.0f, want[4][3] = {{1, 0, 0}, {1, 0, 0}, {third, third, third}, {third, third, third}};
    for (int r = 0; r < 4; r++) {
        snprintf(doing, sizeof doing, "gate: scores at the limits, row %d", r);
        fenced<float> weights(3);
        fenced<int32_t> experts(3);
        gpu_gate g = {logits[r], nullptr, 1, 4, 3, r >= 2, 1, 1.0f, experts.data(), weights.data()};
        run([&] { gate_kernel(g); }, 1, 128);
        for (size_t s = 0; s < 3; s++)
            if (experts[s] != ids[r][s] || weights[s] != want[r][s])
                fail("slot %zu: expert %d, weight %g", s, experts[s], weights[s]);
    }
}

static void check_gate()
{
    static const int sizes[] = {1, 2, 7, 8, 31, 32, 33, 60, 64, 100, 128, 256, 257, 1000, 1024};
    for (int i = 0; i < 15; i++) {
        int n = sizes[i], k = std::min(n, 1 + i % 8);
        check_gate_case(gate_case{n, k, i % 2, i / 2 % 2, i % 4 == 1, 0});
        check_gate_case(gate_case{n, k, i % 2, 1 - i / 2 % 2, i % 4 == 3, 1});
    }
    check_gate_case(gate_case{128, 8, 0, 1, 0, 0});
    check_gate_case(gate_case{256, 8, 1, 1, 1, 0});
    check_gate_case(gate_case{5, 5, 1, 0, 1, 1});
    check_gate_case(gate_case{9, 9, 0, 0, 1, 0});
    check_gate_case(gate_case{40, 40, 1, 1, 0, 0}); // more than a warp writes at a time
    check_gate_limits();
}

// ---- combine ----

static void check_combine()
{
    enum { ROWS = 5, TOP_K = 4, HIDDEN = 300 };
    snprintf(doing, sizeof doing, "combine");
    fenced<float> x(ROWS * HIDDEN), y(ROWS * TOP_K * HIDDEN), w(ROWS * TOP_K);
    fenced<int32_t> place(ROWS * TOP_K);
    std::vector<float> want(ROWS * HIDDEN);
    for (size_t i = 0; i < ROWS * HIDDEN; i++)
        x[i] = normal();
    for (size_t i = 0; i < ROWS * TOP_K * HIDDEN; i++)
        y[i] = normal();
    for (size_t i = 0; i < ROWS * TOP_K; i++) { // all of row 1 are skipped, places 0 and the last are not
        const bool skipped = i / TOP_K == 1 || i % 7 == 3;
        w[i] = skipped ? NAN : normal();
        place[i] = skipped ? -1 - (int)i : ROWS * TOP_K - 1 - (int)i;
    }
    for (size_t r = 0; r < ROWS; r++)
        for (size_t i = 0; i < HIDDEN; i++) {
            float v = x[r * HIDDEN + i];
            for (size_t s = r * TOP_K; s < (r + 1) * TOP_K; s++)
                if (place[s] >= 0) v = fmaf(w[s], y[(size_t)place[s] * HIDDEN + i], v);
            want[r * HIDDEN + i] = v;
        }
    run([&] { combine_kernel(x.data(), y.data(), place.data(), w.data(), TOP_K, HIDDEN); }, (HIDDEN + 255) / 256, 256,
        ROWS);
    for (size_t i = 0; i < ROWS * HIDDEN; i++)
        if (memcmp(&x[i], &want[i], 4) != 0) fail("row %zu, %zu: %g, not %g", i / HIDDEN, i % HIDDEN, x[i], want[i]);
}

// Other data and other orders of the threads each time.
static void check(const char *what, void (*one_round)())
{
    for (int i = 0; i < ROUNDS; i++)
        one_round();
    printf("%s\n", what);
}

int main()
{
    setvbuf(stdout, nullptr, _IOLBF, 0);
    watch_faults();
    check("rows: as plain loops", check_rows);
    check("list: as on the host", check_lists);
    check("pack: the bytes of the host", check_pack);
    check("gate: the experts of plain loops", check_gate);
    check("combine: the bits of plain loops", check_combine);
    return 0;
}
