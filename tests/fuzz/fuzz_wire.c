/*
 * Any bytes through wire_open, and through every view it allows. As no mutation guesses a checksum,
 * the same bytes are then sealed with the header they claim and opened again, so the checks behind
 * the checksum (kind, form, counts against the length) are reached too. A view that leaves the
 * message is found by the address sanitizer, since the message is an exact heap copy.
 */
#include "proto/wire.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile uint64_t sink;

static void look(const uint8_t *msg, size_t size, const wire_header *h)
{
    uint64_t sum = 0;
    if (h->kind == WIRE_SLICE) {
        size_t at = wire_slice_pairs_at((kern_act)h->form, h->hidden, h->n_rows);
        const uint8_t *rows = wire_slice_rows(msg, h);
        size_t bytes = h->n_rows * kern_act_row_bytes((kern_act)h->form, (int)h->hidden);
        if (rows + bytes > msg + at || at + 8 * (size_t)h->n_pairs != size) abort();
        for (size_t i = 0; i < bytes; i++)
            sum += rows[i];
        for (uint32_t i = 0; i < h->n_pairs; i++)
            sum += wire_slice_pair(msg, h, i).row;
    } else if (h->kind == WIRE_REPLY) {
        const float *rows = wire_reply_rows(msg, h);
        for (size_t i = 0; i < (size_t)h->n_pairs * h->hidden; i++) {
            uint32_t bits;
            memcpy(&bits, &rows[i], sizeof(bits));
            sum += bits;
        }
    } else if (h->bytes != 0) {
        abort();
    }
    sink = sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    wire_header h, again;
    wire_reason why;
    uint8_t *exact = malloc(size ? size : 1);
    if (exact == NULL) abort();
    memcpy(exact, data, size);
    if (wire_open(exact, size, &h, &why) == EP_OK) look(exact, size, &h);
    if (wire_reason_name(why) == NULL) abort();
    if (size >= WIRE_HEADER_BYTES) {
        wire_seal(exact, size, &h);
        ep_status status = wire_open(exact, size, &again, &why);
        if (status == EP_OK) look(exact, size, &again);
        if (status != EP_OK && (why == WIRE_WHY_NONE || why == WIRE_WHY_MAGIC ||
                                why == WIRE_WHY_LENGTH || why == WIRE_WHY_CHECKSUM))
            abort();
        if (again.sequence != h.sequence || again.n_pairs != h.n_pairs) abort();
    }
    free(exact);
    return 0;
}
