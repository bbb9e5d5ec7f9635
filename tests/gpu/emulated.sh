#!/bin/sh
# emulated.sh SOURCE_FOLDER NVCC PROGRAM: runs the source of kernels on the CPU, thread by thread: `emulated` that of
# the products, `emulated_side` what stands around them. nvcc stands for the host's C++ compiler here, which the project
# otherwise does not need.
cd "$1" || exit 1
nvcc=$2 program=$3
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# Nothing is hashed, so xxHash need not be there.
for file in kernels/cuda/plan.c kernels/cuda/pack.c kernels/formats.c; do
    "$nvcc" -x c -Itests/gpu/stand_in -I. -c "$file" -o "$folder/$(basename "$file" .c).o" -Xcompiler=-std=c11 || exit 1
done
"$nvcc" -x c++ -std=c++17 -I. -c "tests/gpu/$program.cu" -o "$folder/$program.o" \
    -Xcompiler=-O2,-ffp-contract=off,-fno-strict-aliasing &&
    "$nvcc" "$folder"/*.o -o "$folder/$program" || exit 1
"$folder/$program"
