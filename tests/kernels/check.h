#ifndef EP_TESTS_KERNELS_CHECK_H
#define EP_TESTS_KERNELS_CHECK_H
/*
 * check_kernels: proves packing, the products of every instruction set, kern_linear and kern_ffn.
 * Shared by its files, and with the programs that check and time CUDA: a seeded generator, failure
 * counting, and a reading of the file formats that is independent of kernels/pack.c.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "kernels/cpu/ops.h"

extern bool check_quick;    /* small shapes, for emulated machines */
extern bool check_emulated; /* AMX in software: every shape of tiles, few patterns of data */
extern int check_failures;
extern const int check_types[];
extern const int check_n_types;

/* Each program has its own: counts a failure and prints it (the first twenty), or ends. */
void check_fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#define CHECK_SEED UINT64_C(0x12a2fa48a7b66e8e)
void check_seed(uint64_t seed); /* of the stream, which begins there; CHECK_SEED without */
uint64_t check_random(void);    /* the next 64 bits of the stream */
int check_below(int n);
void check_reseed(void);  /* begins the stream again */
float check_normal(void); /* about -2..2, three digits of exponent below */

/* Random bytes of a file row; scales are finite halves. `mode` picks adversarial values. */
enum { MODE_RANDOM, MODE_MAX, MODE_DENORMAL, MODE_ZERO, MODE_NEGATIVE, N_MODES };
extern const char *const check_mode_names[N_MODES];
void check_file_rows(int type, int mode, int n, int k, uint8_t *dst);

/* Weight i of a file row, in double, from the description of the format; *magnitude: the sum of the
 * absolute terms it is made of. */
double check_weight(int type, const uint8_t *row, int i, double *magnitude);

/* Owned activation rows in the form of a type. */
typedef struct check_rows {
    kern_rows view;
    void *parts[5];
} check_rows;
void check_rows_make(check_rows *r, kern_act act, int mode, int m, int k);
void check_rows_free(check_rows *r);
/* Value i of row r in double. */
double check_rows_value(const kern_rows *v, int r, int i);

void check_packing(void);
void check_scalar_bounds(void);
void check_panels(const char *level);
void check_tiles(void); /* the level must be amx, or AMX be emulated */
void check_linear(const char *level);
void check_ffn(const char *level);

#endif
