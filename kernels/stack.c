/*
 * The stacked experts of one layer: shape, placing one expert's panels, checksum. Gate and up
 * panels of the same 16 outputs lie side by side, so the pass over them is one stream and SwiGLU
 * can happen before the store. Owns no memory; kern_stack_put writes only the expert it was given.
 */
#include "kernels/kernels.h"

#include <assert.h>
#include <xxhash.h>

static size_t lines(size_t bytes)
{
    return (bytes + 63) & ~(size_t)63;
}

void kern_stack_shape(kern_stack *s, int gate_type, int up_type, int down_type, int hidden,
                      int inter, int n_experts)
{
    assert(hidden % KERN_PANEL == 0 && inter % KERN_PANEL == 0);
    *s = (kern_stack){.gate_type = gate_type,
                      .up_type = up_type,
                      .down_type = down_type,
                      .hidden = hidden,
                      .inter = inter,
                      .n_experts = n_experts};
    s->gate_up_stride = lines(kern_packed_bytes(gate_type, inter, hidden) +
                              kern_packed_bytes(up_type, inter, hidden));
    s->down_stride = lines(kern_packed_bytes(down_type, hidden, inter));
}

void kern_stack_put(kern_stack *s, int expert_i, const void *gate, const void *up, const void *down)
{
    size_t gate_panel = kern_panel_bytes(s->gate_type, s->hidden);
    size_t up_panel = kern_panel_bytes(s->up_type, s->hidden);
    size_t gate_row = kern_type_row_bytes(s->gate_type, s->hidden);
    size_t up_row = kern_type_row_bytes(s->up_type, s->hidden);
    uint8_t *dst = s->gate_up + (size_t)expert_i * s->gate_up_stride;
    for (size_t at = 0; at < (size_t)s->inter; at += KERN_PANEL) {
        kern_pack(s->gate_type, KERN_PANEL, s->hidden, (const uint8_t *)gate + at * gate_row, dst);
        dst += gate_panel;
        kern_pack(s->up_type, KERN_PANEL, s->hidden, (const uint8_t *)up + at * up_row, dst);
        dst += up_panel;
    }
    kern_pack(s->down_type, s->hidden, s->inter, down, s->down + (size_t)expert_i * s->down_stride);
}

uint64_t kern_stack_checksum(const kern_stack *s, int expert_i)
{
    /* The first hash seeds the second: one value for both runs without a state to allocate. Padding
     * up to a line is left out, it is nobody's data. */
    size_t gate_up = kern_packed_bytes(s->gate_type, s->inter, s->hidden) +
                     kern_packed_bytes(s->up_type, s->inter, s->hidden);
    size_t down = kern_packed_bytes(s->down_type, s->hidden, s->inter);
    uint64_t h = XXH3_64bits(s->gate_up + (size_t)expert_i * s->gate_up_stride, gate_up);
    return XXH3_64bits_withSeed(s->down + (size_t)expert_i * s->down_stride, down, h);
}

kern_act kern_stack_act(const kern_stack *s)
{
    return kern_gate_up_act(s->gate_type, s->up_type);
}
