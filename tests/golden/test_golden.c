/*
 * golden: the whole path (router and shard over loopback) against results of an independent
 * implementation in float64: tokens, logits, the inside of every layer, and perplexity. Files of
 * the repository always; the larger ones where the shared folder is, skipped aloud otherwise. Each
 * comparison prints its largest error as a share of what is allowed, so that a drift is seen before
 * it fails.
 */
#include <jansson.h>
#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "tests/cluster.h"
#include "tests/test.h"

#define HIDDEN_TOLERANCE 2e-5 /* of the largest magnitude of the row */
#define WEIGHT_TOLERANCE 2e-5

typedef struct golden {
    model *m;
    json_t *reference;
} golden;

typedef struct tolerance {
    double logits;     /* of the largest |logit| of the position */
    double margin;     /* a choice closer than this may fall either way */
    double perplexity; /* relative */
} tolerance;

/* Float weights: rounding of f32 alone. */
static const tolerance exact = {2e-4, 1e-3, 1e-4};
/* K-quants: rows become int8 in blocks of 256, which the float64 reference of the same file does
 * not do. */
static const tolerance integers = {0.06, 0.1, 0.005};

static bool golden_open(golden *g, const char *gguf, const char *json)
{
    ep_err err;
    json_error_t json_err;
    *g = (golden){0};
    if (model_open(&g->m, gguf, &err) != EP_OK) {
        printf("    %s\n", err.text);
        CHECK(!"model opens");
        return false;
    }
    if (json == NULL) return true;
    g->reference = json_load_file(json, 0, &json_err);
    if (g->reference == NULL) printf("    %s: %s\n", json, json_err.text);
    CHECK(g->reference != NULL);
    return g->reference != NULL;
}

static void golden_close(golden *g)
{
    model_close(g->m);
    json_decref(g->reference);
}

static double number(const json_t *j)
{
    return json_number_value(j);
}

static int int_of(const json_t *j, const char *key)
{
    return (int)json_integer_value(json_object_get(j, key));
}

/* ids into out; returns how many */
static int ids_of(const json_t *array, int32_t *out, int cap)
{
    int n = (int)json_array_size(array);
    for (int i = 0; i < n && i < cap; i++)
        out[i] = (int32_t)json_integer_value(json_array_get(array, (size_t)i));
    return n < cap ? n : cap;
}

static void report(const char *what, double worst)
{
    printf("    %s: largest error %.1f %% of what is allowed\n", what, worst * 100.0);
    CHECK(worst <= 1.0);
}

/* ---- tokens and logits --------------------------------------------------------------------------
 */

static void check_greedy(const json_t *one, const answer *a, const tolerance *allow)
{
    int32_t want[256];
    int n = ids_of(json_object_get(one, "greedy"), want, 256);
    const json_t *margins = json_object_get(one, "greedy_margin");
    CHECK_INT(a->n_tokens, n);
    CHECK(a->done && a->finish == ROUTER_FINISH_LENGTH);
    for (int i = 0; i < n && i < a->n_tokens; i++) {
        if (a->tokens[i] == want[i]) continue;
        double margin = number(json_array_get(margins, (size_t)i));
        printf("    \"%s\": token %d is %d, reference %d, margin %g\n",
               json_string_value(json_object_get(one, "prompt")), i, a->tokens[i], want[i], margin);
        CHECK(margin < allow->margin);
        return; /* what follows continues another text */
    }
}

static double check_logits(const json_t *one, const answer *a, int vocab, const tolerance *allow)
{
    double worst = 0;
    size_t i;
    const json_t *position;
    json_array_foreach(json_object_get(one, "logits"), i, position)
    {
        int t = int_of(position, "position");
        double allowed = number(json_object_get(position, "max_abs")) * allow->logits;
        CHECK(t < a->n_logits && a->logit_positions[t] == t);
        if (t >= a->n_logits) return INFINITY;
        size_t j;
        const json_t *entry;
        json_array_foreach(json_object_get(position, "top"), j, entry)
        {
            float got = a->logits[(size_t)t * (size_t)vocab + (size_t)int_of(entry, "id")];
            double error = fabs((double)got - number(json_object_get(entry, "logit"))) / allowed;
            if (!(error <= worst)) worst = error;
        }
    }
    return worst;
}

static void check_cases(const golden *g, const tolerance *allow)
{
    ep_err err = {""};
    cluster *c;
    cluster_options o = cluster_options_default(g->m);
    o.keep_logits = true;
    o.router.tap.all_logits = true;
    ep_status status = cluster_open(&c, &o, &err);
    CHECK_STR(err.text, "");
    if (status != EP_OK) return;
    const json_t *cases = json_object_get(g->reference, "cases");
    int n = (int)json_array_size(cases);
    CHECK(n >= 5);
    for (int i = 0; i < n; i++) {
        int32_t prompt[256];
        const json_t *one = json_array_get(cases, (size_t)i);
        int n_prompt = ids_of(json_object_get(one, "prompt_tokens"), prompt, 256);
        router_request q = cluster_request((uint64_t)i, prompt, n_prompt,
                                           (int)json_array_size(json_object_get(one, "greedy")));
        q.ignore_end = true;
        CHECK_INT(cluster_submit(c, &q, &err), EP_OK);
    }
    CHECK_INT(cluster_run(c), EP_OK);
    double worst = 0;
    for (int i = 0; i < n; i++) {
        const json_t *one = json_array_get(cases, (size_t)i);
        check_greedy(one, cluster_answer(c, (uint64_t)i), allow);
        double error = check_logits(one, cluster_answer(c, (uint64_t)i), g->m->shape.vocab, allow);
        if (!(error <= worst)) worst = error;
    }
    report("logits", worst);
    cluster_close(c);
}

/* ---- the inside of the layers -------------------------------------------------------------------
 */

typedef struct layer_check {
    const json_t *layers;
    const model_shape *shape;
    int n_calls;
    double input, output, weights;
} layer_check;

static double row_error(const json_t *row, const float *got, int n)
{
    double largest = 0, worst = 0;
    for (int i = 0; i < n; i++)
        largest = fmax(largest, fabs(number(json_array_get(row, (size_t)i))));
    for (int i = 0; i < n; i++) {
        double error = fabs((double)got[i] - number(json_array_get(row, (size_t)i)));
        error /= largest * HIDDEN_TOLERANCE;
        if (!(error <= worst)) worst = error;
    }
    CHECK_INT(json_array_size(row), n);
    return worst;
}

static void on_moe(void *arg, int layer, int n_tokens, const uint64_t *request, const int *position,
                   const float *input, const int32_t *experts, const float *weights, int top_k,
                   const float *output)
{
    layer_check *check = arg;
    const json_t *want = json_array_get(check->layers, (size_t)layer);
    int hidden = check->shape->hidden;
    (void)request;
    check->n_calls++;
    CHECK_INT(n_tokens, json_array_size(json_object_get(want, "moe_input")));
    for (int i = 0; i < n_tokens; i++) {
        size_t row = (size_t)i;
        CHECK_INT(position[i], i);
        double error = row_error(json_array_get(json_object_get(want, "moe_input"), row),
                                 input + row * (size_t)hidden, hidden);
        if (!(error <= check->input)) check->input = error;
        error = row_error(json_array_get(json_object_get(want, "layer_output"), row),
                          output + row * (size_t)hidden, hidden);
        if (!(error <= check->output)) check->output = error;
        const json_t *ids = json_array_get(json_object_get(want, "experts"), row);
        const json_t *ws = json_array_get(json_object_get(want, "weights"), row);
        for (int slot = 0; slot < top_k; slot++) {
            size_t at = (size_t)(i * top_k + slot);
            CHECK_INT(experts[at], json_integer_value(json_array_get(ids, (size_t)slot)));
            error = fabs((double)weights[at] - number(json_array_get(ws, (size_t)slot)));
            if (!(error <= check->weights)) check->weights = error;
        }
    }
}

static void check_layers(const golden *g)
{
    ep_err err = {""};
    cluster *c;
    int32_t prompt[256];
    const json_t *one = json_array_get(json_object_get(g->reference, "cases"), 0);
    layer_check check = {.layers = json_object_get(one, "layers"), .shape = &g->m->shape};
    int n_prompt = ids_of(json_object_get(one, "prompt_tokens"), prompt, 256);
    cluster_options o = cluster_options_default(g->m);
    o.router.tap = (router_tap){.arg = &check, .moe = on_moe};
    ep_status status = cluster_open(&c, &o, &err);
    CHECK_STR(err.text, "");
    if (status != EP_OK) return;
    router_request q = cluster_request(1, prompt, n_prompt, 0);
    CHECK_INT(cluster_submit(c, &q, &err), EP_OK);
    CHECK_INT(cluster_run(c), EP_OK);
    CHECK(cluster_answer(c, 1)->done);
    CHECK_INT(check.n_calls, g->m->shape.n_layers);
    report("MoE input", check.input);
    report("layer output", check.output);
    report("gate weights", check.weights / WEIGHT_TOLERANCE);
    cluster_close(c);
}

/* ---- perplexity ---------------------------------------------------------------------------------
 */

/* Full chunks of context tokens, the second half scored. Returns exp of the mean; *n_scored tokens.
 */
static double perplexity(model *m, const char *text_path, int context, int *n_scored)
{
    size_t n_text = 0, n_ids = 0;
    char *text = (char *)cluster_read_file(text_path, &n_text);
    int32_t *ids = NULL;
    ep_err err = {""};
    model_tokenizer *tok = NULL;
    cluster *c = NULL;
    double nll = 0;
    *n_scored = 0;
    if (text == NULL || model_tokenizer_open(&tok, m, &err) != EP_OK ||
        model_encode(tok, text, n_text, false, &ids, &n_ids) != EP_OK)
        goto done;
    cluster_options o = cluster_options_default(m);
    o.router.max_tokens_per_step = 256;
    o.router.kv_tokens = 4 * context;
    if (cluster_open(&c, &o, &err) != EP_OK) goto done;
    uint64_t n_chunks = 0;
    for (size_t at = 0; at + (size_t)context < n_ids; at += (size_t)context) {
        router_request q = cluster_request(n_chunks++, ids + at, context, 0);
        q.score_from = context / 2 + 1;
        if (cluster_submit(c, &q, &err) != EP_OK) goto done;
    }
    if (cluster_run(c) != EP_OK) goto done;
    for (uint64_t i = 0; i < n_chunks; i++) {
        const answer *a = cluster_answer(c, i);
        CHECK_INT(a->n_scores, context - context / 2 - 1);
        for (int t = context / 2 + 1; t < context; t++)
            nll -= a->scores[t];
        *n_scored += a->n_scores;
    }
done:
    CHECK_STR(err.text, "");
    cluster_close(c);
    ep_free(ids);
    model_tokenizer_close(tok);
    free(text);
    return *n_scored > 0 ? exp(nll / *n_scored) : NAN;
}

static void check_perplexity(model *m, const char *text, int context, double want, double allowed,
                             int want_scored)
{
    int n_scored;
    double got = perplexity(m, text, context, &n_scored);
    printf("    perplexity %.4f over %d tokens, reference %.4f, off by %+.4f %%\n", got, n_scored,
           want, (got / want - 1.0) * 100.0);
    CHECK_INT(n_scored, want_scored);
    CHECK(fabs(got / want - 1.0) <= allowed);
}

static void check_reference_perplexity(const golden *g, const char *text, const tolerance *allow)
{
    const json_t *p = json_object_get(g->reference, "perplexity");
    check_perplexity(g->m, text, int_of(p, "context"), number(json_object_get(p, "ppl")),
                     allow->perplexity, int_of(p, "tokens"));
}

/* ---- tests --------------------------------------------------------------------------------------
 */

static bool open_micro(golden *g)
{
    char json[4096];
    snprintf(json, sizeof(json), "%s", cluster_source_path("tests/golden/micro.json"));
    return golden_open(g, cluster_source_path("tests/golden/micro-f32.gguf"), json);
}

static void test_micro_cases(void)
{
    golden g;
    if (open_micro(&g)) check_cases(&g, &exact);
    golden_close(&g);
}

static void test_micro_layers(void)
{
    golden g;
    if (open_micro(&g)) check_layers(&g);
    golden_close(&g);
}

static void test_micro_perplexity(void)
{
    golden g;
    if (open_micro(&g))
        check_reference_perplexity(&g, cluster_source_path("tests/golden/micro-held-out.txt"),
                                   &exact);
    golden_close(&g);
}

/* The model that is shipped, against tests/golden/reference.py over the same file. */
static bool open_shipped(golden *g)
{
    char json[4096];
    snprintf(json, sizeof(json), "%s", cluster_source_path("tests/golden/tinymoe-q4_k_m.json"));
    return golden_open(g, cluster_source_path("deploy/demo/tinymoe-q4_k_m.gguf"), json);
}

static void test_shipped_cases(void)
{
    golden g;
    if (open_shipped(&g)) check_cases(&g, &integers);
    golden_close(&g);
}

static void test_shipped_perplexity(void)
{
    golden g;
    if (open_shipped(&g))
        check_reference_perplexity(&g, cluster_source_path("tests/golden/micro-held-out.txt"),
                                   &integers);
    golden_close(&g);
}

static bool open_tinymoe(golden *g)
{
    char gguf[4096];
    const char *path = cluster_shared_path("models/tinymoe-f32.gguf");
    if (path == NULL) {
        test_skip("the shared folder with tinymoe-f32.gguf is not there");
        *g = (golden){0};
        return false;
    }
    snprintf(gguf, sizeof(gguf), "%s", path);
    return golden_open(g, gguf, cluster_shared_path("golden/tinymoe.json"));
}

static void test_tinymoe_cases(void)
{
    golden g;
    if (open_tinymoe(&g)) check_cases(&g, &exact);
    golden_close(&g);
}

static void test_tinymoe_layers(void)
{
    golden g;
    if (open_tinymoe(&g)) check_layers(&g);
    golden_close(&g);
}

static void test_tinymoe_perplexity(void)
{
    golden g;
    if (open_tinymoe(&g))
        check_reference_perplexity(&g, cluster_shared_path("corpus/held-out.txt"), &exact);
    golden_close(&g);
}

static void quantised(const char *name, double allowed)
{
    golden g;
    const char *path = cluster_shared_path(name);
    if (path == NULL) {
        test_skip("the shared folder with the quantised demo models is not there");
        return;
    }
    if (golden_open(&g, path, NULL))
        check_perplexity(g.m, cluster_shared_path("corpus/held-out.txt"), 256, 45.42895705017582,
                         allowed, 8763);
    golden_close(&g);
}

static void test_q8_0_perplexity(void)
{
    quantised("models/tinymoe-q8_0.gguf", 0.002);
}
static void test_q4_k_m_perplexity(void)
{
    quantised("models/tinymoe-q4_k_m.gguf", 0.01);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {{"micro_cases", test_micro_cases},
                                      {"micro_layers", test_micro_layers},
                                      {"micro_perplexity", test_micro_perplexity},
                                      {"shipped_cases", test_shipped_cases},
                                      {"shipped_perplexity", test_shipped_perplexity},
                                      {"tinymoe_cases", test_tinymoe_cases},
                                      {"tinymoe_layers", test_tinymoe_layers},
                                      {"tinymoe_perplexity", test_tinymoe_perplexity},
                                      {"q8_0_perplexity", test_q8_0_perplexity},
                                      {"q4_k_m_perplexity", test_q4_k_m_perplexity}};
    ep_err err;
    if (kern_select("auto", &err) != EP_OK) {
        printf("kern_select: %s\n", err.text);
        return 1;
    }
    printf("kernels %s\n", kern_level());
    return test_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
