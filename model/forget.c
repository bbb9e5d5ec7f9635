/*
 * model_file_forget: takes the pages of weights that were read and packed out of this process's
 * resident memory. A page fault maps up to 64 KiB around the address, so the neighbours go with
 * them; the range is cut to the part's own map, which makes this safe: read-only file pages come
 * back on the next touch. Files that were opened from memory are not ours and are left alone.
 */
#include "model/file.h"

#include <sys/mman.h>
#include <unistd.h>

#define AROUND ((size_t)64 << 10)

void model_file_forget(const model_file *f, const void *p, size_t bytes)
{
    uintptr_t at = (uintptr_t)p;
    for (size_t i = 0; i < model_file_n_parts(f); i++) {
        const gguf_part *part = model_file_part(f, i);
        uintptr_t start = (uintptr_t)part->map, end = start + part->size;
        if (!part->mapped || at < start || at >= end) continue;
        uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
        uintptr_t from = at - start > AROUND ? at - AROUND : start;
        uintptr_t to = end - at > bytes && end - at - bytes > AROUND ? at + bytes + AROUND : end;
        from &= ~(page - 1);
        to = (to + page - 1) & ~(page - 1); /* the map covers its last page whole */
        (void)madvise((void *)from, to - from,
                      MADV_DONTNEED); /* a hint: failure costs memory only */
        return;
    }
}
