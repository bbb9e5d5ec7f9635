/*
 * moed-bench e2e: a whole model through the real thing: `moed up` over mpirun, requests by `moectl
 * generate
 * --json`, whose timings are the engine's own. For each number of shards and prompt length: tokens
 * a second of prefill and of decode, the median of several runs after a warm-up; prompts are random
 * tokens from a printed seed, because repeated text routes all rows to few experts.
 *
 * moed and moectl are taken from the folder of this program.
 */
#include <argp.h>
#include <errno.h>
#include <jansson.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "tests/bench/bench.h"

enum { MAX_LIST = 16, MAX_RUNS = 32 };

typedef struct options {
    const char *model, *csv;
    int prompts[MAX_LIST], n_prompts, shards[MAX_LIST], n_shards;
    int threads, decode, runs;
    uint64_t seed;
} options;

typedef struct cluster {
    char bin[PATH_MAX], dir[64], socket[96], config[96], log[96];
    pid_t pid;
} cluster;

static const struct argp_option e2e_options[] = {
    {"prompt", 'p', "N,..", 0, "prompt lengths (32,128,512)", 0},
    {"decode", 'n', "N", 0, "tokens to generate (64)", 0},
    {"shards", 's', "N,..", 0, "numbers of shards (1,2)", 0},
    {"threads", 't', "N", 0, "compute threads of all shards together, and of the router (2)", 0},
    {"runs", 'r', "N", 0, "runs per case after one warm-up (5)", 0},
    {"csv", 'o', "FILE", 0, "write the table as CSV too", 0},
    {"seed", 'S', "N", 0, "of the prompts (1)", 0},
    {0}};

static int take_list(const char *text, int *list)
{
    int n = 0;
    for (char *end; n < MAX_LIST; text = end + 1) {
        long v = strtol(text, &end, 10);
        if (end == text || v < 1 || v > 1 << 20 || (*end != ',' && *end != '\0')) return 0;
        list[n++] = (int)v;
        if (*end == '\0') return n;
    }
    return 0;
}

static error_t parse_e2e(int key, char *arg, struct argp_state *state)
{
    options *o = state->input;
    switch (key) {
    case 'p':
        if ((o->n_prompts = take_list(arg, o->prompts)) == 0)
            argp_error(state, "bad list \"%s\"", arg);
        return 0;
    case 's':
        if ((o->n_shards = take_list(arg, o->shards)) == 0)
            argp_error(state, "bad list \"%s\"", arg);
        return 0;
    case 'n':
        o->decode = atoi(arg);
        return 0;
    case 't':
        o->threads = atoi(arg);
        return 0;
    case 'r':
        o->runs = atoi(arg);
        return 0;
    case 'o':
        o->csv = arg;
        return 0;
    case 'S':
        o->seed = strtoull(arg, NULL, 10);
        return 0;
    case ARGP_KEY_ARG:
        if (o->model != NULL) argp_error(state, "one model");
        o->model = arg;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_error(state, "which model? moed-bench e2e MODEL.gguf");
        return 0;
    case ARGP_KEY_END:
        if (o->decode < 2 || o->threads < 1 || o->runs < 1 || o->runs > MAX_RUNS)
            argp_error(state, "--decode needs 2 or more, --threads 1, --runs 1 to %d", MAX_RUNS);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* ---- the cluster ---- */

static bool write_config(const cluster *c, const options *o, int n_shards, int longest)
{
    char model[PATH_MAX];
    FILE *f = fopen(c->config, "w");
    if (f == NULL || realpath(o->model, model) == NULL) {
        fprintf(stderr, "%s: %s\n", f == NULL ? c->config : o->model, strerror(errno));
        if (f != NULL) fclose(f);
        return false;
    }
    fprintf(f, "model: \"%s\"\nfront: {socket: %s}\n", model, c->socket);
    fprintf(f, "routers: [{threads: %d, kv_tokens: %d}]\nshards:\n", o->threads,
            longest + o->decode + 64);
    for (int i = 0; i < n_shards; i++)
        fprintf(f, "  - {threads: %d}\n", o->threads / n_shards > 0 ? o->threads / n_shards : 1);
    return fclose(f) == 0;
}

static bool start(cluster *c, const options *o, int n_shards, int longest)
{
    char program[PATH_MAX + 16];
    snprintf(c->dir, sizeof(c->dir), "/tmp/moed-bench.XXXXXX");
    if (mkdtemp(c->dir) == NULL) {
        fprintf(stderr, "%s: %s\n", c->dir, strerror(errno));
        return false;
    }
    snprintf(c->socket, sizeof(c->socket), "%s/moed.sock", c->dir);
    snprintf(c->config, sizeof(c->config), "%s/moed.yaml", c->dir);
    snprintf(c->log, sizeof(c->log), "%s/log", c->dir);
    if (!write_config(c, o, n_shards, longest)) return false;
    snprintf(program, sizeof(program), "%s/moed", c->bin);
    fflush(NULL); /* or the child would print what waits once more */
    c->pid = fork();
    if (c->pid == 0) {
        if (freopen(c->log, "w", stderr) == NULL || freopen("/dev/null", "w", stdout) == NULL)
            _exit(1);
        execl(program, program, "up", "-c", c->config, (char *)NULL);
        _exit(127);
    }
    for (int i = 0; i < 1000 && c->pid > 0 && access(c->socket, F_OK) != 0; i++)
        usleep(10000); /* requests queue from then on until the ranks are ready */
    return c->pid > 0;
}

static void stop(cluster *c)
{
    if (c->pid > 0) {
        kill(c->pid, SIGTERM);
        waitpid(c->pid, NULL, 0);
    }
    unlink(c->config);
    unlink(c->log);
    rmdir(c->dir);
}

/* One request; the daemon queues it until it is ready. NULL when it failed. */
static json_t *generate(const cluster *c, const options *o, bench_random *r, int n_prompt)
{
    char program[PATH_MAX + 16], count[16];
    int out[2];
    char *ids = ep_alloc((size_t)n_prompt * 8);
    snprintf(program, sizeof(program), "%s/moectl", c->bin);
    snprintf(count, sizeof(count), "%d", o->decode);
    if (ids == NULL || pipe(out) != 0) {
        ep_free(ids);
        return NULL;
    }
    size_t len = 0;
    for (int i = 0; i < n_prompt; i++)
        len += (size_t)sprintf(ids + len, i ? ",%d" : "%d", bench_below(r, 256));
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(out[1], STDOUT_FILENO);
        close(out[0]);
        close(out[1]);
        execl(program, program, "generate", "-s", c->socket, "--json", "--ignore-eos", "-n", count,
              "--prompt-ids", ids, (char *)NULL);
        _exit(127);
    }
    close(out[1]);
    json_error_t e;
    json_t *obj = pid > 0 ? json_loadfd(out[0], 0, &e) : NULL;
    close(out[0]);
    if (pid > 0) waitpid(pid, NULL, 0);
    ep_free(ids);
    return obj;
}

/* ---- figures ---- */

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *v, int n)
{
    qsort(v, (size_t)n, sizeof(*v), compare_doubles);
    return n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

static bool measure(const cluster *c, const options *o, bench_random *r, int n_shards, int n_prompt,
                    FILE *csv)
{
    double prefill[MAX_RUNS], decode[MAX_RUNS];
    for (int i = -1; i < o->runs; i++) {
        json_t *obj = generate(c, o, r, n_prompt), *t = json_object_get(obj, "timings");
        bool ok = t != NULL;
        if (ok && i >= 0) {
            prefill[i] = json_real_value(json_object_get(t, "prefill_tokens_per_s"));
            decode[i] = json_real_value(json_object_get(t, "decode_tokens_per_s"));
        }
        json_decref(obj);
        if (!ok) {
            fprintf(stderr, "a request failed\n");
            return false;
        }
    }
    double p = median(prefill, o->runs), d = median(decode, o->runs);
    printf("%6d %8d %12.1f %12.1f\n", n_shards, n_prompt, p, d);
    fflush(stdout);
    if (csv != NULL) fprintf(csv, "%d,%d,%d,%.2f,%.2f\n", n_shards, o->threads, n_prompt, p, d);
    return true;
}

static void show_log(const cluster *c)
{
    char line[512];
    FILE *f = fopen(c->log, "r");
    while (f != NULL && fgets(line, sizeof(line), f) != NULL)
        fputs(line, stderr);
    if (f != NULL) fclose(f);
}

int bench_e2e(int argc, char **argv)
{
    static const struct argp argp = {.options = e2e_options,
                                     .parser = parse_e2e,
                                     .args_doc = "MODEL.gguf",
                                     .doc = "Tokens a second of a whole model through moed, one "
                                            "router and some shards on this machine."};
    options o = {.prompts = {32, 128, 512},
                 .n_prompts = 3,
                 .shards = {1, 2},
                 .n_shards = 2,
                 .threads = 2,
                 .decode = 64,
                 .runs = 5,
                 .seed = 1};
    if (argp_parse(&argp, argc, argv, 0, NULL, &o) != 0) return 2;
    cluster c = {0};
    ssize_t n = readlink("/proc/self/exe", c.bin, sizeof(c.bin) - 1);
    if (n > 0) *strrchr(c.bin, '/') = '\0';
    FILE *csv = o.csv != NULL ? fopen(o.csv, "w") : NULL;
    if (o.csv != NULL && csv == NULL) {
        fprintf(stderr, "%s: %s\n", o.csv, strerror(errno));
        return 2;
    }
    if (csv != NULL)
        fprintf(csv, "shards,threads,prompt,prefill_tokens_per_s,decode_tokens_per_s\n");
    printf("%s, %d threads, %d tokens generated, seed %llu, median of %d\n%6s %8s %12s %12s\n",
           o.model, o.threads, o.decode, (unsigned long long)o.seed, o.runs, "shards", "prompt",
           "prefill t/s", "decode t/s");
    int longest = 0, rc = 0;
    for (int i = 0; i < o.n_prompts; i++)
        if (o.prompts[i] > longest) longest = o.prompts[i];
    for (int s = 0; s < o.n_shards && rc == 0; s++) {
        bench_random r = {.state = o.seed};
        if (!start(&c, &o, o.shards[s], longest)) rc = 1;
        for (int p = 0; p < o.n_prompts && rc == 0; p++)
            if (!measure(&c, &o, &r, o.shards[s], o.prompts[p], csv)) rc = 1;
        if (rc != 0) show_log(&c);
        stop(&c);
    }
    if (csv != NULL) fclose(csv);
    return rc;
}
