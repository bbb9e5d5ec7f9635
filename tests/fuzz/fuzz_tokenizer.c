/*
 * Fuzzes the tokenizer. The first byte chooses: even, the rest is text for a fixed vocabulary under
 * one of the known patterns; odd, the rest are lines that make a vocabulary (t, c, u: a normal,
 * control or user-defined token; m: a merge; e, b: end and begin token; p: pattern; anything else:
 * text to encode). Whatever is accepted must give every text back byte for byte, with ids in range.
 */
#include "model/model.h"
#include "tests/tokenizer_fixture.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char *const patterns[] = {"qwen2",  "qwen35", "llama-bpe",  "gpt-2",
                                       "smollm", "gpt-4o", "deepseek-v3"};
enum { N_PATTERNS = sizeof(patterns) / sizeof(patterns[0]) };

static model_tokenizer *open_vocab(const fx_vocab *v)
{
    ep_buf bytes = fx_vocab_file(v);
    model_file *f = NULL;
    model_tokenizer *t = NULL;
    ep_err err;
    if (model_file_open_bytes(&f, bytes.data, bytes.len, &err) == EP_OK &&
        model_tokenizer_open_file(&t, f, &err) != EP_OK && err.text[0] == '\0') {
        abort(); /* refused without a reason */
    }
    model_file_close(f);
    ep_buf_fini(&bytes);
    return t;
}

static void check_text(const model_tokenizer *t, const uint8_t *s, size_t n, bool parse)
{
    int32_t *ids = NULL;
    size_t n_ids = 0;
    ep_buf back = {0};
    if (model_encode(t, (const char *)s, n, parse, &ids, &n_ids) != EP_OK) abort();
    for (size_t i = 0; i < n_ids; i++) {
        if (model_decode(t, ids[i], true, &back) != EP_OK) abort();
        (void)model_is_end(t, ids[i]);
    }
    if (back.len != n || (n > 0 && memcmp(back.data, s, n) != 0)) abort();
    ep_buf_fini(&back);
    ep_free(ids);
}

static model_tokenizer *fixed_vocab(size_t pattern)
{
    static model_tokenizer *opened[N_PATTERNS];
    if (opened[pattern] != NULL) return opened[pattern];
    static const char *const merges[][2] = {
        {"h e", "he"},
        {"\u0120 t", "\u0120t"},
        {"\u0120t he", "\u0120the"},
        {"a a", "aa"},
        {"aa aa", "aaaa"},
        {"i n", "in"},
        {"1 2", "12"},
        {"' s", "'s"},
        {"\u0120 \u0120", "\u0120\u0120"},
        {"\u010a \u010a", "\u010a\u010a"},
        {"\u00e2 \u0122", "\u00e2\u0122"},
        {"! !", "!!"},
    };
    fx_vocab v;
    fx_vocab_init(&v);
    v.pre = patterns[pattern];
    fx_vocab_bytes(&v);
    for (size_t i = 0; i < sizeof(merges) / sizeof(merges[0]); i++) {
        fx_token(&v, merges[i][1], 1);
        fx_merge(&v, merges[i][0]);
    }
    fx_token(&v, "<|im_start|>", 3);
    fx_token(&v, "<|im_end|>", 3);
    fx_token(&v, "<t>", 4);
    fx_token(&v, "<t><t>", 4);
    fx_token(&v, "\xE2\x82", 4); /* ends inside a character */
    model_tokenizer *t = open_vocab(&v);
    if (t == NULL) abort();
    fx_vocab_fini(&v);
    opened[pattern] = t; /* kept for the whole run */
    return t;
}

static void add_line(fx_vocab *v, uint8_t kind, const uint8_t *s, size_t n)
{
    int number = n > 0 ? s[0] + (n > 1 ? s[1] * 256 : 0) : 0;
    bool room = v->n_tokens < 4096;
    if (kind == 't' && room) fx_token_n(v, s, n, 1);
    if (kind == 'c' && room) fx_token_n(v, s, n, 3);
    if (kind == 'u' && room) fx_token_n(v, s, n, 4);
    if (kind == 'x' && room) fx_token_n(v, s, n, number);
    if (kind == 'm') {
        fx_text(&v->merges, s, n);
        v->n_merges++;
    }
    if (kind == 'e') v->eos = number;
    if (kind == 'b') v->bos = number, v->adds_bos = number & 1;
    if (kind == 'p') v->pre = patterns[(size_t)number % N_PATTERNS];
    if (kind == 'n') v->n_types = number;
    if (v->n_types > v->n_tokens) v->n_types = v->n_tokens;
}

/* Calls add_line (t NULL) or check_text (else) for the lines they are for. */
static void each_line(fx_vocab *v, const model_tokenizer *t, const uint8_t *s, size_t n)
{
    while (n > 0) {
        const uint8_t *end = memchr(s, '\n', n);
        size_t len = end != NULL ? (size_t)(end - s) : n;
        bool vocab_line = len > 0 && strchr("tcuxmebpn", s[0]) != NULL && s[0] != '\0';
        if (t == NULL && vocab_line) add_line(v, s[0], s + 1, len - 1);
        if (t != NULL) {
            check_text(t, s, len, true);
            check_text(t, s, len, false);
        }
        s += len + (end != NULL);
        n -= len + (end != NULL);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0) return 0;
    if (data[0] % 2 == 0) {
        const model_tokenizer *t = fixed_vocab((size_t)(data[0] / 4) % N_PATTERNS);
        check_text(t, data + 1, size - 1, (data[0] & 2) != 0);
        return 0;
    }
    fx_vocab v;
    fx_vocab_init(&v);
    if (data[0] & 2) fx_vocab_bytes(&v);
    each_line(&v, NULL, data + 1, size - 1);
    model_tokenizer *t = open_vocab(&v);
    if (t != NULL) each_line(&v, t, data + 1, size - 1);
    model_tokenizer_close(t);
    fx_vocab_fini(&v);
    return 0;
}
