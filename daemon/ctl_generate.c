/*
 * `moectl generate` and `moectl perplexity`: the verbs that make tokens flow.
 *
 * generate streams text to standard output as it comes; with --json it prints one object at the
 * end. perplexity cuts a text into full chunks of N tokens, nothing carried over, and scores
 * positions N/2+1 .. N-1 of each: the method of llama-perplexity, so that figures compare. Several
 * chunks are under way at once, so the cluster's batches fill; the sum is made in the order of the
 * chunks.
 */
#include "daemon/ctl.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- generate ---- */

static bool parse_ids(const char *text, int32_t **ids, size_t *n)
{
    size_t cap = strlen(text) / 2 + 2;
    int32_t *list = ep_alloc(cap * sizeof(*list));
    *n = 0;
    while (list != NULL) {
        char *end;
        errno = 0;
        long v = strtol(text, &end, 10);
        if (end == text || errno != 0 || v < 0 || v > INT32_MAX || (*end != ',' && *end != '\0'))
            break;
        list[(*n)++] = (int32_t)v;
        if (*end == '\0') {
            *ids = list;
            return true;
        }
        text = end + 1;
    }
    ep_free(list);
    fprintf(stderr, "moectl: --prompt-ids needs numbers with commas, such as 1,2,3; at '%.20s'\n",
            text);
    return false;
}

typedef struct answer {
    json_t *tokens, *logprobs;
    ep_buf text;
    int64_t first_ns, start_ns;
    bool echo; /* text to standard output as it comes */
} answer;

static void take_text(answer *a, const ProtobufCBinaryData *text)
{
    if (text->len == 0) return;
    (void)ep_buf_add(&a->text, text->data, text->len);
    if (a->echo) {
        fwrite(text->data, 1, text->len, stdout);
        fflush(stdout);
    }
}

static void take_token(answer *a, const Moed__Token *t)
{
    if (a->first_ns == 0) a->first_ns = ep_now().ns;
    json_array_append_new(a->tokens, json_integer(t->token));
    json_t *top = json_array();
    for (size_t i = 0; i < t->n_top; i++)
        json_array_append_new(top, json_pack("{s:i, s:f}", "id", (int)t->top[i]->id, "logprob",
                                             (double)t->top[i]->logprob));
    json_array_append_new(a->logprobs, top);
    take_text(a, &t->text);
}

static void print_object(const ctl_options *o, const answer *a, const Moed__Done *d)
{
    double decode_s = (double)d->decode_ns / 1e9;
    int steps = (int)d->n_generated - 1; /* the first token comes from the prefill */
    json_t *timings = json_pack(
        "{s:f, s:f, s:f, s:f, s:f, s:f}", "queue_ms", (double)d->queue_ns / 1e6, "prefill_ms",
        (double)d->prefill_ns / 1e6, "decode_ms", (double)d->decode_ns / 1e6, "first_token_ms",
        a->first_ns > 0 ? (double)(a->first_ns - a->start_ns) / 1e6 : 0.0, "prefill_tokens_per_s",
        d->prefill_ns > 0 ? (double)d->n_prompt / ((double)d->prefill_ns / 1e9) : 0.0,
        "decode_tokens_per_s", steps > 0 && decode_s > 0 ? (double)steps / decode_s : 0.0);
    json_t *obj = json_pack("{s:i, s:O, s:o, s:s, s:o}", "prompt_tokens", (int)d->n_prompt,
                            "tokens", a->tokens, "text", ctl_json_text(a->text.data, a->text.len),
                            "finish_reason", d->finish, "timings", timings);
    if (o->n_logprobs > 0) json_object_set(obj, "logprobs", a->logprobs);
    json_dumpf(obj, stdout, JSON_COMPACT | JSON_REAL_PRECISION(17));
    printf("\n");
    json_decref(obj);
}

static void print_timings(const Moed__Done *d)
{
    double prefill = (double)d->prefill_ns / 1e9, decode = (double)d->decode_ns / 1e9;
    fprintf(stderr, "[%u prompt tokens in %.0f ms, %u generated in %.0f ms", d->n_prompt,
            prefill * 1e3, d->n_generated, decode * 1e3);
    if (decode > 0 && d->n_generated > 1)
        fprintf(stderr, ", %.1f tokens/s", (d->n_generated - 1) / decode);
    fprintf(stderr, "; %s]\n", d->finish);
}

/* Receives until the request ended. Exit status. */
static int follow(ctl *c, const ctl_options *o, answer *a)
{
    for (;;) {
        proto_frame f;
        if (!ctl_receive(c, &f)) return 1;
        const Moed__Envelope *e = f.envelope;
        int rc = -1;
        if (e->body_case == MOED__ENVELOPE__BODY_TOKEN) {
            take_token(a, e->token);
            if (ferror(stdout))
                rc = 1; /* nobody reads: main says so, the daemon ends the request */
        } else if (e->body_case == MOED__ENVELOPE__BODY_DONE) {
            take_text(a, &e->done->text);
            if (o->json)
                print_object(o, a, e->done);
            else
                printf("\n");
            if (!o->json && isatty(STDERR_FILENO)) print_timings(e->done);
            rc = 0;
        } else if (e->body_case == MOED__ENVELOPE__BODY_FAILED) {
            if (!o->json && a->text.len > 0) printf("\n");
            fprintf(stderr, "moectl: %s\n", e->failed->text);
            rc = 1;
        }
        proto_frame_free(&f);
        if (rc >= 0) return rc;
    }
}

int ctl_generate(const ctl_options *o)
{
    Moed__Generate g = MOED__GENERATE__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    int32_t *ids = NULL;
    size_t n_ids = 0;
    if ((o->prompt != NULL) == (o->prompt_ids != NULL)) {
        fprintf(stderr, "moectl: give either -p TEXT or --prompt-ids 1,2,3\n");
        return 2;
    }
    if (o->prompt_ids != NULL && !parse_ids(o->prompt_ids, &ids, &n_ids)) return 2;
    Moed__Sampling sampling = o->sampling;
    g.sampling = &sampling;
    g.prompt.data = (uint8_t *)o->prompt;
    g.prompt.len = o->prompt != NULL ? strlen(o->prompt) : 0;
    g.has_ids = o->prompt_ids != NULL;
    g.n_prompt_ids = n_ids;
    g.prompt_ids = ids;
    g.max_tokens = (uint32_t)o->n_tokens;
    g.n_logprobs = (uint32_t)o->n_logprobs;
    g.ignore_eos = o->ignore_eos;
    g.deadline_ms = (uint32_t)o->deadline_ms;
    e.body_case = MOED__ENVELOPE__BODY_GENERATE;
    e.generate = &g;
    ctl c;
    answer a = {.tokens = json_array(),
                .logprobs = json_array(),
                .start_ns = ep_now().ns,
                .echo = !o->json};
    int rc = 2;
    if (ctl_open(&c, o->address)) {
        rc = ctl_send(&c, &e, NULL, 0) ? follow(&c, o, &a) : 1;
        ctl_close(&c);
    }
    json_decref(a.tokens);
    json_decref(a.logprobs);
    ep_buf_fini(&a.text);
    ep_free(ids);
    return rc;
}

/* ---- perplexity ---- */

enum { CHUNKS_UNDER_WAY = 8, MAX_TEXT = 15 << 20 };

typedef struct scoring {
    ctl c;
    const int32_t *ids;
    int context, n_chunks, sent, ended;
    double *nll, *nll2; /* per chunk: sums of -logprob and its square */
    int *scored;
} scoring;

static bool send_chunk(scoring *s, int chunk)
{
    Moed__Generate g = MOED__GENERATE__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    g.has_ids = true;
    g.n_prompt_ids = (size_t)s->context;
    g.prompt_ids = (int32_t *)s->ids + (size_t)chunk * (size_t)s->context;
    g.score_from = (uint32_t)s->context / 2 + 1;
    e.body_case = MOED__ENVELOPE__BODY_GENERATE;
    e.generate = &g;
    return ctl_send(&s->c, &e, NULL, 0);
}

static bool take_scores(scoring *s, const Moed__Scores *m)
{
    if (m->id >= (uint64_t)s->n_chunks) return false;
    for (size_t i = 0; i < m->n_logprob; i++) {
        double nll = -m->logprob[i];
        s->nll[m->id] += nll;
        s->nll2[m->id] += nll * nll;
        s->scored[m->id]++;
    }
    return true;
}

static void show_chunk(const scoring *s)
{
    double nll = 0;
    int n = 0;
    for (int i = 0; i < s->n_chunks; i++)
        nll += s->nll[i], n += s->scored[i];
    if (isatty(STDERR_FILENO) && n > 0)
        fprintf(stderr, "\rchunk %d of %d, perplexity so far %.4f ", s->ended, s->n_chunks,
                exp(nll / n));
}

/* The n-th Generate of a connection has number n in answers. */
static bool run_chunks(scoring *s)
{
    while (s->ended < s->n_chunks) {
        while (s->sent < s->n_chunks && s->sent - s->ended < CHUNKS_UNDER_WAY)
            if (!send_chunk(s, s->sent++)) return false;
        proto_frame f;
        if (!ctl_receive(&s->c, &f)) return false;
        const Moed__Envelope *e = f.envelope;
        bool ok = true;
        if (e->body_case == MOED__ENVELOPE__BODY_SCORES) {
            ok = take_scores(s, e->scores);
        } else if (e->body_case == MOED__ENVELOPE__BODY_DONE) {
            s->ended++;
            show_chunk(s);
        } else if (e->body_case == MOED__ENVELOPE__BODY_FAILED) {
            fprintf(stderr, "\nmoectl: chunk %llu: %s\n", (unsigned long long)e->failed->id,
                    e->failed->text);
            ok = false;
        }
        proto_frame_free(&f);
        if (!ok) return false;
    }
    if (isatty(STDERR_FILENO)) fprintf(stderr, "\n");
    return true;
}

static bool read_text(const char *path, ep_buf *out)
{
    FILE *f = fopen(path, "rb");
    if (f == NULL) {
        fprintf(stderr, "moectl: %s: %s\n", path, strerror(errno));
        return false;
    }
    bool ok = true;
    for (size_t n = 1; ok && n > 0;) {
        ok = ep_buf_reserve(out, 1 << 16) == EP_OK && out->len <= MAX_TEXT;
        n = ok ? fread(out->data + out->len, 1, 1 << 16, f) : 0;
        out->len += n;
    }
    if (!ok || ferror(f))
        fprintf(stderr, "moectl: %s: cannot be read, or larger than 15 MiB\n", path);
    ok = ok && !ferror(f);
    fclose(f);
    return ok;
}

static void print_result(const ctl_options *o, const scoring *s)
{
    double nll = 0, nll2 = 0;
    int n = 0;
    for (int i = 0; i < s->n_chunks; i++)
        nll += s->nll[i], nll2 += s->nll2[i], n += s->scored[i];
    double mean = nll / n, ppl = exp(mean), variance = nll2 / n - mean * mean;
    double error = n > 1 && variance > 0 ? ppl * sqrt(variance / (n - 1)) : 0;
    if (o->json)
        printf("{\"tokens\":%d,\"chunks\":%d,\"context\":%d,\"nll\":%.9f,\"ppl\":%.6f,\"stderr\":%."
               "6f}\n",
               n, s->n_chunks, s->context, mean, ppl, error);
    else
        printf("perplexity %.4f +- %.4f over %d tokens (%d chunks of %d), nll %.6f\n", ppl, error,
               n, s->n_chunks, s->context, mean);
}

/* Asks for the context and the ids of the text; fills s. Exit status, 0 to go on. */
static int prepare(const ctl_options *o, scoring *s, const ep_buf *text, proto_frame *tokens)
{
    Moed__StatusQuery q = MOED__STATUS_QUERY__INIT;
    Moed__Tokenize t = MOED__TOKENIZE__INIT;
    Moed__Envelope e = MOED__ENVELOPE__INIT;
    proto_frame f;
    e.body_case = MOED__ENVELOPE__BODY_STATUS_QUERY;
    e.status_query = &q;
    if (!ctl_ask(&s->c, &e, MOED__ENVELOPE__BODY_STATUS, &f)) return 1;
    int context = (int)f.envelope->status->context;
    proto_frame_free(&f);
    s->context = o->context > 0 ? o->context : context < 512 ? context : 512;
    if (s->context > context) {
        fprintf(stderr, "moectl: --ctx %d is more than the model's context of %d\n", s->context,
                context);
        return 2;
    }
    t.text.data = text->data;
    t.text.len = text->len;
    t.plain = true;
    e.body_case = MOED__ENVELOPE__BODY_TOKENIZE;
    e.tokenize = &t;
    if (!ctl_ask(&s->c, &e, MOED__ENVELOPE__BODY_TOKENS, tokens)) return 1;
    s->ids = tokens->envelope->tokens->ids;
    s->n_chunks = (int)(tokens->envelope->tokens->n_ids / (size_t)s->context);
    if (o->chunks > 0 && o->chunks < s->n_chunks) s->n_chunks = o->chunks;
    if (s->n_chunks == 0) {
        fprintf(stderr, "moectl: %s has %zu tokens, a chunk needs %d\n", o->path,
                tokens->envelope->tokens->n_ids, s->context);
        return 1;
    }
    return 0;
}

int ctl_perplexity(const ctl_options *o)
{
    scoring s = {0};
    ep_buf text = {0};
    proto_frame tokens = {0};
    int rc = 2;
    if (o->path == NULL) {
        fprintf(stderr, "moectl: which text? moectl perplexity FILE\n");
        return 2;
    }
    if (!read_text(o->path, &text)) goto done;
    if (!ctl_open(&s.c, o->address)) goto done;
    rc = prepare(o, &s, &text, &tokens);
    if (rc == 0) {
        s.nll = ep_calloc((size_t)s.n_chunks, sizeof(double));
        s.nll2 = ep_calloc((size_t)s.n_chunks, sizeof(double));
        s.scored = ep_calloc((size_t)s.n_chunks, sizeof(int));
        bool ok = s.nll != NULL && s.nll2 != NULL && s.scored != NULL && run_chunks(&s);
        rc = ok ? 0 : 1;
        if (ok) print_result(o, &s);
    }
    ctl_close(&s.c);
done:
    proto_frame_free(&tokens);
    ep_buf_fini(&text);
    ep_free(s.nll);
    ep_free(s.nll2);
    ep_free(s.scored);
    return rc;
}
