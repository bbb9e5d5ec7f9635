/*
 * Pre-tokenizers: the patterns with which a model family's text was cut before its merges were
 * learnt. The cut decides which merges can happen, so a wrong pattern gives plausible but different
 * tokens; that is why a name that is not in the table is refused instead of approximated.
 *
 * Invariant: the words of a text, one after another, are the text, whatever the bytes. What a
 * pattern leaves between its matches is a word too; bytes that are not UTF-8 are words of one byte.
 *
 * A pattern list is applied in passes: each pass cuts the pieces of the one before, and sees the
 * ends of a piece as the ends of the text. Patterns are the families' own, except that \s is
 * spelled out: PCRE2's Unicode \s contains U+180E, which is no white space in the engines the
 * models were trained with. Compiled code runs as machine code where the system allows it, else (or
 * when that runs out of stack) in PCRE2's interpreter; both find the same matches.
 */
#include "model/pretokenize.h"

#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

/* White space, for use inside a class. */
#define WS          "\\t-\\r\\x{85}\\p{Z}"
#define TAIL        "[" WS "]+(?![^" WS "])|[" WS "]+"
#define NEWL        "[" WS "]*[\\r\\n]+"
#define GPT2        "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" WS "\\p{L}\\p{N}]+|" TAIL
#define SHORT_FORMS "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
/* The cl100k shape; families differ in how many digits stay together and whether marks join
 * letters. */
#define CL100K(digits)                                                                             \
    SHORT_FORMS "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits "| ?[^" WS                                \
                "\\p{L}\\p{N}]+[\\r\\n]*|" NEWL "|" TAIL
#define QWEN35                                                                                     \
    SHORT_FORMS "|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| ?[^" WS                            \
                "\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|" NEWL "|" TAIL
#define O200K                                                                                      \
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"    \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"                                                                \
    "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"   \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"                                                                \
    "|\\p{N}{1,3}| ?[^" WS "\\p{L}\\p{N}]+[\\r\\n/]*|" NEWL "|" TAIL
#define DEEPSEEK3                                                                                  \
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"                                        \
    "|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|" NEWL "|" TAIL

enum { MAX_PASSES = 3 };

static const struct family {
    const char *names; /* separated by spaces */
    const char *passes[MAX_PASSES];
    bool whole_words, adds_bos;
} families[] = {
    {"qwen2 stablelm2 deepseek-r1-qwen", {CL100K("\\p{N}")}, false, false},
    {"qwen35", {QWEN35}, false, false},
    {"llama-bpe llama3 llama-v3", {CL100K("\\p{N}{1,3}")}, true, true},
    {"gpt-2", {GPT2}, false, false},
    {"smollm starcoder", {"\\p{N}", GPT2}, false, false},
    {"gpt-4o", {O200K}, false, false},
    {"deepseek-v3",
     {"\\p{N}{1,3}", "[\\x{4E00}-\\x{9FA5}\\x{3040}-\\x{309F}\\x{30A0}-\\x{30FF}]+", DEEPSEEK3},
     false,
     false},
};

struct model_pretokenizer {
    const struct family *family;
    pcre2_general_context *memory;
    pcre2_code *code[MAX_PASSES];
    int n_passes;
};

static void *pcre_alloc(size_t n, void *arg)
{
    (void)arg;
    return ep_alloc(n);
}

static void pcre_free(void *p, void *arg)
{
    (void)arg;
    ep_free(p);
}

static bool has_name(const char *names, const char *name, size_t len)
{
    if (len == 0 || memchr(name, ' ', len) != NULL) return false;
    for (const char *at = names; *at != '\0';) {
        size_t n = strcspn(at, " ");
        if (n == len && memcmp(at, name, n) == 0) return true;
        at += n + (at[n] == ' ');
    }
    return false;
}

static ep_status refuse_name(const char *name, size_t len, ep_err *err)
{
    char known[256] = "";
    size_t used = 0;
    for (size_t i = 0; i < sizeof(families) / sizeof(families[0]); i++) {
        size_t n = strlen(families[i].names);
        if (used + n + 2 > sizeof(known)) break;
        if (used > 0) known[used++] = ' ';
        memcpy(known + used, families[i].names, n);
        used += n;
        known[used] = '\0';
    }
    int shown = len < 64 ? (int)len : 64;
    return ep_fail(err, EP_ERR_UNSUPPORTED,
                   "tokenizer.ggml.pre is \"%.*s\", known pre-tokenizers: %s", shown, name, known);
}

static ep_status compile(model_pretokenizer *p, const char *pattern, ep_err *err)
{
    pcre2_compile_context *context = pcre2_compile_context_create(p->memory);
    if (context == NULL) return EP_ERR_NOMEM;
    int code;
    PCRE2_SIZE at;
    pcre2_code *re = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                                   PCRE2_UTF | PCRE2_UCP, &code, &at, context);
    pcre2_compile_context_free(context);
    if (re == NULL && code == PCRE2_ERROR_HEAP_FAILED) return EP_ERR_NOMEM;
    if (re == NULL) {
        return ep_fail(err, EP_ERR_BUG, "pre-tokenizer pattern: error %d at %zu", code, at);
    }
    p->code[p->n_passes++] = re;
    /* Refused where memory must not be both written and executed: then the interpreter serves. */
    (void)pcre2_jit_compile(re, PCRE2_JIT_COMPLETE);
    return EP_OK;
}

ep_status model_pretokenizer_open(model_pretokenizer **out, const char *name, size_t len,
                                  ep_err *err)
{
    const struct family *family = NULL;
    for (size_t i = 0; i < sizeof(families) / sizeof(families[0]); i++) {
        if (has_name(families[i].names, name, len)) family = &families[i];
    }
    if (family == NULL) return refuse_name(name, len, err);

    model_pretokenizer *p = ep_calloc(1, sizeof(*p));
    if (p == NULL) return EP_ERR_NOMEM;
    p->family = family;
    p->memory = pcre2_general_context_create(pcre_alloc, pcre_free, NULL);
    ep_status status = p->memory != NULL ? EP_OK : EP_ERR_NOMEM;
    for (int i = 0; i < MAX_PASSES && status == EP_OK && family->passes[i] != NULL; i++) {
        status = compile(p, family->passes[i], err);
    }
    if (status != EP_OK) goto fail;
    *out = p;
    return EP_OK;
fail:
    model_pretokenizer_close(p);
    return status;
}

void model_pretokenizer_close(model_pretokenizer *p)
{
    if (p == NULL) return;
    for (int i = 0; i < p->n_passes; i++)
        pcre2_code_free(p->code[i]);
    pcre2_general_context_free(p->memory);
    ep_free(p);
}

bool model_pretokenizer_adds_bos(const model_pretokenizer *p)
{
    return p->family->adds_bos;
}

bool model_pretokenizer_whole_words(const model_pretokenizer *p)
{
    return p->family->whole_words;
}

/* ---- cutting ---- */

ep_status model_splitter_init(model_splitter *s, const model_pretokenizer *p,
                              ep_status (*word)(void *arg, const uint8_t *s, size_t n), void *arg)
{
    *s = (model_splitter){.p = p, .word = word, .arg = arg};
    s->match = pcre2_match_data_create(1, p->memory);
    s->context = pcre2_match_context_create(p->memory);
    if (s->match == NULL || s->context == NULL) {
        model_splitter_fini(s);
        return EP_ERR_NOMEM;
    }
    /* Optional: without it the machine code has 32 kB of its own, and the interpreter takes over.
     */
    s->stack = pcre2_jit_stack_create((size_t)32 << 10, (size_t)8 << 20, p->memory);
    if (s->stack != NULL) pcre2_jit_stack_assign(s->context, NULL, s->stack);
    return EP_OK;
}

void model_splitter_fini(model_splitter *s)
{
    pcre2_match_data_free(s->match);
    pcre2_match_context_free(s->context);
    pcre2_jit_stack_free(s->stack);
    *s = (model_splitter){0};
}

/* Finds the next match at or after `from`; *end == *start means there is none. */
static ep_status find(model_splitter *s, int pass, const uint8_t *text, size_t len, size_t from,
                      size_t *start, size_t *end)
{
    uint32_t flags = PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY;
    const pcre2_code *re = s->p->code[pass];
    int rc = pcre2_match(re, text, len, from, flags, s->match, s->context);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
        rc = pcre2_match(re, text, len, from, flags | PCRE2_NO_JIT, s->match, s->context);
    }
    *start = *end = len;
    if (rc == PCRE2_ERROR_NOMATCH) return EP_OK;
    if (rc == PCRE2_ERROR_NOMEMORY) return EP_ERR_NOMEM;
    if (rc == PCRE2_ERROR_MATCHLIMIT || rc == PCRE2_ERROR_HEAPLIMIT ||
        rc == PCRE2_ERROR_DEPTHLIMIT) {
        return EP_ERR_TOO_LARGE;
    }
    if (rc < 0) return EP_ERR_BUG;
    const PCRE2_SIZE *v = pcre2_get_ovector_pointer(s->match);
    *start = v[0];
    *end = v[1];
    return EP_OK;
}

/* Cuts one piece by pass `pass` and hands what comes out to the next. Depth is the number of
 * passes. */
static ep_status cut(model_splitter *s, int pass, const uint8_t *text, size_t len)
{
    if (len == 0) return EP_OK;
    if (pass == s->p->n_passes) return s->word(s->arg, text, len);
    ep_status status = EP_OK;
    for (size_t at = 0; at < len && status == EP_OK;) {
        size_t start, end;
        status = find(s, pass, text, len, at, &start, &end);
        if (status == EP_OK) status = cut(s, pass + 1, text + at, start - at);
        if (status == EP_OK) status = cut(s, pass + 1, text + start, end - start);
        at = end;
    }
    return status;
}

ep_status model_splitter_run(model_splitter *s, const uint8_t *text, size_t len)
{
    ep_status status = EP_OK;
    while (len > 0 && status == EP_OK) {
        size_t n = model_utf8_valid(text, len);
        if (n > 0) {
            status = cut(s, 0, text, n);
        } else {
            n = 1;
            status = s->word(s->arg, text, n);
        }
        text += n;
        len -= n;
    }
    return status;
}

/* Length of the character at s, 0 when it is none. */
static size_t utf8_char(const uint8_t *s, size_t n)
{
    uint8_t c = s[0];
    if (c < 0x80) return 1;
    size_t want = c >= 0xC2 && c <= 0xDF   ? 2
                  : (c & 0xF0) == 0xE0     ? 3
                  : c >= 0xF0 && c <= 0xF4 ? 4
                                           : 0;
    if (want == 0 || n < want) return 0;
    for (size_t i = 1; i < want; i++) {
        if ((s[i] & 0xC0) != 0x80) return 0;
    }
    if (c == 0xE0 && s[1] < 0xA0) return 0; /* overlong */
    if (c == 0xED && s[1] > 0x9F) return 0; /* surrogate */
    if (c == 0xF0 && s[1] < 0x90) return 0; /* overlong */
    if (c == 0xF4 && s[1] > 0x8F) return 0; /* past U+10FFFF */
    return want;
}

size_t model_utf8_valid(const uint8_t *s, size_t n)
{
    size_t at = 0;
    while (at < n) {
        size_t k = utf8_char(s + at, n - at);
        if (k == 0) break;
        at += k;
    }
    return at;
}
