/*
 * Fuzzes the safetensors reader. The first byte chooses: 0, a file; 1, an index and two files, a
 * and b; 2, config.json, quantize_config.json and a file, opened as a model whose tensors are all
 * read. In front of each part but the last stand two bytes of length. What is accepted must
 * keep its promises: tensors tile the data and are found by name, rows turn back into the words
 * they came from.
 */
#include <stdlib.h>
#include <string.h>
#include "model/hf.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(bool ok)
{
    if (!ok) abort();
}

static st_bytes take(ep_cursor *c, const char *name, bool last)
{
    size_t left = ep_cursor_left(c), n = last ? left : ep_get_u16(c);
    if (n > ep_cursor_left(c)) n = ep_cursor_left(c);
    const uint8_t *p = ep_get_bytes(c, n);
    return p != NULL ? (st_bytes){name, p, n} : (st_bytes){name, NULL, 0};
}

/* Where bytes go that are read only to see that they can be. */
static volatile uint8_t sink;

static void check_file(const st_file *f, const st_bytes *parts, size_t n_parts)
{
    size_t total = 0, used = 0;
    for (size_t i = 0; i < st_n_tensors(f); i++) {
        const st_tensor *t = st_tensor_at(f, i);
        char shape[256];
        must(st_find(f, t->name) == t && t->part < st_n_parts(f));
        must(t->name[0] != '\0' && strlen(t->name) <= 512);
        st_shape_text(shape, sizeof(shape), t);
        if (t->bytes > 0) sink = t->data[0] ^ t->data[t->bytes - 1];
        used += t->bytes;
    }
    for (size_t i = 0; i < st_n_parts(f); i++) {
        for (size_t j = 0; j < n_parts; j++) {
            if (strcmp(parts[j].name, st_part_name(f, i)) != 0) continue;
            ep_cursor c = ep_cursor_make(parts[j].data, parts[j].size);
            total += parts[j].size - 8 - (size_t)ep_get_u64(&c);
        }
    }
    must(total == used);
    for (size_t i = 0; i < st_n_notes(f); i++) {
        const char *key, *value;
        st_note(f, i, &key, &value);
        must(key != NULL && value != NULL);
    }
}

/* Codes and scales of a made matrix turn back into the words they came from. */
static void check_words(const model_tensor *t, int i, const uint8_t *rows)
{
    const gptq_matrix *x = &t->parts[i].gptq;
    uint8_t *words = ep_alloc(x->qweight->bytes), *halves = ep_alloc(x->scales->bytes);
    must(words != NULL && halves != NULL);
    gptq_rows_to_words((int)t->ne[1], (int)t->ne[0], rows, words, halves);
    must(memcmp(words, x->qweight->data, x->qweight->bytes) == 0);
    must(memcmp(halves, x->scales->data, x->scales->bytes) == 0);
    ep_free(words);
    ep_free(halves);
}

static void check_tensor(const model *m, const model_tensor *t)
{
    ep_buf made = {0};
    for (int i = 0; i < (int)t->ne[2]; i++) {
        const uint8_t *rows = NULL;
        ep_err err = {{0}};
        ep_status status = model_rows(m, t, i, &made, &rows, &err);
        must(status == EP_OK || err.text[0] != '\0');
        if (status != EP_OK) continue;
        sink = rows[0] ^ rows[model_rows_bytes(t) - 1];
        if (t->type == KERN_GPTQ4) check_words(t, i, rows);
        model_forget(m, t, i);
    }
    ep_buf_fini(&made);
}

static void check_model(const model *m)
{
    check_tensor(m, m->token_embd);
    check_tensor(m, m->output_norm);
    check_tensor(m, m->output);
    for (int l = 0; l < m->shape.n_layers; l++) {
        const model_layer *y = &m->layers[l];
        const model_tensor *t[] = {y->attn_norm, y->q,       y->k,         y->v,
                                   y->o,         y->q_norm,  y->k_norm,    y->ffn_norm,
                                   y->gate_inp,  y->up_exps, y->gate_exps, y->down_exps};
        for (size_t i = 0; i < sizeof(t) / sizeof(t[0]); i++)
            check_tensor(m, t[i]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ep_cursor c = ep_cursor_make(data, size);
    int mode = ep_get_u8(&c);
    ep_err err = {{0}};
    st_file *f = NULL;
    model *m = NULL;
    ep_status status;
    if (c.bad) return 0;
    if (mode == 1) {
        st_bytes index = take(&c, "x.safetensors.index.json", false);
        st_bytes parts[2] = {take(&c, "a.safetensors", false), {"b.safetensors", NULL, 0}};
        parts[1] = take(&c, "b.safetensors", true);
        status = st_open_bytes(&f, parts, 2, &index, &err);
        if (status == EP_OK) check_file(f, parts, 2);
        st_close(f);
    } else if (mode == 2) {
        st_bytes texts[HF_N_TEXTS] = {{NULL, NULL, 0}};
        texts[HF_CONFIG] = take(&c, "config.json", false);
        texts[HF_QUANTIZE] = take(&c, "quantize_config.json", false);
        if (texts[HF_QUANTIZE].size == 0) texts[HF_QUANTIZE].data = NULL;
        st_bytes part = take(&c, "a.safetensors", true);
        status = st_open_bytes(&f, &part, 1, NULL, &err);
        if (status == EP_OK) status = hf_open_file(&m, f, texts, &err);
        if (status == EP_OK) check_model(m);
        model_close(m);
    } else {
        st_bytes part = take(&c, "a.safetensors", true);
        status = st_open_bytes(&f, &part, 1, NULL, &err);
        if (status == EP_OK) check_file(f, &part, 1);
        st_close(f);
    }
    must(status == EP_OK || err.text[0] != '\0');
    return 0;
}
