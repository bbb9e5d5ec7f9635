/*
 * A safetensors checkpoint: one file, or the files that an index names, as one set of tensors. An
 * index must tell the truth: every tensor that it names is in the file that it names, every tensor
 * of its files is in the index, and no name is there twice. File names of an index are plain names
 * beside it, so a checkpoint cannot reach out of its folder. The index's total_size is not believed
 * nor checked: tools in use write different sums.
 *
 * Files come from disk (mapped) or from memory (tests). A file cut short by someone else while it
 * is mapped is not survived (SIGBUS).
 */
#include "model/file.h"
#include "model/json.h"
#include "model/safetensors_part.h"

#include <xxhash.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILE_END  ".safetensors"
#define INDEX_END ".safetensors.index.json"
enum { MAX_PARTS = 65536, MAX_FILE_NAME = 255 };

struct st_file {
    char *path, *folder;
    const st_bytes *memory; /* NULL: files are on disk */
    size_t n_memory;
    st_part *parts; /* [n_parts], by name */
    size_t n_parts;
    const st_tensor **sorted; /* [n_tensors], by name */
    size_t n_tensors;
};

static bool ends_with(const char *s, const char *tail)
{
    size_t n = strlen(s), m = strlen(tail);
    return n > m && strcmp(s + n - m, tail) == 0;
}

static ep_status no_memory(const char *path, ep_err *err)
{
    return ep_fail(err, EP_ERR_NOMEM, "%s: no memory", path);
}

/* ---- which file ---- */

static bool is_folder(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

typedef struct found {
    char index[MAX_FILE_NAME + 1], file[MAX_FILE_NAME + 1];
    size_t n_indexes, n_files;
} found;

static ep_status list_folder(const char *path, found *f, ep_err *err)
{
    DIR *d = opendir(path);
    if (d == NULL) return ep_fail(err, EP_ERR_IO, "%s: %s", path, strerror(errno));
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        if (e->d_name[0] == '.') continue;
        if (ends_with(e->d_name, INDEX_END)) {
            snprintf(f->index, sizeof(f->index), "%s", e->d_name);
            f->n_indexes++;
        } else if (ends_with(e->d_name, FILE_END)) {
            snprintf(f->file, sizeof(f->file), "%s", e->d_name);
            f->n_files++;
        }
    }
    closedir(d);
    return EP_OK;
}

bool model_safetensors_is(const char *path)
{
    return ends_with(path, FILE_END) || ends_with(path, INDEX_END) || is_folder(path);
}

/* The one file or index that a folder means. A choice between several is left to the user. */
static ep_status choose(const char *path, char **out, ep_err *err)
{
    found f = {.n_files = 0};
    ep_status status = list_folder(path, &f, err);
    if (status != EP_OK) return status;
    if (f.n_indexes == 0 && f.n_files == 0)
        return ep_fail(err, EP_ERR_INVALID, "%s: a folder without a safetensors file", path);
    if (f.n_indexes > 1 || (f.n_indexes == 0 && f.n_files > 1))
        return ep_fail(err, EP_ERR_INVALID,
                       "%s: %zu indexes and %zu safetensors files: name the one that is meant",
                       path, f.n_indexes, f.n_files);
    size_t n = strlen(path); /* without slashes at its end, so that the folder has a name */
    while (n > 0 && path[n - 1] == '/')
        n--;
    *out = ep_strfmt("%.*s/%s", (int)n, path, f.n_indexes ? f.index : f.file);
    if (*out == NULL) return no_memory(path, err);
    if (f.n_indexes == 0) return EP_OK;
    char *rival = ep_strdup(*out); /* X.safetensors beside X.safetensors.index.json */
    if (rival != NULL) {
        rival[strlen(rival) - strlen(".index.json")] = '\0';
        if (access(rival, F_OK) == 0)
            status = ep_fail(err, EP_ERR_INVALID,
                             "%s: there is an index and also %.200s: name the one that is meant",
                             path, rival + n + 1);
        ep_free(rival);
    } else {
        status = no_memory(path, err);
    }
    if (status == EP_OK) return EP_OK;
    ep_free(*out);
    *out = NULL;
    return status;
}

/* Sets path and folder. */
static ep_status locate(st_file *f, const char *path, ep_err *err)
{
    ep_status status = EP_OK;
    if (is_folder(path)) {
        status = choose(path, &f->path, err);
        if (status != EP_OK) return status;
    } else {
        f->path = ep_strdup(path);
    }
    if (f->path == NULL) return no_memory(path, err);
    const char *slash = strrchr(f->path, '/');
    f->folder = slash == NULL      ? ep_strdup(".")
                : slash == f->path ? ep_strdup("/")
                                   : ep_strfmt("%.*s", (int)(slash - f->path), f->path);
    return f->folder != NULL ? EP_OK : no_memory(path, err);
}

/* ---- a part ---- */

static ep_status map_part(st_part *p, ep_err *err)
{
    struct stat st;
    int fd = open(p->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return ep_fail(err, EP_ERR_IO, "%s: %s", p->path, strerror(errno));
    ep_status status = EP_OK;
    if (fstat(fd, &st) != 0)
        status = ep_fail(err, EP_ERR_IO, "%s: %s", p->path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        status = ep_fail(err, EP_ERR_INVALID, "%s: not a regular file", p->path);
    else if (st.st_size < 8)
        status = ep_fail(err, EP_ERR_INVALID, "%s: not a safetensors file (%lld bytes)", p->path,
                         (long long)st.st_size);
    if (status == EP_OK) {
        void *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED) {
            status = ep_fail(err, EP_ERR_IO, "%s: cannot map it: %s", p->path, strerror(errno));
        } else {
            p->map = map;
            p->size = (size_t)st.st_size;
            p->mapped = true;
        }
    }
    close(fd);
    return status;
}

static ep_status find_in_memory(const st_file *f, st_part *p, ep_err *err)
{
    for (size_t i = 0; i < f->n_memory; i++) {
        if (strcmp(f->memory[i].name, p->name) != 0) continue;
        p->map = f->memory[i].data;
        p->size = f->memory[i].size;
        return EP_OK;
    }
    return ep_fail(err, EP_ERR_IO, "%s: no such file", p->path);
}

/* Appends a part. path NULL: the file `name` beside the index. */
static ep_status add_part(st_file *f, const char *name, const char *path, ep_err *err)
{
    st_part *p = &f->parts[f->n_parts++];
    p->name = ep_strdup(name);
    p->path = path != NULL        ? ep_strdup(path)
              : f->memory != NULL ? ep_strdup(name)
                                  : ep_strfmt("%s/%s", f->folder, name);
    if (p->name == NULL || p->path == NULL) return no_memory(name, err);
    ep_status status = f->memory != NULL ? find_in_memory(f, p, err) : map_part(p, err);
    return status == EP_OK ? st_part_parse(p, err) : status;
}

/* ---- the index ---- */

static int compare_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static bool is_plain_name(const char *s)
{
    return st_text_is_clean(s, MAX_FILE_NAME) && s[0] != '.' && strchr(s, '/') == NULL &&
           ends_with(s, FILE_END);
}

/* Fills names with the file of each entry. */
static ep_status read_map(const st_file *f, model_json *map, const char **names, ep_err *err)
{
    void *at = NULL;
    const char *key;
    model_json *v;
    for (size_t n = 0; model_json_next(map, &at, &key, &v); n++) {
        names[n] = model_json_str(v);
        if (names[n] == NULL || !is_plain_name(names[n]))
            return ep_fail(
                err, EP_ERR_INVALID,
                "%s: the file of tensor %.200s is not the plain name of a safetensors file",
                f->path, key);
    }
    return EP_OK;
}

/* Opens every file that the index names, in order of names. */
static ep_status open_parts(st_file *f, model_json *map, ep_err *err)
{
    size_t n = model_json_size(map), n_files = 0;
    const char **names = ep_alloc(n * sizeof(*names));
    if (names == NULL) return no_memory(f->path, err);
    ep_status status = read_map(f, map, names, err);
    if (status == EP_OK) {
        qsort(names, n, sizeof(*names), compare_text);
        for (size_t i = 0; i < n; i++)
            if (i == 0 || strcmp(names[i], names[n_files - 1]) != 0) names[n_files++] = names[i];
        if (n_files > MAX_PARTS)
            status = ep_fail(err, EP_ERR_TOO_LARGE, "%s: %zu files are more than the limit of %d",
                             f->path, n_files, MAX_PARTS);
    }
    if (status == EP_OK) {
        f->parts = ep_calloc(n_files, sizeof(*f->parts));
        if (f->parts == NULL) status = no_memory(f->path, err);
    }
    for (size_t i = 0; i < n_files && status == EP_OK; i++)
        status = add_part(f, names[i], NULL, err);
    ep_free(names);
    return status;
}

static int compare_tensors(const void *a, const void *b)
{
    const st_tensor *x = *(const st_tensor *const *)a, *y = *(const st_tensor *const *)b;
    return strcmp(x->name, y->name);
}

/* One index over all parts. */
static ep_status merge(st_file *f, ep_err *err)
{
    size_t total = 0;
    for (size_t i = 0; i < f->n_parts; i++)
        total += f->parts[i].n_tensors;
    f->sorted = ep_alloc(total * sizeof(*f->sorted));
    if (f->sorted == NULL) return no_memory(f->path, err);
    for (size_t i = 0; i < f->n_parts; i++) {
        for (size_t j = 0; j < f->parts[i].n_tensors; j++) {
            f->parts[i].tensors[j].part = i;
            f->sorted[f->n_tensors++] = &f->parts[i].tensors[j];
        }
    }
    qsort(f->sorted, f->n_tensors, sizeof(*f->sorted), compare_tensors);
    for (size_t i = 1; i < f->n_tensors; i++) {
        const st_tensor *x = f->sorted[i - 1], *y = f->sorted[i];
        if (strcmp(x->name, y->name) == 0)
            return ep_fail(err, EP_ERR_INVALID, "%s: tensor %s is in %.200s and in %.200s", f->path,
                           x->name, f->parts[x->part].name, f->parts[y->part].name);
    }
    return EP_OK;
}

/* Every entry is where it says. As names are unique on both sides, equal counts prove the converse.
 */
static ep_status check_map(const st_file *f, model_json *map, ep_err *err)
{
    void *at = NULL;
    const char *key;
    model_json *v;
    while (model_json_next(map, &at, &key, &v)) {
        const st_tensor *t = st_find(f, key);
        if (t == NULL || strcmp(f->parts[t->part].name, model_json_str(v)) != 0)
            return ep_fail(err, EP_ERR_INVALID,
                           "%s: tensor %.200s is said to be in %.200s, but is %s%.200s", f->path,
                           key, model_json_str(v), t != NULL ? "in " : "in none of the files",
                           t != NULL ? f->parts[t->part].name : "");
    }
    for (size_t i = 0; f->n_tensors != model_json_size(map) && i < f->n_tensors; i++)
        if (model_json_member(map, f->sorted[i]->name) == NULL)
            return ep_fail(err, EP_ERR_INVALID, "%s: tensor %s of %.200s is not in the index",
                           f->path, f->sorted[i]->name, f->parts[f->sorted[i]->part].name);
    return EP_OK;
}

/* Frees the document. */
static ep_status open_indexed(st_file *f, model_json *doc, ep_err *err)
{
    model_json *map = model_json_member(doc, "weight_map");
    ep_status status = EP_OK;
    if (!model_json_is_object(map) || model_json_size(map) == 0)
        status =
            ep_fail(err, EP_ERR_INVALID, "%s: weight_map is missing, empty or no object", f->path);
    if (status == EP_OK) status = open_parts(f, map, err);
    if (status == EP_OK) status = merge(f, err);
    if (status == EP_OK) status = check_map(f, map, err);
    model_json_free(doc);
    return status;
}

static ep_status open_single(st_file *f, const char *name, ep_err *err)
{
    f->parts = ep_calloc(1, sizeof(*f->parts));
    if (f->parts == NULL) return no_memory(f->path, err);
    ep_status status = add_part(f, name, f->path, err);
    return status == EP_OK ? merge(f, err) : status;
}

/* ---- opening ---- */

ep_status st_open(st_file **out, const char *path, ep_err *err)
{
    st_file *f = ep_calloc(1, sizeof(*f));
    if (f == NULL) return no_memory(path, err);
    ep_status status = locate(f, path, err);
    if (status != EP_OK) goto fail;
    if (ends_with(f->path, INDEX_END)) {
        model_json *doc;
        status = model_json_load(&doc, f->path, ST_MAX_HEADER, err);
        if (status == EP_AGAIN) status = ep_fail(err, EP_ERR_IO, "%s: no such file", f->path);
        if (status == EP_OK) status = open_indexed(f, doc, err);
    } else {
        const char *slash = strrchr(f->path, '/');
        status = open_single(f, slash != NULL ? slash + 1 : f->path, err);
    }
    if (status != EP_OK) goto fail;
    *out = f;
    return EP_OK;
fail:
    st_close(f);
    return status;
}

ep_status st_open_bytes(st_file **out, const st_bytes *parts, size_t n_parts, const st_bytes *index,
                        ep_err *err)
{
    const char *name = index != NULL ? index->name : parts[0].name;
    st_file *f = ep_calloc(1, sizeof(*f));
    if (f == NULL) return no_memory(name, err);
    ep_status status = EP_OK;
    f->memory = parts;
    f->n_memory = n_parts;
    f->path = ep_strdup(name);
    f->folder = ep_strdup("memory");
    if (f->path == NULL || f->folder == NULL) {
        status = no_memory(name, err);
    } else if (index != NULL) {
        model_json *doc;
        status = model_json_parse(&doc, index->data, index->size, name, err);
        if (status == EP_OK) status = open_indexed(f, doc, err);
    } else {
        status = open_single(f, name, err);
    }
    if (status != EP_OK) goto fail;
    *out = f;
    return EP_OK;
fail:
    st_close(f);
    return status;
}

void st_close(st_file *f)
{
    if (f == NULL) return;
    for (size_t i = 0; i < f->n_parts; i++) {
        st_part *p = &f->parts[i];
        st_part_fini(p);
        if (p->mapped) munmap((void *)(uintptr_t)p->map, p->size);
        ep_free(p->name);
        ep_free(p->path);
    }
    ep_free(f->parts);
    ep_free(f->sorted);
    ep_free(f->path);
    ep_free(f->folder);
    ep_free(f);
}

/* ---- looking ---- */

const char *st_path(const st_file *f)
{
    return f->path;
}

const char *st_folder(const st_file *f)
{
    return f->folder;
}

size_t st_n_parts(const st_file *f)
{
    return f->n_parts;
}

const char *st_part_name(const st_file *f, size_t i)
{
    return f->parts[i].name;
}

size_t st_n_tensors(const st_file *f)
{
    return f->n_tensors;
}

const st_tensor *st_tensor_at(const st_file *f, size_t i)
{
    return i < f->n_tensors ? f->sorted[i] : NULL;
}

const st_tensor *st_find(const st_file *f, const char *name)
{
    size_t lo = 0, hi = f->n_tensors;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        int c = strcmp(name, f->sorted[mid]->name);
        if (c == 0) return f->sorted[mid];
        if (c < 0)
            hi = mid;
        else
            lo = mid + 1;
    }
    return NULL;
}

size_t st_n_notes(const st_file *f)
{
    return f->parts[0].n_notes;
}

void st_note(const st_file *f, size_t i, const char **key, const char **value)
{
    *key = f->parts[0].notes[i].key;
    *value = f->parts[0].notes[i].value;
}

uint64_t st_digest(const st_file *f)
{
    uint64_t h = 0;
    for (size_t i = 0; i < f->n_parts; i++) {
        const st_part *p = &f->parts[i];
        uint8_t size[8];
        ep_store_le(size, p->size, sizeof(size));
        h = XXH3_64bits_withSeed(p->name, strlen(p->name), h);
        h = XXH3_64bits_withSeed(p->map, p->data_start, h);
        h = XXH3_64bits_withSeed(size, sizeof(size), h);
        h = model_sample(p->map + p->data_start, p->size - p->data_start, h);
    }
    return h;
}

void st_forget(const st_file *f, const void *p, size_t bytes)
{
    for (size_t i = 0; i < f->n_parts; i++) {
        const st_part *part = &f->parts[i];
        if (part->mapped && model_forget_in(part->map, part->size, p, bytes)) return;
    }
}

const char *st_tensor_path(const st_file *f, const st_tensor *t)
{
    return f->parts[t->part].path;
}

ep_status st_misshapen(const st_file *f, const st_tensor *t, const char *want, ep_err *err)
{
    char shape[256];
    return ep_fail(err, EP_ERR_INVALID, "%s: tensor %s is %s %s, expected %s", st_tensor_path(f, t),
                   t->name, st_type_name(t->type), st_shape_text(shape, sizeof(shape), t), want);
}
