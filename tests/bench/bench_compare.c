/*
 * moed-bench compare A.csv B.csv: for each case that both files have (shape, type, threads, rows)
 * the time of A over that of B, so above 1 B is faster, and the geometric mean per type. Columns
 * are found by the names in the first line. Exit status 1 when the files have no case in common.
 */
#include <argp.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "tests/bench/bench.h"

enum { MAX_LINES = 4096, MAX_COLUMNS = 32, N_KEYS = 4 };

static const char *const keys[N_KEYS] = {"shape", "type", "threads", "rows"};

typedef struct line {
    char key[N_KEYS][24];
    char level[16];
    double ms, share;
} line;

typedef struct table {
    const char *path;
    line *lines;
    int n;
} table;

/* Cuts a line at its commas; no field of ours is quoted. */
static int split(char *text, char **field)
{
    int n = 0;
    text[strcspn(text, "\r\n")] = '\0';
    for (char *at = text; at != NULL && n < MAX_COLUMNS;) {
        field[n++] = at;
        at = strchr(at, ',');
        if (at != NULL) *at++ = '\0';
    }
    return n;
}

static int column(char **field, int n, const char *name)
{
    for (int i = 0; i < n; i++)
        if (strcmp(field[i], name) == 0) return i;
    return -1;
}

static bool table_read(table *t, const char *path)
{
    FILE *f = fopen(path, "r");
    if (f == NULL) {
        fprintf(stderr, "moed-bench compare: %s: %s\n", path, strerror(errno));
        return false;
    }
    char text[1024], head[1024], *field[MAX_COLUMNS], *name[MAX_COLUMNS];
    int at[N_KEYS] = {-1, -1, -1, -1}, n_names = 0, level = -1, ms = -1, share = -1;
    if (fgets(head, sizeof head, f) != NULL) n_names = split(head, name);
    for (int i = 0; i < N_KEYS; i++)
        at[i] = column(name, n_names, keys[i]);
    level = column(name, n_names, "level");
    ms = column(name, n_names, "time_ms");
    share = column(name, n_names, "share");
    bool is_ok = level >= 0 && ms >= 0 && share >= 0;
    for (int i = 0; i < N_KEYS; i++)
        is_ok = is_ok && at[i] >= 0;
    t->path = path;
    t->lines = is_ok ? ep_calloc(MAX_LINES, sizeof *t->lines) : NULL;
    while (t->lines != NULL && t->n < MAX_LINES && fgets(text, sizeof text, f) != NULL) {
        line *l = &t->lines[t->n];
        if (split(text, field) != n_names) continue;
        for (int i = 0; i < N_KEYS; i++)
            snprintf(l->key[i], sizeof l->key[i], "%s", field[at[i]]);
        snprintf(l->level, sizeof l->level, "%s", field[level]);
        l->ms = strtod(field[ms], NULL);
        l->share = strtod(field[share], NULL);
        t->n += l->ms > 0;
    }
    fclose(f);
    if (!is_ok) fprintf(stderr, "moed-bench compare: %s: not a CSV of moed-bench kernels\n", path);
    return is_ok && t->lines != NULL;
}

static const line *find(const table *t, const line *like)
{
    for (int i = 0; i < t->n; i++)
        if (memcmp(t->lines[i].key, like->key, sizeof like->key) == 0) return &t->lines[i];
    return NULL;
}

static int print(const table *a, const table *b)
{
    int n_common = 0;
    printf("%-12s %-6s %7s %5s %-7s %10s %-7s %10s %7s\n", "shape", "type", "threads", "rows", "A",
           "A ms", "B", "B ms", "A/B");
    for (int i = 0; i < a->n;) {
        double logs = 0;
        int n = 0, first = i; /* lines of one type stand together */
        for (; i < a->n && strcmp(a->lines[i].key[1], a->lines[first].key[1]) == 0; i++) {
            const line *l = &a->lines[i], *m = find(b, l);
            if (m == NULL) continue;
            printf("%-12s %-6s %7s %5s %-7s %10.3f %-7s %10.3f %7.3f\n", l->key[0], l->key[1],
                   l->key[2], l->key[3], l->level, l->ms, m->level, m->ms, l->ms / m->ms);
            logs += log(l->ms / m->ms);
            n++;
        }
        if (n > 0)
            printf("%-12s %-6s geometric mean of %d: %.3f\n", "", a->lines[first].key[1], n,
                   exp(logs / n));
        n_common += n;
    }
    if (n_common == 0) fprintf(stderr, "moed-bench compare: no case is in both files\n");
    return n_common > 0 ? 0 : 1;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    const char **paths = state->input;
    switch (key) {
    case ARGP_KEY_ARG:
        if (state->arg_num >= 2) argp_usage(state);
        paths[state->arg_num] = arg;
        return 0;
    case ARGP_KEY_END:
        if (state->arg_num < 2) argp_usage(state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int bench_compare(int argc, char **argv)
{
    static const struct argp argp = {
        .parser = parse,
        .args_doc = "A.csv B.csv",
        .doc = "Ratios of the times of two files of moed-bench kernels; above 1, B is faster."};
    const char *paths[2] = {NULL, NULL};
    table a = {0}, b = {0};
    if (argp_parse(&argp, argc, argv, 0, NULL, paths) != 0) return 2;
    int status = table_read(&a, paths[0]) && table_read(&b, paths[1]) ? print(&a, &b) : 2;
    ep_free(a.lines);
    ep_free(b.lines);
    return status;
}
