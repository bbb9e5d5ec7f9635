/*
 * Sizes of formats: blocks of the file, rows of activations, packed panels. One table holds what is
 * known of each type; everything else is arithmetic on it. Nothing here touches data, and unknown
 * types (a file may name any number) answer false, 0 or NULL.
 */
#include "kernels/formats.h"

typedef struct type_info {
    int type;
    const char *name;
    bool served;
    int block, block_bytes;
    kern_act act;
    /* Bytes of a panel: head_bytes a block, the sum rounded up to 64, and body_bytes a block. */
    int head_bytes, body_bytes;
} type_info;

static const type_info types[] = {
    {KERN_F32, "F32", true, 1, 4, KERN_ACT_F32, 0, 64},
    {KERN_F16, "F16", true, 1, 2, KERN_ACT_F32, 0, 32},
    {KERN_BF16, "BF16", true, 1, 2, KERN_ACT_BF16, 0, 32},
    {KERN_Q4_0, "Q4_0", true, 32, 18, KERN_ACT_Q8_32, 32, 256},
    {KERN_Q5_0, "Q5_0", true, 32, 22, KERN_ACT_Q8_32, 32, 320},
    {KERN_Q8_0, "Q8_0", true, 32, 34, KERN_ACT_Q8_32, 32, 512},
    {KERN_Q4_K, "Q4_K", true, 256, 144, KERN_ACT_Q8_256, 0, 2304},
    {KERN_Q5_K, "Q5_K", true, 256, 176, KERN_ACT_Q8_256, 0, 2816},
    {KERN_Q6_K, "Q6_K", true, 256, 210, KERN_ACT_Q8_256, 32, 3328},
    {KERN_GPTQ4, "GPTQ4", true, 128, 66, KERN_ACT_Q8_128, 32, 1024},
    {KERN_MXFP4, "MXFP4", false, 32, 17, KERN_ACT_Q8_32, 32, 256},
};

static const type_info *find(int type)
{
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++)
        if (types[i].type == type) return &types[i];
    return NULL;
}

bool kern_type_is_served(int type)
{
    const type_info *t = find(type);
    return t != NULL && t->served;
}

const char *kern_type_name(int type)
{
    const type_info *t = find(type);
    return t != NULL ? t->name : NULL;
}

int kern_type_block(int type)
{
    const type_info *t = find(type);
    return t != NULL ? t->block : 0;
}

int kern_type_block_bytes(int type)
{
    const type_info *t = find(type);
    return t != NULL ? t->block_bytes : 0;
}

size_t kern_type_row_bytes(int type, int k)
{
    const type_info *t = find(type);
    if (t == NULL || k <= 0 || k % t->block != 0) return 0;
    return (size_t)(k / t->block) * (size_t)t->block_bytes;
}

kern_act kern_type_act(int type)
{
    const type_info *t = find(type);
    return t != NULL ? t->act : KERN_ACT_F32;
}

kern_act kern_gate_up_act(int gate_type, int up_type)
{
    kern_act gate = kern_type_act(gate_type);
    return gate == kern_type_act(up_type) ? gate : KERN_ACT_F32;
}

int kern_act_block(kern_act act)
{
    switch (act) {
    case KERN_ACT_Q8_256:
        return 256;
    case KERN_ACT_Q8_128:
        return 128;
    case KERN_ACT_Q8_32:
        return 32;
    case KERN_ACT_F32:
    case KERN_ACT_BF16:
        break;
    }
    return 1;
}

size_t kern_act_row_bytes(kern_act act, int k)
{
    size_t n = (size_t)k;
    switch (act) {
    case KERN_ACT_F32:
        return 4 * n;
    case KERN_ACT_BF16:
        return (2 * n + 3) & ~(size_t)3;
    case KERN_ACT_Q8_256:
    case KERN_ACT_Q8_128:
    case KERN_ACT_Q8_32:
        break;
    }
    return n + 4 * (n / (size_t)kern_act_block(act));
}

size_t kern_panel_bytes(int type, int k)
{
    const type_info *t = find(type);
    if (t == NULL || k <= 0 || k % t->block != 0) return 0;
    if (type == KERN_BF16) k = (k + 31) & ~31;
    size_t blocks = (size_t)(k / t->block);
    size_t head = (blocks * (size_t)t->head_bytes + 63) & ~(size_t)63;
    return head + blocks * (size_t)t->body_bytes;
}

size_t kern_packed_bytes(int type, int n, int k)
{
    size_t panels = ((size_t)n + KERN_PANEL - 1) / KERN_PANEL;
    return panels * kern_panel_bytes(type, k);
}
