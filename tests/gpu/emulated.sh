#!/bin/sh
# emulated.sh SOURCE_FOLDER NVCC: runs the source of the product kernels on the CPU, thread by thread. nvcc stands
# for the host's C++ compiler here, which the project otherwise does not need.
cd "$1" || exit 1
nvcc=$2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$nvcc" -x c -I. -c kernels/cuda/plan.c -o "$folder/plan.o" -Xcompiler=-std=c11 &&
    "$nvcc" -x c++ -std=c++17 -I. -c tests/gpu/emulated.cu -o "$folder/emulated.o" \
        -Xcompiler=-O2,-ffp-contract=off,-fno-strict-aliasing &&
    "$nvcc" "$folder/emulated.o" "$folder/plan.o" -o "$folder/emulated" || exit 1
"$folder/emulated"
