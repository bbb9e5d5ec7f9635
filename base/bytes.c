/*
 * Cursor over untrusted bytes: little-endian reads with one sticky error, so a reader takes a group
 * of fields and checks once. A failed read consumes nothing and gives 0.
 */
#include "base/base.h"

#include <string.h>

ep_cursor ep_cursor_make(const void *p, size_t n)
{
    const uint8_t *at = p;
    return (ep_cursor){.at = at, .end = at + n};
}

size_t ep_cursor_left(const ep_cursor *c)
{
    return (size_t)(c->end - c->at);
}

const uint8_t *ep_get_bytes(ep_cursor *c, size_t n)
{
    if (c->bad || n > ep_cursor_left(c)) {
        c->bad = true;
        return NULL;
    }
    const uint8_t *p = c->at;
    c->at += n;
    return p;
}

uint64_t ep_load_le(const uint8_t *p, size_t n)
{
    uint64_t v = 0;
    for (size_t i = 0; i < n; i++)
        v |= (uint64_t)p[i] << (8 * i);
    return v;
}

void ep_store_le(uint8_t *p, uint64_t v, size_t n)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)(v >> (8 * i));
}

static uint64_t get_le(ep_cursor *c, size_t n)
{
    const uint8_t *p = ep_get_bytes(c, n);
    return p != NULL ? ep_load_le(p, n) : 0;
}

uint8_t ep_get_u8(ep_cursor *c)
{
    return (uint8_t)get_le(c, 1);
}
uint16_t ep_get_u16(ep_cursor *c)
{
    return (uint16_t)get_le(c, 2);
}
uint32_t ep_get_u32(ep_cursor *c)
{
    return (uint32_t)get_le(c, 4);
}
uint64_t ep_get_u64(ep_cursor *c)
{
    return get_le(c, 8);
}

float ep_get_f32(ep_cursor *c)
{
    uint32_t bits = ep_get_u32(c);
    float v;
    memcpy(&v, &bits, sizeof(v));
    return v;
}
