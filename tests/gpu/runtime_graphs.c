/*
 * Graphs of the emulated machine: what a stream was given between begin and end of a capture, with
 * the pointers of that time. A launch queues all of it again, in its order.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "tests/gpu/runtime_ops.h"

/* A cudaGraph_t, or a cudaGraphExec_t with a copy of its nodes. */
typedef struct emu_graph {
    struct emu_graph *next;
    bool live, executable;
    int device;
    emu_op *nodes;
    int n_nodes;
} emu_graph;

static emu_graph *all;

static emu_graph *add(bool executable)
{
    emu_graph *g = calloc(1, sizeof *g);
    if (g == NULL) abort();
    g->live = true;
    g->executable = executable;
    g->device = emu_device_now();
    g->next = all;
    all = g;
    return g;
}

static emu_graph *graph_of(const void *p, bool executable)
{
    for (emu_graph *g = all; g != NULL; g = g->next)
        if (p == (void *)g && g->live && g->executable == executable) return g;
    emu_report(p == NULL ? "no graph" : "no such graph, or one that was destroyed");
    return NULL;
}

static void append(emu_graph *g, const emu_op *op)
{
    emu_op *nodes = realloc(g->nodes, (size_t)(g->n_nodes + 1) * sizeof *nodes);
    if (nodes == NULL) abort();
    g->nodes = nodes;
    nodes[g->n_nodes++] = *op;
}

void emu_capture(emu_graph *g, const emu_op *op)
{
    if (op->chained && (g->n_nodes == 0 || g->nodes[g->n_nodes - 1].what != EMU_KERNEL))
        emu_report("chained to what is no kernel of this graph");
    append(g, op);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t p, enum cudaStreamCaptureMode mode)
{
    int e = emu_begin("cudaStreamBeginCapture", EMU_NOT_CAPTURED);
    emu_stream *s = e == cudaSuccess ? emu_stream_of(p) : NULL;
    if (e == cudaSuccess && (s == NULL || s->i == 0 || s->graph != NULL)) {
        emu_report("the stream cannot capture");
        e = cudaErrorIllegalState;
    }
    if (e == cudaSuccess) {
        if (mode != cudaStreamCaptureModeThreadLocal)
            emu_report("other threads must be able to load while this one captures");
        s->graph = add(false);
        emu_set_captures(true);
    }
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaStreamEndCapture(cudaStream_t p, cudaGraph_t *out)
{
    int e = emu_begin("cudaStreamEndCapture", EMU_ANY);
    emu_stream *s = emu_stream_of(p);
    *out = NULL;
    emu_set_captures(false);
    if (s == NULL || s->graph == NULL) {
        if (e == cudaSuccess) emu_report("the stream captures nothing");
        return (cudaError_t)emu_end(e == cudaSuccess ? cudaErrorIllegalState : e);
    }
    if (e == cudaSuccess)
        *out = (cudaGraph_t)(void *)s->graph;
    else
        s->graph->live = false;
    s->graph = NULL;
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t p, unsigned long long flags)
{
    int e = emu_begin("cudaGraphInstantiate", EMU_ANY);
    emu_graph *g = e == cudaSuccess ? graph_of(p, false) : NULL;
    if (e == cudaSuccess && (g == NULL || flags != 0)) e = cudaErrorInvalidValue;
    if (e == cudaSuccess) {
        emu_graph *exec = add(true);
        for (int i = 0; i < g->n_nodes; i++)
            append(exec, &g->nodes[i]);
        *out = (cudaGraphExec_t)(void *)exec;
    }
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaGraphDestroy(cudaGraph_t p)
{
    int e = emu_begin("cudaGraphDestroy", EMU_ANY);
    emu_graph *g = graph_of(p, false);
    if (g != NULL) g->live = false;
    return (cudaError_t)emu_end(e);
}

/* What was launched is still done. */
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t p)
{
    int e = emu_begin("cudaGraphExecDestroy", EMU_ANY);
    emu_graph *g = graph_of(p, true);
    if (g != NULL) g->live = false;
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t p, cudaStream_t s)
{
    int e = emu_begin("cudaGraphLaunch", EMU_ANY);
    emu_graph *g = e == cudaSuccess ? graph_of(p, true) : NULL;
    if (e == cudaSuccess && g == NULL) e = cudaErrorInvalidValue;
    for (int i = 0; e == cudaSuccess && i < g->n_nodes; i++)
        e = emu_queue(&g->nodes[i], s);
    return (cudaError_t)emu_end(e);
}

void emu_graphs_forget(void)
{
    while (all != NULL) {
        emu_graph *g = all;
        all = g->next;
        free(g->nodes);
        free(g);
    }
}

int emu_graphs_left(void)
{
    int n = 0;
    for (const emu_graph *g = all; g != NULL; g = g->next)
        n += g->live;
    return n;
}
