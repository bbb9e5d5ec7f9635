/*
 * moectl: what people and scripts say to a running daemon. This file reads the command line; each
 * verb is a function of ctl_*.c. The daemon is found by -s, by -c (front.socket of a
 * configuration), by MOED_SOCKET, or at the default place.
 */
#include "daemon/config.h"
#include "daemon/ctl.h"

#include <argp.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *argp_program_version = "moectl " MOED_VERSION;

enum {
    OPT_JSON = 256,
    OPT_PROMPT_IDS,
    OPT_TOP_K,
    OPT_TOP_P,
    OPT_MIN_P,
    OPT_REPEAT,
    OPT_SEED,
    OPT_LOGPROBS,
    OPT_IGNORE_EOS,
    OPT_DEADLINE,
    OPT_CTX,
    OPT_CHUNKS,
    OPT_LAYER,
    OPT_IN,
    OPT_OUT,
    OPT_THREADS
};

static const struct argp_option common[] = {
    {"socket", 's', "PATH", 0,
     "socket of the daemon (default: MOED_SOCKET, else /run/moed/moed.sock)", 1},
    {"config", 'c', "FILE", 0, "take the socket from this configuration", 1},
    {"json", OPT_JSON, NULL, 0, "print one JSON object", 1},
    {0}};
static const struct argp_option generate_options[] = {
    {"prompt", 'p', "TEXT", 0, "the prompt", 0},
    {"prompt-ids", OPT_PROMPT_IDS, "1,2,3", 0, "the prompt as token ids", 0},
    {"tokens", 'n', "N", 0, "tokens to generate at most (128)", 0},
    {"temperature", 'T', "T", 0, "0 takes the most probable token (the default)", 0},
    {"top-k", OPT_TOP_K, "K", 0, "draw from the K most probable only (0: all)", 0},
    {"top-p", OPT_TOP_P, "P", 0, "draw from the smallest set of probability P (1)", 0},
    {"min-p", OPT_MIN_P, "P", 0, "drop tokens below P times the most probable (0)", 0},
    {"repetition-penalty", OPT_REPEAT, "R", 0, "divide logits of tokens seen before by R (1)", 0},
    {"seed", OPT_SEED, "S", 0, "the same seed gives the same text (0)", 0},
    {"logprobs", OPT_LOGPROBS, "N", 0,
     "with --json: the N most probable tokens of each step (at most 20)", 0},
    {"ignore-eos", OPT_IGNORE_EOS, NULL, 0, "do not stop at the end token", 0},
    {"deadline", OPT_DEADLINE, "MS", 0, "give up after so many milliseconds", 0},
    {0}};
static const struct argp_option perplexity_options[] = {
    {"ctx", OPT_CTX, "N", 0,
     "tokens per chunk; the second half of each is scored (the model's context, 512 at most)", 0},
    {"chunks", OPT_CHUNKS, "N", 0, "only the first N chunks", 0},
    {0}};
static const struct argp_option forward_options[] = {
    {"layer", OPT_LAYER, "L", 0, "which layer's experts", 0},
    {"in", OPT_IN, "X.npy", 0, "hidden states [rows, hidden], float32 or bfloat16", 0},
    {"out", OPT_OUT, "Y.npy", 0, "where the result goes, in the type of the input", 0},
    {0}};
static const struct argp_option pack_options[] = {
    {"threads", OPT_THREADS, "N", 0, "threads (as many as processors)", 0}, {0}};
static const struct argp_option no_options[] = {{0}};

static bool whole(const char *text, long min, long max, long *out)
{
    char *end;
    errno = 0;
    long v = strtol(text, &end, 10);
    if (*text == '\0' || *end != '\0' || errno != 0 || v < min || v > max) return false;
    *out = v;
    return true;
}

static void take_int(struct argp_state *state, const char *name, const char *text, long min,
                     long max, int *out)
{
    long v;
    if (!whole(text, min, max, &v))
        argp_error(state, "--%s needs a whole number from %ld to %ld, got '%s'", name, min, max,
                   text);
    else
        *out = (int)v;
}

static void take_float(struct argp_state *state, const char *name, const char *text, double min,
                       double max, float *out)
{
    char *end;
    double v = strtod(text, &end);
    if (*text == '\0' || *end != '\0' || !(v >= min && v <= max))
        argp_error(state, "--%s needs a number from %g to %g, got '%s'", name, min, max, text);
    else
        *out = (float)v;
}

static void take_seed(struct argp_state *state, const char *text, uint64_t *out)
{
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    if (*text == '\0' || *text == '-' || *end != '\0' || errno != 0)
        argp_error(state, "--seed needs a whole number from 0, got '%s'", text);
    else
        *out = v;
}

static char address[PATH_MAX + 8];

static error_t parse_common(int key, char *value, struct argp_state *state)
{
    ctl_options *o = state->input;
    ep_err err = {""};
    config *c = NULL;
    switch (key) {
    case 's':
        snprintf(address, sizeof(address), "unix:%s", value);
        break;
    case 'c':
        if (config_load(&c, value, &err) != EP_OK) {
            fprintf(stderr, "%s\n", err.text);
            exit(2);
        }
        snprintf(address, sizeof(address), "unix:%s", c->front.socket);
        config_close(c);
        break;
    case OPT_JSON:
        o->json = true;
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static const struct argp common_argp = {.options = common, .parser = parse_common};
static const struct argp_child children[] = {{&common_argp, 0, "", 1}, {0}};

static error_t parse_verb(int key, char *value, struct argp_state *state)
{
    ctl_options *o = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = o;
        break;
    case 'p':
        o->prompt = value;
        break;
    case OPT_PROMPT_IDS:
        o->prompt_ids = value;
        break;
    case 'n':
        take_int(state, "tokens", value, 0, 1 << 24, &o->n_tokens);
        break;
    case 'T':
        take_float(state, "temperature", value, 0, 100, &o->sampling.temperature);
        break;
    case OPT_TOP_K:
        take_int(state, "top-k", value, 0, INT_MAX, &o->sampling.top_k);
        break;
    case OPT_TOP_P:
        take_float(state, "top-p", value, 0, 1, &o->sampling.top_p);
        break;
    case OPT_MIN_P:
        take_float(state, "min-p", value, 0, 1, &o->sampling.min_p);
        break;
    case OPT_REPEAT:
        take_float(state, "repetition-penalty", value, 0.01, 100, &o->sampling.repetition_penalty);
        break;
    case OPT_SEED:
        take_seed(state, value, &o->sampling.seed);
        break;
    case OPT_LOGPROBS:
        take_int(state, "logprobs", value, 0, 20, &o->n_logprobs);
        break;
    case OPT_IGNORE_EOS:
        o->ignore_eos = true;
        break;
    case OPT_DEADLINE:
        take_int(state, "deadline", value, 1, INT_MAX, &o->deadline_ms);
        break;
    case OPT_CTX:
        take_int(state, "ctx", value, 4, 1 << 24, &o->context);
        break;
    case OPT_CHUNKS:
        take_int(state, "chunks", value, 1, INT_MAX, &o->chunks);
        break;
    case OPT_LAYER:
        take_int(state, "layer", value, 0, 1 << 16, &o->layer);
        break;
    case OPT_IN:
        o->in_path = value;
        break;
    case OPT_THREADS:
        take_int(state, "threads", value, 1, 256, &o->n_threads);
        break;
    case OPT_OUT:
        o->out_path = value;
        break;
    case ARGP_KEY_ARG:
        if ((int)state->arg_num >= o->n_paths) argp_error(state, "unexpected argument '%s'", value);
        *(o->path == NULL ? &o->path : &o->path2) = value;
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static const struct verb {
    const char *name;
    int n_paths; /* arguments that are no options */
    int (*run)(const ctl_options *o);
    struct argp argp;
} verbs[] = {
    {"generate",
     0,
     ctl_generate,
     {generate_options, parse_verb, NULL, "Streams text that continues a prompt.", children, NULL,
      NULL}},
    {"perplexity",
     1,
     ctl_perplexity,
     {perplexity_options, parse_verb, "FILE",
      "Perplexity over a text: chunks of --ctx tokens, nothing carried over, second half of each "
      "scored.",
      children, NULL, NULL}},
    {"forward",
     0,
     ctl_forward,
     {forward_options, parse_verb, NULL,
      "One MoE layer (gate, experts, combine) on given hidden states, "
      "through the router's data address.",
      children, NULL, NULL}},
    {"status",
     0,
     ctl_status,
     {no_options, parse_verb, NULL, "State of the daemon and its ranks.", children, NULL, NULL}},
    {"stats",
     0,
     ctl_stats,
     {no_options, parse_verb, NULL,
      "Counters per layer, shard and expert: rows, bytes, phase times.", children, NULL, NULL}},
    {"drain",
     0,
     ctl_drain,
     {no_options, parse_verb, NULL, "Lets running requests end, then stops the daemon.", children,
      NULL, NULL}},
    {"inspect",
     1,
     ctl_inspect,
     {no_options, parse_verb, "MODEL",
      "What a model (GGUF file, safetensors file, index or folder) holds and what would refuse it; "
      "needs no daemon.",
      children, NULL, NULL}},
    {"pack",
     2,
     ctl_pack,
     {pack_options, parse_verb, "MODEL OUT",
      "Packs every expert once into a file that shards map at start (`packed:` of the "
      "configuration); "
      "needs no daemon.",
      children, NULL, NULL}},
};

static void usage(FILE *f)
{
    fprintf(f, "usage: moectl COMMAND [OPTION...]\n\n");
    for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++)
        fprintf(f, "  moectl %-11s %.*s\n", verbs[i].name, (int)strcspn(verbs[i].argp.doc, ".:;("),
                verbs[i].argp.doc);
    fprintf(f, "\n`moectl COMMAND --help` tells the options. Exit status: 0 success, 1 the request "
               "failed,\n"
               "2 usage, configuration, or no daemon.\n");
}

static void default_address(void)
{
    char path[PATH_MAX];
    const char *env = getenv("MOED_SOCKET");
    config_default_socket(path, sizeof(path));
    snprintf(address, sizeof(address), "unix:%s", env != NULL ? env : path);
}

int main(int argc, char **argv)
{
    ep_standard_files();
    argp_err_exit_status = 2;
    signal(SIGPIPE, SIG_IGN);
    ep_log_open("moectl", EP_LOG_WARN);
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
        ctl_options o = {
            .address = address, .n_paths = verbs[i].n_paths, .n_tokens = 128, .layer = -1};
        char name[32];
        moed__sampling__init(&o.sampling);
        o.sampling.top_p = o.sampling.repetition_penalty = 1.0f;
        default_address();
        snprintf(name, sizeof(name), "moectl %s", verbs[i].name);
        argv[1] = name;
        argp_parse(&verbs[i].argp, argc - 1, argv + 1, 0, NULL, &o);
        int rc = verbs[i].run(&o);
        if (fflush(stdout) == 0 && !ferror(stdout)) return rc;
        fprintf(stderr, "moectl: standard output cannot be written: %s\n", strerror(errno));
        return rc != 0 ? rc : 1;
    }
    fprintf(stderr, "moectl: unknown command '%s'\n\n", argv[1]);
    usage(stderr);
    return 2;
}
