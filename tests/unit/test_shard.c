/*
 * The shard without a transport: what it answers is right, does not depend on company, and whatever
 * is wrong with a slice is refused with the reason. Memory: nothing allocated per slice, clean
 * failure of every allocation at open, resident memory close to the packed experts.
 */
#include "tests/unit/shard_fixture.h"

#include <math.h>
#include <unistd.h>

/* ---- right numbers ------------------------------------------------------------------------------
 */

/* y[n] = W x over file rows, in double. */
static void plain_product(const uint8_t *rows, int type, int n, int k, const double *x, double *y,
                          float *line)
{
    size_t row_bytes = kern_type_row_bytes(type, k);
    for (int i = 0; i < n; i++) {
        kern_dequant_row(type, rows + (size_t)i * row_bytes, line, k);
        double sum = 0;
        for (int j = 0; j < k; j++)
            sum += (double)line[j] * x[j];
        y[i] = sum;
    }
}

static void plain_expert(const model *m, int layer, int expert, const float *x, double *out)
{
    int hidden = m->shape.hidden, inter = m->shape.inter;
    const model_layer *l = &m->layers[layer];
    double *in = ep_alloc((size_t)hidden * 8), *gate = ep_alloc((size_t)inter * 8);
    double *up = ep_alloc((size_t)inter * 8);
    float *line = ep_alloc((size_t)(hidden > inter ? hidden : inter) * 4);
    const uint8_t *rows[3] = {NULL};
    for (int role = 0; role < 3; role++)
        CHECK_INT(model_rows(m, model_experts(m, layer, role), expert, NULL, &rows[role], NULL),
                  EP_OK);
    for (int i = 0; i < hidden; i++)
        in[i] = (double)x[i];
    plain_product(rows[0], l->gate_exps->type, inter, hidden, in, gate, line);
    plain_product(rows[1], l->up_exps->type, inter, hidden, in, up, line);
    for (int i = 0; i < inter; i++)
        gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
    plain_product(rows[2], l->down_exps->type, hidden, inter, gate, out, line);
    ep_free(in);
    ep_free(gate);
    ep_free(up);
    ep_free(line);
}

/* Largest over pairs of |got - want| / |want|, as vectors. */
static double worst_error(world *w, const float *got)
{
    size_t hidden = w->h.hidden;
    double worst = 0, *want = ep_alloc(hidden * sizeof(double));
    for (uint32_t i = 0; i < w->h.n_pairs; i++) {
        plain_expert(w->m, w->h.layer, w->pairs[i].expert, w->x + w->pairs[i].row * hidden, want);
        double diff = 0, size = 0;
        for (size_t j = 0; j < hidden; j++) {
            double d = (double)got[i * hidden + j] - want[j];
            diff += d * d;
            size += want[j] * want[j];
        }
        if (!(sqrt(diff / size) <= worst)) worst = sqrt(diff / size);
    }
    ep_free(want);
    return worst;
}

static void check_numbers(const char *name, double bound)
{
    world w;
    if (world_open(&w, name, 1, NULL, 0)) {
        float *got = ep_alloc((size_t)w.h.n_pairs * w.h.hidden * 4);
        for (int l = 0; l < w.m->shape.n_layers; l++) {
            w.h.layer = (uint16_t)l;
            w.h.form = (uint16_t)shard_layer_form(w.s, l);
            CHECK(ask(&w, w.s, &w.h, w.x, w.pairs, got));
            double worst = worst_error(&w, got);
            if (!(worst <= bound)) printf("    layer %d: error %g, bound %g\n", l, worst, bound);
            CHECK(worst <= bound);
        }
        ep_free(got);
    }
    world_close(&w);
}

/* Floats: rounding only. K-quants: rows are rounded to 8 bits twice, about 0.5 % each. */
static void numbers_micro(void)
{
    check_numbers(FIXTURE_MICRO, 2e-6);
}
static void numbers_demo(void)
{
    check_numbers(FIXTURE_DEMO, 0.03);
}

/* ---- company ------------------------------------------------------------------------------------
 */

static void compare_one_by_one(world *w, const float *want)
{
    size_t hidden = w->h.hidden;
    float *got = ep_alloc((size_t)w->h.n_pairs * hidden * 4);
    for (uint32_t i = 0; i < w->h.n_pairs; i++) {
        wire_header h = w->h;
        h.n_rows = h.n_pairs = 1;
        wire_pair pair = w->pairs[i];
        const float *x = w->x + pair.row * hidden;
        pair.row = 0;
        CHECK(ask(w, w->s, &h, x, &pair, got));
        CHECK(memcmp(got, want + i * hidden, hidden * 4) == 0);
    }
    ep_free(got);
}

static void compare_shuffled(world *w, shard *s, uint16_t form, const float *want)
{
    size_t hidden = w->h.hidden;
    uint32_t n = w->h.n_pairs;
    float *got = ep_alloc((size_t)n * hidden * 4);
    uint32_t *from = ep_alloc(n * sizeof(*from));
    wire_pair *pairs = ep_alloc(n * sizeof(*pairs));
    for (uint32_t i = 0; i < n; i++) {
        uint32_t j = fixture_random() % (i + 1);
        from[i] = from[j];
        from[j] = i;
    }
    for (uint32_t i = 0; i < n; i++)
        pairs[i] = w->pairs[from[i]];
    wire_header h = w->h;
    h.form = form;
    CHECK(ask(w, s, &h, w->x, pairs, got));
    for (uint32_t i = 0; i < n; i++)
        CHECK(memcmp(got + i * hidden, want + from[i] * hidden, hidden * 4) == 0);
    ep_free(got);
    ep_free(from);
    ep_free(pairs);
}

/* The same pairs, spread over the shards of another placement. */
static void compare_spread(world *w, const char *const *lists, int n_shards, const float *want)
{
    model_placement p;
    ep_err err = {{0}};
    CHECK(model_placement_make(&p, w->m->shape.n_experts, n_shards, lists, 7, &err) == EP_OK);
    size_t hidden = w->h.hidden;
    float *got = ep_alloc((size_t)w->h.n_pairs * hidden * 4);
    wire_pair *pairs = ep_alloc(w->h.n_pairs * sizeof(*pairs));
    uint32_t *from = ep_alloc(w->h.n_pairs * sizeof(*from)), covered = 0;
    for (int i = 0; i < n_shards; i++) {
        shard *s = fixture_shard(w->m, &p, i, 1, MAX_ROWS);
        wire_header h = w->h;
        h.shard = (uint16_t)i;
        h.n_pairs = 0;
        for (uint32_t j = 0; j < w->h.n_pairs; j++)
            if (p.owner[w->pairs[j].expert] == i) {
                from[h.n_pairs] = j;
                pairs[h.n_pairs++] = w->pairs[j];
            }
        if (s != NULL && h.n_pairs > 0) CHECK(ask(w, s, &h, w->x, pairs, got));
        for (uint32_t j = 0; j < h.n_pairs; j++)
            CHECK(memcmp(got + j * hidden, want + from[j] * hidden, hidden * 4) == 0);
        covered += h.n_pairs;
        CHECK(s != NULL);
        shard_close(s);
    }
    CHECK_INT(covered, w->h.n_pairs);
    ep_free(got);
    ep_free(pairs);
    ep_free(from);
    model_placement_fini(&p);
}

static void check_company(const char *name)
{
    world w;
    if (world_open(&w, name, 1, NULL, 0)) {
        w.h.n_rows = MAX_ROWS;
        w.h.n_pairs = (uint32_t)(MAX_ROWS * w.m->shape.top_k);
        float *want = ep_alloc((size_t)w.h.n_pairs * w.h.hidden * 4);
        CHECK(ask(&w, w.s, &w.h, w.x, w.pairs, want));
        compare_one_by_one(&w, want);
        compare_shuffled(&w, w.s, w.h.form, want);
        compare_shuffled(&w, w.s, KERN_ACT_F32, want);
        shard *two = fixture_shard(w.m, &w.p, 0, 2, MAX_ROWS);
        CHECK(two != NULL);
        if (two != NULL) compare_shuffled(&w, two, w.h.form, want);
        shard_close(two);
        compare_spread(&w, (const char *const[]){NULL, NULL, NULL}, 3, want);
        compare_spread(&w, (const char *const[]){"1", NULL}, 2, want);
        ep_free(want);
    }
    world_close(&w);
}

static void company_micro(void)
{
    check_company(FIXTURE_MICRO);
}
static void company_demo(void)
{
    check_company(FIXTURE_DEMO);
}

/* A row that is not finite spoils itself only. The slice is sent as floats and in the layer's form.
 */
static void non_finite_rows(void)
{
    world w;
    if (world_open(&w, FIXTURE_DEMO, 1, NULL, 0)) {
        size_t hidden = w.h.hidden, n = (size_t)w.h.n_pairs * hidden * 4;
        float *want = ep_alloc(n), *got = ep_alloc(n);
        for (int form = 0; form < 2; form++) {
            if (form == 1) w.h.form = KERN_ACT_F32;
            w.x[2 * hidden + 5] = 0.5f;
            CHECK(ask(&w, w.s, &w.h, w.x, w.pairs, want));
            for (int kind = 0; kind < 2; kind++) {
                w.x[2 * hidden + 5] = kind == 0 ? NAN : INFINITY;
                CHECK(ask(&w, w.s, &w.h, w.x, w.pairs, got));
                for (uint32_t i = 0; i < w.h.n_pairs; i++)
                    if (w.pairs[i].row != 2)
                        CHECK(memcmp(got + i * hidden, want + i * hidden, hidden * 4) == 0);
            }
        }
        ep_free(want);
        ep_free(got);
    }
    world_close(&w);
}

static void duplicate_pairs(void)
{
    world w;
    if (world_open(&w, FIXTURE_MICRO, 1, NULL, 0)) {
        size_t hidden = w.h.hidden;
        float *got = ep_alloc((size_t)w.h.n_pairs * hidden * 4);
        for (uint32_t i = 0; i < w.h.n_pairs; i++)
            w.pairs[i] = w.pairs[0];
        CHECK(ask(&w, w.s, &w.h, w.x, w.pairs, got));
        for (uint32_t i = 1; i < w.h.n_pairs; i++)
            CHECK(memcmp(got, got + i * hidden, hidden * 4) == 0);
        ep_free(got);
    }
    world_close(&w);
}

/* ---- memory and loading -------------------------------------------------------------------------
 */

static void no_allocation(void)
{
    world w;
    if (world_open(&w, FIXTURE_DEMO, 1, NULL, 0)) {
        size_t bytes, reply_bytes = 0;
        void *msg = fixture_slice(&w.h, w.x, w.pairs, &bytes);
        wire_header f = w.h;
        f.form = KERN_ACT_F32;
        f.n_rows = MAX_ROWS;
        f.n_pairs = (uint32_t)(MAX_ROWS * w.m->shape.top_k);
        size_t full_bytes;
        void *full = fixture_slice(&f, w.x, w.pairs, &full_bytes);
        uint64_t before = ep_alloc_count();
        for (int i = 0; i < 50; i++) {
            shard_answer(w.s, msg, bytes - (i % 10 == 9), 0, w.reply, &reply_bytes);
            shard_answer(w.s, full, full_bytes, 0, w.reply, &reply_bytes);
            CHECK_INT(reply_bytes, wire_reply_bytes(f.hidden, f.n_pairs));
        }
        CHECK_INT(ep_alloc_count(), before);
        const shard_counters *c = shard_counters_get(w.s);
        CHECK_INT(c->layers[1].slices, 95);
        CHECK_INT(c->layers[1].rows, 45 * 8 + 50 * MAX_ROWS);
        CHECK_INT(c->layers[1].pairs, 45 * (uint64_t)w.h.n_pairs + 50 * (uint64_t)f.n_pairs);
        CHECK_INT(c->layers[1].bytes_in, 45 * bytes + 50 * full_bytes);
        CHECK_INT(c->errors[WIRE_WHY_LENGTH], 5);
        uint64_t pairs = 0;
        for (int e = 0; e < c->n_owned; e++)
            pairs += c->expert_pairs[c->n_owned + e];
        CHECK_INT(pairs, c->layers[1].pairs);
        ep_free(msg);
        ep_free(full);
    }
    world_close(&w);
}

typedef struct seen_progress {
    uint64_t done, all;
    int calls, wrong;
} seen_progress;

static void on_progress(void *arg, uint64_t done, uint64_t all)
{
    seen_progress *p = arg;
    p->wrong += done < p->done || done > all || (p->all != 0 && p->all != all);
    p->done = done;
    p->all = all;
    p->calls++;
}

static void checksums_and_progress(void)
{
    world w;
    if (world_open(&w, FIXTURE_DEMO, 2, (const char *const[]){"0-3", NULL}, 1)) {
        uint64_t wanted = 0;
        for (int l = 0; l < w.m->shape.n_layers; l++)
            for (int role = 0; role < 3; role++)
                wanted += model_rows_bytes(model_experts(w.m, l, role)) * (uint64_t)w.p.n_owned[1];
        for (int threads = 1; threads <= 3; threads++) {
            seen_progress seen = {0};
            shard_options opt = {.m = w.m,
                                 .placement = &w.p,
                                 .shard_i = 1,
                                 .device = "cpu",
                                 .n_threads = threads,
                                 .max_rows = 4,
                                 .progress = on_progress,
                                 .progress_arg = &seen};
            shard *s = NULL;
            ep_err err = {{0}};
            CHECK(shard_open(&s, &opt, &err) == EP_OK);
            CHECK_INT(seen.done, wanted);
            CHECK_INT(seen.all, wanted);
            CHECK_INT(seen.wrong, 0);
            CHECK(seen.calls >= 1);
            if (threads == 1) CHECK_INT(seen.calls, w.m->shape.n_layers * w.p.n_owned[1]);
            for (int l = 0; s != NULL && l < w.m->shape.n_layers; l++)
                for (int e = 0; e < w.p.n_owned[1]; e++) {
                    CHECK(shard_expert_checksum(s, l, e) == shard_expert_checksum(w.s, l, e));
                    if (e > 0)
                        CHECK(shard_expert_checksum(s, l, e) != shard_expert_checksum(s, l, e - 1));
                }
            shard_close(s);
        }
        /* The same expert in another local place: the same sum. */
        model_placement p;
        ep_err err = {{0}};
        CHECK(model_placement_make(&p, w.m->shape.n_experts, 1, NULL, 1, &err) == EP_OK);
        shard *all = fixture_shard(w.m, &p, 0, 1, 4);
        CHECK(all != NULL);
        if (all != NULL)
            CHECK(shard_expert_checksum(all, 1, 4) == shard_expert_checksum(w.s, 1, 0));
        shard_close(all);
        model_placement_fini(&p);
    }
    world_close(&w);
}

static void bad_options(void)
{
    world w;
    if (world_open(&w, FIXTURE_MICRO, 2, NULL, 0)) {
        model_placement other = w.p;
        other.n_experts++;
        const shard_options good = {
            .m = w.m, .placement = &w.p, .device = "cpu", .n_threads = 1, .max_rows = 4};
        shard_options bad[7];
        for (int i = 0; i < 7; i++)
            bad[i] = good;
        bad[0].shard_i = 2;
        bad[1].shard_i = -1;
        bad[2].placement = &other;
        bad[3].max_rows = 0;
        bad[4].max_rows = 1 << 30;
        bad[5].n_threads = 0;
        bad[6].device = "toaster";
        for (int i = 0; i < 7; i++) {
            shard *s = NULL;
            ep_err err = {{0}};
            CHECK(shard_open(&s, &bad[i], &err) != EP_OK);
            CHECK(s == NULL && err.text[0] != '\0');
        }
    }
    world_close(&w);
}

/* Every allocation of shard_open fails once; each time the answer is clean and says something. */
static void allocation_failure(void)
{
    world w;
    if (world_open(&w, FIXTURE_MICRO, 2, NULL, 0)) {
        ep_status status = EP_ERR_NOMEM;
        int n = 0;
        while (status != EP_OK && n < 500) {
            shard_options opt = {
                .m = w.m, .placement = &w.p, .device = "cpu", .n_threads = 2, .max_rows = 4};
            shard *s = NULL;
            ep_err err = {{0}};
            ep_alloc_fail_at(++n);
            status = shard_open(&s, &opt, &err);
            ep_alloc_fail_at(0);
            if (status != EP_OK) {
                CHECK_INT(status, EP_ERR_NOMEM);
                CHECK(s == NULL && err.text[0] != '\0');
            }
            shard_close(s);
        }
        CHECK_INT(status, EP_OK);
        CHECK(n > 10);
        printf("    %d allocations failed in turn\n", n - 1);
    }
    world_close(&w);
}

static uint64_t resident_bytes(void)
{
    FILE *f = fopen("/proc/self/statm", "r");
    unsigned long long size = 0, resident = 0;
    if (f == NULL || fscanf(f, "%llu %llu", &size, &resident) != 2) resident = 0;
    if (f != NULL) fclose(f);
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Half of the experts: what the process grows by is their size, not theirs and the file's. */
static void resident_memory(void)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    test_skip("sanitizers keep freed memory");
    return;
#endif
    world w = {.m = fixture_model(FIXTURE_DEMO)}; /* nothing of this map was touched before */
    ep_err err = {{0}};
    CHECK(w.m != NULL);
    if (w.m == NULL) return;
    CHECK(model_placement_make(&w.p, w.m->shape.n_experts, 2, NULL, 7, &err) == EP_OK);
    uint64_t before = resident_bytes();
    w.s = fixture_shard(w.m, &w.p, 0, 1, 1);
    uint64_t after = resident_bytes();
    CHECK(w.s != NULL);
    if (w.s != NULL) {
        uint64_t experts = shard_counters_get(w.s)->weight_bytes;
        uint64_t grown = after > before ? after - before : 0;
        printf("    grew by %llu KiB for %llu KiB of experts\n", (unsigned long long)grown >> 10,
               (unsigned long long)experts >> 10);
        CHECK(experts > 1 << 20);
        CHECK(grown < experts + experts / 20 + (1 << 20));
    }
    world_close(&w);
}

static const test_case cases[] = {
    {"numbers_micro", numbers_micro},     {"numbers_demo", numbers_demo},
    {"company_micro", company_micro},     {"company_demo", company_demo},
    {"non_finite_rows", non_finite_rows}, {"duplicate_pairs", duplicate_pairs},
    {"no_allocation", no_allocation},     {"checksums_and_progress", checksums_and_progress},
    {"bad_options", bad_options},         {"allocation_failure", allocation_failure},
    {"resident_memory", resident_memory},
};

int main(int argc, char **argv)
{
    printf("seed %u\n", FIXTURE_SEED);
    ep_err err = {{0}};
    if (kern_select("auto", &err) != EP_OK) {
        printf("%s\n", err.text);
        return 1;
    }
    return test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
}
