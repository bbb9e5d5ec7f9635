/*
 * Fuzzes the GGUF reader and what stands on it: the container, then hyper-parameters and tensors,
 * then the tokenizer. Whatever is accepted is walked to its last byte, and whatever is refused must
 * say why.
 */
#include "model/model.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile unsigned sink;

static void walk_tensors(const model_file *f)
{
    for (size_t i = 0; i < model_file_n_tensors(f); i++) {
        const model_tensor *t = model_file_tensor(f, i);
        if (model_file_find(f, t->name) != t || t->bytes == 0) abort();
        sink += t->data[0];
        sink += t->data[t->bytes - 1];
    }
}

static void walk_array(const model_file *f, const char *key)
{
    size_t n = model_file_arr_len(f, key);
    for (size_t i = 0; i < n; i++) {
        const char *s;
        size_t len;
        int64_t v;
        double d;
        if (model_file_arr_str(f, key, i, &s, &len) == EP_OK && len > 0) {
            sink += (unsigned char)s[0];
            sink += (unsigned char)s[len - 1];
        }
        if (model_file_arr_i64(f, key, i, &v) == EP_OK) sink += (unsigned)v;
        if (model_file_arr_f64(f, key, i, &d) == EP_OK) sink += d > 0;
    }
}

static void walk_model(const model *m)
{
    for (int l = 0; l < m->shape.n_layers; l++)
        for (int role = 0; role < 3; role++) {
            const model_tensor *t = model_experts(m, l, role);
            const uint8_t *p = NULL;
            if (model_rows(m, t, m->shape.n_experts - 1, NULL, &p, NULL) != EP_OK) abort();
            sink += p[0];
            sink += p[model_rows_bytes(t) - 1];
        }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    /* On the heap and of the exact size, aligned as a map is. */
    uint8_t *copy = NULL;
    if (posix_memalign((void **)&copy, 4096, size ? size : 1) != 0) return 0;
    if (size > 0) memcpy(copy, data, size);
    model_file *f = NULL;
    model *m = NULL;
    model_tokenizer *t = NULL;
    ep_err err = {{0}};
    if (model_file_open_bytes(&f, copy, size, &err) != EP_OK) {
        if (err.text[0] == '\0' || f != NULL) abort();
        free(copy);
        return 0;
    }
    walk_tensors(f);
    walk_array(f, "tokenizer.ggml.tokens");
    walk_array(f, "tokenizer.ggml.token_type");
    walk_array(f, "a");
    err.text[0] = '\0';
    if (model_open_file(&m, f, &err) != EP_OK) {
        if (err.text[0] == '\0' || m != NULL) abort();
        free(copy);
        return 0;
    }
    walk_model(m);
    err.text[0] = '\0';
    if (model_tokenizer_open(&t, m, &err) != EP_OK && err.text[0] == '\0') abort();
    model_tokenizer_close(t);
    model_close(m);
    free(copy);
    return 0;
}
