/*
 * Forgetting: takes the pages of weights that were read and packed out of this process's
 * resident memory. A page fault maps up to 64 KiB around the address, so the neighbours go with
 * them; the range is cut to the part's own map, which makes this safe: read-only file pages come
 * back on the next touch. Files that were opened from memory are not ours and are left alone.
 */
#include "model/file.h"

#include <sys/mman.h>
#include <unistd.h>

#define AROUND ((size_t)64 << 10)

bool model_forget_in(const uint8_t *map, size_t size, const void *p, size_t bytes)
{
    uintptr_t at = (uintptr_t)p, start = (uintptr_t)map, end = start + size;
    if (at < start || at >= end) return false;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = at - start > AROUND ? at - AROUND : start;
    uintptr_t to = end - at > bytes && end - at - bytes > AROUND ? at + bytes + AROUND : end;
    from &= ~(page - 1);
    to = (to + page - 1) & ~(page - 1);                    /* the map covers its last page whole */
    (void)madvise((void *)from, to - from, MADV_DONTNEED); /* a hint: failure costs memory only */
    return true;
}

void model_file_forget(const model_file *f, const void *p, size_t bytes)
{
    for (size_t i = 0; i < model_file_n_parts(f); i++) {
        const gguf_part *part = model_file_part(f, i);
        if (part->mapped && model_forget_in(part->map, part->size, p, bytes)) return;
    }
}
