/*
 * Printing a resolved configuration back, as YAML that parses to the same, and as one line per key,
 * which is what the digest of a job is made of: two ranks whose lines differ would not speak about
 * the same cluster, and the first line that differs names the key.
 */
#include "daemon/config.h"
#include "daemon/config_keys.h"

#include <stdio.h>
#include <string.h>
#include <xxhash.h>

/* Length of the character at s, and its code if it is one that YAML does not read back as it
 * stands: a control character, a line break of Unicode, a byte order mark, no character. Else 0. */
static unsigned special(const char *s, size_t *len)
{
    const unsigned char *p = (const unsigned char *)s;
    *len = 1;
    if (p[0] < 0x20 || p[0] == 0x7f) return p[0];
    if (p[0] == 0xc2 && p[1] >= 0x80 && p[1] < 0xa0) {
        *len = 2;
        return p[1];
    }
    if ((p[0] & 0xf0) != 0xe0 || (p[1] & 0xc0) != 0x80 || (p[2] & 0xc0) != 0x80) return 0;
    unsigned code = (p[0] & 0x0fu) << 12 | (p[1] & 0x3fu) << 6 | (p[2] & 0x3fu);
    bool is_special = code == 0x2028 || code == 0x2029 || code == 0xfeff || code >= 0xfffe;
    if (is_special) *len = 3;
    return is_special ? code : 0;
}

/* Quoted always: no text can turn into something else. */
static ep_status put_text(ep_buf *out, const char *s)
{
    if (s == NULL) return ep_buf_printf(out, "~");
    ep_status status = ep_buf_printf(out, "\"");
    for (size_t len; *s != '\0' && status == EP_OK; s += len) {
        unsigned code = special(s, &len);
        if (code != 0)
            status = ep_buf_printf(out, code < 0x100 ? "\\x%02x" : "\\u%04x", code);
        else if (*s == '"' || *s == '\\')
            status = ep_buf_printf(out, "\\%c", *s);
        else
            status = ep_buf_add(out, s, len);
    }
    return status != EP_OK ? status : ep_buf_printf(out, "\"");
}

static ep_status put_value(ep_buf *out, const config_key *k, const void *base)
{
    const void *at = (const char *)base + k->offset;
    if (k->type == CONFIG_INT) return ep_buf_printf(out, "%d", *(const int *)at);
    return put_text(out, *(const char *const *)at);
}

static const config_rank *list_of(const config *c, const config_section *s, int *n)
{
    bool routers = strcmp(s->name, "routers") == 0;
    *n = routers ? c->n_routers : c->n_shards;
    return routers ? c->routers : c->shards;
}

static ep_status yaml_section(const config *c, const config_section *s, ep_buf *out)
{
    ep_status status = EP_OK;
    if (s->is_value) {
        status = ep_buf_printf(out, "%s: ", s->name);
        if (status == EP_OK) status = put_value(out, &s->keys[0], c);
        return status != EP_OK ? status : ep_buf_printf(out, "\n");
    }
    status = ep_buf_printf(out, "%s:\n", s->name);
    int n = 1;
    const config_rank *ranks = s->is_list ? list_of(c, s, &n) : NULL;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < s->n_keys && status == EP_OK; j++) {
            const char *lead = !s->is_list ? "  " : j == 0 ? "  - " : "    ";
            status = ep_buf_printf(out, "%s%s: ", lead, s->keys[j].name);
            if (status == EP_OK)
                status = put_value(out, &s->keys[j], ranks ? (const void *)&ranks[i] : c);
            if (status == EP_OK) status = ep_buf_printf(out, "\n");
        }
    return status;
}

ep_status config_print_yaml(const config *c, ep_buf *out)
{
    ep_status status = EP_OK;
    for (int i = 0; i < config_n_sections && status == EP_OK; i++)
        status = yaml_section(c, &config_sections[i], out);
    return status;
}

static ep_status line_section(const config *c, const config_section *s, ep_buf *out)
{
    ep_status status = EP_OK;
    int n = 1;
    const config_rank *ranks = s->is_list ? list_of(c, s, &n) : NULL;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < s->n_keys && status == EP_OK; j++) {
            if (s->is_value)
                status = ep_buf_printf(out, "%s: ", s->name);
            else if (s->is_list)
                status = ep_buf_printf(out, "%s[%d].%s: ", s->name, i, s->keys[j].name);
            else
                status = ep_buf_printf(out, "%s.%s: ", s->name, s->keys[j].name);
            if (status == EP_OK)
                status = put_value(out, &s->keys[j], ranks ? (const void *)&ranks[i] : c);
            if (status == EP_OK) status = ep_buf_printf(out, "\n");
        }
    return status;
}

ep_status config_print_lines(const config *c, ep_buf *out)
{
    ep_status status = EP_OK;
    for (int i = 0; i < config_n_sections && status == EP_OK; i++)
        status = line_section(c, &config_sections[i], out);
    return status;
}

uint64_t config_digest(const config *c)
{
    ep_buf lines = {0};
    uint64_t digest = 0;
    if (config_print_lines(c, &lines) == EP_OK) digest = XXH3_64bits(lines.data, lines.len);
    ep_buf_fini(&lines);
    return digest;
}

void config_first_difference(const char *here, const char *there, char *out, size_t out_bytes)
{
    while (*here != '\0' || *there != '\0') {
        size_t n = strcspn(here, "\n"), m = strcspn(there, "\n");
        if (n != m || memcmp(here, there, n) != 0) {
            size_t key = strcspn(n > 0 ? here : there, ":"), vn = key + 2 <= n ? n - key - 2 : 0,
                   vm = key + 2 <= m ? m - key - 2 : 0;
            snprintf(out, out_bytes, "%.*s (%.*s here, %.*s there)", (int)key, n > 0 ? here : there,
                     (int)vn, here + (n - vn), (int)vm, there + (m - vm));
            return;
        }
        here += n + (here[n] == '\n');
        there += m + (there[m] == '\n');
    }
    snprintf(out, out_bytes, "nothing");
}
