/*
 * Writes the seeds of the GGUF fuzz target into a folder: a right model with a tokenizer, smaller
 * right files, and one file for each kind of lie. The result depends on nothing, so a second run
 * changes nothing.
 */
#include "tests/unit/model_fixture.h"

static const char *folder;

static void write_seed(const char *name, const void *data, size_t n)
{
    char path[512];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    if (f == NULL || fwrite(data, 1, n, f) != n || fclose(f) != 0) {
        perror(path);
        exit(1);
    }
}

static void write_built(const char *name, gb *g)
{
    ep_buf b = gb_bytes(g);
    write_seed(name, b.data, b.len);
    ep_buf_fini(&b);
    gb_fini(g);
}

/* The 256 byte tokens of byte-level BPE: a printable byte is its own character, the n-th other one
 * character 256 + n; both are two letters of UTF-8 or one. */
static void add_byte_tokens(gb *g)
{
    unsigned others = 256;
    for (unsigned byte = 0; byte < 256; byte++) {
        bool shown = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
        unsigned c = shown ? byte : others++;
        char s[2] = {(char)(0xc0 | c >> 6), (char)(0x80 | (c & 63))};
        if (c < 128) s[0] = (char)c;
        gb_text(&g->keys, s, c < 128 ? 1 : 2);
    }
}

/* The smallest model that opens: one layer, two experts of 16 by 16. Its tokens: "ab" alone, which
 * no tokenizer can be made of, or all bytes and "ab". */
static void write_model(const char *name, int type, bool bytes)
{
    const uint64_t vocab = bytes ? 257 : 1;
    static const struct {
        const char *name;
        uint64_t a, b, c;
    } tensors[] = {
        {"attn_norm", 16, 0, 0},      {"attn_q", 16, 16, 0},      {"attn_k", 16, 16, 0},
        {"attn_v", 16, 16, 0},        {"attn_output", 16, 16, 0}, {"attn_q_norm", 16, 0, 0},
        {"attn_k_norm", 16, 0, 0},    {"ffn_norm", 16, 0, 0},     {"ffn_gate_inp", 16, 2, 0},
        {"ffn_gate_exps", 16, 16, 2}, {"ffn_up_exps", 16, 16, 2}, {"ffn_down_exps", 16, 16, 2}};
    gb g = gb_make();
    gb_str(&g, "general.architecture", "qwen3moe");
    gb_u32(&g, "qwen3moe.block_count", 1);
    gb_u32(&g, "qwen3moe.embedding_length", 16);
    gb_u32(&g, "qwen3moe.context_length", 64);
    gb_u32(&g, "qwen3moe.attention.head_count", 1);
    gb_u32(&g, "qwen3moe.expert_count", 2);
    gb_u32(&g, "qwen3moe.expert_used_count", 1);
    gb_u32(&g, "qwen3moe.expert_feed_forward_length", 16);
    gb_f32(&g, "qwen3moe.attention.layer_norm_rms_epsilon", 1e-6f);
    gb_str(&g, "tokenizer.ggml.model", "gpt2");
    gb_str(&g, "tokenizer.ggml.pre", "qwen2");
    gb_arr(&g, "tokenizer.ggml.tokens", 8, vocab);
    if (bytes) add_byte_tokens(&g);
    gb_text(&g.keys, "ab", 2);
    gb_arr(&g, "tokenizer.ggml.token_type", 5, vocab);
    for (uint64_t i = 0; i < vocab; i++)
        gb_int(&g.keys, 1, 4);
    gb_arr(&g, "tokenizer.ggml.merges", 8, 1);
    gb_text(&g.keys, "a b", 3);
    gb_u32(&g, "tokenizer.ggml.eos_token_id", (uint32_t)vocab - 1);
    add_tensor(&g, "token_embd.weight", type, 16, vocab, 0);
    add_tensor(&g, "output_norm.weight", KERN_F32, 16, 0, 0);
    for (size_t i = 0; i < sizeof(tensors) / sizeof(tensors[0]); i++) {
        char full[64];
        snprintf(full, sizeof(full), "blk.0.%s.weight", tensors[i].name);
        add_tensor(&g, full, tensors[i].b ? type : KERN_F32, tensors[i].a, tensors[i].b,
                   tensors[i].c);
    }
    write_built(name, &g);
}

/* A file with one array "a" of this kind and one tensor. */
static gb small(uint32_t kind, uint64_t n)
{
    gb g = gb_make();
    gb_str(&g, "general.architecture", "qwen3moe");
    gb_arr(&g, "a", kind, n);
    return g;
}

static void write_lies(void)
{
    static const struct {
        const char *name;
        int type;
        uint32_t n_dims;
        uint64_t ne[5], offset;
    } tensors[] = {
        {"type-unknown", 99, 1, {4}, 0},
        {"type-removed", 4, 1, {32}, 0},
        {"type-q2k", 10, 1, {256}, 0},
        {"block-split", 8, 1, {33}, 0},
        {"dims-0", 0, 0, {0}, 0},
        {"dims-5", 0, 5, {1, 1, 1, 1, 1}, 0},
        {"shape-wraps", 0, 2, {1ull << 63, 2}, 0},
        {"shape-zero", 0, 2, {0, 2}, 0},
        {"offset-odd", 0, 1, {1}, 3},
        {"offset-far", 0, 1, {1}, UINT64_MAX - 31},
        {"overlap", 0, 1, {9}, 0},
        {"right", 0, 1, {8}, 0},
    };
    for (size_t i = 0; i < sizeof(tensors) / sizeof(tensors[0]); i++) {
        gb g = gb_make();
        gb_info(&g, "t", tensors[i].type, tensors[i].n_dims, tensors[i].ne, tensors[i].offset);
        gb_info(&g, "z", 0, 1, (uint64_t[]){1}, 32);
        g.data_bytes = 96;
        write_built(tensors[i].name, &g);
    }
    gb g = small(8, 1ull << 60);
    write_built("array-huge", &g);
    g = small(9, 1);
    write_built("array-nested", &g);
    g = small(8, 20);
    for (int i = 0; i < 20; i++)
        gb_text(&g.keys, "abcdefghijklmnopqrstuvwxyz", (size_t)i);
    write_built("array-strings", &g);
    g = small(12, 2);
    gb_int(&g.keys, 0x7ff0000000000000ull, 8);
    gb_int(&g.keys, 0x3ff0000000000000ull, 8);
    write_built("array-doubles", &g);
    g = small(0, 0);
    gb_u32(&g, "general.alignment", 24);
    write_built("alignment", &g);
    g = small(0, 0);
    gb_u32(&g, "a", 1);
    write_built("key-twice", &g);
    g = small(0, 0);
    gb_key_int(&g, "split.no", 2, 1);
    gb_key_int(&g, "split.count", 2, 3);
    write_built("split", &g);
    g = gb_make();
    g.n_keys = 1ull << 60;
    write_built("keys-huge", &g);
    g = gb_make();
    g.n_tensors = 1ull << 60;
    write_built("tensors-huge", &g);
    for (uint32_t version = 1; version <= 4; version += version == 1 ? 1 : 2) {
        char name[16];
        snprintf(name, sizeof(name), "version-%u", version);
        g = gb_make();
        g.version = version;
        write_built(name, &g);
    }
    g = gb_make();
    g.version = 0x03000000;
    write_built("big-endian", &g);
    write_seed("magic", "GGML\1\0\0\0", 8);
    write_seed("truncated", "GGUF\3\0\0\0\1", 9);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: gguf_corpus FOLDER\n");
        return 2;
    }
    folder = argv[1];
    write_model("model-f32", KERN_F32, false);
    write_model("model-f16", KERN_F16, true);
    write_lies();
    return 0;
}
