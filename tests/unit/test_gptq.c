/*
 * GPTQ matrices: the conversion against a plain loop over bits, its inverse, the values it stands
 * for, packing and products of its rows on every instruction set, a stack loaded through the device
 * contract; and every checkpoint that is not what is computed with, refused by name.
 */
#include <math.h>
#include "kernels/compute.h"
#include "kernels/kernels.h"
#include "model/hf.h"
#include "tests/st_build.h"
#include "tests/test.h"

enum { SEED = 20 };

static bool says(const ep_err *err, const char *part)
{
    if (strstr(err->text, part) != NULL) return true;
    printf("    \"%s\" does not say \"%s\"\n", err->text, part);
    return false;
}

/* A half as the IEEE standard defines it, for finite values. */
static double half_value(uint16_t h)
{
    int e = h >> 10 & 31, m = h & 1023;
    double v = e == 0 ? ldexp(m, -24) : ldexp(1024 + m, e - 25);
    return h & 0x8000 ? -v : v;
}

static uint16_t half_at(const uint8_t *p, size_t i)
{
    return (uint16_t)(p[2 * i] | p[2 * i + 1] << 8);
}

/* Code of weight (k, n): nibble k % 8 of word (k / 8, n). */
static int code_at(const uint8_t *qweight, int n_columns, int k, int n)
{
    const uint8_t *p = qweight + ((size_t)(k / 8) * (size_t)n_columns + (size_t)n) * 4;
    uint32_t w = p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
    return (int)(w >> 4 * (k % 8) & 15);
}

static double weight_at(const uint8_t *qweight, const uint8_t *scales, int n_columns, int k, int n)
{
    size_t g = (size_t)(k / 128) * (size_t)n_columns + (size_t)n;
    return half_value(half_at(scales, g)) * (code_at(qweight, n_columns, k, n) - 8);
}

typedef struct sample {
    int n, k;
    uint8_t *qweight, *scales, *rows;
    size_t qweight_bytes, scale_bytes, row_bytes;
} sample;

static sample make_sample(int n, int k, uint64_t seed)
{
    sample s = {.n = n, .k = k};
    s.qweight_bytes = (size_t)n * (size_t)k / 2;
    s.scale_bytes = (size_t)n * (size_t)(k / 128) * 2;
    s.row_bytes = (size_t)n * kern_type_row_bytes(KERN_GPTQ4, k);
    s.qweight = ep_alloc(s.qweight_bytes + 1);
    s.scales = ep_alloc(s.scale_bytes);
    s.rows = ep_calloc(s.row_bytes, 1);
    if (s.qweight == NULL || s.scales == NULL || s.rows == NULL) exit(1);
    for (size_t i = 0; i < s.qweight_bytes; i++)
        s.qweight[i] = (uint8_t)gx_random(&seed);
    for (size_t i = 0; i < s.scale_bytes; i += 2) {
        uint64_t x = gx_random(&seed);
        uint16_t h = (uint16_t)((x & 0x83ff) | (7 + (x >> 16) % 3) << 10);
        s.scales[i] = (uint8_t)h;
        s.scales[i + 1] = (uint8_t)(h >> 8);
    }
    return s;
}

static void free_sample(sample *s)
{
    ep_free(s->qweight);
    ep_free(s->scales);
    ep_free(s->rows);
}

/* Multiples and edges of the tile of columns, few and many groups. */
static const int shapes[][2] = {{1, 128},   {8, 128},   {15, 256},  {16, 128},  {17, 384},
                                {64, 1024}, {100, 256}, {128, 128}, {768, 256}, {40, 2048}};
enum { N_SHAPES = sizeof(shapes) / sizeof(shapes[0]) };

static void test_conversion(void)
{
    printf("    seed %d\n", SEED);
    for (int i = 0; i < N_SHAPES; i++) {
        sample s = make_sample(shapes[i][0], shapes[i][1], (uint64_t)(SEED + i));
        int bad_codes = 0, bad_scales = 0;
        gptq_rows_from_words(s.n, s.k, s.qweight, s.scales, s.rows);
        for (int n = 0; n < s.n; n++) {
            for (int k = 0; k < s.k; k++) {
                const uint8_t *block =
                    s.rows + ((size_t)n * (size_t)(s.k / 128) + (size_t)(k / 128)) * 66;
                int byte = block[2 + k % 128 / 2], code = k % 2 ? byte >> 4 : byte & 15;
                bad_codes += code != code_at(s.qweight, s.n, k, n);
                bad_scales += half_at(block, 0) !=
                              half_at(s.scales, (size_t)(k / 128) * (size_t)s.n + (size_t)n);
            }
        }
        CHECK_INT(bad_codes, 0);
        CHECK_INT(bad_scales, 0);
        free_sample(&s);
    }
}

/* There and back, from both sides, and from odd addresses. */
static void test_inverse(void)
{
    for (int i = 0; i < N_SHAPES; i++) {
        sample s = make_sample(shapes[i][0], shapes[i][1], (uint64_t)(SEED + 100 + i));
        uint8_t *words = ep_calloc(s.qweight_bytes, 1), *halves = ep_calloc(s.scale_bytes, 1);
        uint8_t *rows = ep_calloc(s.row_bytes, 1);
        if (words == NULL || halves == NULL || rows == NULL) exit(1);
        gptq_rows_from_words(s.n, s.k, s.qweight, s.scales, s.rows);
        gptq_rows_to_words(s.n, s.k, s.rows, words, halves);
        CHECK(memcmp(words, s.qweight, s.qweight_bytes) == 0);
        CHECK(memcmp(halves, s.scales, s.scale_bytes) == 0);
        memmove(s.qweight + 1, s.qweight, s.qweight_bytes);
        gptq_rows_from_words(s.n, s.k, s.qweight + 1, s.scales, rows);
        CHECK(memcmp(rows, s.rows, s.row_bytes) == 0);
        ep_free(words);
        ep_free(halves);
        ep_free(rows);
        free_sample(&s);
    }
}

/* A row's floats are s * (q - 8), to the bit: the product of an 11-bit and a 4-bit number. */
static void test_values(void)
{
    for (int i = 0; i < N_SHAPES; i++) {
        sample s = make_sample(shapes[i][0], shapes[i][1], (uint64_t)(SEED + 200 + i));
        float *row = ep_alloc((size_t)s.k * sizeof(*row));
        int wrong = 0;
        if (row == NULL) exit(1);
        gptq_rows_from_words(s.n, s.k, s.qweight, s.scales, s.rows);
        for (int n = 0; n < s.n; n++) {
            kern_dequant_row(KERN_GPTQ4, s.rows + (size_t)n * (s.row_bytes / (size_t)s.n), row,
                             s.k);
            for (int k = 0; k < s.k; k++)
                wrong += (double)row[k] != weight_at(s.qweight, s.scales, s.n, k, n);
        }
        CHECK_INT(wrong, 0);
        ep_free(row);
        free_sample(&s);
    }
}

static void test_packing(void)
{
    for (int i = 0; i < N_SHAPES; i++) {
        sample s = make_sample(shapes[i][0], shapes[i][1], (uint64_t)(SEED + 300 + i));
        uint8_t *packed = ep_alloc(kern_packed_bytes(KERN_GPTQ4, s.n, s.k));
        uint8_t *back = ep_calloc(s.row_bytes, 1);
        if (packed == NULL || back == NULL) exit(1);
        gptq_rows_from_words(s.n, s.k, s.qweight, s.scales, s.rows);
        kern_pack(KERN_GPTQ4, s.n, s.k, s.rows, packed);
        kern_unpack(KERN_GPTQ4, s.n, s.k, packed, back);
        CHECK(memcmp(back, s.rows, s.row_bytes) == 0);
        ep_free(packed);
        ep_free(back);
        free_sample(&s);
    }
}

/* Activations that int8 holds exactly: whole numbers, the largest of each group 127. */
static void whole_numbers(float *x, size_t n, uint64_t seed)
{
    for (size_t i = 0; i < n; i++)
        x[i] = i % 128 == 5 ? 127.0f : (float)((int)(gx_random(&seed) % 255) - 127);
}

static void check_product(const sample *s, const char *level)
{
    enum { ROWS = 5 };
    size_t k = (size_t)s->k, n = (size_t)s->n;
    uint8_t *packed = ep_alloc(kern_packed_bytes(KERN_GPTQ4, s->n, s->k));
    void *scratch = ep_alloc(kern_linear_scratch_bytes(KERN_GPTQ4, s->n, s->k, ROWS, 1));
    float *x = ep_alloc(ROWS * k * sizeof(float)), *y = ep_alloc(ROWS * n * sizeof(float));
    double worst = 0;
    if (packed == NULL || scratch == NULL || x == NULL || y == NULL) exit(1);
    whole_numbers(x, ROWS * k, SEED + 400);
    kern_pack(KERN_GPTQ4, s->n, s->k, s->rows, packed);
    kern_matrix w = {.type = KERN_GPTQ4, .n = s->n, .k = s->k, .data = packed};
    kern_linear(NULL, &w, x, k, ROWS, y, n, scratch);
    for (size_t r = 0; r < ROWS; r++) {
        for (size_t c = 0; c < n; c++) {
            double sum = 0, size = 0;
            for (size_t i = 0; i < k; i++) {
                double term =
                    weight_at(s->qweight, s->scales, s->n, (int)i, (int)c) * (double)x[r * k + i];
                sum += term;
                size += fabs(term);
            }
            double error = fabs((double)y[r * n + c] - sum) / size;
            if (!(error <= worst)) worst = error;
        }
    }
    if (!(worst <= 1e-6)) printf("    %s, %d x %d: error %g\n", level, s->n, s->k, worst);
    CHECK(worst <= 1e-6);
    ep_free(packed);
    ep_free(scratch);
    ep_free(x);
    ep_free(y);
}

static void test_products(void)
{
    static const char *const levels[] = {"scalar", "avx2", "avx512", "amx"};
    static const int of[] = {3, 5, 7, 9};
    int seen = 0;
    for (int l = 0; l < 4; l++) {
        if (!kern_has_level(levels[l]) || kern_select(levels[l], NULL) != EP_OK) continue;
        seen++;
        for (int i = 0; i < 4; i++) {
            sample s = make_sample(shapes[of[i]][0], shapes[of[i]][1], (uint64_t)(SEED + 500 + i));
            gptq_rows_from_words(s.n, s.k, s.qweight, s.scales, s.rows);
            check_product(&s, levels[l]);
            free_sample(&s);
        }
    }
    CHECK(seen > 0);
    CHECK_INT(kern_select("auto", NULL), EP_OK);
}

/* ---- a checkpoint ---- */

typedef struct checkpoint {
    ep_buf parts[2], index;
    st_bytes bytes[2], index_bytes, texts[HF_N_TEXTS];
} checkpoint;

static void make_checkpoint(checkpoint *c, const gx_recipe *r)
{
    memset(c, 0, sizeof(*c));
    gx_make(r, c->parts, &c->index);
    c->bytes[0] = (st_bytes){GX_PART_0, c->parts[0].data, c->parts[0].len};
    c->bytes[1] = (st_bytes){GX_PART_1, c->parts[1].data, c->parts[1].len};
    c->index_bytes = (st_bytes){GX_INDEX, c->index.data, c->index.len};
}

static void free_checkpoint(checkpoint *c)
{
    ep_buf_fini(&c->parts[0]);
    ep_buf_fini(&c->parts[1]);
    ep_buf_fini(&c->index);
}

static ep_status open_checkpoint(model **out, checkpoint *c, const char *config,
                                 const char *quantize, ep_err *err)
{
    st_file *f = NULL;
    c->texts[HF_CONFIG] = (st_bytes){"config.json", config, strlen(config)};
    c->texts[HF_QUANTIZE] = (st_bytes){"quantize_config.json", quantize, 0};
    if (quantize != NULL) c->texts[HF_QUANTIZE].size = strlen(quantize);
    ep_status s = st_open_bytes(&f, c->bytes, 2, &c->index_bytes, err);
    return s == EP_OK ? hf_open_file(out, f, c->texts, err) : s;
}

/* The rows of a matrix against those of its own tensors. */
static void check_matrix(const model *m, const model_tensor *t, int i, const char *prefix)
{
    char name[128];
    snprintf(name, sizeof(name), "%s.qweight", prefix);
    const st_tensor *q = st_find(hf_file(m->folder), name);
    snprintf(name, sizeof(name), "%s.scales", prefix);
    const st_tensor *s = st_find(hf_file(m->folder), name);
    size_t bytes = model_rows_bytes(t);
    uint8_t *want = ep_calloc(bytes, 1);
    const uint8_t *rows = NULL;
    ep_buf made = {0};
    ep_err err = {{0}};
    if (want == NULL || q == NULL || s == NULL) exit(1);
    CHECK_INT(t->type, KERN_GPTQ4);
    CHECK_INT(bytes, q->bytes + s->bytes);
    CHECK_INT(model_rows(m, t, i, &made, &rows, &err), EP_OK);
    if (err.text[0]) printf("    %s\n", err.text);
    gptq_rows_from_words((int)q->dim[1], (int)q->dim[0] * 8, q->data, s->data, want);
    CHECK(rows != NULL && memcmp(rows, want, bytes) == 0);
    model_forget(m, t, i);
    ep_buf_fini(&made);
    ep_free(want);
}

/* Every matrix that is quantised. */
static void check_matrices(const model *m)
{
    static const char *const roles[] = {"gate_proj", "up_proj", "down_proj"};
    char prefix[96];
    for (int l = 0; l < m->shape.n_layers; l++) {
        snprintf(prefix, sizeof(prefix), "model.layers.%d.self_attn.v_proj", l);
        check_matrix(m, m->layers[l].v, 0, prefix);
        for (int e = 0; e < m->shape.n_experts * 3; e++) {
            snprintf(prefix, sizeof(prefix), "model.layers.%d.mlp.experts.%d.%s", l, e / 3,
                     roles[e % 3]);
            check_matrix(m, model_experts(m, l, e % 3), e / 3, prefix);
        }
    }
    CHECK_INT(hf_check(m, m->shape.n_layers, NULL), EP_OK);
}

#define CONFIG "{" GX_CONFIG ",\"quantization_config\":{" GX_QUANT "}}"

static void test_checkpoints(void)
{
    static const struct {
        gx_recipe recipe;
        const char *config, *quantize;
    } cases[] = {
        {{.seed = 1}, CONFIG, NULL},
        {{.seed = 2, .g_idx = true}, CONFIG, NULL},
        {{.seed = 3, .bias = true, .g_idx = true}, CONFIG, "{" GX_QUANT "}"},
        {{.seed = 4}, "{" GX_CONFIG "}", "{\"bits\":4,\"group_size\":128}"},
        {{.seed = 5, .v2 = true},
         "{" GX_CONFIG ",\"quantization_config\":{" GX_QUANT ",\"checkpoint_format\":\"gptq_v2\"}}",
         NULL},
        /* desc_act, but the order is the file's all the same. */
        {{.seed = 6, .g_idx = true},
         "{" GX_CONFIG ",\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,"
         "\"group_size\":128,\"desc_act\":true,\"dynamic\":{\"-:.*gate$\":{}},\"damp_percent\":0.1}"
         "}",
         NULL},
        {{.seed = 7, .drop = "lm_head.weight"},
         "{" GX_CONFIG ",\"tie_word_embeddings\":true,\"quantization_config\":{" GX_QUANT
         ",\"dynamic\":null}}",
         NULL},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        checkpoint c;
        model *m = NULL;
        ep_err err = {{0}};
        make_checkpoint(&c, &cases[i].recipe);
        CHECK_INT(open_checkpoint(&m, &c, cases[i].config, cases[i].quantize, &err), EP_OK);
        if (m == NULL) printf("    case %zu: %s\n", i, err.text);
        if (m != NULL) check_matrices(m);
        model_close(m);
        free_checkpoint(&c);
    }
}

/* ---- refusals by configuration ---- */

#define WITH_QUANT(q) "{" GX_CONFIG ",\"quantization_config\":{" q "}}"

static const struct {
    const char *config, *quantize;
    ep_status status;
    const char *words;
} configs[] = {
    {"", NULL, EP_ERR_INVALID, "config.json: line 1"},
    {"[]", NULL, EP_ERR_INVALID, "no object"},
    {"{}", NULL, EP_ERR_UNSUPPORTED, "model_type (none)"},
    {"{\"model_type\":\"mixtral\"}", NULL, EP_ERR_UNSUPPORTED,
     "model_type mixtral is not implemented"},
    {"{\"model_type\":7}", NULL, EP_ERR_INVALID, "model_type is no text"},
    {"{" GX_CONFIG "}", NULL, EP_ERR_INVALID, "but no quantization_config"},
    {"{" GX_CONFIG ",\"quantization_config\":[]}", NULL, EP_ERR_INVALID, "is no object"},
    {"{" GX_CONFIG "}", "[]", EP_ERR_INVALID, "quantize_config.json: it is no object"},
    {"{" GX_CONFIG "}", "{", EP_ERR_INVALID, "quantize_config.json: line 1"},
    {WITH_QUANT("\"quant_method\":\"awq\",\"bits\":4,\"group_size\":128"), NULL, EP_ERR_UNSUPPORTED,
     "quant_method awq is not implemented"},
    {WITH_QUANT("\"quant_method\":\"fp8\""), NULL, EP_ERR_UNSUPPORTED, "quant_method fp8"},
    {WITH_QUANT("\"quant_method\":\"gptq\",\"group_size\":128"), NULL, EP_ERR_UNSUPPORTED,
     "bits 0"},
    {WITH_QUANT("\"bits\":8,\"group_size\":128"), NULL, EP_ERR_UNSUPPORTED,
     "bits 8 is not implemented"},
    {WITH_QUANT("\"bits\":3,\"group_size\":128"), NULL, EP_ERR_UNSUPPORTED,
     "bits 3 is not implemented"},
    {WITH_QUANT("\"bits\":\"4\",\"group_size\":128"), NULL, EP_ERR_INVALID,
     "bits is no whole number"},
    {WITH_QUANT("\"bits\":4"), NULL, EP_ERR_UNSUPPORTED, "group_size 0"},
    {WITH_QUANT("\"bits\":4,\"group_size\":-1"), NULL, EP_ERR_UNSUPPORTED,
     "group_size -1 (one scale for a whole column)"},
    {WITH_QUANT("\"bits\":4,\"group_size\":64"), NULL, EP_ERR_UNSUPPORTED, "group_size 64"},
    {WITH_QUANT("\"bits\":4,\"group_size\":128,\"sym\":false"), NULL, EP_ERR_UNSUPPORTED,
     "sym false"},
    {WITH_QUANT("\"bits\":4,\"group_size\":128,\"sym\":1"), NULL, EP_ERR_INVALID, "sym is neither"},
    {WITH_QUANT("\"bits\":4,\"group_size\":128,\"desc_act\":true"), NULL, EP_ERR_UNSUPPORTED,
     "g_idx is missing: desc_act is true"},
    {WITH_QUANT(GX_QUANT ",\"checkpoint_format\":\"marlin\""), NULL, EP_ERR_UNSUPPORTED,
     "checkpoint_format marlin"},
    {WITH_QUANT(GX_QUANT ",\"format\":\"bitblas\""), NULL, EP_ERR_UNSUPPORTED, "format bitblas"},
    {WITH_QUANT(GX_QUANT ",\"is_marlin_format\":true"), NULL, EP_ERR_UNSUPPORTED,
     "is_marlin_format"},
    {WITH_QUANT(GX_QUANT ",\"pack_dtype\":\"int64\""), NULL, EP_ERR_UNSUPPORTED,
     "pack_dtype int64"},
    {WITH_QUANT(GX_QUANT ",\"dynamic\":{\"+:.*down.*\":{\"bits\":8}}"), NULL, EP_ERR_UNSUPPORTED,
     "dynamic rule +:.*down.*"},
    {CONFIG, "{\"bits\":8,\"group_size\":128}", EP_ERR_UNSUPPORTED, "bits 8"},
    {CONFIG, "{\"bits\":4,\"group_size\":128,\"desc_act\":true}", EP_ERR_INVALID,
     "disagrees with config.json on desc_act"},
    {CONFIG, "{" GX_QUANT ",\"checkpoint_format\":\"gptq_v2\"}", EP_ERR_INVALID,
     "disagrees with config.json on checkpoint_format"},
};

static void test_configs(void)
{
    gx_recipe good = {.seed = 9};
    checkpoint c;
    make_checkpoint(&c, &good);
    for (size_t i = 0; i < sizeof(configs) / sizeof(configs[0]); i++) {
        model *m = NULL;
        ep_err err = {{0}};
        ep_status s = open_checkpoint(&m, &c, configs[i].config, configs[i].quantize, &err);
        CHECK_INT(s, configs[i].status);
        CHECK(says(&err, configs[i].words));
        if (s != configs[i].status) printf("    of %s: %s\n", configs[i].config, err.text);
        model_close(m);
    }
    free_checkpoint(&c);
}

/* ---- refusals by tensors ---- */

#define E0 "model.layers.0.mlp.experts.0."
#define E2 "model.layers.1.mlp.experts.2."

static const struct {
    gx_recipe recipe;
    bool at_read; /* open succeeds; reading that expert does not */
    ep_status status;
    const char *words;
} checkpoints[] = {
    {{.drop = E2 "up_proj.qweight"}, false, EP_ERR_INVALID, "up_proj.qweight are both missing"},
    {{.drop = E2 "up_proj.scales"}, false, EP_ERR_INVALID, "up_proj.scales is missing"},
    {{.drop = E2 "down_proj.qzeros"}, false, EP_ERR_INVALID, "down_proj.qzeros is missing"},
    {{.drop = "model.layers.1.mlp.gate.weight"},
     false,
     EP_ERR_INVALID,
     "mlp.gate.weight is missing"},
    {{.drop = "model.layers.1.self_attn.q_proj.weight"},
     false,
     EP_ERR_INVALID,
     "q_proj.qweight are both missing"},
    {{.drop = "model.norm.weight"}, false, EP_ERR_INVALID, "model.norm.weight is missing"},
    {{.drop = "lm_head.weight"},
     false,
     EP_ERR_INVALID,
     "lm_head.weight and lm_head.qweight are both missing"},
    {{.retype = "model.layers.1.mlp.gate.weight", .type = "I32"},
     false,
     EP_ERR_INVALID,
     "is I32 [3, 256], expected floats [3, 256]"},
    {{.retype = "model.norm.weight", .type = "I32"},
     false,
     EP_ERR_INVALID,
     "expected floats [256]"},
    {{.retype = E2 "up_proj.scales", .type = "BF16"},
     false,
     EP_ERR_INVALID,
     "is BF16 [2, 128], expected F16 [2, 128]"},
    {{.retype = E2 "up_proj.qweight", .type = "F32"},
     false,
     EP_ERR_INVALID,
     "expected I32 [32, 128]"},
    {{.reshape = E2 "gate_proj.qweight", .shape = {256, 16}},
     false,
     EP_ERR_UNSUPPORTED,
     "the AWQ layout"},
    {{.reshape = E2 "gate_proj.qweight", .shape = {128, 32}},
     false,
     EP_ERR_UNSUPPORTED,
     "transposed"},
    {{.reshape = E2 "gate_proj.qweight", .shape = {64, 128}},
     false,
     EP_ERR_UNSUPPORTED,
     "width of 8 bits"},
    {{.reshape = E2 "gate_proj.qweight", .shape = {24, 128}},
     false,
     EP_ERR_UNSUPPORTED,
     "width of 3 bits"},
    {{.reshape = E2 "gate_proj.qweight", .shape = {16, 128}},
     false,
     EP_ERR_UNSUPPORTED,
     "width of 2 bits"},
    {{.reshape = E2 "gate_proj.qweight", .shape = {32, 136}},
     false,
     EP_ERR_INVALID,
     "expected I32 [32, 128]"},
    {{.reshape = E2 "gate_proj.qweight", .shape = {4096, 0}},
     false,
     EP_ERR_INVALID,
     "expected I32 [32, 128]"},
    {{.reshape = E2 "gate_proj.scales", .shape = {4, 128}},
     false,
     EP_ERR_INVALID,
     "expected F16 [2, 128]"},
    {{.reshape = E2 "gate_proj.scales", .shape = {1, 128}},
     false,
     EP_ERR_INVALID,
     "expected F16 [2, 128]"},
    {{.reshape = E2 "gate_proj.qzeros", .shape = {2, 128}},
     false,
     EP_ERR_INVALID,
     "expected I32 [2, 16]"},
    {{.extra = E2 "up_proj.g_idx"}, false, EP_ERR_INVALID, "one index for each input"},
    {{.g_idx = true, .reshape = E2 "up_proj.g_idx", .shape = {2, 128}},
     false,
     EP_ERR_INVALID,
     "one index"},
    {{.bias = true, .reshape = E2 "up_proj.bias", .shape = {64, 0}},
     false,
     EP_ERR_INVALID,
     "one value"},
    {{.extra = E0 "up_proj.weight"}, false, EP_ERR_INVALID, "up_proj.qweight are both there"},
    {{.rename = E2 "up_proj.qweight", .to = E2 "up_proj.weight"},
     false,
     EP_ERR_INVALID,
     "00002-of-00002.safetensors: tensor " E2 "up_proj.weight is I32 [32, 128], expected floats "
     "[128, 256]"},
    {{.extra = E0 "up_proj.weight_packed"}, false, EP_ERR_UNSUPPORTED, "compressed-tensors"},
    {{.extra = "model.layers.0.self_attn.q_proj.bias"},
     false,
     EP_ERR_UNSUPPORTED,
     "00002-of-00002.safetensors: tensor model.layers.0.self_attn.q_proj.bias beside "
     "model.layers.0.self_attn.q_proj.weight: a bias"},
    {{.extra = "model.layers.0.self_attn.rotary_emb.inv_freq"}, true, EP_OK, ""}, /* not used */
    {{.extra = E0 "up_proj.perm"}, false, EP_ERR_UNSUPPORTED, "an unknown part of a matrix"},
    {{.extra = E0 "up_projection.qweight"}, false, EP_ERR_UNSUPPORTED, "an unknown matrix"},
    {{.extra = E0 "w1.qweight"}, false, EP_ERR_UNSUPPORTED, "an unknown matrix of an expert"},
    {{.extra = "model.layers.0.mlp.experts.gate_up_proj.qweight"},
     false,
     EP_ERR_UNSUPPORTED,
     "fused into one"},
    {{.extra = "model.layers.0.mlp.experts.01.up_proj.qweight"},
     false,
     EP_ERR_UNSUPPORTED,
     "fused into one"},
    {{.extra = "model.layers.0.mlp.shared_expert.up_proj.qweight"},
     false,
     EP_ERR_UNSUPPORTED,
     "shared expert"},
    {{.extra = "model.layers.0.mlp.experts.3.up_proj.qweight"},
     false,
     EP_ERR_INVALID,
     "num_experts 3 rules out"},
    {{.extra = "model.layers.0.mlp.experts.99999999999.up_proj.qweight"},
     false,
     EP_ERR_INVALID,
     "num_experts 3 rules out"},
    {{.extra = "model.layers.2.input_layernorm.weight"},
     false,
     EP_ERR_INVALID,
     "num_hidden_layers 2 rules out"},
    {{.damage = E2 "up_proj.qzeros", .at = 7, .with = 0x10},
     true,
     EP_ERR_UNSUPPORTED,
     "up_proj.qzeros, element 1: asymmetric zero points (other than 0x77777777)"},
    {{.v2 = true}, false, EP_ERR_UNSUPPORTED, "other than 0x77777777"},
    {{.g_idx = true, .damage = E2 "up_proj.g_idx", .at = 128 * 4, .with = 1},
     true,
     EP_ERR_UNSUPPORTED,
     "element 128: weights ordered by activation (desc_act)"},
    {{.g_idx = true, .damage = E2 "up_proj.g_idx", .at = 3, .with = 0x80},
     true,
     EP_ERR_UNSUPPORTED,
     "element 0"},
    {{.bias = true, .damage = E2 "up_proj.bias", .at = 10, .with = 1},
     true,
     EP_ERR_UNSUPPORTED,
     "element 5: a bias"},
    {{.damage = E2 "up_proj.scales", .at = 5, .with = 0}, true, EP_OK, ""},
};

static void test_tensors(void)
{
    for (size_t i = 0; i < sizeof(checkpoints) / sizeof(checkpoints[0]); i++) {
        gx_recipe r = checkpoints[i].recipe;
        checkpoint c;
        model *m = NULL;
        ep_err err = {{0}};
        r.seed = i;
        make_checkpoint(&c, &r);
        ep_status s = open_checkpoint(&m, &c, CONFIG, NULL, &err);
        if (checkpoints[i].at_read) {
            CHECK_INT(s, EP_OK);
            if (m != NULL) {
                const model_tensor *t = model_experts(m, 1, 1);
                const uint8_t *rows;
                ep_buf made = {0};
                s = model_rows(m, t, 2, &made, &rows, &err);
                /* The others are as they were. */
                CHECK_INT(model_rows(m, t, 1, &made, &rows, NULL), EP_OK);
                ep_buf_fini(&made);
            }
        }
        CHECK_INT(s, checkpoints[i].status);
        CHECK(says(&err, checkpoints[i].words));
        model_close(m);
        free_checkpoint(&c);
    }
}

/* Infinite and undefined scales; the largest finite one and both zeros pass. */
static void test_scales(void)
{
    static const struct {
        uint16_t half;
        ep_status status;
    } cases[] = {{0x7c00, EP_ERR_INVALID}, {0xfc00, EP_ERR_INVALID}, {0x7e01, EP_ERR_INVALID},
                 {0x7bff, EP_OK},          {0x0000, EP_OK},          {0x8000, EP_OK},
                 {0x0001, EP_OK}};
    gx_recipe good = {.seed = 11};
    checkpoint c;
    model *m = NULL;
    make_checkpoint(&c, &good);
    CHECK_INT(open_checkpoint(&m, &c, CONFIG, NULL, NULL), EP_OK);
    if (m == NULL) return;
    uint8_t *scales =
        (uint8_t *)(uintptr_t)st_find(hf_file(m->folder), E2 "down_proj.scales")->data;
    const uint8_t *rows;
    ep_buf made = {0};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        ep_err err = {{0}};
        scales[20] = (uint8_t)cases[i].half;
        scales[21] = (uint8_t)(cases[i].half >> 8);
        CHECK_INT(model_rows(m, model_experts(m, 1, 2), 2, &made, &rows, &err), cases[i].status);
        if (cases[i].status != EP_OK) CHECK(says(&err, "element 10: the scale is not finite"));
    }
    ep_buf_fini(&made);
    model_close(m);
    free_checkpoint(&c);
}

/* ---- through the device contract ---- */

/* y = W x in double, straight from the checkpoint's words. */
static void plain_product(const model *m, int expert, const char *role, int n, int k,
                          const double *x, double *y)
{
    char name[128];
    size_t at =
        (size_t)snprintf(name, sizeof(name), "model.layers.1.mlp.experts.%d.%s.", expert, role);
    strcpy(name + at, "qweight");
    const uint8_t *q = st_find(hf_file(m->folder), name)->data;
    strcpy(name + at, "scales");
    const uint8_t *s = st_find(hf_file(m->folder), name)->data;
    for (int r = 0; r < n; r++) {
        y[r] = 0;
        for (int i = 0; i < k; i++)
            y[r] += weight_at(q, s, n, i, r) * x[i];
    }
}

static void plain_expert(const model *m, int expert, const float *x, double *y)
{
    static double in[GX_HIDDEN], gate[GX_INTER], up[GX_INTER];
    for (int i = 0; i < GX_HIDDEN; i++)
        in[i] = (double)x[i];
    plain_product(m, expert, "gate_proj", GX_INTER, GX_HIDDEN, in, gate);
    plain_product(m, expert, "up_proj", GX_INTER, GX_HIDDEN, in, up);
    for (int i = 0; i < GX_INTER; i++)
        up[i] *= gate[i] / (1 + exp(-gate[i]));
    plain_product(m, expert, "down_proj", GX_HIDDEN, GX_INTER, up, y);
}

static void load_stack(const model *m, compute_stack *s)
{
    for (int e = 0; e < GX_EXPERTS; e++) {
        const uint8_t *rows[3];
        ep_buf made[3] = {{0}};
        uint64_t sum = 0;
        for (int role = 0; role < 3; role++)
            CHECK_INT(model_rows(m, model_experts(m, 1, role), e, &made[role], &rows[role], NULL),
                      EP_OK);
        CHECK_INT(compute_cpu.stack_load(s, e, rows[0], rows[1], rows[2], &sum), EP_OK);
        CHECK(sum == compute_cpu.stack_checksum(s, e));
        for (int role = 0; role < 3; role++)
            ep_buf_fini(&made[role]);
    }
}

static void test_stack(void)
{
    gx_recipe good = {.seed = 12};
    checkpoint c;
    model *m = NULL;
    compute *dev = NULL;
    compute_stack *s = NULL;
    ep_err err = {{0}};
    static float x[2 * GX_HIDDEN], out[3 * GX_HIDDEN];
    CHECK_INT(kern_select("auto", NULL), EP_OK);
    make_checkpoint(&c, &good);
    CHECK_INT(open_checkpoint(&m, &c, CONFIG, NULL, &err), EP_OK);
    CHECK_INT(compute_cpu.open(&dev, "cpu", 1, &err), EP_OK);
    compute_shape shape = {.gate_type = KERN_GPTQ4,
                           .up_type = KERN_GPTQ4,
                           .down_type = KERN_GPTQ4,
                           .hidden = GX_HIDDEN,
                           .inter = GX_INTER,
                           .n_experts = GX_EXPERTS};
    if (m == NULL || dev == NULL) return;
    CHECK_INT(compute_cpu.stack_open(dev, &shape, &s, &err), EP_OK);
    if (s == NULL) return;
    load_stack(m, s);
    CHECK_INT(compute_cpu.reserve(dev, 2, 3), EP_OK);
    whole_numbers(x, 2 * GX_HIDDEN, SEED + 600);
    for (int i = 0; i < 2 * GX_HIDDEN; i++)
        x[i] /= 64; /* a power of two: still exact in int8 with a scale */
    static const int32_t offset[] = {0, 1, 2, 3}, row[] = {0, 0, 1}, place[] = {0, 1, 2};
    compute_ffn_args a = {.rows = x,
                          .act = KERN_ACT_F32,
                          .n_rows = 2,
                          .n_pairs = 3,
                          .expert_offset = offset,
                          .pair_row = row,
                          .pair_out = place,
                          .out = out};
    CHECK_INT(compute_ffn(&compute_cpu, dev, s, &a), EP_OK);
    for (int p = 0; p < 3; p++) {
        static double want[GX_HIDDEN];
        double error = 0, size = 0;
        plain_expert(m, p, x + row[p] * GX_HIDDEN, want);
        for (int i = 0; i < GX_HIDDEN; i++) {
            double d = (double)out[p * GX_HIDDEN + i] - want[i];
            error += d * d;
            size += want[i] * want[i];
        }
        /* What is left is the int8 rounding between the two products. */
        printf("    expert %d: relative error %.2e\n", p, sqrt(error / size));
        CHECK(size > 0 && sqrt(error / size) < 0.02);
    }
    compute_cpu.stack_close(s);
    compute_cpu.close(dev);
    model_close(m);
    free_checkpoint(&c);
}

/* Each allocation fails once. */
static void test_memory(void)
{
    gx_recipe good = {.seed = 13, .g_idx = true};
    checkpoint c;
    ep_status s = EP_ERR_NOMEM;
    int n = 0;
    make_checkpoint(&c, &good);
    for (; s != EP_OK && n < 100; n++) {
        model *m = NULL;
        ep_alloc_fail_at(n + 1);
        s = open_checkpoint(&m, &c, CONFIG, NULL, NULL);
        ep_alloc_fail_at(0);
        CHECK(s == EP_OK || s == EP_ERR_NOMEM);
        model_close(m);
    }
    CHECK(s == EP_OK && n > 8);
    free_checkpoint(&c);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"conversion", test_conversion}, {"inverse", test_inverse},
        {"values", test_values},         {"packing", test_packing},
        {"products", test_products},     {"checkpoints", test_checkpoints},
        {"configs", test_configs},       {"tensors", test_tensors},
        {"scales", test_scales},         {"stack", test_stack},
        {"memory", test_memory},
    };
    if (kern_select("auto", NULL) != EP_OK) return 1;
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
