/*
 * Memory of the emulated machine. Device addresses are reserved and never readable; what they hold
 * lies elsewhere, and an operation asks for it by address. No address is given out twice, so one
 * that was kept too long is told from a live one. Fresh memory is full of 0xff: counts of -1,
 * values that are no numbers.
 *
 * Pinned memory is the host's, so what belongs to an operation in flight is taken away from it page
 * by page: none to read while a copy may write there, none to write while a copy may read. A host
 * that did not wait faults; that is reported, with the copy, and the host goes on.
 */
#include <cuda_runtime_api.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "tests/gpu/runtime_ops.h"

enum { PAGE = 4096, FILLED = 1 << 16 };

#define ARENA_BYTES ((size_t)64 << 30)

static emu_memory *all;
static uintptr_t arena, arena_next;
static int n_wanted; /* pieces of pinned memory in flight; below 0: pages were opened */

/* ---- finding ---- */

static emu_memory *find(uintptr_t at, bool live)
{
    for (emu_memory *m = all; m != NULL; m = m->next)
        if (m->live == live && at >= m->at && at < m->at + (m->bytes > 0 ? m->bytes : 1)) return m;
    return NULL;
}

emu_memory *emu_memory_at(const void *p, size_t bytes, emu_kind *kind)
{
    const uintptr_t at = (uintptr_t)p;
    emu_memory *m = find(at, true);
    *kind = m != NULL ? m->kind : EMU_PAGEABLE;
    if (m != NULL && at + bytes <= m->at + m->bytes) return m;
    if (m != NULL)
        emu_report("%zu bytes at %zu of a piece of %zu", bytes, (size_t)(at - m->at), m->bytes);
    else if (at >= arena && at < arena + ARENA_BYTES) {
        *kind = EMU_DEVICE;
        emu_report(find(at, false) != NULL ? "device memory that was freed"
                                           : "device memory that nobody allocated");
    } else if (find(at + bytes - 1, true) != NULL)
        emu_report("host memory, a part of which is pinned");
    return NULL;
}

/* What an operation that went wrong reads and writes; kept, as it may hold several. */
typedef struct spare {
    struct spare *next;
    _Alignas(16) uint8_t bytes[];
} spare;
static spare *spares;

static void *nobody(size_t bytes)
{
    spare *s = calloc(1, sizeof *s + bytes);
    if (s == NULL) abort();
    s->next = spares;
    spares = s;
    return s->bytes;
}

static void *contents(const void *p, size_t bytes, bool write)
{
    emu_kind kind;
    emu_memory *m = emu_memory_at(p, bytes, &kind);
    if (m == NULL) {
        if (kind == EMU_PAGEABLE) emu_report("host memory, or none: %p", p);
        return nobody(bytes);
    }
    if (m->kind != EMU_DEVICE) {
        emu_report("host memory in a kernel");
        return nobody(bytes);
    }
    if (m->device != emu_current()->device)
        emu_report("memory of device %d in a stream of device %d", m->device,
                   emu_current()->device);
    emu_touch((uintptr_t)p, bytes, write);
    return m->contents + ((uintptr_t)p - m->at);
}

const void *emu_read(const void *p, size_t bytes)
{
    return contents(p, bytes, false);
}

void *emu_write(void *p, size_t bytes)
{
    return contents(p, bytes, true);
}

/* ---- pinned pages ---- */

static int protection(uint8_t want)
{
    return want == 2 ? PROT_NONE : want == 1 ? PROT_READ : PROT_READ | PROT_WRITE;
}

static void set_pages(emu_memory *m)
{
    for (size_t i = 0, n; i < m->pages; i += n) {
        for (n = 1; i + n < m->pages && m->want[i + n] == m->want[i];)
            n++;
        if (memcmp(m->page + i, m->want + i, n) == 0) continue;
        mprotect((void *)(m->page_at + i * PAGE), n * PAGE, protection(m->want[i]));
        memcpy(m->page + i, m->want + i, n);
    }
}

void emu_open_pages(const void *p, size_t bytes)
{
    emu_kind kind;
    emu_memory *m = emu_memory_at(p, bytes, &kind);
    if (m == NULL || m->pages == 0) return;
    memset(m->want, 0, m->pages);
    set_pages(m);
    n_wanted = -1;
}

static void count(const emu_op *op)
{
    n_wanted += op->host.at != 0;
}

static void want_pages(const emu_op *op)
{
    emu_memory *m = find(op->host.at, true);
    if (m == NULL) return;
    for (size_t i = 0; i < m->pages; i++) {
        uintptr_t at = m->page_at + i * PAGE;
        uint8_t want = op->host.write ? 2 : 1;
        if (at < op->host.end && op->host.at < at + PAGE && m->want[i] < want) m->want[i] = want;
    }
}

void emu_protect(void)
{
    const int before = n_wanted;
    n_wanted = 0;
    emu_each_in_flight(count);
    if (before == 0 && n_wanted == 0) return;
    for (emu_memory *m = all; m != NULL; m = m->next)
        if (m->pages > 0) memset(m->want, 0, m->pages);
    emu_each_in_flight(want_pages);
    for (emu_memory *m = all; m != NULL; m = m->next)
        if (m->live && m->pages > 0) set_pages(m);
}

static void fault(int number, siginfo_t *info, void *context)
{
    const uintptr_t at = (uintptr_t)info->si_addr;
    (void)context;
    emu_lock();
    emu_memory *m = find(at, true);
    if (at >= arena && at < arena + ARENA_BYTES) {
        printf("    emulated CUDA: host code touches device memory\n");
        fflush(stdout);
        _exit(1);
    }
    if (m == NULL || m->pages == 0 || at < m->page_at) {
        signal(number, SIG_DFL); /* not ours: it comes again */
        emu_unlock();
        return;
    }
    bool writes;
    emu_op *op = emu_in_flight(at, &writes);
    if (op != NULL && !op->told) {
        op->told = true;
        emu_report("host code %s memory of a copy that it has not waited for: %s",
                   writes ? "touches" : "writes", op->name);
    }
    m->want[(at - m->page_at) / PAGE] = 0;
    set_pages(m);
    emu_unlock();
}

/* ---- making and freeing ---- */

static void start_machine(void)
{
    struct sigaction a = {.sa_sigaction = fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    if (arena != 0) return;
    void *p =
        mmap(NULL, ARENA_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    arena = arena_next = (uintptr_t)p;
    sigaction(SIGSEGV, &a, NULL);
}

static emu_memory *add(emu_kind kind, uintptr_t at, size_t bytes)
{
    emu_memory *m = calloc(1, sizeof *m);
    if (m == NULL) abort();
    m->kind = kind;
    m->live = true;
    m->device = emu_device_now();
    m->at = at;
    m->bytes = bytes;
    if (kind != EMU_DEVICE) {
        m->page_at = (at + PAGE - 1) / PAGE * PAGE;
        uintptr_t end = (at + bytes) / PAGE * PAGE;
        if (kind == EMU_PINNED) end = (at + bytes + PAGE - 1) / PAGE * PAGE;
        m->pages = end > m->page_at ? (end - m->page_at) / PAGE : 0;
        m->page = calloc(2, m->pages + 1);
        if (m->page == NULL) abort();
        m->want = m->page + m->pages;
    }
    m->next = all;
    all = m;
    return m;
}

/* Host pages become the host's again. */
static void give_back(emu_memory *m)
{
    if (m->pages > 0) {
        memset(m->want, 0, m->pages);
        set_pages(m);
    }
    m->live = false;
    free(m->contents);
    free(m->page);
    m->contents = m->page = m->want = NULL;
    m->pages = 0;
    if (m->kind == EMU_PINNED) munmap((void *)m->at, m->mapped);
}

static void end_of(const void *p, emu_kind kind)
{
    emu_memory *m = find((uintptr_t)p, true);
    if (m == NULL || m->at != (uintptr_t)p || m->kind != kind) {
        emu_report("%p is not such memory, or no longer", p);
        return;
    }
    emu_settle(m->at, m->bytes);
    give_back(m);
}

cudaError_t cudaMalloc(void **p, size_t bytes)
{
    int e = emu_begin("cudaMalloc", EMU_NOT_CAPTURED);
    start_machine();
    if (e == cudaSuccess) {
        emu_memory *m = add(EMU_DEVICE, arena_next, bytes);
        /* pages between pieces are nobody's */
        arena_next += (bytes + PAGE - 1) / PAGE * PAGE + PAGE;
        if (arena_next > arena + ARENA_BYTES) abort();
        m->contents = malloc(bytes > 0 ? bytes : 1);
        if (m->contents == NULL) abort();
        memset(m->contents, 0xff, bytes);
        *p = (void *)m->at;
    }
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaFree(void *p)
{
    int e = emu_begin("cudaFree", EMU_NOT_CAPTURED);
    if (p != NULL) end_of(p, EMU_DEVICE);
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags)
{
    int e = emu_begin("cudaHostAlloc", EMU_NOT_CAPTURED);
    start_machine();
    if (e == cudaSuccess && (flags & ~(unsigned)cudaHostAllocPortable) != 0)
        emu_report("flags %u are not emulated", flags);
    if (e == cudaSuccess) {
        size_t pages = (bytes + PAGE - 1) / PAGE * PAGE;
        uint8_t *at =
            mmap(NULL, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) abort();
        mprotect(at + pages, PAGE, PROT_NONE);
        /* as much as passes of tests use: filling costs more than they do */
        memset(at, 0xff, pages < FILLED ? pages : FILLED);
        emu_memory *m = add(EMU_PINNED, (uintptr_t)at, bytes);
        m->mapped = pages + PAGE;
        *p = at;
    }
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaMallocHost(void **p, size_t bytes)
{
    return cudaHostAlloc(p, bytes, 0);
}

cudaError_t cudaFreeHost(void *p)
{
    int e = emu_begin("cudaFreeHost", EMU_NOT_CAPTURED);
    if (p != NULL) end_of(p, EMU_PINNED);
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned flags)
{
    int e = emu_begin("cudaHostRegister", EMU_NOT_CAPTURED);
    start_machine();
    if (e == cudaSuccess && (flags & ~(unsigned)cudaHostRegisterPortable) != 0)
        emu_report("flags %u are not emulated", flags);
    if (e == cudaSuccess && (p == NULL || bytes == 0)) e = cudaErrorInvalidValue;
    if (e == cudaSuccess)
        for (emu_memory *m = all; m != NULL && e == cudaSuccess; m = m->next)
            if (m->live && m->at < (uintptr_t)p + bytes && (uintptr_t)p < m->at + m->bytes)
                e = cudaErrorHostMemoryAlreadyRegistered;
    if (e == cudaSuccess) add(EMU_REGISTERED, (uintptr_t)p, bytes);
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaHostUnregister(void *p)
{
    int e = emu_begin("cudaHostUnregister", EMU_NOT_CAPTURED);
    end_of(p, EMU_REGISTERED);
    return (cudaError_t)emu_end(e);
}

/* ---- the end of a machine ---- */

void emu_memory_forget(void)
{
    while (all != NULL) {
        emu_memory *m = all;
        all = m->next;
        if (m->live) give_back(m);
        free(m);
    }
    while (spares != NULL) {
        spare *s = spares;
        spares = s->next;
        free(s);
    }
    start_machine();
    arena_next = arena;
}

int emu_memory_left(void)
{
    int n = 0;
    for (const emu_memory *m = all; m != NULL; m = m->next)
        n += m->live;
    return n;
}
