/*
 * pass: what a CUDA device does for a slice, and the scratch for it. A pass is copies in, five
 * launches replayed as one graph, copies out. Two passes may be under way: each has a slot of its
 * own for what is copied, so that the rows of one arrive and the results of another leave while a
 * third thing is computed; between the products there is one scratch for all, as the computing
 * stream does one pass after the other.
 *
 * Who orders what, for large passes:
 *   in_stream    rows and lists -> slot;           `arrived`
 *   stream       waits for arrived; the graph;     `computed`
 *   out_stream   waits for computed; slot -> out;  `done`
 * and the host waits for `done` before the slot, rows and out are anybody else's. Small passes do
 * all of it on `stream`: there the copies take less than the waiting for each other.
 *
 * Invariants: graphs hold pointers that stay until the next `reserve`; counts are read on the
 * device, so one graph serves every pass of its slot and bucket; which graph serves a pass never
 * changes a bit of its results (form.h).
 */
#include <string.h>
#include "kernels/cuda/device.h"

#define SMALL_BYTES (256 << 10) /* of rows and results together */

static const int bucket_pairs[GPU_BUCKETS] = {16, 128, 1024, 1 << 30};

static int at_most(int a, int b)
{
    return a < b ? a : b;
}

/* ---- streams and events ---- */

int gpu_passes_open(compute *c)
{
    cudaStream_t *const streams[] = {&c->stream, &c->in_stream, &c->out_stream};
    cudaError_t e = cudaSuccess;
    for (int i = 0; i < 3 && e == cudaSuccess; i++)
        e = cudaStreamCreateWithFlags(streams[i], cudaStreamNonBlocking);
    for (int i = 0; i < COMPUTE_DEPTH; i++) {
        cudaEvent_t *const events[] = {&c->slots[i].arrived, &c->slots[i].computed,
                                       &c->slots[i].done};
        for (int j = 0; j < 3 && e == cudaSuccess; j++)
            e = cudaEventCreateWithFlags(events[j], cudaEventDisableTiming);
    }
    return e;
}

/* Nothing of a pass is left on the device, or the device is lost. */
static void settle(compute *c)
{
    cudaStream_t const streams[] = {c->in_stream, c->stream, c->out_stream};
    for (int i = 0; i < 3; i++)
        if (streams[i] != NULL) cudaStreamSynchronize(streams[i]);
}

static void free_scratch(compute *c)
{
    void *const shared[] = {c->list,     c->x.value,  c->x.scale, c->x.sum,
                            c->hx.value, c->hx.scale, c->hx.sum,  c->h};
    for (size_t i = 0; i < sizeof shared / sizeof shared[0]; i++)
        if (shared[i] != NULL) cudaFree(shared[i]);
    c->list = NULL;
    c->x = c->hx = (gpu_rows){0};
    c->h = NULL;
    for (int i = 0; i < COMPUTE_DEPTH; i++) {
        gpu_slot *slot = &c->slots[i];
        void *const own[] = {slot->in, slot->control, slot->out};
        for (int j = 0; j < 3; j++)
            if (own[j] != NULL) cudaFree(own[j]);
        if (slot->lists != NULL) cudaFreeHost(slot->lists);
        slot->in = NULL;
        slot->control = slot->lists = NULL;
        slot->out = NULL;
    }
    c->max_rows = c->max_pairs = c->max_experts = 0;
}

void gpu_passes_close(compute *c)
{
    settle(c);
    free_scratch(c);
    for (int i = 0; i < COMPUTE_DEPTH; i++) {
        cudaEvent_t const events[] = {c->slots[i].arrived, c->slots[i].computed, c->slots[i].done};
        for (int j = 0; j < 3; j++)
            if (events[j] != NULL) cudaEventDestroy(events[j]);
    }
    cudaStream_t const streams[] = {c->in_stream, c->stream, c->out_stream};
    for (int i = 0; i < 3; i++)
        if (streams[i] != NULL) cudaStreamDestroy(streams[i]);
}

/* ---- pinned memory ---- */

ep_status gpu_pin(compute *c, void *memory, size_t bytes)
{
    ep_status status = gpu_enter(c);
    int i = 0;
    while (i < GPU_PINNED && c->pinned[i].bytes > 0)
        i++;
    if (status != EP_OK) return status;
    if (i == GPU_PINNED || bytes == 0) return EP_ERR_INVALID;
    cudaError_t e = cudaHostRegister(memory, bytes, cudaHostRegisterDefault);
    if (e != cudaSuccess) {
        cudaGetLastError();
        log_warn("device cuda:%d: %zu MiB of buffers cannot be pinned, copies will be slower: "
                 "%s (%d)",
                 c->device, bytes >> 20, cudaGetErrorString(e), (int)e);
        return EP_ERR_UNSUPPORTED;
    }
    c->pinned[i].at = memory;
    c->pinned[i].bytes = bytes;
    return EP_OK;
}

void gpu_unpin(compute *c, void *memory)
{
    for (int i = 0; i < GPU_PINNED; i++) {
        if (c->pinned[i].bytes == 0 || c->pinned[i].at != memory) continue;
        cudaSetDevice(c->device);
        cudaHostUnregister(memory);
        c->pinned[i].bytes = 0;
    }
}

static bool is_pinned(const compute *c, const void *p, size_t bytes)
{
    for (int i = 0; i < GPU_PINNED; i++) {
        size_t at = (uintptr_t)p - (uintptr_t)c->pinned[i].at;
        if ((uintptr_t)p >= (uintptr_t)c->pinned[i].at && at < c->pinned[i].bytes &&
            bytes <= c->pinned[i].bytes - at)
            return true;
    }
    return false;
}

/* ---- graphs ---- */

/* One block of words, so that it is one copy. Where its lists lie depends on the bucket. */
typedef struct control {
    int32_t *counts, *n_entries, *offset, *pair_row, *pair_out;
    size_t bytes;
} control;

static control control_of(const compute *c, int32_t *block, int bucket)
{
    const size_t experts = (size_t)c->max_experts;
    const size_t pairs = (size_t)at_most(bucket_pairs[bucket], c->max_pairs);
    return (control){.counts = block, /* a gpu_counts */
                     .n_entries = block + 2,
                     .offset = block + 4,
                     .pair_row = block + 5 + experts,
                     .pair_out = block + 5 + experts + pairs,
                     .bytes = (5 + experts + 2 * pairs) * sizeof(int32_t)};
}

/* The five launches of a pass, queued on the stream. The list comes first: a product may then read
 * it, and start on its weights, while the rows before it are still being made (chain.cuh). */
static ep_status queue_pass(compute *c, const compute_stack *s, const gpu_slot *slot, int bucket,
                            int form, kern_act act)
{
    const control k = control_of(c, slot->control, bucket);
    const gpu_matrix *m = s->m;
    const int chained = c->forms.chained, most_rows = at_most(bucket_pairs[bucket], c->max_rows),
              most_pairs = at_most(bucket_pairs[bucket], c->max_pairs);
    gpu_gemm gate_up = gpu_stack_plan(s, ROLE_GATE_UP, form),
             down = gpu_stack_plan(s, ROLE_DOWN, form);
    gate_up.x = c->x;
    gate_up.pair_row = k.pair_row;
    gate_up.out = c->h;
    gate_up.ld = s->shape.inter;
    down.x = c->hx;
    down.pair_out = k.pair_out;
    down.out = slot->out;
    down.ld = s->shape.hidden;
    gate_up.list = down.list = c->list;
    gate_up.n_entries = down.n_entries = k.n_entries;
    const char *what = "list kernel";
    int e = gpu_launch_list(k.offset, s->shape.n_experts, gpu_form_width(form), c->list,
                            k.n_entries, c->stream);
    if (e == cudaSuccess) {
        what = "rows kernel";
        e = gpu_launch_rows(act, slot->in, c->x, k.counts, most_rows, m[0].k,
                            m[0].type == KERN_BF16, form, chained, c->stream);
    }
    if (e == cudaSuccess) {
        what = "gate_up kernel";
        e = gpu_launch_gemm(&gate_up, form, s->blocks[0][form], chained, c->stream);
    }
    if (e == cudaSuccess) {
        what = "hidden rows kernel";
        e = gpu_launch_rows(KERN_ACT_F32, c->h, c->hx, k.counts + 1, most_pairs, m[1].k,
                            m[1].type == KERN_BF16, form, chained, c->stream);
    }
    if (e == cudaSuccess) {
        what = "down kernel";
        e = gpu_launch_gemm(&down, form, s->blocks[1][form], chained, c->stream);
    }
    return gpu_check(c, e, what);
}

static ep_status capture(compute *c, compute_stack *s, int slot, int bucket, int form, int floats)
{
    cudaGraph_t graph = NULL;
    ep_status status =
        gpu_check(c, cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal),
                  "capture of a graph");
    if (status != EP_OK) return status;
    status =
        queue_pass(c, s, &c->slots[slot], bucket, form, floats ? KERN_ACT_F32 : gpu_stack_act(s));
    cudaError_t e = cudaStreamEndCapture(c->stream, &graph);
    if (status == EP_OK) status = gpu_check(c, e, "capture of a graph");
    if (status == EP_OK)
        status = gpu_check(c, cudaGraphInstantiate(&s->graph[slot][bucket][form][floats], graph, 0),
                           "making of a graph");
    if (graph != NULL) cudaGraphDestroy(graph);
    return status;
}

static ep_status capture_all(compute *c, compute_stack *s)
{
    ep_status status = EP_OK;
    for (int slot = 0; slot < COMPUTE_DEPTH; slot++)
        for (int b = 0; b < GPU_BUCKETS; b++)
            for (int form = 0; form < GPU_FORMS; form++)
                for (int floats = 0; floats < 2; floats++) {
                    if (status != EP_OK) return status;
                    if (gpu_forms_possible(&c->forms, s->wgmma, bucket_pairs[b], form))
                        status = capture(c, s, slot, b, form, floats);
                }
    return status;
}

/* ---- scratch ---- */

static ep_status take(compute *c, void *p, size_t n, size_t bytes)
{
    void *got = NULL;
    ep_status status = gpu_check(c, cudaMalloc(&got, n * bytes + 256), "memory of a pass");
    if (status == EP_OK) memcpy(p, &got, sizeof got); /* a pointer of any type */
    return status;
}

static ep_status take_rows(compute *c, gpu_rows *r, size_t n, size_t k_tiles)
{
    ep_status s = take(c, &r->value, n, k_tiles * GPU_TILE_K * 2);
    if (s == EP_OK) s = take(c, &r->scale, n, sizeof(float));
    if (s == EP_OK) s = take(c, &r->sum, n, k_tiles * (GPU_TILE_K / 16) * sizeof(uint16_t));
    return s;
}

static ep_status take_slot(compute *c, gpu_slot *slot, size_t hidden)
{
    size_t words = control_of(c, NULL, GPU_BUCKETS - 1).bytes;
    ep_status s = take(c, &slot->in, (size_t)c->max_rows, 4 * hidden);
    if (s == EP_OK) s = take(c, &slot->control, words, 1);
    if (s == EP_OK) s = take(c, &slot->out, (size_t)c->max_pairs, hidden * sizeof(float));
    if (s == EP_OK)
        s = gpu_check(c, cudaHostAlloc((void **)&slot->lists, words, 0), "pinned memory");
    if (s == EP_OK) memset(slot->lists, 0, words); /* gaps are copied too */
    return s;
}

static ep_status take_scratch(compute *c)
{
    size_t hidden = 0, inter = 0, tiles[2] = {0, 0}, rows = (size_t)c->max_rows;
    size_t pairs = (size_t)c->max_pairs;
    for (const compute_stack *s = c->stacks; s != NULL; s = s->next) {
        hidden = larger(hidden, (size_t)s->shape.hidden);
        inter = larger(inter, (size_t)s->shape.inter);
        for (int i = 0; i < 2; i++)
            tiles[i] = larger(tiles[i], (size_t)s->m[i].k_tiles);
        if (s->shape.n_experts > c->max_experts) c->max_experts = s->shape.n_experts;
    }
    int most = gpu_entries_most(c->max_pairs, c->max_experts, GPU_NARROW_COLS);
    ep_status s = take(c, &c->list, (size_t)most, sizeof(gpu_entry));
    if (s == EP_OK) s = take_rows(c, &c->x, rows, tiles[0]);
    if (s == EP_OK) s = take_rows(c, &c->hx, pairs, tiles[1]);
    if (s == EP_OK) s = take(c, &c->h, pairs, inter * sizeof(float));
    for (int i = 0; i < COMPUTE_DEPTH && s == EP_OK; i++)
        s = take_slot(c, &c->slots[i], hidden);
    return s;
}

ep_status gpu_reserve(compute *c, int max_rows, int max_pairs)
{
    if (c->lost) return EP_ERR_DEVICE; /* whatever else is wrong with the call */
    if (max_pairs > GPU_MOST_PAIRS) return EP_ERR_TOO_LARGE;
    if (c->n_under_way > 0) return EP_ERR_INVALID;
    ep_status status = gpu_enter(c);
    if (status != EP_OK) return status;
    free_scratch(c);
    c->max_rows = max_rows;
    c->max_pairs = max_pairs;
    status = take_scratch(c);
    for (compute_stack *s = c->stacks; s != NULL; s = s->next) {
        gpu_stack_close_graphs(s);
        if (status == EP_OK) status = capture_all(c, s);
    }
    if (status != EP_OK) free_scratch(c);
    return status;
}

/* ---- passes ---- */

/* CUDA does not say which kernel of a graph failed. */
static const char *const pass_names[GPU_FORMS] = {
    [GPU_FORM_SPLIT] = "a pass (list, rows and split product kernels)",
    [GPU_FORM_WIDE] = "a pass (list, rows and wide product kernels)",
    [GPU_FORM_WGMMA] = "a pass (list, rows and wgmma product kernels)"};

/* One stream waits for what another has been given so far. */
static ep_status order(compute *c, cudaEvent_t event, cudaStream_t first, cudaStream_t then)
{
    if (first == then) return EP_OK;
    ep_status s = gpu_check(c, cudaEventRecord(event, first), "order of streams");
    if (s == EP_OK) s = gpu_check(c, cudaStreamWaitEvent(then, event, 0), "order of streams");
    return s;
}

static ep_status copy_in(compute *c, gpu_slot *slot, const compute_ffn_args *a, int n_experts,
                         size_t row_bytes, int bucket, cudaStream_t stream)
{
    const control k = control_of(c, slot->lists, bucket);
    const size_t word = sizeof(int32_t), pairs = (size_t)a->n_pairs;
    k.counts[0] = a->n_rows;
    k.counts[1] = a->n_pairs;
    memcpy(k.offset, a->expert_offset, ((size_t)n_experts + 1) * word);
    memcpy(k.pair_row, a->pair_row, pairs * word);
    memcpy(k.pair_out, a->pair_out, pairs * word);
    ep_status s = gpu_check(
        c, cudaMemcpyAsync(slot->control, slot->lists, k.bytes, cudaMemcpyHostToDevice, stream),
        "copy to the device");
    if (s == EP_OK)
        s = gpu_check(c,
                      cudaMemcpyAsync(slot->in, a->rows, (size_t)a->n_rows * row_bytes,
                                      cudaMemcpyHostToDevice, stream),
                      "copy to the device");
    return s;
}

/* Into memory that the device cannot write by itself, results are copied when the pass is ended. */
static ep_status copy_out(compute *c, gpu_slot *slot, float *out, size_t bytes, cudaStream_t stream)
{
    slot->to = NULL;
    if (!is_pinned(c, out, bytes)) {
        slot->to = out;
        slot->bytes = bytes;
        stream = c->stream;
    }
    ep_status s = order(c, slot->computed, c->stream, stream);
    if (s == EP_OK && slot->to == NULL)
        s = gpu_check(c, cudaMemcpyAsync(out, slot->out, bytes, cudaMemcpyDeviceToHost, stream),
                      "copy from the device");
    if (s == EP_OK) s = gpu_check(c, cudaEventRecord(slot->done, stream), "end of a pass");
    return s;
}

static ep_status run(compute *c, compute_stack *s, gpu_slot *slot, const compute_ffn_args *a)
{
    const size_t row_bytes = kern_act_row_bytes(a->act, s->shape.hidden);
    const size_t out_bytes = (size_t)a->n_pairs * (size_t)s->shape.hidden * sizeof(float);
    const bool small = (size_t)a->n_rows * row_bytes + out_bytes <= SMALL_BYTES;
    const cudaStream_t in = small ? c->stream : c->in_stream;
    int bucket = 0, active = 0;
    while (a->n_pairs > bucket_pairs[bucket])
        bucket++;
    for (int e = 0; e < s->shape.n_experts; e++)
        active += a->expert_offset[e] < a->expert_offset[e + 1];
    slot->form = gpu_forms_choose(&c->forms, s->wgmma, a->n_pairs, active);
    const int floats = a->act == KERN_ACT_F32;
    const long at = slot - c->slots;
    ep_status status = copy_in(c, slot, a, s->shape.n_experts, row_bytes, bucket, in);
    if (status == EP_OK) status = order(c, slot->arrived, in, c->stream);
    if (status == EP_OK)
        status = gpu_check(c, cudaGraphLaunch(s->graph[at][bucket][slot->form][floats], c->stream),
                           pass_names[slot->form]);
    if (status == EP_OK)
        status = copy_out(c, slot, a->out, out_bytes, small ? c->stream : c->out_stream);
    return status;
}

ep_status gpu_pass_begin(compute *c, compute_stack *s, const compute_ffn_args *a)
{
    if (c->lost) return EP_ERR_DEVICE;
    if (a->n_rows > c->max_rows || a->n_pairs > c->max_pairs) return EP_ERR_TOO_LARGE;
    if (a->act != KERN_ACT_F32 && a->act != gpu_stack_act(s)) return EP_ERR_INVALID;
    if (!compute_args_are_sound(a, s->shape.n_experts)) return EP_ERR_INVALID;
    if (c->n_under_way == COMPUTE_DEPTH) return EP_ERR_INVALID;
    gpu_slot *slot = &c->slots[(c->oldest + c->n_under_way) % COMPUTE_DEPTH];
    slot->is_empty = a->n_pairs == 0;
    ep_status status = gpu_enter(c);
    if (status == EP_OK && !slot->is_empty) {
        status = run(c, s, slot, a);
        if (status != EP_OK) settle(c); /* rows and out go back to the caller */
    }
    if (status == EP_OK) c->n_under_way++;
    return status;
}

bool gpu_pass_is_done(compute *c)
{
    const gpu_slot *slot = &c->slots[c->oldest];
    if (c->n_under_way == 0 || slot->is_empty || c->lost) return true;
    if (cudaEventQuery(slot->done) != cudaErrorNotReady) return true;
    cudaGetLastError(); /* the next launch would find "not ready" there and fail */
    return false;
}

ep_status gpu_pass_end(compute *c)
{
    if (c->n_under_way == 0) return EP_ERR_INVALID;
    gpu_slot *slot = &c->slots[c->oldest];
    c->oldest = (c->oldest + 1) % COMPUTE_DEPTH;
    c->n_under_way--;
    ep_status s = gpu_enter(c);
    if (s == EP_OK && !slot->is_empty)
        s = gpu_check(c, cudaEventSynchronize(slot->done), pass_names[slot->form]);
    if (s == EP_OK && !slot->is_empty && slot->to != NULL) {
        s = gpu_check(c,
                      cudaMemcpyAsync(slot->to, slot->out, slot->bytes, cudaMemcpyDeviceToHost,
                                      c->out_stream),
                      "copy from the device");
        if (s == EP_OK)
            s = gpu_check(c, cudaStreamSynchronize(c->out_stream), "copy from the device");
    }
    if (s != EP_OK) settle(c); /* rows and out go back to the caller */
    return s;
}
