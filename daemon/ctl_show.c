/*
 * `moectl status`, `stats`, `drain` and `inspect`: questions with one answer.
 */
#include "daemon/ctl.h"
#include "model/model.h"

#include <jansson.h>
#include <string.h>

static double mib(uint64_t bytes)
{
    return (double)bytes / 1048576.0;
}

static void dump(json_t *obj)
{
    json_dumpf(obj, stdout, JSON_COMPACT);
    printf("\n");
    json_decref(obj);
}

json_t *ctl_json_text(const void *bytes, size_t n)
{
    const char *p = bytes;
    ep_buf out = {0};
    for (size_t i = 0; i < n;) {
        size_t len = 1;
        json_t *probe = NULL;
        for (size_t l = 1; l <= 4 && i + l <= n && probe == NULL; l++) {
            probe = json_stringn(p + i, l);
            len = probe != NULL ? l : 1;
        }
        (void)ep_buf_add(&out, probe != NULL ? p + i : "\xef\xbf\xbd", probe != NULL ? len : 3);
        json_decref(probe);
        i += len;
    }
    json_t *s = json_stringn(out.len > 0 ? (const char *)out.data : "", out.len);
    ep_buf_fini(&out);
    return s;
}

/* A path or a name from a file may hold any bytes. */
static json_t *words(const char *s)
{
    return ctl_json_text(s, strlen(s));
}

static json_t *integer(uint64_t v)
{
    return json_integer((json_int_t)v);
}

/* ---- status ---- */

static void status_json(const Moed__Status *s)
{
    json_t *ranks = json_array();
    for (size_t i = 0; i < s->n_ranks; i++) {
        const Moed__RankStatus *r = s->ranks[i];
        json_array_append_new(
            ranks,
            json_pack("{s:i, s:s, s:o, s:o, s:o, s:s, s:o, s:o, s:o, s:o, s:o, s:s, s:o, s:i}",
                      "rank", (int)r->rank, "role", r->role, "name", words(r->name), "host",
                      words(r->host), "pid", integer(r->pid), "state", r->state, "describe",
                      words(r->describe), "done_bytes", integer(r->done_bytes), "all_bytes",
                      integer(r->all_bytes), "weight_bytes", integer(r->weight_bytes), "rss_bytes",
                      integer(r->rss_bytes), "experts", r->experts, "data_address",
                      words(r->data_address), "running", (int)r->running));
    }
    dump(json_pack(
        "{s:s, s:s, s:o, s:o, s:i, s:i, s:o, s:o, s:o, s:o, s:{s:i, s:i, s:i, s:i, s:i, s:i}, s:o}",
        "version", s->version, "state", s->state, "model", words(s->model), "model_name",
        words(s->model_name), "running", (int)s->running, "waiting", (int)s->waiting, "completed",
        integer(s->completed), "failed", integer(s->failed), "launches", integer(s->launches),
        "uptime_ms", integer(s->uptime_ms), "shape", "vocab", (int)s->vocab, "context",
        (int)s->context, "layers", (int)s->n_layers, "experts", (int)s->n_experts, "top_k",
        (int)s->top_k, "hidden", (int)s->hidden, "ranks", ranks));
}

static void status_text(const Moed__Status *s)
{
    printf("moed %s is %s: %s (%s)\n", s->version, s->state, s->model_name, s->model);
    printf("%u layers, %u experts, top-%u, hidden %u, vocabulary %u, context %u\n", s->n_layers,
           s->n_experts, s->top_k, s->hidden, s->vocab, s->context);
    printf("%u running, %u waiting, %llu completed, %llu failed; up %.0f s, launch %llu\n\n",
           s->running, s->waiting, (unsigned long long)s->completed, (unsigned long long)s->failed,
           (double)s->uptime_ms / 1e3, (unsigned long long)s->launches);
    printf("%-5s %-7s %-10s %-14s %-8s %-9s %12s %9s  %s\n", "rank", "role", "name", "host", "pid",
           "state", "weights MiB", "RSS MiB", "");
    for (size_t i = 0; i < s->n_ranks; i++) {
        const Moed__RankStatus *r = s->ranks[i];
        printf("%-5u %-7s %-10s %-14s %-8llu %-9s %12.1f %9.1f  %s", r->rank, r->role, r->name,
               r->host, (unsigned long long)r->pid, r->state, mib(r->weight_bytes),
               mib(r->rss_bytes), r->describe);
        if (r->experts[0] != '\0') printf(", experts %s", r->experts);
        if (strcmp(r->state, "loading") == 0 && r->all_bytes > 0)
            printf(", %.0f %%", 100.0 * (double)r->done_bytes / (double)r->all_bytes);
        printf("\n");
    }
}

/* One question, one answer of a kind, shown as the options say. Exit status. */
static int show(const ctl_options *o, const Moed__Envelope *question, Moed__Envelope__BodyCase kind,
                void (*print)(const ctl_options *o, const Moed__Envelope *answer))
{
    proto_frame f;
    ctl c;
    if (!ctl_open(&c, o->address)) return 2;
    bool ok = ctl_ask(&c, question, kind, &f);
    if (ok) {
        print(o, f.envelope);
        proto_frame_free(&f);
    }
    ctl_close(&c);
    return ok ? 0 : 1;
}

static void print_status(const ctl_options *o, const Moed__Envelope *e)
{
    (o->json ? status_json : status_text)(e->status);
}

int ctl_status(const ctl_options *o)
{
    Moed__StatusQuery q = MOED__STATUS_QUERY__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    e.body_case = MOED__ENVELOPE__BODY_STATUS_QUERY;
    e.status_query = &q;
    return show(o, &e, MOED__ENVELOPE__BODY_STATUS, print_status);
}

/* ---- stats ---- */

static json_t *layer_json(const Moed__LayerStats *l, bool router)
{
    json_t *obj = json_pack("{s:i, s:o, s:o, s:o, s:o}", "layer", (int)l->layer, "rows",
                            integer(l->rows), "slices", integer(l->slices), "bytes_in",
                            integer(l->bytes_in), "bytes_out", integer(l->bytes_out));
    if (router) {
        json_object_set_new(obj, "resent", integer(l->resent));
        json_object_set_new(obj, "attention_ns", integer(l->attention_ns));
        json_object_set_new(obj, "gate_ns", integer(l->gate_ns));
        json_object_set_new(obj, "plan_ns", integer(l->plan_ns));
        json_object_set_new(obj, "scatter_ns", integer(l->scatter_ns));
        json_object_set_new(obj, "wait_ns", integer(l->wait_ns));
        json_object_set_new(obj, "combine_ns", integer(l->combine_ns));
    } else {
        json_object_set_new(obj, "pairs", integer(l->pairs));
        json_object_set_new(obj, "compute_ns", integer(l->compute_ns));
    }
    return obj;
}

static void stats_json(const Moed__Stats *s)
{
    json_t *ranks = json_array();
    for (size_t i = 0; i < s->n_ranks; i++) {
        const Moed__RankStats *r = s->ranks[i];
        bool router = strcmp(r->role, "router") == 0;
        json_t *layers = json_array(), *experts = json_array(), *counters = json_object();
        for (size_t j = 0; j < r->n_layers; j++)
            json_array_append_new(layers, layer_json(r->layers[j], router));
        for (size_t j = 0; j < r->n_experts; j++)
            json_array_append_new(experts,
                                  json_pack("{s:i, s:i, s:o}", "layer", (int)r->experts[j]->layer,
                                            "expert", (int)r->experts[j]->expert, "rows",
                                            integer(r->experts[j]->rows)));
        for (size_t j = 0; j < r->n_counters; j++)
            json_object_set_new(counters, r->counters[j]->name, integer(r->counters[j]->value));
        json_array_append_new(
            ranks, json_pack("{s:i, s:s, s:o, s:o, s:o, s:o, s:o}", "rank", (int)r->rank, "role",
                             r->role, "name", words(r->name), "describe", words(r->describe),
                             "layers", layers, "experts", experts, "counters", counters));
    }
    dump(json_pack("{s:o}", "ranks", ranks));
}

static double ms(uint64_t ns)
{
    return (double)ns / 1e6;
}

static void rank_text(const Moed__RankStats *r)
{
    bool router = strcmp(r->role, "router") == 0;
    printf("%s %s (rank %u): %s\n", r->role, r->name, r->rank, r->describe);
    if (router)
        printf("  %5s %9s %8s %7s %10s %10s %9s %8s %8s %9s %9s %9s\n", "layer", "rows", "slices",
               "resent", "KiB out", "KiB in", "attn ms", "gate ms", "plan ms", "scatter", "wait ms",
               "combine");
    else
        printf("  %5s %9s %9s %8s %10s %10s %11s\n", "layer", "rows", "pairs", "slices", "KiB in",
               "KiB out", "compute ms");
    for (size_t i = 0; i < r->n_layers; i++) {
        const Moed__LayerStats *l = r->layers[i];
        if (router)
            printf("  %5u %9llu %8llu %7llu %10.0f %10.0f %9.1f %8.1f %8.1f %9.1f %9.1f %9.1f\n",
                   l->layer, (unsigned long long)l->rows, (unsigned long long)l->slices,
                   (unsigned long long)l->resent, (double)l->bytes_out / 1024,
                   (double)l->bytes_in / 1024, ms(l->attention_ns), ms(l->gate_ns), ms(l->plan_ns),
                   ms(l->scatter_ns), ms(l->wait_ns), ms(l->combine_ns));
        else
            printf("  %5u %9llu %9llu %8llu %10.0f %10.0f %11.1f\n", l->layer,
                   (unsigned long long)l->rows, (unsigned long long)l->pairs,
                   (unsigned long long)l->slices, (double)l->bytes_in / 1024,
                   (double)l->bytes_out / 1024, ms(l->compute_ns));
    }
    if (!router && r->n_experts > 0) {
        printf("  rows per expert:\n");
        for (size_t i = 0; i < r->n_experts; i++) {
            const Moed__ExpertStats *x = r->experts[i];
            if (i == 0 || x->layer != r->experts[i - 1]->layer)
                printf("%s  %5u", i ? "\n" : "", x->layer);
            printf(" %u:%llu", x->expert, (unsigned long long)x->rows);
        }
        printf("\n");
    }
    for (size_t i = 0; i < r->n_counters; i++)
        printf("%s%s %llu",
               i == 0       ? "  "
               : i % 5 == 0 ? "\n  "
                            : ", ",
               r->counters[i]->name, (unsigned long long)r->counters[i]->value);
    printf("\n\n");
}

static void print_stats(const ctl_options *o, const Moed__Envelope *e)
{
    if (o->json)
        stats_json(e->stats);
    else
        for (size_t i = 0; i < e->stats->n_ranks; i++)
            rank_text(e->stats->ranks[i]);
}

int ctl_stats(const ctl_options *o)
{
    Moed__StatsQuery q = MOED__STATS_QUERY__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    e.body_case = MOED__ENVELOPE__BODY_STATS_QUERY;
    e.stats_query = &q;
    return show(o, &e, MOED__ENVELOPE__BODY_STATS, print_stats);
}

/* ---- drain, inspect ---- */

static void print_drained(const ctl_options *o, const Moed__Envelope *e)
{
    (void)e;
    printf(o->json ? "{\"drained\":true}\n" : "drained\n");
}

int ctl_drain(const ctl_options *o)
{
    Moed__Drain d = MOED__DRAIN__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    e.body_case = MOED__ENVELOPE__BODY_DRAIN;
    e.drain = &d;
    return show(o, &e, MOED__ENVELOPE__BODY_DRAINED, print_drained);
}

int ctl_inspect(const ctl_options *o)
{
    ep_buf text = {0};
    ep_err err = {""};
    if (o->path == NULL) {
        fprintf(stderr, "moectl: which model? moectl inspect MODEL\n");
        return 2;
    }
    ep_status status = model_inspect(o->path, o->json, &text, &err);
    if (status == EP_OK)
        fwrite(text.data, 1, text.len, stdout);
    else
        fprintf(stderr, "%s\n", err.text);
    ep_buf_fini(&text);
    return status == EP_OK ? 0 : 2;
}
