#ifndef EP_TESTS_HF_MAKE_H
#define EP_TESTS_HF_MAKE_H
/*
 * hf_make: a GGUF model written as a folder of Hugging Face's form, in memory or on disk, so that a
 * test has the same model from both sources. Weights go through floats; what GPTQ makes of them is
 * plain rounding. Out of memory ends the process.
 */
#include "model/hf.h"

typedef struct hm_options {
    bool bf16;  /* floats are BF16, else F32 */
    bool gptq;  /* attention and experts are quantised */
    bool plain; /* with gptq: the values that it gives, written as floats */
    bool v2;    /* with gptq: the second version of its zero points */
    bool odd;   /* tensors begin at odd addresses */
    bool pairs; /* merges are lists of two, else texts with a space */
} hm_options;

typedef struct hm_folder {
    ep_buf tensors, texts[HF_N_TEXTS];
    st_bytes tensors_bytes, texts_bytes[HF_N_TEXTS];
} hm_folder;

/* m comes from a GGUF file. */
void hm_make(hm_folder *out, const model *m, const hm_options *o);
void hm_free(hm_folder *f);
/* Opens it where it lies; f must outlive the model. */
ep_status hm_open(model **out, const hm_folder *f, ep_err *err);
/* Writes its files into a folder that is there. */
bool hm_write(const hm_folder *f, const char *folder);

#endif
