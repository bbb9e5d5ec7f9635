#ifndef EP_TESTS_TOKENIZER_FIXTURE_H
#define EP_TESTS_TOKENIZER_FIXTURE_H
/*
 * Writes small GGUF files of tokenizer keys only, so that a test or a fuzzer can choose vocabulary,
 * merges and roles freely. Out of memory ends the process: it is a test's own mistake.
 */
#include "base/base.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct fx_file {
    ep_buf bytes;
    uint64_t n_keys;
} fx_file;

static inline void fx_put(ep_buf *b, const void *p, size_t n)
{
    if (ep_buf_add(b, p, n) != EP_OK) abort();
}

static inline void fx_u32(ep_buf *b, uint32_t v)
{
    fx_put(b, &v, sizeof(v));
}
static inline void fx_u64(ep_buf *b, uint64_t v)
{
    fx_put(b, &v, sizeof(v));
}

static inline void fx_text(ep_buf *b, const void *s, size_t n)
{
    fx_u64(b, n);
    fx_put(b, s, n);
}

static inline void fx_begin(fx_file *f)
{
    *f = (fx_file){0};
    fx_put(&f->bytes, "GGUF", 4);
    fx_u32(&f->bytes, 3);
    fx_u64(&f->bytes, 0);
    fx_u64(&f->bytes, 0);
}

static inline void fx_end(fx_file *f)
{
    memcpy(f->bytes.data + 16, &f->n_keys, 8);
}

static inline void fx_key(fx_file *f, const char *key, uint32_t type)
{
    fx_text(&f->bytes, key, strlen(key));
    fx_u32(&f->bytes, type);
    f->n_keys++;
}

static inline void fx_key_str(fx_file *f, const char *key, const char *s)
{
    fx_key(f, key, 8);
    fx_text(&f->bytes, s, strlen(s));
}

static inline void fx_key_u32(fx_file *f, const char *key, uint32_t v)
{
    fx_key(f, key, 4);
    fx_u32(&f->bytes, v);
}

static inline void fx_key_bool(fx_file *f, const char *key, bool v)
{
    uint8_t byte = v;
    fx_key(f, key, 7);
    fx_put(&f->bytes, &byte, 1);
}

/* items: n strings, each a length (u64) and its bytes. */
static inline void fx_key_strs(fx_file *f, const char *key, const ep_buf *items, uint64_t n)
{
    fx_key(f, key, 9);
    fx_u32(&f->bytes, 8);
    fx_u64(&f->bytes, n);
    if (items->len > 0) fx_put(&f->bytes, items->data, items->len);
}

static inline void fx_key_i32s(fx_file *f, const char *key, const int32_t *v, uint64_t n)
{
    fx_key(f, key, 9);
    fx_u32(&f->bytes, 5);
    fx_u64(&f->bytes, n);
    fx_put(&f->bytes, v, n * sizeof(*v));
}

/* A vocabulary in the making: the 256 byte tokens first (id = byte), then what is added. */
typedef struct fx_vocab {
    ep_buf tokens, merges;
    int n_tokens, n_merges;
    int32_t types[4096];
    const char *model, *pre; /* NULL: the key is left out */
    int eos, bos, adds_bos;  /* -1: left out */
    int skip_byte;           /* -1, or a byte whose token is given another text */
    int n_types;             /* -1: one per token; else so many entries; 0: left out */
} fx_vocab;

/* The character that stands for a byte, as UTF-8; returns its length. */
static inline size_t fx_byte_char(int byte, char out[2])
{
    int code = byte, other = 256;
    for (int b = 0; b <= byte; b++) {
        bool prints = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        code = prints ? b : other++;
    }
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    out[0] = (char)(0xC0 | code >> 6);
    out[1] = (char)(0x80 | (code & 0x3F));
    return 2;
}

static inline int fx_token_n(fx_vocab *v, const void *text, size_t n, int32_t type)
{
    if (v->n_tokens == 4096) abort();
    fx_text(&v->tokens, text, n);
    v->types[v->n_tokens] = type;
    return v->n_tokens++;
}

static inline int fx_token(fx_vocab *v, const char *text, int32_t type)
{
    return fx_token_n(v, text, strlen(text), type);
}

static inline void fx_merge(fx_vocab *v, const char *text)
{
    fx_text(&v->merges, text, strlen(text));
    v->n_merges++;
}

static inline void fx_vocab_init(fx_vocab *v)
{
    *v = (fx_vocab){.model = "gpt2", .pre = "qwen2", .eos = -1, .bos = -1, .adds_bos = -1};
    v->skip_byte = v->n_types = -1;
}

static inline void fx_vocab_bytes(fx_vocab *v)
{
    for (int b = 0; b < 256; b++) {
        char c[2];
        size_t n = fx_byte_char(b, c);
        fx_token_n(v, b == v->skip_byte ? "<gone>" : c, b == v->skip_byte ? 6 : n, 1);
    }
}

/* The file of a vocabulary; the caller frees it with ep_buf_fini. */
static inline ep_buf fx_vocab_file(const fx_vocab *v)
{
    fx_file f;
    fx_begin(&f);
    fx_key_str(&f, "general.architecture", "qwen3moe");
    if (v->model != NULL) fx_key_str(&f, "tokenizer.ggml.model", v->model);
    if (v->pre != NULL) fx_key_str(&f, "tokenizer.ggml.pre", v->pre);
    fx_key_strs(&f, "tokenizer.ggml.tokens", &v->tokens, (uint64_t)v->n_tokens);
    fx_key_strs(&f, "tokenizer.ggml.merges", &v->merges, (uint64_t)v->n_merges);
    int n_types = v->n_types < 0 ? v->n_tokens : v->n_types;
    if (n_types > 0) fx_key_i32s(&f, "tokenizer.ggml.token_type", v->types, (uint64_t)n_types);
    if (v->eos >= 0) fx_key_u32(&f, "tokenizer.ggml.eos_token_id", (uint32_t)v->eos);
    if (v->bos >= 0) fx_key_u32(&f, "tokenizer.ggml.bos_token_id", (uint32_t)v->bos);
    if (v->adds_bos >= 0) fx_key_bool(&f, "tokenizer.ggml.add_bos_token", v->adds_bos != 0);
    fx_end(&f);
    return f.bytes;
}

static inline void fx_vocab_fini(fx_vocab *v)
{
    ep_buf_fini(&v->tokens);
    ep_buf_fini(&v->merges);
}

#endif
