#!/bin/sh
# format.sh SOURCE_FOLDER [--fix]: every C file is as clang-format 14 writes it (other versions differ, so they do
# not judge). Skipped aloud without it.
cd "$1" || exit 1
tool=
for name in clang-format-14 clang-format; do
    if [ -z "$tool" ] && "$name" --version 2>/dev/null | grep -q 'version 14\.'; then tool=$name; fi
done
if [ -z "$tool" ]; then
    echo "skipped: no clang-format 14 (deploy/deps.sh all installs it)"
    exit 77
fi
files=$(find base kernels proto model transport router_node expert_shard daemon tests -name '*.[ch]' | sort)
if [ "${2:-}" = "--fix" ]; then
    # shellcheck disable=SC2086
    exec "$tool" -i $files
fi
status=0
for file in $files; do
    if ! "$tool" --dry-run -Werror "$file" 2>/dev/null; then
        echo "$file is not formatted"
        status=1
    fi
done
[ "$status" -eq 0 ] || echo "tests/lint/format.sh . --fix puts it right"
exit $status
