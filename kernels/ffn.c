/*
 * The stacked product of a layer: down(silu(gate x) * up x) for every (row, expert) pair.
 *
 * Four phases with a barrier between them: rows are prepared (once per form that gate and up want),
 * gathered by pair, multiplied by gate and up, and the hidden values, quantised again, by down. In
 * the two product phases work is cut into pieces (rows of one expert, a range of its panels) of
 * about equal time, taken from a counter in ascending order: each thread streams weights, a thread
 * that a neighbour slows takes fewer, and at 1 row as at 4096 all end within one piece of each
 * other.
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
    MAX_ROWS = 64,           /* rows in one panel call: they and their results stay in the caches */
    PIECE_COST = 100 * 1024, /* about a piece's size, in bytes of cold weights */
    ROW_COST = 40 /* a row's multiplications with this many weights cost a byte, in 1/1024 */
};

/* The rows of one expert that one piece multiplies, and how its panels are cut. */
typedef struct group {
    int32_t expert, first, m; /* pairs first .. first+m-1 */
    int32_t piece[2];         /* index of its first piece in the gate-up and the down phase */
} group;

typedef struct job {
    const kern_stack *s;
    const kern_ffn_args *a;
    int n_forms;
    kern_record in[2],
        mid; /* forms of the input (gate and up share one or not) and of down's input */
    kern_panel_fn gate, up, down;
    size_t gate_panel, up_panel, down_panel;
    uint8_t *row_records[2], *pair_records[2], *mid_records;
    float *h; /* [n_pairs, inter] */
    group *groups;
    int n_groups; /* groups[n_groups] ends the list with the numbers of pieces */
    ep_pool *pool;
    _Atomic int next[5];
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
    return experts + n_pairs / MAX_ROWS + 1;
}

typedef struct layout {
    size_t rows[2], pairs[2], mid, h, groups, total;
} layout;

static layout lay_out(const kern_stack *s, size_t n_rows, size_t n_pairs)
{
    kern_record in[2], mid = kern_record_make(kern_type_act(s->down_type), s->inter);
    int n = forms_of(s, in);
    layout l = {0};
    size_t at = 0;
    for (int i = 0; i < n; i++) {
        l.rows[i] = at;
        at += n_rows * in[i].bytes + KERN_ROWS_TAIL;
        l.pairs[i] = at;
        at += n_pairs * in[i].bytes + KERN_ROWS_TAIL;
    }
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
    (void)n_threads; /* results of a panel call live on the stacks of the threads */
    return lay_out(s, (size_t)max_rows, (size_t)max_pairs).total;
}

/* ---- cutting ---- */

static int imin(int a, int b)
{
    return a < b ? a : b;
}

/* Panels (or gate-up panel pairs) in a piece: `bytes` and `weights` of one, m rows. */
static int panels_per_piece(size_t bytes, size_t weights, int m, int n_panels)
{
    size_t cost = bytes + weights * (size_t)m * ROW_COST / 1024;
    int n = (int)(PIECE_COST / (cost ? cost : 1));
    return n < 1 ? 1 : imin(n, n_panels);
}

static int piece_panels(const job *j, int phase, int m)
{
    const kern_stack *s = j->s;
    if (phase == 0)
        return panels_per_piece(j->gate_panel + j->up_panel, (size_t)s->hidden * 32, m,
                                s->inter / KERN_PANEL);
    return panels_per_piece(j->down_panel, (size_t)s->inter * 16, m, s->hidden / KERN_PANEL);
}

static int panels_of(const job *j, int phase)
{
    return (phase == 0 ? j->s->inter : j->s->hidden) / KERN_PANEL;
}

static void cut(job *j)
{
    int pieces[2] = {0, 0};
    for (int e = 0; e < j->s->n_experts; e++) {
        int first = j->a->expert_offset[e], total = j->a->expert_offset[e + 1] - first;
        int chunks = (total + MAX_ROWS - 1) / MAX_ROWS;
        for (int c = 0; c < chunks; c++) {
            /* chunks of equal size, rounded to whole tiles of 16 rows where that is possible */
            int size = ((total + chunks - 1) / chunks + 15) & ~15;
            int at = imin(c * size, total), m = imin(size, total - at);
            if (m <= 0) break;
            group *g = &j->groups[j->n_groups++];
            *g = (group){.expert = e, .first = first + at, .m = m};
            for (int phase = 0; phase < 2; phase++) {
                int per = piece_panels(j, phase, m);
                g->piece[phase] = pieces[phase];
                pieces[phase] += (panels_of(j, phase) + per - 1) / per;
            }
        }
    }
    j->groups[j->n_groups].piece[0] = pieces[0];
    j->groups[j->n_groups].piece[1] = pieces[1];
}

/* ---- phases ---- */

static const uint8_t *wire_row(const job *j, int row)
{
    return (const uint8_t *)j->a->rows + (size_t)row * kern_act_row_bytes(j->a->act, j->s->hidden);
}

/* Takes `step` consecutive items from counter `c`; false when none are left. */
static bool take(job *j, int c, int step, int end, int *at)
{
    *at = atomic_fetch_add_explicit(&j->next[c], step, memory_order_relaxed);
    return *at < end;
}

static void prepare_rows(job *j)
{
    int at;
    while (take(j, 0, 1, j->a->n_rows, &at))
        for (int i = 0; i < j->n_forms; i++) {
            uint8_t *dst = j->row_records[i] + (size_t)at * j->in[i].bytes;
            if (j->a->act == j->in[i].act)
                kern_record_from_row(&j->in[i], dst, wire_row(j, at));
            else
                kern_record_from_f32(&j->in[i], dst, (const float *)(const void *)wire_row(j, at));
        }
}

static void gather_pairs(job *j)
{
    int at;
    while (take(j, 1, 8, j->a->n_pairs, &at))
        for (int p = at; p < imin(at + 8, j->a->n_pairs); p++)
            for (int i = 0; i < j->n_forms; i++) {
                size_t bytes = j->in[i].bytes;
                memcpy(j->pair_records[i] + (size_t)p * bytes,
                       j->row_records[i] + (size_t)j->a->pair_row[p] * bytes, bytes);
            }
}

static void gate_up_panel(job *j, const group *g, int panel, const kern_rows rows[2])
{
    _Alignas(64) float gate[MAX_ROWS * KERN_PANEL], up[MAX_ROWS * KERN_PANEL];
    const uint8_t *at = j->s->gate_up + (size_t)g->expert * j->s->gate_up_stride +
                        (size_t)panel * (j->gate_panel + j->up_panel);
    j->gate(gate, KERN_PANEL, at, &rows[0]);
    j->up(up, KERN_PANEL, at + j->gate_panel, &rows[j->n_forms - 1]);
    kern_vec_now.silu_mul(gate, gate, up, g->m * KERN_PANEL);
    float *h = j->h + (size_t)g->first * (size_t)j->s->inter + (size_t)panel * KERN_PANEL;
    for (int r = 0; r < g->m; r++)
        memcpy(h + (size_t)r * (size_t)j->s->inter, gate + r * KERN_PANEL,
               sizeof(float) * KERN_PANEL);
}

static void down_panel(job *j, const group *g, int panel, const kern_rows *rows)
{
    _Alignas(64) float y[MAX_ROWS * KERN_PANEL];
    const uint8_t *at =
        j->s->down + (size_t)g->expert * j->s->down_stride + (size_t)panel * j->down_panel;
    j->down(y, KERN_PANEL, at, rows);
    for (int r = 0; r < g->m; r++)
        memcpy(j->a->out + (size_t)j->a->pair_out[g->first + r] * (size_t)j->s->hidden +
                   (size_t)panel * KERN_PANEL,
               y + r * KERN_PANEL, sizeof(float) * KERN_PANEL);
}

/* phase 0: gate and up, 1: down */
static void products(job *j, int phase)
{
    int n_pieces = j->groups[j->n_groups].piece[phase], at;
    const group *g = j->groups; /* pieces come to a thread in ascending order */
    while (take(j, 3 + phase, 1, n_pieces, &at)) {
        while (g[1].piece[phase] <= at)
            g++;
        int per = piece_panels(j, phase, g->m), first = (at - g->piece[phase]) * per;
        int last = imin(first + per, panels_of(j, phase));
        kern_rows rows[2];
        if (phase == 0) {
            for (int i = 0; i < j->n_forms; i++)
                rows[i] = kern_record_view(
                    &j->in[i], j->pair_records[i] + (size_t)g->first * j->in[i].bytes, g->m);
            for (int p = first; p < last; p++)
                gate_up_panel(j, g, p, rows);
        } else {
            rows[0] =
                kern_record_view(&j->mid, j->mid_records + (size_t)g->first * j->mid.bytes, g->m);
            for (int p = first; p < last; p++)
                down_panel(j, g, p, rows);
        }
    }
}

static void prepare_mid(job *j)
{
    int at;
    while (take(j, 2, 1, j->a->n_pairs, &at))
        kern_record_from_f32(&j->mid, j->mid_records + (size_t)at * j->mid.bytes,
                             j->h + (size_t)at * (size_t)j->s->inter);
}

static void run(void *arg, int thread_i, int n_threads)
{
    (void)thread_i;
    (void)n_threads;
    job *j = arg;
    prepare_rows(j);
    ep_pool_barrier(j->pool);
    gather_pairs(j);
    ep_pool_barrier(j->pool);
    products(j, 0);
    ep_pool_barrier(j->pool);
    prepare_mid(j);
    ep_pool_barrier(j->pool);
    products(j, 1);
}

void kern_ffn(ep_pool *pool, const kern_stack *s, const kern_ffn_args *a, void *scratch)
{
    if (a->n_pairs == 0) return;
    assert(a->act == KERN_ACT_F32 || a->act == kern_stack_act(s));
    layout l = lay_out(s, (size_t)a->n_rows, (size_t)a->n_pairs);
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
             .mid_records = base + l.mid,
             .h = (float *)(void *)(base + l.h),
             .groups = (group *)(void *)(base + l.groups)};
    j.n_forms = forms_of(s, j.in);
    for (int i = 0; i < j.n_forms; i++) {
        j.row_records[i] = base + l.rows[i];
        j.pair_records[i] = base + l.pairs[i];
    }
    cut(&j);
    ep_pool_run(pool, run, &j);
}
