/*
 * A model from a file: the shape and tensors that a right file gives, defaults of absent keys, and
 * a refusal by name for each thing that is missing, misshapen or not served. And the digest that
 * ranks compare.
 */
#include "tests/unit/model_fixture.h"

static ep_status open_bytes(const ep_buf *b, model **m, ep_err *err)
{
    model_file *f = NULL;
    memset(err, 0, sizeof(*err));
    ep_status status = model_file_open_bytes(&f, b->data, b->len, err);
    return status == EP_OK ? model_open_file(m, f, err) : status;
}

/* Opens the file with the change; prints why when it does not open. */
static model *opened(const change *c, ep_buf *b)
{
    model *m = NULL;
    ep_err err;
    *b = make(c);
    CHECK_INT(open_bytes(b, &m, &err), EP_OK);
    if (m == NULL) printf("    %s: %s\n", c != NULL ? c->label : "unchanged", err.text);
    return m;
}

static void refused(const change *c)
{
    ep_buf b = make(c);
    model *m = NULL;
    ep_err err;
    ep_status status = open_bytes(&b, &m, &err);
    if (status != c->status || strstr(err.text, c->says) == NULL) {
        CHECK(false);
        printf("    %s: got %s \"%s\", expected %s and \"%s\"\n", c->label, ep_status_name(status),
               err.text, ep_status_name(c->status), c->says);
    }
    model_close(m);
    ep_buf_fini(&b);
}

/* ---- what is right ------------------------------------------------------------------------------
 */

static void test_resolves(void)
{
    ep_buf b;
    model *m = opened(NULL, &b);
    if (m == NULL) return;
    const model_shape *s = &m->shape;
    CHECK_STR(s->arch, "qwen3moe");
    CHECK_STR(s->name, "small?test");
    CHECK_INT(s->n_layers, LAYERS);
    CHECK_INT(s->hidden, HIDDEN);
    CHECK_INT(s->n_heads, HEADS);
    CHECK_INT(s->n_kv_heads, KV);
    CHECK_INT(s->head_dim, HEAD);
    CHECK_INT(s->rope_dim, HEAD);
    CHECK_INT(s->n_experts, EXPERTS);
    CHECK_INT(s->top_k, 2);
    CHECK_INT(s->inter, INTER);
    CHECK_INT(s->vocab, VOCAB);
    CHECK_INT(s->context, 512);
    CHECK(s->rope_base == 1e6 && s->rms_eps == 1e-6f && s->renormalise);
    CHECK(m->output != m->token_embd);
    for (int l = 0; l < LAYERS; l++) {
        const model_layer *y = &m->layers[l];
        const model_tensor *t[] = {y->attn_norm, y->q,         y->k,       y->v,
                                   y->o,         y->q_norm,    y->k_norm,  y->ffn_norm,
                                   y->gate_inp,  y->gate_exps, y->up_exps, y->down_exps};
        static const char *const names[] = {"attn_norm",     "attn_q",      "attn_k",
                                            "attn_v",        "attn_output", "attn_q_norm",
                                            "attn_k_norm",   "ffn_norm",    "ffn_gate_inp",
                                            "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"};
        for (int i = 0; i < 12; i++) {
            char want[64];
            snprintf(want, sizeof(want), "blk.%d.%s.weight", l, names[i]);
            CHECK_STR(t[i]->name, want);
        }
    }
    for (int role = 0; role < 3; role++) {
        const model_tensor *t = role == 0   ? m->layers[1].gate_exps
                                : role == 1 ? m->layers[1].up_exps
                                            : m->layers[1].down_exps;
        const uint8_t *rows = NULL;
        ep_buf made = {0};
        CHECK(model_experts(m, 1, role) == t);
        CHECK_INT(model_rows(m, t, 3, &made, &rows, NULL), EP_OK);
        CHECK(rows == t->data + 3 * (size_t)HIDDEN * INTER * 4 && made.data == NULL);
        CHECK_INT(model_rows_bytes(t), HIDDEN * INTER * 4);
    }
    model_close(m);
    ep_buf_fini(&b);
}

static void test_defaults(void)
{
    static const change drops[] = {
        {.label = "tied", .drop = "output.weight"},
        {.label = "rope base", .drop = "qwen3moe.rope.freq_base"},
        {.label = "key length", .drop = "qwen3moe.attention.key_length"},
        {.label = "value length", .drop = "qwen3moe.attention.value_length"},
    };
    for (int i = 0; i < 4; i++) {
        ep_buf b;
        model *m = opened(&drops[i], &b);
        if (m == NULL) continue;
        CHECK_INT(m->output == m->token_embd, i == 0);
        CHECK(m->shape.rope_base == (i == 1 ? 10000.0 : 1e6));
        CHECK_INT(m->shape.head_dim, HIDDEN / HEADS);
        model_close(m);
        ep_buf_fini(&b);
    }
    static const change neutral[] = {
        {.label = "no scaling", .key = "qwen3moe.rope.scaling.type", .kind = 8, .text = "none"},
        {.label = "linear by 1", .key = "qwen3moe.rope.scaling.factor", .kind = 6, .number = 1},
        {.label = "softmax", .key = "qwen3moe.expert_gating_func", .kind = 4, .number = 1},
        {.label = "weights by 1", .key = "qwen3moe.expert_weights_scale", .kind = 6, .number = 1},
        {.label = "weights by 0", .key = "qwen3moe.expert_weights_scale", .kind = 6, .number = 0},
        {.label = "no window", .key = "qwen3moe.attention.sliding_window", .kind = 4},
        {.label = "no shared", .key = "qwen3moe.expert_shared_count", .kind = 4},
        {.label = "vocabulary", .key = "qwen3moe.vocab_size", .kind = 10, .number = VOCAB},
        {.label = "causal", .key = "qwen3moe.attention.causal", .kind = 7, .number = 1},
        {.label = "stranger", .tensor = "something.else", .ne = {8}},
        {.label = "stranger in a layer", .tensor = "blk.0.something.else", .ne = {8}},
    };
    for (size_t i = 0; i < sizeof(neutral) / sizeof(neutral[0]); i++) {
        ep_buf b;
        model_close(opened(&neutral[i], &b));
        ep_buf_fini(&b);
    }
    ep_buf b;
    change raw = {.label = "raw", .key = "qwen3moe.expert_weights_norm", .kind = 7, .number = 0};
    model *m = opened(&raw, &b);
    if (m != NULL) CHECK(!m->shape.renormalise);
    model_close(m);
    ep_buf_fini(&b);
}

static void test_mixes_types(void)
{
    static const struct {
        int type;
        const char *name;
    } types[] = {{KERN_F16, "F16"},
                 {KERN_BF16, "BF16"},
                 {KERN_Q8_0, "Q8_0"},
                 {KERN_Q4_0, "Q4_0"},
                 {KERN_Q5_0, "Q5_0"}};
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        ep_buf b;
        change c = {.label = types[i].name,
                    .tensor = "blk.1.ffn_up_exps.weight",
                    .type = types[i].type,
                    .ne = {HIDDEN, INTER, EXPERTS}};
        model *m = opened(&c, &b);
        if (m == NULL) continue;
        const model_tensor *t = m->layers[1].up_exps;
        const uint8_t *rows = NULL;
        CHECK_INT(t->type, types[i].type);
        CHECK_INT(m->layers[0].up_exps->type, KERN_F32);
        CHECK_INT(model_rows(m, t, 2, NULL, &rows, NULL), EP_OK);
        CHECK_INT(model_rows_bytes(t), kern_type_row_bytes(types[i].type, HIDDEN) * INTER);
        CHECK(rows == t->data + 2 * model_rows_bytes(t));
        model_close(m);
        ep_buf_fini(&b);
    }
}

/* ---- what is refused ----------------------------------------------------------------------------
 */

#define U  EP_ERR_UNSUPPORTED
#define IV EP_ERR_INVALID
#define A  "qwen3moe."

static void test_refuses_keys(void)
{
    static const char *const required[] = {A "block_count",
                                           A "embedding_length",
                                           A "context_length",
                                           A "expert_count",
                                           A "expert_used_count",
                                           A "attention.head_count",
                                           A "expert_feed_forward_length",
                                           A "attention.layer_norm_rms_epsilon"};
    for (size_t i = 0; i < sizeof(required) / sizeof(required[0]); i++)
        refused(
            &(change){.label = "required", .drop = required[i], .status = IV, .says = required[i]});
    static const change bad[] = {
        {.key = "general.architecture", .kind = 8, .text = "llama", .status = U, .says = "'llama'"},
        {.drop = "general.architecture", .status = U, .says = "architecture"},
        {.key = A "block_count", .kind = 4, .number = 0, .status = IV, .says = "block_count is 0"},
        {.key = A "block_count", .kind = 5, .number = -1, .status = IV, .says = "negative"},
        {.key = A "block_count", .kind = 8, .text = "2", .status = IV, .says = "of kind string"},
        {.key = A "embedding_length",
         .kind = 10,
         .number = 4294967328.0,
         .status = IV,
         .says = "4294967328"},
        {.key = A "attention.head_count_kv", .kind = 4, .number = 3, .status = IV, .says = "heads"},
        {.key = A "attention.head_count_kv",
         .kind = 4,
         .number = 0,
         .status = IV,
         .says = "head_count_kv"},
        {.key = A "attention.value_length",
         .kind = 4,
         .number = 8,
         .status = IV,
         .says = "values of 8"},
        {.key = A "rope.dimension_count",
         .kind = 4,
         .number = 32,
         .status = IV,
         .says = "rope over 32"},
        {.key = A "rope.dimension_count",
         .kind = 4,
         .number = 7,
         .status = IV,
         .says = "rope over 7"},
        {.key = A "expert_used_count",
         .kind = 4,
         .number = 5,
         .status = IV,
         .says = "5 experts used of 4"},
        {.key = A "expert_used_count", .kind = 4, .number = 33, .status = IV, .says = "1 to 32"},
        {.key = A "expert_feed_forward_length",
         .kind = 4,
         .number = 40,
         .status = IV,
         .says = "multiples of 16"},
        {.key = A "attention.layer_norm_rms_epsilon",
         .kind = 6,
         .number = -1,
         .status = IV,
         .says = "epsilon is -1"},
        {.key = A "rope.scaling.type",
         .kind = 8,
         .text = "yarn",
         .status = U,
         .says = "rope scaling 'yarn'"},
        {.key = A "rope.scaling.type",
         .kind = 8,
         .text = "longrope",
         .status = U,
         .says = "'longrope'"},
        {.key = A "rope.scaling.factor",
         .kind = 6,
         .number = 4,
         .status = U,
         .says = "linear rope scaling"},
        {.key = A "rope.scale_linear",
         .kind = 6,
         .number = 2,
         .status = U,
         .says = "linear rope scaling"},
        {.key = A "expert_gating_func",
         .kind = 4,
         .number = 2,
         .status = U,
         .says = "another gate than softmax"},
        {.key = A "expert_shared_count",
         .kind = 4,
         .number = 1,
         .status = U,
         .says = "a shared expert"},
        {.key = A "expert_group_count",
         .kind = 4,
         .number = 8,
         .status = U,
         .says = "grouped routing"},
        {.key = A "expert_weights_scale",
         .kind = 6,
         .number = 2.5,
         .status = U,
         .says = "scaling of expert weights"},
        {.key = A "expert_weights_scale",
         .kind = 8,
         .text = "2",
         .status = IV,
         .says = "of kind string"},
        {.key = A "expert_weights_norm",
         .kind = 4,
         .number = 1,
         .status = IV,
         .says = "of kind u32"},
        {.key = A "leading_dense_block_count",
         .kind = 4,
         .number = 1,
         .status = U,
         .says = "dense leading layers"},
        {.key = A "nextn_predict_layers",
         .kind = 4,
         .number = 1,
         .status = U,
         .says = "multi-token"},
        {.key = A "attention.sliding_window",
         .kind = 4,
         .number = 128,
         .status = U,
         .says = "a sliding window"},
        {.key = A "attention.causal", .kind = 7, .number = 0, .status = U, .says = "looks ahead"},
        {.key = A "attention.clamp_kqv", .kind = 6, .number = 8, .status = U, .says = "clamping"},
        {.key = A "attn_logit_softcapping",
         .kind = 6,
         .number = 50,
         .status = U,
         .says = "soft-capping"},
        {.key = A "logit_scale",
         .kind = 6,
         .number = 0.5,
         .status = U,
         .says = "scaling of logits"},
        {.key = A "vocab_size",
         .kind = 4,
         .number = 25,
         .status = IV,
         .says = "vocab_size is 25, but token_embd.weight has 24"},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        change c = bad[i];
        c.label = c.key != NULL ? c.key : c.drop;
        refused(&c);
    }
}

static void test_refuses_tensors(void)
{
    ep_buf all = make(NULL);
    model_file *f = NULL;
    CHECK_INT(model_file_open_bytes(&f, all.data, all.len, NULL), EP_OK);
    for (size_t i = 0; f != NULL && i < model_file_n_tensors(f); i++) {
        const char *name = model_file_tensor(f, i)->name;
        char says[128], misfit[160];
        if (strcmp(name, "output.weight") != 0) { /* may be absent */
            snprintf(says, sizeof(says), "%s", name);
            change gone = {.label = name, .drop = name, .status = IV, .says = says};
            refused(&gone);
        }
        snprintf(misfit, sizeof(misfit), "%s has shape [16, 2, 2], expected [", name);
        change odd = {
            .label = name, .tensor = name, .ne = {16, 2, 2}, .status = IV, .says = misfit};
        refused(&odd);
    }
    model_file_close(f);
    ep_buf_fini(&all);
    static const change bad[] = {
        {.drop = "blk.1.attn_k.weight",
         .status = IV,
         .says = "layer 1: tensor blk.1.attn_k.weight [32, 16] is missing"},
        {.tensor = "blk.0.ffn_down_exps.weight",
         .ne = {HIDDEN, INTER, EXPERTS},
         .status = IV,
         .says = "layer 0: tensor blk.0.ffn_down_exps.weight has shape [32, 48, 4], expected [48, "
                 "32, 4]"},
        {.tensor = "blk.1.attn_q.weight",
         .type = 10,
         .ne = {256, 4},
         .status = IV,
         .says = "has shape [256, 4]"},
        {.tensor = "blk.0.attn_norm.weight",
         .type = KERN_F16,
         .ne = {HIDDEN},
         .status = U,
         .says = "blk.0.attn_norm.weight has type F16, expected F32"},
        {.tensor = "blk.1.ffn_down_exps.weight",
         .type = KERN_MXFP4,
         .ne = {INTER, HIDDEN, EXPERTS},
         .status = IV,
         .says = "no multiple of MXFP4's block"},
        {.tensor = "blk.1.ffn_up_exps.weight",
         .type = KERN_MXFP4,
         .ne = {HIDDEN, INTER, EXPERTS},
         .status = U,
         .says = "layer 1: tensor blk.1.ffn_up_exps.weight has type MXFP4 (39), which is not "
                 "implemented"},
        {.tensor = "blk.0.ffn_gate_up_exps.weight",
         .ne = {HIDDEN, 2 * INTER, EXPERTS},
         .status = U,
         .says = "fused gate and up experts"},
        {.tensor = "blk.1.attn_q.bias",
         .ne = {32},
         .status = U,
         .says = "layer 1: tensor blk.1.attn_q.bias: a bias of the query"},
        {.tensor = "blk.1.attn_output.bias",
         .ne = {32},
         .status = U,
         .says = "a bias of the output projection"},
        {.tensor = "blk.0.attn_qkv.weight",
         .ne = {32, 64},
         .status = U,
         .says = "fused query, key and value"},
        {.tensor = "blk.0.attn_sinks.weight", .ne = {2}, .status = U, .says = "attention sinks"},
        {.tensor = "blk.0.post_attention_norm.weight",
         .ne = {32},
         .status = U,
         .says = "a norm after attention"},
        {.tensor = "blk.0.ffn_gate_inp.bias", .ne = {4}, .status = U, .says = "a bias of the gate"},
        {.tensor = "blk.0.exp_probs_b.bias", .ne = {4}, .status = U, .says = "a selection bias"},
        {.tensor = "blk.0.ffn_up_exps.bias",
         .ne = {48, 4},
         .status = U,
         .says = "a bias of the up experts"},
        {.tensor = "blk.0.ffn_up_exps.scale", .ne = {4}, .status = U, .says = "a scale per expert"},
        {.tensor = "blk.0.ffn_up_shexp.weight",
         .ne = {32, 48},
         .status = U,
         .says = "a shared expert"},
        {.tensor = "blk.0.ffn_up.3.weight",
         .ne = {32, 48},
         .status = U,
         .says = "experts as one matrix each"},
        {.tensor = "blk.0.ffn_up.weight", .ne = {32, 48}, .status = U, .says = "a dense layer"},
        {.tensor = "blk.2.attn_q.weight",
         .ne = {32, 32},
         .status = IV,
         .says = "block_count 2 rules out"},
        {.tensor = "blk.2.nextn.eh_proj.weight",
         .ne = {32, 32},
         .status = U,
         .says = "multi-token"},
        {.tensor = "rope_freqs.weight", .ne = {8}, .status = U, .says = "scaled rope frequencies"},
        {.tensor = "output.bias", .ne = {24}, .status = U, .says = "a bias of the output matrix"},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        change c = bad[i];
        c.label = c.tensor != NULL ? c.tensor : c.drop;
        refused(&c);
    }
}

static void test_memory_fails(void)
{
    ep_buf b = make(NULL);
    int n = 0;
    for (;;) {
        ep_err err;
        model *m = NULL;
        ep_alloc_fail_at(++n);
        ep_status status = open_bytes(&b, &m, &err);
        ep_alloc_fail_at(0);
        model_close(m);
        if (status == EP_OK) break;
        CHECK_INT(status, EP_ERR_NOMEM);
        CHECK(m == NULL && err.text[0] != '\0');
        if (n > 100) break;
    }
    CHECK(n > 8 && n <= 100);
    ep_buf_fini(&b);
}

/* Any key, shape, type or offset that differs changes the digest, and so do other weights: packed
 * experts of another training must not be taken for this one's. */
static void test_digest(void)
{
    ep_buf b, other;
    model *m = opened(NULL, &b), *n = opened(NULL, &other);
    if (m == NULL || n == NULL) return;
    CHECK(m->digest == n->digest && m->digest != 0);
    model_close(n);
    ep_buf_fini(&other);
    static const change changes[] = {
        {.label = "key", .key = A "context_length", .kind = 4, .number = 513},
        {.label = "kind", .key = A "context_length", .kind = 10, .number = 512},
        {.label = "tensor", .drop = "output.weight"},
        {.label = "type",
         .tensor = "blk.0.ffn_up_exps.weight",
         .type = KERN_F16,
         .ne = {HIDDEN, INTER, EXPERTS}},
    };
    for (size_t i = 0; i < sizeof(changes) / sizeof(changes[0]); i++) {
        n = opened(&changes[i], &other);
        if (n != NULL) CHECK(n->digest != m->digest);
        model_close(n);
        ep_buf_fini(&other);
    }
    uint64_t first = m->digest;
    model_close(m);
    memset(b.data + b.len - b.len / 4, 0x5a, b.len / 4); /* another training */
    ep_err other_err;
    m = NULL;
    CHECK_INT(open_bytes(&b, &m, &other_err), EP_OK);
    if (m != NULL) CHECK(m->digest != first);
    model_close(m);
    gb_add(&b, "", 1); /* a longer file */
    uint64_t was = 0;
    ep_err err;
    m = NULL;
    CHECK_INT(open_bytes(&b, &m, &err), EP_OK);
    n = opened(NULL, &other);
    if (n != NULL) was = n->digest;
    if (m != NULL) CHECK(m->digest != was);
    model_close(n);
    model_close(m);
    ep_buf_fini(&b);
    ep_buf_fini(&other);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"shape and tensors", test_resolves},
        {"defaults and neutral values", test_defaults},
        {"types mixed freely", test_mixes_types},
        {"keys that are refused", test_refuses_keys},
        {"tensors that are refused", test_refuses_tensors},
        {"every allocation fails once", test_memory_fails},
        {"digest", test_digest},
    };
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
