#ifndef EP_MODEL_SAFETENSORS_PART_H
#define EP_MODEL_SAFETENSORS_PART_H
/*
 * safetensors_part: one file of a checkpoint, between safetensors_part.c, which reads its bytes,
 * and safetensors.c, which makes a set of them.
 */
#include "model/safetensors.h"

typedef struct st_note_text {
    const char *key, *value;
} st_note_text;

typedef struct st_part {
    char *name, *path; /* as the index spells it; for messages */
    const uint8_t *map;
    size_t size;
    bool mapped; /* map is ours to unmap */
    size_t data_start;
    size_t n_tensors, n_notes;
    st_tensor *tensors; /* [n_tensors], in the order of their data */
    st_note_text *notes;
    char *text; /* every name, key and value */
} st_part;

/* Reads p->map; name, path, map and size are set. What was allocated is freed by fini, also on
 * failure. */
ep_status st_part_parse(st_part *p, ep_err *err);
void st_part_fini(st_part *p); /* all but the map */

/* Not empty, not long, no control characters: fit for messages and terminals. */
bool st_text_is_clean(const char *s, size_t most);

/* Limit of a header, and of an index. */
#define ST_MAX_HEADER ((size_t)100 * 1000 * 1000)

#endif
