#ifndef EP_KERNELS_ROWS_H
#define EP_KERNELS_ROWS_H
/*
 * rows: prepared activation rows, private to kernels/. A prepared row is one record, an odd number
 * of cache lines, that holds everything a panel function reads of it: the values, their block
 * scales and their sums. So gathering a row for an expert is one copy, and sixteen records in a
 * tile fall into different cache sets. Records follow one another; kern_rows (cpu/ops.h) is a view
 * of them.
 */
#include "kernels/cpu/ops.h"

/* Room past the last record, since panel functions may read a little further than they use. */
enum { KERN_ROWS_TAIL = 128 };

typedef struct kern_record {
    kern_act act;
    int k;
    size_t bytes;               /* of one record */
    size_t scale, sum16, sum32; /* offsets; values lie at 0 */
} kern_record;

kern_record kern_record_make(kern_act act, int k);
/* Makes a record from floats, or from a wire row (kern_act_rows) of the same form. */
void kern_record_from_f32(const kern_record *f, uint8_t *dst, const float *x);
void kern_record_from_row(const kern_record *f, uint8_t *dst, const void *row);
/* The view of m records. */
kern_rows kern_record_view(const kern_record *f, const uint8_t *records, int m);

/* The panel function in use for a weight type. */
kern_panel_fn kern_panel_of(int type);

#endif
