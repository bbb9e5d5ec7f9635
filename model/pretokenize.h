#ifndef EP_MODEL_PRETOKENIZE_H
#define EP_MODEL_PRETOKENIZE_H
/*
 * Cuts text into the words within which BPE merges, by the named pattern of tokenizer.ggml.pre.
 * Internal to model.
 */
#include "base/base.h"

typedef struct model_pretokenizer model_pretokenizer;

/* An unknown name is EP_ERR_UNSUPPORTED and err lists the known ones. */
ep_status model_pretokenizer_open(model_pretokenizer **out, const char *name, size_t len,
                                  ep_err *err);
void model_pretokenizer_close(model_pretokenizer *p);

/* What a pattern implies besides the cutting. */
bool model_pretokenizer_adds_bos(const model_pretokenizer *p); /* when the file does not say */
bool model_pretokenizer_whole_words(
    const model_pretokenizer *p); /* a word that is a token is not merged */

/* Working memory of one call chain; the pre-tokenizer itself is read-only and may be shared. */
typedef struct model_splitter {
    const model_pretokenizer *p;
    void *match, *context, *stack; /* PCRE2's */
    ep_status (*word)(void *arg, const uint8_t *s, size_t n);
    void *arg;
} model_splitter;

ep_status model_splitter_init(model_splitter *s, const model_pretokenizer *p,
                              ep_status (*word)(void *arg, const uint8_t *s, size_t n), void *arg);
void model_splitter_fini(model_splitter *s);

/* Calls `word` for every word in order; the words together are exactly the text. Each byte that is
 * not part of valid UTF-8 is a word by itself. A status other than EP_OK from `word` ends it. */
ep_status model_splitter_run(model_splitter *s, const uint8_t *text, size_t len);

/* Length of the longest valid UTF-8 prefix (no surrogates, no overlong forms, up to U+10FFFF). */
size_t model_utf8_valid(const uint8_t *s, size_t n);

#endif
