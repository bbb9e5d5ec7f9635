/*
 * The vocabulary of a GGUF file whose tokenizer is `gpt2`: the keys tokenizer.ggml.*, each checked
 * for kind and length. What the texts mean is not known here (tokenizer.c).
 */
#include "model/vocab.h"

#include <string.h>

#define KEY "tokenizer.ggml."

ep_status model_vocab_init(model_vocab *v, size_t n, size_t n_merges, ep_err *err)
{
    if (n > INT32_MAX / 4)
        return ep_fail(err, EP_ERR_TOO_LARGE, "%s has %zu entries", v->tokens_name, n);
    if (n_merges > INT32_MAX)
        return ep_fail(err, EP_ERR_TOO_LARGE, "%s has %zu entries", v->merges_name, n_merges);
    v->n = (int)n;
    v->n_merges = n_merges;
    v->bos = -1;
    v->tokens = ep_calloc(n, sizeof(*v->tokens));
    v->types = ep_alloc(n);
    v->merges = ep_calloc(n_merges, sizeof(*v->merges));
    v->is_end = ep_calloc(n, sizeof(*v->is_end));
    if (v->tokens == NULL || v->types == NULL || v->merges == NULL || v->is_end == NULL)
        return EP_ERR_NOMEM;
    memset(v->types, VOCAB_UNUSED, n);
    return EP_OK;
}

void model_vocab_fini(model_vocab *v)
{
    model_pretokenizer_close(v->cutter);
    ep_free(v->tokens);
    ep_free(v->types);
    ep_free(v->merges);
    ep_free(v->is_end);
    *v = (model_vocab){0};
}

void model_vocab_split(model_text whole, model_text pair[2])
{
    const char *space = whole.n > 0 ? memchr(whole.s, ' ', whole.n) : NULL;
    size_t left = space != NULL ? (size_t)(space - whole.s) : 0;
    pair[0] = (model_text){whole.s, left};
    pair[1] =
        space != NULL ? (model_text){space + 1, whole.n - left - 1} : (model_text){whole.s, 0};
}

/* Which tokenizer it is; opens the pre-tokenizer. */
static ep_status read_kind(model_vocab *v, const model_file *f, ep_err *err)
{
    const char *s;
    size_t len;
    ep_status status = model_file_str(f, KEY "model", &s, &len, err);
    if (status == EP_AGAIN) return ep_fail(err, EP_ERR_INVALID, KEY "model is missing");
    if (status != EP_OK) return status;
    if (len != 4 || memcmp(s, "gpt2", 4) != 0) {
        return ep_fail(err, EP_ERR_UNSUPPORTED, KEY "model is \"%.*s\", known: gpt2",
                       len < 64 ? (int)len : 64, s);
    }
    status = model_file_str(f, KEY "pre", &s, &len, err);
    if (status == EP_AGAIN) return ep_fail(err, EP_ERR_UNSUPPORTED, KEY "pre is missing");
    return status == EP_OK ? model_pretokenizer_open(&v->cutter, s, len, err) : status;
}

static ep_status read_sizes(model_vocab *v, const model_file *f, ep_err *err)
{
    size_t n = model_file_arr_len(f, KEY "tokens"), n_merges = model_file_arr_len(f, KEY "merges");
    if (n == 0) return ep_fail(err, EP_ERR_INVALID, KEY "tokens is missing or empty");
    const model_tensor *embd = model_file_find(f, "token_embd.weight");
    if (embd != NULL && embd->ne[1] != n) {
        return ep_fail(err, EP_ERR_INVALID,
                       KEY "tokens has %zu entries, token_embd.weight %llu rows", n,
                       (unsigned long long)embd->ne[1]);
    }
    return model_vocab_init(v, n, n_merges, err);
}

static ep_status read_types(model_vocab *v, const model_file *f, ep_err *err)
{
    memset(v->types, VOCAB_NORMAL, (size_t)v->n);
    size_t n = model_file_arr_len(f, KEY "token_type");
    if (n == 0) return EP_OK;
    if (n != (size_t)v->n) {
        return ep_fail(err, EP_ERR_INVALID, KEY "token_type has %zu entries, " KEY "tokens %d", n,
                       v->n);
    }
    for (int i = 0; i < v->n; i++) {
        int64_t type;
        if (model_file_arr_i64(f, KEY "token_type", (size_t)i, &type) != EP_OK) {
            return ep_fail(err, EP_ERR_INVALID, KEY "token_type is not an array of integers");
        }
        if (type < 0 || type > VOCAB_LAST_TYPE) {
            return ep_fail(err, EP_ERR_INVALID,
                           KEY "token_type: token %d has type %lld, not 0 to %d", i,
                           (long long)type, (int)VOCAB_LAST_TYPE);
        }
        v->types[i] = (uint8_t)type;
    }
    return EP_OK;
}

static ep_status read_texts(model_vocab *v, const model_file *f, ep_err *err)
{
    for (int i = 0; i < v->n; i++) {
        model_text *t = &v->tokens[i];
        if (model_file_arr_str(f, KEY "tokens", (size_t)i, &t->s, &t->n) != EP_OK)
            return ep_fail(err, EP_ERR_INVALID, KEY "tokens is not an array of strings");
    }
    for (size_t i = 0; i < v->n_merges; i++) {
        model_text whole;
        if (model_file_arr_str(f, KEY "merges", i, &whole.s, &whole.n) != EP_OK)
            return ep_fail(err, EP_ERR_INVALID, KEY "merges is not an array of strings");
        model_vocab_split(whole, v->merges[i]);
    }
    return EP_OK;
}

/* *id stays what it was when the key is absent. */
static ep_status read_id(const model_vocab *v, const model_file *f, const char *key, int32_t *id,
                         ep_err *err)
{
    uint64_t value;
    ep_status status = model_file_u64(f, key, &value, err);
    if (status == EP_AGAIN) return EP_OK;
    if (status != EP_OK) return status;
    if (value >= (uint64_t)v->n) {
        return ep_fail(err, EP_ERR_INVALID, "%s is %llu, there are %d tokens", key,
                       (unsigned long long)value, v->n);
    }
    *id = (int32_t)value;
    return EP_OK;
}

static ep_status read_roles(model_vocab *v, const model_file *f, ep_err *err)
{
    static const char *const keys[] = {KEY "eos_token_id", KEY "eot_token_id", KEY "eom_token_id"};
    for (size_t k = 0; k < sizeof(keys) / sizeof(keys[0]); k++) {
        int32_t id = -1;
        ep_status status = read_id(v, f, keys[k], &id, err);
        if (status != EP_OK) return status;
        if (id >= 0) v->is_end[id] = true;
    }
    ep_status status = read_id(v, f, KEY "bos_token_id", &v->bos, err);
    if (status != EP_OK) return status;
    v->adds_bos = v->bos >= 0 && model_pretokenizer_adds_bos(v->cutter);
    status = model_file_bool(f, KEY "add_bos_token", &v->adds_bos, err);
    if (status == EP_OK && v->adds_bos && v->bos < 0) {
        return ep_fail(err, EP_ERR_INVALID, KEY "add_bos_token without " KEY "bos_token_id");
    }
    return status == EP_AGAIN ? EP_OK : status;
}

ep_status model_vocab_from_file(model_vocab *v, const model_file *f, ep_err *err)
{
    v->tokens_name = KEY "tokens";
    v->merges_name = KEY "merges";
    ep_status status = read_kind(v, f, err);
    if (status == EP_OK) status = read_sizes(v, f, err);
    if (status == EP_OK) status = read_types(v, f, err);
    if (status == EP_OK) status = read_texts(v, f, err);
    if (status == EP_OK) status = read_roles(v, f, err);
    return status;
}
