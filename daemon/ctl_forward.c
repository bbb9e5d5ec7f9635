/*
 * `moectl forward`: hidden states from a .npy file through one MoE layer. The daemon only tells
 * where the router serves tensors; the values go there directly, in pieces of a bounded size.
 */
#include "daemon/ctl.h"

#include <jansson.h>
#include <string.h>

enum { ROWS_PER_MESSAGE = 4096 };

/* The data address of the first router that is ready, and the model's shape. Exit status, 0 to go
 * on. */
static int find_router(const ctl_options *o, char *address, size_t n, uint32_t *n_layers,
                       uint32_t *hidden)
{
    Moed__StatusQuery q = MOED__STATUS_QUERY__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    proto_frame f;
    ctl c;
    int rc = 1;
    e.body_case = MOED__ENVELOPE__BODY_STATUS_QUERY;
    e.status_query = &q;
    if (!ctl_open(&c, o->address)) return 2;
    if (ctl_ask(&c, &e, MOED__ENVELOPE__BODY_STATUS, &f)) {
        const Moed__Status *s = f.envelope->status;
        *n_layers = s->n_layers;
        *hidden = s->hidden;
        for (size_t i = 0; i < s->n_ranks && rc != 0; i++)
            if (strcmp(s->ranks[i]->role, "router") == 0 &&
                strcmp(s->ranks[i]->state, "ready") == 0) {
                snprintf(address, n, "%s", s->ranks[i]->data_address);
                rc = 0;
            }
        if (rc != 0) fprintf(stderr, "moectl: no router is ready (the daemon is %s)\n", s->state);
        proto_frame_free(&f);
    }
    ctl_close(&c);
    return rc;
}

/* Rows first .. first + rows - 1 of `in`; the answer overwrites them. */
static bool forward_rows(ctl *c, const ctl_options *o, ctl_array *a, uint64_t first, uint64_t rows)
{
    Moed__Forward m = MOED__FORWARD__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    size_t row_bytes = (size_t)a->columns * (a->bf16 ? 2 : 4);
    uint8_t *at = a->values + (size_t)first * row_bytes;
    proto_frame f;
    m.layer = (uint32_t)o->layer;
    m.rows = (uint32_t)rows;
    m.hidden = (uint32_t)a->columns;
    m.dtype = a->bf16 ? MOED__DTYPE__BF16 : MOED__DTYPE__F32;
    e.body_case = MOED__ENVELOPE__BODY_FORWARD;
    e.forward = &m;
    if (!ctl_send(c, &e, at, (size_t)rows * row_bytes) || !ctl_receive(c, &f)) return false;
    const Moed__Envelope *reply = f.envelope;
    bool ok = reply->body_case == MOED__ENVELOPE__BODY_FORWARD_REPLY &&
              f.payload_bytes == (size_t)rows * row_bytes;
    if (ok)
        memcpy(at, f.payload, f.payload_bytes);
    else
        fprintf(stderr, "moectl: %s\n",
                reply->body_case == MOED__ENVELOPE__BODY_FAILED ? reply->failed->text
                                                                : "unexpected answer");
    proto_frame_free(&f);
    return ok;
}

static void print_object(const ctl_options *o, const ctl_array *a)
{
    json_t *obj =
        json_pack("{s:i, s:I, s:I, s:o}", "layer", o->layer, "rows", (json_int_t)a->rows, "hidden",
                  (json_int_t)a->columns, "out", ctl_json_text(o->out_path, strlen(o->out_path)));
    json_dumpf(obj, stdout, JSON_COMPACT);
    printf("\n");
    json_decref(obj);
}

int ctl_forward(const ctl_options *o)
{
    char address[256];
    uint32_t n_layers, hidden;
    ctl_array a = {0};
    ctl c = {.fd = -1};
    int rc = 2;
    if (o->layer < 0 || o->in_path == NULL || o->out_path == NULL) {
        fprintf(stderr, "moectl: give --layer L --in X.npy --out Y.npy\n");
        return 2;
    }
    if (!ctl_npy_read(o->in_path, &a)) goto done;
    rc = find_router(o, address, sizeof(address), &n_layers, &hidden);
    if (rc != 0) goto done;
    rc = 2;
    if ((uint32_t)o->layer >= n_layers) {
        fprintf(stderr, "moectl: --layer %d: the model has layers 0 to %u\n", o->layer,
                n_layers - 1);
        goto done;
    }
    if (a.columns != hidden) {
        fprintf(stderr, "moectl: %s has %llu columns, the model's hidden size is %u\n", o->in_path,
                (unsigned long long)a.columns, hidden);
        goto done;
    }
    if (!ctl_open(&c, address)) goto done;
    rc = 0;
    for (uint64_t at = 0; at < a.rows && rc == 0; at += ROWS_PER_MESSAGE) {
        uint64_t rows = a.rows - at < ROWS_PER_MESSAGE ? a.rows - at : ROWS_PER_MESSAGE;
        if (!forward_rows(&c, o, &a, at, rows)) rc = 1;
    }
    if (rc == 0 && !ctl_npy_write(o->out_path, &a)) rc = 2;
    if (rc == 0 && o->json) print_object(o, &a);
done:
    ctl_close(&c);
    ep_free(a.values);
    return rc;
}
