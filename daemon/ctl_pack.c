/*
 * `moectl pack`: the experts of a model, packed once, into a file that shards map.
 */
#include "daemon/ctl.h"
#include "expert_shard/cache.h"
#include "kernels/kernels.h"
#include "model/model.h"

#include <unistd.h>

static void on_progress(void *arg, uint64_t done, uint64_t all)
{
    int *shown = arg;
    int percent = all > 0 ? (int)(100 * (done / 1024) / (all / 1024 + 1)) : 100;
    if (!isatty(STDERR_FILENO) || percent == *shown) return;
    *shown = percent;
    fprintf(stderr, "\rpacking %.0f of %.0f MiB (%d %%) ", (double)done / 1048576.0,
            (double)all / 1048576.0, percent);
}

int ctl_pack(const ctl_options *o)
{
    ep_err err = {""};
    model *m = NULL;
    int shown = -1;
    if (o->path == NULL || o->path2 == NULL) {
        fprintf(stderr, "moectl: which files? moectl pack MODEL OUT\n");
        return 2;
    }
    long n_threads = o->n_threads > 0 ? o->n_threads : sysconf(_SC_NPROCESSORS_ONLN);
    ep_status status = model_open(&m, o->path, &err);
    if (status != EP_OK) {
        fprintf(stderr, "%s\n", err.text);
        return 2;
    }
    ep_time start = ep_now();
    status = shard_cache_write(m, o->path2, n_threads > 0 ? (int)n_threads : 1, on_progress, &shown,
                               &err);
    double seconds = (double)ep_time_diff_ns(ep_now(), start) / 1e9;
    if (shown >= 0) fprintf(stderr, "\n");
    if (status != EP_OK)
        fprintf(stderr, "%s\n", err.text);
    else if (o->json)
        printf("{\"experts\":%d,\"layers\":%d,\"seconds\":%.3f}\n", m->shape.n_experts,
               m->shape.n_layers, seconds);
    else
        printf("%s: %d experts of %d layers in %.1f s\n", o->path2, m->shape.n_experts,
               m->shape.n_layers, seconds);
    model_close(m);
    return status == EP_OK ? 0 : 1;
}
