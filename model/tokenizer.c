/*
 * Byte-level BPE, made from a vocabulary (vocab.h). Bytes become ids in three stages: special
 * tokens are found in the raw bytes (a trie, leftmost and of these the longest), the text between
 * them is cut into words (pretokenize.c), the bytes of a word are merged (bpe.c).
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
 *  5. A generation ends with an end token of the checkpoint, or with a control token whose text is
 * one of end_names: files often name only one of several that their model was trained to stop with.
 *
 * Nothing points into the vocabulary after open. What it does not do: add BOS, chat templates,
 * other models.
 */
#include "model/bpe.h"
#include "model/hf.h"
#include "model/vocab.h"

#include <string.h>

enum { MAX_SPECIAL = 1024 }; /* bounds the work per byte of text that looks like a special token */

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
    return type == VOCAB_UNKNOWN || type == VOCAB_CONTROL || type == VOCAB_USER;
}

static ep_status build_trie(model_tokenizer *t, const model_vocab *v, ep_err *err)
{
    memset(t->root, 0xFF, sizeof(t->root));
    size_t bytes = 0;
    for (int i = 0; i < t->n; i++) {
        size_t n = is_special(t->type[i]) ? t->start[i + 1] - t->start[i] : 0;
        if (n > MAX_SPECIAL) {
            return ep_fail(err, EP_ERR_UNSUPPORTED,
                           "%s: special token %d is %zu bytes long, at most %d", v->tokens_name, i,
                           n, (int)MAX_SPECIAL);
        }
        bytes += n;
    }
    if (bytes > INT32_MAX)
        return ep_fail(err, EP_ERR_TOO_LARGE, "%s: too many specials", v->tokens_name);
    t->nodes = ep_alloc(bytes * sizeof(*t->nodes));
    if (t->nodes == NULL) return EP_ERR_NOMEM;
    for (int i = 0; i < t->n; i++) {
        size_t n = t->start[i + 1] - t->start[i];
        if (is_special(t->type[i]) && n > 0) trie_put(t, t->text + t->start[i], n, i);
    }
    return EP_OK;
}

/* ---- from a vocabulary ---- */

/* Token texts as bytes, and the table of those that plain text can become. */
static ep_status take_tokens(model_tokenizer *t, const model_vocab *v, const int16_t *byte_of,
                             ep_err *err)
{
    size_t bytes = 0, slots = 16;
    for (int i = 0; i < t->n; i++)
        bytes += v->tokens[i].n;
    while (slots < (size_t)t->n * 2)
        slots *= 2;
    t->text = ep_alloc(bytes);
    t->words = ep_alloc(slots * sizeof(*t->words));
    if (t->text == NULL || t->words == NULL) return EP_ERR_NOMEM;
    memset(t->words, 0xFF, slots * sizeof(*t->words));
    t->words_mask = slots - 1;

    size_t at = 0;
    for (int i = 0; i < t->n; i++) {
        const char *s = v->tokens[i].s;
        size_t len = v->tokens[i].n, n = len;
        bool encoded = to_bytes(byte_of, s, len, t->text + at, &n);
        bool literal = !encoded || is_special(t->type[i]);
        /* A user-defined text of printable ASCII reads the same both ways: it may be a merge too.
         */
        bool word = encoded && (!literal || (n == len && memcmp(t->text + at, s, len) == 0)) &&
                    t->type[i] != VOCAB_CONTROL && t->type[i] != VOCAB_UNKNOWN;
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
            return ep_fail(err, EP_ERR_INVALID, "%s: no token for byte 0x%02x", v->tokens_name,
                           (unsigned)b);
        }
    }
    return EP_OK;
}

/* One merge: ids of both and of the two together, refused by the part that is missing. */
static ep_status take_merge(const model_tokenizer *t, const model_vocab *v, const int16_t *byte_of,
                            size_t i, ep_buf *tmp, int32_t ids[3], ep_err *err)
{
    const model_text a = v->merges[i][0], b = v->merges[i][1];
    size_t left = 0, right = 0;
    tmp->len = 0;
    ep_status status = ep_buf_reserve(tmp, a.n + b.n + 1);
    if (status != EP_OK) return status;
    if (a.n == 0 || b.n == 0 || !to_bytes(byte_of, a.s, a.n, tmp->data, &left) ||
        !to_bytes(byte_of, b.s, b.n, tmp->data + left, &right)) {
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: entry %zu is not two texts of the byte alphabet with one space",
                       v->merges_name, i);
    }
    ids[0] = word_find(t, tmp->data, left);
    ids[1] = word_find(t, tmp->data + left, right);
    ids[2] = word_find(t, tmp->data, left + right);
    static const char *const part[3] = {"its left text", "its right text", "what it makes"};
    for (int k = 0; k < 3; k++) {
        if (ids[k] < 0) {
            return ep_fail(err, EP_ERR_INVALID, "%s: entry %zu \"%.*s %.*s\": %s is no plain token",
                           v->merges_name, i, a.n < 64 ? (int)a.n : 64, a.s,
                           b.n < 64 ? (int)b.n : 64, b.s, part[k]);
        }
    }
    return EP_OK;
}

static ep_status take_merges(model_tokenizer *t, const model_vocab *v, const int16_t *byte_of,
                             ep_err *err)
{
    if (v->n_merges == 0)
        return ep_fail(err, EP_ERR_INVALID, "%s is missing or empty", v->merges_name);
    ep_status status = model_merges_init(&t->merges, v->n_merges);
    ep_buf tmp = {0};
    for (size_t i = 0; i < v->n_merges && status == EP_OK; i++) {
        int32_t ids[3] = {-1, -1, -1};
        status = take_merge(t, v, byte_of, i, &tmp, ids, err);
        if (status == EP_OK) model_merges_put(&t->merges, ids[0], ids[1], (int32_t)i, ids[2]);
    }
    ep_buf_fini(&tmp);
    return status;
}

static void take_roles(model_tokenizer *t, const model_vocab *v)
{
    memcpy(t->is_end, v->is_end, (size_t)t->n * sizeof(*t->is_end));
    for (size_t k = 0; k < sizeof(end_names) / sizeof(end_names[0]); k++) {
        size_t n = strlen(end_names[k]), len = 0;
        int32_t id = trie_match(t, (const uint8_t *)end_names[k], n, &len);
        if (id >= 0 && len == n && t->type[id] == VOCAB_CONTROL) t->is_end[id] = true;
    }
    t->bos = v->bos;
    t->adds_bos = v->adds_bos;
}

ep_status model_tokenizer_build(model_tokenizer **out, model_vocab *v, ep_err *err)
{
    int16_t byte_of[ALPHABET];
    make_alphabet(byte_of);
    model_tokenizer *t = ep_calloc(1, sizeof(*t));
    if (t == NULL) return EP_ERR_NOMEM;
    t->cutter = v->cutter;
    v->cutter = NULL;
    t->n = v->n;
    t->start = ep_calloc((size_t)t->n + 1, sizeof(*t->start));
    t->type = ep_alloc((size_t)t->n);
    t->is_end = ep_calloc((size_t)t->n, sizeof(*t->is_end));
    ep_status status = EP_ERR_NOMEM;
    if (t->start == NULL || t->type == NULL || t->is_end == NULL) goto fail;
    memcpy(t->type, v->types, (size_t)t->n);
    status = take_tokens(t, v, byte_of, err);
    if (status == EP_OK) status = build_trie(t, v, err);
    if (status == EP_OK) status = take_merges(t, v, byte_of, err);
    if (status != EP_OK) goto fail;
    take_roles(t, v);
    *out = t;
    return EP_OK;
fail:
    model_tokenizer_close(t);
    return status;
}

ep_status model_tokenizer_open_file(model_tokenizer **out, const model_file *f, ep_err *err)
{
    model_vocab v = {0};
    ep_status status = model_vocab_from_file(&v, f, err);
    if (status == EP_OK) status = model_tokenizer_build(out, &v, err);
    if (status == EP_ERR_NOMEM) ep_fail(err, status, "tokenizer: out of memory");
    model_vocab_fini(&v);
    return status;
}

ep_status model_tokenizer_open(model_tokenizer **out, const model *m, ep_err *err)
{
    return m->folder != NULL ? hf_tokenizer_open(out, m->folder, err)
                             : model_tokenizer_open_file(out, m->file, err);
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
    bool hidden = t->type[id] == VOCAB_CONTROL || t->type[id] == VOCAB_UNKNOWN;
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
