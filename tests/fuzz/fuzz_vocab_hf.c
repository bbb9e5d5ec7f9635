/*
 * Fuzzes tokenizer.json and its neighbours: generation_config.json, tokenizer_config.json and the
 * tokenizer, with two bytes of length in front of the first two; an empty one is absent. Whatever
 * is accepted must give texts (its own among them) back byte for byte, with ids in range.
 */
#include "model/hf.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { N_VOCAB = 600 };

static void must(bool ok)
{
    if (!ok) abort();
}

static void take(ep_cursor *c, hf_text which, bool last, model_json **texts)
{
    size_t left = ep_cursor_left(c), n = last ? left : ep_get_u16(c);
    if (n > ep_cursor_left(c)) n = ep_cursor_left(c);
    const uint8_t *p = ep_get_bytes(c, n);
    if (p != NULL && n > 0) (void)model_json_parse(&texts[which], p, n, hf_text_names[which], NULL);
}

static void check_text(const model_tokenizer *t, const void *s, size_t n, bool parse)
{
    int32_t *ids = NULL;
    size_t n_ids = 0;
    ep_buf back = {0};
    must(model_encode(t, s, n, parse, &ids, &n_ids) == EP_OK);
    for (size_t i = 0; i < n_ids; i++) {
        must(model_decode(t, ids[i], true, &back) == EP_OK);
        (void)model_is_end(t, ids[i]);
    }
    must(back.len == n && (n == 0 || memcmp(back.data, s, n) == 0));
    ep_buf_fini(&back);
    ep_free(ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const words[] = {"the heathen said: aaaa\n\n\n1812 \xC3\xA9 \xFF",
                                        "<|im_end|><think>the</think>"};
    ep_cursor c = ep_cursor_make(data, size);
    model_json *texts[HF_N_TEXTS] = {NULL};
    model_tokenizer *t = NULL;
    ep_err err = {{0}};
    take(&c, HF_GENERATION, false, texts);
    take(&c, HF_TOKENIZER_CONFIG, false, texts);
    take(&c, HF_TOKENIZER, true, texts);
    ep_status status = hf_tokenizer_read(&t, texts, "f", N_VOCAB, &err);
    must(status == EP_OK || err.text[0] != '\0');
    if (status == EP_OK) {
        must(model_n_tokens(t) == N_VOCAB && model_bos(t) < N_VOCAB);
        for (int parse = 0; parse < 2; parse++) {
            check_text(t, words[0], strlen(words[0]), parse);
            check_text(t, words[1], strlen(words[1]), parse);
            check_text(t, data, size < 512 ? size : 512, parse);
        }
        model_tokenizer_close(t);
    }
    for (int i = 0; i < HF_N_TEXTS; i++)
        model_json_free(texts[i]);
    return 0;
}
