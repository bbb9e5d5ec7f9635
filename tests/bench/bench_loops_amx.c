/* Full-rate loops with AMX tiles (see bench.h): four accumulators hide the latency of a tile
 * product. Exports its table and nothing else. */
#include <immintrin.h>
#include "tests/bench/bench.h"

/* Palette 1, eight tiles of 16 rows of 64 bytes. A constant, since gcc's _tile_loadconfig tells the
 * compiler of its first eight bytes only, and stores to the others would be dropped. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} config = {.palette = 1,
            .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
            .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

static void open_tiles(void)
{
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
}

static double int8(long rounds)
{
    open_tiles();
    for (long r = 0; r < rounds; r++) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_release();
    return (double)rounds * 4 * 16 * 16 * 64 * 2;
}

static double bf16(long rounds)
{
    open_tiles();
    for (long r = 0; r < rounds; r++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return (double)rounds * 4 * 16 * 16 * 32 * 2;
}

const bench_loops bench_loops_amx = {.name = "amx", .int8 = int8, .bf16 = bf16};
