#!/bin/sh
# alone.sh SOURCE_FOLDER: what run.sh builds can be configured with CUDA on a machine without the project's
# libraries, and its CPU part builds and passes there. (Its CUDA part is the same as in this build.)
cd "$1" || exit 1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
options="-DMOED_GPU_ONLY=ON -DMOED_GPU_STAND_IN=ON -DPKG_CONFIG_EXECUTABLE=/nonexistent -DCMAKE_DISABLE_FIND_PACKAGE_MPI=ON"
# $options holds words.
# shellcheck disable=SC2086
cmake -S . -B "$folder/cuda" $options -DMOED_CUDA=ON -DMOED_CUDA_ARCHS=90a-real >"$folder/log" 2>&1 &&
    cmake --build "$folder/cuda" --target help | grep -q bench_cuda &&
    cmake --build "$folder/cuda" --target help | grep -q check_cuda &&
    cmake -S . -B "$folder/cpu" $options -DMOED_CUDA=OFF >"$folder/log" 2>&1 &&
    cmake --build "$folder/cpu" --parallel 2 >"$folder/log" 2>&1 &&
    "$folder/cpu/test_cuda_layout" && "$folder/cpu/test_cuda_stage" && exit 0
tail -n 40 "$folder/log"
exit 1
