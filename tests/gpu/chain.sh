#!/bin/sh
# chain.sh SOURCE_FOLDER NVCC: the rules of chain.cuh, read off the code that the compiler made (PTX for sm_90a): a
# kernel that waits for the launch before it stores nothing to global memory before that, loads only past the L1, and
# uses the read-only path nowhere. And the rules of wgmma (in_flight.py).
cd "$1" || exit 1
nvcc=$2 status=0
ptx=$(mktemp)
trap 'rm -f "$ptx"' EXIT
for file in kernels/cuda/side.cu kernels/cuda/gemm_*.cu; do
    "$nvcc" -std=c++17 -O3 -fmad=false -I. -gencode arch=compute_90a,code=compute_90a \
        -Xcompiler=-fno-threadsafe-statics,-fno-exceptions,-fno-rtti -ptx "$file" -o "$ptx" || exit 1
    awk -v file="$file" '
        function close_entry() {
            if (waits == 0) early = ""
            if (waits > 0) n++
            if (waits != releases) early = early "  waits " waits " times, releases " releases " times\n"
            if (early != "") { printf "%s %s:\n%s", file, name, early; bad = 1 }
            waits = releases = 0
            early = ""
        }
        /\.entry/ { close_entry(); name = $0; sub(/.*\.entry /, "", name); sub(/\(.*/, "", name) }
        /griddepcontrol\.wait/ { waits++ }
        /griddepcontrol\.launch_dependents/ { releases++ }
        waits == 0 && /ld\.global|st\.[a-z.]*global|red\.|atom\./ { early = early "  before its wait: " $0 "\n" }
        waits == 0 && /griddepcontrol\.launch_dependents/ { early = early "  releases before it waits\n" }
        /ld\.global[a-z.0-9:]*\.nc/ { early = early "  read-only path: " $0 "\n" }
        END { close_entry(); printf "%s: %d kernels wait\n", file, n; exit bad || n < 2 }' "$ptx" || status=1
    case $file in */gemm_*) python3 -B tests/gpu/in_flight.py "$ptx" || status=1 ;; esac
done
exit $status
