/*
 * Fuzzes the configuration: what is accepted must print as YAML that parses to the same lines and
 * the same digest, every rank must lie within its table, and what is refused must say why, with the
 * file's name in front. Files are not touched: config_parse works on text.
 */
#include "daemon/config.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static ep_buf lines_of(const config *c)
{
    ep_buf lines = {0};
    if (config_print_lines(c, &lines) != EP_OK || ep_buf_add(&lines, "", 1) != EP_OK) abort();
    return lines;
}

static void check_ranks(const config *c)
{
    size_t bytes = 0;
    for (int i = 0; i < config_n_ranks(c); i++) {
        const config_rank *r = config_rank_at(c, i);
        if (r->name == NULL || r->host == NULL || r->device == NULL || r->threads < 1) abort();
        if (config_is_router(c, i) != (i < c->n_routers)) abort();
        bytes += strlen(r->name) + strlen(r->host) + strlen(r->device);
        if (r->experts != NULL) bytes += strlen(r->experts);
    }
    if (c->n_routers < 1 || c->n_shards < 1 || bytes > ((size_t)1 << 40)) abort();
    (void)config_is_local(c);
}

static void check_round(const config *c)
{
    ep_buf yaml = {0}, lines = lines_of(c);
    ep_err err = {""};
    config *again = NULL;
    if (config_print_yaml(c, &yaml) != EP_OK) abort();
    if (config_parse(&again, c->path, (const char *)yaml.data, yaml.len, &err) != EP_OK) abort();
    ep_buf lines_again = lines_of(again);
    char difference[256];
    config_first_difference((const char *)lines.data, (const char *)lines_again.data, difference,
                            sizeof(difference));
    if (strcmp(difference, "nothing") != 0) abort();
    if (config_digest(c) != config_digest(again)) abort();
    config_close(again);
    ep_buf_fini(&yaml);
    ep_buf_fini(&lines);
    ep_buf_fini(&lines_again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    config *c = NULL;
    ep_err err = {""};
    /* A copy of the exact size: reading one byte past the text is seen. */
    char *text = ep_alloc(size);
    if (text == NULL) return 0;
    if (size > 0) memcpy(text, data, size);
    ep_status status = config_parse(&c, "/etc/moed/fuzz.yaml", text, size, &err);
    ep_free(text);
    if (status == EP_OK) {
        check_ranks(c);
        check_round(c);
        config_close(c);
    } else if (strncmp(err.text, "/etc/moed/fuzz.yaml:", 20) != 0) {
        abort(); /* refused without a place */
    }
    return 0;
}
