#ifndef EP_TESTS_UNIT_GGUF_BUILD_H
#define EP_TESTS_UNIT_GGUF_BUILD_H
/*
 * A GGUF writer for tests: right by default, and wrong exactly where a test says so. Keys and
 * tensors are appended in order; gb_bytes puts them together. Memory failures end the test program.
 */
#include "base/base.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct gb {
    ep_buf keys, infos;
    uint64_t n_keys, n_tensors, data_bytes; /* may be changed before gb_bytes */
    uint32_t version;
    uint64_t alignment;
} gb;

static inline gb gb_make(void)
{
    return (gb){.version = 3, .alignment = 32};
}

static inline void gb_fini(gb *g)
{
    ep_buf_fini(&g->keys);
    ep_buf_fini(&g->infos);
}

static inline void gb_add(ep_buf *b, const void *p, size_t n)
{
    if (ep_buf_add(b, p, n) != EP_OK) abort();
}

/* The lowest n bytes of v, little-endian. */
static inline void gb_int(ep_buf *b, uint64_t v, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint8_t byte = (uint8_t)(v >> (8 * i));
        gb_add(b, &byte, 1);
    }
}

static inline void gb_text(ep_buf *b, const char *s, size_t n)
{
    gb_int(b, n, 8);
    gb_add(b, s, n);
}

/* A key's name and kind; the value follows by gb_int(&g->keys, ...) or gb_text. */
static inline void gb_key(gb *g, const char *name, uint32_t kind)
{
    gb_text(&g->keys, name, strlen(name));
    gb_int(&g->keys, kind, 4);
    g->n_keys++;
}

static inline void gb_key_int(gb *g, const char *name, uint32_t kind, uint64_t v)
{
    static const uint8_t bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    gb_key(g, name, kind);
    gb_int(&g->keys, v, bytes[kind]);
}

static inline void gb_u32(gb *g, const char *name, uint32_t v)
{
    gb_key_int(g, name, 4, v);
}

static inline void gb_f32(gb *g, const char *name, float v)
{
    uint32_t bits;
    memcpy(&bits, &v, 4);
    gb_key_int(g, name, 6, bits);
}

static inline void gb_str(gb *g, const char *name, const char *s)
{
    gb_key(g, name, 8);
    gb_text(&g->keys, s, strlen(s));
}

/* The head of an array; n elements follow by gb_int or gb_text. */
static inline void gb_arr(gb *g, const char *name, uint32_t kind, uint64_t n)
{
    gb_key(g, name, 9);
    gb_int(&g->keys, kind, 4);
    gb_int(&g->keys, n, 8);
}

/* A tensor's entry with everything said by the caller; takes no room in the data. */
static inline void gb_info(gb *g, const char *name, int type, uint32_t n_dims, const uint64_t *ne,
                           uint64_t offset)
{
    gb_text(&g->infos, name, strlen(name));
    gb_int(&g->infos, n_dims, 4);
    for (uint32_t d = 0; d < n_dims && d < 8; d++)
        gb_int(&g->infos, ne[d], 8);
    gb_int(&g->infos, (uint32_t)type, 4);
    gb_int(&g->infos, offset, 8);
    g->n_tensors++;
}

/* A tensor of these bytes, next in the data. */
static inline void gb_tensor(gb *g, const char *name, int type, uint32_t n_dims, const uint64_t *ne,
                             uint64_t bytes)
{
    gb_info(g, name, type, n_dims, ne, g->data_bytes);
    g->data_bytes = (g->data_bytes + bytes + g->alignment - 1) / g->alignment * g->alignment;
}

/* A vector of n floats. */
static inline void gb_vector(gb *g, const char *name, uint64_t n)
{
    gb_tensor(g, name, 0, 1, &n, 4 * n);
}

/* The file; its data are bytes that count up. */
static inline ep_buf gb_bytes(const gb *g)
{
    ep_buf b = {0};
    gb_add(&b, "GGUF", 4);
    gb_int(&b, g->version, 4);
    gb_int(&b, g->n_tensors, 8);
    gb_int(&b, g->n_keys, 8);
    if (g->keys.len > 0) gb_add(&b, g->keys.data, g->keys.len);
    if (g->infos.len > 0) gb_add(&b, g->infos.data, g->infos.len);
    while (g->data_bytes > 0 && b.len % g->alignment != 0)
        gb_int(&b, 0, 1);
    for (uint64_t i = 0; i < g->data_bytes; i++)
        gb_int(&b, i & 0xff, 1);
    return b;
}

#endif
