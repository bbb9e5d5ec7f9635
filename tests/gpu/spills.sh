#!/bin/sh
# spills.sh SOURCE_FOLDER NVCC: compiles the product kernels for sm_90a and prints their registers. A spill fails; so
# do wgmma kernels that start with other than 168 registers per thread (of 384: what their warpgroups trade with each
# other) and what the assembler says when it ignores that trade or puts a product's operations one after another.
cd "$1" || exit 1
nvcc=$2 status=0
object=$(mktemp)
trap 'rm -f "$object"' EXIT
for file in kernels/cuda/gemm_*.cu; do
    if ! said=$("$nvcc" -std=c++17 -O3 -fmad=false -I. -Xptxas -v -gencode arch=compute_90a,code=sm_90a \
        -Xcompiler=-fno-threadsafe-statics,-fno-exceptions,-fno-rtti -c "$file" -o "$object" 2>&1); then
        echo "$said"
        status=1
        continue
    fi
    echo "$said" | awk -v file="$file" '
        /Compiling entry/ { name = $0; sub(/.*function ./, "", name); sub(/. for.*/, "", name) }
        /spill stores/ { spills = $5; n++; if ($5 != 0 || $9 != 0) bad = 1 }
        /Used [0-9]+ registers/ && name ~ /wgmma_kernel/ { wgmma++; if ($5 != 168) bad = 1 }
        /[Ww]arning|setmaxnreg|serialized/ { print; bad = 1 }
        /Used [0-9]+ registers/ { printf "%s %s: %s registers, %s bytes spilled\n", file, name, $5, spills }
        END { exit bad || n == 0 || wgmma == 0 }' || status=1
done
exit $status
