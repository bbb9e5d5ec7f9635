/*
 * `moed check`: everything that can be known before a rank starts. The memory plan counts what a
 * rank holds for good: packed weights, KV cache, message buffers; it is computed from the same
 * numbers the ranks use. The proof of ownership walks every expert of every layer.
 */
#include "daemon/check.h"
#include "daemon/config_keys.h"
#include "daemon/up.h"
#include "kernels/kernels.h"
#include "proto/wire.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int refuse(const char *text)
{
    fprintf(stderr, "%s\n", text);
    return 2;
}

static double mib(uint64_t bytes)
{
    return (double)bytes / 1048576.0;
}

/* ---- memory ---- */

static uint64_t matrix_bytes(const model_tensor *t)
{
    return kern_packed_bytes(t->type, (int)t->ne[1], (int)t->ne[0]);
}

static uint64_t router_weights(const model *m)
{
    uint64_t n = matrix_bytes(m->output);
    for (int l = 0; l < m->shape.n_layers; l++) {
        const model_layer *y = &m->layers[l];
        const model_tensor *dense[] = {y->q, y->k, y->v, y->o, y->gate_inp};
        for (size_t i = 0; i < sizeof(dense) / sizeof(dense[0]); i++)
            n += matrix_bytes(dense[i]);
    }
    return n;
}

static uint64_t shard_weights(const model *m, int n_owned)
{
    uint64_t n = 0;
    for (int l = 0; l < m->shape.n_layers; l++) {
        const model_layer *y = &m->layers[l];
        const model_tensor *roles[] = {y->gate_exps, y->up_exps, y->down_exps};
        for (size_t i = 0; i < 3; i++)
            n += matrix_bytes(roles[i]) * (uint64_t)n_owned;
    }
    return n;
}

static uint64_t message_bytes(const config *c, const model *m)
{
    uint32_t rows = (uint32_t)c->limits.max_tokens_per_step,
             pairs = rows * (uint32_t)m->shape.top_k;
    uint64_t slice = wire_slice_bytes(KERN_ACT_F32, (uint32_t)m->shape.hidden, rows, pairs);
    uint64_t reply = wire_reply_bytes((uint32_t)m->shape.hidden, pairs);
    return slice > reply ? slice : reply;
}

static void print_ranks(const config *c, const model *m, const model_placement *p)
{
    uint64_t message = message_bytes(c, m);
    printf("\n# ranks\n# %-5s %-7s %-10s %-14s %-8s %7s %12s %10s %12s\n", "rank", "role", "name",
           "host", "device", "threads", "weights MiB", "KV MiB", "buffers MiB");
    for (int i = 0; i < config_n_ranks(c); i++) {
        const config_rank *r = config_rank_at(c, i);
        bool router = config_is_router(c, i);
        const model_shape *s = &m->shape;
        uint64_t weights =
            router ? router_weights(m) : shard_weights(m, p->n_owned[i - c->n_routers]);
        uint64_t kv = router
                          ? (uint64_t)r->kv_tokens * (uint64_t)s->n_layers *
                                (uint64_t)s->n_kv_heads * (uint64_t)s->head_dim * 2 * sizeof(float)
                          : 0;
        uint64_t buffers = message * (uint64_t)(4 * (router ? c->n_shards : c->n_routers) + 4);
        printf("# %-5d %-7s %-10s %-14s %-8s %7d %12.1f %10.1f %12.1f\n", i,
               router ? "router" : "shard", r->name, r->host, r->device, r->threads, mib(weights),
               mib(kv), mib(buffers));
    }
}

/* ---- ownership ---- */

static int print_ownership(const config *c, const model *m, const model_placement *p)
{
    long owned = 0;
    for (int l = 0; l < m->shape.n_layers; l++)
        for (int e = 0; e < m->shape.n_experts; e++)
            if (p->owner[e] >= 0 && p->owner[e] < c->n_shards && p->local[e] >= 0 &&
                p->local[e] < p->n_owned[p->owner[e]])
                owned++;
    long all = (long)m->shape.n_layers * m->shape.n_experts;
    printf("\n# experts: %d per layer, %d layers, top-%d\n", m->shape.n_experts, m->shape.n_layers,
           m->shape.top_k);
    for (int s = 0; s < c->n_shards; s++) {
        printf("#   %-10s %4d:", c->shards[s].name, p->n_owned[s]);
        for (int e = 0; e < p->n_experts; e++) {
            if (p->owner[e] != s) continue;
            int last = e;
            while (last + 1 < p->n_experts && p->owner[last + 1] == s)
                last++;
            printf(last > e ? " %d-%d" : " %d", e, last);
            e = last;
        }
        printf("\n");
    }
    printf("# %ld of %ld (layer, expert) pairs have exactly one owner\n", owned, all);
    return owned == all ? 0 : 2;
}

int check_main(const char *config_path)
{
    ep_err err = {""};
    config *c = NULL;
    model *m = NULL;
    model_tokenizer *t = NULL;
    model_placement p = {0};
    ep_buf text = {0};
    const char *lists[4096];
    int rc = 2;
    if (config_load(&c, config_path, &err) != EP_OK) return refuse(err.text);
    for (int i = 0; i < c->n_shards; i++)
        lists[i] = c->shards[i].experts;
    if (kern_select(c->kernels, &err) != EP_OK || model_open(&m, c->model, &err) != EP_OK ||
        model_tokenizer_open(&t, m, &err) != EP_OK ||
        model_placement_make(&p, m->shape.n_experts, c->n_shards, lists, 1, &err) != EP_OK) {
        refuse(err.text);
        goto done;
    }
    if (config_print_yaml(c, &text) != EP_OK) {
        refuse("out of memory");
        goto done;
    }
    printf("# %s, resolved\n%.*s", c->path, (int)text.len, (const char *)text.data);
    printf("\n# model: %s (%s), hidden %d, %d layers, %d heads (%d KV) of %d, vocabulary %d, "
           "context %d\n",
           m->shape.name, m->shape.arch, m->shape.hidden, m->shape.n_layers, m->shape.n_heads,
           m->shape.n_kv_heads, m->shape.head_dim, m->shape.vocab, m->shape.context);
    printf("# kernels: %s on this machine\n", kern_level());
    print_ranks(c, m, &p);
    rc = print_ownership(c, m, &p);
done:
    ep_buf_fini(&text);
    model_placement_fini(&p);
    model_tokenizer_close(t);
    model_close(m);
    config_close(c);
    return rc;
}

/* A word as a shell reads it back. */
static void print_word(const char *w)
{
    if (w[0] != '\0' &&
        strspn(w, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:,=+@%") ==
            strlen(w)) {
        fputs(w, stdout);
        return;
    }
    putchar('\'');
    for (; *w != '\0'; w++) {
        if (*w == '\'')
            fputs("'\\''", stdout);
        else
            putchar(*w);
    }
    putchar('\'');
}

int check_print_mpirun(const char *config_path)
{
    static char exe[PATH_MAX];
    ep_err err = {""};
    config *c = NULL;
    ep_buf text = {0};
    char **words = NULL;
    if (config_load(&c, config_path, &err) != EP_OK) return refuse(err.text);
    if (readlink("/proc/self/exe", exe, sizeof(exe) - 1) <= 0) snprintf(exe, sizeof(exe), "moed");
    ep_status status = job_command(c, exe, NULL, &text, &words);
    for (char **w = words; status == EP_OK && *w != NULL; w++) {
        if (w != words) putchar(' ');
        print_word(*w);
    }
    if (status == EP_OK) putchar('\n');
    ep_free(words);
    ep_buf_fini(&text);
    config_close(c);
    return status == EP_OK ? 0 : refuse("out of memory");
}

int check_print_keys(void)
{
    for (int i = 0; i < config_n_sections; i++) {
        const config_section *s = &config_sections[i];
        if (!s->is_value)
            printf("%s:%s\n", s->name, s->is_list ? "   # a list, one entry per rank" : "");
        for (int j = 0; j < s->n_keys; j++) {
            const config_key *k = &s->keys[j];
            printf("%s%s: %s   # %s%s%s",
                   s->is_value            ? ""
                   : s->is_list && j == 0 ? "  - "
                   : s->is_list           ? "    "
                                          : "  ",
                   k->name, k->value != NULL ? k->value : "~", k->help, k->choices ? "; " : "",
                   k->choices ? k->choices : "");
            if (k->type == CONFIG_INT && k->max > k->min) printf("; %ld to %ld", k->min, k->max);
            printf("\n");
        }
    }
    return 0;
}
