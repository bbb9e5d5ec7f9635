/*
 * The packed cache: a shard that maps its experts answers with the bits of one that packed them; a
 * file of another model, cut short, or with one byte changed anywhere that counts is refused with
 * its reason.
 */
#include "expert_shard/cache.h"
#include "tests/unit/shard_fixture.h"

#include <sys/stat.h>
#include <unistd.h>

static char path[256];

static model *write_cache(const char *name)
{
    model *m = fixture_model(name);
    ep_err err = {{0}};
    snprintf(path, sizeof(path), "/tmp/moed-test-cache.%ld", (long)getpid());
    CHECK(m != NULL);
    if (m != NULL && shard_cache_write(m, path, 2, NULL, NULL, &err) != EP_OK) {
        printf("    %s\n", err.text);
        CHECK(false);
    }
    return m;
}

static ep_status open_shard(const model *m, const model_placement *p, int shard_i,
                            const char *packed, shard **s, ep_err *err)
{
    const shard_options opt = {.m = m,
                               .placement = p,
                               .shard_i = shard_i,
                               .device = "cpu",
                               .packed = packed,
                               .n_threads = 2,
                               .max_rows = 4};
    return shard_open(s, &opt, err);
}

/* One slice of every expert of shard_i to both shards, over all layers: the same bytes but for
 * times. */
static void same_answers(const model *m, const model_placement *p, int shard_i, shard *a, shard *b)
{
    float *x = fixture_rows(4, m->shape.hidden);
    for (int l = 0; l < m->shape.n_layers; l++) {
        wire_pair pairs[64];
        uint32_t n = 0;
        for (int e = 0; e < p->n_experts && n < 64; e++)
            if (p->owner[e] == shard_i && n < 4u * (uint32_t)m->shape.top_k)
                pairs[n] = (wire_pair){.row = n % 4, .expert = (uint16_t)e, .slot = 0}, n++;
        wire_header h = {.kind = WIRE_SLICE,
                         .epoch = p->epoch,
                         .shard = (uint16_t)shard_i,
                         .layer = (uint16_t)l,
                         .form = (uint16_t)shard_layer_form(a, l),
                         .n_rows = 4,
                         .n_pairs = n,
                         .hidden = (uint32_t)m->shape.hidden};
        size_t bytes, ra, rb, max = wire_reply_bytes(h.hidden, n);
        void *msg = fixture_slice(&h, x, pairs, &bytes);
        uint8_t *ya = ep_calloc(1, max), *yb = ep_calloc(1, max);
        shard_answer(a, msg, bytes, 0, ya, &ra);
        shard_answer(b, msg, bytes, 0, yb, &rb);
        CHECK_INT(ra, max);
        CHECK_INT(rb, max);
        CHECK(memcmp(ya + WIRE_HEADER_BYTES, yb + WIRE_HEADER_BYTES, max - WIRE_HEADER_BYTES) == 0);
        ep_free(msg);
        ep_free(ya);
        ep_free(yb);
    }
    ep_free(x);
}

static void compare(const char *name, const char *const *lists)
{
    model *m = write_cache(name);
    model_placement p = {0};
    ep_err err = {{0}};
    CHECK_INT(model_placement_make(&p, m->shape.n_experts, 2, lists, 1, &err), EP_OK);
    for (int i = 0; i < 2; i++) {
        shard *loaded = NULL, *mapped = NULL;
        CHECK_INT(open_shard(m, &p, i, NULL, &loaded, &err), EP_OK);
        CHECK_INT(open_shard(m, &p, i, path, &mapped, &err), EP_OK);
        if (mapped == NULL) printf("    %s\n", err.text);
        if (loaded != NULL && mapped != NULL) {
            for (int l = 0; l < m->shape.n_layers; l++)
                for (int e = 0; e < p.n_owned[i]; e++)
                    CHECK(shard_expert_checksum(loaded, l, e) ==
                          shard_expert_checksum(mapped, l, e));
            same_answers(m, &p, i, loaded, mapped);
        }
        shard_close(loaded);
        shard_close(mapped);
    }
    model_placement_fini(&p);
    model_close(m);
    unlink(path);
}

static void mapped_answers_like_packed(void)
{
    const char *scattered[] = {"0,2,5-7", NULL};
    compare(FIXTURE_MICRO, scattered);
    compare(FIXTURE_DEMO, scattered);
}

/* Opens with the file as it is now; what the error must mention, NULL for success. */
static void expect(const model *m, const char *mention)
{
    const char *all[] = {NULL};
    model_placement p = {0};
    ep_err err = {{0}};
    shard *s = NULL;
    CHECK_INT(model_placement_make(&p, m->shape.n_experts, 1, all, 1, &err), EP_OK);
    ep_status status = open_shard(m, &p, 0, path, &s, &err);
    CHECK_INT(status, mention == NULL ? EP_OK : EP_ERR_INVALID);
    if (mention != NULL && strstr(err.text, mention) == NULL) {
        printf("    \"%s\" does not mention \"%s\"\n", err.text, mention);
        CHECK(false);
    }
    shard_close(s);
    model_placement_fini(&p);
}

static void flip(long at)
{
    FILE *f = fopen(path, "r+b");
    CHECK(f != NULL);
    if (f == NULL) return;
    fseek(f, at, SEEK_SET);
    int c = fgetc(f);
    fseek(f, at, SEEK_SET);
    fputc(c ^ 0x10, f);
    fclose(f);
}

static void damage_is_refused(void)
{
    model *m = write_cache(FIXTURE_MICRO);
    struct stat st;
    expect(m, NULL);
    static const struct {
        long at;
        const char *mention;
    } cases[] = {{0, "not a packed cache"}, {9, "another version"}, {13, "another version"},
                 {17, "another model"},     {40, "damaged"},        {90, "damaged"},
                 {300, "damaged"}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        flip(cases[i].at);
        expect(m, cases[i].mention);
        flip(cases[i].at);
    }
    CHECK_INT(stat(path, &st), 0);
    flip((long)st.st_size / 2); /* weights (F32 rows fill their pages in this model) */
    expect(m, "is damaged (checksum)");
    flip((long)st.st_size / 2);
    expect(m, NULL);
    CHECK_INT(truncate(path, st.st_size - 1), 0);
    expect(m, "expected");
    CHECK_INT(truncate(path, 10), 0);
    expect(m, "not a packed cache");
    unlink(path);
    expect(m, path);
    model_close(m);
}

static void another_model_is_refused(void)
{
    model *m = write_cache(FIXTURE_MICRO), *other = fixture_model(FIXTURE_DEMO);
    expect(other, "another model");
    model_close(m);
    model_close(other);
    unlink(path);
}

static void write_failures_leave_nothing(void)
{
    model *m = fixture_model(FIXTURE_MICRO);
    ep_err err = {{0}};
    CHECK_INT(shard_cache_write(m, "/nonexistent/x.pack", 1, NULL, NULL, &err), EP_ERR_IO);
    CHECK(strstr(err.text, "/nonexistent/x.pack") != NULL);
    snprintf(path, sizeof(path), "/tmp/moed-test-cache.%ld", (long)getpid());
    for (int n = 1; n < 6; n++) {
        ep_alloc_fail_at(n);
        ep_status status = shard_cache_write(m, path, 1, NULL, NULL, &err);
        ep_alloc_fail_at(0);
        CHECK_INT(status, EP_ERR_NOMEM);
        CHECK(access(path, F_OK) != 0);
    }
    model_close(m);
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"mapped_answers_like_packed", mapped_answers_like_packed},
        {"damage_is_refused", damage_is_refused},
        {"another_model_is_refused", another_model_is_refused},
        {"write_failures_leave_nothing", write_failures_leave_nothing},
    };
    ep_err err = {{0}};
    if (kern_select("auto", &err) != EP_OK) printf("%s\n", err.text);
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
