#ifndef EP_DAEMON_CTL_H
#define EP_DAEMON_CTL_H
/*
 * ctl: what the verbs of moectl share: a blocking connection that sends and receives frames, and
 * output. One thread. Exit statuses: 0 success, 1 the request failed, 2 usage, configuration or no
 * daemon.
 */
#include "base/base.h"
#include "proto/frame.h"

#include <stdio.h>

typedef struct ctl {
    int fd;
    ep_buf in;
    size_t taken; /* bytes of `in` already given out */
} ctl;

/* Connects to "unix:PATH" or "tcp:HOST:PORT"; prints why not and returns false. */
bool ctl_open(ctl *c, const char *address);
void ctl_close(ctl *c);
bool ctl_send(ctl *c, const Moed__Envelope *e, const void *payload, size_t payload_bytes);
/* The next frame; its payload lives until the next call. False at the end of the connection or
 * nonsense, with a message on standard error. */
bool ctl_receive(ctl *c, proto_frame *f);
/* Sends a question and gives the answer if it is of the kind; prints a Failed or anything else. */
bool ctl_ask(ctl *c, const Moed__Envelope *question, Moed__Envelope__BodyCase kind,
             proto_frame *answer);

typedef struct ctl_options {
    const char *address; /* of the daemon */
    bool json;
    const char *prompt, *prompt_ids, *in_path, *out_path, *path, *path2;
    int n_paths, n_threads, n_tokens, n_logprobs, context, layer, chunks;
    bool ignore_eos;
    int deadline_ms;
    Moed__Sampling sampling;
} ctl_options;

int ctl_generate(const ctl_options *o);
int ctl_perplexity(const ctl_options *o);
int ctl_forward(const ctl_options *o);
int ctl_status(const ctl_options *o);
int ctl_stats(const ctl_options *o);
int ctl_drain(const ctl_options *o);
int ctl_inspect(const ctl_options *o);
int ctl_pack(const ctl_options *o);

/* ctl_show.c: bytes as a string of JSON (jansson's); what is no UTF-8 becomes U+FFFD. */
struct json_t *ctl_json_text(const void *bytes, size_t n);

/* ctl_npy.c: arrays of rows x columns in NumPy's format, little-endian f4, or bfloat16 as two raw
 * bytes (descr "<V2", what ml_dtypes writes) or u2. Returns false with a message. *values is
 * ep_alloc'ed. */
typedef struct ctl_array {
    uint64_t rows, columns;
    bool bf16;
    char descr[16];
    uint8_t *values;
    size_t bytes;
} ctl_array;
bool ctl_npy_read(const char *path, ctl_array *out);
bool ctl_npy_write(const char *path, const ctl_array *a);

#endif
