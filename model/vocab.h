#ifndef EP_MODEL_VOCAB_H
#define EP_MODEL_VOCAB_H
/*
 * vocab: what a checkpoint says of its byte-level BPE tokenizer, whichever format said it. vocab.c
 * reads one from GGUF keys, vocab_hf.c from tokenizer.json; tokenizer.c makes the tokenizer of it.
 * Internal to model.
 *
 * Texts point into the source, which must outlive the vocabulary (not the tokenizer made of it).
 */
#include "model/model.h"
#include "model/pretokenize.h"

/* GGUF's numbers. */
enum {
    VOCAB_NORMAL = 1,
    VOCAB_UNKNOWN = 2,
    VOCAB_CONTROL = 3,
    VOCAB_USER = 4,
    VOCAB_UNUSED = 5,
    VOCAB_LAST_TYPE = 6
};

typedef struct model_text {
    const char *s; /* not NUL-terminated */
    size_t n;
} model_text;

typedef struct model_vocab {
    const char *tokens_name, *merges_name; /* how messages call them; borrowed */
    int n;
    model_text *tokens; /* [n] in the byte alphabet, special ones as they are */
    uint8_t *types;     /* [n] */
    size_t n_merges;
    model_text (*merges)[2]; /* [n_merges] left and right in the byte alphabet */
    bool *is_end;            /* [n] named by the checkpoint */
    int32_t bos;             /* -1: none */
    bool adds_bos;
    model_pretokenizer *cutter; /* the tokenizer takes it */
} model_vocab;

/* Room for n tokens, all empty and unused, and n_merges merges. */
ep_status model_vocab_init(model_vocab *v, size_t n, size_t n_merges, ep_err *err);
void model_vocab_fini(model_vocab *v);
/* "left right" at its first space. Without one both are empty. */
void model_vocab_split(model_text whole, model_text pair[2]);
/* From the keys tokenizer.ggml.*. On failure what is there is freed by fini. */
ep_status model_vocab_from_file(model_vocab *v, const model_file *f, ep_err *err);

/* Makes the tokenizer; refuses what contradicts itself. */
ep_status model_tokenizer_build(model_tokenizer **out, model_vocab *v, ep_err *err);

#endif
