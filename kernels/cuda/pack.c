/*
 * Packing for CUDA devices on the CPU: loops around the pure functions of layout.h. The invariant
 * is that unpack(pack(x)) gives back the bytes of x for any bytes x; and that a device which
 * computes the same words in parallel gets the same run of bytes.
 *
 * A shard packs on its device when it has one; this is the reference that tests and machines
 * without a device use. It does not know experts or layers: a role of one expert at a time.
 */
#include <string.h>
#include <xxhash.h>
#include "kernels/cuda/pack.h"

void gpu_pack(const gpu_matrix *m, const void *a, const void *b, void *dst)
{
    const uint8_t *const src[2] = {a, b};
    uint8_t *to = dst;
    for (int row_tile = 0; row_tile < m->row_tiles; row_tile++)
        for (int kt = 0; kt < m->k_tiles; kt++)
            for (int w = 0; w < m->tile_bytes / 4; w++, to += 4) {
                uint32_t word = gpu_pack_word(m, src, row_tile, kt, w);
                memcpy(to, &word, 4);
            }
}

void gpu_unpack(const gpu_matrix *m, const void *packed, void *a, void *b)
{
    uint8_t *const dst[2] = {a, b};
    const size_t chunk = (size_t)gpu_chunk_bytes(m->type);
    const uint8_t *tile = packed;
    for (int row_tile = 0; row_tile < m->row_tiles; row_tile++)
        for (int kt = 0; kt < m->k_tiles; kt++, tile += m->tile_bytes)
            for (int r = 0; r < GPU_TILE_ROWS; r++) {
                int source, row = gpu_source_row(m, row_tile, r, &source);
                if (row < 0) continue;
                size_t from = (size_t)kt * chunk, to = from + chunk;
                if (to > m->row_bytes) to = m->row_bytes;
                uint8_t *out = dst[source] + (size_t)row * m->row_bytes;
                for (size_t i = from; i < to; i++)
                    out[i] = gpu_unpack_byte(m->type, tile, r, (int)(i - from));
            }
}

uint64_t gpu_checksum(const void *gate_up, size_t gate_up_bytes, const void *down,
                      size_t down_bytes)
{
    return XXH3_64bits_withSeed(down, down_bytes, XXH3_64bits(gate_up, gate_up_bytes));
}
