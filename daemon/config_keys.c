/*
 * Every key of the configuration, once: name, type, bounds, default, what it means. The parser, the
 * printers, `moed check --keys` and docs/configuration.md come from these rows.
 */
#include "daemon/config_keys.h"

#include <stdlib.h>
#include <string.h>

#define AT(member)   offsetof(config, member)
#define RANK(member) offsetof(config_rank, member)

static const config_key model_keys[] = {
    {"model", CONFIG_TEXT, AT(model), 0, 0, NULL, NULL,
     "GGUF file (or one part of a split one), or a folder with config.json, safetensors and "
     "tokenizer.json; relative to this file's folder"},
};
static const config_key packed_keys[] = {
    {"packed", CONFIG_TEXT_OR_NULL, AT(packed), 0, 0, NULL, NULL,
     "experts packed by `moectl pack`: shards map it and start at once"},
};
static const config_key kernels_keys[] = {
    {"kernels", CONFIG_TEXT, AT(kernels), 0, 0, "auto", "auto|scalar|avx2|avx512|amx",
     "instruction set of the CPU kernels; one the machine lacks is an error"},
};
static const config_key front_keys[] = {
    {"socket", CONFIG_TEXT_OR_NULL, AT(front.socket), 0, 0, NULL, NULL,
     "Unix socket for moectl and protobuf clients"},
    {"control", CONFIG_TEXT_OR_NULL, AT(front.control), 0, 0, NULL, NULL,
     "where ranks dial in: unix:PATH or tcp:HOST:PORT; needed with other hosts"},
};
static const config_key router_keys[] = {
    {"name", CONFIG_TEXT, RANK(name), 0, 0, NULL, NULL, "name in messages; r0, r1, ... by default"},
    {"host", CONFIG_TEXT, RANK(host), 0, 0, "localhost", NULL, "host of mpirun that runs it"},
    {"device", CONFIG_TEXT, RANK(device), 0, 0, "cpu", NULL, "cpu"},
    {"threads", CONFIG_INT, RANK(threads), 1, 1024, "1", NULL, "compute threads"},
    {"kv_tokens", CONFIG_INT, RANK(kv_tokens), 16, 1 << 26, "8192", NULL,
     "positions of the KV cache over all running sequences"},
};
static const config_key shard_keys[] = {
    {"name", CONFIG_TEXT, RANK(name), 0, 0, NULL, NULL, "name in messages; s0, s1, ... by default"},
    {"host", CONFIG_TEXT, RANK(host), 0, 0, "localhost", NULL, "host of mpirun that runs it"},
    {"device", CONFIG_TEXT, RANK(device), 0, 0, "cpu", NULL, "cpu, cuda:N or auto"},
    {"threads", CONFIG_INT, RANK(threads), 1, 1024, "1", NULL, "compute threads"},
    {"experts", CONFIG_TEXT_OR_NULL, RANK(experts), 0, 0, NULL, NULL,
     "experts it owns, such as \"0-3,8\"; left to the placement by default"},
};
static const config_key placement_keys[] = {
    {"strategy", CONFIG_TEXT, AT(placement.strategy), 0, 0, "balanced", "balanced|explicit",
     "balanced: experts not named by a shard are dealt out evenly; explicit: every shard names its "
     "own"},
    {"replicas", CONFIG_INT, AT(placement.replicas), 0, 0, "0", NULL, "extra copies of experts"},
};
static const config_key wire_keys[] = {
    {"combine", CONFIG_TEXT, AT(wire.combine), 0, 0, "exact", "exact",
     "exact: one row back per token and slot, added in slot order by the router"},
};
static const config_key limits_keys[] = {
    {"max_tokens_per_step", CONFIG_INT, AT(limits.max_tokens_per_step), 1, 65536, "512", NULL,
     "rows of one batch"},
    {"prefill_chunk", CONFIG_INT, AT(limits.prefill_chunk), 0, 65536, "0", NULL,
     "prompt tokens of one sequence in one step; 0: as many as the batch has room for"},
    {"max_sequences", CONFIG_INT, AT(limits.max_sequences), 1, 4096, "64", NULL,
     "sequences running at once on one router"},
    {"max_queue", CONFIG_INT, AT(limits.max_queue), 1, 1 << 20, "256", NULL,
     "requests waiting in the daemon; more are refused"},
    {"top_k", CONFIG_INT, AT(limits.top_k), 0, 64, "0", NULL,
     "experts per token, fewer than the model's; 0: the model's"},
    {"deadline_s", CONFIG_INT, AT(limits.deadline_s), 1, 86400, "120", NULL, "of one request"},
    {"per_layer_ms", CONFIG_INT, AT(limits.per_layer_ms), 1, 600000, "2000", NULL,
     "wait for a layer's answers before a slice is sent again"},
    {"layer_tries", CONFIG_INT, AT(limits.layer_tries), 1, 100, "3", NULL,
     "sends of a slice before its shard counts as lost"},
    {"load_s", CONFIG_INT, AT(limits.load_s), 1, 86400, "1800", NULL,
     "until every rank must be ready"},
    {"drain_s", CONFIG_INT, AT(limits.drain_s), 0, 86400, "60", NULL,
     "for running requests when the daemon is asked to stop"},
};
static const config_key launch_keys[] = {
    {"mpirun", CONFIG_TEXT, AT(launch.mpirun), 0, 0, "mpirun", NULL,
     "program that starts the ranks"},
    {"options", CONFIG_TEXT_OR_NULL, AT(launch.options), 0, 0, NULL, NULL,
     "further words for mpirun, split at blanks"},
    {"bind", CONFIG_TEXT, AT(launch.bind), 0, 0, "auto", "auto|none",
     "auto: on machines of several NUMA nodes each rank is bound to one"},
    {"relaunches", CONFIG_INT, AT(launch.relaunches), 0, 1000, "3", NULL,
     "launches in a row that may fail before the daemon gives up"},
};

#define KEYS(k) k, (int)(sizeof(k) / sizeof((k)[0]))
const config_section config_sections[] = {
    {"model", KEYS(model_keys), true, false},          {"packed", KEYS(packed_keys), true, false},
    {"kernels", KEYS(kernels_keys), true, false},      {"front", KEYS(front_keys), false, false},
    {"routers", KEYS(router_keys), false, true},       {"shards", KEYS(shard_keys), false, true},
    {"placement", KEYS(placement_keys), false, false}, {"wire", KEYS(wire_keys), false, false},
    {"limits", KEYS(limits_keys), false, false},       {"launch", KEYS(launch_keys), false, false},
};
const int config_n_sections = (int)(sizeof(config_sections) / sizeof(config_sections[0]));

const char *const config_top_names[] = {"model",   "packed", "kernels",   "front",
                                        "routers", "shards", "placement", "wire",
                                        "limits",  "launch", "spares"};
const int config_n_top_names = (int)(sizeof(config_top_names) / sizeof(config_top_names[0]));

const config_section *config_section_find(const char *name)
{
    for (int i = 0; i < config_n_sections; i++)
        if (strcmp(config_sections[i].name, name) == 0) return &config_sections[i];
    return NULL;
}

void config_defaults(const config_section *s, void *base)
{
    for (int i = 0; i < s->n_keys; i++) {
        const config_key *k = &s->keys[i];
        void *at = (char *)base + k->offset;
        if (k->type == CONFIG_INT)
            *(int *)at = atoi(k->value);
        else
            *(const char **)at = k->value;
    }
}
