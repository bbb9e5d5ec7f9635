/*
 * The safetensors container: files, sharded checkpoints and folders that are good, and a table of
 * every way in which a header, an index or a folder can lie, each with the words of its refusal.
 */
#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>
#include "model/json.h"
#include "model/safetensors.h"
#include "tests/st_build.h"
#include "tests/test.h"

static bool says(const ep_err *err, const char *part)
{
    if (strstr(err->text, part) != NULL) return true;
    printf("    \"%s\" does not say \"%s\"\n", err->text, part);
    return false;
}

static ep_status open_one(st_file **out, const ep_buf *b, ep_err *err)
{
    st_bytes part = {"one.safetensors", b->data, b->len};
    static st_bytes kept; /* the file keeps the pointer */
    kept = part;
    return st_open_bytes(out, &kept, 1, NULL, err);
}

/* ---- good files ---- */

static void test_good(void)
{
    static const char header[] =
        "{\"__metadata__\":{\"format\":\"pt\",\"by\":\"hand \\u00e9\"},"
        "\"b\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[4,28]},"
        "\"a\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[0,4]},"
        "\"scalar\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[28,29]},"
        "\"none\":{\"dtype\":\"I64\",\"shape\":[0,9223372036854775807,4],\"data_offsets\":[29,29]},"
        "\"half\":{\"dtype\":\"F4\",\"shape\":[3,2],\"data_offsets\":[29,32]},"
        "\"six\":{\"data_offsets\":[32,35],\"shape\":[4],\"dtype\":\"F6_E2M3\"}}   ";
    uint8_t data[35];
    for (int i = 0; i < 35; i++)
        data[i] = (uint8_t)i;
    ep_buf b = sb_join(header, strlen(header), data, sizeof(data));
    st_file *f = NULL;
    ep_err err = {{0}};
    char text[64];
    CHECK_INT(open_one(&f, &b, &err), EP_OK);
    if (f == NULL) {
        printf("    %s\n", err.text);
        ep_buf_fini(&b);
        return;
    }
    CHECK_INT(st_n_tensors(f), 6);
    CHECK_INT(st_n_parts(f), 1);
    CHECK_STR(st_tensor_at(f, 0)->name, "a");
    CHECK_STR(st_tensor_at(f, 5)->name, "six");
    CHECK(st_tensor_at(f, 6) == NULL);
    const st_tensor *t = st_find(f, "b");
    CHECK(t != NULL && t->type == ST_F32 && t->n_dims == 2 && t->dim[0] == 2 && t->dim[1] == 3);
    CHECK(t != NULL && t->bytes == 24 && t->data[0] == 4 && t->data[23] == 27);
    CHECK_STR(t ? st_shape_text(text, sizeof(text), t) : "", "[2, 3]");
    t = st_find(f, "scalar");
    CHECK(t != NULL && t->n_dims == 0 && t->bytes == 1 && t->data[0] == 28);
    CHECK_STR(t ? st_shape_text(text, sizeof(text), t) : "", "[]");
    CHECK(st_find(f, "none") != NULL && st_find(f, "none")->bytes == 0);
    CHECK(st_find(f, "half") != NULL && st_find(f, "half")->bytes == 3);
    CHECK(st_find(f, "c") == NULL && st_find(f, "__metadata__") == NULL && st_find(f, "") == NULL);
    CHECK_INT(st_n_notes(f), 2);
    const char *key, *value;
    st_note(f, 1, &key, &value);
    CHECK_STR(key, "by");
    CHECK_STR(value, "hand \xc3\xa9");
    st_close(f);
    ep_buf_fini(&b);
    sb_file none = {.n = 0};
    b = sb_end(&none);
    CHECK_INT(open_one(&f, &b, &err), EP_OK);
    CHECK_INT(st_n_tensors(f), 0);
    st_close(f);
    ep_buf_fini(&b);
}

/* Every type has the size that its name says. */
static void test_types(void)
{
    static const struct {
        const char *name;
        size_t bytes_of_8;
    } cases[] = {{"BOOL", 8}, {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
                 {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"I16", 16},
                 {"U16", 16}, {"F16", 16},    {"BF16", 16},   {"I32", 32},    {"U32", 32},
                 {"F32", 32}, {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64}};
    CHECK_INT(sizeof(cases) / sizeof(cases[0]), ST_N_TYPES);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        for (size_t off = 0; off < 2; off++) {
            sb_file made = {.n = 0};
            uint8_t zero[65] = {0};
            st_file *f = NULL;
            sb_add(&made, "t", cases[i].name, 1, (uint64_t[]){8}, zero, cases[i].bytes_of_8 + off);
            ep_buf b = sb_end(&made);
            CHECK_INT(open_one(&f, &b, NULL), off ? EP_ERR_INVALID : EP_OK);
            if (f != NULL) CHECK_STR(st_type_name(st_tensor_at(f, 0)->type), cases[i].name);
            st_close(f);
            ep_buf_fini(&b);
        }
    }
}

/* ---- bad headers ---- */

#define T(name, type, shape, from, to)                                                             \
    "\"" name "\":{\"dtype\":\"" type "\",\"shape\":" shape ",\"data_offsets\":[" from "," to "]}"

static const struct {
    const char *header;
    size_t data;
    ep_status status;
    const char *words;
} bad_headers[] = {
    {"", 0, EP_ERR_INVALID, "no JSON object"},
    {"{", 0, EP_ERR_INVALID, "no JSON object"},
    {"[]", 0, EP_ERR_INVALID, "no JSON object"},
    {" {}", 0, EP_ERR_INVALID, "no JSON object"},
    {"{}x", 0, EP_ERR_INVALID, "line 1, column 3"},
    {"{\"a\":}", 0, EP_ERR_INVALID, "line 1, column 6"},
    {"{\"\xff\":1}", 0, EP_ERR_INVALID, "line 1"},
    {"{}", 1, EP_ERR_INVALID, "the last 1 bytes belong to no tensor"},
    {"{\"a\":1}", 0, EP_ERR_INVALID, "tensor a: its entry is no object"},
    {"{\"\":{}}", 0, EP_ERR_INVALID, "name of tensor 0 is empty"},
    {"{\"a\\nb\":{}}", 0, EP_ERR_INVALID, "control characters"},
    {"{\"a\\u0000b\":{}}", 0, EP_ERR_INVALID, "line 1"},
    {"{\"__metadata__\":[]}", 0, EP_ERR_INVALID, "__metadata__ is no object"},
    {"{\"__metadata__\":{\"a\":1}}", 0, EP_ERR_INVALID, "something else than text"},
    {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, EP_ERR_INVALID, "dtype is missing"},
    {"{\"a\":{\"dtype\":8,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, EP_ERR_INVALID, "dtype is"},
    {"{" T("a", "Q4_K", "[1]", "0", "1") "}", 1, EP_ERR_UNSUPPORTED, "dtype Q4_K is not known"},
    {"{" T("a", "u8", "[1]", "0", "1") "}", 1, EP_ERR_UNSUPPORTED, "dtype u8 is not known"},
    {"{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, EP_ERR_INVALID, "shape is missing"},
    {"{" T("a", "U8", "1", "0", "1") "}", 1, EP_ERR_INVALID, "shape is missing or no array"},
    {"{" T("a", "U8", "[-1]", "0", "1") "}", 1, EP_ERR_INVALID, "no whole number from 0"},
    {"{" T("a", "U8", "[1.0]", "0", "1") "}", 1, EP_ERR_INVALID, "no whole number from 0"},
    {"{" T("a", "U8", "[\"1\"]", "0", "1") "}", 1, EP_ERR_INVALID, "no whole number from 0"},
    {"{" T("a", "U8", "[1,1,1,1,1,1,1,1,1]", "0", "1") "}", 1, EP_ERR_UNSUPPORTED, "9 dimensions"},
    {"{" T("a", "U8", "[99999999999999999999]", "0", "1") "}", 1, EP_ERR_INVALID,
     "no whole number from 0"},
    {"{" T("a", "U8", "[1]", "0", "1000000000000000000001") "}", 1, EP_ERR_INVALID,
     "no two whole numbers"},
    {"{" T("a", "U8", "[4294967296,4294967296]", "0", "0") "}", 0, EP_ERR_INVALID, "overflow"},
    {"{" T("a", "U8", "[4294967296,4294967296,0]", "0", "1") "}", 1, EP_ERR_INVALID,
     "is 0 bytes, but its data_offsets span 1"},
    {"{" T("a", "F64", "[2305843009213693952]", "0", "0") "}", 0, EP_ERR_INVALID, "overflow"},
    {"{" T("a", "F32", "[4611686018427387904]", "0", "0") "}", 0, EP_ERR_INVALID, "overflow"},
    {"{" T("a", "F4", "[3]", "0", "1") "}", 1, EP_ERR_INVALID, "no whole number of bytes"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, EP_ERR_INVALID, "data_offsets are missing"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1, EP_ERR_INVALID,
     "no two whole numbers"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,1]}}", 1, EP_ERR_INVALID,
     "no two whole numbers"},
    {"{" T("a", "U8", "[1]", "0", "1.5") "}", 1, EP_ERR_INVALID, "no two whole numbers"},
    {"{" T("a", "U8", "[1]", "-1", "0") "}", 1, EP_ERR_INVALID, "negative or descend"},
    {"{" T("a", "U8", "[1]", "1", "0") "}", 1, EP_ERR_INVALID, "negative or descend"},
    {"{" T("a", "U8", "[2]", "0", "2") "}", 1, EP_ERR_INVALID, "reach past the end of the file"},
    {"{" T("a", "U8", "[1]", "9223372036854775806", "9223372036854775807") "}", 1, EP_ERR_INVALID,
     "reach past the end of the file"},
    {"{" T("a", "F16", "[2]", "0", "3") "}", 3, EP_ERR_INVALID,
     "F16 [2] is 4 bytes, but its data_offsets span 3"},
    {"{" T("a", "F16", "[2]", "0", "5") "}", 5, EP_ERR_INVALID, "span 5"},
    {"{" T("a", "U8", "[2]", "0", "2") "," T("b", "U8", "[2]", "1", "3") "}", 3, EP_ERR_INVALID,
     "tensors a and b overlap"},
    {"{" T("a", "U8", "[2]", "0", "2") "," T("b", "U8", "[2]", "0", "2") "}", 2, EP_ERR_INVALID,
     "overlap"},
    {"{" T("a", "U8", "[3]", "0", "3") "," T("b", "U8", "[0]", "1", "1") "}", 3, EP_ERR_INVALID,
     "overlap"},
    {"{" T("a", "U8", "[1]", "1", "2") "}", 2, EP_ERR_INVALID,
     "1 bytes before tensor a belong to no tensor"},
    {"{" T("a", "U8", "[1]", "0", "1") "," T("b", "U8", "[1]", "3", "4") "}", 4, EP_ERR_INVALID,
     "2 bytes before tensor b"},
    {"{" T("a", "U8", "[1]", "0", "1") "}", 4, EP_ERR_INVALID, "the last 3 bytes"},
    {"{" T("a", "U8", "[1]", "0", "1") "," T("a", "U8", "[1]", "1", "2") "}", 2, EP_ERR_INVALID,
     "duplicate object key"},
    {"{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
     EP_ERR_INVALID, "duplicate object key"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":0}}", 1, EP_ERR_INVALID,
     "other keys"},
};

static void test_bad_headers(void)
{
    for (size_t i = 0; i < sizeof(bad_headers) / sizeof(bad_headers[0]); i++) {
        uint8_t zero[8] = {0};
        st_file *f = NULL;
        ep_err err = {{0}};
        ep_buf b = sb_join(bad_headers[i].header, strlen(bad_headers[i].header), zero,
                           bad_headers[i].data);
        ep_status s = open_one(&f, &b, &err);
        CHECK_INT(s, bad_headers[i].status);
        if (s != bad_headers[i].status) printf("    of %s: %s\n", bad_headers[i].header, err.text);
        CHECK(says(&err, bad_headers[i].words) && says(&err, "one.safetensors: "));
        st_close(f);
        ep_buf_fini(&b);
    }
    char name[1024], header[2048];
    memset(name, 'n', 513);
    name[513] = '\0';
    snprintf(header, sizeof(header), "{\"%s\":{}}", name);
    st_file *f = NULL;
    ep_err err = {{0}};
    ep_buf b = sb_join(header, strlen(header), "", 0);
    CHECK_INT(open_one(&f, &b, &err), EP_ERR_INVALID);
    CHECK(says(&err, "longer than 512"));
    ep_buf_fini(&b);
}

/* A good file with another length in front, and every beginning of it. */
static void test_lengths(void)
{
    static const char header[] = "{" T("a", "U8", "[4]", "0", "4") "}";
    static const struct {
        uint64_t n;
        ep_status status;
        const char *words;
    } cases[] = {{0, EP_ERR_INVALID, "no JSON object"},
                 {1, EP_ERR_INVALID, "no JSON object"},
                 {sizeof(header) - 2, EP_ERR_INVALID, "line 1"},
                 {sizeof(header), EP_ERR_INVALID, "line 1"},
                 {sizeof(header) + 3, EP_ERR_INVALID, "line 1"},
                 {sizeof(header) + 4, EP_ERR_INVALID, "does not fit in a file of"},
                 {100000000, EP_ERR_INVALID, "does not fit in a file of"},
                 {100000001, EP_ERR_TOO_LARGE, "more than the limit of 100000000"},
                 {UINT64_MAX, EP_ERR_TOO_LARGE, "more than the limit"},
                 {UINT64_MAX - 7, EP_ERR_TOO_LARGE, "more than the limit"}};
    ep_buf b = sb_join(header, sizeof(header) - 1, "\1\2\3\4", 4);
    st_file *f = NULL;
    CHECK_INT(open_one(&f, &b, NULL), EP_OK);
    st_close(f);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        ep_err err = {{0}};
        for (int j = 0; j < 8; j++)
            b.data[j] = (uint8_t)(cases[i].n >> 8 * j);
        CHECK_INT(open_one(&f, &b, &err), cases[i].status);
        CHECK(says(&err, cases[i].words));
    }
    ep_buf_fini(&b);
    b = sb_join(header, sizeof(header) - 1, "\1\2\3\4", 4);
    for (size_t n = 0; n < b.len; n++) {
        /* The bytes in a block of their own, so that reading past them is seen. */
        ep_buf cut = {0};
        sb_must(ep_buf_add(&cut, b.data, n));
        CHECK_INT(open_one(&f, &cut, NULL), EP_ERR_INVALID);
        ep_buf_fini(&cut);
    }
    ep_buf_fini(&b);
}

/* ---- sharded ---- */

static ep_buf one_tensor(const char *a, const char *b)
{
    sb_file made = {.n = 0};
    sb_add(&made, a, "U8", 1, (uint64_t[]){2}, "\1\2", 2);
    if (b != NULL) sb_add(&made, b, "U8", 1, (uint64_t[]){1}, "\3", 1);
    return sb_end(&made);
}

static const struct {
    const char *index;
    ep_status status;
    const char *words;
} indexes[] = {
    {"{\"weight_map\":{\"x\":\"a.safetensors\",\"y\":\"b.safetensors\",\"z\":\"b.safetensors\"}}",
     EP_OK, NULL},
    {"{\"metadata\":{\"total_size\":3},\"weight_map\":{\"z\":\"b.safetensors\",\"y\":\"b."
     "safetensors\","
     "\"x\":\"a.safetensors\"}} ",
     EP_OK, NULL},
    {"", EP_ERR_INVALID, "line 1"},
    {"[]", EP_ERR_INVALID, "weight_map is missing"},
    {"{}", EP_ERR_INVALID, "weight_map is missing"},
    {"{\"weight_map\":[]}", EP_ERR_INVALID, "weight_map is missing"},
    {"{\"weight_map\":{}}", EP_ERR_INVALID, "weight_map is missing, empty"},
    {"{\"weight_map\":{\"x\":1}}", EP_ERR_INVALID, "file of tensor x is not the plain name"},
    {"{\"weight_map\":{\"x\":\"../a.safetensors\"}}", EP_ERR_INVALID, "not the plain name"},
    {"{\"weight_map\":{\"x\":\"/a.safetensors\"}}", EP_ERR_INVALID, "not the plain name"},
    {"{\"weight_map\":{\"x\":\".safetensors\"}}", EP_ERR_INVALID, "not the plain name"},
    {"{\"weight_map\":{\"x\":\"a.bin\"}}", EP_ERR_INVALID, "not the plain name"},
    {"{\"weight_map\":{\"x\":\"a\\n.safetensors\"}}", EP_ERR_INVALID, "not the plain name"},
    {"{\"weight_map\":{\"x\":\"a.safetensors\",\"x\":\"a.safetensors\"}}", EP_ERR_INVALID,
     "duplicate object key"},
    {"{\"weight_map\":{\"x\":\"c.safetensors\"}}", EP_ERR_IO, "c.safetensors: no such file"},
    {"{\"weight_map\":{\"x\":\"a.safetensors\",\"w\":\"a.safetensors\"}}", EP_ERR_INVALID,
     "tensor w is said to be in a.safetensors, but is in none"},
    {"{\"weight_map\":{\"x\":\"b.safetensors\",\"y\":\"a.safetensors\",\"z\":\"b.safetensors\"}}",
     EP_ERR_INVALID, "but is in "},
    {"{\"weight_map\":{\"x\":\"a.safetensors\",\"y\":\"b.safetensors\"}}", EP_ERR_INVALID,
     "tensor z of b.safetensors is not in the index"},
    {"{\"weight_map\":{\"x\":\"a.safetensors\",\"y\":\"twin.safetensors\",\"z\":\"b.safetensors\"}"
     "}",
     EP_ERR_INVALID, "is in "},
    {"{\"weight_map\":{\"x\":\"a.safetensors\",\"y\":\"bad.safetensors\"}}", EP_ERR_INVALID,
     "bad.safetensors: not a safetensors file"},
};

static void test_sharded(void)
{
    ep_buf a = one_tensor("x", NULL), b = one_tensor("y", "z"), twin = one_tensor("x", "y");
    st_bytes parts[] = {{"a.safetensors", a.data, a.len},
                        {"b.safetensors", b.data, b.len},
                        {"twin.safetensors", twin.data, twin.len},
                        {"bad.safetensors", "abc", 3}};
    for (size_t i = 0; i < sizeof(indexes) / sizeof(indexes[0]); i++) {
        st_bytes index = {"x.safetensors.index.json", indexes[i].index, strlen(indexes[i].index)};
        st_file *f = NULL;
        ep_err err = {{0}};
        ep_status s = st_open_bytes(&f, parts, 4, &index, &err);
        CHECK_INT(s, indexes[i].status);
        if (s != indexes[i].status) printf("    of %s: %s\n", indexes[i].index, err.text);
        if (s != EP_OK) {
            CHECK(says(&err, indexes[i].words));
            continue;
        }
        CHECK_INT(st_n_parts(f), 2);
        CHECK_INT(st_n_tensors(f), 3);
        const st_tensor *z = st_find(f, "z");
        CHECK(z != NULL && z->data[0] == 3 && z->part == 1);
        CHECK_STR(st_part_name(f, 1), "b.safetensors");
        st_close(f);
    }
    ep_buf_fini(&a);
    ep_buf_fini(&b);
    ep_buf_fini(&twin);
}

/* ---- on disk ---- */

static char folder[256];

static void write_file(const char *name, const void *data, size_t n)
{
    char path[512];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    CHECK(f != NULL && fwrite(data, 1, n, f) == n);
    if (f != NULL) fclose(f);
}

static void remove_file(const char *name)
{
    char path[512];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    CHECK_INT(unlink(path), 0);
}

static bool make_folder(void)
{
    const char *where = getenv("TMPDIR");
    snprintf(folder, sizeof(folder), "%s/moed-st-XXXXXX", where != NULL ? where : "/tmp");
    CHECK(mkdtemp(folder) != NULL);
    return folder[0] != '\0';
}

static void remove_folder(void)
{
    DIR *d = opendir(folder);
    if (d == NULL) return;
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        if (e->d_name[0] != '.') remove_file(e->d_name);
    closedir(d);
    CHECK_INT(rmdir(folder), 0);
}

static void check_open(const char *name, ep_status status, const char *words, size_t tensors)
{
    char path[512];
    st_file *f = NULL;
    ep_err err = {{0}};
    snprintf(path, sizeof(path), "%s%s%s", folder, name[0] ? "/" : "", name);
    ep_status s = st_open(&f, path, &err);
    CHECK_INT(s, status);
    if (s == EP_OK) {
        CHECK_INT(st_n_tensors(f), tensors);
        CHECK_STR(st_folder(f), folder);
    } else {
        CHECK(says(&err, words));
    }
    st_close(f);
}

static void test_disk(void)
{
    static const char *const map = "{\"weight_map\":{\"x\":\"a.safetensors\",\"y\":\"b."
                                   "safetensors\",\"z\":\"b.safetensors\"}}";
    ep_buf a = one_tensor("x", NULL), b = one_tensor("y", "z");
    if (!make_folder()) return;
    check_open("", EP_ERR_INVALID, "a folder without a safetensors file", 0);
    check_open("a.safetensors", EP_ERR_IO, "No such file", 0);
    check_open("m.safetensors.index.json", EP_ERR_IO, "no such file", 0);
    write_file("a.safetensors", a.data, a.len);
    write_file("notes.txt", "x", 1);
    check_open("", EP_OK, NULL, 1);
    check_open("/", EP_OK, NULL, 1);
    check_open("a.safetensors", EP_OK, NULL, 1);
    write_file("b.safetensors", b.data, b.len);
    check_open("", EP_ERR_INVALID, "0 indexes and 2 safetensors files: name the one", 0);
    write_file("m.safetensors.index.json", map, strlen(map));
    check_open("", EP_OK, NULL, 3);
    check_open("m.safetensors.index.json", EP_OK, NULL, 3);
    check_open("b.safetensors", EP_OK, NULL, 2);
    write_file("m.safetensors", a.data, a.len);
    check_open("", EP_ERR_INVALID, "an index and also m.safetensors", 0);
    check_open("/", EP_ERR_INVALID, "an index and also m.safetensors", 0);
    remove_file("m.safetensors");
    write_file("n.safetensors.index.json", map, strlen(map));
    check_open("", EP_ERR_INVALID, "2 indexes", 0);
    remove_file("n.safetensors.index.json");
    remove_file("b.safetensors");
    check_open("", EP_ERR_IO, "b.safetensors: No such file", 0);
    write_file("b.safetensors", b.data, 5);
    check_open("", EP_ERR_INVALID, "b.safetensors: not a safetensors file (5 bytes)", 0);
    write_file("b.safetensors", b.data, b.len - 1);
    check_open("", EP_ERR_INVALID, "truncated?", 0);
    CHECK(model_safetensors_is(folder) && model_safetensors_is("a/b.safetensors"));
    CHECK(model_safetensors_is("x.safetensors.index.json"));
    CHECK(!model_safetensors_is("a.gguf") && !model_safetensors_is("/nowhere/at/all"));
    remove_folder();
    ep_buf_fini(&a);
    ep_buf_fini(&b);
}

/* What moectl inspect prints, and what becomes of such a path as a model. */
static void test_inspect(void)
{
    ep_buf parts[2], index = {0}, text = {0};
    gx_recipe good = {.seed = 7};
    ep_err err = {{0}};
    char path[512];
    model *m = NULL;
    if (!make_folder()) return;
    gx_make(&good, parts, &index);
    write_file(GX_PART_0, parts[0].data, parts[0].len);
    write_file(GX_PART_1, parts[1].data, parts[1].len);
    write_file(GX_INDEX, index.data, index.len);
    const char *config = "{" GX_CONFIG ",\"quantization_config\":{" GX_QUANT "}}";
    write_file("config.json", config, strlen(config));
    CHECK_INT(model_inspect(folder, false, &text, &err), EP_OK);
    sb_must(ep_buf_add(&text, "", 1));
    CHECK(strstr((char *)text.data, "safetensors, 2 files") != NULL);
    CHECK(strstr((char *)text.data, "served: no, because") != NULL);
    CHECK(strstr((char *)text.data, "tokenizer.json: it is missing") != NULL);
    CHECK(strstr((char *)text.data, "qwen3moe with 2 layers of 3 experts") != NULL);
    CHECK(strstr((char *)text.data, "model.layers.1.mlp.experts.2.down_proj.qweight") != NULL);
    text.len = 0;
    CHECK_INT(model_inspect(folder, true, &text, &err), EP_OK);
    model_json *doc = NULL;
    CHECK_INT(model_json_parse(&doc, text.data, text.len, "inspect", &err), EP_OK);
    bool served = true;
    CHECK(model_json_bool(model_json_member(doc, "served"), &served) && !served);
    CHECK_STR(model_json_str(model_json_member(model_json_member(doc, "model"), "expert_type")),
              "GPTQ4");
    CHECK_INT(model_json_size(model_json_member(doc, "tensors")), 2 * (8 + 3 + 3 * 3 * 3) + 3);
    model_json_free(doc);
    uint64_t digests[3] = {0};
    const char *ways[] = {"", ("/" GX_INDEX), ""};
    for (int i = 0; i < 3; i++) {
        if (i == 2) write_file("generation_config.json", "{}", 2);
        snprintf(path, sizeof(path), "%s%s", folder, ways[i]);
        CHECK_INT(model_open(&m, path, &err), EP_OK);
        if (m != NULL) digests[i] = m->digest;
        model_close(m);
        m = NULL;
    }
    CHECK(digests[0] == digests[1] && digests[0] != digests[2]);
    snprintf(path, sizeof(path), "%s/" GX_PART_0, folder);
    CHECK_INT(model_open(&m, path, &err), EP_ERR_INVALID); /* a part of it is not all of it */
    remove_file("generation_config.json");
    remove_file("config.json");
    text.len = 0;
    CHECK_INT(model_inspect(folder, false, &text, &err), EP_OK);
    sb_must(ep_buf_add(&text, "", 1));
    CHECK(strstr((char *)text.data, "config.json: it is missing") != NULL);
    CHECK_INT(model_inspect("/nowhere.safetensors", false, &text, &err), EP_ERR_IO);
    remove_folder();
    ep_buf_fini(&parts[0]);
    ep_buf_fini(&parts[1]);
    ep_buf_fini(&index);
    ep_buf_fini(&text);
}

/* Each allocation fails once: a clean status, nothing lost (under the address sanitizer). */
static void test_memory(void)
{
    ep_buf a = one_tensor("x", NULL), b = one_tensor("y", "z");
    st_bytes parts[] = {{"a.safetensors", a.data, a.len}, {"b.safetensors", b.data, b.len}};
    st_bytes index = {"x.safetensors.index.json", indexes[0].index, strlen(indexes[0].index)};
    ep_status s = EP_ERR_NOMEM;
    int n = 0;
    for (; s != EP_OK && n < 100; n++) {
        st_file *f = NULL;
        ep_alloc_fail_at(n + 1);
        s = st_open_bytes(&f, parts, 2, &index, NULL);
        ep_alloc_fail_at(0);
        CHECK(s == EP_OK || s == EP_ERR_NOMEM);
        st_close(f);
    }
    CHECK(s == EP_OK && n > 8);
    ep_buf_fini(&a);
    ep_buf_fini(&b);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"good", test_good},       {"types", test_types},     {"bad_headers", test_bad_headers},
        {"lengths", test_lengths}, {"sharded", test_sharded}, {"disk", test_disk},
        {"inspect", test_inspect}, {"memory", test_memory},
    };
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
