/*
 * Proves the configuration where whole files (tests/config) say too little: defaults, several
 * mistakes in one run, near misses, text that YAML could take for something else, aliases, the
 * digest and the first difference, allocation failures.
 */
#include "daemon/config.h"
#include "tests/test.h"

#include <stdlib.h>

#define GOOD "model: m.gguf\nfront: {socket: /tmp/x.sock}\nrouters: [{}]\nshards: [{}, {}]\n"

static config *parse(const char *text, ep_err *err)
{
    config *c = NULL;
    *err = (ep_err){""};
    return config_parse(&c, "/etc/moed/c.yaml", text, strlen(text), err) == EP_OK ? c : NULL;
}

static config *good(const char *text)
{
    ep_err err;
    config *c = parse(text, &err);
    if (c == NULL) {
        printf("    refused: %s\n", err.text);
        CHECK(c != NULL);
    }
    return c;
}

static void refused(const char *text, const char *want)
{
    ep_err err;
    config *c = parse(text, &err);
    CHECK(c == NULL);
    if (strstr(err.text, want) == NULL) CHECK_STR(err.text, want);
    config_close(c);
}

static void test_defaults(void)
{
    config *c = good(GOOD);
    if (c == NULL) return;
    CHECK_STR(c->model, "/etc/moed/m.gguf"); /* relative to the file's folder */
    CHECK_STR(c->kernels, "auto");
    CHECK_STR(c->front.socket, "/tmp/x.sock");
    CHECK_STR(c->front.control, "unix:/tmp/x.sock.ranks");
    CHECK_INT(c->n_routers, 1);
    CHECK_INT(c->n_shards, 2);
    CHECK_INT(config_n_ranks(c), 3);
    CHECK(config_is_router(c, 0) && !config_is_router(c, 1));
    CHECK_STR(config_rank_at(c, 0)->name, "r0");
    CHECK_STR(config_rank_at(c, 2)->name, "s1");
    CHECK_STR(config_rank_at(c, 2)->device, "cpu");
    CHECK_INT(config_rank_at(c, 0)->kv_tokens, 8192);
    CHECK(c->shards[0].experts == NULL);
    CHECK(config_is_local(c));
    CHECK_INT(c->limits.max_tokens_per_step, 512);
    CHECK_INT(c->limits.deadline_s, 120);
    CHECK_STR(c->placement.strategy, "balanced");
    config_close(c);
    c = good("model: m.gguf\nfront: {socket: run/s}\nrouters: [{}]\nshards: [{}]\n");
    if (c == NULL) return;
    CHECK_STR(c->front.socket, "/etc/moed/run/s"); /* wherever moectl -c is called */
    CHECK_STR(c->front.control, "unix:/etc/moed/run/s.ranks");
    config_close(c);
    config_close(NULL);
}

/* Scalars are text: nothing turns into a number, a truth value or nothing by itself. */
static void test_text(void)
{
    config *c = good("model: 010\nkernels: scalar\nfront: {socket: /tmp/x.sock}\n"
                     "routers: [{name: no}]\nshards: [{name: 'null', experts: \"\"}, {name: 1e3, "
                     "experts: ~}]\n");
    if (c == NULL) return;
    CHECK_STR(c->model, "/etc/moed/010");
    CHECK_STR(c->routers[0].name, "no");
    CHECK_STR(c->shards[0].name, "null");
    CHECK_STR(c->shards[0].experts,
              ""); /* owns none, which is not the same as "left to the placement" */
    CHECK_STR(c->shards[1].name, "1e3");
    CHECK(c->shards[1].experts == NULL);
    config_close(c);
}

static void test_mistakes(void)
{
    refused("", "the file is empty");
    refused("- 1\n", "must hold keys and values");
    refused("model: [\n", "/etc/moed/c.yaml:2:1: ");
    refused("routers: [{}]\nshards: [{}]\n", "'model' is missing");
    refused("model: m\nshards: [{}]\n", "'routers' needs at least one entry");
    refused("model: m\nrouters: [{}]\nshards: []\n", "'shards' needs at least one entry");
    refused("model: m\nrouters: {}\n", "c.yaml:2:10: 'routers' needs a list");
    refused("model: m\nshard: [{}]\n",
            "c.yaml:2:1: unknown key 'shard' in the file; did you mean 'shards'?");
    refused("model: m\nlimits:\n  max_queu: 4\n",
            "c.yaml:3:3: unknown key 'max_queu' in 'limits'; did you mean 'max_queue'?");
    refused("model: m\nlimits:\n  zebra: 4\n", "unknown key 'zebra' in 'limits'");
    refused("model: m\nlimits: {max_queue: many}\n",
            "c.yaml:2:21: 'limits.max_queue' needs a whole number, got 'many'");
    refused("model: m\nlimits: {max_queue: 0}\n",
            "'limits.max_queue' must lie between 1 and 1048576, got 0");
    refused("model: m\nlimits: {max_queue: 99999999999999999999}\n",
            "'limits.max_queue' needs a whole number");
    refused("model: m\nlimits: {max_queue: 0x10}\n", "'limits.max_queue' needs a whole number");
    refused("model: m\nlimits: {max_queue: [1]}\n", "'limits.max_queue' needs a single value");
    refused("model: m\nkernels: avx3\n",
            "'kernels' must be one of auto|scalar|avx2|avx512|amx, got 'avx3'");
    refused("model: m\nkernels: auto|scalar\n", "'kernels' must be one of");
    refused("model: m\nwire: {combine: reduced}\n",
            "'wire.combine' must be one of exact, got 'reduced'");
    refused("model: m\nplacement: {replicas: 1}\n", "not implemented yet");
    refused("model: m\nspares: [{}]\n", "'spares' is not implemented yet");
    refused("model: m\nmodel: n\n",
            "c.yaml:2:1: 'model' stands twice in the file, first in line 1");
    refused("model: m\nlimits: {a: 1}\n---\nmodel: n\n", "unknown key 'a'");
    refused(GOOD "---\nmodel: n\n", "more than one document");
    refused("model: &a m\nkernels: *a\n", "aliases (*name) are not allowed");
    refused("model: ~\n", "'model' may not be empty");
    refused("model: \"a\\0b\"\n", "'model' holds a zero byte");
    refused("? [a]\n: b\n", "a key of the file is not a plain word");
    refused("model: m\nrouters: [{}]\nshards: [{name: r0}]\n", "two ranks are called 'r0'");
    refused("model: m\nrouters: [{device: 'cuda:0'}]\nshards: [{}]\n",
            "router 'r0': device 'cuda:0' is not implemented");
    refused("model: m\nrouters: [{}]\nshards: [{device: 'gpu'}]\n",
            "'s0': device must be cpu, cuda:N or auto");
    refused("model: m\nrouters: [{}]\nshards: [{host: far}]\n",
            "'front.control' is needed when a rank runs on another host");
    refused("model: m\nfront: {control: 'http://x'}\nrouters: [{}]\nshards: [{}]\n",
            "'front.control' must be unix:PATH or tcp:HOST:PORT");
    refused("model: m\nplacement: {strategy: explicit}\nrouters: [{}]\nshards: [{experts: '0-1'}, "
            "{}]\n",
            "placement is explicit, but shard 's1' has no 'experts'");
}

/* All mistakes of a file in one run, in their order, one per line. */
static void test_many(void)
{
    ep_err err;
    config *c = parse("modle: m\nlimits:\n  max_queue: -1\n  zebra: 1\nkernels: fast\n", &err);
    CHECK(c == NULL);
    const char *first = strstr(err.text, ":1:1: unknown key 'modle'"),
               *second = strstr(err.text, ":3:14: "), *third = strstr(err.text, ":4:3: "),
               *fourth = strstr(err.text, ":5:10: ");
    CHECK(first != NULL && second != NULL && third != NULL && fourth != NULL);
    CHECK(first < second && second < third && third < fourth);
    /* More than the message holds: whole lines only. */
    char text[4096] = "";
    for (int i = 0; i < 100; i++)
        snprintf(text + strlen(text), sizeof(text) - strlen(text), "key_%d: 1\n", i);
    c = parse(text, &err);
    CHECK(c == NULL);
    const char *last = strrchr(err.text, '\n');
    CHECK(last != NULL && strstr(last, "unknown key 'key_") != NULL &&
          strstr(last, "in the file") != NULL);
}

static void test_difference(void)
{
    config *a = good(GOOD), *b = good(GOOD "limits: {max_queue: 128}\n"),
           *d = good(GOOD "# a remark\n");
    if (a == NULL || b == NULL || d == NULL) return;
    ep_buf la = {0}, lb = {0};
    char text[256];
    CHECK_INT(config_print_lines(a, &la), EP_OK);
    CHECK_INT(config_print_lines(b, &lb), EP_OK);
    CHECK_INT(ep_buf_add(&la, "", 1), EP_OK);
    CHECK_INT(ep_buf_add(&lb, "", 1), EP_OK);
    config_first_difference((const char *)la.data, (const char *)lb.data, text, sizeof(text));
    CHECK_STR(text, "limits.max_queue (256 here, 128 there)");
    config_first_difference((const char *)la.data, (const char *)la.data, text, sizeof(text));
    CHECK_STR(text, "nothing");
    config_first_difference("", "a: 1\n", text, sizeof(text));
    CHECK(strncmp(text, "a (", 3) == 0);
    config_first_difference("no colon", "x", text, sizeof(text)); /* a peer may send anything */
    config_first_difference("a:", "a: ", text, sizeof(text));
    config_first_difference("\n\n:", ":\n", text, sizeof(text));
    CHECK(config_digest(a) != config_digest(b));
    CHECK(config_digest(a) == config_digest(d)); /* remarks are not configuration */
    ep_buf_fini(&la);
    ep_buf_fini(&lb);
    config_close(a);
    config_close(b);
    config_close(d);
}

/* What is printed parses to the same, whatever the text holds. */
static void test_print(void)
{
    config *c =
        good("model: \"a \\\"b\\\" \\\\ \\t \\u00e9\\x8f\\x85\\u2028\\ufeff\\U0001f600 #: "
             "{}\"\nfront: {socket: /tmp/x.sock}\n"
             "routers: [{name: \"r: 'x'\"}]\nshards: [{experts: \"0-3,8\"}, {experts: \"\"}]\n"
             "launch: {options: \"--mca a b\"}\n");
    if (c == NULL) return;
    ep_buf yaml = {0};
    CHECK_INT(config_print_yaml(c, &yaml), EP_OK);
    CHECK_INT(ep_buf_add(&yaml, "", 1), EP_OK);
    config *again = good((const char *)yaml.data);
    if (again != NULL) {
        CHECK_STR(again->model, c->model);
        CHECK_STR(again->routers[0].name, "r: 'x'");
        CHECK_STR(again->shards[1].experts, "");
        CHECK(config_digest(c) == config_digest(again));
    }
    config_close(again);
    config_close(c);
    ep_buf_fini(&yaml);
}

static void test_large(void)
{
    ep_err err = {""};
    config *c = NULL;
    size_t n = ((size_t)1 << 20) + 1;
    char *text = malloc(n);
    if (text == NULL) abort();
    memset(text, '#', n);
    CHECK_INT(config_parse(&c, "x", text, n, &err), EP_ERR_TOO_LARGE);
    memset(text, '[', n - 1); /* deep nesting */
    CHECK_INT(config_parse(&c, "x", text, 100000, &err), EP_ERR_INVALID);
    free(text);
    CHECK_INT(config_load(&c, "/nonexistent/moed.yaml", &err), EP_ERR_INVALID);
    CHECK(strstr(err.text, "/nonexistent/moed.yaml: ") != NULL);
}

static void test_no_memory(void)
{
    bool ended = false;
    for (int64_t n = 1; n < 200 && !ended; n++) {
        ep_err err = {""};
        config *c = NULL;
        ep_alloc_fail_at(n);
        ep_status status = config_parse(&c, "x.yaml", GOOD, strlen(GOOD), &err);
        ep_alloc_fail_at(0);
        ended = status == EP_OK;
        CHECK(ended || (status == EP_ERR_NOMEM && err.text[0] != '\0'));
        config_close(c);
    }
    CHECK(ended);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"defaults", test_defaults},     {"text", test_text},
        {"mistakes", test_mistakes},     {"many", test_many},
        {"difference", test_difference}, {"print", test_print},
        {"large", test_large},           {"no_memory", test_no_memory},
    };
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
