/*
 * The configuration file: libyaml's document tree walked against a table of keys. The table is the
 * only place that knows a key: it parses, gives defaults, bounds, prints back and documents. All
 * mistakes are collected, so a person fixes a file in one go. Aliases, several documents and
 * duplicate keys are refused. Scalars are read as text: no YAML type guessing ("no" and 010 are
 * what they look like).
 */
#include "daemon/config.h"
#include "daemon/config_keys.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <yaml.h>

enum { MAX_FILE_BYTES = 1 << 20, MAX_RANKS = 4096, MAX_DEPTH = 16 };

typedef struct reader {
    config *c;
    yaml_document_t doc;
    const char *name;
    ep_err *err;
    size_t err_len;
    int n_errors;
    yaml_node_t socket_at, control_at; /* only their marks: judged when all is read */
} reader;

static void complain(reader *r, const yaml_node_t *node, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

static void complain(reader *r, const yaml_node_t *node, const char *fmt, ...)
{
    r->n_errors++;
    if (r->err == NULL) return;
    size_t left = sizeof(r->err->text) - r->err_len;
    if (left < 2) return;
    char *at = r->err->text + r->err_len;
    size_t line = node ? node->start_mark.line + 1 : 1,
           col = node ? node->start_mark.column + 1 : 1;
    int n = snprintf(at, left, "%s%s:%zu:%zu: ", r->err_len ? "\n" : "", r->name, line, col);
    int m = -1;
    if (n >= 0 && (size_t)n < left) {
        va_list ap;
        va_start(ap, fmt);
        m = vsnprintf(at + n, left - (size_t)n, fmt, ap);
        va_end(ap);
    }
    /* A message that does not fit whole is left out; the first, which quotes something very long,
     * is cut. */
    if (m >= 0 && (size_t)(n + m) < left)
        r->err_len += (size_t)(n + m);
    else if (r->err_len > 0)
        *at = '\0';
    else
        r->err_len = left - 1;
}

static const char *keep(reader *r, const char *s, size_t n)
{
    char *copy = ep_arena_get(&r->c->strings, n + 1);
    if (copy == NULL) {
        complain(r, NULL, "the file's text is too long");
        return "";
    }
    memcpy(copy, s, n);
    copy[n] = '\0';
    return copy;
}

/* ---- values ---- */

static const char *text_of(const yaml_node_t *n)
{
    return (const char *)n->data.scalar.value;
}

static bool is_null(const yaml_node_t *n)
{
    return n->type == YAML_SCALAR_NODE && n->data.scalar.style == YAML_PLAIN_SCALAR_STYLE &&
           (n->data.scalar.length == 0 || strcmp(text_of(n), "~") == 0 ||
            strcmp(text_of(n), "null") == 0);
}

static void set_int(reader *r, const config_key *k, const char *path, const yaml_node_t *n,
                    void *base)
{
    char *end;
    errno = 0;
    long v = strtol(text_of(n), &end, 10);
    if (n->data.scalar.length == 0 || *end != '\0' || errno != 0) {
        complain(r, n, "'%s' needs a whole number, got '%s'", path, text_of(n));
        return;
    }
    if (k->min == k->max && v != k->min) {
        complain(r, n, "'%s' other than %ld is not implemented yet, got %ld", path, k->min, v);
        return;
    }
    if (v < k->min || v > k->max) {
        complain(r, n, "'%s' must lie between %ld and %ld, got %ld", path, k->min, k->max, v);
        return;
    }
    *(int *)((char *)base + k->offset) = (int)v;
}

static bool is_choice(const char *choices, const char *text)
{
    size_t n = strlen(text);
    if (strchr(text, '|') != NULL) return false; /* would match across two */
    for (const char *at = choices; n > 0 && (at = strstr(at, text)) != NULL; at++)
        if ((at == choices || at[-1] == '|') && (at[n] == '|' || at[n] == '\0')) return true;
    return false;
}

static void set_value(reader *r, const config_key *k, const char *path, const yaml_node_t *n,
                      void *base)
{
    if (n->type != YAML_SCALAR_NODE) {
        complain(r, n, "'%s' needs a single value", path);
        return;
    }
    const char **s = (const char **)(void *)((char *)base + k->offset);
    if (strlen(text_of(n)) != n->data.scalar.length) {
        complain(r, n, "'%s' holds a zero byte", path);
    } else if (k->type == CONFIG_INT) {
        set_int(r, k, path, n, base);
    } else if (is_null(n)) {
        if (k->type == CONFIG_TEXT_OR_NULL)
            *s = NULL;
        else
            complain(r, n, "'%s' may not be empty", path);
    } else if (k->choices != NULL && !is_choice(k->choices, text_of(n))) {
        complain(r, n, "'%s' must be one of %s, got '%s'", path, k->choices, text_of(n));
    } else {
        *s = keep(r, text_of(n), n->data.scalar.length);
        if (s == &r->c->front.socket) r->socket_at = *n;
        if (s == &r->c->front.control) r->control_at = *n;
    }
}

/* ---- keys ---- */

static int distance(const char *a, const char *b)
{
    size_t n = strlen(a), m = strlen(b);
    int row[64];
    if (n >= 60 || m >= 60) return 100;
    for (size_t j = 0; j <= m; j++)
        row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            int above = row[j], best = diagonal + (a[i - 1] != b[j - 1]);
            if (above + 1 < best) best = above + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diagonal = above;
            row[j] = best;
        }
    }
    return row[m];
}

static void unknown_key(reader *r, const yaml_node_t *n, const char *in, const char *const *names,
                        int n_names)
{
    const char *best = NULL;
    int best_distance = 4;
    for (int i = 0; i < n_names; i++) {
        int d = distance(text_of(n), names[i]);
        if (d < best_distance && d * 2 < (int)strlen(names[i]) + 2)
            best_distance = d, best = names[i];
    }
    complain(r, n, "unknown key '%s' in %s%s%s%s", text_of(n), in, best ? "; did you mean '" : "",
             best ? best : "", best ? "'?" : "");
}

/* Looks at the key of pair i of a mapping: NULL (with a complaint) unless it is new text. */
static const yaml_node_t *take_key(reader *r, const yaml_node_t *map, size_t i, const char *in)
{
    const yaml_node_pair_t *pairs = map->data.mapping.pairs.start;
    const yaml_node_t *key = yaml_document_get_node(&r->doc, pairs[i].key);
    if (key == NULL || key->type != YAML_SCALAR_NODE ||
        strlen(text_of(key)) != key->data.scalar.length) {
        complain(r, key, "a key of %s is not a plain word", in);
        return NULL;
    }
    for (size_t j = 0; j < i; j++) {
        const yaml_node_t *other = yaml_document_get_node(&r->doc, pairs[j].key);
        if (other != NULL && other->type == YAML_SCALAR_NODE &&
            strcmp(text_of(other), text_of(key)) == 0) {
            complain(r, key, "'%s' stands twice in %s, first in line %zu", text_of(key), in,
                     other->start_mark.line + 1);
            return NULL;
        }
    }
    return key;
}

static size_t n_pairs(const yaml_node_t *map)
{
    return (size_t)(map->data.mapping.pairs.top - map->data.mapping.pairs.start);
}

static const yaml_node_t *value_at(reader *r, const yaml_node_t *map, size_t i)
{
    return yaml_document_get_node(&r->doc, map->data.mapping.pairs.start[i].value);
}

/* Fills one struct from one mapping by the keys of a section. */
static void read_section(reader *r, const config_section *s, const char *path,
                         const yaml_node_t *map, void *base)
{
    if (map->type != YAML_MAPPING_NODE) {
        complain(r, map, "'%s' needs keys and values", path);
        return;
    }
    const char *names[CONFIG_MAX_KEYS];
    for (int i = 0; i < s->n_keys; i++)
        names[i] = s->keys[i].name;
    for (size_t i = 0; i < n_pairs(map); i++) {
        char in[160], full[256];
        snprintf(in, sizeof(in), "'%s'", path);
        const yaml_node_t *key = take_key(r, map, i, in), *value = value_at(r, map, i);
        if (key == NULL || value == NULL) continue;
        const config_key *k = NULL;
        for (int j = 0; j < s->n_keys; j++)
            if (strcmp(s->keys[j].name, text_of(key)) == 0) k = &s->keys[j];
        if (k == NULL) {
            unknown_key(r, key, in, names, s->n_keys);
            continue;
        }
        snprintf(full, sizeof(full), "%s.%s", path, k->name);
        set_value(r, k, full, value, base);
    }
}

static void read_ranks(reader *r, const config_section *s, const yaml_node_t *list,
                       config_rank **out, int *n_out)
{
    if (list->type != YAML_SEQUENCE_NODE) {
        complain(r, list, "'%s' needs a list", s->name);
        return;
    }
    size_t n = (size_t)(list->data.sequence.items.top - list->data.sequence.items.start);
    if (n > MAX_RANKS) {
        complain(r, list, "'%s' has %zu entries, at most %d are possible", s->name, n, MAX_RANKS);
        return;
    }
    config_rank *ranks = ep_arena_get(&r->c->strings, (n ? n : 1) * sizeof(*ranks));
    if (ranks == NULL) {
        complain(r, list, "'%s' is too long", s->name);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        const yaml_node_t *item =
            yaml_document_get_node(&r->doc, list->data.sequence.items.start[i]);
        char path[64], name[32];
        snprintf(path, sizeof(path), "%s[%zu]", s->name, i);
        snprintf(name, sizeof(name), "%c%zu", s->name[0], i);
        ranks[i] = (config_rank){0};
        config_defaults(s, &ranks[i]);
        ranks[i].name = keep(r, name, strlen(name));
        if (item == NULL) continue;
        ranks[i].line = item->start_mark.line;
        ranks[i].column = item->start_mark.column;
        read_section(r, s, path, item, &ranks[i]);
    }
    *out = ranks;
    *n_out = (int)n;
}

static void read_top(reader *r, const yaml_node_t *root)
{
    config *c = r->c;
    if (root->type != YAML_MAPPING_NODE) {
        complain(r, root, "the file must hold keys and values");
        return;
    }
    for (size_t i = 0; i < n_pairs(root); i++) {
        const yaml_node_t *key = take_key(r, root, i, "the file"), *value = value_at(r, root, i);
        if (key == NULL || value == NULL) continue;
        const char *name = text_of(key);
        const config_section *s = config_section_find(name);
        if (strcmp(name, "spares") == 0) {
            if (value->type != YAML_SEQUENCE_NODE ||
                value->data.sequence.items.top != value->data.sequence.items.start)
                complain(r, value, "'spares' is not implemented yet: it must be an empty list");
        } else if (s == NULL) {
            unknown_key(r, key, "the file", config_top_names, config_n_top_names);
        } else if (s->is_value) {
            set_value(r, &s->keys[0], name, value, c);
        } else if (strcmp(name, "routers") == 0) {
            read_ranks(r, s, value, &c->routers, &c->n_routers);
        } else if (strcmp(name, "shards") == 0) {
            read_ranks(r, s, value, &c->shards, &c->n_shards);
        } else if (!is_null(value)) {
            read_section(r, s, name, value, c);
        }
    }
}

/* ---- what a key alone cannot tell ---- */

/* A node at the place of a rank's entry, for complaints. */
static yaml_node_t rank_node(const config_rank *rank)
{
    return (yaml_node_t){.start_mark = {.line = rank->line, .column = rank->column}};
}

static void check_ranks(reader *r)
{
    config *c = r->c;
    int n = config_n_ranks(c);
    if (c->n_routers == 0) complain(r, NULL, "'routers' needs at least one entry");
    if (c->n_shards == 0) complain(r, NULL, "'shards' needs at least one entry");
    for (int i = 0; i < n; i++) {
        const config_rank *a = config_rank_at(c, i);
        const yaml_node_t at = rank_node(a);
        for (int j = 0; j < i; j++)
            if (strcmp(a->name, config_rank_at(c, j)->name) == 0)
                complain(r, &at, "two ranks are called '%s'", a->name);
        if (config_is_router(c, i) && strcmp(a->device, "cpu") != 0)
            complain(r, &at, "router '%s': device '%s' is not implemented, only cpu", a->name,
                     a->device);
        bool cuda = strncmp(a->device, "cuda:", 5) == 0 && a->device[5] != '\0' &&
                    strspn(a->device + 5, "0123456789") == strlen(a->device + 5);
        if (!cuda && strcmp(a->device, "cpu") != 0 && strcmp(a->device, "auto") != 0)
            complain(r, &at, "'%s': device must be cpu, cuda:N or auto, got '%s'", a->name,
                     a->device);
    }
    if (strcmp(c->placement.strategy, "explicit") == 0)
        for (int i = 0; i < c->n_shards; i++) {
            const yaml_node_t at = rank_node(&c->shards[i]);
            if (c->shards[i].experts == NULL)
                complain(r, &at, "placement is explicit, but shard '%s' has no 'experts'",
                         c->shards[i].name);
        }
}

/* Relative paths are relative to the file's folder: ranks start anywhere. */
static const char *beside_file(reader *r, const char *path)
{
    char text[PATH_MAX];
    const char *slash = strrchr(r->c->path, '/');
    if (path[0] == '/' || slash == NULL) return path;
    snprintf(text, sizeof(text), "%.*s/%s", (int)(slash - r->c->path), r->c->path, path);
    return keep(r, text, strlen(text));
}

void config_default_socket(char *out, size_t out_bytes)
{
    const char *run = getenv("XDG_RUNTIME_DIR");
    if (geteuid() == 0)
        snprintf(out, out_bytes, "/run/moed/moed.sock");
    else if (run != NULL)
        snprintf(out, out_bytes, "%s/moed.sock", run);
    else
        snprintf(out, out_bytes, "/tmp/moed-%u.sock", (unsigned)geteuid()); /* users do not meet */
}

/* Default of front.control: a socket beside the clients' one, for ranks of this machine. */
static void resolve(reader *r)
{
    config *c = r->c;
    if (c->model == NULL) {
        complain(r, NULL, "'model' is missing: the GGUF file or checkpoint folder to serve");
        return;
    }
    char text[PATH_MAX];
    c->model = beside_file(r, c->model);
    if (c->packed != NULL) c->packed = beside_file(r, c->packed);
    if (c->front.socket == NULL) {
        if (!config_is_local(
                c)) /* the default follows the environment, which differs between hosts */
            complain(r, NULL, "'front.socket' is needed when a rank runs on another host");
        config_default_socket(text, sizeof(text));
        c->front.socket = keep(r, text, strlen(text));
    }
    c->front.socket = beside_file(r, c->front.socket);
    if (strlen(c->front.socket) > 90)
        complain(r, &r->socket_at,
                 "'front.socket' is longer than a Unix socket's path may be (90)");
    if (c->front.control == NULL) {
        if (!config_is_local(c)) {
            complain(r, NULL,
                     "'front.control' is needed when a rank runs on another host: tcp:HOST:PORT "
                     "where ranks reach the daemon");
            return;
        }
        snprintf(text, sizeof(text), "unix:%s.ranks", c->front.socket);
        c->front.control = keep(r, text, strlen(text));
    } else if (strncmp(c->front.control, "unix:", 5) != 0 &&
               strncmp(c->front.control, "tcp:", 4) != 0) {
        complain(r, &r->control_at, "'front.control' must be unix:PATH or tcp:HOST:PORT, got '%s'",
                 c->front.control);
    }
}

static void read_document(reader *r, const char *text, size_t len)
{
    yaml_parser_t parser;
    if (!yaml_parser_initialize(&parser)) {
        complain(r, NULL, "out of memory");
        return;
    }
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, len);
    if (!yaml_parser_load(&parser, &r->doc)) {
        yaml_node_t at = {.start_mark = parser.problem_mark};
        complain(r, &at, "%s", parser.problem ? parser.problem : "not YAML");
    } else {
        yaml_node_t *root = yaml_document_get_root_node(&r->doc);
        if (root == NULL)
            complain(r, NULL, "the file is empty");
        else
            read_top(r, root);
        yaml_document_delete(&r->doc);
        yaml_document_t second;
        if (r->n_errors == 0 && yaml_parser_load(&parser, &second)) {
            if (yaml_document_get_root_node(&second) != NULL)
                complain(r, NULL, "the file holds more than one document");
            yaml_document_delete(&second);
        }
    }
    yaml_parser_delete(&parser);
}

/* Looks at the events before the tree is built. Aliases can blow a small file up and make cycles,
 * and libyaml needs quadratic time for deep nesting. NULL, or what is not allowed. */
static const char *forbidden(const char *text, size_t len)
{
    yaml_parser_t parser;
    if (!yaml_parser_initialize(&parser)) return "out of memory";
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, len);
    const char *what = NULL;
    int depth = 0;
    for (bool end = false; !end && what == NULL;) {
        yaml_event_t event;
        if (!yaml_parser_parse(&parser, &event)) break; /* reported by read_document */
        if (event.type == YAML_MAPPING_START_EVENT || event.type == YAML_SEQUENCE_START_EVENT)
            depth++;
        if (event.type == YAML_MAPPING_END_EVENT || event.type == YAML_SEQUENCE_END_EVENT) depth--;
        if (event.type == YAML_ALIAS_EVENT) what = "aliases (*name) are not allowed";
        if (depth > MAX_DEPTH) what = "lists and keys lie too deep in each other";
        end = event.type == YAML_STREAM_END_EVENT;
        yaml_event_delete(&event);
    }
    yaml_parser_delete(&parser);
    return what;
}

ep_status config_parse(config **out, const char *name, const char *text, size_t len, ep_err *err)
{
    if (len > MAX_FILE_BYTES) return ep_fail(err, EP_ERR_TOO_LARGE, "%s: larger than 1 MiB", name);
    config *c = ep_calloc(1, sizeof(*c));
    if (c == NULL) return ep_fail(err, EP_ERR_NOMEM, "%s: out of memory", name);
    if (ep_arena_init(&c->strings, 128 * len + ((size_t)64 << 10)) != EP_OK) {
        config_close(c);
        return ep_fail(err, EP_ERR_NOMEM, "%s: out of memory", name);
    }
    reader r = {.c = c, .name = name, .err = err};
    for (int i = 0; i < config_n_sections; i++)
        if (!config_sections[i].is_list) config_defaults(&config_sections[i], c);
    c->path = keep(&r, name, strlen(name));
    const char *what = forbidden(text, len);
    if (what != NULL)
        complain(&r, NULL, "%s", what);
    else
        read_document(&r, text, len);
    if (r.n_errors == 0) check_ranks(&r);
    if (r.n_errors == 0) resolve(&r);
    if (r.n_errors > 0) {
        config_close(c);
        return EP_ERR_INVALID;
    }
    *out = c;
    return EP_OK;
}

ep_status config_load(config **out, const char *path, ep_err *err)
{
    char absolute[PATH_MAX];
    if (realpath(path, absolute) == NULL)
        return ep_fail(err, EP_ERR_INVALID, "%s: %s", path, strerror(errno));
    FILE *f = fopen(absolute, "rb");
    if (f == NULL) return ep_fail(err, EP_ERR_INVALID, "%s: %s", path, strerror(errno));
    ep_buf text = {0};
    ep_status status = ep_buf_reserve(&text, MAX_FILE_BYTES + 1);
    if (status == EP_OK) {
        text.len = fread(text.data, 1, MAX_FILE_BYTES + 1, f);
        status = ferror(f) ? ep_fail(err, EP_ERR_IO, "%s: cannot be read", path)
                           : config_parse(out, absolute, (const char *)text.data, text.len, err);
    }
    fclose(f);
    ep_buf_fini(&text);
    return status;
}

void config_close(config *c)
{
    if (c == NULL) return;
    ep_arena_fini(&c->strings);
    ep_free(c);
}

int config_n_ranks(const config *c)
{
    return c->n_routers + c->n_shards;
}

bool config_is_router(const config *c, int rank)
{
    return rank < c->n_routers;
}

const config_rank *config_rank_at(const config *c, int rank)
{
    return rank < c->n_routers ? &c->routers[rank] : &c->shards[rank - c->n_routers];
}

bool config_is_local(const config *c)
{
    for (int i = 0; i < config_n_ranks(c); i++)
        if (strcmp(config_rank_at(c, i)->host, "localhost") != 0) return false;
    return true;
}
