/*
 * compute: finds the device table that serves a device name. The list below is tried in order for
 * "auto"; a build without CUDA has one entry less and says so when a CUDA device is asked for by
 * name. A device's table has a pass in two halves; here they are put together for callers that do
 * nothing in between.
 *
 * Keeps no state; everything a device owns lives in the object that its table opened.
 */
#include <string.h>
#include "kernels/compute.h"

static const compute_ops *const devices[] = {
#ifdef MOED_CUDA
    &compute_cuda,
#endif
    &compute_cpu,
};

enum { n_devices = sizeof devices / sizeof devices[0] };

/* "cuda:1" is of kind "cuda"; "cpu" of kind "cpu". */
static bool is_kind(const char *device, const char *kind)
{
    size_t n = strlen(kind);
    return strncmp(device, kind, n) == 0 && (device[n] == '\0' || device[n] == ':');
}

static ep_status open_auto(const compute_ops **ops, compute **out, int n_threads, ep_err *err)
{
    ep_status s = EP_ERR_UNSUPPORTED;
    ep_err why = {{0}};
    for (int i = 0; i < n_devices; i++) {
        const char *device = strcmp(devices[i]->kind, "cpu") == 0 ? "cpu" : "cuda:0";
        s = devices[i]->can_open(device, &why);
        if (s == EP_OK) s = devices[i]->open(out, device, n_threads, &why);
        if (s == EP_OK) {
            *ops = devices[i];
            return EP_OK;
        }
        log_info("device auto: %s", why.text);
    }
    return ep_fail(err, s, "%s", why.text);
}

ep_status compute_open(const compute_ops **ops, compute **out, const char *device, int n_threads,
                       ep_err *err)
{
    if (device == NULL || strcmp(device, "auto") == 0) return open_auto(ops, out, n_threads, err);
    for (int i = 0; i < n_devices; i++) {
        if (!is_kind(device, devices[i]->kind)) continue;
        ep_status s = devices[i]->can_open(device, err);
        if (s == EP_OK) s = devices[i]->open(out, device, n_threads, err);
        if (s == EP_OK) *ops = devices[i];
        return s;
    }
    if (is_kind(device, "cuda"))
        return ep_fail(err, EP_ERR_UNSUPPORTED, "device %s: this moed was built without CUDA",
                       device);
    return ep_fail(err, EP_ERR_INVALID, "device \"%s\": valid are cpu, cuda:N and auto", device);
}

bool compute_args_are_sound(const compute_ffn_args *a, int n_experts)
{
    if (a->n_rows < 0 || a->n_pairs < 0 || a->expert_offset[0] != 0) return false;
    for (int e = 0; e < n_experts; e++)
        if (a->expert_offset[e] > a->expert_offset[e + 1]) return false;
    if (a->expert_offset[n_experts] != a->n_pairs) return false;
    for (int i = 0; i < a->n_pairs; i++) {
        if (a->pair_row[i] < 0 || a->pair_row[i] >= a->n_rows) return false;
        if (a->pair_out[i] < 0 || a->pair_out[i] >= a->n_pairs) return false;
    }
    return true;
}

ep_status compute_ffn(const compute_ops *ops, compute *c, compute_stack *s,
                      const compute_ffn_args *a)
{
    ep_status status = ops->ffn_begin(c, s, a);
    return status == EP_OK ? ops->ffn_end(c) : status;
}
