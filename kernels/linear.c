/*
 * A dense matrix times rows: a stack of one expert. Rows are prepared by all threads, then panels
 * are taken in stretches, long ones first so that each thread streams its weights, short ones last
 * so that all end together; a row's result depends on nothing but the row and the matrix. Columns
 * past n exist in the last panel only as zeros and are never stored.
 */
#include "kernels/kernels.h"
#include "kernels/rows.h"

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

enum { CALL_ROWS = 128 /* rows in one panel call */ };

typedef struct job {
    const kern_matrix *w;
    const float *x;
    size_t ldx, ldy, panel_bytes;
    int rows, n_panels;
    float *y;
    kern_record form;
    kern_panel_fn fn;
    uint8_t *records;
    ep_pool *pool;
    _Atomic int next_row, next_panel;
} job;

static int imin(int a, int b)
{
    return a < b ? a : b;
}

static void panel(job *j, int panel_i, int first, int m)
{
    kern_rows rows = kern_record_view(&j->form, j->records + (size_t)first * j->form.bytes, m);
    const uint8_t *at = j->w->data + (size_t)panel_i * j->panel_bytes;
    float *y = j->y + (size_t)first * j->ldy + (size_t)panel_i * KERN_PANEL;
    int cols = imin(KERN_PANEL, j->w->n - panel_i * KERN_PANEL);
    if (cols == KERN_PANEL) {
        j->fn(y, j->ldy, at, &rows);
        return;
    }
    _Alignas(64) float part[CALL_ROWS * KERN_PANEL];
    j->fn(part, KERN_PANEL, at, &rows);
    for (int r = 0; r < m; r++)
        memcpy(y + (size_t)r * j->ldy, part + r * KERN_PANEL, sizeof(float) * (size_t)cols);
}

/* Takes panels first .. last-1: a share of what is left. */
static bool take_panels(job *j, int n_threads, int *first, int *last)
{
    int at = atomic_load(&j->next_panel), next;
    do {
        if (at >= j->n_panels) return false;
        int share = (j->n_panels - at) / (2 * n_threads);
        next = at + (share > 1 ? share : 1);
    } while (!atomic_compare_exchange_weak(&j->next_panel, &at, next));
    *first = at;
    *last = next;
    return true;
}

static void run(void *arg, int thread_i, int n_threads)
{
    (void)thread_i;
    job *j = arg;
    int at, first, last;
    while ((at = atomic_fetch_add(&j->next_row, 1)) < j->rows)
        kern_record_from_f32(&j->form, j->records + (size_t)at * j->form.bytes,
                             j->x + (size_t)at * j->ldx);
    ep_pool_barrier(j->pool);
    /* all rows meet a panel before the next one: weights are read from memory once */
    while (take_panels(j, n_threads, &first, &last))
        for (int p = first; p < last; p++)
            for (int r = 0; r < j->rows; r += CALL_ROWS)
                panel(j, p, r, imin(CALL_ROWS, j->rows - r));
}

size_t kern_linear_scratch_bytes(int type, int n, int k, int max_rows, int n_threads)
{
    (void)n;
    (void)n_threads;
    return (size_t)max_rows * kern_record_make(kern_type_act(type), k).bytes + KERN_ROWS_TAIL;
}

void kern_linear(ep_pool *pool, const kern_matrix *w, const float *x, size_t ldx, int rows,
                 float *y, size_t ldy, void *scratch)
{
    if (rows == 0) return;
    job j = {.w = w,
             .x = x,
             .ldx = ldx,
             .ldy = ldy,
             .panel_bytes = kern_panel_bytes(w->type, w->k),
             .rows = rows,
             .n_panels = (w->n + KERN_PANEL - 1) / KERN_PANEL,
             .y = y,
             .form = kern_record_make(kern_type_act(w->type), w->k),
             .fn = kern_panel_of(w->type),
             .records = scratch,
             .pool = pool};
    assert(j.panel_bytes > 0);
    ep_pool_run(pool, run, &j);
}
