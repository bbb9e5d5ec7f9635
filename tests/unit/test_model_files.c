/*
 * Models as files on a disk: those of the repository, the parts of split ones, what is no model at
 * all, and what inspect says of each.
 */
#include "tests/unit/model_fixture.h"

#include <jansson.h>

#include <sys/stat.h>
#include <unistd.h>

/* ---- the files of the repository ----------------------------------------------------------------
 */

static char *source_path(const char *name)
{
    const char *source = getenv("MOED_SOURCE");
    char *path = ep_strfmt("%s/%s", source != NULL ? source : ".", name);
    if (path == NULL) abort();
    return path;
}

static const char *const real_files[] = {"deploy/demo/tinymoe-q4_k_m.gguf",
                                         "tests/golden/micro-f32.gguf"};

static void test_real_files(void)
{
    for (int i = 0; i < 2; i++) {
        char *path = source_path(real_files[i]);
        model *m = NULL;
        model_tokenizer *t = NULL;
        ep_err err = {{0}};
        CHECK_INT(model_open(&m, path, &err), EP_OK);
        if (m == NULL) printf("    %s\n", err.text);
        if (m != NULL) {
            CHECK_INT(model_tokenizer_open(&t, m, &err), EP_OK);
            if (t != NULL) CHECK_INT(model_n_tokens(t), m->shape.vocab);
            const model_tensor *q = m->layers[0].q;
            CHECK_INT(q->ne[0], m->shape.hidden);
            CHECK(i == 1 ? q->type == KERN_F32 : q->type != KERN_F32);
        }
        model_tokenizer_close(t);
        model_close(m);
        ep_free(path);
    }
}

static void test_inspect(void)
{
    for (int i = 0; i < 2; i++) {
        char *path = source_path(real_files[i]);
        ep_buf text = {0}, json = {0};
        ep_err err = {{0}};
        CHECK_INT(model_inspect(path, false, &text, &err), EP_OK);
        CHECK_INT(ep_buf_add(&text, "", 1), EP_OK);
        const char *s = text.data != NULL ? (const char *)text.data : "";
        CHECK(strstr(s, "served: yes") != NULL && strstr(s, "qwen3moe") != NULL);
        CHECK(strstr(s, "blk.0.ffn_gate_exps.weight") != NULL);
        CHECK_INT(model_inspect(path, true, &json, &err), EP_OK);
        json_error_t why;
        json_t *root = json_loadb((const char *)json.data, json.len, JSON_REJECT_DUPLICATES, &why);
        CHECK(root != NULL);
        if (root == NULL) printf("    %s at %d\n", why.text, why.position);
        CHECK(json_is_true(json_object_get(root, "served")));
        CHECK(json_array_size(json_object_get(root, "tensors")) > 20);
        json_decref(root);
        ep_buf_fini(&text);
        ep_buf_fini(&json);
        ep_free(path);
    }
    ep_err err = {{0}};
    ep_buf none = {0};
    CHECK_INT(model_inspect("/nonexistent/x.gguf", false, &none, &err), EP_ERR_IO);
    CHECK(strstr(err.text, "/nonexistent/x.gguf") != NULL);
    ep_buf_fini(&none);
}

/* ---- files in folders ---------------------------------------------------------------------------
 */

static char folder[64];

static char *in_folder(const char *name)
{
    char *path = ep_strfmt("%s/%s", folder, name);
    if (path == NULL) abort();
    return path;
}

static void write_file(const char *name, const void *data, size_t n)
{
    char *path = in_folder(name);
    FILE *f = fopen(path, "wb");
    if (f == NULL || fwrite(data, 1, n, f) != n || fclose(f) != 0) abort();
    ep_free(path);
}

static void remove_file(const char *name)
{
    char *path = in_folder(name);
    unlink(path);
    ep_free(path);
}

static ep_status open_named(const char *name, model_file **f, ep_err *err)
{
    char *path = in_folder(name);
    *f = NULL;
    memset(err, 0, sizeof(*err));
    ep_status status = model_file_open(f, path, err);
    ep_free(path);
    return status;
}

static void refused_named(const char *name, ep_status want, const char *says)
{
    model_file *f;
    ep_err err;
    ep_status status = open_named(name, &f, &err);
    if (status != want || strstr(err.text, says) == NULL) {
        CHECK(false);
        printf("    %s: got %s \"%s\", expected %s and \"%s\"\n", name, ep_status_name(status),
               err.text, ep_status_name(want), says);
    }
    model_file_close(f);
}

/* Part i of 3 with one tensor t<i>; the numbers are what the part says of itself. */
static void write_part(const char *name, int no, int count, int total, const char *tensor)
{
    gb g = gb_make();
    if (no == 0) gb_str(&g, "general.architecture", "none");
    gb_key_int(&g, "split.no", 2, (uint64_t)no);
    gb_key_int(&g, "split.count", 2, (uint64_t)count);
    gb_key_int(&g, "split.tensors.count", 5, (uint64_t)total);
    gb_vector(&g, tensor, (uint64_t)no + 1);
    ep_buf b = gb_bytes(&g);
    write_file(name, b.data, b.len);
    gb_fini(&g);
    ep_buf_fini(&b);
}

static const char *const part_names[] = {"m-00001-of-00003.gguf", "m-00002-of-00003.gguf",
                                         "m-00003-of-00003.gguf"};

static void test_split_files(void)
{
    for (int i = 0; i < 3; i++) {
        char tensor[8];
        snprintf(tensor, sizeof(tensor), "t%d", i);
        write_part(part_names[i], i, 3, 3, tensor);
    }
    for (int i = 0; i < 3; i++) { /* whichever part is named, the whole is found */
        model_file *f;
        ep_err err;
        CHECK_INT(open_named(part_names[i], &f, &err), EP_OK);
        if (f == NULL) {
            printf("    %s\n", err.text);
            continue;
        }
        CHECK_INT(model_file_n_tensors(f), 3);
        const model_tensor *t = model_file_find(f, "t2");
        CHECK(t != NULL && t->ne[0] == 3 && t->data[4] == 4);
        const char *s;
        size_t n;
        CHECK_INT(model_file_str(f, "general.architecture", &s, &n, NULL), EP_OK);
        model_file_close(f);
    }
    for (int n = 1;; n++) { /* every allocation fails once */
        model_file *f;
        ep_err err;
        char *path = in_folder(part_names[1]);
        f = NULL;
        ep_alloc_fail_at(n);
        ep_status status = model_file_open(&f, path, &err);
        ep_alloc_fail_at(0);
        model_file_close(f);
        ep_free(path);
        if (status == EP_OK) break;
        CHECK_INT(status, EP_ERR_NOMEM);
        if (n > 200) {
            CHECK(false);
            break;
        }
    }
    write_part(part_names[1], 1, 3, 3, "t0");
    refused_named(part_names[0], EP_ERR_INVALID, "tensor t0 is there twice");
    write_part(part_names[1], 2, 3, 3, "t1");
    refused_named(part_names[0], EP_ERR_INVALID, "is not part 2 of 3");
    write_part(part_names[1], 1, 4, 3, "t1");
    refused_named(part_names[2], EP_ERR_INVALID, "is not part 2 of 3");
    write_file(part_names[1], "GGUF", 4);
    refused_named(part_names[0], EP_ERR_INVALID, part_names[1]);
    remove_file(part_names[1]);
    refused_named(part_names[2], EP_ERR_IO, "m-00002-of-00003.gguf: part 2 of 3 is missing");
    write_part(part_names[1], 1, 3, 3, "t1");
    write_part(part_names[0], 0, 3, 4, "t0");
    refused_named(part_names[0], EP_ERR_INVALID, "split.tensors.count is 4, but the parts hold 3");
    write_part("other.gguf", 0, 3, 3, "t0");
    refused_named("other.gguf", EP_ERR_INVALID, "siblings cannot be found");
    write_part(part_names[0], 7, 3, 3, "t0");
    refused_named(part_names[0], EP_ERR_INVALID, "split.no 7 of split.count 3");
    for (int i = 0; i < 3; i++)
        remove_file(part_names[i]);
    remove_file("other.gguf");
}

static void test_other_files(void)
{
    refused_named("absent.gguf", EP_ERR_IO, "absent.gguf: No such file");
    refused_named(".", EP_ERR_INVALID, "not a regular file");
    write_file("empty.gguf", "", 0);
    refused_named("empty.gguf", EP_ERR_INVALID, "not a GGUF file (0 bytes)");
    remove_file("empty.gguf");
    write_file("zip.gguf", "PK\3\4.....................", 24);
    refused_named("zip.gguf", EP_ERR_INVALID, "zip.gguf: not a GGUF file");
    remove_file("zip.gguf");
    gb g = gb_make();
    gb_key_int(&g, "split.no", 2, 0);
    gb_key_int(&g, "split.count", 2, 2);
    ep_buf b = gb_bytes(&g);
    model_file *f = NULL;
    ep_err err = {{0}};
    CHECK_INT(model_file_open_bytes(&f, b.data, b.len, &err), EP_ERR_UNSUPPORTED);
    CHECK(strstr(err.text, "one part of a split file") != NULL);
    gb_fini(&g);
    ep_buf_fini(&b);
}

/* What is not served is still shown, with the reason, and strange text does not break the JSON. */
static void test_inspect_strange(void)
{
    change c = {.key = "strange \"key\" \\ \xff",
                .kind = 8,
                .text = "\x01\xc3\x28 \xe2\x82 \"quoted\"",
                .tensor = "blk.0.iq \"\xfe\"",
                .type = 10,
                .ne = {256, 3}};
    ep_buf b = make(&c);
    write_file("strange.gguf", b.data, b.len);
    ep_buf_fini(&b);
    char *path = in_folder("strange.gguf");
    ep_buf text = {0}, json = {0};
    ep_err err = {{0}};
    CHECK_INT(model_inspect(path, false, &text, &err), EP_OK);
    CHECK_INT(ep_buf_add(&text, "", 1), EP_OK);
    const char *s = text.data != NULL ? (const char *)text.data : "";
    CHECK(strstr(s, "served: no, because") != NULL && strstr(s, "Q2_K") != NULL);
    CHECK_INT(model_inspect(path, true, &json, &err), EP_OK);
    json_error_t why;
    json_t *root = json_loadb((const char *)json.data, json.len, 0, &why);
    CHECK(root != NULL && json_is_false(json_object_get(root, "served")));
    json_decref(root);
    ep_buf_fini(&json);
    memset(&json, 0, sizeof(json));
    uint64_t before = ep_alloc_count();
    CHECK_INT(model_inspect(path, true, &json, &err), EP_OK);
    uint64_t allocations = ep_alloc_count() - before;
    ep_buf_fini(&json);
    CHECK(allocations > 10);
    for (uint64_t n = 1; n <= allocations; n++) {
        memset(&json, 0, sizeof(json));
        ep_alloc_fail_at((int64_t)n);
        CHECK_INT(model_inspect(path, true, &json, &err), EP_ERR_NOMEM);
        ep_alloc_fail_at(0);
        ep_buf_fini(&json);
    }
    ep_buf_fini(&text);
    remove_file("strange.gguf");
    ep_free(path);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"files of the repository", test_real_files},        {"inspect", test_inspect},
        {"inspect of a strange file", test_inspect_strange}, {"split files", test_split_files},
        {"files that are none", test_other_files},
    };
    const char *tmp = getenv("TMPDIR");
    snprintf(folder, sizeof(folder), "%s/moed-model-XXXXXX",
             tmp != NULL && strlen(tmp) < 30 ? tmp : "/tmp");
    if (mkdtemp(folder) == NULL) {
        perror(folder);
        return 1;
    }
    int result = test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
    rmdir(folder);
    return result;
}
