/*
 * From the file's order to rows and back. A word of the file holds eight neighbouring weights of
 * one column, lowest nibble first; a block of our rows holds its 128 weights two to a byte, the
 * first in the low nibble. So the four bytes of word (r, c), in memory order on any machine, are
 * bytes 4(r%16) to 4(r%16)+3 of block r/16 of row c: the conversion is a transposition of words,
 * done over tiles of columns so that the lines of the file are used whole. The halves move beside.
 */
#include "model/gptq.h"

#include <string.h>

enum { TILE = 16, WORDS = GPTQ_GROUP / 8 };

static size_t row_bytes(int k)
{
    return (size_t)(k / GPTQ_GROUP) * sizeof(kern_block_gptq4);
}

void gptq_rows_from_words(int n, int k, const void *qweight, const void *scales, void *rows)
{
    const uint8_t *words = qweight, *halves = scales;
    size_t row = row_bytes(k), width = (size_t)n;
    for (size_t c0 = 0; c0 < width; c0 += TILE) {
        size_t c1 = c0 + TILE < width ? c0 + TILE : width;
        for (size_t g = 0; g < (size_t)(k / GPTQ_GROUP); g++) {
            uint8_t *block = (uint8_t *)rows + g * sizeof(kern_block_gptq4);
            for (size_t c = c0; c < c1; c++)
                memcpy(block + c * row, halves + (g * width + c) * 2, 2);
            block += offsetof(kern_block_gptq4, q);
            for (size_t r = 0; r < WORDS; r++)
                for (size_t c = c0; c < c1; c++)
                    memcpy(block + c * row + 4 * r, words + ((g * WORDS + r) * width + c) * 4, 4);
        }
    }
}

void gptq_rows_to_words(int n, int k, const void *rows, void *qweight, void *scales)
{
    uint8_t *words = qweight, *halves = scales;
    size_t row = row_bytes(k), width = (size_t)n;
    for (size_t c = 0; c < width; c++) {
        for (size_t g = 0; g < (size_t)(k / GPTQ_GROUP); g++) {
            const uint8_t *block = (const uint8_t *)rows + c * row + g * sizeof(kern_block_gptq4);
            memcpy(halves + (g * width + c) * 2, block, 2);
            block += offsetof(kern_block_gptq4, q);
            for (size_t r = 0; r < WORDS; r++)
                memcpy(words + ((g * WORDS + r) * width + c) * 4, block + 4 * r, 4);
        }
    }
}
