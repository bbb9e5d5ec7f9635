/*
 * The tokenizer: against ids made by another implementation (golden cases), against a plain
 * quadratic merge loop on random vocabularies, and against what the patterns say should be cut
 * where. Every input, valid UTF-8 or not, must come back byte for byte. Random tests print their
 * seed (MOED_SEED sets it).
 */
#include "model/model.h"
#include "model/pretokenize.h"
#include "tests/test.h"
#include "tests/tokenizer_fixture.h"

#include <jansson.h>

static uint64_t rng = 1;

static uint32_t next_random(void)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (uint32_t)(rng >> 20);
}

static void seed(const char *test)
{
    const char *env = getenv("MOED_SEED");
    rng = env != NULL ? strtoull(env, NULL, 10) : 20261120;
    if (rng == 0) rng = 1;
    printf("    %s: seed %llu\n", test, (unsigned long long)rng);
}

static const char *source_path(char *buf, size_t n, const char *name)
{
    const char *root = getenv("MOED_SOURCE");
    snprintf(buf, n, "%s/%s", root != NULL ? root : ".", name);
    return buf;
}

/* Opens the tokenizer of a file in the repository; NULL after a printed failure. */
static model_tokenizer *open_shipped(const char *name)
{
    char path[1024];
    ep_err err = {""};
    model_file *f = NULL;
    model_tokenizer *t = NULL;
    ep_status status = model_file_open(&f, source_path(path, sizeof(path), name), &err);
    if (status == EP_OK) status = model_tokenizer_open_file(&t, f, &err);
    if (status != EP_OK) printf("    %s: %s\n", name, err.text);
    CHECK(status == EP_OK);
    model_file_close(f); /* the tokenizer keeps nothing of it */
    return t;
}

static ep_status open_vocab(model_tokenizer **t, const fx_vocab *v, ep_err *err)
{
    ep_buf bytes = fx_vocab_file(v);
    model_file *f = NULL;
    ep_status status = model_file_open_bytes(&f, bytes.data, bytes.len, err);
    if (status == EP_OK) status = model_tokenizer_open_file(t, f, err);
    model_file_close(f);
    ep_buf_fini(&bytes);
    return status;
}

/* Encodes and decodes; the bytes must be the same. Returns the ids. */
static int32_t *round_trip(const model_tokenizer *t, const void *s, size_t len, bool parse,
                           size_t *n)
{
    int32_t *ids = NULL;
    ep_buf back = {0};
    *n = 0;
    CHECK_INT(model_encode(t, s, len, parse, &ids, n), EP_OK);
    for (size_t i = 0; i < *n; i++)
        CHECK_INT(model_decode(t, ids[i], true, &back), EP_OK);
    CHECK_INT(back.len, len);
    CHECK(back.len == len && (len == 0 || memcmp(back.data, s, len) == 0));
    ep_buf_fini(&back);
    return ids;
}

static void check_ids(const model_tokenizer *t, const char *s, size_t len, bool parse,
                      const int32_t *want, size_t n_want)
{
    size_t n;
    int32_t *ids = round_trip(t, s, len, parse, &n);
    bool same = n == n_want && (n == 0 || memcmp(ids, want, n * sizeof(*ids)) == 0);
    CHECK(same);
    if (!same) {
        printf("    \"%.*s\":", (int)len, s);
        for (size_t i = 0; i < n; i++)
            printf(" %d", ids[i]);
        printf(", expected");
        for (size_t i = 0; i < n_want; i++)
            printf(" %d", want[i]);
        printf("\n");
    }
    ep_free(ids);
}

#define IDS(...) (const int32_t[]){__VA_ARGS__}, sizeof((int32_t[]){__VA_ARGS__}) / 4

/* ---- golden ---- */

static void golden_of(const char *gguf)
{
    char path[1024];
    json_error_t error;
    json_t *cases = json_load_file(
        source_path(path, sizeof(path), "tests/golden/tokenizer-cases.json"), 0, &error);
    CHECK(cases != NULL);
    model_tokenizer *t = open_shipped(gguf);
    if (t == NULL || cases == NULL) goto done;
    CHECK_INT(model_n_tokens(t), 2048);
    CHECK_INT(json_array_size(cases), 35);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        json_t *c = json_array_get(cases, i), *ids = json_object_get(c, "ids");
        const char *text = json_string_value(json_object_get(c, "text"));
        int32_t want[256];
        size_t n = json_array_size(ids);
        CHECK(text != NULL && n <= 256);
        for (size_t k = 0; k < n && k < 256; k++)
            want[k] = (int32_t)json_integer_value(json_array_get(ids, k));
        if (text != NULL) check_ids(t, text, strlen(text), true, want, n);
    }
done:
    model_tokenizer_close(t);
    json_decref(cases);
}

static void test_golden_demo(void)
{
    golden_of("deploy/demo/tinymoe-q4_k_m.gguf");
}
static void test_golden_micro(void)
{
    golden_of("tests/golden/micro-f32.gguf");
}

/* A whole text: the reference's perplexity says how many positions it scored, context / 2 - 1 of
 * each full chunk. */
static void test_golden_text(void)
{
    char path[1024];
    json_error_t error;
    json_t *micro =
        json_load_file(source_path(path, sizeof(path), "tests/golden/micro.json"), 0, &error);
    json_t *perplexity = json_object_get(micro, "perplexity");
    json_int_t tokens = json_integer_value(json_object_get(perplexity, "tokens"));
    json_int_t context = json_integer_value(json_object_get(perplexity, "context"));
    FILE *f = fopen(source_path(path, sizeof(path), "tests/golden/micro-held-out.txt"), "rb");
    model_tokenizer *t = open_shipped("tests/golden/micro-f32.gguf");
    CHECK(tokens > 0 && context > 2 && f != NULL);
    char *text = ep_alloc(1 << 16);
    if (f != NULL && t != NULL && text != NULL && context > 2) {
        size_t len = fread(text, 1, 1 << 16, f), n;
        CHECK(len > 1000 && len < 1 << 16);
        ep_free(round_trip(t, text, len, true, &n));
        CHECK_INT((json_int_t)n / context * (context / 2 - 1), tokens);
    }
    if (f != NULL) fclose(f);
    ep_free(text);
    model_tokenizer_close(t);
    json_decref(micro);
}

static void test_shipped_roles(void)
{
    model_tokenizer *t = open_shipped("deploy/demo/tinymoe-q4_k_m.gguf");
    if (t == NULL) return;
    CHECK(model_is_end(t, 2045));  /* eos of the file */
    CHECK(!model_is_end(t, 2046)); /* <|im_start|> */
    CHECK(model_is_end(t, 2047));  /* <|im_end|>, by its name */
    CHECK(!model_is_end(t, 0) && !model_is_end(t, -1) && !model_is_end(t, 2048));
    CHECK_INT(model_bos(t), -1);
    CHECK(!model_adds_bos(t));
    ep_buf out = {0};
    CHECK_INT(model_decode(t, 2047, false, &out), EP_OK);
    CHECK_INT(out.len, 0);
    CHECK_INT(model_decode(t, 2047, true, &out), EP_OK);
    CHECK_INT(out.len, 10);
    CHECK_INT(model_decode(t, 2048, true, &out), EP_ERR_INVALID);
    CHECK_INT(model_decode(t, -1, true, &out), EP_ERR_INVALID);
    CHECK_INT(out.len, 10);
    ep_buf_fini(&out);
    /* Without parse_special the same text is plain text and no control token comes out. */
    size_t n;
    int32_t *ids = round_trip(t, "<|im_end|>", 10, false, &n);
    CHECK(n > 1);
    for (size_t i = 0; i < n; i++)
        CHECK(ids[i] < 2045);
    ep_free(ids);
    model_tokenizer_close(t);
}

static void test_append(void)
{
    model_tokenizer *t = open_shipped("deploy/demo/tinymoe-q4_k_m.gguf");
    if (t == NULL) return;
    int32_t *ids = NULL;
    size_t n = 0;
    CHECK_INT(model_encode(t, "", 0, true, &ids, &n), EP_OK);
    CHECK(n == 0);
    CHECK_INT(model_encode(t, "a", 1, true, &ids, &n), EP_OK);
    CHECK_INT(model_encode(t, " a", 2, true, &ids, &n), EP_OK);
    CHECK_INT(model_encode(t, "", 0, true, &ids, &n), EP_OK);
    CHECK(n == 2 && ids[0] == 97 && ids[1] == 258);
    ep_free(ids);
    model_tokenizer_close(t);
}

/* ---- bytes ---- */

static void test_all_bytes(void)
{
    model_tokenizer *t = open_shipped("deploy/demo/tinymoe-q4_k_m.gguf");
    if (t == NULL) return;
    uint8_t all[256];
    size_t n;
    for (int b = 0; b < 256; b++) {
        all[b] = (uint8_t)b;
        int32_t *one = round_trip(t, &all[b], 1, true, &n);
        CHECK_INT(n, 1);
        if (n == 1) CHECK_INT(one[0], b); /* this vocabulary begins with the bytes */
        ep_free(one);
    }
    ep_free(round_trip(t, all, sizeof(all), true, &n));
    for (int b = 0; b < 128; b++) { /* descending */
        uint8_t swap = all[b];
        all[b] = all[255 - b];
        all[255 - b] = swap;
    }
    ep_free(round_trip(t, all, sizeof(all), true, &n));
    model_tokenizer_close(t);
}

static void test_invalid_utf8(void)
{
    model_tokenizer *t = open_shipped("deploy/demo/tinymoe-q4_k_m.gguf");
    if (t == NULL) return;
    /* A bad byte is its own token; the text around it is as if it stood alone. */
    check_ids(t, " a\xFF a", 5, true, IDS(258, 255, 258));
    check_ids(t, "a\xC3", 2, true, IDS(97, 0xC3));                          /* cut short */
    check_ids(t, "\xC0\x80", 2, true, IDS(0xC0, 0x80));                     /* overlong */
    check_ids(t, "\xED\xA0\x80", 3, true, IDS(0xED, 0xA0, 0x80));           /* surrogate */
    check_ids(t, "\xF4\x90\x80\x80", 4, true, IDS(0xF4, 0x90, 0x80, 0x80)); /* past U+10FFFF */
    check_ids(t, "\xFF<|im_end|>\xFE", 12, true, IDS(0xFF, 2047, 0xFE));
    check_ids(t, "\0\0", 2, true, IDS(0, 0));
    CHECK_INT(model_utf8_valid((const uint8_t *)"\xF4\x8F\xBF\xBF\xEF\xBF\xBF\xC2\x80z", 10), 10);
    CHECK_INT(model_utf8_valid((const uint8_t *)"ab\xE0\x9F\xBF", 5), 2);
    CHECK_INT(model_utf8_valid((const uint8_t *)"ab\xF0\x8F\xBF\xBF", 6), 2);
    CHECK_INT(model_utf8_valid((const uint8_t *)"ab\xF5\x80\x80\x80", 6), 2);
    model_tokenizer_close(t);
}

static void test_random_round_trip(void)
{
    seed("random round trip");
    static const char *const bits[] = {" ",
                                       "  ",
                                       "\n",
                                       "\r\n",
                                       "the",
                                       " of",
                                       "'s",
                                       "12",
                                       "\xC2\xA0",
                                       "\xE4\xBD\xA0",
                                       "\xF0\x9F\x99\x82",
                                       "<|im_end|>",
                                       "<|",
                                       "e\xCC\x81",
                                       "\xE2",
                                       "!!"};
    model_tokenizer *t = open_shipped("deploy/demo/tinymoe-q4_k_m.gguf");
    if (t == NULL) return;
    uint8_t text[600];
    size_t n;
    for (int round = 0; round < 3000; round++) {
        size_t len = 0, want = next_random() % 500;
        while (len < want) {
            uint32_t kind = next_random() % 4;
            if (kind < 3) {
                const char *s = bits[next_random() % (sizeof(bits) / sizeof(bits[0]))];
                memcpy(text + len, s, strlen(s));
                len += strlen(s);
            } else {
                text[len++] = (uint8_t)next_random();
            }
        }
        ep_free(round_trip(t, text, len, round % 2 == 0, &n));
    }
    model_tokenizer_close(t);
}

static void test_long_inputs(void)
{
    enum { LONG = 1 << 16 };
    fx_vocab v;
    fx_vocab_init(&v);
    fx_vocab_bytes(&v);
    char token[257] = "", merge[513];
    for (int half = 1; half <= 128; half *= 2) { /* aa, aaaa, ... up to 256 */
        memset(token, 'a', (size_t)half * 2);
        token[half * 2] = '\0';
        fx_token(&v, token, 1);
        snprintf(merge, sizeof(merge), "%.*s %.*s", half, token, half, token);
        fx_merge(&v, merge);
    }
    fx_token(&v, "<|end|>", 3);
    model_tokenizer *t = NULL;
    ep_err err = {""};
    CHECK_INT(open_vocab(&t, &v, &err), EP_OK);
    fx_vocab_fini(&v);
    char *text = ep_alloc(LONG);
    if (t == NULL || text == NULL) goto done;
    static const char *const fills[] = {"a",  " ",  "7",    "!",      "\n", "\xE6\xBC\xA2",
                                        "<|", "aA", "\xFF", "<|end|>"};
    for (size_t k = 0; k < sizeof(fills) / sizeof(fills[0]); k++) {
        size_t m = strlen(fills[k]), len = LONG / m * m, n;
        for (size_t i = 0; i < len; i += m)
            memcpy(text + i, fills[k], m);
        ep_time start = ep_now();
        ep_free(round_trip(t, text, len, true, &n));
        printf("    64 kB of \"%s\": %zu tokens, %.1f ms\n",
               k == 8   ? "\\xff"
               : k == 4 ? "\\n"
                        : fills[k],
               n, (double)ep_time_diff_ns(ep_now(), start) * 1e-6);
        if (k == 0) CHECK_INT(n, LONG / 256);
        if (k == 9) CHECK_INT(n, len / m);
    }
done:
    ep_free(text);
    model_tokenizer_close(t);
}

/* ---- merging against the plain loop ---- */

/* Merges the leftmost pair of lowest rank until none is left: the definition, quadratic. */
static size_t merge_plain(int32_t *ids, size_t n, const int32_t (*merges)[3], int n_merges)
{
    for (;;) {
        int best = n_merges;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            for (int m = 0; m < best; m++) {
                if (merges[m][0] == ids[i] && merges[m][1] == ids[i + 1]) {
                    best = m;
                    at = i;
                }
            }
        }
        if (best == n_merges) return n;
        ids[at] = merges[best][2];
        memmove(ids + at + 1, ids + at + 2, (n - at - 2) * sizeof(*ids));
        n--;
    }
}

static void test_random_merges(void)
{
    enum { MERGES = 40, LETTERS = 3 };
    seed("random merges");
    for (int round = 0; round < 60; round++) {
        fx_vocab v;
        fx_vocab_init(&v);
        fx_vocab_bytes(&v);
        char texts[MERGES + LETTERS][64] = {"a", "b", "c"};
        int32_t ids[MERGES + LETTERS] = {'a', 'b', 'c'}, merges[MERGES][3];
        int n_texts = LETTERS, n_merges = 0;
        while (n_merges < MERGES) {
            uint32_t l = next_random() % (uint32_t)n_texts, r = next_random() % (uint32_t)n_texts;
            if (strlen(texts[l]) + strlen(texts[r]) > 12) continue;
            char both[64], merge[160];
            snprintf(both, sizeof(both), "%.31s%.31s", texts[l], texts[r]);
            int known = 0;
            while (known < n_texts && strcmp(texts[known], both) != 0)
                known++;
            if (known == n_texts) {
                memcpy(texts[known], both, sizeof(both));
                ids[known] = fx_token(&v, both, 1);
                n_texts++;
            }
            snprintf(merge, sizeof(merge), "%s %s", texts[l], texts[r]);
            fx_merge(&v, merge);
            merges[n_merges][0] = ids[l], merges[n_merges][1] = ids[r];
            merges[n_merges++][2] = ids[known];
        }
        model_tokenizer *t = NULL;
        ep_err err = {""};
        CHECK_INT(open_vocab(&t, &v, &err), EP_OK);
        fx_vocab_fini(&v);
        for (int word = 0; word < 100 && t != NULL; word++) {
            char s[64];
            int32_t want[64];
            size_t n = 1 + next_random() % 60;
            for (size_t i = 0; i < n; i++)
                want[i] = s[i] = (char)('a' + next_random() % LETTERS);
            check_ids(t, s, n, true, want,
                      merge_plain(want, n, (const int32_t(*)[3])merges, n_merges));
        }
        model_tokenizer_close(t);
    }
}

/* ---- patterns ---- */

static ep_status note_word(void *arg, const uint8_t *s, size_t n)
{
    ep_buf *out = arg;
    ep_status status = out->len > 0 ? ep_buf_add(out, "|", 1) : EP_OK;
    return status == EP_OK ? ep_buf_add(out, s, n) : status;
}

static void check_words(const char *name, const char *text, const char *want)
{
    model_pretokenizer *p = NULL;
    model_splitter s;
    ep_err err = {""};
    ep_buf out = {0};
    CHECK_INT(model_pretokenizer_open(&p, name, strlen(name), &err), EP_OK);
    if (p == NULL) {
        printf("    %s\n", err.text);
        return;
    }
    CHECK_INT(model_splitter_init(&s, p, note_word, &out), EP_OK);
    CHECK_INT(model_splitter_run(&s, (const uint8_t *)text, strlen(text)), EP_OK);
    CHECK_INT(ep_buf_add(&out, "", 1), EP_OK);
    CHECK_STR((const char *)out.data, want);
    model_splitter_fini(&s);
    model_pretokenizer_close(p);
    ep_buf_fini(&out);
}

static void test_patterns(void)
{
    check_words("qwen2", "I'm he'LL x's 1234", "I|'m| he|'LL| x|'s| |1|2|3|4");
    check_words("qwen2", "a  b\t\tc \n\n d   ", "a| | b|\t|\tc| \n\n| d|   ");
    check_words("qwen2", "f(x)!? ...\r\nz", "f|(x|)!?| ...\r\n|z");
    check_words("qwen2", "e\u0301a", "e|\u0301a");
    check_words("qwen35", "e\u0301a b\u0301!", "e\u0301a| b\u0301|!");
    check_words("llama-bpe", "x12345 6", "x|123|45| |6");
    check_words("llama3", "x's\n", "x|'s|\n");
    check_words("gpt-2", "Don't  pay 1234!", "Don|'t| | pay| 1234|!");
    check_words("gpt-2", "DON'T \n", "DON|'|T| \n");
    check_words("smollm", "a 12b", "a| |1|2|b");
    check_words("gpt-4o", "camelCase isn't a/b//\n1234", "camel|Case| isn't| a|/b|//\n|123|4");
    check_words("deepseek-v3", "a1234 \u4f60\u597dx!a !b", "a|123|4| |\u4f60\u597d|x|!a| !|b");
    /* No-break space and U+0085 are white space; U+180E and U+200B are not, unlike in PCRE2's \s.
     */
    check_words("qwen2", "a\u00a0\u00a0b\xC2\x85!", "a|\u00a0|\u00a0b|\xC2\x85|!");
    check_words("qwen2", "a \u180e\u180e", "a| \u180e\u180e");
    check_words("qwen2", "a \u200b!", "a| \u200b!");
    check_words("qwen2", "\u0663\u0664 \u00bd\u2163", "\u0663|\u0664| |\u00bd|\u2163");
}

static void test_unknown_pattern(void)
{
    static const char *const bad[] = {"", "nosuch", "qwen", "qwen2 ", "qwen2 stablelm2", "GPT-2"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        model_pretokenizer *p = NULL;
        ep_err err = {""};
        CHECK_INT(model_pretokenizer_open(&p, bad[i], strlen(bad[i]), &err), EP_ERR_UNSUPPORTED);
        CHECK(strstr(err.text, "llama-bpe") != NULL && strstr(err.text, "deepseek-v3") != NULL);
        CHECK(p == NULL);
    }
}

/* ---- special tokens, roles ---- */

static void test_specials(void)
{
    fx_vocab v;
    fx_vocab_init(&v);
    fx_vocab_bytes(&v);
    fx_token(&v, "<a>", 3);           /* 256 */
    fx_token(&v, "<a><b>", 3);        /* 257, longer */
    fx_token(&v, "<b>", 4);           /* 258, user-defined */
    fx_token(&v, "<a>", 3);           /* 259, a duplicate */
    fx_token(&v, "hi", 1);            /* 260 */
    fx_token(&v, "hi", 1);            /* 261, a duplicate */
    fx_token(&v, "\u0120x y", 4);     /* 262, user-defined with a space */
    fx_token(&v, "<|im_end|>", 3);    /* 263, ends by name */
    fx_token(&v, "<|endoftext|>", 1); /* 264, but this is not a control token */
    fx_token(&v, "", 3);              /* 265 */
    fx_merge(&v, "h i");
    fx_merge(&v, "h i");
    v.eos = 256, v.bos = 257, v.adds_bos = 1;
    model_tokenizer *t = NULL;
    ep_err err = {""};
    CHECK_INT(open_vocab(&t, &v, &err), EP_OK);
    fx_vocab_fini(&v);
    if (t == NULL) {
        printf("    %s\n", err.text);
        return;
    }
    check_ids(t, "<a>hi<b>", 8, true, IDS(256, 260, 258));
    check_ids(t, "<a><b><a>", 9, true, IDS(257, 256));
    check_ids(t, "<a><", 4, true, IDS(256, '<'));
    check_ids(t, "<a><b", 5, true, IDS(256, '<', 'b'));
    check_ids(t, "<b>", 3, false, IDS('<', 'b', '>'));
    check_ids(t, "\u0120x y", 5, true, IDS(262));
    CHECK(model_is_end(t, 256) && model_is_end(t, 263) && !model_is_end(t, 264));
    CHECK_INT(model_bos(t), 257);
    CHECK(model_adds_bos(t));
    ep_buf out = {0};
    CHECK_INT(model_decode(t, 256, false, &out), EP_OK);
    CHECK_INT(out.len, 0);
    CHECK_INT(model_decode(t, 261, false, &out), EP_OK); /* duplicates decode */
    CHECK_INT(model_decode(t, 262, false, &out), EP_OK); /* user-defined: its own text */
    CHECK(out.len == 7 && memcmp(out.data, "hi\u0120x y", 7) == 0);
    ep_buf_fini(&out);
    model_tokenizer_close(t);
}

static void test_whole_words(void)
{
    for (int llama = 0; llama < 2; llama++) {
        fx_vocab v;
        fx_vocab_init(&v);
        fx_vocab_bytes(&v);
        fx_token(&v, "bc", 1);  /* 256 */
        fx_token(&v, "abc", 1); /* 257, which no merge makes */
        fx_merge(&v, "b c");
        v.bos = 0;
        if (llama) v.pre = "llama-bpe";
        model_tokenizer *t = NULL;
        CHECK_INT(open_vocab(&t, &v, NULL), EP_OK);
        fx_vocab_fini(&v);
        if (t == NULL) return;
        if (llama) check_ids(t, "abc", 3, true, IDS(257));
        if (!llama) check_ids(t, "abc", 3, true, IDS('a', 256));
        CHECK(model_adds_bos(t) == (llama == 1));
        model_tokenizer_close(t);
    }
}

/* ---- refusals ---- */

static void check_refused(fx_vocab *v, ep_status want, const char *word)
{
    model_tokenizer *t = NULL;
    ep_err err = {""};
    CHECK_INT(open_vocab(&t, v, &err), want);
    CHECK(t == NULL);
    if (strstr(err.text, word) == NULL) {
        printf("    \"%s\" does not say \"%s\"\n", err.text, word);
        CHECK(false);
    }
    fx_vocab_fini(v);
}

static fx_vocab small(void)
{
    fx_vocab v;
    fx_vocab_init(&v);
    fx_vocab_bytes(&v);
    fx_token(&v, "th", 1);
    fx_token(&v, "<|x|>", 3);
    fx_merge(&v, "t h");
    return v;
}

static void test_refusals(void)
{
    fx_vocab v = small();
    v.model = "llama";
    check_refused(&v, EP_ERR_UNSUPPORTED, "\"llama\"");
    v = small(), v.model = NULL;
    check_refused(&v, EP_ERR_INVALID, "model is missing");
    v = small(), v.pre = NULL;
    check_refused(&v, EP_ERR_UNSUPPORTED, "pre is missing");
    v = small(), v.pre = "tekken";
    check_refused(&v, EP_ERR_UNSUPPORTED, "\"tekken\"");
    v = small(), v.n_types = 17;
    check_refused(&v, EP_ERR_INVALID, "token_type has 17 entries");
    v = small(), v.types[5] = 7;
    check_refused(&v, EP_ERR_INVALID, "token 5 has type 7");
    v = small(), v.types[65] = 3; /* a byte that only a control token would make */
    check_refused(&v, EP_ERR_INVALID, "byte 0x41");
    v = small(), v.eos = 258;
    check_refused(&v, EP_ERR_INVALID, "eos_token_id is 258");
    v = small(), v.bos = 1 << 30;
    check_refused(&v, EP_ERR_INVALID, "bos_token_id is 1073741824");
    v = small(), v.adds_bos = 1;
    check_refused(&v, EP_ERR_INVALID, "without tokenizer.ggml.bos_token_id");
    fx_vocab_init(&v);
    v.skip_byte = 0xC3;
    fx_vocab_bytes(&v);
    fx_merge(&v, "t h");
    check_refused(&v, EP_ERR_INVALID, "byte 0xc3");
    fx_vocab_init(&v);
    check_refused(&v, EP_ERR_INVALID, "tokens is missing or empty");
    fx_vocab_init(&v);
    fx_vocab_bytes(&v);
    check_refused(&v, EP_ERR_INVALID, "merges is missing or empty");
    static const char *const bad[][2] = {
        {"th", "two texts"},       {"", "two texts"},        {" th", "two texts"},
        {"th ", "two texts"},      {"t h e", "two texts"},   {"t  h", "two texts"},
        {"t \u4f60", "two texts"}, {"t \xFF", "two texts"},  {"tt h", "left text"},
        {"t hh", "right text"},    {"h t", "what it makes"}, {"<|x |>", "left text"},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        v = small();
        fx_merge(&v, bad[i][0]);
        check_refused(&v, EP_ERR_INVALID, bad[i][1]);
    }
    char special[1026];
    memset(special, 'q', sizeof(special));
    v = small();
    fx_token_n(&v, special, 1025, 3);
    check_refused(&v, EP_ERR_UNSUPPORTED, "token 258 is 1025 bytes");
}

static void test_wrong_kinds(void)
{
    static const char *const keys[] = {"tokens", "merges", "token_type"};
    for (size_t k = 0; k < 3; k++) {
        fx_vocab v = small();
        fx_file f;
        fx_begin(&f);
        fx_key_str(&f, "general.architecture", "qwen3moe");
        fx_key_str(&f, "tokenizer.ggml.model", "gpt2");
        fx_key_str(&f, "tokenizer.ggml.pre", "qwen2");
        if (k == 0) fx_key_i32s(&f, "tokenizer.ggml.tokens", v.types, 258);
        if (k != 0) fx_key_strs(&f, "tokenizer.ggml.tokens", &v.tokens, 258);
        if (k == 1) fx_key_i32s(&f, "tokenizer.ggml.merges", v.types, 1);
        if (k != 1) fx_key_strs(&f, "tokenizer.ggml.merges", &v.merges, 1);
        if (k == 2) fx_key_strs(&f, "tokenizer.ggml.token_type", &v.tokens, 258);
        fx_end(&f);
        model_file *file = NULL;
        model_tokenizer *t = NULL;
        ep_err err = {""};
        CHECK_INT(model_file_open_bytes(&file, f.bytes.data, f.bytes.len, &err), EP_OK);
        if (file != NULL) CHECK_INT(model_tokenizer_open_file(&t, file, &err), EP_ERR_INVALID);
        CHECK(strstr(err.text, keys[k]) != NULL && strstr(err.text, "is not an array of") != NULL);
        model_tokenizer_close(t);
        model_file_close(file);
        ep_buf_fini(&f.bytes);
        fx_vocab_fini(&v);
    }
}

/* ---- memory ---- */

/* Fails each allocation of open and of encode in turn. Some are optional (machine code, its stack).
 */
static void test_no_memory(void)
{
    fx_vocab v = small();
    ep_buf bytes = fx_vocab_file(&v);
    fx_vocab_fini(&v);
    model_file *f = NULL;
    model_tokenizer *t = NULL;
    CHECK_INT(model_file_open_bytes(&f, bytes.data, bytes.len, NULL), EP_OK);
    int n_fail = 0, n_allocs = 1;
    for (int i = 0; f != NULL && i <= n_allocs; i++) { /* 0: nothing fails, counts */
        uint64_t before = ep_alloc_count();
        model_tokenizer_close(t);
        t = NULL;
        ep_alloc_fail_at(i);
        ep_status status = model_tokenizer_open_file(&t, f, NULL);
        ep_alloc_fail_at(0);
        if (i == 0) n_allocs = (int)(ep_alloc_count() - before);
        CHECK(status == EP_OK ? t != NULL : status == EP_ERR_NOMEM && t == NULL);
        n_fail += status != EP_OK;
    }
    CHECK(n_allocs > 10 && n_fail > 10);
    printf("    open: %d of %d failed allocations refused\n", n_fail, n_allocs);
    if (t == NULL) CHECK_INT(model_tokenizer_open_file(&t, f, NULL), EP_OK);
    const char text[] = "th th<|x|>\xFF 123";
    n_fail = 0, n_allocs = 1;
    for (int i = 0; t != NULL && i <= n_allocs; i++) {
        int32_t *ids = NULL;
        size_t n = 0;
        uint64_t before = ep_alloc_count();
        ep_alloc_fail_at(i);
        ep_status status = model_encode(t, text, sizeof(text) - 1, true, &ids, &n);
        ep_alloc_fail_at(0);
        if (i == 0) n_allocs = (int)(ep_alloc_count() - before);
        CHECK(status == EP_OK ? n > 0 : status == EP_ERR_NOMEM && n == 0 && ids == NULL);
        n_fail += status != EP_OK;
        ep_free(ids);
    }
    CHECK(n_allocs >= 5 && n_fail >= 5);
    printf("    encode: %d of %d failed allocations refused\n", n_fail, n_allocs);
    model_tokenizer_close(t);
    model_file_close(f);
    ep_buf_fini(&bytes);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"golden_demo", test_golden_demo},
        {"golden_micro", test_golden_micro},
        {"golden_text", test_golden_text},
        {"shipped_roles", test_shipped_roles},
        {"append", test_append},
        {"all_bytes", test_all_bytes},
        {"invalid_utf8", test_invalid_utf8},
        {"random_round_trip", test_random_round_trip},
        {"long_inputs", test_long_inputs},
        {"random_merges", test_random_merges},
        {"patterns", test_patterns},
        {"unknown_pattern", test_unknown_pattern},
        {"specials", test_specials},
        {"whole_words", test_whole_words},
        {"refusals", test_refusals},
        {"wrong_kinds", test_wrong_kinds},
        {"no_memory", test_no_memory},
    };
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
