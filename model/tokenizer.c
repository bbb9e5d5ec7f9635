/*
 * The tokenizer of a GGUF file whose model is `gpt2`: byte-level BPE. Bytes become ids in three
 * stages: special tokens are found in the raw bytes (a trie, leftmost and of these the longest),
 * the text between them is cut into words (pretokenize.c), the bytes of a word are merged (bpe.c).
 *
 * Rules
 *  1. Vocabulary texts are written in an alphabet of 256 printable characters, one per byte.
 * Everything is turned into plain bytes once, at open; a text that is not in the alphabet stands
 * for itself.
 *  2. Equal texts: the lowest id counts when encoding, every id decodes. Equal merges: the first
 * counts.
 *  3. Control tokens (and `unknown`) are never made from plain text, only by parse_special.
 * User-defined tokens are plain text when decoded, and found as a whole by parse_special.
 *  4. Invariant: all 256 bytes have a token, so every input has an encoding, and decoding it
 * (special tokens included) gives exactly the input. No normalisation: what came in comes out.
 *  5. A generation ends with eos, eot or eom of the file, or with a control token whose text is one
 * of end_names: files often name only one of several that their model was trained to stop with.
 *
 * Nothing points into the file after open. What it does not do: add BOS, chat templates, other
 * models.
 */
#include "model/bpe.h"
#include "model/model.h"
#include "model/pretokenize.h"

#include <string.h>

enum { TYPE_NORMAL = 1, TYPE_UNKNOWN = 2, TYPE_CONTROL = 3, TYPE_USER = 4, TYPE_LAST = 6 };
enum { MAX_SPECIAL = 1024 }; /* bounds the work per byte of text that looks like a special token */

#define KEY "tokenizer.ggml."

static const char *const end_names[] = {
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
};

typedef struct trie_node {
    int32_t child, next; /* -1: none */
    int32_t id;          /* token that ends here, -1: none */
    uint8_t byte;
} trie_node;

struct model_tokenizer {
    int n;
    size_t *start; /* [n + 1] token i is text[start[i] .. start[i + 1]) */
    uint8_t *text;
    uint8_t *type;  /* [n] */
    bool *is_end;   /* [n] */
    int32_t *words; /* hash table of the ids that plain text can become; -1: free */
    size_t words_mask;
    int32_t byte_ids[256];
    model_merges merges;
    trie_node *nodes;
    size_t n_nodes;
    int32_t root[256]; /* node of a special token's first byte, -1: none */
    bool has_special;
    model_pretokenizer *cutter;
    int32_t bos;
    bool adds_bos;
};

/* ---- the byte alphabet ---- */

enum { ALPHABET = 256 + 68 }; /* code points below this may stand for a byte */

/* Bytes that print stand for themselves, the others for the code points from 256 on, in order. */
static void make_alphabet(int16_t byte_of[ALPHABET])
{
    memset(byte_of, 0xFF, ALPHABET * sizeof(byte_of[0]));
    int other = 256;
    for (int b = 0; b < 256; b++) {
        bool prints = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        byte_of[prints ? b : other++] = (int16_t)b;
    }
}

/* Turns alphabet text into bytes (never more than n). False when a character is not in the
 * alphabet. */
static bool to_bytes(const int16_t byte_of[ALPHABET], const char *s, size_t n, uint8_t *out,
                     size_t *n_out)
{
    size_t k = 0;
    for (size_t i = 0; i < n;) {
        uint8_t c = (uint8_t)s[i];
        unsigned code = c;
        if (c >= 0x80) {
            if ((c & 0xE0) != 0xC0 || i + 1 >= n || ((uint8_t)s[i + 1] & 0xC0) != 0x80)
                return false;
            code = (c & 0x1Fu) << 6 | ((uint8_t)s[i + 1] & 0x3Fu);
            if (code < 0x80) return false;
        }
        if (code >= ALPHABET || byte_of[code] < 0) return false;
        out[k++] = (uint8_t)byte_of[code];
        i += c >= 0x80 ? 2 : 1;
    }
    *n_out = k;
    return true;
}

/* ---- words: bytes -> id ---- */

static size_t word_slot(const model_tokenizer *t, const uint8_t *s, size_t n)
{
    uint64_t h = 0xCBF29CE484222325u; /* FNV-1a, and a last mix for the low bits */
    for (size_t i = 0; i < n; i++)
        h = (h ^ s[i]) * 0x100000001B3u;
    h ^= h >> 32;
    for (size_t i = h & t->words_mask;; i = (i + 1) & t->words_mask) {
        int32_t id = t->words[i];
        if (id < 0) return i;
        size_t at = t->start[id];
        if (t->start[id + 1] - at == n && memcmp(t->text + at, s, n) == 0) return i;
    }
}

static int32_t word_find(const model_tokenizer *t, const uint8_t *s, size_t n)
{
    return n == 0 ? -1 : t->words[word_slot(t, s, n)];
}

/* ---- special tokens: a trie ---- */

/* The list that a new or known byte below `node` (-1: the root) belongs to. */
static int32_t *trie_list(model_tokenizer *t, int32_t node, uint8_t byte)
{
    return node < 0 ? &t->root[byte] : &t->nodes[node].child;
}

static int32_t trie_child(const model_tokenizer *t, int32_t node, uint8_t byte)
{
    if (node < 0) return t->root[byte];
    int32_t at = t->nodes[node].child;
    while (at >= 0 && t->nodes[at].byte != byte)
        at = t->nodes[at].next;
    return at;
}

static void trie_put(model_tokenizer *t, const uint8_t *s, size_t n, int32_t id)
{
    int32_t at = -1;
    for (size_t i = 0; i < n; i++) {
        int32_t child = trie_child(t, at, s[i]);
        if (child < 0) {
            int32_t *list = trie_list(t, at, s[i]);
            child = (int32_t)t->n_nodes++;
            t->nodes[child] = (trie_node){-1, *list, -1, s[i]};
            *list = child;
        }
        at = child;
    }
    if (t->nodes[at].id < 0) t->nodes[at].id = id;
    t->has_special = true;
}

/* The longest special token at the start of s, -1: none. */
static int32_t trie_match(const model_tokenizer *t, const uint8_t *s, size_t n, size_t *len)
{
    int32_t found = -1, at = -1;
    for (size_t i = 0; i < n; i++) {
        at = trie_child(t, at, s[i]);
        if (at < 0) break;
        if (t->nodes[at].id >= 0) {
            found = t->nodes[at].id;
            *len = i + 1;
        }
    }
    return found;
}

static bool is_special(uint8_t type)
{
    return type == TYPE_UNKNOWN || type == TYPE_CONTROL || type == TYPE_USER;
}

static ep_status build_trie(model_tokenizer *t, ep_err *err)
{
    memset(t->root, 0xFF, sizeof(t->root));
    size_t bytes = 0;
    for (int i = 0; i < t->n; i++) {
        size_t n = is_special(t->type[i]) ? t->start[i + 1] - t->start[i] : 0;
        if (n > MAX_SPECIAL) {
            return ep_fail(err, EP_ERR_UNSUPPORTED,
                           KEY "tokens: special token %d is %zu bytes long, at most %d", i, n,
                           (int)MAX_SPECIAL);
        }
        bytes += n;
    }
    if (bytes > INT32_MAX) return ep_fail(err, EP_ERR_TOO_LARGE, KEY "tokens: too many specials");
    t->nodes = ep_alloc(bytes * sizeof(*t->nodes));
    if (t->nodes == NULL) return EP_ERR_NOMEM;
    for (int i = 0; i < t->n; i++) {
        size_t n = t->start[i + 1] - t->start[i];
        if (is_special(t->type[i]) && n > 0) trie_put(t, t->text + t->start[i], n, i);
    }
    return EP_OK;
}

/* ---- reading the file ---- */

static ep_status read_types(model_tokenizer *t, const model_file *f, ep_err *err)
{
    memset(t->type, TYPE_NORMAL, (size_t)t->n);
    size_t n = model_file_arr_len(f, KEY "token_type");
    if (n == 0) return EP_OK;
    if (n != (size_t)t->n) {
        return ep_fail(err, EP_ERR_INVALID, KEY "token_type has %zu entries, " KEY "tokens %d", n,
                       t->n);
    }
    for (int i = 0; i < t->n; i++) {
        int64_t type;
        if (model_file_arr_i64(f, KEY "token_type", (size_t)i, &type) != EP_OK) {
            return ep_fail(err, EP_ERR_INVALID, KEY "token_type is not an array of integers");
        }
        if (type < 0 || type > TYPE_LAST) {
            return ep_fail(err, EP_ERR_INVALID,
                           KEY "token_type: token %d has type %lld, not 0 to %d", i,
                           (long long)type, (int)TYPE_LAST);
        }
        t->type[i] = (uint8_t)type;
    }
    return EP_OK;
}

/* Token texts as bytes, and the table of those that plain text can become. */
static ep_status read_tokens(model_tokenizer *t, const model_file *f, const int16_t *byte_of,
                             ep_err *err)
{
    size_t bytes = 0, slots = 16, len;
    const char *s;
    for (int i = 0; i < t->n; i++) {
        if (model_file_arr_str(f, KEY "tokens", (size_t)i, &s, &len) != EP_OK) {
            return ep_fail(err, EP_ERR_INVALID, KEY "tokens is not an array of strings");
        }
        bytes += len;
    }
    while (slots < (size_t)t->n * 2)
        slots *= 2;
    t->text = ep_alloc(bytes);
    t->words = ep_alloc(slots * sizeof(*t->words));
    if (t->text == NULL || t->words == NULL) return EP_ERR_NOMEM;
    memset(t->words, 0xFF, slots * sizeof(*t->words));
    t->words_mask = slots - 1;

    size_t at = 0;
    for (int i = 0; i < t->n; i++) {
        if (model_file_arr_str(f, KEY "tokens", (size_t)i, &s, &len) != EP_OK) return EP_ERR_BUG;
        size_t n = len;
        bool encoded = to_bytes(byte_of, s, len, t->text + at, &n);
        bool literal = !encoded || is_special(t->type[i]);
        /* A user-defined text of printable ASCII reads the same both ways: it may be a merge too.
         */
        bool word = encoded && (!literal || (n == len && memcmp(t->text + at, s, len) == 0)) &&
                    t->type[i] != TYPE_CONTROL && t->type[i] != TYPE_UNKNOWN;
        if (literal) {
            n = len;
            if (len > 0) memcpy(t->text + at, s, len);
        }
        t->start[i] = at;
        at += n;
        t->start[i + 1] = at;
        if (!word || n == 0) continue;
        size_t slot = word_slot(t, t->text + t->start[i], n);
        if (t->words[slot] < 0) t->words[slot] = i;
    }
    for (int b = 0; b < 256; b++) {
        uint8_t byte = (uint8_t)b;
        t->byte_ids[b] = word_find(t, &byte, 1);
        if (t->byte_ids[b] < 0) {
            return ep_fail(err, EP_ERR_INVALID, KEY "tokens: no token for byte 0x%02x",
                           (unsigned)b);
        }
    }
    return EP_OK;
}

/* One merge "left right": ids of both and of the two together, refused by the part that is missing.
 */
static ep_status read_merge(const model_tokenizer *t, const int16_t *byte_of, size_t i,
                            const char *s, size_t len, ep_buf *tmp, int32_t ids[3], ep_err *err)
{
    const char *space = len > 0 ? memchr(s, ' ', len) : NULL;
    size_t n_left = space != NULL ? (size_t)(space - s) : 0, left = 0, right = 0;
    size_t n_right = space != NULL ? len - n_left - 1 : 0;
    tmp->len = 0;
    ep_status status = ep_buf_reserve(tmp, len + 1);
    if (status != EP_OK) return status;
    if (n_left == 0 || n_right == 0 || !to_bytes(byte_of, s, n_left, tmp->data, &left) ||
        !to_bytes(byte_of, space + 1, n_right, tmp->data + left, &right)) {
        return ep_fail(err, EP_ERR_INVALID,
                       KEY "merges: entry %zu is not two texts of the byte alphabet with one space",
                       i);
    }
    ids[0] = word_find(t, tmp->data, left);
    ids[1] = word_find(t, tmp->data + left, right);
    ids[2] = word_find(t, tmp->data, left + right);
    static const char *const part[3] = {"its left text", "its right text", "what it makes"};
    for (int k = 0; k < 3; k++) {
        if (ids[k] < 0) {
            return ep_fail(err, EP_ERR_INVALID,
                           KEY "merges: entry %zu \"%.*s\": %s is no plain token", i,
                           len < 128 ? (int)len : 128, s, part[k]);
        }
    }
    return EP_OK;
}

static ep_status read_merges(model_tokenizer *t, const model_file *f, const int16_t *byte_of,
                             ep_err *err)
{
    size_t n = model_file_arr_len(f, KEY "merges");
    if (n == 0) return ep_fail(err, EP_ERR_INVALID, KEY "merges is missing or empty");
    if (n > INT32_MAX) return ep_fail(err, EP_ERR_TOO_LARGE, KEY "merges has %zu entries", n);
    ep_status status = model_merges_init(&t->merges, n);
    ep_buf tmp = {0};
    for (size_t i = 0; i < n && status == EP_OK; i++) {
        const char *s;
        size_t len;
        int32_t ids[3] = {-1, -1, -1};
        if (model_file_arr_str(f, KEY "merges", i, &s, &len) != EP_OK) {
            status = ep_fail(err, EP_ERR_INVALID, KEY "merges is not an array of strings");
        } else {
            status = read_merge(t, byte_of, i, s, len, &tmp, ids, err);
        }
        if (status == EP_OK) model_merges_put(&t->merges, ids[0], ids[1], (int32_t)i, ids[2]);
    }
    ep_buf_fini(&tmp);
    return status;
}

/* *id stays what it was when the key is absent. */
static ep_status read_id(const model_tokenizer *t, const model_file *f, const char *key,
                         int32_t *id, ep_err *err)
{
    uint64_t v;
    ep_status status = model_file_u64(f, key, &v, err);
    if (status == EP_AGAIN) return EP_OK;
    if (status != EP_OK) return status;
    if (v >= (uint64_t)t->n) {
        return ep_fail(err, EP_ERR_INVALID, "%s is %llu, there are %d tokens", key,
                       (unsigned long long)v, t->n);
    }
    *id = (int32_t)v;
    return EP_OK;
}

static ep_status read_roles(model_tokenizer *t, const model_file *f, ep_err *err)
{
    static const char *const keys[] = {KEY "eos_token_id", KEY "eot_token_id", KEY "eom_token_id"};
    for (size_t k = 0; k < sizeof(keys) / sizeof(keys[0]); k++) {
        int32_t id = -1;
        ep_status status = read_id(t, f, keys[k], &id, err);
        if (status != EP_OK) return status;
        if (id >= 0) t->is_end[id] = true;
    }
    for (size_t k = 0; k < sizeof(end_names) / sizeof(end_names[0]); k++) {
        size_t n = strlen(end_names[k]), len = 0;
        int32_t id = trie_match(t, (const uint8_t *)end_names[k], n, &len);
        if (id >= 0 && len == n && t->type[id] == TYPE_CONTROL) t->is_end[id] = true;
    }
    t->bos = -1;
    ep_status status = read_id(t, f, KEY "bos_token_id", &t->bos, err);
    if (status != EP_OK) return status;
    t->adds_bos = t->bos >= 0 && model_pretokenizer_adds_bos(t->cutter);
    status = model_file_bool(f, KEY "add_bos_token", &t->adds_bos, err);
    if (status == EP_OK && t->adds_bos && t->bos < 0) {
        return ep_fail(err, EP_ERR_INVALID, KEY "add_bos_token without " KEY "bos_token_id");
    }
    return status == EP_AGAIN ? EP_OK : status;
}

/* Which tokenizer it is and how many tokens it has; opens the pre-tokenizer. */
static ep_status read_kind(model_tokenizer *t, const model_file *f, ep_err *err)
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
    if (status == EP_OK) status = model_pretokenizer_open(&t->cutter, s, len, err);
    if (status != EP_OK) return status;

    size_t n = model_file_arr_len(f, KEY "tokens");
    if (n == 0) return ep_fail(err, EP_ERR_INVALID, KEY "tokens is missing or empty");
    if (n > INT32_MAX / 4) return ep_fail(err, EP_ERR_TOO_LARGE, KEY "tokens has %zu entries", n);
    const model_tensor *embd = model_file_find(f, "token_embd.weight");
    if (embd != NULL && embd->ne[1] != n) {
        return ep_fail(err, EP_ERR_INVALID,
                       KEY "tokens has %zu entries, token_embd.weight %llu rows", n,
                       (unsigned long long)embd->ne[1]);
    }
    t->n = (int)n;
    return EP_OK;
}

ep_status model_tokenizer_open(model_tokenizer **out, const model_file *f, ep_err *err)
{
    int16_t byte_of[ALPHABET];
    make_alphabet(byte_of);
    model_tokenizer *t = ep_calloc(1, sizeof(*t));
    if (t == NULL) return ep_fail(err, EP_ERR_NOMEM, "tokenizer: out of memory");
    if (err != NULL) err->text[0] = '\0';

    ep_status status = read_kind(t, f, err);
    if (status != EP_OK) goto fail;
    t->start = ep_calloc((size_t)t->n + 1, sizeof(*t->start));
    t->type = ep_calloc((size_t)t->n, sizeof(*t->type));
    t->is_end = ep_calloc((size_t)t->n, sizeof(*t->is_end));
    status = EP_ERR_NOMEM;
    if (t->start == NULL || t->type == NULL || t->is_end == NULL) goto fail;
    status = read_types(t, f, err);
    if (status == EP_OK) status = read_tokens(t, f, byte_of, err);
    if (status == EP_OK) status = build_trie(t, err);
    if (status == EP_OK) status = read_merges(t, f, byte_of, err);
    if (status == EP_OK) status = read_roles(t, f, err);
    if (status != EP_OK) goto fail;
    *out = t;
    return EP_OK;
fail:
    if (status == EP_ERR_NOMEM) ep_fail(err, status, "tokenizer: out of memory");
    model_tokenizer_close(t);
    return status;
}

void model_tokenizer_close(model_tokenizer *t)
{
    if (t == NULL) return;
    model_pretokenizer_close(t->cutter);
    model_merges_fini(&t->merges);
    ep_free(t->nodes);
    ep_free(t->words);
    ep_free(t->is_end);
    ep_free(t->type);
    ep_free(t->text);
    ep_free(t->start);
    ep_free(t);
}

/* ---- use ---- */

typedef struct encoder {
    const model_tokenizer *t;
    bool whole_words;
    model_bpe bpe;
    model_ids ids;
} encoder;

static ep_status put(encoder *e, int32_t id)
{
    ep_status status = model_ids_reserve(&e->ids, 1);
    if (status == EP_OK) e->ids.at[e->ids.n++] = id;
    return status;
}

static ep_status encode_word(void *arg, const uint8_t *s, size_t n)
{
    encoder *e = arg;
    int32_t id = n == 1 ? e->t->byte_ids[s[0]] : e->whole_words ? word_find(e->t, s, n) : -1;
    if (id >= 0) return put(e, id);
    return model_bpe_word(&e->bpe, &e->t->merges, e->t->byte_ids, s, n, &e->ids);
}

static ep_status encode_text(encoder *e, model_splitter *cut, const uint8_t *s, size_t n,
                             bool parse_special)
{
    ep_status status = EP_OK;
    size_t from = 0;
    for (size_t i = 0; parse_special && e->t->has_special && i < n && status == EP_OK;) {
        size_t len = 0;
        int32_t id = trie_match(e->t, s + i, n - i, &len);
        if (id < 0) {
            i++;
            continue;
        }
        status = model_splitter_run(cut, s + from, i - from);
        if (status == EP_OK) status = put(e, id);
        i += len;
        from = i;
    }
    return status == EP_OK ? model_splitter_run(cut, s + from, n - from) : status;
}

ep_status model_encode(const model_tokenizer *t, const char *text, size_t len, bool parse_special,
                       int32_t **ids, size_t *n)
{
    if (len == 0) return EP_OK;
    encoder e = {.t = t, .whole_words = model_pretokenizer_whole_words(t->cutter)};
    model_splitter cut = {0};
    ep_status status = model_ids_reserve(&e.ids, *n + len / 3 + 16);
    if (status != EP_OK) return status;
    if (*n > 0) memcpy(e.ids.at, *ids, *n * sizeof(**ids));
    e.ids.n = *n;
    status = model_splitter_init(&cut, t->cutter, encode_word, &e);
    if (status == EP_OK) status = encode_text(&e, &cut, (const uint8_t *)text, len, parse_special);
    if (cut.p != NULL) model_splitter_fini(&cut);
    model_bpe_fini(&e.bpe);
    if (status != EP_OK) {
        ep_free(e.ids.at);
        return status;
    }
    ep_free(*ids);
    *ids = e.ids.at;
    *n = e.ids.n;
    return EP_OK;
}

ep_status model_decode(const model_tokenizer *t, int32_t id, bool special, ep_buf *out)
{
    if (id < 0 || id >= t->n) return EP_ERR_INVALID;
    bool hidden = t->type[id] == TYPE_CONTROL || t->type[id] == TYPE_UNKNOWN;
    if (hidden && !special) return EP_OK;
    return ep_buf_add(out, t->text + t->start[id], t->start[id + 1] - t->start[id]);
}

int model_n_tokens(const model_tokenizer *t)
{
    return t->n;
}

int32_t model_bos(const model_tokenizer *t)
{
    return t->bos;
}

bool model_adds_bos(const model_tokenizer *t)
{
    return t->adds_bos;
}

bool model_is_end(const model_tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->n && t->is_end[id];
}
