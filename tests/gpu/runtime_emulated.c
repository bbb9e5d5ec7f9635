/*
 * The emulated machine: what it is asked to be, calls and their failures, reports, devices. Each
 * call of the library is a stretch between emu_begin and emu_end under one lock, so host threads
 * take turns; errors are kept as CUDA keeps them: the last one per thread until it is asked for,
 * a lost device for ever and for every call.
 */
#include "tests/gpu/runtime_emulated.h"
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "tests/gpu/runtime_ops.h"

emulated_options emu_options;

static pthread_mutex_t lock;
static pthread_once_t lock_once = PTHREAD_ONCE_INIT;
static int calls, ops, reports, lost;
static bool failed, quiet;
static uint64_t state;
static char first[512];
static const char *call_now = "";
static _Thread_local int device, last_error;
static _Thread_local bool captures;

static void make_lock(void)
{
    pthread_mutexattr_t a;
    pthread_mutexattr_init(&a);
    pthread_mutexattr_settype(&a, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&lock, &a);
    pthread_mutexattr_destroy(&a);
}

void emu_lock(void)
{
    pthread_once(&lock_once, make_lock);
    pthread_mutex_lock(&lock);
}

void emu_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

/* ---- what tests ask for ---- */

emulated_options emulated_options_default(void)
{
    return (emulated_options){
        .seed = 1, .n_devices = 2, .major = 9, .smem_limit = 227 * 1024, .answer = EMULATED_EQUAL};
}

void emulated_start(const emulated_options *o)
{
    emu_lock();
    emu_options = *o;
    state = o->seed * 0x9e3779b97f4a7c15ull + 1;
    calls = ops = reports = lost = 0;
    failed = captures = false;
    device = last_error = 0;
    first[0] = '\0';
    emu_graphs_forget();
    emu_streams_forget();
    emu_memory_forget();
    emu_unlock();
}

int emulated_finish(void)
{
    emu_lock();
    call_now = "at the end";
    int left[] = {emu_memory_left(), emu_streams_left(), emu_graphs_left()};
    static const char *const what[] = {"pieces of memory", "streams and events", "graphs"};
    for (int i = 0; i < 3; i++)
        if (left[i] > 0) emu_report("%d %s were never given back", left[i], what[i]);
    int n = reports;
    emu_unlock();
    return n;
}

void emulated_quiet(bool on)
{
    quiet = on;
}

const char *emulated_first_report(void)
{
    return first;
}

int emulated_calls(void)
{
    return calls;
}

int emulated_ops(void)
{
    return ops;
}

bool emulated_failed(void)
{
    return failed;
}

/* ---- for the other files ---- */

void emu_report(const char *fmt, ...)
{
    char text[sizeof first];
    const emu_op *op = emu_current();
    va_list args;
    size_t at = (size_t)snprintf(text, sizeof text, "%s: ", op != NULL ? op->name : call_now);
    va_start(args, fmt);
    vsnprintf(text + at, sizeof text - at, fmt, args);
    va_end(args);
    if (reports == 0) memcpy(first, text, sizeof first);
    if (reports++ < 20 && !quiet) printf("    emulated CUDA: %s\n", text);
}

uint64_t emu_random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 16;
}

bool emu_has_failed(void)
{
    return failed;
}

int emu_sticky(void)
{
    return lost;
}

void emu_fail(int error)
{
    if (lost == 0) lost = error;
    emu_drop_all();
}

bool emu_op_fails(void)
{
    if (++ops != emu_options.fail_op) return false;
    failed = true;
    return true;
}

int emu_device_now(void)
{
    return device;
}

void emu_set_captures(bool on)
{
    captures = on;
}

/* Calls that only wait, ask or give back need none. */
static bool may_need_memory(const char *call)
{
    static const char *const never[] = {"Free",        "Destroy", "Unregister", "Query",
                                        "Synchronize", "Event",   "Attribute",  "etDevice"};
    for (size_t i = 0; i < sizeof never / sizeof never[0]; i++)
        if (strstr(call, never[i]) != NULL) return strcmp(call, "cudaEventCreateWithFlags") == 0;
    return true;
}

int emu_begin(const char *call, emu_when when)
{
    emu_lock();
    call_now = call;
    calls++;
    if (lost != 0) return lost;
    const bool memory = emu_options.error == cudaErrorMemoryAllocation;
    if (calls == emu_options.fail_call && (!memory || may_need_memory(call))) {
        failed = true;
        if (!memory) emu_fail(emu_options.error);
        return emu_options.error;
    }
    if (when == EMU_NOT_CAPTURED && captures) {
        emu_report("not while this thread captures a graph");
        return cudaErrorStreamCaptureUnsupported;
    }
    emu_some_time();
    return lost;
}

int emu_end(int error)
{
    if (error == cudaSuccess && lost != 0) error = lost;
    if (error != cudaSuccess) last_error = error;
    emu_protect();
    emu_unlock();
    return error;
}

/* ---- errors and devices ---- */

cudaError_t cudaGetLastError(void)
{
    int e = lost != 0 ? lost : last_error;
    last_error = 0;
    return (cudaError_t)e;
}

cudaError_t cudaPeekAtLastError(void)
{
    return (cudaError_t)(lost != 0 ? lost : last_error);
}

const char *cudaGetErrorString(cudaError_t e)
{
    return e == cudaSuccess                 ? "no error"
           : e == cudaErrorMemoryAllocation ? "out of memory"
           : e == cudaErrorIllegalAddress   ? "an illegal memory access was encountered"
           : e == cudaErrorNotReady         ? "device not ready"
           : e == cudaErrorInvalidValue     ? "invalid argument"
                                            : "some other error";
}

const char *cudaGetErrorName(cudaError_t e)
{
    return e == cudaSuccess ? "cudaSuccess" : "cudaError";
}

cudaError_t cudaGetDeviceCount(int *n)
{
    int e = emu_begin("cudaGetDeviceCount", EMU_ANY);
    if (e == cudaSuccess) *n = emu_options.n_devices;
    return (cudaError_t)emu_end(e);
}

static int check_device(int d)
{
    if (d >= 0 && d < emu_options.n_devices) return cudaSuccess;
    emu_report("device %d of %d", d, emu_options.n_devices);
    return cudaErrorInvalidDevice;
}

cudaError_t cudaSetDevice(int d)
{
    int e = emu_begin("cudaSetDevice", EMU_ANY);
    if (e == cudaSuccess) e = check_device(d);
    if (e == cudaSuccess) device = d;
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaGetDevice(int *d)
{
    int e = emu_begin("cudaGetDevice", EMU_ANY);
    if (e == cudaSuccess) *d = device;
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr what, int d)
{
    int e = emu_begin("cudaDeviceGetAttribute", EMU_ANY);
    if (e == cudaSuccess) e = check_device(d);
    if (e == cudaSuccess) switch (what) {
        case cudaDevAttrComputeCapabilityMajor:
            *value = emu_options.major;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = emu_options.minor;
            break;
        case cudaDevAttrMultiProcessorCount:
            *value = 4;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = emu_options.smem_limit;
            break;
        default:
            emu_report("attribute %d is not emulated", (int)what);
            e = cudaErrorInvalidValue;
        }
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d)
{
    int e = emu_begin("cudaGetDeviceProperties", EMU_ANY);
    if (e == cudaSuccess) e = check_device(d);
    if (e == cudaSuccess) {
        memset(p, 0, sizeof *p);
        snprintf(p->name, sizeof p->name, "emulated");
        p->major = emu_options.major;
        p->minor = emu_options.minor;
        p->multiProcessorCount = 4;
        p->totalGlobalMem = (size_t)8 << 30;
    }
    return (cudaError_t)emu_end(e);
}

cudaError_t cudaDeviceSynchronize(void)
{
    int e = emu_begin("cudaDeviceSynchronize", EMU_NOT_CAPTURED);
    if (e == cudaSuccess) emu_wait_all();
    return (cudaError_t)emu_end(e);
}
