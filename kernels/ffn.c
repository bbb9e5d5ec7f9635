/*
 * The stacked product of a layer: down(silu(gate x) * up x) for every (row, expert) pair.
 *
 * Phases with a barrier between them: rows are prepared (once per form that gate and up want),
 * multiplied by gate and up, and the hidden values, quantised again, by down. A thread gathers the
 * rows of an expert when it comes to it, so they are warm in its own cache. In the two product
 * phases all panels of all experts lie on one line of cost, in bytes of cold weights, known in
 * advance; threads take stretches of it, long ones first (so that each streams its weights) and
 * ever shorter ones, so that at 1 row as at 4096 all end within a panel of each other, also when a
 * neighbour slows one of them.
 *
 * Every output element is made by one panel call from one row, so results depend on neither the
 * cut nor the company. Nothing is allocated: the scratch is the caller's.
 */
#include "kernels/kernels.h"
#include "kernels/rows.h"

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

enum {
    CALL_ROWS = 128,       /* rows in one panel call: their results stay in L1 */
    GROUP_ROWS = 512,      /* rows that meet a panel one after another: they stay in L2 */
    ROW_SHARE = 26,        /* a row times 1024 weights costs as much as reading so many bytes */
    LEAST_COST = 48 * 1024 /* shortest stretch worth a start of its own */
};

/* Rows of one expert: pairs first .. first+m-1. Its panels lie at cost at[phase] + i * step[phase]
 * on the line of each product phase (0: gate and up, 1: down). */
typedef struct group {
    int32_t expert, first, m;
    uint64_t at[2], step[2];
} group;

typedef struct job {
    const kern_stack *s;
    const kern_ffn_args *a;
    int n_forms;
    kern_record in[2],
        mid; /* forms of the input (gate and up share one or not) and of down's input */
    kern_panel_fn gate, up, down;
    size_t gate_panel, up_panel, down_panel;
    uint8_t *row_records[2], *mid_records;
    uint8_t *gathered; /* rows of one group for each thread, gathered_bytes apart */
    size_t gathered_bytes;
    float *h; /* [n_pairs, inter] */
    group *groups;
    int n_groups; /* groups[n_groups].at: the ends of the lines */
    ep_pool *pool;
    _Atomic int next[2];       /* rows and hidden rows taken */
    _Atomic uint64_t taken[2]; /* of the two lines */
} job;

static size_t lines(size_t bytes)
{
    return (bytes + 63) & ~(size_t)63;
}

/* ---- scratch ---- */

static int forms_of(const kern_stack *s, kern_record in[2])
{
    kern_act gate = kern_type_act(s->gate_type), up = kern_type_act(s->up_type);
    in[0] = kern_record_make(gate, s->hidden);
    in[1] = kern_record_make(up, s->hidden);
    return gate == up ? 1 : 2;
}

static size_t max_groups(const kern_stack *s, size_t n_pairs)
{
    size_t experts = n_pairs < (size_t)s->n_experts ? n_pairs : (size_t)s->n_experts;
    return experts + n_pairs / GROUP_ROWS + 1;
}

typedef struct layout {
    size_t rows[2], gathered, gathered_bytes, mid, h, groups, total;
} layout;

static layout lay_out(const kern_stack *s, size_t n_rows, size_t n_pairs, size_t n_threads)
{
    kern_record in[2], mid = kern_record_make(kern_type_act(s->down_type), s->inter);
    int n = forms_of(s, in);
    layout l = {0};
    size_t at = 0;
    size_t most = n_pairs < GROUP_ROWS ? n_pairs : GROUP_ROWS;
    for (int i = 0; i < n; i++) {
        l.rows[i] = at;
        at += n_rows * in[i].bytes + KERN_ROWS_TAIL;
        l.gathered_bytes += most * in[i].bytes + KERN_ROWS_TAIL;
    }
    l.gathered = at;
    at += n_threads * l.gathered_bytes;
    l.mid = at;
    at += n_pairs * mid.bytes + KERN_ROWS_TAIL;
    l.h = at;
    at += lines(n_pairs * (size_t)s->inter * sizeof(float));
    l.groups = at;
    l.total = at + lines(max_groups(s, n_pairs) * sizeof(group));
    return l;
}

size_t kern_ffn_scratch_bytes(const kern_stack *s, int max_rows, int max_pairs, int n_threads)
{
    return lay_out(s, (size_t)max_rows, (size_t)max_pairs, (size_t)n_threads).total;
}

/* ---- cutting ---- */

static int imin(int a, int b)
{
    return a < b ? a : b;
}

/* Cost of a panel of down, or of gate and up together, with m rows. */
static uint64_t panel_cost(const job *j, int phase, int m)
{
    uint64_t bytes = phase == 0 ? j->gate_panel + j->up_panel : j->down_panel;
    uint64_t weights = (uint64_t)(phase == 0 ? 2 * j->s->hidden : j->s->inter) * KERN_PANEL;
    return bytes + weights * (uint64_t)m * ROW_SHARE / 1024;
}

static int panels_of(const job *j, int phase)
{
    return (phase == 0 ? j->s->inter : j->s->hidden) / KERN_PANEL;
}

static void cut(job *j)
{
    uint64_t end[2] = {0, 0};
    for (int e = 0; e < j->s->n_experts; e++) {
        int at = j->a->expert_offset[e], last = j->a->expert_offset[e + 1];
        for (int parts = (last - at + GROUP_ROWS - 1) / GROUP_ROWS; parts > 0; parts--) {
            group *g = &j->groups[j->n_groups++];
            *g = (group){.expert = e, .first = at, .m = (last - at) / parts};
            for (int phase = 0; phase < 2; phase++) {
                g->at[phase] = end[phase];
                g->step[phase] = panel_cost(j, phase, g->m);
                end[phase] += g->step[phase] * (uint64_t)panels_of(j, phase);
            }
            at += g->m;
        }
    }
    j->groups[j->n_groups].at[0] = end[0];
    j->groups[j->n_groups].at[1] = end[1];
}

/* ---- phases ---- */

static const uint8_t *wire_row(const job *j, int row)
{
    return (const uint8_t *)j->a->rows + (size_t)row * kern_act_row_bytes(j->a->act, j->s->hidden);
}

/* Takes the next item of counter `c`; false when none are left. */
static bool take(job *j, int c, int end, int *at)
{
    *at = atomic_fetch_add_explicit(&j->next[c], 1, memory_order_relaxed);
    return *at < end;
}

static void prepare_rows(job *j)
{
    int at;
    while (take(j, 0, j->a->n_rows, &at))
        for (int i = 0; i < j->n_forms; i++) {
            uint8_t *dst = j->row_records[i] + (size_t)at * j->in[i].bytes;
            if (j->a->act == j->in[i].act)
                kern_record_from_row(&j->in[i], dst, wire_row(j, at));
            else
                kern_record_from_f32(&j->in[i], dst, (const float *)(const void *)wire_row(j, at));
        }
}

/* The input of one group in the forms of gate and up, all rows one after another. */
typedef struct input {
    const group *g;
    const uint8_t *records[2];
} input;

/* Rows that already lie side by side stay where they are; others are copied to the thread's own
 * place. */
static void gather(const job *j, const group *g, int thread_i, input *in)
{
    const int32_t *row = j->a->pair_row + g->first;
    uint8_t *own = j->gathered + (size_t)thread_i * j->gathered_bytes;
    int run = 1;
    while (run < g->m && row[run] == row[0] + run)
        run++;
    in->g = g;
    for (int i = 0; i < j->n_forms; i++) {
        size_t bytes = j->in[i].bytes;
        in->records[i] = j->row_records[i] + (size_t)row[0] * bytes;
        if (run == g->m) continue;
        for (int r = 0; r < g->m; r++)
            memcpy(own + (size_t)r * bytes, j->row_records[i] + (size_t)row[r] * bytes, bytes);
        in->records[i] = own;
        own += (size_t)g->m * bytes + KERN_ROWS_TAIL;
    }
}

/* Rows from `at` on, as many as one call takes. */
static kern_rows some_rows(const kern_record *f, const uint8_t *records, int m, int at)
{
    return kern_record_view(f, records + (size_t)at * f->bytes, imin(CALL_ROWS, m - at));
}

static void gate_up_panel(const job *j, const input *in, int panel)
{
    const group *g = in->g;
    _Alignas(64) float gate[CALL_ROWS * KERN_PANEL], up[CALL_ROWS * KERN_PANEL];
    size_t inter = (size_t)j->s->inter;
    const uint8_t *w = j->s->gate_up + (size_t)g->expert * j->s->gate_up_stride +
                       (size_t)panel * (j->gate_panel + j->up_panel);
    for (int at = 0; at < g->m; at += CALL_ROWS) {
        kern_rows x = some_rows(&j->in[0], in->records[0], g->m, at);
        j->gate(gate, KERN_PANEL, w, &x);
        if (j->n_forms == 2) x = some_rows(&j->in[1], in->records[1], g->m, at);
        j->up(up, KERN_PANEL, w + j->gate_panel, &x);
        kern_vec_now.silu_mul(gate, gate, up, x.m * KERN_PANEL);
        float *h = j->h + (size_t)(g->first + at) * inter + (size_t)panel * KERN_PANEL;
        for (int r = 0; r < x.m; r++)
            memcpy(h + (size_t)r * inter, gate + r * KERN_PANEL, sizeof(float) * KERN_PANEL);
    }
}

static void down_panel(const job *j, const group *g, int panel)
{
    _Alignas(64) float y[CALL_ROWS * KERN_PANEL];
    size_t hidden = (size_t)j->s->hidden;
    const uint8_t *w =
        j->s->down + (size_t)g->expert * j->s->down_stride + (size_t)panel * j->down_panel;
    const uint8_t *records = j->mid_records + (size_t)g->first * j->mid.bytes;
    for (int at = 0; at < g->m; at += CALL_ROWS) {
        kern_rows x = some_rows(&j->mid, records, g->m, at);
        const int32_t *to = j->a->pair_out + g->first + at;
        float *out = j->a->out + (size_t)panel * KERN_PANEL;
        /* one line of each output row, far apart: fetched while the products are made */
        for (int r = 0; r < x.m; r++)
            __builtin_prefetch(out + (size_t)to[r] * hidden, 1, 2);
        j->down(y, KERN_PANEL, w, &x);
        for (int r = 0; r < x.m; r++)
            memcpy(out + (size_t)to[r] * hidden, y + r * KERN_PANEL, sizeof(float) * KERN_PANEL);
    }
}

/* Takes the next stretch of a line: a share of what is left that makes the last ones short. */
static bool take_stretch(job *j, int phase, int n_threads, uint64_t *from, uint64_t *to)
{
    uint64_t end = j->groups[j->n_groups].at[phase], at = atomic_load(&j->taken[phase]), next;
    do {
        if (at >= end) return false;
        uint64_t share = (end - at) / (2 * (uint64_t)n_threads);
        next = at + (share > LEAST_COST ? share : LEAST_COST);
    } while (!atomic_compare_exchange_weak(&j->taken[phase], &at, next));
    *from = at;
    *to = next < end ? next : end;
    return true;
}

/* Runs the panels that begin in the stretches this thread gets, which come in ascending order. */
static void products(job *j, int phase, int thread_i, int n_threads)
{
    input in = {0};
    const group *g = j->groups, *end = j->groups + j->n_groups;
    uint64_t from, to;
    while (take_stretch(j, phase, n_threads, &from, &to)) {
        while (g[1].at[phase] <= from)
            g++;
        for (; g < end && g->at[phase] < to; g++) {
            uint64_t start = g->at[phase], step = g->step[phase];
            int first = from > start ? (int)((from - start + step - 1) / step) : 0;
            int last = imin((int)((to - start + step - 1) / step), panels_of(j, phase));
            if (phase == 0 && in.g != g && first < last) gather(j, g, thread_i, &in);
            for (int p = first; p < last; p++) {
                if (phase == 0)
                    gate_up_panel(j, &in, p);
                else
                    down_panel(j, g, p);
            }
            if (g[1].at[phase] >= to) break; /* the next stretch may begin in this group */
        }
    }
}

static void prepare_mid(job *j)
{
    int at;
    while (take(j, 1, j->a->n_pairs, &at))
        kern_record_from_f32(&j->mid, j->mid_records + (size_t)at * j->mid.bytes,
                             j->h + (size_t)at * (size_t)j->s->inter);
}

static void run(void *arg, int thread_i, int n_threads)
{
    job *j = arg;
    prepare_rows(j);
    ep_pool_barrier(j->pool);
    products(j, 0, thread_i, n_threads);
    ep_pool_barrier(j->pool);
    prepare_mid(j);
    ep_pool_barrier(j->pool);
    products(j, 1, thread_i, n_threads);
}

void kern_ffn(ep_pool *pool, const kern_stack *s, const kern_ffn_args *a, void *scratch)
{
    if (a->n_pairs == 0) return;
    assert(a->act == KERN_ACT_F32 || a->act == kern_stack_act(s));
    layout l = lay_out(s, (size_t)a->n_rows, (size_t)a->n_pairs, (size_t)ep_pool_size(pool));
    uint8_t *base = scratch;
    job j = {.s = s,
             .a = a,
             .pool = pool,
             .mid = kern_record_make(kern_type_act(s->down_type), s->inter),
             .gate = kern_panel_of(s->gate_type),
             .up = kern_panel_of(s->up_type),
             .down = kern_panel_of(s->down_type),
             .gate_panel = kern_panel_bytes(s->gate_type, s->hidden),
             .up_panel = kern_panel_bytes(s->up_type, s->hidden),
             .down_panel = kern_panel_bytes(s->down_type, s->inter),
             .gathered = base + l.gathered,
             .gathered_bytes = l.gathered_bytes,
             .mid_records = base + l.mid,
             .h = (float *)(void *)(base + l.h),
             .groups = (group *)(void *)(base + l.groups)};
    j.n_forms = forms_of(s, j.in);
    for (int i = 0; i < j.n_forms; i++)
        j.row_records[i] = base + l.rows[i];
    cut(&j);
    ep_pool_run(pool, run, &j);
}
