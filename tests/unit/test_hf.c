/*
 * Folders of Hugging Face's form, served: a folder in floats answers with the bits of the GGUF file
 * it was made from, one quantised by GPTQ like its own values in floats but for the rounding of
 * activations, and with equal bits over any number of shards; its experts are packed and mapped
 * like any others; its tokenizer gives the ids of the GGUF file's.
 */
#include "expert_shard/cache.h"
#include "kernels/kernels.h"
#include "tests/cluster.h"
#include "tests/hf_make.h"
#include "tests/test.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#define MICRO "tests/golden/micro-f32.gguf"
#define DEMO  "deploy/demo/tinymoe-q4_k_m.gguf"

static model *open_gguf(const char *name)
{
    model *m = NULL;
    ep_err err = {{0}};
    CHECK_INT(model_open(&m, cluster_source_path(name), &err), EP_OK);
    if (m == NULL) {
        printf("    %s\n", err.text);
        exit(1);
    }
    return m;
}

/* A GGUF model as a folder; f outlives what is returned. */
static model *open_folder(hm_folder *f, const model *from, const hm_options *o)
{
    model *m = NULL;
    ep_err err = {{0}};
    hm_make(f, from, o);
    CHECK_INT(hm_open(&m, f, &err), EP_OK);
    if (m == NULL) {
        printf("    %s\n", err.text);
        exit(1);
    }
    return m;
}

/* ---- answers ---- */

enum { N_PROMPT = 24, N_TOKENS = 12 };

static cluster *run(const model *m, int n_shards)
{
    cluster *c = NULL;
    ep_err err = {{0}};
    cluster_options o = cluster_options_default(m);
    o.n_shards = n_shards;
    o.keep_logits = true;
    CHECK_INT(cluster_open(&c, &o, &err), EP_OK);
    if (c == NULL) {
        printf("    %s\n", err.text);
        return NULL;
    }
    for (uint64_t i = 0; i < 3; i++) {
        int32_t prompt[N_PROMPT];
        for (int t = 0; t < N_PROMPT; t++)
            prompt[t] = (int32_t)((uint64_t)(t * 37 + 11) * (i + 3) % 1900);
        router_request q = cluster_request(i, prompt, N_PROMPT - 7 * (int)i, N_TOKENS);
        CHECK_INT(cluster_submit(c, &q, &err), EP_OK);
    }
    CHECK_INT(cluster_run(c), EP_OK);
    return c;
}

/* The largest difference of logits as a share of the largest logit of its position, as long as the
 * texts are the same. */
static double compare(const cluster *a, const cluster *b, int vocab, bool *same_bits)
{
    double worst = 0;
    *same_bits = true;
    for (uint64_t i = 0; i < 3; i++) {
        const answer *x = cluster_answer(a, i), *y = cluster_answer(b, i);
        CHECK(x->done && y->done && x->n_logits == y->n_logits);
        *same_bits &= x->n_tokens == y->n_tokens && x->n_logits == y->n_logits &&
                      memcmp(x->tokens, y->tokens, (size_t)x->n_tokens * 4) == 0;
        for (int t = 0; t < N_TOKENS && t < x->n_logits && t < y->n_logits; t++) {
            if (t > 0 && x->tokens[t - 1] != y->tokens[t - 1]) break;
            const float *p = x->logits + (size_t)t * (size_t)vocab,
                        *q = y->logits + (size_t)t * (size_t)vocab;
            double most = 0, off = 0;
            for (int v = 0; v < vocab; v++) {
                most = fmax(most, fabs((double)p[v]));
                off = fmax(off, fabs((double)p[v] - (double)q[v]));
            }
            worst = fmax(worst, off / most);
            *same_bits &= memcmp(p, q, (size_t)vocab * 4) == 0;
        }
    }
    return worst;
}

/* Every form of the same folder against the GGUF file, in F32: all bits. */
static void test_floats(void)
{
    static const hm_options forms[] = {{.bf16 = false}, {.odd = true}, {.pairs = true}};
    model *m = open_gguf(MICRO);
    cluster *want = run(m, 1);
    for (size_t i = 0; i < sizeof(forms) / sizeof(forms[0]); i++) {
        hm_folder f;
        model *h = open_folder(&f, m, &forms[i]);
        for (int n_shards = 1; n_shards < 4; n_shards += 2) {
            bool same;
            cluster *got = run(h, n_shards);
            compare(want, got, m->shape.vocab, &same);
            CHECK(same);
            cluster_close(got);
        }
        model_close(h);
        hm_free(&f);
    }
    cluster_close(want);
    model_close(m);
}

static void test_bf16(void)
{
    hm_folder f;
    bool same;
    model *m = open_gguf(MICRO), *h = open_folder(&f, m, &(hm_options){.bf16 = true});
    cluster *a = run(m, 1), *b = run(h, 1), *c = run(h, 3);
    double off = compare(a, b, m->shape.vocab, &same);
    printf("    BF16 against F32: logits off by %.2e\n", off);
    CHECK(off < 0.02 && off > 0);
    compare(b, c, m->shape.vocab, &same);
    CHECK(same);
    cluster_close(a);
    cluster_close(b);
    cluster_close(c);
    model_close(h);
    model_close(m);
    hm_free(&f);
}

/* Both versions of the zero points, from odd addresses too, against the values they stand for. */
static void test_gptq(void)
{
    static const hm_options forms[] = {{.gptq = true}, {.gptq = true, .v2 = true, .odd = true}};
    hm_folder plain, f[2];
    bool same;
    model *m = open_gguf(DEMO), *h[2];
    model *p = open_folder(&plain, m, &(hm_options){.gptq = true, .plain = true});
    cluster *want = run(p, 1), *got[2];
    for (int i = 0; i < 2; i++) {
        h[i] = open_folder(&f[i], m, &forms[i]);
        CHECK_INT(h[i]->layers[0].q->type, KERN_GPTQ4);
        CHECK_INT(h[i]->layers[0].down_exps->type, KERN_GPTQ4);
        CHECK(h[i]->output == h[i]->token_embd);
        got[i] = run(h[i], 1 + 2 * i);
    }
    double off = compare(want, got[0], m->shape.vocab, &same);
    printf("    GPTQ against its values in F32: logits off by %.2e\n", off);
    CHECK(off < 0.02 && off > 0);
    compare(got[0], got[1], m->shape.vocab, &same);
    CHECK(same);
    CHECK(h[0]->digest != h[1]->digest && h[0]->digest != p->digest);
    for (int i = 0; i < 2; i++) {
        cluster_close(got[i]);
        model_close(h[i]);
        hm_free(&f[i]);
    }
    cluster_close(want);
    model_close(p);
    hm_free(&plain);
    model_close(m);
}

/* Another training of the same model, nothing else being different, is another model. */
static void test_digest(void)
{
    hm_folder f, g;
    ep_err err = {{0}};
    model *m = open_gguf(MICRO), *a = open_folder(&f, m, &(hm_options){.bf16 = true});
    model *b = open_folder(&g, m, &(hm_options){.bf16 = true});
    CHECK(a->digest == b->digest);
    model_close(b);
    size_t data = 8 + (size_t)ep_load_le(g.tensors.data, 8);
    for (size_t i = data; i < g.tensors.len; i += 2)
        g.tensors.data[i] ^= 1;
    CHECK_INT(hm_open(&b, &g, &err), EP_OK);
    CHECK(a->digest != b->digest);
    model_close(b);
    model_close(a);
    model_close(m);
    hm_free(&f);
    hm_free(&g);
}

/* ---- packed experts ---- */

static shard *open_shard(const model *m, const model_placement *p, const char *packed)
{
    shard *s = NULL;
    ep_err err = {{0}};
    const shard_options opt = {
        .m = m, .placement = p, .device = "cpu", .packed = packed, .n_threads = 2, .max_rows = 4};
    CHECK_INT(shard_open(&s, &opt, &err), EP_OK);
    if (s == NULL) printf("    %s\n", err.text);
    return s;
}

static void test_packed(void)
{
    char path[128];
    ep_err err = {{0}};
    hm_folder f;
    model *m = open_gguf(DEMO), *h = open_folder(&f, m, &(hm_options){.gptq = true, .bf16 = true});
    model_placement p = {0};
    snprintf(path, sizeof(path), "/tmp/moed-test-hf.%ld", (long)getpid());
    CHECK_INT(shard_cache_write(h, path, 2, NULL, NULL, &err), EP_OK);
    CHECK_INT(model_placement_make(&p, m->shape.n_experts, 1, (const char *const[]){NULL}, 1, &err),
              EP_OK);
    shard *loaded = open_shard(h, &p, NULL), *mapped = open_shard(h, &p, path);
    for (int l = 0; loaded != NULL && mapped != NULL && l < m->shape.n_layers; l++)
        for (int e = 0; e < m->shape.n_experts; e++)
            CHECK(shard_expert_checksum(loaded, l, e) == shard_expert_checksum(mapped, l, e));
    shard_close(loaded);
    shard_close(mapped);
    /* A zero point elsewhere than in the middle is found when the experts are packed. */
    const st_tensor *z = st_find(hf_file(h->folder), "model.layers.2.mlp.experts.5.up_proj.qzeros");
    ((uint8_t *)(uintptr_t)z->data)[3] ^= 1;
    CHECK_INT(shard_cache_write(h, path, 2, NULL, NULL, &err), EP_ERR_UNSUPPORTED);
    CHECK(strstr(err.text, "experts.5.up_proj.qzeros, element 0: asymmetric") != NULL);
    unlink(path);
    model_placement_fini(&p);
    model_close(h);
    model_close(m);
    hm_free(&f);
}

/* ---- tokenizer ---- */

static void same_ids(const model_tokenizer *a, const model_tokenizer *b, const char *s, size_t n)
{
    for (int special = 0; special < 2; special++) {
        int32_t *x = NULL, *y = NULL;
        size_t nx = 0, ny = 0;
        CHECK_INT(model_encode(a, s, n, special, &x, &nx), EP_OK);
        CHECK_INT(model_encode(b, s, n, special, &y, &ny), EP_OK);
        CHECK(nx == ny && (nx == 0 || memcmp(x, y, nx * sizeof(*x)) == 0));
        ep_free(x);
        ep_free(y);
    }
}

static void same_token(const model_tokenizer *a, const model_tokenizer *b, int32_t id)
{
    for (int special = 0; special < 2; special++) {
        ep_buf x = {0}, y = {0};
        CHECK_INT(model_decode(a, id, special, &x), EP_OK);
        CHECK_INT(model_decode(b, id, special, &y), EP_OK);
        CHECK(x.len == y.len && (x.len == 0 || memcmp(x.data, y.data, x.len) == 0));
        ep_buf_fini(&x);
        ep_buf_fini(&y);
    }
    CHECK(model_is_end(a, id) == model_is_end(b, id));
}

/* Every token, the golden texts, and every text of a held-out file. */
static void test_tokenizer(void)
{
    json_error_t error;
    json_t *cases =
        json_load_file(cluster_source_path("tests/golden/tokenizer-cases.json"), 0, &error);
    size_t n_text = 0;
    char *text =
        (char *)cluster_read_file(cluster_source_path("tests/golden/micro-held-out.txt"), &n_text);
    CHECK_INT(json_array_size(cases), 35);
    model *m = open_gguf(DEMO);
    for (int pairs = 0; pairs < 2; pairs++) {
        hm_folder f;
        ep_err err = {{0}};
        model_tokenizer *a = NULL, *b = NULL;
        model *h = open_folder(&f, m, &(hm_options){.pairs = pairs});
        CHECK_INT(model_tokenizer_open(&a, m, &err), EP_OK);
        CHECK_INT(model_tokenizer_open(&b, h, &err), EP_OK);
        if (b == NULL) printf("    %s\n", err.text);
        CHECK_INT(model_n_tokens(a), model_n_tokens(b));
        CHECK(model_bos(a) == model_bos(b) && model_adds_bos(a) == model_adds_bos(b));
        for (int32_t i = 0; i < model_n_tokens(a); i++)
            same_token(a, b, i);
        for (size_t i = 0; i < json_array_size(cases); i++) {
            const char *s = json_string_value(json_object_get(json_array_get(cases, i), "text"));
            same_ids(a, b, s, strlen(s));
        }
        same_ids(a, b, text, n_text);
        model_tokenizer_close(a);
        model_tokenizer_close(b);
        model_close(h);
        hm_free(&f);
    }
    model_close(m);
    free(text);
    json_decref(cases);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"floats", test_floats}, {"bf16", test_bf16},     {"gptq", test_gptq},
        {"digest", test_digest}, {"packed", test_packed}, {"tokenizer", test_tokenizer},
    };
    if (kern_select("auto", NULL) != EP_OK) return 1;
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
