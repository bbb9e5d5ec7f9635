/*
 * make_folder MODEL.gguf FOLDER [bf16] [gptq] [odd] [pairs] [v2]: a GGUF model as a folder of
 * Hugging Face's form (tests/hf_make.h), for tests of running clusters.
 */
#include "tests/hf_make.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

int main(int argc, char **argv)
{
    hm_options o = {0};
    const struct {
        const char *name;
        bool *flag;
    } flags[] = {
        {"bf16", &o.bf16}, {"gptq", &o.gptq}, {"odd", &o.odd}, {"pairs", &o.pairs}, {"v2", &o.v2}};
    ep_err err = {{0}};
    model *m = NULL;
    if (argc < 3) return 2;
    for (int a = 3; a < argc; a++)
        for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++)
            if (strcmp(argv[a], flags[i].name) == 0) *flags[i].flag = true;
    if (model_open(&m, argv[1], &err) != EP_OK) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    hm_folder f;
    hm_make(&f, m, &o);
    (void)mkdir(argv[2], 0755);
    bool ok = hm_write(&f, argv[2]);
    if (!ok) perror(argv[2]);
    hm_free(&f);
    model_close(m);
    return ok ? 0 : 1;
}
