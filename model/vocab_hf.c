/*
 * The vocabulary of a folder: tokenizer.json, and of its neighbours the ends of a generation. The
 * file describes a pipeline (normalise, cut, merge, frame, decode); every stage must be one that
 * tokenizer.c does, else it is refused by name: a stage that is left out gives plausible but
 * different tokens.
 *
 * Rules
 *  1. The pattern that cuts is recognised by its text, never run as it stands.
 *  2. NFC is read and not done, as with GGUF files, whose keys do not even mention it: what came in
 * comes out. Text that is not in that form gets tokens that the model was not trained with.
 *  3. Added tokens are control tokens if they are special, else user-defined ones. Rows of the
 * embedding that no token names are unused: they decode to nothing.
 *  4. Ends are what generation_config.json says, else config.json, and the eos_token of
 * tokenizer_config.json beside them.
 */
#include "model/hf.h"
#include "model/vocab.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct pattern {
    const char *text, *name; /* as tokenizer.ggml.pre names it */
} patterns[] = {
    {"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
     "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
     "qwen2"},
};

static const char *type_of(hf_reader *r, const model_json *o)
{
    return o == NULL ? "(none)" : hf_get_str(r, o, "type", "(none)");
}

static bool is_type(hf_reader *r, const model_json *o, const char *type)
{
    return strcmp(type_of(r, o), type) == 0;
}

/* ---- the pipeline ---- */

static void read_split(hf_reader *r, const model_json *o, model_vocab *v)
{
    const char *text = hf_get_str(r, model_json_member(o, "pattern"), "Regex", "");
    const char *behavior = hf_get_str(r, o, "behavior", "(none)");
    if (strcmp(behavior, "Isolated") != 0 || hf_get_bool(r, o, "invert", false))
        hf_refuse(r, EP_ERR_UNSUPPORTED,
                  "pre_tokenizer: Split with behavior %.40s or inverted is not implemented",
                  behavior);
    for (size_t i = 0; i < sizeof(patterns) / sizeof(patterns[0]) && r->status == EP_OK; i++)
        if (strcmp(text, patterns[i].text) == 0)
            r->status = model_pretokenizer_open(&v->cutter, patterns[i].name,
                                                strlen(patterns[i].name), r->err);
    if (v->cutter == NULL)
        hf_refuse(r, EP_ERR_UNSUPPORTED,
                  "pre_tokenizer: the pattern \"%.200s\" is not implemented, only that of qwen2",
                  text);
}

/* A Split by a known pattern, then ByteLevel without a pattern of its own. */
static void read_cutter(hf_reader *r, const model_json *o, model_vocab *v)
{
    const model_json *list = model_json_member(o, "pretokenizers");
    const model_json *split = model_json_item(list, 0), *bytes = model_json_item(list, 1);
    if (!is_type(r, o, "Sequence") || model_json_size(list) != 2 || !is_type(r, split, "Split") ||
        !is_type(r, bytes, "ByteLevel")) {
        hf_refuse(r, EP_ERR_UNSUPPORTED,
                  "pre_tokenizer of type %.40s is not implemented, only a Sequence of Split and "
                  "ByteLevel",
                  type_of(r, o));
        return;
    }
    if (hf_get_bool(r, bytes, "add_prefix_space", true) || hf_get_bool(r, bytes, "use_regex", true))
        hf_refuse(r, EP_ERR_UNSUPPORTED,
                  "pre_tokenizer: ByteLevel with add_prefix_space or use_regex is not implemented");
    read_split(r, split, v);
}

static void check_stages(hf_reader *r, const model_json *doc)
{
    static const struct {
        const char *key, *type;
        bool needed;
    } stages[] = {{"normalizer", "NFC", false},
                  {"post_processor", "ByteLevel", false},
                  {"decoder", "ByteLevel", true}};
    for (size_t i = 0; i < sizeof(stages) / sizeof(stages[0]); i++) {
        const model_json *o = model_json_member(doc, stages[i].key);
        if ((o != NULL || stages[i].needed) && !is_type(r, o, stages[i].type))
            hf_refuse(r, EP_ERR_UNSUPPORTED, "%s of type %.40s is not implemented, only %s",
                      stages[i].key, type_of(r, o), stages[i].type);
    }
}

static void check_model(hf_reader *r, const model_json *o)
{
    static const char *const truths[] = {"byte_fallback", "ignore_merges"};
    static const char *const texts[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    if (!is_type(r, o, "BPE"))
        hf_refuse(r, EP_ERR_UNSUPPORTED, "model of type %.40s is not implemented, only BPE",
                  type_of(r, o));
    for (size_t i = 0; i < sizeof(truths) / sizeof(truths[0]); i++)
        if (hf_get_bool(r, o, truths[i], false))
            hf_refuse(r, EP_ERR_UNSUPPORTED, "model: %s is not implemented", truths[i]);
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++)
        if (hf_get_str(r, o, texts[i], "")[0] != '\0')
            hf_refuse(r, EP_ERR_UNSUPPORTED, "model: %s is not implemented", texts[i]);
    if (hf_get_real(r, o, "dropout", 0.0, 0.0, 1.0) != 0.0)
        hf_refuse(r, EP_ERR_UNSUPPORTED, "model: dropout is not implemented");
}

/* ---- tokens ---- */

static model_text text_of(const char *s)
{
    return (model_text){s, strlen(s)};
}

static bool same_text(model_text a, const char *s)
{
    return a.n == strlen(s) && memcmp(a.s, s, a.n) == 0;
}

/* An id that the embedding has a row for; false: refused. */
static bool check_id(hf_reader *r, const model_vocab *v, const char *what, const char *text,
                     int64_t id)
{
    if (id >= 0 && id < v->n) return true;
    hf_refuse(r, EP_ERR_INVALID,
              "%s: token \"%.80s\" has id %" PRId64
              ", expected 0 to %d (vocab_size in config.json)",
              what, text, id, v->n - 1);
    return false;
}

static void read_tokens(hf_reader *r, model_json *vocab, model_vocab *v)
{
    void *at = NULL;
    const char *text;
    model_json *value;
    while (r->status == EP_OK && model_json_next(vocab, &at, &text, &value)) {
        int64_t id = -1;
        if (!model_json_int(value, &id))
            hf_refuse(r, EP_ERR_INVALID, "model.vocab: the id of \"%.80s\" is no whole number",
                      text);
        else if (check_id(r, v, "model.vocab", text, id) && v->tokens[id].s != NULL)
            hf_refuse(r, EP_ERR_INVALID,
                      "model.vocab: tokens \"%.*s\" and \"%.80s\" have the same id, %" PRId64,
                      v->tokens[id].n < 80 ? (int)v->tokens[id].n : 80, v->tokens[id].s, text, id);
        if (r->status != EP_OK) return;
        v->tokens[id] = text_of(text);
        v->types[id] = VOCAB_NORMAL;
    }
}

static void read_added(hf_reader *r, const model_json *list, const model_json *vocab,
                       model_vocab *v)
{
    static const char *const refused[] = {"lstrip", "rstrip", "single_word"};
    if (list != NULL && !model_json_is_array(list))
        hf_refuse(r, EP_ERR_INVALID, "added_tokens is no list");
    for (size_t i = 0; i < model_json_size(list) && r->status == EP_OK; i++) {
        const model_json *o = model_json_item(list, i);
        const char *text = hf_get_str(r, o, "content", "");
        int64_t id = hf_get_int(r, o, "id", -1), known = id;
        if (text[0] == '\0') hf_refuse(r, EP_ERR_INVALID, "added_tokens: entry %zu has no text", i);
        if (!check_id(r, v, "added_tokens", text, id)) return;
        for (size_t k = 0; k < sizeof(refused) / sizeof(refused[0]); k++)
            if (hf_get_bool(r, o, refused[k], false))
                hf_refuse(r, EP_ERR_UNSUPPORTED, "added_tokens: %s of \"%.80s\" is not implemented",
                          refused[k], text);
        (void)model_json_int(model_json_member(vocab, text), &known);
        if (known != id || (v->tokens[id].s != NULL && !same_text(v->tokens[id], text)))
            hf_refuse(r, EP_ERR_INVALID,
                      "added_tokens: \"%.80s\" has id %" PRId64 ", which contradicts another token",
                      text, id);
        v->tokens[id] = text_of(text);
        v->types[id] = hf_get_bool(r, o, "special", false) ? VOCAB_CONTROL : VOCAB_USER;
    }
}

/* "a b", or a list of both. What is no merge is left empty, which tokenizer.c refuses. */
static void read_merges(const model_json *list, model_vocab *v)
{
    for (size_t i = 0; i < v->n_merges; i++) {
        const model_json *o = model_json_item(list, i);
        const char *whole = model_json_str(o), *left = model_json_str(model_json_item(o, 0)),
                   *right = model_json_str(model_json_item(o, 1));
        v->merges[i][0] = v->merges[i][1] = text_of("");
        if (whole != NULL) {
            model_vocab_split(text_of(whole), v->merges[i]);
        } else if (left != NULL && right != NULL && model_json_size(o) == 2) {
            v->merges[i][0] = text_of(left);
            v->merges[i][1] = text_of(right);
        }
    }
}

/* ---- ends and beginnings ---- */

/* An id, or a list of them. */
static void read_ends(hf_reader *r, const model_json *value, model_vocab *v)
{
    size_t n = model_json_is_array(value) ? model_json_size(value) : 1;
    for (size_t i = 0; i < n && r->status == EP_OK; i++) {
        int64_t id = -1;
        const model_json *o = model_json_is_array(value) ? model_json_item(value, i) : value;
        if (!model_json_int(o, &id) || id < 0 || id >= v->n)
            hf_refuse(r, EP_ERR_INVALID, "eos_token_id is no token, expected 0 to %d, or a list",
                      v->n - 1);
        else
            v->is_end[id] = true;
    }
}

/* A token by its text, as a text or as an object with its content; -1: null or absent. */
static int32_t find_token(hf_reader *r, const model_json *o, const char *key, const model_vocab *v)
{
    const model_json *value = model_json_member(o, key);
    if (model_json_is_object(value)) value = model_json_member(value, "content");
    if (value == NULL) return -1;
    const char *text = model_json_str(value);
    for (int32_t i = 0; text != NULL && i < v->n; i++)
        if (v->tokens[i].s != NULL && same_text(v->tokens[i], text)) return i;
    hf_refuse(r, EP_ERR_INVALID, "%s \"%.80s\" is no token of tokenizer.json", key,
              text != NULL ? text : "");
    return -1;
}

/* The older list of added tokens must not know more than tokenizer.json: it would be added. */
static void check_decoder(hf_reader *r, model_json *list, const model_vocab *v)
{
    void *at = NULL;
    const char *key;
    model_json *o;
    if (list == NULL) return;
    if (!model_json_is_object(list))
        hf_refuse(r, EP_ERR_INVALID, "added_tokens_decoder is no object");
    while (r->status == EP_OK && model_json_next(list, &at, &key, &o)) {
        const char *text = hf_get_str(r, o, "content", "");
        char *end;
        long id = strtol(key, &end, 10);
        if (end == key || *end != '\0' || id < 0 || id >= v->n || v->tokens[id].s == NULL ||
            !same_text(v->tokens[id], text))
            hf_refuse(r, EP_ERR_INVALID,
                      "added_tokens_decoder: \"%.80s\" is not token %.20s of tokenizer.json", text,
                      key);
    }
}

/* A text that may be absent. */
static void check_object(hf_reader *r, const model_json *o)
{
    if (o != NULL && !model_json_is_object(o)) hf_refuse(r, EP_ERR_INVALID, "it is no object");
}

static void read_roles(hf_reader *r, model_json *const *texts, model_vocab *v)
{
    static const hf_text order[] = {HF_GENERATION, HF_CONFIG};
    for (size_t i = 0; i < 2; i++) {
        const model_json *ends = model_json_member(texts[order[i]], "eos_token_id");
        r->name = hf_text_names[order[i]];
        check_object(r, texts[order[i]]);
        if (ends == NULL) continue;
        read_ends(r, ends, v);
        break;
    }
    const model_json *o = texts[HF_TOKENIZER_CONFIG];
    r->name = hf_text_names[HF_TOKENIZER_CONFIG];
    check_object(r, o);
    check_decoder(r, model_json_member(o, "added_tokens_decoder"), v);
    int32_t end = find_token(r, o, "eos_token", v);
    if (end >= 0) v->is_end[end] = true;
    v->bos = find_token(r, o, "bos_token", v);
    v->adds_bos = hf_get_bool(r, o, "add_bos_token", false);
    if (v->adds_bos && v->bos < 0)
        hf_refuse(r, EP_ERR_INVALID, "add_bos_token is true, but there is no bos_token");
    if (hf_get_bool(r, o, "add_eos_token", false))
        hf_refuse(r, EP_ERR_UNSUPPORTED, "add_eos_token is not implemented");
    r->name = hf_text_names[HF_TOKENIZER];
}

/* ---- all of it ---- */

ep_status hf_tokenizer_read(model_tokenizer **out, model_json *const *texts, const char *folder,
                            int n_vocab, ep_err *err)
{
    hf_reader r = {.folder = folder, .name = hf_text_names[HF_TOKENIZER], .err = err};
    const model_json *doc = texts[HF_TOKENIZER], *m = model_json_member(doc, "model");
    model_json *vocab = model_json_member(m, "vocab");
    const model_json *merges = model_json_member(m, "merges");
    char names[2][512];
    model_vocab v = {.tokens_name = names[0], .merges_name = names[1]};
    snprintf(names[0], sizeof(names[0]), "%s/%s: model.vocab", folder, r.name);
    snprintf(names[1], sizeof(names[1]), "%s/%s: model.merges", folder, r.name);
    if (doc == NULL) hf_refuse(&r, EP_ERR_INVALID, "it is missing");
    if (!model_json_is_object(vocab))
        hf_refuse(&r, EP_ERR_INVALID, "model.vocab is missing or no object");
    if (!model_json_is_array(merges))
        hf_refuse(&r, EP_ERR_INVALID, "model.merges is missing or no list");
    check_stages(&r, doc);
    check_model(&r, m);
    if (r.status == EP_OK) read_cutter(&r, model_json_member(doc, "pre_tokenizer"), &v);
    if (r.status == EP_OK)
        r.status = model_vocab_init(&v, (size_t)n_vocab, model_json_size(merges), err);
    if (r.status == EP_OK) {
        read_tokens(&r, vocab, &v);
        read_added(&r, model_json_member(doc, "added_tokens"), vocab, &v);
        read_merges(merges, &v);
        read_roles(&r, texts, &v);
    }
    if (r.status == EP_OK) r.status = model_tokenizer_build(out, &v, err);
    model_vocab_fini(&v);
    if (r.status == EP_ERR_NOMEM) ep_fail(err, r.status, "tokenizer: out of memory");
    return r.status;
}

ep_status hf_tokenizer_open(model_tokenizer **out, const hf_folder *h, ep_err *err)
{
    model_json *texts[HF_N_TEXTS] = {NULL};
    ep_status status = EP_OK;
    for (int i = 0; i < HF_N_TEXTS && status == EP_OK; i++)
        status = hf_load(h, (hf_text)i, &texts[i], NULL, err);
    if (status == EP_OK)
        status = hf_tokenizer_read(out, texts, st_folder(hf_file(h)), hf_vocab(h), err);
    for (int i = 0; i < HF_N_TEXTS; i++)
        model_json_free(texts[i]);
    return status;
}
