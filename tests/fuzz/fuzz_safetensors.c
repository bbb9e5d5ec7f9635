/*
 * Fuzzes the safetensors reader. The first byte chooses: 0, a file; 1, an index and two files, a
 * and b; 2, config.json, quantize_config.json and a file, opened as a GPTQ checkpoint whose experts
 * are all read. In front of each part but the last stand two bytes of length. What is accepted must
 * keep its promises: tensors tile the data and are found by name, rows turn back into the words
 * they came from.
 */
#include <stdlib.h>
#include <string.h>
#include "model/gptq.h"

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

static const st_tensor *part_of(const gptq_model *m, int l, int e, int role, const char *part)
{
    static const char *const roles[] = {"gate_proj", "up_proj", "down_proj"};
    char *name = ep_strfmt("model.layers.%d.mlp.experts.%d.%s.%s", l, e, roles[role], part);
    must(name != NULL);
    const st_tensor *t = st_find(gptq_file(m), name);
    ep_free(name);
    must(t != NULL);
    return t;
}

static void check_experts(const gptq_model *m)
{
    const gptq_config *c = gptq_shape(m);
    for (int i = 0; i < c->n_layers * c->n_experts * 3; i++) {
        int role = i % 3, e = i / 3 % c->n_experts, l = i / 3 / c->n_experts;
        int n = role == 2 ? c->hidden : c->inter, k = role == 2 ? c->inter : c->hidden;
        const st_tensor *q = part_of(m, l, e, role, "qweight");
        const st_tensor *s = part_of(m, l, e, role, "scales");
        uint8_t *rows = ep_alloc(gptq_expert_bytes(m, role));
        uint8_t *words = ep_alloc(q->bytes), *halves = ep_alloc(s->bytes);
        must(rows != NULL && words != NULL && halves != NULL);
        ep_err err = {{0}};
        ep_status status = gptq_expert_rows(m, l, role, e, rows, &err);
        must(status == gptq_expert_check(m, l, role, e, NULL));
        if (status == EP_OK) {
            gptq_rows_to_words(n, k, rows, words, halves);
            must(memcmp(words, q->data, q->bytes) == 0 && memcmp(halves, s->data, s->bytes) == 0);
        } else {
            must(err.text[0] != '\0');
        }
        ep_free(rows);
        ep_free(words);
        ep_free(halves);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ep_cursor c = ep_cursor_make(data, size);
    int mode = ep_get_u8(&c);
    ep_err err = {{0}};
    st_file *f = NULL;
    gptq_model *m = NULL;
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
        st_bytes config = take(&c, "config.json", false);
        st_bytes quantize = take(&c, "quantize_config.json", false);
        st_bytes part = take(&c, "a.safetensors", true);
        status = st_open_bytes(&f, &part, 1, NULL, &err);
        if (status == EP_OK)
            status = gptq_open_file(&m, f, &config, quantize.size > 0 ? &quantize : NULL, &err);
        if (status == EP_OK) check_experts(m);
        gptq_close(m);
    } else {
        st_bytes part = take(&c, "a.safetensors", true);
        status = st_open_bytes(&f, &part, 1, NULL, &err);
        if (status == EP_OK) check_file(f, &part, 1);
        st_close(f);
    }
    must(status == EP_OK || err.text[0] != '\0');
    return 0;
}
