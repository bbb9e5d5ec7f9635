#ifndef EP_MODEL_HF_H
#define EP_MODEL_HF_H
/*
 * hf: a checkpoint as a folder of Hugging Face's form, made a model: config.json (hf_config.c), the
 * tensors (hf.c), tokenizer.json and its neighbours (vocab_hf.c). Architecture Qwen3-MoE, weights
 * in F32, F16 or BF16 or quantised by GPTQ (gptq.h). Internal to model.
 */
#include "model/gptq.h"
#include "model/json.h"

/* One matrix: floats, or GPTQ's tensors when weight is NULL. */
typedef struct hf_matrix {
    const st_tensor *weight;
    gptq_matrix gptq;
} hf_matrix;

/* The JSON files that are read. */
typedef enum hf_text {
    HF_CONFIG,
    HF_QUANTIZE,
    HF_GENERATION,
    HF_TOKENIZER_CONFIG,
    HF_TOKENIZER,
    HF_N_TEXTS
} hf_text;
extern const char *const hf_text_names[HF_N_TEXTS]; /* "config.json" */

typedef struct hf_config {
    model_shape shape; /* all but the name */
    bool tied;         /* lm_head may be missing */
    bool quantised;    /* matrices may be */
    gptq_rules gptq;
} hf_config;

typedef struct hf_folder hf_folder;

/* path as st_open, the texts lie in the same folder. */
ep_status hf_open(model **out, const char *path, ep_err *err);
/* The same over an opened file, which the model then owns (also on failure it is closed), and texts
 * in memory [HF_N_TEXTS], data NULL where absent, which must outlive the model. */
ep_status hf_open_file(model **out, st_file *file, const st_bytes *texts, ep_err *err);
void hf_close(hf_folder *h);

const st_file *hf_file(const hf_folder *h);
int hf_vocab(const hf_folder *h);
/* A text, parsed; *out stays NULL when it is absent. digest, if not NULL, goes on over its bytes.
 */
ep_status hf_load(const hf_folder *h, hf_text which, model_json **out, uint64_t *digest,
                  ep_err *err);

/* model_rows and model_forget of a tensor of the folder. */
ep_status hf_rows(const hf_folder *h, const model_tensor *t, int i, ep_buf *made,
                  const uint8_t **rows, ep_err *err);
void hf_forget(const hf_folder *h, const model_tensor *t, int i);
/* What only contents can tell, of a sample: attention and the first expert of the first n layers.
 * hf_open does it for one, so that what a whole checkpoint has in common is refused early. */
ep_status hf_check(const model *m, int n_layers, ep_err *err);

/* texts: [HF_N_TEXTS], NULL where absent; the first two are looked at. folder opens messages. */
ep_status hf_config_read(hf_config *out, model_json *const *texts, const char *folder, ep_err *err);

ep_status hf_tokenizer_open(model_tokenizer **out, const hf_folder *h, ep_err *err);
/* The same from parsed texts: generation, tokenizer configuration and tokenizer, and config's
 * end tokens where generation has none. vocab: rows of the embedding. */
ep_status hf_tokenizer_read(model_tokenizer **out, model_json *const *texts, const char *folder,
                            int vocab, ep_err *err);

/* ---- reading an object ---- */

/* One reading; the first fault sticks. Members are `fallback` when absent or null. */
typedef struct hf_reader {
    const char *folder, *name; /* of the file, for messages */
    ep_err *err;
    ep_status status;
} hf_reader;

void hf_refuse(hf_reader *r, ep_status status, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
int64_t hf_get_int(hf_reader *r, const model_json *o, const char *key, int64_t fallback);
bool hf_get_bool(hf_reader *r, const model_json *o, const char *key, bool fallback);
const char *hf_get_str(hf_reader *r, const model_json *o, const char *key, const char *fallback);
/* Within 1 to most and within min to max, or refused. */
int hf_get_dim(hf_reader *r, const model_json *o, const char *key, int64_t fallback, int64_t most);
double hf_get_real(hf_reader *r, const model_json *o, const char *key, double fallback, double min,
                   double max);

#endif
