/*
 * A dense matrix times rows: a stack of one expert. Rows are prepared by all threads, then panels
 * are taken from a counter in ranges; a row's result depends on nothing but the row and the matrix.
 * Columns past n exist in the last panel only as zeros and are never stored.
 */
#include "kernels/kernels.h"
#include "kernels/rows.h"

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

enum { MAX_ROWS = 64, PIECE_BYTES = 96 * 1024 };

typedef struct job {
    const kern_matrix *w;
    const float *x;
    size_t ldx, ldy, panel_bytes;
    int rows, n_panels, n_chunks, per_piece;
    float *y;
    kern_record form;
    kern_panel_fn fn;
    uint8_t *records;
    ep_pool *pool;
    _Atomic int next_row, next_piece;
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
    _Alignas(64) float part[MAX_ROWS * KERN_PANEL];
    j->fn(part, KERN_PANEL, at, &rows);
    for (int r = 0; r < m; r++)
        memcpy(y + (size_t)r * j->ldy, part + r * KERN_PANEL, sizeof(float) * (size_t)cols);
}

static void run(void *arg, int thread_i, int n_threads)
{
    (void)thread_i;
    (void)n_threads;
    job *j = arg;
    int at;
    while ((at = atomic_fetch_add(&j->next_row, 1)) < j->rows)
        kern_record_from_f32(&j->form, j->records + (size_t)at * j->form.bytes,
                             j->x + (size_t)at * j->ldx);
    ep_pool_barrier(j->pool);
    /* A piece is a range of panels for all rows: the panels' weights are read from memory once. */
    int n_pieces = (j->n_panels + j->per_piece - 1) / j->per_piece;
    while ((at = atomic_fetch_add(&j->next_piece, 1)) < n_pieces) {
        int first = at * j->per_piece, last = imin(first + j->per_piece, j->n_panels);
        for (int c = 0; c < j->rows; c += MAX_ROWS)
            for (int p = first; p < last; p++)
                panel(j, p, c, imin(MAX_ROWS, j->rows - c));
    }
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
    /* Ranges short enough that the threads end together even on a small matrix. */
    int most = (int)(PIECE_BYTES / j.panel_bytes), share = j.n_panels / (8 * ep_pool_size(pool));
    j.per_piece = imin(most, share);
    if (j.per_piece < 1) j.per_piece = 1;
    ep_pool_run(pool, run, &j);
}
