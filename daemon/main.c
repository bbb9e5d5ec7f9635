/*
 * moed: one binary with three verbs. `up` is the daemon, `rank` is what mpirun starts, `check`
 * looks at a configuration and starts nothing. Nobody else in the project reads argv or ends the
 * process.
 */
#include "base/base.h"
#include "daemon/check.h"
#include "daemon/rank.h"
#include "daemon/up.h"

#include <argp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *argp_program_version = "moed " MOED_VERSION;

typedef struct arguments {
    const char *config_path;
    bool print_mpirun, no_launch, once, keys;
} arguments;

enum { OPT_PRINT_MPIRUN = 256, OPT_NO_LAUNCH, OPT_ONCE, OPT_FOREGROUND, OPT_KEYS };

static const struct argp_option up_options_list[] = {
    {"config", 'c', "FILE", 0, "configuration of the cluster", 0},
    {"print-mpirun", OPT_PRINT_MPIRUN, NULL, 0, "print the mpirun command and exit", 0},
    {"no-launch", OPT_NO_LAUNCH, NULL, 0,
     "do not run mpirun: ranks are started by hand and dial in", 0},
    {"once", OPT_ONCE, NULL, 0, "end when the first requests have ended and no client is left", 0},
    {"foreground", OPT_FOREGROUND, NULL, 0, "stay in the foreground (the default)", 0},
    {0}};
static const struct argp_option rank_options_list[] = {
    {"config", 'c', "FILE", 0, "configuration of the cluster, the same for every rank", 0}, {0}};
static const struct argp_option check_options_list[] = {
    {"config", 'c', "FILE", 0, "configuration to look at", 0},
    {"keys", OPT_KEYS, NULL, 0, "list every key of a configuration with its default, and exit", 0},
    {0}};

static error_t parse_option(int key, char *value, struct argp_state *state)
{
    arguments *a = state->input;
    switch (key) {
    case 'c':
        a->config_path = value;
        break;
    case OPT_PRINT_MPIRUN:
        a->print_mpirun = true;
        break;
    case OPT_NO_LAUNCH:
        a->no_launch = true;
        break;
    case OPT_ONCE:
        a->once = true;
        break;
    case OPT_FOREGROUND:
        break;
    case OPT_KEYS:
        a->keys = true;
        break;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument '%s'", value);
        break;
    case ARGP_KEY_END:
        if (a->config_path == NULL && !a->keys) argp_error(state, "which configuration? -c FILE");
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static const struct argp up_argp = {.options = up_options_list,
                                    .parser = parse_option,
                                    .doc =
                                        "The daemon: starts the ranks over mpirun, serves clients, "
                                        "starts the ranks again if one dies."
                                        "\vSIGTERM or Ctrl-C drains; a second one ends at once."};
static const struct argp rank_argp = {.options = rank_options_list,
                                      .parser = parse_option,
                                      .doc = "One rank of a job; started by mpirun."};
static const struct argp check_argp = {
    .options = check_options_list,
    .parser = parse_option,
    .doc = "Checks a configuration and the model it names; prints the resolved configuration, the "
           "rank "
           "table, the memory plan and who owns which expert. Starts nothing."};

static int run_up(const arguments *a)
{
    if (a->print_mpirun) return check_print_mpirun(a->config_path);
    const up_options opt = {
        .config_path = a->config_path, .no_launch = a->no_launch, .once = a->once};
    return up_main(&opt);
}

static int run_rank(const arguments *a)
{
    return rank_main(a->config_path);
}

static int run_check(const arguments *a)
{
    return a->keys ? check_print_keys() : check_main(a->config_path);
}

static const struct verb {
    const char *name;
    const struct argp *argp;
    int (*run)(const arguments *a);
    const char *help;
} verbs[] = {
    {"up", &up_argp, run_up, "the daemon"},
    {"rank", &rank_argp, run_rank, "one rank; what mpirun starts"},
    {"check", &check_argp, run_check, "check a configuration, start nothing"},
};

static void usage(FILE *f)
{
    fprintf(f, "usage: moed COMMAND [OPTION...]\n\n"
               "Distributed expert-parallel inference for mixture-of-experts models.\n\n");
    for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++)
        fprintf(f, "  moed %-6s %s\n", verbs[i].name, verbs[i].help);
    fprintf(f, "\n`moed COMMAND --help` tells the options. Clients: moectl --help\n");
}

int main(int argc, char **argv)
{
    ep_standard_files();
    argp_err_exit_status = 2;
    if (argc < 2) {
        usage(stderr);
        return 2;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-?") == 0 ||
        strcmp(argv[1], "help") == 0) {
        usage(stdout);
        return 0;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("%s\n", argp_program_version);
        return 0;
    }
    for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++) {
        if (strcmp(argv[1], verbs[i].name) != 0) continue;
        arguments a = {0};
        char name[32];
        snprintf(name, sizeof(name), "moed %s", verbs[i].name);
        argv[1] = name;
        argp_parse(verbs[i].argp, argc - 1, argv + 1, 0, NULL, &a);
        return verbs[i].run(&a);
    }
    fprintf(stderr, "moed: unknown command '%s'\n\n", argv[1]);
    usage(stderr);
    return 2;
}
