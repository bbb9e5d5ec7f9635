/*
 * `moectl inspect`: what a file holds and what would refuse it, for people or as JSON. It looks at
 * names and numbers only, never at weights, so it is quick on a file of any size. Text from the
 * file is printed escaped: it may hold anything.
 */
#include "model/file.h"
#include "model/hf.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { SHOWN_CHARS = 60, SHOWN_ITEMS = 4 };

/* A printer whose first failure sticks: the only one is memory. */
typedef struct printer {
    ep_buf *out;
    ep_status status;
} printer;

#define PRINT(p, ...)                                                                              \
    ((p)->status = (p)->status != EP_OK ? (p)->status : ep_buf_printf((p)->out, __VA_ARGS__))

/* Length of the well-formed UTF-8 character at s, 0 if there is none. */
static size_t character(const uint8_t *s, size_t n)
{
    size_t need = s[0] < 0x80 ? 1 : s[0] >= 0xf0 ? 4 : s[0] >= 0xe0 ? 3 : s[0] >= 0xc2 ? 2 : 0;
    if (need == 0 || s[0] > 0xf4 || need > n) return 0;
    for (size_t i = 1; i < need; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) ||
        (s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f))
        return 0;
    return need;
}

ep_status model_print_text(ep_buf *out, const char *text, size_t n, size_t most)
{
    printer p = {.out = out};
    const uint8_t *s = (const uint8_t *)text;
    size_t end = n < most ? n : most;
    PRINT(&p, "\"");
    for (size_t i = 0; i < end && p.status == EP_OK;) {
        size_t len = character(s + i, n - i);
        if (len == 0) {
            PRINT(&p, "\\ufffd");
            len = 1;
        } else if (s[i] == '"' || s[i] == '\\') {
            PRINT(&p, "\\%c", s[i]);
        } else if (s[i] < 0x20 || s[i] == 0x7f) {
            PRINT(&p, "\\u%04x", s[i]);
        } else {
            p.status = ep_buf_add(p.out, s + i, len);
        }
        i += len;
    }
    PRINT(&p, end < n ? "...\"" : "\"");
    return p.status;
}

static void print_text(printer *p, const char *text, size_t n, size_t most)
{
    if (p->status == EP_OK) p->status = model_print_text(p->out, text, n, most);
}

static void print_item(printer *p, const gguf_key *k, uint64_t i)
{
    gguf_kind kind = k->kind == GGUF_ARRAY ? k->elem : k->kind;
    bool negative = false;
    uint64_t magnitude = 0;
    double real = 0;
    const char *s;
    size_t n;
    if (kind == GGUF_STRING) {
        if (k->kind == GGUF_STRING)
            print_text(p, (const char *)k->data, k->bytes, SHOWN_CHARS);
        else if (gguf_string_at(k, i, &s, &n))
            print_text(p, s, n, SHOWN_CHARS);
    } else if (kind == GGUF_BOOL) {
        PRINT(p, k->data[i] ? "true" : "false");
    } else if (gguf_int_at(k, i, &negative, &magnitude)) {
        PRINT(p, "%s%" PRIu64, negative ? "-" : "", magnitude);
    } else if (gguf_float_at(k, i, &real) && real - real == 0) {
        PRINT(p, "%.9g", real);
    } else {
        PRINT(p, "null");
    }
}

static void print_value(printer *p, const gguf_key *k, bool json)
{
    if (k->kind != GGUF_ARRAY) {
        print_item(p, k, 0);
        return;
    }
    uint64_t shown = k->n < SHOWN_ITEMS ? k->n : SHOWN_ITEMS;
    if (json)
        PRINT(p, "{\"length\":%" PRIu64 ",\"first\":[", k->n);
    else
        PRINT(p, "%" PRIu64 " x %s [", k->n, gguf_kind_name((int)k->elem));
    for (uint64_t i = 0; i < shown; i++) {
        if (i > 0) PRINT(p, json ? "," : ", ");
        print_item(p, k, i);
    }
    PRINT(p, json ? "]}" : shown < k->n ? ", ...]" : "]");
}

static const char *type_name(int type, char *buf, size_t n)
{
    const char *name = gguf_type_name(type);
    if (name != NULL)
        snprintf(buf, n, "%s", name);
    else
        snprintf(buf, n, "type %d", type);
    return buf;
}

/* Bytes and tensors per type, in order of type. */
static void print_totals(printer *p, const model_file *f, bool json)
{
    bool first = true;
    for (int type = 0; type < 256; type++) {
        uint64_t bytes = 0, count = 0;
        char name[32];
        for (size_t i = 0; i < model_file_n_tensors(f); i++) {
            const model_tensor *t = model_file_tensor(f, i);
            if (t->type != type) continue;
            bytes += t->bytes;
            count++;
        }
        if (count == 0) continue;
        type_name(type, name, sizeof(name));
        if (json)
            PRINT(p, "%s\"%s\":{\"tensors\":%" PRIu64 ",\"bytes\":%" PRIu64 "}", first ? "" : ",",
                  name, count, bytes);
        else
            PRINT(p, "  %-8s %6" PRIu64 " tensors %12.1f MiB%s\n", name, count,
                  (double)bytes / 1048576.0, kern_type_is_served(type) ? "" : "   not served");
        first = false;
    }
}

static void print_tensors(printer *p, const model_file *f, bool json)
{
    for (size_t i = 0; i < model_file_n_tensors(f); i++) {
        const model_tensor *t = model_file_tensor(f, i);
        char shape[96], name[32];
        gguf_shape_text(shape, sizeof(shape), t->n_dims, t->ne);
        type_name(t->type, name, sizeof(name));
        if (json) {
            PRINT(p, "%s{\"name\":", i ? "," : "");
            print_text(p, t->name, strlen(t->name), SIZE_MAX);
            PRINT(p, ",\"type\":\"%s\",\"shape\":%s,\"bytes\":%zu}", name, shape, t->bytes);
        } else {
            PRINT(p, "  %-32s %-8s %-20s %12zu\n", t->name, name, shape, t->bytes);
        }
    }
}

static void print_keys(printer *p, const model_file *f, bool json)
{
    const gguf_part *part = model_file_part(f, 0);
    for (size_t i = 0; i < part->n_keys; i++) {
        const gguf_key *k = &part->keys[i];
        if (json) {
            PRINT(p, "%s", i ? "," : "");
            print_text(p, k->name, k->name_len, SIZE_MAX);
            PRINT(p, ":");
        } else {
            PRINT(p, "  %-44.*s ", (int)(k->name_len < 200 ? k->name_len : 200), k->name);
        }
        print_value(p, k, json);
        if (!json) PRINT(p, "\n");
    }
}

ep_status model_verdict(const char *path, ep_err *why)
{
    model *m = NULL;
    model_tokenizer *t = NULL;
    ep_status status = model_open(&m, path, why);
    if (status == EP_OK) status = model_tokenizer_open(&t, m, why);
    if (status == EP_OK && m->folder != NULL) status = hf_check(m, m->shape.n_layers, why);
    if (status == EP_OK) why->text[0] = '\0';
    model_tokenizer_close(t);
    model_close(m);
    return status == EP_ERR_NOMEM ? status : EP_OK;
}

ep_status model_inspect(const char *path, bool json, ep_buf *out, ep_err *err)
{
    printer p = {.out = out};
    model_file *f;
    ep_err why;
    if (model_safetensors_is(path)) return model_safetensors_inspect(path, json, out, err);
    ep_status status = model_file_open(&f, path, err);
    if (status != EP_OK) return status;
    status = model_verdict(path, &why);
    if (status != EP_OK) {
        model_file_close(f);
        return ep_fail(err, status, "%s", why.text);
    }
    const gguf_part *part = model_file_part(f, 0);
    if (json) {
        PRINT(&p, "{\"file\":");
        print_text(&p, path, strlen(path), SIZE_MAX);
        PRINT(&p, ",\"version\":%u,\"parts\":%zu,\"served\":%s,\"why_not\":", part->version,
              model_file_n_parts(f), why.text[0] ? "false" : "true");
        print_text(&p, why.text, strlen(why.text), SIZE_MAX);
        PRINT(&p, ",\"keys\":{");
        print_keys(&p, f, true);
        PRINT(&p, "},\"types\":{");
        print_totals(&p, f, true);
        PRINT(&p, "},\"tensors\":[");
        print_tensors(&p, f, true);
        PRINT(&p, "]}\n");
    } else {
        PRINT(&p, "%s: GGUF version %u, %zu file%s, %zu keys, %zu tensors\n", path, part->version,
              model_file_n_parts(f), model_file_n_parts(f) == 1 ? "" : "s", part->n_keys,
              model_file_n_tensors(f));
        PRINT(&p, "served: %s%s\n", why.text[0] ? "no, because " : "yes", why.text);
        PRINT(&p, "\nkeys\n");
        print_keys(&p, f, false);
        PRINT(&p, "\ntensors\n");
        print_tensors(&p, f, false);
        PRINT(&p, "\nby type\n");
        print_totals(&p, f, false);
    }
    model_file_close(f);
    return p.status == EP_OK ? EP_OK : ep_fail(err, p.status, "%s: no memory", path);
}
