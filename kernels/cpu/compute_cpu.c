/*
 * compute_cpu: the CPU behind the device contract. A stack is two large mappings of packed weights;
 * a pass is one kern_ffn over a scratch area that reserve made big enough for every stack, so that
 * a pass neither allocates nor fails on valid arguments.
 *
 * Arguments that depend on what a peer sent (row and pair counts, offsets) are checked here once
 * more, since a wrong one would write outside `out`. It does not convert rows, and knows nothing of
 * layers.
 */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include "kernels/compute.h"
#include "kernels/kernels.h"

struct compute {
    ep_pool *pool;
    char line[64];
    compute_stack *stacks; /* every open one, for the size of the scratch */
    void *scratch;
    size_t scratch_bytes;
    int max_rows, max_pairs;
};

struct compute_stack {
    kern_stack s;
    compute *owner;
    compute_stack *next;
    size_t gate_up_bytes, down_bytes;
};

static ep_status cpu_can_open(const char *device, ep_err *err)
{
    if (strcmp(device, "cpu") == 0) return EP_OK;
    return ep_fail(err, EP_ERR_INVALID, "device \"%s\": the CPU is named cpu, without a number",
                   device);
}

static void cpu_close(compute *c)
{
    if (c == NULL) return;
    ep_unmap(c->scratch, c->scratch_bytes);
    ep_pool_close(c->pool);
    ep_free(c);
}

static ep_status cpu_open(compute **out, const char *device, int n_threads, ep_err *err)
{
    ep_status s = cpu_can_open(device, err);
    if (s != EP_OK) return s;
    if (n_threads < 1) return ep_fail(err, EP_ERR_INVALID, "device cpu: %d threads", n_threads);
    compute *c = ep_calloc(1, sizeof *c);
    if (c == NULL) return ep_fail(err, EP_ERR_NOMEM, "device cpu: no memory");
    s = ep_pool_open(&c->pool, n_threads);
    if (s != EP_OK) {
        ep_fail(err, s, "device cpu: cannot start %d threads", n_threads);
        goto fail;
    }
    snprintf(c->line, sizeof c->line, "cpu, %s, %d thread%s", kern_level(), n_threads,
             n_threads == 1 ? "" : "s");
    *out = c;
    return EP_OK;
fail:
    cpu_close(c);
    return s;
}

static const char *cpu_describe(compute *c)
{
    return c->line;
}

static ep_pool *cpu_pool(compute *c)
{
    return c->pool;
}

static void cpu_stack_close(compute_stack *s)
{
    if (s == NULL) return;
    for (compute_stack **at = &s->owner->stacks; *at != NULL; at = &(*at)->next) {
        if (*at != s) continue;
        *at = s->next;
        break;
    }
    ep_unmap(s->s.gate_up, s->gate_up_bytes);
    ep_unmap(s->s.down, s->down_bytes);
    ep_free(s);
}

static ep_status check_matrix(const char *role, int type, int k, ep_err *err)
{
    if (!kern_type_is_served(type)) {
        const char *name = kern_type_name(type);
        return ep_fail(err, EP_ERR_UNSUPPORTED,
                       "%s: weights of type %d (%s) cannot be computed with", role, type,
                       name != NULL ? name : "unknown");
    }
    if (k <= 0 || k > 65536 || k % kern_type_block(type) != 0)
        return ep_fail(err, EP_ERR_UNSUPPORTED,
                       "%s: rows of %d weights; %s needs a multiple of %d up "
                       "to 65536",
                       role, k, kern_type_name(type), kern_type_block(type));
    return EP_OK;
}

static ep_status check_shape(const compute_shape *p, ep_err *err)
{
    ep_status s = check_matrix("gate", p->gate_type, p->hidden, err);
    if (s == EP_OK) s = check_matrix("up", p->up_type, p->hidden, err);
    if (s == EP_OK) s = check_matrix("down", p->down_type, p->inter, err);
    if (s != EP_OK) return s;
    if (p->hidden % KERN_PANEL != 0 || p->inter % KERN_PANEL != 0)
        return ep_fail(err, EP_ERR_UNSUPPORTED,
                       "hidden %d and intermediate size %d must be multiples "
                       "of %d",
                       p->hidden, p->inter, KERN_PANEL);
    if (p->n_experts < 1)
        return ep_fail(err, EP_ERR_INVALID, "a stack of %d experts", p->n_experts);
    return EP_OK;
}

static ep_status cpu_stack_open(compute *c, const compute_shape *shape, compute_stack **out,
                                ep_err *err)
{
    ep_status status = check_shape(shape, err);
    if (status != EP_OK) return status;
    compute_stack *s = ep_calloc(1, sizeof *s);
    if (s == NULL) return ep_fail(err, EP_ERR_NOMEM, "no memory for a stack");
    kern_stack_shape(&s->s, shape->gate_type, shape->up_type, shape->down_type, shape->hidden,
                     shape->inter, shape->n_experts);
    if (shape->paged) {
        s->s.gate_up_stride = (s->s.gate_up_stride + KERN_PAGE - 1) / KERN_PAGE * KERN_PAGE;
        s->s.down_stride = (s->s.down_stride + KERN_PAGE - 1) / KERN_PAGE * KERN_PAGE;
    }
    s->owner = c;
    size_t n = (size_t)shape->n_experts;
    s->gate_up_bytes = s->s.gate_up_stride * n;
    s->down_bytes = s->s.down_stride * n;
    s->s.gate_up = ep_map(s->gate_up_bytes);
    s->s.down = s->s.gate_up != NULL ? ep_map(s->down_bytes) : NULL;
    if (s->s.down == NULL) {
        ep_fail(err, EP_ERR_NOMEM, "no memory for %d experts (%zu MiB)", shape->n_experts,
                (s->gate_up_bytes + s->down_bytes) >> 20);
        cpu_stack_close(s);
        return EP_ERR_NOMEM;
    }
    s->next = c->stacks;
    c->stacks = s;
    *out = s;
    return EP_OK;
}

static ep_status cpu_stack_load(compute_stack *s, int expert_i, const void *gate, const void *up,
                                const void *down, uint64_t *checksum)
{
    if (expert_i < 0 || expert_i >= s->s.n_experts) return EP_ERR_INVALID;
    kern_stack_put(&s->s, expert_i, gate, up, down);
    *checksum = kern_stack_checksum(&s->s, expert_i);
    return EP_OK;
}

/* Replaces the pages of one expert by those of the file. Neighbours that follow one another in the
 * file become one mapping in the kernel. Populating takes the page faults here, not in the first
 * request. */
static ep_status cpu_stack_map(compute_stack *s, int expert_i, int fd, uint64_t gate_up_at,
                               uint64_t down_at)
{
    if (expert_i < 0 || expert_i >= s->s.n_experts) return EP_ERR_INVALID;
    const size_t i = (size_t)expert_i;
    const int flags = MAP_SHARED | MAP_FIXED | MAP_POPULATE;
    void *gate_up = mmap(s->s.gate_up + i * s->s.gate_up_stride, s->s.gate_up_stride, PROT_READ,
                         flags, fd, (off_t)gate_up_at);
    void *down = mmap(s->s.down + i * s->s.down_stride, s->s.down_stride, PROT_READ, flags, fd,
                      (off_t)down_at);
    return gate_up == MAP_FAILED || down == MAP_FAILED ? EP_ERR_IO : EP_OK;
}

static uint64_t cpu_stack_checksum(compute_stack *s, int expert_i)
{
    return kern_stack_checksum(&s->s, expert_i);
}

static kern_act cpu_stack_act(const compute_stack *s)
{
    return kern_stack_act(&s->s);
}

static size_t cpu_stack_bytes(const compute_stack *s)
{
    return s->gate_up_bytes + s->down_bytes;
}

static ep_status cpu_reserve(compute *c, int max_rows, int max_pairs)
{
    size_t need = 0;
    for (compute_stack *s = c->stacks; s != NULL; s = s->next) {
        size_t bytes = kern_ffn_scratch_bytes(&s->s, max_rows, max_pairs, ep_pool_size(c->pool));
        if (bytes > need) need = bytes;
    }
    if (need > c->scratch_bytes) {
        void *p = ep_map(need);
        if (p == NULL) return EP_ERR_NOMEM;
        ep_unmap(c->scratch, c->scratch_bytes);
        c->scratch = p;
        c->scratch_bytes = need;
    }
    c->max_rows = max_rows;
    c->max_pairs = max_pairs;
    return EP_OK;
}

/* The whole pass: the caller's thread is one of those that compute, so nothing could overlap. */
static ep_status cpu_ffn_begin(compute *c, compute_stack *s, const compute_ffn_args *a)
{
    if (a->n_rows > c->max_rows || a->n_pairs > c->max_pairs) return EP_ERR_TOO_LARGE;
    if (a->act != KERN_ACT_F32 && a->act != kern_stack_act(&s->s)) return EP_ERR_INVALID;
    if (!compute_args_are_sound(a, s->s.n_experts)) return EP_ERR_INVALID;
    if (a->n_pairs == 0) return EP_OK;
    kern_ffn_args args = {.rows = a->rows,
                          .act = a->act,
                          .n_rows = a->n_rows,
                          .n_pairs = a->n_pairs,
                          .expert_offset = a->expert_offset,
                          .pair_row = a->pair_row,
                          .pair_out = a->pair_out,
                          .out = a->out};
    kern_ffn(c->pool, &s->s, &args, c->scratch);
    return EP_OK;
}

static bool cpu_ffn_is_done(compute *c)
{
    (void)c;
    return true;
}

static ep_status cpu_ffn_end(compute *c)
{
    (void)c;
    return EP_OK;
}

const compute_ops compute_cpu = {
    .kind = "cpu",
    .can_open = cpu_can_open,
    .open = cpu_open,
    .close = cpu_close,
    .describe = cpu_describe,
    .pool = cpu_pool,
    .stack_open = cpu_stack_open,
    .stack_load = cpu_stack_load,
    .stack_map = cpu_stack_map,
    .stack_checksum = cpu_stack_checksum,
    .stack_act = cpu_stack_act,
    .stack_bytes = cpu_stack_bytes,
    .stack_close = cpu_stack_close,
    .reserve = cpu_reserve,
    .depth = 1,
    .ffn_begin = cpu_ffn_begin,
    .ffn_is_done = cpu_ffn_is_done,
    .ffn_end = cpu_ffn_end,
    .pin = NULL,
    .unpin = NULL,
    .failure = NULL,
};
