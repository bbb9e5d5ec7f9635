/*
 * `moectl inspect` of a safetensors checkpoint: its tensors, and whether it would be served. Like
 * inspect.c it looks at names and numbers, and beyond them only at the small tensors that decide
 * the matter (zero points, group indexes and scales of the first expert of each layer), so it stays
 * quick on a checkpoint of any size.
 */
#include "model/file.h"
#include "model/hf.h"

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

/* What the model is, where it opens. */
static void print_model(printer *p, const char *path, bool json)
{
    model *m = NULL;
    if (model_open(&m, path, NULL) != EP_OK) {
        if (json) PRINT(p, "null");
        return;
    }
    const model_shape *s = &m->shape;
    const char *type = kern_type_name(m->layers[0].gate_exps->type);
    PRINT(p,
          json ? "{\"architecture\":\"%s\",\"layers\":%d,\"experts\":%d,\"hidden\":%d,"
                 "\"inter\":%d,\"expert_type\":\"%s\"}"
               : "%s with %d layers of %d experts, hidden %d, inter %d, experts %s\n",
          s->arch, s->n_layers, s->n_experts, s->hidden, s->inter, type);
    model_close(m);
}

ep_status model_safetensors_inspect(const char *path, bool json, ep_buf *out, ep_err *err)
{
    printer p = {.out = out};
    st_file *f;
    ep_err why;
    ep_status status = model_verdict(path, &why);
    if (status != EP_OK) return ep_fail(err, status, "%s", why.text);
    status = st_open(&f, path, err);
    if (status != EP_OK) return status;
    if (json) {
        PRINT(&p, "{\"file\":");
        print_text(&p, path, SIZE_MAX);
        PRINT(&p,
              ",\"format\":\"safetensors\",\"parts\":%zu,\"served\":%s,\"why_not\":", st_n_parts(f),
              why.text[0] ? "false" : "true");
        print_text(&p, why.text, SIZE_MAX);
        PRINT(&p, ",\"model\":");
        print_model(&p, path, true);
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
        PRINT(&p, "served: %s%s\n", why.text[0] ? "no, because " : "yes", why.text);
        print_model(&p, path, false);
        PRINT(&p, "\nmetadata\n");
        print_notes(&p, f, false);
        PRINT(&p, "\ntensors\n");
        print_tensors(&p, f, false);
        PRINT(&p, "\nby type\n");
        print_totals(&p, f, false);
    }
    st_close(f);
    return p.status == EP_OK ? EP_OK : ep_fail(err, p.status, "%s: no memory", path);
}
