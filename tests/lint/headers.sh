#!/bin/sh
# headers.sh SOURCE_FOLDER BUILD_FOLDER COMPILER: each header compiles alone, so no file depends on the order of
# its includes. Headers of instruction sets are left to the compiler flags of their folder.
cd "$1" || exit 1
build=$2 compiler=$3 status=0 n=0
flags=$(pkg-config --cflags libprotobuf-c 2>/dev/null)
generated=$(dirname "$(find "$build" -name moed.pb-c.h | head -n 1)")
for header in $(find base kernels proto model transport router_node expert_shard daemon tests -name '*.h' | sort); do
    case $header in kernels/cuda/*) continue ;; esac
    isa=
    case $header in kernels/cpu/x256.h) isa="-mavx2 -mfma -mf16c" ;; esac
    case $header in kernels/cpu/x512.h) isa="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 -mfma" ;; esac
    # $flags and $isa hold words.
    # shellcheck disable=SC2086
    if ! printf '#include "%s"\n' "$header" | "$compiler" -std=c11 -D_GNU_SOURCE -Wall -Wextra -Werror -Wno-unused-function \
        -Wno-unused-variable -Wno-unused-const-variable $isa $flags -I. -I"$generated" -fsyntax-only -x c -; then
        echo "$header does not compile alone"
        status=1
    fi
    n=$((n + 1))
done
echo "$n headers compiled alone"
[ "$n" -gt 10 ] || status=1
exit $status
