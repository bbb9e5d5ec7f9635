#ifndef EP_TESTS_GPU_STAND_IN_XXHASH_H
#define EP_TESTS_GPU_STAND_IN_XXHASH_H
/*
 * For machines without xxHash (cmake/gpu_only.cmake): the two functions that the kernels use, of
 * the same types, with another hash (FNV-1a over words of eight bytes). Never part of moed itself.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint64_t XXH64_hash_t;

static inline XXH64_hash_t XXH3_64bits_withSeed(const void *p, size_t n, XXH64_hash_t seed)
{
    const unsigned char *from = p;
    uint64_t h = (0xcbf29ce484222325u ^ seed) + n, word;
    for (; n > 0; from += sizeof word) {
        size_t take = n < sizeof word ? n : sizeof word;
        word = 0;
        memcpy(&word, from, take);
        h = (h ^ word) * 0x100000001b3u;
        h ^= h >> 29;
        n -= take;
    }
    return h;
}
static inline XXH64_hash_t XXH3_64bits(const void *p, size_t n)
{
    return XXH3_64bits_withSeed(p, n, 0);
}
#endif
