/*
 * The GGUF container: what a right file gives, and that each way of being wrong is refused with the
 * status and the words that belong to it. Beyond the single cases: a file cut at every length is
 * refused, and a file with any byte changed is refused or read without harm (sanitizers watch).
 */
#include "model/file.h"
#include "tests/test.h"
#include "tests/unit/gguf_build.h"

#include <float.h>
#include <math.h>

/* A file with a key of every kind, arrays, and four tensors. */
static gb sample(void)
{
    gb g = gb_make();
    static const char *const names[] = {"u8", "i8", "u16", "i16", "u32", "i32",
                                        "",   "",   "",    "",    "u64", "i64"};
    gb_str(&g, "general.architecture", "none");
    for (uint32_t kind = 0; kind < 12; kind++)
        if (names[kind][0] != '\0') gb_key_int(&g, names[kind], kind, 100 + kind);
    gb_key_int(&g, "minus", 5, (uint64_t)-7);
    gb_key_int(&g, "most negative", 11, (uint64_t)1 << 63);
    gb_key_int(&g, "largest", 10, UINT64_MAX);
    gb_f32(&g, "f32", 0.5f);
    gb_f32(&g, "nan", NAN);
    double d = 1e300;
    uint64_t bits;
    memcpy(&bits, &d, 8);
    gb_key_int(&g, "f64", 12, bits);
    gb_key_int(&g, "true", 7, 1);
    gb_key_int(&g, "false", 7, 0);
    gb_key_int(&g, "maybe", 7, 2);
    gb_str(&g, "text", "four \"quoted\" \\ \xff\x01 words");
    gb_arr(&g, "strings", 8, 40);
    for (int i = 0; i < 40; i++) {
        char s[40];
        memset(s, 'a' + i % 26, sizeof(s));
        gb_text(&g.keys, s, (size_t)i);
    }
    gb_arr(&g, "numbers", 3, 3);
    for (int i = -1; i < 2; i++)
        gb_int(&g.keys, (uint64_t)i, 2);
    gb_arr(&g, "wide", 10, 2);
    gb_int(&g.keys, 1, 8);
    gb_int(&g.keys, UINT64_MAX, 8);
    gb_arr(&g, "wide signed", 11, 1);
    gb_int(&g.keys, (uint64_t)1 << 63, 8);
    gb_arr(&g, "floats", 6, 2);
    gb_int(&g.keys, 0x3fc00000, 4); /* 1.5 */
    gb_int(&g.keys, 0xbf800000, 4); /* -1 */
    gb_arr(&g, "nothing", 8, 0);
    gb_tensor(&g, "b.weight", 8, 2, (uint64_t[]){32, 3}, 102);
    gb_vector(&g, "a.weight", 5);
    gb_tensor(&g, "odd", 16, 1, (uint64_t[]){256}, 66);
    gb_tensor(&g, "four", 1, 4, (uint64_t[]){2, 3, 4, 5}, 240);
    return g;
}

/* Opens what g makes; frees g. */
static ep_status open_made(gb *g, ep_buf *bytes, model_file **f, ep_err *err)
{
    *bytes = gb_bytes(g);
    gb_fini(g);
    memset(err, 0, sizeof(*err));
    return model_file_open_bytes(f, bytes->data, bytes->len, err);
}

static void check_refused(const char *label, ep_status status, const ep_err *err, ep_status want,
                          const char *says)
{
    if (status == want && strstr(err->text, says) != NULL) return;
    CHECK(false);
    printf("    %s: got %s \"%s\", expected %s and \"%s\"\n", label, ep_status_name(status),
           err->text, ep_status_name(want), says);
}

static void refused(const char *label, gb *g, ep_status want, const char *says)
{
    ep_buf bytes;
    ep_err err;
    model_file *f = NULL;
    ep_status status = open_made(g, &bytes, &f, &err);
    check_refused(label, status, &err, want, says);
    if (status == EP_OK) model_file_close(f);
    ep_buf_fini(&bytes);
}

/* Touches everything that the file says it has. */
static unsigned walk(const model_file *f)
{
    unsigned sum = 0;
    const gguf_part *part = model_file_part(f, 0);
    for (size_t i = 0; i < part->n_keys; i++) {
        const gguf_key *k = &part->keys[i];
        for (uint64_t j = 0; j < k->n; j++) {
            const char *s;
            size_t n;
            bool negative;
            uint64_t v;
            double d;
            if (gguf_string_at(k, j, &s, &n) && n > 0) sum += (unsigned char)s[n - 1];
            if (gguf_int_at(k, j, &negative, &v)) sum += (unsigned)v;
            if (gguf_float_at(k, j, &d) && d > 1) sum++;
        }
    }
    for (size_t i = 0; i < model_file_n_tensors(f); i++) {
        const model_tensor *t = model_file_tensor(f, i);
        if (model_file_find(f, t->name) != t) CHECK(false);
        sum += t->data[0] + t->data[t->bytes - 1];
    }
    return sum;
}

/* ---- what is right ------------------------------------------------------------------------------
 */

static void test_reads_keys(void)
{
    gb g = sample();
    ep_buf bytes;
    ep_err err;
    model_file *f = NULL;
    CHECK_INT(open_made(&g, &bytes, &f, &err), EP_OK);
    if (f == NULL) return;
    static const struct {
        const char *key;
        uint64_t v;
    } ints[] = {{"u8", 100},  {"i8", 101},  {"u16", 102}, {"i16", 103},           {"u32", 104},
                {"i32", 105}, {"u64", 110}, {"i64", 111}, {"largest", UINT64_MAX}};
    uint64_t u = 0;
    double d = 0;
    bool b = false;
    const char *s = NULL;
    size_t n = 0;
    for (size_t i = 0; i < sizeof(ints) / sizeof(ints[0]); i++) {
        CHECK_INT(model_file_u64(f, ints[i].key, &u, &err), EP_OK);
        CHECK(u == ints[i].v);
    }
    CHECK_INT(model_file_u64(f, "minus", &u, &err), EP_ERR_INVALID);
    CHECK(strstr(err.text, "minus") != NULL);
    CHECK_INT(model_file_u64(f, "most negative", &u, NULL), EP_ERR_INVALID);
    CHECK_INT(model_file_u64(f, "f32", &u, NULL), EP_ERR_INVALID);
    CHECK_INT(model_file_u64(f, "true", &u, NULL), EP_ERR_INVALID);
    CHECK_INT(model_file_u64(f, "strings", &u, NULL), EP_ERR_INVALID);
    memset(&err, 0, sizeof(err));
    CHECK_INT(model_file_u64(f, "absent", &u, &err), EP_AGAIN);
    CHECK_STR(err.text, "");
    CHECK_INT(model_file_f64(f, "f32", &d, NULL), EP_OK);
    CHECK(d == 0.5);
    CHECK_INT(model_file_f64(f, "f64", &d, NULL), EP_OK);
    CHECK(d == 1e300);
    CHECK_INT(model_file_f64(f, "minus", &d, NULL), EP_OK);
    CHECK(d == -7);
    CHECK_INT(model_file_f64(f, "nan", &d, NULL), EP_ERR_INVALID);
    CHECK_INT(model_file_f64(f, "text", &d, NULL), EP_ERR_INVALID);
    CHECK_INT(model_file_bool(f, "true", &b, NULL), EP_OK);
    CHECK(b);
    CHECK_INT(model_file_bool(f, "false", &b, NULL), EP_OK);
    CHECK(!b);
    CHECK_INT(model_file_bool(f, "maybe", &b, NULL), EP_ERR_INVALID);
    CHECK_INT(model_file_bool(f, "u8", &b, NULL), EP_ERR_INVALID);
    CHECK_INT(model_file_str(f, "general.architecture", &s, &n, NULL), EP_OK);
    CHECK(n == 4 && memcmp(s, "none", 4) == 0);
    CHECK_INT(model_file_str(f, "u8", &s, &n, NULL), EP_ERR_INVALID);
    CHECK_INT(model_file_str(f, "general.architectur", &s, &n, NULL), EP_AGAIN);
    model_file_close(f);
    ep_buf_fini(&bytes);
}

static void test_reads_arrays(void)
{
    gb g = sample();
    ep_buf bytes;
    ep_err err;
    model_file *f = NULL;
    CHECK_INT(open_made(&g, &bytes, &f, &err), EP_OK);
    if (f == NULL) return;
    const char *s;
    size_t n = 0;
    int64_t v = 0;
    double d = 0;
    CHECK_INT(model_file_arr_len(f, "strings"), 40);
    for (size_t i = 40; i-- > 0;) { /* any order: the index is sparse */
        CHECK_INT(model_file_arr_str(f, "strings", i, &s, &n), EP_OK);
        CHECK_INT(n, i);
        CHECK(i == 0 || s[i - 1] == (char)('a' + i % 26));
    }
    CHECK_INT(model_file_arr_str(f, "strings", 40, &s, &n), EP_ERR_INVALID);
    CHECK_INT(model_file_arr_str(f, "strings", SIZE_MAX, &s, &n), EP_ERR_INVALID);
    CHECK_INT(model_file_arr_str(f, "numbers", 0, &s, &n), EP_ERR_INVALID);
    CHECK_INT(model_file_arr_str(f, "text", 0, &s, &n), EP_ERR_INVALID);
    CHECK_INT(model_file_arr_len(f, "numbers"), 3);
    for (int i = 0; i < 3; i++) {
        CHECK_INT(model_file_arr_i64(f, "numbers", (size_t)i, &v), EP_OK);
        CHECK_INT(v, i - 1);
    }
    CHECK_INT(model_file_arr_i64(f, "numbers", 3, &v), EP_ERR_INVALID);
    CHECK_INT(model_file_arr_i64(f, "wide", 0, &v), EP_OK);
    CHECK_INT(model_file_arr_i64(f, "wide", 1, &v), EP_ERR_INVALID); /* does not fit */
    CHECK_INT(model_file_arr_i64(f, "wide signed", 0, &v), EP_OK);
    CHECK(v == INT64_MIN);
    CHECK_INT(model_file_arr_f64(f, "floats", 0, &d), EP_OK);
    CHECK(d == 1.5);
    CHECK_INT(model_file_arr_f64(f, "floats", 1, &d), EP_OK);
    CHECK(d == -1);
    CHECK_INT(model_file_arr_f64(f, "floats", 2, &d), EP_ERR_INVALID);
    CHECK_INT(model_file_arr_i64(f, "floats", 0, &v), EP_ERR_INVALID);
    CHECK_INT(model_file_arr_len(f, "nothing"), 0);
    CHECK_INT(model_file_arr_str(f, "nothing", 0, &s, &n), EP_ERR_INVALID);
    CHECK_INT(model_file_arr_len(f, "u8"), 0);
    CHECK_INT(model_file_arr_len(f, "absent"), 0);
    model_file_close(f);
    ep_buf_fini(&bytes);
}

static void test_reads_tensors(void)
{
    for (uint32_t version = 2; version <= 3; version++) {
        gb g = sample();
        g.version = version;
        ep_buf bytes;
        ep_err err;
        model_file *f = NULL;
        CHECK_INT(open_made(&g, &bytes, &f, &err), EP_OK);
        if (f == NULL) return;
        CHECK_INT(model_file_n_tensors(f), 4);
        CHECK(model_file_tensor(f, 4) == NULL);
        CHECK_STR(model_file_tensor(f, 0)->name, "b.weight");
        const model_tensor *t = model_file_find(f, "four");
        CHECK(t != NULL && t->n_dims == 4 && t->ne[3] == 5 && t->bytes == 240 && t->type == 1);
        t = model_file_find(f, "b.weight");
        CHECK(t != NULL && t->ne[0] == 32 && t->ne[1] == 3 && t->ne[2] == 1 && t->bytes == 102);
        t = model_file_find(f, "a.weight");
        CHECK(t != NULL && t->bytes == 20 && t->data[0] == 128); /* the byte at offset 128 */
        CHECK(model_file_find(f, "a") == NULL && model_file_find(f, "") == NULL);
        walk(f);
        model_file_close(f);
        ep_buf_fini(&bytes);
    }
}

static void test_finds_among_many(void)
{
    gb g = gb_make();
    char name[32];
    for (int i = 0; i < 500; i++) {
        snprintf(name, sizeof(name), "t%d", i * 7919 % 500);
        gb_vector(&g, name, 1);
    }
    ep_buf bytes;
    ep_err err;
    model_file *f = NULL;
    CHECK_INT(open_made(&g, &bytes, &f, &err), EP_OK);
    if (f == NULL) return;
    for (int i = 0; i < 500; i++) {
        snprintf(name, sizeof(name), "t%d", i);
        const model_tensor *t = model_file_find(f, name);
        CHECK(t != NULL && strcmp(t->name, name) == 0);
    }
    CHECK(model_file_find(f, "t500") == NULL);
    model_file_close(f);
    ep_buf_fini(&bytes);
}

static void test_alignment(void)
{
    gb g = gb_make();
    gb_u32(&g, "general.alignment", 256);
    g.alignment = 256;
    gb_vector(&g, "a", 3);
    gb_vector(&g, "b", 3);
    ep_buf bytes;
    ep_err err;
    model_file *f = NULL;
    CHECK_INT(open_made(&g, &bytes, &f, &err), EP_OK);
    if (f != NULL) CHECK_INT(model_file_find(f, "b")->data - model_file_find(f, "a")->data, 256);
    model_file_close(f);
    ep_buf_fini(&bytes);
    static const struct {
        uint32_t kind;
        uint64_t v;
        const char *says;
    } bad[] = {{4, 0, "alignment 0"},
               {4, 4, "alignment 4"},
               {4, 24, "alignment 24"},
               {10, 1ull << 40, "1099511627776"},
               {5, (uint64_t)-32, "no number"},
               {6, 0x42000000, "no number"},
               {7, 1, "no number"}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        g = gb_make();
        gb_key_int(&g, "general.alignment", bad[i].kind, bad[i].v);
        refused("alignment", &g, EP_ERR_INVALID, bad[i].says);
    }
}

/* ---- what is wrong ------------------------------------------------------------------------------
 */

static void refused_bytes(const char *label, const void *p, size_t n, ep_status want,
                          const char *says)
{
    ep_err err = {{0}};
    model_file *f = NULL;
    ep_status status = model_file_open_bytes(&f, p, n, &err);
    check_refused(label, status, &err, want, says);
    if (status == EP_OK) model_file_close(f);
}

static void test_refuses_headers(void)
{
    refused_bytes("empty", "", 0, EP_ERR_INVALID, "not a GGUF file");
    refused_bytes("short", "GGU", 3, EP_ERR_INVALID, "not a GGUF file");
    refused_bytes("other magic", "GGML\3\0\0\0", 8, EP_ERR_INVALID, "not a GGUF file");
    refused_bytes("no version", "GGUF\3\0", 6, EP_ERR_INVALID, "inside its header");
    refused_bytes("no counts", "GGUF\3\0\0\0\1", 9, EP_ERR_INVALID, "inside its header");
    static const struct {
        uint32_t version;
        const char *says;
    } bad[] = {{0, "version 0"},           {1, "version 1 is not supported"},
               {4, "version 4"},           {0x03000000, "big-endian"},
               {0x02000000, "big-endian"}, {0xffffffff, "version 4294967295"}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        gb g = gb_make();
        g.version = bad[i].version;
        refused("version", &g, EP_ERR_UNSUPPORTED, bad[i].says);
    }
    static const uint64_t counts[] = {3, 70000, 1ull << 31, 1ull << 60, UINT64_MAX};
    for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
        gb g = gb_make();
        g.n_keys = counts[i];
        refused("keys", &g, EP_ERR_INVALID, "do not fit in a file");
        g = gb_make();
        g.n_tensors = counts[i];
        refused("tensors", &g, EP_ERR_INVALID, "do not fit in a file");
    }
    gb g = gb_make();
    g.n_keys = 65537;
    for (int i = 0; i < 65537 * 2; i++)
        gb_int(&g.keys, 0, 8);
    refused("key limit", &g, EP_ERR_TOO_LARGE, "more than the limit");
}

static void test_refuses_keys(void)
{
    gb g = gb_make();
    gb_key(&g, "odd kind", 13);
    gb_int(&g.keys, 0, 8);
    refused("kind", &g, EP_ERR_INVALID, "key odd kind: unknown kind 13");
    g = gb_make();
    gb_arr(&g, "nested", 9, 1);
    refused("nested", &g, EP_ERR_UNSUPPORTED, "key nested: arrays of arrays");
    g = gb_make();
    gb_arr(&g, "odd", 77, 1);
    refused("element", &g, EP_ERR_INVALID, "unknown element kind 77");
    for (uint32_t kind = 0; kind < 13; kind++) {
        if (kind == 9) continue;
        g = gb_make();
        gb_arr(&g, "huge", kind, 1ull << 60);
        refused("huge array", &g, EP_ERR_INVALID, "do not fit in the");
        g = gb_make();
        gb_arr(&g, "wrap", kind, UINT64_MAX / 8 + 2);
        refused("wrapping array", &g, EP_ERR_INVALID, "do not fit in the");
    }
    g = gb_make();
    gb_key(&g, "long text", 8);
    gb_int(&g.keys, UINT64_MAX, 8);
    refused("string length", &g, EP_ERR_INVALID, "key long text runs past the end");
    g = gb_make();
    gb_arr(&g, "texts", 8, 2);
    gb_text(&g.keys, "fine", 4);
    gb_int(&g.keys, 1ull << 63, 8);
    refused("string of an array", &g, EP_ERR_INVALID, "string 1 of 2 runs past the end");
    g = gb_make();
    gb_int(&g.keys, UINT64_MAX, 8);
    gb_int(&g.keys, 0, 8);
    g.n_keys = 1;
    refused("name length", &g, EP_ERR_INVALID, "the name of key 0 runs past");
    g = gb_make();
    gb_u32(&g, "", 1);
    refused("empty name", &g, EP_ERR_INVALID, "name of key 0 is empty");
    g = gb_make();
    gb_text(&g.keys, "a\0b", 3);
    gb_int(&g.keys, 4, 4);
    gb_int(&g.keys, 4, 4);
    g.n_keys = 1;
    refused("NUL in a name", &g, EP_ERR_INVALID, "control characters");
    g = gb_make();
    gb_u32(&g, "twin", 1);
    gb_u32(&g, "other", 1);
    gb_str(&g, "twin", "x");
    refused("twice", &g, EP_ERR_INVALID, "key twin is there twice");
}

static void test_refuses_tensors(void)
{
    static const struct {
        const char *label;
        int type;
        uint32_t n_dims;
        uint64_t ne[5];
        uint64_t offset;
        ep_status status;
        const char *says;
    } bad[] = {
        {"no dimension", 0, 0, {0}, 0, EP_ERR_INVALID, "tensor t: 0 dimensions"},
        {"five", 0, 5, {1, 1, 1, 1, 1}, 0, EP_ERR_INVALID, "5 dimensions"},
        {"zero", 0, 2, {4, 0}, 0, EP_ERR_INVALID, "impossible shape [4, 0]"},
        {"wraps", 0, 3, {1ull << 32, 1ull << 31, 2}, 0, EP_ERR_INVALID, "impossible shape"},
        {"wraps to little", 0, 2, {1ull << 63, 2}, 0, EP_ERR_INVALID, "impossible shape"},
        {"bytes wrap", 0, 1, {1ull << 62}, 0, EP_ERR_INVALID, "impossible shape"},
        {"half a block", 8, 2, {33, 2}, 0, EP_ERR_INVALID, "no multiple of Q8_0's block of 32"},
        {"half a K block", 12, 1, {128}, 0, EP_ERR_INVALID, "Q4_K's block of 256"},
        {"unknown type", 99, 1, {4}, 0, EP_ERR_UNSUPPORTED, "tensor t: type 99 is unknown"},
        {"huge type", -1, 1, {4}, 0, EP_ERR_UNSUPPORTED, "type 4294967295 is unknown"},
        {"GPTQ is no file type", 1000, 1, {128}, 0, EP_ERR_UNSUPPORTED, "type 1000 is unknown"},
        {"removed", 4, 1, {32}, 0, EP_ERR_UNSUPPORTED, "type 4 (Q4_2) was removed"},
        {"misaligned", 0, 1, {1}, 4, EP_ERR_INVALID, "offset 4 is not aligned to 32"},
        {"far", 0, 1, {1}, 1ull << 40, EP_ERR_INVALID, "past the end of the file"},
        {"far wraps", 0, 1, {1}, UINT64_MAX - 31, EP_ERR_INVALID, "past the end of the file"},
        {"too large", 0, 1, {1000}, 0, EP_ERR_INVALID, "past the end of the file"},
        {"over its neighbour", 0, 1, {9}, 0, EP_ERR_INVALID, "tensors t and z overlap"},
        {"same place", 0, 1, {1}, 32, EP_ERR_INVALID, "overlap"},
        {"same name", 0, 1, {1}, 64, EP_ERR_INVALID, "tensor z is there twice"},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        gb g = gb_make();
        bool twin = strcmp(bad[i].label, "same name") == 0;
        gb_info(&g, twin ? "z" : "t", bad[i].type, bad[i].n_dims, bad[i].ne, bad[i].offset);
        gb_info(&g, "z", 0, 1, (uint64_t[]){1}, 32);
        g.data_bytes = 96;
        refused(bad[i].label, &g, bad[i].status, bad[i].says);
    }
    gb g = gb_make();
    gb_vector(&g, "line\nfeed", 1);
    refused("control", &g, EP_ERR_INVALID, "control characters");
    g = gb_make();
    char name[300];
    memset(name, 'n', sizeof(name));
    name[sizeof(name) - 1] = '\0';
    gb_vector(&g, name, 1);
    refused("long name", &g, EP_ERR_INVALID, "longer than 255");
}

/* Types of a known size are readable even where nothing computes with them. */
static void test_knows_types(void)
{
    static const struct {
        int type;
        uint64_t block, bytes;
        const char *name;
    } types[] = {{2, 32, 18, "Q4_0"},     {3, 32, 20, "Q4_1"},    {6, 32, 22, "Q5_0"},
                 {7, 32, 24, "Q5_1"},     {10, 256, 84, "Q2_K"},  {11, 256, 110, "Q3_K"},
                 {12, 256, 144, "Q4_K"},  {13, 256, 176, "Q5_K"}, {14, 256, 210, "Q6_K"},
                 {17, 256, 74, "IQ2_XS"}, {20, 32, 18, "IQ4_NL"}, {23, 256, 136, "IQ4_XS"},
                 {29, 256, 56, "IQ1_M"},  {30, 1, 2, "BF16"},     {39, 32, 17, "MXFP4"},
                 {40, 64, 36, "NVFP4"},   {35, 256, 66, "TQ2_0"}, {28, 1, 8, "F64"}};
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        gb g = gb_make();
        gb_tensor(&g, "t", types[i].type, 2, (uint64_t[]){2 * types[i].block, 3},
                  6 * types[i].bytes);
        ep_buf bytes;
        ep_err err;
        model_file *f = NULL;
        CHECK_INT(open_made(&g, &bytes, &f, &err), EP_OK);
        if (f != NULL) CHECK_INT(model_file_tensor(f, 0)->bytes, 6 * types[i].bytes);
        CHECK_STR(gguf_type_name(types[i].type), types[i].name);
        model_file_close(f);
        ep_buf_fini(&bytes);
    }
    /* Where kernels know a type too, both tables agree. */
    for (int type = 0; type < 64; type++) {
        uint32_t block, block_bytes;
        if (kern_type_block(type) == 0) continue;
        CHECK(gguf_type_size(type, &block, &block_bytes));
        CHECK_INT(block, kern_type_block(type));
        CHECK_INT(block_bytes, kern_type_block_bytes(type));
        CHECK_STR(gguf_type_name(type), kern_type_name(type));
    }
}

static void test_cut_everywhere(void)
{
    gb g = sample();
    ep_buf bytes = gb_bytes(&g);
    gb_fini(&g);
    for (size_t n = 0; n < bytes.len; n++) {
        uint8_t *copy = malloc(n ? n : 1); /* its own block, so that a sanitizer sees its end */
        if (copy == NULL) abort();
        memcpy(copy, bytes.data, n);
        ep_err err = {{0}};
        model_file *f = NULL;
        ep_status status = model_file_open_bytes(&f, copy, n, &err);
        /* The last tensor ends before the padding does. */
        if (status == EP_OK && n < bytes.len - 31) {
            CHECK(false);
            printf("    cut at %zu of %zu was accepted\n", n, bytes.len);
        }
        if (status != EP_OK) CHECK(strncmp(err.text, "memory: ", 8) == 0 && f == NULL);
        if (status == EP_OK) walk(f);
        model_file_close(f);
        free(copy);
    }
    ep_buf_fini(&bytes);
}

static void test_any_byte_changed(void)
{
    gb g = sample();
    ep_buf bytes = gb_bytes(&g);
    gb_fini(&g);
    int accepted = 0, refusals = 0;
    for (size_t i = 0; i < bytes.len; i++) {
        const uint8_t was = bytes.data[i];
        const uint8_t now[] = {0, 0xff, (uint8_t)(was + 1), (uint8_t)(was ^ 0x80)};
        for (int j = 0; j < 4; j++) {
            ep_err err = {{0}};
            model_file *f = NULL;
            bytes.data[i] = now[j];
            if (model_file_open_bytes(&f, bytes.data, bytes.len, &err) == EP_OK) {
                walk(f);
                accepted++;
            } else {
                CHECK(err.text[0] != '\0');
                refusals++;
            }
            model_file_close(f);
        }
        bytes.data[i] = was;
    }
    CHECK(accepted > 0 && refusals > 0);
    ep_buf_fini(&bytes);
}

static void test_memory_fails(void)
{
    gb g = sample();
    ep_buf bytes = gb_bytes(&g);
    gb_fini(&g);
    int n = 0;
    for (;;) {
        ep_err err = {{0}};
        model_file *f = NULL;
        ep_alloc_fail_at(++n);
        ep_status status = model_file_open_bytes(&f, bytes.data, bytes.len, &err);
        ep_alloc_fail_at(0);
        model_file_close(f);
        if (status == EP_OK) break;
        CHECK_INT(status, EP_ERR_NOMEM);
        CHECK(err.text[0] != '\0' && f == NULL);
        if (n > 100) break;
    }
    CHECK(n > 8 && n <= 100);
    ep_buf_fini(&bytes);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"keys of every kind", test_reads_keys},
        {"arrays stay in the map", test_reads_arrays},
        {"tensors of versions 2 and 3", test_reads_tensors},
        {"one among many tensors", test_finds_among_many},
        {"alignment", test_alignment},
        {"wrong headers and counts", test_refuses_headers},
        {"wrong keys", test_refuses_keys},
        {"wrong tensors", test_refuses_tensors},
        {"sizes of types", test_knows_types},
        {"cut at every length", test_cut_everywhere},
        {"any byte changed", test_any_byte_changed},
        {"every allocation fails once", test_memory_fails},
    };
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
