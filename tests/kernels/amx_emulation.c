/*
 * amx_emulation: a processor without AMX answers each of its instructions with SIGILL; the handler
 * here decodes the instruction, executes it on tiles in memory and continues behind it. Follows the
 * operation sections of Intel's manual (SDM, volume 2), not the kernels: whoever shares a mistake
 * with gemm_amx.c cannot find it.
 *
 * What the processor would refuse (no configuration, tiles whose shapes do not fit) is reported by
 * name and aborts. What is no AMX instruction stays a SIGILL. Not done: restarting a load half way
 * (start_row must be 0), NaN payloads, instructions newer than AMX-INT8 and AMX-BF16.
 */
#include "amx_emulation.h"

#include "kernels/kernels.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

enum { N_TILES = 8, MAX_ROWS = 16, MAX_ROW_BYTES = 64, CONFIG_BYTES = 64 };

typedef struct tile {
    _Alignas(64) uint8_t row[MAX_ROWS][MAX_ROW_BYTES]; /* zero outside of rows and row_bytes */
    int rows, row_bytes;                               /* 0: not in use */
} tile;

/* Per thread, as the registers are. */
typedef struct tile_state {
    bool configured;
    uint8_t config[CONFIG_BYTES];
    tile t[N_TILES];
} tile_state;

static _Thread_local tile_state state;
static atomic_uint_fast64_t n_executed;

/* ---- decoding ---- */

enum { PREFIX_NONE, PREFIX_66, PREFIX_F3, PREFIX_F2 };

typedef struct instruction {
    int prefix, opcode;  /* of the VEX map 0f38 */
    int reg, rm, second; /* ModRM.reg, ModRM.rm if that is a register, VEX.vvvv */
    bool memory, sib;
    uint64_t base, index; /* base + displacement; index * scale */
    uint64_t length;
} instruction;

static uint64_t general_register(const greg_t *r, int n)
{
    static const int place[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)r[place[n]];
}

/* The memory operand whose ModRM byte is at `at`; returns the byte behind it. x8 and b8 extend
 * index and base to the upper eight registers. */
static const uint8_t *decode_memory(instruction *in, const uint8_t *at, const greg_t *r, int x8,
                                    int b8)
{
    const int mod = *at >> 6, low = *at & 7;
    bool no_base = mod == 0 && low == 5;
    int base = low;
    at++;
    in->memory = true;
    in->sib = low == 4;
    if (in->sib) {
        const int index = (*at >> 3 & 7) | x8, scale = *at >> 6;
        base = *at & 7;
        no_base = mod == 0 && base == 5;
        if (index != 4) in->index = general_register(r, index) << scale; /* 4: no index */
        at++;
    }
    if (!no_base) in->base = general_register(r, base | b8);
    if (mod == 1) {
        in->base += (uint64_t)(int64_t)(int8_t)*at++;
    } else if (mod == 2 || no_base) {
        int32_t displacement;
        memcpy(&displacement, at, sizeof(displacement));
        in->base += (uint64_t)(int64_t)displacement;
        at += sizeof(displacement);
    }
    /* Relative to the next instruction; no AMX instruction has an immediate behind its operand. */
    if (no_base && !in->sib) in->base += (uint64_t)(uintptr_t)at;
    return at;
}

/* False for what is no AMX instruction. Reads no byte that does not belong to an instruction. */
static bool decode(instruction *in, const greg_t *r)
{
    const uint8_t *code = (const uint8_t *)(uintptr_t)r[REG_RIP], *at = code;
    *in = (instruction){0};
    if (*at++ != 0xc4) return false;        /* VEX of three bytes; AMX has no shorter form */
    const int first = ~*at, map = *at & 31; /* R, X, B are stored inverted */
    at++;
    if (map != 2) return false;
    const int r8 = first >> 4 & 8, x8 = first >> 3 & 8, b8 = first >> 2 & 8;
    const bool wide = *at & 0x80, vector256 = *at & 4;
    in->second = ~*at >> 3 & 15;
    in->prefix = *at & 3;
    at++;
    if (wide || vector256 || r8) return false;
    in->opcode = *at++;
    if (in->opcode != 0x49 && in->opcode != 0x4b && in->opcode != 0x5c && in->opcode != 0x5e)
        return false;
    in->reg = *at >> 3 & 7;
    if (*at >> 6 == 3) {
        if (b8) return false;
        in->rm = *at++ & 7;
    } else {
        at = decode_memory(in, at, r, x8, b8);
    }
    in->length = (uint64_t)(at - code);
    return true;
}

/* ---- refusals ---- */

/* Printing here is safe: the signal comes from an instruction of the code under test, never from
 * within stdio. */
__attribute__((format(printf, 2, 3), noreturn)) static void refuse(const char *name,
                                                                   const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fflush(stdout);
    fprintf(stderr, "amx_emulation: %s: ", name);
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, "\n");
    va_end(ap);
    abort();
}

static tile *use_tile(const char *name, int t)
{
    if (!state.configured) refuse(name, "no tile configuration is loaded");
    if (t >= N_TILES) refuse(name, "there is no tile %d", t);
    if (state.t[t].rows == 0) refuse(name, "tile %d is not configured", t);
    return &state.t[t];
}

/* ---- configuration ---- */

static void load_config(const uint8_t *at)
{
    static const char name[] = "ldtilecfg";
    uint8_t c[CONFIG_BYTES];
    tile_state *s = &state;
    memcpy(c, at, sizeof(c));
    if (c[0] == 0) { /* palette 0 releases the tiles, whatever follows it */
        memset(s, 0, sizeof(*s));
        return;
    }
    if (c[0] != 1) refuse(name, "palette %d", c[0]);
    if (c[1] != 0) refuse(name, "start_row %d is not emulated", c[1]);
    for (int i = 0; i < CONFIG_BYTES; i++) {
        const bool reserved = (i >= 2 && i < 16) || (i >= 32 && i < 48) || i >= 56;
        if (reserved && c[i] != 0) refuse(name, "reserved byte %d is %d", i, c[i]);
    }
    memset(s, 0, sizeof(*s));
    for (int t = 0; t < N_TILES; t++) {
        const int bytes = c[16 + 2 * t] | c[17 + 2 * t] << 8, rows = c[48 + t];
        if (bytes > MAX_ROW_BYTES || rows > MAX_ROWS || (bytes == 0) != (rows == 0))
            refuse(name, "tile %d of %d rows of %d bytes", t, rows, bytes);
        s->t[t].rows = rows;
        s->t[t].row_bytes = bytes;
    }
    memcpy(s->config, c, sizeof(c));
    s->configured = true;
}

/* ---- data ---- */

static void clear(tile *t)
{
    memset(t->row, 0, sizeof(t->row));
}

static void load(const char *name, const instruction *in)
{
    tile *t = use_tile(name, in->reg);
    clear(t);
    for (int i = 0; i < t->rows; i++)
        memcpy(t->row[i], (const void *)(uintptr_t)(in->base + (uint64_t)i * in->index),
               (size_t)t->row_bytes);
}

static void store(const char *name, const instruction *in)
{
    const tile *t = use_tile(name, in->reg);
    for (int i = 0; i < t->rows; i++)
        memcpy((void *)(uintptr_t)(in->base + (uint64_t)i * in->index), t->row[i],
               (size_t)t->row_bytes);
}

/* ---- products: c += a * b, of groups of 4 bytes along k ---- */

typedef struct operands {
    tile *c;
    const tile *a, *b;
    int groups; /* along k */
} operands;

static operands use_operands(const char *name, const instruction *in)
{
    tile *c = use_tile(name, in->reg);
    const tile *a = use_tile(name, in->rm), *b = use_tile(name, in->second);
    if (c == a || c == b || a == b)
        refuse(name, "tiles %d, %d, %d are not distinct", in->reg, in->rm, in->second);
    if (c->row_bytes % 4 || a->row_bytes % 4 || b->row_bytes % 4)
        refuse(name, "rows of %d, %d, %d bytes are no groups of four", c->row_bytes, a->row_bytes,
               b->row_bytes);
    if (c->rows != a->rows) refuse(name, "C has %d rows, A %d", c->rows, a->rows);
    if (c->row_bytes != b->row_bytes)
        refuse(name, "rows of C have %d bytes, of B %d", c->row_bytes, b->row_bytes);
    if (b->rows != a->row_bytes / 4)
        refuse(name, "B has %d rows, A %d groups along k", b->rows, a->row_bytes / 4);
    return (operands){.c = c, .a = a, .b = b, .groups = a->row_bytes / 4};
}

/* A row of C is one vector; its lanes past row_bytes stay zero. */
#define WIDE __attribute__((target("avx512f,avx512dq,fma"), noinline))

WIDE static void multiply_bytes(const operands *o, bool a_signed, bool b_signed)
{
    const __mmask16 lanes = (__mmask16)((1u << o->c->row_bytes / 4) - 1);
    for (int k = 0; k < o->groups; k++) {
        const __m512i group = _mm512_load_si512(o->b->row[k]);
        __m512i b[4]; /* byte i of each lane, as 32 bits */
        for (unsigned i = 0; i < 4; i++) {
            const __m512i top = _mm512_slli_epi32(group, 24 - 8 * i);
            b[i] = b_signed ? _mm512_srai_epi32(top, 24) : _mm512_srli_epi32(top, 24);
        }
        for (int m = 0; m < o->c->rows; m++) {
            __m512i sum = _mm512_load_si512(o->c->row[m]); /* wraps, as the tile's does */
            for (int i = 0; i < 4; i++) {
                const uint8_t byte = o->a->row[m][4 * k + i];
                const int a = a_signed ? (int8_t)byte : byte;
                sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(_mm512_set1_epi32(a), b[i]));
            }
            _mm512_store_si512(o->c->row[m], _mm512_maskz_mov_epi32(lanes, sum));
        }
    }
}

/* The lower or upper 16 bits of each lane as floats. */
WIDE static __m512 bf16_half(__m512i v, int upper)
{
    return _mm512_castsi512_ps(upper ? _mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000))
                                     : _mm512_slli_epi32(v, 16));
}

/* Even and odd elements have sums of their own, which begin at zero and meet C at the end. Runs
 * with the processor's own "denormals are zero" and "flush to zero": the scalar specification does
 * both in software, so the two are independent. */
WIDE static void multiply_bf16_rows(const operands *o)
{
    const __mmask16 lanes = (__mmask16)((1u << o->c->row_bytes / 4) - 1);
    for (int m = 0; m < o->c->rows; m++) {
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int k = 0; k < o->groups; k++) {
            int32_t pair;
            memcpy(&pair, &o->a->row[m][4 * k], sizeof(pair));
            const __m512i a = _mm512_set1_epi32(pair), b = _mm512_load_si512(o->b->row[k]);
            for (int odd = 0; odd < 2; odd++)
                sum[odd] = _mm512_fmadd_ps(bf16_half(a, odd), bf16_half(b, odd), sum[odd]);
        }
        const __m512 c = _mm512_load_ps(o->c->row[m]);
        const __m512 next = _mm512_add_ps(c, _mm512_add_ps(sum[0], sum[1]));
        _mm512_store_ps(o->c->row[m], _mm512_maskz_mov_ps(lanes, next));
    }
}

static void multiply_bf16(const operands *o)
{
    enum { masked_nearest = 0x1f80, daz = 0x40, ftz = 0x8000 };
    const unsigned before = _mm_getcsr();
    _mm_setcsr(masked_nearest | daz | ftz);
    multiply_bf16_rows(o); /* a call, so that no operation moves across the change */
    _mm_setcsr(before);
}

/* ---- the instructions ---- */

/* Intel's names; AT&T order of operands is the reverse. */
enum form { LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, LOAD, STORE, BYTES, BF16 };

typedef struct instruction_kind {
    const char *name;
    int opcode, prefix;
    enum form form;
    bool a_signed, b_signed;
} instruction_kind;

static const instruction_kind kinds[] = {
    {"ldtilecfg", 0x49, PREFIX_NONE, LDTILECFG, 0, 0},
    {"sttilecfg", 0x49, PREFIX_66, STTILECFG, 0, 0},
    {"tilerelease", 0x49, PREFIX_NONE, TILERELEASE, 0, 0},
    {"tilezero", 0x49, PREFIX_F2, TILEZERO, 0, 0},
    {"tileloadd", 0x4b, PREFIX_F2, LOAD, 0, 0},
    {"tileloaddt1", 0x4b, PREFIX_66, LOAD, 0, 0},
    {"tilestored", 0x4b, PREFIX_F3, STORE, 0, 0},
    {"tdpbssd", 0x5e, PREFIX_F2, BYTES, true, true},
    {"tdpbsud", 0x5e, PREFIX_F3, BYTES, true, false},
    {"tdpbusd", 0x5e, PREFIX_66, BYTES, false, true},
    {"tdpbuud", 0x5e, PREFIX_NONE, BYTES, false, false},
    {"tdpbf16ps", 0x5c, PREFIX_F3, BF16, 0, 0},
};

/* The fields that the form fixes: kind of operand, and those that must be zero. */
static bool has_form(const instruction *in, enum form form)
{
    switch (form) {
    case LDTILECFG:
    case STTILECFG:
        return in->memory && in->reg == 0 && in->second == 0;
    case TILERELEASE:
        return !in->memory && in->reg == 0 && in->rm == 0 && in->second == 0;
    case TILEZERO:
        return !in->memory && in->rm == 0 && in->second == 0;
    case LOAD:
    case STORE:
        return in->sib && in->second == 0;
    default:
        return !in->memory;
    }
}

static const instruction_kind *kind_of(const instruction *in)
{
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        const instruction_kind *k = &kinds[i];
        if (k->opcode == in->opcode && k->prefix == in->prefix && has_form(in, k->form)) return k;
    }
    return NULL;
}

static void execute(const instruction_kind *k, const instruction *in)
{
    operands o;
    switch (k->form) {
    case LDTILECFG:
        load_config((const uint8_t *)(uintptr_t)(in->base + in->index));
        break;
    case STTILECFG:
        memcpy((void *)(uintptr_t)(in->base + in->index), state.config, CONFIG_BYTES);
        break;
    case TILERELEASE:
        memset(&state, 0, sizeof(state));
        break;
    case TILEZERO:
        clear(use_tile(k->name, in->reg));
        break;
    case LOAD:
        load(k->name, in);
        break;
    case STORE:
        store(k->name, in);
        break;
    case BYTES:
        o = use_operands(k->name, in);
        multiply_bytes(&o, k->a_signed, k->b_signed);
        break;
    case BF16:
        o = use_operands(k->name, in);
        multiply_bf16(&o);
        break;
    }
}

/* ---- the signal ---- */

static void on_illegal_instruction(int number, siginfo_t *info, void *context)
{
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    instruction in;
    const instruction_kind *kind = NULL;
    if (info->si_code > 0 && decode(&in, r)) kind = kind_of(&in); /* > 0: not sent by a process */
    if (kind == NULL) {
        signal(number, SIG_DFL); /* none of ours: ends the process when this returns */
        raise(number);
        return;
    }
    execute(kind, &in);
    r[REG_RIP] += (greg_t)in.length;
    atomic_fetch_add_explicit(&n_executed, 1, memory_order_relaxed);
}

const char *amx_emulation_start(void)
{
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && d & 1u << 24)
        return "the processor has AMX itself";
    if (!kern_has_level("avx512")) return "no AVX-512, which tile code needs besides";
    struct sigaction act = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO};
    sigemptyset(&act.sa_mask);
    if (sigaction(SIGILL, &act, NULL) != 0) return "sigaction failed";
    return NULL;
}

uint64_t amx_emulation_count(void)
{
    return atomic_load(&n_executed);
}

#else

const char *amx_emulation_start(void)
{
    return "no x86-64 processor";
}

uint64_t amx_emulation_count(void)
{
    return 0;
}

#endif
