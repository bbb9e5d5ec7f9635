/*
 * `moectl inspect` of a safetensors checkpoint: its tensors, and whether its experts can be read as
 * GPTQ. Like inspect.c it looks at names and numbers, and beyond them only at the small tensors
 * that decide the matter (zero points, group indexes and scales of the first expert of each layer),
 * so it stays quick on a checkpoint of any size.
 */
#include "model/file.h"
#include "model/gptq.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { SHOWN_CHARS = 60 };

/* A printer whose first failure sticks: the only one is memory. */
typedef struct printer {
    ep_buf *out;
    ep_status status;
} printer;

#define PRINT(p, ...)                                                                              \
    ((p)->status = (p)->status != EP_OK ? (p)->status : ep_buf_printf((p)->out, __VA_ARGS__))

static void print_text(printer *p, const char *s, size_t most)
{
    if (p->status == EP_OK) p->status = model_print_text(p->out, s, strlen(s), most);
}

static void print_notes(printer *p, const st_file *f, bool json)
{
    for (size_t i = 0; i < st_n_notes(f); i++) {
        const char *key, *value;
        st_note(f, i, &key, &value);
        PRINT(p, json ? (i ? "," : "") : "  ");
        print_text(p, key, json ? SIZE_MAX : SHOWN_CHARS);
        PRINT(p, json ? ":" : " ");
        print_text(p, value, SHOWN_CHARS);
        if (!json) PRINT(p, "\n");
    }
}

static void print_tensors(printer *p, const st_file *f, bool json)
{
    char shape[256];
    for (size_t i = 0; i < st_n_tensors(f); i++) {
        const st_tensor *t = st_tensor_at(f, i);
        st_shape_text(shape, sizeof(shape), t);
        if (!json) {
            PRINT(p, "  %-56s %-8s %-20s %12zu\n", t->name, st_type_name(t->type), shape, t->bytes);
            continue;
        }
        PRINT(p, "%s{\"name\":", i ? "," : "");
        print_text(p, t->name, SIZE_MAX);
        PRINT(p, ",\"type\":\"%s\",\"shape\":%s,\"bytes\":%zu,\"file\":", st_type_name(t->type),
              shape, t->bytes);
        print_text(p, st_part_name(f, t->part), SIZE_MAX);
        PRINT(p, "}");
    }
}

static void print_totals(printer *p, const st_file *f, bool json)
{
    bool first = true;
    for (int type = 0; type < ST_N_TYPES; type++) {
        uint64_t bytes = 0, count = 0;
        for (size_t i = 0; i < st_n_tensors(f); i++) {
            const st_tensor *t = st_tensor_at(f, i);
            if ((int)t->type != type) continue;
            bytes += t->bytes;
            count++;
        }
        if (count == 0) continue;
        if (json)
            PRINT(p, "%s\"%s\":{\"tensors\":%" PRIu64 ",\"bytes\":%" PRIu64 "}", first ? "" : ",",
                  st_type_name((st_type)type), count, bytes);
        else
            PRINT(p, "  %-8s %6" PRIu64 " tensors %12.1f MiB\n", st_type_name((st_type)type), count,
                  (double)bytes / 1048576.0);
        first = false;
    }
}

/* Opens the experts, or says why not. */
static gptq_model *open_experts(const char *path, ep_err *why)
{
    gptq_model *m = NULL;
    why->text[0] = '\0';
    if (gptq_open(&m, path, why) != EP_OK) return NULL;
    ep_status status = EP_OK;
    for (int l = 0; l < gptq_shape(m)->n_layers && status == EP_OK; l++)
        for (int role = 0; role < 3 && status == EP_OK; role++)
            status = gptq_expert_check(m, l, role, 0, why);
    if (status == EP_OK) return m;
    gptq_close(m);
    return NULL;
}

static void print_experts(printer *p, const gptq_model *m, const ep_err *why, bool json)
{
    const gptq_config *c = m != NULL ? gptq_shape(m) : NULL;
    if (json) {
        PRINT(p, "{\"readable\":%s,\"why_not\":", m != NULL ? "true" : "false");
        print_text(p, why->text, SIZE_MAX);
        if (c != NULL)
            PRINT(p,
                  ",\"architecture\":\"qwen3_moe\",\"layers\":%d,\"experts\":%d,\"hidden\":%d,"
                  "\"inter\":%d,\"bits\":4,\"group\":%d",
                  c->n_layers, c->n_experts, c->hidden, c->inter, GPTQ_GROUP);
        PRINT(p, "}");
    } else if (c != NULL) {
        PRINT(p,
              "experts: readable (GPTQ, 4 bits, groups of %d), qwen3_moe with %d layers of %d "
              "experts, "
              "hidden %d, inter %d\n",
              GPTQ_GROUP, c->n_layers, c->n_experts, c->hidden, c->inter);
    } else {
        PRINT(p, "experts: not readable, because %s\n", why->text);
    }
}

ep_status model_safetensors_inspect(const char *path, bool json, ep_buf *out, ep_err *err)
{
    printer p = {.out = out};
    st_file *f;
    ep_err why;
    ep_status status = st_open(&f, path, err);
    if (status != EP_OK) return status;
    gptq_model *m = open_experts(path, &why);
    if (json) {
        PRINT(&p, "{\"file\":");
        print_text(&p, path, SIZE_MAX);
        PRINT(&p, ",\"format\":\"safetensors\",\"parts\":%zu,\"served\":false,\"why_not\":",
              st_n_parts(f));
        print_text(&p, MODEL_NO_SAFETENSORS, SIZE_MAX);
        PRINT(&p, ",\"experts\":");
        print_experts(&p, m, &why, true);
        PRINT(&p, ",\"keys\":{");
        print_notes(&p, f, true);
        PRINT(&p, "},\"types\":{");
        print_totals(&p, f, true);
        PRINT(&p, "},\"tensors\":[");
        print_tensors(&p, f, true);
        PRINT(&p, "]}\n");
    } else {
        PRINT(&p, "%s: safetensors, %zu file%s, %zu tensors\n", path, st_n_parts(f),
              st_n_parts(f) == 1 ? "" : "s", st_n_tensors(f));
        PRINT(&p, "served: no, because %s\n", MODEL_NO_SAFETENSORS);
        print_experts(&p, m, &why, false);
        PRINT(&p, "\nmetadata\n");
        print_notes(&p, f, false);
        PRINT(&p, "\ntensors\n");
        print_tensors(&p, f, false);
        PRINT(&p, "\nby type\n");
        print_totals(&p, f, false);
    }
    gptq_close(m);
    st_close(f);
    return p.status == EP_OK ? EP_OK : ep_fail(err, p.status, "%s: no memory", path);
}
