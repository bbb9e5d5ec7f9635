/*
 * moed-bench: measuring programs under one name. A subcommand is one line of the table below; each
 * reads its own arguments (moed-bench NAME --help).
 */
#include <argp.h>
#include <stdio.h>
#include <string.h>
#include "tests/bench/bench.h"
#include "tests/bench/bench_layer.h"

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} commands[] = {
    {"kernels", bench_kernels, "expert layers on this machine's CPU against its limits"},
    {"compare", bench_compare, "two CSV files of `kernels` as ratios"},
    {"layer", bench_layer, "one MoE layer of a model through loopback shards"},
    {"model", bench_model, "writes a model file with random weights"},
    {"e2e", bench_e2e, "a whole model through moed up: tokens a second"},
};

enum { n_commands = sizeof commands / sizeof commands[0] };

typedef struct choice {
    int command, at; /* index of the table, of argv */
} choice;

static error_t parse(int key, char *arg, struct argp_state *state)
{
    choice *c = state->input;
    switch (key) {
    case 'c': /* --compare A B is compare A B */
    case ARGP_KEY_ARG:
        for (int i = 0; i < n_commands; i++)
            if (strcmp(key == 'c' ? "compare" : arg, commands[i].name) == 0) c->command = i;
        if (c->command < 0) argp_error(state, "there is no subcommand \"%s\"", arg);
        c->at = state->next - 1;
        state->next = state->argc; /* the rest is the subcommand's */
        return 0;
    case ARGP_KEY_NO_ARGS:
        if (c->command < 0) argp_usage(state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int main(int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"compare", 'c', NULL, 0, "The same as the subcommand compare", 0}, {0}};
    char doc[1024];
    int n = snprintf(doc, sizeof doc, "Measures moed.\v");
    for (int i = 0; i < n_commands; i++)
        n += snprintf(doc + n, sizeof doc - (size_t)n, "  %-10s %s\n", commands[i].name,
                      commands[i].help);
    const struct argp argp = {
        .options = options, .parser = parse, .args_doc = "SUBCOMMAND [ARGUMENTS...]", .doc = doc};
    choice c = {.command = -1};
    if (argp_parse(&argp, argc, argv, ARGP_IN_ORDER, NULL, &c) != 0) return 2;
    char name[64];
    snprintf(name, sizeof name, "moed-bench %s", commands[c.command].name);
    argv[c.at] = name;
    return commands[c.command].run(argc - c.at, argv + c.at);
}
