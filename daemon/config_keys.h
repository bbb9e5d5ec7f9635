#ifndef EP_DAEMON_CONFIG_KEYS_H
#define EP_DAEMON_CONFIG_KEYS_H
/*
 * config_keys: the table of every key of the configuration. Private to daemon/config*.c.
 */
#include "daemon/config.h"

typedef enum config_type { CONFIG_TEXT, CONFIG_TEXT_OR_NULL, CONFIG_INT } config_type;

typedef struct config_key {
    const char *name;
    config_type type;
    size_t offset; /* in config, or in config_rank for lists */
    long min, max;
    const char *value;   /* default, NULL for none */
    const char *choices; /* "a|b", NULL for any text */
    const char *help;
} config_key;

enum { CONFIG_MAX_KEYS = 16 };

typedef struct config_section {
    const char *name;
    const config_key *keys;
    int n_keys;
    bool is_value; /* one key at the top of the file */
    bool is_list;
} config_section;

extern const config_section config_sections[];
extern const int config_n_sections;
extern const char *const config_top_names[];
extern const int config_n_top_names;

const config_section *config_section_find(const char *name); /* NULL: unknown */
/* Writes the defaults of a section's keys into base. */
void config_defaults(const config_section *s, void *base);

#endif
