/*
 * What a folder may not say, one change at a time: keys of config.json that mean what is not
 * computed, stages of tokenizer.json that are not done, contradictions; texts cut short and bent;
 * no memory. And what it may say in several ways: ends of a generation, rows without a token.
 */
#include "tests/hf_make.h"
#include "tests/test.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static hm_folder good;

static bool says(const ep_err *err, const char *part)
{
    if (strstr(err->text, part) != NULL) return true;
    printf("    \"%s\" does not say \"%s\"\n", err->text, part);
    return false;
}

static void make_good(const hm_options *o)
{
    char path[4096];
    const char *root = getenv("MOED_SOURCE");
    model *m = NULL;
    ep_err err = {{0}};
    snprintf(path, sizeof(path), "%s/tests/golden/micro-f32.gguf", root != NULL ? root : ".");
    if (model_open(&m, path, &err) != EP_OK) {
        printf("    %s\n", err.text);
        exit(1);
    }
    hm_make(&good, m, o);
    model_close(m);
}

/* Opens model and tokenizer of the good folder with its texts as they stand. */
static ep_status open_all(model **m, model_tokenizer **t, ep_err *err)
{
    *m = NULL;
    *t = NULL;
    ep_status status = hm_open(m, &good, err);
    return status == EP_OK ? model_tokenizer_open(t, *m, err) : status;
}

static ep_status try_all(ep_err *err)
{
    model *m;
    model_tokenizer *t;
    ep_status status = open_all(&m, &t, err);
    model_tokenizer_close(t);
    model_close(m);
    return status;
}

/* ---- one change ---- */

/* Sets the member at "a.b.0.c" to a JSON value, or takes it away (value NULL). */
static void change(json_t *doc, const char *path, const char *value)
{
    char key[64];
    json_t *at = doc;
    for (;;) {
        size_t n = strcspn(path, ".");
        snprintf(key, sizeof(key), "%.*s", (int)n, path);
        if (path[n] == '\0') break;
        at = json_is_array(at) ? json_array_get(at, (size_t)atoi(key)) : json_object_get(at, key);
        path += n + 1;
    }
    json_t *v = value != NULL ? json_loads(value, JSON_DECODE_ANY, NULL) : NULL;
    bool list = json_is_array(at);
    int rc = v == NULL ? json_object_del(at, key)
             : list    ? json_array_set_new(at, (size_t)atoi(key), v)
                       : json_object_set_new(at, key, v);
    if (rc != 0) {
        printf("    cannot change %s to %s\n", key, value != NULL ? value : "nothing");
        exit(1);
    }
}

/* One text of the good folder changed while it is opened. */
static ep_status try_change(hf_text which, const char *path, const char *value, ep_err *err)
{
    st_bytes old = good.texts_bytes[which];
    json_t *doc = json_loadb(old.data, old.size, 0, NULL);
    change(doc, path, value);
    char *text = json_dumps(doc, 0);
    good.texts_bytes[which].data = text;
    good.texts_bytes[which].size = strlen(text);
    ep_status status = try_all(err);
    good.texts_bytes[which] = old;
    free(text);
    json_decref(doc);
    return status;
}

typedef struct edit {
    hf_text which;
    const char *path, *value;
    ep_status status;
    const char *words;
} edit;

#define NO  EP_ERR_UNSUPPORTED
#define BAD EP_ERR_INVALID

static void try_edits(const edit *e, size_t n)
{
    CHECK_INT(try_all(NULL), EP_OK);
    for (size_t i = 0; i < n; i++) {
        ep_err err = {{0}};
        ep_status status = try_change(e[i].which, e[i].path, e[i].value, &err);
        if (status != e[i].status)
            printf("    %s = %s: %s\n", e[i].path, e[i].value != NULL ? e[i].value : "nothing",
                   err.text);
        CHECK_INT(status, e[i].status);
        CHECK(says(&err, e[i].words));
        CHECK(e[i].status == EP_OK || says(&err, hf_text_names[e[i].which]));
    }
}

static const edit config_edits[] = {
    {HF_CONFIG, "model_type", "\"mixtral\"", NO, "model_type mixtral is not implemented"},
    {HF_CONFIG, "model_type", NULL, NO, "model_type (none)"},
    {HF_CONFIG, "architectures", "[\"Qwen3MoeForSequenceClassification\"]", NO,
     "only Qwen3MoeForCausalLM"},
    {HF_CONFIG, "architectures", "[]", BAD, "architectures is empty"},
    {HF_CONFIG, "architectures", NULL, EP_OK, ""},
    {HF_CONFIG, "hidden_act", "\"gelu\"", NO, "hidden_act gelu"},
    {HF_CONFIG, "hidden_act", "\"a\\u001bb\"", NO, "hidden_act a?b is not implemented"},
    {HF_CONFIG, "attention_bias", "true", NO, "attention_bias true"},
    {HF_CONFIG, "attention_bias", "0", BAD, "attention_bias is neither true nor false"},
    {HF_CONFIG, "use_sliding_window", "true", NO, "a sliding window"},
    {HF_CONFIG, "sliding_window", "4096", EP_OK, ""}, /* not in use */
    {HF_CONFIG, "layer_types", "[\"full_attention\",\"sliding_attention\"]", NO, "layer 1 is"},
    {HF_CONFIG, "layer_types", "[\"full_attention\"]", EP_OK, ""},
    {HF_CONFIG, "decoder_sparse_step", "2", NO, "layers without experts"},
    {HF_CONFIG, "mlp_only_layers", "[0]", NO, "layers without experts"},
    {HF_CONFIG, "mlp_only_layers", "null", EP_OK, ""},
    {HF_CONFIG, "mlp_only_layers", "3", BAD, "mlp_only_layers is no list"},
    {HF_CONFIG, "layer_types", "\"full_attention\"", BAD, "layer_types is no list"},
    {HF_CONFIG, "shared_expert_intermediate_size", "64", NO, "a shared expert"},
    {HF_CONFIG, "num_nextn_predict_layers", "1", NO, "multi-token prediction"},
    {HF_CONFIG, "rope_scaling", "{\"rope_type\":\"yarn\",\"factor\":4}", NO,
     "rope_scaling of type yarn"},
    {HF_CONFIG, "rope_scaling", "{\"type\":\"linear\",\"factor\":2}", NO, "of type linear"},
    {HF_CONFIG, "rope_scaling", "{\"factor\":2}", NO, "of type (none)"},
    {HF_CONFIG, "rope_scaling", "[]", BAD, "rope_scaling is no object"},
    {HF_CONFIG, "rope_scaling", "{\"rope_type\":\"default\"}", EP_OK, ""},
    {HF_CONFIG, "rope_parameters", "{\"rope_theta\":5000,\"rope_type\":\"default\"}", EP_OK, ""},
    {HF_CONFIG, "rope_parameters", "{\"rope_type\":\"llama3\"}", NO, "of type llama3"},
    {HF_CONFIG, "partial_rotary_factor", "0.5", NO, "partial_rotary_factor"},
    {HF_CONFIG, "rope_theta", "\"x\"", BAD, "rope_theta is no number"},
    {HF_CONFIG, "rope_theta", "0", BAD, "rope_theta is 0, expected 1 to"},
    {HF_CONFIG, "rms_norm_eps", "0", BAD, "rms_norm_eps is 0"},
    {HF_CONFIG, "num_hidden_layers", NULL, BAD, "num_hidden_layers is missing"},
    {HF_CONFIG, "num_hidden_layers", "0", BAD, "num_hidden_layers is 0, expected 1 to 4096"},
    {HF_CONFIG, "num_hidden_layers", "-5", BAD, "num_hidden_layers is -5"},
    {HF_CONFIG, "num_hidden_layers", "2.0", BAD, "num_hidden_layers is no whole number"},
    {HF_CONFIG, "num_experts", "1000000000", BAD, "num_experts is 1000000000"},
    {HF_CONFIG, "num_experts", NULL, BAD, "num_experts is missing"},
    {HF_CONFIG, "num_local_experts", "10", EP_OK, ""},
    {HF_CONFIG, "num_local_experts", "11", BAD, "num_experts is 10, but num_local_experts 11"},
    {HF_CONFIG, "num_experts_per_tok", "11", BAD, "11 experts used of 10"},
    {HF_CONFIG, "num_key_value_heads", NULL, BAD, "num_key_value_heads is missing"},
    {HF_CONFIG, "num_key_value_heads", "4", BAD, "6 heads do not divide among 4"},
    {HF_CONFIG, "num_attention_heads", "16777216", BAD, "expected 1 to 65536"},
    {HF_CONFIG, "head_dim", "65537", BAD, "head_dim is 65537, expected 1 to 65536"},
    {HF_CONFIG, "head_dim", "15", BAD, "rope over 15 elements"},
    {HF_CONFIG, "moe_intermediate_size", "40", BAD, "must be multiples of 16"},
    {HF_CONFIG, "vocab_size", "2049", BAD, ""},
    {HF_CONFIG, "max_position_embeddings", NULL, BAD, "max_position_embeddings is missing"},
    {HF_CONFIG, "quantization_config", "{\"quant_method\":\"awq\"}", NO, "quant_method awq"},
    {HF_CONFIG, "quantization_config", "{\"quant_method\":\"fp8\"}", NO, "quant_method fp8"},
};

static void test_config(void)
{
    make_good(&(hm_options){0});
    good.texts_bytes[HF_TOKENIZER].size = 0; /* the model alone: config.json has the last word */
    good.texts_bytes[HF_TOKENIZER].data = NULL;
    for (size_t i = 0; i < sizeof(config_edits) / sizeof(config_edits[0]); i++) {
        const edit *e = &config_edits[i];
        ep_err err = {{0}};
        ep_status status = try_change(e->which, e->path, e->value, &err);
        if (e->status == EP_OK) {
            CHECK_INT(status, EP_ERR_INVALID);
            CHECK(says(&err, "tokenizer.json: it is missing"));
            continue;
        }
        if (status != e->status) printf("    %s: %s\n", e->path, err.text);
        CHECK_INT(status, e->status);
        CHECK(says(&err, e->words));
        CHECK(e->words[0] == '\0' || says(&err, "memory/config.json: "));
    }
    hm_free(&good);
}

/* Numbers of experts as transformers 5 writes them. */
static void test_local_experts(void)
{
    make_good(&(hm_options){0});
    st_bytes *b = &good.texts_bytes[HF_CONFIG];
    json_t *doc = json_loadb(b->data, b->size, 0, NULL);
    change(doc, "num_experts", NULL);
    change(doc, "num_local_experts", "10");
    char *text = json_dumps(doc, 0);
    *b = (st_bytes){b->name, text, strlen(text)};
    ep_err why = {{0}};
    CHECK_INT(try_all(&why), EP_OK);
    CHECK_INT(try_change(HF_CONFIG, "num_local_experts", "0", &why), EP_ERR_INVALID);
    CHECK(says(&why, "config.json: num_local_experts is 0, expected 1 to 4096"));
    free(text);
    json_decref(doc);
    hm_free(&good);
}

#define SPLIT "pre_tokenizer.pretokenizers.0."
#define BYTES "pre_tokenizer.pretokenizers.1."

/* Whole numbers that fit nowhere refuse a text only where one that fits is needed. */
static void test_numbers(void)
{
    static const struct {
        const char *text;
        bool whole;
        double real;
    } cases[] = {
        {"9223372036854775807", true, 9223372036854775807.0},
        {"9223372036854775808", false, 9223372036854775808.0},
        {"-9223372036854775808", true, -9223372036854775808.0},
        {"-9223372036854775809", false, -9223372036854775808.0},
        {"1000000000000000019884624838656", false, 1e30},
        {"0.12345678901234567890123", false, 0.12345678901234567890123},
        {"12345678901234567890.5E0", false, 12345678901234567890.5},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char text[256];
        int n = snprintf(text, sizeof(text), "{\"1\\\"2\": [18446744073709551616], \"x\": %s}",
                         cases[i].text);
        model_json *doc = NULL;
        const model_json *v;
        ep_err err = {{0}};
        int64_t whole = 0;
        double real = 0;
        CHECK_INT(model_json_parse(&doc, text, (size_t)n, "t", &err), EP_OK);
        CHECK_INT(model_json_size(doc), 2);
        v = model_json_member(doc, "x");
        CHECK(model_json_int(v, &whole) == cases[i].whole && model_json_real(v, &real));
        CHECK(fabs(real - cases[i].real) <= fabs(cases[i].real) * 4e-16);
        CHECK(!cases[i].whole || whole == strtoll(cases[i].text, NULL, 10));
        model_json_free(doc);
    }
    static const char bad[] = "{\"99999999999999999999\": 99999999999999999999,\n \"a\": 1e999}";
    model_json *doc = NULL;
    ep_err err = {{0}};
    CHECK_INT(model_json_parse(&doc, bad, strlen(bad), "t", &err), EP_ERR_INVALID);
    CHECK(says(&err, "t: line 2, column 11: real number overflow"));
    ep_alloc_fail_at(1);
    CHECK_INT(model_json_parse(&doc, bad, strlen(bad), "t", &err), EP_ERR_NOMEM);
    ep_alloc_fail_at(0);
    CHECK(says(&err, "t: no memory"));
    make_good(&(hm_options){0});
    st_bytes *b = &good.texts_bytes[HF_TOKENIZER_CONFIG];
    static const char limit[] = "{\"model_max_length\": 1000000000000000019884624838656}";
    *b = (st_bytes){b->name, limit, strlen(limit)};
    CHECK_INT(try_all(&err), EP_OK);
    hm_free(&good);
}

static void test_objects(void)
{
    make_good(&(hm_options){0});
    for (int i = HF_GENERATION; i < HF_N_TEXTS; i++) {
        ep_err err = {{0}};
        hf_text which = (hf_text)i;
        st_bytes old = good.texts_bytes[which];
        good.texts_bytes[which] = (st_bytes){old.name, "[1]", 3};
        CHECK_INT(try_all(&err), EP_ERR_INVALID);
        CHECK(says(&err, hf_text_names[which]));
        good.texts_bytes[which] = old;
    }
    hm_free(&good);
}

static const edit tokenizer_edits[] = {
    {HF_TOKENIZER, "normalizer", "null", EP_OK, ""},
    {HF_TOKENIZER, "normalizer", "{\"type\":\"NFKC\"}", NO, "normalizer of type NFKC"},
    {HF_TOKENIZER, "normalizer", "{\"type\":7}", BAD, "type is no text"},
    {HF_TOKENIZER, "pre_tokenizer", "null", NO, "pre_tokenizer of type (none)"},
    {HF_TOKENIZER, "pre_tokenizer", "{\"type\":\"Metaspace\"}", NO, "of type Metaspace"},
    {HF_TOKENIZER, "pre_tokenizer", "{\"type\":\"Sequence\",\"pretokenizers\":[]}", NO,
     "only a Sequence of Split and ByteLevel"},
    {HF_TOKENIZER, SPLIT "pattern", "{\"Regex\":\"\\\\s+\"}", NO, "the pattern \"\\s+\""},
    {HF_TOKENIZER, SPLIT "pattern", "{\"String\":\" \"}", NO, "the pattern \"\""},
    {HF_TOKENIZER, SPLIT "behavior", "\"Removed\"", NO, "behavior Removed"},
    {HF_TOKENIZER, SPLIT "invert", "true", NO, "inverted"},
    {HF_TOKENIZER, BYTES "add_prefix_space", "true", NO, "add_prefix_space"},
    {HF_TOKENIZER, BYTES "use_regex", NULL, NO, "use_regex"},
    {HF_TOKENIZER, "post_processor", "null", EP_OK, ""},
    {HF_TOKENIZER, "post_processor", "{\"type\":\"TemplateProcessing\"}", NO,
     "post_processor of type TemplateProcessing"},
    {HF_TOKENIZER, "decoder", "null", NO, "decoder of type (none)"},
    {HF_TOKENIZER, "decoder", "{\"type\":\"Fuse\"}", NO, "decoder of type Fuse"},
    {HF_TOKENIZER, "model", "null", BAD, "model.vocab is missing"},
    {HF_TOKENIZER, "model.type", "\"Unigram\"", NO, "model of type Unigram"},
    {HF_TOKENIZER, "model.byte_fallback", "true", NO, "byte_fallback"},
    {HF_TOKENIZER, "model.ignore_merges", "true", NO, "ignore_merges"},
    {HF_TOKENIZER, "model.dropout", "0.1", NO, "dropout"},
    {HF_TOKENIZER, "model.continuing_subword_prefix", "\"##\"", NO, "continuing_subword"},
    {HF_TOKENIZER, "model.end_of_word_suffix", "\"</w>\"", NO, "end_of_word_suffix"},
    {HF_TOKENIZER, "model.vocab", "[]", BAD, "model.vocab is missing or no object"},
    {HF_TOKENIZER, "model.vocab", "{}", BAD, "no token for byte 0x00"},
    {HF_TOKENIZER, "model.vocab.a", NULL, BAD, "no token for byte 0x61"},
    {HF_TOKENIZER, "model.vocab.a", "\"1\"", BAD, "the id of \"a\" is no whole number"},
    {HF_TOKENIZER, "model.vocab.a", "98", BAD, "have the same id"},
    {HF_TOKENIZER, "model.vocab.a", "-1", BAD, "token \"a\" has id -1, expected 0 to 2047"},
    {HF_TOKENIZER, "model.vocab.new", "2048", BAD, "token \"new\" has id 2048"},
    {HF_TOKENIZER, "model.merges", "{}", BAD, "model.merges is missing or no list"},
    {HF_TOKENIZER, "model.merges", "[]", BAD, "model.merges is missing or empty"},
    {HF_TOKENIZER, "model.merges.3", "7", BAD, "entry 3 is not two texts"},
    {HF_TOKENIZER, "model.merges.3", "\"ab\"", BAD, "entry 3 is not two texts"},
    {HF_TOKENIZER, "model.merges.3", "[\"a\"]", BAD, "entry 3 is not two texts"},
    {HF_TOKENIZER, "model.merges.3", "[\"a\",\"b\",\"c\"]", BAD, "entry 3 is not two texts"},
    {HF_TOKENIZER, "model.merges.3", "\"a \\u0120zq\"", BAD, "is no plain token"},
    {HF_TOKENIZER, "added_tokens.0.lstrip", "true", NO, "lstrip of"},
    {HF_TOKENIZER, "added_tokens.0.content", "\"\"", BAD, "entry 0 has no text"},
    {HF_TOKENIZER, "added_tokens.0.content", "\"a\"", BAD, "contradicts another token"},
    {HF_TOKENIZER, "added_tokens.0.id", "3", BAD, "contradicts another token"},
    {HF_TOKENIZER, "added_tokens.0.id", "99999", BAD, "has id 99999"},
    {HF_TOKENIZER, "added_tokens.0", "7", BAD, "added_tokens: entry 0 has no text"},
    {HF_TOKENIZER, "added_tokens", "\"x\"", BAD, "added_tokens is no list"},
    {HF_TOKENIZER_CONFIG, "added_tokens_decoder", "{\"3\":{\"content\":\"<x>\"}}", BAD,
     "\"<x>\" is not token 3 of tokenizer.json"},
    {HF_GENERATION, "eos_token_id", "2048", BAD, "eos_token_id is no token"},
    {HF_GENERATION, "eos_token_id", "[2045,-1]", BAD, "eos_token_id is no token"},
    {HF_GENERATION, "eos_token_id", "\"x\"", BAD, "eos_token_id is no token"},
    {HF_TOKENIZER_CONFIG, "eos_token", "\"nobody\"", BAD, "eos_token \"nobody\" is no token"},
    {HF_TOKENIZER_CONFIG, "eos_token", "7", BAD, "is no token"},
    {HF_TOKENIZER_CONFIG, "add_bos_token", "true", BAD, "there is no bos_token"},
    {HF_TOKENIZER_CONFIG, "add_bos_token", "1", BAD, "neither true nor false"},
    {HF_TOKENIZER_CONFIG, "added_tokens_decoder", "[]", BAD, "added_tokens_decoder is no object"},
    {HF_TOKENIZER_CONFIG, "added_tokens_decoder", "{\"x\":{\"content\":\"\"}}", BAD,
     "is not token x of"},
    {HF_TOKENIZER_CONFIG, "add_eos_token", "true", NO, "add_eos_token"},
};

static void test_tokenizer(void)
{
    make_good(&(hm_options){0});
    try_edits(tokenizer_edits, sizeof(tokenizer_edits) / sizeof(tokenizer_edits[0]));
    hm_free(&good);
}

/* ---- ends, and rows without a token ---- */

static void test_ends(void)
{
    static const struct {
        const char *generation, *config, *tokenizer;
        int32_t ends[3];
    } cases[] = {
        {"{\"eos_token_id\":[7,9]}", "{\"eos_token_id\":11}", "{}", {7, 9, -1}},
        {NULL, "{\"eos_token_id\":11}", NULL, {11, -1, -1}},
        {"{}", "{\"eos_token_id\":11}", "{\"eos_token\":{\"content\":\"b\"}}", {11, 'B', -1}},
        {"{\"eos_token_id\":7}", "{}", "{\"eos_token\":\"b\",\"bos_token\":\"a\"}", {7, 'B', -1}},
    };
    make_good(&(hm_options){0});
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        model_json *texts[HF_N_TEXTS] = {NULL};
        const char *say[HF_N_TEXTS] = {[HF_GENERATION] = cases[i].generation,
                                       [HF_CONFIG] = cases[i].config,
                                       [HF_TOKENIZER_CONFIG] = cases[i].tokenizer};
        ep_err err = {{0}};
        model_tokenizer *t = NULL;
        int32_t *b = NULL;
        size_t n = 0;
        for (int k = 0; k < HF_N_TEXTS; k++)
            if (say[k] != NULL)
                CHECK_INT(model_json_parse(&texts[k], say[k], strlen(say[k]), "x", &err), EP_OK);
        const st_bytes *text = &good.texts_bytes[HF_TOKENIZER];
        CHECK_INT(model_json_parse(&texts[HF_TOKENIZER], text->data, text->size, "x", &err), EP_OK);
        CHECK_INT(hf_tokenizer_read(&t, texts, "x", 2000, NULL), EP_ERR_INVALID);
        CHECK_INT(hf_tokenizer_read(&t, texts, "x", 2100, &err), EP_OK);
        if (t == NULL) printf("    %s\n", err.text);
        CHECK_INT(model_encode(t, "b", 1, false, &b, &n), EP_OK);
        for (int k = 0; k < 3 && cases[i].ends[k] >= 0; k++)
            CHECK(model_is_end(t, cases[i].ends[k] == 'B' ? b[0] : cases[i].ends[k]));
        CHECK(!model_is_end(t, 12));
        CHECK(model_is_end(t, 11) == (cases[i].ends[0] == 11));
        CHECK((model_bos(t) >= 0) == (i == 3) && !model_adds_bos(t));
        ep_buf out = {0};
        CHECK_INT(model_n_tokens(t), 2100);
        CHECK_INT(model_decode(t, 2099, true, &out), EP_OK);
        CHECK_INT(out.len, 0);
        ep_buf_fini(&out);
        ep_free(b);
        model_tokenizer_close(t);
        for (int k = 0; k < HF_N_TEXTS; k++)
            model_json_free(texts[k]);
    }
    hm_free(&good);
}

/* ---- tensors ---- */

/* Replaces a text of the header by one of the same length. */
static ep_status try_header(const char *from, const char *to, ep_err *err)
{
    uint8_t *data = good.tensors.data;
    size_t n = strlen(from);
    char *at = memmem(data, good.tensors.len, from, n);
    CHECK(at != NULL && strlen(to) == n);
    if (at == NULL) return EP_OK;
    memcpy(at, to, n);
    ep_status status = try_all(err);
    memcpy(at, from, n);
    return status;
}

/* A tied head that is there nevertheless is the one that counts. */
static void test_own_head(void)
{
    make_good(&(hm_options){0});
    st_bytes *b = &good.texts_bytes[HF_CONFIG];
    json_t *doc = json_loadb(b->data, b->size, 0, NULL);
    change(doc, "tie_word_embeddings", "true");
    char *text = json_dumps(doc, 0);
    *b = (st_bytes){b->name, text, strlen(text)};
    model *m = NULL;
    ep_err err = {{0}};
    CHECK_INT(hm_open(&m, &good, &err), EP_OK);
    CHECK(m != NULL && m->output != m->token_embd && m->output->data != m->token_embd->data);
    model_close(m);
    CHECK_INT(try_header("lm_head.weight\"", "lm_head.bias\"  ", &err), EP_ERR_INVALID);
    CHECK(says(&err, "lm_head.weight and lm_head.qweight are both missing"));
    free(text);
    json_decref(doc);
    hm_free(&good);
}

#define T(layer, name) "model.layers." #layer "." name "\":{\"dtype\":\"BF16\""
#define F(layer, name) "model.layers." #layer "." name "\":{\"dtype\":\"F16\" "

static void test_tensors(void)
{
    static const struct {
        const char *from, *to;
        ep_status status;
        const char *words;
    } cases[] = {
        {T(1, "mlp.experts.3.up_proj.weight"), F(1, "mlp.experts.3.up_proj.weight"), NO,
         "experts.3.up_proj is F16, that of expert 0 BF16: experts of several types"},
        {T(1, "self_attn.q_proj.weight"), F(1, "self_attn.q_proj.weight"), EP_OK, ""},
        {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.biases", NO,
         "an unknown part of a matrix"},
        {"model.layers.1.input_layernorm.weight", "model.layers.1.input_layernorms.bias_", BAD,
         "input_layernorm.weight is missing"},
        {"model.layers.1.self_attn.k_norm.weight", "model.layers.1.self_attn.k_norm.bias__", NO,
         "a norm with a bias"},
        {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.bias__", NO,
         "a bias of the gate"},
        {"model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.shared_expert____", NO,
         "a shared expert"},
        {"model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.down_proj.weight_", NO,
         "a dense layer"},
        {"model.layers.2.mlp.gate.weight", "model.layers.9.mlp.gate.weight", BAD,
         "num_hidden_layers 3 rules out"},
        {"model.layers.2.input_layernorm.weight", "model.layers.1.self_attn.q_proj.g_idx", NO,
         "q_proj.g_idx beside model.layers.1.self_attn.q_proj.weight"},
        {"model.norm.weight\"", "model.norm.bias\"  ", NO, "a norm with a bias"},
        {"lm_head.weight", "lm_head.wbytes", NO, "an unknown part of a matrix"},
        {"lm_head.weight", "mtp.fc0.weight", NO, "multi-token prediction"},
        {"lm_head.weight", "other0.weight_", BAD, "lm_head.weight and lm_head.qweight are both"},
    };
    make_good(&(hm_options){.bf16 = true});
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        ep_err err = {{0}};
        ep_status status = try_header(cases[i].from, cases[i].to, &err);
        if (status != cases[i].status) printf("    %s: %s\n", cases[i].to, err.text);
        CHECK_INT(status, cases[i].status);
        CHECK(says(&err, cases[i].words));
    }
    hm_free(&good);
}

/* ---- hostile texts, no memory ---- */

/* Cut at many places, and with bytes of the rest bent: refused with a reason, or served. */
static void test_damage(void)
{
    make_good(&(hm_options){.pairs = true});
    for (int which = 0; which < HF_N_TEXTS; which++) {
        st_bytes *b = &good.texts_bytes[which], old = *b;
        if (old.data == NULL) continue;
        size_t step = 1 + old.size / 150;
        int n_refused = 0;
        for (size_t at = 0; at < old.size; at += step) {
            ep_err err = {{0}};
            b->size = at;
            CHECK_INT(try_all(&err), EP_ERR_INVALID);
            CHECK(says(&err, hf_text_names[which]));
            b->size = old.size;
            uint8_t *byte = good.texts[which].data + at, was = *byte;
            *byte = (uint8_t)("\"{0]\\ \xff"[at / step % 7]);
            err.text[0] = '\0';
            ep_status status = try_all(&err);
            CHECK(status == EP_OK || err.text[0] != '\0');
            n_refused += status != EP_OK;
            *byte = was;
        }
        CHECK(n_refused > 0);
    }
    hm_free(&good);
}

/* Each allocation fails once; those of the JSON library are not counted. */
static void test_memory(void)
{
    ep_status status = EP_ERR_NOMEM;
    int n = 0;
    make_good(&(hm_options){0});
    for (; status != EP_OK && n < 400; n++) {
        ep_err err = {{0}};
        ep_alloc_fail_at(n + 1);
        status = try_all(&err);
        ep_alloc_fail_at(0);
        CHECK(status == EP_OK || (status == EP_ERR_NOMEM && err.text[0] != '\0'));
    }
    CHECK(status == EP_OK && n > 30);
    hm_free(&good);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"config", test_config},     {"local experts", test_local_experts},
        {"own head", test_own_head}, {"numbers", test_numbers},
        {"objects", test_objects},   {"tokenizer", test_tokenizer},
        {"ends", test_ends},         {"tensors", test_tensors},
        {"damage", test_damage},     {"memory", test_memory},
    };
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
